"""Tensors as lists and arrays, with their types: torch's own functions do not say what a list or an array holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "BoolArray",
    "FloatArray",
    "IntArray",
    "SparseArray",
    "as_index",
    "elements_where",
    "first_lane",
    "flags",
    "floats",
    "from_numpy",
    "has_lanes",
    "integers",
    "is_differentiated",
    "is_symmetric",
    "is_wrapped",
    "may_be_followed",
    "plain",
    "random_direction",
    "rows_where",
]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]
SparseArray: TypeAlias = Any
"""A sparse array of SciPy's, in any format: SciPy says nothing of the types of its operators."""


_torch_c: Any = torch._C
_functorch: Any = _torch_c._functorch
is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether it is a tensor of a transform of ``torch.func``, which may hide its values, and follow them."""


def may_be_followed() -> bool:
    """Whether tensors may require gradients, have tangents, or be of a transform of ``torch.func`` here."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or _torch_c._are_functorch_transforms_active()


def _levels(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as each of the transforms of ``torch.func`` sees it, the innermost one first."""
    yield tensor
    while is_wrapped(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


def is_differentiated(tensor: Tensor) -> bool:
    """Whether autograd follows it: it requires a gradient, or has a tangent, as in ``torch.autograd.forward_ad``.

    A tangent of a transform that has others within it does not show (torch 2.13).
    """
    if any(level.requires_grad for level in _levels(tensor)):
        return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(level).tangent is not None for level in _levels(tensor)
    )


def has_lanes(tensor: Tensor) -> bool:
    """Whether ``torch.func.vmap`` maps over it."""
    return any(_functorch.is_batchedtensor(level) for level in _levels(tensor))


def first_lane(tensor: Tensor) -> Tensor:
    """The values alone, of the first lane where ``torch.func.vmap`` maps over it."""
    while is_wrapped(tensor):
        dim, tensor = _functorch.maybe_get_bdim(tensor), _functorch.get_unwrapped(tensor)
        tensor = tensor if dim < 0 else tensor.select(dim, 0)
    return tensor.detach()


def plain(tensor: Tensor) -> Tensor:
    """The values without their graph, and without the negative bit of views such as ``z.conj().imag``.

    NumPy takes no tensor that has it.
    """
    return tensor.detach().resolve_neg()


def rows_where(mask: Tensor) -> Tensor:
    """The indices of the true entries of a mask (B,)."""
    return mask.nonzero()[:, 0]


def elements_where(mask: Tensor) -> list[int]:
    """:func:`rows_where` as a list."""
    return integers(rows_where(mask))


def as_index(elements: Sequence[int], device: torch.device) -> Tensor:
    """Elements of a batch as indices, int64."""
    return torch.as_tensor(list(elements), dtype=torch.int64, device=device)


def integers(index: Tensor) -> list[int]:
    """The entries of an integer tensor of one dimension."""
    return cast("list[int]", cast(Any, index).tolist())


def flags(mask: Tensor) -> list[bool]:
    """The entries of a mask of one dimension."""
    return cast("list[bool]", cast(Any, mask).tolist())


def floats(vector: Tensor) -> list[float]:
    """The entries of a vector."""
    return cast("list[float]", cast(Any, vector).tolist())


def is_symmetric(matrices: Tensor) -> bool:
    """Whether matrices (..., n, n) that have no graph are equal to their transposes."""
    if matrices.device.type != "cpu":
        return torch.equal(matrices, matrices.mT)
    array = matrices.detach().numpy()
    return bool((array == array.swapaxes(-1, -2)).all())


def from_numpy(array: NDArray[Any]) -> Tensor:
    """A tensor that shares an array's memory."""
    return cast(Tensor, cast(Any, torch).from_numpy(array))


@cache
def random_direction(size: int) -> FloatArray:
    """A fixed random vector of length 1, to probe matrices K with.

    ``|K⁻¹ direction|`` bounds the norm of K⁻¹ from below, almost surely within ``√size``.
    """
    direction = np.random.default_rng(size).standard_normal(size)
    direction /= np.linalg.norm(direction) if size else 1.0
    direction.flags.writeable = False
    return direction
