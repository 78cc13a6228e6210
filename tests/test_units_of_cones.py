"""Solutions and gradients where variables are far larger, or smaller, than what stands in curved cones.

``min σ Σ φ(a_iᵀx + b_i) + ε |x|² + cᵀx  s.t.  G x ≤ h`` is made so that a given x is its solution.  With H the Hessian
there and the active rows of G, ``[H Gᵀ; G 0]`` is a small system, which is solved as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.status import Status

ROWS, VARIABLES, INEQUALITIES = 6, 5, 4


def exponential_shares(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max())
    return powers / powers.sum()


def shares_curvature(z: np.ndarray) -> np.ndarray:
    p = exponential_shares(z)
    return np.diag(p) - np.outer(p, p)


KINDS: dict[str, tuple[Callable[[cp.Expression], cp.Expression], Callable[..., np.ndarray], Callable[..., np.ndarray]]]
KINDS = {
    "cubes": (
        lambda z: cp.sum(cp.power(cp.abs(z), 3)),
        lambda z: 3 * z * np.abs(z),
        lambda z: np.diag(6 * np.abs(z)),
    ),
    "fourth powers": (lambda z: cp.sum(cp.power(z, 4)), lambda z: 4 * z**3, lambda z: np.diag(12 * z**2)),
    "hyperbolas": (
        lambda z: cp.sum(cp.norm(cp.vstack([z, np.ones(ROWS)]), 2, axis=0)),
        lambda z: z / np.sqrt(1 + z**2),
        lambda z: np.diag((1 + z**2) ** -1.5),
    ),
    "log-sum-exp": (cp.log_sum_exp, exponential_shares, shares_curvature),
}
FAR: dict[str, Callable[[cp.Variable], list[cp.Constraint]]] = {
    "nothing": lambda x: [],
    "ball": lambda x: [cp.norm(x) <= 1e4],
    "box": lambda x: [x <= 1e4, x >= -1e4],
    "magnitudes": lambda x: [cp.norm1(x) <= 1e4],
}


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize(
    ("kind", "unit", "cost"),
    [
        ("cubes", 1e3, 1.0),
        ("cubes", 1e3, 1e4),
        ("log-sum-exp", 1e3, 1.0),
        ("fourth powers", 1.0, 1e-4),
        ("hyperbolas", 1e-4, 1e-4),
    ],
)
def test_variables_of_other_sizes_than_cones(kind: str, unit: float, cost: float, far: str) -> None:
    function, slope, curvature = KINDS[kind]
    generator = np.random.default_rng(100)
    A, b = generator.standard_normal((ROWS, VARIABLES)) / unit, 0.3 * generator.standard_normal(ROWS)
    at = 0.3 * unit * generator.standard_normal(VARIABLES)
    G = generator.standard_normal((INEQUALITIES, VARIABLES))
    active = generator.random(INEQUALITIES) < 0.4
    forces = np.where(active, generator.uniform(0.3, 2.0, INEQUALITIES), 0.0) * cost / unit
    limits = G @ at + np.where(active, 0.0, generator.uniform(0.3, 2.0, INEQUALITIES) * unit)
    ridge = 0.0 if kind == "fourth powers" else cost / unit**2
    costs = -(cost * A.T @ slope(A @ at + b) + 2 * ridge * at) - G.T @ forces

    x, c, h = cp.Variable(VARIABLES), cp.Parameter(VARIABLES), cp.Parameter(INEQUALITIES)
    objective = cost * function(A @ x + b) + c @ x + (ridge * cp.sum_squares(x) if ridge else 0.0)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(objective), [G @ x <= h, *FAR[far](x)]), [c, h], [x])
    given = [torch.tensor(values, requires_grad=True) for values in (costs, limits)]
    weights = generator.standard_normal(VARIABLES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("default", "CLARABEL left")  # who solves it in the end is no matter here
        output = layer(*given)
        (output[0] @ torch.tensor(weights)).backward()
    assert output.info.statuses == (Status.SOLVED,)
    np.testing.assert_allclose(output[0].detach().numpy(), at, rtol=0, atol=1e-9 * unit)

    z = A @ at + b
    H = cost * A.T @ curvature(z) @ A + 2 * ridge * np.eye(VARIABLES)
    rows = G[active]
    system = np.block([[H, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
    answer = np.linalg.solve(system, np.concatenate([weights, np.zeros(len(rows))]))
    wanted = -answer[:VARIABLES], np.zeros(INEQUALITIES)
    wanted[1][active] = answer[VARIABLES:]
    for tensor, expected in zip(given, wanted, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("unit", [1e2, 1e3])
def test_a_curved_constraint_of_large_variables(unit: float, far: str) -> None:
    """``min |x|² / u² + cᵀx  s.t.  G x ≤ h, log Σ exp(A x + b) ≤ l``, which is active with a multiplier μ.

    The Hessian is that of the objective and μ times that of the constraint, whose slope is one more active row.
    """
    generator = np.random.default_rng(100)
    A, b = generator.standard_normal((ROWS, VARIABLES)) / unit, 0.3 * generator.standard_normal(ROWS)
    at = 0.3 * unit * generator.standard_normal(VARIABLES)
    G = generator.standard_normal((INEQUALITIES, VARIABLES))
    active = generator.random(INEQUALITIES) < 0.4
    forces = np.where(active, generator.uniform(0.3, 2.0, INEQUALITIES), 0.0) / unit
    force = generator.uniform(0.3, 2.0)
    room = generator.uniform(0.3, 2.0, INEQUALITIES) * unit
    z = A @ at + b
    slope = A.T @ exponential_shares(z)

    x, c, h, limit = cp.Variable(VARIABLES), cp.Parameter(VARIABLES), cp.Parameter(INEQUALITIES), cp.Parameter()
    constraints = [G @ x <= h, cp.log_sum_exp(A @ x + b) <= limit, *FAR[far](x)]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) / unit**2 + c @ x), constraints)
    layer = lpgd.CvxpyLayer(problem, [c, h, limit], [x])
    costs = -force * slope - 2 * at / unit**2 - G.T @ forces
    data = costs, G @ at + np.where(active, 0.0, room), np.logaddexp.reduce(z)
    given = [torch.tensor(values, requires_grad=True) for values in data]
    weights = generator.standard_normal(VARIABLES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = layer(*given)
        (output[0] @ torch.tensor(weights)).backward()
    assert output.info.statuses == (Status.SOLVED,)
    np.testing.assert_allclose(output[0].detach().numpy(), at, rtol=0, atol=1e-9 * unit)

    H = force * A.T @ shares_curvature(z) @ A + 2 / unit**2 * np.eye(VARIABLES)
    rows = np.vstack([G[active], slope])
    system = np.block([[H, rows.T], [rows, np.zeros((len(rows), len(rows)))]])
    answer = np.linalg.solve(system, np.concatenate([weights, np.zeros(len(rows))]))
    wanted = -answer[:VARIABLES], np.zeros(INEQUALITIES), answer[-1]
    wanted[1][active] = answer[VARIABLES:-1]
    for tensor, expected in zip(given, wanted, strict=True):
        assert tensor.grad is not None
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())
