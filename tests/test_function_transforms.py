"""Layers under torch.func: Jacobians and Hessians beside those of torch.autograd, one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

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


@pytest.mark.parametrize("name", ["q", "A", "b"])
def test_tangents_of_forward_mode_reach_every_output(name: str) -> None:
    """With tight rows A x = b of full rank, x = A⁻¹b, s = 0 and y = -A⁻ᵀ(x + q): all by torch's own solver."""
    A, q, b = random(0, 3, 3) + 3 * torch.eye(3), random(1, 3) - 50, random(2, 3)
    values, tangent = {"q": q, "A": A, "b": b}, random(3, *{"A": (3, 3)}.get(name, (3,)))
    identity = torch.eye(3, dtype=torch.float64)
    cones = lpgd.Cones(zero=3, nonnegative=2)
    wide = torch.ones(2, 3, dtype=torch.float64), torch.full((2,), 1e3, dtype=torch.float64)

    def outputs(value: Tensor) -> Tensor:
        data = {**values, name: value}
        x, y, s = lpgd.solve_conic(
            identity, data["q"], torch.cat([data["A"], wide[0]]), torch.cat([data["b"], wide[1]]), cones
        )
        return torch.cat([x, y[:3], s])

    def expected(value: Tensor) -> Tensor:
        data = {**values, name: value}
        x = torch.linalg.solve(data["A"], data["b"])
        y = -torch.linalg.solve(data["A"].mT, x + data["q"])
        return torch.cat([x, y, torch.zeros(3), wide[1] - wide[0] @ x])

    _, change = torch.func.jvp(expected, (values[name],), (tangent,))
    for context in (torch.enable_grad(), torch.no_grad()):
        with context, forward_ad.dual_level():
            dual = forward_ad.make_dual(values[name], tangent)
            own = forward_ad.unpack_dual(outputs(dual)).tangent
        assert own is not None
        torch.testing.assert_close(own, change, atol=1e-9, rtol=1e-9)


def test_hessians_of_vectors_at_once_in_forward_mode() -> None:
    def loss(x: Tensor) -> Tensor:
        return (FUNCTIONS["node"](x) ** 3).sum()

    x = random(0, 2, 3)
    expected = torch.autograd.functional.hessian(loss, x)
    own = torch.autograd.functional.hessian(loss, x, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(own, expected, atol=1e-10, rtol=0)
