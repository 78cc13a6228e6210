"""Marginals of transport: uniform ones by default, and empty bins."""

from __future__ import annotations

import warnings

import mpmath
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes.transport.node import OptimalTransport
from tests.node_cases import random
from tests.test_nodes import NO_CUDA
from tests.test_nodes_transport import draw

LAYER = lpgd.NodeLayer(OptimalTransport(gamma=5.0))


def without(mass: Tensor, *places: int) -> Tensor:
    """The same without mass at these places, of the same sum."""
    total, mass = mass.sum(-1, keepdim=True), mass.clone()
    mass[..., list(places)] = 0.0
    return mass * (total / mass.sum(-1, keepdim=True))


def test_marginals_are_uniform_where_none_are_given():
    """Lecture notes of Gould, eq. 147: r = 1/m, c = 1/n."""
    cost, rows, columns = draw(4, 6)
    m, n = cost.new_full((4,), 1 / 4), cost.new_full((6,), 1 / 6)
    expected = LAYER(cost, m, n)
    for call in ((cost,), (cost, None), (cost, None, None), (cost, m), (cost, None, n)):
        torch.testing.assert_close(LAYER(*call), expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(LAYER(cost, 3 * rows), LAYER(cost, 3 * rows, 3 * n), rtol=0, atol=1e-13)
    torch.testing.assert_close(LAYER(cost, None, columns), LAYER(cost, m, columns), rtol=0, atol=1e-14)
    assert LAYER(cost[0]).shape == (4, 6)
    assert LAYER(cost.float()).dtype == torch.float32
    torch.testing.assert_close(LAYER.solve(cost).x, expected.flatten(1), rtol=0, atol=1e-14)


def test_derivatives_with_uniform_marginals():
    cost = draw(3, 4, batch=2)[0].requires_grad_()
    assert torch.autograd.gradcheck(LAYER, (cost,), fast_mode=True)
    assert torch.autograd.gradgradcheck(LAYER, (cost,), fast_mode=True)
    mass = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)  # of both marginals
    rows = draw(3, 4, batch=2)[1]
    assert torch.autograd.gradcheck(lambda cost, mass: LAYER(cost, mass * rows), (cost, mass), fast_mode=True)


def test_calls_with_too_many_or_too_few_marginals_are_refused():
    cost, rows, columns = draw(3, 4)
    with pytest.raises(ValueError, match=r"takes 1 to 3 inputs \(cost, rows, columns\); it got 4"):
        LAYER(cost, rows, columns, columns)
    with pytest.raises(ValueError, match="takes 1 to 3 inputs"):
        LAYER()
    with pytest.raises(TypeError, match="cost is None; pass"):
        LAYER(None, rows, columns)
    with pytest.raises(TypeError, match="rows is a list"):
        LAYER(cost, [1.0])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="cost has shape"):
        LAYER(rows[0])


@pytest.mark.parametrize("gamma", [0.5, 20.0, 500.0])
@pytest.mark.parametrize(("m", "n"), [(4, 6), (7, 5), (20, 15)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_empty_bin_is_a_row_of_zeros_and_leaves_the_rest_as_without_it(gamma, m, n, dtype):
    cost, rows, columns = (part.to(dtype) for part in draw(m, n, batch=4))
    rows[1], columns[2] = without(rows[1], 0, 2), without(columns[2], 1)
    rows[3], columns[3] = without(rows[3], 1, m - 1), without(columns[3], 0, n - 1)
    node = OptimalTransport(gamma=gamma)
    plan = lpgd.NodeLayer(node)(cost, rows, columns)
    assert (plan[rows == 0] == 0).all()
    assert (plan.mT[columns == 0] == 0).all()
    for element in range(4):
        i, j = rows[element] > 0, columns[element] > 0
        alone = lpgd.NodeLayer(node)(cost[element][i][:, j], rows[element][i], columns[element][j])
        close = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(plan[element][i][:, j], alone, rtol=0, atol=close)


@pytest.mark.parametrize("method", [None, lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-6)])
@pytest.mark.parametrize(("m", "n"), [(4, 5), (5, 4)])
def test_gradients_on_the_support_are_those_without_empty_bins(method, m, n):
    cost, rows, columns = draw(m, n, batch=2, seed=1)
    rows, columns = without(rows, 1), without(columns, 0, 3)
    i, j = rows[0] > 0, columns[0] > 0
    weights = torch.randn(2, m, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = tuple(part.requires_grad_() for part in (cost, rows, columns))
    layer = lpgd.NodeLayer(OptimalTransport(gamma=5.0), method)
    found = torch.autograd.grad((layer(*whole) * weights).sum(), whole)
    part = tuple(own.detach().requires_grad_() for own in (cost[:, i][:, :, j], rows[:, i], columns[:, j]))
    plan = lpgd.NodeLayer(OptimalTransport(gamma=5.0))(*part)
    exact = torch.autograd.grad((plan * weights[:, i][:, :, j]).sum(), part)
    # Empty bins are a little soft to the optimality conditions.
    close = 1e-10 if method is None else 1e-4 if isinstance(method, lpgd.ImplicitKKT) else 1e-5
    torch.testing.assert_close(found[0][:, i][:, :, j], exact[0], rtol=close, atol=close)
    if method is None:
        assert found[0][:, ~i].abs().max() == 0 == found[0][:, :, ~j].abs().max()
    # Up to adding t to one and -t to the other.
    shift = found[1][:, i][:, :1] - exact[1][:, :1]
    torch.testing.assert_close(found[1][:, i] - shift, exact[1], rtol=close, atol=close)
    torch.testing.assert_close(found[2][:, j] + shift, exact[2], rtol=close, atol=close)


@pytest.mark.parametrize(("m", "n"), [(4, 5), (5, 4)])
@pytest.mark.parametrize("gamma", [3.0, 400.0])
@pytest.mark.parametrize("method", [None, lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-6)])
def test_the_gradient_for_an_empty_bin_is_that_of_one_that_grows(m, n, gamma, method):
    """Its mass comes from another bin: the difference quotient of the plan, from one side."""
    cost, rows, columns = draw(m, n, batch=1, seed=3)
    rows, columns = without(rows, 1), without(columns, n - 1)
    weights = torch.randn(1, m, n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    inputs = tuple(part.requires_grad_() for part in (cost, rows, columns))
    layer = lpgd.NodeLayer(OptimalTransport(gamma=gamma, tolerance=1e-14), method)
    value = (layer(*inputs) * weights).sum()
    _, for_rows, for_columns = torch.autograd.grad(value, inputs)
    step = 1e-7
    for found, place, other in ((for_rows, 1, 0), (for_columns, n - 1, 1)):
        moved = [part.detach().clone() for part in inputs]
        own = moved[1] if found is for_rows else moved[2]
        own[0, place] += step
        own[0, other] -= step
        slope = ((layer(*moved) * weights).sum() - value.detach()) / step
        torch.testing.assert_close(found[0, place] - found[0, other], slope, rtol=1e-4, atol=1e-5)


def test_second_derivatives_beside_empty_bins():
    cost, rows, columns = draw(4, 3, batch=2, seed=5)
    empty = torch.tensor([False, True, False, False])

    def plan(cost: Tensor, logits: Tensor, other: Tensor) -> Tensor:
        return LAYER(cost, logits.masked_fill(empty, -torch.inf).softmax(-1), other.softmax(-1))

    inputs = tuple(part.requires_grad_() for part in (cost, rows.log(), columns.log()))
    assert torch.autograd.gradcheck(plan, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(plan, inputs, fast_mode=True)


def test_marginals_without_a_plan_fail_alone():
    cost, rows, columns = draw(3, 4, batch=5)
    rows, columns = rows.clone(), columns.clone()
    rows[0] = without(rows[0], 1)
    rows[1, 0], rows[1, 1] = -0.1, rows[1, 0] + rows[1, 1] + 0.1
    rows[2], columns[2] = 0.0, 0.0
    rows[3] *= 2.0
    inputs = tuple(part.requires_grad_() for part in (cost, rows, columns))
    plan = lpgd.NodeLayer(OptimalTransport(), on_error="nan")(*inputs)
    states = [status.name for status in plan.info.statuses]
    assert states == ["SOLVED", "INFEASIBLE", "INFEASIBLE", "INFEASIBLE", "SOLVED"]
    plan.nansum().backward()
    for part in inputs:
        assert part.grad is not None
        assert part.grad.isfinite().all()
        assert (part.grad[1:4] == 0).all()
    with pytest.raises(lpgd.SolverError, match="at least zero, with the same positive sum") as caught:
        lpgd.NodeLayer(OptimalTransport())(*inputs)
    assert caught.value.indices == (1, 2, 3)


def test_a_warm_start_with_empty_bins():
    cost, rows, columns = draw(5, 6, batch=2)
    rows = without(rows, 2)
    layer = lpgd.NodeLayer(OptimalTransport(gamma=60.0))
    first = layer(cost, rows, columns)
    torch.testing.assert_close(layer(cost, rows, columns, warm_start=first), first, rtol=0, atol=1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_empty_bins_on_a_cuda_device():
    cost, rows, columns = draw(5, 6, batch=2)
    inputs = (cost, without(rows, 2), without(columns, 0, 5))
    here, there = (tuple(part.to(device).requires_grad_() for part in inputs) for device in ("cpu", "cuda"))
    plan, other = LAYER(*here), LAYER(*there)
    torch.testing.assert_close(other.cpu(), plan, rtol=0, atol=1e-10)
    own = torch.autograd.grad(plan.square().sum(), here)
    for part, expected in zip(torch.autograd.grad(other.square().sum(), there), own, strict=True):
        torch.testing.assert_close(part.cpu(), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(LAYER(there[0]).cpu(), LAYER(here[0]), rtol=0, atol=1e-10)


def test_forward_mode_and_residuals_with_empty_bins():
    cost, rows, columns = draw(4, 5, batch=2, seed=6)
    rows, columns = without(rows, 1), without(columns, 4)
    inputs = tuple(part.requires_grad_() for part in (cost, rows, columns))
    assert float(LAYER.solve(*inputs).residual.max()) <= 1e-9
    tangents = tuple(torch.randn_like(part) for part in inputs)
    weights = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    change = torch.func.jvp(LAYER, tuple(part.detach() for part in inputs), tangents)[1]
    backward = torch.autograd.grad((LAYER(*inputs) * weights).sum(), inputs)
    # Changes of the marginals that keep their sums equal; the last column takes the difference.
    both = sum((part * tangent).sum() for part, tangent in zip(backward, tangents, strict=True))
    torch.testing.assert_close((change * weights).sum(), both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [lpgd.ClosedForm(), lpgd.LPGD()])
def test_gradients_for_marginals_of_a_plan_near_a_permutation_warn(method):
    """Each row has a column of its own; the gradient for the cost is right, and nothing is said of it."""
    cost, weight = random(0, 1, 4, 4), random(1, 1, 4, 4)
    uniform = torch.full((1, 4), 0.25, dtype=torch.float64, requires_grad=True)
    layer = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma=100.0), method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (layer(cost.requires_grad_()) * weight).sum().backward()
        lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma=2.0), method)(cost, uniform, uniform).sum().backward()
    with pytest.warns(lpgd.LpgdWarning, match=r"elements \[0\]: the plan is so sharp.*detach rows and columns"):
        (layer(cost, uniform, uniform.detach()) * weight).sum().backward()


@pytest.mark.parametrize("kind", ["vertex", "offset", "ties"])
def test_gradients_of_costs_of_1e6_are_those_of_sixty_digits(kind: str) -> None:
    """Newton's method on the potentials, and the system of eqs. 139-146, with 60 digits."""
    gamma, scale = 10.0, 1e6
    drawn, weight = random(0, 4, 5), random(30, 4, 5)
    ties = torch.randint(0, 2, (4, 5), generator=torch.Generator().manual_seed(0)).double()
    cost = {
        "vertex": scale * drawn, "offset": scale * (random(50, 4, 1) + random(60, 1, 5)) + 0.1 * drawn,
        "ties": scale * ties + 0.1 * drawn,
    }[kind]  # fmt: skip
    rows, columns = random(10, 4).softmax(-1), random(20, 5).softmax(-1)
    if kind == "ties":
        rows, columns = torch.full((4,), 0.25, dtype=torch.float64), torch.full((5,), 0.2, dtype=torch.float64)
    start = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma)).solve(cost, rows, columns).aux[0][0]
    expected = _with_sixty_digits(cost, rows, columns, gamma, weight, start)
    for method in (lpgd.ClosedForm(), lpgd.ImplicitKKT()):
        data = [tensor.clone().requires_grad_() for tensor in (cost, rows, columns)]
        (lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma), method)(*data) * weight).sum().backward()
        for tensor, right, size in zip(data, expected, (gamma, 1.0, 1.0), strict=True):
            # Exponents of 1e7 have rounding errors of 1e-9; at a vertex the gradient for the cost is below 1e-50.
            torch.testing.assert_close(tensor.grad, right, rtol=0, atol=5e-9 * size)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("m", "n"), [(3, 3), (6, 2), (2, 4)])
def test_the_gradient_of_a_plan_whose_parts_share_next_to_nothing_is_that_of_sixty_digits(
    m: int, n: int, seed: int
) -> None:
    """Uniform marginals put groups of rows and columns together that others have e⁻¹⁰⁰ of: rounding over rounding."""
    gamma, count = 60.0, 6
    costs, weights = random(seed, count, m, n), random(seed + 50, count, m, n)
    rows, columns = (torch.full((size,), 1.0 / size, dtype=torch.float64) for size in (m, n))
    layer = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma))
    potentials = layer.solve(costs).aux[0]
    leaves = costs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((layer(leaves) * weights).sum(), leaves)
    for own, cost, weight, start in zip(gradient, costs, weights, potentials, strict=True):
        expected, *_ = _with_sixty_digits(cost, rows, columns, gamma, weight, start)
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-11 * gamma)


def test_second_derivatives_of_a_plan_in_parts_are_refused_and_those_of_others_are_differences() -> None:
    """Element 1 of these has parts that share 1e-30 of their mass, and element 5 a derivative of order one."""
    costs, weights, along = random(2, 6, 3, 3), random(52, 6, 3, 3), random(9, 6, 3, 3)
    layer = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(60.0))

    def slope(element: int, cost: Tensor) -> Tensor:
        loss = (layer(cost) * weights[element]).sum()
        return (torch.autograd.grad(loss, cost, create_graph=True)[0] * along[element]).sum()

    with pytest.raises(lpgd.SolverError, match="fallen apart, to rounding, into parts"):
        slope(1, costs[1].clone().requires_grad_()).backward()
    leaf, step = costs[5].clone().requires_grad_(), 1e-5 * random(10, 3, 3)
    (own,) = torch.autograd.grad(slope(5, leaf), leaf)
    ends = [slope(5, (costs[5] + sign * step).requires_grad_()).detach() for sign in (1.0, -1.0)]
    torch.testing.assert_close(2.0 * (own * step).sum(), ends[0] - ends[1], rtol=1e-5, atol=0)


def test_implicit_gradients_where_entries_nearly_underflow_say_so() -> None:
    """Curvatures 1/P of 1e305, whose eigenvalues are not found in the unit in which they are given."""
    cost = random(3, 40, 3, 3).requires_grad_()
    layer = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(800.0), lpgd.ImplicitKKT())
    with pytest.warns(lpgd.LpgdWarning, match="ImplicitKKT"):
        (gradient,) = torch.autograd.grad(layer(cost).square().sum(), cost)
    assert gradient.isfinite().all()


def _with_sixty_digits(
    cost: Tensor, rows: Tensor, columns: Tensor, gamma: float, weight: Tensor, g: Tensor
) -> list[Tensor]:
    m, n = cost.shape
    with mpmath.workdps(60):
        M, V = mpmath.matrix(cost.tolist()), mpmath.matrix(weight.tolist())
        r, c, g = ([mpmath.mpf(value) for value in tensor.tolist()] for tensor in (rows, columns, g))
        c = [value * sum(r) / sum(c) for value in c]
        P = mpmath.matrix(m, n)
        for _ in range(60):
            for i in range(m):
                terms = [c[j] * mpmath.exp(g[j] - gamma * M[i, j]) for j in range(n)]
                for j in range(n):
                    P[i, j] = r[i] * terms[j] / sum(terms)
            left = [c[j] - sum(P[i, j] for i in range(m)) for j in range(n)]
            if max(map(abs, left)) < mpmath.mpf(10) ** -50:
                break
            system = mpmath.matrix(n - 1, n - 1)
            for a in range(n - 1):
                for b in range(n - 1):
                    mass = sum(P[i, a] for i in range(m)) if a == b else 0
                    system[a, b] = mass - sum(P[i, a] * P[i, b] / r[i] for i in range(m))
            step = mpmath.lu_solve(system, mpmath.matrix(left[:-1]))
            damping = min(1, 1 / max(map(abs, step)))
            g = [value + damping * change for value, change in zip(g, [*step, 0], strict=True)]
        system, right = mpmath.matrix(m + n - 1, m + n - 1), mpmath.matrix(m + n - 1, 1)
        for i in range(m):
            system[i, i], right[i] = r[i], sum(P[i, j] * V[i, j] for j in range(n))
            for j in range(n - 1):
                system[i, m + j] = system[m + j, i] = P[i, j]
        for j in range(n - 1):
            system[m + j, m + j], right[m + j] = c[j], sum(P[i, j] * V[i, j] for i in range(m))
        solution = [*mpmath.lu_solve(system, right), mpmath.mpf(0)]
        alpha, beta = solution[:m], solution[m:]
        on_cost = [[-gamma * P[i, j] * (V[i, j] - alpha[i] - beta[j]) for j in range(n)] for i in range(m)]
        return [torch.tensor([[float(v) for v in row] for row in on_cost], dtype=torch.float64)] + [
            torch.tensor([float(v) for v in values], dtype=torch.float64) for values in (alpha, beta)
        ]
