"""Rotations of space as vectors: the direction of ω is the axis, its length the angle (the exponential map of SO(3)).

With ``θ = |ω|`` and ``[ω]`` the matrix of ``v ↦ ω × v``,

    exp([ω]) = I + A [ω] + B [ω]²,     J(ω) = I + B [ω] + C [ω]²,
    A = sin θ / θ,   B = (1 - cos θ) / θ²,   C = (θ - sin θ) / θ³,

where J tells how the rotation turns as ω moves: ``exp([ω + dω]) = exp([J dω]) exp([ω])`` to first order.  A, B and C
are functions of θ², analytic at zero; J is regular for θ < 2π.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["axis_angle", "cross_matrix", "nearest_turn", "rotation_matrix", "spread_rotations", "turning"]


class _Coefficients(NamedTuple):
    A: Tensor
    B: Tensor
    C: Tensor


def _coefficients(omega: Tensor) -> _Coefficients:
    """A, B and C of vectors (*, 3), (*, 1, 1) each: series up to θ = 1, so that derivatives are exact there too."""
    square = omega.square().sum(-1)[..., None, None]
    near = square < 1.0
    small, theta = torch.where(near, square, 0.0), torch.where(near, 1.0, square).sqrt()
    far = _Coefficients(theta.sin() / theta, (1 - theta.cos()) / theta.square(), (theta - theta.sin()) / theta.pow(3))
    coefficients: list[Tensor] = []
    for offset, closed in enumerate(far, start=1):
        series = torch.zeros_like(small)
        for k in range(10, -1, -1):
            series = (-1) ** k / math.factorial(2 * k + offset) + small * series
        coefficients.append(torch.where(near, series, closed))
    return _Coefficients(*coefficients)


def cross_matrix(vector: Tensor) -> Tensor:
    """The matrix (*, 3, 3) of ``v ↦ vector × v``."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((zero, -z, y), (z, zero, -x), (-y, x, zero))]
    return torch.stack(rows, -2)


def rotation_matrix(omega: Tensor) -> Tensor:
    """``exp([ω])``: (*, 3) to (*, 3, 3)."""
    cross, (A, B, _) = cross_matrix(omega), _coefficients(omega)
    return torch.eye(3, dtype=omega.dtype, device=omega.device) + A * cross + B * (cross @ cross)


def turning(omega: Tensor) -> Tensor:
    """J(ω), (*, 3, 3)."""
    cross, (_, B, C) = cross_matrix(omega), _coefficients(omega)
    return torch.eye(3, dtype=omega.dtype, device=omega.device) + B * cross + C * (cross @ cross)


def axis_angle(rotation: Tensor) -> Tensor:
    """The ω of rotations (B, 3, 3) with ``|ω| ≤ π``, by the quaternion, which keeps all digits at any angle."""
    r = rotation
    trace = r[:, 0, 0] + r[:, 1, 1] + r[:, 2, 2]
    # Row k is 4 q_k q: the one with the largest diagonal entry loses nothing.
    off = [r[:, 2, 1] - r[:, 1, 2], r[:, 0, 2] - r[:, 2, 0], r[:, 1, 0] - r[:, 0, 1]]
    rows = [torch.stack([1 + trace, *off], -1)]
    for k in range(3):
        entries = [off[k]]
        entries += [1 - trace + 2 * r[:, k, k] if other == k else r[:, k, other] + r[:, other, k] for other in range(3)]
        rows.append(torch.stack(entries, -1))
    products = torch.stack(rows, 1)  # (B, 4, 4)
    best = products.diagonal(dim1=-2, dim2=-1).argmax(-1)
    q = products[torch.arange(len(r), device=r.device), best]
    q = q / q.square().sum(-1, keepdim=True).sqrt()
    q = torch.where(q[:, :1] < 0, -q, q)
    length = q[:, 1:].square().sum(-1, keepdim=True).sqrt()
    half = torch.atan2(length, q[:, :1])
    return torch.where(length > 0, 2 * half / torch.where(length > 0, length, 1), 2.0) * q[:, 1:]


def nearest_turn(omega: Tensor, reference: Tensor) -> Tensor:
    """Of ω and ``ω (1 - 2π/|ω|)``, which are one rotation, the one that is nearer to a reference: (B, 3)."""
    length = omega.square().sum(-1, keepdim=True).sqrt()
    other = omega - omega * (2 * math.pi / torch.where(length > 0, length, 1))
    nearer = (other - reference).square().sum(-1, keepdim=True) < (omega - reference).square().sum(-1, keepdim=True)
    return torch.where(nearer & (length > 0), other, omega)


def spread_rotations(count: int) -> Tensor:
    """``count`` rotations that cover SO(3) evenly, (count, 3, 3): a spiral of quaternions (Alexa 2022)."""
    s = torch.arange(count, dtype=torch.float64) + 0.5
    t = s / count
    alpha, beta = 2 * math.pi * s / math.sqrt(2), 2 * math.pi * s / 1.533751168755204288118041
    inner, outer = t.sqrt(), (1 - t).sqrt()
    x, y, z, w = inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()
    vector = torch.stack([x, y, z], -1)
    cross, unit = cross_matrix(vector), torch.eye(3, dtype=torch.float64)
    # q acts as (w² - |v|²) I + 2 v vᵀ + 2 w [v]
    scale = (w.square() - vector.square().sum(-1))[:, None, None]
    return scale * unit + 2 * vector[:, :, None] * vector[:, None, :] + 2 * w[:, None, None] * cross
