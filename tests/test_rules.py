"""What breaks CVXPY's rules is named, and what the message says to write instead is taken."""

from __future__ import annotations

import re
from collections.abc import Callable

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd

X, U = cp.Variable(3, name="x"), cp.Variable(pos=True, name="u")
P, Q, K, T = cp.Parameter(3, name="p"), cp.Parameter(3, name="q"), cp.Parameter(nonneg=True, name="k"), cp.Parameter()
S, V = cp.Parameter((3, 3), PSD=True, name="S"), cp.Variable(name="v")
POWER, BASE = cp.Parameter(name="power"), cp.Parameter(pos=True, name="base")

SIGNS = np.linspace(-1.0, 1.0, 30)


def built(objective: cp.Minimize | cp.Maximize, *constraints: cp.Constraint, gp: bool = False) -> lpgd.CvxpyLayer:
    problem = cp.Problem(objective, list(constraints))
    return lpgd.CvxpyLayer(problem, problem.parameters(), problem.variables(), gp=gp)


def least(expression: cp.Expression, *constraints: cp.Constraint, gp: bool = False) -> Callable[[], object]:
    return lambda: built(cp.Minimize(expression), *constraints, gp=gp)


BROKEN = {
    "factor of what has parameters": (least(K * cp.norm1(X - P)), "`k * norm1(x + -p)`, where `norm1(x + -p)` must be"),
    "function of a parameter": (least(cp.exp(K) * X[0]), "a parameter of its own can stand for `exp(k)`, computed"),
    "square of a parameter": (least(cp.sum_squares(P) * X[0], X >= 0), "can stand for `sum_squares(p)`, computed"),
    "product of parameters": (least(cp.sum_squares(X), X >= P @ Q), "`p @ q`, which a parameter of its own can stand"),
    "over a parameter": (
        least(cp.norm(X) / K),
        "where a parameter of its own can stand for 1 / `k`",
    ),
    "exponent": (least(cp.power(X[0], K)), "`power(x[0])`, whose exponent is `k` and must be a number"),
    "form in a constraint": (least(X[0], cp.quad_form(X, S) <= 1), "`quad_form(x, S)`, a form whose matrix is"),
    "sign": (least((1 - K) * cp.pos(X[0])), "the sign of `1.0 + -k` must be known: a parameter with nonneg=True"),
    "product of variables": (least(X[0] * X[1]), "Here: `x[0] * x[1]`, a product of variables."),
    "concave": (least(cp.sqrt(X[0])), "Here: the objective minimises `power(x[0], 0.5)`, which is concave."),
    "convex": (lambda: built(cp.Maximize(cp.norm1(X))), "the objective maximises `norm1(x)`, which is convex."),
    "sphere": (least(X[0], cp.norm(X - 1) == 1), "`pnorm(x + -1.0, 2) == 1.0`, whose sides must be affine."),
    "outside": (least(X[0], cp.norm(X) >= 1), "`1.0 <= pnorm(x, 2)`, of which the smaller side must be convex"),
    "not positive": (least(U * V, gp=True), "Here: `v`, which must be declared pos=True."),
    "posynomial above": (least(U, U + 1 >= U * U, gp=True), "in a geometric program"),
    "exponent of a parameter": (
        least(U, cp.power(BASE, POWER) * U >= 1, gp=True),
        "`power(base)`, whose exponent is `power`.",
    ),
    "four faults": (
        least(X[0] * X[1], X[1] * X[2] <= 1, X[2] * X[0] <= 1, X[0] * X[0] * X[1] <= 1),
        "a product of variables; and 1 more.",
    ),
    "numbers": (
        least(K * cp.sum(cp.multiply(SIGNS, X[[0, 1, 2] * 10] - P[0]))),
        "`k * sum([...] * (x[...] + -(p[0])))`, where",
    ),
    "long": (least(X[0], sum(cp.abs(X[0] - k) for k in range(20)) * X[0] <= 1), " ...`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_the_part_that_breaks_a_rule_is_named(case: str) -> None:
    build, words = BROKEN[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        build()


def test_what_a_message_says_to_write_is_taken() -> None:
    z, inverse = cp.Variable(3), cp.Parameter(nonneg=True)
    built(cp.Minimize(K * cp.norm1(z)), z == X - P)
    built(cp.Minimize(inverse * cp.norm(X)))
    built(cp.Minimize(K * cp.pos(X[0])), X >= 0)
    built(cp.Minimize(cp.sum_squares(X)), X >= T)


def test_a_variable_for_what_has_parameters_has_the_gradients_of_the_product() -> None:
    z = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(K * cp.norm1(z) + cp.sum_squares(X)), [z == X - P])
    layer = lpgd.CvxpyLayer(problem, [K, P], [X])
    k = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([2.0, 0.1, -3.0], dtype=torch.float64, requires_grad=True)
    (x,) = layer(k, p)  # from zero towards p, by k/2 at most
    assert torch.allclose(x, torch.tensor([0.25, 0.1, -0.25], dtype=torch.float64))
    x.backward(torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64))
    assert k.grad is not None
    assert p.grad is not None
    assert torch.allclose(k.grad, torch.tensor((1 - 100) / 2, dtype=torch.float64))
    assert torch.allclose(p.grad, torch.tensor([0.0, 10.0, 0.0], dtype=torch.float64))
