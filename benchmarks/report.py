"""Timings, and how they are written down: a Markdown table, JSON, and a plot of ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Row", "Timing", "environment", "write_report"]

PACKAGES = ("lpgd", "cvxpylayers", "diffcp", "cvxpy", "torch", "numpy", "scipy", "scs", "clarabel", "ecos")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Timing:
    """Seconds of repeated forward and backward passes."""

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def add(self, forward: float, backward: float) -> None:
        self.forward.append(forward)
        self.backward.append(backward)

    @property
    def count(self) -> int:
        return len(self.forward)

    @property
    def totals(self) -> list[float]:
        return [forward + backward for forward, backward in zip(self.forward, self.backward, strict=True)]

    @property
    def total(self) -> float:
        """Median of forward plus backward."""
        return statistics.median(self.totals)

    @property
    def fastest(self) -> float:
        return min(self.totals)

    @property
    def spread(self) -> float | None:
        """Largest less smallest total, relative to the median; None for fewer than two."""
        if self.count < 2:
            return None
        return (max(self.totals) - min(self.totals)) / self.total

    def __str__(self) -> str:
        if not self.count:
            return "–"
        return f"{statistics.median(self.forward):.3f} + {statistics.median(self.backward):.3f}"


@dataclass
class Row:
    """One problem in one mode.

    Attributes:
        case, title, solver, kind: which.
        ours, peer: timings.
        peer_mode: the peer's mode, where it is another one.
        peer_error: why the peer has no timing.
        batch: number of elements.
        values: everything else that was measured.
    """

    case: str
    title: str
    solver: str
    kind: str
    ours: Timing
    peer: Timing
    peer_mode: str | None = None
    peer_error: str | None = None
    batch: int = 0
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> str:
        return f"{self.solver} {'LPGD' if self.kind == 'lpgd' else 'exact'}"

    @property
    def ratio(self) -> float | None:
        """Peer over ours, medians of forward plus backward."""
        return self.peer.total / self.ours.total if self.peer.count and self.ours.count else None

    @property
    def fastest_ratio(self) -> float | None:
        """Peer over ours, the fastest runs."""
        return self.peer.fastest / self.ours.fastest if self.peer.count and self.ours.count else None

    def cells(self) -> list[str]:
        values = self.values
        spread = f"{_text(self.ours.spread, '.0%')} / {_text(self.peer.spread, '.0%')}"
        peer = (
            str(self.peer) + (f" ({self.peer_mode})" if self.peer_mode else "") + (" (once)" * (self.peer.count == 1))
        )
        return [
            self.mode,
            str(self.ours),
            self.peer_error or peer,
            _text(self.ratio, ".2f"),
            _text(self.fastest_ratio, ".2f"),
            spread,
            _text(values.get("solution_difference"), ".0e"),
            _text(values.get("objective_difference"), ".0e"),
            _text(values.get("gradient_cosine"), ".4f"),
            _text(values.get("gradient_difference"), ".0e"),
            f"{_text(values.get('referee_ours'), '.0e')} / {_text(values.get('referee_peer'), '.0e')}",
        ]

    def __str__(self) -> str:
        names = ("ours", "peer", "ratio", "of fastest", "spread", "Δx", "Δobjective", "cosine", "Δgradient", "referee")
        mode, *cells = self.cells()
        text = f"{self.title}, {mode}: " + ", ".join(f"{n} {c}" for n, c in zip(names, cells, strict=True))
        return text + (f"  DISAGREES: {self.values['disagree']}" if "disagree" in self.values else "")


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def environment() -> dict[str, Any]:
    """The machine and the versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "load": [round(load, 1) for load in os.getloadavg()],
        "torch threads": torch.get_num_threads(),
        **{name: os.environ.get(name, "unset") for name in THREAD_VARIABLES},
        "python": sys.version.split()[0],
        "machine": platform.processor() or platform.machine(),
        **{name: version(name) if name != "lpgd" else _own_version() for name in PACKAGES},
    }


def _own_version() -> str:
    import lpgd

    return lpgd.__version__


COLUMNS = (
    "mode",
    "ours: forward + backward [s]",
    "cvxpylayers [s]",
    "ratio",
    "ratio of fastest",
    "spread, ours / theirs",
    "Δx",
    "Δ objective",
    "gradients: cosine",
    "gradients: Δ",
    "error against finite differences, ours / theirs",
)


def write_report(folder: Path, rows: Sequence[Row], setup: Mapping[str, Any]) -> None:
    """Write ``report.md``, ``report.json`` and ``ratios.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(_markdown(rows, setup))
    records = [{**asdict(row), "ratio": row.ratio, "ratio_of_fastest": row.fastest_ratio} for row in rows]
    (folder / "report.json").write_text(json.dumps({"setup": dict(setup), "rows": records}, indent=2) + "\n")
    _plot(folder / "ratios.png", rows)


def _markdown(rows: Sequence[Row], setup: Mapping[str, Any]) -> str:
    lines = [
        "# lpgd against cvxpylayers with diffcp",
        "",
        "Medians, in one process, taking turns, with new parameter values in each repeat; the same data, solver and "
        "tolerances (SCS 1e-6, Clarabel and ECOS 1e-8). A ratio is theirs over ours, forward plus backward: above 1 "
        "ours is faster; the last one of the summary sets ours with nothing chosen against their fastest exact mode. "
        "Spread is largest less smallest, relative to the median. Δx is the largest difference of "
        "solutions, where they are not unique only Δ objective (relative) counts; gradients are compared with theirs "
        "in the same mode, and exact ones along random directions with central differences of a third solver.",
        "",
        "; ".join(f"{name} {value}" for name, value in setup.items()) + ".",
        "",
        "| case | their fastest | seconds | our fastest | seconds | ratio | ours by default | ratio to their exact |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.case for row in rows):
        lines.append("| " + " | ".join(_summary([row for row in rows if row.case == name])) + " |")
    for name in dict.fromkeys(row.case for row in rows):
        chosen = [row for row in rows if row.case == name]
        lines += ["", f"## {chosen[0].title}, batch {chosen[0].batch}", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row.cells()) + " |" for row in chosen]
        lines += [""] + [f"**{row.mode}: {row.values['disagree']}.**" for row in chosen if "disagree" in row.values]
    return "\n".join(lines) + "\n"


def _summary(rows: Sequence[Row]) -> list[str]:
    *modes, default = rows
    peer = min((row for row in modes if row.peer.count), key=lambda row: row.peer.total, default=None)
    ours = min((row for row in modes if row.ours.count), key=lambda row: row.ours.total, default=None)
    return [
        rows[0].title,
        *(("–", "–") if peer is None else (peer.mode, f"{peer.peer.total:.3f}")),
        *(("–", "–") if ours is None else (ours.mode, f"{ours.ours.total:.3f}")),
        "–" if peer is None or ours is None else f"{peer.peer.total / ours.ours.total:.2f}",
        f"{default.solver} {default.ours.total:.3f}" if default.ours.count else "–",
        _text(default.ratio, ".2f"),
    ]


def _plot(path: Path, rows: Sequence[Row]) -> None:
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.ratio is not None]
    figure = Figure(figsize=(8, 1 + 0.28 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    ratios = [row.ratio or 0.0 for row in shown]
    axes.barh(
        [f"{row.case}, {row.mode}" for row in shown],
        ratios,
        color=["tab:blue" if ratio >= 1 else "tab:red" for ratio in ratios],
    )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.invert_yaxis()
    axes.set_xlabel("seconds of cvxpylayers over ours, forward plus backward")
    figure.savefig(path, dpi=150)
