"""Implicit differentiation of the optimality conditions of a problem, as an exact method and as the fallback.

Reverse mode differentiates ``∇_w L`` along the change ``(dx, dy, dz)`` of the solution under a tilt by the cotangent;
forward mode takes the tilt ``∇_z <∇_w L, dw>``: both are one solve of the same system.  Which system that is the
problem declares: that of conic programs is in :mod:`lpgd.gradients.implicit.conic`, that of declarative nodes in
:mod:`lpgd.gradients.implicit.node`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lpgd.gradients.base import GradientInfo, GradientMethod, is_number, relevant_elements
from lpgd.gradients.implicit import conic, node
from lpgd.problems.base import Data, Point
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver

__all__ = ["ImplicitKKT"]


class _Conditions(NamedTuple):
    """How the optimality conditions of a class of problems are differentiated; see the modules of these functions."""

    response: Callable[..., Any]
    in_data: Callable[..., Any]
    differentiable_vjp: Callable[..., Any] | None = None
    vjp: Callable[..., Any] | None = None
    """Reverse mode, where it is more than a response that is carried to the data."""


_CLASSES: dict[str, _Conditions] = {
    "conic": _Conditions(conic.response, conic.in_data),
    "node": _Conditions(node.response, node.in_data, node.differentiable_vjp, node.vjp),
}


def _conditions(problem: AnyProblem) -> _Conditions:
    return _CLASSES[problem.traits.conditions]


@dataclass(frozen=True, repr=False)
class ImplicitKKT(GradientMethod):
    """The exact derivative of the solution map at regular points, by one linear solve for each element.

    Args:
        rho: ρ ≥ 0 differentiates the problem with ``(ρ/2) |x - x*|²`` added (x* held fixed): the limit of
            ``LPGD(tau, rho)`` as τ → 0, a regularised gradient.
        active_tolerance: for nodes: an inequality counts as active within ``active_tolerance (1 + |y|)`` of its bound;
            None is the square root of the dtype's precision.  One whose multiplier exceeds its slack is active anyhow.
            Answers of a user's solver are then taken as they are; with None a warning names those that do not satisfy
            the optimality conditions.
        weakly_active: for nodes: active inequalities with a multiplier of zero stay active, as in the derivative of
            ReLU at zero; False drops them, which is the other side.  The record says ``"implicit, one-sided"``.
        matrix_free: for nodes: True solves the system by products with it alone (MINRES), False by its matrix, None by
            size.

    Rank and activity are decided relative to how well the solution is known, which is refined first where its error
    could matter.  Where the system is singular (degenerate or non-unique solutions, constraints that depend on each
    other) the answer is its minimum-norm least-squares solution; the record says ``"implicit, regularised"``, and a
    warning tells where the answer depends on it: where only multipliers are not unique, the gradient with respect to
    the objective is exact.  At a kink (an active constraint with a zero multiplier) both sides are looked at; where
    their answers differ, one is taken, as for ReLU, and ``"implicit, one-sided"`` is on record, with a warning.
    ``GradientInfo.doubt`` has the share of each answer that the solution's error may change.  Of nodes with numbers so
    different that rounding takes more than 1e-5 of a gradient, the node's own formula is taken, on record, or a warning
    says so.
    """

    rho: float = 0.0
    active_tolerance: float | None = None
    weakly_active: bool = True
    matrix_free: bool | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"has_kkt"})

    def __post_init__(self) -> None:
        if not (is_number(self.rho) and 0 <= self.rho < np.inf):
            raise ValueError(f"rho is {self.rho!r}; it must be nonnegative and finite.")
        near = self.active_tolerance
        if near is not None and not (is_number(near) and 0 <= near < np.inf):
            raise ValueError(f"active_tolerance is {near!r}; it must be finite, at least 0, or None.")

    @property
    def required(self) -> frozenset[str]:
        for_nodes = (self.active_tolerance, self.weakly_active, self.matrix_free) != (None, True, None)
        return self.needs | ({"is_smooth"} if for_nodes else set())

    def vjp(
        self,
        solution: AnySolution,
        cotangent: Point,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Data, GradientInfo]:
        problem = solution.problem
        if (reverse := _conditions(problem).vjp) is not None:
            record = GradientInfo.blank(self, solution)
            active = relevant_elements(solution, cotangent)
            return reverse(self, solution, cotangent, active, record, executor), record
        change, info = self.response(solution, cotangent, executor)
        if self.rho == 0.0 and problem.stays_still(cotangent, change):
            info.notices["q"] = _ZERO_GRADIENT
        return _conditions(problem).in_data(solution, change), info

    def jvp(
        self,
        solution: AnySolution,
        tangent: Data,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Point, GradientInfo]:
        return self.response(solution, solution.problem.mixed_product(solution.point, tangent), executor)

    def is_differentiable(self, problem: AnyProblem) -> bool:
        """Of declarative nodes it is."""
        return _conditions(problem).differentiable_vjp is not None

    def differentiable_vjp(self, solution: AnySolution, data: Data, outputs: Data, cotangent: Point) -> Data:
        """The vjp as a function of data, minimisers and cotangent.

        Raises:
            RuntimeError: systems that are singular, or too large to be formed.
        """
        formula = _conditions(solution.problem).differentiable_vjp
        if formula is None:
            return super().differentiable_vjp(solution, data, outputs, cotangent)
        return formula(self, solution, data, outputs, cotangent)

    def response(
        self, solution: AnySolution, tilt: Point, executor: Executor | None = None, *, near: Point | None = None
    ) -> tuple[Point, GradientInfo]:
        """The derivative of the solution along a tilt ``<g, point>`` of the Lagrangian, (B, ·) each.

        ``near`` is a difference of a conic program's solutions that it is to be compared with: ten digits will do.
        """
        info = GradientInfo.blank(self, solution)
        active = relevant_elements(solution, tilt)
        guess = {} if near is None else {"near": near}
        return _conditions(solution.problem).response(self, solution, tilt, active, info, executor, **guess), info


_ZERO_GRADIENT = (
    "the exact gradient of this linear program with respect to its cost is zero: its solution is a vertex, which does "
    "not move with small changes of the cost. LPGD with a finite tau gives a gradient that teaches."
)
