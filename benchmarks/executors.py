"""What workers gain and what it costs to send them data: ``python -m benchmarks.executors`` prints the tables.

Dense quadratic programs with their own matrices, forward passes; each executor with one and two workers.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

import lpgd
from lpgd.execution.tasks import core_count

WORKERS = (1, 2)


def programs(n: int, batch: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    root = torch.randn(batch, n, n, generator=random, dtype=torch.float64)
    G = torch.randn(batch, n, n, generator=random, dtype=torch.float64)
    q, h = torch.randn(batch, n, generator=random, dtype=torch.float64), torch.ones(batch, n, dtype=torch.float64)
    return root @ root.mT / n + 0.1 * torch.eye(n, dtype=torch.float64), q, G, h


@contextmanager
def dask(workers: int) -> Iterator[Executor]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor()


EXECUTORS: dict[str, Callable[[int], Any]] = {
    "threads": ThreadPoolExecutor,
    "processes": lambda workers: ProcessPoolExecutor(workers, get_context("spawn")),
    "Dask": dask,
}


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The least of a few times: what other programs do on the machine adds to all of them."""
    call()
    found: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def scaling(solver: str, sizes: list[tuple[int, int]], repeats: int) -> None:
    print(f"{solver}, ms for an element; this machine has {core_count()} cores")
    print(
        "| n | batch | calling thread | "
        + " | ".join(f"{name}, {count}" for name in EXECUTORS for count in WORKERS)
        + " |"
    )
    for n, batch in sizes:
        P, q, G, h = programs(n, batch)
        cells: list[float] = []
        with ExitStack() as stack:
            made = [stack.enter_context(make(count)) for make in EXECUTORS.values() for count in WORKERS]
            for executor in (lpgd.SerialExecutor(), *made):
                solve = partial(lpgd.QPLayer(solver, executor=executor).solve, P, q, G=G, h=h)
                cells.append(1e3 * seconds(solve, repeats) / batch)
        print(f"| {n} | {batch} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |", flush=True)


def moving(sizes: list[tuple[int, int]], repeats: int) -> None:
    """What one element's data and answer weigh, there and back, and the time to pickle and unpickle them."""
    print("| n | matrices | kB for an element, there and back | ms to pickle and unpickle |")
    for n, batch in sizes:
        P, q, G, h = programs(n, batch)
        for name, there in (("own", (P, q, G, h)), ("shared", (P[0], q, G[0], h))):
            arrays = [part.numpy() for part in (*there, q, h, h, q)]
            size = len(pickle.dumps(arrays, 5)) / batch
            spent = seconds(lambda own=arrays: pickle.loads(pickle.dumps(own, 5)), repeats) / batch
            print(f"| {n} | {name} | {size / 1e3:.3g} | {1e3 * spent:.2g} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.executors", description=__doc__)
    parser.add_argument("--solver", default="CLARABEL")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    options = parser.parse_args(arguments)
    sizes = [(10, 8)] if options.quick else [(10, 256), (50, 64), (100, 32)]
    scaling(options.solver, sizes, options.repeats)
    moving(sizes, options.repeats)


if __name__ == "__main__":
    main()
