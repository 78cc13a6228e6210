"""Layers within ``torch.compile``: a solve is no graph, so that the compiler is told to leave it alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

__all__ = ["eager"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, which ``torch.compile`` does not look into: one break of the graph.

    ``torch.compiler.disable`` does it, and takes a second to import the compiler: only a compiler sees it.
    """

    @wraps(function)
    def call(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            from lpgd.layers.uncompiled import run

            return run(function, args, keywords)
        return function(*args, **keywords)

    return call
