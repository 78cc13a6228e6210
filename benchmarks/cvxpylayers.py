"""Convex problems written in CVXPY, against cvxpylayers with diffcp in the same modes, and ours by default."""

from __future__ import annotations

from collections.abc import Iterator

from .conic import conic_case, conic_sides
from .harness import Settings, compare
from .problems import PROGRAMS
from .results import Result, Target, ratio_target

__all__ = ["run"]

TARGETS = {
    "dense": (3.0, 6.0),
    "portfolio": (4.0, 6.0),
    "logistic": (1.5, 3.0),
    "sdp": (4.0, 8.0),
    "nnls": (8.0, 12.0),
}
MOREAU = (("MOREAU", "exact"), ("MOREAU", "lpgd"))
DENSE = (("DAQP", "exact"), ("DAQP", "lpgd"), *MOREAU)
NAMED = {
    "dense": DENSE,
    "nnls": (("INTERIOR", "exact"), ("INTERIOR", "lpgd"), *DENSE),
}


def run(settings: Settings) -> Iterator[Result | Target]:
    for name, bounds in TARGETS.items():
        program = PROGRAMS[name]
        case, instance = conic_case("cvxpylayers", program, program.batch[settings.quick])
        result = compare(case, conic_sides(program, instance, NAMED.get(name, MOREAU)), settings)
        yield result
        yield ratio_target(
            result, f"{program.title}, batch {case.batch}: × cvxpylayers' best mode", *bounds, "cvxpylayers"
        )
