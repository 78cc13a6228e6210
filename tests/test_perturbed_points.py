"""Perturbed solutions by Newton's method: what a solver finds, who found it, and where it is not tried."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lpgd
from lpgd.gradients import ImplicitKKT
from lpgd.gradients.implicit import one_by_one
from lpgd.problems import ConicPoint
from lpgd.problems.conic.solution import NEWTON
from lpgd.solvers import ConicSolver
from lpgd.solvers.kkt import points
from lpgd.solvers.perturbed_points import PerturbedPoints
from tests.problem_table import CASES, REGULAR, Case
from tests.test_gradients import planted_solution


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def tilt_of(case: Case) -> ConicPoint:
    """A random tilt; of bounds, where there are any."""
    structure = case.problem.structure
    generator = torch.Generator().manual_seed(5)
    parts = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in case.point]
    bounded = torch.zeros(structure.n, dtype=torch.float64)
    bounded[structure.lower_index.tolist() + structure.upper_index.tolist()] = 1.0
    return ConicPoint(parts[0], parts[1], parts[2] * bounded)


def reference_solver(case: Case) -> ConicSolver:
    clarabel = lpgd.Clarabel()
    return clarabel if clarabel.unsupported(case.problem.structure) is None else lpgd.SCS(tolerance=1e-10)


def both_sides(tau: float, count: int) -> torch.Tensor:
    return torch.tensor([tau] * count + [-tau] * count, dtype=torch.float64)


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("tau", [1e-4, 1e-2])
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_newton_finds_what_a_solver_finds(case: Case, tau: float, rho: float) -> None:
    solver, tilt = reference_solver(case), tilt_of(case)
    solution = planted_solution(case)
    augmented = case.problem.augment(rho, solution.x)
    near = PerturbedPoints.of(solver.solve(case.problem), augmented, tilt, torch.ones(3, dtype=torch.float64), solver)
    assert near is not None
    steps = both_sides(tau, 3)
    found = near.solve(augmented.tilt(steps, tilt), steps, (), None)
    expected = solver.solve(augmented.tilt(steps, tilt))
    assert found.statuses == (lpgd.Status.SOLVED,) * 6
    assert found.by_newton.all()
    assert float(found.residuals.worst.max()) <= 1e-11
    for own, other in zip(found.point, expected.point, strict=True):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("solver", [lpgd.Clarabel(), lpgd.SCS(), lpgd.InteriorPoint()], ids=repr)
def test_no_solver_is_asked_at_a_small_step_and_that_is_on_record(
    solver: ConicSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = by_name("qp")
    solution = solver.solve(case.problem)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a solver was asked")

    monkeypatch.setattr(type(solver), "solve_posed", refuse)
    _, info = lpgd.LPGD(1e-4).vjp(solution, tilt_of(case), solver)
    assert info.newton is not None
    assert info.newton.tolist() == [2, 2, 2]
    assert info.used == ["average"] * 3


def test_a_large_step_and_a_solver_that_is_not_to_refine_are_left_to_the_solver() -> None:
    case = by_name("lp")
    nothing = torch.zeros_like(case.point.y)
    for solver, tau in ((lpgd.DAQP(), 1e-4), (lpgd.Clarabel(), 1e4), (lpgd.Clarabel(refine=False), 1e-4)):
        solution = lpgd.Clarabel().solve(case.problem)
        _, info = lpgd.LPGD(tau).vjp(
            solution, tilt_of(case)._replace(y=nothing, z=torch.zeros_like(case.point.z)), solver
        )
        assert info.newton is not None
        assert not info.newton.any()


@pytest.mark.parametrize("name", ["redundant equalities", "degenerate lp"])
def test_degenerate_programs_are_left_to_the_solver(name: str) -> None:
    case, solver = by_name(name), lpgd.Clarabel()
    tilt = tilt_of(case)._replace(y=torch.zeros_like(case.point.y))
    _, info = lpgd.LPGD(1e-2).vjp(solver.solve(case.problem), tilt, solver)
    assert info.newton is not None
    assert not info.newton.any()


def test_an_active_set_that_changes_is_followed() -> None:
    """min ½ x² - q x s.t. x ≤ 1 at q = 0.95: one side of the step of 0.1 ends at the bound."""
    problem = lpgd.QPLayer("CLARABEL", gradient=lpgd.LPGD(0.1 * 0.9))
    q = torch.tensor([-0.95], dtype=torch.float64, requires_grad=True)
    output = problem(torch.eye(1, dtype=torch.float64), q, ub=1.0)
    output.x.sum().backward()
    (info,) = output.info.gradients
    assert info.newton.tolist() == [2]
    assert info.crossed.tolist() == [True]
    # x₊ = 0.95 - τ, x₋ = min(1, 0.95 + τ): closed form.
    assert q.grad is not None
    assert q.grad.item() == pytest.approx(-(0.09 + 0.05) / 0.18, abs=1e-12)


def test_what_is_found_does_not_depend_on_the_batch() -> None:
    case, solver = by_name("every cone"), lpgd.SCS()
    solution, tilt = solver.solve(case.problem), tilt_of(case)
    unit = torch.ones(3, dtype=torch.float64)
    found_points = []
    for rows in ([0, 1, 2], [1]):
        index = torch.tensor(rows)
        part = solution.select(index)
        near = PerturbedPoints.of(part, part.problem, tilt.select(index), unit[index], solver)
        assert near is not None
        steps = both_sides(1e-3, len(rows))
        found = near.solve(part.problem.tilt(steps, tilt.select(index)), steps, (), None)
        assert set(found.solvers) == {NEWTON}
        found_points.append(found.select(torch.tensor([rows.index(1), len(rows) + rows.index(1)])).point)
    for own, other in zip(*found_points, strict=True):
        torch.testing.assert_close(own, other, atol=1e-13, rtol=0)


@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_refinements_last_factorisation_serves_the_exact_backward_pass(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = lpgd.SCS(tolerance=1e-5)
    solution = solver.solve(case.problem)
    assert solution.refined is not None
    # Some answers are exact as they are; no solver is asked about equations, which such a factorisation solves.
    refined = (solution.refined > 0) | torch.from_numpy(solution.iterations == 0)
    assert refined.any()
    tilt = tilt_of(case).scaled(refined.double())
    expected, _ = ImplicitKKT().response(planted_solution(case), tilt)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("a second factorisation")

    monkeypatch.setattr(one_by_one, "respond", refuse)
    monkeypatch.setattr(points, "Factored", refuse)
    change, info = ImplicitKKT().response(solution, tilt)
    assert info.used == ["implicit" if own else "zero cotangent" for own in refined.tolist()]
    for own, other in zip(change, expected, strict=True):
        torch.testing.assert_close(own, other, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("guess", ["nearly right", "far off", "not finite"])
def test_a_guess_of_the_derivative_only_saves_steps(guess: str) -> None:
    case = by_name("every cone")
    solution, tilt = lpgd.SCS(tolerance=1e-10).solve(case.problem), tilt_of(case)
    expected, record = ImplicitKKT().response(solution, tilt)
    factor = {"nearly right": 1.0 + 1e-6, "far off": -30.0, "not finite": float("nan")}[guess]
    near = ConicPoint(*(factor * values for values in expected))
    found, other = ImplicitKKT().response(solution, tilt, near=near)
    assert other.used == record.used
    for values, right in zip(found, expected, strict=True):
        torch.testing.assert_close(values, right, atol=1e-8, rtol=1e-8)
