"""The short way of what small dense quadratic programs mostly are: of order 1, strictly convex, and solved to rounding.

A batch of them needs no units and no bounds, its Cholesky factors show that it is convex, and what is left of the
optimality conditions shows that every answer is exact.  All that the general way (:mod:`lpgd.solvers.posed`) looks at
one after the other is then known from a few numbers of each element, which are looked at once.

The conditions are stricter than those of the general way, and its numbers are the same to the last bit: where a single
element of a batch is not as it should be, the general way takes the batch over, with the solver's answer if it has one.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from lpgd.arrays import FloatArray, from_numpy
from lpgd.problems.conic.magnitudes import LARGEST_MODERATE as LARGEST
from lpgd.problems.conic.magnitudes import LEAST_MODERATE as LEAST
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure, per_element
from lpgd.problems.conic.units import Units
from lpgd.solvers.backends.whitened import WhiteSolver, white_solution
from lpgd.solvers.convexity import SURELY
from lpgd.solvers.kkt.schur import SchurFactor
from lpgd.solvers.lengths import SURE
from lpgd.solvers.posed import ACCEPTED, EXACT
from lpgd.status import Status

__all__ = ["answered", "judged_flawless"]


FIRST = 8
"""So many columns are looked at first for a large entry of each row: more is not asked."""


def answered(problem: ConicProblem, executor: Executor | None, solver: WhiteSolver) -> ConicSolution | None:
    """The solver's own answer to a batch of order 1 with surely definite P; None where it is not one."""
    if not problem.batch_size or problem.device.type != "cpu" or not _fits(problem.structure):
        return None
    if not _has_moderate_rows(problem):
        return None
    factor = SchurFactor.of(problem, executor)
    if factor is None or not factor.all_fine or not _has_moderate_vectors(problem, factor):
        return None
    problem.__dict__["units"] = Units()  # what the cached property would compute
    return white_solution(problem, factor, (), executor, solver, range(problem.batch_size))


@lru_cache(maxsize=64)
def _fits(structure: ConicStructure) -> bool:
    dense = structure.quadratic.is_dense and structure.constraint.is_dense and structure.cones.is_polyhedral
    return dense and structure.m > 0 and not structure.has_bounds and not structure.has_integers


def _has_moderate_rows(problem: ConicProblem) -> bool:
    """Whether the largest entries of all rows and columns of A are moderate, and finite all others."""
    n, m = problem.structure.n, problem.structure.m
    columns = problem.data.A.detach().numpy().reshape(-1, n, m)
    # Sums of squares: no entry is larger than the root of one, and one entry is as large as the mean's.
    of_columns = np.einsum("bnm,bnm->bn", columns, columns)
    of_rows = np.einsum("bnm,bnm->bm", columns[:, :FIRST], columns[:, :FIRST])
    if not (of_columns.sum(1) < LARGEST**2).all():  # also where there is a NaN
        return False
    if of_columns.min() >= m * LEAST**2 and of_rows.min() >= min(n, FIRST) * LEAST**2:
        return True
    sizes = np.abs(columns)
    return bool(sizes.max(1).min() >= LEAST and sizes.max(2).min() >= LEAST)


def _has_moderate_vectors(problem: ConicProblem, factor: SchurFactor) -> bool:
    """Whether P is surely definite, and P, q and b are of order 1: the largest entry of P is on its diagonal then."""
    n, data = problem.structure.n, problem.data
    P, q, b = (np.atleast_2d(datum.detach().numpy()) for datum in (problem.symmetric_P, data.q, data.b))
    curvature, right = P[:, :: n + 1].max(1), np.abs(b).max(1)
    if not (np.abs(q).max() < LARGEST and curvature.min() >= LEAST and curvature.max() < LARGEST):
        return False
    least, _ = factor.pivots
    definite = least**2 > SURELY * (curvature if len(curvature) == len(least) else np.resize(curvature, len(least)))
    return bool(definite.all() and right.min() >= LEAST and right.max() < LARGEST)


def judged_flawless(answer: ConicSolution, solver: str) -> ConicSolution | None:
    """The answer to a batch of :func:`answered`, judged, where every element is solved to rounding; else None.

    With complementary points whose residual F of the optimality conditions is at most ``EXACT``, primal and dual
    residuals are no larger, and the gap is all that has to be looked at.
    """
    problem, size = answer.problem, answer.batch_size
    if answer.statuses.count(Status.SOLVED) < size:
        return None
    zero = problem.structure.cones.zero
    x, q, b = (
        tensor.numpy() for tensor in (answer.x, *(per_element(d, size) for d in (problem.data.q, problem.data.b)))
    )
    v = answer.y.numpy() - answer.slack.numpy()
    y, slack = np.maximum(v, 0.0), np.maximum(-v, 0.0)
    y[:, :zero] = v[:, :zero] = answer.y.numpy()[:, :zero]
    slack[:, :zero] = 0.0
    quadratic, constraint = problem.structure.quadratic, problem.structure.constraint
    Px, A = quadratic.numpy_product(problem.symmetric_P.numpy(), x), problem.data.A.numpy()
    Aty, Ax = constraint.numpy_product(A, y, transpose=True), constraint.numpy_product(A, x)
    known_to = np.maximum(_norms(Px + q + Aty), _norms(Ax + slack - b))
    curvature, cost, right = (np.einsum("bi,bi->b", *pair) for pair in ((x, Px), (x, q), (y, b)))
    gap = np.abs(curvature + cost + right)
    terms = np.maximum(np.maximum(np.abs(curvature), np.abs(cost)), np.maximum(np.abs(right), 1.0))
    length, least = np.minimum(_norms(x), 1.0), np.abs(b).min(1, where=b != 0.0, initial=1.0)
    fine = (known_to <= EXACT) & (known_to <= SURE * least) & (gap <= ACCEPTED * length * terms) & (length > 0.0)
    if not fine.all():  # also where there is a NaN
        return None
    nothing = torch.zeros(size, dtype=torch.int64)
    return replace(
        answer,
        y=from_numpy(y),
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
    return np.abs(vectors).max(1)
