"""The two-stage baseline: fit the constraints without a solver in the loop, then pack with them."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from .data import Orders, Truth

__all__ = ["COSTS", "infeasible_packings", "two_stage"]

COSTS = (1e3, 1e4, 1e5, 1e6, 1e7)
"""Costs of a violated margin that are tried."""


def infeasible_packings(orders: Orders, exchanges: bool) -> tuple[Tensor, Tensor]:
    """Packings better than the observed ones, which an optimal packer must have found not to fit.

    One item more, and with ``exchanges`` one item exchanged for a more valuable one.

    Returns:
        (R, n) packings and (R,) their vans.
    """
    taken, items = orders.packings > 0.5, orders.packings.shape[1]
    unit = torch.eye(items, dtype=torch.float64)
    vans = orders.vans[:, None]
    more = orders.packings[:, None] + unit
    packings, owners = [more[~taken]], [vans.expand(-1, items)[~taken]]
    if exchanges:
        swapped = orders.packings[:, None, None] - unit[:, None] + unit
        better = orders.values[:, None, :] > orders.values[:, :, None]
        chosen = taken[:, :, None] & ~taken[:, None, :] & better
        packings.append(swapped[chosen])
        owners.append(vans[..., None].expand(-1, items, items)[chosen])
    return torch.cat(packings), torch.cat(owners)


def two_stage(orders: Orders, vans: int, exchanges: bool, cost: float) -> Truth:
    """Weights w ≥ 0 and capacities b ≥ 0 that separate what fitted from what did not, with the largest soft margin.

    ``minimise |w|² + cost (mean of max(0, 1 + ⟨w, x⟩ - b) over observed x + mean of max(0, 1 - ⟨w, x⟩ + b) over
    infeasible ones)``, b that of each packing's van.
    """
    items = orders.packings.shape[1]
    bad, owners = infeasible_packings(orders, exchanges)
    w, b = cp.Variable(items, nonneg=True), cp.Variable(vans, nonneg=True)
    inside = orders.packings.numpy() @ w - np.eye(vans)[orders.vans.numpy()] @ b
    outside = bad.numpy() @ w - np.eye(vans)[owners.numpy()] @ b
    misfit = cp.sum(cp.pos(1 + inside)) / len(orders) + cp.sum(cp.pos(1 - outside)) / len(bad)
    cp.Problem(cp.Minimize(cp.sum_squares(w) + cost * misfit)).solve(solver=cp.CLARABEL)
    weights, capacities = (torch.from_numpy(np.array(part.value).clip(min=0.0)) for part in (w, b))
    return Truth(weights, capacities)
