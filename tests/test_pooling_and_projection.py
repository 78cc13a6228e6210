"""Robust pooling and projections against enumeration and independent formulas, and where they are not regular."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

import lpgd
from lpgd.nodes.pooling.node import Penalty
from lpgd.nodes.projection import ProjectionSet
from tests.node_cases import random

NONCONVEX = ("welsch", "truncated_quadratic")


def penalty_of(name: str, z: torch.Tensor, a: float) -> torch.Tensor:
    """[DDN] Table 2, written down once more."""
    z = z.abs()
    return {
        "quadratic": z**2 / 2,
        "pseudo_huber": a**2 * ((1 + (z / a) ** 2).sqrt() - 1),
        "huber": torch.where(z <= a, z**2 / 2, a * (z - a / 2)),
        "welsch": 1 - torch.exp(-(z**2) / (2 * a**2)),
        "truncated_quadratic": torch.where(z <= a, z**2 / 2, torch.full_like(z, a**2 / 2)),
    }[name]


@pytest.mark.parametrize("penalty", get_args(Penalty))
def test_no_point_of_a_grid_is_better(penalty):
    x = random(0, 6, 15) * 3
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling(penalty, alpha=0.8))(x)
    grid = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    on_grid = penalty_of(penalty, grid[None, :, None] - x[:, None], 0.8).sum(-1).amin(-1)
    ours = penalty_of(penalty, y[:, None] - x, 0.8).sum(-1)
    if penalty == "welsch":  # a local minimiser, from the better one of two starts
        starts = torch.stack([x.mean(-1), x.median(-1).values])
        on_grid = penalty_of(penalty, starts[..., None] - x, 0.8).sum(-1).amin(0)
    assert (ours <= on_grid + 1e-12).all()


def test_truncated_quadratics_of_numbers_are_solved_exactly():
    x = random(1, 40, 9) * 4
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling("truncated_quadratic", alpha=1.2))(x)
    # Any solution is the mean of the points that it keeps, which are a window of the sorted ones.
    ordered = x.sort(-1).values
    means = torch.stack([ordered[:, i:j].mean(-1) for i in range(9) for j in range(i + 1, 10)], -1)
    best = penalty_of("truncated_quadratic", means[..., None] - x[:, None], 1.2).sum(-1).amin(-1)
    torch.testing.assert_close(penalty_of("truncated_quadratic", y[:, None] - x, 1.2).sum(-1), best)


@pytest.mark.parametrize("penalty", NONCONVEX)
def test_points_out_of_reach_of_mean_and_median_are_still_found(penalty):
    x = torch.tensor([[[100.0, 0.0], [-100.0, 0.0], [0.0, 100.0], [0.1, 100.0]]], dtype=torch.float64)
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling(penalty, alpha=0.5, dim=-2, vector_dim=-1))(x)
    assert float((y[:, None] - x).norm(dim=-1).amin()) < 0.5


def test_outliers_move_the_mean_and_no_robust_pool():
    x = random(0, 1, 20)
    spoilt = x.clone()
    spoilt[:, :4] = 1e3
    for penalty in get_args(Penalty):
        layer = lpgd.NodeLayer(lpgd.nodes.RobustPooling(penalty))
        moved = float((layer(spoilt) - layer(x)).abs())
        assert moved > 100 if penalty == "quadratic" else moved < 1.5


@pytest.mark.parametrize(
    ("dim", "vector_dim", "shape"),
    [(-1, None, (2, 3, 4)), ((2, 3), None, (2, 3)), ((-2, -1), None, (2, 3)), (0, None, (3, 4, 5)),
     ((1, 3), None, (2, 4)), ((2, 3), 1, (2, 3)), (3, 0, (3, 4, 2))],
)  # fmt: skip
def test_any_dimensions_are_pooled(dim, vector_dim, shape):
    x = random(0, 2, 3, 4, 5)
    quadratic = lpgd.NodeLayer(lpgd.nodes.RobustPooling("quadratic", dim=dim, vector_dim=vector_dim))(x)
    mean = x.mean(dim)
    if vector_dim == 0:
        mean = mean.movedim(0, -1)
    assert quadratic.shape == shape
    torch.testing.assert_close(quadratic, mean)
    robust = lpgd.NodeLayer(lpgd.nodes.RobustPooling("huber", dim=dim, vector_dim=vector_dim, alpha=100.0))(x)
    torch.testing.assert_close(robust, mean)


@pytest.mark.parametrize(("dim", "vector_dim"), [(4, None), ((1, -3), None), (1, 1)])
def test_dimensions_that_are_not_there_are_refused(dim, vector_dim):
    with pytest.raises(ValueError, match="do not fit"):
        lpgd.NodeLayer(lpgd.nodes.RobustPooling(dim=dim, vector_dim=vector_dim))(random(0, 2, 3, 4, 5))


def test_nothing_to_pool_is_refused():
    with pytest.raises(ValueError, match="nothing to pool"):
        lpgd.NodeLayer(lpgd.nodes.RobustPooling())(random(0, 2, 0))


def test_a_flat_objective_has_the_derivative_of_the_weighted_mean():
    # Between two distant groups every u has the same Huber objective; the solver stays at the mean.
    x = torch.tensor([[-10.0, 10.0]], dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling("huber"))(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.5))


def test_welsch_weights_can_be_negative():
    x = torch.tensor([[0.0, 0.1, 0.2, -0.1, 2.0]], dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling("welsch", alpha=1.0))(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    z = (y[:, None] - x).detach()
    weight = (1 - z**2) * torch.exp(-(z**2) / 2)
    torch.testing.assert_close(gradient, weight / weight.sum())
    assert float(gradient[0, -1]) < 0


@pytest.mark.parametrize("penalty", get_args(Penalty))
def test_ties_are_no_trouble(penalty):
    x = torch.full((2, 5), 3.0, dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling(penalty))(x)
    torch.testing.assert_close(y, torch.full_like(y, 3.0))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 0.2))


# -- projections -------------------------------------------------------------------------------------------------------


def faces(onto: str, x: torch.Tensor, r: float) -> torch.Tensor:
    """The nearest point of a polyhedral set by enumeration of its faces: all supports, all signs."""
    n, best, value = x.shape[0], None, float("inf")
    for support in range(1, 2**n):
        chosen = torch.tensor([(support >> i) & 1 for i in range(n)], dtype=torch.bool)
        for signs in range(2**n if onto != "simplex" else 1):
            sign = torch.tensor([1.0 if not (signs >> i) & 1 else -1.0 for i in range(n)], dtype=torch.float64)
            if onto == "linf_sphere":
                y = torch.where(chosen, r * sign, x)
                feasible = y.abs().amax() <= r + 1e-12
            else:
                y = torch.zeros_like(x)
                y[chosen] = x[chosen] - sign[chosen] * ((sign * x)[chosen].sum() - r) / chosen.sum()
                feasible = ((sign * y)[chosen] >= -1e-12).all()
            distance = float((y - x).square().sum())
            if feasible and distance < value - 1e-14:
                best, value = y, distance
    assert best is not None
    return best


@pytest.mark.parametrize("onto", ["simplex", "l1_sphere", "linf_sphere"])
@pytest.mark.parametrize("r", [0.3, 1.0, 6.0])
def test_the_nearest_point_is_that_of_an_enumeration(onto, r):
    x = random(2, 6, 4)
    y = lpgd.NodeLayer(lpgd.nodes.Projection(onto, r))(x)
    torch.testing.assert_close(y, torch.stack([faces(onto, row, r) for row in x]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("onto", ["l1_ball", "l2_ball", "linf_ball"])
def test_inside_a_ball_nothing_moves(onto):
    x = 0.1 * random(0, 3, 4)
    x = torch.cat([x, torch.zeros(1, 4, dtype=torch.float64)]).requires_grad_()
    y = lpgd.NodeLayer(lpgd.nodes.Projection(onto, 2.0))(x)
    assert torch.equal(y, x)
    weights = random(1, 4, 4)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert torch.equal(gradient, weights)
    outside = 50 * random(3, 5, 4)
    sphere = lpgd.NodeLayer(lpgd.nodes.Projection(onto.replace("ball", "sphere"), 2.0))(outside)
    torch.testing.assert_close(lpgd.NodeLayer(lpgd.nodes.Projection(onto, 2.0))(outside), sphere)


@pytest.mark.parametrize("onto", get_args(ProjectionSet))
@pytest.mark.parametrize(
    "x", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [2.0, -2.0, 0.0], [1e30, -1e30, 1.0], [1e-30, 0.0, 0.0]]
)
def test_ties_zeros_and_extremes_stay_on_the_set_with_finite_gradients(onto, x):
    x = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(lpgd.nodes.Projection(onto))(x)
    size = y.detach().abs()
    norm = {"l2": size.norm(), "li": size.amax()}.get(onto[:2], size.sum())
    assert float(norm) <= 1 + 1e-12
    if not onto.endswith("ball"):
        assert float(norm) == pytest.approx(1.0, abs=1e-12)
    (gradient,) = torch.autograd.grad((y * torch.tensor([1.0, 2.0, -1.0])).sum(), x)
    assert torch.isfinite(gradient).all()


def test_a_radius_that_is_not_positive_is_invalid_data():
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("l1_ball", None), on_error="nan")
    y = layer(random(0, 2, 3), torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert [status.name for status in y.info.statuses] == ["SOLVED", "INVALID_DATA"]
    assert torch.isnan(y[1]).all()


def test_lpgd_with_a_finite_step_projects_the_shifted_point():
    x, g = random(0, 4, 5).requires_grad_(), random(1, 4, 5)
    node = lpgd.nodes.Projection("l1_sphere", 2.0)
    y = lpgd.NodeLayer(node, lpgd.LPGD(tau=0.7, rho=0.5, envelope="lower"))(x)
    (gradient,) = torch.autograd.grad((y * g).sum(), x)
    shifted = lpgd.NodeLayer(node)((x - 0.7 * g + 0.5 * y).detach() / 1.5)
    torch.testing.assert_close(gradient, (y - shifted).detach() / 0.7)  # ∇_x L = x - y


def test_a_cotangent_whose_sum_overflows_is_no_infinite_one() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    y = lpgd.NodeLayer(lpgd.nodes.Projection("linf_ball"))(x)
    cotangent = torch.full_like(x, 1e308)
    (gradient,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    torch.testing.assert_close(gradient, cotangent, atol=0, rtol=0)
    cotangent[1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"NaN or infinite for elements \[1\]"):
        torch.autograd.grad(y, x, cotangent)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_zeros_inside_an_l1_ball_move_freely_for_every_method(dtype):
    x = torch.tensor([[0.1, 0.0, -0.2, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    v = random(1, 2, 4).to(dtype)
    for method in (None, lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-2)):
        y = lpgd.NodeLayer(lpgd.nodes.Projection("l1_ball"), method)(x)
        (gradient,) = torch.autograd.grad((y * v).sum(), x)
        torch.testing.assert_close(gradient, v, atol=1e-4, rtol=1e-4)  # y = x in a neighbourhood


@pytest.mark.parametrize("radius", [1e-30, 1e30])
@pytest.mark.parametrize("onto", get_args(ProjectionSet))
def test_radii_whose_squares_leave_the_range_of_the_dtype(onto, radius):
    x = (radius * (2 + random(0, 3, 4))).float()  # outside of the balls
    r = torch.full((3,), radius, dtype=torch.float32)
    layer, v = lpgd.NodeLayer(lpgd.nodes.Projection(onto, None)), random(1, 3, 4)
    answers = []
    for scale, dtype in ((1.0, torch.float32), (1.0 / radius, torch.float64)):
        own = tuple((scale * part.to(dtype)).requires_grad_() for part in (x, r))
        y = layer(*own)
        answers.append((y.detach().double() / (scale * radius), *torch.autograd.grad((y * v.to(dtype)).sum(), own)))
    for single, double in zip(*answers, strict=True):  # the gradient does not depend on the unit of length
        torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=1e-5)


def test_masked_scores_are_exact_zeros_of_the_simplex() -> None:
    # An attention mask: what is left out has a score of minus infinity.
    x = torch.tensor([[0.3, -torch.inf, 1.0], [-torch.inf, 5.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    kept = torch.tensor([[0.3, 1.0]], dtype=torch.float64, requires_grad=True)
    alone = lpgd.NodeLayer(lpgd.nodes.Projection("simplex"))(kept)
    (expected,) = torch.autograd.grad((alone * weights[[0, 2]]).sum(), kept)
    y = lpgd.NodeLayer(lpgd.nodes.Projection("simplex"))(x)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(y[0], torch.tensor([0.15, 0.0, 0.85], dtype=torch.float64))  # the closed form
    torch.testing.assert_close(y[1], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(gradient[:1, [0, 2]], expected)
    assert gradient[0, 1] == 0
    assert not gradient[1].any()
    with pytest.raises(lpgd.SolverError, match="element 0 of 1"):  # nothing is left
        lpgd.NodeLayer(lpgd.nodes.Projection("simplex"))(torch.full((1, 3), -torch.inf))


@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD()], ids=["ImplicitKKT", "LPGD"])
@pytest.mark.parametrize("unit", [1e-10, 1e-6, 1.0, 1e6])
def test_a_point_inside_a_ball_is_inside_in_any_unit(unit: float, method: lpgd.GradientMethod) -> None:
    """Outside y = r x / |x|, inside y = x: the radius has the gradient <w, x> / |x|, and none."""
    x = unit * torch.tensor([[0.3, -0.4, 1.2], [0.3, -0.4, 1.2]], dtype=torch.float64)
    radius = (unit * torch.tensor([1.0, 1.5], dtype=torch.float64)).requires_grad_()
    w = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    points = x.clone().requires_grad_()
    y = lpgd.NodeLayer(lpgd.nodes.Projection("l2_ball", radius=None), gradient=method)(points, radius)
    (y * w).sum().backward()
    direction = x[0] / x[0].norm()
    slope = direction @ w
    outside = radius[0].detach() / x[0].norm() * (w - slope * direction)
    torch.testing.assert_close(points.grad, torch.stack([outside, w]), atol=1e-7, rtol=0)
    torch.testing.assert_close(radius.grad, torch.stack([slope, 0 * slope]), atol=1e-7, rtol=0)
