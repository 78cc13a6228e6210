"""The approximate gradient of declarative nodes that pretends that there are no constraints ([APX]).

[APX] Gould, Xu, Xu, Liu: Towards Understanding Gradient Approximation in Equality Constrained Deep Declarative
Networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, flags
from lpgd.gradients.base import GradientInfo, GradientMethod, relevant_elements
from lpgd.gradients.closed_form import ClosedForm, by_formula
from lpgd.problems.base import Data, Point
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.node.structure import NodePoint
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.solvers.node.bordered import bordered_response
from lpgd.status import warn

__all__ = ["IgnoreConstraints"]


@dataclass(frozen=True, repr=False)
class IgnoreConstraints(GradientMethod):
    """An approximate gradient: that of the unconstrained problem, taken at the constrained solution ([APX]).

    With the loss gradient v at y, ``Ĥ = ∇²_yy f`` and ``B̂ = ∇²_wy f`` of the objective alone, it is
    ``ĝ = -B̂ᵀ Ĥ⁻¹ v``.  For linear constraints it descends on average; for a normalisation ``|y|² = 1`` it can ascend.

    Args:
        descent_test: compute the exact gradient g as well (the node's closed form, or ImplicitKKT), and put
            ``g · ĝ``, summed over inputs, on record for each element (``GradientInfo.descent``): it descends where
            that is positive.
        matrix_free: True solves with Ĥ by products alone, False by its matrix, None by size.

    A node may bring a closed form of it.  Otherwise a singular Ĥ is replaced by its pseudo-inverse, which the record
    says, and a warning.
    """

    descent_test: bool = False
    matrix_free: bool | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"is_smooth", "has_kkt"})

    def vjp(
        self,
        solution: AnySolution,
        cotangent: Point,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Data, GradientInfo]:
        solution = cast(NodeSolution, solution)
        problem = solution.problem
        info = GradientInfo.blank(self, solution)
        active = relevant_elements(solution, cotangent)
        gradient = problem.zero_gradient()
        formula = problem.node.vjp_ignoring_constraints
        closed = by_formula(formula, solution, cotangent.x, active) if active else None
        if closed is not None:
            gradient = closed
            for element in active:
                info.used[element] = "constraints ignored"
        elif active:
            change, unconstrained = self._change(solution, cotangent.x, active, info)
            gradient = problem.scatter(
                as_index(active, problem.device), unconstrained.directional_gradient(_alone(solution.x[active]), change)
            )
        if self.descent_test:
            exact, _ = ClosedForm().vjp(solution, cotangent, solver, executor)
            products = [
                (a * b).reshape(a.shape[0], math.prod(a.shape[1:])).sum(-1)
                for a, b in zip(exact, gradient, strict=True)
            ]
            info.descent = torch.stack(products).sum(0).cpu()
        return gradient, info

    def jvp(
        self,
        solution: AnySolution,
        tangent: Data,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Point, GradientInfo]:
        solution = cast(NodeSolution, solution)
        info = GradientInfo.blank(self, solution)
        elements = elements_where(solution.usable)
        change = torch.zeros_like(solution.x)
        if elements:
            tangents = tangent._make(tensor[elements] for tensor in tangent)
            slope = (
                solution.problem.select(as_index(elements, solution.x.device))
                .mixed_product(_alone(solution.x[elements]), tangents)
                .x
            )
            whole = torch.zeros_like(solution.x)
            whole[elements] = slope
            response, _ = self._change(solution, whole, elements, info)
            change[elements] = response.x
        return _alone(change), info

    def _change(
        self, solution: NodeSolution, tilt: Tensor, elements: list[int], info: GradientInfo
    ) -> tuple[NodePoint, _Unconstrained]:
        """The change of the unconstrained minimisers under a tilt, and their problem."""
        unconstrained = _Unconstrained.of(solution.problem.select(as_index(elements, solution.x.device)))
        point = _alone(solution.x[elements])
        response, regular = bordered_response(
            unconstrained, point, _alone(tilt[elements]), point.lam > 0, matrix_free=self.matrix_free
        )
        for element, exact in zip(elements, flags(regular), strict=True):
            info.used[element] = "constraints ignored" if exact else "constraints ignored, regularised"
            if not exact:
                info.fallbacks.append(element)
        if info.fallbacks:
            warn(
                f"{self}: the objective's Hessian is singular for elements {info.fallbacks[:10]}; its pseudo-inverse "
                "is used. ImplicitKKT() takes the constraints into account, and needs no such inverse."
            )
        return response, unconstrained


class _Unconstrained(NodeProblem):
    """A node's problem without its constraints."""

    @classmethod
    def of(cls, problem: NodeProblem) -> _Unconstrained:
        return cls(problem.structure, problem.data, problem.batch_size)

    def constraints(self, x: Tensor, data: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return x.new_zeros(x.shape[0], 0), x.new_zeros(x.shape[0], 0)


def _alone(x: Tensor) -> NodePoint:
    return NodePoint(x, x.new_zeros(x.shape[0], 0), x.new_zeros(x.shape[0], 0))
