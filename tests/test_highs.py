"""HiGHS beyond the contract of every solver."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch

from lpgd import LPGD, HiGHS, LpgdWarning, LPLayer, QPLayer
from lpgd.solvers.backends.highs_model import Model
from lpgd.status import Status


def test_large_quadratic_programs_are_warned_about() -> None:
    n = 301
    layer = QPLayer(HiGHS(time_limit=1.0), on_error="nan")
    with pytest.warns(LpgdWarning, match=r"HiGHS solves quadratic programs cold.*301 variables"):
        layer(torch.eye(n).double(), torch.ones(n).double(), lb=0.0, ub=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPLayer(HiGHS())(torch.ones(n).double(), lb=0.0, ub=1.0)
        QPLayer(HiGHS())(torch.eye(9).double(), torch.ones(9).double(), lb=0.0, ub=1.0)


LARGE_COSTS = [
    # c, G and h of a program in the unit cube, the vertex of its relaxation, and its best binary point.
    (
        [-110933864.94767591, -100244151.0217232, -119270406.58849813, 66968175.24595986],
        [[2.0, -2.0, 3.0, 0.0], [2.0, 1.0, 1.0, -3.0]], [0.5, 0.5], [1.0, 1.0, 1 / 6, 8 / 9], [1.0, 1.0, 0.0, 1.0],
    ),
    (
        [20717178.767846305, 33090431.91819237, -93265298.7194323, -136404141.22897735],
        [[1.0, 0.0, -3.0, 4.0], [5.0, -3.0, 2.0, 0.0]], [-2.5, -0.5], [0.0, 5 / 6, 1.0, 0.125], [0.0, 1.0, 1.0, 0.0],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("c", "G", "h", "vertex", "best"), LARGE_COSTS)
def test_large_costs_are_no_numerical_error(c: Any, G: Any, h: Any, vertex: Any, best: Any) -> None:
    """HiGHS ends with kSolveError where costs of 1e8 make its dual tolerance finer than rounding."""
    costs, matrix, right = (torch.tensor(values, dtype=torch.float64) for values in (c, G, h))
    output = LPLayer(HiGHS())(costs, G=matrix, h=right, lb=0.0, ub=1.0)
    torch.testing.assert_close(output.x, costs.new_tensor(vertex), rtol=0, atol=1e-12)
    # Multipliers of rows that are tight, by the two columns between their bounds.
    inside = [place for place, value in enumerate(vertex) if 0 < value < 1]
    prices = torch.linalg.solve(matrix[:, inside].mT, -costs[inside])
    torch.testing.assert_close(output.z, prices, rtol=1e-12, atol=0)
    points = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    feasible = points[(points @ matrix.mT <= right).all(1)]
    assert feasible[(feasible @ costs).argmin()].tolist() == best
    integer = LPLayer(HiGHS(), integer=range(4), gradient=LPGD(tau=1.0))(costs, G=matrix, h=right, lb=0.0, ub=1.0)
    assert integer.x.tolist() == best


def test_a_vertex_that_cannot_be_left_is_not_started_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS 1.15.1 ends as kUnknown from some bases, of the relaxation of an integer program too, which no other
    solver takes over."""
    original, failed = Model.run, []

    def run(self: Any, time_limit: float | None) -> Status:
        if self.solver.getBasis().valid:
            failed.append(True)
            return Status.NUMERICAL_ERROR
        return original(self, time_limit)

    costs, matrix = torch.tensor([[-1.0, -2.0], [-2.0, -1.0]]).double(), torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double()
    layer = LPLayer(HiGHS(rescue=False), integer=range(2), gradient=LPGD(tau=1.0))
    first = layer.solve(costs, G=matrix, h=torch.tensor([2.5, 3.5]).double(), lb=0.0)
    monkeypatch.setattr(Model, "run", run)
    again = layer.solve(costs.flip(0), G=matrix, h=torch.tensor([2.5, 3.5]).double(), lb=0.0, warm_start=first)
    assert failed
    assert again.x.tolist() == [[1.0, 0.0], [0.0, 1.0]]
