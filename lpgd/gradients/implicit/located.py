"""Points at which conic programs are differentiated: how well they are known, and which kinks are near."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, flags, from_numpy, rows_where
from lpgd.cones.regions import interior_direction, kinks
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.nearer import nearer
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint, per_element
from lpgd.problems.conic.units import Units
from lpgd.solvers.kkt.refinement import optimality_residual, refine

__all__ = ["Located", "Tilted", "known_point", "relocated"]

KNOWN_WELL = 1e-10
"""Points with a larger |F| are refined where their error matters: at curved cones, and near kinks."""
KNOWN = 1e-7
"""Points of linear and quadratic programs with a larger |F| are refined anyhow: it may hide which rows are active."""
WORSE = 100.0
"""Another point of the same solution may leave so many times as much, or what is known well."""
KINK = 1e-7
"""Multipliers and slacks that both are smaller are taken to vanish; 100 |F| at a point that is known less well."""


class Tilted(NamedTuple):
    """Solutions of E elements, and tilts ``<tilt, point>`` of their Lagrangians, in the problem's own units."""

    problem: ConicProblem
    point: ConicPoint
    slack: Tensor
    tilt: ConicPoint

    def select(self, elements: Tensor) -> Tilted:
        """The same of some elements."""
        return Tilted(
            self.problem.select(elements),
            self.point.select(elements),
            self.slack[elements],
            self.tilt.select(elements),
        )

    def with_far_constraints_near(self) -> Tilted:
        """The same solutions of programs whose far constraints are nearer (:mod:`lpgd.problems.conic.nearer`)."""
        moved = nearer(self.problem, self.point, self.slack)
        return self if moved is None else Tilted(moved.problem, moved.point, moved.slack, self.tilt)


class Located(NamedTuple):
    """Points of E elements, refined where that matters, in units of order 1.

    Attributes:
        problem, point, slack, tilt: in those units.
        rho: the ρ of ``(ρ/2) |x - x*|²`` in those units: (E, n), or the same for all.
        unit: what a point of ones in those units is in the problem's own.
        error: (E,) |F|.
        lipschitz: (E,) Lipschitz constant of the projection's derivative.
        weak: (E,) elements at a kink.
        xi_side, v_side: (E, n) and (E, m) steps that bring whatever is at a kink to its active side.
    """

    problem: ConicProblem
    point: ConicPoint
    slack: Tensor
    tilt: ConicPoint
    rho: FloatArray | float
    unit: ConicPoint
    error: Tensor
    lipschitz: FloatArray
    weak: Tensor
    xi_side: Tensor
    v_side: Tensor

    @property
    def tolerance(self) -> Tensor:
        """(E,) multipliers and slacks that both are smaller are taken to vanish."""
        return (100 * self.error).clamp(KINK, 1e-3)

    def at(self, point: ConicPoint, slack: Tensor, error: Tensor) -> Located:
        """The same at other points, which leave so much of the optimality conditions."""
        return Located(
            *(self.problem, point, slack, self.tilt, self.rho, self.unit, error),
            *_kinks(self.problem, point, slack, error),
        )

    def select(self, elements: Tensor) -> Located:
        """The same of some elements."""
        if torch.equal(elements, torch.arange(self.problem.batch_size, device=elements.device)):
            return self
        rho = self.rho[elements.cpu().numpy()] if isinstance(self.rho, np.ndarray) else self.rho
        return Located(
            self.problem.select(elements), self.point.select(elements), self.slack[elements],
            self.tilt.select(elements), rho, self.unit.select(elements), self.error[elements],
            self.lipschitz[elements.cpu().numpy()], self.weak[elements], self.xi_side[elements], self.v_side[elements],
        )  # fmt: skip


def known_point(tilted: Tilted, units: Units, rho: float = 0.0, well: float = KNOWN_WELL) -> Located:
    """Solutions in some units, with their kinks there, refined where they are not known well enough.

    Args:
        tilted: in the problem's own units.
        units: in which its data are of order 1.
        rho: ρ ≥ 0, in the problem's own units.
        well: an |F| that is enough at curved cones, and near kinks.
    """
    problem, unit = tilted.problem, units.ones_out(tilted.problem)
    point, slack = units.point_in(problem, tilted.point), units.slack_in(problem, tilted.slack)
    curvature = rho if rho == 0.0 or units.is_trivial else (rho * units.tilt_in(problem, unit).x).cpu().numpy()
    tilt, problem = units.tilt_in(problem, tilted.tilt), units.apply(problem)
    tilt = ConicPoint(*(tensor.to(point.x.dtype) for tensor in tilt))
    curved = not problem.structure.cones.is_polyhedral
    error = optimality_residual(problem, point, slack)
    located = Located(problem, point, slack, tilt, curvature, unit, error, *_kinks(problem, point, slack, error))
    rough = error > well if curved else (error > KNOWN) | (located.weak & (error > well))
    if not bool(rough.any()):
        return located
    elements = rows_where(rough)
    refined = refine(problem, point, slack, elements)
    point, slack = ConicPoint(*(tensor.clone() for tensor in point)), slack.clone()
    for whole, values in zip((*point, slack, error), (*refined.point, refined.slack, refined.after), strict=True):
        whole[elements] = values
    return located.at(point, slack, error)


def relocated(located: Located, point: ConicPoint, slack: Tensor, elements: list[int]) -> tuple[Located, list[int]]:
    """The same solutions at another point of some elements, where that is one as well, and which these are."""
    problem = located.problem
    error = optimality_residual(problem, point, slack)
    worse = error > (WORSE * located.error).clamp(min=KNOWN_WELL)
    kept = torch.ones_like(worse)
    kept[elements] = worse[elements]
    point, slack = located.point.where(kept, point), torch.where(kept[:, None], located.slack, slack)
    error = torch.where(kept, located.error, error)
    there = located.at(point, slack, error)
    return there, [element for element, stays in zip(elements, flags(worse[elements]), strict=True) if not stays]


def _kinks(
    problem: ConicProblem, point: ConicPoint, slack: Tensor, error: Tensor
) -> tuple[FloatArray, Tensor, Tensor, Tensor]:
    """The kinks nearby: ``lipschitz``, ``weak``, ``xi_side`` and ``v_side`` of :class:`Located`."""
    structure, cones = problem.structure, problem.structure.cones
    tolerance = (100 * error).clamp(KINK, 1e-3)[:, None]
    v = point.y - slack
    if cones.is_polyhedral:
        near = v.abs() <= tolerance
        near[:, : cones.zero] = False
        lipschitz = np.zeros(problem.batch_size)
    else:
        found, lipschitz = kinks(cones, v.detach().cpu().numpy(), tolerance[:, 0].cpu().numpy())
        near = from_numpy(found).to(v.device)
    weak, xi_side = near.any(-1), torch.zeros_like(point.x)
    above = below = weak[:, None]
    if structure.has_bounds:
        lower, upper = problem.full_bounds()
        above = ((point.z - (upper - point.x)).abs() <= tolerance) & (lower < upper)
        below = ((-point.z - (point.x - lower)).abs() <= tolerance) & (lower < upper)
        weak = weak | above.any(-1) | below.any(-1)
        xi_side = (above.double() - below.double()) * 2 * tolerance
    v_side = torch.zeros_like(v)
    if cones.is_polyhedral and bool(weak.any()):
        near, ends = _within_sizes(problem, point, v, error, near)
        weak = near.any(-1)
        if structure.has_bounds:
            above, below = above & ends[0], below & ends[1]
            weak = weak | above.any(-1) | below.any(-1)
            xi_side = (above.double() - below.double()) * 2 * tolerance
    if bool(weak.any()):
        direction = from_numpy(interior_direction(cones)).to(v.device)
        v_side = torch.where(near, 2 * tolerance * direction, 0.0)
    return lipschitz, weak, xi_side, v_side


def _within_sizes(
    problem: ConicProblem, point: ConicPoint, v: Tensor, error: Tensor, near: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Rows and bounds of linear and quadratic programs that are near a kink beside the sizes of their element, too.

    Data may be of order 1 by one far row, and all that matters much smaller: a multiplier of 1e-7 is none beside a cost
    of order 1, and one of 1e-5 of it beside a cost of 1e-2.

    Args:
        problem, point, error: of E elements, in units of order 1.
        v: (E, m) multipliers less slacks.
        near: (E, m) rows to which that applies by the units alone.

    Returns:
        Which of these are left, and which variables (E, n) may be near their upper and lower bounds.
    """
    structure, data, size = problem.structure, problem.data, problem.batch_size
    length = maximum_norm(point.x)[:, None]
    P = maximum_norm(per_element(problem.symmetric_P, size))[:, None]
    forces = (per_element(data.q, size), structure.constraint.rmatvec(data.A, point.y), point.z)
    force = torch.stack([P * length, *(maximum_norm(one)[:, None] for one in forces)]).amax(0)
    floor = 100 * error[:, None]
    largest = per_element(structure.constraint.largest(torch.atleast_2d(data.A), ("rows",))[0], size)
    of_multiplier = torch.where(largest > 0, KINK * force / largest, torch.inf)
    of_slack = KINK * torch.maximum(per_element(data.b, size).abs(), largest * length)
    near = near & (v.abs() <= torch.maximum(torch.where(v > 0, of_multiplier, of_slack), floor))
    of_multiplier, of_gap = (torch.maximum(KINK * one, floor) for one in (force, length))
    lower, upper = problem.full_bounds()
    above = (point.z <= of_multiplier) & (upper - point.x <= of_gap)
    below = (-point.z <= of_multiplier) & (point.x - lower <= of_gap)
    return near, (above, below)
