"""Problem-to-problem reductions, each with its inverse: what lets a solver without a feature take every problem.

A :class:`Form` is how a solver sees problems.  :class:`RowForm` writes variable bounds as rows of the nonnegative
cone; :class:`IntervalForm` gives every row and every variable two ends.  Forms are made of one element's matrices;
their :class:`Frame`, which does not depend on them, translates the vectors and the points of any number of elements at
once, in NumPy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicStructure

__all__ = [
    "BoxForm",
    "BoxFrame",
    "Form",
    "Frame",
    "IntervalForm",
    "IntervalFrame",
    "IntervalPoint",
    "IntervalVectors",
    "Matrices",
    "Point",
    "RowForm",
    "RowFrame",
    "RowPoint",
    "RowVectors",
    "Vectors",
    "groups_by_bounds",
]


@dataclass(frozen=True, eq=False)
class Matrices:
    """What a prepared solver depends on, for one element.

    Attributes:
        structure: patterns and cones.
        P: (nnz P,) values, symmetric.
        A: (nnz A,) values.
        finite_lower, finite_upper: which of the structure's bounds are finite; all of them for a form that is not
            ``keyed_by_bounds``.
        definite: whether P is positive definite, by more than rounding; None where nobody has looked.
        rows: A itself, (m, n), row by row; None where no solver asked for it.
        frame: of the form that is made; None where nobody has it at hand.
    """

    structure: ConicStructure
    P: FloatArray
    A: FloatArray
    finite_lower: BoolArray
    finite_upper: BoolArray
    definite: bool | None = None
    rows: FloatArray | None = None
    frame: Frame | None = None


class Vectors(NamedTuple):
    """The rest of the data of k elements that share their matrices: (k, ·) each."""

    q: FloatArray
    b: FloatArray
    lower: FloatArray
    upper: FloatArray


def groups_by_bounds(lower: BoolArray, upper: BoolArray) -> list[tuple[list[int], BoolArray, BoolArray]]:
    """Elements whose finite bounds are the same ones, and which those are.

    Args:
        lower, upper: (k, ·) whether a bound is finite.
    """
    if (lower == lower[:1]).all() and (upper == upper[:1]).all():
        return [(list(range(len(lower))), lower[0], upper[0])] if len(lower) else []
    groups: dict[bytes, list[int]] = {}
    for place in range(len(lower)):
        groups.setdefault(lower[place].tobytes() + upper[place].tobytes(), []).append(place)
    return [(places, lower[places[0]], upper[places[0]]) for places in groups.values()]


class Point(NamedTuple):
    """Solutions of k elements in the problem's own form: (k, ·) each."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray


class Frame(ABC):
    """What a form has of the structure and the choice of finite bounds alone: the translation of vectors and points."""

    @abstractmethod
    def __init__(self, structure: ConicStructure, finite_lower: BoolArray, finite_upper: BoolArray) -> None: ...

    @abstractmethod
    def vectors(self, vectors: Vectors) -> Any:
        """The vectors of k elements in this form, a named tuple of (k, ·) arrays that are contiguous and new."""

    @abstractmethod
    def invert(self, point: Any, vectors: Any, A: FloatArray) -> Point:
        """The points of k elements, a named tuple of (k, ·) arrays, in the problem's own form.

        Args:
            point: of this form.
            vectors: of this form.
            A: (nnz A,) or (k, nnz A).
        """


_KEPT_FRAMES = 64


class Form(ABC):
    """One element's matrices as a solver sees them.

    Attributes:
        frame: the rest of the form, which elements of one structure and choice of finite bounds share.
        n: number of variables.
        has_quadratic: whether P has an entry that is not zero.
        definite: whether P is positive definite, by more than rounding; None where nobody has looked.
        size: how many numbers it holds; what the memory of workspaces is estimated from.
    """

    keyed_by_bounds: ClassVar[bool]
    """Whether the matrices depend on which bounds are finite."""
    frame_class: ClassVar[type[Frame]]

    n: int
    has_quadratic: bool
    definite: bool | None
    size: int

    def __init__(self, matrices: Matrices) -> None:
        structure = matrices.structure
        self.n, self.structure = structure.n, structure
        self.P = matrices.P
        self.definite = matrices.definite
        self.has_quadratic = matrices.definite is True or bool(np.any(matrices.P))
        self.frame: Any = matrices.frame or self.frame_of(structure, matrices.finite_lower, matrices.finite_upper)

    @classmethod
    def frame_of(cls, structure: ConicStructure, finite_lower: BoolArray, finite_upper: BoolArray) -> Any:
        """The frame of a structure and a choice of finite bounds; it is made once."""
        key = (cls.frame_class, finite_lower.tobytes(), finite_upper.tobytes())
        frames: dict[Any, Any] = structure.row_patterns
        if key not in frames:
            if len(frames) >= _KEPT_FRAMES:
                frames.clear()
            frames[key] = cls.frame_class(structure, finite_lower, finite_upper)
        return frames[key]

    def full_P(self) -> sp.csc_array:
        """P, compressed by column."""
        return self.structure.quadratic.csc(self.P)

    def upper_P(self) -> sp.csc_array:
        """The upper triangle of P, compressed by column."""
        return _upper_triangle(self.structure)[1].csc(self.upper_values())

    def upper_values(self) -> FloatArray:
        """The entries of that triangle."""
        return self.P[_upper_triangle(self.structure)[0]]

    def dense_P(self) -> FloatArray:
        """(n, n), row by row; to be read only."""
        if self.structure.quadratic.is_dense:  # P is symmetric
            return self.P.reshape(self.n, self.n)
        return self.structure.quadratic.dense_matrices(self.P[None])[0]


def _upper_triangle(structure: ConicStructure) -> tuple[IntArray, SparsityPattern]:
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


class RowFrame(Frame):
    """The frame of :class:`RowForm`."""

    def __init__(self, structure: ConicStructure, finite_lower: BoolArray, finite_upper: BoolArray) -> None:
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
            constraint = structure.constraint
            rows = np.concatenate([self.own_rows[constraint.rows], np.arange(self.signs.size) + self.split])
            columns = np.concatenate([constraint.columns, self.upper_index, self.lower_index])
            self.source = np.lexsort((rows, columns))
            shape = (structure.m + self.signs.size, self.n)
            self.pattern = SparsityPattern(shape, rows[self.source], columns[self.source])

    def vectors(self, vectors: Vectors) -> RowVectors:
        b = vectors.b
        if self.source is None:
            return RowVectors(np.array(vectors.q), np.array(b))
        bounds = [vectors.upper[:, self.finite_upper], -vectors.lower[:, self.finite_lower]]
        return RowVectors(
            np.array(vectors.q), np.concatenate([b[:, : self.split], *bounds, b[:, self.split :]], axis=1)
        )

    def invert(self, point: RowPoint, vectors: RowVectors, A: FloatArray) -> Point:
        z = np.zeros_like(point.x)
        if self.source is None:
            return Point(point.x, point.y, z, point.s)
        multipliers, uppers = point.y[:, self.bound_rows], self.upper_index.size
        z[:, self.upper_index] += multipliers[:, :uppers]
        z[:, self.lower_index] -= multipliers[:, uppers:]
        return Point(point.x, point.y[:, self.own_rows], z, point.s[:, self.own_rows])


class RowForm(Form):
    """``minimise ½ xᵀP x + qᵀx s.t. A x + s = b, s ∈ K`` with each finite bound a row of the nonnegative cone.

    The rows are ``x ≤ upper`` and then ``-x ≤ -lower``, right after the problem's own nonnegative rows.

    Attributes:
        cones: the cones of its rows.
        pattern, values: of A.
        P: (nnz P,) values on the structure's pattern.
    """

    keyed_by_bounds: ClassVar[bool] = True
    frame_class: ClassVar[type[Frame]] = RowFrame

    def __init__(self, matrices: Matrices) -> None:
        super().__init__(matrices)
        self.cones, self.pattern = self.frame.cones, self.frame.pattern
        self.values = matrices.A
        if self.frame.source is not None:
            self.values = np.concatenate([self.values, self.frame.signs])[self.frame.source]
        self.size = self.values.size + self.P.size

    @cached_property
    def A(self) -> SparseArray:
        """(m + bounds, n), compressed by column."""
        return self.pattern.csc(self.values)

    @property
    def bound_rows(self) -> slice:
        """The rows that are bounds."""
        return self.frame.bound_rows


class IntervalVectors(NamedTuple):
    """Vectors in interval form: of k elements, (k, ·) each, or of one."""

    q: FloatArray  # n
    row_lower: FloatArray  # m, -inf where there is none
    row_upper: FloatArray  # m, finite but for rows with two ends
    lower: FloatArray  # n, -inf where there is none
    upper: FloatArray  # n, +inf where there is none
    shift: FloatArray  # what b of each row with two ends is: no solver needs it


class IntervalPoint(NamedTuple):
    """Primal variables and signed multipliers in interval form: of k elements, (k, ·) each, or of one.

    ``P x + q + Aᵀy + z = 0``; y and z are positive at an upper end and negative at a lower one.
    """

    x: FloatArray
    y: FloatArray
    z: FloatArray


class IntervalFrame(Frame):
    """The frame of :class:`IntervalForm`."""

    knows_ends: ClassVar[bool] = True

    def __init__(self, structure: ConicStructure, finite_lower: BoolArray, finite_upper: BoolArray) -> None:
        self.count = structure.two_sided if self.knows_ends else 0
        self.whole, self.structure = structure, structure.with_ends if self.count else structure
        self.zero = self.structure.cones.zero
        self.with_ends = slice(self.zero, self.zero + self.count)
        self.bounded = self.structure.bounded_index

    def vectors(self, vectors: Vectors) -> IntervalVectors:
        whole, n = self.whole, self.structure.n
        row_upper = np.array(vectors.b)
        row_lower = np.full_like(row_upper, -np.inf)
        row_lower[:, : self.zero] = row_upper[:, : self.zero]
        lower, upper = np.full_like(vectors.q, -np.inf), np.full_like(vectors.q, np.inf)
        lower[:, whole.lower_index] = vectors.lower
        upper[:, whole.upper_index] = vectors.upper
        shift = row_upper[:, self.with_ends].copy()
        row_lower[:, self.with_ends], row_upper[:, self.with_ends] = lower[:, n:] + shift, upper[:, n:] + shift
        q = np.array(vectors.q[:, :n], order="C")
        lower, upper = np.ascontiguousarray(lower[:, :n]), np.ascontiguousarray(upper[:, :n])
        return IntervalVectors(q, row_lower, row_upper, lower, upper, shift)

    def invert(self, point: IntervalPoint, vectors: IntervalVectors, A: FloatArray) -> Point:
        slack, structure = np.zeros_like(point.y), self.structure
        x, y, z = point
        if structure.m > self.zero:
            values = structure.constraint.numpy_product(A[..., : structure.constraint.nnz], x)
            slack = np.maximum(vectors.row_upper - values, 0.0)
            slack[:, : self.with_ends.stop] = 0.0
            if self.count:
                x = np.concatenate([x, values[:, self.with_ends] - vectors.shift], axis=1)
                z = np.concatenate([z, y[:, self.with_ends]], axis=1)
        return Point(x, y, z, slack)


class IntervalForm(Form):
    """``minimise ½ xᵀP x + qᵀx s.t. row_lower ≤ A x ≤ row_upper, lower ≤ x ≤ upper``: linear and quadratic programs.

    Both ends of a row of the zero cone are b; a row of the nonnegative cone has the upper end b and no lower one.  Rows
    with two ends of their own come in between.

    Attributes:
        m: number of rows.
        zero: how many of them, from the first, are equalities.
        bounded: the variables that may have a bound.
        has_bounds: whether there is one.
        is_white: whether P is the identity.
    """

    keyed_by_bounds: ClassVar[bool] = False
    frame_class: ClassVar[type[Frame]] = IntervalFrame

    def __init__(self, matrices: Matrices) -> None:
        super().__init__(matrices)
        structure: ConicStructure = self.frame.structure
        self.n, self.structure = structure.n, structure
        self.m, self.zero, self.has_bounds = structure.m, structure.cones.zero, structure.has_bounds
        self._values, self._rows = matrices.A[: structure.constraint.nnz], matrices.rows
        self.bounded = self.frame.bounded
        self.size = self._values.size + self.P.size
        quadratic = structure.quadratic
        self.is_white = quadratic.nnz == structure.n and bool((self.P == 1.0).all()) and quadratic.is_diagonal

    @cached_property
    def A(self) -> sp.csc_array:
        """(m, n), compressed by column."""
        return self.structure.constraint.csc(self._values)

    def dense_A(self) -> FloatArray:
        """(m, n), row by row; to be read only."""
        if self._rows is not None:
            return np.ascontiguousarray(self._rows[:, : self.n])
        return self.structure.constraint.dense_matrices(self._values[None])[0]


class BoxFrame(IntervalFrame):
    """The frame of :class:`BoxForm`."""

    knows_ends: ClassVar[bool] = False


class BoxForm(IntervalForm):
    """:class:`IntervalForm` for a solver whose rows cannot lose both of their ends: their values are variables."""

    frame_class: ClassVar[type[Frame]] = BoxFrame
