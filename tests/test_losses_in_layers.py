"""Losses that are given as functions, in every layer of conic programs: structure, copies, threads, other solvers."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.layers import ConicOutput
from tests.layer_cases import leaf, normal

EYE = torch.eye(4, dtype=torch.float64)
TAU = 0.4


def lower(gradient_of: Tensor, layer: Any, loss: Any, *inputs: Any, **more: Any) -> tuple[Tensor, list[str]]:
    layer.gradient = lpgd.LPGD(TAU, loss=loss, envelope="lower")
    output = layer(*inputs, **more)
    (gradient,) = torch.autograd.grad(loss(output).sum(), gradient_of)
    return gradient, output.info.gradients[-1].used


def proximal_of_box(w: Tensor, t: Tensor) -> Tensor:
    here, there = w.detach().clamp(0, 1), ((w.detach() + TAU * t) / (1 + TAU)).clamp(0, 1)
    return (here - there) / TAU


@pytest.mark.parametrize("eliminate", [True, False])
def test_a_cvxpy_layer_with_and_without_its_auxiliary_variables(eliminate: bool) -> None:
    """Of a matrix variable, beside multipliers and another variable, that CVXPY orders by columns."""
    x, extra, p, target = cp.Variable((2, 3)), cp.Variable(), cp.Parameter((2, 3)), cp.Parameter((2, 3))
    held: list[Any] = [x >= 0, x <= 1, extra >= cp.sum(x)]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - p) + cp.square(extra - cp.sum(x))), held)
    outputs = [held[0].dual_variables[0], extra, x]
    layer = lpgd.CvxpyLayer(problem, [p], outputs, eliminate=eliminate)
    w, t = leaf(2 * normal(5, 2, 3)), normal(5, 2, 3, seed=1)
    written = lpgd.CvxpyLoss(0.5 * cp.sum_squares(cp.vec(x - target, order="C")), outputs, [target])
    for loss in (lpgd.QuadraticLoss(t.flatten(1), output=2), written.at(t)):
        gradient, used = lower(w, layer, loss, w)
        torch.testing.assert_close(gradient, proximal_of_box(w, t), rtol=1e-6, atol=1e-7)
        assert used == ["lower"] * 5
    absolute = lpgd.CvxpyLoss(cp.norm1(cp.vec(x - target, order="C")), outputs, [target]).at(t)
    gradient, _ = lower(w, layer, absolute, w)
    here = w.detach().clamp(0, 1)
    near = w.detach() - t
    there = (t + near.sign() * (near.abs() - TAU).clamp(min=0)).clamp(0, 1)  # entry by entry: convex in one number
    torch.testing.assert_close(gradient, (here - there) / TAU, rtol=1e-5, atol=1e-6)


def test_rows_with_two_ends_and_conic_programs() -> None:
    w, t = leaf(2 * normal(5, 4)), normal(5, 4, seed=1)
    zero, one = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    written = lpgd.CvxpyLoss(0.5 * cp.sum_squares(x := cp.Variable(4)) - (p := cp.Parameter(4)) @ x, [x], [p])
    for loss in (lpgd.QuadraticLoss(t), written.at(t)):
        gradient, _ = lower(w, lpgd.QPLayer(), loss, EYE, -w, G=EYE, l=zero, h=one)
        torch.testing.assert_close(gradient, proximal_of_box(w, t), rtol=1e-6, atol=1e-7)
        layer = lpgd.ConicLayer(lpgd.Cones(nonnegative=8))
        gradient, _ = lower(w, layer, loss, EYE, -w, torch.cat([-EYE, EYE]), torch.cat([zero, one]))
        torch.testing.assert_close(gradient, proximal_of_box(w, t), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", lpgd.available())
def test_every_solver_takes_losses_or_leaves_them_to_one_that_does(solver: str) -> None:
    w, t, x, p = leaf(2 * normal(3, 4)), normal(3, 4, seed=1), cp.Variable(4), cp.Parameter(4)
    layer = lpgd.QPLayer(solver)
    gradient, used = lower(w, layer, lpgd.QuadraticLoss(t), EYE, -w, lb=0.0, ub=1.0)
    torch.testing.assert_close(gradient, proximal_of_box(w, t), rtol=1e-5, atol=1e-6)
    assert used == ["lower"] * 3
    # A second-order cone, which solvers of quadratic programs lack: min ½|x - w|² + τ|x| shrinks w.
    gradient, used = lower(w, layer, lpgd.CvxpyLoss(cp.norm2(x - p), [x], [p]).at(t), EYE, -w)
    off = w.detach() - t
    length = off.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(gradient, off / TAU - (1 - TAU / length).clamp(min=0) * off / TAU, rtol=1e-4, atol=1e-5)
    assert used == ["lower"] * 3


def test_layers_with_losses_are_copied_pickled_and_called_by_threads() -> None:
    x, p, target = cp.Variable(4), cp.Parameter(4), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - p)), [x >= 0, x <= 1])
    w, t = leaf(2 * normal(3, 4)), normal(3, 4, seed=1)
    for loss in (lpgd.QuadraticLoss(t), lpgd.CvxpyLoss(cp.norm1(x - target), [x], [target]).at(t)):
        layer = lpgd.CvxpyLayer(problem, [p], [x], gradient=lpgd.LPGD(TAU, loss=loss, envelope="lower"))
        expected, _ = lower(w, layer, loss, w)
        file = io.BytesIO()
        pickle.dump(layer, file)
        file.seek(0)
        for other in (copy.deepcopy(layer), pickle.load(file)):
            method: Any = other.gradient
            again, _ = lower(w, other, method.loss, w)
            torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)

        def call(seed: int, layer: Any = layer, loss: Any = loss) -> Tensor:
            own = leaf(2 * normal(3, 4, seed=seed))
            return torch.autograd.grad(loss(layer(own)).sum(), own)[0]

        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(call, range(8)))
        for seed, gradient in enumerate(together):
            torch.testing.assert_close(gradient, call(seed), rtol=1e-9, atol=1e-9)
    assert x.value is None  # the user's own variables are left alone
    assert target.value is None


def test_a_loss_is_evaluated_where_outputs_are_and_its_data_have_their_gradient() -> None:
    x = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    t, W = leaf(normal(3, 4, seed=1)), leaf(normal(2, 4, seed=2))
    loss = lpgd.QuadraticLoss(t, W)
    assert loss(x).shape == (2, 3)
    assert torch.autograd.gradcheck(lambda x, t, W: lpgd.QuadraticLoss(t, W)(x), (x, t, W))
    expected = 0.5 * ((x - t) @ W.mT).square().sum(-1)
    torch.testing.assert_close(loss(x), expected)
    output = ConicOutput(x, x, x)
    torch.testing.assert_close(loss(output), expected)
    u, p = cp.Variable(4), cp.Parameter(4)
    written = lpgd.CvxpyLoss(cp.log_sum_exp(u - p), [u], [p])
    assert torch.autograd.gradcheck(written.at(t.detach()), (x,))
    torch.testing.assert_close(written.at(t)(x), torch.logsumexp(x - t, -1))


def test_diagnoses_take_layers_with_a_loss() -> None:
    w, t = 2 * normal(4, 4), normal(4, 4, seed=1)
    loss = lpgd.QuadraticLoss(t)
    layer = lpgd.QPLayer(gradient=lpgd.LPGD(1e-3, loss=loss))
    report = lpgd.diagnose(layer, {"P": EYE, "q": -w, "lb": 0.0, "ub": 1.0}, loss)
    assert "LPGD" in str(report)
    best = lpgd.envelopes(
        layer, {"P": EYE, "q": -w}, loss, TAU, convex_loss=lambda k, x: 0.5 * cp.sum_squares(x - t[k].numpy())
    )
    assert best.proximal is not None
    torch.testing.assert_close(best.proximal, 0.5 * (w - t).square().sum(-1) / (1 + TAU), rtol=1e-6, atol=1e-9)


class RoughNode(lpgd.nodes.Projection):
    has_kkt = False


def test_layers_without_such_losses_refuse_them() -> None:
    loss, x = lpgd.QuadraticLoss(normal(4)), cp.Variable(4, pos=True)
    method = lpgd.LPGD(0.1, loss=loss)
    with pytest.raises(TypeError, match="an objective that a loss can be added to"):
        lpgd.LPLayer(gradient=method, integer=[0])
    with pytest.raises(TypeError, match="an objective that a loss can be added to"):
        lpgd.NodeLayer(RoughNode("l2_ball"), method)
    p = cp.Parameter(4, pos=True)
    geometric = cp.Problem(cp.Minimize(cp.sum(x)), [x >= p])
    layer = lpgd.CvxpyLayer(geometric, [p], [x], gradient=method, gp=True)
    with pytest.raises(ValueError, match="geometric program"):
        layer(torch.ones(4, dtype=torch.float64))
    held: list[Any] = [(y := cp.Variable(4)) >= 0]
    dual = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum(y)), held), [], [held[0].dual_variables[0]], gradient=method)
    with pytest.raises(ValueError, match=r"QuadraticLoss\.output is 0"):
        dual()


def test_a_linear_program_moves_by_proximal_steps() -> None:
    """argmin <c, x> over the unit cube, ℓ = ½|x - t|²: x_τ = clip(t - c/τ), which no vertex is."""
    c, t, tau = leaf(normal(20, 4)), normal(20, 4, seed=1), 0.8
    loss = lpgd.QuadraticLoss(t)
    output = lpgd.LPLayer(gradient=lpgd.LPGD(tau, loss=loss, envelope="lower"))(c, lb=0.0, ub=1.0)
    (gradient,) = torch.autograd.grad(loss(output).sum(), c)
    moved = (t - c.detach() / tau).clamp(0.0, 1.0)
    torch.testing.assert_close(gradient, (moved - (c.detach() < 0).double()) / tau, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("solver", ["CLARABEL", "INTERIOR", "DAQP"])
def test_within_a_face_of_solutions_a_loss_finds_its_minimum(solver: str) -> None:
    """With costs of zero for two variables every point of a face is a solution; x_τ has the target there, at any τ."""
    c = leaf(torch.tensor([[0.0, 0.0, 1.0, -2.0]], dtype=torch.float64))
    t, tau = torch.tensor([[0.3, 0.8, 0.5, 0.5]], dtype=torch.float64), 0.01
    loss = lpgd.QuadraticLoss(t)
    output = lpgd.LPLayer(solver, lpgd.LPGD(tau, loss=loss, envelope="lower"))(c, lb=0.0, ub=1.0)
    (gradient,) = torch.autograd.grad(loss(output).sum(), c)
    moved = (t - c.detach() / tau).clamp(0.0, 1.0)
    torch.testing.assert_close(output.x.detach() + tau * gradient, moved, rtol=0, atol=1e-6)
    torch.testing.assert_close(moved, torch.tensor([[0.3, 0.8, 0.0, 1.0]], dtype=torch.float64))
