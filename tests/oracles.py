"""Combinatorial solvers for the tests of layers over them, and the sets of all their solutions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]


class OracleCase(NamedTuple):
    """A solver, and every point that it could return."""

    name: str
    solver: Callable[[FloatArray], FloatArray]
    sense: str
    points: Tensor  # (k, *shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.points.shape[1:])

    @property
    def sign(self) -> float:
        return 1.0 if self.sense == "min" else -1.0

    def best(self, costs: Tensor) -> Tensor:
        """The solutions for costs (B, *shape), by enumeration."""
        values = self.sign * costs.flatten(1).double() @ self.points.flatten(1).mT
        return self.points[values.argmin(-1)]

    def difference(self, costs: Tensor, g: Tensor, tau: float, envelope: str) -> Tensor:
        """The gradient for a cotangent g by the formula of an envelope, with solutions by enumeration."""
        plus, minus = (self.best(costs + self.sign * step * g) for step in (tau, -tau))
        here = self.best(costs)
        ends = {"lower": (plus, here, tau), "upper": (here, minus, tau), "average": (plus, minus, 2 * tau)}
        a, b, width = ends[envelope]
        return self.sign * (a - b) / width


def assignment(costs: FloatArray) -> NDArray[np.bool_]:
    chosen = np.zeros(costs.shape, dtype=bool)
    chosen[scipy.optimize.linear_sum_assignment(costs)] = True
    return chosen


def nearest_in_box(costs: FloatArray, rho: float = 0.0, center: FloatArray | None = None) -> FloatArray:
    """Minimises ``<c, x> + (ρ/2) |x - center|²`` over [0, 1]ⁿ."""
    if center is None:
        return (costs < 0).astype(float)
    return np.clip(center - costs / rho, 0.0, 1.0)


def assignments(size: int) -> Tensor:
    eye = np.eye(size)
    return torch.from_numpy(np.stack([eye[list(order)] for order in itertools.permutations(range(size))]))


def monotone_path(costs: FloatArray) -> NDArray[np.int64]:
    """The cheapest path from corner to corner of a grid, right or down, by dynamic programming."""
    height, width = costs.shape
    total = np.full((height + 1, width + 1), np.inf)
    total[0, 1] = total[1, 0] = 0.0
    for i, j in itertools.product(range(height), range(width)):
        total[i + 1, j + 1] = costs[i, j] + min(total[i, j + 1], total[i + 1, j])
    path = np.zeros(costs.shape, dtype=np.int64)
    i, j = height - 1, width - 1
    while True:
        path[i, j] = 1
        if i == j == 0:
            return path
        i, j = (i - 1, j) if j == 0 or (i > 0 and total[i, j + 1] <= total[i + 1, j]) else (i, j - 1)


def monotone_paths(height: int, width: int) -> Tensor:
    points = []
    for downs in itertools.combinations(range(height + width - 2), height - 1):
        path = np.zeros((height, width))
        i = j = 0
        path[0, 0] = 1
        for step in range(height + width - 2):
            i, j = (i + 1, j) if step in downs else (i, j + 1)
            path[i, j] = 1
        points.append(path)
    return torch.from_numpy(np.stack(points))


WEIGHTS, CAPACITY = (3, 4, 2, 5, 1, 6), 10


def knapsack(values: FloatArray) -> list[int]:
    """The items of largest total value within the capacity, by dynamic programming over capacities."""
    best: list[tuple[float, list[int]]] = [(0.0, [])] * (CAPACITY + 1)
    for item, (value, weight) in enumerate(zip(values, WEIGHTS, strict=True)):
        for capacity in range(CAPACITY, weight - 1, -1):
            total, chosen = best[capacity - weight]
            if total + value > best[capacity][0]:
                best[capacity] = total + value, [*chosen, item]
    return [int(item in best[CAPACITY][1]) for item in range(len(WEIGHTS))]


def packings(weights: Sequence[int] = WEIGHTS, capacity: int = CAPACITY) -> Tensor:
    choices = itertools.product((0.0, 1.0), repeat=len(weights))
    return torch.tensor([c for c in choices if np.dot(c, weights) <= capacity], dtype=torch.float64)


ORACLES = [
    OracleCase("assignment", assignment, "min", assignments(4)),
    OracleCase("path", monotone_path, "min", monotone_paths(4, 5)),
    OracleCase("knapsack", knapsack, "max", packings()),
]
