"""A batched interior-point solver in torch: linear and convex quadratic programs, on the device of their data."""

from __future__ import annotations

import time
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch

from lpgd.arrays import flags, integers
from lpgd.execution.tasks import run_tasks, worker_count
from lpgd.execution.threads import all_torch_threads, one_torch_thread
from lpgd.problems.base import States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.solvers.backends.batched import BatchAnswers, BatchedSolver
from lpgd.solvers.base import Capabilities
from lpgd.solvers.interior_point.active_set import ActiveSet, is_suitable
from lpgd.solvers.interior_point.box_program import BoxProgram, Scaling
from lpgd.solvers.interior_point.predictor_corrector import Answers, Limits, solve_programs
from lpgd.solvers.interior_point.projection import is_projection
from lpgd.status import Status

__all__ = ["InteriorPoint"]

_PRECISIONS = {"float64": (torch.float64, 1e-13, 0.0), "float32": (torch.float32, 1e-6, 1e-4)}
"""For each precision its type, the regularisation of its factorisations, and the finest tolerance asked of it."""


CHUNKED = 2e8
"""A batch is cut from so many operations an iteration, into chunks of so many at least: whoever works on them, as the
last bits depend on who shares a chunk."""
CHUNK = 32
"""A chunk has so many elements at least, unless there are two: fewer share less of what they have in common.  Fewer
projections (:mod:`lpgd.solvers.interior_point.projection`), which share nearly everything, stay one chunk."""
THREADED = 1e9
"""A batch too small to be cut uses torch's own threads from so many operations an iteration."""


def _work(problem: ConicProblem) -> float:
    n, m = problem.structure.n, problem.structure.m
    return float(problem.batch_size * (n + m) * min(n, m or n) * n)


@dataclass(frozen=True)
class InteriorPoint(BatchedSolver):
    """A primal-dual interior-point method that solves a whole batch of dense LPs and convex QPs at once.

    Every iteration is a few dozen operations on the whole batch, with one factorisation for each element;
    finished elements leave the batch.  On an optimal face the solution is inside the face, near its analytic centre.
    Matrices are held dense, bounds as bounds: for up to a few thousand variables and rows.  A large batch is cut
    into chunks for the workers; on an accelerator it stays whole.  ``time_limit`` counts for the batch, whose
    elements are solved side by side.

    A warm start is an active set, from which a few Newton steps solve a program near by exactly, where every variable
    has curvature (:mod:`lpgd.solvers.interior_point.active_set`); elements that are further away are solved from the
    interior.

    Args:
        precision: ``"float64"``, or ``"float32"``, which solves to 1e-4 at best; a finer tolerance is lifted to that.

    Raises:
        ValueError: the precision is unknown.
    """

    tolerance: float = 1e-9
    max_iterations: int = 100
    precision: str = "float64"

    name: ClassVar[str] = "INTERIOR"
    watches_time: ClassVar[bool] = True
    package: ClassVar[str] = "torch"
    pip_name: ClassVar[str] = "torch"
    finest_tolerance: ClassVar[float] = 1e-11
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonnegative"}), quadratic=True, warm_start=True, dense=True
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "tol": "tolerance",
        "max_iter": "max_iterations",
        "max_iters": "max_iterations",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(_PRECISIONS)}.")

    def solution_error(self, problem: ConicProblem) -> float:
        return self._limits.tolerance

    @property
    def _limits(self) -> Limits:
        _, regularization, finest = _PRECISIONS[self.precision]
        tolerance = max(self.tolerance, finest)
        return Limits(
            tolerance=tolerance,
            certificate=max(1e-8, 0.1 * finest),
            acceptable=max(1e-5, tolerance),
            iterations=self.max_iterations,
            deadline=None if self.shortest is None else time.perf_counter() + self.shortest,
            regularization=regularization,
        )

    def solve_batch(self, problem: ConicProblem, states: States, executor: Executor | None) -> BatchAnswers:
        with torch.no_grad(), one_torch_thread():
            return self._solve(problem, states, executor)

    def _solve(self, problem: ConicProblem, states: States, executor: Executor | None) -> BatchAnswers:
        scaling = Scaling.of(problem, _PRECISIONS[self.precision][0])
        start = _active_set(problem, states) if is_suitable(scaling.program) else None
        answers = self._answers(_Task(scaling.program, start, self._limits, self.verbose), _work(problem), executor)
        systems = tuple(system.scaled(scaling.row_scale) for system in answers.kept)
        point, slack = scaling.invert(answers.x, answers.z, answers.s)
        lower, upper = problem.full_bounds()
        active_rows = point.y > slack
        active_rows[:, : problem.structure.cones.zero] = True
        ends = ActiveSet(active_rows, point.z > upper - point.x, -point.z > point.x - lower)
        fine = flags(torch.isfinite(point.x[:, 0]))
        return BatchAnswers(
            point,
            slack,
            [Status(value) for value in integers(answers.status)],
            answers.iterations,
            [_State(ends, element) if good else None for element, good in enumerate(fine)],
            systems,
        )

    def _answers(self, task: _Task, work: float, executor: Executor | None) -> Answers:
        size, workers = task.program.size, worker_count(executor)
        if task.program.q.device.type != "cpu":
            return _solve_task(task)
        distinct = size if task.start is None else task.start.rows.shape[0]
        # What projections have in common is most of their work, in steps too short for threads to share.
        least = 1 if is_projection(task.program) else 2
        count = max(least, min(distinct // CHUNK, int(work / CHUNKED)))
        if distinct < 2 or work < CHUNKED or count == 1:
            threaded = distinct < 2 and work > THREADED and workers > 1
            with all_torch_threads() if threaded else nullcontext():
                return _solve_task(task)
        edges = [round(place * distinct / count) for place in range(count + 1)]
        chunks = [torch.arange(*ends) for ends in pairwise(edges)]
        # The copies of an element stay together.
        members = [torch.cat([chunk + start for start in range(0, size, distinct)]) for chunk in chunks]
        tasks = [
            task._replace(
                program=task.program.select(elements), start=None if task.start is None else task.start.select(chunk)
            )
            for chunk, elements in zip(chunks, members, strict=True)
        ]
        order = torch.cat(members).argsort()
        results = run_tasks(_solve_task, tasks, executor)
        kept = tuple(
            system.moved(elements)
            for elements, answers in zip(members, results, strict=True)
            for system in answers.kept
        )
        columns = zip(*(answers.tensors for answers in results), strict=True)
        x, z, slack, status, iterations = (torch.cat(tensors)[order] for tensors in columns)
        return Answers(x, z, slack, status, iterations, kept)


class _Task(NamedTuple):
    """Programs to solve."""

    program: BoxProgram
    start: ActiveSet | None
    limits: Limits
    verbose: bool


def _solve_task(task: _Task) -> Answers:
    with torch.no_grad():
        return solve_programs(*task)


class _State(NamedTuple):
    """What was active at the solution of one element, a row of its whole batch's."""

    batch: ActiveSet
    row: int


def _active_set(problem: ConicProblem, states: States) -> ActiveSet | None:
    """What the states of S elements say, if all of them belong to such problems."""
    n, m = problem.structure.n, problem.structure.m
    if not states or not all(isinstance(state, _State) for state in states):
        return None
    batch = states[0].batch
    for other in {id(state.batch): state.batch for state in states}.values():
        if other.rows.shape[1] != m or other.upper.shape[1] != n or other.rows.device != problem.device:
            return None
    if all(state.batch is batch for state in states):
        return batch.select(torch.tensor([state.row for state in states], device=problem.device))
    sets = [state.batch.select(torch.tensor([state.row], device=problem.device)) for state in states]
    return ActiveSet(*(torch.cat(masks) for masks in zip(*(active.masks for active in sets), strict=True)))
