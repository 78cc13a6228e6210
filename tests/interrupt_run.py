"""A process of its own that interrupts batches with real signals and prints what came of each as a line of JSON.

Arguments: the size of a program, what to do, and names of solvers.  ``threads``, ``serial`` and ``pool`` interrupt a
batch, ``one`` a single element, ``handled`` interrupts batches by a handler that goes on, ``fork`` solves in a child.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from types import FrameType
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info

import lpgd
from lpgd import CustomSolver, QPLayer, solvers
from lpgd.execution.tasks import SerialExecutor

SECONDS = 1.5
"""How long a batch takes that nobody interrupts, or longer."""
AFTER = 0.2
"""When it is interrupted."""
PROMPT = 1.0
"""How soon it has to end."""

calls: list[int] = []
TIMES = 8
"""How often a handler that goes on is called."""


def on_interrupt(number: int, frame: FrameType | None) -> None:
    calls.append(number)
    raise KeyboardInterrupt


def unconstrained(P: Any, q: Any, *_: Any) -> Any:
    time.sleep(0.003)
    return np.linalg.solve(P.toarray(), -q)


def settings() -> list[Any]:
    blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return [torch.get_num_threads(), *blas]


def program(size: int, batch: int, bound: float) -> tuple[torch.Tensor, ...]:
    random = np.random.default_rng(0)
    root = random.standard_normal((size, size))
    P = root @ root.T / size + 0.01 * np.eye(size)
    q, G = random.standard_normal((batch, size)), random.standard_normal((size, size))
    return tuple(map(torch.from_numpy, (P, q, G, np.full(size, bound))))


def quartic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y - x).square().sum() + y.pow(4).sum()


def least(costs: Any) -> Any:
    """The indicator of the least cost, after a millisecond."""
    time.sleep(0.001)
    return np.eye(costs.size)[np.argmin(costs)]


class Case:
    """A layer and its data."""

    @classmethod
    def of(cls, name: str, size: int, executor: Executor | None) -> Case:
        return _OTHERS[name](name, size, executor) if name in _OTHERS else cls(name, size, executor)

    def __init__(self, name: str, size: int, executor: Executor | None, alone: bool = False) -> None:
        self.name = name
        solver: Any = CustomSolver(unconstrained, threads=True) if name == "CUSTOM" else name
        if alone:  # no other solver helps out
            solver = getattr(solvers, name)(rescue=False)
        self.layer = QPLayer(solver=solver, on_error="nan", executor=executor)
        self.P, self.q, self.G, self.h = program(size, 16, 1e3 if name == "CUSTOM" else 0.1)

    def solve(self, batch: int, **options: Any) -> torch.Tensor:
        q = self.q.repeat(-(-batch // 16), 1)[:batch]
        return self.layer(self.P, q, G=self.G, h=self.h, solver_args=options).x

    def lasting(self, seconds: float) -> int:
        """A batch that takes so long, or longer."""
        batch, taken = 16, 0.0
        while taken < seconds / 8:
            started = time.perf_counter()
            self.solve(batch)
            taken, batch = time.perf_counter() - started, 2 * batch
        return 8 * batch

    def interrupt(self, batch: int, **options: Any) -> dict[str, Any]:
        calls.clear()
        sent: list[float] = []

        def send() -> None:
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)

        timer = threading.Timer(AFTER, send)
        timer.start()
        report: dict[str, Any] = {"solver": self.name, "raised": False, "batch": batch}
        try:
            self.solve(batch, **options)
        except KeyboardInterrupt:
            report |= {"raised": True, "latency": time.perf_counter() - sent[0]}
        with suppress(KeyboardInterrupt):  # the batch ended before the signal
            timer.join()
        used = time.process_time()
        time.sleep(0.1)
        report |= {"busy": time.process_time() - used, "calls": len(calls), "again": False}
        report["handler"] = signal.getsignal(signal.SIGINT) is on_interrupt
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
        except KeyboardInterrupt:
            report["again"] = True
        return report


class NodeCase(Case):
    """A node: the user's own, by Newton's method, or optimal transport."""

    def __init__(self, name: str, size: int, executor: Executor | None) -> None:
        self.name = name
        node = lpgd.Node(quartic) if name == "NODE" else lpgd.nodes.OptimalTransport(0.05)
        self.layer: Any = lpgd.NodeLayer(node)
        shape = (16, size) if name == "NODE" else (16, size, size)
        self.q = torch.from_numpy(np.random.default_rng(0).standard_normal(shape))

    def solve(self, batch: int, **options: Any) -> torch.Tensor:
        return self.layer(self.q.repeat(-(-batch // 16), *[1] * (self.q.ndim - 1))[:batch])


class OracleCase(Case):
    """A user's function."""

    def __init__(self, name: str, size: int, executor: Executor | None) -> None:
        self.name, self.layer = name, lpgd.BlackboxLayer(least, lpgd.LPGD(tau=1.0), executor=executor)
        self.q = torch.from_numpy(np.random.default_rng(0).standard_normal((16, size)))

    def solve(self, batch: int, **options: Any) -> torch.Tensor:
        return self.layer(self.q.repeat(-(-batch // 16), 1)[:batch])


_OTHERS: dict[str, Any] = {"NODE": NodeCase, "TRANSPORT": NodeCase, "ORACLE": OracleCase}


def interrupted(name: str, size: int, executor: Executor | None) -> dict[str, Any]:
    case = Case.of(name, size, executor)
    right, before = case.solve(16), settings()
    batch = case.lasting(SECONDS)
    report = case.interrupt(batch)
    for _ in range(3):
        if report["raised"] and report["latency"] < PROMPT:
            break
        if not report["raised"]:
            batch *= 4  # it took less time than the ones that it was estimated from
        report = case.interrupt(batch)  # others may have had the processor once; what does not listen is late each time
    return report | {"settings": settings() == before, "same": same(case.solve(16), right)}


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.allclose(first, second, atol=1e-4, rtol=0.0, equal_nan=True)


def one(name: str, size: int) -> dict[str, Any]:
    """A single element that would take very long: what a solver cannot reach, it looks for to its last iteration."""
    report: dict[str, Any] = {"raised": False}
    while not report["raised"] and size < 2000:  # ECOS gives up: on a fast machine before it is interrupted
        report, size = Case(name, size, None, alone=True).interrupt(1, tolerance=1e-30, max_iterations=10**6), 2 * size
    return report


def handled(name: str, size: int) -> dict[str, Any]:
    case, count = Case(name, size, None), 0
    right = case.solve(16)
    batch = case.lasting(0.1)
    wanted = right.repeat(batch // 16, 1)
    calls.clear()
    signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
    done = threading.Event()

    def send() -> None:
        for _ in range(TIMES):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
        done.set()

    threading.Thread(target=send).start()
    good = True
    while not done.is_set():
        good, count = good and same(case.solve(batch), wanted), count + 1
    time.sleep(0.1)
    signal.signal(signal.SIGINT, on_interrupt)
    return {"solver": name, "sent": TIMES, "calls": len(calls), "same": good, "batches": count}


def fork(name: str, size: int) -> None:
    """A child that solves what its parent has solved, with threads."""
    case = Case(name, size, None)
    torch.randn(3_000_000).exp()
    torch.mm(torch.randn(600, 600), torch.randn(600, 600))
    right = case.solve(304)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # what waits for ever ends so
        print("same" if same(case.solve(304), right) else "different", flush=True)
        os._exit(0)
    os.waitpid(child, 0)


def main() -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, on_interrupt)
    torch.set_num_threads(2)
    executors = {"threads": None, "serial": SerialExecutor(), "pool": ThreadPoolExecutor(3)}
    size, mode = int(sys.argv[1]), sys.argv[2]
    for name in sys.argv[3:]:
        if mode == "fork":
            fork(name, size)
            continue
        run = {"one": one, "handled": handled}.get(mode)
        report = run(name, size) if run is not None else interrupted(name, size, executors[mode])
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
