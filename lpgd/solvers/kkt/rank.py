"""Which of a symmetric system's eigenvalues count, and its minimum-norm answer where some do not.

The words are those of :mod:`lpgd.solvers.kkt.factor`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lpgd.arrays import BoolArray, FloatArray

__all__ = [
    "DOUBT",
    "NEAR",
    "RANK_CUTOFF",
    "RESIDUAL",
    "ROUNDING",
    "Known",
    "One",
    "by_eigenvalues",
    "has_answers",
    "is_judged_exact",
    "rank",
    "without_null",
]

ROUNDING = 1e-15
"""Relative error of a factorisation in double precision."""
DOUBT = 1e-4
"""An answer that K's error may change by a larger share is not taken for exact."""
RESIDUAL = 1e-7
"""The relative residual that a solve must reach to count as exact."""
RANK_CUTOFF = 1e-11
"""Eigenvalues of an equilibrated K below this are zero, however well the point is known."""
NEAR = 0.1
"""Newton's step is taken as it is where ``|K⁻¹| |F|`` is below this; elsewhere it is damped."""


class Known(NamedTuple):
    """How well the points of k elements are known.

    Attributes:
        error: (k,) what is left of the optimality conditions, in the maximum norm.
        lipschitz: (k,) Lipschitz constant of the projection's derivative.
        damped: the right-hand side is what is left of the optimality conditions: a step that is to reduce it, not to
            be exact.
    """

    error: FloatArray
    lipschitz: FloatArray
    damped: bool = False

    def select(self, elements: Any) -> Known:
        return Known(self.error[elements], self.lipschitz[elements], self.damped)


One = tuple[FloatArray, FloatArray, bool, bool, bool, float, BoolArray]
"""The fields of :class:`Answers` for one element."""


def is_judged_exact(
    known: Known, inverse: FloatArray, size: FloatArray, error: FloatArray, right: FloatArray
) -> tuple[BoolArray, FloatArray]:
    """Whether answers are to be taken, and their doubt.

    Args:
        known: how well the points are known.
        inverse, size: (k,) estimates of the norms of K⁻¹ and K, equilibrated.
        error, right: (k,) the largest residual and the largest right-hand side.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        solved = error <= RESIDUAL * np.maximum(right, 1e-300)
        doubt = inverse * (ROUNDING * size + known.lipschitz * inverse * known.error)
        if known.damped:
            return solved & (inverse * known.error < NEAR) & (inverse * size < 1e13), doubt
        return solved & (doubt < DOUBT), np.where(np.isfinite(doubt), doubt, np.inf)


def by_eigenvalues(
    scaled: FloatArray,
    scale: FloatArray,
    right: FloatArray,
    primal: BoolArray,
    known: Known,
    others: FloatArray | None = None,
) -> One:
    """One system by the eigenvalues of its equilibrated matrix.

    The pseudo-inverse is that of the matrix itself, ``S⁻¹ scaled S⁻¹``: with N an orthonormal basis of its null space,
    the right-hand side and the answer lose their parts in N.  Of ``others``, (p, t) right-hand sides, only whether they
    have an answer is found.
    """
    others = right[:0].reshape(0, right.size) if others is None else others
    eigenvalues, vectors = np.linalg.eigh(scaled)
    sizes = np.abs(eigenvalues)
    if known.damped:
        # Levenberg and Marquardt's step, which converges quadratically to a manifold of solutions, whatever its rank.
        weights = eigenvalues / np.maximum(eigenvalues**2 + min(float(known.error), 1e100) ** 2, 1e-300)
        weights[sizes <= RANK_CUTOFF * sizes.max(initial=0.0)] = 0.0
        return (
            scale * (vectors @ (weights * (vectors.T @ (scale * right)))),
            np.zeros_like(right),
            False,
            False,
            False,
            np.inf,
            np.zeros(len(others), dtype=bool),
        )
    kept, doubt, explained = rank(sizes, known)
    inverse = np.divide(1.0, eigenvalues, out=np.zeros_like(eigenvalues), where=kept)

    def solve(side: FloatArray) -> FloatArray:
        return vectors @ (inverse * (vectors.T @ side))

    return without_null(solve, vectors[:, ~kept], scale, right, primal, doubt if explained else np.inf, others)


def without_null(
    solve: Callable[[FloatArray], FloatArray],
    null: FloatArray,
    scale: FloatArray,
    right: FloatArray,
    primal: BoolArray,
    doubt: float,
    others: FloatArray,
) -> One:
    """The minimum-norm answer.

    Args:
        solve: by the pseudo-inverse of the equilibrated matrix.
        null: the vectors of that matrix that do not count, in columns.
        scale, right, primal: of the system.
        doubt: the share of the answer that the matrix's error may change.
        others: (p, t) further right-hand sides.
    """
    null, _ = np.linalg.qr(null * scale[:, None])
    moved = right - null @ (null.T @ right)
    answer = scale * solve(scale * moved)
    answer -= null @ (null.T @ answer)
    consistent = bool(has_answers((moved - right)[None], right[None])[0])
    follows = has_answers((others @ null) @ null.T, others)
    dual_only = bool(np.sum(null[primal] ** 2) < 1e-6)
    regular = not null.shape[1] and doubt < DOUBT
    return answer, np.linalg.norm(null, axis=1), regular, dual_only, consistent, doubt, follows


def has_answers(left: FloatArray, right: FloatArray) -> BoolArray:
    """(p,) which right-hand sides (p, t) leave next to nothing."""
    return np.abs(left).max(1, initial=0.0) <= RESIDUAL * np.abs(right).max(1, initial=1e-300)


def rank(sizes: FloatArray, known: Known) -> tuple[BoolArray, float, bool]:
    """Which eigenvalues count, the doubt in the answer, and whether K's error explains all the others.

    Of the thresholds at which the answer is verified, the lowest is taken: none of those that count is so small that
    K's error could change the answer, and those that do not are no larger than that error.
    """
    unit, error, lipschitz = max(float(sizes.max(initial=0.0)), 1e-300), float(known.error), float(known.lipschitz)
    order = np.sort(sizes)[::-1]
    order = order[order > RANK_CUTOFF * unit]
    noise = ROUNDING * unit * sizes.size
    doubts = (lipschitz * error / np.maximum(order, 1e-300) + noise) / np.maximum(order, 1e-300)
    count = int(np.sum(doubts < DOUBT))  # doubts grow as eigenvalues shrink
    if count == 0:
        return sizes > RANK_CUTOFF * unit, np.inf if order.size else 0.0, order.size == 0
    smallest = order[count - 1]
    kept = sizes >= smallest
    left = float(sizes[~kept].max(initial=0.0))
    reach = max(RANK_CUTOFF * unit, 100 * (lipschitz * error / smallest + noise))
    return kept, float(doubts[count - 1]), left <= reach
