"""BlackboxLayer against a bare loop over its solver, and against PyEPO's layer on the same costs."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

import lpgd

from .harness import Settings, installed
from .results import Target

__all__ = ["run"]

FloatArray = NDArray[np.float64]
TAU = 10.0
PEER_EPSILON = 1e-8
SECONDS = 1e-3
"""What the solver of the overhead measurement takes for a solve.  All times are those of the processor: what other
programs do at the time does not count."""


def assignment(costs: FloatArray) -> FloatArray:
    chosen = np.zeros(costs.shape)
    chosen[scipy.optimize.linear_sum_assignment(costs)] = 1.0
    return chosen


def monotone_path(costs: FloatArray) -> FloatArray:
    """The cheapest path from corner to corner of a grid, right or down."""
    total = np.pad(np.cumsum(costs, 1), ((1, 0), (1, 0)), constant_values=np.inf)
    total[1, 0] = 0.0
    height, width = costs.shape
    for i, j in itertools.product(range(height), range(width)):
        total[i + 1, j + 1] = costs[i, j] + (0.0 if i == j == 0 else min(total[i, j + 1], total[i + 1, j]))
    path, i, j = np.zeros(costs.shape), height - 1, width - 1
    path[i, j] = 1.0
    while i or j:
        i, j = (i - 1, j) if j == 0 or (i > 0 and total[i, j + 1] <= total[i + 1, j]) else (i, j - 1)
        path[i, j] = 1.0
    return path


class Knapsack(NamedTuple):
    """Items of largest total value within a capacity, by dynamic programming."""

    weights: tuple[int, ...]
    capacity: int

    def __call__(self, values: FloatArray) -> FloatArray:
        best = np.zeros((len(values) + 1, self.capacity + 1))
        for item, weight in enumerate(self.weights):
            best[item + 1] = best[item]
            better = best[item, : self.capacity + 1 - weight] + values[item]
            best[item + 1, weight:] = np.maximum(best[item, weight:], better)
        chosen, left = np.zeros(len(values)), self.capacity
        for item in reversed(range(len(values))):
            if best[item + 1, left] > best[item, left]:
                chosen[item] = 1.0
                left -= self.weights[item]
        return chosen


class Problem(NamedTuple):
    name: str
    solver: Callable[[FloatArray], FloatArray]
    sense: Any
    shape: tuple[int, ...]


PROBLEMS = [
    Problem("assignment", assignment, "min", (8, 8)),
    Problem("path", monotone_path, "min", (8, 8)),
    Problem("knapsack", Knapsack((3, 7, 2, 9, 5, 4, 8, 6, 1, 5), 22), "max", (10,)),
]


def gradients(layer: Callable[[Tensor], Tensor], costs: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    leaf = costs.clone().requires_grad_()
    solution = layer(leaf)
    (gradient,) = torch.autograd.grad(solution, leaf, direction.to(solution.dtype))
    return solution.detach(), gradient


def peer_layer(problem: Problem, tau: float) -> Callable[[Tensor], Tensor]:
    """PyEPO's blackbox layer over the same solver."""
    import pyepo
    from pyepo.func import blackboxOpt
    from pyepo.model.opt import optModel

    class Model(optModel):
        def __init__(self) -> None:
            self.modelSense = pyepo.EPO.MINIMIZE if problem.sense == "min" else pyepo.EPO.MAXIMIZE
            self.costs = np.zeros(problem.shape)
            super().__init__()

        def _getModel(self) -> tuple[None, list[int]]:
            return None, list(range(int(np.prod(problem.shape))))

        def setObj(self, c: Any) -> None:
            self.costs = np.asarray(c, dtype=np.float64).reshape(problem.shape)

        def solve(self) -> tuple[FloatArray, float]:
            chosen = problem.solver(self.costs)
            return chosen.ravel(), float((chosen * self.costs).sum())

    layer = blackboxOpt(Model(), lambd=tau, processes=1)
    return lambda costs: layer(costs.flatten(1)).reshape(costs.shape)


def agreement(settings: Settings) -> Iterator[Target]:
    """Solutions and gradients beside PyEPO's, which divides by τ + 1e-8: ours are scaled to that."""
    batch = 16 if settings.quick else 200
    for problem in PROBLEMS:
        title = f"BlackboxBackprop, {problem.name}, batch {batch}: largest difference from PyEPO's gradient"
        if not installed("pyepo"):
            yield Target(title, 1e-12, None, None, smaller=True, note="PyEPO is not installed (pip install pyepo)")
            continue
        generator = torch.Generator().manual_seed(0)
        costs, direction = (torch.randn(batch, *problem.shape, generator=generator) for _ in range(2))
        ours = lpgd.BlackboxLayer(problem.solver, lpgd.BlackboxBackprop(TAU), problem.sense)
        (x, gradient), (theirs, other) = (
            gradients(layer, costs.double(), direction.double()) for layer in (ours, peer_layer(problem, TAU))
        )
        difference = float((gradient * TAU / (TAU + PEER_EPSILON) - other).abs().max())
        moved = float(gradient.flatten(1).any(1).double().mean())
        same = bool(torch.equal(x, theirs.double()))
        note = f"{difference:.1e}; solutions {'equal' if same else 'differ'}, {moved:.0%} of the gradients are not zero"
        yield Target(title, 1e-12, None, difference if same else float("inf"), smaller=True, note=note)


def timed(costs: FloatArray) -> FloatArray:
    """Minimises over [0, 1]ⁿ, and is done after a millisecond."""
    until = time.thread_time() + SECONDS
    chosen = (costs < 0).astype(np.float64)
    while time.thread_time() < until:
        pass
    return chosen


def overhead(settings: Settings, repeats: int = 15) -> Iterator[Target]:
    """A loop over the solver in turn with the layer, one worker; forward, then forward and backward."""
    batch, n = 32, 100
    layer = lpgd.BlackboxLayer(timed, lpgd.BlackboxBackprop(TAU))
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {name: [] for name in ("loop", "forward", "both")}
    for _ in range(3 if settings.quick else repeats):
        costs = torch.randn(batch, n, generator=generator, dtype=torch.float64).requires_grad_()
        direction = torch.randn(batch, n, generator=generator, dtype=torch.float64)
        started = time.process_time()
        expected = np.stack([timed(row) for row in costs.detach().numpy()])
        looped = time.process_time()
        x = layer(costs)
        solved = time.process_time()
        x.backward(direction)
        finished = time.process_time()
        if not np.array_equal(x.detach().numpy(), expected):
            raise AssertionError("the layer's solutions are not the solver's")
        for name, value in (("loop", looped - started), ("forward", solved - looped), ("both", finished - looped)):
            seconds[name].append(value)
    loop, forward, both = (statistics.median(seconds[name]) for name in ("loop", "forward", "both"))
    for name, took, loops in (("forward", forward, 1), ("forward and backward", both, 2)):
        title = f"BlackboxLayer against a bare loop, a solver of 1 ms, batch {batch}, one worker: {name}, ratio"
        extra = 1e6 * (took - loops * loop) / (loops * batch)
        note = f"layer {1e3 * took:.2f} ms, {loops} loops {1e3 * loops * loop:.2f} ms, {extra:.0f} µs a solve more"
        yield Target(title, 1.10, 1.02, took / (loops * loop), smaller=True, note=note)


def run(settings: Settings) -> Iterator[Target]:
    yield from overhead(settings)
    yield from agreement(settings)
