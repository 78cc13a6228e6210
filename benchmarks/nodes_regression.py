"""Least squares against ``torch.linalg.lstsq`` with its autograd, and total variation denoising."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpgd.layers.node import NodeLayer
from lpgd.nodes.least_squares.node import LeastSquares
from lpgd.nodes.total_variation import TotalVariationDenoising

from .harness import Case, Settings, Side, compare
from .nodes_sphere import take_turns
from .results import Curve, Result, Target

__all__ = ["run"]

SIZES = [(64, 50, 10), (64, 200, 50), (16, 500, 200)]
"""Batch, rows, columns."""


def least_squares_case(batch: int, m: int, n: int, shared: bool) -> Case:
    weight = torch.randn(batch, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        A = generator.standard_normal((m, n) if shared else (batch, m, n))
        return torch.from_numpy(A), torch.from_numpy(generator.standard_normal((batch, m)))

    def rows(data: Sequence[Tensor], elements: Sequence[int]) -> list[tuple[Any, Any]]:
        A, b = (part.detach().numpy() for part in data)
        return [(A if shared else A[element], b[element]) for element in elements]

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        residuals = [A @ x - b for (A, b), x in zip(rows(data, elements), points.numpy(), strict=True)]
        return np.array([0.5 * r @ r for r in residuals]), 0.0

    def exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([np.linalg.lstsq(A, b, rcond=None)[0] for A, b in rows(data, elements)]))

    kind = "shared " if shared else ""
    return Case(
        "nodes_regression",
        f"least_squares{m}x{n}{'_shared' if shared else ''}",
        f"least squares, {kind}A {m}×{n}",
        batch,
        draw,
        lambda y: (weight * y).sum(),
        judge,
        # The judge moves rows of the first elements, which a shared matrix does not have.
        None if shared else exactly,
        not shared,
        n,
    )


def by_lstsq(data: Sequence[Tensor]) -> tuple[Tensor, None]:
    A, b = data
    return torch.linalg.lstsq(A.expand(len(b), *A.shape[-2:]), b[..., None]).solution[..., 0], None


def least_squares(settings: Settings) -> Iterator[Result | Target]:
    for batch, m, n in SIZES[:1] if settings.quick else SIZES:
        for shared in (False, True):
            layer = NodeLayer(LeastSquares())
            sides = [
                Side("lpgd", "QR, structured", "exact", lambda data, layer=layer: (layer(*data), None)),
                Side("torch", "lstsq, autograd", "exact", by_lstsq),
            ]
            result = compare(least_squares_case(batch, m, n, shared), sides, settings)
            yield result
            ours, theirs = result.entries
            if ours.usable and theirs.usable:
                title = f"{result.title}, batch {batch}: torch.linalg.lstsq with autograd / ours, both passes"
                note = f"{ours.timing} against {theirs.timing} s; gradients agree with cosine {ours.accuracy.cosine}"
                yield Target(title, 1.0, None, theirs.timing.total / ours.timing.total, note=note)


def signals(count: int) -> dict[str, Tensor]:
    generator = np.random.default_rng(0)
    noise = generator.standard_normal(count)
    return {
        "steps with noise": torch.from_numpy(np.sign(np.sin(np.arange(count) / 500)) + 0.3 * noise),
        "random walk": torch.from_numpy(np.cumsum(noise)),
        "ramp": torch.arange(count, dtype=torch.float64) / 1000,
    }


def denoising(settings: Settings) -> Iterator[Target | Curve]:
    curve = Curve("nodes_total_variation", "total variation denoising, steps with noise", "points", "seconds")
    node = TotalVariationDenoising()
    repeats = 1 if settings.quick else 5
    for count in (1000,) if settings.quick else (1000, 10_000, 100_000):
        slowest, backward, case = 0.0, 0.0, ""
        for name, signal in signals(count).items():
            for weight in (0.1, 1.0, 10.0, 1000.0):
                inputs = signal[None], torch.tensor([weight], dtype=torch.float64)
                answer = node.solve(inputs, None)
                ones = torch.ones_like(answer.y)
                seconds = take_turns(
                    {
                        "forward": lambda inputs=inputs: node.solve(inputs, None),
                        "backward": lambda i=inputs, a=answer, v=ones: node.vjp(i, a.y, v, a.aux),
                    },
                    repeats,
                    time.thread_time,  # it runs in one thread: what other programs do at the time does not count
                )
                backward = max(backward, seconds["backward"])
                if seconds["forward"] > slowest:
                    slowest, case = seconds["forward"], f"{name}, λ = {weight:g}"
                if name == "steps with noise" and weight == 1.0:
                    curve.add("forward", count, seconds["forward"])
                    curve.add("backward", count, seconds["backward"])
        note = f"the slowest of {len(signals(1))} signals and 4 weights: {case}; backward {backward:.4f} s at most"
        limit = 0.2 * max(count, 1000) / 1e5
        title = f"total variation denoising, {count} points, seconds of one core"
        yield Target(title, limit, limit / 4, slowest, smaller=True, note=note)
    yield curve


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    yield from least_squares(settings)
    yield from denoising(settings)
