"""Rank and activity: programs with redundant rows and cones against the same set stated once, and kinks."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

from lpgd import (
    DAQP,
    ECOS,
    LPGD,
    OSQP,
    PIQP,
    SCS,
    Clarabel,
    ConicLayer,
    CvxpyLayer,
    HiGHS,
    ImplicitKKT,
    InteriorPoint,
    LpgdWarning,
    LPLayer,
    Moreau,
    ProxQP,
    QPLayer,
    SerialExecutor,
)
from lpgd.cones.product import Cones
from lpgd.gradients.implicit import conic as implicit_conic
from lpgd.gradients.implicit import one_by_one
from lpgd.problems import ConicData, ConicPoint
from lpgd.solvers import ConicSolver
from lpgd.solvers.kkt import factor, flat, rank
from tests.redundant import Redundant, cotangent, of_single, redundant
from tests.test_refinement import ellipsoid

SOLVERS = [
    Clarabel(),
    SCS(tolerance=1e-4),
    ECOS(),
    DAQP(),
    HiGHS(),
    PIQP(),
    OSQP(),
    ProxQP(),
    InteriorPoint(),
    Moreau(),
]
SERIAL = SerialExecutor()


def exact_ellipsoid() -> np.ndarray:
    """d x₁/dp of the projection of p onto |M x| ≤ 1, from its secular equation: the tangential part of H⁻¹.

    ``x = H⁻¹ p`` with ``H = I + λ MᵀM``; ``dx = (H⁻¹ - H⁻¹ n nᵀH⁻¹ / nᵀH⁻¹n) dp`` with the normal ``n = MᵀM x``.
    """
    M, p = np.array([[1.0, 0.3], [0.0, 2.0]]), np.array([2.0, 1.5])
    gram, low, high = M.T @ M, 0.0, 100.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        outside = np.linalg.norm(M @ np.linalg.solve(np.eye(2) + middle * gram, p)) > 1
        low, high = (middle, high) if outside else (low, middle)
    inverse = np.linalg.inv(np.eye(2) + low * gram)
    normal = inverse @ gram @ inverse @ p
    return (inverse - np.outer(normal, normal) / (gram @ inverse @ p @ normal))[0]


@pytest.mark.parametrize(
    "solver", [Clarabel(), SCS(), SCS(tolerance=1e-4), ECOS()], ids=lambda solver: f"{solver.name}-{solver.tolerance}"
)
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_an_ellipsoid_stated_twice_has_the_gradient_of_one(solver: ConicSolver, copies: int) -> None:
    problem = ellipsoid(copies)
    solution = solver.solve(problem)
    tilt = ConicPoint(torch.eye(2).double()[:1], torch.zeros(1, 3 * copies).double(), torch.zeros(1, 2).double())
    gradient, info = ImplicitKKT().vjp(solution, tilt, solver)
    np.testing.assert_allclose(-gradient.q.numpy(), exact_ellipsoid(), atol=1e-9)
    np.testing.assert_allclose(exact_ellipsoid(), [0.16156, -0.14084], atol=5e-6)
    assert info.used == ["implicit" if copies == 1 else "implicit, regularised"]
    assert info.doubt is not None
    assert info.doubt[0] < 1e-4


def stated_once(program: Redundant, seed: int) -> tuple[ConicData, bool]:
    """The gradient of the irredundant statement, by a tight solve, and whether its multipliers are unique."""
    kinds = (Clarabel(tolerance=1e-11), SCS(tolerance=1e-11))
    solver = next(solver for solver in kinds if not solver.unsupported(program.single.structure))
    tilt = of_single(program, cotangent(program, seed))
    gradient, info = ImplicitKKT().vjp(solver.solve(program.single), tilt, solver, SERIAL)
    return gradient, info.used == ["implicit"]


def check_against_single(seeds: range, solvers: list[ConicSolver]) -> None:
    """Gradients that come without a warning are right; hardly any comes with one."""
    count, told = 0, []
    for seed in seeds:
        program = redundant(seed)
        (expected, regular), tilt = stated_once(program, seed), cotangent(program, seed)
        for solver in solvers:
            if solver.unsupported(program.repeated.structure):
                continue
            solution = solver.solve(program.repeated)
            count += 1
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                gradient, _ = ImplicitKKT().vjp(solution, tilt, solver, SERIAL)
            if caught:
                told.append((seed, solver.name, str(caught[0].message)))
                continue
            size = float(expected.q.abs().max()) + 1e-6
            torch.testing.assert_close(
                gradient.q, expected.q, atol=1e-5 * size, rtol=0, msg=lambda text, seed=seed: f"{seed}: {text}"
            )
            if regular:
                gathered = program.of_single(gradient.b)
                size = max(size, float(expected.b.abs().max()))
                torch.testing.assert_close(gathered, expected.b, atol=1e-4 * size, rtol=0)
    assert len(told) <= 0.005 * count, told


def test_redundant_rows_and_cones_change_no_gradient() -> None:
    check_against_single(range(30), [Clarabel(), SCS(tolerance=1e-4), DAQP()])


def test_redundant_rows_and_cones_change_no_gradient_with_any_solver() -> None:
    """``LPGD_CASES=1000 pytest tests/test_rank.py`` takes so many."""
    check_against_single(range(10_000, 10_000 + int(os.environ.get("LPGD_CASES", "20"))), SOLVERS)


@pytest.mark.parametrize("seed", range(6))
def test_forward_mode_is_the_transpose_of_reverse_mode_at_redundant_cones(seed: int) -> None:
    program = redundant(seed + 300)
    problem, tilt = program.repeated, cotangent(program, seed)
    solver = SCS(tolerance=1e-9) if Clarabel().unsupported(problem.structure) else Clarabel()
    solution = solver.solve(problem)
    gradient, _ = ImplicitKKT().vjp(solution, tilt, solver)
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(problem.data.q.shape, generator=generator, dtype=torch.float64)
    b = torch.randn(program.single.data.b.shape, generator=generator, dtype=torch.float64)
    tangent = problem.zero_gradient()._replace(q=q, b=program.of_repeated(b))
    change, _ = ImplicitKKT().jvp(solution, tangent, solver)
    expected = float((gradient.q * q).sum() + (gradient.b * tangent.b).sum())
    assert float((change.x * tilt.x).sum()) == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
def test_rows_stated_twice_in_a_quadratic_and_a_linear_program(solver: ConicSolver) -> None:
    # min ½|x - p|² or <c, x> over the simplex x ≥ 0, Σx = 1, each row stated twice: support {0, 1}, vertex 2.
    ones, eye = torch.ones(1, 3).double(), torch.eye(3).double()
    A, b = torch.cat([ones, 2 * ones]), torch.tensor([1.0, 2.0]).double()
    G, h = torch.cat([-eye, -0.5 * eye]), torch.zeros(6).double()
    q = torch.tensor([-1.0, -0.8, 0.5], dtype=torch.float64, requires_grad=True)
    (x, *_) = QPLayer(solver, gradient=ImplicitKKT())(eye, q, A=A, b=b, G=G, h=h)
    (x * torch.tensor([1.0, 3.0, 5.0])).sum().backward()
    assert q.grad is not None
    assert q.grad.numpy() == pytest.approx([1.0, -1.0, 0.0], abs=1e-9)  # -(g - mean g) on the support
    if solver.name in ("OSQP", "PROXQP"):
        return
    c = torch.tensor([1.0, 0.8, 0.5], dtype=torch.float64, requires_grad=True)
    (x, *_) = LPLayer(solver, gradient=ImplicitKKT())(c, A=A, b=b, G=G, h=h)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exact gradient of this linear program", category=LpgdWarning)
        (x * torch.tensor([1.0, 3.0, 5.0])).sum().backward()
    assert c.grad is not None
    assert c.grad.abs().max() < 1e-9


def test_who_asks_for_rows_that_imply_each_other_is_told() -> None:
    ones, eye = torch.ones(2, 3).double(), torch.eye(3).double()
    q = torch.tensor([-1.0, -0.8, 0.5], dtype=torch.float64)
    b = torch.ones(2, dtype=torch.float64, requires_grad=True)
    (x, *_) = QPLayer(gradient=ImplicitKKT())(eye, q, A=ones, b=b)
    with pytest.warns(LpgdWarning, match=r"multipliers of elements \[0\] are not unique"):
        x.sum().backward()
    assert b.grad is not None
    assert b.grad.numpy() == pytest.approx([0.5, 0.5])  # Σx = 1, shared out


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
def test_a_semidefinite_constraint_with_an_implied_minor(solver: str) -> None:
    rng = np.random.default_rng(0)
    target, weight = rng.normal(size=(3, 3)), torch.from_numpy(rng.normal(size=(3, 3)))
    gradients = []
    for minors in ([], [slice(0, 2)], [slice(0, 2), slice(1, 3)]):
        X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3))
        constraints: list[Any] = [X >> 0, *(X[part, part] >> 0 for part in minors)]
        layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), constraints), [C], [X], solver=solver)
        value = torch.from_numpy(target).clone().requires_grad_()
        (layer(value)[0] * weight).sum().backward()
        assert value.grad is not None
        gradients.append(value.grad.numpy())
    for gradient in gradients[1:]:
        np.testing.assert_allclose(gradient, gradients[0], atol=1e-8)


@pytest.mark.parametrize("at_kink", [False, True], ids=["", "at a kink"])
@pytest.mark.parametrize("method", [ImplicitKKT(), LPGD()], ids=["ImplicitKKT", "LPGD"])
def test_a_plane_that_touches_a_ball_is_said(method: Any, at_kink: bool) -> None:
    # min |x - p|² over the unit ball, and with a plane that touches it there: only the ball has curvature, and the
    # share that it has of the multipliers is the solver's choice.  Alone it gives dx/dp = (I - u uᵀ) / |p|.
    p = np.array([2.0, 1.5])
    u = p / np.linalg.norm(p)
    x, point = cp.Variable(2), cp.Parameter(2)
    weights = np.array([1.0, -2.0])
    for constraints, touched in (([cp.norm(x) <= 1], False), ([cp.norm(x) <= 1, u @ x <= 1], True)):
        objective = cp.sum_squares(x - point)
        if at_kink and touched:  # a variable beside them, at its bound with a multiplier of zero
            beside = cp.Variable(nonneg=True)
            objective, constraints = objective + cp.square(beside - point[0] + p[0]), [*constraints, beside <= 10]
        layer = CvxpyLayer(
            cp.Problem(cp.Minimize(objective), constraints), [point], [x], solver="CLARABEL", gradient=method
        )
        value = torch.from_numpy(p.copy()).requires_grad_()
        loss = (layer(value)[0] * torch.from_numpy(weights)).sum()
        if touched:
            with pytest.warns(LpgdWarning, match=r"elements \[0\] are not unique, at constraints that curve"):
                loss.backward()
        else:
            loss.backward()
            assert value.grad is not None
            expected = (weights - u * (u @ weights)) / np.linalg.norm(p)
            np.testing.assert_allclose(value.grad.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("eliminate", [True, False])
@pytest.mark.parametrize(
    "bound", [lambda u: cp.abs(u) <= 0.5, lambda u: cp.norm_inf(u) <= 0.5, lambda u: cp.norm1(u) <= 5]
)
def test_a_loose_epigraph_is_no_kink(bound: Any, eliminate: bool) -> None:
    # min |u - c|² inside of the constraint has u = c; its epigraph's variable, which is CVXPY's own, is loose.
    u, c = cp.Variable(3), cp.Parameter(3)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(u - c)), [bound(u)]), [c], [u], eliminate=eliminate)
    value = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (layer(value)[0] * weights).sum().backward()  # a warning would be an error
    torch.testing.assert_close(value.grad, weights, atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", range(12))
def test_doubled_exponential_constraints(seed: int) -> None:
    # min |x - p|² over exp(x₁) ≤ x₂: dx/dp along the curve's tangent t = (1, e^{x₁}), with its curvature.
    p = np.random.default_rng(seed).normal(size=2) + np.array([1.0, -1.0])
    x, point = cp.Variable(2), cp.Parameter(2)
    constraints: list[Any] = [cp.exp(x[0]) <= x[1], 2 * cp.exp(x[0]) <= 2 * x[1]]
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - point)), constraints), [point], [x])
    value = torch.from_numpy(p).requires_grad_()
    (solution,) = layer(value)
    (solution * torch.tensor([1.0, 2.0])).sum().backward()
    u = float(solution[0].detach())
    growth = np.exp(u)
    # Stationary in u: (u - p₁) + (e^u - p₂) e^u = 0; its derivative in u, and in p by the tangent.
    slope = 1 + growth**2 + (growth - p[1]) * growth
    expected = (1 + 2 * growth) * np.array([1.0, growth]) / slope
    assert value.grad is not None
    np.testing.assert_allclose(value.grad.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
def test_a_loss_on_a_dual_of_a_semidefinite_program(solver: str, copies: int) -> None:
    # min <C, X>, tr X = 1, X ⪰ 0 (stated twice): the multiplier of the trace is -λ_min(C), its gradient -u uᵀ.
    rng = np.random.default_rng(5)
    matrix = rng.normal(size=(3, 3))
    matrix = matrix + matrix.T
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    trace: Any = cp.trace(X) == 1
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [trace] + [X >> 0] * copies)
    layer = CvxpyLayer(problem, [C], [trace.dual_variables[0]], solver=solver)
    value = torch.from_numpy(matrix).clone().requires_grad_()
    (dual,) = layer(value)
    dual.sum().backward()
    values, vectors = np.linalg.eigh(matrix)
    assert float(dual.detach()) == pytest.approx(-values[0], abs=1e-6)
    assert value.grad is not None
    np.testing.assert_allclose(value.grad.numpy(), -np.outer(vectors[:, 0], vectors[:, 0]), atol=1e-6)


def test_the_conic_layer_with_cones_stated_twice() -> None:
    single, double = ellipsoid(1), ellipsoid(2)
    gradients = []
    for problem, cones in ((single, Cones(second_order=(3,))), (double, Cones(second_order=(3, 3)))):
        A = problem.structure.constraint.to_dense(problem.data.A)
        q = problem.data.q.clone().requires_grad_()
        (x, *_) = ConicLayer(cones, gradient=ImplicitKKT())(torch.eye(2).double(), q, A, problem.data.b)
        x[0].backward()
        gradients.append(q.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-8, rtol=0)


def kink(p: list[float], loss: list[float], rows: int = 1) -> tuple[torch.Tensor, list[str]]:
    """The gradient of a linear loss on the projection of p onto x₁ ≤ 1, stated ``rows`` times."""
    G = torch.tensor([[1.0, 0.0]]).double().repeat(rows, 1)
    q = (-torch.tensor(p, dtype=torch.float64)).requires_grad_()
    output = QPLayer(gradient=ImplicitKKT())(torch.eye(2).double(), q, G=G, h=torch.ones(rows).double())
    (output[0] * torch.tensor(loss)).sum().backward()
    assert q.grad is not None
    return q.grad, output.info.gradients[0].used


def test_at_a_kink_both_sides_are_looked_at() -> None:
    # x₁ = min(p₁, 1): at p₁ = 1 its slope is 0 or 1, and that of x₂ is 1 whatever side is taken.
    with pytest.warns(LpgdWarning, match=r"solutions of elements \[0\] are at a kink"):
        gradient, used = kink([1.0, 3.0], [1.0, 1.0])
    assert used == ["implicit, one-sided"]
    assert gradient[1] == pytest.approx(-1.0)
    assert gradient[0] in (pytest.approx(0.0), pytest.approx(-1.0))
    gradient, used = kink([1.0, 3.0], [0.0, 1.0])
    assert used == ["implicit"]
    assert gradient.tolist() == pytest.approx([0.0, -1.0])
    gradient, used = kink([2.0, 3.0], [1.0, 1.0], rows=2)
    assert gradient.tolist() == pytest.approx([0.0, -1.0], abs=1e-12)


def test_an_eigenvalue_of_zero_is_a_kink_of_the_semidefinite_cone() -> None:
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [X >> 0]), [C], [X])
    value = torch.diag(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)).requires_grad_()
    (solution,) = layer(value)
    solution[0, 0].backward()
    assert value.grad is not None
    expected = np.zeros((3, 3))
    expected[0, 0] = 1.0
    np.testing.assert_allclose(value.grad.numpy(), expected, atol=1e-6)
    (solution,) = layer(value)
    with pytest.warns(LpgdWarning, match="at a kink"):
        solution[1, 1].backward()


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_activity_has_no_units(scale: float) -> None:
    # The simplex projection's objective times 1e-8: multipliers of 1e-9 are as active as those of 0.1.
    q = torch.tensor([-1.0, -0.8, 0.5], dtype=torch.float64, requires_grad=True)
    eye, ones = torch.eye(3).double(), torch.ones(1, 3).double()
    for solver in (Clarabel(), DAQP(), InteriorPoint()):
        layer = QPLayer(solver, gradient=ImplicitKKT())
        (x, *_) = layer(scale * eye, scale * q, A=ones, b=ones[0, :1], lb=0.0)
        (gradient,) = torch.autograd.grad((x * torch.tensor([1.0, 3.0, 5.0])).sum(), q)
        assert gradient.numpy() == pytest.approx([1.0, -1.0, 0.0], abs=1e-7)


def test_constraints_that_nearly_depend_on_each_other_are_right_or_in_doubt() -> None:
    # Two equalities at an angle ε fix two of three variables: x₂ is known up to rounding over ε.
    eye = torch.eye(3).double()
    for angle in (1e-3, 1e-6, 1e-9, 1e-11, 1e-13):
        A = torch.tensor([[1.0, 0.0, 0.0], [1.0, angle, 0.0]]).double()
        q = torch.tensor([-1.0, -0.8, 0.5], dtype=torch.float64, requires_grad=True)
        layer = QPLayer(Clarabel(), gradient=ImplicitKKT())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output = layer(eye, q, A=A, b=torch.ones(2).double())
            (output[0] * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        assert q.grad is not None
        right = q.grad.numpy() == pytest.approx([0.0, 0.0, -3.0], abs=1e-4)
        told = output.info.gradients[0].used[0] == "implicit, regularised"
        assert right or caught or told, angle


def test_a_transport_plan_has_redundant_equalities_and_no_warning() -> None:
    # Row and column sums of a plan depend on each other; the plan and its gradient in the cost are unique.
    C = torch.rand(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    rows = torch.kron(torch.eye(3), torch.ones(1, 3)).double()
    columns = torch.kron(torch.ones(1, 3), torch.eye(3)).double()
    plans = []
    for A in (torch.cat([rows, columns]), torch.cat([rows, columns])[:5]):
        layer = QPLayer(Clarabel(), gradient=ImplicitKKT())
        (x, *_) = layer(torch.eye(9).double(), C.flatten(), A=A, b=torch.ones(len(A)).double(), lb=0.0)
        (gradient,) = torch.autograd.grad((x * torch.arange(9.0)).sum(), C)
        plans.append(gradient)
    torch.testing.assert_close(plans[0], plans[1], atol=1e-9, rtol=0)


def test_of_duals_of_a_transport_plan_only_their_level_is_not_unique() -> None:
    # Potentials of rows and columns may be moved against each other: their sums are unique, and one of them is not.
    torch.manual_seed(0)
    C = torch.rand(9, dtype=torch.float64, requires_grad=True)
    rows = torch.kron(torch.eye(3), torch.ones(1, 3)).double()
    columns = torch.kron(torch.ones(1, 3), torch.eye(3)).double()
    A, P = torch.cat([rows, columns]), 3 * torch.eye(9).double()
    y = QPLayer(Clarabel(), gradient=ImplicitKKT())(P, C, A=A, b=torch.ones(6).double(), lb=0.0).y
    (gradient,) = torch.autograd.grad(y[0] + y[4], C, retain_graph=True)
    single = QPLayer(Clarabel(), gradient=ImplicitKKT())(P, C, A=A[:5], b=torch.ones(5).double(), lb=0.0).y
    (expected,) = torch.autograd.grad(single[0] + single[4], C)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)
    with pytest.warns(LpgdWarning, match="multipliers are not unique"):
        y[0].backward()


def test_solutions_that_are_not_unique_are_told_from_multipliers_that_are_not() -> None:
    # min x₁² over the box: x₂ is anything.
    P = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    q = torch.tensor([-0.5, 0.0], dtype=torch.float64, requires_grad=True)
    (x, *_) = QPLayer(Clarabel(), gradient=ImplicitKKT())(P, q, lb=-1.0, ub=1.0)
    with pytest.warns(LpgdWarning, match="their solutions are not unique"):
        x.sum().backward()
    assert q.grad is not None
    assert q.grad.tolist() == pytest.approx([-1.0, 0.0], abs=1e-7)
    # The remedy that the warning names: with ρ x₂ moves by 1/ρ.
    q = torch.tensor([-0.5, 0.0], dtype=torch.float64, requires_grad=True)
    (x, *_) = QPLayer(Clarabel(), gradient=ImplicitKKT(rho=0.5))(P, q, lb=-1.0, ub=1.0)
    x.sum().backward()
    assert q.grad is not None
    assert q.grad.tolist() == pytest.approx([-1 / 1.5, -2.0], abs=1e-7)


def test_sparse_singular_systems_agree_with_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    import lpgd.solvers.kkt.factor as kkt_solve
    import lpgd.solvers.kkt.system as kkt

    for seed in (3, 7, 11):
        program = redundant(seed)
        solver = SCS(tolerance=1e-9) if Clarabel().unsupported(program.repeated.structure) else Clarabel()
        solution, tilt = solver.solve(program.repeated), cotangent(program, seed)
        expected, _ = ImplicitKKT().vjp(solution, tilt, solver)
        for limit in (1500, 0):
            with monkeypatch.context() as patch:
                patch.setattr(kkt, "is_dense", lambda structure: False)
                patch.setattr(kkt_solve, "EIGEN_LIMIT", limit)
                patch.setattr(implicit_conic, "is_batchable", lambda problem, rho: False)
                gradient, _ = ImplicitKKT().vjp(solution, tilt, solver)
            torch.testing.assert_close(gradient.q, expected.q, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_one_variable_one_row_one_element(rho: float) -> None:
    # min ½ p x² + q x, free, bounded, and by a row: x = -q / p or the bound.
    cases: list[tuple[dict[str, Any], bool]] = [({}, True), ({"lb": 5.0}, False), ({"ub": 9.0}, True)]
    for constraints, moves in cases:
        P = torch.ones(1, 1, dtype=torch.float64).expand(1, 1)
        q = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        (x, *_) = QPLayer(gradient=ImplicitKKT(rho=rho))(P, q, **constraints)
        x.sum().backward()
        assert q.grad is not None
        assert q.grad.item() == pytest.approx(-1 / (1 + rho) if moves else 0.0, abs=1e-12)
    q = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    row, bound = torch.ones(1, 1).double(), torch.tensor([0.5]).double().requires_grad_()
    (x, *_) = QPLayer(gradient=ImplicitKKT(rho=rho))(row, q, G=row, h=bound)
    x.sum().backward()
    assert q.grad is not None
    assert bound.grad is not None
    assert q.grad.item() == pytest.approx(0.0, abs=1e-12)
    assert bound.grad.item() == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")
@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 1), (2, 2)])
def test_sparse_matrices_without_entries(layout: str, shape: tuple[int, int]) -> None:
    r, n = shape
    empty = getattr(torch.zeros(r, n, dtype=torch.float64), layout)()
    q = torch.arange(1.0, n + 1, dtype=torch.float64).requires_grad_()
    (x, *_) = QPLayer(gradient=ImplicitKKT())(torch.eye(n).double(), q, G=empty, h=torch.ones(r).double())
    x.sum().backward()
    torch.testing.assert_close(x.detach(), -q.detach(), atol=1e-8, rtol=0)
    torch.testing.assert_close(q.grad, -torch.ones(n).double(), atol=1e-8, rtol=0)


def test_the_same_batch_twice_has_the_same_doubt() -> None:
    problem = ellipsoid(2)
    batch = replace(problem, batch_size=2, data=ConicData(*(part.repeat(2, 1) for part in problem.data)))
    solution = Clarabel().solve(batch)
    tilt = ConicPoint(torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), torch.zeros(2, 6).double(), torch.zeros(2, 2))
    _, info = ImplicitKKT().vjp(solution, tilt, Clarabel())
    assert info.used == ["implicit, regularised", "zero cotangent"]
    assert info.doubt is not None
    assert info.doubt.isnan().tolist() == [False, True]


def flat_system(seed: int, variables: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A system without curvature, and a right-hand side."""
    rng = np.random.default_rng(seed)
    B = rng.normal(size=(variables, rows)) * 10.0 ** rng.uniform(-1, 1, size=rows)
    zeros = np.zeros((variables, variables)), np.zeros((rows, rows))
    return np.block([[zeros[0], B], [B.T, zeros[1]]]), rng.normal(size=variables + rows)


def known_well(count: int) -> rank.Known:
    return rank.Known(np.full(count, 1e-14), np.ones(count))


@pytest.mark.parametrize(("variables", "rows"), [(9, 4), (30, 29), (60, 1), (4, 9), (29, 30), (1, 60)])
def test_systems_without_curvature_are_answered_by_the_pseudo_inverse(variables: int, rows: int) -> None:
    K, right = flat_system(variables, variables, rows)
    primal = np.arange(len(right)) < variables
    found = flat.solve_flat(K, factor.equilibration(np.abs(K).max(1)), right, primal, known_well(1).select(0))
    assert found is not None
    np.testing.assert_allclose(found[0], np.linalg.pinv(K) @ right, rtol=1e-9, atol=1e-9)
    # Singular; within a face the solution may move, at a degenerate vertex only multipliers; no right side is met.
    assert found[2:5] == (False, variables < rows, False)
    null = np.sqrt(np.maximum(1.0 - np.diag(np.linalg.pinv(K) @ K), 0.0))
    np.testing.assert_allclose(found[1], null, atol=1e-6)


def test_a_batch_of_systems_with_and_without_curvature() -> None:
    # The third has a curvature, the fourth a dependent column, the fifth a row and a variable that do not count.
    systems = [flat_system(seed, 12, 5) for seed in range(5)]
    matrices, right = np.stack([K for K, _ in systems]), np.stack([r for _, r in systems])
    matrices[2, :12, :12] = np.eye(12)
    matrices[3, :12, 16] = matrices[3, :12, 15]
    matrices[3, 16, :12] = matrices[3, 15, :12]
    idle = np.zeros(right.shape, dtype=bool)
    idle[4, [3, 14]] = True
    matrices[4][idle[4]] = matrices[4][:, idle[4]] = right[4, idle[4]] = 0.0
    expected = [np.linalg.pinv(K, rcond=1e-12) @ r for K, r in zip(matrices, right, strict=True)]
    met = (matrices @ np.random.default_rng(1).normal(size=(5, 17, 1)))[:, :, 0]
    others = np.stack([right, met])
    found = factor.solve_matrices(matrices.copy(), right, idle, np.arange(17) < 12, known_well(5), others)
    np.testing.assert_allclose(found.answer, expected, rtol=1e-8, atol=1e-8)
    assert found.exact.tolist() == [False, False, True, False, False]
    assert found.consistent.tolist() == [False, False, True, False, False]
    assert found.follows.tolist() == [[False, True], [False, True], [True, True], [False, True], [False, True]]


def test_one_decomposition_says_all_about_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which answers are unique, of x and of multipliers, is asked of the null space that the answer has left out."""
    x, q, c = cp.Variable(3), cp.Parameter(3), cp.Parameter(2)
    rows: list[Any] = [x[0] + x[1] <= c[0], 2 * x[0] + 2 * x[1] <= c[1]]  # the second states the first again
    layer = CvxpyLayer(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) + q @ x), rows), [q, c], [x], solver="CLARABEL")
    costs = torch.tensor([-1.0, -2.0, 1.0], dtype=torch.float64, requires_grad=True)
    (found,) = layer(costs, torch.tensor([1.0, 2.0], dtype=torch.float64))
    counted: list[int] = []
    decompose = rank.np.linalg.eigh
    monkeypatch.setattr(rank.np.linalg, "eigh", lambda matrix: counted.append(1) or decompose(matrix))
    found[0].backward()
    assert len(counted) == 1
    # The projection of -q onto x0 + x1 = 1.
    torch.testing.assert_close(costs.grad, found.new_tensor([-0.5, 0.5, 0.0]), rtol=0, atol=1e-9)


def test_where_the_rank_is_not_plain_the_eigenvalues_decide() -> None:
    K, right = flat_system(0, 12, 5)
    K[:12, 16] = K[:12, 15] + 1e-6 * K[:12, 16]
    K[16, :12] = K[:12, 16]
    primal = np.arange(17) < 12
    assert flat.solve_flat(K, np.ones(17), right, primal, known_well(1).select(0)) is None
    rough = rank.Known(np.array([1e-4]), np.ones(1))
    K, right = flat_system(0, 12, 5)
    assert flat.solve_flat(K, np.ones(17), right, primal, rough.select(0)) is None


def test_a_feasible_point_is_one_of_many_and_said_once() -> None:
    """Of p <= x <= p + 1 any point is a solution, and no constraint depends on another."""
    x, p = cp.Variable(2), cp.Parameter(2)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(0), [x >= p, x <= p + 1]), [p], [x])
    (found,) = layer(torch.zeros(2, dtype=torch.float64, requires_grad=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found.sum().backward()
    (message,) = (str(warning.message) for warning in caught)
    assert "their solutions are not unique" in message


def test_whether_other_multipliers_matter_is_asked_of_all_elements_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x, p = cp.Variable(3), cp.Parameter(3)
    ball: list[Any] = [cp.norm(x) <= 1, cp.norm(2 * x) <= 2]
    layer = CvxpyLayer(cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - p)), ball), [p], [x], executor=SERIAL)
    targets = torch.tensor([[3.0, 0.0, 4.0], [0.0, 2.0, 0.0], [2.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    asked: list[int] = []
    respond = one_by_one.respond
    monkeypatch.setattr(one_by_one, "respond", lambda *given: asked.append(len(given[2])) or respond(*given))
    (found,) = layer(targets)
    found[:, 0].sum().backward()
    # The answers, and those with two other shares of the multipliers for each element.
    assert asked == [3, 6]
    size = targets.detach().norm(dim=1, keepdim=True)
    along = targets.detach() / size
    expected = (torch.eye(3, dtype=torch.float64)[0] - along * along[:, :1]) / size
    torch.testing.assert_close(targets.grad, expected, rtol=0, atol=1e-8)
