"""A process of its own that interrupts batches with real signals and prints what came of each as a line of JSON.

Arguments: the size of a program, ``threads``, ``serial`` or ``pool``, and names of solvers.
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
from types import FrameType
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_info

from lpgd import CustomSolver, QPLayer
from lpgd.execution import SerialExecutor

SECONDS = 2.0
"""How long a batch takes that nobody interrupts, or longer."""
AFTER = 0.3
"""When it is interrupted."""

calls: list[int] = []


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


def interrupted(name: str, size: int, executor: Executor | None) -> dict[str, Any]:
    bound = 1e3 if name == "CUSTOM" else 0.1
    solver: Any = CustomSolver(unconstrained, threads=True) if name == "CUSTOM" else name
    layer = QPLayer(solver=solver, on_error="nan", executor=executor)
    P, q, G, h = program(size, 16, bound)

    def solve(batch: int) -> torch.Tensor:
        return layer(P, q.repeat(-(-batch // 16), 1)[:batch], G=G, h=h).x

    right, before = solve(16), settings()
    batch, seconds = 16, 0.0
    while seconds < SECONDS / 8:
        started = time.perf_counter()
        solve(batch)
        seconds, batch = time.perf_counter() - started, 2 * batch
    batch *= 8
    calls.clear()
    sent: list[float] = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(AFTER, send)
    timer.start()
    report: dict[str, Any] = {"solver": name, "raised": False, "batch": batch}
    try:
        solve(batch)
    except KeyboardInterrupt:
        report |= {"raised": True, "latency": time.perf_counter() - sent[0]}
    timer.join()
    used = time.process_time()
    time.sleep(0.1)
    report |= {
        "busy": time.process_time() - used,
        "calls": len(calls),
        "handler": signal.getsignal(signal.SIGINT) is on_interrupt,
        "settings": settings() == before,
        "again": False,
    }
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    except KeyboardInterrupt:
        report["again"] = True
    report["difference"] = float((solve(16) - right).abs().max())
    return report


def main() -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, on_interrupt)
    torch.set_num_threads(2)
    executors = {"threads": None, "serial": SerialExecutor(), "pool": ThreadPoolExecutor(3)}
    for name in sys.argv[3:]:
        print(json.dumps(interrupted(name, int(sys.argv[1]), executors[sys.argv[2]])), flush=True)


if __name__ == "__main__":
    main()
