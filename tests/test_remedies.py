"""Every warning's remedy, tried: a situation that is warned about, and the same with what the warning recommends."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd import LPGD, BlackboxLayer, Cones, ConicLayer, ImplicitKKT, LPLayer, Node, NodeLayer, QPLayer

Answer = tuple[Tensor, Any]
"""What the remedy gives, and the right value of it."""


class Case(NamedTuple):
    """A warning, a function of whether its remedy is applied, and a second warning that comes with the first."""

    match: str
    run: Callable[[bool], Answer]
    also: str | None


CASES: dict[str, Case] = {}


def case(match: str, also: str | None = None) -> Callable[[Callable[[bool], Answer]], Callable[[bool], Answer]]:
    def add(run: Callable[[bool], Answer]) -> Callable[[bool], Answer]:
        CASES[run.__name__] = Case(match, run, also)
        return run

    return add


def vector(*values: float, gradient: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


EYE = torch.eye(2, dtype=torch.float64)
FLAT = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()


# -- exact gradients of conic programs ----------------------------------------------------------------------------


def in_a_flat_box(method: Any) -> Tensor:
    """min ½ x₁² - ½ x₁ over the box: x₂ is anything."""
    q = vector(-0.5, 0.0, gradient=True)
    QPLayer("CLARABEL", method)(FLAT, q, lb=-1.0, ub=1.0).x.sum().backward()
    return q.grad


@case(r"solutions are not unique.*rho > 0, or LPGD with a finite tau")
def flat_with_rho(mended: bool) -> Answer:
    return in_a_flat_box(ImplicitKKT(rho=0.5 if mended else 0.0)), [-1 / 1.5, -2.0]


@case(r"solutions are not unique.*rho > 0, or LPGD with a finite tau")
def flat_with_a_finite_step(mended: bool) -> Answer:
    return in_a_flat_box(LPGD(tau=0.25) if mended else ImplicitKKT()), [-1.0, -4.0]


@case(r"solutions are not unique, or move at will.*rho > 0")
def flat_with_small_steps(mended: bool) -> Answer:
    return in_a_flat_box(LPGD(rho=0.5) if mended else LPGD()), [-1 / 1.5, -2.0]


@case(r"solutions are not unique, or move at will.*a tau of the order")
def flat_with_steps_of_its_unit(mended: bool) -> Answer:
    return in_a_flat_box(LPGD(tau=0.5) if mended else LPGD()), [-1.0, -2.0]


def on_a_line(mended: bool, method: Any, duals: bool, of: str) -> Answer:
    """min ½|x|² + qᵀx on x₁ + 2 x₂ = 1, which is stated twice until it is mended; y = -(a·q + b) / 5."""
    rows = 1 if mended else 2
    a = vector(1.0, 2.0)
    q, b = vector(0.3, -0.7, gradient=True), torch.ones(rows, dtype=torch.float64, requires_grad=of == "b")
    found = QPLayer("CLARABEL", method)(EYE, q, A=a.expand(rows, 2), b=b)
    (found.y[0] if duals else found.x[0]).backward()
    if of == "b":
        return b.grad, [0.2]
    return q.grad, -a / 5 if duals else [-0.8, 0.4]


@case(r"constraints depend on each other.*Leave out constraints that others imply")
def duals_of_rows_that_depend_on_each_other(mended: bool) -> Answer:
    return on_a_line(mended, ImplicitKKT(), True, "q")


@case(
    r"no perturbed problem of elements \[0\] has a solution.*redundant equalities do that",
    also=r"ImplicitKKT\(\): .*constraints depend on each other",  # which the gradient comes from then
)
def perturbed_duals_of_rows_that_depend_on_each_other(mended: bool) -> Answer:
    return on_a_line(mended, LPGD(tau=1e-3), True, "q")


@case(r"Leave out those that others imply to have them unique")
def sides_of_rows_that_depend_on_each_other(mended: bool) -> Answer:
    return on_a_line(mended, ImplicitKKT(), False, "b")


@case(r"nearly singular.*rho > 0")
def nearly_flat(mended: bool) -> Answer:
    """Along a random plane, by curvatures from 1 to 1e-12."""
    rng, rho = np.random.default_rng(0), 0.01
    turn = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    P, a = torch.tensor(turn * np.logspace(0, -12, 20) @ turn.T), torch.tensor(rng.normal(size=(1, 20)))
    q = (-P @ torch.tensor(rng.normal(size=20))).requires_grad_()
    QPLayer("INTERIOR", ImplicitKKT(rho=rho if mended else 0.0))(P, q, A=a, b=vector(0.0)).x[0].backward()
    K = torch.cat([torch.cat([P + rho * torch.eye(20), a.T], 1), torch.cat([a, a.new_zeros(1, 1)], 1)])
    return q.grad, -torch.linalg.inv(K)[0, :20]


def at_zero(method: Any) -> Tensor:
    """x = max(θ, 0) at θ = 0."""
    q = vector(0.0, gradient=True)
    QPLayer("CLARABEL", method)(EYE[:1, :1], q, lb=0.0).x.sum().backward()
    return q.grad


@case(r"at a kink.*LPGD with a finite tau averages both")
def kink(mended: bool) -> Answer:
    return at_zero(LPGD(tau=0.1) if mended else ImplicitKKT()), [-0.5]


@case(r"no derivative that a step could find.*A tau of the order of .*unit")
def kink_by_small_steps(mended: bool) -> Answer:
    return at_zero(LPGD(tau=1.0) if mended else LPGD()), [-0.5]


@case(r"not unique, at constraints that curve.*Leave out constraints that others imply")
def plane_that_touches_a_ball(mended: bool) -> Answer:
    """The point of the disc nearest to (2, 0), which a plane touches there: it moves by half as the point moves up."""
    q, A, b = vector(-2.0, 0.0, gradient=True), torch.zeros(4, 2).double(), vector(1.0, 1.0, 0.0, 0.0)
    A[0, 0], A[2:] = 1.0, -EYE
    rows, cones = (slice(1, 4), Cones(second_order=(3,))) if mended else (slice(0, 4), Cones(0, 1, (3,)))
    ConicLayer(cones, "CLARABEL")(EYE, q, A[rows], b[rows]).x[1].backward()
    return q.grad, [0.0, -0.5]


# -- perturbed solutions ------------------------------------------------------------------------------------------


@case(r"no solution on a side that was asked for.*A smaller tau may have both")
def side_that_is_unbounded(mended: bool) -> Answer:
    """min c x over x ≥ 0, which has no solution for c < 0."""
    c = vector(1.0, gradient=True)
    (2.0 * LPLayer("CLARABEL", LPGD(tau=0.25 if mended else 1.0))(c, lb=0.0).x).sum().backward()
    return c.grad, [0.0]


@case(r"jumped.*A smaller tau stays with one solution")
def nearly_equal_solutions(mended: bool) -> Answer:
    q = vector(1e-5, 1.0, gradient=True)
    layer = QPLayer("CLARABEL", LPGD(tau=1e-6 if mended else 1e-4))
    layer(1e-9 * EYE, q, lb=-1.0, ub=1.0).x[0].backward()
    return q.grad, [0.0, 0.0]


def cheapest(method: Any) -> Tensor:
    """The vertex of the simplex with the least cost, (1, 0, 0), moved towards (0, 1, 0)."""
    c = vector(1.0, 1.5, 3.0, gradient=True)
    x = LPLayer("CLARABEL", method)(c, A=torch.ones(1, 3).double(), b=vector(1.0), lb=0.0).x
    (x - vector(0.0, 1.0, 0.0)).square().sum().backward()
    return c.grad


@case(r"exact gradient of this linear program.*is zero.*LPGD with a finite tau gives a gradient that teaches")
def vertex(mended: bool) -> Answer:
    # c + 0.5 g = (2, 0.5, 3) chooses the second.
    return cheapest(LPGD(tau=0.5, envelope="lower") if mended else ImplicitKKT()), [-2.0, 2.0, 0.0]


@case(r"no solution of this linear program moved.*Give a tau of the order of")
def vertex_by_small_steps(mended: bool) -> Answer:
    return cheapest(LPGD(tau=0.5, envelope="lower") if mended else LPGD()), [-2.0, 2.0, 0.0]


# -- solvers ------------------------------------------------------------------------------------------------------


@case(r"HiGHS solves quadratic programs cold.*INTERIOR, DAQP and PIQP are much faster")
def large_quadratic_program(mended: bool) -> Answer:
    q = torch.linspace(-1, 1, 301, dtype=torch.float64)
    found = QPLayer("DAQP" if mended else "HIGHS")(torch.eye(301).double(), q, lb=0.0)
    return found.x, (-q).clamp(min=0)


@case(r"OSQP left 1 of 1 elements without a solution.*Name that solver")
def solver_that_leaves_elements(mended: bool) -> Answer:
    args = {} if mended else {"max_iterations": 1, "refine": False}
    q = vector(-0.3, 2.0, gradient=True)
    found = QPLayer("CLARABEL" if mended else "OSQP", solver_args=args)(EYE, q, lb=0.0)
    found.x.sum().backward()
    return q.grad, [-1.0, 0.0]


@case(r"element 1 of 2: INFEASIBLE.*on_error='relax'")
def infeasible_element(mended: bool) -> Answer:
    """x ≥ θ and x ≤ 1: half way between them, at θ = 2."""
    low = torch.tensor([[0.0], [2.0]], dtype=torch.float64, requires_grad=True)
    found = QPLayer("CLARABEL", on_error="relax" if mended else "warn")(EYE[:1, :1], vector(0.5), lb=low, ub=1.0)
    found.x.sum().backward()
    return low.grad, [[1.0], [0.5]]


@case(r"multipliers of relaxed elements \[0\].*Use the primal solution and info.violation")
def multipliers_of_a_relaxed_element(mended: bool) -> Answer:
    b = vector(0.0, 2.0, gradient=True)
    found = QPLayer("CLARABEL", on_error="relax")(EYE[:1, :1], vector(0.5), A=torch.ones(2, 1).double(), b=b)
    (found.info.violation.size if mended else found.y.sum()).backward()
    return b.grad, [-(0.5**0.5), 0.5**0.5]


# -- functions and nodes ------------------------------------------------------------------------------------------


def shortest(costs: np.ndarray) -> np.ndarray:
    if (costs < 0).any():
        raise ArithmeticError("negative lengths")
    return (costs == costs.min()).astype(float)


@case(r"ArithmeticError in the backward pass.*valid_costs=, such as clipping")
def function_that_refuses_perturbed_costs(mended: bool) -> Answer:
    c = vector(0.2, 0.5, gradient=True)
    valid = (lambda costs: costs.clip(min=0.0)) if mended else None
    # c + g = (1.2, -0.5), clipped to (1.2, 0), chooses the second; c - g = (-0.8, 1.5), clipped, the first.
    (BlackboxLayer(shortest, LPGD(tau=1.0), valid_costs=valid, on_error="nan")(c) * vector(1.0, -1.0)).sum().backward()
    return c.grad, [-0.5, 0.5]


@case(r"singular.*[Rr]ho > 0")
def flat_node(mended: bool) -> Answer:
    """min (y₁ + y₂ - θ)² says nothing of y₁ - y₂."""
    node = Node(lambda theta, y: (y.sum() - theta.sum()).square(), shape=(2,))
    theta = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    NodeLayer(node, ImplicitKKT(rho=0.5 if mended else 0.0))(theta)[0].sum().backward()
    # H = 2 (1 1ᵀ) + ρ I maps 1 to (4 + ρ) 1, and ∂²f/∂y∂θ is -2.
    return theta.grad, [[2 * 2 / 4.5]]


@case(r"shape= was not given, y has the shape of the first input, \(3,\).*type it: Node\(\.\.\., shape=")
def node_without_its_shape(mended: bool) -> Answer:
    """Of three numbers θ the mean, whose shape is ()."""
    shape = () if mended else None
    node = Node(lambda theta, y: (theta - (y if mended else y[0])).square().sum(), shape=shape)
    theta = torch.tensor([[3.0, 4.0, 8.0]], dtype=torch.float64, requires_grad=True)
    y = NodeLayer(node, ImplicitKKT())(theta)
    (y if mended else y[0, 0]).sum().backward()
    return theta.grad, [[1 / 3] * 3]


@case(r"their constraints depend on each other.*Leave out")
def node_with_equalities_that_depend_on_each_other(mended: bool) -> Answer:
    """y with y₁ + y₂ = 1 nearest to θ."""
    node = Node(
        lambda theta, y: (y - theta).square().sum(),
        equality=lambda theta, y: torch.stack([y.sum() - 1] if mended else [y.sum() - 1, 2 * y.sum() - 2]),
    )
    theta = torch.tensor([[0.3, 0.1]], dtype=torch.float64, requires_grad=True)
    NodeLayer(node, ImplicitKKT())(theta)[0, 0].backward()
    return theta.grad, [[0.5, -0.5]]


@case(r"do not satisfy the optimality conditions.*its solver ended too early")
def node_with_a_solver_that_ends_too_early(mended: bool) -> Answer:
    node = Node(
        lambda theta, y: (y - theta).pow(4).sum() + (y - theta).square().sum(),
        solve=lambda theta: theta if mended else theta + 0.1,
    )
    theta = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)
    NodeLayer(node, ImplicitKKT())(theta).sum().backward()
    return theta.grad, [[1.0, 1.0]]


@case(r"are not finite where the solver starts.*start inside of the domain \(Node\(initial=")
def node_that_starts_outside(mended: bool) -> Answer:
    """min y - θ log y is at y = θ."""
    initial = (lambda theta: torch.ones_like(theta)) if mended else None
    node = Node(lambda theta, y: (y - theta * y.log()).sum(), initial=initial)
    theta = torch.tensor([[0.7, 2.0]], dtype=torch.float64, requires_grad=True)
    NodeLayer(node, on_error="nan")(theta).sum().backward()
    return theta.grad, [[1.0, 1.0]]


@case(r"Hessian is singular.*ImplicitKKT\(\) takes the constraints into account")
def constraints_ignored(mended: bool) -> Answer:
    """min θ·y on the unit sphere is -θ / |θ|; without the sphere there is no curvature."""
    node = Node(lambda theta, y: (theta * y).sum(), equality=lambda theta, y: y.square().sum() - 1)
    theta = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    method = ImplicitKKT() if mended else lpgd.IgnoreConstraints()
    NodeLayer(node, method)(theta)[0, 0].backward()
    return theta.grad, [[-16 / 125, 12 / 125]]


@case(r"equal to rounding.*use lpgd.nodes.SpectralFunction")
def function_of_a_matrix_by_its_eigenvectors(mended: bool) -> Answer:
    """tr(M √X) at X = 4 I, whose gradient is M / 4."""
    X = (4 * torch.eye(2, dtype=torch.float64))[None].requires_grad_()
    M = torch.tensor([[1.0, 2.0], [2.0, 5.0]]).double()
    if mended:
        root = NodeLayer(lpgd.nodes.SpectralFunction("sqrt"))(X)
    else:
        vectors = NodeLayer(lpgd.nodes.EigenDecomposition())(X)
        values = lpgd.nodes.rayleigh_quotients(X, vectors)
        root = vectors @ torch.diag_embed(values.sqrt()) @ vectors.mT
    (M * root).sum().backward()
    return X.grad, (M / 4)[None]


@pytest.mark.filterwarnings("always::lpgd.LpgdWarning")
@pytest.mark.parametrize("name", CASES)
def test_what_a_warning_recommends_helps(name: str) -> None:
    match, run, also = CASES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(False)
    messages = [str(item.message) for item in caught if issubclass(item.category, lpgd.LpgdWarning)]
    assert any(re.search(match, message) for message in messages), messages
    others = [message for message in messages if not re.search(match, message)]
    assert [bool(re.search(also, message)) for message in others] == [True] if also else not others, others
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, right = run(True)
    torch.testing.assert_close(found, torch.as_tensor(right, dtype=found.dtype), rtol=1e-6, atol=1e-7)
