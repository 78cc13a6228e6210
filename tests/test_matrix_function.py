"""Functions of symmetric matrices at equal eigenvalues, and eigenvectors there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes import matrix_function, rayleigh_quotients
from tests.node_cases import random

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse root": lambda values: values.rsqrt(),
    "logarithm": torch.log,
    "square": lambda values: values**2,
    "constant": torch.ones_like,
}


def by_eigenvectors(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    vectors = lpgd.NodeLayer(lpgd.nodes.EigenDecomposition())(x)
    return (vectors * function(rayleigh_quotients(x, vectors))[..., None, :]) @ vectors.mT


@pytest.mark.parametrize("values", [(1.0, 1.0, 1.0), (2.0, 2.0, 0.5), (1.0, 1.0 + 1e-9, 3.0), (0.5, 1.0, 4.0)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_derivative_is_that_of_finite_differences_at_any_gap(name: str, values: tuple[float, ...]):
    basis = torch.linalg.qr(random(0, 3, 3)).Q
    x = (basis * torch.tensor(values, dtype=torch.float64)) @ basis.T
    weights, change = random(1, 3, 3), random(2, 3, 3)

    def loss(x: Tensor) -> Tensor:
        return (weights * matrix_function(x, FUNCTIONS[name])).sum()

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    with torch.no_grad():
        difference = (loss(x + 1e-5 * change) - loss(x - 1e-5 * change)) / 2e-5
    torch.testing.assert_close((gradient * change).sum(), difference, atol=1e-8, rtol=1e-8)


def test_the_inverse_root_of_the_identity_has_the_derivative_minus_one_half():
    x = torch.eye(2, dtype=torch.float64).requires_grad_()
    answer = matrix_function(x, torch.rsqrt)
    (gradient,) = torch.autograd.grad(answer[0, 1] + answer[1, 0], x)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.5], [-0.5, 0.0]], dtype=torch.float64))


def test_it_takes_batches_with_invalid_elements_and_refuses_what_it_cannot_do():
    x = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan)]).requires_grad_()
    answer = matrix_function(x, torch.exp)
    torch.testing.assert_close(answer[0], torch.e * torch.eye(3))
    assert answer[1].isnan().all()
    (gradient,) = torch.autograd.grad(answer[0].sum(), x)
    torch.testing.assert_close(gradient[0], torch.full((3, 3), torch.e))
    assert not gradient[1].any()
    with pytest.raises(ValueError, match="square"):
        matrix_function(torch.ones(2, 3), torch.exp)
    with pytest.raises(ValueError, match="keep the shape"):
        matrix_function(x, torch.sum)
    power = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match="requires a gradient"):
        matrix_function(torch.eye(2), lambda values: values**power)
    assert matrix_function(torch.ones(0, 3, 3), torch.exp).shape == (0, 3, 3)


def test_a_function_by_eigenvectors_warns_at_a_tie_and_is_right_elsewhere():
    x = torch.eye(3, dtype=torch.float64).requires_grad_()
    with pytest.warns(lpgd.LpgdWarning, match="matrix_function"):
        torch.autograd.grad(by_eigenvectors(x, torch.rsqrt)[0, 1], x)
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad(by_eigenvectors(x, torch.rsqrt)[0, 1], x)
    (expected,) = torch.autograd.grad(matrix_function(x, torch.rsqrt)[0, 1], x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss", ["span alone", "eigenvalues alone", "diagonal"])
def test_losses_whose_gradient_is_right_at_a_tie_do_not_warn(loss: str):
    x = torch.diag(torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)).requires_grad_()
    vectors = lpgd.NodeLayer(lpgd.nodes.EigenDecomposition())(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = rayleigh_quotients(x, vectors)
        pair = vectors[:, :2] @ vectors[:, :2].T
        if loss == "span alone":
            expected = 2 * torch.ones(3, 3, dtype=torch.float64)
            expected[:2, :2] = expected[2, 2] = 0  # d(P)_02 = dX_02 / (2 - 1)
            (gradient,) = torch.autograd.grad((2 * torch.ones(3, 3) * pair).sum(), x)
        elif loss == "eigenvalues alone":
            expected = torch.diag(torch.tensor([4.0, 4.0, 2.0], dtype=torch.float64))
            (gradient,) = torch.autograd.grad(values.square().sum(), x)
        else:
            expected = torch.diag(torch.tensor([4.0, 4.0, 2.0], dtype=torch.float64))
            function = (vectors * values.square()) @ vectors.T
            (gradient,) = torch.autograd.grad(function.trace(), x)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("tau", [1e-6, 1e-3])
def test_lpgd_says_that_vectors_of_equal_eigenvalues_jump(tau: float):
    x = torch.diag_embed(torch.tensor([[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64))
    vectors = lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(), lpgd.LPGD(tau=tau))(x.requires_grad_())
    with pytest.warns(lpgd.LpgdWarning, match=r"elements \[1, 2\] jumped"):
        torch.autograd.grad((vectors * random(3, 3, 3)).sum(), x)
    assert vectors.info.gradients[-1].jumped is not None
    assert vectors.info.gradients[-1].jumped.tolist() == [False, True, True]


def test_lpgd_is_silent_where_the_solution_responds():
    x = random(0, 4, 3).requires_grad_()
    node = lpgd.nodes.Projection("l2_ball", 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tau in (None, 1e-2, 1.0, 30.0):
            y = lpgd.NodeLayer(node, lpgd.LPGD(tau=tau))(x)
            torch.autograd.grad((y * random(1, 4, 3)).sum(), x)
