"""Euclidean projections onto the product cone K and onto its dual, and their derivatives in spectral form.

Every projection onto a closed convex cone satisfies Moreau's decomposition ``v = P_K(v) - P_K*(-v)`` with
``<P_K(v), P_K*(-v)> = 0``, K* the dual cone.  Here it turns each projection into one onto the dual cone,
``P_K*(v) = v + P_K(-v)``, with the derivative ``I - D P_K(-v)``.

Where the projection is not differentiable an element of its generalised (Clarke) Jacobian is taken, the one
that ReLU has: an eigenvalue is 0 where the quantity that decides it is exactly 0.  So the derivative is 0 on
the whole polar cone (at ``v = 0`` on the nonnegative cone), and the identity in the interior of K only; for
the dual cone the formula above turns this around, and the derivative is the identity at 0.

The cones that are not orthants are in :mod:`lpgd.cones.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray, IntArray
from lpgd.cones.blocks import cone_blocks
from lpgd.cones.product import Cones

__all__ = [
    "BlockGroup",
    "SpectralDerivative",
    "distance",
    "project",
    "projection_derivative",
]

SMALLEST_EIGENVALUE = 1e-14
"""Eigenvalues of a projection's derivative up to this one are rounding, and are taken as 0 in the factor."""


@dataclass(frozen=True)
class BlockGroup:
    """Equally large diagonal blocks of a symmetric matrix, each with its orthonormal eigenvectors.

    Args:
        rows: (k, t) rows of the matrix that each of the k blocks occupies.
        basis: (k, t, t) eigenvectors of each block, as columns.
    """

    rows: IntArray
    basis: FloatArray


@dataclass(frozen=True)
class SpectralDerivative:
    """The symmetric (m, m) derivative ``D = U diag(d) U^T`` of a projection at one point, U block diagonal.

    Args:
        eigenvalues: (m,) d, each in [0, 1].  Entry p belongs to the block, and to the column of the block's
            basis, that stand at row p.
        groups: the blocks of U.  Rows in no group (zero and nonnegative cones) have the identity.
    """

    eigenvalues: FloatArray
    groups: tuple[BlockGroup, ...]

    def apply(self, vectors: FloatArray) -> FloatArray:
        """``D w`` for ``w`` of shape (..., m).

        Raises:
            ValueError: the last dimension of ``vectors`` is not m.
        """
        vectors = np.asarray(vectors, dtype=np.float64)
        if vectors.shape[-1:] != self.eigenvalues.shape:
            raise ValueError(
                f"vectors of shape {vectors.shape} were given; the last dimension is {self.eigenvalues.size}."
            )
        result = vectors * self.eigenvalues
        for group in self.groups:
            # A product for each block: einsum sums in an order that depends on how many blocks there are.
            coefficients = (group.basis.swapaxes(1, 2) @ vectors[..., group.rows][..., None])[..., 0]
            coefficients *= self.eigenvalues[group.rows]
            result[..., group.rows] = (group.basis @ coefficients[..., None])[..., 0]
        return result

    @cached_property
    def present(self) -> BoolArray:
        """(m,) the eigenvalues that are not 0: those above 1e-14."""
        return self.eigenvalues > SMALLEST_EIGENVALUE

    @cached_property
    def scales(self) -> FloatArray:
        """(m,) ``√d``, 0 where an eigenvalue is no more than rounding."""
        return np.where(self.present, np.sqrt(self.eigenvalues), 0.0)

    def turned(self, columns: FloatArray) -> FloatArray:
        """``T w``, ``T = √d Uᵀ``, for the columns w of (m, c); rows of eigenvalues that are not ``present`` are 0."""
        result = columns * self.scales[:, None]
        for group in self.groups:
            turned = group.basis.swapaxes(1, 2) @ columns[group.rows]  # a product for each block, see `apply`
            turned *= self.scales[group.rows][:, :, None]
            result[group.rows] = turned
        return result

    def rotated(self, columns: FloatArray) -> FloatArray:
        """``Uᵀ w`` for the columns w of (m, c)."""
        result = columns.copy()
        for group in self.groups:
            result[group.rows] = group.basis.swapaxes(1, 2) @ columns[group.rows]  # a product for each block
        return result

    def rotated_back(self, vector: FloatArray) -> FloatArray:
        """``U c`` for c of shape (m,)."""
        result = vector.copy()
        for group in self.groups:
            result[group.rows] = (group.basis @ vector[group.rows][:, :, None])[:, :, 0]
        return result

    def turned_back(self, vector: FloatArray, *, absolute: bool = False) -> FloatArray:
        """``Tᵀu``, or ``|T|ᵀu`` with the absolute values of T's entries, for u of shape (m,)."""
        scaled = vector * self.scales
        result = scaled.copy()
        for group in self.groups:
            basis = np.abs(group.basis) if absolute else group.basis
            result[group.rows] = (basis @ scaled[group.rows][:, :, None])[:, :, 0]
        return result

    def factor(self) -> tuple[sp.csr_array, FloatArray]:
        """``(T, e)`` with ``D = T^T T`` and ``e = 1 - d``, for the r eigenvalues that are not 0.

        Returns:
            T: (r, m) the rows of ``diag(sqrt(d)) U^T`` with ``d > 1e-14``, in the order of d: ``T T^T`` is diagonal.
                A block with one eigenvalue only has the identity for its basis here.
            e: (r,) ``1 - d`` of these rows.
        """
        count, present = self.eigenvalues.size, self.present
        kept = np.flatnonzero(present)
        values = self.eigenvalues[kept]
        scales = np.sqrt(values)
        if not self.groups:
            pointers = np.arange(kept.size + 1, dtype=np.int32)
            return sp.csr_array((scales, kept.astype(np.int32), pointers), shape=(kept.size, count)), 1.0 - values

        # A block whose eigenvalues are all equal is a multiple of the identity: its rows need no basis.
        mixed: list[tuple[IntArray, FloatArray]] = []
        lengths = np.ones(count, dtype=np.int64)
        for group in self.groups:
            eigenvalues = self.eigenvalues[group.rows]
            chosen = np.flatnonzero(eigenvalues.min(axis=1) < eigenvalues.max(axis=1))
            rows = group.rows[chosen]
            lengths[rows] = rows.shape[1]
            mixed.append((rows, group.basis[chosen]))
        pointers = np.concatenate([[0], np.cumsum(lengths[kept])])
        starts = np.zeros(count, dtype=np.int64)
        starts[kept] = pointers[:-1]
        columns = np.empty(pointers[-1], dtype=np.int32)
        entries = np.empty(pointers[-1])
        columns[pointers[:-1]] = kept  # right for the rows without a basis; the others are written over
        entries[pointers[:-1]] = scales
        for rows, basis in mixed:
            block, vector = np.nonzero(present[rows])
            row = rows[block, vector]
            target = starts[row][:, None] + np.arange(rows.shape[1])
            columns[target] = rows[block]
            entries[target] = basis[block, :, vector] * np.sqrt(self.eigenvalues[row])[:, None]
        return sp.csr_array((entries, columns, pointers.astype(np.int32)), shape=(kept.size, count)), 1.0 - values


def project(cones: Cones, points: FloatArray, *, dual: bool = False) -> FloatArray:
    """The nearest points of K, or of the dual cone K*, in the Euclidean norm.

    The dual of the zero cone is the whole space; nonnegative, second-order and semidefinite cones are their own.
    A block of a point that holds nan or an infinity comes back as nan; other blocks are not affected.

    Args:
        cones: K.
        points: (..., m), rows as in :mod:`lpgd.cones.product`.
        dual: project onto K* instead, as ``v + P_K(-v)``.

    Returns:
        (..., m) float64.

    Raises:
        ValueError: the last dimension of ``points`` is not the number of rows of ``cones``.
    """
    points = _checked(cones, points)
    if dual:
        return points + project(cones, -points)
    projected = np.zeros(points.shape)
    if cones.nonnegative:
        nonnegative = cones.sections["nonnegative"]
        np.maximum(points[..., nonnegative], 0.0, out=projected[..., nonnegative])
    with np.errstate(over="ignore", invalid="ignore"):
        all_finite = bool(np.isfinite(points.sum()))
    if not all_finite and cones.zero:
        projected[..., cones.sections["zero"]][~np.isfinite(points[..., cones.sections["zero"]])] = np.nan
    for block in cone_blocks(cones):
        vectors = points[..., block.rows]
        if all_finite:
            projected[..., block.rows] = block.project(vectors)
            continue
        finite = np.isfinite(vectors).all(axis=-1, keepdims=True)
        nearest = block.project(np.where(finite, vectors, 0.0))
        projected[..., block.rows] = np.where(finite, nearest, np.nan)
    return projected


def projection_derivative(cones: Cones, point: FloatArray, *, dual: bool = False) -> SpectralDerivative:
    """The derivative of :func:`project` at a point; where there is none, the element described above.

    Args:
        cones: K.
        point: (m,) where to differentiate; or (k, m), k points of which the derivative is the block-diagonal one, with
            k m rows, of the projection onto the product of k copies of K.
        dual: differentiate the projection onto K* instead: ``I - D P_K(-v)``.

    Raises:
        ValueError: ``point`` is not one or several finite vectors with the number of rows of ``cones``.
    """
    point = _checked(cones, point)
    if point.ndim > 2:
        raise ValueError(f"point has shape {point.shape}; the derivative is taken at ({cones.rows},) or (k, ...).")
    if not np.isfinite(point).all():
        rows = np.unique(np.nonzero(~np.isfinite(point))[-1]).tolist()
        raise ValueError(f"point is not finite in rows {rows}; drop failed solves before differentiating.")
    points = np.atleast_2d(-point if dual else point)
    eigenvalues = np.zeros(points.shape)
    nonnegative = cones.sections["nonnegative"]
    eigenvalues[:, nonnegative] = points[:, nonnegative] > 0
    groups: list[BlockGroup] = []
    first = cones.rows * np.arange(len(points))[:, None, None]
    for block in cone_blocks(cones):
        count, size = block.rows.shape
        values, basis = block.spectrum(points[:, block.rows].reshape(-1, size))
        eigenvalues[:, block.rows] = values.reshape(-1, count, size)
        groups.append(BlockGroup((first + block.rows).reshape(-1, size), basis))
    np.clip(eigenvalues, 0.0, 1.0, out=eigenvalues)
    eigenvalues = eigenvalues.ravel()
    return SpectralDerivative(1.0 - eigenvalues if dual else eigenvalues, tuple(groups))


def distance(cones: Cones, points: FloatArray, *, dual: bool = False) -> FloatArray:
    """``max_i |v - P(v)|_i`` for each of the points (..., m): 0 in K (with ``dual``, in K*); shape (...)."""
    points = _checked(cones, points)
    return np.max(np.abs(points - project(cones, points, dual=dual)), axis=-1, initial=0.0)


def _checked(cones: Cones, vectors: FloatArray) -> FloatArray:
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim == 0 or vectors.shape[-1] != cones.rows:
        raise ValueError(
            f"an array of shape {vectors.shape} was given; its last dimension must be the {cones.rows} rows of {cones}."
        )
    return vectors
