"""CvxpyLayer as an object: called from threads, run on executors, copied, warm-started, part of a model."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch import Tensor

import lpgd
from tests.layer_cases import METHODS, at_once, close, data, leaf, normal, program, weighted

# Threads and executors


def test_threads_share_a_layer() -> None:
    layers = [program(gradient=method) for method in METHODS]
    cases = [[leaf(datum) for datum in data(3, seed=10 * k)] for k in range(6)]

    def run(layer: lpgd.CvxpyLayer, tensors: list[Tensor]) -> list[Tensor]:
        own = [leaf(tensor) for tensor in tensors]
        outputs = layer(*own, warm_start=True)
        return [*outputs, *torch.autograd.grad(weighted(outputs), own)]

    for layer in layers:
        expected = [run(layer, tensors) for tensors in cases]

        def work(k: int, layer: lpgd.CvxpyLayer = layer) -> list[Tensor]:
            return [run(layer, cases[k]) for _ in range(3)][-1]

        for found, wanted in zip(at_once(work, len(cases)), expected, strict=True):
            close(found, wanted, 1e-5)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_executors_give_the_serial_result_in_the_serial_order(method: lpgd.LPGD) -> None:
    tensors = [leaf(datum) for datum in data(9)]

    def run(executor: Executor | None) -> list[Tensor]:
        outputs = program(gradient=method, executor=executor)(*tensors)
        return [*outputs, *torch.autograd.grad(weighted(outputs), tensors)]

    expected = run(lpgd.SerialExecutor())
    close(run(None), expected, 1e-8)
    for workers in (1, 2, 3):
        with ThreadPoolExecutor(workers) as executor:
            close(run(executor), expected, 1e-8)


def test_processes_give_the_serial_result_in_the_serial_order() -> None:
    tensors = [leaf(datum) for datum in data(5)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        for method in METHODS[:2]:
            results = []
            for where in (lpgd.SerialExecutor(), executor):
                outputs = program(gradient=method, executor=where)(*tensors)
                results.append([*outputs, *torch.autograd.grad(weighted(outputs), tensors)])
            close(results[1], results[0], 1e-8)
        failing = program(executor=executor)
        with pytest.raises(lpgd.SolverError) as caught:
            failing(*tensors[:4], torch.tensor([[1.0], [-3.0], [1.0], [1.0], [1.0]]).double().expand(5, 4))
        assert caught.value.indices == (1,)


def test_an_executor_is_used_forward_and_backward() -> None:
    class Counting(Executor):
        count = 0

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            self.count += 1
            future: Future[Any] = Future()
            future.set_result(fn(*args, **kwargs))
            return future

    executor = Counting()
    tensors = [leaf(datum) for datum in data(4)]
    outputs = program(gradient=lpgd.LPGD(tau=1e-3), executor=executor, solver=lpgd.Clarabel(refine=False))(*tensors)
    forward = executor.count
    assert forward > 0
    weighted(outputs).backward()
    assert executor.count > forward


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_a_call_leaves_the_threads_of_blas_as_they_were() -> None:
    tensors = [leaf(datum) for datum in data(8)]
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert max(before) == 2
        for method in METHODS:
            outputs = program(gradient=method)(*tensors)
            assert blas_threads() == before
            weighted(outputs).backward()
            assert blas_threads() == before
            with pytest.raises(lpgd.SolverError):
                program(gradient=method)(*tensors[:4], torch.full((4,), -3.0))
            assert blas_threads() == before


# Copies and modules


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_work_also_after_calls(way: str) -> None:
    def copied(layer: lpgd.CvxpyLayer) -> lpgd.CvxpyLayer:
        if way == "deepcopy":
            return copy.deepcopy(layer)
        if way == "pickle":
            return pickle.loads(pickle.dumps(layer))
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    tensors = [leaf(datum) for datum in data(3)]
    with ThreadPoolExecutor(2) as executor:
        layer = program(solver="SCS", gradient=lpgd.LPGD(tau=1e-3), executor=executor, on_error="nan")
        outputs = layer(*tensors)
        gradients = torch.autograd.grad(weighted(outputs), tensors)
        duplicate = copied(layer)
    assert (duplicate.gradient, duplicate.solver, duplicate.on_error) == (layer.gradient, layer.solver, "nan")
    again = duplicate(*tensors, warm_start=True)
    close(again, outputs)
    close(torch.autograd.grad(weighted(again), tensors), gradients, 1e-4)
    close(duplicate(*tensors, warm_start=outputs), outputs)  # a previous result of the original
    duplicate.gradient = lpgd.ImplicitKKT()
    assert isinstance(layer.gradient, lpgd.LPGD)


class Projection(torch.nn.Module):
    """A layer of one output as a part of a sequential model."""

    def __init__(self) -> None:
        super().__init__()
        x, c = cp.Variable(2), cp.Parameter(2)
        self.layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x >= 0]), [c], [x])

    def forward(self, tensor: Tensor) -> Tensor:
        return self.layer(tensor)[0]


def test_a_layer_is_a_module() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
            self.layer = Projection()

        def forward(self, features: Tensor) -> Tensor:
            return self.layer(self.inner(features) + 0.1)

    torch.manual_seed(0)
    model = Model().double().to("cpu").train()
    assert list(model.state_dict()) == ["inner.0.weight", "inner.0.bias"]
    assert "gradient=ImplicitKKT" in repr(model)
    assert "ImplicitKKT" in repr(model)
    model.load_state_dict(model.state_dict())
    features, target = normal(8, 3), torch.full((8, 2), 0.1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(features) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    sequential = torch.nn.Sequential(Projection(), torch.nn.Flatten())
    assert sequential(normal(4, 2)).shape == (4, 2)


def test_module_hooks_leave_the_outputs_as_they_are() -> None:
    layer, values, seen = Projection().layer, normal(3, 2).requires_grad_(), []
    (expected,) = layer(values)
    (gradient,) = torch.autograd.grad(expected.sum(), values)
    layer.register_full_backward_hook(lambda _, inputs, outputs: seen.append((inputs[0].shape, outputs[0].shape)))
    (found,) = layer(values)  # PyTorch makes a new tuple of it, by one argument for each tensor
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found.sum(), values)[0], gradient)
    assert seen == [(values.shape, expected.shape)]


# Warm starts


def test_warm_starts_save_iterations_and_change_nothing() -> None:
    layer = program(solver="SCS")
    tensors = data(4, seed=40)  # no workspace has seen these before: SCS remembers
    cold = layer(*tensors)
    assert cold.info.solution is not None
    assert cold.info.solution.iterations.min() > 25
    for previous in (True, cold, cold.info.solution, layer.solve(*tensors)):
        warm = layer(*tensors, warm_start=previous)
        close(warm, cold)
        assert warm.info.solution is not None
        assert warm.info.solution.iterations.max() <= 25
        assert layer.solve(*tensors, warm_start=previous).iterations.max() <= 25


@dataclass(frozen=True)
class Recording(lpgd.SCS):
    """SCS, with a note of how many states each solve starts from."""

    seen: list[int] = field(default_factory=list, compare=False)

    def solve(
        self, problem: lpgd.ConicProblem, states: Sequence[Any] = (), executor: Executor | None = None
    ) -> lpgd.ConicSolution:
        self.seen.append(len(states))
        return super().solve(problem, states, executor)


def test_warm_start_true_is_this_threads_last_result_of_that_batch_shape() -> None:
    seen: list[int] = []
    layer = program(solver=Recording(seen=seen))
    for batch in ((4,), (2, 2), (2, 2), (4,), (), (1,), (1,)):
        layer.solve(*data(*batch), warm_start=True)
    assert seen == [0, 0, 4, 0, 0, 0, 1]
    thread = threading.Thread(target=lambda: layer.solve(*data(1), warm_start=True))
    thread.start()
    thread.join()
    layer(*data(1), warm_start=True)
    layer(*data(1))
    assert seen[7:] == [0, 1, 0]


def test_warm_starts_survive_bounds_that_come_and_go() -> None:
    x, c, u = cp.Variable(3), cp.Parameter(3), cp.Parameter(3)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x <= u, x >= -1])
    layer = lpgd.CvxpyLayer(problem, [c, u], [x], solver="SCS")
    point, bound = torch.tensor([2.0, -3.0, 0.5]).double(), torch.tensor([1.0, torch.inf, torch.inf]).double()
    previous = layer(point, torch.ones(3).double())
    close(layer(point, bound, warm_start=previous), [torch.tensor([1.0, -1.0, 0.5]).double()])


def test_warm_starts_that_do_not_fit_are_refused() -> None:
    layer, tensors = program(solver="SCS"), data(3)
    output = layer(*tensors)
    with pytest.raises(ValueError, match=r"3 elements.*this call has 2 elements.*batch of the same size"):
        layer(*data(2), warm_start=output)
    with pytest.raises(ValueError, match="4 variables and 1 rows; this call has 3 elements with 5"):
        program(n=5, solver="SCS")(*data(3, n=5), warm_start=output.info.solution)
    for wrong in (3, tuple(output), "yes"):
        with pytest.raises(TypeError, match=f"{type(wrong).__name__}; it takes True, an output or a Solution"):
            layer(*tensors, warm_start=wrong)


def test_solvers_without_warm_start_ignore_it() -> None:
    layer, tensors = program(solver="CLARABEL"), data(3)
    close(layer(*tensors, warm_start=layer(*tensors)), layer(*tensors), 0.0)
    close(layer(*tensors, warm_start=True), layer(*tensors), 0.0)
