"""Quadratic losses themselves in the perturbed problems of nodes: closed forms, other solvers, finite differences."""

from __future__ import annotations

import cvxpy as cp
import pytest
import torch

import lpgd
from tests.node_cases import random

TAU = 0.3


def gradient(layer: lpgd.NodeLayer, loss: lpgd.QuadraticLoss, *inputs: torch.Tensor) -> torch.Tensor:
    leaf = inputs[0].clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(layer(leaf, *inputs[1:])).mean(), leaf)
    return len(inputs[0]) * found


def near(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return 0.5 * (y - x).square().sum()


@pytest.mark.parametrize("envelope", ["lower", "upper", "average"])
@pytest.mark.parametrize("weight", [1.0, 0.5, "matrix"])
def test_without_constraints_envelopes_have_closed_forms(envelope, weight):
    w, t = random(0, 3, 4), random(1, 3, 4)
    W = random(2, 3, 4, 4) / 3 if weight == "matrix" else weight
    layer = lpgd.NodeLayer(lpgd.Node(near), lpgd.LPGD(TAU, loss=lpgd.QuadraticLoss(t, W), envelope=envelope))
    H = W.mT @ W if weight == "matrix" else W**2 * torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    # x = argmin ½|x - w|² ± τ ½(x - t)ᵀH(x - t), and the gradient of the objective in w is w - x
    ends = {
        s: torch.linalg.solve(torch.eye(4, dtype=torch.float64) + s * TAU * H, w + s * TAU * (H @ t[..., None])[..., 0])
        for s in (1.0, -1.0)
    }
    lower, upper = (w - ends[1.0]) / TAU, (ends[-1.0] - w) / TAU
    expected = {"lower": lower, "upper": upper, "average": 0.5 * (lower + upper)}[envelope]
    torch.testing.assert_close(gradient(layer, layer.gradient.loss, w), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("node", [lpgd.nodes.Projection("l2_ball"), lpgd.nodes.Projection("simplex")])
def test_projections_take_the_proximal_step(node):
    w, t = 2.0 * random(0, 4, 5), random(1, 4, 5)
    layer = lpgd.NodeLayer(node, lpgd.LPGD(TAU, loss=lpgd.QuadraticLoss(t), envelope="lower"))
    found = gradient(layer, layer.gradient.loss, w)
    for element in range(4):
        x = cp.Variable(5)
        point, target = w[element].numpy(), t[element].numpy()
        limits = [cp.norm(x) <= 1] if node.onto == "l2_ball" else [x >= 0, cp.sum(x) == 1]
        ends = []
        for step in (0.0, TAU):
            cost = 0.5 * cp.sum_squares(x - point) + 0.5 * step * cp.sum_squares(x - target)
            cp.Problem(cp.Minimize(cost), limits).solve(solver=cp.CLARABEL)
            ends.append(torch.as_tensor(x.value.copy()))
        # of the objective in w: (w - x₊) - (w - x*)
        torch.testing.assert_close(found[element], (ends[0] - ends[1]) / TAU, atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_envelope_by_finite_differences():
    def objective(x, y):
        return 0.5 * (y - x).square().sum() + 0.25 * (y**4).sum()

    node = lpgd.Node(objective, equality=lambda x, y: y.sum() - 1.0)
    w, t, W = random(0, 1, 3), random(1, 3), random(2, 2, 3)
    loss = lpgd.QuadraticLoss(t, W)
    found = gradient(lpgd.NodeLayer(node, lpgd.LPGD(TAU, loss=loss, envelope="lower")), loss, w)

    def tilted(x, y):
        return objective(x, y) + TAU * 0.5 * (W @ (y - t)).square().sum()

    whole = lpgd.NodeLayer(lpgd.Node(tilted, equality=lambda x, y: y.sum() - 1.0))

    def envelope(w: torch.Tensor) -> torch.Tensor:
        values = []
        for layer, f in ((whole, tilted), (lpgd.NodeLayer(node), objective)):
            values.append(f(w[0], layer(w)[0]))
        return (values[0] - values[1]) / TAU

    steps = 1e-5 * torch.eye(3, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([(envelope(w + step) - envelope(w - step)) / 2e-5 for step in steps])
    torch.testing.assert_close(found[0], expected, atol=1e-7, rtol=0)


def test_small_steps_give_the_exact_gradient_and_batches_the_gradients_one_by_one():
    node, w, t = lpgd.nodes.Projection("l2_sphere"), random(0, 2, 3, 4), random(1, 3, 4)
    loss = lpgd.QuadraticLoss(t, 2.0)
    gradients = []
    for method in (None, lpgd.LPGD(1e-4, loss=loss)):
        leaf = w.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(lpgd.NodeLayer(node, method)(leaf)).sum(), leaf)[0])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=0)
    for row in range(3):
        own = lpgd.QuadraticLoss(t[row], 2.0)
        leaf = w[1, row].clone().requires_grad_()
        output = lpgd.NodeLayer(node, lpgd.LPGD(1e-4, loss=own))(leaf)
        torch.testing.assert_close(torch.autograd.grad(own(output), leaf)[0], gradients[1][1, row])


def test_an_upper_envelope_that_does_not_exist_leaves_the_lower_one():
    w, t = random(0, 3, 4), random(1, 3, 4)
    loss = lpgd.QuadraticLoss(t)
    layer = lpgd.NodeLayer(lpgd.Node(near), lpgd.LPGD(2.0, loss=loss))
    leaf = w.clone().requires_grad_()
    output = layer(leaf)
    with pytest.warns(lpgd.LpgdWarning, match="no solution on a side"):
        (found,) = torch.autograd.grad(loss(output).sum(), leaf)
    torch.testing.assert_close(found, (w - t) / 3.0, atol=1e-9, rtol=0)
    assert output.info.gradients[-1].used == ["lower"] * 3


def test_what_nodes_refuse():
    x = cp.Variable(4)
    loss = lpgd.CvxpyLoss(cp.norm1(x), variables=[x]).at()
    w = random(0, 2, 4).requires_grad_()
    output = lpgd.NodeLayer(lpgd.Node(near), lpgd.LPGD(TAU, loss=loss))(w)
    with pytest.raises(TypeError, match=r"give nodes a lpgd\.QuadraticLoss"):
        loss(output).sum().backward()
