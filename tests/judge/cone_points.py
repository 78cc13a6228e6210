"""Complementary pairs on every cone, with what a small change of one does to the other, in closed form.

Nothing here uses the library's projections.  A cone is either the set ``g(s) <= 0`` of one smooth function near a point
of its boundary, or, for semidefinite matrices, given by the eigenvectors of a point.  At a pair ``(s, y)``, s in K,
y in K*, ``<s, y> = 0``, strictly complementary, a change of the slack keeps to the cone's boundary and turns y:

    N ds = 0,    dy = Nᵀ dλ - C ds,

with N the active normals and C positive semidefinite: for ``y = -λ ∇g(s)``, ``N = -∇gᵀ`` and ``C = λ ∇²g``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["STATES", "Block", "Pair", "draw_pair", "rows_of"]

FloatArray = NDArray[np.float64]

STATES = ("inside", "edge", "apex")
"""Where the slack is: in the interior (y = 0), on the boundary as y is, or at zero (y in the interior of K*)."""


@dataclass(frozen=True)
class Block:
    """One cone of a product: its kind (the fields of ``Cones``), what its kind needs, and the state of its slack.

    Args:
        kind: ``zero``, ``nonnegative``, ``second_order``, ``semidefinite``, ``exponential``, ``dual_exponential``,
            ``power`` or ``dual_power``.
        state: one of :data:`STATES`.
        size: dimension of a second-order cone, side of a semidefinite one.
        rank: of a semidefinite slack on an edge.
        exponent: of a power cone, in (0, 1); also of the cone whose dual this is.
    """

    kind: str
    state: str
    size: int = 1
    rank: int = 1
    exponent: float = 0.5

    @property
    def active(self) -> int:
        """How many equations the active normals are."""
        if self.state == "inside":
            return 0
        if self.state == "apex":
            return rows_of(self)
        side = self.size - self.rank
        return side * (side + 1) // 2 if self.kind == "semidefinite" else 1


@dataclass(frozen=True)
class Pair:
    """Pairs of a batch: s, y (B, d), normals N (B, r, d) and curvature C (B, d, d)."""

    s: FloatArray
    y: FloatArray
    normals: FloatArray
    curvature: FloatArray


def rows_of(block: Block) -> int:
    """The number of rows d that a cone takes."""
    if block.kind in ("zero", "nonnegative"):
        return 1
    if block.kind == "second_order":
        return block.size
    return block.size * (block.size + 1) // 2 if block.kind == "semidefinite" else 3


def draw_pair(rng: np.random.Generator, block: Block, batch: int) -> Pair:
    """Random strictly complementary pairs of one block, with entries of order one.

    Args:
        rng: the source.
        block: the cone and the state of its slack.
        batch: number of pairs B.
    """
    size = rows_of(block)
    if block.kind == "zero":
        return Pair(np.zeros((batch, 1)), _signed(rng, batch), np.ones((batch, 1, 1)), np.zeros((batch, 1, 1)))
    if block.kind == "semidefinite":
        return _semidefinite(rng, block, batch)
    if block.kind == "nonnegative" or size == 1:
        s, y = _positive(rng, batch, 1), _positive(rng, batch, 1)
        normals = curvature = np.zeros((batch, 1, 1))
    elif block.kind == "second_order":
        s, y, normals, curvature = _second_order(rng, size, batch)
    elif block.kind in ("exponential", "dual_exponential"):
        s, y, normals, curvature = _exponential(rng, batch, block.kind == "dual_exponential")
    else:
        s, y, normals, curvature = _power(rng, batch, block.exponent, block.kind == "dual_power")
    if block.state == "edge":
        return Pair(s, y, normals, curvature)
    none = np.zeros((batch, size, size))
    if block.state == "inside":
        return Pair(_inward(block.kind, s), np.zeros_like(y), none[:, :0], none)
    return Pair(np.zeros_like(s), _inward(block.kind, y), np.broadcast_to(np.eye(size), none.shape), none)


def svec_of(matrices: FloatArray) -> FloatArray:
    """``svec``: the lower triangle column by column, off-diagonal entries times √2; (..., k, k) to (..., d)."""
    side = matrices.shape[-1]
    places = [(row, column) for column in range(side) for row in range(column, side)]
    parts = [matrices[..., i, j] * (1.0 if i == j else np.sqrt(2.0)) for i, j in places]
    return np.stack(parts, axis=-1)


def _positive(rng: np.random.Generator, *shape: int) -> FloatArray:
    return 0.4 + rng.random(shape)


def _signed(rng: np.random.Generator, batch: int) -> FloatArray:
    return _positive(rng, batch, 1) * rng.choice([-1.0, 1.0], (batch, 1))


def _inward(kind: str, points: FloatArray) -> FloatArray:
    """Points of the boundary of a cone, moved to its interior."""
    moved = points.copy()
    if kind == "second_order":
        moved[:, 1:] *= 0.5
    elif kind in ("exponential", "dual_exponential"):
        moved[:, 2] += 0.5 * (1.0 + np.abs(moved[:, 2]))
    elif kind in ("power", "dual_power"):
        moved[:, 2] *= 0.4
    return moved


def _second_order(rng: np.random.Generator, size: int, batch: int) -> tuple[FloatArray, ...]:
    """``g = |u| - t``: s along (1, u), y along (1, -u)."""
    direction = rng.normal(size=(batch, size - 1))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    length, force = _positive(rng, batch, 1), _positive(rng, batch, 1)
    one = np.ones((batch, 1))
    normal = np.concatenate([one, -direction], axis=-1)
    curvature = np.zeros((batch, size, size))
    turn = np.eye(size - 1) - direction[:, :, None] * direction[:, None, :]
    curvature[:, 1:, 1:] = (force / length)[:, :, None] * turn
    return length * np.concatenate([one, direction], axis=-1), force * normal, normal[:, None, :], curvature


def _exponential(rng: np.random.Generator, batch: int, dual: bool) -> tuple[FloatArray, ...]:
    """``g = v exp(u / v) - w``; of the dual cone ``g = -u exp(v / u - 1) - w``."""
    ratio, length, force = rng.uniform(-1.2, 1.2, batch), 0.4 + rng.random(batch), 0.4 + rng.random(batch)
    zero, one = np.zeros(batch), np.ones(batch)
    if dual:
        factor = np.exp(ratio - 1.0)
        s = length[:, None] * np.stack([-one, -ratio, factor], axis=-1)
        slope = np.stack([factor * (ratio - 1.0), -factor, -one], axis=-1)
        bend = np.stack([ratio, -one, zero], axis=-1)
    else:
        factor = np.exp(ratio)
        s = length[:, None] * np.stack([ratio, one, factor], axis=-1)
        slope = np.stack([factor, (1.0 - ratio) * factor, -one], axis=-1)
        bend = np.stack([one, -ratio, zero], axis=-1)
    curvature = (force * factor / length)[:, None, None] * bend[:, :, None] * bend[:, None, :]
    return s, -force[:, None] * slope, -slope[:, None, :], curvature


def _power(rng: np.random.Generator, batch: int, exponent: float, dual: bool) -> tuple[FloatArray, ...]:
    """``g = |w| - p``, ``p = u^a v^(1 - a)``; of the dual cone ``p = (u / a)^a (v / (1 - a))^(1 - a)``."""
    a, u, v = exponent, 0.4 + rng.random(batch), 0.4 + rng.random(batch)
    sign, force = rng.choice([-1.0, 1.0], batch), 0.4 + rng.random(batch)
    p = (u / a) ** a * (v / (1 - a)) ** (1 - a) if dual else u**a * v ** (1 - a)
    slope = np.stack([-a * p / u, -(1 - a) * p / v, sign], axis=-1)
    bend = np.stack([1 / u, -1 / v, np.zeros(batch)], axis=-1)
    curvature = (force * a * (1 - a) * p)[:, None, None] * bend[:, :, None] * bend[:, None, :]
    return np.stack([u, v, sign * p], axis=-1), -force[:, None] * slope, -slope[:, None, :], curvature


def _semidefinite(rng: np.random.Generator, block: Block, batch: int) -> Pair:
    """``S = Q₁ΛQ₁ᵀ``, ``Y = Q₂MQ₂ᵀ``: ``Q₂ᵀ dS Q₂ = 0``, and ``dY`` between both is ``-Λ⁻¹ dS M``."""
    side = block.size
    rank = {"inside": side, "edge": block.rank, "apex": 0}[block.state]
    frames, _ = np.linalg.qr(rng.normal(size=(batch, side, side)))
    weights = _positive(rng, batch, side)
    inner, outer = frames[:, :, :rank], frames[:, :, rank:]
    s = svec_of((inner * weights[:, None, :rank]) @ np.swapaxes(inner, 1, 2)) if rank else None
    y = svec_of((outer * weights[:, None, rank:]) @ np.swapaxes(outer, 1, 2)) if rank < side else None
    size = rows_of(block)

    def direction(i: int, j: int) -> FloatArray:
        product = frames[:, :, i, None] * frames[:, None, :, j]
        return svec_of((product + np.swapaxes(product, 1, 2)) * (0.5 if i == j else np.sqrt(0.5)))

    normals = [direction(i, j) for i in range(rank, side) for j in range(i, side)]
    curvature = np.zeros((batch, size, size))
    for i in range(rank):
        for j in range(rank, side):
            bend = direction(i, j)
            curvature += (weights[:, j] / weights[:, i])[:, None, None] * bend[:, :, None] * bend[:, None, :]
    nothing = np.zeros((batch, size))
    stacked = np.stack(normals, axis=1) if normals else np.zeros((batch, 0, size))
    return Pair(nothing if s is None else s, nothing if y is None else y, stacked, curvature)
