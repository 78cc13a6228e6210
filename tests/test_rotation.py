"""The nearest rotation: against SciPy, closed forms, and where it is not unique."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from scipy.spatial.transform import Rotation as Reference
from torch import Tensor

import lpgd
from lpgd.nodes import Rotation
from tests.node_cases import random


def rotations(seed: int, batch: int, size: int) -> Tensor:
    basis = torch.linalg.qr(random(seed, batch, size, size)).Q
    basis[:, :, 0] *= torch.linalg.det(basis)[:, None]
    return basis


def test_points_are_turned_as_by_scipy():
    source, target, weights = random(0, 5, 9, 3), random(1, 5, 9, 3), random(2, 5, 9).abs()
    found = lpgd.NodeLayer(Rotation(points=True, weighted=True))(source, target, weights)
    for index in range(5):
        expected, _ = Reference.align_vectors(target[index].numpy(), source[index].numpy(), weights[index].numpy())
        torch.testing.assert_close(found[index], torch.as_tensor(expected.as_matrix()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_known_rotations_come_back_and_reflections_never_do(size: int):
    R = rotations(3, 4, size)
    source = random(4, 4, 12, size)
    torch.testing.assert_close(lpgd.NodeLayer(Rotation(points=True))(source, source @ R.mT), R, rtol=0, atol=1e-12)
    y = lpgd.NodeLayer(Rotation())(random(5, 20, size, size))
    torch.testing.assert_close(torch.linalg.det(y), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(y.mT @ y, torch.eye(size, dtype=torch.float64).expand_as(y), rtol=0, atol=1e-12)


def test_no_rotation_is_nearer():
    matrix = random(6, 10, 3, 3)
    y = lpgd.NodeLayer(Rotation())(matrix)
    others = rotations(7, 2000, 3)
    ours = (y * matrix).sum((-2, -1))
    assert (torch.einsum("oij,bij->bo", others, matrix) <= ours[:, None] + 1e-12).all()


def test_the_derivative_at_the_identity_is_the_skew_part():
    """``R(I + E) = I + ½(E - Eᵀ)`` to first order: all singular values are equal."""
    x, weights = torch.eye(3, dtype=torch.float64).requires_grad_(), random(8, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad((weights * lpgd.NodeLayer(Rotation())(x)).sum(), x)
    torch.testing.assert_close(gradient, 0.5 * (weights - weights.T), rtol=0, atol=1e-14)


def test_in_the_plane_it_is_an_angle():
    """The angle is atan2(m21 - m12, m11 + m22)."""
    x = random(9, 6, 2, 2).requires_grad_()
    angle = torch.atan2(x[:, 1, 0] - x[:, 0, 1], x[:, 0, 0] + x[:, 1, 1])
    expected = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(6, 2, 2)
    y, weights = lpgd.NodeLayer(Rotation())(x), random(10, 6, 2, 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)

    def derivatives(value: Tensor) -> tuple[Tensor, Tensor]:
        (first,) = torch.autograd.grad((weights * value).sum(), x, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    for own, other in zip(derivatives(y), derivatives(expected), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "values", [(1.0, 0.0, 0.0), (3.0, 1.0, -1.0), (0.0, 0.0, 0.0)], ids=["rank one", "reflection", "zero"]
)
def test_where_it_is_not_unique_the_gradient_warns_and_keeps_what_is_known(values: tuple[float, ...]):
    left, right = rotations(11, 2, 3)
    known = torch.tensor([[2.0, 1.0, 0.5], values], dtype=torch.float64)
    matrix = (left @ torch.diag_embed(known) @ right.T).requires_grad_()
    layer = lpgd.NodeLayer(Rotation())
    y = layer(matrix)
    assert y.info.statuses == (lpgd.Status.SOLVED,) * 2
    best = (y * matrix).sum((-2, -1))
    torch.testing.assert_close(best, known.sum(-1), rtol=0, atol=1e-12)  # a minimiser all the same
    with pytest.warns(lpgd.LpgdWarning, match="rotations of 1 of 2 elements are not unique"):
        (gradient,) = torch.autograd.grad((random(12, 3, 3) * y).sum(), matrix)
    assert gradient.isfinite().all()
    with pytest.warns(lpgd.LpgdWarning):
        (slope,) = torch.autograd.grad((random(12, 3, 3) * layer(matrix)).sum(), matrix, create_graph=True)
    with pytest.raises(RuntimeError, match=r"elements \[1\] are not unique"):
        slope.square().sum().backward()


def test_a_loss_that_no_rotation_changes_does_not_warn():
    """``<M, R>`` at the best R moves with M alone, by R, whichever of them it is."""
    matrix = torch.diag(torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)).requires_grad_()
    y = lpgd.NodeLayer(Rotation())(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gradient,) = torch.autograd.grad((y * matrix).sum(), matrix)
    torch.testing.assert_close(gradient, y.detach(), rtol=0, atol=1e-14)


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="points=True"):
        Rotation(weighted=True)
    with pytest.raises(ValueError, match="must be square"):
        Rotation().variable_shape((3, 2))
    with pytest.raises(ValueError, match=r"source has shape \(4, 3\) and target \(5, 3\)"):
        Rotation(points=True).variable_shape((4, 3), (5, 3))
    with pytest.raises(ValueError, match="weights has 5 entries for 4 points"):
        Rotation(points=True, weighted=True).variable_shape((4, 3), (4, 3), (5,))


@pytest.mark.parametrize("unit", [2.0**-27, 2.0**-13, 2.0**13, 2.0**27])
@pytest.mark.parametrize("envelope", ["average", "lower", "upper"])
def test_small_steps_are_right_in_all_units(envelope: Any, unit: float) -> None:
    """R does not change with the length of source or target: gradients are those of ClosedForm over the unit."""
    node = lpgd.nodes.Rotation(points=True)
    source, target, weight = random(0, 2, 6, 3), random(1, 2, 6, 3), random(2, 2, 3, 3)

    def gradients(method: lpgd.LPGD | lpgd.ClosedForm, *units: float) -> list[Tensor]:
        data = [(size * one).requires_grad_() for size, one in zip(units, (source, target), strict=True)]
        (lpgd.NodeLayer(node, method)(*data) * weight).sum().backward()
        return [size * torch.as_tensor(one.grad) for size, one in zip(units, data, strict=True)]

    expected = gradients(lpgd.ClosedForm(), 1.0, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for units in ((unit, 1.0), (1.0, unit)):
            found = gradients(lpgd.LPGD(envelope=envelope), *units)
            for one, right in zip(found, expected, strict=True):
                torch.testing.assert_close(one, right, rtol=0, atol=1e-4 * float(right.abs().max()))
