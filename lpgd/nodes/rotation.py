"""The nearest rotation: the orthogonal Procrustes problem over SO(n), of a matrix or of two sets of points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import elements_where
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt
from lpgd.nodes.eigen import square_size, symmetric_part
from lpgd.status import Status, warn

__all__ = ["Rotation", "nearest_rotation", "rotation_vjp", "rotation_vjp_differentiable"]


class _Signed(NamedTuple):
    """``M = U diag(s) Vᵀ`` with ``det(U Vᵀ) = 1``, so that the last s may be negative: vectors are (B, n, n)."""

    left: Tensor
    values: Tensor
    right: Tensor


def nearest_rotation(matrix: Tensor) -> _Signed:
    """The rotation ``R = U Vᵀ`` that maximises ``<R, M>``, M (B, n, n), by its factors (Kabsch 1976, Umeyama 1991)."""
    left, values, right = linalg.svd(matrix)
    side = torch.ones_like(values)
    side[:, -1] = torch.where(linalg.det(left @ right) < 0, -1.0, 1.0)
    return _Signed(left, side * values, right.mT * side[:, None, :])


def rotation_vjp(factors: _Signed, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``<G, R>`` with respect to M: ``U ((K - Kᵀ) / (s_i + s_j)) Vᵀ`` with ``K = Uᵀ G V``.

    R moves as ``dR = U Ω Vᵀ`` with a skew Ω, and ``Ω_ij (s_i + s_j) = (Uᵀ dM V)_ij - (Uᵀ dM V)_ji``, as ``RᵀM`` stays
    symmetric.  Equal s do no harm, as only sums divide.  A sum that is zero to rounding is left out.

    Returns:
        The gradient (B, n, n), and (B,) whether there is such a sum, and the loss depends on R to first order.
    """
    left, values, right = factors
    product = left.mT @ cotangent @ right
    turn = product - product.mT
    sums, flat = _sums(values)
    noise = 10 * values.shape[-1] * torch.finfo(values.dtype).eps * product.abs().amax((-2, -1), keepdim=True)
    # Which of many rotations it is counts in the others' derivatives, too.
    ambiguous = flat.any(-1).any(-1) & (turn.abs() > noise).any(-1).any(-1)
    return left @ (turn / sums) @ right.mT, ambiguous


def _sums(values: Tensor) -> tuple[Tensor, Tensor]:
    """``s_i + s_j``, infinite on the diagonal and where it is zero to rounding, and whether it is (B, n, n)."""
    sums = values[:, :, None] + values[:, None, :]
    size = values.shape[-1]
    near = 10 * size**0.5 * torch.finfo(values.dtype).eps * values.abs().amax(-1)
    flat = sums <= near[:, None, None]
    flat.diagonal(dim1=-2, dim2=-1).fill_(False)
    sums = torch.where(flat, torch.inf, sums)
    sums.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    return sums, flat


def rotation_vjp_differentiable(matrix: Tensor, rotation: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of :func:`rotation_vjp` from M, R and G alone, for second derivatives.

    It is ``R Z``, where Z is skew and ``H Z + Z H = RᵀG - GᵀR``, ``H = RᵀM`` symmetric.

    Raises:
        RuntimeError: the rotation of an element is not unique, to rounding.
    """
    H = symmetric_part(rotation.mT @ matrix)
    product = rotation.mT @ cotangent
    turn = product - product.mT
    values, vectors = linalg.eigh(H.detach())
    sums, flat = _sums(values)
    if flat.any():
        elements = elements_where(flat.any(-1).any(-1))[:10]
        raise RuntimeError(
            f"the nearest rotations of elements {elements} are not unique, to rounding: they have no second derivative."
        )

    def solved(right: Tensor) -> Tensor:
        return vectors @ ((vectors.mT @ right @ vectors) / sums) @ vectors.mT

    # One step of refinement with constant factors: nothing in value, and the derivative of the equation's solution.
    Z = solved(turn).detach()
    Z = Z + solved(turn - H @ Z - Z @ H)
    return rotation @ Z


@dataclass(frozen=True)
class Rotation(BaseNode):
    """The rotation R (n, n), ``RᵀR = I`` and ``det R = 1``, that is nearest to a matrix or turns points onto others.

        minimise ½|R - M|²,  which is  -<R, M> + constant      with input ``matrix`` M (n, n)
        minimise ½ Σ_i w_i |R a_i - b_i|²,  M = Σ_i w_i b_i a_iᵀ   with ``points``: ``source`` a and ``target`` b (N, n)

    (the orthogonal Procrustes problem, or Wahba's), and ``weights`` w (N,) of any sign where ``weighted``.  Solved
    by a singular value decomposition, whose last vector is turned where the determinant is -1; always a global minimum.

    The minimiser is unique, and has a derivative, where ``s_i + s_j > 0`` for all pairs of M's singular values, the
    last one with the sign of det M: equal singular values are as good as others.  Where a sum is zero to rounding (M
    has rank n - 2 or less, or det M < 0 and the last two are equal), R is one of many that have no derivative: its free
    directions are left out of the gradient, with an LpgdWarning.

    Args:
        points: inputs are points, one a row.
        weighted: a weight for each pair of points.
    """

    name = "rotation"

    points: bool = False
    weighted: bool = False

    def __post_init__(self) -> None:
        if self.weighted and not self.points:
            raise ValueError("weighted is for points: give points=True too.")

    @property
    def inputs(self) -> Mapping[str, int]:
        if not self.points:
            return {"matrix": 2}
        return {"source": 2, "target": 2} | ({"weights": 1} if self.weighted else {})

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        if not self.points:
            size = square_size(shapes[0])
            return (size, size)
        if shapes[0] != shapes[1] or not shapes[0][1]:
            raise ValueError(f"source has shape {shapes[0]} and target {shapes[1]}; both must be (N, n).")
        if self.weighted and shapes[2][0] != shapes[0][0]:
            raise ValueError(f"weights has {shapes[2][0]} entries for {shapes[0][0]} points.")
        return (shapes[0][1], shapes[0][1])

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        if not self.points:
            return 0.5 * (y - inputs[0]).square().sum((-2, -1))
        squares = (inputs[0] @ y.mT - inputs[1]).square().sum(-1)
        return 0.5 * (inputs[2] * squares if self.weighted else squares).sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        size = y.shape[-1]
        first, second = torch.triu_indices(size, size, device=y.device)
        excess = y.mT @ y - torch.eye(size, dtype=y.dtype, device=y.device)
        return excess[:, first, second] * torch.where(first == second, 0.5, 1.0).to(y.dtype)

    def tilt_size(self, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        # <R, M> alone resists a tilt: |R|² and |R a|² are constant on rotations.
        return self._matrix(inputs).abs().amax((-2, -1))

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        return torch.eye(shape[0], dtype=inputs[0].dtype, device=inputs[0].device).repeat(len(inputs[0]), 1, 1)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        return self._solve(self._matrix(inputs))

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        # |R|² is constant on rotations, so that the quadratic term is linear there, too.
        return self._solve(self._matrix(inputs) - tilt.linear + tilt.rho * tilt.center)

    def multipliers(self, inputs: tuple[Tensor, ...], y: Tensor, aux: Any) -> tuple[Tensor, Tensor]:
        # With the Hessian S of the objective, R S - M + R Λ = 0.
        multiplier = symmetric_part(y.mT @ self._matrix(inputs)) - self._curvature(inputs)
        first, second = torch.triu_indices(*y.shape[-2:], device=y.device)
        nu = multiplier[:, first, second]
        return nu, nu[:, :0]

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor, ...]:
        factors = nearest_rotation(self._matrix(inputs)) if aux is None else _Signed(*aux)
        gradient, ambiguous = rotation_vjp(factors, cotangent)
        if ambiguous.any():
            warn(
                f"The rotations of {int(ambiguous.sum())} of {len(y)} elements are not unique, to rounding (two of the "
                "matrix' singular values, the last one with the sign of its determinant, add up to zero), and have no "
                "derivative: the gradient is that of one of them and leaves its free directions out."
            )
        return self._in_inputs(inputs, gradient)

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        return self._in_inputs(inputs, rotation_vjp_differentiable(self._matrix(inputs), y, cotangent))

    def _matrix(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """M, (B, n, n)."""
        if not self.points:
            return inputs[0]
        return self._scaled(inputs[1], inputs).mT @ inputs[0]

    def _curvature(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The objective's Hessian in each row of R, (B or 1, n, n)."""
        if not self.points:
            size = inputs[0].shape[-1]
            return torch.eye(size, dtype=inputs[0].dtype, device=inputs[0].device)[None]
        return self._scaled(inputs[0], inputs).mT @ inputs[0]

    def _scaled(self, vectors: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[2][:, :, None] * vectors if self.weighted else vectors

    def _in_inputs(self, inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor, ...]:
        """The gradient of M as that of the inputs: ``dM = Σ dw b aᵀ + w db aᵀ + w b daᵀ``."""
        if not self.points:
            return (gradient,)
        source, target = inputs[:2]
        turned = target @ gradient
        along = (self._scaled(turned, inputs), self._scaled(source @ gradient.mT, inputs))
        return (*along, (turned * source).sum(-1)) if self.weighted else along

    def _solve(self, matrix: Tensor) -> NodeAnswer:
        factors = nearest_rotation(matrix)
        count = len(matrix)
        y = factors.left @ factors.right.mT
        return NodeAnswer(y, [Status.SOLVED] * count, [1] * count, tuple(factors))
