"""Small problems of the Maros-Mészáros set, with a batch of costs about the published one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lpgd

from .exact import solve_qp_exactly
from .harness import Case, Settings, Side, compare
from .ours import layer_side, solver_names
from .peers import dqp_side, proxsuite_side, qpth_side
from .results import Curve, Result, Target, fastest

__all__ = ["run"]

Problem = dict[str, NDArray[np.float64]]
SOLVERS = ("DAQP", "INTERIOR", "MOREAU", "PIQP", "PROXQP", "CLARABEL")
PEERS = ("qpth", "ProxSuite", "dQP")
PERTURBATION = 1e-2
OPTIMUM_ERROR = 1e-6


def read_problems(settings: Settings) -> dict[str, Problem]:
    """The problems by name; none if they have not been extracted."""
    if not settings.maros_meszaros.exists():
        return {}
    problems: dict[str, Problem] = {}
    with np.load(settings.maros_meszaros) as arrays:
        for key in arrays.files:
            name, part = key.split("/")
            problems.setdefault(name, {})[part] = arrays[key]
    return problems


def with_rows(problem: Problem) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """G and h with the bounds as rows, for those who have no bounds."""
    eye, lower, upper = np.eye(len(problem["q"])), problem["lower"], problem["upper"]
    above, below = np.isfinite(upper), np.isfinite(lower)
    return (
        np.concatenate([problem["G"], eye[above], -eye[below]]),
        np.concatenate([problem["h"], upper[above], -lower[below]]),
    )


def problem_case(name: str, problem: Problem, batch: int) -> Case:
    P, A, b = problem["P"], problem["A"], problem["b"]
    G, h = with_rows(problem)
    n = len(problem["q"])
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, n)))

    def solve(q: NDArray[np.float64]) -> NDArray[np.float64]:
        return solve_qp_exactly(P, q, A, b, G, h)

    def draw(seed: int) -> tuple[Tensor, ...]:
        noise = np.random.default_rng(seed).standard_normal((batch, n))
        return (torch.from_numpy(problem["q"] + PERTURBATION * (1 + np.abs(problem["q"])) * noise),)

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[NDArray[np.float64], float]:
        q, x = data[0].detach().numpy()[list(elements)], points.numpy()
        violation = max(float(np.abs(x @ A.T - b).max(initial=0.0)), float((x @ G.T - h).max(initial=0.0)))
        return 0.5 * np.einsum("bi,ij,bj->b", x, P, x) + (q * x).sum(1), violation

    def exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.stack([solve(data[0].detach().numpy()[element]) for element in elements]))

    def loss(x: Tensor) -> Tensor:
        return (weights * x).sum()

    published_cost = torch.from_numpy(problem["q"][None])
    optimum = float(judge([published_cost], exactly([published_cost], [0]), [0])[0][0])
    published = float(problem["optimum"])
    if not abs(optimum - published) <= OPTIMUM_ERROR * (1 + abs(published)):
        raise ArithmeticError(f"{name}: the optimum is {optimum}, published is {published}")
    return Case("maros_meszaros", name, f"{name}, n {n}", batch, draw, loss, judge, exactly, unknowns=n, step=1e-6)


def problem_sides(problem: Problem) -> list[Side]:
    keys = ("P", "A", "b", "G", "h", "lower", "upper")
    P, A, b, G, h, lower, upper = (torch.from_numpy(problem[key]) for key in keys)
    constraints: dict[str, Tensor] = {"lb": lower, "ub": upper}
    constraints |= {"A": A, "b": b} if len(b) else {}
    constraints |= {"G": G, "h": h} if len(h) else {}

    def arguments(data: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return (P, data[0]), constraints

    sides = [layer_side(lpgd.QPLayer(), "exact", arguments, chosen=False)]
    sides += [layer_side(lpgd.QPLayer(name), "exact", arguments, chosen=True) for name in solver_names(SOLVERS)]
    rows, right = (torch.from_numpy(part) for part in with_rows(problem))
    if not len(right):
        return sides
    for peer in (qpth_side(), proxsuite_side(False), dqp_side("daqp")):
        inner = peer.call

        def call(data: Sequence[Tensor], inner: Any = inner) -> tuple[Tensor, Any]:
            (q,) = data
            fixed = [value.expand(len(q), *value.shape).contiguous() for value in (P, A, b, rows, right)]
            return inner([fixed[0], q, *fixed[1:]])

        sides.append(peer if inner is None else peer._replace(call=call))
    return sides


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    problems = read_problems(settings)
    title = "small Maros-Mészáros problems: × the fastest peer, geometric mean"
    if not problems:
        note = f"no file {settings.maros_meszaros}: make bench extracts the problems"
        yield Target(title, 1.0, None, None, note=note)
        return
    ratios: dict[str, float] = {}
    for name in list(problems)[:3] if settings.quick else problems:
        result = compare(problem_case(name, problems[name], 16), problem_sides(problems[name]), settings)
        yield result
        ours, peer = fastest(result.entries, "lpgd"), fastest(result.entries, PEERS)
        if ours is not None and peer is not None:
            ratios[name] = peer.timing.total / ours.timing.total
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios)) if ratios else None
    yield Target(title, 1.0, None, mean, note=", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
