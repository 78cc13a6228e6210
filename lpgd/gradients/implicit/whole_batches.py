"""Ways to differentiate many elements of a batch of conic programs at once, away from kinks.

Each writes down the answers that it can vouch for (:meth:`Answers.take`) and leaves the other elements as they are.
"""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, from_numpy, rows_where
from lpgd.execution.tasks import run_tasks, split
from lpgd.execution.threads import bounded_blas
from lpgd.gradients.implicit.answers import Answers
from lpgd.gradients.implicit.cone_units import units_of_cones
from lpgd.gradients.implicit.located import Located, Tilted, known_point
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.problems.conic.units import Units
from lpgd.solvers.interior_point.derivative import kept_response, polyhedral_response
from lpgd.solvers.kkt.faces import FaceTask, respond_in_faces
from lpgd.solvers.kkt.mixed import MixedSystem, Part
from lpgd.solvers.kkt.newton import KeptFactor
from lpgd.solvers.kkt.points import Points
from lpgd.solvers.kkt.rank import DOUBT, ROUNDING
from lpgd.solvers.kkt.reduced import held
from lpgd.solvers.kkt.schur import System
from lpgd.solvers.kkt.system import KKTResponse, Known

__all__ = ["by_dense_factor", "by_factors", "by_kept_systems", "in_faces", "in_units_of_cones"]

STEPS, BOUND = 10.0, 0.1
"""A point is so many times its last step from the solution at most; where the error of a response that follows is below
the second share, its system is regular."""


def by_kept_systems(
    answers: Answers,
    among: Tensor,
    solution: ConicSolution,
    tilt: ConicPoint,
    elements: Tensor,
    near: ConicPoint | None,
) -> None:
    """By the systems that the solver, or refinement, has left.

    Args:
        answers: of E elements.
        among: (E,) of which those that are left are asked about: their units are 1.
        solution, tilt: of B elements.
        elements: (E,) which of these they are.
        near: a difference that the answers are to be compared with: :meth:`Points.response`.
    """
    place = torch.full((solution.batch_size,), -1, dtype=torch.int64, device=elements.device)
    place[elements] = torch.arange(elements.shape[0], device=elements.device)
    parts: list[Part] = []
    for kept in solution.systems:
        position = place[kept.elements]
        wanted = kept.valid & (position >= 0) & (answers.left & among)[position.clamp(min=0)]
        if not bool(wanted.any()):
            continue
        if isinstance(kept, KeptFactor):
            parts.append(Part(position[wanted], kept.factored, None if bool(wanted.all()) else rows_where(wanted)))
            continue
        response, exact = kept_response(solution.problem, solution.point, tilt, kept)
        answers.take(position, response, exact & wanted)
    if not parts:
        return
    chosen = torch.cat([part.elements for part in parts]).sort().values
    parts = [part._replace(elements=torch.searchsorted(chosen, part.elements)) for part in parts]
    system, near = MixedSystem(parts, chosen.shape[0]), None if near is None else near.select(chosen)
    answers.take(chosen, *_by_system(system, answers.located.select(chosen), near))


def by_dense_factor(answers: Answers, among: Tensor, rho: float) -> None:
    """Of linear and quadratic programs by one factorisation of dense matrices for all.

    Args:
        answers: of E elements.
        among: (E,) of which those that are left are asked about.
        rho: ρ ≥ 0 in their units.
    """
    elements = rows_where(answers.left & among)
    if not elements.shape[0]:
        return
    problem, point, slack, tilt = answers.located[:4]
    if elements.shape[0] < problem.batch_size:
        problem, point = problem.select(elements), point.select(elements)
        slack, tilt = slack[elements], tilt.select(elements)
    answers.take(elements, *polyhedral_response(problem, point, slack, tilt, rho))


def by_factors(answers: Answers) -> None:
    """By systems that are factorised now, at the points themselves."""
    located, left = answers.located, answers.left
    if not bool(left.any()):
        return
    points = Points(located.problem)
    elements = rows_where(left & ~points.plainly_singular(*points.start(located.point, located.slack)))
    if not elements.shape[0]:
        return
    chosen = located.select(elements)
    points = points.select(elements)
    answers.take(elements, *_by_system(points.factored(*points.start(chosen.point, chosen.slack)), chosen))


def in_faces(answers: Answers, executor: Executor | None) -> None:
    """Of linear programs with a shared A whose solutions are inside faces."""
    located, left = answers.located, answers.left
    problem, structure = located.problem, located.problem.structure
    if problem.data.A.ndim > 1 or not bool(left.any()):
        return
    A = structure.constraint.to_dense(problem.data.A.detach()).numpy()
    largest = np.abs(A).max(1, initial=0.0)
    if not largest.all() or bool(problem.symmetric_P.any()):
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
    change = ConicPoint(*(from_numpy(values) for values in found[:3]))
    answers.take(from_numpy(elements), change, from_numpy(solved))
    findings, taken = answers.findings, elements[solved].tolist()
    told = np.array([not findings.concerns(*one) for one in zip(taken, found.shared[solved], strict=True)])
    findings.add(taken, found.select(solved), told, told)


def in_units_of_cones(answers: Answers, tilted: Tilted, units: Units) -> None:
    """Of elements whose cones ask for units of their own, also of those that are at a kink in others.

    What is left of the optimality conditions there bounds the error; where the bound is too large, the next point of
    Newton's method, which is as good as this one, shows what such an error does.

    Args:
        answers: of E elements.
        tilted: their solutions in the problem's own units.
        units: that the answers are in.
    """
    elements = rows_where(answers.open)
    if not elements.shape[0]:
        return
    tilted, units = tilted.select(elements), units.select(elements)
    asked = units_of_cones(tilted.problem, units, answers.located.select(elements))
    if asked is None:
        return
    other, concerned = asked
    there = known_point(tilted, other, well=0.0)
    index = rows_where(~there.weak & concerned)  # the others go the way that they go alone
    if not index.shape[0]:
        return
    found, exact, doubt = _by_newton_points(there.select(index))
    whole = ConicPoint(*(torch.zeros_like(tensor) for tensor in there.point))
    for target, values in zip(whole, found, strict=True):
        target[index] = values
    back = units.point_in(tilted.problem, other.point_out(tilted.problem, whole))
    answers.take(elements[index], back.select(index), exact, doubt)


def _by_newton_points(located: Located) -> tuple[ConicPoint, Tensor, FloatArray]:
    """As :func:`_by_system`; answers in doubt are compared with those at the next points of Newton's method."""
    points = Points(located.problem)
    xi, v = points.start(located.point, located.slack)
    system = points.factored(xi, v)
    response, exact, doubt = _by_system(system, located)
    vague = from_numpy(system.regular & (doubt >= DOUBT))
    if not bool(vague.any()):
        return response, exact, doubt
    d_xi, d_v = points.chord(system, *points.residual(xi, v)[1:])
    step = torch.maximum(maximum_norm(d_xi), maximum_norm(d_v)).numpy()
    with np.errstate(invalid="ignore"):
        vague &= from_numpy(located.lipschitz * STEPS * step * system.inverse < BOUND)
    moved, moved_slack = points.point(xi + d_xi, v + d_v)
    after = located._replace(point=moved, slack=moved_slack)
    second, _, _ = _by_system(points.factored(xi + d_xi, v + d_v), after)
    difference = torch.stack([_share(one, two) for one, two in zip(response, second, strict=True)]).amax(0).numpy()
    exact |= vague & from_numpy(difference < DOUBT)
    return response, exact, np.where(vague.numpy(), difference, doubt)


def _share(one: Tensor, other: Tensor) -> Tensor:
    """(E,) how far two answers are from each other, relative to the first; NaN where they are not finite."""
    return maximum_norm(one - other) / maximum_norm(one).clamp(min=torch.finfo(one.dtype).tiny)


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
