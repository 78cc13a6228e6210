"""Robust pooling ([DDN] Table 2): the value, or vector, nearest to all others by a penalty that bounds outliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import flags, rows_where
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt, fixed_number
from lpgd.nodes.pooling.descent import Descent, NumberSum, Root, VectorSum, blocks, descend, find_root
from lpgd.nodes.pooling.penalties import Penalty, PenaltyFunction, hessian
from lpgd.nodes.pooling.truncated_quadratic import minimise_truncated
from lpgd.status import Status

__all__ = ["Penalty", "RobustPooling"]


@dataclass(frozen=True)
class RobustPooling(BaseNode):
    """``y = argmin_u Σ_i φ(|u - x_i|)`` over dimensions of a tensor, for numbers x_i or for vectors.

    Args:
        penalty: φ, with the scale α:

            ========================  ===========================================
            ``quadratic``             z²/2, the mean
            ``pseudo_huber``          α² (√(1 + z²/α²) - 1)
            ``huber``                 z²/2 up to α, then α (|z| - α/2)
            ``welsch``                1 - exp(-z²/2α²), not convex
            ``truncated_quadratic``   z²/2 up to α, then α²/2, not convex
            ========================  ===========================================
        alpha: α > 0, a number, or ``"input"``: a second input with a gradient, one number for all, or one for each
            element of the batch (of x with channels in front of what is pooled: (channels,) is one for each of them).
        dim: the dimensions that are pooled, as of the tensor that the layer is called with; they vanish.
        vector_dim: the dimension of vectors, which comes last in the result; None pools numbers.

    With ``κ₁ = φ'/z`` and ``κ₂ = (φ'' - φ'/z)/z²`` at ``z_i = u - x_i``, ``H = Σ κ₁ I + κ₂ z zᵀ``; of numbers ``Σφ''``:

        v·Dy/Dx_i = (κ₁ I + κ₂ z_i z_iᵀ) H⁻¹ v,   of numbers  φ''(z_i) v / Σφ''

    which can be negative for Welsch.  As ``φ_α(z)`` is ``φ_1(z/α)``, or α² times that, y is α times the answer for
    ``x/α`` and α = 1, whence ``v·dy/dα = Σ_i <z_i, v·Dy/Dx_i>/α``.  Where H is singular (flat objectives, such as
    Huber's between two distant groups) the derivative is that of the weighted mean with weights κ₁.

    Convex sums of numbers are solved by Newton's method for the root of the slope, within a bracket that it cannot
    leave; others by Newton steps that a weighted mean replaces where they do not descend, O(n) each.  What is not
    convex starts from mean and median, a warm start in addition (and where those are out of reach of all points, from
    the point nearest to the median), and the best end is kept; starts within the convex surroundings of a solution,
    which curvature and third derivative tell, are left out.  Truncated quadratics of numbers are solved exactly, by
    sorting.

    [DDN] Gould, Hartley, Campbell: Deep Declarative Networks (arXiv 1909.04866).
    """

    penalty: Penalty = "huber"
    alpha: float | Literal["input"] = 1.0
    dim: int | tuple[int, ...] = -1
    vector_dim: int | None = None

    name = "RobustPooling"
    domain = "Here alpha must be positive."

    def __post_init__(self) -> None:
        if not (isinstance(self.alpha, str) and self.alpha == "input"):
            how = "alpha='input' makes it an input of the call, which gets a gradient"
            object.__setattr__(self, "alpha", fixed_number("alpha", self.alpha, how))
        _ = self.function  # where its options are checked
        object.__setattr__(self, "dim", (self.dim,) if isinstance(self.dim, int) else tuple(self.dim))

    @cached_property
    def function(self) -> PenaltyFunction:
        """φ, for α = 1 where that is an input."""
        return PenaltyFunction(self.penalty, 1.0 if self.alpha == "input" else self.alpha)

    @property
    def dims(self) -> tuple[int, ...]:
        """The dimensions that are pooled."""
        return (self.dim,) if isinstance(self.dim, int) else self.dim

    @property
    def inputs(self) -> Mapping[str, int]:
        ranks = {"x": len(self.dims) + (self.vector_dim is not None)}
        return {**ranks, "alpha": 0} if self.alpha == "input" else ranks

    def arrange(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Move what is pooled, and then the vectors, to the end.

        Raises:
            ValueError: there are no such dimensions, or one is named twice.
        """
        x = inputs[0]
        moved = [*self.dims, *([] if self.vector_dim is None else [self.vector_dim])]
        places = [place + x.ndim if place < 0 else place for place in moved]
        if len(set(places)) < len(places) or not all(0 <= place < x.ndim for place in places):
            raise ValueError(f"x has {x.ndim} dimensions; dim={self.dim} and vector_dim={self.vector_dim} do not fit.")
        return (x.movedim(places, list(range(-len(places), 0))), *inputs[1:])

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        pooled = shapes[0][: len(self.dims)]
        if not math.prod(pooled):
            raise ValueError(f"the pooled dimensions of x have sizes {pooled}: there is nothing to pool.")
        return shapes[0][len(self.dims) :]

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        x, y, scale = self._scaled(inputs, y)
        z = self._differences(y, x)
        value = self.function.value(z[..., 0].square() if z.shape[-1] == 1 else z.square().sum(-1)).sum(-1)
        return value if scale is None or self.penalty == "welsch" else scale.square() * value

    def _scaled(self, inputs: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``x/α`` and ``y/α``, and α (B,), where that is an input; else x, y and None."""
        if len(inputs) == 1:
            return inputs[0], y, None
        x, alpha = inputs
        return x / _column(alpha, x), y / _column(alpha, y), alpha

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        return self._solved(inputs, start, self._solve)

    def _solved(
        self, inputs: tuple[Tensor, ...], start: Tensor | None, solve: Callable[[Tensor, Tensor | None], NodeAnswer]
    ) -> NodeAnswer:
        """What ``solve`` answers for x and a start, or with α as an input for those over α, in the units of x."""
        if len(inputs) == 1:
            return solve(inputs[0], start)
        x, alpha = inputs
        valid = alpha > 0
        alpha = torch.where(valid, alpha, 1)
        answer = solve(x / _column(alpha, x), start if start is None else start / _column(alpha, start))
        y = answer.y * _column(alpha, answer.y)
        if valid.all():
            return answer._replace(y=y)
        statuses = [
            status if fine else Status.INVALID_DATA
            for status, fine in zip(answer.statuses, valid.tolist(), strict=True)
        ]
        return answer._replace(y=torch.where(_column(valid, y), y, torch.nan), statuses=statuses)

    def _solve(self, x: Tensor, start: Tensor | None) -> NodeAnswer:
        whole, x = x, self._points(x)
        if self.penalty == "quadratic":
            return self._answer(whole, x.mean(1))
        if self.penalty == "truncated_quadratic" and x.shape[-1] == 1:
            return self._answer(whole, minimise_truncated(x[..., 0], self.function.alpha))
        known = None if start is None else start.reshape(x.shape[0], x.shape[-1])
        function = self._sum(x)
        if self.function.is_convex:
            end = self._local(function, x.mean(1) if known is None else known)
        else:
            end = self._search(function, known)
        return self._answer(whole, end.u, end)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer | None:
        """The minimiser near the start."""
        if len(inputs) > 1:
            # Over α, or over α² where that is a factor of the objective: Welsch's ρ would be another for each element.
            if tilt.rho and self.penalty == "welsch":
                return None
            alpha = torch.where(inputs[1] > 0, inputs[1], 1)
            factor = _column(alpha if self.penalty == "welsch" else 1 / alpha, tilt.linear)
            tilt = Tilt(tilt.linear * factor, tilt.rho, tilt.center / _column(alpha, tilt.center))

        def solve(x: Tensor, start: Tensor | None) -> NodeAnswer:
            whole, x = x, self._points(x)
            size, d = x.shape[0], x.shape[-1]
            function = self._sum(x, Tilt(tilt.linear.reshape(size, d), tilt.rho, tilt.center.reshape(size, d)))
            end = self._local(function, x.mean(1) if start is None else start.reshape(size, d))
            return self._answer(whole, end.u, end)

        return self._solved(inputs, start, solve)

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        if self.penalty == "quadratic" or self.vector_dim is not None:
            return self.differentiable_vjp(inputs, y, cotangent)
        whole, y, alpha = self._scaled(inputs, y)
        x = self._points(whole)
        gradient, u, v = x.new_empty(x.shape[:2]), y.reshape(-1, 1), cotangent.reshape(-1, 1)
        for block in blocks(x):  # each stays in the processor's cache
            weights, scale = self._weights(x[block, :, 0], u[block], v[block])
            torch.mul(weights, scale, out=gradient[block])
        gradient = gradient.reshape(whole.shape)
        return (gradient,) if alpha is None else (gradient, self._along(whole, y, gradient))

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        whole, y, alpha = self._scaled(inputs, y)
        x = self._points(whole)
        u, v = (tensor.reshape(x.shape[0], x.shape[-1]) for tensor in (y, cotangent))
        if self.penalty == "quadratic":
            gradient = (v / x.shape[1])[:, None].expand(x.shape)
        elif x.shape[-1] > 1:
            gradient = self._gradient_of_vectors(x, u, v)
        else:
            weights, scale = self._weights(x[..., 0], u, v)
            gradient = weights * scale
        gradient = gradient.reshape(whole.shape)
        return (gradient,) if alpha is None else (gradient, self._along(whole, y, gradient))

    def _along(self, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
        """(B,) the gradient for α from that for x, where x and y are over α."""
        if self.penalty == "quadratic":
            return y.new_zeros(len(y))
        z = self._differences(y, x)
        return (z * self._points(gradient)).sum((1, 2))

    def _weights(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Of numbers (B, N) weights ``φ''``, or κ₁ where their sum vanishes, and ``v`` over their sums."""
        z = u - x
        weights = self.function.second(z)
        total = weights.sum(-1, keepdim=True)
        eps = torch.finfo(x.dtype).eps
        if (total.abs() <= 100 * eps * x.shape[-1] * self.function.curvature).any():
            first = self.function.terms(z.square()).first
            flat = total.abs() <= 100 * eps * first.sum(-1, keepdim=True)
            weights = torch.where(flat, first, weights)
            total = weights.sum(-1, keepdim=True)
            return weights, torch.where(total != 0, v / torch.where(total != 0, total, 1), 0)
        return weights, v / total

    def _gradient_of_vectors(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        z = u[:, None] - x
        terms = self.function.terms(z.square().sum(-1))
        matrix, total = hessian(z, terms), terms.first.sum(-1)
        values = linalg.eigvalsh(matrix)
        flat = (values.abs().amin(-1) <= 100 * torch.finfo(z.dtype).eps * total)[:, None]
        unit = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        mean = torch.where(total > 0, total, 1)[:, None, None] * unit
        s = linalg.solve(torch.where(flat[..., None], mean, matrix), v)[:, None]
        second = torch.where(flat, 0, terms.second)
        return terms.first[..., None] * s + (second * (z * s).sum(-1))[..., None] * z

    def _points(self, x: Tensor) -> Tensor:
        """(B, N, d)."""
        d = 1 if self.vector_dim is None else x.shape[-1]
        return x.reshape(x.shape[0], math.prod(x.shape[1 : 1 + len(self.dims)]), d)

    def _differences(self, y: Tensor, x: Tensor) -> Tensor:
        """``u - x_i``, (B, N, d)."""
        points = self._points(x)
        return y.reshape(y.shape[0], 1, points.shape[-1]) - points

    def _sum(self, x: Tensor, tilt: Tilt | None = None) -> NumberSum | VectorSum:
        numbers = x.shape[-1] == 1
        return NumberSum(self.function, x[..., 0], tilt) if numbers else VectorSum(self.function, x, tilt)

    # -- the solvers ---------------------------------------------------------------------------------------------------

    def _local(self, function: NumberSum | VectorSum, start: Tensor) -> Root | Descent:
        """The minimiser near the start."""
        if self.function.is_convex and isinstance(function, NumberSum):
            return find_root(function, start)
        return descend(function, start)

    def _search(self, function: NumberSum | VectorSum, known: Tensor | None) -> Descent:
        """The best end of descents from mean, median and a warm start, where they are not known to end alike."""
        points = function.x if isinstance(function, VectorSum) else function.x[..., None]
        best = descend(function, points.mean(1))
        elements = function.median_beyond(best.u, best.radius)
        if len(elements):
            best = best.improved(elements, descend(function.at(elements), points[elements].median(1).values))
        if known is not None:
            elements = rows_where((known - best.u).abs().amax(-1) > best.radius)
            if len(elements):
                best = best.improved(elements, descend(function.at(elements), known[elements]))
        # Where no point is within reach, the objective is flat: from the point that is nearest to the median.
        elements = rows_where(best.total < 0.5 * self.function.curvature)
        if len(elements):
            medians = points[elements].median(1, keepdim=True).values
            place = (points[elements] - medians).square().sum(-1).argmin(-1)
            best = best.improved(elements, descend(function.at(elements), points[elements, place]))
        return best

    def _answer(self, x: Tensor, u: Tensor, end: Root | Descent | None = None) -> NodeAnswer:
        y = u.reshape(x.shape[0], *self.variable_shape(tuple(x.shape[1:])))
        solved = [Status.SOLVED] * len(u)
        if end is None:
            return NodeAnswer(y, solved, torch.zeros(len(u), dtype=torch.int64))
        if not end.converged.all():
            solved = [Status.SOLVED if fine else Status.ITERATION_LIMIT for fine in flags(end.converged)]
        return NodeAnswer(y, solved, end.iterations)


def _column(alpha: Tensor, like: Tensor) -> Tensor:
    """One number for each element, (B,), with as many dimensions as another tensor has."""
    return alpha.reshape(-1, *(1,) * (like.ndim - 1))
