"""One factor for a batch with a shared matrix: conjugate gradients within the batched interior-point method."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize
import torch

from lpgd import DAQP, LPGD, CvxpyLayer, InteriorPoint, Status
from lpgd.solvers.interior_point import newton_system
from lpgd.solvers.interior_point import solver as interior_point_solver
from lpgd.solvers.interior_point.box_program import BoxProgram
from lpgd.solvers.interior_point.shared_factor import SharedSolver
from tests.test_interior_point import program

SIZE, ROWS, COLUMNS = 20, 110, 240


def equality_lp(seed: int, share: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Costs (B, n), of which a share is not zero, a shared A, b and upper bounds."""
    rng = np.random.default_rng(seed)
    A, costs = rng.random((ROWS, COLUMNS)), rng.standard_normal((SIZE, COLUMNS))
    costs[rng.random((SIZE, COLUMNS)) >= share] = 0.0
    upper = np.ones((SIZE, COLUMNS))
    return costs, A, (0.5 * upper) @ A.T, upper


@pytest.fixture
def solvers(monkeypatch: pytest.MonkeyPatch) -> list[SharedSolver]:
    """Every shared solver that is made."""
    made: list[SharedSolver] = []

    class Recorded(SharedSolver):
        def __init__(self, program: BoxProgram, diagonal: torch.Tensor, near_identity: bool = False) -> None:
            super().__init__(program, diagonal, near_identity)
            made.append(self)

    monkeypatch.setattr(newton_system, "SharedSolver", Recorded)
    return made


@pytest.mark.parametrize("share", [0.005, 1.0])
def test_linear_programs_have_the_optimal_value_of_highs(solvers: list[SharedSolver], share: float) -> None:
    # With few costs the solution is inside of a face, and the matrices stay alike; at vertices they do not.
    costs, A, b, upper = equality_lp(0, share)
    lower = np.zeros_like(upper)
    solution = InteriorPoint().solve(program(costs, A, b, equalities=ROWS, lower=lower, upper=upper))
    assert solution.statuses == (Status.SOLVED,) * SIZE
    assert not solvers[0].lost
    assert any(solver.lost for solver in solvers) == (share == 1.0)
    for element in range(SIZE):
        bounds = list(zip(lower[element], upper[element], strict=True))
        exact = scipy.optimize.linprog(costs[element], A_eq=A, b_eq=b[element], bounds=bounds, method="highs")
        x = solution.x[element].numpy()
        assert costs[element] @ x == pytest.approx(exact.fun, rel=1e-7, abs=1e-8 * np.abs(costs[element]).sum())
        assert np.abs(A @ x - b[element]).max() <= 1e-7 * np.abs(b[element]).max()


def test_quadratic_programs_from_an_active_set_are_those_of_daqp(solvers: list[SharedSolver]) -> None:
    costs, A, b, upper = equality_lp(1)
    linear = program(costs, A, b, equalities=ROWS, lower=np.zeros_like(upper), upper=upper)
    problem = linear.augment(3.0, torch.full((SIZE, COLUMNS), 0.5).double())
    first = InteriorPoint().solve(problem)
    moved = replace(problem, data=problem.data._replace(q=problem.data.q + 0.01))
    solvers.clear()
    again, exact = InteriorPoint().solve(moved, first.states), DAQP().solve(moved)
    assert not solvers[0].lost
    torch.testing.assert_close(again.x, exact.x, atol=1e-8, rtol=1e-8)


def test_gradients_of_a_training_step_are_those_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, A, _, _ = equality_lp(2)
    x = cp.Variable(COLUMNS)
    matrix, right, cost = cp.Parameter((ROWS, COLUMNS)), cp.Parameter(ROWS), cp.Parameter(COLUMNS)
    problem = cp.Problem(cp.Minimize(cost @ x), [matrix @ x == right, x >= 0, x <= 1])
    layer = CvxpyLayer(problem, [matrix, right, cost], [x], solver="INTERIOR", gradient=LPGD(0.1, 0.1))
    weights = torch.from_numpy(np.random.default_rng(3).standard_normal((SIZE, COLUMNS)))
    found = []
    for batch in (newton_system.SHARED_BATCH, SIZE + 1):  # from more elements than there are: never
        monkeypatch.setattr(newton_system, "SHARED_BATCH", batch)
        leaves = [torch.from_numpy(value).requires_grad_() for value in (A, 0.5 * A.sum(1), costs)]
        (answer,) = layer(*leaves)
        found.append(torch.autograd.grad((weights * answer).sum(), leaves))
    for shared, alone in zip(*found, strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-5 * float(alone.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_depend_on_the_batch_alone_and_are_not_small(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    # One element a chunk was seven times as slow: elements share products of A, and one factor.
    sizes: list[list[int]] = []

    def run_tasks(function: Any, tasks: Any, executor: Any) -> Any:
        sizes.append([task.program.size for task in tasks])
        return tasks_run(function, tasks, executor)

    tasks_run = interior_point_solver.run_tasks
    monkeypatch.setattr(interior_point_solver, "run_tasks", run_tasks)
    costs, A, b, upper = (np.concatenate([values] * 4) if len(values) == SIZE else values for values in equality_lp(4))
    problem = program(costs, A, b, equalities=ROWS, lower=np.zeros_like(upper), upper=upper)
    with ThreadPoolExecutor(threads) as executor:
        assert InteriorPoint().solve(problem, executor=executor).statuses == (Status.SOLVED,) * (4 * SIZE)
    assert sizes[0] == [40, 40]
