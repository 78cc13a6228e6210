"""Small steps of LPGD on declarative nodes: whether their differences are derivatives, and the exact ones where not.

Two ways are told, for elements along whose step functions are smooth.  Rounding: both solutions have rounding errors of
their size, and the difference may be smaller, or what the data see of it.  Curvature: a step that is small beside y may
be long beside what the objective is made of, as pooled numbers of 1e6 are by a penalty that bends within 1.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lpgd.arrays import as_index
from lpgd.gradients.base import GradientInfo
from lpgd.gradients.closed_form import ClosedForm
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.gradients.rounding import both_gradients, random_signs, share_of_change, within
from lpgd.problems.base import Data, Point, maximum_norm
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.node.structure import NodePoint
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver

__all__ = ["difference", "with_exact"]

DROWNED = 2e-5
"""Differences of which one draw of rounding errors takes this share are left: other draws take more."""
BENT = 1e-4
"""A response that satisfies the linearised optimality conditions up to this share of the tilt is one of first order."""


def difference(
    problem: AnyProblem,
    solution: AnySolution,
    cotangent: Point,
    rho: float,
    elements: list[int],
    ends: tuple[Point, Point],
    weight: Tensor,
    smooth: Tensor,
) -> tuple[Data, Tensor]:
    """``weight (∇_w L(plus) - ∇_w L(minus))`` of E elements, and (E,) for which it says too little of a derivative.

    Of ``½|y - w|²`` with w = 1e8 the difference is one of numbers of that size, in which a small step of y has no
    digits.  The derivative at the middle has all of them, and differs by a term of third order: for nodes it is taken
    where functions are smooth along a small step, and doubted there.

    Args:
        problem: of E elements.
        solution: of the whole batch.
        cotangent: (B, ·).
        rho: of the augmentation.
        elements: the E elements, that have perturbed solutions.
        ends: these, plus and minus, (E, ·) each.
        weight: (E,).
        smooth: (E,) whose functions are smooth along a small step.
    """
    plus, minus = ends
    if problem.traits.conditions != "node" or not smooth.any():
        return problem.gradient_difference(plus, minus, weight), smooth & False
    if len(elements) < solution.batch_size:
        index = as_index(elements, solution.x.device)
        solution, cotangent = solution.select(index), cotangent.select(index)
    weights = torch.where(smooth, weight, 0.0)
    gradient, lost = _along(cast(NodeSolution, solution), cotangent, rho, ends, weights)
    if smooth.all():
        return gradient, lost
    others = problem.gradient_difference(plus, minus, torch.where(smooth, 0.0, weight))
    return gradient._make(one + other for one, other in zip(gradient, others, strict=True)), lost & smooth


def _along(
    solution: NodeSolution, cotangent: Point, rho: float, ends: tuple[Point, Point], weight: Tensor
) -> tuple[Data, Tensor]:
    """The derivative along the difference, and (E,) whether rounding or curvature took it."""
    problem, (plus, minus), weight = solution.problem, ends, weight.to(cotangent.x.dtype)[:, None]
    middle, change, of_middle, of_change = (
        NodePoint(*(combine(turn, one, other) for turn, (one, other) in enumerate(zip(plus, minus, strict=True))))
        for combine in (
            lambda _, one, other: 0.5 * (one + other),
            lambda _, one, other: weight * (one - other),
            lambda turn, one, other: 0.5 * _error(one, other, turn),
            lambda turn, one, other: weight * _error(one, other, 3 + turn),
        )
    )
    gradient, slope, other = both_gradients(problem, (middle, of_middle), (change, of_change))
    share = share_of_change(problem, gradient, other, cotangent.x, middle.x)
    left = slope + rho * change.x + cotangent.x.to(slope.dtype)
    bent = maximum_norm(left) > within(BENT, left.dtype) * maximum_norm(cotangent.x)
    return gradient, (weight[:, 0] > 0) & (bent | (share > within(DROWNED, share.dtype)))


def _error(one: Tensor, other: Tensor, turn: int) -> Tensor:
    """Rounding errors of two numbers together."""
    return torch.finfo(one.dtype).eps * (one.abs() + other.abs()) * random_signs(one, turn)


def with_exact(
    rho: float,
    gradient: Data,
    elements: list[int],
    info: GradientInfo,
    solution: AnySolution,
    cotangent: Point,
    solver: AnySolver,
) -> Data:
    """The gradient of a batch with that of an exact method for these elements, on record."""
    method = ClosedForm() if rho == 0.0 else ImplicitKKT(rho=rho)
    mask = torch.zeros(solution.batch_size, dtype=torch.bool, device=solution.x.device)
    mask[elements] = True
    chosen = cotangent._make(torch.where(mask[:, None], tensor, 0.0) for tensor in cotangent)
    exact, found = method.vjp(solution, chosen, solver)
    for element in elements:
        info.used[element] = found.used[element]
    info.fallbacks = sorted({*info.fallbacks, *elements})
    return gradient._make(
        torch.where(mask.reshape(-1, *(1,) * (one.ndim - 1)), other, one)
        for one, other in zip(gradient, exact, strict=True)
    )
