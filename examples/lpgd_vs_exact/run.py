"""Train with every gradient method and compare: ``python -m examples.lpgd_vs_exact.run --help``."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import lpgd

from .model import CURVATURE, DecisionModel, Task, decision_loss, make_task, two_stage_loss

__all__ = ["METHODS", "gradient_method", "main", "summary", "train"]

METHODS = ("exact", "small", "average", "lower", "upper")
"""Implicit differentiation; LPGD with the step that it chooses; LPGD's three envelopes with a step that is given."""


def gradient_method(name: str, tau: float, rho: float) -> Any:
    """The gradient method of a name in ``METHODS``."""
    if name == "exact":
        return lpgd.ImplicitKKT()
    return lpgd.LPGD() if name == "small" else lpgd.LPGD(tau, rho, name)  # type: ignore[arg-type]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.lpgd_vs_exact.run",
        description="Learn the costs and limits of a program from its solutions, by LPGD and by exact gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--problems", nargs="+", choices=tuple(CURVATURE), default=list(CURVATURE), help="what to solve"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="gradient methods")
    parser.add_argument("--tau", type=float, help="τ; without it the best of a sweep at the start")
    parser.add_argument("--rho", type=float, default=0.0, help="ρ")
    parser.add_argument("--steps", type=int, default=300, help="steps of Adam for each method")
    parser.add_argument("--batch-size", type=int, default=32, help="solutions in a step")
    parser.add_argument("--lr", type=float, default=0.02, help="step size of Adam")
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("--train-size", type=int, default=512, help="solutions to learn from")
    parser.add_argument("--test-size", type=int, default=512, help="held-out solutions")
    parser.add_argument("--seed", type=int, default=0, help="of the task and the order of the batches")
    parser.add_argument("--out", type=Path, default=Path("runs/lpgd_vs_exact"), help="folder for metrics and plots")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "lr", "every", "train_size", "test_size"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be positive.")
    if options.batch_size > options.train_size:
        parser.error(f"--batch-size is {options.batch_size} and there are {options.train_size} solutions.")
    return options


def choose_tau(task: Task, batch_size: int, rho: float) -> lpgd.Sweep:
    """A sweep of τ on the first batch: costs and limits as the learner starts."""
    model = task.model()
    arguments = model.arguments(task.features[:batch_size])
    target = task.solutions[:batch_size]
    return lpgd.sweep(model.layer, arguments, lambda output: decision_loss(output.x, target), rhos=[rho])


def gradients(model: DecisionModel, features: Tensor, target: Tensor) -> tuple[Tensor, list[Tensor], float, float]:
    """Loss, gradients of weights and raw limits, seconds forward and backward."""
    started = time.perf_counter()
    loss = decision_loss(model(features).x, target)
    between = time.perf_counter()
    found = torch.autograd.grad(loss, [model.weights, model.raw])
    return loss.detach(), list(found), between - started, time.perf_counter() - between


def cosine(first: Tensor, second: Tensor) -> float | None:
    """None where one of the two is zero."""
    norms = float(first.norm() * second.norm())
    return float((first * second).sum()) / norms if norms > 1e-12 else None


def train(task: Task, name: str, method: Any, options: argparse.Namespace, write: Any) -> None:
    """Adam on one task with one method; ``write`` gets a row every so many steps.

    The clock runs during training steps only, not while the exact gradient and the held-out loss are measured.
    """
    model, exact = task.model(method), task.model(lpgd.ImplicitKKT())
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    generator = torch.Generator().manual_seed(options.seed)
    clock = forward = backward = 0.0
    order = torch.empty(0, dtype=torch.int64)
    bar = tqdm(range(options.steps + 1), desc=f"{task.kind} {name}", unit="step")
    for step in bar:
        if len(order) < options.batch_size:
            order = torch.randperm(len(task.features), generator=generator)
        chosen, order = order[: options.batch_size], order[options.batch_size :]
        features, target = task.features[chosen], task.solutions[chosen]
        started = time.perf_counter()
        loss, found, seconds_forward, seconds_backward = gradients(model, features, target)
        clock += time.perf_counter() - started
        forward, backward = forward + seconds_forward, backward + seconds_backward
        if step % options.every == 0 or step == options.steps:
            exact.load_state_dict(model.state_dict())
            _, reference, *_ = gradients(exact, features, target)
            with torch.no_grad():
                test = decision_loss(model(task.test_features).x, task.test_solutions).item()
            write(
                problem=task.kind,
                method=name,
                step=step,
                loss=loss.item(),
                test_loss=test,
                seconds=round(clock, 4),
                forward_seconds=round(forward, 4),
                backward_seconds=round(backward, 4),
                cosine_weights=cosine(found[0], reference[0]),
                cosine_limits=cosine(found[1], reference[1]),
                norm_weights=float(found[0].norm()),
                exact_norm_weights=float(reference[0].norm()),
            )
            bar.set_postfix(test=f"{test:.4f}", refresh=False)
        started = time.perf_counter()
        for parameter, gradient in zip((model.weights, model.raw), found, strict=True):
            parameter.grad = gradient
        optimizer.step()
        clock += time.perf_counter() - started


def summary(rows: list[dict[str, Any]], baselines: dict[str, float], taus: dict[str, float]) -> str:
    """The table at the end."""
    lines = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        lines.append(f"{problem}, tau {taus[problem]:g}: held-out loss {baselines[problem]:.3f} in two stages")
        lines.append("  method   start    end     seconds (forward + backward)  cosine with exact: weights, limits")
        for method in dict.fromkeys(row["method"] for row in rows if row["problem"] == problem):
            own = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
            last = own[-1]
            means = []
            for name in ("cosine_weights", "cosine_limits"):
                known = [row[name] for row in own if row[name] is not None]
                means.append(f"{sum(known) / len(known):.3f}" if known else "none")
            times = f"{last['seconds']:.1f} ({last['forward_seconds']:.1f} + {last['backward_seconds']:.1f})"
            lines.append(
                f"  {method:8} {own[0]['test_loss']:<8.4f} {last['test_loss']:<8.4f}{times:30}{means[0]}, {means[1]}"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parse_arguments(arguments)
    path = options.out / "metrics.jsonl"
    if path.exists() and not options.overwrite:
        raise SystemExit(f"{path} exists: --overwrite replaces it, --out names another folder.")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    baselines, sweeps, taus = {}, {}, {}
    from .plot import plot_run, plot_start

    try:
        with path.open("w") as file:

            def write(**row: Any) -> None:
                rows.append(row)
                file.write(json.dumps(row) + "\n")
                file.flush()

            for kind in options.problems:
                task = make_task(kind, options.seed, train=options.train_size, test=options.test_size)
                baselines[kind] = two_stage_loss(task)
                sweeps[kind] = choose_tau(task, options.batch_size, options.rho)
                taus[kind] = options.tau or sweeps[kind].best.tau
                print(f"{kind} at the start, which tau?\n{sweeps[kind]}\n", flush=True)
                plot_start(task, sweeps[kind], options.batch_size, options.out)
                for name in options.methods:
                    with warnings.catch_warnings():
                        # That gradients of an LP's costs vanish is what is compared here.
                        warnings.simplefilter("ignore", lpgd.LpgdWarning)
                        train(task, name, gradient_method(name, taus[kind], options.rho), options, write)
    except KeyboardInterrupt:
        print(f"Stopped; {path} holds what was measured.")
        return 130
    config = {**{name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}}
    (options.out / "config.json").write_text(json.dumps({**config, "taus": taus, "two_stage": baselines}, indent=2))
    print(summary(rows, baselines, taus))
    plot_run(rows, baselines, options.out / "curves.png")
    print(f"Plots: {options.out}/curves.png, sweep-*.png, envelopes-*.png, path-*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
