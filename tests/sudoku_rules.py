"""The true rules of Sudoku as equations, for tests."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
from numpy.typing import NDArray


@cache
def rules(order: int) -> NDArray[np.float64]:
    """The true rules as a 0-1 matrix: each cell, row, column and box sums to one, digit by digit."""
    side = order * order
    cells = np.arange(side**3).reshape(side, side, side)
    groups = []
    for first, second in itertools.product(range(side), repeat=2):
        top, left = divmod(first, order)
        box = cells[top * order : (top + 1) * order, left * order : (left + 1) * order, second]
        groups += [cells[first, second], cells[first, :, second], cells[:, first, second], box.ravel()]
    matrix = np.zeros((len(groups), side**3))
    for row, group in enumerate(groups):
        matrix[row, group] = 1.0
    return matrix
