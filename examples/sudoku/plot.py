"""Training curves: ``python -m examples.sudoku.plot RUN_DIR... --out FILE.png``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curves", "main", "plot_runs", "read_metrics"]

Curves = dict[str, NDArray[np.float64]]

AXES = {"epoch": "epoch", "seconds": "wall-clock time [s]", "backward_seconds": "time in backward [s]"}
QUANTITIES = {"loss": "loss", "error": "error: share of boards that break a rule"}
TRAIN_POINTS_PER_EPOCH = 10


def read_metrics(path: Path, split: str) -> Curves:
    """The columns of one ``metrics.jsonl``, rows of one split; training rows are averaged over tenths of an epoch."""
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["split"] == split]
    names = (*AXES, *QUANTITIES)
    if not rows:
        return {name: np.zeros(0) for name in names}
    table = {name: np.array([row[name] for row in rows], dtype=float) for name in names}
    if split == "train":
        # A step ends at its epoch coordinate, so a bin is open below and closed above.
        bins = np.ceil(table["epoch"] * TRAIN_POINTS_PER_EPOCH - 1e-9).astype(int)
        _, bins, counts = np.unique(bins, return_inverse=True, return_counts=True)
        table = {name: np.bincount(bins, weights=column) / counts for name, column in table.items()}
    return table


def _restarts(folder: Path) -> list[Path]:
    """The metrics files of a folder: its own, or those of its ``seed-*`` folders."""
    if (folder / "metrics.jsonl").exists():
        return [folder / "metrics.jsonl"]
    files = sorted(folder.glob("seed-*/metrics.jsonl"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no metrics.jsonl and no seed-*/metrics.jsonl; give the --out folder of a run."
        )
    return files


def _label(folder: Path, metrics: list[Path]) -> str:
    config = json.loads((metrics[0].parent / "config.json").read_text())
    name = {"lpgd": "LPGD average", "lower": "LPGD lower", "upper": "LPGD upper", "exact": "exact"}[config["method"]]
    tau = "" if config["method"] == "exact" else f"τ {config['tau']:g}, "
    restarts = f", {len(metrics)} seeds" if len(metrics) > 1 else ""
    return f"{folder.name}: {name}, {tau}ρ {config['rho']:g}, {config['solver']}{restarts}"


def _stacked(curves: list[Curves]) -> Curves:
    """Restarts one above the other, cut to the points that all of them have."""
    common = min(len(curve["epoch"]) for curve in curves)
    return {name: np.stack([curve[name][:common] for curve in curves]) for name in curves[0]}


def plot_runs(folders: list[Path], out: Path) -> None:
    """Draw test (solid) and training (dotted) loss and error over epochs, wall-clock and backward time to ``out``.

    A folder is one curve: the mean over its restarts, at their mean time, within a band from the least to the largest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(QUANTITIES), len(AXES), sharex="col", sharey="row")
    for index, folder in enumerate(folders):
        metrics = _restarts(folder)
        for split, style in (("test", "-"), ("train", ":")):
            curves = _stacked([read_metrics(path, split) for path in metrics])
            for row, quantity in enumerate(QUANTITIES):
                values = curves[quantity]
                for column, abscissa in enumerate(AXES):
                    axis, at = axes[row, column], curves[abscissa].mean(0)
                    label = f"{_label(folder, metrics)} ({split})" if row == column == 0 else None
                    marker = "o" if split == "test" else None
                    axis.plot(at, values.mean(0), style, color=f"C{index}", marker=marker, markersize=4, label=label)
                    if len(metrics) > 1:
                        axis.fill_between(at, values.min(0), values.max(0), color=f"C{index}", alpha=0.15, linewidth=0)
    for row, title in enumerate(QUANTITIES.values()):
        axes[row, 0].set_ylabel(title)
        for column, name in enumerate(AXES.values()):
            axes[row, column].grid(alpha=0.3)
            axes[row, column].set_ylim(bottom=0)
            axes[row, column].set_xlim(left=0)
            if row == len(QUANTITIES) - 1:
                axes[row, column].set_xlabel(name)
    figure.legend(loc="outside lower center", ncols=min(2, len(folders) + 1), fontsize="small")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.sudoku.plot", description="Overlay the training curves of runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="the --out folder of a training command")
    parser.add_argument("--out", type=Path, default=Path("sudoku-curves.png"), help="the image to write")
    options = parser.parse_args(arguments)
    plot_runs(options.runs, options.out)
    print(f"Curves: {options.out}")


if __name__ == "__main__":
    main()
