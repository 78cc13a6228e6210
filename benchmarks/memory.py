"""The memory that a call takes at its peak, measured in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

from .harness import peak_memory

__all__ = ["growth", "measuring_process"]

LARGE = 1 << 16
"""Bytes from which glibc asks the system for each allocation, and gives it back at once when it is freed."""
M_MMAP_THRESHOLD = -3
RESOLUTION = 1 / 16
"""MiB: the kernel counts pages in batches, so that less is the same as nothing."""


def _give_back_at_once() -> None:
    """What resident memory says is then what is alive, up to small allocations.

    By default glibc keeps what is freed, and raises its threshold with every large block that is freed, so that peaks
    depend on what ran before.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def growth(call: Callable[[], Any]) -> float | None:
    """MiB at the peak of a call, beyond what is there before it; None where the system does not say.

    It is called twice: the first call loads libraries and makes their buffers.
    """
    call()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with peak_memory() as grown:
        call()
    return max(grown[0], RESOLUTION) if grown else None


@contextmanager
def measuring_process() -> Iterator[Callable[..., float | None]]:
    """Yields a function that calls a module's function with arguments in the other process, and returns its answer."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_give_back_at_once) as executor:
        yield lambda function, *arguments: executor.submit(function, *arguments).result()
