"""The values of a call's tensors, within the transforms of ``torch.func`` too, which hide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from lpgd.problems.lanes import joined, separated

__all__ = ["are_surely_below", "computed_from_values", "inspect_values", "transforms_are_active"]

Making = Callable[[Sequence[Tensor], int], "tuple[Tensor, ...] | None"]

transforms_are_active: Callable[[], bool] = cast(Any, torch._C)._are_functorch_transforms_active


def inspect_values(
    function: Callable[[Sequence[Tensor]], object], tensors: Sequence[Tensor], ndims: Sequence[int]
) -> None:
    """Call a function that looks at the values of tensors, and may raise.

    Args:
        function: takes the tensors with at most one dimension for the batch before their own ones.
        tensors: of any batch dimensions that it takes itself; those of ``torch.func.vmap`` are made one with them.
        ndims: how many dimensions each has for one element.
    """
    if transforms_are_active():
        _Inspect.apply(function, tuple(ndims), *(tensor.detach() for tensor in tensors))
    else:
        function(tensors)


def computed_from_values(function: Making, tensors: Sequence[Tensor], size: int) -> tuple[Tensor, ...] | None:
    """What a function makes of the values of a batch's tensors, which has no derivative; None where it makes nothing.

    Args:
        function: takes vectors, or tensors with as many rows as a divisor of the number of elements, and this number;
            returns tensors with one row or one for each element.  Lanes of ``torch.func.vmap`` are elements for it.
        tensors: of the batch.
        size: how many elements the batch has.
    """
    plain = [tensor.detach() for tensor in tensors]
    if not transforms_are_active():
        return function(plain, size)
    found = list[bool]()

    def making(shown: Sequence[Tensor], count: int) -> tuple[Tensor, ...] | None:
        made = function(shown, count)
        found.append(made is not None)
        return made

    made = _Compute.apply(making, size, *plain)
    return made if any(found) else None


def are_surely_below(tensor: Tensor, section: slice, limit: float) -> bool:
    """Whether all entries in a section of the last dimension are below a limit, as far as a quick look tells."""
    if transforms_are_active() or tensor.device.type != "cpu" or not tensor.numel():
        return False
    return bool(tensor.detach().resolve_neg().numpy()[..., section].max() < limit)  # false for NaN


class _Inspect(torch.autograd.Function):
    @staticmethod
    def forward(function: Callable[[Sequence[Tensor]], object], ndims: tuple[int, ...], *tensors: Tensor) -> Tensor:
        function(tensors)
        return torch.zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is differentiated."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        function, ndims, *tensors = inputs
        shown = [
            tensor if dim is None else tensor.movedim(dim, 0).flatten(0, tensor.ndim - ndim - 1)
            for tensor, dim, ndim in zip(tensors, in_dims[2:], ndims, strict=True)
        ]
        return _Inspect.apply(function, ndims, *shown), None


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(function: Making, size: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = function(tensors, size)
        if made is None:
            return (torch.zeros(size, 1, device=tensors[0].device),)
        return tuple(tensor.expand(size, -1).contiguous() for tensor in made)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """There is no derivative."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        function, size, *tensors = inputs
        lanes = info.batch_size
        shown = [joined(tensor, dim, lanes, size, 1) for tensor, dim in zip(tensors, in_dims[2:], strict=True)]
        made = _Compute.apply(function, lanes * size, *shown)
        return tuple(separated(tensor, lanes) for tensor in made), (0,) * len(made)
