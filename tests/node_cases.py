"""Declarative nodes with inputs at regular points, for the tests that every node must pass: one row a node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes.base import BaseNode
from lpgd.nodes.pooling.node import Penalty
from lpgd.nodes.principal.node import IterationMethod
from lpgd.nodes.projection import ProjectionSet
from lpgd.nodes.spectral.node import FunctionName

__all__ = ["NODES", "NodeCase", "definite", "positive", "random", "spectral"]


@dataclass(frozen=True)
class NodeCase:
    """A node and its inputs in float64.

    Args:
        node: the node.
        make: from a seed to its inputs, all with one batch dimension.
        generic: generic solvers find the same solution from the node's own start.
    """

    node: BaseNode
    make: Callable[[int], tuple[Tensor, ...]]
    generic: bool = True

    def inputs(self, seed: int = 0, requires_grad: bool = True) -> tuple[Tensor, ...]:
        return tuple(tensor.requires_grad_(requires_grad) for tensor in self.make(seed))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_radius(seed: int) -> tuple[Tensor, ...]:
    return random(seed, 5, 4), torch.tensor([0.5, 1.0, 2.0, 3.0, 9.0], dtype=torch.float64)


def _with_outliers(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(seed: int) -> tuple[Tensor, ...]:
        x = random(seed, *shape)
        x[:, :2] += 8.0
        return (x,)

    return make


def _with_scales(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    def make(seed: int) -> tuple[Tensor, ...]:
        return *_with_outliers(*shape)(seed), torch.tensor([1.2, 1.5, 1.8, 2.1], dtype=torch.float64)

    return make


def _regression(*shapes: tuple[int, ...], positive: int = 0) -> Callable[[int], tuple[Tensor, ...]]:
    """Normal inputs of these shapes, four elements; the last ``positive`` ones are positive."""

    def make(seed: int) -> tuple[Tensor, ...]:
        drawn = [random(seed + place, 4, *shape) for place, shape in enumerate(shapes)]
        first = len(shapes) - positive
        return tuple(part.abs() + 0.2 if place >= first else part for place, part in enumerate(drawn))

    return make


class TransportOfLogits(lpgd.nodes.OptimalTransport):
    """Marginals by a softmax: whatever finite differences move, there is a plan."""

    def arrange(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        cost, rows, columns = inputs
        assert cost is not None
        assert rows is not None
        assert columns is not None
        return cost, rows.softmax(-1), columns.softmax(-1)


class DependentColumns(lpgd.nodes.LeastSquares):
    """A of rank two, whatever finite differences move."""

    def arrange(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        A, *rest = inputs
        mixing = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, -2.0], [0.5, 0.5, -0.5]], dtype=A.dtype, device=A.device)
        return A @ mixing, *rest


def _transport(m: int, n: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda seed: (random(seed, 3, m, n), random(seed + 1, 3, m), random(seed + 2, 3, n))


def spectral(m: int, batch: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    """Matrices with eigenvalues about one apart, of both signs, none of equal magnitude, and a skew part."""

    def make(seed: int) -> tuple[Tensor, ...]:
        basis = torch.linalg.qr(random(seed, batch, m, m)).Q
        values = torch.arange(m, dtype=torch.float64) - 0.3 * m + 0.3 + 0.1 * random(seed, m).tanh()
        skew = 0.2 * random(seed + 1, batch, m, m)
        return (basis @ torch.diag_embed(values.expand(batch, m)) @ basis.mT + skew - skew.mT,)

    return make


def definite(*values: float, batch: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    """Symmetric matrices with these eigenvalues."""

    def make(seed: int) -> tuple[Tensor, ...]:
        basis = torch.linalg.qr(random(seed, batch, len(values), len(values))).Q
        return (basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.mT,)

    return make


def positive(m: int, batch: int = 3) -> Callable[[int], tuple[Tensor, ...]]:
    """Matrices whose eigenvalue of largest magnitude is real (Perron)."""
    return lambda seed: (random(seed, batch, m, m).abs() + 0.1,)


def pendulum(x: Tensor, u: Tensor, length: Tensor, target: Tensor) -> Tensor:
    return torch.stack([x[0] + 0.1 * x[1], x[1] + 0.1 * (u[0] - 9.81 / length * torch.sin(x[0]))])


def effort(x: Tensor, u: Tensor, length: Tensor, target: Tensor) -> Tensor:
    return 0.01 * u.square().sum() + 0.1 * (1 - torch.cos(x[0] - target)) + 0.01 * x[1] ** 2


def miss(x: Tensor, length: Tensor, target: Tensor) -> Tensor:
    return 2.0 * (x[0] - target) ** 2 + 0.2 * x[1] ** 2


def _swings(seed: int) -> tuple[Tensor, ...]:
    length = torch.tensor([0.8, 1.0, 1.3], dtype=torch.float64)
    return 0.2 * random(seed, 3, 2), length, torch.tensor([0.5, 1.0, -0.7], dtype=torch.float64)


def _views(*parts: str) -> Callable[[int], tuple[Tensor, ...]]:
    """Six points before a camera, seen with errors, as image points (of a camera) or bearings, and weights."""

    def make(seed: int) -> tuple[Tensor, ...]:
        world, size = random(seed, 2, 6, 3), 2
        turn, _ = lpgd.nodes.PerspectivePose.split(random(seed + 1, size, 6))
        p = world @ turn.mT + torch.tensor([0.2, -0.3, 5.0], dtype=torch.float64)
        inputs: list[Tensor] = []
        if "bearings" in parts:
            b = p + 0.1 * random(seed + 2, size, 6, 3)
            inputs += [b / b.norm(dim=-1, keepdim=True), world]
        else:
            camera = torch.tensor([[1.5, 0.1, 0.3], [0.0, 1.2, -0.2], [0.0, 0.0, 1.0]], dtype=torch.float64)
            camera = camera.expand(size, 3, 3).clone() if "camera" in parts else torch.eye(3, dtype=torch.float64)
            image = p @ camera.mT
            inputs += [image[..., :2] / image[..., 2:] + 0.02 * random(seed + 2, size, 6, 2), world]
            inputs += [camera] if "camera" in parts else []
        if "pairs" in parts:
            inputs.append(20.0 * (8.0 * torch.eye(6, dtype=torch.float64) + random(seed + 3, size, 6, 6)).softmax(-1))
        else:
            inputs.append(10.0 + 10.0 * random(seed + 3, size, 6).abs())
        return tuple(inputs)

    return make


NODES = {
    "pose": NodeCase(lpgd.nodes.PerspectivePose(), _views(), generic=False),
    "pose of pixels": NodeCase(lpgd.nodes.PerspectivePose(camera=True), _views("camera"), generic=False),
    "pose of bearings": NodeCase(lpgd.nodes.PerspectivePose("bearings"), _views("bearings"), generic=False),
    "pose of all pairs": NodeCase(lpgd.nodes.PerspectivePose(all_pairs=True), _views("pairs"), generic=False),
    "pose of all pairs of bearings": NodeCase(
        lpgd.nodes.PerspectivePose("bearings", all_pairs=True), _views("bearings", "pairs"), generic=False
    ),
    "control": NodeCase(lpgd.nodes.OptimalControl(pendulum, effort, miss, horizon=5, controls=1, ndims=0), _swings),
    "control, controls and states in bounds": NodeCase(
        lpgd.nodes.OptimalControl(
            pendulum,
            effort,
            miss,
            horizon=6,
            controls=1,
            control_bounds=lambda length, target: (-4.0 * length, 5.0),
            state_bounds=((-torch.inf, -1.2), (torch.inf, 1.2)),
            ndims=0,
        ),
        _swings,
    ),
    "transport, wide": NodeCase(TransportOfLogits(gamma=2.0), _transport(3, 4)),
    "transport, tall": NodeCase(TransportOfLogits(gamma=2.0), _transport(4, 3)),
    "transport, uniform": NodeCase(lpgd.nodes.OptimalTransport(gamma=2.0), lambda seed: _transport(3, 4)(seed)[:1]),
    "all eigenvectors": NodeCase(lpgd.nodes.EigenDecomposition(), spectral(4), generic=False),
    "largest eigenvectors": NodeCase(lpgd.nodes.EigenDecomposition(2), spectral(5), generic=False),
    "smallest eigenvectors": NodeCase(lpgd.nodes.EigenDecomposition(2, largest=False), spectral(5), generic=False),
    "largest eigenvectors by iteration": NodeCase(
        lpgd.nodes.EigenDecomposition(1, method="iteration"), spectral(8, batch=2), generic=False
    ),
    "smallest eigenvectors by iteration": NodeCase(
        lpgd.nodes.EigenDecomposition(1, largest=False, method="iteration"), spectral(8, batch=2), generic=False
    ),
    **{
        f"principal vector, {method} iteration, {'symmetric' if symmetric else 'general'}": NodeCase(
            lpgd.nodes.PrincipalVector(symmetric, method), (spectral if symmetric else positive)(5), generic=False
        )
        for method in get_args(IterationMethod)
        for symmetric in (True, False)
        if symmetric or method != "lanczos"
    },
    "principal vector with references": NodeCase(
        lpgd.nodes.PrincipalVector(reference="input"),
        lambda seed: (*spectral(5)(seed), random(seed + 3, 3, 5)),
        generic=False,
    ),
    **{
        f"spectral function {name}{place}": NodeCase(lpgd.nodes.SpectralFunction(name), definite(*values))
        for name in get_args(FunctionName)
        for place, values in (("", (0.5, 1.1, 2.0)), (", equal eigenvalues", (2.0, 2.0, 2.0, 1.0)))
    },
    "spectral function of one's own": NodeCase(lpgd.nodes.SpectralFunction(torch.tanh), spectral(4)),
    "rotation": NodeCase(lpgd.nodes.Rotation(), lambda seed: (random(seed, 4, 3, 3),), generic=False),
    "rotation, equal singular values": NodeCase(
        lpgd.nodes.Rotation(), lambda seed: (2.0 * torch.linalg.qr(random(seed, 2, 3, 3)).Q,), generic=False
    ),
    "rotation of weighted points": NodeCase(
        lpgd.nodes.Rotation(points=True, weighted=True), _regression((6, 3), (6, 3), (6,), positive=1), generic=False
    ),
    "least squares": NodeCase(lpgd.nodes.LeastSquares(), _regression((7, 3), (7,))),
    "least squares, weighted ridge with bias and columns": NodeCase(
        lpgd.nodes.LeastSquares(weighted=True, ridge=True, bias=True, columns=True),
        _regression((7, 3), (7, 2), (7,), (), positive=2),
    ),
    "least squares, wide": NodeCase(lpgd.nodes.LeastSquares(ridge=True), _regression((3, 5), (3,), (), positive=1)),
    "least squares of minimum norm, wide": NodeCase(
        lpgd.nodes.LeastSquares(weighted=True, bias=True, columns=True, minimum_norm=True),
        _regression((3, 5), (3, 2), (3,), positive=1),
    ),
    "least squares of minimum norm, dependent columns": NodeCase(
        DependentColumns(minimum_norm=True, rank_tolerance=1e-5), _regression((7, 3), (7,))
    ),
    "least squares of minimum norm, ridge": NodeCase(
        lpgd.nodes.LeastSquares(ridge=True, minimum_norm=True), _regression((3, 5), (3,), (), positive=1)
    ),
    "least squares on the sphere": NodeCase(lpgd.nodes.SphereLeastSquares(), _regression((6, 4), (6,))),
    "least squares on the sphere, descent": NodeCase(
        lpgd.nodes.SphereLeastSquares(solver="descent", max_iterations=1000, tolerance=1e-14),
        _regression((8, 3), (8,)),
    ),
    "least squares on the sphere, published descent": NodeCase(
        lpgd.nodes.SphereLeastSquares(lpgd.nodes.LessDescent(refine=True)), _regression((8, 3), (8,))
    ),
    "total variation": NodeCase(
        lpgd.nodes.TotalVariationDenoising(), _regression((12,), (), positive=1), generic=False
    ),
    "total variation, a weight for each pair": NodeCase(
        lpgd.nodes.TotalVariationDenoising(per_pair=True), _regression((12,), (11,), positive=1), generic=False
    ),
    **{
        f"projection {onto}": NodeCase(lpgd.nodes.Projection(onto, None), _with_radius)
        for onto in get_args(ProjectionSet)
    },
    **{
        f"pooling {penalty}": NodeCase(
            lpgd.nodes.RobustPooling(penalty, alpha=1.5), _with_outliers(4, 9), generic=False
        )
        for penalty in get_args(Penalty)
    },
    **{
        f"vector pooling {penalty}": NodeCase(
            lpgd.nodes.RobustPooling(penalty, alpha=1.5, dim=-2, vector_dim=-1), _with_outliers(4, 9, 2), generic=False
        )
        for penalty in get_args(Penalty)
    },
    **{
        f"pooling {penalty}, alpha an input": NodeCase(
            lpgd.nodes.RobustPooling(penalty, "input"), _with_scales(4, 9), generic=False
        )
        for penalty in get_args(Penalty)
        if penalty != "quadratic"
    },
    **{
        f"vector pooling {penalty}, alpha an input": NodeCase(
            lpgd.nodes.RobustPooling(penalty, "input", dim=-2, vector_dim=-1), _with_scales(4, 9, 2), generic=False
        )
        for penalty in ("huber", "welsch")
    },
    "unconstrained": NodeCase(
        lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum() + 0.1 * (y**4).sum()), lambda seed: (random(seed, 3, 4),)
    ),
    "sphere": NodeCase(
        lpgd.Node(lambda x, y: 0.5 * (y - x).square().sum(), equality=lambda x, y: y.square().sum() - 1.0),
        lambda seed: (random(seed, 3, 4),),
    ),
    "quadratic on a simplex": NodeCase(
        lpgd.Node(
            lambda x, A, y: 0.5 * (A @ y).square().sum() - x @ y,
            equality=lambda x, A, y: y.sum() - 1.0,
            inequality=lambda x, A, y: -y,
            ndims=(1, 2),
        ),
        lambda seed: (random(seed, 2, 3), random(seed + 1, 2, 3, 3)),
    ),
}
"""Every node; a new one is a row."""

ALL = pytest.mark.parametrize("case", NODES.values(), ids=NODES.keys())
