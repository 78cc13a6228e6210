"""Programs whose far constraints set the unit of length, solved with these :mod:`~lpgd.problems.conic.nearer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, flags
from lpgd.problems.conic.nearer import Nearer, guessed, nearer
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.problems.solution import States
from lpgd.solvers.conic.lengths import SURE
from lpgd.solvers.conic.posed import EXACT, Posed, pose
from lpgd.solvers.conic.rescue import OPEN, merged
from lpgd.solvers.kkt.refinement import optimality_residual
from lpgd.status import Status

__all__ = ["with_far_constraints_guessed", "with_far_constraints_near"]

MOST = 3
"""How often constraints of an element are moved nearer."""
SURELY_CURVED = 1e-12
"""A solution is known where no more than this share of its size is left of the optimality conditions, if cones are
curved."""


def with_far_constraints_guessed(
    posed: Posed, states: States, solve: Callable[[Posed], ConicSolution]
) -> tuple[ConicSolution, Tensor | None]:
    """The answer to a batch, of which elements are solved with constraints nearer that seem to be far, by their data.

    Those whose solutions touch such a constraint are solved as they are.

    Args:
        posed: the batch, and its units.
        states: warm-start states of its elements, whatever their units.
        solve: a solver's answer to a posed batch, judged.

    Returns:
        The answer, and the units of length that its ``known_to`` is in, (B,), in those of the batch; None where they
        are the same.
    """
    near = None if posed.settled else guessed(posed.problem)
    if near is None:
        return solve(posed), None
    nearby = pose(near.problem, states, apart=near.rows)
    answer, taken = _of_far(near, posed.problem, solve(nearby))
    taken = [fine or not moved for fine, moved in zip(taken, flags(near.reach.isfinite()), strict=True)]
    shares = _lengths(nearby) / _lengths(posed)
    # What seems to touch a constraint may be an answer that is vague, as it is far smaller than was guessed.
    elements = [element for element, fine in enumerate(taken) if not fine]
    vague = [element for element in elements if answer.statuses[element].usable]
    if vague:
        chosen, index = posed.select(vague), as_index(vague, posed.problem.device)
        found = _nearer_still(chosen, answer.point.select(index), answer.slack[index], solve)
        if found is not None:
            again, lengths, fine = found
            answer = merged(answer, vague, again, fine, keep_states=True)
            moved = [element for element, is_fine in zip(vague, fine, strict=True) if is_fine]
            shares[moved] = lengths[torch.tensor(fine)] / _lengths(posed)[moved]
            elements = [element for element in elements if element not in moved]
    if elements:
        answer = merged(answer, elements, solve(posed.select(elements)), [True] * len(elements), keep_states=True)
        shares[elements] = 1.0
    return answer, shares


def _nearer_still(
    posed: Posed, point: ConicPoint, slack: Tensor, solve: Callable[[Posed], ConicSolution]
) -> tuple[ConicSolution, Tensor, list[bool]] | None:
    """The answer with far constraints nearer to a point, its units of length, and which elements of it are one.

    None where no constraint is far from it.
    """
    near = nearer(posed.problem, point, slack)
    if near is None:
        return None
    nearby = pose(near.problem, apart=near.rows)
    answer, taken = _of_far(near, posed.problem, solve(nearby))
    moved = flags(near.reach.isfinite())
    return answer, _lengths(nearby), [fine and is_moved for fine, is_moved in zip(taken, moved, strict=True)]


def with_far_constraints_near(
    posed: Posed, answer: ConicSolution, shares: Tensor | None, solve: Callable[[Posed], ConicSolution]
) -> ConicSolution:
    """The answer, in which elements whose unit of length is that of a far constraint are solved with that one nearer.

    Args:
        posed: the batch, and its units.
        answer: a solver's, judged.
        shares: (B,) the units of length that it is known in, in those of the batch.
        solve: the same of other elements.
    """
    sure = SURE if posed.problem.structure.cones.is_polyhedral else SURELY_CURVED
    shares = torch.ones_like(_lengths(posed)) if shares is None else shares
    left = torch.ones_like(shares, dtype=torch.bool)
    for _ in range(MOST):
        near = nearer(posed.problem, answer.point, answer.slack)
        improved = torch.zeros_like(left)
        if near is not None:
            vague = left & ~(_known(answer) * shares <= sure * near.reach)
            answer, shares, improved = _moved(posed, answer, shares, near, vague, solve)
        # Each element goes on by itself, as it does alone.
        vague = left & ~improved & (_known(answer) > EXACT)
        if bool(vague.any()):
            # Variables that only it bounds, as those of abs(x) below norm1(x) <= 1e4, hide that a constraint is far.
            near = guessed(posed.problem, closer=True)
            if near is not None:
                answer, shares, more = _moved(posed, answer, shares, near, vague, solve)
                improved = improved | more
        left = improved
        if not bool(left.any()):
            break
    return answer


def _known(answer: ConicSolution) -> Tensor:
    """(B,) what is left of the optimality conditions, as far as it is known."""
    return torch.full_like(answer.x[:, 0], torch.inf) if answer.known_to is None else answer.known_to


def _moved(
    posed: Posed,
    answer: ConicSolution,
    shares: Tensor,
    near: Nearer,
    vague: Tensor,
    solve: Callable[[Posed], ConicSolution],
) -> tuple[ConicSolution, Tensor, Tensor]:
    """The answer, in which vague elements are those of nearer programs where these are better; its units of length.

    The last is (B,) which are.
    """
    elements = elements_where(answer.usable & near.reach.isfinite() & vague)
    if not elements:
        return answer, shares, torch.zeros_like(vague)
    index = as_index(elements, posed.problem.device)
    few, problem = near.select(index), posed.problem.select(index)
    nearby = pose(few.problem, apart=few.rows)
    again, taken = _of_far(few, problem, solve(nearby))
    inside, units = nearby.units.apply(problem), nearby.units
    before, after = (
        optimality_residual(inside, units.point_in(problem, one.point), units.slack_in(problem, one.slack))
        for one in (answer.select(index), again)
    )
    better = flags(~(after >= before))
    # What is vague there, and left by the solver, is for others to say. (Curved cones methods of first order leave so.)
    is_polyhedral = answer.problem.structure.cones.is_polyhedral
    statuses = list(answer.statuses)
    for element, found, is_rough in zip(elements, again.statuses, flags(before > SURE), strict=True):
        if is_polyhedral and is_rough and found in OPEN and statuses[element] is Status.SOLVED:
            statuses[element] = Status.INACCURATE
    answer = replace(answer, statuses=tuple(statuses))
    taken = [fine and is_better for fine, is_better in zip(taken, better, strict=True)]
    chosen = torch.tensor(taken)
    shares = shares.clone()
    shares[index[chosen]] = _lengths(nearby)[chosen] / _lengths(posed)[index[chosen]]
    improved = torch.zeros_like(vague)
    improved[index[chosen]] = True
    return merged(answer, elements, again, taken, keep_states=True), shares, improved


def _lengths(posed: Posed) -> Tensor:
    """(B,) units of length."""
    size = posed.problem.batch_size
    return posed.problem.data.q.new_ones(size) if posed.units.length is None else posed.units.length[:, 0].clone()


def _of_far(near: Nearer, problem: ConicProblem, answer: ConicSolution) -> tuple[ConicSolution, list[bool]]:
    """An answer to the nearer programs as one of the programs themselves, and which elements of it are one."""
    taken = flags(~near.touches(answer.point, answer.slack))
    taken = [fine and status is Status.SOLVED for fine, status in zip(taken, answer.statuses, strict=True)]
    y, z = near.without_forces(answer.point)
    slack = torch.where(near.rows, problem.slack(answer.x), answer.slack)
    return replace(answer, problem=problem, y=y, z=z, slack=slack), taken
