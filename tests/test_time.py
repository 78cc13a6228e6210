"""Limits of time for elements and batches, progress bars, and the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import tqdm
from torch import Tensor

import lpgd
from lpgd import SerialExecutor, SolverError, Status
from lpgd.execution import progress
from tests.node_cases import NODES

ONE = lpgd.SparsityPattern.from_matrix(np.eye(1))
SOLVERS = lpgd.available(lpgd.ConicStructure(ONE, ONE, lpgd.Cones(nonnegative=1)))


def programs(count: int, n: int = 20) -> dict[str, Tensor]:
    """Quadratic programs with matrices of their own."""
    rng = np.random.default_rng(0)
    factor = torch.tensor(rng.normal(size=(count, n, n)))
    P = factor @ factor.mT + torch.eye(n)
    G = torch.tensor(rng.normal(size=(count, n, n)))
    return {"P": P, "q": torch.tensor(rng.normal(size=(count, n))), "G": G, "h": torch.ones(count, n).double()}


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_batch_ends_at_its_limit(solver: str) -> None:
    data = programs(400, 40)
    layer = lpgd.QPLayer(solver, solver_args={"batch_time_limit": 1e-4, "rescue": False}, executor=SerialExecutor())
    with pytest.raises(SolverError, match=r"399 of 400|, … of 400: TIME_LIMIT.*batch_time_limit"):
        layer(**data)
    statuses = layer.solve(**data).statuses
    assert statuses.count(Status.TIME_LIMIT) >= (336 if solver == "MOREAU" else 380)  # MOREAU takes 64 at once
    assert set(statuses) <= {Status.TIME_LIMIT, Status.SOLVED, Status.INACCURATE}


@pytest.mark.parametrize(
    ("solver", "kind"), [("DAQP", "Model"), ("CLARABEL", "DefaultSolver"), ("PIQP", "DenseSolver")]
)
def test_no_solve_begins_after_the_limit(solver: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, calls = pytest.importorskip(solver.lower()), 0

    class Counted:
        """A solver's object whose solves are counted."""

        def __init__(self, *args: Any, **keywords: Any) -> None:
            object.__setattr__(self, "whole", made(*args, **keywords))

        def __getattr__(self, name: str) -> Any:
            nonlocal calls
            calls += name == "solve"
            return getattr(self.whole, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.whole, name, value)

    def counted(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return at_once(*args, **keywords)

    made = getattr(package, kind)
    monkeypatch.setattr(package, kind, Counted)
    if solver == "DAQP":
        at_once = package.solve
        monkeypatch.setattr(package, "solve", counted)
    for data in (programs(400, 40), programs(400, 20) | {"lb": torch.tensor(-10.0)}):
        calls = 0
        limits = {"batch_time_limit": 1e-4, "rescue": False}
        layer = lpgd.QPLayer(solver, solver_args=limits, executor=SerialExecutor(), on_error="nan")
        begun = 400 - layer.solve(**data).statuses.count(Status.TIME_LIMIT)
        assert calls <= begun + 1  # one that was begun may end at its own limit
        assert begun <= 20
        calls = 0
        lpgd.QPLayer(solver, executor=SerialExecutor())(**data)
        assert calls >= 400


def test_elements_before_the_limit_are_what_they_are_without() -> None:
    data = programs(30)
    whole = lpgd.QPLayer("CLARABEL").solve(**data)
    limited = lpgd.QPLayer("CLARABEL", solver_args={"batch_time_limit": 0.02}, executor=SerialExecutor()).solve(**data)
    assert torch.equal(limited.x[limited.usable], whole.x[limited.usable])
    generous = lpgd.QPLayer("CLARABEL", solver_args={"batch_time_limit": 100.0, "time_limit": 50.0}).solve(**data)
    assert generous.statuses == (Status.SOLVED,) * 30
    assert torch.equal(generous.x, whole.x)


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS", "HIGHS", "OSQP", "INTERIOR"])
def test_an_element_ends_at_its_limit(solver: str) -> None:
    data = programs(2, 150)
    args = {"time_limit": 1e-5, "rescue": False, "refine": False}
    statuses = lpgd.QPLayer(solver, solver_args=args, on_error="nan").solve(**data).statuses
    assert statuses == (Status.TIME_LIMIT,) * 2


def test_limits_are_positive() -> None:
    with pytest.raises(ValueError, match="batch_time_limit is 0"):
        lpgd.Clarabel(batch_time_limit=0.0)
    with pytest.raises(ValueError, match="time_limit is -1"):
        lpgd.Clarabel(time_limit=-1.0)


def test_nodes_end_at_their_limit() -> None:
    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def valley(x: Tensor, y: Tensor) -> Tensor:
        return (100.0 * (y[1:] - y[:-1] ** 2) ** 2 + (1.0 - y[:-1]) ** 2).sum() + 0.0 * x.sum()

    for algorithm in ("newton", "lbfgs", "scipy"):
        node = lpgd.Node(valley, initial=lambda x: -2.0 + 0.1 * x, shape=lambda x: x)
        for name in ("time_limit", "batch_time_limit"):
            limits: dict[str, Any] = {name: 1e-6}
            solver = lpgd.NodeSolver(algorithm=algorithm, **limits)
            assert lpgd.NodeLayer(node, solver=solver, on_error="nan").solve(x).statuses == (Status.TIME_LIMIT,) * 4
            with pytest.raises(SolverError, match=r"TIME_LIMIT.*time_limit"):
                lpgd.NodeLayer(node, solver=solver)(x)
    ball = lpgd.Node(lambda x, y: (y - x).square().sum(), inequality=lambda x, y: y.square().sum() - 1.0)
    limited = lpgd.NodeLayer(ball, solver=lpgd.NodeSolver(time_limit=1e-6), on_error="nan")
    assert limited.solve(x).statuses == (Status.TIME_LIMIT,) * 4
    generous = lpgd.NodeLayer(ball, solver=lpgd.NodeSolver(time_limit=60.0))
    torch.testing.assert_close(generous(x), x / x.norm(dim=-1, keepdim=True), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="time_limit is 0"):
        lpgd.NodeSolver(time_limit=0.0)


ITERATING = [
    name
    for name, case in NODES.items()
    if name.split(",")[0] in ("control", "pose", "unconstrained", "sphere", "quadratic on a simplex")
    or name.startswith("pose of")
    or ("pooling" in name and "quadratic" not in name)
    or (name.startswith("principal vector,") and "lanczos" not in name)
    or "descent" in name
]
"""Rows of the table that take more than one look; on matrices as small as theirs others decompose."""


@pytest.mark.parametrize("name", ITERATING)
def test_solvers_of_nodes_that_iterate_end_at_their_limit(name: str) -> None:
    node, inputs = NODES[name].node, NODES[name].inputs(requires_grad=False)
    limited = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(time_limit=1e-9), on_error="nan").solve(*inputs)
    assert limited.statuses == (Status.TIME_LIMIT,) * limited.batch_size
    generous = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(time_limit=600.0)).solve(*inputs)
    torch.testing.assert_close(
        generous.x, lpgd.NodeLayer(node).solve(*inputs).x, atol=1e-12, rtol=0
    )  # MKL rounds by where a matrix begins


@pytest.mark.parametrize("node", [lpgd.nodes.PrincipalVector(), lpgd.nodes.EigenDecomposition(2, method="iteration")])
def test_nodes_that_iterate_on_large_matrices_end_at_their_limit(node: Any) -> None:
    matrix = torch.randn(2, 150, 150, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix + matrix.mT
    limited = lpgd.NodeLayer(node, solver=lpgd.NodeSolver(time_limit=1e-9), on_error="nan").solve(matrix)
    assert limited.statuses == (Status.TIME_LIMIT,) * 2


@pytest.mark.parametrize("loss", [False, True])
def test_functions_begin_no_element_after_the_limit(loss: bool) -> None:
    def slow(costs: Any, *rest: Any) -> Any:
        time.sleep(0.03)
        return lowest(costs)

    options: dict[str, Any] = {"batch_time_limit": 0.04, "on_error": "nan"}
    costs = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    if loss:
        layer: Any = lpgd.DirectLossLayer(
            slow, lambda x: x, lambda x, target: 0.0, lambda w, **_: lowest(w), lpgd.DirectLoss(1.0), **options
        )
        output = layer(costs, target=[0] * 5)
    else:
        output = lpgd.BlackboxLayer(slow, lpgd.BlackboxBackprop(1.0), **options)(costs)
    statuses = output.info.statuses
    assert statuses[0] is Status.SOLVED
    assert statuses[2:] == (Status.TIME_LIMIT,) * 3
    output.nan_to_num().sum().backward()
    assert costs.grad is not None
    assert not costs.grad[2:].any()
    with pytest.raises(ValueError, match="batch_time_limit is 0"):
        lpgd.BlackboxLayer(slow, lpgd.BlackboxBackprop(1.0), batch_time_limit=0.0)


# -- progress bars ------------------------------------------------------------------------------------------------


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """What each bar has counted in the end; bars are shown whatever a call takes."""
    ends: list[tuple[str, int]] = []

    class Bar(tqdm.tqdm):
        def close(self) -> None:
            if not self.disable:
                ends.append((self.desc, self.n))
            super().close()

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(progress, "DELAY", 0.0)
    yield ends
    assert not progress._bars


def lowest(costs: np.ndarray) -> np.ndarray:
    return (costs == costs.min()).astype(float)


@pytest.mark.parametrize("solver", ["CLARABEL", "INTERIOR", "MOREAU"])
def test_a_bar_counts_the_elements(
    solver: str, counts: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    data = programs(6) | {"q": programs(6)["q"].requires_grad_()}
    # So large a step is left to the solver.
    lpgd.QPLayer(solver, progress=True, gradient=lpgd.LPGD(tau=1e4))(**data).x.sum().backward()
    assert counts[:1] == [("solve", 6)]
    assert counts[1][0] == "differentiate"
    assert counts[1][1] in (6, 12)
    assert "solve:   0%|" in capsys.readouterr().err


@pytest.mark.parametrize("processes", [False, True])
def test_a_bar_counts_what_a_function_solves(processes: bool, counts: list[tuple[str, int]]) -> None:
    costs, executor = torch.rand(6, 3, requires_grad=True), ProcessPoolExecutor(2) if processes else None
    layer = lpgd.BlackboxLayer(lowest, lpgd.BlackboxBackprop(tau=1.0), executor=executor, progress=True)
    layer(costs).sum().backward()
    if executor is not None:
        executor.shutdown()
    assert counts == [("solve", 6), ("differentiate", 6)]


def test_a_bar_counts_the_elements_of_a_node(counts: list[tuple[str, int]]) -> None:
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("simplex"), progress=True)
    layer(torch.rand(6, 3, requires_grad=True)).square().sum().backward()
    assert counts[:1] == [("solve", 6)]


def test_nothing_is_shown_without_being_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    lpgd.QPLayer("CLARABEL")(**programs(3))
    lpgd.QPLayer("CLARABEL", progress=True)(**programs(3))  # it takes no second
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


# -- the log ------------------------------------------------------------------------------------------------------


def test_the_log_tells_of_set_ups_rescues_and_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "lpgd")
    data = programs(3)
    lpgd.QPLayer("CLARABEL")(**data)
    assert any("CLARABEL: 3 elements with 20 variables and 20 rows took" in text for text in caplog.messages)
    caplog.clear()
    lpgd.QPLayer("OSQP", solver_args={"max_iterations": 1, "refine": False}, on_error="nan").solve(**data)
    assert any("element 0 of 3: OSQP left it ITERATION_LIMIT; " in text for text in caplog.messages)
    caplog.clear()
    c = torch.tensor([1.0, 2.0], requires_grad=True)
    with pytest.warns(lpgd.LpgdWarning, match="zero"):
        (lpgd.LPLayer()(c, lb=0.0, ub=1.0).x @ torch.tensor([1.0, -1.0])).backward()
    assert any("zero" in record.getMessage() for record in caplog.records if record.levelno == logging.INFO)


def test_slow_elements_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lpgd")

    def solve(P: Any, q: Any, A: Any, l: Any, u: Any, *rest: Any, **keywords: Any) -> Any:
        time.sleep(0.3 if q[0] > 5 else 1e-4)
        return np.clip(-q / np.asarray(P.todense()).diagonal(), -1, 1), np.zeros(0), np.zeros(len(q))

    q = torch.zeros(8, 2).double()
    q[5] = 9.0
    solver = lpgd.CustomSolver(solve, rescue=False)
    lpgd.QPLayer(solver, on_error="nan").solve(torch.eye(2).double(), q, lb=-1.0, ub=1.0)
    assert any("CUSTOM: element 5 of 8 took 0.3" in text for text in caplog.messages)


def test_the_log_is_silent_by_default() -> None:
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("lpgd").handlers)
