"""Quadratic functions on the unit sphere: the global minimum by the secular equation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.execution.deadline import is_over

__all__ = ["SphereSolution", "half_quadratic", "normalised", "product", "solve_secular"]

TIED = 4.0
"""Eigenvalues that differ by so many rounding errors of the matrix are one: of A with fewer rows than columns, zero."""


class SphereSolution(NamedTuple):
    """Solutions of a batch.

    Attributes:
        u: (B, n), of length 1.
        iterations: (B,) whole numbers.
        converged: (B,) whether the tolerance was reached.
        free: (B,) whether the solution is one of a continuum; None where this is not known.
    """

    u: Tensor
    iterations: Tensor
    converged: Tensor
    free: Tensor | None = None


def solve_secular(
    gram: Tensor, vector: Tensor, start: Tensor | None = None, max_iterations: int = 60
) -> SphereSolution:
    """The global minimum of ``½uᵀGu - cᵀu`` subject to |u| = 1, by one eigendecomposition.

    u is a global minimum iff ``(G - μI)u = c`` with ``μ <= λ_min(G)``.  In the eigenvectors of G, with gaps
    ``d_i = λ_i - λ_min`` and ``δ = λ_min - μ``, this is the secular equation

        Σ c_i² / (d_i + δ)² = 1,   δ >= 0.

    The gaps, not μ, are computed with, so a δ that is tiny beside λ_min has all its digits.  Newton's method on
    ``1/|p(δ)| - 1``, p_i = c_i / (d_i + δ), which is concave and increasing, climbs to the root from
    ``max_i |c_i| - d_i``, where one term alone is 1 already.

    The hard case: c has no part in the eigenspace of λ_min and |p(0)| < 1.  Then δ = 0, and a vector of this
    eigenspace fills the length up: with both signs if it has one dimension, else from a continuum.  The one nearest to
    ``start`` is chosen, and without a start the sign that makes the vector's largest entry positive.

    Args:
        gram: G, symmetric positive semidefinite, (B, n, n), or (1, n, n) where all elements share it.
        vector: c, (B, n).
        start: (B, n) or None.
        max_iterations: of Newton's method; about 6 are used.

    Returns:
        The solutions; ``iterations`` are those of Newton's method.
    """
    fine = gram.sum((1, 2)).isfinite()  # an overflow of one element must not stop eigh for all
    if not fine.all():
        gram = torch.where(fine[:, None, None], gram, torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    values, vectors = linalg.eigh(gram)
    rounding = torch.finfo(gram.dtype).eps * gram.shape[-1]
    values = values.expand_as(vector)
    gaps, largest = values - values[:, :1], values.abs().amax(-1, keepdim=True)
    lowest = gaps <= TIED * rounding * largest
    c = product(vectors.mT, vector)
    # Nothing but rounding: the nearer the other eigenvalues, the more the eigenspace turns by it.
    turn = (largest / gaps.masked_fill(lowest, torch.inf).amin(-1, keepdim=True))[:, 0].clamp(min=1.0)
    absent = (c * lowest).norm(dim=-1) <= rounding * turn * vector.norm(dim=-1)
    gaps, c = gaps.masked_fill(lowest, 0.0), c.masked_fill(lowest & absent[:, None], 0.0)

    delta = (c.abs() - gaps).amax(-1).clamp_min(0.0)
    iterations = torch.zeros(len(vector), dtype=torch.int64, device=gram.device)
    active = _secular_norm(c, gaps, delta)[0].norm(dim=-1) > 1.0
    for _ in range(max_iterations):
        if not active.any() or is_over():
            break
        p, denominator = _secular_norm(c, gaps, delta)
        length = p.norm(dim=-1)
        slope = (p.square() / denominator).sum(-1) / length.pow(3)
        moved = delta + (1.0 - 1.0 / length) / slope
        iterations += active
        better = active & (moved > delta * (1.0 + 4.0 * torch.finfo(gram.dtype).eps))
        delta = torch.where(better, moved, delta)
        active = better
    p, _ = _secular_norm(c, gaps, delta)
    missing = (1.0 - p.square().sum(-1)).clamp_min(0.0).sqrt()
    hard = absent & (delta == 0.0) & (missing > 0.0)
    if hard.any():
        p = torch.where(hard[:, None], p + missing[:, None] * _lowest_direction(vectors, lowest, start), p)
    u = product(vectors, p)
    u = torch.where(fine[:, None], normalised(u), torch.nan)
    return SphereSolution(u, iterations, ~active, hard & (lowest.sum(-1) > 1))


def _secular_norm(c: Tensor, gaps: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """The components p_i, zero where c_i is, and their denominators, there 1."""
    denominator = torch.where(c == 0.0, 1.0, gaps + delta[:, None])
    return c / denominator, denominator


def _lowest_direction(vectors: Tensor, lowest: Tensor, start: Tensor | None) -> Tensor:
    """Coordinates of a unit vector in the eigenspace of the smallest eigenvalue."""
    first = vectors[:, :, 0].expand_as(lowest)
    largest = first.gather(1, first.abs().argmax(-1, keepdim=True))[:, 0]
    chosen = torch.zeros_like(first)
    chosen[:, 0] = torch.where(largest < 0.0, -1.0, 1.0)
    if start is None:
        return chosen
    near = product(vectors.mT, start) * lowest
    length = near.norm(dim=-1, keepdim=True)
    usable = length > torch.finfo(first.dtype).eps ** 0.5
    return torch.where(usable, near / torch.where(usable, length, 1.0), chosen)


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices (B or 1, m, n) times vectors (B, n)."""
    return vector @ matrix[0].mT if matrix.shape[0] == 1 else linalg.matvec(matrix, vector)


def normalised(vector: Tensor) -> Tensor:
    """Scaled to length 1; a zero vector becomes the first unit vector."""
    length = vector.norm(dim=-1, keepdim=True)
    unit = torch.zeros_like(vector)
    unit[..., 0] = 1.0
    return torch.where(length > 0.0, vector / torch.where(length > 0.0, length, 1.0), unit)


def half_quadratic(u: Tensor, pushed: Tensor, vector: Tensor) -> Tensor:
    """(B,) ``½uᵀGu - cᵀu`` from the product Gu."""
    return (u * (0.5 * pushed - vector)).sum(-1)
