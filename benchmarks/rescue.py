"""The rescue chain: what it costs where nothing is to be rescued, and how often each solver needs it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lpgd

from .dense_qp import draw_qps
from .harness import Case, Settings, compare
from .ours import layer_side, solver_names
from .results import Result, Target

__all__ = ["run"]


def run(settings: Settings) -> Iterator[Result | Target]:
    yield from price(settings)
    yield from frequency(settings)


def price(settings: Settings) -> Iterator[Result | Target]:
    """Healthy batches with new matrices in each call, with the chain and without it."""
    n, batch = (10, 16) if settings.quick else (50, 64)

    def draw(seed: int) -> tuple[Tensor, ...]:
        return draw_qps(n, batch, seed)

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        return np.zeros(len(elements)), 0.0  # the layer has checked the residuals

    for name in solver_names(("DAQP", "CLARABEL")):
        solver = next(kind for kind in lpgd.solvers.SOLVERS if kind.name == name)()
        sides = []
        for rescue in (True, False):
            layer = lpgd.QPLayer(replace(solver, rescue=rescue))
            side = layer_side(layer, "exact", lambda d: ((), dict(zip("PqAbGh", d, strict=True))), True)
            sides.append(side._replace(mode=f"{side.mode}, rescue={rescue}"))
        case = Case(
            "rescue", f"price_{name.lower()}", f"{name}, dense QP n {n}", batch, draw,
            lambda x: x.square().sum(), judge, None, False, n,
        )  # fmt: skip
        result = compare(case, sides, settings)
        yield result
        found = [statistics.median(entry.timing.forward) for entry in result.entries if entry.usable]
        if len(found) == 2:
            yield Target(f"{case.title}, batch {batch}: with the chain / without", 1.05, 1.0, found[0] / found[1], True)


def frequency(settings: Settings) -> Iterator[Target]:
    """Graph Laplacians over the simplex, whose P is singular: elements that a solver leaves to others."""
    count, n, rng = (50 if settings.quick else 1000), 12, np.random.default_rng(0)
    weights = np.triu(rng.random((count, n, n)) * (rng.random((count, n, n)) < 0.6), 1)
    weights += weights.transpose(0, 2, 1)
    P = torch.from_numpy(np.stack([np.diag(own.sum(1)) - own for own in weights]))
    zeros, ones = torch.zeros(n, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)
    for name in solver_names(
        ("DAQP", "CLARABEL", "INTERIOR", "HIGHS", "PIQP", "OSQP", "PROXQP", "SCS", "MOREAU", "ECOS")
    ):
        output = lpgd.solve_qp(P, zeros, A=ones, b=ones[0, :1], lb=zeros, solver=name, on_error="nan")
        unsolved = len(output.info.solution.failed)
        note = f"without an answer: {unsolved}; by others: {output.info.solution.rescued}"
        share = sum(output.info.solution.rescued.values()) / count
        yield Target(f"{name}, {count} Laplacians over the simplex: share rescued", None, None, share, True, note)
