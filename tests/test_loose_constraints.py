"""Constraints far away set the unit of length, and hide nothing: solutions are those without them."""

from __future__ import annotations

import warnings
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


def _far_things(kind: str, far: float) -> tuple[lpgd.CvxpyLayer, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A layer with a constraint far away, its parameter, its solution, and the gradient of Σ (1 + i) x_i."""
    weights, name = torch.arange(1.0, 5.0, dtype=torch.float64), kind.split(", ")[0]
    x, c = cp.Variable(4), cp.Parameter(4)
    if name == "norm":  # √(1 + |x|²) - <c, x>
        at = double([0.3, -0.5, 0.2, 0.4])
        root = (1 - at.square().sum()).sqrt()
        solution, gradient = at / root, weights / root + at * (at @ weights) / root**3
        objective = cp.norm(cp.hstack([x, 1.0])) - c @ x
    elif name == "power":  # Σ |x|³ / 3 - <c, x>
        at = double([0.9, -0.7, 1.3, -0.4])
        solution, gradient = at.sign() * at.abs().sqrt(), weights / (2 * at.abs().sqrt())
        objective = cp.sum(cp.power(cp.abs(x), 3)) / 3 - c @ x
    else:  # Σ x log x - <c, x>
        at = double([0.5, -0.3, 1.1, 0.2])
        solution = torch.exp(at - 1)
        gradient, objective = weights * solution, -cp.sum(cp.entr(x)) - c @ x
    loose = {
        "bounds": x <= far,
        "ball": cp.norm(x) <= far,
        "plane": cp.sum(x) <= far,
        "magnitudes": cp.norm1(x) <= far,  # whose own variables may be as large as that
    }[kind.split(", ")[1]]
    return lpgd.CvxpyLayer(cp.Problem(cp.Minimize(objective), [loose]), [c], [x]), at, solution, gradient


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(
    "kind",
    [f"{name}, {way}" for name in ("norm", "power", "entropy") for way in ("bounds", "ball", "plane", "magnitudes")],
)
def test_a_far_constraint_takes_no_digits_of_curved_cones(kind: str, far: float) -> None:
    """Solutions and gradients are those without it, with no word of kinks or singular conditions."""
    layer, at, solution, gradient = _far_things(kind, far)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    for method, accuracy in ((lpgd.ImplicitKKT(), 1e-9), (lpgd.LPGD(), 1e-6), (lpgd.LPGD(tau=1e-3, rho=0.1), None)):
        layer.gradient = method
        c = at.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = layer(c)
            (output[0] @ weights).backward()
        np.testing.assert_allclose(output[0].detach().numpy(), solution.numpy(), rtol=0, atol=1e-9)
        assert c.grad is not None
        if accuracy is not None:
            np.testing.assert_allclose(c.grad.numpy(), gradient.numpy(), rtol=0, atol=accuracy)


@pytest.mark.parametrize("far", FAR)
def test_a_far_constraint_makes_no_kinks_of_small_slacks(far: float) -> None:
    """½|x|² - <c, x> is least at c, however near inactive bounds are."""
    c = double([0.3, -0.2]).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = lpgd.solve_qp(
            torch.eye(2).double(),
            -c,
            G=double([[1.0, 1.0]]),
            h=double([far]),
            lb=double([0.29, -0.21]),
            ub=1.0,
            solver="CLARABEL",
        )
        output.x[0].backward()
    np.testing.assert_allclose(output.x.detach().numpy(), [0.3, -0.2], atol=1e-9)
    assert c.grad is not None
    np.testing.assert_allclose(c.grad.numpy(), [1.0, 0.0], atol=1e-9)


@pytest.mark.parametrize("solver", ["DAQP", "CLARABEL", "PIQP"])
@pytest.mark.parametrize("far", [*FAR, 1e10])
def test_bounds_far_away_make_nothing_active(far: float, solver: str) -> None:
    """The point nearest to c with the sum 1 is c less a mean; slacks of order 1 are no active constraints there."""
    c = double([0.7, 0.3, 0.4]).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = lpgd.solve_qp(
            torch.eye(3).double(), -c, A=torch.ones(1, 3).double(), b=double([1.0]).requires_grad_(),
            G=double([[1.0, -1.0, 0.0]]), h=double([2.0]), lb=0.0, ub=far, solver=solver, gradient=lpgd.LPGD(),
        )  # fmt: skip
        (output.x @ double([1.0, 2.0, 4.0])).backward()
    np.testing.assert_allclose(output.x.detach().numpy(), c.detach().numpy() - 0.4 / 3, atol=1e-9)
    assert c.grad is not None
    np.testing.assert_allclose(c.grad.numpy(), np.array([1.0, 2.0, 4.0]) - 7.0 / 3, atol=1e-6)


@pytest.mark.parametrize("far", [1e3, 1e5, 1e7])
def test_a_far_constraint_that_is_active(far: float) -> None:
    """``x₁`` over ``|x| ≤ far, x₂ = p`` is largest at √(far² - p²), and Σ log x over ``Σ x ≤ far`` at far / 2."""
    x, p = cp.Variable(2), cp.Parameter()
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Maximize(x[0]), [cp.norm(x) <= far, x[1] == p]), [p], [x])
    one = double(1.0).requires_grad_()
    (found,) = layer(one)
    found[0].backward()
    np.testing.assert_allclose(found.detach().numpy(), [np.sqrt(far**2 - 1), 1.0], rtol=1e-9)
    assert one.grad is not None
    np.testing.assert_allclose(one.grad.numpy(), -1.0 / np.sqrt(far**2 - 1), rtol=1e-5)
    r = cp.Parameter()
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Maximize(cp.sum(cp.log(x))), [cp.sum(x) <= r]), [r], [x])
    room = double(far).requires_grad_()
    (found,) = layer(room)
    found[0].backward()
    np.testing.assert_allclose(found.detach().numpy(), [far / 2, far / 2], rtol=1e-7)
    assert room.grad is not None
    np.testing.assert_allclose(room.grad.numpy(), 0.5, rtol=1e-6)


@pytest.mark.parametrize("loose", ["ball of 10", "ball of 1000", "bounds", "magnitudes"])
@pytest.mark.parametrize("size", [1e-4, 1e-2])
@pytest.mark.parametrize("power", [3, 4])
def test_a_small_power_beside_a_square_is_not_lost(power: int, size: float, loose: str) -> None:
    """``|x|² + Σ |x_i|ᵖ - <c, x>`` has its minimum where c is its gradient, which moves by the inverse curvature."""
    x, c = cp.Variable(3), cp.Parameter(3)
    objective = cp.sum_squares(x) + cp.sum(cp.power(cp.abs(x) if power == 3 else x, power))
    far = {
        "ball of 10": cp.norm(x) <= 10,
        "ball of 1000": cp.norm(x) <= 1e3,
        "bounds": x <= 1e3,
        "magnitudes": cp.norm1(x) <= 1e3,
    }[loose]
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(objective - c @ x), [far]), [c], [x])
    generator = np.random.default_rng(3)
    at = size * generator.uniform(0.2, 2.0, (4, 3)) * generator.choice([-1.0, 1.0], (4, 3))
    costs = double(2 * at + power * np.sign(at) * np.abs(at) ** (power - 1)).requires_grad_()
    output = layer(costs)
    output[0].sum().backward()
    assert output.info.statuses == (Status.SOLVED,) * 4
    np.testing.assert_allclose(output[0].detach().numpy(), at, rtol=0, atol=1e-9 * size)
    assert costs.grad is not None
    curvature = 2 + power * (power - 1) * np.abs(at) ** (power - 2)
    np.testing.assert_allclose(costs.grad.numpy(), 1 / curvature, rtol=1e-6)
