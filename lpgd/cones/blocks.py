"""The cones of a product that are not orthants, gathered by kind and size: their projections, in spectral form.

Semidefinite cones: J. Malick, H. S. Sendov, *Clarke generalized Jacobian of the projection onto the cone of
positive semidefinite matrices* (2006).  The two cones that need iteration are in
:mod:`lpgd.cones.nonsymmetric`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lpgd.arrays import FloatArray, IntArray
from lpgd.cones.nonsymmetric import exponential_spectrum, power_spectrum, project_exponential, project_power
from lpgd.cones.product import Cones, smat, svec, svec_indices, svec_size

__all__ = ["ConeBlock", "cone_blocks"]


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
    length = np.sqrt((vector * vector).sum(-1, keepdims=True))
    share = np.maximum(0.5 * (1.0 + bound / np.where(length > 0, length, 1.0)), 0.0)  # 0 on the polar cone
    nearest = share * points
    nearest[..., :1] = share * length
    return np.where(bound >= length, points, nearest)


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
