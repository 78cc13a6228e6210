"""Solvers of one element at a time: batches, threads, re-use of prepared workspaces and forms are done here, once.

A backend is one file: a frozen dataclass of options that declares what it can do (``capabilities``), in which form it
sees problems (``problem_form``) and how it prepares one element's matrices (``prepare``), and a :class:`Prepared` that
solves for any vectors.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from lpgd.arrays import from_numpy
from lpgd.execution.interrupts import hearing
from lpgd.execution.memo import TensorMemo
from lpgd.execution.progress import advance, current
from lpgd.execution.tasks import SerialExecutor, run_tasks
from lpgd.execution.workspaces import fingerprints, workspaces
from lpgd.problems.base import States
from lpgd.problems.conic.elements import ElementView, dense_rows
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.solvers.backends.forms import Form, RowForm, Vectors
from lpgd.solvers.backends.prepared import Outcome, Pairs, Prepared
from lpgd.solvers.backends.task import Results, Task, solve_elements
from lpgd.solvers.base import ConicSolver
from lpgd.solvers.conic.convexity import is_definite

__all__ = ["ElementwiseSolver", "Outcome", "Prepared", "report"]

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

    reads_rows: ClassVar[bool] = False
    """Whether it reads a dense A row by row (``Matrices.rows``)."""

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
        habits = workspaces.habits
        kept = view.distinct < len(view.valid) or habits.keeps(key, pairs.fingerprints, self.updates_matrices)
        tasks = [
            _task(self, view, pairs, elements, states, None if self.forgets else slot, kept)
            for slot, elements in enumerate(chunks)
        ]
        deadline = self.deadline()
        tasks = [task._replace(deadline=deadline, progress=current()) for task in tasks]
        aside = self.takes_interrupts and hearing() and seconds * len(view.valid) > ASIDE
        results = run_tasks(solve_elements, tasks, executor, aside, _count)
        found = sum(result.found for result in results)
        if found or (kept and view.distinct >= len(view.valid)):
            habits.record(key, found)
        _remember(key, sum(result.seconds for result in results) / len(view.valid))
        solution = _assemble(problem, tasks, results)
        report(self.name, solution, found)
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


def report(solver: str, solution: ConicSolution, found: int) -> None:
    """Log set-ups and slow elements; ``found`` workspaces were ready."""
    if not _log.isEnabledFor(logging.INFO):
        return
    setup, seconds = solution.setup_seconds, solution.solve_seconds
    _log.debug(
        "%s: %d elements with %s took %.3g s of set-up and %.3g s of solving; %d workspaces were ready.",
        solver, len(seconds), solution.problem.structure.summary, setup.sum(), seconds.sum(), found,
    )  # fmt: skip
    usual = float(np.median(seconds))
    for element in np.flatnonzero(seconds > max(SLOW * usual, 0.1)):
        _log.info(
            "%s: element %d of %d took %.3g s, %.0f times the median.",
            solver, element, len(seconds), seconds[element], seconds[element] / max(usual, 1e-9),
        )  # fmt: skip


def _count(task: Task) -> None:
    advance(task.progress, len(task.elements))


def _task(
    solver: ElementwiseSolver,
    view: ElementView,
    all_pairs: Pairs,
    elements: list[int],
    states: States,
    slot: int | None,
    kept: bool,
) -> Task:
    pairs = [element % view.distinct for element in elements]
    its_pairs = sorted(set(pairs))
    matrices = all_pairs.select(its_pairs)
    if len(its_pairs) < view.distinct:
        place = {pair: position for position, pair in enumerate(its_pairs)}
        pairs = [place[pair] for pair in pairs]
    return Task(
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


def _assemble(problem: ConicProblem, tasks: Sequence[Task], results: Sequence[Results]) -> ConicSolution:
    whole = Results.empty(problem.batch_size, problem.structure)
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


def _pairs(solver: ElementwiseSolver, view: ElementView) -> Pairs:
    """The distinct matrices of a batch."""
    data, distinct = view.problem.data, view.distinct
    P, A = (
        _memo(tensor, "fingerprints", partial(fingerprints, view.data[name]))
        for name, tensor in (("P", data.P), ("A", data.A))
    )
    # Of rows with two ends, whose values have no curvature, a solver that sees them without these finds out itself.
    asks = solver.asks_whether_definite and not view.problem.structure.two_sided
    definite = is_definite(view.problem).tolist() if asks else [None] * distinct
    pattern, every = view.problem.structure.constraint, range(distinct)
    values = {name: view.data[name] if view.data[name].ndim == 1 else view.rows(name, every) for name in ("P", "A")}
    rows = None
    if solver.reads_rows and pattern.is_dense:  # others take memory, and are made one by one
        rows = dense_rows(data.A, "rows", lambda: pattern.dense_matrices(np.atleast_2d(view.data["A"])))
        if values["A"].ndim == 1 and rows.ndim == 3:
            rows = rows[0]
        elif rows.ndim == 3 and len(rows) < distinct:  # A has fewer matrices than P
            rows = rows[np.arange(distinct) % len(rows)]
    prints = [P[pair % len(P)] + A[pair % len(A)] for pair in every]
    return Pairs(values["P"], values["A"], rows, prints, definite[:distinct])
