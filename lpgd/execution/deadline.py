"""When the work of this thread is to end: methods that iterate over whole batches ask between two iterations."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

__all__ = ["deadline", "is_over"]


class _End(threading.local):
    """On the clock of ``time.monotonic``; None is never."""

    at: float | None = None


_end = _End()


@contextmanager
def deadline(seconds: float | None) -> Generator[None]:
    """End what is done inside after so many seconds, or at an earlier end that holds already; None is no limit."""
    before = _end.at
    if seconds is not None:
        at = time.monotonic() + seconds
        _end.at = at if before is None else min(at, before)
    try:
        yield
    finally:
        _end.at = before


def is_over() -> bool:
    """Whether that time has come."""
    return _end.at is not None and time.monotonic() >= _end.at
