"""How many threads torch's operations and BLAS use, and in what precision torch's, changed for a while.

Torch's number is set in the OpenMP library that torch runs on, where it counts for the calling thread only.  Not by
``torch.set_num_threads``: it counts for threads to come too, and it takes from MKL the choice not to nest its threads
(``mkl_set_dynamic``), for good; after that LU factors of batches of matrices (order 150 and more, two threads) are
wrong: MKL prints "Parameter 6 was incorrect on entry to DLASWP", and pivots are garbage (torch 2.13.0 with MKL 2024.2).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from threadpoolctl import OpenBLASController, ThreadpoolController

__all__ = [
    "all_torch_threads",
    "bounded_blas",
    "find_blas",
    "one_blas_thread",
    "one_torch_thread",
    "torch_threads",
    "without_autocast",
]

SMALL = 2**16
"""Products of fewer multiplications start no threads: OpenBLAS does from 2¹⁸ on."""

_outside = threading.local()


@cache
def _openmp() -> Any | None:
    """The OpenMP library that torch runs on; None where it has threads of another kind."""
    before = torch.get_num_threads()
    for library in ThreadpoolController().select(user_api="openmp").lib_controllers:
        count = library.get_num_threads()
        library.set_num_threads(before + 1)
        heard = torch.get_num_threads() == before + 1
        library.set_num_threads(count)
        if heard:
            return library
    return None


def _end_openmp_threads() -> None:
    """End the OpenMP threads of a thread that forks, for its child has none of them and waits for them without end.

    GNU's OpenMP starts threads again when the next operation wants some, on both sides (the libgomp of torch 2.13.0).
    """
    library = _openmp()
    if library is None or "gomp" not in library.filepath:
        return
    end = getattr(ctypes.CDLL(library.filepath), "omp_pause_resource_all", None)
    if end is not None:
        soft = 1
        end(soft)


def _set(count: int) -> None:
    library = _openmp()
    if library is None:
        torch.set_num_threads(count)
    else:
        library.set_num_threads(count)


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Torch's operations in this thread use ``count`` threads while inside."""
    before = torch.get_num_threads()  # in a new thread, this is also where torch sets its own number
    if before == count:
        yield
        return
    try:  # an interrupt may come at any point
        _set(count)
        yield
    finally:
        _set(before)


@contextmanager
def one_torch_thread() -> Generator[None]:
    """Torch's operations use one thread while inside: the library's parallel work is in its tasks.

    Torch's threads wait for each other actively after every operation: on small operations they gain nothing, and they
    lose tenfold where another process wants the core.
    """
    if torch.get_num_threads() == 1 or getattr(_outside, "threads", None):
        yield
        return
    try:
        _outside.threads = torch.get_num_threads()
        with torch_threads(1):
            yield
    finally:
        _outside.threads = None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No automatic lower precision inside; where there is none anyway nothing is done, as that is what costs time."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


@contextmanager
def all_torch_threads() -> Generator[None]:
    """Torch's operations use the caller's number of threads again, inside :func:`one_torch_thread`."""
    with torch_threads(getattr(_outside, "threads", None) or torch.get_num_threads()):
        yield


def _take_control() -> None:
    """Let this thread set OpenBLAS's threads: threadpoolctl 3.7 and later heed only the thread that set them first."""
    release = getattr(OpenBLASController, "clear_controlling_thread", None)
    if release is not None:
        release(force=True)


class _BlasBound:
    """BLAS threads are a setting of the process: held at one while any worker is at work, then restored."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers: set[object] = set()
        self.limiter: Any = None
        self.controller: ThreadpoolController | None = None

    def found(self) -> ThreadpoolController:
        """The libraries of this process, looked for once, which takes a while."""
        if self.controller is None:
            self.controller = ThreadpoolController().select(user_api="blas")
        return self.controller

    def enter(self, worker: object) -> None:
        with self.lock:
            self.workers.add(worker)
            if self.limiter is None:
                controller = self.found()
                _take_control()
                # First what is to be restored, then the limit: an interrupt may come in between.
                self.limiter = controller.limit(limits=None)
                for library in controller.lib_controllers:
                    library.set_num_threads(1)

    def leave(self, worker: object) -> None:
        with self.lock:
            self.workers.discard(worker)
            if not self.workers and self.limiter is not None:
                _take_control()
                self.limiter.restore_original_limits()
                self.limiter = None
                _take_control()


_blas_bound = _BlasBound()


@contextmanager
def bounded_blas() -> Generator[None]:
    """One BLAS thread while inside, so that workers times BLAS threads stay within the cores."""
    bound, worker = _blas_bound, object()
    try:  # an interrupt may come at any point, also inside of enter
        bound.enter(worker)
        yield
    finally:
        try:
            bound.leave(worker)
        except BaseException:  # an interrupt in the middle: what was begun is ended
            bound.leave(worker)
            raise


def one_blas_thread(multiplications: int) -> AbstractContextManager[Any]:
    """One thread of BLAS for a batch of products, of so many multiplications each.

    Threads gain nothing on the matrices of a batch, and wait for each other actively: 30 products of order 200 take
    9 ms with one, 8 to 13 with two, and 30 to 260 where another process wants the core (OpenBLAS 0.3.30).  Small
    products have one thread anyway.
    """
    return bounded_blas() if multiplications > SMALL else nullcontext()


def find_blas() -> None:
    """Look for the libraries of BLAS now, in the calling thread, not in workers that an interrupt is to end soon."""
    _blas_bound.found()


def _reset_after_fork() -> None:
    global _blas_bound
    _blas_bound = _BlasBound()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_openmp_threads, after_in_child=_reset_after_fork)
