"""The logarithmic barrier as a solver of nodes, sparse systems of many variables, and constraints that touch."""

from __future__ import annotations

import math

import pytest
import torch

import lpgd
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.bordered import bordered_response
from lpgd.solvers.node.sparse import find_sparsity, read_matrices
from tests.node_cases import random


def squared_distance(x, y):
    return 0.5 * (y - x).square().sum()


# -- [LEC] 2.10.5 and 3.9 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [1e-1, 1e-3, 1e-6])
def test_the_barrier_of_a_projection_is_the_smooth_positive_part(mu):
    layer = lpgd.NodeLayer(
        lpgd.Node(squared_distance, inequality=lambda x, y: -y), solver=lpgd.NodeSolver(algorithm="barrier", barrier=mu)
    )
    x = torch.tensor([[1.0, 0.0, -1.0], [0.3, -2.0, 0.01]], dtype=torch.float64, requires_grad=True)
    root = (x.square() + 4 * mu).sqrt()
    y = layer(x)
    torch.testing.assert_close(y, (x + root) / 2, atol=1e-7, rtol=0)
    torch.testing.assert_close(y.info.solution.point.lam, mu / y.detach(), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (1 + x / root) / 2, atol=1e-5, rtol=0)
    assert set(y.info.gradients[0].used) == {"implicit"}


def test_the_gradient_of_a_barrier_with_equalities_is_that_of_finite_differences():
    node = lpgd.Node(squared_distance, equality=lambda x, y: y.sum() - 1, inequality=lambda x, y: -y)
    x = random(0, 2, 4).requires_grad_()
    layer = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(algorithm="barrier", barrier=0.05))
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-5, fast_mode=True)
    perturbed = lpgd.NodeLayer(node, lpgd.LPGD(tau=1e-4), solver=layer.solver)
    weights = random(1, 2, 4)
    ours, theirs = (torch.autograd.grad((own(x) * weights).sum(), x)[0] for own in (layer, perturbed))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_barrier_without_an_interior_is_infeasible():
    node = lpgd.Node(squared_distance, inequality=lambda x, y: torch.cat([y - 1, 2 - y]))
    solver = lpgd.NodeSolver(algorithm="barrier")
    assert lpgd.NodeLayer(node, solver=solver).solve(random(0, 1, 2)).statuses == (lpgd.Status.INFEASIBLE,)


# -- [DDN] 4.7.3 ----------------------------------------------------------------------------------------------------


def test_an_inequality_that_touches_tangentially_is_dropped():
    # On the line y₁ = 1 - x the disk of radius 1 - x around 0 is touched at (1 - x, 0): its multiplier is zero.
    def distance(x, y):
        return 0.5 * (y[0] - 3.0) ** 2 + 0.5 * y[1] ** 2

    node = lpgd.Node(
        distance,
        equality=lambda x, y: y[0] - (1 - x[0]),
        inequality=lambda x, y: y @ y - (1 - x[0]) ** 2,
        solve=lambda x: torch.stack([1 - x[0], 0 * x[0]]),
        shape=(2,),
    )
    x = torch.tensor([[0.0], [0.3]], dtype=torch.float64, requires_grad=True)
    problem_layer = lpgd.NodeLayer(node, lpgd.ImplicitKKT())
    y = problem_layer(x)
    solution = y.info.solution
    own = NodePoint(solution.x, x.new_full((2, 1), 2.0) + x.detach(), x.new_zeros(2, 1))
    tilt = NodePoint(random(0, 2, 2), x.new_zeros(2, 1), x.new_zeros(2, 1))
    _, exact = bordered_response(solution.problem, own, tilt, x.new_ones(2, 1, dtype=torch.bool))
    assert not exact.any()  # with it the rows depend on each other
    object.__setattr__(solution, "nu", own.nu)
    object.__setattr__(solution, "lam", own.lam)
    (gradient,) = torch.autograd.grad((y * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum(), x)
    assert y.info.gradients[0].used == ["implicit, one-sided"] * 2
    torch.testing.assert_close(gradient, -torch.ones_like(x))


# -- many variables -------------------------------------------------------------------------------------------------


def chain(x, y):
    return 0.5 * (y - x).square().sum() + 0.25 * (y[1:] - y[:-1]).pow(4).sum()


def test_the_colours_read_what_the_matrices_are():
    node = lpgd.Node(
        chain, equality=lambda x, y: y[::2].square() - 1, inequality=lambda x, y: torch.cat([-y, y.sum()[None]])
    )
    x = random(0, 2, 40)
    problem = lpgd.NodeLayer(node)._problem((x,))[0]
    point = NodePoint(x, random(1, 2, 20), random(2, 2, 41))
    sparsity = find_sparsity(problem, point)
    assert sparsity is not None
    assert (sparsity.hessian.count, sparsity.jacobian.count) == (3, 3)
    values = read_matrices(problem, point, sparsity)
    assert values is not None
    hessian, jacobian = problem.hessian(point), problem.jacobian(x)
    for element in range(2):
        first, second = values.matrices(element, torch.ones(61, dtype=torch.bool).numpy())
        torch.testing.assert_close(torch.as_tensor(first.toarray()), hessian[element])
        torch.testing.assert_close(torch.as_tensor(second.toarray()), jacobian[element])


def test_patterns_that_change_are_noticed():
    node = lpgd.Node(lambda x, y: torch.where(y[:-1] > 5, y[:-1] * y.sum(), y[:-1].square()).sum() + y[-1] ** 2)
    x = torch.zeros(1, 40, dtype=torch.float64)
    problem = lpgd.NodeLayer(node)._problem((x,))[0]
    nothing = x.new_zeros(1, 0)
    sparsity = find_sparsity(problem, NodePoint(x, nothing, nothing))
    assert sparsity is not None
    assert read_matrices(problem, NodePoint(x + 6, nothing, nothing), sparsity) is None


def test_many_variables_with_constraints_are_solved_by_newtons_method():
    n = 400
    node = lpgd.Node(chain, equality=lambda x, y: y.sum() - 1, inequality=lambda x, y: -y)
    x = random(3, 2, n).requires_grad_()
    y = lpgd.NodeLayer(node)(x)
    solution = y.info.solution
    assert float(solution.residual.max()) <= 1e-9
    assert int(solution.iterations.max()) <= 300  # L-BFGS takes thousands
    weights = random(4, 2, n)
    (ours,) = torch.autograd.grad((y * weights).sum(), x)
    dense = lpgd.NodeLayer(node, lpgd.ImplicitKKT(matrix_free=False))
    (theirs,) = torch.autograd.grad((dense(x) * weights).sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_a_swing_up_of_480_variables_takes_one_round_of_multipliers():
    stages, step = 160, 4.0 / 160

    def cost(start, y):
        u, x = y[:, 0], torch.cat([start[None], y[:, 1:]])
        running = 0.1 * u.square() + 0.1 * (x[:-1, 0] - math.pi) ** 2 + 0.01 * x[:-1, 1] ** 2
        return step * running.sum() + 10 * ((x[-1, 0] - math.pi) ** 2 + x[-1, 1] ** 2)

    def defect(start, y):
        x = torch.cat([start[None], y[:, 1:]])
        turn = y[:, 0] - 9.81 * torch.sin(x[:-1, 0])
        return (x[1:] - x[:-1] - step * torch.stack([x[:-1, 1], turn], -1)).flatten()

    node = lpgd.Node(cost, equality=defect, shape=(stages, 3))
    y = lpgd.NodeLayer(node)(torch.zeros(1, 2, dtype=torch.float64))
    angle, speed = 0.0, 0.0
    for u in y[0, :, 0].tolist():
        angle, speed = angle + step * speed, speed + step * (u - 9.81 * math.sin(angle))
    assert abs(angle - float(y[0, -1, 1])) <= 1e-9
    assert abs(angle - math.pi) <= 0.1
    assert float(y.info.solution.residual.max()) <= 1e-9
    assert int(y.info.solution.iterations.max()) <= 100
