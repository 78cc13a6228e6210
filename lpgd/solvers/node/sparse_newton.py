"""Newton's method on augmented Lagrangians of many variables, by sparse systems of Hessian and constraints."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, SparseArray
from lpgd.execution.deadline import is_over
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.solvers.node.descent import Descent, Run, newton, outcome
from lpgd.solvers.node.sparse import Sparsity, read_matrices, solve_quasidefinite
from lpgd.status import Status

__all__ = ["sparse_newton"]


def sparse_newton(
    function: AugmentedLagrangian, x: Tensor, sparsity: Sparsity, tolerance: float = 0.0, max_iterations: int = 200
) -> Descent:
    """:func:`~lpgd.solvers.node.descent.newton` by sparse matrices; where patterns do not hold, by that itself.

    The Hessian of the augmented Lagrangian is ``∇²L + c Jᵀ J`` at the multipliers ``ν + c h`` and ``max(0, λ + c g)``,
    J of the rows with a multiplier.  It is not formed, as one long row would fill it: the system of ``∇²L + δI``
    bordered by J and ``-I/c`` has the same answer.  δ > 0 makes it positive definite where it is not.
    """
    run = Run(function, x, tolerance)
    run.leave_symmetry()
    scale, eps = run.slope.abs().amax(-1), torch.finfo(x.dtype).eps
    damping = torch.zeros_like(scale)
    for _ in range(max_iterations):
        if not len(run.elements) or is_over():
            break
        size = run.slope.abs().amax(-1)
        bad = ~(torch.isfinite(run.value) & torch.isfinite(size))
        left = run.end(bad | (size <= tolerance * scale), outcome(bad, Status.NUMERICAL_ERROR))
        scale, damping = scale[left], damping[left]
        if not len(run.elements):
            break
        found = _directions(run, sparsity, damping)
        if found is None:
            dense = newton(run.function, run.x, tolerance, max_iterations)
            run.whole[run.elements], run.status[run.elements] = dense.x, dense.status
            run.iterations[run.elements] += dense.iterations
            return Descent(run.whole, run.status, run.iterations)
        direction, damping, curved = found
        run.iterations[run.elements] += 1
        ended, precise = run.search(direction)
        far = run.is_far()
        long = direction.abs().amax(-1) > eps**0.25 * (1 + run.x.abs().amax(-1))
        lost = ended & ~precise & (long | ~curved) & (run.slope.abs().amax(-1) > eps**0.5 * scale)
        left = run.end(ended | far, torch.where(far, int(Status.UNBOUNDED), outcome(lost, Status.NUMERICAL_ERROR)))
        scale, damping = scale[left], damping[left]
    run.end(torch.zeros_like(run.value, dtype=torch.bool), run.status[run.elements])
    run.whole[run.elements] = run.x
    return Descent(run.whole, run.status, run.iterations)


def _directions(run: Run, sparsity: Sparsity, damping: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Directions of descent (B, n), the δ of each, and where the Hessian needed none."""
    function, x = run.function, run.x
    problem = function.problem
    h, g = problem.constraints(x)
    if function.nu is None or function.lam is None or function.penalty is None:
        return None
    c = function.penalty[:, None]
    point = NodePoint(x, function.nu + c * h, torch.relu(function.lam + c * g))
    values = read_matrices(problem, point, sparsity)
    if values is None:
        return None
    keep = torch.cat([torch.ones_like(h, dtype=torch.bool), point.lam > 0], -1).cpu().numpy()
    slope = run.slope.cpu().double().numpy()
    penalties, known = function.penalty.cpu().double().numpy(), damping.cpu().double().numpy().copy()
    answers, curved = np.zeros_like(slope), np.ones(len(x), dtype=bool)
    for element in range(len(x)):
        hessian, jacobian = values.matrices(element, keep[element])
        weight = np.full(jacobian.shape[0], penalties[element])
        answers[element], known[element] = _damped(hessian, jacobian, weight, -slope[element], float(known[element]))
        curved[element] = known[element] == 0
    return torch.as_tensor(answers).to(x), torch.as_tensor(known).to(damping), torch.as_tensor(curved).to(x.device)


def _damped(
    hessian: SparseArray, jacobian: SparseArray, weight: FloatArray, right: FloatArray, last: float
) -> tuple[FloatArray, float]:
    """The answer with the least δ that makes the matrix positive definite, starting from what the last step needed."""
    from scipy.sparse import identity

    size = float(abs(hessian).max()) or 1.0
    delta = last / 10 if last > 1e-7 * size else 0.0
    for _ in range(14):
        shifted = hessian + delta * identity(hessian.shape[0]) if delta else hessian
        answer = solve_quasidefinite(shifted, jacobian, weight, right)
        if answer is not None:
            return answer, delta
        delta = max(10 * delta, 1e-6 * size)
    return right / size, delta
