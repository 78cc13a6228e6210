"""The end of a descent on sums of penalties where values have no more digits to tell a better point: it cannot fail.

Differences of the objective are formed term by term, without cancellation, so that a step along a descent direction is
seen to descend as long as the slope exceeds its own rounding.  Everything is in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.execution.deadline import is_over
from lpgd.nodes.base import Tilt
from lpgd.nodes.pooling.penalties import PenaltyFunction, hessian

__all__ = ["End", "finish", "slope_noise"]

LIMIT = 500
"""Of iterations.  At the flattest minima of an analytic objective Newton's steps shrink by a constant factor."""
HALVINGS = 80
"""Of a step, at most."""
ROUNDING = 2.0
"""Rounding errors of the slope at which it counts as zero."""


class End(NamedTuple):
    """Minimisers u (B, d), iterations (B,) and whether they converged (B,)."""

    u: Tensor
    iterations: Tensor
    converged: Tensor


class _Sums(NamedTuple):
    z: Tensor  # (B, N, d)
    square: Tensor  # (B, N)
    slope: Tensor  # (B, d)
    noise: Tensor  # (B,) what rounding may do to the slope
    total: Tensor  # (B,) Σκ₁ + ρ
    hessian: Tensor  # (B, d, d)


def slope_noise(first: Tensor, u: Tensor, x: Tensor) -> Tensor:
    """(B,) a rounding error of the slope ``Σ κ₁ (u - x_i)``: each difference is known to one of its larger part."""
    size = torch.maximum(u.abs()[:, None], x.abs()).amax(-1)
    return torch.finfo(x.dtype).eps * (first * size).sum(-1)


def finish(penalty: PenaltyFunction, x: Tensor, u: Tensor, tilt: Tilt | None) -> End:
    """A minimiser downhill of u: Newton's method along the Hessian's eigenvectors, with a line search.

    Negative curvature is turned around, and followed where there is no slope: no saddle and no maximum is an end.
    Where the objective is not convex the step to the weighted mean, which never ascends, is taken if it falls further.

    Args:
        penalty: φ.
        x: (B, N, d) points.
        u: (B, d) where it starts.
        tilt: the terms of LPGD, with ``linear`` and ``center`` (B, d), or None.
    """
    dtype = u.dtype
    x, u = x.double(), u.double()
    if tilt is not None:
        tilt = Tilt(tilt.linear.double(), tilt.rho, tilt.center.double())
    whole, running = u.clone(), torch.arange(len(u), device=u.device)
    iterations = torch.zeros_like(running)
    converged = torch.zeros_like(running, dtype=torch.bool)
    # Steps stay within sight of the points, where a Newton step on a flat part would not.
    longest = (x.amax(1) - x.amin(1)).amax(-1) + penalty.alpha
    reach = 1e6 * (longest + x.abs().amax((1, 2)))
    for _ in range(LIMIT):
        if is_over():
            break
        sums = _sums(penalty, x, u, tilt)
        values, vectors = linalg.eigh(sums.hessian)
        small = linalg.vector_norm(sums.slope, dim=-1) <= ROUNDING * sums.noise
        # Of a curvature within this of zero nobody can tell its sign from the Hessian alone.
        bent = values[:, 0] < -(torch.finfo(u.dtype).eps ** 0.5) * sums.total
        step = _newton(sums, values, vectors, longest)
        step = torch.where((small & bent)[:, None], penalty.alpha * vectors[..., 0], step)
        step, found = _search(penalty, sums, u, tilt, step, small & bent, small & ~bent)
        doubtful = values[:, 0] < 1e-3 * sums.total
        if doubtful.any():
            mean = -sums.slope / torch.where(sums.total > 0, sums.total, 1)[:, None]
            lower = _difference(penalty, sums, u, tilt, mean) < _difference(penalty, sums, u, tilt, step)
            lower = doubtful & lower & ~(small & ~bent)
            step, found = torch.where(lower[:, None], mean, step), found | lower
        # Without a step that descends, the slope is as small as its rounding allows.
        far = u.abs().amax(-1) > reach
        ended = ~found | far
        iterations[running] += 1
        whole[running] = u = torch.where(found[:, None], u + step, u)
        converged[running] = ended & ~far
        if ended.any():
            left = ~ended
            running, x, u, longest, reach = (tensor[left] for tensor in (running, x, u, longest, reach))
            tilt = tilt if tilt is None else Tilt(tilt.linear[left], tilt.rho, tilt.center[left])
            if not len(running):
                break
    return End(whole.to(dtype), iterations, converged)


def _sums(penalty: PenaltyFunction, x: Tensor, u: Tensor, tilt: Tilt | None) -> _Sums:
    z = u[:, None] - x
    square = z.square().sum(-1)
    terms = penalty.terms(square)
    slope, total = (terms.first[:, None] @ z)[:, 0], terms.first.sum(-1)
    noise, matrix = slope_noise(terms.first, u, x), hessian(z, terms)
    if tilt is not None:
        eps = torch.finfo(u.dtype).eps
        away = u - tilt.center
        slope, total = slope + tilt.linear + tilt.rho * away, total + tilt.rho
        size = torch.maximum(u.abs(), tilt.center.abs()).amax(-1)
        noise = noise + eps * (tilt.linear.abs().amax(-1) + tilt.rho * size)
        matrix = matrix + tilt.rho * torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    return _Sums(z, square, slope, noise, total, matrix)


def _newton(sums: _Sums, values: Tensor, vectors: Tensor, longest: Tensor) -> Tensor:
    """(B, d) the step of Newton's method with curvatures made positive, no longer than ``longest``."""
    floor = torch.finfo(values.dtype).eps ** 0.5 * sums.total[:, None]
    sizes = torch.maximum(values.abs(), floor)
    along = linalg.matvec(vectors.mT, sums.slope)
    step = -linalg.matvec(vectors, torch.where(sizes > 0, along / torch.where(sizes > 0, sizes, 1), 0))
    length = linalg.vector_norm(step, dim=-1)
    return step * (longest / length.clamp(min=torch.finfo(step.dtype).tiny)).clamp(max=1)[:, None]


def _search(
    penalty: PenaltyFunction, sums: _Sums, u: Tensor, tilt: Tilt | None, step: Tensor, bent: Tensor, ended: Tensor
) -> tuple[Tensor, Tensor]:
    """Steps that descend, halved until they do, and (B,) whether there is one; ``bent`` ones may go either way."""
    pending, found = ~ended, torch.zeros_like(ended)
    best = torch.zeros_like(step)
    for _ in range(HALVINGS):
        if not pending.any():
            break
        moves = torch.zeros_like(pending)
        for sign in (1.0, -1.0) if (bent & pending).any() else (1.0,):
            trial = (u + sign * step) - u  # as it is rounded
            wanted = 1e-4 * (sums.slope * trial).sum(-1).clamp(max=0)
            fall = _difference(penalty, sums, u, tilt, trial)
            good = pending & ~found & (fall <= wanted) & (fall < 0) & ((sign > 0) | bent)
            best = torch.where(good[:, None], trial, best)
            found = found | good
            moves = (trial != 0).any(-1)
        pending = pending & ~found & moves
        step = torch.where(pending[:, None], 0.5 * step, step)
    return best, found


def _difference(penalty: PenaltyFunction, sums: _Sums, u: Tensor, tilt: Tilt | None, step: Tensor) -> Tensor:
    """(B,) the objective after a step less that before."""
    change = (step[:, None] * (2 * sums.z + step[:, None])).sum(-1)
    fall = penalty.difference(sums.square, change).sum(-1)
    if tilt is None:
        return fall
    return fall + (step * (tilt.linear + tilt.rho * (u - tilt.center + 0.5 * step))).sum(-1)
