"""The short way of the derivative of regular points: dense quadratic programs with definite P, whose answers are exact.

Away from kinks, with a system that is regular by far, and an answer that leaves rounding of its equations, none of the
questions of :mod:`lpgd.gradients.implicit.conic` has another answer than "implicit", and no warning is due.  The
numbers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lpgd.arrays import FloatArray, from_numpy
from lpgd.gradients.base import GradientInfo
from lpgd.gradients.implicit.located import KINK
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint, ConicStructure
from lpgd.solvers.kkt.points import LEFT
from lpgd.solvers.kkt.rank import DOUBT, ROUNDING
from lpgd.solvers.kkt.reduced import has_dense_rows
from lpgd.solvers.kkt.schur import ActiveSystem, SchurFactor

__all__ = ["regular_response"]


def regular_response(
    solution: ConicSolution, tilt: ConicPoint, active: Sequence[int], info: GradientInfo
) -> ConicPoint | None:
    """The derivative of the solutions along a tilt, and the record; None where an element of the batch is unusual.

    Args:
        solution, tilt: of B elements.
        active: elements with a solution and a tilt.
        info: the record, which is filled only where there is an answer.
    """
    problem = solution.problem
    if not active or len(active) < problem.batch_size or not _fits(solution):
        return None
    zero, n = problem.structure.cones.zero, problem.structure.n
    g_x, g_y = tilt.x.numpy(), tilt.y.numpy()
    v = solution.y.numpy() - solution.slack.numpy()
    held = v > 0.0
    held[:, :zero] = True
    # What is as near to a kink as this is looked at from both sides, and more active rows than variables depend on
    # each other.
    if (np.abs(v[:, zero:]) <= KINK).any() or held.sum(1).max(initial=0) > n:
        return None
    factor = SchurFactor.of(problem)
    if factor is None or not factor.all_fine:
        return None
    system = ActiveSystem(factor, held)
    doubt: FloatArray = ROUNDING * system.condition
    if not (system.regular & (doubt < DOUBT)).all():
        return None
    dx, dy, _ = system.solve(g_x, g_y, np.zeros_like(g_x))
    data, quadratic, constraint = problem.data, problem.structure.quadratic, problem.structure.constraint
    P, A = problem.symmetric_P.numpy(), data.A.numpy()
    moved = constraint.numpy_product(A, dx)
    row_error = g_y + moved
    d_v = dy + row_error
    d_v[:, :zero] = dy[:, :zero]
    dy = np.where(held, d_v, 0.0)
    slope = g_x + quadratic.numpy_product(P, dx) + constraint.numpy_product(A, dy, transpose=True)
    row_error[:, zero:] += (dy - d_v)[:, zero:]
    error = np.maximum(_norms(slope), _norms(row_error))
    size = np.maximum(np.maximum(_norms(g_x), _norms(g_y)), np.maximum(_norms(dx), _norms(d_v)))
    if not (error <= LEFT * size).all():
        return None
    info.used = ["implicit"] * len(active)
    info.doubt, info.fallbacks = from_numpy(doubt), []
    return ConicPoint(from_numpy(dx), from_numpy(dy), from_numpy(np.zeros_like(dx)))


def _fits(solution: ConicSolution) -> bool:
    """Whether these are known answers to dense quadratic programs in units that are 1, without bounds."""
    problem, known_to = solution.problem, solution.known_to
    if known_to is None or solution.systems or problem.device.type != "cpu" or not problem.has_plain_units:
        return False
    return _is_dense_without_bounds(problem.structure) and bool((known_to.numpy() <= KNOWN).all())


@lru_cache(maxsize=64)
def _is_dense_without_bounds(structure: ConicStructure) -> bool:
    dense = structure.quadratic.is_dense and structure.constraint.is_dense and has_dense_rows(structure)
    return dense and structure.m > 0 and not structure.has_bounds


KNOWN = 1e-10
"""Points with no larger |F| are not refined, and it hides no kink."""


def _norms(vectors: FloatArray) -> FloatArray:
    """(B,) the largest magnitude in each row."""
    return np.abs(vectors).max(1)
