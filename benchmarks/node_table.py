"""Every node with a formula of its own for the backward pass, beside what it replaces: one row a node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from lpgd.nodes.base import BaseNode
from lpgd.nodes.eigen import EigenDecomposition
from lpgd.nodes.least_squares.node import LeastSquares
from lpgd.nodes.pooling.node import Penalty, RobustPooling
from lpgd.nodes.principal.node import PrincipalVector
from lpgd.nodes.projection import Projection, ProjectionSet
from lpgd.nodes.sphere.node import SphereLeastSquares
from lpgd.nodes.total_variation import TotalVariationDenoising
from lpgd.nodes.transport.node import OptimalTransport

from . import unrolled

__all__ = ["TABLE", "Row"]


@dataclass(frozen=True, eq=False)
class Row:
    """One node.

    Attributes:
        name: for people.
        node: with its closed form.
        draw: size and seed to float64 data.
        unrolled: data to a solution, for autograd.
        how: the iterations that are unrolled, for people; as many as bring the solution near a solver's tolerance
            where that is possible.
        batch: of the data.
        size: what the sizes count.
        sizes: in ascending order.
        generic: up to this size the generic implicit gradient takes part: its work grows with the cube of the
            variables.
        signs: the solution has no sign: losses are of its squares.
        comparable: the part of gradients that a problem determines.
        iterated: autograd goes back through iterations; otherwise there is a formula, or all but the last iteration are
            constants to it, and nothing that would have to be faster.
    """

    name: str
    node: BaseNode
    draw: Callable[[int, int], tuple[Tensor, ...]]
    unrolled: Callable[[Sequence[Tensor]], Tensor]
    how: str
    batch: int
    size: str
    sizes: tuple[int, ...]
    generic: int
    signs: bool = False
    comparable: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple
    iterated: bool = True


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def with_outliers(batch: int, size: int, seed: int, dimension: int = 0) -> tuple[Tensor, ...]:
    """Normal points, a tenth of which lie eight away."""
    shape = (batch, size, dimension) if dimension else (batch, size)
    outlying = np.random.default_rng(seed + 1000).random((batch, size)) < 0.1
    return (normal(seed, *shape) + 8.0 * torch.from_numpy(outlying[..., None] if dimension else outlying),)


def regression(batch: int, n: int, seed: int) -> tuple[Tensor, ...]:
    return normal(seed, batch, 2 * n, n), normal(seed + 1000, batch, 2 * n)


def steps(size: int, seed: int) -> tuple[Tensor, ...]:
    """Steps of 25 points with noise, and a weight."""
    signal = torch.sign(torch.sin((torch.arange(size, dtype=torch.float64) + 0.5) * (torch.pi / 25)))
    return (signal + 0.3 * normal(seed, size))[None], torch.tensor([0.5], dtype=torch.float64)


def transport(size: int, seed: int) -> tuple[Tensor, ...]:
    """A uniform cost in [0, 1], marginals from a softmax."""
    generator = np.random.default_rng(seed)
    cost, rows, columns = (torch.from_numpy(generator.uniform(size=(1, size, k))) for k in (size, 1, 1))
    return cost, rows[..., 0].softmax(-1), columns[..., 0].softmax(-1)


def symmetric(batch: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """Four eigenvalues 1, 0.7, 0.49, 0.34 that stand out, the others uniform in [0, 0.24]."""
    vectors = torch.linalg.qr(normal(seed, batch, size, size)).Q
    spectrum = 0.24 * np.random.default_rng(seed + 1000).random((batch, size))
    spectrum[:, :4] = 0.7 ** np.arange(4)
    return ((vectors * torch.from_numpy(spectrum)[:, None, :]) @ vectors.mT,)


def general(batch: int, size: int, seed: int) -> tuple[Tensor, ...]:
    """An eigenvalue 1 and others uniform in [-0.6, 0.6], with eigenvectors near orthogonal ones."""
    vectors = torch.linalg.qr(normal(seed, batch, size, size)).Q
    vectors = vectors + 0.3 / size**0.5 * normal(seed + 1000, batch, size, size)
    spectrum = 1.2 * np.random.default_rng(seed + 2000).random((batch, 1, size)) - 0.6
    spectrum[..., 0] = 1.0
    return (torch.linalg.solve(vectors, vectors * torch.from_numpy(spectrum), left=False),)


def of_equal_sums(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of a cost and two marginals, for changes that keep the sums of the marginals equal."""
    on_cost, on_rows, on_columns = gradients
    excess = (on_rows.sum(-1) - on_columns.sum(-1)) / (on_rows.shape[-1] + on_columns.shape[-1])
    return on_cost, on_rows - excess[:, None], on_columns + excess[:, None]


def of_symmetric(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    return (0.5 * (gradients[0] + gradients[0].mT),)


def _pooling(penalty: Penalty, dimension: int = 0, iterations: int = 40) -> Row:
    vectors = f", vectors ({dimension})" if dimension else ""
    return Row(
        f"robust pooling, {penalty.replace('_', ' ')}{vectors}",
        RobustPooling(penalty, dim=-2, vector_dim=-1) if dimension else RobustPooling(penalty),
        lambda size, seed: with_outliers(8, size, seed, dimension),
        partial(unrolled.weighted_means, penalty=penalty, iterations=iterations),
        f"{iterations} weighted means" + (", whose weights are constants" if penalty == "truncated_quadratic" else ""),
        8,
        "points",
        (100, 1000, 10_000),
        10_000,
        iterated=penalty != "truncated_quadratic",
    )


def _projection(onto: ProjectionSet) -> Row:
    return Row(
        f"projection, {onto.replace('_', ' ').replace('l1', 'L1').replace('l2', 'L2').replace('linf', 'L∞')}",
        Projection(onto),
        lambda size, seed: (3.0 * normal(seed, 16, size),),
        partial(unrolled.project, onto=onto),
        "torch's autograd of the projection itself",
        16,
        "coordinates",
        (32, 128, 1024, 8192),
        128,
        iterated=False,
    )


TABLE: tuple[Row, ...] = (
    *(_pooling(penalty) for penalty in get_args(Penalty) if penalty != "quadratic"),
    _pooling("pseudo_huber", 3),
    *(_projection(onto) for onto in get_args(ProjectionSet)),
    Row(
        "least squares",
        LeastSquares(),
        lambda size, seed: regression(16, size, seed),
        partial(unrolled.heavy_ball, iterations=80),
        "80 steps of gradient descent with momentum",
        16,
        "columns",
        (8, 32, 64, 128),
        64,
    ),
    Row(
        "least squares on the sphere",
        SphereLeastSquares(),
        lambda size, seed: regression(16, size, seed),
        partial(unrolled.sphere_descent, iterations=100),
        "100 steps of tangential descent",
        16,
        "columns",
        (8, 32, 64, 128),
        64,
    ),
    Row(
        "total variation denoising",
        TotalVariationDenoising(),
        steps,
        partial(unrolled.dual_gradient, iterations=100),
        "100 accelerated gradient steps of the dual",
        1,
        "points",
        (30, 100, 1000, 10_000, 100_000),
        100,
    ),
    Row(
        "optimal transport, γ = 20",
        OptimalTransport(gamma=20.0),
        transport,
        partial(unrolled.scaled_kernels, gamma=20.0, iterations=100),
        "100 iterations of Sinkhorn",
        1,
        "rows and columns",
        (10, 30, 100, 300),
        30,
        comparable=of_equal_sums,
    ),
    Row(
        "eigen decomposition, first 4",
        EigenDecomposition(k=4),
        lambda size, seed: symmetric(5, size, seed),
        partial(unrolled.orthogonal_iteration, count=4, iterations=60),
        "60 orthogonal iterations",
        5,
        "order",
        (16, 32, 64, 128, 256),
        64,
        True,
        of_symmetric,
    ),
    Row(
        "principal vector, symmetric",
        PrincipalVector(),
        lambda size, seed: symmetric(5, size, seed),
        partial(unrolled.power_iteration, iterations=60),
        "60 power iterations",
        5,
        "order",
        (32, 64, 128, 256),
        128,
        comparable=of_symmetric,
    ),
    Row(
        "principal vector, general",
        PrincipalVector(symmetric=False),
        lambda size, seed: general(5, size, seed),
        partial(unrolled.power_iteration, iterations=60),
        "60 power iterations",
        5,
        "order",
        (32, 64, 128, 256),
        128,
    ),
)
