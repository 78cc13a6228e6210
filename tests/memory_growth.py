"""``python -m tests.memory_growth 10000 NAME...``: how much a process grows while one kind of layer trains on new data.

Names are those of :data:`TRAINERS`: ``OSQP`` trains a QPLayer with new matrices in each step, ``SCS, cones`` a
ConicLayer with a second-order cone, ``pooling huber`` a node, ``blackbox`` an oracle.  Every step solves a batch and
differentiates it.  Memory is read after a tenth of the steps and at the end; a line of JSON for each name.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lpgd import BlackboxLayer, Cones, ConicLayer, DirectLoss, DirectLossLayer, NodeLayer, QPLayer, available
from lpgd.execution.workspaces import workspaces
from tests.memory_run import resident
from tests.node_cases import NODES, NodeCase
from tests.oracles import assignment

__all__ = ["TRAINERS", "growth"]

BATCH, N = 2, 8
Step = Callable[[], None]


def _quadratic(name: str) -> Step:
    layer, eye = QPLayer(solver=name, on_error="nan"), torch.eye(N, dtype=torch.float64)

    def step() -> None:
        root, G = torch.randn(2, BATCH, N, N, dtype=torch.float64)
        q = torch.randn(BATCH, N, dtype=torch.float64, requires_grad=True)
        P = (root @ root.mT + eye).requires_grad_()
        output: Any = layer(P, q, G=G.requires_grad_(), h=torch.ones(N, dtype=torch.float64))
        output.x.nan_to_num().square().sum().backward()

    return step


def _conic(name: str) -> Step:
    cones = Cones(nonnegative=2 * N, second_order=(N + 1,))
    layer, eye = ConicLayer(cones, solver=name, on_error="nan"), torch.eye(N, dtype=torch.float64)
    box = torch.cat([eye, -eye]).expand(BATCH, -1, -1)
    b = torch.cat([torch.full((2 * N,), 2.0), torch.ones(1), torch.zeros(N)]).double()

    def step() -> None:
        ball = torch.randn(BATCH, N + 1, N, dtype=torch.float64)
        ball[:, 0] *= 0.1
        A = torch.cat([box, ball], 1).requires_grad_()
        q = torch.randn(BATCH, N, dtype=torch.float64, requires_grad=True)
        output: Any = layer(None, q, A, b)
        output.x.nan_to_num().square().sum().backward()

    return step


def _node(case: NodeCase) -> Step:
    layer, seeds = NodeLayer(case.node, on_error="nan"), iter(range(1, 10**9))

    def step() -> None:
        output: Any = layer(*case.inputs(next(seeds) % 50))
        output.nan_to_num().square().sum().backward()

    return step


def _best(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return (weights > 0).astype(np.float64)


def _distance(x: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    return float(np.abs(x - target).sum())


def _augmented(weights: NDArray[np.float64], step: float, target: NDArray[np.float64]) -> NDArray[np.float64]:
    return _best(weights - step * (1.0 - 2.0 * target))


def _oracle(loss: bool) -> Step:
    def step() -> None:
        costs = torch.randn(BATCH, 5, 5, dtype=torch.float64, requires_grad=True)
        layer = BlackboxLayer(assignment, DirectLoss(0.5))
        (layer(costs) * torch.randn(5, 5, dtype=torch.float64)).sum().backward()

    losses = DirectLossLayer(_best, lambda x: x, _distance, _augmented, DirectLoss(0.5))

    def loss_step() -> None:
        weights = torch.randn(BATCH, N, dtype=torch.float64, requires_grad=True)
        losses(weights, target=(torch.randn(BATCH, N) > 0).double()).sum().backward()

    return loss_step if loss else step


CONIC = [name for name in ("CLARABEL", "SCS", "ECOS", "MOREAU") if name in available()]

TRAINERS: dict[str, Callable[[], Step]] = {
    **{name: partial(_quadratic, name) for name in available()},
    **{f"{name}, cones": partial(_conic, name) for name in CONIC},
    **{name: partial(_node, case) for name, case in NODES.items()},
    "blackbox": partial(_oracle, False),
    "direct loss": partial(_oracle, True),
}
"""From a name to what makes a step of training."""


def growth(name: str, steps: int) -> dict[str, Any]:
    """Megabytes by which the process grows from a tenth of the steps to their end, and the most idle workspaces."""
    torch.manual_seed(0)
    step, start, idle = TRAINERS[name](), 0, 0
    for number in range(steps):
        step()
        idle = max(idle, len(workspaces.idle))
        if number == steps // 10:
            start = resident()
    report = {"name": name, "steps": steps, "grown": (resident() - start) / 2**20, "idle": idle}
    workspaces.clear()
    return report


def main() -> None:
    warnings.simplefilter("ignore")
    for name in sys.argv[2:]:
        print(json.dumps(growth(name, int(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()
