"""The first training step of the Sudoku model, a linear program whose matrix all boards share; τ 0.1, ρ 0.1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .conic import conic_case, conic_sides
from .harness import Settings, compare
from .problems import CLARABEL_LPGD, PROGRAMS, SCS_EXACT, SCS_LPGD
from .results import Result, Target, ratio_target

__all__ = ["run"]

# At 1e-6, SCS leaves an error of about 1e-5; the peer runs at 1e-8 as well, once.
FINER = (("SCS", "lpgd", 1e-8), ("SCS", "exact", 1e-8))
NAMED = (("INTERIOR", "lpgd"), ("INTERIOR", "exact"), ("DAQP", "lpgd"))
# With ρ > 0 the perturbed problems are quadratic: HiGHS starts those cold, in time that grows with n³.
NAMED_SMALL = (*NAMED, ("HIGHS", "lpgd"))
# batch: modes of the peer, which runs each once, and the bounds against its LPGD and its exact mode
NINE = (
    (8, (SCS_LPGD, CLARABEL_LPGD, SCS_EXACT), ((8.0, 15.0), (25.0, 40.0))),
    (150, (SCS_LPGD, SCS_EXACT), ((20.0, 40.0), (60.0, 120.0))),
)


def run(settings: Settings) -> Iterator[Result | Target]:
    program = PROGRAMS["sudoku4"]
    case, instance = conic_case("sudoku", program, program.batch[settings.quick])
    result = compare(case, conic_sides(program, instance, NAMED_SMALL, finer=FINER), settings)
    yield result
    title = f"Sudoku 4×4, batch {case.batch}: × cvxpylayers LPGD"
    yield ratio_target(result, title, 12.0, 25.0, "cvxpylayers", "lpgd", "lpgd")
    yield ratio_target(result, f"{title} at 1e-8", 12.0, 25.0, "cvxpylayers", "lpgd", "lpgd", "1e-08")
    if settings.quick:
        return
    for batch, modes, bounds in NINE:
        program, large = replace(PROGRAMS["sudoku9"], modes=modes), batch > 8
        case, instance = conic_case("sudoku", program, batch)
        sides = conic_sides(program, instance, NAMED, finer=FINER[:1] if large else FINER)
        # Our runs with the peer's solvers are for the small batch: the large one is for what we would choose.
        own = {f"{solver} {'LPGD' if kind == 'lpgd' else 'exact'}".upper() for solver, kind in modes if large}
        sides = [
            side._replace(slow=large or side.library != "lpgd")
            for side in sides
            if side.library != "lpgd" or side.mode.upper() not in own
        ]
        result = compare(case, sides, settings)
        yield result
        for kind, bound in zip(("lpgd", "exact"), bounds, strict=True):
            mode = "LPGD" if kind == "lpgd" else "exact mode"
            title = f"Sudoku 9×9, batch {batch}: × cvxpylayers' {mode}"
            yield ratio_target(result, title, *bound, "cvxpylayers", kind, "lpgd")
            if not (large and kind == "exact"):
                yield ratio_target(result, f"{title} at 1e-8", *bound, "cvxpylayers", kind, "lpgd", "1e-08")
