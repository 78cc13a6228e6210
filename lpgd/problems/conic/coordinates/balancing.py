"""Coordinates of cones and variables in which the data of a conic program are of one size, where a batch needs them.

What CVXPY makes of ``|x|² ≤ R`` is ``(1 + t, 1 - t, 2x)`` in a second-order cone and ``t ≤ R``.  With R of 1e12 the 1
is rounding beside t.  But a cone has automorphisms T that bring both to one size: linear maps of the cone onto itself.
With them and positive factors D of the variables, ``x = D x̂``, ``s = T⁻¹ ŝ``, ``y = Tᵀ ŷ`` and

    P̂ = D P D,   q̂ = D q,   Â = T A D,   b̂ = T b,   bounds / D

are the data of the same program.  Where the data say that a cone needs it, the whole program is solved in these
coordinates: solution, multipliers, perturbations and derivatives are all found there.

The exponents of both (:mod:`lpgd.problems.conic.coordinates.automorphisms`) minimise ``Σ |log|entry||`` over the
entries of Â, b̂, σ q̂, σ P̂ and the bounds, nearly.  That is a linear program in the exponents: data whose sizes differ
only by units are all brought to 1, and where a few constraints are loose the others decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, SparseArray
from lpgd.execution.memo import TensorMemo
from lpgd.problems.conic.coordinates.automorphisms import Mixed, exponents_of, in_pairs, paired_rows, sizes_of
from lpgd.problems.conic.coordinates.positions import Position
from lpgd.problems.conic.magnitudes import INFINITE
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicData, ConicStructure

__all__ = ["Balancing", "balancing_of"]

WIDE, ROUGH = 12.0, 8.0
"""Cones whose rows want factors that differ by the first exponent of two are balanced.  They are looked at where least
squares, which take next to no time, want the second."""
SWEEPS, NEAR, STILL = 12, 2.0, 0.25
"""Least squares with weights that make them a sum of magnitudes, at most; the residual below which they stay squares;
the change after which no more follow."""
RIDGE, TURNED = 1e-6, 1e-3
"""What is added to squares for the exponents of factors, and for those of other automorphisms, so that nothing is
turned that factors can do as well."""
HELD = 1e6
"""The same for exponents that are given."""
LARGEST = 60.0
"""The largest exponent of a parameter."""
LOOSE = 0.1
"""What an inequality counts whose right-hand side is larger than the rest, if such constraints may be loose."""
MOST = 100_000
"""Programs with more entries of A and P are left as they are."""
DENSE = 400
"""Fits of so many unknowns are dense."""
EXPLICIT = 1_000_000
"""Solutions of least squares with so many entries are kept as matrices."""
KEPT = 8
"""So many factors of least squares are kept, for data with different zeros."""

_Rough = tuple[list[Any], Callable[[FloatArray], FloatArray] | None]
"""Matrices that take logarithms of each datum to exponents of rows, or to right-hand sides of what is solved then."""
_A, _B = ConicData._fields.index("A"), ConicData._fields.index("b")
_memo = TensorMemo()


class Balancing:
    """Finds the coordinates of programs of one structure.

    Attributes:
        structure: of the programs.
        wider: of the programs in other coordinates: in an exponential cone the second row is added to the first.
        places: where the entries of A stand among those of the wider A.
        turning: (parameters,) which of them are no factors of a whole cone.
    """

    def __init__(self, structure: ConicStructure) -> None:
        self.structure = structure
        cones, constraint, m = structure.cones, structure.constraint, structure.m
        section = cones.sections["exponential"]
        self.triples = np.arange(section.start, section.stop, 3)
        keys = constraint.columns * m + constraint.rows
        wider = np.union1d(keys, keys[np.isin(constraint.rows, self.triples + 1)] - 1)
        columns, rows = np.divmod(wider, max(m, 1))
        self.places = np.searchsorted(wider, keys)
        self.wider = structure
        if wider.size > keys.size:
            self.wider = replace(structure, constraint=SparsityPattern(constraint.shape, rows, columns))
        self.turned, first, second = paired_rows(cones, rows, columns)
        by = np.flatnonzero(np.isin(rows, self.triples + 1))
        onto = self.wider.constraint.positions(rows[by] - 1, columns[by])
        self.entries = Mixed(first, second, onto, by, (rows[by] - section.start) // 3)
        numbers = np.arange(self.triples.size)
        self.firsts = Mixed(self.turned[:, 0], self.turned[:, 1], self.triples, self.triples + 1, numbers)
        self.exponents, turning = exponents_of(cones, dict(self.turned.tolist()))
        self._ridge = np.full(structure.n + self.exponents.shape[1] + 1, RIDGE)
        self._ridge[structure.n + np.array(turning, dtype=np.int64)] = TURNED
        self.turning = self._ridge[structure.n : -1] == TURNED
        start = cones.zero + cones.nonnegative + len(cones.second_order) + len(self.turned)
        self.turning[start : start + sum(cones.semidefinite)] = True
        self._equations = self._logarithmic()
        self._sizes: SparseArray = -sp.eye_array(structure.n, self._equations[0].shape[1], format="csr")
        self._known: dict[bytes, _Rough] = {}

    @property
    def is_of_use(self) -> bool:
        """Whether a cone has automorphisms beside factors."""
        cones = self.structure.cones
        has_some = self.turned.size or self.triples.size or cones.power or any(side > 1 for side in cones.semidefinite)
        return bool(has_some)

    def _logarithmic(self) -> list[SparseArray]:
        """What exponents of variables, parameters, and the objective's add to logarithms, of each datum's entries."""
        structure, count = self.structure, self.exponents.shape[1]
        n, constraint, quadratic = structure.n, self.wider.constraint, structure.quadratic
        identity: SparseArray = sp.eye_array(n, format="csr")
        rows: SparseArray = self.exponents

        def equations(variables: SparseArray, parameters: SparseArray | None, objective: float) -> SparseArray:
            height = variables.shape[0]
            middle = sp.csr_array((height, count)) if parameters is None else parameters
            return sp.csr_array(sp.hstack([variables, middle, sp.csr_array(np.full((height, 1), objective))]))

        return [
            equations(identity[quadratic.rows] + identity[quadratic.columns], None, 1.0),
            equations(identity, None, 1.0),
            equations(identity[constraint.columns], rows[constraint.rows], 0.0),
            equations(sp.csr_array((structure.m, n)), rows, 0.0),
            equations(-identity[structure.lower_index], None, 0.0),
            equations(-identity[structure.upper_index], None, 0.0),
        ]

    def __call__(self, data: Sequence[Tensor], size: int, *, near: FloatArray | None = None) -> FloatArray | None:
        """(1 or B, n + parameters) the exponents of coordinates; None where no element needs other ones than it has.

        Args:
            data: plain tensors, in the order of :class:`ConicData`.
            size: of the batch.
            near: (B, n) points whose sizes count as data do; where there is none, inequalities whose right-hand sides
                are large are taken for loose ones.
        """
        if not size:
            return None
        logarithms = [self._logarithms(number, datum) for number, datum in enumerate(data)]
        count = max(len(values) for values in logarithms)
        n, parameters, found = self.structure.n, self.exponents.shape[1], dict[int, FloatArray]()
        for element in np.flatnonzero(self._is_wide(self._rough_rows(logarithms), ROUGH)).tolist():
            known = [values[element % len(values)] for values in logarithms]
            if near is None:
                fit = self._fit(known)
            elif np.isfinite(near[element]).all():
                fit = self._fit([*known, sizes_of(near[element])])
            else:
                fit = self._fit(known, self._sides(data, element))
            if self._is_wide(self.rows_of(fit[None]), WIDE)[0]:
                found[element] = fit[: n + parameters].round().clip(-LARGEST, LARGEST)
        if not found:
            return None
        exponents = np.zeros((count, n + parameters))
        exponents[list(found)] = list(found.values())
        is_shared = bool((exponents == exponents[:1]).all())
        exponents = exponents[:1] if is_shared else np.tile(exponents, (size // count, 1))
        return exponents

    def around(self, data: Sequence[Tensor], element: int, position: Position) -> FloatArray:
        """(n + parameters,) the exponents of coordinates in which a point stands in the middle of its cones.

        What the point leaves open, variables and rows of no curved cone above all, is as A wants it, and b in rows
        without variables.

        Args:
            data: as of a call.
            element: whose point it is.
            position: of the point in the program's own coordinates.
        """
        logarithms = [self._logarithms(number, datum) for number, datum in enumerate(data)]
        known = [
            values[element % len(values)] if number in (_A, _B) else np.full(values.shape[1], np.nan)
            for number, values in enumerate(logarithms)
        ]
        known[_B] = np.where(np.bincount(self.structure.constraint.rows, minlength=self.structure.m), np.nan, known[_B])
        fit = self._fit(known, held=position)
        return fit[: self.structure.n + self.exponents.shape[1]].round().clip(-LARGEST, LARGEST)

    def rows_of(self, fits: FloatArray) -> FloatArray:
        """(k, m) exponents of rows, of those of variables and parameters."""
        n, parameters = self.structure.n, self.exponents.shape[1]
        return np.ascontiguousarray((self.exponents @ fits[:, n : n + parameters].T).T)

    def _logarithms(self, number: int, datum: Tensor) -> FloatArray:
        """(R, ·) exponents of two of a datum, NaN for entries that are none, with rows of cones in pairs."""

        def compute() -> FloatArray:
            values = np.atleast_2d(datum.detach().resolve_neg().cpu().numpy())
            if number == _A:
                widened = np.zeros((len(values), self.wider.constraint.nnz))
                widened[:, self.places] = values
                values = in_pairs(widened, self.entries)
            elif number == _B:
                values = in_pairs(values, self.firsts)
            values = np.abs(values)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.where((values > 0.0) & (values < INFINITE), np.log2(values), np.nan)

        return _memo(datum, ("balance", number, self.structure.digest), compute)

    def _rough_rows(self, logarithms: list[FloatArray]) -> FloatArray:
        """(R, m) exponents of rows by least squares, of each element with the entries that it has."""
        present = [np.isfinite(values) for values in logarithms]
        if all((there == there[:1]).all() for there in present):
            return self._rows_of_alike(logarithms, [there[0] for there in present])
        count = max(len(values) for values in logarithms)
        every = np.concatenate([np.resize(there, (count, there.shape[1])) for there in present], axis=1)
        patterns, kinds = np.unique(every, axis=0, return_inverse=True)
        found = np.zeros((count, self.structure.m))
        for kind in range(len(patterns)):
            elements = np.flatnonzero(kinds.ravel() == kind)
            chosen = [values[elements % len(values)] for values in logarithms]
            found[elements] = self._rows_of_alike(chosen, [np.isfinite(values[0]) for values in chosen])
        return found

    def _rows_of_alike(self, logarithms: list[FloatArray], present: list[BoolArray]) -> FloatArray:
        """The same of elements that have the same entries."""
        key = b"".join(there.tobytes() for there in present)
        known = self._known.get(key)
        if known is None:
            known = self._factorised(present)
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[key] = known
        matrices, finish = known
        total = np.zeros((1, 1))
        for matrix, values, there in zip(matrices, logarithms, present, strict=True):
            if matrix is None:
                continue
            product = np.where(there, values, 0.0) @ matrix
            count = max(len(total), len(product))
            total = np.resize(total, (count, total.shape[1])) - np.resize(product, (count, product.shape[1]))
        return total if finish is None else self.rows_of(finish(np.ascontiguousarray(total.T)).T)

    def _factorised(self, present: list[BoolArray]) -> _Rough:
        """Least squares for entries that are there: their solution, or what leads to it where that is large."""
        G: SparseArray = sp.vstack(
            [block[np.flatnonzero(there)] for block, there in zip(self._equations, present, strict=True)]
        )
        solve = _solver(G.T @ G, self._ridge)
        if G.shape[0] * self.structure.m > EXPLICIT:
            return [
                block if there.any() else None for block, there in zip(self._equations, present, strict=True)
            ], solve
        solutions = [
            np.ascontiguousarray(self.rows_of(solve(block.T.toarray()).T)) if there.any() else None
            for block, there in zip(self._equations, present, strict=True)
        ]
        return solutions, None

    def _sides(self, data: Sequence[Tensor], element: int) -> BoolArray:
        """Which entries of all data bound something that may be zero."""
        own = [datum if datum.ndim == 1 else datum[element % len(datum)] for datum in data]
        P, q, _, b, lower, upper = (datum.cpu() for datum in own)
        nonnegative = torch.zeros(len(b), dtype=torch.bool)
        nonnegative[self.structure.cones.sections["nonnegative"]] = True
        nothing = torch.zeros(len(P) + len(q) + self.wider.constraint.nnz, dtype=torch.bool)
        return torch.cat([nothing, nonnegative & (b > 0), lower < 0, upper > 0]).numpy()

    def _fit(
        self, logarithms: list[FloatArray], sides: BoolArray | None = None, held: Position | None = None
    ) -> FloatArray:
        """(unknowns,) the exponents that minimise the sum of magnitudes of an element, nearly.

        Args:
            logarithms: of its data, and of its variables, where these are known.
            sides: which of the data belong to inequalities that may be loose.
            held: parameters that are to be what they are there.
        """
        ridge, pull = self._ridge, np.zeros(self._ridge.size)
        if held is not None:
            index = self.structure.n + np.flatnonzero(held.known)
            ridge = ridge.copy()
            ridge[index] = HELD
            pull[index] = HELD * held.parameters[held.known]
        right = -np.concatenate(logarithms)
        present = np.flatnonzero(np.isfinite(right))
        G: SparseArray = sp.csr_array(sp.vstack([*self._equations, self._sizes][: len(logarithms)]))[present]
        right = right[present]
        weights, fit = np.ones(len(right)), np.full(G.shape[1], np.inf)
        for _ in range(SWEEPS):
            weighted: SparseArray = sp.diags_array(weights) @ G
            before, fit = fit, _solver(G.T @ weighted, ridge)(weighted.T @ right + pull)
            if np.abs(fit - before).max(initial=0.0) < STILL:
                break
            left = G @ fit - right
            weights = 1.0 / np.maximum(np.abs(left) / NEAR, 1.0)
            if sides is not None:
                weights[sides[present] & (left > 0.0)] *= LOOSE
        return fit

    def _is_wide(self, rows: FloatArray, limit: float) -> BoolArray:
        """(k,) whether exponents (k, m) of the rows of one cone are far from each other."""
        if (rows.max(1, initial=-np.inf) - rows.min(1, initial=np.inf) < limit).all():  # no two rows at all are
            return np.zeros(len(rows), dtype=np.bool_)
        starts = np.flatnonzero(np.diff(self.structure.cones.blocks, prepend=-1))
        spread = np.maximum.reduceat(rows, starts, axis=1) - np.minimum.reduceat(rows, starts, axis=1)
        return np.asarray((spread >= limit).any(1))


def balancing_of(structure: ConicStructure) -> Balancing | None:
    """What finds coordinates for a structure; None where no cone has other ones."""
    entries = structure.constraint.nnz + structure.quadratic.nnz
    if structure.cones.is_polyhedral or structure.has_integers or entries > MOST:
        return None
    known = structure.row_patterns
    if "balancing" not in known:
        found = Balancing(structure)
        known["balancing"] = found if found.is_of_use else None
    return known["balancing"]


def _solver(matrix: SparseArray, ridge: FloatArray) -> Callable[[FloatArray], FloatArray]:
    """Solves systems of this matrix and a ridge: exponents of which nothing is said are small."""
    matrix = sp.csc_array(matrix + sp.diags_array(ridge))
    if matrix.shape[0] > DENSE:
        options = {"SymmetricMode": True}
        return splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options).solve
    inverse = np.linalg.inv(matrix.toarray())
    return lambda right: inverse @ right
