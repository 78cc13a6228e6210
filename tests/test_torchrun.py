"""The examples under torchrun: two processes, killed or interrupted and resumed to the bits of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the children of a process from /proc")

ROOT = Path(__file__).parent.parent
SECONDS = 600
COMMANDS = {
    "sudoku": "--train-size 48 --test-size 4 --batch-size 4 --epochs 1 --tests-per-epoch 1 --resume",
    "shortest_path": "--methods average --size 6 --train-size 64 --test-size 20 --batch-size 8 --epochs 2 --resume",
}
FOLDERS = {"sudoku": "seed-0", "shortest_path": "average/seed-0"}


class Training:
    """An example with two processes under torchrun."""

    def __init__(self, name: str, out: Path, restarts: int = 0) -> None:
        self.folder = out / "run" / FOLDERS[name]
        command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "--max-restarts", str(restarts), "-m", f"examples.{name}.train"]
        command += [*COMMANDS[name].split(), "--checkpoint-seconds", "0", "--out", str(out / "run")]
        if name == "sudoku":
            command += ["--cache", str(out / "boards")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
        self.log = (out / "log").open("a")
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log)

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["step"] for row in rows if row["split"] == "train"]

    def reach(self, step: int) -> None:
        """Wait until a run is so far."""
        deadline = time.monotonic() + SECONDS
        while not (steps := self.steps()) or steps[-1] < step:
            assert self.process.poll() is None, self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.02)

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def told(self) -> str:
        return Path(self.log.name).read_text()[-3000:]

    def end(self) -> int:
        """Its exit status."""
        try:
            return self.process.wait(SECONDS)
        finally:
            self.log.close()

    def result(self) -> dict[str, Any]:
        return torch.load(self.folder / "checkpoint.pt", weights_only=True)


@cache
def undisturbed(name: str, out: Path) -> tuple[dict[str, Any], list[int]]:
    training = Training(name, out)
    assert training.end() == 0, training.told()
    return training.result(), training.steps()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


def same(first: Any, second: Any) -> bool:
    """Whether nested dictionaries and lists hold the same bits."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
    return first == second


def check(training: Training, name: str, out: Path) -> None:
    """It has ended as the undisturbed run has: model, optimiser, and a line for each step."""
    wanted, steps = undisturbed(name, out)
    found = training.result()
    for part in ("model", "optimizer", "step"):
        assert same(found[part], wanted[part]), part
    assert training.steps() == steps == list(range(1, found["step"] + 1))


@pytest.mark.parametrize("name", ["sudoku", pytest.param("shortest_path", marks=pytest.mark.long)])
def test_a_killed_worker_is_started_again_and_goes_on(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).mkdir(exist_ok=True)
    training = Training(name, tmp_path, restarts=1)
    training.reach(5)
    os.kill(training.workers()[-1], signal.SIGKILL)
    assert training.end() == 0, training.told()
    check(training, name, folder / name)


@pytest.mark.parametrize("name", ["shortest_path", pytest.param("sudoku", marks=pytest.mark.long)])
def test_an_interrupted_and_then_killed_run_goes_on(name: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).mkdir(exist_ok=True)
    interrupted = Training(name, tmp_path)
    interrupted.reach(3)
    interrupted.process.send_signal(signal.SIGINT)
    assert interrupted.end() != 0
    kept = interrupted.result()["step"]
    assert kept == interrupted.steps()[-1]  # the step under way was finished
    killed = Training(name, tmp_path)
    killed.reach(kept + 3)
    for pid in [*killed.workers(), killed.process.pid]:
        os.kill(pid, signal.SIGKILL)
    assert killed.end() != 0
    training = Training(name, tmp_path)
    assert training.end() == 0, training.told()
    check(training, name, folder / name)
