"""One element of small programs, with new data in each call: ``python -m benchmarks.one_element``.

What a researcher tries first, and what a controller calls at each step.  Batches are in the other comparisons; of one
small element most of the time is Python's on all sides.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

import lpgd

from .peers import installed

__all__ = ["main", "programs"]

Draw = Callable[[Generator], list[NDArray[np.float64]]]
Small = tuple[cp.Problem, list[cp.Parameter], cp.Variable, Draw]


def programs() -> Iterator[tuple[str, Small]]:
    """A small program of each class, with what draws its parameters."""
    n, m = 10, 5
    x, root, q, h = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n), cp.Parameter(n)
    rows, right = cp.Parameter((m, n)), cp.Parameter(m)
    objective = cp.Minimize(cp.sum_squares(root @ x) + q @ x)
    yield (
        "quadratic program, n 10",
        (
            cp.Problem(objective, [x <= h, cp.sum(x) == 0.5]),
            [root, q, h],
            x,
            lambda g: [g.standard_normal((n, n)), g.standard_normal(n), g.uniform(0.2, 1.0, n)],
        ),
    )
    simplex = cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [x >= 0, cp.sum(x) == 1])
    yield "projection onto the simplex, n 10", (simplex, [q], x, lambda g: [g.standard_normal(n)])
    linear = cp.Problem(cp.Minimize(q @ x), [rows @ x <= right, x >= -1, x <= 1])
    yield (
        "linear program, n 10",
        (
            linear,
            [q, rows, right],
            x,
            lambda g: [g.standard_normal(n), g.standard_normal((m, n)), g.uniform(0.2, 1.0, m)],
        ),
    )
    w, A, c = cp.Variable(m), cp.Parameter((m, m)), cp.Parameter(m)
    cone = cp.Problem(cp.Minimize(c @ w), [cp.norm(A @ w) <= 1 + 0.1 * w[0]])
    yield (
        "second-order cone, n 5",
        (cone, [A, c], w, lambda g: [g.standard_normal((m, m)) + 8.0 * np.eye(m), g.standard_normal(m)]),
    )
    samples = cp.Parameter((n, m))
    logistic = cp.Problem(cp.Minimize(cp.sum(cp.logistic(samples @ w)) + cp.sum_squares(w)))
    yield "logistic regression, 10 samples, n 5", (logistic, [samples], w, lambda g: [g.standard_normal((n, m))])
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3))
    semidefinite = cp.Problem(cp.Minimize(cp.trace(C @ X)), [X >> 0, cp.trace(X) == 1])

    def symmetric(g: Generator) -> list[NDArray[np.float64]]:
        root = g.standard_normal((3, 3))
        return [root + root.T]

    yield "semidefinite program 3×3", (semidefinite, [C], X, symmetric)


def sides(problem: cp.Problem, parameters: Sequence[cp.Parameter], variable: cp.Variable) -> dict[str, Any]:
    """The layers, by name; cvxpylayers' only where it is installed."""
    found: dict[str, Any] = {"lpgd": lpgd.CvxpyLayer(problem, parameters, [variable])}
    if installed("cvxpylayers"):
        from cvxpylayers.torch import CvxpyLayer

        found["cvxpylayers, diffcp"] = CvxpyLayer(problem, parameters, [variable])
        if installed("moreau"):
            found["cvxpylayers, Moreau"] = CvxpyLayer(problem, parameters, [variable], solver="MOREAU")
    return found


def measure(small: Small, calls: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of both passes, medians, and the largest error of x against ours."""
    problem, parameters, variable, draw = small
    layers, generator = sides(problem, parameters, variable), np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in layers}
    errors = dict.fromkeys(layers, 0.0)
    for number in range(calls + 10):
        data, first = draw(generator), None
        for name, layer in layers.items():
            tensors = [torch.tensor(datum, requires_grad=True) for datum in data]
            started = time.perf_counter()
            (x,) = layer(*tensors)
            x.square().sum().backward()
            seconds = time.perf_counter() - started
            first = x.detach() if first is None else first
            errors[name] = max(errors[name], float((x.detach() - first).abs().max()))
            if number >= 10:
                times[name].append(seconds)
    return {name: (1e3 * statistics.median(times[name]), errors[name]) for name in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=200)
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    print("| program | side | both passes, ms | / lpgd | largest difference of x |")
    print("| --- | --- | --- | --- | --- |")
    for name, small in programs():
        found = measure(small, calls)
        ours = found["lpgd"][0]
        for side, (milliseconds, error) in found.items():
            print(f"| {name} | {side} | {milliseconds:.2f} | {milliseconds / ours:.2f} | {error:.0e} |")


if __name__ == "__main__":
    main()
