"""Which solver is the fastest, forward and backward with new data in each call, and whether the rule chooses it.

The rule is a ranking, whose first installed solver is taken.  So it is right for every set of installed solvers if no
solver takes longer than one that it stands before: the target is the largest such ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

import lpgd
from lpgd.solvers import Situation, preference

from .dense_qp import draw_qps
from .harness import Case, Settings, Side, compare
from .ours import layer_side
from .problems import PROGRAMS
from .results import Result, Target

__all__ = ["run"]

Data = Sequence[Tensor]

BOUND = 1.3
EXTRAS = ("PROXQP", "MOREAU")
"""What a plain installation lacks."""
ALWAYS = ("CLARABEL", "DAQP", "HIGHS", "INTERIOR", "OSQP", "PIQP", "SCS")
"""What no installation lacks."""


@dataclass(frozen=True, eq=False)
class _Task:
    """One class of programs.

    Attributes:
        name, title: for the report.
        batch: of the full run, and of the quick one.
        draw: batch size and seed to data.
        layer: solver name and gradient method to a layer.
        arguments: data to the arguments of its call.
    """

    name: str
    title: str
    batch: tuple[int, int]
    draw: Callable[[int, int], tuple[Tensor, ...]]
    layer: Callable[[str | None, Any], Any]
    arguments: Callable[[Data], tuple[tuple[Any, ...], dict[str, Any]]]


def _qp(n: int, batch: int, shared: bool) -> _Task:
    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        P, q, A, b, G, h = draw_qps(n, size, seed)
        if not shared:
            return P, q, A, b, G, h
        inside = np.random.default_rng(seed).standard_normal((size, n, 1))
        inside = torch.from_numpy(inside)
        b, h = (A[0] @ inside)[..., 0], (G[0] @ inside)[..., 0] + (h - (G @ inside)[..., 0]).abs().clamp(max=1.0) + 0.05
        return P[0], q, A[0], b, G[0], h

    kind = "shared matrices" if shared else "matrices for each element"
    return _Task(
        f"qp{n}_{'shared' if shared else 'own'}",
        f"dense QP n {n}, {kind}",
        (batch, min(batch, 8)),
        draw,
        lpgd.QPLayer,
        lambda data: ((data[0], data[1]), dict(zip(("A", "b", "G", "h"), data[2:], strict=True))),
    )


def _objectives(rng: np.random.Generator, size: int, n: int, rank: int) -> tuple[Tensor, Tensor]:
    """P and q for each element, P of a rank and a small multiple of the identity."""
    root = rng.standard_normal((size, n, rank))
    P = root @ root.swapaxes(1, 2) / n + 1e-2 * np.eye(n)
    return torch.from_numpy(P), torch.from_numpy(rng.standard_normal((size, n)))


def _signed_qp(n: int, batch: int) -> _Task:
    """A P and inequalities for each element, and variables that are not negative."""

    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng(seed)
        return *_objectives(rng, size, n, n), torch.from_numpy(rng.standard_normal((size, n // 2, n)))

    return _Task(
        f"signed{n}",
        f"dense QP n {n}, x >= 0, {n // 2} rows",
        (batch, min(batch, 8)),
        draw,
        lpgd.QPLayer,
        lambda data: (tuple(data[:2]), {"lb": 0.0, "G": data[2], "h": 1.0}),
    )


def _bounded_qp(n: int, batch: int, rows: int) -> _Task:
    """A P for each element and bounds of every variable: a box, or with one row the points of a capped simplex."""

    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        return _objectives(np.random.default_rng(seed), size, n, n // 4 if rows else n)

    ones = torch.ones(rows, n, dtype=torch.float64)
    equality: dict[str, Any] = {"A": ones, "b": ones[:, 0]} if rows else {}
    kind = "on a simplex" if rows else "in a box"
    return _Task(
        f"{'simplex' if rows else 'box'}{n}",
        f"dense QP n {n} {kind}",
        (batch, min(batch, 8)),
        draw,
        lpgd.QPLayer,
        lambda data: (tuple(data), {"lb": 0.0, "ub": 0.1, **equality}),
    )


def _lp(n: int, batch: int, rows: int, filled: float = 1.0) -> _Task:
    """Costs for each element; shared rows, a share of them filled, with a point inside, in a box."""

    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng(seed)
        G = rng.standard_normal((rows, n)) * (rng.random((rows, n)) < filled)
        h = G @ rng.uniform(0.2, 0.8, n) + rng.uniform(0.05, 1.0, rows)
        return torch.from_numpy(rng.standard_normal((size, n))), torch.from_numpy(G), torch.from_numpy(h)

    def arguments(data: Data) -> tuple[tuple[Any, ...], dict[str, Any]]:
        c, G, h = data
        zeros = torch.zeros(n, dtype=c.dtype)
        return (c,), {"G": G if filled == 1.0 else G.to_sparse(), "h": h, "lb": zeros, "ub": zeros + 1.0}

    return _Task(
        f"lp{n}",
        f"{'dense' if filled == 1.0 else 'sparse'} LP n {n}, {rows} rows",
        (batch, min(batch, 8)),
        draw,
        lpgd.LPLayer,
        arguments,
    )


def _sparse_qp(n: int, batch: int) -> _Task:
    """A shared tridiagonal P and rows of three entries."""

    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        rng = np.random.default_rng(seed)
        P = np.diag(rng.uniform(1.0, 2.0, n))
        off = np.diag(rng.uniform(-0.4, 0.4, n - 1), 1)
        G = np.zeros((n, n))
        for row in G:
            row[rng.choice(n, 3, replace=False)] = rng.standard_normal(3)
        h = G @ rng.standard_normal(n) + rng.uniform(0.05, 1.0, (size, n))
        return tuple(map(torch.from_numpy, (P + off + off.T, rng.standard_normal((size, n)), G, h)))

    def arguments(data: Data) -> tuple[tuple[Any, ...], dict[str, Any]]:
        P, q, G, h = data
        return (P.to_sparse(), q), {"G": G.to_sparse(), "h": h}

    return _Task(
        f"sparse_qp{n}",
        f"sparse QP n {n}, {n} rows",
        (batch, min(batch, 2)),
        draw,
        lpgd.QPLayer,
        arguments,
    )


def _cvxpy(name: str, batch: int) -> _Task:
    program = PROGRAMS[name]
    instance = program.build(batch)

    def layer(solver: str | None, gradient: Any) -> Any:
        return lpgd.CvxpyLayer(
            instance.problem, instance.parameters, [instance.variable], solver=solver, gradient=gradient
        )

    return _Task(
        f"cvxpy_{name}",
        f"CVXPY: {program.title}",
        (batch, batch),
        lambda size, seed: instance.draw(seed),
        layer,
        lambda data: (tuple(data), {}),
    )


def _sum_of_squares(n: int, batch: int) -> _Task:
    """A dense QP as CVXPY sees it: P is RᵀR, and R the parameter."""
    x = cp.Variable(n)
    R, q, A, b = cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter((n // 5, n)), cp.Parameter(n // 5)
    G, h = cp.Parameter((n, n)), cp.Parameter(n)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(R @ x) + q @ x), [A @ x == b, G @ x <= h])

    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        P, *rest = draw_qps(n, size, seed)
        return torch.linalg.cholesky(P).mT.contiguous(), *rest

    def layer(solver: str | None, gradient: Any) -> Any:
        return lpgd.CvxpyLayer(problem, [R, q, A, b, G, h], [x], solver=solver, gradient=gradient)

    return _Task(f"cvxpy_qp{n}", f"CVXPY: dense QP n {n}", (batch, batch), draw, layer, lambda data: (tuple(data), {}))


def _on_a_simplex(name: str, title: str, n: int, k: int, batch: int, deviations: bool) -> _Task:
    """A point of a simplex as CVXPY sees it: k squares, with or without a curvature of each variable's own."""
    x, F, mean = cp.Variable(n), cp.Parameter((k, n)), cp.Parameter(n)
    own = 0.5 * cp.sum_squares(x) if deviations else 0.0
    problem = cp.Problem(cp.Minimize(own + cp.sum_squares(F @ x) - mean @ x), [cp.sum(x) == 1, x >= 0])

    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        roots, means = generator.standard_normal((size, k, n)) / 5, generator.standard_normal((size, n)) / 20
        return torch.from_numpy(roots), torch.from_numpy(means)

    def layer(solver: str | None, gradient: Any) -> Any:
        return lpgd.CvxpyLayer(problem, [F, mean], [x], solver=solver, gradient=gradient)

    return _Task(name, title, (batch, batch), draw, layer, lambda data: (tuple(data), {}))


def _scenarios(n: int, count: int, batch: int) -> _Task:
    """The mean of the worst tenth of some scenarios: linear, with a variable of its own for each."""
    x, level, returns = cp.Variable(n), cp.Variable(), cp.Parameter((count, n))
    worst = level + cp.sum(cp.pos(-returns @ x - level)) / (0.1 * count)
    problem = cp.Problem(cp.Minimize(worst), [cp.sum(x) == 1, x >= 0])

    def draw(size: int, seed: int) -> tuple[Tensor, ...]:
        return (torch.from_numpy(np.random.default_rng(seed).standard_normal((size, count, n)) + 0.1),)

    def layer(solver: str | None, gradient: Any) -> Any:
        return lpgd.CvxpyLayer(problem, [returns], [x], solver=solver, gradient=gradient)

    title = f"CVXPY: CVaR of {n} assets, {count} scenarios"
    return _Task("scenarios", title, (batch, batch), draw, layer, lambda data: (tuple(data), {}))


def tasks(quick: bool) -> Iterator[_Task]:
    yield _qp(10, 64, True)
    yield _qp(10, 64, False)
    yield _lp(10, 150, 10)
    if quick:
        return
    yield _qp(50, 64, True)
    yield _qp(50, 64, False)
    yield _qp(100, 32, False)
    yield _qp(200, 8, False)
    yield _qp(500, 4, False)
    yield _bounded_qp(120, 16, 0)
    yield _bounded_qp(250, 16, 1)
    yield _signed_qp(250, 16)
    yield _lp(100, 16, 50)
    yield _lp(600, 4, 300, 0.01)
    yield _sparse_qp(500, 4)
    yield _cvxpy("nnls", 32)
    yield _sum_of_squares(50, 64)
    yield _on_a_simplex("factors", "CVXPY: risk of 10 factors and own, n 300", 300, 10, 16, True)
    yield _on_a_simplex("squares", "CVXPY: risk by 250 squares of 250", 250, 250, 8, False)
    yield _on_a_simplex("few_squares", "CVXPY: risk by 100 squares of 200", 200, 100, 8, False)
    yield _scenarios(30, 200, 8)
    yield _cvxpy("portfolio", 32)
    yield _cvxpy("logistic", 32)
    yield _cvxpy("sdp", 32)


def run(settings: Settings) -> Iterator[Result | Target]:
    for task in tasks(settings.quick):
        for kind, gradient in (("exact", lpgd.ImplicitKKT()), ("LPGD", lpgd.LPGD(tau=0.1, envelope="lower"))):
            yield from _judged(task, kind, gradient, settings)


def _judged(task: _Task, kind: str, gradient: Any, settings: Settings) -> Iterator[Result | Target]:
    batch = task.batch[settings.quick]
    positional, named = task.arguments(task.draw(batch, 0))
    structure = task.layer(None, gradient)(*positional, **named).info.solution.problem.structure
    ranked = [solver.name for solver in preference(structure, Situation(augmented=False))]
    names = [name for name in ranked if name in lpgd.available(structure)]
    slow = () if structure.quadratic.nnz else ("OSQP", "SCS")  # seconds for a linear program of this size
    sides: list[Side] = [
        layer_side(task.layer(name, gradient), kind, task.arguments, True, slow=structure.n > 50 and name in slow)
        for name in names
    ]

    def nothing(data: Data, points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        return np.zeros(len(elements)), 0.0  # the layer has checked the residuals

    case = Case(
        "choice", f"{task.name}_{kind.lower()}", f"{task.title}, {kind}", batch, lambda seed: task.draw(batch, seed),
        lambda x: x.square().sum(), nothing, None, False,
    )  # fmt: skip
    result = compare(case, sides, settings)
    yield result
    seconds = {name: entry.timing.total for name, entry in zip(names, result.entries, strict=True) if entry.usable}
    if len(seconds) < 2:
        return
    best = min(seconds, key=lambda name: seconds[name])
    first = next(iter(seconds))
    order = "; ".join(f"{name} {1e3 * time:.1f} ms" for name, time in seconds.items())
    title = f"{case.title}, batch {batch}: chosen / best"
    yield Target(title, BOUND, 1.0, seconds[first] / seconds[best], True, f"in the rule's order: {order}")
    plain = next(name for name in seconds if name not in EXTRAS)
    title = f"{case.title}, batch {batch}: plain install / with the extras"
    yield Target(title, 0.9, 1.0, seconds[first] / seconds[plain], False, f"{plain}, {first}")
    worst, pair = 1.0, ""
    seconds.pop("ECOS", None)  # never chosen where there is another
    always = next((place for place, name in enumerate(seconds) if name in ALWAYS), len(seconds))
    for before, after in combinations(seconds, 2):
        if list(seconds).index(before) > always:  # none after one that is always there is ever chosen
            break
        if seconds[before] / seconds[after] > worst:
            worst, pair = seconds[before] / seconds[after], f"where {before} is there and {after} is the best"
    title = f"{case.title}, batch {batch}: chosen / best, for whichever solvers are installed"
    yield Target(title, BOUND, 1.0, worst, True, pair)
