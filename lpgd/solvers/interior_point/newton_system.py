"""The linear systems of the batched interior-point method, factorised once an iteration for the whole batch.

    [ P   Mᵀ ] [x]   [r]
    [ M  -H  ] [z] = [t]        H diagonal: 0 for equalities, positive elsewhere

Bounds are eliminated into the diagonal of P in any case.  With a diagonal P the remaining rows give the normal
equations ``A D⁻¹ Aᵀ + H`` (m × m); otherwise the inequalities join P, whose Cholesky factor (n × n) reduces the
equalities to their Schur complement.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from enum import IntEnum
from itertools import pairwise

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.execution.memo import TensorMemo
from lpgd.solvers.interior_point.box_program import BoxProgram, product_of
from lpgd.solvers.interior_point.shared_factor import SharedSolver

__all__ = ["Factor", "NewtonSystem", "Precision", "newton_system"]

SHARED_BATCH = 16
"""From this batch size, weighted products of a shared matrix are one product with its row products."""
ALIKE_BATCH = 3
"""From this batch size, conjugate gradients for diagonals of zeros and ones cost less than factors of all."""
SHARED_BYTES = 2**28
"""Row products larger than this are not formed."""
WIDTH = 64
"""The width of the blocks in which the lower triangle of a product is formed."""
SINGLE_ROWS = 100
"""From this number of rows, normal equations for rough answers are formed and factorised in single precision."""
SINGLE_REGULARIZATION = 1e-6
LARGEST = 1e30
"""The largest number that is handed to single precision."""


class Precision(IntEnum):
    """How good a factor's answers are before they are refined; the cheapest one comes last."""

    DOUBLE = 0
    SINGLE = 1
    SHARED = 2
    """One factor for the whole batch, and conjugate gradients (:mod:`lpgd.solvers.interior_point.shared_factor`)."""


class Factor(ABC):
    """A factorised system.

    Attributes:
        failed: (B or 1,) elements whose factorisation broke down.
        precision: of its answers; below double they need several refinements.
        trusted: refinements of rough answers have led to solutions so far.
    """

    failed: Tensor
    precision: Precision = Precision.DOUBLE
    trusted: bool = True

    @property
    def is_rough(self) -> bool:
        """Whether answers need several refinements."""
        return self.precision > Precision.DOUBLE

    @property
    def better(self) -> Precision:
        """The precision to ask for where this one does not do."""
        return Precision(max(self.precision - 1, Precision.DOUBLE))

    @abstractmethod
    def solve(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` and ``z`` for right-hand sides (B, count, n) and (B, count, rows)."""


class NewtonSystem(ABC):
    """What of the systems of one batch stays the same in all iterations."""

    program: BoxProgram

    @abstractmethod
    def factor(self, h: Tensor, regularization: Tensor, precision: Precision = Precision.DOUBLE) -> Factor:
        """Factorise for the diagonal ``h`` (B or 1, rows without equalities) of H.

        Args:
            h: positive; one row serves the whole batch where the program's matrices are shared and nothing is masked.
            regularization: (B or 1, 1) what is added to the diagonals, relatively.
            precision: that does, for answers that will be refined; the factor's own may be better.
        """

    @abstractmethod
    def select(self, program: BoxProgram) -> NewtonSystem:
        """The system of some elements of the batch."""


class WeightedProduct:
    """``Σ_k w_k a_k a_kᵀ`` for each element, lower triangle: rows a_k of matrices (1 or B, K, r), weights (B, K).

    Products of the rows of a shared matrix are kept for as long as ``source`` lives, for later programs with it.

    Args:
        matrices: of the rows, part of ``source``.
        size: of the batch.
        source: a tensor.
        block: which part of it the matrices are.
    """

    def __init__(self, matrices: Tensor, size: int, source: Tensor, block: Hashable) -> None:
        self.matrices, self.source, self.block = matrices, source, block
        self.edges: list[int] = []
        shared, count, r = matrices.shape
        if shared == 1 and size >= SHARED_BATCH and r and count:
            width = max(16, -(-r // 8))
            edges = [*range(0, r, width), r]
            pairs = sum((stop - start) * stop for start, stop in pairwise(edges))
            if pairs * count * matrices.element_size() <= SHARED_BYTES:
                self.edges = edges

    def __call__(self, weights: Tensor) -> Tensor:
        """The products (B, r, r) in the precision of the weights."""
        matrices, size = self.matrices, weights.shape[0]
        if not self.edges or size < SHARED_BATCH:
            matrices = matrices.to(weights.dtype)
            weighted, r = matrices * weights[..., None], matrices.shape[-1]
            if r < 2 * WIDTH:
                return torch.matmul(weighted.mT, matrices)
            product = weights.new_empty(weighted.shape[0], r, r)
            for start in range(0, r, WIDTH):
                stop = min(start + WIDTH, r)
                product[:, start:stop, :stop] = torch.matmul(weighted[..., start:stop].mT, matrices[..., :stop])
            return product
        r = matrices.shape[-1]
        product = weights.new_empty(size, r, r)
        for start, stop, products in self.row_products(weights.dtype):
            product[:, start:stop, :stop] = (weights @ products).view(size, stop - start, stop)
        return product

    def row_products(self, dtype: torch.dtype) -> list[tuple[int, int, Tensor]]:
        """Products of the entries of each row, (K, ·) for blocks of columns."""

        def compute() -> list[tuple[int, int, Tensor]]:
            a = self.matrices[0].to(dtype)
            return [
                (start, stop, (a[:, start:stop, None] * a[:, None, :stop]).reshape(a.shape[0], -1))
                for start, stop in pairwise(self.edges)
            ]

        return _memo(self.source, (self.block, dtype), compute)

    def select(self, matrices: Tensor) -> WeightedProduct:
        """The same for some elements, whose matrices these are."""
        chosen = WeightedProduct(matrices, 0, self.source, self.block)
        chosen.edges = self.edges
        return chosen


_memo = TensorMemo()


def newton_system(program: BoxProgram) -> NewtonSystem:
    """The cheaper elimination; normal equations only where every variable has curvature or a bound."""
    inequalities = program.m - program.equalities
    n, m = program.n, program.m
    if program.P is None or program.P.ndim == 2:
        normal = m * m * n + m**3 / 3
        reduced = n * n * (inequalities + program.equalities) + n**3 / 3
        weights = program.bound_weights(torch.ones_like(program.b[:, m:]))
        if program.P is not None:
            weights = weights + program.P
        if program.free is not None:
            weights = weights + (1.0 - program.free)
        if normal <= reduced and bool((weights > 0).all()):
            return NormalEquations(program, WeightedProduct(program.A.mT, program.size, program.A, "columns"))
    inequality_matrix = program.A[:, program.equalities :]
    return ReducedHessian(program, WeightedProduct(inequality_matrix, program.size, program.A, program.equalities))


def _cholesky(matrices: Tensor, diagonal: Tensor, regularization: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``matrices + diagonal``, regularised relative to that diagonal plus one; matrices are overwritten."""
    view = matrices.diagonal(dim1=-2, dim2=-1)
    view += diagonal
    view += regularization * (view + 1.0)
    factors, info = linalg.cholesky_ex(matrices)
    return factors, info > 0


def _solve(factors: Tensor, right: Tensor) -> Tensor:
    """``(L Lᵀ)⁻¹`` times rows (B, count, r)."""
    if factors.shape[0] == right.shape[0]:
        return torch.cholesky_solve(right.mT, factors).mT
    flat = right.flatten(0, 1)
    return torch.cholesky_solve(flat.mT, factors[0]).mT.reshape(right.shape)


class NormalEquations(NewtonSystem):
    """Elimination down to the rows of A, for a diagonal P."""

    def __init__(self, program: BoxProgram, product: WeightedProduct) -> None:
        self.program, self.product = program, product

    def select(self, program: BoxProgram) -> NormalEquations:
        return NormalEquations(program, self.product.select(program.A.mT))

    def factor(self, h: Tensor, regularization: Tensor, precision: Precision = Precision.DOUBLE) -> Factor:
        program = self.program
        inequalities = program.m - program.equalities
        weights = 1.0 / h[:, inequalities:]
        D = program.bound_weights(weights)
        if program.P is not None:
            D = D + program.cost * program.P
        if program.free is not None:
            D = D + (1.0 - program.free)
        inverse = program.masked(1.0 / D)
        diagonal = h.new_zeros(h.shape[0], program.m)
        diagonal[:, program.equalities :] = h[:, :inequalities]
        if precision > Precision.DOUBLE and program.m >= SINGLE_ROWS and h.dtype == torch.float64:
            # Relative to its largest entry, so that no range of the data leaves single precision's.
            scale = inverse.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
            if precision == Precision.SHARED and not inequalities and program.A.shape[0] == 1 < ALIKE_BATCH <= len(h):
                relative = inverse / scale
                near_identity = bool(((relative == 0) | (relative == 1)).all())  # of active sets of projections
                if near_identity or len(h) >= SHARED_BATCH:
                    solver = SharedSolver(program, relative, near_identity)
                    return _SharedFactor(program, weights, inverse, solver, scale)
            product = self.product((inverse / scale).float())
            added = regularization.clamp(min=SINGLE_REGULARIZATION).float()
            factors, failed = _cholesky(product, (diagonal / scale).clamp(max=LARGEST).float(), added)
            return _NormalFactor(program, weights, inverse, factors, failed, scale)
        factors, failed = _cholesky(self.product(inverse), diagonal, regularization)
        return _NormalFactor(program, weights, inverse, factors, failed)


class _EliminatedFactor(Factor):
    """Bounds and variables eliminated: what is left are systems of the normal equations."""

    def __init__(self, program: BoxProgram, weights: Tensor, inverse: Tensor) -> None:
        self.program, self.weights, self.inverse = program, weights[:, None], inverse[:, None]

    def solve(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        program, m = self.program, self.program.m
        bounds = t[..., m:]
        right = program.bounds_transposed(r.clone(), self.weights * bounds)
        y = self.solve_rows(product_of(program.A, self.inverse * right) - t[..., :m])
        x = self.inverse * (right - product_of(program.A.mT, y))
        return x, torch.cat([y, self.weights * (program.bounds(x) - bounds)], -1)

    @abstractmethod
    def solve_rows(self, right: Tensor) -> Tensor:
        """Solve the normal equations for right-hand sides (B, count, m)."""


class _NormalFactor(_EliminatedFactor):
    """Factors of the normal equations; with a scale (B, 1), of ``1 / scale`` times them in single precision."""

    def __init__(
        self,
        program: BoxProgram,
        weights: Tensor,
        inverse: Tensor,
        factors: Tensor,
        failed: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__(program, weights, inverse)
        self.factors, self.failed = factors, failed
        self.scale = None if scale is None else scale[:, None]
        self.precision = Precision.DOUBLE if scale is None else Precision.SINGLE

    def solve_rows(self, right: Tensor) -> Tensor:
        if self.scale is None:
            return _solve(self.factors, right)
        return _in_single_precision(lambda single: _solve(self.factors, single), right, self.scale)


class _SharedFactor(_EliminatedFactor):
    """One factor for the whole batch; see :mod:`lpgd.solvers.interior_point.shared_factor`."""

    precision = Precision.SHARED

    def __init__(
        self, program: BoxProgram, weights: Tensor, inverse: Tensor, solver: SharedSolver, scale: Tensor
    ) -> None:
        super().__init__(program, weights, inverse)
        self.solver, self.scale = solver, scale[:, None]
        self.failed = torch.full((program.size,), solver.failed, device=inverse.device)

    def solve_rows(self, right: Tensor) -> Tensor:
        answer = _in_single_precision(self.solver.solve, right, self.scale)
        self.trusted = self.trusted and not self.solver.lost
        return answer


def _in_single_precision(solve: Callable[[Tensor], Tensor], right: Tensor, scale: Tensor) -> Tensor:
    """What ``solve`` makes of right-hand sides with largest entries of 1, for a system that was divided by a scale."""
    size = right.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    return solve((right / size).float()).to(right.dtype) * (size / scale)


class ReducedHessian(NewtonSystem):
    """Elimination of all inequalities into P, and of x by its Cholesky factor.

    ``EᵀE`` of the equalities E is added to P, and to the right-hand side in step: it changes no solution and makes the
    matrix definite wherever the whole system is nonsingular.
    """

    def __init__(self, program: BoxProgram, product: WeightedProduct) -> None:
        self.program, self.product = program, product
        E = program.A[:, : program.equalities]
        self.equalities = E if program.free is None else E * program.free[:, None]
        self.squares = E.mT @ E if program.equalities else None

    def select(self, program: BoxProgram) -> ReducedHessian:
        return ReducedHessian(program, self.product.select(program.A[:, program.equalities :]))

    def factor(self, h: Tensor, regularization: Tensor, precision: Precision = Precision.DOUBLE) -> Factor:
        program = self.program
        inequalities = program.m - program.equalities
        weights = 1.0 / h
        hessian = self.product(weights[:, :inequalities])
        if self.squares is not None:
            hessian = hessian + self.squares
        diagonal = program.bound_weights(weights[:, inequalities:])
        if program.P is not None and program.P.ndim == 2:
            diagonal = diagonal + program.cost * program.P
        elif program.P is not None:
            hessian = hessian + program.cost[:, :, None] * program.P
        if program.free is not None:
            hessian = hessian * program.free[:, :, None] * program.free[:, None]
            diagonal = diagonal + (1.0 - program.free)
        if diagonal.shape[0] > hessian.shape[0]:
            hessian = hessian.repeat(diagonal.shape[0], 1, 1)
        factors, failed = _cholesky(hessian, diagonal, regularization)
        return _ReducedFactor(program, self.equalities, weights, factors, failed, regularization)


class _ReducedFactor(Factor):
    def __init__(
        self,
        program: BoxProgram,
        equalities: Tensor,
        weights: Tensor,
        factors: Tensor,
        failed: Tensor,
        regularization: Tensor,
    ) -> None:
        self.program, self.weights, self.factors, self.failed = program, weights[:, None], factors, failed
        self.equalities = equalities
        self.schur: Tensor | None = None
        if program.equalities:
            half = linalg.solve_triangular(factors, equalities.mT, upper=False)
            self.schur, broken = _cholesky(half.mT @ half, half.new_zeros(1), regularization)
            self.failed = failed | broken

    def solve(self, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        program, e = self.program, self.program.equalities
        below, E = t[..., e:], self.equalities
        x = _solve(self.factors, r + program.transposed(torch.cat([t[..., :e], self.weights * below], -1)))
        if self.schur is None:
            return x, self.weights * (program.product(x) - below)
        y = _solve(self.schur, product_of(E, x) - t[..., :e])
        x = x - _solve(self.factors, product_of(E.mT, y))
        return x, torch.cat([y, self.weights * (program.product(x)[..., e:] - below)], -1)
