"""Functions of symmetric matrices, with the derivative that holds at equal eigenvalues as elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lpgd import linalg

__all__ = ["matrix_function"]


def matrix_function(matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``F(X) = Σ_i f(λ_i) u_i u_iᵀ`` of ``½(X + Xᵀ)``, (*batch, m, m): logarithms, powers, whitening.

    ``dF = U (Γ ∘ (Uᵀ dX U)) Uᵀ`` with ``Γ_ij = (f(λ_i) - f(λ_j)) / (λ_i - λ_j)``, and ``f'`` where eigenvalues are
    equal or nearly so (Daleckii and Krein), which products of eigenvectors and functions of eigenvalues that are
    differentiated apart cannot know.

    Args:
        matrix: X, (*batch, m, m), float32 or float64.
        function: f, by differentiable torch operations on each entry of a tensor of eigenvalues.

    Raises:
        ValueError: the matrix is not square, the function changes the shape, or it uses tensors that require a
            gradient, which would get none.
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; it must be square, (*batch, m, m).")
    answer: Tensor = _MatrixFunction.apply(0.5 * (matrix + matrix.mT), function)
    return answer


class _MatrixFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        # Rows that are not finite, which eigh refuses for the whole batch, are NaN in the answer.
        finite = torch.isfinite(matrix).all(-1).all(-1)[..., None, None]
        unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        values, vectors = linalg.eigh(torch.where(finite, matrix, unit))
        with torch.enable_grad():
            if _value(function, values).requires_grad:
                raise ValueError("the function uses a tensor that requires a gradient, and would get none: detach it.")
            known = values.detach().requires_grad_()
            result = _value(function, known)
            slopes = torch.zeros_like(values)
            if result.requires_grad:
                (slopes,) = torch.autograd.grad(result.sum(), known)
        result = result.detach()
        ctx.save_for_backward(values, vectors, result, slopes, finite)
        return torch.where(finite, (vectors * result[..., None, :]) @ vectors.mT, torch.nan)

    @staticmethod
    @once_differentiable
    # The decorator hides the names of the parameters.
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (cotangent,) = cotangents
        values, vectors, result, slopes, finite = ctx.saved_tensors
        gap = values[..., :, None] - values[..., None, :]
        size = torch.maximum(values.abs()[..., :, None], values.abs()[..., None, :])
        # There the rounding of the quotient is as large as the error of the mean of both slopes.
        near = gap.abs() <= torch.finfo(values.dtype).eps ** (1 / 3) * size
        mean = 0.5 * (slopes[..., :, None] + slopes[..., None, :])
        quotient = (result[..., :, None] - result[..., None, :]) / torch.where(near, 1, gap)
        inside = torch.where(near, mean, quotient) * (vectors.mT @ torch.where(finite, cotangent, 0) @ vectors)
        gradient = vectors @ inside @ vectors.mT
        return torch.where(finite, 0.5 * (gradient + gradient.mT), 0), None


def _value(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    result = function(values)
    if not isinstance(result, Tensor) or result.shape != values.shape:
        found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"the function made {found} of eigenvalues {tuple(values.shape)}; it must keep the shape.")
    return result
