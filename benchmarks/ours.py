"""Our layers behind the harness's call, and where their time goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
from torch import Tensor

import lpgd
from lpgd.execution.tasks import worker_count
from lpgd.solvers import SOLVERS, ElementwiseSolver

from .harness import Side

__all__ = ["describe", "layer_side", "our_cvxpy_side", "solver_names"]


def solver_names(wanted: Sequence[str], structure: Any = None) -> list[str]:
    """Those of the wanted solvers that are installed and take the problem."""
    usable = lpgd.available(structure)
    return [name for name in wanted if name in usable]


def describe(output: Any) -> dict[str, Any]:
    """Set-up and solve seconds of the forward pass (sums over elements, whatever the threads), and iterations."""
    solution, gradients = output.info.solution, output.info.gradients
    setup, solve = float(solution.setup_seconds.sum()), float(solution.solve_seconds.sum())
    details: dict[str, Any] = {
        "setup_seconds": setup,
        "solve_seconds": solve,
        "iterations": float(np.mean(solution.iterations)),
        "residual": float(solution.residuals.worst.max()),
    }
    if gradients:
        info = gradients[-1]
        details["used"] = info.counts
        details["backward_iterations"] = None if info.iterations is None else float(np.mean(info.iterations))
        details["backward_tolerance"] = info.tolerance
    return details


def _wall(solver: Any, batch: int) -> float:
    """How many solves run side by side: seconds summed over elements divided by it are seconds on the wall."""
    return min(worker_count(None), batch) if isinstance(solver, ElementwiseSolver) else 1


def layer_side(
    layer: Any,
    gradient: str,
    arguments: Callable[[Sequence[Tensor]], tuple[tuple[Tensor, ...], dict[str, Any]]],
    chosen: bool,
    slow: bool = False,
) -> Side:
    """A layer of ours; ``chosen`` says whether its solver was named or is the default."""
    solver = getattr(layer, "solver", None)

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        positional, named = arguments(data)
        output = layer(*positional, **named)
        return output[0], output

    def split(output: Any) -> dict[str, Any]:
        details = describe(output)
        used = getattr(layer, "solver", None)
        inside = details["setup_seconds"] + details["solve_seconds"]
        details["solver_wall_seconds"] = inside / _wall(used, output.info.solution.batch_size)
        return details

    name = getattr(solver, "name", None)
    mode = f"{name}" if chosen else f"default ({name})" if name else "default"
    kind = "lpgd" if gradient == "LPGD" else "exact"
    return Side("lpgd", f"{mode} {gradient}", kind, call, split, slow=slow)


def our_cvxpy_side(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variable: cp.Variable,
    solver: str | None,
    kind: str,
    options: dict[str, float] | None = None,
    tau: float = 0.1,
    rho: float = 0.0,
) -> Side:
    """Our CvxpyLayer; with a solver, its tolerances are ``options``."""
    gradient = lpgd.LPGD(tau=tau, rho=rho) if kind == "lpgd" else lpgd.ImplicitKKT()
    layer = lpgd.CvxpyLayer(
        problem, parameters, [variable], solver=solver, gradient=gradient, solver_args=dict(options or {})
    )
    return layer_side(
        layer, "LPGD" if kind == "lpgd" else "exact", lambda data: (tuple(data), {}), chosen=solver is not None
    )


def names_of_all_solvers() -> list[str]:
    return [solver.name for solver in SOLVERS]
