"""Train on terrain maps: ``python -m examples.shortest_path.train --help``; what is written and why is in README.md."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from .data import Maps, generate_maps
from .grid import path_costs
from .model import LEAST_COST, METHODS, PathModel, hamming_distance

__all__ = ["Trainer", "held_out_maps", "main", "parse_arguments", "training_maps"]

TRAINING, HELD_OUT = 0, 1  # part of the maps' seeds, so that no held-out map is a training map
TOLERANCE = 1e-9  # relative, by which a path that costs as little as the cheapest may seem to cost more
BATCH_OF_TESTS = 100


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.shortest_path.train",
        description="Learn the costs of terrain from images and cheapest paths, through Dijkstra's algorithm.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    names = ", ".join(f"{name} ({title})" for name, title in METHODS.items())
    parser.add_argument(
        "--methods", help=f"which to run: {names}", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD"
    )
    parser.add_argument("--size", help="side of a map, in cells", type=int, default=12)
    parser.add_argument("--train-size", help="training maps", type=int, default=4000)
    parser.add_argument("--test-size", help="held-out maps", type=int, default=500)
    parser.add_argument("--data-seed", help="seed of the maps", type=int, default=0)
    parser.add_argument("--epochs", help="passes over the training maps", type=int, default=12)
    parser.add_argument("--batch-size", help="maps in a step", type=int, default=32)
    parser.add_argument(
        "--lr", help="step size of Adam at the start; it falls to 0 by a cosine", type=float, default=3e-3
    )
    parser.add_argument(
        "--tau", help=f"perturbation of a cell's cost, at most {LEAST_COST:g}", type=float, default=LEAST_COST
    )
    parser.add_argument("--channels", help="of the network's first layer, a multiple of 4", type=int, default=16)
    parser.add_argument("--seeds", help="of network and order of maps: a run each", type=int, nargs="+", default=[0])
    parser.add_argument("--out", help="folder of the runs", type=Path, default=Path("runs/shortest_path"))
    parser.add_argument("--overwrite", help="start again where --out already holds runs", action="store_true")
    options = parser.parse_args(arguments)
    for name in ("size", "train_size", "test_size", "epochs", "batch_size", "lr", "tau", "channels"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be positive.")
    if options.size < 2:
        parser.error(f"--size is {options.size}; a path needs maps of at least 2 × 2 cells.")
    if options.tau > LEAST_COST:
        parser.error(f"--tau is {options.tau}; above {LEAST_COST:g}, the least cost of a cell, costs become negative.")
    if options.channels % 4:
        parser.error(f"--channels is {options.channels}; it must be a multiple of 4.")
    return options


def training_maps(options: argparse.Namespace) -> Maps:
    return generate_maps(options.train_size, options.size, options.size, (options.data_seed, TRAINING))


def held_out_maps(options: argparse.Namespace) -> Maps:
    return generate_maps(options.test_size, options.size, options.size, (options.data_seed, HELD_OUT))


class Trainer:
    """Trains one model by Adam, and measures it on held-out maps before the first and after every epoch.

    Args:
        model: the model.
        train, test: the maps.
        folder: gets ``metrics.jsonl``, and at the end ``model.pt`` and ``costs.npy``.
        epochs, batch_size, lr, seed: of the training; the seed shuffles the maps.
    """

    def __init__(
        self,
        model: PathModel,
        train: Maps,
        test: Maps,
        folder: Path,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        seed: int,
    ) -> None:
        self.model, self.test, self.folder = model, test, folder
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.images, self.paths = torch.from_numpy(train.images), torch.from_numpy(train.paths).float()
        self.costs = torch.from_numpy(train.costs).float()
        self.test_images = torch.from_numpy(test.images)
        self.steps_per_epoch = -(-len(train) // batch_size)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * self.steps_per_epoch)
        self.step = 0
        self.seconds, self.forward_seconds, self.backward_seconds = 0.0, 0.0, 0.0

    def fit(self) -> dict[str, Any]:
        """Train, and return the last line of the metrics."""
        last = self.evaluate()
        with tqdm(total=self.epochs * self.steps_per_epoch, unit="batch", desc=self.model.method) as bar:
            for epoch in range(self.epochs):
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))
                for start in range(0, len(order), self.batch_size):
                    self.train_step(torch.from_numpy(order[start : start + self.batch_size]), bar)
                last = self.evaluate()
                bar.set_postfix(optimal=f"{last['optimal']:.3f}", excess=f"{last['excess']:.4f}")
        torch.save(self.model.state_dict(), self.folder / "model.pt")
        np.save(self.folder / "costs.npy", self.predicted_costs().numpy())
        return last

    def train_step(self, chosen: Tensor, bar: tqdm[Any]) -> None:
        started = time.perf_counter()
        images, paths = self.images[chosen], self.paths[chosen]
        answers = None if self.model.two_stage else self.model(images)
        solved = time.perf_counter()
        if answers is None:
            loss = self.model.two_stage_loss(images, self.costs[chosen], paths)
        else:
            loss = hamming_distance(answers, paths).sum()
        self.optimizer.zero_grad()
        before_backward = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        # A two-stage method's forward pass is its loss.
        self.forward_seconds += (before_backward if answers is None else solved) - started
        self.backward_seconds += ended - before_backward
        self.seconds += time.perf_counter() - started
        if answers is None:
            self.write("train", loss=loss.item())
        else:
            moved = answers.info.gradients[-1].moved  # pyright: ignore[reportAttributeAccessIssue]
            self.write("train", loss=loss.item() / len(chosen), moved=float(moved.double().mean()))
        bar.update()

    def predicted_costs(self) -> Tensor:
        """The costs of the held-out maps' cells as the network sees them."""
        with torch.no_grad():
            return torch.cat([self.model.costs(part) for part in self.test_images.split(BATCH_OF_TESTS)])

    def evaluate(self) -> dict[str, Any]:
        """Measure on the held-out maps, and return what is written."""
        answers = self.model.layer.solve(self.predicted_costs()).x.reshape(self.test.paths.shape).numpy()
        return self.write("test", **measures(answers, self.test))

    def write(self, split: str, **values: float) -> dict[str, Any]:
        line = {
            "step": self.step,
            "epoch": self.step / self.steps_per_epoch,
            "split": split,
            **values,
            "seconds": round(self.seconds, 4),
            "forward_seconds": round(self.forward_seconds, 4),
            "backward_seconds": round(self.backward_seconds, 4),
        }
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def measures(answers: NDArray[np.float64], maps: Maps) -> dict[str, float]:
    """How good paths are, by the true costs.

    Returns:
        ``optimal``, the share of maps whose path costs as little as the cheapest; ``excess``, by how much of the least
        cost paths cost more, a mean; ``hamming``, in how many cells they differ from the maps' paths, a mean.
    """
    ratios = path_costs(maps.costs, answers) / path_costs(maps.costs, maps.paths)
    return {
        "optimal": float((ratios <= 1 + TOLERANCE).mean()),
        "excess": float(ratios.mean() - 1),
        "hamming": float(np.abs(answers - maps.paths).sum((-2, -1)).mean()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(arguments)
    folders = {
        (method, seed): options.out / method / f"seed-{seed}" for method in options.methods for seed in options.seeds
    }
    for folder in folders.values():
        if folder.exists() and not options.overwrite:
            raise SystemExit(f"{folder} holds a run: --overwrite starts again, --out names another folder.")
    print(f"Generating {options.train_size} training and {options.test_size} held-out maps ...", flush=True)
    train, test = training_maps(options), held_out_maps(options)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    for (method, seed), folder in folders.items():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({**config, "method": method, "seed": seed}, indent=2) + "\n")
        model = PathModel(method, options.size, options.size, options.tau, options.channels, seed)
        settings = {name: getattr(options, name) for name in ("epochs", "batch_size", "lr")}
        Trainer(model, train, test, folder, **settings, seed=seed).fit()
    from .plot import plot_all, results_table

    print(results_table(options.out))
    for path in plot_all(options.out, test):
        print(f"Plot: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
