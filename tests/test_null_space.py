"""DAQP on linear programs and projections in coordinates of the null space of their equalities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from lpgd import DAQP, Clarabel, Status
from lpgd.problems import ConicProblem
from lpgd.solvers.backends import null_space
from tests.test_interior_point import program

SIZE, ROWS, COLUMNS = 7, 30, 48


def programs(seed: int, curvature: float = 0.0, *, free: bool = False, scale: float = 1.0) -> ConicProblem:
    rng = np.random.default_rng(seed)
    A, costs = scale * rng.random((ROWS, COLUMNS)), rng.standard_normal((SIZE, COLUMNS))
    lower, upper = np.zeros((SIZE, COLUMNS)), np.ones((SIZE, COLUMNS))
    if free:
        lower[:, ::5], upper[:, 1::5] = -np.inf, np.inf
    b = rng.uniform(0.2, 0.8, (SIZE, COLUMNS)) @ A.T
    P = curvature * np.eye(COLUMNS) if curvature else None
    problem = program(costs, A, b, P, equalities=ROWS, lower=lower, upper=upper)
    if curvature:  # a pattern with the diagonal alone, as augmented programs have
        plain = program(costs, A, b, None, equalities=ROWS, lower=lower, upper=upper)
        problem = plain.augment(curvature, torch.zeros(SIZE, COLUMNS).double())
    return problem


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the batches that are solved in fewer variables."""
    sizes: list[int] = []
    solve = null_space._reduced

    def recorded(problem, *arguments):  # type: ignore[no-untyped-def]
        sizes.append(problem.batch_size)
        return solve(problem, *arguments)

    monkeypatch.setattr(null_space, "_reduced", recorded)
    return sizes


@pytest.mark.parametrize("free", [False, True])
def test_linear_programs_are_those_of_highs(reduced: list[int], free: bool) -> None:
    problem = programs(0, free=free)
    solution = DAQP().solve(problem)
    assert reduced == [SIZE]
    A, data = problem.structure.constraint.to_dense(problem.data.A).numpy(), problem.data
    lower, upper = (bound.numpy() for bound in problem.full_bounds())
    for element, status in enumerate(solution.statuses):
        ends = [
            (None if np.isinf(low) else low, None if np.isinf(up) else up)
            for low, up in zip(lower[element], upper[element], strict=True)
        ]
        exact = linprog(data.q[element].numpy(), A_eq=A, b_eq=data.b[element].numpy(), bounds=ends, method="highs")
        assert status is (Status.SOLVED if exact.status == 0 else Status.UNBOUNDED)
        if exact.status == 0:
            assert data.q[element].numpy() @ solution.x[element].numpy() == pytest.approx(exact.fun, abs=1e-9)
    solved = torch.tensor([status is Status.SOLVED for status in solution.statuses])
    assert float(solution.residuals.worst[solved].max()) < 1e-11


def test_projections_are_those_of_clarabel(reduced: list[int]) -> None:
    problem = programs(1, 0.3)
    solution, other = DAQP().solve(problem), Clarabel(tolerance=1e-12).solve(problem)
    assert reduced == [SIZE]
    torch.testing.assert_close(solution.x, other.x, atol=1e-8, rtol=0)
    torch.testing.assert_close(solution.y, other.y, atol=1e-7, rtol=0)
    torch.testing.assert_close(solution.z, other.z, atol=1e-7, rtol=0)
    assert float(solution.residuals.worst.max()) < 1e-12


def test_warm_starts_and_single_elements_change_no_bit(reduced: list[int]) -> None:
    problem = programs(2)
    solution = DAQP().solve(problem)
    moved = problem.augment(0.5, solution.x)
    again = DAQP().solve(moved, solution.states)
    for element in range(SIZE):
        index = torch.tensor([element])
        alone = DAQP().solve(problem.select(index))
        alone_again = DAQP().solve(moved.select(index), alone.states)
        for name in ("x", "y", "z"):
            assert torch.equal(getattr(alone, name)[0], getattr(solution, name)[element])
            assert torch.equal(getattr(alone_again, name)[0], getattr(again, name)[element])
    assert reduced == [SIZE, SIZE, *[1] * (2 * SIZE)]


def test_elements_without_a_solution_are_said_by_the_program_itself() -> None:
    problem = programs(3)
    b = problem.data.b.clone()
    b[2] = b[2] + 1e3
    expected = [Status.SOLVED] * SIZE
    expected[2] = Status.INFEASIBLE
    assert DAQP().solve(replace(problem, data=problem.data._replace(b=b))).statuses == tuple(expected)


def test_rows_that_depend_on_each_other_stay(reduced: list[int]) -> None:
    problem = programs(4)
    A = problem.structure.constraint.to_dense(problem.data.A).clone()
    b = problem.data.b.clone()
    A[-1], b[:, -1] = A[0] + A[1], b[:, 0] + b[:, 1]
    data = problem.data._replace(A=problem.structure.constraint.gather(A), b=b)
    solution = DAQP().solve(replace(problem, data=data))
    assert not reduced
    assert solution.statuses == (Status.SOLVED,) * SIZE


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_other_units(reduced: list[int], scale: float) -> None:
    plain, scaled = DAQP().solve(programs(5)), DAQP().solve(programs(5, scale=scale))
    assert reduced == [SIZE, SIZE]
    torch.testing.assert_close(plain.x, scaled.x, atol=1e-9, rtol=0)
    torch.testing.assert_close(plain.y, scale * scaled.y, atol=1e-9, rtol=1e-9)
