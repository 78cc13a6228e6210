"""Quadratic programs without inequalities: one linear system, whatever the solver."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import mpmath
import numpy as np
import pytest
import torch

import lpgd
from lpgd import CvxpyLayer, ImplicitKKT
from lpgd.status import Status

STAGES, KNOTS = 40, [0, 13, 26, 39]


def least_snap() -> tuple[cp.Problem, cp.Parameter, cp.Variable]:
    """The trajectory through four points whose fourth differences are the least."""
    path, points = cp.Variable((2, STAGES)), cp.Parameter((2, len(KNOTS)))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(cp.diff(path, 4, axis=1))), [path[:, KNOTS] == points])
    return problem, points, path


def paths_of_unit_points() -> np.ndarray[Any, Any]:
    """(4, STAGES) what each knot contributes, to 40 digits."""
    mpmath.mp.dps = 40
    differences = np.diff(np.eye(STAGES), 4, axis=0)
    size = STAGES + len(KNOTS)
    system = np.zeros((size, size))
    system[:STAGES, :STAGES] = differences.T @ differences
    for row, knot in enumerate(KNOTS):
        system[STAGES + row, knot] = system[knot, STAGES + row] = 1.0
    right = np.eye(size)[:, STAGES:]
    inverse = mpmath.inverse(mpmath.matrix(system.tolist()))
    return np.array((inverse * mpmath.matrix(right.tolist())).tolist(), dtype=float)[:STAGES].T


@pytest.mark.filterwarnings("error::lpgd.LpgdWarning")
@pytest.mark.parametrize("solver", [None, "DAQP", "PIQP", "CLARABEL", "OSQP", "INTERIOR"])
def test_least_snap_is_exact_and_no_solver_is_left_with_it(solver: str | None) -> None:
    """DAQP left such elements to other solvers, with a warning, at fifteen times the time."""
    problem, points, path = least_snap()
    layer = CvxpyLayer(problem, [points], [path], solver=solver)
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 2, 4))).requires_grad_()
    output = layer(values)
    units = paths_of_unit_points()
    expected = values.detach().numpy() @ units
    np.testing.assert_allclose(output[0].detach(), expected, atol=1e-11 * np.abs(expected).max())
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 2, STAGES)))
    (output[0] * weights).sum().backward()
    slopes = weights.numpy() @ units.T
    assert values.grad is not None
    np.testing.assert_allclose(values.grad, slopes, atol=1e-10 * np.abs(slopes).max())
    assert output.info.solution.rescued == {}
    assert output.info.solution.iterations.sum() == 0


def with_parameters() -> CvxpyLayer:
    """Least |A x|² with c·x = b: of a singular A there are many solutions, and of c = 0 none."""
    x, A, c, b = cp.Variable(3), cp.Parameter((2, 3)), cp.Parameter(3), cp.Parameter()
    residual = cp.Variable(2)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(residual) + x[0]), [residual == A @ x, c @ x == b, x[2] == 1.0])
    return CvxpyLayer(problem, [A, c, b], [x], on_error="nan", eliminate=False)


def test_elements_that_are_none_of_it_are_left_to_the_solver() -> None:
    A = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 2.0]], dtype=torch.float64).repeat(4, 1, 1)
    c, b = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64).repeat(4, 1), torch.ones(4, dtype=torch.float64)
    c[1] = torch.tensor([0.0, 0.0, 1.0])  # x₂ = 1 and x₂ = 2
    b[1] = 2.0
    A[2] = torch.nan
    A[3] = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 2.0]])  # x₀ as small as one likes
    output = with_parameters()(A, c, b)
    assert list(output.info.statuses) == [
        Status.SOLVED, Status.INFEASIBLE, Status.INVALID_DATA, Status.UNBOUNDED,
    ]  # fmt: skip
    # x = (t, -t, 1): |A x|² + t is least where 2 (a·(A x)) + 1 = 0 with a = A (1, -1, 0).
    along, start = A[0, :, 0] - A[0, :, 1], A[0, :, 2]
    t = -(0.5 + float(along @ start)) / float(along @ along)
    torch.testing.assert_close(output[0][0], torch.tensor([t, -t, 1.0], dtype=torch.float64), rtol=0, atol=1e-13)
    alone = with_parameters()(A[:1], c[:1], b[:1])
    assert torch.equal(alone[0][0], output[0][0])


def test_where_solutions_are_many_one_is_found() -> None:
    """|x₀ + x₁|² has a line of solutions; the gradient says so."""
    x, a = cp.Variable(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.square(x[0] + x[1] - a) + cp.square(x[2])), [x[2] == a])
    value = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    output = CvxpyLayer(problem, [a], [x], gradient=ImplicitKKT())(value)
    torch.testing.assert_close(output[0][:, :2].sum(-1), value, rtol=0, atol=1e-9)
    with pytest.warns(lpgd.LpgdWarning, match="not unique"):
        output[0][:, 0].sum().backward()
