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
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import IntArray, rows_where
from lpgd.gradients.losses import PosedLoss
from lpgd.gradients.sides import (
    DUALS,
    FINEST,
    JUMP,
    NOISE,
    SIDES,
    SMALL_TILT,
    TINY_TILT,
    Envelope,
    Run,
    Sides,
    picked,
    replaced_elements,
)
from lpgd.problems.base import Point, maximum_norm
from lpgd.problems.conic.activity import leaves_multipliers_open, shares_multipliers
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.solvers.perturbed_points import PerturbedPoints

__all__ = ["Perturbation", "Perturbed", "perturb"]


ACCURACY = 1e-4
"""Perturbed solves are perturbation for this accuracy relative to the size of the perturbation."""
FINER = 100.0
"""By such factors solves are tighter than the solver's tolerance."""
ATTEMPTS = 2
"""How often a chosen step is shortened."""
SHORTEST = 1e-4
"""The share of the first step below which it is not shortened: rounding has taken over."""
LOUDEST = 1e-2
"""Nor is it where the solver's error would be more than this share of the response."""
CURVED = 1e-2
"""Sides that mirror each other up to this share of their difference give a central difference good to its square."""


@dataclass(frozen=True, eq=False)
class Perturbation:
    """E elements that are to be solved again, tilted by a cotangent.

    Attributes:
        solution: of elements that have one each, and a nonzero cotangent.
        cotangent: (E, ·) each.
        solver: solves them again, to a tolerance that fits the step.
        executor: where the work runs.
        envelope: which sides; one without a solution is replaced by the other one.
        rho: of the augmentation.
        steps: (E,) τ, or None: the root of the relative error of the solutions, in tilt units.
        loss: a loss of these elements with this cotangent, to be added itself instead of its linear model.
    """

    solution: AnySolution
    cotangent: Point
    solver: AnySolver
    executor: Executor | None
    envelope: Envelope
    rho: float = 0.0
    steps: Tensor | None = None
    loss: PosedLoss | None = None

    def select(self, elements: Tensor) -> Perturbation:
        """The same of some elements."""
        return replace(
            self,
            solution=self.solution.select(elements),
            cotangent=self.cotangent.select(elements),
            steps=None if self.steps is None else self.steps[elements],
            loss=None if self.loss is None else self.loss.select(elements),
        )

    @property
    def may_stay(self) -> bool:
        """Whether steps are those that were given, of linear programs: they are meant to find other vertices."""
        return self.steps is not None and self.solution.problem.traits.is_linear_program


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
        shared_rows, shared_bounds: elements with more active constraints than variables, or with one that is stated
            twice, of problems whose multipliers a step is not meant to change.
        jumped: elements of a local problem that found another solution.
        tolerance: of the solver of the perturbed problems.
        iterations: of the perturbed solves, together.
        newton: how many of the perturbed solutions Newton's method found.
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
    shared_rows: Tensor
    shared_bounds: Tensor
    jumped: Tensor
    tolerance: float
    iterations: IntArray
    newton: Tensor

    @classmethod
    def joined(cls, parts: Sequence[tuple[Tensor, Perturbed]]) -> Perturbed:
        """Those of several groups of elements, each with its places."""
        back = torch.cat([elements for elements, _ in parts]).argsort()
        columns: dict[str, Any] = {}
        for name in (one.name for one in fields(cls)):
            values: list[Any] = [getattr(part, name) for _, part in parts]
            if isinstance(values[0], Tensor):
                columns[name] = torch.cat(values)[back]
            elif isinstance(values[0], np.ndarray):
                columns[name] = np.concatenate(values)[back.cpu().numpy()]
            elif isinstance(values[0], tuple):
                first: Any = values[0]
                columns[name] = first._make(torch.cat(tensors)[back] for tensors in zip(*values, strict=True))
            else:
                columns[name] = min(values)
        return cls(**columns)


def perturb(perturbation: Perturbation) -> Perturbed:
    """Solve the tilted problems again."""
    solution, solver, problem = perturbation.solution, perturbation.solver, perturbation.solution.problem
    unit = problem.tilt_unit(solution.point, perturbation.cotangent)
    error = _error(solution, solver, problem)
    found: list[tuple[Tensor, Perturbed]] = []
    # Who asks for another accuracy than others is solved apart, so that no element has that of another one.
    finer = _refinement(solver, error) if perturbation.steps is None else _tightening(solver, perturbation.steps / unit)
    for power in finer.unique().tolist():
        accurate = solver if power == 0 else solver.with_tolerance(solver.tolerance * FINER**-power)
        chosen = rows_where(finer == power)
        if chosen.shape[0] == problem.batch_size:
            return _perturbed(perturbation, accurate, unit, error)
        found.append((chosen, _perturbed(perturbation.select(chosen), accurate, unit[chosen], error[chosen])))
    return Perturbed.joined(found)


def _perturbed(perturbation: Perturbation, solver: AnySolver, unit: Tensor, error: Tensor) -> Perturbed:
    """The same by a solver that is as accurate as all of these elements need.

    Args:
        perturbation: E elements.
        solver: who solves them.
        unit: (E,) the step at which a tilt is as large as the terms that it changes.
        error: (E,) of the solutions, relatively.
    """
    run = _run(perturbation, solver, unit, error)
    tau = run.error**0.5 * unit if perturbation.steps is None else perturbation.steps
    if len(SIDES[perturbation.envelope]) == 1:
        # Both ends of a difference are solved to one tolerance; the old end alone would be the noisier one.
        run = run.with_base_solved_again()
    sides = run.sides(tau)
    kinked = unclear = torch.zeros_like(sides.above)
    if perturbation.steps is None:
        run, tau, sides, kinked, unclear = _shortened(run, tau, unit, sides)
    shared_rows, shared_bounds = _shared(perturbation, run)
    moved, jumped = run.moved(sides), torch.zeros_like(sides.above)
    traits = run.problem.traits
    if traits.is_local or (traits.is_continuous and not perturbation.may_stay):
        jumped = _jumps(run, tau, unit, sides, SMALL_TILT if traits.is_local else TINY_TILT)
    determined = run.determined()
    if determined is not None:
        # A vertex that stays does not move at all: what is left is noise, which a tiny step would magnify.
        free = moved | ~determined
        sides = sides._replace(plus=_at(sides.plus, run.base, free), minus=_at(sides.minus, run.base, free))
    return Perturbed(
        sides.plus, sides.minus, sides.above, sides.below, tau, unit, moved, sides.crossing <= 1.0, kinked,
        unclear, shared_rows, shared_bounds, jumped, solver.tolerance, sides.iterations, sides.newton,
    )  # fmt: skip


def _run(perturbation: Perturbation, solver: AnySolver, unit: Tensor, error: Tensor) -> Run:
    """What the solves of a perturbation by this solver have in common; the arguments of :func:`_perturbed`."""
    solution, problem = perturbation.solution, perturbation.solution.problem
    augmented, near = problem.augment(perturbation.rho, solution.x), None
    if perturbation.loss is None:
        near = PerturbedPoints.of(solution, augmented, perturbation.cotangent, unit, solver)
    return Run(
        problem=problem,
        augmented=augmented,
        base=solution.point,
        active=solution.active_set(problem),
        states=solution.states,
        cotangent=perturbation.cotangent,
        base_error=error,
        error=error if solver == perturbation.solver else torch.minimum(error, _error(None, solver, problem)),
        solver=solver,
        is_even=solver == perturbation.solver,
        executor=perturbation.executor,
        envelope=perturbation.envelope,
        near=near,
        loss=perturbation.loss,
    )


def _shared(perturbation: Perturbation, run: Run) -> tuple[Tensor, Tensor]:
    """``shared_rows`` and ``shared_bounds`` of :class:`Perturbed`."""
    none = torch.zeros_like(run.error, dtype=torch.bool)
    if run.active is None or perturbation.may_stay:
        return none, none
    program, known_to = cast(ConicProblem, run.problem), perturbation.solution.known_to
    noise, x = run.noise(run.base_error, run.active.size()), program.in_own_units(cast(ConicPoint, run.base)).x
    if known_to is not None:  # beside constraints far away slacks of the size of x are no noise
        known = NOISE * (known_to + FINEST * maximum_norm(x))
        noise = torch.where(known < noise, known, noise)
    of_rows, of_bounds = shares_multipliers(program, run.active, noise, x)
    shared_bounds = leaves_multipliers_open(program, run.active, noise, x) | of_bounds
    return shared_bounds | of_rows, shared_bounds


def _shortened(run: Run, tau: Tensor, unit: Tensor, sides: Sides) -> tuple[Run, Tensor, Sides, Tensor, Tensor]:
    """Steps within the reach of the solutions' active sets, where they were not, and which elements have none."""
    kinked, unclear = torch.zeros_like(sides.above), torch.zeros_like(sides.above)
    elements = rows_where(_rough(sides))
    if not len(elements):
        return run, tau, sides, kinked, unclear
    rough_run, steps, tau = run.select(elements), tau[elements], tau.clone()
    solved_again = rough_run.with_base_solved_again()
    found = picked(sides, elements) if solved_again is rough_run else solved_again.sides(steps)
    shortest = torch.maximum(SHORTEST * steps, unit[elements] * solved_again.error / LOUDEST)
    for _ in range(ATTEMPTS):
        curved = torch.where(found.skew > CURVED, (0.1 * CURVED / found.skew).clamp(min=0.01), 1.0)
        shorter = steps * torch.minimum(0.5 * found.crossing, curved)
        chosen = rows_where(_rough(found) & (shorter >= shortest))
        if not len(chosen):
            break
        steps = replaced_elements(steps, chosen, shorter[chosen])
        found = found.replaced(chosen, solved_again.select(chosen).sides(steps[chosen]))
    left = rows_where(_rough(found))
    if len(left):
        judge = replace(solved_again.select(left), envelope="average")
        judged = picked(found, left) if run.envelope == "average" else judge.sides(steps[left])
        both = judged.above & judged.below
        kinked[elements[left]] = (judged.skew > CURVED) | ~both
        dual_skew = judge.skew(judged.plus, judged.minus, both, DUALS)
        unclear[elements[left]] = both & (judged.skew <= CURVED) & (dual_skew > CURVED)
    tau[elements] = steps
    base = run.base if solved_again is rough_run else replaced_elements(run.base, elements, solved_again.base)
    return replace(run, base=base), tau, sides.replaced(elements, found), kinked, unclear


def _rough(sides: Sides) -> Tensor:
    """(E,) whether the solution map is not smooth along a step."""
    return (sides.crossing <= 1.0) | (sides.skew > CURVED)


def _at(point: Point, base: Point, moved: Tensor) -> Point:
    """The point, with x where it was for elements that have not moved."""
    return point._make((torch.where(moved[:, None], point.x, base.x), *tuple(point)[1:]))


def _jumps(run: Run, tau: Tensor, unit: Tensor, sides: Sides, small: float) -> Tensor:
    """(E,) whether a solution went to another one.

    A response to a small tilt that is far is one only if the opposite tilt moves the solution the other way, and a
    tenth of it a tenth as far.
    """
    tilt = tau / unit
    far = _reach(run, sides)
    jumped = (tilt <= small) & (far > JUMP) & (far > 10 * tilt)
    elements = rows_where(jumped)
    if len(elements):
        chosen_run, both = run.select(elements), picked(sides, elements)
        if not (both.above & both.below).all():
            both = replace(chosen_run, envelope="average").sides(tau[elements])
        base, plus, minus = _observed_x(chosen_run, both)
        bend = maximum_norm((plus - base) + (minus - base))
        mirrored = (bend <= 0.5 * maximum_norm(plus - minus)) | ~(both.above & both.below)
        rest = rows_where(mirrored)
        if len(rest):  # the others have jumped whatever a tenth of the tilt does
            elements, chosen_run = elements[rest], chosen_run.select(rest)
            share = _reach(chosen_run, chosen_run.sides(0.1 * tau[elements])) / far[elements]
            jumped[elements] = ~((share > 0.05) & (share < 0.2))
    return jumped


def _reach(run: Run, sides: Sides) -> Tensor:
    """(E,) how far solutions move, relative to ``1 + |x|``."""
    base, plus, minus = _observed_x(run, sides)
    return torch.maximum(maximum_norm(plus - base), maximum_norm(minus - base)) / (1.0 + maximum_norm(base))


def _observed_x(run: Run, sides: Sides) -> list[Tensor]:
    """What is observed of x: at the solutions, and at both ends."""
    return [run.problem.observed(point, run.base, own_units=False).x for point in (run.base, sides.plus, sides.minus)]


def _error(solution: AnySolution | None, solver: AnySolver, problem: AnyProblem) -> Tensor:
    """(E,) the relative error of solutions: what is known of these, else what is typical of the solver."""
    known = None if solution is None else solution.known_to
    typical = torch.full((problem.batch_size,), solver.solution_error(problem), dtype=torch.float64)
    typical = typical.to(problem.device)
    return typical if known is None else torch.where(torch.isfinite(known), known.clamp(min=FINEST), typical)


def _refinement(solver: AnySolver, error: Tensor) -> Tensor:
    """(E,) the power of ``1 / FINER`` by which solves are to be tighter: where solutions are far from the tolerance."""
    return (error > 10 * solver.tolerance).long()


def _tightening(solver: AnySolver, relative_steps: Tensor) -> Tensor:
    """(E,) the same, as tight as a difference of solutions needs; few powers, so that workspaces are shared."""
    if not solver.tolerance:
        return torch.zeros_like(relative_steps, dtype=torch.int64)
    wanted = (ACCURACY * relative_steps / solver.tolerance).clamp(min=1e-12)
    powers = torch.ceil(-torch.log10(wanted) / math.log10(FINER) - 1e-9)
    return torch.where(wanted >= 0.1, 0.0, powers.clamp(1, 4)).long()  # not worth the set-up of new workspaces
