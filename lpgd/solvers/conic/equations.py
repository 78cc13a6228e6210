"""Quadratic programs without inequalities: their optimality conditions are linear, and one system solves them.

Trajectories of least jerk, controls of a linear system, smoothing splines are such programs.  No solver is asked about
an element whose system is regular and whose answer leaves rounding of the conditions.
"""

from __future__ import annotations

import time
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import flags, from_numpy, rows_where
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.points import ENOUGH, Points
from lpgd.solvers.kkt.refinement import KeptFactor, is_cheap
from lpgd.solvers.kkt.schur import System
from lpgd.status import Status

__all__ = ["are_equations", "solved_equations"]

CORRECTIONS = 4
"""So often what is left is solved for by the same system, while it falls to a tenth."""
FALL = 0.1
EXACT = 1e-12
"""What may be left of the conditions, relative to the point."""


def are_equations(problem: ConicProblem) -> bool:
    """Whether these are quadratic programs without inequalities, of which solvers take longer than this.

    Where P has its whole diagonal it is mostly definite, and solvers that factorise P alone are as fast.
    """
    return problem.device.type == "cpu" and _are_equations(problem.structure)


@lru_cache(maxsize=256)
def _are_equations(structure: ConicStructure) -> bool:
    inequalities = structure.m - structure.cones.zero + structure.bounded_index.size + structure.integer_index.size
    if inequalities or not structure.quadratic.nnz or not is_cheap(structure):
        return False
    return not structure.m or structure.with_diagonal is not structure


def solved_equations(problem: ConicProblem) -> ConicSolution:
    """The solutions of elements whose data are of order 1, and convex; NO_SOLUTION for those that are left."""
    began, structure, size = time.perf_counter(), problem.structure, problem.batch_size
    elements = rows_where(problem.finite())
    x, y = (torch.zeros(size, count, dtype=torch.float64) for count in (structure.n, structure.m))
    solved, systems = torch.zeros(size, dtype=torch.bool), ()
    if elements.shape[0]:
        chosen = problem if elements.shape[0] == size else problem.select(elements)
        x[elements], y[elements], solved[elements], factored = _solved(Points(chosen))
        systems = (KeptFactor(elements, solved[elements], factored),)
    took = (time.perf_counter() - began) / max(size, 1)
    return ConicSolution(
        problem,
        x=x,
        y=y,
        z=torch.zeros_like(x),
        slack=torch.zeros_like(y),
        statuses=tuple(Status.SOLVED if fine else Status.NO_SOLUTION for fine in flags(solved)),
        iterations=np.zeros(size, dtype=np.int64),
        setup_seconds=np.zeros(size),
        solve_seconds=np.full(size, took),
        states=(None,) * size,
        systems=systems,
    )


def _solved(points: Points) -> tuple[Tensor, Tensor, Tensor, System]:
    """(x, y) of k elements, (k,) which of them are solved, and the systems."""
    structure, size = points.problem.structure, points.problem.batch_size
    x, y = (torch.zeros(size, count, dtype=torch.float64) for count in (structure.n, structure.m))
    error, slope, row_error = points.residual(x, y)
    factored = points.factored(x, y)
    regular = from_numpy(factored.regular)
    going = regular
    for _ in range(CORRECTIONS):
        dx, dy = points.chord(factored, slope, row_error)
        fresh = x + dx, y + dy, *points.residual(x + dx, y + dy)
        before, better = error, going & (fresh[2] < error)  # false for NaN
        x, y, error, slope, row_error = (
            torch.where(better[:, None] if new.ndim > 1 else better, new, old)
            for new, old in zip(fresh, (x, y, error, slope, row_error), strict=True)
        )
        going = better & (error > ENOUGH) & (error <= FALL * before)
        if not bool(going.any()):
            break
    largest = torch.maximum(maximum_norm(x), maximum_norm(y)).clamp(min=1.0)
    return x, y, regular & (error <= EXACT * largest), factored
