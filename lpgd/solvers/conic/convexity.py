"""Whether quadratic objectives are convex: asked once for each P that changed, on behalf of every solver.

The residuals of a saddle point vanish as well as those of a minimum, and solvers differ in what they make of an
indefinite P, so the question is settled before one sees it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import floats, from_numpy, rows_where
from lpgd.execution.memo import TensorMemo
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.magnitudes import curvatures
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.sparsity import PART, SparsityPattern
from lpgd.problems.conic.structure import per_element
from lpgd.solvers.kkt.root import root_of
from lpgd.solvers.kkt.superlu import superlu

__all__ = ["is_convex", "is_definite"]

DENSE_LIMIT = 1500
"""Matrices up to this size, and mostly filled ones, are factorised densely."""
DEFINITE = 1e-9
"""The least eigenvalue, relative to the largest entry of P, of one that is not singular."""
SURELY = 1e-5
"""The least square of a pivot of ``P = L Lᵀ``, relative to the largest entry of P, of a P that is definite for sure."""
FINEST = 3e-8
"""Negative eigenvalues up to this, relative to the largest entry of P, are taken for rounding of what computed P: the
root of the precision of float64."""


def is_convex(problem: ConicProblem) -> Tensor:
    """(B,) whether ``½ (P + Pᵀ)`` is positive semidefinite, up to the rounding of the type that P came in.

    A P whose entries are all numbers of float32 is judged with that precision.  Matrices with NaN pass: they are
    refused elsewhere.
    """
    pattern, values = problem.structure.quadratic, problem.symmetric_P
    if not pattern.nnz:
        return values.new_ones(problem.batch_size, dtype=torch.bool)

    def compute() -> Tensor:
        # A factor shows that P is semidefinite up to rounding.
        root = root_of(problem) if pattern.is_dense else None
        return _rows_convex(pattern, values, None if root is None else root.exists)

    found = _memo(problem.data.P, ("convex", pattern.digest), compute)
    return per_element(found[:, None], problem.batch_size)[:, 0]


def is_definite(problem: ConicProblem) -> Tensor:
    """(B,) whether P is positive definite, by more than rounding: its curvature alone makes solutions unique."""
    if not problem.structure.quadratic.nnz:
        return problem.data.q.new_zeros(problem.batch_size, dtype=torch.bool)
    return per_element(_rows_definite(problem)[:, None], problem.batch_size)[:, 0]


def _rows_definite(problem: ConicProblem) -> Tensor:
    """(R,) the same for each row of P."""
    pattern = problem.structure.quadratic

    def compute() -> Tensor:
        known = torch.atleast_2d(problem.symmetric_P.detach())
        dense = pattern.shape[0] <= DENSE_LIMIT or pattern.nnz > 0.2 * pattern.shape[0] ** 2
        if not pattern.is_dense and np.unique(pattern.rows).size < pattern.shape[0]:  # a variable without curvature
            return known.new_zeros(len(known), dtype=torch.bool)
        by_factors = _by_cholesky if dense else _by_pivots
        root = root_of(problem) if pattern.is_dense else None
        if root is None:
            return by_factors(pattern, known, -DEFINITE * maximum_norm(curvatures(problem)))
        n = pattern.shape[0]
        pivots = root.lower[:, :n].diagonal(dim1=-2, dim2=-1)
        largest = known[:, :: n + 1].amax(-1)  # no entry of a semidefinite matrix is larger than all of its diagonal
        definite = root.exists & (pivots.amin(-1) ** 2 > SURELY * largest)
        left = rows_where(~definite)
        if left.shape[0]:
            definite[left] = by_factors(pattern, known[left], -DEFINITE * maximum_norm(curvatures(problem))[left])
        return definite

    return _memo(problem.data.P, ("definite", pattern.digest), compute)


_memo = TensorMemo()


def _rows_convex(pattern: SparsityPattern, values: Tensor, semidefinite: Tensor | None) -> Tensor:
    """(R,) for each row of values; ``semidefinite`` are those that are known to be."""
    values, n = torch.atleast_2d(values.detach()), pattern.shape[0]
    convex = _dominated(pattern, values) if semidefinite is None else semidefinite.clone()
    dense = n <= DENSE_LIMIT or pattern.nnz > 0.2 * n * n
    by_factors = _by_cholesky if dense else _by_pivots
    for single in (False, True):
        left = rows_where(~convex)
        if single and left.shape[0]:
            left_values = values[left]
            left = left[(left_values == left_values.float().double()).all(-1)]
        if left.shape[0]:
            left_values = values if left.shape[0] == len(values) else values[left]
            precision = float(np.finfo(np.float32).eps) * max(n, 8) if single else FINEST
            convex[left] = by_factors(pattern, left_values, (precision * left_values.abs().amax(-1)).clamp(min=1e-300))
    if bool(convex.all()):
        return convex
    return convex | ~torch.isfinite(values.sum(-1))


def _dominated(pattern: SparsityPattern, values: Tensor) -> Tensor:
    """(R,) whether each diagonal entry is at least the sum of the others in its row (Gershgorin)."""
    diagonal = from_numpy(pattern.rows == pattern.columns).to(values.device)
    signed = torch.where(diagonal, values, -values.abs())
    row_of_entry = from_numpy(pattern.rows).to(values.device)
    return (values.new_zeros(len(values), pattern.shape[0]).index_add(1, row_of_entry, signed) >= 0).all(-1)


def _by_cholesky(pattern: SparsityPattern, values: Tensor, shift: Tensor) -> Tensor:
    # Only variables that are in the objective: CVXPY's quadratics involve few of the program's.
    used = np.arange(pattern.shape[0]) if pattern.is_dense else np.unique(pattern.rows)
    count = max(1, PART // used.size**2)
    found = []
    for chunk, chunk_shift in zip(values.split(count), shift.split(count), strict=True):
        if pattern.is_dense:
            matrices = chunk.reshape(-1, used.size, used.size).clone()
        else:
            place = np.searchsorted(used, pattern.rows) * used.size + np.searchsorted(used, pattern.columns)
            matrices = chunk.new_zeros(len(chunk), used.size * used.size)
            matrices[:, from_numpy(place).to(chunk.device)] = chunk
            matrices = matrices.reshape(-1, used.size, used.size)
        matrices.diagonal(dim1=-2, dim2=-1).add_(chunk_shift[:, None])
        found.append(linalg.cholesky_ex(matrices).info == 0)
    return torch.cat(found)


def _by_pivots(pattern: SparsityPattern, values: Tensor, shift: Tensor) -> Tensor:
    """By the signs of the pivots of a sparse factorisation without exchanges of rows (Sylvester's law of inertia)."""
    found = []
    for entries, added in zip(values.cpu().numpy(), floats(shift), strict=True):
        matrix = pattern.csc(entries)
        matrix.setdiag(matrix.diagonal() + added)
        try:
            factor = superlu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        except RuntimeError:  # SuperLU: "Factor is exactly singular": a pivot of zero, so not even semidefinite
            found.append(False)
            continue
        unmoved = np.array_equal(factor.perm_r, factor.perm_c)
        found.append(bool(unmoved and (factor.U.diagonal() > 0).all()))
    return torch.tensor(found, device=values.device)
