"""Other points of the same solutions, at which multipliers and slacks do not vanish together.

Where multipliers are not unique, a solver that stops at a vertex of theirs (an active-set method does) leaves zeros at
constraints that hold all the same: doubly stochastic matrices have many.  Where solutions are not unique, one at the
end of a face touches constraints that most of them do not.  Both look like kinks, where the derivative has two sides,
and are none.  Multipliers move along

    δ with A_Fᵀ δ = 0,  δz = -Aᵀ δ on bounded variables,

F the free variables, and solutions along d with ``P d = 0`` that active constraints allow, if nobody asks for what d
changes: where one asks for x itself, the point of the face that the solver found is what is differentiated.  A linear
program says how far all of what vanishes can be led away from zero, where the rest keeps its sign.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, from_numpy
from lpgd.gradients.implicit.located import Located, relocated
from lpgd.problems.conic.structure import ConicPoint, ConicStructure, per_element

__all__ = ["away_from_kinks"]

LARGEST = 500
"""Programs with more variables and rows are left as they are."""
NULL = 1e-9
"""Pivots below this share of the largest are zero."""
SEEN = 1e-9
"""What is asked for and changes by less stays as it is."""
CAP = 1.0
"""How far from zero is enough, in units of order 1."""
KEPT = 0.5
"""What keeps its sign keeps this share of its value."""
CLEAR = 10.0
"""So many tolerances from zero are far enough."""
ALIKE, FAR = 1e-6, 1e-3
"""What is led away by one length, up to the first share of it, and to the second at least, needs no linear program."""


def away_from_kinks(located: Located, elements: list[int]) -> tuple[Located, list[int]]:
    """The same solutions, of which some of these elements are at other points, and which those are."""
    problem, point, slack = located.problem, located.point, located.slack
    structure = problem.structure
    if not elements or structure.n + structure.m > LARGEST:
        return located, []
    P = structure.quadratic.to_dense(per_element(problem.symmetric_P.detach(), problem.batch_size)[elements])
    A = structure.constraint.to_dense(per_element(problem.data.A.detach(), problem.batch_size)[elements])
    arrays = [tensor.detach().cpu().numpy() for tensor in (*point, slack, *problem.full_bounds(), located.tolerance)]
    moved: dict[int, _Point] = {}
    for place, element in enumerate(elements):
        here = _Point(*(array[element] for array in arrays))
        unit = located.unit.x[element]
        there = _led_away(structure, P[place].cpu().numpy(), A[place].cpu().numpy(), here, unit)
        if there is not None:
            moved[element] = there
    if not moved:
        return located, []
    index = list(moved)
    changed = [tensor.clone() for tensor in (*point, slack)]
    for whole, values in zip(changed, zip(*(one[:4] for one in moved.values()), strict=True), strict=True):
        whole[index] = from_numpy(np.stack(values)).to(whole)
    return relocated(located, ConicPoint(*changed[:3]), changed[3], index)


class _Point(NamedTuple):
    """Of one element, in units of order 1."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray
    lower: FloatArray
    upper: FloatArray
    tolerance: FloatArray


class _Pieces(NamedTuple):
    """Which rows (m,) and bounds (n,) have a multiplier, and which are at a kink."""

    active: BoolArray
    weak: BoolArray
    above: BoolArray
    below: BoolArray
    weak_above: BoolArray
    weak_below: BoolArray

    @classmethod
    def of(cls, structure: ConicStructure, at: _Point) -> _Pieces:
        linear, tolerance = structure.cones.sections["nonnegative"], float(at.tolerance)
        v, weak = at.y - at.slack, np.zeros(at.y.size, dtype=bool)
        weak[linear] = np.abs(v[linear]) <= tolerance
        active = (v > 0) & ~weak
        active[: linear.start] = True
        active[linear.stop :] = False
        apart = at.lower < at.upper
        gaps = at.z - (at.upper - at.x), -at.z - (at.x - at.lower)
        weak_above, weak_below = ((np.abs(gap) <= tolerance) & apart for gap in gaps)
        above, below = (gaps[0] > 0) & ~weak_above | ~apart, (gaps[1] > 0) & ~weak_below & apart
        return cls(active, weak, above, below, weak_above, weak_below)

    @property
    def any_weak(self) -> bool:
        return bool(self.weak.any() or self.weak_above.any() or self.weak_below.any())


def _led_away(structure: ConicStructure, P: FloatArray, A: FloatArray, at: _Point, unit: Tensor) -> _Point | None:
    """The point with other multipliers, or another x, if one of them is at fewer kinks; None if not."""
    pieces = _Pieces.of(structure, at)
    moved = _other_multipliers(structure, A, at, pieces)
    if moved is not None:
        at, pieces = moved, _Pieces.of(structure, moved)
    if structure.observed is None or not pieces.any_weak:
        return moved
    return _other_solution(structure, P, A, at, pieces, unit) or moved


def _other_multipliers(structure: ConicStructure, A: FloatArray, at: _Point, pieces: _Pieces) -> _Point | None:
    rows = pieces.active | pieces.weak
    bounded = pieces.above | pieces.below | pieces.weak_above | pieces.weak_below
    moves = _null_space(A[np.ix_(rows, ~bounded)].T)
    if not moves.shape[1]:
        return None
    of_rows = np.zeros((at.y.size, moves.shape[1]))
    of_rows[rows] = moves
    of_bounds = -A.T @ of_rows
    linear = np.zeros(at.y.size, dtype=bool)
    linear[structure.cones.sections["nonnegative"]] = True
    apart = at.lower < at.upper
    strict = pieces.active & linear, pieces.above & apart, pieces.below
    weak = pieces.weak, pieces.weak_above, pieces.weak_below
    values, changes = (at.y, at.z, -at.z), (of_rows, of_bounds, -of_bounds)
    along = _along(values, changes, strict, weak, float(at.tolerance))
    if along is None:
        return None
    y, z = at.y + of_rows @ along, at.z + np.where(bounded, of_bounds @ along, 0.0)
    return at._replace(y=y, z=z, slack=np.where(pieces.weak & (y > 0), 0.0, at.slack))


def _other_solution(
    structure: ConicStructure,
    P: FloatArray,
    A: FloatArray,
    at: _Point,
    pieces: _Pieces,
    unit: Tensor,
) -> _Point | None:
    """Another x of which all is the same that is observed."""
    assert structure.observed is not None
    held, linear = pieces.above | pieces.below, structure.cones.sections["nonnegative"]
    rows = pieces.active.copy()
    rows[linear.stop :] = True
    free = _null_space(np.concatenate([P[:, ~held], A[np.ix_(rows, ~held)]]))
    if not free.shape[1]:
        return None
    moves = np.zeros((at.x.size, free.shape[1]))
    moves[~held] = free
    y = from_numpy(at.y).to(unit)
    y, unit = (tensor.expand(free.shape[1], -1) for tensor in (y, unit))
    told = structure.observed.in_x(from_numpy(moves.T.copy()).to(unit), y, unit)
    moves = moves @ _null_space(told.mT.cpu().numpy(), SEEN)
    if not moves.shape[1]:
        return None
    of_slacks = -A @ moves
    inactive = ~rows & ~pieces.weak
    strict = (
        inactive,
        np.isfinite(at.upper) & ~held & ~pieces.weak_above,
        np.isfinite(at.lower) & ~held & ~pieces.weak_below,
    )
    weak = pieces.weak, pieces.weak_above, pieces.weak_below
    values = (
        at.slack,
        np.where(strict[1] | weak[1], at.upper - at.x, 0.0),
        np.where(strict[2] | weak[2], at.x - at.lower, 0.0),
    )
    along = _along(values, (of_slacks, -moves, moves), strict, weak, float(at.tolerance))
    if along is None:
        return None
    x, slack = at.x + moves @ along, at.slack + np.where(~rows, of_slacks @ along, 0.0)
    return at._replace(x=x, slack=slack)


def _along(
    values: tuple[FloatArray, ...],
    changes: tuple[FloatArray, ...],
    strict: tuple[BoolArray, ...],
    weak: tuple[BoolArray, ...],
    tolerance: float,
) -> FloatArray | None:
    """Coefficients that lead as much of what is ``weak`` away from zero as can be, what is ``strict`` staying there.

    Args:
        values, changes: (p,) and (p, k) of each group.
        strict, weak: (p,) which of each.
    """

    def joined(chosen: tuple[BoolArray, ...]) -> tuple[FloatArray, FloatArray]:
        pairs = list(zip(values, changes, chosen, strict=True))
        of_values = np.concatenate([value[which] for value, _, which in pairs])
        return of_values.clip(min=0.0), np.concatenate([change[which] for _, change, which in pairs])

    (rest, its_change), (least, growth) = joined(strict), joined(weak)
    count, k = growth.shape
    if not np.abs(growth).max(initial=0.0) > NULL:
        return None
    # Mostly, all of it can be led away alike, as far as the rest allows.
    alike: FloatArray = np.linalg.lstsq(growth, np.full(count, CAP), rcond=NULL)[0].astype(np.float64)
    if np.abs(growth @ alike - CAP).max() <= ALIKE:
        with np.errstate(divide="ignore"):
            furthest = (1.0 - KEPT) * rest / np.maximum(-its_change @ alike, 0.0)
        length = float(furthest.min(initial=1.0)) * CAP
        if length >= FAR or (k == 1 and length > CLEAR * tolerance):
            return (length / CAP) * alike
    from scipy.optimize import linprog  # it takes a while to import

    rows = np.block([[-growth, np.eye(count)], [-its_change, np.zeros((rest.size, count))]])
    right = np.concatenate([least, (1.0 - KEPT) * rest])
    ends = [(None, None)] * k + [(0.0, CAP)] * count
    found: Any = linprog(np.r_[np.zeros(k), -np.ones(count)], rows, right, bounds=ends, method="highs")
    if found.x is None or not (found.x[k:] > CLEAR * tolerance).any():
        return None
    return found.x[:k]


def _null_space(matrix: FloatArray, least: float = 0.0) -> FloatArray:
    """(q, k) an orthonormal basis of the vectors that a (p, q) matrix takes to zero, or to less than the least."""
    if not matrix.size:
        return np.eye(matrix.shape[1])
    factors: Any = scipy.linalg.qr(matrix.T, pivoting=True, check_finite=False)
    basis, triangle, _ = factors
    pivots = np.abs(np.diag(triangle))
    return basis[:, int((pivots > max(least, NULL * pivots.max(initial=0.0))).sum()) :]
