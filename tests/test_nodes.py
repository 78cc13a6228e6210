"""What every declarative node must do, row by row: optimal solutions, and gradients that agree with each other."""

from __future__ import annotations

import pytest
import torch

import lpgd
from tests.node_cases import ALL, NodeCase, random


def gradients(layer, inputs, seed: int = 7):
    """Those of a random linear loss, and the record."""
    y = layer(*inputs)
    return torch.autograd.grad((y * random(seed, *y.shape).to(y.dtype)).sum(), inputs), y.info.gradients[0]


def assert_close(first, second, atol: float):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=atol)


@ALL
def test_solutions_satisfy_the_optimality_conditions(case: NodeCase):
    solution = lpgd.NodeLayer(case.node).solve(*case.inputs())
    assert {status.name for status in solution.statuses} == {"SOLVED"}
    assert float(solution.residual.max()) <= 1e-9


@ALL
def test_the_gradient_is_that_of_finite_differences(case: NodeCase):
    # Along random directions: generic solvers take their time, and so does a search over all rotations.
    fast = isinstance(case.node, lpgd.Node | lpgd.nodes.PerspectivePose)
    assert torch.autograd.gradcheck(lpgd.NodeLayer(case.node), case.inputs(), atol=1e-6, fast_mode=fast)


@ALL
def test_the_closed_form_equals_implicit_differentiation(case: NodeCase):
    inputs = case.inputs()
    closed, _ = gradients(lpgd.NodeLayer(case.node), inputs)
    implicit, record = gradients(lpgd.NodeLayer(case.node, lpgd.ImplicitKKT()), inputs)
    assert set(record.used) == {"implicit"}
    assert_close(closed, implicit, 1e-10)


@ALL
@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_lpgd_with_a_small_step_equals_implicit_differentiation(case: NodeCase, rho: float):
    inputs = case.inputs()
    perturbed, record = gradients(lpgd.NodeLayer(case.node, lpgd.LPGD(tau=1e-5, rho=rho)), inputs)
    implicit, _ = gradients(lpgd.NodeLayer(case.node, lpgd.ImplicitKKT(rho=rho)), inputs)
    assert set(record.used) == {"average"}
    assert_close(perturbed, implicit, 1e-6)


@ALL
def test_single_precision_stays_and_agrees(case: NodeCase):
    inputs = case.inputs()
    single = tuple(tensor.detach().float().requires_grad_() for tensor in inputs)
    layer = lpgd.NodeLayer(case.node)
    y, reference = layer(*single), layer(*inputs)
    assert y.dtype == torch.float32
    assert y.info.solution.x.dtype == torch.float32
    torch.testing.assert_close(y.double(), reference, atol=2e-5, rtol=2e-5)
    own, exact = gradients(layer, single)[0], gradients(layer, inputs)[0]
    for a, b in zip(own, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=2e-4, rtol=2e-4)


@ALL
def test_a_batch_is_its_elements_one_by_one(case: NodeCase):
    inputs, layer = case.inputs(), lpgd.NodeLayer(case.node)
    y, (whole, _) = layer(*inputs), gradients(layer, inputs)
    weights = random(7, *y.shape)
    for element in range(y.shape[0]):
        own = tuple(tensor.detach()[element].requires_grad_() for tensor in inputs)
        alone = layer(*own)
        assert alone.shape == y.shape[1:]
        torch.testing.assert_close(alone, y[element], atol=1e-12, rtol=1e-12)
        parts = torch.autograd.grad((alone * weights[element]).sum(), own)
        assert_close(parts, [part[element] for part in whole], 1e-10)


@ALL
def test_nothing_moves_when_the_input_does_not(case: NodeCase):
    inputs, layer = case.inputs(), lpgd.NodeLayer(case.node)
    before = [tensor.detach().clone() for tensor in inputs]
    first = layer(*inputs)
    again = layer(*inputs, warm_start=first)
    first.sum().backward()
    torch.testing.assert_close(again, first, atol=1e-12, rtol=1e-12)
    for tensor, own in zip(inputs, before, strict=True):
        assert torch.equal(tensor, own)


@ALL
def test_forward_mode_is_the_transpose_of_reverse_mode(case: NodeCase):
    inputs, layer = case.inputs(), lpgd.NodeLayer(case.node)
    tangents = tuple(random(11 + place, *tensor.shape) for place, tensor in enumerate(inputs))
    (backward, _) = gradients(layer, inputs)
    y, change = torch.func.jvp(layer, tuple(tensor.detach() for tensor in inputs), tangents)
    forward = (change * random(7, *y.shape)).sum()
    reverse = sum((part * tangent).sum() for part, tangent in zip(backward, tangents, strict=True))
    torch.testing.assert_close(forward, reverse, atol=1e-9, rtol=1e-9)


@ALL
def test_the_generic_solver_finds_no_better_point(case: NodeCase):
    inputs = case.inputs(requires_grad=False)
    own = lpgd.NodeLayer(case.node).solve(*inputs)
    start = None if case.generic else own
    generic = lpgd.NodeLayer(case.node, solver=lpgd.NodeSolver(algorithm="newton"))
    solution = generic.solve(*inputs, warm_start=False if start is None else start)
    torch.testing.assert_close(solution.x, own.x, atol=1e-8, rtol=1e-8)


NO_CUDA = "torch.cuda.is_available() is false: this needs a CUDA device"


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_agrees_with_the_processor(case: NodeCase, dtype: torch.dtype):
    layer, inputs = lpgd.NodeLayer(case.node), tuple(tensor.detach().to(dtype) for tensor in case.inputs())
    here, there = (tuple(x.to(device).requires_grad_() for x in inputs) for device in ("cpu", "cuda"))
    y, other = layer(*here), layer(*there)
    assert other.is_cuda
    single = dtype == torch.float32
    torch.testing.assert_close(other.cpu(), y, atol=2e-5 if single else 1e-9, rtol=0)
    weights = random(7, *y.shape).to(dtype)
    own = torch.autograd.grad((y * weights).sum(), here)
    theirs = torch.autograd.grad((other * weights.cuda()).sum(), there)
    assert_close([part.cpu() for part in theirs], own, 4e-4 if single else 1e-8)
    for method in (lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-3 if single else 1e-5)):
        y = lpgd.NodeLayer(case.node, method)(*there)
        (y * weights.cuda()).sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in there)
