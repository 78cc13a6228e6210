"""Total variation denoising in one dimension: the exact solution in linear time, and its derivative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lpgd.arrays import flags
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt
from lpgd.status import Status

__all__ = ["TotalVariationDenoising", "denoise", "differentiate_denoised", "segment_means"]


def jump_signs(values: list[float], weights: list[float]) -> list[int]:
    """Where the solution of one signal jumps, up (1), down (-1) or not at all (0), for each pair of neighbours.

    Dynamic programming from left to right (Johnson, A dynamic programming algorithm for the fused lasso and
    L0-segmentation, 2013), with a weight for each pair.  The best cost of the first k points, as a function of the
    value u of the k-th one, has a derivative that is piecewise linear and increasing.  The next point does not follow u
    outside of the range where this derivative is within ± the weight of the pair: it jumps.  So the derivative is cut
    off there, and u - x of the next point is added.  Each point puts one kink on either side and every kink is taken
    away once: time and memory O(n).

    A kink is its position with the changes of slope and intercept that its right side has over its left one.
    """
    count = len(values)
    position, slope, intercept = [0.0] * (2 * count), [0.0] * (2 * count), [0.0] * (2 * count)
    low, high = [0.0] * count, [0.0] * count
    first, last = count, count - 1  # the kinks in use; none yet
    limit = 0.0  # of the cut-off derivative: nothing comes before the first point
    for index in range(count - 1):
        value, weight = values[index], weights[index]
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
    """``argmin_y ½|y - x|² + Σ λ_i |y_i - y_(i+1)|``, exact and in O(n) for each element.

    Which neighbours have the same value is found on the CPU in double precision; values are then computed from the
    segments, a mean shifted by (λ sign of the jump after - λ sign of the jump before) / length, so that all values
    of a segment are equal to the last bit.

    Args:
        signal: x, (B, n).
        weight: λ >= 0, (B,), or (B, n - 1) where each pair has its own.

    Returns:
        y (B, n), and the signs of its jumps ``y_(i+1) - y_i`` (B, n - 1) in the type of the signal.
    """
    signals = signal.detach().to("cpu", torch.float64)
    # Intercepts are sums over the signal: without its mean they are smaller, and so is their rounding.
    signals = (signals - signals.mean(1, keepdim=True)).tolist()
    pair_weights = _of_pairs(weight.double(), signal.shape[1])
    weights = pair_weights.detach().cpu().tolist()
    found = [jump_signs(values, pairs) for values, pairs in zip(signals, weights, strict=True)]
    signs = torch.tensor(found, dtype=torch.float64, device=signal.device).view(len(found), signal.shape[1] - 1)
    means = segment_means(signal.double(), signs)
    shifts = segment_means(boundary_signs(pair_weights * signs), signs)
    return (means + shifts).to(signal.dtype), signs.to(signal.dtype)


def _of_pairs(weight: Tensor, count: int) -> Tensor:
    """(B, n - 1) weights."""
    return weight[:, None].expand(-1, count - 1) if weight.ndim == 1 else weight


def differentiate_denoised(
    signs: Tensor, cotangent: Tensor, *, pass_through: bool = False, per_pair: bool = False
) -> tuple[Tensor, Tensor]:
    """The vector-Jacobian product of :func:`denoise`, O(n).

    Near x the jumps keep their signs, so y is the mean of x over each segment, shifted by λ times a constant:
    ``dy/dx = P`` averages over segments and ``dy/dλ = -P D_Sᵀ sign(D_S y)``, where S are the jumps; of weights of pairs
    each has its own term of this sum.

    Args:
        signs: of the jumps, (B, n - 1).
        cotangent: v, (B, n).
        pass_through: the approximation ``dy/dx = I``, ``dy/dλ = -D_Sᵀ sign(D_S y)``, which leaves out that segments
            move as a whole.  As P is a projection, ``<P v, v> = |P v|² >= 0``: along -v it never ascends.
        per_pair: each pair of neighbours has its own weight.

    Returns:
        Gradients for x (B, n) and λ (B,), or (B, n - 1).
    """
    averaged = cotangent if pass_through else segment_means(cotangent, signs)
    for_pairs = -signs * averaged.diff(dim=1)
    return averaged, for_pairs if per_pair else for_pairs.sum(1)


@dataclass(frozen=True)
class TotalVariationDenoising(BaseNode):
    """Total variation denoising of a signal (Gould, Lecture Notes on Differentiable Optimisation, 4.4).

        minimise ½|y - x|² + λ Σ_i |y_i - y_(i+1)|
        minimise ½|y - x|² + Σ_i λ_i |y_i - y_(i+1)|      with ``per_pair``

    with inputs ``signal`` x (n,) and ``weight`` λ >= 0, () or (n - 1,), for each element.  Solved exactly in O(n) on
    the CPU (:func:`denoise`), where one row after the other takes about 1 µs for each point; gradients are computed on
    the device of the inputs.  The gradient is the true one: averages over the constant segments
    (:func:`differentiate_denoised`).  For the generic methods, neighbours that the solution ties are equality
    constraints.  LPGD's tilted and augmented problems are denoising problems with ``(x - τg + ρy*) / (1 + ρ)`` and
    ``λ / (1 + ρ)``.

    A negative weight fails with ``Status.INVALID_DATA``.

    Args:
        pass_through: the gradient is an approximation that hands the cotangent on to x without averaging.
        per_pair: each pair of neighbours has its own weight, with a gradient of its own; where one is zero, the signal
            falls into parts that do not see each other.
    """

    pass_through: bool = False
    per_pair: bool = False

    name = "TotalVariationDenoising"
    domain = "Here weight must not be negative."

    @property
    def inputs(self) -> Mapping[str, int]:
        return {"signal": 1, "weight": int(self.per_pair)}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        if not shapes[0][0]:
            raise ValueError("signal has no points.")
        if self.per_pair and shapes[1][0] != shapes[0][0] - 1:
            raise ValueError(f"weight has {shapes[1][0]} entries; {shapes[0][0]} points have {shapes[0][0] - 1} pairs.")
        return shapes[0]

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        signal, weight = inputs
        return 0.5 * (y - signal).square().sum(-1) + (_of_pairs(weight, y.shape[-1]) * y.diff(dim=-1).abs()).sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        steps = y.diff(dim=-1)
        return steps * (steps == 0.0) if y.shape[-1] > 1 else None

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        return inputs[0].clone()

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        signal, weight = inputs
        return self._solve(signal, weight)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        signal, weight = inputs
        curvature = 1.0 + tilt.rho
        return self._solve((signal - tilt.linear + tilt.rho * tilt.center) / curvature, weight / curvature, curvature)

    def vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        signs = y.diff(dim=-1).sign() if aux is None else aux[0]
        return differentiate_denoised(signs, cotangent, pass_through=self.pass_through, per_pair=self.per_pair)

    def _solve(self, signal: Tensor, weight: Tensor, curvature: float = 1.0) -> NodeAnswer:
        y, signs = denoise(signal, weight.clamp_min(0.0))
        valid = (_of_pairs(weight, signal.shape[-1]) >= 0.0).all(-1) if self.per_pair else weight >= 0.0
        statuses = [Status.SOLVED if fine else Status.INVALID_DATA for fine in flags(valid)]
        nu = None
        if y.shape[-1] > 1:
            nu = curvature * (y - signal).cumsum(-1)[:, :-1] * (y.diff(dim=-1) == 0.0)
        return NodeAnswer(y, statuses, [1] * len(y), (signs,), nu=nu)
