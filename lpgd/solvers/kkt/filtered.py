"""Singular sparse systems without all of their eigenvalues: answers by the factor of ``K - iσI``.

K is real and symmetric, so that this is regular for every σ > 0, with K's own vectors:

    Re (K - iσI)⁻¹ = K (K² + σ²)⁻¹,          σ Im (K - iσI)⁻¹ = σ² (K² + σ²)⁻¹.

The first is Levenberg and Marquardt's step.  The second filters: it leaves null vectors as they are, and of others the
share ``σ² / (λ² + σ²)``, so that a few random vectors show the smallest eigenvalues after a few products.  All of a
thousand eigenvalues take seconds, these a hundredth of one.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray, random_direction
from lpgd.solvers.kkt.rank import RANK_CUTOFF, Known, One, rank, without_null
from lpgd.solvers.kkt.superlu import superlu

__all__ = ["FILTERED", "by_filter"]

FILTERED = 200
"""Smaller matrices are decided by all of their eigenvalues."""
WIDTH = 1e-9
"""σ, relative to the largest eigenvalue: below those that can count."""
PRODUCTS = 3
"""Applications of the filter to a block of vectors."""
FIRST, LARGEST = 16, 64
"""The sizes of the first block of vectors and of the last."""
SPARE = 1.25
"""Vectors that are tried for each that is thought to be a null vector."""
SOLVES, LEFT = 30, 1e-14
"""Steps to an answer at most, and what they may leave of the right-hand side."""
ROUGH = 1e-9
"""Answers that leave more are left to the eigenvalues."""


class Filter:
    """The factor of ``K - iσI`` for a symmetric sparse K."""

    def __init__(self, K: Any, width: float) -> None:
        self.K = K
        self.shifted = sp.csc_array(K - 1j * width * sp.eye_array(K.shape[0]))
        self.factor = superlu(
            self.shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.1, options={"SymmetricMode": True}
        )

    def solve(self, right: FloatArray) -> Any:
        """``(K - iσI)⁻¹ right``, complex, with the residual solved for once more."""
        complex_right: Any = right.astype(np.complex128)
        found = self.factor.solve(complex_right)
        return found + self.factor.solve(complex_right - self.shifted @ found)


def by_filter(
    K: Any, scale: FloatArray, right: FloatArray, primal: BoolArray, known: Known, others: FloatArray
) -> One | None:
    """:func:`~lpgd.solvers.kkt.rank.by_eigenvalues` of a sparse equilibrated matrix.

    None where more than a small part of its eigenvalues are nearly zero, or rounding is too large.
    """
    if known.damped:
        step = Filter(K, float(np.clip(known.error, RANK_CUTOFF, 1e100))).solve(scale * right).real
        nothing = np.zeros(len(others), dtype=bool)
        one = scale * step, np.zeros_like(right), False, False, False, np.inf, nothing
        return one if np.isfinite(step).all() else None
    found = _null_vectors(K, known)
    if found is None:
        return None
    filtered, null, doubt = found
    one = without_null(partial(_solve, filtered, null), null, scale, right, primal, doubt, others)
    return one if np.isfinite(one[0]).all() else None


def _null_vectors(K: Any, known: Known) -> tuple[Filter, FloatArray, float] | None:
    """The vectors of eigenvalues that do not count (t, d), and the doubt; None where they are many."""
    size = K.shape[0]
    direction = random_direction(size)
    for _ in range(PRODUCTS):
        direction = K @ (K @ direction)
        direction = direction / max(float(np.linalg.norm(direction)), 1e-300)
    unit = max(float(np.linalg.norm(K @ direction)), 1e-300)
    filtered, count = Filter(K, WIDTH * unit), FIRST
    # The filter's trace is about the number of null vectors: where there are many no block is tried.
    block = np.random.default_rng(size).standard_normal((size, count))
    image = WIDTH * unit * filtered.factor.solve(block.astype(np.complex128)).imag
    nullity = float(np.sum(block * image)) / count
    while count < SPARE * nullity <= LARGEST:
        count *= 2
    while max(count, nullity) <= LARGEST:
        block = np.random.default_rng(size).standard_normal((size, count))
        for _ in range(PRODUCTS):
            block = filtered.factor.solve(block.astype(np.complex128)).imag
            if not np.isfinite(block).all():
                return None
            block, _ = np.linalg.qr(block)
        # K's singular values on a subspace are no smaller than its own; eigenvalues there might vanish.
        _, values, turned = np.linalg.svd(K @ block, full_matrices=False)
        sizes = np.full(size, max(unit, float(values.max())))
        sizes[:count] = values
        kept, doubt, explained = rank(sizes, known)
        if kept[:count].sum() >= count // 4:
            return filtered, (block @ turned.T)[:, ~kept[:count]], doubt if explained else np.inf
        count *= 2
    return None


def _solve(filtered: Filter, null: FloatArray, right: FloatArray) -> FloatArray:
    """``K answer = right`` without the parts in the null vectors; NaN where the steps do not get there."""
    right = right - null @ (null.T @ right)
    largest = float(np.abs(right).max(initial=0.0))
    answer, left, before = np.zeros_like(right), right, np.inf
    for _ in range(SOLVES):
        step = filtered.solve(left).real
        answer = answer + step - null @ (null.T @ step)
        left = right - filtered.K @ answer
        left -= null @ (null.T @ left)
        error = float(np.abs(left).max(initial=0.0))
        if not LEFT * largest < error < 0.5 * before:
            break
        before = error
    return answer if float(np.abs(left).max(initial=0.0)) <= ROUGH * largest else np.full_like(answer, np.nan)
