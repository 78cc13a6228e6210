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
from lpgd.problems.needed_gradients import needing_gradients_of
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
    relaxed, usable = solution.relaxed, solution.unrelaxed.usable[:, None]
    unrelaxed_cotangent = ConicPoint(*(torch.where(usable, values, 0.0) for values in cotangent[:3]))
    gradient, info = method.vjp(solution.unrelaxed, unrelaxed_cotangent, solver, executor)
    if solution.found is None or not relaxed:
        return gradient, info
    structure, elements = relaxed_structure(solution.problem.structure), as_index(relaxed, solution.x.device)
    relaxed_cotangent, weights = cast(RelaxedPoint, cotangent).select(elements), solution.weights
    _warn_of_multipliers(relaxed, relaxed_cotangent)
    inner = solver_of_relaxed(cast(ConicSolver, solver), structure)
    # A tilt of the objective by τ g is one of w times it by w τ g.
    tilt = structure.tilt(relaxed_cotangent).scaled(weights)
    problem = solution.problem.select(elements)
    total = ConicData(*gradient)
    for weighted_method, places in _by_weight(method, weights):
        chosen, tilts, weight = solution.found.select(places), tilt.select(places), weights[places]
        with needing_gradients_of(None):  # which of its data are those of a problem is the structure's matter
            found, found_info = weighted_method.vjp(chosen, tilts, inner, executor)
        scaled = ConicData(*(datum / weight[:, None] for datum in cast(ConicData, found)))
        in_data = structure.gradient(problem.select(places), scaled, weight)
        more = solution.problem.scatter(elements[places], in_data)
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
    change, info = method.jvp(solution.unrelaxed, tangent, solver, executor)
    unrelaxed_change = cast(ConicPoint, change)
    whole = RelaxedPoint(unrelaxed_change.x, unrelaxed_change.y, unrelaxed_change.z, torch.zeros_like(solution.e))
    relaxed = solution.relaxed
    if solution.found is None or not relaxed:
        return whole, info
    structure, elements = relaxed_structure(solution.problem.structure), as_index(relaxed, solution.x.device)
    problem = solution.problem.select(elements)
    data_tangent = solution.problem.with_data(tangent).select(elements).data
    moved = structure.data(problem, data_tangent, solution.weights, constants=0.0)
    inner = solver_of_relaxed(cast(ConicSolver, solver), structure)
    n = structure.base.n
    for weighted_method, places in _by_weight(method, solution.weights):
        chosen_tangent = solution.found.problem.with_data(moved).select(places).data
        found, found_info = weighted_method.jvp(solution.found.select(places), chosen_tangent, inner, executor)
        x, e = found.x[:, :n], found.x[:, n:]
        for values, fresh in ((whole.x, x), (whole.e, e), (whole.y, 0.0), (whole.z, 0.0)):
            values[elements[places]] = fresh
        info = _together(info, found_info, [relaxed[place] for place in integers(places)])
    return whole, info


def _warn_of_multipliers(elements: list[int], cotangent: RelaxedPoint) -> None:
    size = torch.maximum(maximum_norm(cotangent.y), maximum_norm(cotangent.z))
    asked = [element for element, largest in zip(elements, floats(size), strict=True) if largest]
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
    by_element = ("tau", "unit", "moved", "crossed", "jumped", "kinked", "unclear", "newton", "descent", "doubt")
    for name in (*by_element, "iterations"):
        whole, values = getattr(info, name), getattr(other, name)
        if whole is not None and values is not None:
            whole[elements] = values
    info.notices |= other.notices
    return info
