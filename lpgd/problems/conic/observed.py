"""What is observed of the solutions of a conic program: the functions of x and y that warnings may speak of.

A modelling language adds variables and rows of its own, such as those of epigraphs.  They need not be unique, nor move
smoothly, where all is unique and smooth that a loss sees and that gradients of the parameters θ are made of,

    dℓ/dθ = Σ ∂q/∂θ · dx - Σ ∂b/∂θ · dy + Σ ∂A/∂θ · (y dxᵀ + dy xᵀ) + ...
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, SparseArray, from_numpy, random_direction

__all__ = ["Observed", "Readout"]

NOTHING = 1e-9
"""A multiplier, or a variable, of this size, in units of order 1, is zero."""

DENSE = 8
"""A matrix of which one entry in so many is there is multiplied as a dense one."""


class _Combinations(NamedTuple):
    """The entries of a sparse matrix."""

    row: Tensor
    column: Tensor
    factor: Tensor


@dataclass(frozen=True, eq=False)
class Readout:
    """Functions of a vector: some of its entries, and linear combinations of several.

    Args:
        entries: (k,) which entries, increasing.
        combinations: (l, n) the others, one a row.
    """

    entries: IntArray
    combinations: SparseArray

    @classmethod
    def of(cls, matrix: SparseArray) -> Readout:
        """The functions that are rows of a matrix (r, n); what is known by single entries is not asked again."""
        matrix = matrix.tocsr()
        lengths = np.diff(matrix.indptr)
        entries = np.unique(matrix.indices[np.repeat(lengths == 1, lengths)]).astype(np.int64)
        known = np.zeros(matrix.shape[1], dtype=bool)
        known[entries] = True
        row = np.repeat(np.arange(lengths.size), lengths)
        unknown = np.bincount(row, weights=~known[matrix.indices], minlength=lengths.size)
        return cls(entries, matrix[unknown > 0])

    @property
    def count(self) -> int:
        """K + l."""
        return self.entries.size + int(self.combinations.shape[0])

    @cached_property
    def touched(self) -> IntArray:
        """The entries that any function depends on."""
        return np.union1d(self.entries, self.combinations.indices)

    @cached_property
    def _combinations(self) -> _Combinations:
        matrix = self.combinations.tocoo()
        row, column = (from_numpy(index.astype(np.int64)) for index in matrix.coords)
        return _Combinations(row, column, from_numpy(matrix.data.astype(np.float64)))

    def _factors(self, unit: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values (B, ·) of the combinations, relative to what entries of 1 could make of them."""
        row, column, factor = (tensor.to(device) for tensor in self._combinations)
        factors = factor * unit[:, column]
        size = factors.new_zeros(unit.shape[0], self.combinations.shape[0]).index_add_(1, row, factors.abs())
        return row, column, factors / size.clamp(min=1e-300)[:, row]

    def __call__(self, vectors: Tensor, unit: Tensor) -> Tensor:
        """(B, n) to (B, k + l), of vectors in which 1 stands for ``unit`` (B, n)."""
        chosen = vectors[:, from_numpy(self.entries).to(vectors.device)]
        if not self.combinations.shape[0]:
            return chosen
        row, column, factors = self._factors(unit, vectors.device)
        sums = factors.new_zeros(vectors.shape[0], self.combinations.shape[0])
        return torch.cat([chosen, sums.index_add_(1, row, factors * vectors[:, column])], 1)

    def probe(self, unit: Tensor) -> Tensor:
        """(B, n) a random sum of all functions, as a vector: it is in a subspace where all of them are."""
        weights = from_numpy(random_direction(self.count).copy()).to(unit.device)
        vectors = torch.zeros_like(unit)
        vectors[:, from_numpy(self.entries).to(unit.device)] = weights[: self.entries.size]
        if self.combinations.shape[0]:
            row, column, factors = self._factors(unit, unit.device)
            vectors.index_add_(1, column, factors * weights[self.entries.size :][row])
        return vectors


@dataclass(frozen=True, eq=False)
class Observed:
    """What of x and y reaches a loss, or a gradient of the parameters.

    Args:
        of_x: the user's variables, and what gradients of the objective depend on.
        of_y: what gradients of the right-hand sides depend on.
        rows, columns: the entries of A that parameters reach: dx matters where rows have multipliers, dy where
            variables are not zero.
        bounded: (n,) 1 for variables with a bound that parameters reach, 0 for others.
    """

    of_x: Readout
    of_y: Readout
    rows: IntArray
    columns: IntArray
    bounded: FloatArray

    def reached(self, y: Tensor) -> Tensor:
        """(B, n) 1 for variables whose changes gradients of A depend on, with the multipliers y (B, m)."""
        return self._across(y, self._reach)

    def reached_rows(self, x: Tensor) -> Tensor:
        """(B, m) 1 for rows whose multipliers' changes gradients of A depend on, at the solution x (B, n)."""
        return self._across(x, self._reach.T)

    @cached_property
    def _reach(self) -> FloatArray | SparseArray:
        """(m, n) 1 for the entries of A that parameters reach, in single precision: it counts to 2²⁴ exactly."""
        size = int(self.of_y.combinations.shape[1]), int(self.of_x.combinations.shape[1])
        ones = np.ones(self.rows.size, dtype=np.float32)
        reach: SparseArray = sparse.csr_array((ones, (self.rows, self.columns)), shape=size)
        return reach.toarray() if reach.nnz * DENSE >= size[0] * size[1] else reach

    @staticmethod
    def _across(values: Tensor, reach: FloatArray | SparseArray) -> Tensor:
        """(B, ·) 1 where an entry of A leads to one of ``values`` that is not zero."""
        present = np.abs(values.detach().cpu().numpy()) > NOTHING
        return from_numpy(present.astype(np.float32) @ reach > 0.0).to(values)

    def in_x(self, vectors: Tensor, y: Tensor, unit: Tensor) -> Tensor:
        """(B, n) changes of x at multipliers y (B, m), as changes of what is observed, (B, ·)."""
        values = self.of_x(vectors, unit)
        return torch.cat([values, self.reached(y) * vectors], 1) if self.rows.size else values

    def in_y(self, vectors: Tensor, x: Tensor, unit: Tensor) -> Tensor:
        """(B, m) changes of y at a solution x (B, n), as changes of what is observed, (B, ·)."""
        values = self.of_y(vectors, unit)
        return torch.cat([values, self.reached_rows(x) * vectors], 1) if self.rows.size else values

    def probe_of_x(self, y: Tensor, unit: Tensor) -> Tensor:
        """(B, n) a random sum of all that is observed of x."""
        probe = self.of_x.probe(unit)
        if not self.rows.size:
            return probe
        return probe + self.reached(y) * from_numpy(random_direction(probe.shape[1]).copy()).to(y.device)

    def probe_of_y(self, x: Tensor, unit: Tensor) -> Tensor:
        """(B, m) a random sum of all that is observed of y."""
        probe = self.of_y.probe(unit)
        if not self.rows.size:
            return probe
        return probe + self.reached_rows(x) * from_numpy(random_direction(probe.shape[1]).copy()).to(x.device)

    def rows_at(self, x: Tensor) -> Tensor:
        """(B, m) the rows of whose multipliers anything is asked."""
        rows = self.reached_rows(x) > 0
        rows[:, from_numpy(self.of_y.touched).to(x.device)] = True
        return rows
