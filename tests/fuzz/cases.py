"""What a front-end of the fuzz target is, and what came of its cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

__all__ = ["CHUNK", "EXPLAINED", "Chunk", "Finding", "FrontEnd", "source"]

CHUNK = 100
"""Cases of one batch, which are drawn together."""

EXPLAINED = frozenset({"right", "cautious", "warned", "inaccurate", "failed", "refused"})
"""What a case may end in: right, or with a documented warning, status or error."""


class Finding(NamedTuple):
    """A case that nothing explains."""

    case: int
    what: str
    detail: str


@dataclass
class Chunk:
    """What came of the cases ``number * CHUNK`` and after.

    Attributes:
        counts: of outcomes, one for each case.
        patterns: of call patterns that were tried, by name.
        faults: of the batch, or of the way it was called.
        findings: what nothing explains.
    """

    number: int
    counts: Counter[str] = field(default_factory=Counter)
    patterns: Counter[str] = field(default_factory=Counter)
    faults: int = 0
    findings: list[Finding] = field(default_factory=list)

    def add(self, outcomes: list[str], details: list[str], where: str) -> None:
        """Count outcomes, one for each case."""
        for place, (outcome, detail) in enumerate(zip(outcomes, details, strict=True)):
            self.counts[outcome] += 1
            if outcome not in EXPLAINED:
                self.findings.append(Finding(self.number * CHUNK + place, outcome, f"{where}: {detail}"))

    def fault(self, what: str, detail: str, place: int = 0) -> None:
        """Something is wrong with the batch, or with the way it was called."""
        self.faults += 1
        self.findings.append(Finding(self.number * CHUNK + place, what, detail))


FrontEnd = Callable[[int, int], Chunk]
"""From a seed and the number of a chunk to what came of it."""


def source(name: str, seed: int, chunk: int) -> np.random.Generator:
    """The random numbers of one chunk of a front-end, whatever was drawn before."""
    return np.random.default_rng([seed, chunk, *name.encode()])
