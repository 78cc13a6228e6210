"""One layer of each front-end, called and differentiated, as a function of an executor."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

import lpgd

BATCH, N = 4, 3
Call = Callable[[], Tensor]


def costs() -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, N, generator=random, dtype=torch.float64)


def cvxpy_layer(executor: Executor | None = None, solver: Any = "CLARABEL") -> torch.nn.Module:
    x, a = cp.Variable(N), cp.Parameter(N)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1, x[0] >= -0.5])
    return lpgd.CvxpyLayer(problem, parameters=[a], variables=[x], solver=solver, executor=executor)


def qp_layer(executor: Executor | None = None, solver: Any = "CLARABEL") -> torch.nn.Module:
    return lpgd.QPLayer(solver, executor=executor)


def lp_layer(executor: Executor | None = None, solver: Any = "CLARABEL") -> torch.nn.Module:
    return lpgd.LPLayer(solver, lpgd.LPGD(tau=0.5), executor=executor)


def conic_layer(executor: Executor | None = None, solver: Any = "CLARABEL") -> torch.nn.Module:
    return lpgd.ConicLayer(lpgd.Cones(second_order=(N + 1,)), solver, executor=executor)


def node_layer(executor: Executor | None = None, solver: Any = None) -> torch.nn.Module:
    return lpgd.NodeLayer(lpgd.nodes.Projection())


def own_node_layer(executor: Executor | None = None, solver: Any = None) -> torch.nn.Module:
    return lpgd.NodeLayer(lpgd.Node(quartic))


def quartic(x: Tensor, y: Tensor) -> Tensor:
    return (y - x).square().sum() + y.pow(4).sum()


def blackbox_layer(executor: Executor | None = None, solver: Any = None) -> torch.nn.Module:
    return lpgd.BlackboxLayer(least, lpgd.LPGD(tau=3.0), executor=executor)


def least(values: Any) -> Any:
    """The indicator of the least cost."""
    return np.eye(values.size)[np.argmin(values)]


def called(layer: torch.nn.Module, values: Tensor) -> Tensor:
    """The solutions of a layer for costs (B, 3)."""
    eye = torch.eye(N, dtype=torch.float64)
    if isinstance(layer, lpgd.CvxpyLayer):
        return layer(values)[0]
    if isinstance(layer, lpgd.QPLayer):
        return layer(eye, values, lb=-0.5, ub=0.5).x
    if isinstance(layer, lpgd.LPLayer):
        return layer(values, lb=-0.5, ub=0.5).x
    if isinstance(layer, lpgd.ConicLayer):
        A = torch.cat([torch.zeros(1, N, dtype=torch.float64), -eye])
        return layer(None, values, A, torch.eye(N + 1, dtype=torch.float64)[0]).x
    return layer(values)


FRONT_ENDS: dict[str, Callable[..., torch.nn.Module]] = {
    "CvxpyLayer": cvxpy_layer,
    "QPLayer": qp_layer,
    "LPLayer": lp_layer,
    "ConicLayer": conic_layer,
    "NodeLayer": node_layer,
    "NodeLayer, own": own_node_layer,
    "BlackboxLayer": blackbox_layer,
}
