"""Implicit differentiation of conic programs: how well a point is known, which answers are exact, and what is not.

One place decides, for all cones, solvers and ways to solve the systems.  In units of order 1,

1. what is left of the optimality conditions, |F|, says how well a point is known; where its error could matter the
   point is refined first (:mod:`lpgd.solvers.kkt.refinement`);
2. rank is decided relative to that error (:mod:`lpgd.solvers.kkt.factor`);
3. at kinks, where multiplier and slack vanish together, or a point is at the boundary of a curved cone, the system is
   solved on both sides: equal answers are exact, others are one-sided;
4. what remains is on record, with the size of the doubt, and warned about where the answer depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch

from lpgd.arrays import as_index, elements_where
from lpgd.execution.tasks import SerialExecutor
from lpgd.gradients.base import GradientInfo
from lpgd.gradients.implicit import whole_batches
from lpgd.gradients.implicit.answers import Answers
from lpgd.gradients.implicit.located import Tilted, known_point
from lpgd.gradients.implicit.one_by_one import one_by_one
from lpgd.gradients.implicit.regular import regular_response
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicPoint
from lpgd.solvers.interior_point.derivative import is_batchable
from lpgd.solvers.kkt.reduced import has_dense_rows
from lpgd.solvers.kkt.system import is_quick

if TYPE_CHECKING:
    from lpgd.gradients.implicit.method import ImplicitKKT

__all__ = ["in_data", "response"]


def response(
    method: ImplicitKKT,
    solution: ConicSolution,
    tilt: ConicPoint,
    active: Sequence[int],
    info: GradientInfo,
    executor: Executor | None,
    near: ConicPoint | None = None,
) -> ConicPoint:
    """The derivative of the solution along a tilt for the elements ``active``, zero for others; ``info`` is filled.

    Args:
        method: :class:`~lpgd.ImplicitKKT`, with its ρ.
        solution, tilt: of B elements.
        active: elements with a solution and a tilt.
        info: the record.
        executor: where the work runs.
        near: a difference that it is to be compared with, of B elements: :meth:`Points.response`.
    """
    problem = solution.problem
    found = regular_response(solution, tilt, active, info) if method.rho == 0.0 and near is None else None
    if found is not None:
        return found
    change = ConicPoint(*(torch.zeros_like(tensor) for tensor in solution.point))
    info.doubt = torch.full((problem.batch_size,), torch.nan, dtype=torch.float64)
    if not active:
        return change
    elements, tilted = as_index(active, problem.device), Tilted(problem, solution.point, solution.slack, tilt)
    if len(active) < problem.batch_size:
        tilted, near = tilted.select(elements), None if near is None else near.select(elements)
    tilted = tilted.with_far_constraints_near()
    units = tilted.problem.units
    located = known_point(tilted, units, method.rho)
    answers = Answers.none_yet(located, with_rho=bool(method.rho))
    plain = units.plain(len(active)).to(problem.device)
    if solution.systems and method.rho == 0.0 and bool(plain.any()):
        near = None if near is None else units.point_in(tilted.problem, near)
        whole_batches.by_kept_systems(answers, plain, solution, tilt, elements, near)
    if is_batchable(located.problem, method.rho):
        among = plain if method.rho else torch.ones_like(plain)
        whole_batches.by_dense_factor(answers, among, method.rho)
    if method.rho == 0.0 and problem.device.type == "cpu":
        if has_dense_rows(problem.structure):
            whole_batches.by_factors(answers)
            whole_batches.in_faces(answers, executor)
        whole_batches.in_units_of_cones(answers, tilted, units)
    remaining = elements_where(answers.open)
    if remaining:
        quick = executor is None and is_quick(problem.structure, len(remaining))
        one_by_one(answers, remaining, SerialExecutor() if quick else executor)
    for whole, values in zip(change, units.point_out(tilted.problem, answers.change), strict=True):
        whole[elements] = values
    answers.findings.record(method, active, info)
    return change


def in_data(solution: ConicSolution, change: ConicPoint) -> ConicData:
    """What a change of the solutions is worth in the data; elements without a solution get zero."""
    problem, (x, y, z) = solution.problem, solution.point
    if solution.failed:
        usable = solution.usable[:, None]
        x, y = (torch.where(usable, values, 0.0) for values in (x, y))
    d_lower = d_upper = change.z
    if problem.structure.has_bounds:
        d_upper = torch.where(z > 0, -change.z, 0.0)
        d_lower = torch.where(z < 0, -change.z, 0.0)
    return problem.bilinear_gradient(change.x, change.y, x, y, d_lower, d_upper)
