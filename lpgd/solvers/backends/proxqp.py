"""ProxQP: a proximal augmented-Lagrangian solver for dense quadratic programs, warm-started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lpgd.arrays import FloatArray
from lpgd.problems.base import State
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import Form, IntervalForm, IntervalPoint, IntervalVectors
from lpgd.solvers.base import POLYHEDRAL, Capabilities
from lpgd.status import Status

__all__ = ["ProxQP"]

_STATUSES = {
    "PROXQP_SOLVED": Status.SOLVED,
    "PROXQP_MAX_ITER_REACHED": Status.ITERATION_LIMIT,
    "PROXQP_PRIMAL_INFEASIBLE": Status.INFEASIBLE,
    "PROXQP_DUAL_INFEASIBLE": Status.UNBOUNDED,
}
_INFINITE = 1e20  # what ProxQP takes for infinity


@dataclass(frozen=True)
class ProxQP(ElementwiseSolver):
    """ProxQP (Bambade et al. 2022), its dense solver, for quadratic programs.

    It has no time limit, and holds the interpreter's lock while it solves: only an executor with processes solves
    elements in parallel.  Linear programs are refused: feasible ones are called infeasible, or infeasible ones run to
    the iteration limit, depending on a tolerance (proxsuite 0.8.0).  An unbounded quadratic program ends at the
    iteration limit.

    Args:
        tolerance: absolute, of residuals and duality gap.
    """

    tolerance: float = 1e-9
    max_iterations: int = 1000

    name: ClassVar[str] = "PROXQP"
    package: ClassVar[str] = "proxsuite"
    pip_name: ClassVar[str] = "proxsuite"
    finest_tolerance: ClassVar[float] = 1e-11
    problem_form: ClassVar[type[Form]] = IntervalForm
    forgets: ClassVar[bool] = False  # new matrices meet what the old ones left in it
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=POLYHEDRAL,
        quadratic=True,
        warm_start=True,
        time_limit=False,
        releases_gil=False,
        dense=True,
        active_set=True,
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "eps_abs": "tolerance",
        "max_iter": "max_iterations",
        "max_iters": "max_iterations",
    }

    def unsupported(self, structure: ConicStructure) -> str | None:
        if structure.quadratic.nnz == 0:
            return "PROXQP is not reliable on linear programs (proxsuite 0.8.0)"
        return super().unsupported(structure)

    @property
    def updates_matrices(self) -> bool:
        return True

    def prepare(self, form: IntervalForm) -> Prepared:
        return _PreparedProxQP(self, form)


class _PreparedProxQP(Prepared):
    def __init__(self, options: ProxQP, form: IntervalForm) -> None:
        proxqp = options.module().proxqp
        self.cold, self.warm = proxqp.InitialGuess.NO_INITIAL_GUESS, proxqp.InitialGuess.WARM_START
        self.n, self.zero = form.n, form.zero
        # The bounds are rows, of the variables that have some: bounds of ProxQP's own cannot be warm-started, as it
        # takes multipliers of the rows alone (proxsuite 0.8.0).
        self.bounded = form.bounded
        equalities, inequalities = self._rows(form)
        self.rows, inequality_count = form.m - self.zero, inequalities.shape[0]
        self.solver = proxqp.dense.QP(form.n, self.zero, inequality_count)
        settings = self.solver.settings
        settings.eps_abs, settings.eps_rel = options.tolerance, 0.0
        settings.max_iter, settings.verbose = options.max_iterations, options.verbose
        # Residuals alone leave points whose multipliers belong to inactive bounds, 1e-6 away (proxsuite 0.8.0).
        settings.check_duality_gap = True
        settings.eps_duality_gap_abs, settings.eps_duality_gap_rel = options.tolerance, 0.0
        settings.eps_primal_inf = settings.eps_dual_inf = 1e-6  # by default 1e-4, which feasible problems meet
        ends = np.zeros(inequality_count)
        self.solver.init(form.dense_P(), np.zeros(form.n), equalities, np.zeros(self.zero), inequalities, ends, ends)

    def _rows(self, form: IntervalForm) -> tuple[FloatArray, FloatArray]:
        A = form.dense_A()
        return A[: self.zero], np.concatenate([A[self.zero :], np.eye(form.n)[self.bounded]])

    def memory(self, form: IntervalForm) -> int:
        return 10_000 + 35 * form.n * (form.n + form.m + self.bounded.size) + 8 * form.size

    def update(self, form: IntervalForm) -> None:
        equalities, inequalities = self._rows(form)
        self.solver.update(H=form.dense_P(), A=equalities, C=inequalities, update_preconditioner=True)

    def solve(self, vectors: IntervalVectors, state: State) -> Outcome:
        zero, bounded, solver = self.zero, self.bounded, self.solver
        lower = np.concatenate([vectors.row_lower[zero:], vectors.lower[bounded]])
        upper = np.concatenate([vectors.row_upper[zero:], vectors.upper[bounded]])
        solver.update(
            g=vectors.q, b=vectors.row_upper[:zero], l=np.maximum(lower, -_INFINITE), u=np.minimum(upper, _INFINITE)
        )
        if state is not None and [values.size for values in state] == [self.n, zero, upper.size]:
            solver.settings.initial_guess = self.warm
            solver.solve(*state)
        else:
            solver.settings.initial_guess = self.cold
            solver.solve()
        results = solver.results
        status = _STATUSES.get(results.info.status.name, Status.NUMERICAL_ERROR)
        iterations = int(results.info.iter)
        if not status.has_iterate and status not in (Status.INFEASIBLE, Status.UNBOUNDED):
            return Outcome(status, None, iterations)
        # Iterates of a problem without a solution diverge along what proves it, more or less.
        x, y, z = (np.array(values) for values in (results.x, results.y, results.z))  # views of the workspace
        bounds = np.zeros(self.n)
        bounds[bounded] = z[self.rows :]
        point = IntervalPoint(x, np.concatenate([y, z[: self.rows]]), bounds)
        return Outcome(status, point, iterations, (x, y, z) if status is Status.SOLVED else None)
