"""Where points are on their cones: how well they are known there, and what would bring them to the middle of these.

A residual says how far a point is from optimal in units in which the data are of order 1.  Where on its cone the point
is, another length may count: that of ``w`` in ``(log w, 1, w)``, or that of ``v`` in ``(x - t, v, w)`` with x and t of
1e6.  With complementary s and y the products ``s_i y_i`` of a cone's rows are of one size, whatever the coordinates:
they say which cones matter, and by s and y over their sum an error is measured at the point itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lpgd.arrays import BoolArray, FloatArray, IntArray
from lpgd.cones.product import Cones, svec_indices
from lpgd.problems.conic.residuals import Products
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure, per_element

__all__ = ["Found", "Position", "found_on_cones", "position_of", "position_of_ray", "strain_there", "surely_known"]

RELEVANT = 1e-10
"""Cones whose products are below this share of all are no matter."""
APEX = 1e3
"""A slack of so many errors may be zero."""
CHIEF = 1e-3
"""Cones whose products are a larger share of all are no small part of them."""
FAINT = 1e-6
"""Cones whose share of a ray is smaller are no part of it."""
TINY = 1e-14
"""Smaller entries of a slack are rounding beside its largest one."""
_SMALLEST = np.finfo(np.float64).tiny


class _Sizes(NamedTuple):
    """Of each curved cone (B, cones): the sum of its products, and the sizes of s and of y that these are made of."""

    product: FloatArray
    primal: FloatArray
    dual: FloatArray


class Position(NamedTuple):
    """What brings one point to the middle of its cones.

    Attributes:
        parameters: exponents of two of automorphisms, in the order of
            :func:`~lpgd.problems.conic.coordinates.automorphisms.exponents_of`.
        known: which of them the point determines.
    """

    parameters: FloatArray
    known: BoolArray

    def is_beyond(self, limit: float) -> bool:
        """Whether it is so far from the middle of a cone."""
        return bool((np.abs(self.parameters[self.known]) > limit).any())


class Found(NamedTuple):
    """Points of a batch on their cones, in units of order 1.

    Attributes:
        slack, y: (B, m); the slack of cones that points are at the apex of, as far as is known, is zero.
        error: (B,) what is left of the optimality conditions.
        product: (B,) the sum of all cones' products.
        primal, dual: (B,) the largest entries of s and of y in cones that matter.
        matters: (B, curved cones) which do, in row order.
        spread: (B,) how far sizes of one cone are from each other, in exponents of two, where its products are no small
            part of all: of the exponential ones, and those that can be rotated.
    """

    slack: FloatArray
    y: FloatArray
    error: FloatArray
    product: FloatArray
    primal: FloatArray
    dual: FloatArray
    matters: BoolArray
    spread: FloatArray

    @property
    def strain(self) -> FloatArray:
        """(B,) a bound of the errors relative to the lengths that matter where the points are."""
        return self.relative(self.error, np.maximum(self.primal, self.dual))

    def relative(self, error: FloatArray, weight: FloatArray) -> FloatArray:
        """(B,) errors that cost so much, relative to the products."""
        with np.errstate(invalid="ignore", over="ignore"):
            return error * np.maximum(weight / np.maximum(self.product, _SMALLEST), 1.0)


def strain_there(solution: ConicSolution, found: Found) -> FloatArray:
    """(B,) the same of the rows of the cones that matter alone, and of the variables that these have."""
    problem, structure = solution.problem, solution.problem.structure
    inside, point = problem.units.apply(problem), problem.units.point_in(problem, solution.point)
    slack = problem.units.slack_in(problem, solution.slack)
    curved = slice(structure.cones.zero + structure.cones.nonnegative, structure.m)
    blocks = structure.cones.blocks[curved] - structure.cones.blocks[curved.start]
    rows = np.zeros(slack.shape, dtype=bool)
    rows[:, curved] = found.matters[:, blocks]
    products = Products.of(inside, point)
    slope = (products.Px + per_element(inside.data.q, problem.batch_size) + products.Aty + point.z).abs().cpu().numpy()
    violation = (inside.slack(point.x) - slack).abs().cpu().numpy()
    gaps = np.add.reduceat((slack * point.y).cpu().numpy()[:, curved], _starts(structure.cones), axis=1)
    columns = np.zeros(slope.shape, dtype=bool)
    for element, there in enumerate(rows):
        columns[element, structure.constraint.columns[there[structure.constraint.rows]]] = True
    errors = (
        found.relative((violation * rows).max(1, initial=0.0), found.dual),
        found.relative((slope * columns).max(1, initial=0.0), found.primal),
        np.abs(gaps * found.matters).max(1, initial=0.0) / np.maximum(found.product, _SMALLEST),
    )
    return np.nan_to_num(np.max(errors, axis=0), nan=np.inf)


def surely_known(solution: ConicSolution, turned: IntArray, strain: float, spread: float) -> BoolArray:
    """(B,) whether a look at all cones together shows that points are known, and nowhere near the ends of a cone.

    This is done in every call, and bounds what :func:`found_on_cones` finds.
    """
    problem, cones = solution.problem, solution.problem.structure.cones
    units, curved = problem.units, slice(cones.zero + cones.nonnegative, cones.rows)
    error = (solution.residuals.worst if solution.known_to is None else solution.known_to).cpu().numpy()
    slack = units.slack_in(problem, solution.slack).cpu().numpy()[:, curved]
    y = units.point_in(problem, solution.point).y.cpu().numpy()[:, curved]
    start, (first, other) = cones.sections["exponential"].start - curved.start, turned.T - curved.start
    triples = slice(start, start + 3 * cones.exponential)
    middle, last = slack[:, triples][:, 1::3], slack[:, triples][:, 2::3]
    a, b = np.abs(slack), np.abs(y)
    a[:, triples][:, ::3], b[:, triples][:, 1::3] = middle, 0.0
    limit = 2.0**spread
    with np.errstate(all="ignore"):
        near = ((middle * limit > last) & (last * limit > middle)).all(1)
        if first.size:
            plus, minus = slack[:, first] + slack[:, other], slack[:, first] - slack[:, other]
            near &= ((plus * limit > minus) & (minus * limit > plus)).all(1)
            a[:, first], a[:, other] = np.abs(plus), np.abs(minus)
            b[:, first], b[:, other] = (
                0.5 * np.abs(y[:, first] + y[:, other]),
                0.5 * np.abs(y[:, first] - y[:, other]),
            )
        length = np.maximum(a.max(1, initial=0.0), b.max(1, initial=0.0)) / np.einsum("ij,ij->i", a, b)
        return near & (error * np.maximum(length, 1.0) <= strain)


def found_on_cones(solution: ConicSolution, turned: IntArray) -> Found:
    """Where the points of a solution are, as far as that is known.

    Args:
        solution: of a program with curved cones.
        turned: (k, 2) the rows of second-order cones that are rotated.
    """
    problem, structure = solution.problem, solution.problem.structure
    units, cones = problem.units, structure.cones
    error = solution.residuals.worst if solution.known_to is None else solution.known_to
    error = np.nan_to_num(error.cpu().numpy(), nan=1.0, posinf=1.0)
    slack = units.slack_in(problem, solution.slack).cpu().numpy()
    y = units.point_in(problem, solution.point).y.cpu().numpy()
    curved = slice(cones.zero + cones.nonnegative, structure.m)
    # Right-hand sides of rows without variables are certain, other rows are to what is left of the conditions.
    noise = error[:, None] * _occupied(structure)[curved]
    slack = slack.copy()
    first = cones.sections["exponential"].start - curved.start
    if first < noise.shape[1]:
        linear = units.slack_in(problem, solution.s).cpu().numpy()[:, curved]
        rough = np.abs(linear) > noise
        rough[:, first : first + 3 * cones.exponential : 3] = (
            True  # the first row of an exponential cone may be anything
        )
        there = np.where(rough, linear, np.maximum(slack[:, curved], noise))
        slack[:, curved.start + first :] = there[:, first:]
    sure = np.abs(slack[:, curved]) > APEX * noise
    sure[:, first : first + 3 * cones.exponential : 3] = False  # of (-1, 0, 0) that row says nothing of sizes
    at_apex = ~np.logical_or.reduceat(sure, _starts(cones), axis=1)
    if at_apex.any():
        slack[:, curved] = np.where(
            at_apex[:, cones.blocks[curved] - cones.blocks[curved.start]], 0.0, slack[:, curved]
        )
    slack, y = np.nan_to_num(slack), np.nan_to_num(y)
    sizes = _sizes(cones, turned, slack, y)
    total = sizes.product.sum(1)
    matters = sizes.product > RELEVANT * total[:, None]
    primal, dual = (np.where(matters, values, 0.0).max(1, initial=0.0) for values in (sizes.primal, sizes.dual))
    spread = _spread(cones, turned, slack, sizes.product > CHIEF * total[:, None])
    return Found(slack, y, error, total, primal, dual, matters, spread)


def _spread(cones: Cones, turned: IntArray, slack: FloatArray, chief: BoolArray) -> FloatArray:
    start = cones.zero + cones.nonnegative
    blocks = cones.blocks[start:] - cones.blocks[start : start + 1]
    first = np.arange(cones.sections["exponential"].start, cones.sections["exponential"].stop, 3)
    middle, last = slack[:, first + 1], slack[:, first + 2]
    one, other = slack[:, turned[:, 0]], slack[:, turned[:, 1]]
    plus, minus = one + other, one - other
    one, other = np.concatenate([middle, plus], 1), np.concatenate([last, minus], 1)
    there = chief[:, blocks[np.concatenate([first, turned[:, 0]]) - start]] & (one > 0.0) & (other > 0.0)
    ratio = np.where(there, one, 1.0) / np.where(there, other, 1.0)
    return np.abs(np.log2(ratio)).max(1, initial=0.0)


def _starts(cones: Cones) -> IntArray:
    """Where curved cones begin, among their rows."""
    return np.flatnonzero(np.diff(cones.blocks[cones.zero + cones.nonnegative :], prepend=-1))


def _occupied(structure: ConicStructure) -> BoolArray:
    """(m,) which rows have variables."""
    known = structure.row_patterns
    if "occupied" not in known:
        known["occupied"] = np.bincount(structure.constraint.rows, minlength=structure.m) > 0
    return known["occupied"]


def position_of(cones: Cones, turned: IntArray, slack: FloatArray, matters: BoolArray) -> Position:
    """Where one point (m,) is; cones that do not matter are left as they are."""
    parameters, known = list[FloatArray](), list[BoolArray]()
    row, number = cones.zero + cones.nonnegative, 0

    def add(values: FloatArray, size: int, count: int = 1) -> None:
        """What the next cones say, which have so many rows."""
        nonlocal row, number
        fine, there = np.isfinite(values), matters[number : number + count]
        parameters.append(np.where(fine, values, 0.0))
        known.append(fine & np.repeat(there, values.size // max(count, 1)))
        row, number = row + size, number + count

    parameters.append(np.zeros(row))
    known.append(np.zeros(row, dtype=bool))
    rotated = dict(turned.tolist())
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for size in cones.second_order:
            add(_second_order(slack[row : row + size], rotated.get(row, row) - row), size)
        for side in cones.semidefinite:
            i, j = svec_indices(side)
            diagonal = slack[row : row + len(i)][i == j]
            large = diagonal > TINY * diagonal.max(initial=0.0)
            add(np.where(large, -0.5 * np.log2(diagonal), np.nan), len(i))
        triples = slack[cones.sections["exponential"]].reshape(-1, 3)
        add(_exponential(triples).ravel(), triples.size, cones.exponential)
        triples = np.abs(slack[cones.sections["dual_exponential"]].reshape(-1, 3))
        add(-np.log2(triples.max(1, initial=0.0)), triples.size, cones.dual_exponential)
        triples = slack[cones.sections["power"]].reshape(-1, 3)
        add(_power(np.abs(np.array(cones.power)), triples).ravel(), triples.size, len(cones.power))
    return Position(np.concatenate(parameters), np.concatenate(known))


def position_of_ray(cones: Cones, turned: IntArray, ray: FloatArray, *, is_dual: bool) -> Position:
    """Where a direction (m,) of slacks is, or multipliers that are complementary to it; its length says nothing.

    Multipliers without any of which there is no proof may be the smallest: ``-u`` of ``(u, v, w)`` needs
    ``w ≥ -u exp(v / u - 1)``, and it may take an x of 1e8 to see that there is none.
    """
    s, sections = ray.copy(), cones.sections
    if is_dual:
        triples = ray[sections["exponential"]].reshape(-1, 3)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 1.0 - triples[:, 1] / triples[:, 0]
        there = np.where(triples[:, 0] < 0.0, np.abs(triples[:, 0]), np.nan)
        # (u, v, w) with v of the multiplier's size and the ratio that is complementary to it.
        s[sections["exponential"]] = np.stack([ratio * there, there, there * np.exp(ratio.clip(-300, 300))], 1).ravel()
        s[turned[:, 1]] *= -1.0
        section = sections["power"]
        exponent, triples = np.abs(np.array(cones.power)), np.maximum(np.abs(ray[section].reshape(-1, 3)), _SMALLEST)
        s[section] = np.stack(
            [exponent / triples[:, 0], (1.0 - exponent) / triples[:, 1], triples[:, 2] * 0.0], 1
        ).ravel()
    start = sections["semidefinite"].start
    for side in cones.semidefinite:
        i, j = svec_indices(side)
        diagonal = np.abs(s[start : start + len(i)][i == j])
        there = diagonal > FAINT * diagonal.max()
        mean = np.exp(np.log(diagonal[there]).mean()) if there.any() else 1.0
        values = np.where(there, diagonal / mean, 0.0)
        s[start + np.flatnonzero(i == j)] = (
            np.where(there, 1.0 / np.where(there, values, 1.0), 0.0) if is_dual else values
        )
        start += len(i)
    curved = slice(cones.zero + cones.nonnegative, cones.rows)
    size = np.maximum.reduceat(np.abs(ray[curved]), _starts(cones))
    return position_of(cones, turned, s, size > FAINT * np.abs(ray).max(initial=0.0))


def _sizes(cones: Cones, turned: IntArray, slack: FloatArray, y: FloatArray) -> _Sizes:
    """In row order."""
    curved, starts = slice(cones.zero + cones.nonnegative, cones.rows), _starts(cones)
    a, b, (head, other) = np.abs(slack), np.abs(y), turned.T
    # Of sums and differences of rotated rows; the first row of (u, v, w) may be anything, and (u - c v, ·, ·) is as v.
    for values, whole, factor in ((a, slack, 1.0), (b, y, 0.5)):
        values[:, head] = factor * np.abs(whole[:, head] + whole[:, other])
        values[:, other] = factor * np.abs(whole[:, head] - whole[:, other])
    first = np.arange(cones.sections["exponential"].start, cones.sections["exponential"].stop, 3)
    a[:, first] = a[:, first + 1]
    b[:, first + 1] = 0.0
    a, b = a[:, curved], b[:, curved]
    return _Sizes(
        np.add.reduceat(a * b, starts, axis=1),
        np.maximum.reduceat(a, starts, axis=1),
        np.maximum.reduceat(b, starts, axis=1),
    )


def _second_order(s: FloatArray, other: int) -> FloatArray:
    """The larger of ``s₀ + s₁`` and ``s₀ - s₁`` and the other rows say what the smaller is, on the boundary.

    Args:
        s: the cone's rows.
        other: which of them s₁ is; 0 where there is none.
    """
    if not other:
        return np.array([-np.log2(s[0])])
    plus, minus, rest = s[0] + s[other], s[0] - s[other], float(np.linalg.norm(np.delete(s[1:], other - 1)))
    large = max(plus, minus)
    if not rest > TINY * large:
        return np.array([-np.log2(s[0]), np.nan])
    turn = np.log2(large / rest)
    return np.array([-np.log2(rest), -turn if plus >= minus else turn])


def _exponential(s: FloatArray) -> FloatArray:
    """(cones, 2): what brings (u, v, w) to (0, 1, 1), by the more certain of ``u / v`` and ``log(w / v)``."""
    u, v, w = s.T
    ratio = np.where(v >= w, u / v, np.log(w / v))
    return np.stack([-np.log2(v), -ratio / np.log(2.0)], 1)


def _power(exponent: FloatArray, s: FloatArray) -> FloatArray:
    """(cones, 2): what brings (u, v, w) to (1, 1, 1); the smaller of u and v is what the others say, if they do."""
    u, v, w = s.T
    w = np.abs(w)
    says = w > TINY * np.maximum(u, v)
    small = np.where(says & (u < v), (w / v ** (1.0 - exponent)) ** (1.0 / exponent), u)
    other = np.where(says & (v < u), (w / u**exponent) ** (1.0 / (1.0 - exponent)), v)
    u, v = np.where(u < v, np.maximum(small, _SMALLEST), u), np.where(v < u, np.maximum(other, _SMALLEST), v)
    size = exponent * np.log2(u) + (1.0 - exponent) * np.log2(v)
    return np.stack([-size, np.log2(v / u)], 1)
