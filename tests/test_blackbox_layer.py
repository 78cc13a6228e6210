"""BlackboxLayer: formulas by enumeration on assignment, path and knapsack solvers, and everything around them."""

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
from lpgd.problems import LinearData, LinearPoint, LinearProblem, LinearStructure
from tests.layer_cases import leaf, normal
from tests.oracles import ORACLES, OracleCase, assignment, monotone_path

BY_NAME = {case.name: case for case in ORACLES}
LOWER = lpgd.LPGD(tau=1.5, envelope="lower")


def differences(case: OracleCase, costs: Tensor, g: Tensor, tau: float, envelope: str) -> Tensor:
    """The gradient by the formula, with solutions by enumeration."""
    plus, minus = (case.best(costs + case.sign * step * g) for step in (tau, -tau))
    here = case.best(costs)
    ends = {"lower": (plus, here, tau), "upper": (here, minus, tau), "average": (plus, minus, 2 * tau)}
    a, b, width = ends[envelope]
    return case.sign * (a - b) / width


@pytest.mark.parametrize("case", ORACLES, ids=lambda case: case.name)
@pytest.mark.parametrize("method", [
    lpgd.BlackboxBackprop(2.0), lpgd.LPGD(1.5, envelope="lower"), lpgd.LPGD(1.5, envelope="upper"), lpgd.LPGD(1.5),
], ids=["blackbox", "lower", "upper", "average"])  # fmt: skip
def test_gradients_are_the_formulas(case: OracleCase, method: lpgd.LPGD) -> None:
    costs, g = leaf(normal(40, *case.shape)), normal(40, *case.shape, seed=1)
    layer = lpgd.BlackboxLayer(case.solver, method, case.sense)
    x = layer(costs)
    torch.testing.assert_close(x, case.best(costs), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(x, costs, g)
    expected = differences(case, costs.detach(), g, method.tau, method.envelope)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    info = x.info.gradients[0]
    assert info.counts == {method.envelope: 40}
    torch.testing.assert_close(info.moved, expected.flatten(1).any(1) | info.moved)
    assert expected.flatten(1).any(1).sum() > 0


@pytest.mark.parametrize("case", ORACLES, ids=lambda case: case.name)
def test_forward_mode_is_the_difference_along_the_tangent(case: OracleCase) -> None:
    costs, tangent = normal(10, *case.shape), normal(10, *case.shape, seed=1)
    layer = lpgd.BlackboxLayer(case.solver, lpgd.LPGD(1.5), case.sense)
    _, change = torch.func.jvp(layer, (costs,), (tangent,))
    expected = (case.best(costs + 1.5 * tangent) - case.best(costs - 1.5 * tangent)) / 3.0
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)


def projection(costs: np.ndarray, rho: float = 0.0, center: np.ndarray | None = None) -> np.ndarray:
    """Minimises over [0, 1]ⁿ."""
    if center is None:
        return (costs < 0).astype(float)
    return np.clip(center - costs / rho, 0.0, 1.0)


@pytest.mark.parametrize("sense", ["min", "max"])
def test_a_quadratic_term_for_a_solver_that_takes_one(sense: str) -> None:
    def solver(costs: np.ndarray, rho: float, center: np.ndarray | None) -> np.ndarray:
        return projection(costs if sense == "min" else -costs, rho, center)

    sign = 1.0 if sense == "min" else -1.0
    costs, g = leaf(normal(8, 3, 2)), normal(8, 3, 2, seed=1)
    layer = lpgd.BlackboxLayer(solver, lpgd.LPGD(0.7, rho=2.0), sense, quadratic=True)
    (gradient,) = torch.autograd.grad(layer(costs), costs, g)
    c = sign * costs.detach()
    x = (c < 0).double()
    plus, minus = ((x - (c + step * g) / 2.0).clamp(0, 1) for step in (0.7, -0.7))
    torch.testing.assert_close(gradient, sign * (plus - minus) / 1.4, rtol=1e-12, atol=1e-12)


def test_problem_contract() -> None:
    # Tilt and augmentation change the Lagrangian by what they say; gradients are its derivatives, for parts too.
    structure, c, x = LinearStructure((2, 3)), normal(4, 6), normal(4, 6, seed=1)
    problem = LinearProblem(structure, LinearData(c), 4)
    g, step, center = LinearPoint(normal(4, 6, seed=2)), normal(8, seed=3), normal(4, 6, seed=4)
    tilted = problem.augment(0.4, center).tilt(step, g)
    for part in range(2):
        own, rows = step[4 * part : 4 * part + 4], range(4 * part, 4 * part + 4)
        expected = ((c + own[:, None] * g.x) * x).sum(-1) + 0.2 * (x - center).square().sum(-1)
        torch.testing.assert_close(tilted.select(rows).lagrangian(LinearPoint(x)), expected)
    again = problem.augment(0.4, center).augment(0.6, x)
    difference = again.objective(g.x) - again.objective(center)  # up to a constant
    expected = problem.objective(g.x) - problem.objective(center)
    for rho, middle in ((0.4, center), (0.6, x)):
        expected += 0.5 * rho * ((g.x - middle).square().sum(-1) - (center - middle).square().sum(-1))
    torch.testing.assert_close(difference, expected)
    leaf_c = leaf(c)
    (gradient,) = torch.autograd.grad((leaf_c * x).sum(), leaf_c)
    part = problem.select([3, 1])
    scattered = problem.scatter(
        [3, 1], part.gradient_difference(LinearPoint(x[[3, 1]]), LinearPoint(0 * x[:2]), step[:2])
    )
    assert not scattered.c[[0, 2]].any()
    torch.testing.assert_close(scattered.c[[3, 1]], step[:2, None] * gradient[[3, 1]])
    units = problem.tilt_unit(LinearPoint(x), g)
    torch.testing.assert_close(units, c.abs().amax(-1) / g.x.abs().amax(-1))
    with pytest.raises(ValueError, match="float64 of shape"):
        LinearProblem(structure, LinearData(c.float()), 4)


class TestConstruction:
    @pytest.mark.parametrize(("method", "message"), [
        (None, "give a method"),
        (lpgd.ImplicitKKT(), "optimality conditions"),
        (lpgd.LPGD(), "give tau"),
        (lpgd.LPGD(1.0, rho=0.1), "quadratic=True"),
        ("lpgd", "gradient method"),
    ])  # fmt: skip
    def test_methods_that_do_not_fit(self, method: Any, message: str) -> None:
        with pytest.raises(TypeError, match=message):
            lpgd.BlackboxLayer(assignment, method)
        layer = lpgd.BlackboxLayer(assignment, LOWER)
        with pytest.raises(TypeError, match="gradient method" if method is None else message):
            layer.gradient = method
        assert layer.gradient is LOWER

    @pytest.mark.parametrize(("options", "error"), [
        ({"sense": "maximum"}, ValueError), ({"on_error": "ignore"}, ValueError), ({"executor": 4}, TypeError),
        ({"ndim": -1}, ValueError), ({"features": 3}, TypeError),
    ])  # fmt: skip
    def test_options(self, options: dict[str, Any], error: type[Exception]) -> None:
        with pytest.raises(error, match=next(iter(options))):
            lpgd.BlackboxLayer(assignment, LOWER, **options)
        with pytest.raises(TypeError, match="callable"):
            lpgd.BlackboxLayer("dijkstra", LOWER)  # pyright: ignore[reportArgumentType]


class TestInputs:
    def test_batch_dimensions(self) -> None:
        costs = normal(2, 3, 4, 4)
        layer = lpgd.BlackboxLayer(assignment, LOWER, ndim=2)
        whole = layer(costs)
        assert whole.batch_shape == (2, 3)
        torch.testing.assert_close(whole[1, 2], layer(costs[1, 2]))
        assert layer(costs[:, :0]).shape == (2, 0, 4, 4)
        vectors = lpgd.BlackboxLayer(projection, LOWER)
        assert vectors(normal(5)).tolist() == vectors(normal(1, 5))[0].tolist() == (normal(5) < 0).double().tolist()
        with pytest.raises(ValueError, match=r"costs has shape \(4,\)"):
            layer(costs[0, 0, 0])
        with pytest.raises(TypeError, match="pass a torch tensor"):
            layer(costs.numpy())
        with pytest.raises((TypeError, ValueError), match="costs"):
            layer(costs.long())

    def test_types(self) -> None:
        costs = normal(3, 4, 4).float().requires_grad_()
        seen = []

        def solver(c: np.ndarray) -> np.ndarray:
            seen.append(c.dtype)
            return assignment(c)

        x = lpgd.BlackboxLayer(solver, LOWER)(costs)
        x.sum().backward()
        assert x.dtype == costs.grad.dtype == torch.float32
        assert set(seen) == {np.dtype(np.float64)}

    def test_extra_inputs_belong_to_their_elements_in_both_passes(self) -> None:
        costs, g = leaf(normal(5, 6)), normal(5, 6, seed=1)
        g[1] = 0.0  # left out of the perturbed batch
        sizes, names = torch.tensor([1, 2, 3, 4, 5]), [f"element {i}" for i in range(5)]
        masks = np.arange(5)[:, None] > np.arange(6)

        def smallest(c: np.ndarray, size: np.ndarray, name: str, mask: np.ndarray) -> np.ndarray:
            assert name == f"element {size - 1}"
            assert mask.sum() == size - 1
            assert isinstance(size, np.integer | np.ndarray)
            return (c <= np.sort(c)[int(size) - 1]).astype(float)

        def best(c: Tensor) -> Tensor:
            return (c <= c.sort().values.gather(1, sizes[:, None] - 1)).double()

        layer = lpgd.BlackboxLayer(smallest, LOWER)
        x = layer(costs, sizes, names, masks)
        torch.testing.assert_close(x, best(costs))
        (gradient,) = torch.autograd.grad(x, costs, g)
        torch.testing.assert_close(gradient, (best(costs + 1.5 * g) - best(costs)) / 1.5)
        assert x.info.gradients[0].used[1] == "zero cotangent"
        one = layer(costs[2], sizes[2], names[2], masks[2])
        torch.testing.assert_close(one, x[2])
        for wrong, error in (
            (sizes[:4], ValueError),
            (names[:4], ValueError),
            ({"a": 1}, TypeError),
            ("abcde", TypeError),
        ):
            with pytest.raises(error, match="extra input 0"):
                layer(costs, wrong)
        with pytest.raises(ValueError, match="detach"):
            layer(costs, costs)

    def test_a_solver_may_write_into_what_it_gets(self) -> None:
        costs, extra = leaf(normal(3, 4)), normal(3, 2, seed=1)
        before = costs.detach().clone(), extra.clone()
        kept = np.zeros(4)

        def vandal(c: np.ndarray, e: np.ndarray) -> np.ndarray:
            kept[:] = c < 0
            c[:], e[:] = 7.0, 7.0
            return kept  # and hands out the same array each time

        x = lpgd.BlackboxLayer(vandal, LOWER)(costs, extra)
        (gradient,) = torch.autograd.grad(x.sum(), costs)
        torch.testing.assert_close(x, (before[0] < 0).double())
        torch.testing.assert_close(gradient, ((before[0] + 1.5 < 0).double() - x) / 1.5)
        assert torch.equal(costs, before[0])
        assert torch.equal(extra, before[1])

    def test_tensors_and_batches(self) -> None:
        costs, extra, g = leaf(normal(6, 3, 2)), normal(6, seed=1), normal(6, 3, 2, seed=2)
        plain = lpgd.BlackboxLayer(lambda c, e: c < e, LOWER)
        expected = plain(costs, extra)
        (gradient,) = torch.autograd.grad(expected, costs, g)

        def tensors(c: Tensor, e: Tensor) -> Tensor:
            assert c.dtype == torch.float64
            assert not torch.is_grad_enabled()
            return c < e.reshape(-1, *[1] * (c.ndim - 1)) if e.ndim else c < e

        def arrays(c: np.ndarray, e: np.ndarray) -> list[Any]:
            return [row < own for row, own in zip(c, e, strict=True)]

        for layer in (
            lpgd.BlackboxLayer(tensors, LOWER, as_torch=True),
            lpgd.BlackboxLayer(tensors, LOWER, as_torch=True, batched=True),
            lpgd.BlackboxLayer(arrays, LOWER, batched=True),
            lpgd.BlackboxLayer(arrays, LOWER, batched=True, executor=ThreadPoolExecutor(2)),
        ):
            x = layer(costs, extra)
            torch.testing.assert_close(x, expected)
            torch.testing.assert_close(torch.autograd.grad(x, costs, g)[0], gradient)


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
                torch.testing.assert_close(gradient, differences(case, costs.detach(), g, 1.5, "lower"))
            assert len(x.info.gradients) == 2
        assert "monotone_path" in repr(layer)

    def test_a_call_leaves_no_memory_behind(self) -> None:
        costs, conic = leaf(normal(3, 4)), lpgd.LPLayer(gradient=LOWER)
        for call in (lpgd.BlackboxLayer(projection, LOWER), lambda c: conic(c, lb=0.0, ub=1.0)):
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
        x = lpgd.BlackboxLayer(projection, LOWER)(costs)
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
        with pytest.raises(lpgd.SolverError, match="ArithmeticError for element 3: no luck"):
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
