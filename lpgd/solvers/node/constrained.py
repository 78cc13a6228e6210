"""Minimisers of batches of smooth problems with constraints: the method of multipliers, ended by Newton's method.

Newton's method on the optimality conditions (:mod:`lpgd.solvers.node.polish`) converges quadratically, but only from
near.  So that is where a warm start begins.  What it does not finish, and every cold start, is minimised by the method
of multipliers first: it descends, which Newton's method on optimality conditions does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.problems.node.multipliers import estimate_multipliers
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.solvers.node.descent import Descent
from lpgd.solvers.node.infeasibility import verdict
from lpgd.solvers.node.polish import (
    ConstrainedResult,
    is_minimiser,
    polish_nearby,
    precision_of,
    relative_residual,
)
from lpgd.solvers.node.sparse import Sparsity
from lpgd.status import Status

__all__ = ["Minimise", "method_of_multipliers", "warm_point"]

ENDLESS = 6
"""So many penalties, each ten times the last, on which an objective falls without limit: it is unbounded."""
HIGHEST = 1e12
"""The penalty beyond which there is no hope."""

Minimise = Callable[[AugmentedLagrangian, Tensor], Descent]


def method_of_multipliers(
    problem: NodeProblem,
    x: Tensor,
    minimise: Minimise,
    max_rounds: int = 40,
    sparsity: Sparsity | None = None,
) -> ConstrainedResult:
    """The method of multipliers, whose penalties grow where feasibility stalls, ended by Newton's method.

    Args:
        problem: B elements.
        x: (B, n) where it starts.
        minimise: minimises a smooth function from a point.
        max_rounds: changes of multipliers of an element.
        sparsity: patterns of the matrices, where they have few entries.
    """
    every, unit = problem.in_units(x)
    rounds = _Rounds.begin(every, x)
    point = NodePoint(x.clone(), rounds.point.nu, rounds.point.lam)
    status = torch.full_like(rounds.places, int(Status.ITERATION_LIMIT))
    result = ConstrainedResult(point, status, torch.zeros_like(rounds.places))
    for _ in range(max_rounds):
        if not len(rounds.places) or is_over():
            break
        taken = rounds.advance(minimise)
        result.iterations[rounds.places] += taken.descent.iterations
        solved = _solved_nearby(rounds, taken, result, sparsity)
        hopeless = ~solved & ((rounds.penalty > HIGHEST) | (rounds.endless >= ENDLESS))
        ends = torch.where(taken.is_unbounded, int(Status.UNBOUNDED), int(Status.NUMERICAL_ERROR))
        status[rounds.places[hopeless]] = ends[hopeless]
        left = rows_where(~(solved | hopeless))
        for tensor, new in zip(point, rounds.point, strict=True):
            tensor[rounds.places[left]] = new[left]
        if len(left) < len(solved):
            rounds = rounds.select(left)
    if len(rounds.places):
        stationary = relative_residual(rounds.problem, rounds.point)[0] <= precision_of(x) ** 0.5
        status[rounds.places] = torch.where(stationary, int(Status.INACCURATE), status[rounds.places])
    lost = rows_where((status == int(Status.NUMERICAL_ERROR)) | (status == int(Status.ITERATION_LIMIT)))
    if len(lost) and not is_over():
        answer = verdict(every.select(lost), (x[lost], point.x[lost]), minimise)
        proven = answer == int(Status.INFEASIBLE)
        status[lost] = torch.where(proven, answer, status[lost])
    return result._replace(point=NodePoint(point.x, unit * point.nu, unit * point.lam))


@dataclass(frozen=True)
class _Round:
    """What one round of R elements did.

    Attributes:
        descent: the minimisation of the augmented Lagrangian.
        change: (R,) the largest residual of the constraints, and of complementarity.
        usable: (R,) whether it found a point.
    """

    descent: Descent
    change: Tensor
    usable: Tensor

    @property
    def is_unbounded(self) -> Tensor:
        """(R,) whether the augmented Lagrangian falls without limit."""
        return self.descent.status == int(Status.UNBOUNDED)


@dataclass(eq=False)
class _Rounds:
    """The elements that still run.

    Attributes:
        problem, point: R elements, and their points and multipliers.
        places: (R,) of them in the batch.
        penalty: (R,) c of ``(c/2) |h|²``.
        violation: (R,) the change of the last round that found a point.
        endless: (R,) rounds, one after the other, that fell without limit.
    """

    problem: NodeProblem
    point: NodePoint
    places: Tensor
    penalty: Tensor
    violation: Tensor
    endless: Tensor

    @classmethod
    def begin(cls, problem: NodeProblem, x: Tensor) -> Self:
        """At x (B, n), with multipliers of zero, and penalties in the units of objective and constraints."""
        h, g = problem.constraints(x)
        slope = torch.func.grad(lambda x: problem.objective(x).sum())(x)
        # A penalty's curvature is that of long rows too: c |∇h|² is what the objective is weighed against.
        signs = torch.ones_like(torch.cat([h, g], -1))
        rows_squared = problem.jacobian_product(x)(signs).square().sum(-1) / signs.shape[-1]
        penalty = 10 * slope.abs().amax(-1).clamp(1e-2, 1e4) / rows_squared.clamp(min=1)
        places = torch.arange(x.shape[0], device=x.device)
        point = NodePoint(x, torch.zeros_like(h), torch.zeros_like(g))
        return cls(problem, point, places, penalty, torch.full_like(penalty, torch.inf), torch.zeros_like(places))

    def advance(self, minimise: Minimise) -> _Round:
        """Minimise the augmented Lagrangian once more; multipliers and penalties by what is left of the constraints."""
        lagrangian = AugmentedLagrangian(self.problem, self.point.nu, self.point.lam, self.penalty)
        descent = minimise(lagrangian, self.point.x)
        falls = descent.status == int(Status.UNBOUNDED)
        self.endless = torch.where(falls, self.endless + 1, 0)
        usable = torch.isfinite(descent.x).all(-1) & ~falls
        x, c = torch.where(usable[:, None], descent.x, self.point.x), self.penalty[:, None]
        h, g = self.problem.constraints(x)
        lam = torch.relu(self.point.lam + c * g)
        change = torch.cat([h, (lam - self.point.lam) / c], -1).abs().amax(-1)
        self.point = NodePoint(x, self.point.nu + c * h, lam)
        slow = ~(change <= 0.25 * self.violation) | ~usable
        self.violation = torch.where(usable, change, self.violation)
        self.penalty = torch.where(slow, 10 * self.penalty, self.penalty)
        return _Round(descent, change, usable)

    def select(self, left: Tensor) -> Self:
        """Some of the elements."""
        return type(self)(
            self.problem.select(left),
            self.point.select(left),
            self.places[left],
            self.penalty[left],
            self.violation[left],
            self.endless[left],
        )


def _solved_nearby(rounds: _Rounds, taken: _Round, result: ConstrainedResult, sparsity: Sparsity | None) -> Tensor:
    """(R,) elements that Newton's method solves from where a round ended; the result has their minimisers."""
    solved, x = torch.zeros_like(taken.usable), rounds.point.x
    near = rows_where(taken.usable & (taken.change < 1e-2 * (1 + x.abs().amax(-1))))
    if not len(near):
        return solved
    problem = rounds.problem.select(near)
    answer, steady = polish_nearby(problem, rounds.point.select(near), sparsity=sparsity)
    result.iterations[rounds.places[near]] += answer.iterations
    moved = (answer.point.x - x[near]).abs().amax(-1)
    reach = precision_of(x) ** 0.5 * (1 + x[near].abs().amax(-1))
    close = steady | (moved <= 10 * taken.change[near] + reach)
    fine = (answer.status == int(Status.SOLVED)) & close & is_minimiser(problem, answer.point, sparsity)
    polished = near[fine]
    for tensor, new in zip(result.point, answer.point, strict=True):
        tensor[rounds.places[polished]] = new[fine]
    result.status[rounds.places[polished]] = int(Status.SOLVED)
    solved[polished] = True
    return solved


def warm_point(problem: NodeProblem, x: Tensor) -> NodePoint:
    """A start with the multipliers that fit it best."""
    return NodePoint(x, *estimate_multipliers(problem, x))
