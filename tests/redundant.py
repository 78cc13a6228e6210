"""Programs stated with redundant rows and cones, and the irredundant statement that they must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpgd.cones.product import Cones
from lpgd.cones.projections import project
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern


@dataclass(frozen=True)
class Redundant:
    """One program, stated once and with some of its rows and cones repeated, multiplied by positive factors.

    ``row`` and ``scale``: for each row of the repeated statement, the row that it repeats, and its factor.
    """

    single: ConicProblem
    repeated: ConicProblem
    row: NDArray[np.int64]
    scale: NDArray[np.float64]
    x: Tensor

    def of_repeated(self, values: Tensor) -> Tensor:
        """(B, m) values of the single statement's rows as those of the repeated one's: data."""
        return values[:, self.row] * torch.from_numpy(self.scale)

    def of_single(self, gradient: Tensor) -> Tensor:
        """(B, m') a gradient with respect to the repeated rows as one with respect to the rows that they repeat."""
        gathered = gradient.new_zeros(gradient.shape[0], self.single.structure.m)
        return gathered.index_add(1, torch.from_numpy(self.row), gradient * torch.from_numpy(self.scale))


KINDS: list[Cones] = [
    Cones(zero=2),
    Cones(nonnegative=4),
    Cones(zero=1, nonnegative=3),
    Cones(second_order=(3,)),
    Cones(second_order=(4, 3)),
    Cones(semidefinite=(2,)),
    Cones(semidefinite=(3,)),
    Cones(exponential=1),
    Cones(exponential=2),
    Cones(dual_exponential=1),
    Cones(power=(0.3,)),
    Cones(power=(-0.6, 0.5)),
    Cones(zero=1, nonnegative=2, second_order=(3,), exponential=1),
]


def redundant(seed: int) -> Redundant:
    """A random program of random cones, of which a random part, at least one, is stated up to three times."""
    rng = np.random.default_rng(seed)
    cones = KINDS[int(rng.integers(len(KINDS)))]
    n = cones.rows + int(rng.integers(0, 3)) if not cones.is_polyhedral else cones.zero + int(rng.integers(2, 5))
    lower = int(rng.integers(0, 3)) * int(rng.integers(0, 2))
    m = cones.rows
    factor = rng.normal(size=(n, n)) / np.sqrt(n)
    P, A = factor.T @ factor + 0.3 * np.eye(n), rng.normal(size=(m, n))
    x, v = rng.normal(size=n), rng.normal(size=m)
    v[cones.sections["nonnegative"]] += np.sign(v[cones.sections["nonnegative"]]) * 0.1
    if cones.is_polyhedral:  # fewer active rows than variables, so that the single statement is regular
        section = cones.sections["nonnegative"]
        spare = max(n - lower - cones.zero, 0)
        v[section] = np.where(np.arange(cones.nonnegative) < spare, v[section], -np.abs(v[section]))
    y = project(cones, v, dual=True)
    s = project(cones, -v)
    z = np.zeros(n)
    held = rng.random(lower) < 0.5
    z[:lower] = np.where(held, -(0.2 + rng.random(lower)), 0.0)
    low = x[:lower] - np.where(held, 0.0, 0.5)
    single = _problem(P, -P @ x - A.T @ y - z, A, A @ x + s, cones, low)

    rows, scales, counts = [], [], {}
    for name, section in cones.sections.items():
        sizes = _sizes(cones, name)
        starts = section.start + np.cumsum([0, *sizes[:-1]]) if sizes else []
        order = []
        for cone, start in enumerate(starts):
            for copy in range(1 + int(rng.integers(0, 3))):
                order.append(cone)
                rows.append(start + np.arange(sizes[cone]))
                scales.append(np.full(sizes[cone], 1.0 if copy == 0 else 10.0 ** rng.uniform(-1, 1)))
        if order and len(order) == len(sizes):  # at least one of a kind
            order.append(0)
            rows.append(starts[0] + np.arange(sizes[0]))
            scales.append(np.full(sizes[0], 3.0))
        counts[name] = order
    row, scale = np.concatenate(rows), np.concatenate(scales)
    fields: dict[str, Any] = {name: getattr(cones, name) for name in cones.sections}
    sizes_of: dict[str, Any] = {
        name: len(counts[name]) if isinstance(value, int) else tuple(value[cone] for cone in counts[name])
        for name, value in fields.items()
    }
    repeated = Cones(**sizes_of)
    q, b = single.data.q.numpy()[0], single.data.b.numpy()[0]
    again = _problem(P, q, A[row] * scale[:, None], b[row] * scale, repeated, low)
    return Redundant(single, again, row, scale, torch.from_numpy(x)[None])


def _sizes(cones: Cones, name: str) -> list[int]:
    value = getattr(cones, name)
    if name in ("zero", "nonnegative"):
        return [1] * value
    if name == "second_order":
        return list(value)
    if name == "semidefinite":
        return [side * (side + 1) // 2 for side in value]
    return [3] * (value if isinstance(value, int) else len(value))


def _problem(
    P: NDArray[np.float64],
    q: NDArray[np.float64],
    A: NDArray[np.float64],
    b: NDArray[np.float64],
    cones: Cones,
    low: NDArray[np.float64],
) -> ConicProblem:
    m, n = A.shape
    quadratic, constraint = SparsityPattern.dense(n, n), SparsityPattern.dense(m, n)
    structure = ConicStructure(quadratic, constraint, cones, np.arange(low.size))
    P_values, A_values = quadratic.gather(torch.from_numpy(P)[None]), constraint.gather(torch.from_numpy(A)[None])
    vectors = (torch.from_numpy(part)[None] for part in (q, b, low))
    q_, b_, low_ = vectors
    data = ConicData(P_values, q_, A_values, b_, low_, torch.zeros(1, 0, dtype=torch.float64))
    return ConicProblem(structure, data, 1)


def cotangent(program: Redundant, seed: int) -> ConicPoint:
    """A random loss gradient in x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(program.x.shape, generator=generator, dtype=torch.float64)
    structure = program.repeated.structure
    return ConicPoint(x, x.new_zeros(1, structure.m), torch.zeros_like(x))


def of_single(program: Redundant, point: ConicPoint) -> ConicPoint:
    """A primal cotangent for the single statement."""
    return point._replace(y=point.x.new_zeros(1, program.single.structure.m))


__all__ = ["KINDS", "Redundant", "cotangent", "of_single", "redundant"]
