"""Envelopes of convex losses themselves, and of primal and dual losses apart: closed forms, and values by CVXPY."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from tests.layer_cases import leaf, normal

ENVELOPES = ("lower", "upper", "average")
EYE = torch.eye(4, dtype=torch.float64)


def mixed(envelope: str, lower: Tensor, upper: Tensor) -> Tensor:
    return {"lower": lower, "upper": upper, "average": 0.5 * (lower + upper)}[envelope]


# Closed forms


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("tau", [0.01, 0.4, 0.9])
def test_a_quadratic_without_constraints(envelope: Any, tau: float) -> None:
    """f = ½|x - w|², ℓ = ½|x - t|²: the envelopes are ½|w - t|²/(1 ± τ), those of the linear model ½|w - t|² (1 ∓ τ).

    The loss enters the whole with a weight, which leaves the step alone; a negative one exchanges better and worse.
    """
    w, t = leaf(normal(5, 4)), normal(5, 4, seed=1)
    weights = torch.tensor([1.0, 0.25, -2.0, 1e-6, 0.0], dtype=torch.float64)
    loss = lpgd.QuadraticLoss(t)
    output = lpgd.QPLayer(gradient=lpgd.LPGD(tau, loss=loss, envelope=envelope))(EYE, -w)
    (gradient,) = torch.autograd.grad((weights * loss(output)).sum(), w)
    exact = w.detach() - t
    shares = torch.stack([torch.tensor([1 / (1 + tau), 1 / (1 - tau)], dtype=torch.float64)] * 5)
    shares[2] = shares[2].flip(0)
    expected = weights[:, None] * mixed(envelope, shares[:, :1], shares[:, 1:]) * exact
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)

    linear = lpgd.QPLayer(gradient=lpgd.LPGD(tau, envelope=envelope))(EYE, -w)
    (other,) = torch.autograd.grad(loss(linear).sum(), w)
    torch.testing.assert_close(
        other, exact, rtol=1e-9, atol=0
    )  # steps of a linear model are as long as τ, in any direction


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("tau", [1e-6, 0.3])
def test_a_projection_onto_a_box(envelope: Any, tau: float) -> None:
    """x_{±τ} is the projection of (w ± τ t)/(1 ± τ), and with the linear model that of w ∓ τ (x* - t)."""
    w, t = leaf(2 * normal(50, 4)), normal(50, 4, seed=1)
    clip = partial(torch.clamp, min=0.0, max=1.0)
    here, loss = clip(w.detach()), lpgd.QuadraticLoss(t)
    results = []
    for method, ends in (
        (lpgd.LPGD(tau, loss=loss, envelope=envelope), [clip((w + s * t) / (1 + s)) for s in (tau, -tau)]),
        (lpgd.LPGD(tau, envelope=envelope), [clip(w - s * (here - t)) for s in (tau, -tau)]),
    ):
        output = lpgd.QPLayer(gradient=method)(EYE, -w, lb=0.0, ub=1.0)
        (gradient,) = torch.autograd.grad(loss(output).sum(), w)
        lower, upper = ((here - ends[0]) / tau, (ends[1] - here) / tau)
        torch.testing.assert_close(gradient, mixed(envelope, lower, upper).detach(), rtol=1e-6, atol=1e-8 / tau * 1e-2)
        results.append(gradient)
    distance = (results[0] - results[1]).abs().max()
    # As τ → 0 both are the derivative of the loss; at a finite step they are gradients of different functions.
    assert distance < 1e-5 if tau < 1e-3 else distance > 0.1


@pytest.mark.parametrize(("envelope", "order"), [("lower", 1), ("upper", 1), ("average", 2)])
def test_both_kinds_of_envelopes_agree_as_the_step_vanishes(envelope: Any, order: int) -> None:
    """On 50 quadratic programs with equalities, where no active set changes: by O(τ), the averages by O(τ²)."""
    data: dict[str, Any] = {name: leaf(part) for name, part in program(60, 50, n=6).items() if name in "PqAb"}
    loss = lpgd.QuadraticLoss(normal(50, 6, seed=70), normal(3, 6, seed=71))
    exact = torch.autograd.grad(loss(lpgd.QPLayer()(**data)).sum(), data["q"])[0]
    distances: list[float] = []
    for tau in (1e-2, 1e-3):
        found: list[Tensor] = []
        for own in (loss, None):
            output = lpgd.QPLayer(gradient=lpgd.LPGD(tau, envelope=envelope, loss=own))(**data)
            found.append(torch.autograd.grad(loss(output).sum(), data["q"])[0])
        torch.testing.assert_close(
            found[1], exact, rtol=1e-6, atol=1e-7
        )  # of a quadratic program's linear model, any τ
        distances.append(float((found[0] - found[1]).norm() / exact.norm()))
    assert distances[0] < 0.1
    assert distances[0] / distances[1] == pytest.approx(10**order, rel=0.1)


def test_without_constraints_duals_and_primals_have_closed_envelopes() -> None:
    """min ½|x|² - wᵀx s.t. aᵀx = b has the value v = ½(aᵀw - b)²/|a|² - ½|w|² and y = (aᵀw - b)/|a|².

    Of the losses <g, x> and c y the lower envelopes are (v(w - τg, b) - v)/τ and (v - v(w, b + τc))/τ.
    """
    data = [leaf(normal(3, 4)), leaf(normal(3, 1, 4, seed=1)), leaf(normal(3, 1, seed=2))]
    g, c, tau = normal(3, 4, seed=3), normal(3, 1, seed=4), 0.7

    def value(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * ((a[:, 0] * w).sum(-1) - b[:, 0]).square() / a[:, 0].square().sum(-1) - 0.5 * w.square().sum(-1)

    w, a, b = data
    for envelope in ENVELOPES:
        signs = {"lower": (1.0,), "upper": (-1.0,), "average": (1.0, -1.0)}[envelope]
        ends = [(s / tau) * (value(w - s * tau * g, a, b) - value(w, a, b + s * tau * c)) for s in signs]
        expected = torch.autograd.grad(torch.stack(ends).mean(0).sum(), data)
        method = lpgd.LPGD(tau, envelope=envelope, separate=True)  # pyright: ignore[reportArgumentType]
        output = lpgd.QPLayer(gradient=method)(EYE, -w, A=a, b=b)
        found = torch.autograd.grad((g * output.x).sum() + (c * output.y).sum(), data)
        for own, right in zip(found, expected, strict=True):
            torch.testing.assert_close(own, right, rtol=1e-8, atol=1e-10)
        assert set(output.info.gradients[-1].used) == {envelope}
    # The combined form has two solves; its lower envelope is no lower one of the dual loss: only the average agrees.
    for envelope, near in (("average", True), ("upper", False)):
        output = lpgd.QPLayer(gradient=lpgd.LPGD(tau, envelope=envelope))(EYE, -w, A=a, b=b)  # pyright: ignore
        own = torch.autograd.grad((g * output.x).sum() + (c * output.y).sum(), data)
        separate = lpgd.QPLayer(gradient=lpgd.LPGD(tau, envelope=envelope, separate=True))(EYE, -w, A=a, b=b)  # pyright: ignore
        other = torch.autograd.grad((g * separate.x).sum() + (c * separate.y).sum(), data)
        assert torch.allclose(own[1], other[1], rtol=1e-8) == near


def test_a_loss_of_x_and_a_linear_one_of_multipliers() -> None:
    w, b, c, tau = leaf(normal(3, 4)), leaf(normal(3, 1, seed=2)), normal(3, 1, seed=4), 0.3
    a, loss = torch.ones(1, 4, dtype=torch.float64), lpgd.QuadraticLoss(normal(3, 4, seed=5))
    both = lpgd.LPGD(tau, loss=loss, separate=True)
    totals = []
    for method, parts in ((both, (1, 1)), (lpgd.LPGD(tau, loss=loss), (1, 0)), (lpgd.LPGD(tau), (0, 1))):
        output = lpgd.QPLayer(gradient=method)(EYE, -w, A=a, b=b)
        total = parts[0] * loss(output).sum() + parts[1] * (c * output.y).sum()
        totals.append(torch.cat(torch.autograd.grad(total, (w, b)), -1))
    torch.testing.assert_close(totals[0], totals[1] + totals[2], rtol=1e-9, atol=1e-11)
    output = lpgd.QPLayer(gradient=lpgd.LPGD(tau, loss=loss))(EYE, -w, A=a, b=b)
    total = loss(output).sum() + output.y.sum()
    with pytest.raises(ValueError, match="depends on multipliers"):
        total.backward()


# Values by CVXPY, differentiated by finite differences


def solved(objective: Any, constraints: list[Any]) -> float:
    problem = cp.Problem(cp.Minimize(objective), constraints)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    assert problem.status == cp.OPTIMAL
    return float(problem.value)  # pyright: ignore[reportArgumentType]


def along(value: Any, data: dict[str, Tensor], gradients: dict[str, Tensor], step: float = 1e-4) -> None:
    """Each gradient against central differences of the envelope's value along a random direction."""
    for seed, (name, gradient) in enumerate(gradients.items()):
        direction = normal(*data[name].shape, seed=40 + seed)
        if name == "P":
            direction = direction + direction.mT
        ends = [value({**data, name: data[name].detach() + s * step * direction}) for s in (1.0, -1.0)]
        difference = (ends[0] - ends[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(difference, rel=2e-4, abs=2e-5), name


def program(seed: int, size: int, n: int = 4) -> dict[str, Any]:
    root = normal(n, n, seed=seed)
    return {
        "P": root @ root.mT + 2.5 * torch.eye(n).double(),
        "q": 2 * normal(size, n, seed=seed + 1),
        "A": normal(1, n, seed=seed + 2),
        "b": normal(size, 1, seed=seed + 3),
        "G": normal(3, n, seed=seed + 4),
        "h": normal(size, 3, seed=seed + 5).abs(),
    }


@pytest.mark.parametrize("envelope", ENVELOPES)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_gradients_are_those_of_the_envelope_of_a_quadratic_program(envelope: Any, shared: bool, rho: float) -> None:
    data: dict[str, Any] = {name: leaf(part) for name, part in program(10, 2).items()}
    tau, W = 0.4, normal(2, 4, seed=20) if shared else normal(2, 2, 4, seed=20)
    t, c = normal(2, 4, seed=21), normal(4, seed=22)
    loss = lpgd.QuadraticLoss(t, W, c)
    layer = lpgd.QPLayer(gradient=lpgd.LPGD(tau, rho, envelope=envelope, loss=loss))
    output = layer(**data)
    start = output.x.detach().numpy()
    gradients = dict(zip(data, torch.autograd.grad(loss(output).sum(), list(data.values())), strict=True))

    def value(own: dict[str, Tensor]) -> float:
        total = 0.0
        P, A, G = (own[name].detach().numpy() for name in ("P", "A", "G"))
        for k in range(2):
            q, b, h = (own[name][k].detach().numpy() for name in ("q", "b", "h"))
            x = cp.Variable(4)
            held = [A @ x == b, G @ x <= h]
            weight = (W if shared else W[k]).numpy()
            square, target = weight.T @ weight, t[k].numpy()
            for sign in {"lower": (1,), "upper": (-1,), "average": (1, -1)}[envelope]:
                moved = P + sign * tau * square + rho * np.eye(4)
                cost = q + sign * tau * (c.numpy() - square @ target) - rho * start[k]
                end = solved(0.5 * cp.quad_form(x, cp.psd_wrap(moved)) + cost @ x, held)
                # The loss's constant does not move with the data; the program's value and its augmentation's do.
                free = solved(0.5 * cp.quad_form(x, cp.psd_wrap(P + rho * np.eye(4))) + (q - rho * start[k]) @ x, held)
                total += sign * (end - free) / tau / (2 if envelope == "average" else 1)
        return total

    along(value, data, gradients)


def test_a_loss_in_cvxpy_on_a_cvxpy_layer() -> None:
    """The ℓ₁ distance, and a Euclidean one, on a problem with a second-order cone; the loss has its own parameters."""
    x, z, c, t, weight = cp.Variable(3), cp.Variable(), cp.Parameter(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    held: list[Any] = [cp.norm(x) <= z, cp.sum(x) >= 0.2, x <= 2.0]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - c) + z), held)
    template = lpgd.CvxpyLoss(cp.norm1(x - t) + weight * cp.norm2(x) + cp.square(z - 1), [z, x], [t, weight])
    costs, targets = leaf(2 * normal(3, 3, seed=3)), normal(3, 3, seed=4)
    weights, tau = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64), 0.6
    loss = template.at(targets, weights)
    layer = lpgd.CvxpyLayer(problem, [c], [z, x], gradient=lpgd.LPGD(tau, loss=loss, envelope="lower"))
    output = layer(costs)
    losses = loss(output)
    expected = [
        (output[1][k] - targets[k]).abs().sum() + weights[k] * output[1][k].norm() + (output[0][k] - 1).square()
        for k in range(3)
    ]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), costs)
    assert output.info.gradients[-1].counts == {"lower": 3}

    def value(own: dict[str, Tensor]) -> float:
        total = 0.0
        for k in range(3):
            u, v = cp.Variable(3), cp.Variable()
            f = 0.5 * cp.sum_squares(u - own["c"][k].detach().numpy()) + v
            held = [cp.norm(u) <= v, cp.sum(u) >= 0.2, u <= 2.0]
            own_loss = cp.norm1(u - targets[k].numpy()) + float(weights[k]) * cp.norm2(u) + cp.square(v - 1)
            total += (solved(f + tau * own_loss, held) - solved(f, held)) / tau
        return total

    along(value, {"c": costs}, {"c": gradient})


def test_losses_in_cvxpy_on_programs_by_their_matrices() -> None:
    data: dict[str, Any] = {name: leaf(part) for name, part in program(30, 2).items()}
    x, t, tau = cp.Variable(4), cp.Parameter(4), 0.5
    targets = normal(2, 4, seed=31)
    loss = lpgd.CvxpyLoss(0.3 * cp.sum(cp.huber(x - t)) + cp.log_sum_exp(x), [x], [t]).at(targets)
    output = lpgd.QPLayer(gradient=lpgd.LPGD(tau, loss=loss, envelope="lower"))(**data)
    gradients = dict(zip(data, torch.autograd.grad(loss(output).sum(), list(data.values())), strict=True))

    def value(own: dict[str, Tensor]) -> float:
        total = 0.0
        P, A, G = (own[name].detach().numpy() for name in ("P", "A", "G"))
        for k in range(2):
            u = cp.Variable(4)
            q, b, h = (own[name][k].detach().numpy() for name in ("q", "b", "h"))
            f = 0.5 * cp.quad_form(u, cp.psd_wrap(P)) + q @ u
            own_loss = 0.3 * cp.sum(cp.huber(u - targets[k].numpy())) + cp.log_sum_exp(u)
            held = [A @ u == b, G @ u <= h]
            total += (solved(f + tau * own_loss, held) - solved(f, held)) / tau
        return total

    along(value, data, gradients)


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_a_quadratic_loss_in_cvxpy_is_the_quadratic_loss(envelope: Any) -> None:
    x, t = cp.Variable(4), cp.Parameter(4)
    targets, W, c = normal(3, 4, seed=1), normal(2, 4, seed=2), normal(4, seed=3)
    written = lpgd.CvxpyLoss(0.5 * cp.sum_squares(W.numpy() @ (x - t)) + c.numpy() @ x, [x], [t]).at(targets)
    w = leaf(normal(3, 4))
    found = []
    for loss in (written, lpgd.QuadraticLoss(targets, W, c)):
        output = lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=loss, envelope=envelope))(EYE, -w, lb=-0.5)
        found.append((loss(output), torch.autograd.grad(loss(output).mean(), w)[0]))
        assert output.info.gradients[-1].counts == {envelope: 3}
    for own, other in itertools.pairwise(found):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10)


# Where there is no envelope, and what is refused


def test_an_upper_envelope_that_is_not_convex_leaves_the_lower_one_by_element() -> None:
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    P, w = curvature[:, None, None] * EYE, leaf(normal(2, 4))
    loss, tau = lpgd.QuadraticLoss(normal(2, 4, seed=1)), 2.0
    for envelope in ("average", "upper"):
        output = lpgd.QPLayer(gradient=lpgd.LPGD(tau, loss=loss, envelope=envelope))(P, -w)  # pyright: ignore
        with pytest.warns(lpgd.LpgdWarning, match=r"elements \[0\] has no solution on a side"):
            (gradient,) = torch.autograd.grad(loss(output).sum(), w)
        assert output.info.gradients[-1].used == ["lower", envelope]
        assert output.info.gradients[-1].fallbacks == [0]
        x = w.detach() / curvature[:, None]
        lower, upper = ((x - loss.target) / (curvature + sign * tau)[:, None] for sign in (1, -1))
        torch.testing.assert_close(gradient[0], lower[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(gradient[1], mixed(envelope, lower, upper)[1], rtol=1e-9, atol=0)


def test_a_loss_that_is_not_quadratic_has_a_lower_envelope_alone() -> None:
    x, w = cp.Variable(4), leaf(normal(2, 4))
    loss = lpgd.CvxpyLoss(cp.norm1(x), [x])
    output = lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=loss))(EYE, -w)
    with pytest.warns(lpgd.LpgdWarning, match=r"elements \[0, 1\] has no solution on a side"):
        (gradient,) = torch.autograd.grad(loss(output).sum(), w)
    own = w.detach()
    soft = own.sign() * (own.abs() - 0.1).clamp(min=0)  # the proximal step of the ℓ₁ norm
    torch.testing.assert_close(gradient, (own - soft) / 0.1, rtol=1e-6, atol=1e-6)


def test_what_is_refused() -> None:
    w, loss = leaf(normal(2, 4)), lpgd.QuadraticLoss(normal(2, 4, seed=1))
    output = lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=loss))(EYE, -w)
    with pytest.raises(ValueError, match=r"elements \[0, 1\] is no multiple of that of the given loss"):
        output.x.cos().sum().backward()
    with pytest.raises(ValueError, match="at a given tau"):
        lpgd.LPGD(loss=loss)
    with pytest.raises(ValueError, match="not BlackboxBackprop"):
        lpgd.BlackboxBackprop(0.1, loss=loss)
    with pytest.raises(TypeError, match=r"must be a lpgd\.QuadraticLoss"):
        lpgd.LPGD(0.1, loss=lambda x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="an objective that a loss can be added to"):
        lpgd.BlackboxLayer(lambda c: c, lpgd.LPGD(0.1, loss=loss))
    with pytest.raises(TypeError, match="no forward mode"):
        torch.func.jvp(lambda q: lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=loss))(EYE, q).x, (-w,), (w,))
    with pytest.raises(ValueError, match=r"has 3 entries; output 0 of the layer has 4"):
        lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=lpgd.QuadraticLoss(normal(3))))(EYE, -w)
    with pytest.raises(ValueError, match=r"\(3,\), does not broadcast to that of the call, \(2,\)"):
        lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=lpgd.QuadraticLoss(normal(3, 4))))(EYE, -w)
    with pytest.raises(ValueError, match="is not finite"):
        lpgd.QuadraticLoss(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match=r"weight of a QuadraticLoss has shape \(2, 3\)"):
        lpgd.QuadraticLoss(normal(4), normal(2, 3))
    x, other, t = cp.Variable(4), cp.Variable(2), cp.Parameter(4)
    with pytest.raises(ValueError, match="not a scalar CVXPY expression that is convex"):
        lpgd.CvxpyLoss(-cp.norm1(x), [x])
    with pytest.raises(ValueError, match="list every one in variables"):
        lpgd.CvxpyLoss(cp.norm1(x) + cp.norm1(other), [x])
    with pytest.raises(ValueError, match="has no values for"):
        lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=lpgd.CvxpyLoss(cp.norm1(x - t), [x], [t])))(EYE, -w)
    with pytest.raises(ValueError, match="in the place of an output that has 4 entries"):
        lpgd.QPLayer(gradient=lpgd.LPGD(0.1, loss=lpgd.CvxpyLoss(cp.norm1(other), [other])))(EYE, -w)


# Batches, types, failures


def test_batches_broadcast_and_elements_are_their_own() -> None:
    w, t = leaf(normal(2, 3, 4)), normal(2, 1, 4, seed=1)
    x, p = cp.Variable(4), cp.Parameter(4)
    for loss in (lpgd.QuadraticLoss(t, linear=normal(3, 4, seed=2)), lpgd.CvxpyLoss(cp.norm1(x - p), [x], [p]).at(t)):
        method = lpgd.LPGD(0.2, loss=loss, envelope="lower")
        output = lpgd.QPLayer(gradient=method)(EYE, -w, lb=0.0)
        (whole,) = torch.autograd.grad(loss(output).sum(), w)
        for i, j in itertools.product(range(2), range(3)):
            if isinstance(loss, lpgd.QuadraticLoss):
                own: Any = lpgd.QuadraticLoss(t[i, 0], linear=normal(3, 4, seed=2)[j])
            else:
                own = loss.at(t[i, 0])
            alone = lpgd.QPLayer(gradient=lpgd.LPGD(0.2, loss=own, envelope="lower"))(EYE, -w[i, j], lb=0.0)
            (gradient,) = torch.autograd.grad(own(alone), w)
            torch.testing.assert_close(gradient[i, j], whole[i, j], rtol=1e-7, atol=1e-7)


def test_float32_lanes_and_elements_without_a_solution() -> None:
    t, h = normal(3, 4, seed=1), torch.tensor([[1.0], [-1.0], [2.0]], dtype=torch.float64)
    loss = lpgd.QuadraticLoss(t)
    layer = lpgd.QPLayer(gradient=lpgd.LPGD(0.3, loss=loss), on_error="nan")
    w = leaf(normal(3, 4).abs())
    G = torch.ones(1, 4, dtype=torch.float64)  # with x ≥ 0 and a sum of at most -1 element 1 has no solution
    output = layer(EYE, -w, G=G, h=h, lb=0.0)
    losses = loss(output)
    (gradient,) = torch.autograd.grad(losses.nansum(), w)
    assert losses.isnan().tolist() == [False, True, False]
    assert not gradient[1].any()
    assert gradient[0].any()
    w32 = leaf(w.detach().float())
    output = layer(EYE.float(), -w32, G=G.float(), h=h.float(), lb=0.0)
    (single,) = torch.autograd.grad(loss(output).nansum(), w32)
    torch.testing.assert_close(single.double(), gradient, rtol=1e-5, atol=1e-6)
    free = lpgd.QPLayer(gradient=lpgd.LPGD(0.3, loss=loss))
    (rows,) = torch.autograd.grad(loss(free(EYE, -w)), w, EYE[:3, :3], is_grads_batched=True)
    exact = (w.detach() - t) * 0.5 * (1 / 1.3 + 1 / 0.7)
    torch.testing.assert_close(rows, torch.diag_embed(exact.mT).permute(1, 2, 0), rtol=1e-9, atol=1e-12)
