"""Implicit differentiation of linear and quadratic programs, for all elements of a batch in one factorisation.

The system of :mod:`lpgd.gradients.kkt` for zero and nonnegative cones, with the active rows C of A and the
variables that are not at a bound,

    [ P + ρI   Cᵀ ] [dx]     [ g_x ]
    [ C        0  ] [u ] = - [ g_y ]

is solved by the interior-point method's elimination, in which an active row has a small diagonal instead of 0 and an
inactive one a huge one, and refined against the system itself.  Elements whose residual stays large, or for which a
fixed random right-hand side shows that the system is nearly singular, are left to the method that takes one at a
time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpgd.problems.conic import ConicProblem
from lpgd.problems.structure import ConicPoint
from lpgd.solution import Solution
from lpgd.solvers.box_program import BoxProgram, Scaling
from lpgd.solvers.newton_system import newton_system

__all__ = ["is_batchable", "polyhedral_response"]

DENSE_LIMIT = 4000
"""Systems up to this size are formed on an accelerator."""
ACTIVE, INACTIVE = 1e-9, 1e30
"""The diagonal of an active and of an inactive row."""
REGULARIZATION = 1e-13
"""Relative regularisation of the factors."""
REFINEMENTS = 5
ENOUGH = 1e-13
"""The relative residual at which refinement ends."""
RESIDUAL = 1e-9
"""The relative residual, in scaled units, that counts as exact."""
NEARLY_SINGULAR = 1e7
"""The norm of the answer to a unit right-hand side from which on an element is left to the other method."""


def is_batchable(problem: ConicProblem, rho: float) -> bool:
    """Whether the whole batch is best differentiated at once: on an accelerator, or where a diagonal is eliminated."""
    structure = problem.structure
    if not structure.cones.is_polyhedral or not structure.n:
        return False
    if problem.device.type != "cpu":
        return structure.n + structure.m <= DENSE_LIMIT
    off_diagonal = bool(np.any(structure.quadratic.rows != structure.quadratic.columns))
    filled = structure.constraint.nnz > 0.2 * max(structure.m * structure.n, 1)
    return filled and rho > 0 and not off_diagonal and structure.m <= structure.n


def polyhedral_response(
    problem: ConicProblem, solution: Solution, tilt: ConicPoint, rho: float
) -> tuple[ConicPoint, Tensor]:
    """The derivative of the solution along a tilt, and (B,) for which elements it is exact."""
    point, e = solution.point, problem.structure.cones.zero
    tilt = ConicPoint(*(part.to(point.x.dtype) for part in tilt))
    lower, upper = problem.full_bounds()
    at_bound = (point.z > upper - point.x) | (-point.z > point.x - lower)
    active = point.y > solution.slack
    active[:, :e] = True
    fixed = torch.where(at_bound, -tilt.z, 0.0)

    def gradient(dx: Tensor, u: Tensor) -> Tensor:
        terms = problem.quadratic_product(dx) + problem.structure.constraint.rmatvec(problem.data.A, u)
        return terms + rho * dx

    program, row_scale, cost = _program(problem, rho, ~at_bound)
    h = torch.where(active[:, e:], ACTIVE, INACTIVE)
    factor = newton_system(program).factor(h, h.new_full((h.shape[0], 1), REGULARIZATION))
    moved = problem.structure.constraint.matvec(problem.data.A, fixed)
    right_x = -cost * (tilt.x + gradient(fixed, torch.zeros_like(point.y)))
    right_y = -row_scale * (tilt.y + moved)
    mask = active.to(right_y.dtype)[:, None]
    right_x = program.masked(torch.stack([right_x, _probe(right_x)], 1))
    right_y = torch.stack([right_y, _probe(right_y)], 1) * mask
    dx, u = torch.zeros_like(right_x), torch.zeros_like(right_y)
    left_x, left_y = right_x, right_y
    scale = error = torch.cat([right_x, right_y], -1)[:, 0].abs().amax(-1)
    for _ in range(REFINEMENTS):
        change_x, change_u = factor.solve(left_x, left_y)
        dx, u = dx + change_x, u + change_u * mask
        Px = program.quadratic(dx)
        left_x = right_x - program.transposed(u)
        left_x = left_x if Px is None else left_x - Px
        left_y = (right_y - program.rows(dx)) * mask
        error = torch.cat([left_x, left_y], -1)[:, 0].abs().amax(-1)
        if bool((error <= ENOUGH * scale).all()):
            break
    size = torch.cat([dx, u], -1)[:, 1].norm(dim=-1)
    exact = (error <= RESIDUAL * scale) & (size < NEARLY_SINGULAR)
    dx, u = dx[:, 0] + fixed, u[:, 0] * row_scale / cost
    return ConicPoint(dx, u, torch.where(at_bound, -(tilt.x + gradient(dx, u)), 0.0)), exact


def _program(problem: ConicProblem, rho: float, free: Tensor) -> tuple[BoxProgram, Tensor, Tensor]:
    """The scaled rows and quadratic without bounds, and the factors of rows (·, m) and of the objective (B, 1)."""
    size, n = problem.batch_size, problem.structure.n
    P, A, row_scale = Scaling.matrices(problem)
    if P is None:
        P = None if rho == 0.0 else free.new_full((1, n), rho, dtype=A.dtype)
    elif rho:
        P = P + (rho if P.ndim == 2 else rho * torch.eye(n, dtype=P.dtype, device=P.device))
    largest = torch.ones(1, dtype=A.dtype, device=A.device) if P is None else P.abs().flatten(1).amax(-1)
    cost = torch.where(largest > 0, 1.0 / largest, 1.0)[:, None].expand(size, 1)
    none = torch.zeros(0, dtype=torch.int64, device=A.device)
    program = BoxProgram(
        P, cost, A.new_zeros(size, n), row_scale[..., None] * A, A.new_zeros(size, A.shape[1]),
        problem.structure.cones.zero, upper=none, lower=none, bounded=None, free=free.to(A.dtype),
    )  # fmt: skip
    return program, row_scale, cost


def _probe(like: Tensor) -> Tensor:
    """A fixed random direction, the same for every element."""
    direction = np.random.default_rng(like.shape[1]).standard_normal(like.shape[1])
    direction /= max(np.linalg.norm(direction), 1e-300)
    return torch.from_numpy(direction).to(like).expand(like.shape)
