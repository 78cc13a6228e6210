"""Equalities that depend on each other and contradict each other by rounding alone.

Marginals of a transport plan sum to one number: in float32 they differ by 1e-7, and such a program has no feasible
point.  Its right-hand sides are moved to the nearest ones that have.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.linalg

from lpgd.arrays import FloatArray, from_numpy
from lpgd.problems.conic.problem import ConicProblem

__all__ = ["with_consistent_equalities"]

ROUNDING = 1e-6
"""Right-hand sides are moved by no more than this share of the largest: single precision, many times over."""
EXACT = 1e-14
"""By such a share of the largest they contradict each other in double precision, too."""
NULL = 1e-9
"""Singular values below this share of the largest are zero."""
LARGEST = 4_000_000
"""Equalities with more entries, zeros included, are left as they are."""


def with_consistent_equalities(problem: ConicProblem, elements: list[int]) -> tuple[ConicProblem, list[int]]:
    """The problem with b moved for those of the elements where that is all that is wrong, and which these are."""
    structure, data, zero = problem.structure, problem.data, problem.structure.cones.zero
    matrices, sides = (datum.detach().cpu().numpy() for datum in (data.A, data.b))
    if zero < 2 or zero * structure.n > LARGEST or (matrices.ndim > 1 and len(matrices) > len(np.atleast_2d(sides))):
        return problem, []
    rows, matrices = np.atleast_2d(sides).copy(), np.atleast_2d(matrices)
    moves: dict[int, FloatArray | None] = {}
    for element in elements:
        place = element % len(rows)
        if place not in moves:
            A = structure.constraint.dense_matrices(matrices[element % len(matrices)][None])[0][:zero]
            moves[place] = _contradiction(A, rows[place, :zero])
    for place, move in moves.items():
        if move is not None:
            rows[place, :zero] -= move
    moved = [element for element in elements if moves[element % len(rows)] is not None]
    if not moved:
        return problem, []
    return replace(problem, data=data._replace(b=from_numpy(rows.reshape(sides.shape)).to(data.b.device))), moved


def _contradiction(A: FloatArray, b: FloatArray) -> FloatArray | None:
    """What is to be taken from b for ``A x = b`` to have a solution; None where that is nothing, or not rounding."""
    if not (np.isfinite(A).all() and np.isfinite(b).all()):
        return None
    lengths = np.abs(A).max(1, initial=0.0)
    lengths[lengths == 0.0] = 1.0
    factors: Any = scipy.linalg.qr(A / lengths[:, None], pivoting=True, check_finite=False)
    basis, triangle, _ = factors
    pivots = np.abs(np.diag(triangle))
    nothing = basis[:, int((pivots > NULL * pivots.max(initial=0.0)).sum()) :]
    scaled = b / lengths
    move, largest = nothing @ (nothing.T @ scaled), np.abs(scaled).max(initial=0.0)
    if not EXACT * largest < np.abs(move).max(initial=0.0) <= ROUNDING * largest:
        return None
    return move * lengths
