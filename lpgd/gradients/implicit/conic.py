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

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, as_index, elements_where, flags, from_numpy, rows_where
from lpgd.execution.tasks import SerialExecutor, run_tasks, split
from lpgd.execution.threads import bounded_blas
from lpgd.gradients.base import GradientInfo
from lpgd.gradients.implicit.cone_units import units_of_cones
from lpgd.gradients.implicit.findings import Findings
from lpgd.gradients.implicit.located import Located, known_point
from lpgd.gradients.implicit.one_by_one import one_by_one
from lpgd.gradients.implicit.regular import regular_response
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.nearer import nearer
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicPoint
from lpgd.problems.conic.units import Units
from lpgd.solvers.interior_point.derivative import is_batchable, kept_response, polyhedral_response
from lpgd.solvers.kkt.faces import FaceTask, respond_in_faces
from lpgd.solvers.kkt.mixed import MixedSystem, Part
from lpgd.solvers.kkt.newton import KeptFactor
from lpgd.solvers.kkt.points import Points
from lpgd.solvers.kkt.rank import DOUBT, ROUNDING
from lpgd.solvers.kkt.reduced import has_dense_rows, held
from lpgd.solvers.kkt.schur import System
from lpgd.solvers.kkt.system import KKTResponse, Known, is_quick

if TYPE_CHECKING:
    from lpgd.gradients.implicit.method import ImplicitKKT

__all__ = ["in_data", "response"]

STEPS, BOUND = 10.0, 0.1
"""A point is so many times its last step from the solution at most; where the error of a response that follows is below
the second share, its system is regular."""


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
    elements = as_index(active, problem.device)
    chosen_problem, point, slack, chosen_tilt = problem, solution.point, solution.slack, tilt
    if len(active) < problem.batch_size:
        chosen_problem, point, slack = problem.select(elements), point.select(elements), slack[elements]
        chosen_tilt = tilt.select(elements)
        near = None if near is None else near.select(elements)
    if (moved := nearer(chosen_problem, point, slack)) is not None:
        chosen_problem, point, slack = moved.problem, moved.point, moved.slack
    units = chosen_problem.units
    located = known_point(chosen_problem, units, point, slack, chosen_tilt)
    near = None if near is None else units.point_in(chosen_problem, near)
    rho = _curvature(method.rho, chosen_problem, units)
    answer = ConicPoint(*(torch.zeros_like(tensor) for tensor in located.point))
    left = ~located.weak
    findings = Findings(len(active), bool(method.rho), chosen_problem.structure, located.point.x)
    plain = units.plain(len(active)).to(left.device)
    if solution.systems and method.rho == 0.0 and bool(plain.any()):
        apart, left = left & ~plain, left & plain
        _by_kept_systems(solution, located, tilt, elements, left, answer, findings, near)
        left |= apart
    if is_batchable(located.problem, method.rho):
        chosen = left.clone() if method.rho == 0.0 else left & plain
        if bool(chosen.any()):
            left &= ~chosen
            _at_once(located, chosen, method.rho, answer)
            left |= chosen
    if (
        method.rho == 0.0
        and left.device.type == "cpu"
        and has_dense_rows(chosen_problem.structure)
        and bool(left.any())
    ):
        _by_factors(located, left, answer, findings)
        _in_faces(located, left, answer, findings, executor)
    remaining = elements_where(located.weak | left)
    if remaining and method.rho == 0.0 and located.weak.device.type == "cpu":
        index = as_index(remaining, problem.device)
        solved = _in_units_of_cones(
            chosen_problem.select(index),
            ConicPoint(*(tensor[index] for tensor in point)),
            slack[index],
            chosen_tilt.select(index),
            units.select(index),
            located.select(index),
            index,
            answer,
            findings,
        )
        remaining = [element for element, is_solved in zip(remaining, flags(solved), strict=True) if not is_solved]
    if remaining:
        if executor is None and is_quick(chosen_problem.structure, len(remaining)):
            executor = SerialExecutor()
        one_by_one(located, remaining, rho, answer, findings, executor)
    for whole, values in zip(change, units.point_out(chosen_problem, answer), strict=True):
        whole[elements] = values
    findings.record(method, active, info)
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


def _curvature(rho: float, problem: ConicProblem, units: Units) -> FloatArray | float:
    """ρ in these units: ``σ β² D² ρ`` for each variable of each element."""
    if rho == 0.0 or units.is_trivial:
        return rho
    # A tilt by ρ dx for dx = β D.
    return (rho * units.tilt_in(problem, units.ones_out(problem)).x).cpu().numpy()


# -- whole batches ------------------------------------------------------------------------------------------------


def _by_kept_systems(
    solution: ConicSolution,
    located: Located,
    tilt: ConicPoint,
    elements: Tensor,
    left: Tensor,
    answer: ConicPoint,
    findings: Findings,
    near: ConicPoint | None,
) -> None:
    """Write the response of elements whose systems the solver, or refinement, has left; those are left no more."""
    place = torch.full((solution.batch_size,), -1, dtype=torch.int64, device=elements.device)
    place[elements] = torch.arange(elements.shape[0], device=elements.device)
    parts: list[Part] = []
    for kept in solution.systems:
        position = place[kept.elements]
        wanted = kept.valid & (position >= 0) & left[position.clamp(min=0)]
        if not bool(wanted.any()):
            continue
        if isinstance(kept, KeptFactor):
            parts.append(Part(position[wanted], kept.factored, None if bool(wanted.all()) else rows_where(wanted)))
            continue
        response, exact = kept_response(solution.problem, solution.point, tilt, kept)
        exact = exact & wanted
        for whole, values in zip(answer, response, strict=True):
            whole[position[exact]] = values[exact]
        left[position[exact]] = False
    if not parts:
        return
    chosen = torch.cat([part.elements for part in parts]).sort().values
    parts = [part._replace(elements=torch.searchsorted(chosen, part.elements)) for part in parts]
    system = MixedSystem(parts, chosen.shape[0])
    response, exact, doubt = _by_system(system, located.select(chosen), None if near is None else near.select(chosen))
    for whole, values in zip(answer, response, strict=True):
        whole[chosen[exact]] = values[exact]
    left[chosen[exact]] = False
    findings.doubt[chosen[exact].numpy()] = doubt[exact.numpy()]


def _by_factors(located: Located, left: Tensor, answer: ConicPoint, findings: Findings) -> None:
    """The same by systems that are factorised now, at the points themselves."""
    points = Points(located.problem)
    elements = rows_where(left & ~points.plainly_singular(*points.start(located.point, located.slack)))
    if not elements.shape[0]:
        return
    chosen = located.select(elements)
    points = points.select(elements)
    response, exact, doubt = _by_system(points.factored(*points.start(chosen.point, chosen.slack)), chosen)
    solved = elements[exact]
    for whole, values in zip(answer, response, strict=True):
        whole[solved] = values[exact]
    left[solved] = False
    findings.doubt[solved.numpy()] = doubt[exact.numpy()]


def _in_units_of_cones(
    problem: ConicProblem,
    point: ConicPoint,
    slack: Tensor,
    tilt: ConicPoint,
    units: Units,
    located: Located,
    elements: Tensor,
    answer: ConicPoint,
    findings: Findings,
) -> Tensor:
    """The same of elements whose cones ask for units of their own; (E,) those that are solved in them.

    What is left of the optimality conditions there bounds the error; where the bound is too large, the next point of
    Newton's method, which is as good as this one, shows what such an error does.
    """
    solved = torch.zeros(elements.shape[0], dtype=torch.bool)
    other = units_of_cones(problem, units, located)
    if other is None:
        return solved
    there = known_point(problem, other, point, slack, tilt, well=0.0)
    index = rows_where(~there.weak)
    if not index.shape[0]:
        return solved
    chosen = there.select(index)
    points = Points(chosen.problem)
    xi, v = points.start(chosen.point, chosen.slack)
    system = points.factored(xi, v)
    response, exact, doubt = _by_system(system, chosen)
    vague = from_numpy(system.regular & (doubt >= DOUBT))
    if bool(vague.any()):
        d_xi, d_v = points.chord(system, *points.residual(xi, v)[1:])
        step = torch.maximum(maximum_norm(d_xi), maximum_norm(d_v)).numpy()
        with np.errstate(invalid="ignore"):
            vague &= from_numpy(chosen.lipschitz * STEPS * step * system.inverse < BOUND)
        moved, moved_slack = points.point(xi + d_xi, v + d_v)
        after = chosen._replace(point=moved, slack=moved_slack)
        second, _, _ = _by_system(points.factored(xi + d_xi, v + d_v), after)
        difference = torch.stack([_share(one, two) for one, two in zip(response, second, strict=True)]).amax(0).numpy()
        doubt = np.where(vague.numpy(), difference, doubt)
        exact |= vague & from_numpy(difference < DOUBT)
    whole = ConicPoint(*(torch.zeros_like(tensor) for tensor in there.point))
    for target, values in zip(whole, response, strict=True):
        target[index] = values
    solved[index] = exact
    back = units.point_in(problem, other.point_out(problem, whole))
    for target, values in zip(answer, back, strict=True):
        target[elements[solved]] = values[solved]
    findings.doubt[elements[solved].numpy()] = doubt[exact.numpy()]
    return solved


def _share(one: Tensor, other: Tensor) -> Tensor:
    """(E,) how far two answers are from each other, relative to the first; NaN where they are not finite."""
    return maximum_norm(one - other) / maximum_norm(one).clamp(min=torch.finfo(one.dtype).tiny)


def _in_faces(
    located: Located, left: Tensor, answer: ConicPoint, findings: Findings, executor: Executor | None
) -> None:
    """The same of linear programs with a shared A whose solutions are inside faces."""
    problem, structure = located.problem, located.problem.structure
    A = structure.constraint.to_dense(problem.data.A.detach()).numpy() if problem.data.A.ndim == 1 else None
    largest = np.zeros(0) if A is None else np.abs(A).max(1, initial=0.0)
    if A is None or not largest.all() or bool(problem.symmetric_P.any()):
        return
    point, tilt = located.point, located.tilt
    at_bound = held(*(tensor.numpy() for tensor in (point.x, point.z, *problem.full_bounds())))
    active = (point.y - located.slack).numpy() >= 0
    active[:, : structure.cones.zero] = True
    inside = (~at_bound).sum(1) > active.sum(1)
    elements = np.flatnonzero(left.numpy() & inside & active.any(1))
    if not elements.size:
        return
    scaled = A / largest[:, None]
    with bounded_blas():
        square = scaled @ scaled.T
    known = Known(located.error.numpy(), located.lipschitz)
    tasks = []
    for chunk in split(elements.size, executor, per_worker=1):
        few = elements[chunk]
        g_x, g_y, g_z = (direction.numpy()[few] for direction in tilt)
        tasks.append(FaceTask(A, square, at_bound[few], active[few], g_x, g_y, g_z, known.select(few)))
    results = run_tasks(respond_in_faces, tasks, executor)
    found = KKTResponse.joined([response for response, _ in results])
    solved = np.concatenate([taken for _, taken in results])
    taken = elements[solved]
    for whole, values in zip(answer, found[:3], strict=True):
        whole[from_numpy(taken)] = from_numpy(values[solved])
    left[from_numpy(taken)] = False
    told = np.array([not findings.concerns(*one) for one in zip(taken.tolist(), found.shared[solved], strict=True)])
    findings.add(taken.tolist(), found.select(solved), told, told)


def _by_system(
    system: System, located: Located, near: ConicPoint | None = None
) -> tuple[ConicPoint, Tensor, FloatArray]:
    """The response by systems at the points or near them, for which elements it is exact, and its doubt."""
    points = Points(located.problem)
    response, exact = points.response(system, *points.start(located.point, located.slack), located.tilt, near)
    with np.errstate(invalid="ignore"):  # of singular systems: NaN, which is no small doubt
        error = located.lipschitz * system.inverse * located.error.numpy()
        doubt = ROUNDING * system.condition + system.inverse * error
    return response, exact & from_numpy(system.regular & (doubt < DOUBT)), doubt


def _at_once(located: Located, left: Tensor, rho: float, answer: ConicPoint) -> None:
    """The same by one factorisation for all."""
    elements = rows_where(left)
    problem, point, slack, tilt = located[:4]
    if elements.shape[0] < problem.batch_size:
        problem, point = problem.select(elements), point.select(elements)
        slack, tilt = slack[elements], tilt.select(elements)
    response, exact = polyhedral_response(problem, point, slack, tilt, rho)
    for whole, values in zip(answer, response, strict=True):
        whole[elements[exact]] = values[exact]
    left[elements[exact]] = False
