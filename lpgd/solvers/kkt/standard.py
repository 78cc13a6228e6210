"""Systems of programs in standard form: every variable is a row of a curved cone, and the other rows are linear.

For ``minimise <q, x>`` subject to ``E x + s_E = b_E`` and ``A_c x + s_c = b_c``, A_c a diagonal matrix but for the
order of its columns, ``x̃ = Uᵀ A_c x`` are the variables in the directions in which ``D = U d Uᵀ`` is diagonal.  With
``Ẽ = E A_c⁻¹ U``, ``g̃ = Uᵀ A_c⁻ᵀ g_x`` and ``t = Uᵀ g_c`` the system of :mod:`lpgd.solvers.kkt.system` is

    ỹ + Ẽᵀ u = -g̃,       d x̃ - (1 - d) ỹ = -d t,       Ẽ x̃ = -g_E,

whose second equation gives ỹ where d is small, by ``w = d / (1 - d)``, and x̃ where it is large, by ``ω = 1 / w``:

    [ w   Ẽᵀ      ] [x̃]     [ g̃ + w t              ]
    [ Ẽ   -Ẽ ω Ẽᵀ ] [u] = - [ g_E - Ẽ (ω g̃ + t)    ],

where the first row and the columns of x̃ are those of small d, and the sums in the second row those of large d.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from lpgd.arrays import BoolArray, FloatArray, IntArray, random_direction
from lpgd.cones.projections import projection_derivative
from lpgd.execution.threads import one_blas_thread
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.factor import equilibration
from lpgd.solvers.kkt.lu import ScaledLU
from lpgd.solvers.kkt.packed import packed_size
from lpgd.solvers.kkt.reduced import product

__all__ = ["Standard", "is_standard"]

HALF = 0.5
"""Eigenvalues above this are large: w or ω is at most 1."""


@lru_cache(maxsize=64)
def _entries(structure: ConicStructure) -> IntArray | None:
    """Where the entries of A_c stand among the values of A, row by row; None of a program in another form."""
    cones, pattern = structure.cones, structure.constraint
    first = cones.zero + cones.nonnegative
    if structure.quadratic.nnz or structure.has_bounds or not structure.n or structure.m - first != structure.n:
        return None
    entries = np.flatnonzero(pattern.rows >= first)
    entries = entries[np.argsort(pattern.rows[entries], kind="stable")]
    once = np.array_equal(pattern.rows[entries], np.arange(first, structure.m))
    return entries if once and np.unique(pattern.columns[entries]).size == structure.n else None


def is_standard(structure: ConicStructure) -> bool:
    """Whether each variable is a row of a cone that is no orthant, and nothing else is but linear constraints."""
    return _entries(structure) is not None


class Standard:
    """The systems of k elements at their points, factorised.

    Args:
        structure: patterns and cones, of a program in standard form.
        A: (k, ·) values.
        v: (k, m) ``y - s``.

    Attributes:
        inverse, condition: (k,) estimates of the norm of the inverse, equilibrated, of the system in x̃, ỹ / √d and u,
            and of its condition.
        loose: (k, n) variables that nothing determines: none, the system is singular then.
    """

    def __init__(self, structure: ConicStructure, A: FloatArray, v: FloatArray) -> None:
        entries = _entries(structure)
        assert entries is not None
        cones, pattern, count, n = structure.cones, structure.constraint, len(v), structure.n
        self.first = first = structure.m - n
        self.columns, diagonal = pattern.columns[entries], A[:, entries]
        self.diagonal: FloatArray = np.where(diagonal == 0, np.nan, diagonal)  # then the system is said to be singular
        self.loose: BoolArray = np.zeros((count, n), dtype=np.bool_)
        self.derivative = projection_derivative(cones, v, dual=True)
        eigenvalues = self.derivative.eigenvalues.reshape(v.shape)
        d = eigenvalues[:, first:]
        linear = pattern.dense_matrices(A)[:, :first, self.columns]
        linear /= self.diagonal[:, None]
        self.E = np.ascontiguousarray(self._rotated(linear.swapaxes(1, 2)).swapaxes(1, 2))
        self.active: BoolArray = eigenvalues[:, :first] > 0
        if not self.active.all():
            self.E = self.E * self.active[:, :, None]
        self.small: BoolArray = d <= HALF
        self.w: FloatArray = np.where(self.small, d / np.where(self.small, 1.0 - d, 1.0), 0.0)
        self.omega: FloatArray = np.where(self.small, 0.0, (1.0 - d) / np.where(self.small, 1.0, d))
        # Equilibration and norm of the whole system.
        root, rest = np.sqrt(d), 1.0 - d
        sizes = np.abs(self.E)
        scale = equilibration(np.maximum(root, sizes.max(1, initial=0.0)))
        row_scale, linear_scale = equilibration(np.maximum(root, rest)), equilibration(sizes.max(2, initial=0.0))
        norms = (
            scale * (root * row_scale + product(sizes.swapaxes(1, 2), linear_scale)),
            row_scale * (root * scale + rest * row_scale),
            linear_scale * product(sizes, scale),
        )
        size = np.max([norm.max(1, initial=0.0) for norm in norms], axis=0)
        # The system itself; large d have ones.
        side = packed_size(n + first)
        scales = np.ones((count, side))
        scales[:, :n], scales[:, n : n + first] = np.where(self.small, scale, 1.0), linear_scale
        matrices = np.zeros((count, side, side))
        few = self.E * self.small[:, None]
        matrices[:, n : n + first, :n], matrices[:, :n, n : n + first] = few, few.swapaxes(1, 2)
        with one_blas_thread(first * first * n):
            matrices[:, n : n + first, n : n + first] = -((self.E * self.omega[:, None]) @ self.E.swapaxes(1, 2))
        corner = matrices.reshape(count, -1)[:, :: side + 1]
        corner[:, :n] = np.where(self.small, self.w, 1.0)
        corner[:, n : n + first] -= ~self.active
        corner[:, n + first :] = 1.0
        self.lu = ScaledLU(matrices, scales)
        # The norm of the whole system's inverse.
        direction = random_direction(2 * n + first)
        right, right_rows = direction[:n] / scale, np.where(d > 0, direction[n : 2 * n] / row_scale, 0.0)
        right_linear = np.where(self.active, direction[2 * n :] / linear_scale, 0.0)
        pivot: FloatArray = np.where(self.small, rest, root)
        with np.errstate(over="ignore", invalid="ignore"):
            shift = np.where(self.small, 0.0, right_rows / pivot + self.omega * right)
            x, u, pull = self._solved(right + root * right_rows / pivot, shift, right_linear)
            rows = np.where(self.small, root * x - right_rows, right - pull) / pivot
            parts = x / scale, np.where(d > 0, rows, 0.0) / row_scale, u / linear_scale
            squared = sum(((values**2).sum(1) for values in parts), np.zeros(count))
            self.inverse = np.where(self.lu.regular, np.sqrt(squared), np.inf)
            self.condition = self.inverse * size

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return sum(group.basis.size for group in self.derivative.groups) + self.E.size + self.lu.entries

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The change (dx, dy, dz) of the points under a tilt, (k, ·) each."""
        first = self.first
        both = np.stack([g_x[:, self.columns] / self.diagonal, g_y[:, first:]], axis=2)
        tilt, shift = np.moveaxis(self._rotated(both), 2, 0)
        start = np.where(self.small, 0.0, -self.omega * tilt - shift)
        linear = np.where(self.active, -g_y[:, :first], 0.0)
        x, u, pull = self._solved(-tilt - self.w * shift, start, linear)
        y = np.where(self.small, self.w * (x + shift), -tilt - pull)
        whole = np.zeros((2, *g_y.shape))
        whole[0, :, first:], whole[1, :, first:] = x, y
        turned, dy = (self.derivative.rotated_back(values.ravel()).reshape(g_y.shape) for values in whole)
        dx = np.empty_like(g_x)
        dx[:, self.columns] = turned[:, first:] / self.diagonal
        dy[:, :first] = u
        return dx, dy, np.zeros_like(dx)

    def _rotated(self, columns: FloatArray) -> FloatArray:
        """``Uᵀ`` times (k, n, c)."""
        count, n, width = columns.shape
        whole = np.zeros((count, self.first + n, width))
        whole[:, self.first :] = columns
        flat = whole.reshape(count * (self.first + n), width)  # of no width where there are no linear constraints
        return self.derivative.rotated(flat).reshape(whole.shape)[:, self.first :]

    def _solved(
        self, dual: FloatArray, start: FloatArray, linear: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """x̃, u and ``Ẽᵀu``, with ``w x̃ + Ẽᵀu = dual``, ``x̃ = start - ω Ẽᵀu`` and ``Ẽ x̃ = linear``."""
        n, first = dual.shape[1], self.first
        right = np.zeros(self.lu.scale.shape)
        right[:, :n] = np.where(self.small, dual, 0.0)
        right[:, n : n + first] = linear - product(self.E, start)
        answer = self.lu.solve(right)
        u = answer[:, n : n + first]
        pull = (u[:, None] @ self.E)[:, 0]
        return np.where(self.small, answer[:, :n], start - self.omega * pull), u, pull
