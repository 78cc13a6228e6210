"""What a gradient method may ask of a problem, whatever its class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor

__all__ = ["Centered", "PointOperations", "Problem", "is_surely_finite", "maximum_norm", "sum_of_quadratics"]


def is_surely_finite(tensor: Tensor) -> bool:
    """Whether the sum is finite, and with it every entry: NaN and infinity survive sums.

    Sums of finite numbers may overflow, so that False proves nothing.  This reads a tensor once and writes nothing,
    where ``torch.isfinite`` takes forty times as long.
    """
    return math.isfinite(float(tensor.detach().sum()))


def maximum_norm(rows: Tensor) -> Tensor:
    """The largest magnitude in each row, (..., n) to (...); 0 for empty rows."""
    return rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])


def sum_of_quadratics(rho: float, center: Tensor | None, more: float, other: Tensor) -> tuple[float, Tensor]:
    """``(ρ/2)|x - c|² + (ρ'/2)|x - c'|²`` as one such term, up to a constant; c is None where ρ is 0."""
    if center is None:
        return more, other
    return rho + more, (rho * center + more * other) / (rho + more)


class PointOperations:
    """What points of every class of problems can do: a mixin of named tuples of tensors (B, ·)."""

    __slots__ = ()

    def select(self, elements: Tensor) -> Self:
        """The rows of these elements."""
        return self._each(lambda part: part[elements])

    def where(self, chosen: Tensor, other: Self) -> Self:
        """This point for the elements ``chosen`` (B,), the other one elsewhere."""
        return self._each(lambda part, own: torch.where(chosen[:, None], part, own), other)

    def scaled(self, weight: Tensor) -> Self:
        """Each element times its ``weight`` (B,)."""
        return self._each(lambda part: weight[:, None] * part)

    def minus(self, other: Self) -> Self:
        """The difference of two points."""
        return self._each(torch.sub, other)

    def largest(self) -> Tensor:
        """(B,) the largest magnitude of an entry."""
        parts: Any = self
        return torch.stack([maximum_norm(part) for part in parts]).amax(0)

    def _each(self, function: Callable[..., Tensor], *others: Any) -> Self:
        parts: Any = self
        return type(self)(*map(function, parts, *others))


class Centered:
    """Problems that carry their augmentation as a term of its own: a mixin of dataclasses.

    Attributes:
        rho, center: the term ``(ρ/2) |x - center|²``; center is (B, n), or None for ρ = 0.
    """

    rho: float
    center: Tensor | None

    def augment(self, rho: float, center: Tensor) -> Self:
        """``L + (ρ/2) |x - center|²``, up to a constant.

        Args:
            rho: ρ ≥ 0, not scaled by any step.
            center: (B, n); its solution stays optimal if it is one of this problem.
        """
        if rho == 0.0:
            return self
        rho, center = sum_of_quadratics(self.rho, self.center, rho, center)
        return replace(cast(Any, self), rho=rho, center=center)

    def in_own_units(self, point: Any) -> Any:
        """The point itself: all variables have one unit."""
        return point


class Problem(Protocol):
    """A batch of saddle-point problems ``argmin_x max_y L(x, y; w)`` that can tell how it changes.

    Points, cotangents and tangents of the solution are one named tuple of tensors (B, ·), whose first field
    is the primal ``x``; data, and gradients and tangents of the data, are another one.
    """

    @property
    def can_tilt(self) -> bool: ...

    @property
    def can_augment(self) -> bool: ...

    @property
    def has_kkt(self) -> bool: ...

    @property
    def is_continuous(self) -> bool:
        """Whether small changes of the data can move solutions; those of an integer program jump, or stay."""
        ...

    @property
    def is_curved(self) -> bool:
        """Whether there are curved cones, on which solutions move by what multipliers make of the curvature."""
        ...

    @property
    def is_linear_program(self) -> bool:
        """Whether solutions are vertices, which small changes of the cost leave where they are."""
        ...

    @property
    def conditions(self) -> str:
        """Which optimality conditions it has, for implicit differentiation: ``"conic"``, ``"node"`` or none."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether there may be several solutions, of which its solver finds one: another is no response to a tilt."""
        ...

    @property
    def batch_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def tilt(self, step: Tensor, cotangent: Any) -> Self:
        """``L + step <cotangent, point>``, for k copies of the batch where ``step`` has k B entries."""
        ...

    def augment(self, rho: float, center: Tensor) -> Self:
        """``L + (ρ/2) |x - center|²``."""
        ...

    def tilt_unit(self, point: Any, cotangent: Any) -> Tensor:
        """(B,) the step that makes a tilt as large as the terms it changes; infinite for a zero cotangent."""
        ...

    def stays_still(self, cotangent: Any, change: Any) -> bool:
        """Whether an exact gradient of zero is right and teaches nothing: at a vertex that does not move."""
        ...

    def in_own_units(self, point: Any) -> Any:
        """A point in units in which its parts can be compared with each other."""
        ...

    def gradient_difference(self, plus: Any, minus: Any, weight: Tensor) -> Any:
        """``weight (∇_w L(plus) - ∇_w L(minus))``, summed over elements that share a datum."""
        ...

    def mixed_product(self, point: Any, tangent: Any) -> Any:
        """``∇_z <∇_w L(point), tangent>``: the tilt of forward mode."""
        ...

    def select(self, elements: Sequence[int]) -> Self:
        """The batch of these elements."""
        ...

    def scatter(self, elements: Sequence[int], data: Any) -> Any:
        """A gradient of the data of ``select(elements)`` as one of this problem's, zero elsewhere."""
        ...

    def zero_gradient(self) -> Any:
        """A gradient of the data that is zero."""
        ...
