"""The bordered system of a node's optimality conditions, for a whole batch: by its matrix, or by products with it.

At a point with multipliers of ``L = f + νᵀh + λᵀg``, with A the derivative in y of h and of the rows of g that are
active ([DDN] eqs. 13 to 20; their form with ``H⁻¹`` needs H nonsingular, the system below does not), the change of the
solution under a tilt ``<c, z>`` of L solves

    [ ∇²_yy L + ρI   Aᵀ ] [dy]     [ c_y ]
    [ A              0  ] [dμ] = - [ c_μ ]

Newton's method on the optimality conditions is the same system, with their residual as c.  Inactive rows, and rows
whose derivative vanishes, are absent: dμ = 0.

Where the system is singular its pseudo-inverse answers.  With more constraints than variables, or dependent ones,
that is ``A dy = -C`` in the least-squares sense ([DDN] 4.7.3); in feasibility problems it is the least change that
keeps to the constraints ([DDN] 4.7.1).

[DDN] Gould, Hartley, Campbell: Deep Declarative Networks (arXiv 1909.04866).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import from_numpy, random_direction, rows_where
from lpgd.execution.threads import torch_threads
from lpgd.problems.node.multipliers import LARGE
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.minres import minres
from lpgd.solvers.node.sparse import Factors, Sparsity, read_matrices, solve_bordered

__all__ = ["bordered_response", "is_large", "response_and_noise"]


def is_large(problem: NodeProblem, point: NodePoint) -> bool:
    """Whether the matrices of a whole batch would take more than 2²⁶ numbers."""
    return problem.batch_size * sum(tensor.shape[-1] for tensor in point) ** 2 > LARGE


def bordered_response(
    problem: NodeProblem,
    point: NodePoint,
    tilt: NodePoint,
    active: Tensor,
    rho: float = 0.0,
    matrix_free: bool | None = None,
    sparsity: Sparsity | None = None,
    corner: Tensor | None = None,
) -> tuple[NodePoint, Tensor]:
    """The change of the solutions along a tilt, (B, ·) each, and (B,) whether their systems were regular.

    It is NaN where a derivative is not finite.

    Args:
        problem: B elements.
        point: minimisers and multipliers.
        tilt: (B, ·) each.
        active: (B, r) which rows of g count.
        rho: ρ ≥ 0, added to the Hessian.
        matrix_free: by products with the system only (MINRES); None: where matrices are large.
        sparsity: patterns of the matrices, where entries are few (:func:`~lpgd.solvers.node.sparse.find_sparsity`).
        corner: (B, p + r) what stands in the place of the zero block, times -1: of barriers ``-g/λ``; None is zero.
    """
    change, exact, _ = response_and_noise(
        problem, point, tilt, active, rho, matrix_free, sparsity, corner, with_noise=False
    )
    return change, exact


def response_and_noise(
    problem: NodeProblem,
    point: NodePoint,
    tilt: NodePoint,
    active: Tensor,
    rho: float = 0.0,
    matrix_free: bool | None = None,
    sparsity: Sparsity | None = None,
    corner: Tensor | None = None,
    *,
    with_noise: bool = True,
) -> tuple[NodePoint, Tensor, NodePoint]:
    """The answers of :func:`bordered_response`, and what rounding may have made of them, (B, ·) each.

    Matrices of second derivatives are sums that round, as ``AᵀA`` does.  Products of the same derivatives with the
    answer round otherwise, and leave a residual of that size: the noise is the system's answer to it.  It is zero where
    matrices are sparse or not formed, where systems are singular, and without ``with_noise``.
    """
    x, n, p = point.x, point.x.shape[-1], point.nu.shape[-1]
    keep = torch.cat([torch.ones_like(point.nu, dtype=torch.bool), active], -1)
    problem, unit = problem.in_units(x) if problem.unit is None else (problem, x.new_ones(len(x), 1))
    point = NodePoint(x, point.nu / unit, point.lam / unit)
    corner = torch.zeros_like(keep, dtype=x.dtype) if corner is None else corner * unit
    system = _System(problem, point, keep, rho / unit, corner, -torch.cat([tilt.x / unit, tilt.nu, tilt.lam], -1))

    def parted(answer: Tensor) -> NodePoint:
        return NodePoint(answer[:, :n], unit * answer[:, n : n + p], unit * answer[:, n + p :])

    if sparsity is not None and not matrix_free and not torch.is_grad_enabled():
        values = read_matrices(problem, point, sparsity)
        if values is not None:
            answer, exact = _sparse(values, system)
            singular = (~exact).nonzero()[:, 0]
            if len(singular):  # singular: the pseudo-inverse
                answer[singular], exact[singular], _ = _whole(system.select(singular), None, with_noise=False)
            return parted(answer), exact, parted(torch.zeros_like(answer))
    answer, exact, noise = _whole(system, matrix_free, with_noise=with_noise)
    return parted(answer), exact, parted(noise)


class _System(NamedTuple):
    """The systems of B elements, whose objectives are in units of their own.

    Attributes:
        problem, point: where the derivatives are taken.
        keep: (B, m) which rows of h and g count.
        damping: (B, 1) ρ.
        corner: (B, m) what stands in the place of the zero block, times -1.
        right: (B, n + m) the right sides.
    """

    problem: NodeProblem
    point: NodePoint
    keep: Tensor
    damping: Tensor
    corner: Tensor
    right: Tensor

    def select(self, elements: Tensor) -> _System:
        """Those of some elements."""
        return _System(
            self.problem.select(elements),
            self.point.select(elements),
            self.keep[elements],
            self.damping[elements],
            self.corner[elements],
            self.right[elements],
        )


def _whole(system: _System, matrix_free: bool | None, *, with_noise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Answers (B, n + m) without any structure, (B,) whether they are those of regular systems, and their noise."""
    problem, point = system.problem, system.point
    if is_large(problem, point) if matrix_free is None else matrix_free:
        answer, exact = minres(*_by_products(system))
        return answer, exact, torch.zeros_like(answer)
    return _dense(system, _by_products(system)[0] if with_noise else None)


def _sparse(values: Factors, system: _System) -> tuple[Tensor, Tensor]:
    """The same by a sparse factorisation of each element's system; one that is not regular is not exact."""
    from scipy.sparse import identity

    right, n, masks = system.right, system.point.x.shape[-1], system.keep.cpu().numpy()
    targets, corners, shifts = (
        tensor.detach().cpu().double().numpy() for tensor in (right, system.corner, system.damping[:, 0])
    )
    answers, exact = np.zeros_like(targets), np.zeros(len(targets), dtype=bool)
    for element, mask in enumerate(masks):
        hessian, jacobian = values.matrices(element, mask)
        if shifts[element]:
            hessian = hessian + shifts[element] * identity(n)
        chosen = np.concatenate([np.ones(n, dtype=bool), mask])
        found, exact[element] = solve_bordered(hessian, jacobian, targets[element][chosen], corners[element][mask])
        answers[element][chosen] = found
    return torch.as_tensor(answers).to(right), torch.as_tensor(exact).to(right.device)


def _matrices(system: _System) -> tuple[Tensor, Tensor]:
    """(B, n + m, n + m) with a one on the diagonal of absent rows, and (B, n + m) which rows are there."""
    x = system.point.x
    hessian = system.problem.hessian(system.point) + system.damping.expand_as(x).diag_embed()
    jacobian = system.problem.jacobian(x) * system.keep[..., None]
    present = jacobian.ne(0).any(-1)
    corner = torch.diag_embed(torch.where(present, -system.corner, 1.0))
    matrix = torch.cat([torch.cat([hessian, jacobian.mT], -1), torch.cat([jacobian, corner], -1)], -2)
    return matrix, torch.cat([torch.ones_like(x, dtype=torch.bool), present], -1)


def _dense(system: _System, product: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Answers (B, n + m), (B,) whether they are those of a regular system, and their noise by products with it."""
    matrix, counted = _matrices(system)
    eps, right = torch.finfo(matrix.dtype).eps, torch.where(counted, system.right, 0)
    # Equilibrated: what counts as singular shall not depend on the units of variables and constraints.
    weight = matrix.abs().amax(-1)
    weight = torch.where(weight > 0, weight, 1).rsqrt()
    scaled = weight[:, :, None] * matrix * weight[:, None]
    target = weight * right
    probe = from_numpy(random_direction(scaled.shape[-1]).copy()).to(scaled)
    both = torch.stack([target, probe.expand_as(target)], -1)
    # solve_ex takes no zero rows of a batch on every device: an empty batch has nothing to solve.
    if not scaled.shape[0] or not scaled.shape[-1]:
        return torch.zeros_like(right), right.new_ones(right.shape[0], dtype=torch.bool), torch.zeros_like(right)
    with torch_threads(1):  # see there what LU needs
        factors, pivots, failed = linalg.lu_factor_ex(scaled)
        answers = linalg.lu_solve(factors, pivots, both)
        answer = answers[..., 0]
        residual = target - linalg.matvec(scaled, answer)
        correction = linalg.lu_solve(factors, pivots, residual[..., None])[..., 0]
    exact = (failed == 0) & (answers[..., 1].norm(dim=-1) < 1e-3 / eps) & torch.isfinite(answer).all(-1)
    small = eps**0.6 * target.abs().amax(-1).clamp(min=torch.finfo(right.dtype).tiny)
    exact = exact & (residual.abs().amax(-1) <= small)
    answer = weight * torch.where(exact[:, None], answer + correction, 0)
    noise = torch.zeros_like(answer)
    if product is not None:
        residual = torch.where(counted, right - product(answer), 0)
        with torch_threads(1):
            noise = weight * linalg.lu_solve(factors, pivots, (weight * residual)[..., None])[..., 0]
        noise = torch.where(exact[:, None], noise, 0)
    singular = rows_where(~exact)
    if len(singular):
        answer[singular] = linalg.matvec(_pseudo_inverse(matrix[singular]), right[singular])
    return torch.where(counted, answer, 0), exact, noise


def _pseudo_inverse(matrices: Tensor) -> Tensor:
    """Of the matrices themselves: least norm in the units of the variables.  NaN where they are not finite."""
    eps = torch.finfo(matrices.dtype).eps
    finite = torch.isfinite(matrices).all(-1).all(-1)[:, None, None]
    matrices = torch.where(finite, matrices, 0)
    # Eigenvalues of 1e300 and more are not found: in a unit of its own, a power of two.
    exponent = torch.frexp(matrices.abs().amax((-2, -1), keepdim=True)).exponent
    inverse = linalg.pinv(torch.ldexp(matrices, -exponent), hermitian=True, rtol=matrices.shape[-1] * eps**0.75)
    return torch.where(finite, torch.ldexp(inverse, -exponent), torch.nan)


def _by_products(system: _System) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Products with the systems' matrices, and their right sides, without absent rows.

    MINRES solves them by these; an answer whose residual stays large is not exact.
    """
    problem, point, right = system.problem, system.point, system.right
    n, curve = point.x.shape[-1], problem.hessian_product(point)
    weight = system.keep.to(point.x.dtype)
    transposed = problem.jacobian_product(point.x) if system.keep.shape[-1] else None
    forward = None if transposed is None else torch.func.vjp(transposed, torch.zeros_like(weight))[1]

    def product(vector: Tensor) -> Tensor:
        dx, dmu = vector[:, :n], vector[:, n:]
        upper = curve(dx) + system.damping * dx
        if transposed is None or forward is None:
            return upper
        return torch.cat([upper + transposed(weight * dmu), weight * (forward(dx)[0] - system.corner * dmu)], -1)

    return product, torch.cat([right[:, :n], weight * right[:, n:]], -1)
