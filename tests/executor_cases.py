"""What tests of executors send to other processes, and the executors themselves."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lpgd import Clarabel
from lpgd.solvers.backends.prepared import Outcome, Prepared

made = 0
"""How many solvers this process has prepared."""


@dataclass(frozen=True)
class Counted(Clarabel):
    """Clarabel, whose iterations are how many solvers its process had prepared by then."""

    def prepare(self, form: Any) -> Prepared:
        global made
        made += 1
        return _Counted(super().prepare(form))


class _Counted(Prepared):
    def __init__(self, inner: Prepared) -> None:
        self.inner = inner

    def solve(self, vectors: Any, state: Any) -> Outcome:
        return self.inner.solve(vectors, state)._replace(iterations=made)

    def memory(self, form: Any) -> int:
        return self.inner.memory(form)


def square(task: tuple[int, str]) -> int:
    """Of the number 3, the first process dies."""
    number, path = task
    mark = Path(path)
    if number == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def processes(method: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(2, multiprocessing.get_context(method))


class RayExecutor(Executor):
    """Tasks on a Ray cluster, each run once more where its worker died."""

    def __init__(self) -> None:
        import ray

        self._ray = ray
        self._call = ray.remote(max_retries=1, num_cpus=1)(_call)
        self._max_workers = int(ray.cluster_resources()["CPU"])

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self._call.remote(fn, args, kwargs).future()


def _call(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return fn(*args, **kwargs)
