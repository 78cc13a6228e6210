"""The nearest minimum of the reprojection error: Newton's method with Levenberg and Marquardt's damping, in batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.nodes.pose.errors import Sight, pose_system
from lpgd.nodes.pose.rotations import rotation_matrix

__all__ = ["Refined", "positive_definite", "refine", "values_at"]

ENOUGH = 1e-11
"""A slope that is so small, relative to that of errors as large as the image points, is zero."""
SINGULAR = 1e-12
"""Curvatures that are so small, with unknowns in units in which they are about one, are zero."""


class Refined(NamedTuple):
    """Where the descents of B elements ended.

    Attributes:
        rotation: (B, 3, 3).
        shift: (B, 3).
        value: (B,) the sum of errors; infinite where the start has points behind the camera.
        converged: (B,) the slope is zero, to rounding.
        regular: (B,) the Hessian is positive definite there.
        iterations: (B,).
    """

    rotation: Tensor
    shift: Tensor
    value: Tensor
    converged: Tensor
    regular: Tensor
    iterations: Tensor

    def select(self, elements: Tensor) -> Refined:
        return Refined(*(values[elements] for values in self))


def values_at(sight: Sight, rotation: Tensor, shift: Tensor) -> Tensor:
    """The sums of errors at poses (B, 3, 3) and (B, 3), infinite with a weighted point behind the camera: (B,)."""
    p = sight.seen(rotation, shift)[1]
    value = sight.value(p)
    return torch.where(sight.in_front(p) & value.isfinite(), value, torch.inf)


def refine(sight: Sight, rotation: Tensor, shift: Tensor, max_iterations: int = 100) -> Refined:
    """Descend from poses (B, 3, 3) and (B, 3); points that have a weight stay in front of the camera.

    Each step solves with the Hessian, with the absolute values of its curvatures where it is not positive definite, and
    a multiple of the identity, which shrinks after a step that descends as promised and grows after one that does not.
    The unknowns are in units in which the Gauss-Newton matrix has a diagonal of one.  Where values no longer tell steps
    apart, full steps go on as long as they halve the slope.
    """
    R, t = rotation.clone(), shift.clone()
    value = values_at(sight, R, t)
    damping = torch.full_like(value, 1e-3)
    before = torch.full_like(value, torch.inf)  # the slope's size before a full step of the end
    iterations = torch.zeros(len(t), dtype=torch.int64, device=t.device)
    noise = torch.finfo(value.dtype).eps ** 2 * _unit(sight)
    going = rows_where(torch.isfinite(value))
    for _ in range(max_iterations):
        if not len(going) or is_over():
            break
        sights = sight if len(going) == len(t) else sight.select(going)
        turned, p = sights.seen(R[going], t[going])
        steepness, step, expected = _step(sights, turned, p, damping[going])
        ended = (steepness >= 0.5 * before[going]) | (steepness == 0) | (damping[going] > 1e12)
        new_R, new_t = rotation_matrix(step[:, :3]) @ R[going], t[going] + step[:, 3:]
        new = values_at(sights, new_R, new_t)
        known = value[going]
        ending = expected <= 100 * torch.finfo(value.dtype).eps * known + 100 * noise[going]
        better = (new < known) | (ending & torch.isfinite(new))
        before[going] = torch.where(ending & better, steepness, torch.inf)
        new_damping = damping[going]
        good, shrunk = known - new > 0.5 * expected, torch.where(new_damping > 1e-9, 0.1 * new_damping, 0.0)
        new_damping = torch.where(better, torch.where(good, shrunk, new_damping), 10 * new_damping.clamp(min=1e-4))
        damping[going] = torch.where(ending & better, 0.0, new_damping)
        iterations[going] += 1
        moving = better & ~ended
        chosen = going[moving]
        R[chosen], t[chosen], value[chosen] = new_R[moving], new_t[moving], new[moving]
        going = going[~ended]
    return _judged(sight, R, t, value, iterations)


def _step(sight: Sight, turned: Tensor, p: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The size of the slope (B,), the step (B, 6), and what it promises to descend, at least (B,)."""
    slope, hessian, gauss = pose_system(sight, turned, p)
    hessian, scale = _equilibrated(hessian, gauss)
    slope = slope * scale
    factor, failed = linalg.cholesky_ex(hessian + torch.diag_embed(damping[:, None].expand_as(scale)))
    bent = rows_where(failed > 0)
    if len(bent):
        factor[bent] = torch.eye(6, dtype=p.dtype, device=p.device)
    step = -torch.cholesky_solve(slope[..., None], factor)[..., 0]
    if len(bent):
        values, vectors = linalg.eigh(hessian[bent])
        along = linalg.matvec(vectors.mT, slope[bent]) / (values.abs() + damping[bent, None]).clamp(min=1e-10)
        step[bent] = -linalg.matvec(vectors, along)
    return slope.square().sum(-1).sqrt(), step * scale, -0.5 * (slope * step).sum(-1)


def _judged(sight: Sight, R: Tensor, t: Tensor, value: Tensor, iterations: Tensor) -> Refined:
    """Whether the ends are minima."""
    turned, p = sight.seen(R, t)
    slope, hessian, gauss = pose_system(sight, turned, p)
    scale = _equilibrated(hessian, gauss)[1]
    steepness = (slope * scale).square().sum(-1).sqrt()
    valid = torch.isfinite(value)
    converged = valid & (steepness <= ENOUGH * _unit(sight).sqrt())
    return Refined(R, t, value, converged, valid & positive_definite(hessian, gauss), iterations)


def positive_definite(hessian: Tensor, gauss: Tensor) -> Tensor:
    """(B,) whether Hessians (B, 6, 6) have no curvature that is negative, or zero to rounding."""
    hessian = _equilibrated(hessian, gauss)[0]
    unit = torch.eye(6, dtype=hessian.dtype, device=hessian.device)
    return linalg.cholesky_ex(hessian - SINGULAR * unit).info == 0


def _equilibrated(hessian: Tensor, gauss: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian in units in which the Gauss-Newton matrix has a diagonal of one, and these units (B, 6)."""
    diagonal = gauss.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    return hessian * scale[:, :, None] * scale[:, None, :], scale


def _unit(sight: Sight) -> Tensor:
    """(B,) a sum of errors as large as what is seen itself, the unit of what counts as zero."""
    seen = sight.target.square().sum(-1)
    return (sight.weights * (seen + seen.amax(-1, keepdim=True))).sum(-1)
