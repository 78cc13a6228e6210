"""Solvers of nodes as plain iterations in torch, for autograd: what a node's own formula for a gradient replaces."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "dual_gradient",
    "heavy_ball",
    "orthogonal_iteration",
    "power_iteration",
    "project",
    "scaled_kernels",
    "sphere_descent",
    "weighted_means",
]

Data = Sequence[Tensor]

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "pseudo_huber": lambda squares: (1.0 + squares).rsqrt(),
    "huber": lambda squares: squares.clamp(min=1.0).rsqrt(),
    "welsch": lambda squares: (-0.5 * squares).exp(),
    "truncated_quadratic": lambda squares: (squares <= 1.0).to(squares.dtype),
}
"""φ'(z)/z of squared distances, with the scale α = 1."""


def weighted_means(data: Data, penalty: str, iterations: int) -> Tensor:
    """Robust pooling of (B, N) numbers or (B, N, d) vectors: iteratively reweighted means from the median."""
    x = data[0]
    points = x if x.ndim == 3 else x[..., None]
    y = points.detach().median(1).values
    for _ in range(iterations):
        weights = WEIGHTS[penalty]((points - y[:, None]).square().sum(-1))
        y = (weights[..., None] * points).sum(1) / weights.sum(1)[:, None]
    return y if x.ndim == 3 else y[:, 0]


def project(data: Data, onto: str) -> Tensor:
    """The projection of (B, n) points outside of the set with radius 1: no iterations, but sorting for autograd."""
    x = data[0]
    if onto in ("l2_sphere", "l2_ball"):
        return x / x.norm(dim=-1, keepdim=True)
    if onto in ("linf_sphere", "linf_ball"):
        return x.clamp(-1.0, 1.0)
    return _simplex(x) if onto == "simplex" else x.sign() * _simplex(x.abs())


def _simplex(x: Tensor) -> Tensor:
    descending = x.sort(-1, descending=True).values
    excess = descending.cumsum(-1) - 1.0
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    support = (descending * count > excess).sum(-1, keepdim=True)
    return (x - excess.gather(-1, support - 1) / support).clamp(min=0.0)


def heavy_ball(data: Data, iterations: int) -> Tensor:
    """Least squares by gradient descent with momentum, both steps the best for the extreme singular values of A."""
    A, b = data
    with torch.no_grad():
        singular = torch.linalg.svdvals(A)
        largest, smallest = singular[..., :1], singular[..., -1:]
        step = 4.0 / (largest + smallest).square()
        momentum = ((largest - smallest) / (largest + smallest)).square()
    x = last = torch.zeros_like(A[..., 0, :])
    for _ in range(iterations):
        gradient = (A.mT @ (A @ x[..., None] - b[..., None]))[..., 0]
        x, last = x - step * gradient + momentum * (x - last), x
    return x


def sphere_descent(data: Data, iterations: int) -> Tensor:
    """Least squares on the sphere by tangential descent (RM of PMaF) with the step that is exact along the tangent.

    Steps are constants for autograd: derivatives through a line search do not converge as the iterates do.
    """
    A, b = data
    with torch.no_grad():
        u = torch.linalg.lstsq(A, b[..., None]).solution[..., 0]
        u = u / u.norm(dim=-1, keepdim=True)
    for _ in range(iterations):
        descent = (A.mT @ (b[..., None] - A @ u[..., None]))[..., 0]
        along = (descent * u).sum(-1, keepdim=True)
        tangent = descent - along * u
        with torch.no_grad():
            length = tangent.square().sum(-1, keepdim=True)
            curvature = (A @ tangent[..., None])[..., 0].square().sum(-1, keepdim=True) + along * length
            step = torch.where(curvature > 0, 0.9 * length / curvature, 0.0)
        u = u + step * tangent
        u = u / u.norm(dim=-1, keepdim=True)
    return u


def dual_gradient(data: Data, iterations: int) -> Tensor:
    """Total variation denoising by accelerated projected gradients of its dual: ``y = x - Dᵀz``, ``|z| ≤ λ``."""
    x, weight = data
    zero = torch.zeros_like(x[:, :1])
    bound = weight[:, None]
    z = ahead = torch.zeros_like(x[:, 1:])
    momentum = 1.0
    for _ in range(iterations):
        y = x + torch.cat([zero, ahead], -1) - torch.cat([ahead, zero], -1)
        new = torch.maximum(torch.minimum(ahead + 0.25 * (y[:, :-1] - y[:, 1:]), bound), -bound)
        following = 0.5 * (1.0 + (1.0 + 4.0 * momentum**2) ** 0.5)
        ahead = new + (momentum - 1.0) / following * (new - z)
        z, momentum = new, following
    return x + torch.cat([zero, z], -1) - torch.cat([z, zero], -1)


def scaled_kernels(data: Data, gamma: float, iterations: int) -> Tensor:
    """Entropic transport by Sinkhorn's iterations on potentials."""
    cost, rows, columns = data
    log_rows, log_columns, scaled = rows.log(), columns.log(), gamma * cost
    f, g = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(iterations):
        f = -torch.logsumexp((log_columns + g)[:, None, :] - scaled, -1)
        g = -torch.logsumexp((log_rows + f)[:, :, None] - scaled, -2)
    return ((log_rows + f)[:, :, None] + (log_columns + g)[:, None, :] - scaled).exp()


def power_iteration(data: Data, iterations: int) -> Tensor:
    """The principal vector, to the side of the vector of ones from which it starts."""
    A = data[0]
    y = A.new_ones(*A.shape[:-1]) / A.shape[-1] ** 0.5
    for _ in range(iterations):
        y = (A @ y[..., None])[..., 0]
        y = y / y.norm(dim=-1, keepdim=True)
    return y * torch.where(y.sum(-1, keepdim=True) < 0, -1.0, 1.0)


def orthogonal_iteration(data: Data, count: int, iterations: int) -> Tensor:
    """The first eigenvectors by products and QR factorisations, up to signs."""
    X = data[0]
    start = torch.randn(X.shape[-1], count, generator=torch.Generator().manual_seed(0), dtype=X.dtype)
    U = torch.linalg.qr(start).Q.expand(len(X), -1, -1)
    for _ in range(iterations):
        U = torch.linalg.qr(X @ U).Q
    return U
