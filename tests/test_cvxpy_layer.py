"""CvxpyLayer's solutions and derivatives, against closed forms and finite differences of the layer itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import lpgd
from tests.canonical_cases import CASES, Case, geometric, no_parameters, quadratic
from tests.layer_cases import TIGHT, leaf, normal, weighted


def derivative(function: Callable[[float], Tensor], step: float = 3e-4) -> Tensor:
    """dfunction/dh at 0 by central differences of fourth order, whose truncation error is O(step⁴)."""
    near, far = function(step) - function(-step), function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def values_of(case: Case) -> list[Tensor]:
    return [torch.tensor(np.asarray(value), dtype=torch.float64) for value in case.values.values()]


def layer_of(case: Case, **options: Any) -> lpgd.CvxpyLayer:
    """All variables and, where they are unique, all dual variables of a case: bounds' duals among them."""
    dual = [dual for constraint in case.problem.constraints for dual in constraint.dual_variables]
    variables = [*case.problem.variables(), *(dual if case.duals and not case.gp else [])]
    return lpgd.CvxpyLayer(case.problem, list(case.values), variables, gp=case.gp, **options)


# Every kind of problem


DIFFERENTIABLE = [build for build in CASES if build is not no_parameters]


@pytest.mark.parametrize("build", DIFFERENTIABLE, ids=lambda build: build.__name__)
@pytest.mark.filterwarnings("ignore:.*are singular:lpgd.LpgdWarning")  # Clarabel's analytic centres
def test_gradients_are_finite_differences(build: Callable[[], Case]) -> None:
    case = build()
    # SCS ends on the boundary of a cone, where solutions have its tolerance; Clarabel inside, where they have its root.
    layer = layer_of(case, solver="SCS", solver_args={"eps": 1e-9})
    tensors = [leaf(value) for value in values_of(case)]
    gradients = torch.autograd.grad(weighted(layer(*tensors)), tensors)
    for i, tensor in enumerate(tensors):
        direction = normal(*tensor.shape, seed=i)
        before, after = tensors[:i], tensors[i + 1 :]
        with torch.no_grad():
            expected = derivative(lambda h: weighted(layer(*before, tensor + h * direction, *after)))  # noqa: B023
        torch.testing.assert_close((gradients[i] * direction).sum(), expected, rtol=5e-5, atol=5e-5)

    default = torch.autograd.grad(weighted(layer_of(case, solver_args=TIGHT)(*tensors)), tensors)
    for own, reference in zip(default, gradients, strict=True):
        torch.testing.assert_close(own, reference, rtol=0.0, atol=5e-4 * (1e-3 + float(reference.abs().max())))


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS", "ECOS"])
def test_gradcheck_of_a_quadratic_program(solver: str) -> None:
    case = quadratic()
    layer = layer_of(case, solver=solver, solver_args={"eps": 1e-8})
    tensors = tuple(leaf(value) for value in values_of(case))
    assert torch.autograd.gradcheck(lambda *a: tuple(layer(*a)), tensors, eps=1e-3, atol=2e-4, rtol=1e-3)


# Closed forms


def equality_program(n: int, m: int) -> tuple[lpgd.CvxpyLayer, list[Tensor]]:
    x, P, q = cp.Variable(n), cp.Parameter((n, n), PSD=True), cp.Parameter(n)
    A, b = cp.Parameter((m, n)), cp.Parameter(m)
    equality = A @ x == b
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [equality])
    layer = lpgd.CvxpyLayer(problem, [P, q, A, b], [equality.dual_variables[0], x], solver_args=TIGHT)
    root = normal(n, n, seed=1)
    return layer, [root @ root.T + torch.eye(n), normal(n, seed=2), normal(m, n, seed=3), normal(m, seed=4)]


def equality_solution(P: Tensor, q: Tensor, A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(dual, x) from the KKT matrix; P enters as ½ (P + Pᵀ), as it does in xᵀP x."""
    m, n = A.shape
    K = torch.cat([torch.cat([0.5 * (P + P.T), A.T], 1), torch.cat([A, torch.zeros(m, m, dtype=A.dtype)], 1)])
    solution = torch.linalg.solve(K, torch.cat([-q, b]))
    return solution[n:], solution[:n]


def test_equality_quadratic_program_is_its_kkt_system() -> None:
    layer, data = equality_program(5, 2)
    own, exact = [leaf(datum) for datum in data], [leaf(datum) for datum in data]
    outputs, expected = layer(*own), equality_solution(*exact)
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, rtol=1e-7, atol=1e-8)
    gradients = torch.autograd.grad(weighted(outputs), own)
    for gradient, value in zip(gradients, torch.autograd.grad(weighted(expected), exact), strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-6, atol=1e-7)


def test_the_gradient_of_a_quadratic_form_is_whole_and_symmetric() -> None:
    layer, data = equality_program(4, 1)
    P = leaf(data[0])
    (gradient,) = torch.autograd.grad(weighted(layer(P, *data[1:])), P)
    torch.testing.assert_close(gradient, gradient.T)
    off_diagonal = gradient - torch.diag(torch.diagonal(gradient))
    assert off_diagonal.abs().max() > 0.1 * gradient.abs().max()
    # An unsymmetric tensor means the same quadratic form as its symmetric part.
    skew = normal(4, 4, seed=9)
    for output, expected in zip(layer(P + skew - skew.T, *data[1:]), layer(P, *data[1:]), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-7, atol=1e-8)


def test_projection_onto_the_simplex() -> None:
    x, c = cp.Variable(5), cp.Parameter(5)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - c)), [cp.sum(x) == 1, x >= 0])
    layer = lpgd.CvxpyLayer(problem, [c], [x], solver_args=TIGHT)
    for seed in range(4):
        point = normal(5, seed=seed)
        support = layer(point)[0] > 1e-4
        on = support.to(torch.float64)
        expected = torch.diag(on) - torch.outer(on, on) / on.sum()
        jacobian = torch.autograd.functional.jacobian(lambda p: layer(p)[0], point)
        torch.testing.assert_close(jacobian, expected, rtol=0.0, atol=1e-6)


def test_projection_onto_a_box_with_its_bounds_as_duals() -> None:
    x, c, low, high = cp.Variable(4), cp.Parameter(4), cp.Parameter(4), cp.Parameter(4)
    above, below = x >= low, x <= high
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - c)), [above, below])
    layer = lpgd.CvxpyLayer(
        problem, [c, low, high], [above.dual_variables[0], x, below.dual_variables[0]], solver_args=TIGHT
    )
    assert layer.structure.m == 0  # rows only defined the square: the bounds are bounds
    data = [torch.tensor([-3.0, 0.2, 2.0, 9.0], dtype=torch.float64), -torch.ones(4).double(), torch.ones(4).double()]
    data[2][3] = torch.inf  # an infinite bound is no bound
    own, exact = [leaf(datum) for datum in data], [leaf(datum) for datum in data]
    outputs = layer(*own)
    expected = (torch.relu(exact[1] - exact[0]), exact[0].clamp(exact[1], exact[2]), torch.relu(exact[0] - exact[2]))
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, rtol=0.0, atol=1e-7)
    gradients = torch.autograd.grad(weighted(outputs), own)
    for gradient, value in zip(gradients, torch.autograd.grad(weighted(expected), exact), strict=True):
        torch.testing.assert_close(gradient, value, rtol=0.0, atol=1e-7)


def test_projection_onto_the_semidefinite_cone() -> None:
    X, C = cp.Variable((4, 4), PSD=True), cp.Parameter((4, 4), symmetric=True)
    layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(X - C))), [C], [X], solver="SCS", solver_args={"eps": 1e-9}
    )
    point = normal(4, 4, seed=3)
    own, exact = leaf(point + point.T), leaf(point + point.T)
    values, vectors = torch.linalg.eigh(0.5 * (exact + exact.T))
    expected = vectors @ torch.diag(torch.relu(values)) @ vectors.T
    (output,) = layer(own)
    torch.testing.assert_close(output, expected, rtol=0.0, atol=1e-7)
    assert torch.equal(output, output.T)
    gradients = [torch.autograd.grad(weighted([out]), arg)[0] for out, arg in ((output, own), (expected, exact))]
    torch.testing.assert_close(*gradients, rtol=0.0, atol=1e-6)


def test_diagonal_and_sparse_variables_and_parameters() -> None:
    pattern = ((0, 2, 1), (1, 0, 2))
    D, S = cp.Variable((3, 3), diag=True), cp.Variable((3, 3), sparsity=pattern)
    d, s = cp.Parameter((3, 3), diag=True), cp.Parameter((3, 3), sparsity=pattern)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(-1.0 * D + d) + 0.5 * cp.sum_squares(2.0 * S - s)))
    layer = lpgd.CvxpyLayer(problem, [d, s], [D, S], solver_args=TIGHT)
    masks = torch.eye(3).double(), torch.zeros(3, 3).double()
    masks[1][pattern] = 1.0
    tensors = [leaf(normal(3, 3, seed=k) * mask) for k, mask in enumerate(masks)]
    outputs = layer(*tensors)
    torch.testing.assert_close(outputs[0], tensors[0], rtol=0.0, atol=1e-8)
    torch.testing.assert_close(outputs[1], 0.5 * tensors[1], rtol=0.0, atol=1e-8)
    gradients = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), tensors)
    torch.testing.assert_close(gradients[0], masks[0], rtol=0.0, atol=1e-8)
    torch.testing.assert_close(gradients[1], 0.5 * masks[1], rtol=0.0, atol=1e-8)


def test_a_geometric_program() -> None:
    # minimise a x + b / x² has x = (2 b / a)^(1/3).
    x, a, b = cp.Variable(pos=True), cp.Parameter(pos=True), cp.Parameter(pos=True)
    layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(a * x + b * x**-2)), [a, b], [x], gp=True, solver="SCS", solver_args={"eps": 1e-9}
    )
    own, exact = ([leaf(torch.tensor([0.5, 3.0]).double()), leaf(torch.tensor(0.7).double())] for _ in range(2))
    expected = (2 * exact[1] / exact[0]) ** (1 / 3)
    (output,) = layer(*own)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=0.0)
    gradients = torch.autograd.grad(weighted([output]), own)
    for gradient, value in zip(gradients, torch.autograd.grad(weighted([expected]), exact), strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-5, atol=0.0)


def test_scalars_need_no_batch_dimension() -> None:
    # minimise ½ x² - a x, x <= b: x = min(a, b), the multiplier is max(a - b, 0).
    x, a, b = cp.Variable(), cp.Parameter(), cp.Parameter()
    bound = x <= b
    problem = cp.Problem(cp.Minimize(0.5 * cp.square(x) - a * x), [bound])
    layer = lpgd.CvxpyLayer(problem, [a, b], [x, bound.dual_variables[0]], solver_args=TIGHT)
    one, half = leaf(torch.tensor(1.0).double()), leaf(torch.tensor(0.5).double())
    value, dual = layer(one, half)
    assert value.shape == dual.shape == ()
    torch.testing.assert_close(torch.stack([value, dual]), torch.tensor([0.5, 0.5]).double(), rtol=0.0, atol=1e-8)
    gradients = torch.autograd.grad(2.0 * value + 3.0 * dual, [one, half])
    torch.testing.assert_close(torch.stack(gradients), torch.tensor([3.0, -1.0]).double(), rtol=0.0, atol=1e-8)


def test_arrays_are_read_row_by_row() -> None:
    X, T = cp.Variable((2, 3, 4)), cp.Parameter((2, 3, 4))
    layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(X - T)), [X[0, 1, 2] == 5]), [T], [X], solver_args=TIGHT
    )
    point = leaf(normal(2, 3, 4))
    (output,) = layer(point)
    expected, mask = point.detach().clone(), torch.ones(2, 3, 4).double()
    expected[0, 1, 2], mask[0, 1, 2] = 5.0, 0.0
    torch.testing.assert_close(output, expected, rtol=0.0, atol=1e-8)
    weights = normal(2, 3, 4, seed=5)
    (gradient,) = torch.autograd.grad((weights * output).sum(), point)
    torch.testing.assert_close(gradient, weights * mask, rtol=0.0, atol=1e-8)


def test_duals_have_the_signs_of_cvxpy() -> None:
    x, c = cp.Variable(3), cp.Parameter(3)
    constraints = [cp.sum(x) == 1, x >= -0.5, x <= 0.8, cp.norm(x) <= 1.2, x[0] + x[1] <= 0.25]
    problem = cp.Problem(cp.Maximize(c @ x - cp.sum_squares(x)), constraints)
    duals = [constraint.dual_variables[0] for constraint in constraints]
    layer = lpgd.CvxpyLayer(problem, [c], duals, solver_args=TIGHT)
    c.value = np.array([2.0, -1.0, 1.5])
    problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    for constraint, output in zip(constraints, layer(torch.from_numpy(c.value)), strict=True):
        np.testing.assert_allclose(output.numpy(), constraint.dual_value, rtol=0.0, atol=1e-6)


# What is asked for, and what is not


def test_outputs_come_in_the_order_asked_for_and_as_often() -> None:
    layer, data = equality_program(4, 1)
    dual, x = layer(*data)
    assert (dual.shape, x.shape) == ((1,), (4,))
    variables, parameter = [cp.Variable(2), cp.Variable(3)], cp.Parameter(3)
    first, second = variables
    problem = cp.Problem(cp.Minimize(cp.sum_squares(second - parameter) + cp.sum_squares(first - parameter[:2])))
    point = leaf(normal(3))
    outputs = lpgd.CvxpyLayer(problem, [parameter], [second, first, second], solver_args=TIGHT)(point)
    assert isinstance(outputs, tuple)
    for output, expected in zip(outputs, (point, point[:2], point), strict=True):
        torch.testing.assert_close(output, expected, rtol=0.0, atol=1e-8)
    (gradient,) = torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), point)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0), rtol=0.0, atol=1e-8)


def test_a_problem_without_parameters() -> None:
    case = no_parameters()
    layer = layer_of(case, solver_args=TIGHT)
    outputs = layer()
    case.problem.solve(solver="CLARABEL")
    np.testing.assert_allclose(outputs[0].numpy(), case.problem.variables()[0].value, rtol=0.0, atol=1e-4)
    assert all(out.dtype == torch.get_default_dtype() and not out.requires_grad for out in outputs)


def test_parameters_that_reach_nothing_have_a_zero_gradient() -> None:
    x, c, offset = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c) + offset)), [offset, c], [x])
    tensors = [leaf(torch.tensor(3.0)), leaf(torch.ones(2))]
    layer(*tensors)[0].sum().backward()
    torch.testing.assert_close(tensors[0].grad, torch.tensor(0.0))
    torch.testing.assert_close(tensors[1].grad, torch.ones(2))


def test_only_what_needs_a_gradient_gets_one() -> None:
    layer, data = equality_program(4, 1)
    with torch.no_grad():
        outputs = layer(*[leaf(datum) for datum in data])
    assert not any(out.requires_grad for out in outputs)
    assert not any(out.requires_grad for out in layer(*data))
    with torch.inference_mode():
        torch.testing.assert_close(layer(*data)[1], outputs[1])
    tensors = [data[0], leaf(data[1]), data[2], data[3]]
    outputs = layer(*tensors)
    outputs[1].sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == [False, True, False, False]
    assert len(outputs.info.gradients) == 1


def test_no_gradient_given_is_the_exact_gradient() -> None:
    case = quadratic()
    tensors = [leaf(value) for value in values_of(case)]
    gradients = []
    for method in (None, lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-4), lpgd.LPGD(), lpgd.Domke()):
        layer = layer_of(case, gradient=method, solver_args=TIGHT)
        gradients.append(torch.autograd.grad(weighted(layer(*tensors)), tensors))
    for others in gradients[1:]:
        for own, reference in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(own, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
    for own, reference in zip(gradients[1], gradients[0], strict=True):
        assert torch.equal(own, reference)


# Forward mode and torch.func


@pytest.mark.parametrize(
    "gradient", [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-2)], ids=lambda method: type(method).__name__
)
@pytest.mark.parametrize("build", [quadratic, geometric], ids=lambda build: build.__name__)
def test_forward_mode_is_the_directional_derivative(build: Callable[[], Case], gradient: lpgd.LPGD) -> None:
    case = build()
    layer = layer_of(case, solver="SCS", gradient=gradient, solver_args={"eps": 1e-9})
    values = tuple(values_of(case))
    tangents = tuple(normal(*value.shape, seed=k) for k, value in enumerate(values))

    def moved(h: float) -> Tensor:
        outputs = layer(*(value + h * tangent for value, tangent in zip(values, tangents, strict=True)))
        return torch.cat([out.reshape(-1) for out in outputs])

    expected = derivative(moved, step=1e-3)
    outputs, changes = torch.func.jvp(lambda *a: tuple(layer(*a)), values, tangents)
    torch.testing.assert_close(torch.cat([out.reshape(-1) for out in outputs]), moved(0.0), rtol=0.0, atol=1e-8)
    torch.testing.assert_close(torch.cat([part.reshape(-1) for part in changes]), expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(value, tangent) for value, tangent in zip(values, tangents, strict=True)]
        parts = [forward_ad.unpack_dual(out).tangent for out in layer(*duals)]
    assert all(part is not None for part in parts)
    for part, change in zip(parts, changes, strict=True):
        torch.testing.assert_close(part, change, rtol=1e-4, atol=1e-5)


def test_torch_func_gives_the_gradients_of_autograd() -> None:
    layer, data = equality_program(4, 2)
    q = leaf(data[1])

    def loss(q: Tensor) -> Tensor:
        return layer(data[0], q, *data[2:])[1].square().sum()

    (expected,) = torch.autograd.grad(loss(q), q)
    torch.testing.assert_close(torch.func.grad(loss)(q.detach()), expected)
    value, pullback = torch.func.vjp(loss, q.detach())
    torch.testing.assert_close(pullback(torch.ones_like(value))[0], expected)
    tangent = normal(4, seed=7)
    _, change = torch.func.jvp(loss, (q.detach(),), (tangent,))
    torch.testing.assert_close(change, expected @ tangent, rtol=1e-7, atol=1e-8)
