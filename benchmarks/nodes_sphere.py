"""Least squares on the sphere: global solutions beside SciPy's, and the structured gradient beside Jacobians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.nodes.sphere.descent import starting_points
from lpgd.nodes.sphere.node import SphereLeastSquares, differentiate_sphere, multiplier, normal_equations
from lpgd.nodes.sphere.secular import solve_secular

from .harness import Settings
from .less import VARIANTS, by_slsqp
from .results import Target

__all__ = ["run", "shares", "take_turns"]

BACKWARD = [(256, 8, 64, 444), (256, 16, 128, 432), (256, 64, 8, None), (256, 128, 16, None)]
"""Batch, rows and columns, and the ratio of the paper; the last two are the same sizes with tall matrices."""
JACOBIAN_BATCH = 16
"""Of the Jacobian side at the larger sizes: at 256 its matrices would need gigabytes."""
FORWARD = [(2, 2, 1000, 0.938), (64, 32, 1000, 0.994), (1024, 256, 10, None)]
"""Rows, columns and problems, and the share not worse than SciPy's of the paper's best solver."""
QUICK_COUNT = 100
WITHIN = 1e-6
"""Objectives this near, relative to 1 + objective, are the same."""
SLSQP = "SciPy SLSQP"


def draw(batch: int, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    A, b = generator.standard_normal((batch, m, n)), generator.standard_normal((batch, m))
    # With fewer rows than columns a short b can be met exactly by a continuum of points; a long one cannot.
    return torch.from_numpy(A), torch.from_numpy(b if m >= n else 10 * b)


def objective(A: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return 0.5 * (torch.einsum("bmn,bn->bm", A, u) - b).square().sum(-1)


def take_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each call; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = clock()
            call()
            seconds[name].append(clock() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def through_jacobian(A: Tensor, b: Tensor, y: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Second derivatives of the objective by automatic differentiation, Dy in full, then the product with v."""
    n = y.shape[-1]

    def stationarity(y: Tensor, A: Tensor, b: Tensor) -> Tensor:
        return torch.func.grad(lambda y: 0.5 * (A @ y - b).square().sum())(y)

    mixed = torch.func.vmap(torch.func.jacrev(stationarity, (0, 1, 2)))(y, A, b)
    mu = (y * torch.func.vmap(stationarity)(y, A, b)).sum(-1)
    system = torch.zeros(len(y), n + 1, n + 1, dtype=y.dtype)
    system[:, :n, :n] = mixed[0] - mu[:, None, None] * torch.eye(n, dtype=y.dtype)
    system[:, :n, n] = system[:, n, :n] = y
    right = torch.cat([mixed[1].flatten(2), mixed[2]], -1)
    jacobian = -torch.linalg.solve(system, torch.nn.functional.pad(right, (0, 0, 0, 1)))[:, :n]
    product = (cotangent[:, None] @ jacobian)[:, 0]
    return product[:, : -b.shape[-1]].reshape(A.shape), product[:, -b.shape[-1] :]


def backward(settings: Settings) -> Iterator[Target]:
    for batch, m, n, paper in BACKWARD[2:3] if settings.quick else BACKWARD:
        A, b = draw(batch, m, n)
        gram, vector = normal_equations(A, b)
        y = solve_secular(gram, vector).u
        mu = multiplier(gram, vector, y)
        v = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        system = torch.zeros(batch, n + 1, n + 1, dtype=y.dtype)
        system[:, :n, :n] = gram - mu[:, None, None] * torch.eye(n, dtype=y.dtype)
        system[:, :n, n] = system[:, n, :n] = y
        right = torch.nn.functional.pad(v, (0, 1))
        few = batch if m * n * n < 1e5 else JACOBIAN_BATCH
        structured = differentiate_sphere(A, b, y, v, gram, mu)
        jacobian = through_jacobian(A[:few], b[:few], y[:few], v[:few])
        error = max(float((one[:few] - other).abs().max()) for one, other in zip(structured, jacobian, strict=True))
        seconds = take_turns(
            {
                "structured": lambda A=A, b=b, y=y, v=v, gram=gram, mu=mu: differentiate_sphere(A, b, y, v, gram, mu),
                "bordered": lambda system=system, right=right: torch.linalg.solve(system, right),
            },
            5 if settings.quick else 31,
        )
        part = A[:few], b[:few], y[:few], v[:few]
        jacobian_seconds = take_turns(
            {"jacobian": lambda part=part: through_jacobian(*part)}, 1 if settings.quick else 3
        )
        slow = jacobian_seconds["jacobian"] * batch / few
        title = f"sphere, backward pass, batch {batch}, A {m}×{n}"
        note = (
            f"structured {1e3 * seconds['structured']:.2f} ms, one bordered solve {1e3 * seconds['bordered']:.2f} ms, "
            f"largest difference from the Jacobian's gradient {error:.0e}"
        )
        ratio = seconds["structured"] / seconds["bordered"]
        limit = 2.0
        if paper is None:
            limit, note = 10.0, f"{note}; a solve this small is less than writing dA"
        yield Target(f"{title}: structured / one bordered solve", limit, None, ratio, smaller=True, note=note)
        note = f"Jacobian {1e3 * slow:.0f} ms" + (f", from a batch of {few}" if few < batch else "")
        note += "" if paper is None else f"; the paper's ratio is {paper}, on its machine and with its Jacobian"
        yield Target(f"{title}: Jacobian / structured", 1.0, paper, slow / seconds["structured"], note=note)


class Share(NamedTuple):
    """What one solver found of some problems.

    Attributes:
        best: share of global minima.
        not_worse: share of objectives that are not above SciPy's.
        inside, outside: failures to find the global minimum where the minimiser without the constraint lies inside
            the sphere, and outside of it.
        error: mean of ``(f - f*)/(1 + f*)``.
        seconds: for all problems.
    """

    best: float
    not_worse: float
    inside: int
    outside: int
    error: float
    seconds: float


def shares(m: int, n: int, count: int) -> tuple[dict[str, Share], int]:
    """What each solver found, and for how many problems the minimiser without the constraint lies inside the sphere."""
    A, b = draw(count, m, n, seed=3)
    start = starting_points(A, b)
    descent = partial(SphereLeastSquares, "descent")
    nodes = {
        "secular": SphereLeastSquares(),
        "descent": descent(),
        "descent, step 1": descent(step=1.0),
        "descent without backtracking": descent(backtracking=False),
        **{f"LESS {name}": SphereLeastSquares(method) for name, method in VARIANTS.items()},
    }
    points, seconds = {}, {}
    calls = {name: lambda node=node: node.solve((A, b), None).y for name, node in nodes.items()}
    for name, call in {**calls, SLSQP: lambda: by_slsqp(A, b, start, maxiter=100, ftol=1e-12)}.items():
        started = time.perf_counter()
        points[name] = call()
        seconds[name] = time.perf_counter() - started
    values = {name: objective(A, b, u) for name, u in points.items()}
    best = torch.stack(list(values.values())).min(0).values
    inside = torch.linalg.lstsq(A, b[..., None]).solution[..., 0].norm(dim=-1) < 1.0
    found = {}
    for name, value in values.items():
        missed = value > best + WITHIN * (1.0 + best)
        not_worse = value <= values[SLSQP] + WITHIN * (1.0 + values[SLSQP])
        found[name] = Share(
            1.0 - float(missed.double().mean()),
            float(not_worse.double().mean()),
            int((missed & inside).sum()),
            int((missed & ~inside).sum()),
            float(((value - best) / (1.0 + best)).mean()),
            seconds[name],
        )
    return found, int(inside.sum())


def forward(settings: Settings) -> Iterator[Target]:
    for m, n, several, paper in FORWARD[:1] if settings.quick else FORWARD:
        count = QUICK_COUNT if settings.quick else several
        found, inside = shares(m, n, count)
        theirs = found.pop(SLSQP)
        for name, ours in found.items():
            note = (
                f"not worse than SciPy's SLSQP in {ours.not_worse:.1%}"
                + ("" if paper is None else f" (paper's best: {paper:.1%})")
                + f"; failures: {ours.inside} of {inside} whose free minimiser is inside the sphere, {ours.outside} of "
                f"{count - inside} outside; mean relative error {ours.error:.0e}; {ours.seconds:.3f} s against "
                f"{theirs.seconds:.3f} s of SLSQP, whose points are global minima in {theirs.best:.1%}, mean relative "
                f"error {theirs.error:.0e}"
            )
            wanted = {"secular": 1.0, "descent": 0.995}.get(name)
            title = f"sphere, {count} problems {m}×{n}, {name}: share of global minima"
            yield Target(title, wanted, None, ours.best, note=note)


def run(settings: Settings) -> Iterator[Target]:
    yield from backward(settings)
    yield from forward(settings)
