"""Cases are run by a process of its own, which is watched: what hangs or dies is a finding, and the run goes on."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.cases import CHUNK, EXPLAINED

__all__ = ["State", "run_watched"]

WORKER = ["-m", "tests.fuzz.worker"]
LIMIT = 300.0
"""Seconds that one batch may take, on a machine that has other things to do."""


@dataclass
class State:
    """How far a front-end's run has come; written to a file after each chunk, so that a run can go on.

    Attributes:
        done: cases, from the first one on; batches are hundreds of them.
        counts, patterns: outcomes of cases, and call patterns that were tried.
        faults: of batches and of the way they were called.
        findings: commands that repeat a case, with what came of it; the first ones of each kind.
    """

    front_end: str
    seed: int
    done: int = 0
    faults: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    patterns: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path | None, front_end: str, seed: int) -> State:
        """What the file says of this front-end and seed, or a new one."""
        if path is not None and path.exists():
            for entry in json.loads(path.read_text()):
                if (entry["front_end"], entry["seed"]) == (front_end, seed):
                    counts = {name: Counter(entry.pop(name)) for name in ("counts", "patterns")}
                    return cls(**entry, **counts)
        return cls(front_end, seed)

    def save(self, path: Path) -> None:
        """Beside those of other front-ends; the file is replaced in one step."""
        entries = json.loads(path.read_text()) if path.exists() else []
        kept = [entry for entry in entries if (entry["front_end"], entry["seed"]) != (self.front_end, self.seed)]
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps([*kept, self.__dict__], indent=1))
        os.replace(new, path)

    @property
    def unexplained(self) -> int:
        return self.counts.total() - sum(self.counts[name] for name in EXPLAINED) + self.faults

    def add(self, report: dict[str, Any]) -> None:
        """Count a chunk's report."""
        self.faults += report["faults"]
        self.done = (report["number"] + 1) * CHUNK
        self.counts.update(report["counts"])
        self.patterns.update(report["patterns"])
        for case, what, detail in report["findings"]:
            known = [finding for finding in self.findings if finding["what"] == what]
            if len(known) < 200:
                command = f"python -m tests.fuzz --front-end {self.front_end} --seed {self.seed}"
                command += f" --start {case} --count 1"
                self.findings.append({"what": what, "case": case, "detail": detail, "command": command})


def run_watched(front_end: str, seed: int, first: int, last: int, log: Any = None) -> Iterator[dict[str, Any]]:
    """Reports of the chunks ``first``, …, ``last - 1``; of one that hangs or dies, a finding."""
    while first < last:
        arguments = [sys.executable, *WORKER, front_end, str(seed), str(first), str(last)]
        worker = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=log)
        assert worker.stdout is not None
        pipe, rest = worker.stdout.fileno(), b""
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(pipe, selectors.EVENT_READ)
                while first < last:
                    if not selector.select(LIMIT):
                        yield _lost(first, "hang", f"no end within {LIMIT:.0f} s")
                        first += 1
                        break
                    read = os.read(pipe, 1 << 16)
                    if not read:
                        yield _lost(first, "crash", f"the process ended with {worker.wait()}")
                        first += 1
                        break
                    *lines, rest = (rest + read).split(b"\n")
                    for report in (json.loads(line) for line in lines if line.startswith(b"{")):
                        first = report["number"] + 1
                        yield report
        finally:
            worker.kill()
            worker.wait()
            worker.stdout.close()


def _lost(chunk: int, what: str, detail: str) -> dict[str, Any]:
    finding = (chunk * CHUNK, what, detail)
    return {"number": chunk, "counts": {what: CHUNK}, "patterns": {}, "faults": 0, "findings": [finding]}
