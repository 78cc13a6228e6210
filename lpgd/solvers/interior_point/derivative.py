"""Implicit differentiation of linear and quadratic programs, for all elements of a batch in one factorisation.

The system of :mod:`lpgd.solvers.kkt.system` for zero and nonnegative cones, with the active rows C of A and the
variables that are not at a bound,

    [ P + ρI   Cᵀ ] [dx]     [ g_x ]
    [ C        0  ] [u ] = - [ g_y ]

is that of :mod:`lpgd.solvers.interior_point.equality_system`.  Elements whose residual stays large, or for which a
fixed random right-hand side shows that the system is nearly singular, are left to the method that takes one at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy, random_direction
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint
from lpgd.solvers.interior_point.box_program import BoxProgram, Scaling
from lpgd.solvers.interior_point.equality_system import EqualitySystem, KeptSystem, equality_program, equality_system
from lpgd.solvers.interior_point.newton_system import Precision, newton_system

__all__ = ["is_batchable", "kept_response", "polyhedral_response"]

DENSE_LIMIT = 4000
"""Systems up to this size are formed on an accelerator."""
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


def kept_response(
    problem: ConicProblem, point: ConicPoint, tilt: ConicPoint, kept: KeptSystem
) -> tuple[ConicPoint, Tensor]:
    """The same by a system that the solver has left, for its elements."""
    whole = torch.equal(kept.elements, torch.arange(problem.batch_size, device=problem.device))
    if not whole:
        problem, point, tilt = problem.select(kept.elements), point.select(kept.elements), tilt.select(kept.elements)
    response, exact = _response(problem, point, tilt, 0.0, kept.system, kept.row_scale)
    return response, exact & kept.valid


def polyhedral_response(
    problem: ConicProblem, point: ConicPoint, slack: Tensor, tilt: ConicPoint, rho: float
) -> tuple[ConicPoint, Tensor]:
    """The derivative of the solution along a tilt, and (B,) for which elements it is exact."""
    lower, upper = problem.full_bounds()
    at_bound = (point.z > upper - point.x) | (-point.z > point.x - lower) | (lower >= upper)
    active = point.y > slack
    active[:, : problem.structure.cones.zero] = True
    program, row_scale = _program(problem, rho, ~at_bound)
    return _response(
        problem, point, tilt, rho, equality_system(program, active, newton_system(program), Precision.SINGLE), row_scale
    )


def _response(
    problem: ConicProblem, point: ConicPoint, tilt: ConicPoint, rho: float, system: EqualitySystem, row_scale: Tensor
) -> tuple[ConicPoint, Tensor]:
    program = system.program
    tilt = ConicPoint(*(tensor.to(point.x.dtype) for tensor in tilt))
    assert program.free is not None
    at_bound = program.free == 0
    fixed = torch.where(at_bound, -tilt.z, 0.0)

    def gradient(dx: Tensor, u: Tensor) -> Tensor:
        terms = problem.quadratic_product(dx) + problem.structure.constraint.rmatvec(problem.data.A, u)
        return terms + rho * dx

    moved = problem.structure.constraint.matvec(problem.data.A, fixed)
    right_x = -program.cost * (tilt.x + gradient(fixed, torch.zeros_like(point.y)))
    right_y = -row_scale * (tilt.y + moved)
    right_x = torch.stack([right_x, _probe(right_x)], 1)
    right_y = torch.stack([right_y, _probe(right_y)], 1)
    answer = system.solve(right_x, right_y)
    size = torch.cat([answer.x, answer.u], -1)[:, 1].norm(dim=-1)
    dx, u = answer.x[:, 0] + fixed, answer.u[:, 0] * row_scale / program.cost
    # The residual is that of the problem's own data, whatever the system was made from.
    slope = tilt.x + gradient(dx, u)
    row_error = tilt.y + problem.structure.constraint.matvec(problem.data.A, dx)
    left = torch.cat(
        [torch.where(at_bound, 0.0, program.cost * slope), torch.where(system.active, row_scale * row_error, 0.0)], 1
    )
    exact = (left.abs().amax(-1) <= RESIDUAL * answer.scale[:, 0]) & (size < NEARLY_SINGULAR)
    return ConicPoint(dx, u, torch.where(at_bound, -slope, 0.0)), exact


def _program(problem: ConicProblem, rho: float, free: Tensor) -> tuple[BoxProgram, Tensor]:
    """The scaled rows and quadratic without bounds, and the factors (·, m) of the rows."""
    size, n = problem.batch_size, problem.structure.n
    P, A, row_scale = Scaling.matrices(problem, problem.data.A.dtype)
    if P is None:
        P = None if rho == 0.0 else free.new_full((1, n), rho, dtype=A.dtype)
    elif rho:
        P = P + (rho if P.ndim == 2 else rho * torch.eye(n, dtype=P.dtype, device=P.device))
    nothing = A.new_zeros(size, 0)
    program = BoxProgram(
        P, nothing, nothing, A, nothing, problem.structure.cones.zero,
        upper=None, lower=None, bounded=None, free=None,
    )  # fmt: skip
    return equality_program(program, free.to(A.dtype)), row_scale


def _probe(like: Tensor) -> Tensor:
    """A fixed random direction, the same for every element."""
    return from_numpy(random_direction(like.shape[1]).copy()).to(like).expand(like.shape)
