"""Conic programs with variable bounds, batched: data, Lagrangian, tilt and augmentation.

The problem, for each element of the batch, and its Lagrangian ([LPGD] eq. 78, with P added):

    minimise    ½ xᵀP x + qᵀx
    subject to  A x + s = b,  s ∈ K,   lower ≤ x ≤ upper

    L(x, y, z) = ½ xᵀP x + qᵀx + yᵀ(A x - b) + zᵀx - upperᵀ max(z, 0) + lowerᵀ max(-z, 0),   y ∈ K*

``z`` is the signed multiplier of the bounds: positive where the upper bound is active, negative where
the lower one is.  At a solution ``P x + q + Aᵀy + z = 0``.

Variables of the structure's ``integer_index`` take whole numbers only.  Such a program has a minimiser x, but no
multipliers of its own: (y, z) are what its solver puts in their place (see :class:`~lpgd.solvers.HiGHS`), and the
derivatives below, taken at such a pair, are a heuristic in the constraints' data.

[LPGD] Paulus, Musil, Martius: Lagrangian Proximal Gradient Descent for Learning Convex Optimization
Models (arXiv 2407.05920).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy, is_symmetric
from lpgd.execution.memo import TensorMemo
from lpgd.problems.base import Traits, maximum_norm
from lpgd.problems.conic.structure import ConicData, ConicPoint, ConicStructure, per_element
from lpgd.problems.conic.units import Units
from lpgd.problems.needed_gradients import needs_gradient

__all__ = ["ConicProblem", "per_element"]


@dataclass(frozen=True, eq=False, repr=False)
class ConicProblem:
    """A batch of conic programs of one structure (see the module's docstring for the mathematics).

    Args:
        structure: patterns and cones.
        data: float64 tensors on one device.  A datum of shape ``(size,)`` is shared by the batch; one of
            shape ``(R, size)`` has R rows with ``batch_size`` a multiple of R, and element ``i`` uses row
            ``i mod R`` (so both perturbed problems of a backward pass share one copy of the matrices).
        batch_size: number of elements B.

    Raises:
        ValueError: a datum has the wrong length, number of rows or type.
    """

    structure: ConicStructure
    data: ConicData
    batch_size: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.batch_size} elements of {self.structure})"

    def __post_init__(self) -> None:
        for name, datum, size in zip(ConicData._fields, self.data, self.structure.sizes, strict=True):
            if datum.dtype != torch.float64:
                raise ValueError(f"{name} is {datum.dtype}; problems are held in float64.")
            if datum.ndim not in (1, 2) or datum.shape[-1] != size:
                raise ValueError(f"{name} has shape {tuple(datum.shape)}; expected ({size},) or (rows, {size}).")
            if datum.ndim == 2 and (datum.shape[0] == 0) != (self.batch_size == 0):
                raise ValueError(f"{name} has {datum.shape[0]} rows for a batch of {self.batch_size}.")
            if datum.ndim == 2 and datum.shape[0] and self.batch_size % datum.shape[0]:
                raise ValueError(
                    f"{name} has {datum.shape[0]} rows, which do not divide the batch of {self.batch_size}."
                )

    @property
    def traits(self) -> Traits:
        return self.structure.traits

    def with_data(self, data: ConicData) -> ConicProblem:
        """The same problems with other data of the same shapes."""
        return replace(self, data=data)

    @property
    def datum_ndims(self) -> tuple[int, ...]:
        """All data are vectors."""
        return (1,) * len(self.data)

    def lanes(self, count: int, data: ConicData) -> ConicProblem:
        """``count`` copies of this batch, one after the other; data with as many rows as before serve all of them."""
        return replace(self, data=data, batch_size=count * self.batch_size)

    @property
    def device(self) -> torch.device:
        return self.data.q.device

    @cached_property
    def symmetric_P(self) -> Tensor:
        """Values of ``½ (P + Pᵀ)`` on the pattern, with the leading shape of P: what every solver sees."""
        P = self.data.P
        if self.structure.quadratic.is_dense and not P.requires_grad:
            square = P.reshape(*P.shape[:-1], self.structure.n, self.structure.n)
            if is_symmetric(square):  # as most are: nothing is written
                return P
        return _memo(P, self.structure.digest, lambda: self.structure.plus_transposed(0.5 * P))

    def full_bounds(self) -> tuple[Tensor, Tensor]:
        """``lower`` and ``upper`` for all variables, infinite where there is none: (B, n) each, to be read only."""
        differentiated = self.data.lower.requires_grad or self.data.upper.requires_grad
        return self._with_absent_bounds() if differentiated else self._plain_bounds

    _plain_bounds = cached_property(lambda self: self._with_absent_bounds())

    def _with_absent_bounds(self) -> tuple[Tensor, Tensor]:
        def full(values: Tensor, name: str, nothing: float) -> Tensor:
            bound = values.new_full((*values.shape[:-1], self.structure.n), nothing)
            bound[..., self.structure.index(name, self.device)] = values
            return per_element(bound, self.batch_size)

        return full(self.data.lower, "lower_index", -torch.inf), full(self.data.upper, "upper_index", torch.inf)

    def slack(self, x: Tensor) -> Tensor:
        """``s = b - A x``: (B, n) to (B, m)."""
        return per_element(self.data.b, self.batch_size) - self.structure.constraint.matvec(self.data.A, x)

    def quadratic_product(self, x: Tensor) -> Tensor:
        """``½ (P + Pᵀ) x``: (B, n) to (B, n)."""
        return self.structure.quadratic.matvec(self.symmetric_P, x)

    def objective(self, x: Tensor) -> Tensor:
        """``½ xᵀP x + qᵀx``: (B, n) to (B,)."""
        return (x * (0.5 * self.quadratic_product(x) + per_element(self.data.q, self.batch_size))).sum(-1)

    def lagrangian(self, point: ConicPoint) -> Tensor:
        """``L(x, y, z)`` of the module's docstring: (B,).  Infinite bounds count as absent."""
        lower, upper = (torch.nan_to_num(bound, posinf=0.0, neginf=0.0) for bound in self.full_bounds())
        bound_terms = point.z * point.x - upper * point.z.clamp(min=0) + lower * (-point.z).clamp(min=0)
        return self.objective(point.x) - (point.y * self.slack(point.x)).sum(-1) + bound_terms.sum(-1)

    # -- the two changes an oracle must solve again after ------------------------------------------------------

    def tilt(self, step: Tensor, cotangent: ConicPoint) -> ConicProblem:
        """``L + step (<g_x, x> + <g_y, y> + <g_z, z>)``: only linear terms move ([LPGD] eqs. 79-82).

        ``q + step g_x``, ``b - step g_y``, and both bounds of a variable by ``-step g_z``.

        Args:
            step: (k B,) signed step of each element: τ for the lower, -τ for the upper envelope.  With
                k > 1 the new batch is k copies of this one, one after the other.
            cotangent: (B, ·) each.
        """
        copies = step.shape[0] // self.batch_size if self.batch_size else 1

        def moved(datum: Tensor, direction: Tensor, sign: float) -> Tensor:
            if not torch.any(direction):
                return datum
            repeated = per_element(datum, self.batch_size).repeat(copies, 1)
            return repeated + sign * step[:, None] * direction.repeat(copies, 1)

        lower_index, upper_index = (self.structure.index(name, self.device) for name in _BOUND_INDICES)
        data = self.data._replace(
            q=moved(self.data.q, cotangent.x, 1.0),
            b=moved(self.data.b, cotangent.y, -1.0),
            lower=moved(self.data.lower, cotangent.z[:, lower_index], -1.0),
            upper=moved(self.data.upper, cotangent.z[:, upper_index], -1.0),
        )
        return replace(self, data=data, batch_size=step.shape[0])

    def augment(self, rho: float, center: Tensor) -> ConicProblem:
        """``L + (ρ/2) |x - center|²`` up to a constant: ``P + ρ I``, ``q - ρ center`` ([LPGD] eq. 28).

        Args:
            rho: ρ ≥ 0, not scaled by any step.
            center: (B, n); its solution stays optimal if it is one of this problem.  The values of rows with two ends
                are no variables of the problem that is meant, and stay out.
        """
        if rho == 0.0:
            return self
        structure = self.structure.with_diagonal
        variables = np.arange(structure.own)
        diagonal = structure.quadratic.positions(variables, variables)
        place = structure.quadratic.positions(self.structure.quadratic.rows, self.structure.quadratic.columns)
        P = self.data.P.new_zeros(*self.data.P.shape[:-1], structure.quadratic.nnz)
        P[..., from_numpy(place).to(self.device)] = self.data.P
        P[..., from_numpy(diagonal).to(self.device)] += rho
        q = per_element(self.data.q, self.batch_size).clone()
        q[:, : structure.own] -= rho * center[:, : structure.own]
        return ConicProblem(structure, self.data._replace(P=P, q=q), self.batch_size)

    # -- derivatives of the Lagrangian ------------------------------------------------------------------------

    def gradient_difference(self, plus: ConicPoint, minus: ConicPoint, weight: Tensor) -> ConicData:
        """``weight (∇_w L(plus) - ∇_w L(minus))`` for all data w, summed over elements that share a datum.

        ``dP = ½ Δ(x xᵀ)``, ``dq = Δx``, ``dA = Δ(y xᵀ)``, ``db = -Δy``, ``d upper = -Δ max(z, 0)``,
        ``d lower = Δ max(-z, 0)``.  Products are differenced as ``Δy x̄ᵀ + ȳ Δxᵀ`` with mid-points, which
        is exact and does not cancel.

        Args:
            plus, minus: points of B elements.
            weight: (B,).

        Returns:
            The gradient, each field of the shape of the problem's own.
        """
        dx, dy = weight[:, None] * (plus.x - minus.x), weight[:, None] * (plus.y - minus.y)
        x_mid, y_mid = 0.5 * (plus.x + minus.x), 0.5 * (plus.y + minus.y)
        if not self.structure.has_bounds:
            return self.bilinear_gradient(dx, dy, x_mid, y_mid, plus.z, plus.z)
        d_upper = weight[:, None] * (minus.z.clamp(min=0) - plus.z.clamp(min=0))
        d_lower = weight[:, None] * ((-plus.z).clamp(min=0) - (-minus.z).clamp(min=0))
        return self.bilinear_gradient(dx, dy, x_mid, y_mid, d_lower, d_upper)

    def bilinear_gradient(
        self, dx: Tensor, dy: Tensor, x: Tensor, y: Tensor, d_lower: Tensor, d_upper: Tensor
    ) -> ConicData:
        """``<∇²_{wz} L(x, y), (dx, dy)>``: the gradient of the Lagrangian's data along a change of the point.

        ``dP = ½ (dx xᵀ + x dxᵀ)``, ``dq = dx``, ``dA = dy xᵀ + y dxᵀ``, ``db = -dy``; the bounds' parts are given.
        Shapes: (B, n) or (B, m) each; the result has those of the data, sums over shared ones included, and zeros in
        matrices whose gradient is not wanted.
        """
        structure = self.structure
        row_counts = {name: datum.shape[0] if datum.ndim == 2 else None for name, datum in self.data._asdict().items()}
        P, A = (datum.new_zeros(()).expand(datum.shape) for datum in (self.data.P, self.data.A))  # without memory
        if structure.quadratic.nnz and needs_gradient("P"):
            P = structure.symmetric_outer(0.5 * dx, x, row_counts["P"])
        if needs_gradient("A"):  # both terms in one product: elements B + i belong to the row of i
            A = structure.constraint.outer(torch.cat([dy, y]), torch.cat([x, dx]), row_counts["A"])

        def of_bounds(bound: Tensor, change: Tensor, name: str) -> Tensor:
            if not bound.shape[-1]:
                return torch.zeros_like(bound)
            index = structure.index(f"{name}_index", self.device)
            return torch.where(torch.isfinite(bound), _sum_rows(change[:, index], row_counts[name]), 0.0)

        return ConicData(
            P, _sum_rows(dx, row_counts["q"]), A, _sum_rows(-dy, row_counts["b"]),
            lower=of_bounds(self.data.lower, d_lower, "lower"),
            upper=of_bounds(self.data.upper, d_upper, "upper"),
        )  # fmt: skip

    def mixed_product(self, point: ConicPoint, tangent: ConicData) -> ConicPoint:
        """``∇_z <∇_w L(point), dw>`` for a tangent dw of the data: the tilt of forward mode.

        ``(dP x + dAᵀy + dq, dA x - db)`` with dP symmetrised, and for the bound multipliers ``-d upper``
        where z > 0, ``-d lower`` elsewhere on bounded variables.
        """
        structure, size = self.structure, self.batch_size
        dP = 0.5 * (tangent.P + structure.transposed(tangent.P))
        x_part = structure.quadratic.matvec(dP, point.x) + structure.constraint.rmatvec(tangent.A, point.y)
        y_part = structure.constraint.matvec(tangent.A, point.x) - per_element(tangent.b, size)
        d_lower, d_upper = (point.x.new_zeros(size, structure.n) for _ in range(2))
        d_lower[:, structure.index("lower_index", self.device)] = per_element(tangent.lower, size)
        d_upper[:, structure.index("upper_index", self.device)] = per_element(tangent.upper, size)
        z_part = torch.where(point.z > 0, -d_upper, -d_lower)
        return ConicPoint(x_part + per_element(tangent.q, size), y_part, z_part)

    # -- batches ----------------------------------------------------------------------------------------------

    def select(self, elements: Tensor) -> ConicProblem:
        """The batch of these elements; shared data, and rows that are all wanted in order, are not copied."""

        def chosen(datum: Tensor) -> Tensor:
            if datum.ndim == 1:
                return datum
            rows = elements % max(datum.shape[0], 1)
            whole = torch.arange(datum.shape[0], device=self.device)
            return datum if torch.equal(rows, whole) else datum[rows]

        data = ConicData(*(chosen(datum) for datum in self.data))
        return replace(self, data=data, batch_size=len(elements))

    def between(self, start: int, stop: int) -> ConicProblem:
        """The batch of the elements from ``start`` to ``stop``, whose data are views of these."""

        def chosen(datum: Tensor) -> Tensor:
            if datum.ndim == 1 or (stop - start) % len(datum) == start % len(datum) == 0:
                return datum
            if len(datum) == self.batch_size:
                return datum[start:stop]
            return datum[torch.arange(start, stop, device=self.device) % len(datum)]

        return replace(self, data=ConicData(*(chosen(datum) for datum in self.data)), batch_size=stop - start)

    def scatter(self, elements: Tensor, data: ConicData) -> ConicData:
        """A gradient of the data of ``select(elements)`` as one of this batch's: zero for the other elements."""
        full = self.zero_gradient()
        return ConicData(
            *(
                gradient if total.ndim == 1 else total.index_add(0, elements % max(total.shape[0], 1), gradient)
                for total, gradient in zip(full, data, strict=True)
            )
        )

    def zero_gradient(self) -> ConicData:
        """A gradient of the data that is zero."""
        return ConicData(*(torch.zeros_like(datum) for datum in self.data))

    @cached_property
    def units(self) -> Units:
        """The units in which the data are of order 1."""
        return Units.of(self)

    @property
    def has_plain_units(self) -> bool:
        """Whether the units are known already, and all of them are 1."""
        return "units" in self.__dict__ and self.units.is_trivial

    def in_own_units(self, point: ConicPoint) -> ConicPoint:
        """A point, (B, ·) each, in which all variables count alike: in :attr:`units`."""
        return self.units.point_in(self, point)

    def observed(self, point: ConicPoint, at: ConicPoint, *, own_units: bool = True) -> ConicPoint:
        """What of x and y anybody sees, (B, ·), with z: see :class:`~lpgd.problems.conic.observed.Observed`."""
        values, observed = self.in_own_units(point) if own_units else point, self.structure.observed
        if observed is None:
            return values
        unit = self.units.ones_out(self)
        if not own_units:
            unit = ConicPoint(*(torch.ones_like(tensor) for tensor in unit))
        at = self.in_own_units(at)
        return ConicPoint(observed.in_x(values.x, at.y, unit.x), observed.in_y(values.y, at.x, unit.y), values.z)

    def tilt_unit(self, point: ConicPoint, cotangent: ConicPoint) -> Tensor:
        """(B,) the step at which a tilt is as large as the terms that it changes, in the maximum norm in own units.

        ``max(|q|, |P| |x|, |Aᵀy|, |z|) / |g_x|`` and, for dual losses, ``max(|b|, |A| |x|) / |g_y|`` and
        ``|x| / |g_z|``, the least of them; a numerator of 0 counts as 1.  Infinite where the cotangent is 0.  Products
        of norms are what terms are made of: that P x or A x cancels, as at a minimum without constraints, makes none.
        """
        problem = self.units.apply(self)
        point, cotangent = self.units.point_in(self, point), self.units.tilt_in(self, cotangent)
        data, size = problem.data, problem.batch_size
        x = maximum_norm(point.x)
        units = torch.full((size,), torch.inf, dtype=x.dtype, device=self.device)
        if bool(cotangent.x.any()):
            force, z = problem.structure.constraint.rmatvec(data.A, point.y), maximum_norm(point.z)
            terms = [_norms(data.q, size), _norms(problem.symmetric_P, size) * x, maximum_norm(force), z]
            units = _share(terms, cotangent.x)
        if bool(cotangent.y.any()):
            units = torch.minimum(units, _share([_norms(data.b, size), _norms(data.A, size) * x], cotangent.y))
        return torch.minimum(units, _share([x], cotangent.z)) if bool(cotangent.z.any()) else units

    def stays_still(self, cotangent: ConicPoint, change: ConicPoint) -> bool:
        """Whether this is a linear program whose solution does not move with its cost, though a loss would like it to.

        An exact gradient of zero with respect to the cost is then right, and teaches nothing.
        """
        if not self.traits.is_linear_program or self.batch_size == 0 or cotangent.y.any():
            return False
        size = cotangent.x.abs().amax()
        return bool(size > 0 and change.x.abs().amax() <= 1e-9 * size and self.would_move(cotangent).any())

    def would_move(self, cotangent: ConicPoint) -> Tensor:
        """(B,) whether a tilt of a linear program's cost may change its solution: it is not a multiple of the cost."""
        q, g = per_element(self.data.q, self.batch_size), cotangent.x
        multiple = (g * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True).clamp(min=1e-300)
        return maximum_norm(g - multiple * q) > 1e-9 * maximum_norm(g)

    def finite(self) -> Tensor:
        """(B,) whether an element's data are finite; bounds may be infinite on their own side."""
        valid = torch.ones(self.batch_size, dtype=torch.bool, device=self.device)
        checks = [_memo(matrix, "finite", partial(_finite_rows, matrix)) for matrix in (self.data.P, self.data.A)]
        checks += [_finite_rows(vector) for vector in (self.data.q, self.data.b)]
        checks += [(bound < torch.inf).all(-1, keepdim=True) for bound in (self.data.lower, -self.data.upper)]
        for check in checks:
            valid &= per_element(check, self.batch_size)[:, 0]
        return valid


_memo = TensorMemo()


def _finite_rows(datum: Tensor) -> Tensor:
    sums = torch.isfinite(datum.sum(-1, keepdim=True))  # a sum passes on what is not finite, at a tenth of the cost
    return sums if bool(sums.all()) else torch.isfinite(datum).all(-1, keepdim=True)


_BOUND_INDICES = ("lower_index", "upper_index")


def _share(terms: list[Tensor], direction: Tensor) -> Tensor:
    """(B,) the largest of terms, (B,) or (1,), over the norm of a direction (B, ·)."""
    return torch.where((largest := reduce(torch.maximum, terms)) > 0, largest, 1.0) / maximum_norm(direction)


def _norms(datum: Tensor, size: int) -> Tensor:
    """(B,) the largest magnitude of a datum of each element, or (1,) where it is shared."""
    norms = torch.atleast_1d(maximum_norm(datum)) if datum.device.type != "cpu" or not datum.shape[-1] else None
    if norms is None:
        values = np.atleast_2d(datum.detach().numpy())  # twice read, and nothing written
        norms = from_numpy(np.maximum(values.max(-1), -values.min(-1)))
    return norms if norms.shape[0] in (1, size) else norms.repeat(size // norms.shape[0])


def _sum_rows(terms: Tensor, count: int | None) -> Tensor:
    if count is None:
        return terms.sum(0)
    return terms if count == terms.shape[0] else terms.reshape(-1, count, terms.shape[-1]).sum(0)
