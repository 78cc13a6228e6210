"""MINRES for a batch of symmetric systems that are known by products only (Paige and Saunders 1975)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["minres"]


def minres(product: Callable[[Tensor], Tensor], right: Tensor) -> tuple[Tensor, Tensor]:
    """Least-residual answers of ``K u = right`` for symmetric K, definite or not.

    Args:
        product: u ↦ K u, (B, N) to (B, N), each row on its own.
        right: (B, N).

    Returns:
        (B, N) answers, and (B,) whether the relative residual reached the 0.6th power of the precision.
    """
    eps = torch.finfo(right.dtype).eps
    size = right.norm(dim=-1, keepdim=True)
    beta, tiny = size, torch.finfo(right.dtype).tiny
    previous = torch.zeros_like(right)
    vector = right / beta.clamp(min=tiny)
    answer, d, d_old = torch.zeros_like(right), torch.zeros_like(right), torch.zeros_like(right)
    cosine, sine = -torch.ones_like(size), torch.zeros_like(size)
    delta_bar, epsilon, residual = torch.zeros_like(size), torch.zeros_like(size), size
    off = torch.zeros_like(size)
    running = size > 0
    for _ in range(10 * right.shape[-1] + 20):
        if not running.any():
            break
        # Lanczos: the next row of the tridiagonal matrix.
        image = product(vector) - off * previous
        alpha = (image * vector).sum(-1, keepdim=True)
        image = image - alpha * vector
        beta = image.norm(dim=-1, keepdim=True)
        # The two rotations before act on it, and the next one makes it triangular.
        delta = cosine * delta_bar + sine * alpha
        gamma_bar = sine * delta_bar - cosine * alpha
        epsilon_next, delta_next = sine * beta, -cosine * beta
        gamma = (gamma_bar.square() + beta.square()).sqrt().clamp(min=tiny)
        cosine, sine = gamma_bar / gamma, beta / gamma
        d, d_old = (vector - delta * d - epsilon * d_old) / gamma, d
        # A zero row of the triangle is a direction that the matrix does not see.
        seen = running & (gamma > 10 * eps * (alpha.abs() + beta + off))
        answer = answer + torch.where(seen, cosine * residual * d, 0)
        residual = torch.where(seen, sine * residual, residual)
        previous, vector = vector, image / beta.clamp(min=tiny)
        off, epsilon, delta_bar = beta, epsilon_next, delta_next
        running = seen & (residual.abs() > 4 * eps * size) & (beta > eps * eps * size)
    left = (right - product(answer)).norm(dim=-1)
    return answer, left <= eps**0.6 * size[:, 0].clamp(min=tiny)
