"""Rows that others state already, and that are left out.

**Inequalities that a cone implies**, such as ``x >= 0`` beside ``entr(x)`` or ``log(x)``.  The cone of ``entr(x)`` has
x itself in a row that is never negative.  Where x is 1e-7, a solver's answer cannot say whether ``x >= 0`` is active as
well: a smooth solution would look like a kink.  So the inequality is left out, and its multiplier is zero: the cone's
has the rest.

**Signs of what is squared**, such as ``t >= 0`` in the square of ``pos(u)``, of which CVXPY makes ``t²`` with
``t >= u`` and ``t >= 0``.  Where u is negative t is zero, as its square is least there: with the sign the multiplier
is zero, and each such point a kink.  Without it nothing is active there.

**Equalities that depend on others**, whatever the parameters are: one of the sums of rows and columns of a transport
plan, one node's balance of a network.  With them every system of optimality conditions is singular, and every gradient
takes the way of those.  Without them multipliers would look unique, so all of them stay where any are asked for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray
from lpgd.cones.product import Cones, svec_size
from lpgd.layers.cvxpy.affine import AffineMatrix
from lpgd.layers.cvxpy.limits import signs_of_room

__all__ = ["dependent_rows", "implied_rows", "never_negative", "signs_of_squares"]

WORK = 3e8
"""Up to this product of equalities, squared, and variables, dependence is looked for: a tenth of a second."""
EXACT = 1e-13
"""What may be left of an entry, relative to the terms that cancel in it, of a row that depends on others."""


def never_negative(cones: Cones) -> IntArray:
    """The rows that are never negative anywhere in their curved cone."""
    found: list[IntArray] = []
    start = cones.sections["second_order"].start
    sizes = np.array(cones.second_order, dtype=np.int64)
    found.append(start + np.cumsum(sizes) - sizes)
    start = cones.sections["semidefinite"].start
    for side in cones.semidefinite:
        lengths = np.arange(side, 0, -1)  # columns of the lower triangle, each of which begins on the diagonal
        found.append(start + np.cumsum(lengths) - lengths)
        start += svec_size(side)
    exponential, power = cones.sections["exponential"], cones.sections["power"]
    triples = np.arange(exponential.start, exponential.stop, 3)
    found += [triples + 1, triples + 2]
    triples = np.arange(power.start, power.stop, 3)[np.array(cones.power) > 0]
    found += [triples, triples + 1]
    return np.sort(np.concatenate(found)).astype(np.int64)


def implied_rows(A: AffineMatrix, b: sp.csr_array, heads: IntArray, rows: IntArray) -> IntArray:
    """Which of these rows are a positive multiple of one of the heads, with as much room or more, or ``0 <= b``.

    Args:
        A: (m, n).
        b: (m, p + 1), the map to the right-hand side.
        heads: rows that are never negative in their cone.
        rows: of the nonnegative cone.
    """
    place = A.column * A.width + A.parameter
    order = np.lexsort((place, A.row))
    places, values = place[order], A.value[order]
    lengths = np.bincount(A.row, minlength=A.shape[0])
    starts = np.cumsum(lengths) - lengths
    idle = rows[lengths[rows] == 0]
    idle = idle[_is_at_least(b[idle], sp.csr_array((idle.size, A.width)))]
    heads, rows = heads[lengths[heads] > 0], rows[lengths[rows] > 0]
    rows = rows[np.isin(lengths[rows], lengths[heads])]
    sizes = np.ones(A.shape[0])
    sizes[lengths > 0] = np.abs(values[starts[lengths > 0]])

    def direction(row: int) -> tuple[bytes, bytes]:
        entries = slice(starts[row], starts[row] + lengths[row])
        return places[entries].tobytes(), (values[entries] / sizes[row]).tobytes()

    known = {direction(head): head for head in heads.tolist()} if rows.size else {}
    of_rows = [(row, known.get(direction(row))) for row in rows.tolist()]
    pairs = [(row, head) for row, head in of_rows if head is not None]
    if not pairs:
        return idle
    there, at = (np.array(side, dtype=np.int64) for side in zip(*pairs, strict=True))
    found = there[_is_at_least(_divided(b[there], sizes[there]), _divided(b[at], sizes[at]))]
    return np.concatenate([idle, found])


def signs_of_squares(A: AffineMatrix, b: sp.csr_array, P: AffineMatrix, q: sp.csr_array, cones: Cones) -> IntArray:
    """Which inequalities say ``t >= 0`` of a variable whose only cost is its square, and which has no other use.

    The square may be that of another variable that an equality makes a multiple of it.  In all its other rows there is
    more room where t is larger, so that below zero nobody would have it.

    Args:
        A: (m, n).
        b: (m, p + 1), the map to the right-hand side.
        P, q: of the objective, (n, n) and (n, p + 1).
        cones: of the rows.
    """
    (m, n), constant = A.shape, A.width - 1
    fixed, room = A.parameter == constant, signs_of_room(cones)[A.row] == np.sign(A.value)
    length, count = np.bincount(A.row, minlength=m), np.bincount(A.column, minlength=n)
    bare = np.diff(b.indptr) == 0
    plain = np.diff(q.indptr) == 0  # no linear cost, no cost together with others, nor one that parameters change
    plain[P.row[(P.row != P.column) | (P.parameter != constant)]] = False
    costly = np.zeros(n, dtype=bool)
    costly[P.row] = True
    equal = (A.row < cones.zero) & fixed & bare[A.row] & (length[A.row] == 2)
    # Variables that an equality alone has, with the other one there.
    ends = equal & (plain & costly & (count == 1))[A.column]
    by_row = np.full(m, -1, dtype=np.int64)
    by_row[A.row[ends]] = A.column[ends]
    passing = equal & ~ends & (by_row[A.row] >= 0)
    squares = np.bincount(A.column[passing], minlength=n) + (plain & costly)
    free = plain & (squares == 1)
    free[A.column[~passing & ~(room & fixed)]] = False
    signs = room & fixed & free[A.column] & (length[A.row] == 1) & bare[A.row]
    section = cones.sections["nonnegative"]
    return A.row[signs & (A.row >= section.start) & (A.row < section.stop)]


def dependent_rows(A: AffineMatrix, b: sp.csr_array, rows: IntArray) -> IntArray:
    """Which of these equalities follow from the others of them, whatever the parameters are.

    Args:
        A: (m, n).
        b: (m, p + 1), the map to the right-hand side.
        rows: of the zero cone.
    """
    rows = np.setdiff1d(rows, A.row[A.parameter != A.width - 1])
    inside = np.isin(A.row, rows)
    columns, column = np.unique(A.column[inside], return_inverse=True)
    sides: SparseArray = b[rows]
    used, place = np.unique(sides.indices, return_inverse=True)
    count = columns.size
    if not rows.size or not count or rows.size**2 * (count + used.size) > WORK:
        return np.zeros(0, dtype=np.int64)
    matrix = np.zeros((rows.size, count + used.size))
    matrix[np.searchsorted(rows, A.row[inside]), column] = A.value[inside]
    matrix[np.repeat(np.arange(rows.size), np.diff(sides.indptr)), count + place] = sides.data
    size = np.abs(matrix[:, :count]).max(1, initial=0.0)
    matrix /= np.where(size > 0, size, 1.0)[:, None]
    matrix[:, :count] /= np.abs(matrix[:, :count]).max(0)
    factors: Any = scipy.linalg.qr(matrix[:, :count].T, mode="r", pivoting=True)
    triangle, order = factors
    pivots = np.abs(np.diag(triangle))
    rank = int((pivots > 1e-10 * pivots.max(initial=1.0)).sum())
    kept, others = matrix[order[:rank]], matrix[order[rank:]]
    shares = scipy.linalg.solve_triangular(triangle[:rank, :rank], triangle[:rank, rank:]).T
    shares = np.where(np.abs(shares) > EXACT * np.abs(shares).max(1, initial=0.0)[:, None], shares, 0.0)
    left, terms = np.abs(others - shares @ kept), np.abs(others) + np.abs(shares) @ np.abs(kept)
    return np.sort(rows[order[rank:][(left <= EXACT * terms).all(1)]])


def _divided(rows: sp.csr_array, sizes: FloatArray) -> sp.csr_array:
    return sp.csr_array(sp.diags_array(1.0 / sizes) @ rows)


def _is_at_least(left: SparseArray, right: SparseArray) -> BoolArray:
    """(k,) which rows of a map are surely no smaller than those of another: their difference has no parameter."""
    last = left.shape[1] - 1
    difference: SparseArray = sp.csr_array(left[:, :last] - right[:, :last])
    difference.eliminate_zeros()
    larger = left[:, [last]].toarray() >= right[:, [last]].toarray()
    return (np.diff(difference.indptr) == 0) & larger.ravel()
