"""Functions of the entries of symmetric matrices, stated once for each pair: the same answers, unique multipliers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.layers.cvxpy.canonical import canonicalise
from lpgd.layers.cvxpy.restated import with_single_halves

N = 5
TIGHT = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}


def _covariance(seed: int) -> np.ndarray:
    samples = np.random.default_rng(seed).standard_normal((3 * N, N))
    return samples.T @ samples / (3 * N)


def _penalised(X: cp.Variable, S: cp.Parameter) -> cp.Problem:
    return cp.Problem(cp.Minimize(-cp.log_det(X) + cp.trace(S @ X) + 0.1 * cp.sum(cp.abs(X))))


def _bounded(X: cp.Variable, S: cp.Parameter) -> cp.Problem:
    bound: Any = cp.norm1(X) <= 7.0
    return cp.Problem(cp.Maximize(cp.log_det(X) - cp.trace(S @ X)), [bound])


def _weighted(X: cp.Variable, S: cp.Parameter) -> cp.Problem:
    weights = np.arange(1.0, 1.0 + N**2).reshape(N, N) / N**2  # not symmetric
    loss = cp.sum(cp.multiply(weights, cp.huber(X - np.eye(N), 1))) + cp.sum(cp.maximum(X, -X + np.eye(N), 0.2))
    ball: Any = cp.sum(cp.power(X, 2)) <= 4.0
    return cp.Problem(cp.Minimize(loss + cp.trace(S @ X)), [ball])


@pytest.mark.parametrize("build", [_penalised, _bounded, _weighted])
def test_values_multipliers_and_gradients_are_those_of_cvxpy(
    build: Callable[[cp.Variable, cp.Parameter], cp.Problem],
) -> None:
    X, S = cp.Variable((N, N), PSD=True), cp.Parameter((N, N), symmetric=True)
    problem: Any = build(X, S)
    duals = [constraint.dual_variables[0] for constraint in problem.constraints]
    layer = lpgd.CvxpyLayer(problem, parameters=[S], variables=[X, *duals])
    value = torch.from_numpy(_covariance(0)).requires_grad_()
    weights = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    outputs = layer(value)
    (weights * outputs[0]).sum().backward()

    S.value = _covariance(0)
    best = float(problem.solve(solver="CLARABEL", **TIGHT))
    better = -1.0 if isinstance(problem.objective, cp.Maximize) else 1.0
    for output, expected in zip(outputs, (X.value, *(dual.value for dual in duals)), strict=True):
        torch.testing.assert_close(output.detach(), torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)
    X.value = outputs[0].detach().numpy()  # Clarabel's is 6e-6 off, ours is no worse by the objective
    assert all(float(constraint.violation()) < 1e-10 for constraint in problem.constraints)
    assert float(problem.objective.value) * better <= best * better + 1e-9

    def loss(matrix: torch.Tensor) -> float:  # Clarabel's X is not accurate enough for differences
        return float((weights * layer(matrix)[0]).sum())

    direction = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction = direction + direction.T
    step = 1e-5 * direction
    difference = (loss(value.detach() + step) - loss(value.detach() - step)) / 2e-5
    assert value.grad is not None
    assert float((value.grad * direction).sum()) == pytest.approx(difference, rel=1e-6)


def test_a_pair_of_entries_is_stated_once() -> None:
    X, S = cp.Variable((N, N), PSD=True), cp.Parameter((N, N), symmetric=True)
    trace: Any = cp.trace(X) == 1
    problem = cp.Problem(cp.Minimize(cp.trace(S @ X) + cp.sum(cp.abs(X))), [trace])

    program = canonicalise(problem, [S], [X])

    assert program.cones.nonnegative == 2 * (N * (N + 1) // 2)


def test_what_is_not_symmetric_for_every_value_stays_as_it_is() -> None:
    X, Y = cp.Variable((N, N), symmetric=True), cp.Variable((N, N))
    S = cp.Parameter((N, N), symmetric=True)
    for matrix in (X @ np.diag(np.arange(N)), X + Y, X - S, cp.multiply(np.arange(N), X), X - np.triu(np.ones((N, N)))):
        problem = cp.Problem(cp.Minimize(cp.sum(cp.abs(matrix))))
        assert with_single_halves(problem) is problem
