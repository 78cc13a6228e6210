"""Entropic optimal transport: our node against autograd through Sinkhorn's iterations, and against POT."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpgd.gradients import LPGD, ImplicitKKT
from lpgd.layers.node import NodeLayer
from lpgd.problems.node import NodeAnswer
from lpgd.solvers.nodes.transport import OptimalTransport, sinkhorn
from lpgd.status import Status

from .harness import Case, Settings, Side, compare, installed, peak_memory
from .results import Curve, Entry, Result, Target

__all__ = ["run"]

GAMMA = 200.0
"""Where a hundred iterations are about what convergence takes."""
ITERATIONS = 100


def transport_case(size: int, gamma: float = GAMMA) -> Case:
    """One uniform cost in [0, 1], marginals from a softmax, and a linear loss."""
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((1, size, size)))
    node = OptimalTransport(gamma=gamma)

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        cost, rows, columns = (torch.from_numpy(generator.uniform(size=(1, size, k))) for k in (size, 1, 1))
        return cost, rows[..., 0].softmax(-1), columns[..., 0].softmax(-1)

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        violation = node.equality(points, *data)
        return node.objective(points, *data).numpy(), float(violation.abs().max() * size)  # relative to a marginal

    def loss(plan: Tensor) -> Tensor:
        return (weight * plan).sum()

    title = f"entropic transport, {size}×{size}"
    return Case("nodes_transport", f"transport{size}", title, 1, draw, loss, judge, None, False, size * size)


def unrolled(data: Sequence[Tensor], iterations: int = ITERATIONS) -> tuple[Tensor, Any]:
    """Sinkhorn on potentials, for autograd."""
    cost, rows, columns = data
    log_rows, log_columns, scaled = rows.log(), columns.log(), GAMMA * cost
    g = torch.zeros_like(columns)
    f = torch.zeros_like(rows)
    for _ in range(iterations):
        f = -torch.logsumexp((log_columns + g)[:, None, :] - scaled, -1)
        g = -torch.logsumexp((log_rows + f)[:, :, None] - scaled, -2)
    return ((log_rows + f)[:, :, None] + (log_columns + g)[:, None, :] - scaled).exp(), None


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
        pot_side("sinkhorn_log"),
        pot_side("sinkhorn"),
    ]


def _backward(entry: Entry | None) -> float | None:
    return statistics.median(entry.timing.backward) if entry is not None and entry.usable else None


def _find(result: Result, library: str, mode: str) -> Entry | None:
    return next((entry for entry in result.entries if entry.library == library and mode in entry.mode), None)


def sizes(settings: Settings) -> Iterator[Result | Target | Curve]:
    curve = Curve("nodes_transport", "entropic transport: backward pass", "rows and columns", "seconds")
    for size in (20, 50) if settings.quick else (100, 200, 500, 1000):
        result = compare(transport_case(size), sides() if size <= 500 else sides()[:2], settings)
        yield result
        for entry in result.entries:
            curve.add(entry.label, size, _backward(entry))
        ours, theirs = _backward(_find(result, "lpgd", "structured")), _backward(_find(result, "torch", "unrolled"))
        if size == 500 and ours and theirs:
            note = f"{ours:.4f} s and {theirs:.4f} s"
            pot = _backward(_find(result, "POT", "sinkhorn_log"))
            note += "" if pot is None else f"; POT in the log domain {pot:.4f} s"
            title = f"transport {size}×{size}, {ITERATIONS} iterations: unrolled backward / structured"
            yield Target(title, 5.0, None, theirs / ours, note=note)
    yield curve


def generic(settings: Settings) -> Iterator[Result]:
    """Against implicit differentiation of the optimality conditions, whose matrix has a row for each entry of P."""
    size, gamma = 10 if settings.quick else 30, 10.0
    node = OptimalTransport(gamma=gamma)
    chosen = [
        node_side("structured", "exact", NodeLayer(node)),
        node_side("implicit, generic", "exact", NodeLayer(node, ImplicitKKT())),
    ]
    yield compare(transport_case(size, gamma), chosen, settings)


def _growth(size: int, iterations: int, structured: bool) -> float | None:
    """MiB, of one forward and backward pass after a small one, in a process of its own."""
    layer = NodeLayer(FixedIterations(gamma=GAMMA, iterations=iterations))
    for own in (10, size):
        case = transport_case(own)
        inputs = [part.requires_grad_() for part in case.draw(0)]
        with peak_memory() as growth:
            case.loss(layer(*inputs) if structured else unrolled(inputs, iterations)[0]).backward()
    return growth[0] if growth else None


def memory(settings: Settings) -> Iterator[Result | Target | Curve]:
    size = 100 if settings.quick else 500
    curve = Curve("nodes_transport_memory", f"entropic transport, {size}×{size}: memory", "iterations", "MiB")
    for iterations in (10, 30) if settings.quick else (10, 30, 100, 300):
        for line, structured in (("lpgd, structured", True), ("torch, unrolled", False)):
            grown = []  # the median: what the allocator keeps varies from process to process
            for _ in range(settings.repeats):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                    grown.append(executor.submit(_growth, size, iterations, structured).result())
            found = [value for value in grown if value is not None]
            curve.add(line, iterations, statistics.median(found) if found else None)
    yield curve
    ours, theirs = (
        [value for _, value in curve.lines.get(side, [])] for side in ("lpgd, structured", "torch, unrolled")
    )
    if ours and theirs:
        note = f"MiB: ours {', '.join(f'{v:.0f}' for v in ours)}; unrolled {', '.join(f'{v:.0f}' for v in theirs)}"
        # Newton steps take a workspace of a few plans once; unrolled, every iteration keeps some.
        more = (ours[-1] - ours[0]) / (curve.lines["lpgd, structured"][-1][0] - curve.lines["lpgd, structured"][0][0])
        title = f"transport {size}×{size}: memory of one more iteration / that of a plan"
        yield Target(title, 0.1, None, more * 2**20 / (8 * size**2), smaller=True, note=note)


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    yield from sizes(settings)
    yield from generic(settings)
    yield from memory(settings)
