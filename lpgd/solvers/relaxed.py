"""Solves the closest feasible problems of elements that have no solution; :mod:`lpgd.problems.conic.relaxed` has them.

A solver is asked where the weight w of the objective is large enough for it; from there Newton's method follows the
solution to smaller weights, with the method of multipliers on the way.  Where other constraints become active, which
Newton's method may not find, the solver is asked again.
"""

from __future__ import annotations

import logging
from concurrent.futures import Executor
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, from_numpy, integers, rows_where
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.relaxed import RelaxedSolution, RelaxedStructure, relaxed_structure
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver, ConicSolver
from lpgd.solvers.choose import choose_solver
from lpgd.solvers.kkt.refinement import refine
from lpgd.status import Status, warn

__all__ = ["RELAXED", "relax", "solver_of_relaxed"]

_log = logging.getLogger("lpgd")
FIRST = 1e-3
"""The share of the objective at which the solver is asked."""
POLYHEDRAL, CURVED = (1e-4, 1e-5, 1e-6), (1e-4, 1e-5)
"""The shares that Newton's method goes on to; at curved cones rounding, times curvature over the square, takes over."""
KNOWN, ROUNDING = 1e-9, 1e-14
"""What may be left of the optimality conditions there, relative to the share; rounding."""
STEPS = 8
"""Newton's steps for each share."""
TOLERANCE = 1e-10
"""Asked of the solver: what is left of it counts by its share of the objective."""
RELAXED = (Status.INFEASIBLE, Status.NUMERICAL_ERROR)
"""Elements that end so are tried; numerical errors, as those whose constraints are barely infeasible end so."""
_CONIC_ONLY = "on_error='relax' is for conic programs without integer variables; use 'nan' or 'warn'."


def solver_of_relaxed(solver: ConicSolver, structure: RelaxedStructure) -> ConicSolver:
    """The same solver where it takes the program with violations, else the one that is chosen for it."""
    if solver.unsupported(structure.structure) is None:
        return solver
    return choose_solver(structure.structure, None, {"verbose": solver.verbose})


def relax(solution: AnySolution, solver: AnySolver, executor: Executor | None) -> RelaxedSolution:
    """The solution with those of closest feasible problems in place of failures that have one.

    Elements that are unbounded even so, or hold no numbers, stay what they are.

    Raises:
        TypeError: the problem is no conic program, or has integer variables.
    """
    if not isinstance(solution, ConicSolution) or not isinstance(solver, ConicSolver):
        raise TypeError(_CONIC_ONLY)
    problem = solution.problem
    if problem.structure.has_integers:
        raise TypeError(_CONIC_ONLY)
    structure, size = relaxed_structure(problem.structure), solution.batch_size
    blank = RelaxedSolution(
        **{field.name: getattr(solution, field.name) for field in fields(ConicSolution)},
        e=solution.x.new_zeros(size, structure.soft.size),
        place=np.full(size, -1),
        weights=solution.x.new_zeros(0),
        claims=solution.statuses,
    )
    elements = [element for element, status in enumerate(solution.statuses) if status in RELAXED]
    elements = [element for element in elements if bool(problem.finite()[element])] if elements else []
    if not elements:
        return blank
    infeasible = problem.select(as_index(elements, problem.device))
    found, weights, multipliers = _followed(structure, infeasible, solver_of_relaxed(solver, structure), executor)
    solved = rows_where(found.usable)
    if not solved.shape[0]:
        return blank
    found, weights = found.select(solved), weights[solved]
    relaxed = as_index(elements, problem.device)[solved]
    point, slack = structure.read(found.x, multipliers[solved], found.slack)
    changes: dict[str, Any] = {name: getattr(blank, name).clone() for name in ("x", "y", "z", "e", "slack", "known_to")}
    for name, value in (*point._asdict().items(), ("slack", slack), ("known_to", found.known_to)):
        changes[name][relaxed] = value
    statuses, solvers, states = list(solution.statuses), list(solution.solvers), list(solution.states)
    place = np.full(size, -1)
    for number, element in enumerate(integers(relaxed)):
        statuses[element], states[element], place[element] = Status.RELAXED, None, number
        solvers[element] = found.solvers[number]
    seconds = {name: getattr(solution, name).copy() for name in ("iterations", "setup_seconds", "solve_seconds")}
    for name, values in seconds.items():
        values[relaxed.cpu().numpy()] += getattr(found, name)
    changes |= seconds | {"statuses": tuple(statuses), "solvers": tuple(solvers), "states": tuple(states)}
    _log.info("elements %s of %d have no feasible point, and were relaxed.", integers(relaxed), size)
    return replace(blank, **changes, found=found, place=place, weights=weights)


def _followed(
    structure: RelaxedStructure, problem: ConicProblem, solver: ConicSolver, executor: Executor | None
) -> tuple[ConicSolution, Tensor, Tensor]:
    """Solutions of the programs with violations, the weights (B,) of their objectives, and multipliers y* (B, ·)."""
    count, soft = problem.batch_size, from_numpy(structure.soft).to(problem.device)
    weights = structure.weight(problem, FIRST)
    multipliers = problem.data.q.new_zeros(count, structure.soft.size)
    found = solver.with_tolerance(TOLERANCE).solve(structure.problem(problem, weights, multipliers), (), executor)
    found = replace(found, systems=(), states=(None,) * count)
    # ỹ = e* + w y* for any λ, up to O(w²): two weights tell y*.
    slope, going = torch.zeros_like(found.y), found.usable.clone()
    for share in POLYHEDRAL if structure.structure.cones.is_polyhedral else CURVED:
        least = max(KNOWN * share, ROUNDING)
        left = rows_where(going)
        if not left.shape[0]:
            break
        chosen, point = problem.select(left), found.point.select(left)
        smaller, estimate = structure.weight(chosen, share), slope[left]
        near = point._replace(y=point.y + (smaller - weights[left])[:, None] * estimate)
        program = structure.problem(chosen, smaller, estimate[:, soft])
        refined = _refined(program, near, found.slack[left])
        fine = refined.after <= least * refined.size
        lost = rows_where(~fine)
        if lost.shape[0]:  # other constraints are active at this weight
            again = _solved(program.select(lost), solver, executor)
            refined = refined.replaced(lost, again)
            fine = refined.after <= least * refined.size
        going[left[~fine]] = False
        followed, gap = left[fine], (weights[left] - smaller)[fine, None]
        slope[followed] = (point.y[fine] - refined.point.y[fine]) / gap
        weights[followed], multipliers[followed] = smaller[fine], estimate[:, soft][fine]
        changes: dict[str, Any] = {name: getattr(found, name).clone() for name in ("x", "y", "z", "slack", "known_to")}
        fresh = {**refined.point._asdict(), "slack": refined.slack, "known_to": refined.after}
        for name, value in fresh.items():
            changes[name][followed] = value[fine]
        found = replace(found, **changes)
    unknown = elements_where(found.usable & (weights >= structure.weight(problem, FIRST)))
    if unknown:
        warn(
            f"on_error='relax': the closest feasible problems of {len(unknown)} elements are known to a share of about "
            f"{FIRST:g} of their multipliers only; rescale the rows that contradict each other, or use another solver."
        )
    known = slope.any(-1, keepdim=True)
    slope = torch.where(known, slope, structure.multipliers(found.point, weights))
    return replace(found, problem=structure.problem(problem, weights, multipliers)), weights, slope


class _Refined(NamedTuple):
    """Points (B, ·) that Newton's method has found, what is left of their optimality conditions, and their sizes."""

    point: ConicPoint
    slack: Tensor
    after: Tensor
    size: Tensor

    def replaced(self, elements: Tensor, others: _Refined) -> _Refined:
        """With those of others for these elements."""
        tensors = {name: getattr(self, name).clone() for name in ("slack", "after", "size")}
        for name, tensor in tensors.items():
            tensor[elements] = getattr(others, name)
        point = self.point._make(
            tensor.index_copy(0, elements, other) for tensor, other in zip(self.point, others.point, strict=True)
        )
        return _Refined(point, **tensors)


def _solved(problem: ConicProblem, solver: ConicSolver, executor: Executor | None) -> _Refined:
    """The points that a solver finds, and what is left of their conditions after Newton's method from there."""
    found = solver.with_tolerance(TOLERANCE).solve(problem, (), executor)
    usable = found.usable[:, None]
    point = found.point._make(torch.where(usable, tensor, 0.0) for tensor in found.point)
    refined = _refined(problem, point, torch.where(usable, found.slack, 0.0))
    return refined._replace(after=torch.where(found.usable, refined.after, torch.inf))


def _refined(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> _Refined:
    units = problem.units
    near, own_slack = units.point_in(problem, point), units.slack_in(problem, slack)
    every = torch.arange(problem.batch_size, device=problem.device)
    found = refine(units.apply(problem), near, own_slack, every, steps=STEPS, rounded=0.0)
    size = found.point.largest().clamp(min=1.0)
    return _Refined(units.point_out(problem, found.point), units.slack_out(problem, found.slack), found.after, size)
