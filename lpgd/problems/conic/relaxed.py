"""The closest feasible problem of a conic program, as a conic program of the same data, and solutions that have some.

A program may have no feasible point.  Its closest feasible problem moves right-hand sides and bounds as little as
possible: with the violation e of rows and bounds, in the units in which they are given,

    e* = argmin |e|²   such that some x has  A x + s = b + e,  s ∈ K,  lower - e_lower ≤ x ≤ upper + e_upper
    x* = argmin ½ xᵀP x + qᵀx   among those x.

e* is unique, as the norm is strictly convex, and depends on no order of the rows; multiply a row to weigh it.

**One program instead of two.**  The second of these problems has no interior, and its multipliers are not unique (with
y, ``y + t e*`` is one: ``Aᵀe* = 0`` and ``e*ᵀs = 0`` are the optimality conditions of the first), so that no solver
does well on it.  With a weight w > 0 and any λ,

    minimise  w (½ xᵀP x + qᵀx + λᵀe) + ½ |e|²   subject to  A x - e + s = b,  s ∈ K,  x_i - e ≤ upper_i, …

always has feasible points and multipliers ``ỹ = e + w λ``, and is well posed.  Its conditions are those of the
closest feasible problem, whose multipliers are y = ỹ / w, but for ``e = w (y - λ)``: with λ = y* (one of the
multipliers, of which all ``y* + t e*`` are some) its solution is (x*, e*) itself, whatever w is; with λ = 0 it is off
by w |y*|, and ``ỹ = e* + w y*`` has y* for its slope.  So

- with the slope between two weights for λ the solution is off by O(w²), and by less each time: a method of
  multipliers, as that of Chiche and Gilbert, How the augmented Lagrangian algorithm can deal with an infeasible convex
  quadratic optimization problem (2016), but for multipliers that stay of order 1;
- the derivative of (x, e) with respect to the data, with λ and w held fixed, is off by O(w).

Where curved cones leave the second problem without multipliers, as ``y + t e*`` only come arbitrarily close to being
some for t → ∞, the solution is off by O(w).  The last w is that of :mod:`lpgd.solvers.relaxed`: a millionth of what
puts the objective on a par with the violation in units of order 1, and ten times that at curved cones.

(x*, e*) is continuous in b, q, P and bounds.  It jumps with A where rows that contradict each other depend on each
other exactly, as a row and its negative do, and a small change of A makes them independent: gradients with respect to
the entries of such rows are large, those of order 1 / w, unless changes keep the dependence.

Whatever the data are, they enter the new program linearly, so that its gradients are theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import IntArray, from_numpy, integers
from lpgd.problems.base import PointOperations, maximum_norm
from lpgd.problems.conic.magnitudes import INFINITE
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution, Violation
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicData, ConicPoint, ConicStructure, per_element
from lpgd.problems.solution import AnyProblem
from lpgd.status import Status

__all__ = ["RelaxedPoint", "RelaxedSolution", "RelaxedStructure", "relaxed_structure"]


class _RelaxedFields(NamedTuple):
    x: Tensor
    y: Tensor
    z: Tensor
    e: Tensor  # (B, r): rows that may be violated, then lower, then upper bounds


class RelaxedPoint(_RelaxedFields, PointOperations):
    """A point with the violation of what may be violated; also a cotangent or a tangent of it."""

    __slots__ = ()

    def violation(self, structure: ConicStructure) -> Violation:
        """The violation, by rows and bounds."""
        soft = structure.m - structure.two_sided
        lower_index, upper_index = (structure.index(name, self.e.device) for name in ("lower_index", "upper_index"))
        rows, low, high = self.e.split([soft, lower_index.shape[0], upper_index.shape[0]], -1)
        kept = structure.cones.zero - structure.two_sided
        hard = rows.new_zeros(rows.shape[0], structure.two_sided)
        nothing = self.e.new_zeros(self.e.shape[0], structure.n)
        square = self.e.square().sum(-1)
        violated = square > 0
        return Violation(
            torch.where(violated, torch.where(violated, square, 1.0).sqrt(), 0.0),
            torch.cat([rows[:, :kept], hard, rows[:, kept:]], -1),
            nothing.index_copy(-1, lower_index, low),
            nothing.index_copy(-1, upper_index, high),
        )


class RelaxedStructure:
    """How the program with violations is made of a program's data: bounds become rows, e are further variables.

    Rows are those of the zero and the nonnegative cone, lower bounds, upper bounds, and the other cones.  The rows that
    define the values of two-sided rows are not violated; the bounds of these values are.

    Args:
        base: of the program.
    """

    def __init__(self, base: ConicStructure) -> None:
        linear, low, high = base.cones.zero + base.cones.nonnegative, base.lower_index.size, base.upper_index.size
        ends = low + high
        self.base = base
        base_rows = np.arange(base.m)
        self.rows = base_rows + np.where(base_rows < linear, 0, ends)
        self.lower_rows, self.upper_rows = linear + np.arange(low), linear + low + np.arange(high)
        hard = np.arange(base.cones.zero - base.two_sided, base.cones.zero)
        self.soft = np.concatenate([self.rows[np.setdiff1d(base_rows, hard)], self.lower_rows, self.upper_rows])
        more, n, m = self.soft.size, base.n, base.m + ends
        rows = np.concatenate([self.rows[base.constraint.rows], self.lower_rows, self.upper_rows, self.soft])
        columns = [base.constraint.columns, base.lower_index, base.upper_index, n + np.arange(more)]
        column = np.concatenate(columns)
        order = np.lexsort((rows, column))
        self.place = np.argsort(order)
        diagonal = n + np.arange(more)
        quadratic = SparsityPattern(
            (n + more, n + more),
            np.concatenate([base.quadratic.rows, diagonal]),
            np.concatenate([base.quadratic.columns, diagonal]),
        )
        constraint = SparsityPattern((m, n + more), rows[order], column[order])
        cones = replace(base.cones, nonnegative=base.cones.nonnegative + ends)
        self.structure = ConicStructure(quadratic, constraint, cones)

    def weight(self, problem: ConicProblem, share: float) -> Tensor:
        """(B,) the weight of the objective at which, in units of order 1, it is a share of the violation."""
        units, size = problem.units, problem.batch_size
        one = problem.data.q.new_ones(1, 1)
        length, cost = (one if exponents is None else exponents for exponents in (units.length, units.cost))
        variable = units.variable_of(problem)
        row = one if units.row is None else units.row
        ends = np.concatenate([self.base.lower_index, self.base.upper_index])
        bounds = torch.log2(variable[:, from_numpy(ends).to(problem.device)])
        rows = -torch.log2(row.expand(row.shape[0], self.base.m))
        count = max(self.base.m + ends.size, 1)
        mean = (per_element(bounds, size).sum(-1) + per_element(rows, size).sum(-1)) / count
        return share * (cost[:, 0] * length[:, 0].square()) * torch.exp2(2 * mean)

    def problem(self, problem: ConicProblem, weight: Tensor, multipliers: Tensor) -> ConicProblem:
        """The program with violations of B elements, with λ (B, r)."""
        data = self.data(problem, problem.data, weight, constants=1.0)
        q = data.q.clone()
        q[:, self.base.n :] = weight[:, None] * multipliers
        return ConicProblem(self.structure, data._replace(q=q), problem.batch_size)

    def data(self, problem: ConicProblem, data: ConicData, weight: Tensor, constants: float) -> ConicData:
        """The new program's data of data, or of a tangent of them without ``constants``; one row for each element."""
        size, more, structure = problem.batch_size, self.soft.size, self.structure
        of_each = ConicData(*(per_element(datum, size) for datum in data))
        unit, scale = of_each.q.new_full((size, more), constants), weight[:, None]
        lower, upper, absent_lower, absent_upper = self._bounds(problem, of_each)
        ends = [
            torch.where(absent_lower, 0.0, -constants).to(of_each.q.dtype),
            torch.where(absent_upper, 0.0, constants).to(of_each.q.dtype),
        ]
        A = of_each.q.new_empty(size, structure.constraint.nnz)
        A[:, from_numpy(self.place).to(A.device)] = torch.cat([of_each.A, *ends, -unit], -1)
        b = of_each.b.new_empty(size, structure.m)
        for rows, values in ((self.rows, of_each.b), (self.lower_rows, -lower), (self.upper_rows, upper)):
            b[:, from_numpy(rows).to(b.device)] = values
        nothing = of_each.q.new_empty(0)
        return ConicData(
            P=torch.cat([scale * of_each.P, unit], -1),
            q=torch.cat([scale * of_each.q, of_each.q.new_zeros(size, more)], -1),
            A=A,
            b=b,
            lower=nothing,
            upper=nothing,
        )

    def _bounds(self, problem: ConicProblem, of_each: ConicData) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bounds, of which absent ones are those of a row that is met by far, and which are absent."""
        size = problem.batch_size
        bounds = [per_element(values, size) for values in (problem.data.lower, problem.data.upper)]
        absent = [bounds[0] <= -INFINITE, bounds[1] >= INFINITE]
        if not any(bool(values.any()) for values in absent):
            return of_each.lower, of_each.upper, absent[0], absent[1]
        finite = torch.cat([torch.where(values, 0.0, bound) for values, bound in zip(absent, bounds, strict=True)], -1)
        far = torch.maximum(maximum_norm(finite), maximum_norm(per_element(problem.data.b, size)))[:, None]
        far = torch.where(far > 0, far, 1.0)
        lower = torch.where(absent[0], -far, of_each.lower)
        return lower, torch.where(absent[1], far, of_each.upper), absent[0], absent[1]

    def gradient(self, problem: ConicProblem, gradient: ConicData, weight: Tensor) -> ConicData:
        """A gradient of the new program's data, (B, ·), as one of the program's: the transpose of :meth:`data`."""
        scale = weight[:, None]
        place = from_numpy(self.place[: self.base.constraint.nnz]).to(scale.device)
        rows, low, high = (
            gradient.b[:, from_numpy(places).to(scale.device)]
            for places in (self.rows, self.lower_rows, self.upper_rows)
        )
        each = ConicData(
            P=scale * gradient.P[:, : self.base.quadratic.nnz],
            q=scale * gradient.q[:, : self.base.n],
            A=gradient.A[:, place],
            b=rows,
            lower=torch.where(per_element(problem.data.lower, len(low)) <= -INFINITE, 0.0, -low),
            upper=torch.where(per_element(problem.data.upper, len(high)) >= INFINITE, 0.0, high),
        )
        return ConicData(
            *(values.sum(0) if datum.ndim == 1 else values for values, datum in zip(each, problem.data, strict=True))
        )

    def read(self, x: Tensor, y: Tensor, slack: Tensor) -> tuple[RelaxedPoint, Tensor]:
        """A point of the new program, with multipliers of the program's terms, as one of the program; its slack."""
        rows, low, high = (from_numpy(places).to(y.device) for places in (self.rows, self.lower_rows, self.upper_rows))
        z = y.new_zeros(y.shape[0], self.base.n)
        z.index_add_(1, self.base.index("upper_index", y.device), y[:, high])
        z.index_add_(1, self.base.index("lower_index", y.device), y[:, low], alpha=-1.0)
        return RelaxedPoint(x[:, : self.base.n], y[:, rows], z, x[:, self.base.n :]), slack[:, rows]

    def multipliers(self, point: ConicPoint, weight: Tensor) -> Tensor:
        """(B, ·) the multipliers ``ỹ / w`` of the closest feasible problem without what is along the violation."""
        soft, e = from_numpy(self.soft).to(point.x.device), point.x[:, self.base.n :]
        y = point.y / weight[:, None]
        along = (y[:, soft] * e).sum(-1, keepdim=True) / e.square().sum(-1, keepdim=True).clamp(min=1e-300)
        y[:, soft] -= along * e
        return y

    def tilt(self, cotangent: RelaxedPoint) -> ConicPoint:
        """A cotangent of (x, e) as one of the new program's point."""
        x = torch.cat([cotangent.x, cotangent.e], -1)
        return ConicPoint(x, x.new_zeros(x.shape[0], self.structure.m), torch.zeros_like(x))


relaxed_structure = lru_cache(64)(RelaxedStructure)
"""The :class:`RelaxedStructure` of a structure, worked out once."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class RelaxedSolution(ConicSolution):
    """Solutions of which those of infeasible elements are of their closest feasible problems.

    Attributes:
        e: (B, r) the violation of each element, zero for feasible ones; see :attr:`violation`.
        place: (B,) which of the solutions ``found`` is each element's, -1 for none.
        weights: (F,) their weights w.
        claims: B statuses that the solver gave.
        found: the solutions of the programs with violations, of F elements; None where there is none.
    """

    e: Tensor
    place: IntArray
    weights: Tensor
    claims: tuple[Status, ...]
    found: ConicSolution | None = None

    _tensors: ClassVar[tuple[str, ...]] = (*ConicSolution._tensors, "e", "place")
    _tuples: ClassVar[tuple[str, ...]] = (*ConicSolution._tuples, "claims")

    @property
    def outputs(self) -> RelaxedPoint:
        return RelaxedPoint(self.x, self.y, self.z, self.e)

    def cotangent(self, cotangents: Any) -> Any:
        return RelaxedPoint(*cotangents)

    @property
    def violation(self) -> Violation:
        """By how much each element violates its constraints."""
        return self.outputs.violation(self.problem.structure)

    @property
    def unrelaxed(self) -> ConicSolution:
        """What the solver said of the problems themselves: relaxed elements have no solution."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(ConicSolution)}
        values["statuses"] = self.claims
        return ConicSolution(**values)

    def select(self, elements: Tensor, problem: AnyProblem | None = None) -> Self:
        """The solutions of these elements, without their systems."""
        chosen = super().select(elements, problem)
        if self.found is None:
            return chosen
        kept = chosen.place[chosen.place >= 0]
        if not kept.size:
            return replace(chosen, found=None, weights=self.weights[:0])
        place = np.full(chosen.place.shape, -1)
        place[chosen.place >= 0] = np.arange(kept.size)
        index = from_numpy(kept).to(self.x.device)
        return replace(chosen, found=self.found.select(index), weights=self.weights[index], place=place)

    @property
    def relaxed(self) -> list[int]:
        """The elements that have the solution of their closest feasible problem."""
        return integers(from_numpy(np.flatnonzero(self.place >= 0)))
