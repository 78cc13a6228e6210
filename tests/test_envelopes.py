"""Envelope values against closed forms, enumeration, and each other; the steps that LPGD says it took."""

from __future__ import annotations

import itertools
import warnings

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.diagnostics.proximal import lower_envelope_of_loss
from lpgd.solvers import choose_solver
from tests.problem_table import REGULAR, Case
from tests.test_gradients import planted_solution, random_cotangent

CUTS, POINTS, ENTRIES = 1000, 3, 6


def box_envelope(
    c: np.ndarray, target: np.ndarray, tau: float, rho: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(loss, lower, upper) of |x* - target|² for min <c, x> over [0, 1]ⁿ, entry by entry: c is (B, n)."""
    x = (c < 0).astype(float)
    g = 2 * (x - target)
    loss = np.square(x - target).sum(-1)

    def change(sign: float) -> np.ndarray:
        """``min over u in [0, 1] of (c + sign τ g) (u - x) + (ρ/2) (u - x)²``, summed over entries."""
        slope = c + sign * tau * g
        free = np.where(slope < 0, 1.0, 0.0) if rho == 0 else np.clip(x - slope / rho, 0.0, 1.0)
        return (slope * (free - x) + 0.5 * rho * np.square(free - x)).sum(-1)

    return loss, loss + change(1.0) / tau, loss - change(-1.0) / tau


@pytest.mark.parametrize(("tau", "rho"), [(0.05, 0.0), (1.0, 0.0), (20.0, 0.0), (0.5, 0.3)])
def test_envelopes_of_box_programs_bound_the_loss_on_random_cuts(tau: float, rho: float) -> None:
    rng = np.random.default_rng(int(10 * tau))
    t = np.linspace(-1.0, 1.0, POINTS)[:, None]
    start, direction, target = rng.normal(size=(3, CUTS, 1, ENTRIES))
    c = (start + t * direction).reshape(-1, ENTRIES)
    goal = np.broadcast_to(target, (CUTS, POINTS, ENTRIES)).reshape(-1, ENTRIES)
    found = lpgd.envelopes(
        lpgd.LPLayer(solver="DAQP" if rho else "HIGHS"),  # exact vertices, however small a cost is
        {"c": torch.from_numpy(c), "lb": 0.0, "ub": 1.0},
        lambda output: (output.x - torch.from_numpy(goal)).square().sum(-1),
        tau,
        rho,
    )
    assert found.lower.shape == (CUTS * POINTS,)
    noise = 1e-6 / tau
    assert (found.lower <= found.loss + noise).all()
    assert (found.loss <= found.upper + noise).all()
    loss, lower, upper = box_envelope(c, goal, tau, rho)
    for values, expected in ((found.loss, loss), (found.lower, lower), (found.upper, upper)):
        np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6, atol=noise)
    np.testing.assert_allclose(found.average.numpy(), 0.5 * (lower + upper), rtol=1e-6, atol=noise)
    assert (upper - lower).max() > 0.1  # there is something to bound


def test_envelopes_over_a_simplex_are_those_of_its_vertices() -> None:
    rng = np.random.default_rng(0)
    c, g, tau = rng.normal(size=(20, 4)), rng.normal(size=4), 0.7
    vertices = np.eye(4)
    best = c.min(-1)
    # min over vertices of <g, v> + (<c, v> - c*)/τ, and the mirrored maximum.
    expected = {
        "lower": (vertices @ (g + (c - best[:, None]) / tau).T).min(0),
        "upper": (vertices @ (g - (c - best[:, None]) / tau).T).max(0),
    }
    ones = torch.ones(1, 4, dtype=torch.float64)
    found = lpgd.envelopes(
        lpgd.LPLayer(solver="HIGHS"),
        {"c": torch.from_numpy(c), "A": ones, "b": torch.ones(1, dtype=torch.float64), "lb": 0.0},
        lambda output: output.x @ torch.from_numpy(g),
        tau,
    )
    np.testing.assert_allclose(found.lower.numpy(), expected["lower"], atol=1e-9)
    np.testing.assert_allclose(found.upper.numpy(), expected["upper"], atol=1e-9)


@pytest.mark.parametrize(("tau", "rho"), [(0.2, 0.0), (3.0, 0.0), (3.0, 0.5)])
def test_proximal_step_of_a_projection(tau: float, rho: float) -> None:
    """f = ½|x - p|², ℓ = ½|x - t|²: with w = (1 + ρ)/τ the envelope is ½|p - t|² w/(1 + w)."""
    points = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=torch.float64)
    target = torch.tensor([0.3, 0.0, 1.0], dtype=torch.float64)
    if rho:  # in CVXPY's form of this problem there is a second copy of x - p, which the augmentation holds as well
        layer, parameters = lpgd.QPLayer(), [torch.eye(3, dtype=torch.float64), -points]
    else:
        x, p = cp.Variable(3), cp.Parameter(3)
        layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - p))), [p], [x])
        parameters = [points]
    found = lpgd.envelopes(
        layer,
        parameters,
        lambda output: 0.5 * (output[0] - target).square().sum(-1),
        tau,
        rho,
        convex_loss=lambda element, x: 0.5 * cp.sum_squares(x - target.numpy()),
    )
    weight, squares = (1 + rho) / tau, (points - target).square().sum(-1)
    assert found.proximal is not None
    torch.testing.assert_close(found.proximal, 0.5 * squares * weight / (1 + weight), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found.lower, 0.5 * squares - 0.5 * squares / weight, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.upper, 0.5 * squares + 0.5 * squares / weight, rtol=1e-6, atol=1e-9)
    together = lpgd.envelopes(layer, parameters, lambda output: 0.5 * (output[0] - target).square().sum(), tau, rho)
    torch.testing.assert_close(together.lower, found.lower.sum(), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("case", REGULAR, ids=str)
def test_a_linear_loss_is_its_own_linearisation_for_every_cone(case: Case) -> None:
    """CVXPY's proximal step on the cones against the tilted problem in our solver."""
    tau, rho = 0.3, 0.5
    solution, cotangent = planted_solution(case), random_cotangent(case, duals=False)
    found = lower_envelope_of_loss(
        None, solution, tau, rho, lambda element, x: cotangent.x[element].numpy() @ (x - case.point.x[element].numpy())
    )
    problem, start = case.problem, case.point.x
    tilted = problem.augment(rho, start).tilt(torch.full((problem.batch_size,), tau, dtype=torch.float64), cotangent)
    x = choose_solver(tilted.structure).solve(tilted).x
    moved = (problem.objective(x) - problem.objective(start) + 0.5 * rho * (x - start).square().sum(-1)) / tau
    torch.testing.assert_close(found, moved + (cotangent.x * (x - start)).sum(-1), rtol=1e-5, atol=2e-6)


def test_envelopes_refuse_what_they_are_no_bounds_for() -> None:
    layer, one = lpgd.LPLayer(), torch.ones(1, 2, dtype=torch.float64)
    costs = torch.tensor([1.0, 2.0], dtype=torch.float64)
    parameters = {"c": costs, "A": one, "b": torch.ones(1, dtype=torch.float64), "lb": 0.0}
    with pytest.raises(ValueError, match="primal variables only"):
        lpgd.envelopes(layer, parameters, lambda output: output.y.sum(), 1.0)
    with pytest.raises(ValueError, match="tau must be positive"):
        lpgd.envelopes(layer, parameters, lambda output: output.x.sum(), -1.0)
    with pytest.raises(ValueError, match="convex in the layer's outputs"):
        lpgd.envelopes(
            layer, parameters, lambda output: output.x.sum(), 1.0, convex_loss=lambda element, x: -cp.sum_squares(x)
        )


SIMPLEX = {
    "A": torch.ones(1, 3, dtype=torch.float64),
    "b": torch.ones(1, dtype=torch.float64),
    "lb": 0.0,
}


@pytest.mark.parametrize("solver", ["INTERIOR", "HIGHS", "CLARABEL", "DAQP", "SCS", "MOREAU"])
def test_a_chosen_step_that_moves_no_vertex_is_warned_about(solver: str) -> None:
    layer = lpgd.LPLayer(solver=solver, gradient=lpgd.LPGD())
    costs = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    output = layer(costs, **SIMPLEX)
    with pytest.warns(lpgd.LpgdWarning, match=r"no solution of this linear program moved.*\.unit") as caught:
        output.x[0, 0].square().backward()
    assert len(caught) == 1
    (info,) = output.info.gradients
    assert not info.moved.any()
    # The largest cost over the loss gradient (2, 0, 0), for element 0; element 1 has no loss.
    assert info.unit[0] == pytest.approx(1.0, rel=1e-6)
    assert 0 < info.tau[0] < 0.01
    assert torch.isnan(info.tau[1])
    assert torch.isnan(info.unit[1])
    assert info.used[1] == "zero cotangent"


@pytest.mark.parametrize("gradient", [lpgd.LPGD(tau=1e-4), lpgd.LPGD(tau=3.0), lpgd.LPGD()], ids=str)
def test_ordinary_use_is_not_warned_about(gradient: lpgd.LPGD) -> None:
    """A step that the user gave, or one that was chosen where the solution moves, away from kinks."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        costs = torch.tensor([[0.0, 0.5, 2.0], [3.0, 1.0, 1.5]], dtype=torch.float64, requires_grad=True)
        if gradient.tau is None:
            output = lpgd.QPLayer(gradient=gradient)(torch.eye(3, dtype=torch.float64), costs, **SIMPLEX)
        else:
            output = lpgd.LPLayer(gradient=gradient)(costs, **SIMPLEX)
        (output.x * torch.tensor([1.0, 2.0, 4.0])).square().sum().backward()
    (info,) = output.info.gradients
    assert bool(info.moved.all()) == (gradient.tau != 1e-4)


def test_a_vertex_moves_exactly_from_its_threshold_on() -> None:
    """From vertex 0 to vertex j at τ = (c_j - c_0) / (g_0 - g_j), the least over j."""
    costs = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    weights = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
    threshold = min((costs[j] - costs[0]) / (weights[0] - weights[j]) for j in (1, 2)).item()
    for factor, side in itertools.product((0.99, 1.01), ("lower", "upper")):
        layer = lpgd.LPLayer(solver="HIGHS", gradient=lpgd.LPGD(tau=factor * threshold, envelope=side))
        output = layer(costs.clone().requires_grad_(), **SIMPLEX)
        (output.x @ weights).backward()
        assert bool(output.info.gradients[0].moved) == (factor > 1 and side == "lower")
