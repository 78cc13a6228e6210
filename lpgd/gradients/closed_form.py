"""The closed-form gradients that declarative nodes bring along."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lpgd.gradients.base import GradientInfo, GradientMethod, relevant_elements
from lpgd.gradients.implicit import ImplicitKKT
from lpgd.problems.smooth import SmoothProblem
from lpgd.solution import SmoothSolution
from lpgd.solvers.base import BaseSolver

__all__ = ["ClosedForm"]


@dataclass(frozen=True)
class ClosedForm(GradientMethod):
    """The exact gradient of a node by its own formula, or by ``ImplicitKKT()`` where it has none: a node's default.

    Forward mode is that of ``ImplicitKKT``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"is_smooth"})

    def vjp(
        self,
        problem: SmoothProblem,
        solution: SmoothSolution,
        cotangent: Any,
        solver: BaseSolver,
        executor: Executor | None = None,
    ) -> tuple[Any, GradientInfo]:
        used = ["zero cotangent" if usable else "no solution" for usable in solution.usable.tolist()]
        active = relevant_elements(solution, cotangent)
        part, own, g = problem, solution, cotangent.x
        if len(active) < problem.batch_size:
            part, own = problem.select(active), solution.select(active)
            g = g[torch.as_tensor(active, dtype=torch.int64, device=problem.device)]
        if not active:
            return problem.zero_gradient(), GradientInfo(self, used)
        answer = problem.node.vjp(tuple(part.data), part.shaped(own.x), part.shaped(g), own.aux)
        if answer is None:
            return ImplicitKKT().vjp(problem, solution, cotangent, solver, executor)
        if len(answer) != len(problem.data):
            raise ValueError(
                f"the closed form of {problem.node.name} answered {len(answer)} gradients for "
                f"{len(problem.data)} inputs ({', '.join(problem.data._fields)})."
            )
        rows = (zero if row is None else row for zero, row in zip(part.zero_gradient(), answer, strict=True))
        gradient = type(problem.data)(*rows)
        for element in active:
            used[element] = "closed form"
        return gradient if part is problem else problem.scatter(active, gradient), GradientInfo(self, used)

    def jvp(
        self,
        problem: SmoothProblem,
        solution: SmoothSolution,
        tangent: Any,
        solver: BaseSolver,
        executor: Executor | None = None,
    ) -> tuple[Any, GradientInfo]:
        if not problem.node.has_kkt:
            raise TypeError(
                f"{problem.node.name} has no optimality conditions that could be differentiated in forward mode: "
                "use reverse mode, or LPGD."
            )
        return ImplicitKKT().jvp(problem, solution, tangent, solver, executor)
