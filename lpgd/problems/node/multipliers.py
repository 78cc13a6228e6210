"""Which inequalities hold with equality at a point, and the multipliers that fit it best, in batches.

A node's solver need not know multipliers.  Those of a solution y solve ``∇f + [Dh; Dg]ᵀ (ν, λ) = 0`` over the active
rows: here in the least-squares sense of least norm, with rows dropped whose λ would be negative.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.problems.base import maximum_norm
from lpgd.problems.node.problem import NodeProblem

__all__ = ["LARGE", "active_rows", "estimate_multipliers"]

LARGE = 2**26
"""Matrices of more numbers than this, for the whole batch, are not formed."""

SMALL = 1e-2
"""Data that are all smaller are in units of their own."""

SLOW = 2**17
"""A matrix of more numbers than this has a slow pseudo-inverse."""


def active_rows(problem: NodeProblem, x: Tensor, lam: Tensor | None = None, tolerance: float | None = None) -> Tensor:
    """(B, r) whether each inequality is active: ``g ≥ -tolerance (1 + |y|)``, or its multiplier exceeds ``-g``.

    Where y and all inputs are small (``SMALL``), the limit is what a change of y by ``tolerance`` times the largest of
    them does to g: the same whatever the units are.

    Args:
        problem: B elements.
        x: (B, n) minimisers.
        lam: (B, r) multipliers, where they are known.
        tolerance: None is the square root of the dtype's precision: 1.5e-8 in float64, 3.5e-4 in float32.
    """
    g = problem.constraints(x)[1]
    reach = torch.finfo(x.dtype).eps ** 0.5 if tolerance is None else tolerance
    near = g >= -reach * _sizes(problem, x, g)
    return near if lam is None else near | (lam > -g)


def _sizes(problem: NodeProblem, x: Tensor, g: Tensor) -> Tensor:
    """(B, 1) or (B, r) the sizes of y, or of inequalities, by which their activity is measured."""
    length = maximum_norm(x)[:, None]
    sizes = 1 + length
    inputs = torch.stack([datum.detach().abs().reshape(len(x), -1).amax(-1) for datum in problem.data if datum.numel()])
    scale = torch.maximum(length, inputs.amax(0)[:, None])
    small = (scale > 0) & (scale < SMALL)
    if not g.shape[-1] or not small.any() or x.shape[0] * g.shape[-1] * x.shape[-1] > LARGE:
        return sizes
    slopes = problem.jacobian(x).detach()[:, -g.shape[-1] :].abs().sum(-1)
    return torch.where(small, scale * slopes.clamp(max=1.0), sizes)


def estimate_multipliers(problem: NodeProblem, x: Tensor) -> tuple[Tensor, Tensor]:
    """``ν`` (B, p) and ``λ ≥ 0`` (B, r) at these minimisers."""
    h, g = problem.constraints(x)
    p, count = h.shape[-1], h.shape[-1] + g.shape[-1]
    if not count or not x.shape[0]:
        return torch.zeros_like(h), torch.zeros_like(g)
    problem, unit = problem.in_units(x)
    slope = torch.func.grad(lambda x: problem.objective(x).sum())(x)
    keep = torch.cat([torch.ones_like(h, dtype=torch.bool), active_rows(problem, x)], -1)
    large = x.shape[0] * count * x.shape[-1] > LARGE or count * x.shape[-1] > SLOW
    jacobian = None if large else problem.jacobian(x)
    multipliers = x.new_zeros(keep.shape)
    for _ in range(g.shape[-1] + 1):
        if jacobian is None:
            multipliers = _conjugate_gradients(problem, x, slope, keep)
        else:
            inverse = linalg.pinv(jacobian * keep[..., None])  # (B, n, p + r)
            multipliers = -(slope[:, None] @ inverse)[:, 0]
        lam = multipliers[:, p:]
        noise = 100 * torch.finfo(x.dtype).eps * (1 + maximum_norm(multipliers)[:, None])
        wrong = keep[:, p:] & (lam < -noise)
        if not wrong.any():
            break
        # One at a time, as the others' may change their signs; of many, those that are nearly as wrong.
        share = 0.5 if large else 1.0
        worst = wrong & (lam <= share * torch.where(wrong, lam, 0).amin(-1, keepdim=True))
        keep[:, p:] &= ~worst
    return unit * multipliers[:, :p], unit * multipliers[:, p:].clamp(min=0)


def _conjugate_gradients(problem: NodeProblem, x: Tensor, slope: Tensor, keep: Tensor) -> Tensor:
    """The least-squares multipliers by conjugate gradients on the normal equations, without the Jacobian."""
    transposed = problem.jacobian_product(x)
    forward = torch.func.vjp(transposed, x.new_zeros(keep.shape))[1]
    weight = keep.to(x.dtype)
    multipliers = x.new_zeros(keep.shape)
    residual = -weight * forward(slope)[0]
    direction, size = residual, residual.square().sum(-1, keepdim=True)
    enough = size * torch.finfo(x.dtype).eps ** 2
    for _ in range(2 * keep.shape[-1]):
        if (size <= enough).all():
            break
        image = weight * forward(transposed(weight * direction))[0]
        curvature = (direction * image).sum(-1, keepdim=True)
        moving = (curvature > 0) & (size > enough)
        step = torch.where(moving, size / curvature, 0)
        multipliers = multipliers + step * direction
        residual = residual - step * image
        new = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(moving, new / size, 0) * direction
        size = torch.where(moving, new, torch.zeros_like(new))
    return multipliers
