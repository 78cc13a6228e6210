"""Tables and plots of runs: ``python -m examples.shortest_path.plot RUN_DIR``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import COSTS, TERRAINS, Maps
from .grid import GridPaths
from .model import METHODS

__all__ = ["main", "plot_all", "plot_curves", "plot_maps", "plot_terrain", "read_runs", "results_table"]

# What is measured on held-out maps, with its name in tables and plots.
QUANTITIES = {
    "optimal": "share of optimal paths",
    "excess": "cost above the least (mean)",
    "hamming": "cells that differ from the path (mean)",
}
AXES = {"epoch": "epoch", "seconds": "time of training [s]"}

Runs = dict[str, list[Path]]


def read_runs(out: Path) -> Runs:
    """The finished runs in a folder: for each method, in the order of ``METHODS``, the folder of each seed.

    Raises:
        FileNotFoundError: there are none.
    """
    runs = {method: sorted(path.parent for path in (out / method).glob("seed-*/costs.npy")) for method in METHODS}
    runs = {method: folders for method, folders in runs.items() if folders}
    if not runs:
        raise FileNotFoundError(f"{out} holds no finished run, METHOD/seed-*/costs.npy; give the --out folder of one.")
    return runs


def _tests(folder: Path) -> dict[str, NDArray[np.float64]]:
    """The columns of the held-out rows of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "test"]
    return {name: np.array([row[name] for row in rows]) for name in (*AXES, *QUANTITIES)}


def results_table(out: Path) -> str:
    """A Markdown table of what each method reached at the end, means over its seeds, below what it started from."""
    runs = read_runs(out)
    head = ["method", *QUANTITIES.values(), "seconds"]
    rows = [head, ["---"] * len(head)]
    first = {name: column[0] for name, column in _tests(next(iter(runs.values()))[0]).items()}
    rows.append(["start (untrained)", *_figures(first), ""])
    for method, folders in runs.items():
        seeds = [_tests(folder) for folder in folders]
        last = {name: float(np.mean([columns[name][-1] for columns in seeds])) for name in seeds[0]}
        rows.append([METHODS[method], *_figures(last), f"{last['seconds']:.0f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _figures(values: dict[str, Any]) -> list[str]:
    return [f"{values['optimal']:.3f}", f"{100 * values['excess']:.2f} %", f"{values['hamming']:.2f}"]


def plot_all(out: Path, maps: Maps) -> list[Path]:
    """Draw everything into ``out``; the paths of the images."""
    runs = read_runs(out)
    drawn = {
        out / "curves.png": plot_curves(runs),
        out / "maps.png": plot_maps(runs, maps),
        out / "terrain.png": plot_terrain(runs, maps),
    }
    for path, figure in drawn.items():
        figure.savefig(path, dpi=110)
    return list(drawn)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_curves(runs: Runs) -> Any:
    """Held-out measures over epochs and seconds: the mean over seeds within a band from the least to the largest."""
    names = ("optimal", "excess")
    figure = _figure(12, 7)
    axes: Any = figure.subplots(len(names), len(AXES), sharex="col", sharey="row")
    for index, (method, folders) in enumerate(runs.items()):
        seeds = [_tests(folder) for folder in folders]
        for row, quantity in enumerate(names):
            values = np.stack([columns[quantity] for columns in seeds])
            for axis, abscissa in zip(axes[row], AXES, strict=True):
                at = np.mean([columns[abscissa] for columns in seeds], axis=0)
                axis.plot(at, values.mean(0), "o-", color=f"C{index}", markersize=3, label=METHODS[method])
                axis.fill_between(at, values.min(0), values.max(0), color=f"C{index}", alpha=0.15, linewidth=0)
    for row, quantity in enumerate(names):
        axes[row, 0].set_ylabel(QUANTITIES[quantity])
        for axis, label in zip(axes[row], AXES.values(), strict=True):
            axis.grid(alpha=0.3)
            if quantity == "excess":  # it falls by orders of magnitude, and may be zero
                axis.set_yscale("symlog", linthresh=1e-3)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(label if row == len(names) - 1 else "")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle("Held-out maps")
    return figure


def plot_maps(runs: Runs, maps: Maps, count: int = 4) -> Any:
    """The first held-out maps with their path, and each method's costs and path (of its first seed).

    A path is drawn in white where it goes with the map's, in red where it leaves it; a title says what it costs.
    """
    count = min(count, len(maps))
    find_path = GridPaths(*maps.terrain.shape[1:])
    figure = _figure(2.2 * (1 + len(runs)), 2.4 * count)
    axes: Any = figure.subplots(count, 1 + len(runs), squeeze=False)
    predictions = {method: np.load(folders[0] / "costs.npy", mmap_mode="r")[:count] for method, folders in runs.items()}
    for index in range(count):
        image, path = maps.images[index].transpose(1, 2, 0), maps.paths[index]
        side = np.array(path.shape)
        extent = (-0.5, side[1] - 0.5, side[0] - 0.5, -0.5)
        axes[index, 0].imshow(image, extent=extent)
        _draw_path(axes[index, 0], path, path)
        axes[index, 0].set_title(f"costs {(maps.costs[index] * path).sum():g}", fontsize="small")
        for axis, (method, costs) in zip(axes[index, 1:], predictions.items(), strict=True):
            answer = find_path(costs[index])
            axis.imshow(costs[index], cmap="viridis", extent=extent)
            _draw_path(axis, answer, path)
            title = f"costs {(maps.costs[index] * answer).sum():g}"
            axis.set_title(f"{METHODS[method]}\n{title}" if index == 0 else title, fontsize="small", wrap=True)
    for axis in axes.ravel():
        axis.set_axis_off()
    return figure


def _draw_path(axis: Any, path: NDArray[np.float64], reference: NDArray[np.float64]) -> None:
    for chosen, colour in (((path > 0) & (reference > 0), "white"), ((path > 0) & (reference == 0), "red")):
        rows, columns = np.nonzero(chosen)
        axis.scatter(columns, rows, s=14, color=colour, edgecolors="black", linewidths=0.5)


def plot_terrain(runs: Runs, maps: Maps) -> Any:
    """The costs that each method (first seed) gives to cells of each terrain, against the true ones.

    Only ratios of costs matter to a path, so costs are drawn relative to the mean over all cells, the true ones too.
    """
    figure = _figure(2.6 * len(runs), 3.2)
    axes: Any = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for axis, (method, folders) in zip(axes, runs.items(), strict=True):
        costs = np.load(folders[0] / "costs.npy")
        by_terrain = [costs[maps.terrain == terrain] / costs.mean() for terrain in range(len(TERRAINS))]
        axis.boxplot(by_terrain, positions=range(len(TERRAINS)), showfliers=False)
        axis.plot(range(len(TERRAINS)), COSTS / maps.costs.mean(), "rx", label="true")
        axis.set_xticks(range(len(TERRAINS)), TERRAINS, rotation=60)
        axis.set_title(METHODS[method], fontsize="small", wrap=True)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("cost / mean cost")
    axes[0].legend(fontsize="small")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    from .train import held_out_maps

    parser = argparse.ArgumentParser(
        prog="python -m examples.shortest_path.plot", description="Draw the runs in a folder again, with a table."
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="the --out folder of a training command")
    options = parser.parse_args(arguments)
    first = next(iter(read_runs(options.run).values()))[0]
    maps = held_out_maps(argparse.Namespace(**json.loads((first / "config.json").read_text())))
    print(results_table(options.run))
    for path in plot_all(options.run, maps):
        print(f"Plot: {path}")


if __name__ == "__main__":
    main()
