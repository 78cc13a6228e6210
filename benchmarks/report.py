"""The report: a Markdown table, JSON and plots."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .plots import plot_curve, plot_panels, plot_ratios, plot_split
from .results import Curve, Entry, Result, Target, fastest

__all__ = ["environment", "write_report"]

PACKAGES = (
    *("lpgd", "torch", "numpy", "scipy", "cvxpy", "scs", "clarabel", "ecos", "daqp", "highspy", "osqp", "piqp"),
    *("proxsuite", "cvxpylayers", "diffcp", "qpth", "libdqp", "ffolayer", "pyepo", "POT"),
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
HEADER = (
    "Medians of seconds, forward + backward, in one process: the sides take turns on the same data, with other values "
    "in each repeat; (once) marks a slow side that ran once, without a warm-up. A ratio is the peer's seconds over "
    "those of our fastest side: above 1 ours is faster. Spread is largest less smallest, relative to the median. "
    "Errors are relative, of the last run's first elements: of the solution (or, where it is not unique, of the "
    "objective and the constraints) against exact solutions, of exact gradients along random directions against "
    "central differences of exact solutions. LPGD's gradients have a finite step, so they differ from those; the "
    "cosine compares each side with the first of the other library in the same kind of gradient. Set-up and solve are "
    "sums over elements of the forward pass, whatever the number of threads; overhead is the rest of the forward pass "
    "on the wall. Memory is the growth of the process at its peak."
)


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
        **{name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def write_report(
    folder: Path, found: Sequence[Result | Target | Curve], setup: Mapping[str, Any], plots: bool = True
) -> None:
    """Write ``report.md``, ``report.json`` and, as they take seconds, if wanted the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [item for item in found if isinstance(item, Result)]
    targets = [item for item in found if isinstance(item, Target)]
    curves = [item for item in found if isinstance(item, Curve) and item.lines]
    (folder / "report.md").write_text(markdown(results, targets, curves, setup))
    record = {
        "setup": dict(setup),
        "targets": [asdict(target) | {"verdict": target.verdict} for target in targets],
        "results": [result.record() for result in results],
        "curves": [asdict(curve) for curve in curves],
    }
    (folder / "report.json").write_text(json.dumps(record, indent=2) + "\n")
    if not plots:
        return
    if any(entry.usable for result in results for entry in result.entries):
        plot_ratios(folder / "ratios.png", results)
        plot_split(folder / "split.png", results)
    for name, drawn in _figures(curves).items():
        if drawn[0].figure:
            plot_panels(folder / f"{name}.png", drawn)
        else:
            plot_curve(folder / f"{name}.png", drawn[0])


def _figures(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """The files of plots without their ending, and the curves in each."""
    found: dict[str, list[Curve]] = {}
    for curve in curves:
        found.setdefault(curve.figure or curve.name, []).append(curve)
    return found


def markdown(
    results: Sequence[Result], targets: Sequence[Target], curves: Sequence[Curve], setup: Mapping[str, Any]
) -> str:
    lines = ["# Benchmarks", "", HEADER, "", "; ".join(f"{name} {value}" for name, value in setup.items()) + ".", ""]
    if targets:
        lines += ["## Targets", "", *_table(("what", "target", "stretch", "reached", "", "how"), map(_target, targets))]
    if results:
        lines += ["## Summary", ""]
        head = (
            "case",
            "batch",
            "their fastest",
            "seconds",
            "our fastest",
            "seconds",
            "ratio",
            "ours by default",
            "ratio",
        )
        lines += _table(head, [_summary(result) for result in results if len(result.entries) > 1])
    for result in results:
        lines += [f"## {result.title}, batch {result.batch}", ""]
        lines += _table(COLUMNS, [_cells(result, entry) for entry in result.entries])
    if curves:
        lines += ["## Scaling", ""]
        lines += [f"![{drawn[0].title}]({name}.png)" for name, drawn in _figures(curves).items()]
    return "\n".join(lines).rstrip() + "\n"


COLUMNS = (
    "side",
    "forward + backward [s]",
    "ratio",
    "spread",
    "error of x",
    "of objective",
    "violation",
    "error of gradient",
    "cosine",
    "set-up + solve [s]",
    "overhead [s]",
    "MiB",
    "notes",
)


def _table(head: Sequence[str], rows: Any) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return [*lines, ""]


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _target(target: Target) -> tuple[str, ...]:
    sign = "≤" if target.smaller else "≥"
    stretch = "–" if target.stretch is None else f"{sign} {target.stretch:g}"
    wanted = "–" if target.target is None else f"{sign} {target.target:g}"
    return target.title, wanted, stretch, _text(target.reached, ".3g"), target.verdict, target.note


def _summary(result: Result) -> list[str]:
    libraries = sorted({entry.library for entry in result.entries} - {"lpgd"})
    peer, ours = fastest(result.entries, libraries), fastest(result.entries, "lpgd")
    default = next((entry for entry in result.entries if entry.library == "lpgd" and "default" in entry.mode), None)
    if default is not None and not default.usable:
        default = None

    def quotient(mine: Entry | None) -> str:
        return "–" if peer is None or mine is None else f"{peer.timing.total / mine.timing.total:.2f}"

    return [
        result.title,
        str(result.batch),
        *(("–", "–") if peer is None else (peer.label, f"{peer.timing.total:.4f}")),
        *(("–", "–") if ours is None else (ours.mode, f"{ours.timing.total:.4f}")),
        quotient(ours),
        "–" if default is None else f"{default.mode} {default.timing.total:.4f}",
        quotient(default),
    ]


def _gradient(entry: Entry) -> str:
    error, floor = entry.accuracy.gradient, entry.accuracy.gradient_floor
    if error is not None and floor is not None and error < floor:
        return f"< {floor:.0e}"
    return _text(error, ".0e")


def _cells(result: Result, entry: Entry) -> list[str]:
    accuracy, details = entry.accuracy, entry.details
    ours = fastest(result.entries, "lpgd")
    quotient = None
    if ours is not None and entry.timing.count and entry.library != "lpgd":
        quotient = entry.timing.total / ours.timing.total
    split = "–"
    if "setup_seconds" in details:
        split = f"{details['setup_seconds']:.4f} + {details['solve_seconds']:.4f}"
    notes = [note for note in (entry.error, entry.disagrees and f"**{entry.disagrees}**") if note]
    if set(details.get("used", {})) - {"implicit", "average"}:
        notes.append(", ".join(f"{count} {used}" for used, count in details["used"].items()))
    return [
        entry.label,
        str(entry.timing),
        _text(quotient, ".2f"),
        _text(entry.timing.spread, ".0%"),
        _text(accuracy.solution, ".0e"),
        _text(accuracy.objective, ".0e"),
        _text(accuracy.violation, ".0e"),
        _gradient(entry),
        _text(accuracy.cosine, ".4f"),
        split,
        _text(entry.overhead, ".4f"),
        _text(entry.memory, ".1f"),
        "; ".join(notes),
    ]
