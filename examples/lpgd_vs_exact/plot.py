"""The plots of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import lpgd

from .model import Task, decision_loss

__all__ = ["plot_run", "plot_start"]

LABELS = {
    "exact": "exact (implicit)",
    "small": "LPGD, τ chosen small",
    "average": "LPGD average",
    "lower": "LPGD lower",
    "upper": "LPGD upper",
}


def plot_run(rows: list[dict[str, Any]], baselines: dict[str, float], out: Path) -> None:
    """A row of panels for each problem: held-out loss over steps and over seconds, cosines with the exact gradient."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    problems = list(baselines)
    figure = Figure(figsize=(16, 4 * len(problems)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(len(problems), 4, squeeze=False)
    columns = ("step", "seconds", "step", "step")
    quantities = ("test_loss", "test_loss", "cosine_weights", "cosine_limits")
    names = ("held-out loss", "held-out loss", "cosine with exact: costs", "cosine with exact: limits")
    for line, problem in zip(axes, problems, strict=True):
        own = [row for row in rows if row["problem"] == problem]
        for panel, column, quantity, name in zip(line, columns, quantities, names, strict=True):
            if quantity == "cosine_weights" and all(row[quantity] is None for row in own):
                quantity, name = "norm_weights", "norm of the costs' gradient (exact: 0)"
            for method in dict.fromkeys(row["method"] for row in own):
                part = [row for row in own if row["method"] == method]
                values = np.array([np.nan if row[quantity] is None else row[quantity] for row in part], dtype=float)
                style = "--" if method == "small" else "-"
                color = f"C{list(LABELS).index(method)}"
                panel.plot([row[column] for row in part], values, style, color=color, label=LABELS[method])
            if quantity == "test_loss":
                panel.axhline(baselines[problem], color="gray", linestyle=":", label="two stages")
                panel.set_yscale("log")
            elif quantity == "norm_weights":
                panel.set_yscale("symlog", linthresh=1e-3)
            else:
                panel.set_ylim(top=1.05)
            panel.set_title(f"{problem.upper()}: {name}")
            panel.set_xlabel(column)
            panel.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    figure.savefig(out, dpi=110)


def plot_start(task: Task, sweep: lpgd.Sweep, batch_size: int, folder: Path) -> None:
    """``sweep-``, ``envelopes-`` and ``path-KIND.png``: what the learner meets at its start."""
    model = task.model()
    with torch.no_grad():
        arguments = model.arguments(task.features[:batch_size])
        teacher_like = -arguments["h"] / 2  # towards limits half as large
    target, cost = task.solutions[0], "c" if task.kind == "lp" else "q"
    one = {**arguments, cost: arguments[cost][0]}
    direction = {cost: 1 - 2 * target - one[cost], "h": teacher_like}

    def loss(output: Any) -> Any:
        return (output.x - target).square().sum(-1)

    unit = sweep.unit / batch_size  # the loss of one element is not divided by the size of a batch
    at = np.linspace(-0.5, 1.5, 101).tolist()
    taus = [unit * factor for factor in (0.1, 1.0, 10.0)]
    panels = {
        "sweep": lpgd.plotting.plot_sweep(sweep),
        "envelopes": lpgd.plotting.plot_envelopes(
            model.layer, one, direction, loss, [float(f"{tau:.2g}") for tau in taus], (0.0, 1.0), at
        ),
        "path": lpgd.plotting.plot_perturbed_path(
            model.layer, arguments, lambda output: decision_loss(output.x, task.solutions[:batch_size])
        ),
    }
    for name, axes in panels.items():
        figure = np.ravel(axes)[0].figure
        figure.savefig(folder / f"{name}-{task.kind}.png", dpi=90)
        close(figure)


def close(figure: Any) -> None:
    """Forget a figure of pyplot's."""
    from matplotlib import pyplot

    pyplot.close(figure)
