"""Point features, a transport plan between bearings and points, and the pose that fits it."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

import lpgd

from .data import DISTANCE, Scenes

__all__ = ["BlindPose", "Found", "correspondence_loss", "pose_errors", "pose_loss"]


class Found(NamedTuple):
    """Plans (B, N, N), which sum to one, and poses (B, 6); NaN where there is none, None where none was asked for."""

    plan: Tensor
    pose: Tensor | None


class BlindPose(nn.Module):
    """Features of both sets of points, with what they see of their own set and of the other; then two layers of lpgd.

    Args:
        width: of the features.
        depth: of the network, at least 1.
        gamma: how sharp plans are (1/γ is the weight of the entropy).
        seed: of the weights.
    """

    def __init__(self, width: int = 64, depth: int = 4, gamma: float = 10.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.ModuleList([nn.Linear(2, width), nn.Linear(5, width)])
        self.mixing = nn.ModuleList(
            nn.ModuleList([nn.Sequential(nn.Linear(3 * width, width), nn.LayerNorm(width)) for _ in range(2)])
            for _ in range(depth)
        )
        self.last = nn.ModuleList([nn.Linear(width, width + 1) for _ in range(2)])
        self.transport = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma=gamma), on_error="nan")
        # Bearings: their errors have bounds, so that pairs which are still uncertain do no harm.
        self.pose = lpgd.NodeLayer(lpgd.nodes.PerspectivePose("bearings", all_pairs=True), on_error="nan")
        self.float()
        self.trust = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, scenes: Scenes, pose: bool = True) -> Found:
        plan = self._plan(scenes)
        return Found(plan, self.fit(scenes, plan) if pose else None)

    def fit(self, scenes: Scenes, plan: Tensor) -> Tensor:
        """(B, 6) the poses that fit plans, raised to a power that only a loss of the pose can learn."""
        return self.pose(scenes.bearings, scenes.world, (scenes.world.shape[-2] * plan) ** self.trust.exp())

    def _plan(self, scenes: Scenes) -> Tensor:
        image = scenes.bearings[..., :2] / scenes.bearings[..., 2:]
        near = scenes.world + torch.tensor([0.0, 0.0, DISTANCE], dtype=torch.float64)  # as an unturned camera sees it
        seen = [4 * image, torch.cat([scenes.world, 4 * near[..., :2] / near[..., 2:]], -1)]
        features = [torch.relu(layer(part.float())) for layer, part in zip(self.first, seen, strict=True)]
        for layers in self.mixing:
            means = [part.amax(-2, keepdim=True).expand_as(part) for part in features]
            both = zip(cast(nn.ModuleList, layers), features, means, means[::-1], strict=True)
            features = [own + torch.relu(layer(torch.cat([own, mean, other], -1))) for layer, own, mean, other in both]
        ends = [layer(part).double() for layer, part in zip(self.last, features, strict=True)]
        left, right = (nn.functional.normalize(part[..., :-1], dim=-1) for part in ends)
        rows, columns = ((2 * part[..., -1].tanh()).softmax(-1) for part in ends)  # a point of no match weighs less
        cost = 1 - left @ right.mT
        return self.transport(cost, rows, columns).nan_to_num()  # no mass where the plan was not found


def correspondence_loss(plan: Tensor, pairs: Tensor) -> Tensor:
    """(B,) the mass of plans on pairs that are wrong."""
    return 1 - (plan * pairs).sum((-2, -1))


def pose_errors(pose: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) the angle between rotations, in radians, and the distance of translations."""
    (R, t), (true_R, true_t) = (lpgd.nodes.PerspectivePose.split(part) for part in (pose, truth))
    half = (R - true_R).square().sum((-2, -1)).clamp(min=1e-20).sqrt() / 8**0.5  # the sine of half the angle
    return 2 * half.clamp(max=1 - 1e-9).asin(), (t - true_t).square().sum(-1).clamp(min=1e-20).sqrt()


def pose_loss(pose: Tensor, truth: Tensor) -> Tensor:
    """(B,) logarithms of angle and distance, so that scenes that are lost do not drown the others; 0 for no pose."""
    angle, distance = pose_errors(torch.where(pose.isfinite(), pose, truth), truth)
    return torch.log1p(angle / 0.02) + torch.log1p(distance / 0.05)
