"""The evidence that constraints have no solution: a point whose violation is positive and does not fall any further."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.problems.base import maximum_norm
from lpgd.problems.node.problem import NodeProblem
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.solvers.node.descent import Descent
from lpgd.status import Status

__all__ = ["verdict"]

FLAT = 1e-3
"""Of the violation, which the slope at most promises to take away within the distance ``1 + |x|``."""


@dataclass(frozen=True, eq=False)
class _Violation(AugmentedLagrangian):
    """``½ |h|² + ½ |max(0, g)|²``."""

    def value(self, x: Tensor) -> Tensor:
        h, g = self.problem.constraints(x)
        return 0.5 * torch.cat([h, torch.relu(g)], -1).square().sum(-1)


def verdict(
    problem: NodeProblem, points: tuple[Tensor, ...], minimise: Callable[[AugmentedLagrangian, Tensor], Descent]
) -> Tensor:
    """(B,) values of Status of elements that were not solved: INFEASIBLE with evidence, else NUMERICAL_ERROR.

    An element is INFEASIBLE where none of the points satisfies the constraints, and neither does a stationary point of
    the violation, found from the last of them.  That is a proof where the violation is convex; elsewhere the evidence
    is that of the neighbourhood.  That a solver makes no progress is none.

    Args:
        problem: B elements.
        points: (B, n) each: the start, and where a solver ended.
        minimise: minimises a smooth function from a point.
    """
    enough = torch.finfo(points[0].dtype).eps ** 0.3
    feasible = torch.stack([_worst(problem, x) <= enough * (1 + maximum_norm(x)) for x in points]).any(0)
    answer = torch.full(feasible.shape, int(Status.NUMERICAL_ERROR), device=feasible.device)
    elements = rows_where(~feasible & torch.isfinite(points[-1]).all(-1))
    if not len(elements):
        return answer
    chosen = problem.select(elements)
    function = _Violation(chosen)
    x = minimise(function, points[-1][elements]).x
    left, slope, reach = function.value(x), maximum_norm(function.gradient(x)), 1 + maximum_norm(x)
    # Written so that NaN is no evidence.
    proven = (_worst(chosen, x) > enough * reach) & (slope * reach <= FLAT * left)
    answer[elements[proven]] = int(Status.INFEASIBLE)
    return answer


def _worst(problem: NodeProblem, x: Tensor) -> Tensor:
    h, g = problem.constraints(x)
    return maximum_norm(torch.cat([h, torch.relu(g)], -1))
