"""The penalties of robust pooling ([DDN] Table 2): values and derivatives of φ(|z|), for numbers and for vectors z."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

__all__ = ["Penalty", "PenaltyFunction", "Slope", "Sums", "Terms", "hessian"]

Penalty = Literal["quadratic", "pseudo_huber", "huber", "welsch", "truncated_quadratic"]

LOG2_HALF_DECAY = -0.5 / math.log(2)
"""``exp(-t/2) = 2**(LOG2_HALF_DECAY t)``: torch 2.13 takes powers of two in a third of the time of exponentials."""


class Terms(NamedTuple):
    """Of squared distances: ``κ₁ = φ'/z`` and ``κ₂ = (φ'' - φ'/z)/z²``, without a division by z."""

    first: Tensor
    second: Tensor


class Slope(NamedTuple):
    """``Σφ'`` and ``Σφ''`` of differences ``z_i = u - x_i`` between numbers, (B, 1) each."""

    slope: Tensor
    curvature: Tensor


class Sums(NamedTuple):
    """``Σφ'``, ``Σφ''``, ``Σκ₁`` and, up to a constant, ``Σφ`` of such differences, (B, 1) each."""

    slope: Tensor
    curvature: Tensor
    total: Tensor
    value: Tensor


@dataclass(frozen=True)
class PenaltyFunction:
    """φ with the scale α; the table is that of :class:`~lpgd.nodes.RobustPooling`.

    Raises:
        ValueError: no such penalty, or α is not positive and finite.
    """

    name: Penalty
    alpha: float

    def __post_init__(self) -> None:
        if self.name not in get_args(Penalty):
            raise ValueError(f"penalty is {self.name!r}; it must be one of {', '.join(get_args(Penalty))}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be positive and finite.")

    @property
    def is_convex(self) -> bool:
        return self.name not in ("welsch", "truncated_quadratic")

    @property
    def is_smooth(self) -> bool:
        """φ'' has no jumps."""
        return self.name not in ("huber", "truncated_quadratic")

    @property
    def curvature(self) -> float:
        """``φ''(0) = κ₁(0)``, the largest value of both."""
        return self.alpha**-2 if self.name == "welsch" else 1.0

    @property
    def third(self) -> float:
        """A bound of ``|φ'''|`` where φ is smooth, rounded up: √(18 - 6√6) exp(√1.5 - 1.5) for Welsch with α = 1."""
        return {"pseudo_huber": 0.86 / self.alpha, "welsch": 1.39 / self.alpha**3}.get(self.name, 0.0)

    def value(self, square: Tensor) -> Tensor:
        """φ of squared distances."""
        a = self.alpha
        if self.name == "quadratic":
            return 0.5 * square
        if self.name == "pseudo_huber":
            # √(1 + t) - 1 = t / (√(1 + t) + 1), which keeps the digits of small distances.
            return square / ((1 + square / a**2).sqrt() + 1)
        if self.name == "welsch":
            return -torch.expm1(-0.5 / a**2 * square)
        if self.name == "truncated_quadratic":
            return 0.5 * square.clamp(max=a**2)
        inside = square <= a**2
        # The root of a distance of zero, which has no derivative, is not taken.
        distance = torch.where(inside, a**2, square).sqrt()
        return torch.where(inside, 0.5 * square, a * (distance - 0.5 * a))

    def difference(self, square: Tensor, change: Tensor) -> Tensor:
        """``φ(square + change) - φ(square)`` of squared distances, without cancellation."""
        a = self.alpha
        if self.name == "quadratic":
            return 0.5 * change
        if self.name == "welsch":
            before, move = -0.5 / a**2 * square, -0.5 / a**2 * change
            small = move.abs() < 1  # of large ones 0 ∞ would be NaN
            return torch.where(
                small, -before.exp() * torch.where(small, move, 0).expm1(), before.exp() - (before + move).exp()
            )
        after = (square + change).clamp(min=0)
        if self.name == "pseudo_huber":
            return change / ((1 + square / a**2).sqrt() + (1 + after / a**2).sqrt())
        inside, stays = square <= a**2, after <= a**2
        if self.name == "truncated_quadratic":
            return torch.where(inside & stays, 0.5 * change, 0.5 * (after.clamp(max=a**2) - square.clamp(max=a**2)))
        # φ is z²/2 less half the square of what |z| exceeds α by.
        roots = square.sqrt() + after.sqrt()
        excess = (after.sqrt() - a).clamp(min=0).square() - (square.sqrt() - a).clamp(min=0).square()
        linear = a * change / torch.where(roots > 0, roots, 1)
        return torch.where(inside | stays, 0.5 * (change - excess), linear)

    def terms(self, square: Tensor) -> Terms:
        """κ₁ and κ₂ of squared distances."""
        a = self.alpha
        if self.name == "quadratic":
            return Terms(torch.ones_like(square), torch.zeros_like(square))
        if self.name == "pseudo_huber":
            root = (1 + square / a**2).sqrt()
            return Terms(1 / root, -1 / (a**2 * root**3))
        if self.name == "welsch":
            decay = (-0.5 / a**2 * square).exp()
            return Terms(decay / a**2, -decay / a**4)
        inside = square <= a**2
        if self.name == "truncated_quadratic":
            return Terms(inside.to(square.dtype), torch.zeros_like(square))
        distance = torch.where(inside, a**2, square).sqrt()
        return Terms(torch.where(inside, 1, a / distance), torch.where(inside, 0, -a / distance**3))

    def second(self, z: Tensor) -> Tensor:
        """``φ''`` of numbers."""
        a = self.alpha
        if self.name == "quadratic":
            return torch.ones_like(z)
        if self.name == "pseudo_huber":
            root = (z * z * a**-2 + 1).rsqrt()
            return root * root * root
        if self.name == "welsch":
            square = z * z * a**-2
            return (LOG2_HALF_DECAY * square).exp2() * (1 - square) * a**-2
        return (z.abs() <= a).to(z.dtype)

    def slope(self, z: Tensor) -> Slope:
        """Sums over numbers (B, N) of a convex penalty in few passes over memory; z is overwritten."""
        a = self.alpha
        if self.name == "quadratic":
            return Slope(_sum(z), z.new_full((len(z), 1), z.shape[-1]))
        if self.name == "huber":
            slopes = z.clamp(-a, a)
            # Comparing into numbers: Booleans, and their sum, take five times as long.
            return Slope(_sum(slopes), _sum(torch.eq(slopes, z, out=z)))
        root = (z * z).mul_(a**-2).add_(1).rsqrt_()
        slope = _sum(z.mul_(root))
        return Slope(slope, _sum(torch.mul(root, root, out=z).mul_(root)))

    def sums(self, z: Tensor) -> Sums:
        """The same of a penalty that is not convex, with the sums that its descent needs in addition."""
        a = self.alpha
        if self.name == "welsch":
            square = z * z
            decay = torch.mul(square, LOG2_HALF_DECAY * a**-2).exp2_()
            weight = _sum(decay)
            total, slope = weight * a**-2, _sum(z.mul_(decay)) * a**-2
            return Sums(slope, total - _sum(square.mul_(decay)) * a**-4, total, -weight)
        kept = z.abs()
        total = _sum(torch.le(kept, a, out=kept))
        slope = _sum(kept.mul_(z))
        return Sums(slope, total, total, 0.5 * (_sum(kept.mul_(z)) - a**2 * total))


def hessian(z: Tensor, terms: Terms) -> Tensor:
    """``Σ κ₁ I + κ₂ z zᵀ`` of differences (B, N, d): (B, d, d)."""
    unit = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return terms.first.sum(-1)[:, None, None] * unit + (terms.second[..., None] * z).mT @ z


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1, keepdim=True)
