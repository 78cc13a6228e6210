"""The one way batches are executed: tasks over a ``concurrent.futures.Executor``.

Serial execution is an executor with one worker.  Tasks are plain functions of picklable arguments, so that
threads, processes and cluster clients with the standard executor interface run the same code, and their
results come back in the order of the tasks.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from lpgd.execution.interrupts import abandon, hear, hearing, stoppable, to_the_end
from lpgd.execution.threads import bounded_blas, find_blas, torch_threads
from lpgd.status import warn

__all__ = ["SerialExecutor", "core_count", "default_executor", "run_tasks", "split", "worker_count"]

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
    """How many tasks an executor runs at once; the number of cores where it does not say.

    Those of ``concurrent.futures`` say it in ``_max_workers``, a cluster of Dask by the threads of all its workers.
    """
    executor = executor if executor is not None else default_executor()
    workers = getattr(executor, "_max_workers", None)
    if isinstance(workers, int):
        return workers
    client = getattr(executor, "_client", None)
    return _cluster_size(client) if hasattr(client, "scheduler_info") else core_count()


ASKED_EVERY = 5.0
"""Seconds after which a cluster is asked again how many workers it has: the answer takes some milliseconds."""
_clusters: WeakKeyDictionary[Any, tuple[float, int]] = WeakKeyDictionary()


def _cluster_size(client: Any) -> int:
    """The threads of all workers that a client of Dask knows; the number of cores while there are none."""
    asked, count = _clusters.get(client, (-ASKED_EVERY, 0))
    now = time.monotonic()
    if now - asked > ASKED_EVERY or not count:
        count = sum(worker["nthreads"] for worker in client.scheduler_info()["workers"].values())
        _clusters[client] = now, count
    return count or core_count()


def split(count: int, executor: Executor | None, per_worker: int = 4) -> list[range]:
    """Cut ``count`` elements into contiguous chunks: several for each worker, so that uneven ones even out."""
    workers = worker_count(executor)
    chunks = 1 if workers == 1 else min(count, per_worker * workers)
    edges = [round(chunk * count / max(chunks, 1)) for chunk in range(chunks + 1)]
    return [range(start, stop) for start, stop in pairwise(edges) if stop > start]


def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    executor: Executor | None,
    takes_interrupts: bool = False,
    away: Callable[[Task], None] | None = None,
) -> list[Result]:
    """``[function(task) for task in tasks]`` on an executor (None: threads), in order.

    A single task runs in the calling thread.  An exception in a task is raised here; it ends the others, and so does an
    interrupt: those that have not begun never do, those in threads stop at their next
    :func:`~lpgd.execution.interrupts.pause`.  Tasks of processes that died are run once more, in a fresh pool, with a
    warning; the fresh pool stands for the broken one from then on.

    Args:
        takes_interrupts: the tasks take the handler of interrupts away from Python while they run.  They then never
            run in the main thread, which listens instead.
        away: is told of each task that has ended in another process.
    """
    listens = takes_interrupts and hearing()
    if len(tasks) <= 1 or isinstance(executor, SerialExecutor):
        if not tasks or not listens:
            return [function(task) for task in tasks]
        return _finished([(_in_turn, function, tasks)], None, listens)[0]
    calls = [(_bounded, function, task) for task in tasks]
    if not isinstance(executor, ProcessPoolExecutor):
        return _finished(calls, executor, listens, away=away)
    return _survived(calls, executor, listens, away)


def _finished(
    calls: Sequence[tuple[Any, ...]],
    executor: Executor | None,
    listens: bool,
    kept: dict[int, Any] | None = None,
    away: Callable[[Any], None] | None = None,
) -> list[Any]:
    """The results of calls on an executor; none of them goes on after this.

    Those that are there when another call fails are ``kept``, by the call's number.
    """
    in_this_process = executor is None or type(executor) is ThreadPoolExecutor
    signals = _Signals(threading.Event(), threading.Event()) if in_this_process else None
    futures: list[Future[Any]] = []
    began: list[float] = []

    def end() -> None:
        began.append(time.perf_counter())
        left = not all(future.done() for future in futures)
        if signals is not None:
            if left:
                signals.stop.set()
            signals.begin.set()  # whoever still waits to begin stops at once
        if left:
            abandon(futures, signals and signals.stop, began[0])

    if in_this_process:
        find_blas()
    try:
        try:
            for call in calls:
                futures.append((executor or default_executor()).submit(call[0], signals, *call[1:]))
                if away is not None and not in_this_process:
                    futures[-1].add_done_callback(partial(_tell, away, call[-1]))
            if listens:
                hear(futures, signals and signals.begin)
            elif signals is not None:
                signals.begin.set()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            for number, future in enumerate(futures):
                if kept is not None and future.done() and not future.cancelled() and future.exception() is None:
                    kept[number] = future.result()
            raise
        finally:
            to_the_end(end)  # further interrupts leave no worker behind with its settings
    except KeyboardInterrupt:  # one just before that
        to_the_end(end)
        raise


_fresh: WeakKeyDictionary[ProcessPoolExecutor, ProcessPoolExecutor] = WeakKeyDictionary()
"""Pools that stand for broken ones."""


def _tell(away: Callable[[Task], None], task: Task, future: Future[Any]) -> None:
    if not future.cancelled():
        away(task)


def _survived(
    calls: Sequence[tuple[Any, ...]],
    executor: ProcessPoolExecutor,
    listens: bool,
    away: Callable[[Any], None] | None = None,
) -> list[Any]:
    """The results of calls on a pool of processes, whose death loses no call.

    Raises:
        BrokenProcessPool: the processes of the fresh pool died as well.
    """
    while executor in _fresh:
        executor = _fresh[executor]
    results: dict[int, Any] = {}
    try:
        return _finished(calls, executor, listens, results, away)
    except BrokenProcessPool:
        left = [number for number in range(len(calls)) if number not in results]
    warn(
        f"a process of the executor died (was it killed, or out of memory?): {len(left)} of {len(calls)} tasks are run "
        "once more, in a fresh pool of processes, which takes the place of the broken one."
    )
    pool: Any = executor
    fresh = ProcessPoolExecutor(pool._max_workers, pool._mp_context, pool._initializer, pool._initargs)
    _fresh[executor] = fresh
    results |= dict(zip(left, _finished([calls[number] for number in left], fresh, listens), strict=True))
    return [results[number] for number in range(len(calls))]


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
def _told(signals: _Signals | None) -> Generator[None]:
    """Begin when told to, and stop when told to."""
    if signals is not None:
        signals.begin.wait()
    with stoppable(signals and signals.stop):
        yield


def _reset_after_fork() -> None:
    default_executor.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)
