"""Sparse linear maps on batched tensors, differentiable: how parameters reach data, and solutions reach variables."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from torch import Tensor

from lpgd.arrays import from_numpy

__all__ = ["SparseMap"]


class SparseMap:
    """``v ↦ M v`` for vectors in the last dimension; a gather and a scaling where each row of M has one entry.

    Args:
        matrix: (r, c).
    """

    def __init__(self, matrix: Any) -> None:
        entries: Any = sp.csr_array(matrix).tocoo()
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
