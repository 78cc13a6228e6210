"""The first k eigenvectors by iteration: against the whole decomposition."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes import EigenDecomposition
from lpgd.nodes.leading import Leading, leading_eigenvectors, leading_response
from tests.node_cases import random

SPECTRA = {
    "geometric": lambda m: 0.9 ** torch.arange(m, dtype=torch.float64),
    "semicircle": lambda m: torch.linalg.eigvalsh(random(3, m, m) + random(3, m, m).T),
    "pairs": lambda m: torch.arange(m, dtype=torch.float64).div(2).floor(),
    "all negative": lambda m: -1.0 - torch.arange(m, dtype=torch.float64),
    "of low rank": lambda m: torch.cat([torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]), torch.zeros(m - 5)]).double(),
    "tiny": lambda m: 1e-200 * torch.arange(m, dtype=torch.float64),
}


def matrices(spectrum: str, m: int, batch: int = 2) -> Tensor:
    basis = torch.linalg.qr(random(4, batch, m, m)).Q
    x = (basis * SPECTRA[spectrum](m)) @ basis.mT
    return 0.5 * (x + x.mT)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_values_vectors_and_response_are_those_of_the_decomposition(spectrum: str, count: int):
    x = matrices(spectrum, 120)
    found = leading_eigenvectors(x, count)
    if spectrum == "pairs" and count == 1:
        assert found is None  # the second eigenvalue is the same
        return
    assert found is not None
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(x))
    norm = values.abs().amax()
    own, whole = found.vectors, vectors[:, :, :count]
    torch.testing.assert_close(found.values / norm, values[:, :count] / norm, rtol=0, atol=1e-14)
    left, other = (
        torch.linalg.vector_norm(x @ v - v * w[:, None], dim=1)
        for v, w in ((own, found.values), (whole, values[:, :count]))
    )
    assert (left <= 5 * other.amax() + 1e-15 * norm).all()  # as exact as eigh
    torch.testing.assert_close(
        own.mT @ own, torch.eye(count, dtype=torch.float64).expand(2, -1, -1), rtol=0, atol=1e-14
    )
    gap = values[:, None, :count] - values[:, :, None]
    gap[:, :count] = torch.inf
    probe = random(5, 2, 120, count)
    expected = vectors @ ((vectors.mT @ probe) / gap)
    if spectrum != "pairs":  # there each value has its own basis
        response = leading_response(x, found, probe)
        assert (response - expected).norm() <= 1e-11 * expected.norm()


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_layers_by_both_methods_agree_in_value_and_gradients(largest: bool, k: int):
    x = (matrices("semicircle", 60, 3) + 0.1 * (random(6, 60, 60) - random(6, 60, 60).T)).requires_grad_()
    layers = [
        lpgd.NodeLayer(EigenDecomposition(k, largest, method=method)) for method in ("iteration", "decomposition")
    ]
    one, other = (layer(x) for layer in layers)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    weights = random(7, *one.shape)
    mine, theirs = (torch.autograd.grad((weights * y).sum(), x)[0] for y in (one, other))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    warm = layers[0](x, warm_start=one)
    torch.testing.assert_close(warm, one, rtol=0, atol=1e-12)
    rough, exact = (
        torch.autograd.grad((weights * lpgd.NodeLayer(layer.node, lpgd.IgnoreConstraints())(x)).sum(), x)[0]
        for layer in layers
    )
    torch.testing.assert_close(rough, exact, rtol=1e-9, atol=1e-9)


def test_equal_eigenvalues_are_those_of_the_decomposition():
    """Ties among the first k are left out with the same warning; one between k and k + 1 is decomposed."""
    x = matrices("pairs", 40, 1).requires_grad_()
    for k in (3, 4):
        y = lpgd.NodeLayer(EigenDecomposition(k, method="iteration"))(x)
        with pytest.warns(lpgd.LpgdWarning, match="1 of 1 matrices have no derivative"):
            torch.autograd.grad((random(8, *y.shape) * y).sum(), x)
    projections = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for method in ("iteration", "decomposition"):
            y = lpgd.NodeLayer(EigenDecomposition(4, method=method))(x)
            projections.append(torch.autograd.grad((random(9, 40, 40) * (y @ y.mT)).sum(), x)[0])
    torch.testing.assert_close(*projections, rtol=0, atol=1e-11)


def test_large_matrices_are_iterated_and_small_or_single_precision_ones_are_not():
    for size, dtype, expected in ((512, torch.float64, 3), (512, torch.float32, 2), (100, torch.float64, 2)):
        x = matrices("geometric", size, 1).to(dtype)
        answer = EigenDecomposition(2).solve((x,), None)
        assert len(answer.aux) == expected
        assert answer.y.dtype == dtype


def test_what_cannot_be_iterated_is_none():
    assert leading_eigenvectors(torch.zeros(1, 40, 40, dtype=torch.float64), 1) is None
    assert leading_eigenvectors(torch.eye(40, dtype=torch.float64)[None], 2) is None
    assert leading_eigenvectors(torch.eye(8, dtype=torch.float64)[None], 4) is None
    with pytest.raises(ValueError, match="method is 'lobpcg'"):
        EigenDecomposition(1, method="lobpcg")  # pyright: ignore[reportArgumentType]
    assert isinstance(leading_eigenvectors(matrices("geometric", 40), 2), Leading)
