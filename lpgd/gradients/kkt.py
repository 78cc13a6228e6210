"""The linear systems of implicit differentiation, those of several elements stacked into one.

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

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla
from numpy.typing import NDArray

from lpgd.execution import bounded_blas
from lpgd.interrupts import pause
from lpgd.problems.structure import ConicStructure
from lpgd.projections import projection_derivative
from lpgd.status import warn

__all__ = ["KKTPoints", "KKTResponse", "is_quick", "respond"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]

DENSE_LIMIT = 400
"""Systems up to this size, or mostly filled ones, are factorised densely."""
STACK_LIMIT = 400_000
"""So many entries of dense systems are held at once: what stays in a core's cache."""
UNTHREADED = 500
"""Dense systems up to this size are factorised by one thread each."""
SINGULAR = 1e13
"""An estimated condition number above which a system counts as singular."""
RESIDUAL = 1e-7
"""The relative residual that a solve must reach to count as exact."""
RANK_CUTOFF = 1e-10
"""Singular values below this fraction of the largest are zero in the minimum-norm answer."""


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
    exact: NDArray[np.bool_]  # (k,) false for the minimum-norm answer of a singular system


def is_quick(structure: ConicStructure, count: int) -> bool:
    """Whether ``count`` systems are solved in about the time that it takes threads to change places."""
    size = structure.n + structure.m
    return count * size**3 < 5_000_000 if _is_dense(structure) else count * size < 20_000


def _is_dense(structure: ConicStructure) -> bool:
    filled = structure.constraint.nnz > 0.2 * max(structure.m * structure.n, 1)
    return filled or structure.n + structure.m <= DENSE_LIMIT


def respond(structure: ConicStructure, rho: float, P: FloatArray, A: FloatArray, points: KKTPoints) -> KKTResponse:
    """The derivative of k solutions along tilts.

    Args:
        structure: patterns and cones.
        rho: ρ ≥ 0 added to the diagonal of P.
        P: (k, nnz P) symmetric values; rows may be views of one.
        A: (k, nnz A).
        points: where, and which tilts.
    """
    size, dense = structure.n + structure.m, _is_dense(structure)
    count = max(1, STACK_LIMIT // max(size, 1) ** 2) if dense else len(P)
    parts = []
    for start in range(0, len(P), count):
        pause()
        chosen = slice(start, start + count)
        part = KKTPoints(*(rows[chosen] for rows in points))
        if dense and structure.cones.is_polyhedral:
            parts.append(_respond_directly(structure, rho, P[chosen], A[chosen], part))
        else:
            parts.append(_respond(structure, rho, P[chosen], A[chosen], part, dense))
    return KKTResponse(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))


def _respond(
    structure: ConicStructure, rho: float, P: FloatArray, A: FloatArray, points: KKTPoints, dense: bool
) -> KKTResponse:
    count, n = points.x.shape
    T, rest = projection_derivative(structure.cones, points.y - points.slack, dual=True).factor()
    constraint = structure.constraint.block_diagonal(A)
    quadratic: Any = structure.quadratic.block_diagonal(P)
    if rho:
        quadratic = quadratic + rho * sp.eye_array(count * n, format="csc")

    # A bound is active where its multiplier exceeds its slack: the projection's derivative for one row.
    at_bound = (points.z > points.upper - points.x) | (-points.z > points.x - points.lower)
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
    system = _System(matrix.row, matrix.col, matrix.data, right, owner, count)
    answer, exact = _solve_dense(system) if dense else _solve_sparse(system)

    dx[free] = answer[: free.size]
    dy = T.T @ answer[free.size :]
    dz = np.zeros(count * n)
    if at_bound.any():
        change = points.g_x.ravel() + constraint.T @ dy + structure.quadratic.block_diagonal(P) @ dx
        if rho:
            change = change + rho * dx
        dz = np.where(at_bound.ravel(), -change, 0.0)
    return KKTResponse(dx.reshape(count, n), dy.reshape(count, structure.m), dz.reshape(count, n), exact)


def _respond_directly(
    structure: ConicStructure, rho: float, P: FloatArray, A: FloatArray, points: KKTPoints
) -> KKTResponse:
    """The same where D is diagonal, a row is active or not: no sparse matrix in between."""
    count, n = points.x.shape
    nonnegative = structure.cones.sections["nonnegative"]
    active = np.ones(points.y.shape, dtype=bool)
    active[:, nonnegative] = points.y[:, nonnegative] >= points.slack[:, nonnegative]
    at_bound = (points.z > points.upper - points.x) | (-points.z > points.x - points.lower)
    quadratic, constraint = structure.quadratic.dense_matrices(P), structure.constraint.dense_matrices(A)
    if rho:
        quadratic[:, range(n), range(n)] += rho
    dx = np.where(at_bound, -points.g_z, 0.0)
    g_x, g_y = points.g_x, points.g_y
    if dx.any():
        g_x, g_y = g_x + _product(quadratic, dx), g_y + _product(constraint, dx)
    held = ~active
    order = np.argsort(held, axis=1, kind="stable")[:, : int((~held).sum(1).max())]  # active rows of each element first
    constraint_rows = np.take_along_axis(constraint, order[:, :, None], axis=1)
    rows_active = np.take_along_axis(active, order, axis=1)
    free = ~at_bound
    undetermined = (quadratic[:, range(n), range(n)] == 0) & (g_x == 0) & free  # without a diagonal P has no column
    if undetermined.any():
        free &= ~undetermined | ((constraint_rows != 0) & rows_active[:, :, None]).any(1)
    columns = np.flatnonzero(free.any(0))  # by any of these elements
    split = columns.size
    solved = np.concatenate([free[:, columns], rows_active], axis=1)
    whole = split == n
    matrices = np.zeros((count, solved.shape[1], solved.shape[1]))
    matrices[:, :split, :split] = quadratic if whole else quadratic[:, columns[:, None], columns]
    matrices[:, split:, :split] = constraint_rows if whole else constraint_rows[:, :, columns]
    matrices[:, :split, split:] = matrices[:, split:, :split].swapaxes(1, 2)
    if not solved.all():
        matrices *= solved[:, :, None]
        matrices *= solved[:, None, :]
    tilt = np.concatenate([g_x[:, columns], np.take_along_axis(g_y, order, axis=1)], axis=1)
    answer, exact = _solve_matrices(matrices, np.where(solved, -tilt, 0.0), ~solved)

    free = solved[:, :split]
    dx[:, columns] = np.where(free, answer[:, :split], dx[:, columns])
    dy = np.zeros_like(points.y)
    np.put_along_axis(dy, order, answer[:, split:], axis=1)
    change = points.g_x + _product(quadratic, dx) + _product(constraint.swapaxes(1, 2), dy)
    return KKTResponse(dx, dy, np.where(at_bound, -change, 0.0), exact)


def _product(matrices: FloatArray, vectors: FloatArray) -> FloatArray:
    return (matrices @ vectors[:, :, None])[:, :, 0]


def _has_entries(matrix: Any) -> NDArray[np.bool_]:
    """Which columns have a nonzero entry."""
    found = np.zeros(matrix.shape[1], dtype=bool)
    columns = np.repeat(np.arange(matrix.shape[1]), np.diff(matrix.indptr))
    found[columns[matrix.data != 0]] = True
    return found


@dataclass(frozen=True, eq=False)
class _System:
    """``K answer = right``, K symmetric and, but for a permutation, block diagonal with one block an element."""

    row: IndexArray
    column: IndexArray
    value: FloatArray
    right: FloatArray
    owner: IndexArray  # the element of each row
    count: int

    def only(self, element: int) -> tuple[_System, IndexArray]:
        """One element's system, and its rows in this one."""
        rows = np.flatnonzero(self.owner == element)
        place = np.full(self.right.size, -1, dtype=np.int64)
        place[rows] = np.arange(rows.size)
        entries = self.owner[self.row] == element
        indices = place[self.row[entries]], place[self.column[entries]]
        owner = np.zeros(rows.size, dtype=np.int64)
        return _System(*indices, self.value[entries], self.right[rows], owner, 1), rows

    def one_by_one(self, solve: Any) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Each element's system solved by itself."""
        answer, exact = np.zeros(self.right.size), np.ones(self.count, dtype=bool)
        for element in range(self.count):
            system, rows = self.only(element)
            answer[rows], exact[[element]] = solve(system)
        return answer, exact

    def sparse(self) -> sp.csc_array:
        return sp.csc_array((self.value, (self.row, self.column)), shape=(self.right.size, self.right.size))

    def largest(self, values: FloatArray) -> FloatArray:
        """The maximum over each element's rows; 0 where there is none."""
        found = np.zeros(self.count)
        np.maximum.at(found, self.owner, values)
        return found


@cache
def _probe(size: int) -> FloatArray:
    """A fixed random direction: ``|K⁻¹ probe|`` bounds the norm of K⁻¹ from below, almost surely within √size."""
    direction = np.random.default_rng(size).standard_normal(size)
    return np.asarray(direction / np.linalg.norm(direction))


def _is_exact(condition: FloatArray, error: FloatArray, size: FloatArray) -> NDArray[np.bool_]:
    return (condition < SINGULAR) & (error <= RESIDUAL * np.maximum(size, 1e-300))


def _solve_dense(system: _System) -> tuple[FloatArray, NDArray[np.bool_]]:
    sizes = np.bincount(system.owner, minlength=system.count)
    side = int(sizes.max(initial=0))
    order = np.argsort(system.owner, kind="stable")
    local = np.empty(order.size, dtype=np.int64)
    local[order] = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    matrices = np.zeros((system.count, side, side))
    matrices[system.owner[system.row], local[system.row], local[system.column]] = system.value
    right = np.zeros((system.count, side))
    right[system.owner, local] = system.right
    answer, exact = _solve_matrices(matrices, right, np.arange(side) >= sizes[:, None])
    return answer[system.owner, local], exact


def _solve_matrices(
    matrices: FloatArray, right: FloatArray, idle: NDArray[np.bool_]
) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Solve ``K answer = right`` for each of k symmetric matrices (k, t, t), without their idle rows and columns.

    Those must be zero, and get the answer zero; ``matrices`` is written to.
    """
    count, side = right.shape
    if side == 0:
        return right, np.ones(count, dtype=bool)
    element, place = np.nonzero(idle)
    matrices[element, place, place] = 1.0
    scale = _equilibration(np.abs(matrices).max(2))
    scaled = scale[:, :, None] * matrices
    scaled *= scale[:, None, :]
    probe = np.where(idle, 0.0, _probe(side))
    # Threads of BLAS cost more than they gain on matrices of this size.
    bound = bounded_blas() if side < UNTHREADED else nullcontext()
    try:
        with bound:
            answers = np.linalg.solve(scaled, np.stack([scale * right, probe], axis=2))
    except np.linalg.LinAlgError:
        answers = np.full((count, side, 2), np.nan)
        for element in range(count if count > 1 else 0):
            part = slice(element, element + 1)
            with suppress(np.linalg.LinAlgError):
                both = np.stack([scale[part] * right[part], probe[part]], axis=2)
                answers[part] = np.linalg.solve(scaled[part], both)
    condition = np.linalg.norm(answers[:, :, 1], axis=1) * np.abs(scaled).sum(2).max(1)
    answer = scale * answers[:, :, 0]
    error = np.abs((matrices @ answer[:, :, None])[:, :, 0] - right).max(1)
    exact = _is_exact(condition, error, np.abs(right).max(1))
    for bad in np.flatnonzero(~exact):
        own = np.flatnonzero(~idle[bad])
        answer[bad] = 0.0
        answer[bad, own] = _minimum_norm(matrices[bad][np.ix_(own, own)], right[bad, own])
    return answer, exact


def _minimum_norm(K: FloatArray, right: FloatArray) -> FloatArray:
    """The pseudo-inverse of a symmetric matrix, by its eigenvalues."""
    eigenvalues, vectors = np.linalg.eigh(K)
    kept = np.abs(eigenvalues) > RANK_CUTOFF * np.abs(eigenvalues).max(initial=0.0)
    return vectors[:, kept] @ ((vectors[:, kept].T @ right) / eigenvalues[kept])


_ORDERINGS: tuple[dict[str, Any], ...] = (
    {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.01, "options": {"SymmetricMode": True}},
    {"permc_spec": "COLAMD"},
)
"""SuperLU's options: for symmetric systems, a third of the fill; and with free pivoting, where that is not enough."""


def _solve_sparse(system: _System, ordering: int = 0) -> tuple[FloatArray, NDArray[np.bool_]]:
    size, right = system.right.size, system.right
    last = ordering == len(_ORDERINGS) - 1
    if size == 0:
        return right, np.ones(system.count, dtype=bool)
    largest = np.zeros(size)
    np.maximum.at(largest, system.row, np.abs(system.value))
    scale = _equilibration(largest)
    K = system.sparse()
    scaled = sp.csc_array(
        (K.data * scale[K.indices] * np.repeat(scale, np.diff(K.indptr)), K.indices, K.indptr), K.shape
    )
    try:
        factor = spla.splu(scaled, **_ORDERINGS[ordering])
    except RuntimeError:  # SuperLU: "Factor is exactly singular"
        if not last:
            return _solve_sparse(system, ordering + 1)
        if system.count > 1:
            return system.one_by_one(_solve_sparse)
        return _least_squares(K, right), np.zeros(1, dtype=bool)
    solution = factor.solve(np.stack([scale * right, _probe(size)], axis=1))
    answer = solution[:, 0] + factor.solve(scale * right - scaled @ solution[:, 0])
    # Each element's part of the probe has a norm of its own.
    norms = np.sqrt(
        np.bincount(system.owner, solution[:, 1] ** 2, system.count)
        / np.maximum(np.bincount(system.owner, _probe(size) ** 2, system.count), 1e-300)
    )
    condition = norms * system.largest(np.asarray(abs(scaled).sum(1)).ravel())
    answer = scale * answer
    exact = _is_exact(condition, system.largest(np.abs(K @ answer - right)), system.largest(np.abs(right)))
    for bad in np.flatnonzero(~exact):
        own, rows = system.only(int(bad))
        if last:
            answer[rows] = _least_squares(own.sparse(), own.right)
        else:
            answer[rows], exact[[bad]] = _solve_sparse(own, ordering + 1)
    return answer, exact


def _least_squares(K: Any, right: FloatArray) -> FloatArray:
    """The minimum-norm least-squares solution of a sparse singular system, iteratively."""
    options = {"atol": 1e-12, "btol": 1e-12, "conlim": 1.0 / RANK_CUTOFF, "maxiter": 20 * right.size}
    answer, stop, *_ = spla.lsmr(K, right, **options)
    if stop == 7:
        warn(
            f"the least-squares solve of a singular system of size {right.size} stopped at its iteration limit; "
            "the gradient of that element is approximate. rho > 0 makes the system better conditioned."
        )
    return answer


def _equilibration(largest: FloatArray) -> FloatArray:
    return 1.0 / np.sqrt(np.where(largest > 0, largest, 1.0))
