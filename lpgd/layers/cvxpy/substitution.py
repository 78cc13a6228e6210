"""A canonical program without the variables that single rows define, and the way back to the whole one.

Let T be the variables that are substituted, R the rows that define them, C the diagonal matrix of their coefficients
there, K and O the variables and rows that stay.  With

    x_T = W x_K + d,    W = -C⁻¹ A_RK,    d = C⁻¹ b_R,

the smaller program has, as P_TK = 0,

    P' = P_KK + Wᵀ P_TT W,   q' = q_K + Wᵀ (q_T + P_TT d),   A' = A_OK + A_OT W,   b' = b_O - A_OT d.

A_OT and C are constant, so that A' and b' are affine maps of the parameters as A and b are; P' and q' are made by
differentiable tensor operations, once and for all where no parameter reaches them.  A datum that only shared
parameters reach stays shared.

Back: x_T is as above, and the stationarity of x_T gives the multipliers of R,

    y_R = -C⁻¹ (P_TT x_T + q_T + A_OTᵀ y_O).

The smaller program's Lagrangian is the larger one's, minimised over x_T and maximised over y_R.  So solutions,
multipliers and derivatives are the same, and perturbed problems are where the perturbation is of x_K and y_O.  An
augmentation (``rho > 0``) is of the variables that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, SparseArray, from_numpy
from lpgd.cones.product import Cones
from lpgd.layers.concrete_values import inspect_values
from lpgd.layers.cvxpy.blocks import places, product, scaled, selection, split
from lpgd.layers.cvxpy.conditioning import Conditioning
from lpgd.layers.cvxpy.elimination import Pivots
from lpgd.layers.cvxpy.layout import AffineMap, CanonicalProgram, VariableLayout
from lpgd.layers.cvxpy.maps import Columns, DataMap, SparseMap
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution, Violation
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicData
from lpgd.problems.solution import AnyProblem

__all__ = ["ExpandedSolution", "Substitution"]


@dataclass(frozen=True, eq=False, repr=False)
class ExpandedSolution(ConicSolution):
    """A solution with all of CVXPY's variables and multipliers.

    Attributes:
        solved: the solution of the smaller program, which the solver was given.
    """

    solved: ConicSolution | None = None

    @property
    def violation(self) -> Violation | None:
        """By how much elements violate the rows of the smaller program."""
        return self.solved.violation if self.solved is not None else None

    def select(self, elements: Tensor, problem: AnyProblem | None = None) -> Self:
        """The solutions of these elements, without their systems."""
        solved = self.solved.select(elements) if self.solved is not None else None
        return replace(super().select(elements, problem), solved=solved)


class Terms(NamedTuple):
    """What the parameters make of the formulas' terms; each shared by the batch, or (B, ...)."""

    W: tuple[Tensor, ...]  # as each block has it
    squares: Tensor  # the entries of P_TT
    shift: Tensor  # d
    linear: Tensor  # q_T
    finite: Tensor | None  # () or (B,), where not all of it is: the elements for which it is; others are zero above


class Substitution:
    """Makes the data of the smaller program, and takes its solutions back.

    Args:
        program: the whole program.
        pivots: what is substituted.

    Attributes:
        program: what is left; of P and q it has the parts P_KK and q_K, on the patterns of P' and q'.
        squared: variables whose part of P' or q' depends on parameters through what is substituted.
    """

    def __init__(self, program: CanonicalProgram, pivots: Pivots) -> None:
        A, P, k = program.constraint, program.quadratic, pivots.rows.size
        kept = np.setdiff1d(np.arange(program.n), pivots.variables)
        kept_rows = np.setdiff1d(np.arange(program.cones.rows), pivots.rows)
        place, defined = places(program.n, kept), places(program.n, pivots.variables)
        row_place, defining = places(program.cones.rows, kept_rows), places(program.cones.rows, pivots.rows)
        self._sizes = (program.n, program.cones.rows)
        self._indices = {"kept": kept, "rows": kept_rows, "variables": pivots.variables, "defining": pivots.rows}
        self._coefficients = from_numpy(pivots.coefficients)

        in_W = np.flatnonzero((defining[A.rows] >= 0) & (place[A.columns] >= 0))
        W = SparsityPattern((k, kept.size), defining[A.rows[in_W]], place[A.columns[in_W]])
        W_map = scaled(program.A, in_W, -1.0 / pivots.coefficients[W.rows])
        shift = scaled(program.b, pivots.rows, 1.0 / pivots.coefficients)

        square_entries = np.flatnonzero((defined[P.rows] >= 0) & (defined[P.columns] >= 0))
        order = np.lexsort((defined[P.rows[square_entries]], defined[P.columns[square_entries]]))
        square_entries = square_entries[order]  # rows may define variables in any order
        self._squares = SparsityPattern((k, k), defined[P.rows[square_entries]], defined[P.columns[square_entries]])
        self._blocks = [kind(W, W_map, self._squares, rows) for kind, rows in split(W, self._squares)]
        left = np.flatnonzero((place[P.rows] >= 0) & (place[P.columns] >= 0))
        entries = place[P.columns[left]] * kept.size + place[P.rows[left]]
        stored = np.unique(np.concatenate([entries, *(block.entries for block in self._blocks)]))
        columns, rows = np.divmod(stored, max(kept.size, 1))
        for block in self._blocks:
            block.target = from_numpy(np.searchsorted(stored, block.entries))
        placed = selection(np.searchsorted(stored, entries), left, (stored.size, P.nnz))

        outside = np.flatnonzero((row_place[A.rows] >= 0) & (defined[A.columns] >= 0))
        A_OT: SparseArray = sp.csr_array(
            (_constants(program.A)[outside], (row_place[A.rows[outside]], defined[A.columns[outside]])),
            shape=(kept_rows.size, k),
        )
        self._moved = SparseMap(A_OT.T)
        constraint, A_map = _substituted_rows(program, (row_place, place), A_OT, W, W_map)
        layouts = program.parameters
        self.program = replace(
            program,
            n=kept.size,
            cones=_fewer(program.cones, pivots.rows),
            quadratic=SparsityPattern((kept.size, kept.size), rows, columns),
            constraint=constraint,
            lower_index=place[program.lower_index],
            upper_index=place[program.upper_index],
            integer_index=place[program.integer_index],
            P=AffineMap(sp.csr_array(placed @ program.P.matrix), layouts),
            q=scaled(program.q, kept),
            A=A_map,
            b=AffineMap(sp.csr_array(program.b.matrix[kept_rows] - A_OT @ shift.matrix), layouts),
            variables=tuple(_left_of(layout, kept, kept_rows) for layout in program.variables),
        )
        self._maps = [DataMap(getattr(self.program, name)) for name in ConicData._fields]
        self._term_maps = [
            DataMap(scaled(program.P, square_entries)),
            DataMap(shift),
            DataMap(scaled(program.q, pivots.variables)),
        ]
        reaching = any(map_.reaching for map_ in (*self._term_maps, *(block.map for block in self._blocks)))
        weighted = np.union1d(self._squares.rows, np.flatnonzero(np.diff(program.q.matrix[pivots.variables].indptr)))
        self.squared = np.unique(W.columns[np.isin(W.rows, weighted)]) if reaching else np.zeros(0, dtype=np.int64)
        self._is_shifted = bool(shift.matrix.nnz) and self._squares.nnz > 0
        self._is_linear = self._is_shifted or bool(program.q.matrix[pivots.variables].nnz)
        self._fixed = self._fixed_quadratic()
        self._conditioning = self._test()

    def _fixed_quadratic(self) -> Tensor | None:
        """P', where no parameter reaches it."""
        maps = [self._maps[0], self._term_maps[0], *(block.map for block in self._blocks)]
        if not self._squares.nnz or any(map_.reaching for map_ in maps):
            return None
        nothing = Columns((), (), 1)
        W = [block.map(nothing) for block in self._blocks]
        return self._quadratic(self._maps[0](nothing), W, self._term_maps[0](nothing))

    def _test(self) -> Conditioning | None:
        """The test of the squares that are formed; None where no values fail it."""
        n = self.program.n
        column, row = np.divmod(np.concatenate([np.zeros(0, np.int64), *(block.entries for block in self._blocks)]), n)
        if np.array_equal(column, row):
            return None  # one factor each: nothing cancels
        reached = np.zeros(n, dtype=bool)
        reached[column] = True
        test = Conditioning(self.program.quadratic, reached, self.program.constraint, self.program.cones.zero)
        if self._fixed is not None and not test(self._fixed, self._fixed.new_zeros(self.program.constraint.nnz)):
            return None
        return test

    def loses_digits(self, data: ConicData | None = None) -> bool:
        """Whether the squares of an element are too ill-conditioned to be formed; without data, those of all calls."""
        if self._conditioning is None:
            return False
        if data is not None:
            return self._conditioning(data.P, data.A)
        if self._fixed is None or self._maps[2].reaching:
            return False
        return self._conditioning(self._fixed, self._maps[2](Columns((), (), 1)))

    def terms(self, columns: Columns) -> Terms:
        """The formulas' terms for parameter values.

        A value that is not finite must reach the outcome of its element and no gradient: 0 · ∞ is none.
        """
        W = tuple(block.map(columns) for block in self._blocks)
        squares, shift, linear = (map_(columns) for map_ in self._term_maps)
        found = [values.detach().sum(-1) for values in (*W, squares, shift, linear)]
        finite = torch.isfinite(torch.stack(torch.broadcast_tensors(*found)).sum(0))
        all_finite: list[bool] = []
        inspect_values(lambda shown: all_finite.append(bool(shown[0].all())), [finite], [0])
        if all_finite[0]:
            return Terms(W, squares, shift, linear, None)

        def cleaned(values: Tensor) -> Tensor:
            return torch.where(finite[..., None], values, 0.0)

        return Terms(tuple(map(cleaned, W)), cleaned(squares), cleaned(shift), cleaned(linear), finite)

    def data(self, columns: Columns, terms: Terms) -> ConicData:
        """The data of the smaller program."""
        P, q, *others = (map_(columns) for map_ in self._maps)
        if self._fixed is not None:
            P = self._fixed.to(columns.device)
        elif self._squares.nnz:
            P = self._quadratic(P, terms.W, terms.squares)
        if self._is_linear:
            slope = terms.linear
            if self._is_shifted:
                slope = slope + self._squared(terms.squares, terms.shift)
            for block, W in zip(self._blocks, terms.W, strict=True):
                q = q + block.adjoint(W, slope)
        if terms.finite is not None:
            q = torch.where(terms.finite[..., None], q, torch.nan)
        return ConicData(P, q, *others)

    def expand(self, solution: ConicSolution, problem: ConicProblem, terms: Terms) -> ExpandedSolution:
        """The solution of the whole problem that belongs to one of the smaller problem's."""
        n, m = self._sizes
        kept, kept_rows, variables, defining = (
            from_numpy(index).to(solution.x.device) for index in self._indices.values()
        )
        with torch.no_grad():
            defined = terms.shift
            for block, W in zip(self._blocks, terms.W, strict=True):
                defined = defined + block.forward(W, solution.x)
            slope = self._squared(terms.squares, defined) + terms.linear + self._moved(solution.y)
            batch = solution.x.shape[0]
            x, z = (solution.x.new_zeros(batch, n) for _ in range(2))
            y, slack = (solution.x.new_zeros(batch, m) for _ in range(2))
            x[:, kept], x[:, variables] = solution.x, defined
            y[:, kept_rows], y[:, defining] = solution.y, -slope / self._coefficients.to(slope.device)
            z[:, kept], slack[:, kept_rows] = solution.z, solution.slack
        known: dict[str, Any] = {field.name: getattr(solution, field.name) for field in fields(ConicSolution)}
        changed: dict[str, Any] = {"problem": problem, "x": x, "y": y, "z": z, "slack": slack, "systems": ()}
        return ExpandedSolution(**(known | changed), solved=solution)

    def _quadratic(self, P: Tensor, W_blocks: Sequence[Tensor], squares: Tensor) -> Tensor:
        """P', from P_KK, the blocks of W and the entries of P_TT."""
        for block, W in zip(self._blocks, W_blocks, strict=True):
            added = block.gram(W, squares)
            if added is not None:
                P = P + added.new_zeros(*added.shape[:-1], P.shape[-1]).index_add(-1, block.target.to(P.device), added)
        return P

    def _squared(self, squares: Tensor, vectors: Tensor) -> Tensor:
        """``P_TT v``."""
        pattern = self._squares
        return product(pattern.rows, pattern.columns, pattern.shape[0], squares, vectors)


def _substituted_rows(
    program: CanonicalProgram, where: tuple[IntArray, IntArray], A_OT: Any, W: SparsityPattern, W_map: AffineMap
) -> tuple[SparsityPattern, AffineMap]:
    """The pattern of ``A_OK + A_OT W``, and the map to its values; A_OT is constant."""
    A, (row_place, place) = program.constraint, where
    m, n = A_OT.shape[0], W.shape[1]
    stay = np.flatnonzero((row_place[A.rows] >= 0) & (place[A.columns] >= 0))
    # For every entry (o, t) of A_OT the entries (t, j) of W
    moved, order = A_OT.tocoo(), np.argsort(W.rows, kind="stable")
    ends = np.cumsum(np.bincount(W.rows, minlength=W.shape[0]))
    lengths = np.diff(ends, prepend=0)
    row, middle = (index.astype(np.int64) for index in moved.coords)
    count = lengths[middle]
    which = np.repeat(np.arange(row.size), count)
    number = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    entry = order[(ends - lengths)[middle][which] + number]
    keys = np.concatenate([place[A.columns[stay]] * m + row_place[A.rows[stay]], W.columns[entry] * m + row[which]])
    stored, position = np.unique(keys, return_inverse=True)
    split = stay.size
    kept = selection(position[:split], stay, (stored.size, A.nnz))
    added = sp.csr_array((moved.data[which], (position[split:], entry)), shape=(stored.size, W.nnz))
    columns, rows = np.divmod(stored, max(m, 1))
    values = sp.csr_array(kept @ program.A.matrix + added @ W_map.matrix)
    return SparsityPattern((m, n), rows, columns), AffineMap(values, program.parameters)


def _fewer(cones: Cones, rows: IntArray) -> Cones:
    """Without these rows, equalities and linear inequalities."""
    equalities = int((rows < cones.zero).sum())
    return replace(cones, zero=cones.zero - equalities, nonnegative=cones.nonnegative - (rows.size - equalities))


def _left_of(layout: VariableLayout, kept: IntArray, kept_rows: IntArray) -> VariableLayout:
    """How a variable is read off a solution of the smaller program."""

    def among(matrix: sp.csr_array | None, columns: IntArray) -> sp.csr_array | None:
        return None if matrix is None else sp.csr_array(matrix[:, columns])

    return replace(
        layout,
        primal=among(layout.primal, kept),
        dual=among(layout.dual, kept_rows),
        lower=among(layout.lower, kept),
        upper=among(layout.upper, kept),
    )


def _constants(affine: AffineMap) -> FloatArray:
    return affine.matrix[:, [-1]].toarray().ravel()
