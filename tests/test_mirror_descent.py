"""Lagrangian mirror descent: LPGD without constraints, closed forms with them, and its definition by CVXPY."""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from tests.layer_cases import leaf, normal

ENVELOPES = ("lower", "upper", "average")
EYE = torch.eye(4, dtype=torch.float64)


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_without_constraints_it_is_lpgd(envelope: Any) -> None:
    root, g, tau = normal(3, 4, 4, seed=1), normal(3, 4, seed=2), 0.7
    P, q = leaf(root @ root.mT + EYE), leaf(normal(3, 4))
    x, y = leaf(normal(3, 4)), normal(3, 4, seed=5)

    def objective(w: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return (0.25 * (u - w) ** 4 + 0.5 * u**2 + torch.exp(0.3 * u * w)).sum()

    found: list[tuple[torch.Tensor, ...]] = []
    for method in (lpgd.LagrangianMirrorDescent(tau, envelope), lpgd.LPGD(tau, envelope=envelope)):
        output = lpgd.QPLayer(gradient=method)(P, q)
        gradients = torch.autograd.grad((g * output.x).sum(), (P, q))
        node = lpgd.NodeLayer(lpgd.Node(objective), method)
        found.append((*gradients, *torch.autograd.grad((y * node(x)).sum(), x)))
        assert output.info.gradients[-1].counts == {envelope: 3}
        steps = output.info.gradients[-1].tau
        assert steps is not None
        torch.testing.assert_close(steps, torch.full((3,), tau))
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_a_projection_onto_a_box_moves_along_the_whole_of_it(envelope: Any) -> None:
    """f = ½|x - w|², p = x* - w: x_{±τ} is the projection of x* ∓ τg, from bounds too, where LPGD needs a long step."""
    w, g, tau = leaf(3 * normal(50, 4)), normal(50, 4, seed=1), 0.1
    output = lpgd.QPLayer(gradient=lpgd.LagrangianMirrorDescent(tau, envelope))(EYE, -w, lb=0.0, ub=1.0)
    (gradient,) = torch.autograd.grad((g * output.x).sum(), w)
    here = w.detach().clamp(0, 1)
    low, high = (here - s * tau * g for s in (1.0, -1.0))
    lower, upper = (here - low.clamp(0, 1)) / tau, (high.clamp(0, 1) - here) / tau
    expected = {"lower": lower, "upper": upper, "average": 0.5 * (lower + upper)}[envelope]
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)
    exact = lpgd.QPLayer()(EYE, -w, lb=0.0, ub=1.0)
    (other,) = torch.autograd.grad((g * exact.x).sum(), w)
    bound = (w < -1) | (w > 2)  # far outside of the box: no small step of LPGD moves these
    assert not other[bound].any()
    assert gradient[bound].abs().gt(0.01).double().mean() > 0.4


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_its_definition_on_quadratic_programs_and_nodes(envelope: Any) -> None:
    """The step by CVXPY, and the differences of ∇_w f: ½Δ(xxᵀ) for P and Δx for q."""
    root, tau = normal(4, 4, seed=1), 0.3
    P, q, g = leaf(root @ root.mT + EYE), leaf(2 * normal(2, 4)), normal(2, 4, seed=2)
    A, G = normal(1, 4, seed=3), normal(2, 4, seed=4)
    b, h = normal(2, 1, seed=5), normal(2, 2, seed=6).abs()
    layer = lpgd.QPLayer(gradient=lpgd.LagrangianMirrorDescent(tau, envelope))
    output = layer(P, q, A=A, b=b, G=G, h=h)
    found = torch.autograd.grad((g * output.x).sum(), (P, q))

    node = lpgd.Node(
        lambda P, q, b, h, x: 0.5 * x @ P @ x + q @ x,
        equality=lambda P, q, b, h, x: A @ x - b,
        inequality=lambda P, q, b, h, x: G @ x - h,
        ndims=(2, 1, 1, 1),
        shape=(4,),
    )
    other = lpgd.NodeLayer(node, lpgd.LagrangianMirrorDescent(tau, envelope))(P.expand(2, 4, 4), q, b, h)
    by_node = torch.autograd.grad((g * other).sum(), (P, q))

    dP, dq = torch.zeros_like(P), torch.zeros_like(q)
    for k in range(2):
        x = cp.Variable(4)
        start = output.x[k].detach().numpy()
        matrix, cost = P.detach().numpy(), q[k].detach().numpy()
        slope = matrix @ start + cost
        held = [A.numpy() @ x == b[k].numpy(), G.numpy() @ x <= h[k].numpy()]
        ends = [start, start]
        for place, sign in {"lower": ((0, 1),), "upper": ((1, -1),), "average": ((0, 1), (1, -1))}[envelope]:
            value = 0.5 * cp.quad_form(x, cp.psd_wrap(matrix)) + (cost - slope + sign * tau * g[k].numpy()) @ x
            problem = cp.Problem(cp.Minimize(value), held)
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
            assert x.value is not None
            ends[place] = np.array(x.value)
        width = tau * (2 if envelope == "average" else 1)
        dq[k] = torch.from_numpy((ends[0] - ends[1]) / width)
        dP += torch.from_numpy(0.5 * (np.outer(ends[0], ends[0]) - np.outer(ends[1], ends[1])) / width)
    for own, by_other in ((found, by_node), (found, (dP, dq))):
        for one, two in zip(own, by_other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_with_a_moving_slope_a_linear_cost_has_no_gradient() -> None:
    """Eq. 67 at fixed x* with p = ∇f(x*, w) a function of w takes away what it gives to q, and leaves ½ΔxΔxᵀ for P.

    This is why the slope is held: without constraints, too, q would have no gradient.
    """
    root, tau, g = normal(4, 4, seed=1), 0.3, normal(4, seed=2)
    P, q = leaf(root @ root.mT + EYE), leaf(normal(4))
    output = lpgd.QPLayer(gradient=lpgd.LagrangianMirrorDescent(tau, "lower"))(P, q)
    here, start = output.x.detach(), P.detach()
    there = here - tau * torch.linalg.solve(start, g)

    def f(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x @ P @ x + q @ x

    moving = torch.autograd.grad((f(there) - f(here) - (P @ here + q) @ (there - here)) / tau, (P, q))
    step = there - here
    symmetric = 0.5 * (moving[0] + moving[0].mT)
    torch.testing.assert_close(symmetric, 0.5 * torch.outer(step, step) / tau, rtol=1e-9, atol=1e-12)
    assert float(moving[1].abs().max()) < 1e-14
    held = torch.autograd.grad((g * output.x).sum(), q)[0]
    torch.testing.assert_close(held, step / tau, rtol=1e-9, atol=1e-9)


def test_the_data_of_the_constraints_get_no_gradient() -> None:
    layer = lpgd.QPLayer(gradient=lpgd.LagrangianMirrorDescent(0.1))
    q, b = leaf(normal(2, 4)), leaf(normal(1))
    ones = torch.ones(1, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(EYE, q, A=ones, b=b.detach()).x.square().sum().backward()
    with pytest.warns(lpgd.LpgdWarning, match="keeps the constraints out of the Lagrangian"):
        layer(EYE, q, A=ones, b=b).x.square().sum().backward()
    assert b.grad is not None
    assert not b.grad.any()


def test_what_it_is_not_for() -> None:
    q, method = leaf(normal(2, 4)), lpgd.LagrangianMirrorDescent(0.1)
    flat = torch.stack([EYE, torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]).double())])
    with pytest.raises(ValueError, match=r"P of elements \[1\] is not positive definite"):
        lpgd.QPLayer(gradient=method)(flat, q, lb=0.0, ub=1.0).x.square().sum().backward()
    with pytest.raises(ValueError, match=r"P of elements \[0, 1\] is not positive definite"):
        lpgd.LPLayer(gradient=method)(q, lb=0.0, ub=1.0).x.square().sum().backward()
    with pytest.raises(TypeError, match="optimality conditions"):
        lpgd.BlackboxLayer(lambda c: c, method)
    with pytest.raises(TypeError, match="no forward mode"):
        torch.func.jvp(lambda q: lpgd.QPLayer(gradient=method)(EYE, q).x, (q,), (q,))
    with pytest.raises(ValueError, match="a loss on multipliers"):
        lpgd.QPLayer(gradient=method)(EYE, q, A=EYE[:1], b=q[0, :1]).y.sum().backward()
    with pytest.raises(ValueError, match="tau is 0"):
        lpgd.LagrangianMirrorDescent(0)
    with pytest.raises(ValueError, match="envelope is 'middle'"):
        lpgd.LagrangianMirrorDescent(1.0, "middle")  # pyright: ignore[reportArgumentType]


def test_elements_without_a_loss_or_a_solution_stay_out_of_it() -> None:
    layer = lpgd.QPLayer(gradient=lpgd.LagrangianMirrorDescent(0.1), on_error="nan")
    q, h = leaf(normal(3, 4)), torch.tensor([[1.0], [-1.0], [2.0]], dtype=torch.float64)
    output = layer(EYE, q, G=torch.ones(1, 4, dtype=torch.float64), h=h, lb=0.0)
    output.x[:2].square().nansum().backward()
    assert output.info.gradients[-1].used == ["average", "no solution", "zero cotangent"]
    assert q.grad is not None
    assert not q.grad[1:].any()
    assert q.grad[0].any()
