"""The systems of :mod:`lpgd.solvers.kkt.system` for a stack of elements, reduced to what may move.

``reduce`` makes the matrices, whatever is on the right; ``right`` puts a tilt on the right, and ``change`` reads the
change of the point off the answer.  So one factorisation serves any number of tilts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray
from lpgd.cones.projections import SpectralDerivative, projection_derivative
from lpgd.problems.conic.structure import ConicStructure

__all__ = [
    "ReducedBlocks",
    "ReducedRows",
    "dense_quadratic",
    "held",
    "is_dense",
    "is_narrow",
    "product",
    "reduce_blocks",
    "reduce_rows",
]

Scalar = TypeVar("Scalar", np.float64, np.bool_)

DENSE_LIMIT, EMPTY_LIMIT, FILLED = 400, 200, 0.2
"""Systems up to this size are factorised densely, nearly empty ones up to the second, others where that is filled."""
EMPTY_ROWS = 4
"""Entries of a row, on average, of a nearly empty system: one along a chain."""
NARROW, NARROW_LIMIT = 8, 250
"""Above the second size, systems with a nearly diagonal P and so many times as many variables as rows are factorised
sparsely."""


def is_dense(structure: ConicStructure) -> bool:
    """Whether systems are factorised densely."""
    if is_narrow(structure):
        return False
    filled = structure.mixed_entries > FILLED * max(structure.m * structure.n, 1)
    size = structure.n + structure.m
    empty = structure.quadratic.nnz + 2 * structure.constraint.nnz <= EMPTY_ROWS * size
    return filled or size <= (EMPTY_LIMIT if empty else DENSE_LIMIT)


def is_narrow(structure: ConicStructure) -> bool:
    """Whether there are many variables, P is nearly diagonal, and rows, full or not, are few: only rows fill up."""
    n, m = structure.n, structure.m
    return n + m > NARROW_LIMIT and n <= structure.quadratic.nnz <= EMPTY_ROWS * n and NARROW * m <= n


def has_dense_rows(structure: ConicStructure) -> bool:
    """Whether these are systems of linear or quadratic programs that are factorised densely: rows active or not."""
    return structure.cones.is_polyhedral and is_dense(structure)


def held(x: FloatArray, z: FloatArray, lower: FloatArray, upper: FloatArray) -> BoolArray:
    """(k, n) variables at a bound: where its multiplier exceeds its slack, the projection's derivative for one row."""
    return (z > upper - x) | (-z > x - lower) | (lower >= upper)


FEW = 0.7
"""Each element has columns of its own where it has fewer free variables than this share of all that are free in any."""


def _taken(values: NDArray[Scalar], columns: IntArray) -> NDArray[Scalar]:
    """The columns (split,) or (k, split) of (k, n) values."""
    return values[:, columns] if columns.ndim == 1 else np.take_along_axis(values, columns, axis=1)


@dataclass(frozen=True, eq=False)
class ReducedRows:
    """Dense systems, in stacks.

    Attributes:
        matrices: (k, t, t), zero in the rows and columns that are not ``solved`` (k, t).
        split: how many of the t unknowns are variables, the others multipliers.
        quadratic, constraint: (k, n, n) with ρ, and (k, m, n).
        derivative: D, of all elements, with ``T = √d Uᵀ``; None where D is diagonal, a row is active or not.
        order: (k, t - split) rows of T, those with ``d > 0`` of each element first.
        columns: (split,) variables that are free in any element; or (k, split), each element's free ones first.
        at_bound, loose: (k, n) variables at a bound, and free ones that nothing determines.
    """

    matrices: FloatArray
    solved: BoolArray
    split: int
    quadratic: FloatArray
    constraint: FloatArray
    derivative: SpectralDerivative | None
    order: IntArray
    columns: IntArray
    at_bound: BoolArray
    loose: BoolArray

    @property
    def primal(self) -> BoolArray:
        """(t,) which unknowns are variables."""
        return np.arange(self.solved.shape[1]) < self.split

    def right(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> FloatArray:
        """The right-hand sides (k, t) of a tilt."""
        fixed = np.where(self.at_bound, -g_z, 0.0)
        if fixed.any():
            g_x, g_y = g_x + product(self.quadratic, fixed), g_y + product(self.constraint, fixed)
        if self.derivative is not None:
            g_y = self.derivative.turned(g_y.reshape(-1, 1)).reshape(g_y.shape)
        tilt = np.concatenate([_taken(g_x, self.columns), np.take_along_axis(g_y, self.order, axis=1)], axis=1)
        return np.where(self.solved, -tilt, 0.0)

    def change(self, answer: FloatArray, g_x: FloatArray, g_z: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The change (dx, dy, dz) of the points, from an answer (k, t) and the tilt."""
        dx = np.where(self.at_bound, -g_z, 0.0)
        free = np.where(self.solved[:, : self.split], answer[:, : self.split], _taken(dx, self.columns))
        if self.columns.ndim == 1:
            dx[:, self.columns] = free
        else:
            np.put_along_axis(dx, self.columns, free, axis=1)
        dy = self._of_rows(answer, absolute=False)
        if not self.at_bound.any():
            return dx, dy, np.zeros_like(dx)
        slope = g_x + product(self.quadratic, dx) + product(self.constraint.swapaxes(1, 2), dy)
        return dx, dy, np.where(self.at_bound, -slope, 0.0)

    def of_rows(self, answer: FloatArray) -> FloatArray:
        """The part of an answer that belongs to rows of A, each a sum over what it is part of: (k, m)."""
        return self._of_rows(answer, absolute=True)

    def _of_rows(self, answer: FloatArray, absolute: bool) -> FloatArray:
        """``Tᵀu``, or with the absolute values of T."""
        multipliers = np.zeros(self.constraint.shape[:2])
        np.put_along_axis(multipliers, self.order, answer[:, self.split :], axis=1)
        if self.derivative is None:
            return multipliers
        return self.derivative.turned_back(multipliers.ravel(), absolute=absolute).reshape(multipliers.shape)


def reduce_rows(
    structure: ConicStructure,
    rho: FloatArray | float,
    P: FloatArray,
    A: FloatArray,
    v: FloatArray,
    at_bound: BoolArray,
    g: tuple[FloatArray, FloatArray, FloatArray] | None = None,
) -> ReducedRows:
    """The systems of k elements as dense matrices.

    Args:
        structure: patterns and cones.
        rho: added to the diagonal of P.
        P, A: (k, ·) values.
        v: (k, m) ``y - s``.
        at_bound: (k, n) variables at a bound.
        g: the tilt, if it is known: variables that it involves then count, so that a system is singular where nothing
            else involves them.
    """
    n = structure.n
    constraint = structure.constraint.dense_matrices(A)
    quadratic = dense_quadratic(structure, rho, P)
    if structure.cones.is_polyhedral:
        derivative, turned = None, constraint
        active = v >= 0
        active[:, : structure.cones.zero] = True
    else:
        derivative = projection_derivative(structure.cones, v, dual=True)
        active = derivative.present.reshape(v.shape)
        turned = derivative.turned(constraint.reshape(v.size, n)).reshape(constraint.shape)
    order = np.argsort(~active, axis=1, kind="stable")[:, : int(active.sum(1).max(initial=0))]
    if (order == np.arange(order.shape[1])).all():
        rows, rows_active = turned[:, : order.shape[1]], active[:, : order.shape[1]]
    else:
        rows = np.take_along_axis(turned, order[:, :, None], axis=1)
        rows_active = np.take_along_axis(active, order, axis=1)
    free = ~at_bound
    loose = (quadratic[:, range(n), range(n)] == 0) & free  # without a diagonal P has no column
    if g is not None and loose.any():
        fixed = np.where(at_bound, -g[2], 0.0)
        loose &= (g[0] + product(quadratic, fixed) if fixed.any() else g[0]) == 0
    if loose.any():
        loose &= ~((rows != 0) & rows_active[:, :, None]).any(1)
        free &= ~loose
    columns = np.flatnonzero(free.any(0))  # by any of these elements
    most = int(free.sum(1).max(initial=0))
    if most < FEW * columns.size:  # at vertices of linear programs each element has others
        columns = np.argsort(~free, axis=1, kind="stable")[:, :most]
    split = columns.shape[-1]
    solved = np.concatenate([_taken(free, columns), rows_active], axis=1)
    matrices = np.zeros((len(P), solved.shape[1], solved.shape[1]))
    if columns.ndim == 2:
        if quadratic.any():
            squares = np.take_along_axis(quadratic, columns[:, :, None], axis=1)
            matrices[:, :split, :split] = np.take_along_axis(squares, columns[:, None], axis=2)
        matrices[:, split:, :split] = np.take_along_axis(rows, columns[:, None], axis=2)
    elif split == n:
        matrices[:, :split, :split], matrices[:, split:, :split] = quadratic, rows
    else:
        matrices[:, :split, :split] = quadratic[:, columns[:, None], columns]
        matrices[:, split:, :split] = rows[:, :, columns]
    matrices[:, :split, split:] = matrices[:, split:, :split].swapaxes(1, 2)
    if derivative is not None:
        corner = np.arange(split, solved.shape[1])
        eigenvalues = np.take_along_axis(derivative.eigenvalues.reshape(v.shape), order, axis=1)
        matrices[:, corner, corner] = eigenvalues - 1.0
    if not solved.all():
        matrices *= solved[:, :, None]
        matrices *= solved[:, None, :]
    return ReducedRows(matrices, solved, split, quadratic, constraint, derivative, order, columns, at_bound, loose)


def dense_quadratic(structure: ConicStructure, rho: FloatArray | float, P: FloatArray) -> FloatArray:
    """``P + ρI`` as (k, n, n) matrices; a zero that takes no memory where there is none."""
    n = structure.n
    if not structure.quadratic.nnz and not np.any(rho):
        return np.broadcast_to(0.0, (len(P), n, n))
    quadratic = structure.quadratic.dense_matrices(P)
    if np.any(rho):
        quadratic[:, range(n), range(n)] += rho
    return quadratic


@dataclass(frozen=True, eq=False)
class ReducedBlocks:
    """Sparse systems, as the blocks of one matrix.

    Attributes:
        matrix: of all elements; ``owner`` (t,) has the element of each of its rows, ``primal`` (t,) the variables.
        quadratic, constraint: block-diagonal, with ρ.
        T: the factor ``√d Uᵀ`` of the projection's derivative.
        free: places of the free variables among all, counted over the elements.
        at_bound, loose: (k, n) variables at a bound, and free ones that nothing determines.
        m: rows of A in each element.
    """

    matrix: SparseArray
    owner: IntArray
    primal: BoolArray
    quadratic: SparseArray
    constraint: SparseArray
    T: SparseArray
    free: IntArray
    at_bound: BoolArray
    loose: BoolArray
    m: int

    def right(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> FloatArray:
        """The right-hand side (t,) of a tilt (k, ·) each."""
        fixed = np.where(self.at_bound, -g_z, 0.0).ravel()
        g_x, g_y = g_x.ravel(), g_y.ravel()
        if fixed.any():
            g_x, g_y = g_x + self.quadratic @ fixed, g_y + self.constraint @ fixed
        return -np.concatenate([g_x[self.free], self.T @ g_y])

    def change(self, answer: FloatArray, g_x: FloatArray, g_z: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The change (dx, dy, dz) of the points, from an answer (t,) and the tilt."""
        dx = np.where(self.at_bound, -g_z, 0.0).ravel()
        dx[self.free] = answer[: self.free.size]
        dy = self.T.T @ answer[self.free.size :]
        dz = np.zeros(dx.size)
        if self.at_bound.any():
            slope = g_x.ravel() + self.constraint.T @ dy + self.quadratic @ dx
            dz = np.where(self.at_bound.ravel(), -slope, 0.0)
        return dx.reshape(g_x.shape), dy.reshape(len(g_x), self.m), dz.reshape(g_x.shape)

    def of_rows(self, answer: FloatArray) -> FloatArray:
        """The part of an answer that belongs to rows of A, each a sum over what it is part of: (k, m)."""
        return (abs(self.T).T @ answer[self.free.size :]).reshape(len(self.at_bound), self.m)


def reduce_blocks(
    structure: ConicStructure,
    rho: FloatArray | float,
    P: FloatArray,
    A: FloatArray,
    v: FloatArray,
    at_bound: BoolArray,
    g: tuple[FloatArray, FloatArray, FloatArray] | None = None,
) -> ReducedBlocks:
    """The systems of k elements as one sparse matrix; see :func:`reduce_rows`."""
    count, n = at_bound.shape
    T, complements = projection_derivative(structure.cones, v, dual=True).factor()
    constraint: SparseArray = structure.constraint.block_diagonal(A)
    quadratic: SparseArray = structure.quadratic.block_diagonal(P)
    added = np.broadcast_to(rho, (count, n)).ravel()
    if added.any():
        quadratic = quadratic + sp.diags_array(added, format="csc")
    rows = sp.csc_array(T @ constraint)
    # A free variable that nothing active involves, in an epigraph that is not tight, say, is not determined; nor need
    # it be where no loss depends on it: it is left where it is.
    involved = _has_entries(rows) | _has_entries(quadratic)
    if g is not None:
        g_x, fixed = g[0].ravel(), np.where(at_bound, -g[2], 0.0).ravel()
        involved |= (g_x + quadratic @ fixed if fixed.any() else g_x) != 0
    unbound = ~at_bound.ravel()
    free = np.flatnonzero(unbound & involved)
    loose = (unbound & ~involved).reshape(count, n)
    # Each row of T belongs to one element, that of its first entry.
    owner: SparseArray = np.concatenate([free // max(n, 1), T.indices[T.indptr[:-1]] // max(structure.m, 1)])
    free_rows, free_quadratic = rows[:, free], quadratic[:, free][free]
    blocks: SparseArray = [[free_quadratic, free_rows.T], [free_rows, sp.diags_array(-complements)]]
    matrix: SparseArray = sp.coo_array(sp.block_array(blocks, format="coo"))
    primal = np.arange(owner.size) < free.size
    return ReducedBlocks(matrix, owner, primal, quadratic, constraint, T, free, at_bound, loose, structure.m)


def product(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    """(k, r) the products of matrices (k, r, c) and vectors (k, c)."""
    if not matrices.strides[2]:  # zero
        return np.zeros((len(vectors), matrices.shape[1]))
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _has_entries(matrix: SparseArray) -> BoolArray:
    """Which columns have a nonzero entry."""
    found = np.zeros(matrix.shape[1], dtype=bool)
    columns = np.repeat(np.arange(matrix.shape[1]), np.diff(matrix.indptr))
    found[columns[matrix.data != 0]] = True
    return found
