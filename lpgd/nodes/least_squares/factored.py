"""Least squares with independent columns: one QR factorisation for both passes, and the derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg

__all__ = [
    "Regression",
    "differentiate_least_squares",
    "factor",
    "inverse_product",
    "normal_product",
    "outer_products",
    "solve_least_squares",
    "stacked",
    "unfold",
]


class Regression(NamedTuple):
    """The data of ``½Σ_i w_i |D_i y - b_i|² + ½Σ_j p_j |y_j|²``, each with B rows, or one for the whole batch.

    Attributes:
        design: D, (B, m, n).
        targets: b, (B, m, k); always B rows.
        weights: w, (B, m), or None for ones.
        penalty: p, (B, n), or None for zeros.
        free: how many columns have no penalty: the last one of an intercept, or none.
    """

    design: Tensor
    targets: Tensor
    weights: Tensor | None = None
    penalty: Tensor | None = None
    free: int = 0

    @property
    def penalised(self) -> int:
        """How many columns have a penalty, where there is one."""
        return self.design.shape[-1] - self.free


def solve_least_squares(data: Regression, linear: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise by the QR factorisation of ``[√w D; √p]`` with the targets as further columns, so that Q is not needed.

    Args:
        data: the problems.
        linear: (B, n, k), c of a further term ``-<c, y>``, or None.

    Returns:
        y (B, n, k); the triangular factor R (B or 1, n, n), ``RᵀR = DᵀWD + diag(p)``; and (B or 1,) whether it has full
        rank (other elements' R and y mean nothing).
    """
    n, batch = data.design.shape[-1], data.targets.shape[0]
    left, right = stacked(data)
    shared = left.shape[0] == 1 < batch
    triangle = linalg.qr(torch.cat([left, right], -1), mode="r").R[:, :n]
    R, projected = triangle[..., :n], triangle[..., n:]
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    rounding = torch.finfo(R.dtype).eps * max(left.shape[-2:])
    regular = diagonal.amin(-1) > rounding * diagonal.amax(-1)
    if not regular.all():
        R = torch.where(regular[:, None, None], R, torch.eye(n, dtype=R.dtype, device=R.device))
    if linear is not None:
        extra = fold(linear) if shared else linear
        projected = projected + linalg.solve_triangular(R.mT, extra, upper=False)
    y = linalg.solve_triangular(R, projected, upper=True)
    return unfold(y, batch) if shared else y, R, regular


def stacked(data: Regression) -> tuple[Tensor, Tensor]:
    """``[√w D; √p I]`` and ``[√w b; 0]``: the targets as further columns of one matrix where all else is shared."""
    design, targets, weights, penalty = data[:4]
    n = design.shape[-1]
    batch = targets.shape[0]
    shared = all(tensor is None or tensor.shape[0] == 1 for tensor in (design, weights, penalty))
    right = fold(targets) if shared else targets
    left = design
    if weights is not None:
        root = weights.sqrt()[..., None]
        left, right = root * left, root * right
    count = 1 if shared else batch
    left = left.expand(count, *left.shape[1:])
    if penalty is not None:
        left = torch.cat([left, penalty.sqrt().diag_embed().expand(count, n, n)], -2)
        right = torch.nn.functional.pad(right, (0, 0, 0, n))
    return left, right


def differentiate_least_squares(
    data: Regression, y: Tensor, R: Tensor, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The vector-Jacobian product: two triangular solves with the forward's R for each column.

    With ``s = R⁻¹R⁻ᵀv`` and the residual ``r = b - Dy``:

        dD = W(r sᵀ - (Ds) yᵀ),   db = W Ds,   dw = r ∘ Ds,   dp = -y ∘ s   (summed over columns)

    Args:
        data: the problems.
        y: their solutions, (B, n, k).
        R: what :func:`solve_least_squares` left, (B or 1, n, n).
        cotangent: v, (B, n, k).

    Returns:
        Gradients for the design (B, m, n), targets (B, m, k), weights (B, m) and penalty (B, n).
    """
    return outer_products(data, y, inverse_product(R, cotangent))


def outer_products(data: Regression, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients from the response s (B, n, k)."""
    design, targets, weights = data[:3]
    moved, residual = design @ s, targets - design @ y
    for_weights = (residual * moved).sum(-1)
    if weights is not None:
        moved, residual = weights[..., None] * moved, weights[..., None] * residual
    for_design = torch.baddbmm(residual @ s.mT, moved, y.mT, alpha=-1)
    return for_design, moved, for_weights, -(y * s).sum(-1)


@torch.no_grad()
def factor(data: Regression) -> Tensor:
    """R of :func:`solve_least_squares`, as a constant."""
    return solve_least_squares(data)[1]


def inverse_product(R: Tensor, columns: Tensor) -> Tensor:
    """``R⁻¹R⁻ᵀ v``, (B, n, k)."""
    shared = R.shape[0] == 1
    right = fold(columns) if shared else columns
    s = linalg.solve_triangular(R, linalg.solve_triangular(R.mT, right, upper=False), upper=True)
    return unfold(s, columns.shape[0]) if shared else s


def normal_product(data: Regression, s: Tensor) -> Tensor:
    """``(DᵀWD + diag(p)) s``, (B, n, k)."""
    design, _, weights, penalty = data[:4]
    moved = design @ s
    product = design.mT @ (moved if weights is None else weights[..., None] * moved)
    return product if penalty is None else product + penalty[..., None] * s


def fold(columns: Tensor) -> Tensor:
    """(B, m, k) as one matrix (1, m, B k)."""
    return columns.transpose(0, 1).flatten(1)[None]


def unfold(columns: Tensor, batch: int) -> Tensor:
    """One matrix (1, m, B k) as (B, m, k)."""
    return columns[0].unflatten(1, (batch, -1)).transpose(0, 1)
