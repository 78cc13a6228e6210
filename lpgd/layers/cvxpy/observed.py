"""What a layer's outputs and its parameters' gradients see of a canonical program's solutions."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import IntArray, SparseArray
from lpgd.layers.cvxpy.layout import AffineMap, CanonicalProgram
from lpgd.problems.conic.observed import Observed, Readout

__all__ = ["observed_by"]


def observed_by(program: CanonicalProgram, squared: IntArray) -> Observed:
    """What is observed of x and of y.

    Args:
        program: of n variables and m rows.
        squared: variables whose part of P or q depends on parameters in ways that the program's maps do not tell.
    """
    quadratic, constraint, n = program.quadratic, program.constraint, program.n
    curved = _reached(program.P)
    entries = np.concatenate([quadratic.rows[curved], quadratic.columns[curved], squared])
    of_x = [layout.primal for layout in program.variables if layout.primal is not None]
    of_x += [_coefficients(program.q), _units(entries, n)]
    moved = _reached(program.A)
    bounded = np.zeros(n)
    bounded[program.lower_index[_reached(program.lower)]] = bounded[program.upper_index[_reached(program.upper)]] = 1.0
    return Observed(
        Readout.of(sp.vstack(of_x, format="csr")),
        Readout.of(_coefficients(program.b)),
        constraint.rows[moved],
        constraint.columns[moved],
        bounded,
    )


def _reached(affine: AffineMap) -> IntArray:
    """The data that a parameter reaches."""
    return np.flatnonzero(np.diff(affine.matrix[:, :-1].tocsr().indptr))


def _coefficients(affine: AffineMap) -> SparseArray:
    """For each parameter what the data's changes are multiplied by in its gradient: the transpose of the map."""
    coefficients: SparseArray = affine.matrix[:, :-1].T.tocsr()
    coefficients.eliminate_zeros()
    return coefficients


def _units(entries: IntArray, size: int) -> SparseArray:
    entries = np.unique(entries)
    return sp.csr_array((np.ones(entries.size), (np.arange(entries.size), entries)), shape=(entries.size, size))
