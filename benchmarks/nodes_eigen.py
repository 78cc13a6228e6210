"""Eigenvectors and the principal vector: our nodes against autograd through ``torch.linalg.eigh`` and Jacobians."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpgd.layers.node import NodeLayer
from lpgd.nodes.eigen import EigenDecomposition
from lpgd.nodes.principal.node import PrincipalVector

from .harness import Case, Settings, Side, compare
from .results import Curve, Result, Target

__all__ = ["run"]

BATCH = 5
SIZES = (32, 64, 128, 256)


def draw_matrices(size: int, seed: int) -> Tensor:
    """Sample covariances (B, m, m) of 2m standard normal vectors."""
    root = torch.from_numpy(np.random.default_rng(seed).standard_normal((BATCH, size, 2 * size)))
    return root @ root.mT / (2 * size)


def eigen_case(size: int, count: int) -> Case:
    """The first ``count`` eigenvectors, and a loss that does not see their signs."""
    shape = (BATCH, size) if count == 1 else (BATCH, size, count)
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal(shape))

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        vectors = (points[:, :, None] if count == 1 else points).double()
        matrix = data[0][list(elements)].double()
        values = (vectors * (matrix @ vectors)).sum(-2)
        return -values.sum(-1).numpy(), float((matrix @ vectors - values[:, None] * vectors).abs().max())

    def exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
        vectors = np.linalg.eigh(data[0][list(elements)].numpy())[1][:, :, ::-1][:, :, :count].copy()
        return torch.from_numpy(vectors[:, :, 0] if count == 1 else vectors)

    what = "principal vector" if count == 1 else "eigenvectors"
    name, title = f"{what.replace(' ', '_')}{size}", f"{what}, {size}×{size}"
    draw = lambda seed: (draw_matrices(size, seed),)  # noqa: E731
    return Case(
        "nodes_eigen", name, title, BATCH, draw, lambda y: (weight * y.square()).sum(), judge, exactly, False, size
    )


def node_side(mode: str, layer: NodeLayer) -> Side:
    return Side("lpgd", mode, "exact", lambda data: (layer(*data), None))


def eigh(data: Sequence[Tensor], count: int) -> tuple[Tensor, Any]:
    """Autograd through torch's decomposition."""
    vectors = torch.linalg.eigh(data[0]).eigenvectors.flip(-1)[:, :, :count]
    return vectors[:, :, 0] if count == 1 else vectors, None


class ThroughJacobian(torch.autograd.Function):
    """The principal vector with its Jacobian (B, m, m, m) formed and multiplied by the cotangent."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        ctx.save_for_backward(values, vectors)
        return vectors[:, :, -1]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        values, vectors = ctx.saved_tensors
        y, others = vectors[:, :, -1], vectors[:, :, :-1]
        inverse = (others / (values[:, -1:, None] - values[:, None, :-1])) @ others.mT
        jacobian = inverse[:, :, :, None] * y[:, None, None, :]
        jacobian = 0.5 * (jacobian + jacobian.transpose(-1, -2))
        return torch.einsum("bi,bijk->bjk", cotangents[0], jacobian)


def principal_vectors(settings: Settings) -> Iterator[Result | Target | Curve]:
    curve = Curve("nodes_principal_vector", f"principal vector, batch {BATCH}: backward pass", "order", "seconds")
    for size in (8, 16) if settings.quick else SIZES:
        sides = [
            node_side("Lanczos (default), structured", NodeLayer(PrincipalVector())),
            node_side("simultaneous iteration, structured", NodeLayer(PrincipalVector(method="simultaneous"))),
            node_side("power iteration, structured", NodeLayer(PrincipalVector(method="power"))),
            Side("torch", "eigh, autograd", "exact", lambda data: eigh(data, 1)),
            Side("torch", "eigh, Jacobian", "exact", lambda data: (ThroughJacobian.apply(data[0]), None)),
        ]
        result = compare(eigen_case(size, 1), sides, settings)
        yield result
        for entry in result.entries:
            curve.add(entry.label, size, entry.backward)
        ours, theirs = result.backward("lpgd", "default"), result.backward("torch", "Jacobian")
        if size == SIZES[-1] and ours and theirs:
            note = f"{1e3 * ours:.2f} ms and {1e3 * theirs:.2f} ms"
            autograd = result.backward("torch", "autograd")
            note += "" if autograd is None else f"; autograd through eigh {1e3 * autograd:.2f} ms"
            yield Target(
                f"principal vector {BATCH}×{size}: Jacobian backward / structured", 15.0, None, theirs / ours, note=note
            )
    yield curve


def accuracy(settings: Settings) -> Iterator[Target]:
    """Errors of the first eigenvector in single precision: against double, and of the eigenvalue equation."""
    for size in (16,) if settings.quick else SIZES:
        matrix = torch.cat([draw_matrices(size, seed) for seed in range(4)]).float()
        double = matrix.double()
        exact = torch.from_numpy(np.linalg.eigh(double.numpy())[1][:, :, -1])

        def errors(
            vectors: Tensor, double: Tensor = double, exact: Tensor = exact
        ) -> tuple[Tensor, float]:  # of vectors (B,), and the largest |Ay - (yᵀAy)y| / yᵀAy
            y = vectors.double()
            sign = torch.where((y * exact).sum(-1, keepdim=True) < 0, -1.0, 1.0)
            product = (double @ y[..., None])[..., 0]
            value = (y * product).sum(-1, keepdim=True)
            return (sign * y - exact).norm(dim=-1), float(((product - value * y).norm(dim=-1) / value[..., 0]).max())

        ours, residual = errors(NodeLayer(PrincipalVector())(matrix))
        theirs, other = errors(eigh([matrix], 1)[0])
        note = (
            f"{ours.max():.1e} and {theirs.max():.1e}; ours is not larger for {int((ours <= theirs).sum())} of "
            f"{len(matrix)} matrices; |Ay - λy|/λ {residual:.1e} and {other:.1e} at most"
        )
        title = f"principal vector, order {size}, single precision: error / that of eigh"
        yield Target(title, 1.0, None, float(ours.max() / theirs.max()), smaller=True, note=note)


def decompositions(settings: Settings) -> Iterator[Result | Curve]:
    curve = Curve("nodes_eigen", f"all eigenvectors, batch {BATCH}: backward pass", "order", "seconds")
    for size in (8, 16) if settings.quick else SIZES:
        sides = [
            node_side("structured", NodeLayer(EigenDecomposition())),
            Side("torch", "eigh, autograd", "exact", lambda data, size=size: eigh(data, size)),
        ]
        result = compare(eigen_case(size, size), sides, settings)
        yield result
        for entry in result.entries:
            curve.add(entry.label, size, entry.backward)
    yield curve


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    yield from principal_vectors(settings)
    yield from accuracy(settings)
    yield from decompositions(settings)
