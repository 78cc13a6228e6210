"""Systems of quadratic programs with a definite P, for every active set from one factorisation.

With ``P = L Lᵀ``, C the rows of A and those of bounded variables of the identity, and ``Y = L⁻¹ Cᵀ``, the change of the
solution under the tilt ``<g_x, x> + <g, C x>``, the rows a being active, is

    (YᵀY)_aa u = g_a - (Yᵀh)_a,    h = L⁻¹ g_x,    dx = -L⁻ᵀ (h + Y u),

u the change of the multipliers.  Another active set picks other rows of ``YᵀY``, and a small matrix is all that is
factorised for it; where the batch shares P and A, L and Y are those of all elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import FloatArray, from_numpy
from lpgd.problems.conic.problem import ConicProblem
from lpgd.solvers.kkt.reduced import is_dense

__all__ = ["ActiveSystem", "SchurFactor"]

DEFINITE = 1e-5
"""The least diagonal entry of a triangular factor, over the largest: the condition is about its inverse square."""
ROOM = 4_000_000
"""So many entries of YᵀY are made for a batch."""


@dataclass(frozen=True, eq=False)
class SchurFactor:
    """L, Y and YᵀY of E elements.

    Attributes:
        lower: (R, n, n) L; element i uses row ``i mod R``, as for all data.
        wide: (R, n, k) Y.
        gram: (R, k, k).
        bounded: variables that have a bound, the last of the k rows.
        row_count: of A.
        zero: how many of them are equalities.
    """

    lower: Tensor
    wide: Tensor
    gram: Tensor
    bounded: Tensor
    row_count: int
    zero: int

    @classmethod
    def of(cls, problem: ConicProblem) -> SchurFactor | None:
        """The factor of a batch in units of order 1; None where it is of no use: P is not surely definite, say."""
        structure, data = problem.structure, problem.data
        if not structure.cones.is_polyhedral or structure.quadratic.nnz < structure.n or not is_dense(structure):
            return None
        bounded = from_numpy(np.union1d(structure.lower_index, structure.upper_index))
        count = max((datum.shape[0] for datum in (data.P, data.A) if datum.ndim == 2), default=1)
        wide = structure.m + bounded.shape[0]
        if count * wide**2 > ROOM:
            return None
        lower, info = linalg.cholesky_ex(structure.quadratic.to_dense(torch.atleast_2d(problem.symmetric_P)))
        diagonal = lower.diagonal(dim1=-2, dim2=-1)
        if bool(info.any()) or not bool((diagonal.amin(-1) > DEFINITE * diagonal.amax(-1)).all()):
            return None
        C = structure.constraint.to_dense(torch.atleast_2d(data.A))
        if bounded.shape[0]:
            unit = torch.eye(structure.n, dtype=C.dtype)[bounded].expand(C.shape[0], -1, -1)
            C = torch.cat([C, unit], 1)
        if lower.shape[0] != C.shape[0] and 1 not in (lower.shape[0], C.shape[0]):
            return None
        right = C.mT.expand(max(lower.shape[0], C.shape[0]), -1, -1)
        Y = linalg.solve_triangular(lower.expand(right.shape[0], -1, -1), right, upper=False)
        return cls(lower, Y, Y.mT @ Y, bounded, structure.m, structure.cones.zero)

    def select(self, elements: Tensor) -> SchurFactor:
        """The factors of these elements."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[elements % tensor.shape[0]]

        return replace(self, lower=chosen(self.lower), wide=chosen(self.wide), gram=chosen(self.gram))

    def at(self, pieces: Tensor) -> ActiveSystem:
        """The system of the active sets ``pieces`` (B, ·), as :meth:`Points.pieces` has them."""
        count = pieces.shape[0]
        inequalities = self.row_count - self.zero
        masks = [torch.ones(count, self.zero, dtype=torch.bool), pieces[:, :inequalities] != 0]
        if self.bounded.shape[0]:
            masks.append(pieces[:, inequalities:][:, self.bounded] != 0)
        return ActiveSystem(self, torch.cat(masks, 1))


class ActiveSystem:
    """The system of one active set for each of B elements.

    Attributes:
        regular: (B,) which elements have a regular one.
    """

    def __init__(self, factor: SchurFactor, active: Tensor) -> None:
        self.factor, gram = factor, factor.gram
        count = int(active.sum(1).max()) if active.numel() else 0
        self.order = torch.argsort(~active, dim=1, stable=True)[:, :count]  # active rows of each element first
        self.active = active.gather(1, self.order)
        if gram.shape[0] == 1:
            matrices = gram[0][self.order[:, :, None], self.order[:, None, :]]
        else:
            place = torch.arange(active.shape[0])[:, None, None]
            matrices = gram[place, self.order[:, :, None], self.order[:, None, :]]
        both = self.active[:, :, None] & self.active[:, None, :]
        matrices = torch.where(both, matrices, 0.0)
        size = matrices.diagonal(dim1=-2, dim2=-1).amax(-1) if count else matrices.new_ones(active.shape[0])
        idle = torch.where(self.active, 0.0, size[:, None])
        matrices.diagonal(dim1=-2, dim2=-1).add_(idle)
        self.small, info = linalg.cholesky_ex(matrices)
        self.regular = (info == 0).numpy()
        if count:
            diagonal = self.small.diagonal(dim1=-2, dim2=-1)
            self.regular &= (diagonal.amin(-1) > DEFINITE * diagonal.amax(-1)).numpy()

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The change (dx, dy, dz) of the points under a tilt, (B, ·) each."""
        factor, x, z = self.factor, from_numpy(g_x), from_numpy(g_z)
        y = from_numpy(g_y)
        if factor.bounded.shape[0]:
            y = torch.cat([y, z[:, factor.bounded]], 1)
        h = _solved(factor.lower, x)
        right = (y - _times(factor.wide.mT, h)).gather(1, self.order)
        u = torch.cholesky_solve(torch.where(self.active, right, 0.0)[:, :, None], self.small)[:, :, 0]
        u = torch.zeros_like(y).scatter(1, self.order, torch.where(self.active, u, 0.0))
        dx = -_solved(factor.lower, h + _times(factor.wide, u), transposed=True)
        dz = torch.zeros_like(x)
        dz[:, factor.bounded] = u[:, factor.row_count :]
        return dx.numpy(), u[:, : factor.row_count].numpy(), dz.numpy()


def _solved(lower: Tensor, vectors: Tensor, transposed: bool = False) -> Tensor:
    """``L⁻¹ v`` or ``L⁻ᵀ v`` for vectors (B, n)."""
    matrix = lower.mT if transposed else lower
    if lower.shape[0] == 1:
        return linalg.solve_triangular(matrix[0], vectors.T, upper=transposed).T
    return linalg.solve_triangular(matrix, vectors[:, :, None], upper=transposed)[:, :, 0]


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    if matrices.shape[0] == 1:
        return vectors @ matrices[0].mT
    return linalg.matvec(matrices, vectors)
