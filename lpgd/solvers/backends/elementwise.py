"""Solvers of one element at a time: batches, threads, re-use of prepared workspaces and forms are done here, once.

A backend is one file: a frozen dataclass of options that declares what it can do (``capabilities``), in which form it
sees problems (``problem_form``) and how it prepares one element's matrices (``prepare``), and a :class:`Prepared` that
solves for any vectors.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, IntArray, from_numpy
from lpgd.execution.interrupts import InterruptedSolveError, hearing, kept_handler, pause, send_on
from lpgd.execution.memo import TensorMemo
from lpgd.execution.tasks import SerialExecutor, run_tasks
from lpgd.execution.workspaces import workspaces
from lpgd.problems.conic.elements import ElementView
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.forms import Form, Matrices, RowForm, Vectors, groups_by_bounds
from lpgd.solvers.base import ConicSolver
from lpgd.status import SetUpError, Status

__all__ = ["ElementwiseSolver", "Outcome", "Prepared"]


class Outcome(NamedTuple):
    """One element's result.

    Attributes:
        status: the result.
        point: a named tuple of the solver's form, such as ``RowPoint``; it is kept, so nothing may write to it later.
            Of an infeasible problem multipliers that prove it, of an unbounded one a direction, where the solver tells;
            None where there is nothing.
        iterations: of the solver.
        state: whatever the backend wants to be warm-started from.
    """

    status: Status
    point: Any
    iterations: int
    state: Any = None


class Prepared(ABC):
    """A workspace for one element's matrices; never used by two threads at once."""

    @abstractmethod
    def solve(self, vectors: Any, state: Any) -> Outcome:
        """Solve for these vectors of the solver's form, from ``state`` (None: cold).

        The result depends on the data and the state only, up to the solver's tolerance.

        Raises:
            InterruptedSolveError: the solver has a handler of SIGINT of its own, and stopped because of it.
        """

    @abstractmethod
    def memory(self, form: Any) -> int:
        """About how many bytes it and its form hold: what the cache of idle workspaces is bounded by.

        Measured as the growth of the process, for each solver; within a factor of two for programs of 8 to 800
        variables.
        """

    def update(self, form: Any) -> None:
        """Take new values of P and A on the same pattern; only where the solver's ``updates_matrices`` is true."""
        raise TypeError(f"{type(self).__name__} declares no update of its matrices.")


class ElementwiseSolver(ConicSolver):
    """A solver of one element at a time, prepared once for all elements that share its matrices."""

    problem_form: ClassVar[type[Form]] = RowForm
    """How it sees problems."""

    takes_interrupts: ClassVar[bool] = False
    """Whether it puts a handler of SIGINT of its own in place of Python's for the time of each solve."""

    @property
    def form_type(self) -> type[Form]:
        """How this very solver sees problems: as its class does."""
        return self.problem_form

    @property
    def runs_in_threads(self) -> bool:
        """Whether threads make a batch faster: other threads run while it solves."""
        return self.capabilities.releases_gil

    @property
    def updates_matrices(self) -> bool:
        """Whether a workspace takes new matrices without leaving a trace of the old ones in its results."""
        return False

    @abstractmethod
    def prepare(self, form: Any) -> Prepared:
        """Set up, scale and factorise whatever depends on the matrices only.

        Raises:
            SetUpError: the solver refuses them.
        """

    def solve_posed(self, problem: ConicProblem, states: Sequence[Any], executor: Executor | None) -> ConicSolution:
        self.module()
        if executor is None and not self.runs_in_threads:
            executor = SerialExecutor()
        view = ElementView(problem)
        digests = _digests(view)
        # Elements that start from one state follow each other: a workspace that is in that state stays there.
        chunks = view.groups(view.valid, executor, len(states) or None)
        tasks: list[_Task] = []
        results: list[_Results] = []
        threads = executor is None or isinstance(executor, ThreadPoolExecutor)
        key = (self, problem.structure.digest)
        aside = self.takes_interrupts and hearing() and _seconds.get(key, np.inf) * len(view.valid) > ASIDE
        if threads and len(chunks) > 1:
            trial = chunks[0][:TRIAL]
            tasks.append(_task(self, view, digests, trial, states))
            results += run_tasks(_solve_elements, tasks, SerialExecutor(), aside)
            chunks[0] = chunks[0][TRIAL:]
            if results[0].seconds < QUICK:
                chunks = [[element for chunk in chunks for element in chunk]]
        rest = [_task(self, view, digests, elements, states) for elements in chunks if elements]
        results += run_tasks(_solve_elements, rest, executor, aside)
        if self.takes_interrupts:
            _remember(key, max((part.seconds for part in results), default=0.0))
        return _assemble(problem, tasks + rest, results)


TRIAL, QUICK = 2, 6e-4
"""How many elements are solved first; where one takes fewer seconds than this, so are the others, in this thread: to
hand the interpreter over takes up to a tenth of a millisecond, several times for each element."""
ASIDE = 2e-3
"""A solver that takes interrupts works aside of the main thread if that is for more seconds than this: to hand it over
takes a tenth of a millisecond, and as long as it lasts every interrupt is heard.  In the main thread, one that comes
after the solver's last look is not."""
_seconds: dict[Any, float] = {}
"""How long an element took, by solver and structure; where that is not known, a solver works aside."""
_KNOWN = 1024


def _remember(key: Any, seconds: float) -> None:
    if len(_seconds) >= _KNOWN and key not in _seconds:
        _seconds.clear()
    _seconds[key] = seconds


class _Task(NamedTuple):
    """Elements to solve, as plain data that a process can be sent."""

    solver: ElementwiseSolver
    structure: ConicStructure
    elements: list[int]
    matrices: dict[int, tuple[FloatArray, FloatArray, bytes]]  # P, A and their digest, by pair
    pairs: list[int]  # for each element, its pair
    vectors: Vectors  # (k, ·) or (1, ·) each
    states: list[Any]
    distinct: int  # distinct pairs in the whole batch


class _Results(NamedTuple):
    """The results of a task, in the order of its elements; points in the problem's own form, NaN where none is."""

    statuses: list[Status]
    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray
    iterations: IntArray
    setup_seconds: FloatArray
    solve_seconds: FloatArray
    states: list[Any]

    @property
    def seconds(self) -> float:
        """How long one of its elements took."""
        return float((self.setup_seconds + self.solve_seconds).mean()) if self.statuses else 0.0

    @classmethod
    def empty(cls, count: int, structure: ConicStructure) -> _Results:
        x, z = (np.full((count, structure.n), np.nan) for _ in range(2))
        y, slack = (np.full((count, structure.m), np.nan) for _ in range(2))
        statuses: list[Any] = [Status.INVALID_DATA] * count
        states: list[Any] = [None] * count
        return cls(statuses, x, y, z, slack, np.zeros(count, dtype=np.int64), np.zeros(count), np.zeros(count), states)


def _task(
    solver: ElementwiseSolver, view: ElementView, digests: list[bytes], elements: list[int], states: Sequence[Any]
) -> _Task:
    pairs = [element % view.distinct for element in elements]
    return _Task(
        solver,
        view.problem.structure,
        elements,
        {pair: (view.row("P", pair), view.row("A", pair), digests[pair]) for pair in set(pairs)},
        pairs,
        Vectors(*(view.rows(name, elements) for name in Vectors._fields)),
        [states[element % len(states)] if states else None for element in elements],
        view.distinct,
    )


def _assemble(problem: ConicProblem, tasks: Sequence[_Task], results: Sequence[_Results]) -> ConicSolution:
    whole = _Results.empty(problem.batch_size, problem.structure)
    for task, part in zip(tasks, results, strict=True):
        for name in ("x", "y", "z", "slack", "iterations", "setup_seconds", "solve_seconds"):
            getattr(whole, name)[task.elements] = getattr(part, name)
        for element, status, state in zip(task.elements, part.statuses, part.states, strict=True):
            whole.statuses[element], whole.states[element] = status, state
    x, y, z, slack = (from_numpy(part).to(problem.device) for part in (whole.x, whole.y, whole.z, whole.slack))
    return ConicSolution(
        problem,
        x=x,
        y=y,
        z=z,
        slack=slack,
        statuses=tuple(whole.statuses),
        iterations=whole.iterations,
        setup_seconds=whole.setup_seconds,
        solve_seconds=whole.solve_seconds,
        states=tuple(whole.states),
    )


_memo = TensorMemo()


def _digests(view: ElementView) -> list[bytes]:
    """A fingerprint of the content of each (P, A) pair."""
    P, A = (_row_digests(view.problem.data._asdict()[name], view.data[name]) for name in ("P", "A"))
    return [P[pair % len(P)] + A[pair % len(A)] for pair in range(view.distinct)]


def _row_digests(tensor: Tensor, values: FloatArray) -> list[bytes]:
    """Fingerprints of the rows of a datum."""

    def compute() -> list[bytes]:
        rows = np.ascontiguousarray(np.atleast_2d(values))
        return [hashlib.sha256(row).digest() for row in rows]

    return _memo(tensor, "digests", compute)


def _solve_elements(task: _Task) -> _Results:
    """Solve some elements, and leave the handler of interrupts as it was."""
    with kept_handler() if task.solver.takes_interrupts else nullcontext():
        return _solve_groups(task)


def _solve_groups(task: _Task) -> _Results:
    """Solve some elements, those with the same bounds at once as far as translation goes."""
    results = _Results.empty(len(task.elements), task.structure)
    vectors = Vectors(*(np.broadcast_to(datum, (len(task.elements), datum.shape[1])) for datum in task.vectors))
    keyed = task.solver.form_type.keyed_by_bounds
    lower, upper = (np.isfinite(bound) if keyed else np.ones(bound.shape, bool) for bound in vectors[2:])
    groups = groups_by_bounds(lower, upper)
    for places, finite_lower, finite_upper in groups:
        part = vectors if len(groups) == 1 else Vectors(*(datum[places] for datum in vectors))
        _solve_group(task, places, part, finite_lower, finite_upper, results)
    return results


class _Held(NamedTuple):
    """A workspace in use, and what it goes back to the cache under."""

    pair: int
    key: tuple[Any, ...]
    form: Form
    prepared: Prepared


def _solve_group(
    task: _Task,
    places: list[int],
    part: Vectors,
    finite_lower: BoolArray,
    finite_upper: BoolArray,
    results: _Results,
) -> None:
    """Solve elements with the same finite bounds; workspaces are taken from this process's cache, and put back."""
    family = (task.solver, task.structure.digest, finite_lower.tobytes(), finite_upper.tobytes())
    frame = task.solver.form_type.frame_of(task.structure, finite_lower, finite_upper)
    vectors = frame.vectors(part)
    one = type(vectors)
    points, kept = [], []
    held: _Held | None = None
    clock = time.perf_counter
    for index, row in enumerate(zip(*vectors, strict=True)):
        place, pair = places[index], task.pairs[places[index]]
        if held is None or held.pair != pair:
            held, started = _hand_back(held, family, task), clock()
            P, A, digest = task.matrices[pair]
            key = (*family, digest)
            try:
                taken = _workspace(task, key, family, Matrices(task.structure, P, A, finite_lower, finite_upper))
            except SetUpError:
                results.statuses[place] = Status.NUMERICAL_ERROR
                continue
            held = _Held(pair, key, *taken)
            results.setup_seconds[place] = clock() - started
        started = clock()
        outcome = _solved(held.prepared, one(*row), task.states[place])
        results.solve_seconds[place] = clock() - started
        results.statuses[place], results.states[place] = outcome.status, outcome.state
        results.iterations[place] = outcome.iterations
        if outcome.point is not None:
            kept.append(index)
            points.append(outcome.point)
    _hand_back(held, family, task)
    if kept:
        point = type(points[0])(*(np.array(parts) for parts in zip(*points, strict=True)))
        if len(kept) < len(places):
            vectors = one(*(datum[kept] for datum in vectors))
        rows = [places[index] for index in kept]
        pairs = [task.pairs[row] for row in rows]
        shared = len(task.matrices) == 1
        A = task.matrices[pairs[0]][1] if shared else np.stack([task.matrices[pair][1] for pair in pairs])
        for name, value in frame.invert(point, vectors, A)._asdict().items():
            getattr(results, name)[rows] = value


def _solved(prepared: Prepared, vectors: Any, state: Any) -> Outcome:
    """One solve; an interrupt that it took goes to Python, and where Python's handler goes on, so does the solve."""
    while True:
        pause()
        try:
            return prepared.solve(vectors, state)
        except InterruptedSolveError:
            pause()
            send_on()


def _hand_back(held: _Held | None, family: tuple[Any, ...], task: _Task) -> None:
    if held is not None:
        form, prepared = held.form, held.prepared
        # One more than stay where it is given new data: that one is then the oldest.
        workspaces.put(held.key, family, (form, prepared), prepared.memory(form), _room(task) + 1)


def _room(task: _Task) -> int:
    """How many workspaces of a family stay idle: this batch's own matrices, and those of one augmentation."""
    return 2 * task.distinct + 4


def _workspace(task: _Task, key: tuple[Any, ...], family: tuple[Any, ...], matrices: Matrices) -> tuple[Form, Prepared]:
    found = workspaces.take(key)
    if found is not None:
        return found
    # Copies: a view would keep the whole batch, and see what is written to it later.
    form = task.solver.form_type(replace(matrices, P=matrices.P.copy(), A=matrices.A.copy()))
    if task.solver.updates_matrices:
        stale = workspaces.take_oldest(family, _room(task))
        if stale is not None:
            prepared = stale[1]
            prepared.update(form)
            return form, prepared
    return form, task.solver.prepare(form)
