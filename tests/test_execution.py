"""Executors, the BLAS bound and the cache of workspaces."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from lpgd.execution.tasks import SerialExecutor, run_tasks, split, worker_count
from lpgd.execution.threads import bounded_blas
from lpgd.execution.workspaces import WorkspaceCache


def blas_threads() -> list[int]:
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.mark.parametrize(
    "executor", [None, SerialExecutor(), ThreadPoolExecutor(3)], ids=["default", "serial", "threads"]
)
def test_results_come_in_the_order_of_the_tasks(executor: Executor | None) -> None:
    def slow_first(task: int) -> int:
        time.sleep(0.02 * (5 - task))
        return task * task

    assert run_tasks(slow_first, list(range(5)), executor) == [0, 1, 4, 9, 16]
    assert run_tasks(slow_first, [], executor) == []


@pytest.mark.parametrize("executor", [None, SerialExecutor()], ids=["default", "serial"])
def test_an_exception_in_a_task_is_raised(executor: Executor | None) -> None:
    def fails(task: int) -> int:
        raise KeyError(task)

    with pytest.raises(KeyError, match="0"):
        run_tasks(fails, [0, 1], executor)
    with pytest.raises(KeyError):
        SerialExecutor().submit(fails, 1).result()


@pytest.mark.parametrize("count", [0, 1, 7, 150])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_chunks_cover_every_element_once(count: int, workers: int) -> None:
    with ThreadPoolExecutor(workers) as executor:
        chunks = split(count, executor)
        assert worker_count(executor) == workers
    assert [element for chunk in chunks for element in chunk] == list(range(count))
    assert len(chunks) <= 4 * workers


def test_blas_is_held_at_one_thread_while_any_task_runs_and_then_restored() -> None:
    with threadpool_limits(limits=2, user_api="blas"):
        before = blas_threads()
        inside: list[list[int]] = []
        barrier = threading.Barrier(2)

        def work(_: int) -> None:
            barrier.wait(timeout=10)
            inside.append(blas_threads())
            barrier.wait(timeout=10)

        with ThreadPoolExecutor(2) as executor:
            run_tasks(work, [0, 1], executor)
        assert all(threads == 1 for pools in inside for threads in pools)
        assert blas_threads() == before
        with pytest.raises(RuntimeError, match="inside"), bounded_blas():
            raise RuntimeError("inside")
        assert blas_threads() == before


def test_the_cache_hands_each_workspace_to_one_user_and_forgets_the_oldest() -> None:
    cache = WorkspaceCache(capacity=40)
    for number in range(3):
        cache.put(("key", number), "family", f"workspace {number}", cost=10)
    assert cache.take(("key", 0)) == "workspace 0"
    assert cache.take(("key", 0)) is None  # it is in use
    cache.put(("key", 0), "family", "workspace 0", cost=10)
    cache.put(("key", 3), "family", "workspace 3", cost=10)  # past a family's share: the oldest, number 1, goes
    assert cache.take(("key", 1)) is None
    assert cache.take_oldest("family", keep=3) is None
    assert cache.take_oldest("family", keep=2) == "workspace 2"
    assert cache.take_oldest("other family", keep=0) is None
    for number in range(4):  # past the capacity: the oldest of all go, of whatever family
        cache.put(("other key", number), f"other family {number}", "workspace", cost=10)
    assert cache.cost == 40
    assert cache.take(("key", 3)) is None
    cache.clear()
    assert cache.cost == 0
    assert cache.take(("other key", 3)) is None
