"""Robust pooling against one L-BFGS for all channels at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor

from lpgd.layers.node import NodeLayer
from lpgd.nodes.pooling.node import Penalty, RobustPooling

from .harness import Settings
from .nodes_sphere import take_turns
from .results import Target

__all__ = ["run"]

SHAPE, QUICK_SHAPE = (32, 64, 28, 28), (4, 8, 28, 28)


def images(shape: tuple[int, ...]) -> Tensor:
    """Normal noise in float32, and a tenth of outliers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 8.0 * (torch.rand(shape, generator=generator) < 0.1)
    return x.to(torch.float32)  # benchmarks run with double precision as the default


def shared_lbfgs(node: RobustPooling, x: Tensor) -> Tensor:
    """All minimisers together as one vector, from the means, as the authors of declarative networks do it."""
    flat = x.detach().flatten(2).flatten(0, 1)
    y = flat.mean(1).requires_grad_()
    optimiser = torch.optim.LBFGS([y], lr=1, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = node.objective(y, flat).sum()
        value.backward()
        return value

    optimiser.step(closure)  # pyright: ignore[reportArgumentType]
    return y.detach()


def run(settings: Settings) -> Iterator[Target]:
    shape = QUICK_SHAPE if settings.quick else SHAPE
    x = images(shape).requires_grad_()
    flat = x.detach().flatten(2).flatten(0, 1)
    repeats = 1 if settings.quick else 3
    for penalty in get_args(Penalty):
        node = RobustPooling(penalty, dim=(-2, -1))
        layer = NodeLayer(node)
        found: dict[str, Tensor] = {}

        def forward(layer: NodeLayer = layer, found: dict[str, Tensor] = found) -> None:
            found["ours"] = layer(x)

        def backward(found: dict[str, Tensor] = found) -> None:
            torch.autograd.grad(found["ours"].sum(), x, retain_graph=True)

        def theirs(node: RobustPooling = node, found: dict[str, Tensor] = found) -> None:
            found["lbfgs"] = shared_lbfgs(node, x)

        forward()
        seconds = take_turns({"forward": forward, "backward": backward, "lbfgs": theirs}, repeats)
        both = seconds["forward"] + seconds["backward"]
        exact = flat.double()
        values = [node.objective(y.detach().double().reshape(-1), exact) for y in (found["ours"], found["lbfgs"])]
        worse = float(((values[0] - values[1]) / (1.0 + values[1].abs())).max())
        note = (
            f"{seconds['forward']:.3f} + {seconds['backward']:.3f} s against {seconds['lbfgs']:.3f} s with the same "
            f"backward pass; objective above theirs by {worse:.0e} at most, relatively"
        )
        if node.function.is_convex:
            apart = float((found["ours"].detach().reshape(-1) - found["lbfgs"]).abs().max())
            note += f"; values differ by {apart:.0e} at most"
        title = f"robust pooling, {penalty}, {'×'.join(map(str, shape))} float32: shared L-BFGS / ours, both passes"
        yield Target(title, 3.0, None, (seconds["lbfgs"] + seconds["backward"]) / both, note=note)
