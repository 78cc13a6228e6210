"""Tables 1 and 4 of PMaF: the published descents of LESS on its own 1000 random problems, beside SciPy's SLSQP.

``python -m benchmarks.less`` prints both tables (a minute each for 2×2 and 64×32; 1024×256 takes an hour of SLSQP's).

The problems are the paper's: element k is ``torch.manual_seed(k)``, then A and b in float32 from a standard normal
distribution.  Its rules, too: an element fails where 100 iterations do not end it, and counts as better than SciPy's
where its objective is lower, or differs by less than a unit of the sixth digit.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from lpgd.nodes.base import NodeAnswer
from lpgd.nodes.sphere.descent import least_squares
from lpgd.nodes.sphere.less import LessDescent
from lpgd.nodes.sphere.node import SphereLeastSquares
from lpgd.nodes.sphere.secular import normalised
from lpgd.status import Status

__all__ = ["VARIANTS", "Row", "by_slsqp", "objective", "problems", "rows"]

VARIANTS = {
    "PGD": LessDescent(tangent=False, search="none"),
    "PGD+DW": LessDescent(tangent=False, search="none", weighted=True),
    "PGD+RM, step 1": LessDescent(search="none", step=1.0),
    "PGD+RM": LessDescent(search="none"),
    "PGD+RM+BLSOne": LessDescent(search="backtracking", step=1.0),
    "PGD+RM+BLSOne+DW": LessDescent(search="backtracking", step=1.0, weighted=True),
    "PGD+RM+BLS": LessDescent(search="backtracking"),
    "PGD+RM+BLS+DW": LessDescent(search="backtracking", weighted=True),
    "PGD+RM+TWD": LessDescent(search="tangent"),
    "PGD+RM+TWD+DW": LessDescent(search="tangent", weighted=True),
}
"""The methods by the paper's names."""
SIZES = {"2x2": (2, 2), "64x32": (64, 32), "1024x256": (1024, 256)}
DIGITS = 6
WITHIN = 1e-6
"""Objectives this near, relative to 1 + objective, are those of the same minimum."""


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        name: of the method.
        failed_inside, failed_outside: not ended after 100 iterations, where A⁺b lies inside the sphere, or outside.
        inside, outside: how many problems there are of both kinds.
        better: objectives not above SciPy's, by the paper's rule.
        global_minima: objectives that are those of the global minimum.
        gap: mean of ``(f - f_SciPy)/f_SciPy``.
    """

    name: str
    failed_inside: int
    failed_outside: int
    inside: int
    outside: int
    better: int
    global_minima: int
    gap: float


def problems(m: int, n: int, count: int = 1000) -> tuple[Tensor, Tensor]:
    """A (count, m, n) and b (count, m) in float64, drawn as by the paper's authors."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        pairs.append((torch.randn(m, n, generator=generator), torch.randn(m, 1, generator=generator)[:, 0]))
    matrices, vectors = zip(*pairs, strict=True)
    return torch.stack(matrices).double(), torch.stack(vectors).double()


def objective(A: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return 0.5 * ((A @ u[..., None])[..., 0] - b).square().sum(-1)


def by_slsqp(A: Tensor, b: Tensor, start: Tensor, **options: float) -> Tensor:
    """SciPy's SLSQP from the same starts, scaled to length 1: (B, n)."""
    found = []
    for matrix, right, first in zip(A.numpy(), b.numpy(), start.numpy(), strict=True):
        answer = scipy.optimize.minimize(
            lambda u, A=matrix, b=right: 0.5 * np.sum((A @ u - b) ** 2),
            first,
            jac=lambda u, A=matrix, b=right: A.T @ (A @ u - b),
            constraints={"type": "eq", "fun": lambda u: u @ u - 1.0, "jac": lambda u: 2.0 * u},
            method="SLSQP",
            options=options,
        )
        found.append(answer.x / np.linalg.norm(answer.x))
    return torch.from_numpy(np.stack(found))


def rows(m: int, n: int, count: int = 1000, dtype: torch.dtype = torch.float64) -> Iterator[Row]:
    """The lines of the table for problems of one size, and SciPy's own; methods and objectives in a dtype."""
    A, b = problems(m, n, count)
    own = (A.to(dtype), b.to(dtype))
    free = least_squares(A, b)
    inside = free.norm(dim=-1) < 1.0
    best = objective(A, b, SphereLeastSquares().solve((A, b), None).y)

    def worth(u: Tensor) -> Tensor:
        return objective(*own, u.to(dtype)).double()

    theirs = worth(by_slsqp(A, b, normalised(free)))
    unit = 10.0 ** ((theirs.log10() + 1.0).floor() - DIGITS)  # of the sixth digit

    def row(name: str, value: Tensor, answer: NodeAnswer | None) -> Row:
        statuses = (Status.SOLVED,) * count if answer is None else answer.statuses
        failed = torch.tensor([status is not Status.SOLVED for status in statuses])
        return Row(
            name,
            int((failed & inside).sum()),
            int((failed & ~inside).sum()),
            int(inside.sum()),
            int((~inside).sum()),
            int(((value < theirs) | ((value - theirs).abs() < unit)).sum()),
            int((value <= best + WITHIN * (1.0 + best)).sum()),
            float(((value - theirs) / theirs).mean()),
        )

    for name, method in VARIANTS.items():
        answer = SphereLeastSquares(method).solve(own, None)
        yield row(name, worth(answer.y), answer)
    answer = SphereLeastSquares("descent").solve((A, b), None)
    yield row("this library's descent", objective(A, b, answer.y), answer)
    yield row("secular equation", best, None)
    yield row("SciPy SLSQP", theirs, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["2x2", "64x32"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--float32", action="store_true", help="as the paper's authors")
    options = parser.parse_args()
    for size in options.sizes:
        print(f"\n{options.count} problems {size}")
        print(f"{'':24} {'failed inside':>14} {'failed outside':>15} {'better':>7} {'global':>7} {'mean gap':>9}")
        for row in rows(*SIZES[size], options.count, torch.float32 if options.float32 else torch.float64):
            failed = (f"{row.failed_inside}/{row.inside}", f"{row.failed_outside}/{row.outside}")
            print(
                f"{row.name:24} {failed[0]:>14} {failed[1]:>15} {row.better:>7} {row.global_minima:>7} {row.gap:>8.2%}"
            )


if __name__ == "__main__":
    main()
