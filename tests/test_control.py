"""Optimal control: closed forms, another solver, linear time, and what is refused."""

from __future__ import annotations

import math

import pytest
import scipy.sparse
import torch

import lpgd
from lpgd.nodes.control.riccati import factorise, solve
from tests.node_cases import random

A = torch.tensor([[1.0, 0.1], [0.0, 1.0]], dtype=torch.float64)
B = torch.tensor([[0.005], [0.1]], dtype=torch.float64)


def linear(x, u):
    return A @ x + B @ u


def quadratic(x, u):
    return 0.5 * x.square().sum() + 0.05 * u.square().sum()


def final(x):
    return 5.0 * x.square().sum()


def pendulum(x, u, length, h):
    return torch.stack([x[0] + h * x[1], x[1] + h * (u[0] - 9.81 / length * torch.sin(x[0]))])


def effort(x, u, length, h):
    return h * (0.1 * u.square().sum() + 0.1 * (x[0] - math.pi) ** 2 + 0.01 * x[1] ** 2)


def upright(x, length, h):
    return 10 * ((x[0] - math.pi) ** 2 + x[1] ** 2)


def as_qp(x0, horizon, control_bounds=None, state_bounds=None):
    """P, q, A, b, lower and upper of the linear-quadratic problem in rows (u_t, x_(t+1)): sparse, banded by blocks."""
    n, m = 2, 1
    stage = scipy.sparse.diags([0.1, 1.0, 1.0])
    P = scipy.sparse.block_diag([stage] * (horizon - 1) + [scipy.sparse.diags([0.1, 10.0, 10.0])], format="csr")
    here = scipy.sparse.csr_matrix(torch.cat([B, -torch.eye(n, dtype=torch.float64)], 1).numpy())
    before = scipy.sparse.csr_matrix(torch.cat([torch.zeros(n, m, dtype=torch.float64), A], 1).numpy())
    shift = scipy.sparse.eye(horizon, k=-1)
    rows = scipy.sparse.kron(scipy.sparse.eye(horizon), here) + scipy.sparse.kron(shift, before)
    b = torch.zeros(len(x0), horizon * n, dtype=torch.float64)
    b[:, :n] = -x0 @ A.T
    lower, upper = (
        torch.tensor([c, s, s], dtype=torch.float64).repeat(horizon)
        for c, s in zip(control_bounds or (-math.inf, math.inf), state_bounds or (-math.inf, math.inf), strict=True)
    )
    return _sparse(P), torch.zeros(horizon * (n + m), dtype=torch.float64), _sparse(rows), b, lower, upper


def _sparse(matrix):
    own = matrix.tocoo()
    index = torch.as_tensor([own.row.tolist(), own.col.tolist()])
    return torch.sparse_coo_tensor(index, torch.as_tensor(own.data), own.shape, check_invariants=True).coalesce()


def test_the_recursion_solves_the_whole_system():
    T, size, n, m = 5, 3, 2, 1
    root = random(0, T, size, n + m, n + m)
    hessian, slope = root @ root.mT, random(1, T, size, n, n + m)
    last = random(2, size, n, n) @ random(2, size, n, n).mT
    right, end, defect = random(3, T, size, n + m), random(4, size, n), random(5, T, size, n)
    factor = factorise(hessian, last, slope)
    assert factor.definite.all()
    control, state, nu = solve(factor, right, end, defect)
    before = torch.cat([torch.zeros_like(state[:1]), state[:-1]])
    w = torch.cat([control, before], -1)
    stationary = (hessian @ w[..., None] + slope.mT @ nu[..., None])[..., 0] + right
    stationary[1:, :, m:] -= nu[:-1]
    torch.testing.assert_close(stationary[..., :m], torch.zeros_like(control), atol=1e-10, rtol=0)
    torch.testing.assert_close(stationary[1:, :, m:], torch.zeros_like(state[1:]), atol=1e-10, rtol=0)
    torch.testing.assert_close((slope @ w[..., None])[..., 0] - state, -defect, atol=1e-10, rtol=0)
    torch.testing.assert_close((last @ state[-1][..., None])[..., 0] - nu[-1], -end, atol=1e-10, rtol=0)


def test_without_bounds_a_linear_quadratic_problem_is_one_step():
    x0 = random(0, 3, 2)
    node = lpgd.nodes.OptimalControl(linear, quadratic, final, horizon=30, controls=1)
    solution = lpgd.NodeLayer(node).solve(x0)
    P, _, rows, b, _, _ = as_qp(x0, 30)
    whole = torch.cat(
        [torch.cat([P.to_dense(), rows.to_dense().mT], 1), torch.nn.functional.pad(rows.to_dense(), (0, 60))]
    )
    right = torch.cat([torch.zeros(3, 90, dtype=torch.float64), b], -1)
    expected = torch.linalg.solve(whole, right.mT).mT
    torch.testing.assert_close(solution.x, expected[:, :90], atol=1e-9, rtol=0)
    assert solution.iterations.max() <= 4
    torch.testing.assert_close(solution.point.nu, expected[:, 90:], atol=1e-9, rtol=0)


@pytest.mark.parametrize("state_bounds", [None, (-1.0, 1.0)])
def test_a_qp_in_blocks_with_bounds_is_the_same_problem(state_bounds):
    x0 = torch.tensor([[0.6, 0.9], [-0.9, -0.2]], dtype=torch.float64, requires_grad=True)
    T, bounds = 25, (-1.5, 1.5)
    node = lpgd.nodes.OptimalControl(linear, quadratic, final, T, 1, control_bounds=bounds, state_bounds=state_bounds)
    y = lpgd.NodeLayer(node)(x0)
    P, q, rows, b, lower, upper = as_qp(x0, T, bounds, state_bounds)
    layer = lpgd.QPLayer(gradient=lpgd.ImplicitKKT())
    z = layer(P, q, A=rows, b=b, lb=lower, ub=upper)
    z = z if isinstance(z, torch.Tensor) else z[0]
    torch.testing.assert_close(y.flatten(1), z, atol=1e-6, rtol=0)
    assert (y.info.solution.point.lam > 1e-3).any(-1).all()  # bounds are active
    weights = random(0, *y.shape)
    ours = torch.autograd.grad((y * weights).sum(), x0)[0]
    theirs = torch.autograd.grad((z * weights.flatten(1)).sum(), x0)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_controls_at_their_bounds_are_there_exactly():
    node = lpgd.nodes.OptimalControl(linear, quadratic, final, 20, 1, control_bounds=(-1.0, 1.0))
    controls, _ = node.split(lpgd.NodeLayer(node)(torch.tensor([[3.0, 0.0]], dtype=torch.float64)))
    assert controls.min() == -1.0


@pytest.mark.parametrize(
    "bounds", [(None, None), ((-2.0, 2.0), None), ((-6.0, 6.0), ((-torch.inf, -1.0), (torch.inf, 1.0)))]
)
def test_second_derivatives_are_those_of_differences(bounds):
    node = lpgd.nodes.OptimalControl(pendulum, effort, upright, 5, 1, *bounds, ndims=0)
    state = torch.tensor([[0.1, 0.0]], dtype=torch.float64, requires_grad=True)
    length, h = torch.ones(1, dtype=torch.float64, requires_grad=True), torch.full((1,), 0.05, dtype=torch.float64)
    layer = lpgd.NodeLayer(node)
    assert torch.autograd.gradgradcheck(
        lambda *inputs: layer(*inputs, h), (state, length), atol=1e-5, rtol=1e-4, fast_mode=True
    )


def test_parameters_may_vary_along_the_horizon():
    def track(x, u, goal):
        return (x[0] - goal[0]).square() + 0.01 * u.square().sum()

    node = lpgd.nodes.OptimalControl(
        lambda x, u, goal: linear(x, u),
        track,
        lambda x, goal: (x[0] - goal[0]).square(),
        6,
        1,
        ndims=2,
        varying=("goal",),
    )
    state, goal = random(0, 2, 2).requires_grad_(), random(1, 2, 7, 1).requires_grad_()
    assert torch.autograd.gradcheck(lpgd.NodeLayer(node), (state, goal), atol=1e-6, fast_mode=True)
    with pytest.raises(ValueError, match=r"goal has shape \(5, 1\); it varies, and has 7 rows"):
        lpgd.NodeLayer(node)(state, goal[:, :5])


def test_elements_without_a_trajectory_leave_the_others_alone():
    node = lpgd.nodes.OptimalControl(
        lambda x, u, low: linear(x, u), lambda x, u, low: quadratic(x, u), None, 4, 1, lambda low: (low, 1.0), ndims=0
    )
    low = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    state = random(0, 2, 2)
    solution = lpgd.NodeLayer(node).solve(state, low)
    assert solution.statuses == (lpgd.Status.SOLVED, lpgd.Status.INFEASIBLE)
    torch.testing.assert_close(solution.x[0], lpgd.NodeLayer(node).solve(state[:1], low[:1]).x[0])


learned = torch.ones(1, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"horizon": 0}, ValueError, "horizon is 0"),
        ({"stage": 3}, TypeError, "stage is 3"),
        ({"control_bounds": 3.0}, TypeError, "control_bounds is 3.0"),
        ({"control_bounds": (1.0, -1.0)}, ValueError, "lower bounds must be below"),
        ({"dynamics": lambda x: x}, TypeError, "must take x and u first"),
        ({"varying": ("goal",)}, ValueError, "varying names goal"),
        ({"dynamics": lambda x, u: linear(x, u)[:1]}, ValueError, r"dynamics returned \(1,\)"),
        ({"stage": lambda x, u: x}, ValueError, r"the stage cost is of shape \(2,\)"),
        ({"stage": lambda x, u: (learned * u).sum()}, ValueError, "stage of optimal control uses learned"),
    ],
)
def test_what_cannot_be_is_refused(changes, error, message):
    options = {"dynamics": linear, "stage": quadratic, "final": final, "horizon": 3, "controls": 1} | changes
    with pytest.raises(error, match=message):
        lpgd.NodeLayer(lpgd.nodes.OptimalControl(**options))(random(0, 1, 2))


LIMITS = {"free": (None, None), "bounded": ((-6.0, 6.0), ((-math.inf, -5.0), (math.inf, 5.0)))}


@pytest.mark.parametrize("limits", LIMITS)
def test_a_swing_up_takes_no_more_systems_where_the_horizon_is_longer(limits):
    counts, controls = [], []
    for horizon in (160, 640):
        node = lpgd.nodes.OptimalControl(pendulum, effort, upright, horizon, 1, *LIMITS[limits], ndims=0)
        one, step = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.05, dtype=torch.float64)
        y = lpgd.NodeLayer(node)(torch.zeros(1, 2, dtype=torch.float64), one, step)
        solution = y.info.solution
        assert solution.statuses == (lpgd.Status.SOLVED,)
        assert float(solution.residual.max()) <= 1e-8
        controls.append(node.split(y)[0][0, :100])
        counts.append(int(solution.iterations.max()))
        # At the top for the last half: the long task is done early, and costs as much as the short one.
        assert float((node.split(y)[1][0, horizon // 2 :, 0] - math.pi).abs().max()) <= 0.05
    assert counts[1] <= 1.4 * counts[0]
    torch.testing.assert_close(*controls, atol=1e-4, rtol=0)


def test_a_long_horizon_of_parameters_that_vary_is_that_of_fixed_ones():
    def miss(x, u, goal):
        return 0.05 * (0.1 * u.square().sum() + 0.1 * (x[0] - goal) ** 2 + 0.01 * x[1] ** 2)

    def swing(x, u, goal):
        return pendulum(x, u, 1.0, 0.05)

    def last(x, goal):
        return 10 * ((x[0] - goal) ** 2 + x[1] ** 2)

    start, goals = torch.zeros(2, 2, dtype=torch.float64), torch.full((2, 131), math.pi, dtype=torch.float64)
    goals[1] = 0.5  # near: done in a few steps, beside one that begins anew from shorter horizons
    varying = lpgd.nodes.OptimalControl(swing, miss, last, 130, 1, ndims=1, varying=("goal",))
    fixed = lpgd.nodes.OptimalControl(swing, miss, last, 130, 1, ndims=0)
    first, second = lpgd.NodeLayer(varying).solve(start, goals), lpgd.NodeLayer(fixed).solve(start, goals[:, 0])
    assert first.statuses == (lpgd.Status.SOLVED,) * 2
    assert first.iterations[0] > 15 >= first.iterations[1]
    torch.testing.assert_close(first.x, second.x, atol=1e-7, rtol=0)
    torch.testing.assert_close(lpgd.NodeLayer(fixed).solve(start[:1], goals[:1, 0]).x, first.x[:1], atol=1e-7, rtol=0)
