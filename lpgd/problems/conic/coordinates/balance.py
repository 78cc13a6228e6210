"""The coordinates of a batch of conic programs, which :mod:`~lpgd.problems.conic.coordinates.balancing` finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, from_numpy
from lpgd.problems.conic.coordinates.automorphisms import Mixed, rotated
from lpgd.problems.conic.coordinates.balancing import Balancing
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicData, ConicPoint, ConicStructure, per_element

__all__ = ["Balance"]


@dataclass(frozen=True, eq=False)
class Balance:
    """The coordinates of a batch of B elements; with one row of exponents they are those of all elements.

    Attributes:
        balancing: what they are coordinates of.
        size: B.
        exponents: (1 or B, n + parameters) of two, of variables and of automorphisms.
        row_exponents: (1 or B, m) what these are of the rows; of a rotated second-order cone those of ``s₀ + s₁`` and
            of ``s₀ - s₁`` stand in the first two.
        origin: (1 or B, n) points that are zero there, with as many rows as there are exponents; None where it is 0.
    """

    balancing: Balancing
    size: int
    exponents: Tensor
    row_exponents: Tensor
    origin: Tensor | None = None

    @classmethod
    def of(cls, balancing: Balancing, size: int, exponents: FloatArray, origin: FloatArray | None = None) -> Balance:
        """The coordinates of these exponents."""
        rows = balancing.rows_of(exponents)
        numbers = (exponents, rows) if origin is None else (exponents, rows, origin)
        return cls(balancing, size, *(from_numpy(np.ascontiguousarray(values)) for values in numbers))

    @cached_property
    def variable(self) -> Tensor:
        """(1 or B, n) factors D."""
        return torch.exp2(self.exponents[:, : self.balancing.structure.n])

    @cached_property
    def row(self) -> Tensor:
        """(1 or B, m) factors of the rows."""
        return torch.exp2(self.row_exponents)

    @cached_property
    def shift(self) -> Tensor:
        """(1 or B, exponential cones) the numbers c."""
        first, third = (from_numpy(self.balancing.triples + number).to(self.row_exponents.device) for number in (0, 2))
        return math.log(2.0) * (self.row_exponents[:, third] - self.row_exponents[:, first])

    @property
    def structure(self) -> ConicStructure:
        """Of the program in these coordinates."""
        return self.balancing.wider

    def problem(self, data: ConicData) -> ConicProblem:
        """The batch in these coordinates."""
        return ConicProblem(self.structure, self.apply(data), self.size)

    def to(self, device: torch.device) -> Balance:
        """The same on a device."""
        origin = None if self.origin is None else self.origin.to(device)
        exponents, rows = self.exponents.to(device), self.row_exponents.to(device)
        return replace(self, exponents=exponents, row_exponents=rows, origin=origin)

    def for_rows_alone(self) -> Balance:
        """The same with variables as they are."""
        exponents = self.exponents.clone()
        exponents[:, : self.balancing.structure.n] = 0.0
        return replace(self, exponents=exponents, origin=None)

    def plain(self) -> Balance:
        """The coordinates that the batch has by itself, on the wider pattern."""
        zeros = (torch.zeros_like(self.exponents), torch.zeros_like(self.row_exponents))
        return Balance(self.balancing, self.size, *zeros)

    def select(self, elements: Tensor) -> Balance:
        """Those of some elements."""
        tensors = (self.exponents, self.row_exponents, self.origin)
        own = (tensor if tensor is None or tensor.shape[0] == 1 else tensor[elements] for tensor in tensors)
        exponents, rows, origin = own
        assert exponents is not None
        assert rows is not None
        return Balance(self.balancing, elements.shape[0], exponents, rows, origin)

    def where(self, elements: list[int], other: Balance) -> Balance:
        """These coordinates, and other ones for some elements."""

        def chosen(factors: Tensor, others: Tensor) -> Tensor:
            factors = per_element(factors, self.size).clone()
            factors[elements] = per_element(others, self.size)[elements]
            return factors

        nothing, origin = self.exponents.new_zeros(1, self.balancing.structure.n), None
        if self.origin is not None or other.origin is not None:
            origin = chosen(*(nothing if one.origin is None else one.origin for one in (self, other)))
        return replace(
            self,
            exponents=chosen(self.exponents, other.exponents),
            row_exponents=chosen(self.row_exponents, other.row_exponents),
            origin=origin,
        )

    def apply(self, data: ConicData) -> ConicData:
        """The data in these coordinates, differentiably; what is shared stays so if the factors are."""
        structure, device = self.structure, data.q.device
        if self.row.shape[0] > 1:
            data = ConicData(*(per_element(datum, self.size) for datum in data))
        if self.origin is not None:
            data = self._moved(data, self._like(self.origin, data.b))
        P, q, A, b, lower, upper = data
        if structure is not self.balancing.structure:
            places = from_numpy(self.balancing.places).to(device)
            A = A.new_zeros(*A.shape[:-1], structure.constraint.nnz).index_copy(-1, places, A)
        constraint, quadratic = structure.constraint, structure.quadratic
        columns, rows, first, second = (
            from_numpy(index).to(device)
            for index in (constraint.columns, constraint.rows, quadratic.rows, quadratic.columns)
        )
        D, E = self._like(self.variable, A), self._like(self.row, A)
        P_factors, q_factors = (self._like(self.variable, datum) for datum in (P, q))
        return ConicData(
            P * P_factors[..., first] * P_factors[..., second],
            q * q_factors,
            self._turned(A * D[..., columns], E[..., rows], self.balancing.entries),
            self._turned(b, self._like(self.row, b), self.balancing.firsts),
            lower / self._like(self.variable, lower)[..., structure.index("lower_index", device)],
            upper / self._like(self.variable, upper)[..., structure.index("upper_index", device)],
        )

    def point_out(self, point: ConicPoint) -> ConicPoint:
        """A point in these coordinates as one of the program itself, differentiably."""
        x, y, z = point
        if self.balancing.triples.size:
            first, second = (from_numpy(self.balancing.triples + number).to(y.device) for number in (0, 1))
            y = y.index_add(-1, second, self.shift * (self.row * y)[..., first] / self.row[..., second])
        x = x * self.variable if self.origin is None else x * self.variable + self.origin
        return ConicPoint(x, rotated(y, self.row, self.balancing.firsts), z / self.variable)

    def slack_out(self, slack: Tensor) -> Tensor:
        """A slack in these coordinates as one of the program itself."""
        slack = rotated(slack, 1.0 / self.row, self.balancing.firsts)
        if self.balancing.triples.size:
            first, second = (from_numpy(self.balancing.triples + number).to(slack.device) for number in (0, 1))
            slack = slack.index_add(-1, first, -self.shift * slack[..., second])
        return slack

    def _moved(self, data: ConicData, origin: Tensor) -> ConicData:
        """The data of the same program in ``x - origin``."""
        structure, device = self.balancing.structure, data.q.device
        quadratic, constraint, size = structure.quadratic, structure.constraint, 1 if origin.ndim == 1 else self.size
        there = per_element(origin, size)
        P, A = (datum if datum.ndim == 1 else per_element(datum, size) for datum in (data.P, data.A))
        push = 0.5 * (quadratic.matvec(P, there) + quadratic.rmatvec(P, there)) if quadratic.nnz else None
        used = constraint.matvec(A, there)
        lower, upper = (origin[..., structure.index(name, device)] for name in ("lower_index", "upper_index"))
        return data._replace(
            q=data.q if push is None else data.q + push.reshape(*origin.shape[:-1], -1),
            b=data.b - used.reshape(*origin.shape[:-1], -1),
            lower=data.lower - lower,
            upper=data.upper - upper,
        )

    def _turned(self, values: Tensor, factors: Tensor, entries: Mixed) -> Tensor:
        """``T`` times values, of A or of b."""
        if entries.sheared.size:
            onto, of, cone = (
                from_numpy(index).to(values.device) for index in (entries.sheared, entries.sheared_by, entries.cone)
            )
            values = values.index_add(-1, onto, self._like(self.shift, values)[..., cone] * values[..., of])
        return rotated(values, factors, entries)

    @staticmethod
    def _like(factors: Tensor, datum: Tensor) -> Tensor:
        """Factors as a vector where the datum is shared."""
        return factors[0] if datum.ndim == 1 else factors
