"""The linear systems of Newton's method and of implicit differentiation, those of several elements stacked into one.

With ``v = y - s`` the optimality conditions are ``P x + q + AᵀΠ(v) + z = 0`` and ``A x + Π(v) - v = b``, Π the
projection onto K* (Busseti, Moursi and Boyd 2019, for the homogeneous form).  Its derivative D at v is symmetric with
eigenvalues ``0 ≤ d ≤ 1``; with ``T = √d Uᵀ`` from its eigenvectors, ``D = TᵀT``, the change ``(dx, dy)`` of the
solution under the tilt ``<g_x, x> + <g_y, y>`` solves one symmetric system,

    [ P + ρI   (T A)ᵀ  ] [dx]     [  g_x  ]
    [ T A     -(I - d) ] [u ] = - [ T g_y ],      dy = Tᵀu,

in which rows with d = 0 drop out.  A variable at a bound is fixed: ``dx_j = -g_z,j``, and its multiplier's change
follows from its row of the first block.

Elements have systems of different sizes; they are put together as the blocks of one sparse matrix, so that what is not
arithmetic is paid for once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray
from lpgd.cones.projections import projection_derivative
from lpgd.execution.interrupts import pause
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.factor import Known, System, solve_dense, solve_matrices, solve_sparse

__all__ = ["KKTPoints", "KKTResponse", "Known", "is_quick", "respond"]

DENSE_LIMIT = 400
"""Systems up to this size, or mostly filled ones, are factorised densely."""
NULL = 1e-6
"""Rows with a smaller part of the null space's unit vectors have nothing to do with it."""
STACK_LIMIT = 400_000
"""So many entries of dense systems are held at once: what stays in a core's cache."""


class KKTPoints(NamedTuple):
    """Solutions, tilts and bounds of k elements, one row each."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray
    g_x: FloatArray
    g_y: FloatArray
    g_z: FloatArray
    lower: FloatArray
    upper: FloatArray


class KKTResponse(NamedTuple):
    """The changes of k solutions, one row each."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    exact: BoolArray  # (k,) false for the minimum-norm answer of a singular system
    unique: BoolArray  # (k,) whether there is no freedom but that of multipliers
    consistent: BoolArray  # (k,) whether the change is one that the system allows
    doubt: FloatArray  # (k,) the share of the answer that the point's error may change
    shared: BoolArray  # (k, m) rows whose multipliers are not unique

    @classmethod
    def joined(cls, parts: Sequence[KKTResponse]) -> KKTResponse:
        """Several, one after the other."""
        columns: Any = zip(*parts, strict=True)
        return cls(*(np.concatenate(rows) for rows in columns))

    def select(self, rows: Any) -> KKTResponse:
        """Some of them, in new arrays."""
        columns: Any = self
        return KKTResponse(*(part[rows] for part in columns))

    def copy(self) -> KKTResponse:
        """The same in arrays of its own."""
        return self.select(np.arange(len(self.x)))


def is_quick(structure: ConicStructure, count: int) -> bool:
    """Whether ``count`` systems are solved in about the time that it takes threads to change places."""
    size = structure.n + structure.m
    return count * size**3 < 5_000_000 if _is_dense(structure) else count * size < 20_000


def _is_dense(structure: ConicStructure) -> bool:
    filled = structure.constraint.nnz > 0.2 * max(structure.m * structure.n, 1)
    return filled or structure.n + structure.m <= DENSE_LIMIT


def respond(
    structure: ConicStructure, rho: FloatArray | float, P: FloatArray, A: FloatArray, points: KKTPoints, known: Known
) -> KKTResponse:
    """The derivative of k solutions along tilts.

    Args:
        structure: patterns and cones.
        rho: ρ ≥ 0 added to the diagonal of P; or (k, n) one for each variable.
        P: (k, nnz P) symmetric values; rows may be views of one.
        A: (k, nnz A).
        points: where, and which tilts.
        known: how well the points are known.
    """
    size, dense = structure.n + structure.m, _is_dense(structure)
    count = max(1, STACK_LIMIT // max(size, 1) ** 2) if dense else len(P)
    parts = []
    for start in range(0, len(P), count):
        pause()
        chosen = slice(start, start + count)
        part = KKTPoints(*(rows[chosen] for rows in points))
        own, own_rho = known.select(chosen), rho[chosen] if isinstance(rho, np.ndarray) else rho
        if dense and structure.cones.is_polyhedral:
            parts.append(_respond_directly(structure, own_rho, P[chosen], A[chosen], part, own))
        else:
            parts.append(_respond(structure, own_rho, P[chosen], A[chosen], part, own, dense))
    return KKTResponse.joined(parts)


def _held(points: KKTPoints) -> BoolArray:
    """(k, n) variables at a bound: where its multiplier exceeds its slack, the projection's derivative for one row."""
    fixed = points.lower >= points.upper
    return (points.z > points.upper - points.x) | (-points.z > points.x - points.lower) | fixed


def _respond(
    structure: ConicStructure,
    rho: FloatArray | float,
    P: FloatArray,
    A: FloatArray,
    points: KKTPoints,
    known: Known,
    dense: bool,
) -> KKTResponse:
    count, n = points.x.shape
    T, rest = projection_derivative(structure.cones, points.y - points.slack, dual=True).factor()
    constraint = structure.constraint.block_diagonal(A)
    quadratic: Any = structure.quadratic.block_diagonal(P)
    added = np.broadcast_to(rho, (count, n)).ravel()
    if added.any():
        quadratic = quadratic + sp.diags_array(added, format="csc")

    at_bound = _held(points)
    dx = np.where(at_bound, -points.g_z, 0.0).ravel()
    g_x, g_y = points.g_x.ravel(), points.g_y.ravel()
    if dx.any():
        g_x, g_y = g_x + quadratic @ dx, g_y + constraint @ dx
    rows = sp.csc_array(T @ constraint)
    # A free variable that nothing active involves, in an epigraph that is not tight, say, is not determined; nor need
    # it be where no loss depends on it: it is left where it is.
    involved = (g_x != 0) | _has_entries(rows) | _has_entries(quadratic)
    free = np.flatnonzero(~at_bound.ravel() & involved)
    right = -np.concatenate([g_x[free], T @ g_y])
    # Each row of T belongs to one element, that of its first entry.
    owner: Any = np.concatenate([free // max(n, 1), T.indices[T.indptr[:-1]] // max(structure.m, 1)])
    rows, quadratic = rows[:, free], quadratic[:, free][free]
    matrix: Any = sp.coo_array(sp.block_array([[quadratic, rows.T], [rows, sp.diags_array(-rest)]], format="coo"))
    primal = np.arange(right.size) < free.size
    system = System(matrix.row, matrix.col, matrix.data, right, owner, primal, count, known)
    found = solve_dense(system) if dense else solve_sparse(system)
    answer = found.answer

    dx[free] = answer[: free.size]
    dy = T.T @ answer[free.size :]
    dz = np.zeros(count * n)
    if at_bound.any():
        change = points.g_x.ravel() + constraint.T @ dy + structure.quadratic.block_diagonal(P) @ dx
        change += added * dx
        dz = np.where(at_bound.ravel(), -change, 0.0)
    return KKTResponse(
        dx.reshape(count, n),
        dy.reshape(count, structure.m),
        dz.reshape(count, n),
        found.exact,
        found.unique,
        found.consistent,
        found.doubt,
        (abs(T).T @ found.null[free.size :] > NULL).reshape(count, structure.m),
    )


def _respond_directly(
    structure: ConicStructure, rho: FloatArray | float, P: FloatArray, A: FloatArray, points: KKTPoints, known: Known
) -> KKTResponse:
    """The same where D is diagonal, a row is active or not: no sparse matrix in between."""
    count, n = points.x.shape
    nonnegative = structure.cones.sections["nonnegative"]
    active = np.ones(points.y.shape, dtype=bool)
    active[:, nonnegative] = points.y[:, nonnegative] >= points.slack[:, nonnegative]
    at_bound = _held(points)
    # Both are read only, P transposed as it is symmetric.
    quadratic = P.reshape(count, n, n) if structure.quadratic.is_dense else structure.quadratic.dense_matrices(P)
    columns_of = structure.constraint.dense_columns(A)
    augmented = bool(np.any(rho))
    if augmented:
        quadratic = quadratic.copy()
        quadratic[:, range(n), range(n)] += rho
    dx = np.where(at_bound, -points.g_z, 0.0)
    g_x, g_y = points.g_x, points.g_y
    if dx.any():
        g_x, g_y = g_x + _product(quadratic, dx), g_y + _product(columns_of.swapaxes(1, 2), dx)
    held = ~active
    order = np.argsort(held, axis=1, kind="stable")[:, : int(active.sum(1).max())]  # active rows of each element first
    rows_active = np.take_along_axis(active, order, axis=1)
    chosen = np.take_along_axis(columns_of, order[:, None, :], axis=2)  # (k, n, t)
    if not rows_active.all():
        chosen *= rows_active[:, None, :]
    free = ~at_bound
    undetermined = (quadratic[:, range(n), range(n)] == 0) & (g_x == 0) & free  # without a diagonal P has no column
    if undetermined.any():
        free &= ~undetermined | (chosen != 0).any(2)
    columns = np.flatnonzero(free.any(0))  # by any of these elements
    split = columns.size
    solved = np.concatenate([free[:, columns], rows_active], axis=1)
    whole = split == n
    matrices = np.zeros((count, solved.shape[1], solved.shape[1]))
    matrices[:, :split, :split] = quadratic if whole else quadratic[:, columns[:, None], columns]
    matrices[:, :split, split:] = chosen if whole else chosen[:, columns]
    if not free[:, columns].all():
        matrices[:, :split] *= free[:, columns, None]
        matrices[:, :split, :split] *= free[:, None, columns]
    matrices[:, split:, :split] = matrices[:, :split, split:].swapaxes(1, 2)
    tilt = np.concatenate([g_x[:, columns], np.take_along_axis(g_y, order, axis=1)], axis=1)
    primal = np.arange(solved.shape[1]) < split
    found = solve_matrices(matrices, np.where(solved, -tilt, 0.0), ~solved, primal, known)
    answer = found.answer

    free = solved[:, :split]
    dx[:, columns] = np.where(free, answer[:, :split], dx[:, columns])
    dy = np.zeros_like(points.y)
    np.put_along_axis(dy, order, answer[:, split:], axis=1)
    change = points.g_x + _product(quadratic, dx) + _product(columns_of, dy)
    shared = np.zeros(dy.shape, dtype=bool)
    np.put_along_axis(shared, order, found.null[:, split:] > NULL, axis=1)
    return KKTResponse(
        dx, dy, np.where(at_bound, -change, 0.0), found.exact, found.unique, found.consistent, found.doubt, shared
    )


def _product(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _has_entries(matrix: Any) -> BoolArray:
    """Which columns have a nonzero entry."""
    found = np.zeros(matrix.shape[1], dtype=bool)
    columns = np.repeat(np.arange(matrix.shape[1]), np.diff(matrix.indptr))
    found[columns[matrix.data != 0]] = True
    return found
