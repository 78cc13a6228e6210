"""DAQP: a dual active-set method for dense convex quadratic programs, hot-started from an element's own active set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpgd.problems.conic import ConicProblem
from lpgd.reductions import Form, IntervalForm, IntervalPoint, IntervalVectors
from lpgd.solvers.base import POLYHEDRAL, Capabilities
from lpgd.solvers.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.status import NotConvexError, Status

__all__ = ["DAQP"]

FloatArray = NDArray[np.float64]

# DAQP 0.11 (include/constants.h).
_STATUSES = {
    2: Status.SOLVED,
    1: Status.SOLVED,
    -1: Status.INFEASIBLE,
    -2: Status.NUMERICAL_ERROR,  # cycling
    -3: Status.UNBOUNDED,
    -4: Status.ITERATION_LIMIT,
    -6: Status.INFEASIBLE,  # the equalities alone have no solution
    -7: Status.TIME_LIMIT,
}
_NOT_CONVEX = -5
_PROXIMAL = -1e-3  # relative to the objective, and only where P is singular; with DAQP's -1e-6 solutions are 1e-8 off
_EQUALITY, _AT_UPPER, _AT_LOWER = 5, 1, 3


@dataclass(frozen=True)
class DAQP(ElementwiseSolver):
    """DAQP (Arnström, Bemporad and Axehill 2022) for small and medium dense problems; its solutions are exact.

    With a positive definite P, a workspace keeps its factors, and a solve starts from the active set of the element's
    last solution.  Where P is singular, DAQP runs a proximal-point iteration whose iterate no update can restore: each
    solve sets up anew, from the element's own point and active set (daqp 0.11.0).

    Args:
        tolerance: primal feasibility.
    """

    tolerance: float = 1e-10
    max_iterations: int = 100_000

    name: ClassVar[str] = "DAQP"
    package: ClassVar[str] = "daqp"
    pip_name: ClassVar[str] = "daqp"
    finest_tolerance: ClassVar[float] = 1e-10
    form: ClassVar[type[Form]] = IntervalForm
    capabilities: ClassVar[Capabilities] = Capabilities(cones=POLYHEDRAL, quadratic=True, warm_start=True)
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "primal_tol": "tolerance",
        "iter_limit": "max_iterations",
        "max_iters": "max_iterations",
    }

    def solution_error(self, problem: ConicProblem) -> float:
        return 1e-10  # measured where P is singular; it is 1e-12 elsewhere

    def prepare(self, form: IntervalForm) -> Prepared:
        return _PreparedDAQP(self, form)


class _State(NamedTuple):
    """Where a solve ended: what the next one of the same element starts from."""

    x: FloatArray
    multipliers: FloatArray  # of the bounds, then of the rows


class _PreparedDAQP(Prepared):
    def __init__(self, options: DAQP, form: IntervalForm) -> None:
        self.options = options
        # An update without any constraint is refused (daqp 0.11.0): infinite bounds serve.
        self.n, self.bounds = form.n, form.n if form.has_bounds or not form.m else 0
        self.P, self.A = form.dense_P(), form.dense_A()
        self.size = float(np.abs(self.P).max(initial=0.0))
        # Which rows are equalities is fixed; of bounds that meet, DAQP takes care itself.
        self.sense = np.zeros(self.bounds + form.m, dtype=np.int32)
        self.sense[self.bounds : self.bounds + form.zero] = _EQUALITY
        self.ended_at: FloatArray | None = None  # multipliers of the active set whose factors the workspace has
        self.singular = not form.has_quadratic or self._start(eps_prox=0.0) == _NOT_CONVEX
        if self.singular and self._start(eps_prox=_PROXIMAL) == _NOT_CONVEX:
            raise NotConvexError("DAQP cannot factorise P: the objective is not convex.")

    def _start(self, eps_prox: float) -> int:
        """A model of these matrices.  DAQP copies what it is given."""
        options = self.options
        self.model = options.module().Model()
        self.model.settings = {
            "primal_tol": options.tolerance,
            "iter_limit": options.max_iterations,
            "time_limit": options.time_limit or 0.0,
            "eps_prox": eps_prox,
            "eta_prox": 1e-10,
        }
        ends = np.zeros(self.sense.size)
        return self.model.setup(self.P, np.zeros(self.n), self.A, ends, ends, self.sense.copy())[0]

    def memory(self, form: IntervalForm) -> int:
        return 14_000 + 16 * form.n * (form.n + form.m) + 8 * form.size

    def solve(self, vectors: IntervalVectors, state: _State | None) -> Outcome:
        q, row_lower, row_upper, lower, upper = vectors
        if self.bounds:
            lower, upper = np.concatenate([lower, row_lower]), np.concatenate([upper, row_upper])
        else:
            lower, upper = row_lower, row_upper
        if state is not None and (state.x.size != self.n or state.multipliers.size != self.sense.size):
            state = None
        scale = 1.0
        if self.singular:
            scale = max(self.size, float(np.abs(q).max(initial=0.0))) or 1.0
            flag = self._set_up(q / scale, lower, upper, state, scale)
        else:
            flag = self._move(q, lower, upper, state)
        if flag < 0:
            self.ended_at = None
            return Outcome(_STATUSES.get(flag, Status.NUMERICAL_ERROR), None, 0)
        x, _, flag, info = self.model.solve()
        status, iterations = _STATUSES.get(flag, Status.NUMERICAL_ERROR), info["iterations"]
        multipliers = info["lam"] if scale == 1.0 else scale * info["lam"]
        solved = status is Status.SOLVED
        self.ended_at = multipliers if solved else None
        z = multipliers[: self.bounds] if self.bounds else np.zeros(self.n)
        point = IntervalPoint(x, multipliers[self.bounds :], z)
        return Outcome(status, point, iterations, _State(x, multipliers) if solved else None)

    def _set_up(self, q: FloatArray, lower: FloatArray, upper: FloatArray, state: _State | None, scale: float) -> int:
        """A proximal-point iteration starts at the last iterate of the workspace, whatever problem that was of."""
        start = {} if state is None else {"primal_start": state.x, "dual_start": state.multipliers / scale}
        return self.model.setup(self.P / scale, q, self.A, upper, lower, self.sense.copy(), **start)[0]

    def _move(self, q: FloatArray, lower: FloatArray, upper: FloatArray, state: _State | None) -> int:
        sense = self.sense.copy()  # DAQP writes to it
        if state is not None:
            if self.ended_at is not None and np.array_equal(np.sign(self.ended_at), np.sign(state.multipliers)):
                return self.model.update(f=q, bupper=upper, blower=lower)
            self._mark(sense, state.multipliers, lower, upper)
        return self.model.update(f=q, bupper=upper, blower=lower, sense=sense)

    def _mark(self, sense: NDArray[np.int32], multipliers: FloatArray, lower: FloatArray, upper: FloatArray) -> None:
        """Mark an active set.  An end that is infinite must not be marked: it gives NaN (daqp 0.11.0)."""
        free = sense == 0
        sense[free & (multipliers > 0) & np.isfinite(upper)] = _AT_UPPER
        sense[free & (multipliers < 0) & np.isfinite(lower)] = _AT_LOWER
