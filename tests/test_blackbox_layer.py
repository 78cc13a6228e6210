"""BlackboxLayer: formulas by enumeration on assignment, path and knapsack solvers, and everything around them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.problems import LinearData, LinearPoint, LinearProblem, LinearStructure
from tests.layer_cases import leaf, normal
from tests.oracles import ORACLES, OracleCase, assignment, nearest_in_box

BY_NAME = {case.name: case for case in ORACLES}
LOWER = lpgd.LPGD(tau=1.5, envelope="lower")


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
    expected = case.difference(costs.detach(), g, method.tau, method.envelope)
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


@pytest.mark.parametrize("sense", ["min", "max"])
def test_a_quadratic_term_for_a_solver_that_takes_one(sense: str) -> None:
    def solver(costs: np.ndarray, rho: float, center: np.ndarray | None) -> np.ndarray:
        return nearest_in_box(costs if sense == "min" else -costs, rho, center)

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
        own, rows = step[4 * part : 4 * part + 4], torch.arange(4 * part, 4 * part + 4)
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
    part = problem.select(torch.tensor([3, 1]))
    scattered = problem.scatter(
        torch.tensor([3, 1]), part.gradient_difference(LinearPoint(x[[3, 1]]), LinearPoint(0 * x[:2]), step[:2])
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
        vectors = lpgd.BlackboxLayer(nearest_in_box, LOWER)
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


def cheapest_of_positive(costs: np.ndarray) -> np.ndarray:
    """A solver that refuses negative costs, as Dijkstra's algorithm does."""
    if (costs < 0).any():
        raise ValueError("a negative length")
    return (costs == costs.min()).astype(float)


def test_perturbed_costs_that_a_solver_refuses_end_their_element_alone() -> None:
    costs = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.5, 9.0]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]], dtype=torch.float64)
    # Element 1: the upper side has costs (1 - 3, 1.5, 9), which are refused; the lower one (4, 1.5, 9) is there.
    layer = lpgd.BlackboxLayer(cheapest_of_positive, lpgd.LPGD(tau=1.0))
    with pytest.warns(lpgd.LpgdWarning) as caught:
        (gradient,) = torch.autograd.grad((layer(costs) * weights).sum(), costs)
    texts = " ".join(str(item.message) for item in caught)
    assert "ValueError in the backward pass, for the perturbed costs of element 1 (of element 1: a negative" in texts
    assert "from the other side" in texts
    expected = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)


def test_valid_costs_make_perturbed_costs_such_as_a_solver_takes() -> None:
    costs = torch.tensor([[1.0, 1.5, 9.0]], dtype=torch.float64, requires_grad=True)
    layer = lpgd.BlackboxLayer(
        cheapest_of_positive, lpgd.LPGD(tau=2.0, envelope="upper"), valid_costs=lambda c: c.clip(min=0.0)
    )
    weights = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(layer(costs) @ weights, costs, torch.ones(1, dtype=torch.float64))
    # The costs (1, 1.5 - 2, 9) are (1, 0, 9) when clipped: the cheapest is the second; (x(c) - x(c - τ g)) / τ.
    torch.testing.assert_close(gradient, torch.tensor([[0.5, -0.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("on_error", ["nan", "warn", "raise"])
def test_elements_without_any_perturbed_solution_follow_on_error(on_error: Any) -> None:
    costs = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.5, 9.0]], dtype=torch.float64, requires_grad=True)
    # Element 0 loses both sides; the cheapest of element 1 moves from the first to the second on the lower side.
    weights = torch.tensor([[9.0, -9.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    layer = lpgd.BlackboxLayer(cheapest_of_positive, lpgd.LPGD(tau=0.9), on_error=on_error)
    output = layer(costs)
    loss = (output * weights).sum()
    if on_error == "raise":
        match = r"no perturbed problem of elements \[0\]"
        with pytest.warns(lpgd.LpgdWarning), pytest.raises(lpgd.SolverError, match=match):
            loss.backward()
        return
    with pytest.warns(lpgd.LpgdWarning):
        (gradient,) = torch.autograd.grad(loss, costs)
    expected = torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, 0.0]], dtype=torch.float64) / 1.8
    torch.testing.assert_close(gradient, expected)
    assert output.info.gradients[-1].used == ["no perturbed solution", "average"]
