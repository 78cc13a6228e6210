"""The interior-point solver's warm start: Newton steps on active sets, against an active-set solver and cold solves."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from lpgd import Clarabel, ImplicitKKT, InteriorPoint, SerialExecutor, Status
from lpgd.problems import ConicPoint, ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from tests.test_interior_point import program

SIZE, N, EQUALITIES, ROWS = 12, 15, 3, 12
TOLERANCE = 1e-9


def random_qp(seed: int, *, diagonal: bool = False, batched: bool = False) -> ConicProblem:
    """Feasible, strictly convex, with rows and bounds of which about a third are active."""
    rng = np.random.default_rng(seed)
    lead = (SIZE,) if batched else ()
    F = rng.normal(size=(*lead, N, N))
    P = np.eye(N) * rng.uniform(0.5, 2.0, N) if diagonal else F @ F.swapaxes(-1, -2) / N + 0.5 * np.eye(N)
    A = rng.normal(size=(*lead, EQUALITIES + ROWS, N))
    x = rng.uniform(0.2, 0.8, size=(SIZE, N))
    b = (A @ x[:, :, None])[:, :, 0]
    b[:, EQUALITIES:] += rng.uniform(0.0, 0.5, size=(SIZE, ROWS))
    low, high = np.zeros((SIZE, N)), np.ones((SIZE, N))
    low[:, ::4], high[:, 1::4] = -np.inf, np.inf
    return program(2 * rng.normal(size=(SIZE, N)), A, b, P, equalities=EQUALITIES, lower=low, upper=high)


def tilted(problem: ConicProblem, step: float, seed: int) -> ConicProblem:
    """Both perturbed problems of a loss on x, and a little on y and z, which shifts rows and bounds."""
    rng = np.random.default_rng(seed)
    shapes = problem.structure.n, problem.structure.m, problem.structure.n
    cotangent = ConicPoint(
        *(
            torch.from_numpy(size * rng.normal(size=(problem.batch_size, k)))
            for size, k in zip((1.0, 0.01, 0.01), shapes, strict=True)
        )
    )
    return problem.tilt(torch.cat([torch.full((problem.batch_size,), sign * step) for sign in (1.0, -1.0)]), cotangent)


@pytest.mark.parametrize("step", [1e-6, 1e-2, 0.1, 10.0])
@pytest.mark.parametrize(("diagonal", "batched"), [(True, False), (False, False), (False, True)])
def test_warm_starts_end_where_another_solver_does(step: float, diagonal: bool, batched: bool) -> None:
    solver = InteriorPoint(tolerance=1e-11, rescue=False)
    problem = random_qp(3, diagonal=diagonal, batched=batched)
    perturbed = tilted(problem, step, 4)
    warm = solver.solve(perturbed, solver.solve(problem).states)
    reference = Clarabel(tolerance=1e-12).solve(perturbed)
    solved = reference.usable
    assert torch.equal(warm.usable, solved)
    assert solved.sum() > 10
    assert warm.residuals.worst[solved].max() <= 10 * TOLERANCE
    torch.testing.assert_close(warm.x[solved], reference.x[solved], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_small_step_takes_one_system(diagonal: bool) -> None:
    """Where no active set changes one system is enough, and its answer moves by no more than the step."""
    solver = InteriorPoint(tolerance=TOLERANCE)
    problem = random_qp(5, diagonal=diagonal)
    solution = solver.solve(problem)
    again = solver.solve(problem, solution.states)
    assert again.iterations.tolist() == [1] * SIZE
    torch.testing.assert_close(again.x, solution.x, rtol=0, atol=1e-6)  # the cold solution's error
    assert again.residuals.worst.max() < 1e-12
    perturbed = solver.solve(tilted(problem, 1e-7, 6), solution.states)
    assert np.mean(perturbed.iterations == 1) > 0.9


def test_augmented_linear_programs_start_from_the_linear_solution() -> None:
    """At the solution of a linear program, ``(ρ/2) |x - x*|²`` changes nothing: its active set is the answer."""
    rng = np.random.default_rng(7)
    A = rng.normal(size=(4, N))
    b = A @ rng.uniform(0.2, 0.8, N)
    problem = program(
        rng.normal(size=(SIZE, N)), A, b, equalities=4, lower=np.zeros((SIZE, N)), upper=np.ones((SIZE, N))
    )
    solver = InteriorPoint(tolerance=TOLERANCE)
    solution = solver.solve(problem)
    again = solver.solve(problem.augment(0.1, solution.x), solution.states)
    assert again.iterations.max() <= 2
    torch.testing.assert_close(again.x, solution.x, rtol=0, atol=1e-7)


def test_states_of_other_problems_cost_time_only() -> None:
    solver = InteriorPoint(tolerance=TOLERANCE)
    problem = random_qp(8)
    expected = solver.solve(problem)
    strange = solver.solve(random_qp(9, batched=True)).states
    shuffled = [*reversed(expected.states)]
    for states in (strange, shuffled, [*expected.states[:-1], None], ["no state"] * SIZE):
        solution = solver.solve(problem, states)
        assert set(solution.statuses) == {Status.SOLVED}
        torch.testing.assert_close(solution.x, expected.x, rtol=0, atol=1e-7)


@pytest.mark.parametrize("warm", [False, True])
def test_chunks_on_workers_give_what_the_whole_batch_gives(warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    solver = InteriorPoint(tolerance=TOLERANCE)
    for batched in (False, True):
        problem = random_qp(10, batched=batched)
        states = solver.solve(problem).states if warm else ()
        perturbed = tilted(problem, 0.05, 11)
        whole = solver.solve(perturbed, states, SerialExecutor())
        with monkeypatch.context() as patched:
            patched.setattr("lpgd.solvers.interior_point.solver.CHUNKED", 1.0)
            chunked = solver.solve(perturbed, states)
        assert chunked.statuses == whole.statuses
        assert chunked.iterations.tolist() == whole.iterations.tolist()
        torch.testing.assert_close(chunked.x, whole.x, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("batched", [False, True])
def test_solutions_of_strictly_convex_programs_are_exact(batched: bool) -> None:
    """The method ends on the active set: its solutions satisfy the conditions to rounding, not to its tolerance."""
    problem = random_qp(13, batched=batched)
    solution = InteriorPoint(tolerance=1e-6).solve(problem)
    assert solution.residuals.worst.median() < 1e-13
    reference = Clarabel(tolerance=1e-12).solve(problem)
    torch.testing.assert_close(solution.x, reference.x, rtol=1e-6, atol=1e-6)


def response(problem: ConicProblem, solution: ConicSolution) -> ConicPoint:
    rng = np.random.default_rng(14)
    shapes = problem.structure.n, problem.structure.m, problem.structure.n
    tilt = ConicPoint(*(torch.from_numpy(rng.normal(size=(problem.batch_size, k))) for k in shapes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return ImplicitKKT().response(solution, tilt)[0]


@pytest.mark.parametrize(("diagonal", "batched"), [(True, False), (False, False), (False, True)])
def test_the_last_factorisation_serves_implicit_differentiation(diagonal: bool, batched: bool) -> None:
    problem = random_qp(15, diagonal=diagonal, batched=batched)
    solution = InteriorPoint().solve(problem)
    assert sum(int(kept.valid.sum()) for kept in solution.systems) > SIZE // 2
    kept, fresh = response(problem, solution), response(problem, replace(solution, systems=()))
    for own, expected in zip(kept, fresh, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-7)


def test_a_factorisation_that_is_not_the_solutions_own_is_found_out() -> None:
    problem = random_qp(16)
    solution, other = InteriorPoint().solve(problem), InteriorPoint().solve(random_qp(17))
    assert other.systems
    mistaken, fresh = (response(problem, replace(solution, systems=systems)) for systems in (other.systems, ()))
    for own, expected in zip(mistaken, fresh, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-7, atol=1e-7)
