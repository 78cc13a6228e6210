"""CvxpyLayer with tensors as they come in PyTorch: batches, types, devices, and the graph they are part of."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from torch import Tensor

import lpgd
from tests.layer_cases import METHODS, TIGHT, close, data, leaf, normal, program, weighted


def clip_layer(**options: Any) -> lpgd.CvxpyLayer:
    """minimise ½ |x - c|² subject to x <= u for a scalar u: x = min(c, u), the multiplier is max(c - u, 0)."""
    x, c, u = cp.Variable(2), cp.Parameter(2), cp.Parameter()
    bound = x <= u
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - c)), [bound])
    return lpgd.CvxpyLayer(problem, [c, u], [x, bound.dual_variables[0]], solver_args=TIGHT, **options)


def clip(c: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    c, u = c.double(), u.double()[..., None]
    return torch.minimum(c, u), torch.relu(c - u)


CLIP = clip_layer()


# Batches


@settings(max_examples=40)
@given(
    shapes=mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3),
    types=st.tuples(*[st.sampled_from([torch.float32, torch.float64])] * 2),
    seed=st.integers(0, 2**16),
)
def test_batches_broadcast_like_tensors(shapes: Any, types: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    (c_shape, u_shape), batch = shapes.input_shapes, shapes.result_shape
    values = [normal(*c_shape, 2, seed=seed).to(types[0]), normal(*u_shape, seed=seed + 1).to(types[1])]
    own, exact = [leaf(value) for value in values], [leaf(value) for value in values]
    outputs, expected = CLIP(*own), clip(*exact)
    for output, value in zip(outputs, expected, strict=True):
        assert output.shape == (*batch, 2)
        assert output.dtype == torch.promote_types(*types)
        torch.testing.assert_close(output.double(), value, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(weighted(outputs), own)
    for gradient, value in zip(gradients, torch.autograd.grad(weighted(expected), exact), strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("solver", ["CLARABEL", "SCS", "ECOS"])
def test_a_batch_is_its_elements_one_by_one(solver: str, method: lpgd.LPGD) -> None:
    options = {"eps": 1e-8} if solver == "ECOS" else {}
    layer = program(solver=solver, gradient=method)
    whole = [leaf(datum) for datum in data(5)]
    outputs = layer(*whole, solver_args=options)
    loss = torch.stack([weighted([out[i] for out in outputs]) for i in range(5)]).sum()
    gradients = torch.autograd.grad(loss, whole)
    tolerance = 1e-4 if solver == "ECOS" or not isinstance(method, lpgd.ImplicitKKT) else 1e-6
    for i in range(5):
        single = [leaf(datum[i]) for datum in whole]
        alone = layer(*single, solver_args=options)
        close(alone, [out[i] for out in outputs], tolerance)
        close(torch.autograd.grad(weighted(alone), single), [part[i] for part in gradients], tolerance)


def test_batch_dimensions_of_shared_parameters_are_summed() -> None:
    layer = program()
    P, _, A, _, u = data()
    rows, columns = normal(3, 1, 4, seed=5), 0.3 * normal(1, 4, 1, seed=6)
    own = [leaf(datum) for datum in (P, rows, A, columns, u)]
    outputs = layer(*own)
    assert [out.shape for out in outputs] == [(3, 4, 4), (3, 4, 1), (3, 4, 4)]
    weights = [normal(*out.shape, seed=k) for k, out in enumerate(outputs)]
    gradients = torch.autograd.grad(weighted(outputs), own)
    expected = [torch.zeros_like(tensor) for tensor in own]
    for i in range(3):
        for j in range(4):
            single = [leaf(datum) for datum in (P, rows[i, 0], A, columns[0, j], u)]
            alone = layer(*single)
            close(alone, [out[i, j] for out in outputs])
            parts = torch.autograd.grad(
                sum((w[i, j] * out).sum() for w, out in zip(weights, alone, strict=True)), single
            )
            for total, part, place in zip(expected, parts, (..., (i, 0), ..., (0, j), ...), strict=True):
                total[place] += part
    close(gradients, expected)


def test_what_the_batch_shares_stays_shared() -> None:
    layer = program()
    P, _, A, b, u = data()
    solution = layer.solve(P, normal(7, 4), A[None], b, u)
    dimensions = {name: datum.ndim for name, datum in solution.problem.data._asdict().items()}
    assert dimensions == {"P": 1, "q": 2, "A": 1, "b": 1, "lower": 1, "upper": 1}


def test_batches_of_one_and_of_none() -> None:
    layer = program()
    empty = [leaf(datum) for datum in data(0)]
    weighted(layer(*empty)).backward()
    assert [tensor.grad.shape for tensor in empty if tensor.grad is not None] == [tensor.shape for tensor in empty]
    for batch in ((1,), (1, 1), (0,), (2, 0, 3)):
        tensors = [leaf(datum) for datum in (data()[0], normal(*batch, 4, seed=1), *data()[2:])]
        outputs = layer(*tensors)
        assert [out.shape for out in outputs] == [(*batch, 4), (*batch, 1), (*batch, 4)]
        weighted(outputs).backward()
        if 0 in batch:
            assert all(tensor.grad is not None and not tensor.grad.any() for tensor in tensors)
        else:
            single = [leaf(tensors[0]), leaf(tensors[1].reshape(4)), *(leaf(tensor) for tensor in tensors[2:])]
            alone = layer(*single)
            weighted([out.reshape(shape.shape) for out, shape in zip(alone, outputs, strict=True)]).backward()
            close([t.grad.reshape(-1) for t in tensors], [t.grad.reshape(-1) for t in single], 1e-9)  # pyright: ignore


# Types and devices


def test_float32_comes_out_where_it_went_in() -> None:
    layer = program()
    exact = layer(*data(3))
    tensors = [leaf(datum.float()) for datum in data(3)]
    outputs = layer(*tensors)
    assert {out.dtype for out in outputs} == {torch.float32}
    close([out.double() for out in outputs], exact, 1e-5)
    weighted([out.double() for out in outputs]).backward()
    assert {tensor.grad.dtype for tensor in tensors if tensor.grad is not None} == {torch.float32}
    mixed = [leaf(datum.float() if k % 2 else datum) for k, datum in enumerate(data(3))]
    outputs = layer(*mixed)
    assert {out.dtype for out in outputs} == {torch.float64}
    weighted(outputs).backward()
    assert [tensor.grad.dtype for tensor in mixed if tensor.grad is not None] == [tensor.dtype for tensor in mixed]


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: this needs a CUDA device"
)
def test_cuda_tensors_come_out_where_they_went_in() -> None:
    layer = program()
    tensors = [leaf(datum.to("cuda")) for datum in data(3)]
    outputs = layer(*tensors)
    assert {out.device.type for out in outputs} == {"cuda"}
    close([out.cpu() for out in outputs], layer(*data(3)))
    weighted([out.cpu() for out in outputs]).backward()
    own = [leaf(datum) for datum in data(3)]
    weighted(layer(*own)).backward()
    close([tensor.grad.cpu() for tensor in tensors], [tensor.grad for tensor in own])  # pyright: ignore


def test_strided_and_expanded_inputs() -> None:
    layer = program()
    P, q, A, b, u = data(3)
    strided = [P.mT.contiguous().mT, torch.stack([q, q], -1)[..., 0], A.flip(0).flip(0), b[:1].expand(3, 1), u]
    assert not strided[1].is_contiguous()
    close(layer(*strided), layer(P, q, A, b[0], u), 1e-9)


# The graph


def test_inputs_and_the_problem_are_never_modified() -> None:
    x, c, u = cp.Variable(2), cp.Parameter(2, value=np.array([1.0, 2.0])), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x <= u])
    for method in METHODS:
        layer = lpgd.CvxpyLayer(problem, [c, u], [x], gradient=method)
        tensors = [leaf(normal(3, 2)), leaf(normal(3, seed=1))]
        before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
        (output,) = layer(*tensors)
        kept, cotangent = output.detach().clone(), normal(3, 2, seed=4)
        output.backward(cotangent)
        close([*tensors, output, cotangent], [*before, kept, normal(3, 2, seed=4)], 0.0)
        assert [t._version for t in tensors] == versions
    assert c.value is not None
    assert c.value.tolist() == [1.0, 2.0]
    assert u.value is None
    assert x.value is None
    assert problem.status is None


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_two_forwards_before_a_backward(method: lpgd.LPGD) -> None:
    layer = program(gradient=method)
    batches = [[leaf(datum) for datum in data(2, seed=seed)] for seed in (0, 10)]
    alone = [torch.autograd.grad(weighted(layer(*tensors)), tensors) for tensors in batches]
    losses = [weighted(layer(*tensors)) for tensors in batches]
    for loss, tensors, expected in reversed(list(zip(losses, batches, alone, strict=True))):
        close(torch.autograd.grad(loss, tensors), expected)
    # The second's input may depend on the first's output.
    P, q, A, b, u = data()
    start = leaf(q)
    layer(P, layer(P, start, A, b, u)[0], A, b, u)[0].sum().backward()
    assert start.grad is not None
    step = 1e-5 * normal(4, seed=3)
    chained = [layer(P, layer(P, q + sign * step, A, b, u)[0], A, b, u)[0].sum() for sign in (1, -1)]
    if isinstance(method, lpgd.ImplicitKKT):
        torch.testing.assert_close((start.grad * step).sum(), 0.5 * (chained[0] - chained[1]), rtol=1e-3, atol=1e-9)


def test_a_retained_graph_gives_the_same_gradient_twice() -> None:
    tensors = [leaf(datum) for datum in data(2)]
    outputs = program()(*tensors)
    loss = weighted(outputs)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    close(torch.autograd.grad(loss, tensors), first, 0.0)
    assert len(outputs.info.gradients) == 2
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors)


def test_second_derivatives_are_refused() -> None:
    tensors = [leaf(datum) for datum in data()]
    # Even of a linear loss, whose cotangent is constant: the Jacobian is not.
    for loss in (lambda out: out[0].square().sum(), lambda out: out[0].sum()):
        (gradient,) = torch.autograd.grad(loss(program()(*tensors)), tensors[1], create_graph=True)
        with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*finite differences"):
            gradient.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(gradient.sum(), tensors[1])


def test_changes_in_place_are_noticed_or_harmless() -> None:
    P, q, A, b, u = data()
    layer, tensor = program(), leaf(q)
    (expected,) = torch.autograd.grad(layer(P, tensor, A, b, u)[0].sum(), tensor)
    (output, *_) = layer(P, tensor, A, b, u)
    output.mul_(3.0)
    with torch.no_grad():
        tensor.add_(1.0)
    close(torch.autograd.grad(output.sum(), tensor), [3.0 * expected])

    x, a = cp.Variable(pos=True), cp.Parameter(pos=True)
    geometric = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(x + a / x)), [a], [x], gp=True)
    value = leaf(torch.tensor([2.0, 3.0]).double())
    (output,) = geometric(value)  # √a: autograd keeps it for the derivative of an exponential
    with torch.no_grad():
        output.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    (output,) = geometric(value)
    with torch.no_grad():
        value.mul_(2.0)
    close(torch.autograd.grad(output.sum(), value), [0.5 * torch.tensor([2.0, 3.0]).double().rsqrt()])


def test_a_shared_matrix_is_not_copied_for_each_element_of_a_batched_vector() -> None:
    m, n, size = 40, 100, 64
    x, A, b, c = cp.Variable(n), cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter(n)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x) + c @ x), [A @ x == b, x >= 0]), [A, b, c], [x])
    generator = torch.Generator().manual_seed(0)
    matrix = leaf(torch.rand(m, n, generator=generator, dtype=torch.float64))
    right = leaf(matrix.detach().sum(1) / 2)
    costs = leaf(torch.randn(size, n, generator=generator, dtype=torch.float64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        layer(matrix, right, costs)[0].square().sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 8 * size * m * n  # bytes of a copy for each element
