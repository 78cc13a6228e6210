"""What ``torch.compile`` does not look into; importing this imports the compiler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["run"]


def _run(function: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """``function(*args, **keywords)``, eagerly."""
    return function(*args, **keywords)


REASON = (
    "an optimization layer calls solvers, which no graph of tensor operations can hold: compile with fullgraph=False, "
    "which breaks the graph once at each layer"
)

run: Callable[..., Any] = torch.compiler.disable(_run, reason=REASON)
