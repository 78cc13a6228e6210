"""Re-use: workspaces, warm starts, and nothing left behind by what was solved before."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from lpgd import (
    ECOS,
    LPGD,
    OSQP,
    PIQP,
    SCS,
    Clarabel,
    HiGHS,
    InteriorPoint,
    Moreau,
    ProxQP,
    SerialExecutor,
)
from lpgd.autograd import solve
from lpgd.cones.product import Cones
from lpgd.execution.tasks import core_count
from lpgd.execution.workspaces import workspaces
from lpgd.problems import ConicProblem
from lpgd.solvers import ConicSolver
from tests.problem_table import CASES, REGULAR, planted
from tests.test_solvers import BY_NAME, EXACT, LARGE, QP, box


def counting(monkeypatch: pytest.MonkeyPatch, solver_class: type[ConicSolver]) -> list[Any]:
    made: list[Any] = []
    original = solver_class.prepare

    def prepare(self: Any, form: Any) -> Any:
        made.append(form)
        return original(self, form)

    monkeypatch.setattr(solver_class, "prepare", prepare)
    workspaces.clear()
    return made


def test_one_workspace_serves_everything_that_shares_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counting(monkeypatch, SCS)
    case = next(case for case in CASES if case.name == "qp")
    solver, serial = SCS(), SerialExecutor()
    for scale in (1.0, 1.1, 0.9):
        data = case.problem.data._replace(q=scale * case.problem.data.q)
        solver.solve(replace(case.problem, data=data), executor=serial)
    assert len(made) == 1
    solver.solve(case.problem.augment(0.5, case.point.x), executor=serial)
    solver.solve(case.problem.augment(0.5, case.point.x + 1), executor=serial)
    assert len(made) == 2  # SCS cannot take a new P: one more workspace for rho, re-used too


@pytest.mark.parametrize(
    "solver", [Clarabel(), Clarabel(equilibrate=False), ECOS(), InteriorPoint(), Moreau(), *EXACT], ids=repr
)
def test_results_do_not_depend_on_what_was_solved_before(solver: ConicSolver) -> None:
    # Every x in the simplex with equal costs is optimal: which one is returned shows any trace of other problems.
    def face(row: torch.Tensor) -> torch.Tensor:
        problem = box([[1.0, 1.0]])
        data = problem.data._replace(A=row, q=row[None])
        return solver.solve(replace(problem, data=data), executor=SerialExecutor()).x

    first = face(torch.tensor([1.0, 1.0], dtype=torch.float64))
    for step in range(12):
        face(torch.tensor([10.0**step, 3.0], dtype=torch.float64))
    assert torch.equal(face(torch.tensor([1.0, 1.0], dtype=torch.float64)), first)
    workspaces.clear()
    assert torch.equal(face(torch.tensor([1.0, 1.0], dtype=torch.float64)), first)


def test_clarabel_takes_new_matrices_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counting(monkeypatch, Clarabel)
    for step in range(40):  # as in training: each step has new matrices
        case = planted("step", Cones(zero=2, nonnegative=4, second_order=(3,), semidefinite=(2,)), 10, seed=100 + step)
        solution = Clarabel(equilibrate=False).solve(case.problem, executor=SerialExecutor())
        torch.testing.assert_close(solution.x, case.point.x, atol=1e-4, rtol=1e-4)
    assert len(made) <= 8


@pytest.mark.parametrize("solver", [SCS(), *EXACT, OSQP(), ProxQP(), Moreau(), Moreau(method="ipm")], ids=repr)
def test_warm_starts_save_iterations(solver: ConicSolver) -> None:
    saved = 0
    for case in REGULAR:
        if solver.unsupported(case.problem.structure) is None:
            cold = solver.solve(case.problem)
            warm = solver.solve(case.problem, cold.states)
            assert warm.iterations.sum() <= cold.iterations.sum()
            saved += cold.iterations.sum() - warm.iterations.sum()
            torch.testing.assert_close(warm.x, case.point.x, atol=1e-5, rtol=1e-5)
    assert saved > 0


@pytest.mark.parametrize("solver", [solver for solver in BY_NAME.values() if solver.capabilities.warm_start], ids=repr)
def test_a_solve_depends_on_its_data_and_its_state_alone(solver: ConicSolver) -> None:
    # The workspace has solved the problems of all elements, from all kinds of states, in between.
    for name in ("lp", "qp", "qp, low rank"):
        case = next(case for case in CASES if case.name == name)
        if solver.unsupported(case.problem.structure):
            continue  # ProxQP takes quadratic ones only
        first = solver.solve(case.problem, executor=SerialExecutor())
        moved = replace(case.problem, data=case.problem.data._replace(q=case.problem.data.q + 0.3))
        alone = []
        for element in range(3):
            workspaces.clear()
            states = pickle.loads(pickle.dumps([first.states[element]]))
            alone.append(solver.solve(moved.select(torch.tensor([element])), states, SerialExecutor()))
        workspaces.clear()
        solver.solve(case.problem, executor=SerialExecutor())
        together = solver.solve(moved, first.states, SerialExecutor())
        for element in range(3):
            for part in ("x", "y", "z"):
                ours, theirs = getattr(together, part)[element], getattr(alone[element], part)[0]
                torch.testing.assert_close(ours, theirs, atol=10 * solver.tolerance, rtol=10 * solver.tolerance)


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
def test_states_of_another_problem_do_no_harm(solver: ConicSolver) -> None:
    other = solver.solve(next(case for case in CASES if case.name == "bounds only").problem).states
    torch.testing.assert_close(solver.solve(QP.problem, other).x, QP.point.x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", [*EXACT, PIQP(), OSQP(), ProxQP(), Moreau()], ids=repr)
def test_several_threads_get_the_answers_of_one(solver: ConicSolver) -> None:
    # Objects that two threads share corrupt the heap in several bindings: each task has workspaces of its own.
    batched = next(case for case in CASES if case.name == "qp, batched matrices")
    problems = [case.problem.select(torch.tensor([0, 1, 2] * 20)) for case in (QP, batched)]
    for problem in [*problems, LARGE.problem] if solver in EXACT else problems:
        serial = solver.solve(problem, executor=SerialExecutor())
        with ThreadPoolExecutor(8) as threads:
            for _ in range(3):
                shared = solver.solve(problem, serial.states, threads)
                torch.testing.assert_close(shared.x, serial.x, atol=10 * solver.tolerance, rtol=10 * solver.tolerance)


@pytest.mark.parametrize("solver", [HiGHS(), SCS(), Clarabel()], ids=lambda solver: solver.name)
def test_training_sets_up_once_for_each_thread(solver: ConicSolver, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same LP, parameters in the cost alone, 100 steps of LPGD.
    made = counting(monkeypatch, type(solver))
    case = next(case for case in CASES if case.name == "lp")
    cost = torch.nn.Parameter(case.problem.data.q.clone())
    optimizer = torch.optim.SGD([cost], lr=1e-3)
    for _ in range(100):
        data = case.problem.data._replace(q=cost)
        point = solve(ConicProblem(case.problem.structure, data, 3), solver=solver, gradient=LPGD(tau=1.0))
        optimizer.zero_grad()
        point.x.square().sum().backward()
        optimizer.step()
    assert 1 <= len(made) <= core_count()
    assert not torch.equal(cost, case.problem.data.q)
