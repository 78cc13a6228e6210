"""Dense quadratic programs, matrices for each element: n variables, n inequalities, n/5 equalities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lpgd
from lpgd.execution.threads import bounded_blas

from .exact import solve_qps_exactly
from .harness import Case, Settings, Side, compare
from .ours import layer_side, solver_names
from .peers import dense_qp_peers
from .results import Curve, Result, Target, ratio_target

__all__ = ["dense_qp_case", "our_qp_sides", "run"]

SIZES = {10: 64, 20: 64, 50: 64, 100: 64, 200: 16, 500: 4}
QUICK_SIZES = {10: 8, 20: 4}
SOLVERS = ("INTERIOR", "DAQP", "MOREAU", "PIQP", "PROXQP", "OSQP", "CLARABEL")
QP_PEERS = ("qpth", "ProxSuite")


def draw_qps(n: int, batch: int, seed: int) -> tuple[Tensor, ...]:
    """P, q, A, b, G, h: about a third of the inequalities are active, and a point satisfies all of them strictly."""
    generator = np.random.default_rng(seed)
    equalities = max(n // 5, 1)
    root = generator.standard_normal((batch, n, n))
    with bounded_blas():  # OpenBLAS's threads keep the other cores busy for some 25 ms after their last work
        P = root @ root.swapaxes(-1, -2) / n + 0.1 * np.eye(n)
        q = generator.standard_normal((batch, n))
        A, G = (generator.standard_normal((batch, rows, n)) / np.sqrt(n) for rows in (equalities, n))
        inside = generator.standard_normal((batch, n, 1))
        h = (G @ inside)[..., 0] + generator.uniform(0.05, 1.0, (batch, n))
        b = (A @ inside)[..., 0]
    return tuple(torch.from_numpy(value) for value in (P, q, A, b, G, h))


def judge_qps(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[NDArray[np.float64], float]:
    """Objectives, and the largest violation of a constraint."""
    P, q, A, b, G, h = (value[list(elements)] for value in data)
    x = points.unsqueeze(-1).double()
    objective = (0.5 * (x.mT @ P @ x) + q.unsqueeze(1) @ x).ravel()
    violation = max(float((A @ x - b.unsqueeze(-1)).abs().max()), float((G @ x - h.unsqueeze(-1)).max().clamp(min=0)))
    return objective.numpy(), violation


def dense_qp_case(n: int, batch: int, comparison: str = "dense_qp") -> Case:
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, n)))
    return Case(
        comparison,
        f"qp{n}",
        f"dense QP, n {n}",
        batch,
        lambda seed: draw_qps(n, batch, seed),
        lambda x: (weights * x).sum(),
        judge_qps,
        solve_qps_exactly,
        unknowns=n,
        step=1e-6,
        extra={"symmetric": [True, False, False, False, False, False]},
    )


def our_qp_sides(
    named: Sequence[str] = SOLVERS, lpgd_solvers: Sequence[str] = ("INTERIOR", "DAQP", "MOREAU")
) -> list[Side]:
    """The default, and each of the named solvers that is installed; LPGD (Domke's small step) with some of them."""

    def arguments(data: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        P, q, A, b, G, h = data
        return (P, q), {"A": A, "b": b, "G": G, "h": h}

    sides = [layer_side(lpgd.QPLayer(), "exact", arguments, chosen=False)]
    sides += [layer_side(lpgd.QPLayer(name), "exact", arguments, chosen=True) for name in solver_names(named)]
    sides += [
        layer_side(lpgd.QPLayer(name, gradient=lpgd.Domke()), "LPGD", arguments, chosen=True)
        for name in solver_names(lpgd_solvers)
    ]
    return sides


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    curve = Curve("dense_qp_n", "dense QP: forward + backward for each element", "n", "seconds an element")
    memory = Curve("dense_qp_memory", "dense QP: growth of memory for each element", "n", "MiB an element")
    for n, batch in (QUICK_SIZES if settings.quick else SIZES).items():
        case = dense_qp_case(n, batch)
        named = SOLVERS if n <= 100 else ("INTERIOR", "DAQP", "MOREAU", "PIQP", "PROXQP")
        result = compare(case, [*our_qp_sides(named), *dense_qp_peers(n, max(n // 5, 1), n, batch)], settings)
        for entry in result.entries:
            if entry.usable and entry.kind == "exact":
                curve.add(entry.label, n, entry.timing.total / batch)
                memory.add(entry.label, n, entry.memory / batch if entry.memory else None)
        yield result
        if n in (10, 50, 100):
            bound = (3.0, 5.0) if n == 100 else (4.0, 8.0)
            title = f"dense QP n {n}, batch {batch}: × the faster of qpth and QPLayer"
            yield ratio_target(result, title, *bound, QP_PEERS, "exact", "exact")
            title = f"dense QP n {n}, batch {batch}: × moreau.torch"
            yield ratio_target(result, title, 1.0, 1.5, "moreau.torch", "exact", "exact")
        if n == 50:
            yield ratio_target(result, f"dense QP n 50, batch {batch}: × cvxpylayers", 20.0, 40.0, "cvxpylayers")
    yield curve
    yield memory
