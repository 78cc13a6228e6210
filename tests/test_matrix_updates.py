"""Solvers that take new values of P and A in a prepared workspace: few set-ups, and no trace of the old matrices."""

from __future__ import annotations

import pytest
import torch

from lpgd import PIQP, Clarabel, Cones, ProxQP, SerialExecutor
from lpgd.execution.workspaces import workspaces
from lpgd.solvers import ElementwiseSolver
from tests.problem_table import planted

STEPS = 30
CONES = Cones(zero=2, nonnegative=6)

SOLVERS = [Clarabel(equilibrate=False), PIQP(sparse=True), PIQP(sparse=False), ProxQP()]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_new_matrices_are_taken_in_place(solver: ElementwiseSolver, monkeypatch: pytest.MonkeyPatch) -> None:
    workspaces.clear()
    made = []
    prepare = type(solver).prepare
    monkeypatch.setattr(type(solver), "prepare", lambda own, form: made.append(form) or prepare(own, form))
    serial = SerialExecutor()
    cases = [planted("step", CONES, 8, seed=200 + step) for step in range(STEPS)]  # as in training
    for case in cases:
        solution = solver.solve(case.problem, executor=serial)
        torch.testing.assert_close(solution.x, case.point.x, atol=1e-5, rtol=1e-5)
    assert len(made) <= 8

    updated = solver.solve(planted("last", CONES, 8, seed=300).problem, executor=serial)
    workspaces.clear()
    fresh = solver.solve(planted("last", CONES, 8, seed=300).problem, executor=serial)
    assert updated.statuses == fresh.statuses
    assert updated.iterations.tolist() == fresh.iterations.tolist()
    torch.testing.assert_close(updated.x, fresh.x, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(updated.y, fresh.y, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_one_workspace_serves_matrices_until_they_come_back(
    solver: ElementwiseSolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspaces.clear()
    made, updated = [], []
    prepare, prepared_type = type(solver).prepare, []

    def counted(own: ElementwiseSolver, form: object) -> object:
        made.append(form)
        found = prepare(own, form)
        prepared_type.append(type(found))
        return found

    monkeypatch.setattr(type(solver), "prepare", counted)
    serial = SerialExecutor()
    cases = [planted("step", CONES, 8, seed=400 + element).problem for element in range(2)]
    batch = [problem.select(torch.tensor([0])) for problem in cases]
    for problem in batch:  # no matrix is known yet
        solver.solve(problem, executor=serial)
    assert len(made) == 1
    monkeypatch.setattr(
        prepared_type[0],
        "update",
        lambda own, form, update=prepared_type[0].update: updated.append(1) or update(own, form),
    )
    for _ in range(3):
        for problem in batch:  # known: each gets a workspace of its own, and then has it
            solver.solve(problem, executor=serial)
    assert len(made) + len(updated) <= 1 + len(batch)
