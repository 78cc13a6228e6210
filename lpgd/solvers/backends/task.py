"""The elements of one task, one after the other: workspaces from this process's cache, statuses, times.

A task is plain data, so that a process of another machine may solve it; :mod:`lpgd.solvers.backends.elementwise` makes
the tasks of a batch and puts their results together.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from lpgd.arrays import BoolArray, FloatArray, IntArray
from lpgd.execution.interrupts import InterruptedSolveError, kept_handler, pause, send_on
from lpgd.execution.progress import Key, advance
from lpgd.execution.workspaces import workspaces
from lpgd.problems.base import State
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.forms import Form, Matrices, Vectors
from lpgd.solvers.backends.prepared import Outcome, Pair, Prepared, Workspace, fits
from lpgd.status import SetUpError, Status

__all__ = ["Results", "Task", "solve_elements"]


class Preparing(Protocol):
    """What a task asks of its solver; see ``ElementwiseSolver``."""

    takes_interrupts: ClassVar[bool]

    @property
    def form_type(self) -> type[Form]: ...

    @property
    def updates_matrices(self) -> bool: ...

    def prepare(self, form: Any) -> Prepared: ...

    def prepare_once(self, form: Any) -> Prepared: ...


class Task(NamedTuple):
    """Elements to solve, as plain data that a process can be sent."""

    solver: Preparing
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


class Results(NamedTuple):
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
    def empty(cls, count: int, structure: ConicStructure) -> Results:
        x, z = (np.full((count, structure.n), np.nan) for _ in range(2))
        y, slack = (np.full((count, structure.m), np.nan) for _ in range(2))
        statuses: list[Any] = [Status.INVALID_DATA] * count
        states: list[State] = [None] * count
        return cls(statuses, x, y, z, slack, np.zeros(count, dtype=np.int64), np.zeros(count), np.zeros(count), states)


def solve_elements(task: Task) -> Results:
    """Solve some elements, and leave the handler of interrupts as it was."""
    started = time.thread_time()
    with kept_handler() if task.solver.takes_interrupts else nullcontext():
        results = _solve_groups(task)
    return results._replace(seconds=time.thread_time() - started)


def _solve_groups(task: Task) -> Results:
    """Solve some elements, those with the same bounds at once as far as translation goes."""
    results = Results.empty(len(task.elements), task.structure)
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

    def __init__(self, task: Task, finite_lower: BoolArray, finite_upper: BoolArray) -> None:
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
    task: Task,
    places: list[int],
    group: Vectors,
    finite_lower: BoolArray,
    finite_upper: BoolArray,
    results: Results,
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
        with np.errstate(invalid="ignore"):  # solvers call points solved that are infinite; they are judged later
            inverted = frame.invert(point, vectors, A)
        for name, value in inverted._asdict().items():
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
