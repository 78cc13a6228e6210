"""The blind perspective-n-point example: scenes, losses, gradients end to end, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lpgd
from examples.blind_pnp import train
from examples.blind_pnp.data import draw
from examples.blind_pnp.model import BlindPose, correspondence_loss, pose_errors, pose_loss


def scenes(count: int = 4, points: int = 8, **options: float):
    return draw(count, points, torch.Generator().manual_seed(0), **options)


def test_bearings_are_those_of_their_points_and_outliers_have_none():
    exact = scenes(noise=0.0)
    rotation, shift = lpgd.nodes.PerspectivePose.split(exact.pose)
    p = exact.world @ rotation.mT + shift[:, None]
    torch.testing.assert_close(exact.bearings, exact.pairs @ torch.nn.functional.normalize(p, dim=-1))
    assert (p[..., 2] > 0).all()
    some = scenes(noise=0.0, outliers=0.25)
    assert some.pairs.sum((-2, -1)).tolist() == [6.0] * 4
    assert not torch.equal(exact.pairs[0], torch.eye(8, dtype=torch.float64))


def test_true_pairs_give_the_true_pose():
    exact, model = scenes(noise=0.0), BlindPose(width=4, depth=1)
    torch.testing.assert_close(model.fit(exact, exact.pairs / 8), exact.pose, atol=1e-9, rtol=0)
    assert correspondence_loss(exact.pairs / 8, exact.pairs).tolist() == pytest.approx([0.0] * 4)


def test_losses_know_angles_and_distances_and_bear_lost_scenes():
    truth = torch.zeros(2, 6, dtype=torch.float64)
    pose = torch.tensor([[0.3, 0, 0, 0, 0.4, 0.3], [torch.nan] * 6], dtype=torch.float64, requires_grad=True)
    angle, distance = pose_errors(pose[:1], truth[:1])
    assert float(angle.detach()) == pytest.approx(0.3)
    assert float(distance.detach()) == pytest.approx(0.5)
    (gradient,) = torch.autograd.grad(pose_loss(pose, truth).sum(), pose)
    assert torch.isfinite(gradient).all()
    assert not gradient[1].any()


def test_the_pose_loss_reaches_every_weight_through_both_layers():
    model, some = BlindPose(width=8, depth=2), scenes(noise=0.005)
    plan, pose = model(some)
    assert pose is not None
    pose_loss(pose, some.pose).sum().backward()
    assert all(bool(part.grad is not None and part.grad.isfinite().all()) for part in model.parameters())
    assert all(bool(part.grad.any()) for name, part in model.named_parameters() if "bias" not in name)
    # Along the plan's own gradient the loss falls: differences of the pose layer agree with it.
    plan = plan.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(pose_loss(model.fit(some, plan), some.pose).sum(), plan)
    step = 1e-7 / float(gradient.norm())
    with torch.no_grad():
        ahead, behind = (pose_loss(model.fit(some, plan + sign * step * gradient), some.pose).sum() for sign in (1, -1))
    assert float((ahead - behind) / (2 * step)) == pytest.approx(float(gradient.square().sum()), rel=1e-3)


def test_the_command_runs_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--points", "6", "--steps", "3", "--pose-steps", "2", "--tests", "3", "--out", str(tmp_path)]
    assert train.main(flags) == 0
    assert "with the pose loss" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["model"] for row in results["rows"]} == {"start", "pairs on", "power", "pose", "true pairs"}
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    before = torch.load(tmp_path / "pose.pt", weights_only=True)
    assert train.main([*flags, "--resume"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]
    torch.testing.assert_close(torch.load(tmp_path / "pose.pt", weights_only=True), before)
    with pytest.raises(SystemExit):
        train.parse_arguments(["--points", "3"])
