"""Minimisers of sums of penalties: Newton's method with safeguards, each element converging alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.nodes.base import Tilt
from lpgd.nodes.pooling.end import finish, slope_noise
from lpgd.nodes.pooling.penalties import PenaltyFunction, Slope, Sums, hessian

__all__ = ["Descent", "NumberSum", "Root", "VectorSum", "blocks", "descend", "find_root"]

BLOCK = 2**18
"""Numbers that are worked on at once on a CPU, where temporaries of this size stay in its cache."""
LIMIT = 200
"""Of iterations."""
QUICK = 50
"""Iterations after which a descent goes on with care."""


class Root(NamedTuple):
    """Minimisers u (B, d), iterations (B,) and whether they converged (B,)."""

    u: Tensor
    iterations: Tensor
    converged: Tensor


class Descent(NamedTuple):
    """Where a descent ended.

    Attributes:
        u, iterations, converged: as of :class:`Root`.
        value: (B,) the objective there, up to a constant.
        total: (B,) ``Σκ₁`` there.
        radius: (B,) how far around u the objective is convex for certain.
    """

    u: Tensor
    iterations: Tensor
    converged: Tensor
    value: Tensor
    total: Tensor
    radius: Tensor

    def improved(self, elements: Tensor, other: Descent) -> Descent:
        """The lower ones of these ends and of others of some elements, where iterations add up."""
        known = Descent(*(tensor[elements] for tensor in self))
        lower = other.value < known.value
        found = (
            torch.where(lower.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
            for new, old in zip(other, known, strict=True)
        )
        best = Descent(*found)._replace(iterations=known.iterations + other.iterations)
        return Descent(*(old.index_copy(0, elements, new) for old, new in zip(self, best, strict=True)))


class Step(NamedTuple):
    """What there is to know at a point.

    Attributes:
        value: (B,) the objective, up to a constant.
        slope: (B, d) its gradient.
        newton, mean: (B, d) the step of Newton's method, and that to the weighted mean.
        error: (B,) what Newton's step leaves of the distance to the minimiser, at most.
        curved: (B,) the objective is convex here, and not just so.
        total: (B,) ``Σκ₁``.
        radius: (B,) how far around this point the objective is convex for certain.
    """

    value: Tensor
    slope: Tensor
    newton: Tensor
    mean: Tensor
    error: Tensor
    curved: Tensor
    total: Tensor
    radius: Tensor


def blocks(x: Tensor, numbers: int = BLOCK) -> Iterator[slice]:
    """The elements of x in blocks of about so many numbers; on a GPU one block."""
    size = x.shape[0]
    step = size if x.is_cuda else max(1, numbers // max(1, x[0].numel()))
    for first in range(0, size, step):
        yield slice(first, min(first + step, size))


@dataclass(frozen=True, eq=False)
class NumberSum:
    """``Σ_i φ(u - x_i)`` of numbers, with the terms of LPGD.

    Args:
        penalty: φ.
        x: (B, N).
        tilt: with ``linear`` and ``center`` (B, 1), or None.
    """

    penalty: PenaltyFunction
    x: Tensor
    tilt: Tilt | None = None

    def slope(self, u: Tensor, elements: Tensor | None = None) -> Slope:
        """At u (R, 1), one for each of these elements (None is all), of a convex penalty."""
        slope, curvature = self._over_blocks(self.penalty.slope, u, elements)
        if self.tilt is None:
            return Slope(slope, curvature)
        linear, rho, center = _chosen(self.tilt, elements)
        return Slope(slope + linear + rho * (u - center), curvature + rho)

    def sums(self, u: Tensor, elements: Tensor | None = None) -> Sums:
        """The same and more of a penalty that is not convex."""
        slope, curvature, total, value = self._over_blocks(self.penalty.sums, u, elements)
        if self.tilt is None:
            return Sums(slope, curvature, total, value)
        linear, rho, center = _chosen(self.tilt, elements)
        away = u - center
        value = value + linear * u + 0.5 * rho * away.square()
        return Sums(slope + linear + rho * away, curvature + rho, total + rho, value)

    def _over_blocks(
        self, function: Callable[[Tensor], Sequence[Tensor]], u: Tensor, elements: Tensor | None
    ) -> list[Tensor]:
        found = []
        for block in blocks(self.x[: len(u)]):
            x = self.x[block] if elements is None else self.x[elements[block]]
            found.append(function(u[block] - x))
        return [torch.cat(pieces) for pieces in zip(*found, strict=True)]

    def at(self, elements: Tensor) -> NumberSum:
        """Those of some elements, without the terms of LPGD."""
        return NumberSum(self.penalty, self.x[elements])

    def median_beyond(self, u: Tensor, radius: Tensor) -> Tensor:
        """Elements whose median is farther from u (B, 1) than the radius (B,), by counting: faster than medians."""
        below, within = [], []
        for block in blocks(self.x):
            points, middle, reach = self.x[block], u[block], radius[block, None]
            count = torch.empty_like(points)
            below.append(torch.lt(points, middle - reach, out=count).sum(-1))
            within.append(torch.le(points, middle + reach, out=count).sum(-1))
        rank = (self.x.shape[-1] - 1) // 2
        return rows_where((torch.cat(below) > rank) | (torch.cat(within) <= rank))

    def step(self, u: Tensor, elements: Tensor | None = None) -> Step:
        slope, curvature, total, value = self.sums(u, elements)
        mean = -slope / total.clamp(min=torch.finfo(u.dtype).eps * self.penalty.curvature)
        fine = curvature > 1e-3 * total
        newton = torch.where(fine, -slope / torch.where(fine, curvature, 1), mean)
        error = torch.where(fine, self.error(newton, curvature), newton.abs())
        bound = self.penalty.third * self.x.shape[-1]
        radius = curvature.clamp(min=0) / bound if bound else torch.zeros_like(u)
        return Step(value[:, 0], slope, newton, mean, error[:, 0], fine[:, 0], total[:, 0], radius[:, 0])

    def error(self, newton: Tensor, curvature: Tensor) -> Tensor:
        """(B, 1) what a Newton step leaves at most: its square, times the third derivative over twice the second."""
        if not self.penalty.is_smooth:
            return newton.abs()
        return 0.5 * self.penalty.third * self.x.shape[-1] * newton.square() / curvature

    def chosen(self, elements: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tilt | None]:
        """The points (R, N, 1) of some elements, u itself, and their terms of LPGD."""
        return self.x[elements][..., None], u, None if self.tilt is None else _chosen(self.tilt, elements)

    def slope_noise(self, u: Tensor, elements: Tensor) -> Tensor:
        """(R,) a rounding error of the slope at u (R, 1), without that of the terms of LPGD."""
        x = self.x[elements][..., None]
        return slope_noise(self.penalty.terms((u - x[..., 0]).square()).first, u, x)

    def noise(self, u: Tensor) -> Tensor:
        """(B, 1) what rounding moves a minimiser by: that of N slopes, which are at most ``|z|`` and about α."""
        lengths = [linalg.vector_norm(u[block] - self.x[block], dim=-1, keepdim=True) for block in blocks(self.x)]
        count, eps = self.x.shape[-1], torch.finfo(u.dtype).eps
        return 4 * eps / count**0.5 * (torch.cat(lengths) / count**0.5).clamp(max=self.penalty.alpha)


def _chosen(tilt: Tilt, elements: Tensor | None) -> Tilt:
    return tilt if elements is None else Tilt(tilt.linear[elements], tilt.rho, tilt.center[elements])


@dataclass(frozen=True, eq=False)
class VectorSum:
    """``Σ_i φ(|u - x_i|)`` of vectors, with the terms of LPGD.

    Args:
        penalty: φ.
        x: (B, N, d).
        tilt: with ``linear`` and ``center`` (B, d), or None.
    """

    penalty: PenaltyFunction
    x: Tensor
    tilt: Tilt | None = None

    def at(self, elements: Tensor) -> VectorSum:
        """Those of some elements, without the terms of LPGD."""
        return VectorSum(self.penalty, self.x[elements])

    def median_beyond(self, u: Tensor, radius: Tensor) -> Tensor:
        """Elements whose median is farther from u (B, d) than the radius (B,)."""
        return rows_where((self.x.median(1).values - u).abs().amax(-1) > radius)

    def step(self, u: Tensor, elements: Tensor | None = None) -> Step:
        """At u (R, d), one for each of these elements; None is all."""
        x = self.x if elements is None else self.x[elements]
        z = u[:, None] - x
        square = z.square().sum(-1)
        terms = self.penalty.terms(square)
        value, total = self.penalty.value(square).sum(-1), terms.first.sum(-1, keepdim=True)
        slope = (terms.first[:, None] @ z)[:, 0]
        rho = 0.0
        if self.tilt is not None:
            linear, rho, center = _chosen(self.tilt, elements)
            away = u - center
            value = value + (linear * u).sum(-1) + 0.5 * rho * away.square().sum(-1)
            slope = slope + linear + rho * away
        # The tiny part keeps points that are outliers to all others where they are.
        mean = -slope / (total + rho).clamp(min=torch.finfo(x.dtype).eps)
        unit = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        factor, failed = linalg.cholesky_ex(hessian(z, terms) + rho * unit)
        pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1, keepdim=True)
        fine = (failed == 0)[:, None] & (pivot > 0.03 * (total + rho).sqrt())
        factor = torch.where(fine[..., None], factor, unit)
        newton = torch.where(fine, -torch.cholesky_solve(slope[..., None], factor)[..., 0], mean)
        # Newton's error is about the square of its step over α, where the penalty has no kinks.
        length = linalg.vector_norm(newton, dim=-1)
        error = 10 / self.penalty.alpha * length**2 if self.penalty.is_smooth else length
        return Step(value, slope, newton, mean, error, fine[:, 0], total[:, 0], torch.zeros_like(value))

    def chosen(self, elements: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tilt | None]:
        """The points (R, N, d) of some elements, u itself, and their terms of LPGD."""
        return self.x[elements], u, None if self.tilt is None else _chosen(self.tilt, elements)

    def slope_noise(self, u: Tensor, elements: Tensor) -> Tensor:
        """(R,) a rounding error of the slope at u (R, d), without that of the terms of LPGD."""
        x = self.x[elements]
        return slope_noise(self.penalty.terms((u[:, None] - x).square().sum(-1)).first, u, x)

    def noise(self, u: Tensor) -> Tensor:
        """(B, 1) zero: only rounding of u counts."""
        return torch.zeros_like(u[:, :1])


def descend(function: NumberSum | VectorSum, u: Tensor) -> Descent:
    """A local minimiser near u (B, d): Newton steps, which a weighted mean replaces where they do not descend.

    What is no sure end, as its curvature is none or its slope is not zero to rounding, is left to :func:`finish`.
    """
    size = len(u)
    zero = torch.zeros(size, dtype=torch.int64, device=u.device)
    ends = Descent(u.clone(), zero, zero.to(torch.bool), u.new_full((size,), torch.inf), *u.new_zeros(2, size))
    elements = torch.arange(size, device=u.device)
    eps, noise = torch.finfo(u.dtype).eps, function.noise(u)[:, 0]

    def step(u: Tensor, elements: Tensor) -> Step:
        return function.step(u, None if len(elements) == size else elements)

    current = step(u, elements)
    for _ in range(QUICK):
        length, size_of_u = current.newton.abs().amax(-1), u.abs().amax(-1).clamp(min=torch.finfo(u.dtype).tiny)
        small = (length <= 4 * eps * size_of_u) | (current.error <= eps * size_of_u + noise)
        flat = (current.slope == 0).all(-1)
        ended = small | flat
        if ended.any():
            ended_elements, left = elements[ended], ~ended
            ends.u[ended_elements], ends.value[ended_elements] = (u + current.newton)[ended], current.value[ended]
            ends.converged[ended_elements] = (current.curved | (flat & (current.total == 0)))[ended]
            ends.total[ended_elements] = current.total[ended]
            ends.radius[ended_elements] = (current.radius - length)[ended]
            elements, u, noise, *fields = (tensor[left] for tensor in (elements, u, noise, *current))
            current = Step(*fields)
        if not len(elements) or is_over():
            break
        ends.iterations[elements] += 1
        value, slope, newton, mean, *_ = current
        new = step(u + newton, elements)
        # Within the noise of the objective a smaller slope decides.
        precise = (newton * slope).sum(-1).abs() <= 10 * eps * value.abs()
        less = new.slope.abs().amax(-1) <= 0.5 * slope.abs().amax(-1)
        good = torch.where(precise, less, new.value < value)
        ended = precise & ~less
        other = rows_where(~good & ~ended)
        u = torch.where(good[:, None], u + newton, u)
        current = Step(
            *(
                torch.where(good.reshape(-1, *(1,) * (new_values.ndim - 1)), new_values, old_values)
                for new_values, old_values in zip(new, current, strict=True)
            )
        )
        if len(other):
            u[other] += mean[other]
            for values, fallback in zip(current, step(u[other], elements[other]), strict=True):
                values[other] = fallback
        if ended.any():
            place = rows_where(ended)
            current.newton[place] = 0
            rounding = function.slope_noise(u[place], elements[place])
            current.curved[place] &= current.slope[place].abs().amax(-1) <= 4 * rounding
    ends.u[elements] = u
    doubtful = rows_where(~ends.converged)
    if len(doubtful):
        end = finish(function.penalty, *function.chosen(doubtful, ends.u[doubtful]))
        last = function.step(end.u, doubtful)
        ends.u[doubtful], ends.converged[doubtful] = end.u, end.converged
        ends.iterations[doubtful] += end.iterations
        ends.value[doubtful], ends.total[doubtful], ends.radius[doubtful] = last.value, last.total, last.radius
    return ends


def find_root(function: NumberSum, u: Tensor) -> Root:
    """The minimiser of a convex sum of numbers, from u (B, 1): its slope's root by Newton's method within a bracket.

    No step reads the objective.  A Newton step that leaves the bracket, or is not half as long as the step before it,
    gives way to the middle of the bracket.
    """
    size, eps, noise = len(u), torch.finfo(u.dtype).eps, function.noise(u)
    whole, iterations = u.clone(), torch.zeros(size, dtype=torch.int64, device=u.device)
    converged = torch.zeros(size, dtype=torch.bool, device=u.device)
    elements = torch.arange(size, device=u.device)
    if function.tilt is None:
        low, high = function.x.amin(-1, keepdim=True), function.x.amax(-1, keepdim=True)
    else:
        low, high = torch.full_like(u, -torch.inf), torch.full_like(u, torch.inf)
    move = torch.full_like(u, torch.inf)
    for _ in range(LIMIT):
        slope, curvature = function.slope(u, None if len(elements) == size else elements)
        low, high = torch.where(slope < 0, u, low), torch.where(slope > 0, u, high)
        newton = (-slope / curvature).nan_to_num(0.0, torch.inf, -torch.inf)
        length, tolerance = newton.abs(), 2 * eps * u.abs() + noise
        # Steps over many kinks say nothing: where u has no more digits than α has, the bracket decides.
        near = tolerance.clamp(max=0.01 * function.penalty.alpha)
        last = function.error(newton, curvature) <= near
        stalled = (length > 0.5 * move) & (length <= 64 * near)
        ended = (last | stalled | (slope == 0) | (high - low <= tolerance))[:, 0]
        if ended.any():
            ended_elements, left = elements[ended], ~ended
            whole[ended_elements], converged[ended_elements] = torch.clamp(u + newton, low, high)[ended], True
            state = (elements, u, slope, newton, length, low, high, move, noise)
            elements, u, slope, newton, length, low, high, move, noise = (tensor[left] for tensor in state)
        if not len(elements) or is_over():
            break
        iterations[elements] += 1
        to = u + newton
        good = torch.isfinite(newton) & (to >= low) & (to <= high) & (length <= 0.5 * move)
        if not good.all():
            bounded = torch.isfinite(high - low)
            # Without a bracket, which only a tilt leaves open, ever longer steps.
            away = u - slope.sign() * torch.where(torch.isfinite(move), 2 * move, function.penalty.alpha)
            to = torch.where(good, to, torch.where(bounded, low + 0.5 * (high - low), away))
        move, u = (to - u).abs(), to
    whole[elements] = u
    return Root(whole, iterations, converged)
