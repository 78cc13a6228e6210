"""How a batch of conic programs is posed to a solver, and how its answer is judged, whichever solver it is.

A solver sees data in units of order 1, bounds that are infinite or finite and never crossed, and convex objectives.
What it answers counts as far as it can be checked: a solution by its residuals, "infeasible" and "unbounded" by their
certificates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, flags
from lpgd.problems.base import State, States
from lpgd.problems.conic.magnitudes import INFINITE
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.residuals import Products, Residuals, residual_bound, residuals_of
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint, ConicStructure, per_element
from lpgd.problems.conic.units import Units
from lpgd.solvers.conic.certificates import MARGIN, proves_infeasible, proves_unbounded
from lpgd.solvers.conic.convexity import is_convex
from lpgd.solvers.kkt.reduced import is_dense
from lpgd.solvers.kkt.refinement import complementary, has_vertices, is_cheap, refine
from lpgd.status import Status

__all__ = ["ACCEPTED", "EXACT", "VERDICTS", "Posed", "judged", "left_by_draft", "pose"]

EXACT = 1e-12
"""A point at which no more than this is left of the optimality conditions is not refined."""
STEPS, FEW = 8, 3
"""Of Newton's method, at most: where rows are nearly parallel a solver's point takes more than the usual two.  One that
the solver itself does not call solved gets few."""
ACCEPTED = 1e-6
"""A relative residual above this, and above ten tolerances, turns a solver's "solved" into INACCURATE."""
FINISHED = 1e-10
"""A solver that gave up has a solution all the same where no more than this is left: it has not converged, and where
curvature is small its iterate may be far away at a residual that another solver's solutions have."""
SURELY_SMALL = 1e-9
"""Residuals below this are small, whatever rounding adds."""
USELESS = 1e-2
"""A point with a larger relative residual is no solution."""
KEPT_BYTES = 6.4e7
"""Refinement's last systems are kept for implicit differentiation if an element's takes no more than about this."""
MOST_KEPT_BYTES = 5e8
"""Nor if a batch's take more: the one rule by which the number of elements may decide on an element's last bits."""
FILL = 5
"""Entries of the factors of a sparse system for each of its own, typically."""
VERDICTS = (Status.INFEASIBLE, Status.UNBOUNDED)


class _State(NamedTuple):
    """A warm-start state of an element whose units are not 1, and their exponents."""

    length: float
    cost: float
    state: State


@dataclass(frozen=True, eq=False)
class Posed:
    """A batch as a solver sees it.

    Attributes:
        problem: the batch as it was given.
        inside: what the solver sees.  Elements that it needs not see have NaN in q.
        units: of ``inside``.
        settled: elements whose outcome is known beforehand, and their statuses.
        states: warm-start states in those units.
    """

    problem: ConicProblem
    inside: ConicProblem
    units: Units
    settled: dict[int, Status]
    states: States

    def select(self, elements: list[int]) -> Posed:
        """These elements alone, none of which is settled."""
        index = as_index(elements, self.problem.device)
        states = tuple(self.states[element % len(self.states)] for element in elements) if self.states else ()
        return Posed(self.problem.select(index), self.inside.select(index), self.units.select(index), {}, states)


def pose(
    problem: ConicProblem,
    states: States = (),
    lengths: Tensor | None = None,
    costs: Tensor | None = None,
    apart: Tensor | None = None,
) -> Posed:
    """What a solver is to see of a batch, started from the states of an earlier solution.

    Args:
        problem: B elements.
        states: of B elements, or of a divisor of B that repeat; none is a cold start.
        lengths: (B,) exponents of two of the length unit, where it should not be chosen by the data.
        costs: (B,) exponents of two by which costs should be larger than the data make them.
        apart: (B, m) rows that say nothing of the units of variables.
    """
    cleaned, settled = _with_clean_bounds(problem)
    exponents = _exponents(states, problem.batch_size)
    by_data = exponents is None and lengths is None and apart is None
    units = cleaned.units if by_data else Units.of(cleaned, exponents, lengths, apart)
    if costs is not None and units.cost is not None:
        units = replace(units, cost=units.cost * torch.exp2(costs)[:, None])
    inside = units.apply(cleaned)
    # A factor that is a power of two changes no verdict: what has its own P in these units is factorised there.
    convex = is_convex(inside if units.keeps_matrices and inside.data.P.ndim == 2 else cleaned)
    if not bool(convex.all()):
        settled |= dict.fromkeys(elements_where(~convex), Status.NOT_CONVEX)
    if settled and not bool(problem.finite().all()):
        finite = flags(problem.finite())
        settled = {element: status for element, status in settled.items() if finite[element]}
    if settled:
        hidden = torch.zeros(problem.batch_size, 1, dtype=torch.bool, device=problem.device)
        hidden[list(settled)] = True
        q = torch.where(hidden, torch.nan, per_element(inside.data.q, problem.batch_size))
        inside = replace(inside, data=inside.data._replace(q=q))
    return Posed(problem, inside, units, settled, _states_in(states, units, problem.batch_size))


def _with_clean_bounds(problem: ConicProblem) -> tuple[ConicProblem, dict[int, Status]]:
    """Bounds of 1e20 and more made infinite, those crossed by rounding made equal; elements with crossed bounds."""
    data, structure = problem.data, problem.structure
    if not structure.has_bounds:
        return problem, {}
    lower, upper = data.lower, data.upper
    if bool((lower <= -INFINITE).any()) or bool((upper >= INFINITE).any()):
        lower = torch.where(lower <= -INFINITE, -torch.inf, lower)
        upper = torch.where(upper >= INFINITE, torch.inf, upper)
    settled: dict[int, Status] = {}
    low_at, high_at = structure.bounded_on_both_sides
    if low_at.size:
        size = problem.batch_size
        low, high = per_element(lower, size)[:, low_at], per_element(upper, size)[:, high_at]
        crossed = low > high
        if bool(crossed.any()):
            far = low - high > MARGIN * torch.maximum(low.abs(), high.abs())
            settled = dict.fromkeys(elements_where(far.any(-1)), Status.INFEASIBLE)
            middle = torch.where(crossed & ~far, 0.5 * (low + high), torch.nan)
            lower, upper = per_element(lower, size).clone(), per_element(upper, size).clone()
            lower[:, low_at] = torch.where(torch.isnan(middle), low, middle)
            upper[:, high_at] = torch.where(torch.isnan(middle), high, middle)
    if lower is data.lower and upper is data.upper:
        return problem, settled
    return replace(problem, data=data._replace(lower=lower, upper=upper)), settled


def _exponents(states: States, size: int) -> Tensor | None:
    """(B, 2) exponents of the units that states are in; NaN where there is none."""
    if not states or size == 0:
        return None
    exponents = []
    for state in states:
        if isinstance(state, _State):
            exponents.append([state.length, state.cost])
        else:
            exponents.append([torch.nan, torch.nan] if state is None else [0.0, 0.0])
    return torch.tensor(exponents, dtype=torch.float64).repeat(size // len(exponents), 1)


def _states_in(states: States, units: Units, size: int) -> States:
    """The states that are in these units; None for others.  Factors D and E need no look: they belong to matrices."""
    plain = units.length is None and units.cost is None
    if not states or (plain and not any(isinstance(state, _State) for state in states)):
        return states
    exponents = units.exponents(size).tolist()
    found = []
    for element in range(size):
        state = states[element % len(states)]
        length, cost, inner = state if isinstance(state, _State) else (0.0, 0.0, state)
        found.append(inner if [length, cost] == exponents[element] else None)
    return found


def _states_out(states: States, units: Units) -> States:
    if units.length is None and units.cost is None:
        return states
    exponents = units.exponents(len(states)).tolist()
    return tuple(
        None if state is None else _State(length, cost, state)
        for state, (length, cost) in zip(states, exponents, strict=True)
    )


# -- answers ------------------------------------------------------------------------------------------------------


def judged(
    posed: Posed,
    answer: ConicSolution,
    tolerance: float,
    solver: str,
    *,
    refined: bool = True,
    draft: bool = False,
) -> ConicSolution:
    """A solver's answer to ``posed.inside`` as one to ``posed.problem``, with statuses that can be shown.

    Points that are not finite, or far from optimal, are no solutions; points that satisfy the optimality conditions
    are, however the solver ended.  Verdicts stay the solver's claims; ``proofs`` has those that its certificate proves.
    Of a draft only what is simple is refined.
    """
    answer, products = _refined(answer, max(USELESS, 10 * tolerance), refined, draft)
    residuals = None
    if _is_surely_solved(answer):
        answer = replace(answer, statuses=(Status.SOLVED,) * answer.batch_size)
    else:
        residuals = residuals_of(answer.problem, answer.point, products)
        answer = _by_residuals(answer, residuals, tolerance)
    statuses, size = list(answer.statuses), answer.batch_size
    proofs = _proofs(answer) if any(status in VERDICTS for status in statuses) else [""] * size
    for element, status in posed.settled.items():
        statuses[element], proofs[element] = status, "data"
    units, problem = posed.units, posed.problem
    point, slack, states, rays = answer.point, answer.slack, answer.states, None
    nothing = [index for index, status in enumerate(statuses) if not status.has_iterate]
    if nothing:  # certificates are no points
        mask = torch.zeros(size, 1, dtype=torch.bool, device=problem.device)
        mask[nothing] = True
        rays = units.point_out(problem, point)
        point = ConicPoint(*(torch.where(mask, torch.nan, tensor) for tensor in point))
        slack = torch.where(mask, torch.nan, slack)
        states = tuple(state if status.has_iterate else None for state, status in zip(states, statuses, strict=True))
    point = units.point_out(problem, point)
    result = replace(
        answer,
        problem=problem,
        **point._asdict(),
        slack=units.slack_out(problem, slack),
        statuses=tuple(statuses),
        states=_states_out(states, units),
        # They are those of the problem itself only where units are 1.
        systems=tuple(system.among(units.plain(size)) for system in answer.systems),
        asked=solver,
        solvers=(solver,) * size,
        proofs=tuple(proofs),
        rays=rays,
        sharpened=torch.zeros(size, dtype=torch.bool),
    )
    if residuals is not None and not nothing:
        result.__dict__["residuals"] = residuals  # what the cached property would compute
    return result


def left_by_draft(posed: Posed, found: ConicSolution) -> list[int]:
    """Elements that are to be solved once more: those not shown to have one solution, which is known to rounding."""
    assert found.known_to is not None
    assert found.isolated is not None
    sure = found.isolated & (found.known_to <= EXACT)
    if not bool(sure.all()):
        size = found.problem.in_own_units(found.point).largest().clamp(min=1.0)
        sure = found.isolated & (found.known_to <= EXACT * size)
    known = (Status.SOLVED, Status.INVALID_DATA, Status.TIME_LIMIT)
    return [
        element
        for element, (status, is_sure) in enumerate(zip(found.statuses, flags(sure), strict=True))
        if element not in posed.settled and (status not in known or (status is Status.SOLVED and not is_sure))
    ]


def _refined(answer: ConicSolution, useless: float, wanted: bool, draft: bool) -> tuple[ConicSolution, Products | None]:
    """The answer after a few of Newton's steps, where they are cheap, or a solver gave up; its products, if known.

    What a solver calls solved and is useless stays as it is: the solver is wrong, and that should be seen.
    """
    size, structure, problem = answer.batch_size, answer.problem.structure, answer.problem
    if structure.has_integers or not structure.n:
        nothing = answer.x.new_full((size,), torch.nan)
        return replace(
            answer, known_to=nothing, known_before=nothing.clone(), refined=torch.zeros(size, dtype=torch.int64)
        ), None
    point, slack, start, products = complementary(problem, answer.point, answer.slack)
    known_to = start.error.clone()
    isolated = torch.zeros(size, dtype=torch.bool, device=problem.device)
    answer = replace(answer, known_before=known_to.clone(), isolated=isolated)
    if not wanted:
        return replace(answer, known_to=known_to, refined=torch.zeros(size, dtype=torch.int64)), None
    exact = known_to <= EXACT
    answer = replace(
        answer,
        **point.where(exact, answer.point)._asdict(),
        slack=torch.where(exact[:, None], slack, answer.slack),
    )
    taken = torch.zeros(size, dtype=torch.int64)
    cheap = is_cheap(structure)
    rough, wrong = flags(~exact), flags(known_to > useless)
    elements = [
        element
        for element, status in enumerate(answer.statuses)
        if rough[element] and status.has_iterate and not (status.usable and (wrong[element] or not cheap))
    ]
    if not elements:
        return replace(answer, known_to=known_to, refined=taken), products if bool(exact.all()) else None
    chosen = as_index(elements, problem.device)
    steps = torch.tensor([STEPS if answer.statuses[element].usable else FEW for element in elements])
    regular = draft or has_vertices(structure)
    found = refine(
        problem,
        answer.point,
        answer.slack,
        chosen,
        start=start,
        steps=steps.to(chosen.device),
        keep=True,
        regular_only=regular,
    )
    better = found.after < found.before
    improved = torch.tensor(elements, device=problem.device)[better]
    changes = {name: getattr(answer, name).clone() for name in ("x", "y", "z", "slack")}
    for name, tensor in (*found.point._asdict().items(), ("slack", found.slack)):
        changes[name][improved] = tensor[better]
    known_to[elements], taken[elements], isolated[elements] = found.after, found.taken.cpu(), found.isolated
    room = _is_kept(structure) and sum(factor.factored.entries for factor in found.kept) * 8 <= MOST_KEPT_BYTES
    systems = (*answer.systems, *found.kept) if room else answer.systems
    return replace(answer, **changes, known_to=known_to, refined=taken, systems=systems), None


def _is_kept(structure: ConicStructure) -> bool:
    """Whether an element's system is small; how many elements there are must change none of their bits."""
    if is_dense(structure):
        return 16 * (structure.n + structure.m) ** 2 <= KEPT_BYTES
    return 16 * FILL * (structure.quadratic.nnz + structure.constraint.nnz + structure.n + structure.m) <= KEPT_BYTES


def _is_surely_solved(answer: ConicSolution) -> bool:
    """Whether every element has a solution, whose residuals are small as next to nothing is left of F."""
    if answer.known_to is None or not all(status.usable for status in answer.statuses):
        return False
    bound = residual_bound(answer.point, answer.known_to)
    return bool(((answer.known_to <= EXACT) & (bound <= SURELY_SMALL)).all())  # false for NaN


def _by_residuals(answer: ConicSolution, residuals: Residuals, tolerance: float) -> ConicSolution:
    """Of an integer program residuals prove that a point is feasible, not that there is no better one."""
    whole = answer.problem.structure.has_integers
    error, accepted = (residuals.primal if whole else residuals.worst).cpu(), max(ACCEPTED, 10 * tolerance)
    exact, useless = flags(error <= accepted), flags(~(error <= max(USELESS, accepted)))
    finished = flags(error <= FINISHED)
    statuses = list(answer.statuses)
    for index, status in enumerate(statuses):
        if status.usable:
            if useless[index]:
                statuses[index] = Status.NUMERICAL_ERROR
            elif not exact[index]:
                statuses[index] = Status.INACCURATE
            elif status is Status.INACCURATE and not whole:
                statuses[index] = Status.SOLVED
        elif status.has_iterate and finished[index] and not whole:
            statuses[index] = Status.SOLVED
    return answer if tuple(statuses) == answer.statuses else replace(answer, statuses=tuple(statuses))


def _proofs(answer: ConicSolution) -> list[str]:
    """For each element ``"certificate"`` where y, if infeasible, or x, if unbounded, proves the verdict, else ``""``.

    The search of a solver of integer programs leaves nothing that could be checked: it is its own proof.
    """
    proofs = [""] * answer.batch_size
    for verdict, name, proves in (
        (Status.INFEASIBLE, "y", proves_infeasible),
        (Status.UNBOUNDED, "x", proves_unbounded),
    ):
        elements = [index for index, status in enumerate(answer.statuses) if status is verdict]
        if elements and answer.problem.structure.has_integers:
            proofs = ["search" if index in elements else proof for index, proof in enumerate(proofs)]
        elif elements:
            found = flags(
                proves(answer.problem.select(as_index(elements, answer.x.device)), getattr(answer, name)[elements])
            )
            for element, fine in zip(elements, found, strict=True):
                proofs[element] = "certificate" if fine else ""
    return proofs
