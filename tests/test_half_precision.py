"""Half precision in, half precision out, and float64 in between; under autocast too."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import lpgd
from tests.gradient_cases import CASES, COSTS, EYE, WEIGHTS, N, positive
from tests.layer_cases import normal

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
EVERY = pytest.mark.parametrize(("layer", "expected"), CASES.values(), ids=CASES)


@HALF
@EVERY
def test_gradients_have_the_type_of_the_inputs(layer: Any, expected: Any, dtype: torch.dtype) -> None:
    # Matrices and bounds of the cases are shared, in float64: then that is the type of the answer.
    c = COSTS.to(dtype).requires_grad_()
    y = layer(c)
    assert y.dtype in (dtype, torch.float64)
    (y * WEIGHTS[: max(y.numel(), 1)].to(y.dtype)).sum().backward()
    assert c.grad is not None
    assert c.grad.dtype == dtype
    torch.testing.assert_close(c.grad, expected(c.detach().double()).to(dtype))


@HALF
def test_all_data_in_half_precision(dtype: torch.dtype) -> None:
    """x = max(-q, 0), rounded once: the computation in between is in double."""
    q = normal(3, N).to(dtype).requires_grad_()
    eye = EYE.to(dtype)
    zeros = torch.zeros(N, dtype=dtype)
    answers = {
        "qp": lpgd.solve_qp(eye, q, lb=zeros).x,
        "rows": lpgd.solve_qp(eye, q, G=-eye, h=zeros).x,
        "sparse": lpgd.solve_qp(eye.to_sparse(), q, lb=0.0).x,
        "conic": lpgd.solve_conic(eye, q, -eye, zeros, lpgd.Cones(nonnegative=N)).x,
        "node": -lpgd.NodeLayer(lpgd.Node(lambda y, w: (y - w).square().sum()))(q),
    }
    for name, x in answers.items():
        assert x.dtype == dtype, name
        expected = q.detach() if name == "node" else (-q.detach()).clamp(min=0)
        torch.testing.assert_close(x, expected if name != "node" else -expected, atol=1e-7, rtol=0, msg=name)
        (gradient,) = torch.autograd.grad(x.sum(), q)
        assert gradient.dtype == dtype
        slope = -torch.ones(3, N) if name == "node" else -positive(-q.detach().double())
        torch.testing.assert_close(gradient, slope.to(dtype), atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_linear_layer_in_front_under_autocast(name: str) -> None:
    layer, expected = CASES[name]
    linear = torch.nn.Linear(N, N)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(N))
        linear.bias.zero_()
    costs = COSTS.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        c = linear(costs)
        assert c.dtype == torch.bfloat16
        y = layer(c)
        loss = (y * WEIGHTS[: max(y.numel(), 1)]).sum()
    loss.backward()
    assert costs.grad is not None
    assert linear.weight.grad is not None
    wanted = expected(c.detach().double())
    torch.testing.assert_close(costs.grad.double(), wanted, atol=0.05, rtol=0.01)
    torch.testing.assert_close(linear.bias.grad.double(), wanted, atol=0.05, rtol=0.01)  # pyright: ignore


@HALF
def test_extra_inputs_and_answers_of_a_function(dtype: torch.dtype) -> None:
    def solve(c: Any, mask: Any) -> Any:
        assert mask.dtype.kind == "f"
        return torch.as_tensor((c < 0) * mask).to(dtype)

    layer = lpgd.BlackboxLayer(solve, lpgd.LPGD(tau=1.0))
    c, mask = COSTS.to(dtype), torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=dtype)
    x: Tensor = layer(c, mask)
    assert x.dtype == dtype
    torch.testing.assert_close(x, (c < 0) * mask)


@HALF
def test_attributes_of_parameters_allow_for_rounding(dtype: torch.dtype) -> None:
    x, P = cp.Variable(3), cp.Parameter((3, 3), PSD=True)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.quad_form(x, P) - cp.sum(x))), [P], [x])
    root = normal(3, 3)
    value = (root @ root.mT + torch.eye(3)).to(dtype).requires_grad_()
    (solution,) = layer(value)
    exact = 0.5 * torch.linalg.solve(value.detach().double(), torch.ones(3).double())
    torch.testing.assert_close(solution, exact.to(dtype))
    solution.sum().backward()
    assert value.grad is not None
    # The gradient of 1ᵀx with x = ½ P⁻¹ 1 is -½ P⁻¹ 1 1ᵀ P⁻¹.
    torch.testing.assert_close(value.grad, (-2 * torch.outer(exact, exact)).to(dtype))
