"""Processes that die while they solve: no element is lost, and training goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

import lpgd
from lpgd.execution.tasks import run_tasks
from tests.executor_cases import square

SPAWN = multiprocessing.get_context("spawn")


def die(task: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_tasks_of_a_killed_process_are_run_once_more(tmp_path: Path) -> None:
    tasks = [(number, str(tmp_path / "mark")) for number in range(8)]
    with ProcessPoolExecutor(2, SPAWN) as pool:
        with pytest.warns(lpgd.LpgdWarning, match="a process of the executor died.*of 8 tasks are run once more"):
            assert run_tasks(square, tasks, pool) == [number**2 for number in range(8)]
        assert run_tasks(square, tasks, pool) == [number**2 for number in range(8)]  # no warning: the pool is another


def test_tasks_that_kill_every_process_end_in_an_error() -> None:
    with ProcessPoolExecutor(2, SPAWN) as pool, pytest.warns(lpgd.LpgdWarning), pytest.raises(BrokenProcessPool):
        run_tasks(die, [1, 2, 3], pool)


def test_a_layer_survives_the_death_of_its_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    P = torch.diag_embed(1.0 + torch.rand(6, 3, dtype=torch.float64, generator=generator))
    q = torch.randn(6, 3, dtype=torch.float64, generator=generator).requires_grad_()
    with ProcessPoolExecutor(2, SPAWN) as pool:
        layer = lpgd.QPLayer(solver="CLARABEL", executor=pool)
        layer(P, q, lb=0.0)
        for process in multiprocessing.active_children():
            os.kill(process.pid or 0, signal.SIGKILL)
        with pytest.warns(lpgd.LpgdWarning, match="a process of the executor died"):
            x = layer(P, q, lb=0.0).x
        (gradient,) = torch.autograd.grad(x.sum(), q)
    # The closed form: ½ p x² + q x over x ≥ 0.
    diagonal = P.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(x, (-q / diagonal).clamp(min=0.0), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradient, torch.where(q < 0, -1.0 / diagonal, 0.0), atol=1e-8, rtol=1e-8)
