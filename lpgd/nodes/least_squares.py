"""Least squares, weighted, with a ridge and an intercept: one QR factorisation for both passes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import flags
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt, is_shared
from lpgd.status import Status

__all__ = ["LeastSquares", "Regression", "differentiate_least_squares", "solve_least_squares"]


class Regression(NamedTuple):
    """The data of ``½Σ_i w_i |D_i y - b_i|² + ½Σ_j p_j |y_j|²``, each with B rows, or one for the whole batch.

    Attributes:
        design: D, (B, m, n).
        targets: b, (B, m, k); always B rows.
        weights: w, (B, m), or None for ones.
        penalty: p, (B, n), or None for zeros.
    """

    design: Tensor
    targets: Tensor
    weights: Tensor | None = None
    penalty: Tensor | None = None


def solve_least_squares(data: Regression, linear: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise by the QR factorisation of ``[√w D; √p]`` with the targets as further columns, so that Q is not needed.

    Args:
        data: the problems.
        linear: (B, n, k), c of a further term ``-<c, y>``, or None.

    Returns:
        y (B, n, k); the triangular factor R (B or 1, n, n), ``RᵀR = DᵀWD + diag(p)``; and (B or 1,) whether it has full
        rank (other elements' R and y mean nothing).
    """
    design, targets, weights, penalty = data
    n = design.shape[-1]
    parts = (design, weights, penalty)
    batch, shared = targets.shape[0], all(part is None or part.shape[0] == 1 for part in parts)
    right = _fold(targets) if shared else targets
    left = design
    if weights is not None:
        root = weights.sqrt()[..., None]
        left, right = root * left, root * right
    rows = 1 if shared else batch
    left = left.expand(rows, *left.shape[1:])
    if penalty is not None:
        left = torch.cat([left, penalty.sqrt().diag_embed().expand(rows, n, n)], -2)
        right = torch.nn.functional.pad(right, (0, 0, 0, n))
    triangle = linalg.qr(torch.cat([left, right], -1), mode="r").R[:, :n]
    R, projected = triangle[..., :n], triangle[..., n:]
    diagonal = R.diagonal(dim1=-2, dim2=-1).abs()
    rounding = torch.finfo(R.dtype).eps * max(left.shape[-2:])
    regular = diagonal.amin(-1) > rounding * diagonal.amax(-1)
    if not regular.all():
        R = torch.where(regular[:, None, None], R, torch.eye(n, dtype=R.dtype, device=R.device))
    if linear is not None:
        extra = _fold(linear) if shared else linear
        projected = projected + linalg.solve_triangular(R.mT, extra, upper=False)
    y = linalg.solve_triangular(R, projected, upper=True)
    return _unfold(y, batch) if shared else y, R, regular


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
    return _outer_products(data, y, _inverse_product(R, cotangent))


def _outer_products(data: Regression, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients from the response s (B, n, k)."""
    design, targets, weights, _ = data
    moved, residual = design @ s, targets - design @ y
    for_weights = (residual * moved).sum(-1)
    if weights is not None:
        moved, residual = weights[..., None] * moved, weights[..., None] * residual
    for_design = torch.baddbmm(residual @ s.mT, moved, y.mT, alpha=-1)
    return for_design, moved, for_weights, -(y * s).sum(-1)


@torch.no_grad()
def _factor(data: Regression) -> Tensor:
    """R of :func:`solve_least_squares`, as a constant."""
    return solve_least_squares(data)[1]


def _inverse_product(R: Tensor, columns: Tensor) -> Tensor:
    """``R⁻¹R⁻ᵀ v``, (B, n, k)."""
    shared = R.shape[0] == 1
    right = _fold(columns) if shared else columns
    s = linalg.solve_triangular(R, linalg.solve_triangular(R.mT, right, upper=False), upper=True)
    return _unfold(s, columns.shape[0]) if shared else s


def _normal_product(data: Regression, s: Tensor) -> Tensor:
    """``(DᵀWD + diag(p)) s``, (B, n, k)."""
    design, _, weights, penalty = data
    moved = design @ s
    product = design.mT @ (moved if weights is None else weights[..., None] * moved)
    return product if penalty is None else product + penalty[..., None] * s


def _fold(columns: Tensor) -> Tensor:
    """(B, m, k) as one matrix (1, m, B k)."""
    return columns.transpose(0, 1).flatten(1)[None]


def _unfold(columns: Tensor, batch: int) -> Tensor:
    return columns[0].unflatten(1, (batch, -1)).transpose(0, 1)


@dataclass(frozen=True)
class LeastSquares(BaseNode):
    """Linear regression (Gould, Lecture Notes on Differentiable Optimisation, 4.1).

        minimise over y = (x, t):   ½Σ_i w_i (A_i x + t - b_i)² + (ridge/2) |x|²

    without weights, ridge and intercept t unless asked for.  One QR factorisation serves forward and backward pass; a
    matrix that the whole batch shares is factorised once.  Inputs, for each element:

        A         (m, n)
        b         (m,), or with ``columns`` (m, k): k problems with the same matrix
        weights   (m,), at least 0, with ``weighted``
        ridge     (), at least 0, with ``ridge``; the intercept is not penalised

    The solution is x (n,) or (n, k), with ``bias`` followed by t: (n + 1,) or (n + 1, k).

    An element without a unique solution (dependent columns, and no ridge) fails with ``Status.NUMERICAL_ERROR``, a
    negative weight or ridge with ``Status.INVALID_DATA``; fewer rows than unknowns without ``ridge`` are a ValueError.

    Args:
        weighted: there is an input ``weights``.
        ridge: there is an input ``ridge``.
        bias: fit an intercept.
        columns: b is a matrix.
    """

    weighted: bool = False
    ridge: bool = False
    bias: bool = False
    columns: bool = False

    name = "LeastSquares"
    domain = "Here A must have independent columns, or ridge be positive; weights and ridge must not be negative."

    @property
    def inputs(self) -> Mapping[str, int]:
        named = {"A": 2, "b": 2 if self.columns else 1}
        return named | ({"weights": 1} if self.weighted else {}) | ({"ridge": 0} if self.ridge else {})

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        named = dict(zip(self.inputs, shapes, strict=True))
        m, n = named["A"]
        for name in ("b", "weights"):
            if name in named and named[name][0] != m:
                raise ValueError(f"{name} has {named[name][0]} rows; A has {m}.")
        unknowns = n + self.bias
        if not self.ridge and m < unknowns:
            raise ValueError(
                f"A has {m} rows for {unknowns} unknowns, so the solution is not unique; use LeastSquares(ridge=True)."
            )
        return (unknowns, *named["b"][1:])

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        A, b, weights, ridge = self._named(inputs)
        x = y[:, : A.shape[-1]]
        fitted = torch.einsum("bmn,bn...->bm...", A, x)
        residual = (fitted + y[:, A.shape[-1], None] if self.bias else fitted) - b
        squares = residual.square()
        rows = squares.sum(-1) if self.columns else squares
        value = 0.5 * (rows if weights is None else weights * rows).sum(-1)
        return value if ridge is None else value + 0.5 * ridge * x.flatten(1).square().sum(-1)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        return self._solve(inputs, None)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        return self._solve(inputs, tilt)

    def vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        data = self._regression(inputs)
        R = aux[0] if aux is not None else _factor(data)
        return self._in_inputs(inputs, differentiate_least_squares(data, *self._as_columns(y, cotangent, R)))

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        data = self._regression(inputs)
        R = _factor(data)
        y, R, cotangent = self._as_columns(y, cotangent, R)
        # One step of refinement with a constant R: nothing in value, and the derivative of (DᵀWD + diag p) s = v.
        s = _inverse_product(R, cotangent).detach()
        s = s + _inverse_product(R, cotangent - _normal_product(data, s))
        return self._in_inputs(inputs, _outer_products(data, y, s))

    def _as_columns(self, y: Tensor, cotangent: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y, R and the cotangent, where b is a vector as matrices of one column."""
        return (y, R, cotangent) if self.columns else (y[..., None], R, cotangent[..., None])

    def _in_inputs(self, inputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The gradients of a regression's data as those of the inputs."""
        n = inputs[0].shape[-1]
        design, targets, weights, penalty = gradients
        found = [design[..., :n], targets if self.columns else targets[..., 0]]
        found += [weights] * self.weighted + [penalty[:, :n].sum(-1)] * self.ridge
        return tuple(found)

    def _named(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        named = dict(zip(self.inputs, inputs, strict=True))
        return named["A"], named["b"], named.get("weights"), named.get("ridge")

    def _regression(self, inputs: tuple[Tensor, ...], rho: float = 0.0) -> Regression:
        A, b, weights, ridge = self._named(inputs)
        A = _once(A)
        m, n = A.shape[-2:]
        design = torch.cat([A, A.new_ones(len(A), m, 1)], -1) if self.bias else A
        penalty = None
        if ridge is not None or rho:
            penalty = A.new_zeros(1, n) if ridge is None else _once(ridge).clamp_min(0.0)[:, None].expand(-1, n)
            penalty = torch.nn.functional.pad(penalty, (0, int(self.bias))) + rho
        # Elements with negative weights fail by their status.
        weights = None if weights is None else _once(weights).clamp_min(0.0)
        return Regression(design, b if self.columns else b[..., None], weights, penalty)

    def _solve(self, inputs: tuple[Tensor, ...], tilt: Tilt | None) -> NodeAnswer:
        linear = None if tilt is None else tilt.rho * tilt.center - tilt.linear
        if linear is not None and not self.columns:
            linear = linear[..., None]
        data = self._regression(inputs, 0.0 if tilt is None else tilt.rho)
        y, R, regular = solve_least_squares(data, linear)
        _, b, weights, ridge = self._named(inputs)
        batch = b.shape[0]
        valid = torch.ones(batch, dtype=torch.bool, device=b.device)
        if weights is not None:
            valid = valid & (weights >= 0.0).all(-1)
        if ridge is not None:
            valid = valid & (ridge >= 0.0)
        statuses = [
            (Status.SOLVED if full else Status.NUMERICAL_ERROR) if fine else Status.INVALID_DATA
            for fine, full in zip(flags(valid), flags(regular.expand(batch)), strict=True)
        ]
        return NodeAnswer(y if self.columns else y[..., 0], statuses, [1] * batch, (R,))


def _once(tensor: Tensor) -> Tensor:
    """One row of an input that the whole batch shares."""
    return tensor[:1] if is_shared(tensor) else tensor
