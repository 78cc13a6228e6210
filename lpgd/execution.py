"""The one way batches are executed: tasks over a ``concurrent.futures.Executor``, and prepared work kept between them.

Serial execution is an executor with one worker.  Tasks are plain functions of picklable arguments, so that
threads, processes and cluster clients with the standard executor interface run the same code, and their
results come back in the order of the tasks.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from threadpoolctl import OpenBLASController, ThreadpoolController

from lpgd.interrupts import abandon, hear, hearing, stoppable
from lpgd.torch_threads import torch_threads

__all__ = [
    "SerialExecutor",
    "WorkspaceCache",
    "bounded_blas",
    "run_tasks",
    "split",
    "worker_count",
]

Task = TypeVar("Task")
Result = TypeVar("Result")


class SerialExecutor(Executor):
    """An executor that runs each call at once, in the calling thread."""

    _max_workers = 1

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # handed to the caller by Future.result, as every executor does
            future.set_exception(error)
        return future


def core_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def default_executor() -> Executor:
    """Threads, one for each core; made on first use and again in a forked child, whose threads are gone."""
    return ThreadPoolExecutor(core_count(), thread_name_prefix="lpgd")


def worker_count(executor: Executor | None) -> int:
    """How many tasks an executor runs at once; the number of cores where it does not say."""
    workers = getattr(executor if executor is not None else default_executor(), "_max_workers", None)
    return workers if isinstance(workers, int) else core_count()


def split(count: int, executor: Executor | None, per_worker: int = 4) -> list[range]:
    """Cut ``count`` elements into contiguous chunks: several for each worker, so that uneven ones even out."""
    workers = worker_count(executor)
    chunks = 1 if workers == 1 else min(count, per_worker * workers)
    edges = [round(chunk * count / max(chunks, 1)) for chunk in range(chunks + 1)]
    return [range(start, stop) for start, stop in pairwise(edges) if stop > start]


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], executor: Executor | None, takes_interrupts: bool = False
) -> list[Result]:
    """``[function(task) for task in tasks]`` on an executor (None: threads), in order.

    A single task runs in the calling thread.  An exception in a task is raised here; it ends the others, and so does an
    interrupt: those that have not begun never do, those in threads stop at their next
    :func:`~lpgd.interrupts.pause`.

    Args:
        takes_interrupts: the tasks take the handler of interrupts away from Python while they run.  They then never
            run in the main thread, which listens instead.
    """
    listens = takes_interrupts and hearing()
    if len(tasks) <= 1 or isinstance(executor, SerialExecutor):
        if not tasks or not listens:
            return [function(task) for task in tasks]
        return _finished([(_in_turn, function, tasks)], None, listens)[0]
    return _finished([(_bounded, function, task) for task in tasks], executor, listens)


def _finished(calls: Sequence[tuple[Any, ...]], executor: Executor | None, listens: bool) -> list[Any]:
    """What comes of calls on an executor; none of them goes on after this."""
    here = executor is None or type(executor) is ThreadPoolExecutor
    signals = _Signals(threading.Event(), threading.Event()) if here else None
    futures: list[Future[Any]] = []
    try:
        for call in calls:
            futures.append((executor or default_executor()).submit(call[0], signals, *call[1:]))
        if listens:
            hear(futures, signals and signals.begin)
        elif signals is not None:
            signals.begin.set()
        return [future.result() for future in futures]
    finally:
        left = not all(future.done() for future in futures)
        if signals is not None:
            if left:
                signals.stop.set()
            signals.begin.set()  # whoever still waits to begin stops at once
        if left:
            abandon(futures, signals and signals.stop)


class _Signals(NamedTuple):
    """What tasks in threads of this process are told."""

    begin: threading.Event
    stop: threading.Event


def _bounded(signals: _Signals | None, function: Callable[[Task], Result], task: Task) -> Result:
    with _told(signals), torch_threads(1), bounded_blas():
        return function(task)


def _in_turn(signals: _Signals | None, function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    with _told(signals), torch_threads(1):
        return [function(task) for task in tasks]


@contextmanager
def _told(signals: _Signals | None) -> Iterator[None]:
    """Begin when told to, and stop when told to."""
    if signals is not None:
        signals.begin.wait()
    with stoppable(signals and signals.stop):
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

    def enter(self, worker: object) -> None:
        with self.lock:
            self.workers.add(worker)
            if self.limiter is None:
                if self.controller is None:
                    self.controller = ThreadpoolController()
                _take_control()
                self.limiter = self.controller.limit(limits=1, user_api="blas")

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
def bounded_blas() -> Iterator[None]:
    """One BLAS thread while inside, so that workers times BLAS threads stay within the cores."""
    bound, worker = _blas_bound, object()
    try:  # an interrupt may come at any point, also inside of enter
        bound.enter(worker)
        yield
    finally:
        bound.leave(worker)


class WorkspaceCache:
    """Prepared solvers that no task is using, least recently used first out; one cache for each process.

    A task takes a workspace out, so that none is ever used by two threads, and puts it back when done.

    Workspaces of one family differ in their matrices.  Where these are new in every call, idle workspaces are never
    used again, so a family keeps only as many as it asks for; when one is missed that was dropped for this, the family
    gets twice the room.  In bytes no family takes more than its share, so that none drives out all others.

    Args:
        capacity: how much cost (bytes, roughly) of idle workspaces is kept.
    """

    SHARE = 0.75
    """Of the capacity, for one family."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.cost = 0
        self.lock = threading.Lock()
        self.idle: OrderedDict[int, tuple[Hashable, Hashable, Any, int]] = OrderedDict()
        self.by_key: dict[Hashable, list[int]] = {}
        self.by_family: dict[Hashable, OrderedDict[int, None]] = {}
        self.cost_of: dict[Hashable, int] = {}
        self.dropped: OrderedDict[Hashable, Hashable] = OrderedDict()
        self.growth: OrderedDict[Hashable, int] = OrderedDict()
        self.tickets = 0
        self.changing = False

    def take(self, key: Hashable) -> Any | None:
        """A workspace put back under this key, or None."""
        with self._whole():
            tickets = self.by_key.get(key)
            if tickets:
                return self._remove(tickets[-1])
            family = self.dropped.pop(key, None)
            if family is not None:
                self.growth[family] = min(2 * self.growth.get(family, 1), _REMEMBERED)
                _shorten(self.growth)
            return None

    def take_oldest(self, family: Hashable, keep: int) -> Any | None:
        """The longest idle workspace of a family if more than ``keep`` of them are idle: one to give new data."""
        with self._whole():
            members = self.by_family.get(family, ())
            return self._remove(next(iter(members))) if len(members) > self._room(family, keep) else None

    def put(self, key: Hashable, family: Hashable, workspace: Any, cost: int, keep: int | None = None) -> None:
        """Hand a workspace back for later tasks with the same key.

        Args:
            key, family: what it is found by.
            workspace: the workspace.
            cost: bytes that it holds, roughly.
            keep: how many workspaces of this family are to be idle at most; None is any number.
        """
        with self._whole():
            self.tickets += 1
            self.idle[self.tickets] = (key, family, workspace, cost)
            self.by_key.setdefault(key, []).append(self.tickets)
            members = self.by_family.setdefault(family, OrderedDict())
            members[self.tickets] = None
            self.cost += cost
            self.cost_of[family] = self.cost_of.get(family, 0) + cost
            while keep is not None and len(members) > self._room(family, keep):
                ticket = next(iter(members))
                self.dropped[self.idle[ticket][0]] = family
                self._remove(ticket)
            _shorten(self.dropped)
            while len(members) > 1 and self.cost_of[family] > self.SHARE * self.capacity:
                self._remove(next(iter(members)))
            while self.cost > self.capacity and len(self.idle) > 1:
                self._remove(next(iter(self.idle)))

    def clear(self) -> None:
        """Forget every idle workspace."""
        with self._whole():
            self._forget()

    def _room(self, family: Hashable, keep: int) -> int:
        return keep * self.growth.get(family, 1)

    def _remove(self, ticket: int) -> Any:
        key, family, workspace, cost = self.idle.pop(ticket)
        self.by_key[key].remove(ticket)
        if not self.by_key[key]:
            del self.by_key[key]
        del self.by_family[family][ticket]
        self.cost_of[family] -= cost
        if not self.by_family[family]:
            del self.by_family[family], self.cost_of[family]
        self.cost -= cost
        return workspace

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Held by one thread at a time; what an interrupt has left half done is forgotten."""
        with self.lock:
            if self.changing:
                self._forget()
            self.changing = True
            yield
            self.changing = False

    def _forget(self) -> None:
        for part in (self.idle, self.by_key, self.by_family, self.cost_of, self.dropped, self.growth):
            part.clear()
        self.cost = 0


_REMEMBERED = 4096


def _shorten(memory: OrderedDict[Any, Any]) -> None:
    """Forget the oldest of what is remembered about workspaces that are gone."""
    while len(memory) > _REMEMBERED:
        memory.popitem(last=False)


workspaces = WorkspaceCache(capacity=2**29)
atexit.register(workspaces.clear)  # else ProxQP's binding reports them as leaked on stderr (proxsuite 0.8.0)


def _reset_after_fork() -> None:
    global _blas_bound
    _blas_bound = _BlasBound()
    workspaces.lock = threading.Lock()
    default_executor.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
