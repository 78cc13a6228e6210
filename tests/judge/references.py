"""Gradients of the planted programs in closed form, with residuals in extended precision.

At a strictly complementary solution the conditions ``P x + q + Aᵀy + z = 0``, ``A x + s = b``, x at its active bounds,
``N ds = 0`` and ``dy = Nᵀ dλ - C ds`` are one symmetric system in (dx, dλ, dz):

    [ P + AᵀCA  (NA)ᵀ  Eᵀ ]
    [ NA        0      0  ]
    [ E         0      0  ]

which is solved by LU factors in double precision, and refined with residuals in ``numpy.longdouble``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tests.judge.programs import Programs

__all__ = ["Gradients", "Reference"]

FloatArray = NDArray[np.float64]

REFINEMENTS = 3
WELL_KNOWN = 1e-5
"""Where multipliers are not unique, what is must be given by a system no worse than this."""
SINGULAR = 1e13
"""A condition number beyond it is that of a singular system: the solution is not unique, or moves without a rate."""


@dataclass(frozen=True)
class Gradients:
    """Of a loss ``<w, x> + <w_y, y>``, for each datum; (B, ...) in the shapes of the data.

    ``bounds`` is that with respect to the bound at which a variable is, zero for others; of equal bounds it is that
    with respect to both together.
    """

    P: FloatArray
    q: FloatArray
    A: FloatArray
    b: FloatArray
    bounds: FloatArray

    def parts(self) -> dict[str, FloatArray]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class Reference:
    """The system of a batch of programs at their solutions.

    Args:
        programs: with planted solutions.
    """

    def __init__(self, programs: Programs) -> None:
        self.programs = programs
        self.normal_rows = programs.normals @ programs.A
        self.turned = programs.curvature @ programs.A  # C A
        E = np.eye(programs.plan.n)[programs.active]
        batch, n = programs.q.shape
        r, k = self.normal_rows.shape[1], len(E)
        matrix = np.zeros((batch, n + r + k, n + r + k))
        matrix[:, :n, :n] = programs.P + np.swapaxes(programs.A, 1, 2) @ self.turned
        matrix[:, n : n + r, :n] = self.normal_rows
        matrix[:, n + r :, :n] = E
        matrix[:, :n, n:] = np.swapaxes(matrix[:, n:, :n], 1, 2)
        self.matrix, self.sizes = matrix, (n, r, k)

    @cached_property
    def condition(self) -> FloatArray:
        """(B,) the condition number in the maximum norm of rows that are scaled to one; infinite where singular."""
        scale = np.sqrt(np.abs(self.matrix).max(axis=2))
        scale[scale == 0] = 1.0
        scaled = self.matrix / scale[:, :, None] / scale[:, None, :]
        values = np.linalg.svd(scaled, compute_uv=False)
        smallest = values[:, -1]
        return np.where(smallest > 0, values[:, 0] / np.where(smallest > 0, smallest, 1.0), np.inf)

    @property
    def is_regular(self) -> NDArray[np.bool_]:
        """(B,) whether the solution is unique and moves smoothly."""
        return self.condition < SINGULAR

    @cached_property
    def frees_multipliers(self) -> NDArray[np.bool_]:
        """(B,) whether multipliers alone are not unique, as rows depend on each other: x moves with P and q."""
        loose = ~self.is_regular & self.programs.cones.is_polyhedral
        for element in np.flatnonzero(loose):
            _, values, right = np.linalg.svd(self._scaled(element))
            null = values <= values[0] / SINGULAR
            known = values[~null].min() > WELL_KNOWN * values[0]
            loose[element] = known and np.abs(right[null, : self.sizes[0]]).max(initial=0.0) < 1e-6
        return loose

    def _scaled(self, element: int | np.intp) -> FloatArray:
        matrix = self.matrix[element]
        scale = np.sqrt(np.abs(matrix).max(axis=1))
        scale[scale == 0] = 1.0
        return matrix / scale[:, None] / scale

    def objective_gradients(self, weights: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of ``<weights, x>`` where multipliers alone are not unique, zero for other elements.

        Returns:
            The gradients with respect to P and q, and ``w + P dℓ/dq``, which is the force ``Aᵀ dℓ/db + dℓ/dbounds``,
            however it is shared out among rows that depend on each other.
        """
        n, size = self.sizes[0], self.matrix.shape[1]
        u = np.zeros_like(weights)
        for element in np.flatnonzero(self.frees_multipliers):
            scale = np.sqrt(np.abs(self.matrix[element]).max(axis=1))
            scale[scale == 0] = 1.0
            right = np.zeros(size)
            right[:n] = weights[element] / scale[:n]
            inverse = np.linalg.pinv(self._scaled(element), rcond=10 / SINGULAR, hermitian=True)
            u[element] = (inverse @ right)[:n] / scale[:n]
        outer = u[:, :, None] * self.programs.x[:, None, :]
        force = weights - np.einsum("bij,bj->bi", self.programs.P, u)
        return -0.5 * (outer + np.swapaxes(outer, 1, 2)), -u, force

    def _solve(self, right: FloatArray) -> FloatArray:
        """Solutions of the systems; NaN where they are singular."""
        answer = np.full(right.shape, np.nan)
        regular = np.flatnonzero(self.is_regular)
        matrix, right = self.matrix[regular], right[regular]
        exact = matrix.astype(np.longdouble)
        # The pivots of dgesv are those of rows as they are: equilibrated, as in the condition number.
        scale = np.sqrt(np.abs(matrix).max(axis=2))
        inverse = np.linalg.inv(matrix / scale[:, :, None] / scale[:, None, :])
        x = np.zeros(right.shape, dtype=np.longdouble)
        for _ in range(1 + REFINEMENTS):
            left = right - (exact * x[:, None, :]).sum(axis=2)
            step = (inverse @ (left.astype(np.float64) / scale)[:, :, None])[:, :, 0] / scale
            x = x + step
        answer[regular] = x.astype(np.float64)
        return answer

    def gradients(self, weights: FloatArray, dual_weights: FloatArray | None = None) -> Gradients:
        """Of ``<weights, x> + <dual_weights, y>``, (B, n) and (B, m)."""
        programs, (n, r, _) = self.programs, self.sizes
        w_y = np.zeros_like(programs.b) if dual_weights is None else dual_weights
        right = np.zeros(self.matrix.shape[:2])
        right[:, :n] = weights + np.einsum("bmn,bm->bn", self.turned, w_y)
        right[:, n : n + r] = np.einsum("brm,bm->br", programs.normals, w_y)
        answer = self._solve(right)
        u, mu, nu = answer[:, :n], answer[:, n : n + r], answer[:, n + r :]
        rows = np.einsum("bmn,bn->bm", self.turned, u) + np.einsum("brm,br->bm", programs.normals, mu)
        rows -= np.einsum("bmk,bk->bm", programs.curvature, w_y)
        bounds = np.zeros_like(u)
        bounds[:, programs.active] = nu
        outer = u[:, :, None] * programs.x[:, None, :]
        dA = -(programs.y[:, :, None] * u[:, None, :] + rows[:, :, None] * programs.x[:, None, :])
        return Gradients(-0.5 * (outer + np.swapaxes(outer, 1, 2)), -u, dA, rows, bounds)

    def change(self, tangent: Gradients) -> FloatArray:
        """(B, n) the change of x along a change of the data: of the active bounds ``tangent.bounds``."""
        programs, (n, r, _) = self.programs, self.sizes
        moved = tangent.b - np.einsum("bmn,bn->bm", tangent.A, programs.x)
        right = np.zeros(self.matrix.shape[:2])
        right[:, :n] = -(
            np.einsum("bij,bj->bi", tangent.P, programs.x) + tangent.q + np.einsum("bmn,bm->bn", tangent.A, programs.y)
        ) + np.einsum("bmn,bm->bn", self.turned, moved)
        right[:, n : n + r] = np.einsum("brm,bm->br", programs.normals, moved)
        right[:, n + r :] = tangent.bounds[:, programs.active]
        return self._solve(right)[:, :n]
