"""What a status is worth: certificates, the rescue chain, convexity, and bounds that cross by rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import lpgd
from lpgd import SCS, Clarabel, LpgdWarning, Status, solve_qp
from lpgd.cones.product import Cones
from lpgd.cones.projections import project
from lpgd.problems import ConicData, ConicProblem, ConicStructure, SparsityPattern
from lpgd.solvers import ConicSolver
from lpgd.solvers.conic.certificates import proves_infeasible, proves_unbounded
from lpgd.solvers.conic.convexity import is_convex
from tests.problem_table import CASES
from tests.test_solvers import BY_NAME, LARGE, box

QP_SOLVERS: list[Any] = [None, *BY_NAME]
EVERY_CONE = Cones(2, 3, (3,), (2,), 1, 1, (0.4, -0.7))


def qp_solver(name: str | None) -> ConicSolver | None:
    return None if name is None else BY_NAME[name]


def conic(P: np.ndarray, q: np.ndarray, A: np.ndarray, b: np.ndarray, cones: Cones) -> ConicProblem:
    n = A.shape[1]
    structure = ConicStructure(SparsityPattern.dense(n, n), SparsityPattern.dense(*A.shape), cones)
    nothing = torch.zeros(0, dtype=torch.float64)
    values = [torch.from_numpy(np.asarray(part, dtype=np.float64)) for part in (P.T.ravel(), q, A.T.ravel(), b)]
    return ConicProblem(structure, ConicData(*values, nothing, nothing), 1)


# Certificates


def test_planted_certificates_are_proofs_and_their_neighbours_are_none() -> None:
    rng = np.random.default_rng(0)
    m, n = EVERY_CONE.rows, 6
    for _ in range(20):
        y = project(EVERY_CONE, rng.normal(size=m), dual=True)
        A = rng.normal(size=(m, n))
        A -= np.outer(y, y @ A) / (y @ y)  # Aᵀy = 0
        b = rng.normal(size=m)
        b -= y * (y @ b + 1.0) / (y @ y)  # bᵀy = -1
        infeasible = conic(np.zeros((n, n)), rng.normal(size=n), A, b, EVERY_CONE)
        assert proves_infeasible(infeasible, torch.from_numpy(y)[None]).tolist() == [True]
        feasible = conic(np.zeros((n, n)), rng.normal(size=n), A, b + 2.0 * y / (y @ y), EVERY_CONE)
        assert proves_infeasible(feasible, torch.from_numpy(y)[None]).tolist() == [False]
        assert proves_infeasible(infeasible, torch.from_numpy(y + 0.1 * rng.normal(size=m))[None]).tolist() == [False]

        d = rng.normal(size=n)
        s = project(EVERY_CONE, rng.normal(size=m))
        A = rng.normal(size=(m, n))
        A -= np.outer(A @ d + s, d) / (d @ d)  # -A d = s in K
        F = rng.normal(size=(n, n))
        F -= np.outer(F @ d, d) / (d @ d)  # F d = 0
        q = rng.normal(size=n)
        q -= d * (q @ d + 1.0) / (d @ d)  # qᵀd = -1
        unbounded = conic(F.T @ F, q, A, A @ rng.normal(size=n), EVERY_CONE)
        assert proves_unbounded(unbounded, torch.from_numpy(d)[None]).tolist() == [True]
        curved = conic(F.T @ F + 1e-3 * np.eye(n), q, A, np.zeros(m), EVERY_CONE)
        assert proves_unbounded(curved, torch.from_numpy(d)[None]).tolist() == [False]
        level = conic(F.T @ F, q + d / (d @ d), A, np.zeros(m), EVERY_CONE)
        assert proves_unbounded(level, torch.from_numpy(d)[None]).tolist() == [False]


@pytest.mark.parametrize("solver", [Clarabel(), SCS()], ids=["CLARABEL", "SCS"])
def test_infeasible_and_unbounded_cones_are_told_with_a_proof(solver: ConicSolver) -> None:
    cones, rng = (
        Cones(zero=1, nonnegative=2, second_order=(3,), semidefinite=(2,), exponential=1),
        np.random.default_rng(1),
    )
    m, n = cones.rows, 5
    y = project(cones, rng.normal(size=m), dual=True)
    A = rng.normal(size=(m, n))
    A -= np.outer(y, y @ A) / (y @ y)
    b = rng.normal(size=m)
    b -= y * (y @ b + 1.0) / (y @ y)
    solution = solver.solve(conic(np.eye(n), rng.normal(size=n), A, b, cones))
    assert solution.statuses == (Status.INFEASIBLE,)
    assert solution.proofs == ("certificate",)
    assert solution.x.isnan().all()


def test_an_infeasible_problem_with_a_descending_ray_is_infeasible() -> None:
    # min -x_2 over x_1 <= -1, x >= 0: there is no point, so that no objective falls.
    layer = lpgd.LPLayer(on_error="nan")
    G, h = torch.tensor([[1.0, 0.0]]).double(), torch.tensor([-1.0]).double()
    output = layer(c=torch.tensor([0.0, -1.0]).double(), G=G, h=h, lb=torch.zeros(2).double())
    assert output.info.statuses == (Status.INFEASIBLE,)


# The rescue chain


LAPLACIAN = torch.tensor([[3.0, -2.0, -1.0], [-2.0, 4.0, -2.0], [-1.0, -2.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", QP_SOLVERS, ids=str)
def test_laplacians_over_the_simplex_are_bounded(name: str | None) -> None:
    # The uniform distribution has the value 0, which is the least one of a positive semidefinite form.
    rng = np.random.default_rng(2)
    for n in (3, 8, 20):
        weights = np.triu(rng.random((25, n, n)) * (rng.random((25, n, n)) < 0.6), 1)
        weights += weights.transpose(0, 2, 1)
        P = torch.from_numpy(np.stack([np.diag(own.sum(1)) - own for own in weights]))
        if n == 3:
            P[0] = LAPLACIAN
        ones, zeros = torch.ones(1, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
        x, _, _, _, info = _solved(P, zeros, name, A=ones, b=ones[0, :1], lb=zeros)
        assert set(info.statuses) == {Status.SOLVED}
        assert torch.einsum("bi,bij,bj->b", x, P, x).max() < 1e-6
        torch.testing.assert_close(x.sum(1), torch.ones(25, dtype=torch.float64), atol=1e-6, rtol=0)


def _solved(P: torch.Tensor, q: torch.Tensor, name: str | None, **data: torch.Tensor) -> Any:
    output = solve_qp(P, q, **data, solver=qp_solver(name), on_error="nan")
    return output.x, None, None, None, output.info


def test_another_solver_answers_and_is_on_record() -> None:
    # Two iterations of SCS are too far from a solution for Newton's steps.
    problem = LARGE.problem
    alone = SCS(max_iterations=2, rescue=False).solve(problem)
    assert alone.statuses == (Status.ITERATION_LIMIT,) * 3
    solution = SCS(max_iterations=2).solve(problem)
    assert solution.statuses == (Status.SOLVED,) * 3
    assert solution.asked == "SCS"
    assert solution.rescued == {"CLARABEL": 3}
    torch.testing.assert_close(solution.objective, problem.objective(LARGE.point.x), atol=0, rtol=1e-6)
    assert solution.select(torch.tensor([1])).solvers == ("CLARABEL",)


def test_newtons_steps_finish_what_a_solver_left() -> None:
    case = next(case for case in CASES if case.name == "socp")
    solution = Clarabel(max_iterations=6, rescue=False).solve(case.problem)
    assert solution.statuses == (Status.SOLVED,) * 3
    assert solution.refined is not None
    assert solution.known_to is not None
    assert (solution.refined > 0).all()
    assert solution.known_to.max() < 1e-12
    torch.testing.assert_close(solution.x, case.point.x, atol=1e-10, rtol=0)


def test_a_verdict_that_nobody_shares_is_none() -> None:
    def wrong(*_: Any) -> Status:
        return Status.UNBOUNDED

    problem = box([[1.0, 4.0]], curvature=1.0)
    alone = lpgd.CustomSolver(wrong, rescue=False).solve(problem)
    assert alone.statuses == (Status.NUMERICAL_ERROR,)
    rescued = lpgd.CustomSolver(wrong).solve(problem)
    assert rescued.statuses == (Status.SOLVED,)


# Convexity


@pytest.mark.parametrize("name", QP_SOLVERS, ids=str)
def test_an_indefinite_objective_is_refused_for_its_element_alone(name: str | None) -> None:
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(6, 5, 5))
    P = torch.from_numpy(factors @ factors.transpose(0, 2, 1) / 5)
    P[1] -= 0.5 * torch.eye(5)
    P[4] = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0]))
    ones = torch.ones(5, dtype=torch.float64)
    output = solve_qp(P, ones, lb=-ones, ub=ones, solver=qp_solver(name), on_error="nan")
    expected = [Status.NOT_CONVEX if torch.linalg.eigvalsh(own)[0] < -1e-3 else Status.SOLVED for own in P]
    assert list(output.info.statuses) == expected
    assert expected.count(Status.NOT_CONVEX) >= 2
    with pytest.raises(lpgd.SolverError, match="NOT_CONVEX"):
        solve_qp(P, ones, solver=qp_solver(name))


def test_convexity_is_judged_with_the_precision_that_P_came_in() -> None:
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0]

    def convex(least: float, dtype: type) -> bool:
        P = (basis * np.array([least, 0, 0, 1, 2, 5, 9, 14.0])) @ basis.T
        P = (0.5 * (P + P.T)).astype(dtype).astype(np.float64)
        structure = ConicStructure(SparsityPattern.dense(8, 8), SparsityPattern.empty(0, 8), Cones())
        nothing, zeros = torch.zeros(0, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
        data = ConicData(torch.from_numpy(P.ravel()), zeros, nothing, nothing, nothing, nothing)
        return bool(is_convex(ConicProblem(structure, data, 1)))

    assert convex(0.0, np.float64)
    assert convex(0.0, np.float32)
    assert convex(-1.5e-7, np.float32)
    assert not convex(-1e-3, np.float32)
    assert not convex(-1e-5, np.float64)


def test_large_sparse_objectives_are_judged_by_their_pivots() -> None:
    n = 2000
    second = np.arange(n - 1)
    rows = np.concatenate([np.arange(n), second, second + 1])
    columns = np.concatenate([np.arange(n), second + 1, second])
    order = np.lexsort((rows, columns))
    pattern = SparsityPattern((n, n), rows[order], columns[order])
    structure = ConicStructure(pattern, SparsityPattern.empty(0, n), Cones())
    nothing, zeros = torch.zeros(0, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for diagonal, expected in ((2.0, True), (1.9, False)):  # the eigenvalues are diagonal - 2 cos(k π / (n + 1))
        values = np.concatenate([np.full(n, diagonal), np.full(2 * (n - 1), -1.0)])[order]
        data = ConicData(torch.from_numpy(values), zeros, nothing, nothing, nothing, nothing)
        assert bool(is_convex(ConicProblem(structure, data, 1))) is expected


# Bounds


@pytest.mark.parametrize("name", QP_SOLVERS, ids=str)
def test_bounds_that_cross_by_rounding_are_equal(name: str | None) -> None:
    P, q = torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    third = 0.1 + 0.2
    lower = torch.tensor([[third, -1.0], [np.nextafter(0.3, 1), -1.0], [0.3 + 1e-6, -1.0]], dtype=torch.float64)
    upper = torch.tensor([[third, 1.0], [0.3, 1.0], [0.3, 1.0]], dtype=torch.float64)
    output = solve_qp(
        P, q, G=torch.tensor([[1.0, 0.0]]).double(), h=torch.tensor([0.3], dtype=torch.float64), lb=lower, ub=upper,
        solver=qp_solver(name), on_error="nan",
    )  # fmt: skip
    assert output.info.statuses == (Status.SOLVED, Status.SOLVED, Status.INFEASIBLE)
    torch.testing.assert_close(output.x[:2], torch.tensor([[0.3, -1.0]] * 2).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", QP_SOLVERS, ids=str)
@pytest.mark.parametrize("far", [1e20, 1e25, torch.inf])
def test_bounds_of_1e20_and_beyond_are_infinite(name: str | None, far: float) -> None:
    P, q = torch.eye(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5]).double()
    bound = torch.tensor([far, far, 0.25]).double()
    output = solve_qp(P, q, lb=-bound, ub=bound, solver=qp_solver(name))
    torch.testing.assert_close(output.x, torch.tensor([-1.0, 2.0, -0.25]).double(), atol=2e-6, rtol=0)


def test_what_is_not_finite_or_far_off_is_no_solution() -> None:
    def infinite(P: Any, q: Any, *_: Any) -> Any:
        return np.full(q.size, 1e308), np.full(1, np.inf), np.zeros(q.size)

    def rough(P: Any, q: Any, *_: Any) -> Any:
        return np.array([0.7, 0.3]), np.zeros(1), np.zeros(2)

    for function in (infinite, rough):
        solver = lpgd.CustomSolver(function, rescue=False)
        assert solver.solve(box([[1.0, 4.0]], curvature=1.0)).statuses == (Status.NUMERICAL_ERROR,)
    layer = lpgd.QPLayer(solver=lpgd.CustomSolver(rough))
    eye, cost, ones = torch.eye(2).double(), torch.tensor([1.0, 4.0]).double(), torch.ones(1, 2).double()
    with pytest.warns(LpgdWarning, match="CUSTOM left 1 of 1 elements"):
        layer(P=eye, q=cost, A=ones, b=ones[0, :1], lb=0.0 * cost)
