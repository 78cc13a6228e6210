"""Elimination: programs without the variables that rows define have the same solutions, duals and gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.solvers import available
from tests.elimination_cases import CASES, Case, answer, nonnegative_least_squares, quadratic_program, two_squares
from tests.layer_cases import close, leaf, normal, weighted

EXACT = 1e-10
every_case = pytest.mark.parametrize("build", CASES.values(), ids=CASES)


def equal(case: Case, **options: Any) -> None:
    """Outputs and gradients with and without elimination are the same."""
    with_it, without = (answer(case.layer(eliminate, **options), case.values) for eliminate in (True, False))
    close(with_it.outputs, without.outputs, EXACT)
    close(with_it.gradients, without.gradients, EXACT)


@every_case
def test_solutions_duals_and_gradients_are_the_same(build: Callable[..., Case]) -> None:
    case = build()
    assert (case.layer(eliminate=False).structure.n, case.layer().structure.n) == (case.before, case.after)
    equal(case)


@every_case
def test_the_whole_solution_is_optimal_for_the_whole_problem(build: Callable[..., Case]) -> None:
    case = build()
    solution, whole = (case.layer(eliminate).solve(*case.values) for eliminate in (True, False))
    assert solution.problem.structure.digest == whole.problem.structure.digest
    assert solution.residuals.worst.max() < 1e-11
    close([solution.objective], [whole.objective], EXACT)
    close(solution.point, whole.point, EXACT)
    close([solution.slack], [whole.slack], EXACT)


@every_case
def test_gradcheck_with_its_defaults(build: Callable[..., Case]) -> None:
    case = build(batch=1)
    layer = case.layer()
    symmetric = [bool(parameter.attributes["PSD"]) for parameter in case.parameters]

    def outputs(*tensors: torch.Tensor) -> Any:
        # Finite differences move one entry at a time: of a symmetric matrix both at once.
        return layer(*(t @ t.mT if square else t for t, square in zip(tensors, symmetric, strict=True)))

    assert torch.autograd.gradcheck(outputs, [leaf(value) for value in case.values])


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("build", [nonnegative_least_squares, quadratic_program, two_squares])
def test_every_solver(build: Callable[..., Case], name: str) -> None:
    case = build()
    reference = answer(case.layer(eliminate=False), case.values)
    own = answer(case.layer(solver=name), case.values)
    close(own.outputs, reference.outputs, 1e-9)
    close(own.gradients, reference.gradients, 1e-9)


@pytest.mark.parametrize("envelope", ["lower", "upper", "average"])
@pytest.mark.parametrize("tau", [1e-2, 0.3, 10.0])
@pytest.mark.parametrize("build", [nonnegative_least_squares, quadratic_program, two_squares])
def test_lpgd_without_augmentation_is_the_same_for_every_step(
    build: Callable[..., Case], tau: float, envelope: Any
) -> None:
    case = build()
    method = lpgd.LPGD(tau=tau, envelope=envelope)
    with_it, without = (answer(case.layer(eliminate, gradient=method), case.values) for eliminate in (True, False))
    close(with_it.gradients, without.gradients, 1e-9)


def test_an_augmentation_is_of_the_variables_that_are_left() -> None:
    case = nonnegative_least_squares()
    case.outputs = case.outputs[:1]
    method = lpgd.LPGD(tau=0.3, rho=0.5)
    own = answer(case.layer(gradient=method), case.values)
    F, g = (leaf(value) for value in case.values)
    output = lpgd.QPLayer(gradient=method)(2 * F.mT @ F, -2 * (F.mT @ g.unsqueeze(-1)).squeeze(-1), lb=0.0)
    close(own.gradients, torch.autograd.grad(weighted([output.x]), [F, g]), 1e-9)


def test_ridge_regression_in_closed_form() -> None:
    x, F, g, ridge = cp.Variable(3), cp.Parameter((6, 3)), cp.Parameter(6), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) + ridge * cp.sum_squares(x)))
    layer = lpgd.CvxpyLayer(problem, [F, g, ridge], [x])
    assert (layer.structure.n, layer.structure.m) == (3, 0)
    values = [leaf(value) for value in (normal(4, 6, 3), normal(4, 6, seed=1), torch.tensor(0.7, dtype=torch.float64))]
    normal_matrix = values[0].mT @ values[0] + values[2] * torch.eye(3, dtype=torch.float64)
    expected = torch.linalg.solve(normal_matrix, values[0].mT @ values[1].unsqueeze(-1)).squeeze(-1)
    (own,) = layer(*values)
    close([own], [expected], EXACT)
    weights = normal(4, 3, seed=2)
    close(*(torch.autograd.grad((weights * result).sum(), values) for result in (own, expected)), EXACT)
    # The rows are F x - t = g up to the sign, t is squared, and so their multipliers are 2 t.
    solution, residual = layer.solve(*values), (values[0] @ expected.unsqueeze(-1)).squeeze(-1) - values[1]
    close([solution.y.abs()], [2 * residual.abs()], 1e-9)


# What stays


def least_squares(*constraints: Any, rows: int = 6, columns: int = 3, **options: Any) -> lpgd.CvxpyLayer:
    x, F = cp.Variable(columns), cp.Parameter((rows, columns))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - 1)), [part(x) for part in constraints])
    return lpgd.CvxpyLayer(problem, [F], [x], **options)


def test_it_can_be_turned_off() -> None:
    assert least_squares().structure.n == 3
    assert least_squares(eliminate=False).structure.n == 9


def defined(row: Callable[[Any, Any], Any], *more: Callable[[Any], Any], returned: str = "x") -> int:
    """How many variables are left of x (3,) and t (5,), where ``row`` defines t, whose square is minimised."""
    x, t, F = cp.Variable(3), cp.Variable(5), cp.Parameter((5, 3))
    defining = row(t, F @ x)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(t) + cp.sum_squares(x)), [defining, *(part(t) for part in more)])
    outputs = {"x": [x], "t": [x, t], "dual": [x, defining.dual_variables[0]]}[returned]
    return lpgd.CvxpyLayer(problem, [F], outputs).structure.n


def test_what_the_layer_returns_stays() -> None:
    assert defined(lambda t, value: t == value) == 3
    assert defined(lambda t, value: t == value, returned="t") == 8
    assert defined(lambda t, value: t == value, returned="dual") == 8


def test_bounded_variables_stay() -> None:
    assert defined(lambda t, value: t == value, lambda t: t <= 1) == 8


def test_tiny_pivots_stay() -> None:
    assert defined(lambda t, value: 1e-2 * t == value) == 3
    assert defined(lambda t, value: 1e-5 * t == value) == 8


def test_coefficients_that_are_parameters_stay() -> None:
    x, t, F, scale = cp.Variable(3), cp.Variable(3), cp.Parameter((3, 3)), cp.Parameter(3)
    rows = cp.multiply(scale, t) == F @ x
    problem = cp.Problem(cp.Minimize(cp.sum_squares(t) + cp.sum_squares(x)), [rows])
    assert lpgd.CvxpyLayer(problem, [F, scale], [x]).structure.n == 6


def test_integer_programs_stay() -> None:
    x, t, c = cp.Variable(3, integer=True), cp.Variable(), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(t), [t == c @ x, x >= -1, x <= 1])
    layer = lpgd.CvxpyLayer(problem, [c], [x], gradient=lpgd.LPGD(tau=1.0))
    assert layer.structure.n == 4


def test_few_factors_stay_and_many_squares_go() -> None:
    """The rule of the module's docstring, by the shape of F."""
    assert least_squares(rows=60, columns=20).structure.n == 20
    assert least_squares(rows=5, columns=50).structure.n == 55
    assert least_squares(rows=19, columns=20).structure.n == 39  # P would be singular


def test_as_many_squares_as_variables_go_whatever_is_beside_them() -> None:
    assert least_squares(rows=20, columns=20).structure.n == 20
    assert least_squares(lambda x: cp.norm1(x) <= 1, rows=30, columns=20).structure.n == 40
    assert least_squares(lambda x: np.ones((30, 20)) @ x <= 1, rows=20, columns=20).structure.n == 20


def test_the_factors_of_a_risk_model_stay_and_its_diagonal_goes() -> None:
    x, loadings, specific = cp.Variable(40), cp.Parameter((4, 40)), cp.Parameter(40)
    risk = cp.sum_squares(loadings @ x) + cp.sum_squares(cp.multiply(specific, x))
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(risk), [cp.sum(x) == 1]), [loadings, specific], [x])
    assert layer.structure.n == 44
    assert layer.structure.quadratic.nnz == 44


def test_hubers_penalty_stays() -> None:
    x, F = cp.Variable(4), cp.Parameter((12, 4))
    problem = cp.Problem(cp.Minimize(cp.sum(cp.huber(F @ x - 1)) + cp.sum_squares(x)))
    with_it, without = (lpgd.CvxpyLayer(problem, [F], [x], eliminate=eliminate) for eliminate in (True, False))
    assert with_it.structure.n == without.structure.n


# Data


def test_shared_data_stay_shared() -> None:
    case = nonnegative_least_squares()
    shared, batched = normal(9, 4), normal(3, 9)
    solution = case.layer()(shared, batched).info.solution
    assert solution.problem.data.P.ndim == 1
    assert solution.problem.data.q.ndim == 2
    case.values = [shared, batched]
    equal(case)
    case.values = [normal(3, 9, 4), normal(9)]
    equal(case)


def test_constant_matrices_are_multiplied_once() -> None:
    F = np.random.default_rng(0).standard_normal((6, 3))
    x, g = cp.Variable(3), cp.Parameter(6)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g)), [x >= 0]), [g], [x])
    first, second = (layer(normal(2, 6, seed=seed)).info.solution.problem.data.P for seed in (0, 1))
    assert first.data_ptr() == second.data_ptr()
    close([layer.structure.quadratic.to_dense(first)], [2 * torch.from_numpy(F.T @ F)], EXACT)


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_value_that_is_not_finite_fails_its_element_alone(spoilt: int) -> None:
    case = nonnegative_least_squares()
    leaves = [leaf(value) for value in case.values]
    reference = answer(case.layer(), [value[[0, 2]] for value in case.values])
    with torch.no_grad():
        leaves[spoilt][1].view(-1)[2] = torch.nan
    output = case.layer(on_error="nan")(*leaves)
    assert [status.usable for status in output.info.statuses] == [True, False, True]
    gradients = torch.autograd.grad(weighted([part.nan_to_num() for part in output]), leaves)
    assert all(not gradient[1].any() for gradient in gradients)
    close([part[[0, 2]] for part in output], reference.outputs, EXACT)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_the_choice_is_made_for_what_is_left() -> None:
    layer, without = (
        least_squares(lambda x: x >= 0, rows=400, columns=220, eliminate=eliminate) for eliminate in (True, False)
    )
    assert layer.solver is not None
    assert layer.solver.name in ("PIQP", "DAQP")  # a dense program in a box
    assert without.solver is not None
    assert without.solver.name == "INTERIOR"


def test_a_sparse_quadratic_objective_is_not_taken_for_a_dense_program() -> None:
    x, y = cp.Variable(900), cp.Parameter(900)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + cp.sum_squares(x[1:] - x[:-1])), [x >= 0])
    layer = lpgd.CvxpyLayer(problem, [y], [x])
    assert layer.structure.n == 900
    assert layer.solver is not None
    assert layer.solver.name != "DAQP"


# The layer around it


def first(case: Case, count: int) -> list[torch.Tensor]:
    """The first elements of a case's batch."""
    shapes = [parameter.shape for parameter in case.parameters]
    return [v[:count] if v.ndim > len(shape) else v for v, shape in zip(case.values, shapes, strict=True)]


def test_warm_starts_take_whole_solutions() -> None:
    case = quadratic_program()
    layer = case.layer(solver="SCS")
    whole = layer.solve(*case.values)
    cold, warm = layer(*case.values), layer(*case.values, warm_start=whole)
    close(warm, cold, 1e-9)
    two = layer(*first(case, 2), warm_start=whole.select(torch.tensor([0, 1])))
    close(two, [part[:2] for part in cold], 1e-9)
    with pytest.raises(ValueError, match="must come from this layer"):
        case.layer(eliminate=False, solver="SCS")(*case.values, warm_start=cold)


def test_copies_and_pickles() -> None:
    case = two_squares()
    layer = case.layer()
    expected = answer(layer, case.values)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        own = answer(again, case.values)
        close(own.outputs, expected.outputs, EXACT)
        close(own.gradients, expected.gradients, EXACT)


def test_forward_mode_and_jacobians() -> None:
    case = nonnegative_least_squares(batch=2)
    layer, without = case.layer(), case.layer(eliminate=False)
    tangents = tuple(normal(*value.shape, seed=7 + k) for k, value in enumerate(case.values))
    inputs = tuple(case.values)
    changes = [torch.func.jvp(lambda *t, own=own: tuple(own(*t)), inputs, tangents)[1] for own in (layer, without)]
    close(changes[0], changes[1], EXACT)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        jacobians = [transform(lambda F, own=own: own(F, inputs[1])[0])(inputs[0]) for own in (layer, without)]
        close([jacobians[0]], [jacobians[1]], EXACT)


def test_single_precision_and_empty_batches() -> None:
    case = quadratic_program()
    output = case.layer()(*(value.float() for value in case.values))
    assert output[0].dtype == torch.float32
    close([part.double() for part in output], answer(case.layer(), case.values).outputs, 1e-4)
    empty = case.layer()(*first(case, 0))
    assert empty[0].shape == (0, 5)


def test_envelopes_of_a_convex_loss() -> None:
    case = nonnegative_least_squares(batch=2)
    case.outputs = case.outputs[:1]
    target = np.linspace(0, 1, 4)

    def loss(x: Any) -> torch.Tensor:
        return (x[0] - torch.from_numpy(target)).square().sum(-1)

    found = [
        lpgd.envelopes(
            case.layer(eliminate), list(case.values), loss, 0.1,
            convex_loss=lambda element, x: cp.sum_squares(x - target),
        )
        for eliminate in (True, False)
    ]  # fmt: skip
    for name in ("loss", "lower", "upper"):
        close([getattr(found[0], name)], [getattr(found[1], name)], 1e-6)
