"""Automorphisms of cones: linear maps of a cone onto itself, by their exponents of two.

zero, nonnegative   a factor for each row
second-order        a factor e, and a hyperbolic rotation of the first row and another: ``s₀ + s₁`` and ``s₀ - s₁``,
                    whose product bounds the other rows, are multiplied by ``e k`` and ``e / k``
semidefinite        ``S → V S V`` with a diagonal V
exponential         a factor e, and ``(u, v, w) → (u + c v, v, exp(c) w)``
power               factors of the rows with ``e_u^a e_v^(1 - a) = e_w``
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, SparseArray, from_numpy
from lpgd.cones.product import Cones, svec_indices

__all__ = ["Mixed", "exponents_of", "in_pairs", "paired_rows", "rotated", "sizes_of"]

SMALL = 1e-6
"""Smaller entries of a point, relative to its largest one, say nothing of sizes."""


@dataclass(frozen=True, eq=False)
class Mixed:
    """Entries of a vector of values that automorphisms mix.

    Attributes:
        first, second: of the two rows that are rotated in second-order cones, side by side.
        sheared, sheared_by: of the first rows of exponential cones, and those of the second rows that are added.
        cone: which exponential cone these belong to.
    """

    first: IntArray
    second: IntArray
    sheared: IntArray
    sheared_by: IntArray
    cone: IntArray


def rotated(values: Tensor, factors: Tensor, entries: Mixed) -> Tensor:
    """Values times factors; where two are mixed, their sum and their difference are multiplied."""
    scaled = values * factors
    if not entries.first.size:
        return scaled
    first, second = (from_numpy(index).to(values.device) for index in (entries.first, entries.second))
    plus, minus = factors[..., first], factors[..., second]
    total = 0.5 * plus * (values[..., first] + values[..., second])
    difference = 0.5 * minus * (values[..., first] - values[..., second])
    same = plus == minus  # sums of both would be rounded
    scaled = scaled.index_copy(-1, first, torch.where(same, scaled[..., first], total + difference))
    return scaled.index_copy(-1, second, torch.where(same, scaled[..., second], total - difference))


def paired_rows(cones: Cones, rows: IntArray, columns: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Rows of second-order cones that can be rotated: (k, 2) first rows and others with their pattern, and the entries.

    ``t + y`` and ``t - y`` are such rows, wherever the latter stands.
    """
    row = cones.sections["second_order"].start
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], np.arange(cones.rows + 1))
    turned, entries = list[tuple[int, int]](), ([np.zeros(0, np.int64)], [np.zeros(0, np.int64)])
    for size in cones.second_order:
        first = order[ends[row] : ends[row + 1]]
        for other in range(row + 1, row + size if size >= 3 else row):
            second = order[ends[other] : ends[other + 1]]
            if np.array_equal(columns[first], columns[second]):
                turned.append((row, other))
                entries[0].append(first)
                entries[1].append(second)
                break
        row += size
    return np.array(turned, dtype=np.int64).reshape(-1, 2), np.concatenate(entries[0]), np.concatenate(entries[1])


def exponents_of(cones: Cones, turned: Mapping[int, int]) -> tuple[SparseArray, list[int]]:
    """The exponents of rows as linear functions of parameters (m, parameters), and which of these are no factors.

    Args:
        cones: of the rows.
        turned: the other row by the first one of second-order cones that have a rotation.
    """
    entries, turning, row, count = list[tuple[int, int, float]](), list[int](), 0, 0

    def add(rows: range, parameter: int, value: float = 1.0) -> None:
        entries.extend((number, parameter, value) for number in rows)

    def factor(size: int) -> None:
        nonlocal row, count
        add(range(row, row + size), count)
        row, count = row + size, count + 1

    for _ in range(cones.zero + cones.nonnegative):
        factor(1)
    for size in cones.second_order:
        factor(size)
        if row - size in turned:
            first = row - size
            entries.extend([(first, count, 1.0), (turned[first], count, -1.0)])
            turning.append(count)
            count += 1
    for side in cones.semidefinite:
        for i, j in zip(*svec_indices(side), strict=True):
            entries.extend([(row, count + int(i), 1.0), (row, count + int(j), 1.0)])
            row += 1
        count += side
    for number in range(cones.exponential + cones.dual_exponential):
        factor(3)
        if number < cones.exponential:
            entries.append((row - 1, count, 1.0))
            turning.append(count)
            count += 1
    for exponent in cones.power:
        factor(3)
        entries.extend([(row - 3, count, 1.0 - abs(exponent)), (row - 2, count, -abs(exponent))])
        turning.append(count)
        count += 1
    rows, columns, values = zip(*entries, strict=True) if entries else ((), (), ())
    matrix = sp.csr_array((np.array(values, dtype=np.float64), (rows, columns)), shape=(cones.rows, count))
    return matrix, turning


def in_pairs(values: FloatArray, entries: Mixed) -> FloatArray:
    """Values in which sums and differences stand for the entries of two rows."""
    if not entries.first.size:
        return values
    values = values.copy()
    first, second = values[:, entries.first], values[:, entries.second]
    with np.errstate(invalid="ignore"):  # of infinite ends: NaN is no size
        values[:, entries.first], values[:, entries.second] = first + second, first - second
    return values


def sizes_of(point: FloatArray) -> FloatArray:
    """Exponents of two of a point's entries, NaN for those that are small beside others."""
    size = np.abs(point)
    with np.errstate(divide="ignore"):
        return np.where(size > SMALL * size.max(initial=0.0), np.log2(size), np.nan)
