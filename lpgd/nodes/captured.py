"""Tensors that require a gradient and are no inputs: named, so that none is lost without a word."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["captured_tensors", "requiring_tensors"]


def captured_tensors(function: Any) -> Iterator[str]:
    """Names that lead from a function to tensors that require a gradient."""
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
    """Names of the tensors in a value, itself called ``name``, that require a gradient."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            yield name
    elif isinstance(value, torch.nn.Module):
        yield from (f"{name}.{key}" for key, parameter in value.named_parameters() if parameter.requires_grad)
    elif isinstance(value, dict):
        yield from (
            f"{name}[{key!r}]" for key, entry in value.items() if isinstance(entry, Tensor) and entry.requires_grad
        )
    elif isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            if isinstance(entry, Tensor) and entry.requires_grad:
                yield f"{name}[{place}]"
    elif hasattr(value, "__dict__") and not callable(value):
        for key, entry in vars(value).items():
            if isinstance(entry, Tensor) and entry.requires_grad:
                yield f"{name}.{key}"
