"""Nodes of one's own in other units: of length, of constraints, and of the objective."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lpgd
from tests.node_cases import random

UNITS = [2.0**-27, 2.0**-13, 2.0**7, 2.0**13, 2.0**27]


def distance(x: Tensor, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (y - x).square().sum()


def excess(x: Tensor, r: Tensor, c: Tensor, y: Tensor) -> Tensor:
    return c * (y.square().sum() - r.square())


SPHERE = lpgd.Node(distance, equality=excess, ndims=(1, 0, 0))
BALL = lpgd.Node(distance, inequality=excess, ndims=(1, 0, 0))


def check(node: lpgd.Node, unit: float, of_constraints: float, gradient: lpgd.ImplicitKKT | lpgd.LPGD) -> None:
    """Of the nearest point ``y = r x/|x|``, and of ``<v, y>``: ``(r/|x|) (v - <v, x> x/|x|²)`` and ``<v, x>/|x|``."""
    x = (unit * random(3, 2, 4)).requires_grad_()
    r = (unit * torch.tensor([0.5, 0.25], dtype=torch.float64)).requires_grad_()
    v = random(4, 2, 4)
    y = lpgd.NodeLayer(node, gradient)(x, r, of_constraints)
    size = x.detach().norm(dim=-1, keepdim=True)
    toward, radius = x.detach() / size, r.detach()[:, None]
    torch.testing.assert_close(y.detach(), radius * toward, rtol=0, atol=1e-12 * unit)
    (y * v).sum().backward()
    along = (v * toward).sum(-1, keepdim=True)
    accuracy = 1e-9 if isinstance(gradient, lpgd.ImplicitKKT) else 1e-5
    torch.testing.assert_close(x.grad, radius / size * (v - along * toward), rtol=0, atol=accuracy)
    torch.testing.assert_close(r.grad, along[:, 0], rtol=0, atol=accuracy)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("node", [SPHERE, BALL], ids=["equality", "inequality"])
def test_a_unit_of_length_changes_nothing(node: lpgd.Node, unit: float) -> None:
    for gradient in (lpgd.ImplicitKKT(), lpgd.LPGD()):
        check(node, unit, 1.0, gradient)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("node", [SPHERE, BALL], ids=["equality", "inequality"])
def test_a_unit_of_constraints_changes_nothing(node: lpgd.Node, unit: float) -> None:
    check(node, 1.0, unit, lpgd.ImplicitKKT())


def test_what_is_infeasible_stays_so_in_all_units() -> None:
    """``|y|² = -1``, in units of 1e6."""
    node = lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum(), equality=lambda x, y: 1e6 * (y.square().sum() + 1.0))
    (status,) = lpgd.NodeLayer(node, on_error="nan").solve(torch.ones(3, dtype=torch.float64)).statuses
    assert status is lpgd.Status.INFEASIBLE
