"""Nodes in front of nodes and of convex programs: gradients of the whole against finite differences."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import lpgd
from tests.node_cases import random

FIT = lpgd.NodeLayer(lpgd.nodes.LeastSquares())
POOL = lpgd.NodeLayer(lpgd.nodes.RobustPooling("pseudo_huber", dim=-2))
OWN = lpgd.NodeLayer(lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum() + 0.25 * (y**4).sum()))


def onto_ball(x: Tensor) -> Tensor:
    return lpgd.NodeLayer(lpgd.nodes.Projection("l2_ball", 0.5))(x)


def three_nodes(A: Tensor, b: Tensor) -> Tensor:
    return onto_ball(OWN(FIT(A, b)))


def pooled_plan(points: Tensor, cost: Tensor) -> Tensor:
    rows = POOL(points).softmax(-1)
    plan = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma=2.0))(cost, rows, rows)
    return lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(2))(plan)


def through_programs(x: Tensor) -> Tensor:
    y, q = cp.Variable(3), cp.Parameter(3)
    share = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(y - q)), [cp.sum(y) == 1, y >= 0])
    (y,) = lpgd.CvxpyLayer(share, parameters=[q], variables=[y])(OWN(x))
    eye = torch.eye(3, dtype=torch.float64)
    return OWN(lpgd.QPLayer()(eye, -y, G=eye, h=0.6 * torch.ones(3, dtype=torch.float64)).x)


CASES = {
    "three nodes": (three_nodes, (random(0, 2, 5, 3), random(1, 2, 5)), True),
    "pooling, transport, eigenvectors": (pooled_plan, (random(0, 2, 4, 3), random(1, 2, 3, 3)), True),
    "nodes around programs": (through_programs, (random(0, 2, 3),), False),
}


@pytest.mark.parametrize(("function", "inputs", "twice"), CASES.values(), ids=CASES.keys())
def test_gradients_of_compositions(function, inputs: tuple[Tensor, ...], twice: bool) -> None:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)
    if twice:
        assert torch.autograd.gradgradcheck(function, inputs, atol=1e-5, fast_mode=True)


def test_a_node_within_a_network_is_trained() -> None:
    # The network's numbers are a regression's weights; the loss of the fitted line tells which points are outliers.
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-1, 1, 20, dtype=torch.float64)
    outlier = torch.arange(20) % 4 == 0
    b = 2.0 * x + 5.0 * outlier
    weight = torch.randn(20, generator=generator, dtype=torch.float64).requires_grad_()
    layer = lpgd.NodeLayer(lpgd.nodes.LeastSquares(weighted=True, bias=True))
    optimiser = torch.optim.Adam([weight], lr=0.3)
    for _ in range(150):
        optimiser.zero_grad()
        slope, offset = layer(x[:, None], b, weight.sigmoid())
        ((slope - 2.0).square() + offset.square()).backward()
        optimiser.step()
    slope, offset = layer(x[:, None], b, weight.sigmoid()).tolist()
    assert abs(slope - 2.0) < 0.02
    assert abs(offset) < 0.02
    assert bool(weight[outlier].mean() < weight[~outlier].mean() - 1.0)
