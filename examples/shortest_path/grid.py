"""Shortest paths on a grid with a cost for each cell, by SciPy's Dijkstra."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra

__all__ = ["GridPaths", "path_costs"]


class GridPaths:
    """The cheapest path from the top left to the bottom right cell, as an oracle: costs to the indicator of its cells.

    A path goes from a cell to any of its up to eight neighbours and costs the sum of its cells' costs, both ends
    included: with X the indicators of such paths, it returns argmin over x in X of <costs, x>; of several, always
    the same one.

    Args:
        height, width: of the grid, in cells.
    """

    def __init__(self, height: int, width: int) -> None:
        if height < 1 or width < 1:
            raise ValueError(f"a grid of {height} × {width} cells has no paths; both must be at least 1.")
        self.shape = (height, width)
        cells = np.arange(height * width).reshape(self.shape)
        padded = np.pad(cells, 1, constant_values=-1)
        shifts = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
        around = np.stack([padded[row : row + height, column : column + width] for row, column in shifts], axis=-1)
        inside = around.reshape(cells.size, len(shifts)) >= 0
        # The graph as CSR: an edge for each cell and neighbour, which costs what the neighbour costs.
        self._neighbours = around.reshape(cells.size, len(shifts))[inside].astype(np.int32)
        self._starts = np.concatenate([[0], np.cumsum(inside.sum(1))]).astype(np.int32)

    def __call__(self, costs: NDArray[np.floating]) -> NDArray[np.float64]:
        """(height, width) nonnegative costs to the (height, width) indicator of the cells of a cheapest path.

        Raises:
            ValueError: the costs have another shape, or one is negative, infinite or NaN: with negative costs a
                cheapest walk goes round in circles for ever.
        """
        if costs.shape != self.shape:
            raise ValueError(f"the costs have shape {costs.shape}; expected {self.shape}.")
        if not np.isfinite(costs).all() or costs.min() < 0:
            row, column = np.argwhere(~(np.isfinite(costs) & (costs >= 0)))[0]
            raise ValueError(
                f"the cost of cell ({row}, {column}) is {costs[row, column]}; Dijkstra's algorithm needs finite costs "
                "of at least 0. For a perturbed problem: keep the costs above tau times the loss gradient."
            )
        edges = costs.astype(np.float64).ravel()[self._neighbours]
        graph = csr_array((edges, self._neighbours, self._starts), shape=(costs.size, costs.size))
        _, before = dijkstra(graph, indices=0, return_predecessors=True)
        path = np.zeros(costs.size)
        cell = costs.size - 1
        while cell >= 0:  # the first cell's predecessor is negative
            path[cell] = 1.0
            cell = before[cell]
        return path.reshape(self.shape)


def path_costs(costs: NDArray[np.floating], paths: NDArray[np.floating]) -> NDArray[np.float64]:
    """(B, height, width) costs and path indicators to (B,) costs of the paths."""
    return (costs.astype(np.float64) * paths).sum((-2, -1))
