"""The derivative of plans that nearly fall apart, by averages alone."""

from __future__ import annotations

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.nodes.transport.sinkhorn import positive_or_one, solve_smaller_side

__all__ = ["by_averages", "by_differentiable_factor", "by_factor"]

APART = 1.5
"""Second derivatives are right where parts of a plan share this power of the precision of their mass, or more."""


def by_factor(plan: Tensor, right: Tensor, cotangent: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """α (B, m) and (B,) whether it is there, by a Cholesky factor where that has digits, else by averages.

    Where parts of a plan share next to no mass, what they differ by is rounding over rounding, of any size, and takes
    the digits of all that is α_i + β_j.

    Args:
        plan: (B, m, n) P.
        right: of the normal equations, on rows.
        cotangent, mean: (B, m, n) V and (B, n) the means of its columns.
    """
    alpha, good = solve_smaller_side(plan, right)
    most = 2.0 * sum(plan.shape[-2:]) * (cotangent.amax((-2, -1)) - cotangent.amin((-2, -1)))
    again = rows_where(~(good & (alpha.abs().amax(-1) <= most)))
    if len(again):
        alpha[again], good[again] = by_averages(plan[again], cotangent[again], mean[again])
    return alpha, good


def by_differentiable_factor(plan: Tensor, right: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`by_factor` for second derivatives, by a factor alone: where it has no digits there is no answer."""
    alpha, good = solve_smaller_side(plan, right, linalg.cholesky_ex)
    return alpha, good & (_shared(plan.detach()) >= torch.finfo(plan.dtype).eps ** APART)


def _shared(plan: Tensor) -> Tensor:
    """(B,) the least share of a row's mass by which it hangs together with those before it, through those behind it."""
    weight, mass = plan @ (plan / positive_or_one(plan.sum(-2))[:, None, :]).mT, plan.sum(-1)
    least = torch.ones_like(mass[:, 0])
    for place in range(mass.shape[-1] - 1, 0, -1):
        w = weight[:, :place, place]
        total = w.sum(-1)
        counts = (mass[:, place] > 0) & (mass[:, :place] > 0).any(-1)
        least = torch.where(counts, torch.minimum(least, total / positive_or_one(mass[:, place])), least)
        part = w / positive_or_one(total)[:, None]
        weight = weight[:, :place, :place] + w[:, :, None] * part[:, None, :]
    return least


def by_averages(plan: Tensor, cotangent: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """α (B, m) that minimises ``Σ P_ij (V_ij - α_i - β_j)²`` with its first entry zero, and (B,) whether only one does.

    The normal equations are those of :func:`~lpgd.nodes.transport.node.transport_vjp`.  Rows and columns are the nodes
    of a graph, with P for the weights of its edges and V for what their ends should differ by.  A node that is left out
    leaves an edge between each two of its neighbours, of weight ``w_i w_k / Σw``, and edges between the same two nodes
    are one of all their weight, with the mean of their differences: columns first, then rows.  Nothing is
    subtracted but differences, of the size of V.  So α is of that size, too, as the mean over all spanning trees that
    it is (the matrix-tree theorem), however little mass the parts of a plan share.

    Args: as for :func:`by_factor`.
    """
    centred = cotangent - mean[:, None, :]
    share = plan / positive_or_one(plan.sum(-2))[:, None, :]
    weight = plan @ share.mT
    pull = (plan * centred) @ share.mT
    pull = pull - pull.mT  # weight times difference
    steps: list[tuple[Tensor, Tensor]] = []
    good = torch.ones_like(plan[:, 0, 0], dtype=torch.bool)
    filled = plan.sum(-1) > 0
    for place in range(plan.shape[-2] - 1, 0, -1):
        w, force = weight[:, :place, place], pull[:, :place, place]
        total = w.sum(-1, keepdim=True)
        good = good & ((total[:, 0] > 0) | ~(filled[:, place] & filled[:, :place].any(-1)))
        part, along = w / positive_or_one(total), force / positive_or_one(total)
        steps.append((part, along.sum(-1)))
        weight = weight[:, :place, :place] + w[:, :, None] * part[:, None, :]
        pull = pull[:, :place, :place] + (force[:, :, None] * part[:, None, :] - part[:, :, None] * force[:, None, :])
    alpha = torch.zeros_like(plan[:, :1, 0])
    for part, along in reversed(steps):
        alpha = torch.cat([alpha, (part * alpha).sum(-1, keepdim=True) - along[:, None]], -1)
    return alpha, good & alpha.isfinite().all(-1)
