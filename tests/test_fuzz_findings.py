"""Programs that the fuzz target found, with their right values by construction."""

from __future__ import annotations

import warnings
from typing import Any

import highspy
import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import lpgd
from lpgd.gradients import GradientMethod
from lpgd.solvers import ConicSolver
from lpgd.status import LpgdWarning, Status

FIRST_ORDER = [kind for kind in (lpgd.OSQP, lpgd.SCS, lpgd.Clarabel) if kind.is_installed()]


@pytest.mark.parametrize("kind", FIRST_ORDER, ids=lambda kind: kind.name)
def test_small_multipliers_beside_a_large_curvature(kind: type[ConicSolver]) -> None:
    """``P x + q + Gᵀ y + z = 0`` with multipliers of 1e-2, P of 1e3 and variables in units of their own: a point that
    leaves 1e-7 of it may be off by 40 %."""
    factor = np.array(
        [
            [-0.7, 20.9, -11.7, -15.3, -20.9, 15.5],
            [-10.5, 24.1, -12.2, 1.8, -13.5, 14.6],
            [5.4, -32.2, -10.4, -11.8, -14.0, -10.4],
            [-17.6, -0.6, -19.2, -4.1, -25.9, 30.5],
        ]
    )
    G = np.array(
        [
            [1.17, -0.9, 0.34, -1.25, -0.71, 0.61],
            [0.94, 0.37, 1.62, -2.89, 0.53, -0.36],
            [-0.28, 0.13, -1.98, 0.26, 2.88, 0.11],
        ]
    )
    x = np.array([0.45, -1.47, 0.98, 1.62, -0.85, -1.46])
    y, s = np.array([0.0054, 0.0, 0.0]), np.array([0.0, 0.74, 0.42])
    z = np.array([0.0, 0.0, 0.0, 0.0072, 0.0, 0.0122])
    lower = np.array([-0.33, -np.inf, -0.23, -np.inf, -np.inf, -np.inf])
    upper = np.array([np.inf, -0.52, np.inf, 1.62, -0.11, -1.46])
    P = factor.T @ factor
    q = -P @ x - G.T @ y - z
    unit, row, cost, length = 10.0 ** np.array([-4, 7, -5, -8, 0, -4]), 10.0 ** np.array([-6, -7, -6]), 1e-6, 0.1
    data = {
        "P": cost * unit[:, None] * P * unit,
        "q": cost * length * unit * q,
        "G": row[:, None] * G * unit,
        "h": row * length * (G @ x + s),
        "lb": length * lower / unit,
        "ub": length * upper / unit,
    }
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LpgdWarning)
        output = lpgd.QPLayer(kind())(tensors.pop("P"), tensors.pop("q"), **tensors)
    np.testing.assert_allclose(output.x.numpy() * unit / length, x, atol=1e-6)


def test_highs_at_infinity_has_no_solution_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is made the infinite point that HiGHS 1.16 calls solved; another solver has x = 1."""
    asked: list[Any] = []

    class Infinite(highspy.Highs):
        def getSolution(self) -> Any:
            found = super().getSolution()
            found.col_value = [np.inf] * len(found.col_value)
            asked.append(found)
            return found

    monkeypatch.setattr(highspy, "Highs", Infinite)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.simplefilter("ignore", LpgdWarning)
        output = lpgd.QPLayer(lpgd.HiGHS())(torch.eye(2).double(), -torch.ones(2).double(), lb=0.0)
    assert asked
    np.testing.assert_allclose(output.x.numpy(), [1.0, 1.0], atol=1e-8)
    assert output.info.statuses == (Status.SOLVED,)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e6])
def test_nothing_that_stands_in_an_absent_row_is_looked_at(value: float) -> None:
    """``½|x|² - 2x₁ - 2x₂`` with x₁ ≤ 1 has x = (1, 2), whatever the second row says of no end."""
    G = torch.tensor([[1.0, 0.0], [value, value]], dtype=torch.float64, requires_grad=True)
    h = torch.tensor([1.0, torch.inf], dtype=torch.float64, requires_grad=True)
    output = lpgd.solve_qp(torch.eye(2).double(), torch.full((2,), -2.0).double(), G=G, h=h)
    np.testing.assert_allclose(output.x.detach().numpy(), [1.0, 2.0], atol=1e-7)
    dG, dh = torch.autograd.grad(output.x.sum(), (G, h))
    np.testing.assert_allclose(dh.numpy(), [1.0, 0.0], atol=1e-7)
    assert not dG[1].any()


@pytest.mark.parametrize("solver", [lpgd.DAQP(), lpgd.Clarabel(), lpgd.Moreau()], ids=lambda solver: solver.name)
@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD()], ids=["exact", "LPGD"])
def test_a_row_of_a_fixed_variable_has_no_multiplier_of_its_own(solver: ConicSolver, method: GradientMethod) -> None:
    """x₁ = 1 by its bounds, and 2 x₁ ≤ 2 too: a loss on that row's multiplier depends on what a solver made of it."""
    lower = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    upper = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    q = torch.tensor([-3.0, 0.5], dtype=torch.float64, requires_grad=True)
    G = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    h = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    layer = lpgd.QPLayer(solver, method)
    output = layer(torch.eye(2).double(), q, G=G, h=h, lb=lower, ub=upper)
    np.testing.assert_allclose(output.x.detach().numpy(), [1.0, -0.5], atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LpgdWarning)  # of the gradient with respect to h
        dq = torch.autograd.grad(output.x.sum(), q, retain_graph=True)[0]
    np.testing.assert_allclose(dq.numpy(), [0.0, -1.0], atol=1e-6)
    with pytest.warns(LpgdWarning):
        torch.autograd.grad(output.x.sum() + output.z.sum(), (q, h))


def test_a_variable_without_rows_beside_bounds_and_rows_of_each_element() -> None:
    """Both perturbed sides of a batch are solved at once: bounds have as many rows as the batch, not as both sides."""
    G = torch.tensor([[[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]], [[2.0, 1.0, 0.0], [1.0, 1.0, 0.0]]], dtype=torch.float64)
    h = torch.tensor([[4.0, 5.0], [3.0, 2.5]], dtype=torch.float64)
    q = torch.tensor([[-1.0, -1.5, 1.0], [-2.2, -1.5, -1.0]], dtype=torch.float64)
    lower = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, -2.0]], dtype=torch.float64)
    upper = torch.tensor([[9.0, 9.0, 1.0], [9.0, 9.0, 3.0]], dtype=torch.float64)
    costs = q.clone().requires_grad_()
    output = lpgd.LPLayer(gradient=lpgd.LPGD(tau=2.0))(costs, G=G, h=h, lb=lower, ub=upper)
    output.x.sum().backward()
    # The ends of each side are vertices: the minimisers of q ± 2 over the two rows and the box.
    vertices = [_minimiser(q + sign * 2.0, G, h, lower, upper) for sign in (1.0, -1.0)]
    np.testing.assert_allclose(output.x.detach().numpy(), _minimiser(q, G, h, lower, upper), atol=1e-9)
    assert costs.grad is not None
    np.testing.assert_allclose(costs.grad.numpy(), (vertices[0] - vertices[1]) / 4.0, atol=1e-9)


def _minimiser(q: torch.Tensor, G: torch.Tensor, h: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> Any:
    """By SciPy, one element after the other."""
    programs = zip(*(tensor.numpy() for tensor in (q, G, h, lower, upper)), strict=True)
    return np.array([linprog(c, A, b, bounds=np.stack([low, high], 1)).x for c, A, b, low, high in programs])


def test_a_variable_whose_only_coefficient_is_rounding_in_its_row() -> None:
    """Its unit is that of its cost: 1e-9 for each of 1e14, a tenth of the objective, pushes it to its lower end."""
    A = np.array([[-0.73, 0.0, 0.0, 0.0, 1.69], [-0.25, -0.012, -0.024, 0.0, -1.08]])
    x, y, s = np.array([-0.28, -0.072, 0.44, -0.14, 0.81]), np.array([0.64, 0.0]), np.array([0.0, 1.15])
    z = np.array([0.61, -1.06, 0.60, 0.40, 0.0])
    lower = np.array([-np.inf, x[1], -np.inf, -np.inf, -np.inf])
    upper = np.array([x[0], np.inf, x[2], x[3], np.inf])
    unit, row = np.array([1.0, 1e-15, 1e-14, 1e-5, 10.0]), np.array([1e12, 1.0])
    data = {
        "q": 1e5 * unit * (-A.T @ y - z),
        "G": row[:, None] * A * unit,
        "h": row * (A @ x + s),
        "lb": lower / unit,
        "ub": upper / unit,
    }
    tensors = {name: torch.from_numpy(array) for name, array in data.items()}
    for solver in (None, lpgd.DAQP(), lpgd.HiGHS()):
        output = lpgd.solve_lp(tensors["q"], **{name: tensors[name] for name in ("G", "h", "lb", "ub")}, solver=solver)
        assert output.info.statuses == (Status.SOLVED,)
        np.testing.assert_allclose(output.x.numpy() * unit, x, atol=1e-8)
