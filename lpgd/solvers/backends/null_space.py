"""Linear programs, and projections, in coordinates of the points that satisfy their equalities.

With many equalities and bounds, ``A x = b, l ≤ x ≤ u``, and an orthonormal basis Z of the null space of a shared A,
``x = x₀ + Z w`` with ``x₀ = A⁺ b`` makes the program one of few variables w, whose rows have two ends:

    minimise ½ ρ |w|² + <Zᵀ q, w>   s.t.   l ≤ x₀ + Z w ≤ u

Proximal-point steps on w from 0 are those on x, up to a constant.  The multipliers of the bounds are those of the rows;
those of the equalities are ``y = -(A⁺)ᵀ (ρ x + q + z)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import as_index
from lpgd.cones.product import Cones
from lpgd.execution.memo import TensorMemo
from lpgd.problems.base import States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicData, ConicStructure, per_element
from lpgd.status import Status

__all__ = ["has_null_space", "solved_in_null_space"]

Solve = Callable[[ConicProblem, States], ConicSolution]

SHARE = 0.5
"""Equalities for so many variables, at least: rows of Z then have no more entries than columns of A."""
LEAST, MOST = 32, 400
"""The numbers of variables for which it pays."""
CONDITION = 1e4
"""The largest condition of A."""

_memo = TensorMemo()


class _NullSpace(NamedTuple):
    """What belongs to A.

    Attributes:
        inverse: (n·m,) values of A⁺ (n, m) by columns.
        values: those of the rows of :func:`_reduced_structure` by columns: Z, and minus the identity.
    """

    inverse: Tensor
    values: Tensor


def has_null_space(problem: ConicProblem) -> bool:
    """Whether programs of this structure are solved in fewer variables, if their matrices allow."""
    structure = problem.structure
    n, m = structure.n, structure.m
    fits = structure.has_bounds and structure.cones.zero == m < n and not structure.two_sided + structure.has_integers
    pays = LEAST <= n <= MOST and m >= SHARE * n
    return fits and pays and problem.data.A.ndim == 1 and problem.device.type == "cpu"


def solved_in_null_space(problem: ConicProblem, states: States, solve: Solve) -> ConicSolution:
    """The answers of a solver to a batch, which it sees in fewer variables where that is faster.

    Elements that it does not solve so are handed to it as they are.
    """
    structure = problem.structure
    if not has_null_space(problem):
        return solve(problem, states)
    curvature = _multiple(problem)
    space = None if curvature is None else _memo(problem.data.A, structure.digest, lambda: _null_space(problem))
    if curvature is None or space is None:
        return solve(problem, states)
    answer = _reduced(problem, curvature, space, states, solve)
    left = [element for element, status in enumerate(answer.statuses) if status is not Status.SOLVED]
    if not left:
        return answer
    elements = as_index(left, problem.device)
    others = solve(problem.select(elements), ())
    tensors = {name: getattr(answer, name).clone() for name in ("x", "y", "z", "slack")}
    for name, whole in tensors.items():
        whole[elements] = getattr(others, name)
    arrays = {name: getattr(answer, name).copy() for name in ("iterations", "setup_seconds", "solve_seconds")}
    for name, whole in arrays.items():
        whole[left] += getattr(others, name)
    statuses, ends = list(answer.statuses), list(answer.states)
    for element, status, end in zip(left, others.statuses, others.states, strict=True):
        statuses[element], ends[element] = status, end
    return replace(answer, statuses=tuple(statuses), states=tuple(ends), **tensors, **arrays)


def _multiple(problem: ConicProblem) -> float | None:
    """ρ of a P that is ρ times the identity, 0 included; None for another one."""
    quadratic = problem.structure.quadratic
    values = problem.symmetric_P
    if not quadratic.nnz or not bool(values.any()):
        return 0.0
    if values.ndim != 1 or quadratic.nnz != problem.structure.n or not quadratic.is_diagonal:
        return None
    return float(values[0]) if bool((values == values[0]).all()) else None


def _null_space(problem: ConicProblem) -> _NullSpace | None:
    """None where the rows depend on each other, or nearly."""
    structure = problem.structure
    A = structure.constraint.to_dense(problem.data.A.detach())
    if not bool(torch.isfinite(A).all()):
        return None
    m, n = A.shape
    Q, R = linalg.qr(A.mT, mode="complete")
    if not bool(R.diagonal().abs().amin() > A.abs().amax() / CONDITION):
        return None
    inverse = linalg.solve_triangular(R[:m], Q[:, :m].mT, upper=True)  # of A⁺ = Q R⁻ᵀ, transposed
    if not bool(inverse.norm() * A.norm() < CONDITION * m):
        return None
    return _NullSpace(inverse.flatten(), torch.cat([Q[:, m:].mT.flatten(), Q.new_full((n,), -1.0)]))


@lru_cache(maxsize=64)
def _reduced_structure(
    n: int, m: int, lower: bytes, upper: bytes, curved: bool
) -> tuple[ConicStructure, SparsityPattern, SparsityPattern]:
    """Of the programs in (w, x), and the patterns of Z and of A⁺."""
    few, every = n - m, np.arange(n)
    Z = SparsityPattern.dense(n, few)
    rows, columns = np.concatenate([Z.rows, every]), np.concatenate([Z.columns, few + every])
    diagonal = np.arange(few if curved else 0)
    structure = ConicStructure(
        SparsityPattern((few + n, few + n), diagonal, diagonal),
        SparsityPattern((n, few + n), rows, columns),
        Cones(zero=n),
        few + np.frombuffer(lower, dtype=np.int64),
        few + np.frombuffer(upper, dtype=np.int64),
        two_sided=n,
    )
    return structure, Z, SparsityPattern.dense(n, m)


def _reduced(problem: ConicProblem, curvature: float, space: _NullSpace, states: States, solve: Solve) -> ConicSolution:
    structure, data, size = problem.structure, problem.data, problem.batch_size
    n, m = structure.n, structure.m
    reduced_structure, Z, inverse = _reduced_structure(
        n, m, structure.lower_index.tobytes(), structure.upper_index.tobytes(), curvature != 0.0
    )
    few = n - m
    q, b = (per_element(datum, size) for datum in (data.q, data.b))
    constraint = structure.constraint
    start = inverse.matvec(space.inverse, b)
    start = start + inverse.matvec(space.inverse, b - constraint.matvec(data.A, start))
    cost = Z.rmatvec(space.values[: Z.nnz], q)
    reduced = ConicProblem(
        reduced_structure,
        ConicData(
            cost.new_full((few if curvature else 0,), curvature),
            torch.cat([cost, cost.new_zeros(size, n)], 1),
            space.values,
            -start,
            data.lower,
            data.upper,
        ),
        size,
    )
    answer = solve(reduced, states)
    x, z = answer.x[:, few:], answer.z[:, few:]
    lower, upper = problem.full_bounds()
    # What is active is at its bound, not near it.
    x = torch.where(z > 0, upper, torch.where(z < 0, lower, x))
    slope = curvature * x + q + z
    y = -inverse.rmatvec(space.inverse, slope)
    y = y - inverse.rmatvec(space.inverse, slope + constraint.rmatvec(data.A, y))
    return replace(answer, problem=problem, x=x, y=y, z=z, slack=torch.zeros_like(y))
