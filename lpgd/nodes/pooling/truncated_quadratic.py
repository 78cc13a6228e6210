"""Global minimisers of sums of truncated quadratics of numbers, by sorting."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy, rows_where
from lpgd.nodes.pooling.descent import BLOCK, blocks

__all__ = ["minimise_truncated"]


def minimise_truncated(x: Tensor, alpha: float) -> Tensor:
    """``argmin_u Σ_i min((u - x_i)², α²)/2``: (B, 1) for numbers x (B, N).

    In sorted order the points within α of u are a window, whose best u is their mean.  The window changes where u
    passes some ``x_i - α``, which lets x_i in, or ``x_i + α``, which lets it out: 2N windows in all.
    """
    return torch.cat([_best_mean(x[block], alpha) for block in blocks(x, BLOCK // 2)])  # with a dozen temporaries


def _best_mean(x: Tensor, alpha: float) -> Tensor:
    x = _sorted(x)
    middle = x[:, x.shape[-1] // 2, None].clone()
    ordered, x = x, x - middle
    size = x.shape[-1]
    # A point outside costs α²/2, and the best window no more than the median: so it has at least m points, and begins
    # at one of these.  Others need not be looked at; any window costs at least the minimum.
    above = x.abs().clamp_(max=alpha).square_().sum(-1).amax()
    m = max(1, size - int(above / alpha**2) - 2)
    near = rows_where((x[:, m - 1 :] - x[:, : size - m + 1]).amin(0) <= 2.001 * alpha)
    first, last = int(near[0]), int(near[-1])
    # After x_i was let out the window goes from the next point to the last one within 2α of x_i.  After x_j was let in
    # it begins with the first one within 2α, whose place is how many windows of the other kind have ended by then.
    begin, end = torch.arange(first, last + 1, device=x.device), torch.arange(first + m, last + m + 1, device=x.device)
    stops = torch.searchsorted(x, x[:, first : last + 1] + 2 * alpha, right=True)
    ended = torch.zeros(len(x), size + 1, dtype=torch.int64, device=x.device)
    starts = first + ended.scatter_add_(-1, stops, torch.ones_like(stops)).cumsum(-1)[:, first + m - 1 : last + m]
    sums, squares = (torch.nn.functional.pad(values.cumsum(-1), (1, 0)) for values in (x, x * x))
    after, until = slice(first + 1, last + 2), slice(first + m, last + m + 1)
    out = _cost(
        sums[:, after], sums.gather(-1, stops), squares[:, after], squares.gather(-1, stops), stops - begin - 1, alpha
    )
    let_in = _cost(
        sums.gather(-1, starts), sums[:, until], squares.gather(-1, starts), squares[:, until], end - starts, alpha
    )
    (least, place), (other, other_place) = (cost.min(-1, keepdim=True) for cost in (out, let_in))
    is_out = least <= other
    low = torch.where(is_out, first + 1 + place, starts.gather(-1, other_place))
    high = torch.where(is_out, stops.gather(-1, place), first + m + other_place)
    # The mean again, without the rounding of running sums.
    places = torch.arange(size, device=x.device)
    mean = x.mul((places >= low) & (places < high)).sum(-1, keepdim=True) / (high - low)
    u = _settled(x, mean, low, high, alpha).add_(middle)
    # Numbers much closer to zero than the middle have lost digits with it.
    elements = rows_where((middle.abs() > 4 * u.abs())[:, 0])
    if len(elements):
        away = ordered[elements] - u[elements]
        inside = (away.abs() <= alpha).to(x.dtype)
        u[elements] += (away * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True).clamp(min=1)
    return u


def _settled(x: Tensor, mean: Tensor, low: Tensor, high: Tensor, alpha: float) -> Tensor:
    """Means (B, 1) of windows of sorted x, moved on while the points within α of one are other ones and cost less.

    The rounding of running sums can prefer a window that is not that of its mean.
    """
    elements = rows_where(
        ((torch.searchsorted(x, mean - alpha) != low) | (torch.searchsorted(x, mean + alpha, right=True) != high))[:, 0]
    )
    while len(elements):
        points = x[elements].double()
        old = mean[elements].double()
        inside = (points - old).abs() <= alpha
        new = (points * inside).sum(-1, keepdim=True) / inside.sum(-1, keepdim=True)
        new = new.to(x.dtype).double()
        lower = _value(points, new, alpha) < _value(points, old, alpha)  # not where none is inside, a quotient of zeros
        mean[elements] = torch.where(lower, new, old).to(x.dtype)
        elements = elements[lower[:, 0]]
    return mean


def _value(x: Tensor, u: Tensor, alpha: float) -> Tensor:
    return (x - u).square().clamp(max=alpha**2).sum(-1, keepdim=True)


def _cost(low: Tensor, high: Tensor, low_square: Tensor, high_square: Tensor, count: Tensor, alpha: float) -> Tensor:
    """Twice the objective of windows at their means, less ``N α²``, from running sums at both ends."""
    total, count = high - low, count.to(low.dtype)
    return (high_square - low_square).sub_(total.mul_(total).div_(count.clamp(min=1))).sub_(count.mul_(alpha**2))


def _sorted(x: Tensor) -> Tensor:
    """Rows in ascending order, as a tensor of its own.  NumPy sorts with vector instructions, and without indices."""
    return x.sort(-1).values if x.is_cuda else from_numpy(np.sort(x.detach().cpu().numpy(), axis=-1)).to(x.device)
