"""Least squares with columns that depend on each other: the solution of minimum norm, and its derivative.

    minimise ½|y|²  subject to  G y = c,   G = DᵀWD + diag(p),  c = DᵀWb

With a basis V of the range of G, ``G V = V diag(σ²)``, the constraint is ``σ⁻²Vᵀ(Gy - c) = 0``, whose Jacobian Vᵀ has
full rank.  While the rank stays, V may be held fixed: the problem has the same solution for all data nearby.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.nodes.least_squares.factored import Regression, normal_product, stacked, unfold

__all__ = [
    "Basis",
    "differentiate_minimum_norm",
    "differentiate_minimum_norm_again",
    "minimum_norm_basis",
    "minimum_norm_constraint",
    "solve_minimum_norm",
]


class Basis(NamedTuple):
    """The right singular vectors of ``[√w D; √p I]``, with one row where it is shared.

    Attributes:
        values: σ, (B, p), zero where they are zero to rounding.
        vectors: V, (B, n, p), zero there too.
    """

    values: Tensor
    vectors: Tensor

    def inside(self, columns: Tensor) -> Tensor:
        """``Vᵀ z``, (B, p, k)."""
        return self.vectors.mT @ columns

    def outside(self, columns: Tensor) -> Tensor:
        """``(I - V Vᵀ) z``, (B, n, k)."""
        return columns - self.vectors @ self.inside(columns)

    def power(self, columns: Tensor, exponent: float) -> Tensor:
        """``V σ^e Vᵀ z``, (B, n, k): with -2, the pseudo-inverse of G."""
        known = torch.where(self.values > 0.0, self.values, 1.0) ** exponent
        return self.vectors @ (known[..., None] * self.inside(columns))


def solve_minimum_norm(data: Regression, tolerance: float | None) -> tuple[Tensor, Basis]:
    """The solutions y (B, n, k), and the basis; singular values up to ``tolerance`` times the largest count as zero.

    None is the larger side of the matrix in rounding errors.
    """
    left, right = stacked(data)
    n, batch = left.shape[-1], data.targets.shape[0]
    shared = left.shape[0] == 1 < batch
    triangle = linalg.qr(torch.cat([left, right], -1), mode="r").R[:, :n]
    outer, values, inner = linalg.svd(triangle[..., :n], full_matrices=False)
    limit = max(left.shape[-2:]) * torch.finfo(left.dtype).eps if tolerance is None else tolerance
    present = values > limit * values.amax(-1, keepdim=True)
    basis = Basis(torch.where(present, values, 0.0), inner.mT * present[:, None, :])
    along = (outer.mT @ triangle[..., n:]) / torch.where(present, values, 1.0)[..., None]
    y = basis.vectors @ along
    return unfold(y, batch) if shared else y, basis


@torch.no_grad()
def minimum_norm_basis(data: Regression, tolerance: float | None) -> Basis:
    """The basis of :func:`solve_minimum_norm`, as a constant."""
    fixed = data._replace(
        design=data.design.detach(),
        targets=data.targets[..., :1].detach(),
        weights=None if data.weights is None else data.weights.detach(),
        penalty=None if data.penalty is None else data.penalty.detach(),
    )
    return solve_minimum_norm(fixed, tolerance)[1]


def minimum_norm_constraint(data: Regression, y: Tensor, basis: Basis) -> Tensor:
    """``σ⁻²Vᵀ(Gy - c)``, (B, p, k): zero, with all its derivatives, in rows whose σ is zero."""
    design, targets, weights = data[:3]
    moment = design.mT @ (targets if weights is None else weights[..., None] * targets)
    scale = torch.where(basis.values > 0.0, basis.values, 1.0) ** -2
    return scale[..., None] * basis.inside(normal_product(data, y) - moment)


def differentiate_minimum_norm(data: Regression, y: Tensor, basis: Basis, cotangent: Tensor) -> tuple[Tensor, ...]:
    """The vector-Jacobian product (Golub and Pereyra 1973), for changes that keep the rank.

    With ``s = G⁺v``, ``u = G⁺y``, ``q = (I - GG⁺)v`` and the residual ``r = b - Dy``, the gradient of the number
    ``<s, c - Gy> + <q, Gu>`` with s, u, q and y held fixed:

        dD = W(r sᵀ - (Ds) yᵀ + (Du) qᵀ),   db = W Ds,   dw = r ∘ Ds + Dq ∘ Du,   dp = q ∘ u - s ∘ y

    Args:
        data: the problems.
        y: their solutions, (B, n, k).
        basis: V and σ.
        cotangent: v, (B, n, k).

    Returns:
        Gradients for the design (B, m, n), targets (B, m, k), weights (B, m) and penalty (B, n).
    """
    vectors = (basis.power(cotangent, -2.0), basis.power(y, -2.0), basis.outside(cotangent))
    return _products(data, y, *vectors)


def differentiate_minimum_norm_again(
    data: Regression, y: Tensor, basis: Basis, cotangent: Tensor
) -> tuple[Tensor, ...]:
    """The same by operations that autograd differentiates, with the basis as a constant.

    s, u and q have the values that the pseudo-inverse gives, and the derivatives of ``VᵀG(v - Gs) = 0``,
    ``VᵀG(y - Gu) = 0`` and ``q = v - Gs`` for s and u in the span of V.
    """

    def moving(tensor: Tensor) -> Tensor:
        return tensor - tensor.detach()

    def response(right: Tensor) -> Tensor:
        known = basis.power(right, -2.0).detach()
        left = moving(normal_product(data, right - normal_product(data, known)))
        return known + basis.power(left, -4.0)

    s, u = response(cotangent), response(y)
    q = basis.outside(cotangent).detach() + moving(cotangent - normal_product(data, s))
    return _products(data, y, s, u, q)


def _products(data: Regression, y: Tensor, s: Tensor, u: Tensor, q: Tensor) -> tuple[Tensor, ...]:
    design, targets, weights = data[:3]
    moved, residual, image, free = design @ s, targets - design @ y, design @ u, design @ q
    for_weights = (residual * moved + image * free).sum(-1)
    if weights is not None:
        moved, residual, image = (weights[..., None] * tensor for tensor in (moved, residual, image))
    for_design = residual @ s.mT - moved @ y.mT + image @ q.mT
    return for_design, moved, for_weights, (q * u - s * y).sum(-1)
