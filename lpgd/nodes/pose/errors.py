"""Errors of reprojection as functions of points in the camera's frame, with their derivatives.

A pose takes a point X of the world to ``p = R X + t`` in the camera's frame.  Its error, for one point and weight w:

    of image points u,  q = ((K p)_1, (K p)_2) / (K p)_3:    ½ w |q - u|²
    of bearings b,  n = p/|p|:                              ½ w |b - n|²,  which is  w (½ + ½|b|² - bᵀn)

With weights for all pairs (i, j), the sum over i of ``½ w_ij |q_j - u_i|²`` is ``½ w_j |q_j - u_j|²`` and a constant,
with ``w_j = Σ_i w_ij`` and the mean ``u_j = Σ_i w_ij u_i / w_j``; of bearings the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Curvature", "Sight", "pose_system"]


class Curvature(NamedTuple):
    """Derivatives of each point's error in p: slope (B, N, 3), Hessian and its Gauss-Newton part (B, N, 3, 3)."""

    slope: Tensor
    hessian: Tensor
    gauss: Tensor


class Sight(NamedTuple):
    """What is seen of which points, B elements of N points.

    Attributes:
        target: (B, N, 2) image points, or (B, N, 3) bearings.
        world: (B, N, 3) points of the world.
        weights: (B, N).
        camera: (B, 3, 3) K of image points, or None where it is the identity.
    """

    target: Tensor
    world: Tensor
    weights: Tensor
    camera: Tensor | None = None

    def select(self, elements: Tensor) -> Sight:
        """The batch of these elements."""
        camera = None if self.camera is None else self.camera[elements]
        return Sight(self.target[elements], self.world[elements], self.weights[elements], camera)

    def seen(self, rotation: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """``R X`` and ``p = R X + t``, (B, N, 3) each."""
        turned = self.world @ rotation.mT
        return turned, turned + shift[:, None]

    @property
    def is_image(self) -> bool:
        return self.target.shape[-1] == 2

    def in_front(self, p: Tensor) -> Tensor:
        """(B,) whether all points that have a weight are in front of the camera; bearings see all around."""
        if not self.is_image:
            return torch.ones_like(p[:, 0, 0], dtype=torch.bool)
        return ((self._imaged(p)[..., 2] > 0) | (self.weights == 0)).all(-1)

    def value(self, p: Tensor) -> Tensor:
        """The sum of errors, (B,)."""
        return 0.5 * (self.weights * self._difference(p).square().sum(-1)).sum(-1)

    def slope(self, p: Tensor) -> Tensor:
        """The derivative of :meth:`value` in p, (B, N, 3)."""
        e, weights = self._difference(p), self.weights[..., None]
        if self.is_image:
            return weights * (e[..., None, :] @ self._image_derivative(p))[..., 0, :]
        size, n = _direction(p)
        return weights * (e - (e * n).sum(-1, keepdim=True) * n) / size

    def curvature(self, p: Tensor) -> Curvature:
        """Slope and second derivatives."""
        e, weights = self._difference(p), self.weights[..., None, None]
        if self.is_image:
            derivative = self._image_derivative(p)  # (B, N, 2, 3)
            gauss = weights * derivative.mT @ derivative
            slope = weights[..., 0] * (e[..., None, :] @ derivative)[..., 0, :]
            last = self._imaged_axis(p) / self._depth(p)
            mixed = slope[..., :, None] * last[..., None, :]
            return Curvature(slope, gauss - mixed - mixed.mT, gauss)
        size, n = _direction(p)
        tangent = torch.eye(3, dtype=p.dtype, device=p.device) - n[..., :, None] * n[..., None, :]
        # The second derivative of -bᵀn is (b nᵀ + n bᵀ + (bᵀn)(I - 3 n nᵀ)) / |p|², with b = n - e.
        b = self.target
        along = (b * n).sum(-1)[..., None, None]
        mixed = b[..., :, None] * n[..., None, :]
        square = size[..., None].square()
        hessian = (mixed + mixed.mT + along * (tangent - 2 * n[..., :, None] * n[..., None, :])) / square
        slope = weights[..., 0] * (e - (e * n).sum(-1, keepdim=True) * n) / size
        return Curvature(slope, weights * hessian, weights * tangent / square)

    def _imaged(self, p: Tensor) -> Tensor:
        """``K p``."""
        return p if self.camera is None else p @ self.camera.mT

    def _depth(self, p: Tensor) -> Tensor:
        """(B, N, 1), 1 for points without a weight that have none, so that they count nothing."""
        depth = self._imaged(p)[..., 2:]
        return torch.where((depth == 0) & (self.weights == 0)[..., None], 1.0, depth)

    def _imaged_axis(self, p: Tensor) -> Tensor:
        """The third row of K."""
        if self.camera is not None:
            return self.camera[:, None, 2]
        return torch.eye(3, dtype=p.dtype, device=p.device)[2].expand(1, 1, 3)

    def _difference(self, p: Tensor) -> Tensor:
        if self.is_image:
            return self._imaged(p)[..., :2] / self._depth(p) - self.target
        return _direction(p)[1] - self.target

    def _image_derivative(self, p: Tensor) -> Tensor:
        """Dq (B, N, 2, 3): rows ``(K_k - q_k K_3) / depth``."""
        depth = self._depth(p)
        q = self._imaged(p)[..., :2] / depth
        camera = torch.eye(3, dtype=p.dtype, device=p.device)[None] if self.camera is None else self.camera
        rows = camera[:, None, :2] - q[..., None] * camera[:, None, 2:]
        return rows / depth[..., None]


def _direction(p: Tensor) -> tuple[Tensor, Tensor]:
    """``|p|`` (B, N, 1), 1 where it is zero, and ``p/|p|``."""
    square = p.square().sum(-1, keepdim=True)
    size = torch.where(square > 0, square, 1.0).sqrt()
    return size, p / size


def pose_system(sight: Sight, turned: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slope (B, 6), Hessian and Gauss-Newton matrix (B, 6, 6) of the sum in ``(δ, dt)``.

    R moves to ``exp([δ]) R`` and t to ``t + dt``.
    ``p`` moves by ``M (δ, dt) + ½ δ × (δ × a)``, with ``a = R X`` and ``M = [-[a], I]``, so that the Hessian is
    ``Σ Mᵀ G M`` and, for the rotation, ``Σ ½ (g aᵀ + a gᵀ) - (a · g) I`` of the slopes g.
    """
    g, hessian, approximate = sight.curvature(p)

    def assembled(G: Tensor) -> Tensor:
        moved = torch.cat([_columns_crossed(turned, G), G], -1)  # G M
        upper = torch.cross(turned[..., None], moved, dim=-2)  # -[a]ᵀ = [a]
        return torch.cat([upper.sum(1), moved.sum(1)], -2)

    slope = torch.cat([torch.cross(turned, g, dim=-1).sum(1), g.sum(1)], -1)
    outer = (g.mT @ turned).mT
    turn = 0.5 * (outer + outer.mT)
    turn = turn - outer.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] * torch.eye(3, dtype=p.dtype, device=p.device)
    whole = assembled(hessian)
    whole = whole + torch.nn.functional.pad(turn, (0, 3, 0, 3))
    return slope, whole, assembled(approximate)


def _columns_crossed(a: Tensor, G: Tensor) -> Tensor:
    """``-G [a]``: each row r of G becomes ``a × r``, as ``rᵀ(δ × a) = (a × r)ᵀδ``."""
    return torch.cross(a[..., None, :].expand_as(G), G, dim=-1)
