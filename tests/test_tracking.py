"""Quadratic forms of expressions with parameters, ``quad_form(x - c, P)``, as in every controller that tracks."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import pytest
import torch

import lpgd

N = 3
ROOT = torch.tensor([[1.0, 0.2, 0.0], [0.0, 1.5, -0.3], [0.4, 0.0, 0.8]], dtype=torch.float64)
P = ROOT @ ROOT.T
TARGET = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]], dtype=torch.float64)
COST = torch.tensor([0.5, 1.0, -0.7], dtype=torch.float64)
TWO = torch.tensor(2.0, dtype=torch.float64)
WEIGHTS = torch.tensor([[1.0, -0.5, 2.0], [0.3, 1.0, 0.2]], dtype=torch.float64)


@pytest.mark.parametrize("sense", [cp.Minimize, cp.Maximize])
@pytest.mark.parametrize("which", ["target", "target and matrix", "target and weight"])
def test_deviations_from_a_parameter(which: str, sense: type) -> None:
    x, c, q = cp.Variable(N), cp.Parameter(N), cp.Parameter(N)
    matrix = cp.Parameter((N, N), PSD=True) if which == "target and matrix" else P.numpy()
    weight = cp.Parameter(nonneg=True) if which == "target and weight" else 2.0
    objective = weight * cp.quad_form(x - c, matrix) + q @ x
    problem = cp.Problem(sense(objective if sense is cp.Minimize else -objective))
    parameters = [one for one in (c, q, matrix, weight) if isinstance(one, cp.Parameter)]
    tensors = [TARGET, COST, *([P] if "matrix" in which else []), *([TWO] if "weight" in which else [])]
    given, exact = ([tensor.clone().requires_grad_() for tensor in tensors] for _ in range(2))
    (found,) = lpgd.CvxpyLayer(problem, parameters, [x])(*given)
    of_P = 0.5 * (exact[2] + exact[2].mT) if "matrix" in which else P
    expected = exact[0] - torch.linalg.solve(of_P, exact[1]) / (2 * (exact[2] if "weight" in which else TWO))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (WEIGHTS * found).sum().backward()
    (WEIGHTS * expected).sum().backward()
    for mine, right in zip(given, exact, strict=True):
        torch.testing.assert_close(mine.grad, right.grad, rtol=0, atol=1e-11)


def test_rows_may_define_the_arguments_of_forms_in_any_order() -> None:
    a, b, x, q = cp.Variable(N), cp.Variable(N), cp.Variable(N), cp.Parameter(N)
    F, G = ROOT, ROOT.mT + 0.5
    objective = cp.Minimize(cp.quad_form(a, P.numpy()) + cp.quad_form(b, P.numpy()))
    problem = cp.Problem(objective, [b == F.numpy() @ x - 1, a == G.numpy() @ x - q])
    given, exact = TARGET.clone().requires_grad_(), TARGET.clone().requires_grad_()
    (found,) = lpgd.CvxpyLayer(problem, [q], [x])(given)
    H, ones = F.mT @ P @ F + G.mT @ P @ G, torch.ones(N, dtype=torch.float64)
    expected = torch.linalg.solve(H, (F.mT @ P @ ones + exact @ (G.mT @ P).mT).mT).mT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (WEIGHTS * found).sum().backward()
    (WEIGHTS * expected).sum().backward()
    torch.testing.assert_close(given.grad, exact.grad, rtol=0, atol=1e-11)


def test_a_controller_that_tracks_agrees_with_cvxpy() -> None:
    steps, gain = 5, P.numpy()
    state, action, start, path = (
        cp.Variable((steps + 1, N)),
        cp.Variable(steps),
        cp.Parameter(N),
        cp.Parameter((steps, N)),
    )
    push = ROOT[:, 0].numpy()
    cost = sum(cp.quad_form(state[t + 1] - path[t], gain) + 0.1 * cp.square(action[t]) for t in range(steps))
    rows: list[Any] = [state[0] == start, cp.abs(action) <= 0.5]
    rows += [state[t + 1] == 0.9 * state[t] + push * action[t] for t in range(steps)]
    problem = cp.Problem(cp.Minimize(cost), rows)
    layer = lpgd.CvxpyLayer(problem, [start, path], [action])
    at, along = TARGET[0], torch.linspace(-1, 1, steps * N, dtype=torch.float64).view(steps, N)
    (found,) = layer(at, along)
    start.value, path.value = at.numpy(), along.numpy()
    squares = sum(cp.sum_squares(ROOT.numpy().T @ (state[t + 1] - path[t])) for t in range(steps))
    problem = cp.Problem(cp.Minimize(squares + 0.1 * cp.sum_squares(action)), rows)
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    torch.testing.assert_close(found, torch.as_tensor(action.value), rtol=0, atol=1e-7)
    lpgd.gradcheck(layer, [at, along])
