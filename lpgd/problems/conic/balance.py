"""The coordinates of a batch of conic programs: see :mod:`lpgd.problems.conic.balancing`, which finds them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.problems.conic.automorphisms import Mixed, rotated
from lpgd.problems.conic.balancing import Balancing
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicData, ConicPoint, ConicStructure, per_element

__all__ = ["Balance"]


@dataclass(frozen=True, eq=False)
class Balance:
    """The coordinates of a batch of B elements; with one row of factors they are those of all elements.

    Attributes:
        balancing: what they are coordinates of.
        size: B.
        variable: (1 or B, n) factors D.
        row: (1 or B, m) factors of the rows; of a rotated second-order cone those of ``s₀ + s₁`` and of ``s₀ - s₁``
            stand in the first two.
        shift: (1 or B, exponential cones) the numbers c.
    """

    balancing: Balancing
    size: int
    variable: Tensor
    row: Tensor
    shift: Tensor

    @property
    def structure(self) -> ConicStructure:
        """Of the program in these coordinates."""
        return self.balancing.wider

    def problem(self, data: ConicData) -> ConicProblem:
        """The batch in these coordinates."""
        return ConicProblem(self.structure, self.apply(data), self.size)

    def for_rows_alone(self) -> Balance:
        """The same with variables as they are."""
        return replace(self, variable=torch.ones_like(self.variable))

    def plain(self) -> Balance:
        """The coordinates that the batch has by itself, on the wider pattern."""
        return replace(
            self,
            variable=torch.ones_like(self.variable),
            row=torch.ones_like(self.row),
            shift=torch.zeros_like(self.shift),
        )

    def where(self, elements: list[int], other: Balance) -> Balance:
        """These coordinates, and other ones for some elements."""

        def chosen(factors: Tensor, others: Tensor) -> Tensor:
            factors = per_element(factors, self.size).clone()
            factors[elements] = per_element(others, self.size)[elements]
            return factors

        return replace(
            self,
            variable=chosen(self.variable, other.variable),
            row=chosen(self.row, other.row),
            shift=chosen(self.shift, other.shift),
        )

    def apply(self, data: ConicData) -> ConicData:
        """The data in these coordinates, differentiably; what is shared stays so if the factors are."""
        structure, device = self.structure, data.q.device
        if self.row.shape[0] > 1:
            data = ConicData(*(per_element(datum, self.size) for datum in data))
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
        return ConicPoint(x * self.variable, rotated(y, self.row, self.balancing.firsts), z / self.variable)

    def slack_out(self, slack: Tensor) -> Tensor:
        """A slack in these coordinates as one of the program itself."""
        slack = rotated(slack, 1.0 / self.row, self.balancing.firsts)
        if self.balancing.triples.size:
            first, second = (from_numpy(self.balancing.triples + number).to(slack.device) for number in (0, 1))
            slack = slack.index_add(-1, first, -self.shift * slack[..., second])
        return slack

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
