"""Experiments of the papers in small: learning with approximate gradients, and pooling of points with outliers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lpgd

# -- Gould, Xu, Xu, Liu: learning with gradients that ignore the constraints ---------------------------------------

LEARNED: dict[str, tuple[Any, Callable[[Tensor], Tensor], int]] = {
    "projection": (lpgd.nodes.Projection("l2_sphere"), lambda x: x, 10),
    "transport": (lpgd.nodes.OptimalTransport(1.0), lambda x: x.reshape(-1, 10, 10), 100),
}


def learned(name: str, method: Any, steps: int) -> tuple[list[float], list[float]]:
    """A network of three layers learns ten pairs through a node: its losses, and cosines to the exact gradient.

    As in the paper but for the rate of AdamW, which is three times as large, for a third of the steps.
    """
    node, shaped, width = LEARNED[name]
    torch.manual_seed(0)
    inputs = torch.randn(10, 5, dtype=torch.float64)
    targets = lpgd.NodeLayer(node)(shaped(torch.randn(10, width, dtype=torch.float64))).detach()
    sizes = [5, 32, 32, width]
    layers = [torch.nn.Linear(*pair, dtype=torch.float64) for pair in itertools.pairwise(sizes)]
    network = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    layer, exact = lpgd.NodeLayer(node, method), lpgd.NodeLayer(node)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3)

    def loss(own: Any, x: Tensor) -> Tensor:
        return (width // 10 * (own(shaped(x)) - targets)).square().sum()

    losses: list[float] = []
    cosines: list[float] = []
    for step in range(steps):
        x = network(inputs)
        value = loss(layer, x)
        if step % 20 == 0:
            (one,) = torch.autograd.grad(value, x, retain_graph=True)
            (other,) = torch.autograd.grad(loss(exact, x), x, retain_graph=True)
            cosines.append(float(torch.nn.functional.cosine_similarity(one, other).mean()))
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    return losses, cosines


@pytest.mark.parametrize("name", LEARNED)
def test_networks_learn_by_gradients_that_ignore_the_constraints(name: str) -> None:
    by_exact, same = learned(name, None, 160)
    by_approximate, cosines = learned(name, lpgd.IgnoreConstraints(), 160)
    assert min(same) == pytest.approx(1.0)
    assert by_exact[-1] < 0.05 * by_exact[0]
    assert by_approximate[-1] < 0.1 * by_approximate[0]
    assert min(cosines) > 0.5


def spectrum(*values: float, size: int = 30) -> Tensor:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, len(values), len(values), dtype=torch.float64))[0]
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.mT


@pytest.mark.parametrize(("values", "sign"), [((-1.0, -2.0, -4.0, -5.0), 1.0), ((5.0, 4.0, 2.0, 1.0), -1.0)])
def test_under_a_normalisation_they_descend_or_ascend_by_the_sign_of_the_eigenvalues(
    values: tuple[float, ...], sign: float
) -> None:
    """Of the top eigenvector: Ĥ = -X where the exact system has λI - X, along all other eigenvectors.

    Their product is ``Σ_i <u_i, v>² / ((λ - λ_i) (-λ_i))`` up to a factor: positive for each element where X is
    negative definite, and negative where it is positive definite.
    """
    X = spectrum(*values).requires_grad_()
    layer = lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(1), lpgd.IgnoreConstraints(descent_test=True))
    u = layer(X)
    (u * torch.randn(30, 4, 1, dtype=torch.float64)).sum().backward()
    descent = u.info.gradients[-1].descent
    assert descent is not None
    assert (sign * descent > 0).all()


# -- Gould, Hartley, Campbell: pooling the features of points, of which a share is made outliers at test time --------

POINTS, FEATURES = 40, 16


def outlines(count: int, seed: int, outliers: float = 0.0) -> tuple[Tensor, Tensor]:
    """Points (count, 40, 2) on circles, squares and triangles, with noise, and which of the three it is."""
    generator = torch.Generator().manual_seed(seed)
    kind, along = torch.arange(count) % 3, torch.rand(count, POINTS, generator=generator)
    corners = {
        64: [(math.cos(2 * math.pi * k / 64), math.sin(2 * math.pi * k / 64)) for k in range(65)],
        4: [(1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0), (1.0, 1.0)],
        3: [(0.0, 1.2), (-1.1, -0.8), (1.1, -0.8), (0.0, 1.2)],
    }
    drawn: list[Tensor] = []
    for sides, places in corners.items():
        at, side = torch.tensor(places), (sides * along).floor()
        share = (sides * along - side)[..., None]
        drawn.append(at[side.long()] * (1 - share) + at[side.long() + 1] * share)
    points = torch.stack(drawn)[kind, torch.arange(count)]
    points = points + 0.05 * torch.randn(points.shape, generator=generator)
    away = torch.rand(count, POINTS, 1, generator=generator) < outliers
    return torch.where(away, 6 * torch.rand(points.shape, generator=generator) - 3, points), kind


def accuracies(pool: Callable[[Tensor], Tensor]) -> list[float]:
    """The share that a small PointNet with this pooling, trained without outliers, gets right, over theirs."""
    torch.manual_seed(0)
    features = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, FEATURES))
    head = torch.nn.Linear(FEATURES, 3)
    optimiser = torch.optim.Adam([*features.parameters(), *head.parameters()], 1e-2)
    for step in range(120):
        points, kind = outlines(30, 1 + step)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(head(pool(features(points).mT)), kind).backward()
        optimiser.step()
    shares: list[float] = []
    with torch.no_grad():
        for outliers in (0.0, 0.1, 0.5):
            points, kind = outlines(300, 9999, outliers)
            shares.append(float((head(pool(features(points).mT)).argmax(-1) == kind).double().mean()))
    return shares


def test_robust_pooling_holds_where_half_of_the_points_are_outliers() -> None:
    """As in the paper's tables: max pooling is lost at 50 % outliers, the truncated quadratic is not."""
    by_maximum = accuracies(lambda features: features.amax(-1))
    robust = accuracies(lpgd.NodeLayer(lpgd.nodes.RobustPooling("truncated_quadratic")))
    assert min(by_maximum[0], robust[0]) > 0.95
    assert by_maximum[1] < 0.7
    assert robust[1] > 0.9
    assert by_maximum[2] < 0.45
    assert robust[2] > 0.75
