"""Optimal control against the horizon: a pendulum's swing-up.

In four seconds, in ever shorter steps; and in steps of a twentieth of a second, for ever longer.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import lpgd

from .harness import Settings
from .results import Curve, Target

__all__ = ["run"]

HORIZONS, QUICK_HORIZONS = (40, 80, 160, 320, 640), (10, 20)
MOST = 1.1


def pendulum(x: Tensor, u: Tensor, length: Tensor, h: Tensor) -> Tensor:
    return torch.stack([x[0] + h * x[1], x[1] + h * (u[0] - 9.81 / length * torch.sin(x[0]))])


def effort(x: Tensor, u: Tensor, length: Tensor, h: Tensor) -> Tensor:
    return h * (0.1 * u.square().sum() + 0.1 * (x[0] - math.pi) ** 2 + 0.01 * x[1] ** 2)


def upright(x: Tensor, length: Tensor, h: Tensor) -> Tensor:
    return 10 * ((x[0] - math.pi) ** 2 + x[1] ** 2)


def run(settings: Settings) -> Iterator[Curve | Target]:
    forward = Curve("nodes_control", "pendulum: solve", "stages", "seconds")
    backward = Curve("nodes_control_backward", "pendulum: gradient", "stages", "seconds")
    bounds = {
        "no bounds": (None, None),
        "bounds on controls and states": ((-6.0, 6.0), ((-math.inf, -5.0), (math.inf, 5.0))),
    }
    steps: dict[str, Callable[[int], float]] = {
        "four seconds": lambda size: 4.0 / size,
        "steps of 0.05": lambda _: 0.05,
    }
    for (bounded, limits), (setting, step) in itertools.product(bounds.items(), steps.items()):
        label = f"{bounded}, {setting}"
        sizes = QUICK_HORIZONS if settings.quick else HORIZONS
        found = []
        for horizon in sizes:
            node = lpgd.nodes.OptimalControl(pendulum, effort, upright, horizon, 1, *limits, ndims=0)
            pair = _measure(node, step(horizon), settings.repeats)
            forward.add(label, horizon, pair[0])
            backward.add(label, horizon, pair[1])
            found.append(pair)
        slopes = [float(np.polyfit(np.log(sizes), np.log(part), 1)[0]) for part in zip(*found, strict=True)]
        for role, slope in zip(("solve", "gradient"), slopes, strict=True):
            title = f"pendulum, {label}: {role} grows as the horizon to the power of at most {MOST}"
            yield Target(title, MOST, None, slope, smaller=True, note="slope in logarithms")
    yield forward
    yield backward


def _measure(node: lpgd.nodes.OptimalControl, step: float, repeats: int) -> tuple[float, float]:
    layer = lpgd.NodeLayer(node)
    state = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    length = torch.ones(1, dtype=torch.float64, requires_grad=True)
    h = torch.full((1,), step, dtype=torch.float64)
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        y = layer(state, length, h)
        middle = time.perf_counter()
        torch.autograd.grad(y.sum(), (state, length))
        times.append((middle - started, time.perf_counter() - middle))
    first, second = zip(*times[1:], strict=True)
    return min(first), min(second)
