"""The short way of what small quadratic programs mostly are: of order 1, strictly convex, and solved to rounding.

A batch of them needs no units, its Cholesky factors show that it is convex, and what is left of the
optimality conditions shows that every answer is exact.  All that the general way (:mod:`lpgd.solvers.conic.posed`)
looks at one after the other is then known from a few numbers of each element, which are looked at once.

The conditions are stricter than those of the general way, and its numbers are the same to the last bit: where a single
element of a batch is not as it should be, the general way takes the batch over, with the solver's answer if it has one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from lpgd.arrays import FloatArray, from_numpy
from lpgd.problems.conic.magnitudes import ALIKE, MODERATE
from lpgd.problems.conic.magnitudes import LARGEST_MODERATE as LARGEST
from lpgd.problems.conic.magnitudes import LEAST_MODERATE as LEAST
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure, per_element
from lpgd.problems.conic.units import Units
from lpgd.solvers.conic.convexity import SURELY, is_definite
from lpgd.solvers.conic.lengths import SURE
from lpgd.solvers.conic.posed import ACCEPTED, EXACT
from lpgd.solvers.kkt.reduced import has_dense_rows
from lpgd.solvers.kkt.schur import SchurFactor
from lpgd.status import Status

__all__ = ["answered", "judged_flawless"]


FIRST = 8
"""So many columns are looked at first for a large entry of each row: more is not asked."""


def answered(
    problem: ConicProblem, executor: Executor | None, solve: Callable[[SchurFactor], ConicSolution]
) -> ConicSolution | None:
    """A solver's own answer to a batch of order 1 with surely definite P; None where it is not one.

    Args:
        problem: the batch.
        executor: where its factors are made.
        solve: what the solver makes of it, given these.
    """
    structure = problem.structure
    if not problem.batch_size or problem.device.type != "cpu" or not _fits(structure):
        return None
    sizes = _moderate_bounds(problem) if structure.has_bounds else np.zeros(1)
    if sizes is None or not _has_moderate_vectors(problem, sizes) or not _has_moderate_rows(problem):
        return None
    factor = SchurFactor.of(problem, executor)
    if factor is None or not factor.all_fine:
        return None
    if not _is_surely_definite(problem, factor) and not bool(is_definite(problem).all()):
        return None
    problem.__dict__["units"] = Units()  # what the cached property would compute
    return solve(factor)


@lru_cache(maxsize=64)
def _fits(structure: ConicStructure) -> bool:
    small = has_dense_rows(structure) and structure.quadratic.on_diagonal.size == structure.n > 0
    return small and structure.m + structure.bounded_index.size > 0 and not structure.has_integers


def _moderate_bounds(problem: ConicProblem) -> FloatArray | None:
    """(1 or R,) the largest of the finite bounds; None where one is far away, or not below the other one."""
    structure, data = problem.structure, problem.data
    lower, upper = (np.atleast_2d(bound.detach().numpy()) for bound in (data.lower, data.upper))
    if not ((lower < np.inf).all() and (upper > -np.inf).all()):  # also where there is a NaN
        return None
    count, (low_at, high_at) = max(len(lower), len(upper)), structure.bounded_on_both_sides
    lower, upper = (np.resize(bound, (count, bound.shape[1])) for bound in (lower, upper))
    if low_at.size and not (lower[:, low_at] < upper[:, high_at]).all():
        return None
    sizes = np.zeros(count)
    for bound in (lower, upper):
        np.maximum(sizes, np.abs(bound).max(1, where=np.isfinite(bound), initial=0.0), out=sizes)
    return sizes if (sizes < LARGEST).all() else None


def _has_moderate_rows(problem: ConicProblem) -> bool:
    """Whether the largest entries of all rows and columns of A are moderate, and finite all others."""
    n, m, pattern = problem.structure.n, problem.structure.m, problem.structure.constraint
    if not pattern.nnz:
        return not m
    values = problem.data.A.detach().numpy().reshape(-1, pattern.nnz)
    columns = pattern.dense_columns(values)
    # Sums of squares: no entry is larger than the root of one, and one entry is as large as the mean's.
    of_columns = np.einsum("bnm,bnm->bn", columns, columns)
    of_rows = np.einsum("bnm,bnm->bm", columns[:, :FIRST], columns[:, :FIRST])
    if not (of_columns.sum(1) < LARGEST**2).all():  # also where there is a NaN
        return False
    if of_columns.min() >= m * LEAST**2 and of_rows.min() >= min(n, FIRST) * LEAST**2:
        return True
    sizes = np.abs(columns)
    # Rows and columns without an entry have no size.
    return all(
        bool(((sizes.max(axis) >= LEAST) | ~present).all())
        for axis, present in ((1, pattern.filled_rows), (2, pattern.filled_columns))
    )


def _has_moderate_vectors(problem: ConicProblem, bounds: FloatArray) -> bool:
    """Whether P, if it is definite, q and b are of order 1: the largest entry of P is on its diagonal then.

    Args:
        problem: B elements.
        bounds: (1 or R,) the largest of the finite bounds.
    """
    data, diagonal = problem.data, _diagonal(problem)
    q, b = (np.atleast_2d(datum.detach().numpy()) for datum in (data.q, data.b))
    curvature, cost, right = diagonal.max(1), np.abs(q).max(1), np.abs(b).max(1, initial=0.0)
    if not (cost.max() < LARGEST and curvature.min() >= LEAST and curvature.max() < LARGEST):
        return False
    # Variables that no row involves are known by their curvature alone.
    involved = problem.structure.constraint.filled_columns.all()
    if not (involved or (diagonal.min(1) >= ALIKE * curvature).all()):
        return False
    count = max(map(len, (curvature, cost, right, bounds)))
    sizes = np.maximum(np.resize(right, count), np.resize(bounds, count))
    if not sizes.max() < LARGEST:
        return False
    moderate = sizes >= LEAST
    if not moderate.all():  # without right-hand sides, the minimiser without constraints is the unit
        length = np.frexp(np.resize(cost, count))[1] - np.frexp(np.resize(curvature, count))[1]
        moderate |= (sizes == 0.0) & (np.resize(cost, count) > 0.0) & (np.abs(length) <= MODERATE)
    return bool(moderate.all())


def _is_surely_definite(problem: ConicProblem, factor: SchurFactor) -> bool:
    """Whether P is, in all elements."""
    curvature, (least, _) = _diagonal(problem).max(1), factor.pivots
    return bool((least**2 > SURELY * np.resize(curvature, len(least))).all())


def _diagonal(problem: ConicProblem) -> FloatArray:
    """(1 or R, n) that of P."""
    P = np.atleast_2d(problem.symmetric_P.detach().numpy())
    return P[:, problem.structure.quadratic.on_diagonal]


def judged_flawless(answer: ConicSolution, solver: str) -> ConicSolution | None:
    """The answer to a batch of :func:`answered`, judged, where every element is solved to rounding; else None.

    With complementary points whose residual F of the optimality conditions is at most ``EXACT``, primal and dual
    residuals are no larger, and the gap is all that has to be looked at.
    """
    problem, size = answer.problem, answer.batch_size
    if answer.statuses.count(Status.SOLVED) < size:
        return None
    structure = problem.structure
    zero = structure.cones.zero
    x, z, q, b = (
        tensor.numpy()
        for tensor in (answer.x, answer.z, *(per_element(d, size) for d in (problem.data.q, problem.data.b)))
    )
    v = answer.y.numpy() - answer.slack.numpy()
    y, slack = np.maximum(v, 0.0), np.maximum(-v, 0.0)
    y[:, :zero] = v[:, :zero] = answer.y.numpy()[:, :zero]
    slack[:, :zero] = 0.0
    held, least = np.zeros(size), np.abs(b).min(1, where=b != 0.0, initial=1.0)
    if structure.has_bounds:
        lower, upper = (bound.numpy() for bound in problem.full_bounds())
        has_lower, has_upper = np.isfinite(lower), np.isfinite(upper)
        z = np.where(
            has_lower, np.where(has_upper, z, np.minimum(z, 0.0)), np.where(has_upper, np.maximum(z, 0.0), 0.0)
        )
        moved = x + z
        x = np.minimum(np.maximum(moved, lower), upper)
        z = moved - x
        ends = np.where(z > 0.0, upper, lower)
        ends = np.where(z != 0.0, ends, 0.0)
        held = np.einsum("bi,bi->b", ends, z)
        for bound, present in ((lower, has_lower), (upper, has_upper)):
            least = np.minimum(least, np.abs(bound).min(1, where=present & (bound != 0.0), initial=1.0))
    quadratic, constraint = structure.quadratic, structure.constraint
    Px, A = quadratic.numpy_product(problem.symmetric_P.numpy(), x), problem.data.A.numpy()
    Aty, Ax = constraint.numpy_product(A, y, transpose=True), constraint.numpy_product(A, x)
    known_to = np.maximum(_norms(Px + q + Aty + z), _norms(Ax + slack - b))
    curvature, cost, right = (np.einsum("bi,bi->b", *pair) for pair in ((x, Px), (x, q), (y, b)))
    gap = np.abs(curvature + cost + right + held)
    terms = np.maximum(np.maximum(np.abs(curvature), np.abs(cost)), np.maximum(np.abs(right), 1.0))
    length = np.minimum(_norms(x), 1.0)
    fine = (known_to <= EXACT) & (known_to <= SURE * least) & (gap <= ACCEPTED * length * terms) & (length > 0.0)
    if not fine.all():  # also where there is a NaN
        return None
    nothing = torch.zeros(size, dtype=torch.int64)
    return replace(
        answer,
        x=from_numpy(x),
        y=from_numpy(y),
        z=from_numpy(z),
        slack=from_numpy(slack),
        known_to=from_numpy(known_to),
        known_before=from_numpy(known_to.copy()),
        refined=nothing,
        isolated=nothing.bool(),
        sharpened=nothing.bool(),
        asked=solver,
        solvers=(solver,) * size,
        proofs=("",) * size,
    )


def _norms(vectors: FloatArray) -> FloatArray:
    """(B,) the largest magnitude in each row."""
    return np.abs(vectors).max(1, initial=0.0)
