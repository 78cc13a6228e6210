"""Units of a batch of conic programs: powers of two in which its data, and mostly its solutions, are of order 1.

With positive ``D`` (one factor for each variable), ``E`` (one for each row, equal within a cone), a length ``β`` and a
factor ``σ`` of the objective,

    x = β D x̂,   y = E ŷ / (σ β),   z = ẑ / (σ β D),   s = β E⁻¹ ŝ

turn ``minimise ½xᵀP x + qᵀx  s.t.  A x + s = b, s ∈ K, lower ≤ x ≤ upper`` into the same problem with

    P̂ = σ β² D P D,   q̂ = σ β D q,   Â = E A D,   b̂ = E b / β,   bounds / (β D)

whose Lagrangian is ``σ`` times the old one.  Powers of two make all of this exact.  Solvers see problems in these units,
and residuals and active sets are judged in them: absolute tolerances mean the same for all data.

Data that are of order 1 already are left alone, so that matrices and prepared solvers are shared as they stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lpgd.problems.base import maximum_norm
from lpgd.problems.conic import ConicProblem, per_element
from lpgd.problems.memo import TensorMemo
from lpgd.problems.sparsity import SparsityPattern
from lpgd.problems.structure import ConicData, ConicPoint, ConicStructure

__all__ = ["INFINITE", "Units"]

MODERATE = 6
"""Exponents of two up to this size are left alone: a factor of 64."""
EQUILIBRATIONS = 8
"""Iterations of Ruiz's equilibration; each takes the root of what is left."""
KEPT = 12
"""Units of a warm-start state are kept as long as the data are within this exponent of them."""
INFINITE = 1e20
"""Bounds of this magnitude and beyond are infinite."""


@dataclass(frozen=True, eq=False)
class Units:
    """The units of a batch of B problems (see the module's docstring), all of them powers of two.

    Attributes:
        variable: (1 or R, n) factors D, R dividing B; None where all are 1.
        row: (1 or R, m) factors E; None where all are 1.
        length: (B, 1) β; None where all are 1.
        cost: (B, 1) σ; None where all are 1.
    """

    variable: Tensor | None = None
    row: Tensor | None = None
    length: Tensor | None = None
    cost: Tensor | None = None

    @classmethod
    def of(cls, problem: ConicProblem, exponents: Tensor | None = None) -> Units:
        """The units of a problem.

        Args:
            problem: B elements with finite data.
            exponents: (B, 2) exponents of ``length`` and ``cost`` that a warm-start state is in, NaN where there is
                none; they are kept where the data still allow.
        """
        if problem.batch_size == 0 or problem.structure.n == 0:
            return cls()
        variable, row = _matrix_units(problem)
        length, cost = _vector_units(problem, variable, row, exponents)
        return cls(variable, row, length, cost)

    @property
    def is_trivial(self) -> bool:
        """Whether all factors are 1."""
        return all(part is None for part in (self.variable, self.row, self.length, self.cost))

    @property
    def keeps_matrices(self) -> bool:
        """Whether P and A are those of the problem up to a factor of P."""
        return self.variable is None and self.row is None

    def select(self, elements: Sequence[int]) -> Units:
        """The units of these elements."""
        index = torch.as_tensor(list(elements), dtype=torch.int64)

        def chosen(part: Tensor | None) -> Tensor | None:
            if part is None or part.shape[0] == 1:
                return part
            return part[index.to(part.device) % part.shape[0]]

        return Units(*(chosen(part) for part in (self.variable, self.row, self.length, self.cost)))

    def exponents(self, batch_size: int) -> Tensor:
        """(B, 2) exponents of ``length`` and ``cost``."""
        columns = [
            torch.zeros(batch_size, 1) if part is None else torch.log2(part).cpu().expand(batch_size, 1)
            for part in (self.length, self.cost)
        ]
        return torch.cat([column.double() for column in columns], 1)

    def of_length(self, factor: Tensor) -> Units:
        """The same units with another length, ``factor`` (B, 1) times this one, and the objective in proportion.

        The factor of P, ``σ β²``, stays what it is.
        """
        length = factor if self.length is None else self.length * factor
        cost = factor**-2 if self.cost is None else self.cost * factor**-2
        return replace(self, length=length, cost=cost)

    # -- problems -------------------------------------------------------------------------------------------------

    def apply(self, problem: ConicProblem) -> ConicProblem:
        """The problem in these units; data that no factor touches are the same tensors."""
        if self.is_trivial:
            return problem
        structure, data, size = problem.structure, problem.data, problem.batch_size
        P, A = data.P, data.A
        if structure.quadratic.nnz:
            if self.variable is not None:
                pair = _pair(self.variable, structure.quadratic.rows, structure.quadratic.columns)
                P = _memo(P, ("P", _key(self.variable)), partial(_times, P, pair, size))
            factor = self._quadratic_factor(size)
            if factor is not None:
                # A factor that all elements share leaves a shared P shared.
                common = bool((factor == factor[0]).all())
                P = P * factor[0] if common else per_element(P, size) * factor
        if structure.constraint.nnz and not self.keeps_matrices:
            A = _memo(A, ("A", _key(self.variable), _key(self.row)), partial(self._constraint, problem))
        length, cost = self._length(problem), self._cost(problem)
        D, E = self._variable(problem), self._row(problem)
        lower_index, upper_index = (structure.index(f"{end}_index", problem.device) for end in ("lower", "upper"))
        scaled = ConicData(
            P=P,
            q=_over_batch(data.q, cost * length * D, size),
            A=A,
            b=_over_batch(data.b, E / length, size),
            lower=_over_batch(data.lower, 1.0 / (length * D)[:, lower_index], size),
            upper=_over_batch(data.upper, 1.0 / (length * D)[:, upper_index], size),
        )
        return replace(problem, data=scaled)

    def _constraint(self, problem: ConicProblem) -> Tensor:
        constraint, A, size = problem.structure.constraint, problem.data.A, problem.batch_size
        if self.variable is not None:
            A = _times(A, self.variable[:, torch.from_numpy(constraint.columns).to(A.device)], size)
        if self.row is not None:
            A = _times(A, self.row[:, torch.from_numpy(constraint.rows).to(A.device)], size)
        return A

    def _quadratic_factor(self, size: int) -> Tensor | None:
        if self.length is None and self.cost is None:
            return None
        one = torch.ones(size, 1, dtype=torch.float64)
        length, cost = (one if part is None else part for part in (self.length, self.cost))
        factor = cost * length.to(cost.device) ** 2
        return None if bool((factor == 1.0).all()) else factor

    # -- points, tilts and changes --------------------------------------------------------------------------------

    def point_in(self, problem: ConicProblem, point: ConicPoint) -> ConicPoint:
        """A point of the problem, (B, ·) each, in these units."""
        if self.is_trivial:
            return point
        length, cost, D, E = self._length(problem), self._cost(problem), self._variable(problem), self._row(problem)
        return ConicPoint(point.x / (length * D), point.y * (cost * length) / E, point.z * (cost * length * D))

    def point_out(self, problem: ConicProblem, point: ConicPoint) -> ConicPoint:
        """A point, or a change of one, that is in these units, in the problem's own."""
        if self.is_trivial:
            return point
        length, cost, D, E = self._length(problem), self._cost(problem), self._variable(problem), self._row(problem)
        return ConicPoint(point.x * (length * D), point.y * E / (cost * length), point.z / (cost * length * D))

    def slack_in(self, problem: ConicProblem, slack: Tensor) -> Tensor:
        """A slack ``b - A x``, (B, m), in these units."""
        return slack if self.is_trivial else slack * self._row(problem) / self._length(problem)

    def slack_out(self, problem: ConicProblem, slack: Tensor) -> Tensor:
        """The inverse of :meth:`slack_in`."""
        return slack if self.is_trivial else slack * self._length(problem) / self._row(problem)

    def tilt_in(self, problem: ConicProblem, tilt: ConicPoint) -> ConicPoint:
        """A tilt ``<g, point>`` of the Lagrangian as one of ``σ`` times it, in these units."""
        if self.is_trivial:
            return tilt
        length, cost, D, E = self._length(problem), self._cost(problem), self._variable(problem), self._row(problem)
        return ConicPoint(tilt.x * (cost * length * D), tilt.y * E / length, tilt.z / (length * D))

    def _length(self, problem: ConicProblem) -> Tensor:
        return _one(problem) if self.length is None else self.length

    def _cost(self, problem: ConicProblem) -> Tensor:
        return _one(problem) if self.cost is None else self.cost

    def _variable(self, problem: ConicProblem) -> Tensor:
        if self.variable is None:
            return problem.data.q.new_ones(1, problem.structure.n)
        return _rows(self.variable, problem.batch_size)

    def _row(self, problem: ConicProblem) -> Tensor:
        if self.row is None:
            return problem.data.q.new_ones(1, problem.structure.m)
        return _rows(self.row, problem.batch_size)


_memo = TensorMemo()


def _key(part: Tensor | None) -> bytes:
    return b"" if part is None else part.cpu().numpy().tobytes()


def _one(problem: ConicProblem) -> Tensor:
    return problem.data.q.new_ones(1, 1)


def _rows(part: Tensor, size: int) -> Tensor:
    return part if part.shape[0] in (1, size) else part.repeat(size // part.shape[0], 1)


def _pair(variable: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    return (
        variable[:, torch.from_numpy(rows).to(variable.device)]
        * variable[:, torch.from_numpy(columns).to(variable.device)]
    )


def _times(datum: Tensor, factor: Tensor, size: int) -> Tensor:
    """Values times factors (1 or R, ·), shared where both are."""
    if factor.shape[0] == 1:
        return datum * factor[0]
    if datum.ndim == 1 or datum.shape[0] == factor.shape[0]:
        return datum * factor
    return per_element(datum, size) * _rows(factor, size)


def _over_batch(datum: Tensor, factor: Tensor, size: int) -> Tensor:
    """The same, but only where a factor is not 1."""
    if datum.shape[-1] == 0 or bool((factor == 1.0).all()):
        return datum
    return _times(datum, factor, size)


# -- how large data are -------------------------------------------------------------------------------------------


def _exponent(sizes: Tensor) -> Tensor:
    """``e`` with ``2^(e-1) ≤ size < 2^e``, as float64; NaN where the size is 0 or not finite."""
    exponent = torch.frexp(sizes).exponent.double()
    return torch.where((sizes > 0) & torch.isfinite(sizes), exponent, torch.nan)


def _power(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponents), exponents.to(torch.int32))


def _matrix_units(problem: ConicProblem) -> tuple[Tensor | None, Tensor | None]:
    """D and E, by Ruiz's equilibration of P and A where a row or a column of theirs is far from order 1."""
    structure, A, P = problem.structure, problem.data.A, problem.symmetric_P
    rows, columns = _memo(A, ("maxima", structure.constraint.digest), partial(_maxima, structure.constraint, A))
    if not _is_wide(rows) and not _is_wide(columns):
        if not structure.quadratic.nnz:
            return None, None
        _, curvature = _memo(P, ("maxima", structure.quadratic.digest), partial(_maxima, structure.quadratic, P))
        # Variables that no row involves are known by their curvature alone.
        alone = torch.where(columns > 0, torch.nan, curvature / maximum_norm(curvature)[:, None])
        if not bool((_exponent(alone) < -2 * MODERATE).any()):
            return None, None
    return _equilibrated(structure, A, P)


def _maxima(pattern: SparsityPattern, values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitudes in the rows (·, r) and in the columns (·, c) of matrices on a pattern."""
    magnitudes = torch.atleast_2d(values.detach().abs())
    return pattern.maxima(magnitudes, "rows"), pattern.maxima(magnitudes, "columns")


def _is_wide(sizes: Tensor) -> bool:
    return bool((_exponent(sizes).abs() > MODERATE).any())


def _equilibrated(structure: ConicStructure, A: Tensor, P: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Exponents e of E and d of D so that the rows of E A D and the columns of it and of D P D are of order 1."""
    constraint, quadratic = structure.constraint, structure.quadratic
    a, p = (torch.log2(torch.atleast_2d(values.detach().abs())) for values in (A, P))  # -inf for a zero
    count = max(a.shape[0] if constraint.nnz else 1, p.shape[0] if quadratic.nnz else 1)
    e, d = a.new_zeros(count, structure.m), a.new_zeros(count, structure.n)
    a, p = (part if part.shape[0] in (1, count) else part.repeat(count // part.shape[0], 1) for part in (a, p))
    blocks = torch.from_numpy(structure.cones.blocks).to(A.device)
    row, column, first, second = (
        torch.from_numpy(index).to(A.device)
        for index in (constraint.rows, constraint.columns, quadratic.rows, quadratic.columns)
    )
    for _ in range(EQUILIBRATIONS):
        own, curvature = a + e[:, row] + d[:, column], p + d[:, first] + d[:, second]
        # The objective has a unit of its own, the largest entry of P.
        curvature = curvature - curvature.amax(-1, keepdim=True).nan_to_num(neginf=0.0) if quadratic.nnz else curvature
        rows = _by_block(constraint.maxima(own, "rows"), blocks)
        columns = torch.maximum(constraint.maxima(own, "columns"), quadratic.maxima(curvature, "columns"))
        e -= 0.5 * torch.where(torch.isfinite(rows), rows, 0.0)
        d -= 0.5 * torch.where(torch.isfinite(columns), columns, 0.0)
        d[:, structure.index("integer_index", d.device)] = 0.0
    e, d = e.round(), d.round()
    return (_power(d) if bool(d.any()) else None), (_power(e) if bool(e.any()) else None)


def _by_block(rows: Tensor, blocks: Tensor) -> Tensor:
    """The largest value of the cone that each row belongs to."""
    if not blocks.shape[0]:
        return rows
    count = int(blocks[-1]) + 1
    if count == blocks.shape[0]:
        return rows
    index = blocks.expand(rows.shape)
    return rows.new_full((rows.shape[0], count), -torch.inf).scatter_reduce(1, index, rows, "amax").gather(1, index)


def _vector_units(
    problem: ConicProblem, variable: Tensor | None, row: Tensor | None, exponents: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """β and σ: right sides and bounds of order 1, and an objective whose largest coefficient is."""
    structure, data, size = problem.structure, problem.data, problem.batch_size
    own = Units(variable, row)
    D, E = own._variable(problem), own._row(problem)
    q, P = maximum_norm(_times(data.q, D, size)), problem.symmetric_P
    if structure.quadratic.nnz:
        if variable is not None:
            P = _times(P, _pair(variable, structure.quadratic.rows, structure.quadratic.columns), size)
        P = maximum_norm(P)
    else:
        P = q.new_zeros(1)
    right = maximum_norm(_times(data.b, E, size))
    for bound, name in ((data.lower, "lower_index"), (data.upper, "upper_index")):
        if bound.shape[-1]:
            finite = torch.where(bound.abs() < INFINITE, bound, 0.0)
            right = _largest_of(right, maximum_norm(_times(finite, 1.0 / D[:, structure.index(name, D.device)], size)))
    e_q, e_P, e_b = (_exponent(_flat(part, size)) for part in (q, P, right))
    # A length: of right sides and bounds, or of the minimiser without constraints where they are all zero; between the
    # two where they are not too far apart, as nobody knows which of them the solution is like.
    free = e_q - e_P
    apart = (free - e_b).abs() <= 3 * MODERATE
    length = torch.where(torch.isnan(e_b), free, torch.where(apart, (0.5 * (e_b + free)).round(), e_b)).nan_to_num(0.0)
    length, cost = _snapped(length, e_q, e_P, exponents)
    if structure.quadratic.nnz and _row_count(data.P) < size:
        cost = _in_common(length, cost, _row_count(data.P))
    return tuple(_power(part)[:, None] if bool(part.any()) else None for part in (length, cost))


def _snapped(length: Tensor, e_q: Tensor, e_P: Tensor, exponents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Exponents of length and cost: those of a state where they still fit, else zero where the data are moderate."""

    def cost_of(length: Tensor) -> Tensor:
        terms = torch.stack([e_q + length, e_P + 2 * length])
        return -terms.nan_to_num(nan=-torch.inf).amax(0).nan_to_num(neginf=0.0)

    chosen = torch.where(length.abs() <= MODERATE, 0.0, length)
    if exponents is not None:
        known = exponents.to(length.device)
        keep = ((known[:, 0] - length).abs() <= KEPT) & ((known[:, 1] - cost_of(known[:, 0])).abs() <= KEPT)
        chosen = torch.where(keep, known[:, 0], chosen)
    cost = cost_of(chosen)
    cost = torch.where(cost.abs() <= MODERATE, 0.0, cost)
    if exponents is not None:
        cost = torch.where(keep, known[:, 1], cost)
    return chosen, cost


def _in_common(length: Tensor, cost: Tensor, rows: int) -> Tensor:
    """The cost with which ``σ β²`` is common to the elements that share a row of P, where it is nearly so anyhow."""
    quadratic = (cost + 2 * length).reshape(-1, rows)
    common = quadratic.median(0).values
    close = (quadratic - common).abs() <= MODERATE
    return torch.where(close, common - 2 * length.reshape(-1, rows), cost.reshape(-1, rows)).reshape(-1)


def _row_count(datum: Tensor) -> int:
    return 1 if datum.ndim == 1 else datum.shape[0]


def _flat(sizes: Tensor, size: int) -> Tensor:
    """() or (R,) to (size,)."""
    sizes = torch.atleast_1d(sizes)
    return sizes.repeat(size // sizes.shape[0])


def _largest_of(first: Tensor, second: Tensor) -> Tensor:
    """The larger of two vectors () or (R,), rows repeating."""
    first, second = torch.atleast_1d(first), torch.atleast_1d(second)
    size = max(first.shape[0], second.shape[0])
    return torch.maximum(_flat(first, size), _flat(second, size))
