"""Conic programs whose solution is known by construction, for every class of problems.

For any v, ``y = Π_K*(v)`` and ``s = y - v`` are complementary: with a random x, ``b = A x + s`` and
``q = -P x - Aᵀy - z`` make ``(x, y, s)`` a solution, whatever P ⪰ 0 and A are.  No solver is involved.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from lpgd.cones.product import Cones
from lpgd.cones.projections import project
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern

BATCH = 3


@dataclass(frozen=True)
class Case:
    """A batch of problems and its planted solution.

    ``regular``: the solution is unique and moves smoothly, so that every method must agree with finite differences.
    """

    name: str
    problem: ConicProblem
    point: ConicPoint
    regular: bool = True

    def __repr__(self) -> str:
        return self.name


def planted(
    name: str,
    cones: Cones,
    n: int,
    *,
    seed: int,
    rank: int | None = None,
    lower: int = 0,
    upper: int = 0,
    active_bounds: int = 0,
    inactive_rows: int | None = None,
    batched: tuple[str, ...] = ("q", "b", "lower", "upper"),
    density: float = 1.0,
    regular: bool = True,
    redundant: bool = False,
) -> Case:
    """A problem with a planted solution.

    Args:
        name: of the case.
        cones: K.
        n: number of variables.
        seed: of the random numbers.
        rank: of P; None is full, 0 no quadratic.
        lower, upper: the first ``lower`` variables have a lower bound, the last ``upper`` ones an upper bound.
        active_bounds: how many of the lower bounds are active.
        inactive_rows: how many of the nonnegative rows are inactive; None is half of them.
        batched: which data differ between elements; the others are shared.
        density: of A.
        regular: see Case.
        redundant: repeat the first equality.
    """
    rng = np.random.default_rng(seed)
    m = cones.rows
    rank = n if rank is None else rank

    def matrices() -> tuple[np.ndarray, np.ndarray]:
        factor = rng.normal(size=(rank, n)) / np.sqrt(max(rank, 1))
        P = factor.T @ factor + (0.3 * np.eye(n) if rank == n else 0.0)
        A = rng.normal(size=(m, n)) * mask
        if redundant:
            A[1] = 2.0 * A[0]
        return P, A

    mask = rng.random((m, n)) < density
    mask[np.arange(m), np.arange(m) % n] = True
    if redundant:
        mask[1] = mask[0]
    quadratic = SparsityPattern.dense(n, n) if rank else SparsityPattern.empty(n, n)
    constraint = SparsityPattern.from_matrix(mask)
    structure = ConicStructure(quadratic, constraint, cones, np.arange(lower), np.arange(n - upper, n))
    fixed = matrices()
    rows = []
    for _ in range(BATCH):
        P, A = (fresh if key in batched else shared for key, fresh, shared in zip("PA", matrices(), fixed, strict=True))
        x = rng.normal(size=n)
        v = rng.normal(size=m)
        section = cones.sections["nonnegative"]
        inactive = cones.nonnegative // 2 if inactive_rows is None else inactive_rows
        sizes = 0.5 + rng.random(cones.nonnegative)
        v[section] = np.where(np.arange(cones.nonnegative) < inactive, -sizes, sizes)
        y = project(cones, v, dual=True)
        if redundant:
            y[1] = 0.0
        s = y - v
        s[cones.sections["zero"]] = 0.0
        z = np.zeros(n)
        z[:active_bounds] = -(0.5 + rng.random(active_bounds))
        low = x[:lower] - np.where(np.arange(lower) < active_bounds, 0.0, 0.5 + rng.random(lower))
        high = x[n - upper :] + 0.5 + rng.random(upper)
        rows.append((P, -P @ x - A.T @ y - z, A, A @ x + s, low, high, x, y, z))
    stacked = [np.stack(parts) for parts in zip(*rows, strict=True)]
    P, q, A, b, low, high, x, y, z = (torch.from_numpy(part) for part in stacked)
    data = {"P": quadratic.gather(P), "q": q, "A": constraint.gather(A), "b": b, "lower": low, "upper": high}
    for key in ("P", "A"):
        if key not in batched:
            data[key] = data[key][0].clone()
    problem = ConicProblem(structure, ConicData(**data), BATCH)
    return Case(name, problem, ConicPoint(x, y, z), regular)


CASES = [
    planted("lp", Cones(zero=3, nonnegative=6), 8, seed=1, rank=0, lower=8, upper=8, active_bounds=2, inactive_rows=3),
    planted(
        "lp, batched matrices", Cones(zero=2, nonnegative=5), 6, seed=41, rank=0, lower=6, upper=6, active_bounds=2,
        inactive_rows=3, batched=("A", "q", "b", "lower"),
    ),
    planted("qp", Cones(zero=2, nonnegative=6), 8, seed=3, lower=4, upper=3, active_bounds=2),
    planted("qp, batched matrices", Cones(zero=2, nonnegative=6), 8, seed=4, batched=("P", "A", "q", "b"), density=0.5),
    planted("qp, low rank", Cones(zero=3, nonnegative=4), 6, seed=5, rank=4, inactive_rows=1),
    planted("equality only", Cones(zero=3), 6, seed=6),
    planted("unconstrained", Cones(), 5, seed=7),
    planted("bounds only", Cones(), 5, seed=8, lower=5, upper=5, active_bounds=2, batched=("P", "q", "lower", "upper")),
    planted("socp", Cones(zero=1, nonnegative=2, second_order=(3, 4, 1, 2)), 9, seed=9),
    planted("sdp", Cones(zero=1, semidefinite=(3, 2)), 9, seed=10),
    planted("exponential", Cones(zero=1, nonnegative=2, exponential=2), 8, seed=11),
    planted("dual exponential", Cones(nonnegative=1, dual_exponential=2), 8, seed=12),
    planted("power", Cones(zero=1, power=(0.3, 0.6)), 8, seed=13),
    planted("dual power", Cones(power=(-0.3, 0.5)), 8, seed=14),
    planted(
        "every cone",
        Cones(1, 2, (3,), (2,), 1, 1, (0.4, -0.7)),
        20,
        seed=15,
        lower=2,
        active_bounds=1,
        batched=("P", "A", "q", "b", "lower"),
    ),
    planted("redundant equalities", Cones(zero=3, nonnegative=2), 6, seed=16, regular=False, redundant=True),
    planted(
        "degenerate lp", Cones(zero=2, nonnegative=7), 5, seed=17, rank=0, inactive_rows=0, regular=False,
    ),
]  # fmt: skip

REGULAR = [case for case in CASES if case.regular]
