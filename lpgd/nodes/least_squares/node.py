"""Least squares, weighted, with a ridge and an intercept, and of minimum norm where solutions are many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpgd.arrays import flags
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt, is_shared
from lpgd.nodes.least_squares.factored import (
    Regression,
    differentiate_least_squares,
    factor,
    inverse_product,
    normal_product,
    outer_products,
    solve_least_squares,
)
from lpgd.nodes.least_squares.minimum_norm import (
    Basis,
    differentiate_minimum_norm,
    differentiate_minimum_norm_again,
    minimum_norm_basis,
    minimum_norm_constraint,
    solve_minimum_norm,
)
from lpgd.nodes.least_squares.wide import (
    WideFactor,
    differentiate_wide,
    differentiate_wide_again,
    is_wide,
    solve_wide,
    wide_factor,
)
from lpgd.status import Status

__all__ = ["LeastSquares"]


@dataclass(frozen=True)
class LeastSquares(BaseNode):
    """Linear regression (Gould, Lecture Notes on Differentiable Optimisation, 4.1).

        minimise over y = (x, t):   ½Σ_i w_i (A_i x + t - b_i)² + (ridge/2) |x|²

    without weights, ridge and intercept t unless asked for.  One QR factorisation serves forward and backward pass; a
    matrix that the whole batch shares is factorised once.  With a ridge and fewer rows than columns it is that of the
    dual, whose unknowns are the residuals.  Inputs, for each element:

        A         (m, n)
        b         (m,), or with ``columns`` (m, k): k problems with the same matrix
        weights   (m,), at least 0, with ``weighted``
        ridge     (), at least 0, with ``ridge``; the intercept is not penalised

    The solution is x (n,) or (n, k), with ``bias`` followed by t: (n + 1,) or (n + 1, k).

    An element without a unique solution (dependent columns, and no ridge) fails with ``Status.NUMERICAL_ERROR``, a
    negative weight or ridge with ``Status.INVALID_DATA``; fewer rows than unknowns without ``ridge`` are a ValueError.

    With ``minimum_norm`` none of these is an error: y is the one of all solutions whose norm (t included) is the
    smallest, ``y = A⁺b``, the lower one of two problems (equations 8 to 14 of the notes):

        minimise ½|y|²  subject to  y minimises the above

    by a singular value decomposition of R.  A⁺ jumps where the rank changes: the gradient (Golub and Pereyra) is that
    of changes that keep it, which are all small changes where A has full row or column rank.

    Args:
        weighted: there is an input ``weights``.
        ridge: there is an input ``ridge``.
        bias: fit an intercept.
        columns: b is a matrix.
        minimum_norm: the solution of minimum norm, for wide problems and any rank.
        rank_tolerance: singular values up to this share of the largest one count as zero; None is the larger side of
            the matrix in rounding errors.
    """

    weighted: bool = False
    ridge: bool = False
    bias: bool = False
    columns: bool = False
    minimum_norm: bool = False
    rank_tolerance: float | None = None

    name = "LeastSquares"
    domain = (
        "Here A must have independent columns, or ridge be positive, or the node be minimum_norm; weights and ridge "
        "must not be negative."
    )

    def __post_init__(self) -> None:
        for flag in ("weighted", "ridge", "bias", "columns", "minimum_norm"):
            value = getattr(self, flag)
            if not isinstance(value, bool):
                role = {"weighted": "weights", "ridge": "ridge"}.get(flag)
                further = f"; with True the layer takes a further input, {role}" if role else ""
                raise TypeError(f"{flag} is {value!r}; it must be True or False{further}.")

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
        if not self.ridge and not self.minimum_norm and m < unknowns:
            raise ValueError(
                f"A has {m} rows for {unknowns} unknowns, so the solution is not unique; use LeastSquares(ridge=True), "
                "or LeastSquares(minimum_norm=True)."
            )
        return (unknowns, *named["b"][1:])

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        if self.minimum_norm:
            return 0.5 * y.flatten(1).square().sum(-1)
        A, b, weights, ridge = self._named(inputs)
        x = y[:, : A.shape[-1]]
        fitted = torch.einsum("bmn,bn...->bm...", A, x)
        residual = (fitted + y[:, A.shape[-1], None] if self.bias else fitted) - b
        squares = residual.square()
        row_squares = squares.sum(-1) if self.columns else squares
        value = 0.5 * (row_squares if weights is None else weights * row_squares).sum(-1)
        return value if ridge is None else value + 0.5 * ridge * x.flatten(1).square().sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        if not self.minimum_norm:
            return None
        data = self._regression(inputs)
        basis = minimum_norm_basis(data, self.rank_tolerance)
        return minimum_norm_constraint(data, y if self.columns else y[..., None], basis).flatten(1)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        return self._solve(inputs, None)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        return self._solve(inputs, tilt)

    def vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: tuple[Tensor, ...] | None
    ) -> tuple[Tensor, ...]:
        data = self._regression(inputs)
        if self.minimum_norm:
            basis = minimum_norm_basis(data, self.rank_tolerance) if aux is None else Basis(*aux)
            y, cotangent = self._as_columns(y, cotangent)
            found = differentiate_minimum_norm(data, y, basis, cotangent)
            return self._in_inputs(inputs, self._with_ridge(data, basis, cotangent, found))
        if is_wide(data):
            known = wide_factor(data) if aux is None else WideFactor(*aux)
            cotangent = cotangent if self.columns else cotangent[..., None]
            return self._in_inputs(inputs, differentiate_wide(data, known, cotangent))
        R = aux[0] if aux is not None else factor(data)
        y, cotangent = self._as_columns(y, cotangent)
        return self._in_inputs(inputs, differentiate_least_squares(data, y, R, cotangent))

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        data = self._regression(inputs)
        y, cotangent = self._as_columns(y, cotangent)
        if self.minimum_norm:
            basis = minimum_norm_basis(data, self.rank_tolerance)
            return self._in_inputs(inputs, differentiate_minimum_norm_again(data, y, basis, cotangent))
        if not is_wide(data):
            return self._in_inputs(inputs, _differentiate_again(data, y, cotangent))
        weights = data.weights
        zero = None if weights is None else (weights == 0.0).any(-1)
        if zero is None or weights is None or not bool(zero.any()):
            return self._in_inputs(inputs, differentiate_wide_again(data, cotangent))
        # The root of a weight has no derivative at zero: those elements go by the normal equations.
        positive = data._replace(weights=torch.where(zero[:, None], 1.0, weights))
        by_dual = differentiate_wide_again(positive, cotangent)
        *others, for_penalty = _differentiate_again(data, y, cotangent)
        n = data.penalised
        by_normal = *others, for_penalty[:, :n].sum(-1, keepdim=True)
        return self._in_inputs(inputs, _chosen(zero.expand(len(cotangent)), by_normal, by_dual))

    def _with_ridge(
        self, data: Regression, basis: Basis, cotangent: Tensor, found: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The gradients of minimum norm, of wide elements that their ridge makes unique by the dual in their place."""
        if data.penalty is None or not is_wide(data):
            return found
        unique = (basis.values > 0.0).all(-1) & (data.penalty[:, 0] > 0.0)
        if not bool(unique.any()):
            return found
        by_dual = differentiate_wide(data, wide_factor(data), cotangent)
        n = data.penalised
        by_norm = *found[:-1], found[-1][:, :n].sum(-1, keepdim=True)
        return _chosen(unique.expand(len(cotangent)), by_dual, by_norm)

    def _as_columns(self, y: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The solutions and the cotangent, where b is a vector as matrices of one column."""
        return (y, cotangent) if self.columns else (y[..., None], cotangent[..., None])

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
        free = int(self.bias and not rho)
        return Regression(design, b if self.columns else b[..., None], weights, penalty, free)

    def _solve(self, inputs: tuple[Tensor, ...], tilt: Tilt | None) -> NodeAnswer:
        linear = None if tilt is None else tilt.rho * tilt.center - tilt.linear
        if linear is not None and not self.columns:
            linear = linear[..., None]
        rho, nu = 0.0 if tilt is None else tilt.rho, None
        if self.minimum_norm:
            y, basis = solve_minimum_norm(self._regression(inputs), self.rank_tolerance)
            pull = 0.0 if linear is None else linear
            y = y if linear is None else y + basis.outside(linear) / (1.0 + rho)
            nu = basis.inside(pull - (1.0 + rho) * y).flatten(1)  # (1 + ρ) y - pull + V ν = 0
            aux, regular = tuple(basis), torch.ones(1, dtype=torch.bool)
        elif is_wide(data := self._regression(inputs, rho)):
            aux = wide_factor(data)
            y, regular = solve_wide(data, aux, linear)
        else:
            y, R, regular = solve_least_squares(data, linear)
            aux = (R,)
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
        return NodeAnswer(y if self.columns else y[..., 0], statuses, [1] * batch, aux, nu)


def _differentiate_again(data: Regression, y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """The gradients as functions of data, solution and cotangent, by the normal equations."""
    R = factor(data)
    # One step of refinement with a constant R: nothing in value, and the derivative of (DᵀWD + diag p) s = v.
    s = inverse_product(R, cotangent).detach()
    s = s + inverse_product(R, cotangent - normal_product(data, s))
    return outer_products(data, y, s)


def _chosen(mask: Tensor, ones: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The first gradients where ``mask`` (B,) is set, the others elsewhere."""
    return tuple(
        torch.where(mask.reshape(-1, *(1,) * (one.ndim - 1)), one, other)
        for one, other in zip(ones, others, strict=True)
    )


def _once(tensor: Tensor) -> Tensor:
    """One row of an input that the whole batch shares."""
    return tensor[:1] if is_shared(tensor) else tensor
