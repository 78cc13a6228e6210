"""Stacks of dense systems, each element with a matrix of a size of its own, so that its bits depend on nobody else.

LAPACK rounds in another order for a matrix with more idle rows.  A stack therefore splits by the sizes of what counts,
rounded up, as few sizes as possible: a multiple of eight rows also begins each matrix at a cache line, and MKL rounds
by where its arrays begin.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lpgd.arrays import BoolArray, FloatArray, IntArray

__all__ = ["Packed", "packed", "packed_size", "packed_sizes"]

Scalar = TypeVar("Scalar", np.float64, np.bool_)

STEP = 8
"""Sizes are multiples of this."""


def packed_size(count: int) -> int:
    """The side of the matrix for so many rows that count."""
    return -(-count // STEP) * STEP


def packed_sizes(counts: IntArray) -> IntArray:
    """The same for several."""
    return -(-counts // STEP) * STEP


class Packed(NamedTuple):
    """Matrices of one size.

    Attributes:
        elements: (k,) of the whole stack.
        places: (k, w) for the first w rows and columns of each matrix, which ones of the whole's they are; all that
            count are among them.  None where they are the first w.
        matrices: (k, p, p) with ones on the diagonal of ``idle`` rows.
        idle: (k, p) rows that do not count, the last ones.
    """

    elements: IntArray
    places: IntArray | None
    matrices: FloatArray
    idle: BoolArray

    def vectors(self, values: NDArray[Scalar]) -> NDArray[Scalar]:
        """(k, p) of the whole's vectors (E, t), zero in rows that do not count."""
        width = min(self.idle.shape[1], values.shape[1])
        found = np.zeros(self.idle.shape, dtype=values.dtype)
        if self.places is None:
            found[:, :width] = values[self.elements, :width]
        else:
            found[:, :width] = values[self.elements[:, None], self.places]
        found[self.idle] = 0
        return found

    def spread(self, values: FloatArray, whole: FloatArray) -> None:
        """Write vectors (k, p) to the whole's (E, t)."""
        width = min(self.idle.shape[1], whole.shape[1])
        if self.places is None:
            whole[self.elements, :width] = values[:, :width]
        else:
            whole[self.elements[:, None], self.places] = values[:, :width]


def packed(matrices: FloatArray, idle: BoolArray) -> list[Packed]:
    """The parts of a stack (E, t, t), without its idle (E, t) rows and columns, which must be zero.

    They may be the stack itself, and have ones on the diagonal.
    """
    counts = (~idle).sum(1)
    sizes = packed_sizes(counts)
    found: list[Packed] = []
    for side in np.unique(sizes[sizes > 0]):
        elements = np.flatnonzero(sizes == side)
        whole = elements.size == len(idle)
        width = min(int(side), idle.shape[1])
        order = None
        passive = idle if whole else idle[elements]
        if (passive[:, 1:] < passive[:, :-1]).any():  # rows that count behind idle ones
            order = np.argsort(passive, axis=1, kind="stable")[:, :width]
        if order is not None:
            taken = matrices[elements[:, None, None], order[:, :, None], order[:, None, :]]
        elif whole:
            taken = matrices[:, :width, :width]
        else:
            taken = matrices[elements, :width, :width]
        padded = taken
        if width < side or (whole and order is None and width < matrices.shape[1]):
            padded = np.zeros((elements.size, side, side))
            padded[:, :width, :width] = taken
        behind = np.arange(side) >= counts[elements][:, None]
        element, row = np.nonzero(behind)
        padded[element, row, row] = 1.0
        found.append(Packed(elements, order, padded, behind))
    return found
