"""Total variation denoising in one dimension: the exact solution in linear time, and its derivative."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["denoise", "differentiate_denoised", "segment_means"]


def jump_signs(values: list[float], weight: float) -> list[int]:
    """Where the solution of one signal jumps, up (1), down (-1) or not at all (0), for each pair of neighbours.

    Dynamic programming from left to right (Johnson, A dynamic programming algorithm for the fused lasso and
    L0-segmentation, 2013).  The best cost of the first k points, as a function of the value u of the k-th one, has a
    derivative that is piecewise linear and increasing.  The next point does not follow u outside of the range where this
    derivative is within ±weight: it jumps.  So the derivative is cut off at ±weight, and u - x of the next point is
    added.  Each point puts one kink on either side and every kink is taken away once: time and memory O(n).

    A kink is its position with the changes of slope and intercept that its right side has over its left one.
    """
    count = len(values)
    position, slope, intercept = [0.0] * (2 * count), [0.0] * (2 * count), [0.0] * (2 * count)
    low, high = [0.0] * count, [0.0] * count
    first, last = count, count - 1  # the kinks in use; none yet
    limit = 0.0  # of the cut-off derivative: nothing comes before the first point
    for index in range(count - 1):
        value = values[index]
        rise, offset = 1.0, -limit - value  # of the leftmost piece
        while first <= last and rise * position[first] + offset <= -weight:
            rise += slope[first]
            offset += intercept[first]
            first += 1
        bottom = low[index] = (-weight - offset) / rise
        fall, level = 1.0, limit - value  # of the rightmost piece
        while last >= first and fall * position[last] + level >= weight:
            fall -= slope[last]
            level -= intercept[last]
            last -= 1
        top = high[index] = (weight - level) / fall
        first -= 1
        last += 1
        position[first], slope[first], intercept[first] = bottom, rise, offset + weight
        position[last], slope[last], intercept[last] = top, -fall, weight - level
        limit = weight
    rise, offset = 1.0, -limit - values[-1]
    while first <= last and rise * position[first] + offset <= 0.0:
        rise += slope[first]
        offset += intercept[first]
        first += 1
    current = -offset / rise
    signs = [0] * (count - 1)
    for index in range(count - 2, -1, -1):
        if current > high[index]:
            current, signs[index] = high[index], 1
        elif current < low[index]:
            current, signs[index] = low[index], -1
    return signs


def segment_means(values: Tensor, signs: Tensor) -> Tensor:
    """Each entry replaced by the mean over its segment, (B, n).

    Args:
        values: (B, n).
        signs: (B, n - 1), zero between neighbours of one segment.
    """
    batch, count = values.shape
    starts = torch.ones(batch, count, dtype=torch.bool, device=values.device)
    starts[:, 1:] = signs != 0
    segment = starts.flatten().cumsum(0) - 1  # rows begin segments, so one numbering serves the whole batch
    sums = values.new_zeros(batch * count).index_add_(0, segment, values.flatten())
    lengths = values.new_zeros(batch * count).index_add_(0, segment, torch.ones_like(values).flatten())
    return (sums / lengths)[segment].view(batch, count)


def boundary_signs(signs: Tensor) -> Tensor:
    """``-Dᵀ signs``, (B, n): at each point the sign of the jump after it less that of the jump before it."""
    return torch.nn.functional.pad(signs, (0, 1)) - torch.nn.functional.pad(signs, (1, 0))


def denoise(signal: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``argmin_y ½|y - x|² + λ Σ|y_i - y_(i+1)|``, exact and in O(n) for each element.

    Which neighbours have the same value is found on the CPU in double precision; values are then computed from the
    segments, a mean shifted by λ (sign of the jump after - sign of the jump before) / length, so that all values
    of a segment are equal to the last bit.

    Args:
        signal: x, (B, n).
        weight: λ >= 0, (B,).

    Returns:
        y (B, n), and the signs of its jumps ``y_(i+1) - y_i`` (B, n - 1) in the type of the signal.
    """
    rows = signal.detach().to("cpu", torch.float64)
    # Intercepts are sums over the signal: without its mean they are smaller, and so is their rounding.
    rows = (rows - rows.mean(1, keepdim=True)).tolist()
    weights = weight.detach().to("cpu", torch.float64).tolist()
    found = [jump_signs(row, own) for row, own in zip(rows, weights, strict=True)]
    signs = torch.tensor(found, dtype=torch.float64, device=signal.device).view(len(found), signal.shape[1] - 1)
    means = segment_means(signal.double(), signs)
    shifts = segment_means(boundary_signs(signs), signs)
    return (means + weight.double()[:, None] * shifts).to(signal.dtype), signs.to(signal.dtype)


def differentiate_denoised(signs: Tensor, cotangent: Tensor, *, pass_through: bool = False) -> tuple[Tensor, Tensor]:
    """The vector-Jacobian product of :func:`denoise`, O(n).

    Near x the jumps keep their signs, so y is the mean of x over each segment, shifted by λ times a constant:
    ``dy/dx = P`` averages over segments and ``dy/dλ = -P D_Sᵀ sign(D_S y)``, where S are the jumps.

    Args:
        signs: of the jumps, (B, n - 1).
        cotangent: v, (B, n).
        pass_through: the approximation ``dy/dx = I``, ``dy/dλ = -D_Sᵀ sign(D_S y)``, which leaves out that segments
            move as a whole.  As P is a projection, ``<P v, v> = |P v|² >= 0``: along -v it never ascends.

    Returns:
        Gradients for x (B, n) and λ (B,).
    """
    averaged = cotangent if pass_through else segment_means(cotangent, signs)
    return averaged, (averaged * boundary_signs(signs)).sum(1)
