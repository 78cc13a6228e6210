"""Orders that somebody packed: what was offered, for which van, and what was taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import lpgd

from .model import integer_layer

__all__ = ["Orders", "Truth", "make_truth", "observe"]


@dataclass(frozen=True)
class Truth:
    """What is to be learned.

    Attributes:
        weights: (n,) of the items.
        capacities: (k,) of the vans.
    """

    weights: Tensor
    capacities: Tensor


@dataclass(frozen=True)
class Orders:
    """B observed orders.

    Attributes:
        values: (B, n) what the items were worth, as far as we know.
        vans: (B,) which van was packed.
        packings: (B, n) the items that were taken, 0 or 1.
    """

    values: Tensor
    vans: Tensor
    packings: Tensor

    def __len__(self) -> int:
        return len(self.vans)

    def select(self, index: Tensor) -> Orders:
        return Orders(self.values[index], self.vans[index], self.packings[index])


def make_truth(items: int, vans: int, seed: int) -> Truth:
    """Weights uniform in [0.2, 1), and vans that take from 30 to 60 percent of all items."""
    weights = torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 1.0, items))
    shares = torch.linspace(0.3, 0.6, vans, dtype=torch.float64)
    return Truth(weights, shares * weights.sum())


def observe(truth: Truth, count: int, noise: float, seed: int) -> Orders:
    """Optimal packings for values uniform in [0.2, 1); the observer knows ``values · exp(noise · N(0, 1))``."""
    rng = np.random.default_rng(seed)
    items = truth.weights.numel()
    values = torch.from_numpy(rng.uniform(0.2, 1.0, (count, items)))
    vans = torch.from_numpy(rng.integers(0, truth.capacities.numel(), count))
    known = values * torch.from_numpy(np.exp(noise * rng.normal(size=(count, items))))
    layer = integer_layer(items, lpgd.LPGD(tau=1.0))
    with torch.no_grad():
        (packings,) = layer(values, truth.weights, truth.capacities[vans])
    return Orders(known, vans, packings)
