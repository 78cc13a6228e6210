"""Batches of programs with a planted solution, as plain arrays.

    minimise ½xᵀPx + qᵀx   subject to   A x + s = b, s ∈ K, lower ≤ x ≤ upper

With a complementary pair (s, y) of every cone and multipliers z of the active bounds, ``b = A x + s`` and
``q = -P x - Aᵀy - z`` make (x, y, z) a solution, whatever x, A and P ⪰ 0 are.  No solver is involved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lpgd.cones.product import Cones
from tests.judge.cone_points import Block, Pair, draw_pair, rows_of

__all__ = ["Plan", "Programs", "cones_of", "plant"]

FloatArray = NDArray[np.float64]

ORDER = (
    "zero",
    "nonnegative",
    "second_order",
    "semidefinite",
    "exponential",
    "dual_exponential",
    "power",
    "dual_power",
)

FREE, LOWER, UPPER, FIXED, AT_LOWER, AT_UPPER = range(6)
"""What bounds a variable has: none, an inactive one, equal ones, or an active one."""


@dataclass(frozen=True)
class Plan:
    """What the programs of one batch have in common.

    Args:
        kind: ``lp``, ``qp`` or ``conic``.
        n: number of variables.
        blocks: the cones, in the order of :data:`ORDER`.
        bounds: for each variable what bounds it has.
        rank: of the random factor of P; 0 is a linear objective.
        strict: a multiple of the identity is added to P.
        density: the share of entries of A that are not zero.
        laplacian: P is that of a random connected graph.
        zero_block: the last variables that P does not see.
        matrix: (m, n) an A of all programs; None draws one for each.
        points: ``"normal"``, ``"simplex"`` (sum one, zero at active bounds) or ``"centre"`` (1/n).
        multiplier_scale, curvature_scale: sizes of (y, z) and of P beside that of x.
    """

    kind: str
    n: int
    blocks: tuple[Block, ...]
    bounds: tuple[int, ...]
    rank: int = 0
    strict: bool = False
    density: float = 1.0
    laplacian: bool = False
    zero_block: int = 0
    matrix: FloatArray | None = None
    points: str = "normal"
    multiplier_scale: float = 1.0
    curvature_scale: float = 1.0

    @property
    def cones(self) -> Cones:
        return cones_of(self.blocks)


@dataclass(frozen=True)
class Programs:
    """B programs of one plan, their solutions, and what the pairs do when they move.

    Attributes:
        plan: what they share.
        factor: (B, r, n) F with P = FᵀF.
        P, q, A, b: (B, n, n), (B, n), (B, m, n), (B, m).
        lower, upper: (B, n), infinite where there is none.
        x, y, z, s: the solution and its slack.
        normals, curvature: (B, r, m) and (B, m, m), see :mod:`tests.judge.cone_points`.
        active: (n,) the variables at a bound.
    """

    plan: Plan
    factor: FloatArray
    P: FloatArray
    q: FloatArray
    A: FloatArray
    b: FloatArray
    lower: FloatArray
    upper: FloatArray
    x: FloatArray
    y: FloatArray
    z: FloatArray
    s: FloatArray
    normals: FloatArray
    curvature: FloatArray

    @property
    def cones(self) -> Cones:
        return self.plan.cones

    @property
    def active(self) -> NDArray[np.bool_]:
        return np.isin(self.plan.bounds, (FIXED, AT_LOWER, AT_UPPER))

    @property
    def fixed(self) -> NDArray[np.bool_]:
        """(n,) variables whose bounds are equal."""
        return np.array(self.plan.bounds) == FIXED

    def __len__(self) -> int:
        return len(self.q)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Programs:
        """Some of the programs."""
        names = [name for name in self.__dataclass_fields__ if name != "plan"]
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def cones_of(blocks: Sequence[Block]) -> Cones:
    """The product of these cones, which stand in the order of :data:`ORDER`."""
    kinds = [block.kind for block in blocks]
    return Cones(
        zero=kinds.count("zero"),
        nonnegative=kinds.count("nonnegative"),
        second_order=tuple(block.size for block in blocks if block.kind == "second_order"),
        semidefinite=tuple(block.size for block in blocks if block.kind == "semidefinite"),
        exponential=kinds.count("exponential"),
        dual_exponential=kinds.count("dual_exponential"),
        power=tuple(
            block.exponent if block.kind == "power" else -block.exponent
            for block in blocks
            if block.kind in ("power", "dual_power")
        ),
    )


def plant(rng: np.random.Generator, plan: Plan, batch: int) -> Programs:
    """``batch`` random programs of a plan."""
    n, m = plan.n, plan.cones.rows
    pairs = [draw_pair(rng, block, batch) for block in plan.blocks]
    s, y, normals, curvature = _joined(pairs, batch, m)
    y, curvature = y * plan.multiplier_scale, curvature * plan.multiplier_scale
    if plan.matrix is None:
        A = rng.normal(size=(batch, m, n))
        if plan.density < 1.0:
            mask = rng.random((m, n)) < plan.density
            mask[np.arange(m), np.arange(m) % n] = True
            A = A * mask
    else:
        A = np.broadcast_to(plan.matrix, (batch, m, n)).copy()
    factor = _factor(rng, plan, batch) * np.sqrt(plan.curvature_scale)
    P = np.swapaxes(factor, 1, 2) @ factor
    bounds = np.array(plan.bounds)
    x = _points(rng, plan, bounds, batch)
    low, high, z = np.full((batch, n), -np.inf), np.full((batch, n), np.inf), np.zeros((batch, n))
    room, force = 0.4 + rng.random((batch, n)), (0.4 + rng.random((batch, n))) * plan.multiplier_scale
    if plan.points != "normal":
        room = np.where(np.isin(bounds, (LOWER,)), x, 1.0 - x)  # the bounds are 0 and 1
    for state, lower, upper, sign in (
        (LOWER, room, None, 0.0),
        (UPPER, None, room, 0.0),
        (AT_LOWER, 0.0, None, -1.0),
        (AT_UPPER, None, 0.0, 1.0),
        (FIXED, 0.0, 0.0, None),
    ):
        chosen = bounds == state
        if lower is not None:
            low[:, chosen] = (x - lower)[:, chosen]
        if upper is not None:
            high[:, chosen] = (x + upper)[:, chosen]
        signs = rng.choice([-1.0, 1.0], (batch, n)) if sign is None else sign
        z[:, chosen] = (signs * force)[:, chosen]
    b = (A @ x[:, :, None])[:, :, 0] + s
    q = -(P @ x[:, :, None])[:, :, 0] - (np.swapaxes(A, 1, 2) @ y[:, :, None])[:, :, 0] - z
    return Programs(plan, factor, P, q, A, b, low, high, x, y, z, s, normals, curvature)


def _joined(pairs: Sequence[Pair], batch: int, m: int) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """The pairs of all blocks as one: s, y, the normals below each other, the curvatures block diagonal."""
    s, y, curvature = np.zeros((batch, m)), np.zeros((batch, m)), np.zeros((batch, m, m))
    normals = np.zeros((batch, sum(pair.normals.shape[1] for pair in pairs), m))
    first = start = 0
    for pair in pairs:
        stop, last = start + pair.s.shape[1], first + pair.normals.shape[1]
        s[:, start:stop], y[:, start:stop] = pair.s, pair.y
        normals[:, first:last, start:stop] = pair.normals
        curvature[:, start:stop, start:stop] = pair.curvature
        first, start = last, stop
    return s, y, normals, curvature


def _factor(rng: np.random.Generator, plan: Plan, batch: int) -> FloatArray:
    n = plan.n
    if plan.laplacian:
        parents = [int(rng.integers(node)) for node in range(1, n)]  # a random tree, and more edges
        edges = [*enumerate(parents, start=1), *((int(a), int(b)) for a, b in rng.integers(n, size=(n, 2)) if a != b)]
        incidence = np.zeros((len(edges), n))
        for edge, (a, b) in enumerate(edges):
            incidence[edge, [a, b]] = 1.0, -1.0
        return np.sqrt(0.5 + rng.random((batch, len(edges), 1))) * incidence
    factor = rng.normal(size=(batch, plan.rank, n)) / np.sqrt(max(plan.rank, 1))
    if plan.zero_block:
        factor[:, :, n - plan.zero_block :] = 0.0
    if plan.strict:
        factor = np.concatenate([factor, np.broadcast_to(np.sqrt(0.3) * np.eye(n), (batch, n, n))], axis=1)
    return factor


def _points(rng: np.random.Generator, plan: Plan, bounds: NDArray[np.int64], batch: int) -> FloatArray:
    x = rng.normal(size=(batch, plan.n))
    if plan.points == "normal":
        return x
    if plan.points == "centre":
        return np.full_like(x, 1.0 / plan.n)
    if plan.points == "cube":
        return np.where(bounds == AT_LOWER, 0.0, np.where(bounds == AT_UPPER, 1.0, rng.uniform(0.15, 0.85, x.shape)))
    x = np.where(bounds == AT_LOWER, 0.0, 0.3 + rng.random(x.shape))
    return x / x.sum(axis=1, keepdims=True)


def row_starts(blocks: Sequence[Block]) -> list[int]:
    """The first row of each block."""
    return np.cumsum([0, *(rows_of(block) for block in blocks)])[:-1].tolist()
