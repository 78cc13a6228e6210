"""DirectLossLayer and feature maps: formulas and envelopes by enumeration, and a loss whose mean has a closed form."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from tests.layer_cases import leaf, normal

POINTS = np.array(list(itertools.product((0, 1), repeat=4)))
"""Labels x of four things."""


def features(x: Any, inputs: Any) -> Any:
    """Ψ(x, ξ): the inputs of chosen things, summed, and how many neighbours are chosen both; not linear in x."""
    return np.append(x @ inputs, (x[:-1] * x[1:]).sum())


def loss(x: Any, target: Any) -> float:
    """Half a point for a wrong label and one more if any is wrong; not linear in x."""
    wrong = np.sum(x != target)
    return 0.5 * wrong + (wrong > 0)


def table(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Ψ and ℓ of every x for each element: (B, 16, 4) and (B, 16)."""
    psi = [[features(x, own) for x in POINTS] for own in inputs.numpy()]
    losses = [[loss(x, own) for x in POINTS] for own in targets.numpy()]
    return torch.from_numpy(np.array(psi)), torch.from_numpy(np.array(losses))


def solver(w: Any, inputs: Any) -> Any:
    return POINTS[np.argmax([w @ features(x, inputs) for x in POINTS])]


def augmented(w: Any, inputs: Any, step: float, target: Any) -> Any:
    assert step != 0
    return POINTS[np.argmax([w @ features(x, inputs) - step * loss(x, target) for x in POINTS])]


@dataclass
class Data:
    w: Tensor
    inputs: Tensor
    targets: Tensor
    psi: Tensor
    losses: Tensor

    def chosen(self, step: float) -> tuple[Tensor, Tensor]:
        """Ψ and ℓ of the best x for <w, Ψ> - step ℓ."""
        index = ((self.psi @ self.w.detach()) - step * self.losses).argmax(-1)
        rows = torch.arange(len(index))
        return self.psi[rows, index], self.losses[rows, index]


@pytest.fixture
def data() -> Data:
    inputs, targets = normal(30, 4, 3), torch.from_numpy(POINTS[np.arange(30) % 16])
    return Data(leaf(normal(4, seed=1)), inputs, targets, *table(inputs, targets))


def expected_gradient(data: Data, tau: float, envelope: str) -> Tensor:
    here, better, worse = (data.chosen(step)[0] for step in (0.0, tau, -tau))
    ends = {"lower": (here, better, tau), "upper": (worse, here, tau), "average": (worse, better, 2 * tau)}
    a, b, width = ends[envelope]
    return (a - b) / width


@pytest.mark.parametrize("envelope", ["lower", "upper", "average"])
def test_the_gradient_is_the_formula_whatever_the_weights_of_the_elements(data: Data, envelope: Any) -> None:
    layer = lpgd.DirectLossLayer(solver, features, loss, augmented, lpgd.DirectLoss(0.8, envelope=envelope))
    weight = normal(30, seed=2).abs()
    weight[3] = 0.0
    losses = layer(data.w.expand(30, -1), data.inputs, target=data.targets)
    torch.testing.assert_close(losses, data.chosen(0.0)[1], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad((weight * losses).sum(), data.w)
    expected = expected_gradient(data, 0.8, envelope)
    assert expected.any(-1).sum() > 5
    torch.testing.assert_close(gradient, weight @ expected, rtol=1e-12, atol=1e-12)


def test_a_loss_to_be_raised_exchanges_better_and_worse(data: Data) -> None:
    layer = lpgd.DirectLossLayer(solver, features, loss, augmented, lpgd.DirectLoss(0.8))
    losses = layer(data.w.expand(30, -1), data.inputs, target=data.targets)
    (gradient,) = torch.autograd.grad(-losses.sum(), data.w)
    expected = -expected_gradient(data, 0.8, "upper").sum(0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_lpgd_multiplies_the_cotangent_as_it_arrives(data: Data) -> None:
    layer = lpgd.DirectLossLayer(solver, features, loss, augmented, lpgd.LPGD(0.8 * 30))
    losses = layer(data.w.expand(30, -1), data.inputs, target=data.targets)
    (gradient,) = torch.autograd.grad(losses.mean(), data.w)
    torch.testing.assert_close(gradient, expected_gradient(data, 0.8, "average").mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("envelope", "sign"), [("lower", 1.0), ("upper", -1.0)])
def test_the_gradient_is_that_of_the_envelope(data: Data, envelope: Any, sign: float) -> None:
    # ℓ_τ(w) = ± min_x ± ℓ(x) + (L(x; w) - L*(w)) / τ with L = -<w, Ψ>, differentiated by finite differences.
    tau, step = 0.8, 1e-6

    def envelope_value(w: Tensor) -> Tensor:
        energies = -(data.psi @ w)
        gaps = (energies - energies.amin(-1, keepdim=True)) / tau
        return sign * (sign * data.losses + gaps).amin(-1).sum()

    layer = lpgd.DirectLossLayer(solver, features, loss, augmented, lpgd.DirectLoss(tau, envelope=envelope))
    (gradient,) = torch.autograd.grad(layer(data.w.expand(30, -1), data.inputs, target=data.targets).sum(), data.w)
    w, eye = data.w.detach(), torch.eye(4, dtype=torch.float64)
    differences = [(envelope_value(w + step * e) - envelope_value(w - step * e)) / (2 * step) for e in eye]
    torch.testing.assert_close(gradient, torch.stack(differences), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("envelope", ["lower", "upper", "average"])
def test_the_mean_gradient_is_the_gradient_of_the_mean(envelope: Any) -> None:
    # x = 1 where w > ξ, ξ uniform on (0, 1), and ℓ(1) - ℓ(0) = 2: the mean loss is ℓ(0) + 2 w.
    count = 20_000
    xi = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    layer = lpgd.DirectLossLayer(
        lambda w, xi: (w[:, 0] > xi).astype(float),
        lambda x, xi: x[:, None],
        lambda x, target: target + 2 * x,
        lambda w, xi, step, target: (w[:, 0] - xi > 2 * step).astype(float),
        lpgd.DirectLoss(0.1, envelope=envelope),
        batched=True,
    )
    w = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    mean = layer(w.expand(count, 1), xi, target=torch.full((count,), 3.0)).mean()
    (gradient,) = torch.autograd.grad(mean, w)
    assert mean.item() == pytest.approx(3.0 + 2 * 0.4, abs=1e-12)
    # ξ has the fixed weight -1, so x is the feature that w weighs.
    assert gradient.item() == pytest.approx(2.0, abs=1e-3)


def test_tensors_batches_and_single_elements(data: Data) -> None:
    plain = lpgd.DirectLossLayer(solver, features, loss, augmented, lpgd.DirectLoss(0.8))
    points = torch.from_numpy(POINTS)

    def psi(x: Tensor, inputs: Tensor) -> Tensor:
        x = x.double()
        return torch.cat([(x[:, None] @ inputs)[:, 0], (x[:, :-1] * x[:, 1:]).sum(-1, keepdim=True)], -1)

    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        wrong = (x != target).sum(-1)
        return 0.5 * wrong + (wrong > 0)

    def best(w: Tensor, inputs: Tensor, step: Any = 0.0, target: Any = None) -> Tensor:
        scores = [(w * psi(x.expand(len(w), 4), inputs)).sum(-1) for x in points]
        if target is not None:
            assert step.shape == (len(w),)
            scores = [score - step * loss_of(x, target) for score, x in zip(scores, points, strict=True)]
        return points[torch.stack(scores).argmax(0)]

    layer = lpgd.DirectLossLayer(best, psi, loss_of, best, plain.gradient, batched=True, as_torch=True)
    results = [one(data.w.expand(30, -1), data.inputs, target=data.targets) for one in (plain, layer)]
    gradients = [torch.autograd.grad(losses.sum(), data.w)[0] for losses in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients)
    single = plain(data.w, data.inputs[7], target=data.targets[7])
    assert single.shape == ()
    assert single == results[0][7]
    assert (
        results[0].info.solution.answers[7].tolist() == solver(data.w.detach().numpy(), data.inputs[7].numpy()).tolist()
    )
    solution = plain.solve(data.w.expand(30, -1), data.inputs, target=data.targets)
    torch.testing.assert_close(solution.x[:, :-1], data.chosen(0.0)[0])


def test_errors_and_missing_solutions(data: Data) -> None:
    make = partial(lpgd.DirectLossLayer, features=features, loss=loss, augmented=augmented)
    arguments = (data.w.expand(30, -1), data.inputs)
    with pytest.raises(TypeError, match="give a method"):
        make(solver)
    with pytest.raises(TypeError, match="augmented is None"):
        lpgd.DirectLossLayer(solver, features, loss, None, lpgd.DirectLoss())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="takes a tau"):
        lpgd.DirectLoss(None)
    wrong = make(solver, features=lambda x, inputs: x[:3], gradient=lpgd.DirectLoss())
    with pytest.raises(lpgd.SolverError, match=r"element 0: the feature map answered shape \(3,\); it must be \(4,\)"):
        wrong(*arguments, target=data.targets)
    with pytest.raises(ValueError, match="target has shape"):
        make(solver, gradient=lpgd.DirectLoss())(*arguments, target=data.targets[:4])

    def sometimes(w: Any, inputs: Any) -> Any:
        return None if np.array_equal(inputs, data.inputs[2].numpy()) else solver(w, inputs)

    layer = make(sometimes, gradient=lpgd.DirectLoss(0.8), on_error="nan")
    losses = layer(*arguments, target=data.targets)
    (gradient,) = torch.autograd.grad(losses.nansum(), data.w)
    assert losses.isnan().nonzero().tolist() == [[2]]
    others = [element for element in range(30) if element != 2]
    torch.testing.assert_close(gradient, expected_gradient(data, 0.8, "lower")[others].sum(0))


@pytest.mark.parametrize("envelope", ["lower", "upper", "average"])
def test_a_feature_map_makes_solutions_of_features(data: Data, envelope: Any) -> None:
    # The linearised form: the cotangent of Ψ moves the weights.
    layer = lpgd.BlackboxLayer(solver, lpgd.LPGD(1.5, envelope=envelope), "max", features=features)
    w, g = leaf(data.w.expand(30, -1)), normal(30, 4, seed=3)
    psi = layer(w, data.inputs)
    (gradient,) = torch.autograd.grad(psi, w, g)

    def best(weights: Tensor) -> Tensor:
        index = torch.einsum("bkd,bd->bk", data.psi, weights).argmax(-1)
        return data.psi[torch.arange(30), index]

    torch.testing.assert_close(psi, best(w), rtol=1e-12, atol=1e-12)
    below, here, above = (best(w + step * g) for step in (-1.5, 0.0, 1.5))
    expected = {"lower": (here - below) / 1.5, "upper": (above - here) / 1.5, "average": (above - below) / 3.0}
    torch.testing.assert_close(gradient, expected[envelope], rtol=1e-12, atol=1e-12)
    assert psi.info.solution.answers[0].tolist() in POINTS.tolist()
