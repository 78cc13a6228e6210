"""The end of a search for a trajectory: Newton's method on the optimality conditions with active bounds held.

It converges quadratically from multipliers that say which bounds are active, and its factor says whether the solution
is a strict minimum.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.nodes.control.trajectory import (
    ControlProblem,
    Expansion,
    Held,
    add_diagonal,
    multipliers,
    respond,
    stacked,
)
from lpgd.status import Status

__all__ = ["Trajectories", "in_units", "polish", "residual", "warm"]


class Trajectories(NamedTuple):
    """Trajectories with multipliers.

    Attributes:
        z: (B, T, m + n).
        nu: of the dynamics, (B, T, n).
        below, above: of the bounds, at least 0, (B, T, m + n).
        status: (B,) values of Status.
        iterations: (B,) systems that were solved.
    """

    z: Tensor
    nu: Tensor
    below: Tensor
    above: Tensor
    status: Tensor
    iterations: Tensor


def in_units(problem: ControlProblem, z: Tensor) -> ControlProblem:
    """The same problem with an objective of order one near z: divided by a power of two."""
    reach = 1 + z.abs().amax((-1, -2))
    zero = problem.curvature(z, None)
    curve = torch.maximum(zero.stages.abs().amax((-1, -2, -3)), zero.last.abs().amax((-1, -2)))
    size = torch.maximum(problem.expand(z).gradient.abs().amax((-1, -2)) / reach, curve)
    size = torch.where((size > 0) & torch.isfinite(size), size, 1)
    return dataclasses.replace(problem, unit=size.log2().round().exp2())


def residual(
    problem: ControlProblem, z: Tensor, expansion: Expansion, nu: Tensor, below: Tensor, above: Tensor
) -> Tensor:
    """(B,) of the optimality conditions, relative to their terms."""
    forces = expansion.pulled(nu)
    slope = expansion.gradient + forces - below + above
    terms = 1 + stacked([expansion.gradient, forces])
    reach = 1 + stacked([z])
    gap = torch.maximum(torch.minimum(z - problem.lower, below).abs(), torch.minimum(problem.upper - z, above).abs())
    most = torch.maximum(reach, 1 + stacked([below + above]))
    worst = torch.stack([stacked([slope]) / terms, stacked([expansion.defect]) / reach, stacked([gap]) / most]).amax(0)
    return torch.where(torch.isnan(worst), torch.inf, worst)


def polish(problem: ControlProblem, start: Trajectories, max_iterations: int = 30) -> Trajectories:
    """Newton's method on the optimality conditions from near a solution; SOLVED is a strict minimum."""
    whole, every = Trajectories(*(tensor.clone() for tensor in start)), problem
    z, nu, below, above = start[:4]
    expansion = problem.expand(z)
    best = residual(problem, z, expansion, nu, below, above)
    exact = torch.zeros_like(best, dtype=torch.bool)
    running, patience = torch.arange(len(z), device=z.device), torch.full_like(whole.iterations, 3)
    enough, m = torch.finfo(z.dtype).eps ** 0.6, z.shape[-1] - nu.shape[-1]
    for _ in range(max_iterations):
        low, high = below > z - problem.lower, above > problem.upper - z
        held = Held.of(low | high, m)
        target = torch.where(low, problem.lower - z, torch.where(high, problem.upper - z, 0))
        gradient = expansion.gradient + expansion.pulled(nu)
        dz, turn, force, definite = respond(
            problem.curvature(z, nu), expansion, gradient, expansion.defect, held, target
        )
        z, nu = z + dz, nu + turn
        z = torch.where(low, problem.lower, torch.where(high, problem.upper, z))
        below, above = torch.where(low, -force, 0), torch.where(high & ~low, force, 0)
        expansion = problem.expand(z)
        size = residual(problem, z, expansion, nu, below, above)
        whole.iterations[running] += 1
        better, halved = size < best[running], size < 0.5 * best[running]
        chosen = running[better]
        for tensor, new in zip(whole[:4], (z, nu, below, above), strict=True):
            tensor[chosen] = new[better]
        best[chosen] = size[better]
        exact[running] = torch.where(better, definite, exact[running] & definite)
        patience[running] = torch.where(halved, 3, patience[running] - 1)
        finished = (patience[running] <= 0) | ~torch.isfinite(size) | (best[running] == 0)
        finished = finished | (~halved & (best[running] < enough))
        if finished.any():
            left = rows_where(~finished)
            if not len(left):
                break
            running, problem = running[left], problem.select(left)
            z, nu, below, above = (tensor[left] for tensor in (z, nu, below, above))
            expansion = Expansion(*(tensor[left] for tensor in expansion))
    fine = (best <= enough) & exact
    flat = (best <= enough) & ~exact
    if flat.any():
        flat_elements = rows_where(flat)
        fine[flat_elements] = _is_flat(every.select(flat_elements), *(tensor[flat_elements] for tensor in whole[:4]))
    return whole._replace(status=torch.where(fine, int(Status.SOLVED), int(Status.NUMERICAL_ERROR)))


def _is_flat(problem: ControlProblem, z: Tensor, nu: Tensor, below: Tensor, above: Tensor) -> Tensor:
    """(B,) no negative curvature along what may move, to rounding: a minimum, if not a strict one."""
    curve, expansion = problem.curvature(z, nu), problem.expand(z)
    damping = torch.finfo(z.dtype).eps ** 0.4 * (1 + curve.stages.abs().amax((-1, -2, -3)))
    held = Held.of((below > 0) | (above > 0), z.shape[-1] - nu.shape[-1])
    lifted = add_diagonal(curve, damping[:, None, None].expand_as(z))
    zero = torch.zeros_like(z)
    return respond(lifted, expansion, zero, torch.zeros_like(nu), held, zero)[3]


def warm(problem: ControlProblem, z: Tensor) -> Trajectories:
    """A trajectory with the multipliers that fit it best, bounds being active within the root of the precision."""
    expansion, m = problem.expand(z), z.shape[-1] - problem.start.shape[-1]
    reach = torch.finfo(z.dtype).eps ** 0.5 * (1 + z.abs().amax((-1, -2), keepdim=True))
    low, high = z - problem.lower <= reach, problem.upper - z <= reach
    nu, force = multipliers(problem, expansion, z, Held.of(low | high, m))
    count = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    below, above = torch.where(low, -force, 0).relu(), torch.where(high, force, 0).relu()
    return Trajectories(z, nu, below, above, count, count.clone())
