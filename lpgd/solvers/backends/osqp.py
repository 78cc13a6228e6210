"""OSQP: a first-order solver for sparse quadratic programs, warm-started, whose solutions are polished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import FloatArray
from lpgd.execution.interrupts import InterruptedSolveError
from lpgd.execution.quiet import quiet
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import Form, IntervalForm, IntervalPoint, IntervalVectors
from lpgd.solvers.base import POLYHEDRAL, Capabilities
from lpgd.status import SetUpError, Status

__all__ = ["OSQP"]

# OSQP 1 (include/public/osqp_api_constants.h).
_STATUSES = {
    1: Status.SOLVED,
    2: Status.INACCURATE,
    3: Status.INFEASIBLE,
    4: Status.INFEASIBLE,
    5: Status.UNBOUNDED,
    6: Status.UNBOUNDED,
    7: Status.ITERATION_LIMIT,
    8: Status.TIME_LIMIT,
    9: Status.NOT_CONVEX,
    11: Status.NUMERICAL_ERROR,
}
_INTERRUPTED = 10
_NOT_CONVEX = 4


@dataclass(frozen=True)
class OSQP(ElementwiseSolver):
    """OSQP (Stellato et al. 2020) for large sparse quadratic programs; linear ones take it very many iterations.

    New matrices get a new workspace: after an update of P and A its results depend on the old ones, and a feasible
    problem was once called infeasible (osqp 1.1.3).

    Args:
        tolerance: absolute and relative.  A polished solution is exact where the active set was found.
        rho: step of the method at a cold start.
        polishing: solve for the active constraints at the end.
    """

    tolerance: float = 1e-7
    max_iterations: int = 100_000
    rho: float = 0.1
    polishing: bool = True

    name: ClassVar[str] = "OSQP"
    package: ClassVar[str] = "osqp"
    pip_name: ClassVar[str] = "osqp"
    finest_tolerance: ClassVar[float] = 1e-9
    takes_interrupts: ClassVar[bool] = True
    problem_form: ClassVar[type[Form]] = IntervalForm
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=POLYHEDRAL, quadratic=True, warm_start=True, active_set=True
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "eps_abs": "tolerance",
        "eps_rel": "tolerance",
        "max_iter": "max_iterations",
        "max_iters": "max_iterations",
        "polish": "polishing",
    }

    def prepare(self, form: IntervalForm) -> Prepared:
        return _PreparedOSQP(self, form)


class _State(NamedTuple):
    """Where a solve ended."""

    x: FloatArray
    y: FloatArray
    rho: float


class _PreparedOSQP(Prepared):
    def __init__(self, options: OSQP, form: IntervalForm) -> None:
        osqp = options.module()
        self.options, self.n, self.m = options, form.n, form.m
        # The bounds are rows, of the variables that have some.
        self.bounded = form.bounded
        row_count = form.m + self.bounded.size
        ones = np.ones(self.bounded.size), (np.arange(self.bounded.size), self.bounded)
        A = sp.vstack([form.A, sp.csr_array(ones, shape=(self.bounded.size, form.n))])
        self.cold = _State(np.zeros(form.n), np.zeros(row_count), options.rho)
        self.solver = osqp.OSQP()
        try:
            # OSQP knows SciPy's matrices, not its arrays (osqp 1.1.3).
            with quiet(not options.verbose):
                self.solver.setup(
                    sp.csc_matrix(form.upper_P()),
                    np.zeros(form.n),
                    sp.csc_matrix(A),
                    np.zeros(row_count),
                    np.zeros(row_count),
                    verbose=options.verbose,
                    max_iter=options.max_iterations,
                    eps_abs=options.tolerance,
                    eps_rel=options.tolerance,
                    rho=options.rho,
                    polishing=options.polishing,
                    time_limit=min(options.time_limit or 1e10, 1e10),
                )
        except osqp.OSQPException as error:
            if error.args and error.args[0] == _NOT_CONVEX:
                raise SetUpError("OSQP cannot factorise P.") from error
            raise

    def memory(self, form: IntervalForm) -> int:
        return 5_000 + 500 * (form.n + form.m + self.bounded.size) + 52 * form.size

    def solve(self, vectors: IntervalVectors, state: _State | None) -> Outcome:
        start = self.cold
        if state is not None and (state.x.size, state.y.size) == (self.cold.x.size, self.cold.y.size):
            start = state
        solver, bounded = self.solver, self.bounded
        # Iterates and step are those of the last problem, unless they are set; so is a step that was adapted.
        solver.update(
            q=vectors.q,
            l=np.concatenate([vectors.row_lower, vectors.lower[bounded]]),
            u=np.concatenate([vectors.row_upper, vectors.upper[bounded]]),
        )
        if self._rho() != start.rho:
            with quiet(not self.options.verbose):
                solver.update_settings(rho=start.rho)
        solver.warm_start(x=start.x, y=start.y)
        # It prints what it could not factorise, and that it need not polish, whatever verbose is (osqp 1.1.3).
        with quiet(not self.options.verbose):
            result = solver.solve(raise_error=False)
        if int(result.info.status_val) == _INTERRUPTED:
            raise InterruptedSolveError
        status = _STATUSES.get(int(result.info.status_val), Status.NUMERICAL_ERROR)
        iterations = int(result.info.iter)
        if status is Status.INFEASIBLE:
            x, y = np.full(self.n, np.nan), np.array(result.prim_inf_cert)
        elif status is Status.UNBOUNDED:
            x, y = np.array(result.dual_inf_cert), np.full(self.cold.y.size, np.nan)
        elif status.has_iterate:
            x, y = np.array(result.x), np.array(result.y)
        else:
            return Outcome(status, None, iterations)
        z = np.zeros(self.n)
        z[bounded] = y[self.m :]
        solved = status is Status.SOLVED
        return Outcome(
            status, IntervalPoint(x, y[: self.m], z), iterations, _State(x, y, self._rho()) if solved else None
        )

    def _rho(self) -> float:
        """The step as it was adapted; OSQP's own ``settings`` keep the first one (osqp 1.1.3)."""
        return self.solver._solver.get_settings().rho
