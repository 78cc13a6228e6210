"""Solvers that print although they are asked not to."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

__all__ = ["quiet", "quiet_descriptor"]

_lock = threading.Lock()
_silent: Counter[int] = Counter()
"""How many times each thread, by its identity, is within :func:`quiet`."""


class _Filter:
    """A text stream without what threads within :func:`quiet` write to it."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() in _silent else self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def quiet(wanted: bool = True) -> Generator[None]:
    """Drop what this thread prints through ``sys.stdout``, as OSQP and SCS do from C; other threads print on."""
    if not wanted:
        yield
        return
    thread = threading.get_ident()
    with _lock:
        if not isinstance(sys.stdout, _Filter) and sys.stdout is not None:
            sys.stdout = _Filter(sys.stdout)
        _silent[thread] += 1
    try:
        yield
    finally:
        with _lock:
            _silent[thread] -= 1
            if not _silent[thread]:
                del _silent[thread]
            if not _silent and isinstance(sys.stdout, _Filter):
                sys.stdout = sys.stdout.stream


@contextmanager
def quiet_descriptor() -> Generator[None]:
    """Drop what the whole process writes to file descriptor 1: for a moment only, as all threads are meant."""
    if sys.stdout is not None:
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
