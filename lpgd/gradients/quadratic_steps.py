"""Given steps of quadratic programs with a definite P, from the factors that the forward pass has left.

As long as no active set changes within the step τ, ``(∇_w L(z_{+τ}) - ∇_w L(z_{-τ})) / 2τ`` is the gradient along the
response to the tilt itself, whatever τ: one system, and the distance to the first change.  Where an active set changes,
the ends of the step are worked out from the solution.  No tilted problem is made for it, and no solution of one; what
:mod:`lpgd.gradients.perturbed` asks of any perturbed solutions is asked of the changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, from_numpy, integers
from lpgd.gradients.base import GradientInfo, relevant_elements
from lpgd.gradients.sides import FINEST, JUMP, NOISE, SIDES, TINY_TILT
from lpgd.problems.base import Point
from lpgd.problems.conic.activity import shares_multipliers
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicPoint
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.solvers.conic.convexity import is_definite
from lpgd.solvers.kkt.tilts import TiltedSolutions
from lpgd.solvers.perturbed_points import ROUNDING, PerturbedPoints

if TYPE_CHECKING:
    from lpgd.gradients.lpgd import LPGD

__all__ = ["QuadraticSteps", "quadratic_steps"]


@dataclass(frozen=True, eq=False)
class QuadraticSteps:
    """The gradients of elements whose steps were found here, zero for the others.

    Attributes:
        gradient: of the whole batch's data.
        elements: (k,) those that were found, increasing.
        is_whole: whether these are all elements of the batch.
        tau, unit, moved, crossed: (k,), see :class:`~lpgd.gradients.base.GradientInfo`.
        sides: how many ends a step has.
        tolerance: to which the ends are known; no solver was asked.
    """

    gradient: ConicData
    elements: Tensor
    is_whole: bool
    tau: Tensor
    unit: Tensor
    moved: Tensor
    crossed: Tensor
    sides: int
    tolerance: float

    def without(self, cotangent: Point) -> Any:
        """The cotangent of the elements that are left, zero for those that were found."""
        mask = torch.ones(cotangent.x.shape[0], 1, dtype=torch.bool)
        mask[self.elements] = False
        return cotangent._make(torch.where(mask, tensor, 0.0) for tensor in cotangent)

    def add_to(self, info: GradientInfo) -> None:
        """Put the elements that were found on a record, of the others or a blank one."""
        for name in ("tau", "unit", "moved", "crossed"):
            whole = getattr(info, name)
            whole[self.elements] = getattr(self, name).to(whole.dtype)
        assert info.newton is not None
        info.newton[self.elements] = self.sides
        if info.iterations is None:
            info.tolerance, info.iterations = self.tolerance, np.zeros(len(info.used), dtype=np.int64)
        method = cast(Any, info.method)
        for element in integers(self.elements):
            info.used[element] = method.envelope


def quadratic_steps(method: LPGD, solution: AnySolution, cotangent: Point, solver: AnySolver) -> QuadraticSteps | None:
    """The gradients of those elements of a batch whose steps are found here, None where there are none.

    Args:
        method: LPGD.
        solution: of B elements.
        cotangent: (B, ·) each.
        solver: of the perturbed problems, which is not asked.
    """
    if method.tau is None or method.rho or method.loss is not None or not isinstance(solution, ConicSolution):
        return None
    whole, tilt = solution, cast(ConicPoint, cotangent)
    if not whole.problem.structure.quadratic.nnz or not (elements := relevant_elements(whole, tilt)):
        return None
    places = torch.tensor(elements)
    if is_part := len(elements) < whole.batch_size:
        solution, tilt = whole.select(places), tilt.select(places)
    problem = solution.problem
    tau, unit = method.steps(method.tau, tilt), problem.tilt_unit(solution.point, tilt)
    near = PerturbedPoints.of(solution, problem, tilt, unit, solver)
    if near is None or near.straight is None:
        return None
    change = _change(solution, near, near.straight, tau, SIDES[method.envelope])
    done = change.done
    if not done.any():
        return None
    moved, crossed = from_numpy(change.moved), from_numpy(change.crossed)
    gradient = problem.bilinear_gradient(*change.of_all(done))
    if is_part:
        gradient = whole.problem.scatter(places, gradient)
    if not done.all():
        chosen = from_numpy(np.flatnonzero(done))
        places, tau, unit, moved, crossed = (tensor[chosen] for tensor in (places, tau, unit, moved, crossed))
    is_whole, sides = places.shape[0] == whole.batch_size, len(SIDES[method.envelope])
    tolerance = min(solver.tolerance, ROUNDING)
    return QuadraticSteps(gradient, places, is_whole, tau, unit, moved, crossed, sides, tolerance)


class _Arrays(NamedTuple):
    """A point, or a change of one, as arrays (E, ·)."""

    x: FloatArray
    y: FloatArray
    z: FloatArray

    @classmethod
    def of(cls, point: ConicPoint) -> _Arrays:
        return cls(*(tensor.numpy() for tensor in point))


class _Change(NamedTuple):
    """What the ends of E steps are worth in the data.

    Attributes:
        dx, dy: (E, ·) differences over the step, and ``x``, ``y`` the middle.
        d_lower, d_upper: (E, n) the gradient of the bounds.
        done, moved, crossed: (E,) which elements have one; whether x moves, and an active set changes.
    """

    dx: FloatArray
    dy: FloatArray
    x: FloatArray
    y: FloatArray
    d_lower: FloatArray
    d_upper: FloatArray
    done: BoolArray
    moved: BoolArray
    crossed: BoolArray

    def of_all(self, done: BoolArray) -> Iterator[Tensor]:
        """``dx, dy, x, y, d_lower, d_upper``, with nothing of those that are not done."""
        whole = bool(done.all())
        for name, values in zip(self._fields[:6], self[:6], strict=True):
            kept = whole or name in ("x", "y")
            yield from_numpy(values if kept else np.where(done[:, None], values, 0.0))


def _change(
    solution: ConicSolution, near: PerturbedPoints, straight: TiltedSolutions, tau: Tensor, signs: tuple[float, ...]
) -> _Change:
    """The ends of steps τ (E,), and which of them are known."""
    problem, units = solution.problem, near.units
    step, sides, point = tau.numpy(), len(signs), _Arrays.of(solution.point)
    inside = straight.change()
    change = _Arrays.of(units.point_out(problem, inside))
    wanted = (near.fit & near.fine & straight.regular & (tau <= near.longest) & is_definite(problem)).numpy()
    accepted = near.accepted(tau, from_numpy(straight.size)).numpy()
    unchanged = straight.is_straight(step)
    done = wanted & unchanged & (step * straight.direction.error + straight.error <= accepted)
    known = np.maximum(near.known.numpy(), FINEST)
    noise, largest_x = NOISE * known * (1.0 + straight.largest_distance), _largest(straight.x)
    span, reach = sides * step * _largest(inside.x.numpy()), step * _largest(change.x)
    (x, y, z), (dx, dy, dz), along = point, change, step[:, None]
    if (middle := sum(signs) / sides) != 0.0:
        x, y = x + 0.5 * middle * along * dx, y + 0.5 * middle * along * dy
    z_plus, z_minus = (z + sign * along * dz if sign in signs else z for sign in (1.0, -1.0))
    crossed, bent = np.zeros(tau.shape[0], dtype=np.bool_), wanted & ~unchanged
    if bent.any():
        steps = torch.cat([sign * tau for sign in signs])
        reached = straight.after(steps, from_numpy(np.tile(bent, sides)), from_numpy(np.tile(accepted, sides)))
        bent &= reached.solved.numpy().reshape(sides, -1).all(0)
        done |= bent
        unequal = reached.pieces.reshape(sides, len(step), -1) != straight.pieces
        distance = np.abs(straight.places(reached.point, reached.slack).reshape(unequal.shape) - straight.start)
        crossed = bent & (unequal & (distance > noise[:, None])).any((0, 2))
        fields = zip(*(tensor.split(len(step)) for tensor in reached.point), strict=True)
        ends = {sign: ConicPoint(*tensors) for sign, tensors in zip(signs, fields, strict=True)}
        span_x = [ends[sign].x.numpy() if sign in ends else straight.x for sign in (1.0, -1.0)]
        span = np.where(bent, _largest(span_x[0] - span_x[1]), span)
        plus, minus = (
            _Arrays.of(units.point_out(problem, ends[sign])) if sign in ends else point for sign in (1.0, -1.0)
        )
        reach = np.where(bent, np.maximum(_largest(plus.x - point.x), _largest(minus.x - point.x)), reach)
        weight, rows = 1.0 / (sides * along), bent[:, None]
        dx, dy = (
            np.where(rows, weight * (one - other), old)
            for one, other, old in ((plus.x, minus.x, dx), (plus.y, minus.y, dy))
        )
        x, y = (
            np.where(rows, 0.5 * (one + other), old) for one, other, old in ((plus.x, minus.x, x), (plus.y, minus.y, y))
        )
        z_plus, z_minus = np.where(rows, plus.z, z_plus), np.where(rows, minus.z, z_minus)
    moved = span > NOISE * known * (1.0 + largest_x)
    tilt, far = step / near.unit.numpy(), reach / (1.0 + _largest(point.x))
    # Whether far moves are jumps is for smaller steps to say; of multipliers that are not unique there is more to say.
    done &= ~((tilt <= TINY_TILT) & (far > JUMP) & (far > 10 * tilt)) & ~straight.is_overdetermined(noise)
    # Two rows that are one, both active, make a singular system: a look is for those that may be active or not.
    if any((np.abs(values) <= noise[:, None]).any() for values in straight.distances):
        active = solution.active_set(problem)
        assert active is not None, "there are no integers"
        at = problem.in_own_units(solution.point)
        of_rows, of_bounds = shares_multipliers(problem, active, from_numpy(noise), at.x)
        done &= ~(of_rows | of_bounds).numpy()
    d_lower = d_upper = z
    if problem.structure.has_bounds:
        weight = 1.0 / (sides * along)
        d_upper = weight * (np.maximum(z_minus, 0.0) - np.maximum(z_plus, 0.0))
        d_lower = weight * (np.maximum(-z_plus, 0.0) - np.maximum(-z_minus, 0.0))
    return _Change(dx, dy, x, y, d_lower, d_upper, done, moved, crossed)


def _largest(rows: FloatArray) -> FloatArray:
    """(E,) the maximum norm of each row."""
    return np.abs(rows).max(1, initial=0.0)
