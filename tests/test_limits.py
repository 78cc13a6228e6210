"""Variables of CVXPY's that may as well be at their limit are substituted by it, and answers stay what they are."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.cones.product import Cones
from lpgd.layers.cvxpy.canonical import canonicalise
from lpgd.layers.cvxpy.layout import CanonicalProgram


def program_of(rows: list[Any], u: cp.Variable, *parameters: cp.Parameter) -> CanonicalProgram:
    target = cp.Parameter(u.shape)
    return canonicalise(cp.Problem(cp.Minimize(cp.sum_squares(u - target)), rows), [target, *parameters], [u])


def test_magnitudes_below_a_limit_are_bounds() -> None:
    u, limit = cp.Variable(4), cp.Parameter(nonneg=True)
    program = program_of([cp.abs(u) <= limit], u, limit)
    assert (program.n, program.cones) == (8, Cones(zero=4))  # the squares' variables and rows are left
    theta = np.array([0.0, 0.0, 0.0, 0.0, 2.5])
    np.testing.assert_array_equal(program.lower(theta), np.full(4, -2.5))
    np.testing.assert_array_equal(program.upper(theta), np.full(4, 2.5))


@pytest.mark.parametrize(
    ("row", "cones"),
    [
        (lambda u: cp.norm_inf(u) <= 1, Cones(zero=4)),
        (lambda u: cp.maximum(cp.abs(u[:2]), cp.abs(u[2:])) <= 1, Cones(zero=4)),
        (lambda u: cp.norm(u) <= 1, Cones(zero=4, second_order=(5,))),
        (lambda u: cp.lambda_max(cp.reshape(u, (2, 2), order="F")) <= 1, Cones(zero=5, semidefinite=(2,))),
        (lambda u: cp.log_sum_exp(u) <= 1, Cones(zero=4, nonnegative=1, exponential=4)),
    ],
)
def test_no_variable_is_left_between_a_function_and_its_limit(row: Any, cones: Cones) -> None:
    u = cp.Variable(4)
    program = program_of([row(u)] if cones.zero == 4 else [row(u), u[1] == u[2]], u)
    assert program.cones == cones
    assert program.n == 8 + cones.exponential


def test_soft_limits_keep_their_slack_alone() -> None:
    u, slack, target = cp.Variable(3), cp.Variable(3, nonneg=True), cp.Parameter(3)
    rows: list[Any] = [cp.abs(u) <= 1 + slack]
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(u - target) + cp.sum(0.5 * slack)), rows)
    program = canonicalise(problem, [target], [u])
    assert (program.n, program.cones) == (9, Cones(zero=3, nonnegative=6))
    value = torch.tensor([0.5, 1.2, -3.0], dtype=torch.float64, requires_grad=True)
    found, multiplier = lpgd.CvxpyLayer(problem, [target], [u, rows[0].dual_variables[0]])(value)
    torch.testing.assert_close(found, found.new_tensor([0.5, 1.0, -2.5]), rtol=0, atol=1e-10)
    torch.testing.assert_close(multiplier, found.new_tensor([0.0, 0.2, 0.5]), rtol=0, atol=1e-10)
    found.sum().backward()
    torch.testing.assert_close(value.grad, found.new_tensor([1.0, 0.0, 1.0]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("named", [None, "CLARABEL"])
def test_multipliers_and_gradients_are_those_of_the_constraint(named: str | None) -> None:
    u, target, limit = cp.Variable(3), cp.Parameter(3), cp.Parameter(3, nonneg=True)
    row: Any = cp.abs(u) <= limit
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(u - target)), [row])
    layer = lpgd.CvxpyLayer(problem, [target, limit], [u, row.dual_variables[0]], solver=named)
    p = torch.tensor([[2.0, -3.0, 0.3], [0.1, 0.2, -4.0]], dtype=torch.float64, requires_grad=True)
    c = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    found, multiplier = layer(p, c)
    torch.testing.assert_close(found, torch.maximum(torch.minimum(p, c), -c), rtol=0, atol=1e-9)
    torch.testing.assert_close(multiplier, (p.abs() - c).clamp(min=0), rtol=0, atol=1e-9)
    weights = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    (found @ weights + 7 * (multiplier @ weights)).sum().backward()
    outside = p.detach().abs() > c.detach()
    sign = p.detach().sign()
    expected_p = weights * torch.where(outside, 7 * sign, 1.0)
    expected_c = (weights * torch.where(outside, sign - 7, 0.0)).sum(0)
    torch.testing.assert_close(p.grad, expected_p, rtol=0, atol=1e-7)
    torch.testing.assert_close(c.grad, expected_c, rtol=0, atol=1e-7)


def test_balls_that_do_not_touch_leave_a_regular_system() -> None:
    u, target = cp.Variable(3), cp.Parameter(3)
    row: Any = cp.norm(u) <= 2
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(u - target)), [row])
    p = torch.tensor([[0.5, 0.2, -0.1], [3.0, 0.0, 4.0]], dtype=torch.float64, requires_grad=True)
    output = lpgd.CvxpyLayer(problem, [target], [u, row.dual_variables[0]])(p)
    found, multiplier = output
    torch.testing.assert_close(found, p.detach() * found.new_tensor([[1.0], [0.4]]), rtol=0, atol=1e-9)
    torch.testing.assert_close(multiplier, found.new_tensor([0.0, 3.0]), rtol=0, atol=1e-9)
    found[:, 0].sum().backward()
    # Projection onto a ball of radius r: (r / |p|) (I - p pᵀ / |p|²).
    expected = found.new_tensor([[1.0, 0.0, 0.0], [0.4 * (1 - 0.36), 0.0, -0.4 * 0.48]])
    torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-9)
    assert set(output.info.gradients[0].used) == {"implicit"}


@pytest.mark.parametrize("function", [cp.abs, cp.norm])
def test_limits_may_be_infinite(function: Any) -> None:
    u, target, limit = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(u - target)), [function(u) <= limit])
    p = torch.tensor([0.5, -2.0, 30.0], dtype=torch.float64)
    (found,) = lpgd.CvxpyLayer(problem, [target, limit], [u])(p, torch.tensor(torch.inf, dtype=torch.float64))
    torch.testing.assert_close(found, p, rtol=0, atol=1e-8)


def test_what_is_asked_for_or_has_a_cost_or_another_limit_stays() -> None:
    u, t, other = cp.Variable(2), cp.Variable(), cp.Parameter()
    target = cp.Parameter(2)
    squares = cp.sum_squares(u - target)
    rows: list[Any] = [u <= t, -u <= t]

    def size(objective: Any, limits: list[Any], asked: list[cp.Variable], *more: cp.Parameter) -> int:
        return canonicalise(cp.Problem(cp.Minimize(objective), [*rows, *limits]), [target, *more], asked).n

    assert size(squares, [t <= 1], [u]) == 4
    assert size(squares, [t <= 1], [u, t]) == 5
    assert size(squares + t, [t <= 1], [u]) == 5
    assert size(squares, [t <= 1, t <= other], [u], other) == 5
    assert size(squares, [t == other], [u], other) == 5
    assert size(squares, [other * t <= 1], [u], other) == 5  # its sign is not known


def test_infeasible_limits_are_said_to_be() -> None:
    u, limit = cp.Variable(2), cp.Parameter()
    layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(u)), [cp.abs(u) <= limit]), [limit], [u], on_error="nan"
    )
    output = layer(torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert [status.name for status in output.info.statuses] == ["SOLVED", "INFEASIBLE"]
