"""The first k eigenvectors of large symmetric matrices: a block Krylov space of the inverse, shifted from above.

A few products with A give an estimate of its largest eigenvalues.  ``σI - A`` has a Cholesky factor if and only if
none is larger than σ, and those that are sought are the largest ones of its inverse, far apart from the rest: a block
Krylov space of some steps has them to rounding.  A second factor, of what is left of ``λ_k I - A`` without them, proves
that no other is larger, and serves the derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.execution.deadline import is_over

__all__ = ["Leading", "is_worth_iterating", "leading_eigenvectors", "leading_response"]

EXTRA = 3
"""Vectors of the block beyond k."""
PRODUCTS, STEPS = 40, 5
"""Products with A for the estimate, beyond 2k, and steps with the inverse before each look at the residual."""
SHIFTS, LOOKS = 4, 3
"""Shifts at most, and looks for each: a later shift is nearer to the eigenvalue, or further away if it was below it."""


class Leading(NamedTuple):
    """The k largest eigenvalues of each matrix.

    Attributes:
        values: (B, k), descending.
        vectors: (B, m, k).
        factor: (B, m, m), of Cholesky, of the matrix in :func:`deflated` for the last value.
    """

    values: Tensor
    vectors: Tensor
    factor: Tensor


def is_worth_iterating(size: int, count: int) -> bool:
    """Whether :func:`leading_eigenvectors` and its derivative take less time than a whole decomposition.

    Processor time of both passes in float64 over that of ``torch.linalg.eigh``, one thread (Wishart, Gaussian and
    geometric spectra): at order 256, 1.0 to 1.2 for one vector; at 512, 0.5 to 0.7 for one, 0.7 to 0.9 for two, 1.2 to
    1.7 for four; at 1024, 0.3 for one, 0.6 for two, 0.9 for four, 1.5 for eight.
    """
    return size >= 512 and 256 * count <= size


def leading_eigenvectors(matrix: Tensor, count: int, start: Tensor | None = None) -> Leading | None:
    """The ``count`` largest eigenvalues and their vectors of A (B, m, m), symmetric, in float64.

    Args:
        matrix: A.
        count: k.
        start: (B, m, k) vectors of a matrix nearby, or None.

    Returns:
        None if the iteration cannot prove them, or has not come to rounding, for an element: then A wants to be
        decomposed (eigenvalue k + 1 equals eigenvalue k, for one).
    """
    size = matrix.shape[-1]
    norm = matrix.abs().amax((1, 2))
    width = count + EXTRA
    if not (norm > 0).all() or 2 * width > size:
        return None
    root = (0.5 * norm.log2()).round().exp2()[:, None]  # squares of norms neither overflow nor vanish
    found = _of_order_one(matrix / root.square()[:, :, None], count, start)
    return found and Leading(root.square() * found.values, found.vectors, root[:, :, None] * found.factor)


def _of_order_one(matrix: Tensor, count: int, start: Tensor | None) -> Leading | None:
    """:func:`leading_eigenvectors` of matrices with entries of order one."""
    batch, size = matrix.shape[:2]
    width = count + EXTRA
    entries = torch.arange(1, size + 1, dtype=torch.float64, device=matrix.device)
    begin = ((entries.square() * 2**0.5).frac() - 0.5).repeat(batch, 1)[:, :, None]
    if start is not None:
        begin = start.sum(-1, keepdim=True) + 1e-3 * begin
    values, vectors = _krylov(partial(torch.matmul, matrix), begin, width, PRODUCTS + 2 * count)
    norm = torch.maximum(matrix.abs().amax((1, 2)), values.abs().amax(-1))
    rounding = torch.finfo(matrix.dtype).eps * size**0.5 * norm
    left = _residuals(matrix, values, vectors)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    wider, before = 1.0, torch.full_like(norm, torch.inf)
    for _ in range(SHIFTS):
        if is_over():
            return None
        margin = torch.maximum(0.5 * (values[:, 0] - values[:, count - 1]), 2.0 * left[:, 0])
        margin = wider * torch.maximum(margin, 1e-6 * norm)
        factor, info = linalg.cholesky_ex((values[:, 0] + margin)[:, None, None] * identity - matrix)
        if info.any():
            wider *= 8.0
            continue
        for _ in range(LOOKS):
            values, vectors = _krylov(partial(_solved, factor), vectors, width, STEPS)
            # These are vectors of the factors' product, which is A but for rounding: residuals of A itself mend them.
            values, vectors = _rotated(matrix, vectors)
            change = _solved(factor, matrix @ vectors - values[:, None] * vectors)
            values, vectors = _rotated(matrix, torch.cat([vectors, _outside(vectors, change)], -1))
            values, vectors = values[:, :width], vectors[:, :, :width]
            left = _residuals(matrix, values, vectors)
            before, worst = left[:, :count].amax(-1), before
            # Rounding errors do not become less.
            if (before <= 0.5 * rounding).all() or ((before <= 4.0 * rounding) & (before > 0.5 * worst)).all():
                return _proven(matrix, values, vectors, count, norm)
    return None


def _proven(matrix: Tensor, values: Tensor, vectors: Tensor, count: int, norm: Tensor) -> Leading | None:
    """The first ``count``, if no other eigenvalue is larger than or equal to the last of them."""
    apart = values[:, count - 1] - values[:, count]
    values, vectors = values[:, :count], vectors[:, :, :count].contiguous()
    if (apart <= 1e-6 * norm).any():
        return None
    factor, info = linalg.cholesky_ex(deflated(matrix, values, vectors, values[:, -1]))
    return None if info.any() else Leading(values, vectors, factor)


def _solved(factor: Tensor, columns: Tensor) -> Tensor:
    return torch.cholesky_solve(columns, factor)


def _outside(basis: Tensor, columns: Tensor) -> Tensor:
    """The parts of columns that are orthogonal to a basis, of length one."""
    for _ in range(2):
        columns = columns - basis @ (basis.mT @ columns)
        length = linalg.vector_norm(columns, dim=1, keepdim=True)
        columns = columns / length.clamp(min=torch.finfo(columns.dtype).tiny)
    return columns


def _rotated(matrix: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The Ritz values and vectors of A in the span of the vectors, in descending order."""
    basis = linalg.qr(vectors).Q
    projected = basis.mT @ (matrix @ basis)
    values, turn = linalg.eigh(0.5 * (projected + projected.mT))
    return values.flip(-1), basis @ turn.flip(-1)


def _residuals(matrix: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """``|A u - λ u|``, (B, k)."""
    return linalg.vector_norm(matrix @ vectors - values[:, None] * vectors, dim=1)


def deflated(matrix: Tensor, values: Tensor, vectors: Tensor, value: Tensor) -> Tensor:
    """``λI - A`` on the complement of the vectors, with the spread of A on their span, for one λ (B,) of theirs."""
    spread = (matrix.diagonal(dim1=-2, dim2=-1) - value[:, None]).abs().amax(-1) + (values[:, 0] - values[:, -1])
    weights = values + (spread - value)[:, None]
    system = (vectors * weights[:, None]) @ vectors.mT - matrix
    system.diagonal(dim1=-2, dim2=-1).add_(value[:, None])
    return system


def leading_response(matrix: Tensor, known: Leading, columns: Tensor) -> Tensor:
    """``(λ_j I - A)⁻¹ z_j`` on the complement of the vectors, (B, m, k), by one Cholesky factor for each j."""
    values, vectors, last = known
    outside = columns - vectors @ (vectors.mT @ columns)
    answers: list[Tensor] = []
    for place in range(values.shape[-1]):
        factor = last
        if place < values.shape[-1] - 1:
            factor = linalg.cholesky(deflated(matrix, values, vectors, values[:, place]))
        answers.append(torch.cholesky_solve(outside[:, :, place : place + 1], factor))
    answer = torch.cat(answers, -1)
    return answer - vectors @ (vectors.mT @ answer)


def _krylov(operator: Callable[[Tensor], Tensor], block: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """The largest Ritz values (B, count) and vectors (B, m, count) of a block Krylov space, in descending order."""
    batch, size, width = block.shape
    steps = min(steps, size // width)
    basis, images = (block.new_empty(batch, steps * width, size).mT for _ in range(2))  # columns lie in one piece
    ahead = linalg.qr(block).Q
    for step in range(steps):
        place = slice(step * width, (step + 1) * width)
        basis[:, :, place] = ahead
        images[:, :, place] = ahead = operator(ahead)
        known = basis[:, :, : (step + 1) * width]
        # Twice is enough.  A space that is invariant goes on with what rounding left, once it is of length one.
        for _ in range(2):
            ahead = linalg.qr(ahead - known @ (known.mT @ ahead)).Q
    projected = basis.mT @ images
    values, turn = linalg.eigh(0.5 * (projected + projected.mT))
    values, turn = values[:, -count:].flip(-1), turn[:, :, -count:].flip(-1)
    return values, basis @ turn
