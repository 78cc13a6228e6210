"""The network from terrain images to cell costs, and what each method trains it with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lpgd
from lpgd.gradients import GradientMethod

from .grid import GridPaths

__all__ = [
    "EXACT_TAU",
    "LEAST_COST",
    "METHODS",
    "CellNetwork",
    "PathModel",
    "cell_costs",
    "gradient_method",
    "hamming_distance",
]

# How the network is trained, by the name on the command line, with the name in plots.
METHODS = {
    "lower": "LPGD lower (blackbox backpropagation)",
    "average": "LPGD average",
    "upper": "LPGD upper",
    "exact": "exact gradient (zero)",
    "costs": "two-stage: regress the costs",
    "cells": "two-stage: classify path cells",
}
LEAST_COST = 1.0  # of every cell: a perturbation of at most that much leaves costs that Dijkstra can take
EXACT_TAU = 1e-12  # no path changes for so little, and so this gradient is what the exact one is: zero
_START = 3.0  # of the last layer, so that costs start above their least


class CellNetwork(nn.Module):
    """(B, 3, 8 · height, 8 · width) images to (B, height, width) numbers, one for each cell.

    Three convolutions of stride 2, group normalisation after each, and a 1 × 1 convolution.

    Args:
        channels: of the first convolution, a multiple of 4; the others have twice as many.
        seed: of the weights.
    """

    def __init__(self, channels: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for inputs, outputs, kernel in (
                (3, channels, 5),
                (channels, 2 * channels, 3),
                (2 * channels, 2 * channels, 3),
            ):
                layers += [nn.Conv2d(inputs, outputs, kernel, 2, kernel // 2), nn.GroupNorm(4, outputs), nn.ReLU()]
            last = nn.Conv2d(2 * channels, 1, 1)
        nn.init.constant_(last.get_parameter("bias"), _START)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images - 0.5).squeeze(1)


def cell_costs(method: str, outputs: Tensor) -> Tensor:
    """The network's outputs as costs that Dijkstra can take, of at least ``LEAST_COST``, or 0 for ``"cells"``.

    A network that classifies cells has outputs log p/(1 - p), p the chance that a cell is on the path; its costs are
    -log p.  For all others they are ``LEAST_COST + |output|``.
    """
    return nn.functional.softplus(-outputs) if method == "cells" else LEAST_COST + outputs.abs()


def hamming_distance(answers: Tensor, paths: Tensor) -> Tensor:
    """(B, height, width) indicators to (B,): in how many cells they differ; linear in the answers."""
    return (answers * (1 - paths) + (1 - answers) * paths).sum((-2, -1))


def gradient_method(method: str, tau: float) -> GradientMethod:
    """The gradient method of a name in ``METHODS``; the two-stage methods and ``"exact"`` have no use for tau.

    Raises:
        ValueError: there is no such method, or perturbed costs could become negative.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if not 0 < tau <= LEAST_COST:
        raise ValueError(f"tau is {tau}; it must be positive and at most {LEAST_COST:g}, the least cost of a cell.")
    if method in ("average", "upper"):
        return lpgd.LPGD(tau, envelope=method)
    return lpgd.BlackboxBackprop(tau if method == "lower" else EXACT_TAU)


class PathModel(nn.Module):
    """Images to cheapest paths, and the loss that a method minimises.

    The methods of LPGD minimise the Hamming distance of Dijkstra's answer to the path, summed over the batch: its
    gradient is +1 where the path is not and -1 where it is, so tau is by how much a cell's cost is perturbed. The
    two-stage methods solve nothing in training: ``"costs"`` minimises the mean squared error to the true costs, which
    only it is told, and ``"cells"`` the cross-entropy of the path's cells.

    Args:
        method: a name in ``METHODS``.
        height, width: of the maps, in cells.
        tau: of LPGD, at most ``LEAST_COST``.
        channels, seed: of the :class:`CellNetwork`.
    """

    def __init__(self, method: str, height: int, width: int, tau: float, channels: int, seed: int) -> None:
        super().__init__()
        self.method = method
        self.network = CellNetwork(channels, seed)
        self.layer = lpgd.BlackboxLayer(GridPaths(height, width), gradient_method(method, tau), ndim=2)

    @property
    def two_stage(self) -> bool:
        return self.method in ("costs", "cells")

    def costs(self, images: Tensor) -> Tensor:
        """Images to the (B, height, width) costs of their cells."""
        return cell_costs(self.method, self.network(images))

    def forward(self, images: Tensor) -> Tensor:
        """Images to (B, height, width) indicators of cheapest paths; the tensor's ``info`` is the layer's record."""
        return self.layer(self.costs(images))

    def two_stage_loss(self, images: Tensor, costs: Tensor, paths: Tensor) -> Tensor:
        """The loss of a two-stage method, a mean."""
        if self.method == "costs":
            return nn.functional.mse_loss(self.costs(images), costs)
        return nn.functional.binary_cross_entropy_with_logits(self.network(images), paths)
