"""A batch of quadratic programs in the form that the interior-point method works on: dense, scaled, bounds kept apart.

    minimise ½ xᵀP x + qᵀx   s.t.   M x + s = b,   s = 0 on the first ``equalities`` rows, s ≥ 0 on the others

The rows of M are those of A, then ``x ≤ upper`` and ``-x ≤ -lower``; the latter two are never formed.  An infinite
bound is the row ``0 x + s = 1``.  A variable whose bounds are equal is fixed: its column and its cost are zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import from_numpy
from lpgd.execution.memo import TensorMemo
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint, per_element

__all__ = ["BoxProgram", "Scaling"]

FIXED = 1e-13
"""Bounds that differ by less, relatively, fix their variable."""


@dataclass(frozen=True, eq=False)
class BoxProgram:
    """The data of a batch of B programs (see the module's docstring).

    Attributes:
        P: None, a diagonal (R, n), or symmetric matrices (R, n, n); R is 1 where they are shared, else B.
        cost: (B, 1) factor of P.
        q: (B, n).
        A: (R, m, n).
        b: (B, rows).
        equalities: how many rows have s = 0.
        upper, lower: (·,) variables that have an upper and a lower bound; None stands for all variables.
        bounded: None, or (B, ·) which of these bounds are finite, as zeros and ones.
        free: None, or (B, n) zero for fixed variables, one for others.
    """

    P: Tensor | None
    cost: Tensor
    q: Tensor
    A: Tensor
    b: Tensor
    equalities: int
    upper: Tensor | None
    lower: Tensor | None
    bounded: Tensor | None
    free: Tensor | None

    @property
    def size(self) -> int:
        return self.q.shape[0]

    @property
    def n(self) -> int:
        return self.q.shape[1]

    @property
    def m(self) -> int:
        return self.A.shape[1]

    @property
    def uppers(self) -> int:
        return self.n if self.upper is None else self.upper.shape[0]

    @property
    def row_count(self) -> int:
        return self.b.shape[1]

    @property
    def shares_matrices(self) -> bool:
        """Whether every element has the same rows and quadratic, up to the latter's factor."""
        return self.A.shape[0] == 1 and (self.P is None or self.P.shape[0] == 1)

    def select(self, elements: Tensor) -> BoxProgram:
        """The programs of these elements."""

        def chosen(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] != self.size or self.size == 1 else tensor[elements]

        A = chosen(self.A)
        assert A is not None
        return replace(
            self, P=chosen(self.P), cost=self.cost[elements], q=self.q[elements], A=A, b=self.b[elements],
            bounded=None if self.bounded is None else self.bounded[elements],
            free=None if self.free is None else self.free[elements],
        )  # fmt: skip

    def full_limits(self) -> tuple[Tensor, Tensor]:
        """(B, n) lower and upper bounds, infinite where there is none."""
        ends = self.b[:, self.m :]
        if self.bounded is not None:
            ends = torch.where(self.bounded > 0, ends, torch.inf)
        above, below = torch.full((2, self.size, self.n), torch.inf, dtype=ends.dtype, device=ends.device)
        above[:, slice(None) if self.upper is None else self.upper] = ends[:, : self.uppers]
        below[:, slice(None) if self.lower is None else self.lower] = ends[:, self.uppers :]
        return -below, above

    def rays(self) -> BoxProgram:
        """``minimise qᵀd`` over the directions d in ``[-1, 1]ⁿ`` with ``P d = 0`` along which no constraint is met."""
        A, e = self.A, self.equalities
        if self.P is not None:
            P = self.P if self.P.ndim == 3 else torch.diag_embed(self.P)
            count = max(A.shape[0], P.shape[0])
            blocks = (A[:, :e], P, A[:, e:])
            A, e = torch.cat([block.expand(count, -1, -1) for block in blocks], 1), e + self.n
        finite = self.b.new_ones(self.size, self.row_count - self.m) if self.bounded is None else self.bounded
        weights = replace(self, bounded=None).bound_weights(finite)
        free = (weights < 2).to(weights.dtype) * (1.0 if self.free is None else self.free)
        limits = self.b.new_ones(self.size, 2 * self.n)
        for index, start, present in (
            (self.upper, 0, finite[:, : self.uppers]),
            (self.lower, self.n, finite[:, self.uppers :]),
        ):
            place = torch.arange(self.n, device=self.b.device) if index is None else index
            limits[:, start + place] -= present
        return replace(
            self, P=None, q=self.q * free, A=A, b=torch.cat([self.b.new_zeros(self.size, A.shape[1]), limits], 1),
            equalities=e, upper=None, lower=None, bounded=torch.cat([free, free], 1), free=free,
        )  # fmt: skip

    # -- products; vectors are (B, ·) or several of them at once (B, count, ·) ----------------------------------

    def quadratic(self, x: Tensor) -> Tensor | None:
        """``P x``; None where there is no P."""
        if self.P is None:
            return None
        cost = self.cost if x.ndim == 2 else self.cost[:, None]
        product = product_of(self.P, x) if self.P.ndim == 3 else (self.P if x.ndim == 2 else self.P[:, None]) * x
        return self.masked(cost * product)

    def product(self, x: Tensor) -> Tensor:
        """``M x``."""
        return torch.cat([product_of(self.A, x), self.bounds(x)], -1)

    def transposed(self, z: Tensor) -> Tensor:
        """``Mᵀ z``."""
        return self.masked(self.bounds_transposed(product_of(self.A.mT, z[..., : self.m]), z[..., self.m :]))

    def bounds(self, x: Tensor) -> Tensor:
        """The rows of the bounds alone."""
        above = x if self.upper is None else x[..., self.upper]
        below = x if self.lower is None else x[..., self.lower]
        values = torch.cat([above, -below], -1)
        if self.bounded is not None:
            values *= self.bounded if x.ndim == 2 else self.bounded[:, None]
        return values

    def bounds_transposed(self, start: Tensor, z: Tensor) -> Tensor:
        """``start`` plus the transposed rows of the bounds times ``z``; start is overwritten."""
        if self.bounded is not None:
            z = z * (self.bounded if z.ndim == 2 else self.bounded[:, None])
        return self._scattered(start, z[..., : self.uppers], z[..., self.uppers :], -1)

    def bound_weights(self, weights: Tensor) -> Tensor:
        """(B or 1, n) the diagonal that weights of the bounds' rows add to a quadratic."""
        if self.bounded is not None:
            weights = weights * self.bounded
        zero = weights.new_zeros(weights.shape[0], self.n)
        return self._scattered(zero, weights[..., : self.uppers], weights[..., self.uppers :], 1)

    def _scattered(self, start: Tensor, above: Tensor, below: Tensor, sign: int) -> Tensor:
        for index, values, factor in ((self.upper, above, 1), (self.lower, below, sign)):
            if index is None:
                start.add_(values, alpha=factor)
            elif index.shape[0]:
                start.index_add_(-1, index, values, alpha=factor)
        return start

    def masked(self, x: Tensor) -> Tensor:
        """``x`` with zeros for fixed variables."""
        if self.free is None:
            return x
        return x * (self.free if x.ndim == 2 else self.free[:, None])


def product_of(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Matrices (1 or B, r, c) times vectors (B, c) or (B, count, c)."""
    if matrices.shape[0] == 1:
        return vectors @ matrices[0].mT
    if vectors.ndim == 2:
        return linalg.matvec(matrices, vectors)
    return torch.bmm(vectors, matrices.mT)


@dataclass(frozen=True, eq=False)
class Scaling:
    """How the points of a BoxProgram are those of the problem that it was made from.

    Attributes:
        problem: the batch of B problems.
        program: the scaled batch.
        row_scale: (R, m) factors of the rows of A.
        cost_scale: (B, 1) factor of the objective.
        offset: None, or (B, n) values of fixed variables, zero for others.
    """

    problem: ConicProblem
    program: BoxProgram
    row_scale: Tensor
    cost_scale: Tensor
    offset: Tensor | None

    @classmethod
    def of(cls, problem: ConicProblem, dtype: torch.dtype) -> Scaling:
        """Scale rows to a largest entry of 1, and objectives to a largest coefficient of 1."""
        structure, data, size = problem.structure, problem.data, problem.batch_size
        P, A, row_scale = cls.matrices(problem, dtype)
        q, b = per_element(data.q, size), per_element(data.b, size)
        free = offset = None
        if structure.lower_index.size and structure.upper_index.size:
            low, high = problem.full_bounds()
            magnitude = 1.0 + low.abs()
            fixed = torch.isfinite(low) & (high - low <= FIXED * magnitude)
            if bool(fixed.any()):
                offset = torch.where(fixed, 0.5 * (low + high), 0.0)
                free = (~fixed).to(dtype)
                q = torch.where(fixed, 0.0, q + problem.quadratic_product(offset))
                b = b - structure.constraint.matvec(data.A, offset)
        upper_index, upper, has_upper = _bounds(problem, "upper", free)
        lower_index, lower, has_lower = _bounds(problem, "lower", free)
        finite = torch.cat([has_upper, has_lower], -1)
        limits = torch.where(finite, torch.cat([upper, -lower], -1), 1.0)
        largest = _largest(q)
        if P is not None:
            largest = torch.maximum(largest, P.abs().flatten(1).amax(-1) if P.shape[-1] else largest)
        cost_scale = _reciprocal(largest)[:, None]
        program = BoxProgram(
            P=None if P is None else P.to(dtype),
            cost=cost_scale.to(dtype),
            q=(cost_scale * q).to(dtype),
            A=A,
            b=torch.cat([row_scale * b, limits], -1).to(dtype),
            equalities=structure.cones.zero,
            upper=upper_index,
            lower=lower_index,
            bounded=None if bool(finite.all()) else finite.to(dtype),
            free=free,
        )
        return cls(problem, program, row_scale, cost_scale, offset)

    @staticmethod
    def matrices(problem: ConicProblem, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
        """P as a BoxProgram has it, unscaled, A dense with scaled rows, and their factors (1 or B, m).

        A shared A is scaled once for all programs that have the same tensor of values.
        """

        def scaled() -> tuple[Tensor, Tensor]:
            A = _matrices(problem.structure.constraint.to_dense(problem.data.A), problem.batch_size)
            row_scale = _reciprocal(_largest(A))
            return (row_scale[..., None] * A).to(dtype), row_scale

        key = problem.structure.constraint.digest, dtype
        A, row_scale = _memo(problem.data.A, key, scaled) if problem.data.A.ndim == 1 else scaled()
        return _quadratic(problem), A, row_scale

    def invert(self, x: Tensor, z: Tensor, s: Tensor) -> tuple[ConicPoint, Tensor]:
        """The problem's point and slack from those of all elements of the program, (B, n), (B, rows), (B, rows)."""
        program, problem = self.program, self.problem
        m, dtype = program.m, problem.data.q.dtype
        x, z, s = x.to(dtype), z.to(dtype) / self.cost_scale, s.to(dtype)
        y, slack = z[:, :m] * self.row_scale, s[:, :m] / self.row_scale
        # The program's own masks have its dtype; fixed variables and infinite bounds get nothing from these rows.
        bounds = program.bounds_transposed(torch.zeros_like(x), z[:, m:]).to(dtype)
        if self.offset is not None:
            x = x + self.offset
            assert program.free is not None
            problem_terms = problem.quadratic_product(x) + problem.structure.constraint.rmatvec(problem.data.A, y)
            bounds = torch.where(program.free > 0, bounds, -(problem_terms + problem.data.q))
        return ConicPoint(x, y, bounds), slack


_memo = TensorMemo()


def _quadratic(problem: ConicProblem) -> Tensor | None:
    """None, diagonals (1 or B, n) or matrices (1 or B, n, n), by what the values are."""
    structure, values = problem.structure, problem.symmetric_P
    if not structure.quadratic.nnz or not bool(values.any()):
        return None
    off = structure.quadratic.rows != structure.quadratic.columns
    diagonal = not off.any() or not bool(values[..., from_numpy(off).to(values.device)].any())
    if not diagonal:
        return _matrices(structure.quadratic.to_dense(values), problem.batch_size)
    on = from_numpy(~off).to(values.device)
    full = values.new_zeros(*values.shape[:-1], structure.n)
    full[..., from_numpy(structure.quadratic.rows[~off]).to(values.device)] = values[..., on]
    return _matrices(full[..., None], problem.batch_size)[..., 0]


def _bounds(problem: ConicProblem, name: str, free: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """Variables with such a bound that is finite for any element, (B, ·) bounds, and which are finite and not fixed."""
    n = problem.structure.n
    index = problem.structure.index(f"{name}_index", problem.device)
    values = per_element(getattr(problem.data, name), problem.batch_size)
    finite = torch.isfinite(values)
    if free is not None:
        finite = finite & (free[:, index] > 0)
    kept = finite.any(0)
    if not bool(kept.all()):
        index, values, finite = index[kept], values[:, kept], finite[:, kept]
    return (None if index.shape[0] == n else index), values, finite


def _matrices(matrices: Tensor, size: int) -> Tensor:
    """(r, c) or (R, r, c) to (1 or size, r, c)."""
    if matrices.ndim == 2:
        return matrices[None]
    count = matrices.shape[0]
    return matrices if count in (1, size) else matrices.repeat(size // max(count, 1), 1, 1)


def _largest(matrices: Tensor) -> Tensor:
    return matrices.abs().amax(-1) if matrices.shape[-1] else matrices.new_zeros(matrices.shape[:-1])


def _reciprocal(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, 1.0 / largest, 1.0)
