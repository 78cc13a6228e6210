"""Implicit differentiation of conic programs one element at a time: kinks, and systems that are singular."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, IntArray, as_index, flags, from_numpy, random_direction
from lpgd.execution.tasks import run_tasks
from lpgd.gradients.implicit.answers import Answers
from lpgd.gradients.implicit.complementary import away_from_kinks
from lpgd.gradients.implicit.findings import SAME
from lpgd.gradients.implicit.located import Located
from lpgd.gradients.implicit.multipliers import other_multipliers
from lpgd.problems.conic.elements import ElementView
from lpgd.problems.conic.observed import Observed
from lpgd.problems.conic.structure import ConicPoint, ConicStructure, per_element
from lpgd.solvers.kkt.reduced import held
from lpgd.solvers.kkt.refinement import complementary
from lpgd.solvers.kkt.system import KKTPoints, KKTResponse, Known, Tilt, respond

__all__ = ["one_by_one"]

STEADY = 1e-5
"""Answers with other multipliers that differ by a smaller share are one."""
NOTHING = 1e-7
"""Changes of x by a smaller multiple of the tilt, in units of order 1, are none."""


class _Task(NamedTuple):
    structure: ConicStructure
    rho: FloatArray | float
    P: FloatArray
    A: FloatArray
    points: KKTPoints
    known: Known
    probes: list[Tilt]


def _respond(task: _Task) -> KKTResponse:
    return respond(*task)


def responses(
    located: Located,
    elements: Sequence[int],
    side: float,
    executor: Executor | None,
    probes: Sequence[ConicPoint] = (),
) -> KKTResponse:
    """The responses of some elements, increasing, with what is at a kink brought to one side.

    ``probes`` are other tilts, of which only whether there is such a change is asked.
    """
    problem, point, slack = located.problem, located.point, located.slack
    if side:
        v, xi = point.y - slack + side * located.v_side, point.x + point.z + side * located.xi_side
        moved = ConicPoint(xi, torch.where(v.isnan(), 0.0, v), torch.zeros_like(xi))
        # ξ and v as a point whose complementary one is meant.
        point, slack, *_ = complementary(problem, moved, torch.zeros_like(v))
    view = ElementView(problem)
    lower, upper = problem.full_bounds()
    tensors = (*point, slack, *located.tilt, lower, upper)
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors]
    error = located.error.cpu().numpy()
    others = [[tensor.detach().cpu().numpy() for tensor in probe] for probe in probes]
    tasks, order = [], []
    for chunk in view.groups(list(elements), executor, per_worker=1):
        matrices = (view.rows(name, chunk) for name in ("P", "A"))
        P, A = (np.broadcast_to(matrix, (len(chunk), matrix.shape[1])) for matrix in matrices)
        points = KKTPoints(*(array[chunk] for array in arrays))
        rho = located.rho[chunk] if isinstance(located.rho, np.ndarray) else located.rho
        known = Known(error[chunk], located.lipschitz[chunk])
        tilts = [Tilt(*(array[chunk] for array in probe)) for probe in others]
        tasks.append(_Task(problem.structure, rho, P, A, points, known, tilts))
        order += chunk
    results = run_tasks(_respond, tasks, executor)
    back = np.argsort(order)  # elements are increasing
    return KKTResponse.joined(results).select(back)


def one_by_one(answers: Answers, elements: list[int], executor: Executor | None, *, lead: bool = True) -> None:
    """Write the response of some elements, and what there is to say about each.

    Where the sides of a kink differ, the element is led away from it if it can be, unless not to ``lead``.
    """
    located, findings = answers.located, answers.findings
    weak = flags(located.weak)
    kinked = [element for element in elements if weak[element]]
    sides = [_judged(located, kinked, side, executor) for side in (1.0, -1.0)] if kinked else []
    if kinked and lead and not np.any(located.rho):
        differ = _differences(located, kinked, sides)
        there, led = away_from_kinks(located, [kinked[k] for k in np.flatnonzero(differ.somehow)])
        if led:
            one_by_one(replace(answers, located=there), led, executor, lead=False)
            sides = [side.select(np.array([element not in led for element in kinked])) for side in sides]
            elements, kinked = ([one for one in some if one not in led] for some in (elements, kinked))
            if not elements:
                return
    if kinked:
        found = _between(located, elements, [k for k, element in enumerate(elements) if weak[element]], sides, executor)
        found = _at_kinks(answers, elements, kinked, sides, found)
    else:
        found = _judged(located, elements, 0.0, executor)
    response = found.response
    curved = [
        k
        for k in range(len(elements))
        if response.unique[k] and not response.exact[k] and findings.is_curved(response.shared[k])
    ]
    if curved:
        concerned = [findings.concerns(elements[k], response.shared[k]) for k in curved]
        findings.steady |= _steady(located, [elements[k] for k in curved], response.x[curved], concerned, executor)
    for whole, values in zip(answers.change, response[:3], strict=True):
        whole[elements] = from_numpy(values).to(whole.device)
    findings.add(elements, response, found.rows, found.bounds)


def _at_kinks(
    answers: Answers, elements: list[int], kinked: list[int], sides: list[_Judged], found: _Judged
) -> _Judged:
    """What was found at the points themselves, with the exact answer of a side where there is none; says what differs.

    Args:
        answers: get what there is to say.
        elements, found: of which so much is known.
        kinked, sides: those of them at a kink, and their answers on both sides.
    """
    (above, below), differ, findings = sides, _differences(answers.located, kinked, sides), answers.findings
    found = found.copy()
    for index, element in enumerate(kinked):
        shared = bool((above.response.shared[index] | below.response.shared[index]).any())
        findings.kink(
            element,
            float(differ.x[index]),
            shared or bool(differ.y[index]),
            rows=bool(differ.observed[index]) or not (above.rows[index] and below.rows[index]),
            bounds=bool(differ.z[index]) or not (above.bounds[index] and below.bounds[index]),
        )
        responses_of_sides = above.response, below.response
        if not all(side.unique[index] for side in responses_of_sides):
            findings.freed.add(element)
        elif not all(side.consistent[index] for side in responses_of_sides):
            findings.torn.add(element)
        better, k = next((side for side in responses_of_sides if side.exact[index]), None), elements.index(element)
        if better is not None and not found.response.exact[k]:
            found.rows[k] = found.bounds[k] = True
            for whole, values in zip(found.response, better, strict=True):
                whole[k] = values[index]
    return found


def _between(
    located: Located,
    elements: list[int],
    at_kink: list[int],
    sides: list[_Judged],
    executor: Executor | None,
) -> _Judged:
    """The responses at the points themselves, of which some are those of one side, which are known.

    Args:
        located, elements, executor: of :func:`one_by_one`.
        at_kink: which of the elements are at a kink.
        sides: the responses of these.
    """
    known: dict[int, tuple[int, int]] = {}
    if located.problem.structure.cones.is_polyhedral:
        own, *others = (_pieces(located, side) for side in (0.0, 1.0, -1.0))
        for index, k in enumerate(at_kink):
            same = [side for side, other in enumerate(others) if (own[elements[k]] == other[elements[k]]).all()]
            if same:
                known[k] = same[0], index
    unknown = [k for k in range(len(elements)) if k not in known]
    parts, order = list[_Judged](), list(unknown)
    if unknown:
        parts.append(_judged(located, [elements[k] for k in unknown], 0.0, executor))
    for side in (0, 1):
        of_side = [k for k, (where, _) in known.items() if where == side]
        if of_side:
            taken = np.array([known[k][1] for k in of_side])
            parts.append(sides[side].select(taken))
            order += of_side
    return _Judged(
        KKTResponse.joined([part.response for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.bounds for part in parts]),
    ).select(np.argsort(order))


def _pieces(located: Located, side: float) -> BoolArray:
    """(E, m + n) which rows are active, and which variables at a bound, of linear and quadratic programs."""
    problem, (x, y, z) = located.problem, located.point
    active = (y - located.slack + side * located.v_side >= 0).cpu().numpy()
    active[:, : problem.structure.cones.zero] = True
    lower, upper = problem.full_bounds()
    if side:
        xi = x + z + side * located.xi_side
        x = torch.minimum(torch.maximum(xi, lower), upper)
        z = xi - x
    at_bound = held(*(tensor.cpu().numpy() for tensor in (x, z, lower, upper)))
    return np.concatenate([active, at_bound], axis=1)


class _Judged(NamedTuple):
    """The responses of k elements, ``unique`` where what is observed of x is.

    Attributes:
        response: of each.
        rows, bounds: (k,) whether the changes of multipliers that gradients depend on are unique.
    """

    response: KKTResponse
    rows: BoolArray
    bounds: BoolArray

    def select(self, elements: IntArray | BoolArray) -> _Judged:
        """Those of some elements."""
        return _Judged(self.response.select(elements), self.rows[elements], self.bounds[elements])

    def copy(self) -> _Judged:
        """The same, to be changed."""
        return _Judged(self.response.copy(), self.rows.copy(), self.bounds.copy())


def _judged(located: Located, elements: list[int], side: float, executor: Executor | None) -> _Judged:
    """Responses that are ``unique`` where what is observed of x is, and whether what is observed of multipliers is.

    A function ``r·x`` of the answers of a symmetric system ``K a = b`` is the same for all of them exactly where r is
    orthogonal to K's null space, and ``K a = r`` has a solution.  The multipliers of bounds are such functions too,
    ``dz = -(g + P dx + Aᵀ dy)`` of the variables that they hold.
    """
    observed = located.problem.structure.observed
    if len(elements) < located.problem.batch_size:
        located = located.select(as_index(elements, located.error.device))
    probes = [_of_bounds(located, side)]
    if observed is not None:
        probes += [_of_x(located, observed), _of_y(located, observed)]
    found = responses(located, range(len(elements)), side, executor, probes)
    alone = np.array([not rows.any() for rows in found.shared])
    rows, bounds = alone, alone.copy()
    if found.exact.all():
        return _Judged(found, rows, bounds)
    found = found.copy()
    if observed is not None:
        of_x, of_y = found.follows[:, 1], found.follows[:, 2]
        found.unique[:] |= ~found.exact & of_x
        rows |= ~(found.shared & observed.rows_at(located.point.x).cpu().numpy()).any(1)
        rows |= found.unique & ~found.exact & of_y
    bounds |= found.unique & ~found.exact & found.follows[:, 0]
    return _Judged(found, rows, bounds)


def _of_x(located: Located, observed: Observed) -> ConicPoint:
    probe = observed.probe_of_x(located.point.y, located.unit.x) * _involved(located)
    return ConicPoint(probe, torch.zeros_like(located.point.y), torch.zeros_like(probe))


def _of_y(located: Located, observed: Observed) -> ConicPoint:
    nothing = torch.zeros_like(located.point.x)
    return ConicPoint(nothing, observed.probe_of_y(located.point.x, located.unit.y), nothing)


def _of_bounds(located: Located, side: float) -> ConicPoint:
    problem, xi = located.problem, located.point.x + located.point.z + side * located.xi_side
    lower, upper = problem.full_bounds()
    weights = from_numpy(random_direction(problem.structure.n).copy()).to(xi)
    forces = ((xi >= upper) | (xi <= lower)).to(xi.dtype) * weights
    structure, data = problem.structure, problem.data
    if structure.observed is not None:
        forces = forces * from_numpy(structure.observed.bounded).to(forces)
    of_x, of_y = structure.quadratic.matvec(problem.symmetric_P, forces), structure.constraint.matvec(data.A, forces)
    return ConicPoint(of_x, of_y, torch.zeros_like(xi))


def _involved(located: Located) -> Tensor:
    """(E, n) variables that have a curvature or a tilt, or stand in a row that may be active.

    Others are left where they are.
    """
    problem = located.problem
    structure, size = problem.structure, problem.batch_size
    linear = structure.cones.sections["nonnegative"]
    active = torch.ones_like(located.slack, dtype=torch.bool)
    v = located.point.y - located.slack
    active[:, linear] = v[:, linear] >= -located.v_side[:, linear].abs()
    entries = (per_element(problem.data.A, size) != 0) & active[:, from_numpy(structure.constraint.rows).to(v.device)]
    involved = located.point.x.new_zeros(size, structure.n)
    involved.index_add_(1, from_numpy(structure.constraint.columns).to(v.device), entries.to(involved.dtype))
    curved = (per_element(problem.data.P, size) != 0).to(involved.dtype)
    involved.index_add_(1, from_numpy(structure.quadratic.columns).to(v.device), curved)
    involved += (located.tilt.x != 0).to(involved.dtype)
    return involved.clamp(max=1.0)


def _steady(
    located: Located,
    elements: list[int],
    dx: FloatArray,
    with_constraints: list[bool],
    executor: Executor | None,
) -> set[int]:
    """The elements of which x moves alike, by dx (k, n), with other multipliers of the same solution.

    ``with_constraints`` says of which gradients of the constraints themselves may be asked for: where planes share
    multipliers with curved ones those depend on more than x.
    """
    chosen = located.select(as_index(elements, located.error.device))
    structure, (x, y, z), slack = chosen.problem.structure, chosen.point, chosen.slack
    entries = per_element(chosen.problem.data.A.detach(), len(elements)).cpu().numpy()
    lower, upper = chosen.problem.full_bounds()
    at_bound = held(*(tensor.cpu().numpy() for tensor in (x, z, lower, upper)))
    ends: list[FloatArray] = []
    of_element: list[int] = []
    for k, concerned in enumerate(with_constraints):
        A = structure.constraint.dense_matrices(entries[k : k + 1])[0][:, ~at_bound[k]]
        others, coupled = other_multipliers(structure.cones, A, y[k].cpu().numpy(), slack[k].cpu().numpy())
        if not (coupled and concerned):
            ends += others
            of_element += [k] * len(others)
    if not ends:
        return set()
    index = as_index(of_element, located.error.device)
    moved = chosen.select(index)
    moved = moved._replace(point=moved.point._replace(y=from_numpy(np.stack(ends)).to(y)))
    again = responses(moved, range(len(ends)), 0.0, executor).x
    before, least = dx[of_element], _no_change(chosen)[of_element]
    largest = np.maximum(np.abs(before).max(1, initial=0.0), np.abs(again).max(1, initial=0.0))
    differ = np.abs(again - before).max(1, initial=0.0) > STEADY * np.maximum(largest, least)
    torn = {k for k, apart in zip(of_element, differ, strict=True) if apart}
    return {elements[k] for k in set(of_element) - torn}


def _no_change(located: Located) -> FloatArray:
    """(E,) changes of x that are smaller are none."""
    tilt = located.tilt.x.abs().amax(-1) if located.tilt.x.shape[1] else located.error
    return np.maximum(NOTHING * tilt.cpu().numpy(), 1e-300)


class _Differences(NamedTuple):
    """By how much two answers of k elements differ.

    Attributes:
        x: (k,) relative, of what is observed of x.
        y, z: (k,) whether any multipliers of rows, or of bounds, do.
        observed: (k,) whether what is observed of y does.
    """

    x: FloatArray
    y: BoolArray
    z: BoolArray
    observed: BoolArray

    @property
    def somehow(self) -> BoolArray:
        """(k,) whether anything does that may be asked for."""
        return (self.x > SAME) | self.observed | self.z


def _differences(located: Located, elements: list[int], sides: list[_Judged]) -> _Differences:
    (first, *_), (second, *_) = sides
    observed, index = located.problem.structure.observed, as_index(elements, located.error.device)
    least = _no_change(located)[elements]
    xs, ys = (first.x, second.x), (first.y, second.y)
    size = np.maximum(*(np.abs(y).max(1, initial=0.0) for y in ys))
    apart = np.abs(ys[0] - ys[1]) > SAME * np.maximum(size, 1e-300)[:, None]
    differ = apart.any(1)
    pushes = np.maximum(np.abs(first.z).max(1, initial=0.0), size)
    moved = np.abs(first.z - second.z) * (1.0 if observed is None else observed.bounded)
    bounds_differ = (moved > SAME * np.maximum(pushes, 1e-300)[:, None]).any(1)
    observed_differ = differ
    if observed is not None:
        # How CVXPY's own variables move is nobody's gradient: a loose epigraph is always at a kink.
        unit, x, y = located.unit.select(index), located.point.x[index].cpu(), located.point.y[index].cpu()
        xs = [observed.in_x(from_numpy(change), y, unit.x.cpu()).numpy() for change in xs]
        ys = [observed.in_y(from_numpy(change), x, unit.y.cpu()).numpy() for change in ys]
        observed_differ = (np.abs(ys[0] - ys[1]) > SAME * np.maximum(size, 1e-300)[:, None]).any(1)
    largest = np.maximum(*(np.abs(x).max(1, initial=0.0) for x in xs))
    return _Differences(
        np.abs(xs[0] - xs[1]).max(1, initial=0.0) / np.maximum(largest, least), differ, bounds_differ, observed_differ
    )
