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


class RowForm:
    """``minimise ½ xᵀP x + qᵀx s.t. A x + s = b, s ∈ K`` with each finite bound a row of the nonnegative cone.

    The rows are ``x ≤ upper`` and then ``-x ≤ -lower``, right after the problem's own nonnegative rows.

    Attributes:
        P: (n, n) symmetric, compressed by column.
        A: (m + bounds, n), compressed by column.
        cones: the cones of its rows.
    """

    def __init__(self, matrices: Matrices) -> None:
        structure = matrices.structure
        self.upper_index = structure.upper_index[matrices.finite_upper]
        self.lower_index = structure.lower_index[matrices.finite_lower]
        self.finite_lower, self.finite_upper = matrices.finite_lower, matrices.finite_upper
        self.n = structure.n
        self.split = structure.cones.sections["nonnegative"].stop
        bounds = self.upper_index.size + self.lower_index.size
        self.bound_rows = slice(self.split, self.split + bounds)
        self.P = structure.quadratic.csc(matrices.P)
        self.cones = structure.cones
        if bounds == 0:
            self.pattern, self._source = structure.constraint, None
        else:
            self.cones = replace(structure.cones, nonnegative=structure.cones.nonnegative + bounds)
            own = structure.constraint
            rows = np.concatenate(
                [np.where(own.rows < self.split, own.rows, own.rows + bounds), np.arange(bounds) + self.split]
            )
            columns = np.concatenate([own.columns, self.upper_index, self.lower_index])
            self._source = np.lexsort((rows, columns))
            self.pattern = SparsityPattern((structure.m + bounds, self.n), rows[self._source], columns[self._source])
        self.A = self.pattern.csc(self.row_values(matrices.A))

    def row_values(self, A: FloatArray) -> FloatArray:
        """Values of A to the values of the row form's A."""
        if self._source is None:
            return A
        signs = np.concatenate([np.ones(self.upper_index.size), -np.ones(self.lower_index.size)])
        return np.concatenate([A, signs])[self._source]

    def right_hand_side(self, vectors: Vectors) -> FloatArray:
        """``b`` of the row form."""
        if self._source is None:
            return vectors.b
        bounds = [vectors.upper[self.finite_upper], -vectors.lower[self.finite_lower]]
        return np.concatenate([vectors.b[: self.split], *bounds, vectors.b[self.split :]])

    def invert(self, point: RowPoint) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """``x, y, z, slack`` of the problem with bounds from a point of the row form."""
        z = np.zeros(self.n)
        if self._source is None:
            return point.x, point.y, z, point.s
        multipliers = point.y[self.bound_rows]
        z[self.upper_index] += multipliers[: self.upper_index.size]
        z[self.lower_index] -= multipliers[self.upper_index.size :]
        own = np.r_[0 : self.split, self.bound_rows.stop : point.y.size]
        return point.x, point.y[own], z, point.s[own]


class ConeForm:
    """A row form without its quadratic: ``minimise t + qᵀx`` with ``t ≥ ½ xᵀP x`` as a second-order cone.

    With ``P = FᵀF`` the cone is ``|(√2 F x, t - 1)| ≤ t + 1``, whose square reads ``½ |F x|² ≤ t``.  The
    variables are ``(x, t)``; the rows of the new cone come first among the second-order ones.

    Raises:
        ValueError: P has a negative eigenvalue, so the problem is not convex.
    """

    def __init__(self, form: RowForm) -> None:
        self.n = form.n
        self.cones, self.A = form.cones, form.A
        self.quadratic = bool(np.any(form.P.data))
        self.rows = 0
        if not self.quadratic:
            return
        factor = _square_root(form.P.toarray())
        self.rows = factor.shape[0] + 2
        self.at = form.cones.sections["second_order"].start
        block: Any = sp.lil_array((self.rows, self.n + 1))
        block[0, self.n], block[self.rows - 1, self.n] = -1.0, -1.0
        block[1 : self.rows - 1, : self.n] = -np.sqrt(2.0) * factor
        self.offset = np.zeros(self.rows)
        self.offset[0], self.offset[-1] = 1.0, -1.0
        own: Any = sp.hstack([form.A, sp.csc_array((form.cones.rows, 1))], format="csr")
        self.A = sp.csc_array(sp.vstack([own[: self.at], block.tocsr(), own[self.at :]]))
        self.cones = replace(form.cones, second_order=(self.rows, *form.cones.second_order))

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


def _square_root(P: FloatArray) -> FloatArray:
    """F with ``P = FᵀF``, as few rows as the rank of P."""
    eigenvalues, vectors = scipy.linalg.eigh(P)
    scale = np.abs(eigenvalues).max(initial=0.0)
    if eigenvalues.min(initial=0.0) < -1e-10 * scale:
        raise ValueError(f"P has the eigenvalue {eigenvalues.min():.3g}: the objective is not convex.")
    kept = eigenvalues > 1e-14 * scale
    return np.sqrt(eigenvalues[kept])[:, None] * vectors[:, kept].T
