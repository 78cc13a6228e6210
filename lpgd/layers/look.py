"""Looks at the values of a call's tensors, within the transforms of ``torch.func`` too, which hide them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["look_at"]

_transforms_are_active: Callable[[], bool] = cast(Any, torch._C)._are_functorch_transforms_active


def look_at(function: Callable[[Sequence[Tensor]], object], tensors: Sequence[Tensor], ndims: Sequence[int]) -> None:
    """Call a function that looks at the values of tensors, and may raise.

    Args:
        function: takes the tensors with at most one dimension for the batch before their own ones.
        tensors: of any batch dimensions that it takes itself; those of ``torch.func.vmap`` are made one with them.
        ndims: how many dimensions each has for one element.
    """
    if _transforms_are_active():
        _Look.apply(function, tuple(ndims), *(tensor.detach() for tensor in tensors))
    else:
        function(tensors)


class _Look(torch.autograd.Function):
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
        return _Look.apply(function, ndims, *shown), None
