"""What idle workspaces hold: as much as they say, and no more of them than are used again."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from lpgd import available
from lpgd.execution.workspaces import WorkspaceCache
from tests.test_interrupts import LISTEN, run

LISTED = [*LISTEN, "CLARABEL", "DAQP", "HIGHS", "PIQP", "PROXQP"]

BATCHED = [name for name in ("MOREAU",) if name in available()]

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def reports(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(*arguments).splitlines() if line.startswith("{")]


@linux
def test_solvers_state_what_their_workspaces_hold() -> None:
    found = reports("tests.memory_run", *LISTED)
    found += reports("tests.memory_run", *BATCHED)
    assert len(found) == 3 * len(LISTED) + 6 * len(BATCHED)
    for report in found:
        assert 0.4 < report["stated"] / report["held"] < 2.5, report


@linux
def test_training_with_new_matrices_does_not_grow() -> None:
    for report in reports("tests.memory_growth", "300", "SCS", "HIGHS", "CLARABEL", *BATCHED):
        assert report["grown"] < 10, report
        assert report["idle"] <= 10, report


def test_a_family_keeps_as_many_as_it_asks_for() -> None:
    cache = WorkspaceCache(capacity=10**6)
    for number in range(50):
        assert cache.take(number) is None
        cache.put(number, "new each time", f"workspace {number}", cost=10, keep=4)
        cache.put(("other", number), "other", number, cost=10)
    assert sum(family == "new each time" for _, family, _, _ in cache.idle.values()) == 4
    assert cache.take(49) == "workspace 49"
    assert cache.cost == 10 * (3 + 50)


def test_a_family_whose_dropped_workspaces_are_missed_gets_more_room() -> None:
    cache = WorkspaceCache(capacity=10**6)
    found = []
    for epoch in range(6):
        found.append(0)
        for number in range(20):
            workspace = cache.take(number)
            found[epoch] += workspace is not None
            cache.put(number, "the same again", workspace or f"workspace {number}", cost=10, keep=4)
    assert found[0] == 0
    assert found[-1] == 20


def test_an_interrupt_in_the_middle_of_a_change_empties_the_cache() -> None:
    class Interrupting(dict[Any, Any]):
        armed = True

        def setdefault(self, key: Any, default: Any = None) -> Any:
            if self.armed:
                raise KeyboardInterrupt
            return super().setdefault(key, default)

    cache = WorkspaceCache(capacity=100)
    cache.put("kept", "family", "workspace", cost=10)
    cache.by_family = Interrupting(cache.by_family)
    with pytest.raises(KeyboardInterrupt):
        cache.put("half done", "family", "another", cost=10)
    cache.by_family.armed = False
    assert cache.take("half done") is None
    assert cache.cost == 0
    cache.put("kept", "family", "workspace", cost=10)
    assert cache.take("kept") == "workspace"
