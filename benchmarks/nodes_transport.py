"""Entropic optimal transport: our node against autograd through Sinkhorn's iterations, and against POT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpgd.gradients import LPGD
from lpgd.layers.node import NodeLayer
from lpgd.nodes.base import NodeAnswer
from lpgd.nodes.transport.node import OptimalTransport, sinkhorn
from lpgd.status import Status

from .harness import Case, Settings, Side, compare, installed
from .memory import growth, measuring_process
from .node_table import transport
from .results import Curve, Result, Target
from .unrolled import scaled_kernels

__all__ = ["run"]

GAMMA = 200.0
"""Where a hundred iterations are about what convergence takes."""
ITERATIONS = 100
POT_METHODS = ("sinkhorn_log", "sinkhorn")


def transport_case(size: int, gamma: float = GAMMA) -> Case:
    """One uniform cost in [0, 1], marginals from a softmax, and a linear loss."""
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((1, size, size)))
    node = OptimalTransport(gamma=gamma)

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        violation = node.equality(points, *data)
        return node.objective(points, *data).numpy(), float(violation.abs().max() * size)  # relative to a marginal

    def loss(plan: Tensor) -> Tensor:
        return (weight * plan).sum()

    title = f"entropic transport, {size}×{size}"
    return Case(
        "nodes_transport", f"transport{size}", title, 1, partial(transport, size), loss, judge, None, False, size * size
    )


def unrolled(data: Sequence[Tensor], iterations: int = ITERATIONS) -> tuple[Tensor, None]:
    return scaled_kernels(data, GAMMA, iterations), None


@dataclass(frozen=True)
class FixedIterations(OptimalTransport):
    """All iterations are done, and count as enough."""

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        found = sinkhorn(*inputs, self.gamma, tolerance=0.0, iterations=self.iterations)
        return NodeAnswer(found.plan, [Status.SOLVED] * len(found.plan), found.iterations)


def node_side(mode: str, kind: str, layer: NodeLayer) -> Side:
    return Side("lpgd", mode, kind, lambda data: (layer(*data), None))


def pot_side(method: str) -> Side:
    if not installed("ot"):
        return Side("POT", method, "exact", None, missing="not installed: pip install POT")

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        import ot

        cost, rows, columns = (part[0] for part in data)
        plan = ot.sinkhorn(
            rows, columns, cost, 1.0 / GAMMA, method=method, numItermax=ITERATIONS, stopThr=1e-11, warn=False
        )
        return plan[None], None

    return Side("POT", f"{method}, autograd", "exact", call)


def sides() -> list[Side]:
    node = OptimalTransport(gamma=GAMMA)
    return [
        node_side("structured", "exact", NodeLayer(node)),
        node_side("LPGD", "lpgd", NodeLayer(node, LPGD(tau=1e-3))),
        Side("torch", f"{ITERATIONS} iterations unrolled", "exact", unrolled),
        *map(pot_side, POT_METHODS),
    ]


def sizes(settings: Settings) -> Iterator[Result | Target | Curve]:
    curve = Curve("nodes_transport", "entropic transport: backward pass", "rows and columns", "seconds")
    for size in (20, 50) if settings.quick else (100, 200, 500, 1000):
        result = compare(transport_case(size), sides() if size <= 500 else sides()[:2], settings)
        yield result
        for entry in result.entries:
            curve.add(entry.label, size, entry.backward)
        ours, theirs = result.backward("lpgd", "structured"), result.backward("torch", "unrolled")
        if size == 500 and ours and theirs:
            note = f"{ours:.4f} s and {theirs:.4f} s"
            for method in POT_METHODS:
                pot = result.backward("POT", f"{method},")
                note += "" if pot is None else f"; POT's {method} {pot:.4f} s"
            title = f"transport {size}×{size}, {ITERATIONS} iterations: unrolled backward / structured"
            yield Target(title, 5.0, None, theirs / ours, note=note)
    yield curve


def peak(size: int, iterations: int, structured: bool) -> float | None:
    """MiB of one forward and one backward pass with so many iterations; called in a process of its own."""
    layer = NodeLayer(FixedIterations(gamma=GAMMA, iterations=iterations))
    case = transport_case(size)

    def both_passes() -> None:
        inputs = [part.requires_grad_() for part in case.draw(0)]
        case.loss(layer(*inputs) if structured else unrolled(inputs, iterations)[0]).backward()

    return growth(both_passes)


def memory(settings: Settings) -> Iterator[Target | Curve]:
    size = 100 if settings.quick else 500
    curve = Curve("nodes_transport_memory", f"entropic transport, {size}×{size}: memory", "iterations", "MiB")
    counts = (10, 40) if settings.quick else (10, 30, 100, 300)  # Newton steps begin after 30
    with measuring_process() as ask:
        for iterations in counts:
            for line, structured in (("lpgd, structured", True), ("torch, unrolled", False)):
                curve.add(line, iterations, ask(peak, size, iterations, structured))
    yield curve
    ours, theirs = (
        [value for _, value in curve.lines.get(side, [])] for side in ("lpgd, structured", "torch, unrolled")
    )
    title = f"transport {size}×{size}: peak memory with {counts[-1]} iterations / with {counts[0]}"
    if not (ours and theirs):
        yield Target(title, 1.2, None, None, smaller=True, note="the system does not say what a process takes")
        return
    note = (
        f"unrolled {theirs[-1] / theirs[0]:.0f}; with {', '.join(map(str, counts))} iterations ours takes "
        f"{', '.join(f'{v:.1f}' for v in ours)} MiB, unrolled {', '.join(f'{v:.0f}' for v in theirs)} MiB; a plan is "
        f"{8 * size**2 / 2**20:.1f} MiB"
    )
    yield Target(title, 1.2, None, ours[-1] / ours[0], smaller=True, note=note)


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    yield from sizes(settings)
    yield from memory(settings)
