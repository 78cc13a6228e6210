"""Solutions of tilted problems by Newton's method from the solution of the problem itself, whoever found that.

The tilt ``τ <g, point>`` changes F of :mod:`lpgd.solvers.kkt.refinement` by ``τ g``.  With K, its derivative at the
solution,

    d = -K⁻¹ g,    (ξ, v)± = (ξ, v) ± τ d

are the solutions of both sides exactly as long as no active set changes and all cones are polyhedral, and up to O(τ²)
where cones curve: a few of Broyden's steps, by the same factorisation, take that away.  Where an active set changes
along the step, Newton's method with a system of its own follows it, for a few changes; of quadratic programs with a
definite P one factorisation serves all active sets (:mod:`lpgd.solvers.kkt.schur`), of linear programs one of the
basis all vertices along the tilt (:mod:`lpgd.solvers.kkt.vertices`).  A point counts where F is down to rounding, and
its system is regular: it is then the solution.  Whatever else there is, is left to a solver.

Each element is looked at for itself, and nothing depends on time: what is found does not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, from_numpy, rows_where
from lpgd.problems.base import States, maximum_norm
from lpgd.problems.conic.nearer import nearer
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import NEWTON, ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.problems.conic.units import Units
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver, ConicSolver
from lpgd.solvers.conic.rescue import merged
from lpgd.solvers.kkt.found import Found
from lpgd.solvers.kkt.mixed import MixedSystem, Part
from lpgd.solvers.kkt.newton import KeptFactor
from lpgd.solvers.kkt.points import Points, share_along
from lpgd.solvers.kkt.refinement import is_cheap
from lpgd.solvers.kkt.schur import SchurFactor, System
from lpgd.solvers.kkt.tilts import TiltedSolutions
from lpgd.solvers.kkt.vertices import TiltedVertices
from lpgd.status import Status

__all__ = ["ROUNDING", "PerturbedPoints"]

LARGEST_TILT, FARTHEST = 0.1, 10.0
"""Tilts by a larger share of the terms that they change are left to the solver: they are meant to find other points.
Where one factorisation serves all active sets it is the second share."""
LARGEST = 1000
"""Dense systems of more variables and rows are left to the solver."""
KNOWN = 1e-12
"""Solutions that are known less well, relative to their size, are none to start from: they are degenerate."""
ROUNDING, ACCURACY = 1e-12, 1e-4
"""What may be left of F relative to the point, and to the tilt."""
ENOUGH, ENOUGH_CURVED = 1e-15, 1e-14
"""With no more left than this, relative to the point, nothing is gained by another step; projections onto curved cones
round."""
CHORDS, FALL = 8, 0.3
"""Steps with the first system, and the share to which each has to reduce |F|."""
STEPS = 4
"""Steps with systems of their own."""
EQUALITIES = 0.5
"""Equalities for such a share of bounded variables leave a solver that is quick again little to do, and every system of
Newton's method large: 150 programs of 64 variables, both sides, take 0.02 s by DAQP, and 0.12 s by active sets."""
CHANGES, SHARE = 2, 0.1
"""Newton's method is tried where so many inequalities change, or a share of all of them."""


@dataclass(frozen=True, eq=False)
class PerturbedPoints:
    """Newton's method from the solutions of E elements, along a tilt.

    Attributes:
        problem: E elements, augmented where ρ > 0; its solutions are ``point`` and ``slack``.
        point, slack: (E, ·) each.
        cotangent: the tilt is a multiple of it.
        unit: (E,) the step at which the tilt is as large as the terms that it changes.
        fit: (E,) elements whose solution is known to rounding.
        known: (E,) what is left of the optimality conditions at the solutions.
        solver: who is asked for what Newton's method does not find.
        kept: the systems of refinement's last steps, where they are those of this problem.
    """

    problem: ConicProblem
    point: ConicPoint
    slack: Tensor
    cotangent: ConicPoint
    unit: Tensor
    fit: Tensor
    known: Tensor
    solver: ConicSolver
    kept: tuple[KeptFactor, ...] = ()

    @classmethod
    def of(
        cls, solution: AnySolution, augmented: AnyProblem, cotangent: Any, unit: Tensor, solver: AnySolver
    ) -> PerturbedPoints | None:
        """Where to start from; None where no element is known well enough, or a step costs as much as a solve.

        Args:
            solution: of E elements.
            augmented: their problem with ρ, if there is one.
            cotangent: (E, ·) each.
            unit: (E,) ``tilt_unit``.
            solver: who is asked otherwise; one that is not to ``refine``, or is as quick, answers all by itself.
        """
        if not isinstance(solution, ConicSolution) or not isinstance(solver, ConicSolver) or not solver.refine:
            return None
        augmented = cast(ConicProblem, augmented)
        structure = augmented.structure
        if solver.is_quick_again and structure.has_bounds and structure.cones.zero >= EQUALITIES * structure.n:
            return None
        if solution.known_to is None or structure.has_integers or augmented.device.type != "cpu" or not structure.n:
            return None
        if structure.n + structure.m > LARGEST and not is_cheap(structure):
            return None
        fit = solution.known_to <= KNOWN
        if not bool(fit.all()):
            fit = solution.known_to <= KNOWN * solution.problem.in_own_units(solution.point).largest().clamp(min=1.0)
        if solution.statuses.count(Status.SOLVED) < solution.batch_size:
            fit = fit & torch.tensor([status is Status.SOLVED for status in solution.statuses])
        if not structure.cones.is_polyhedral:
            # In the unit of a constraint far away a solution is known to fewer digits than it seems.
            far = nearer(augmented, solution.point, solution.slack)
            fit = fit if far is None else fit & far.reach.isnan()
        if not bool(fit.any()):
            return None
        tilt = ConicPoint(*(tensor.to(solution.x.dtype) for tensor in cotangent))
        kept = ()
        if augmented is solution.problem and not structure.cones.is_polyhedral:
            kept = tuple(factor for factor in solution.systems if isinstance(factor, KeptFactor))
        found = cls(augmented, solution.point, solution.slack, tilt, unit, fit, solution.known_to, solver, kept)
        if not solver.is_quick_again:
            return found
        # Such a solver is asked where each active set would take a factorisation of its own.
        fine = fit & found.fine
        if torch.equal(fine, fit):
            return found
        return replace(found, fit=fine) if bool(fine.any()) else None

    def select(self, elements: Tensor) -> PerturbedPoints:
        """The same for some elements."""
        return PerturbedPoints(
            self.problem.select(elements), self.point.select(elements), self.slack[elements],
            self.cotangent.select(elements), self.unit[elements], self.fit[elements],
            self.known[elements], self.solver,            tuple(kept.select(elements) for kept in self.kept),
        )  # fmt: skip

    def solve(self, tilted: ConicProblem, steps: Tensor, states: States, executor: Executor | None) -> ConicSolution:
        """The solutions of ``tilted``, the problem tilted by ``steps`` (k E,), by Newton's method or by the solver."""
        solver = self.solver
        copies = steps.shape[0] // max(self.problem.batch_size, 1)
        wanted = self.fit.repeat(copies) & (steps.abs() <= self.longest.repeat(copies))
        if not bool(wanted.any()):
            return solver.solve(tilted, states, executor)
        found = self._found(steps, wanted)
        unsolved = elements_where(~found.solved)
        if len(unsolved) == steps.shape[0]:
            return solver.solve(tilted, states, executor)
        answer = self._solution(tilted, found)
        if not unsolved:
            return answer
        unsolved_states = tuple(states[element % len(states)] for element in unsolved) if len(states) else ()
        other = solver.solve(tilted.select(as_index(unsolved, tilted.device)), unsolved_states, executor)
        return merged(replace(answer, asked=other.asked), unsolved, other, [True] * len(unsolved), keep_states=True)

    # -- in units of order 1 --------------------------------------------------------------------------------------

    @cached_property
    def units(self) -> Units:
        return self.problem.units

    @cached_property
    def _inside(self) -> ConicProblem:
        return self.units.apply(self.problem)

    @cached_property
    def _tilt(self) -> ConicPoint:
        return self.units.tilt_in(self.problem, self.cotangent)

    @cached_property
    def _start(self) -> tuple[Tensor, Tensor]:
        """(ξ, v) of the solutions."""
        point = self.units.point_in(self.problem, self.point)
        xi, v = Points(self._inside).start(point, self.units.slack_in(self.problem, self.slack))
        return torch.where(self.fit[:, None], xi, 0.0), torch.where(self.fit[:, None], v, 0.0)

    @cached_property
    def _factor(self) -> SchurFactor | None:
        """What serves every active set, where there is such a factorisation."""
        return SchurFactor.of(self._inside)

    @property
    def fine(self) -> Tensor:
        """(E,) elements that have one."""
        if self._factor is None:
            return torch.zeros_like(self.fit)
        fine = self._factor.fine
        return fine.repeat(self.fit.shape[0] // fine.shape[0])

    @cached_property
    def straight(self) -> TiltedSolutions | None:
        """The solutions along the tilt of elements with a definite P; None where there is no factor for them."""
        inside, factor = self._inside, self._factor
        if factor is None:
            return None
        return TiltedSolutions(inside, factor, *self._start, self._tilt, self.known)

    @cached_property
    def _system(self) -> System:
        """At the solutions, or as near to them as a point that refinement has been to."""
        points, count = Points(self._inside), self.problem.batch_size
        left, parts = torch.ones(count, dtype=torch.bool), list[Part]()
        for kept in self.kept:
            places = rows_where(kept.valid & from_numpy(kept.factored.regular))
            if places.shape[0]:
                left[kept.elements[places]] = False
                parts.append(Part(kept.elements[places], kept.factored, places))
        others = rows_where(left)
        if others.shape[0] == count:
            return points.factored(*self._start)
        if others.shape[0]:
            xi, v = (tensor[others] for tensor in self._start)
            parts.append(Part(others, points.select(others).factored(xi, v)))
        return MixedSystem(parts, count)

    @cached_property
    def _direction(self) -> tuple[Tensor, Tensor]:
        """``-K⁻¹ g``, NaN where K is singular."""
        d_xi, d_v = Points(self._inside).chord(self._system, self._tilt.x, self._tilt.y, self._tilt.z)
        regular = from_numpy(self._system.regular)[:, None]
        return torch.where(regular, d_xi, torch.nan), torch.where(regular, d_v, torch.nan)

    def _found(self, steps: Tensor, wanted: Tensor) -> Found:
        straight, vertices = self.straight, self._vertices
        if vertices is not None:
            return vertices.after(steps, wanted, self.accepted)
        if straight is None:
            return self._followed(steps, wanted)
        copies = wanted.shape[0] // self.problem.batch_size
        accepted = self.accepted(steps, from_numpy(straight.size))
        reached = straight.after(steps, wanted & straight.regular.repeat(copies), accepted)
        found = Found(reached.point, reached.slack, reached.error, reached.solved, reached.taken)
        others = rows_where(self.fit & ~self.fine)
        if others.shape[0]:
            places = torch.arange(steps.shape[0]).reshape(-1, self.problem.batch_size)[:, others].ravel()
            found = found.replaced(places, self.select(others)._followed(steps[places], wanted[places]))
        return found

    @cached_property
    def _vertices(self) -> TiltedVertices | None:
        """The vertices along the tilt of small dense linear programs."""
        fits = TiltedVertices.fits(self._inside, self._tilt)
        return TiltedVertices(self._inside, *self._start, self._tilt) if fits else None

    @property
    def longest(self) -> Tensor:
        """(E,) the longest steps that Newton's method is tried for."""
        return torch.where(self.fine, FARTHEST, LARGEST_TILT) * self.unit

    def accepted(self, steps: Tensor, size: Tensor) -> Tensor:
        """(k E,) what may be left of F, at points of a size (E,) or (k E,)."""
        share = (steps.abs().reshape(-1, self.problem.batch_size) / self.unit).clamp(max=1.0)
        return (size.reshape(-1, self.problem.batch_size) * (ACCURACY * share).clamp(max=ROUNDING)).ravel()

    def _followed(self, steps: Tensor, wanted: Tensor) -> Found:
        """The points by Newton's method in (ξ, v), whatever the cones."""
        copies = steps.shape[0] // self.problem.batch_size
        points = Points(self._inside.tilt(steps, self._tilt))
        base_xi, base_v = (tensor.repeat(copies, 1) for tensor in self._start)
        d_xi, d_v = (tensor.repeat(copies, 1) for tensor in self._direction)
        xi, v = base_xi + steps[:, None] * d_xi, base_v + steps[:, None] * d_v
        wanted = wanted & torch.isfinite(xi).all(-1) & torch.isfinite(v).all(-1)
        xi, v = torch.where(wanted[:, None], xi, base_xi), torch.where(wanted[:, None], v, base_v)
        changes = (Points(self._inside).pieces(*self._start).repeat(copies, 1) != points.pieces(xi, v)).sum(-1)
        error, slope, row_error = points.residual(xi, v)
        size = torch.maximum(maximum_norm(xi), maximum_norm(v)).clamp(min=1.0)
        accepted = self.accepted(steps, size)
        taken = wanted.long()
        structure = self._inside.structure
        curved = not structure.cones.is_polyhedral
        # Of linear and quadratic programs with the same active set there is nothing but rounding to take away.
        going = wanted & (error > ENOUGH * size) & (curved | (changes == 0))
        moves = [torch.where(wanted[:, None], steps[:, None] * torch.cat([d_xi, d_v], 1), 0.0)]
        enough = ENOUGH_CURVED if curved else ENOUGH
        going &= error > enough * size
        for _ in range(CHORDS if curved else 1):
            if not bool(going.any()):
                break
            left = [torch.where(going[:, None], tensor, 0.0) for tensor in (slope, row_error)]
            move = self._broyden(*left, moves)
            move = torch.where((going & torch.isfinite(move).all(-1))[:, None], move, 0.0)
            new = xi + move[:, : xi.shape[1]], v + move[:, xi.shape[1] :]
            found = points.residual(*new)
            better = going & (found[0] <= FALL * error)
            xi, v, slope, row_error = (
                torch.where(better[:, None], fresh, old)
                for fresh, old in zip((*new, *found[1:]), (xi, v, slope, row_error), strict=True)
            )
            error = torch.where(better, found[0], error)
            moves.append(move)
            taken += better.long()
            going = better & (error > enough * size)
        solved = wanted & (error <= accepted)
        limit = max(
            CHANGES, SHARE * (structure.cones.nonnegative + len(structure.lower_index) + len(structure.upper_index))
        )
        worth = wanted & ~solved & (changes <= limit)
        if structure.traits.is_linear_program:
            worth &= changes == 0  # with another active set there is another vertex, and no system leads there
        todo = worth.nonzero()[:, 0]
        if todo.shape[0]:
            self._newton(points, todo, xi, v, error, accepted, size, solved, taken)
        return Found(*points.point(xi, v), error, solved, taken)

    def _broyden(self, slope: Tensor, row_error: Tensor, moves: Sequence[Tensor]) -> Tensor:
        """The next step (k E, n + m) of Broyden's method, from what is left of F and the steps so far.

        It corrects the systems of the solutions by what the steps have shown of F, one rank at a time: with
        ``H`` the inverse of the corrected system, ``H⁺ = H + (s⁺ sᵀ / |s|²) H`` (Kelley, Iterative methods for linear
        and nonlinear equations, 1995, section 7.3).
        """
        count = self.problem.batch_size
        chords = [
            torch.cat(
                Points(self._inside).chord(
                    self._system, slope[start : start + count], row_error[start : start + count]
                ),
                1,
            )
            for start in range(0, slope.shape[0], count)
        ]
        move = torch.cat(chords)
        for last, new in pairwise(moves):
            move = move + new * share_along(last, move)
        return move / (1.0 - share_along(moves[-1], move))

    def _newton(
        self, points: Points, todo: Tensor, xi: Tensor, v: Tensor, error: Tensor, accepted: Tensor, size: Tensor,
        solved: Tensor, taken: Tensor,
    ) -> None:  # fmt: skip
        """Whole steps of the elements ``todo`` with systems of their own; what is found is written to the tensors."""
        for _ in range(STEPS):
            chosen = points.select(todo)
            start_xi, start_v = xi[todo], v[todo]
            _, slope, row_error = chosen.residual(start_xi, start_v)
            system = chosen.factored(start_xi, start_v)
            d_xi, d_v = chosen.chord(system, slope, row_error)
            fine = from_numpy(system.regular) & torch.isfinite(d_xi).all(-1) & torch.isfinite(d_v).all(-1)
            new_xi, new_v = (torch.where(fine[:, None], old + d, old) for old, d in ((start_xi, d_xi), (start_v, d_v)))
            found = chosen.residual(new_xi, new_v)[0]
            moved = todo[fine]
            xi[moved], v[moved], error[moved] = new_xi[fine], new_v[fine], found[fine]
            taken[moved] += 1
            # The system has to be that of the point that is found, so that there is no other solution.
            same = (chosen.pieces(start_xi, start_v) == chosen.pieces(new_xi, new_v)).all(-1)
            solved[todo] = fine & same & (found <= accepted[todo])
            todo = todo[fine & ~solved[todo]]
            if not todo.shape[0]:
                return

    def _solution(self, tilted: ConicProblem, found: Found) -> ConicSolution:
        """What was found, as a solution of the tilted problems; NaN where nothing was."""
        count, size = self.problem.batch_size, tilted.batch_size
        points, slacks = [], []
        for start in range(0, size, count):
            side = slice(start, start + count)
            points.append(self.units.point_out(self.problem, ConicPoint(*(tensor[side] for tensor in found.point))))
            slacks.append(self.units.slack_out(self.problem, found.slack[side]))
        point = ConicPoint(*(torch.cat(columns) for columns in zip(*points, strict=True)))
        nothing = np.zeros(size)
        return ConicSolution(
            tilted,
            **point._asdict(),
            slack=torch.cat(slacks),
            statuses=tuple(Status.SOLVED if solved else Status.NUMERICAL_ERROR for solved in found.solved.tolist()),
            iterations=np.zeros(size, dtype=np.int64),
            setup_seconds=nothing,
            solve_seconds=nothing.copy(),
            states=(None,) * size,
            asked=NEWTON,
            solvers=(NEWTON,) * size,
            proofs=("",) * size,
            known_to=found.error,
            known_before=found.error.clone(),
            refined=found.taken,
        )
