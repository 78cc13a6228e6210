"""Whether the response of a conic program depends on which of several multipliers its solution has.

Along a curved constraint a solution moves by what the multiplier makes of the curvature.  Where multipliers are not
unique, y may be moved by any ``δ`` in the span of its face of K* with ``Aᵀδ = 0``; one set that is stated twice has the
same curvature then, a plane that touches a ball has not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lpgd.cones import Cones
from lpgd.projections import distance, projection_derivative

__all__ = ["other_multipliers"]

FloatArray = NDArray[np.float64]

FACE = 1e-6
"""Eigenvalues of the projection's derivative that differ from 1 by less are those of the face of y."""
NULL = 1e-7
"""Singular values below this share of the largest are zero."""
SHARE = 0.3
"""How far multipliers are moved, at most, relative to their size."""
LEAST = 3e-3
"""And at least: a smaller change would not show."""


def _rank(matrix: FloatArray) -> int:
    return int(np.linalg.matrix_rank(matrix, tol=1e-6)) if matrix.size else 0


def other_multipliers(cones: Cones, A: FloatArray, y: FloatArray, slack: FloatArray) -> list[FloatArray]:
    """Other multipliers, on the sides of y along one direction that are far enough; none where there is no such one.

    Args:
        cones: K.
        A: (m, k) the columns of the variables that may move.
        y, slack: (m,) in K* and in K, complementary.
    """
    T, rest = projection_derivative(cones, y - slack, dual=True).factor()
    face = T.toarray()[rest < FACE]
    if not face.shape[0]:
        return []
    left, sizes, _ = np.linalg.svd(face @ A)
    rank = int((sizes > NULL * sizes.max(initial=0.0)).sum())
    null = left[:, rank:]
    if not null.shape[1]:
        return []
    moves = face.T @ null
    flat = slice(0, cones.sections["nonnegative"].stop)
    # A plane that shares a multiplier with a curved constraint touches it, and has no curvature to share.
    if _rank(moves[flat]) + _rank(moves[flat.stop :]) > null.shape[1]:
        return []
    weights = np.random.default_rng(null.shape[1]).standard_normal(null.shape[1])
    direction = moves @ weights
    size = np.abs(direction).max(initial=0.0)
    if not size > 0:
        return []
    largest = np.abs(y).max(initial=0.0)
    linear = np.arange(cones.zero, cones.zero + cones.nonnegative)
    active = linear[y[linear] > slack[linear]]
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
