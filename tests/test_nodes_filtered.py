"""Every node on batches of which nothing, or one element, is left once what has no solution is taken out."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.gradients import ClosedForm, GradientMethod, IgnoreConstraints
from tests.node_cases import ALL, NodeCase, random

METHODS: dict[str, Callable[[], GradientMethod]] = {
    "closed form": ClosedForm,
    "implicit": lpgd.ImplicitKKT,
    "LPGD": lpgd.LPGD,
    "augmented LPGD, one side": lambda: lpgd.LPGD(tau=1e-3, rho=0.1, envelope="lower"),
    "constraints ignored": IgnoreConstraints,
}


def _spoilt(inputs: tuple[Tensor, ...], rows: list[int]) -> tuple[Tensor, ...]:
    """The inputs with NaN in the first one's rows."""
    first = inputs[0].detach().clone()
    first[rows] = torch.nan
    return (first.requires_grad_(), *(part.detach().clone().requires_grad_() for part in inputs[1:]))


def _gradients(layer: lpgd.NodeLayer, inputs: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(*inputs)
        weights = random(7, *y.shape[1:])
        return y, torch.autograd.grad((y * weights).nan_to_num().sum(), inputs)


@ALL
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("on_error", ["nan", "warn"])
def test_one_good_element_among_invalid_ones_is_what_it_is_alone(case: NodeCase, method: str, on_error: str):
    inputs = case.inputs()
    size = len(inputs[0])
    layer = lpgd.NodeLayer(case.node, METHODS[method](), on_error=on_error)  # pyright: ignore[reportArgumentType]
    y, gradients = _gradients(layer, _spoilt(inputs, list(range(1, size))))
    alone = tuple(part.detach()[:1].clone().requires_grad_() for part in inputs)
    expected, own = _gradients(lpgd.NodeLayer(case.node, METHODS[method]()), alone)
    assert [status.name for status in y.info.statuses] == ["SOLVED"] + ["INVALID_DATA"] * (size - 1)
    torch.testing.assert_close(y[:1], expected, atol=1e-9, rtol=1e-9)
    for whole, part in zip(gradients, own, strict=True):
        torch.testing.assert_close(whole[:1], part, atol=1e-6, rtol=1e-5)
        assert not whole[1:].any()


@ALL
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("on_error", ["nan", "warn"])
def test_nothing_but_invalid_elements_is_nan_with_a_zero_gradient(case: NodeCase, method: str, on_error: str):
    inputs = case.inputs()
    layer = lpgd.NodeLayer(case.node, METHODS[method](), on_error=on_error)  # pyright: ignore[reportArgumentType]
    y, gradients = _gradients(layer, _spoilt(inputs, list(range(len(inputs[0])))))
    assert y.isnan().all()
    assert {status.name for status in y.info.statuses} == {"INVALID_DATA"}
    assert not any(part.any() for part in gradients)


@ALL
def test_nothing_but_invalid_elements_raises_by_default(case: NodeCase):
    inputs = case.inputs()
    with pytest.raises(lpgd.SolverError) as caught:
        lpgd.NodeLayer(case.node)(*_spoilt(inputs, list(range(len(inputs[0])))))
    assert caught.value.indices == tuple(range(len(inputs[0])))


@ALL
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("on_error", ["nan", "warn", "raise"])
def test_a_batch_without_elements(case: NodeCase, method: str, on_error: str):
    inputs = tuple(part.detach()[:0].clone().requires_grad_() for part in case.inputs())
    layer = lpgd.NodeLayer(case.node, METHODS[method](), on_error=on_error)  # pyright: ignore[reportArgumentType]
    y, gradients = _gradients(layer, inputs)
    assert y.shape[0] == 0
    assert [part.shape for part in gradients] == [part.shape for part in inputs]


INFEASIBLE: dict[str, tuple[lpgd.nodes.base.BaseNode, Callable[[], tuple[Tensor, ...]]]] = {
    "transport": (
        lpgd.nodes.OptimalTransport(),
        lambda: (random(0, 3, 2, 3), torch.full((3, 2), 0.5, dtype=torch.float64), -random(1, 3, 3).abs()),
    ),
    "simplex of negative size": (
        lpgd.nodes.Projection("simplex", None),
        lambda: (random(0, 3, 4), torch.full((3,), -1.0, dtype=torch.float64)),
    ),
    "contradiction": (
        lpgd.Node(lambda x, y: (y - x).square().sum(), inequality=lambda x, y: torch.stack([y.sum() - 1, 2 - y.sum()])),
        lambda: (random(0, 3, 2),),
    ),
}


@pytest.mark.parametrize("kind", INFEASIBLE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("on_error", ["nan", "warn"])
def test_nothing_but_infeasible_elements(kind: str, method: str, on_error: str):
    node, make = INFEASIBLE[kind]
    inputs = tuple(part.requires_grad_() for part in make())
    layer = lpgd.NodeLayer(node, METHODS[method](), on_error=on_error)  # pyright: ignore[reportArgumentType]
    y, gradients = _gradients(layer, inputs)
    assert not any(status.usable for status in y.info.statuses)
    assert on_error == "warn" or y.isnan().all()
    assert not any(part.any() for part in gradients)
    with pytest.raises(lpgd.SolverError):
        lpgd.NodeLayer(node, METHODS[method]())(*inputs)
