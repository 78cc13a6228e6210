"""Quadratic programs in variables in which the objective's curvature is the identity.

With ``P = L Lᵀ`` and ``x = L⁻ᵀ w`` the program becomes one with I for P, ``L⁻¹ q`` for q and ``A L⁻ᵀ`` for A; rows,
multipliers and certificates stay what they are.  A dual active-set method does the same first, for one element after
the other; here it is done for a batch, with the factors that have shown that P is convex, and that steps and
derivatives use as well (:mod:`lpgd.solvers.kkt.schur`).

What is left of an element is a few arrays and one call of a solver, which takes them as they lie.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, flags, from_numpy, integers, rows_where
from lpgd.execution.interrupts import may_be_stopped, pause
from lpgd.execution.progress import Key, advance, current
from lpgd.execution.tasks import SerialExecutor, run_tasks, split
from lpgd.problems.base import State, States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import per_element
from lpgd.solvers.backends.elementwise import report
from lpgd.solvers.conic.convexity import is_definite
from lpgd.solvers.kkt.schur import SchurFactor
from lpgd.status import Status

__all__ = ["WhiteAnswer", "WhiteSolver", "solved_in_white", "white_solution"]

THREADED = 5000
"""Elements with so many entries of A go to threads.  Of fewer, two threads take turns at the interpreter: with DAQP,
batch 64, they took 0.7 of one thread's time at n 50 (60 rows), twice as long at n 20, and 0.55 at n 100."""


WhiteAnswer = tuple[Status, FloatArray | None, FloatArray | None, int]
"""What a solver made of one whitened element: the status, x and the multipliers of its rows, None where there are none,
and the iterations."""
SolveOne = Callable[[FloatArray, FloatArray, FloatArray, FloatArray, State], WhiteAnswer]
"""Rows (m, n), q (n,), lower and upper ends of the rows (m,), each row by row and to be read only, and a state."""


class WhiteSolver(Protocol):
    """A solver of whitened elements."""

    name: ClassVar[str]

    def solver_in_white(self, n: int, m: int, zero: int) -> SolveOne:
        """What solves elements with n variables and m rows, of which the first ``zero`` are equalities.

        An answer depends on the element and its state alone.
        """
        ...

    def white_state(self, x: FloatArray, y: FloatArray) -> State:
        """The warm-start state of an element that is solved: it is known from its point."""
        ...

    def deadline(self) -> float | None: ...


def solved_in_white(
    problem: ConicProblem,
    states: States,
    executor: Executor | None,
    solver: WhiteSolver,
    otherwise: Callable[[ConicProblem, States], ConicSolution],
) -> ConicSolution:
    """The answers of a solver to a batch, of which it sees those elements whitened that can be.

    These are the ones with a surely definite P.

    Args:
        problem, states, executor: as for ``ConicSolver.solve_posed``.
        solver: solves whitened elements.
        otherwise: solves the others.
    """
    structure = problem.structure
    factor = SchurFactor.of(problem, executor) if structure.m or structure.has_bounds else None
    if factor is None:
        return otherwise(problem, states)
    fine = factor.fine.repeat(problem.batch_size // factor.fine.shape[0]) & is_definite(problem)
    if bool(fine.all()):
        return _whitened(problem, factor, states, executor, solver)
    if not bool(fine.any()):
        return otherwise(problem, states)
    white, others = rows_where(fine), rows_where(~fine)
    answers = [
        _whitened(problem.select(white), factor.select(white), _picked(states, white), executor, solver),
        otherwise(problem.select(others), _picked(states, others)),
    ]
    order = torch.argsort(torch.cat([white, others]))
    changes: dict[str, Any] = {
        name: torch.cat([getattr(answer, name) for answer in answers])[order] for name in ("x", "y", "z", "slack")
    }
    for name in ("iterations", "setup_seconds", "solve_seconds"):
        changes[name] = np.concatenate([getattr(answer, name) for answer in answers])[order.numpy()]
    for name in ("statuses", "states"):
        values = [value for answer in answers for value in getattr(answer, name)]
        changes[name] = tuple(values[place] for place in integers(order))
    return replace(answers[0], problem=problem, **changes)


class _Task(NamedTuple):
    """Whitened elements to solve, as plain data that a process can be sent."""

    solver: WhiteSolver
    zero: int
    rows: FloatArray  # (k, m, n), or (1, m, n)
    q: FloatArray  # (k, n)
    lower: FloatArray  # (k, m) the ends of the rows
    upper: FloatArray
    states: Sequence[State]
    deadline: float | None
    progress: Key | None


class _Results(NamedTuple):
    """The results of a task, in the order of its elements; NaN where there is nothing."""

    statuses: list[Status]
    x: FloatArray
    y: FloatArray
    iterations: IntArray
    seconds: FloatArray


class WhiteStates(Sequence[State]):
    """The warm-start states of B elements, which are made as they are asked for; None where one is not solved."""

    def __init__(self, solver: WhiteSolver, found: _Results) -> None:
        self.solver, self.found = solver, found

    def __len__(self) -> int:
        return len(self.found.statuses)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[element] for element in range(*index.indices(len(self))))
        statuses, x, y, *_ = self.found
        return self.solver.white_state(x[index], y[index]) if statuses[index] is Status.SOLVED else None


def _whitened(
    problem: ConicProblem, factor: SchurFactor, states: States, executor: Executor | None, solver: WhiteSolver
) -> ConicSolution:
    finite = flags(problem.finite())
    valid = [element for element in range(problem.batch_size) if finite[element]]
    return white_solution(problem, factor, states, executor, solver, valid)


def white_solution(
    problem: ConicProblem,
    factor: SchurFactor,
    states: States,
    executor: Executor | None,
    solver: WhiteSolver,
    valid: Sequence[int],
) -> ConicSolution:
    """The answers of a solver to a batch whose factors are fine; ``valid`` are the elements with finite data."""
    size, (_, m, n) = problem.batch_size, factor.white.shape
    q = factor.forward(per_element(problem.data.q, size)).numpy()
    rows, (lower, upper) = factor.white.numpy(), _ends(problem, factor)
    period = len(rows)
    if (executor is None or isinstance(executor, ThreadPoolExecutor)) and m * n < THREADED:
        executor = _HERE
    deadline, progress = solver.deadline(), current()
    if executor is _HERE and len(valid) == size and period == size:
        its_states = [states[i % len(states)] for i in range(size)] if len(states) else [None] * size
        found = _solve(_Task(solver, factor.zero, rows, q, lower, upper, its_states, deadline, progress))
    else:
        found = _nothing(size, n, m)
        chunks = [valid[chunk.start : chunk.stop] for chunk in split(len(valid), executor)]
        tasks: list[_Task] = []
        for chunk in chunks:
            whole = slice(chunk[0], chunk[-1] + 1)
            its: Any = whole if whole.stop - whole.start == len(chunk) else chunk
            its_rows = rows if period == 1 else rows[its] if period == size else rows[[i % period for i in chunk]]
            its_states = [states[i % len(states)] for i in chunk] if len(states) else [None] * len(chunk)
            tasks.append(
                _Task(solver, factor.zero, its_rows, q[its], lower[its], upper[its], its_states, deadline, progress)
            )
        for chunk, result in zip(chunks, run_tasks(_solve, tasks, executor, away=_count), strict=True):
            for name in ("x", "y", "iterations", "seconds"):
                getattr(found, name)[chunk] = getattr(result, name)
            for element, status in zip(chunk, result.statuses, strict=True):
                found.statuses[element] = status
    x, own = factor.backward(from_numpy(found.x)), factor.row_count
    slack, z = np.zeros((size, own)), torch.zeros_like(x)
    if own > factor.zero:
        with np.errstate(over="ignore", invalid="ignore"):  # of points that are none: they are judged later
            values = (found.x.reshape(-1, period, 1, n) @ rows[:, :own].swapaxes(1, 2)).reshape(size, own)
            np.maximum((upper[:, :own] - values)[:, factor.zero :], 0.0, out=slack[:, factor.zero :])
        slack[:, : factor.zero][np.isnan(found.x[:, 0])] = np.nan
    if m > own:
        z[:, factor.bounded] = from_numpy(found.y[:, own:])
    solution = ConicSolution(
        problem,
        x=x,
        y=from_numpy(found.y[:, :own]),
        z=z,
        slack=from_numpy(slack),
        statuses=tuple(found.statuses),
        iterations=found.iterations,
        setup_seconds=np.zeros(size),
        solve_seconds=found.seconds,
        states=WhiteStates(solver, found),
    )
    report(solver.name, solution, 0)
    return solution


def _ends(problem: ConicProblem, factor: SchurFactor) -> tuple[FloatArray, FloatArray]:
    """(B, k) the ends of the rows of a factor: of those of A, and of variables that have bounds."""
    size = problem.batch_size
    upper = per_element(problem.data.b, size).numpy()
    lower = np.full(upper.shape, -np.inf)
    lower[:, : factor.zero] = upper[:, : factor.zero]
    if not factor.bounded.shape[0]:
        return lower, upper
    low, high = (bound[:, factor.bounded].numpy() for bound in problem.full_bounds())
    return np.concatenate([lower, low], axis=1), np.concatenate([upper, high], axis=1)


_HERE = SerialExecutor()


def _nothing(count: int, n: int, m: int) -> _Results:
    x, y = np.full((count, n), np.nan), np.full((count, m), np.nan)
    return _Results([Status.INVALID_DATA] * count, x, y, np.zeros(count, dtype=np.int64), np.zeros(count))


def _solve(task: _Task) -> _Results:
    """Solve some elements, one after the other."""
    period, m, n = task.rows.shape
    count = len(task.q)
    solve_one = task.solver.solver_in_white(n, m, task.zero)
    clock, deadline, stops = time.perf_counter, task.deadline, may_be_stopped()
    statuses: list[Status] = [Status.INVALID_DATA] * count
    x: list[FloatArray | None] = [None] * count
    y: list[FloatArray | None] = [None] * count
    iterations, ends_at = [0] * count, [0.0] * count
    every_rows = task.rows if period == count else itertools.cycle(task.rows)
    began = ended = clock()
    for place, (q, lower, upper, rows, state) in enumerate(
        zip(task.q, task.lower, task.upper, every_rows, task.states, strict=False)
    ):
        if stops:
            pause()
        if deadline is not None and time.time() >= deadline:
            statuses[place], ends_at[place] = Status.TIME_LIMIT, ended
            continue
        statuses[place], x[place], y[place], iterations[place] = solve_one(rows, q, lower, upper, state)
        ends_at[place] = ended = clock()
        if task.progress is not None:
            advance(task.progress)
    times = np.array([began, *ends_at])
    points = _stacked(x, n), _stacked(y, m)
    return _Results(statuses, *points, np.array(iterations, dtype=np.int64), times[1:] - times[:-1])


def _stacked(vectors: Sequence[FloatArray | None], size: int) -> FloatArray:
    """Vectors as the rows of one array, NaN where there is none."""
    known = [np.full(size, np.nan) if vector is None else vector for vector in vectors]
    return np.concatenate(known).reshape(len(known), size)


def _count(task: _Task) -> None:
    advance(task.progress, len(task.q))


def _picked(states: States, elements: Tensor) -> States:
    return tuple(states[element % len(states)] for element in integers(elements)) if len(states) else ()
