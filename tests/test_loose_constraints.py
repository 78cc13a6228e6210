"""Constraints far away set the unit of length, and hide nothing: solutions are those without them."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.cones.product import Cones
from lpgd.solvers import ConicSolver
from lpgd.status import Status
from tests.solver_table import SOLVER_TABLE

SOLVERS = [
    pytest.param(row.solver, curvature, id=f"{row}-{curvature}")
    for row in SOLVER_TABLE
    for curvature in (0.0, 1.0)
    if curvature or row.name != "PROXQP"
]
"""ProxQP takes no linear programs."""

pytestmark = pytest.mark.filterwarnings("ignore::lpgd.LpgdWarning")  # who solves it in the end is no matter here
FAR = [1e4, 1e6, 1e9, 1e12]


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("kind", ["ball", "plane"])
def test_a_far_constraint_beside_a_ball(kind: str, far: float) -> None:
    """The point of the unit ball nearest to c is c / |c|, and moves by (I - u uᵀ) / |c|."""
    x, c = cp.Variable(2), cp.Parameter(2)
    loose = cp.norm(x - 1) <= far if kind == "ball" else x[0] + 2 * x[1] <= far
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= 1, loose]), [c], [x])
    point = double([-3.0, -4.0]).requires_grad_()
    output = layer(point)
    output[0][0].backward()
    assert output.info.statuses == (Status.SOLVED,)
    assert point.grad is not None
    np.testing.assert_allclose(output[0].detach().numpy(), [-0.6, -0.8], atol=1e-7)
    np.testing.assert_allclose(point.grad.numpy(), [0.64 / 5, -0.48 / 5], atol=1e-6)


@pytest.mark.parametrize("small", [1e-7, 1e-9, 1e-11, 1e-13])
def test_a_row_of_small_coefficients_beside_a_ball(small: float) -> None:
    """``0.05 |x|² + 3x₁ + 4x₂`` over the unit ball is least at -(0.6, 0.8); e (x₁ + x₂) ≤ 1 is far away."""
    A = double([[small, small], [0.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])
    cones, b = Cones(nonnegative=1, second_order=(3,)), double([1.0, 1.0, 0.0, 0.0])
    output = lpgd.solve_conic(0.1 * torch.eye(2).double(), double([3.0, 4.0]), A, b, cones)
    assert output.info.statuses == (Status.SOLVED,)
    np.testing.assert_allclose(output.x.numpy(), [-0.6, -0.8], atol=1e-7)


@pytest.mark.parametrize("far", [*FAR, 1e15])
@pytest.mark.parametrize(("solver", "curvature"), SOLVERS)
def test_a_far_row_beside_an_equality(solver: ConicSolver, curvature: float, far: float) -> None:
    """3x₁ + 4x₂ over x₁ + x₂ = 1, x ≥ 0 is least at (1, 0), with x₁ + 2x₂ ≤ far or without; with ½|x|² as well."""
    data = {"A": double([[1.0, 1.0]]), "b": double([1.0]), "G": double([[1.0, 2.0]]), "h": double([far])}
    q = double([3.0, 4.0])
    if curvature:
        output = lpgd.solve_qp(curvature * torch.eye(2).double(), q, **data, lb=0.0, solver=solver)
    else:
        output = lpgd.solve_lp(q, **data, lb=0.0, solver=solver)
    assert output.info.statuses == (Status.SOLVED,)
    np.testing.assert_allclose(output.x.numpy(), [1.0, 0.0], atol=1e-6)
