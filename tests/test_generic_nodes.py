"""Nodes of functions of the user's own, the generic solvers, and what gradient methods say of them."""

from __future__ import annotations

import functools
import pickle

import pytest
import torch

import lpgd
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.solvers.node.descent import lbfgs, newton
from lpgd.solvers.node.minres import minres
from tests.node_cases import random


def squared_distance(x, y):
    return 0.5 * (y - x).square().sum()


def nonnegative(x, y):
    return -y


def rosenbrock(a, y):
    return (a[0] - y[0]) ** 2 + 100 * (y[1] - y[0] ** 2) ** 2


# -- solvers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["newton", "lbfgs", "scipy"])
def test_unconstrained_minima_are_found_element_by_element(algorithm):
    a = torch.tensor([[1.0], [0.0], [-0.5], [2.0]], dtype=torch.float64)
    node = lpgd.Node(rosenbrock, shape=(2,), initial=lambda a: torch.tensor([-1.2, 1.0]))
    solution = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(algorithm=algorithm)).solve(a)
    expected = torch.cat([a, a.square()], -1)
    torch.testing.assert_close(solution.x, expected, atol=1e-3 if algorithm == "scipy" else 1e-8, rtol=0)
    assert len(set(solution.iterations.tolist())) > 1


@pytest.mark.parametrize("algorithm", ["newton", "lbfgs", "scipy"])
def test_constraints_of_every_kind_are_met(algorithm):
    # min ½|y - x|²  s.t.  <a, y> = 1, |y|² <= 2: in the plane the nearest point, or one on its circle with the disk.
    a = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64) / 3**0.5
    node = lpgd.Node(
        squared_distance, equality=lambda x, y: y @ a - 1.0, inequality=lambda x, y: y.square().sum() - 2.0
    )
    x = torch.cat([0.1 * random(0, 2, 3), 5 * random(1, 2, 3)])
    in_plane = x - (x @ a)[:, None] * a
    expected = in_plane / in_plane.norm(dim=-1, keepdim=True).clamp(min=1.0) + a
    solution = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(algorithm=algorithm)).solve(x)
    torch.testing.assert_close(solution.x, expected, atol=1e-5 if algorithm == "scipy" else 1e-9, rtol=0)
    assert bool((solution.point.lam > 1e-3).squeeze(-1).tolist() == [False, False, True, True])


def test_a_failed_element_leaves_the_others_alone():
    node = lpgd.Node(lambda w, y: 0.5 * w * y.square().sum() - y.sum(), shape=(2,), ndims=0)
    w = torch.tensor([1.0, -1.0, 2.0, torch.nan], dtype=torch.float64)
    solution = lpgd.NodeLayer(node).solve(w)
    assert [status.name for status in solution.statuses] == ["SOLVED", "UNBOUNDED", "SOLVED", "INVALID_DATA"]
    with pytest.raises(lpgd.SolverError, match="element 1 of 4: UNBOUNDED"):
        lpgd.NodeLayer(node)(w)
    w.requires_grad_()
    y = lpgd.NodeLayer(node, on_error="nan")(w)
    assert torch.isnan(y[[1, 3]]).all()
    (gradient,) = torch.autograd.grad(y[[0, 2]].sum(), w)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 0.0, -0.5, 0.0], dtype=torch.float64))


def test_an_infeasible_problem_is_called_so():
    node = lpgd.Node(squared_distance, equality=lambda x, y: torch.stack([y.sum() - 1.0, y.sum() + 1.0]))
    assert lpgd.NodeLayer(node).solve(random(0, 1, 2)).statuses == (lpgd.Status.INFEASIBLE,)


def test_a_warm_start_stays_on_its_branch_and_saves_iterations():
    def double_well(x, y):
        return ((y.square() - 1).square() + 0.1 * x * y).sum()

    layer = lpgd.NodeLayer(lpgd.Node(double_well, initial=lambda x: torch.full((1,), 0.7)))
    x = torch.ones(1, 1, dtype=torch.float64)
    right = layer.solve(x)
    assert right.x.item() == pytest.approx(1.0, abs=0.02)
    left = lpgd.NodeLayer(lpgd.Node(double_well, initial=lambda x: torch.full((1,), -0.7))).solve(x)
    assert left.x.item() == pytest.approx(-1.0, abs=0.02)
    assert layer.solve(x, warm_start=left).x.item() == pytest.approx(left.x.item(), abs=1e-12)
    assert layer.solve(x, warm_start=right).iterations[0] < right.iterations[0]


def test_lbfgs_equals_newton_where_many_variables_are():
    scale = torch.linspace(1.0, 100.0, 400, dtype=torch.float64)
    node = lpgd.Node(lambda x, y: 0.5 * (scale * (y - x).square()).sum() + 0.25 * (y**4).sum())
    x = random(3, 2, 400)
    solution = lpgd.NodeLayer(node).solve(x)
    assert float(solution.residual.max()) <= 1e-10
    problem = solution.problem
    for method in (newton, lbfgs):
        found = method(AugmentedLagrangian(problem), torch.zeros_like(x))
        torch.testing.assert_close(found.x, solution.x, atol=1e-6 if method is lbfgs else 1e-11, rtol=0)


def test_minres_solves_indefinite_and_consistent_singular_systems():
    basis = torch.linalg.qr(random(0, 8, 8)).Q
    values = torch.tensor([3.0, -2.0, 1.0, 0.5, -0.1, 4.0, 0.0, 0.0], dtype=torch.float64)
    matrix = (basis * values) @ basis.T
    right = random(1, 3, 8) @ matrix
    answer, exact = minres(lambda u: u @ matrix, right)
    assert exact.all()
    torch.testing.assert_close(answer, right @ torch.linalg.pinv(matrix, hermitian=True), atol=1e-9, rtol=0)


# -- the user's own functions ----------------------------------------------------------------------------------------


def test_a_solver_of_the_users_own_is_called_for_each_element():
    calls = []

    def solve(x, start=None):
        calls.append(start)
        return None if x[0] > 5 else x / x.norm()

    node = lpgd.Node(squared_distance, equality=lambda x, y: y.square().sum() - 1.0, solve=solve)
    layer = lpgd.NodeLayer(node)
    x = random(0, 2, 3).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, x / x.norm(dim=-1, keepdim=True))
    again = layer(x, warm_start=y)
    assert calls[:2] == [None, None]
    assert torch.equal(calls[2], y[0])
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-6)
    with pytest.raises(lpgd.SolverError, match="element 1 of 2: NO_SOLUTION"):
        layer(torch.stack([again[0].detach(), torch.full((3,), 9.0, dtype=torch.float64)]))


def test_batched_functions_give_the_same():
    x = random(0, 3, 4)
    one = lpgd.NodeLayer(lpgd.Node(squared_distance, inequality=nonnegative))(x)
    many = lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum(-1), inequality=lambda x, y: -y, batched=True)
    torch.testing.assert_close(lpgd.NodeLayer(many)(x), one)
    torch.testing.assert_close(one, x.relu())


def test_inputs_broadcast_and_shared_ones_get_the_sum_of_gradients():
    node = lpgd.Node(lambda x, A, y: 0.5 * (A @ y).square().sum() - x @ y, ndims=(1, 2))
    x, A = random(0, 2, 5, 3).requires_grad_(), (random(1, 3, 3) + 3 * torch.eye(3)).requires_grad_()
    y = lpgd.NodeLayer(node)(x, A)
    expected = torch.linalg.solve(A.mT @ A, x[..., None])[..., 0]
    torch.testing.assert_close(y, expected)
    weights = random(2, 2, 5, 3)
    ours, theirs = (torch.autograd.grad((part * weights).sum(), (x, A)) for part in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_an_empty_batch_is_no_trouble():
    for node in (lpgd.nodes.RobustPooling(), lpgd.nodes.Projection(), lpgd.Node(squared_distance, nonnegative)):
        x = torch.zeros(0, 3, requires_grad=True)
        y = lpgd.NodeLayer(node)(x)
        y.sum().backward()
        assert y.shape[0] == 0
        assert x.grad is not None
        assert x.grad.shape == (0, 3)


def test_diagnoses_work_on_nodes():
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("simplex", None), lpgd.LPGD(tau=1e-4))
    inputs = random(0, 3, 4), torch.ones(3, dtype=torch.float64)
    assert lpgd.gradcheck(layer, inputs).ok
    report = lpgd.diagnose(layer, inputs, lambda y: y.pow(3).sum())
    assert "LPGD" in str(report)


def test_the_descent_test_takes_inputs_of_any_shape():
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("l2_sphere", None), lpgd.IgnoreConstraints(descent_test=True))
    x, r = random(0, 3, 4).requires_grad_(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = layer(x, r)
    y.sum().backward()
    exact = torch.autograd.grad(lpgd.NodeLayer(layer.node)(x, r).sum(), x)[0]
    torch.testing.assert_close(y.info.gradients[0].descent, exact.sum(-1))  # ĝ = 1 for x and 0 for r


def test_nodes_compose():
    inner = lpgd.NodeLayer(lpgd.nodes.RobustPooling("pseudo_huber", dim=-1))
    outer = lpgd.NodeLayer(lpgd.nodes.Projection("simplex"))
    x = random(0, 3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: outer(inner(x)), (x,), atol=1e-6)


captured_at_module_level = torch.ones(3, requires_grad=True)


def test_captured_tensors_that_would_lose_their_gradient_are_refused_by_name():
    weight = torch.ones(3, requires_grad=True)
    module = torch.nn.Linear(3, 3)
    x = random(0, 2, 3)
    cases = {
        "weight": lambda x, y: squared_distance(weight * x, y),
        "captured_at_module_level": lambda x, y: squared_distance(captured_at_module_level * x, y),
        "module.weight, module.bias": lambda x, y: squared_distance(module(x.float()), y),
        "weights\\[1\\]": functools.partial(
            lambda x, y, weights: squared_distance(weights[1] * x, y), weights=[1, weight]
        ),
    }
    for names, objective in cases.items():
        node = lpgd.Node(objective)
        with pytest.raises(ValueError, match=f"uses .*{names}"):
            lpgd.NodeLayer(node)(x)
    with pytest.raises(ValueError, match="the equality of squared_distance uses weight"):
        lpgd.NodeLayer(lpgd.Node(squared_distance, equality=lambda x, y: weight.double() @ y))(x)
    with torch.no_grad():
        assert lpgd.NodeLayer(lpgd.Node(cases["weight"]))(x).shape == x.shape
    frozen = weight.detach()
    assert lpgd.NodeLayer(lpgd.Node(lambda x, y: squared_distance(frozen * x, y)))(x).shape == x.shape


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: lpgd.Node(3), TypeError, "objective is 3"),
        (lambda: lpgd.Node(lambda y: y), TypeError, "at least one input"),
        (lambda: lpgd.Node(lambda *inputs: inputs), TypeError, "name its arguments"),
        (lambda: lpgd.Node(squared_distance, ndims=(1, 2)), ValueError, "for each of the inputs x"),
        (lambda: lpgd.NodeLayer(squared_distance), TypeError, "declarative node"),
        (lambda: lpgd.NodeLayer(lpgd.nodes.LeastSquares), TypeError, r"such as LeastSquares\(...\)"),
        (lambda: lpgd.NodeLayer(lpgd.Node(squared_distance), solver="newton"), TypeError, "lpgd.NodeSolver"),
        (lambda: lpgd.NodeSolver(algorithm="simplex"), ValueError, "algorithm is 'simplex'"),
        (lambda: lpgd.nodes.Projection("l3_ball"), ValueError, "onto is 'l3_ball'"),
        (lambda: lpgd.nodes.Projection(radius=-1.0), ValueError, "radius is -1.0"),
        (lambda: lpgd.nodes.RobustPooling(alpha=0.0), ValueError, "alpha is 0.0"),
        (lambda: lpgd.nodes.RobustPooling("median"), ValueError, "penalty is 'median'"),
        (lambda: lpgd.ImplicitKKT(active_tolerance=-1.0), ValueError, "active_tolerance is -1.0"),
        (lambda: lpgd.LPLayer(gradient=lpgd.IgnoreConstraints()), TypeError, "smooth functions"),
        (lambda: lpgd.LPLayer(gradient=lpgd.ImplicitKKT(matrix_free=True)), TypeError, "smooth functions"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((random(0, 2, 3), random(0, 2, 3)), ValueError, "takes 1 inputs"),
        ((random(0, 2, 3).tolist(),), TypeError, "x is a list"),
        ((random(0, 2, 3).long(),), TypeError, "x is torch.int64"),
        ((random(0),), ValueError, "x has shape"),
    ],
)
def test_wrong_inputs_are_named(inputs, error, message):
    with pytest.raises(error, match=message):
        lpgd.NodeLayer(lpgd.nodes.Projection())(*inputs)


def test_an_objective_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"objective of <lambda> has shape \(3,\)"):
        lpgd.NodeLayer(lpgd.Node(lambda x, y: (y - x).square()))(random(0, 2, 3))


def test_layers_of_nodes_pickle():
    layer = pickle.loads(pickle.dumps(lpgd.NodeLayer(lpgd.Node(squared_distance, inequality=nonnegative))))
    x = random(0, 2, 3)
    torch.testing.assert_close(layer(x), x.relu())


# -- gradients at points that are not regular ------------------------------------------------------------------------


def test_a_weakly_active_constraint_has_one_of_its_two_sides():
    node = lpgd.Node(squared_distance, inequality=nonnegative)
    x = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    for weakly_active, expected in [(True, [1.0, 0.0, 0.0]), (False, [1.0, 1.0, 0.0])]:
        y = lpgd.NodeLayer(node, lpgd.ImplicitKKT(weakly_active=weakly_active))(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(gradient[0], torch.tensor(expected, dtype=torch.float64))
        assert y.info.gradients[0].used == ["implicit, one-sided"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_active_sets_are_found_in_the_precision_of_the_dtype(dtype):
    node = lpgd.Node(squared_distance, equality=lambda x, y: y.sum() - 1, inequality=nonnegative)
    x = (3 * random(5, 20, 6)).to(dtype).requires_grad_()
    weights = random(6, 20, 6).to(dtype)
    (ours,) = torch.autograd.grad((lpgd.NodeLayer(node, lpgd.ImplicitKKT())(x) * weights).sum(), x)
    (theirs,) = torch.autograd.grad((lpgd.NodeLayer(lpgd.nodes.Projection("simplex"))(x) * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=2e-5 if dtype == torch.float32 else 1e-10, rtol=0)


def test_a_tolerance_for_active_sets_takes_answers_of_rough_solvers():
    node = lpgd.Node(squared_distance, inequality=nonnegative, solve=lambda x: x.relu() + 1e-5)
    x = torch.tensor([[1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(node, lpgd.ImplicitKKT(active_tolerance=1e-4))(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    with pytest.warns(lpgd.LpgdWarning, match="do not satisfy the optimality conditions"):
        (fooled,) = torch.autograd.grad(lpgd.NodeLayer(node, lpgd.ImplicitKKT())(x).sum(), x)
    torch.testing.assert_close(fooled, torch.ones_like(fooled))


def test_dependent_constraints_give_the_gradient_of_independent_ones():
    once = lpgd.Node(squared_distance, equality=lambda x, y: y.sum() - 1)
    twice = lpgd.Node(squared_distance, equality=lambda x, y: torch.stack([y.sum() - 1, 2 * y.sum() - 2]))
    x = random(0, 3, 4).requires_grad_()
    weights = random(1, 3, 4)
    (expected,) = torch.autograd.grad((lpgd.NodeLayer(once)(x) * weights).sum(), x)
    y = lpgd.NodeLayer(twice)(x)
    with pytest.warns(lpgd.LpgdWarning, match="singular"):
        (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)
    assert y.info.gradients[0].fallbacks == [0, 1, 2]


def test_more_constraints_than_variables_determine_the_derivative():
    def equality(x, y):
        return torch.stack([y[0] - x[0].sin(), y[1] - x[1] ** 2, y[0] + y[1] - x[0].sin() - x[1] ** 2])

    layer = lpgd.NodeLayer(lpgd.Node(lambda x, y: 0.0 * y.sum(), equality=equality))
    x = random(0, 2, 2).requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, torch.stack([x[:, 0].sin(), x[:, 1] ** 2], -1))
    with pytest.warns(lpgd.LpgdWarning, match="singular"):
        (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.stack([x[:, 0].cos(), 2 * x[:, 1]], -1), atol=1e-9, rtol=0)


def test_a_feasibility_problem_moves_as_little_as_its_constraints_allow():
    node = lpgd.Node(lambda b, y: 0.0 * y.sum(), equality=lambda b, y: y @ torch.ones_like(y) - b, shape=(3,), ndims=0)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    v = random(0, 2, 3)
    with pytest.warns(lpgd.LpgdWarning, match="singular"):
        (free,) = torch.autograd.grad((lpgd.NodeLayer(node)(b) * v).sum(), b)
    (proximal,) = torch.autograd.grad((lpgd.NodeLayer(node, lpgd.ImplicitKKT(rho=1.0))(b) * v).sum(), b)
    torch.testing.assert_close(free, v.mean(-1), atol=1e-10, rtol=0)  # A⁺ = 1/3 (1, 1, 1)
    torch.testing.assert_close(proximal, v.mean(-1), atol=1e-10, rtol=0)


def test_flat_directions_get_the_least_norm_derivative_or_a_proximal_one():
    node = lpgd.Node(lambda x, y: 0.5 * (y.sum() - x.sum()) ** 2)
    x = random(0, 2, 3).requires_grad_()
    v = random(1, 2, 3)
    with pytest.warns(lpgd.LpgdWarning, match="singular"):
        (gradient,) = torch.autograd.grad((lpgd.NodeLayer(node)(x) * v).sum(), x)
    torch.testing.assert_close(gradient, v.mean(-1, keepdim=True).expand(2, 3), atol=1e-9, rtol=0)
    (gradient,) = torch.autograd.grad((lpgd.NodeLayer(node, lpgd.ImplicitKKT(rho=0.1))(x) * v).sum(), x)
    expected = v.sum(-1, keepdim=True).expand(2, 3) / 3.1  # (11ᵀ + ρI)⁻¹ 1 = 1 / (3 + ρ)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("onto", ["simplex", "l2_sphere", "l1_ball"])
def test_a_system_known_by_products_gives_the_same_gradient(onto):
    node, x = lpgd.nodes.Projection(onto), random(0, 4, 7).requires_grad_()
    weights = random(1, 4, 7)
    methods = (lpgd.ImplicitKKT(matrix_free=True), lpgd.ImplicitKKT(matrix_free=False))
    free, dense = (torch.autograd.grad((lpgd.NodeLayer(node, method)(x) * weights).sum(), x)[0] for method in methods)
    torch.testing.assert_close(free, dense, atol=1e-10, rtol=0)


# -- ignoring constraints ----------------------------------------------------------------------------------------------


def test_ignoring_constraints_is_the_formula_and_its_descent_test_the_product():
    node = lpgd.Node(
        lambda x, A, y: 0.5 * (A @ y).square().sum() - x @ y, equality=lambda x, A, y: y.sum() - 1, ndims=(1, 2)
    )
    x, A, v = random(0, 3, 4).requires_grad_(), random(1, 3, 4, 4).requires_grad_(), random(2, 3, 4)
    y = lpgd.NodeLayer(node, lpgd.IgnoreConstraints(descent_test=True))(x, A)
    dx, dA = torch.autograd.grad((y * v).sum(), (x, A))
    s = torch.linalg.solve(A.mT @ A, v[..., None])[..., 0].detach()
    torch.testing.assert_close(dx, s, atol=1e-9, rtol=1e-9)  # f_xy = -I
    exact = torch.autograd.grad((lpgd.NodeLayer(node)(x, A) * v).sum(), (x, A))
    Ay, As = (A @ y.detach()[..., None])[..., 0], (A @ s[..., None])[..., 0]
    expected = -(As[..., None] * y[:, None] + Ay[..., None] * s[:, None])
    torch.testing.assert_close(dA, expected, atol=1e-9, rtol=1e-9)
    record = y.info.gradients[0]
    product = (exact[0] * dx).sum(-1) + (exact[1] * dA).sum((-1, -2))
    torch.testing.assert_close(record.descent, product, atol=1e-9, rtol=1e-9)
    assert record.used == ["constraints ignored"] * 3


def test_ignoring_linear_constraints_of_a_projection_descends():
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("simplex"), lpgd.IgnoreConstraints(descent_test=True))
    x = random(0, 50, 6).requires_grad_()
    y = layer(x)
    (y * random(1, 50, 6)).sum().backward()
    assert (y.info.gradients[0].descent >= -1e-12).all()  # gᵀPg, P the projection onto the face


def test_ignored_constraints_in_forward_mode_are_the_transpose():
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("l2_sphere"), lpgd.IgnoreConstraints())
    x, dx = random(0, 2, 3), random(1, 2, 3)
    torch.testing.assert_close(torch.func.jvp(layer, (x,), (dx,))[1], dx)
