"""Second derivatives of problems with many variables, each of which meets few: patterns, colours, sparse systems.

Where a Hessian has few entries in a row, as in control, networks and grids, a few products with it tell all of them:
columns that share no row have one colour, and one product reads all columns of a colour (Curtis, Powell and Reid 1974).
The pattern is that of the derivatives at a point like any other near the start; as it may differ elsewhere (of pieces),
what is read is compared with one more product, and where it does not fit, matrices are dense after all.

Systems are factorised without pivots off the diagonal where their inertia is asked for: the signs of the pivots
are those of the eigenvalues (Sylvester), and tell whether a Hessian is positive definite along the constraints.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint

__all__ = [
    "Factors",
    "FloatArray",
    "Sparsity",
    "curves_up",
    "find_sparsity",
    "read_matrices",
    "solve_bordered",
    "solve_quasidefinite",
]

Index = IntArray
MANY = 0.25
"""With more colours than this part of the variables, matrices are dense."""
CHUNK = 2**24
"""Numbers that are formed at once while patterns are looked for."""


@dataclass(frozen=True, eq=False)
class Pattern:
    """Where a matrix has entries, and how products read them.

    Attributes:
        rows, columns: of each entry.
        colour: of each row; rows of one colour share no column, and one product ``seedᵀ M`` reads them.
        count: how many colours.
    """

    rows: Index
    columns: Index
    colour: Index
    count: int


@dataclass(frozen=True, eq=False)
class Sparsity:
    """The patterns of ``∇²L`` (symmetric) and of ``[Dh; Dg]``."""

    hessian: Pattern
    jacobian: Pattern


@dataclass(frozen=True, eq=False)
class Factors:
    """Values of a batch's matrices at the entries of their patterns: (B, entries) each."""

    sparsity: Sparsity
    hessian: FloatArray
    jacobian: FloatArray

    def matrices(self, element: int, keep: BoolArray) -> tuple[Any, Any]:
        """Those of one element, as sparse matrices; of the Jacobian the rows that are kept."""
        from scipy.sparse import csr_matrix

        hessian_pattern, jacobian_pattern = self.sparsity.hessian, self.sparsity.jacobian
        n, m = len(hessian_pattern.colour), len(jacobian_pattern.colour)
        hessian = csr_matrix((self.hessian[element], (hessian_pattern.rows, hessian_pattern.columns)), shape=(n, n))
        jacobian = csr_matrix((self.jacobian[element], (jacobian_pattern.rows, jacobian_pattern.columns)), shape=(m, n))
        return 0.5 * (hessian + hessian.T), jacobian[keep]


def find_sparsity(problem: NodeProblem, point: NodePoint) -> Sparsity | None:
    """The patterns of a batch's matrices, from its first element; None where there are too many colours.

    Args:
        problem: B ≥ 1 elements.
        point: (B, ·) near which derivatives exist.
    """
    one = problem.select(torch.zeros(1, dtype=torch.int64, device=problem.device))
    generator = torch.Generator().manual_seed(0)
    x, nu, lam = (tensor[:1] for tensor in point)

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like)

    near = NodePoint(x + 0.1 * (1 + x.abs().amax()) * (noise(x) - 0.5), nu + noise(nu) + 0.5, lam + noise(lam) + 0.5)
    at_point = NodePoint(x, near.nu, near.lam)
    found = [_entries(one, candidate) for candidate in (near, at_point)]
    known = [pair for pair in found if pair is not None]
    if not known:
        return None
    hessian, jacobian = (functools.reduce(np.logical_or, masks) for masks in zip(*known, strict=True))
    most = MANY * x.shape[-1]
    first, second = _coloured(hessian | hessian.T, most), _coloured(jacobian, most)
    return None if first is None or second is None else Sparsity(first, second)


def _entries(problem: NodeProblem, point: NodePoint) -> tuple[BoolArray, BoolArray] | None:
    """Where the matrices of one element are not zero; None where they are not finite."""
    n = point.x.shape[-1]
    m = sum(values.shape[-1] for values in problem.constraints(point.x))
    masks = []
    for pull, size in ((problem.hessian_product(point), n), (problem.jacobian_product(point.x), m)):
        units = torch.eye(size, dtype=point.x.dtype, device=point.x.device)
        if not size:
            masks.append(np.zeros((0, n), dtype=bool))
            continue
        rows = torch.func.vmap(lambda unit, pull=pull: pull(unit[None])[0], chunk_size=max(1, CHUNK // n))(units)
        if not bool(torch.isfinite(rows).all()):
            return None
        masks.append(rows.ne(0).cpu().numpy())
    return masks[0], masks[1]


def _coloured(entries: BoolArray, most: float) -> Pattern | None:
    """A greedy colouring of rows; None where it takes more than ``most`` colours."""
    from scipy.sparse import csr_matrix

    rows, columns = np.nonzero(entries)
    matrix = csr_matrix(entries)
    if len(rows) and np.diff(matrix.tocsc().indptr).max() > most:
        return None  # so many rows share a column
    meets = (matrix.astype(np.int32) @ matrix.astype(np.int32).T).tocsr()
    colour = np.full(entries.shape[0], -1, dtype=np.int64)
    for row in range(entries.shape[0]):
        taken = set(colour[meets.indices[meets.indptr[row] : meets.indptr[row + 1]]].tolist())
        colour[row] = next(number for number in range(len(taken) + 1) if number not in taken)
    count = int(colour.max(initial=-1)) + 1
    return Pattern(rows, columns, colour, count) if count <= most else None


def read_matrices(problem: NodeProblem, point: NodePoint, sparsity: Sparsity) -> Factors | None:
    """The matrices of a batch at a point; None where the patterns do not hold there."""
    values = []
    pulls = ((problem.hessian_product(point), sparsity.hessian), (problem.jacobian_product(point.x), sparsity.jacobian))
    for pull, pattern in pulls:
        if not pattern.count:
            values.append(np.zeros((len(point.x), 0)))
            continue
        seeds = np.zeros((pattern.count, len(pattern.colour)))
        seeds[pattern.colour, np.arange(len(pattern.colour))] = 1.0
        probe = np.random.default_rng(1).standard_normal(len(pattern.colour))
        known = torch.as_tensor(np.vstack([seeds, probe])).to(point.x)
        size = point.x.shape[0]
        images = torch.func.vmap(lambda seed, pull=pull, size=size: pull(seed.expand(size, -1)))(known)
        numbers = images.detach().cpu().double().numpy()
        entries = numbers[pattern.colour[pattern.rows], :, pattern.columns].T  # (B, entries)
        image, sizes = np.zeros((size, point.x.shape[-1])), np.zeros((size, point.x.shape[-1]))
        weighted = entries * probe[pattern.rows]
        for element in range(size):
            np.add.at(image[element], pattern.columns, weighted[element])
            np.add.at(sizes[element], pattern.columns, np.abs(weighted[element]))
        reach = 1e3 * torch.finfo(point.x.dtype).eps * (sizes.max(initial=0.0) + np.abs(numbers[-1]).max(initial=0.0))
        if not np.all(np.abs(image - numbers[-1]) <= reach):
            return None
        values.append(entries)
    return Factors(sparsity, values[0], values[1])


def solve_quasidefinite(
    hessian: SparseArray, jacobian: SparseArray, weight: FloatArray, right: FloatArray
) -> FloatArray | None:
    """The x of ``(H + Jᵀ diag(weight) J) x = right``; None where that matrix is not positive definite."""
    from scipy.sparse import bmat, diags

    n, m = hessian.shape[0], jacobian.shape[0]
    matrix = hessian if not m else bmat([[hessian, jacobian.T], [jacobian, -diags(1.0 / weight)]])
    factor = _factorise(matrix, symmetric=True)
    if factor is None:
        return None
    pivots = factor.U.diagonal()
    if int((pivots < 0).sum()) != m or not np.array_equal(factor.perm_r, factor.perm_c):
        return None
    whole = np.concatenate([right, np.zeros(m)])
    answer = factor.solve(whole)
    answer += factor.solve(whole - matrix @ answer)
    left = np.abs(whole - matrix @ answer).max(initial=0.0)
    return answer[:n] if left <= 1e-6 * np.abs(whole).max(initial=0.0) else None


def curves_up(values: Factors, keep: BoolArray) -> BoolArray:
    """(B,) whether ``H + w JᵀJ``, w large, has no eigenvalue below ``-δ``: no negative curvature along the rows J."""
    from scipy.sparse import diags, identity

    answers = np.ones(len(keep), dtype=bool)
    eps = np.finfo(np.float64).eps
    for element, mask in enumerate(keep):
        hessian, jacobian = values.matrices(element, mask)
        length = np.sqrt(np.asarray(jacobian.multiply(jacobian).sum(axis=1))[:, 0])
        unit = diags(1.0 / np.where(length > 0, length, 1.0)) @ jacobian
        unit = unit[length > 0]
        scale = float(abs(hessian).max()) or 1.0
        lifted = hessian / scale + 10 * eps**0.3 * identity(hessian.shape[0])
        right = np.ones(hessian.shape[0])
        answers[element] = solve_quasidefinite(lifted, unit, np.full(unit.shape[0], eps**-0.3), right) is not None
    return answers


def solve_bordered(
    hessian: SparseArray, jacobian: SparseArray, right: FloatArray, corner: FloatArray
) -> tuple[FloatArray, bool]:
    """The answer of ``[[H, Jᵀ], [J, -diag(corner)]]``, and whether it is that of a regular system."""
    from scipy.sparse import bmat, diags

    matrix = bmat([[hessian, jacobian.T], [jacobian, -diags(corner)]]) if jacobian.shape[0] else hessian
    matrix = matrix.tocsr()
    largest = abs(matrix).max(axis=1).toarray()[:, 0]
    weight = np.where(largest > 0, largest, 1.0) ** -0.5
    scaled, target = diags(weight) @ matrix @ diags(weight), weight * right
    factor = _factorise(scaled, symmetric=False)
    if factor is None:
        return np.zeros_like(right), False
    probe = np.random.default_rng(0).standard_normal(len(right))
    probe /= np.linalg.norm(probe)
    answer = factor.solve(target)
    answer += factor.solve(target - scaled @ answer)
    left = np.abs(target - scaled @ answer).max(initial=0.0)
    eps = np.finfo(np.float64).eps
    regular = bool(
        np.linalg.norm(factor.solve(probe)) < 1e-3 / eps and left <= eps**0.6 * max(np.abs(target).max(), 1e-300)
    )
    return weight * answer, regular


def _factorise(matrix: SparseArray, symmetric: bool) -> Any | None:
    from lpgd.solvers.kkt.superlu import superlu

    options: dict[str, Any] = {"permc_spec": "COLAMD"}
    if symmetric:
        options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    values = cast(FloatArray, matrix.tocsc().data)
    if not np.isfinite(values).all():
        return None
    try:
        return superlu(matrix.tocsc(), **options)
    except RuntimeError:  # SuperLU's "Factor is exactly singular"
        return None
