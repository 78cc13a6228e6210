"""Scenes: random points of the world, a camera, and where the points are seen, in an unknown order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import lpgd

__all__ = ["DISTANCE", "Scenes", "draw"]

DISTANCE = 4.0
"""Of the camera from the middle of the points, about."""


class Scenes(NamedTuple):
    """B scenes of N points.

    Attributes:
        bearings: (B, N, 3) unit vectors towards what is seen, in random order, with errors and outliers.
        world: (B, N, 3) points in the cube from -1 to 1.
        pose: (B, 6) axis-angle and translation.
        pairs: (B, N, N) one where bearing i is world point j's; outliers have none.
    """

    bearings: Tensor
    world: Tensor
    pose: Tensor
    pairs: Tensor


def draw(
    count: int, points: int, generator: torch.Generator, noise: float = 0.005, outliers: float = 0.0, turn: float = 0.6
) -> Scenes:
    """Draw scenes.

    Args:
        count: B.
        points: N.
        generator: of all that is random.
        noise: standard deviation of image points of focal length one.
        outliers: share of the bearings that are directions of nothing, within the image.
        turn: largest angle of the rotation, in radians, about a random axis.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1

    world = uniform(count, points, 3)
    axis = torch.nn.functional.normalize(normal(count, 3), dim=-1)
    shift = torch.cat([0.3 * uniform(count, 2), DISTANCE + 0.3 * uniform(count, 1)], -1)
    pose = torch.cat([turn * uniform(count, 1) * axis, shift], -1)
    rotation, _ = lpgd.nodes.PerspectivePose.split(pose)
    p = world @ rotation.mT + shift[:, None]
    image = p[..., :2] / p[..., 2:] + noise * normal(count, points, 2)
    false = torch.zeros(count, points, dtype=torch.bool)
    false[:, : round(outliers * points)] = True  # the order of the points says nothing
    image = torch.where(false[..., None], 0.35 * uniform(count, points, 2), image)
    order = torch.rand(count, points, generator=generator).argsort(-1)  # bearing i is that of point order[i]
    image = torch.gather(image, 1, order[..., None].expand(-1, -1, 2))
    pairs = torch.nn.functional.one_hot(order, points).double() * (~false)[:, None].double()
    bearings = torch.nn.functional.normalize(torch.cat([image, torch.ones_like(image[..., :1])], -1), dim=-1)
    return Scenes(bearings, world, pose, pairs)
