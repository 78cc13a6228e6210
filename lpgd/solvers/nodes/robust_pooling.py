"""Robust pooling ([DDN] Table 2): the value, or vector, nearest to all others by a penalty that bounds outliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lpgd.problems.node import BaseNode, NodeAnswer, Tilt
from lpgd.status import Status

__all__ = ["Penalty", "RobustPooling"]

Penalty = Literal["quadratic", "pseudo_huber", "huber", "welsch", "truncated_quadratic"]

CONVEX = ("quadratic", "pseudo_huber", "huber")
SMOOTH = ("quadratic", "pseudo_huber", "welsch")


class _Terms(NamedTuple):
    """Of squared distances: ``φ``, ``κ₁ = φ'/z`` and ``κ₂ = (φ'' - φ'/z)/z²``, without a division by z."""

    value: Tensor
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class RobustPooling(BaseNode):
    """``y = argmin_u Σ_i φ(|u - x_i|)`` over dimensions of a tensor, for numbers x_i or for vectors.

    Args:
        penalty: φ, with the scale α:

            ========================  ===========================================
            ``quadratic``             z²/2, the mean
            ``pseudo_huber``          α² (√(1 + z²/α²) - 1)
            ``huber``                 z²/2 up to α, then α (|z| - α/2)
            ``welsch``                1 - exp(-z²/2α²), not convex
            ``truncated_quadratic``   z²/2 up to α, then α²/2, not convex
            ========================  ===========================================
        alpha: α > 0.
        dim: the dimensions that are pooled, as of the tensor that the layer is called with; they vanish.
        vector_dim: the dimension of vectors, which comes last in the result; None pools numbers.

    With ``κ₁ = φ'/z`` and ``κ₂ = (φ'' - φ'/z)/z²`` at ``z_i = u - x_i``, ``H = Σ κ₁ I + κ₂ z zᵀ``; of numbers ``Σφ''``:

        v·Dy/Dx_i = (κ₁ I + κ₂ z_i z_iᵀ) H⁻¹ v,   of numbers  φ''(z_i) v / Σφ''

    which can be negative for Welsch.  Where H is singular (flat objectives, such as Huber's between two distant
    groups) the derivative is that of the weighted mean with weights κ₁.

    Solved by Newton steps that a weighted mean replaces where they do not descend, O(n) each.  What is not convex
    starts from mean and median, a warm start in addition (and where those are out of reach of all points, from the
    point nearest to the median), and the best end is kept; truncated quadratics of numbers are solved
    exactly, by sorting.

    [DDN] Gould, Hartley, Campbell: Deep Declarative Networks (arXiv 1909.04866).
    """

    penalty: Penalty = "huber"
    alpha: float = 1.0
    dim: int | tuple[int, ...] = -1
    vector_dim: int | None = None

    name = "RobustPooling"
    input_names = ("x",)

    def __post_init__(self) -> None:
        if self.penalty not in get_args(Penalty):
            raise ValueError(f"penalty is {self.penalty!r}; it must be one of {', '.join(get_args(Penalty))}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be positive and finite.")
        object.__setattr__(self, "dim", (self.dim,) if isinstance(self.dim, int) else tuple(self.dim))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that are pooled."""
        return (self.dim,) if isinstance(self.dim, int) else self.dim

    @property
    def input_ndims(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return (len(self.dims) + (self.vector_dim is not None),)

    def arrange(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Move what is pooled, and then the vectors, to the end.

        Raises:
            ValueError: there are no such dimensions, or one is named twice.
        """
        x = inputs[0]
        moved = [*self.dims, *([] if self.vector_dim is None else [self.vector_dim])]
        places = [place + x.ndim if place < 0 else place for place in moved]
        if len(set(places)) < len(places) or not all(0 <= place < x.ndim for place in places):
            raise ValueError(f"x has {x.ndim} dimensions; dim={self.dim} and vector_dim={self.vector_dim} do not fit.")
        return (x.movedim(places, list(range(-len(places), 0))),)

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        pooled = shapes[0][: len(self.dims)]
        if not math.prod(pooled):
            raise ValueError(f"the pooled dimensions of x have sizes {pooled}: there is nothing to pool.")
        return shapes[0][len(self.dims) :]

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return self._terms(_squares(self._differences(y, inputs[0]))).value.sum(-1)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        x = self._points(inputs[0])
        known = None if start is None else start.reshape(x.shape[0], x.shape[-1])
        if self.penalty == "truncated_quadratic" and x.shape[-1] == 1:
            u = self._exact(x[..., 0])[:, None]
            iterations, converged = torch.zeros(x.shape[0], dtype=torch.int64), torch.ones(x.shape[0], dtype=torch.bool)
            return self._answer(inputs[0], u, iterations, converged)
        starts = [x.mean(1)] if known is None or self.penalty == "quadratic" else [known]
        if self.penalty not in CONVEX:
            starts = [x.mean(1), x.median(1).values, *([] if known is None else [known])]
        best, fall, iterations, done = self._descend(x, starts[0], None)
        for begin in starts[1:]:
            best, fall, iterations, done = _better((best, fall, iterations, done), self._descend(x, begin, None))
        if self.penalty not in CONVEX:
            # Where neither has any point within reach, the objective is flat: from the point that is nearest to it.
            weight = self._terms((best[:, None] - x).square().sum(-1)).first.sum(-1)
            rows = (weight < 0.5 * float(self._terms(x.new_zeros(())).first)).nonzero()[:, 0]
            if len(rows):
                distance = (x[rows] - starts[1][rows][:, None]).square().sum(-1)
                nearest = x[rows, distance.argmin(-1)]
                found = _better(
                    (best[rows], fall[rows], iterations[rows], done[rows]), self._descend(x[rows], nearest, None)
                )
                for own, new in zip((best, fall, iterations, done), found, strict=True):
                    own[rows] = new
        return self._answer(inputs[0], best, iterations, done)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        """The minimiser near the start."""
        x = self._points(inputs[0])
        size, d = x.shape[0], x.shape[-1]
        flat = Tilt(tilt.linear.reshape(size, d), tilt.rho, tilt.center.reshape(size, d))
        begin = x.mean(1) if start is None else start.reshape(size, d)
        u, _, iterations, converged = self._descend(x, begin, flat)
        return self._answer(inputs[0], u, iterations, converged)

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        z = self._differences(y, inputs[0])
        v = cotangent.reshape(z.shape[0], z.shape[-1])
        terms = self._terms(_squares(z))
        size = torch.finfo(z.dtype).eps * terms.first.abs().sum(-1)
        if z.shape[-1] == 1:
            weights = terms.first + terms.second * z[..., 0].square()
            total = weights.sum(-1)
            flat = (total.abs() <= 100 * size)[:, None]
            weights = torch.where(flat, terms.first, weights)
            total = weights.sum(-1, keepdim=True)
            gradient = torch.where(total != 0, weights * v / total, 0)
        else:
            hessian = _hessian(z, terms)
            values = torch.linalg.eigvalsh(hessian)
            flat = (values.abs().amin(-1) <= 100 * size)[:, None]
            unit = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
            total = terms.first.sum(-1)
            mean = torch.where(total > 0, total, 1)[:, None, None] * unit
            s = torch.linalg.solve(torch.where(flat[..., None], mean, hessian), v)[:, None]
            second = torch.where(flat, 0, terms.second)
            gradient = terms.first[..., None] * s + (second * (z * s).sum(-1))[..., None] * z
        return (gradient.reshape(inputs[0].shape),)

    # -- the penalty ---------------------------------------------------------------------------------------------------

    def _terms(self, square: Tensor) -> _Terms:
        a = self.alpha
        inside = square <= a**2
        if self.penalty == "quadratic":
            return _Terms(0.5 * square, torch.ones_like(square), torch.zeros_like(square))
        if self.penalty == "pseudo_huber":
            root = (1 + square / a**2).sqrt()
            # √(1 + t) - 1 = t / (√(1 + t) + 1), which keeps the digits of small distances.
            return _Terms(square / (root + 1), 1 / root, -1 / (a**2 * root**3))
        if self.penalty == "welsch":
            decay = (-0.5 * square / a**2).exp()
            return _Terms(-torch.expm1(-0.5 * square / a**2), decay / a**2, -decay / a**4)
        if self.penalty == "truncated_quadratic":
            kept = inside.to(square.dtype)
            return _Terms(torch.where(inside, 0.5 * square, 0.5 * a**2), kept, torch.zeros_like(square))
        distance = torch.where(inside, a**2, square).sqrt()
        value = torch.where(inside, 0.5 * square, a * (distance - 0.5 * a))
        return _Terms(value, torch.where(inside, 1, a / distance), torch.where(inside, 0, -a / distance**3))

    def _points(self, x: Tensor) -> Tensor:
        """(B, N, d)."""
        d = 1 if self.vector_dim is None else x.shape[-1]
        return x.reshape(x.shape[0], -1, d)

    def _differences(self, y: Tensor, x: Tensor) -> Tensor:
        """``u - x_i``, (B, N, d)."""
        points = self._points(x)
        return y.reshape(y.shape[0], 1, points.shape[-1]) - points

    # -- the solvers ---------------------------------------------------------------------------------------------------

    def _descend(self, x: Tensor, u: Tensor, tilt: Tilt | None) -> _Descent:
        """A local minimiser (B, d) near u, its objective, iterations, and whether it converged."""
        size = x.shape[0]
        whole, values = u.clone(), u.new_full((size,), torch.inf)
        counts = torch.zeros(size, dtype=torch.int64, device=x.device)
        converged = torch.zeros(size, dtype=torch.bool, device=x.device)
        rows = torch.arange(size, device=x.device)
        eps = torch.finfo(x.dtype).eps
        value, slope, newton, mean = self._step(x, u, tilt)
        for _ in range(200):
            small = newton.abs().amax(-1) <= 4 * eps * u.abs().amax(-1).clamp(min=torch.finfo(u.dtype).tiny)
            # Newton's error is the square of its step over α, where the penalty has no kinks: such a step is the last.
            reach = 0.1 * eps * self.alpha * u.abs().amax(-1)
            last = newton.square().sum(-1) <= (reach if self.penalty in SMOOTH else 0)
            ended = small | last | (slope == 0).all(-1)
            if ended.any():
                done = rows[ended]
                whole[done], values[done], converged[done] = (u + newton)[ended], value[ended], True
                left = ~ended
                rows, x, u, value, slope, newton, mean = (
                    part[left] for part in (rows, x, u, value, slope, newton, mean)
                )
                tilt = None if tilt is None else Tilt(tilt.linear[left], tilt.rho, tilt.center[left])
            if not len(rows):
                break
            counts[rows] += 1
            noise = 10 * eps * value.abs()
            new = self._step(x, u + newton, tilt)
            # Within the noise of the objective a smaller slope decides.
            precise = (newton * slope).sum(-1).abs() <= noise
            less = new[1].abs().amax(-1) <= 0.5 * slope.abs().amax(-1)
            good = torch.where(precise, less, new[0] < value)
            ended = precise & ~less
            other = (~good & ~ended).nonzero()[:, 0]
            u = torch.where(good[:, None], u + newton, u)
            value, slope, newton, mean = (
                torch.where(good.reshape(-1, *(1,) * (part.ndim - 1)), part, own)
                for part, own in zip(new, (value, slope, newton, mean), strict=True)
            )
            if len(other):
                part = None if tilt is None else Tilt(tilt.linear[other], tilt.rho, tilt.center[other])
                u[other] = u[other] + mean[other]
                for own, row in zip((value, slope, newton, mean), self._step(x[other], u[other], part), strict=True):
                    own[other] = row
            newton = torch.where(ended[:, None], 0, newton)
        whole[rows], values[rows] = u, value
        return whole, values, counts, converged

    def _step(self, x: Tensor, u: Tensor, tilt: Tilt | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """At u: the objective, its slope, the step of Newton's method and that to the weighted mean."""
        z = u[:, None] - x
        terms = self._terms(_squares(z))
        value, total = terms.value.sum(-1), terms.first.sum(-1, keepdim=True)
        slope = (terms.first[:, None] @ z)[:, 0]
        rho = 0.0 if tilt is None else tilt.rho
        if tilt is not None:
            away = u - tilt.center
            value = value + (tilt.linear * u).sum(-1) + 0.5 * rho * away.square().sum(-1)
            slope = slope + tilt.linear + rho * away
        # The tiny part keeps points that are outliers to all others where they are.
        mean = -slope / (total + rho).clamp(min=torch.finfo(x.dtype).eps)
        if x.shape[-1] == 1:
            curvature = total + (terms.second * z[..., 0].square()).sum(-1, keepdim=True) + rho
            fine = curvature > 1e-3 * (total + rho)
            newton = torch.where(fine, -slope / torch.where(fine, curvature, 1), mean)
        else:
            unit = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            factor, failed = torch.linalg.cholesky_ex(_hessian(z, terms) + rho * unit)
            pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1, keepdim=True)
            fine = (failed == 0)[:, None] & (pivot > 0.03 * (total + rho).sqrt())
            factor = torch.where(fine[..., None], factor, unit)
            newton = torch.where(fine, -torch.cholesky_solve(slope[..., None], factor)[..., 0], mean)
        return value, slope, newton, mean

    def _exact(self, x: Tensor) -> Tensor:
        """(B,) global minimisers of truncated quadratics of numbers (B, N).

        In sorted order the points within α of u are a window, whose best u is their mean.  The window changes where u
        passes some ``x_i - α``, which lets x_i in, or ``x_i + α``, which lets it out: 2N windows in all.
        """
        x = x.sort(-1).values
        middle = x[:, x.shape[-1] // 2, None]
        x = (x - middle).contiguous()
        starts = torch.searchsorted(x, x - 2 * self.alpha)
        stops = torch.searchsorted(x, x + 2 * self.alpha, right=True)
        places = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
        low, high = torch.cat([places + 1, starts], -1), torch.cat([stops, places + 1], -1)
        zero = x.new_zeros(x.shape[0], 1)
        sums, squares = (torch.cat([zero, part.cumsum(-1)], -1) for part in (x, x.square()))
        count = (high - low).to(x.dtype)
        total = sums.gather(-1, high) - sums.gather(-1, low)
        square = squares.gather(-1, high) - squares.gather(-1, low)
        cost = 0.5 * (square - total.square() / count.clamp(min=1)) - 0.5 * self.alpha**2 * count
        best = cost.argmin(-1, keepdim=True)
        low, high = low.gather(-1, best), high.gather(-1, best)
        inside = (places >= low) & (places < high)
        # The mean again, without the rounding of running sums.
        return (torch.where(inside, x, 0).sum(-1, keepdim=True) / (high - low) + middle)[:, 0]

    def _answer(self, x: Tensor, u: Tensor, iterations: Tensor, converged: Tensor) -> NodeAnswer:
        statuses = [Status.SOLVED if fine else Status.ITERATION_LIMIT for fine in converged.tolist()]
        return NodeAnswer(u.reshape(x.shape[0], *self.variable_shape(tuple(x.shape[1:]))), statuses, iterations)


_Descent = tuple[Tensor, Tensor, Tensor, Tensor]
"""A minimiser (B, d), its objective, iterations, and whether it converged."""


def _better(one: _Descent, other: _Descent) -> _Descent:
    """The lower of two ends, element by element; iterations add up."""
    (u, value, iterations, done), better = one, other[1] < one[1]
    return (
        torch.where(better[:, None], other[0], u),
        torch.where(better, other[1], value),
        iterations + other[2],
        torch.where(better, other[3], done),
    )


def _squares(z: Tensor) -> Tensor:
    """(B, N) squared distances of (B, N, d)."""
    return z[..., 0].square() if z.shape[-1] == 1 else z.square().sum(-1)


def _hessian(z: Tensor, terms: _Terms) -> Tensor:
    """``Σ κ₁ I + κ₂ z zᵀ``: (B, d, d)."""
    unit = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return terms.first.sum(-1)[:, None, None] * unit + (terms.second[..., None] * z).mT @ z
