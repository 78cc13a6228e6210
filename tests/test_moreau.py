"""Moreau beyond the contract of every solver: one call for a batch, and what its methods do not see themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import lpgd
from lpgd import Clarabel, Moreau, SerialExecutor, Status
from lpgd.cones.product import Cones
from lpgd.execution.workspaces import workspaces
from lpgd.problems import ConicProblem
from lpgd.solvers.backends import moreau
from lpgd.solvers.backends.moreau_objects import IPM, Answer, Compiled, Inputs, Limits, OnDevice
from lpgd.solvers.backends.moreau_rows import MoreauForm, row_form
from tests.problem_table import CASES, Case, planted

pytestmark = pytest.mark.skipif(not Moreau.is_installed(), reason="moreau is an extra")

ALONE = Moreau(rescue=False)
CURVED = planted(
    "curved", Cones(2, 3, (1, 4, 1, 3), (3, 2, 1), 2, 0, (0.3, 0.6)), 30, seed=61, lower=3, active_bounds=1
)
QP = planted(
    "qp", Cones(zero=3, nonnegative=9), 10, seed=62, lower=4, upper=4, active_bounds=2, batched=("P", "A", "q", "b")
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The method and the size of each compiled call."""
    made: list[tuple[str, int]] = []
    solve = Compiled.solve

    def counted(self: Compiled, inputs: Inputs) -> Answer:
        made.append((self.method, self.size))
        return solve(self, inputs)

    monkeypatch.setattr(Compiled, "solve", counted)
    workspaces.clear()
    return made


def program(P: list[list[float]], q: list[list[float]], **rows: Any) -> ConicProblem:
    """The problem that a layer makes of ``½ xᵀP x + qᵀx``, unsolved elements included."""
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in rows.items()}
    layer = lpgd.QPLayer(Clarabel(), on_error="nan")
    data = torch.tensor(P, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    return layer(*data, **tensors).info.solution.problem


def test_a_batch_is_one_call(calls: list[tuple[str, int]]) -> None:
    solution = ALONE.solve(QP.problem)
    assert calls == [("active_set", 3)]
    torch.testing.assert_close(solution.x, QP.point.x, atol=1e-9, rtol=0)
    calls.clear()
    ALONE.solve(CURVED.problem)
    assert calls == [("ipm", 3)]
    calls.clear()
    ALONE.solve(next(case for case in CASES if case.name == "lp").problem)  # without a quadratic objective
    assert calls == [("ipm", 3)]


def test_every_cone_in_its_order() -> None:
    solution = replace(ALONE, refine=False).solve(CURVED.problem)
    assert solution.statuses == (Status.SOLVED,) * 3
    for ours, theirs in zip(solution.point, CURVED.point, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [None, "ipm"])
def test_an_answer_does_not_depend_on_the_rest_of_the_batch(method: str | None) -> None:
    solver = replace(ALONE, method=method)
    together = solver.solve(QP.problem)
    moved = replace(QP.problem, data=QP.problem.data._replace(q=QP.problem.data.q + 0.1))
    warm = solver.solve(moved, together.states)
    for element in range(3):
        alone = solver.solve(QP.problem.select(torch.tensor([element])))
        assert torch.equal(alone.x[0], together.x[element])
        again = solver.solve(moved.select(torch.tensor([element])), alone.states)
        assert torch.equal(again.x[0], warm.x[element])
        assert again.iterations[0] == warm.iterations[element]


@pytest.mark.parametrize("method", [None, "ipm"])
def test_elements_without_a_state_start_cold(method: str | None) -> None:
    solver = replace(ALONE, method=method)
    cold = solver.solve(QP.problem)
    mixed = solver.solve(QP.problem, [cold.states[0], None, cold.states[2]])
    assert mixed.iterations[1] == cold.iterations[1]
    assert (mixed.iterations[[0, 2]] < cold.iterations[[0, 2]]).all()
    assert torch.equal(mixed.x[1], cold.x[1])
    torch.testing.assert_close(mixed.x, QP.point.x, atol=1e-9, rtol=0)


def test_much_work_is_several_calls_with_the_same_answers(
    calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = QP.problem.select(torch.tensor([0, 1, 2] * 4))
    whole = ALONE.solve(problem)
    calls.clear()
    monkeypatch.setattr(moreau, "WORK", 1.0)
    parts = ALONE.solve(problem, executor=SerialExecutor())
    assert calls == [("active_set", 2)] * 6
    for one, other in zip(whole.point, parts.point, strict=True):
        assert torch.equal(one, other)


def test_duplicated_equalities_are_solved(calls: list[tuple[str, int]]) -> None:
    # minimise ½|x|² with x_1 + x_2 = b twice: the projection of 0 onto a line.
    problem = program(
        [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0]] * 3, A=[[1.0, 1.0], [1.0, 1.0]], b=[[1.0, 1.0], [2.0, 2.0], [2.0, 1.0]]
    )
    calls.clear()
    solution = ALONE.solve(problem)
    assert solution.statuses == (Status.SOLVED, Status.SOLVED, Status.INFEASIBLE)
    assert calls == [("active_set", 3), ("ipm", 3)]
    torch.testing.assert_close(solution.x[:2], torch.tensor([[0.5, 0.5], [1.0, 1.0]]).double(), atol=1e-9, rtol=0)


def test_verdicts_have_certificates(calls: list[tuple[str, int]]) -> None:
    # The active-set method has none, and an x of 1e6 for what is unbounded.
    flat = [[1.0, 0.0], [0.0, 0.0]]
    problem = program(flat, [[1.0, 0.0], [0.0, -1.0], [-1.0, 1.0]], G=[[0.0, -1.0]], h=[0.0])
    solution = ALONE.solve(problem)
    assert solution.statuses == (Status.SOLVED, Status.UNBOUNDED, Status.SOLVED)
    assert solution.proofs == ("", "certificate", "")
    torch.testing.assert_close(solution.x[2], torch.tensor([1.0, 0.0]).double(), atol=1e-6, rtol=0)
    problem = program([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0]], G=[[1.0, 1.0], [-1.0, -1.0]], h=[-1.0, -1.0])
    assert ALONE.solve(problem).proofs == ("certificate",)


def test_elements_without_a_quadratic_objective_among_others() -> None:
    # minimise ½ x P x - x over 0 <= x <= 2.
    problem = program([[[1.0]], [[0.0]], [[0.25]]], [[-1.0]] * 3, lb=[0.0], ub=[2.0])
    torch.testing.assert_close(ALONE.solve(problem).x, torch.tensor([[1.0], [2.0], [2.0]]).double(), atol=1e-9, rtol=0)


def test_no_rows_at_all() -> None:
    case = next(case for case in CASES if case.name == "unconstrained")
    for method in (None, "active_set", "ipm"):
        torch.testing.assert_close(Moreau(method=method).solve(case.problem).x, case.point.x, atol=1e-8, rtol=0)


def test_the_active_set_method_has_no_curved_cones() -> None:
    with pytest.raises(ValueError, match="has no curved cones"):
        Moreau(method="active_set").solve(CURVED.problem)
    with pytest.raises(ValueError, match="method is 'simplex'; it must be 'active_set', 'ipm', or None"):
        Moreau(method="simplex")


def test_batches_of_many_sizes_leave_few_objects() -> None:
    workspaces.clear()
    for size in range(1, 12):
        ALONE.solve(QP.problem.select(torch.zeros(size, dtype=torch.int64)))
    assert len(workspaces.idle) == moreau.KEPT


@pytest.mark.parametrize("case", [QP, CURVED], ids=repr)
def test_the_interface_for_devices_gives_the_same(case: Case) -> None:
    # What data on an accelerator would go through, with the CPU as the device.
    data = [datum if datum.ndim == 2 else datum.expand(3, -1) for datum in case.problem.data]
    bounds = [torch.isfinite(bound[0]).numpy() for bound in data[4:]]
    form = MoreauForm(case.problem.structure, *bounds)
    P = case.problem.symmetric_P.expand(3, -1)
    inputs, limits = Inputs(P, *row_form(form, data)), Limits(1e-9, 100, None, False)
    theirs = OnDevice(form.layout, 3, limits, "cpu").solve(inputs)
    ours = Compiled(form.layout, IPM, 3, limits, 1).solve(inputs)
    assert theirs.statuses == ours.statuses == [1, 1, 1]
    for part in ("x", "z", "s"):
        torch.testing.assert_close(getattr(theirs, part), getattr(ours, part), atol=1e-6, rtol=1e-6)
    assert torch.equal(theirs.iterations, ours.iterations)
    torch.testing.assert_close(theirs.x, case.point.x, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_data_on_a_gpu() -> None:
    problem = replace(QP.problem, data=type(QP.problem.data)(*(datum.cuda() for datum in QP.problem.data)))
    solution = ALONE.solve(problem)
    assert solution.x.device == problem.device
    torch.testing.assert_close(solution.x.cpu(), QP.point.x, atol=1e-6, rtol=0)
