"""A process of its own that trains through a layer, and what happens to it meanwhile; prints a line of JSON at the end.

Arguments: a folder for checkpoints, the number of steps, and what happens: ``nothing``, or some of ``interrupt`` (a
SIGINT in the middle of a step), ``worker`` (a process of the executor is killed), ``element`` (a batch has an element
that no solver solves) and ``restart`` (the process dies after a third of the steps; the caller starts it again).  Where
nothing happens, no other processes solve.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lpgd

SIZE, BATCH = 4, 6
MANY = 1000
"""So many steps take much longer than an interrupt; one that is lost is not survived."""


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of one step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64)
    return inputs, (inputs @ torch.linspace(-1, 1, SIZE * SIZE, dtype=torch.float64).reshape(SIZE, SIZE)).clamp(-1, 1)


class Training:
    """A linear map in front of a projection onto a box, by a solver in processes."""

    def __init__(self, folder: Path, pool: Executor) -> None:
        self.path = folder / "checkpoint.pt"
        self.weight = torch.zeros(SIZE, SIZE, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.weight], lr=0.05)
        self.layer = lpgd.QPLayer(solver="CLARABEL", on_error="nan", executor=pool)
        self.step, self.survived = 0, list[str]()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            self.step, self.survived = state["step"], state["survived"]
            self.optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                self.weight.copy_(state["weight"])

    def save(self) -> None:
        state = {"step": self.step, "survived": self.survived, "optimizer": self.optimizer.state_dict()}
        torch.save({**state, "weight": self.weight.detach()}, self.path.with_suffix(".new"))
        os.replace(self.path.with_suffix(".new"), self.path)

    def one(self, spoil: bool) -> float:
        """A step; a batch with an element that has no solution leaves it out."""
        inputs, targets = batch(self.step)
        q, lower = -(inputs @ self.weight), torch.full((BATCH, SIZE), -1.0, dtype=torch.float64)
        if spoil:
            lower = torch.cat([lower, torch.full((1, SIZE), 2.0, dtype=torch.float64)])
            q, targets = torch.cat([q, q[:1]]), torch.cat([targets, targets[:1]])
        x = self.layer(torch.eye(SIZE, dtype=torch.float64), q, lb=lower, ub=1.0).x
        loss = (x - targets).square()[x.isfinite()].sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def main() -> None:
    folder, steps, events = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have commands in the background ignore it
    torch.set_num_threads(1)
    processes = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
    with processes if events != ["nothing"] else lpgd.SerialExecutor() as pool:
        training, loss = Training(folder, pool), 0.0
        while training.step < steps:
            here = training.step
            if "restart" in events and here == steps // 3 and "restart" not in training.survived:
                training.survived.append("restart")
                training.save()
                for process in multiprocessing.active_children():
                    process.kill()
                os._exit(3)
            if "worker" in events and here == steps // 2 and "worker" not in training.survived:
                training.survived.append("worker")
                os.kill(next(process.pid or 0 for process in multiprocessing.active_children()), signal.SIGKILL)
            if "interrupt" in events and here == 2 * steps // 3 and "interrupt" not in training.survived:
                before = training.weight.detach().clone(), training.optimizer.state_dict()
                training.save()
                timer = threading.Timer(0.002, os.kill, (os.getpid(), signal.SIGINT))
                try:
                    timer.start()  # not sooner: what is interrupted is a step
                    for _ in range(MANY):
                        training.one(False)
                except KeyboardInterrupt:
                    training.survived.append("interrupt")
                # What the interrupt left half done is undone: as after every step, from the checkpoint.
                training = _again(training, before, folder, pool)
                continue
            loss = training.one("element" in events and here == steps // 4)
            if "element" in events and here == steps // 4:
                training.survived.append("element")
            training.step += 1
            training.save()
    report: dict[str, Any] = {"survived": sorted(training.survived), "steps": training.step, "loss": loss}
    print(json.dumps(report | {"weight": training.weight.detach().numpy().tobytes().hex()}), flush=True)


def _again(training: Training, before: Any, folder: Path, pool: Executor) -> Training:
    """The training of the last checkpoint, which knows what was survived since."""
    other = Training(folder, pool)
    assert torch.equal(other.weight, before[0])
    other.survived = training.survived
    other.save()
    return other


if __name__ == "__main__":
    main()
