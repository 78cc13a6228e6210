"""Robust pooling on very many random sets, each answer judged by the slope of its objective in float64.

``python -m tests.judge_pooling --sets 1000000`` draws so many sets of each penalty, of numbers and of vectors, in
float32 and in float64, and counts those without a solution, and those whose answer is none.  The draws are seeded.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from lpgd.nodes import RobustPooling
from lpgd.nodes.pooling.penalties import Penalty
from lpgd.status import Status

__all__ = ["Count", "draw", "judge"]

SIZES = (32, 48, 64, 100, 128, 200, 256, 384, 512)
"""How many points a set has."""
KINDS = 8
"""Of sets: normal, with outliers, two groups, heavy tails, far from zero, repeated points, wide, narrow."""
PRECISE = 16.0
"""Rounding errors of the slope that an answer may be off by, each of all terms together."""


class Count(NamedTuple):
    """How many sets were drawn, how many of them got no solution, and how many a wrong one."""

    sets: int
    unsolved: int
    wrong: int


def draw(size: int, count: int, dim: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """(size, count, dim) sets of every kind, by turns."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    x = normal(size, count, dim)
    kind = torch.arange(size) % KINDS
    share = 0.4 * uniform(size, 1, 1)
    chosen = uniform(size, count, 1) < share
    x = torch.where((kind == 1)[:, None, None] & chosen, 10 * x, x)
    x = torch.where((kind == 2)[:, None, None] & chosen, x + 4 * normal(size, 1, dim), x)
    heavy = x / uniform(size, count, 1).clamp(min=1e-3)
    x = torch.where((kind == 3)[:, None, None], heavy, x)
    x = torch.where((kind == 4)[:, None, None], x + 1000 * normal(size, 1, dim), x)
    x = torch.where((kind == 5)[:, None, None], (2 * x).round() / 2, x)
    x = torch.where((kind == 6)[:, None, None], 4 * x, x)
    x = torch.where((kind == 7)[:, None, None], 0.05 * x, x)
    return x.to(dtype)


def _is_minimum(node: RobustPooling, x: Tensor, u: Tensor) -> Tensor:
    """(B,) whether the slope at u (B, d) is zero, to rounding in the dtype of x, and no minimum of Welsch's a maximum.

    Each term ``κ₁ (u - x_i)`` is known to a rounding error of ``κ₁ max(|u|, |x_i|)``.
    """
    eps = torch.finfo(x.dtype).eps
    x, u = x.double(), u.double()
    z = u[:, None] - x
    terms = node.function.terms(z.square().sum(-1))
    slope = (terms.first[..., None] * z).sum(1).abs().amax(-1)
    size = torch.maximum(u.abs()[:, None], x.abs()).amax(-1).clamp(min=eps * node.alpha)
    rounding = eps * (terms.first * size).sum(-1)
    # Of a kink at u a term is anything between its one-sided values: those of points at a distance of α.
    alpha = node.alpha
    if not node.function.is_smooth:
        distance = z.norm(dim=-1)
        at_kink = (distance - alpha).abs() <= PRECISE * eps * size
        jump = alpha if node.penalty == "truncated_quadratic" else 0.0
        rounding = rounding + jump * at_kink.sum(-1)
    curved = torch.ones_like(rounding, dtype=torch.bool)
    if node.penalty == "welsch":
        unit = torch.eye(x.shape[-1], dtype=torch.float64)
        total = terms.first.sum(-1)
        hessian = total[:, None, None] * unit + (terms.second[..., None] * z).mT @ z
        # At a minimum that is nearly flat the curvature is that of a point a step of rounding away.
        curved = torch.linalg.eigvalsh(hessian)[:, 0] >= -(eps**0.4) * total
    return (slope <= PRECISE * rounding) & curved


def judge(
    penalty: Penalty, dim: int, dtype: torch.dtype, sets: int, seed: int = 0, rows: int = 2000
) -> Iterator[Count]:
    """Draw and judge so many sets, in batches; the counts up to each of them."""
    generator = torch.Generator().manual_seed(seed)
    total = Count(0, 0, 0)
    alphas = (1.0, 0.5, 2.0)
    for batch in itertools.count():
        left = sets - total.sets
        if left <= 0:
            return
        count, alpha = SIZES[batch % len(SIZES)], alphas[batch // len(SIZES) % len(alphas)]
        node = RobustPooling(penalty, alpha, dim=-2, vector_dim=-1)
        x = draw(min(rows, left), count, dim, dtype, generator)
        answer = node.solve((x,), None)
        solved = torch.tensor([status is Status.SOLVED for status in answer.statuses])
        wrong = solved & ~_is_minimum(node, x, answer.y)
        total = Count(total.sets + len(x), total.unsolved + int((~solved).sum()), total.wrong + int(wrong.sum()))
        yield total


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, and print; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1000, help="of each penalty, dimension and dtype")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--penalties", nargs="*", default=get_args(Penalty), choices=get_args(Penalty))
    parser.add_argument("--dims", nargs="*", type=int, default=(1, 3))
    options = parser.parse_args(arguments)
    failed = 0
    for penalty, dim, dtype in itertools.product(options.penalties, options.dims, (torch.float32, torch.float64)):
        started = told = time.perf_counter()
        name = f"{penalty:>20} of {'numbers' if dim == 1 else f'{dim}-vectors'} in {str(dtype)[6:]}"
        count = Count(0, 0, 0)
        for count in judge(penalty, dim, dtype, options.sets, options.seed):
            if time.perf_counter() - told > 30:
                told = time.perf_counter()
                print(f"{name}: {count} …", flush=True)
        failed += count.unsolved + count.wrong
        print(
            f"{name}: {count.sets} sets, {count.unsolved} unsolved, {count.wrong} wrong "
            f"({time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
