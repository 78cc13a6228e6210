"""Systems without curvature: linear programs at solutions that are not regular vertices.

With no quadratic term on the free variables the system is

    K = [ 0   B ]      B (v, k): the free variables' entries of the k active rows
        [ Bᵀ  0 ]

Within a face (v > k) ``dx`` may move in the null space of ``Bᵀ``; at a degenerate vertex (v < k) the multipliers may
move, in that of B.  Where B has full rank, the minimum-norm answer is ``dy = B⁺ r_x`` and ``dx = (B⁺)ᵀ r_y``, by one
factorisation of the smaller of ``BᵀB`` and ``BBᵀ``.  By eigenvalues, the singular values of B with both signs, the same
takes thirty times as long at v = 700, k = 250.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg

from lpgd.arrays import BoolArray, FloatArray, IntArray, random_direction
from lpgd.solvers.kkt.rank import DOUBT, RESIDUAL, ROUNDING, Known, One, has_answers

__all__ = ["doubt_of", "is_clear", "is_flat", "solve_flat"]

WELL_CONDITIONED = 1e-4
"""The least singular value of B, relative to the largest entry of a column, from which its square is factorised."""
CLEAR = 0.01
"""The part of the doubt allowed elsewhere that is allowed here: closer calls are left to the eigenvalues."""
POWERS = 3
"""Steps of the inverse power method for the least singular value."""


def is_flat(matrix: FloatArray, primal: BoolArray, used: IntArray) -> bool:
    """Whether a system is singular because its quadratic part is zero.

    That part is positive semidefinite, so that its diagonal tells.

    Args:
        matrix: (t, t) K.
        primal: (t,) which rows are those of variables.
        used: the rows that count; with as many variables as multipliers among them the system may be regular.
    """
    if matrix.diagonal()[used].any():
        return False
    variables = int(primal[used].sum())
    return 0 < variables < used.size and 2 * variables != used.size


def solve_flat(
    matrix: FloatArray,
    scale: FloatArray,
    right: FloatArray,
    primal: BoolArray,
    known: Known,
    others: FloatArray | None = None,
) -> One | None:
    """The minimum-norm answer of one flat system; None where B's rank is not plainly full.

    Args:
        matrix: (t, t) K.
        scale: (t,) of its rows and columns, from the equilibration.
        right: (t,) right-hand side.
        primal: (t,) which rows are those of variables.
        known: how well this element's point is known.
        others: (p, t) right-hand sides of which only whether they have an answer is found.
    """
    others = right[:0].reshape(0, right.size) if others is None else others
    within_face = 2 * int(primal.sum()) > primal.size
    wide = primal if within_face else ~primal  # the side of which some directions are not determined
    narrow = ~wide
    B = matrix[np.ix_(wide, narrow)] * scale[narrow]
    largest = np.abs(B).max(0, initial=0.0)
    if not largest.all():
        return None
    factors = scale[narrow] / largest
    B /= largest
    try:
        factor = scipy.linalg.cho_factor(B.T @ B, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    doubt = doubt_of(factor, float(np.linalg.norm(B)), right.size, known)
    if not is_clear(doubt):
        return None
    both = np.stack([B.T @ right[wide], factors * right[narrow]], axis=1)
    solved = scipy.linalg.cho_solve(factor, both, check_finite=False)
    solved += scipy.linalg.cho_solve(factor, both - B.T @ (B @ solved), check_finite=False)
    answer, null = np.empty_like(right), np.zeros_like(right)
    answer[wide], answer[narrow] = B @ solved[:, 1], factors * solved[:, 0]
    left = right[wide] - B @ solved[:, 0]
    consistent = bool(np.abs(left).max() <= RESIDUAL * np.abs(right).max(initial=1e-300))
    # The diagonal of the projector onto what is not determined: one less that onto B's range.
    half = scipy.linalg.solve_triangular(factor[0], B.T, lower=True, check_finite=False)
    null[wide] = np.sqrt(np.maximum(1.0 - np.square(half).sum(0), 0.0))
    outside = others[:, wide]
    outside = outside - scipy.linalg.cho_solve(factor, B.T @ outside.T, check_finite=False).T @ B.T
    return answer, null, False, not within_face, consistent, doubt, has_answers(outside, others)


def is_clear(doubt: float) -> bool:
    """Whether B's rank is plainly full."""
    return doubt < CLEAR * DOUBT


def doubt_of(factor: tuple[FloatArray, bool], size: float, count: int, known: Known) -> float:
    """The share of the answer that K's error may change; infinite where B is not well conditioned.

    Args:
        factor: of ``BᵀB``, columns of B with largest entries of 1.
        size: Frobenius norm of B.
        count: unknowns.
        known: how well this element's point is known.
    """
    probe, growth = random_direction(factor[0].shape[0]), np.inf
    for _ in range(POWERS):
        probe = scipy.linalg.cho_solve(factor, probe / np.linalg.norm(probe), check_finite=False)
        growth = float(np.linalg.norm(probe))
    if not 0.0 < growth < WELL_CONDITIONED**-2:
        return np.inf
    least = growth**-0.5
    noise = ROUNDING * max(size, 1.0) * count
    return (float(known.lipschitz) * float(known.error) / least + noise) / least
