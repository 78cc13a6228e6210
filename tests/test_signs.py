"""The sign of eigenvectors: references of one's own, and the side of the previous answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes import PrincipalVector
from tests.node_cases import random, spectral

NODES = {
    "decomposition": PrincipalVector(),
    "power": PrincipalVector(method="power"),
    "simultaneous": PrincipalVector(method="simultaneous"),
    "general": PrincipalVector(symmetric=False),
}


def turned(angles: Tensor, m: int = 4) -> Tensor:
    """Symmetric matrices whose principal vector is ``(cos t, sin t, 0, …)``."""
    basis = torch.eye(m, dtype=torch.float64).repeat(len(angles), 1, 1)
    basis[:, 0, 0] = basis[:, 1, 1] = angles.cos()
    basis[:, 1, 0], basis[:, 0, 1] = angles.sin(), -angles.sin()
    values = torch.tensor([3.0, 1.0, 0.5, -0.5], dtype=torch.float64)
    return basis @ torch.diag(values[:m]) @ basis.mT


@pytest.mark.parametrize("name", NODES)
def test_along_a_rotation_the_sign_never_jumps(name: str):
    """Twice around: the vector comes back after each half turn of the matrix, with the other sign (eq. 16)."""
    layer = lpgd.NodeLayer(NODES[name])
    steps = torch.linspace(0.0, 4 * math.pi, 31, dtype=torch.float64)
    offsets = torch.tensor([0.1, 2.0, 4.0], dtype=torch.float64)
    first = previous = layer(turned(offsets))
    side = (first[:, :2] * torch.stack([offsets.cos(), offsets.sin()], -1)).sum(-1, keepdim=True).sign()
    for step in steps:
        y = layer(turned(step + offsets), warm_start=previous)
        assert ((y * previous).sum(-1) > 0.9).all()
        expected = torch.stack([(step + offsets).cos(), (step + offsets).sin()], -1) * side
        torch.testing.assert_close(y[:, :2], expected, rtol=0, atol=1e-10)
        previous = y
    torch.testing.assert_close(previous, first, rtol=0, atol=1e-10)


def test_the_last_result_of_the_thread_gives_the_side_too():
    layer = lpgd.NodeLayer(PrincipalVector())
    previous = layer(turned(torch.zeros(1, dtype=torch.float64)))
    for step in torch.linspace(0.0, 2 * math.pi, 33, dtype=torch.float64):
        y = layer(turned(step[None]), warm_start=True)
        assert float((y * previous).sum()) > 0.9
        previous = y


@pytest.mark.parametrize("name", NODES)
def test_each_element_has_its_own_reference(name: str):
    """Eq. 17: <y, reference> >= 0, for references of the batch, shared ones, and whatever a warm start says."""
    node = NODES[name]
    layer = lpgd.NodeLayer(PrincipalVector(node.symmetric, node.method, reference="input"))
    matrix = turned(torch.linspace(0.0, 6.0, 8, dtype=torch.float64))
    plain = lpgd.NodeLayer(node)(matrix)
    references = random(3, 8, 4)
    y = layer(matrix, references)
    assert ((y * references).sum(-1) > 0).all()
    torch.testing.assert_close((y * plain).sum(-1).abs(), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)
    opposite = layer(matrix, -references, warm_start=y)
    torch.testing.assert_close(opposite, -y, rtol=0, atol=1e-10)
    shared = layer(matrix, references[0])
    assert ((shared * references[0]).sum(-1) > 0).all()
    for place in range(8):
        torch.testing.assert_close(layer(matrix[place], references[place]), y[place], rtol=0, atol=1e-12)


def test_elements_that_iterate_on_keep_their_own_reference():
    """Above order 128 the elements that one Krylov space does not settle go to another method."""
    m = 130
    basis = torch.linalg.qr(random(0, 3, m, m)).Q
    values = torch.linspace(-1.0, 1.0, m, dtype=torch.float64).repeat(3, 1)
    values[1, -2] = 1.0 - 1e-13  # nearly double
    matrix = basis @ torch.diag_embed(values) @ basis.mT
    references = basis[:, :, -1] * torch.tensor([[1.0], [-1.0], [-1.0]], dtype=torch.float64)
    layer = lpgd.NodeLayer(PrincipalVector(reference="input", iterations=80), on_error="nan")
    y = layer.solve(matrix, references).x
    assert ((y * references).sum(-1)[[0, 2]] > 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_derivatives_with_a_reference(symmetric: bool):
    """The sign is locally constant: the gradient for references is zero, and that for matrices as without."""
    layer = lpgd.NodeLayer(PrincipalVector(symmetric, reference="input"))
    (matrix,) = spectral(3, batch=2)(0) if symmetric else (random(0, 2, 3, 3).abs() + 0.1,)
    inputs = (matrix.requires_grad_(), random(1, 2, 3).requires_grad_())
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)
    (gradient,) = torch.autograd.grad(layer(*inputs).square().sum(), inputs[1])
    assert (gradient == 0).all()
    single = layer(matrix.detach().float(), inputs[1].detach().float())
    torch.testing.assert_close(single.double(), layer(*inputs).detach(), rtol=0, atol=1e-5)


def test_references_that_do_not_fit_are_named():
    matrix = turned(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="reference has 3 entries; for this matrix it must have 4"):
        lpgd.NodeLayer(PrincipalVector(reference="input"))(matrix, matrix.new_ones(2, 3))
    with pytest.raises(ValueError, match="takes 2 inputs"):
        lpgd.NodeLayer(PrincipalVector(reference="input"))(matrix)
    with pytest.raises(ValueError, match="reference is 'ones'"):
        PrincipalVector(reference="ones")  # pyright: ignore[reportArgumentType]
