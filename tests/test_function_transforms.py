"""Layers under torch.func: Jacobians and Hessians beside those of torch.autograd, one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.gradients import GradientMethod
from tests.node_cases import random


def program(q: Tensor) -> Tensor:
    eye = torch.eye(3, dtype=torch.float64)
    return lpgd.QPLayer()(eye, q, G=eye, h=torch.ones(3, dtype=torch.float64)).x


FUNCTIONS = {"node": lpgd.NodeLayer(lpgd.nodes.Projection("l2_sphere")), "program": program}
EVERY = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


@EVERY
@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobians(function: Callable[[Tensor], Tensor], transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    x = random(0, 2, 3)
    expected = torch.autograd.functional.jacobian(function, x)
    torch.testing.assert_close(transform(function)(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("transform", [torch.func.hessian, lambda f: torch.func.jacrev(torch.func.jacrev(f))])
def test_hessians(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    def loss(x: Tensor) -> Tensor:
        y = FUNCTIONS["node"](x)
        return (y**3).sum() + y[0, 1]

    x = random(0, 2, 3)
    expected = torch.autograd.functional.hessian(loss, x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(transform(loss)(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", [lpgd.ClosedForm(), lpgd.ImplicitKKT(), lpgd.LPGD(0.1), lpgd.LPGD(0.1, rho=0.5)])
def test_single_precision(method: GradientMethod) -> None:
    def energy(x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (torch.tensor([1.0, 2.0, 4.0]) * y * y).sum() - (x * y).sum()

    layer = lpgd.NodeLayer(lpgd.Node(energy), method)
    rho = getattr(method, "rho", 0.0)
    expected = (1.0 / (torch.tensor([1.0, 2.0, 4.0]) + rho)).diag()
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        jacobian = transform(layer)(random(0, 3).float())
        assert jacobian.dtype == torch.float32
        torch.testing.assert_close(jacobian, expected, atol=1e-5, rtol=0)
