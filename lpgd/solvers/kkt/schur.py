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
from lpgd.solvers.kkt.packed import Packed, packed, packed_size
from lpgd.solvers.kkt.reduced import is_dense

__all__ = ["ActiveSystem", "SchurFactor"]

DEFINITE = 1e-5
"""The least diagonal entry of a triangular factor, over the largest: the condition is about its inverse square."""
WIDEST = 250
"""YᵀY is made up to this size."""


@dataclass(frozen=True, eq=False)
class SchurFactor:
    """L⁻¹, Y and YᵀY of E elements.

    Attributes:
        inverse: (R, n, n) L⁻¹.  One product with it for each element has bits that depend on no other element, which
            one solve for many right-hand sides has not.  Element i uses row ``i mod R``, as for all data.
        wide: (R, n, k) Y.
        gram: (R, k, k).
        bounded: variables that have a bound, the last of the k rows.
        row_count: of A.
        zero: how many of them are equalities.
        definite: (R,) which elements have such a factor.
    """

    inverse: Tensor
    wide: Tensor
    gram: Tensor
    bounded: Tensor
    row_count: int
    zero: int
    definite: Tensor

    @classmethod
    def of(cls, problem: ConicProblem) -> SchurFactor | None:
        """The factor of a batch in units of order 1; None where it is of no use: no P is surely definite, say."""
        structure, data = problem.structure, problem.data
        if not structure.cones.is_polyhedral or structure.quadratic.nnz < structure.n or not is_dense(structure):
            return None
        bounded = from_numpy(np.union1d(structure.lower_index, structure.upper_index))
        wide = structure.m + bounded.shape[0]
        if wide > WIDEST:
            return None
        P, n = structure.quadratic.to_dense(torch.atleast_2d(problem.symmetric_P)), structure.n
        # MKL rounds by where a matrix begins in memory: all begin at multiples of 64 bytes.
        one = torch.eye(packed_size(n), dtype=P.dtype)
        padded = one.repeat(len(P), 1, 1)
        padded[:, :n, :n] = P
        lower, info = linalg.cholesky_ex(padded)
        diagonal = lower[:, :n, :n].diagonal(dim1=-2, dim2=-1)
        definite = (info == 0) & (diagonal.amin(-1) > DEFINITE * diagonal.amax(-1))
        if not bool(definite.any()):
            return None
        C = structure.constraint.to_dense(torch.atleast_2d(data.A))
        if bounded.shape[0]:
            unit = torch.eye(structure.n, dtype=C.dtype)[bounded].expand(C.shape[0], -1, -1)
            C = torch.cat([C, unit], 1)
        if lower.shape[0] != C.shape[0] and 1 not in (lower.shape[0], C.shape[0]):
            return None
        right = C.new_zeros(C.shape[0], len(padded[0]), packed_size(wide))
        right[:, :n, :wide] = C.mT
        right = right.expand(max(lower.shape[0], C.shape[0]), -1, -1)
        Y = linalg.solve_triangular(lower.expand(right.shape[0], -1, -1), right, upper=False)
        # By NumPy, which takes one matrix after the other: torch's products round by the number of elements.
        wide_rows = Y[:, :n, :wide].contiguous()
        inverse = linalg.solve_triangular(lower, one.expand(len(P), -1, -1), upper=False)[:, :n, :n].contiguous()
        with np.errstate(over="ignore", invalid="ignore"):  # of elements whose P is not definite
            gram = from_numpy(wide_rows.numpy().swapaxes(1, 2) @ wide_rows.numpy())
        definite = definite.expand(right.shape[0])
        return cls(inverse, wide_rows, gram, bounded, structure.m, structure.cones.zero, definite)

    def select(self, elements: Tensor) -> SchurFactor:
        """The factors of these elements."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[elements % tensor.shape[0]]

        factors = {name: chosen(getattr(self, name)) for name in ("inverse", "wide", "gram", "definite")}
        return replace(self, **factors)

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
        idle = (~self.active).numpy()
        self.regular, self.stacks = np.ones(len(idle), dtype=bool), list[tuple[Packed, Tensor]]()
        for stack in packed(torch.where(both, matrices, 0.0).numpy(), idle):
            small, info = linalg.cholesky_ex(from_numpy(stack.matrices))
            diagonal, behind = small.diagonal(dim1=-2, dim2=-1), from_numpy(stack.idle)
            least, largest = (torch.where(behind, limit, diagonal) for limit in (torch.inf, 0.0))
            fine = (info == 0) & (least.amin(-1) > DEFINITE * largest.amax(-1))
            self.regular[stack.elements] = fine.numpy()
            self.stacks.append((stack._replace(matrices=stack.matrices[:0]), small))

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The change (dx, dy, dz) of the points under a tilt, (B, ·) each."""
        factor, x, z = self.factor, from_numpy(g_x), from_numpy(g_z)
        y = from_numpy(g_y)
        if factor.bounded.shape[0]:
            y = torch.cat([y, z[:, factor.bounded]], 1)
        h = _times(factor.inverse, x)
        right = (y - _times(factor.wide.mT, h)).gather(1, self.order)
        multipliers = np.zeros(self.active.shape)
        for stack, small in self.stacks:
            solved = torch.cholesky_solve(from_numpy(stack.vectors(right.numpy()))[:, :, None], small)
            stack.spread(solved[:, :, 0].numpy(), multipliers)
        u = torch.zeros_like(y).scatter(1, self.order, torch.where(self.active, from_numpy(multipliers), 0.0))
        dx = -_times(factor.inverse.mT, h + _times(factor.wide, u))
        dz = torch.zeros_like(x)
        dz[:, factor.bounded] = u[:, factor.row_count :]
        return dx.numpy(), u[:, : factor.row_count].numpy(), dz.numpy()


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Products with vectors (B, ·), one by one."""
    with np.errstate(over="ignore", invalid="ignore"):
        return from_numpy((matrices.numpy() @ vectors[:, :, None].numpy())[:, :, 0])
