"""What a NodeLayer costs beside its arithmetic, at one small element: ``python -m benchmarks.fixed_cost``.

The node's own functions are timed in the same turns as the layer, so that caches are as cold for both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import lpgd
from lpgd.nodes.base import BaseNode


def cases() -> Iterator[tuple[str, BaseNode, tuple[Tensor, ...]]]:
    """Nodes with small inputs, batch 1."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    symmetric = draw(3, 3)
    symmetric = symmetric + symmetric.mT
    yield "projection, L2 sphere; 4", lpgd.nodes.Projection("l2_sphere"), (draw(4),)
    yield "projection, simplex; 4", lpgd.nodes.Projection("simplex"), (draw(4),)
    yield "eigen decomposition; 3", lpgd.nodes.EigenDecomposition(), (symmetric,)
    yield "principal vector; 3", lpgd.nodes.PrincipalVector(), (symmetric,)
    yield "least squares; 5×3", lpgd.nodes.LeastSquares(), (draw(5, 3), draw(5))


def measure(node: BaseNode, data: tuple[Tensor, ...], calls: int) -> tuple[float, float, float]:
    """Milliseconds, medians: of the node's own solve and vjp, of the layer's forward pass, and of both passes."""
    layer, inputs = lpgd.NodeLayer(node), tuple(datum.clone().requires_grad_() for datum in data)
    weight = torch.ones_like(layer(*inputs))
    times: list[tuple[float, float, float]] = []
    for _ in range(calls + 100):
        started = time.perf_counter()
        with torch.no_grad():
            answer: Any = node.solve(data, None)
            node.vjp(data, answer.y, weight, answer.aux)
        own = time.perf_counter()
        y = layer(*inputs)
        middle = time.perf_counter()
        torch.autograd.grad(y, inputs, weight)
        times.append((own - started, middle - own, time.perf_counter() - own))
    arithmetic, forward, both = (1e3 * statistics.median(column) for column in zip(*times[100:], strict=True))
    return arithmetic, forward, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    print("| node; size, batch 1 | own arithmetic, ms | forward | forward and backward | fixed cost |")
    print("| --- | --- | --- | --- | --- |")
    for name, node, data in cases():
        arithmetic, forward, both = measure(node, data, calls)
        print(f"| {name} | {arithmetic:.3f} | {forward:.3f} | {both:.3f} | {both - arithmetic:.3f} |")


if __name__ == "__main__":
    main()
