"""Quadratic programs with a diagonal P and few rows, full ones: projections, factor models of hundreds of variables."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import pytest
import torch

import lpgd
from lpgd.solvers.kkt.reduced import is_dense

N, ROWS, BATCH = 320, 7, 3


def _data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(BATCH, N, dtype=torch.float64, generator=generator)
    diagonal = 0.5 + torch.rand(BATCH, N, dtype=torch.float64, generator=generator)
    A = torch.randn(BATCH, ROWS, N, dtype=torch.float64, generator=generator)
    inside = torch.rand(BATCH, N, 1, dtype=torch.float64, generator=generator)
    return diagonal, -y, A, (A @ inside)[..., 0]


def _by_active_set(
    diagonal: torch.Tensor, q: torch.Tensor, A: torch.Tensor, b: torch.Tensor, free: torch.Tensor
) -> torch.Tensor:
    """The minimiser of ``½ xᵀ diag(d) x + qᵀx`` with ``A x = b``, zero where it is not free."""
    weight = free / diagonal
    gram = (A * weight[:, None]) @ A.mT
    multipliers = torch.linalg.solve(gram, -b - (A @ (weight * q)[..., None])[..., 0])
    return -weight * (q + (A.mT @ multipliers[..., None])[..., 0])


@pytest.mark.parametrize("solver", ["PIQP", "DAQP", "INTERIOR", "CLARABEL", "OSQP"])
def test_solutions_and_gradients_are_those_of_the_active_set(solver: str) -> None:
    root, q, A, b = leaves = [datum.requires_grad_() for datum in _data()]
    x, *parameters = cp.Variable(N), cp.Parameter(N), cp.Parameter(N), cp.Parameter((ROWS, N)), cp.Parameter(ROWS)
    rows: list[Any] = [parameters[2] @ x == parameters[3], x >= 0]
    objective = 0.5 * cp.sum_squares(cp.multiply(parameters[0], x)) + parameters[1] @ x
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(objective), rows), parameters, [x], solver=solver)
    assert not is_dense(layer.structure)
    (found,) = layer(*leaves)
    expected = _by_active_set(root.square(), q, A, b, (found.detach() > 1e-9).double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weights = torch.linspace(-1, 1, BATCH * N, dtype=torch.float64).view(BATCH, N)
    gradients = torch.autograd.grad((weights * found).sum(), leaves)
    right = torch.autograd.grad((weights * expected).sum(), leaves)
    for one, other in zip(gradients, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
