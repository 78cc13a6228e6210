"""The logarithmic barrier ([LEC] 2.10.5, 3.9): minimisers of ``f - μ Σ log(-g)  s.t.  h = 0``, smooth in the inputs.

Their multipliers ``λ = μ / -g`` satisfy the optimality conditions of the problem itself but for ``-λ g = μ``, and the
duality gap is r μ.  Its derivative exists where that of the solution has a kink.

[LEC] Gould, Lecture Notes on Differentiable Optimisation in Deep Learning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.solvers.node.constrained import method_of_multipliers, warm_point
from lpgd.solvers.node.descent import Descent
from lpgd.solvers.node.polish import ConstrainedResult, is_minimiser, polish
from lpgd.status import Status

__all__ = ["minimise_with_barrier"]

FIRST = 1.0
"""The first weight of the barrier, which falls to a tenth of itself until it is what was asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class _BarrierProblem(NodeProblem):
    """A problem whose inequalities are a barrier of its objective."""

    weight: float = 1.0

    def objective(self, x: Tensor, data: Sequence[Tensor] | None = None) -> Tensor:
        value = super().objective(x, data)
        logarithms = (-super().constraints(x, data)[1]).log().sum(-1)
        return value - self.weight * (logarithms if self.unit is None else logarithms / self.unit[:, 0])

    def constraints(self, x: Tensor, data: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return super().constraints(x, data)[0], x.new_zeros(x.shape[0], 0)


@dataclass(frozen=True, eq=False)
class _Outside(AugmentedLagrangian):
    """``½ Σ max(0, g + margin)²``."""

    margin: float = 1.0

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * torch.relu(self.problem.constraints(x)[1] + self.margin).square().sum(-1)


def minimise_with_barrier(
    problem: NodeProblem, x: Tensor, weight: float, minimise: Callable[[AugmentedLagrangian, Tensor], Descent]
) -> ConstrainedResult:
    """Minimise with a barrier, whose weight falls to ``weight``; each problem starts from the last one's minimiser.

    A start that is not inside of all inequalities is moved there first; where that does not succeed, an element is
    INFEASIBLE: no interior was found.

    Args:
        problem: B elements.
        x: (B, n) where it starts.
        weight: μ > 0, in units of the objective.
        minimise: minimises a smooth function from a point.
    """
    x = _inside(problem, x, minimise)
    outside = ~(problem.constraints(x)[1] < 0).all(-1)
    attributes = {item.name: getattr(problem, item.name) for item in fields(NodeProblem)}
    current = max(FIRST, weight)
    status = torch.full(x.shape[:1], int(Status.SOLVED), device=x.device)
    iterations = torch.zeros_like(status)
    nu = torch.zeros_like(problem.constraints(x)[0])
    while True:
        barrier = _BarrierProblem(**attributes, weight=current)
        found = _minimise_one(barrier, x, minimise)
        iterations = iterations + found.iterations
        fine = (found.status == int(Status.SOLVED)) & torch.isfinite(found.point.x).all(-1)
        x = torch.where(fine[:, None], found.point.x, x)
        nu = torch.where(fine[:, None], found.point.nu, nu)
        if current <= weight:
            status = found.status
            break
        current = max(0.1 * current, weight)
    status = torch.where(outside, int(Status.INFEASIBLE), status)
    lam = weight / (-problem.constraints(x)[1])
    return ConstrainedResult(NodePoint(x, nu, lam), status, iterations)


def _minimise_one(
    problem: NodeProblem, x: Tensor, minimise: Callable[[AugmentedLagrangian, Tensor], Descent]
) -> ConstrainedResult:
    if problem.constraints(x)[0].shape[-1]:
        # Newton's method from the last weight's minimiser, where it stays inside and ends in a minimum.
        near = polish(problem, warm_point(problem, x))
        inside = torch.isfinite(problem.objective(near.point.x))
        fine = (near.status == int(Status.SOLVED)) & inside & is_minimiser(problem, near.point)
        failed = (~fine).nonzero()[:, 0]
        if len(failed):
            again = method_of_multipliers(problem.select(failed), x[failed], minimise)
            for tensor, new in zip(near.point, again.point, strict=True):
                tensor[failed] = new
            near.status[failed], near.iterations[failed] = again.status, near.iterations[failed] + again.iterations
        return near
    found = minimise(AugmentedLagrangian(problem), x)
    nothing = x.new_zeros(len(x), 0)
    return ConstrainedResult(NodePoint(found.x, nothing, nothing), found.status, found.iterations)


def _inside(problem: NodeProblem, x: Tensor, minimise: Callable[[AugmentedLagrangian, Tensor], Descent]) -> Tensor:
    """Points inside of all inequalities, by ever smaller margins, where there are any."""
    for margin in (1.0, 0.1, 1e-2, 1e-4, 1e-6):
        outside = (~(problem.constraints(x)[1] < 0).all(-1)).nonzero()[:, 0]
        if not len(outside):
            break
        moved = minimise(_Outside(problem.select(outside), margin=margin), x[outside]).x
        x = x.index_copy(0, outside, torch.where(torch.isfinite(moved), moved, x[outside]))
    return x
