"""Equalities that contradict each other by rounding alone, as marginals of a plan do in float32."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

from lpgd import LPGD, CvxpyLayer, ImplicitKKT, LPLayer, QPLayer
from lpgd.gradients import GradientMethod
from lpgd.status import Status

pytestmark = pytest.mark.filterwarnings("error::lpgd.LpgdWarning")
SIZE = 5


def sums() -> Tensor:
    """The matrix of row and column sums of a plan, of which one follows from the others."""
    rows, ones = np.eye(SIZE), np.ones((1, SIZE))
    return torch.from_numpy(np.concatenate([np.kron(rows, ones), np.kron(ones, rows)]))


def marginals(count: int) -> tuple[Tensor, Tensor]:
    """Of ``count`` plans, in float32, whose sums differ in the last digits."""
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.rand(count, SIZE, generator=generator) + 0.1 for _ in range(2)]
    first, second = (one / one.sum(-1, keepdim=True) for one in pairs)
    assert bool((first.double().sum(-1) != second.double().sum(-1)).all())
    return first, second


@pytest.mark.parametrize("method", [ImplicitKKT(), LPGD()], ids=str)
@pytest.mark.parametrize("solver", [None, "PIQP", "OSQP", "CLARABEL"])
def test_plans_between_marginals_in_single_precision(solver: str | None, method: GradientMethod) -> None:
    """The solver that is asked answers, with no word, and the gradient with respect to costs is that of double ones."""
    costs = torch.rand(6, SIZE * SIZE, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(6, SIZE * SIZE, generator=torch.Generator().manual_seed(2)).double()
    first, second = marginals(6)
    layer, P = QPLayer(solver, gradient=method), 0.3 * torch.eye(SIZE * SIZE, dtype=torch.float64)
    exact = (
        first.double() / first.double().sum(-1, keepdim=True),
        second.double() / second.double().sum(-1, keepdim=True),
    )
    found, gradients = [], []
    for one, other in ((first.double(), second.double()), exact):
        q = costs.double().requires_grad_()
        output = layer(P, q, A=sums(), b=torch.cat([one, other], -1), lb=0.0)
        assert set(output.info.solution.solvers) == {output.info.solution.asked}
        (output.x * weights).sum().backward()
        found.append(output.x.detach())
        assert q.grad is not None
        gradients.append(q.grad)
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[0] @ sums().mT, torch.cat([first, second], -1).double(), rtol=0, atol=2e-7)


def test_a_layer_in_single_precision() -> None:
    plan, row, column = cp.Variable((SIZE, SIZE), nonneg=True), cp.Parameter(SIZE), cp.Parameter(SIZE)
    cost = np.abs(np.subtract.outer(np.arange(SIZE), np.arange(SIZE)))
    constraints = [cp.sum(plan, axis=1) == row, cp.sum(plan, axis=0) == column]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(cost, plan)) + 0.1 * cp.sum_squares(plan)), constraints)
    first, second = marginals(8)
    (found,) = CvxpyLayer(problem, [row, column], [plan])(first, second)
    torch.testing.assert_close(found.sum(-1), first, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sum(-2), second, rtol=0, atol=1e-6)


def test_what_contradicts_itself_by_more_stays_infeasible() -> None:
    first, second = (marginal.double() for marginal in marginals(3))
    first = first / first.sum(-1, keepdim=True)
    second = second / second.sum(-1, keepdim=True) * torch.tensor([[1.0], [1.0 + 1e-4], [1.0 + 1e-7]]).double()
    costs = torch.rand(3, SIZE * SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = LPLayer("DAQP", on_error="nan")(costs, A=sums(), b=torch.cat([first, second], -1), lb=0.0)
    assert list(output.info.statuses) == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED]
