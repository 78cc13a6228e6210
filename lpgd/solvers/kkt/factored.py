"""Systems of optimality conditions, factorised once for any number of right-hand sides.

For elements whose system is regular: ``Factored.solve`` is the derivative of their solutions along a tilt.  The others
are said (``regular``), and their answers mean nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lpgd.arrays import BoolArray, FloatArray, IntArray, random_direction
from lpgd.execution.interrupts import pause
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.condensed import Condensed, is_condensed
from lpgd.solvers.kkt.factor import blocks_of, equilibration, largest_of_rows, scaled_by
from lpgd.solvers.kkt.lu import ScaledLU
from lpgd.solvers.kkt.packed import Packed, packed
from lpgd.solvers.kkt.reduced import ReducedBlocks, ReducedRows, held, is_dense, reduce_blocks, reduce_rows
from lpgd.solvers.kkt.standard import Standard, is_standard
from lpgd.solvers.kkt.superlu import superlu

__all__ = ["Factored"]

Change = tuple[FloatArray, FloatArray, FloatArray]

ILL_CONDITIONED = 1e10
"""Equilibrated systems with a larger condition, as far as a random direction shows it, count as singular."""
FEW_BYTES = 262_144
"""What is needed for a moment only takes about so many bytes."""
STACK_LIMIT = 2_000_000
"""So many entries of dense systems are made at once."""


class Factored:
    """The systems of k elements at their points.

    Args:
        structure: patterns and cones.
        rho: added to the diagonal of P.
        P, A: (k, ·) values, P symmetric; rows may be views of one.
        x, v, z: (k, ·) the points, with ``v = y - s``.
        lower, upper: (k, n) bounds.

    Attributes:
        regular: (k,) which elements have a regular system.
        inverse, condition: (k,) estimates of the norm of its inverse, equilibrated, and of its condition.
    """

    def __init__(
        self,
        structure: ConicStructure,
        rho: FloatArray | float,
        P: FloatArray,
        A: FloatArray,
        x: FloatArray,
        v: FloatArray,
        z: FloatArray,
        lower: FloatArray,
        upper: FloatArray,
    ) -> None:
        at_bound = held(x, z, lower, upper)
        size, count = structure.n + structure.m, len(x)
        stack = max(1, STACK_LIMIT // max(size, 1) ** 2) if is_dense(structure) else max(count, 1)
        self._stacks: list[tuple[slice, _Dense | _Curved | _Sparse]] = []
        self.inverse, self.condition = np.full(count, np.inf), np.full(count, np.inf)
        for start in range(0, count, stack):
            pause()
            chosen = slice(start, start + stack)
            chosen_rho = rho[chosen] if isinstance(rho, np.ndarray) else rho
            data = structure, chosen_rho, P[chosen], A[chosen], v[chosen], at_bound[chosen]
            self._stacks.append((chosen, factor := _factor(*data)))
            self.inverse[chosen], self.condition[chosen] = factor.inverse, factor.condition
        self.regular = self.condition < ILL_CONDITIONED  # false for NaN

    @property
    def entries(self) -> int:
        """How many numbers it holds."""
        return sum(factor.entries for _, factor in self._stacks)

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> Change:
        """The change (dx, dy, dz) of the points under a tilt, (k, ·) each; NaN where nothing determines it."""
        # Elements whose system is singular have NaN and infinities in their factors, which no one asks for.
        with np.errstate(over="ignore", invalid="ignore"):
            changes = [factor.solve(g_x[chosen], g_y[chosen], g_z[chosen]) for chosen, factor in self._stacks]
        if len(changes) == 1:
            return changes[0]
        dx, dy, dz = (np.concatenate(columns) for columns in zip(*changes, strict=True))
        return dx, dy, dz


def _factor(
    structure: ConicStructure,
    rho: FloatArray | float,
    P: FloatArray,
    A: FloatArray,
    v: FloatArray,
    at_bound: BoolArray,
) -> _Dense | _Curved | _Sparse:
    """The factors in the way that suits the structure."""
    if not is_dense(structure):
        return _Sparse(reduce_blocks(structure, rho, P, A, v, at_bound))
    if is_standard(structure) and not np.any(rho):
        return _Curved(Standard(structure, A, v))
    if is_condensed(structure):
        return _Curved(Condensed(structure, rho, P, A, v, at_bound))
    return _Dense(reduce_rows(structure, rho, P, A, v, at_bound))


class _Dense:
    """A stack of dense systems, as LU factors of the equilibrated matrices."""

    def __init__(self, reduced: ReducedRows) -> None:
        self.reduced, idle = reduced, ~reduced.solved
        self.stacks: list[tuple[Packed, _LU]] = []
        self.inverse, self.condition = np.zeros((2, len(idle)))
        for stack in packed(reduced.matrices, idle):
            lu = _LU(stack.matrices, stack.idle)
            self.stacks.append((stack._replace(matrices=stack.matrices[:0]), lu))
            self.inverse[stack.elements], self.condition[stack.elements] = lu.inverse, lu.condition

    @property
    def entries(self) -> int:
        return 2 * sum(lu.entries for _, lu in self.stacks)

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> Change:
        right = self.reduced.right(g_x, g_y, g_z)
        answer = np.zeros(right.shape)
        for stack, lu in self.stacks:
            stack.spread(lu.solve(stack.vectors(right)), answer)
        return _undetermined(self.reduced.change(answer, g_x, g_z), self.reduced, g_x)


class _Curved:
    """A stack of dense systems of programs with curved cones."""

    def __init__(self, system: Condensed | Standard) -> None:
        self.system = system
        self.inverse, self.condition, self.entries = system.inverse, system.condition, system.entries

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> Change:
        return _undetermined(self.system.solve(g_x, g_y, g_z), self.system, g_x)


class _LU(ScaledLU):
    """Symmetric matrices (k, p, p), which it equilibrates, with estimates of their inverses and conditions."""

    def __init__(self, matrices: FloatArray, idle: BoolArray) -> None:
        count, side, _ = matrices.shape
        scales, size = np.empty((count, side)), np.empty(count)
        for start in range(0, count, step := max(1, FEW_BYTES // (8 * side**2))):
            chosen = slice(start, start + step)
            absolute = np.abs(matrices[chosen])
            scale = equilibration(absolute.max(2, initial=0.0))
            scales[chosen] = scale
            size[chosen] = (scale * (absolute @ scale[:, :, None])[:, :, 0]).max(1, initial=0.0)
        super().__init__(matrices, scales)
        direction = self.solve_scaled(np.where(idle, 0.0, random_direction(idle.shape[1])))
        with np.errstate(over="ignore", invalid="ignore"):
            self.inverse = np.where(self.regular, np.linalg.norm(direction, axis=1), np.inf)
            self.condition = self.inverse * size


class _Sparse:
    """A sparse matrix for each element: the order of elimination, and every bit, is a matter of the element alone."""

    def __init__(self, reduced: ReducedBlocks) -> None:
        self.reduced = reduced
        count, matrix = len(reduced.at_bound), reduced.matrix
        self.inverse, self.condition = np.full((2, count), np.inf)
        self.factors: list[tuple[IntArray, FloatArray, Any] | None] = []
        for element, (places, block) in enumerate(blocks_of(matrix.row, matrix.col, matrix.data, reduced.owner, count)):
            pause()
            scale = equilibration(largest_of_rows(block))
            scaled = scaled_by(block, scale)
            try:
                factor = superlu(
                    scaled, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.01, options={"SymmetricMode": True}
                )
            except RuntimeError:  # singular
                self.factors.append(None)
                continue
            self.factors.append((places, scale, factor))
            with np.errstate(over="ignore", invalid="ignore"):
                self.inverse[element] = np.linalg.norm(factor.solve(random_direction(places.size)))
                self.condition[element] = self.inverse[element] * np.asarray(abs(scaled).sum(1)).max(initial=0.0)

    @property
    def entries(self) -> int:
        return sum(int(one[2].nnz) for one in self.factors if one is not None)

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> Change:
        right = self.reduced.right(g_x, g_y, g_z)
        answer, singular = np.zeros_like(right), np.zeros(len(g_x), dtype=bool)
        for element, one in enumerate(self.factors):
            if one is None:
                singular[element] = True
                continue
            places, scale, factor = one
            scaled_right = scale * right[places]
            if scaled_right.any():
                answer[places] = scale * factor.solve(scaled_right)
        change = self.reduced.change(answer, g_x, g_z)
        for values in change:
            values[singular] = np.nan
        return _undetermined(change, self.reduced, g_x)


def _undetermined(
    change: Change, reduced: ReducedRows | ReducedBlocks | Condensed | Standard, g_x: FloatArray
) -> Change:
    """The change, NaN in x where a tilt moves a variable that nothing determines."""
    if reduced.loose.any():
        change[0][reduced.loose & (g_x != 0)] = np.nan
    return change
