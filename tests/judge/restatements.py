"""Other statements of the same programs: more rows than needed, other units; and how their data follow from the data.

A statement has rows ``T [A; I; -I] x + s' = T [b; upper; -lower] + t``, s' ∈ K', and then variables, rows, objective
and (q, b) together in units of their own:

    x = D x' / c,   P' = σ D P D,   q' = σ c D q,   A' = R T [A; I; -I] D,   b' = c R (T [b; upper; -lower] + t),

with bounds ``c lower / D`` and ``c upper / D``.  Whatever T is, Tᵀ maps the multipliers of the statement to those of
the programs times σ c (R counted into T), and the same x solves both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lpgd.cones.product import Cones
from tests.judge.cone_points import Block, rows_of
from tests.judge.programs import ORDER, Programs, cones_of, row_starts

__all__ = ["MODIFICATIONS", "Statement", "bounds_as_rows", "plain", "redundant", "scaled"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Statement:
    """How a batch of programs is stated.

    Attributes:
        blocks: the cones of the rows.
        rows: (B, m', m + 2n) T, with R multiplied into it.
        shift: (B, m') t, likewise.
        variables: (B, n) D.
        objective, units: (B,) σ and c.
        with_bounds: whether variables have their bounds; otherwise these are rows.
        absent: what stands for a bound that is not there.
        notes: what was done, for reports.
    """

    blocks: tuple[Block, ...]
    rows: FloatArray
    shift: FloatArray
    variables: FloatArray
    objective: FloatArray
    units: FloatArray
    with_bounds: bool = True
    absent: float = np.inf
    notes: tuple[str, ...] = ()

    @property
    def cones(self) -> Cones:
        return cones_of(self.blocks)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> Statement:
        """That of some of the programs."""
        names = ("rows", "shift", "variables", "objective", "units")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def plain(programs: Programs) -> Statement:
    """The programs as they are."""
    batch, n = programs.q.shape
    m = programs.cones.rows
    rows = np.zeros((batch, m, m + 2 * n))
    rows[:, :, :m] = np.eye(m)
    one = np.ones(batch)
    return Statement(programs.plan.blocks, rows, np.zeros((batch, m)), np.ones((batch, n)), one, one)


def _with_rows(statement: Statement, additions: Sequence[tuple[Block, FloatArray, FloatArray]]) -> Statement:
    """More cones, each with its rows (B, d, m + 2n) and shift (B, d), put where their kinds stand."""
    starts = row_starts(statement.blocks)
    parts = [
        (block, statement.rows[:, start : start + rows_of(block)], statement.shift[:, start : start + rows_of(block)])
        for block, start in zip(statement.blocks, starts, strict=True)
    ]
    place = {kind: position for position, kind in enumerate(ORDER)} | {"dual_power": ORDER.index("power")}
    parts = sorted([*parts, *additions], key=lambda part: place[part[0].kind])
    if not parts:
        return statement
    return replace(
        statement,
        blocks=tuple(part[0] for part in parts),
        rows=np.concatenate([part[1] for part in parts], axis=1),
        shift=np.concatenate([part[2] for part in parts], axis=1),
    )


def bounds_as_rows(programs: Programs, statement: Statement) -> Statement:
    """The statement with every finite bound as a row."""
    batch, n = programs.q.shape
    m = programs.cones.rows
    additions: list[tuple[Block, FloatArray, FloatArray]] = []
    for first, bound in ((m, programs.upper), (m + n, programs.lower)):
        for variable in np.flatnonzero(np.isfinite(bound[0])):
            kind = "zero" if programs.fixed[variable] else "nonnegative"
            if kind == "zero" and first != m:
                continue
            rows = np.zeros((batch, 1, m + 2 * n))
            rows[:, 0, first + variable] = 1.0
            additions.append((Block(kind, "edge"), rows, np.zeros((batch, 1))))
    return replace(_with_rows(statement, additions), with_bounds=False)


# -- redundant rows and cones ----------------------------------------------------------------------------------------

Addition = tuple[Block, FloatArray, FloatArray]
Modification = Callable[[np.random.Generator, Programs], list[Addition]]


def _blank(programs: Programs, size: int = 1) -> tuple[FloatArray, FloatArray]:
    batch, n = programs.q.shape
    return np.zeros((batch, size, programs.cones.rows + 2 * n)), np.zeros((batch, size))


def _choose(rng: np.random.Generator, programs: Programs, kinds: Sequence[str]) -> tuple[Block, int] | None:
    """One of the blocks of these kinds and its first row."""
    starts = row_starts(programs.plan.blocks)
    fitting = [pair for pair in zip(programs.plan.blocks, starts, strict=True) if pair[0].kind in kinds]
    return fitting[int(rng.integers(len(fitting)))] if fitting else None


def _factor(rng: np.random.Generator) -> float:
    return float(rng.choice([1.0, 2.0, 3.0, 0.5, rng.uniform(0.2, 5.0)]))


def repeated(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """A row or a cone once more, times a positive number."""
    found = _choose(rng, programs, ORDER[1:])
    if found is None:
        return []
    block, start = found
    rows, shift = _blank(programs, rows_of(block))
    rows[:, np.arange(rows_of(block)), start + np.arange(rows_of(block))] = _factor(rng)
    return [(block, rows, shift)]


def repeated_equality(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """An equality once more, or a combination of all of them."""
    count = programs.cones.zero
    if not count:
        return []
    rows, shift = _blank(programs)
    if rng.random() < 0.5:
        rows[:, 0, int(rng.integers(count))] = _factor(rng) * rng.choice([-1.0, 1.0])
    else:
        rows[:, 0, :count] = rng.normal(size=count)
    return [(Block("zero", "apex"), rows, shift)]


def split_equality(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """An equality also as two inequalities."""
    if not programs.cones.zero:
        return []
    row = int(rng.integers(programs.cones.zero))
    additions = []
    for sign in (1.0, -1.0):
        rows, shift = _blank(programs)
        rows[:, 0, row] = sign
        additions.append((Block("nonnegative", "apex"), rows, shift))
    return additions


def implied(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """A nonnegative combination of inequalities, any one of equalities, and perhaps some room."""
    cones, m, n = programs.cones, programs.cones.rows, programs.plan.n
    weights = np.zeros(m + 2 * n)
    weights[: cones.zero] = rng.normal(size=cones.zero)
    for place in range(cones.zero, cones.zero + cones.nonnegative):
        weights[place] = rng.uniform(0.2, 2.0) * (rng.random() < 0.6)
    for first, bound in ((m, programs.upper), (m + n, programs.lower)):
        for variable in np.flatnonzero(np.isfinite(bound[0])):
            weights[first + variable] = rng.uniform(0.2, 2.0) * (rng.random() < 0.3)
    if not weights.any():
        return []
    rows, shift = _blank(programs)
    rows[:, 0] = weights
    shift[:] = rng.choice([0.0, 0.0, 1.0])
    return [(Block("nonnegative", "edge"), rows, shift)]


def supporting(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """The tangent ``<y, s> ≥ 0`` of a curved cone at the solution: implied, and active."""
    found = _choose(rng, programs, ORDER[2:])
    if found is None or found[0].state == "inside":
        return []
    block, start = found
    rows, shift = _blank(programs)
    stop = start + rows_of(block)
    rows[:, 0, start:stop] = programs.y[:, start:stop]
    return [(Block("nonnegative", "edge"), rows, shift)]


def minor(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """A principal minor of a semidefinite matrix as a semidefinite matrix of its own."""
    found = _choose(rng, programs, ("semidefinite",))
    if found is None or found[0].size < 2:
        return []
    block, start = found
    side = int(rng.integers(1, block.size))
    kept = np.sort(rng.choice(block.size, side, replace=False))
    places = [(i, j) for j in range(block.size) for i in range(j, block.size)]
    chosen = [position for position, (i, j) in enumerate(places) if i in kept and j in kept]
    rows, shift = _blank(programs, len(chosen))
    rows[:, np.arange(len(chosen)), start + np.array(chosen)] = _factor(rng)
    small = Block("semidefinite", "edge", side) if side > 1 else Block("nonnegative", "edge")
    return [(small, rows, shift)]


def bound_as_row(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """A bound of a variable also as a row."""
    m, n = programs.cones.rows, programs.plan.n
    places = [m + int(i) for i in np.flatnonzero(np.isfinite(programs.upper[0]))]
    places += [m + n + int(i) for i in np.flatnonzero(np.isfinite(programs.lower[0]))]
    if not places:
        return []
    rows, shift = _blank(programs)
    rows[:, 0, int(rng.choice(places))] = _factor(rng)
    return [(Block("nonnegative", "edge"), rows, shift)]


def free_row(rng: np.random.Generator, programs: Programs) -> list[Addition]:
    """``0 ≤ 1``, ``0 ≤ 0`` or ``0 = 0``: rows without entries."""
    rows, shift = _blank(programs)
    kind = str(rng.choice(["nonnegative", "zero"]))
    shift[:] = float(rng.choice([0.0, 1.0])) if kind == "nonnegative" else 0.0
    return [(Block(kind, "edge"), rows, shift)]


MODIFICATIONS: tuple[Modification, ...] = (
    repeated,
    repeated_equality,
    split_equality,
    implied,
    supporting,
    minor,
    bound_as_row,
    free_row,
)


def redundant(rng: np.random.Generator, programs: Programs) -> Statement:
    """The programs with one to three random modifications."""
    statement = plain(programs)
    notes: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        # Those that do not apply are drawn again; a cone or row to repeat is nearly always there.
        for _ in range(20):
            change = MODIFICATIONS[int(rng.choice(len(MODIFICATIONS), p=_SHARES))]
            additions = change(rng, programs)
            if additions:
                statement = _with_rows(statement, additions)
                notes.append(change.__name__)
                break
    return replace(statement, notes=tuple(notes))


_SHARES = np.array([0.26, 0.14, 0.08, 0.16, 0.12, 0.12, 0.08, 0.04])


# -- units -----------------------------------------------------------------------------------------------------------

SCALINGS = ("objective", "data", "rows", "variables", "several")


def scaled(rng: np.random.Generator, programs: Programs, which: str) -> Statement:
    """The programs in other units, powers of ten from 1e-8 to 1e8.

    Args:
        rng: the source.
        programs: the programs.
        which: one of :data:`SCALINGS`: the objective (σ), q and b together (c), each row (each cone has one factor),
            each variable, or several of these.
    """
    statement = plain(programs)
    batch, n = programs.q.shape
    chosen = {which}
    if which == "several":
        count = int(rng.integers(2, 5))
        chosen = set(rng.choice(SCALINGS[:4], count, replace=False).tolist())

    def powers(*shape: int) -> FloatArray:
        return np.power(10.0, rng.integers(-8, 9, size=shape).astype(np.float64))

    if "objective" in chosen:
        statement = replace(statement, objective=powers(batch))
    if "data" in chosen:
        statement = replace(statement, units=powers(batch))
    if "variables" in chosen:
        statement = replace(statement, variables=powers(batch, n))
    if "rows" in chosen:
        factors = [np.repeat(powers(batch, 1), rows_of(block), axis=1) for block in programs.plan.blocks]
        if factors:
            statement = replace(statement, rows=statement.rows * np.concatenate(factors, axis=1)[:, :, None])
    return replace(statement, notes=tuple(sorted(chosen)))
