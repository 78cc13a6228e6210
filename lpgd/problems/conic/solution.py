"""What a solver returns for a batch of conic programs, and how it checks itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, flags
from lpgd.problems.base import States
from lpgd.problems.conic.activity import ActiveSet, active_set
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.residuals import Residuals, residuals_of
from lpgd.problems.conic.structure import ConicPoint
from lpgd.problems.solution import AnyProblem, Solution
from lpgd.status import Status

__all__ = ["NEWTON", "ConicSolution", "Violation"]

NEWTON = "NEWTON"
"""What :attr:`ConicSolution.solvers` says of points that Newton's method found, and no solver was asked for."""


class Violation(NamedTuple):
    """By how much the solutions of a batch violate their constraints, at the least: zero for feasible elements.

    Attributes:
        size: (B,) its Euclidean norm.
        rows: (B, m) what is added to b: ``A x + s = b + rows`` with s in the cone.
        lower, upper: (B, n) how far variables are below and above their bounds.
    """

    size: Tensor
    rows: Tensor
    lower: Tensor
    upper: Tensor

    def restored(self, restore: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Violation:
        """The same in the shape and the type of a call's inputs, as ``restore`` makes them."""
        return Violation(*(restore(values, tuple(values.shape[1:])) for values in self))


@dataclass(frozen=True, eq=False, repr=False)
class ConicSolution(Solution[ConicProblem, ConicPoint]):
    """Primal and dual solutions of a batch of B conic programs, with one status for each element.

    Attributes:
        problem: the batch that was solved.
        x: (B, n) primal variables; NaN where there is no solution.
        y: (B, m) multipliers of the rows of A, in K*.
        z: (B, n) signed multipliers of the bounds: positive at an upper, negative at a lower bound.
        slack: (B, m) the solver's own slack, in K; the slack as a function of x is :attr:`s`.
        statuses: B statuses.
        iterations: (B,) iterations of the solver.
        setup_seconds, solve_seconds: (B,) time in set-up (0 where it was re-used) and in the solver.
        states: B opaque warm-start states; None where the solver has none.
        systems: what the solver factorised at the solutions, for implicit differentiation; it belongs to this call.
        asked: the name of the solver that was asked.
        solvers: B names of the solvers that answered: another one where that one gave up, and :data:`NEWTON` where
            Newton's method found a perturbed solution from the one before.
        proofs: for each element without a solution what shows it: ``"certificate"``, ``"two solvers"`` that agree,
            ``"data"`` (crossed bounds, an objective that is not convex), ``"search"`` (of integers), or nothing.
        known_to: (B,) what is left of the optimality conditions, in units of order 1; NaN for integer programs.
        known_before: (B,) the same of the solver's own answer, before it was refined.
        refined: (B,) how many of Newton's steps were taken from the solver's answer.
        isolated: (B,) whether these steps show that it is the only solution nearby.
        sharpened: (B,) whether the solver that was asked solved the element, and another one's answer, which is known
            far better, was taken.
        rays: what solvers take for proofs, (B, ·) each: multipliers y of elements that are said to be infeasible, a
            direction x of unbounded ones; None where there are no such elements.
    """

    problem: ConicProblem
    x: Tensor
    y: Tensor
    z: Tensor
    slack: Tensor
    statuses: tuple[Status, ...]
    iterations: IntArray
    setup_seconds: FloatArray
    solve_seconds: FloatArray
    states: States
    systems: tuple[Any, ...] = ()
    asked: str = ""
    solvers: tuple[str, ...] = ()
    proofs: tuple[str, ...] = ()
    known_to: Tensor | None = None
    known_before: Tensor | None = None
    refined: Tensor | None = None
    isolated: Tensor | None = None
    sharpened: Tensor | None = None
    rays: ConicPoint | None = None

    _tensors: ClassVar[tuple[str, ...]] = ("x", "y", "z", "slack", "iterations", "setup_seconds", "solve_seconds")

    @property
    def point(self) -> ConicPoint:
        return ConicPoint(self.x, self.y, self.z)

    def select(self, elements: Tensor, problem: AnyProblem | None = None) -> Self:
        """The solutions of these elements, with those of their systems that can be told apart."""
        records = {name: getattr(self, name) for name in ("solvers", "proofs")}
        kept: dict[str, Any] = {
            name: tuple(record[i] for i in elements) if record else record for name, record in records.items()
        }
        for name in ("known_to", "known_before", "refined", "isolated", "sharpened"):
            values = getattr(self, name)
            kept[name] = values if values is None else values[elements.to(values.device)]
        kept["rays"] = None if self.rays is None else self.rays.select(elements.to(self.rays.x.device))
        systems = tuple(system.select(elements) for system in self.systems if hasattr(system, "select"))
        return replace(super().select(elements, problem), systems=systems, **kept)

    def parts(self, count: int) -> Sequence[Self]:
        if any(hasattr(system, "select") for system in self.systems):
            return super().parts(count)
        size = self.batch_size // count
        return (
            [self._between(start, start + size) for start in range(0, count * size, size)] if size else [self] * count
        )

    def _between(self, start: int, stop: int) -> Self:
        """The solutions of these elements, which are views."""
        changes: dict[str, Any] = {}
        names = ("solvers", "proofs", "known_to", "known_before", "refined", "sharpened")
        for name in (*self._tensors, *self._tuples, *names):
            values = getattr(self, name)
            changes[name] = values if values is None else values[start:stop]
        rays = None if self.rays is None else ConicPoint(*(ray[start:stop] for ray in self.rays))
        return replace(self, problem=self.problem.between(start, stop), systems=(), rays=rays, **changes)

    @property
    def rescued(self) -> dict[str, int]:
        """How many elements were solved by another solver than the one that was asked and left them, by its name."""
        if self.solvers.count(self.asked) == len(self.solvers):
            return {}
        left = [True] * len(self.solvers) if self.sharpened is None else flags(~self.sharpened)
        every = zip(self.solvers, self.statuses, left, strict=False)
        solved = (name for name, status, is_left in every if status.usable and is_left)
        return {name: count for name, count in Counter(solved).items() if name not in (self.asked, NEWTON)}

    @property
    def by_newton(self) -> Tensor:
        return torch.tensor([name == NEWTON for name in self.solvers], dtype=torch.bool, device=self.x.device)

    def active_set(self, units_of: AnyProblem) -> ActiveSet | None:
        """Which rows and bounds are active, in the units of a problem with the same matrices and B elements.

        None for integer programs, whose multipliers are not their own.
        """
        if self.problem.structure.has_integers:
            return None
        return active_set(cast(ConicProblem, units_of), self.point, self.slack)

    @property
    def violation(self) -> Violation | None:
        """By how much elements violate their constraints; None where none was to be relaxed."""
        return None

    @cached_property
    def s(self) -> Tensor:
        """(B, m) slack ``b - A x``."""
        return self.problem.slack(self.x)

    @property
    def error(self) -> Tensor:
        """(B,) the worst residual: of an integer program the primal one, as its multipliers prove nothing."""
        return self.residuals.primal if self.problem.structure.has_integers else self.residuals.worst

    @cached_property
    def residuals(self) -> Residuals:
        """How far the solution is from optimal, whatever the solver said; NaN where there is none."""
        units = self.problem.units
        return residuals_of(units.apply(self.problem), units.point_in(self.problem, self.point))
