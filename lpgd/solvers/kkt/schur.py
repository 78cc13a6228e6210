"""Systems of quadratic programs with a definite P, for every active set from one factorisation.

With ``P = L Lᵀ``, C the rows of A and those of bounded variables of the identity, and ``M = C L⁻ᵀ``, the change of the
solution under the tilt ``<g_x, x> + <g, C x>``, the rows a being active, is

    (M Mᵀ)_aa u = g_a - (M h)_a,    h = L⁻¹ g_x,    dx = -L⁻ᵀ (h + Mᵀu),

u the change of the multipliers.  L is what shows that P is convex, and M what a solver may start from
(:mod:`lpgd.solvers.backends.whitened`): both are worked out once for the matrices of a batch.  Another active set picks
other rows of M, and a small matrix is all that is factorised for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lpgd import linalg
from lpgd.arrays import BoolArray, FloatArray, from_numpy
from lpgd.execution.memo import TensorMemo
from lpgd.problems.conic.elements import dense_rows
from lpgd.problems.conic.problem import ConicProblem
from lpgd.solvers.convexity import root_of
from lpgd.solvers.kkt.reduced import is_dense

__all__ = ["ActiveSystem", "SchurFactor"]

DEFINITE = 1e-5
"""The least diagonal entry of a triangular factor, over the largest: the condition is about its inverse square."""
ROOM = 16_000_000
"""So many entries of M are made for a batch."""


@dataclass(frozen=True, eq=False)
class SchurFactor:
    """L and M of E elements.

    Attributes:
        lower: (R, n, n) L; element i uses row ``i mod R``, as for all data.
        white: (R, k, n) M.
        fine: (R,) which elements have them: P is definite, by much more than rounding.
        bounded: variables that have a bound, the last of the k rows.
        row_count: of A.
        zero: how many of them are equalities.
    """

    lower: Tensor
    white: Tensor
    fine: Tensor
    bounded: Tensor
    row_count: int
    zero: int

    @classmethod
    def of(cls, problem: ConicProblem) -> SchurFactor | None:
        """The factor of a batch in units of order 1; None where it is of no use: no P is surely definite, say."""
        structure, data = problem.structure, problem.data
        if not structure.cones.is_polyhedral or structure.quadratic.nnz < structure.n or not is_dense(structure):
            return None
        if problem.device.type != "cpu" or not structure.n:
            return None
        known = _memo(data.P, structure.digest, lambda: list[_Known]())
        for entry in known:
            if entry.matrix() is data.A and entry.version == data.A._version:
                return entry.factor
        found = cls._made(problem)
        if not data.A.is_inference():
            known[:] = [_Known(TensorWeakRef(data.A), data.A._version, found)]
        return found

    @classmethod
    def _made(cls, problem: ConicProblem) -> SchurFactor | None:
        structure, data = problem.structure, problem.data
        bounded = from_numpy(np.union1d(structure.lower_index, structure.upper_index))
        count = max((datum.shape[0] for datum in (data.P, data.A) if datum.ndim == 2), default=1)
        wide = structure.m + bounded.shape[0]
        if count * max(wide, structure.n) * structure.n > ROOM:
            return None
        root = root_of(problem)
        if root is None:
            lower, info = linalg.cholesky_ex(structure.quadratic.to_dense(torch.atleast_2d(problem.symmetric_P)))
            exists = info == 0
        else:
            lower, exists = root
        least, largest = _extremes(lower)
        fine = exists & (least > DEFINITE * largest)
        C = structure.constraint.to_dense(torch.atleast_2d(data.A))
        sizes = {lower.shape[0], C.shape[0], 1}
        if len(sizes) > 2 or not bool(fine.any()):
            return None
        if bounded.shape[0]:
            unit = torch.eye(structure.n, dtype=C.dtype)[bounded].expand(C.shape[0], -1, -1)
            C = torch.cat([C, unit], 1)
        lower, right = lower.expand(max(sizes), -1, -1), C.mT.expand(max(sizes), -1, -1)
        white = linalg.solve_triangular(lower, right, upper=False).mT
        return cls(lower, white, fine.expand(max(sizes)), bounded, structure.m, structure.cones.zero)

    @cached_property
    def gram(self) -> Tensor:
        """(R, k, k) ``M Mᵀ``."""
        return self.white @ self.white.mT

    @cached_property
    def white_values(self) -> Tensor:
        """M as the values of a matrix of a problem: (R, k n), column by column, or (k n,) where the batch shares it."""
        values = self.white.mT.reshape(self.white.shape[0], -1)
        values, rows = (values, self.white) if values.shape[0] > 1 else (values[0], self.white[0])
        dense_rows(values, "rows", rows.numpy)
        return values

    def select(self, elements: Tensor) -> SchurFactor:
        """The factors of these elements."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[elements % tensor.shape[0]]

        return replace(self, lower=chosen(self.lower), white=chosen(self.white), fine=chosen(self.fine))

    def at(self, pieces: Tensor) -> ActiveSystem:
        """The system of the active sets ``pieces`` (B, ·), as :meth:`Points.pieces` has them."""
        count = pieces.shape[0]
        inequalities = self.row_count - self.zero
        masks = [torch.ones(count, self.zero, dtype=torch.bool), pieces[:, :inequalities] != 0]
        if self.bounded.shape[0]:
            masks.append(pieces[:, inequalities:][:, self.bounded] != 0)
        return ActiveSystem(self, torch.cat(masks, 1))

    def forward(self, vectors: Tensor) -> Tensor:
        """``L⁻¹ v`` for vectors (B, n)."""
        return self._solved(vectors, transposed=False)

    def backward(self, vectors: Tensor) -> Tensor:
        """``L⁻ᵀ v`` for vectors (B, n)."""
        return self._solved(vectors, transposed=True)

    def _solved(self, vectors: Tensor, transposed: bool) -> Tensor:
        count, (size, n) = self.lower.shape[0], vectors.shape
        columns = vectors.reshape(-1, count, n).permute(1, 2, 0)
        matrix = self.lower.mT if transposed else self.lower
        return linalg.solve_triangular(matrix, columns, upper=transposed).permute(2, 0, 1).reshape(size, n)


class _Known(NamedTuple):
    """The factor of a P with a matrix A, as it was."""

    matrix: TensorWeakRef
    version: int
    factor: SchurFactor | None


_memo = TensorMemo()


class ActiveSystem:
    """The system of one active set for each of B elements.

    Attributes:
        regular: (B,) which elements have a regular one.
        inverse, condition: (B,) estimates of the norm of its inverse and of its condition, by the pivots of its factors.
    """

    def __init__(self, factor: SchurFactor, active: Tensor) -> None:
        self.factor, white = factor, factor.white
        counts = active.sum(1)
        count = int(counts.max()) if active.numel() else 0
        self.order = torch.argsort(~active, dim=1, stable=True)[:, :count]  # active rows of each element first
        self.active: Tensor | None = None
        if not bool((counts == count).all()):
            self.active = torch.arange(count) < counts[:, None]
        self.chosen: FloatArray | None = None
        if white.shape[0] == 1:
            small = factor.gram[0][self.order[:, :, None], self.order[:, None, :]]
            if self.active is not None:
                small = torch.where(self.active[:, :, None] & self.active[:, None, :], small, 0.0)
        else:
            places = self.order + white.shape[1] * (torch.arange(active.shape[0]) % white.shape[0])[:, None]
            chosen = white.reshape(-1, white.shape[2]).index_select(0, places.ravel())
            chosen = chosen.reshape(*self.order.shape, white.shape[2])
            if self.active is not None:
                chosen *= self.active[:, :, None]
            small, self.chosen = chosen @ chosen.mT, chosen.numpy()
        diagonal = small.diagonal(dim1=-2, dim2=-1)
        if self.active is not None:
            diagonal.add_(torch.where(self.active, 0.0, diagonal.amax(-1, keepdim=True)))
        self.small, info = linalg.cholesky_ex(small)
        least, largest = _extremes(factor.lower)
        fine = factor.fine
        if least.shape[0] < active.shape[0]:
            fine, least, largest = (
                values.repeat(active.shape[0] // values.shape[0]) for values in (fine, least, largest)
            )
        fine, inverse = fine & (info == 0), least**-2
        if count:
            least, largest_of_small = _extremes(self.small)
            fine = fine & (least > DEFINITE * largest_of_small)
            inverse = inverse + least**-2
        self.regular: BoolArray = fine.numpy()
        self.inverse: FloatArray = torch.where(fine, inverse, torch.inf).numpy()
        self.condition: FloatArray = self.inverse * (1.0 + largest**2).numpy()

    @property
    def entries(self) -> int:
        """How many numbers it holds beside those of the factor, which the matrices keep."""
        return self.small.numel() + (0 if self.chosen is None else self.chosen.size)

    def _reduced(self, g_x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """dx (B, n) and u (B, active rows) of a tilt of x and of the active rows."""
        factor = self.factor
        h = factor.forward(g_x)
        right = g - self._onto_rows(h)
        if self.active is not None:
            right = torch.where(self.active, right, 0.0)
        u = torch.cholesky_solve(right[:, :, None], self.small)[:, :, 0]
        return -factor.backward(h + self._from_rows(u)), u

    def _onto_rows(self, h: Tensor) -> Tensor:
        """``M_a h``."""
        if self.chosen is None:
            return (h @ self.factor.white[0].mT).gather(1, self.order)
        return from_numpy((self.chosen @ h.numpy()[:, :, None])[:, :, 0])

    def _from_rows(self, u: Tensor) -> Tensor:
        """``M_aᵀ u``, u zero where no row is active."""
        if self.chosen is None:
            return self._spread(u) @ self.factor.white[0]
        return from_numpy((u.numpy()[:, None] @ self.chosen)[:, 0])

    def _spread(self, u: Tensor) -> Tensor:
        """All multipliers (B, k) from those of active rows; u is zero where no row is active."""
        return u.new_zeros(u.shape[0], self.factor.white.shape[1]).scatter(1, self.order, u)

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The change (dx, dy, dz) of the points under a tilt, (B, ·) each."""
        factor, z = self.factor, from_numpy(g_z)
        g = from_numpy(g_y)
        if factor.bounded.shape[0]:
            g = torch.cat([g, z[:, factor.bounded]], 1)
        dx, u = self._reduced(from_numpy(g_x), g.gather(1, self.order))
        multipliers = self._spread(u)
        dz = torch.zeros_like(z)
        if factor.bounded.shape[0]:
            dz[:, factor.bounded] = multipliers[:, factor.row_count :]
        return dx.numpy(), multipliers[:, : factor.row_count].numpy(), dz.numpy()


def _extremes(lower: Tensor) -> tuple[Tensor, Tensor]:
    """(R,) the least and the largest pivot of triangular factors."""
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    return pivots.amin(-1), pivots.amax(-1)
