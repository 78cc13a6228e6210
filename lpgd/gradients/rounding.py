"""How much of a node's gradient is rounding: the same gradient at a point and a change that are rounded otherwise.

``∇_w <∇_z L(z), dz>`` adds what may cancel.  Of ridge regression with entries of 1e6 it has ``A dy``, which is 1e-6
where dy is of the order of one in directions that A does not see: four digits are left.  A change that is itself the
difference of two solutions has lost as many again.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy, random_direction
from lpgd.problems.base import Data
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint

__all__ = ["NOTHING", "both_gradients", "random_signs", "rounding", "share_of_change", "within"]

NOTHING = 1e-6
"""A gradient that is worth less than this share of the largest one, each times its datum, is none."""

SMALL = 2**12
"""Elements with more numbers in their data are not copied."""


def within(share: float, dtype: torch.dtype) -> float:
    """A share that is asked for in float64; in coarser types what their small steps can give."""
    return max(share, 30 * torch.finfo(dtype).eps ** 0.5) if dtype != torch.float64 else share


def random_signs(tensor: Tensor, turn: int = 0) -> Tensor:
    """(n,) of a fixed random pattern, for each element of a tensor (B, n) the same."""
    return from_numpy(np.roll(np.sign(random_direction(tensor.shape[-1])), turn)).to(tensor)


def rounding(point: NodePoint) -> NodePoint:
    """A rounding error of each number."""
    return NodePoint(
        *(torch.finfo(tensor.dtype).eps * tensor * random_signs(tensor, turn) for turn, tensor in enumerate(point))
    )


def both_gradients(
    problem: NodeProblem, point: tuple[NodePoint, NodePoint], change: tuple[NodePoint, NodePoint]
) -> tuple[Data, Tensor, Data]:
    """The directional gradients in data and in x, and that in data with errors; point and change come with theirs.

    Small elements are put through their functions once, as a batch of twice the size.
    """
    moved = [NodePoint(*(one + error for one, error in zip(*both, strict=True))) for both in (point, change)]
    count = problem.batch_size
    if sum(datum[0].numel() for datum in problem.data if len(datum)) > SMALL:
        return *problem.directional_gradients(point[0], change[0]), problem.directional_gradient(*moved)
    places = torch.arange(count, device=problem.device).repeat(2)
    stacked = (
        NodePoint(*(torch.cat(pair) for pair in zip(plain, other, strict=True)))
        for plain, other in zip((point[0], change[0]), moved, strict=True)
    )
    gradients, slopes = problem.select(places).directional_gradients(*stacked)
    return (
        gradients._make(one[:count] for one in gradients),
        slopes[:count],
        gradients._make(one[count:] for one in gradients),
    )


def share_of_change(problem: NodeProblem, gradient: Data, other: Data, cotangent: Tensor, x: Tensor) -> Tensor:
    """(B,) the largest share of a datum's gradient by which another one differs.

    Args:
        problem: B elements.
        gradient, other: both.
        cotangent, x: (B, n) whose gradient it is, and minimisers: they tell which gradients are zero to rounding.
    """
    sizes = [_largest(datum) for datum in problem.data]
    found = [_largest(one) for one in gradient]
    worth = torch.stack([one * size for one, size in zip(found, sizes, strict=True)]).amax(0)
    none = torch.finfo(worth.dtype).eps ** 0.6 * _largest(cotangent) * _largest(x)
    least = torch.maximum(NOTHING * worth, none.to(worth.dtype))
    shares: list[Tensor] = []
    for value, again, size, largest in zip(gradient, other, sizes, found, strict=True):
        floor = least / torch.where(size > 0, size, 1.0)
        difference = _largest(cast(Any, again) - value)
        shares.append(torch.where(difference > 0, difference / torch.maximum(largest, floor), 0.0))
    return torch.stack(shares).amax(0)


def _largest(tensor: Tensor) -> Tensor:
    """(B,) the largest magnitude of each element."""
    flat = tensor.abs().reshape(len(tensor), -1)
    return flat.amax(-1) if flat.shape[-1] else flat.new_zeros(len(flat))
