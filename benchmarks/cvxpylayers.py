"""Convex problems written in CVXPY, against cvxpylayers with diffcp in the same modes, and ours by default."""

from __future__ import annotations

from collections.abc import Iterator

from .conic import conic_case, conic_sides
from .harness import Settings, compare
from .problems import PROGRAMS
from .results import Result, Target, ratio_target

__all__ = ["run"]

TARGETS = {"portfolio": (2.0, 4.0), "logistic": (4.0, 8.0), "sdp": (4.0, 8.0), "nnls": (4.0, 8.0)}
MOREAU = (("MOREAU", "exact"), ("MOREAU", "lpgd"))
NAMED = {"nnls": (("INTERIOR", "exact"), ("INTERIOR", "lpgd"), ("DAQP", "exact"), ("DAQP", "lpgd"), *MOREAU)}


def run(settings: Settings) -> Iterator[Result | Target]:
    for name, bounds in TARGETS.items():
        program = PROGRAMS[name]
        case, instance = conic_case("cvxpylayers", program, program.batch[settings.quick])
        result = compare(case, conic_sides(program, instance, NAMED.get(name, MOREAU)), settings)
        yield result
        yield ratio_target(
            result, f"{program.title}, batch {case.batch}: × cvxpylayers' best mode", *bounds, "cvxpylayers"
        )
