"""How solvers without a quadratic objective see one: as a second-order cone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse as sp

from lpgd.arrays import FloatArray, SparseArray
from lpgd.solvers.backends.forms import RowForm, RowPoint

__all__ = ["ConeForm"]


class ConeForm:
    """A row form without its quadratic: ``minimise t + qᵀx`` with ``t ≥ ½ xᵀP x`` as a second-order cone.

    With ``P = FᵀF`` the cone is ``|(√2 F x, t - 1)| ≤ t + 1``, whose square reads ``½ |F x|² ≤ t``.  The
    variables are ``(x, t)``; the rows of the new cone come first among the second-order ones.
    """

    def __init__(self, form: RowForm) -> None:
        self.n, self.cones = form.n, form.cones
        self.quadratic = form.has_quadratic
        self.cone_size = 0
        self.at = form.cones.sections["second_order"].start
        linear = form.A.tocoo()
        row, column, value = linear.row, linear.col, linear.data
        if self.quadratic:
            factor = _square_root(form.full_P()).tocoo()
            self.cone_size = factor.shape[0] + 2
            last = self.at + self.cone_size - 1
            row = np.concatenate(
                [np.where(row < self.at, row, row + self.cone_size), [self.at, last], self.at + 1 + factor.row]
            )
            column = np.concatenate([column, [self.n, self.n], factor.col])
            value = np.concatenate([value, [-1.0, -1.0], -np.sqrt(2.0) * factor.data])
            self.offset = np.zeros(self.cone_size)
            self.offset[0], self.offset[-1] = 1.0, -1.0
            self.cones = replace(form.cones, second_order=(self.cone_size, *form.cones.second_order))
        self.width = self.n + self.quadratic
        self.row, self.column, self.value = row, column, value

    @property
    def A(self) -> sp.csc_array:
        """The matrix, of which ``row``, ``column`` and ``value`` are the entries."""
        return sp.csc_array((self.value, (self.row, self.column)), shape=(self.cones.rows, self.width))

    def vectors(self, q: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
        """``q`` and ``b`` of the cone form."""
        if not self.quadratic:
            return q, b
        return np.append(q, 1.0), np.concatenate([b[: self.at], self.offset, b[self.at :]])

    def invert(self, point: RowPoint) -> RowPoint:
        """The row form's point."""
        if not self.quadratic:
            return point
        kept = np.r_[0 : self.at, self.at + self.cone_size : point.y.size]
        return RowPoint(point.x[: self.n], point.y[kept], point.s[kept])


def _square_root(P: SparseArray) -> Any:
    """F with ``P = FᵀF``, as few rows as the rank of P; eigenvalues below zero are rounding."""
    diagonal = P.diagonal()
    if P.count_nonzero() == np.count_nonzero(diagonal):
        eigenvalues, vectors = diagonal, None
    else:
        eigenvalues, vectors = scipy.linalg.eigh(P.toarray())
    scale = np.abs(eigenvalues).max(initial=0.0)
    kept = np.flatnonzero(eigenvalues > 1e-14 * scale)
    roots = np.sqrt(eigenvalues[kept])
    if vectors is None:
        return sp.coo_array((roots, (np.arange(kept.size), kept)), shape=(kept.size, P.shape[0]))
    return sp.coo_array(roots[:, None] * vectors[:, kept].T)
