"""Calls whose cones are solved in other coordinates: from the data, and back to the program that was asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lpgd.arrays import plain
from lpgd.layers.concrete_values import computed_from_values
from lpgd.problems.conic.coordinates.balance import Balance
from lpgd.problems.conic.coordinates.balancing import balancing_of
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicStructure
from lpgd.solvers.conic.centred import Search, Solve
from lpgd.solvers.relaxed import RELAXED

__all__ = ["balanced", "in_own_coordinates", "is_of_other_coordinates"]


def balanced(
    structure: ConicStructure,
    data: ConicData,
    size: int,
    solve: Solve,
    *,
    augmented: bool,
    relaxes: bool,
) -> tuple[Balance | None, ConicSolution | None]:
    """The coordinates in which a batch is solved, and its solution there.

    Args:
        structure, data, size: of the batch.
        solve: of the call.
        augmented: the gradient method adds something to the objective, which is to be of the variables as they are.
        relaxes: elements without a feasible point are to be in their own coordinates.

    Returns:
        Coordinates, None for the batch's own; and solution, None where there are no others.  Within transforms of
        ``torch.func`` the solution is one of all lanes.
    """
    balancing = balancing_of(structure)
    if balancing is None:
        return None, None
    solutions = list[ConicSolution]()

    def making(shown: Sequence[Tensor], count: int) -> tuple[Tensor, ...] | None:
        values = ConicData(*(plain(datum) for datum in shown))
        search = Search(balancing, values, count, solve, augmented)
        balance, solution = search.found()
        if relaxes:
            balance, solution = search.plain_where(RELAXED, balance, solution)
        solutions.append(solution)
        if balance is None:
            return None
        made = (balance.exponents, balance.row_exponents)
        return made if balance.origin is None else (*made, balance.origin)

    made = computed_from_values(making, data, size)
    balance = None if made is None else Balance(balancing, size, *made)
    return balance, solutions[0] if solutions else None


def in_own_coordinates(solution: ConicSolution, problem: ConicProblem, balance: Balance) -> ConicSolution:
    """A solution as one of the problem itself."""
    point = balance.point_out(solution.point)
    return replace(solution, problem=problem, **point._asdict(), slack=balance.slack_out(solution.slack), systems=())


def is_of_other_coordinates(solution: object, structure: object, size: int) -> bool:
    """Whether a solution of so many elements is of the same programs, on another pattern: that of other coordinates."""
    if not isinstance(solution, ConicSolution) or not isinstance(structure, ConicStructure):
        return False
    other = solution.problem.structure
    if other.digest == structure.digest or solution.batch_size != size:
        return False
    balancings = (balancing_of(one) for one in (structure, other))
    wider = {balancing.wider.digest for balancing in balancings if balancing is not None}
    return len(wider) == 1
