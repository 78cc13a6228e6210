"""Robust pooling of numbers where it is hard: many modes, kinks finer than digits, flat parts, large batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes.pooling.descent import BLOCK
from lpgd.nodes.pooling.penalties import Penalty, PenaltyFunction
from tests.judge_pooling import judge
from tests.node_cases import random
from tests.test_pooling_and_projection import penalty_of


def groups(rows: int, count: int = 40, seed: int = 0) -> Tensor:
    """Rows of numbers in one to three groups of random places, widths and sizes."""
    generator = torch.Generator().manual_seed(seed)
    place = 4 * torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    width = 0.1 + torch.rand(rows, 3, generator=generator, dtype=torch.float64)
    last = torch.randint(3, (rows, 1), generator=generator)
    group = torch.randint(3, (rows, count), generator=generator).minimum(last)
    noise = torch.randn(rows, count, generator=generator, dtype=torch.float64)
    return place.gather(1, group) + width.gather(1, group) * noise


@pytest.mark.parametrize(("alpha", "sure"), [(0.3, False), (1.0, True), (2.5, True)])
def test_welsch_is_no_worse_than_walks_downhill_from_mean_and_median(alpha: float, sure: bool):
    """Where α is less than the width of a group, a Newton step can leave a walk's valley, mostly for a better one."""
    x = groups(100)
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling("welsch", alpha))(x)

    def height(u: Tensor) -> Tensor:
        return -torch.expm1(-0.5 * ((u[..., None] - x[:, None]) / alpha) ** 2).sum(-1)

    grid = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    heights = torch.cat([height(part.expand(len(x), -1)) for part in grid.split(250)], -1)
    best = torch.full((len(x),), torch.inf, dtype=torch.float64)
    for start in (x.mean(-1), x.median(-1).values):
        place, moved = ((start + 20) / 0.01).round().long(), True
        while moved:  # from neighbour to neighbour
            around = (place[:, None] + torch.tensor([-1, 0, 1])).clamp(0, len(grid) - 1)
            to = around.gather(1, heights.gather(1, around).argmin(-1, keepdim=True))[:, 0]
            moved, place = not torch.equal(to, place), to
        best = best.minimum(heights.gather(1, place[:, None])[:, 0])
    ours = height(y[:, None])[:, 0]
    assert ours.mean() <= best.mean()
    assert not sure or (ours <= best + 1e-12).all()


HARD: dict[str, Callable[[], Tensor]] = {
    "two groups": lambda: torch.where(random(0, 40, 101) < 0, -10.0, 10.0) + 0.1 * random(1, 40, 101),
    "far outliers": lambda: random(2, 40, 101) + 1e3 * (random(3, 40, 101) > 0.8),
    "heavy tails": lambda: (6 * random(4, 40, 101)).exp(),
    "far from zero": lambda: 1e4 + random(5, 40, 101),
    "narrow": lambda: 5 + 1e-4 * random(6, 40, 101),
    "few": lambda: 10 * random(7, 40, 3),
    "one": lambda: random(8, 40, 1),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("penalty", ["pseudo_huber", "huber"])
@pytest.mark.parametrize("case", HARD)
def test_the_slope_changes_its_sign_at_the_minimiser_of_a_convex_penalty(
    case: str, penalty: Penalty, alpha: float, dtype: torch.dtype
):
    x = HARD[case]().to(dtype)
    solution = lpgd.NodeLayer(lpgd.nodes.RobustPooling(penalty, alpha)).solve(x)
    assert {status.name for status in solution.statuses} == {"SOLVED"}
    u, x = solution.x.double(), x.double()
    reach = torch.finfo(dtype).eps * (8 * u.abs() + 30 * alpha)

    def slope(u: Tensor) -> Tensor:
        z = u - x
        return (z.clamp(-alpha, alpha) if penalty == "huber" else z / (1 + (z / alpha) ** 2).sqrt()).sum(-1)

    assert (slope(u - reach) <= 1e-9 * alpha).all()
    assert (slope(u + reach) >= -1e-9 * alpha).all()


def test_truncated_quadratics_of_equal_numbers_are_solved_exactly():
    # Whole numbers, of which many are equal, and windows that end exactly on some.
    x = (3 * random(0, 60, 8)).round()
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling("truncated_quadratic", alpha=1.5))(x)
    ordered = x.sort(-1).values
    means = torch.stack([ordered[:, i:j].mean(-1) for i in range(8) for j in range(i + 1, 9)], -1)
    best = penalty_of("truncated_quadratic", means[..., None] - x[:, None], 1.5).sum(-1).amin(-1)
    torch.testing.assert_close(penalty_of("truncated_quadratic", y[:, None] - x, 1.5).sum(-1), best)


@pytest.mark.parametrize("penalty", get_args(Penalty))
def test_blocks_of_a_large_batch_are_its_parts(penalty: Penalty):
    x = random(0, 70, BLOCK // 32) + 8.0 * (random(1, 70, BLOCK // 32) > 1.3)
    layer = lpgd.NodeLayer(lpgd.nodes.RobustPooling(penalty))
    x.requires_grad_()
    weights = random(2, 70)
    whole = layer(x)
    (gradient,) = torch.autograd.grad((whole * weights).sum(), x)
    for rows in (slice(0, 20), slice(20, 70)):
        part = layer(x[rows])
        torch.testing.assert_close(part, whole[rows], atol=1e-12, rtol=1e-12)
        (own,) = torch.autograd.grad((part * weights[rows]).sum(), x)
        torch.testing.assert_close(own[rows], gradient[rows], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("penalty", get_args(Penalty))
@pytest.mark.parametrize("shape", [(3, 9), (3, 9, 2)])
def test_the_formula_of_the_gradient_can_be_differentiated(penalty: Penalty, shape: tuple[int, ...]):
    node = lpgd.nodes.RobustPooling(penalty, 1.5, dim=1, vector_dim=None if len(shape) == 2 else 2)
    x = random(0, *shape)
    y, v = x.mean(1) + 0.1, random(1, *x.mean(1).shape)

    def formula(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        gradient = node.differentiable_vjp((x,), y, v)[0]
        assert gradient is not None
        return gradient

    inputs = tuple(part.requires_grad_() for part in (x, y, v))
    assert torch.autograd.gradcheck(formula, inputs)
    with torch.no_grad():
        alone = formula(*inputs)
    torch.testing.assert_close(alone, formula(*inputs))


def test_a_sum_that_overflows_is_no_sign_of_invalid_data():
    x = torch.tensor([[3e38, 3e38, 3e38], [1.0, 2.0, 3.0], [1.0, torch.nan, 0.0], [torch.inf, -torch.inf, 0.0]])
    y = lpgd.NodeLayer(lpgd.nodes.RobustPooling("truncated_quadratic"), on_error="nan")(x)
    assert [status.name for status in y.info.statuses] == ["SOLVED", "SOLVED", "INVALID_DATA", "INVALID_DATA"]
    assert torch.isfinite(y[1])


def test_a_batch_of_copies_starts_from_the_rows_of_a_solution():
    x = groups(6)
    layer = lpgd.NodeLayer(lpgd.nodes.RobustPooling("huber"))
    solution = layer.solve(x)
    assert len(solution.states) == 6
    assert torch.equal(torch.stack([*solution.states]), solution.x)
    assert torch.equal(torch.stack(list(solution.select(torch.tensor([4, 1])).states)), solution.x[[4, 1]])
    again = layer.solver.solve(layer.solve(x.repeat(2, 1)).problem, solution.states)
    torch.testing.assert_close(again.x, solution.x.repeat(2, 1))
    assert again.iterations.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("penalty", get_args(Penalty))
def test_random_sets_of_every_kind_are_solved(penalty: Penalty, dim: int, dtype: torch.dtype):
    """A quick form of ``python -m tests.judge_pooling --sets 1000000``."""
    *_, count = judge(penalty, dim, dtype, sets=1800, seed=1, rows=200)
    assert count == (1800, 0, 0)


@pytest.mark.parametrize("vectors", [False, True])
def test_a_maximum_by_symmetry_is_no_end(vectors: bool):
    """Mean and median are a local maximum of Welsch's sum, where its slope is zero."""
    x = torch.tensor([[-2.0, -2.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
    points = torch.stack([x, 0 * x], -1) if vectors else x
    node = lpgd.nodes.RobustPooling("welsch", dim=1, vector_dim=2 if vectors else None)
    solution = lpgd.NodeLayer(node).solve(points)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)[:, None]
    least = (-torch.expm1(-0.5 * (grid - x) ** 2)).sum(-1).min()
    torch.testing.assert_close(solution.objective[0], least, atol=1e-7, rtol=0)


def test_differences_of_penalties_keep_the_digits_that_values_lose():
    square, change = torch.rand(2, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for penalty in get_args(Penalty):
        function = PenaltyFunction(penalty, 0.7)
        for size in (1.0, 1e-12):
            exact = function.terms(square).first * (0.5 * size * change)  # the derivative in the square, times two
            found = function.difference(square, size * change)
            if size == 1.0:
                exact = function.value(square + change) - function.value(square)
            near = (square - 0.49).abs() > 1e-9  # no kink
            torch.testing.assert_close(found[near], exact[near], atol=0 if size < 1 else 1e-15, rtol=1e-9)
