"""Problem-to-problem reductions, each with its inverse: what lets a solver without a feature take every problem.

:class:`RowForm` writes variable bounds as rows of the nonnegative cone; :class:`ConeForm` writes a quadratic
objective as a second-order cone.  Both work on one element, in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray

from lpgd.problems.sparsity import SparsityPattern
from lpgd.problems.structure import ConicStructure

__all__ = ["ConeForm", "Matrices", "RowForm", "RowPoint", "Vectors"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Matrices:
    """What a prepared solver depends on, for one element.

    Attributes:
        structure: patterns and cones.
        P: (nnz P,) values, symmetric.
        A: (nnz A,) values.
        finite_lower, finite_upper: which of the structure's bounds are finite.
    """

    structure: ConicStructure
    P: FloatArray
    A: FloatArray
    finite_lower: NDArray[np.bool_]
    finite_upper: NDArray[np.bool_]


class Vectors(NamedTuple):
    """The rest of one element's data."""

    q: FloatArray
    b: FloatArray
    lower: FloatArray
    upper: FloatArray


class RowPoint(NamedTuple):
    """Primal, dual and slack variables of one element in row form."""

    x: FloatArray
    y: FloatArray
    s: FloatArray


_KEPT_PATTERNS = 64


class _RowPattern:
    """What a row form has of its structure and the choice of finite bounds alone."""

    def __init__(
        self, structure: ConicStructure, finite_lower: NDArray[np.bool_], finite_upper: NDArray[np.bool_]
    ) -> None:
        self.upper_index = structure.upper_index[finite_upper]
        self.lower_index = structure.lower_index[finite_lower]
        self.finite_lower, self.finite_upper = finite_lower, finite_upper
        self.n, self.cones, self.pattern = structure.n, structure.cones, structure.constraint
        self.split = structure.cones.sections["nonnegative"].stop
        uppers, lowers = self.upper_index.size, self.lower_index.size
        self.bound_rows = slice(self.split, self.split + uppers + lowers)
        self.own_rows = np.r_[0 : self.split, self.bound_rows.stop : structure.m + uppers + lowers]
        self.signs = np.concatenate([np.ones(uppers), -np.ones(lowers)])
        self.source = None
        if self.signs.size:
            self.cones = replace(structure.cones, nonnegative=structure.cones.nonnegative + self.signs.size)
            own = structure.constraint
            rows = np.concatenate([self.own_rows[own.rows], np.arange(self.signs.size) + self.split])
            columns = np.concatenate([own.columns, self.upper_index, self.lower_index])
            self.source = np.lexsort((rows, columns))
            shape = (structure.m + self.signs.size, self.n)
            self.pattern = SparsityPattern(shape, rows[self.source], columns[self.source])
        quadratic = structure.quadratic
        self.quadratic = quadratic
        self.upper_entries = np.flatnonzero(quadratic.rows <= quadratic.columns)
        self.upper_pattern = SparsityPattern(
            quadratic.shape, quadratic.rows[self.upper_entries], quadratic.columns[self.upper_entries]
        )


class RowForm:
    """``minimise ½ xᵀP x + qᵀx s.t. A x + s = b, s ∈ K`` with each finite bound a row of the nonnegative cone.

    The rows are ``x ≤ upper`` and then ``-x ≤ -lower``, right after the problem's own nonnegative rows.

    Attributes:
        n: number of variables.
        A: (m + bounds, n), compressed by column.
        cones: the cones of its rows.
        P: (nnz P,) values on the structure's pattern.
    """

    def __init__(self, matrices: Matrices) -> None:
        key = (matrices.finite_lower.tobytes(), matrices.finite_upper.tobytes())
        patterns: dict[tuple[bytes, bytes], _RowPattern] = matrices.structure.row_patterns
        if key not in patterns:
            if len(patterns) >= _KEPT_PATTERNS:
                patterns.clear()
            patterns[key] = _RowPattern(matrices.structure, matrices.finite_lower, matrices.finite_upper)
        self._pattern = pattern = patterns[key]
        self.n, self.cones, self.P = pattern.n, pattern.cones, matrices.P
        self.has_quadratic = bool(np.any(matrices.P))
        values = matrices.A
        if pattern.source is not None:
            values = np.concatenate([values, pattern.signs])[pattern.source]
        self.A: Any = pattern.pattern.csc(values)

    def upper_P(self) -> sp.csc_array:
        """The upper triangle of P, compressed by column."""
        return self._pattern.upper_pattern.csc(self.P[self._pattern.upper_entries])

    def full_P(self) -> sp.csc_array:
        """P, compressed by column."""
        return self._pattern.quadratic.csc(self.P)

    @property
    def bound_rows(self) -> slice:
        """The rows that are bounds."""
        return self._pattern.bound_rows

    def right_hand_side(self, vectors: Vectors) -> FloatArray:
        """``b`` of the row form."""
        pattern = self._pattern
        if pattern.source is None:
            return vectors.b
        bounds = [vectors.upper[pattern.finite_upper], -vectors.lower[pattern.finite_lower]]
        return np.concatenate([vectors.b[: pattern.split], *bounds, vectors.b[pattern.split :]])

    def invert(self, point: RowPoint) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """``x, y, z, slack`` of the problem with bounds from a point of the row form."""
        pattern, z = self._pattern, np.zeros(self.n)
        if pattern.source is None:
            return point.x, point.y, z, point.s
        multipliers, uppers = point.y[pattern.bound_rows], pattern.upper_index.size
        z[pattern.upper_index] += multipliers[:uppers]
        z[pattern.lower_index] -= multipliers[uppers:]
        return point.x, point.y[pattern.own_rows], z, point.s[pattern.own_rows]


class ConeForm:
    """A row form without its quadratic: ``minimise t + qᵀx`` with ``t ≥ ½ xᵀP x`` as a second-order cone.

    With ``P = FᵀF`` the cone is ``|(√2 F x, t - 1)| ≤ t + 1``, whose square reads ``½ |F x|² ≤ t``.  The
    variables are ``(x, t)``; the rows of the new cone come first among the second-order ones.

    Raises:
        ValueError: P has a negative eigenvalue, so the problem is not convex.
    """

    def __init__(self, form: RowForm) -> None:
        self.n, self.cones = form.n, form.cones
        self.quadratic = form.has_quadratic
        self.rows = 0
        self.at = form.cones.sections["second_order"].start
        own = form.A.tocoo()
        row, column, value = own.row, own.col, own.data
        if self.quadratic:
            factor = _square_root(form.full_P()).tocoo()
            self.rows = factor.shape[0] + 2
            last = self.at + self.rows - 1
            row = np.concatenate(
                [np.where(row < self.at, row, row + self.rows), [self.at, last], self.at + 1 + factor.row]
            )
            column = np.concatenate([column, [self.n, self.n], factor.col])
            value = np.concatenate([value, [-1.0, -1.0], -np.sqrt(2.0) * factor.data])
            self.offset = np.zeros(self.rows)
            self.offset[0], self.offset[-1] = 1.0, -1.0
            self.cones = replace(form.cones, second_order=(self.rows, *form.cones.second_order))
        self.width = self.n + self.quadratic
        self.row, self.column, self.value = row, column, value

    @property
    def A(self) -> sp.csc_array:
        """The matrix, of which ``row``, ``column`` and ``value`` are the entries."""
        return sp.csc_array((self.value, (self.row, self.column)), shape=(self.cones.rows, self.width))

    def vectors(self, q: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
        """``q`` and ``b`` of the cone form."""
        if not self.quadratic:
            return q, b
        return np.append(q, 1.0), np.concatenate([b[: self.at], self.offset, b[self.at :]])

    def invert(self, point: RowPoint) -> RowPoint:
        """The row form's point."""
        if not self.quadratic:
            return point
        own = np.r_[0 : self.at, self.at + self.rows : point.y.size]
        return RowPoint(point.x[: self.n], point.y[own], point.s[own])


def _square_root(P: Any) -> Any:
    """F with ``P = FᵀF``, as few rows as the rank of P."""
    diagonal = P.diagonal()
    if P.count_nonzero() == np.count_nonzero(diagonal):
        eigenvalues, vectors = diagonal, None
    else:
        eigenvalues, vectors = scipy.linalg.eigh(P.toarray())
    scale = np.abs(eigenvalues).max(initial=0.0)
    if eigenvalues.min(initial=0.0) < -1e-10 * scale:
        raise ValueError(f"P has the eigenvalue {eigenvalues.min():.3g}: the objective is not convex.")
    kept = np.flatnonzero(eigenvalues > 1e-14 * scale)
    roots = np.sqrt(eigenvalues[kept])
    if vectors is None:
        return sp.coo_array((roots, (np.arange(kept.size), kept)), shape=(kept.size, P.shape[0]))
    return sp.coo_array(roots[:, None] * vectors[:, kept].T)
