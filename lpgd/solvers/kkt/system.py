"""The linear systems of Newton's method and of implicit differentiation, those of several elements stacked into one.

With ``v = y - s`` the optimality conditions are ``P x + q + AᵀΠ(v) + z = 0`` and ``A x + Π(v) - v = b``, Π the
projection onto K* (Busseti, Moursi and Boyd 2019, for the homogeneous form).  Its derivative D at v is symmetric with
eigenvalues ``0 ≤ d ≤ 1``; with ``T = √d Uᵀ`` from its eigenvectors, ``D = TᵀT``, the change ``(dx, dy)`` of the
solution under the tilt ``<g_x, x> + <g_y, y>`` solves one symmetric system,

    [ P + ρI   (T A)ᵀ  ] [dx]     [  g_x  ]
    [ T A     -(I - d) ] [u ] = - [ T g_y ],      dy = Tᵀu,

in which rows with d = 0 drop out.  A variable at a bound is fixed: ``dx_j = -g_z,j``, and its multiplier's change
follows from its row of the first block.

Elements have systems of different sizes; they are put together as the blocks of one sparse matrix, so that what is not
arithmetic is paid for once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lpgd.arrays import BoolArray, FloatArray
from lpgd.execution.interrupts import pause
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.factor import Answers, System, solve_matrices, solve_sparse
from lpgd.solvers.kkt.rank import Known
from lpgd.solvers.kkt.reduced import ReducedBlocks, ReducedRows, held, is_dense, reduce_blocks, reduce_rows

__all__ = ["KKTPoints", "KKTResponse", "Known", "Tilt", "is_quick", "respond"]

NULL = 1e-6
"""Rows with a smaller part of the null space's unit vectors have nothing to do with it."""
STACK_LIMIT = 400_000
"""So many entries of dense systems are held at once: what stays in a core's cache."""


class KKTPoints(NamedTuple):
    """Solutions, tilts and bounds of k elements, one row each."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray
    g_x: FloatArray
    g_y: FloatArray
    g_z: FloatArray
    lower: FloatArray
    upper: FloatArray


class Tilt(NamedTuple):
    """A tilt of k elements, one row each."""

    x: FloatArray
    y: FloatArray
    z: FloatArray


class KKTResponse(NamedTuple):
    """The changes of k solutions, one row each."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    exact: BoolArray  # (k,) false for the minimum-norm answer of a singular system
    unique: BoolArray  # (k,) whether there is no freedom but that of multipliers
    consistent: BoolArray  # (k,) whether the change is one that the system allows
    doubt: FloatArray  # (k,) the share of the answer that the point's error may change
    shared: BoolArray  # (k, m) rows whose multipliers are not unique
    follows: BoolArray  # (k, p) which of the probes the system allows a change along

    @classmethod
    def joined(cls, responses: Sequence[KKTResponse]) -> KKTResponse:
        """Several, one after the other."""
        columns: Any = zip(*responses, strict=True)
        return cls(*(np.concatenate(arrays) for arrays in columns))

    def select(self, chosen: Any) -> KKTResponse:
        """Some of them, in new arrays."""
        columns: Any = self
        return KKTResponse(*(array[chosen] for array in columns))

    def copy(self) -> KKTResponse:
        """The same in arrays of its own."""
        return self.select(np.arange(len(self.x)))


def is_quick(structure: ConicStructure, count: int) -> bool:
    """Whether ``count`` systems are solved in about the time that it takes threads to change places."""
    size = structure.n + structure.m
    return count * size**3 < 5_000_000 if is_dense(structure) else count * size < 20_000


def respond(
    structure: ConicStructure,
    rho: FloatArray | float,
    P: FloatArray,
    A: FloatArray,
    points: KKTPoints,
    known: Known,
    probes: Sequence[Tilt] = (),
) -> KKTResponse:
    """The derivative of k solutions along tilts.

    Args:
        structure: patterns and cones.
        rho: ρ ≥ 0 added to the diagonal of P; or (k, n) one for each variable.
        P: (k, nnz P) symmetric values; rows may be views of one.
        A: (k, nnz A).
        points: where, and which tilts.
        known: how well the points are known.
        probes: p other tilts, of which only whether there is such a change is asked.
    """
    size, dense = structure.n + structure.m, is_dense(structure)
    count = max(1, STACK_LIMIT // max(size, 1) ** 2) if dense else len(P)
    responses = []
    for start in range(0, len(P), count):
        pause()
        chosen = slice(start, start + count)
        chosen_points = KKTPoints(*(array[chosen] for array in points))
        chosen_known, chosen_rho = known.select(chosen), rho[chosen] if isinstance(rho, np.ndarray) else rho
        method = _respond_densely if dense else _respond_sparsely
        tilts = [Tilt(*(array[chosen] for array in probe)) for probe in probes]
        responses.append(method(structure, chosen_rho, P[chosen], A[chosen], chosen_points, chosen_known, tilts))
    return KKTResponse.joined(responses)


def _respond_sparsely(
    structure: ConicStructure,
    rho: FloatArray | float,
    P: FloatArray,
    A: FloatArray,
    points: KKTPoints,
    known: Known,
    probes: Sequence[Tilt],
) -> KKTResponse:
    at_bound = held(points.x, points.z, points.lower, points.upper)
    g = points.g_x, points.g_y, points.g_z
    reduced = reduce_blocks(structure, rho, P, A, points.y - points.slack, at_bound, g)
    matrix, right = reduced.matrix, reduced.right(*g)
    others = np.array([reduced.right(*probe) for probe in probes]).reshape(len(probes), right.size)
    system = System(
        matrix.row, matrix.col, matrix.data, right, reduced.owner, reduced.primal, len(at_bound), known, others
    )
    return _read(reduced, solve_sparse(system), points, probes)


def _respond_densely(
    structure: ConicStructure,
    rho: FloatArray | float,
    P: FloatArray,
    A: FloatArray,
    points: KKTPoints,
    known: Known,
    probes: Sequence[Tilt],
) -> KKTResponse:
    at_bound = held(points.x, points.z, points.lower, points.upper)
    g = points.g_x, points.g_y, points.g_z
    reduced = reduce_rows(structure, rho, P, A, points.y - points.slack, at_bound, g)
    right = reduced.right(*g)
    others = np.array([reduced.right(*probe) for probe in probes]).reshape(len(probes), *right.shape)
    answers = solve_matrices(reduced.matrices, right, ~reduced.solved, reduced.primal, known, others)
    return _read(reduced, answers, points, probes)


def _read(
    reduced: ReducedRows | ReducedBlocks, found: Answers, points: KKTPoints, probes: Sequence[Tilt]
) -> KKTResponse:
    change = reduced.change(found.answer, points.g_x, points.g_z)
    shared = reduced.of_rows(found.null) > NULL
    follows = found.follows.copy()
    for place, probe in enumerate(probes):
        follows[:, place] &= ~((probe.x != 0) & reduced.loose).any(1)
    return KKTResponse(*change, found.exact, found.unique, found.consistent, found.doubt, shared, follows)
