"""How layers are called: by the signature of ``forward``, and left alone by ``torch.compile``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["built_eagerly", "eager", "signature_of"]

NO_GRAPH = (
    "an optimization layer calls solvers, which no graph of tensor operations can hold: it cannot be "
    "traced or exported; save the module itself (torch.save, pickle), or export the modules before and behind it"
)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def eager(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, which ``torch.compile`` does not look into: one break of the graph.

    ``torch.compiler.disable`` does it, and takes a second to import the compiler: only a compiler sees it.
    """

    @wraps(function)
    def call(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        if torch.compiler.is_exporting():
            raise RuntimeError(NO_GRAPH)
        if torch.compiler.is_compiling():
            from lpgd.layers.uncompiled import run

            return run(function, args, keywords)
        if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            raise RuntimeError(NO_GRAPH)
        return function(*args, **keywords)

    return call


def built_eagerly(constructor: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same ``__init__``, which ``torch.compile`` does not look into: it cannot read modules that are half built.

    It would do so frame by frame, where it does not show; so the compiler is told wherever it has been imported.
    """

    @wraps(constructor)
    def build(*args: Arguments.args, **keywords: Arguments.kwargs) -> Result:
        if "torch._dynamo" not in sys.modules:
            return constructor(*args, **keywords)
        from lpgd.layers.uncompiled import run

        return run(constructor, args, keywords)

    return build


def signature_of(
    forward: Callable[Arguments, Result],
) -> Callable[[Callable[..., Any]], Callable[Arguments, Result]]:
    """A decorator: ``__call__``, whose types ``torch.nn.Module`` hides, has the signature of ``forward``."""
    return lambda call: forward
