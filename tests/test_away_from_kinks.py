"""Zeros of multipliers and slacks that are no kinks: other multipliers of the solution, or another x, have none."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from lpgd import LPGD, CvxpyLayer, ImplicitKKT
from lpgd.arrays import FloatArray
from lpgd.gradients import GradientMethod


def soft_ranks(scores: FloatArray, weights: FloatArray, unit: float) -> tuple[FloatArray, FloatArray]:
    """A doubly stochastic X for scores, stated in units of it, and the gradient of <weights, X>."""
    size = len(scores)
    Z, given, ranks = cp.Variable((size, size), nonneg=True), cp.Parameter(size), np.arange(size, 0, -1.0)
    X = unit * Z
    objective = given @ X @ ranks - 0.5 * cp.sum_squares(X @ ranks) - 0.01 * cp.sum_squares(X)
    problem = cp.Problem(cp.Maximize(objective), [cp.sum(X, axis=0) == 1, cp.sum(X, axis=1) == 1])
    values = torch.from_numpy(scores).requires_grad_()
    (found,) = CvxpyLayer(problem, [given], [Z])(values)
    (unit * found * torch.from_numpy(weights)).sum().backward()
    assert values.grad is not None
    return unit * found.detach().numpy(), values.grad.numpy()


def on_its_face(X: FloatArray, weights: FloatArray) -> FloatArray:
    """The gradient with the zeros of X held: every zero has a multiplier, for some choice of all of them."""
    size, free = len(X), X.ravel() > 1e-9
    ranks = np.kron(np.eye(size), np.arange(size, 0, -1.0))[:, free]
    rows = np.concatenate([np.kron(np.eye(size), np.ones(size)), np.kron(np.ones(size), np.eye(size))])[:, free]
    curved = ranks.T @ ranks + 0.02 * np.eye(int(free.sum()))
    system = np.block([[curved, rows.T], [rows, np.zeros((2 * size, 2 * size))]])
    moved = np.linalg.lstsq(system, np.r_[weights.ravel()[free], np.zeros(2 * size)], rcond=1e-12)[0]
    return ranks @ moved[: int(free.sum())]


@pytest.mark.parametrize(("size", "seed", "unit"), [(5, 10, 1e3), (6, 1, 1e-3), (6, 1, 1e3)])
@pytest.mark.filterwarnings("ignore::lpgd.LpgdWarning")  # a multiplier of 1e-8 is left, in these units
def test_zeros_that_other_multipliers_hold(size: int, seed: int, unit: float) -> None:
    """DAQP's vertex of the multipliers left zeros of X without one, and the gradient let go of them: 0.05 and 0.24."""
    random = np.random.default_rng(seed)
    scores = 3.0 * random.standard_normal(size)
    weights = random.standard_normal((size, size))
    X, gradient = soft_ranks(scores, weights, unit)
    np.testing.assert_allclose(gradient, on_its_face(X, weights), atol=1e-8)


@pytest.mark.filterwarnings("error::lpgd.LpgdWarning")
@pytest.mark.parametrize("method", [ImplicitKKT(), LPGD()], ids=str)
def test_multipliers_of_rows_whose_variables_are_zero(method: GradientMethod) -> None:
    """A one-class machine of points on all sides of the origin has w = 0: which of them hold it there is open.

    Nothing depends on it: ∂L/∂X = y dwᵀ + dy wᵀ is zero, as w stays where it is.
    """
    random = np.random.default_rng(0)
    w, offset, excess, X = cp.Variable(2), cp.Variable(), cp.Variable(8, nonneg=True), cp.Parameter((8, 2))
    objective = 0.5 * cp.sum_squares(w) - offset + cp.sum(excess) / 4.0
    layer = CvxpyLayer(cp.Problem(cp.Minimize(objective), [X @ w >= offset - excess]), [X], [w], gradient=method)
    ahead = random.standard_normal((3, 4, 2))
    points = torch.from_numpy(np.concatenate([ahead, -1.3 * ahead], axis=1)).requires_grad_()
    (found,) = layer(points)
    (found * torch.tensor([1.0, -2.0])).sum().backward()
    np.testing.assert_allclose(found.detach(), 0.0, atol=1e-12)
    assert points.grad is not None
    np.testing.assert_allclose(points.grad, 0.0, atol=1e-8)
