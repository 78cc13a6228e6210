"""Systems without curvature: linear programs at solutions that are not vertices.

With no quadratic term on the free variables the system is

    K = [ 0   B ]      B (v, k): the free variables' entries of the k active rows, v > k
        [ Bᵀ  0 ]

It is singular, for ``dx`` may move in the null space of ``Bᵀ``.  Where B has full column rank, the minimum-norm answer
is ``dy = B⁺ r_x`` and ``dx = (B⁺)ᵀ r_y``, by one factorisation of ``BᵀB``.  By eigenvalues, the singular values of B
with both signs, the same takes thirty times as long at v = 700, k = 250.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from lpgd.arrays import BoolArray, FloatArray, IntArray, random_direction
from lpgd.solvers.kkt.rank import DOUBT, RESIDUAL, ROUNDING, Known, One

__all__ = ["is_flat", "solve_flat"]

WELL_CONDITIONED = 1e-4
"""The least singular value of B, relative to the largest entry of a column, from which its square is factorised."""
CLEAR = 0.01
"""The part of the doubt allowed elsewhere that is allowed here: closer calls are left to the eigenvalues."""
POWERS = 3
"""Steps of the inverse power method for the least singular value."""


def is_flat(matrix: FloatArray, primal: BoolArray, used: IntArray) -> bool:
    """Whether a system's quadratic part is zero: it is positive semidefinite, so that its diagonal tells.

    Args:
        matrix: (t, t) K.
        primal: (t,) which rows are those of variables.
        used: the rows that count; there must be more variables than multipliers among them.
    """
    if matrix.diagonal()[used].any():
        return False
    variables = int(primal[used].sum())
    return variables > used.size - variables > 0


def solve_flat(matrix: FloatArray, scale: FloatArray, right: FloatArray, primal: BoolArray, known: Known) -> One | None:
    """The minimum-norm answer of one flat system; None where B's rank is not plainly full.

    Args:
        matrix: (t, t) K.
        scale: (t,) of its rows and columns, from the equilibration.
        right: (t,) right-hand side.
        primal: (t,) which rows are those of variables.
        known: how well this element's point is known.
    """
    dual = ~primal
    B = matrix[np.ix_(primal, dual)] * scale[dual]
    largest = np.abs(B).max(0, initial=0.0)
    if not largest.all():
        return None
    inverse_scale = 1.0 / largest
    B *= inverse_scale
    try:
        factor = scipy.linalg.cho_factor(B.T @ B, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    probe = random_direction(len(largest))
    growth = np.inf
    for _ in range(POWERS):
        probe = scipy.linalg.cho_solve(factor, probe / np.linalg.norm(probe), check_finite=False)
        growth = float(np.linalg.norm(probe))
    least = growth**-0.5 if growth > 0.0 else 0.0
    noise = ROUNDING * max(float(np.linalg.norm(B)), 1.0) * right.size
    doubt = (float(known.lipschitz) * float(known.error) / least + noise) / least if least > 0.0 else np.inf
    if not (least >= WELL_CONDITIONED and doubt < CLEAR * DOUBT):
        return None
    factors = scale[dual] * inverse_scale
    both = np.stack([B.T @ right[primal], factors * right[dual]], axis=1)
    solved = scipy.linalg.cho_solve(factor, both, check_finite=False)
    solved += scipy.linalg.cho_solve(factor, both - B.T @ (B @ solved), check_finite=False)
    answer, null = np.empty_like(right), np.where(primal, 1.0, 0.0)
    answer[primal], answer[dual] = B @ solved[:, 1], factors * solved[:, 0]
    left = right[primal] - B @ solved[:, 0]
    consistent = bool(np.abs(left).max() <= RESIDUAL * np.abs(right).max(initial=1e-300))
    return answer, null, False, False, consistent, doubt
