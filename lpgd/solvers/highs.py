"""HiGHS: simplex, hot-started, for linear programs, and an active-set method for convex quadratic ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp

from lpgd.problems.conic import ConicProblem
from lpgd.reductions import Form, IntervalForm, IntervalPoint, IntervalVectors
from lpgd.solvers.base import POLYHEDRAL, Capabilities
from lpgd.solvers.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.status import Status

__all__ = ["HiGHS"]

_STATUSES = {
    "kOptimal": Status.SOLVED,
    "kModelEmpty": Status.SOLVED,
    "kInfeasible": Status.INFEASIBLE,
    "kUnbounded": Status.UNBOUNDED,
    "kTimeLimit": Status.TIME_LIMIT,
    "kIterationLimit": Status.ITERATION_LIMIT,
}


@dataclass(frozen=True)
class HiGHS(ElementwiseSolver):
    """HiGHS (Huangfu and Hall 2018) for linear programs, and convex quadratic ones of up to about a hundred variables.

    A linear program is solved by the simplex method from the element's own basis, or from the slack basis: its
    solutions are vertices, exact up to rounding.  Quadratic programs are started cold each time and take about the cube
    of the number of variables, and about one in thirty with 50 variables ends as a NUMERICAL_ERROR; for those
    :class:`~lpgd.solvers.DAQP` is faster (highspy 1.15.1).

    Args:
        tolerance: primal and dual feasibility tolerance, at least 1e-10.
        presolve: reduce a linear program before a cold start.
    """

    tolerance: float = 1e-9
    max_iterations: int = 1_000_000
    presolve: bool = False

    name: ClassVar[str] = "HIGHS"
    package: ClassVar[str] = "highspy"
    pip_name: ClassVar[str] = "highspy"
    finest_tolerance: ClassVar[float] = 1e-9
    form: ClassVar[type[Form]] = IntervalForm
    capabilities: ClassVar[Capabilities] = Capabilities(cones=POLYHEDRAL, quadratic=True, warm_start=True)
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "max_iters": "max_iterations",
        "simplex_iteration_limit": "max_iterations",
    }

    def solution_error(self, problem: ConicProblem) -> float:
        # The basis is exact; what is left is the rounding of its factors (measured on planted problems).
        return 1e-10 if problem.structure.quadratic.nnz else 1e-12

    def prepare(self, form: IntervalForm) -> Prepared:
        return _PreparedHiGHS(self, form)


class _Basis:
    """A basis of HiGHS that pickles."""

    def __init__(self, basis: Any) -> None:
        self.basis = basis

    def __reduce__(self) -> Any:
        basis = self.basis
        return _basis_of, (tuple(map(int, basis.col_status)), tuple(map(int, basis.row_status)))


def _basis_of(columns: tuple[int, ...], rows: tuple[int, ...]) -> _Basis:
    highspy = HiGHS.module()
    basis = highspy.HighsBasis()
    basis.col_status = [highspy.HighsBasisStatus(status) for status in columns]
    basis.row_status = [highspy.HighsBasisStatus(status) for status in rows]
    basis.valid = True
    return _Basis(basis)


def _check(highspy: Any, status: Any, what: str) -> None:
    """HiGHS reports what it refuses by a return value."""
    if status == highspy.HighsStatus.kError:
        raise ValueError(f"HiGHS refuses {what}.")


class _PreparedHiGHS(Prepared):
    def __init__(self, options: HiGHS, form: IntervalForm) -> None:
        highspy = options.module()
        self.options, self.form, self.quadratic = options, form, form.has_quadratic
        self.solver = solver = highspy.Highs()
        settings = {
            "output_flag": options.verbose,
            "solver": "choose" if self.quadratic else "simplex",
            "presolve": "on" if options.presolve else "off",
            "parallel": "off",
            "primal_feasibility_tolerance": max(options.tolerance, 1e-10),
            "dual_feasibility_tolerance": max(options.tolerance, 1e-10),
            "simplex_iteration_limit": options.max_iterations,
            "qp_iteration_limit": options.max_iterations,
            # By default 1e-7 is added to P, which moves solutions by as much, and entries of A below 1e-9 are dropped.
            "qp_regularization_value": 0.0,
            "small_matrix_value": 1e-12,
        }
        for name, value in settings.items():
            _check(highspy, solver.setOptionValue(name, value), name)
        n, m, A = form.n, form.m, form.A
        free, ends = np.full(n, np.inf), np.zeros(m)
        colwise, minimise = 1, 1
        _check(
            highspy,
            solver.passModel(
                n, m, A.nnz, colwise, minimise, 0.0, np.zeros(n), -free, free, ends, ends,
                A.indptr, A.indices, A.data, np.zeros(n, np.int32),
            ),
            "passModel",
        )  # fmt: skip
        if self.quadratic:
            lower, triangular = sp.csc_array(form.upper_P().T), 1
            _check(
                highspy,
                solver.passHessian(n, lower.nnz, triangular, lower.indptr, lower.indices, lower.data),
                "passHessian",
            )
        self.columns, self.rows = np.arange(n, dtype=np.int32), np.arange(m, dtype=np.int32)

    def solve(self, vectors: IntervalVectors, state: Any) -> Outcome:
        solver, form, quadratic = self.solver, self.form, self.quadratic
        solver.changeColsCost(form.n, self.columns, vectors.q)
        solver.changeColsBounds(form.n, self.columns, vectors.lower, vectors.upper)
        solver.changeRowsBounds(form.m, self.rows, vectors.row_lower, vectors.row_upper)
        if state is not None and not quadratic and len(state.basis.row_status) == form.m:
            solver.setBasis(state.basis)
        else:
            solver.clearSolver()
        if self.options.time_limit is not None:
            # The clock runs on from solve to solve (highspy 1.15.1).
            solver.setOptionValue("time_limit", solver.getRunTime() + self.options.time_limit)
        solver.run()
        status = _STATUSES.get(solver.getModelStatus().name, Status.NUMERICAL_ERROR)
        info = solver.getInfo()
        iterations = max(info.qp_iteration_count if quadratic else info.simplex_iteration_count, 0)
        if not status.has_iterate:
            return Outcome(status, None, iterations)
        found = solver.getSolution()
        x, y, z = (np.array(part) for part in (found.col_value, found.row_dual, found.col_dual))
        next_state = _Basis(solver.getBasis()) if status is Status.SOLVED and not quadratic else None
        return Outcome(status, IntervalPoint(x, -y, -z), iterations, next_state)
