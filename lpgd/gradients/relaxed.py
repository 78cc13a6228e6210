"""Derivatives of solutions of which some are those of closest feasible problems: by the same methods, for both."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lpgd.arrays import as_index, floats, integers, rows_where
from lpgd.gradients.base import GradientInfo, GradientMethod
from lpgd.problems.base import Data, maximum_norm
from lpgd.problems.conic.relaxed import RelaxedPoint, RelaxedSolution, relaxed_structure
from lpgd.problems.conic.structure import ConicData, ConicPoint
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver, ConicSolver
from lpgd.solvers.relaxed import solver_of_relaxed
from lpgd.status import warn

__all__ = ["jvp", "vjp"]


def vjp(
    method: GradientMethod, solution: AnySolution, cotangent: Any, solver: AnySolver, executor: Executor | None
) -> tuple[Data, GradientInfo]:
    """:meth:`GradientMethod.vjp`, of a solution with relaxed elements, too."""
    if not isinstance(solution, RelaxedSolution):
        return method.vjp(solution, cotangent, solver, executor)
    relaxed, usable = solution.relaxed, solution.own.usable[:, None]
    own = ConicPoint(*(torch.where(usable, part, 0.0) for part in cotangent[:3]))
    gradient, info = method.vjp(solution.own, own, solver, executor)
    if solution.found is None or not relaxed:
        return gradient, info
    structure, rows = relaxed_structure(solution.problem.structure), as_index(relaxed, solution.x.device)
    part, weights = cast(RelaxedPoint, cotangent).select(rows), solution.weights
    _warn_of_multipliers(relaxed, part)
    inner = solver_of_relaxed(cast(ConicSolver, solver), structure)
    # A tilt of the objective by τ g is one of w times it by w τ g.
    tilt = structure.tilt(part).scaled(weights)
    problem = solution.problem.select(rows)
    total = ConicData(*gradient)
    for own_method, places in _by_weight(method, weights):
        own, tilts, at = solution.found.select(places), tilt.select(places), weights[places]
        found, found_info = own_method.vjp(own, tilts, inner, executor)
        scaled = ConicData(*(datum / at[:, None] for datum in cast(ConicData, found)))
        chosen = problem.select(places)
        more = solution.problem.scatter(rows[places], structure.gradient(chosen, scaled, at))
        total = ConicData(*(one + other for one, other in zip(total, more, strict=True)))
        info = _together(info, found_info, [relaxed[place] for place in integers(places)])
    return total, info


def _by_weight(method: GradientMethod, weights: Tensor) -> list[tuple[GradientMethod, Tensor]]:
    """The method, with ρ for w times the objective where it has one, and the elements with this w."""
    rho = getattr(method, "rho", 0.0)
    if not rho:
        return [(method, torch.arange(weights.shape[0], device=weights.device))]
    return [
        (replace(cast(Any, method), rho=rho * weight), rows_where(weights == weight))
        for weight in sorted(set(floats(weights)))
    ]


def jvp(
    method: GradientMethod, solution: AnySolution, tangent: Any, solver: AnySolver, executor: Executor | None
) -> tuple[Any, GradientInfo]:
    """:meth:`GradientMethod.jvp`, of a solution with relaxed elements, too."""
    if not isinstance(solution, RelaxedSolution):
        return method.jvp(solution, tangent, solver, executor)
    change, info = method.jvp(solution.own, tangent, solver, executor)
    own_change = cast(ConicPoint, change)
    whole = RelaxedPoint(own_change.x, own_change.y, own_change.z, torch.zeros_like(solution.e))
    relaxed = solution.relaxed
    if solution.found is None or not relaxed:
        return whole, info
    structure, rows = relaxed_structure(solution.problem.structure), as_index(relaxed, solution.x.device)
    problem = solution.problem.select(rows)
    own = solution.problem.with_data(tangent).select(rows).data
    moved = structure.data(problem, own, solution.weights, constants=0.0)
    inner = solver_of_relaxed(cast(ConicSolver, solver), structure)
    n = structure.base.n
    for own_method, places in _by_weight(method, solution.weights):
        part = solution.found.problem.with_data(moved).select(places).data
        found, found_info = own_method.jvp(solution.found.select(places), part, inner, executor)
        at = rows[places]
        for tangent, value in ((whole.x, found.x[:, :n]), (whole.e, found.x[:, n:]), (whole.y, 0.0), (whole.z, 0.0)):
            tangent[at] = value
        info = _together(info, found_info, [relaxed[place] for place in integers(places)])
    return whole, info


def _warn_of_multipliers(elements: list[int], cotangent: RelaxedPoint) -> None:
    size = torch.maximum(maximum_norm(cotangent.y), maximum_norm(cotangent.z))
    asked = [element for element, part in zip(elements, floats(size), strict=True) if part]
    if asked:
        warn(
            f"the multipliers of relaxed elements {asked[:10]} are not unique, and have no gradient: what the loss "
            "makes of them is left out. Use the primal solution and info.violation."
        )


def _together(info: GradientInfo, other: GradientInfo, elements: list[int]) -> GradientInfo:
    """The record of all elements, of which some have one of their own."""
    for place, element in enumerate(elements):
        info.used[element] = other.used[place]
    info.fallbacks = sorted([*info.fallbacks, *(elements[place] for place in other.fallbacks)])
    for name in ("tau", "unit", "moved", "crossed", "jumped", "newton", "descent", "doubt", "iterations"):
        whole, part = getattr(info, name), getattr(other, name)
        if whole is not None and part is not None:
            whole[elements] = part
    info.notices |= other.notices
    return info
