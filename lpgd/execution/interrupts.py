"""Ctrl-C while C code runs: that Python hears it, that tasks stop at it, and that its handler is what it was.

Python's own handler of SIGINT only leaves a note, which the main thread reads between two of its instructions.  Some
solvers put a handler of their own in its place for the time of a solve, and put back what they found there.  A signal
then reaches the solver or, after its last look, nobody; and of two that run at once the second finds the first one's
handler and leaves that behind for good (scs 3.3.1, osqp 1.1.3, ecos 2.0.14).
"""

from __future__ import annotations

import _thread
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

__all__ = [
    "InterruptedSolveError",
    "Stopped",
    "abandon",
    "hear",
    "hearing",
    "kept_handler",
    "pause",
    "send_on",
    "stoppable",
    "to_the_end",
]

PATIENCE = 0.7
"""Seconds that an interrupt waits for elements that are being solved; after that they end by themselves."""
SHORTEST, LONGEST, SHARE = 3e-5, 0.05, 0.02
"""How long the main thread waits before it looks whether the work is done: at most a share of the time spent so far."""

_CAN_LISTEN = hasattr(signal, "sigtimedwait") and hasattr(signal, "pthread_sigmask")
_SIGACTION = ctypes.CDLL(None).sigaction if os.name == "posix" else None
_LARGEST = 256  # bytes of a struct sigaction, or more; it begins with the handler's address


class InterruptedSolveError(Exception):
    """A solver has stopped at an interrupt, which was meant for Python."""


class Stopped(BaseException):
    """A task has stopped as it was told to."""


class _Told(threading.local):
    """What tells this thread's task to stop."""

    event: threading.Event | None = None


_told = _Told()


@contextmanager
def stoppable(event: threading.Event | None) -> Generator[None]:
    """The task inside ends at its next :func:`pause` once the event is set."""
    before = _told.event
    try:
        _told.event = event
        yield
    finally:
        _told.event = before


def may_be_stopped() -> bool:
    """Whether anything can tell this thread's task to stop, so that it has to :func:`pause`."""
    return _told.event is not None


def pause() -> None:
    """Where a task can stop: between two elements, or two steps of a batch.

    Raises:
        Stopped: this task was told to.
    """
    event = _told.event
    if event is not None and event.is_set():
        raise Stopped("The batch was interrupted.")


class _Handler:
    """What SIGINT does in C, as it was before the first of those at work now.

    Attributes:
        saved: the ``struct sigaction``, while anyone is at work.
        replaced: the address of a solver's handler that was in its place.
        called: when :func:`abandon` last called a solver's handler.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users: set[object] = set()
        self.saved: Any = None
        self.replaced: int | None = None
        self.called = -1.0

    def enter(self, user: object) -> None:
        if _SIGACTION is None:
            return
        with self.lock:
            if not self.users:
                self.saved, self.replaced = _current(), None
            self.users.add(user)

    def leave(self, user: object) -> None:
        with self.lock:
            self._restore()
            self.users.discard(user)

    def restore(self) -> None:
        with self.lock:
            self._restore()

    def _restore(self) -> None:
        if self.users and _SIGACTION is not None:
            found = _address(_current())
            if found != _address(self.saved):
                self.replaced = found if found > 1 else None  # 0 and 1 are no functions
                _SIGACTION(int(signal.SIGINT), self.saved, None)

    def of_solver(self) -> int | None:
        """The address of the handler of a solver that may be at work."""
        with self.lock:
            self._restore()
            return self.replaced if self.users else None


def _current() -> Any:
    action = ctypes.create_string_buffer(_LARGEST)
    if _SIGACTION is not None:
        _SIGACTION(int(signal.SIGINT), None, action)
    return action


def _address(action: Any) -> int:
    return ctypes.c_void_p.from_buffer(action).value or 0


_handler = _Handler()


@contextmanager
def kept_handler() -> Generator[None]:
    """SIGINT's handler in C is afterwards what it was before, whatever solvers in any threads do to it."""
    handler, user = _handler, object()
    try:
        handler.enter(user)
        yield
    finally:
        handler.leave(user)


def send_on() -> None:
    """Give Python the interrupt that C code has taken: its handler runs in the main thread.

    Not where the interrupt is one of :func:`abandon`'s, which all solves of one package hear.
    """
    _handler.restore()
    if time.perf_counter() - _handler.called < 1.0:
        return
    if hasattr(signal, "pthread_kill"):
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()


def hearing() -> bool:
    """Whether this thread is the one that interrupts are raised in, by a handler in Python."""
    return threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))


class _Wake:
    """Wakes the main thread, which waits for SIGINT, by one, once all of some futures are done."""

    def __init__(self, futures: Sequence[Future[Any]]) -> None:
        self.lock = threading.Lock()
        self.waiting, self.sent, self.left = True, False, len(futures)
        self.main = threading.get_ident()
        for future in futures:
            future.add_done_callback(self.count)

    def count(self, _: Future[Any]) -> None:
        with self.lock:
            self.left -= 1
            if self.waiting and not self.left:
                self.sent = True
                signal.pthread_kill(self.main, signal.SIGINT)

    def is_own(self) -> bool:
        """Whether the signal that just came may be the one sent here: of two, one is."""
        with self.lock:
            sent_here, self.sent = self.sent, False
            return sent_here

    def end(self) -> None:
        """Send nothing from now on."""
        with self.lock:
            self.waiting = False


def hear(futures: Sequence[Future[Any]], begin: threading.Event | None) -> None:
    """Wait, in the main thread, for work that takes SIGINT's handler away from Python.

    The system gives a process's signal to its main thread if that takes it, and to take it by ``sigtimedwait`` is to
    take it whatever the handler is.

    Args:
        futures: the work.
        begin: set once this thread listens; None where the work is in other processes.
    """
    if not _CAN_LISTEN or signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        _look(futures, begin)
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    wake = _Wake(futures)
    try:
        if begin is not None:
            begin.set()
        while wake.left:
            _take(wake, LONGEST)
    finally:
        wake.end()
        while _take(wake, 0.0):  # its own must not be left over
            pass
        _handler.restore()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _take(wake: _Wake, seconds: float) -> bool:
    """Take one signal: an interrupt goes to the user's handler, which runs here."""
    taken = signal.sigtimedwait((signal.SIGINT,), seconds) is not None
    if taken and not wake.is_own():
        _thread.interrupt_main()
    return taken


def _look(futures: Sequence[Future[Any]], begin: threading.Event | None) -> None:
    """Where a signal cannot be taken, its handler is put back time and again."""
    if begin is not None:
        begin.set()
    started = time.perf_counter()
    for future in futures:
        while not future.done():
            time.sleep(min(SHORTEST + SHARE * (time.perf_counter() - started), LONGEST))
            _handler.restore()


def to_the_end(action: Callable[[], None]) -> None:
    """Call an action that may be begun again, until no interrupt cuts it short; the last one is raised afterwards."""
    interrupt: KeyboardInterrupt | None = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def abandon(futures: Sequence[Future[Any]], stop: threading.Event | None, began: float) -> None:
    """End work that nobody wants any more: what has not begun never does, what runs ends with its element.

    Args:
        began: when the work's end began, on the clock of ``time.perf_counter``: :data:`PATIENCE` counts from there.
    """
    if stop is not None:
        stop.set()
    running = [future for future in futures if not future.cancel()]
    deadline = began + PATIENCE
    while stop is not None and not all(future.done() for future in running) and time.perf_counter() < deadline:
        address = _handler.of_solver()
        if address is not None:  # a solver that listens: this makes it stop within an iteration
            _handler.called = time.perf_counter()
            ctypes.CFUNCTYPE(None, ctypes.c_int)(address)(int(signal.SIGINT))
        time.sleep(0.005)


def _reset_after_fork() -> None:
    global _handler
    _handler = _Handler()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
