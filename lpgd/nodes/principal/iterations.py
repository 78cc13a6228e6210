"""The principal eigenvector by power or simultaneous iteration, or by Lanczos' method.

[PMaF] Xu, Wang, Liu, Gould: PMaF: Deep Declarative Layers for Principal Matrix Features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.nodes.principal.lanczos import SMALL, decomposed, leading_eigenvector

__all__ = [
    "WIDTH",
    "Principal",
    "generic_matrix",
    "lanczos",
    "lanczos_or_decomposition",
    "power_iteration",
    "simultaneous_iteration",
]

WIDTH = 8
"""Vectors of a block."""
STEPS = 8
"""Products with the matrix between two looks at the residual."""


class Principal(NamedTuple):
    """An eigenvector and its eigenvalue.

    Attributes:
        vector: (B, m) y, of length one.
        value: (B,) λ.
        residual: (B,) ``|A y - λ y| / (|λ| + |σ|)``, σ the shift (absolute where both are zero).
        iterations: (B,) products of the matrix with y, or with the block.
    """

    vector: Tensor
    value: Tensor
    residual: Tensor
    iterations: Tensor


def power_iteration(
    matrix: Tensor,  # (B, m, m)
    *,
    symmetric: bool,
    reference: Tensor | None = None,  # (m,) or (B, m)
    start: Tensor | None = None,  # (B, m)
    tolerance: float,
    iterations: int,
) -> Principal:
    """The principal eigenvector by ``y ← A y / |A y|``, each element until its own convergence.

    Of a symmetric matrix it is the one of the largest eigenvalue: the iteration is with ``A + σI``, where σ from
    estimates of both ends of the spectrum makes that eigenvalue the dominant one.  Of a general matrix it is the
    one of the eigenvalue of largest magnitude, which must be real.

    It works in float64.  y points to the side of ``reference`` (eq. 17 of [PMaF]); without one to that of ``start``
    (eq. 16), and without a start to that of the vector of ones.

    Args:
        matrix: A; of a symmetric one ``½(A + Aᵀ)`` counts.
        symmetric: which of the two.
        reference: the direction for the sign.
        start: an earlier y.  A hundredth of a fixed direction is added: another eigenvector would be a fixed point.
        tolerance: of :attr:`Principal.residual`.
        iterations: at most so many products.
    """
    return _iterate(matrix, 1, symmetric, reference, start, tolerance, iterations)


def simultaneous_iteration(
    matrix: Tensor,
    *,
    symmetric: bool,
    width: int = WIDTH,
    reference: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float,
    iterations: int,
) -> Principal:
    """:func:`power_iteration` on ``width`` orthonormal vectors at once; y is their best combination (Rayleigh-Ritz).

    The error falls with the ratio of the principal eigenvalue and the one after the block's instead of the second one.
    """
    return _iterate(matrix, min(width, matrix.shape[-1]), symmetric, reference, start, tolerance, iterations)


def generic_matrix(size: int, width: int, matrix: Tensor) -> Tensor:
    """A fixed (m, width) matrix with no structure that data would share."""
    entries = torch.arange(1, size * width + 1, dtype=torch.float64, device=matrix.device)
    return (entries.square() * math.sqrt(2)).frac().reshape(width, size).mT - 0.5


def _iterate(
    matrix: Tensor,
    width: int,
    symmetric: bool,
    reference: Tensor | None,
    start: Tensor | None,
    tolerance: float,
    iterations: int,
) -> Principal:
    double = matrix.detach().double()
    double = 0.5 * (double + double.mT) if symmetric else double
    count, size, _ = double.shape
    block = generic_matrix(size, width, double).repeat(count, 1, 1)
    if start is not None:
        block[:, :, 0] = start.double() + 0.01 * block[:, :, 0]
    shift = _shift(double, block[:, :, :1]) if symmetric else double.new_zeros(count)
    vector, value = double.new_zeros(count, size), double.new_zeros(count)
    residual = torch.full_like(value, torch.inf)
    spent = torch.zeros(count, dtype=torch.int64, device=matrix.device)
    active = torch.arange(count, device=matrix.device)
    for _ in range(-(-iterations // STEPS)):
        if is_over():
            break
        matrices, basis, sigma = double[active], block[active], shift[active, None, None]
        for _ in range(STEPS):
            basis = matrices @ basis + sigma * basis
            basis = basis / linalg.vector_norm(basis, dim=-2, keepdim=True).clamp(min=1e-300)
        basis = linalg.qr(basis).Q
        product = matrices @ basis
        rotation, ritz = _ritz(basis.mT @ product, symmetric)
        leading, image = (basis @ rotation)[:, :, 0], (product @ rotation)[:, :, 0]
        length = linalg.vector_norm(image - ritz[:, None] * leading, dim=-1)
        block[active], vector[active], value[active] = basis @ rotation, leading, ritz
        scale = ritz.abs() + shift[active].abs()
        residual[active] = length / torch.where(scale == 0, 1.0, scale)
        spent[active] += STEPS
        active = active[~(residual[active] <= tolerance)]
        if not len(active):
            break
    dtype = matrix.dtype
    return Principal(_oriented(vector, reference, start).to(dtype), value.to(dtype), residual.to(dtype), spent)


def _oriented(vector: Tensor, reference: Tensor | None, start: Tensor | None) -> Tensor:
    """±y on the side of the reference; without one on that of an earlier y, [PMaF] eq. 16, and of the vector of ones.

    Where y is orthogonal to what decides, the next one does, and in the end the largest entry, which is positive.
    """
    along = vector.new_zeros(len(vector)) if reference is None else (vector * reference.to(vector)).sum(-1)
    if start is not None:
        side = start.to(vector)
        near = (vector * side).sum(-1)
        # Orthogonal to rounding: a start that is another eigenvector.
        told = near.abs() > 1e-10 * linalg.vector_norm(side, dim=-1)
        along = torch.where((along == 0) & told, near, along)
    along = torch.where(along == 0, vector.sum(-1), along)
    if not along.all():
        largest = vector.gather(-1, vector.abs().argmax(-1, keepdim=True))[:, 0]
        along = torch.where(along == 0, largest, along)
    return torch.where(along[:, None] < 0, -vector, vector)


def lanczos(
    matrix: Tensor,
    *,
    reference: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float,
    iterations: int,
) -> Principal:
    """The vector of the largest eigenvalue of ``½(A + Aᵀ)`` by :func:`~.lanczos.leading_eigenvector`.

    Small matrices are decomposed.  What cannot be proven to be the one goes to :func:`simultaneous_iteration`.
    """
    return lanczos_or_decomposition(matrix, reference, start, tolerance, iterations)[0]


def lanczos_or_decomposition(
    matrix: Tensor, reference: Tensor | None, start: Tensor | None, tolerance: float, iterations: int
) -> tuple[Principal, tuple[Tensor, Tensor] | None]:
    """The answer of :func:`lanczos`, and in float64 the whole decomposition where there is one."""
    double = matrix.detach().double()
    double = (double + double.mT).mul_(0.5)
    count, size, _ = double.shape
    spectrum = None
    if size <= SMALL:
        found, *spectrum = decomposed(double)
    else:
        begin = generic_matrix(size, 1, double)[:, 0].repeat(count, 1)
        begin = begin if start is None else start.double() + 0.01 * begin
        found = leading_eigenvector(double, begin, tolerance)
    dtype, spent = matrix.dtype, torch.full((count,), found.iterations, dtype=torch.int64, device=matrix.device)
    answer = Principal(
        _oriented(found.vector, reference, start).to(dtype), found.value.to(dtype), found.residual.to(dtype), spent
    )
    unproven = rows_where(~(found.proven & (found.residual <= tolerance)))
    if len(unproven):
        chosen_start = None if start is None else start[unproven]
        side = reference[unproven] if reference is not None and reference.ndim > 1 else reference
        again = _iterate(matrix[unproven], min(WIDTH, size), True, side, chosen_start, tolerance, iterations)
        for whole, values in zip(answer, again, strict=True):
            whole[unproven] = values
        spent[unproven] += found.iterations
    return answer, None if spectrum is None else (spectrum[0], spectrum[1])


def _ritz(projected: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """A real rotation (B, w, w) of the block whose first column gives y, and its Rayleigh quotient (B,)."""
    if projected.shape[-1] == 1:
        return torch.ones_like(projected), projected[:, 0, 0]
    if symmetric:
        values, vectors = linalg.eigh(projected)
        return vectors.flip(-1), values[:, -1]
    values, vectors = linalg.eig(projected)
    first = values.abs().argmax(-1, keepdim=True)
    leading = vectors.gather(-1, first[:, None, :].expand(-1, projected.shape[-1], -1)).real
    leading = leading / linalg.vector_norm(leading, dim=-2, keepdim=True).clamp(min=1e-300)
    # The rest of the block is the complement of y: a QR decomposition that starts with y.
    identity = torch.eye(projected.shape[-1], dtype=projected.dtype, device=projected.device)
    rotation = linalg.qr(torch.cat([leading, identity.expand_as(projected)], -1)).Q
    first_column = rotation[:, :, :1]
    return rotation, (first_column.mT @ projected @ first_column)[:, 0, 0]


def _shift(matrix: Tensor, vector: Tensor) -> Tensor:
    """(B,) σ with which the largest eigenvalue of ``A + σI`` dominates, from a few products for each end."""

    def far_end(sigma: Tensor) -> Tensor:
        ahead = vector
        for _ in range(2 * STEPS):
            ahead = ahead / linalg.vector_norm(ahead, dim=-2, keepdim=True).clamp(min=1e-300)
            ahead = matrix @ ahead - sigma[:, None, None] * ahead
        return linalg.vector_norm(ahead, dim=(-2, -1))

    radius = far_end(matrix.new_zeros(len(matrix)))
    smallest = radius - far_end(radius)
    largest = smallest + far_end(smallest)
    # The magnitude of the smallest becomes four fifths of the largest's, a margin for the errors of both estimates.
    return -(smallest + 0.8 * largest) / 1.8
