"""Which variables of a canonical program are substituted before it is solved: those that a row defines, if it pays.

CVXPY writes ``sum_squares(F @ x - g)`` with a variable t, rows ``F x - t = g`` and the square of t.  A variable t
that a row defines,

    c t + aᵀx = β,    c constant,

can be substituted by ``(β - aᵀx) / c``; the row goes with it.  :mod:`lpgd.layers.cvxpy.substitution` has the
formulas.

**Which ones can be.**  All of this must hold:

- The layer returns neither t nor the row's multiplier.  A loss then acts on what is left, and LPGD's perturbed
  problems for ρ = 0 are the same with and without t, for every τ: tilts are of variables and multipliers that both
  have.
- t is not bounded, and the program has no integers, whose solvers substitute by themselves.
- Every coefficient of t in a row is constant, and there are at most :data:`MOST_ROWS` such rows.
- In the rows ``t + y`` and ``t - y`` of a second-order cone it brings no variable that stands there already.
- c is no tiny pivot: ``|c|`` is at least :data:`SMALLEST_PIVOT` times the row's largest constant coefficient, and
  times 1 where the row holds parameters, whose values are not known yet.
- No other substituted variable stands in the row, and P joins substituted variables with each other only.
- The row is an equality; or it is an inequality ``c t + aᵀx <= β, c > 0``, t has no cost, and it stands otherwise
  only where a larger t is more room: in the first row of a second-order cone or in the last of an exponential one,
  with a negative coefficient.  The inequality may then be an equality.  So CVXPY bounds sums of exponentials
  (logistic, log_sum_exp) and norms.

**Where it pays.**  Where a tenth of variables and rows goes, and the factor of a solver's linear systems, of which P
and A are blocks, gets no more entries than it had: then no iteration takes longer.  Programs beyond :data:`LARGE`
and :data:`MANY` are measured by their own entries.  All candidates are tried, and then a part of them: candidates
that share columns and have rows of one length are a class; classes are left out, longest rows first, as long as the
entries get fewer by that.  Squares are not formed

- of rows with more than :data:`LONGEST` entries that fill less than :data:`FULL` of their columns: that takes longer
  than solving with them;
- of fewer rows than they have columns, where the curvature of each t would be spread over more variables: P becomes
  singular, or nearly so with a small ridge, and active-set methods take up to twice as long.  Huber's penalty is such
  a case, where each row has a variable of its own.

So ``sum_squares(F @ x - g)`` with a dense F of shape (k, n) is substituted where ``k >= n``; the few factors of a
portfolio's risk stay.  Values that would lose digits are solved as the whole program
(:mod:`lpgd.layers.cvxpy.conditioning`).  Measured in docs/decisions/elimination.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray
from lpgd.layers.cvxpy.layout import CanonicalProgram
from lpgd.problems.conic.coordinates.automorphisms import paired_rows
from lpgd.solvers.kkt.superlu import superlu

__all__ = [
    "FULL",
    "LONGEST",
    "MOST_ROWS",
    "NO_PIVOTS",
    "SMALLEST_PIVOT",
    "Pivots",
    "candidates",
    "components",
    "find_pivots",
    "united_support",
]

BoolArray = BoolArray

MOST_ROWS = 4
"""In how many rows a variable may stand."""
SMALLEST_PIVOT = 1e-3
"""Relative to its row: a smaller one would magnify rounding as much more."""
FULL = 0.25
"""From which share of entries on a matrix is multiplied as a dense one."""
LONGEST = 32
"""Of rows that are multiplied entry by entry."""
SMALLER = 0.9
"""What share of variables and rows may be left."""
LARGE, MANY = 4000, 100_000
"""Up to how many variables and rows, and how many entries, programs are measured by their factor."""
MOST_CLASSES = 24
"""How many classes of variables are weighed one by one."""
MOST_TERMS = 3e7
"""Of products that are formed to find the pattern of P; beyond that it counts as full."""


@dataclass(frozen=True, eq=False)
class Pivots:
    """The variables to substitute, and the rows that define them.

    Args:
        rows: (k,) increasing.
        variables: (k,) the variable that each row defines.
        coefficients: (k,) its coefficient there.
    """

    rows: IntArray
    variables: IntArray
    coefficients: FloatArray

    def select(self, chosen: BoolArray) -> Pivots:
        """Some of them: chosen (k,)."""
        return Pivots(self.rows[chosen], self.variables[chosen], self.coefficients[chosen])


NO_PIVOTS = Pivots(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def find_pivots(program: CanonicalProgram) -> Pivots:
    """The variables that are worth to be substituted, by the rule above; there may be none."""
    pivots = candidates(program)
    return _worthwhile(program, pivots) if pivots.rows.size else pivots


def candidates(program: CanonicalProgram) -> Pivots:
    """The variables that can be substituted, by the rule above."""
    if program.integer_index.size or not program.constraint.nnz:
        return NO_PIVOTS
    return _coupled_only_with_each_other(program, _without_lost_differences(program, _pairs(program)))


# What can be substituted


def _pairs(program: CanonicalProgram) -> Pivots:
    """Pairs of a row and a variable: no row holds two of the variables, variables that stand in fewer rows first."""
    A, m, n = program.constraint, program.cones.rows, program.n
    constant = np.diff(program.A.matrix[:, :-1].tocsr().indptr) == 0
    value = np.where(constant, program.A.matrix[:, [-1]].toarray().ravel(), 0.0)
    read_variables, read_rows = _read(program)

    count = np.bincount(A.columns, minlength=n)
    free = ~read_variables & (count <= MOST_ROWS)
    free[program.lower_index] = free[program.upper_index] = False
    free[A.columns[~constant]] = False

    largest = np.zeros(m)
    np.maximum.at(largest, A.rows, np.where(constant, np.abs(value), 1.0))
    zero = A.rows < program.cones.zero
    fits = free[A.columns] & ~read_rows[A.rows] & (np.abs(value) >= SMALLEST_PIVOT * largest[A.rows])
    fits &= zero | _is_tight(program, value)
    entries = np.flatnonzero(fits)
    entries = entries[np.lexsort((A.rows[entries], ~zero[entries], count[A.columns[entries]]))]

    by_row: SparseArray = sp.csr_array((np.ones(A.nnz), (A.rows, A.columns)), shape=(m, n))
    by_column: SparseArray = by_row.tocsc()
    taken_rows, taken_columns = np.zeros(m, dtype=bool), np.zeros(n, dtype=bool)
    chosen: list[int] = []
    for entry in entries.tolist():
        row, column = A.rows[entry], A.columns[entry]
        if taken_rows[row] or taken_columns[column]:
            continue
        chosen.append(entry)
        # The row's other variables stay, and so do the variable's other rows.
        taken_columns[by_row.indices[by_row.indptr[row] : by_row.indptr[row + 1]]] = True
        taken_rows[by_column.indices[by_column.indptr[column] : by_column.indptr[column + 1]]] = True
    picked = np.array(chosen, dtype=np.int64)
    picked = picked[np.argsort(A.rows[picked])]
    return Pivots(A.rows[picked], A.columns[picked], value[picked])


def _read(program: CanonicalProgram) -> tuple[BoolArray, BoolArray]:
    """(n,) and (m,): what the layer's outputs are read from."""
    variables, rows = np.zeros(program.n, dtype=bool), np.zeros(program.cones.rows, dtype=bool)
    for layout in program.variables:
        for matrix, seen in ((layout.primal, variables), (layout.dual, rows)):
            if matrix is not None:
                seen[matrix.tocoo().coords[1]] = True
    return variables, rows


def _is_tight(program: CanonicalProgram, value: FloatArray) -> BoolArray:
    """(nnz A,) whether an entry is that of an inequality which may be an equality: see the module's docstring."""
    A, n, sections = program.constraint, program.n, program.cones.sections
    more_room = np.zeros(program.cones.rows, dtype=bool)
    starts = np.cumsum([0, *program.cones.second_order])[:-1]
    more_room[sections["second_order"].start + starts.astype(np.int64)] = True
    more_room[sections["exponential"]][2::3] = True
    without_cost = np.diff(program.q.matrix.tocsr().indptr) == 0
    without_cost[program.quadratic.rows] = False
    upper = (A.rows >= sections["nonnegative"].start) & (A.rows < sections["nonnegative"].stop) & (value > 0)
    room = more_room[A.rows] & (value < 0)
    only = np.bincount(A.columns[upper], minlength=n) == 1
    only &= np.bincount(A.columns[~upper & ~room], minlength=n) == 0
    return upper & (only & without_cost)[A.columns]


def _without_lost_differences(program: CanonicalProgram, pivots: Pivots) -> Pivots:
    """Those whose rows share no variable with the rows ``t + y`` and ``t - y`` of a cone that the variable stands in.

    Where t and y are of other sizes, what the sum and the difference of such rows have is all that is known of them.
    """
    turned = paired_rows(program.cones, program.constraint.rows, program.constraint.columns)[0].ravel()
    if not turned.size or not pivots.rows.size:
        return pivots
    A = program.constraint
    pattern: SparseArray = sp.csr_array((np.ones(A.nnz), (A.rows, A.columns)), shape=A.shape)
    cones = pattern[turned]
    shared = (pattern[pivots.rows] @ cones.T > 1).multiply(cones[:, pivots.variables].T)
    return pivots.select(np.diff(sp.csr_array(shared).indptr) == 0)


def _coupled_only_with_each_other(program: CanonicalProgram, pivots: Pivots) -> Pivots:
    """Those that P does not join with a variable that stays."""
    inside = np.zeros(program.n, dtype=bool)
    inside[pivots.variables] = True
    P = program.quadratic
    while True:
        joined = P.rows[inside[P.rows] & ~inside[P.columns]]
        if not joined.size:
            return pivots.select(inside[pivots.variables])
        inside[joined] = False


# What pays


def _worthwhile(program: CanonicalProgram, pivots: Pivots) -> Pivots:
    weights = _Weights(program, pivots)
    every = weights.affordable()
    chosen, smallest = every, weights.entries(every)
    for members in weights.classes():
        without = chosen & ~members
        entries = weights.entries(without)
        if entries <= smallest:
            chosen, smallest = without, entries
    none = np.zeros_like(chosen)
    small = weights.size(none) <= LARGE and weights.entries(none) <= MANY
    measure = weights.factor if small else weights.entries
    for option in map(weights.definite, (every, chosen)):
        if weights.size(option) <= SMALLER * weights.size(none) and measure(option) <= measure(none):
            return pivots.select(option)
    return pivots.select(none)


class _Weights:
    """Measures programs in which some of the candidates are substituted.

    Attributes:
        support: (k, n) where the rows that define them have entries besides theirs; candidates that P joins have
            the union of theirs.
        square: (k,) which of them stand in P.
    """

    def __init__(self, program: CanonicalProgram, pivots: Pivots) -> None:
        self.pivots, self.n, self.m = pivots, program.n, program.cones.rows
        A, P = program.constraint, program.quadratic
        count = pivots.rows.size
        self.A: SparseArray = sp.csr_array((np.ones(A.nnz), (A.rows, A.columns)), shape=A.shape)
        self.P: SparseArray = sp.csr_array((np.ones(P.nnz), (P.rows, P.columns)), shape=P.shape)
        pivot_entries = sp.csr_array((np.ones(count), (np.arange(count), pivots.variables)), shape=(count, self.n))
        self.others: SparseArray = _pattern(self.A[pivots.rows] - pivot_entries)
        joined = self.P[pivots.variables][:, pivots.variables]
        self.support = united_support(self.others, joined)
        self.square = np.diff(joined.indptr) > 0

    def affordable(self) -> BoolArray:
        """(k,) whose squares are formed in no more time than a solver takes with their rows."""
        length = np.diff(self.support.indptr)
        affordable = ~self.square | (length <= LONGEST)
        for members, columns in components(self.support, ~affordable):
            affordable[members] = length[members].sum() >= FULL * members.size * columns.size
        return affordable

    def definite(self, chosen: BoolArray) -> BoolArray:
        """Those whose squares do not take curvature and spread it over more variables: (k,)."""
        definite = chosen.copy()
        for members, columns in components(self.support, chosen & self.square):
            if members.size < columns.size:
                definite[members] = False
        return definite

    def classes(self) -> list[BoolArray]:
        """Candidates that stay or go together, those with the longest rows first."""
        length = np.diff(self.support.indptr)
        component = np.zeros(length.size, dtype=np.int64)
        for number, (members, _) in enumerate(components(self.support, length >= 0)):
            component[members] = number
        keys = np.unique(np.stack([-length, component], axis=1), axis=0, return_inverse=True)
        kind = keys[1].ravel()
        if len(keys[0]) > MOST_CLASSES:
            octave = np.log2(np.maximum(length, 1)).astype(np.int64)
            kind = np.unique(-octave, return_inverse=True)[1]
        return [kind == one for one in range(kind.max() + 1)]

    def size(self, chosen: BoolArray) -> int:
        """Variables and rows."""
        return self.n + self.m - 2 * int(chosen.sum())

    def entries(self, chosen: BoolArray) -> int:
        """Entries of one triangle of P and of A, variables and rows."""
        P, squares, A = self._patterns(chosen)
        entries, diagonal = self._filled(P, squares)
        return (entries + diagonal) // 2 + A.nnz + self.size(chosen)

    def factor(self, chosen: BoolArray) -> int:
        """Entries of the triangular factor of ``[[P, Aᵀ], [A, -I]]``, ordered by minimum degree."""
        P, squares, A = self._patterns(chosen)
        if self._is_long(squares):
            squares = sp.csr_array((np.array(squares.sum(0)).ravel() > 0)[None].astype(np.float64))
        system: SparseArray = sp.csc_array(sp.block_array([[P + squares.T @ squares, A.T], [A, None]]))
        # Other values would do: no pivot vanishes, and the factor's pattern is that of its symbolic factorisation.
        system.data = np.random.default_rng(0).uniform(0.1, 1.0, system.nnz)
        system = sp.csc_array(system + sp.diags_array(np.full(system.shape[0], 10.0 * system.nnz)))
        options = {"SymmetricMode": True}
        return superlu(system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options).L.nnz

    def _patterns(self, chosen: BoolArray) -> tuple[Any, Any, Any]:
        """P_KK, the rows of W that are squared, and A', as patterns."""
        variables, rows = self.pivots.variables[chosen], self.pivots.rows[chosen]
        columns, kept = np.ones(self.n, dtype=bool), np.ones(self.m, dtype=bool)
        columns[variables], kept[rows] = False, False
        A: SparseArray = self.A[kept]
        moved: SparseArray = A[:, variables] @ self.others[chosen]
        return (
            self.P[columns][:, columns],
            self.support[chosen & self.square][:, columns],
            _pattern(A + moved)[:, columns],
        )

    @staticmethod
    def _is_long(squares: SparseArray) -> bool:
        return bool(np.square(np.diff(squares.indptr).astype(np.float64)).sum() > MOST_TERMS)

    @staticmethod
    def _filled(P: SparseArray, support: SparseArray) -> tuple[int, int]:
        """How many entries ``P + Σ sᵢ sᵢᵀ`` has, and how many on its diagonal, s the rows of ``support``."""
        present = np.unique(support.indices)
        if present.size and support.nnz == support.shape[0] * present.size:
            support = support[[0]]  # the rows are equal
        if _Weights._is_long(support):
            outside = np.ones(P.shape[0], dtype=bool)
            outside[present] = False
            entries = P.nnz - P[present][:, present].nnz + present.size**2
            return entries, int(np.count_nonzero(P.diagonal()[outside])) + present.size
        total = _pattern(P + support.T @ support)
        return total.nnz, int(np.count_nonzero(total.diagonal()))


def united_support(others: Any, joined: SparseArray) -> Any:
    """(k, n) where the rows have entries besides their variables; those that P joins have the union of theirs.

    Args:
        others: (k, n) the rows' entries.
        joined: (k, k) the entries of P for the variables.
    """
    label = connected_components(joined, directed=False)[1]
    count = others.shape[0]
    groups = sp.csr_array((np.ones(count), (np.arange(count), label)), shape=(count, int(label.max(initial=-1)) + 1))
    return _pattern(groups @ (groups.T @ _pattern(others)))


def components(support: SparseArray, among: BoolArray) -> list[tuple[IntArray, IntArray]]:
    """Sets of these rows that share no column with each other, and the columns of each."""
    rows = np.flatnonzero(among)
    if not rows.size:
        return []
    entries: Any = support[rows]
    label = connected_components(sp.block_array([[None, entries], [entries.T, None]]), directed=False)[1][: rows.size]
    order = np.argsort(label, kind="stable")
    ends = np.flatnonzero(np.diff(label[order])) + 1
    return [(rows[members], np.unique(entries[members].indices)) for members in np.split(order, ends)]


def _pattern(matrix: SparseArray) -> Any:
    """Ones where a matrix of counts is not zero."""
    result: SparseArray = sp.csr_array(matrix, copy=True)
    result.eliminate_zeros()
    result.data = np.ones_like(result.data)
    return result
