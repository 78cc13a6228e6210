"""The statements of docs/set_valued.md, by number: where solutions are not unique, or do not move smoothly."""

from __future__ import annotations

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd

SOLVERS = pytest.mark.parametrize("solver", ["HIGHS", "CLARABEL"])  # vertices, and centres of faces
ONES, ONE = torch.ones(1, 5, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
SIMPLEX = {"A": ONES, "b": ONE, "lb": 0.0}
COSTS = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.5], dtype=torch.float64)  # the face x₁ + x₃ + x₄ = 1
FACE = [0, 2, 3]
G = torch.tensor([0.3, -0.9, -0.2, 0.6, 0.1], dtype=torch.float64)
ENVELOPES = ("lower", "upper", "average")


def gradient(method: lpgd.GradientMethod, solver: str, costs: torch.Tensor = COSTS, g: torch.Tensor = G):
    """That of the cost for a linear loss over the simplex, and the solution that was chosen."""
    costs = costs.clone().requires_grad_()
    output = lpgd.LPLayer(solver=solver, gradient=method)(costs, **SIMPLEX)
    (output.x @ g).backward()
    return costs.grad, output.x.detach()


def values(solver: str, tau: float, costs: torch.Tensor = COSTS) -> lpgd.Envelopes:
    return lpgd.envelopes(lpgd.LPLayer(solver=solver), {"c": costs, **SIMPLEX}, lambda output: output.x @ G, tau)


@SOLVERS
def test_1_values_are_the_best_and_the_worst_solution(solver: str) -> None:
    for tau in (1e-3, 0.1, 0.5):  # from 1 / max(g - g') = 1 / 1.5 down they are equal to the limits
        found = values(solver, tau)
        assert float(found.lower) == pytest.approx(float(G[FACE].min()), abs=1e-6)
        assert float(found.upper) == pytest.approx(float(G[FACE].max()), abs=1e-6)
        assert float(found.average) == pytest.approx(0.2, abs=1e-6)


@SOLVERS
def test_1_values_of_a_unique_solution_are_the_loss(solver: str) -> None:
    found = values(solver, 1e-3, COSTS + torch.tensor([0.0, 0, 0.1, 0.1, 0], dtype=torch.float64))
    for value in (found.lower, found.upper, found.average, found.loss):
        assert float(value) == pytest.approx(float(G[0]), abs=1e-6)


@SOLVERS
def test_2_bounds_widen_with_tau_and_others_pay_their_price(solver: str) -> None:
    taus = (0.1, 0.5, 0.9, 2.0, 10.0)
    found = [values(solver, tau) for tau in taus]
    for tau, own in zip(taus, found, strict=True):
        assert float(own.lower) == pytest.approx(float((G + COSTS / tau).min()), abs=1e-6)
        assert float(own.upper) == pytest.approx(float((G - COSTS / tau).max()), abs=1e-6)
        assert own.lower <= own.loss + 1e-6
        assert own.loss <= own.upper + 1e-6
    for near, far in itertools.pairwise(found):
        assert far.lower <= near.lower + 1e-6
        assert far.upper >= near.upper - 1e-6
    assert found[-1].lower < found[0].lower - 0.1


@SOLVERS
def test_3_a_convex_loss_tends_to_the_least_one_over_the_solutions(solver: str) -> None:
    target = np.array([0.5, 1.0, 0.0, 0.2, 0.0])

    def loss(output: lpgd.LayerOutput) -> torch.Tensor:
        return (output.x - torch.as_tensor(target)).square().sum()

    found = lpgd.envelopes(
        lpgd.LPLayer(solver=solver),
        {"c": COSTS, **SIMPLEX},
        loss,
        1e-3,
        convex_loss=lambda element, x: cp.sum_squares(x - target),
    )
    # Over the face x_i + t = 1: the target's part on it and an equal share of what is missing to one.
    best = target.copy()
    best[FACE] += (1 - target[FACE].sum()) / 3
    best[[1, 4]] = 0.0
    assert found.proximal is not None
    assert float(found.proximal) == pytest.approx(np.square(best - target).sum(), abs=1e-5)


@SOLVERS
@pytest.mark.parametrize("envelope", ENVELOPES)
def test_4_a_vertex_moves_beyond_its_threshold_only(solver: str, envelope: str) -> None:
    costs = torch.tensor([0.0, 1.0, 0.4, 0.8, 1.5], dtype=torch.float64)
    # From vertex 0: lower moves to v with g_v < g_0 at c_v / (g_0 - g_v): 1/1.2, 0.4/0.5, 1.5/0.2; upper: 0.8/0.3.
    threshold = {"lower": 0.8, "upper": 0.8 / 0.3, "average": 0.8}[envelope]
    still, x = gradient(lpgd.LPGD(tau=0.99 * threshold, envelope=envelope), solver, costs)
    torch.testing.assert_close(x, torch.eye(5, dtype=torch.float64)[0], atol=1e-8, rtol=0)
    torch.testing.assert_close(still, torch.zeros_like(still), atol=1e-6, rtol=0)
    tau = 1.01 * threshold
    moved, _ = gradient(lpgd.LPGD(tau=tau, envelope=envelope), solver, costs)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[0], expected[3 if envelope == "upper" else 2] = (1.0, -1.0) if envelope == "upper" else (-1.0, 1.0)
    torch.testing.assert_close(moved, expected / (2 * tau if envelope == "average" else tau), atol=1e-6, rtol=0)


@SOLVERS
@pytest.mark.parametrize("tau", [1e-3, 0.1])
def test_5_on_a_face_gradients_point_to_the_best_solution_and_grow(solver: str, tau: float) -> None:
    best, worst = (torch.eye(5, dtype=torch.float64)[place] for place in (2, 3))
    lower, x = gradient(lpgd.LPGD(tau=tau, envelope="lower"), solver)
    assert float(x[FACE].sum()) == pytest.approx(1.0, abs=1e-7)
    torch.testing.assert_close(lower, (best - x) / tau, atol=1e-6 / tau, rtol=0)
    upper, _ = gradient(lpgd.LPGD(tau=tau, envelope="upper"), solver)
    torch.testing.assert_close(upper, (x - worst) / tau, atol=1e-6 / tau, rtol=0)
    average, _ = gradient(lpgd.LPGD(tau=tau, envelope="average"), solver)
    torch.testing.assert_close(average, (best - worst) / (2 * tau), atol=1e-6 / tau, rtol=0)


@SOLVERS
def test_5_a_short_step_makes_the_best_vertex_the_only_solution(solver: str) -> None:
    lower, x = gradient(lpgd.LPGD(tau=0.1, envelope="lower"), solver)
    assert float(x[2]) < 0.99  # it was not chosen by luck
    after = lpgd.LPLayer(solver=solver)(COSTS - 1e-3 * lower, **SIMPLEX).x
    torch.testing.assert_close(after, torch.eye(5, dtype=torch.float64)[2], atol=1e-6, rtol=0)


def test_6_with_rho_all_agree_inside_of_a_face() -> None:
    rho = 0.5
    expected = torch.zeros(5, dtype=torch.float64)
    expected[FACE] = -(G[FACE] - G[FACE].mean()) / rho
    for envelope in ENVELOPES:
        found, x = gradient(lpgd.LPGD(tau=1e-3, rho=rho, envelope=envelope), "CLARABEL")
        assert float(x[FACE].min()) > 0.1
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    implicit, _ = gradient(lpgd.ImplicitKKT(rho=rho), "CLARABEL")
    torch.testing.assert_close(implicit, expected, atol=1e-6, rtol=0)


def test_6_with_rho_sides_differ_at_the_end_of_a_face() -> None:
    rho, found, chosen = 0.5, {}, None
    for envelope in ENVELOPES:
        found[envelope], chosen = gradient(lpgd.LPGD(tau=1e-3, rho=rho, envelope=envelope), "HIGHS")
    assert chosen is not None
    start = int(chosen.argmax())
    assert float(chosen[start]) == pytest.approx(1.0, abs=1e-9)

    def into_the_face(direction: torch.Tensor) -> torch.Tensor:
        """The projection onto directions d with Σ d = 0, d = 0 off the face and d ≥ 0 on it but for the vertex."""
        d = cp.Variable(5)
        others = [place for place in FACE if place != start]
        off = [place for place in range(5) if place not in FACE]
        goal = cp.sum_squares(d - direction.numpy())
        cp.Problem(cp.Minimize(goal), [cp.sum(d) == 0, d[others] >= 0, d[off] == 0]).solve(solver="CLARABEL")
        return torch.as_tensor(d.value)

    lower, upper = into_the_face(-G / rho), -into_the_face(G / rho)
    torch.testing.assert_close(found["lower"], lower, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["upper"], upper, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["average"], 0.5 * (lower + upper), atol=1e-4, rtol=0)
    assert float((lower - upper).abs().max()) > 0.1


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_7_at_kinks_envelopes_are_one_sided_derivatives(sign: float) -> None:
    unit = torch.eye(2, dtype=torch.float64)
    expected = {"lower": float(sign < 0), "upper": float(sign > 0), "average": 0.5}
    for envelope, share in expected.items():
        x = torch.tensor([0.0, 2.0], dtype=torch.float64, requires_grad=True)  # the second one is not at its kink
        y = lpgd.QPLayer("DAQP", lpgd.LPGD(tau=1e-4, envelope=envelope))(unit, -x, lb=0.0).x
        torch.testing.assert_close(y.detach(), torch.tensor([0.0, 2.0], dtype=torch.float64), atol=1e-10, rtol=0)
        (sign * y.sum()).backward()
        torch.testing.assert_close(x.grad, sign * torch.tensor([share, 1.0], dtype=torch.float64), atol=1e-5, rtol=0)
        assert torch.isfinite(x.grad).all()
    node = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    layer = lpgd.NodeLayer(
        lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum(), inequality=lambda x, y: -y), lpgd.ImplicitKKT()
    )
    y = layer(node)
    y.sum().backward()
    assert y.info.gradients[0].used == ["implicit, one-sided"]


@SOLVERS
@pytest.mark.parametrize("envelope", ENVELOPES)
def test_8_of_equal_rows_the_sum_of_the_gradients_is_right(solver: str, envelope: str) -> None:
    """``min x`` subject to ``x ≥ b_i``: x = max b, whose subgradients add up to one."""
    b = torch.ones(3, dtype=torch.float64, requires_grad=True)
    rows = -torch.ones(3, 1, dtype=torch.float64)
    output = lpgd.LPLayer(solver=solver, gradient=lpgd.LPGD(tau=0.1, envelope=envelope))(ONE, G=rows, h=-b)
    torch.testing.assert_close(output.x.detach(), ONE, atol=1e-7, rtol=0)
    (2.5 * output.x.sum()).backward()
    assert float(b.grad.sum()) == pytest.approx(2.5, abs=1e-5)


def test_steps_of_a_batch_of_transport_plans_whose_multipliers_are_open() -> None:
    """More constraints are active than there are entries, in each element, and what marginals ask is open."""
    n, size = 4, 6
    plan, cost, rows = cp.Variable((n, n), nonneg=True), cp.Parameter((n, n)), cp.Parameter(n)
    objective = cp.Minimize(cp.sum(cp.multiply(cost, plan)) + 0.1 * cp.sum_squares(plan))
    problem = cp.Problem(objective, [cp.sum(plan, 1) == rows, cp.sum(plan, 0) == np.ones(n) / n])
    generator = np.random.default_rng(0)
    costs, weights = generator.random((size, n, n)), torch.as_tensor(generator.standard_normal((n, n)))
    marginal = torch.full((n,), 1.0 / n, dtype=torch.float64)
    layer = lpgd.CvxpyLayer(problem, [cost, rows], [plan], gradient=lpgd.LPGD())
    at = torch.as_tensor(costs).requires_grad_()
    (gradient,) = torch.autograd.grad((layer(at, marginal)[0] * weights).sum(), at)  # plans are unique: no warning
    expected = torch.zeros_like(gradient)
    for row, column in np.ndindex(n, n):
        moved = torch.zeros(size, n, n, dtype=torch.float64)
        moved[:, row, column] = 1e-6
        sides = [(layer(at.detach() + sign * moved, marginal)[0] * weights).sum((1, 2)) for sign in (1, -1)]
        expected[:, row, column] = (sides[0] - sides[1]) / 2e-6
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_short_steps_from_degenerate_vertices_are_zero(seed: int) -> None:
    """A permutation is the end of many edges: solvers end on other active sets there, 1e-13 apart."""
    n, generator = 4, np.random.default_rng(seed)
    plan, cost = cp.Variable((n, n), nonneg=True), cp.Parameter((n, n))
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(cost, plan))), [cp.sum(plan, 0) == 1, cp.sum(plan, 1) == 1])
    layer = lpgd.CvxpyLayer(problem, [cost], [plan], gradient=lpgd.LPGD())
    costs = torch.as_tensor(generator.standard_normal((3, n, n))).requires_grad_()
    weights = torch.linspace(-1, 1, n * n, dtype=torch.float64).reshape(n, n)
    with pytest.warns(lpgd.LpgdWarning, match="no solution of this linear program moved"):
        (gradient,) = torch.autograd.grad((layer(costs)[0] * weights).sum(), costs)
    assert not gradient.any()
