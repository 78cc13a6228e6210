"""Solvers of one element at a time: batches, threads, re-use of prepared workspaces and forms are done here, once.

A backend is one file: a frozen dataclass of options that declares what it can do (``capabilities``), in which form it
sees problems (``problem_form``) and how it prepares one element's matrices (``prepare``), and a :class:`Prepared` that
solves for any vectors.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lpgd.arrays import BoolArray, FloatArray, IntArray, from_numpy
from lpgd.execution.interrupts import InterruptedSolveError, hearing, kept_handler, pause, send_on
from lpgd.execution.memo import TensorMemo
from lpgd.execution.progress import Key, advance, current
from lpgd.execution.tasks import SerialExecutor, run_tasks
from lpgd.execution.workspaces import fingerprints, workspaces
from lpgd.problems.base import State, States
from lpgd.problems.conic.elements import ElementView
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.forms import Form, Matrices, RowForm, Vectors
from lpgd.solvers.backends.prepared import Outcome, Pair, Prepared, Workspace, fits
from lpgd.solvers.base import ConicSolver
from lpgd.solvers.convexity import is_definite
from lpgd.status import SetUpError, Status

__all__ = ["ElementwiseSolver", "Outcome", "Prepared"]

_log = logging.getLogger("lpgd")


class ElementwiseSolver(ConicSolver):
    """A solver of one element at a time, prepared once for all elements that share its matrices."""

    problem_form: ClassVar[type[Form]] = RowForm
    """How it sees problems."""

    takes_interrupts: ClassVar[bool] = False
    """Whether it puts a handler of SIGINT of its own in place of Python's for the time of each solve."""

    forgets: ClassVar[bool] = True
    """Whether a solve leaves no trace in its workspace, not in the last bit.  Workspaces of other solvers belong to one
    task of a call, so that results depend on nothing but the calls that there were."""

    handover: ClassVar[float] = 6e-4
    """Elements that take fewer seconds than this are solved in the calling thread: to hand the interpreter over takes
    up to a tenth of a millisecond, several times for each element."""

    asks_whether_definite: ClassVar[bool] = False
    """Whether ``Matrices.definite`` is to be known."""

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

    def prepare_once(self, form: Any) -> Prepared:
        """The same for a workspace that solves once, with the same results to the last bit; nothing may be kept."""
        return self.prepare(form)

    def solve_posed(self, problem: ConicProblem, states: States, executor: Executor | None) -> ConicSolution:
        self.module()
        if self.capabilities.time_limit and self.shortest != self.time_limit:
            return replace(self, time_limit=self.shortest).solve_posed(problem, states, executor)
        if executor is None and not self.runs_in_threads:
            executor = SerialExecutor()
        view = ElementView(problem)
        if not view.valid:
            return _assemble(problem, [], [])
        pairs, key = _pairs(self, view), (self, problem.structure.digest)
        seconds = _seconds.get(key, np.inf)
        # Elements that start from one state follow each other.
        # Which task has which elements may depend on their number alone where workspaces remember what they solved.
        one_each = not self.forgets and view.distinct == 1
        chunks = view.groups(view.valid, executor, len(states) or None, per_worker=1 if one_each else 4)
        in_this_process = executor is None or isinstance(executor, ThreadPoolExecutor)
        if in_this_process and seconds < self.handover:
            executor = SerialExecutor()
            if self.forgets:
                chunks = [[element for chunk in chunks for element in chunk]]
        kept = view.distinct < len(view.valid) or workspaces.habits.keeps(key, [pair.fingerprint for pair in pairs])
        tasks = [
            _task(self, view, pairs, elements, states, None if self.forgets else slot, kept)
            for slot, elements in enumerate(chunks)
        ]
        deadline = self.deadline()
        tasks = [task._replace(deadline=deadline, progress=current()) for task in tasks]
        aside = self.takes_interrupts and hearing() and seconds * len(view.valid) > ASIDE
        results = run_tasks(_solve_elements, tasks, executor, aside, _count)
        found = sum(result.found for result in results)
        if found or (kept and view.distinct >= len(view.valid)):
            workspaces.habits.record(key, found)
        _remember(key, sum(result.seconds for result in results) / len(view.valid))
        solution = _assemble(problem, tasks, results)
        if _log.isEnabledFor(logging.INFO):
            _report(self, solution, found)
        return solution


ASIDE = 2e-3
"""A solver that takes interrupts works aside of the main thread if that is for more seconds than this: to hand it over
takes a tenth of a millisecond, and as long as it lasts every interrupt is heard.  In the main thread, one that comes
after the solver's last look is not."""
SLOW = 10.0
"""Elements that take so many times as long as the median, and a tenth of a second, are named in the log."""
_seconds: dict[Any, float] = {}
"""How long an element took, by solver and structure, or for ever: who solves it, and no bit of its solution."""
_KNOWN = 1024


def _remember(key: Any, seconds: float) -> None:
    if len(_seconds) >= _KNOWN and key not in _seconds:
        _seconds.clear()
    _seconds[key] = seconds


def _report(solver: ElementwiseSolver, solution: ConicSolution, found: int) -> None:
    """Log set-ups and slow elements."""
    setup, seconds = solution.setup_seconds, solution.solve_seconds
    _log.debug(
        "%s: %d elements with %s took %.3g s of set-up and %.3g s of solving; %d workspaces were ready.",
        solver.name, len(seconds), solution.problem.structure.summary, setup.sum(), seconds.sum(), found,
    )  # fmt: skip
    usual = float(np.median(seconds))
    for element in np.flatnonzero(seconds > max(SLOW * usual, 0.1)):
        _log.info(
            "%s: element %d of %d took %.3g s, %.0f times the median.",
            solver.name, element, len(seconds), seconds[element], seconds[element] / max(usual, 1e-9),
        )  # fmt: skip


class _Task(NamedTuple):
    """Elements to solve, as plain data that a process can be sent."""

    solver: ElementwiseSolver
    structure: ConicStructure
    elements: list[int]
    matrices: dict[int, Pair]
    pairs: list[int]  # for each element, its pair
    vectors: Vectors  # (k, ·) or (1, ·) each
    states: list[State]
    slot: int | None  # the task that its workspaces belong to, where they belong to one
    kept: bool  # whether workspaces are kept
    room: int  # how many
    deadline: float | None = None  # of the batch, on the clock that processes share
    progress: Key | None = None  # whom to tell of each element


def _count(task: _Task) -> None:
    advance(task.progress, len(task.elements))


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
    states: list[State]
    found: int = 0  # workspaces that the cache had
    seconds: float = 0.0  # how long the thread was at work

    @classmethod
    def empty(cls, count: int, structure: ConicStructure) -> _Results:
        x, z = (np.full((count, structure.n), np.nan) for _ in range(2))
        y, slack = (np.full((count, structure.m), np.nan) for _ in range(2))
        statuses: list[Any] = [Status.INVALID_DATA] * count
        states: list[State] = [None] * count
        return cls(statuses, x, y, z, slack, np.zeros(count, dtype=np.int64), np.zeros(count), np.zeros(count), states)


def _task(
    solver: ElementwiseSolver,
    view: ElementView,
    all_pairs: Sequence[Pair],
    elements: list[int],
    states: States,
    slot: int | None,
    kept: bool,
) -> _Task:
    pairs = [element % view.distinct for element in elements]
    matrices = {pair: all_pairs[pair] for pair in pairs}
    return _Task(
        solver,
        view.problem.structure,
        elements,
        matrices,
        pairs,
        Vectors(*(view.rows(name, elements) for name in Vectors._fields)),
        [states[element % len(states)] if states else None for element in elements],
        slot,
        kept,
        # This batch's own matrices, and those of one augmentation.
        2 * (view.distinct if slot is None else len(matrices)) + 4,
    )


def _assemble(problem: ConicProblem, tasks: Sequence[_Task], results: Sequence[_Results]) -> ConicSolution:
    whole = _Results.empty(problem.batch_size, problem.structure)
    for task, result in zip(tasks, results, strict=True):
        for name in ("x", "y", "z", "slack", "iterations", "setup_seconds", "solve_seconds"):
            getattr(whole, name)[task.elements] = getattr(result, name)
        for element, status, state in zip(task.elements, result.statuses, result.states, strict=True):
            whole.statuses[element], whole.states[element] = status, state
    x, y, z, slack = (from_numpy(values).to(problem.device) for values in (whole.x, whole.y, whole.z, whole.slack))
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


def _pairs(solver: ElementwiseSolver, view: ElementView) -> list[Pair]:
    """The distinct matrices of a batch."""
    data = view.problem.data
    P, A = (
        _memo(tensor, "fingerprints", partial(fingerprints, view.data[name]))
        for name, tensor in (("P", data.P), ("A", data.A))
    )
    definite = is_definite(view.problem).tolist() if solver.asks_whether_definite else [None] * view.distinct
    return [
        Pair(view.row("P", pair), view.row("A", pair), P[pair % len(P)] + A[pair % len(A)], definite[pair])
        for pair in range(view.distinct)
    ]


def _solve_elements(task: _Task) -> _Results:
    """Solve some elements, and leave the handler of interrupts as it was."""
    started = time.thread_time()
    with kept_handler() if task.solver.takes_interrupts else nullcontext():
        results = _solve_groups(task)
    return results._replace(seconds=time.thread_time() - started)


def _solve_groups(task: _Task) -> _Results:
    """Solve some elements, those with the same bounds at once as far as translation goes."""
    results = _Results.empty(len(task.elements), task.structure)
    vectors = Vectors(*(np.broadcast_to(datum, (len(task.elements), datum.shape[1])) for datum in task.vectors))
    keyed = task.solver.form_type.keyed_by_bounds
    lower, upper = (np.isfinite(bound) if keyed else np.ones(bound.shape, bool) for bound in vectors[2:])
    if (lower == lower[:1]).all() and (upper == upper[:1]).all():
        found = _solve_group(task, list(range(len(task.elements))), vectors, lower[0], upper[0], results)
        return results._replace(found=found)
    groups: dict[bytes, list[int]] = {}
    for place in range(len(task.elements)):
        groups.setdefault(lower[place].tobytes() + upper[place].tobytes(), []).append(place)
    found = 0
    for places in groups.values():
        group = Vectors(*(datum[places] for datum in vectors))
        found += _solve_group(task, places, group, lower[places[0]], upper[places[0]], results)
    return results._replace(found=found)


class _Desk:
    """Workspaces of one task and one choice of finite bounds, one in use at a time, from this process's cache.

    Where none are to be kept, one that takes new matrices serves all elements, and stays for the next call.
    """

    def __init__(self, task: _Task, finite_lower: BoolArray, finite_upper: BoolArray) -> None:
        self.task, self.finite = task, (finite_lower, finite_upper)
        key = (task.solver, task.structure.digest)
        self.family = (key, task.slot, finite_lower.tobytes(), finite_upper.tobytes())
        self.pair: int | None = None
        self.key: Any = None
        self.used: Workspace | None = None
        self.found = 0

    def prepared(self, pair: int) -> Prepared:
        """The workspace for a pair of matrices.

        Raises:
            SetUpError: the solver refuses them.
        """
        if self.used is None or self.pair != pair:
            self.used = self._take(pair)
        return self.used.prepared

    def _take(self, pair: int) -> Workspace:
        task, wanted = self.task, self.task.matrices[pair]
        spare = None
        if task.kept:
            self.put_back()
            self.key = (*self.family, wanted.fingerprint)
            found, self.pair = workspaces.take(self.key, partial(fits, pair=wanted)), pair
            if found is not None:
                self.found += 1
                return found
            if task.solver.updates_matrices:
                spare = workspaces.take_oldest(self.family, task.room)
        elif task.solver.updates_matrices:
            self.key = (*self.family, "spare")
            spare, self.used = self.used or workspaces.take(self.key), None
        else:
            self.used = None
        self.pair = pair
        P, A = wanted.P, wanted.A
        if task.kept:  # copies: a view would keep the whole batch, and see what is written to it later
            P, A = P.copy(), A.copy()
        matrices = Matrices(task.structure, P, A, *self.finite, wanted.definite)
        form = task.solver.form_type(matrices)
        if spare is not None:
            spare.prepared.update(form)
            prepared = spare.prepared
        elif task.kept or task.solver.updates_matrices:
            prepared = task.solver.prepare(form)
        else:
            prepared = task.solver.prepare_once(form)
        return Workspace(matrices, form, prepared)

    def put_back(self) -> None:
        """Hand back the workspace in use."""
        task, used = self.task, self.used
        self.used = None
        if used is None or not (task.kept or task.solver.updates_matrices):
            return
        size = used.prepared.memory(used.form)
        if not task.kept:
            used = used._replace(matrices=None, form=None)
        workspaces.put(self.key, self.family, used, size, task.room + 1)  # one more: it is given new data next


def _solve_group(
    task: _Task,
    places: list[int],
    group: Vectors,
    finite_lower: BoolArray,
    finite_upper: BoolArray,
    results: _Results,
) -> int:
    """Solve elements with the same finite bounds; the number of workspaces that were found ready."""
    frame = task.solver.form_type.frame_of(task.structure, finite_lower, finite_upper)
    vectors = frame.vectors(group)
    one = type(vectors)
    points, kept = [], []
    desk, clock = _Desk(task, finite_lower, finite_upper), time.perf_counter
    for index, element_vectors in enumerate(zip(*vectors, strict=True)):
        place, pair = places[index], task.pairs[places[index]]
        started = clock()
        if task.deadline is not None and time.time() >= task.deadline:
            results.statuses[place] = Status.TIME_LIMIT
            continue
        try:
            prepared = desk.prepared(pair)
            ready = clock()
            outcome = _solved(prepared, one(*element_vectors), task.states[place])
        except SetUpError:
            results.statuses[place] = Status.NUMERICAL_ERROR
            continue
        finally:
            advance(task.progress)
        results.setup_seconds[place], results.solve_seconds[place] = ready - started, clock() - ready
        results.statuses[place], results.states[place] = outcome.status, outcome.state
        results.iterations[place] = outcome.iterations
        if outcome.point is not None:
            kept.append(index)
            points.append(outcome.point)
    desk.put_back()
    if kept:
        point = type(points[0])(*(np.array(values) for values in zip(*points, strict=True)))
        if len(kept) < len(places):
            vectors = one(*(datum[kept] for datum in vectors))
        solved = [places[index] for index in kept]
        pairs = [task.pairs[place] for place in solved]
        shared = len(task.matrices) == 1
        A = task.matrices[pairs[0]].A if shared else np.stack([task.matrices[pair].A for pair in pairs])
        for name, value in frame.invert(point, vectors, A)._asdict().items():
            getattr(results, name)[solved] = value
    return desk.found


def _solved(prepared: Prepared, vectors: Any, state: State) -> Outcome:
    """One solve; an interrupt that it took goes to Python, and where Python's handler goes on, so does the solve."""
    while True:
        pause()
        try:
            return prepared.solve(vectors, state)
        except InterruptedSolveError:
            pause()
            send_on()
