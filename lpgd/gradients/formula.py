"""A node's own formula for gradients, for some elements of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lpgd.arrays import as_index
from lpgd.problems.base import Data
from lpgd.problems.node.solution import NodeSolution
from lpgd.status import SolverError, describe_failures

__all__ = ["by_formula"]


def by_formula(
    formula: Callable[..., Sequence[Tensor | None] | None],
    solution: NodeSolution,
    cotangent: Tensor,
    active: list[int],
) -> Data | None:
    """A formula of the node for the elements ``active``, as a gradient of the batch's data; None where there is none.

    Raises:
        SolverError: the formula does not hold for some elements, by their places in the batch.
        ValueError: it answers another number of gradients than there are inputs.
    """
    problem, chosen, g = solution.problem, solution, cotangent
    node = problem.node
    if len(active) < problem.batch_size:
        elements = as_index(active, problem.device)
        chosen, g = solution.select(elements), g[elements]
    chosen_problem = chosen.problem
    try:
        answer = formula(
            tuple(chosen_problem.data), chosen_problem.shaped(chosen.x), chosen_problem.shaped(g), chosen.aux
        )
    except SolverError as error:
        if chosen_problem is problem:
            raise
        failed = [active[index] for index in error.indices]
        statuses = list(solution.statuses)
        for index, status in zip(active, error.statuses, strict=True):
            statuses[index] = status
        text = f"the formula of {node.name} has no gradient: {describe_failures(statuses, failed)}"
        raise SolverError(text, statuses, failed) from error
    if answer is None:
        return None
    if len(answer) != len(problem.data):
        raise ValueError(
            f"the closed form of {node.name} answered {len(answer)} gradients for {len(problem.data)} inputs "
            f"({', '.join(problem.data._fields)})."
        )
    gradients = (
        datum.new_zeros(datum.shape) if values is None else values
        for datum, values in zip(chosen_problem.data, answer, strict=True)
    )
    gradient = problem.data._make(gradients)
    return gradient if chosen_problem is problem else problem.scatter(as_index(active, problem.device), gradient)
