"""Sparse maps from parameters to matrices, the rows that only bound a variable, and linear maps read off probes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import FloatArray, IntArray
from lpgd.problems.conic.sparsity import SparsityPattern

__all__ = ["AffineMatrix", "Bounds", "consecutive_rows", "reordered", "selection", "switched"]


@dataclass(frozen=True, eq=False)
class AffineMatrix:
    """A matrix ``M(θ)`` whose entries are affine in θ: ``M[row, column] += value * (θ, 1)[parameter]``.

    Args:
        shape: ``(r, c)``.
        width: p + 1, the length of ``(θ, 1)``.
        row, column, parameter, value: (nnz,) each; combinations are unique and values nonzero.
    """

    shape: tuple[int, int]
    width: int
    row: IntArray
    column: IntArray
    parameter: IntArray
    value: FloatArray

    @classmethod
    def from_tensor(cls, tensor: sp.coo_array, shape: tuple[int, int], width: int, scale: float = 1.0) -> AffineMatrix:
        """From ``scale`` times a map from ``(θ, 1)`` whose first r c rows are the matrix, column by column."""
        position, parameter = (index.astype(np.int64) for index in tensor.coords)
        inside = position < shape[0] * shape[1]
        value = np.asarray(scale * tensor.data[inside], dtype=np.float64)
        return cls._summed(shape, width, position[inside], parameter[inside], value)

    @classmethod
    def _summed(
        cls, shape: tuple[int, int], width: int, position: IntArray, parameter: IntArray, value: FloatArray
    ) -> AffineMatrix:
        # Stacked matrices have r c rows, too many for the row pointers of a compressed matrix.
        unique, entry = np.unique(position * width + parameter, return_inverse=True)
        total = np.bincount(entry, value, minlength=unique.size).astype(np.float64)
        stored = np.flatnonzero(total)
        position, parameter = np.divmod(unique[stored], width)
        column, row = np.divmod(position, max(shape[0], 1))
        return cls(shape, width, row, column, parameter, total[stored])

    def select_rows(self, rows: IntArray) -> AffineMatrix:
        """These rows, which must be increasing."""
        place = np.full(self.shape[0], -1, dtype=np.int64)
        place[rows] = np.arange(rows.size)
        inside = np.flatnonzero(place[self.row] >= 0)
        fields = (place[self.row[inside]], self.column[inside], self.parameter[inside], self.value[inside])
        return AffineMatrix((rows.size, self.shape[1]), self.width, *fields)

    def without_rows(self, rows: IntArray) -> AffineMatrix:
        """The same matrix with zeros in these rows."""
        inside = ~np.isin(self.row, rows)
        fields = (self.row[inside], self.column[inside], self.parameter[inside], self.value[inside])
        return AffineMatrix(self.shape, self.width, *fields)

    def without_columns(self, columns: IntArray) -> AffineMatrix:
        """The same matrix with zeros in these columns."""
        inside = ~np.isin(self.column, columns)
        fields = (self.row[inside], self.column[inside], self.parameter[inside], self.value[inside])
        return AffineMatrix(self.shape, self.width, *fields)

    def select_columns(self, columns: IntArray) -> AffineMatrix:
        """These columns, which must be increasing."""
        place = np.full(self.shape[1], -1, dtype=np.int64)
        place[columns] = np.arange(columns.size)
        inside = np.flatnonzero(place[self.column] >= 0)
        fields = (self.row[inside], place[self.column[inside]], self.parameter[inside], self.value[inside])
        return AffineMatrix((self.shape[0], columns.size), self.width, *fields)

    def with_entries(self, row: IntArray, column: IntArray, parameter: IntArray, value: FloatArray) -> AffineMatrix:
        """The same matrix with these entries added."""
        rows, columns = np.concatenate([self.row, row]), np.concatenate([self.column, column])
        parameters, values = np.concatenate([self.parameter, parameter]), np.concatenate([self.value, value])
        return self._summed(self.shape, self.width, columns * self.shape[0] + rows, parameters, values)

    def symmetrised(self) -> AffineMatrix:
        """``½ (M + Mᵀ)``."""
        side = self.shape[0]
        position = np.concatenate([self.column * side + self.row, self.row * side + self.column])
        return self._summed(self.shape, self.width, position, np.tile(self.parameter, 2), np.tile(0.5 * self.value, 2))

    def compress(self) -> tuple[SparsityPattern, sp.csr_array]:
        """The pattern of all entries that can be nonzero, and the map from ``(θ, 1)`` to the values on it."""
        position = self.column * self.shape[0] + self.row
        stored, entry = np.unique(position, return_inverse=True)
        column, row = np.divmod(stored, max(self.shape[0], 1))
        values = sp.csr_array((self.value, (entry, self.parameter)), shape=(stored.size, self.width))
        return SparsityPattern(self.shape, row, column), values


@dataclass(frozen=True, eq=False)
class Bounds:
    """The bounds of variables, and the rows ``a x_j + s = b, s >= 0`` with a constant ``a`` that they stand for.

    Args:
        lower_index, upper_index: the variables that have such a bound, increasing.
        lower, upper: (k, p + 1) the map to one value for each.
        rows: the rows that became bounds, increasing.
        from_lower, from_upper: (m, n) each: the multipliers of those rows are ``from_lower @ max(-z, 0)`` and
            ``from_upper @ max(z, 0)``, z the signed multipliers of the bounds.
    """

    lower_index: IntArray
    upper_index: IntArray
    lower: sp.csr_array
    upper: sp.csr_array
    rows: IntArray
    from_lower: sp.csr_array
    from_upper: sp.csr_array

    @classmethod
    def find(
        cls,
        A: AffineMatrix,
        b: sp.csr_array,
        nonnegative: slice,
        lower: sp.csr_array | None = None,
        upper: sp.csr_array | None = None,
    ) -> Bounds:
        """Collect the bounds that are given as such, and those hidden in rows.

        The first bound of a variable on a side wins.  Rows that repeat it exactly (a symmetric matrix is bounded
        twice by one constraint) go with it and share its multiplier; rows that bound it differently stay rows.

        Args:
            A: (m, n).
            b: (m, p + 1), the map to the right-hand side.
            nonnegative: the rows of A whose slack is nonnegative.
            lower, upper: (n, p + 1), infinite in the last column where there is none; or None.
        """
        constant = A.width - 1
        single = np.bincount(A.row, minlength=A.shape[0])[A.row] == 1
        eligible = (A.row >= nonnegative.start) & (A.row < nonnegative.stop) & (A.parameter == constant)
        entries = np.flatnonzero(single & eligible)
        entries = entries[np.argsort(A.row[entries])]
        value = A.value[entries]
        below, above = entries[value < 0], entries[value > 0]
        lower_index, lower_map, lower_rows, from_lower = _one_side(A, b, below, lower, -np.inf)
        upper_index, upper_map, upper_rows, from_upper = _one_side(A, b, above, upper, np.inf)
        rows = np.sort(np.concatenate([lower_rows, upper_rows]))
        return cls(lower_index, upper_index, lower_map, upper_map, rows, from_lower, from_upper)


def _one_side(
    A: AffineMatrix, b: sp.csr_array, entries: IntArray, stated: sp.csr_array | None, infinite: float
) -> tuple[IntArray, sp.csr_array, IntArray, sp.csr_array]:
    """Bounded variables, their bounds, the rows used up, and the way back for their multipliers."""
    (m, n), width = A.shape, A.width
    given = np.zeros(0, dtype=np.int64)
    if stated is not None:
        given = np.flatnonzero(stated[:, [width - 1]].toarray().ravel() != infinite)
    candidates = [sp.csr_array((0, width)) if stated is None else stated[given]]
    if entries.size:
        candidates.append(sp.diags_array(1.0 / A.value[entries]) @ b[A.row[entries]])
    values = sp.csr_array(sp.vstack(candidates))
    row = np.concatenate([np.full(given.size, -1), A.row[entries]])
    scale = np.concatenate([np.zeros(given.size), 1.0 / np.abs(A.value[entries])])

    index, first, group = np.unique(np.concatenate([given, A.column[entries]]), return_index=True, return_inverse=True)
    bounds = sp.csr_array(values[first])
    difference = sp.csr_array(values - bounds[group])
    difference.eliminate_zeros()
    repeats = np.diff(difference.indptr) == 0
    repeats[first] = True
    used = np.flatnonzero(repeats & (row >= 0))
    share = np.bincount(group[used], minlength=index.size)[group[used]]
    back = sp.csr_array((scale[used] / share, (row[used], index[group[used]])), shape=(m, n))
    return index, bounds, row[used], back


def reordered(tensor: Any, order: IntArray) -> sp.coo_array:
    """A tensor with its columns in this order."""
    return sp.coo_array(sp.csc_array(tensor)[:, order])


def consecutive_rows(tensor: sp.coo_array, start: int, stop: int, width: int) -> sp.csr_array:
    """Consecutive rows of a tensor."""
    row, column = tensor.coords
    inside = (row >= start) & (row < stop)
    return sp.csr_array((tensor.data[inside], (row[inside] - start, column[inside])), shape=(stop - start, width))


def switched(boolean: IntArray, end: float, shape: tuple[int, int]) -> Any:
    """The map (n, p + 1) to the bounds of boolean variables, infinite in the last column for the others; or None.

    Args:
        boolean: these variables.
        end: 0 for lower bounds, 1 for upper ones.
        shape: (n, p + 1).
    """
    if not boolean.size:
        return None
    n, width = shape
    constants = np.full(n, np.inf if end > 0 else -np.inf)
    constants[boolean] = end
    return sp.csr_array((constants, (np.arange(n), np.full(n, width - 1))), shape=shape)


def selection(probe: Callable[[FloatArray], FloatArray], size: int) -> sp.csr_array:
    """The matrix of a linear map, each of whose outputs is a multiple of one of its ``size`` inputs."""
    scale = probe(np.ones(size))
    outputs = np.flatnonzero(scale)
    inputs = np.rint(probe(np.arange(1.0, size + 1.0))[outputs] / scale[outputs]).astype(np.int64) - 1
    inside = (inputs >= 0) & (inputs < size)
    matrix = sp.csr_array((scale[outputs][inside], (outputs[inside], inputs[inside])), shape=(scale.size, size))
    check = np.random.default_rng(0).uniform(1.0, 2.0, size)
    if not np.allclose(matrix @ check, probe(check), rtol=1e-9, atol=0.0):
        raise RuntimeError(
            f"CVXPY {version('cvxpy')} recovers a variable in a way this library does not know; use a version of CVXPY "
            "that its pyproject.toml allows, or report this problem."
        )
    return matrix
