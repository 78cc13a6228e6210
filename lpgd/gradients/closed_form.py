"""The closed-form gradients that declarative nodes bring along."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from lpgd.arrays import elements_where
from lpgd.gradients.base import GradientInfo, GradientMethod, relevant_elements
from lpgd.gradients.formula import by_formula
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.problems.base import Data, Point
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver

__all__ = ["ClosedForm"]


@dataclass(frozen=True, repr=False)
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
    finite = torch.stack([torch.isfinite(one.reshape(len(one), -1)).all(-1) for one in gradient]).all(0)
    return [element for element in active if not finite[element]]
