"""A sparse matrix whose pattern is fixed and whose values are a tensor, batched or shared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray, from_numpy, is_differentiated, is_wrapped

__all__ = ["PART", "SparsityPattern"]

_KEPT_PLACES = 4
SMALL, FILLED = 4096, 4
"""A matrix with at most so many places, of which one in so many has an entry, is multiplied as a dense one."""
PART = 32_768
"""So many numbers are worked on at once: what stays in a core's cache."""


@dataclass(frozen=True, eq=False)
class SparsityPattern:
    """Where the entries of an ``(r, c)`` matrix may be nonzero; its values come separately.

    Entries are unique and sorted column by column, rows increasing within a column, so that
    ``values`` of length ``nnz`` are the data of a compressed-sparse-column matrix as they stand.

    Args:
        shape: ``(r, c)``.
        rows: (nnz,) row of each entry.
        columns: (nnz,) column of each entry.
    """

    shape: tuple[int, int]
    rows: IntArray
    columns: IntArray

    def __post_init__(self) -> None:
        rows = np.ascontiguousarray(self.rows, dtype=np.int64)
        columns = np.ascontiguousarray(self.columns, dtype=np.int64)
        if rows.shape != columns.shape or rows.ndim != 1:
            raise ValueError(f"rows {rows.shape} and columns {columns.shape} must be vectors of one length.")
        if rows.size and (
            rows.min() < 0 or columns.min() < 0 or rows.max() >= self.shape[0] or columns.max() >= self.shape[1]
        ):
            raise ValueError(f"an entry lies outside a matrix of shape {self.shape}.")
        if np.any(np.diff(columns * self.shape[0] + rows) <= 0):
            raise ValueError("entries must be unique and sorted column by column; see SparsityPattern.from_matrix.")
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "columns", columns)

    @classmethod
    def from_matrix(cls, matrix: ArrayLike | sp.sparray | sp.spmatrix) -> SparsityPattern:
        """The pattern of the stored entries of a SciPy matrix, or of the nonzeros of an array."""
        stored: SparseArray = sp.coo_array(cast(Any, matrix))
        order = np.unique(stored.col.astype(np.int64) * stored.shape[0] + stored.row)
        columns, rows = np.divmod(order, max(stored.shape[0], 1))
        return cls((int(stored.shape[0]), int(stored.shape[1])), rows, columns)

    @classmethod
    def dense(cls, rows: int, columns: int) -> SparsityPattern:
        """Every entry."""
        column, row = np.divmod(np.arange(rows * columns, dtype=np.int64), max(rows, 1))
        return cls((rows, columns), row, column)

    @classmethod
    def empty(cls, rows: int, columns: int) -> SparsityPattern:
        """No entry."""
        nothing = np.zeros(0, dtype=np.int64)
        return cls((rows, columns), nothing, nothing)

    @cached_property
    def nnz(self) -> int:
        return self.rows.size

    @cached_property
    def is_dense(self) -> bool:
        return self.nnz == self.shape[0] * self.shape[1]

    @cached_property
    def is_diagonal(self) -> bool:
        return np.array_equal(self.rows, self.columns)

    @cached_property
    def on_diagonal(self) -> IntArray:
        """Where the entries of the diagonal stand in ``values``."""
        return np.flatnonzero(self.rows == self.columns)

    @cached_property
    def filled_rows(self) -> BoolArray:
        """(r,) which rows have an entry."""
        return np.bincount(self.rows, minlength=self.shape[0]) > 0

    @cached_property
    def filled_columns(self) -> BoolArray:
        """(c,) which columns have an entry."""
        return np.bincount(self.columns, minlength=self.shape[1]) > 0

    @cached_property
    def indptr(self) -> NDArray[np.int32]:
        """Column pointers of the compressed-sparse-column form; ``rows`` are its indices."""
        counts = np.bincount(self.columns, minlength=self.shape[1])
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    @cached_property
    def indices(self) -> NDArray[np.int32]:
        return self.rows.astype(np.int32)

    @cached_property
    def digest(self) -> bytes:
        """A fingerprint of the content, equal across processes."""
        state = hashlib.blake2b(repr(self.shape).encode(), digest_size=16)
        state.update(self.rows.tobytes())
        state.update(self.columns.tobytes())
        return state.digest()

    def positions(self, rows: ArrayLike, columns: ArrayLike) -> IntArray:
        """Where the entries ``(rows, columns)`` stand in ``values``; -1 for one outside the pattern."""
        wanted = np.asarray(columns, dtype=np.int64) * self.shape[0] + np.asarray(rows, dtype=np.int64)
        if self.is_dense:
            return wanted
        keys = self.columns * self.shape[0] + self.rows
        found = np.searchsorted(keys, wanted)
        found = np.minimum(found, max(keys.size - 1, 0))
        return np.where(keys[found] == wanted, found, -1) if keys.size else np.full(wanted.shape, -1, dtype=np.int64)

    def csc(self, values: FloatArray) -> sp.csc_array:
        """The SciPy matrix with these ``values`` (nnz,); index arrays are copied, as some solvers sort theirs."""
        return sp.csc_array((values, self.indices.copy(), self.indptr.copy()), shape=self.shape)

    def block_diagonal(self, values: FloatArray) -> sp.csc_array:
        """Several matrices of this pattern as the blocks of one: values (k, nnz) to (k r, k c)."""
        copies = np.arange(len(values), dtype=np.int32)[:, None]
        indices = (self.indices + copies * np.int32(self.shape[0])).ravel()
        indptr = np.append((self.indptr[:-1] + copies * np.int32(self.nnz)).ravel(), np.int32(values.size))
        shape = (len(values) * self.shape[0], len(values) * self.shape[1])
        return sp.csc_array((values.ravel(), indices, indptr), shape=shape)

    def dense_matrices(self, values: FloatArray) -> FloatArray:
        """(k, nnz) values to new (k, r, c) matrices."""
        if self.is_dense:
            return values.reshape(len(values), self.shape[1], self.shape[0]).swapaxes(1, 2).copy()
        matrices = np.zeros((len(values), *self.shape))
        matrices[:, self.rows, self.columns] = values
        return matrices

    def dense_columns(self, values: FloatArray) -> FloatArray:
        """(k, nnz) values to (k, c, r) transposed matrices, to be read only."""
        if self.is_dense:
            return values.reshape(len(values), self.shape[1], self.shape[0])
        flat = np.zeros((len(values), self.shape[1] * self.shape[0]))
        flat[:, self._flat_columns] = values
        return flat.reshape(len(values), self.shape[1], self.shape[0])

    @cached_property
    def _flat_columns(self) -> IntArray:
        """Where the entries stand in the transposed matrix, row by row."""
        return self.columns * self.shape[0] + self.rows

    def to_dense(self, values: Tensor) -> Tensor:
        """(..., nnz) values to (..., r, c) matrices."""
        leading = values.shape[:-1]
        if self.is_dense:
            return values.reshape(*leading, self.shape[1], self.shape[0]).mT
        flat = values.new_zeros(*leading, self.shape[0] * self.shape[1])
        flat[..., self._index("flat", values)] = values
        return flat.reshape(*leading, *self.shape)

    def gather(self, matrices: Tensor) -> Tensor:
        """(..., r, c) matrices to their (..., nnz) values on the pattern."""
        if self.is_dense:
            return matrices.mT.reshape(*matrices.shape[:-2], self.nnz)
        flat = matrices.reshape(*matrices.shape[:-2], self.shape[0] * self.shape[1])
        return flat[..., self._index("flat", matrices)]

    def matvec(self, values: Tensor, x: Tensor) -> Tensor:
        """``M x`` for each element: values (nnz,) or (R, nnz), x (B, c), B a multiple of R, to (B, r)."""
        return self._product(values, x, transpose=False)

    def rmatvec(self, values: Tensor, y: Tensor) -> Tensor:
        """``Mᵀ y`` for each element: values (nnz,) or (R, nnz), y (B, r), B a multiple of R, to (B, c)."""
        return self._product(values, y, transpose=True)

    def _product(self, values: Tensor, vectors: Tensor, transpose: bool) -> Tensor:
        size = self.shape[1] if transpose else self.shape[0]
        if self.nnz == 0 or vectors.shape[0] == 0:
            return vectors.new_zeros(vectors.shape[0], size)
        if _is_plain(values, vectors):
            return from_numpy(self.numpy_product(values.numpy(), vectors.numpy(), transpose))
        if values.ndim == 1 and self.is_dense:
            matrix = self.to_dense(values)
            return vectors @ (matrix if transpose else matrix.mT)
        grouped = vectors.reshape(-1, 1 if values.ndim == 1 else values.shape[0], vectors.shape[-1])
        if self.is_dense:
            matrices = self.to_dense(values)
            return torch.einsum("brc,kbr->kbc" if transpose else "brc,kbc->kbr", matrices, grouped).reshape(-1, size)
        source, target = ("rows", "columns") if transpose else ("columns", "rows")
        terms = values * grouped[..., self._index(source, values)]
        product = vectors.new_zeros(*grouped.shape[:2], size).index_add(-1, self._index(target, values), terms)
        return product.reshape(-1, size)

    def numpy_product(self, values: FloatArray, vectors: FloatArray, transpose: bool = False) -> FloatArray:
        """:meth:`matvec` or :meth:`rmatvec` outside autograd: threads of a parallel gather and scatter cost more.

        Each element is a product of its own, also of a matrix that all share: BLAS sums in an order that depends on how
        many vectors there are, and an element's bits must not depend on the others.
        """
        if not self.nnz:
            return np.zeros((len(vectors), self.shape[1] if transpose else self.shape[0]))
        if self._is_filled:
            columns = self.dense_columns(values.reshape(-1, self.nnz))
            grouped = vectors.reshape(-1, len(columns), 1, vectors.shape[1])
            with np.errstate(over="ignore", invalid="ignore"):  # of points that are none
                product = grouped @ (columns.swapaxes(1, 2) if transpose else columns)
            return product.reshape(len(vectors), -1)
        if values.ndim == 1:
            matrix: Any = copy(self._templates[transpose])  # not its index arrays, nor its data
            matrix.data = values
            return np.ascontiguousarray((matrix @ vectors.T).T)
        source, target = (self.rows, self.columns) if transpose else (self.columns, self.rows)
        size, count = self.shape[1] if transpose else self.shape[0], vectors.shape[0]
        terms = np.take(vectors, source, axis=1).reshape(-1, *values.shape) * values
        place = self._places.get((count, transpose))
        if place is None:
            place = (np.arange(count)[:, None] * size + target).ravel()
            if place.size <= PART:
                if len(self._places) >= _KEPT_PLACES:
                    self._places.clear()
                self._places[count, transpose] = place
        sums = np.bincount(place, weights=terms.ravel(), minlength=count * size)
        return sums.astype(np.float64, copy=False).reshape(count, size)

    @cached_property
    def _is_filled(self) -> bool:
        """Whether products with all entries, zeros too, are the quicker ones."""
        size = self.shape[0] * self.shape[1]
        return self.is_dense or (size <= SMALL and size <= FILLED * self.nnz)

    @cached_property
    def _templates(self) -> tuple[sp.csc_array, sp.csr_array]:
        """The matrix and its transpose, without values: SciPy takes longer to check one than to multiply."""
        stored = np.zeros(self.nnz), self.indices, self.indptr
        return sp.csc_array(stored, shape=self.shape), sp.csr_array(stored, shape=self.shape[::-1])

    @cached_property
    def _places(self) -> dict[tuple[int, bool], IntArray]:
        """Where the terms of products go, by the number of vectors."""
        return {}

    def maxima(self, values: Tensor, axis: Literal["rows", "columns"]) -> Tensor:
        """The largest value in each row or column, (R, nnz) to (R, r) or (R, c).

        Where there is no entry it is 0 if all values are nonnegative, else -inf.
        """
        size = self.shape[0 if axis == "rows" else 1]
        if self.is_dense and self.nnz:
            return values.reshape(len(values), self.shape[1], self.shape[0]).amax(1 if axis == "rows" else 2)
        least = 0.0 if not values.numel() or float(values.min()) >= 0 else -torch.inf
        index = self._index(axis, values).expand(values.shape)
        return values.new_full((len(values), size), least).scatter_reduce(1, index, values, "amax")

    def largest(self, values: Tensor, axes: Sequence[Literal["rows", "columns"]]) -> tuple[Tensor, ...]:
        """For each axis the largest magnitudes, (R, nnz) to (R, r) or (R, c); 0 where there is no entry.

        In chunks that stay in a core's cache: memory that is new costs more than the arithmetic.
        """
        count = max(1, PART // max(self.nnz, 1))
        maxima: list[list[Tensor]] = [[] for _ in axes]
        for chunk in values.split(count):
            magnitudes = chunk.abs()
            for found, axis in zip(maxima, axes, strict=True):
                found.append(self.maxima(magnitudes, axis))
        return tuple(torch.cat(found) if len(found) != 1 else found[0] for found in maxima)

    def outer(self, y: Tensor, x: Tensor, rows: int | None) -> Tensor:
        """``Σ y xᵀ`` on the pattern, over all elements to (nnz,), or over those that share a row to (rows, nnz).

        Args:
            y: (B, r).
            x: (B, c).
            rows: None, or R with B a multiple of R; element i belongs to row i mod R.
        """
        plain = _is_plain(y, x)
        if rows is None and y.shape[0] <= 2:  # of one element, with the bits that it has among others
            return self.outer(y, x, 1)[0] if y.shape[0] else y.new_zeros(self.nnz)
        if rows is None:
            if 4 * self.nnz >= self.shape[0] * self.shape[1]:
                return self.gather(y.mT @ x)
            if plain:
                terms = y.numpy()[:, self.rows]
                return from_numpy(np.einsum("be,be->e", terms, x.numpy()[:, self.columns]))
            return (y[:, self._index("rows", y)] * x[:, self._index("columns", x)]).sum(0)
        groups = y.shape[0] // max(rows, 1)
        y, x = y.reshape(groups, rows, y.shape[-1]), x.reshape(groups, rows, x.shape[-1])
        if self.is_dense and groups == 1:
            return (x[0, :, :, None] * y[0, :, None, :]).reshape(rows, self.nnz)  # column by column
        if self.is_dense and groups == 2:  # as sums of two products, whose bits do not depend on the other elements
            terms = x[0, :, :, None] * y[0, :, None, :]
            return terms.addcmul_(x[1, :, :, None], y[1, :, None, :]).reshape(rows, self.nnz)
        if self.is_dense:
            return torch.bmm(x.permute(1, 2, 0), y.transpose(0, 1)).reshape(rows, self.nnz)
        if plain:
            terms = y.numpy()[..., self.rows]
            terms *= x.numpy()[..., self.columns]
            return from_numpy(terms[0] if terms.shape[0] == 1 else terms.sum(0))
        return (y[..., self._index("rows", y)] * x[..., self._index("columns", x)]).sum(0)

    def _index(self, name: str, like: Tensor) -> Tensor:
        cache: dict[tuple[str, torch.device], Tensor] = self.__dict__.setdefault("_indices", {})
        key = (name, like.device)
        if key not in cache:
            entries = self.rows * self.shape[1] + self.columns if name == "flat" else getattr(self, name)
            cache[key] = from_numpy(entries).to(like.device)
        return cache[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "rows": self.rows, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _is_plain(first: Tensor, second: Tensor) -> bool:
    """Whether these are float64 on the CPU with nothing for autograd or torch.func to record: NumPy will do."""
    double = torch.float64
    return (
        first.dtype is double
        and second.dtype is double
        and first.is_cpu
        and second.is_cpu
        and not any(is_differentiated(tensor) or is_wrapped(tensor) for tensor in (first, second))
    )
