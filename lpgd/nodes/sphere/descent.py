"""Descent methods for least squares on the unit sphere.

[PMaF] Xu, Wang, Liu, Gould: PMaF, Deep Declarative Layers for Principal Matrix Features (2023), section 2.1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.nodes.sphere.secular import SphereSolution, normalised, product

__all__ = ["Direction", "descend", "starting_points"]

Direction = Literal["gradient", "tangent", "decayed", "cosine"]


def starting_points(A: Tensor, b: Tensor) -> Tensor:
    """The least-squares solution scaled to length 1, (B, n); the first unit vector where it is zero."""
    found = linalg.lstsq(A, b[..., None]).solution[..., 0] if A.shape[-2] >= A.shape[-1] else _shortest(A, b)
    broken = ~torch.isfinite(found).all(-1)
    if broken.any():
        found = torch.where(broken[:, None], _shortest(A, b), found)
    return normalised(found)


def _shortest(A: Tensor, b: Tensor) -> Tensor:
    return product(linalg.pinv(A), b)


def descend(
    gram: Tensor,
    vector: Tensor,
    start: Tensor,
    *,
    direction: Direction = "tangent",
    step: float | None = None,
    relaxation: float = 0.9,
    backtracking: bool = True,
    decay: float = 0.9,
    max_iterations: int = 100,
    tolerance: float = 1e-7,
) -> SphereSolution:
    """A local minimum of ``f(u) = ½uᵀGu - cᵀu`` subject to |u| = 1, by projected descent from ``start``.

    An iteration goes along ``p = d - w u`` with d = -∇f(u), then back to the sphere: ``u ← (u + ηp) / |u + ηp|``.

    Args:
        gram: G, (B, n, n).
        vector: c, (B, n).
        start: (B, n), of length 1.
        direction: w, how much of the part along u is taken off: ``"gradient"`` none (projected gradient descent, PGD);
            ``"tangent"`` all of it, ``w = <d, u>`` (RM); ``"decayed"`` (tangent weight decay, TWD)
            ``w = decay^t <d, u>`` in iteration t; ``"cosine"`` (direction weight, DW) ``w = cos(d, u)``.
        step: η; None is the exact one ``<d, p> / (pᵀGp + <d, u>|p|²)``: the minimiser of f along p, where the second
            term is what the way back to the sphere adds to the curvature (without it steps overshoot).
        relaxation: factor of exact steps.  At 1 steepest descent zigzags; a little less halves its iterations.
        backtracking: halve η until f, on the sphere, decreases by 1e-4 of what its slope promises (BLS).
        decay: of TWD.
        max_iterations: limit.
        tolerance: of the tangential gradient relative to ``|Gu| + |c|``; at least 32 roundings.

    Returns:
        The solutions; each element stops on its own, where the tolerance is reached or nothing decreases f any more.
    """
    tolerance = max(tolerance, 32 * torch.finfo(gram.dtype).eps)
    batch = vector.shape[0]
    u = start
    pushed = product(gram, u)
    value = _half_quadratic(u, pushed, vector)
    iterations = torch.zeros(batch, dtype=torch.int64, device=gram.device)
    converged = torch.zeros(batch, dtype=torch.bool, device=gram.device)
    active = ~converged
    for iteration in range(max_iterations):
        d = vector - pushed
        along = (d * u).sum(-1, keepdim=True)
        tangential = d - along * u
        size = tangential.norm(dim=-1)
        converged = converged | (active & (size <= tolerance * (pushed.norm(dim=-1) + vector.norm(dim=-1))))
        active = active & ~converged
        if not active.any():
            break
        kept = along - _weight(direction, decay**iteration, d, along)
        p = tangential + kept * u
        slope = size.square()
        if step is None:
            curvature = (p * product(gram, p)).sum(-1) + along[:, 0] * p.square().sum(-1)
            promised = slope + (along * kept)[:, 0]  # <d, p>, which close to a solution would be lost in its terms
            length = relaxation * promised / torch.where(curvature > 0.0, curvature, 1.0)
            length = torch.where((curvature > 0.0) & (length > 0.0), length, 1.0)
        else:
            length = torch.full_like(value, step)
        at = _Point(u, pushed, value, active)
        u, pushed, value, active = _line_search(gram, vector, at, p, length, slope, backtracking)
        iterations += active
    return SphereSolution(u, iterations, converged)


def _weight(direction: Direction, decay: float, d: Tensor, along: Tensor) -> Tensor | float:
    if direction == "gradient":
        return 0.0
    if direction == "tangent":
        return along
    return decay * along if direction == "decayed" else along / d.norm(dim=-1, keepdim=True)


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
        trial_value = _half_quadratic(trial, trial_pushed, vector)
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


def _half_quadratic(u: Tensor, pushed: Tensor, vector: Tensor) -> Tensor:
    return (u * (0.5 * pushed - vector)).sum(-1)
