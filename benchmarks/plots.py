"""Plots of the report: ratios, where the time goes, and scaling."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import Curve, Entry, Result, fastest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_curve", "plot_panels", "plot_ratios", "plot_split"]


def plot_ratios(path: Path, results: Sequence[Result]) -> None:
    """For each case and peer, the seconds of its fastest side over those of our fastest."""
    from matplotlib.figure import Figure

    bars: list[tuple[str, float]] = []
    for result in results:
        ours = fastest(result.entries, "lpgd")
        for library in dict.fromkeys(entry.library for entry in result.entries if entry.library != "lpgd"):
            peer = fastest(result.entries, library)
            if ours is not None and peer is not None:
                bars.append((f"{result.title}, batch {result.batch}: {library}", peer.timing.total / ours.timing.total))
    if not bars:
        return
    figure = Figure(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    axes = figure.add_subplot()
    names, ratios = zip(*bars, strict=True)
    places = range(len(bars))
    axes.barh(
        places, [ratio - 1 for ratio in ratios], left=1, color=["tab:blue" if r >= 1 else "tab:red" for r in ratios]
    )
    axes.set_yticks(places, names)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    for place, ratio in zip(places, ratios, strict=True):
        axes.annotate(
            f"{ratio:.2g}",
            (ratio, place),
            xytext=(3 if ratio >= 1 else -3, 0),
            textcoords="offset points",
            va="center",
            ha="left" if ratio >= 1 else "right",
            fontsize=8,
        )
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("their fastest over our fastest, forward + backward")
    figure.savefig(path, dpi=150)


PARTS = ("set-up", "solve", "rest of forward", "backward")


def _parts(entry: Entry) -> tuple[float, ...] | None:
    details, timing = entry.details, entry.timing
    if "solver_wall_seconds" not in details or not entry.usable:
        return None
    forward, backward = statistics.median(timing.forward), statistics.median(timing.backward)
    inside, summed = details["solver_wall_seconds"], details["setup_seconds"] + details["solve_seconds"]
    inside = min(inside, forward)
    setup = inside * details["setup_seconds"] / summed if summed else 0.0
    total = forward + backward
    return setup / total, (inside - setup) / total, (forward - inside) / total, backward / total


def _shown(result: Result) -> list[Entry]:
    """Ours by default, and our fastest in each kind."""
    best = [fastest(result.entries, "lpgd", kind) for kind in ("exact", "lpgd")]
    return [
        entry
        for entry in result.entries
        if entry.library == "lpgd" and ("default" in entry.mode or any(entry is other for other in best))
    ]


def plot_split(path: Path, results: Sequence[Result]) -> None:
    """Shares of our time: set-up, solve, the rest of the forward pass, and the backward pass."""
    from matplotlib.figure import Figure

    rows = [
        (f"{result.title}, batch {result.batch}: {entry.mode}", parts)
        for result in results
        if result.comparison != "scaling"
        for entry in _shown(result)
        if (parts := _parts(entry)) is not None
    ]
    if not rows:
        return
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for place, name in enumerate(PARTS):
        widths = [parts[place] for _, parts in rows]
        axes.barh(range(len(rows)), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of forward plus backward")
    figure.legend(loc="outside upper center", ncols=len(PARTS))
    figure.savefig(path, dpi=150)


MARKERS = "osvd^<>pX*hP"


def _draw_lines(axes: Axes, curve: Curve, colors: Sequence[Any]) -> None:
    """One line for each side on logarithmic axes; ours are solid."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    for place, (name, points) in enumerate(curve.lines.items()):
        style = "-" if name.startswith("lpgd") else "--"
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, style, color=colors[place], marker=MARKERS[place % len(MARKERS)], label=name, markersize=5)
    sizes = sorted({size for points in curve.lines.values() for size, _ in points})
    axes.set_yscale("log")
    values = [value for points in curve.lines.values() for _, value in points]
    if max(values) < 100 * min(values):  # powers of ten alone would leave one or two labels
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(curve.size)
    axes.set_ylabel(curve.unit)
    axes.set_title(curve.title)


def plot_curve(path: Path, curve: Curve) -> None:
    """A plot of one curve."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), layout="constrained")
    colors = colormaps["tab20" if len(curve.lines) > 10 else "tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    _draw_lines(figure.add_subplot(), curve, colors)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)


def plot_panels(path: Path, curves: Sequence[Curve], columns: int = 4) -> None:
    """A panel for each curve, with one legend: a side has the same colour in all of them."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 0.6 + 2.7 * rows), layout="constrained")
    names = list(dict.fromkeys(name for curve in curves for name in curve.lines))
    palette = dict(zip(names, colormaps["tab10"].colors, strict=False))  # pyright: ignore[reportAttributeAccessIssue]
    handles: dict[str, Any] = {}
    for place, curve in enumerate(curves):
        axes = figure.add_subplot(rows, columns, place + 1)
        _draw_lines(axes, curve, [palette[name] for name in curve.lines])
        axes.set_title(curve.title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        handles.update({str(line.get_label()): line for line in axes.get_lines()})
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    figure.savefig(path, dpi=110)
