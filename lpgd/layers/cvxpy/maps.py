"""Sparse affine maps on batched tensors, differentiable: how parameters reach data, and solutions reach variables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

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
        terms = vectors.index_select(-1, columns) * values
        if self.is_gather:
            return terms
        return terms.new_zeros(*vectors.shape[:-1], self.size).index_add(-1, rows, terms)


class Columns:
    """The parameter vector θ, in float64: shared by the batch as far as the parameters that are asked for are."""

    def __init__(self, layouts: Sequence[ParameterLayout], tensors: Sequence[Tensor], batch_size: int) -> None:
        self.batch_size = batch_size
        width = max((layout.columns.stop for layout in layouts), default=0)
        self.values_at: dict[int, Tensor] = {}
        for position, (layout, tensor) in enumerate(zip(layouts, tensors, strict=True)):
            values = tensor.to(torch.float64)
            if layout.symmetric:
                # Of a symmetric matrix only one triangle is read: this spreads the gradient over both.
                values = 0.5 * (values + values.mT)
            flat = values.flatten(values.ndim - len(layout.shape)) if layout.shape else values.unsqueeze(-1)
            values = flat.index_select(-1, from_numpy(layout.take).to(flat.device))
            self.values_at[position] = _log(values) if layout.log else values
        self.order = sorted(self.values_at, key=lambda position: layouts[position].columns.start)
        self.sizes = {position: layout.take.size for position, layout in enumerate(layouts)}
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.width = width
        self.cache: dict[bool, Tensor] = {}

    def vector(self, positions: frozenset[int]) -> Tensor:
        """(p,) or, if any of these parameters is batched, (B, p); other parameters' columns may be zero."""
        batched = any(self.values_at[position].ndim == 2 for position in positions)
        if batched not in self.cache:
            leading = (self.batch_size,) if batched else ()
            pieces = [
                self.values_at[position].expand(*leading, self.sizes[position])
                if batched or self.values_at[position].ndim == 1
                else self.values_at[position].new_zeros(self.sizes[position])
                for position in self.order
            ]
            empty = torch.zeros(*leading, 0, dtype=torch.float64, device=self.device)
            self.cache[batched] = torch.cat([*pieces, empty], dim=-1)
        vector = self.cache[batched]
        if vector.requires_grad and not any(self.values_at[position].requires_grad for position in positions):
            # A datum that no differentiated parameter reaches needs no gradient, whatever the others do.
            return vector.detach() if unpack_dual(vector).tangent is None else vector
        return vector


def _log(values: Tensor) -> Tensor:
    """The logarithm, NaN with a zero derivative where there is none: a failed element's gradient is zero."""
    positive = values > 0
    return torch.where(positive, torch.log(torch.where(positive, values, 1.0)), torch.nan)


class DataMap:
    """One datum as an affine function of the parameter vector."""

    def __init__(self, affine: AffineMap) -> None:
        matrix: SparseArray = affine.matrix.tocsc().astype("float64")
        self.reaching = affine.reaching
        self.constant = from_numpy(matrix[:, [-1]].toarray().ravel())
        self.has_constant = bool(self.constant.ne(0).any())
        self.linear = SparseMap(matrix[:, :-1])

    def __call__(self, columns: Columns) -> Tensor:
        constant = self.constant.to(columns.device)
        if not self.reaching:
            return constant
        value = self.linear(columns.vector(self.reaching))
        return value + constant if self.has_constant else value
