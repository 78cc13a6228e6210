"""Matrices that a layer is called with, dense or sparse, as the values of a conic program's fixed patterns.

A sparse tensor's pattern is read from its indices, by their content; its values stay on autograd's tape, so that
its gradient is sparse too.  What depends on patterns alone is worked out once and kept: see :func:`plan`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import IntArray, from_numpy
from lpgd.cones.product import Cones
from lpgd.layers.concrete_values import inspect_values
from lpgd.layers.inputs import Batch
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicStructure

__all__ = ["Matrix", "Plan", "join", "plan", "read_matrix"]

KEPT = 32
"""Structures, and patterns of sparse tensors, that are kept: the most recent ones."""


class Placement:
    """Where each of k values goes among ``size`` entries; values that meet are added, the other entries are zero."""

    def __init__(self, places: IntArray, size: int) -> None:
        self.size = size
        whole = np.arange(size)
        self.is_identity = np.array_equal(places, whole)
        order = places if self.is_identity else np.argsort(places, kind="stable")
        self.is_permutation = np.array_equal(places[order], whole)
        self.index = from_numpy(order if self.is_permutation else places)
        self.on_device = {self.index.device: self.index}

    def __call__(self, values: Tensor) -> Tensor:
        """(..., k) to (..., size)."""
        if self.is_identity:
            return values
        if values.device not in self.on_device:
            self.on_device[values.device] = self.index.to(values.device)
        index = self.on_device[values.device]
        if self.is_permutation:
            return values.index_select(-1, index)
        return values.new_zeros(*values.shape[:-1], self.size).index_add(-1, index, values)


@dataclass(frozen=True)
class Pattern:
    """The pattern of a matrix, compared by its content; without a digest every entry is in it."""

    shape: tuple[int, int]
    digest: bytes | None = None
    entries: SparsityPattern | None = field(default=None, compare=False, repr=False)

    @property
    def is_dense(self) -> bool:
        return self.entries is None

    def sparsity(self) -> SparsityPattern:
        """The pattern with its entries listed."""
        return self.entries if self.entries is not None else SparsityPattern.dense(*self.shape)


class Matrix(NamedTuple):
    """A matrix argument: its pattern and its values in float64.

    ``values`` are (r, c) or (R, r, c) where the pattern is dense, else (nnz,) or (R, nnz), column by column.
    """

    pattern: Pattern
    values: Tensor


@dataclass(frozen=True)
class _Stored:
    """The indices of a sparse tensor, compared by their content: of a COO tensor, or compressed by row or column."""

    layout: torch.layout
    shape: tuple[int, ...]
    digest: bytes
    indices: tuple[IntArray, ...] = field(compare=False, repr=False)

    def entries(self) -> tuple[IntArray, IntArray, IntArray]:
        """For each stored value, its place in the flattened batch, its row and its column."""
        if self.layout is torch.sparse_coo:
            (index,) = self.indices
            leading = np.zeros_like(index[0])
            for size, along in zip(self.shape[:-2], index[:-2], strict=True):
                leading = leading * size + along
            return leading, index[-2], index[-1]
        count = int(np.prod(self.shape[:-2], dtype=np.int64))
        pointers, minor = (index.reshape(count, index.shape[-1]) for index in self.indices)
        lines = np.arange(pointers.shape[1] - 1)
        major = np.concatenate([np.repeat(lines, np.diff(row)) for row in pointers] or [lines[:0]])
        leading = np.repeat(np.arange(minor.shape[0]), minor.shape[1])
        rows, columns = (major, minor.ravel()) if self.layout is torch.sparse_csr else (minor.ravel(), major)
        return leading, rows, columns


@lru_cache(KEPT)
def _placed(stored: _Stored) -> tuple[Pattern, Placement]:
    """The union of the patterns of a batch, and where the stored values go: to (elements x entries)."""
    (r, c), count = stored.shape[-2:], int(np.prod(stored.shape[:-2], dtype=np.int64))
    leading, rows, columns = stored.entries()
    union, entry = np.unique(columns * r + rows, return_inverse=True)
    entry_columns, entry_rows = np.divmod(union, max(r, 1))
    sparsity = SparsityPattern((r, c), entry_rows, entry_columns)
    return Pattern((r, c), sparsity.digest, sparsity), Placement(leading * union.size + entry, count * union.size)


def read_matrix(name: str, tensor: Tensor, batch: Batch) -> Matrix:
    """The pattern and values of a checked argument, shared or with R rows as data of a problem are.

    Raises:
        ValueError: a sparse tensor with dense dimensions.
    """
    if tensor.layout is torch.strided:
        return Matrix(Pattern((tensor.shape[-2], tensor.shape[-1])), batch.rows(tensor, 2))
    try:
        dense = tensor.dense_dim()
    except RuntimeError as error:  # torch.func.grad and others cannot wrap them (torch 2.13)
        raise TypeError(
            f"{name} is {tensor.layout}, which torch.func does not take: pass tensor.to_sparse_coo() or a dense one."
        ) from error
    if dense:
        raise ValueError(f"{name} is a hybrid tensor with {dense} dense dimensions; it must have none.")
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        indices = (tensor.indices(),)
    elif tensor.layout is torch.sparse_csr:
        indices = (tensor.crow_indices(), tensor.col_indices())
    else:
        indices = (tensor.ccol_indices(), tensor.row_indices())
    arrays: tuple[IntArray, ...] = ()

    def read(shown: Sequence[Tensor]) -> None:
        nonlocal arrays
        arrays = tuple(index.detach().cpu().numpy().astype(np.int64, copy=False) for index in shown)

    inspect_values(read, indices, [index.ndim for index in indices])
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(array.tobytes())
    pattern, placement = _placed(_Stored(tensor.layout, tuple(tensor.shape), digest.digest(), arrays))
    values = placement(tensor.values().reshape(-1))
    assert pattern.entries is not None
    return Matrix(pattern, batch.rows(values.reshape(*tensor.shape[:-2], pattern.entries.nnz), 1))


class Plan:
    """A structure, and how the matrices of a call become its data.

    Args:
        n: number of variables.
        cones: of the rows of all blocks, one below the other.
        quadratic: pattern of P, or None.
        blocks: patterns of the matrices that A consists of.
        has_lower, has_upper: whether every variable has such a bound.
        integer: the variables that take whole numbers only.
        two_sided: how many rows, the last ones of the blocks, have two ends: see
            :class:`~lpgd.problems.conic.structure.ConicStructure`; all rows are of the zero cone then.
    """

    def __init__(
        self,
        n: int,
        cones: Cones,
        quadratic: Pattern | None,
        blocks: tuple[Pattern, ...],
        *,
        has_lower: bool = False,
        has_upper: bool = False,
        integer: tuple[int, ...] = (),
        two_sided: int = 0,
    ) -> None:
        stored = quadratic.sparsity() if quadratic is not None else SparsityPattern.empty(n, n)
        closed = stored if stored.is_dense else _with_transpose(stored)
        self.all_dense = all(block.is_dense for block in blocks)
        if self.all_dense or len(blocks) == 1:
            constraint = blocks[0].sparsity() if len(blocks) == 1 else SparsityPattern.dense(cones.rows, n)
            self.stacked = Placement(np.arange(constraint.nnz), constraint.nnz)
        else:
            patterns = [block.sparsity() for block in blocks]
            starts = np.cumsum([0, *(pattern.shape[0] for pattern in patterns)])
            rows = np.concatenate([pattern.rows + start for pattern, start in zip(patterns, starts[:-1], strict=True)])
            columns = np.concatenate([pattern.columns for pattern in patterns])
            order = np.lexsort((rows, columns))
            constraint = SparsityPattern((cones.rows, n), rows[order], columns[order])
            self.stacked = Placement(np.argsort(order), order.size)
        self.closed = Placement(closed.positions(stored.rows, stored.columns), closed.nnz)
        every, none = np.arange(n), np.zeros(0, dtype=np.int64)
        lower, upper = (every if has_bound else none for has_bound in (has_lower, has_upper))
        self.two_sided = two_sided
        if two_sided:
            values, whole = np.arange(n, n + two_sided), n + two_sided
            closed = SparsityPattern((whole, whole), closed.rows, closed.columns)
            rows = np.concatenate([constraint.rows, np.arange(cones.rows - two_sided, cones.rows)])
            columns = np.concatenate([constraint.columns, values])
            constraint = SparsityPattern((cones.rows, whole), rows, columns)
            lower, upper = np.concatenate([lower, values]), np.concatenate([upper, values])
        whole_numbers = np.array(integer, dtype=np.int64)
        self.structure = ConicStructure(closed, constraint, cones, lower, upper, whole_numbers, two_sided=two_sided)

    def quadratic_values(self, matrix: Matrix) -> Tensor:
        """Values of P on the structure's pattern.

        A dense P is read as it lies in memory, which transposes it: only ``½ (P + Pᵀ)`` counts.
        """
        return matrix.values.flatten(-2) if matrix.pattern.is_dense else self.closed(matrix.values)

    def constraint_values(self, matrices: Sequence[Matrix]) -> Tensor:
        """Values of A, the blocks one below the other, on the structure's pattern."""
        if self.all_dense:
            values = join([matrix.values.mT for matrix in matrices], 2).flatten(-2)
        else:
            flattened = [
                matrix.values.mT.flatten(-2) if matrix.pattern.is_dense else matrix.values for matrix in matrices
            ]
            values = self.stacked(join(flattened))
        if not self.two_sided:
            return values
        return torch.cat([values, values.new_full((*values.shape[:-1], self.two_sided), -1.0)], -1)


def _with_transpose(pattern: SparsityPattern) -> SparsityPattern:
    n, _ = pattern.shape
    keys = np.union1d(pattern.columns * n + pattern.rows, pattern.rows * n + pattern.columns)
    columns, rows = np.divmod(keys, n)
    return pattern if keys.size == pattern.nnz else SparsityPattern((n, n), rows, columns)


plan = lru_cache(KEPT)(Plan)
"""The :class:`Plan` for these arguments, worked out once."""


def join(tensors: Sequence[Tensor], ndim: int = 1) -> Tensor:
    """Concatenate data of ``ndim`` dimensions along their last; where some have R rows, the others are repeated."""
    if len(tensors) == 1:
        return tensors[0]
    if any(tensor.ndim > ndim for tensor in tensors):
        period = max(tensor.shape[0] for tensor in tensors if tensor.ndim > ndim)
        tensors = [_repeated(tensor, period, ndim) for tensor in tensors]
    return torch.cat([*tensors], -1)


def _repeated(tensor: Tensor, period: int, ndim: int) -> Tensor:
    if tensor.ndim == ndim:
        return tensor.expand(period, *tensor.shape)
    return tensor if tensor.shape[0] == period else tensor.repeat(period // tensor.shape[0], *(1,) * ndim)
