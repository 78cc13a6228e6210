"""Solvers of whole batches: what they need not see, and how their answers become a solution, is done here, once."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import integers, rows_where
from lpgd.execution.progress import advance, current
from lpgd.problems.base import States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.solvers.base import ConicSolver
from lpgd.status import Status

__all__ = ["BatchAnswers", "BatchedSolver"]

CHUNK = 64
"""The elements of a part, after which the clock is looked at."""


class BatchAnswers(NamedTuple):
    """What a solver made of k elements, in the problem's own form.

    Attributes:
        point: (k, ·) each; of an infeasible element y proves it, of an unbounded one x is a direction, where the solver
            tells.
        slack: (k, m).
        statuses: k of them.
        iterations: (k,).
        states: for each element what it can be started from, or None.
        systems: factorised systems of optimality conditions, to be used again (``ConicSolution.systems``).
    """

    point: ConicPoint
    slack: Tensor
    statuses: Sequence[Status]
    iterations: Tensor
    states: States
    systems: tuple[Any, ...] = ()


class BatchedSolver(ConicSolver):
    """A solver that takes a whole batch in one call."""

    watches_time: ClassVar[bool] = False
    """Whether a call ends at ``batch_time_limit`` by itself; else batches with a limit are solved in parts."""

    @abstractmethod
    def solve_batch(self, problem: ConicProblem, states: States, executor: Executor | None) -> BatchAnswers:
        """Solve every element of a batch whose data are finite.

        Args:
            problem: k elements, at least one.
            states: of k elements, of a divisor of k that repeat, or none; an element without a state has None.
            executor: where the work runs; None is the library's threads.
        """

    def solve_posed(self, problem: ConicProblem, states: States, executor: Executor | None) -> ConicSolution:
        started = time.perf_counter()
        valid, size = problem.finite(), problem.batch_size
        if size and bool(valid.all()) and (self.watches_time or self.batch_time_limit is None):
            answers = self.solve_batch(problem, states, executor)
        else:
            answers = self._of_valid(problem, states, rows_where(valid), executor)
        advance(current(), size)
        return ConicSolution(
            problem,
            *answers.point,
            slack=answers.slack,
            statuses=tuple(answers.statuses),
            iterations=answers.iterations.cpu().numpy(),
            setup_seconds=np.zeros(size),
            solve_seconds=np.full(size, (time.perf_counter() - started) / max(size, 1)),
            states=tuple(answers.states),
            systems=answers.systems,
        )

    def _of_valid(
        self, problem: ConicProblem, states: States, valid: Tensor, executor: Executor | None
    ) -> BatchAnswers:
        """Answers for all elements where the solver sees only some of them; the data of the others are invalid.

        Those that the limit of time leaves out have none.
        """
        structure, size, q = problem.structure, problem.batch_size, problem.data.q
        point = ConicPoint(
            *(q.new_full((size, length), torch.nan) for length in (structure.n, structure.m, structure.n))
        )
        slack, iterations = torch.full_like(point.y, torch.nan), torch.zeros(size, dtype=torch.int64)
        statuses: list[Status] = [Status.INVALID_DATA] * size
        kept: list[Any] = [None] * size
        systems: tuple[Any, ...] = ()
        deadline = None if self.watches_time else self.deadline()
        for rows in valid.split(max(valid.numel(), 1) if deadline is None else CHUNK):
            elements = integers(rows)
            if not elements or (deadline is not None and time.time() >= deadline):
                for element in elements:
                    statuses[element] = Status.TIME_LIMIT
                continue
            starts = [states[element % len(states)] for element in elements] if states else ()
            answers = self.solve_batch(problem.select(rows), starts, executor)
            for whole, values in zip((*point, slack), (*answers.point, answers.slack), strict=True):
                whole[rows] = values
            iterations[elements] = answers.iterations.cpu()
            for element, status, state in zip(elements, answers.statuses, answers.states, strict=True):
                statuses[element], kept[element] = status, state
            systems += tuple(system.moved(rows) for system in answers.systems)
        return BatchAnswers(point, slack, statuses, iterations, kept, systems)
