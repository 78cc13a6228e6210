"""Powers by power cones: entmax, whose zeros are where CVXPY's second-order cones leave no gradient."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import pytest
import torch

import lpgd
from lpgd.layers.cvxpy.canonical import canonicalise

N = 12


def _entmax_problem() -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
    x, scores = cp.Variable(N), cp.Parameter(N)
    total: Any = cp.sum(x) == 1
    return cp.Problem(cp.Maximize(scores @ x - cp.sum(cp.power(x, 1.5))), [total, x >= 0]), scores, x


def _entmax(scores: torch.Tensor) -> torch.Tensor:
    """``((scores - τ)₊ / 1.5)²`` with a sum of one: τ by bisection, then by Newton's method, to be differentiated."""
    low, high = scores.detach().min() - 10.0, scores.detach().max()
    for _ in range(100):
        threshold = (low + high) / 2
        low, high = (
            (threshold, high) if ((scores - threshold).clamp(min=0) / 1.5).square().sum() > 1 else (low, threshold)
        )
    threshold = low
    for _ in range(2):
        excess = (scores - threshold).clamp(min=0) / 1.5
        threshold = threshold + (excess.square().sum() - 1) / (2 / 1.5 * excess.sum())
    return ((scores - threshold).clamp(min=0) / 1.5).square()


def test_entmax_with_zeros() -> None:
    problem, scores, x = _entmax_problem()
    layer = lpgd.CvxpyLayer(problem, [scores], [x])
    values = (2.0 * torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    (found,) = layer(values)  # a warning is an error in tests
    expected = torch.stack([_entmax(one) for one in values])
    assert int((expected == 0).sum()) > N
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    weights = torch.linspace(-1, 1, 3 * N, dtype=torch.float64).view(3, N)
    gradient, right = (torch.autograd.grad((weights * one).sum(), values)[0] for one in (found, expected))
    torch.testing.assert_close(gradient, right, rtol=0, atol=1e-8)


def test_a_power_of_a_sum_with_entries_at_zero() -> None:
    """min c·x with Σ xᵖ <= 1: x = (−c/(p λ))^(1/(p−1)) where c < 0, zero elsewhere, in closed form."""
    p, costs = 1.7, torch.linspace(-2.0, 1.0, N, dtype=torch.float64).requires_grad_()
    x, c = cp.Variable(N), cp.Parameter(N)
    ball: Any = cp.sum(cp.power(x, p)) <= 1
    (found,) = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [ball]), [c], [x])(costs)
    pull = (-costs).clamp(min=0) ** (1 / (p - 1))
    expected = pull / (pull**p).sum() ** (1 / p)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    weights = torch.linspace(-1, 1, N, dtype=torch.float64)
    gradient, right = (torch.autograd.grad((weights * one).sum(), costs)[0] for one in (found, expected))
    torch.testing.assert_close(gradient, right, rtol=0, atol=1e-7)


def test_solvers_without_power_cones_get_second_order_ones() -> None:
    problem, scores, x = _entmax_problem()
    assert len(canonicalise(problem, [scores], [x]).cones.power) == N
    layer = lpgd.CvxpyLayer(problem, [scores], [x], solver="ECOS")
    assert not layer.structure.cones.power
    values = torch.linspace(-1, 1, N, dtype=torch.float64)
    torch.testing.assert_close(layer(values)[0], _entmax(values), rtol=0, atol=1e-6)


def test_zeros_are_reached_as_quickly_as_other_answers() -> None:
    """Where x is zero the multiplier of x^1.5 is a double root of the conditions: Newton's steps go half of the way."""
    problem, scores, x = _entmax_problem()
    layer = lpgd.CvxpyLayer(problem, [scores], [x])
    values = 2.0 * torch.randn(8, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution, (found,) = layer.solve(values), layer(values)
    torch.testing.assert_close(found, torch.stack([_entmax(one) for one in values]), rtol=0, atol=1e-12)
    assert solution.known_to is not None
    assert int(solution.refined.max()) <= 6
    assert float(solution.known_to.max()) <= 1e-12


@pytest.mark.parametrize("p", [1.1, 1.3, 3, 5])
def test_the_ball_of_a_norm(p: float) -> None:
    """min c·x with |x|_p <= 1: x = −sign(c) |c|^(q−1) / |c|_q^(q−1), 1/p + 1/q = 1, however small a c is."""
    x, c, q = cp.Variable(5), cp.Parameter(5), p / (p - 1)
    ball: Any = cp.pnorm(x, p) <= 1
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [ball]), [c], [x])
    costs = torch.tensor([1.0, -0.7, 0.3, 1e-3, -2.0], dtype=torch.float64, requires_grad=True)
    (found,) = layer(costs)  # a warning is an error in tests
    sizes = costs.abs()
    expected = -costs.sign() * sizes ** (q - 1) / (sizes**q).sum() ** (1 - 1 / q)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    gradient, right = (torch.autograd.grad((weights * one).sum(), costs)[0] for one in (found, expected))
    torch.testing.assert_close(gradient, right, rtol=0, atol=1e-8)
