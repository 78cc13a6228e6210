"""Which data a gradient is wanted of: that of matrices which nobody asks for takes memory and time of its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["gradients_of", "is_wanted"]

_names: ContextVar[frozenset[str] | None] = ContextVar("names", default=None)


@contextmanager
def gradients_of(names: frozenset[str] | None) -> Generator[None]:
    """Within, gradients with respect to other data than these may be zero; None asks for all of them."""
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)


def is_wanted(name: str) -> bool:
    """Whether the gradient of a datum is asked for."""
    names = _names.get()
    return names is None or name in names
