"""Runs the comparisons and writes the report.

``python -m benchmarks.run --out DIR [--only NAME ...] [--quick] [--repeats N] [--threads N]``

The exit status is 1 if one of our solutions is wrong or one of our layers fails.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lpgd.execution.threads import torch_threads

from .harness import Settings
from .report import environment, write_report
from .results import Curve, Result, Target

__all__ = ["COMPARISONS", "main"]

COMPARISONS = (
    "cvxpylayers",
    "sudoku",
    "dense_qp",
    "sparse",
    "maros_meszaros",
    "reuse",
    "rescue",
    "choice",
    "scaling",
    "blackbox",
    "nodes_pooling",
    "nodes_regression",
    "nodes_sphere",
    "nodes_transport",
    "nodes_eigen",
    "nodes_backward",
    "nodes_control",
)


def parse_arguments(arguments: list[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of report.md, report.json and the plots")
    parser.add_argument(
        "--only", nargs="+", choices=COMPARISONS, default=COMPARISONS, metavar="NAME", help=", ".join(COMPARISONS)
    )
    parser.add_argument("--quick", action="store_true", help="a minute: small batches, one repeat, no slow side")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side, after a warm-up (default: 3)")
    parser.add_argument(
        "--maros-meszaros", type=Path, default=Settings.maros_meszaros, help="file of extract_maros_meszaros.py"
    )
    parser.add_argument("--threads", type=int, help="threads of torch, for all (default: torch's own choice)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1.")
    repeats = 1 if options.quick else options.repeats
    return Settings(options.quick, repeats, options.out, options.maros_meszaros), options


def show(item: Result | Target | Curve) -> None:
    if isinstance(item, Target):
        print(f"  -> {item.title}: {item.reached and round(item.reached, 3)} ({item.verdict}); {item.note}", flush=True)
    elif isinstance(item, Result):
        print(f"{item.title}, batch {item.batch}", flush=True)
        for entry in item.entries:
            print(f"  {entry.label}: {entry.error or entry.timing} {entry.disagrees or ''}".rstrip(), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    settings, options = parse_arguments(arguments)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # ProxSuite's backward pass answers in the default type
    found: list[Result | Target | Curve] = []
    try:
        with torch_threads(options.threads or torch.get_num_threads()):
            _compare(options.only, settings, found)
    finally:
        torch.set_default_dtype(default_dtype)
    print(f"Report: {settings.out / 'report.md'}")
    ours = [entry for item in found if isinstance(item, Result) for entry in item.entries if entry.library == "lpgd"]
    return int(any(entry.disagrees or entry.error for entry in ours))


def _compare(names: Sequence[str], settings: Settings, found: list[Result | Target | Curve]) -> None:
    """Run comparisons; the report grows with each."""
    setup = environment() | {"repeats": settings.repeats, "quick": settings.quick}
    print(", ".join(f"{name} {value}" for name, value in setup.items()), flush=True)
    started = time.perf_counter()
    for name in names:
        for item in importlib.import_module(f".{name}", __package__).run(settings):
            show(item)
            found.append(item)
            setup["minutes"] = round((time.perf_counter() - started) / 60, 1)
            write_report(settings.out, found, setup, plots=False)
        write_report(settings.out, found, setup)
        print(f"{name} done after {setup.get('minutes')} minutes", flush=True)


if __name__ == "__main__":
    sys.exit(main())
