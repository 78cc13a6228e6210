"""Whether the response of a conic program depends on which of several multipliers its solution has.

Along a curved constraint a solution moves by what the multiplier makes of the curvature.  Where multipliers are not
unique, y may be moved by any ``δ`` in the span of its face of K* with ``Aᵀδ = 0``; one set that is stated twice has the
same curvature then, a plane that touches a ball has not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from lpgd.arrays import FloatArray, random_direction
from lpgd.cones.product import Cones
from lpgd.cones.projections import distance, projection_derivative

__all__ = ["OtherMultipliers", "other_multipliers"]

FACE = 1e-6
"""Eigenvalues of the projection's derivative that differ from 1 by less are those of the face of y."""
NULL = 1e-7
"""Pivots and singular values below this share of the largest are zero."""
SHARE, LEAST = 0.3, 3e-3
"""How far multipliers are moved, at most and at least, relative to their size: less would not show."""
DIRECTIONS = 4
"""Along how many single directions, the ones that change multipliers of curved cones most."""


class OtherMultipliers(NamedTuple):
    """Other multipliers of a solution.

    Attributes:
        ends: vectors (m,), along directions that change those of curved cones, on both sides of y.
        coupled: whether rows of the zero and nonnegative cones share multipliers with curved ones, as planes do that
            touch a curved constraint, or rows that lead to it.
    """

    ends: list[FloatArray]
    coupled: bool


def other_multipliers(cones: Cones, A: FloatArray, y: FloatArray, slack: FloatArray) -> OtherMultipliers:
    """Other multipliers of the same solution; none where there is no direction that reaches far enough.

    Args:
        cones: K.
        A: (m, k) the columns of the variables that may move.
        y, slack: (m,) in K* and in K, complementary.
    """
    T, complements = projection_derivative(cones, y - slack, dual=True).factor()
    face = T.toarray()[complements < FACE]
    if not face.shape[0]:
        return OtherMultipliers([], False)
    moves = face.T @ _left_null(face @ A)  # an orthonormal basis of the directions
    linear = cones.sections["nonnegative"].stop
    _, curved, right = np.linalg.svd(np.linalg.qr(moves[linear:], mode="r"))
    count = int((curved > NULL).sum())
    coupled = count + _rank(moves[:linear]) > moves.shape[1]
    if not count:
        return OtherMultipliers([], coupled)
    # One direction has a part of all of them; only where that leads nowhere they are taken one by one.
    together = moves @ (random_direction(count) @ right[:count])
    ends = _ends(cones, together, y, slack)
    if not ends:
        directions = moves @ right[: min(count, DIRECTIONS)].T
        ends = [end for move in directions.T for end in _ends(cones, move, y, slack)]
    return OtherMultipliers(ends, coupled)


def _left_null(matrix: FloatArray) -> FloatArray:
    """An orthonormal basis of the vectors r with ``rᵀ matrix = 0``, in columns."""
    if not matrix.size:
        return np.eye(matrix.shape[0])
    factors: Any = scipy.linalg.qr(matrix, pivoting=True, check_finite=False)
    basis, triangle, _ = factors
    pivots = np.abs(np.diag(triangle))
    return basis[:, int((pivots > NULL * pivots.max(initial=0.0)).sum()) :]


def _ends(cones: Cones, direction: FloatArray, y: FloatArray, slack: FloatArray) -> list[FloatArray]:
    """``y ± t direction`` in the face of y, as far as it goes."""
    largest, size = np.abs(y).max(initial=0.0), np.abs(direction).max(initial=0.0)
    linear_rows = np.arange(cones.zero, cones.zero + cones.nonnegative)
    active = linear_rows[y[linear_rows] > slack[linear_rows]]
    ends = []
    for sign in (1.0, -1.0):
        step = SHARE * largest / size
        while step * size > LEAST * largest:
            end = y + sign * step * direction
            inside = float(distance(cones, end, dual=True)) <= 1e-9 * (1.0 + largest)
            if inside and (end[active] > 0).all():
                ends.append(end)
                break
            step *= 0.5
    return ends


def _rank(matrix: FloatArray) -> int:
    return int(np.linalg.matrix_rank(matrix, tol=NULL)) if matrix.size else 0
