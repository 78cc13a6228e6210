"""A batch of conic programs seen element by element, in NumPy: how solvers and KKT systems read the data."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from functools import cached_property

import numpy as np

from lpgd.arrays import FloatArray
from lpgd.execution.memo import TensorMemo
from lpgd.execution.tasks import split
from lpgd.problems.conic.problem import ConicProblem

__all__ = ["ElementView", "dense_rows"]

dense_rows = TensorMemo()
"""The dense matrices, row by row, whose values a tensor has column by column."""


class ElementView:
    """A ConicProblem whose elements are read one at a time.

    Args:
        problem: the batch.

    Attributes:
        distinct: number of distinct (P, A) pairs; element i has the pair ``i mod distinct``.
    """

    def __init__(self, problem: ConicProblem) -> None:
        self.problem = problem
        self.size = problem.batch_size
        self.data = {name: datum.detach().cpu().numpy() for name, datum in problem.data._asdict().items()}
        self.data["P"] = problem.symmetric_P.detach().cpu().numpy()
        self.distinct = max((self.data[name].shape[0] for name in ("P", "A") if self.data[name].ndim == 2), default=1)

    @cached_property
    def valid(self) -> list[int]:
        """The elements whose data are finite."""
        finite = self.problem.finite().cpu().numpy()
        return [index for index in range(self.size) if finite[index]]

    def row(self, name: str, element: int) -> FloatArray:
        """One datum of one element; ``P`` is symmetrised."""
        datum = self.data[name]
        return datum if datum.ndim == 1 else datum[element % datum.shape[0]]

    def rows(self, name: str, elements: Sequence[int]) -> FloatArray:
        """One datum of some elements, (k, ·), or (1, ·) where the batch shares it."""
        datum = self.data[name]
        if datum.ndim == 1:
            return datum[None]
        index = np.asarray(elements, dtype=np.int64) % datum.shape[0]
        return datum if np.array_equal(index, np.arange(datum.shape[0])) else datum[index]

    def groups(
        self, elements: Sequence[int], executor: Executor | None, copies_of: int | None = None, per_worker: int = 4
    ) -> list[list[int]]:
        """The elements cut into chunks for tasks; those that share one of several matrices stay together.

        Args:
            elements: increasing.
            executor: where the tasks will run.
            copies_of: the elements i, i + ``copies_of``, … stay together as well, one after the other.
            per_worker: chunks for each of the executor's workers.
        """
        period = self.distinct if self.distinct > 1 else copies_of or self.size
        if period == self.size:
            return [[elements[i] for i in chunk] for chunk in split(len(elements), executor, per_worker)]
        members: dict[int, list[int]] = {}
        for element in elements:
            members.setdefault(element % period, []).append(element)
        lists = list(members.values())
        return [[element for i in chunk for element in lists[i]] for chunk in split(len(lists), executor, per_worker)]
