"""Canonical forms against CVXPY itself: same solutions, same multipliers, same optimal values."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields

import clarabel
import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from lpgd.cones import Cones, svec_indices
from lpgd.layers.canonical import canonicalise
from lpgd.layers.layout import CanonicalProgram

FloatArray = NDArray[np.float64]
Values = dict[cp.Parameter, FloatArray]


@dataclass
class Case:
    problem: cp.Problem
    values: Values
    gp: bool = False
    duals: bool = True  # whether every dual variable is unique
    without_quadratics: bool = False  # CVXPY before 1.9.3 solves wrongly with squares of structured variables


def clarabel_settings() -> clarabel.DefaultSettings:
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.presolve_enable = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    return settings


def theta_of(program: CanonicalProgram, values: list[FloatArray]) -> FloatArray:
    theta = np.full(program.p, np.nan)
    for layout, value in zip(program.parameters, values, strict=True):
        entries = np.asarray(value, dtype=float).reshape(-1)[layout.take]
        theta[layout.columns] = np.log(entries) if layout.log else entries
    return theta


def upper_triangle_order(cones: Cones) -> NDArray[np.int64]:
    """Row i of Clarabel's is this row of ours: it stacks the upper triangle column by column."""
    order = np.arange(cones.rows)
    start = cones.sections["semidefinite"].start
    for side in cones.semidefinite:
        row, column = svec_indices(side)
        order[start : start + row.size] = start + np.lexsort((column, row))
        start += row.size
    return order


def solve_with_clarabel(program: CanonicalProgram, theta: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """x, y, signed bound multipliers z and the user's objective, bounds entered as rows."""
    P = program.quadratic.csc(program.P(theta))
    A, b, q = program.constraint.csc(program.A(theta)), program.b(theta), program.q(theta)
    lower, upper = program.lower(theta), program.upper(theta)
    above, below = np.isfinite(lower), np.isfinite(upper)
    order = upper_triangle_order(program.cones)
    identity = sp.eye_array(program.n, format="csr")
    low, high = program.lower_index[above], program.upper_index[below]
    rows = sp.csc_array(sp.vstack([A.tocsr()[order], -identity[low], identity[high]]))
    right = np.concatenate([b[order], -lower[above], upper[below]])
    kinds = [clarabel.ZeroConeT(program.cones.zero), clarabel.NonnegativeConeT(program.cones.nonnegative)]
    kinds += [clarabel.SecondOrderConeT(size) for size in program.cones.second_order]
    kinds += [clarabel.PSDTriangleConeT(side) for side in program.cones.semidefinite]
    kinds += [clarabel.ExponentialConeT() for _ in range(program.cones.exponential)]
    kinds += [clarabel.PowerConeT(exponent) for exponent in program.cones.power]
    kinds.append(clarabel.NonnegativeConeT(low.size + high.size))
    solver = clarabel.DefaultSolver(sp.csc_matrix(sp.triu(P)), q, sp.csc_matrix(rows), right, kinds, clarabel_settings())
    result = solver.solve()
    assert str(result.status) in ("Solved", "AlmostSolved")
    x, multipliers = np.array(result.x), np.array(result.z)
    y = np.empty(program.cones.rows)
    y[order] = multipliers[: order.size]
    z = np.zeros(program.n)
    np.subtract.at(z, low, multipliers[order.size : order.size + low.size])
    np.add.at(z, high, multipliers[order.size + low.size :])
    objective = program.sign * (0.5 * x @ P @ x + q @ x + program.offset(theta)[0])
    return x, y, z, objective


def rng_of(name: str) -> np.random.Generator:
    return np.random.default_rng(sum(map(ord, name)))


def lp_box() -> Case:
    rng = rng_of("lp_box")
    x, A, b, c = cp.Variable(6), cp.Parameter((2, 6)), cp.Parameter(2), cp.Parameter(6)
    values = {A: rng.random((2, 6)), b: np.zeros(2), c: rng.standard_normal(6)}
    values[b] = values[A] @ rng.uniform(0.2, 0.8, 6)
    return Case(cp.Problem(cp.Minimize(c @ x + 3.0), [A @ x == b, x >= 0, x <= 1]), values)


def two_sided() -> Case:
    rng = rng_of("two_sided")
    x, low, high, c = cp.Variable(5), cp.Parameter(5), cp.Parameter(5), cp.Parameter(5)
    values = {low: -rng.random(5), high: rng.random(5), c: rng.standard_normal(5)}
    constraints = [-2 * x <= -low, 3 * x <= high + 1, np.arange(5) @ x <= 0.1, cp.sum(x) == 0.05]
    return Case(cp.Problem(cp.Minimize(c @ x), constraints), values)


def attribute_bounds() -> Case:
    rng = rng_of("attribute_bounds")
    c, high = cp.Parameter(4), cp.Parameter(4)
    x = cp.Variable(4, bounds=[np.array([-1.0, -np.inf, 0.0, -2.0]), 1.5])
    y = cp.Variable(4, bounds=[-1, high])
    values = {c: rng.standard_normal(4), high: rng.random(4)}
    constraints = [cp.sum(x) + cp.sum(y) == 0.3, x - y <= 0.7]
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(x - c) + cp.sum_squares(y + 2 * c)), constraints), values)


def constant_bounds() -> Case:
    rng = rng_of("constant_bounds")
    c = cp.Parameter((2, 2))
    x = cp.Variable((2, 2), bounds=[np.array([[-1.0, -np.inf], [0.0, -0.2]]), np.array([[0.1, 2.0], [np.inf, 0.5]])])
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.sum(x, axis=0) == np.array([0.2, 0.4])])
    return Case(problem, {c: rng.standard_normal((2, 2))})


def quadratic() -> Case:
    rng = rng_of("quadratic")
    x, P, q = cp.Variable(4), cp.Parameter((4, 4), PSD=True), cp.Parameter(4)
    root = rng.standard_normal((4, 4))
    values = {P: root @ root.T + np.eye(4), q: rng.standard_normal(4)}
    return Case(cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), [cp.sum(x) == 1, x >= 0.1]), values)


def unconstrained() -> Case:
    rng = rng_of("unconstrained")
    x, P, q = cp.Variable(3), cp.Parameter((3, 3), PSD=True), cp.Parameter(3)
    root = rng.standard_normal((3, 3))
    return Case(cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x)), {P: root @ root.T + np.eye(3), q: rng.standard_normal(3)})


def nonnegative_least_squares() -> Case:
    rng = rng_of("nnls")
    x, F, g = cp.Variable(4, nonneg=True), cp.Parameter((7, 4)), cp.Parameter(7)
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g))), {F: rng.standard_normal((7, 4)), g: rng.standard_normal(7)})


def portfolio() -> Case:
    rng = rng_of("portfolio")
    x, mu, S, risk = cp.Variable(5), cp.Parameter(5), cp.Parameter((5, 5)), cp.Parameter(nonneg=True)
    values = {mu: rng.random(5), S: np.eye(5) + 0.2 * rng.standard_normal((5, 5)), risk: np.array(0.75)}
    return Case(cp.Problem(cp.Maximize(mu @ x - 0.4), [cp.norm(S @ x) <= risk, cp.sum(x) == 1, x >= 0]), values)


def second_order_columns() -> Case:
    rng = rng_of("second_order_columns")
    t, X, C = cp.Variable(3), cp.Variable((2, 3)), cp.Parameter((2, 3))
    constraints = [cp.SOC(t, X), cp.SOC(t + 1, 2 * X.T - 0.1, axis=1), X[0] == 1]
    problem = cp.Problem(cp.Minimize(cp.sum(t) + cp.sum(cp.multiply(C, X))), constraints)
    return Case(problem, {C: 0.3 * rng.standard_normal((2, 3))}, duals=False)


def second_order_scaled() -> Case:
    rng = rng_of("second_order_scaled")
    t, X, C = cp.Variable(4), cp.Variable((4, 2)), cp.Parameter((4, 2))
    constraints = [cp.SOC(t, X - C, axis=1), cp.sum(X, axis=0) == np.array([0.5, -1.0])]
    return Case(cp.Problem(cp.Minimize(np.arange(1, 5) @ t), constraints), {C: rng.standard_normal((4, 2))}, duals=False)


def semidefinite() -> Case:
    rng = rng_of("semidefinite")
    X, C, b = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True), cp.Parameter()
    noise = rng.standard_normal((3, 3))
    constraints = [X >> 0, cp.trace(X) == b, X[0, 1] >= 0.1, X[1, 1] <= 0.3 * b]
    return Case(cp.Problem(cp.Minimize(cp.trace(C @ X)), constraints), {C: noise + noise.T, b: np.array(1.3)})


def semidefinite_variables() -> Case:
    rng = rng_of("semidefinite_variables")
    X, Y, C = cp.Variable((3, 3), PSD=True), cp.Variable((2, 2), NSD=True), cp.Parameter((3, 3), NSD=True)
    noise = rng.standard_normal((3, 3))
    constraints = [X[:2, :2] - Y == np.array([[2.0, 0.3], [0.3, 1.0]]), cp.trace(X) <= 4]
    problem = cp.Problem(cp.Maximize(cp.trace(C @ X) + cp.trace(Y) - cp.sum_squares(X)), constraints)
    return Case(problem, {C: -noise @ noise.T}, duals=False, without_quadratics=True)


def matrix_inequality() -> Case:
    rng = rng_of("matrix_inequality")
    x, F, G = cp.Variable(2), cp.Parameter((3, 3), symmetric=True), cp.Parameter((3, 3), symmetric=True)
    first, second = rng.standard_normal((2, 3, 3))
    constraint = np.eye(3) * 2 + x[0] * F + x[1] * G >> 0
    return Case(cp.Problem(cp.Minimize(x[0] - 0.5 * x[1]), [constraint]), {F: first + first.T, G: second + second.T})


def logistic() -> Case:
    rng = rng_of("logistic")
    w, X, weight = cp.Variable(3), cp.Parameter((8, 3)), cp.Parameter(nonneg=True)
    labels = np.where(rng.random(8) < 0.5, -1.0, 1.0)
    losses = cp.sum(cp.logistic(cp.multiply(-labels, X @ w)))
    problem = cp.Problem(cp.Minimize(losses + weight * cp.norm1(w) + 0.1 * cp.sum_squares(w)), [w[0] <= 0.5])
    return Case(problem, {X: rng.standard_normal((8, 3)), weight: np.array(0.3)})


def entropy() -> Case:
    rng = rng_of("entropy")
    x, A, b = cp.Variable(5), cp.Parameter((2, 5)), cp.Parameter(2)
    values = {A: rng.random((2, 5)), b: np.zeros(2)}
    values[b] = values[A] @ rng.random(5)
    return Case(cp.Problem(cp.Maximize(cp.sum(cp.entr(x))), [A @ x == b]), values)


def exponential_cone() -> Case:
    rng = rng_of("exponential_cone")
    u, v, w, c = cp.Variable(3), cp.Variable(3), cp.Variable(3), cp.Parameter(3)
    constraints = [cp.ExpCone(u, v, w), v == np.array([1.0, 0.5, 2.0]), u >= c]
    return Case(cp.Problem(cp.Minimize(np.array([1.0, 2.0, 0.5]) @ w), constraints), {c: rng.standard_normal(3)})


def power_cone() -> Case:
    rng = rng_of("power_cone")
    u, v, w, c = cp.Variable(2), cp.Variable(2), cp.Variable(2), cp.Parameter(2)
    constraints = [cp.PowCone3D(u, v, w, np.array([0.3, 0.6])), u + 2 * v == c]
    return Case(cp.Problem(cp.Maximize(np.array([1.0, 2.0]) @ w), constraints), {c: 1.0 + rng.random(2)})


def power_cones_of_many() -> Case:
    rng = rng_of("power_cones_of_many")
    W, z, c = cp.Variable((4, 2)), cp.Variable(2), cp.Parameter((4, 2), pos=True)
    alpha = np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.2, 0.3]]).T
    constraints = [cp.PowConeND(W, z, alpha), cp.sum(cp.multiply(c, W), axis=0) <= np.array([1.0, 2.0])]
    return Case(cp.Problem(cp.Maximize(z[0] + 2 * z[1]), constraints), {c: 0.5 + rng.random((4, 2))})


def geometric() -> Case:
    x, y, z = (cp.Variable(pos=True, name=name) for name in "xyz")
    wall, floor, ratio, exponent = cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter(pos=True), cp.Parameter()
    constraints = [2 * (x * y + x * z) <= wall, y * z <= floor, x <= ratio * y, y**exponent <= 3 * z, z <= 2.5]
    values = {wall: np.array(20.0), floor: np.array(4.0), ratio: np.array(2.0), exponent: np.array(1.4)}
    return Case(cp.Problem(cp.Maximize(x * y * z), constraints), values, gp=True)


def geometric_matrix() -> Case:
    rng = rng_of("geometric_matrix")
    X, a = cp.Variable((2, 3), pos=True), cp.Parameter((2, 3), pos=True)
    constraints = [cp.prod(X) >= 2.0, X[0, 1] >= 1.7]
    return Case(cp.Problem(cp.Minimize(cp.sum(cp.multiply(a, X))), constraints), {a: 0.5 + rng.random((2, 3))}, gp=True)


def structured() -> Case:
    rng = rng_of("structured")
    pattern = [(0, 1, 2), (1, 0, 2)]
    S, D = cp.Parameter((3, 3), symmetric=True), cp.Parameter((3, 3), diag=True)
    Q = cp.Parameter((3, 3), sparsity=pattern)
    X, Y, Z = cp.Variable((3, 3), symmetric=True), cp.Variable((3, 3), diag=True), cp.Variable((3, 3), sparsity=pattern)
    noise, weights = rng.standard_normal((3, 3)), np.zeros((3, 3))
    weights[pattern[0], pattern[1]] = rng.standard_normal(3)
    objective = cp.sum_squares(X - S) + cp.sum_squares(Y - 2 * D) + cp.sum_squares(Z + Q) + cp.sum(cp.multiply(noise, X + Y))
    constraints = [X[0, 0] + Y[1, 1] + Z[2, 2] == 1, X + Z <= 2.5]
    values = {S: noise + noise.T, D: np.diag(rng.standard_normal(3)), Q: weights}
    return Case(cp.Problem(cp.Minimize(objective), constraints), values, duals=False, without_quadratics=True)


def signed_structured() -> Case:
    rng = rng_of("signed_structured")
    S = cp.Parameter((3, 3))
    X, Y = cp.Variable((3, 3), symmetric=True, nonneg=True), cp.Variable((3, 3), diag=True, nonpos=True)
    objective = cp.sum_squares(X - S) + cp.sum_squares(X) + cp.sum_squares(Y + S)
    return Case(cp.Problem(cp.Minimize(objective)), {S: rng.standard_normal((3, 3))}, without_quadratics=True)


def structured_bounds() -> Case:
    rng = rng_of("structured_bounds")
    low, C = -rng.random((3, 3)), cp.Parameter((3, 3))
    X, Y = cp.Variable((3, 3), symmetric=True, bounds=[low + low.T, 0.4]), cp.Variable((3, 3), diag=True, bounds=[-0.3, 0.4])
    objective = cp.sum_squares(X - C) + cp.sum_squares(Y - C)
    return Case(cp.Problem(cp.Minimize(objective)), {C: 2 * rng.standard_normal((3, 3))}, without_quadratics=True)


def cones_of_matrices() -> Case:
    rng = rng_of("cones_of_matrices")
    u, v, w, c = cp.Variable((2, 3)), cp.Variable((2, 3)), cp.Variable((2, 3)), cp.Parameter((2, 3), pos=True)
    r, s, weights = cp.Variable((2, 3)), cp.Variable((2, 3)), np.arange(1.0, 7.0).reshape(2, 3)
    constraints = [cp.ExpCone(u, v, w), v == 1, u >= -c, r + w == 1 + c]
    constraints.append(cp.PowCone3D(r, v + 1, s, np.linspace(0.2, 0.7, 6).reshape(2, 3)))
    return Case(cp.Problem(cp.Maximize(cp.sum(cp.multiply(weights, s - w))), constraints), {c: rng.random((2, 3))})


def batch_of_matrices() -> Case:
    rng = rng_of("batch_of_matrices")
    X, C = cp.Variable((2, 3, 3), symmetric=True), cp.Parameter((2, 3, 3))
    values = rng.standard_normal((2, 3, 3))
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.PSD(X)]), {C: values + values.swapaxes(1, 2)}, False, False, True)


def many_atoms() -> Case:
    rng = rng_of("many_atoms")
    x, A, b = cp.Variable(4), cp.Parameter((6, 4)), cp.Parameter(6)
    first = cp.sum(cp.huber(A @ x - b)) + cp.max(x) + cp.quad_over_lin(x, 2.0) + cp.norm(x, 3) + cp.log_sum_exp(x)
    problem = cp.Problem(cp.Minimize(first - cp.geo_mean(x + 5)), [cp.norm_inf(x) <= 1, cp.sum_largest(x, 2) <= 0.5])
    return Case(problem, {A: rng.standard_normal((6, 4)), b: rng.standard_normal(6)}, duals=False)


def determinant() -> Case:
    rng = rng_of("determinant")
    X, C = cp.Variable((3, 3), PSD=True), cp.Parameter((3, 3), PSD=True)
    root = rng.standard_normal((3, 3))
    return Case(cp.Problem(cp.Maximize(cp.log_det(X) - cp.trace(C @ X)), [cp.trace(X) <= 2]), {C: root @ root.T})


def cones_by_name() -> Case:
    x, c = cp.Variable(3), cp.Parameter(3)
    constraints = [cp.NonNeg(2 * x[:2] - 0.1), cp.Zero(x[0] - x[2]), cp.sum(c) <= 100]
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), constraints), {c: np.array([-0.5, 0.3, 0.2])})


def inner_minimum() -> Case:
    rng = rng_of("inner_minimum")
    x, y, c = cp.Variable(2), cp.Variable(2), cp.Parameter(2)
    inner = cp.partial_optimize(cp.Problem(cp.Minimize(cp.sum_squares(y - x)), [y >= 1]), [y], [x])
    return Case(cp.Problem(cp.Minimize(inner + cp.sum_squares(x - c)), [x[0] <= 0.1]), {c: rng.random(2)})


def many_dimensions() -> Case:
    rng = rng_of("many_dimensions")
    X, T, M = cp.Variable((2, 3, 2)), cp.Parameter((2, 3, 2)), cp.Parameter((3, 2))
    flat = cp.reshape(X, (6, 2), order="C")
    constraints = [X <= 0.4, flat @ np.array([1.0, 2.0]) == cp.reshape(M, (6,), order="C"), cp.sum(X, axis=0) >= M - 3]
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(X - T)), constraints), {T: rng.random((2, 3, 2)), M: rng.random((3, 2))})


def matrices() -> Case:
    rng = rng_of("matrices")
    X, A, B = cp.Variable((3, 2)), cp.Parameter((4, 3)), cp.Parameter((4, 2))
    constraints = [X <= np.array([[0.1, 0.2], [0.3, 0.0], [0.2, 0.1]]), np.ones((1, 3)) @ X == np.array([[0.2, -0.3]])]
    return Case(cp.Problem(cp.Minimize(cp.sum_squares(A @ X - B)), constraints), {A: rng.random((4, 3)), B: rng.random((4, 2))})


def scalars() -> Case:
    x, y, a, b = cp.Variable(), cp.Variable(), cp.Parameter(), cp.Parameter()
    constraints = [x + a * y <= b, x >= b - 4, -y <= 3, x - y == 0.5]
    return Case(cp.Problem(cp.Minimize(cp.square(x) + 2 * y + b), constraints), {a: np.array(0.7), b: np.array(1.2)})


def no_parameters() -> Case:
    x = cp.Variable(3)
    return Case(cp.Problem(cp.Minimize(cp.norm(x - np.array([1.0, 2.0, 3.0])) + 1), [cp.sum(x) <= 2, x[2] <= 1.2]), {})


def empty_constraint() -> Case:
    x, y, c = cp.Variable(3), cp.Variable((0,)), cp.Parameter(3)
    constraints = [x >= c, np.zeros((0, 3)) @ x == np.zeros(0), y >= 1]
    return Case(cp.Problem(cp.Minimize(cp.sum(x) + cp.sum(y)), constraints), {c: np.array([1.0, -2.0, 0.5])})


CASES: list[Callable[[], Case]] = [
    lp_box,
    two_sided,
    attribute_bounds,
    constant_bounds,
    quadratic,
    unconstrained,
    nonnegative_least_squares,
    portfolio,
    second_order_columns,
    second_order_scaled,
    semidefinite,
    semidefinite_variables,
    matrix_inequality,
    logistic,
    entropy,
    exponential_cone,
    power_cone,
    power_cones_of_many,
    geometric,
    geometric_matrix,
    structured,
    signed_structured,
    structured_bounds,
    cones_of_matrices,
    batch_of_matrices,
    many_atoms,
    determinant,
    cones_by_name,
    inner_minimum,
    many_dimensions,
    matrices,
    scalars,
    no_parameters,
    empty_constraint,
]


def value_of(variable: cp.Variable) -> FloatArray:
    value = variable.value_sparse if variable.attributes["sparsity"] else variable.value
    return value.toarray() if sp.issparse(value) else np.asarray(value, dtype=float)


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_agrees_with_cvxpy(build: Callable[[], Case]) -> None:
    case = build()
    primal = case.problem.variables()
    known = {variable.id for variable in primal}
    dual = [dual for constraint in case.problem.constraints for dual in constraint.dual_variables]
    parameters = list(case.values)[::-1]
    variables = [*dual, *primal]
    program = canonicalise(case.problem, parameters, variables, gp=case.gp)
    theta = theta_of(program, [case.values[parameter] for parameter in parameters])
    x, y, z, objective = solve_with_clarabel(program, theta)
    found = [layout.read(x, y, z) for layout in program.variables]

    settings = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*sparse CVXPY expression")  # CVXPY's own code reads them so
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")  # than 1e-11, that is
        for parameter, value in case.values.items():
            parameter.value = value
        if case.without_quadratics:
            settings["use_quad_obj"] = False
        case.problem.solve(solver=cp.CLARABEL, gp=case.gp, ignore_dpp=True, canon_backend="SCIPY", **settings)
    assert case.problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE)
    assert (np.exp(objective) if case.gp else objective) == pytest.approx(case.problem.value, rel=1e-6, abs=1e-7)
    for variable, value in zip(variables, found, strict=True):
        assert value.shape == variable.shape
        if variable.id in known or case.duals:
            np.testing.assert_allclose(value, value_of(variable), rtol=1e-5, atol=1e-5, err_msg=variable.name())


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_maps_have_the_shapes_they_declare(build: Callable[[], Case]) -> None:
    case = build()
    program = canonicalise(case.problem, list(case.values), case.problem.variables(), gp=case.gp)
    m, n, width = program.cones.rows, program.n, program.p + 1
    sizes = {"P": program.quadratic.nnz, "q": n, "A": program.constraint.nnz, "b": m, "offset": 1}
    sizes |= {"lower": program.lower_index.size, "upper": program.upper_index.size}
    assert {name: getattr(program, name).matrix.shape for name in sizes} == {name: (size, width) for name, size in sizes.items()}
    assert program.quadratic.shape == (n, n) and program.constraint.shape == (m, n)
    for index in (program.lower_index, program.upper_index):
        assert index.dtype == np.int64 and np.all(np.diff(index) > 0)
    assert [layout.columns.start for layout in program.parameters] == [
        0, *(layout.columns.stop for layout in program.parameters)
    ][: len(program.parameters)]  # fmt: skip
    P = program.quadratic.csc(program.P(np.random.default_rng(0).standard_normal(program.p)))
    np.testing.assert_array_equal(P.toarray(), P.toarray().T)
    for variable in case.problem.variables():
        assert (variable.value_sparse if variable.attributes["sparsity"] else variable.value) is None
    assert case.problem.status is None and case.problem._cache.key is None


def test_box_leaves_only_the_equalities() -> None:
    case = lp_box()
    A, b, c = case.values
    constraints = case.problem.constraints
    program = canonicalise(case.problem, [c, A, b], [constraints[1].dual_variables[0]])
    assert program.cones == Cones(zero=2)
    np.testing.assert_array_equal(program.lower_index, np.arange(6))
    np.testing.assert_array_equal(program.upper_index, np.arange(6))
    theta = theta_of(program, [case.values[parameter] for parameter in (c, A, b)])
    np.testing.assert_array_equal(program.constraint.csc(program.A(theta)).toarray(), case.values[A])
    np.testing.assert_array_equal(program.b(theta), case.values[b])
    np.testing.assert_array_equal(program.q(theta), case.values[c])
    np.testing.assert_array_equal(program.lower(theta), np.zeros(6))
    np.testing.assert_array_equal(program.upper(theta), np.ones(6))
    assert program.offset(theta) == 3.0 and program.quadratic.nnz == 0
    reaching = {name: getattr(program, name).reaching for name in ("P", "q", "A", "b", "lower", "upper", "offset")}
    nothing = frozenset()
    assert reaching == {
        "P": nothing, "q": {0}, "A": {1}, "b": {2}, "lower": nothing, "upper": nothing, "offset": nothing
    }  # fmt: skip


def test_bounds_are_scaled_by_the_coefficient_and_carry_parameters() -> None:
    case = two_sided()
    low, high, c = case.values
    dual = [constraint.dual_variables[0] for constraint in case.problem.constraints]
    program = canonicalise(case.problem, [low, high, c], dual[:2])
    assert program.cones == Cones(zero=1, nonnegative=1)
    theta = theta_of(program, list(case.values.values()))
    np.testing.assert_allclose(program.lower(theta), case.values[low] / 2, rtol=1e-15)
    np.testing.assert_allclose(program.upper(theta), (case.values[high] + 1) / 3, rtol=1e-15)
    assert (program.lower.reaching, program.upper.reaching) == ({0}, {1})
    z = np.array([-2.0, 6.0, 0.0, -1.0, 3.0])
    below, above = (layout.read(np.zeros(program.n), np.zeros(2), z) for layout in program.variables)
    np.testing.assert_allclose(below, [1.0, 0.0, 0.0, 0.5, 0.0])
    np.testing.assert_allclose(above, [0.0, 2.0, 0.0, 0.0, 1.0])


def test_a_second_bound_on_one_side_stays_a_row() -> None:
    x, a, b = cp.Variable(nonneg=True), cp.Parameter(), cp.Parameter()
    program = canonicalise(cp.Problem(cp.Minimize(x), [x >= a, x <= b, x <= a + b, 2 * x == b, a * x <= 1]), [a, b], [x])
    assert program.cones == Cones(zero=1, nonnegative=3)
    assert program.lower(np.array([5.0, 7.0])) == 0.0 and program.upper(np.array([5.0, 7.0])) == 7.0
    A = program.constraint.csc(program.A(np.array([5.0, 7.0]))).toarray().ravel()
    b_value = program.b(np.array([5.0, 7.0]))
    rows = sorted(zip(A[1:].tolist(), b_value[1:].tolist(), strict=True))
    assert rows == [(-1.0, -5.0), (1.0, 12.0), (5.0, 1.0)]


def test_repeated_bounds_share_one_multiplier() -> None:
    rng = np.random.default_rng(0)
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3))
    constraint = 2 * X >= 0.5
    program = canonicalise(cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [constraint]), [C], [constraint.dual_variables[0]])
    assert program.cones.nonnegative == 0 and program.lower_index.size == 6
    value = rng.standard_normal((3, 3))
    x, y, z, _ = solve_with_clarabel(program, theta_of(program, [value]))
    # Stationarity in the symmetric matrix: X = max(mean, 1/4) entry by entry, 2 (X - mean) = 2 multiplier.
    mean = (value + value.T) / 2
    np.testing.assert_allclose(program.variables[0].read(x, y, z), np.maximum(0.25 - mean, 0.0), atol=1e-6)


def test_signed_structured_variables_leave_no_rows() -> None:
    X, Y = cp.Variable((3, 3), symmetric=True, nonneg=True), cp.Variable((4, 4), diag=True, nonpos=True)
    program = canonicalise(cp.Problem(cp.Minimize(cp.sum(X) - cp.trace(Y))), [], [X, Y])
    assert (program.n, program.cones) == (10, Cones())
    assert (program.lower_index.size, program.upper_index.size) == (6, 4)


def test_a_parametric_quadratic_form_is_twice_its_matrix() -> None:
    rng = np.random.default_rng(0)
    x, P = cp.Variable(3), cp.Parameter((3, 3), PSD=True)
    program = canonicalise(cp.Problem(cp.Minimize(cp.quad_form(x, P)), [x[0] == 1]), [P], [x])
    root = rng.standard_normal((3, 3))
    value = root @ root.T
    found = program.quadratic.csc(program.P(theta_of(program, [value]))).toarray()
    np.testing.assert_allclose(found, 2 * value, rtol=1e-14)
    assert program.parameters[0].symmetric and program.P.reaching == {0} and program.A.reaching == frozenset()


def test_maximisation_flips_the_objective() -> None:
    x, c = cp.Variable(2), cp.Parameter(2)
    program = canonicalise(cp.Problem(cp.Maximize(c @ x + 4), [x <= 1]), [c], [x])
    assert program.sign == -1.0
    np.testing.assert_array_equal(program.q(np.array([2.0, -3.0])), [-2.0, 3.0])
    assert program.offset(np.array([2.0, -3.0])) == -4.0


def test_parameters_are_read_from_the_entries_that_matter() -> None:
    pattern = [(0, 1, 2), (1, 0, 2)]
    S, D, Q = cp.Parameter((3, 3), symmetric=True), cp.Parameter((3, 3), diag=True), cp.Parameter((3, 3), sparsity=pattern)
    F, s = cp.Parameter((2, 3)), cp.Parameter(pos=True)
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum((S + D + Q) @ x) + s * cp.sum(x)), [F @ x <= 1])
    program = canonicalise(problem, (s, F, Q, D, S), [x])
    taken = {layout.name: set(layout.take.tolist()) for layout in program.parameters}
    assert taken == {
        S.name(): {0, 1, 2, 4, 5, 8}, D.name(): {0, 4, 8}, Q.name(): {1, 3, 8}, F.name(): set(range(6)), s.name(): {0}
    }  # fmt: skip
    np.testing.assert_array_equal(program.parameters[1].take, [0, 3, 1, 4, 2, 5])
    assert program.parameters[0].attributes == {"pos"} and program.parameters[2].attributes == {"sparsity"}


def test_a_parameter_that_reaches_nothing_has_no_columns() -> None:
    x, a, b = cp.Variable(2), cp.Parameter((0,)), cp.Parameter(2)
    program = canonicalise(cp.Problem(cp.Minimize(cp.sum(x)), [x >= b, x[:0] >= a]), [a, b], [x])
    assert program.p == 2 and program.parameters[0].take.size == 0
    assert program.lower.reaching == {1}


def test_sudoku_is_quick() -> None:
    x, A, b, c = cp.Variable(729), cp.Parameter((249, 729)), cp.Parameter(249), cp.Parameter(729)
    constraints = [A @ x == b, x >= 0, x <= 1]
    start = time.perf_counter()
    program = canonicalise(cp.Problem(cp.Minimize(c @ x), constraints), [A, b, c], [x, constraints[0].dual_variables[0]])
    assert time.perf_counter() - start < 5.0
    assert program.cones == Cones(zero=249) and program.constraint.is_dense


@pytest.mark.parametrize("build", [lp_box, semidefinite, geometric, structured], ids=lambda build: build.__name__)
def test_pickle_and_deepcopy(build: Callable[[], Case]) -> None:
    case = build()
    variables = [*case.problem.variables(), *(c.dual_variables[0] for c in case.problem.constraints)]
    program = canonicalise(case.problem, list(case.values), variables, gp=case.gp)
    theta = np.random.default_rng(0).random(program.p)
    stored = pickle.dumps(program)
    assert b"cvxpy" not in stored
    for twin in (pickle.loads(stored), copy.deepcopy(program)):
        assert (twin.cones, twin.sign, twin.n) == (program.cones, program.sign, program.n)
        for field in fields(program):
            value = getattr(program, field.name)
            if callable(value):
                np.testing.assert_array_equal(getattr(twin, field.name)(theta), value(theta))
                assert getattr(twin, field.name).reaching == value.reaching
        x, y, z = np.ones(program.n), np.ones(program.cones.rows), np.ones(program.n)
        for layout, other in zip(program.variables, twin.variables, strict=True):
            np.testing.assert_array_equal(layout.read(x, y, z), other.read(x, y, z))


def test_the_problem_and_its_values_are_left_alone() -> None:
    case = semidefinite()
    for parameter, value in case.values.items():
        parameter.value = value
    case.problem.solve(solver=cp.CLARABEL)
    variables = [*case.problem.variables(), *(dual for c in case.problem.constraints for dual in c.dual_variables)]
    before = [np.array(variable.value) for variable in variables]
    key, objective = case.problem._cache.key, case.problem.value
    canonicalise(case.problem, list(case.values), variables)
    assert case.problem._cache.key == key and case.problem.value == objective
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.value, value)
    for parameter, value in case.values.items():
        np.testing.assert_array_equal(parameter.value, value)


def rejected(objective: cp.Minimize | cp.Maximize, constraints: list[cp.Constraint], **options: bool) -> Callable[[], object]:
    problem = cp.Problem(objective, constraints)
    return lambda: canonicalise(problem, problem.parameters(), [], **options)


def faults() -> list[tuple[str, Callable[[], object], type[Exception], str]]:
    x, a, b = cp.Variable(2, name="x"), cp.Parameter(2, name="a"), cp.Parameter(2, name="b")
    stranger = cp.Variable(2, name="stranger")
    switch, count = cp.Variable(boolean=True, name="switch"), cp.Variable(integer=True, name="count")
    wave, P = cp.Variable(2, complex=True, name="wave"), cp.Parameter((2, 2), PSD=True)
    u, power = cp.Variable(pos=True), cp.Parameter(pos=True, name="power")
    problem = cp.Problem(cp.Minimize(a @ x), [x >= b])
    elsewhere = (x <= 1).dual_variables[0]
    least = cp.Minimize(cp.sum(x))
    return [
        ("problem", lambda: canonicalise(least, [], []), TypeError, "a cvxpy.Problem is needed"),  # pyright: ignore
        ("parameters", lambda: canonicalise(problem, {a, b}, [x]), TypeError, "list or tuple"),  # pyright: ignore
        ("parameter", lambda: canonicalise(problem, [a, b, 3.0], [x]), TypeError, "holds a float"),  # pyright: ignore
        ("missing", lambda: canonicalise(problem, [a], [x]), ValueError, "missing: b"),
        ("extra", lambda: canonicalise(problem, [a, b, P], [x]), ValueError, f"not in the problem: {P.name()}"),
        ("twice", lambda: canonicalise(problem, [a, b, a], [x]), ValueError, "given twice: a"),
        ("variables", lambda: canonicalise(problem, [a, b], x), TypeError, "list or tuple"),  # pyright: ignore
        ("variable", lambda: canonicalise(problem, [a, b], [x >= b]), TypeError, "dual_variables"),  # pyright: ignore
        ("unknown", lambda: canonicalise(problem, [a, b], [stranger]), ValueError, "unknown variable stranger"),
        ("dual", lambda: canonicalise(problem, [a, b], [elsewhere]), ValueError, "nor a dual variable"),
        ("no variables", rejected(cp.Minimize(0.0), []), ValueError, "no variables"),
        ("boolean", rejected(cp.Minimize(switch), []), ValueError, "not supported by CvxpyLayer yet .switch"),
        ("integer", rejected(cp.Minimize(count), [count >= 0.5]), ValueError, "count"),
        ("finite set", rejected(least, [cp.FiniteSet(x[0], [1, 2])]), ValueError, "FiniteSet"),
        ("complex", rejected(cp.Minimize(cp.norm(wave)), []), ValueError, "wave"),
        ("complex data", rejected(least, [cp.abs((1 + 2j) * x) <= 1]), ValueError, "complex constants"),
        ("not DPP", rejected(cp.Minimize(cp.multiply(a, b) @ x), [x >= 0]), ValueError, "not DPP"),
        ("quad_form", rejected(least, [cp.quad_form(x, P) <= 1]), ValueError, "not in a constraint"),
        ("not convex", rejected(cp.Minimize(cp.sqrt(x[0])), [x >= 0]), ValueError, "not convex"),
        ("not gp", rejected(cp.Minimize(cp.sum(x)), [x >= 1], gp=True), ValueError, "not a geometric program"),
        ("gp", rejected(cp.Minimize(u**0.5 * u), [u >= power]), ValueError, "pass gp=True"),
        ("both", rejected(cp.Minimize(u), [power * u**power >= 2], gp=True), ValueError, "power is both"),
    ]


@pytest.mark.parametrize(("call", "kind", "message"), [pytest.param(*fault[1:], id=fault[0]) for fault in faults()])
def test_errors_say_what_is_wrong(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
