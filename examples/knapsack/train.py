"""Learn weights and capacities from packings: ``python -m examples.knapsack.train --help``; README.md says more."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import lpgd

from .baseline import COSTS, two_stage
from .data import Orders, Truth, make_truth, observe
from .model import METHODS, KnapsackModel, integer_layer, layer_of, packing_loss, reproduced

__all__ = ["Experiment", "main", "parse_arguments"]

STEP, PROBED = 1e-7, 20
"""Size of the finite differences that show the exact gradient, and how many training orders they are taken on."""
BURN_IN, IDLE = 0.3, 20
"""From this share of the steps on weights are averaged; a run ends after so many steps without any gradient."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.knapsack.train",
        description="Learn the weights and capacities of an integer program from observed solutions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="gradients to train with")
    parser.add_argument("--items", type=int, default=20, help="items of an order")
    parser.add_argument("--vans", type=int, default=3, help="vans, each with a capacity of its own")
    parser.add_argument("--train-size", type=int, default=200, help="observed orders to learn from")
    parser.add_argument("--validation-size", type=int, default=100, help="observed orders to choose by")
    parser.add_argument("--test-size", type=int, default=200, help="held-out orders")
    parser.add_argument("--noise", type=float, default=0.1, help="relative error of the values that are known")
    parser.add_argument("--tau", type=float, default=1.0, help="perturbation strength of LPGD")
    parser.add_argument("--lr", type=float, default=0.05, help="step size of Adam")
    parser.add_argument("--steps", type=int, default=200, help="steps of Adam")
    parser.add_argument("--batch-size", type=int, default=16, help="orders in a step")
    parser.add_argument("--tests", type=int, default=5, help="evaluations of a run")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the truth and of the orders")
    parser.add_argument("--seed", type=int, default=0, help="seed of the start and of the order of the batches")
    parser.add_argument("--restarts", type=int, default=3, help="runs of each method, with seeds SEED, SEED + 1, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/knapsack"), help="folder for results and plots")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int | float) and name not in ("noise", "seed", "data_seed") and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be positive.")
    return options


class Experiment:
    """The data of one command, and what every method is measured by.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.truth = make_truth(options.items, options.vans, options.data_seed)
        seeds = 10 * options.data_seed + np.arange(3)
        self.train = observe(self.truth, options.train_size, options.noise, int(seeds[0]) + 1)
        self.validation = observe(self.truth, options.validation_size, options.noise, int(seeds[1]) + 1)
        # Held-out values are exact, so that the truth reproduces every packing.
        self.test = observe(self.truth, options.test_size, 0.0, int(seeds[2]) + 1)
        self.solver = integer_layer(options.items, lpgd.LPGD(tau=options.tau))
        self.metrics: list[dict[str, Any]] = []

    def packings(self, orders: Orders, rules: Truth) -> torch.Tensor:
        """(B, n) best packings under these weights and capacities."""
        with torch.no_grad():
            (packings,) = self.solver(orders.values, rules.weights, rules.capacities[orders.vans])
        return packings

    def share(self, orders: Orders, rules: Truth) -> float:
        """The share of packings reproduced."""
        return float(reproduced(self.packings(orders, rules), orders.packings).double().mean())

    def baseline(self, exchanges: bool) -> float:
        """Test share of the two-stage baseline, whose cost is chosen on the validation orders."""
        fits = [two_stage(self.train, self.options.vans, exchanges, cost) for cost in COSTS]
        return self.share(self.test, max(fits, key=lambda rules: self.share(self.validation, rules)))

    def exact_gradient(self, model: KnapsackModel) -> float:
        """The largest difference quotient of the first training packings, over all learned numbers."""
        orders = self.train.select(torch.arange(min(PROBED, len(self.train))))
        rules = _rules(model)
        before, largest = self.packings(orders, rules), 0.0
        for part in rules.weights, rules.capacities:
            for entry in range(part.numel()):
                part[entry] += STEP
                moved = (self.packings(orders, rules) - before).abs().max()
                largest = max(largest, float(moved) / STEP)
                part[entry] -= STEP
        return largest

    def fit(self, method: str, seed: int) -> dict[str, Any]:
        """Train from one start, and average; what is kept is best on the validation orders.

        Single steps go back and forth, as observations contradict each other; the average of what they pass is steady.
        """
        options = self.options
        model = KnapsackModel(options.items, options.vans, seed)
        layer = layer_of(method, options.items, options.tau)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
        average = AveragedModel(model)
        generator = torch.Generator().manual_seed(seed)
        training, idle = 0.0, 0
        best: dict[str, Any] = {"validation": -1.0}
        name = f"{method}, seed {seed}"
        every = max(options.steps // options.tests, 1)
        with tqdm(total=options.steps, desc=name, unit="step", leave=False, disable=None) as bar:
            for step in range(options.steps + 1):
                if step % every == 0 or step == options.steps:
                    rules = _rules(average.module if average.n_averaged else model)
                    shares = {"validation": self.share(self.validation, rules), "test": self.share(self.test, rules)}
                    row = {"method": method, "seed": seed, "step": step, "seconds": training, **shares}
                    self.metrics.append(row)
                    bar.set_postfix(test=f"{shares['test']:.2f}")
                    if shares["validation"] > best["validation"]:
                        best = row
                if step == options.steps or idle == IDLE:
                    break
                before = time.perf_counter()
                batch = self.train.select(torch.randint(len(self.train), (options.batch_size,), generator=generator))
                packings = model(layer, batch.values, batch.vans)
                squares = (packings - batch.packings).square().sum()
                loss = squares if method == "relaxed" else packing_loss(packings, batch.packings)
                optimizer.zero_grad()
                loss.backward()
                idle = 0 if any(part.grad is not None and part.grad.any() for part in model.parameters()) else idle + 1
                optimizer.step()
                if step >= BURN_IN * options.steps:
                    average.update_parameters(model)
                training += time.perf_counter() - before
                bar.update()
        return {**best, "train_seconds": training}


def _rules(model: Any) -> Truth:
    return Truth(model.weights.detach().clone(), model.capacities.detach().clone())


def _table(results: dict[str, Any]) -> str:
    lines = [f"{'':34} {'held-out packings reproduced':>30} {'s/run':>7}"]
    for name, row in results.items():
        shares = np.array(row["shares"])
        spread = f"{shares.mean():.3f} ({shares.min():.3f} to {shares.max():.3f})" if shares.size > 1 else ""
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        lines.append(f"{name:34} {spread or f'{shares.mean():.3f}':>30} {seconds:>7}")
    return "\n".join(lines)


TITLES = {
    "lower": "LPGD lower, relaxation's duals",
    "average": "LPGD average, relaxation's duals",
    "upper": "LPGD upper, relaxation's duals",
    "fixed": "LPGD lower, integers fixed",
    "relaxed": "exact gradients of the relaxation",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(arguments)
    experiment = Experiment(options)
    seeds = range(options.seed, options.seed + options.restarts)
    models = [KnapsackModel(options.items, options.vans, seed) for seed in seeds]
    start = [experiment.share(experiment.test, _rules(model)) for model in models]
    results: dict[str, Any] = {
        "truth": {"shares": [experiment.share(experiment.test, experiment.truth)]},
        "start, and exact gradient": {
            "shares": start,
            "largest difference quotient": max(experiment.exact_gradient(model) for model in models),
        },
        "two-stage, one item more": {"shares": [experiment.baseline(exchanges=False)]},
        "two-stage, and exchanges": {"shares": [experiment.baseline(exchanges=True)]},
    }
    for method in options.methods:
        runs = [experiment.fit(method, seed) for seed in seeds]
        seconds = float(np.mean([run["train_seconds"] for run in runs]))
        results[TITLES[method]] = {"shares": [run["test"] for run in runs], "seconds": seconds}
        print(f"{TITLES[method]}: {np.mean(results[TITLES[method]]['shares']):.3f}", flush=True)

    options.out.mkdir(parents=True, exist_ok=True)
    config = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    (options.out / "results.json").write_text(json.dumps({"config": config, "results": results}, indent=2) + "\n")
    (options.out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in experiment.metrics))
    quotient = results["start, and exact gradient"]["largest difference quotient"]
    print(
        f"\nLargest difference quotient of a packing at the start, steps of {STEP:g}: {quotient:g}\n{_table(results)}"
    )
    from .plot import plot_results

    print(f"\nCurves: {plot_results(options.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
