"""Transport, eigenvectors and the principal vector as layers: every gradient method of the library."""

from __future__ import annotations

import pytest
import torch

from lpgd.gradients import LPGD, IgnoreConstraints
from lpgd.layers.node import NodeLayer
from lpgd.nodes.eigen import EigenDecomposition
from lpgd.nodes.principal.node import PrincipalVector
from lpgd.nodes.transport.node import OptimalTransport
from lpgd.solvers.node.solver import NodeSolver
from lpgd.status import SolverError, Status

from .test_nodes_eigen import random_like, symmetric
from .test_nodes_transport import draw

TRANSPORT = OptimalTransport(gamma=4.0, tolerance=1e-13)
EIGEN = EigenDecomposition(2)


def gradients(node, inputs, method, cotangent=None, solver=None):
    leaves = [part.clone().requires_grad_() for part in inputs]
    y = NodeLayer(node, method, solver)(*leaves)
    y.backward(random_like(y) if cotangent is None else cotangent)
    return y, [leaf.grad for leaf in leaves]


def test_a_tilted_transport_problem_is_solved_by_sinkhorn(monkeypatch):
    """The generic solver is not asked: one that refuses leaves LPGD as it is."""

    def refuse(*_):
        raise AssertionError("the generic solver was asked")

    monkeypatch.setattr(NodeSolver, "_constrained", refuse)
    y, _ = gradients(TRANSPORT, draw(3, 4, batch=2), LPGD(tau=1e-2, rho=0.0))
    assert y.info.gradients[-1].used == ["average"] * 2
    with pytest.raises(AssertionError, match="generic solver was asked"):
        gradients(TRANSPORT, draw(3, 4, batch=2), LPGD(tau=1e-2, rho=0.1))


def test_a_plan_with_an_entry_that_underflows_has_gradients_for_all_inputs():
    """Mass never takes an entry of infinite cost, nor does a gradient; LPGD is the reference."""
    node = OptimalTransport(gamma=4.0)
    cost, rows, columns = draw(3, 4, batch=2)
    cost[:, 0, 0] = 1e3
    y, ours = gradients(node, (cost, rows, columns), None)
    assert not y[:, 0, 0].any()
    assert not ours[0][:, 0, 0].any()
    for found, reference in zip(ours, gradients(node, (cost, rows, columns), LPGD(tau=1e-4))[1], strict=True):
        assert torch.allclose(found, reference, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("node", "inputs"),
    [(TRANSPORT, draw(3, 4, batch=2)), (EIGEN, (symmetric(4, batch=2),)), (EigenDecomposition(), (symmetric(3),))],
    ids=["transport", "two eigenvectors", "all eigenvectors"],
)
def test_ignoring_the_constraints_by_formula_is_what_the_objective_s_hessian_gives(node, inputs, monkeypatch):
    y, formula = gradients(node, inputs, IgnoreConstraints(descent_test=True))
    assert set(y.info.gradients[-1].used) == {"constraints ignored"}
    exact = gradients(node, inputs, None)[1]
    products = sum((a * b).flatten(1).sum(-1) for a, b in zip(exact, formula, strict=True))
    assert torch.allclose(y.info.gradients[-1].descent, products, rtol=1e-9)
    monkeypatch.setattr(type(node), "vjp_ignoring_constraints", lambda *_: None)
    for ours, generic in zip(formula, gradients(node, inputs, IgnoreConstraints())[1], strict=True):
        assert float((ours - generic).abs().max()) <= 1e-10


def test_an_element_without_a_derivative_is_named_by_its_place_in_the_batch():
    matrix = torch.stack([symmetric(3, 1)[0], symmetric(3, 1)[0], torch.eye(3, dtype=torch.float64)]).requires_grad_()
    y = NodeLayer(PrincipalVector())(matrix)
    weight = random_like(y)
    weight[0] = 0.0
    with pytest.raises(SolverError, match="element 2 of 3") as caught:
        (weight * y).sum().backward()
    assert caught.value.indices == (2,)


def test_batches_broadcast_and_single_precision_stays():
    cost, rows, columns = (part.float() for part in draw(3, 4, batch=2))
    plan = NodeLayer(OptimalTransport())(cost, rows[0], columns[0])
    assert plan.dtype == torch.float32
    assert torch.allclose(plan.sum(-1), rows[0].expand(2, 3), atol=1e-5)
    y, (gradient,) = gradients(PrincipalVector(), (symmetric(4, batch=1)[0].float(),), None)
    assert y.shape == (4,)
    assert gradient.dtype == torch.float32


def test_elements_without_a_plan_are_named_and_leave_the_others_exact():
    cost, rows, columns = draw(3, 4, batch=3)
    broken = rows.clone()
    broken[1] *= 2.0
    with pytest.raises(SolverError, match="element 1 of 3: INFEASIBLE"):
        NodeLayer(TRANSPORT)(cost, broken, columns)
    layer = NodeLayer(TRANSPORT, on_error="nan")
    leaf = cost.clone().requires_grad_()
    plan = layer(leaf, broken, columns)
    assert plan.info.solution.statuses == (Status.SOLVED, Status.INFEASIBLE, Status.SOLVED)
    assert plan[1].isnan().all()
    weight = random_like(cost)
    (weight * plan)[[0, 2]].sum().backward()
    _, (expected, *_) = gradients(TRANSPORT, (cost, rows, columns), None, weight)
    assert torch.allclose(leaf.grad[[0, 2]], expected[[0, 2]], rtol=0, atol=1e-12)
    assert not leaf.grad[1].any()


def test_a_warm_start_re_uses_the_potentials():
    node, inputs = OptimalTransport(gamma=60.0), draw(5, 6)
    layer = NodeLayer(node)
    cold = layer(*inputs)
    warm = layer(*inputs, warm_start=cold)
    assert (warm.info.solution.iterations < cold.info.solution.iterations).all()
    assert torch.allclose(warm, cold, rtol=0, atol=1e-9)
