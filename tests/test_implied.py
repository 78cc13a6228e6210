"""Rows that others state already: x >= 0 beside entr(x), one of the sums of a transport plan."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import pytest
import torch

import lpgd
from lpgd.layers.cvxpy.canonical import canonicalise

N = 12
COSTS = torch.linspace(0.0, 30.0, N, dtype=torch.float64)
"""softmax(-COSTS) goes from 1 down to 1e-13."""


def _entropic(stated: str) -> tuple[cp.Variable, cp.Parameter, list[Any]]:
    x, cost = cp.Variable(N, nonneg=stated == "attribute"), cp.Parameter(N)
    inequality: list[Any] = {"rows": [x >= 0], "scaled": [3.0 * x >= -1e-3], "attribute": []}[stated]
    return x, cost, [cp.sum(x) == 1, *inequality]


@pytest.mark.parametrize("stated", ["rows", "scaled", "attribute"])
def test_small_entries_of_an_entropic_solution_are_no_kink(stated: str) -> None:
    x, cost, constraints = _entropic(stated)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cost @ x - cp.sum(cp.entr(x))), constraints), [cost], [x])
    values, expected = COSTS.clone().requires_grad_(), COSTS.clone().requires_grad_()
    weights = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (found,) = layer(values)  # a warning is an error in tests
    right = torch.softmax(-expected, 0)
    (weights * found).sum().backward()
    (weights * right).sum().backward()
    torch.testing.assert_close(found, right, rtol=0, atol=1e-12)
    torch.testing.assert_close(values.grad, expected.grad, rtol=0, atol=1e-12)


def test_transport_plans_beside_nonnegativity() -> None:
    n = 8
    generator = torch.Generator().manual_seed(0)
    plan, cost, temperature = cp.Variable((n, n)), cp.Parameter((n, n)), 0.05
    uniform = torch.full((n,), 1.0 / n, dtype=torch.float64)
    constraints: list[Any] = [
        cp.sum(plan, axis=0) == uniform.numpy(),
        cp.sum(plan, axis=1) == uniform.numpy(),
        plan >= 0,
    ]
    objective = cp.Minimize(cp.sum(cp.multiply(cost, plan)) - temperature * cp.sum(cp.entr(plan)))
    layer = lpgd.CvxpyLayer(cp.Problem(objective, constraints), [cost], [plan])
    costs = torch.rand(3, n, n, dtype=torch.float64, generator=generator)
    (found,) = layer(costs)
    scaled = torch.log_softmax(-(costs / temperature).flatten(1), 1).view_as(costs)
    for _ in range(20_000):  # Sinkhorn's method
        scaled = scaled - torch.logsumexp(scaled, 1, keepdim=True) + uniform.log()[None, None]
        scaled = scaled - torch.logsumexp(scaled, 2, keepdim=True) + uniform.log()[None, :, None]
    torch.testing.assert_close(found, scaled.exp(), rtol=0, atol=1e-12)


def test_rows_of_several_variables_and_upper_ends() -> None:
    x, a = cp.Variable(3), cp.Parameter()
    total = x[0] + 2.0 * x[1] + a
    problem = cp.Minimize(-cp.entr(total) + cp.sum_squares(x) - cp.sum(cp.entr(1 - x)))
    kept: list[Any] = [x <= 0.5, x[0] + 2.0 * x[1] <= 4]
    implied: list[Any] = [total >= 0, 0.5 * total >= -1, x <= 1]
    program = canonicalise(cp.Problem(problem, implied + kept), [a], [x])
    plain = canonicalise(cp.Problem(problem, kept), [a], [x])
    assert program.cones == plain.cones
    assert program.cones.nonnegative == 1
    assert list(program.upper_index) == list(plain.upper_index)


def test_what_no_cone_implies_stays() -> None:
    x, a = cp.Variable(3), cp.Parameter()
    cases: list[tuple[Any, int, int]] = [
        (x >= 0, 0, 3),
        (x >= a, 0, 3),
        (x[0] + x[1] >= 0, 1, 0),
        (x >= -1, 0, 0),
        (x <= 1, 0, 0),
    ]
    for constraint, rows, lower in cases:
        constraints: list[Any] = [constraint, cp.norm(x) <= 1, cp.sum(x) <= a]
        program = canonicalise(cp.Problem(cp.Minimize(-cp.sum(cp.entr(x + 1))), constraints), [a], [x])
        assert program.cones.nonnegative == 1 + rows
        assert program.lower_index.size == lower
        assert program.upper_index.size == 3 * (constraint is cases[-1][0])


def test_their_multipliers_are_zero() -> None:
    x, cost, constraints = _entropic("rows")
    duals = [constraint.dual_variables[0] for constraint in constraints]
    problem = cp.Problem(cp.Minimize(cost @ x - cp.sum(cp.entr(x))), constraints)
    layer = lpgd.CvxpyLayer(problem, [cost], [x, *duals])
    values = COSTS.clone().requires_grad_()
    _, of_sum, of_rows = layer(values)
    (of_sum.sum() + of_rows.sum()).backward()
    assert of_rows.shape == (N,)
    assert not of_rows.any()
    # cost + log x + 1 + λ = 0, so λ = log Σ exp(-cost) - 1.
    torch.testing.assert_close(of_sum, torch.logsumexp(-COSTS, 0) - 1.0, rtol=0, atol=1e-10)
    torch.testing.assert_close(values.grad, -torch.softmax(-COSTS, 0), rtol=0, atol=1e-10)


def _balanced(cost: cp.Parameter, *more: Any, rows: Any = 0.25, columns: Any = 0.25) -> tuple[cp.Variable, cp.Problem]:
    plan = cp.Variable((4, 4))
    sums: list[Any] = [cp.sum(plan, axis=1) == rows, cp.sum(plan, axis=0) == columns]
    objective = cp.sum(cp.multiply(cost, plan)) + 0.5 * cp.sum_squares(plan)
    return plan, cp.Problem(cp.Minimize(objective), [*sums, *[one(plan) for one in more]])


def test_one_of_the_sums_of_a_plan_is_left_out() -> None:
    cost = cp.Parameter((4, 4))
    plan, problem = _balanced(cost)
    assert canonicalise(problem, [cost], [plan]).cones.zero == 7
    costs = torch.randn(3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = lpgd.CvxpyLayer(problem, [cost], [plan])(costs)
    weights = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (weights * output[0]).sum().backward()

    def centred(matrix: torch.Tensor) -> torch.Tensor:
        rows, columns = matrix.mean(-1, keepdim=True), matrix.mean(-2, keepdim=True)
        return matrix - rows - columns + rows.mean(-2, keepdim=True)

    torch.testing.assert_close(output[0], 1 / 16 - centred(costs.detach()), rtol=0, atol=1e-12)
    torch.testing.assert_close(costs.grad, -centred(weights).expand(3, 4, 4), rtol=0, atol=1e-12)
    assert output.info.gradients[0].counts == {"implicit": 3}


def test_rows_that_follow_whatever_the_parameters_are() -> None:
    """Σ x = Σ b follows from x = b, and 2 Σ x = Σ b does not; x is b, whatever c is."""
    x, b, c = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Minimize(cp.sum_squares(x) - c @ x)
    own: Any = x == b
    for factor, rows in ((1.0, 3), (2.0, 4)):
        total: Any = factor * cp.sum(x) == cp.sum(b)
        assert canonicalise(cp.Problem(problem, [total, own]), [b, c], [x]).cones.zero == rows
    total = cp.sum(x) == cp.sum(b)
    sides = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    (found,) = lpgd.CvxpyLayer(cp.Problem(problem, [total, own]), [b, c], [x])(sides, 3.0 * weights)
    (weights @ found).backward()
    torch.testing.assert_close(found, sides, rtol=0, atol=1e-12)
    torch.testing.assert_close(sides.grad, weights, rtol=0, atol=1e-12)


def test_equalities_that_may_be_asked_for_or_contradict_stay() -> None:
    cost, rows = cp.Parameter((4, 4)), cp.Parameter(4)
    plan, problem = _balanced(cost, rows=rows)
    assert canonicalise(problem, [cost, rows], [plan]).cones.zero == 8
    plan, problem = _balanced(cost)
    assert canonicalise(problem, [cost], [plan, problem.constraints[0].dual_variables[0]]).cones.zero == 8
    plan, problem = _balanced(cost, lambda plan: plan[0, 0] + (1 + 1e-9) * plan[0, 1] == 0.125)
    assert canonicalise(problem, [cost], [plan]).cones.zero == 8
    plan, problem = _balanced(cost, lambda plan: 1e12 * plan[0, 0] == 1.0, lambda plan: 1e12 * plan[0, 0] == 1.0)
    assert canonicalise(problem, [cost], [plan]).cones.zero == 8
    plan, problem = _balanced(cost, columns=0.25 + 1e-6)
    assert canonicalise(problem, [cost], [plan]).cones.zero == 8
    with pytest.raises(lpgd.SolverError, match="INFEASIBLE"):
        lpgd.CvxpyLayer(problem, [cost], [plan])(torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("squared", "factor"),
    [
        (cp.sum_squares, 1.0),
        (lambda u: cp.sum(cp.square(u)), 1.0),
        (lambda u: 2 * cp.sum_squares(-u), 2.0),
    ],
)
def test_squares_of_positive_parts_have_no_kink_where_they_are_zero(squared: Any, factor: float) -> None:
    x, p = cp.Variable(4), cp.Parameter(4)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(squared(cp.pos(x)) + cp.sum_squares(x - p))), [p], [x])
    assert not layer.structure.lower_index.size
    values = torch.tensor([[1.0, -2.0, 3.0, -0.5], [-1.0, -1.0, -1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    output = layer(values)
    share = 1 / (1 + factor * (values.detach() > 0).double())
    torch.testing.assert_close(output[0], values.detach() * share, rtol=0, atol=1e-10)
    output[0].sum().backward()
    torch.testing.assert_close(values.grad, share, rtol=0, atol=1e-10)
    assert set(output.info.gradients[0].used) == {"implicit"}


def test_signs_that_a_cost_or_an_equality_needs_stay() -> None:
    x, p, t = cp.Variable(2), cp.Parameter(2), cp.Variable(2, nonneg=True)
    squares = cp.sum_squares(t) + cp.sum_squares(x)
    for objective, row in (
        (squares - cp.sum(t), x + t >= p),  # one would have more
        (squares + p @ t, x + t >= p),
        (squares, x + t == p),
        (squares, x + t <= p),
    ):
        program = canonicalise(cp.Problem(cp.Minimize(objective), [row]), [p], [x])
        assert program.lower_index.size == 2
    program = canonicalise(cp.Problem(cp.Minimize(squares), [x + t >= p]), [p], [x, t])
    assert program.lower_index.size == 0
