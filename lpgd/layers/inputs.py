"""What a layer is called with: tensors are checked, their leading batch dimensions flattened to one and restored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from numbers import Real
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "HALF",
    "MATRIX_LAYOUTS",
    "Batch",
    "Expected",
    "Inputs",
    "batch_inputs",
    "check_inputs",
    "is_number",
    "no_tensor",
    "refuse_positional",
    "with_numbers",
]

MATRIX_LAYOUTS = (torch.strided, torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


HALF = (torch.float16, torch.bfloat16)
"""Types that calls may have, and nothing is computed in."""
FLOATS = (torch.float64, torch.float32, *HALF)


class _Named(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Expected(NamedTuple):
    """One argument of a call.

    Args:
        name: for messages.
        shape: of one element; a name stands for a size that is not known.
        layouts: what a tensor may be stored as.
    """

    name: str
    shape: tuple[int | str, ...]
    layouts: tuple[torch.layout, ...] = (torch.strided,)


@dataclass(frozen=True, eq=False)
class Batch:
    """What the tensors of a call have in common.

    Attributes:
        batch_shape: the broadcast leading dimensions.
        dtype: of the outputs.
        device: of the inputs and outputs.
    """

    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def batch_size(self) -> int:
        return torch.Size(self.batch_shape).numel()

    def flatten(self, tensor: Tensor, ndim: int) -> Tensor:
        """One leading dimension, or none where the batch shares the tensor, before its own ``ndim`` ones."""
        leading = tensor.ndim - ndim
        leading_shape, shape = tensor.shape[:leading], tensor.shape[leading:]
        if leading_shape.numel() == 1:
            return tensor.reshape(shape) if leading else tensor
        return tensor.expand(*self.batch_shape, *shape).reshape(self.batch_size, *shape)

    def rows(self, tensor: Tensor, ndim: int) -> Tensor:
        """The same in float64, with only R rows where the batch repeats them in order: element i has row i mod R."""
        shape, leading = tensor.shape, tensor.ndim - ndim
        while leading and shape[-ndim - leading] == 1:
            leading -= 1
        leading_shape = tuple(shape[len(shape) - ndim - leading : len(shape) - ndim])
        if self.batch_size and leading_shape and leading_shape == self.batch_shape[-len(leading_shape) :]:
            tensor = tensor.reshape(torch.Size(leading_shape).numel(), *shape[len(shape) - ndim :])
        else:
            tensor = self.flatten(tensor, ndim)
        return tensor.to(torch.float64)

    def rows_of_loss(self, tensor: Tensor, ndim: int) -> Tensor:
        """The same for a datum of a loss, which the call has not checked.

        Raises:
            ValueError: its leading dimensions do not broadcast to those of the call.
        """
        datum_shape = tuple(tensor.shape[: tensor.ndim - ndim])
        fits = len(datum_shape) <= len(self.batch_shape) or not self.batch_size
        fits &= all(one in (1, size) for one, size in zip(datum_shape[::-1], self.batch_shape[::-1], strict=False))
        if not fits and torch.Size(datum_shape).numel() != 1:
            raise ValueError(
                f"the batch shape of the loss's data, {datum_shape}, does not broadcast to that of the call, "
                f"{self.batch_shape}."
            )
        return self.rows(tensor.to(self.device), ndim)

    def restore(self, value: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, size) in float64 to (*batch, *shape) in the inputs' type, on their device."""
        whole = (*self.batch_shape, *shape)
        if value.dtype != self.dtype or value.device != self.device:
            value = value.to(device=self.device, dtype=self.dtype)
        return value if value.shape == whole else value.reshape(whole)


@dataclass(frozen=True, eq=False)
class Inputs(Batch):
    """Checked inputs of a call.

    Attributes:
        tensors: one for each parameter: of its own shape where the batch shares it, else with one leading dimension.
    """

    tensors: tuple[Tensor, ...]


def batch_inputs(parameters: Sequence[_Named], tensors: Sequence[Tensor | float]) -> Inputs:
    """Check the tensors of a call against the parameters they stand for.

    Raises:
        ValueError: a wrong number of tensors or shape, batch dimensions that do not broadcast, or several devices.
        TypeError: something is not a tensor of floating-point numbers.
    """
    if len(tensors) != len(parameters):
        names = ", ".join(f"{parameter.name} {parameter.shape}" for parameter in parameters) or "none"
        raise ValueError(f"the layer takes {len(parameters)} tensors ({names}); it was called with {len(tensors)}.")
    expected = [Expected(parameter.name, parameter.shape) for parameter in parameters]
    values = with_numbers(tensors, (len(parameter.shape) for parameter in parameters))
    batch = check_inputs(expected, values, "the value of parameter ")
    flattened = tuple(
        batch.flatten(value, len(parameter.shape)) for parameter, value in zip(parameters, values, strict=True)
    )
    return Inputs(batch.batch_shape, batch.dtype, batch.device, flattened)


def check_inputs(expected: Sequence[Expected], tensors: Sequence[Tensor], prefix: str = "") -> Batch:
    """Check tensors against what each is expected to be; ``prefix`` comes before its name in messages.

    Raises:
        ValueError: a wrong shape, batch dimensions that do not broadcast, or several devices.
        TypeError: something is not a tensor of floating-point numbers, or of a layout that is not taken.
    """
    batch_shapes: list[tuple[int, ...]] = []
    dtype: torch.dtype | None = None
    for item, tensor in zip(expected, tensors, strict=True):
        _check_kind(item, tensor, prefix)
        leading = tensor.ndim - len(item.shape)
        if leading < 0 or tuple(tensor.shape[leading:]) != item.shape:
            raise ValueError(
                f"{prefix}{item.name} has shape {tuple(tensor.shape)}; expected {_shape_in_words(item.shape)}."
            )
        batch_shapes.append(tuple(tensor.shape[:leading]))
        dtype = tensor.dtype if dtype is None else torch.promote_types(dtype, tensor.dtype)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        places = ", ".join(f"{item.name} on {tensor.device}" for item, tensor in zip(expected, tensors, strict=True))
        raise ValueError(f"the tensors are on several devices ({places}); move them to one.")
    if torch.device("meta") in devices:
        raise ValueError("the tensors are on the meta device, where they have no values: nothing can be solved there.")
    distinct = set(batch_shapes) - {()}
    try:
        # One shape, which shared data leave as it is, is the usual case; torch.broadcast_shapes is slow.
        batch_shape = tuple(torch.broadcast_shapes(*distinct)) if len(distinct) > 1 else next(iter(distinct), ())
    except RuntimeError as error:
        shapes = ", ".join(f"{e.name} {shape}" for e, shape in zip(expected, batch_shapes, strict=True))
        raise ValueError(f"the batch dimensions do not broadcast: {shapes}.") from error
    return Batch(batch_shape, dtype or torch.get_default_dtype(), next(iter(devices), torch.device("cpu")))


def _check_kind(item: Expected, tensor: Tensor, prefix: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{prefix}{no_tensor(item.name, tensor, item.shape)}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{prefix}{item.name} is {tensor.dtype}; "
            "it must be float64, float32, float16 or bfloat16 (tensor.double())."
        )
    if tensor.layout not in item.layouts:
        hint = "a dense tensor" if len(item.layouts) == 1 else "a dense, COO, CSR or CSC tensor"
        raise TypeError(f"{prefix}{item.name} is {tensor.layout}; pass {hint} (tensor.to_dense()).")


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python or of NumPy, and neither a truth value nor an array."""
    return isinstance(value, Real) and not isinstance(value, bool)


def with_numbers(values: Sequence[Any], ndims: Iterable[int]) -> list[Any]:
    """Numbers among a call's values as constant tensors, where one element's value has no dimensions.

    Args:
        values: of a call; tensors stay as they are, and so does what is refused later.
        ndims: how many dimensions each has for one element.
    """
    places = [
        place for place, (value, ndim) in enumerate(zip(values, ndims, strict=False)) if not ndim and is_number(value)
    ]
    answer = list(values)
    if places:
        tensors = [value for value in values if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = reduce(torch.promote_types, [tensor.dtype for tensor in tensors] or [torch.get_default_dtype()])
        for place in places:
            answer[place] = torch.full((), float(answer[place]), dtype=dtype, device=device)
    return answer


def no_tensor(name: str, value: Any, shape: tuple[int | str, ...] | None) -> str:
    """What to say of an argument that is no tensor: what it is, and what to type.

    Args:
        name: of the argument.
        value: what was passed.
        shape: of one element, where it is known.
    """
    wanted = "a torch tensor" if shape is None else f"a torch tensor of shape {_shape_in_words(shape)}"
    if value is None:
        return f"{name} is None; pass {wanted}."
    kind = "NumPy array" if isinstance(value, np.ndarray) else type(value).__name__
    if is_number(value) or isinstance(value, str | bool):
        return f"{name} is a {kind}; pass {wanted}."
    if hasattr(value, "tocsr"):
        parts = ", ".join(f"{name}.{attribute}" for attribute in ("indptr", "indices", "data", "shape"))
        return f"{name} is a {kind} of SciPy; pass a torch tensor: torch.sparse_csr_tensor({parts}) of its .tocsr()."
    return f"{name} is a {kind}; pass a torch tensor: torch.as_tensor({name})."


def _shape_in_words(shape: tuple[int | str, ...]) -> str:
    return "(*batch, " + ", ".join(str(size) for size in shape) + ")" if shape else "(*batch,)"


def refuse_positional(name: str, call: str, misplaced: Sequence[Any]) -> None:
    """Refuse constraints by position: in the order of some other library they would be read as something else.

    Args:
        name: what was called.
        call: how it is called, up to where constraints begin: ``"layer(P, q"``.
        misplaced: the arguments that should have had names.
    """
    if misplaced:
        raise TypeError(
            f"{name} takes constraints and bounds by name only, as libraries order them differently: "
            f"{call}, A=A, b=b, G=G, h=h, lb=lb, ub=ub), with those that there are."
        )
