"""Implicit differentiation inside faces of linear programs with a shared A, against the method for any system."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lpgd import ImplicitKKT, SerialExecutor
from lpgd.arrays import FloatArray
from lpgd.cones.product import Cones
from lpgd.gradients.implicit import whole_batches
from lpgd.problems import ConicStructure, SparsityPattern
from lpgd.solvers import ConicSolver
from lpgd.solvers.interior_point.solver import InteriorPoint
from lpgd.solvers.kkt.faces import FaceTask, respond_in_faces
from lpgd.solvers.kkt.rank import Known
from lpgd.solvers.kkt.system import KKTPoints, respond
from tests.test_interior_point import program

SIZE, ROWS, COLUMNS = 5, 20, 60


def task(seed: int, share: float, equalities: int = ROWS) -> tuple[FaceTask, KKTPoints, ConicStructure]:
    """Points with a share of the variables at a bound, and some inactive rows; random tilts."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((ROWS, COLUMNS)) * 10.0 ** rng.uniform(-2, 2, (ROWS, 1))
    at_bound = rng.random((SIZE, COLUMNS)) < share
    upper = rng.random((SIZE, COLUMNS)) < 0.5
    x = np.where(at_bound, np.where(upper, 1.0, 0.0), 0.5)
    z = np.where(at_bound, np.where(upper, 1.0, -1.0), 0.0)
    active = (rng.random((SIZE, ROWS)) < 0.7) | (np.arange(ROWS) < equalities)
    y, slack = np.where(active, 1.0, 0.0), np.where(active, 0.0, 1.0)
    g_x, g_y, g_z = (rng.standard_normal((SIZE, length)) for length in (COLUMNS, ROWS, COLUMNS))
    known = Known(np.full(SIZE, 1e-13), np.zeros(SIZE))
    points = KKTPoints(x, y, z, slack, g_x, g_y, g_z, np.zeros_like(x), np.ones_like(x))
    scaled = A / np.abs(A).max(1)[:, None]
    structure = ConicStructure(
        SparsityPattern.empty(COLUMNS, COLUMNS),
        SparsityPattern.dense(ROWS, COLUMNS),
        Cones(zero=equalities, nonnegative=ROWS - equalities),
        np.arange(COLUMNS),
        np.arange(COLUMNS),
    )
    return FaceTask(A, scaled @ scaled.T, at_bound, active, g_x, g_y, g_z, known), points, structure


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("equalities", [ROWS, 5])
def test_responses_are_those_of_any_system(share: float, equalities: int) -> None:
    given, points, structure = task(0, share, equalities)
    found, solved = respond_in_faces(given)
    assert solved.all()
    values = np.tile(given.A.T.ravel(), (SIZE, 1))
    other = respond(structure, 0.0, np.zeros((SIZE, 0)), values, points, given.known)
    for name in ("x", "y", "z"):
        np.testing.assert_allclose(getattr(found, name), getattr(other, name), rtol=1e-9, atol=1e-9)
    for name in ("exact", "unique", "consistent", "shared"):
        assert np.array_equal(getattr(found, name), getattr(other, name))
    # The minimum norm itself: dx is what the rows ask for, by the pseudo-inverse.
    free, active = ~given.at_bound[0], given.active[0]
    fixed = np.where(free, 0.0, -given.g_z[0])
    wanted = -given.g_y[0][active] - given.A[active] @ fixed
    expected: FloatArray = np.linalg.pinv(given.A[active][:, free]) @ wanted
    np.testing.assert_allclose(found.x[0][free], expected, rtol=1e-8, atol=1e-8)


def test_rows_that_depend_on_each_other_are_left() -> None:
    given, _, _ = task(1, 0.1)
    A = given.A.copy()
    A[1] = A[0]
    scaled = A / np.abs(A).max(1)[:, None]
    _, solved = respond_in_faces(given._replace(A=A, square=scaled @ scaled.T))
    assert not solved.any()


def test_an_element_has_the_same_bits_alone() -> None:
    given, _, _ = task(2, 0.2, 5)
    together, _ = respond_in_faces(given)
    for element in range(SIZE):
        chosen = [element]
        alone, _ = respond_in_faces(
            given._replace(
                **{name: getattr(given, name)[chosen] for name in ("at_bound", "active", "g_x", "g_y", "g_z")},
                known=given.known.select(chosen),
            )
        )
        for name in ("x", "y", "z", "doubt"):
            assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[element])


def test_a_training_step_has_the_gradients_of_own_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With A in every element the systems are put together; shared, they are not."""
    rng = np.random.default_rng(3)
    A, costs = rng.random((ROWS, COLUMNS)), np.zeros((SIZE, COLUMNS))
    costs[:, :6] = -rng.random((SIZE, 6))
    bounds = {"lower": np.zeros_like(costs), "upper": np.ones_like(costs)}
    b = np.full((SIZE, COLUMNS), 0.5) @ A.T
    solver: ConicSolver = InteriorPoint()
    problem = program(costs, A, b, equalities=ROWS, **bounds)
    solution = solver.solve(problem)
    cotangent = solution.point._replace(
        x=torch.from_numpy(rng.standard_normal(costs.shape)), y=0 * solution.y, z=0 * solution.z
    )
    runs: list[int] = []
    in_faces = whole_batches.respond_in_faces
    monkeypatch.setattr(whole_batches, "respond_in_faces", lambda one: (runs.append(len(one.g_x)), in_faces(one))[1])
    gradient: Any = ImplicitKKT()
    with pytest.warns(UserWarning, match="singular"):
        shared, info = gradient.vjp(solution, cotangent, solver, SerialExecutor())
    assert sum(runs) == SIZE
    own = replace(problem, data=problem.data._replace(A=problem.data.A.expand(SIZE, -1).clone()))
    with pytest.warns(UserWarning, match="singular"):
        other, other_info = gradient.vjp(replace(solution, problem=own), cotangent, solver, SerialExecutor())
    assert sum(runs) == SIZE
    assert info.used == other_info.used
    torch.testing.assert_close(shared.A, other.A.sum(0), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(shared.b, other.b, atol=1e-8, rtol=1e-8)
