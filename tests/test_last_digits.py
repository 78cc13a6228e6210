"""What a user sees of refinement: residuals at rounding, and derivatives that pass strict finite differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

import lpgd
from lpgd.solvers import SOLVERS, ConicSolver
from lpgd.solvers.kkt.refinement import optimality_residual
from tests.accuracy import draw
from tests.layer_cases import normal
from tests.problem_table import REGULAR, Case

Built = tuple[lpgd.CvxpyLayer, list[Tensor]]

SUPPORTED = [
    pytest.param(case, kind(), id=f"{case}-{kind.name}")
    for case in REGULAR
    for kind in SOLVERS
    if kind.is_installed() and not kind().unsupported(case.problem.structure)
]


QP_SOLVERS, CONE_SOLVERS = (
    [case.values[1].name for case in SUPPORTED if case.values[0].name == name] for name in ("qp", "socp")
)
LP_SOLVERS = sorted({*lpgd.available()} - {"SCS", "OSQP", "PROXQP"})  # methods of first order take seconds, or refuse


@pytest.mark.parametrize(("case", "solver"), SUPPORTED)
def test_every_solution_of_a_regular_problem_leaves_nothing_but_rounding(case: Case, solver: ConicSolver) -> None:
    solution = solver.solve(case.problem)
    assert solution.statuses == (lpgd.Status.SOLVED,) * case.problem.batch_size
    point, slack = solution.point, solution.slack
    size = max(1.0, float(point.largest().max()))
    assert float(optimality_residual(case.problem, point, slack).max()) <= 1e-12 * size
    assert solution.known_before is not None
    assert solution.known_to is not None
    assert bool((solution.known_to <= solution.known_before).all())
    torch.testing.assert_close(point.x, case.point.x, atol=1e-10, rtol=0)


@pytest.mark.parametrize("redundant", [False, True])
@pytest.mark.parametrize("solver", QP_SOLVERS)
def test_larger_dense_programs_are_refined_as_well(solver: str, redundant: bool) -> None:
    n, rows, active = 200, 150, 60
    rng = np.random.default_rng(0)
    root, G, x = rng.normal(size=(n, n)), rng.normal(size=(rows, n)), rng.normal(size=n)
    P, y = root @ root.T / n + 0.1 * np.eye(n), np.where(np.arange(rows) < active, rng.uniform(0.5, 1.5, rows), 0.0)
    h = G @ x + np.where(y > 0, 0.0, rng.uniform(0.5, 1.5, rows))
    q = -(P @ x + G.T @ y)
    if redundant:
        G, h = np.concatenate([G, G[:10]]), np.concatenate([h, h[:10]])
    output = lpgd.QPLayer(solver)(*map(torch.from_numpy, (P, q)), G=torch.from_numpy(G), h=torch.from_numpy(h))
    torch.testing.assert_close(output.x, torch.from_numpy(x), atol=1e-11, rtol=0)


@pytest.mark.parametrize("solver", ["SCS", "OSQP"])
def test_larger_ill_conditioned_programs_are_right_by_methods_of_first_order(solver: str) -> None:
    n, count = 200, 4
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(count, n, n)))
    P = basis @ (np.logspace(-7, 0, n)[:, None] * basis.swapaxes(1, 2))
    G, x = rng.normal(size=(count, n, n)), rng.normal(size=(count, n))
    y = np.where(np.arange(n) < 30, rng.uniform(0.5, 1.5, (count, n)), 0.0)
    values, slope = (G @ x[..., None])[..., 0], (P @ x[..., None] + G.swapaxes(1, 2) @ y[..., None])[..., 0]
    h = values + np.where(y > 0, 0.0, rng.uniform(0.5, 1.5, (count, n)))
    data = {"P": (P + P.swapaxes(1, 2)) / 2, "q": -slope, "G": G, "h": h}
    found = lpgd.QPLayer(solver)(**{name: torch.from_numpy(array) for name, array in data.items()})
    record = found.info.solution  # what SCS and OSQP leave in doubt is taken from Clarabel, without a warning
    assert [name == "CLARABEL" for name in record.solvers] == record.sharpened.tolist()
    assert record.sharpened.any()
    assert not record.rescued
    torch.testing.assert_close(found.x, torch.from_numpy(x), atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", LP_SOLVERS)
def test_vertices_of_larger_linear_programs_are_refined_as_well(solver: str) -> None:
    n, rows, active = 250, 100, 40
    rng = np.random.default_rng(0)
    G, y = rng.normal(size=(rows, n)), np.where(np.arange(rows) < active, rng.uniform(0.5, 1.5, rows), 0.0)
    x = np.where(np.arange(n) < active, rng.uniform(0.2, 0.8, n), rng.integers(0, 2, n))
    z = np.where(np.arange(n) < active, 0.0, (2 * x - 1) * rng.uniform(0.5, 1.5, n))
    h, c = G @ x + np.where(y > 0, 0.0, rng.uniform(0.5, 1.5, rows)), -(G.T @ y + z)
    found = lpgd.LPLayer(solver)(torch.from_numpy(c), G=torch.from_numpy(G), h=torch.from_numpy(h), lb=0.0, ub=1.0)
    torch.testing.assert_close(found.x, torch.from_numpy(x), atol=1e-12, rtol=0)


def test_a_membrane_on_a_grid_is_refined_as_well() -> None:
    side = 120
    fall = scipy.sparse.diags([1.0, -1.0], [0, 1], shape=(side, side))
    line, still = fall.T @ fall, scipy.sparse.eye(side)
    P = (scipy.sparse.kron(line, still) + scipy.sparse.kron(still, line) + 0.1 * scipy.sparse.eye(side**2)).tocoo()
    rng = np.random.default_rng(0)
    touches = rng.random(side**2) < 0.3
    x = np.where(touches, -0.1, rng.uniform(0.0, 1.0, side**2))
    q = -(P @ x) + np.where(touches, rng.uniform(0.1, 1.0, side**2), 0.0)
    matrix = torch.sparse_coo_tensor(np.stack([P.row, P.col]), P.data, P.shape, check_invariants=True)
    found = lpgd.QPLayer()(matrix, torch.from_numpy(q), lb=-0.1)
    torch.testing.assert_close(found.x, torch.from_numpy(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("solver", [None, "CLARABEL", "SCS"])
def test_programs_that_are_neither_dense_nor_sparse_are_refined_as_well(solver: str | None) -> None:
    n, rows = 150, 250
    rng = np.random.default_rng(0)
    F = rng.normal(size=(rows, n)) * (rng.random((rows, n)) < 0.1)
    x = np.where(rng.random(n) < 0.8, rng.normal(size=n), 0.0)
    slope = np.where(x != 0, np.sign(x), rng.uniform(-0.9, 0.9, n))
    wanted, observed = cp.Variable(n), cp.Parameter(rows)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(F @ wanted - observed) + 0.5 * cp.norm1(wanted)))
    data = torch.from_numpy(F @ (x + np.linalg.solve(F.T @ F, 0.5 * slope))).requires_grad_()
    (found,) = lpgd.CvxpyLayer(problem, [observed], [wanted], solver=solver)(data)
    torch.testing.assert_close(found.detach(), torch.from_numpy(x), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(found.sum(), data)
    columns = F[:, x != 0]  # where x moves: least squares on its support
    expected = columns @ np.linalg.solve(columns.T @ columns, np.ones(columns.shape[1]))
    torch.testing.assert_close(gradient, torch.from_numpy(expected), atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", sorted({"CLARABEL", "PIQP", "INTERIOR"} & {*lpgd.available()}))
def test_active_sets_that_interior_points_leave_in_doubt_are_found_by_others(solver: str) -> None:
    """Along a chain in units from 0.1 to 10 some multipliers are 1e-5 of the others."""
    n, rows, count = 300, 150, 4
    rng = np.random.default_rng(0)
    units = scipy.sparse.diags(10 ** rng.uniform(-1, 1, n))
    steps = rng.uniform(-0.4, 0.4, n - 1)
    P = (units @ scipy.sparse.diags([steps, rng.uniform(1, 2, n), steps], [-1, 0, 1]) @ units).tocoo()
    columns = np.stack([first + rng.choice(8, 4, replace=False) for first in np.linspace(0, n - 9, rows).astype(int)])
    G = np.zeros((rows, n))
    np.put_along_axis(G, columns, rng.normal(size=(rows, 4)), 1)
    x = rng.normal(size=(count, n))
    tight = rng.random((count, rows)) < 0.4
    sizes = 10 ** rng.uniform(-6, 0, (count, rows))
    h = x @ G.T + np.where(tight, 0.0, sizes)
    q = -(x @ P.toarray() + np.where(tight, sizes, 0.0) @ G)
    places = torch.from_numpy(np.stack([P.row, P.col]))
    matrix = torch.sparse_coo_tensor(places, torch.from_numpy(P.data), P.shape, check_invariants=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lpgd.LpgdWarning)  # that others were asked
        found = lpgd.QPLayer(solver)(
            matrix, torch.from_numpy(q), G=torch.from_numpy(G).to_sparse(), h=torch.from_numpy(h)
        )
    torch.testing.assert_close(found.x, torch.from_numpy(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", CONE_SOLVERS)
def test_larger_cones_are_refined_as_well(solver: str) -> None:
    n = 320
    x, c, F = cp.Variable(n), cp.Parameter(n), cp.Parameter((n, n))
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [cp.norm(F @ x) <= 1]), [c, F], [x], solver=solver)
    costs, root = normal(n), normal(n, n, seed=1) / n**0.5 + 2 * torch.eye(n).double()
    (found,) = layer(costs, root)
    way = torch.linalg.solve(root.mT, costs)
    torch.testing.assert_close(found, -torch.linalg.solve(root, way / way.norm()), atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ["qp", "socp", "exponential", "sdp"])
def test_an_answer_at_the_iteration_limit_that_refines_to_rounding_is_solved(name: str) -> None:
    case = next(case for case in REGULAR if case.name == name)
    rough, fine = (
        lpgd.SCS(max_iterations=60, rescue=False, refine=wanted).solve(case.problem) for wanted in (False, True)
    )
    assert lpgd.Status.ITERATION_LIMIT in rough.statuses
    assert fine.statuses == (lpgd.Status.SOLVED,) * case.problem.batch_size
    torch.testing.assert_close(fine.x, case.point.x, atol=1e-10, rtol=0)


class Programs(NamedTuple):
    """Convex programs of one kind each as a layer, and data for it."""

    @staticmethod
    def entropy(**options: Any) -> Built:
        x, c = cp.Variable(4), cp.Parameter(4)
        constraints: list[Any] = [cp.sum(x) == 1]
        problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) - c @ x), constraints)
        return lpgd.CvxpyLayer(problem, [c], [x], **options), [normal(4)]

    @staticmethod
    def log_sum_exp(**options: Any) -> Built:
        x, A, b = cp.Variable(3), cp.Parameter((4, 3)), cp.Parameter(4)
        problem = cp.Problem(cp.Minimize(cp.log_sum_exp(A @ x + b) + 0.5 * cp.sum_squares(x)))
        return lpgd.CvxpyLayer(problem, [A, b], [x], **options), [normal(4, 3), normal(4, seed=1)]

    @staticmethod
    def logistic(**options: Any) -> Built:
        w, X = cp.Variable(3), cp.Parameter((6, 3))
        problem = cp.Problem(cp.Minimize(cp.sum(cp.logistic(X @ w)) + 0.5 * cp.sum_squares(w)))
        return lpgd.CvxpyLayer(problem, [X], [w], **options), [normal(6, 3)]

    @staticmethod
    def geometric(**options: Any) -> Built:
        x, a = cp.Variable(3, pos=True), cp.Parameter(3, pos=True)
        problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(a, x)) + 1 / (x[0] * x[1] * x[2])), [x[0] * x[1] <= 0.5])
        return lpgd.CvxpyLayer(problem, [a], [x], gp=True, **options), [normal(3).abs() + 0.5]

    @staticmethod
    def semidefinite(**options: Any) -> Built:
        X, C = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3))
        constraints: list[Any] = [cp.trace(X) == 1]
        problem = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), constraints)
        return lpgd.CvxpyLayer(problem, [C], [X], **options), [normal(3, 3)]

    @staticmethod
    def power(**options: Any) -> Built:
        x, c = cp.Variable(3), cp.Parameter(3)
        constraints: list[Any] = [cp.sum(x) == 1]
        problem = cp.Problem(cp.Minimize(cp.sum(cp.power(cp.abs(x - c), 2.5)) + cp.sum(x)), constraints)
        return lpgd.CvxpyLayer(problem, [c], [x], **options), [normal(3)]

    @staticmethod
    def second_order(**options: Any) -> Built:
        x, c, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(pos=True)
        problem = cp.Problem(cp.Minimize(c @ x + 0.5 * cp.sum_squares(x)), [cp.norm(x) <= r])
        return lpgd.CvxpyLayer(problem, [c, r], [x], **options), [3 * normal(3), torch.tensor(0.7, dtype=torch.float64)]

    @staticmethod
    def quadratic(**options: Any) -> Built:
        x, q, A, b = cp.Variable(4), cp.Parameter(4), cp.Parameter((2, 4)), cp.Parameter(2)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + q @ x), [A @ x <= b, x >= -0.5])
        return lpgd.CvxpyLayer(problem, [q, A, b], [x], **options), [normal(4), normal(2, 4, seed=1), normal(2).abs()]


BUILD: dict[str, Callable[..., Built]] = {
    name: getattr(Programs, name)
    for name in (
        "entropy", "log_sum_exp", "logistic", "geometric", "semidefinite", "power", "second_order", "quadratic",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", BUILD)
def test_gradcheck_passes_with_its_default_arguments(name: str) -> None:
    layer, tensors = BUILD[name]()
    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *data: layer(*data)[0], tensors)


@pytest.mark.parametrize("name", BUILD)
def test_chosen_steps_of_lpgd_give_the_exact_gradient(name: str) -> None:
    gradients = []
    for method in (lpgd.LPGD(), lpgd.ImplicitKKT()):
        layer, tensors = BUILD[name](gradient=method)
        for tensor in tensors:
            tensor.requires_grad_()
        (x,) = layer(*tensors)
        (normal(*x.shape, seed=3) * x).sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for own, exact in zip(*gradients, strict=True):
        assert own is not None
        assert exact is not None
        np.testing.assert_allclose(own, exact, rtol=1e-6, atol=1e-6 * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("solver", ["INTERIOR", "CLARABEL", "PIQP", "HIGHS"])
def test_nearly_parallel_rows_take_as_many_steps_as_they_need(solver: str) -> None:
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(12):  # of the first ones, a program whose point three steps leave off by 4 %
        programs = draw(rng, "nearly parallel rows", "LP")
        layer = lpgd.ConicLayer(programs.plan.cones, solver)
        solution = layer.solve(None, *(torch.from_numpy(data) for data in (programs.q, programs.A, programs.b)))
        error = np.abs(solution.x.numpy() - programs.x).max(1) / np.abs(programs.x).max(1)
        worst = max(worst, float(error[solution.usable.numpy()].max(initial=0.0)))
    assert worst < 1e-6  # the condition of their active rows is up to 4e9


def test_a_landing_on_least_fuel_has_stages_without_thrust() -> None:
    # With the costate p_t, a chord of the unit ball between stages 16 and 42, thrust is none where |p_t| < 1, the
    # largest along p_t where |p_t| > 1, and along p_t of any size at the chord's ends.  An interior-point method's
    # 1e-3 instead of none is on no face of the cones, and Newton's method finds none from there.
    stages, first, last, largest, duration = 60, 16, 42, 18.0, 0.15
    gravity = np.array([0.0, 0.0, -9.8])
    ends = np.array([[-0.2, -0.3, 1.0], [-0.22, -0.25, 1.0]])
    ends /= np.linalg.norm(ends, axis=1, keepdims=True)
    costate = ends[0] + (np.arange(stages)[:, None] - first) / (last - first) * (ends[1] - ends[0])
    size = np.linalg.norm(costate, axis=1, keepdims=True)
    thrust = np.where(size > 1.0, largest * costate / size, 0.0)
    thrust[first], thrust[last] = 5.7 * ends[0], 8.9 * ends[1]
    speed, place = np.zeros(3), np.zeros(3)
    for stage in reversed(range(stages)):
        before = speed - duration * (thrust[stage] + gravity)
        speed, place = before, place - 0.5 * duration * (speed + before)

    p, v, u = (cp.Variable((stages + count, 3)) for count in (1, 1, 0))
    p0, v0 = cp.Parameter(3), cp.Parameter(3)
    moves: list[Any] = [
        v[1:] == v[:-1] + duration * (u + gravity[None]),
        p[1:] == p[:-1] + 0.5 * duration * (v[1:] + v[:-1]),
    ]
    limits: list[Any] = [p[0] == p0, v[0] == v0, p[stages] == 0, v[stages] == 0, cp.norm(u, 2, axis=1) <= largest]
    problem = cp.Problem(cp.Minimize(cp.sum(cp.norm(u, 2, axis=1))), moves + limits)
    layer = lpgd.CvxpyLayer(problem, [p0, v0], [u])
    at = torch.tensor(place, requires_grad=True), torch.tensor(speed, requires_grad=True)
    (found,) = layer(*at)
    np.testing.assert_allclose(found.detach().numpy(), thrust, atol=1e-8)
    # What the landing costs changes with p₀ as the costate does in a unit of time, with v₀ as it is at the beginning.
    gradients = torch.autograd.grad(found.norm(dim=1)[found.detach().norm(dim=1) > 1e-6].sum(), at)
    slope = costate[1] - costate[0]
    np.testing.assert_allclose(gradients[0].numpy(), slope / duration**2, rtol=1e-6)
    np.testing.assert_allclose(gradients[1].numpy(), -(costate[0] - 0.5 * slope) / duration, rtol=1e-6)
