"""Symmetric systems of optimality conditions, solved in stacks, with a rank that respects what is known of the point.

``K answer = right`` is the system of :mod:`lpgd.solvers.kkt.system`.  K is a function of the point, and the point is
known up to an error e, about ``|K⁻¹|`` times what is left of the optimality conditions: so K is known up to
``δ = L e + rounding``, with L the Lipschitz constant of the projection's derivative, and an answer up to the share

    doubt = |K⁻¹| (L |K⁻¹| |F| + rounding).

A fixed random right-hand side estimates ``|K⁻¹|``.  Where the doubt is small and the residual too, the answer is taken.
Elsewhere the eigenvalues of the equilibrated K decide: those that K's error may have made out of zero count as zero,
and the answer is the minimum-norm one.  The null space of K consists of a primal part, directions in which the solution
is not unique, and a dual part, directions in which its multipliers are not; see :class:`Answers`.
"""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla

from lpgd.arrays import BoolArray, FloatArray, IntArray, random_direction
from lpgd.execution.threads import bounded_blas

__all__ = ["Answers", "Known", "System", "solve_dense", "solve_matrices", "solve_sparse"]


UNTHREADED = 500
"""Dense systems up to this size are factorised by one thread each."""
EIGEN_LIMIT = 1500
"""Singular systems up to this size are decided by their eigenvalues."""
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
PROXIMAL = 1e-7
"""The diagonal that makes a large singular system regular, and the iterations that take it out of the answer again."""
PROXIMAL_ITERATIONS = 60


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

    def select(self, rows: Any) -> Known:
        return Known(self.error[rows], self.lipschitz[rows], self.damped)


class Answers(NamedTuple):
    """Answers, and what is known of each of the k elements' (k,).

    Attributes:
        answer: as the right-hand side was.
        null: of the same shape, how much each row has to do with the null space.
        exact: the system is regular.
        unique: the null space, if there is one, is that of the multipliers alone.
        consistent: the answer satisfies the system.
        doubt: the share of the answer that K's error may change; of a singular system's answer in what is kept.
    """

    answer: FloatArray
    null: FloatArray
    exact: BoolArray
    unique: BoolArray
    consistent: BoolArray
    doubt: FloatArray


@dataclass(frozen=True, eq=False)
class System:
    """``K answer = right``, K symmetric and, but for a permutation, block diagonal with one block an element."""

    row: IntArray
    column: IntArray
    value: FloatArray
    right: FloatArray
    owner: IntArray  # the element of each row
    primal: BoolArray  # rows of the primal variables
    count: int
    known: Known

    def only(self, element: int) -> tuple[System, IntArray]:
        """One element's system, and its rows in this one."""
        rows = np.flatnonzero(self.owner == element)
        place = np.full(self.right.size, -1, dtype=np.int64)
        place[rows] = np.arange(rows.size)
        entries = self.owner[self.row] == element
        indices = place[self.row[entries]], place[self.column[entries]]
        owner = np.zeros(rows.size, dtype=np.int64)
        known = self.known.select([element])
        return System(*indices, self.value[entries], self.right[rows], owner, self.primal[rows], 1, known), rows

    def sparse(self) -> sp.csc_array:
        return sp.csc_array((self.value, (self.row, self.column)), shape=(self.right.size, self.right.size))

    def largest(self, values: FloatArray) -> FloatArray:
        """The maximum over each element's rows; 0 where there is none."""
        found = np.zeros(self.count)
        np.maximum.at(found, self.owner, values)
        return found


_One = tuple[FloatArray, FloatArray, bool, bool, bool, float]
"""The fields of :class:`Answers` for one element."""


def _judged(
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


def solve_dense(system: System) -> Answers:
    """The blocks of a system as dense matrices."""
    sizes = np.bincount(system.owner, minlength=system.count)
    side = int(sizes.max(initial=0))
    order = np.argsort(system.owner, kind="stable")
    local = np.empty(order.size, dtype=np.int64)
    local[order] = np.arange(order.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    matrices = np.zeros((system.count, side, side))
    matrices[system.owner[system.row], local[system.row], local[system.column]] = system.value
    right = np.zeros((system.count, side))
    right[system.owner, local] = system.right
    primal = np.zeros((system.count, side), dtype=bool)
    primal[system.owner, local] = system.primal
    found = solve_matrices(matrices, right, np.arange(side) >= sizes[:, None], primal, system.known)
    return found._replace(answer=found.answer[system.owner, local], null=found.null[system.owner, local])


def solve_matrices(
    matrices: FloatArray, right: FloatArray, idle: BoolArray, primal: BoolArray, known: Known
) -> Answers:
    """Solve ``K answer = right`` for each of k symmetric matrices (k, t, t), without their idle rows and columns.

    Those must be zero, and get the answer zero; ``matrices`` is written to.  ``primal`` is (k, t) or (t,).
    """
    count, side = right.shape
    if side == 0:
        every = np.ones(count, dtype=bool)
        return Answers(right, right, every, every, every, np.zeros(count))
    element, place = np.nonzero(idle)
    matrices[element, place, place] = 1.0
    magnitudes = np.abs(matrices)
    scale = _equilibration(magnitudes.max(2))
    scaled = scale[:, :, None] * matrices
    scaled *= scale[:, None, :]
    probe = np.where(idle, 0.0, random_direction(side))
    # Threads of BLAS cost more than they gain on matrices of this size.
    bound = bounded_blas() if side < UNTHREADED else nullcontext()
    try:
        with bound:
            answers = np.linalg.solve(scaled, np.stack([scale * right, probe], axis=2))
    except np.linalg.LinAlgError:
        answers = np.full((count, side, 2), np.nan)
        for one in range(count if count > 1 else 0):
            part = slice(one, one + 1)
            with suppress(np.linalg.LinAlgError):
                both = np.stack([scale[part] * right[part], probe[part]], axis=2)
                answers[part] = np.linalg.solve(scaled[part], both)
    inverse = np.linalg.norm(answers[:, :, 1], axis=1)
    size = np.abs(scaled, out=magnitudes).sum(2).max(1)
    answer = scale * answers[:, :, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs((matrices @ answer[:, :, None])[:, :, 0] - right).max(1)
    exact, doubt = _judged(known, inverse, size, error, np.abs(right).max(1))
    unique, consistent, null = exact.copy(), exact.copy(), np.zeros_like(answer)
    for bad in np.flatnonzero(~exact):
        own = np.flatnonzero(~idle[bad])
        one = known.select(bad)
        is_primal = np.broadcast_to(primal, idle.shape)[bad, own]
        found = _by_eigenvalues(scaled[bad][np.ix_(own, own)], scale[bad, own], right[bad, own], is_primal, one)
        answer[bad] = 0.0
        answer[bad, own], null[bad, own], exact[bad], unique[bad], consistent[bad], doubt[bad] = found
    return Answers(answer, null, exact, unique, consistent, doubt)


def _by_eigenvalues(scaled: FloatArray, scale: FloatArray, right: FloatArray, primal: BoolArray, known: Known) -> _One:
    """One system by the eigenvalues of its equilibrated matrix.

    The pseudo-inverse is that of the matrix itself, ``S⁻¹ scaled S⁻¹``: with N an orthonormal basis of its null space,
    the right-hand side and the answer lose their parts in N.
    """
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
        )
    kept, doubt, explained = _rank(sizes, known)
    null = vectors[:, ~kept] * scale[:, None]
    null, _ = np.linalg.qr(null)
    moved = right - null @ (null.T @ right)
    inverse = np.divide(1.0, eigenvalues, out=np.zeros_like(eigenvalues), where=kept)
    answer = scale * (vectors @ (inverse * (vectors.T @ (scale * moved))))
    answer -= null @ (null.T @ answer)
    consistent = bool(np.abs(moved - right).max(initial=0.0) <= RESIDUAL * np.abs(right).max(initial=1e-300))
    dual_only = bool(np.sum(null[primal] ** 2) < 1e-6)
    if not explained:
        doubt = np.inf
    regular = bool(kept.all()) and doubt < DOUBT
    return answer, np.linalg.norm(null, axis=1), regular, dual_only, consistent, doubt


def _rank(sizes: FloatArray, known: Known) -> tuple[BoolArray, float, bool]:
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


_ORDERINGS: tuple[dict[str, Any], ...] = (
    {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.01, "options": {"SymmetricMode": True}},
    {"permc_spec": "COLAMD"},
)
"""SuperLU's options: for symmetric systems, a third of the fill; and with free pivoting, where that is not enough."""


def solve_sparse(system: System, ordering: int = 0) -> Answers:
    """The whole system at once, by a sparse factorisation; the blocks that this does not solve, one by one."""
    size, right, count = system.right.size, system.right, system.count
    every = np.ones(count, dtype=bool)
    if size == 0:
        return Answers(right, right, every, every, every, np.zeros(count))
    K = system.sparse()
    scale = _row_scale(system)
    scaled = _scaled(K, scale)
    try:
        factor = spla.splu(scaled, **_ORDERINGS[ordering])
    except RuntimeError:  # SuperLU: "Factor is exactly singular"
        nothing = np.zeros(count, dtype=bool)
        return _one_by_one(
            system,
            Answers(np.zeros(size), np.zeros(size), nothing, nothing.copy(), nothing.copy(), np.full(count, np.inf)),
            ordering,
        )
    solution = factor.solve(np.stack([scale * right, random_direction(size)], axis=1))
    answer = solution[:, 0] + factor.solve(scale * right - scaled @ solution[:, 0])
    # Each element's part of the probe has a norm of its own.
    inverse = np.sqrt(
        np.bincount(system.owner, solution[:, 1] ** 2, count)
        / np.maximum(np.bincount(system.owner, random_direction(size) ** 2, count), 1e-300)
    )
    answer = scale * answer
    error, largest = system.largest(np.abs(K @ answer - right)), system.largest(np.abs(right))
    exact, doubt = _judged(
        system.known, inverse, system.largest(np.asarray(abs(scaled).sum(1)).ravel()), error, largest
    )
    return _one_by_one(system, Answers(answer, np.zeros(size), exact, exact.copy(), exact.copy(), doubt), ordering)


def _one_by_one(system: System, found: Answers, ordering: int) -> Answers:
    """The elements that are not exact yet: with the next ordering if there are others, and then as singular systems."""
    for bad in np.flatnonzero(~found.exact):
        own, rows = system.only(int(bad))
        if ordering + 1 < len(_ORDERINGS):
            again = solve_sparse(own, ordering + 1)
            found.answer[rows], found.null[rows] = again.answer, again.null
            for whole, part in zip(found[2:], again[2:], strict=True):
                whole[bad] = part[0]
            continue
        scale = _row_scale(own)
        if own.right.size <= EIGEN_LIMIT:
            scaled, known = _scaled(own.sparse(), scale).toarray(), own.known.select(0)
            part = _by_eigenvalues(scaled, scale, own.right, own.primal, known)
        else:
            part = _by_proximal_steps(own, scale)
        found.answer[rows], found.null[rows] = part[:2]
        for whole, one in zip(found[2:], part[2:], strict=True):
            whole[bad] = one
    return found


def _by_proximal_steps(system: System, scale: FloatArray) -> _One:
    """A large singular system, regularised by ``±ε`` on its diagonal: ``w ← w + K_ε⁻¹ (right - K w)``.

    The regularised matrix is quasi-definite.  Each step leaves the share ``ε / (ε + σ)`` of the error in a direction
    with the eigenvalue σ and moves nothing in the null space, so that a consistent system's minimum-norm answer is
    approached, in equilibrated units.
    """
    K = _scaled(system.sparse(), scale)
    error = float(system.known.error[0])
    shift = float(np.clip(error, 1e-10, 1e-2)) if system.known.damped else PROXIMAL
    factor = spla.splu(sp.csc_array(K + sp.diags_array(np.where(system.primal, shift, -shift))), **_ORDERINGS[0])
    right = scale * system.right
    if system.known.damped:
        return scale * factor.solve(right), np.zeros_like(right), False, False, False, np.inf
    direction = random_direction(right.size)
    both = np.stack([right, K @ direction], axis=1)
    answer = np.zeros_like(both)
    left = both
    for _ in range(PROXIMAL_ITERATIONS):
        answer += factor.solve(left)
        left = both - K @ answer
        if np.abs(left[:, 0]).max() <= 0.01 * RESIDUAL * np.abs(right).max():
            break
    consistent = bool(np.abs(left[:, 0]).max() <= RESIDUAL * np.abs(right).max())
    # What a known direction loses in being solved for is its part in the null space.
    lost = np.abs(answer[:, 1] - direction)
    lost[lost <= 1e-6 * np.abs(direction).max()] = 0.0
    dual_only = not lost[system.primal].any()
    doubt = float(system.known.lipschitz[0]) * error / PROXIMAL + ROUNDING / PROXIMAL
    return scale * answer[:, 0], lost, False, dual_only, consistent, doubt


def _row_scale(system: System) -> FloatArray:
    largest = np.zeros(system.right.size)
    np.maximum.at(largest, system.row, np.abs(system.value))
    return _equilibration(largest)


def _scaled(K: sp.csc_array, scale: FloatArray) -> Any:
    values = K.data * scale[K.indices] * np.repeat(scale, np.diff(K.indptr))
    return sp.csc_array((values, K.indices, K.indptr), K.shape)


def _equilibration(largest: FloatArray) -> FloatArray:
    return 1.0 / np.sqrt(np.where(largest > 0, largest, 1.0))
