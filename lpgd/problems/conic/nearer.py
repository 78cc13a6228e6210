"""Programs whose far constraints are nearer to their solutions.

The largest right-hand side sets the unit of length.  Where that belongs to a constraint far away, such as ``x <= 1e6``
beside solutions of order 1, all else is small in it: what is known to rounding there is not in the unit of the
solution, and slacks of order 1 look like none.  A constraint that is not active may be anywhere on its side: near the
solution nothing changes if it is moved nearer, and, as the program is convex, a solution that does not touch it there
is one of the program as it was.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, from_numpy
from lpgd.cones.product import Cones, smat, svec_size
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.magnitudes import LARGEST_MODERATE
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicData, ConicPoint, per_element

__all__ = ["FAR", "NEAR", "Nearer", "guessed", "nearer"]

FAR, NEAR = 2.0**8, 2.0**6
"""Constraints that are farther than so many sizes of the solution are moved to where they are as far as the second."""
WIDE, ROOM = 2.0**12, 2.0**10
"""The same where the solution is not known, in sizes of the other constraints."""
DEPTH = 4
"""So many groups of right-hand sides are looked at, from the largest one down."""
LEFT = 2.0**-7
"""Solutions that leave no more than this share of the way to a constraint that was moved are near it."""
FAINT = 1e-6
"""Multipliers below this share of the largest force are none."""
DEEP = 2.0**-4
"""A slack is inside its curved cone if it is this share of its size from the boundary."""


class Nearer(NamedTuple):
    """B programs, some constraints of which are nearer.

    Attributes:
        problem: on the same structure.
        point, slack: what was known, at which multipliers of constraints that were moved are zero.
        reach: (B,) the size of the solution in the problem's units of length; NaN where nothing was moved.
        rows, upper, lower: (B, m), (B, n) and (B, n) which constraints were moved.
    """

    problem: ConicProblem
    point: ConicPoint
    slack: Tensor
    reach: Tensor
    rows: Tensor
    upper: Tensor
    lower: Tensor

    def select(self, elements: Tensor) -> Nearer:
        """The same of some elements."""
        return Nearer(
            self.problem.select(elements), self.point.select(elements), self.slack[elements], self.reach[elements],
            self.rows[elements], self.upper[elements], self.lower[elements],
        )  # fmt: skip

    @property
    def sizes(self) -> ConicData:
        """The data without the right-hand sides of constraints that were moved: sizes of the rest."""
        data, structure = self.problem.data, self.problem.structure
        upper, lower = (structure.index(f"{name}_index", self.reach.device) for name in ("upper", "lower"))
        return data._replace(
            b=torch.where(self.rows, 0.0, data.b),
            upper=torch.where(self.upper[:, upper], torch.inf, data.upper),
            lower=torch.where(self.lower[:, lower], -torch.inf, data.lower),
        )

    def without_forces(self, point: ConicPoint) -> tuple[Tensor, Tensor]:
        """(y, z) of a point, without multipliers of constraints that were moved."""
        z = torch.where(self.upper, point.z.clamp(max=0.0), point.z)
        return torch.where(self.rows, 0.0, point.y), torch.where(self.lower, z.clamp(min=0.0), z)

    def touches(self, point: ConicPoint, slack: Tensor) -> Tensor:
        """(B,) whether a solution pushes against a constraint that was moved, or is near it."""
        y, z = self.without_forces(point)
        pushed = torch.maximum(maximum_norm(point.y - y), maximum_norm(point.z - z))
        force = torch.maximum(maximum_norm(point.y), maximum_norm(point.z))
        force = torch.maximum(force, maximum_norm(per_element(self.problem.data.q, len(z))))
        cones, (lower, upper) = self.problem.structure.cones, self.problem.full_bounds()
        inside = from_numpy(_inside(cones, slack.cpu().numpy())).to(slack.device)
        depth, wanted = (_of_blocks(cones, values.abs(), whole=False) for values in (slack, self.slack))
        near = (self.rows & ~(inside & (depth > LEFT * wanted))).any(1)
        for moved, now, before in (
            (self.upper, upper - point.x, upper - self.point.x),
            (self.lower, point.x - lower, self.point.x - lower),
        ):
            near |= (moved & ~(now > LEFT * before)).any(1)
        return near | (pushed > FAINT * FAINT * force)


def nearer(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> Nearer | None:
    """The programs with far constraints moved nearer to these points; None where there are none.

    Args:
        problem: B elements.
        point, slack: (B, ·) each; points that are not finite are passed over.
    """
    if problem.units.length is None or problem.structure.has_integers:
        return None
    inside, at, s = _in_units(problem, point, slack)
    size = maximum_norm(at.x)
    small = size < 1.0 / FAR  # false for NaN
    if not bool(small.any()):
        return None
    force = torch.stack([maximum_norm(per_element(inside.data.q, len(size))), maximum_norm(at.y), maximum_norm(at.z)])
    faint = FAINT * force.amax(0)[:, None]
    loose = _loose(inside, at, s, at.y.abs() <= faint, at.z <= faint, -at.z <= faint)
    reach = torch.maximum(size, _largest_but(inside, loose))
    small &= (reach > 0) & (reach < 1.0 / FAR)
    return _moved(problem, point, slack, loose, torch.where(small, reach, torch.nan), FAR, NEAR)


def guessed(problem: ConicProblem, closer: bool = False) -> Nearer | None:
    """The programs with constraints that are far from zero, by their data, nearer to it; None where there are none.

    Far are those whose right-hand sides are beyond all others; ``closer`` is for answers that are vague without it:
    less is far, and the others are those below the last gap.
    """
    structure, data = problem.structure, problem.data
    if structure.has_integers or structure.cones.is_polyhedral or not _has_large(data.b, data.lower, data.upper):
        return None
    if problem.units.length is None:
        return None
    size = problem.batch_size
    zero = ConicPoint(*(problem.data.q.new_zeros(size, width) for width in (structure.n, structure.m, structure.n)))
    slack = per_element(problem.data.b, size)
    inside, at, s = _in_units(problem, zero, slack)
    every = torch.ones((), dtype=torch.bool, device=slack.device)
    loose = _loose(inside, at, s, every, every, every)
    sides = [per_element(inside.data.b, size).abs()]
    sides += [torch.where(torch.isfinite(end), end, 0.0).abs() for end in inside.full_bounds()]
    sizes = torch.cat(sides, 1)
    top = sizes.amax(1)
    far, room = (FAR, NEAR) if closer else (WIDE, ROOM)
    least, reach = _largest_but(inside, loose), torch.full_like(top, torch.nan)
    for _ in range(DEPTH if closer else 1):
        top = torch.where(sizes < top[:, None] / far, sizes, 0.0).amax(1)
        reach = torch.where((top > 0) & (least <= top), top, reach)
    return _moved(problem, zero, slack, loose, reach, far, room)


def _has_large(*sides: Tensor) -> bool:
    """Whether a number is large enough for units of length to be any but 1."""
    arrays = (np.abs(side.detach().cpu().numpy()) for side in sides)
    return any(bool((array[np.isfinite(array)] >= LARGEST_MODERATE).any()) for array in arrays)


def _in_units(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> tuple[ConicProblem, ConicPoint, Tensor]:
    units = problem.units
    return units.apply(problem), units.point_in(problem, point), units.slack_in(problem, slack)


class _Loose(NamedTuple):
    """Constraints that are not active, and how far they are, in units of length.

    Attributes:
        rows, upper, lower: (B, ·) which are.
        depth, above, below: (B, ·) how far.
    """

    rows: Tensor
    upper: Tensor
    lower: Tensor
    depth: Tensor
    above: Tensor
    below: Tensor


def _loose(
    inside: ConicProblem, at: ConicPoint, slack: Tensor, rows: Tensor, from_above: Tensor, from_below: Tensor
) -> _Loose:
    """Constraints inside of which a point is, of those that may be."""
    cones, (lower, upper) = inside.structure.cones, inside.full_bounds()
    deep = rows & from_numpy(_inside(cones, slack.cpu().numpy())).to(slack.device)
    above, below = upper - at.x, at.x - lower
    return _Loose(
        _of_blocks(cones, deep, whole=True),
        torch.isfinite(upper) & from_above & (above > 0.0),
        torch.isfinite(lower) & from_below & (below > 0.0),
        _of_blocks(cones, slack.abs(), whole=False),
        above,
        below,
    )


def _largest_but(inside: ConicProblem, loose: _Loose) -> Tensor:
    """(B,) the largest right-hand side or bound of the other constraints."""
    lower, upper = inside.full_bounds()
    largest = maximum_norm(torch.where(loose.rows, 0.0, per_element(inside.data.b, inside.batch_size)))
    for is_loose, end in ((loose.upper, upper), (loose.lower, lower)):
        largest = torch.maximum(largest, maximum_norm(torch.where(is_loose | ~torch.isfinite(end), 0.0, end)))
    return largest


def _moved(
    problem: ConicProblem, point: ConicPoint, slack: Tensor, loose: _Loose, reach: Tensor, far: float, near: float
) -> Nearer | None:
    """The programs with loose constraints farther than ``far`` moved to where they are as far as ``near``, in reaches.

    Elements whose reach is NaN stay as they are.
    """
    limit, wanted = far * reach[:, None], near * reach[:, None]
    rows, upper, lower = (
        loose.rows & (loose.depth > limit),
        loose.upper & (loose.above > limit),
        loose.lower & (loose.below > limit),
    )
    moved = rows.any(1) | upper.any(1) | lower.any(1)
    if not bool(moved.any()):
        return None
    data, size = problem.data, problem.batch_size
    new_slack = torch.where(rows, slack * (wanted / torch.where(rows, loose.depth, 1.0)), slack)
    if bool(rows.any()):
        b = new_slack + problem.structure.constraint.matvec(data.A, point.x)
        data = data._replace(b=torch.where(rows, b, per_element(data.b, size)))
    room = problem.units.point_out(problem, ConicPoint(wanted.expand_as(point.x), point.y, point.z)).x
    for name, chosen, sign in (("upper", upper, 1.0), ("lower", lower, -1.0)):
        if bool(chosen.any()):
            index = problem.structure.index(f"{name}_index", chosen.device)
            ends = torch.where(
                chosen[:, index], (point.x + sign * room)[:, index], per_element(getattr(data, name), size)
            )
            data = data._replace(**{name: ends})
    found = Nearer(problem.with_data(data), point, new_slack, torch.where(moved, reach, torch.nan), rows, upper, lower)
    return found._replace(point=ConicPoint(point.x, *found.without_forces(point)))


def _of_blocks(cones: Cones, values: Tensor, *, whole: bool) -> Tensor:
    """(B, m) for each row whether all rows of its cone are true, or the largest value of them."""
    if cones.is_polyhedral:
        return values
    blocks = from_numpy(np.asarray(cones.blocks)).to(values.device).expand(len(values), -1)
    start = torch.zeros(len(values), int(blocks.max()) + 1, dtype=torch.float64, device=values.device)
    found = start + 1.0 if whole else start
    found = found.scatter_reduce(1, blocks, values.double(), "amin" if whole else "amax").gather(1, blocks)
    return found.bool() if whole else found


def _inside(cones: Cones, slack: FloatArray) -> BoolArray:
    """(B, m) rows whose slack is deep inside its cone, as far as that is looked at: not in cones of three rows."""
    found: BoolArray = np.zeros(slack.shape, dtype=np.bool_)
    linear = cones.sections["nonnegative"]
    found[:, linear] = slack[:, linear] > 0.0
    start = cones.sections["second_order"].start
    for size in cones.second_order:
        rows = slice(start, start + size)
        t, u = slack[:, start], np.linalg.norm(slack[:, start + 1 : start + size], axis=1)
        found[:, rows] = (t - u > DEEP * t)[:, None]
        start += size
    for side in cones.semidefinite:
        rows = slice(start, start + svec_size(side))
        finite = np.logical_and.reduce(np.isfinite(slack[:, rows]), axis=1)
        values = np.linalg.eigvalsh(smat(np.where(finite[:, None], slack[:, rows], 0.0), side))
        deep: BoolArray = np.logical_and(finite, values[:, 0] > DEEP * values[:, -1])
        found[:, rows] = deep[:, None]
        start += svec_size(side)
    return found
