"""The first training step of the Sudoku model, a linear program whose matrix all boards share; τ 0.1, ρ 0.1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .conic import conic_case, conic_sides
from .harness import Settings, compare
from .problems import PROGRAMS, SCS_EXACT, SCS_LPGD
from .results import Result, Target, ratio_target

__all__ = ["run"]

# At 1e-6, SCS leaves an error of about 1e-5; the peer runs at 1e-8 as well, once.
FINER = (("SCS", "lpgd", 1e-8), ("SCS", "exact", 1e-8))
NAMED = (("INTERIOR", "lpgd"), ("INTERIOR", "exact"), ("DAQP", "lpgd"))
# With ρ > 0 the perturbed problems are quadratic: HiGHS starts those cold, in time that grows with n³.
NAMED_SMALL = (*NAMED, ("HIGHS", "lpgd"), ("MOREAU", "lpgd"), ("MOREAU", "exact"))
LARGE, PART = 150, 50
"""The peer's exact mode takes 130 MiB for each board: it runs on a third of the large batch, and counts three times."""


def run(settings: Settings) -> Iterator[Result | Target]:
    program = PROGRAMS["sudoku4"]
    case, instance = conic_case("sudoku", program, program.batch[settings.quick])
    result = compare(case, conic_sides(program, instance, NAMED_SMALL, finer=FINER), settings)
    yield result
    yield from _targets(result, "lpgd", "LPGD", (12.0, 25.0))
    if not settings.quick:
        yield from _nine(settings)
        yield from _nine_large(settings)


def _targets(result: Result, kind: str, mode: str, bounds: tuple[float, float]) -> Iterator[Target]:
    """At the usual tolerance and, where it was measured, at the finer one."""
    title = f"{result.title}, batch {result.batch}: × cvxpylayers' {mode}"
    yield ratio_target(result, title, *bounds, "cvxpylayers", kind, "lpgd")
    finer = "1e-08"
    if any(finer in entry.label and entry.kind == kind for entry in result.entries):
        yield ratio_target(result, f"{title} at 1e-8", *bounds, "cvxpylayers", kind, "lpgd", finer)


def _nine(settings: Settings) -> Iterator[Result | Target]:
    program = PROGRAMS["sudoku9"]
    case, instance = conic_case("sudoku", program, 8)
    sides = conic_sides(program, instance, NAMED, slow=program.modes, finer=FINER)
    result = compare(case, sides, settings)
    yield result
    yield from _targets(result, "lpgd", "LPGD", (10.0, 20.0))
    yield from _targets(result, "exact", "exact mode", (25.0, 40.0))


def _nine_large(settings: Settings) -> Iterator[Result | Target]:
    """Each side of the peer once, ours once after a warm-up."""
    program, once = replace(PROGRAMS["sudoku9"], modes=(SCS_LPGD,)), replace(settings, repeats=1)
    case, instance = conic_case("sudoku", program, LARGE)
    sides = conic_sides(program, instance, NAMED, slow=program.modes, finer=FINER[:1])
    result = compare(case, [side for side in sides if side.mode != "SCS LPGD" or side.library != "lpgd"], once)
    part_case, part = conic_case("sudoku", program, PART)
    exact = conic_sides(replace(program, modes=(SCS_EXACT,)), part, slow=(SCS_EXACT,))
    slowest = [
        side for side in exact if side.library != "lpgd" and side.mode == "SCS exact"
    ]  # Moreau is among ``sides``
    (entry,) = compare(part_case, slowest, once).entries
    times = LARGE // PART
    entry.mode += f" ({times} × batch {PART})"
    entry.timing.forward = [times * seconds for seconds in entry.timing.forward]
    entry.timing.backward = [times * seconds for seconds in entry.timing.backward]
    result.entries.append(entry)
    yield result
    yield from _targets(result, "lpgd", "LPGD", (20.0, 40.0))
    yield from _targets(result, "exact", "exact mode", (60.0, 120.0))
