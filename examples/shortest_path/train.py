"""Train on terrain maps: ``python -m examples.shortest_path.train --help``; what is written and why is in README.md."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from examples.runs import Ranks, Run, interruption, leave

from .data import Maps, generate_maps
from .grid import path_costs
from .model import LEAST_COST, METHODS, PathModel, hamming_distance

__all__ = ["Trainer", "held_out_maps", "main", "parse_arguments", "training_maps"]

TRAINING, HELD_OUT = 0, 1  # part of the maps' seeds, so that no held-out map is a training map
TOLERANCE = 1e-9  # relative, by which a path that costs as little as the cheapest may seem to cost more
BATCH_OF_TESTS = 100
# A run can be resumed only with the same values of these.
IDENTITY = (
    "size",
    "train_size",
    "test_size",
    "data_seed",
    "epochs",
    "batch_size",
    "lr",
    "tau",
    "channels",
    "processes",
)


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
    parser.add_argument(
        "--checkpoint-seconds", help="seconds between checkpoints within an epoch", type=float, default=30.0
    )
    parser.add_argument("--out", help="folder of the runs", type=Path, default=Path("runs/shortest_path"))
    parser.add_argument("--resume", help="continue the runs in --out, if there are any", action="store_true")
    parser.add_argument("--overwrite", help="start again where --out already holds runs", action="store_true")
    options = parser.parse_args(arguments)
    for name in ("size", "train_size", "test_size", "epochs", "batch_size", "lr", "tau", "channels"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be positive.")
    if options.size < 2:
        parser.error(f"--size is {options.size}; a path needs maps of at least 2 × 2 cells.")
    if options.tau > LEAST_COST:
        parser.error(f"--tau is {options.tau}; above {LEAST_COST:g}, the least cost of a cell, costs become negative.")
    if options.resume and options.overwrite:
        parser.error("--resume and --overwrite contradict each other.")
    if options.channels % 4:
        parser.error(f"--channels is {options.channels}; it must be a multiple of 4.")
    return options


def training_maps(options: argparse.Namespace) -> Maps:
    return generate_maps(options.train_size, options.size, options.size, (options.data_seed, TRAINING))


def held_out_maps(options: argparse.Namespace) -> Maps:
    return generate_maps(options.test_size, options.size, options.size, (options.data_seed, HELD_OUT))


class Trainer:
    """Trains one model by Adam, and measures it on held-out maps before the first and after every epoch.

    The order of the maps in an epoch depends on (seed, epoch) only; together with the checkpoint (model, optimiser,
    schedule, clocks, position) a resumed run takes the very steps that an uninterrupted one takes.  Of several
    processes each takes its share of a batch, and all make the step of the sum of their gradients.

    Args:
        model: the model.
        train, test: the maps.
        run: its folder gets ``metrics.jsonl`` and ``checkpoint.pt``, and at the end ``model.pt`` and ``costs.npy``.
        epochs, batch_size, lr, seed: of the training; the seed shuffles the maps.
        checkpoint_seconds: after which there is a checkpoint within an epoch.
    """

    def __init__(
        self,
        model: PathModel,
        train: Maps,
        test: Maps,
        run: Run,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        checkpoint_seconds: float,
        seed: int,
    ) -> None:
        self.model, self.test, self.run, self.ranks = model, test, run, run.ranks
        self.epochs, self.batch_size, self.seed = epochs, batch_size, seed
        self.checkpoint_seconds = checkpoint_seconds
        self.images, self.paths = torch.from_numpy(train.images), torch.from_numpy(train.paths).float()
        self.costs = torch.from_numpy(train.costs).float()
        self.test_images = torch.from_numpy(test.images)
        self.steps_per_epoch = -(-len(train) // batch_size)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs * self.steps_per_epoch)
        self.step = 0
        self.clocks = {"seconds": 0.0, "forward_seconds": 0.0, "backward_seconds": 0.0}
        if run.checkpoint is not None:
            self.load_state(run.checkpoint)

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "clocks": dict(self.clocks),
            "step": self.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.clocks, self.step = dict(state["clocks"]), state["step"]

    def fit(self) -> bool:
        """Train; False if Ctrl-C ended it early, after the step under way and a checkpoint."""
        first, total = self.ranks.is_first, self.epochs * self.steps_per_epoch
        if self.run.checkpoint is None and first:
            self.evaluate()
            self.run.save(self.state())
        saved = time.perf_counter()
        bar = tqdm(total=total, initial=self.step, unit="batch", desc=self.model.method, disable=not first)
        with interruption(self.ranks) as received, bar:
            while self.step < total:
                epoch, position = divmod(self.step, self.steps_per_epoch)
                order = np.random.default_rng((self.seed, epoch)).permutation(len(self.images))
                chosen = torch.from_numpy(order[position * self.batch_size : (position + 1) * self.batch_size])
                # All processes end with the same step, whichever of them heard of it.
                interrupted = self.train_step(chosen, received)
                bar.update()
                ended = self.step % self.steps_per_epoch == 0
                if ended and first:
                    last = self.evaluate()
                    bar.set_postfix(optimal=f"{last['optimal']:.3f}", excess=f"{last['excess']:.4f}")
                if ended or interrupted or time.perf_counter() - saved > self.checkpoint_seconds:
                    self.run.save(self.state())
                    saved = time.perf_counter()
                if interrupted:
                    return False
        if first:
            torch.save(self.model.state_dict(), self.run.folder / "model.pt")
            np.save(self.run.folder / "costs.npy", self.predicted_costs().numpy())
        return True

    def train_step(self, chosen: Tensor, received: list[int]) -> bool:
        """One step; whether a process had ``received`` an interrupt by then."""
        started = time.perf_counter()
        own = self.ranks.share(chosen)
        self.optimizer.zero_grad()
        loss, moved, clocks = self.gradients(own, len(own) / len(chosen))
        self.ranks.add_gradients(self.model.parameters())
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        found = self.ranks.gathered((loss, moved, bool(received)))
        for name, seconds in clocks.items():
            self.clocks[name] += seconds
        self.clocks["seconds"] += time.perf_counter() - started
        total = sum(part for part, _, _ in found)
        if self.model.two_stage:
            self.write("train", loss=total)
        else:
            self.write("train", loss=total / len(chosen), moved=sum(part for _, part, _ in found) / len(chosen))
        return any(heard for _, _, heard in found)

    def gradients(self, chosen: Tensor, weight: float) -> tuple[float, float, dict[str, float]]:
        """The gradients of some maps' part of the loss: that part, how many paths moved, and times."""
        if not len(chosen):
            return 0.0, 0.0, {}
        started = time.perf_counter()
        images, paths = self.images[chosen], self.paths[chosen]
        answers = None if self.model.two_stage else self.model(images)
        solved = time.perf_counter()
        if answers is None:
            loss = weight * self.model.two_stage_loss(images, self.costs[chosen], paths)
        else:
            loss = hamming_distance(answers, paths).sum()
        before_backward = time.perf_counter()
        loss.backward()
        ended = time.perf_counter()
        clocks = {  # a two-stage method's forward pass is its loss
            "forward_seconds": (before_backward if answers is None else solved) - started,
            "backward_seconds": ended - before_backward,
        }
        moved = 0.0
        if answers is not None:
            record = answers.info.gradients[-1].moved  # pyright: ignore[reportAttributeAccessIssue]
            moved = float(record.double().sum())
        return loss.item(), moved, clocks

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
            **{name: round(seconds, 4) for name, seconds in self.clocks.items()},
        }
        self.run.write_metrics(**line)
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
    """Run the command; 0, or 130 after Ctrl-C."""
    options = parse_arguments(arguments)
    with Ranks.joined() as ranks:
        test = held_out_maps(options)
        try:
            finished = _train_all(options, test, ranks)
        except KeyboardInterrupt:
            finished = False
    if (status := ranks.exit_status(finished)) is not None:
        return status
    from .plot import plot_all, results_table

    print(results_table(options.out))
    for path in plot_all(options.out, test):
        print(f"Plot: {path}")
    return 0


def _train_all(options: argparse.Namespace, test: Maps, ranks: Ranks) -> bool:
    """A run for each method and seed; False if Ctrl-C ended one."""
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    runs: dict[tuple[str, int], Run] = {}
    for method in options.methods:
        for seed in options.seeds:
            own = {**config, "method": method, "seed": seed, "processes": ranks.count}
            choice = {"resume": options.resume, "overwrite": options.overwrite}
            runs[method, seed] = Run(
                options.out / method / f"seed-{seed}", own, (*IDENTITY, "method", "seed"), **choice, ranks=ranks
            )
    if ranks.is_first:
        print(f"Generating {options.train_size} training and {options.test_size} held-out maps ...", flush=True)
    train = training_maps(options)
    settings = {name: getattr(options, name) for name in ("epochs", "batch_size", "lr", "checkpoint_seconds")}
    for (method, seed), run in runs.items():
        model = PathModel(method, options.size, options.size, options.tau, options.channels, seed)
        if not Trainer(model, train, test, run, **settings, seed=seed).fit():
            return False
    return True


if __name__ == "__main__":
    leave(main())
