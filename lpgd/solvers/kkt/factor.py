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

from lpgd.arrays import BoolArray, FloatArray, IntArray, random_direction
from lpgd.execution.interrupts import pause
from lpgd.execution.threads import bounded_blas
from lpgd.solvers.kkt.filtered import FILTERED, by_filter
from lpgd.solvers.kkt.flat import is_flat, solve_flat
from lpgd.solvers.kkt.packed import packed
from lpgd.solvers.kkt.rank import DOUBT, RESIDUAL, ROUNDING, Known, One, by_eigenvalues, is_judged_exact
from lpgd.solvers.kkt.superlu import superlu

__all__ = [
    "Answers",
    "System",
    "blocks_of",
    "equilibration",
    "largest_of_rows",
    "scaled_by",
    "solve_matrices",
    "solve_sparse",
]


UNTHREADED = 500
"""Dense systems up to this size are factorised by one thread each."""
HOPELESS = 1e-2
"""Where one order of elimination says that an answer is in doubt by so much, another one would say so too."""
EIGEN_LIMIT = 1500
"""Singular systems up to this size are decided by all of their eigenvalues, where a few do not do."""
PROXIMAL = 1e-7
"""The diagonal that makes a large singular system regular, and the iterations that take it out of the answer again."""
PROXIMAL_ITERATIONS = 60
LEAST_SHIFT = 1e-3
"""Of an entry of that diagonal, relative to the largest one."""


class Answers(NamedTuple):
    """Answers, and what is known of each of the k elements' (k,).

    Attributes:
        answer: as the right-hand side was.
        null: of the same shape, how much each row has to do with the null space.
        exact: the system is regular.
        unique: the null space, if there is one, is that of the multipliers alone.
        consistent: the answer satisfies the system.
        doubt: the share of the answer that K's error may change; of a singular system's answer in what is kept.
        follows: (k, p) which of the other right-hand sides have an answer.
    """

    answer: FloatArray
    null: FloatArray
    exact: BoolArray
    unique: BoolArray
    consistent: BoolArray
    doubt: FloatArray
    follows: BoolArray


@dataclass(frozen=True, eq=False)
class System:
    """``K answer = right``, K symmetric and, but for a permutation, block diagonal with one block an element.

    ``others`` (p, t) are further right-hand sides, of which only whether they have an answer is asked.
    """

    row: IntArray
    column: IntArray
    value: FloatArray
    right: FloatArray
    owner: IntArray  # the element of each row
    primal: BoolArray  # rows of the primal variables
    count: int
    known: Known
    others: FloatArray

    def parts(self) -> list[tuple[System, IntArray]]:
        """Each element's system, and its rows in this one."""
        found: list[tuple[System, IntArray]] = []
        blocks = blocks_of(self.row, self.column, self.value, self.owner, self.count)
        for element, (rows, block) in enumerate(blocks):
            entries, owner = block.tocoo(), np.zeros(rows.size, dtype=np.int64)
            one = System(
                entries.row, entries.col, entries.data, self.right[rows], owner, self.primal[rows], 1,
                self.known.select([element]), self.others[:, rows],
            )  # fmt: skip
            found.append((one, rows))
        return found

    def sparse(self) -> sp.csc_array:
        return sp.csc_array((self.value, (self.row, self.column)), shape=(self.right.size, self.right.size))


def solve_matrices(
    matrices: FloatArray,
    right: FloatArray,
    idle: BoolArray,
    primal: BoolArray,
    known: Known,
    others: FloatArray | None = None,
) -> Answers:
    """Solve ``K answer = right`` for each of k symmetric matrices (k, t, t), without their idle rows and columns.

    Those must be zero, and get the answer zero; ``matrices`` is written to.  ``primal`` is (k, t) or (t,), ``others``
    (p, k, t) right-hand sides of which only whether they have an answer is found.
    """
    count, side = right.shape
    others = np.zeros((0, *right.shape)) if others is None else others
    if side == 0:
        every = np.ones(count, dtype=bool)
        return Answers(right, right, every, every, every, np.zeros(count), np.ones((count, len(others)), dtype=bool))
    primal = np.broadcast_to(primal, idle.shape)
    if known.damped:
        return _solve_packed(matrices, right, idle, primal, known, others)
    flat: dict[int, One] = {}
    for element in range(count):
        one = known.select(element)
        found = _flat(matrices[element], right[element], idle[element], primal[element], one, others[:, element])
        if found is not None:
            flat[element] = found
    if not flat:
        return _solve_packed(matrices, right, idle, primal, known, others)
    remaining = np.setdiff1d(np.arange(count), list(flat))
    every = _answers(count, side, len(others), exact=False)
    if remaining.size:
        packed_ones = _solve_packed(
            matrices[remaining], right[remaining], idle[remaining], primal[remaining], known.select(remaining),
            others[:, remaining],
        )  # fmt: skip
        for column, values in zip(every, packed_ones, strict=True):
            column[remaining] = values
    for element, found in flat.items():
        for column, value in zip(every, found, strict=True):
            column[element] = value
    return every


def _answers(count: int, side: int, others: int, exact: bool) -> Answers:
    """Nothing yet, or everything exact and zero."""
    fine, unique, consistent = np.full((3, count), exact)
    answer, null = np.zeros((2, count, side))
    return Answers(answer, null, fine, unique, consistent, np.zeros(count), np.full((count, others), exact))


def _flat(
    matrix: FloatArray, right: FloatArray, idle: BoolArray, primal: BoolArray, known: Known, others: FloatArray
) -> One | None:
    """The answer of one element's system without curvature, zero where it is idle; None where it is another system."""
    used = np.flatnonzero(~idle)
    if not is_flat(matrix, primal, used):
        return None
    K = matrix if used.size == right.size else matrix[np.ix_(used, used)]
    scale = equilibration(np.abs(K).max(1, initial=0.0))
    with bounded_blas():  # threads gain nothing on a factorisation of this size
        found = solve_flat(K, scale, right[used], primal[used], known, others[:, used])
    if found is None or used.size == right.size:
        return found
    answer, null = np.zeros((2, right.size))
    answer[used], null[used] = found[:2]
    return answer, null, *found[2:]


def _solve_packed(
    matrices: FloatArray, right: FloatArray, idle: BoolArray, primal: BoolArray, known: Known, others: FloatArray
) -> Answers:
    """The same by factors, each element in a matrix of a size of its own."""
    every = _answers(len(right), right.shape[1], len(others), exact=True)
    for stack in packed(matrices, idle):
        further = np.zeros((len(others), *stack.idle.shape))
        for place, one in enumerate(others):
            further[place] = stack.vectors(one)
        found = _solve_stack(
            stack.matrices, stack.vectors(right), stack.idle, stack.vectors(primal), known.select(stack.elements),
            further,
        )  # fmt: skip
        stack.spread(found.answer, every.answer)
        stack.spread(found.null, every.null)
        for whole, values in zip(every[2:], found[2:], strict=True):
            whole[stack.elements] = values
    return every


def _solve_stack(
    matrices: FloatArray, right: FloatArray, idle: BoolArray, primal: BoolArray, known: Known, others: FloatArray
) -> Answers:
    """The same for matrices with ones on the diagonal of idle rows, by eigenvalues where factors do not do."""
    side = right.shape[1]
    scale = equilibration(np.abs(matrices).max(2))
    scaled = scale[:, :, None] * matrices
    scaled *= scale[:, None, :]
    direction = np.where(idle, 0.0, random_direction(side))
    # Threads of BLAS cost more than they gain on matrices of this size.
    bound = bounded_blas() if side < UNTHREADED else nullcontext()
    try:
        with bound:
            answers = np.linalg.solve(scaled, np.stack([scale * right, direction], axis=2))
    except np.linalg.LinAlgError:
        answers = np.full((*right.shape, 2), np.nan)
        for one in range(len(right) if len(right) > 1 else 0):
            single = slice(one, one + 1)
            with suppress(np.linalg.LinAlgError):
                both = np.stack([scale[single] * right[single], direction[single]], axis=2)
                answers[single] = np.linalg.solve(scaled[single], both)
    inverse = np.linalg.norm(answers[:, :, 1], axis=1)
    size = np.abs(scaled).sum(2).max(1)
    answer = scale * answers[:, :, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        error = np.abs((matrices @ answer[:, :, None])[:, :, 0] - right).max(1)
    exact, doubt = is_judged_exact(known, inverse, size, error, np.abs(right).max(1))
    unique, consistent, null = exact.copy(), exact.copy(), np.zeros_like(answer)
    follows = np.repeat(exact[:, None], len(others), axis=1)
    for bad in np.flatnonzero(~exact):
        used = np.flatnonzero(~idle[bad])
        one = known.select(bad)
        block = scaled[bad][np.ix_(used, used)]
        found = by_eigenvalues(
            block, scale[bad, used], right[bad, used], primal[bad, used], one, others[:, bad][:, used]
        )
        answer[bad] = 0.0
        answer[bad, used], null[bad, used], exact[bad], unique[bad], consistent[bad], doubt[bad], follows[bad] = found
    return Answers(answer, null, exact, unique, consistent, doubt, follows)


_ORDERINGS: tuple[dict[str, Any], ...] = (
    {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.01, "options": {"SymmetricMode": True}},
    {"permc_spec": "COLAMD"},
)
"""SuperLU's options: for symmetric systems, a third of the fill; and with free pivoting, where that is not enough."""


def solve_sparse(system: System) -> Answers:
    """Each element's system by a sparse factorisation of its own; one that this does not solve, as a singular one."""
    count, nothing = system.count, np.zeros((2, system.right.size))
    every = _answers(count, 0, len(system.others), exact=True)._replace(answer=nothing[0], null=nothing[1])
    for element, (single, rows) in enumerate(system.parts()):
        pause()
        if not rows.size:
            continue
        # Damped steps are asked for where a factor has not done, and the filter's are Newton's where that is regular.
        orderings = () if system.known.damped and rows.size > FILTERED else _ORDERINGS
        solved: One | None = None
        for options in orderings:
            solved = _factorised(single, options)
            if solved[2] or (rows.size <= EIGEN_LIMIT and not solved[5] < HOPELESS):
                break
        if solved is None or not solved[2]:
            solved = _as_singular(single)
        every.answer[rows], every.null[rows] = solved[:2]
        for whole, value in zip(every[2:], solved[2:], strict=True):
            whole[element] = value
    return every


def _factorised(system: System, options: dict[str, Any]) -> One:
    """One element's answer by SuperLU; not exact where the system is singular, or as good as singular."""
    size, right = system.right.size, system.right
    K = system.sparse()
    scale = equilibration(largest_of_rows(K))
    scaled = scaled_by(K, scale)
    nothing = np.zeros(size)
    try:
        factor = superlu(scaled, **options)
    except RuntimeError:  # singular
        return nothing, nothing, False, False, False, np.inf, np.zeros(len(system.others), dtype=bool)
    solution = factor.solve(np.stack([scale * right, random_direction(size)], axis=1))
    answer = scale * (solution[:, 0] + factor.solve(scale * right - scaled @ solution[:, 0]))
    inverse = np.linalg.norm(solution[:, 1])
    error, largest = np.abs(K @ answer - right).max(), np.abs(right).max()
    norms = np.array([[inverse], [abs(scaled).sum(1).max()], [error], [largest]], dtype=np.float64)
    exact, doubt = is_judged_exact(system.known, norms[0], norms[1], norms[2], norms[3])
    fine = bool(exact[0])
    return answer, nothing, fine, fine, fine, float(doubt[0]), np.full(len(system.others), fine)


def _as_singular(system: System) -> One:
    K, known = system.sparse(), system.known.select(0)
    scale = equilibration(largest_of_rows(K))
    small = system.right.size <= EIGEN_LIMIT
    if small and not known.damped:
        everything = np.zeros_like(system.primal)
        flat = _flat(K.toarray(), system.right, everything, system.primal, known, system.others)
        if flat is not None:
            return flat
    if system.right.size > FILTERED:
        found = by_filter(scaled_by(K, scale), scale, system.right, system.primal, known, system.others)
        if found is not None:
            return found
    if not small or (system.right.size > FILTERED and not known.damped):
        found = _by_proximal_steps(system, scale)
        # What is said of fewer, of other variables, or of a point that is known less well, the eigenvalues know better.
        if not small or (found[3] and found[4] and found[5] < DOUBT):
            return found
    return by_eigenvalues(scaled_by(K, scale).toarray(), scale, system.right, system.primal, known, system.others)


def _by_proximal_steps(system: System, scale: FloatArray) -> One:
    """A large singular system, regularised by ``±ε`` on its diagonal: ``w ← w + K_ε⁻¹ (right - K w)``.

    The regularised matrix is quasi-definite.  Each step leaves the share ``ε / (ε + σ)`` of the error in a direction
    with the eigenvalue σ and moves nothing in the null space, so that a consistent system's minimum-norm answer is
    approached.
    """
    K = scaled_by(system.sparse(), scale)
    error = float(system.known.error[0])
    if system.known.damped:
        shifts = np.full(scale.size, float(np.clip(error, 1e-10, 1e-2)))
    else:  # in units in which the shortest answer is that of the system itself, unless its scales are too far apart
        shifts = PROXIMAL * np.maximum(np.square(scale / scale.max(initial=1e-300)), LEAST_SHIFT)
    factor = superlu(sp.csc_array(K + sp.diags_array(np.where(system.primal, shifts, -shifts))), **_ORDERINGS[0])
    right = scale * system.right
    if system.known.damped:
        nothing = np.zeros(len(system.others), dtype=bool)
        return scale * factor.solve(right), np.zeros_like(right), False, False, False, np.inf, nothing
    direction = random_direction(right.size)
    both = np.stack([right, K @ direction, *(scale * system.others)], axis=1)
    small = RESIDUAL * np.abs(both).max(0)
    answer = np.zeros_like(both)
    left = both
    for _ in range(PROXIMAL_ITERATIONS):
        answer += factor.solve(left)
        left = both - K @ answer
        remain = np.abs(left).max(0) <= 0.01 * small
        if remain[0] and remain[2:].all():
            break
    follows = np.abs(left).max(0) <= small
    # What a known direction loses in being solved for is its part in the null space.
    lost = np.abs(answer[:, 1] - direction)
    lost[lost <= 1e-6 * np.abs(direction).max()] = 0.0
    dual_only = not lost[system.primal].any()
    doubt = (float(system.known.lipschitz[0]) * error + ROUNDING) / float(shifts.min())
    return scale * answer[:, 0], lost, False, dual_only, bool(follows[0]), doubt, follows[2:]


def blocks_of(
    row: IntArray, column: IntArray, value: FloatArray, owner: IntArray, count: int
) -> list[tuple[IntArray, Any]]:
    """The blocks of a matrix that is block diagonal but for a permutation, and where the rows of each are.

    Args:
        row, column, value: its entries.
        owner: the block of each row.
        count: how many blocks there are.
    """
    sizes = np.bincount(owner, minlength=count)
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(sizes)
    local = np.empty(order.size, dtype=np.int32)
    local[order] = np.arange(order.size) - np.repeat(ends - sizes, sizes)
    of_entry = owner[row]
    entries = np.argsort(of_entry, kind="stable")
    starts = np.searchsorted(of_entry[entries], np.arange(count + 1))
    found: list[tuple[IntArray, Any]] = []
    for block in range(count):
        chosen, rows = entries[starts[block] : starts[block + 1]], order[ends[block] - sizes[block] : ends[block]]
        indices = local[row[chosen]], local[column[chosen]]
        found.append((rows, sp.csc_array((value[chosen], indices), shape=(rows.size, rows.size))))
    return found


def largest_of_rows(K: Any) -> FloatArray:
    """The largest magnitude in each row of a sparse matrix."""
    largest = np.zeros(K.shape[0])
    np.maximum.at(largest, K.indices, np.abs(K.data))
    return largest


def scaled_by(K: Any, scale: FloatArray) -> Any:
    """``S K S`` for a sparse matrix and a diagonal S."""
    values = K.data * scale[K.indices] * np.repeat(scale, np.diff(K.indptr))
    return sp.csc_array((values, K.indices, K.indptr), K.shape)


def equilibration(largest: FloatArray) -> FloatArray:
    """The factors of rows and columns, from the largest entry of each row."""
    return 1.0 / np.sqrt(np.where(largest > 0, largest, 1.0))
