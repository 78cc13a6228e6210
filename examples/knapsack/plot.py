"""Held-out packings reproduced over the steps: ``python -m examples.knapsack.plot RUN_DIR``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

__all__ = ["plot_results"]


def plot_results(folder: Path) -> Path:
    """Curves of every method, mean and range over its seeds, and the two-stage baselines; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from .train import TITLES

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())["results"]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        seeds = {row["seed"] for row in own}
        counts = Counter(row["step"] for row in own)
        steps = sorted(step for step, count in counts.items() if count == len(seeds))
        shares = np.array([[row["test"] for row in own if row["step"] == step] for step in steps])
        (line,) = axes.plot(steps, shares.mean(1), label=TITLES[method])
        axes.fill_between(steps, shares.min(1), shares.max(1), color=line.get_color(), alpha=0.15)
    for name, style in (("two-stage, and exchanges", "--"), ("two-stage, one item more", ":")):
        axes.axhline(results[name]["shares"][0], color="black", linestyle=style, label=name)
    axes.set(xlabel="step", ylabel="held-out packings reproduced", ylim=(0, 1))
    figure.legend(loc="outside right upper", fontsize="small")
    path = folder / "curves.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(plot_results(Path(sys.argv[1])))
