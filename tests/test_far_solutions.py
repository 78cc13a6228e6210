"""Data of order 1 whose solutions are not, against closed forms: no datum says which coordinates cones are to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.gradients import GradientMethod
from lpgd.solvers import ConicSolver
from lpgd.status import Status
from tests.solver_table import SOLVER_TABLE

pytestmark = [
    pytest.mark.filterwarnings("ignore::lpgd.LpgdWarning"),  # who solves it in the end is no matter here
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # CVXPY 1.9, where it bounds logarithms
]
WEIGHTS, SPREAD = np.array([1.0, 2.0, 3.0]), np.array([1.0, 1e-3, 1e3])
SIZES = [1e-8, 1e-6, 1e-4, 1.0, 1e3, 1e5, 1e7, 1e8]
ALONG = np.array([1.0, 0.3, -1.1])


class Case(NamedTuple):
    """A program whose x is about ``size``, and what x and its derivative by the parameter are."""

    problem: cp.Problem
    parameter: cp.Parameter
    variable: cp.Variable
    value: float
    x: np.ndarray
    slope: np.ndarray


def sum_of_logarithms(size: float, weights: np.ndarray = WEIGHTS) -> Case:
    """wᵀx over Σ log x ≥ p is least at λ / w."""
    x, p, value = cp.Variable(3), cp.Parameter(), 3 * np.log(size)
    solution = np.exp((value + np.log(weights).sum()) / 3) / weights
    problem = cp.Problem(cp.Minimize(weights @ x), [cp.sum(cp.log(x)) >= p])
    return Case(problem, p, x, value, solution, solution / 3)


def logarithms(size: float) -> Case:
    x, p = cp.Variable(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(WEIGHTS @ x), [cp.log(x) >= p])
    return Case(problem, p, x, np.log(size), np.full(3, size), np.full(3, size))


def entropy(size: float) -> Case:
    """Σ -x log x + cᵀx + p Σ x is greatest at exp(c + p - 1)."""
    x, p, value = cp.Variable(3), cp.Parameter(), np.log(size)
    solution = WEIGHTS * np.exp(value - 1)
    problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + np.log(WEIGHTS) @ x + p * cp.sum(x)))
    return Case(problem, p, x, value, solution, solution)


def kullback_leibler(size: float) -> Case:
    x, p = cp.Variable(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum(cp.kl_div(x, WEIGHTS)) - p * cp.sum(x)))
    return Case(problem, p, x, np.log(size), WEIGHTS * size, WEIGHTS * size)


def relative_entropy(size: float) -> Case:
    x, p = cp.Variable(3), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum(cp.rel_entr(x, WEIGHTS)) - p * cp.sum(x)))
    return Case(problem, p, x, np.log(size), WEIGHTS * size / np.e, WEIGHTS * size / np.e)


def exponentials(size: float) -> Case:
    """(x, Σ exp) with x₁ + x₂ = 2 p, as (y₁, y₂, total)."""
    v, p, value = cp.Variable(3), cp.Parameter(), np.log(size)
    both: Any = cp.sum(v[:2])
    problem = cp.Problem(cp.Minimize(v[2]), [cp.sum(cp.exp(v[:2])) <= v[2], both == 2 * p])
    return Case(problem, p, v, value, np.array([value, value, 2 * size]), np.array([1.0, 1.0, 2 * size]))


def twice_exponential(size: float) -> Case:
    """y₂ ≥ exp(y₁), y₁ ≥ exp(y₀), y₀ ≥ p."""
    v, p, size = cp.Variable(3), cp.Parameter(), size + 2.0
    value, middle = np.log(np.log(size)), np.log(size)
    problem = cp.Problem(cp.Minimize(v[2]), [cp.exp(v[0]) <= v[1], cp.exp(v[1]) <= v[2], v[0] >= p])
    return Case(problem, p, v, value, np.array([value, middle, size]), np.array([1.0, middle, size * middle]))


def roots(size: float) -> Case:
    """wᵀx over Σ x^0.1 ≥ p is least at a multiple of w^(-1/0.9)."""
    x, p, shape = cp.Variable(3), cp.Parameter(nonneg=True), WEIGHTS ** (-1 / 0.9)
    value = size**0.1 * (shape**0.1).sum()
    problem = cp.Problem(cp.Minimize(WEIGHTS @ x), [cp.sum(cp.power(x, 0.1)) >= p])
    return Case(problem, p, x, value, size * shape, 10 * size * shape / value)


def negative_powers(size: float) -> Case:
    x, p, shape = cp.Variable(3), cp.Parameter(nonneg=True), WEIGHTS ** (-1 / 1.1)
    value = size**-0.1 * (shape**-0.1).sum()
    problem = cp.Problem(cp.Minimize(WEIGHTS @ x), [cp.sum(cp.power(x, -0.1)) <= p])
    return Case(problem, p, x, value, size * shape, -10 * size * shape / value)


def determinant(size: float) -> Case:
    """tr C X over log det X ≥ p is least at a multiple of C⁻¹."""
    C, p, value = np.array([[2.0, 0.5], [0.5, 1.0]]), cp.Parameter(), 2 * np.log(size)
    X = cp.Variable((2, 2), symmetric=True)
    solution = size * np.linalg.det(C) ** 0.5 * np.linalg.inv(C)
    problem = cp.Problem(cp.Minimize(cp.trace(C @ X)), [cp.log_det(X) >= p])
    return Case(problem, p, X, value, solution, solution / 2)


def sum_of_spread_logarithms(size: float) -> Case:
    return sum_of_logarithms(size, SPREAD)


FAMILIES: dict[str, Callable[[float], Case]] = {
    function.__name__: function
    for function in (
        sum_of_logarithms, sum_of_spread_logarithms, logarithms, entropy, kullback_leibler, relative_entropy,
        exponentials, twice_exponential, roots, negative_powers, determinant,
    )
}  # fmt: skip
EXPONENTIAL = [
    pytest.param(row.solver, id=str(row)) for row in SOLVER_TABLE if "exponential" in row.solver.capabilities.cones
]


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def batch_of(family: str, **options: Any) -> tuple[lpgd.CvxpyLayer, torch.Tensor, np.ndarray, np.ndarray]:
    """One layer, the parameter of all sizes, their solutions and slopes."""
    cases = [FAMILIES[family](size) for size in SIZES]
    problem, parameter, variable = cases[0][:3]
    layer = lpgd.CvxpyLayer(problem, [parameter], [variable], **options)
    values = double([case.value for case in cases])
    return layer, values, np.stack([case.x for case in cases]), np.stack([case.slope for case in cases])


def assert_near(found: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    """Of each element, relative to its largest entry."""
    far = np.abs(found.detach().numpy() - expected).reshape(len(expected), -1).max(1)
    np.testing.assert_array_less(far / np.abs(expected).reshape(len(expected), -1).max(1), tolerance)


@pytest.mark.parametrize("solver", EXPONENTIAL)
@pytest.mark.parametrize("family", FAMILIES)
def test_solutions_far_from_one(family: str, solver: ConicSolver) -> None:
    if family == "determinant" and "semidefinite" not in solver.capabilities.cones:
        solver = lpgd.Clarabel()
    layer, values, x, _ = batch_of(family, solver=solver)
    output = layer(values)
    assert output.info.statuses == (Status.SOLVED,) * len(SIZES)
    assert_near(output[0], x, 1e-6)


@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-4)], ids=["exact", "LPGD"])
@pytest.mark.parametrize("family", FAMILIES)
def test_their_gradients(family: str, method: GradientMethod) -> None:
    """Of a loss whose tilt is small beside the cost, whatever the size of x."""
    layer, values, _, slopes = batch_of(family, gradient=method)
    values.requires_grad_()
    loss = layer(values)[0].reshape(len(SIZES), -1)[:, -3:] @ double(ALONG)
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    slopes = slopes.reshape(len(SIZES), -1)
    largest = np.abs(slopes).max(1)
    np.testing.assert_allclose(gradient / largest, slopes[:, -3:] @ ALONG / largest, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_has_the_bits_of_its_elements(family: str) -> None:
    layer, values, _, _ = batch_of(family)
    together = layer(values)[0]
    for value, x in zip(values, together, strict=True):
        assert torch.equal(layer(value)[0], x)


@pytest.mark.parametrize("solver", EXPONENTIAL)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_exponentials_of_large_sums(sign: float, solver: ConicSolver) -> None:
    """wᵀx over log Σ exp(x) ≤ p is greatest at p + log(w / Σ w); beside x of 1e8 what is left is of order 1."""
    x, p = cp.Variable(3), cp.Parameter()
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Maximize(WEIGHTS @ x), [cp.log_sum_exp(x) <= p]), [p], [x], solver=solver)
    values = double(sign * np.array([1.0, 1e2, 1e4, 1e6, 1e8])).requires_grad_()
    output = layer(values)
    assert output.info.statuses == (Status.SOLVED,) * len(values)
    relative = output[0].detach() - values.detach()[:, None]
    np.testing.assert_allclose(relative, np.tile(np.log(WEIGHTS / 6.0), (len(values), 1)), atol=1e-7)
    (gradient,) = torch.autograd.grad((output[0] @ double(ALONG)).sum(), values)
    np.testing.assert_allclose(gradient, [ALONG.sum()] * len(values), atol=1e-9)


@pytest.mark.parametrize("total", [1.0, 1e3, 1e6, 1e8])
def test_log_sum_exp_in_the_objective(total: float) -> None:
    """log Σ exp(x) - uᵀx with Σ x = p is least at log u, moved to that sum."""
    x, p, shares = cp.Variable(3), cp.Parameter(), WEIGHTS / 6.0
    whole: Any = cp.sum(x)
    problem = cp.Problem(cp.Minimize(cp.log_sum_exp(x) - shares @ x), [whole == p])
    output = lpgd.CvxpyLayer(problem, [p], [x])(double(total))
    assert output.info.statuses == (Status.SOLVED,)
    np.testing.assert_allclose(output[0] - total / 3, np.log(shares) - np.log(shares).mean(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("transform", ["vmap", "vmap of jacrev", "jacfwd"])
def test_transforms(transform: str) -> None:
    layer, values, x, slope = batch_of("sum_of_logarithms")

    def solved(value: torch.Tensor) -> torch.Tensor:
        return layer(value)[0]

    if transform == "vmap":
        assert_near(torch.func.vmap(solved)(values), x, 1e-6)
    elif transform == "vmap of jacrev":
        assert_near(torch.func.vmap(torch.func.jacrev(solved))(values), slope, 1e-6)
    else:
        assert_near(torch.func.jacfwd(solved)(values[0])[None], slope[:1], 1e-6)


def test_the_whole_answer_multipliers_and_warm_starts() -> None:
    """The multiplier of Σ log x ≥ p is λ."""
    x, p = cp.Variable(3), cp.Parameter()
    constraint = cp.sum(cp.log(x)) >= p
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(WEIGHTS @ x), [constraint]), [p], [x, constraint.dual_variables[0]])
    values = double([3 * np.log(size) for size in SIZES])
    output, solution = layer(values), layer.solve(values)
    factor = torch.exp((values + np.log(WEIGHTS).sum()) / 3)
    torch.testing.assert_close(output[1] / factor, torch.ones_like(values), atol=1e-6, rtol=0)
    assert solution.statuses == (Status.SOLVED,) * len(SIZES)
    own = solution.problem.data.A.shape[-1], solution.problem.structure.constraint.nnz
    assert own[0] == own[1]
    for start in (output, solution, True):
        again = layer(values + 0.3, warm_start=start)[0]
        expected = np.exp(0.1) * factor[:, None].numpy() / WEIGHTS
        assert_near(again, expected, 1e-6)


def test_verdicts_that_are_right() -> None:
    """log x ≥ p with x ≤ 1e3; Σ x over exp(-x) ≤ 1."""
    x, p = cp.Variable(), cp.Parameter()
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(x), [cp.log(x) >= p, x <= 1e3]), [p], [x], on_error="nan")
    output = layer(double([1.0, 6.0, 7.0, 20.0, 40.0]))
    assert output.info.statuses == (Status.SOLVED,) * 2 + (Status.INFEASIBLE,) * 3
    problem = cp.Problem(cp.Maximize(cp.sum(x)), [cp.exp(-x) <= p])
    assert lpgd.CvxpyLayer(problem, [p], [x], on_error="nan")(double(1.0)).info.statuses == (Status.UNBOUNDED,)


def test_answers_of_order_one_are_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a logistic regression with points that are classified by far, and an entropy."""
    calls, attempt = list[int](), ConicSolver.attempt

    def counted(self: ConicSolver, problem: Any, *args: Any, **keywords: Any) -> Any:
        calls.append(problem.batch_size)
        return attempt(self, problem, *args, **keywords)

    monkeypatch.setattr(ConicSolver, "attempt", counted)
    numbers = np.random.default_rng(0)
    features, w, c = (
        numbers.normal(size=(40, 3)) * np.geomspace(0.1, 30.0, 40)[:, None],
        cp.Variable(3),
        cp.Parameter(3),
    )
    loss = cp.sum(cp.logistic(features @ w)) / 40 + cp.sum_squares(w) - c @ w
    lpgd.CvxpyLayer(cp.Problem(cp.Minimize(loss)), [c], [w])(double(numbers.normal(size=(5, 3))))
    assert calls == [5]
    x = cp.Variable(3)
    whole: Any = cp.sum(x)
    problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + c @ x), [whole == 1])
    lpgd.CvxpyLayer(problem, [c], [x])(double(numbers.normal(size=(5, 3))))
    assert calls == [5, 5]


def test_other_coordinates_are_tried_before_other_solvers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisson regression on counts of 1e4, against Newton's method on its smooth objective."""

    def asked(*_: object) -> None:
        raise AssertionError("another solver is asked")

    for other in (lpgd.SCS, lpgd.ECOS):
        monkeypatch.setattr(other, "solve_posed", asked)
    r = np.random.default_rng(25)
    X = np.c_[0.4 * r.standard_normal((200, 10)), np.ones(200)]
    counts = r.poisson(1e4 * np.exp(X[:, :10] @ r.standard_normal(10) / 2)).astype(float)
    w, y = cp.Variable(11), cp.Parameter(200, nonneg=True)
    objective = cp.sum(cp.exp(X @ w)) - y @ (X @ w) + 0.1 * cp.sum_squares(w)
    values = torch.from_numpy(counts).requires_grad_()
    (found,) = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(objective)), [y], [w])(values)
    exact = np.linalg.lstsq(X, np.log(counts + 1.0))[0]
    for _ in range(30):
        rates = np.exp(X @ exact)
        hessian = (X.T * rates) @ X + 0.2 * np.eye(11)
        exact -= np.linalg.solve(hessian, X.T @ (rates - counts) + 0.2 * exact)
    np.testing.assert_allclose(found.detach(), exact, rtol=1e-9, atol=1e-9)
    found[0].backward()
    np.testing.assert_allclose(values.grad, X @ np.linalg.solve(hessian, np.eye(11)[0]), rtol=1e-7, atol=1e-12)
