"""Implicit differentiation of the optimality conditions of a problem, as an exact method and as the fallback.

Reverse mode differentiates ``∇_w L`` along the change ``(dx, dy, dz)`` of the solution under a tilt by the cotangent;
forward mode takes the tilt ``∇_z <∇_w L, dw>``: both are one solve of the system in :mod:`lpgd.solvers.kkt`,
for declarative nodes of that in :mod:`lpgd.solvers.bordered`.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lpgd.gradients.base import GradientInfo, GradientMethod, relevant_elements
from lpgd.gradients.implicit_conic import conic_response
from lpgd.problems.conic import ConicProblem
from lpgd.problems.multipliers import active_rows
from lpgd.problems.smooth import SmoothProblem
from lpgd.problems.smooth_structure import SmoothOutput, SmoothPoint
from lpgd.problems.structure import ConicPoint
from lpgd.solution import SmoothSolution
from lpgd.solvers.base import BaseSolver
from lpgd.solvers.bordered import bordered_response, is_large
from lpgd.status import warn

__all__ = ["ImplicitKKT", "is_linear_program"]


@dataclass(frozen=True)
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
    ``GradientInfo.doubt`` has the share of each answer that the solution's error may change.
    """

    rho: float = 0.0
    active_tolerance: float | None = None
    weakly_active: bool = True
    matrix_free: bool | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"has_kkt"})

    def __post_init__(self) -> None:
        if not 0 <= self.rho < np.inf:
            raise ValueError(f"rho is {self.rho}; it must be nonnegative and finite.")
        if self.active_tolerance is not None and not 0 <= self.active_tolerance < np.inf:
            raise ValueError(f"active_tolerance is {self.active_tolerance}; it must be finite, at least 0, or None.")

    @property
    def required(self) -> frozenset[str]:
        for_nodes = (self.active_tolerance, self.weakly_active, self.matrix_free) != (None, True, None)
        return self.needs | ({"is_smooth"} if for_nodes else set())

    def vjp(
        self,
        problem: Any,
        solution: Any,
        cotangent: Any,
        solver: BaseSolver,
        executor: Executor | None = None,
    ) -> tuple[Any, GradientInfo]:
        change, info = self.response(problem, solution, cotangent, executor)
        if isinstance(problem, SmoothProblem):
            return _in_inputs(problem, solution, change), info
        point = solution.point
        if self.rho == 0.0 and _is_still(problem, cotangent, change):
            info.notices["q"] = _ZERO_GRADIENT
        usable = solution.usable[:, None]
        x, y = (torch.where(usable, part, 0.0) for part in (point.x, point.y))
        d_upper = torch.where(point.z > 0, -change.z, 0.0)
        d_lower = torch.where(point.z < 0, -change.z, 0.0)
        return problem.bilinear_gradient(change.x, change.y, x, y, d_lower, d_upper), info

    def jvp(
        self,
        problem: Any,
        solution: Any,
        tangent: Any,
        solver: BaseSolver,
        executor: Executor | None = None,
    ) -> tuple[Any, GradientInfo]:
        return self.response(problem, solution, problem.mixed_product(solution.point, tangent), executor)

    def is_differentiable(self, problem: Any) -> bool:
        """Of declarative nodes it is."""
        return isinstance(problem, SmoothProblem)

    def differentiable_vjp(self, solution: SmoothSolution, data: Any, outputs: Any, cotangent: Any) -> Any:
        """The bordered system and the vjp of the optimality conditions as functions of data, minimisers and cotangent.

        Raises:
            RuntimeError: systems that are singular, or too large to be formed.
        """
        whole = solution.traced(data, outputs)
        elements = whole.usable.nonzero()[:, 0].tolist()
        rows = torch.as_tensor(elements, dtype=torch.int64, device=whole.problem.device)
        own, tilt = whole.select(elements), SmoothPoint(cotangent.x, *(0.0 * part for part in whole.point[1:]))
        if self.matrix_free or is_large(own.problem, own.point):
            raise RuntimeError(
                f"{self}: second derivatives need the matrix of the optimality conditions, which is too large here, or "
                "switched off by matrix_free=True: detach the gradient."
            )
        binding, _ = self._active(own.problem, own.point)
        change, exact = bordered_response(own.problem, own.point, tilt.select(rows), binding, self.rho, False)
        if not exact.all():
            singular = [element for element, fine in zip(elements, exact.tolist(), strict=True) if not fine]
            raise RuntimeError(
                f"{self}: the optimality conditions of elements {singular[:10]} are singular, and have no second "
                "derivative: give rho > 0, or detach the gradient."
            )
        return whole.problem.scatter(elements, own.problem.directional_gradient(own.point, change))

    def response(
        self, problem: Any, solution: Any, tilt: Any, executor: Executor | None = None
    ) -> tuple[Any, GradientInfo]:
        """The derivative of the solution along a tilt ``<g, point>`` of the Lagrangian, (B, ·) each.

        Conic programs are in :mod:`lpgd.gradients.implicit_conic`.
        """
        info = GradientInfo.blank(self, solution)
        active = relevant_elements(solution, tilt)
        if isinstance(problem, SmoothProblem):
            return self._respond_smooth(problem, solution, tilt, active, info), info
        return conic_response(self, problem, solution, tilt, active, info, executor), info

    def _record_regularised(self, regularised: list[int], info: GradientInfo) -> None:
        info.fallbacks = regularised
        if regularised:
            warn(
                f"{self}: the optimality conditions of elements {regularised[:10]} are singular (degenerate or "
                "non-unique solutions, or redundant equalities); their gradients are minimum-norm answers. "
                "rho > 0, or LPGD with a finite tau, is well defined there."
            )

    def _respond_smooth(
        self,
        problem: SmoothProblem,
        solution: SmoothSolution,
        tilt: SmoothOutput | SmoothPoint,
        active: list[int],
        info: GradientInfo,
    ) -> SmoothPoint:
        """The response of a batch of a node's problems, all at once; other elements' is zero."""
        whole = solution.point
        change = SmoothPoint(*(torch.zeros_like(part) for part in whole))
        if not active:
            return change
        rows = torch.as_tensor(active, dtype=torch.int64, device=problem.device)
        tilt = change._replace(**tilt._asdict()).select(rows)
        part, point = problem.select(active), whole.select(rows)
        if not part.node.is_exact and self.active_tolerance is None:  # with it a user knows of a rough solver
            _check_stationary(part, point, active)
        binding, one_sided = self._active(part, point)
        response, exact = bordered_response(part, point, tilt, binding, self.rho, self.matrix_free)
        regularised = []
        for element, regular, weak in zip(active, exact.tolist(), one_sided.tolist(), strict=True):
            kind = "implicit, one-sided" if weak else "implicit"
            info.used[element] = kind if regular else "implicit, regularised"
            if not regular:
                regularised.append(element)
        self._record_regularised(regularised, info)
        for own, moved in zip(change, response, strict=True):
            own[rows] = moved
        return change

    def _active(self, problem: SmoothProblem, point: SmoothPoint) -> tuple[Tensor, Tensor]:
        """Inequalities that are active, and (B,) whether one of an element's has a multiplier of zero."""
        if not point.lam.shape[-1]:
            return torch.zeros_like(point.lam, dtype=torch.bool), point.x.new_zeros(len(point.x), dtype=torch.bool)
        _, unit = problem.in_units(point.x)
        lam = point.lam / unit
        active = active_rows(problem, point.x, lam, self.active_tolerance)
        weak = active & (lam <= torch.finfo(lam.dtype).eps ** 0.5 * (1 + lam.amax(-1, keepdim=True)))
        return active if self.weakly_active else active & ~weak, weak.any(-1)


NOT_STATIONARY = 0.01
"""An approximate solver may leave so much; it is of the order of the error of y relative to ``1 + max|y|``."""


def _check_stationary(problem: SmoothProblem, point: SmoothPoint, elements: list[int]) -> None:
    """Warn about points that are no solutions: the derivative of the optimality conditions says nothing of them."""
    _, unit = problem.in_units(point.x)
    left = (problem.gradient(point) / unit).abs()
    if not left.shape[-1]:
        return
    left = torch.where(left.isfinite(), left, 0)  # infinite derivatives are refused elsewhere
    bad = left.amax(-1) > NOT_STATIONARY * (1 + point.x.abs().amax(-1))
    if bad.any():
        named = [element for element, wrong in zip(elements, bad.tolist(), strict=True) if wrong]
        warn(
            f"the solutions of {problem.node.name} for elements {named[:10]} do not satisfy the optimality conditions, "
            "so implicit differentiation says nothing of them: its solver ended too early, or elsewhere, or the "
            "objective is not smooth there (LPGD needs no smoothness)."
        )


def _in_inputs(problem: SmoothProblem, solution: SmoothSolution, change: SmoothPoint) -> Any:
    """What a change of the solutions is worth in the inputs of a node; elements without a solution get zero."""
    usable = solution.usable
    if usable.all():
        return problem.directional_gradient(solution.point, change)
    rows = usable.nonzero()[:, 0]
    elements = rows.tolist()
    part = problem.select(elements).directional_gradient(solution.point.select(rows), change.select(rows))
    return problem.scatter(elements, part)


_ZERO_GRADIENT = (
    "the exact gradient of this linear program with respect to its cost is zero: its solution is a vertex, which does "
    "not move with small changes of the cost. LPGD with a finite tau gives a gradient that teaches."
)


def is_linear_program(problem: Any) -> bool:
    """Whether this is a linear program, whose exact gradient with respect to its cost is zero at a vertex."""
    if not isinstance(problem, ConicProblem):
        return False
    return problem.structure.cones.is_polyhedral and not problem.structure.quadratic.nnz


def _is_still(problem: ConicProblem, cotangent: ConicPoint, change: ConicPoint) -> bool:
    """Whether this is a linear program whose solution does not move with its cost, though the loss would like it to."""
    if not is_linear_program(problem) or problem.batch_size == 0 or cotangent.y.any():
        return False
    size = cotangent.x.abs().amax()
    return bool(size > 0 and change.x.abs().amax() <= 1e-9 * size)
