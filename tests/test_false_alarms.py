"""Warnings where what was asked for depends on it, and nowhere else: CVXPY's own variables may be anything.

Constraints far away leave ``min |x - c|²`` at x = c, whatever becomes of their epigraphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize
import torch
from torch import Tensor

import lpgd
from lpgd import LPGD, CvxpyLayer, ImplicitKKT, QPLayer
from lpgd.gradients import GradientMethod
from lpgd.problems.conic.solution import ConicSolution

pytestmark = pytest.mark.filterwarnings("error::lpgd.LpgdWarning")

C = np.array([1.0, -0.7, 0.4])
W = np.array([0.9, -0.5, 0.3])
METHODS = [ImplicitKKT(), LPGD(), LPGD(tau=0.01), LPGD(tau=0.01, envelope="lower")]
ATOMS: dict[str, Callable[[Any], Any]] = {
    "max": cp.max,
    "negative min": lambda x: -cp.min(x),
    "sum_largest": lambda x: cp.sum_largest(x, 2),
    "negative sum_smallest": lambda x: -cp.sum_smallest(x, 2),
    "abs": lambda x: cp.sum(cp.abs(x)),
    "norm1": cp.norm1,
    "norm_inf": cp.norm_inf,
    "pos": lambda x: cp.sum(cp.pos(x)),
    "huber": lambda x: cp.sum(cp.huber(x, 0.3)),
    "maximum": lambda x: cp.maximum(x[0], x[1], x[2]),
    "cummax": lambda x: cp.max(cp.cummax(x)),
    "tv": cp.tv,
    "lambda_max": lambda x: cp.lambda_max(cp.bmat([[x[0], x[1]], [x[1], x[2]]])),
    "norm2": cp.norm2,
    "exp": lambda x: cp.sum(cp.exp(x)),
}
PIECEWISE = ["max", "negative min", "sum_largest", "negative sum_smallest", "abs", "norm_inf", "maximum", "tv"]


def gradients(problem: cp.Problem, method: GradientMethod, x: Any, inputs: dict[Any, Any], **more: Any) -> list[Tensor]:
    """Of W·x with respect to the parameters' values."""
    values = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in inputs.values()]
    layer = CvxpyLayer(problem, list(inputs), [x], gradient=method, **more)
    (layer(*values)[0] * torch.from_numpy(W)).sum().backward()
    return [torch.zeros_like(value) if value.grad is None else value.grad for value in values]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", ATOMS)
def test_constraints_that_are_loose(name: str, method: GradientMethod) -> None:
    x, c, bound, weight = cp.Variable(3), cp.Parameter(3), cp.Parameter(), cp.Parameter(nonneg=True)
    for eliminate in (True, False):
        atom = ATOMS[name](x)
        x.value = C
        value = float(np.sum(atom.value))
        cases: list[tuple[Any, dict[Any, Any]]] = [
            (atom <= value + (0.3 if getattr(method, "tau", None) else 0.001), {}),  # farther than a given step reaches
            (atom <= bound, {bound: value + 3.0}),
            (weight * atom <= abs(value) + 1.0, {weight: 0.3}),
        ]
        for constraint, more in cases:
            problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [constraint])
            of_c, *others = gradients(problem, method, x, {c: C, **more}, eliminate=eliminate)
            np.testing.assert_allclose(of_c.numpy(), W, atol=1e-5)
            for other in others:
                np.testing.assert_allclose(other.numpy(), 0.0, atol=1e-5)


@pytest.mark.parametrize("solver", ["DAQP", "PROXQP", "CLARABEL"])
@pytest.mark.parametrize("method", METHODS[:2], ids=str)
@pytest.mark.parametrize("name", PIECEWISE)
def test_terms_whose_pieces_are_clear(name: str, method: GradientMethod, solver: str) -> None:
    """x = c - ½ t g, with the gradient g of the term's piece; which numbers make up the term's value is not unique."""
    x, c, t = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    slope = {
        "max": [1, 0, 0], "maximum": [1, 0, 0], "norm_inf": [1, 0, 0], "negative min": [0, -1, 0],
        "sum_largest": [1, 0, 1], "negative sum_smallest": [0, -1, -1], "abs": [1, -1, 1], "tv": [1, -2, 1],
    }[name]  # fmt: skip
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c) + t * ATOMS[name](x)))
    of_c, of_t = gradients(problem, method, x, {c: C, t: 0.1}, solver=solver)
    np.testing.assert_allclose(of_c.numpy(), W, atol=1e-5)
    assert float(of_t) == pytest.approx(-0.5 * W @ slope, abs=1e-5)


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_a_constraint_that_is_stated_twice_with_one_parameter(method: GradientMethod) -> None:
    """Which of both has the multiplier is not unique; their sum, which the parameter's gradient takes, is."""
    x, c, bound = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    constraints: list[Any] = [cp.sum(x) <= bound, cp.sum(x) <= bound]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), constraints)
    of_c, of_bound = gradients(problem, method, x, {c: C, bound: 0.1})
    np.testing.assert_allclose(of_c.numpy(), W - W.mean(), atol=1e-6)
    assert float(of_bound) == pytest.approx(W.mean(), abs=1e-6)


FITS: dict[str, Callable[[Any], Any]] = {
    "magnitudes": cp.norm1,
    "quantile": lambda e: cp.sum(0.3 * cp.pos(e) + 0.7 * cp.neg(e)),
    "larger": lambda e: cp.sum(cp.maximum(0.3 * e, -0.7 * e)),
}


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
@pytest.mark.parametrize("name", FITS)
def test_fits_that_go_through_points(name: str, method: GradientMethod) -> None:
    """At a vertex w solves X w = y for as many points as it has entries, which are those of HiGHS in SciPy.

    There each of CVXPY's variables has rows enough of its own, and more than one set of multipliers.
    """
    r = np.random.default_rng(0)
    X = np.c_[np.ones(40), r.standard_normal((40, 3))]
    observed, weights = X @ r.standard_normal(4) + r.standard_t(2, 40), np.arange(1.0, 5.0)
    below, above = (1.0, 1.0) if name == "magnitudes" else (0.3, 0.7)
    costs = np.r_[np.zeros(4), np.full(40, below), np.full(40, above)]
    equal = np.c_[X, -np.eye(40), np.eye(40)]  # X w - y = u - v
    best = scipy.optimize.linprog(costs, A_eq=equal, b_eq=observed, bounds=[(None, None)] * 4 + [(0, None)] * 80)
    through = np.argsort(np.abs(X @ best.x[:4] - observed))[:4]
    w, y = cp.Variable(4), cp.Parameter(40)
    layer = CvxpyLayer(cp.Problem(cp.Minimize(FITS[name](X @ w - y))), [y], [w], gradient=method)
    values = torch.from_numpy(observed).requires_grad_()
    (found,) = layer(values)
    (found @ torch.from_numpy(weights)).backward()
    expected = np.zeros(40)
    expected[through] = np.linalg.solve(X[through].T, weights)
    np.testing.assert_allclose(found.detach(), np.linalg.solve(X[through], observed[through]), atol=1e-8)
    assert values.grad is not None
    np.testing.assert_allclose(values.grad, expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_a_vertex_with_constraints_that_move_alone(method: GradientMethod) -> None:
    """x ≤ a and Σ x ≤ b with b = Σ a: a larger x needs both to move."""
    x, a, b = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    problem = cp.Problem(cp.Maximize(x[0] + 2 * x[1]), [x <= a, cp.sum(x) <= b])
    sides = [torch.ones(2).double().requires_grad_(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)]
    with pytest.warns(lpgd.LpgdWarning, match="not unique|at a kink"):
        CvxpyLayer(problem, [a, b], [x], gradient=method)(*sides)[0].sum().backward()


@pytest.mark.parametrize("atom", [cp.max, lambda x: cp.sum_largest(x, 2)], ids=["max", "sum_largest"])
def test_ties_are_kinks_still(atom: Callable[[Any], Any]) -> None:
    x, c = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [atom(x) <= float(np.sum(atom(cp.Constant(C)).value))])
    for method in METHODS[:2]:
        with pytest.warns(lpgd.LpgdWarning, match="kink"):
            gradients(problem, method, x, {c: C})


QP = {"P": torch.eye(2, dtype=torch.float64), "q": torch.tensor([-2.0, -0.5], dtype=torch.float64)}


def doubled(method: GradientMethod, which: str, solver: str) -> None:
    """The point nearest to (2, ½) with x₁ ≤ 1, which a row states and a bound too: each alone may move away freely."""
    G, ends = (
        torch.tensor([[1.0, 0.0]]).double(),
        {"h": torch.ones(1).double(), "ub": torch.tensor([1.0, 9.0]).double()},
    )
    ends[which].requires_grad_()
    QPLayer(solver, method)(**QP, G=G, **ends).x.sum().backward()


@pytest.mark.parametrize("solver", ["DAQP", "CLARABEL"])
@pytest.mark.parametrize("which", ["h", "ub"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_bound_that_a_row_states_too_has_no_gradient_alone(method: GradientMethod, which: str, solver: str) -> None:
    with pytest.warns(lpgd.LpgdWarning, match="not unique"):
        doubled(method, which, solver)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_bounds_beside_constraints_of_other_variables_have_gradients(method: GradientMethod) -> None:
    """x₁ = u at its bound; x₂ + x₁ = 1, stated twice, follows it, and x₃ is free."""
    u = torch.tensor([0.25, 9.0, 9.0], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([[1.0, 1.0, 0.0]]).double().expand(2, 3)
    q = torch.tensor([-2.0, -0.5, 1.0]).double()
    found = QPLayer("CLARABEL", method)(torch.eye(3).double(), q, A=A, b=torch.ones(2).double(), ub=u)
    (found.x @ torch.tensor([3.0, 1.0, 1.0]).double()).backward()
    torch.testing.assert_close(u.grad, torch.tensor([2.0, 0.0, 0.0]).double(), atol=1e-5, rtol=0)


def test_a_step_that_rounding_hides_is_named() -> None:
    """With numbers of 1e6, a step of 1e-6 tilts the objective by 1e-12 of itself."""
    rng = np.random.default_rng(1)
    F, A = rng.normal(size=(4, 4)), torch.tensor(rng.normal(size=(2, 4)))
    P, q = torch.tensor(1e6 * (F @ F.T + np.eye(4))), torch.tensor(1e6 * rng.normal(size=4))
    for tau, short in ((1e-6, True), (1.0, False)):
        b = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
        x = QPLayer("CLARABEL", LPGD(tau=tau))(P, q, A=A, b=b).x
        if short:
            with pytest.warns(lpgd.LpgdWarning, match="the step is too short"):
                (x @ torch.from_numpy(rng.normal(size=4))).backward()
        else:
            (x @ torch.from_numpy(rng.normal(size=4))).backward()


def test_messages_begin_with_the_options_that_are_not_the_defaults() -> None:
    assert str(ImplicitKKT()) == "ImplicitKKT()"
    assert str(LPGD()) == "LPGD()"
    assert str(LPGD(0.1, envelope="lower")) == "LPGD(tau=0.1, envelope='lower')"
    assert str(lpgd.BlackboxBackprop(2.0)) == "BlackboxBackprop(tau=2.0)"
    assert str(LPGD(1.0, separate=True)) == "LPGD(tau=1.0, separate=True)"
    for method in (ImplicitKKT(rho=0.5), LPGD(tau=0.1, rho=0.2), lpgd.Domke(), lpgd.LagrangianMirrorDescent(0.5)):
        assert eval(str(method), vars(lpgd)) == method


def test_an_answer_that_another_solver_sharpens_is_no_solver_left_behind() -> None:
    """Huber regression, whose residuals near the bend are in doubt: against Newton's method on the smooth objective."""
    r = np.random.default_rng(10)
    F, weights = r.standard_normal((200, 50)), np.r_[r.standard_normal(8), np.zeros(42)]
    observed = F @ weights + 0.3 * r.standard_t(3, 200)
    x, y = cp.Variable(50), cp.Parameter(200)
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(F @ x - y)) / 200 + 0.01 * cp.sum_squares(x)))
    output = CvxpyLayer(problem, [y], [x])(torch.from_numpy(observed))
    exact, slope = np.zeros(50), np.ones(50)

    def value(point: np.ndarray) -> float:
        size = np.abs(F @ point - observed)
        return float(np.where(size <= 1.0, size**2, 2 * size - 1).sum() / 200 + 0.01 * point @ point)

    while np.abs(slope).max() > 1e-13:
        residual = F @ exact - observed
        curved = np.abs(residual) <= 1.0
        slope = F.T @ (2 * np.clip(residual, -1, 1)) / 200 + 0.02 * exact
        step = np.linalg.solve(2 * (F[curved].T @ F[curved]) / 200 + 0.02 * np.eye(50), slope)
        exact = min((exact - 0.5**power * step for power in range(12)), key=value)
    np.testing.assert_allclose(output[0], exact, rtol=1e-9, atol=1e-12)
    solution = output.info.solution
    assert isinstance(solution, ConicSolution)
    assert solution.rescued == {}
    assert solution.sharpened is not None
    assert (solution.solvers[0] != solution.asked) == bool(solution.sharpened[0])


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_a_sparse_component_that_is_one_variable(method: GradientMethod) -> None:
    """X = e₁e₁ᵀ stays where it is, whatever the multipliers of the zeros are, which are not unique."""
    X, covariance = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3), PSD=True)
    problem = cp.Problem(cp.Maximize(cp.trace(covariance @ X) - 0.3 * cp.sum(cp.abs(X))), [cp.trace(X) == 1])
    values = torch.tensor([[2.0, 0.1, -0.05], [0.1, 1.0, 0.2], [-0.05, 0.2, 0.7]], dtype=torch.float64)
    values = torch.stack([values, values.flip(0, 1)]).requires_grad_()
    (found,) = CvxpyLayer(problem, [covariance], [X], gradient=method)(values)
    expected = torch.zeros(2, 3, 3, dtype=torch.float64)
    expected[0, 0, 0] = expected[1, 2, 2] = 1.0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    (found * torch.arange(9.0).reshape(3, 3)).sum().backward()
    assert values.grad is not None
    np.testing.assert_allclose(values.grad, 0.0, atol=1e-7)


FACTORS = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)


def layer_of_small_rows(force: float, bounds: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``min ½|x - c|²`` with far planes and one that holds x₀ by this force, rows of 1e-3 to 1e-1, as OptNet starts.

    Returns:
        x, and the gradients of ``<FACTORS, x>`` with respect to c and to the limit of that plane, or bound.
    """
    c = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    G = torch.tensor([[2e-3, 1e-3, 0.0], [0.0, 0.1, 0.05], [4e-3, 0.0, 0.0]], dtype=torch.float64)
    limit = torch.tensor(0.3 - force, dtype=torch.float64, requires_grad=True)
    far = torch.tensor([0.02, 0.1], dtype=torch.float64)
    if bounds:
        ub = torch.cat([limit[None], torch.full((2,), 40.0, dtype=torch.float64)])
        solution = lpgd.solve_qp(torch.eye(3, dtype=torch.float64), -c, G=G[:2], h=far, ub=ub)
    else:
        h = torch.cat([far, 4e-3 * limit[None]])
        solution = lpgd.solve_qp(torch.eye(3, dtype=torch.float64), -c, G=G, h=h)
    (solution.x * FACTORS).sum().backward()
    assert c.grad is not None
    assert limit.grad is not None
    return solution.x.detach(), c.grad, limit.grad


@pytest.mark.parametrize("bounds", [False, True], ids=["rows", "bounds"])
@pytest.mark.parametrize("force", [3e-5, -3e-5, 3e-6])
def test_a_small_multiplier_beside_small_forces_is_one(force: float, bounds: bool) -> None:
    x, of_c, of_limit = layer_of_small_rows(force, bounds)
    held = force > 0
    assert x[0] == pytest.approx(0.3 - max(force, 0.0), abs=1e-15)
    assert of_c.tolist() == pytest.approx([0.0 if held else 1.0, -0.5, 0.25])
    assert of_limit.item() == pytest.approx(1.0 if held else 0.0)


@pytest.mark.parametrize("bounds", [False, True], ids=["rows", "bounds"])
def test_a_multiplier_of_rounding_beside_small_forces_is_none(bounds: bool) -> None:
    with pytest.warns(lpgd.LpgdWarning, match="at a kink"):
        layer_of_small_rows(1e-12, bounds)
