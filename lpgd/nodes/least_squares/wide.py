"""Wide ridge regression by its dual, whose unknowns are the residuals: they are small, and have all their digits there.

With more unknowns than rows, residuals are of the size of ridge / |A|², and so is what the rows see of a response that
is of the size 1 / ridge elsewhere: differences such as ``b - D y`` leave no digit of them where A is large.  With
``E = √w D P^(-1/2)`` over the columns that have a penalty p, ``e = √w`` for an intercept without one, and
``z = P^(1/2) y``, the minimiser of ``½|√w b - E z - e t|² + ½|z|² - <c, z> - c_t t`` has

    (I + E Eᵀ) r = √w b - E c - e t,   eᵀ r = -c_t,   z = Eᵀ r + c.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.nodes.least_squares.factored import Regression

__all__ = ["WideFactor", "differentiate_wide", "differentiate_wide_again", "is_wide", "solve_wide", "wide_factor"]


class WideFactor(NamedTuple):
    """What both passes need, each with B rows, or one for the whole batch.

    Attributes:
        triangle: (·, m, m), ``RᵀR = I + E Eᵀ``.
        rows: (·, m, n), E.
    """

    triangle: Tensor
    rows: Tensor


class _Found(NamedTuple):
    """y (B, n, k), r (B, m, k), and t (B, 1, k), zero where there is no intercept without a penalty."""

    y: Tensor
    residual: Tensor
    intercept: Tensor


def is_wide(data: Regression) -> bool:
    """Whether there are fewer rows than unknowns with a penalty."""
    return data.penalty is not None and data.design.shape[-2] < data.penalised


def wide_factor(data: Regression) -> WideFactor:
    """One QR factorisation; penalties of zero, which have no unique solution, count as one."""
    design, _, weights, penalty = data[:4]
    n = data.penalised
    rows = design[..., :n] * _scale(penalty, n)[:, None, :]
    if weights is not None:
        rows = weights.sqrt()[..., None] * rows
    identity = torch.eye(rows.shape[-2], dtype=rows.dtype, device=rows.device).expand(rows.shape[0], -1, -1)
    return WideFactor(linalg.qr(torch.cat([rows.mT, identity], -2), mode="r").R, rows)


def solve_wide(data: Regression, factor: WideFactor, linear: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The minimiser y (B, n, k) with a further term ``-<linear, y>``, and (B or 1,) whether it is the only one."""
    penalised = data.penalty if data.penalty is None else data.penalty[:, : data.penalised]
    assert penalised is not None
    return _minimiser(data, factor, data.targets, linear).y, (penalised > 0).all(-1)


def differentiate_wide(
    data: Regression, factor: WideFactor, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`~lpgd.nodes.least_squares.factored.differentiate_least_squares`.

    The response s is the minimiser for targets of zero and the cotangent for c, and ``√w D s`` the negative of its
    residuals.  Of the penalty's gradients there is the sum over all that are penalised, (B, 1), which are one number:
    their ``y·s`` is ``r·√w D s / p``, as ``eᵀ r = 0``, and is computed by the terms that cancel less.
    """
    design, targets, weights, penalty = data[:4]
    found = _minimiser(data, factor, targets, None)
    response = _minimiser(data, factor, torch.zeros_like(targets), cotangent)
    residual, moved = found.residual, -response.residual
    n = data.penalised
    ways = residual * moved * _scale(penalty, 1)[:, None] ** 2, found.y[:, :n] * response.y[:, :n]
    (dual, primal), sizes = (way.sum((-2, -1)) for way in ways), [way.abs().sum((-2, -1)) for way in ways]
    for_penalty = -torch.where(sizes[0] < sizes[1], dual, primal)[:, None]
    bare = residual, moved
    if weights is not None:
        root = weights.sqrt()[..., None]
        bare = tuple(
            torch.where(root > 0, tensor / root, direct)
            for tensor, direct in ((residual, targets - design @ found.y), (moved, design @ response.y))
        )
        residual, moved = root * residual, root * moved
    for_design = torch.baddbmm(residual @ response.y.mT, moved, found.y.mT, alpha=-1)
    return for_design, moved, (bare[0] * bare[1]).sum(-1), for_penalty


def differentiate_wide_again(data: Regression, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`differentiate_wide` as functions of data and cotangent c, for one penalty p of all.

    With ``B = √w D``, ``K = B Bᵀ + p``, ``u = K⁻¹(√w b - e t)`` and ``q = K⁻¹(B c + e τ)``, where ``eᵀu = 0`` and
    ``eᵀq = c_t``, residuals are ``p u`` and responses ``(c - Bᵀq)/p``: in their products the powers of p cancel, and

        dD = √w (u (c - Bᵀq)ᵀ - q (Bᵀu)ᵀ),   db = √w q,   dw = p u q / w,   dp = -u·q.

    Weights are positive.
    """
    design, targets, weights, penalty = data[:4]
    assert penalty is not None
    n = data.penalised
    p = torch.where(penalty > 0, penalty, 1.0)[:, :1, None]
    root = torch.ones_like(p) if weights is None else weights.sqrt()[..., None]
    with torch.no_grad():
        triangle = p.sqrt() * wide_factor(data).triangle
    rows, free = root * design[..., :n], root * torch.ones_like(design[..., :1])

    def inverse(right: Tensor) -> Tensor:
        # One step of refinement with a constant factor: nothing in value, and the derivative of the system's solution.
        found = _by_triangle(triangle, right).detach()
        return found + _by_triangle(triangle, right - p * found - rows @ (rows.mT @ found))

    u, q = inverse(root * targets), inverse(rows @ cotangent[:, :n])
    if data.free:
        toward = inverse(free)
        size = free.mT @ toward
        u = u - toward * ((free.mT @ u) / size)
        q = q + toward * ((cotangent[:, n:] - free.mT @ q) / size)
    left = cotangent[:, :n] - rows.mT @ q
    for_design = root * (u @ left.mT - q @ (rows.mT @ u).mT)
    for_design = torch.nn.functional.pad(for_design, (0, data.free))  # nobody asks for that of the intercept's ones
    return for_design, root * q, (p * u * q).sum(-1) / root[..., 0] ** 2, -(u * q).sum((-2, -1))[:, None]


def _minimiser(data: Regression, factor: WideFactor, targets: Tensor, linear: Tensor | None) -> _Found:
    weights, n = data.weights, data.penalised
    right = targets if weights is None else weights.sqrt()[..., None] * targets
    scale = _scale(data.penalty, n)[..., None]
    pull = None if linear is None else scale * linear[:, :n]
    if pull is not None:
        right = right - factor.rows @ pull
    residual, intercept = _inverse(factor, right), torch.zeros_like(right[:, :1])
    if data.free:
        free = _free(data)
        toward = _inverse(factor, free)
        wanted = (free.mT @ residual) if linear is None else (free.mT @ residual) + linear[:, n:]
        intercept = wanted / (free.mT @ toward)
        residual = residual - toward * intercept
    y = factor.rows.mT @ residual
    y = scale * (y if pull is None else y + pull)
    return _Found(torch.cat([y, intercept], 1) if data.free else y, residual, intercept)


def _inverse(factor: WideFactor, right: Tensor) -> Tensor:
    return _by_triangle(factor.triangle, right)


def _by_triangle(R: Tensor, right: Tensor) -> Tensor:
    """``R⁻¹ R⁻ᵀ right``."""
    return linalg.solve_triangular(R, linalg.solve_triangular(R.mT, right, upper=False), upper=True)


def _free(data: Regression) -> Tensor:
    """e, (·, m, 1)."""
    column = data.design[..., -1:]
    return column if data.weights is None else data.weights.sqrt()[..., None] * column


def _scale(penalty: Tensor | None, n: int) -> Tensor:
    """(·, n) ``P^(-1/2)``."""
    assert penalty is not None
    penalty = penalty[:, :n]
    return torch.where(penalty > 0, penalty, 1.0).rsqrt()
