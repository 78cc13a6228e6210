"""Steepest descent for least squares on the unit sphere, with a line search along the sphere.

The methods as published are in :mod:`lpgd.nodes.sphere.less`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.execution.deadline import is_over
from lpgd.nodes.sphere.secular import SphereSolution, half_quadratic, normalised, product

__all__ = ["descend", "least_squares", "starting_points"]


def starting_points(A: Tensor, b: Tensor) -> Tensor:
    """The least-squares solution scaled to length 1, (B, n); the first unit vector where it is zero."""
    return normalised(least_squares(A, b))


def least_squares(A: Tensor, b: Tensor) -> Tensor:
    """``A⁺b``, (B, n)."""
    found = linalg.lstsq(A, b[..., None]).solution[..., 0] if A.shape[-2] >= A.shape[-1] else _shortest(A, b)
    broken = ~torch.isfinite(found).all(-1)
    if broken.any():
        found = torch.where(broken[:, None], _shortest(A, b), found)
    return found


def _shortest(A: Tensor, b: Tensor) -> Tensor:
    return product(linalg.pinv(A), b)


def descend(
    gram: Tensor,
    vector: Tensor,
    start: Tensor,
    *,
    step: float | None = None,
    relaxation: float = 0.9,
    backtracking: bool = True,
    max_iterations: int = 100,
    tolerance: float = 1e-7,
) -> SphereSolution:
    """A local minimum of ``f(u) = ½uᵀGu - cᵀu`` subject to |u| = 1, by projected descent from ``start``.

    An iteration goes along ``p = (I - uuᵀ)d`` with d = -∇f(u), then back to the sphere: ``u ← (u + ηp) / |u + ηp|``.

    Args:
        gram: G, (B, n, n).
        vector: c, (B, n).
        start: (B, n), of length 1.
        step: η; None is the exact one ``|p|² / (pᵀGp + <d, u>|p|²)``: the minimiser of f along p, where the second
            term is what the way back to the sphere adds to the curvature (without it steps overshoot).
        relaxation: factor of exact steps.  At 1 steepest descent zigzags; a little less halves its iterations.
        backtracking: halve η until f, on the sphere, decreases by 1e-4 of what its slope promises.
        max_iterations: limit.
        tolerance: of the tangential gradient relative to ``|Gu| + |c|``; at least 32 roundings.

    Returns:
        The solutions; each element stops on its own, where the tolerance is reached or nothing decreases f any more.
    """
    tolerance = max(tolerance, 32 * torch.finfo(gram.dtype).eps)
    batch = vector.shape[0]
    u = start
    pushed = product(gram, u)
    value = half_quadratic(u, pushed, vector)
    iterations = torch.zeros(batch, dtype=torch.int64, device=gram.device)
    converged = torch.zeros(batch, dtype=torch.bool, device=gram.device)
    active = ~converged
    for _ in range(max_iterations):
        if is_over():
            break
        d = vector - pushed
        along = (d * u).sum(-1, keepdim=True)
        p = d - along * u
        size = p.norm(dim=-1)
        converged = converged | (active & (size <= tolerance * (pushed.norm(dim=-1) + vector.norm(dim=-1))))
        active = active & ~converged
        if not active.any():
            break
        slope = size.square()
        if step is None:
            curvature = (p * product(gram, p)).sum(-1) + along[:, 0] * slope
            length = relaxation * slope / torch.where(curvature > 0.0, curvature, 1.0)
            length = torch.where((curvature > 0.0) & (length > 0.0), length, 1.0)
        else:
            length = torch.full_like(value, step)
        at = _Point(u, pushed, value, active)
        u, pushed, value, active = _line_search(gram, vector, at, p, length, slope, backtracking)
        iterations += active
    return SphereSolution(u, iterations, converged)


class _Point(NamedTuple):
    """Points with their products Gu and values, and which elements go on (of a line search: which found one)."""

    u: Tensor
    pushed: Tensor
    value: Tensor
    active: Tensor


def _line_search(
    gram: Tensor, vector: Tensor, at: _Point, p: Tensor, length: Tensor, slope: Tensor, backtracking: bool
) -> _Point:
    u, pushed, value, searching = at
    # Values have rounding errors, and close to a minimum that is all that they differ by.
    rounding = 8 * torch.finfo(u.dtype).eps * ((u * pushed).sum(-1).abs() + (u * vector).sum(-1).abs())
    for _ in range(_HALVINGS if backtracking else 1):
        trial = normalised(at.u + length[:, None] * p)
        trial_pushed = product(gram, trial)
        trial_value = half_quadratic(trial, trial_pushed, vector)
        good = searching
        if backtracking:
            good = searching & (trial_value <= at.value + rounding - 1e-4 * length * slope)
        u = torch.where(good[:, None], trial, u)
        pushed = torch.where(good[:, None], trial_pushed, pushed)
        value = torch.where(good, trial_value, value)
        searching = searching & ~good
        if not searching.any():
            break
        length = torch.where(searching, 0.5 * length, length)
    return _Point(u, pushed, value, at.active & ~searching)


_HALVINGS = 40
