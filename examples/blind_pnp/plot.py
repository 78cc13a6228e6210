"""Pose errors against noise and outliers: ``python -m examples.blind_pnp.plot RUN_DIR``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

__all__ = ["plot_results"]


MEASURES = (("angle", "median angle (degrees)", 0.1), ("distance", "median distance", 0.002))


def plot_results(folder: Path) -> Path:
    """Median angles and distances of every model; returns the path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from .train import NOISE, TITLES

    rows = json.loads((folder / "results.json").read_text())["rows"]
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained", sharey="row", squeeze=False)
    for column, (field, fixed) in enumerate((("noise", ("outliers", 0.0)), ("outliers", ("noise", NOISE)))):
        for axes, (measure, label, lowest) in zip(grid[:, column], MEASURES, strict=True):
            for name in dict.fromkeys(row["model"] for row in rows):
                own = [row for row in rows if row["model"] == name and row[fixed[0]] == fixed[1]]
                style = {"start": ":", "true pairs": "--"}.get(name, "-")
                values = [row[measure] for row in own]
                axes.plot([row[field] for row in own], values, style, marker="o", label=TITLES[name])
            axes.set(yscale="log", ylabel=label)
            axes.set_ylim(bottom=lowest)  # without noise true pairs give the pose to rounding
            axes.set_xlabel("noise, in focal lengths" if field == "noise" else f"share of outliers, noise {NOISE}")
            axes.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5)
    path = folder / "curves.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(plot_results(Path(sys.argv[1])))
