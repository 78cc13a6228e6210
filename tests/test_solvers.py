"""Every solver against planted solutions; statuses, and failures one by one."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

from lpgd import (
    DAQP,
    ECOS,
    OSQP,
    Clarabel,
    ConicSolution,
    HiGHS,
    LpgdWarning,
    SerialExecutor,
    Status,
)
from lpgd.cones.product import Cones
from lpgd.problems import ConicData, ConicProblem, ConicStructure, SparsityPattern
from lpgd.solvers import ConicSolver
from lpgd.solvers.backends.forms import Matrices, RowForm
from lpgd.solvers.failures import check_solution
from lpgd.status import SolverError
from tests.problem_table import CASES, Case, planted
from tests.solver_table import SOLVER_TABLE

BY_NAME = {row.name: row.solver for row in SOLVER_TABLE}


def supported(solver: ConicSolver) -> list[Case]:
    return [case for case in CASES if solver.unsupported(case.problem.structure) is None]


LARGE = planted("large", Cones(zero=100, nonnegative=300), 300, seed=50, rank=0, lower=300, upper=300, active_bounds=50)
SOCP, QP = (next(case for case in CASES if case.name == name) for name in ("socp", "qp"))
PAIRS = [
    pytest.param(row.solver, row.error, case, id=f"{row}-{case}")
    for row in SOLVER_TABLE
    for case in supported(row.solver)
]


def box(q: list[list[float]], b: list[list[float]] | None = None, *, curvature: float = 0.0) -> ConicProblem:
    """``min ½ curvature |x|² + qᵀx`` over ``0 <= x``, ``x_1 + x_2 = b``."""
    quadratic = SparsityPattern.from_matrix(np.eye(2)) if curvature else SparsityPattern.empty(2, 2)
    structure = ConicStructure(quadratic, SparsityPattern.dense(1, 2), Cones(zero=1), np.arange(2))
    rows = torch.tensor(b if b is not None else [[1.0]] * len(q), dtype=torch.float64)
    zero, nothing = torch.zeros(2, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    P = torch.full((quadratic.nnz,), curvature, dtype=torch.float64)
    data = ConicData(P, torch.tensor(q, dtype=torch.float64), torch.ones(2, dtype=torch.float64), rows, zero, nothing)
    return ConicProblem(structure, data, len(q))


def ray(q: list[float]) -> ConicProblem:
    """``min q x`` over ``x >= 0``: unbounded where q < 0."""
    structure = ConicStructure(SparsityPattern.empty(1, 1), SparsityPattern.empty(0, 1), Cones(), np.arange(1))
    nothing = torch.zeros(0, dtype=torch.float64)
    costs = torch.tensor(q, dtype=torch.float64)[:, None]
    return ConicProblem(
        structure, ConicData(nothing, costs, nothing, nothing, torch.zeros(1).double(), nothing), len(q)
    )


@pytest.mark.parametrize(("solver", "error", "case"), PAIRS)
def test_solutions_are_the_planted_ones(solver: ConicSolver, error: float, case: Case) -> None:
    solution = solver.solve(case.problem)
    assert solution.statuses == (Status.SOLVED,) * case.problem.batch_size
    assert solution.residuals.worst.max() < 1e-4
    assert (solution.iterations >= 0).all()
    assert (solution.solve_seconds > 0).all()
    torch.testing.assert_close(solution.x, case.point.x, atol=error, rtol=error)
    torch.testing.assert_close(solution.s, case.problem.slack(case.point.x), atol=10 * error, rtol=error)
    if case.regular:  # elsewhere multipliers are not unique
        torch.testing.assert_close(solution.y, case.point.y, atol=10 * error, rtol=error)
        torch.testing.assert_close(solution.z, case.point.z, atol=10 * error, rtol=error)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_residuals_vanish_at_the_planted_point_and_only_there(case: Case) -> None:
    size = case.problem.batch_size
    nothing = np.zeros(size)
    exact = ConicSolution(
        case.problem, *case.point, case.problem.slack(case.point.x), (Status.SOLVED,) * size, nothing.astype(int),
        nothing, nothing, (None,) * size,
    )  # fmt: skip
    assert exact.residuals.worst.max() < 1e-12
    for name in ("x", "y", "z"):
        value = getattr(exact, name)
        if value.shape[1]:
            wrong = replace(exact, **{name: value + 0.1})
            assert wrong.residuals.worst.min() > 1e-4, name


@pytest.mark.parametrize(("solver", "error", "case"), PAIRS)
def test_augmenting_at_the_solution_leaves_it_optimal(solver: ConicSolver, error: float, case: Case) -> None:
    # For ECOS this goes through the quadratic-to-cone reduction; the new quadratic needs room in P's pattern.
    solution = solver.solve(case.problem.augment(0.7, case.point.x))
    torch.testing.assert_close(solution.x, case.point.x, atol=10 * error, rtol=error)


def takes_linear_programs(solver: ConicSolver) -> bool:
    return solver.unsupported(LARGE.problem.structure) is None


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("curvature", [0.0, 1.0], ids=["linear", "quadratic"])
def test_each_element_has_its_own_status(solver: ConicSolver, curvature: float) -> None:
    infeasible = box([[1.0, 4.0]] * 4, [[1.0], [-1.0], [2.0], [-3.0]], curvature=curvature)
    if not curvature and not takes_linear_programs(solver):
        with pytest.raises(ValueError, match="not reliable on linear programs"):
            solver.solve(infeasible)
        return
    solution = solver.solve(infeasible)
    statuses = list(solution.statuses)
    if solver.name == "ECOS":
        # ECOS takes some infeasible problems for unbounded ones, this one too (ecos 2.0.14).
        assert {statuses[1], statuses[3]} <= {Status.INFEASIBLE, Status.UNBOUNDED}
        statuses[1] = statuses[3] = Status.INFEASIBLE
    assert statuses == [Status.SOLVED, Status.INFEASIBLE, Status.SOLVED, Status.INFEASIBLE]
    torch.testing.assert_close(solution.x[[0, 2]], torch.tensor([[1.0, 0.0], [2.0, 0.0]]).double(), atol=1e-6, rtol=0)
    assert solution.x[[1, 3]].isnan().all()
    if curvature:
        return
    unbounded = solver.solve(ray([1.0, -1.0, 2.0]))
    assert unbounded.statuses == (Status.SOLVED, Status.UNBOUNDED, Status.SOLVED)
    assert unbounded.failed == [1]


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
def test_limits_are_statuses(solver: ConicSolver) -> None:
    case = next(case for case in (SOCP, LARGE, QP) if solver.unsupported(case.problem.structure) is None)
    limited = replace(solver, max_iterations=2, rescue=False, refine=False).solve(case.problem)
    assert set(limited.statuses) == {Status.ITERATION_LIMIT}
    assert limited.statuses[0].has_iterate
    assert not limited.statuses[0].usable


TIMED = [solver for solver in BY_NAME.values() if solver.capabilities.time_limit]


@pytest.mark.parametrize("solver", TIMED, ids=lambda solver: solver.name)
def test_a_time_limit_reaches_the_solver(solver: ConicSolver) -> None:
    limited = replace(solver, time_limit=1e-4, tolerance=1e-12).solve(LARGE.problem.select(torch.tensor([0])))
    assert limited.statuses == (Status.TIME_LIMIT,)


@pytest.mark.parametrize("solver", TIMED, ids=lambda solver: solver.name)
def test_a_time_limit_is_one_of_each_element(solver: ConicSolver) -> None:
    # HiGHS adds up the times of all solves of an object.
    case, limit = next(case for case in CASES if case.name == "lp"), 0.2
    problem = case.problem.select(torch.zeros(50, dtype=torch.int64))
    solution, spent = None, 0.0
    while spent < 1.5 * limit:
        solution = replace(solver, time_limit=limit).solve(problem, executor=SerialExecutor())
        assert solution.statuses == (Status.SOLVED,) * 50
        spent += solution.solve_seconds.sum()


@pytest.mark.parametrize("solver", [solver for solver in BY_NAME.values() if solver not in TIMED], ids=repr)
def test_a_time_limit_that_cannot_be_kept_is_refused(solver: ConicSolver) -> None:
    with pytest.raises(ValueError, match=f"{solver.name} cannot stop at a time limit"):
        replace(solver, time_limit=1.0)


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_invalid_data_never_reach_a_solver(solver: ConicSolver, value: float) -> None:
    for name in ("q", "b", "lower"):
        problem = box([[1.0, 4.0]] * 3, curvature=1.0)
        data = problem.data._replace(lower=torch.zeros(3, 2).double())
        getattr(data, name)[1, 0] = value
        solution = solver.solve(replace(problem, data=data))
        assert solution.statuses == (Status.SOLVED, Status.INVALID_DATA, Status.SOLVED), name
        torch.testing.assert_close(solution.x[2], torch.tensor([1.0, 0.0]).double(), atol=1e-5, rtol=0)
    shared = box([[1.0, 4.0]] * 2, curvature=1.0)
    shared.data.A[0] = value
    assert solver.solve(shared).statuses == (Status.INVALID_DATA,) * 2


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
def test_infinite_bounds_are_no_bounds(solver: ConicSolver) -> None:
    # The same variable is bounded in one element and free in the next.
    case = next(case for case in CASES if case.name == "bounds only")
    data = case.problem.data._replace(lower=case.problem.data.lower.clone(), upper=case.problem.data.upper.clone())
    data.lower[1], data.upper[1] = -torch.inf, torch.inf
    solution = solver.solve(replace(case.problem, data=data))
    assert solution.statuses == (Status.SOLVED,) * 3
    P = case.problem.structure.quadratic.to_dense(case.problem.symmetric_P)[1]
    free = torch.linalg.solve(P, -data.q[1])
    torch.testing.assert_close(solution.x[1], free, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(solution.x[[0, 2]], case.point.x[[0, 2]], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
def test_data_are_not_modified(solver: ConicSolver) -> None:
    for case in supported(solver):
        before = [datum.clone() for datum in case.problem.data]
        solver.solve(case.problem)
        for old, new in zip(before, case.problem.data, strict=True):
            assert torch.equal(old, new)


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("name", ["qp", "qp, batched matrices"])
def test_executors_agree_in_order(solver: ConicSolver, name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    serial = solver.solve(case.problem, executor=SerialExecutor())
    with ThreadPoolExecutor(2) as threads:
        threaded = solver.solve(case.problem, executor=threads)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        remote = solver.solve(case.problem, executor=processes)
    for other in (threaded, remote, solver.solve(case.problem)):
        assert other.statuses == serial.statuses
        torch.testing.assert_close(other.x, serial.x, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
def test_a_batch_of_none(solver: ConicSolver) -> None:
    case = next(case for case in CASES if case.name == "qp")
    solution = solver.solve(case.problem.select(torch.zeros(0, dtype=torch.int64)))
    assert solution.x.shape == (0, 8)
    assert solution.statuses == ()
    assert solution.residuals.worst.shape == (0,)


EXACT = [DAQP(), HiGHS()]


@pytest.mark.parametrize("solver", BY_NAME.values(), ids=BY_NAME)
def test_bounds_that_meet_fix_a_variable_and_crossed_ones_are_infeasible(solver: ConicSolver) -> None:
    eye = SparsityPattern.from_matrix(np.eye(2))
    structure = ConicStructure(eye, SparsityPattern.dense(1, 2), Cones(nonnegative=1), np.arange(2), np.arange(2))
    lower = torch.tensor([[0.0, 0.25], [0.0, 0.75]], dtype=torch.float64)
    upper = torch.tensor([[1.0, 0.25], [1.0, 0.25]], dtype=torch.float64)
    q, one = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    data = ConicData(one, q, one, one[:1], lower, upper)
    solution = solver.solve(ConicProblem(structure, data, 2))
    assert solution.statuses == (Status.SOLVED, Status.INFEASIBLE)
    torch.testing.assert_close(solution.x[0], torch.tensor([0.75, 0.25]).double(), atol=1e-5, rtol=0)
    # x_1 + x_2 <= 1 is active: y = 1 - x_1, and z_2 = -(x_2 + 0.5 + y) pushes against the lower end.
    torch.testing.assert_close(solution.y[0], torch.tensor([0.25]).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(solution.z[0], torch.tensor([0.0, -1.0]).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", [one for one in BY_NAME.values() if one.capabilities.quadratic], ids=repr)
def test_two_matrices_of_rows_beside_four_of_curvatures(solver: ConicSolver) -> None:
    # min ½ c |x|² over a x = 1, x >= 0 is at a / |a|², whatever c is.
    eye = SparsityPattern.from_matrix(np.eye(2))
    structure = ConicStructure(eye, SparsityPattern.dense(1, 2), Cones(zero=1), np.arange(2))
    A = torch.tensor([[1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    P = torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, 1.0], [4.0, 4.0]], dtype=torch.float64)
    zero, nothing = torch.zeros(2, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    for curvatures in (P[:2], P):  # the second time with matrices that are known
        data = ConicData(curvatures, zero, A, zero[:1] + 1.0, zero, nothing)
        solution = solver.solve(ConicProblem(structure, data, len(curvatures)))
        expected = (A / (A * A).sum(1, keepdim=True)).repeat(len(curvatures) // 2, 1)
        torch.testing.assert_close(solution.x, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("solver", [DAQP(), ECOS(), OSQP()], ids=repr)
def test_an_objective_that_is_not_convex_is_one_elements_failure(solver: ConicSolver) -> None:
    pattern = SparsityPattern.from_matrix(np.eye(2))
    structure = ConicStructure(pattern, SparsityPattern.dense(1, 2), Cones(zero=1))
    P = torch.tensor([[1.0, 1.0], [1.0, -2.0], [2.0, 2.0]], dtype=torch.float64)
    one, nothing = torch.ones(2, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    solution = solver.solve(ConicProblem(structure, ConicData(P, 0 * one, one, one[:1], nothing, nothing), 3))
    assert solution.statuses == (Status.SOLVED, Status.NOT_CONVEX, Status.SOLVED)
    torch.testing.assert_close(solution.x[[0, 2]], torch.full((2, 2), 0.5).double(), atol=1e-6, rtol=0)


def test_failures_are_reported_by_element_with_advice() -> None:
    solution = Clarabel().solve(box([[1.0, 2.0]] * 3, [[1.0], [-1.0], [-2.0]]))
    with pytest.raises(SolverError, match=r"elements 1, 2 of 3: INFEASIBLE — no point satisfies") as raised:
        check_solution(solution, "raise")
    assert raised.value.indices == (1, 2)
    assert raised.value.statuses == solution.statuses
    copy = pickle.loads(pickle.dumps(raised.value))
    assert (copy.indices, copy.statuses, str(copy)) == ((1, 2), solution.statuses, str(raised.value))
    with pytest.warns(LpgdWarning, match="INFEASIBLE"):
        check_solution(solution, "warn")


def test_a_solvers_word_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    # A solver that says "solved" of a point that is a little away: the residuals say otherwise.
    case = next(case for case in CASES if case.name == "qp")
    made = type(Clarabel().prepare(RowForm(_matrices(case))))
    honest, wrong = made.solve, 0.003

    def lie(self: Any, vectors: Any, state: Any) -> Any:
        outcome = honest(self, vectors, state)
        return outcome._replace(point=outcome.point._replace(x=outcome.point.x + wrong))

    monkeypatch.setattr(made, "solve", lie)
    solution = Clarabel(rescue=False).solve(case.problem)
    assert solution.statuses == (Status.INACCURATE,) * 3
    with pytest.warns(LpgdWarning, match="less accurately than requested"):
        check_solution(solution, "raise")
    rescued = Clarabel().solve(case.problem)
    assert rescued.statuses == (Status.SOLVED,) * 3
    assert rescued.rescued == {"DAQP": 3}
    torch.testing.assert_close(rescued.x, case.point.x, atol=1e-6, rtol=0)


def _matrices(case: Case) -> Matrices:
    data = case.problem.data
    return Matrices(case.problem.structure, data.P.numpy(), data.A.numpy(), np.ones(4, bool), np.ones(3, bool))
