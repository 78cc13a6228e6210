"""The largest eigenvalue of symmetric matrices and its vector: Lanczos' method, and inverse iteration from above."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.execution.deadline import is_over

__all__ = ["SMALL", "Leading", "decomposed", "leading_eigenvector"]

STEPS = 28
"""Dimension of the Krylov space."""
SMALL = 128
"""Up to this order the whole decomposition takes less time."""
ROUNDS, SOLVES = 3, 4
"""Shifts at most, and solves with each; the second shift is as near to the eigenvalue as the solves before it came."""


class Leading(NamedTuple):
    """The largest eigenvalue of each matrix.

    Attributes:
        vector: (B, m) of length one.
        value: (B,).
        residual: (B,) ``|A y - λ y| / max|λ|`` (absolute for a matrix of zeros).
        proven: (B,) it is the largest one: nothing lies above the shift, as its Cholesky factor shows.
        iterations: products with the matrix, and solves.
    """

    vector: Tensor
    value: Tensor
    residual: Tensor
    proven: Tensor
    iterations: int


def decomposed(matrix: Tensor) -> tuple[Leading, Tensor, Tensor]:
    """The same by the whole decomposition, with all its values (B, m) in ascending order and vectors (B, m, m)."""
    values, vectors = linalg.eigh(matrix)
    answer, value = vectors[:, :, -1], values[:, -1]
    norm = _positive(torch.maximum(value.abs(), values[:, 0].abs()))
    left = linalg.matvec(matrix, answer) - value[:, None] * answer
    length = linalg.vector_norm(left / norm[:, None], dim=-1)
    return Leading(answer, value, length, torch.ones_like(value, dtype=torch.bool), 1), values, vectors


def leading_eigenvector(matrix: Tensor, start: Tensor, tolerance: float) -> Leading:
    """The eigenvector of the largest eigenvalue of A (B, m, m), symmetric.

    A Krylov space of ``start`` has a Ritz vector near it, however the spectrum lies about zero.  Just above its Ritz
    value, at σ, ``σI - A`` has a Cholesky factor if and only if no eigenvalue of A is larger than σ; then the inverse's
    dominant vector is the one that is sought, and inverse iteration gains the digits of ``(σ - λ₁)/(σ - λ₂)`` with
    each solve.  One factorisation in all, ``O(m³/3)``.

    Args:
        matrix: A, symmetric.
        start: (B, m), not zero.
        tolerance: of :attr:`Leading.residual`.
    """
    size = matrix.shape[-1]
    scale = _positive(matrix.abs().amax((1, 2)))
    matrix = matrix / scale[:, None, None]  # squares of norms neither overflow nor vanish
    vector, top, second, norm = _krylov(matrix, start)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    length, value = _residual(matrix, vector)
    proven, count, enough = torch.ones_like(value, dtype=torch.bool), STEPS, 0.1 * tolerance * norm
    running, matrices, going = torch.arange(len(matrix), device=matrix.device), matrix, proven
    for _ in range(ROUNDS):
        if is_over():
            proven[running] = False
            break
        above = torch.maximum(2.0 * length, 1e-3 * (top - second))[running] + 1e-12 * norm[running]
        factor, info = linalg.cholesky_ex((value[running] + above)[:, None, None] * identity - matrices)
        proven[running] &= info == 0
        for _ in range(SOLVES):
            ahead = _unit(torch.cholesky_solve(vector[running][:, :, None], factor)[:, :, 0])
            vector[running] = ahead
            length[running], value[running] = _residual(matrices, ahead)
            count += 1
            going = (proven & (length > enough))[running]
            if not going.any():
                break
        running = running[going]
        if not len(running):
            break
        matrices, second = matrix[running], torch.maximum(second, value - 1e3 * length)  # later shifts come nearer
    return Leading(vector, scale * value, length / _positive(norm), proven, count)


def _krylov(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first Ritz vector (B, m), the two largest Ritz values and the largest magnitude of one, (B,) each."""
    count, size = start.shape
    basis, images = (
        start.new_empty(count, STEPS, size),
        start.new_empty(count, STEPS, size),
    )  # one vector after the other
    ahead = _unit(start)
    tiny = None
    for step in range(STEPS):
        basis[:, step] = ahead
        images[:, step] = linalg.matvec(matrix, ahead)
        known, ahead = basis[:, : step + 1], images[:, step]
        tiny = 1e-10 * linalg.vector_norm(ahead, dim=-1, keepdim=True) if tiny is None else tiny
        ahead = _orthogonal(known, ahead)
        length = linalg.vector_norm(ahead, dim=-1, keepdim=True)
        ended = length <= tiny
        if ended.any():  # the space is invariant, and goes on with another vector
            other = torch.roll(start, step + 1, -1) + torch.roll(start.abs(), -step - 1, -1)
            ahead = _unit(torch.where(ended, _orthogonal(known, other), ahead))
        else:
            ahead = ahead / length
    basis, images = basis.mT, images.mT
    values, vectors = linalg.eigh(basis.mT @ images)
    return _unit((basis @ vectors[:, :, -1:])[:, :, 0]), values[:, -1], values[:, -2], values.abs().amax(-1)


def _orthogonal(basis: Tensor, vector: Tensor) -> Tensor:
    """The part of a vector (B, m) that is orthogonal to the rows of a basis (B, j, m), to rounding: twice is enough."""
    row, columns = vector[:, None], basis.mT
    for _ in range(2):
        row = torch.baddbmm(row, row @ columns, basis, alpha=-1.0)
    return row[:, 0]


def _residual(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """``|A y - λ y|`` and its Rayleigh quotient λ, (B,) each."""
    image = linalg.matvec(matrix, vector)
    value = (vector * image).sum(-1)
    return linalg.vector_norm(image - value[:, None] * vector, dim=-1), value


def _unit(vector: Tensor) -> Tensor:
    return vector / linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)


def _positive(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0)
