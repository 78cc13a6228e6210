"""Both sides of a perturbation: the tilted problems solved again, and how their solutions differ."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import IntArray, integers
from lpgd.gradients.losses import PosedLoss
from lpgd.problems.base import Point, States, maximum_norm
from lpgd.problems.conic.activity import ActiveSet
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.solvers.perturbed_points import PerturbedPoints

__all__ = ["DUALS", "SIDES", "Envelope", "Run", "Sides", "picked", "replaced_elements", "solve_tilted"]

Envelope = Literal["average", "lower", "upper"]

SIDES: dict[str, tuple[float, ...]] = {"average": (1.0, -1.0), "lower": (1.0,), "upper": (-1.0,)}

NOISE = 30.0
"""Changes of this many times a solver's error, relative to ``1 + |x|``, are real."""
JUMP, SMALL_TILT, TINY_TILT = 0.01, 0.1, 1e-3
"""A solution that moves by this share of ``1 + |x|``, and ten times more than a tilt of at most the second size (of a
conic program, the third), may jump."""
FINEST = 1e-14
"""No solution is known better than this."""
PRIMAL, DUALS = slice(0, 1), slice(1, None)
"""Fields of points."""
ERRONEOUS = 3.0
"""Kinks bend a response by no more than about its own size."""


def solve_tilted(
    problem: AnyProblem,
    cotangent: Point,
    steps: Tensor,
    states: States,
    solver: AnySolver,
    executor: Executor | None,
    near: PerturbedPoints | None = None,
) -> AnySolution:
    """The solutions of ``L + step <cotangent, point>``, by Newton's method where that finds them, or by the solver.

    Args:
        problem: E elements, augmented where ρ > 0.
        cotangent: (E, ·) each.
        steps: (k E,) with their signs.
        states: of a solution of the problem, to start from.
        solver, executor: who solves them, and where.
        near: of these elements and the cotangent.
    """
    tilted = problem.tilt(steps, cotangent)
    if near is None:
        return solver.solve(tilted, states, executor)
    return near.solve(cast(ConicProblem, tilted), steps, states, executor)


class Sides(NamedTuple):
    """Both ends of steps from E elements' solutions; (E,) each but for the points.

    ``crossing`` is the share of the step after which an active set changes, infinite where none does; ``apart`` says
    whether the active sets of the ends differ.  ``skew`` is :meth:`Run.skew` of x; ``known_to`` is what is left of the
    optimality conditions of the ends, 0 where that is not known; ``newton`` is how many of the ends Newton's method
    found.
    """

    plus: Point
    minus: Point
    above: Tensor
    below: Tensor
    crossing: Tensor
    apart: Tensor
    skew: Tensor
    known_to: Tensor
    newton: Tensor
    iterations: IntArray

    def replaced(self, elements: Tensor, others: Sides) -> Sides:
        """With other sides for these elements."""
        iterations = self.iterations.copy()
        iterations[elements.cpu().numpy()] += others.iterations
        fields = (
            replaced_elements(whole, elements, values) for whole, values in zip(self[:-1], others[:-1], strict=True)
        )
        return Sides._make((*fields, iterations))


@dataclass(frozen=True, eq=False)
class Run:
    """What perturbed solves of the same E elements have in common.

    Attributes:
        base, active: the solutions and their active sets, None where the problems have none.
        base_error, error: (E,) of the solutions and of perturbed ones, relative to their size.
        is_even: whether both were found by the same solver.
        loss: what is added times the step, in place of the tilt along the cotangent; None for the tilt.
    """

    problem: AnyProblem
    augmented: AnyProblem
    base: Point
    active: ActiveSet | None
    states: States
    cotangent: Point
    base_error: Tensor
    error: Tensor
    solver: AnySolver
    is_even: bool
    executor: Executor | None
    envelope: Envelope
    near: PerturbedPoints | None
    loss: PosedLoss | None = None

    def select(self, elements: Tensor) -> Run:
        """The same for some elements."""
        problem = self.problem.select(elements)
        return replace(
            self,
            problem=problem,
            augmented=problem if self.augmented is self.problem else self.augmented.select(elements),
            base=self.base.select(elements),
            active=None if self.active is None else self.active.select(elements),
            states=tuple(self.states[element] for element in integers(elements)) if len(self.states) else (),
            cotangent=self.cotangent.select(elements),
            base_error=self.base_error[elements],
            error=self.error[elements],
            near=None if self.near is None else self.near.select(elements),
            loss=None if self.loss is None else self.loss.select(elements),
        )

    def with_base_solved_again(self) -> Run:
        """The same with solutions as accurate as the perturbed ones."""
        if self.is_even:
            return self
        again = self.solver.solve(self.augmented, self.states, self.executor)
        fine, active = again.usable, again.active_set(self.problem)
        if active is not None and self.active is not None:
            active = active.where(fine, self.active)
        error = torch.where(fine, self.error, self.base_error)
        return replace(self, base=again.point.where(fine, self.base), active=active, base_error=error, is_even=True)

    def sides(self, tau: Tensor) -> Sides:
        """The ends of the steps τ (E,)."""
        signs = SIDES[self.envelope]
        results = dict(zip(signs, self._ends([sign * tau for sign in signs]), strict=True))
        solved = {sign: result.usable for sign, result in results.items()}
        if len(signs) == 1 and not solved[signs[0]].all():
            # The asked-for side has no solution for some elements: try the other one.
            other = -signs[0]
            (results[other],) = self._ends([other * tau])
            solved[other] = results[other].usable & ~solved[signs[0]]
        nothing = torch.zeros(len(tau), dtype=torch.bool, device=tau.device)
        above, below = solved.get(1.0, nothing), solved.get(-1.0, nothing)
        plus = results[1.0].point.where(above, self.base) if 1.0 in results else self.base
        minus = results[-1.0].point.where(below, self.base) if -1.0 in results else self.base
        iterations = np.sum([result.iterations for result in results.values()], axis=0)
        crossing, apart = self._crossing(results, solved)
        newton = torch.stack([result.by_newton for result in results.values()]).sum(0)
        skew = self.skew(plus, minus, above & below)
        left = [self.error * 0.0 if one.known_to is None else one.known_to.nan_to_num() for one in results.values()]
        known_to = torch.stack([known.to(self.error) for known in left]).amax(0)
        return Sides(plus, minus, above, below, crossing, apart, skew, known_to, newton, iterations)

    def _ends(self, steps: Sequence[Tensor]) -> Sequence[AnySolution]:
        """The solutions after each of these steps (E,)."""
        if self.loss is not None:
            loss, states = self.loss, self.states
            return [loss.solve(self.augmented, step, states, self.solver, self.executor) for step in steps]
        whole, states = torch.cat(list(steps)), self.states
        found = solve_tilted(self.augmented, self.cotangent, whole, states, self.solver, self.executor, self.near)
        return found.parts(len(steps))

    def _crossing(self, results: dict[float, AnySolution], solved: dict[float, Tensor]) -> tuple[Tensor, Tensor]:
        crossing = torch.full_like(self.error, torch.inf)
        if self.active is None:
            return crossing, torch.zeros_like(self.error, dtype=torch.bool)
        ends: list[ActiveSet] = []
        for sign, result in results.items():
            end = result.active_set(self.problem)
            assert end is not None, "both ends have an active set, or none"
            if not bool(solved[sign].all()):
                end = end.where(solved[sign], self.active)
            ends.append(end)
        crossed = [end for end in ends if bool(self.active.unequal(end).any())]
        if not crossed:
            return crossing, torch.zeros_like(self.error, dtype=torch.bool)
        noise = self.noise(self.base_error, self.active.size())
        for end in crossed:
            crossing = torch.minimum(crossing, self.active.crossing(end, noise))
        first, second = [self.active, *ends][-2:]
        return crossing, second.unequal(first).any(-1)

    def skew(self, plus: Point, minus: Point, both: Tensor, fields: slice = PRIMAL) -> Tensor:
        """(E,) ``|z₊ + z₋ - 2 z₀| / |z₊ - z₋|`` of some fields; 0 within the solver's error and without ``both``."""
        worst = torch.zeros_like(self.error)
        if not both.any():
            return worst
        points = (self.problem.observed(point, self.base)[fields] for point in (self.base, plus, minus))
        for middle, above, below in zip(*points, strict=True):
            difference, bend = maximum_norm(above - below), maximum_norm((above - middle) + (below - middle))
            # A bend of far more than the difference is the error of the solution in the middle.
            real = both & (bend > self.noise(self.base_error, maximum_norm(middle))) & (bend < ERRONEOUS * difference)
            worst = torch.maximum(worst, torch.where(real, bend / difference, 0.0).to(worst.dtype))
        return worst

    def noise(self, error: Tensor, size: Tensor) -> Tensor:
        """(E,) what a relative error makes of numbers of some size (E,)."""
        return NOISE * error * (1.0 + size)

    def moved(self, sides: Sides) -> Tensor:
        """(E,) whether the ends differ.

        Both are solved alike, so that they are compared with each other: equal ends are optimal for all tilts between
        them, and so is one solution.  Where the active set determines the solution it tells, whatever the noise.
        """
        base, plus, minus = (self.problem.in_own_units(point)[0] for point in (self.base, sides.plus, sides.minus))
        distance, size = maximum_norm(plus - minus), maximum_norm(base)
        moved, determined = distance > self.noise(self.error, size), self.determined()
        if determined is None:
            return moved
        # At a degenerate vertex active sets may differ, and only what is left of the conditions.
        return moved & (~determined | (sides.apart & (distance > self.noise(sides.known_to, size))))

    def determined(self) -> Tensor | None:
        """(E,) whether a solution with the same active set is the same one; None where that is known of none.

        So it is of linear programs: at a vertex, and on a face too, where a solution that a tilt does not take to
        another end of it is one of many, and its place within the face noise.  With a quadratic term added (ρ > 0), or
        a loss itself, solutions move within a face.
        """
        if self.active is None or not self.active.of_linear_program or any(t.any() for t in tuple(self.cotangent)[1:]):
            return None
        if self.augmented is self.problem and self.loss is None:
            return torch.ones(self.problem.batch_size, dtype=torch.bool, device=self.problem.device)
        return self.active.is_vertex(self.base.x.shape[-1])


def picked(sides: Sides, elements: Tensor) -> Sides:
    """The sides of some elements, without the iterations that they took."""
    plus, minus = sides.plus.select(elements), sides.minus.select(elements)
    iterations = 0 * sides.iterations[elements.cpu().numpy()]
    return Sides._make((plus, minus, *(tensor[elements] for tensor in sides[2:-1]), iterations))


def replaced_elements(whole: Any, elements: Tensor, values: Any) -> Any:
    """A tensor, or a point, with other values for some elements."""
    if isinstance(whole, tuple):
        fields: Any = whole
        return type(fields)(
            *(replaced_elements(field, elements, new) for field, new in zip(fields, values, strict=True))
        )
    whole = whole.clone()
    whole[elements] = values.to(whole.dtype)
    return whole
