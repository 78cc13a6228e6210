"""Functions of symmetric matrices at equal eigenvalues, and eigenvectors there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes import SpectralFunction, rayleigh_quotients
from lpgd.nodes.spectral.divided_differences import first_differences, second_differences
from tests.node_cases import definite, random

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "inverse root": lambda values: values.rsqrt(),
    "logarithm": torch.log,
    "square": lambda values: values**2,
    "constant": torch.ones_like,
}


def spectral_function(x: Tensor, function: Callable[[Tensor], Tensor], **options) -> Tensor:
    return lpgd.NodeLayer(SpectralFunction(function), **options)(x)


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
        return (weights * spectral_function(x, FUNCTIONS[name])).sum()

    (gradient,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    with torch.no_grad():
        difference = (loss(x + 1e-5 * change) - loss(x - 1e-5 * change)) / 2e-5
    torch.testing.assert_close((gradient * change).sum(), difference, atol=1e-8, rtol=1e-8)


def test_the_inverse_root_of_the_identity_has_the_derivative_minus_one_half():
    x = torch.eye(2, dtype=torch.float64).requires_grad_()
    answer = spectral_function(x, torch.rsqrt)
    (gradient,) = torch.autograd.grad(answer[0, 1] + answer[1, 0], x)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.5], [-0.5, 0.0]], dtype=torch.float64))


def test_it_takes_batches_with_invalid_elements_and_refuses_what_it_cannot_do():
    x = torch.stack([torch.eye(3), torch.full((3, 3), torch.nan)]).requires_grad_()
    answer = spectral_function(x, torch.exp, on_error="nan")
    torch.testing.assert_close(answer[0], torch.e * torch.eye(3))
    assert answer[1].isnan().all()
    (gradient,) = torch.autograd.grad(answer[0].sum(), x)
    torch.testing.assert_close(gradient[0], torch.full((3, 3), torch.e))
    assert not gradient[1].any()
    with pytest.raises(ValueError, match="square"):
        spectral_function(torch.ones(2, 3), torch.exp)
    with pytest.raises(ValueError, match="keep the shape"):
        spectral_function(torch.eye(3), torch.sum)
    power = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match="requires a gradient"):
        spectral_function(torch.eye(2), lambda values: values**power)
    assert spectral_function(torch.ones(0, 3, 3), torch.exp).shape == (0, 3, 3)


def test_a_function_by_eigenvectors_warns_at_a_tie_and_is_right_elsewhere():
    x = torch.eye(3, dtype=torch.float64).requires_grad_()
    with pytest.warns(lpgd.LpgdWarning, match="SpectralFunction"):
        torch.autograd.grad(by_eigenvectors(x, torch.rsqrt)[0, 1], x)
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad(by_eigenvectors(x, torch.rsqrt)[0, 1], x)
    (expected,) = torch.autograd.grad(spectral_function(x, torch.rsqrt)[0, 1], x)
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
def test_lpgd_says_that_vectors_of_equal_eigenvalues_are_not_unique(tau: float):
    x = torch.diag_embed(torch.tensor([[3.0, 2.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64))
    vectors = lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(), lpgd.LPGD(tau=tau))(x.requires_grad_())
    with pytest.warns(lpgd.LpgdWarning, match=r"elements \[1, 2\] are not unique: eigenvalues are equal"):
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


def closed_differences(name: str, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """``f[a, b]`` and ``f[a, b, c]`` by formulas without cancellation."""
    if name == "square root":
        a, b, c = a.sqrt(), b.sqrt(), c.sqrt()
        return 1 / (a + b), -1 / ((a + b) * (b + c) * (a + c))
    if name == "inverse root":
        a, b, c = a.sqrt(), b.sqrt(), c.sqrt()
        return -1 / (a * b * (a + b)), (a + b + c) / (a * b * c * (a + b) * (b + c) * (a + c))
    return -1 / (a * b), 1 / (a * b * c)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-12, 1e-8, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("name", ["square root", "inverse root", "inverse"])
def test_divided_differences_have_no_cancellation(name: str, gap: float):
    function = {"square root": torch.sqrt, "inverse root": torch.rsqrt, "inverse": torch.reciprocal}[name]
    values = 0.7 + gap * torch.tensor([[0.0, 0.3, 1.0, 1.0], [0.0, 1e-3, 0.5, 1.0]], dtype=torch.float64)
    first = first_differences(function, values)
    second = second_differences(function, values, first, torch.arange(4))
    parts = (values[:, :, None, None], values[:, None, :, None], values[:, None, None, :])
    expected = closed_differences(name, *parts)
    size = expected[1].abs().amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(first, expected[0][..., 0], rtol=4e-14, atol=0)
    assert ((second - expected[1]).abs() <= 1e-12 * size).all()


@pytest.mark.parametrize("values", [(0.3, 1.0, 4.0), (2.0, 2.0, 2.0), (1.0, 1.0 + 1e-10, 0.2)])
def test_the_gradient_of_the_problem_that_does_not_mention_f_vanishes(values: tuple[float, ...]):
    """``∇ tr φ*(Y) = X``: ``exp Y``, ``Y²`` and ``Y⁻²`` give X back; those that end as ``-Y⁻²`` have -X."""
    (x,) = definite(*values)(0)
    inverses: dict[str, Callable[[Tensor], Tensor]] = {
        "log": torch.linalg.matrix_exp,
        "sqrt": lambda y: y @ y,
        "rsqrt": lambda y: torch.linalg.inv(y @ y),
    }
    for name, inverse in inverses.items():
        torch.testing.assert_close(inverse(lpgd.NodeLayer(SpectralFunction(name))(x)), x, rtol=1e-12, atol=1e-12)
    y = lpgd.NodeLayer(SpectralFunction("exp"))(x)
    torch.testing.assert_close(y, torch.linalg.matrix_exp(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("values", [(0.3, -1.0, 1.5), (0.5, 0.5, 0.5), (1.0, 1.0, -0.2), (1.0, 1.0 + 1e-8, 1.0 - 1e-5)])
def test_first_and_second_derivatives_are_those_of_the_matrix_exponential(values: tuple[float, ...]):
    (x,) = definite(*values)(1)
    x, weights, change = x.requires_grad_(), random(2, 3, 3, 3), random(3, 3, 3, 3)
    change = change + change.mT

    def derivatives(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad((weights * function(0.5 * (x + x.mT))).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad((first * change).sum(), x)
        return first, second

    expected = derivatives(torch.linalg.matrix_exp)
    for method in (None, lpgd.ImplicitKKT()):
        found = derivatives(lpgd.NodeLayer(SpectralFunction("exp"), method))
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_of_singular_matrices_have_a_derivative_while_one_eigenvalue_is_zero(dtype: torch.dtype):
    """With X = diag(0, 4), ``dY_01 = dX_01 / (0 + 2)``; an eigenvalue of -rounding counts as zero."""
    layer = lpgd.NodeLayer(SpectralFunction("sqrt"))
    x = torch.diag(torch.tensor([-torch.finfo(dtype).eps, 4.0], dtype=dtype)).requires_grad_()
    y = layer(x)
    assert y.tolist() == [[0.0, 0.0], [0.0, 2.0]]
    (gradient,) = torch.autograd.grad(y[0, 1], x)
    assert gradient.tolist() == [[0.0, 0.25], [0.25, 0.0]]
    batch = torch.stack([torch.eye(2, dtype=dtype), x.detach()]).requires_grad_()
    loss = layer(batch).sum()
    with pytest.raises(lpgd.SolverError, match="element 1 of 2"):
        loss.backward()
    with pytest.raises(lpgd.SolverError, match=r"element 1 of 2: INVALID_DATA.*finite at all eigenvalues"):
        lpgd.NodeLayer(SpectralFunction("log"))(batch)


def test_one_matrix_for_a_batch_is_decomposed_once():
    (x,) = definite(0.5, 1.0, 2.0, batch=1)(0)
    node = SpectralFunction("log")
    answer = node.solve((x.expand(4, 3, 3),), None)
    assert answer.aux[0].shape == (1, 3)
    torch.testing.assert_close(answer.y, node.solve((x.repeat(4, 1, 1),), None).y, rtol=0, atol=1e-15)
    cotangent = random(1, 4, 3, 3)
    for own, other in zip(
        node.vjp((x.expand(4, 3, 3),), answer.y, cotangent, answer.aux),
        node.vjp((x.repeat(4, 1, 1),), answer.y, cotangent, None),
        strict=True,
    ):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-14)


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"function is 'cos'; it must be one of log, sqrt, rsqrt, exp"):
        SpectralFunction("cos")  # pyright: ignore[reportArgumentType]
