"""Entropic optimal transport: the plan, its potentials and its derivatives."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog

import lpgd
from lpgd.nodes.base import Tilt
from lpgd.nodes.transport import sinkhorn as sinkhorn_module
from lpgd.nodes.transport.node import (
    OptimalTransport,
    potentials_of,
    sinkhorn,
    transport_vjp,
    transport_vjp_approximate,
)
from lpgd.status import SolverError, Status
from tests.node_reference import ROUNDING

from .node_reference import bordered_gradient, stationarity

SHAPES = [(4, 6), (6, 4), (5, 5), (1, 3), (3, 1)]


def draw(m, n, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cost, rows, columns = (
        torch.rand(batch, *shape, generator=generator, dtype=torch.float64) for shape in ((m, n), (m,), (n,))
    )
    return cost, (2 * rows).softmax(-1), (2 * columns).softmax(-1)


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("gamma", [0.5, 20.0, 200.0])
def test_a_plan_has_its_marginals_and_satisfies_the_optimality_conditions(m, n, gamma):
    node = OptimalTransport(gamma=gamma, tolerance=1e-13, iterations=100_000)
    inputs = draw(m, n)
    answer = node.solve(inputs, None)
    assert set(answer.statuses) == {Status.SOLVED}
    assert torch.allclose(answer.y.sum(-1), inputs[1], rtol=0, atol=1e-12)
    assert torch.allclose(answer.y.sum(-2), inputs[2], rtol=0, atol=1e-12)
    if gamma < 200:  # where P underflows, the logarithm of the objective's derivative is infinite
        assert stationarity(node, inputs, answer.y, answer.nu) < 1e-11


def test_at_large_gamma_the_plan_is_the_linear_program_s():
    cost, rows, columns = draw(4, 5, batch=1, seed=3)
    plan = sinkhorn(cost, rows, columns, 1000.0, tolerance=1e-9, iterations=50_000).plan[0]
    equalities = torch.stack(
        [torch.eye(4, dtype=torch.float64)[i][:, None].expand(4, 5).reshape(-1) for i in range(4)]
        + [torch.eye(5, dtype=torch.float64)[j].expand(4, 5).reshape(-1) for j in range(5)]
    )
    totals = torch.cat([rows[0], columns[0]])
    exact = linprog(cost.reshape(-1).numpy(), A_eq=equalities.numpy(), b_eq=totals.numpy(), method="highs")
    assert float((plan * cost[0]).sum()) == pytest.approx(exact.fun, abs=1e-6)
    assert torch.allclose(plan.reshape(-1), torch.tensor(exact.x), atol=1e-6)


def test_costs_that_underflow_without_logarithms_are_solved():
    cost = 1e5 * draw(4, 4)[0]
    plan = sinkhorn(cost, *draw(4, 4)[1:], 1.0, tolerance=1e-6, iterations=200)
    assert plan.plan.isfinite().all()
    assert plan.f.isfinite().all()
    assert torch.allclose(plan.plan.sum(-2), draw(4, 4)[2], atol=1e-12)


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_the_structured_gradient_is_that_of_the_bordered_system(m, n):
    node = OptimalTransport(gamma=5.0)
    inputs = draw(m, n, seed=1)
    y = node.solve(inputs, None).y
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for ours, reference in zip(
        node.vjp(inputs, y, cotangent, None), bordered_gradient(node, inputs, y, cotangent), strict=True
    ):
        assert float((ours - reference).abs().max()) <= 1e-10


@pytest.mark.parametrize(("m", "n"), [(3, 4), (4, 3)])
def test_gradients_for_cost_and_both_marginals_equal_finite_differences(m, n):
    node = OptimalTransport(gamma=4.0, tolerance=1e-13)
    cost, rows, columns = draw(m, n, batch=2, seed=4)

    class Plan(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            y = node.solve(inputs, None).y
            ctx.save_for_backward(*inputs, y)
            return y

        @staticmethod
        def backward(ctx, cotangent):
            *inputs, y = ctx.saved_tensors
            return node.vjp(tuple(inputs), y, cotangent, None)

    arguments = [part.log().requires_grad_() for part in (rows, columns)]
    assert torch.autograd.gradcheck(
        lambda M, r, c: Plan.apply(M, r.softmax(-1), c.softmax(-1)), (cost.requires_grad_(), *arguments), atol=1e-6
    )


def test_the_gradient_keeps_all_digits_where_the_plan_is_nearly_a_permutation():
    """``P = (p, q; q, p)`` with q of e⁻⁵⁰ and V = (1, 0; 0, 0) has α = (p, -q) and β = (½, 0) for a solution."""
    half = torch.tensor([[0.5, 0.5]], dtype=torch.float64)
    cost = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    plan = sinkhorn(cost, half, half, 50.0, tolerance=1e-14, iterations=1000).plan
    cotangent = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    q = 0.5 / (1 + torch.tensor(50.0, dtype=torch.float64).exp())
    assert torch.allclose(plan[0, 0, 1], q, rtol=1e-12, atol=0)
    on_cost, on_rows, on_columns = transport_vjp(plan, 50.0, cotangent)
    assert torch.allclose(on_rows[0], torch.stack([0.5 - q, -q]), rtol=1e-12, atol=1e-15)
    assert torch.allclose(on_columns, torch.tensor([[0.5, 0.0]], dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.allclose(on_cost[0, 0, 1], 50.0 * q * (0.5 - q), rtol=1e-12, atol=0)


def test_a_plan_in_parts_is_an_error_that_names_the_element():
    plan = torch.tensor([[[0.3, 0.2], [0.2, 0.3]], [[0.5, 0.0], [0.0, 0.5]]], dtype=torch.float64)
    with pytest.raises(SolverError, match="element 1 of 2") as caught:
        transport_vjp(plan, 10.0, torch.ones_like(plan))
    assert caught.value.indices == (1,)


def test_marginals_that_no_plan_has_are_infeasible_and_leave_the_others_exact():
    cost, rows, columns = draw(3, 4, batch=4)
    rows, columns = rows.clone(), columns.clone()
    rows[1] *= 1.5
    columns[2, 0], columns[2, 1] = -0.1, columns[2, 0] + columns[2, 1] + 0.1
    answer = OptimalTransport().solve((cost, rows, columns), None)
    assert answer.statuses == [Status.SOLVED, Status.INFEASIBLE, Status.INFEASIBLE, Status.SOLVED]
    alone = OptimalTransport().solve((cost[3:], rows[3:], columns[3:]), None)
    assert torch.allclose(answer.y[3], alone.y[0], rtol=0, atol=1e-15)
    assert answer.y[1].isnan().all()


def test_few_iterations_end_at_the_limit():
    node = OptimalTransport(gamma=200.0, iterations=10)
    answer = node.solve(draw(5, 5), None)
    assert Status.ITERATION_LIMIT in answer.statuses
    assert answer.iterations.tolist() == [10] * 3


def test_newton_steps_end_what_sinkhorn_alone_would_not():
    """Thousands of iterations without them; at 4×6 on either side."""
    for m, n in ((4, 6), (6, 4)):
        plan = sinkhorn(*draw(m, n), 300.0, tolerance=1e-13, iterations=500)
        assert (plan.residual <= 1e-13).all()
        assert torch.allclose(plan.plan.sum(-2), draw(m, n)[2], rtol=0, atol=1e-14)


def test_potentials_start_the_next_solve():
    cost, rows, columns = draw(6, 5)
    options = {"tolerance": 1e-11, "iterations": 10_000}
    cold = sinkhorn(cost, rows, columns, 50.0, **options)
    warm = sinkhorn(cost, rows, columns, 50.0, potential=cold.g, **options)
    assert warm.iterations.tolist() == [10] * 3
    assert torch.allclose(warm.plan, cold.plan, rtol=0, atol=1e-10)
    from_plan = potentials_of(cold.plan, cost, rows, columns, 50.0)
    near = sinkhorn(cost + 1e-4 * draw(6, 5, seed=9)[0], rows, columns, 50.0, potential=from_plan, **options)
    assert (near.iterations < cold.iterations).all()


@pytest.mark.parametrize("elements", [1, 2, 3])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_large_batches_are_solved_in_blocks(monkeypatch, elements, warm):
    cost, rows, columns = draw(6, 5, batch=7)
    cost[2] *= 40.0  # a sharp plan among others
    node = OptimalTransport(gamma=30.0, tolerance=1e-13)
    start = node.solve((0.9 * cost, rows, columns), None).y if warm else None
    monkeypatch.setattr(sinkhorn_module, "BLOCK_BYTES", elements * 6 * 5 * 8)
    answer = node.solve((cost, rows, columns), start)
    assert set(answer.statuses) == {Status.SOLVED}
    assert torch.allclose(answer.y.sum(-1), rows, rtol=0, atol=1e-12)
    assert torch.allclose(answer.y.sum(-2), columns, rtol=0, atol=1e-12)
    ordinary = torch.arange(7) != 2
    inputs = tuple(tensor[ordinary] for tensor in (cost, rows, columns))
    assert stationarity(node, inputs, answer.y[ordinary], answer.nu[ordinary]) < 1e-11
    if elements == 1:  # and so each is what it is alone, to the bit
        for element in range(7):
            alone = tuple(tensor[element : element + 1] for tensor in (cost, rows, columns))
            found = node.solve(alone, None if start is None else start[element : element + 1])
            assert torch.equal(found.y[0], answer.y[element])


def test_a_tilt_is_a_change_of_the_cost():
    node = OptimalTransport(tolerance=1e-13)
    inputs = draw(3, 4)
    linear = 0.3 * draw(3, 4, seed=5)[0]
    answer = node.solve_tilted(inputs, Tilt(linear, 0.0, torch.zeros_like(linear)), None)
    moved = (inputs[0] + linear, *inputs[1:])
    assert stationarity(node, moved, answer.y, answer.nu) < 1e-11
    assert node.solve_tilted(inputs, Tilt(linear, 0.1, answer.y), None) is None


def test_the_approximate_gradient_is_the_unconstrained_one():
    """Without constraints the minimiser is ``r_i c_j exp(-γ M_ij)``; at its own plan the gradient is exact."""
    cost, rows, columns = (part.requires_grad_() for part in draw(3, 4))
    plan = rows[:, :, None] * columns[:, None, :] * torch.exp(-2.0 * cost)
    cotangent = torch.randn(plan.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(plan, (cost, rows, columns), cotangent)
    found = transport_vjp_approximate(plan.detach(), rows.detach(), columns.detach(), 2.0, cotangent)
    for ours, reference in zip(found, expected, strict=True):
        assert torch.allclose(ours, reference, rtol=0, atol=1e-14)


def test_single_precision_agrees_with_double():
    node = OptimalTransport(gamma=10.0)
    inputs = draw(6, 8)
    single = tuple(part.float() for part in inputs)
    double, answer = node.solve(inputs, None), node.solve(single, None)
    assert answer.y.dtype == torch.float32
    assert set(answer.statuses) == {Status.SOLVED}
    assert torch.allclose(answer.y.double(), double.y, rtol=0, atol=1e-5)
    cotangent = torch.randn(double.y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for low, high in zip(
        node.vjp(single, answer.y, cotangent.float(), None), node.vjp(inputs, double.y, cotangent, None), strict=True
    ):
        assert low.dtype == torch.float32
        assert torch.allclose(low.double(), high, rtol=1e-3, atol=1e-3)


def test_a_batch_is_its_elements_and_answers_are_repeatable():
    node = OptimalTransport(gamma=60.0)
    inputs = draw(5, 7, batch=4)
    copies = [part.clone() for part in inputs]
    whole, again = node.solve(inputs, None), node.solve(inputs, None)
    torch.testing.assert_close(whole.y, again.y, rtol=0, atol=ROUNDING)
    cotangent = torch.randn(whole.y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = node.vjp(inputs, whole.y, cotangent, None)
    for index in range(4):
        own = tuple(part[index : index + 1] for part in inputs)
        alone = node.solve(own, None)
        assert torch.allclose(alone.y[0], whole.y[index], rtol=0, atol=1e-14)
        assert alone.iterations[0] == whole.iterations[index]
        for part, single in zip(gradients, node.vjp(own, alone.y, cotangent[index : index + 1], None), strict=True):
            assert torch.allclose(single[0], part[index], rtol=0, atol=1e-12)
    assert all(torch.equal(part, copy) for part, copy in zip(inputs, copies, strict=True))


def test_options_and_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="gamma is -1"):
        OptimalTransport(gamma=-1)
    with pytest.raises(ValueError, match=r"iterations and tolerance are 0"):
        OptimalTransport(iterations=0)
    with pytest.raises(ValueError, match=r"rows and columns have shapes \(3, 4\), \(4,\) and \(3,\)"):
        OptimalTransport().variable_shape((3, 4), (4,), (3,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gamma", [300.0, 1000.0, 3000.0])
def test_implicit_differentiation_and_lpgd_take_plans_whose_entries_underflow(gamma, dtype):
    inputs = tuple(part.to(dtype).requires_grad_() for part in draw(6, 7))
    weights = torch.arange(42, dtype=dtype).sin().reshape(6, 7)
    methods = [lpgd.ClosedForm(), lpgd.ImplicitKKT()] + [lpgd.LPGD(), lpgd.LPGD(rho=1e-6)] * (dtype == torch.float64)
    answers = []
    for method in methods:
        plan = lpgd.NodeLayer(OptimalTransport(gamma), method)(*inputs)
        answers.append(torch.autograd.grad((plan * weights).sum(), inputs))
    if gamma >= 1000.0 or dtype == torch.float32:
        assert (plan == 0).any()
    exact, implicit, *perturbed = answers
    close = 1e-10 if dtype == torch.float64 else 1e-3
    for ours, tolerance in [(implicit, close), *((own, 1e-5) for own in perturbed)]:
        for part, expected in zip(ours, exact, strict=True):
            torch.testing.assert_close(part, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gamma", [1e4, 1e5, 1e6])
def test_a_very_large_gamma_gives_the_plan_of_the_linear_program(gamma, dtype):
    cost, rows, columns = draw(6, 7)
    plan = lpgd.NodeLayer(OptimalTransport(gamma))(cost.to(dtype), rows.to(dtype), columns.to(dtype)).double()
    marginals = torch.cat([torch.eye(6).repeat_interleave(7, 1), torch.eye(7).repeat(1, 6)])
    for element in range(3):
        right = torch.cat([rows[element], columns[element]])
        exact = linprog(cost[element].flatten().tolist(), A_eq=marginals.tolist(), b_eq=right.tolist())
        tolerance = 1e-7 if dtype == torch.float64 else 2e-2  # γM has rounding errors of 1e-7 γ
        assert float((plan[element] * cost[element]).sum()) == pytest.approx(exact.fun, abs=tolerance + 5 / gamma)
        torch.testing.assert_close(plan[element].sum(-1), rows[element], atol=tolerance, rtol=0)


def test_a_warm_start_that_leads_nowhere_begins_again():
    cost, rows, columns = draw(6, 7)
    layer = lpgd.NodeLayer(OptimalTransport(5000.0))
    expected = layer(cost, rows, columns)
    again = layer(cost, rows, columns, warm_start=layer(1.0 - cost, columns.new_ones(3, 6) / 6, columns))
    torch.testing.assert_close(again, expected, atol=1e-9, rtol=0)


def test_an_offset_of_the_cost_changes_nothing():
    cost, rows, columns = draw(4, 5)
    layer = lpgd.NodeLayer(OptimalTransport(50.0))
    torch.testing.assert_close(layer(cost + 100.0, rows, columns), layer(cost, rows, columns), atol=1e-9, rtol=0)


def test_a_kernel_whose_columns_underflow_is_no_obstacle():
    """Of costs this far apart all columns but one vanish in the first kernel."""
    cost, rows, columns = draw(6, 5)
    plan = sinkhorn(cost + 1e3 * torch.arange(5, dtype=cost.dtype), rows, columns, 20.0, tolerance=1e-9, iterations=500)
    plain = sinkhorn(cost, rows, columns, 20.0, tolerance=1e-12, iterations=500)
    assert torch.allclose(plan.plan, plain.plan, rtol=0, atol=1e-9)


def test_newton_steps_that_go_too_far_are_shortened():
    generator = torch.Generator().manual_seed(5104)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    torch.randint(5, 61, (2,), generator=generator)
    cost = 20 * draw(8, 17, 60)
    rows, columns = (torch.softmax((f * draw(8, size)).clamp(-4, 4), -1) for f, size in ((4, 17), (4, 60)))
    solution = lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma=10.0)).solve(cost, rows, columns)
    plan = solution.x.reshape(8, 17, 60)
    torch.testing.assert_close(plan.sum(-1), rows, atol=1e-13, rtol=0)
    torch.testing.assert_close(plan.sum(-2), columns, atol=1e-13, rtol=0)
    assert solution.iterations.max() <= 1000  # ten thousand are not enough for the sixth where no step is shortened
