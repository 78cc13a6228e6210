"""Systems of quadratic programs with a definite P, for every active set from one factorisation.

With ``P = L Lᵀ``, C the rows of A and those of bounded variables of the identity, and ``M = C L⁻ᵀ``, the change of the
solution under the tilt ``<g_x, x> + <g, C x>``, the rows a being active, is

    (M Mᵀ)_aa u = g_a - (M h)_a,    h = L⁻¹ g_x,    dx = -L⁻ᵀ (h + Mᵀu),

u the change of the multipliers.  L is what shows that P is convex, and M what a solver may start from
(:mod:`lpgd.solvers.backends.whitened`): both are worked out once for the matrices of a batch.  Another active set picks
other rows of M, and a small matrix is all that is factorised for it.

All of it is done for one element after the other, in matrices whose size its own rows decide: no element has other bits
among others than alone.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from lpgd import linalg
from lpgd.arrays import BoolArray, FloatArray, IntArray, from_numpy
from lpgd.execution.memo import TensorMemo
from lpgd.execution.tasks import SerialExecutor, run_tasks, split
from lpgd.execution.threads import one_blas_thread
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.packed import packed_size
from lpgd.solvers.kkt.reduced import is_dense
from lpgd.solvers.kkt.root import Root, padded, root_of

__all__ = ["ActiveSystem", "SchurFactor", "System"]

Change = tuple[FloatArray, FloatArray, FloatArray]

DEFINITE = 1e-4
"""The least diagonal entry of a triangular factor, over the largest: the condition is some times its inverse square."""
ROOM = 16_000_000
"""So many entries of M are made for a batch."""
TALL, BROAD = 3, 80
"""Products of all rows are formed where there are no more than so many times the variables, and no more than that: at
n 100, 120 rows, they took LPGD's backward pass from 32 to 60 ms (batch 64), more than half of it for new memory."""
BUFFER = 131_072
"""So many entries of rows are whitened at once: what stays in a core's cache."""
LONG = 20_000_000
"""So many products are worth a second thread."""
PART, COPIED = 16, 1_000_000
"""A factor that elements share is copied for so many of them at once: so few stay in a core's cache.  Up to so many
entries of it are kept."""


_HERE = SerialExecutor()


class System(Protocol):
    """Systems of B elements, factorised.

    ``regular`` (B,) says whose is regular; ``inverse`` and ``condition`` (B,) are estimates of the norm of its inverse
    and of its condition, and ``entries`` is how many numbers are held.
    """

    regular: BoolArray
    inverse: FloatArray
    condition: FloatArray

    @property
    def entries(self) -> int: ...

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> Change: ...


@dataclass(frozen=True, eq=False)
class SchurFactor:
    """L and M of E elements.

    Attributes:
        root: L, R of them; element i uses row ``i mod R``, as for all data.
        white: (R, k, n) M.
        fine: (R,) which elements have them: P is definite, by much more than rounding.
        bounded: variables that have a bound, the last of the k rows.
        row_count: of A.
        zero: how many of them are equalities.
        pivots: (R,) the least and the largest of L.
    """

    root: Root
    white: Tensor
    fine: Tensor
    bounded: Tensor
    row_count: int
    zero: int
    pivots: tuple[FloatArray, FloatArray]

    @cached_property
    def all_fine(self) -> bool:
        """Whether all elements have them."""
        return bool(self.fine.all())

    @classmethod
    def of(cls, problem: ConicProblem, executor: Executor | None = _HERE) -> SchurFactor | None:
        """The factor of a batch in units of order 1; None where it is of no use: no P is surely definite, say.

        The executor, where the work runs if it takes long, changes no bit.
        """
        structure, data = problem.structure, problem.data
        if not _is_fit(structure) or problem.device.type != "cpu":
            return None
        known = _memo(data.P, structure.digest, lambda: list[_Known]())
        for entry in known:
            if entry.matrix() is data.A and entry.version == data.A._version:
                return entry.factor
        found = cls._made(problem, executor)
        if not data.A.is_inference():
            known[:] = [_Known(TensorWeakRef(data.A), data.A._version, found)]
        return found

    @classmethod
    def _made(cls, problem: ConicProblem, executor: Executor | None) -> SchurFactor | None:
        structure, data = problem.structure, problem.data
        root = root_of(problem)
        bounded = from_numpy(structure.bounded_index)
        count = max((datum.shape[0] for datum in (data.P, data.A) if datum.ndim == 2), default=1)
        wide, n = structure.m + bounded.shape[0], structure.n
        if root is None or count * max(wide, n) * n > ROOM:
            return None
        least, largest = root.pivots(n)
        fine: BoolArray = root.exists.numpy() & (least > DEFINITE * largest)
        C = structure.constraint.to_dense(torch.atleast_2d(data.A))
        sizes = {root.lower.shape[0], C.shape[0], 1}
        if len(sizes) > 2 or not fine.any():
            return None
        size = max(sizes)
        white = C.new_empty(size, wide, n)
        lower, C = root.lower.expand(size, -1, -1), C.expand(size, -1, -1)

        step = max(1, BUFFER // max(packed_size(wide) * lower.shape[1], 1))

        def whiten(chunk: range) -> None:
            # In memory that is used again: new pages take as long as the arithmetic.
            buffer = C.new_zeros(min(step, len(chunk)), packed_size(wide), lower.shape[1])
            for start in range(chunk.start, chunk.stop, step):
                elements = slice(start, min(start + step, chunk.stop))
                rows = buffer[: elements.stop - start]
                rows[:, : structure.m, :n] = C[elements]
                if bounded.shape[0]:
                    rows[:, structure.m : wide] = 0.0
                    rows[:, structure.m + torch.arange(bounded.shape[0]), bounded] = 1.0
                columns = rows.mT
                linalg.solve_triangular(lower[elements], columns, upper=False, out=columns)
                white[elements] = rows[:, :wide, :n]

        long = size * wide * n**2 > LONG and (executor is None or isinstance(executor, ThreadPoolExecutor))
        if long:
            run_tasks(whiten, split(size, executor, per_worker=1), executor)
        else:
            whiten(range(size))
        pivots, every = (np.resize(least, size), np.resize(largest, size)), from_numpy(np.resize(fine, size))
        return cls(root, white, every, bounded, structure.m, structure.cones.zero, pivots)

    @cached_property
    def gram(self) -> FloatArray | None:
        """(R, k, k) ``M Mᵀ``, from which active sets are picked; None where there are many more rows than variables."""
        wide, n = self.white.shape[1:]
        if wide > TALL * n or wide > BROAD:
            return None
        white = self.white.numpy()
        # Of elements whose P is not definite
        with np.errstate(over="ignore", invalid="ignore"), one_blas_thread(wide * wide * n):
            return white @ white.swapaxes(1, 2)

    def select(self, elements: Tensor) -> SchurFactor:
        """The factors of these elements."""

        def chosen(tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor[elements % tensor.shape[0]]

        root = Root(chosen(self.root.lower), chosen(self.root.exists))
        white = chosen(self.white)
        index = elements.numpy() % len(self.white) if len(self.white) > 1 else np.zeros(1, dtype=np.int64)
        pivots = self.pivots[0][index], self.pivots[1][index]
        return replace(self, root=root, white=white, fine=chosen(self.fine), pivots=pivots)

    def at(self, pieces: Tensor) -> ActiveSystem:
        """The system of the active sets ``pieces`` (B, ·), as :meth:`Points.pieces` has them."""
        count = pieces.shape[0]
        inequalities = self.row_count - self.zero
        masks = [torch.ones(count, self.zero, dtype=torch.bool), pieces[:, :inequalities] != 0]
        if self.bounded.shape[0]:
            masks.append(pieces[:, inequalities:][:, self.bounded] != 0)
        return ActiveSystem(self, torch.cat(masks, 1).numpy())

    def whitened(self, vectors: FloatArray) -> FloatArray:
        """``M v`` for vectors (B, n), B a multiple of R."""
        return _products(self.white.numpy().swapaxes(1, 2), vectors)

    def whitened_back(self, vectors: FloatArray) -> FloatArray:
        """``Mᵀ u`` for vectors (B, k)."""
        return _products(self.white.numpy(), vectors)

    def across(self, vectors: FloatArray) -> FloatArray:
        """``M Mᵀ u`` for vectors (B, k)."""
        return self.whitened(self.whitened_back(vectors)) if self.gram is None else _products(self.gram, vectors)

    def forward(self, vectors: Tensor) -> Tensor:
        """``L⁻¹ v`` for vectors (B, n)."""
        return self._solved(vectors, transposed=False)

    def backward(self, vectors: Tensor) -> Tensor:
        """``L⁻ᵀ v`` for vectors (B, n)."""
        return self._solved(vectors, transposed=True)

    def _solved(self, vectors: Tensor, transposed: bool) -> Tensor:
        lower, n = self.root.lower, vectors.shape[1]
        right = padded(vectors, lower.shape[1]).unsqueeze(2)
        shared = lower.shape[0] == 1 and vectors.shape[0] > 1
        matrix, period = (self._copies, PART) if shared else (lower, lower.shape[0])
        matrix = matrix.mT if transposed else matrix
        if period == vectors.shape[0]:
            return linalg.solve_triangular(matrix, right, upper=transposed)[:, :n, 0]
        found = [
            linalg.solve_triangular(matrix[: chunk.shape[0]], chunk, upper=transposed)[:, :n, 0]
            for chunk in right.split(period)
        ]
        return torch.cat(found) if len(found) != 1 else found[0]

    @cached_property
    def _copies(self) -> Tensor:
        """L as often as it is used at once: LAPACK's batches take no matrix that is shared."""
        copies = self.root.lower.mT.expand(PART, -1, -1)  # column by column, as LAPACK leaves and reads it
        return (copies.contiguous() if copies.numel() <= COPIED else copies).mT


class _Known(NamedTuple):
    """The factor of a P with a matrix A, as it was."""

    matrix: TensorWeakRef
    version: int
    factor: SchurFactor | None


_memo = TensorMemo()


def _is_fit(structure: ConicStructure) -> bool:
    fits = structure.cones.is_polyhedral and structure.quadratic.nnz >= structure.n and is_dense(structure)
    return fits and structure.n > 0


class _Stack(NamedTuple):
    """Elements whose active rows take matrices of one size.

    Attributes:
        elements: (k,) of the batch.
        rows: (k, w) which of their rows, the active ones first; None where they are all rows in order.
        idle: (k, p) those that are not active, and the p - w that are none.
        small: (k, p, p) the factor of ``M_a M_aᵀ``.
    """

    elements: IntArray
    rows: IntArray | None
    idle: BoolArray
    small: Tensor

    def solve(self, right: FloatArray, found: FloatArray) -> None:
        """Write the multipliers (B, k) of its elements for the right-hand sides (B, k)."""
        if self.rows is None:
            places, width = self.elements, right.shape[1]
        else:
            places, width = (self.elements[:, None], self.rows), self.rows.shape[1]
        values = np.zeros(self.idle.shape)
        values[:, :width] = right[places]
        values[self.idle] = 0.0
        u = _solved_twice(self.small, values)
        found[places] = np.where(self.idle, 0.0, u)[:, :width]


class ActiveSystem:
    """The system of one active set (B, k) for each of B elements; see :class:`System`.

    Args:
        factor: of R elements.
        active: which rows are active.
        owners: (B,) whose factor each element uses; None where that is row ``i mod R``.
        several: whether there will be other active sets of the same elements.
    """

    def __init__(
        self, factor: SchurFactor, active: BoolArray, owners: IntArray | None = None, *, several: bool = False
    ) -> None:
        self.factor, self.several, (count, wide) = factor, several, active.shape
        owners = np.arange(count) % factor.white.shape[0] if owners is None else owners
        least, largest = (values[owners] for values in factor.pivots)
        with np.errstate(divide="ignore", over="ignore"):  # of elements whose P is not definite
            fine, inverse = factor.fine.numpy()[owners], least**-2.0
        counts, step = active.sum(1), 2 * packed_size(1)
        sizes = step * -(-counts // step)  # few sizes: each is a stack of its own
        order = None
        self.stacks: list[_Stack] = []
        for side in sorted({size for size in sizes.tolist() if size}):
            elements, rows = np.flatnonzero(sizes == side), None
            if side < wide:
                order = np.argsort(~active, axis=1, kind="stable") if order is None else order
                rows = order[elements, :side]
                idle = np.arange(side) >= counts[elements][:, None]
            else:
                idle = np.ones((elements.size, side), dtype=np.bool_)
                idle[:, :wide] = ~active[elements]
            # In place, as LAPACK has them: the matrices are symmetric.
            small, info = from_numpy(self._gram(rows, idle, owners[elements])).mT, torch.empty(0, dtype=torch.int32)
            linalg.cholesky_ex(small, out=(small, info))
            pivots = small.numpy().diagonal(axis1=1, axis2=2)
            smallest = pivots.min(1, where=~idle, initial=np.inf)
            largest_pivot = pivots.max(1, where=~idle, initial=0.0)
            regular = (info.numpy() == 0) & (smallest > DEFINITE * largest_pivot)
            with np.errstate(divide="ignore", invalid="ignore"):
                inverse[elements] += smallest**-2.0
            fine[elements] &= regular
            self.stacks.append(_Stack(elements, rows, idle, small))
        self.regular: BoolArray = fine
        self.inverse: FloatArray = np.where(fine, inverse, np.inf)
        self.condition: FloatArray = self.inverse * (1.0 + largest**2)

    def _gram(self, rows: IntArray | None, idle: BoolArray, owners: IntArray) -> FloatArray:
        """(k, p, p) ``M_a M_aᵀ``, with ones on the diagonal of idle rows; see :class:`_Stack`."""
        whole = self.factor.gram if self.several else None
        _, wide, n = self.factor.white.shape
        count, side = idle.shape
        if whole is not None:
            if rows is None:
                gram = np.zeros((count, side, side))
                gram[:, :wide, :wide] = whole[owners]
            else:
                first = (owners * wide**2)[:, None] + rows * wide
                gram = whole.take(first[:, :, None] + rows[:, None, :])
            gram[idle] = 0.0
            gram.swapaxes(1, 2)[idle] = 0.0
        else:
            white = self.factor.white.numpy()
            with np.errstate(over="ignore", invalid="ignore"):  # of elements whose P is not definite
                if rows is None:
                    chosen = np.zeros((count, side, n))
                    np.multiply(white[owners], ~idle[:, :wide, None], out=chosen[:, :wide])
                else:
                    chosen = white.reshape(-1, n).take(rows + (owners * wide)[:, None], axis=0)
                    chosen *= ~idle[:, :, None]
                with one_blas_thread(side * side * n):
                    gram = chosen @ chosen.swapaxes(1, 2)
        np.einsum("bii->bi", gram)[...] += idle
        return gram

    @property
    def entries(self) -> int:
        """How many numbers it holds beside those of the factor, which the matrices keep."""
        return sum(stack.small.numel() for stack in self.stacks)

    def multipliers(self, right: FloatArray) -> FloatArray:
        """(B, k) u with ``(M Mᵀ)_aa u_a = right_a``, zero in rows that are not active."""
        found = np.zeros(right.shape)
        with np.errstate(over="ignore", invalid="ignore"):  # of elements that are not regular
            for stack in self.stacks:
                stack.solve(right, found)
        return found

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> Change:
        """The change (dx, dy, dz) of the points under a tilt, (B, ·) each."""
        factor, bounded = self.factor, self.factor.bounded.numpy()
        g = np.concatenate([g_y, g_z[:, bounded]], axis=1) if bounded.size else g_y
        h = factor.forward(from_numpy(g_x)).numpy()
        with np.errstate(over="ignore", invalid="ignore"):  # of elements that are not regular
            u = self.multipliers(g - factor.whitened(h))
            moved = h + factor.whitened_back(u)
        dx = -factor.backward(from_numpy(moved)).numpy()
        dz = np.zeros_like(g_z)
        dz[:, bounded] = u[:, factor.row_count :]
        return dx, u[:, : factor.row_count], dz


def _solved_twice(lower: Tensor, right: FloatArray) -> FloatArray:
    """``(L Lᵀ)⁻¹ v`` for vectors (k, p): torch's ``cholesky_solve`` copies L, which takes longer (torch 2.13)."""
    half = linalg.solve_triangular(lower, from_numpy(right[:, :, None]), upper=False)
    return linalg.solve_triangular(lower.mT, half, upper=True)[:, :, 0].numpy()


def _products(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """``vᵀ M`` for vectors (B, p) and matrices (R, p, q), B a multiple of R: one product for each element."""
    groups, size = len(vectors) // max(len(matrices), 1), vectors.shape[1]
    grouped = vectors.reshape(groups, len(matrices), 1, size)
    with np.errstate(over="ignore", invalid="ignore"):  # of elements whose P is not definite
        return (grouped @ matrices).reshape(len(vectors), matrices.shape[2])
