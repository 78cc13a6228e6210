"""Ctrl-C: from every solver, in threads and out, by real signals to processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from lpgd.execution.interrupts import Stopped, kept_handler, pause, stoppable
from lpgd.execution.tasks import SerialExecutor, run_tasks
from lpgd.solvers import ECOS, OSQP, SCS
from tests.interrupt_run import PROMPT

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are sent by kill")

ROOT = Path(__file__).parent.parent
LISTENING = [SCS, ECOS, OSQP]
LISTEN = [solver.name for solver in LISTENING if solver.is_installed()]  # ecos has no wheels from Python 3.13 on
SOLVERS = [
    "CLARABEL",
    *LISTEN,
    "DAQP",
    "HIGHS",
    "PIQP",
    "PROXQP",
    "INTERIOR",
    "MOREAU",
    "CUSTOM",
    "NODE",
    "TRANSPORT",
    "ORACLE",
]


def run(*arguments: str, seconds: float = 300.0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("size", "mode"), [("5", "serial"), ("60", "threads")], ids=["quick, serial", "slow, threads"])
def test_an_interrupt_is_raised_within_a_second_and_leaves_nothing_behind(size: str, mode: str) -> None:
    lines = run("tests.interrupt_run", size, mode, *SOLVERS).splitlines()
    reports: list[dict[str, Any]] = [json.loads(line) for line in lines if line.startswith("{")]
    assert [report["solver"] for report in reports] == SOLVERS
    for report in reports:
        assert report["raised"], report
        assert report["latency"] < PROMPT, report
        assert report["calls"] == 1, report  # the user's handler, once
        assert report["handler"], report  # it is still the one in Python
        assert report["again"], report  # and in C
        assert report["settings"], report  # torch's and BLAS's threads
        assert report["busy"] < 0.05, report  # nothing goes on
        assert report["same"], report  # the layer can be used


def test_a_handler_that_goes_on_gets_every_interrupt_and_every_solution() -> None:
    for line in run("tests.interrupt_run", "5", "handled", *LISTEN).splitlines():
        if line.startswith("{"):
            report = json.loads(line)
            assert report["calls"] >= report["sent"] - 1, report  # one may come after a solver's last look
            assert report["same"], report


def test_an_interrupted_solve_is_not_a_failure_of_the_solver() -> None:
    line = run("tests.interrupt_run", "300", "one", *LISTEN)
    for report in map(json.loads, filter(lambda text: text.startswith("{"), line.splitlines())):
        assert report["raised"], report
        assert report["latency"] < PROMPT, report
        assert report["busy"] < 0.05, report
        assert report["again"], report


def test_a_child_does_not_wait_for_threads_of_its_parent() -> None:
    assert run("tests.interrupt_run", "60", "fork", "CLARABEL", "INTERIOR", "MOREAU").split() == ["same"] * 3


def test_tasks_that_nobody_wants_any_more_end() -> None:
    begun, ended = [], []

    def work(task: int) -> int:
        begun.append(task)
        if task == 0:
            raise KeyError(task)
        try:
            for _ in range(2000):
                time.sleep(0.001)
                pause()
        except Stopped:
            ended.append(task)
            raise
        return task

    with ThreadPoolExecutor(2) as executor:
        started = time.perf_counter()
        with pytest.raises(KeyError):
            run_tasks(work, list(range(50)), executor)
        assert time.perf_counter() - started < 1.0
        assert set(begun) - {0} == set(ended)
        assert len(begun) < 5
        assert executor.submit(int).result() == 0


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_no_interrupt_of_many_leaves_a_worker_behind(count: int) -> None:
    inside, sent = threading.Event(), threading.Event()
    at_work: set[int] = set()

    def handler(_number: int, _frame: FrameType | None) -> None:
        if inside.is_set():
            raise KeyboardInterrupt

    def work(task: int) -> None:
        at_work.add(task)
        try:
            if task == 0:
                for _ in range(count):
                    os.kill(os.getpid(), signal.SIGINT)
                    time.sleep(0.02)
                sent.set()
            sent.wait()
        finally:
            at_work.remove(task)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with ThreadPoolExecutor(2) as executor:
            inside.set()
            with pytest.raises(KeyboardInterrupt):
                run_tasks(work, range(4), executor)
            left = set(at_work)
            inside.clear()
    finally:
        signal.signal(signal.SIGINT, before)
    assert not left


def test_a_task_stops_only_where_it_was_told_to() -> None:
    event = threading.Event()
    with stoppable(event):
        pause()
        event.set()
        with stoppable(None):
            pause()
        with pytest.raises(Stopped):
            pause()
    pause()


@pytest.mark.parametrize("executor", [None, SerialExecutor()], ids=["threads", "serial"])
def test_interrupts_of_tasks_that_take_them_reach_the_users_handler(executor: Any) -> None:
    heard: list[int] = []

    def count(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    def work(task: int) -> int:
        with kept_handler():
            time.sleep(0.05)
            if task == 1:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return task

    before = signal.signal(signal.SIGINT, count)
    try:
        assert run_tasks(work, [0, 1, 2], executor, takes_interrupts=True) == [0, 1, 2]
        assert heard == [signal.SIGINT]
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("solver", LISTENING, ids=lambda solver: solver.name)
def test_solvers_that_listen_say_so(solver: Any) -> None:
    assert solver.takes_interrupts
