"""CvxpyLayer with and without elimination: forward + backward, seconds of all cores together, sides in turn.

``python -m benchmarks.elimination`` prints a table; with the names of cases, of these alone.  The last column has every
candidate substituted, whatever the rule says: it shows both sides of the rule.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import lpgd
from lpgd.layers.cvxpy.elimination import candidates

from .problems import PROGRAMS

__all__ = ["main"]

REPEATS = 6
Build = tuple[cp.Problem, Sequence[cp.Parameter], cp.Variable, Callable[[int], Sequence[Tensor]]]


def _normal(*shapes: tuple[int, ...]) -> Callable[[int], list[Tensor]]:
    def draw(seed: int) -> list[Tensor]:
        generator = np.random.default_rng(seed)
        return [torch.from_numpy(generator.standard_normal(shape)) for shape in shapes]

    return draw


def _dense_qp(n: int, batch: int) -> Build:
    x, R, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    A, b, G, h = cp.Parameter((n // 5, n)), cp.Parameter(n // 5), cp.Parameter((n, n)), cp.Parameter(n)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(R @ x) + q @ x), [A @ x == b, G @ x <= h])

    def draw(seed: int) -> list[Tensor]:
        generator = np.random.default_rng(seed)
        root = generator.standard_normal((batch, n, n)) / np.sqrt(n) + 0.3 * np.eye(n)
        rows = [generator.standard_normal((batch, r, n)) / np.sqrt(n) for r in (n // 5, n)]
        inside = generator.standard_normal((batch, n, 1))
        right = [(rows[0] @ inside)[..., 0], (rows[1] @ inside)[..., 0] + generator.uniform(0.05, 1, (batch, n))]
        values = (root, generator.standard_normal((batch, n)), rows[0], right[0], rows[1], right[1])
        return [torch.from_numpy(value) for value in values]

    return problem, (R, q, A, b, G, h), x, draw


def _squares(k: int, n: int, batch: int, ridge: float) -> Build:
    x, F, g = cp.Variable(n), cp.Parameter((k, n)), cp.Parameter(k)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) + ridge * cp.sum_squares(x)), [x >= -1, x <= 1])
    return problem, (F, g), x, _normal((batch, k, n), (batch, k))


def _lasso(k: int, n: int, batch: int) -> Build:
    x, F, g = cp.Variable(n), cp.Parameter((k, n)), cp.Parameter(k)
    return (
        cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g) + 2 * cp.norm1(x))),
        (F, g),
        x,
        _normal((batch, k, n), (batch, k)),
    )


def _huber(k: int, n: int, batch: int) -> Build:
    x, F, g = cp.Variable(n), cp.Parameter((k, n)), cp.Parameter(k)
    objective = cp.sum(cp.huber(F @ x - 3 * g)) + 0.1 * cp.sum_squares(x)
    return cp.Problem(cp.Minimize(objective)), (F, g), x, _normal((batch, k, n), (batch, k))


def _risk(factors: int, n: int, batch: int) -> Build:
    x, F, specific, mean = cp.Variable(n), cp.Parameter((factors, n)), cp.Parameter(n), cp.Parameter(n)
    objective = cp.sum_squares(F @ x) + cp.sum_squares(cp.multiply(specific, x)) - mean @ x
    problem = cp.Problem(cp.Minimize(objective), [cp.sum(x) == 1, x >= 0])
    return problem, (F, specific, mean), x, _normal((batch, factors, n), (batch, n), (batch, n))


def _portfolio(n: int, batch: int) -> Build:
    x, F, mean = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x) - mean @ x), [cp.sum(x) == 1, x >= 0])

    def draw(seed: int) -> list[Tensor]:
        generator = np.random.default_rng(seed)
        returns = generator.standard_normal((batch, 2 * n, n)) / np.sqrt(2 * n)
        roots = np.linalg.cholesky(returns.swapaxes(1, 2) @ returns).swapaxes(1, 2)
        return [torch.from_numpy(0.3 * roots), torch.from_numpy(0.05 * generator.standard_normal((batch, n)))]

    return problem, (F, mean), x, draw


def _trend(n: int, batch: int) -> Build:
    x, y = cp.Variable(n), cp.Parameter(n)
    D = sp.diags([-np.ones(n - 1), np.ones(n - 1)], [0, 1], shape=(n - 1, n)).tocsc()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + 3 * cp.sum_squares(D @ x)), [x >= -0.5])
    return problem, (y,), x, _normal((batch, n))


def _sparse(k: int, n: int, entries: int, batch: int) -> Build:
    x, g, c = cp.Variable(n), cp.Parameter(k), cp.Parameter(n)
    S = sp.random(k, n, entries / n, random_state=3, format="csc")
    objective = cp.sum_squares(S @ x - g) + 0.1 * cp.sum_squares(x) + c @ x
    return cp.Problem(cp.Minimize(objective), [x >= -0.1]), (g, c), x, _normal((batch, k), (batch, n))


def _program(name: str, batch: int) -> Build:
    instance = PROGRAMS[name].build(batch)
    return instance.problem, instance.parameters, instance.variable, instance.draw


CASES: dict[str, Callable[[], Build]] = {
    "dense QP n 50, batch 64": lambda: _dense_qp(50, 64),
    **{f"{name}, batch 32": lambda name=name: _program(name, 32) for name in ("nnls", "logistic", "portfolio", "sdp")},
    **{f"ridge {k}x50, batch 32": lambda k=k: _squares(k, 50, 32, 0.1) for k in (5, 15, 25, 40, 50, 60, 100)},
    **{f"in a box {k}x50, batch 32": lambda k=k: _squares(k, 50, 32, 0.0) for k in (15, 30, 40, 50, 60)},
    "lasso 30x20, batch 16": lambda: _lasso(30, 20, 16),
    "lasso 100x50, batch 8": lambda: _lasso(100, 50, 8),
    "huber 30x10, batch 16": lambda: _huber(30, 10, 16),
    "huber 60x20, batch 16": lambda: _huber(60, 20, 16),
    "risk, 10 factors of 50, batch 16": lambda: _risk(10, 50, 16),
    "risk, 5 factors of 100, batch 16": lambda: _risk(5, 100, 16),
    **{f"covariance of {n}, batch 8": lambda n=n: _portfolio(n, 8) for n in (30, 100, 250)},
    "trend n 100, batch 16": lambda: _trend(100, 16),
    "trend n 400, batch 4": lambda: _trend(400, 4),
    "trend n 1000, batch 4": lambda: _trend(1000, 4),
    **{
        f"sparse {k}x{n}, {entries} a row, batch 2": lambda k=k, n=n, entries=entries: _sparse(k, n, entries, 2)
        for k, n, entries in ((300, 200, 3), (2000, 200, 5), (300, 300, 10), (1500, 500, 12))
    },
}


def _times(build: Build, gradient: lpgd.GradientMethod) -> tuple[list[lpgd.CvxpyLayer], list[float]]:
    """The layers without, with, and with all of it, and the least seconds of each."""
    problem, parameters, variable, draw = build
    what: tuple[Any, ...] = (problem, parameters, [variable])
    layers = [lpgd.CvxpyLayer(*what, gradient=gradient, eliminate=eliminate) for eliminate in (False, True)]
    with mock.patch("lpgd.layers.cvxpy.layer.find_pivots", candidates):
        layers.append(lpgd.CvxpyLayer(*what, gradient=gradient))
    least = [np.inf] * len(layers)
    for repeat in range(REPEATS + 1):
        for number, layer in enumerate(layers):
            # Values of its own for each: what is prepared for the same matrices is shared by all layers.
            leaves = [value.requires_grad_() for value in draw(repeat * len(layers) + number)]
            start = time.process_time()
            (output,) = layer(*leaves)
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
            (weights * output.flatten()).sum().backward()
            if repeat:
                least[number] = min(least[number], time.process_time() - start)
    return layers, least


def main(names: Sequence[str] = ()) -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"{'case':34} {'variables':>12} {'solver':>20}   {'exact: ms, times':>24}   {'LPGD: ms, times':>24}")
    for name, build in CASES.items():
        if names and not any(name.startswith(wanted) for wanted in names):
            continue
        layers, exact = _times(build(), lpgd.ImplicitKKT())
        _, perturbed = _times(build(), lpgd.LPGD(tau=0.1))
        sizes = [layer.structure.n for layer in layers]
        solvers = " -> ".join(layer.solver.name for layer in layers[:2] if layer.solver is not None)
        columns = "   ".join(
            f"{1e3 * times[0]:8.1f} -> {1e3 * times[1]:6.1f} {times[0] / times[1]:5.2f} ({times[0] / times[2]:.2f})"
            for times in (exact, perturbed)
        )
        print(f"{name:34} {sizes[0]:4} -> {sizes[1]:4} {solvers:>20}   {columns}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
