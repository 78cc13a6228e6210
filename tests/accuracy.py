"""``python -m tests.accuracy --count 100``: how wrong an answer can be that comes without a warning.

Programs that are badly scaled, nearly degenerate or nearly infeasible are solved again by Newton's method on their
optimality conditions with 60 digits, from the active set that they were built with; gradients are those of the same
system.  The table has the largest errors of what was SOLVED without a word, by family and solver.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np
import torch
from mpmath import mp
from numpy.typing import NDArray
from tqdm import tqdm

import lpgd
from lpgd.cones.product import Cones
from lpgd.status import Status
from tests.judge.cone_points import Block, rows_of
from tests.judge.front_ends import names_of_solvers
from tests.judge.judge import warned_of
from tests.judge.programs import FREE, Plan, Programs, plant

mp.dps = 60

FloatArray = NDArray[np.float64]
STRESSES = ("badly scaled", "nearly degenerate", "nearly parallel rows", "nearly infeasible")
KINDS: dict[str, tuple[Block, ...]] = {
    "LP": (*[Block("nonnegative", "apex")] * 4, *[Block("nonnegative", "inside")] * 3),
    "QP": (Block("zero", "apex"), *[Block("nonnegative", "apex")] * 2, *[Block("nonnegative", "inside")] * 3),
    "second-order": (
        Block("zero", "apex"), Block("nonnegative", "apex"), Block("nonnegative", "inside"),
        Block("second_order", "edge", 3),
    ),
    "exponential": (
        Block("zero", "apex"), Block("nonnegative", "apex"), Block("nonnegative", "inside"),
        Block("exponential", "edge"),
    ),
}  # fmt: skip
SIZE = 10
"""Programs of one batch."""


# -- programs under stress ---------------------------------------------------------------------------------------------


def draw(rng: np.random.Generator, stress: str, kind: str) -> Programs:
    """A batch of programs, and how hard they are: 1e-1 to 1e-8, or units of 1e±4."""
    n = 4 if kind in ("LP", "QP") else 6
    plan = Plan("conic", n, KINDS[kind], (FREE,) * n, 0 if kind == "LP" else n, kind != "LP")
    programs = plant(rng, plan, SIZE)
    A, P, x, y, s = programs.A.copy(), programs.P, programs.x.copy(), programs.y.copy(), programs.s.copy()
    small = 10.0 ** -rng.uniform(1, 8, SIZE)
    section = plan.cones.sections["nonnegative"]
    active = [row for row in range(section.start, section.stop) if plan.blocks[row].state == "apex"]
    idle = [row for row in range(section.start, section.stop) if plan.blocks[row].state == "inside"]
    if stress == "badly scaled":
        D = 10.0 ** rng.uniform(-4, 4, (SIZE, n))
        R = np.concatenate([np.repeat(10.0 ** rng.uniform(-4, 4, (SIZE, 1)), rows_of(b), 1) for b in plan.blocks], 1)
        A, x, s, y = R[:, :, None] * A * D[:, None, :], x / D, R * s, y / R
        P = D[:, :, None] * P * D[:, None, :]
    elif stress == "nearly degenerate":
        y[:, active[0]] *= small
        s[:, idle[0]] *= small
    elif stress == "nearly parallel rows":
        other = active[1] if len(active) > 1 else 0
        A[:, other] = A[:, active[0]] + small[:, None] * A[:, other]
    else:  # two rows that leave room for little more than the solution
        A[:, idle[0]] = -A[:, active[0]]
        s[:, idle[0]] = small
    b = (A @ x[:, :, None])[:, :, 0] + s
    q = -(P @ x[:, :, None])[:, :, 0] - (np.swapaxes(A, 1, 2) @ y[:, :, None])[:, :, 0]
    return Programs(
        plan, programs.factor, P, q, A, b, programs.lower, programs.upper, x, y, programs.z, s, programs.normals,
        programs.curvature,
    )  # fmt: skip


# -- sixty digits ------------------------------------------------------------------------------------------------------


@dataclass
class Exact:
    """A solution and the system of its conditions in extended precision."""

    x: FloatArray
    gradients: dict[str, FloatArray]


def boundary(block: Block, s: Any) -> tuple[Any, Any, Any]:
    """``g``, its slope and its second derivative at a slack, for a smooth cone ``g ≤ 0``."""
    if block.kind == "second_order":
        t, *u = s
        length = mp.sqrt(sum(part * part for part in u))
        slope = mp.matrix([-1] + [part / length for part in u])
        bend = mp.zeros(len(s))
        for i, first in enumerate(u):
            for j, second in enumerate(u):
                bend[i + 1, j + 1] = ((i == j) - first * second / length**2) / length
        return length - t, slope, bend
    u, v, w = s
    ratio = u / v
    factor = mp.e**ratio
    direction = mp.matrix([1, -ratio, 0])
    return v * factor - w, mp.matrix([factor, (1 - ratio) * factor, -1]), factor / v * direction * direction.T


def solved(programs: Programs, element: int, weights: FloatArray) -> Exact | None:
    """Newton's method from the planted solution; None where it ends at another active set."""
    P, q, A, b = (mp.matrix(getattr(programs, name)[element].tolist()) for name in ("P", "q", "A", "b"))
    n, m = len(q), len(b)
    x, start, forces = mp.matrix(programs.x[element].tolist()), 0, []
    places: list[tuple[Block, int]] = []
    for block in programs.plan.blocks:
        if block.state != "inside":
            places.append((block, start))
            force = programs.y[element, start]
            if rows_of(block) > 1:
                slope = boundary(block, [mp.mpf(part) for part in programs.s[element, start : start + rows_of(block)]])[
                    1
                ]
                force = -mp.mpf(programs.y[element, start]) / slope[0]
            forces.append(mp.mpf(force))
        start += rows_of(block)
    r = len(places)
    for _ in range(12):
        s = b - A * x
        N, C, g, y = mp.zeros(r, m), mp.zeros(m), mp.zeros(r, 1), mp.zeros(m, 1)
        for place, (block, start) in enumerate(places):
            size = rows_of(block)
            if size == 1:
                N[place, start], g[place], y[start] = 1, -s[start], forces[place]
                continue
            value, slope, bend = boundary(block, [s[start + i] for i in range(size)])
            g[place] = value
            for i in range(size):
                N[place, start + i], y[start + i] = -slope[i], -forces[place] * slope[i]
                for j in range(size):
                    C[start + i, start + j] = forces[place] * bend[i, j]
        NA = N * A
        matrix, right = mp.zeros(n + r), mp.zeros(n + r, 1)
        matrix[:n, :n] = P + A.T * C * A
        matrix[n:, :n], matrix[:n, n:] = NA, NA.T
        right[:n, 0], right[n:, 0] = -(P * x + q + A.T * y), -g
        step = mp.lu_solve(matrix, right)
        x += step[:n, 0]
        forces = [force + step[n + place] for place, force in enumerate(forces)]
        if mp.norm(step, mp.inf) < mp.mpf(10) ** -40 * (1 + mp.norm(x, mp.inf)):
            break
    else:
        return None
    s = b - A * x
    section = programs.cones.sections["nonnegative"]
    signs = [forces[place] for place, (block, _) in enumerate(places) if block.kind != "zero"]
    outside = any(s[row] < -(mp.mpf(10) ** -40) for row in range(section.start, section.stop))
    if outside or any(force <= 0 for force in signs):
        return None
    answer = mp.lu_solve(matrix, mp.matrix([*weights.tolist(), *[0] * r]))
    u, mu = answer[:n, 0], answer[n:, 0]
    rows = C * A * u + N.T * mu
    dA = -(y * u.T + rows * x.T)
    dP = -(u * x.T + x * u.T) / 2
    gradients = {"P": dP, "q": -u, "A": dA, "b": rows}
    return Exact(array(x), {name: array(part) for name, part in gradients.items()})


def array(matrix: Any) -> FloatArray:
    """In double precision."""
    rows = np.array([[float(entry) for entry in row] for row in matrix.tolist()])
    return rows[:, 0] if rows.shape[1] == 1 else rows


# -- layers ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What came of a family with a solver."""

    cases: int = 0
    said: int = 0
    unsolved: int = 0
    x: list[float] = field(default_factory=list)
    said_x: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)


def measure(programs: Programs, exact: list[Exact | None], weights: FloatArray, solver: str, row: Row) -> None:
    """Solve a batch and add its errors."""
    linear = not programs.P.any()
    leaves = {name: torch.from_numpy(getattr(programs, name).copy()).requires_grad_() for name in "PqAb"}
    used = {name: leaf for name, leaf in leaves.items() if not (linear and name == "P")}
    options: dict[str, Any] = {"solver": None if solver == "default" else solver, "on_error": "nan"}
    layer = lpgd.ConicLayer(programs.cones, gradient=lpgd.ImplicitKKT(), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = layer(None if linear else leaves["P"], leaves["q"], leaves["A"], leaves["b"])
        found = torch.autograd.grad(output.x, list(used.values()), torch.from_numpy(weights))
    info: Any = output.info
    said = warned_of(info, caught, len(exact))
    gradients = dict(zip(used, (part.numpy() for part in found), strict=True))
    for element, reference in enumerate(exact):
        if reference is None:
            continue
        row.cases += 1
        status = info.statuses[element]
        if status is not Status.SOLVED:
            row.unsolved += 1
            continue
        row.said += bool(said[element])
        off = relative(output.x[element].detach().numpy(), reference.x)
        (row.said_x if said[element] else row.x).append(off)
        if not said[element]:
            expected = reference.gradients
            floor = 1e-3 * max(float(np.abs(expected[name]).max()) for name in used)
            row.gradient.append(max(relative(gradients[name][element], expected[name], floor) for name in used))


def relative(found: FloatArray, expected: FloatArray, floor: float = 1e-300) -> float:
    """The largest error, relative to the largest entry, or to the floor."""
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), floor))


def table(count: int, seed: int = 0, solvers: tuple[str, ...] | None = None) -> dict[tuple[str, str, str], Row]:
    """The measurements by stress, kind and solver."""
    rows: dict[tuple[str, str, str], Row] = defaultdict(Row)
    families = [(stress, kind) for stress in STRESSES for kind in KINDS]
    with tqdm(total=count * len(families), unit="program", mininterval=5.0) as bar:
        for place, (stress, kind) in enumerate(families):
            for batch in range(-(-count // SIZE)):
                rng = np.random.default_rng([seed, place, batch])
                programs = draw(rng, stress, kind)
                weights = rng.normal(size=programs.q.shape)
                exact: list[Exact | None] = []
                for element in range(SIZE):
                    try:
                        exact.append(solved(programs, element, weights[element]))
                    except (ZeroDivisionError, mpmath.libmp.ComplexResult):  # singular, or outside of the cone's domain
                        exact.append(None)
                fitting = ["default", *names_of_solvers(Cones(**vars(programs.cones)))]
                if kind == "LP":
                    fitting = [name for name in fitting if name != "PROXQP"]  # which layers refuse
                for solver in fitting if solvers is None else [name for name in fitting if name in solvers]:
                    measure(programs, exact, weights, solver, rows[stress, kind, solver])
                bar.update(SIZE)
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.accuracy", description=__doc__)
    parser.add_argument("--count", type=int, default=100, help="programs of each family")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| stress | programs | solver | solved | with a word | x | gradient | x with a word |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for (stress, kind, solver), row in table(options.count, options.seed).items():
        worst = [f"{max(part):.0e}" if part else "–" for part in (row.x, row.gradient, row.said_x)]
        answered = f"{row.cases - row.unsolved}/{row.cases}"
        print(f"| {stress} | {kind} | {solver} | {answered} | {row.said} | {' | '.join(worst)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
