"""The rescue chain: what one solver leaves without proof goes to the next one, and who answered is on record.

A batch without such elements passes through untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, Protocol

import torch

from lpgd.arrays import as_index, elements_where, flags
from lpgd.problems.base import States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.solvers.conic.posed import VERDICTS
from lpgd.solvers.kkt.refinement import is_cheap, is_small
from lpgd.status import Status

__all__ = ["OPEN", "is_settled", "merged", "settled"]

_log = logging.getLogger("lpgd")
OPEN = (Status.INACCURATE, Status.ITERATION_LIMIT, Status.NUMERICAL_ERROR)
"""What other solvers are asked about."""
VAGUE, GAIN = 1e-12, 1e-2
"""Refined answers to linear and quadratic programs leave rounding of the optimality conditions, unless the solver was
too far from the active set.  Of small programs a second solver is asked about those that leave more, relative to the
point, and heard if it leaves a share of that."""
ASTRAY, ASKED = 1e-10, 3
"""Of larger quadratic programs whose answers are refined, those that leave more were not near the active set, and x may
be anywhere where P is ill-conditioned (at a condition of 1e6 SCS and OSQP were 10 % off, at 1e4 PIQP 6e-5 with 2e-7
left); so many solvers are asked."""
STRAY = 1e-7
"""Of programs with curved cones, those whose answers are refined and leave more are solved once more, as accurately as
an interior-point method can: its point was between two faces (a thrust of 1e-3 for one of zero, x 4e-4 off)."""


class Attempting(Protocol):
    """A solver, as far as a rescue goes."""

    def attempt(
        self, problem: ConicProblem, states: States = (), executor: Executor | None = None
    ) -> ConicSolution: ...


def is_settled(attempt: ConicSolution, refined: bool) -> bool:
    """Whether there is nothing to ask another solver about; answers that were not to be refined may be vague."""
    return attempt.statuses.count(Status.SOLVED) == attempt.batch_size and not (refined and _vague(attempt))


def _vague(solution: ConicSolution) -> list[int]:
    """Elements that are solved, and known less well than refinement makes them where it has worked."""
    problem, structure = solution.problem, solution.problem.structure
    if solution.known_to is None or not bool((solution.known_to > VAGUE).any()):
        return []
    if structure.has_integers or not structure.cones.is_polyhedral:
        vague = torch.inf if structure.has_integers or not is_cheap(structure) else STRAY
    elif is_small(structure):
        vague = VAGUE
    else:
        vague = ASTRAY if structure.quadratic.nnz and is_cheap(structure) else torch.inf
    elements = elements_where(solution.known_to > vague)
    elements = [element for element in elements if solution.statuses[element] is Status.SOLVED]
    if not elements:
        return []
    size = problem.in_own_units(solution.point).largest().clamp(min=1.0)
    return [element for element in elements if float(solution.known_to[element]) > vague * float(size[element])]


def settled(
    attempt: ConicSolution,
    others: Sequence[Attempting],
    sharpest: Sequence[Attempting] | None = None,
    executor: Executor | None = None,
    refined: bool = True,
    finest: Attempting | None = None,
) -> ConicSolution:
    """A solution in which every verdict is proven, by a certificate or by the consent of a second solver.

    Args:
        attempt: one solver's own answer (``ConicSolver.attempt``).
        others: the solvers to turn to, in order; none leaves elements as they are, but for verdicts without a proof,
            which become numerical errors.
        sharpest: the same, in the order in which they are asked about points where no verdict is in question.
        executor: where they run.
        refined: whether answers were to be refined, so that one which is known less well is asked about, too.
        finest: who is asked about those of programs with curved cones.
    """
    claims = {element: {attempt.statuses[element]} for element in _unproven(attempt)}
    sharpest = others if sharpest is None else sharpest
    for other in others if claims else sharpest:
        elements = [element for element, status in enumerate(attempt.statuses) if status in OPEN or element in claims]
        if not elements:
            break
        again = other.attempt(attempt.problem.select(as_index(elements, attempt.x.device)), (), executor)
        taken = [False] * len(elements)
        proofs, better = list(again.proofs), _is_better(attempt, elements, again)
        for place, element in enumerate(elements):
            status = again.statuses[place]
            if status in VERDICTS:
                agreed = status in claims.get(element, ())
                if not proofs[place] and agreed:
                    proofs[place] = "two solvers"
                taken[place] = bool(proofs[place])
                if not taken[place]:
                    claims.setdefault(element, set()).add(status)
            else:
                taken[place] = status in (Status.SOLVED, Status.NOT_CONVEX) or better[place]
            if taken[place]:
                claims.pop(element, None)
        for place, element in enumerate(elements):
            _log.info(
                "element %d of %d: %s left it %s; %s says %s%s.",
                element, attempt.batch_size, attempt.asked, attempt.statuses[element].name,
                again.asked, again.statuses[place].name, "" if taken[place] else ", which is not taken",
            )  # fmt: skip
        attempt = merged(attempt, elements, replace(again, proofs=tuple(proofs)), taken)
    if claims:
        statuses = list(attempt.statuses)
        for element in claims:
            if statuses[element] in VERDICTS:
                statuses[element] = Status.NUMERICAL_ERROR
        attempt = replace(attempt, statuses=tuple(statuses))
    attempt = _with_feasible_unbounded(attempt, others, executor)
    if not attempt.problem.structure.cones.is_polyhedral:
        sharpest = () if finest is None else (finest,)
    return _sharpened(attempt, sharpest, executor) if refined else attempt


def _sharpened(solution: ConicSolution, others: Sequence[Attempting], executor: Executor | None) -> ConicSolution:
    """The solution, with answers of other solvers that are known far better.

    Where multipliers are 1e-5 of the curvature, a point of residual 1e-8 may be anywhere, and who comes near enough for
    Newton's method to find the active set differs from program to program: all are asked, as such elements are few.
    """
    for other in others if is_small(solution.problem.structure) else others[:ASKED]:
        elements = _vague(solution)
        if not elements:
            break
        again = other.attempt(solution.problem.select(as_index(elements, solution.x.device)), (), executor)
        assert solution.known_to is not None
        assert again.known_to is not None
        better = flags(again.known_to < GAIN * solution.known_to[elements])
        taken = [good and status is Status.SOLVED for good, status in zip(better, again.statuses, strict=True)]
        again = replace(again, sharpened=torch.ones_like(again.known_to, dtype=torch.bool))
        solution = merged(solution, elements, again, taken)
    return solution


def _unproven(solution: ConicSolution) -> list[int]:
    return [
        element
        for element, (status, proof) in enumerate(zip(solution.statuses, solution.proofs, strict=True))
        if status in VERDICTS and not proof
    ]


def _is_better(solution: ConicSolution, elements: Sequence[int], again: ConicSolution) -> list[bool]:
    """Whether an inaccurate answer is nearer to a solution than the one that there is; any is, where there is none."""
    present = torch.where(solution.usable, solution.error, torch.inf)[list(elements)]
    return flags(again.usable & (again.error < present))


def _with_feasible_unbounded(
    solution: ConicSolution, others: Sequence[Attempting], executor: Executor | None
) -> ConicSolution:
    """The solution, with those unbounded problems INFEASIBLE that have a descending ray but no feasible point."""
    elements = [element for element, status in enumerate(solution.statuses) if status is Status.UNBOUNDED]
    if not elements or not others or solution.problem.structure.has_integers:
        return solution
    problem = solution.problem.select(as_index(elements, solution.x.device))
    flat = replace(
        problem, data=problem.data._replace(P=torch.zeros_like(problem.data.P), q=torch.zeros_like(problem.data.q))
    )
    feasible = others[0].attempt(flat, (), executor)
    statuses = list(solution.statuses)
    for element, status, proof in zip(elements, feasible.statuses, feasible.proofs, strict=True):
        if status is Status.INFEASIBLE and proof:
            statuses[element] = Status.INFEASIBLE
    return replace(solution, statuses=tuple(statuses))


def merged(
    solution: ConicSolution,
    elements: Sequence[int],
    other: ConicSolution,
    taken: Sequence[bool],
    *,
    keep_states: bool = False,
) -> ConicSolution:
    """A solution in which the elements that are ``taken`` come from another solve of ``elements`` alone.

    States of another solver are of no use to this one, and are dropped unless they should be kept.
    """
    places = [place for place, is_taken in enumerate(taken) if is_taken]
    targets, every = [elements[place] for place in places], list(elements)
    changes: dict[str, Any] = {name: getattr(solution, name).clone() for name in ("x", "y", "z", "slack")}
    for name, tensor in changes.items():
        tensor[targets] = getattr(other, name)[places]
    for name in ("iterations", "setup_seconds", "solve_seconds"):
        changes[name] = getattr(solution, name).copy()
        changes[name][every] += getattr(other, name)
    for name in ("statuses", "solvers", "proofs"):
        values = list(getattr(solution, name))
        for place, target in zip(places, targets, strict=True):
            values[target] = getattr(other, name)[place]
        changes[name] = tuple(values)
    for name in ("known_to", "known_before", "refined", "isolated", "sharpened"):
        if getattr(solution, name) is None or getattr(other, name) is None:
            changes[name] = None
            continue
        changes[name] = getattr(solution, name).clone()
        changes[name][targets] = getattr(other, name)[places]
    rays = [one.point if one.rays is None else one.rays for one in (solution, other)]
    if solution.rays is not None or other.rays is not None:
        changes["rays"] = ConicPoint(*(ray.clone() for ray in rays[0]))
        for ray, better in zip(changes["rays"], rays[1], strict=True):
            ray[targets] = better[places]
    states = list(solution.states)
    for place, target in zip(places, targets, strict=True):
        states[target] = other.states[place] if keep_states else None
    left = torch.ones(solution.batch_size, dtype=torch.bool, device=solution.x.device)
    left[targets] = False
    systems = tuple(system.among(left) for system in solution.systems)
    return replace(solution, **changes, states=tuple(states), systems=systems)
