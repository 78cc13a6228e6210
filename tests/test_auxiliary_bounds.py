"""CVXPY's own variables have no bounds that it concludes: it is wrong about ``abs(c * (A @ x))`` where A has zeros."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import torch

import lpgd

INCIDENCE = np.array([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0], [1.0, 0.0, -1.0]])


def test_flows_with_limits_move() -> None:
    angle, limit, generated = cp.Variable(3), cp.Parameter(3, nonneg=True), cp.Variable(nonneg=True)
    flow = cp.multiply(np.array([2.0, 2.0, 2.0]), INCIDENCE @ angle)
    shed = cp.Variable(3, nonneg=True)
    injected = np.array([1.0, 0.0, 0.0]) * generated + shed - np.array([0.0, 0.0, 1.0])
    rows: list[Any] = [injected == INCIDENCE.T @ flow, angle[0] == 0, cp.abs(flow) <= limit]
    problem = cp.Problem(cp.Minimize(generated + 100.0 * cp.sum(shed)), rows)
    layer = lpgd.CvxpyLayer(problem, [limit], [generated, shed])
    limits = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.5]], dtype=torch.float64).requires_grad_()
    found, lost = layer(limits)
    # Two thirds of what bus 2 takes go straight: 1 is possible, then 0.5 / (2 / 3).
    torch.testing.assert_close(found, torch.tensor([1.0, 0.75], dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(lost.sum(1), 1.0 - found, rtol=0, atol=1e-10)
    found.sum().backward()
    expected = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.5]], dtype=torch.float64)
    torch.testing.assert_close(limits.grad, expected, rtol=0, atol=1e-9)


def test_values_that_variables_have_do_not_matter() -> None:
    x, p = cp.Variable(3, nonneg=True), cp.Parameter(3)
    rows: list[Any] = [cp.sum(x) == 1]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.abs(INCIDENCE @ x)) + cp.sum_squares(x - p)), rows)
    target = torch.tensor([0.9, -0.2, 0.1], dtype=torch.float64)
    (before,) = lpgd.CvxpyLayer(problem, [p], [x])(target)
    x.save_value(np.array([-1e-9, 0.5, 0.5]))  # as a solver leaves them
    (after,) = lpgd.CvxpyLayer(problem, [p], [x])(target)
    assert torch.equal(before, after)


def test_bounds_of_a_boolean_variable_may_be_a_parameter() -> None:
    a, costs = cp.Parameter(2), np.array([1.0, 2.0])
    switch = cp.Variable(2, boolean=True, bounds=[np.zeros(2), a])
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Maximize(costs @ switch)), [a], [switch], gradient=lpgd.LPGD(tau=1.0))
    ends = torch.tensor([[1.0, 0.5], [0.2, 1.5], [0.0, 0.9]], dtype=torch.float64)
    (found,) = layer(ends)
    torch.testing.assert_close(found, (ends >= 1.0).double(), atol=1e-9, rtol=0)  # 1 fits below its end, or it is 0
