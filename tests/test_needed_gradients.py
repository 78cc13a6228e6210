"""Gradients of matrices that nobody asks for are not formed, and the others are the same to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.needed_gradients import needing_gradients_of, needs_gradient

METHODS = [lpgd.ImplicitKKT(), lpgd.LPGD(1e-4), lpgd.LPGD(0.3), lpgd.LPGD(1e-2, rho=0.1), lpgd.LPGD()]


def draw(shared: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    leading = () if shared else (3,)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    root = normal(*leading, 5, 5)
    P = root @ root.mT + torch.eye(5, dtype=torch.float64)
    return {"P": P, "q": normal(3, 5), "A": normal(*leading, 1, 5), "b": normal(3, 1), "G": normal(*leading, 4, 5)}


def gradient(data: dict[str, Tensor], method: Any, names: tuple[str, ...], **options: Any) -> list[Tensor]:
    leaves = {name: values.clone().requires_grad_(name in names) for name, values in data.items()}
    layer = lpgd.QPLayer("DAQP", gradient=method, **options)
    h = leaves["G"].detach().new_full((3, 4), 0.5)
    output = layer(leaves["P"], leaves["q"], A=leaves["A"], b=leaves["b"], G=leaves["G"], h=h)
    weights = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    return list(torch.autograd.grad((weights * output.x).sum(), [leaves[name] for name in names]))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_the_others_are_the_same(method: Any, shared: bool) -> None:
    data = draw(shared)
    every = dict(zip(data, gradient(data, method, tuple(data)), strict=True))
    for names in (("q",), ("P",), ("A",), ("q", "b"), ("P", "G")):
        for name, found in zip(names, gradient(data, method, names), strict=True):
            assert torch.equal(found, every[name])


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_nothing_is_formed_for_vectors_alone(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("the gradient of a matrix was formed")

    data = draw(shared=False)
    monkeypatch.setattr(SparsityPattern, "outer", refuse)
    gradient(data, method, ("q", "b"))
    with pytest.raises(AssertionError, match="was formed"):
        gradient(data, method, ("q", "A"))


def test_those_of_closest_feasible_problems_are_whole() -> None:
    """minimise ½|x - c|² subject to x₁ ≤ 0 and -x₁ ≤ -1, of which b alone has a gradient."""
    G, h = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), torch.tensor([0.0, -1.0]).double().requires_grad_()
    P, q = torch.eye(2, dtype=torch.float64), torch.tensor([0.3, -0.4], dtype=torch.float64)
    layer = lpgd.QPLayer("CLARABEL", on_error="relax")
    output = layer(P, q, G=G, h=h)
    (alone,) = torch.autograd.grad(output.x.sum(), h)
    rows = G.clone().requires_grad_()
    output = layer(P, q, G=rows, h=h)
    together = torch.autograd.grad(output.x.sum(), [h, rows])
    torch.testing.assert_close(alone, together[0], atol=1e-12, rtol=0.0)
    torch.testing.assert_close(alone, torch.tensor([0.5, -0.5], dtype=torch.float64), atol=1e-6, rtol=0.0)


def test_lanes_of_vmap_ask_for_what_they_need() -> None:
    data = draw(shared=True)

    def loss(q: Tensor) -> Tensor:
        h = torch.full((4,), 0.5, dtype=torch.float64)
        return lpgd.QPLayer("DAQP")(data["P"], q, G=data["G"], h=h).x.sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(data["q"])
    single = torch.stack([torch.func.grad(loss)(q) for q in data["q"]])
    torch.testing.assert_close(mapped, single, atol=1e-13, rtol=0.0)


def test_whoever_asks_directly_gets_everything() -> None:
    assert needs_gradient("A")
    with needing_gradients_of(frozenset({"q"})):
        assert needs_gradient("q")
        assert not needs_gradient("A")
        with needing_gradients_of(None):
            assert needs_gradient("A")
        assert not needs_gradient("A")
    assert needs_gradient("A")
