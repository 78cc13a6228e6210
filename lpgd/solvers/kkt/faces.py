"""Implicit differentiation of linear programs with a shared A whose solutions are inside faces.

There the system of :mod:`lpgd.solvers.kkt.flat` has more free variables F than active rows R, and its answer needs one
factor of ``G = A_RF A_RFᵀ``.  With A dense and shared by a batch, ``G = (A Aᵀ)_RR - A_RH A_RHᵀ``, H the variables at a
bound: where few of them are, next to nothing has to be formed for an element, and no system put together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.linalg

from lpgd.arrays import BoolArray, FloatArray
from lpgd.execution.interrupts import pause
from lpgd.execution.threads import bounded_blas
from lpgd.solvers.kkt.flat import doubt_of, is_clear
from lpgd.solvers.kkt.rank import RESIDUAL, Known
from lpgd.solvers.kkt.system import KKTResponse

__all__ = ["FaceTask", "respond_in_faces"]

FEW = 0.3
"""The share of variables at a bound up to which their part is taken out of ``A Aᵀ``; with more it costs digits."""


class FaceTask(NamedTuple):
    """What k elements have, one row each, and what they share.

    Attributes:
        A: (m, n), the rows' largest entries not zero.
        square: (m, m) of A with rows whose largest entries are 1.
        at_bound: (k, n) variables at a bound.
        active: (k, m) active rows, fewer than free variables.
        g_x, g_y, g_z: the tilts.
        known: how well the points are known.
    """

    A: FloatArray
    square: FloatArray
    at_bound: BoolArray
    active: BoolArray
    g_x: FloatArray
    g_y: FloatArray
    g_z: FloatArray
    known: Known


def respond_in_faces(task: FaceTask) -> tuple[KKTResponse, BoolArray]:
    """The minimum-norm responses, and (k,) where they are to be taken: rows that depend on each other are not told."""
    count, n = task.at_bound.shape
    m = len(task.A)
    nothing, doubt = np.zeros(count, dtype=bool), np.full(count, np.inf)
    found = KKTResponse(
        np.zeros((count, n)), np.zeros((count, m)), np.zeros((count, n)),
        exact=nothing, unique=nothing.copy(), consistent=nothing.copy(), doubt=doubt,
        shared=np.zeros((count, m), dtype=bool), follows=np.zeros((count, 0), dtype=bool),
    )  # fmt: skip
    solved = np.zeros(count, dtype=bool)
    largest = np.abs(task.A).max(1, initial=0.0)
    scaled = task.A / largest[:, None]
    with bounded_blas():  # threads gain nothing on a factorisation of this size
        for element in range(count):
            pause()
            solved[element] = _respond(task, scaled, largest, element, found)
    return found, solved


def _respond(task: FaceTask, scaled: FloatArray, largest: FloatArray, element: int, found: KKTResponse) -> bool:
    held, active, known = task.at_bound[element], task.active[element], task.known.select(element)
    every_row, free = bool(active.all()), ~held
    A = scaled if every_row else scaled[active]
    if held.sum() <= FEW * held.size:
        square = task.square if every_row else task.square[np.ix_(active, active)]
        square = square - A[:, held] @ A[:, held].T if held.any() else square.copy()
    else:
        square = A[:, free] @ A[:, free].T
    size = float(np.sqrt(max(np.trace(square), 0.0)))
    try:
        factor = scipy.linalg.cho_factor(square, lower=True, overwrite_a=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return False
    doubt = doubt_of(factor, size, int(free.sum()) + len(A), known)
    if not is_clear(doubt):
        return False
    unit = largest[active]
    fixed = np.where(held, -task.g_z[element], 0.0)
    g_x, g_y = task.g_x[element], task.g_y[element][active] / unit
    if fixed.any():
        g_y = g_y + A @ fixed
    right_x = np.where(free, -g_x, 0.0)

    def transposed(columns: FloatArray) -> FloatArray:
        return np.where(free[:, None], A.T @ columns, 0.0)

    both = np.stack([A @ right_x, -g_y], axis=1)
    answer = scipy.linalg.cho_solve(factor, both, check_finite=False)
    answer += scipy.linalg.cho_solve(factor, both - A @ transposed(answer), check_finite=False)
    moved = transposed(answer)
    right = max(float(np.abs(right_x).max(initial=0.0)), float(np.abs(g_y * unit).max(initial=0.0)), 1e-300)
    found.consistent[element] = np.abs(right_x - moved[:, 0]).max() <= RESIDUAL * right
    found.x[element] = fixed + moved[:, 1]
    found.y[element, active] = answer[:, 0] / unit
    found.z[element] = np.where(held, -(g_x + A.T @ answer[:, 0]), 0.0)
    found.doubt[element] = doubt
    return True
