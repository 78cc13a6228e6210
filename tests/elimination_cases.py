"""Problems in which CVXPY defines variables by rows, for the tests of elimination."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import lpgd
from tests.layer_cases import leaf, normal, weighted


@dataclass
class Case:
    """A problem, what to return, values of its parameters, and how many variables are left of how many."""

    problem: cp.Problem
    parameters: Sequence[cp.Parameter]
    outputs: Sequence[cp.Variable]
    values: Sequence[Tensor]
    before: int
    after: int
    is_quadratic: bool = True

    def layer(self, eliminate: bool = True, **options: Any) -> lpgd.CvxpyLayer:
        return lpgd.CvxpyLayer(self.problem, self.parameters, self.outputs, eliminate=eliminate, **options)


@dataclass
class Answer:
    outputs: tuple[Tensor, ...]
    gradients: list[Tensor]


def answer(layer: lpgd.CvxpyLayer, values: Sequence[Tensor]) -> Answer:
    leaves = [leaf(value) for value in values]
    outputs = layer(*leaves)
    gradients = torch.autograd.grad(weighted(outputs), leaves)
    return Answer(tuple(output.detach() for output in outputs), list(gradients))


def nonnegative_least_squares(batch: int = 3) -> Case:
    x, F, g = cp.Variable(4), cp.Parameter((9, 4)), cp.Parameter(9)
    positive = x >= 0
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g)), [positive])
    values = [normal(batch, 9, 4), normal(batch, 9, seed=1)]
    return Case(problem, [F, g], [x, positive.dual_variables[0]], values, 13, 4)


def quadratic_program(batch: int = 3) -> Case:
    """A square root of P, a shared and a batched constraint, and duals of both."""
    x, R, q = cp.Variable(5), cp.Parameter((6, 5)), cp.Parameter(5)
    A, b, G, h = cp.Parameter((2, 5)), cp.Parameter(2), cp.Parameter((4, 5)), cp.Parameter(4)
    equal, below = A @ x == b, G @ x <= h
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(R @ x) + q @ x), [equal, below])
    values = [normal(batch, 6, 5), normal(batch, 5, seed=1), normal(2, 5, seed=2), normal(batch, 2, seed=3)]
    values += [normal(4, 5, seed=4), normal(batch, 4, seed=5).abs() + 1.0]
    duals = [equal.dual_variables[0], below.dual_variables[0]]
    return Case(problem, [R, q, A, b, G, h], [x, *duals], values, 11, 5)


def divided_square(batch: int = 3) -> Case:
    x, F, c = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.quad_over_lin(F @ x, 3.0) + c @ x), [cp.sum(x) == 1])
    return Case(problem, [F, c], [x], [normal(batch, 5, 3), normal(batch, 3, seed=1)], 8, 3)


def smooth_signal(batch: int = 2) -> Case:
    """Sparse constant rows: the trend of a signal, bounded below."""
    n = 30
    x, y, weight = cp.Variable(n), cp.Parameter(n), cp.Parameter(nonneg=True)
    D = sp.diags([-np.ones(n - 1), np.ones(n - 1)], [0, 1], shape=(n - 1, n)).tocsc()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + 2 * cp.sum_squares(D @ x) + weight * x[0]), [x >= -0.5])
    return Case(problem, [y, weight], [x], [normal(batch, n), torch.rand(batch, dtype=torch.float64)], 89, 30)


def two_squares(batch: int = 3) -> Case:
    """Squares of disjoint parts, one with a weight that is a parameter, beside a quadratic form."""
    x, y = cp.Variable(3), cp.Variable(4)
    F, H, c = cp.Parameter((5, 3)), cp.Parameter((6, 4)), cp.Parameter(3)
    root = np.random.default_rng(0).standard_normal((3, 3))
    objective = cp.sum_squares(F @ x - 1) + cp.sum_squares(H @ y - 2) + cp.quad_form(x - 1, root @ root.T) + c @ x
    problem = cp.Problem(cp.Minimize(objective), [x[0] + cp.sum(y) == 1, x >= -1])
    values = [normal(batch, 5, 3), normal(6, 4, seed=1), normal(batch, 3, seed=2)]
    return Case(problem, [F, H, c], [x, y], values, 21, 7)


def form_of_residuals(batch: int = 3) -> Case:
    """A variable of the user's that a row defines, with a matrix of parameters for its square."""
    x, r, F, g = cp.Variable(3), cp.Variable(5), cp.Parameter((5, 3)), cp.Parameter(5)
    Q = cp.Parameter((5, 5), PSD=True)
    problem = cp.Problem(cp.Minimize(cp.quad_form(r, Q) + cp.sum(r)), [r == F @ x - g, x <= 0.3])
    root = normal(batch, 5, 5, seed=2)
    values = [normal(batch, 5, 3), normal(5, seed=1), root @ root.mT + torch.eye(5)]
    return Case(problem, [F, g, Q], [x], values, 8, 3)


def shared_definition(batch: int = 3) -> Case:
    """A defined variable without a square, in a constraint and in the objective."""
    x, total = cp.Variable(4), cp.Variable(2)
    F, c, h = cp.Parameter((2, 4)), cp.Parameter(2), cp.Parameter(4)
    below = total[0] + 0.5 * total[1] <= 1
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - h) + c @ total), [2 * total == F @ x + 0.2, below])
    values = [normal(batch, 2, 4), -normal(batch, 2, seed=1).abs(), 2 + normal(batch, 4, seed=2)]
    return Case(problem, [F, c, h], [x, below.dual_variables[0]], values, 10, 4)


def logistic_regression(batch: int = 2) -> Case:
    w, X = cp.Variable(3), cp.Parameter((8, 3))
    problem = cp.Problem(cp.Minimize(cp.sum(cp.logistic(X @ w)) + 0.5 * cp.sum_squares(w)))
    return Case(problem, [X], [w], [normal(batch, 8, 3)], 27, 19, is_quadratic=False)


def entropy_and_squares(batch: int = 2) -> Case:
    x, F, g = cp.Variable(4), cp.Parameter((6, 4)), cp.Parameter(6)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) - cp.sum(cp.entr(x))), [cp.sum(x) == 1])
    values = [normal(batch, 6, 4), normal(batch, 6, seed=1)]
    return Case(problem, [F, g], [x], values, 14, 8, is_quadratic=False)


def norm_below_an_affine_function(batch: int = 2) -> Case:
    """The epigraph variable of a norm stands in one inequality, which is tight: the rows of the cone take its place."""
    x, F, c = cp.Variable(3), cp.Parameter((3, 3)), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(c @ x + cp.sum_squares(x)), [cp.norm2(F @ x) <= 0.5 + 0.2 * x[0]])
    return Case(problem, [F, c], [x], [normal(batch, 3, 3), 9 * normal(batch, 3, seed=1)], 4, 3, is_quadratic=False)


CASES: dict[str, Callable[..., Case]] = {
    build.__name__: build
    for build in (
        nonnegative_least_squares,
        quadratic_program,
        divided_square,
        smooth_signal,
        two_squares,
        form_of_residuals,
        shared_definition,
        logistic_regression,
        entropy_and_squares,
        norm_below_an_affine_function,
    )
}
