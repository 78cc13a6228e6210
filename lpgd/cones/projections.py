"""Euclidean projections onto the product cone K and onto its dual, and their derivatives in spectral form.

Every projection onto a closed convex cone satisfies Moreau's decomposition ``v = P_K(v) - P_K*(-v)`` with
``<P_K(v), P_K*(-v)> = 0``, K* the dual cone.  Here it turns each projection into one onto the dual cone,
``P_K*(v) = v + P_K(-v)``, with the derivative ``I - D P_K(-v)``.

Where the projection is not differentiable an element of its generalised (Clarke) Jacobian is taken, the one
that ReLU has: an eigenvalue is 0 where the quantity that decides it is exactly 0.  So the derivative is 0 on
the whole polar cone (at ``v = 0`` on the nonnegative cone), and the identity in the interior of K only; for
the dual cone the formula above turns this around, and the derivative is the identity at 0.

Semidefinite cones: J. Malick, H. S. Sendov, *Clarke generalized Jacobian of the projection onto the cone of
positive semidefinite matrices* (2006).  The two cones that need iteration are in
:mod:`lpgd.cones.nonsymmetric`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray, IntArray
from lpgd.cones.nonsymmetric import exponential_spectrum, power_spectrum, project_exponential, project_power
from lpgd.cones.product import Cones, smat, svec, svec_indices, svec_size

__all__ = [
    "BlockGroup",
    "ConeBlock",
    "SpectralDerivative",
    "cone_blocks",
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
    nonnegative = cones.sections["nonnegative"]
    np.maximum(points[..., nonnegative], 0.0, out=projected[..., nonnegative])
    projected[..., cones.sections["zero"]][~np.isfinite(points[..., cones.sections["zero"]])] = np.nan
    for block in cone_blocks(cones):
        vectors = points[..., block.rows]
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


@dataclass(frozen=True, eq=False)
class ConeBlock:
    """All cones of one kind and size: their rows (k, t), and what else the kind needs.

    ``polar`` marks duals of the kind: ``P_K*(v) = v + P_K(-v)``.
    """

    kind: str
    rows: IntArray
    side: int = 0
    exponents: FloatArray | None = None
    polar: bool = False

    def project(self, points: FloatArray) -> FloatArray:
        """(..., k, t) to the same shape."""
        if self.polar:
            return points + self._project(-points)
        return self._project(points)

    def spectrum(self, points: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Eigenvalues (j k, t) and basis (j k, t, t) at points (j k, t), j for each cone, all cones in turn."""
        if self.polar:
            eigenvalues, basis = self._spectrum(-points)
            return 1.0 - eigenvalues, basis
        return self._spectrum(points)

    @property
    def interior(self) -> FloatArray:
        """(t,) a point inside the cone and its dual."""
        if self.kind == "second_order":
            return np.eye(self.side)[0]
        if self.kind == "semidefinite":
            return svec(np.eye(self.side))
        return np.array([-1.0, 1.0, 1.0] if self.exponents is None else [1.0, 1.0, 0.0])

    def _project(self, points: FloatArray) -> FloatArray:
        if self.kind == "second_order":
            return _project_second_order(points)
        if self.kind == "semidefinite":
            return _project_semidefinite(points, self.side)
        flat = points.reshape(-1, 3)
        if self.exponents is None:
            return project_exponential(flat).reshape(points.shape)
        exponents = np.broadcast_to(self.exponents, points.shape[:-1]).reshape(-1)
        return project_power(flat, exponents).reshape(points.shape)

    def _spectrum(self, points: FloatArray) -> tuple[FloatArray, FloatArray]:
        if self.kind == "second_order":
            return _second_order_spectrum(points)
        if self.kind == "semidefinite":
            return _semidefinite_spectrum(points, self.side)
        if self.exponents is None:
            return exponential_spectrum(points)
        return power_spectrum(points, np.tile(self.exponents, len(points) // len(self.exponents)))


@lru_cache(maxsize=256)
def cone_blocks(cones: Cones) -> tuple[ConeBlock, ...]:
    """The cones that are not orthants, gathered by kind and size."""
    blocks: list[ConeBlock] = []
    for kind, sizes in (("second_order", cones.second_order), ("semidefinite", cones.semidefinite)):
        starts: defaultdict[int, list[int]] = defaultdict(list)
        start = cones.sections[kind].start
        for size in sizes:
            starts[size].append(start)
            start += size if kind == "second_order" else svec_size(size)
        for size, firsts in starts.items():
            length = size if kind == "second_order" else svec_size(size)
            blocks.append(ConeBlock(kind, np.array(firsts, dtype=np.int64)[:, None] + np.arange(length), side=size))
    for kind in ("exponential", "dual_exponential"):
        rows = np.arange(cones.sections[kind].start, cones.sections[kind].stop, dtype=np.int64).reshape(-1, 3)
        if rows.size:
            blocks.append(ConeBlock("exponential", rows, polar=kind == "dual_exponential"))
    rows = np.arange(cones.sections["power"].start, cones.sections["power"].stop, dtype=np.int64).reshape(-1, 3)
    exponents = np.array(cones.power)
    for polar in (False, True):
        chosen = (exponents < 0) == polar
        if chosen.any():
            blocks.append(ConeBlock("power", rows[chosen], exponents=np.abs(exponents[chosen]), polar=polar))
    return tuple(blocks)


def _project_second_order(points: FloatArray) -> FloatArray:
    """Points (..., d), the bound t first."""
    bound, vector = points[..., :1], points[..., 1:]
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    share = np.clip(0.5 * (1.0 + bound / np.where(length > 0, length, 1.0)), 0.0, 1.0)
    nearest = np.concatenate([share * length, share * vector], axis=-1)
    return np.where(bound >= length, points, np.where(bound <= -length, 0.0, nearest))


def _second_order_spectrum(points: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Outside K and its polar cone: 1 along ``(1, u/|u|)``, 0 along ``(1, -u/|u|)``, else ``(1 + t/|u|) / 2``."""
    count, size = points.shape
    bound, vector = points[:, 0], points[:, 1:]
    length = np.linalg.norm(vector, axis=-1)
    interior, polar = bound > length, bound <= -length
    eigenvalues = np.where(interior[:, None], 1.0, np.zeros((1, size)))
    basis = np.zeros((count, size, size))
    outside = np.flatnonzero(~(interior | polar))  # there |u| > 0, so size > 1
    if outside.size < count:
        basis[interior | polar] = np.eye(size)
    if outside.size:
        eigenvalues[outside, 0] = 1.0
        eigenvalues[outside, 2:] = 0.5 * (1.0 + bound[outside] / length[outside])[:, None]
        direction = vector[outside] / length[outside][:, None]
        # A Householder reflection that exchanges the direction and the first axis: its other columns span the rest.
        mirror = direction.copy()
        mirror[:, 0] += np.copysign(1.0, mirror[:, 0])
        mirror *= np.sqrt(2.0) / np.linalg.norm(mirror, axis=-1, keepdims=True)
        rotated = basis if outside.size == count else np.zeros((outside.size, size, size))  # new memory takes long
        rotated[:, 0, :2] = np.sqrt(0.5)
        rotated[:, 1:, 0] = np.sqrt(0.5) * direction
        rotated[:, 1:, 1] = -np.sqrt(0.5) * direction
        np.multiply(mirror[:, :, None], -mirror[:, None, 1:], out=rotated[:, 1:, 2:])
        rotated.reshape(outside.size, -1)[:, 2 * (size + 1) :: size + 1] += 1.0
        if rotated is not basis:
            basis[outside] = rotated
    return eigenvalues, basis


def _project_semidefinite(points: FloatArray, side: int) -> FloatArray:
    """Points (..., k (k + 1) / 2): eigenvalues below 0 become 0."""
    eigenvalues, vectors = np.linalg.eigh(smat(points, side))
    nearest = (vectors * np.maximum(eigenvalues, 0.0)[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return np.where(eigenvalues[..., :1] >= 0.0, points, svec(nearest))


def _semidefinite_spectrum(points: FloatArray, side: int) -> tuple[FloatArray, FloatArray]:
    """``l_i / (l_i - l_j)`` if ``l_i > 0 >= l_j``, 1 if both are positive, 0 if neither is.

    l are the eigenvalues of the matrix, q its eigenvectors; the basis is ``svec(q_i q_j^T + q_j q_i^T)``, normalised.
    """
    values, vectors = np.linalg.eigh(smat(points, side))
    rows, columns = svec_indices(side)
    larger = np.maximum(values[:, rows], values[:, columns])
    smaller = np.minimum(values[:, rows], values[:, columns])
    positive, negative = np.maximum(larger, 0.0), np.maximum(-smaller, 0.0)
    eigenvalues = np.where(larger > 0, positive / np.where(larger > 0, positive + negative, 1.0), 0.0)
    weights = np.where(rows == columns, 1.0, np.sqrt(2.0))
    # `take` keeps the order in memory; products of matrices round by it, and with an index it depends on the batch.
    left, right = vectors.take(rows, axis=2), vectors.take(columns, axis=2)
    products = left.take(rows, axis=1) * right.take(columns, axis=1)
    products += left.take(columns, axis=1) * right.take(rows, axis=1)
    basis = 0.5 * weights[:, None] * weights * products
    uniform = (values[:, 0] > 0) | (values[:, -1] <= 0)
    basis[uniform] = np.eye(rows.size)
    return eigenvalues, basis
