"""Poses to start from: a search over all rotations, or OpenCV's RANSAC.

The search minimises the object-space error, a quadratic form in rotation and translation: with unit vectors b_i towards
what is seen,

    Σ_ij w_ij |(I - b_i b_iᵀ)(R X_j + t)|² = Σ_j (R X_j + t)ᵀ V_j (R X_j + t),   V_j = Σ_i w_ij (I - b_i b_iᵀ).

Its best translation is linear in R, and leaves ``rᵀ Ω r`` of the entries r of R (Terzakis and Lourakis 2020), whatever
the number of points.  It is evaluated for rotations all around, and minimised from the lowest of them.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import FloatArray, from_numpy
from lpgd.nodes.pose.rotations import cross_matrix, rotation_matrix, spread_rotations
from lpgd.status import MissingPackageError

__all__ = ["Poses", "by_ransac", "search"]

GRID = 384
"""So many rotations are looked at: any is within about 30 degrees of one of them."""
REFINED = 16
"""So many of them are where the object-space error is minimised from."""


class Poses(NamedTuple):
    """k poses for each of B elements, lowest errors first: (B, k, 3, 3) and (B, k, 3), NaN where there are no more."""

    rotation: Tensor
    shift: Tensor


class _Form(NamedTuple):
    """``rᵀ Ω r`` of points with mean zero and size one, and the way back."""

    omega: Tensor  # (B, 9, 9)
    shift: Tensor  # (B, 3, 9), the translation from r
    mean: Tensor  # (B, 3)
    size: Tensor  # (B,)


def search(world: Tensor, blur: Tensor, count: int) -> Poses:
    """``count`` local minima of the object-space error, of points (B, N, 3) and their matrices V (B, N, 3, 3)."""
    form = _form(world, blur)
    grid = _grid().to(world)
    values = torch.einsum("gi,bij,gj->bg", grid.flatten(1), form.omega, grid.flatten(1))
    chosen = values.topk(REFINED, largest=False).indices
    R, errors = _descend(form.omega, grid[chosen])
    order, others = _distinct(R, errors, count)
    R = torch.gather(R, 1, order[:, :, None, None].expand(-1, -1, 3, 3))
    shift = linalg.matvec(form.shift[:, None], R.flatten(2)) * form.size[:, None, None]
    shift = shift - linalg.matvec(R, form.mean[:, None])
    return Poses(R, torch.where(others[..., None], shift, torch.nan))


@cache
def _grid() -> Tensor:
    return spread_rotations(GRID)


def _form(world: Tensor, blur: Tensor) -> _Form:
    share = blur.diagonal(dim1=-2, dim2=-1).sum(-1)
    total = share.sum(-1)
    share = share / torch.where(total > 0, total, 1.0)[:, None]
    mean = (share[..., None] * world).sum(1)
    X = world - mean[:, None]
    size = (share * X.square().sum(-1)).sum(-1).sqrt()
    size = torch.where(size > 0, size, 1.0)
    X = X / size[:, None, None]
    blur = blur / torch.where(total > 0, total, 1.0)[:, None, None, None]
    batch = len(world)
    mixed = torch.einsum("bnij,bnk->bijk", blur, X).reshape(batch, 3, 9)
    whole = torch.einsum("bnij,bnk,bnl->bikjl", blur, X, X).reshape(batch, 9, 9)
    unit = torch.eye(3, dtype=X.dtype, device=X.device)
    shift = -linalg.solve_ex(blur.sum(1) + 1e-12 * unit, mixed).result
    return _Form(whole + mixed.mT @ shift, shift, mean, size)


def _descend(omega: Tensor, R: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Damped Newton steps for ``rᵀ Ω r`` over rotations, from k of them (B, k, 3, 3), and the errors (B, k)."""
    unit = torch.eye(3, dtype=R.dtype, device=R.device)
    basis = cross_matrix(unit)

    def value(R: Tensor) -> tuple[Tensor, Tensor]:
        r = R.flatten(2)
        gradient = r @ omega  # (B, k, 9)
        return (gradient * r).sum(-1), gradient

    error, gradient = value(R)
    damping = torch.full_like(error, 1e-3)
    for _ in range(iterations):
        moved = (basis @ R[:, :, None]).flatten(-2)  # (B, k, 3, 9): how the entries move with each turn
        slope = linalg.matvec(moved, gradient)
        outer = gradient.unflatten(-1, (3, 3)) @ R.mT
        bent = 0.5 * (outer + outer.mT) - outer.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] * unit
        gauss = moved @ omega[:, None] @ moved.mT
        trace = gauss.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None]
        values, vectors = linalg.eigh(gauss + bent)
        along = linalg.matvec(vectors.mT, slope) / (values.abs() + damping[..., None] * trace).clamp(min=1e-300)
        step = -linalg.matvec(vectors, along)
        turned = rotation_matrix(step) @ R
        turned_error, turned_gradient = value(turned)
        better = turned_error < error
        R = torch.where(better[..., None, None], turned, R)
        error = torch.where(better, turned_error, error)
        gradient = torch.where(better[..., None], turned_gradient, gradient)
        damping = torch.where(better, 0.1 * damping, 10 * damping)
    return R, error


def _distinct(R: Tensor, errors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The indices (B, count) of the lowest errors of rotations that are not within 0.05 of one another.

    And whether there are so many, (B, count).
    """
    left, chosen, known = errors.clone(), list[Tensor](), list[Tensor]()
    for _ in range(count):
        lowest, best = left.min(-1)
        chosen.append(best)
        known.append(lowest.isfinite())
        best_rotation = torch.gather(R, 1, best[:, None, None, None].expand(-1, 1, 3, 3))
        near = (R - best_rotation).square().sum((-2, -1)) < 0.005  # the distance is √8 |sin(angle/2)|
        left = torch.where(near, torch.inf, left)
    return torch.stack(chosen, 1), torch.stack(known, 1)


def by_ransac(
    seen: FloatArray, world: FloatArray, weights: FloatArray, threshold: float
) -> tuple[Tensor, Tensor] | None:
    """The pose of one element by ``cv2.solvePnPRansac``, or None where it finds none.

    Args:
        seen: (N, 3) vectors towards what is seen; only those in front of the camera can serve.
        world: (N, 3).
        weights: (N,); those below a tenth of the largest do not take part.
        threshold: an inlier's largest distance, in image points of focal length 1.

    Raises:
        MissingPackageError: OpenCV is not installed.
    """
    cv2 = _opencv()
    used = (weights >= 0.1 * weights.max(initial=0.0)) & (weights > 0) & (seen[:, 2] > 1e-6)
    if used.sum() < 4:
        return None
    image = np.ascontiguousarray(seen[used, :2] / seen[used, 2:])
    points = np.ascontiguousarray(world[used])
    # OpenCV 5.0 draws from a generator with a fixed seed: equal data give equal poses.
    found, turn, shift, _ = cv2.solvePnPRansac(
        points, image, np.eye(3), None, iterationsCount=1000, reprojectionError=threshold, confidence=0.9999,
        flags=cv2.SOLVEPNP_SQPNP if used.sum() > 4 else cv2.SOLVEPNP_AP3P,
    )  # fmt: skip
    if not found or not (np.isfinite(turn).all() and np.isfinite(shift).all()):
        return None
    return rotation_matrix(from_numpy(turn[:, 0])), from_numpy(shift[:, 0])


def _opencv() -> Any:
    try:
        return importlib.import_module("cv2")
    except ImportError as error:
        raise MissingPackageError(
            "PerspectivePose(start='ransac') needs a package: pip install opencv-python-headless, or lpgd with its "
            'extra: pip install "lpgd[pose]"; start="search" needs none.'
        ) from error
