"""Perturbed solutions: the tilted problem solved on one side or on both, and what the answers say of the step.

With the solution ``z₀`` and perturbed ones ``z₊``, ``z₋`` after steps ±τ, a difference over τ is a derivative only
where the solution map is smooth all along.  Two signs tell, and cost no solve: the active sets of z₊ and z₋ are that of
z₀; and z₊ and z₋ mirror each other about z₀, ``z₊ + z₋ - 2 z₀ = O(τ) (z₊ - z₋)``.

A step that is chosen here is shortened where they do not hold.  With v = y - s and its distance to another piece of the
projection at z₀, the first active set changes after about the share ``distance / |v(z±) - v(z₀)|`` of the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import IntArray, integers, rows_where
from lpgd.problems.base import Point, maximum_norm
from lpgd.problems.conic.activity import ActiveSet
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver

__all__ = ["Envelope", "Perturbed", "perturb", "solve_tilted"]

Envelope = Literal["average", "lower", "upper"]

_SIDES: dict[str, tuple[float, ...]] = {"average": (1.0, -1.0), "lower": (1.0,), "upper": (-1.0,)}

ACCURACY = 1e-4
"""Perturbed solves are asked for this accuracy relative to the size of the perturbation."""
NOISE = 30.0
"""Changes of this many times a solver's error, relative to ``1 + |x|``, are real."""
ATTEMPTS = 2
"""How often a chosen step is shortened."""
SHORTEST = 1e-4
"""The share of the first step below which it is not shortened: rounding has taken over."""
LOUDEST = 1e-2
"""Nor is it where the solver's error would be more than this share of the response."""
CURVED = 1e-2
"""Sides that mirror each other up to this share of their difference give a central difference good to its square."""
PRIMAL, DUALS = slice(0, 1), slice(1, None)
"""Parts of points."""
ERRONEOUS = 3.0
"""Kinks bend a response by no more than about its own size."""
FINEST = 1e-14
"""No solution is known better than this."""
JUMP, SMALL_TILT, TINY_TILT = 0.01, 0.1, 1e-3
"""A solution that moves by this share of ``1 + |x|``, and ten times more than a tilt of at most the second size (of a
conic program, the third), may jump."""


@dataclass(eq=False)
class Perturbed:
    """Perturbed solutions of E elements, (E,) each; sides without a solution are the solution itself.

    Attributes:
        plus, minus: points, (E, ·) each.
        above, below: whether there is one.
        tau: the step.
        unit: the step at which the tilt is as large as the terms that it changes.
        moved: whether the solution moves, by more than the solver's error.
        crossed: whether the active set of a side is not that of the solution.
        kinked: elements whose chosen step could not be made small enough for x to be smooth along it.
        unclear: the same for the multipliers alone.
        jumped: elements of a local problem that found another solution.
        tolerance: of the solver of the perturbed problems.
        iterations: of the perturbed solves, together.
    """

    plus: Point
    minus: Point
    above: Tensor
    below: Tensor
    tau: Tensor
    unit: Tensor
    moved: Tensor
    crossed: Tensor
    kinked: Tensor
    unclear: Tensor
    jumped: Tensor
    tolerance: float
    iterations: IntArray


def solve_tilted(
    problem: AnyProblem,
    cotangent: Point,
    steps: Tensor,
    states: Sequence[Any],
    solver: AnySolver,
    executor: Executor | None,
) -> AnySolution:
    """The solutions of ``L + step <cotangent, point>``.

    Args:
        problem: E elements, augmented where ρ > 0.
        cotangent: (E, ·) each.
        steps: (k E,) with their signs.
        states: of a solution of the problem, to start from.
        solver, executor: who solves them, and where.
    """
    return solver.solve(problem.tilt(steps, cotangent), states, executor)


def perturb(
    solution: AnySolution,
    cotangent: Point,
    solver: AnySolver,
    executor: Executor | None,
    *,
    envelope: Envelope,
    rho: float = 0.0,
    steps: Tensor | None = None,
) -> Perturbed:
    """Solve the problem tilted by a cotangent again.

    Args:
        solution: of E elements, each with a solution and a nonzero cotangent.
        cotangent: (E, ·) each.
        solver: solves them again, to a tolerance that fits the step.
        executor: where the work runs.
        envelope: which sides; one without a solution is replaced by the other one.
        rho: of the augmentation.
        steps: (E,) τ, or None: the root of the relative error of the solutions, in tilt units.
    """
    problem = solution.problem
    unit = problem.tilt_unit(solution.point, cotangent)
    base_error = error = _error(solution, solver, problem)
    perturbed_solver = _refined(solver, error) if steps is None else _tightened(solver, float((steps / unit).min()))
    if perturbed_solver != solver:
        error = torch.minimum(error, _error(None, perturbed_solver, problem))
    tau = error**0.5 * unit if steps is None else steps
    augmented = problem.augment(rho, solution.x)
    run = _Run(
        problem, augmented, solution.point, solution.active_set(problem), solution.states, cotangent,
        base_error, error, perturbed_solver, perturbed_solver == solver, executor, envelope,
    )  # fmt: skip
    if len(_SIDES[envelope]) == 1:
        # Both ends of a difference are solved to one tolerance; the old end alone would be the noisier one.
        run = run.with_base_solved_again()
    sides = run.sides(tau)
    kinked = unclear = jumped = torch.zeros_like(sides.above)
    if steps is None:
        run, tau, sides, kinked, unclear = _shortened(run, tau, unit, sides)
    moved = run.moved(sides)
    if problem.traits.is_local:
        jumped = _jumps(run, tau, unit, sides, SMALL_TILT)
    elif problem.traits.is_continuous and (steps is None or not problem.traits.is_linear_program):
        # Of a linear program a given step is meant to find other vertices.
        jumped = _jumps(run, tau, unit, sides, TINY_TILT)
    if run.active is not None and run.active.is_vertex and not any(part.any() for part in tuple(cotangent)[1:]):
        # A vertex that stays does not move at all: what is left is noise, which a tiny step would magnify.
        sides = sides._replace(plus=_at(sides.plus, run.base, moved), minus=_at(sides.minus, run.base, moved))
    return Perturbed(
        sides.plus, sides.minus, sides.above, sides.below, tau, unit, moved, sides.crossing <= 1.0, kinked,
        unclear, jumped, perturbed_solver.tolerance, sides.iterations,
    )  # fmt: skip


class _Sides(NamedTuple):
    """Both ends of steps from E elements' solutions; (E,) each but for the points.

    ``crossing`` is the share of the step after which an active set changes, infinite where none does; ``apart`` says
    whether the active sets of the ends differ.  ``skew`` is :meth:`_Run.skew` of x.
    """

    plus: Point
    minus: Point
    above: Tensor
    below: Tensor
    crossing: Tensor
    apart: Tensor
    skew: Tensor
    iterations: IntArray

    def replaced(self, rows: Tensor, part: _Sides) -> _Sides:
        """With other sides for the elements ``rows``."""
        iterations = self.iterations.copy()
        iterations[rows.cpu().numpy()] += part.iterations
        fields = (_replaced(whole, rows, own) for whole, own in zip(self[:-1], part[:-1], strict=True))
        return _Sides._make((*fields, iterations))


@dataclass(frozen=True, eq=False)
class _Run:
    """What perturbed solves of the same E elements have in common.

    Attributes:
        base, active: the solutions and their active sets, None where the problems have none.
        base_error, error: (E,) of the solutions and of perturbed ones, relative to their size.
        is_even: whether both were found by the same solver.
    """

    problem: AnyProblem
    augmented: AnyProblem
    base: Point
    active: ActiveSet | None
    states: Sequence[Any]
    cotangent: Point
    base_error: Tensor
    error: Tensor
    solver: AnySolver
    is_even: bool
    executor: Executor | None
    envelope: Envelope

    def select(self, rows: Tensor) -> _Run:
        """The same for some elements."""
        problem = self.problem.select(rows)
        return replace(
            self,
            problem=problem,
            augmented=problem if self.augmented is self.problem else self.augmented.select(rows),
            base=self.base.select(rows),
            active=None if self.active is None else self.active.select(rows),
            states=tuple(self.states[element] for element in integers(rows)) if len(self.states) else (),
            cotangent=self.cotangent.select(rows),
            base_error=self.base_error[rows],
            error=self.error[rows],
        )

    def with_base_solved_again(self) -> _Run:
        """The same with solutions as accurate as the perturbed ones."""
        if self.is_even:
            return self
        again = self.solver.solve(self.augmented, self.states, self.executor)
        fine, active = again.usable, again.active_set(self.problem)
        if active is not None and self.active is not None:
            active = active.where(fine, self.active)
        error = torch.where(fine, self.error, self.base_error)
        return replace(self, base=again.point.where(fine, self.base), active=active, base_error=error, is_even=True)

    def sides(self, tau: Tensor) -> _Sides:
        """The ends of the steps τ (E,)."""
        signs = _SIDES[self.envelope]
        parts = self._solved(torch.cat([sign * tau for sign in signs])).parts(len(signs))
        results = dict(zip(signs, parts, strict=True))
        solved = {sign: result.usable for sign, result in results.items()}
        if len(signs) == 1 and not solved[signs[0]].all():
            # The asked-for side has no solution for some elements: try the other one.
            other = -signs[0]
            results[other] = self._solved(other * tau)
            solved[other] = results[other].usable & ~solved[signs[0]]
        nothing = torch.zeros(len(tau), dtype=torch.bool, device=tau.device)
        above, below = solved.get(1.0, nothing), solved.get(-1.0, nothing)
        plus = results[1.0].point.where(above, self.base) if 1.0 in results else self.base
        minus = results[-1.0].point.where(below, self.base) if -1.0 in results else self.base
        iterations = np.sum([result.iterations for result in results.values()], axis=0)
        crossing, apart = self._crossing(results, solved)
        return _Sides(plus, minus, above, below, crossing, apart, self.skew(plus, minus, above & below), iterations)

    def _solved(self, steps: Tensor) -> AnySolution:
        return solve_tilted(self.augmented, self.cotangent, steps, self.states, self.solver, self.executor)

    def _crossing(self, results: dict[float, AnySolution], solved: dict[float, Tensor]) -> tuple[Tensor, Tensor]:
        crossing = torch.full_like(self.error, torch.inf)
        if self.active is None:
            return crossing, torch.zeros_like(self.error, dtype=torch.bool)
        noise = self._noise(self.base_error, self.active.size())
        ends = [self.active]
        for sign, result in results.items():
            end = result.active_set(self.problem)
            assert end is not None, "both ends have an active set, or none"
            if not bool(solved[sign].all()):
                end = end.where(solved[sign], self.active)
            crossing = torch.minimum(crossing, self.active.crossing(end, noise))
            ends.append(end)
        return crossing, ends[-1].unequal(ends[-2]).any(-1)

    def skew(self, plus: Point, minus: Point, both: Tensor, parts: slice = PRIMAL) -> Tensor:
        """(E,) ``|z₊ + z₋ - 2 z₀| / |z₊ - z₋|`` of some parts; 0 within the solver's error and without ``both``."""
        worst = torch.zeros_like(self.error)
        if not both.any():
            return worst
        points = (self.problem.in_own_units(point)[parts] for point in (self.base, plus, minus))
        for here, above, below in zip(*points, strict=True):
            difference, bend = maximum_norm(above - below), maximum_norm((above - here) + (below - here))
            # A bend of far more than the difference is the error of the solution in the middle.
            real = both & (bend > self._noise(self.base_error, maximum_norm(here))) & (bend < ERRONEOUS * difference)
            worst = torch.maximum(worst, torch.where(real, bend / difference, 0.0).to(worst.dtype))
        return worst

    def _noise(self, error: Tensor, size: Tensor) -> Tensor:
        """(E,) what a relative error makes of numbers of some size (E,)."""
        return NOISE * error * (1.0 + size)

    def moved(self, sides: _Sides) -> Tensor:
        """(E,) whether the ends differ.

        Both are solved alike, so that they are compared with each other: equal ends are optimal for all tilts between
        them, and so is one solution.  At a vertex of a linear program the active set tells, whatever the noise.
        """
        base, plus, minus = (self.problem.in_own_units(point)[0] for point in (self.base, sides.plus, sides.minus))
        moved = maximum_norm(plus - minus) > self._noise(self.error, maximum_norm(base))
        on_duals = any(part.any() for part in tuple(self.cotangent)[1:])
        if self.active is not None and self.active.is_vertex and not on_duals:
            moved = moved & sides.apart
        return moved


def _shortened(run: _Run, tau: Tensor, unit: Tensor, sides: _Sides) -> tuple[_Run, Tensor, _Sides, Tensor, Tensor]:
    """Steps within the reach of the solutions' active sets, where they were not, and which elements have none."""
    kinked, unclear = torch.zeros_like(sides.above), torch.zeros_like(sides.above)
    rows = rows_where(_rough(sides))
    if not len(rows):
        return run, tau, sides, kinked, unclear
    part, steps, tau = run.select(rows), tau[rows], tau.clone()
    own = part.with_base_solved_again()
    found = _picked(sides, rows) if own is part else own.sides(steps)
    shortest = torch.maximum(SHORTEST * steps, unit[rows] * own.error / LOUDEST)
    for _ in range(ATTEMPTS):
        curved = torch.where(found.skew > CURVED, (0.1 * CURVED / found.skew).clamp(min=0.01), 1.0)
        shorter = steps * torch.minimum(0.5 * found.crossing, curved)
        chosen = rows_where(_rough(found) & (shorter >= shortest))
        if not len(chosen):
            break
        steps = _replaced(steps, chosen, shorter[chosen])
        found = found.replaced(chosen, own.select(chosen).sides(steps[chosen]))
    left = rows_where(_rough(found))
    if len(left):
        judge = replace(own.select(left), envelope="average")
        judged = _picked(found, left) if run.envelope == "average" else judge.sides(steps[left])
        both = judged.above & judged.below
        kinked[rows[left]] = (judged.skew > CURVED) | ~both
        dual_skew = judge.skew(judged.plus, judged.minus, both, DUALS)
        unclear[rows[left]] = both & (judged.skew <= CURVED) & (dual_skew > CURVED)
    tau[rows] = steps
    base = run.base if own is part else _replaced(run.base, rows, own.base)
    return replace(run, base=base), tau, sides.replaced(rows, found), kinked, unclear


def _rough(sides: _Sides) -> Tensor:
    """(E,) whether the solution map is not smooth along a step."""
    return (sides.crossing <= 1.0) | (sides.skew > CURVED)


def _at(point: Point, base: Point, moved: Tensor) -> Point:
    """The point, with x where it was for elements that have not moved."""
    return point._make((torch.where(moved[:, None], point.x, base.x), *tuple(point)[1:]))


def _jumps(run: _Run, tau: Tensor, unit: Tensor, sides: _Sides, small: float) -> Tensor:
    """(E,) whether a solution went to another one.

    A response to a small tilt that is far is one only if the opposite tilt moves the solution the other way, and a
    tenth of it a tenth as far.
    """
    tilt = tau / unit
    far = _reach(run, sides)
    jumped = (tilt <= small) & (far > JUMP) & (far > 10 * tilt)
    rows = rows_where(jumped)
    if len(rows):
        part, both = run.select(rows), _picked(sides, rows)
        if not (both.above & both.below).all():
            both = replace(part, envelope="average").sides(tau[rows])
        bend = maximum_norm((both.plus.x - part.base.x) + (both.minus.x - part.base.x))
        mirrored = (bend <= 0.5 * maximum_norm(both.plus.x - both.minus.x)) | ~(both.above & both.below)
        share = _reach(part, part.sides(0.1 * tau[rows])) / far[rows]
        jumped[rows] = ~(mirrored & (share > 0.05) & (share < 0.2))
    return jumped


def _reach(run: _Run, sides: _Sides) -> Tensor:
    """(E,) how far solutions move, relative to ``1 + |x|``."""
    change = torch.maximum(maximum_norm(sides.plus.x - run.base.x), maximum_norm(sides.minus.x - run.base.x))
    return change / (1.0 + maximum_norm(run.base.x))


def _picked(sides: _Sides, rows: Tensor) -> _Sides:
    """The sides of some elements, without the iterations that they took."""
    plus, minus = sides.plus.select(rows), sides.minus.select(rows)
    iterations = 0 * sides.iterations[rows.cpu().numpy()]
    return _Sides._make((plus, minus, *(part[rows] for part in sides[2:-1]), iterations))


def _replaced(whole: Any, rows: Tensor, part: Any) -> Any:
    """A tensor, or a point, with other values in some rows."""
    if isinstance(whole, tuple):
        fields: Any = whole
        return type(fields)(*(_replaced(own, rows, new) for own, new in zip(fields, part, strict=True)))
    whole = whole.clone()
    whole[rows] = part.to(whole.dtype)
    return whole


def _error(solution: AnySolution | None, solver: AnySolver, problem: AnyProblem) -> Tensor:
    """(E,) the relative error of solutions: what is known of these, else what is typical of the solver."""
    known = None if solution is None else solution.known_to
    typical = torch.full((problem.batch_size,), solver.solution_error(problem), dtype=torch.float64)
    typical = typical.to(problem.device)
    return typical if known is None else torch.where(torch.isfinite(known), known.clamp(min=FINEST), typical)


def _refined(solver: AnySolver, error: Tensor) -> AnySolver:
    """The solver, two digits tighter where its solutions are much less accurate than its tolerance."""
    if bool((error <= 10 * solver.tolerance).all()):
        return solver
    return solver.with_tolerance(0.01 * solver.tolerance)


def _tightened(solver: AnySolver, relative_step: float) -> AnySolver:
    """The solver, as tight as a difference of its solutions needs; by powers of ten, so that workspaces are shared."""
    wanted = ACCURACY * relative_step
    if wanted >= 0.1 * solver.tolerance:  # not worth the set-up of new workspaces
        return solver
    wanted = 10.0 ** math.floor(math.log10(wanted)) if wanted > 0 else 0.0
    return solver.with_tolerance(wanted)
