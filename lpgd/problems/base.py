"""What a gradient method may ask of a problem, whatever its class."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, SupportsIndex, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "FEW",
    "Centered",
    "Data",
    "DataT",
    "MappedProblem",
    "Point",
    "PointOperations",
    "PointT",
    "Problem",
    "State",
    "States",
    "Structure",
    "Traits",
    "is_surely_finite",
    "maximum_norm",
    "sum_of_quadratics",
]

State: TypeAlias = Any
"""What a solver can go on from, for one element; only that solver knows what is in it, and None is nothing."""
States: TypeAlias = Sequence[State]
"""One for each element of a batch, or none at all."""


def is_surely_finite(tensor: Tensor) -> bool:
    """Whether the sum is finite, and with it every entry: NaN and infinity survive sums.

    Sums of finite numbers may overflow, so that False proves nothing.  This reads a tensor once and writes nothing,
    where ``torch.isfinite`` takes forty times as long.
    """
    if tensor.numel() <= FEW:
        return math.isfinite(_total(cast(Any, tensor.detach()).tolist()))
    return math.isfinite(float(tensor.detach().sum()))


def _total(values: Any) -> float:
    return values if isinstance(values, float) else sum(map(_total, values))


FEW = 16
"""Up to so many entries a list of them is quicker than one operation of torch."""


def maximum_norm(rows: Tensor) -> Tensor:
    """The largest magnitude in each row, (..., n) to (...); 0 for empty rows."""
    return rows.abs().amax(-1) if rows.shape[-1] else rows.new_zeros(rows.shape[:-1])


def sum_of_quadratics(rho: float, center: Tensor | None, more: float, other: Tensor) -> tuple[float, Tensor]:
    """``(ρ/2)|x - c|² + (ρ'/2)|x - c'|²`` as one such term, up to a constant; c is None where ρ is 0."""
    if center is None:
        return more, other
    return rho + more, (rho * center + more * other) / (rho + more)


class Data(Protocol):
    """A named tuple of tensors: the data of a batch of problems, a gradient or a tangent of them, or outputs."""

    @property
    def _fields(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, index: SupportsIndex, /) -> Tensor: ...

    def _asdict(self) -> dict[str, Any]: ...

    @classmethod
    def _make(cls, iterable: Iterable[Any], /) -> Self: ...


class Point(Data, Protocol):
    """A named tuple of tensors (B, ·) whose first is the primal ``x``; also a cotangent or a tangent of it."""

    @property
    def x(self) -> Tensor: ...

    def select(self, elements: Tensor) -> Self: ...

    def where(self, chosen: Tensor, other: Self) -> Self: ...

    def scaled(self, weight: Tensor) -> Self: ...

    def minus(self, other: Self) -> Self: ...

    def largest(self) -> Tensor: ...


DataT = TypeVar("DataT", bound=Data)
PointT = TypeVar("PointT", bound=Point)


class PointOperations:
    """What points of every class of problems can do: a mixin of named tuples of tensors (B, ·)."""

    __slots__ = ()

    def select(self, elements: Tensor) -> Self:
        """The rows of these elements."""
        return self._each(lambda tensor: tensor[elements])

    def where(self, chosen: Tensor, other: Self) -> Self:
        """This point for the elements ``chosen`` (B,), the other one elsewhere."""
        return self._each(lambda first, second: torch.where(chosen[:, None], first, second), other)

    def scaled(self, weight: Tensor) -> Self:
        """Each element times its ``weight`` (B,)."""
        return self._each(lambda tensor: weight[:, None] * tensor)

    def minus(self, other: Self) -> Self:
        """The difference of two points."""
        return self._each(torch.sub, other)

    def largest(self) -> Tensor:
        """(B,) the largest magnitude of an entry."""
        return torch.stack([maximum_norm(tensor) for tensor in cast(Data, self)]).amax(0)

    def _each(self, function: Callable[..., Tensor], *others: Self) -> Self:
        groups = zip(cast(Data, self), *(cast(Data, other) for other in others), strict=True)
        return cast(Self, cast(Data, self)._make(function(*group) for group in groups))


@dataclass(frozen=True)
class Traits:
    """What problems of one structure are and can do: declared there, once, and asked of an instance.

    Attributes:
        noun: what messages call such a problem.
        conditions: which optimality conditions it has, for implicit differentiation: ``"conic"``, ``"node"`` or none.
        can_tilt: it can be solved again after a tilt ``τ <g, z>``.
        can_augment: it can be solved again with ``(ρ/2) |x - x*|²`` added.
        is_continuous: small changes of the data can move solutions; those of an integer program jump, or stay.
        is_smooth: it consists of the smooth functions of a declarative node.
        is_local: there may be several solutions, of which the solver finds one: another is no response to a tilt.
        is_curved: there are curved cones, on which solutions move by what multipliers make of the curvature.
        is_linear_program: solutions are vertices, which small changes of the cost leave where they are.
    """

    noun: str
    conditions: Literal["conic", "node", ""] = ""
    can_tilt: bool = True
    can_augment: bool = True
    is_continuous: bool = True
    is_smooth: bool = False
    is_local: bool = False
    is_curved: bool = False
    is_linear_program: bool = False

    @property
    def has_kkt(self) -> bool:
        """Whether there are optimality conditions that can be differentiated."""
        return bool(self.conditions)

    @property
    def takes_losses(self) -> bool:
        """Whether a loss, a function of x, can be added, and leaves a problem of the same kind."""
        return bool(self.conditions)


class Structure(Protocol):
    """What is fixed while the data of problems change."""

    @property
    def digest(self) -> bytes:
        """A fingerprint: solutions of problems of one fingerprint can start each other."""
        ...

    @property
    def summary(self) -> str:
        """Its sizes in words."""
        ...

    @property
    def traits(self) -> Traits: ...


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

    def in_own_units(self, point: PointT) -> PointT:
        """The point itself: all variables have one unit."""
        return point

    def observed(self, point: PointT, at: PointT, *, own_units: bool = True) -> PointT:
        """All of the point: all variables are the user's."""
        return self.in_own_units(point) if own_units else point

    def stays_still(self, cotangent: Point, change: Point) -> bool:
        """No: an exact gradient of zero is expected of linear programs alone."""
        return False

    def would_move(self, cotangent: Point) -> Tensor:
        """(B,) yes, as far as is known."""
        return torch.ones_like(cotangent.x[:, :1], dtype=torch.bool)[:, 0]


class Problem(Protocol[DataT, PointT]):
    """A batch of saddle-point problems ``argmin_x max_y L(x, y; w)`` that can tell how it changes.

    Points, cotangents and tangents of the solution are one named tuple of tensors (B, ·), whose first field
    is the primal ``x``; data, and gradients and tangents of the data, are another one.
    """

    @property
    def structure(self) -> Structure: ...

    @property
    def data(self) -> DataT: ...

    @property
    def batch_size(self) -> int: ...

    @property
    def traits(self) -> Traits:
        """What it can do: that of its structure."""
        ...

    @property
    def device(self) -> torch.device: ...

    def with_data(self, data: DataT) -> Self:
        """The same problems with other data of the same shapes."""
        ...

    def objective(self, x: Tensor) -> Tensor:
        """(B, n) to (B,)."""
        ...

    def tilt(self, step: Tensor, cotangent: PointT) -> Self:
        """``L + step <cotangent, point>``, for k copies of the batch where ``step`` has k B entries."""
        ...

    def augment(self, rho: float, center: Tensor) -> Self:
        """``L + (ρ/2) |x - center|²``."""
        ...

    def tilt_unit(self, point: PointT, cotangent: PointT) -> Tensor:
        """(B,) the step that makes a tilt as large as the terms it changes; infinite for a zero cotangent."""
        ...

    def stays_still(self, cotangent: PointT, change: PointT) -> bool:
        """Whether an exact gradient of zero is right and teaches nothing: at a vertex that does not move."""
        ...

    def would_move(self, cotangent: PointT) -> Tensor:
        """(B,) whether a tilt may change the solution at all."""
        ...

    def in_own_units(self, point: PointT) -> PointT:
        """A point in units in which its parts can be compared with each other."""
        ...

    def observed(self, point: PointT, at: PointT, *, own_units: bool = True) -> PointT:
        """What is observed of a point, or of a change of one, at a solution: of the user's variables, say.

        Args:
            point: (B, ·) each.
            at: the solution.
            own_units: whether it is in units in which its parts can be compared with each other.
        """
        ...

    def gradient_difference(self, plus: PointT, minus: PointT, weight: Tensor) -> DataT:
        """``weight (∇_w L(plus) - ∇_w L(minus))``, summed over elements that share a datum."""
        ...

    def mixed_product(self, point: PointT, tangent: DataT) -> PointT:
        """``∇_z <∇_w L(point), tangent>``: the tilt of forward mode."""
        ...

    def select(self, elements: Tensor) -> Self:
        """The batch of these elements, int64 indices."""
        ...

    def scatter(self, elements: Tensor, data: DataT) -> DataT:
        """A gradient of the data of ``select(elements)`` as one of this problem's, zero elsewhere."""
        ...

    def zero_gradient(self) -> DataT:
        """A gradient of the data that is zero."""
        ...


class MappedProblem(Problem[DataT, PointT], Protocol):
    """A problem that ``torch.func.vmap`` can map over."""

    @property
    def datum_ndims(self) -> tuple[int, ...]:
        """How many dimensions each datum has for one element."""
        ...

    def lanes(self, count: int, data: DataT) -> Self:
        """``count`` copies of this batch, one after the other, with the data of all of them.

        Data that are the same in all copies may be those of this batch.
        """
        ...
