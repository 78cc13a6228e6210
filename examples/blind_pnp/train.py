"""Learn correspondences for poses: ``python -m examples.blind_pnp.train --help``; README.md says more."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Scenes, draw
from .model import BlindPose, correspondence_loss, pose_errors, pose_loss

__all__ = ["NOISES", "OUTLIERS", "main", "parse_arguments"]

NOISES, OUTLIERS = (0.0, 0.005, 0.01, 0.02, 0.05), (0.0, 0.1, 0.2, 0.3, 0.5)
NOISE = 0.005
"""Of scenes with outliers."""
STAGES = ("pairs", "pairs on", "pose")
TITLES = {
    "start": "before training",
    "pairs": "half-way, by pairs",
    "pairs on": "by pairs alone",
    "power": "by pairs, that power",
    "pose": "with the pose loss",
    "true pairs": "true pairs",
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.blind_pnp.train",
        description="Learn which points are which, through optimal transport and the pose of the camera.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--points", type=int, default=10, help="points of a scene")
    parser.add_argument("--turn", type=float, default=0.6, help="largest angle of the camera, in radians")
    parser.add_argument("--steps", type=int, default=1000, help="steps by pairs alone, batches of 64")
    parser.add_argument("--pose-steps", type=int, default=300, help="steps of each of the two ways on, batches of 32")
    parser.add_argument("--pose-weight", type=float, default=0.3, help="weight of the pose loss")
    parser.add_argument("--lr", type=float, default=2e-3, help="step size of Adam at the start of a stage")
    parser.add_argument("--tests", type=int, default=200, help="held-out scenes of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    parser.add_argument("--resume", action="store_true", help="keep the stages whose weights are in OUT")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/blind_pnp"), help="folder for weights, results and plots"
    )
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int | float) and name not in ("seed", "resume") and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be positive.")
    if options.points < 4:
        parser.error(f"--points is {options.points}; a pose needs at least 4.")
    return options


def train_stage(model: BlindPose, stage: str, options: argparse.Namespace) -> list[float]:
    """One stage, in place; returns the losses."""
    with_pose, steps = stage == "pose", options.steps if stage == "pairs" else options.pose_steps
    batch = 64 if stage == "pairs" else 32
    generator = torch.Generator().manual_seed(1000 * options.seed + 1 + (stage != "pairs"))
    rates = [
        {"params": [own for name, own in model.named_parameters() if name != "trust"], "lr": options.lr},
        {"params": [model.trust], "lr": 10 * options.lr},  # one number, of order one
    ]
    optimizer = torch.optim.Adam(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    with tqdm(range(steps), desc=TITLES[stage], unit="step", leave=False, disable=None) as bar:
        for _ in bar:
            noise, share = (float(torch.rand((), generator=generator)) for _ in range(2))
            scenes = draw(batch, options.points, generator, 0.02 * noise, 0.3 * share, options.turn)
            plan, pose = model(scenes, with_pose)
            loss = correspondence_loss(plan, scenes.pairs).mean()
            if pose is not None:
                loss = loss + options.pose_weight * pose_loss(pose, scenes.pose).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def evaluate(model: BlindPose | None, scenes: Scenes) -> dict[str, float]:
    """Medians of the pose errors, and the share of the mass on true pairs; without a model, for the true pairs."""
    with torch.no_grad():
        if model is None:
            known = scenes.pairs / scenes.pairs.sum((-2, -1), keepdim=True)
            plan, pose = known, BlindPose(width=1, depth=1).pose(scenes.bearings, scenes.world, known)
        else:
            plan, pose = model(scenes)
        assert isinstance(pose, Tensor)
        angle, distance = pose_errors(pose, scenes.pose)
    lost = ~angle.isfinite()
    angle, distance = (torch.where(lost, torch.inf, part) for part in (torch.rad2deg(angle), distance))
    right = 1 - correspondence_loss(plan, scenes.pairs)
    return {"angle": float(angle.median()), "distance": float(distance.median()), "right": float(right.mean())}


def evaluate_all(models: Mapping[str, BlindPose | None], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for each model, noise and share of outliers."""
    rows: list[dict[str, Any]] = []
    settings = [(noise, 0.0) for noise in NOISES] + [(NOISE, share) for share in OUTLIERS if share]
    with tqdm(settings, desc="evaluation", leave=False, disable=None) as bar:
        for noise, share in bar:
            generator = torch.Generator().manual_seed(1000 * options.seed + 7)
            scenes = draw(options.tests, options.points, generator, noise, share, options.turn)
            if scenes.pairs.sum((-2, -1)).min() < 4:
                continue
            for name, model in models.items():
                rows.append({"model": name, "noise": noise, "outliers": share, **evaluate(model, scenes)})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    models = {"start": BlindPose(seed=options.seed)}
    seconds: dict[str, float] = {}
    for stage in STAGES:
        model = BlindPose(seed=options.seed)
        path = options.out / f"{stage.replace(' ', '_')}.pt"
        if options.resume and path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
        else:
            if "pairs" in models:
                model.load_state_dict(models["pairs"].state_dict())
            started = time.perf_counter()
            train_stage(model, stage, options)
            seconds[stage] = time.perf_counter() - started
            torch.save(model.state_dict(), path)
        models[stage] = model
    # How much of the gain is the power of the plan alone?
    models["power"] = BlindPose(seed=options.seed)
    models["power"].load_state_dict(models["pairs on"].state_dict() | {"trust": models["pose"].trust.detach()})
    compared = {name: models[name] for name in ("start", "pairs on", "power", "pose")}
    rows = evaluate_all({**compared, "true pairs": None}, options)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    trust = float(models["pose"].trust.detach().exp())
    results = {"config": config, "seconds": seconds, "power of the plan": trust, "rows": rows}
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(_table(rows))
    print(f"power of the plan, learned by the pose loss: {trust:.2f}")
    from .plot import plot_results

    print(f"Curves: {plot_results(options.out)}")
    return 0


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':22} {'noise':>6} {'outliers':>8} {'angle':>8} {'distance':>9} {'mass on true pairs':>19}"]
    for row in rows:
        lines.append(
            f"{TITLES[row['model']]:22} {row['noise']:6} {row['outliers']:8} {row['angle']:7.2f}° "
            f"{row['distance']:9.3f} {row['right']:19.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
