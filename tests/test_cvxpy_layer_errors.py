"""What CvxpyLayer refuses, what it reports element by element, and the options it takes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from tests.layer_cases import TIGHT, close, data, leaf, normal, program, weighted

# Construction and calls

X = cp.Variable(3, name="x")
C, U, UNUSED = cp.Parameter(3, name="cost"), cp.Parameter(name="limit"), cp.Parameter(name="unused")
CONSTRAINTS = [cp.sum(X) == 1, X >= 0, X <= U]
PROBLEM = cp.Problem(cp.Minimize(cp.sum_squares(X - C)), CONSTRAINTS)
LAYER = lpgd.CvxpyLayer(PROBLEM, [C, U], [X], solver_args=TIGHT)


def build(
    problem: Any = PROBLEM, parameters: Any = (C, U), variables: Any = (X,), *args: Any, **options: Any
) -> lpgd.CvxpyLayer:
    return lpgd.CvxpyLayer(problem, parameters, variables, *args, **options)


def minimise(objective: cp.Expression, *constraints: cp.Constraint) -> cp.Problem:
    return cp.Problem(cp.Minimize(objective), list(constraints))


CONSTRUCTION = {
    "not a problem": (lambda: build(X), TypeError, "Variable; a cvxpy.Problem is needed"),
    "parameter missing": (lambda: build(parameters=[C]), ValueError, "missing: limit"),
    "parameter of nothing": (lambda: build(parameters=[C, U, UNUSED]), ValueError, "not in the problem: unused"),
    "parameter twice": (lambda: build(parameters=[C, U, C]), ValueError, "given twice: cost"),
    "parameters not listed": (lambda: build(parameters=C), TypeError, "list or tuple"),
    "parameter of another kind": (lambda: build(parameters=[C, X]), TypeError, "Variable; give cvxpy.Parameter"),
    "variable of nothing": (lambda: build(variables=[cp.Variable(name="far")]), ValueError, "unknown variable far"),
    "dual of nothing": (lambda: build(variables=[(X >= 3).dual_variables[0]]), ValueError, "nor a dual variable"),
    "constraint": (lambda: build(variables=[CONSTRAINTS[0]]), TypeError, r"dual_variables\[i\]"),
    "variable by name": (lambda: build(variables=["x"]), TypeError, "str; give cvxpy.Variable"),
    "not convex": (lambda: build(minimise(-cp.sum_squares(X)), [], [X]), ValueError, "not convex.*rewrite"),
    "not DPP": (lambda: build(minimise(U * UNUSED * X[0]), [U, UNUSED], [X]), ValueError, "not DPP.*Introduce"),
    "integer": (
        lambda: build(minimise(cp.sum(cp.Variable(2, integer=True, name="k"))), [], [], "SCS", lpgd.LPGD(tau=1.0)),
        ValueError,
        r"SCS has no integer variables; .*: HIGHS\. Integer programs need a linear objective",
    ),
    "boolean": (
        lambda: build(
            minimise(cp.sum_squares(cp.Variable(2, boolean=True, name="k"))), [], [], None, lpgd.LPGD(tau=1.0)
        ),
        ValueError,
        r"^this integer program has a quadratic objective.*Integer programs need.*HIGHS has no quadratic objective",
    ),
    "geometric": (lambda: build(gp=True), ValueError, "not a geometric program"),
    "unknown solver": (lambda: build(solver="GUROBI"), ValueError, "GUROBI.*CLARABEL, SCS, INTERIOR"),
    "solver of another kind": (lambda: build(solver=3), TypeError, "solver"),
    "solver class": (lambda: build(solver=lpgd.SCS), TypeError, "solver"),
    "solver without the cone": (
        lambda: build(minimise(cp.lambda_max(cp.diag(X))), [], [X], solver="ECOS"),
        ValueError,
        "no semidefinite cone.*CLARABEL, SCS",
    ),
    "on_error": (lambda: build(on_error="ignore"), ValueError, "'ignore'.*raise, nan, warn"),
    "gradient class": (lambda: build(gradient=lpgd.LPGD), TypeError, "gradient method such as"),
    "gradient name": (lambda: build(gradient="lpgd"), TypeError, "gradient method such as"),
    "executor": (lambda: build(executor=4), TypeError, "concurrent.futures.Executor"),
    "unknown option": (lambda: build(solver_args={"epsilon": 1}), TypeError, "'epsilon'.*eps.*max_iters"),
    "unknown mode": (lambda: build(solver_args={"mode": "sparse"}), ValueError, "'sparse'.*dense, lsqr, lsmr, lpgd"),
    "kwargs for no mode": (
        lambda: build(solver_args={"mode": "lsqr", "derivative_kwargs": {"tau": 1}}),
        TypeError,
        "derivative_kwargs is for the modes lpgd",
    ),
    "unknown derivative": (
        lambda: build(solver_args={"mode": "lpgd", "derivative_kwargs": {"sigma": 1}}),
        TypeError,
        "sigma.*takes tau and rho",
    ),
    "tolerance": (lambda: build(solver_args={"eps": -1.0}), ValueError, "tolerance is -1.0; it must be positive"),
    "iterations": (lambda: build(solver_args={"max_iters": 0}), ValueError, "at least 1"),
    "text for a number": (
        lambda: build(solver="CLARABEL", solver_args={"eps": "1e-8"}),
        TypeError,
        "tolerance of CLARABEL is '1e-8'; it must be a number",
    ),
    "fraction of an iteration": (lambda: build(solver_args={"max_iters": 1.5}), TypeError, "must be a whole number"),
    "number for a switch": (lambda: lpgd.Clarabel(equilibrate=1), TypeError, "must be True or False"),  # pyright: ignore[reportArgumentType]
    "switch for a number": (lambda: lpgd.SCS(scale=True), TypeError, "scale of SCS is True; it must be a number"),
}
ONE, THREE = torch.tensor(1.0), torch.zeros(3)
CALLS = {
    "too few": (lambda: LAYER(THREE), ValueError, r"2 tensors \(cost \(3,\), limit \(\)\); it was called with 1"),
    "too many": (lambda: LAYER(THREE, ONE, ONE), ValueError, "called with 3"),
    "shape": (lambda: LAYER(torch.zeros(5, 2), ONE), ValueError, r"cost has shape \(5, 2\); expected \(\*batch, 3\)"),
    "too flat": (lambda: LAYER(ONE, ONE), ValueError, r"cost has shape \(\); expected"),
    "batches": (lambda: LAYER(torch.zeros(5, 3), torch.ones(4)), ValueError, r"broadcast: cost \(5,\), limit \(4,\)"),
    "numpy": (
        lambda: LAYER(np.zeros(3), ONE),
        TypeError,
        r"cost is a NumPy array; pass a torch tensor: torch\.as_tensor\(cost\)",
    ),
    "float": (lambda: LAYER(1.0, ONE), TypeError, r"cost is a float; pass a torch tensor of shape \(\*batch, 3\)"),
    "integers": (
        lambda: LAYER(THREE, torch.tensor(1)),
        TypeError,
        "limit is torch.int64; it must be float64, float32",
    ),
    "complex": (lambda: LAYER(THREE.cfloat(), ONE), TypeError, "cost is torch.complex64"),
    "sparse": (lambda: LAYER(THREE.to_sparse(), ONE), TypeError, "cost is torch.sparse_coo; pass a dense tensor"),
    "devices": (lambda: LAYER(THREE.to("meta"), ONE), ValueError, "cost on meta, limit on cpu.*move them to one"),
    "meta": (lambda: LAYER(THREE.to("meta"), ONE.to("meta")), ValueError, "on the meta device, where they have no val"),
    "option": (lambda: LAYER(THREE, ONE, solver_args={"epsilon": 1}), TypeError, "'epsilon'.*its options are"),
    "method": (lambda: LAYER(THREE, ONE, solver_args={"solve_method": "LP"}), ValueError, "'LP' is not a solver"),
}


def test_a_number_is_a_constant_for_a_parameter_that_is_one() -> None:
    double = torch.zeros(2, 3, dtype=torch.float64)
    for cost in (THREE, double):
        (found,), (expected,) = LAYER(cost, 1), LAYER(cost, ONE.to(cost.dtype))
        assert found.dtype == cost.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("call", "kind", "message"), [*CONSTRUCTION.values(), *CALLS.values()], ids=[*CONSTRUCTION, *CALLS]
)
def test_errors_name_what_is_wrong(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        call()


DECLARED = {
    "nonneg": (cp.Parameter(2, nonneg=True, name="w"), [[1.0, 0.0], [1.0, -0.1]], r"w of elements \[1\] is not nonneg"),
    "neg": (cp.Parameter(2, neg=True, name="w"), [[1.0, -1.0], [-1.0, -0.1]], r"w of elements \[0\] is not neg"),
    "PSD": (
        cp.Parameter((2, 2), PSD=True, name="w"),
        [[[1.0, 1.0], [1.0, 1.0]], [[1.0, 2.0], [2.0, 1.0]]],
        r"w of elements \[1\] is not PSD",
    ),
    "NSD": (cp.Parameter((2, 2), NSD=True, name="w"), [[0.0, 1.0], [1.0, 0.0]], "w is not NSD"),
}


@pytest.mark.parametrize(("parameter", "value", "message"), DECLARED.values(), ids=DECLARED)
def test_a_value_that_makes_the_problem_nonconvex_is_refused(
    parameter: cp.Parameter, value: list[Any], message: str
) -> None:
    x = cp.Variable(2)
    sign = 1.0 if parameter.is_nonneg() or parameter.is_psd() else -1.0
    shape = sign * (cp.quad_form(x, parameter) if parameter.ndim == 2 else parameter @ cp.square(x))
    layer = build(minimise(shape + cp.sum(x), x >= -1, x <= 1), [parameter], [x])
    wrong = torch.tensor(value).double()
    for call in (layer, layer.solve):
        with pytest.raises(ValueError, match=message + ".*need not be convex"):
            call(wrong)
    right = sign * torch.eye(2).double() if parameter.ndim == 2 else sign * torch.ones(2).double()
    (minimum,) = layer(right)
    close([minimum], [torch.full((2,), -0.5).double()], 1e-6)  # minimises x² + x


def failing(**options: Any) -> tuple[lpgd.CvxpyLayer, list[Tensor]]:
    """Elements 1 and 3 of 5 are infeasible: their upper bounds lie below the lower ones."""
    upper = torch.tensor([0.5, -3.0, 1.0, -4.0, 0.1]).double()[:, None].repeat(1, 4)
    P, _, A, b, _ = data()
    return program(**options), [P, normal(5, 4, seed=8), A, b, upper]


def test_warnings_point_at_the_users_line() -> None:
    layer, tensors = failing(on_error="warn", gradient=lpgd.ImplicitKKT())
    x, c = cp.Variable(2), cp.Parameter(2)
    vertex = build(minimise(c @ x, x >= 0, x <= 1), [c], [x])
    loss = vertex(leaf(torch.tensor([1.0, -1.0]).double()))[0].sum()
    for act in (lambda: layer(*tensors), loss.backward):
        with pytest.warns(lpgd.LpgdWarning) as caught:
            act()
        assert [Path(warning.filename).name for warning in caught] == [Path(__file__).name]


def test_a_refused_gradient_method_leaves_the_old_one() -> None:
    layer = build()
    with pytest.raises(TypeError, match="gradient method"):
        layer.gradient = "exact"  # pyright: ignore[reportAttributeAccessIssue]
    assert layer.gradient == lpgd.ImplicitKKT()


# Elements without a solution


def test_infinite_bounds_are_data() -> None:
    P, q, A, b, u = data(2)
    u[0] = torch.inf
    layer = program()
    own = [leaf(tensor) for tensor in (P, q, A, b, u)]
    outputs = layer(*own)
    close([out[0] for out in outputs[:2]], [out[0] for out in layer(P, q, A, b, torch.full_like(u, 1e3))[:2]])
    assert not outputs[2][0].any()
    weighted(outputs).backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in own)
    assert own[4].grad is not None
    assert not own[4].grad[0].any()


def test_a_loss_gradient_that_is_not_finite_is_refused() -> None:
    tensors = [leaf(THREE.double()), leaf(ONE.double())]
    (output,) = LAYER(torch.stack([tensors[0], torch.tensor([0.0, 0.0, 9.0]).double()]), tensors[1])
    loss = (output - output.detach())[1].square().sum().sqrt() + output[0].sum()  # √0 has an infinite slope
    with pytest.raises(ValueError, match=r"loss gradient with respect to x is NaN or infinite for elements \[1\]"):
        loss.backward()


# The whole answer, and options


def test_solve_gives_the_whole_answer() -> None:
    layer, tensors = failing(solver="CLARABEL")
    solution = layer.solve(*tensors)
    assert isinstance(solution, lpgd.ConicSolution)
    assert solution.failed == [1, 3]
    good = [0, 2, 4]
    worst = solution.residuals.worst
    assert (worst[good] < 1e-8).all()
    assert worst[[1, 3]].isnan().all()
    assert (solution.iterations[good] > 0).all()
    assert (solution.solve_seconds[good] > 0).all()
    assert (solution.setup_seconds >= 0).all()
    with_error = program(on_error="nan")(*tensors)
    assert with_error.info.solution is not None
    assert with_error.info.statuses == solution.statuses
    # Two leading dimensions become one; nothing is differentiable.
    nested = layer.solve(tensors[0], normal(2, 3, 4), tensors[2], tensors[3], leaf(torch.ones(4)))
    assert nested.batch_size == 6
    assert not nested.x.requires_grad
    P, q = tensors[0], normal(2, 3, 4).reshape(6, 4)
    x = layer(P, q, tensors[2], tensors[3], torch.ones(4))[0]
    close([nested.objective], [0.5 * torch.einsum("bi,ij,bj->b", x, P, x) + (q * x).sum(-1)])


@pytest.mark.parametrize("name", ["CLARABEL", "clarabel", "Clarabel", "SCS", "scs", "ECOS", "ecos"])
def test_solvers_go_by_their_names_in_any_case(name: str) -> None:
    for layer in (build(solver=name), build(solver_args={"solve_method": name})):
        assert layer.solver.name == name.upper()
        close(layer(THREE, ONE), [torch.full((3,), 1 / 3)], 1e-4)
    assert build(solver="DIFFCP").solver == build().solver


def test_options_of_the_standard_layer() -> None:
    layer = build(solver_args={"eps": 1e-6, "max_iters": 77, "mode": "lsqr", "n_jobs_forward": 1, "verbose": False})
    assert (layer.solver.tolerance, layer.solver.max_iterations) == (1e-6, 77)
    assert layer.gradient == lpgd.ImplicitKKT()
    assert isinstance(layer.executor, lpgd.SerialExecutor)
    for mode, envelope in (("lpgd", "average"), ("lpgd_right", "lower"), ("lpgd_left", "upper")):
        options = {"mode": mode, "derivative_kwargs": {"tau": 0.2, "rho": 0.3}}
        assert build(solver_args=options).gradient == lpgd.LPGD(0.2, 0.3, envelope)  # pyright: ignore[reportArgumentType]
    assert build(solver=lpgd.SCS(alpha=1.2), solver_args={"eps": 1e-5}).solver == lpgd.SCS(alpha=1.2, tolerance=1e-5)
    # What its documentation recommends for SCS, with which it solves unless told otherwise.
    recommended = build(solver_args={"eps": 1e-8, "max_iters": 10000, "acceleration_lookback": 0})
    close(recommended(THREE, ONE), [torch.full((3,), 1 / 3)])


def test_options_of_a_call_hold_for_that_call() -> None:
    layer, tensors = program(solver="CLARABEL"), [leaf(datum) for datum in data(2)]
    before = layer.solver
    loose = layer(*tensors, solver_args={"eps": 1e-4})
    tight = layer(*tensors)
    assert loose.info.solution is not None
    assert tight.info.solution is not None
    assert (loose.info.solution.iterations < tight.info.solution.iterations).all()
    other = layer(*tensors, solver_args={"solve_method": "SCS", "mode": "lpgd", "derivative_kwargs": {"tau": 1e-3}})
    weighted(other).backward()
    assert other.info.gradients[0].method == lpgd.LPGD(1e-3)
    assert layer.solver is before
    assert layer.gradient == lpgd.ImplicitKKT()
    with pytest.raises(lpgd.SolverError, match="ITERATION_LIMIT"):
        layer(*tensors, solver_args={"max_iters": 1, "rescue": False})


def test_the_gradient_method_may_change_between_calls() -> None:
    layer, tensors = program(), [leaf(datum) for datum in data(2)]
    first = layer(*tensors)
    layer.gradient = lpgd.LPGD(tau=0.5, rho=0.1)
    second = layer(*tensors)
    own = torch.autograd.grad(weighted(first), tensors)  # the method of its own call
    weighted(second).backward()
    close(own, torch.autograd.grad(weighted(program()(*tensors)), tensors), 0.0)
    assert [out.info.gradients[0].method for out in (first, second)] == [lpgd.ImplicitKKT(), lpgd.LPGD(0.5, 0.1)]
    assert second.info.gradients[0].counts == {"average": 2}
    assert second.info.backward_seconds > 0


def test_an_exact_gradient_of_zero_is_said() -> None:
    x, c = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(c @ x), [x >= 0, x <= 1])
    cost = leaf(torch.tensor([1.0, -2.0]))
    with pytest.warns(lpgd.LpgdWarning, match=r"is zero.*vertex.*LPGD with a finite tau"):
        lpgd.CvxpyLayer(problem, [c], [x])(cost)[0].sum().backward()
    assert cost.grad is not None
    assert not cost.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teaching = lpgd.CvxpyLayer(problem, [c], [x], gradient=lpgd.LPGD(tau=5.0))
        (gradient,) = torch.autograd.grad(teaching(cost)[0].sum(), cost)
    close([gradient], [torch.tensor([-0.1, -0.1])], 1e-4)  # the cost 1 ∓ 5, and -2 ± 5, moves each to its other bound


def test_the_cost_is_not_warned_about_where_only_constraints_are_differentiated() -> None:
    x, a, b, c = cp.Variable(3), cp.Parameter(3), cp.Parameter(), cp.Parameter(3)
    layer = build(minimise(c @ x, a @ x == b, x >= 0, x <= 1), [a, b, c], [x], gradient=lpgd.ImplicitKKT())
    rows, right, costs = torch.ones(3).double(), torch.tensor(1.5).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(rows.requires_grad_(), right.requires_grad_(), costs)[0].square().sum().backward()
    assert right.grad == pytest.approx(1.0)  # x = (1, ½, 0): the second variable moves with b
    with pytest.warns(lpgd.LpgdWarning, match="the exact gradient of this linear program .* cost is zero"):
        layer(rows, right, costs.requires_grad_())[0].square().sum().backward()
