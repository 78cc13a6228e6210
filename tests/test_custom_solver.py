"""Solvers of the user's own: against finite differences, implicit differentiation, and with their mistakes."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

import lpgd
from lpgd import LPGD, ImplicitKKT, SerialExecutor, Status
from lpgd.cones.product import Cones
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern
from lpgd.solvers import choose_solver
from lpgd.solvers.failures import check_solution
from lpgd.status import SolverError
from tests.problem_table import CASES, Case, planted
from tests.test_gradients import inner, moved, norm, random_cotangent, random_tangent

LP = next(case for case in CASES if case.name == "lp")
QP = next(case for case in CASES if case.name == "qp")
SOCP = next(case for case in CASES if case.name == "socp")


def linprog(P: Any, q: Any, A: Any, row_lower: Any, row_upper: Any, lower: Any, upper: Any) -> Any:
    """SciPy's simplex: its marginals are derivatives of the optimal value, so multipliers with the other sign."""
    equal, rows = row_lower == row_upper, A.tocsr()
    result = scipy.optimize.linprog(
        q, rows[~equal], row_upper[~equal], rows[equal], row_upper[equal], np.stack([lower, upper], 1)
    )
    if result.status:
        return {2: Status.INFEASIBLE, 3: Status.UNBOUNDED}.get(result.status, Status.NUMERICAL_ERROR)
    y = np.empty(equal.size)
    y[equal], y[~equal] = -result.eqlin.marginals, -result.ineqlin.marginals
    return result.x, y, -result.lower.marginals - result.upper.marginals


def quadprog(P: Any, q: Any, A: Any, row_lower: Any, row_upper: Any, lower: Any, upper: Any) -> Any:
    """DAQP by its own interface, which returns x alone here."""
    import daqp

    sense = np.concatenate([np.zeros(q.size, np.int32), np.where(row_lower == row_upper, 5, 0).astype(np.int32)])
    ends = np.concatenate([upper, row_upper]), np.concatenate([lower, row_lower])
    return daqp.solve(P.toarray(), q, A.toarray(), *ends, sense, primal_tol=1e-10)[0]


def clarabel_conic(P: Any, q: Any, A: Any, b: Any, cones: Cones) -> Any:
    """Clarabel by its own interface."""
    import clarabel
    import scipy.sparse as sp

    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    blocks = [clarabel.ZeroConeT(cones.zero), clarabel.NonnegativeConeT(cones.nonnegative)]
    blocks += [clarabel.SecondOrderConeT(size) for size in cones.second_order]
    result = clarabel.DefaultSolver(sp.triu(P, format="csc"), q, A, b, blocks, settings).solve()
    return np.array(result.x), np.array(result.z), np.array(result.s)


SIMPLEX = lpgd.CustomSolver(linprog, quadratic=False, tolerance=1e-10)
QUADRATIC = lpgd.CustomSolver(quadprog, tolerance=1e-9)
CONIC = lpgd.CustomSolver(clarabel_conic, "conic", cones=frozenset({"zero", "nonnegative", "second_order"}))
TABLE = [(SIMPLEX, LP, 1e-8), (QUADRATIC, QP, 1e-8), (CONIC, SOCP, 1e-5)]
IDS = ["linprog", "x alone", "conic"]


@pytest.mark.parametrize(("solver", "case", "error"), TABLE, ids=IDS)
def test_solutions_are_the_planted_ones(solver: lpgd.CustomSolver, case: Case, error: float) -> None:
    solution = solver.solve(case.problem)
    assert solution.statuses == (Status.SOLVED,) * 3
    for name in ("x", "y", "z"):
        torch.testing.assert_close(getattr(solution, name), getattr(case.point, name), atol=error, rtol=error)


@pytest.mark.parametrize(("solver", "case", "error"), TABLE, ids=IDS)
def test_gradients_of_every_datum_equal_finite_differences(solver: lpgd.CustomSolver, case: Case, error: float) -> None:
    # No derivative was written: of losses on x, y and z with respect to all data, by LPGD and by ImplicitKKT.
    solution, cotangent, step = solver.solve(case.problem), random_cotangent(case), 1e-4
    names = [name for name, size in case.problem.structure.sizes._asdict().items() if size]
    for method in (LPGD(), ImplicitKKT()):
        gradient, _ = method.vjp(solution, cotangent, solver, SerialExecutor())
        for seed, name in enumerate(names):
            tangent = random_tangent(case.problem, name, seed)
            ends = [solver.solve(moved(case.problem, tangent, sign * step)).point for sign in (1.0, -1.0)]
            expected = inner(cotangent, ends[0].minus(ends[1])) / (2 * step)
            scale = max(abs(expected), norm((getattr(gradient, name),)))
            assert inner(gradient, tangent) == pytest.approx(expected, abs=2e-3 * scale + 1e-5), (method, name)


def test_it_solves_a_layers_problems() -> None:
    import cvxpy as cp

    x, c = cp.Variable(4), cp.Parameter(4)
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, cp.sum(x) == 1])
    costs = torch.tensor([[1.0, 0.5, 2.0, 3.0], [0.1, 2.0, 0.3, 0.05]], dtype=torch.float64, requires_grad=True)
    layer = lpgd.CvxpyLayer(problem, parameters=[c], variables=[x], solver=SIMPLEX, gradient=LPGD(tau=2.0))
    (solution,) = layer(costs)
    torch.testing.assert_close(solution, torch.eye(4).double()[[1, 3]], atol=1e-12, rtol=0)
    (solution * torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)).sum().backward()
    # By hand: c + τ g makes vertex 0 cheapest in both, c - τ g leaves them: (e_0 - e_old) / 2τ.
    expected = (torch.eye(4)[[0, 0]] - torch.eye(4)[[1, 3]]).double() / 4
    torch.testing.assert_close(costs.grad, expected, atol=1e-12, rtol=0)


def test_what_it_cannot_solve_is_refused() -> None:
    with pytest.raises(ValueError, match="takes linear objectives only"):
        SIMPLEX.solve(QP.problem)
    with pytest.raises(ValueError, match="takes linear objectives only"):
        LPGD(1.0, rho=0.1).vjp(SIMPLEX.solve(LP.problem), random_cotangent(LP), SIMPLEX)
    with pytest.raises(ValueError, match="no second-order cone"):
        choose_solver(SOCP.problem.structure, QUADRATIC)
    with pytest.raises(ValueError, match="no semidefinite cone"):
        CONIC.solve(next(case for case in CASES if case.name == "sdp").problem)
    with pytest.raises(ValueError, match="cannot stop at a time limit"):
        replace(SIMPLEX, time_limit=1.0)
    with pytest.raises(ValueError, match="form is 'rows'; it must be one of interval, conic"):
        lpgd.CustomSolver(linprog, "rows")
    with pytest.raises(TypeError, match="must be callable"):
        lpgd.CustomSolver("linprog")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (None, TypeError, r"returned NoneType; it must return \(x, y, z\) or a Status"),
        ((np.zeros(8), np.zeros(9)), TypeError, r"returned tuple"),
        ((np.zeros(8), np.zeros(8), np.zeros(8)), ValueError, r"shapes \[\(8,\), \(8,\), \(8,\)\]; .* \(9,\)"),
        (Status.SOLVED, TypeError, "returned SOLVED without a solution"),
    ],
)
def test_answers_of_the_wrong_kind_are_refused(answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lpgd.CustomSolver(lambda *_: answer).solve(LP.problem)


def test_failures_are_those_of_elements_and_exceptions_go_through() -> None:
    data = LP.problem.data._replace(upper=LP.problem.data.upper.clone())
    data.upper[1] = data.lower[1] + 1e-9  # no room for the equalities
    solution = SIMPLEX.solve(replace(LP.problem, data=data))
    assert solution.statuses == (Status.SOLVED, Status.INFEASIBLE, Status.SOLVED)
    with pytest.raises(ZeroDivisionError):
        lpgd.CustomSolver(lambda *_: 1 / 0).solve(LP.problem)


def test_wrong_signs_are_noticed() -> None:
    def wrong(*problem: Any) -> Any:
        x, y, z = linprog(*problem)
        return x, -y, -z

    solution = lpgd.CustomSolver(wrong, rescue=False).solve(LP.problem)
    assert solution.statuses == (Status.NUMERICAL_ERROR,) * 3
    with pytest.raises(SolverError, match="no solution"):
        check_solution(solution, "raise")
    rescued = lpgd.CustomSolver(wrong).solve(LP.problem)
    assert sum(rescued.rescued.values()) == 3
    torch.testing.assert_close(rescued.x, LP.point.x, atol=1e-6, rtol=0)


def test_copies_executors_and_options() -> None:
    copy = pickle.loads(pickle.dumps(SIMPLEX))
    assert copy == SIMPLEX
    assert replace(copy, tolerance=1e-6).tolerance == 1e-6
    assert replace(CONIC, tolerance=1e-6).capabilities == CONIC.capabilities
    serial = SIMPLEX.solve(LP.problem)
    with ThreadPoolExecutor(2) as threads:
        assert torch.equal(replace(SIMPLEX, threads=True).solve(LP.problem, executor=threads).x, serial.x)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        assert torch.equal(copy.solve(LP.problem, executor=processes).x, serial.x)


def test_multipliers_of_an_x_alone_on_a_projection() -> None:
    # argmin ½|x - p|² over the box, clipped by hand: z = p - x, 0 inside.
    def clip(P: Any, q: Any, A: Any, row_lower: Any, row_upper: Any, lower: Any, upper: Any) -> Any:
        return np.clip(-q, lower, upper)

    n = 5
    eye = SparsityPattern.from_matrix(np.eye(n))
    structure = ConicStructure(eye, SparsityPattern.empty(0, n), Cones(), np.arange(n), np.arange(n))
    p = torch.tensor([[-1.0, 0.2, 0.5, 1.5, 0.9]], dtype=torch.float64)
    one, nothing = torch.ones(n, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    problem = ConicProblem(structure, ConicData(one, -p, nothing, nothing, 0 * one, one), 1)
    solution = lpgd.CustomSolver(clip).solve(problem)
    torch.testing.assert_close(solution.z, p - p.clamp(0, 1), atol=1e-12, rtol=0)
    cotangent = random_cotangent(planted("shape", Cones(), n, seed=0, lower=n, upper=n))
    cotangent = ConicPoint(cotangent.x[:1], cotangent.y[:1], 0 * p)
    gradient, _ = LPGD(1e-3).vjp(solution, cotangent, lpgd.CustomSolver(clip))
    inside = ((p > 0) & (p < 1)).double()
    torch.testing.assert_close(-gradient.q, cotangent.x[:1] * inside, atol=1e-9, rtol=0)
