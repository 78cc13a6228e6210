"""Small steps of LPGD on declarative nodes: whether their differences are derivatives, and the exact ones where not.

Two ways are told, for elements along whose step functions are smooth.  Rounding: both solutions have rounding errors of
their size, and the difference may be smaller, or what the data see of it.  Curvature: a step that is small beside y may
be long beside what the objective is made of, as pooled numbers of 1e6 are by a penalty that bends within 1.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lpgd.arrays import as_index, integers
from lpgd.gradients.base import GradientInfo, GradientMethod
from lpgd.gradients.rounding import random_signs, share_of_rounding, within
from lpgd.problems.base import Data, Point, maximum_norm
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.node.structure import NodePoint
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver

__all__ = ["with_exact", "without_derivative"]

DROWNED = 2e-5
"""Differences of which one draw of rounding errors takes this share are left: other draws take more."""
BENT = 1e-4
"""A response that satisfies the linearised optimality conditions up to this share of the tilt is one of first order."""


def without_derivative(
    solution: AnySolution,
    cotangent: Point,
    rho: float,
    elements: list[int],
    ends: tuple[Point, Point],
    weight: Tensor,
    gradient: Data,
) -> list[int]:
    """The elements of a node whose difference of perturbed solutions says too little of their derivative.

    Args:
        solution: of the whole batch.
        cotangent: (B, ·).
        rho: of the augmentation.
        elements: E elements that have a difference.
        ends: perturbed solutions, plus and minus, (E, ·) each.
        weight: (E,) the difference is ``weight (plus - minus)``; zero for those that are not looked at.
        gradient: their gradient by this difference.
    """
    if solution.problem.traits.conditions != "node" or not bool(weight.any()):
        return []
    index = as_index(elements, solution.x.device)
    chosen, tilt = cast(NodeSolution, solution), cotangent
    if len(elements) < solution.batch_size:
        chosen, tilt = chosen.select(index), cotangent.select(index)
    lost = (weight > 0) & _is_no_derivative(chosen, tilt, rho, ends, weight, gradient)
    return integers(index[lost])


def _is_no_derivative(
    solution: NodeSolution, cotangent: Point, rho: float, ends: tuple[Point, Point], weight: Tensor, gradient: Data
) -> Tensor:
    """(E,) whether rounding or curvature took the difference; arguments are those of :func:`without_derivative`."""
    problem = solution.problem
    base, (plus, minus), weight = solution.point, ends, weight.to(cotangent.x.dtype)[:, None]
    change, middle, of_change, of_middle = (
        NodePoint(*(combine(turn, one, other) for turn, (one, other) in enumerate(zip(plus, minus, strict=True))))
        for combine in (
            lambda _, one, other: weight * (one - other),
            lambda _, one, other: 0.5 * (one + other),
            lambda turn, one, other: weight * _error(one, other, 3 + turn),
            lambda turn, one, other: 0.5 * _error(one, other, turn),
        )
    )
    drowned = share_of_rounding(problem, gradient, (middle, of_middle), (change, of_change), cotangent.x)
    drowned = drowned > within(DROWNED, drowned.dtype)
    left = problem.hessian_product(base)(change.x) + rho * change.x + cotangent.x.to(change.x.dtype)
    multipliers = torch.cat([change.nu, change.lam], -1)
    if multipliers.shape[-1]:
        left = left + problem.jacobian_product(base.x)(multipliers)
    return drowned | (maximum_norm(left) > within(BENT, left.dtype) * maximum_norm(cotangent.x))


def _error(one: Tensor, other: Tensor, turn: int) -> Tensor:
    """Rounding errors of two numbers together."""
    return torch.finfo(one.dtype).eps * (one.abs() + other.abs()) * random_signs(one, turn)


def with_exact(
    method: GradientMethod,
    gradient: Data,
    elements: list[int],
    info: GradientInfo,
    solution: AnySolution,
    cotangent: Point,
    solver: AnySolver,
) -> Data:
    """The gradient of a batch with that of an exact method for these elements, on record."""
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
