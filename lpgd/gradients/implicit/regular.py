"""The short way of the derivative of regular points: small quadratic programs with definite P, whose answers are exact.

Away from kinks, with a system that is regular by far, and an answer that leaves rounding of its equations, none of the
questions of :mod:`lpgd.gradients.implicit.conic` has another answer than "implicit", and no warning is due.  The
numbers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lpgd.arrays import FloatArray, from_numpy
from lpgd.gradients.base import GradientInfo
from lpgd.gradients.implicit.located import KINK
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.solvers.kkt.points import CORRECTIONS, LEFT
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
    structure = problem.structure
    zero, n = structure.cones.zero, structure.n
    g_x, g_y, g_z = (direction.numpy() for direction in tilt)
    v = solution.y.numpy() - solution.slack.numpy()
    held, at_bound, free = v > 0.0, None, n
    held[:, :zero] = True
    # What is as near to a kink as this is looked at from both sides.
    if (np.abs(v[:, zero:]) <= KINK).any():
        return None
    rows = held
    if structure.has_bounds:
        lower, upper, x, z = (tensor.numpy() for tensor in (*problem.full_bounds(), solution.x, solution.z))
        if (np.abs(z - (upper - x)) <= KINK).any() or (np.abs(-z - (x - lower)) <= KINK).any():
            return None
        at_bound = (x + z > upper) | (x + z < lower)
        free = (~at_bound).sum(1)
        rows = np.concatenate([held, at_bound[:, structure.bounded_index]], 1)
    # More active rows than free variables depend on each other.
    if (held.sum(1) > free).any():
        return None
    factor = SchurFactor.of(problem)
    if factor is None or not factor.all_fine:
        return None
    system = ActiveSystem(factor, rows)
    doubt: FloatArray = ROUNDING * system.condition
    if not (system.regular & (doubt < DOUBT)).all():
        return None
    data, quadratic, constraint = problem.data, structure.quadratic, structure.constraint
    P, A = problem.symmetric_P.numpy(), data.A.numpy()

    def steps(*right: FloatArray) -> tuple[FloatArray, FloatArray]:
        dx, dy, dz = system.solve(*right)
        d_v = dy + (right[1] + constraint.numpy_product(A, dx))
        d_v[:, :zero] = dy[:, :zero]
        return dx + dz, d_v

    d_xi, d_v = steps(g_x, g_y, g_z)
    size = np.max([_norms(direction) for direction in (g_x, g_y, g_z)], axis=0)
    exact = np.zeros((len(size), 1), dtype=np.bool_)
    for _ in range(CORRECTIONS):
        dx = d_xi if at_bound is None else np.where(at_bound, -g_z, d_xi)
        dz = np.zeros_like(dx) if at_bound is None else np.where(at_bound, d_xi - dx, 0.0)
        dy = np.where(held, d_v, 0.0)
        row_error = g_y + constraint.numpy_product(A, dx)
        slope = g_x + quadratic.numpy_product(P, dx) + constraint.numpy_product(A, dy, transpose=True) + dz
        row_error[:, zero:] += (dy - d_v)[:, zero:]
        error = np.maximum(_norms(slope), _norms(row_error))
        largest = np.maximum(size, np.maximum(_norms(d_xi), _norms(d_v)))
        exact |= (error <= LEFT * largest)[:, None]  # false for NaN
        if exact.all():
            info.used = ["implicit"] * len(active)
            info.doubt, info.fallbacks = from_numpy(doubt), []
            return ConicPoint(from_numpy(dx), from_numpy(dy), from_numpy(dz))
        # What is left is solved for again, of the elements of which something is.
        more_xi, more_v = steps(slope, row_error, np.zeros_like(slope))
        d_xi, d_v = np.where(exact, d_xi, d_xi + more_xi), np.where(exact, d_v, d_v + more_v)
    return None


def _fits(solution: ConicSolution) -> bool:
    """Whether these are known answers to quadratic programs in units that are 1."""
    problem, known_to = solution.problem, solution.known_to
    if known_to is None or solution.systems or problem.device.type != "cpu" or not problem.has_plain_units:
        return False
    small = has_dense_rows(problem.structure) and problem.structure.m + problem.structure.bounded_index.size > 0
    return small and bool((known_to.numpy() <= KNOWN).all())


KNOWN = 1e-10
"""Points with no larger |F| are not refined, and it hides no kink."""


def _norms(vectors: FloatArray) -> FloatArray:
    """(B,) the largest magnitude in each row."""
    return np.abs(vectors).max(1, initial=0.0)
