"""The closed-form gradients that declarative nodes bring along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where
from lpgd.gradients.base import GradientInfo, GradientMethod, relevant_elements
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.problems.base import Data, Point
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.status import SolverError, describe_failures

__all__ = ["ClosedForm", "by_formula"]


@dataclass(frozen=True)
class ClosedForm(GradientMethod):
    """The exact gradient of a node by its own formula, or by ``ImplicitKKT()`` where it has none: a node's default.

    Forward mode is that of ``ImplicitKKT``.  Gradients can be differentiated again.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"is_smooth"})

    def vjp(
        self,
        solution: AnySolution,
        cotangent: Point,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Data, GradientInfo]:
        problem = cast(NodeProblem, solution.problem)
        info = GradientInfo.blank(self, solution)
        active = relevant_elements(solution, cotangent)
        if not active:
            return problem.zero_gradient(), info
        node_solution = cast(NodeSolution, solution)
        # A formula is that of the problem itself, not of one with a barrier.
        gradient = None if node_solution.barrier else by_formula(problem.node.vjp, node_solution, cotangent.x, active)
        if gradient is None:
            return ImplicitKKT().vjp(solution, cotangent, solver, executor)
        for element in active:
            info.used[element] = "closed form"
        lost = _without_formula(gradient, active) if problem.node.is_partial else []
        if not lost:
            return gradient, info
        mask = torch.zeros(problem.batch_size, dtype=torch.bool, device=problem.device)
        mask[lost] = True
        others = cotangent._make(torch.where(mask[:, None], tensor, 0.0) for tensor in cotangent)
        more, found = ImplicitKKT().vjp(solution, others, solver, executor)
        for element in lost:
            info.used[element] = found.used[element]
        kept = (torch.where(mask.reshape(-1, *(1,) * (one.ndim - 1)), 0.0, one) for one in gradient)
        return gradient._make(one + other for one, other in zip(kept, more, strict=True)), info

    def jvp(
        self,
        solution: AnySolution,
        tangent: Data,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Point, GradientInfo]:
        traits = solution.problem.traits
        if not traits.has_kkt:
            raise TypeError(
                f"{traits.noun} has no optimality conditions that could be differentiated in forward mode: "
                "use reverse mode, or LPGD."
            )
        return ImplicitKKT().jvp(solution, tangent, solver, executor)

    def is_differentiable(self, problem: AnyProblem) -> bool:
        return True

    def differentiable_vjp(self, solution: AnySolution, data: Data, outputs: Data, cotangent: Point) -> Data:
        """The node's formula from its inputs and its solution alone."""
        if cast(NodeSolution, solution).barrier:
            return ImplicitKKT().differentiable_vjp(solution, data, outputs, cotangent)
        traced = cast(NodeSolution, solution).traced(data, outputs)
        elements = elements_where(traced.usable)
        node = traced.problem.node
        gradient = by_formula(
            lambda inputs, y, cotangent, _: node.differentiable_vjp(inputs, y, cotangent), traced, cotangent.x, elements
        )
        return ImplicitKKT().differentiable_vjp(solution, data, outputs, cotangent) if gradient is None else gradient


def _without_formula(gradient: Data, active: list[int]) -> list[int]:
    """The elements for which a partial formula answered NaN."""
    finite = torch.stack([torch.isfinite(one.flatten(1)).all(-1) for one in gradient]).all(0)
    return [element for element in active if not finite[element]]


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
