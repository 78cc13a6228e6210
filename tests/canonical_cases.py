"""The table of problems that canonicalisation is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Values = dict[cp.Parameter, FloatArray]


@dataclass
class Case:
    problem: cp.Problem
    values: Values
    gp: bool = False
    duals: bool = True  # whether every dual variable is unique
    without_quadratics: bool = False  # CVXPY before 1.9.3 solves wrongly with squares of structured variables


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
    return Case(
        cp.Problem(cp.Minimize(cp.quad_form(x, P) + q @ x)), {P: root @ root.T + np.eye(3), q: rng.standard_normal(3)}
    )


def nonnegative_least_squares() -> Case:
    rng = rng_of("nnls")
    x, F, g = cp.Variable(4, nonneg=True), cp.Parameter((7, 4)), cp.Parameter(7)
    return Case(
        cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g))), {F: rng.standard_normal((7, 4)), g: rng.standard_normal(7)}
    )


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
    return Case(
        cp.Problem(cp.Minimize(np.arange(1, 5) @ t), constraints), {C: rng.standard_normal((4, 2))}, duals=False
    )


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
    wall, floor, ratio, exponent = (
        cp.Parameter(pos=True),
        cp.Parameter(pos=True),
        cp.Parameter(pos=True),
        cp.Parameter(),
    )
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
    objective = (
        cp.sum_squares(X - S) + cp.sum_squares(Y - 2 * D) + cp.sum_squares(Z + Q) + cp.sum(cp.multiply(noise, X + Y))
    )
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
    X, Y = (
        cp.Variable((3, 3), symmetric=True, bounds=[low + low.T, 0.4]),
        cp.Variable((3, 3), diag=True, bounds=[-0.3, 0.4]),
    )
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
    return Case(
        cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [cp.PSD(X)]),
        {C: values + values.swapaxes(1, 2)},
        False,
        False,
        True,
    )


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


def many_dimensions() -> Case:
    rng = rng_of("many_dimensions")
    X, T, M = cp.Variable((2, 3, 2)), cp.Parameter((2, 3, 2)), cp.Parameter((3, 2))
    flat = cp.reshape(X, (6, 2), order="C")
    constraints = [X <= 0.4, flat @ np.array([1.0, 2.0]) == cp.reshape(M, (6,), order="C"), cp.sum(X, axis=0) >= M - 3]
    return Case(
        cp.Problem(cp.Minimize(cp.sum_squares(X - T)), constraints), {T: rng.random((2, 3, 2)), M: rng.random((3, 2))}
    )


def matrices() -> Case:
    rng = rng_of("matrices")
    X, A, B = cp.Variable((3, 2)), cp.Parameter((4, 3)), cp.Parameter((4, 2))
    constraints = [np.array([[0.1, 0.2], [0.3, 0.0], [0.2, 0.1]]) >= X, np.ones((1, 3)) @ X == np.array([[0.2, -0.3]])]
    return Case(
        cp.Problem(cp.Minimize(cp.sum_squares(A @ X - B)), constraints), {A: rng.random((4, 3)), B: rng.random((4, 2))}
    )


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
    many_dimensions,
    matrices,
    scalars,
    no_parameters,
    empty_constraint,
]
