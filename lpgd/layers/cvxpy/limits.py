"""Variables that may as well be at their limit, and are substituted by it.

CVXPY writes ``abs(u) <= c`` with a variable t, rows ``u - t <= 0`` and ``-u - t <= 0``, and ``t <= c``; so it does
``norm(u) <= c`` and ``log_sum_exp(u) <= c``.  Where u is inside, every t from |u| to c is a solution: all optimality
systems are singular, and every gradient takes the way of those.  But a larger t is never worse, so that t is c:

- t has no cost, and is not asked for;
- one inequality ``g t + aᵀx <= d`` with a constant g > 0 limits it, and no equality has it;
- all its other rows have more room where t is larger: inequalities with a negative coefficient, the first row of a
  second-order cone, the diagonal of a matrix, ``v exp(u / v) <= w`` with a larger w or a smaller u.

The other rows get ``(d - aᵀx) / g`` for t, where that leaves no more entries; ``abs(u) <= c`` becomes two bounds.  In
curved cones the limit must be one number: an infinite one belongs to a row or a bound, which may be absent, and what
else a sum of exponentials has is left to :mod:`lpgd.layers.cvxpy.elimination`.
The multiplier of the row that limits t is the sum of those of t's other rows, by stationarity in t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray
from lpgd.cones.product import Cones, svec_indices, svec_size
from lpgd.layers.cvxpy.affine import AffineMatrix
from lpgd.problems.conic.magnitudes import INFINITE

__all__ = ["AtLimits", "at_limits", "needed_variables", "signs_of_room"]

SMALLEST = 1e-3
"""What a limited variable's coefficient must be, relative to the others of the row that limits it."""


@dataclass(frozen=True, eq=False)
class AtLimits:
    """A program's constraints with limits for the variables that are there.

    Args:
        A, b: as before; rows and columns that were used up have no entries in A.
        rows, columns: those, increasing.
        back: (m, m) the multipliers of the rows before, from those of the rows now.
    """

    A: AffineMatrix
    b: sp.csr_array
    rows: IntArray
    columns: IntArray
    back: sp.csr_array


def at_limits(A: AffineMatrix, b: sp.csr_array, cones: Cones, needed: BoolArray) -> AtLimits:
    """The constraints without the variables that may be at their limit.

    Args:
        A: (m, n).
        b: (m, p + 1), the map to the right-hand side.
        cones: of the rows.
        needed: (n,) variables that have a cost, or are asked for.
    """
    m = A.shape[0]
    back: SparseArray = sp.eye_array(m, format="csr")
    rows, columns = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    roomy, inequalities = signs_of_room(cones), cones.sections["nonnegative"]
    while True:
        limiting = _limiting_entries(A, b, inequalities, roomy, needed)
        if not limiting.size:
            return AtLimits(A, b, np.sort(rows), np.sort(columns), sp.csr_array(back))
        row, column = A.row[limiting], A.column[limiting]
        shares = _shares(A, row, column, A.value[limiting])
        A, b = _moved(A, shares, column).without_rows(row), sp.csr_array(b + shares @ b)
        others = np.ones(m)
        others[row] = 0.0
        back = back @ (sp.diags_array(others) + shares.T)
        rows, columns = np.concatenate([rows, row]), np.concatenate([columns, column])


def needed_variables(P: AffineMatrix, q: sp.csr_array, asked: Sequence[sp.csr_array]) -> BoolArray:
    """(n,) which variables have a cost, or are asked for: maps (k, n) from all of them."""
    needed = np.diff(q.indptr) > 0
    needed[P.row] = needed[P.column] = True
    for matrix in asked:
        needed[matrix.indices] = True
    return needed


def signs_of_room(cones: Cones) -> IntArray:
    """(m,) the sign of a coefficient with which a larger variable is more room in a row's cone; 0 where neither is."""
    signs = np.zeros(cones.rows, dtype=np.int64)
    signs[cones.sections["nonnegative"]] = -1
    start = cones.sections["second_order"].start
    signs[start + np.cumsum([0, *cones.second_order], dtype=np.int64)[:-1]] = -1
    start = cones.sections["semidefinite"].start
    for side in cones.semidefinite:
        row, column = svec_indices(side)
        signs[start : start + svec_size(side)] = np.where(row == column, -1, 0)
        start += svec_size(side)
    signs[cones.sections["exponential"]] = np.tile([1, 0, -1], cones.exponential)
    powers = np.array(cones.power) > 0
    signs[cones.sections["power"]] = np.where(powers[:, None], [-1, -1, 0], 0).ravel()
    return signs


def _limiting_entries(
    A: AffineMatrix, b: sp.csr_array, inequalities: slice, roomy: IntArray, needed: BoolArray
) -> IntArray:
    """Entries of A at which a row limits a variable that is to be substituted; no row holds two of the variables."""
    (m, n), constant = A.shape, A.width - 1
    linear = (A.row >= inequalities.start) & (A.row < inequalities.stop)
    limiting = linear & (A.value > 0) & (A.parameter == constant)
    room = (roomy[A.row] == np.sign(A.value)) & (A.parameter == constant)
    limits, rooms = (np.bincount(A.column[entries], minlength=n) for entries in (limiting, room))
    length = np.bincount(A.row, minlength=m)
    shared = np.bincount(A.column[room & (~linear | (length[A.row] > 1))], minlength=n)
    free = ~needed & (limits == 1) & (shared > 0)
    free[A.column[~limiting & ~room]] = False
    curved = np.zeros(n, dtype=bool)
    curved[A.column[room & ~linear]] = True
    largest = np.zeros(m)
    np.maximum.at(largest, A.row, np.where(A.parameter == constant, np.abs(A.value), 1.0))

    entries = np.flatnonzero(limiting & free[A.column])
    row, column = A.row[entries], A.column[entries]
    others, count = length[row] - 1, rooms[column]
    fits = (A.value[entries] >= SMALLEST * largest[row]) & (others * count <= others + count + 1)
    fits &= ~curved[column] | ((others == 0) & _is_finite_constant(b)[row])
    entries = entries[fits][np.argsort(others[fits], kind="stable")]
    order = np.argsort(A.row, kind="stable")
    starts = np.searchsorted(A.row[order], np.arange(m + 1))
    chosen, taken, closed = [], np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
    for entry in entries.tolist():
        row, column = A.row[entry], A.column[entry]
        beside = A.column[order[starts[row] : starts[row + 1]]]
        if closed[column] or taken[beside].any():
            continue
        chosen.append(entry)
        closed[beside] = taken[column] = True
    return np.array(chosen, dtype=np.int64)


def _is_finite_constant(b: SparseArray) -> BoolArray:
    """(m,) which right-hand sides have no parameters, and are finite."""
    last = b.shape[1] - 1
    parametric: SparseArray = b[:, :last]
    constant: SparseArray = b[:, [last]]
    return (np.diff(parametric.indptr) == 0) & (np.abs(constant.toarray().ravel()) < INFINITE)


def _shares(A: AffineMatrix, row: IntArray, column: IntArray, pivot: FloatArray) -> SparseArray:
    """(m, m) what is added to each row of the rows that limit a variable: ``-a / g`` where a is its coefficient."""
    place = np.full(A.shape[1], -1, dtype=np.int64)
    place[column] = np.arange(column.size)
    entries = np.flatnonzero(place[A.column] >= 0)
    at = place[A.column[entries]]
    others = A.row[entries] != row[at]
    entries, at = entries[others], at[others]
    values = -A.value[entries] / pivot[at]
    return sp.csr_array((values, (A.row[entries], row[at])), shape=(A.shape[0], A.shape[0]))


def _moved(A: AffineMatrix, shares: SparseArray, column: IntArray) -> AffineMatrix:
    """``A + shares @ A`` without these columns."""
    A = A.without_columns(column)
    order = np.argsort(A.row, kind="stable")
    starts = np.searchsorted(A.row[order], np.arange(A.shape[0] + 1))
    into, of = shares.tocoo().coords
    lengths = (starts[1:] - starts[:-1])[of]
    which = np.repeat(np.arange(of.size), lengths)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    entries = order[starts[of][which] + within]
    values = shares.tocoo().data[which] * A.value[entries]
    return A.with_entries(into[which], A.column[entries], A.parameter[entries], values)
