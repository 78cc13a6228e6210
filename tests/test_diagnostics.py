"""diagnose, sweep and gradcheck on programs whose derivatives, thresholds and active sets are known in closed form."""

from __future__ import annotations

import warnings
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.diagnostics.measurement import compare
from lpgd.nodes.base import BaseNode, NodeAnswer

SIMPLEX = {"A": torch.ones(1, 3, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64), "lb": 0.0}
WEIGHTS = torch.tensor([3.0, 1.0, 2.5], dtype=torch.float64)


def weighted(output: Any) -> Tensor:
    return output.x @ WEIGHTS


def simplex_parameters() -> dict[str, Any]:
    """Element 0 leaves vertex 0 for vertex 1 at τ = ½ (1 - 0)/(3 - 1); element 1 stays at vertex 1, which is best."""
    costs = torch.tensor([[0.0, 1.0, 9.0], [5.0, 1.0, 9.0]], dtype=torch.float64, requires_grad=True)
    return {"c": costs, **SIMPLEX}


def quadratic() -> tuple[lpgd.QPLayer, dict[str, Tensor], Any]:
    """A strictly convex program with active and inactive constraints, away from kinks."""
    generator = torch.Generator().manual_seed(0)
    n, batch = 5, 4

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    P = normal(n, n)
    parameters = {"P": P @ P.T + torch.eye(n), "q": normal(batch, n), "G": normal(3, n), "h": torch.ones(3).double()}
    target = normal(n)
    return lpgd.QPLayer(solver="CLARABEL"), parameters, lambda output: (output.x - target).square().sum(-1).mean()


def test_exact_gradients_of_a_regular_program_agree_with_differences() -> None:
    layer, parameters, loss = quadratic()
    report = lpgd.diagnose(layer, parameters, loss)
    assert [one.name for one in report.parameters] == ["P", "q", "G", "h"]
    for one in report.parameters:
        assert one.exact is None  # it is what was asked for
        assert one.differences is not None
        assert one.differences.cosine == pytest.approx(1.0, abs=1e-6)
        assert one.differences.ratio == pytest.approx(1.0, abs=1e-3)
        assert one.decrease > 0
    assert report.measurement.noise_is_measured
    assert report.measurement.noise < 1e-4
    assert report.measurement.still is None
    assert report.advice.startswith("the gradient is sound")


def test_small_steps_agree_with_exact_gradients_and_large_ones_less() -> None:
    layer, parameters, loss = quadratic()
    near = lpgd.diagnose(layer, parameters, loss, lpgd.LPGD(), directions=0)
    far = lpgd.diagnose(layer, parameters, loss, lpgd.LPGD(tau=300.0), directions=0)
    for one, other in zip(near.parameters, far.parameters, strict=True):
        assert one.exact is not None
        assert other.exact is not None
        assert one.exact.cosine > 1 - 1e-6
        assert one.exact.ratio == pytest.approx(1.0, abs=1e-3)
        assert other.exact.cosine < 1 - 1e-3
        assert one.differences is None
    assert near.measurement.active_changes == 0.0
    assert far.measurement.active_changes is not None
    assert far.measurement.active_changes > 0
    assert "cosine" in str(near)


@pytest.mark.parametrize(("tau", "still", "changes"), [(0.45, 1.0, 0.0), (0.55, 0.5, 0.5)])
def test_movement_and_active_sets_of_a_vertex(tau: float, still: float, changes: float) -> None:
    """On one of two sides of one of two elements two bounds change: one becomes active, one inactive."""
    layer = lpgd.LPLayer(gradient=lpgd.LPGD(tau))
    report = lpgd.diagnose(layer, simplex_parameters(), weighted)
    assert report.measurement.still == still
    assert report.measurement.active_changes == pytest.approx(changes)
    (costs,) = report.parameters
    assert costs.exact is not None
    assert costs.exact.is_zero
    assert costs.differences is not None
    assert costs.differences.is_zero
    assert costs.is_zero == (still == 1.0)
    # (x₊ - x₋) / 2τ is (-1, 1, 0) / 2τ for element 0.
    assert costs.norm == pytest.approx(0.0 if still == 1.0 else 2**0.5 / (2 * tau), abs=1e-6)
    assert report.unit.tolist() == pytest.approx([9.0 / 3.0, 9.0 / 3.0])
    if still == 1.0:
        assert report.advice == "no perturbed solution moved, so the gradient of c is zero: raise tau towards 3."
    else:
        # Along that gradient the cost of vertex 0 grows: element 0 ends at vertex 1, and 2 of 4 are gone.
        assert costs.decrease == pytest.approx(0.5, abs=1e-6)
        assert "the exact gradient of c is zero, and this one sees further" in report.advice


def test_an_exact_gradient_that_is_zero_is_told_so() -> None:
    report = lpgd.diagnose(lpgd.LPLayer(), simplex_parameters(), weighted)
    assert report.parameters[0].norm == 0.0
    assert "lpgd.LPGD(tau) with tau of the order of 3 sees further" in report.advice
    assert any("vertex" in text for text in report.warnings)


def test_no_loss_gradient_is_told_so() -> None:
    report = lpgd.diagnose(lpgd.LPLayer(), simplex_parameters(), lambda output: 0.0 * output.x.sum())
    assert "nothing is left to learn" in report.advice


def test_noise_of_a_loose_solver_is_measured() -> None:
    _, parameters, loss = quadratic()
    loose, fine = (
        lpgd.diagnose(lpgd.QPLayer(solver=solver), parameters, loss, directions=0)
        for solver in (lpgd.Clarabel(tolerance=0.3, rescue=False, refine=False), lpgd.Clarabel(tolerance=1e-8))
    )
    assert loose.measurement.noise_is_measured
    assert loose.measurement.noise > 0.05
    assert fine.measurement.noise < 1e-6
    assert "noise into the gradient: lower the tolerance of CLARABEL" in loose.advice


def test_fallbacks_are_counted() -> None:
    """min c x over x ≥ 1: tilted by more than the cost it is unbounded on one side."""
    layer = lpgd.LPLayer(gradient=lpgd.LPGD(tau=2.0))
    costs = torch.tensor([[1.0], [5.0]], dtype=torch.float64)
    report = lpgd.diagnose(layer, {"c": costs, "lb": torch.ones(1).double()}, lambda output: -output.x.sum())
    assert report.measurement.fallbacks == (0,)
    assert report.measurement.used == {"upper": 1, "average": 1}
    assert "1 element of 2 had no perturbed solution" in report.advice
    assert any("no solution on a side" in text for text in report.warnings)


def test_elements_without_a_solution_are_named_first() -> None:
    layer = lpgd.LPLayer(on_error="nan")
    parameters = {"c": torch.tensor([[1.0], [-1.0]], dtype=torch.float64), "lb": torch.ones(1).double()}
    report = lpgd.diagnose(layer, parameters, lambda output: output.x.nansum(), lpgd.LPGD(tau=0.1), directions=2)
    assert report.statuses[1] is lpgd.Status.UNBOUNDED
    assert "1 element of 2 have no solution" in report.advice.replace("has", "have")


def test_cvxpy_and_conic_layers_and_dual_losses() -> None:
    x, p = cp.Variable(3, name="x"), cp.Parameter(3, name="point")
    constraint = cp.sum(x) == 1
    layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [constraint, x >= 0]), [p], [x, constraint.dual_variables[0]]
    )
    points = torch.tensor([[0.9, 0.5, -2.0], [0.2, 0.3, 0.4]], dtype=torch.float32)
    report = lpgd.diagnose(layer, [points], lambda output: output[0].square().sum() + output[1].sum(), lpgd.LPGD())
    (one,) = report.parameters
    assert one.name == "point"
    assert one.exact is not None
    assert one.exact.cosine > 1 - 1e-6
    assert one.differences is not None
    assert one.differences.cosine > 1 - 1e-6

    cone = lpgd.ConicLayer(lpgd.Cones(second_order=(3,)))
    A = -torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    b = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)  # |x| ≤ 1
    report = lpgd.diagnose(
        cone, [None, torch.tensor([3.0, 4.0]).double(), A, b], lambda output: output.x[0], lpgd.ImplicitKKT()
    )
    assert [one.name for one in report.parameters] == ["argument 1", "argument 2", "argument 3"]
    for one in report.parameters:
        assert one.differences is not None
        assert one.differences.cosine > 1 - 1e-4


@pytest.mark.filterwarnings("ignore:Sparse .* support is in beta state")
def test_sparse_matrices_are_looked_at_on_their_pattern() -> None:
    layer, parameters, loss = quadratic()
    for convert in (Tensor.to_sparse_coo, Tensor.to_sparse_csr, Tensor.to_sparse_csc):
        sparse = {**parameters, "G": convert(parameters["G"]).requires_grad_()}
        report = lpgd.diagnose(layer, sparse, loss)
        (one,) = report.parameters
        assert one.shape == (15,)
        assert one.differences is not None
        assert one.differences.cosine == pytest.approx(1.0, abs=1e-5)


def test_a_diagnosis_leaves_no_trace() -> None:
    layer = lpgd.LPLayer(gradient=lpgd.LPGD(), executor=lpgd.SerialExecutor())
    before, solver, parameters = layer.gradient, layer.solver, simplex_parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lpgd.diagnose(layer, parameters, weighted)
        lpgd.sweep(layer, parameters, weighted, taus=[0.1])
    assert layer.gradient is before
    assert layer.solver is solver
    assert isinstance(layer.executor, lpgd.SerialExecutor)
    assert parameters["c"].grad is None

    def warns(output: Any) -> Tensor:
        warnings.warn("of the user's own", RuntimeWarning, stacklevel=1)
        return weighted(output)

    with pytest.warns(RuntimeWarning, match="of the user's own"):
        lpgd.diagnose(layer, parameters, warns)


def test_wrong_arguments_are_named() -> None:
    layer, parameters, loss = quadratic()
    with pytest.raises(TypeError, match=r"layer is a Linear.*lpgd\.gradcheck takes any"):
        lpgd.diagnose(torch.nn.Linear(1, 1), parameters, loss)
    with pytest.raises(TypeError, match="parameters is a Tensor; give the arguments"):
        lpgd.diagnose(layer, parameters["q"], loss)
    with pytest.raises(ValueError, match="does not depend on the layer's output"):
        lpgd.diagnose(layer, parameters, lambda output: output.x.detach().sum())
    with pytest.raises(ValueError, match=r"the loss has shape \(4, 5\).*\(4,\)"):
        lpgd.diagnose(layer, parameters, lambda output: output.x)
    with pytest.raises(TypeError, match="the loss returned a float"):
        lpgd.diagnose(layer, parameters, lambda output: 1.0)
    with pytest.raises(ValueError, match="nothing to differentiate"):
        lpgd.diagnose(layer, [], loss)


def test_comparisons_know_zero() -> None:
    one, nothing = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert compare([one], [2 * one]).cosine == pytest.approx(1.0)
    assert compare([one], [2 * one]).ratio == pytest.approx(0.5)
    assert compare([-one], [one]).cosine == pytest.approx(-1.0)
    assert compare([one], [nothing]).is_zero
    assert compare([nothing], [one]).ratio == 0.0
    assert np.isnan(compare([nothing], [one]).cosine)


def test_sweep_finds_the_steps_that_move() -> None:
    found = lpgd.sweep(lpgd.LPLayer(), simplex_parameters(), weighted, taus=[1.0, 0.1, 0.6], rhos=[0.0, 0.2])
    assert [(row.tau, row.rho) for row in found.rows] == [(t, r) for r in (0.0, 0.2) for t in (0.1, 0.6, 1.0)]
    assert found.unit == pytest.approx(3.0)
    assert [row.measurement.still for row in found.rows[:3]] == [1.0, 0.5, 0.5]
    assert found.best.tau == 0.6
    assert all(row.exact is not None and row.exact.is_zero for row in found.rows)
    text = str(found)
    assert text.splitlines()[-2].startswith("Advice: tau = 0.6 with rho = 0") or "tau = 0.6" in found.advice
    assert len(text.splitlines()[1].split("  ")) > 8
    grid = lpgd.sweep(lpgd.LPLayer(), simplex_parameters(), weighted)
    assert grid.rows[0].relative == pytest.approx(1e-3)
    assert grid.rows[-1].relative == pytest.approx(10.0)
    with pytest.raises(ValueError, match="there is no step to choose"):
        lpgd.sweep(lpgd.LPLayer(), simplex_parameters(), lambda output: 0.0 * output.x.sum())


# -- gradcheck --------------------------------------------------------------------------------------------------------


def ridge(P: Any, q: Any, A: Any, row_lower: Any, row_upper: Any, lower: Any, upper: Any) -> Any:
    """minimise ½xᵀPx + qᵀx subject to Ax = b, by its optimality conditions."""
    n, m = q.size, row_lower.size
    matrix = np.block([[P.toarray(), A.toarray().T], [A.toarray(), np.zeros((m, m))]])
    point = np.linalg.solve(matrix, np.concatenate([-q, row_lower]))
    return point[:n], point[n:], np.zeros(n)


def test_gradcheck_of_a_solver_of_the_users_own() -> None:
    generator = torch.Generator().manual_seed(1)
    q, b = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 4), (2,)))
    A = torch.randn(2, 4, dtype=torch.float64, generator=generator)
    inputs = {"P": 2 * torch.eye(4, dtype=torch.float64), "q": q, "A": A, "b": b}
    right = lpgd.QPLayer(solver=lpgd.CustomSolver(ridge))
    check = lpgd.gradcheck(right, inputs)
    assert check.ok
    assert [one.checked for one in check.inputs] == [16, 8, 8, 2]

    def wrong_sign(*arguments: Any) -> Any:
        x, y, z = ridge(*arguments)
        return x, -y, z

    wrong = lpgd.QPLayer(solver=lpgd.CustomSolver(wrong_sign, rescue=False), on_error="warn")
    with pytest.raises(
        lpgd.GradientCheckError, match=r"WRONG: the derivative with respect to .* look at the signs"
    ) as error:
        lpgd.gradcheck(wrong, inputs)
    assert not error.value.check.ok


def test_gradcheck_of_functions() -> None:
    inputs = [torch.tensor([0.5, -1.5, 2.0]), 3]

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * ctx.saved_tensors[0]  # lacks the factor 2

    assert lpgd.gradcheck(lambda x, k: {"sines": torch.sin(x) * k, "rest": (x.sum(), [x.prod()])}, inputs).ok
    check = lpgd.gradcheck(lambda x, k: Halved.apply(x), inputs, raise_on_failure=False)
    assert (check.inputs[0].wrong, check.inputs[0].checked) == (3, 3)
    assert check.inputs[0].derivative == pytest.approx(0.5 * check.inputs[0].difference, rel=1e-6)
    with pytest.raises(ValueError, match="no output depends"):
        lpgd.gradcheck(lambda x, k: x.detach(), inputs)
    with pytest.raises(ValueError, match="no floating-point tensor"):
        lpgd.gradcheck(lambda x, k: x > 0, inputs)


def test_gradcheck_accepts_any_slope_at_a_kink_and_no_other() -> None:
    at_kink = [torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)]
    check = lpgd.gradcheck(torch.relu, at_kink)
    assert (check.inputs[0].kinks, check.inputs[0].wrong) == (1, 0)

    class Outside(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            return g * torch.where(x == 0, 1.5, (x > 0).double())

    check = lpgd.gradcheck(Outside.apply, at_kink, raise_on_failure=False)
    assert (check.inputs[0].kinks, check.inputs[0].wrong, check.inputs[0].worst) == (1, 1, (0,))


def test_gradcheck_does_not_judge_by_jumps_or_noise() -> None:
    x = [torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)]
    with pytest.raises(lpgd.GradientCheckError, match=r"do not settle at a step of 0\.0001"):
        lpgd.gradcheck(lambda x: torch.sign(x + 1e-9) + 0 * x, x)
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        return x + 1e-2 * torch.randn(x.shape, dtype=x.dtype, generator=generator)

    with pytest.raises(lpgd.GradientCheckError, match=r"tighten the solver's tolerance or take a larger step"):
        lpgd.gradcheck(noisy, x)
    # The solution of a linear program is a step function of its cost: its right derivative is zero.
    assert lpgd.gradcheck(lambda c: lpgd.solve_lp(c, **SIMPLEX).x, [torch.tensor([1.0, 2.0, 3.0])]).ok


# -- oracles ----------------------------------------------------------------------------------------------------------


def cheapest(costs: Any) -> Any:
    """argmin over the vertices of the simplex."""
    x = np.zeros_like(costs)
    x[np.argmin(costs)] = 1.0
    return x


def test_oracles_are_diagnosed_as_the_linear_program_with_the_same_vertices() -> None:
    costs, tau = simplex_parameters()["c"], 0.55
    oracle = lpgd.BlackboxLayer(cheapest, gradient=lpgd.LPGD(tau))
    program = lpgd.LPLayer(solver="HIGHS", gradient=lpgd.LPGD(tau))
    report = lpgd.diagnose(oracle, [costs], lambda x: x @ WEIGHTS)
    expected = lpgd.diagnose(program, {"c": costs, **SIMPLEX}, weighted).measurement
    (one,) = report.parameters
    assert one.exact is None  # an oracle has no optimality conditions
    assert one.differences is not None
    assert one.differences.is_zero
    assert one.norm == pytest.approx(expected.norm, rel=1e-9)
    assert one.decrease == pytest.approx(expected.decrease, rel=1e-9)
    assert report.measurement.still == expected.still == 0.5
    assert report.measurement.active_changes == pytest.approx(0.5)  # 2 of 3 entries on 1 of 2 sides of 1 of 2 elements
    assert report.measurement.noise == 0.0
    assert "the exact gradient of argument 0 is zero, and this one sees further" in report.advice

    own = lpgd.envelopes(oracle, [costs], lambda x: x @ WEIGHTS, tau)
    theirs = lpgd.envelopes(program, {"c": costs, **SIMPLEX}, weighted, tau)
    torch.testing.assert_close(own.lower, theirs.lower)
    torch.testing.assert_close(own.upper, theirs.upper)
    with pytest.raises(TypeError, match="no CVXPY form"):
        lpgd.envelopes(oracle, [costs], lambda x: x @ WEIGHTS, tau, convex_loss=lambda element, x: cp.sum(x))

    found = lpgd.sweep(oracle, [costs], lambda x: x @ WEIGHTS, taus=[0.4, 0.6])
    assert [row.measurement.still for row in found.rows] == [1.0, 0.5]
    assert all(row.exact is None for row in found.rows)
    with pytest.raises(ValueError, match="takes no quadratic term"):
        lpgd.sweep(lpgd.BlackboxLayer(cheapest, gradient=lpgd.LPGD(tau)), [costs], lambda x: x @ WEIGHTS, rhos=[0.5])


def test_an_integer_program_has_no_exact_gradient_to_compare_with() -> None:
    layer = lpgd.LPLayer(integer=[0, 1, 2], gradient=lpgd.LPGD(tau=1.0))
    c = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    G = torch.tensor([[2.0, 3.0, 1.0]], dtype=torch.float64)
    arguments = {"c": c, "G": G, "h": torch.tensor([4.0], dtype=torch.float64), "lb": 0.0, "ub": 1.0}

    def loss(output: Any) -> Any:
        return (output.x - 1.0).square().sum()

    report = lpgd.diagnose(layer, arguments, loss)
    assert all(one.exact is None for one in report.parameters)
    assert report.exact_seconds is None
    assert "exact gradient" not in " ".join(report.warnings)


class Rounding(BaseNode):
    """The nearest whole numbers: a node that says that it has no conditions to differentiate."""

    name = "rounding"
    has_kkt = False

    @property
    def inputs(self) -> dict[str, int]:
        return {"x": 1}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        return shapes[0]

    def objective(self, y: Any, *inputs: Any) -> Any:
        return (y - inputs[0]).square().sum(-1)

    def solve(self, inputs: Any, start: Any) -> NodeAnswer:
        y = inputs[0].round()
        return NodeAnswer(y, [lpgd.Status.SOLVED] * len(y), [1] * len(y))

    def solve_tilted(self, inputs: Any, tilt: Any, start: Any) -> NodeAnswer:
        return self.solve((inputs[0] - 0.5 * tilt.linear,), start)


def test_a_node_without_optimality_conditions_has_no_exact_gradient_to_compare_with() -> None:
    layer = lpgd.NodeLayer(Rounding(), lpgd.LPGD(tau=2.0))
    x = torch.tensor([[0.2, 1.4], [-0.3, 0.9]], dtype=torch.float64)

    def loss(y: Any) -> Any:
        return (y - 1.0).square().sum(-1)

    report = lpgd.diagnose(layer, [x], loss)
    assert all(one.exact is None for one in report.parameters)
    assert report.exact_seconds is None
    found = lpgd.sweep(layer, [x], loss, taus=[0.1, 2.0])
    assert all(row.exact is None for row in found.rows)
    with pytest.raises(TypeError, match=r"optimality conditions.*rounding does not have"):
        lpgd.NodeLayer(Rounding(), lpgd.ImplicitKKT())
