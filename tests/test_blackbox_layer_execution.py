"""BlackboxLayer in use: warm starts, executors, copies, memory, and elements that fail."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from tests.layer_cases import leaf, normal
from tests.oracles import ORACLES, assignment, monotone_path, nearest_in_box

BY_NAME = {case.name: case for case in ORACLES}
LOWER = lpgd.LPGD(tau=1.5, envelope="lower")


class PicklingExecutor(ThreadPoolExecutor):
    """What goes into its tasks and comes out of them is pickled, as to and from processes."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(_through_pickle, pickle.dumps((fn, args, kwargs)))


def _through_pickle(call: bytes) -> Any:
    fn, args, kwargs = pickle.loads(call)
    return pickle.loads(pickle.dumps(fn(*args, **kwargs)))


def counting(c: np.ndarray, start: Any, record: list[Any]) -> np.ndarray:
    record.append((threading.get_ident(), None if start is None else start.copy()))
    if start is not None:
        start[:] = -1.0
    return (c < 0).astype(np.int32)


class TestCalls:
    @pytest.mark.parametrize("batched", [False, True])
    def test_warm_starts_are_the_elements_own_last_answers(self, batched: bool) -> None:
        seen: list[Any] = []

        def solver(c: np.ndarray, start: Any) -> np.ndarray:
            seen.extend((start or [None] * len(c)) if batched else [start])
            return (c < 0).astype(np.int32)

        costs = leaf(normal(3, 4))
        layer = lpgd.BlackboxLayer(solver, lpgd.LPGD(1.0), batched=batched, warm_start=True)
        x = layer(costs)
        assert seen == [None] * 3
        seen.clear()
        x.sum().backward()
        assert [start.tolist() for start in seen] == 2 * x.long().tolist()
        for warm in (True, x, layer.solve(costs)):
            seen.clear()
            layer(costs, warm_start=warm)
            assert [start.tolist() for start in seen] == x.long().tolist()
            assert seen[0].dtype == np.int32
        with pytest.raises(ValueError, match=r"costs of shape \(4,\)"):
            layer(costs[:2], warm_start=x)
        with pytest.raises(ValueError, match="a batch of the same size"):
            layer(costs[:, :2], warm_start=x)

    def test_a_start_that_is_written_into_is_the_calls_own(self) -> None:
        record: list[Any] = []
        layer = lpgd.BlackboxLayer(partial(counting, record=record), lpgd.LPGD(1.0), warm_start=True)
        costs = leaf(normal(2, 3))
        x = layer(costs)
        x.sum().backward()
        assert [start.tolist() for _, start in record[2:]] == 2 * x.long().tolist()

    @pytest.mark.parametrize("make", [ThreadPoolExecutor, PicklingExecutor])
    def test_executors_keep_the_order(self, make: Any) -> None:
        costs = leaf(normal(9, 4, 4))
        expected = lpgd.BlackboxLayer(assignment, LOWER)(costs)
        (gradient,) = torch.autograd.grad((expected * costs.detach()).sum(), costs)
        with make(2) as executor:
            x = lpgd.BlackboxLayer(assignment, LOWER, executor=executor)(costs)
            torch.testing.assert_close(x, expected)
            torch.testing.assert_close(torch.autograd.grad((x * costs.detach()).sum(), costs)[0], gradient)
            with pytest.raises(lpgd.SolverError, match="IndexError for element 4") as raised:
                lpgd.BlackboxLayer(fifth_fails, LOWER, executor=executor)(costs, torch.arange(9))
        assert isinstance(raised.value.__cause__, IndexError)

    def test_without_an_executor_the_calling_thread_solves(self) -> None:
        record: list[Any] = []
        layer = lpgd.BlackboxLayer(partial(counting, start=None, record=record), LOWER)
        layer(normal(5, 3))
        assert {thread for thread, _ in record} == {threading.get_ident()}

    def test_two_forwards_before_a_backward_and_copies(self) -> None:
        case = BY_NAME["path"]
        layer = lpgd.BlackboxLayer(monotone_path, LOWER)
        first, second = leaf(normal(3, 4, 5)), leaf(normal(2, 4, 5, seed=1))
        outputs = [layer(first), pickle.loads(pickle.dumps(copy.deepcopy(layer)))(second)]
        for costs, x in zip((first, second), outputs, strict=True):
            g = normal(*x.shape, seed=2)
            for _ in range(2):
                (gradient,) = torch.autograd.grad(x, costs, g, retain_graph=True)
                torch.testing.assert_close(gradient, case.difference(costs.detach(), g, 1.5, "lower"))
            assert len(x.info.gradients) == 2
        assert "monotone_path" in repr(layer)

    def test_a_call_leaves_no_memory_behind(self) -> None:
        costs, conic = leaf(normal(3, 4)), lpgd.LPLayer(gradient=LOWER)
        for call in (lpgd.BlackboxLayer(nearest_in_box, LOWER), lambda c: conic(c, lb=0.0, ub=1.0)):
            output = call(costs)
            solution = weakref.ref(output.info.solution)
            output[0].sum().backward()
            del output
            gc.collect()
            assert solution() is None

    def test_the_solver_has_the_callers_torch_threads(self) -> None:
        seen: list[int] = []

        def solver(c: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return c < 0

        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            costs = leaf(normal(2, 3))
            lpgd.BlackboxLayer(solver, LOWER, as_torch=True)(costs).sum().backward()
            assert torch.get_num_threads() == 3
        finally:
            torch.set_num_threads(before)
        assert seen == [3] * 4

    def test_second_derivatives_are_refused(self) -> None:
        costs = leaf(normal(2, 3))
        x = lpgd.BlackboxLayer(nearest_in_box, LOWER)(costs)
        (gradient,) = torch.autograd.grad(x.sum(), costs, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            gradient.sum().backward()


def fifth_fails(c: np.ndarray, place: np.ndarray) -> np.ndarray:
    return assignment(c) if place != 4 else c[7]


class TestFailures:
    def test_exceptions_name_the_element_and_are_chained(self) -> None:
        costs = leaf(normal(6, 4, 4))
        with pytest.raises(lpgd.SolverError, match="IndexError for element 4") as raised:
            lpgd.BlackboxLayer(fifth_fails, LOWER, on_error="nan")(costs, torch.arange(6))
        assert raised.value.indices == (4,)
        assert isinstance(raised.value.__cause__, IndexError)
        calls: list[int] = []

        def fails_later(c: np.ndarray, place: np.ndarray) -> np.ndarray:
            calls.append(int(place))
            if len(calls) > 6 and place == 3:
                raise ArithmeticError("no luck")
            return assignment(c)

        x = lpgd.BlackboxLayer(fails_later, LOWER)(costs, torch.arange(6))
        # Of perturbed costs an exception ends the element's side; here it raises on both.
        with (
            pytest.warns(lpgd.LpgdWarning, match=r"ArithmeticError in the backward pass.*element 3: no luck"),
            pytest.raises(lpgd.SolverError, match=r"no perturbed problem of elements \[3\]"),
        ):
            x[2:].sum().backward()  # elements 0 and 1 have no cotangent
        with pytest.raises(lpgd.SolverError, match="elements 0, 1, 2, 3, 4, 5"):
            lpgd.BlackboxLayer(lambda c: c[7], LOWER, batched=True)(costs)

    @pytest.mark.parametrize(("answer", "error", "message"), [
        (np.zeros(3), ValueError, r"shape \(3,\) for element 1"),
        (np.array(["a", "b"]), TypeError, "for element 1"),
        (np.array([1j, 0]), TypeError, "complex128 for element 1"),
        ([[1, 2], [3]], TypeError, "a list for element 1"),
        (lpgd.Status.SOLVED, ValueError, "SOLVED without a solution for element 1"),
    ])  # fmt: skip
    def test_answers_of_a_wrong_kind(self, answer: Any, error: type[Exception], message: str) -> None:
        layer = lpgd.BlackboxLayer(lambda c, place: answer if place == 1 else c, LOWER)
        with pytest.raises(error, match=message):
            layer(normal(3, 2), torch.arange(3))

    def test_batched_answers_of_a_wrong_length(self) -> None:
        for answer, message in ((np.zeros((2, 2)), "2 rows for the 3 elements 0, 1, 2"), (4.0, "a float")):
            with pytest.raises(ValueError, match=message):
                lpgd.BlackboxLayer(lambda c, answer=answer: answer, LOWER, batched=True)(normal(3, 2))

    @pytest.mark.parametrize("as_torch", [False, True])
    @pytest.mark.parametrize("batched", [False, True])
    def test_no_solution_and_data_that_are_not_finite(self, as_torch: bool, batched: bool) -> None:
        costs = normal(6, 2)
        costs[0] = torch.tensor([torch.nan, 1.0])
        costs = leaf(costs)
        seen: list[int] = []

        def solve_one(c: Any, place: Any) -> Any:
            place = int(place)
            seen.append(place)
            special = {1: None, 2: c * torch.nan, 3: lpgd.Status.TIME_LIMIT, 4: c + torch.inf}
            return c < 0 if place == 5 else special[place]

        def solve_all(c: Any, places: Any) -> Any:
            return [solve_one(*row) for row in zip(c, places, strict=True)]

        solver = solve_all if batched else solve_one
        make = partial(lpgd.BlackboxLayer, solver, LOWER, batched=batched, as_torch=as_torch)
        message = r"3 of 6: TIME_LIMIT.*0 of 6: INVALID_DATA.*1, 2, 4 of 6: NO_SOLUTION"
        with pytest.raises(lpgd.SolverError, match=message):
            make()(costs, torch.arange(6))
        x = make(on_error="nan")(costs, torch.arange(6))
        assert 0 not in seen
        statuses = [status.name for status in x.info.statuses]
        assert statuses == ["INVALID_DATA", "NO_SOLUTION", "NO_SOLUTION", "TIME_LIMIT", "NO_SOLUTION", "SOLVED"]
        (gradient,) = torch.autograd.grad(x.nansum(), costs)
        assert x[:5].isnan().all()
        torch.testing.assert_close(x[5], (costs[5] < 0).double())
        assert not gradient[:5].any()
        torch.testing.assert_close(gradient[5], ((costs[5] + 1.5 < 0).double() - x[5]).detach() / 1.5)
        with pytest.warns(lpgd.LpgdWarning, match="no solution for element 3 of 6: TIME_LIMIT"):
            make(on_error="warn")(costs, torch.arange(6))

    def test_no_solution_after_a_tilt(self) -> None:
        # One side falls back to the other; neither side is an error, for there is nothing to fall back on.
        costs = leaf(torch.tensor([[0.5], [-0.5]], dtype=torch.float64))
        layer = lpgd.BlackboxLayer(lambda c: c < 0 if abs(c[0]) < 1.0 else None, lpgd.LPGD(0.6))
        x = layer(costs)
        with pytest.warns(lpgd.LpgdWarning, match="other side"):
            (gradient,) = torch.autograd.grad(x.sum(), costs)
        assert x.info.gradients[0].used == ["upper", "lower"]
        torch.testing.assert_close(gradient, torch.full((2, 1), -1 / 0.6, dtype=torch.float64))
        layer.gradient = lpgd.LPGD(4.0)
        x = layer(costs)
        with pytest.raises(lpgd.SolverError, match=r"elements \[0, 1\] has a solution.*smaller tau"):
            x.sum().backward()
