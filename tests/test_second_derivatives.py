"""Gradients of declarative nodes that are differentiated again: against finite differences of the gradients."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from tests.node_cases import ALL, NodeCase, random


def loss_of(layer: lpgd.NodeLayer, count: int):
    """A loss that is not linear in y, of the first ``count`` inputs."""

    def loss(*inputs: Tensor) -> Tensor:
        y = layer(*inputs[:count])
        weights = random(3, *y.shape)
        return (weights * y + 0.3 * weights.flip(-1) * y.square()).sum()

    return loss


def finite_difference(gradient, inputs, along, step: float = 5e-5):
    """Central differences of two steps, extrapolated: the error falls with the fourth power of the step."""
    near, far = (
        [
            (above - below) / (2 * length)
            for above, below in zip(
                *(gradient(*(x + side * length * d for x, d in zip(inputs, along, strict=True))) for side in (1, -1)),
                strict=True,
            )
        ]
        for length in (step, 2 * step)
    )
    return tuple((4 * a - b) / 3 for a, b in zip(near, far, strict=True))


@ALL
@pytest.mark.parametrize("method", [None, lpgd.ImplicitKKT()], ids=["closed form", "implicit"])
def test_second_derivatives_are_those_of_finite_differences(case: NodeCase, method):
    layer, inputs = lpgd.NodeLayer(case.node, method), case.inputs()
    assert torch.autograd.gradgradcheck(layer, inputs, atol=1e-6, rtol=1e-6, fast_mode=True)


@ALL
def test_hessian_products_agree_in_both_modes(case: NodeCase):
    inputs = case.inputs(requires_grad=False)
    gradient = torch.func.grad(loss_of(lpgd.NodeLayer(case.node), len(inputs)), tuple(range(len(inputs))))
    along = tuple(random(5 + place, *tensor.shape) for place, tensor in enumerate(inputs))
    forward = torch.func.jvp(gradient, inputs, along)[1]
    reverse = torch.func.vjp(gradient, *inputs)[1](along)
    for one, other, reference in zip(
        forward, reverse, finite_difference(gradient, inputs, along), strict=True
    ):  # a Hessian is symmetric
        torch.testing.assert_close(one, reference, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(other, one, atol=1e-9, rtol=1e-9)


def test_a_loss_gradient_of_zero_has_a_second_derivative():
    # The Hessian of ½|y(x) - t|² at y = t is JᵀJ: nothing to see in the first derivative.
    x = random(0, 4).requires_grad_()
    layer = lpgd.NodeLayer(lpgd.nodes.Projection("l2_sphere"))
    target = layer(x).detach()
    (gradient,) = torch.autograd.grad(0.5 * (layer(x) - target).square().sum(), x, create_graph=True)
    jacobian = torch.autograd.functional.jacobian(layer, x.detach())
    v = random(1, 4)
    assert not gradient.any()
    torch.testing.assert_close(torch.autograd.grad(gradient @ v, x)[0], jacobian.T @ (jacobian @ v))


def test_a_shared_input_gets_the_sum_over_the_batch():
    layer = lpgd.NodeLayer(lpgd.nodes.LeastSquares())
    A, b = random(0, 6, 3).requires_grad_(), random(1, 4, 6).requires_grad_()
    assert torch.autograd.gradgradcheck(layer, (A, b), atol=1e-6)


def test_least_squares_that_fit_exactly_have_second_derivatives():
    A = random(0, 2, 5, 3)
    b = (A @ random(1, 2, 3, 1))[..., 0]
    layer = lpgd.NodeLayer(lpgd.nodes.LeastSquares())
    assert torch.autograd.gradgradcheck(layer, (A.requires_grad_(), b.requires_grad_()), atol=1e-6)


def test_eigenvalues_that_were_not_asked_for_may_be_equal():
    basis = torch.linalg.qr(random(0, 5, 5)).Q
    matrix = basis @ torch.diag(torch.tensor([4.0, 2.5, 1.0, 1.0, 1.0], dtype=torch.float64)) @ basis.T
    matrix = (0.5 * (matrix + matrix.T)).requires_grad_()
    assert torch.autograd.gradgradcheck(lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(2)), (matrix,), atol=1e-6)


def test_elements_without_a_solution_add_nothing():
    layer = lpgd.NodeLayer(lpgd.nodes.LeastSquares(), on_error="nan")
    A = random(0, 3, 5, 2)
    A[1] = 0
    A, b = A.requires_grad_(), random(1, 3, 5)
    y = layer(A, b)
    (gradient,) = torch.autograd.grad(torch.where(y.isnan(), 0, y).square().sum(), A, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), A)
    assert not second[1].any()
    alone = A.detach()[[0, 2]].requires_grad_()
    (gradient,) = torch.autograd.grad(layer(alone, b[[0, 2]]).square().sum(), alone, create_graph=True)
    torch.testing.assert_close(second[[0, 2]], torch.autograd.grad(gradient.square().sum(), alone)[0])


def test_a_bilevel_gradient_is_learned_through():
    # The learning rate of one gradient step on x, learned by the gradient of the loss after that step.
    layer = lpgd.NodeLayer(lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum() + 0.25 * (y**4).sum()))
    x, rate = random(0, 3), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def after(rate: Tensor) -> Tensor:
        start = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(start).square().sum(), start, create_graph=True)
        return layer(start - rate * gradient).square().sum()

    assert torch.autograd.gradcheck(after, (rate,))


@pytest.mark.parametrize("method", [lpgd.LPGD(tau=1e-3), lpgd.IgnoreConstraints()], ids=str)
def test_methods_without_second_derivatives_refuse_them(method):
    x = random(0, 2, 3).requires_grad_()
    y = lpgd.NodeLayer(lpgd.nodes.Projection(), method)(x)
    (gradient,) = torch.autograd.grad(y[:, 0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*declarative nodes, by their closed"):
        gradient.sum().backward()


def test_third_derivatives_are_refused():
    x = random(0, 3).requires_grad_()
    (first,) = torch.autograd.grad(lpgd.NodeLayer(lpgd.nodes.Projection())(x)[0], x, create_graph=True)
    (second,) = torch.autograd.grad(first[0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        second.sum().backward()


def tied(*values: float) -> Tensor:
    return torch.diag(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize(
    ("layer", "inputs", "message"),
    [
        (
            lpgd.NodeLayer(lpgd.nodes.EigenDecomposition()),
            (torch.stack([tied(3.0, 2.0, 1.0), tied(2.0, 2.0, 1.0)]),),
            r"elements \[1\] are equal",
        ),
        (
            lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(1)),
            (torch.stack([tied(3.0, 2.0, 1.0), tied(2.0, 2.0, 1.0)]),),
            r"elements \[1\] are equal",
        ),
        (
            lpgd.NodeLayer(lpgd.nodes.SphereLeastSquares()),
            (torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)),
            r"elements \[0\] are not unique",
        ),
        (
            lpgd.NodeLayer(lpgd.Node(lambda x, y: (y.sum() - x.sum()).square())),
            (torch.ones(2, 3, dtype=torch.float64),),
            r"elements \[0, 1\] are singular.*rho",
        ),
        (
            lpgd.NodeLayer(lpgd.nodes.Projection(), lpgd.ImplicitKKT(matrix_free=True)),
            (torch.ones(3, dtype=torch.float64),),
            "matrix_free",
        ),
    ],
    ids=["tied eigenvectors", "one of tied eigenvectors", "sphere", "flat objective", "matrix-free"],
)
@pytest.mark.filterwarnings("ignore::lpgd.LpgdWarning")
def test_points_without_a_second_derivative_are_named(layer, inputs, message):
    inputs = tuple(tensor.requires_grad_() for tensor in inputs)
    y = layer(*inputs)
    (gradient,) = torch.autograd.grad((y * random(1, *y.shape)).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.square().sum().backward()


@pytest.mark.parametrize("scale", [1.0, 1e4, 1e8])
def test_second_derivatives_of_wide_ridge_regression_are_right_at_any_scale(scale: float) -> None:
    """Against differences, with 80 digits, of ``r sᵀ - (A s) yᵀ``, ``A s`` and ``-y·s``."""
    A, b, v = scale * random(0, 3, 5), random(1, 3), random(2, 5)
    ridge = torch.tensor(0.7, dtype=torch.float64)
    ways = scale * random(3, 3, 5), random(4, 3), random(5, 1)[0]
    with mpmath.workdps(80):
        exact = [mpmath.matrix(tensor.reshape(len(tensor), -1).tolist()) for tensor in (A, b, v, *ways[:2])]
        step = mpmath.mpf(10) ** -25

        def gradient(turn: int) -> list[Any]:
            matrix, target = exact[0] + turn * step * exact[3], exact[1] + turn * step * exact[4]
            system = matrix.T * matrix + (mpmath.mpf(0.7) + turn * step * float(ways[2])) * mpmath.eye(5)
            y, s = mpmath.lu_solve(system, matrix.T * target), mpmath.lu_solve(system, exact[2])
            moved = matrix * s
            return [(target - matrix * y) * s.T - moved * y.T, moved, -(y.T * s)]

        differences = [(one - other) / (2 * step) for one, other in zip(gradient(1), gradient(-1), strict=True)]
        expected = [np.array(one.tolist(), dtype=np.float64) for one in differences]
    data = tuple(tensor.clone().requires_grad_() for tensor in (A, b, ridge))
    y = lpgd.NodeLayer(lpgd.nodes.LeastSquares(ridge=True))(*data)
    first = torch.autograd.grad((y * v).sum(), data, create_graph=True)
    along = torch.stack([(one * way).sum() for one, way in zip(first, ways, strict=True)]).sum()
    for found, right in zip(torch.autograd.grad(along, data), expected, strict=True):
        wanted = torch.as_tensor(right).reshape(found.shape)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_second_derivatives_of_wide_ridge_regression_exist_at_weights_of_zero() -> None:
    """Those of an element with a weight of zero are those without the row, and the neighbour's are its own."""
    A, b, weights = random(0, 2, 3, 5), random(1, 2, 3), random(2, 2, 3).abs() + 0.3
    weights[1, 0] = 0.0
    ridge = torch.tensor([0.7, 0.4], dtype=torch.float64)

    def second(*data: Tensor) -> tuple[Tensor, ...]:
        layer = lpgd.NodeLayer(lpgd.nodes.LeastSquares(weighted=True, ridge=True))
        data = tuple(tensor.clone().requires_grad_() for tensor in data)
        first = torch.autograd.grad(layer(*data).square().sum(), (data[1], data[3]), create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), data)

    whole = second(A, b, weights, ridge)
    fewer = second(A[1:, 1:], b[1:, 1:], weights[1:, 1:], ridge[1:])
    alone = second(A[:1], b[:1], weights[:1], ridge[:1])
    for found, smaller, own in zip(whole, fewer, alone, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[:1], own, rtol=1e-12, atol=1e-12)
        kept = found[1:, 1:] if found.ndim > 1 else found[1:]
        torch.testing.assert_close(kept, smaller, rtol=1e-9, atol=1e-12)
