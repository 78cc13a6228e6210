"""Settings of every test run."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

from lpgd import ECOS, MissingPackageError
from lpgd.execution.workspaces import workspaces

os.environ.setdefault("MPLBACKEND", "Agg")  # before matplotlib is imported: no test opens a window

# Solvers' times vary too much for a deadline.  CI draws the same examples each time: only a change can turn it red.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def _no_workspace_is_left_over() -> None:
    """A used SCS workspace keeps its scaling: results depend, within the tolerance, on what it solved before."""
    workspaces.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test that needs ECOS is skipped where its package has no wheels and was not built."""
    try:
        return (yield)
    except MissingPackageError as error:
        if sys.version_info >= (3, 13) and not ECOS.is_installed() and "ECOS needs a package" in str(error):
            pytest.skip("ecos has no wheels for Python 3.13 and later")
        raise
