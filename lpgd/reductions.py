"""Problem-to-problem reductions, each with its inverse: what lets a solver without a feature take every problem.

A :class:`Form` is how a solver sees problems.  :class:`RowForm` writes variable bounds as rows of the nonnegative
cone; :class:`IntervalForm` gives every row and every variable two ends.  :class:`ConeForm` writes the quadratic
objective of a row form as a second-order cone.  Forms are made of one element's matrices, and translate the vectors
and the points of any number of elements at once, in NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from numpy.typing import NDArray

from lpgd.problems.sparsity import SparsityPattern
from lpgd.problems.structure import ConicStructure
from lpgd.status import NotConvexError

__all__ = [
    "ConeForm",
    "Form",
    "IntervalForm",
    "IntervalPoint",
    "IntervalVectors",
    "Matrices",
    "Point",
    "RowForm",
    "RowPoint",
    "RowVectors",
    "Vectors",
]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Matrices:
    """What a prepared solver depends on, for one element.

    Attributes:
        structure: patterns and cones.
        P: (nnz P,) values, symmetric.
        A: (nnz A,) values.
        finite_lower, finite_upper: which of the structure's bounds are finite; all of them for a form that is not
            ``keyed_by_bounds``.
    """

    structure: ConicStructure
    P: FloatArray
    A: FloatArray
    finite_lower: NDArray[np.bool_]
    finite_upper: NDArray[np.bool_]


class Vectors(NamedTuple):
    """The rest of the data of k elements that share their matrices: (k, ·) each."""

    q: FloatArray
    b: FloatArray
    lower: FloatArray
    upper: FloatArray


class Point(NamedTuple):
    """Solutions of k elements in the problem's own form: (k, ·) each."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray


class Form(ABC):
    """One element's matrices as a solver sees them, with the way there for vectors and the way back for points.

    Attributes:
        n: number of variables.
        has_quadratic: whether P has an entry that is not zero.
        size: how many numbers it holds; what the memory of workspaces is estimated from.
    """

    keyed_by_bounds: ClassVar[bool]
    """Whether the matrices depend on which bounds are finite."""

    n: int
    has_quadratic: bool
    size: int

    def __init__(self, matrices: Matrices) -> None:
        structure = matrices.structure
        self.n, self.structure = structure.n, structure
        self.P = matrices.P
        self.has_quadratic = bool(np.any(matrices.P))

    @abstractmethod
    def vectors(self, vectors: Vectors) -> Any:
        """The vectors of k elements in this form, a named tuple of (k, ·) arrays that are contiguous and new."""

    def crossed(self, vectors: Any) -> NDArray[np.bool_]:
        """(k,) whether an upper end is below its lower one: infeasible, and what some solvers cannot take."""
        return np.zeros(len(vectors.q), dtype=bool)

    @abstractmethod
    def invert(self, point: Any, vectors: Any) -> Point:
        """The points of k elements, a named tuple of (k, ·) arrays, in the problem's own form; ``vectors`` in this."""

    def full_P(self) -> sp.csc_array:
        """P, compressed by column."""
        return self.structure.quadratic.csc(self.P)

    def upper_P(self) -> sp.csc_array:
        """The upper triangle of P, compressed by column."""
        entries, pattern = _upper_triangle(self.structure)
        return pattern.csc(self.P[entries])

    def dense_P(self) -> FloatArray:
        """(n, n), row by row."""
        dense = np.zeros((self.n, self.n))
        dense[self.structure.quadratic.rows, self.structure.quadratic.columns] = self.P
        return dense


def _upper_triangle(structure: ConicStructure) -> tuple[IndexArray, SparsityPattern]:
    patterns = structure.row_patterns
    if "upper triangle" not in patterns:
        whole = structure.quadratic
        entries = np.flatnonzero(whole.rows <= whole.columns)
        patterns["upper triangle"] = entries, SparsityPattern(whole.shape, whole.rows[entries], whole.columns[entries])
    return patterns["upper triangle"]


class RowVectors(NamedTuple):
    """Vectors in row form: of k elements, (k, ·) each, or of one."""

    q: FloatArray
    b: FloatArray


class RowPoint(NamedTuple):
    """Primal, dual and slack variables in row form: of k elements, (k, ·) each, or of one."""

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


class RowForm(Form):
    """``minimise ½ xᵀP x + qᵀx s.t. A x + s = b, s ∈ K`` with each finite bound a row of the nonnegative cone.

    The rows are ``x ≤ upper`` and then ``-x ≤ -lower``, right after the problem's own nonnegative rows.

    Attributes:
        A: (m + bounds, n), compressed by column.
        cones: the cones of its rows.
        P: (nnz P,) values on the structure's pattern.
    """

    keyed_by_bounds: ClassVar[bool] = True

    def __init__(self, matrices: Matrices) -> None:
        super().__init__(matrices)
        key = (matrices.finite_lower.tobytes(), matrices.finite_upper.tobytes())
        patterns: dict[Any, Any] = matrices.structure.row_patterns
        if key not in patterns:
            if len(patterns) >= _KEPT_PATTERNS:
                patterns.clear()
            patterns[key] = _RowPattern(matrices.structure, matrices.finite_lower, matrices.finite_upper)
        self._pattern: _RowPattern = patterns[key]
        self.cones = self._pattern.cones
        values = matrices.A
        if self._pattern.source is not None:
            values = np.concatenate([values, self._pattern.signs])[self._pattern.source]
        self.A: Any = self._pattern.pattern.csc(values)
        self.size = self.A.nnz + self.P.size

    @property
    def bound_rows(self) -> slice:
        """The rows that are bounds."""
        return self._pattern.bound_rows

    def vectors(self, vectors: Vectors) -> RowVectors:
        pattern, b = self._pattern, vectors.b
        if pattern.source is None:
            return RowVectors(np.array(vectors.q), np.array(b))
        bounds = [vectors.upper[:, pattern.finite_upper], -vectors.lower[:, pattern.finite_lower]]
        return RowVectors(
            np.array(vectors.q), np.concatenate([b[:, : pattern.split], *bounds, b[:, pattern.split :]], axis=1)
        )

    def invert(self, point: RowPoint, vectors: RowVectors) -> Point:
        pattern, z = self._pattern, np.zeros_like(point.x)
        if pattern.source is None:
            return Point(point.x, point.y, z, point.s)
        multipliers, uppers = point.y[:, pattern.bound_rows], pattern.upper_index.size
        z[:, pattern.upper_index] += multipliers[:, :uppers]
        z[:, pattern.lower_index] -= multipliers[:, uppers:]
        return Point(point.x, point.y[:, pattern.own_rows], z, point.s[:, pattern.own_rows])


class IntervalVectors(NamedTuple):
    """Vectors in interval form: of k elements, (k, ·) each, or of one."""

    q: FloatArray  # n
    row_lower: FloatArray  # m, -inf where there is none
    row_upper: FloatArray  # m, always finite
    lower: FloatArray  # n, -inf where there is none
    upper: FloatArray  # n, +inf where there is none


class IntervalPoint(NamedTuple):
    """Primal variables and signed multipliers in interval form: of k elements, (k, ·) each, or of one.

    ``P x + q + Aᵀy + z = 0``; y and z are positive at an upper end and negative at a lower one.
    """

    x: FloatArray
    y: FloatArray
    z: FloatArray


class IntervalForm(Form):
    """``minimise ½ xᵀP x + qᵀx s.t. row_lower ≤ A x ≤ row_upper, lower ≤ x ≤ upper``: linear and quadratic programs.

    Both ends of a row of the zero cone are b; a row of the nonnegative cone has the upper end b and no lower one.

    Attributes:
        m: number of rows.
        zero: how many of them, from the first, are equalities.
        bounded: the variables that may have a bound.
        has_bounds: whether there is one.
    """

    keyed_by_bounds: ClassVar[bool] = False

    def __init__(self, matrices: Matrices) -> None:
        super().__init__(matrices)
        structure = matrices.structure
        self.m, self.zero, self.has_bounds = structure.m, structure.cones.zero, structure.has_bounds
        self._values = matrices.A
        self.bounded = np.union1d(structure.lower_index, structure.upper_index)
        self.size = self._values.size + self.P.size

    @cached_property
    def A(self) -> sp.csc_array:
        """(m, n), compressed by column."""
        return self.structure.constraint.csc(self._values)

    def dense_A(self) -> FloatArray:
        """(m, n), row by row."""
        dense = np.zeros((self.m, self.n))
        dense[self.structure.constraint.rows, self.structure.constraint.columns] = self._values
        return dense

    def vectors(self, vectors: Vectors) -> IntervalVectors:
        row_upper = np.array(vectors.b)
        row_lower = np.full_like(row_upper, -np.inf)
        row_lower[:, : self.zero] = row_upper[:, : self.zero]
        q = np.array(vectors.q)
        lower, upper = np.full_like(q, -np.inf), np.full_like(q, np.inf)
        lower[:, self.structure.lower_index] = vectors.lower
        upper[:, self.structure.upper_index] = vectors.upper
        return IntervalVectors(q, row_lower, row_upper, lower, upper)

    def crossed(self, vectors: IntervalVectors) -> NDArray[np.bool_]:
        return np.any(vectors.lower > vectors.upper, axis=1)

    def invert(self, point: IntervalPoint, vectors: IntervalVectors) -> Point:
        slack = np.zeros_like(point.y)
        if self.m > self.zero:
            slack[:, self.zero :] = np.maximum(vectors.row_upper - (self.A @ point.x.T).T, 0.0)[:, self.zero :]
        return Point(*point, slack)


class ConeForm:
    """A row form without its quadratic: ``minimise t + qᵀx`` with ``t ≥ ½ xᵀP x`` as a second-order cone.

    With ``P = FᵀF`` the cone is ``|(√2 F x, t - 1)| ≤ t + 1``, whose square reads ``½ |F x|² ≤ t``.  The
    variables are ``(x, t)``; the rows of the new cone come first among the second-order ones.

    Raises:
        NotConvexError: P has a negative eigenvalue, so the problem is not convex.
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
        raise NotConvexError(f"P has the eigenvalue {eigenvalues.min():.3g}: the objective is not convex.")
    kept = np.flatnonzero(eigenvalues > 1e-14 * scale)
    roots = np.sqrt(eigenvalues[kept])
    if vectors is None:
        return sp.coo_array((roots, (np.arange(kept.size), kept)), shape=(kept.size, P.shape[0]))
    return sp.coo_array(roots[:, None] * vectors[:, kept].T)
