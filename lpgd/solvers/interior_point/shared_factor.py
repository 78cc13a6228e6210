"""Conjugate gradients with one factor for the whole batch, for normal equations that are alike in all elements.

With a shared A the elements' matrices ``A D_i Aᵀ`` differ in their diagonals alone.  In the first iterations of the
interior-point method, and where few variables are at their bounds, they are close to that of the mean diagonal: a few
iterations, each of two products with A for the whole batch, then cost less than forming and factorising each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.execution.memo import TensorMemo
from lpgd.solvers.interior_point.box_program import BoxProgram

__all__ = ["SharedSolver", "inverse_of", "shared_inverse", "single"]

ACCURACY = 1e-4
"""The residual, relative to that of the start in the norm of the factor, at which the iterations end."""
WORTH = 10
"""There are at most one iteration for so many rows: a factorisation of its own then costs an element less."""
LEAST_DIAGONAL = 1e-12
"""Relative regularisation of the shared factor."""

_memo = TensorMemo()


def single(A: Tensor) -> Tensor:
    """(m, n) a shared A (1, m, n) in single precision."""
    return _memo(A, "single", lambda: A[0].float())


def shared_inverse(A: Tensor) -> Tensor | None:
    """(m, m) the inverse of ``A Aᵀ`` in single precision, worked out once; None where rows depend on each other."""
    return _memo(A, "inverse", lambda: inverse_of(A[0] @ A[0].mT))


def inverse_of(matrix: Tensor) -> Tensor | None:
    """The inverse of a positive definite matrix (m, m), in single precision; None where its factor breaks down."""
    matrix.diagonal().mul_(1.0 + LEAST_DIAGONAL)
    factor, info = linalg.cholesky_ex(matrix[None])
    if bool(info.any()) or not bool(torch.isfinite(factor).all()):
        return None
    return torch.cholesky_inverse(factor[0]).float()


class SharedSolver:
    """Approximate solutions of ``A D_i Aᵀ y = r``, in single precision.

    Args:
        program: shares its A, all rows of which are equalities.
        diagonal: (B, n) D, nonnegative, with largest entries of 1.
        near_identity: D is one nearly everywhere: the inverse of ``A Aᵀ`` is near enough, and known.

    Attributes:
        failed: whether the shared factor broke down.
        lost: whether conjugate gradients did not converge for some element; later answers then mean nothing.
    """

    def __init__(self, program: BoxProgram, diagonal: Tensor, near_identity: bool = False) -> None:
        A = program.A[0]
        self.A: Tensor = single(program.A)
        self.diagonal = diagonal.float()
        inverse = shared_inverse(program.A) if near_identity else inverse_of((A * diagonal.double().mean(0)) @ A.mT)
        self.failed = self.lost = inverse is None
        self.inverse: Tensor = self.A.new_zeros(0) if inverse is None else inverse

    def solve(self, right: Tensor) -> Tensor:
        """For right-hand sides (B, count, m)."""
        answer = torch.zeros_like(right)
        if self.lost:
            return answer
        diagonal, residual = self.diagonal[:, None], right
        direction = correction = residual @ self.inverse
        size = start = _dot(residual, correction)
        most = max(self.A.shape[0] // WORTH, 1)
        for iteration in range(1, most + 1):
            product = ((direction @ self.A) * diagonal) @ self.A.mT
            curvature = _dot(direction, product)
            length = torch.where(curvature > 0, size / curvature, 0.0)
            answer = torch.addcmul(answer, length, direction)
            residual = torch.addcmul(residual, length, product, value=-1.0)
            correction = residual @ self.inverse
            before, size = size, _dot(residual, correction)
            if bool((size <= ACCURACY**2 * start).all()):
                return answer
            if 2 * iteration >= most and not bool((size <= ACCURACY * start).all()):
                break  # half of the iterations gave less than half of the digits
            direction = torch.addcmul(correction, torch.where(before > 0, size / before, 0.0), direction)
        self.lost = True
        return answer


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
