"""The page of public names is complete, and says what the docstrings say."""

from __future__ import annotations

import lpgd
from tests.api_page import GROUPS, PAGE, page


def test_every_public_name_is_in_one_group() -> None:
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(lpgd.__all__)


def test_the_page_is_that_of_the_docstrings() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "run python -m tests.api_page"
    for module, names in ((lpgd, lpgd.__all__), (lpgd.nodes, lpgd.nodes.__all__)):
        for name in names:
            assert f"`{module.__name__}.{name}`: " in written or f"`lpgd.{name}`: " in written
    assert ": ." not in written  # nothing without a docstring
