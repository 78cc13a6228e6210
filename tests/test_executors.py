"""Threads, processes, a Dask cluster of three workers, and Ray: the same bits, solvers that are kept, and deaths."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.execution.tasks import SerialExecutor, run_tasks, worker_count
from lpgd.solvers.interior_point import solver as interior_point
from tests.executor_cases import Counted, RayExecutor, processes, square
from tests.test_same_bits import N, programs

STARTS = ["spawn", "forkserver", *(["fork"] if sys.platform == "linux" else [])]
KINDS = ["threads", *STARTS, "dask", "ray"]
WORKERS = 3


@pytest.fixture(scope="module")
def client() -> Generator[Any]:
    """A client of a cluster of three processes on this machine."""
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    with (
        distributed.LocalCluster(
            n_workers=WORKERS, threads_per_worker=1, processes=True, dashboard_address=None
        ) as own,
        distributed.Client(own) as found,
    ):
        yield found


@pytest.fixture(scope="module")
def ray() -> Generator[Any]:
    package = pytest.importorskip("ray", reason="its wheel has 80 MB, so no extra asks for it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield package
        package.shutdown()


@pytest.fixture(scope="module")
def executors(request: pytest.FixtureRequest) -> Generator[Callable[[str], Executor]]:
    made: dict[str, Any] = {}

    def get(kind: str) -> Executor:
        if kind not in made:
            if kind == "threads":
                made[kind] = ThreadPoolExecutor(WORKERS)
            elif kind == "dask":
                return request.getfixturevalue("client").get_executor()
            elif kind == "ray":
                request.getfixturevalue("ray")
                return RayExecutor()
            else:
                made[kind] = processes(kind)
        return made[kind]

    yield get
    for executor in made.values():
        executor.shutdown()


def program(solver: str, gradient: Any, shared: bool, executor: Executor) -> list[Tensor]:
    """All that a step of training hands back."""
    layer = lpgd.QPLayer(solver, gradient, executor=executor)
    leaves = {name: value.requires_grad_() for name, value in programs(0, shared).items()}
    output = layer(leaves.pop("P"), q := leaves.pop("q"), lb=-2.0, ub=2.0, **leaves)
    output.x.square().sum().backward()
    return [*(part.detach() for part in output), q.grad, *(leaves[name].grad for name in "AbGh")]


def cones(executor: Executor) -> list[Tensor]:
    """Projections onto a ball, by CVXPY."""
    x, a = cp.Variable(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [cp.norm(x) <= 1])
    layer = lpgd.CvxpyLayer(problem, parameters=[a], variables=[x], solver="CLARABEL", executor=executor)
    values = programs(0, shared=True)["q"][:, :3].requires_grad_()
    (y,) = layer(values)
    y[:, 0].sum().backward()
    return [y.detach(), values.grad]


def largest(costs: Any) -> Any:
    """The indicator of the least cost."""
    return np.eye(costs.size)[np.argmin(costs)]


def oracle(executor: Executor) -> list[Tensor]:
    layer = lpgd.BlackboxLayer(largest, lpgd.LPGD(tau=3.0), executor=executor)
    costs = programs(0, shared=True)["q"].requires_grad_()
    y = layer(costs)
    (y * torch.arange(N)).sum().backward()
    return [y.detach(), costs.grad]


CALLS: dict[str, Callable[[Executor], list[Tensor]]] = {
    f"{solver} {type(gradient).__name__} {'shared' if shared else 'own'}": (
        lambda executor, solver=solver, gradient=gradient, shared=shared: program(solver, gradient, shared, executor)
    )
    for solver in ("CLARABEL", "DAQP", "OSQP", "INTERIOR", "MOREAU")
    for gradient, shared in ((lpgd.LPGD(tau=0.1), True), (lpgd.ImplicitKKT(), False))
}
CALLS |= {"cones": cones, "oracle": oracle}


@cache
def in_turn(name: str) -> list[Tensor]:
    """What a call gives in the calling thread."""
    return CALLS[name](SerialExecutor())


@pytest.mark.parametrize("kind", KINDS)
def test_every_executor_gives_the_same_bits(
    kind: str, executors: Callable[[str], Executor], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = executors(kind)
    monkeypatch.setattr(interior_point, "CHUNKED", 1.0)  # else INTERIOR keeps small batches whole
    for name, call in CALLS.items():
        for first, second in zip(in_turn(name), call(executor), strict=True):
            assert torch.equal(first, second), name


@pytest.mark.parametrize("kind", [*STARTS, "dask", "ray"])
def test_workers_keep_prepared_solvers_between_calls(kind: str, executors: Callable[[str], Executor]) -> None:
    values = programs(0, shared=True)
    layer = lpgd.QPLayer(Counted(), executor=executors(kind))
    rows: Any = {name: values[name] for name in "AbGh"}
    for _ in range(4):
        solution = layer.solve(values["P"], values["q"], **rows)
        assert set(solution.iterations.tolist()) == {1}  # no process has ever prepared a second one


def test_a_cluster_says_how_many_tasks_it_runs(client: Any) -> None:
    assert worker_count(client.get_executor()) == WORKERS


def test_tasks_of_a_worker_that_is_killed_are_run_again(client: Any, tmp_path: Path) -> None:
    tasks = [(number, str(tmp_path / "mark")) for number in range(8)]
    assert run_tasks(square, tasks, client.get_executor()) == [number**2 for number in range(8)]
    assert (tmp_path / "mark").exists()


def test_a_layer_survives_the_death_of_its_workers(client: Any) -> None:
    values = programs(0, shared=True)
    layer = lpgd.QPLayer("CLARABEL", executor=client.get_executor())
    rows: Any = {name: values[name] for name in "AbGh"}
    before = layer.solve(values["P"], values["q"], **rows).x
    pids = client.run(os.getpid)
    os.kill(next(iter(pids.values())), signal.SIGKILL)
    q = values["q"].requires_grad_()
    output = layer(values["P"], q, **rows)
    output.x.sum().backward()
    assert torch.equal(output.x, before)
    alone = lpgd.QPLayer("CLARABEL", executor=SerialExecutor())
    again = values["q"].detach().clone().requires_grad_()
    alone(values["P"], again, **rows).x.sum().backward()
    assert torch.equal(q.grad, again.grad)


def test_ray_runs_the_tasks_of_a_killed_worker_again(ray: Any, tmp_path: Path) -> None:
    tasks = [(number, str(tmp_path / "mark")) for number in range(8)]
    assert run_tasks(square, tasks, RayExecutor()) == [number**2 for number in range(8)]
