"""Eigen decomposition and the principal vector: solutions, conventions and derivatives."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from lpgd.nodes.eigen import (
    EigenDecomposition,
    Spectrum,
    eigen_decomposition,
    eigen_vjp,
    eigen_vjp_approximate,
    rayleigh_quotients,
)
from lpgd.nodes.principal.derivative import principal_vjp_symmetric
from lpgd.nodes.principal.node import PrincipalVector
from lpgd.status import LpgdWarning, SolverError, Status
from tests.node_reference import ROUNDING

from .node_reference import bordered_gradient, stationarity


def symmetric(m, batch=3, seed=0):
    """Matrices with eigenvalues about one apart, of both signs, and none at zero or of equal magnitude."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(batch, m, m, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(m, dtype=torch.float64) - 0.3 * m + 0.3 + 0.3 * torch.rand(m, generator=generator)
    return basis @ torch.diag_embed(values.expand(batch, m)) @ basis.mT


def general(m, batch=3, seed=0):
    """Nonnegative matrices: the eigenvalue of largest magnitude is real (Perron)."""
    return torch.rand(batch, m, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def random_like(value, seed=7):
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)


EIGEN = [EigenDecomposition(k, largest) for k in (None, 1, 3) for largest in (True, False)]
PRINCIPAL = [
    PrincipalVector(symmetric=kind, method=method)
    for kind in (True, False)
    for method in (None, "simultaneous", "power")
]
NODES = EIGEN + PRINCIPAL


def matrices(node, m=5, **options):
    """What the node is for, with a skew part where only the symmetric one counts."""
    if isinstance(node, PrincipalVector) and not node.symmetric:
        return general(m, **options)
    matrix = symmetric(m, **options)
    return matrix + 0.2 * (random_like(matrix).triu(1) - random_like(matrix).triu(1).mT)


@pytest.mark.parametrize("node", NODES, ids=repr)
def test_solutions_satisfy_the_optimality_conditions(node):
    inputs = (matrices(node),)
    answer = node.solve(inputs, None)
    assert set(answer.statuses) == {Status.SOLVED}
    nu = answer.nu if answer.nu is not None else node.multipliers(inputs, answer.y, answer.aux)[0]
    assert stationarity(node, inputs, answer.y, nu) < 1e-9


@pytest.mark.parametrize("node", EIGEN, ids=repr)
def test_eigenvectors_come_in_order_with_their_values(node):
    matrix = symmetric(5)
    U = node.solve((matrix,), None).y
    k = 5 if node.k is None else node.k
    expected = torch.linalg.eigvalsh(matrix)
    expected = expected.flip(-1)[:, :k] if node.largest else expected[:, :k]
    assert torch.allclose(rayleigh_quotients(matrix, U), expected, rtol=0, atol=1e-13)
    assert (U.gather(-2, U.abs().argmax(-2, keepdim=True)) > 0).all()
    better = node.objective(U, matrix)
    other = torch.linalg.qr(random_like(U)).Q
    assert (node.objective(other, matrix) > better).all()


@pytest.mark.parametrize("method", [None, "simultaneous", "power"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_principal_vector_is_that_of_the_largest_eigenvalue(method, sign):
    matrix = sign * symmetric(12, seed=2)
    y = PrincipalVector(method=method).solve((matrix,), None).y
    exact = torch.linalg.eigh(matrix).eigenvectors[:, :, -1]
    assert torch.allclose((y * exact).sum(-1).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_principal_vector_of_a_general_matrix_has_the_largest_magnitude():
    matrix = -general(9, seed=3)
    values, vectors = torch.linalg.eig(matrix)
    exact = vectors[torch.arange(3), :, values.abs().argmax(-1)].real
    for node in (node for node in PRINCIPAL if not node.symmetric):
        y = node.solve((matrix,), None).y
        assert torch.allclose((y * exact).sum(-1).abs(), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_dominant_complex_pair_is_not_converged():
    rotation = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.5]]], dtype=torch.float64)
    matrix = torch.cat([rotation, general(3, batch=1)])
    for method in ("simultaneous", "power"):
        answer = PrincipalVector(symmetric=False, method=method, iterations=200).solve((matrix,), None)
        assert answer.statuses == [Status.ITERATION_LIMIT, Status.SOLVED]


def test_signs_follow_the_reference():
    matrix = symmetric(4, seed=5)
    y = PrincipalVector().solve((matrix,), None).y
    assert (y.sum(-1) > 0).all()
    torch.testing.assert_close(
        PrincipalVector(reference=(-1.0,) * 4).solve((matrix,), None).y, -y, rtol=0, atol=ROUNDING
    )
    U = EigenDecomposition(2).solve((matrix,), None).y
    flipped = U * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(EigenDecomposition(2).solve((matrix,), flipped).y, flipped, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("node", NODES, ids=repr)
def test_the_structured_gradient_is_that_of_the_bordered_system(node):
    inputs = (matrices(node),)
    answer = node.solve(inputs, None)
    cotangent = random_like(answer.y)
    (reference,) = bordered_gradient(node, inputs, answer.y, cotangent)
    (ours,) = node.vjp(inputs, answer.y, cotangent, answer.aux)
    (without,) = node.vjp(inputs, answer.y, cotangent, None)
    assert float((ours - reference).abs().max()) <= 1e-10
    assert float((without - reference).abs().max()) <= 1e-10


@pytest.mark.parametrize("node", NODES, ids=repr)
def test_gradients_equal_finite_differences(node):
    tight = node if isinstance(node, EigenDecomposition) else replace(node, tolerance=1e-13)

    class Vectors(torch.autograd.Function):
        @staticmethod
        def forward(ctx, matrix):
            answer = tight.solve((matrix,), None)
            ctx.save_for_backward(matrix, answer.y)
            ctx.aux = answer.aux
            return answer.y

        @staticmethod
        def backward(ctx, cotangent):
            matrix, y = ctx.saved_tensors
            return tight.vjp((matrix,), y, cotangent, ctx.aux)

    assert torch.autograd.gradcheck(Vectors.apply, (matrices(node, 4, batch=2, seed=1).requires_grad_(),), atol=1e-6)


def test_eigenvalues_have_their_exact_gradient():
    matrix = symmetric(5).requires_grad_()
    U = eigen_decomposition(matrix.detach(), largest=False).vectors
    weights = random_like(U[:, 0])
    (ours,) = torch.autograd.grad((weights * rayleigh_quotients(matrix, U)).sum(), matrix)
    (exact,) = torch.autograd.grad((weights * torch.linalg.eigh(matrix).eigenvalues).sum(), matrix)
    assert torch.allclose(ours, exact, rtol=0, atol=1e-13)


def test_equal_eigenvalues_leave_losses_of_their_span_exact_and_warn_of_others():
    """``UUᵀ`` of the first two of diag(2, 2, 0) moves with X_13 and X_23 alone: half of V's entries there, over 2."""
    node = EigenDecomposition(2)
    matrix = torch.diag(torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64))[None]
    answer = node.solve((matrix,), None)
    weight = random_like(matrix)
    cotangent = (weight + weight.mT) @ answer.y
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = node.vjp((matrix,), answer.y, cotangent, answer.aux)
    expected = torch.zeros(3, 3, dtype=torch.float64)
    expected[:2, 2] = expected[2, :2] = (0.5 * (weight + weight.mT))[0, :2, 2] / 2.0
    assert torch.allclose(gradient[0], expected, rtol=0, atol=1e-14)
    with pytest.warns(LpgdWarning, match="1 of 1 matrices have no derivative"):
        (gradient,) = node.vjp((matrix,), answer.y, random_like(answer.y), answer.aux)
    assert gradient.isfinite().all()


def test_near_equal_eigenvalues_above_the_tolerance_are_differentiated():
    gap = 1e-6
    matrix = torch.diag(torch.tensor([1.0 + gap, 1.0], dtype=torch.float64))[None]
    spectrum = eigen_decomposition(matrix, largest=True)
    cotangent = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=torch.float64)
    gradient, ambiguous = eigen_vjp(spectrum, cotangent, 1e-12)
    assert torch.allclose(gradient[0, 0, 1], torch.tensor(0.5 / gap, dtype=torch.float64), rtol=1e-9)
    assert not ambiguous.any()
    gradient, ambiguous = eigen_vjp(spectrum, cotangent, 1e-5)
    assert ambiguous.all()
    assert not gradient.any()


def test_a_double_principal_eigenvalue_is_an_error_that_names_the_element():
    matrix = torch.stack([symmetric(3, 1)[0], torch.eye(3, dtype=torch.float64)])
    node = PrincipalVector()
    y = node.solve((matrix,), None).y
    with pytest.raises(SolverError, match="element 1 of 2") as caught:
        node.vjp((matrix,), y, random_like(y), None)
    assert caught.value.indices == (1,)


@pytest.mark.parametrize("method", [None, "simultaneous", "power"])
@pytest.mark.parametrize("m", [3, 50, 150])
def test_an_eigenvalue_that_is_double_to_rounding_is_an_error_whatever_the_loss(method, m):
    basis = torch.linalg.qr(random_like(torch.empty(4, m, m, dtype=torch.float64))).Q
    values = torch.linspace(-1, 1, m, dtype=torch.float64)
    values[-2] = values[-1]
    matrix = basis @ torch.diag_embed(values.expand(4, m)) @ basis.mT
    node = PrincipalVector(method=method)
    answer = node.solve((matrix,), None)
    cotangent = torch.zeros_like(answer.y)
    cotangent[:, 0] = 1.0
    with pytest.raises(SolverError) as caught:
        node.vjp((matrix,), answer.y, cotangent, answer.aux)
    assert caught.value.indices == (0, 1, 2, 3)


@pytest.mark.parametrize("method", [None, "simultaneous", "power"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_close_eigenvalues_are_no_double_ones(method, dtype):
    m, gap = 150, 1e-3 if dtype == torch.float32 else 1e-10
    basis = torch.linalg.qr(random_like(torch.empty(4, m, m, dtype=torch.float64))).Q
    values = torch.linspace(-1, 1, m, dtype=torch.float64)
    values[-2] = values[-1] - gap
    matrix = (basis @ torch.diag_embed(values.expand(4, m)) @ basis.mT).to(dtype)
    node = PrincipalVector(method=method)
    y = basis[:, :, -1].to(dtype)
    (gradient,) = node.vjp((matrix,), y, basis[:, :, -2].to(dtype), None)
    assert torch.allclose(gradient.double().norm(dim=(-2, -1)) * gap, torch.tensor(0.5).double().sqrt(), rtol=0.05)


def test_the_approximate_gradient_replaces_the_pseudoinverse():
    matrix = symmetric(4)
    spectrum = eigen_decomposition(matrix, largest=True)
    cotangent = random_like(spectrum.vectors[:, :, :2])
    found = eigen_vjp_approximate(spectrum, cotangent, 1e-12)
    product = -torch.linalg.inv(matrix) @ cotangent @ spectrum.vectors[:, :, :2].mT
    assert torch.allclose(found, 0.5 * (product + product.mT), rtol=0, atol=1e-12)
    singular = Spectrum(torch.tensor([[2.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)[None])
    assert torch.equal(
        eigen_vjp_approximate(singular, torch.eye(2, dtype=torch.float64)[None, :, :1], 1e-12),
        torch.tensor([[[-0.5, 0.0], [0.0, 0.0]]], dtype=torch.float64),
    )


@pytest.mark.parametrize("node", NODES, ids=repr)
def test_single_precision_agrees_with_double(node):
    matrix = matrices(node)
    double, single = node.solve((matrix,), None), node.solve((matrix.float(),), None)
    assert single.y.dtype == torch.float32
    assert set(single.statuses) == {Status.SOLVED}
    assert torch.allclose(single.y.double(), double.y, rtol=0, atol=1e-5)
    cotangent = random_like(double.y)
    (high,) = node.vjp((matrix,), double.y, cotangent, double.aux)
    (low,) = node.vjp((matrix.float(),), single.y, cotangent.float(), single.aux)
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), high, rtol=0, atol=1e-4 * float(high.abs().max()))


@pytest.mark.parametrize("method", [None, "simultaneous", "power"])
def test_in_single_precision_the_principal_vector_is_no_less_accurate_than_eigh(method):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(8, 64, 64, generator=generator)
    matrix = root @ root.mT / 64
    exact = torch.linalg.eigh(matrix.double()).eigenvectors[:, :, -1]

    def error(vector):
        double = vector.double()
        sign = torch.where((double * exact).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        return torch.linalg.vector_norm(sign * double - exact, dim=-1)

    ours = error(PrincipalVector(method=method).solve((matrix,), None).y)
    assert (ours <= error(torch.linalg.eigh(matrix).eigenvectors[:, :, -1])).all()


@pytest.mark.parametrize("node", NODES, ids=repr)
def test_a_batch_is_its_elements_and_answers_are_repeatable(node):
    matrix = matrices(node, batch=4, seed=6)
    copy = matrix.clone()
    whole = node.solve((matrix,), None)
    torch.testing.assert_close(node.solve((matrix,), None).y, whole.y, rtol=0, atol=ROUNDING)
    cotangent = random_like(whole.y)
    (gradient,) = node.vjp((matrix,), whole.y, cotangent, whole.aux)
    for index in range(4):
        own = (matrix[index : index + 1],)
        alone = node.solve(own, None)
        assert torch.allclose(alone.y[0], whole.y[index], rtol=0, atol=1e-12)
        (part,) = node.vjp(own, alone.y, cotangent[index : index + 1], alone.aux)
        assert torch.allclose(part[0], gradient[index], rtol=0, atol=1e-10)
    assert torch.equal(matrix, copy)


def test_a_warm_start_takes_fewer_iterations_and_leaves_another_eigenvector():
    matrix = symmetric(20, seed=8)
    node = PrincipalVector(method="power")
    cold = node.solve((matrix,), None)
    warm = node.solve((matrix,), cold.y)
    assert (warm.iterations < cold.iterations).all()
    other = torch.linalg.eigh(matrix).eigenvectors[:, :, -2]
    assert torch.allclose(node.solve((matrix,), other).y, cold.y, rtol=0, atol=1e-9)


def test_a_matrix_of_order_one_has_a_constant_vector():
    matrix = torch.tensor([[[-2.0]]], dtype=torch.float64)
    for node in (PrincipalVector(), PrincipalVector(symmetric=False), EigenDecomposition()):
        answer = node.solve((matrix,), None)
        assert answer.y.flatten().tolist() == [1.0]
        assert node.vjp((matrix,), answer.y, torch.ones_like(answer.y), answer.aux)[0].flatten().tolist() == [0.0]


def test_the_symmetric_rule_needs_no_decomposition():
    matrix = symmetric(6)
    values, vectors = torch.linalg.eigh(matrix)
    y, cotangent = vectors[:, :, -1], random_like(vectors[:, :, 0])
    inverse = torch.linalg.pinv(values[:, -1:, None] * torch.eye(6, dtype=torch.float64) - matrix, rtol=1e-10)
    product = (inverse @ cotangent[:, :, None]) * y[:, None, :]
    found = principal_vjp_symmetric(matrix, y, values[:, -1], cotangent)
    assert torch.allclose(found, 0.5 * (product + product.mT), rtol=0, atol=1e-12)


def test_options_and_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="method is 'qr'"):
        PrincipalVector(method="qr")
    with pytest.raises(ValueError, match="width, iterations and tolerance are 0"):
        PrincipalVector(width=0)
    with pytest.raises(ValueError, match="reference has 2 entries"):
        PrincipalVector(reference=(1.0, 0.0)).variable_shape((3, 3))
    with pytest.raises(ValueError, match="k is 0"):
        EigenDecomposition(0)
    with pytest.raises(ValueError, match="only 3 eigenvectors"):
        EigenDecomposition(4).variable_shape((3, 3))
    for node in (PrincipalVector(), EigenDecomposition()):
        with pytest.raises(ValueError, match=r"shape \(3, 2\); it must be square"):
            node.variable_shape((3, 2))


def test_the_kept_decomposition_gives_the_gradient_of_the_cholesky_factor():
    node, inputs = PrincipalVector(), (symmetric(7),)
    answer = node.solve(inputs, None)
    cotangent = random_like(answer.y)
    (kept,) = node.vjp(inputs, answer.y, cotangent, answer.aux)
    value = rayleigh_quotients(inputs[0], answer.y[:, :, None])[:, 0]
    assert answer.aux is not None
    assert torch.allclose(kept, principal_vjp_symmetric(*inputs, answer.y, value, cotangent), rtol=0, atol=1e-12)
