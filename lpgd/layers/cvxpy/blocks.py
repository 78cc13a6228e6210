"""The matrix W of substituted variables in blocks of rows, dense or entry by entry: its products and its squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import FloatArray, IntArray, SparseArray, from_numpy
from lpgd.layers.cvxpy.elimination import FULL, LONGEST, components, united_support
from lpgd.layers.cvxpy.layout import AffineMap
from lpgd.layers.cvxpy.maps import DataMap
from lpgd.problems.conic.sparsity import SparsityPattern

__all__ = ["Block", "places", "product", "scaled", "selection", "split"]

MOST_BLOCKS = 16
"""How many dense blocks are multiplied one by one."""


class Block(Protocol):
    """Some rows of W.

    Attributes:
        map: the parameters to its entries.
        entries: the entries of P' that its squares reach, as column times n plus row.
        target: where each of them stands in P'.
    """

    map: DataMap
    entries: IntArray
    target: Tensor

    def __init__(self, W: SparsityPattern, W_map: AffineMap, squares: SparsityPattern, rows: IntArray) -> None: ...

    def gram(self, W: Tensor, squares: Tensor) -> Tensor | None:
        """The entries of ``Wᵀ P_TT W``; None where P has none."""
        ...

    def adjoint(self, W: Tensor, slope: Tensor) -> Tensor:
        """``Wᵀ v``, v with an entry for each variable of T."""
        ...

    def forward(self, W: Tensor, x: Tensor) -> Tensor:
        """``W x``, with an entry for each variable of T."""
        ...


class _Dense(Block):
    """Rows of W that are held as a dense matrix."""

    def __init__(self, W: SparsityPattern, W_map: AffineMap, squares: SparsityPattern, rows: IntArray) -> None:
        inside = np.isin(W.rows, rows)
        columns = np.unique(W.columns[inside])
        row_place, place = places(W.shape[0], rows), places(W.shape[1], columns)
        held = np.flatnonzero(inside)
        at = row_place[W.rows[held]] * columns.size + place[W.columns[held]]
        chosen = selection(at, held, (rows.size * columns.size, W.nnz))
        self.map = DataMap(AffineMap(sp.csr_array(chosen @ W_map.matrix), W_map.parameters))
        self.sizes, self.shape = W.shape, (rows.size, columns.size)
        square_index = np.flatnonzero(np.isin(squares.rows, rows))
        first, second = row_place[squares.rows[square_index]], row_place[squares.columns[square_index]]
        self.is_diagonal = np.array_equal(first, second)
        self.rows, self.columns, self.square_index = (from_numpy(index) for index in (rows, columns, square_index))
        self.squares_at = from_numpy(first if self.is_diagonal else first * rows.size + second)
        full = columns[:, None] * W.shape[1] + columns[None, :]
        self.entries = full.ravel() if square_index.size else np.zeros(0, np.int64)
        self.target = torch.zeros(0, dtype=torch.int64)

    def gram(self, W: Tensor, squares: Tensor) -> Tensor | None:
        if not self.entries.size:
            return None
        if W.ndim == squares.ndim == 1:  # a batch of one, with the bits that an element has in any batch
            gram = self.gram(W[None], squares[None])
            return None if gram is None else gram[0]
        matrix = self._matrix(W)
        values = squares[..., self.square_index.to(W.device)]
        size = self.shape[0] if self.is_diagonal else self.shape[0] ** 2
        placed = values.new_zeros(*values.shape[:-1], size).index_copy(-1, self.squares_at.to(W.device), values)
        if self.is_diagonal:
            weighted = placed[..., None] * matrix
        else:
            weighted = placed.reshape(*placed.shape[:-1], self.shape[0], self.shape[0]) @ matrix
        gram = matrix.mT @ weighted
        return (0.5 * (gram + gram.mT)).flatten(-2)

    def adjoint(self, W: Tensor, slope: Tensor) -> Tensor:
        values = _one_by_one(self._matrix(W).mT, slope[..., self.rows.to(W.device)])
        return values.new_zeros(*values.shape[:-1], self.sizes[1]).index_copy(-1, self.columns.to(W.device), values)

    def forward(self, W: Tensor, x: Tensor) -> Tensor:
        values = _one_by_one(self._matrix(W), x[..., self.columns.to(W.device)])
        return values.new_zeros(*values.shape[:-1], self.sizes[0]).index_copy(-1, self.rows.to(W.device), values)

    def _matrix(self, W: Tensor) -> Tensor:
        return W.reshape(*W.shape[:-1], *self.shape)


class _Thin(Block):
    """Rows of W that are held as their entries, whose products are summed one by one."""

    def __init__(self, W: SparsityPattern, W_map: AffineMap, squares: SparsityPattern, rows: IntArray) -> None:
        held = np.flatnonzero(np.isin(W.rows, rows))
        held = held[np.argsort(W.rows[held], kind="stable")]
        self.map = DataMap(scaled(W_map, held))
        self.sizes, self.rows, self.columns = W.shape, W.rows[held], W.columns[held]
        ends = np.cumsum(np.bincount(self.rows, minlength=W.shape[0]))
        starts, lengths = np.concatenate([[0], ends[:-1]]), np.diff(ends, prepend=0)
        square_index = np.flatnonzero(np.isin(squares.rows, rows))
        # All pairs of an entry of the one row and an entry of the other, for every entry of P_TT
        first, second = squares.rows[square_index], squares.columns[square_index]
        pairs = lengths[first] * lengths[second]
        which = np.repeat(np.arange(square_index.size), pairs)
        number = np.arange(pairs.sum()) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        above, below = np.divmod(number, np.maximum(lengths[second][which], 1))
        left, right = starts[first][which] + above, starts[second][which] + below
        reached = self.columns[right] * W.shape[1] + self.columns[left]
        self.entries, sums = np.unique(reached, return_inverse=True)
        self.factors = tuple(from_numpy(index.astype(np.int64)) for index in (left, square_index[which], right, sums))
        self.target = torch.zeros(0, dtype=torch.int64)

    def gram(self, W: Tensor, squares: Tensor) -> Tensor | None:
        if not self.entries.size:
            return None
        left, middle, right, sums = (index.to(W.device) for index in self.factors)
        terms = W[..., left] * squares[..., middle] * W[..., right]
        return terms.new_zeros(*terms.shape[:-1], self.entries.size).index_add(-1, sums, terms)

    def adjoint(self, W: Tensor, slope: Tensor) -> Tensor:
        return product(self.columns, self.rows, self.sizes[1], W, slope)

    def forward(self, W: Tensor, x: Tensor) -> Tensor:
        return product(self.rows, self.columns, self.sizes[0], W, x)


def split(W: SparsityPattern, squares: SparsityPattern) -> Sequence[tuple[type[Block], IntArray]]:
    """The rows of W in blocks, and what each is; rows that P_TT joins are in one block."""
    entries = sp.csr_array((np.ones(W.nnz), (W.rows, W.columns)), shape=W.shape)
    joined = sp.csr_array((np.ones(squares.nnz), (squares.rows, squares.columns)), shape=squares.shape)
    support = united_support(entries, joined)
    length = np.diff(support.indptr)
    dense: list[IntArray] = []
    for among in (length > LONGEST, (length > 0) & (length <= LONGEST)):
        for members, columns in components(support, among):
            if members.size > 1 and columns.size > 1 and length[members].sum() >= FULL * members.size * columns.size:
                dense.append(members)
    dense.sort(key=lambda members: -int(length[members].sum()))
    del dense[MOST_BLOCKS:]
    thin = np.setdiff1d(
        np.flatnonzero(np.bincount(W.rows, minlength=W.shape[0])), np.concatenate([np.zeros(0, np.int64), *dense])
    )
    return [(_Dense, members) for members in dense] + [(_Thin, thin)] * bool(thin.size)


def _one_by_one(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Products with vectors (B, ·) or (·,), each by itself: one product for all rounds by how many there are."""
    if vectors.ndim == 1:
        return linalg.matvec(matrix if matrix.ndim == 3 else matrix[None], vectors[None])[
            0 if matrix.ndim == 2 else ...
        ]
    return linalg.matvec(matrix.expand(len(vectors), -1, -1) if matrix.ndim == 2 else matrix, vectors)


def places(size: int, chosen: IntArray) -> IntArray:
    """(size,) where each index stands among the chosen ones, -1 for others."""
    places = np.full(size, -1, dtype=np.int64)
    places[chosen] = np.arange(chosen.size)
    return places


def selection(rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> sp.csr_array:
    """Ones at (rows, columns)."""
    return sp.csr_array((np.ones(rows.size), (rows, columns)), shape=shape)


def scaled(affine: AffineMap, places: IntArray, factors: FloatArray | None = None) -> AffineMap:
    """Some of the data, times factors."""
    matrix: SparseArray = affine.matrix[places]
    if factors is not None:
        matrix = sp.diags_array(factors) @ matrix
    return AffineMap(sp.csr_array(matrix), affine.parameters)


def product(rows: IntArray, columns: IntArray, size: int, values: Tensor, vectors: Tensor) -> Tensor:
    """``M v`` for the matrix of ``size`` rows with these values at (rows, columns)."""
    terms = values * vectors[..., from_numpy(columns).to(vectors.device)]
    return terms.new_zeros(*terms.shape[:-1], size).index_add(-1, from_numpy(rows).to(terms.device), terms)
