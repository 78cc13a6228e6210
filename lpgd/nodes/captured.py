"""Tensors that are no inputs though autograd follows them, or ``torch.func.vmap`` maps over them: named.

So none is lost without a word.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lpgd.arrays import has_lanes, is_differentiated

__all__ = ["captured_tensors", "is_followed", "refuse_captured", "requiring_tensors"]


def is_followed(value: Any) -> bool:
    """Whether it is a tensor that has a gradient, a tangent or lanes, which constants lose."""
    return isinstance(value, Tensor) and (is_differentiated(value) or has_lanes(value))


def refuse_captured(label: str, function: Any, values: Iterable[Any], instead: str) -> None:
    """Refuse a function of a user's own whose values, at arguments that are constants, are followed all the same.

    Args:
        label: what the function is.
        function: of the user.
        values: what it answered.
        instead: what to make of such a tensor.

    Raises:
        ValueError: with the names that lead to such tensors, where they can be found.
    """
    if any(map(is_followed, values)):
        names = ", ".join(dict.fromkeys(captured_tensors(function))) or "a tensor that could not be named"
        raise ValueError(
            f"{label} uses {names}, which requires a gradient, or has lanes of torch.func.vmap, but is no argument of "
            f"it, and would get none: make it {instead}, or detach it."
        )


def captured_tensors(function: Any) -> Iterator[str]:
    """Names that lead from a function to tensors that are followed."""
    if isinstance(function, functools.partial):
        yield from captured_tensors(function.func)
        for place, value in [*enumerate(function.args), *function.keywords.items()]:
            yield from requiring_tensors(f"the partial argument {place}", value)
        return
    owner = getattr(function, "__self__", function if not inspect.isfunction(function) else None)
    if owner is not None:
        yield from requiring_tensors(type(owner).__name__, owner)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function):
        return
    variables = inspect.getclosurevars(function)
    for name, value in {**variables.globals, **variables.nonlocals}.items():
        yield from requiring_tensors(name, value)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty:
            yield from requiring_tensors(name, parameter.default)


def requiring_tensors(name: str, value: Any) -> Iterator[str]:
    """Names of the tensors in a value, itself called ``name``, that are followed."""
    if isinstance(value, Tensor):
        if is_followed(value):
            yield name
    elif isinstance(value, torch.nn.Module):
        yield from (f"{name}.{key}" for key, parameter in value.named_parameters() if is_followed(parameter))
    elif isinstance(value, dict):
        yield from (f"{name}[{key!r}]" for key, entry in value.items() if is_followed(entry))
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            if is_followed(entry):
                yield f"{name}[{place}]"
    elif hasattr(value, "__dict__") and not callable(value):
        for key, entry in vars(value).items():
            if is_followed(entry):
                yield f"{name}.{key}"
