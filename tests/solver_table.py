"""The table of solvers of conic programs: a new one is one row.

Its tests are those of tests/test_solvers.py, tests/test_scales.py and tests/test_gradients.py that take a row.
"""

from __future__ import annotations

from dataclasses import dataclass

from lpgd import DAQP, ECOS, OSQP, PIQP, SCS, Clarabel, HiGHS, InteriorPoint, Moreau, ProxQP
from lpgd.solvers import ConicSolver


@dataclass(frozen=True)
class SolverCase:
    """One row.

    Args:
        name: of the row.
        solver: the solver, by its default options or others.
        error: allowed in x, y and z.  Interior-point methods converge in the gap, whose root bounds the solution.
        gradient_error: allowed in gradients by default options, relatively.
    """

    name: str
    solver: ConicSolver
    error: float
    gradient_error: float

    def __repr__(self) -> str:
        return self.name


SOLVER_TABLE = [
    SolverCase("CLARABEL", Clarabel(), 1e-4, 2e-4),
    SolverCase("SCS", SCS(), 1e-5, 2e-3),
    SolverCase("ECOS", ECOS(), 1e-4, 1e-3),
    SolverCase("DAQP", DAQP(), 1e-9, 1e-5),
    SolverCase("HIGHS", HiGHS(), 1e-9, 1e-5),
    SolverCase("PIQP", PIQP(), 1e-8, 1e-5),
    SolverCase("PIQP sparse", PIQP(sparse=True), 1e-8, 1e-5),
    SolverCase("OSQP", OSQP(), 1e-5, 1e-4),
    SolverCase("PROXQP", ProxQP(), 1e-7, 1e-4),
    SolverCase("INTERIOR", InteriorPoint(), 1e-5, 2e-4),
    SolverCase("MOREAU", Moreau(), 1e-5, 2e-4),
    SolverCase("MOREAU ipm", Moreau(method="ipm"), 1e-4, 2e-4),
]
