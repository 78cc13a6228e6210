"""``python -m tests.soak --hours 8 --state runs/soak.json``: what a layer must stand for days, for as long as is given.

Rounds of: the fuzz target with a new seed, memory over many steps for each backend, interrupts, and a training run that
is interrupted, loses a worker, meets an element without a solution and is started again.  What was done stands in the
state file, and a run that ended goes on there.  It exits 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lpgd import available
from tests.fuzz.cases import CHUNK
from tests.fuzz.front_ends import FRONT_ENDS
from tests.fuzz.runner import State, run_watched
from tests.memory_growth import CONIC

__all__ = ["interrupts", "memory", "stages_of", "training"]

EVENTS = ("interrupt", "worker", "element", "restart")
NODES = (
    "pooling huber", "largest eigenvectors", "least squares", "rotation", "transport, wide", "projection simplex",
    "control", "quadratic on a simplex",
)  # fmt: skip
TRAINED = (*available(), *(f"{name}, cones" for name in CONIC), "blackbox", "direct loss", *NODES)
"""Whose memory is watched."""
MEGABYTES = 10.0
"""By how much memory may grow."""


def output(*arguments: str, seconds: float = 7200.0) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of a module that is run, and the lines of JSON that it printed."""
    run = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=seconds, check=False
    )
    return run.returncode, [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def fuzz(seed: int, cases: int) -> tuple[bool, str]:
    """Every front-end."""
    states = []
    for name in FRONT_ENDS:
        state = State(name, seed)
        for report in run_watched(name, seed, 0, -(-cases // CHUNK)):
            state.add(report)
        states.append(state)
    unexplained = {state.front_end: state.findings[:2] for state in states if state.unexplained or state.findings}
    total = sum(state.counts.total() for state in states)
    return not unexplained, f"{total} cases, unexplained: {unexplained or 'none'}"


def memory(name: str, steps: int) -> tuple[bool, str]:
    """One backend."""
    _, reports = output("tests.memory_growth", str(steps), name)
    grown = reports[0]["grown"] if reports else float("nan")
    return grown < MEGABYTES, f"{grown:+.1f} MB over {steps} steps"


def interrupts(mode: str) -> tuple[bool, str]:
    """All solvers that look for interrupts."""
    _, reports = output("tests.interrupt_run", "12", mode, *(name for name in available() if name != "INTERIOR"))
    good = [report["solver"] for report in reports if report["raised"] and report["latency"] < 1.0 and report["again"]]
    slowest = max((report["latency"] for report in reports if report["raised"]), default=float("nan"))
    return bool(reports) and len(good) == len(
        reports
    ), f"{len(good)} of {len(reports)} solvers, {slowest:.2f} s at most"


def training(steps: int) -> tuple[bool, str]:
    """A training run to which everything happens ends where an undisturbed one does, to the last bit."""
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        _, undisturbed = output("tests.training_run", first, str(steps), "nothing")
        starts, reports = 0, list[dict[str, Any]]()
        while not reports and starts < 3:
            starts += 1
            _, reports = output("tests.training_run", second, str(steps), *EVENTS)
    if not undisturbed or not reports:
        return False, f"no end after {starts} starts"
    same = undisturbed[0]["weight"] == reports[0]["weight"]
    survived = reports[0]["survived"]
    words = f"{steps} steps, {starts} starts, survived {', '.join(survived)}; {'the same' if same else 'other'} bits"
    return same and survived == sorted(EVENTS), words


def stages_of(cases: int, steps: int) -> dict[str, Any]:
    """Those of one round by name."""
    stages: dict[str, Any] = {"training": lambda round: training(min(steps, 300))}
    stages |= {f"interrupts, {mode}": lambda round, mode=mode: interrupts(mode) for mode in ("threads", "serial")}
    stages |= {f"memory, {name}": lambda round, name=name: memory(name, steps) for name in TRAINED}
    stages["fuzz"] = lambda round: fuzz(1000 + round, cases)
    return stages


def main(arguments: list[str] | None = None) -> int:
    """Run rounds until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--hours", type=float, default=8.0)
    parser.add_argument("--state", type=Path, default=Path("runs/soak.json"))
    parser.add_argument("--cases", type=int, default=10000, help="of each front-end in a round")
    parser.add_argument("--steps", type=int, default=10000, help="of each backend in a round")
    parser.add_argument("--only", help="stages whose names begin so")
    options = parser.parse_args(arguments)
    done: list[dict[str, Any]] = json.loads(options.state.read_text()) if options.state.exists() else []
    end, known = time.monotonic() + 3600 * options.hours, {(entry["round"], entry["stage"]) for entry in done}
    number = 0
    while time.monotonic() < end:
        stages = stages_of(options.cases, options.steps)
        chosen = [name for name in stages if options.only is None or name.startswith(options.only)]
        for name in tqdm(chosen, desc=f"round {number}", unit="stage"):
            if (number, name) in known or time.monotonic() > end:
                continue
            good, words = stages[name](number)
            done.append({"round": number, "stage": name, "good": good, "words": words})
            tqdm.write(f"round {number}, {name}: {'good' if good else 'FAILED'}, {words}")
            options.state.parent.mkdir(parents=True, exist_ok=True)
            new = options.state.with_suffix(".new")
            new.write_text(json.dumps(done, indent=1))
            os.replace(new, options.state)
        number += 1
    failed = [entry for entry in done if not entry["good"]]
    print(f"{len(done)} stages, {len(failed)} failed")
    for entry in failed:
        print(f"  round {entry['round']}, {entry['stage']}: {entry['words']}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
