"""DAQP: a dual active-set method for dense convex quadratic programs, hot-started from an element's own active set."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lpgd.arrays import FloatArray
from lpgd.problems.base import State, States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.flawless import answered, judged_flawless
from lpgd.solvers.backends.forms import Form, IntervalForm, IntervalPoint, IntervalVectors
from lpgd.solvers.backends.null_space import has_null_space, solved_in_null_space
from lpgd.solvers.backends.whitened import SolveOne, WhiteAnswer, solved_in_white, white_solution
from lpgd.solvers.base import POLYHEDRAL, Begun, Capabilities
from lpgd.solvers.kkt.schur import SchurFactor
from lpgd.status import SetUpError, Status

__all__ = ["DAQP"]

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
_EQUALITY, _AT_UPPER, _AT_LOWER = 5, 1, 3


@dataclass(frozen=True)
class DAQP(ElementwiseSolver):
    """DAQP (Arnström, Bemporad and Axehill 2022) for small and medium dense problems; its solutions are exact.

    A solve starts from the active set of the element's last solution.  Where P is surely definite, batches are solved
    in variables in which P is the identity, each element by one call; elsewhere a workspace keeps the factors of P.  A
    P that is singular, zero in linear programs, is made definite by proximal-point steps
    ``x ← argmin ½xᵀP x + qᵀx + (ε/2)|x - x₋|²``, which end at a solution exactly, after few of them.  DAQP's own
    proximal-point iteration calls half of the bounded problems with a graph Laplacian unbounded, and cannot be restored
    to an element's iterate by an update (daqp 0.11.0).

    Args:
        tolerance: primal feasibility.
    """

    tolerance: float = 1e-10
    max_iterations: int = 100_000

    name: ClassVar[str] = "DAQP"
    package: ClassVar[str] = "daqp"
    is_quick_again: ClassVar[bool] = True
    pip_name: ClassVar[str] = "daqp"
    finest_tolerance: ClassVar[float] = 1e-10
    problem_form: ClassVar[type[Form]] = IntervalForm
    handover: ClassVar[float] = 4e-4
    asks_whether_definite: ClassVar[bool] = True
    reads_rows: ClassVar[bool] = True
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=POLYHEDRAL, quadratic=True, warm_start=True, dense=True, active_set=True
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "primal_tol": "tolerance",
        "iter_limit": "max_iterations",
        "max_iters": "max_iterations",
    }

    def solution_error(self, problem: ConicProblem) -> float:
        return 1e-10  # measured where P is singular; it is 1e-12 elsewhere

    def solve_posed(self, problem: ConicProblem, states: States, executor: Executor | None) -> ConicSolution:
        # DAQP adds equalities to its active set one by one, and factorises P and transforms the rows in plain loops,
        # which is most of its time (daqp 0.11.0).
        otherwise = super().solve_posed
        limited = self if self.shortest == self.time_limit else replace(self, time_limit=self.shortest)

        def whitened(one: ConicProblem, its_states: States) -> ConicSolution:
            return solved_in_white(
                one, its_states, executor, limited, lambda left, starts: otherwise(left, starts, executor)
            )

        return solved_in_null_space(problem, states, whitened)

    def at_once(self, problem: ConicProblem, executor: Executor | None) -> Begun | None:
        limited = self if self.shortest == self.time_limit else replace(self, time_limit=self.shortest)

        def solved(factor: SchurFactor) -> ConicSolution:
            if has_null_space(problem):
                return limited.solve_posed(problem, (), executor)
            return white_solution(problem, factor, (), executor, limited, range(problem.batch_size))

        answer = answered(problem, executor, solved)
        return None if answer is None else Begun(answer, judged_flawless(answer, self.name))

    def solver_in_white(self, n: int, m: int, zero: int) -> SolveOne:
        return _whitened(self, n, m, zero)

    def white_state(self, x: FloatArray, y: FloatArray) -> State:
        return _WhiteState(x, y)

    def prepare(self, form: IntervalForm) -> Prepared:
        return _PreparedDAQP(self, form)

    def prepare_once(self, form: IntervalForm) -> Prepared:
        # Without equalities, a single call differs from a workspace in the last bits (daqp 0.11.0).
        return _PreparedDAQP(self, form, once=form.zero > 0)


class _Answer(NamedTuple):
    """What DAQP made of one problem."""

    status: Status
    x: FloatArray | None = None
    multipliers: FloatArray | None = None  # of the bounds, then of the rows
    iterations: int = 0


class _State(NamedTuple):
    """Where a solve ended: what the next one of the same element starts from."""

    x: FloatArray
    multipliers: FloatArray  # of the bounds, then of the rows


class _WhiteState(NamedTuple):
    """The same of a whitened element."""

    x: FloatArray
    multipliers: FloatArray  # of the rows


DEFINITE = 1e-9
"""The least eigenvalue, relative to the largest entry of P, of one that is not singular."""
PROXIMAL = 1e-3
"""ε, relative to the largest entry of P, or of q in a linear program."""
PROXIMAL_STEPS = 60
"""The most proximal-point steps; where curvature is much smaller than ε, convergence is slow."""
STILL = 1e-12
"""The relative movement at which they end."""
STEADY = 1e-3
"""Steps that change by less than this, relatively, and are long lead away for ever."""


@cache
def _binding() -> ModuleType:
    """DAQP's package, asked for once for each element."""
    return DAQP.module()


def _is_definite(P: FloatArray, least: float) -> bool:
    try:
        np.linalg.cholesky(P - least * np.eye(len(P)))
    except np.linalg.LinAlgError:
        return False
    return True


@lru_cache(maxsize=64)
def _options(
    options: DAQP, bounds: int, row_count: int, zero: int, eliminates: bool
) -> tuple[NDArray[np.int32], dict[str, Any]]:
    """What DAQP is told of each row, and its settings; to be read only."""
    # Which rows are equalities is fixed; of bounds that meet, DAQP takes care itself.
    sense = np.zeros(bounds + row_count, dtype=np.int32)
    sense[bounds : bounds + zero] = _EQUALITY
    settings = {
        "primal_tol": options.tolerance,
        "iter_limit": options.max_iterations,
        "time_limit": options.time_limit or 0.0,
        "eps_prox": 0.0,
        "eq_reduction": 1 if eliminates else -1,
    }
    return sense, settings


class _PreparedDAQP(Prepared):
    """A workspace, or with ``once`` what a single call without one takes; that is faster, and has the same results."""

    def __init__(self, options: DAQP, form: IntervalForm, once: bool = False) -> None:
        # An update without any constraint is refused (daqp 0.11.0): infinite bounds serve.
        self.n, self.bounds = form.n, form.n if form.has_bounds or not form.m else 0
        P, A = form.dense_P(), form.dense_A()
        # A pivot of rounding passes DAQP's own test (daqp 0.11.0).
        self.proximal, definite = 0.0, form.definite
        if not definite:
            size = float(np.abs(P).max(initial=0.0)) or 1.0
            definite = definite is None and form.has_quadratic and _is_definite(P, DEFINITE * size)
            if not definite:
                self.proximal = PROXIMAL * size
                P = P + self.proximal * np.eye(self.n)
        self.module = _binding()
        # By default a workspace does not eliminate equalities where a single call does (daqp 0.11.0).  Without, a fifth
        # less time is taken where P is the identity, and proximal-point steps end three digits nearer.
        eliminates = form.zero > 0 and not self.proximal and not form.is_white
        self.sense, self.settings = _options(options, self.bounds, form.m, form.zero, eliminates)
        self.matrices: Any = (P, A)  # until a workspace has them
        self.model: Any = None if once and not self.proximal else self._set_up()

    def _set_up(self) -> Any:
        """A workspace."""
        P, A = self.matrices
        model = self.module.Model()
        model.settings = self.settings
        ends = np.zeros(self.sense.size)
        # DAQP copies what it is given.
        if model.setup(P, np.zeros(self.n), A, ends, ends, self.sense.copy())[0] == _NOT_CONVEX:
            raise SetUpError("DAQP cannot factorise P.")
        self.matrices = None
        return model

    def memory(self, form: IntervalForm) -> int:
        return 6_000 + 16 * form.n * (form.n + form.m) + 8 * form.size

    def solve(self, vectors: IntervalVectors, state: _State | None) -> Outcome:
        q, row_lower, row_upper, lower, upper, _ = vectors
        if self.bounds:
            lower, upper = np.concatenate([lower, row_lower]), np.concatenate([upper, row_upper])
        else:
            lower, upper = row_lower, row_upper
        if not isinstance(state, _State) or state.x.size != self.n or state.multipliers.size != self.sense.size:
            state = None
        answer = self._iterate if self.proximal else self._solve_once
        status, x, multipliers, iterations = answer(q, lower, upper, state)
        if x is None or multipliers is None:
            return Outcome(status, None, iterations)
        z = multipliers[: self.bounds] if self.bounds else np.zeros(self.n)
        next_state = _State(x, multipliers) if status is Status.SOLVED else None
        return Outcome(status, IntervalPoint(x, multipliers[self.bounds :], z), iterations, next_state)

    def _solve_once(
        self, q: FloatArray, lower: FloatArray, upper: FloatArray, state: _State | None, goes_on: bool = False
    ) -> _Answer:
        """The answer for the P that was factorised; ``goes_on``: from the factors that the last one ended with."""
        if self.model is None:
            answer = self._solve_at_once(q, lower, upper) if state is None else None
            if answer is not None:
                return answer
            self.model = self._set_up()
        # Without marks DAQP goes on with its factors, whose last bits depend on what it solved; steps of one element
        # may.
        marks = {} if goes_on else {"sense": self._sense(lower, upper, state)}
        flag = self.model.update(f=q, bupper=upper, blower=lower, **marks)
        if flag < 0:
            return _Answer(_STATUSES.get(flag, Status.NUMERICAL_ERROR))
        x, _, flag, info = self.model.solve()
        return _Answer(_STATUSES.get(flag, Status.NUMERICAL_ERROR), x, info["lam"], info["iterations"])

    def _solve_at_once(self, q: FloatArray, lower: FloatArray, upper: FloatArray) -> _Answer | None:
        """From a cold start, without a workspace; None where there is no solution: what shows it is lost."""
        P, A = self.matrices
        x, _, flag, info = self.module.solve(P, q, A, upper, lower, self.sense.copy(), **self.settings)
        return _Answer(_STATUSES[flag], x, info["lam"], info["iterations"]) if flag > 0 else None

    def _iterate(self, q: FloatArray, lower: FloatArray, upper: FloatArray, state: _State | None) -> _Answer:
        """Proximal-point steps, from the element's last solution; x is a direction where the steps lead away."""
        x, start, total, step = np.zeros(self.n) if state is None else state.x, state, 0, np.zeros(self.n)
        answer = _Answer(Status.ITERATION_LIMIT)
        for number in range(PROXIMAL_STEPS):
            answer = self._solve_once(q - self.proximal * x, lower, upper, start, goes_on=number > 0)
            total += answer.iterations
            if answer.x is None or answer.multipliers is None or answer.status is not Status.SOLVED:
                return answer._replace(iterations=total)
            last, step = step, answer.x - x
            x, start = answer.x, _State(answer.x, answer.multipliers)
            length, turned = np.abs(step).max(), np.abs(step - last).max()
            if length <= STILL * (1.0 + np.abs(x).max()):
                return answer._replace(iterations=total)
            if turned <= STEADY * length and length > 1.0:
                return answer._replace(status=Status.UNBOUNDED, x=step, iterations=total)
        return answer._replace(status=Status.ITERATION_LIMIT, iterations=total)

    def _sense(self, lower: FloatArray, upper: FloatArray, state: _State | None) -> NDArray[np.int32]:
        """What DAQP is told of each row, and writes to: equalities, and the active set to start from."""
        sense = self.sense.copy()
        if state is not None:
            _mark(sense, lower, upper, state.multipliers)
        return sense


def _mark(sense: NDArray[np.int32], lower: FloatArray, upper: FloatArray, multipliers: FloatArray) -> None:
    """Mark the ends at which inequalities are to start; one that is infinite would give NaN (daqp 0.11.0)."""
    free = sense == 0
    sense[free & (multipliers > 0) & np.isfinite(upper)] = _AT_UPPER
    sense[free & (multipliers < 0) & np.isfinite(lower)] = _AT_LOWER


class _Whitened:
    """Solves programs whose P is the identity, bounds among their rows, each by a call of its own.

    To set them up is little more than a copy of their rows, so that no workspace is worth keeping.
    """

    def __init__(self, options: DAQP, n: int, m: int, zero: int) -> None:
        self.module, self.P, self.zero = _binding(), np.eye(n), zero
        self.solve = self.module.solve
        self.sense, self.settings = _options(options, 0, m, zero, False)

    def __call__(
        self, rows: FloatArray, q: FloatArray, lower: FloatArray, upper: FloatArray, state: State
    ) -> WhiteAnswer:
        sense = self.sense.copy()
        if isinstance(state, _WhiteState) and state.multipliers.size == sense.size:
            _mark(sense, lower, upper, state.multipliers)
        x, _, flag, info = self.solve(self.P, q, rows, upper, lower, sense, **self.settings)
        if flag <= 0:  # what shows it is lost in such a call
            return self._in_workspace(rows, q, lower, upper)
        return _STATUSES[flag], x, info["lam"], info["iterations"]

    def _in_workspace(self, rows: FloatArray, q: FloatArray, lower: FloatArray, upper: FloatArray) -> WhiteAnswer:
        """The same, from a cold start, with the last point where there is no solution."""
        model = self.module.Model()
        model.settings = self.settings
        ends = np.zeros(self.sense.size)
        if model.setup(self.P, np.zeros(q.size), rows, ends, ends, self.sense.copy())[0] == _NOT_CONVEX:
            return Status.NUMERICAL_ERROR, None, None, 0
        flag = model.update(f=q, bupper=upper, blower=lower, sense=self.sense.copy())
        if flag < 0:
            return _STATUSES.get(flag, Status.NUMERICAL_ERROR), None, None, 0
        x, _, flag, info = model.solve()
        return _STATUSES.get(flag, Status.NUMERICAL_ERROR), x, info["lam"], info["iterations"]


_whitened = lru_cache(maxsize=64)(_Whitened)
"""One for all batches of these sizes: it keeps nothing of what it solves."""
