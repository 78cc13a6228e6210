"""Newton's method on the dual of a projection, within the batched interior-point method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lpgd import DAQP, InteriorPoint, Status
from lpgd.problems import ConicProblem
from lpgd.solvers.interior_point import predictor_corrector, projection
from lpgd.solvers.interior_point.box_program import Scaling
from lpgd.solvers.interior_point.projection import is_projection, near_active_sets
from tests.test_interior_point import program

SIZE, ROWS, COLUMNS = 6, 110, 300


def nearest(
    seed: int,
    spread: float,
    p: np.ndarray | None = None,
    *,
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    twice: bool = False,
) -> ConicProblem:
    """The points of ``A x = A ½``, between bounds, nearest to targets that are ``spread`` away from ½."""
    rng = np.random.default_rng(seed)
    A = rng.random((ROWS, COLUMNS))
    if twice:
        A[-1] = A[0]
    p = np.ones(COLUMNS) if p is None else p
    target = 0.5 + spread * rng.standard_normal((SIZE, COLUMNS))
    bounds = {
        name: np.full((SIZE, COLUMNS), value)
        for name, value in (("lower", lower), ("upper", upper))
        if value is not None
    }
    b = np.tile(A @ np.full(COLUMNS, 0.5), (SIZE, 1))
    return program(-p * target, A, b, np.diag(p), equalities=ROWS, **bounds)


@pytest.fixture
def interior(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each run of the interior-point method has."""
    sizes: list[int] = []
    solve = predictor_corrector._solve_cold

    def recorded(left, limits, verbose):  # type: ignore[no-untyped-def]
        sizes.append(left.size)
        return solve(left, limits, verbose)

    monkeypatch.setattr(predictor_corrector, "_solve_cold", recorded)
    return sizes


WEIGHTS = np.random.default_rng(9).uniform(0.1, 10.0, COLUMNS)


@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("p", [None, WEIGHTS], ids=["ones", "weights"])
@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (0.0, None), (None, 0.9), (None, None)])
def test_projections_are_those_of_another_solver(
    spread: float, p: np.ndarray | None, lower: float | None, upper: float | None
) -> None:
    problem = nearest(0, spread, p, lower=lower, upper=upper)
    assert is_projection(Scaling.of(problem, torch.float64).program)
    found, exact = InteriorPoint().solve(problem), DAQP().solve(problem)
    assert found.statuses == (Status.SOLVED,) * SIZE
    torch.testing.assert_close(found.x, exact.x, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.z, exact.z, atol=1e-7, rtol=1e-7)


def test_few_active_bounds_need_no_interior_point(interior: list[int]) -> None:
    problem = nearest(1, 0.5)
    found = InteriorPoint().solve(problem)
    assert not interior
    assert found.statuses == (Status.SOLVED,) * SIZE
    assert max(found.iterations) < projection.STEPS
    # The optimality conditions themselves: feasible to rounding, x the clipped target less Aᵀy.
    A = problem.structure.constraint.to_dense(problem.data.A)
    assert (found.x @ A.mT - problem.data.b).abs().max() < 1e-10
    inner = -problem.data.q - found.point.y @ A
    torch.testing.assert_close(found.x, inner.clamp(0.0, 1.0), atol=1e-10, rtol=0)


def test_elements_that_are_not_alike_are_solved_from_the_interior(interior: list[int]) -> None:
    """Some targets are so far away that nearly all variables are at bounds; others are not."""
    near, far = nearest(2, 0.3), nearest(2, 1000.0)
    q = torch.where(torch.arange(SIZE)[:, None] % 2 == 0, near.data.q, far.data.q)
    problem = replace(near, data=near.data._replace(q=q))
    found, exact = InteriorPoint().solve(problem), DAQP().solve(problem)
    assert interior == [SIZE // 2]
    assert found.statuses == (Status.SOLVED,) * SIZE
    torch.testing.assert_close(found.x[::2], exact.x[::2], atol=1e-9, rtol=0)
    # From the interior to 1e-9 in the units of costs of 1000.
    torch.testing.assert_close(found.x, exact.x, atol=1e-6, rtol=0)


def test_rows_that_depend_on_each_other() -> None:
    problem = nearest(3, 0.5, twice=True)
    found, exact = InteriorPoint().solve(problem), DAQP().solve(problem)
    torch.testing.assert_close(found.x, exact.x, atol=1e-9, rtol=0)


def test_no_point_between_the_bounds(interior: list[int]) -> None:
    problem = nearest(4, 0.5)
    b = problem.data.b.clone()
    b[1] = b[1] + 1e4
    found = InteriorPoint().solve(replace(problem, data=problem.data._replace(b=b)))
    expected = [Status.SOLVED] * SIZE
    expected[1] = Status.INFEASIBLE
    assert found.statuses == tuple(expected)


def test_what_is_no_projection() -> None:
    problem = nearest(5, 0.5)
    scaled = Scaling.of(problem, torch.float64).program
    assert is_projection(scaled)
    assert not is_projection(replace(scaled, P=None))
    assert not is_projection(replace(scaled, A=scaled.A.repeat(SIZE, 1, 1)))
    assert not is_projection(replace(scaled, equalities=ROWS - 1))
    assert not is_projection(Scaling.of(problem, torch.float32).program)


def test_active_sets_of_a_known_projection() -> None:
    """Onto the hyperplanes of the first coordinates, which are orthogonal: clipped coordinate by coordinate."""
    rng = np.random.default_rng(6)
    A = np.eye(COLUMNS)[:ROWS]
    target = rng.uniform(-1.0, 2.0, (SIZE, COLUMNS))
    bounds = np.zeros((SIZE, COLUMNS)), np.ones((SIZE, COLUMNS))
    b = np.full((SIZE, ROWS), 0.25)
    problem = program(-target, A, b, np.eye(COLUMNS), equalities=ROWS, lower=bounds[0], upper=bounds[1])
    near = near_active_sets(Scaling.of(problem, torch.float64).program)
    assert near.elements.tolist() == list(range(SIZE))
    assert np.array_equal(near.sets.upper.numpy()[:, ROWS:], target[:, ROWS:] > 1)
    assert np.array_equal(near.sets.lower.numpy()[:, ROWS:], target[:, ROWS:] < 0)
    assert not near.sets.upper[:, :ROWS].any()
    assert not near.sets.lower[:, :ROWS].any()
