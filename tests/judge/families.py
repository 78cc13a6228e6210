"""The families of programs that are judged: a seeded chunk of programs, their statement, and what must come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lpgd.status import Status
from tests.judge.cone_points import Block, rows_of
from tests.judge.programs import (
    AT_LOWER,
    AT_UPPER,
    FIXED,
    FREE,
    LOWER,
    ORDER,
    UPPER,
    Plan,
    Programs,
    plant,
)
from tests.judge.references import Reference
from tests.judge.restatements import SCALINGS, Statement, plain, redundant, scaled

__all__ = ["CHUNK", "FAMILIES", "Trial", "draw_trial"]

CHUNK = 25
"""Programs of one plan, which are solved as one batch."""

WELL_CONDITIONED = 1e5
"""Gradients are asked for where the system of the irredundant program is no worse than this."""


@dataclass(frozen=True)
class Trial:
    """A chunk of programs as they are put to the layers.

    Attributes:
        family, seed, chunk: where it comes from; its programs are those from ``chunk * CHUNK`` on.
        programs: B programs.
        statement: how they are stated.
        verdict: the status that every solver must end with.
        must_answer: whether an end without an answer is a fault, too.
        with_gradients: whether gradients are judged.
        places: (B,) of the programs in their chunk, where they are not all of it.
        size: of the chunk.
        spoilt: elements whose data were spoilt after they were drawn, and with what statuses they may end.
        on_pattern: matrices that are handed over as sparse ones, which have a gradient where they have entries.
        shared: data that are the same in all elements, of which only the sum of their gradients is judged.
    """

    family: str
    seed: int
    chunk: int
    programs: Programs
    statement: Statement
    verdict: Status = Status.SOLVED
    must_answer: bool = False
    with_gradients: bool = True
    places: NDArray[np.int64] = field(default_factory=lambda: np.arange(CHUNK))
    size: int = CHUNK
    spoilt: Mapping[int, frozenset[Status]] = field(default_factory=dict)
    shared: frozenset[str] = frozenset()
    on_pattern: frozenset[str] = frozenset()

    @cached_property
    def reference(self) -> Reference:
        return Reference(self.programs)

    @property
    def differentiable(self) -> NDArray[np.bool_]:
        """(B,) programs whose gradients are judged."""
        return (self.reference.condition < WELL_CONDITIONED) & self.with_gradients

    @property
    def singular(self) -> NDArray[np.bool_]:
        """(B,) programs whose solution is not unique, or has no derivative: a gradient needs a word."""
        return ~self.reference.is_regular & self.with_gradients

    @property
    def is_differentiated(self) -> bool:
        """Whether the gradient of any program is judged."""
        return bool((self.differentiable | self.singular).any())

    def select(self, rows: NDArray[np.int64]) -> Trial:
        return replace(
            self,
            programs=self.programs.select(rows),
            statement=self.statement.select(rows),
            places=self.places[rows],
            spoilt={place: self.spoilt[row] for place, row in enumerate(rows.tolist()) if row in self.spoilt},
        )

    def __str__(self) -> str:
        notes = f" ({', '.join(self.statement.notes)})" if self.statement.notes else ""
        return f"{self.programs.plan.kind}, {self.statement.cones}{notes}"


def _draw_blocks(rng: np.random.Generator, n: int, budget: int) -> list[Block]:
    """Random curved cones whose active normals are at most ``budget``."""
    blocks: list[Block] = []
    for _ in range(int(rng.integers(1, 4))):
        kind = str(rng.choice(ORDER[2:]))
        state = str(rng.choice(["edge", "edge", "edge", "inside", "apex"]))
        size, rank = int(rng.integers(2, 5)), 1
        if kind == "semidefinite":
            size = int(rng.integers(2, 4))
            rank = int(rng.integers(1, size))
        block = Block(kind, state, size, rank, float(rng.choice([0.3, 0.5, 0.7])))
        if block.active <= budget and rows_of(block) <= 2 * n:
            budget -= block.active
            blocks.append(block)
    return blocks or [Block("second_order", "edge", 3)]


def _draw_plan(rng: np.random.Generator, kind: str, with_fixed: bool = True) -> Plan:
    """A random plan whose programs have unique solutions that move smoothly (but for an unlucky draw)."""
    n = int(rng.integers(3, 8)) if kind != "conic" else int(rng.integers(4, 8))
    budget = n if kind == "lp" else n - 1
    curved = _draw_blocks(rng, n, budget) if kind == "conic" else []
    budget -= sum(block.active for block in curved)
    zero = int(rng.integers(0, min(budget, 3) + 1))
    budget -= zero
    at_rows = int(rng.integers(0, budget + 1))
    budget -= at_rows
    at_bounds = budget if kind == "lp" else int(rng.integers(0, budget + 1))
    idle = int(rng.integers(1, 4)) if kind != "conic" else int(rng.integers(0, 2))
    states = [AT_LOWER, AT_UPPER, FIXED] if with_fixed else [AT_LOWER, AT_UPPER]
    bounds = [int(rng.choice(states, p=[0.4, 0.4, 0.2] if with_fixed else None)) for _ in range(at_bounds)]
    bounds += [int(rng.choice([FREE, FREE, LOWER, UPPER])) for _ in range(n - at_bounds)]
    rng.shuffle(bounds)
    blocks = [Block("zero", "apex")] * zero + [Block("nonnegative", "apex")] * at_rows
    blocks += [Block("nonnegative", "inside")] * idle + curved
    place = {name: position for position, name in enumerate(ORDER)} | {"dual_power": ORDER.index("power")}
    blocks.sort(key=lambda block: place[block.kind])
    rank = {"lp": 0, "qp": int(rng.integers(max(1, n - 2), n + 1)), "conic": n if rng.random() < 0.8 else n - 1}[kind]
    strict = kind != "lp" and rng.random() < 0.5
    return Plan(kind, n, tuple(blocks), tuple(bounds), rank, strict, float(rng.choice([1.0, 1.0, 0.6])))


def _regular(rng: np.random.Generator, plan: Plan, count: int) -> Programs:
    """Programs whose optimality conditions are well conditioned, where the plan allows it."""
    drawn = plant(rng, plan, 4 * count)
    condition = Reference(drawn).condition
    good = np.flatnonzero(condition < 0.1 * WELL_CONDITIONED)[:count]
    if good.size < count:
        good = np.argsort(condition, kind="stable")[:count]
    return drawn.select(good)


def _regular_plan(
    rng: np.random.Generator, kinds: tuple[str, ...], scale: Callable[[Plan], Plan], size: int
) -> Programs:
    """Drawn until the plan has well-conditioned programs."""
    kind = str(rng.choice(kinds))
    while True:
        programs = _regular(rng, scale(_draw_plan(rng, kind)), size)
        if (Reference(programs).condition < WELL_CONDITIONED).all():
            return programs


def _redundant(rng: np.random.Generator, place: tuple[str, int, int], size: int) -> Trial:
    programs = _regular_plan(rng, ("lp", "qp", "conic", "conic"), lambda plan: plan, size)
    return Trial(*place, programs, redundant(rng, programs))


def _scales(rng: np.random.Generator, place: tuple[str, int, int], size: int) -> Trial:
    which = str(rng.choice([*SCALINGS, "planted"]))

    def scale(plan: Plan) -> Plan:
        if which != "planted" or plan.kind == "conic":
            return plan
        # Multipliers and curvature of other sizes than x: no change of units makes these equal.
        return replace(plan, multiplier_scale=10.0 ** rng.integers(-3, 4), curvature_scale=10.0 ** rng.integers(-3, 4))

    programs = _regular_plan(rng, ("lp", "qp", "qp", "conic"), scale, size)
    if which == "planted":
        return Trial(*place, programs, replace(scaled(rng, programs, "several"), notes=("planted",)))
    return Trial(*place, programs, scaled(rng, programs, which))


def _strict(rng: np.random.Generator, place: tuple[str, int, int], size: int) -> Trial:
    if rng.random() < 0.3:
        n = 8
        bounds = tuple(int(rng.choice([AT_LOWER, LOWER])) for _ in range(n))
        plan = Plan("qp", n, (Block("zero", "apex"),) * 2, bounds, n, True)
    else:
        plan = replace(_draw_plan(rng, "qp"), strict=True)
    programs = plant(rng, plan, size)
    absent = float(rng.choice([np.inf, np.inf, 1e20, 1e30]))
    return Trial(*place, programs, replace(plain(programs), absent=absent), must_answer=True)


def _compact(rng: np.random.Generator, place: tuple[str, int, int], size: int) -> Trial:
    """A singular P over a simplex, a box or a ball."""
    n = int(rng.integers(3, 31)) if rng.random() < 0.3 else int(rng.integers(3, 9))
    form = str(rng.choice(["laplacian", "gram", "zero block"]))
    shape = str(rng.choice(["simplex", "simplex", "box", "ball"]))
    rank = n if form == "zero block" else int(rng.integers(1, n))
    plan = Plan("qp", n, (), (FREE,) * n, rank, laplacian=form == "laplacian")
    plan = replace(plan, zero_block=int(rng.integers(1, n)) if form == "zero block" else 0)
    if shape == "ball":
        matrix = np.concatenate([np.zeros((1, n)), -np.eye(n)])
        state = str(rng.choice(["edge", "inside"]))
        plan = replace(plan, kind="conic", blocks=(Block("second_order", state, n + 1),), matrix=matrix)
    elif shape == "box":
        bounds = tuple(int(rng.choice([AT_LOWER, AT_UPPER, LOWER])) for _ in range(n))
        plan = replace(plan, bounds=bounds, points="cube")
    else:
        bounds = [int(rng.choice([AT_LOWER, LOWER])) for _ in range(n)]
        bounds[int(rng.integers(n))] = LOWER
        plan = replace(plan, blocks=(Block("zero", "apex"),), matrix=np.ones((1, n)), bounds=tuple(bounds))
        plan = replace(plan, points="simplex")
        if form == "laplacian" and rng.random() < 0.4:  # without a linear cost the middle is the solution
            plan = replace(plan, points="centre", bounds=(LOWER,) * n, multiplier_scale=0.0)
    programs = plant(rng, plan, size)
    if shape == "box":
        programs = replace(programs, lower=np.zeros_like(programs.x), upper=np.ones_like(programs.x))
    programs = replace(programs, q=np.where(np.abs(programs.q) < 1e-15, 0.0, programs.q))
    return Trial(*place, programs, plain(programs), must_answer=True)


def _certificates(rng: np.random.Generator, place: tuple[str, int, int], size: int) -> Trial:
    """Infeasible programs with a Farkas vector, unbounded ones with a descending ray, and some that are not convex."""
    kind = str(rng.choice(["lp", "qp", "conic"]))
    plan = replace(_draw_plan(rng, kind, with_fixed=False), density=1.0)
    draw = rng.random()
    if draw < 0.45 and plan.cones.rows:
        programs = _infeasible(rng, plant(rng, plan, size))
        verdict = Status.INFEASIBLE
    elif draw < 0.9 or not plan.rank:
        bounds = tuple(int(rng.choice([FREE, FREE, LOWER])) for _ in range(plan.n))
        programs = _unbounded(rng, replace(plan, bounds=bounds, strict=False), size)
        verdict = Status.UNBOUNDED
    else:
        programs = _not_convex(rng, plant(rng, plan, size))
        return Trial(*place, programs, plain(programs), Status.NOT_CONVEX, with_gradients=False)
    statement = scaled(rng, programs, str(rng.choice(SCALINGS))) if rng.random() < 0.5 else plain(programs)
    return Trial(*place, programs, statement, verdict, with_gradients=False)


def _infeasible(rng: np.random.Generator, programs: Programs) -> Programs:
    """``y ∈ K*`` and z with ``Aᵀy + z = 0`` and ``bᵀy + upperᵀz₊ - lowerᵀz₋ = -1``.

    y and z are drawn; A and b then change by one rank along y.
    """
    blocks = tuple(replace(block, state="apex") for block in programs.plan.blocks)
    plan = replace(programs.plan, blocks=blocks)
    y = plant(rng, plan, len(programs)).y
    sign = np.where(np.isfinite(programs.upper), 1.0, np.where(np.isfinite(programs.lower), -1.0, 0.0))
    z = sign * rng.random(sign.shape) * (rng.random(plan.n) < 0.5)
    size = (y * y).sum(axis=1)[:, None]
    left = np.einsum("bm,bmn->bn", y, programs.A) + z
    A = _without_noise(programs.A - y[:, :, None] * left[:, None, :] / size[:, :, None])
    bound = np.where(z > 0, programs.upper, np.where(z < 0, programs.lower, 0.0))
    value = np.einsum("bm,bm->b", programs.b, y) + (bound * z).sum(axis=1)
    # The dual stays feasible, so that no ray may be claimed.
    q = -np.einsum("bij,bj->bi", programs.P, programs.x) - np.einsum("bmn,bm->bn", A, programs.y) - programs.z
    b = programs.b - (1.0 + value)[:, None] / size * y
    return replace(programs, plan=plan, A=A, q=q, b=b, y=y, z=z)


def _without_noise(A: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entries that are zero but for rounding: with one of 1e-16, x = 1e16 satisfies what nothing should."""
    return np.where(np.abs(A) > 1e-13, A, 0.0)


def _unbounded(rng: np.random.Generator, plan: Plan, size: int) -> Programs:
    """A ray d with ``P d = 0``, ``-A d ∈ K``, ``qᵀd = -1`` and d ≥ 0 at lower bounds; a feasible point is known."""
    programs = plant(rng, plan, size)
    ray = rng.normal(size=programs.q.shape)
    ray = np.where(np.array(plan.bounds) == LOWER, np.abs(ray), ray)
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    inside = tuple(replace(block, state="inside" if block.kind != "zero" else "apex") for block in plan.blocks)
    target = plant(rng, replace(plan, blocks=inside), size).s
    left = np.einsum("bmn,bn->bm", programs.A, ray) + target
    A = _without_noise(programs.A - left[:, :, None] * ray[:, None, :])
    factor = programs.factor - np.einsum("brn,bn->br", programs.factor, ray)[:, :, None] * ray[:, None, :]
    P = np.swapaxes(factor, 1, 2) @ factor
    b = np.einsum("bmn,bn->bm", A, programs.x) + programs.s
    q = programs.q - (1.0 + np.einsum("bn,bn->b", programs.q, ray))[:, None] * ray
    return replace(programs, plan=plan, A=A, factor=factor, P=P, b=b, q=q, x=ray)


def _not_convex(rng: np.random.Generator, programs: Programs) -> Programs:
    """P with one eigenvalue below zero, between a twentieth of its size and all of it."""
    direction = rng.normal(size=programs.q.shape)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    along = np.einsum("bi,bij,bj->b", direction, programs.P, direction)
    depth = along + rng.uniform(0.05, 1.0, along.shape) * np.abs(programs.P).max(axis=(1, 2))
    return replace(programs, P=programs.P - depth[:, None, None] * direction[:, :, None] * direction[:, None, :])


FAMILIES: dict[str, Callable[[np.random.Generator, tuple[str, int, int], int], Trial]] = {
    "redundant": _redundant,
    "compact": _compact,
    "strict": _strict,
    "scales": _scales,
    "certificates": _certificates,
}


def draw_trial(family: str, seed: int, chunk: int, size: int = CHUNK) -> Trial:
    """One chunk of a family, of so many programs: the same for the same arguments, whatever was drawn before.

    Raises:
        KeyError: there is no such family.
    """
    rng = np.random.default_rng([seed, chunk, *family.encode()])
    trial = FAMILIES[family](rng, (family, seed, chunk), size)
    return replace(trial, places=np.arange(size), size=size)
