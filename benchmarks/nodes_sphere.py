"""Least squares on the sphere: global solutions beside SciPy's, and the structured gradient beside Jacobians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from lpgd.gradients import ImplicitKKT
from lpgd.layers.node import NodeLayer
from lpgd.solvers.nodes.sphere import SphereLeastSquares, differentiate_sphere, multiplier, normal_equations
from lpgd.solvers.nodes.sphere_descent import starting_points
from lpgd.solvers.nodes.sphere_global import solve_secular

from .harness import Case, Settings, Side, compare
from .results import Curve, Result, Target

__all__ = ["run", "shares", "take_turns"]

BACKWARD = [(256, 8, 64, 444), (256, 16, 128, 432), (256, 64, 8, None), (256, 128, 16, None)]
"""Batch, rows and columns, and the ratio of the paper; the last two are the same sizes with tall matrices."""
JACOBIAN_BATCH = 16
"""Of the Jacobian side at the larger sizes: at 256 its matrices would need gigabytes."""
WITHIN = 1e-6


def draw(batch: int, m: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = np.random.default_rng(seed)
    A, b = generator.standard_normal((batch, m, n)), generator.standard_normal((batch, m))
    # With fewer rows than columns a short b can be met exactly by a continuum of points; a long one cannot.
    return torch.from_numpy(A), torch.from_numpy(b if m >= n else 10 * b)


def objective(A: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return 0.5 * (torch.einsum("bmn,bn->bm", A, u) - b).square().sum(-1)


def take_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - started)
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


def by_slsqp(A: Tensor, b: Tensor, start: Tensor) -> Tensor:
    found = []
    for matrix, right, first in zip(A.numpy(), b.numpy(), start.numpy(), strict=True):
        answer = scipy.optimize.minimize(
            lambda u, A=matrix, b=right: 0.5 * np.sum((A @ u - b) ** 2),
            first,
            jac=lambda u, A=matrix, b=right: A.T @ (A @ u - b),
            constraints={"type": "eq", "fun": lambda u: u @ u - 1.0, "jac": lambda u: 2.0 * u},
            method="SLSQP",
            options={"maxiter": 100, "ftol": 1e-12},
        )
        found.append(answer.x / np.linalg.norm(answer.x))
    return torch.from_numpy(np.stack(found))


def shares(m: int, n: int, count: int) -> dict[str, tuple[float, float, float]]:
    """For each solver: the share of global minima, the share not worse than SciPy's, and its seconds."""
    A, b = draw(count, m, n, seed=3)
    start = starting_points(A, b)
    descent = {"solver": "descent"}
    nodes = {
        "secular": SphereLeastSquares(),
        "RM, BLS, exact step": SphereLeastSquares(**descent),
        "RM, BLS, step 1": SphereLeastSquares(**descent, step=1.0),
        "RM, exact step": SphereLeastSquares(**descent, backtracking=False),
        "PGD, BLS, exact step": SphereLeastSquares(**descent, direction="gradient"),
        "TWD, BLS, exact step": SphereLeastSquares(**descent, direction="decayed"),
        "DW, BLS, exact step": SphereLeastSquares(**descent, direction="cosine"),
    }
    points, seconds = {}, {}
    calls = {name: lambda node=node: node.solve((A, b), None).y for name, node in nodes.items()}
    for name, call in {**calls, "SciPy SLSQP": lambda: by_slsqp(A, b, start)}.items():
        started = time.perf_counter()
        points[name] = call()
        seconds[name] = time.perf_counter() - started
    values = {name: objective(A, b, u) for name, u in points.items()}
    best = torch.stack(list(values.values())).min(0).values
    theirs = values["SciPy SLSQP"]

    def share(value: Tensor, reference: Tensor) -> float:
        return float((value <= reference + WITHIN * (1.0 + reference)).double().mean())

    return {name: (share(value, best), share(value, theirs), seconds[name]) for name, value in values.items()}


def forward(settings: Settings) -> Iterator[Target]:
    count = 100 if settings.quick else 1000
    for m, n, paper in ((2, 2, 0.938), (64, 32, 0.994)):
        found = shares(m, n, count)
        for name, (best, not_worse, seconds) in found.items():
            if name == "SciPy SLSQP":
                continue
            note = (
                f"not worse than SciPy's SLSQP in {not_worse:.1%} (paper's best: {paper:.1%}); {seconds:.3f} s against "
                f"{found['SciPy SLSQP'][2]:.3f} s, whose points are global minima in {found['SciPy SLSQP'][0]:.1%}"
            )
            wanted = {"secular": 1.0, "RM, BLS, exact step": 0.995}.get(name)
            title = f"sphere, {count} problems {m}×{n}, {name}: share of global minima"
            yield Target(title, wanted or 0.0, None, best, note=note if wanted else f"no target; {note}")


def unrolled(data: Sequence[Tensor], iterations: int = 100) -> tuple[Tensor, None]:
    """Tangential descent with exact steps, differentiated through its iterations."""
    A, b = data
    u = starting_points(A.detach(), b.detach())
    for _ in range(iterations):
        d = (A.mT @ (b[..., None] - A @ u[..., None]))[..., 0]
        along = (d * u).sum(-1, keepdim=True)
        p = d - along * u
        curvature = (A @ p[..., None])[..., 0].square().sum(-1, keepdim=True) + along * p.square().sum(-1, keepdim=True)
        u = u + 0.9 * p.square().sum(-1, keepdim=True) / curvature.clamp_min(1e-12) * p
        u = u / u.norm(dim=-1, keepdim=True)
    return u, None


def sphere_case(batch: int, m: int, n: int) -> Case:
    weight = torch.randn(batch, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        A, b = (part.detach()[list(elements)] for part in data)
        return objective(A, b, points).numpy(), float((points.norm(dim=-1) - 1.0).abs().max())

    def exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
        """μ by bisection of the secular equation, on the singular values of A."""
        found = []
        for matrix, right in zip(*(part.detach()[list(elements)].numpy() for part in data), strict=True):
            _, singular, vectors = np.linalg.svd(matrix)
            c, squares = vectors @ (matrix.T @ right), np.square(singular)
            low, high = squares[-1] - 2 * np.linalg.norm(c) - 1.0, squares[-1]
            for _ in range(200):
                middle = 0.5 * (low + high)
                shorter = np.sum(np.square(c / (squares - middle))) < 1.0
                low, high = (middle, high) if shorter else (low, middle)
            u = vectors.T @ (c / (squares - low))
            found.append(u / np.linalg.norm(u))
        return torch.from_numpy(np.stack(found))

    title = f"least squares on the sphere, A {m}×{n}"
    return Case(
        "nodes_sphere",
        f"sphere{m}x{n}",
        title,
        batch,
        lambda seed: draw(batch, m, n, seed),
        lambda y: (weight * y).sum(),
        judge,
        exactly,
        True,
        n,
    )


def layers(settings: Settings) -> Iterator[Result | Curve]:
    curves = {
        kind: Curve(f"nodes_sphere_{kind}", f"least squares on the sphere: {kind}", "columns", unit)
        for kind, unit in (("backward", "seconds"), ("memory", "MiB"))
    }
    for m, n in ((16, 8),) if settings.quick else ((16, 8), (64, 32), (128, 64)):
        batch = 8 if settings.quick else 64
        sides = [
            Side("lpgd", "secular, structured", "exact", lambda data: (NodeLayer(SphereLeastSquares())(*data), None)),
            Side(
                "lpgd",
                "secular, generic implicit",
                "exact",
                lambda data: (NodeLayer(SphereLeastSquares(), ImplicitKKT())(*data), None),
            ),
            Side("torch", "descent, unrolled", "exact", unrolled),
        ]
        result = compare(sphere_case(batch, m, n), sides, settings)
        yield result
        for entry in result.entries:
            if entry.timing.count:
                curves["backward"].add(entry.label, n, statistics.median(entry.timing.backward))
                curves["memory"].add(entry.label, n, entry.memory)
    yield from curves.values()


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    yield from backward(settings)
    yield from forward(settings)
    yield from layers(settings)
