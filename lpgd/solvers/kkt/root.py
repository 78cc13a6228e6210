"""Cholesky factors of the objectives of a batch: they show that P is convex, and serve whoever needs a factor of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import FloatArray, from_numpy
from lpgd.execution.memo import TensorMemo
from lpgd.problems.conic.problem import ConicProblem
from lpgd.solvers.kkt.packed import packed_size

__all__ = ["Root", "padded", "root_of"]

LARGEST, ROOM = 1500, 16_000_000
"""Matrices up to the first order are factorised, and so many entries are kept."""


class Root(NamedTuple):
    """The Cholesky factors of P.

    Attributes:
        lower: (R, p, p) L, with ``½ (P + Pᵀ) = L Lᵀ`` in its first n rows and columns, and ones on the diagonal of
            the others.
        exists: (R,) where there is one; L means nothing elsewhere.
    """

    lower: Tensor
    exists: Tensor

    def pivots(self, n: int) -> tuple[FloatArray, FloatArray]:
        """(R,) the least and the largest of the first n pivots of L."""
        found = self.lower.numpy().diagonal(axis1=1, axis2=2)[:, :n]
        return found.min(1), found.max(1)


def padded(vectors: Tensor, size: int) -> Tensor:
    """Vectors (B, n) with zeros up to a size."""
    if vectors.shape[1] == size:
        return vectors
    if vectors.device.type == "cpu":  # small operations of NumPy take a third of the time
        array = np.zeros((vectors.shape[0], size))
        array[:, : vectors.shape[1]] = vectors.numpy()
        return from_numpy(array)
    whole = vectors.new_zeros(vectors.shape[0], size)
    whole[:, : vectors.shape[1]] = vectors
    return whole


def root_of(problem: ConicProblem) -> Root | None:
    """The factors of each row of P, worked out once for whoever asks; None where there are many or large ones."""
    pattern, values = problem.structure.quadratic, problem.symmetric_P.detach()
    n, count = pattern.shape[0], 1 if values.ndim == 1 else values.shape[0]
    if not 0 < n <= LARGEST or count * n**2 > ROOM:
        return None

    def compute() -> Root:
        # MKL rounds by where a matrix begins in memory: all begin at multiples of 64 bytes.
        size, stored = packed_size(n), pattern.to_dense(torch.atleast_2d(values))
        if values.device.type != "cpu":
            matrices = values.new_zeros(count, size, size)
            matrices[:, :n, :n] = stored
            matrices.diagonal(dim1=-2, dim2=-1)[:, n:] = 1.0
            lower, info = linalg.cholesky_ex(matrices)
            return Root(lower, info == 0)
        # In place, and column by column, as LAPACK does: memory that is new costs a third of the time.
        array = np.zeros((count, size, size))
        array[:, :n, :n] = stored.mT.numpy()  # the same, as P is symmetric
        array.reshape(count, size * size)[:, n * (size + 1) :: size + 1] = 1.0
        columns, info = from_numpy(array).mT, torch.empty(0, dtype=torch.int32)
        linalg.cholesky_ex(columns, out=(columns, info))
        return Root(columns, info == 0)

    return _memo(problem.data.P, ("root", pattern.digest), compute)


_memo = TensorMemo()
