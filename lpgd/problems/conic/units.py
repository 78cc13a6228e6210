"""Units of a batch of conic programs: powers of two in which its data, and mostly its solutions, are of order 1.

With positive ``D`` (one factor for each variable), ``E`` (one for each row, equal within a cone), a length ``β`` and a
factor ``σ`` of the objective,

    x = β D x̂,   y = E ŷ / (σ β),   z = ẑ / (σ β D),   s = β E⁻¹ ŝ

turn ``minimise ½xᵀP x + qᵀx  s.t.  A x + s = b, s ∈ K, lower ≤ x ≤ upper`` into the same problem with

    P̂ = σ β² D P D,   q̂ = σ β D q,   Â = E A D,   b̂ = E b / β,   bounds / (β D)

whose Lagrangian is ``σ`` times the old one.  Powers of two make all of this exact.  Solvers see problems in these
units, and residuals and active sets are judged in them: absolute tolerances mean the same for all data.

Data that are of order 1 already are left alone, so that matrices and prepared solvers are shared as they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.execution.memo import TensorMemo
from lpgd.problems.conic.magnitudes import (
    lonely_units,
    lonely_variables,
    matrix_units,
    pairs,
    repeated,
    times,
    vector_units,
)
from lpgd.problems.conic.structure import ConicData, ConicPoint, per_element

if TYPE_CHECKING:
    from lpgd.problems.conic.problem import ConicProblem

__all__ = ["Units"]


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a batch of B problems (see the module's docstring), all of them powers of two.

    Attributes:
        variable: (1 or R, n) factors D, R dividing B; None where all are 1.
        row: (1 or R, m) factors E; None where all are 1.
        length: (B, 1) β; None where all are 1.
        cost: (B, 1) σ; None where all are 1.
        alone: (B, n) further factors of variables that no matrix involves, which leave shared matrices shared; None
            where all are 1.
    """

    variable: Tensor | None = None
    row: Tensor | None = None
    length: Tensor | None = None
    cost: Tensor | None = None
    alone: Tensor | None = None

    @classmethod
    def of(
        cls,
        problem: ConicProblem,
        exponents: Tensor | None = None,
        lengths: Tensor | None = None,
        apart: Tensor | None = None,
    ) -> Units:
        """The units of a problem.

        Args:
            problem: B elements with finite data.
            exponents: (B, 2) exponents of ``length`` and ``cost`` that a warm-start state is in, NaN where there is
                none; they are kept where the data still allow.
            lengths: (B,) exponents of ``length`` to take, of a solution say; NaN leaves the choice to the data.
            apart: (B, m) rows that say nothing of ``variable``.
        """
        if problem.batch_size == 0 or problem.structure.n == 0:
            return cls()
        if problem.structure.has_integers:  # whole numbers have a unit of their own
            lengths = torch.zeros(problem.batch_size, dtype=torch.float64)
        variable, row = matrix_units(problem, apart)
        lonely = lonely_variables(problem, variable)
        alone = None if lonely is None else lonely_units(problem, variable, lonely)
        length, cost = vector_units(problem, variable, row, lonely, alone, exponents, lengths)
        return cls(variable, row, length, cost, alone)

    @cached_property
    def is_trivial(self) -> bool:
        """Whether all factors are 1."""
        return all(factors is None for factors in (self.variable, self.row, self.length, self.cost, self.alone))

    def plain(self, size: int) -> Tensor:
        """(B,) elements all of whose factors are 1."""
        found = torch.ones(size, dtype=torch.bool)
        for factors in (self.variable, self.row, self.length, self.cost, self.alone):
            if factors is not None:
                found = found.to(factors.device) & (repeated(factors, size) == 1.0).all(-1)
        return found

    @property
    def keeps_matrices(self) -> bool:
        """Whether P and A are those of the problem up to a factor of P."""
        return self.variable is None and self.row is None

    def select(self, elements: Tensor) -> Units:
        """The units of these elements."""

        def chosen(factors: Tensor | None) -> Tensor | None:
            if factors is None or factors.shape[0] == 1:
                return factors
            return factors[elements.to(factors.device) % factors.shape[0]]

        return Units(*(chosen(factors) for factors in (self.variable, self.row, self.length, self.cost, self.alone)))

    def exponents(self, batch_size: int) -> Tensor:
        """(B, 2) exponents of ``length`` and ``cost``."""
        columns = [
            torch.zeros(batch_size, 1) if factors is None else torch.log2(factors).cpu().expand(batch_size, 1)
            for factors in (self.length, self.cost)
        ]
        return torch.cat([column.double() for column in columns], 1)

    # -- problems -------------------------------------------------------------------------------------------------

    def apply(self, problem: ConicProblem) -> ConicProblem:
        """The problem in these units; data that no factor touches are the same tensors.

        What is asked for again, as it is by the backward pass, are the same tensors, too.
        """
        if self.is_trivial:
            return problem
        known: tuple[Units, ConicProblem] | None = problem.__dict__.get("_in_units")
        if known is None or known[0] is not self:
            known = self, self._applied(problem)
            if not any(datum.requires_grad for datum in problem.data):
                problem.__dict__["_in_units"] = known
        return known[1]

    def _applied(self, problem: ConicProblem) -> ConicProblem:
        structure, data, size = problem.structure, problem.data, problem.batch_size
        P, A = data.P, data.A
        if structure.quadratic.nnz:
            if self.variable is not None:
                pair = pairs(self.variable, structure.quadratic.rows, structure.quadratic.columns)
                P = _memo(P, ("P", _key(self.variable)), partial(times, P, pair, size))
            factor = self._quadratic_factor(size)
            if factor is not None:
                # A factor that all elements share leaves a shared P shared.
                common = bool((factor == factor[0]).all())
                P = P * factor[0] if common else per_element(P, size) * factor
        if structure.constraint.nnz and not self.keeps_matrices:
            A = _memo(A, ("A", _key(self.variable), _key(self.row)), partial(self._constraint, problem))
        length, cost = self._length(problem), self._cost(problem)
        D, E = self.variable_of(problem), self.row_of(problem)
        lower_index, upper_index = (structure.index(f"{end}_index", problem.device) for end in ("lower", "upper"))
        scaled = ConicData(
            P=P,
            q=_over_batch(data.q, cost * length * D, size),
            A=A,
            b=_over_batch(data.b, E / length, size),
            lower=_over_batch(data.lower, 1.0 / (length * D)[:, lower_index], size),
            upper=_over_batch(data.upper, 1.0 / (length * D)[:, upper_index], size),
        )
        return replace(problem, data=scaled)

    def _constraint(self, problem: ConicProblem) -> Tensor:
        constraint, A, size = problem.structure.constraint, problem.data.A, problem.batch_size
        if self.variable is not None:
            A = times(A, self.variable[:, from_numpy(constraint.columns).to(A.device)], size)
        if self.row is not None:
            A = times(A, self.row[:, from_numpy(constraint.rows).to(A.device)], size)
        return A

    def _quadratic_factor(self, size: int) -> Tensor | None:
        if self.length is None and self.cost is None:
            return None
        one = torch.ones(size, 1, dtype=torch.float64)
        length, cost = (one if factors is None else factors for factors in (self.length, self.cost))
        factor = cost * length.to(cost.device) ** 2
        return None if bool((factor == 1.0).all()) else factor

    # -- points, tilts and changes --------------------------------------------------------------------------------

    def point_in(self, problem: ConicProblem, point: ConicPoint) -> ConicPoint:
        """A point of the problem, (B, ·) each, in these units."""
        if self.is_trivial:
            return point
        length, cost, D, E = self._length(problem), self._cost(problem), self.variable_of(problem), self.row_of(problem)
        return ConicPoint(point.x / (length * D), point.y * (cost * length) / E, point.z * (cost * length * D))

    def point_out(self, problem: ConicProblem, point: ConicPoint) -> ConicPoint:
        """A point, or a change of one, that is in these units, in the problem's own."""
        if self.is_trivial:
            return point
        length, cost, D, E = self._length(problem), self._cost(problem), self.variable_of(problem), self.row_of(problem)
        return ConicPoint(point.x * (length * D), point.y * E / (cost * length), point.z / (cost * length * D))

    def ones_out(self, problem: ConicProblem) -> ConicPoint:
        """(B, ·) what a point of ones in these units is in the problem's own."""
        like, shape = problem.data.q, (problem.batch_size, problem.structure.n)
        ones = ConicPoint(
            like.new_ones(shape), like.new_ones(problem.batch_size, problem.structure.m), like.new_ones(shape)
        )
        return self.point_out(problem, ones)

    def slack_in(self, problem: ConicProblem, slack: Tensor) -> Tensor:
        """A slack ``b - A x``, (B, m), in these units."""
        return slack if self.is_trivial else slack * self.row_of(problem) / self._length(problem)

    def slack_out(self, problem: ConicProblem, slack: Tensor) -> Tensor:
        """The inverse of :meth:`slack_in`."""
        return slack if self.is_trivial else slack * self._length(problem) / self.row_of(problem)

    def tilt_in(self, problem: ConicProblem, tilt: ConicPoint) -> ConicPoint:
        """A tilt ``<g, point>`` of the Lagrangian as one of ``σ`` times it, in these units."""
        if self.is_trivial:
            return tilt
        length, cost, D, E = self._length(problem), self._cost(problem), self.variable_of(problem), self.row_of(problem)
        return ConicPoint(tilt.x * (cost * length * D), tilt.y * E / length, tilt.z / (length * D))

    def _length(self, problem: ConicProblem) -> Tensor:
        return _one(problem) if self.length is None else self.length

    def _cost(self, problem: ConicProblem) -> Tensor:
        return _one(problem) if self.cost is None else self.cost

    def variable_of(self, problem: ConicProblem) -> Tensor:
        """(1 or B, n) factors D."""
        ones = problem.data.q.new_ones(1, problem.structure.n)
        shared = ones if self.variable is None else repeated(self.variable, problem.batch_size)
        return shared if self.alone is None else shared * self.alone

    def row_of(self, problem: ConicProblem) -> Tensor:
        """(1 or B, m) factors E."""
        if self.row is None:
            return problem.data.q.new_ones(1, problem.structure.m)
        return repeated(self.row, problem.batch_size)


_memo = TensorMemo()


def _key(factors: Tensor | None) -> bytes:
    return b"" if factors is None else factors.cpu().numpy().tobytes()


def _one(problem: ConicProblem) -> Tensor:
    return problem.data.q.new_ones(1, 1)


def _over_batch(datum: Tensor, factor: Tensor, size: int) -> Tensor:
    """The same, but only where a factor is not 1."""
    if datum.shape[-1] == 0 or bool((factor == 1.0).all()):
        return datum
    return times(datum, factor, size)
