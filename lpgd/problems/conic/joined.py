"""Two conic programs in one, with variables in common: a problem, and a function that another program is.

The second program's minimum, as a function of the variables that it shares, is added to the first one's objective:

    minimise    ½ xᵀP₁x + q₁ᵀx + s (½ wᵀP₂w + q₂ᵀw)
    subject to  both programs' constraints,  N w = M x

All of a solution's parts that belong to the first program are where :class:`Joined` says.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, cast

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, from_numpy
from lpgd.cones.product import Cones
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicData, ConicStructure, per_element

__all__ = ["Joined"]


@dataclass(frozen=True, eq=False)
class Joined:
    """How programs of two structures become one.

    Args:
        first, second: the structures; the first has no integers.
        M: (k, n₁) what the variables in common are of the first program's.
        N: (k, n₂) and of the second one's.

    Attributes:
        structure: of the joined programs.
        rows: (m₁,) where the first program's rows stand in theirs.
    """

    first: ConicStructure
    second: ConicStructure
    M: sp.csr_array
    N: sp.csr_array

    @cached_property
    def _count(self) -> int:
        return int(cast(Any, self.M).shape[0])

    @cached_property
    def cones(self) -> Cones:
        one, two = self.first.cones, self.second.cones
        sizes = {item.name: getattr(one, item.name) + getattr(two, item.name) for item in fields(Cones)}
        return Cones(**{**sizes, "zero": sizes["zero"] + self._count})

    @cached_property
    def _rows(self) -> tuple[IntArray, IntArray, IntArray]:
        """Where the rows of both, and those that link them, stand."""
        at, structures = self.cones.sections, (self.first, self.second)
        both = [np.zeros(structure.m, dtype=np.int64) for structure in structures]
        for name, section in at.items():
            start = section.start
            for places, structure in zip(both, structures, strict=True):
                cone = structure.cones.sections[name]
                places[cone] = start + np.arange(cone.stop - cone.start)
                start += cone.stop - cone.start
        count = self._count
        return both[0], both[1], at["zero"].stop - count + np.arange(count)

    @property
    def rows(self) -> IntArray:
        return self._rows[0]

    @cached_property
    def _links(self) -> tuple[IntArray, IntArray, FloatArray]:
        """Rows, columns and values of ``N w - M x``."""
        M, N = (_entries(matrix) for matrix in (self.M, self.N))
        link = self._rows[2]
        rows, columns = np.concatenate([link[M[0]], link[N[0]]]), np.concatenate([M[1], self.first.n + N[1]])
        return rows, columns, np.concatenate([-M[2], N[2]])

    @cached_property
    def _patterns(self) -> tuple[tuple[SparsityPattern, Tensor], tuple[SparsityPattern, Tensor]]:
        """The patterns of P and of A, and in which order the entries of both programs and of the links stand there."""
        one, two, n = self.first, self.second, self.first.n + self.second.n
        P = [
            np.concatenate([getattr(one.quadratic, name), one.n + getattr(two.quadratic, name)])
            for name in ("rows", "columns")
        ]
        A, B, (link_rows, link_columns, _) = one.constraint, two.constraint, self._links
        rows = np.concatenate([self._rows[0][A.rows], self._rows[1][B.rows], link_rows])
        columns = np.concatenate([A.columns, one.n + B.columns, link_columns])
        return _sorted((n, n), *P), _sorted((self.cones.rows, n), rows, columns)

    @cached_property
    def structure(self) -> ConicStructure:
        one, two, ((quadratic, _), (constraint, _)) = self.first, self.second, self._patterns
        return ConicStructure(
            quadratic,
            constraint,
            self.cones,
            np.concatenate([one.lower_index, one.n + two.lower_index]),
            np.concatenate([one.upper_index, one.n + two.upper_index]),
        )

    def problem(self, first: ConicProblem, data: ConicData, steps: Tensor) -> ConicProblem:
        """The joined programs of a batch.

        Args:
            first: B programs of the first structure.
            data: of the second one; shared, or with rows that divide B.
            steps: (B,) s.
        """
        one, two, size = first.data, data, first.batch_size
        same = bool((steps == steps[:1]).all())
        scale = steps[:1] if same else steps[:, None]

        def scaled(datum: Tensor) -> Tensor:
            return scale * (datum if same else per_element(datum, size))

        def joined(*pieces: Tensor) -> Tensor:
            if all(piece.ndim == 1 for piece in pieces):
                return torch.cat(pieces)
            return torch.cat([per_element(piece, size) for piece in pieces], -1)

        b = one.b.new_zeros(self._count)
        links = from_numpy(self._links[2]).to(one.A)
        orders = [order.to(one.A.device) for _, order in self._patterns]
        right = joined(one.b, two.b, b)
        place = from_numpy(np.argsort(np.concatenate(self._rows))).to(right.device)
        return ConicProblem(
            self.structure,
            ConicData(
                P=joined(one.P, scaled(two.P))[..., orders[0]],
                q=joined(one.q, scaled(two.q)),
                A=joined(one.A, two.A, links)[..., orders[1]],
                b=right[..., place],
                lower=joined(one.lower, two.lower),
                upper=joined(one.upper, two.upper),
            ),
            size,
        )


def _entries(matrix: sp.csr_array) -> tuple[IntArray, IntArray, FloatArray]:
    stored: Any = sp.coo_array(matrix)
    return stored.row.astype(np.int64), stored.col.astype(np.int64), stored.data.astype(np.float64)


def _sorted(shape: tuple[int, int], rows: IntArray, columns: IntArray) -> tuple[SparsityPattern, Tensor]:
    order = np.argsort(columns * shape[0] + rows, kind="stable")
    return SparsityPattern(shape, rows[order], columns[order]), from_numpy(order)
