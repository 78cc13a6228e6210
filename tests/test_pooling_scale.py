"""The scale of robust pooling as an input: one number, one a channel, and its gradient."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.gradients import GradientMethod
from lpgd.nodes import RobustPooling
from lpgd.nodes.pooling.penalties import Penalty
from tests.node_cases import random

PENALTIES = [penalty for penalty in get_args(Penalty) if penalty != "quadratic"]


def scales(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def points(seed: int, *shape: int) -> Tensor:
    x = random(seed, *shape)
    x[..., :2] += 8.0
    return x


@pytest.mark.parametrize("penalty", get_args(Penalty))
def test_each_channel_is_pooled_with_its_own_scale(penalty: Penalty):
    x, alpha = points(0, 5, 3, 9), scales(0.5, 1.0, 2.5)
    y = lpgd.NodeLayer(RobustPooling(penalty, "input"))(x, alpha)
    for channel in range(3):
        alone = lpgd.NodeLayer(RobustPooling(penalty, float(alpha[channel])))(x[:, channel])
        torch.testing.assert_close(y[:, channel], alone, rtol=0, atol=1e-12)
    last = lpgd.NodeLayer(RobustPooling(penalty, "input", dim=1))(x.movedim(1, 2), alpha)
    torch.testing.assert_close(last, y, rtol=0, atol=1e-14)
    one = lpgd.NodeLayer(RobustPooling(penalty, "input"))(x, scales(1.5)[0])
    alone = lpgd.NodeLayer(RobustPooling(penalty, 1.5))(x)
    torch.testing.assert_close(one, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("vectors", [False, True])
def test_derivatives_in_points_and_scale(penalty: Penalty, vectors: bool):
    node = RobustPooling(penalty, "input", dim=2, vector_dim=3) if vectors else RobustPooling(penalty, "input")
    x = random(2, 2, 2, 6, 2) if vectors else random(2, 2, 2, 6)
    inputs = (x.requires_grad_(), scales(1.6, 2.3).requires_grad_())
    layer = lpgd.NodeLayer(node)
    assert torch.autograd.gradcheck(layer, inputs, atol=1e-6, fast_mode=vectors)
    assert torch.autograd.gradgradcheck(layer, inputs, atol=1e-6, fast_mode=True)
    shared = (inputs[0], scales(1.9)[0].requires_grad_())
    assert torch.autograd.gradcheck(layer, shared, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-5), lpgd.LPGD(tau=1e-5, rho=1e-6)])
def test_every_method_agrees_on_the_gradient_of_the_scale(penalty: Penalty, method: GradientMethod):
    x, alpha = points(3, 4, 11), scales(1.0, 1.3, 1.6, 2.0).requires_grad_()
    exact, other = (
        torch.autograd.grad(lpgd.NodeLayer(RobustPooling(penalty, "input"), own)(x, alpha).sum(), alpha)[0]
        for own in (None, method)
    )
    torch.testing.assert_close(other, exact, rtol=1e-4, atol=1e-5)


def test_points_far_from_zero_keep_the_digits_of_the_gradient():
    x, alpha = points(4, 3, 9), scales(1.0, 1.5, 2.0).requires_grad_()
    layer = lpgd.NodeLayer(RobustPooling("pseudo_huber", "input"))
    near, far = (torch.autograd.grad(layer(x + offset, alpha).sum(), alpha)[0] for offset in (0.0, 1e6))
    torch.testing.assert_close(far, near, rtol=1e-7, atol=1e-7)


def test_in_single_precision_and_with_scales_of_any_size():
    x, alpha = points(5, 3, 9), scales(1.0, 1.5, 2.0)
    layer = lpgd.NodeLayer(RobustPooling("welsch", "input"))
    y = layer(x.float(), alpha.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), layer(x, alpha), rtol=0, atol=1e-5)
    for size in (1e-150, 1e150):
        torch.testing.assert_close(layer(size * x, size * alpha), size * layer(x, alpha), rtol=1e-9, atol=0)


def test_a_scale_that_is_not_positive_fails_alone():
    x, alpha = points(6, 4, 9).requires_grad_(), scales(1.0, 0.0, -1.0, torch.nan).requires_grad_()
    layer = lpgd.NodeLayer(RobustPooling("huber", "input"), on_error="nan")
    y = layer(x, alpha)
    assert [status.name for status in y.info.statuses] == ["SOLVED"] + 3 * ["INVALID_DATA"]
    torch.testing.assert_close(y[0], layer(x[0], alpha[0]))
    y[0].backward()
    assert alpha.grad is not None
    assert (alpha.grad[1:] == 0).all()
    with pytest.raises(lpgd.SolverError, match="alpha must be positive"):
        lpgd.NodeLayer(RobustPooling("huber", "input"))(x, alpha)


def test_a_warm_start_is_one_of_the_same_units():
    x, alpha = points(7, 4, 9), scales(0.5, 1.0, 2.0, 4.0)
    layer = lpgd.NodeLayer(RobustPooling("pseudo_huber", "input"))
    first = layer(x, alpha)
    again = layer(x, alpha, warm_start=first)
    torch.testing.assert_close(again, first, rtol=0, atol=1e-13)
    assert again.info.solution.iterations.sum() <= 4


def test_options_that_would_get_no_gradient_are_refused():
    learned = torch.tensor(1.0, requires_grad=True)
    with pytest.raises(ValueError, match="alpha requires a gradient, which no option gets: alpha='input'"):
        RobustPooling(alpha=learned)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"alpha is None; it must be a number .*'input'"):
        RobustPooling(alpha=None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"alpha has shape \(2,\)"):
        RobustPooling(alpha=torch.ones(2))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="alpha is 'learned'"):
        RobustPooling(alpha="learned")  # pyright: ignore[reportArgumentType]
    assert RobustPooling(alpha=torch.tensor(2.0)).alpha == 2.0  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="gamma requires a gradient, which no option gets"):
        lpgd.nodes.OptimalTransport(gamma=learned)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="radius requires a gradient, which no option gets: radius=None"):
        lpgd.nodes.Projection("l2_ball", radius=learned)  # pyright: ignore[reportArgumentType]
    node = lpgd.nodes.PrincipalVector(tolerance=1e-9)
    object.__setattr__(node, "tolerance", learned)  # as of a node that checks nothing
    with pytest.raises(ValueError, match="tolerance of principal vector requires a gradient, which no option gets"):
        lpgd.NodeLayer(node)
