"""Minimisers of batches of smooth problems with constraints: augmented Lagrangians, and Newton's method at the end.

Newton's method on the optimality conditions, whose active rows are those with ``λ > -g`` (the primal-dual active set
method, which is sequential quadratic programming near a solution), converges quadratically, but only from near.  So
that is where a warm start begins.  What it does not finish, and every cold start, is minimised by the method of
multipliers first: it descends, which Newton's method on optimality conditions does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.problems.base import maximum_norm
from lpgd.problems.node.multipliers import LARGE, estimate_multipliers
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.solvers.node.bordered import bordered_response
from lpgd.solvers.node.descent import Descent
from lpgd.solvers.node.infeasibility import verdict
from lpgd.solvers.node.sparse import Sparsity, curves_up, read_matrices
from lpgd.status import Status

__all__ = ["ConstrainedResult", "Minimise", "is_minimiser", "method_of_multipliers", "polish", "warm_point"]

ENDLESS = 6
"""So many penalties, each ten times the last, on which an objective falls without limit: it is unbounded."""

NEAR = 0.1
"""So long, relative to 1 + max|x|, a first step of Newton's method may be that leads to the solution next to it."""

Minimise = Callable[[AugmentedLagrangian, Tensor], Descent]


class ConstrainedResult(NamedTuple):
    """The result of a constrained solve.

    Attributes:
        point: (B, ·) the last points and multipliers.
        status: (B,) values of Status.
        iterations: (B,) systems that were solved.
    """

    point: NodePoint
    status: Tensor
    iterations: Tensor


def polish(
    problem: NodeProblem, point: NodePoint, max_iterations: int = 30, sparsity: Sparsity | None = None
) -> ConstrainedResult:
    """Newton's method on the optimality conditions, from near a solution.

    Args:
        problem: B elements.
        point: minimisers and multipliers to start from.
        max_iterations: of an element.
        sparsity: patterns of the matrices, where they have few entries.

    Returns:
        The best points; an element is SOLVED where the residuals of its optimality conditions, relative to their
        terms, are below the 0.6th power of the precision, and stay there or fall no more.
    """
    return _polished(problem, point, max_iterations, sparsity)[0]


def _polished(
    problem: NodeProblem, point: NodePoint, max_iterations: int = 30, sparsity: Sparsity | None = None
) -> tuple[ConstrainedResult, Tensor]:
    """The same, and (B,) whether it is the solution next to the start, and no other.

    That is so where each step is at most half as long as the last one, and the first one short (Kantorovich).
    """
    problem, unit = problem.in_units(point.x)
    every = problem
    point = NodePoint(point.x.clone(), point.nu / unit, point.lam / unit)
    whole = NodePoint(*(tensor.clone() for tensor in point))
    size, _ = _residual(problem, point)
    best = size.clone()
    running = torch.arange(size.shape[0], device=size.device)
    iterations = torch.zeros_like(running)
    patience = torch.full_like(running, 3)
    precision = torch.finfo(size.dtype).eps ** 0.6
    reach = 1 + maximum_norm(point.x)
    steady, shortest = torch.ones_like(size, dtype=torch.bool), NEAR * reach
    for _ in range(max_iterations):
        if not len(running) or is_over():
            break
        active = _active(problem, point)
        _, residual = _residual(problem, point)
        change, _ = bordered_response(problem, point, residual, active, sparsity=sparsity)
        lam = torch.where(active, point.lam + change.lam, 0)
        point = NodePoint(point.x + change.x, point.nu + change.nu, lam)
        iterations[running] += 1
        step = maximum_norm(change.x)
        steady[running] &= (step <= shortest[running]) | (step <= precision * reach[running])
        shortest[running] = 0.5 * step
        size, _ = _residual(problem, point)
        better = size < best[running]
        halved = size < 0.5 * best[running]
        chosen = running[better]
        for tensor, new in zip(whole, point, strict=True):
            tensor[chosen] = new[better]
        best[chosen] = size[better]
        # Changes of the active set may raise the residual for an iteration or two.
        patience[running] = torch.where(halved, 3, patience[running] - 1)
        finished = (patience[running] <= 0) | ~torch.isfinite(size) | (best[running] == 0)
        finished = finished | (~halved & (best[running] < precision))
        if finished.any():
            left = rows_where(~finished)
            running, point, problem_left = running[left], point.select(left), problem.select(left)
            problem = problem_left
    fine = best <= precision
    unsure = rows_where(~fine & torch.isfinite(best))
    if len(unsure) and sparsity is None and len(unsure) * whole.x.shape[-1] ** 2 <= LARGE:
        unsure_problem, unsure_point = every.select(unsure), whole.select(unsure)
        fine[unsure] = _residual(unsure_problem, unsure_point, _rounding(unsure_problem, unsure_point))[0] <= precision
    whole = NodePoint(whole.x, unit * whole.nu, unit * whole.lam)
    status = torch.where(fine, int(Status.SOLVED), int(Status.NUMERICAL_ERROR))
    return ConstrainedResult(whole, status, iterations), steady


def is_minimiser(problem: NodeProblem, point: NodePoint, sparsity: Sparsity | None = None) -> Tensor:
    """(B,) no negative curvature along the active constraints; True for all where that would take large matrices."""
    size, n = point.x.shape
    if sparsity is not None:
        keep = torch.cat([torch.ones_like(point.nu, dtype=torch.bool), point.lam > 0], -1)
        values = read_matrices(problem, point, sparsity)
        if values is not None:
            return torch.as_tensor(curves_up(values, keep.cpu().numpy())).to(point.x.device)
    if size * n**2 > LARGE:
        return torch.ones(size, dtype=torch.bool, device=point.x.device)
    hessian = problem.hessian(point)
    finite = torch.isfinite(hessian).all(-1).all(-1)
    hessian = torch.where(finite[:, None, None], hessian, 0)
    keep = torch.cat([torch.ones_like(point.nu, dtype=torch.bool), point.lam > 0], -1)
    jacobian = problem.jacobian(point.x) * keep[..., None]
    jacobian = jacobian / jacobian.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(hessian.dtype).tiny)
    scale = hessian.abs().amax((-1, -2)).clamp(min=torch.finfo(hessian.dtype).tiny)
    # Directions that leave the constraints become so steep that only those along them can be negative.
    eps = torch.finfo(hessian.dtype).eps
    steep = hessian / scale[:, None, None] + eps**-0.3 * jacobian.mT @ jacobian
    finite = finite & torch.isfinite(jacobian).all(-1).all(-1)
    steep = torch.where(finite[:, None, None], steep, 0)
    return finite & (linalg.eigvalsh(steep).amin(-1) >= -10 * eps**0.3)


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
    h, g = problem.constraints(x)
    size = x.shape[0]
    problem, unit = problem.in_units(x)
    start, every = x, problem
    whole = NodePoint(x.clone(), torch.zeros_like(h), torch.zeros_like(g))
    point = whole
    status = torch.full((size,), int(Status.ITERATION_LIMIT), device=x.device)
    iterations = torch.zeros(size, dtype=torch.int64, device=x.device)
    running = torch.arange(size, device=x.device)
    slope = torch.func.grad(lambda x: problem.objective(x).sum())(x)
    # A penalty's curvature is that of long rows too: c |∇h|² is what the objective is weighed against.
    signs = torch.ones_like(torch.cat([h, g], -1))
    rows_squared = problem.jacobian_product(x)(signs).square().sum(-1) / signs.shape[-1]
    penalty = 10 * slope.abs().amax(-1).clamp(1e-2, 1e4) / rows_squared.clamp(min=1)
    violation = torch.full_like(penalty, torch.inf)
    endless = torch.zeros_like(running)  # rounds, one after the other, that fell without limit
    precision = torch.finfo(x.dtype).eps ** 0.6
    for _ in range(max_rounds):
        if not len(running) or is_over():
            break
        descent = minimise(AugmentedLagrangian(problem, point.nu, point.lam, penalty), point.x)
        iterations[running] += descent.iterations
        endless = torch.where(descent.status == int(Status.UNBOUNDED), endless + 1, 0)
        usable = torch.isfinite(descent.x).all(-1) & (descent.status != int(Status.UNBOUNDED))
        x = torch.where(usable[:, None], descent.x, point.x)
        h, g = problem.constraints(x)
        c = penalty[:, None]
        lam = torch.relu(point.lam + c * g)
        change = torch.cat([h, (lam - point.lam) / c], -1).abs().amax(-1)
        point = NodePoint(x, point.nu + c * h, lam)
        slow = ~(change <= 0.25 * violation) | ~usable
        violation = torch.where(usable, change, violation)
        ready = usable & (change < 1e-2 * (1 + x.abs().amax(-1)))
        solved = torch.zeros_like(usable)
        near = rows_where(ready)
        if len(near):
            near_problem = problem.select(near)
            answer, steady = _polished(near_problem, point.select(near), sparsity=sparsity)
            moved = (answer.point.x - x[near]).abs().amax(-1)
            close = steady | (moved <= 10 * change[near] + precision**0.5 * (1 + x[near].abs().amax(-1)))
            iterations[running[near]] += answer.iterations
            fine = (answer.status == int(Status.SOLVED)) & close & is_minimiser(near_problem, answer.point, sparsity)
            polished = near[fine]
            for tensor, new in zip(whole, answer.point, strict=True):
                tensor[running[polished]] = new[fine]
            status[running[polished]] = int(Status.SOLVED)
            solved[polished] = True
        penalty = torch.where(slow, 10 * penalty, penalty)
        hopeless = ~solved & ((penalty > 1e12) | (endless >= ENDLESS))
        ended = solved | hopeless
        if ended.any() or not usable.all():
            unbounded = (descent.status == int(Status.UNBOUNDED))[hopeless]
            status[running[hopeless]] = torch.where(unbounded, int(Status.UNBOUNDED), int(Status.NUMERICAL_ERROR))
        left = rows_where(~ended)
        for tensor, new in zip(whole, point, strict=True):
            tensor[running[left]] = new[left]
        if ended.any():
            running, point, penalty, violation = running[left], point.select(left), penalty[left], violation[left]
            endless = endless[left]
            problem = problem.select(left)
    residual = _residual(problem, point)[0] if len(running) else penalty
    status[running] = torch.where(residual <= precision**0.5, int(Status.INACCURATE), status[running])
    lost = rows_where((status == int(Status.NUMERICAL_ERROR)) | (status == int(Status.ITERATION_LIMIT)))
    if len(lost) and not is_over():
        answer = verdict(every.select(lost), (start[lost], whole.x[lost]), minimise)
        proven = answer == int(Status.INFEASIBLE)
        status[lost] = torch.where(proven, answer, status[lost])
    whole = NodePoint(whole.x, unit * whole.nu, unit * whole.lam)
    return ConstrainedResult(whole, status, iterations)


def warm_point(problem: NodeProblem, x: Tensor) -> NodePoint:
    """A start with the multipliers that fit it best."""
    return NodePoint(x, *estimate_multipliers(problem, x))


def _active(problem: NodeProblem, point: NodePoint) -> Tensor:
    return point.lam > -problem.constraints(point.x)[1]


def _rounding(problem: NodeProblem, point: NodePoint) -> Tensor:
    """(B, n) what the rounding of x alone does to ``∇L``: much at the end of a domain, as of ``log(1 - y)`` near 1."""
    sizes = problem.hessian(point).abs() @ point.x.abs()[..., None]
    return 4 * torch.finfo(point.x.dtype).eps * torch.where(torch.isfinite(sizes[..., 0]), sizes[..., 0], 0)


def _residual(problem: NodeProblem, point: NodePoint, rounding: Tensor | None = None) -> tuple[Tensor, NodePoint]:
    """(B,) the residual relative to its terms, and the residuals of stationarity and of the constraints themselves.

    Of stationarity so much as rounding explains is left out of the first.
    """
    h, g = problem.constraints(point.x)
    slope = problem.gradient(point)
    multipliers = torch.cat([point.nu, point.lam], -1)
    terms = torch.ones_like(slope[:, 0]) if slope.shape[-1] else slope.sum(-1)
    if multipliers.shape[-1]:
        forces = problem.jacobian_product(point.x)(multipliers)
        terms = torch.maximum(terms, forces.abs().amax(-1))
    left = slope.abs() if rounding is None else torch.relu(slope.abs() - rounding)
    stationarity = left.amax(-1) / terms
    reach = 1 + point.x.abs().amax(-1)
    bad = [stationarity]
    if h.shape[-1]:
        bad.append(h.abs().amax(-1) / reach)
    if g.shape[-1]:
        gap = torch.minimum(-g, point.lam).abs()  # g ≤ 0, λ ≥ 0 and λ g = 0 in one
        bad.append(gap.amax(-1) / torch.maximum(reach, 1 + point.lam.amax(-1)))
    size = torch.stack(bad).amax(0)
    return torch.where(torch.isnan(size), torch.inf, size), NodePoint(slope, h, g)
