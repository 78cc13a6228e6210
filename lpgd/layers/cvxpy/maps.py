"""Sparse affine maps on batched tensors, differentiable: how parameters reach data, and solutions reach variables."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd.arrays import SparseArray, from_numpy
from lpgd.layers.cvxpy.layout import AffineMap, ParameterLayout

__all__ = ["Columns", "DataMap", "SparseMap"]


class SparseMap:
    """``v ↦ M v`` for vectors in the last dimension; a gather and a scaling where each row of M has one entry.

    Args:
        matrix: (r, c).
    """

    def __init__(self, matrix: SparseArray) -> None:
        entries: SparseArray = sp.csr_array(matrix).tocoo()
        self.size = int(entries.shape[0])
        rows, columns = (index.astype(np.int64) for index in entries.coords)
        self.is_empty = rows.size == 0
        self.is_gather = np.array_equal(rows, np.arange(self.size))
        self.tensors = {
            "rows": from_numpy(rows),
            "columns": from_numpy(columns),
            "values": from_numpy(entries.data.astype(np.float64)),
        }

    def __call__(self, vectors: Tensor) -> Tensor:
        """(..., c) to (..., r)."""
        if self.is_empty:
            return vectors.new_zeros(*vectors.shape[:-1], self.size)
        rows, columns, values = (tensor.to(vectors.device) for tensor in self.tensors.values())
        leading = vectors.shape[:-1]
        terms = vectors.index_select(-1, columns) * values  # ``gather`` would keep the vectors, the user's own tensors
        if self.is_gather:
            return terms
        # In the last dimension, ``index_add`` takes twice as long (torch 2.13).
        return terms.new_zeros(*leading, self.size).scatter_add(-1, rows.expand(*leading, -1), terms)


class Columns:
    """The parameters as vectors, in float64: each is shared by the batch or has a row for each element.

    Those in ``idle``, by position, reach no data: their gradients are zeros.
    """

    def __init__(
        self,
        layouts: Sequence[ParameterLayout],
        tensors: Sequence[Tensor],
        batch_size: int,
        idle: frozenset[int] = frozenset(),
    ) -> None:
        self.batch_size, self.idle = batch_size, idle
        self.values_at: dict[int, Tensor] = {}
        for position, (layout, tensor) in enumerate(zip(layouts, tensors, strict=True)):
            values = tensor.to(torch.float64)
            if layout.symmetric:
                # Of a symmetric matrix only one triangle is read: this spreads the gradient over both.
                values = 0.5 * (values + values.mT)
            flat = values.flatten(values.ndim - len(layout.shape)) if layout.shape else values.unsqueeze(-1)
            self.values_at[position] = _log(flat) if layout.log else flat
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.cache: dict[tuple[int, ...], Tensor] = {}

    def vector(self, positions: tuple[int, ...]) -> Tensor:
        """(p',) or, if any of these parameters is batched, (B, p'): all entries of one after those of the other."""
        if positions not in self.cache:
            pieces = [self.values_at[position] for position in positions]
            if any(piece.requires_grad for piece in pieces):
                pieces += [self.values_at[position][..., :0] for position in sorted(self.idle)]
            if any(piece.ndim == 2 for piece in pieces):
                pieces = [piece.expand(self.batch_size, piece.shape[-1]) for piece in pieces]
            self.cache[positions] = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        return self.cache[positions]


def _log(values: Tensor) -> Tensor:
    """The logarithm, NaN with a zero derivative where there is none: a failed element's gradient is zero."""
    positive = values > 0
    return torch.where(positive, torch.log(torch.where(positive, values, 1.0)), torch.nan)


class DataMap:
    """One datum as an affine function of the parameter vector."""

    def __init__(self, affine: AffineMap) -> None:
        matrix: SparseArray = affine.matrix.tocsc().astype("float64")
        self.reaching = tuple(sorted(affine.reaching))
        self.constant = from_numpy(matrix[:, [-1]].toarray().ravel())
        self.has_constant = bool(self.constant.ne(0).any())
        self.linear = SparseMap(_of_tensors(matrix, [affine.parameters[position] for position in self.reaching]))

    def __call__(self, columns: Columns) -> Tensor:
        constant = self.constant.to(columns.device)
        if not self.reaching:
            return constant
        value = self.linear(columns.vector(self.reaching))
        return value + constant if self.has_constant else value


def _of_tensors(matrix: SparseArray, layouts: Sequence[ParameterLayout]) -> SparseArray:
    """A matrix whose columns are those of θ as one for all entries of some parameters' tensors, row by row."""
    columns, entries, width = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for layout in layouts:
        columns.append(np.arange(layout.columns.start, layout.columns.stop))
        entries.append(width + layout.take)
        width += math.prod(layout.shape)
    chosen = matrix[:, np.concatenate(columns)].tocoo()
    row, column = chosen.coords
    return sp.csr_array((chosen.data, (row, np.concatenate(entries)[column])), shape=(matrix.shape[0], width))
