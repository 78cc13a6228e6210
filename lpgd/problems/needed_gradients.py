"""Which data need a gradient: that of matrices which nobody asks for takes memory and time of its own."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["needing_gradients_of", "needs_gradient"]

_names: ContextVar[frozenset[str] | None] = ContextVar("names", default=None)


@contextmanager
def needing_gradients_of(names: frozenset[str] | None) -> Generator[None]:
    """Within, gradients with respect to other data than these may be zero; None asks for all of them."""
    token = _names.set(names)
    try:
        yield
    finally:
        _names.reset(token)


def needs_gradient(name: str) -> bool:
    """Whether the gradient of a datum is asked for."""
    names = _names.get()
    return names is None or name in names
