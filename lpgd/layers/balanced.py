"""Calls whose cones are solved in other coordinates: from the data, and back to the program that was asked about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from lpgd.arrays import as_index, plain
from lpgd.layers.look import made_of, transforms_are_active
from lpgd.problems.conic.balance import Balance
from lpgd.problems.conic.balancing import balancing_of
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicStructure
from lpgd.solvers.rescue import merged
from lpgd.status import Status

SMALL = 2.0**-12
"""Solutions below this are small in coordinates in which the data are of order 1."""

__all__ = ["balanced", "in_own_coordinates", "is_of_other_coordinates"]


def balanced(
    structure: ConicStructure,
    data: ConicData,
    size: int,
    solve: Callable[[ConicProblem], ConicSolution],
    *,
    augmented: bool,
) -> tuple[Balance | None, ConicSolution | None]:
    """The coordinates in which a batch is solved, and its solution there; None for its own.

    Elements that are not solved in coordinates in which all data are of one size are solved once more in those where
    large right-hand sides belong to constraints that are loose; those whose solutions are small, in coordinates of
    their size, and they are INACCURATE if that fails.

    Args:
        structure, data, size: of the batch.
        solve: solves some elements.
        augmented: the gradient method adds something to the objective, which is to be of the variables as they are.

    Returns:
        Coordinates and solution; no solution within transforms, which hide the data.
    """
    balancing = balancing_of(structure)
    if balancing is None:
        return None, None
    factors = made_of(balancing, data, size)
    if factors is None:
        return None, None
    balance = Balance(balancing, size, *factors)
    balance = balance.for_rows_alone() if augmented else balance
    if transforms_are_active():
        return balance, None
    values = data._make(plain(datum) for datum in data)
    solution = solve(balance.problem(values))
    # A point that is far smaller than its coordinates is known no better than they are.
    largest = solution.x.abs().amax(1).cpu()
    unfit = [
        status is not Status.SOLVED or float(length) < SMALL
        for status, length in zip(solution.statuses, largest, strict=True)
    ]
    elements = [element for element, is_unfit in enumerate(unfit) if is_unfit]
    if not elements:
        return balance, solution
    solved = torch.tensor([status is Status.SOLVED for status in solution.statuses])[:, None]
    own = balance.point_out(solution.point).x.cpu()
    factors = balancing(values, size, near=torch.where(solved, own, torch.nan).numpy())
    other = balance.plain() if factors is None else Balance(balancing, size, *factors)
    other = other.for_rows_alone() if augmented else other
    index = as_index(elements, solution.x.device)
    again = solve(other.problem(values).select(index))
    taken = [
        status is Status.SOLVED or (status.usable and not solution.statuses[element].usable)
        for element, status in zip(elements, again.statuses, strict=True)
    ]
    statuses = list(solution.statuses)
    for element, is_taken in zip(elements, taken, strict=True):
        if statuses[element] is Status.SOLVED and not is_taken:
            statuses[element] = Status.INACCURATE
    solution = replace(solution, statuses=tuple(statuses))
    if not any(taken):
        return balance, solution
    balance = balance.where([element for element, is_taken in zip(elements, taken, strict=True) if is_taken], other)
    solution = merged(solution, elements, again, taken, keep_states=True)
    return balance, replace(solution, problem=balance.problem(values))


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
