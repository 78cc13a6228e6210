"""The end of a constrained solve: Newton's method on a node's optimality conditions, from near a solution.

Active rows are those with ``λ > -g`` (the primal-dual active set method, which is sequential quadratic programming near
a solution).  It converges quadratically, but only from near, and to any stationary point: whether one is a minimiser is
asked of the curvature along its active constraints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.problems.base import maximum_norm
from lpgd.problems.node.multipliers import LARGE
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.bordered import bordered_response
from lpgd.solvers.node.sparse import Sparsity, curves_up, read_matrices
from lpgd.status import Status

__all__ = ["ConstrainedResult", "is_minimiser", "polish", "polish_nearby", "precision_of", "relative_residual"]

NEAR = 0.1
"""So long, relative to 1 + max|x|, a first step of Newton's method may be that leads to the solution next to it."""


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
    return polish_nearby(problem, point, max_iterations, sparsity)[0]


def polish_nearby(
    problem: NodeProblem, point: NodePoint, max_iterations: int = 30, sparsity: Sparsity | None = None
) -> tuple[ConstrainedResult, Tensor]:
    """As :func:`polish`, and (B,) whether it is the solution next to the start, and no other.

    That is so where each step is at most half as long as the last one, and the first one short (Kantorovich).
    """
    problem, unit = problem.in_units(point.x)
    every = problem
    point = NodePoint(point.x.clone(), point.nu / unit, point.lam / unit)
    whole = NodePoint(*(tensor.clone() for tensor in point))
    size, _ = relative_residual(problem, point)
    best = size.clone()
    running = torch.arange(size.shape[0], device=size.device)
    iterations = torch.zeros_like(running)
    patience = torch.full_like(running, 3)
    precision = precision_of(size)
    reach = 1 + maximum_norm(point.x)
    steady, shortest = torch.ones_like(size, dtype=torch.bool), NEAR * reach
    for _ in range(max_iterations):
        if not len(running) or is_over():
            break
        active = _active(problem, point)
        _, residual = relative_residual(problem, point)
        change, _ = bordered_response(problem, point, residual, active, sparsity=sparsity)
        lam = torch.where(active, point.lam + change.lam, 0)
        point = NodePoint(point.x + change.x, point.nu + change.nu, lam)
        iterations[running] += 1
        step = maximum_norm(change.x)
        steady[running] &= (step <= shortest[running]) | (step <= precision * reach[running])
        shortest[running] = 0.5 * step
        size, _ = relative_residual(problem, point)
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
        fine[unsure] = (
            relative_residual(unsure_problem, unsure_point, _rounding(unsure_problem, unsure_point))[0] <= precision
        )
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


def precision_of(like: Tensor) -> float:
    """What residuals, relative to their terms, come down to in the precision of a tensor."""
    return torch.finfo(like.dtype).eps ** 0.6


def _active(problem: NodeProblem, point: NodePoint) -> Tensor:
    return point.lam > -problem.constraints(point.x)[1]


def _rounding(problem: NodeProblem, point: NodePoint) -> Tensor:
    """(B, n) what the rounding of x alone does to ``∇L``: much at the end of a domain, as of ``log(1 - y)`` near 1."""
    sizes = problem.hessian(point).abs() @ point.x.abs()[..., None]
    return 4 * torch.finfo(point.x.dtype).eps * torch.where(torch.isfinite(sizes[..., 0]), sizes[..., 0], 0)


def relative_residual(
    problem: NodeProblem, point: NodePoint, rounding: Tensor | None = None
) -> tuple[Tensor, NodePoint]:
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
