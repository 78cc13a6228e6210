"""How large the data of conic programs are, and the units that follow: see :mod:`lpgd.problems.conic.units`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, from_numpy
from lpgd.execution.memo import TensorMemo
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicStructure, per_element

if TYPE_CHECKING:
    from lpgd.problems.conic.problem import ConicProblem

__all__ = [
    "INFINITE",
    "curvatures",
    "lonely_units",
    "lonely_variables",
    "matrix_units",
    "pairs",
    "repeated",
    "times",
    "vector_units",
]

DIGITS = 40
"""Entries of a row that are so many exponents of two below its largest one, after scaling, are rounding."""
MODERATE = 6
"""Exponents of two up to this size are left alone: a factor of 64."""
LEAST_MODERATE, LARGEST_MODERATE = 0.5**MODERATE / 2, 2.0**MODERATE
"""Sizes from the first to below the second have such exponents."""
ALIKE = 0.25**MODERATE
"""Curvatures are of one unit if none is below this share of the largest."""
SWEEPS, DAMPING = 30, 0.7
"""Alternating steps of the fit of rows and variables, and the part of a step of variables that is taken."""
ROUNDING = 1e-30
"""Entries this much smaller than the largest one say nothing of scales."""
LARGEST = 60
"""The largest exponent of a row's or a variable's factor."""
KEPT = 12
"""Units of a warm-start state are kept as long as the data are within this exponent of them."""
INFINITE = 1e20
"""Bounds of this magnitude and beyond are infinite."""


_memo = TensorMemo()


def _exponent(sizes: Tensor) -> Tensor:
    """``e`` with ``2^(e-1) ≤ size < 2^e``, as float64; NaN where the size is 0 or not finite."""
    exponent = torch.frexp(sizes).exponent.double()
    return torch.where((sizes > 0) & torch.isfinite(sizes), exponent, torch.nan)


def power(exponents: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(exponents), exponents.to(torch.int32))


def lonely_variables(problem: ConicProblem, variable: Tensor | None) -> Tensor | None:
    """(1 or R, n) variables that neither P nor A involves: bounds and cost are all that there is of them.

    None where there are none, or no others.  Each is a problem of its own, whose sizes say nothing of the others'.
    Entries of A that are rounding in their rows involve nobody: their variables have no unit by :func:`matrix_units`,
    whose ``variable`` this is.
    """
    structure, A = problem.structure, problem.data.A
    lonely = _uninvolved(structure.constraint, A, variable)
    if lonely is None:
        return None
    if structure.quadratic.nnz and bool(lonely.any()):
        flat = curvatures(problem) == 0
        count = max(lonely.shape[0], flat.shape[0])
        lonely = repeated(lonely, count) & repeated(flat, count)
    lonely = lonely & ~lonely.all(-1, keepdim=True)
    return lonely if bool(lonely.any()) else None


def _uninvolved(pattern: SparsityPattern, A: Tensor, variable: Tensor | None) -> Tensor | None:
    """(1 or R, n) columns without an entry of A D that is more than rounding in its row; None where all have one."""
    tops, columns = _memo(A, ("maxima", pattern.digest), partial(_maxima, pattern, A))
    least = 0.5**DIGITS
    if not columns.numel():
        return None
    if not pattern.nnz:
        return columns == 0
    if variable is None and float(columns.amin()) > least * float(tops.amax()):
        return None
    values = torch.atleast_2d(A.detach().abs())
    if variable is not None:
        count = max(len(values), len(variable))
        values = repeated(values, count) * repeated(variable, count)[:, from_numpy(pattern.columns).to(A.device)]
    tops = pattern.maxima(values, "rows")
    counts = (values > least * tops[:, from_numpy(pattern.rows).to(A.device)]).to(values.dtype)
    return pattern.maxima(counts, "columns") == 0


def lonely_units(problem: ConicProblem, variable: Tensor | None, lonely: Tensor) -> Tensor | None:
    """(B, n) factors of lonely variables that make their costs as large as the largest of the others; None if all 1."""
    costs, lonely = (
        torch.log2(per_element(problem.data.q.detach().abs(), problem.batch_size)),
        repeated(lonely, problem.batch_size),
    )
    scaled_costs = costs if variable is None else costs + torch.log2(repeated(variable, problem.batch_size))
    others = torch.where(lonely, -torch.inf, scaled_costs).amax(-1, keepdim=True)
    factors = torch.where(lonely & torch.isfinite(costs) & torch.isfinite(others), (others - costs).round(), 0.0)
    factors[:, problem.structure.index("integer_index", factors.device)] = 0.0
    factors = torch.where((factors.abs() > MODERATE).any(-1, keepdim=True), factors.clamp(-LARGEST, LARGEST), 0.0)
    return power(factors) if bool(factors.any()) else None


def matrix_units(problem: ConicProblem, apart: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
    """D and E of elements of which a row or a column of P and A is far from order 1; 1 for the others.

    Beside curved cones curvatures that are far from each other count as well: ``huber(norm(v) / s)`` has one of s² for
    a variable of order 1 beside v of the size s, whose columns look moderate as cones have rows of ones.  So do columns
    that are mostly far from order 1, but for a row such as that of a loose ``norm(x) <= 1e4``.
    Rows that are ``apart``, (B, m), say nothing of D.
    """
    if apart is not None:
        return _units_apart(problem, apart)
    structure, A, P = problem.structure, problem.data.A, problem.symmetric_P
    row_maxima, column_maxima = _memo(
        A, ("maxima", structure.constraint.digest), partial(_maxima, structure.constraint, A)
    )
    hidden = _memo(A, ("hidden", structure.digest), partial(_hidden, structure, A))
    moderate = not bool(hidden.any()) and all(_are_moderate(maxima) for maxima in (row_maxima, column_maxima))
    if moderate and not (structure.quadratic.nnz and _are_apart(curvatures(problem))):
        return None, None
    wide = _is_wide(row_maxima) | _is_wide(column_maxima) | hidden
    if structure.quadratic.nnz and not bool(wide.all()):
        curvature = curvatures(problem)
        count = max(column_maxima.shape[0], curvature.shape[0])
        column_maxima, curvature = repeated(column_maxima, count), repeated(curvature, count)
        shares = curvature / maximum_norm(curvature)[:, None]
        if structure.cones.is_polyhedral:  # others are known by their rows
            shares = torch.where(column_maxima > 0, torch.nan, shares)
        wide = repeated(wide[:, None], count)[:, 0] | (_exponent(shares) < -2 * MODERATE).any(-1)
    if not bool(wide.any()):
        return None, None
    return _equilibrated(structure, A, P, wide)


def _units_apart(problem: ConicProblem, apart: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """D of the program without some rows, (B, m), and E, in which those rows have entries of order 1, too."""
    pattern, values = problem.structure.constraint, per_element(problem.data.A.detach(), len(apart))
    rest = torch.where(apart[:, from_numpy(pattern.rows).to(values.device)], 0.0, values)
    variable, row = matrix_units(replace(problem, data=problem.data._replace(A=rest)))
    if variable is None:
        return variable, row
    sizes = pattern.maxima((values * repeated(variable, len(values))[:, from_numpy(pattern.columns)]).abs(), "rows")
    blocks = from_numpy(problem.structure.cones.blocks).to(values.device).expand(len(values), -1)
    sizes = torch.zeros_like(sizes).scatter_reduce(1, blocks, sizes, "amax").gather(1, blocks)
    others = torch.ones_like(sizes) if row is None else repeated(row, len(values))
    return variable, torch.where(apart & (sizes > 0), power(-_exponent(sizes)), others)


def curvatures(problem: ConicProblem) -> Tensor:
    """(R, n) the largest magnitude in each row of ``½ (P + Pᵀ)``."""
    pattern, P = problem.structure.quadratic, problem.symmetric_P
    return _memo(P, ("rows", pattern.digest), lambda: pattern.largest(torch.atleast_2d(P.detach()), ("rows",))[0])


def _maxima(pattern: SparsityPattern, values: Tensor) -> tuple[Tensor, ...]:
    """The largest magnitudes in the rows (·, r) and in the columns (·, c) of matrices on a pattern."""
    return pattern.largest(torch.atleast_2d(values.detach()), ("rows", "columns"))


def _hidden(structure: ConicStructure, A: Tensor) -> Tensor:
    """(R,) whether a column is far from order 1 on the average, whatever its largest entry, beside curved cones."""
    if structure.cones.is_polyhedral:
        return A.new_zeros(1, dtype=torch.bool)
    logarithms, counts = _logarithms(A)
    columns, like = from_numpy(structure.constraint.columns).to(A.device), A.new_zeros(len(counts), structure.n)
    means = _sums(logarithms, columns, like) / _sums(counts, columns, like).clamp(min=1.0)
    return (means.abs() > MODERATE).any(-1)


def _is_wide(sizes: Tensor) -> Tensor:
    return (_exponent(sizes).abs() > MODERATE).any(-1)


def _are_moderate(sizes: Tensor) -> bool:
    """Whether no size but 0 is wide."""
    values = sizes.cpu().numpy()
    return bool((values < LARGEST_MODERATE).all() and ((values >= LEAST_MODERATE) | (values == 0.0)).all())


def _are_apart(curvature: Tensor) -> bool:
    """Whether some that are not 0 are far below the largest one of their row."""
    values = curvature.cpu().numpy()
    return bool(((values < ALIKE * values.max(1, keepdims=True)) & (values > 0.0)).any())


def _equilibrated(structure: ConicStructure, A: Tensor, P: Tensor, wide: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Exponents e of E and d of D that bring the entries of E A D and of D P D, up to a factor c, nearest to 1.

    They minimise ``Σ (log|A_ij| + e_i + d_j)² + Σ (log|P_ij| + d_i + d_j + c)²`` over the entries that are not zero,
    approximately, so that factors of rows and of variables are found as such whatever the pattern is (Curtis and Reid,
    On the automatic scaling of matrices for Gaussian elimination, 1972).  Largest entries would not tell one from the
    other.
    """
    constraint, quadratic, device = structure.constraint, structure.quadratic, A.device
    index = {
        name: from_numpy(np.asarray(indices)).to(device)
        for name, indices in (
            ("row", structure.cones.blocks[constraint.rows]),
            ("column", constraint.columns),
            ("first", quadratic.rows),
            ("second", quadratic.columns),
        )
    }
    blocks = from_numpy(structure.cones.blocks).to(device)
    a, in_a = _logarithms(A)
    p, in_p = _logarithms(P)
    count = max(len(entries) for entries in (a, p) if entries.shape[-1])
    a, in_a, p, in_p = (
        entries.expand(count, -1) if len(entries) == 1 else repeated(entries, count) for entries in (a, in_a, p, in_p)
    )
    e, d = _fitted(structure, a, in_a, p, in_p, index)
    if constraint.nnz:
        # What is left of zeros by rounding is far below all else in its row, and would pull the fit.
        left = torch.where(in_a > 0, a + e[:, index["row"]] + d[:, index["column"]], -torch.inf)
        tops = left.new_full((count, e.shape[1]), -torch.inf)
        tops.scatter_reduce_(1, index["row"].expand(count, -1), left, "amax")
        real = in_a * (left > tops[:, index["row"]] - DIGITS)
        if bool((real != in_a).any()):  # the same fit as before where nothing is left out
            e, d = _fitted(structure, a, real, p, in_p, index)
    e, d = e[:, blocks].round().clamp(-LARGEST, LARGEST), d.round().clamp(-LARGEST, LARGEST)
    chosen = repeated(wide[:, None], max(len(wide), len(e)))  # others are left as they are alone
    e, d = (torch.where(chosen, repeated(exponents, max(len(wide), len(e))), 0.0) for exponents in (e, d))
    if structure.two_sided:  # the value of a row is in the unit of the row
        zero = structure.cones.zero
        d[:, structure.own :] = -e[:, zero - structure.two_sided : zero]
    return (power(d) if bool(d.any()) else None), (power(e) if bool(e.any()) else None)


def _fitted(
    structure: ConicStructure, a: Tensor, in_a: Tensor, p: Tensor, in_p: Tensor, index: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Exponents of row blocks and of variables: those of :func:`_equilibrated`, for the entries that count."""
    count, device = a.shape[0], a.device
    blocks = structure.cones.blocks
    e, d = a.new_zeros(count, int(blocks[-1]) + 1 if structure.m else 0), a.new_zeros(count, structure.n)
    c = a.new_zeros(count, 1)
    # Off the diagonal an entry of P stands for itself and its mirror image, on it for both of its variables.
    twice = torch.where(index["first"] == index["second"], 4.0, 2.0) * in_p
    row_counts = _sums(in_a, index["row"], e)
    column_counts = _sums(in_a, index["column"], d) + _sums(twice, index["second"], d)
    for _ in range(SWEEPS):
        e = -_sums(in_a * (a + d[:, index["column"]]), index["row"], e) / row_counts.clamp(min=1.0)
        c = -(in_p * (p + d[:, index["first"]] + d[:, index["second"]])).sum(1, keepdim=True)
        c = c / in_p.sum(1, keepdim=True).clamp(min=1.0)
        others = torch.where(index["first"] == index["second"], 0.0, d[:, index["first"]])
        terms = _sums(in_a * (a + e[:, index["row"]]), index["column"], d)
        terms = terms + _sums(2.0 * in_p * (p + others + c), index["second"], d)
        d = d - DAMPING * (d + terms / column_counts.clamp(min=1.0))
        d[:, structure.index("integer_index", device)] = 0.0
    return e, d


def _logarithms(values: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents of the entries (R, nnz), and which of them count, as zeros and ones: those that are not rounding."""
    magnitudes = torch.atleast_2d(values.detach().abs())
    largest = magnitudes.amax(-1, keepdim=True) if values.shape[-1] else magnitudes
    counts = (magnitudes > ROUNDING * largest) & torch.isfinite(magnitudes)
    return torch.where(counts, torch.log2(magnitudes), 0.0), counts.to(values.dtype)


def _sums(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_add(1, index, values)


def vector_units(
    problem: ConicProblem,
    variable: Tensor | None,
    row: Tensor | None,
    lonely: Tensor | None,
    alone: Tensor | None,
    exponents: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """β, where it is not given by ``lengths`` (B,), and σ: an objective whose largest coefficient is of order 1."""
    structure, data, size = problem.structure, problem.data, problem.batch_size
    D = None if variable is None else repeated(variable, size)
    if alone is not None:
        D = alone if D is None else D * alone
    q, right = data.q if D is None else times(data.q, D, size), data.b
    if row is not None:
        right = times(right, repeated(row, size), size)
    # A number for each element: in NumPy, whose small operations take a third of torch's time.
    sizes = _maxima_of(right, size)
    for bound, name in ((data.lower, "lower_index"), (data.upper, "upper_index")):
        if bound.shape[-1]:
            index = structure.index(name, bound.device)
            finite = torch.where(bound.abs() < INFINITE, bound, 0.0)
            if lonely is not None:
                finite = torch.where(repeated(lonely, problem.batch_size)[:, index], 0.0, per_element(finite, size))
            if D is not None:
                finite = times(finite, 1.0 / D[:, index], size)
            sizes = np.maximum(sizes, _maxima_of(finite, size))
    if not structure.quadratic.nnz:
        curvature = np.zeros(size)
    elif variable is None:
        curvature = _maxima_of(curvatures(problem), size)
    else:
        both = pairs(variable, structure.quadratic.rows, structure.quadratic.columns)
        curvature = _maxima_of(times(problem.symmetric_P, both, size), size)
    e_q, e_P, e_b = (_exponents(magnitudes) for magnitudes in (_maxima_of(q, size), curvature, sizes))
    # A length: of right sides and bounds, or of the minimiser without constraints where they are all (nearly) zero.
    free = e_q - e_P
    length = np.nan_to_num(np.fmax(e_b, np.where(np.isnan(e_b), free, free - 3 * MODERATE)), nan=0.0)
    # Where matrices are scaled nothing is gained by leaving vectors alone, and part of their scale may be in D and E.
    scaled = np.zeros(size, dtype=np.bool_)
    if lengths is not None:
        given = lengths.cpu().numpy()
        scaled |= np.isfinite(given)
        length = np.where(scaled, given, length)
    for factors in (variable, row, alone):
        if factors is not None:
            scaled |= (repeated(factors, size) != 1.0).any(-1).cpu().numpy()
    length, cost = _snapped(length, e_q, e_P, exponents, np.where(scaled, 0.0, float(MODERATE)))
    if structure.quadratic.nnz:  # also where no element shares its P: alone it is what all share
        cost = _on_grid(length, cost, np.where(scaled | (np.abs(e_P) > MODERATE), e_P, 0.0))
    return _factors(length, data.q), _factors(cost, data.q)


def _maxima_of(values: Tensor, size: int) -> FloatArray:
    """(B,) the largest magnitude in each row of values, () or (R, ·); 0 for empty ones."""
    largest = np.abs(np.atleast_2d(values.detach().cpu().numpy())).max(-1, initial=0.0)
    return largest if len(largest) == size else np.tile(largest, size // len(largest))


def _exponents(sizes: FloatArray) -> FloatArray:
    """:func:`_exponent` in NumPy."""
    return np.where((sizes > 0) & np.isfinite(sizes), np.frexp(sizes)[1], np.nan)


def _factors(exponents: FloatArray, like: Tensor) -> Tensor | None:
    """(B,) exponents as (B, 1) factors; None where all are 1."""
    return power(from_numpy(exponents).to(like.device))[:, None] if exponents.any() else None


def _snapped(
    length: FloatArray, e_q: FloatArray, e_P: FloatArray, exponents: Tensor | None, moderate: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Exponents of length and cost: those of a state where they still fit, else zero where the data are moderate."""

    def cost_of(length: FloatArray) -> FloatArray:
        terms = np.fmax(e_q + length, e_P + 2 * length)
        return -np.nan_to_num(terms, nan=0.0)

    chosen = np.where(np.abs(length) <= moderate, 0.0, length)
    cost = cost_of(chosen)
    cost = np.where(np.abs(cost) <= moderate, 0.0, cost)
    if exponents is None:
        return chosen, cost
    known = exponents.cpu().numpy()
    keep = (np.abs(known[:, 0] - length) <= KEPT) & (np.abs(known[:, 1] - cost_of(known[:, 0])) <= KEPT)
    kept_length = np.where(keep, known[:, 0], chosen)
    again = cost_of(kept_length)
    return kept_length, np.where(keep, known[:, 1], np.where(np.abs(again) <= moderate, 0.0, again))


def _on_grid(length: FloatArray, cost: FloatArray, e_P: FloatArray) -> FloatArray:
    """The cost with ``σ β²`` on a coarse grid, so that elements that share a row of P mostly share this factor.

    The grid begins where P is of order 1, by its exponent e_P: at nothing that depends on other elements.
    """
    first = -np.nan_to_num(e_P, nan=0.0)
    steps = (cost + 2 * length - first) / (2 * MODERATE)
    on_grid = first + 2 * MODERATE * np.round(steps) - 2 * length
    return np.where(cost + 2 * length == 0, cost, on_grid)  # what is left alone stays so


def times(datum: Tensor, factor: Tensor, size: int) -> Tensor:
    """Values times factors (1 or R, ·), shared where both are."""
    if factor.shape[0] == 1:
        return datum * factor[0]
    if datum.ndim == 1 or datum.shape[0] == factor.shape[0]:
        return datum * factor
    return per_element(datum, size) * repeated(factor, size)


def pairs(variable: Tensor, rows: IntArray, columns: IntArray) -> Tensor:
    """``D_i D_j`` for the entries (i, j) of a pattern: (R, n) to (R, nnz)."""
    return variable[:, from_numpy(rows).to(variable.device)] * variable[:, from_numpy(columns).to(variable.device)]


def repeated(factors: Tensor, size: int) -> Tensor:
    """Factors with R rows, R dividing the batch, for each element; one row stays one."""
    return factors if factors.shape[0] in (1, size) else factors.repeat(size // factors.shape[0], 1)
