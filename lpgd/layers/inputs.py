"""What a layer is called with: tensors are checked, their leading batch dimensions flattened to one and restored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Inputs", "batch_inputs"]


class _Expected(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, eq=False)
class Inputs:
    """Checked inputs of a call.

    Attributes:
        tensors: one for each parameter: of its own shape where the batch shares it, else with one leading dimension.
        batch_shape: the broadcast leading dimensions.
        dtype: of the outputs.
        device: of the inputs and outputs.
    """

    tensors: tuple[Tensor, ...]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def batch_size(self) -> int:
        return torch.Size(self.batch_shape).numel()

    def restore(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, size) in float64 to (*batch, *shape) in the inputs' type, on their device."""
        return value.to(device=self.device, dtype=self.dtype).reshape((*self.batch_shape, *shape))


def batch_inputs(expected: Sequence[_Expected], tensors: Sequence[Tensor]) -> Inputs:
    """Check the tensors of a call against the parameters they stand for.

    Raises:
        ValueError: a wrong number of tensors or shape, batch dimensions that do not broadcast, or several devices.
        TypeError: something is not a tensor of floating-point numbers.
    """
    if len(tensors) != len(expected):
        names = ", ".join(f"{parameter.name} {parameter.shape}" for parameter in expected) or "none"
        raise ValueError(f"the layer takes {len(expected)} tensors ({names}); it was called with {len(tensors)}.")
    batch_shapes = []
    for parameter, tensor in zip(expected, tensors, strict=True):
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise TypeError(
                f"the value of parameter {parameter.name} is a {kind}; pass a torch tensor (torch.as_tensor)."
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"the value of parameter {parameter.name} is {tensor.dtype}; it must be float32 or float64 "
                "(tensor.double())."
            )
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"the value of parameter {parameter.name} is {tensor.layout}; pass a dense tensor (tensor.to_dense())."
            )
        leading = tensor.ndim - len(parameter.shape)
        if leading < 0 or tuple(tensor.shape[leading:]) != parameter.shape:
            wanted = (
                "(*batch, " + ", ".join(str(size) for size in parameter.shape) + ")" if parameter.shape else "(*batch,)"
            )
            raise ValueError(
                f"the value of parameter {parameter.name} has shape {tuple(tensor.shape)}; expected {wanted}."
            )
        batch_shapes.append(tuple(tensor.shape[:leading]))
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        places = ", ".join(f"{p.name} on {t.device}" for p, t in zip(expected, tensors, strict=True))
        raise ValueError(f"the parameters are on several devices ({places}); move them to one.")
    try:
        batch_shape = tuple(torch.broadcast_shapes(*batch_shapes))
    except RuntimeError as error:
        shapes = ", ".join(f"{p.name} {shape}" for p, shape in zip(expected, batch_shapes, strict=True))
        raise ValueError(f"the batch dimensions of the parameters do not broadcast: {shapes}.") from error
    dtype = torch.get_default_dtype()
    for position, tensor in enumerate(tensors):
        dtype = tensor.dtype if position == 0 else torch.promote_types(dtype, tensor.dtype)
    flattened = tuple(
        _flatten(tensor, parameter.shape, batch_shape) for parameter, tensor in zip(expected, tensors, strict=True)
    )
    return Inputs(flattened, batch_shape, dtype, next(iter(devices)) if devices else torch.device("cpu"))


def _flatten(tensor: Tensor, shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> Tensor:
    own = tensor.shape[: tensor.ndim - len(shape)]
    if torch.Size(own).numel() == 1:
        return tensor.reshape(shape)
    return tensor.expand(*batch_shape, *shape).reshape(torch.Size(batch_shape).numel(), *shape)
