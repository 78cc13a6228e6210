"""Least squares, the sphere and total variation as layers: every gradient method agrees on every node."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.layers.node import NodeLayer
from lpgd.problems.node import BaseNode
from lpgd.solvers.nodes.least_squares import LeastSquares
from lpgd.solvers.nodes.sphere import SphereLeastSquares
from lpgd.solvers.nodes.total_variation import TotalVariationDenoising


class Row(NamedTuple):
    name: str
    node: BaseNode
    shapes: tuple[tuple[int, ...], ...]
    positive: tuple[str, ...] = ()


ROWS = [
    Row("least squares", LeastSquares(), ((7, 3), (7,))),
    Row("all options", LeastSquares(True, True, True, True), ((7, 3), (7, 2), (7,), ()), ("weights", "ridge")),
    Row("wide ridge", LeastSquares(ridge=True), ((3, 5), (3,), ()), ("ridge",)),
    Row("sphere", SphereLeastSquares(), ((6, 4), (6,))),
    Row("sphere, descent", SphereLeastSquares(solver="descent", max_iterations=1000, tolerance=1e-13), ((8, 3), (8,))),
    Row("total variation", TotalVariationDenoising(), ((12,), ()), ("weight",)),
]
BATCH = 4
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def inputs_of(row: Row, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name, shape in zip(row.node.input_names, row.shapes, strict=True):
        part = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)
        found.append((part.abs() + 0.2 if name in row.positive else part).to(dtype).requires_grad_())
    return found


def gradients(row: Row, method: lpgd.LPGD | lpgd.ImplicitKKT | None, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    y = NodeLayer(row.node, gradient=method)(*inputs)
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, inputs, cotangent.to(y.dtype))


@rows
def test_the_structured_gradient_is_the_generic_one(row):
    inputs = inputs_of(row)
    for own, generic in zip(gradients(row, None, inputs), gradients(row, lpgd.ImplicitKKT(), inputs), strict=True):
        torch.testing.assert_close(own, generic, rtol=1e-10, atol=1e-10)


@rows
@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_lpgd_with_a_small_step_is_implicit_differentiation(row, rho):
    inputs = inputs_of(row)
    small = gradients(row, lpgd.LPGD(tau=1e-5, rho=rho), inputs)
    for own, exact in zip(small, gradients(row, lpgd.ImplicitKKT(rho=rho), inputs), strict=True):
        torch.testing.assert_close(own, exact, rtol=1e-5, atol=1e-6)


@rows
def test_gradcheck_of_the_layer(row):
    layer = NodeLayer(row.node)
    assert torch.autograd.gradcheck(layer, inputs_of(row, seed=2), eps=1e-6, atol=1e-6)


@rows
def test_single_precision_stays_single(row):
    singles = inputs_of(row, torch.float32)
    doubles = [part.detach().double().requires_grad_() for part in singles]
    for own, exact in zip(gradients(row, None, singles), gradients(row, None, doubles), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), exact, rtol=2e-3, atol=2e-3)


@rows
def test_batched_is_one_by_one_in_any_batch_shape(row):
    inputs = inputs_of(row)
    layer = NodeLayer(row.node)
    y = layer(*inputs)
    folded = layer(*(part.unflatten(0, (2, 2)) for part in inputs))
    torch.testing.assert_close(folded.flatten(0, 1), y, rtol=0, atol=1e-12)
    for index in range(BATCH):
        torch.testing.assert_close(layer(*(part[index] for part in inputs)), y[index], rtol=0, atol=1e-12)


def test_failed_elements_are_nan_alone():
    signal = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64).repeat(2, 1).requires_grad_()
    weight = torch.tensor([0.5, -0.5], dtype=torch.float64)
    y = NodeLayer(TotalVariationDenoising(), on_error="nan")(signal, weight)
    assert y[0].tolist() == [0.5, 1.0, 2.5]
    assert torch.isnan(y[1]).all()
    with pytest.raises(lpgd.SolverError, match="element 1 of 2: INVALID_DATA"):
        NodeLayer(TotalVariationDenoising())(signal, weight)


def test_the_pass_through_is_an_approximation_by_its_name():
    signal = torch.tensor([0.0, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(0.5, dtype=torch.float64)
    cotangent = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for pass_through, expected in ((False, [0.5, 0.5, 0.0]), (True, [1.0, 0.0, 0.0])):
        y = NodeLayer(TotalVariationDenoising(pass_through=pass_through))(signal, weight)
        assert torch.autograd.grad(y, signal, cotangent)[0].tolist() == expected
