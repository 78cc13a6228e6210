"""A batched interior-point solver in torch: linear and convex quadratic programs, on the device of their data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from lpgd.problems.conic import ConicProblem
from lpgd.solution import Solution
from lpgd.solvers.base import Capabilities, Solver, checked
from lpgd.solvers.box_program import Scaling
from lpgd.solvers.clarabel import Clarabel
from lpgd.solvers.predictor_corrector import Limits, solve_programs
from lpgd.status import Status

__all__ = ["InteriorPoint"]

_PRECISIONS = {"float64": (torch.float64, 1e-13, 0.0), "float32": (torch.float32, 1e-6, 1e-4)}
"""For each precision its type, the regularisation of its factorisations, and the finest tolerance asked of it."""


THREADED = 1e9
"""Torch's threads wait for each other actively after every operation: below so many operations for an iteration they
gain nothing, and lose tenfold where another process wants the core."""


def _work(problem: ConicProblem) -> float:
    n, m = problem.structure.n, problem.structure.m
    return float(problem.batch_size * (n + m) * min(n, m or n) * n)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if before > 1:
            torch.set_num_threads(before)


_BROKEN = (Status.NUMERICAL_ERROR, Status.INACCURATE)


@dataclass(frozen=True)
class InteriorPoint(Solver):
    """A primal-dual interior-point method that solves a whole batch of dense LPs and convex QPs at once.

    Every iteration is a few dozen operations on the whole batch, with one symmetric factorisation for each element;
    finished elements leave the batch.  On an optimal face the solution is inside the face, near its analytic centre.
    Matrices are held dense, bounds as bounds: for up to a few thousand variables and rows.  There is no warm start, and
    torch's own threads are used, not an executor.  ``time_limit`` counts for the batch, whose elements are solved side
    by side.

    Args:
        precision: ``"float64"``, or ``"float32"``, which solves to 1e-4 at best; a finer tolerance is lifted to that.
        rescue: elements on which the method breaks down numerically are solved by Clarabel, where that is installed.

    Raises:
        ValueError: the precision is unknown.
    """

    tolerance: float = 1e-9
    max_iterations: int = 100
    precision: str = "float64"
    rescue: bool = True

    name: ClassVar[str] = "INTERIOR"
    package: ClassVar[str] = "torch"
    pip_name: ClassVar[str] = "torch"
    finest_tolerance: ClassVar[float] = 1e-11
    capabilities: ClassVar[Capabilities] = Capabilities(cones=frozenset({"zero", "nonnegative"}), quadratic=True)
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
            deadline=None if self.time_limit is None else time.perf_counter() + self.time_limit,
            regularization=regularization,
        )

    def solve(self, problem: ConicProblem, states: Sequence[Any] = (), executor: Executor | None = None) -> Solution:
        reason = self.unsupported(problem.structure)
        if reason is not None:
            raise ValueError(f"{reason}; lpgd.available(structure) lists the solvers that can solve this problem.")
        threads = nullcontext() if _work(problem) > THREADED else _one_torch_thread()
        with torch.no_grad(), threads:
            solution = checked(self._solve(problem), self._limits.tolerance)
            broken = [index for index, status in enumerate(solution.statuses) if status in _BROKEN]
            return self._rescued(solution, broken, executor) if self.rescue and broken else solution

    def _rescued(self, solution: Solution, broken: list[int], executor: Executor | None) -> Solution:
        """The solution, with what another solver makes of the elements that broke down."""
        if not Clarabel.is_installed():
            return solution
        other = Clarabel(tolerance=self._limits.tolerance, time_limit=self.time_limit)
        again = other.solve(solution.problem.select(broken), (), executor)
        better = [k for k, status in enumerate(again.statuses) if status not in _BROKEN]
        rows, statuses = [broken[k] for k in better], list(solution.statuses)
        parts = {name: getattr(solution, name).clone() for name in ("x", "y", "z", "slack")}
        for name, part in parts.items():
            part[rows] = getattr(again, name)[better]
        for k, row in zip(better, rows, strict=True):
            statuses[row] = again.statuses[k]
        seconds = solution.solve_seconds.copy()
        seconds[broken] += again.setup_seconds + again.solve_seconds
        return replace(solution, **parts, statuses=tuple(statuses), solve_seconds=seconds)

    def _solve(self, problem: ConicProblem) -> Solution:
        started = time.perf_counter()
        size, structure, q = problem.batch_size, problem.structure, problem.data.q
        point = [q.new_full((size, length), torch.nan) for length in (structure.n, structure.m, structure.n)]
        slack = torch.full_like(point[1], torch.nan)
        statuses = torch.full((size,), int(Status.INVALID_DATA))
        iterations = torch.zeros(size, dtype=torch.int64)
        valid = problem.finite()
        whole = bool(valid.all())
        rows = valid.nonzero()[:, 0]
        if rows.shape[0]:
            part = problem if whole else problem.select(rows.tolist())
            scaling = Scaling.of(part, _PRECISIONS[self.precision][0], self._limits.tolerance)
            answers = solve_programs(scaling.program, self._limits, self.verbose)
            solved, part_slack = scaling.invert(answers.x, answers.z, answers.s)
            status = torch.where(scaling.crossed, int(Status.INFEASIBLE), answers.status)
            nothing = ((status == Status.INFEASIBLE) | (status == Status.UNBOUNDED))[:, None]
            for full, own in zip((*point, slack), (*solved, part_slack), strict=True):
                full[rows] = torch.where(nothing, torch.nan, own)
            statuses[rows.cpu()], iterations[rows.cpu()] = status.cpu(), answers.iterations.cpu()
        seconds = time.perf_counter() - started
        return Solution(
            problem,
            *point,
            slack=slack,
            statuses=tuple(Status(value) for value in statuses.tolist()),
            iterations=iterations.numpy(),
            setup_seconds=np.zeros(size),
            solve_seconds=np.full(size, seconds / max(size, 1)),
            states=(None,) * size,
        )
