"""Dense systems of programs with curved cones, without the rows whose multipliers follow from the others.

In the system of :mod:`lpgd.solvers.kkt.system` a row of ``T A`` with an eigenvalue ``d`` away from 1 has ``-(1 - d)``
on its diagonal, so its multiplier can be eliminated.  With ``B = Uᵀ A``, ``T A = √d B``, ``w = d / (1 - d)`` for these
rows and C the other rows of ``T A``,

    [ P + BᵀwB   Cᵀ       ] [dx ]     [ g_x + Bᵀw Uᵀg_y ]
    [ C          -(1 - d) ] [u_C] = - [ (T g_y)_C       ],     Uᵀdy = w (B dx + Uᵀg_y),  √d u_C in the rows of C.

A second-order cone of any size whose bound is tight is left with one row, where d is 1.  The condition is that of the
whole system.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lpgd.arrays import BoolArray, FloatArray, IntArray, random_direction
from lpgd.cones.projections import projection_derivative
from lpgd.execution.threads import one_blas_thread
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.factor import equilibration
from lpgd.solvers.kkt.lu import ScaledLU
from lpgd.solvers.kkt.packed import packed_size, packed_sizes
from lpgd.solvers.kkt.reduced import dense_quadratic, product

__all__ = ["Condensed", "is_condensed"]

KEPT = 0.9
"""Rows with a larger eigenvalue stay: the others are eliminated by pivots of a tenth and more."""
STEP = 16
"""Numbers of free variables are rounded up to multiples of this, so that few sizes of systems are left."""


def is_condensed(structure: ConicStructure) -> bool:
    """Whether most rows are those of second-order cones, of which few stay."""
    return 2 * sum(structure.cones.second_order) > structure.m


class Condensed:
    """The systems of k elements at their points, factorised.

    Args:
        structure: patterns and cones.
        rho: added to the diagonal of P.
        P, A: (k, ·) values.
        v: (k, m) ``y - s``.
        at_bound: (k, n) variables at a bound.

    Attributes:
        inverse, condition: (k,) estimates of the norm of the whole system's inverse, equilibrated, and of its
            condition.
        at_bound, loose: (k, n) variables at a bound, and free ones that nothing determines.
    """

    def __init__(
        self,
        structure: ConicStructure,
        rho: FloatArray | float,
        P: FloatArray,
        A: FloatArray,
        v: FloatArray,
        at_bound: BoolArray,
    ) -> None:
        (count, n), m = at_bound.shape, structure.m
        self.at_bound = at_bound
        self.constraint, self.quadratic = structure.constraint.dense_matrices(A), dense_quadratic(structure, rho, P)
        self.derivative = projection_derivative(structure.cones, v, dual=True)
        d, scales = self.derivative.eigenvalues.reshape(count, m), self.derivative.scales.reshape(count, m)
        present: BoolArray = scales > 0
        kept: BoolArray = d > KEPT
        self.weights: FloatArray = np.where(present & ~kept, d / np.where(kept, 1.0, 1.0 - d), 0.0)
        rotated = self.derivative.rotated(self.constraint.reshape(v.size, n)).reshape(count, m, n)
        self.loose: BoolArray = np.zeros_like(at_bound)
        free_sizes = np.minimum(-(-(~at_bound).sum(1) // STEP) * STEP, n)
        kept_sizes = np.minimum(packed_sizes(kept.sum(1)), m)
        self.inverse, self.condition = np.zeros((2, count))
        self.stacks: list[_Stack] = []
        for free_size, kept_size in sorted(set(zip(free_sizes.tolist(), kept_sizes.tolist(), strict=True))):
            elements = np.flatnonzero((free_sizes == free_size) & (kept_sizes == kept_size))
            columns = np.argsort(at_bound[elements], axis=1, kind="stable")[:, :free_size]
            rows = np.argsort(~kept[elements], axis=1, kind="stable")[:, :kept_size]
            places = _Places(elements, (elements[:, None], columns), (elements[:, None], rows), rows)
            stack = _Stack(self.quadratic, rotated, d, scales, self.weights, at_bound, kept, places)
            self.inverse[elements], self.condition[elements] = stack.inverse, stack.condition
            self.loose[places.free] = stack.loose
            self.stacks.append(stack)

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        bases = sum(group.basis.size for group in self.derivative.groups)
        return self.constraint.size + bases + sum(stack.entries for stack in self.stacks)

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The change (dx, dy, dz) of the points under a tilt, (k, ·) each."""
        dx = np.where(self.at_bound, -g_z, 0.0)
        at_bound = bool(self.at_bound.any())
        slope = g_x
        if at_bound and dx.any():
            slope, g_y = g_x + product(self.quadratic, dx), g_y + product(self.constraint, dx)
        tilt = self.derivative.rotated(g_y.reshape(-1, 1)).reshape(g_y.shape)
        dy = self.weights * tilt
        for stack in self.stacks:
            stack.solve(slope, tilt, dx, dy)
        dy = self.derivative.rotated_back(dy.ravel()).reshape(dy.shape)
        if not at_bound:
            return dx, dy, np.zeros_like(dx)
        slope = g_x + product(self.quadratic, dx) + product(self.constraint.swapaxes(1, 2), dy)
        return dx, dy, np.where(self.at_bound, -slope, 0.0)


class _Places(NamedTuple):
    """Where the unknowns of k elements are in arrays of all elements."""

    elements: IntArray  # (k,)
    free: tuple[IntArray, IntArray]  # (k, f) variables, those that are free first
    kept: tuple[IntArray, IntArray]  # (k, c) rows that stay first
    rows: IntArray  # (k, c)


class _Stack:
    """Systems of one size: f variables and c rows, some of them idle; matrices and vectors are those of all elements.

    Args:
        quadratic, rotated: (E, n, n) P and (E, m, n) B.
        d, scales, weights: (E, m) the eigenvalues, √d and w.
        at_bound, kept: (E, n) variables that do not move, (E, m) rows that stay.
        places: of the unknowns.
    """

    def __init__(
        self,
        quadratic: FloatArray,
        rotated: FloatArray,
        d: FloatArray,
        scales: FloatArray,
        weights: FloatArray,
        at_bound: BoolArray,
        kept: BoolArray,
        places: _Places,
    ) -> None:
        elements, columns = places.elements, places.free[1]
        (count, f), c = columns.shape, places.rows.shape[1]
        self.places, self.weights = places, weights[elements]
        self.idle, self.idle_rows = at_bound[places.free], ~kept[places.kept]
        self.kept_scales: FloatArray = np.where(self.idle_rows, 0.0, scales[places.kept])
        scales, corner = scales[elements], 1.0 - d[elements]
        corner[scales == 0] = 0.0
        self.B = rotated[elements[:, None, None], np.arange(rotated.shape[1])[:, None], columns[:, None]]
        squares = None
        if quadratic.strides[2]:
            squares = quadratic[elements[:, None, None], columns[:, :, None], columns[:, None]]
        if self.idle.any():
            self.B *= ~self.idle[:, None, :]
            if squares is not None:
                squares *= ~self.idle[:, None, :]
                squares *= ~self.idle[:, :, None]
        # The whole system's equilibration and norm.
        sizes = np.abs(self.B)
        sizes *= scales[:, :, None]
        largest = sizes.max(1, initial=0.0)
        if squares is not None:
            largest = np.maximum(largest, np.abs(squares).max(2, initial=0.0))
        self.loose: BoolArray = (largest == 0) & ~self.idle
        self.idle |= self.loose
        scale, row_scale = equilibration(largest), equilibration(np.maximum(sizes.max(2, initial=0.0), corner))
        norm = (row_scale[:, None, :] @ sizes)[:, 0]
        if squares is not None:
            norm += product(np.abs(squares), scale)
        row_norm = product(sizes, scale) + corner * row_scale
        size = np.maximum((scale * norm).max(1, initial=0.0), (row_scale * row_norm).max(1, initial=0.0))
        # The system itself.
        side = packed_size(f + c)
        kept_row_scale: FloatArray = np.where(self.idle_rows, 1.0, np.take_along_axis(row_scale, places.rows, axis=1))
        system_scale = np.ones((count, side))
        system_scale[:, :f], system_scale[:, f : f + c] = scale, kept_row_scale
        matrices = np.zeros((count, side, side))
        with one_blas_thread(f * f * self.B.shape[1]):
            matrices[:, :f, :f] = (self.B * self.weights[:, :, None]).swapaxes(1, 2) @ self.B
        if squares is not None:
            matrices[:, :f, :f] += squares
        if c:
            rows = self.B[np.arange(count)[:, None], places.rows] * self.kept_scales[:, :, None]
            matrices[:, f : f + c, :f], matrices[:, :f, f : f + c] = rows, rows.swapaxes(1, 2)
        diagonal = matrices.reshape(count, -1)[:, :: side + 1]
        diagonal[:, :f] += self.idle
        diagonal[:, f : f + c] = np.where(self.idle_rows, 1.0, -np.take_along_axis(corner, places.rows, axis=1))
        diagonal[:, f + c :] = 1.0
        self.lu = ScaledLU(matrices, system_scale)
        # The norm of the whole system's inverse.
        direction = random_direction(f + len(d[0]))
        right: FloatArray = np.where(self.idle, 0.0, direction[:f] / scale)
        right_rows: FloatArray = np.where(scales > 0, direction[f:] / row_scale, 0.0)
        eliminated = self.weights > 0
        shares: FloatArray = np.where(eliminated, right_rows / np.where(eliminated, corner, 1.0), 0.0)
        kept_right = np.where(self.idle_rows, 0.0, np.take_along_axis(right_rows, places.rows, axis=1))
        x, u = self._solved(right + ((scales * shares)[:, None] @ self.B)[:, 0], kept_right)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            others = np.where(eliminated, scales * product(self.B, x) / np.where(eliminated, corner, 1.0) - shares, 0.0)
            parts = x / scale, u / kept_row_scale, others / row_scale
            squared = sum(((values**2).sum(1) for values in parts), np.zeros(count))
            self.inverse = np.where(self.lu.regular, np.sqrt(squared), np.inf)
            self.condition = self.inverse * size

    @property
    def entries(self) -> int:
        return self.lu.entries + self.B.size

    def _solved(self, right: FloatArray, right_rows: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(k, f) and (k, c), for such right-hand sides."""
        f, c = right.shape[1], right_rows.shape[1]
        whole = np.zeros(self.lu.scale.shape)
        whole[:, :f], whole[:, f : f + c] = right, right_rows
        answer = self.lu.solve(whole)
        return answer[:, :f], answer[:, f : f + c]

    def solve(self, slope: FloatArray, tilt: FloatArray, dx: FloatArray, dy: FloatArray) -> None:
        """Write the changes of free variables to dx, and of ``Uᵀy`` to dy, which has ``w Uᵀg_y``."""
        elements, free, kept, _ = self.places
        change = dy[elements]
        right = slope[free] + (change[:, None] @ self.B)[:, 0]
        x, u = self._solved(np.where(self.idle, 0.0, -right), -self.kept_scales * tilt[kept])
        dx[free] = np.where(self.idle, dx[free], x)
        dy[elements] = change + self.weights * product(self.B, x)
        dy[kept] = np.where(self.idle_rows, dy[kept], self.kept_scales * u)
