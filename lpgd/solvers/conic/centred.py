"""The coordinates in which a batch of conic programs is solved: from its data, and from what comes of a solve.

Data of order 1 may have solutions that are not: ``Σ log(x) ≥ -40`` has x of 1e-6, of which an absolute residual of 1e-9
says nothing.  So an answer is looked at where it is on its cones.  If that is far from where all is of one size, the
program is solved again in coordinates in which the answer stands in the middle of its cones, and the variables begin at
it; until an answer is known well enough in coordinates of its own, or it is INACCURATE.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, as_index, flags, from_numpy
from lpgd.problems.conic.coordinates.balance import Balance
from lpgd.problems.conic.coordinates.balancing import Balancing
from lpgd.problems.conic.coordinates.positions import (
    Found,
    Position,
    found_on_cones,
    position_of,
    position_of_ray,
    strain_there,
    surely_known,
)
from lpgd.problems.conic.nearer import guessed
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData
from lpgd.solvers.conic.posed import VERDICTS
from lpgd.solvers.conic.rescue import OPEN, merged
from lpgd.solvers.kkt.refinement import optimality_residual
from lpgd.status import Status

__all__ = ["Search", "Solve"]

SMALL = 2.0**-12
"""Solutions below this are small in coordinates in which the data are of order 1."""
STRAINED = 1e-7
"""Answers of which more is left of the optimality conditions, where they are, are looked at."""
MOVED = 6.0
"""Exponents of two by which an answer, or a proof that there is none, may be out of the middle of its cones."""
FAR = 14.0
"""Exponents of two by which sizes of one cone may differ."""
SURE = 1e-12
"""What is left of the optimality conditions, relative to the point, where it is known to rounding."""
WORSE, MORE = 1e-7, 100.0
"""An answer that leaves more than the first number of the optimality conditions in the batch's own coordinates, and so
many times what another one leaves, is worse than that."""
VAGUE = 1e-3
"""Errors relative to the lengths that matter, of answers that are no more than INACCURATE."""
ROUNDS = 5
"""So often the coordinates of an element follow its answer."""


class Solve(Protocol):
    """Solves some elements, from the warm start of the call or cold; alone: without asking other solvers."""

    def __call__(self, problem: ConicProblem, *, cold: bool, alone: bool) -> ConicSolution: ...


@dataclass(frozen=True, eq=False)
class Search:
    """The search for coordinates of one call.

    Args:
        balancing: of the structure.
        data, size: of the batch, plain.
        solve: of the call.
        augmented: the gradient method adds something to the objective, which is to be of the variables as they are.
        alone: no other solver is asked.
    """

    balancing: Balancing
    data: ConicData
    size: int
    solve: Solve
    augmented: bool
    alone: bool = False

    def found(self) -> tuple[Balance | None, ConicSolution]:
        """Coordinates, and the solution there; None for the batch's own.

        What a solver leaves is looked at in other coordinates first, which takes milliseconds, and other solvers are
        asked only where that leaves something: one of first order takes seconds to end at its limit.
        """
        quick = replace(self, alone=True)
        found = quick.centred(*quick.from_data())
        return self.centred(*self.from_data()) if any(status in OPEN for status in found[1].statuses) else found

    def from_data(self) -> tuple[Balance | None, ConicSolution]:
        """The coordinates that the data ask for, and the solution there; None for the batch's own.

        Elements that are not solved in coordinates in which all data are of one size are solved once more in those
        where large right-hand sides belong to constraints that are loose; those whose solutions are small, in
        coordinates of their size, and they are INACCURATE if that fails.

        Constraints that are far away, by the data, ask for none, unless a solution touches them.
        """
        moved = guessed(ConicProblem(self.balancing.structure, self.data, self.size))
        if moved is None:
            return self._by(self.data)
        balance, solution = self._by(moved.sizes)
        own, slack = solution.point, solution.slack
        if balance is not None:
            own, slack = balance.point_out(own), balance.slack_out(slack)
        touched = flags(moved.touches(own, slack))
        elements = [
            element
            for element, status in enumerate(solution.statuses)
            if status is not Status.SOLVED or touched[element]
        ]
        if not elements:
            return balance, solution
        exponents = self.balancing(self.data, self.size)
        if balance is None:
            balance, solution = self._in_plain(solution)
        other = balance.plain() if exponents is None else self._of(exponents)
        balance, solution, _ = self._again(balance, solution, other, elements, _is_solved)
        return balance, solution

    def _by(self, data: ConicData) -> tuple[Balance | None, ConicSolution]:
        """The same in coordinates that these data ask for."""
        exponents = self.balancing(data, self.size)
        if exponents is None:
            return None, self.solve(
                ConicProblem(self.balancing.structure, self.data, self.size), cold=False, alone=self.alone
            )
        balance = self._of(exponents)
        solution = self.solve(balance.problem(self.data), cold=False, alone=self.alone)
        # A point that is far smaller than its coordinates is known no better than they are.
        largest = solution.x.abs().amax(1).cpu()
        unfit = [
            status is not Status.SOLVED or float(length) < SMALL
            for status, length in zip(solution.statuses, largest, strict=True)
        ]
        elements = [element for element, is_unfit in enumerate(unfit) if is_unfit]
        if not elements:
            return balance, solution
        solved = torch.tensor([status is Status.SOLVED for status in solution.statuses])[:, None]
        own = balance.point_out(solution.point).x.cpu()
        exponents = self.balancing(self.data, self.size, near=torch.where(solved, own, torch.nan).numpy())
        other = balance.plain() if exponents is None else self._of(exponents)
        balance, solution, _ = self._again(balance, solution, other, elements, _is_solved)
        return balance, solution

    def centred(self, balance: Balance | None, solution: ConicSolution) -> tuple[Balance | None, ConicSolution]:
        """Coordinates that follow from the answers, where these are far from the middle of their cones."""
        elements = self._doubtful(solution, list(range(self.size)))
        if not elements:
            return balance, solution
        before = balance, solution
        if balance is None:
            balance, solution = self._in_plain(solution)
        moved = set[int]()
        for _ in range(ROUNDS):
            other, elements = self._around(balance, solution, elements)
            if not elements:
                break
            balance, solution, taken = self._again(balance, solution, other, elements, _is_nearer)
            moved.update(taken)
            elements = self._doubtful(solution, taken)
        else:
            solution = _inaccurate(solution, self._around(balance, solution, elements)[1])
        if any(solution.statuses[element].has_iterate for element in moved):
            return balance, solution
        # Who has no point needs no coordinates, and changes no bit of the others.
        return before[0], replace(before[1], statuses=solution.statuses, proofs=solution.proofs)

    def plain_where(
        self, failures: Collection[Status], balance: Balance | None, solution: ConicSolution
    ) -> tuple[Balance | None, ConicSolution]:
        """The same with elements that end so, and have no point, in the coordinates that they have by themselves."""
        elements = [element for element, status in enumerate(solution.statuses) if status in failures]
        if balance is None or not elements:
            return balance, solution
        balance = balance.where(elements, balance.plain())
        return balance, replace(solution, problem=balance.problem(self.data), systems=())

    def _in_plain(self, solution: ConicSolution) -> tuple[Balance, ConicSolution]:
        """The solution of the batch itself as one in coordinates that are its own."""
        balance = self._of(np.zeros((1, self.balancing.structure.n + self.balancing.turning.size)))
        return balance, replace(solution, problem=balance.problem(self.data), systems=())

    def _of(self, exponents: FloatArray, origin: FloatArray | None = None) -> Balance:
        balance = Balance.of(self.balancing, self.size, exponents, origin).to(self.data.q.device)
        return balance.for_rows_alone() if self.augmented else balance

    def _again(
        self,
        balance: Balance,
        solution: ConicSolution,
        other: Balance,
        elements: list[int],
        is_better: Callable[[Status, Status], bool],
    ) -> tuple[Balance, ConicSolution, list[int]]:
        """What there is, with answers in other coordinates where they are better, and which those are.

        Elements whose answers are not, and were SOLVED, are INACCURATE, unless the other answer is worse in the batch's
        own coordinates, and theirs are not vague.
        """
        index = as_index(elements, solution.x.device)
        again = self.solve(other.problem(self.data).select(index), cold=True, alone=self.alone)
        kept = self._is_worse(balance, other, solution.select(index), again, index)
        taken = [
            not is_kept and is_better(status, solution.statuses[element])
            for element, status, is_kept in zip(elements, again.statuses, kept, strict=True)
        ]
        chosen = [element for element, is_taken in zip(elements, taken, strict=True) if is_taken]
        clear = np.zeros(len(elements), dtype=bool)
        if any(kept):
            before = solution.select(index)
            clear = np.array(kept) & (_is_sure(before) | (strain_there(before, self._found(before)) <= VAGUE))
        settled = zip(elements, taken, clear.tolist(), strict=True)
        solution = _inaccurate(solution, [element for element, *reasons in settled if not any(reasons)])
        if not chosen:
            return balance, solution, chosen
        balance = balance.where(chosen, other)
        solution = merged(solution, elements, again, taken, keep_states=True)
        return balance, replace(solution, problem=balance.problem(self.data)), chosen

    def _is_worse(
        self, balance: Balance, other: Balance, solution: ConicSolution, again: ConicSolution, index: Tensor
    ) -> list[bool]:
        """Elements that are SOLVED in one solution, and of which another is worse in the batch's own coordinates.

        In others a cost may be too small for a tolerance.
        """
        if not any(status is Status.SOLVED for status in solution.statuses):
            return [False] * len(solution.statuses)
        problem = ConicProblem(self.balancing.structure, self.data, self.size).select(index)
        left: list[Tensor] = []
        for coordinates, found in ((balance, solution), (other, again)):
            own = coordinates.select(index)
            point = problem.units.point_in(problem, own.point_out(found.point))
            slack = problem.units.slack_in(problem, own.slack_out(found.slack))
            left.append(
                optimality_residual(problem.units.apply(problem), point, slack) / point.largest().clamp(min=1.0)
            )
        solved = torch.tensor([status is Status.SOLVED for status in solution.statuses]).to(left[0].device)
        return flags(solved & ~(left[1] <= (MORE * left[0]).clamp(min=WORSE)))

    def _doubtful(self, solution: ConicSolution, elements: list[int]) -> list[int]:
        """Elements whose points are not known well enough where they are, and those said to have no solution.

        Points that are far from the middle may be known, but what is smaller than the rest is taken for zero by what
        looks for active sets and kinks.
        """
        statuses = solution.statuses
        clear = surely_known(solution, self.balancing.turned, STRAINED, FAR)
        vague = [
            element
            for element in elements
            if not clear[element] and statuses[element].has_iterate and statuses[element] is not Status.TIME_LIMIT
        ]
        if vague:
            some = solution.select(as_index(vague, solution.x.device))
            found = self._found(some)
            strained = ~(np.minimum(found.strain, strain_there(some, found)) <= STRAINED)
            doubt = ((found.spread > FAR) & ~_is_sure(some)) | strained
            vague = [element for element, is_doubtful in zip(vague, doubt.tolist(), strict=True) if is_doubtful]
        rays = [] if solution.rays is None else [element for element in elements if statuses[element] in VERDICTS]
        return vague + rays

    def _found(self, solution: ConicSolution) -> Found:
        return found_on_cones(solution, self.balancing.turned)

    def _position(self, slack: FloatArray, matters: BoolArray) -> Position:
        return position_of(self.balancing.structure.cones, self.balancing.turned, slack, matters)

    def _around(self, balance: Balance, solution: ConicSolution, elements: list[int]) -> tuple[Balance, list[int]]:
        """Coordinates of the batch that are, for some elements, those of their points or of what shows their verdicts.

        They are for elements whose points are far from the middle of their cones, in units of order 1.
        """
        n, problem, found = self.balancing.structure.n, solution.problem, self._found(solution)
        slacks = problem.units.slack_out(problem, from_numpy(found.slack).to(problem.device)).cpu().numpy()
        x, present = balance.point_out(solution.point).x, balance.exponents.expand(self.size, -1).cpu().numpy()
        exponents, origin, out = present.copy(), np.zeros((self.size, n)), list[int]()
        for element in elements:
            if solution.statuses[element] in VERDICTS:
                position = self._position_of_ray(solution, element)
                if not position.is_beyond(MOVED):
                    continue
            else:
                if not self._position(found.slack[element], found.matters[element]).is_beyond(MOVED):
                    continue
                position = self._position(slacks[element], found.matters[element])
                origin[element] = x[element].cpu().numpy()
            position = position._replace(parameters=position.parameters + present[element, n:])
            exponents[element] = self.balancing.around(self.data, element, position)
            out.append(element)
        return self._of(exponents, origin), out

    def _position_of_ray(self, solution: ConicSolution, element: int) -> Position:
        assert solution.rays is not None
        cones, is_dual = self.balancing.structure.cones, solution.statuses[element] is Status.INFEASIBLE
        if is_dual:
            ray = solution.rays.y[element]
        else:
            problem = solution.problem.select(as_index([element], solution.x.device))
            constraint = problem.structure.constraint
            ray = -constraint.matvec(problem.data.A, solution.rays.x[element : element + 1])[0]
        values = np.nan_to_num(ray.cpu().numpy(), posinf=0.0, neginf=0.0)
        position = position_of_ray(cones, self.balancing.turned, values, is_dual=is_dual)
        return position._replace(known=position.known & self.balancing.turning)


def _is_sure(solution: ConicSolution) -> BoolArray:
    """(B,) points that are known to rounding, and whose optimality conditions are regular by far.

    Answers in other coordinates can only be worse: on flows of 1e-6 to 1e6 along a network of 33 nodes they were off by
    1e-11 to 0.4.  Of exponential cones that says nothing: what is small there may be taken for the end of a cone.
    """
    if solution.known_to is None or solution.isolated is None or solution.problem.structure.cones.exponential:
        return np.zeros(solution.batch_size, dtype=bool)
    size = solution.problem.in_own_units(solution.point).largest().clamp(min=1.0)
    return (solution.isolated & (solution.known_to <= SURE * size)).cpu().numpy()


def _is_solved(status: Status, before: Status) -> bool:
    return status is Status.SOLVED or (status.usable and not before.usable)


def _is_nearer(status: Status, before: Status) -> bool:
    return status.usable or (status in VERDICTS and before in VERDICTS)


def _inaccurate(solution: ConicSolution, elements: list[int]) -> ConicSolution:
    """The solution, of which some elements are no more than INACCURATE, and have no solution for no known reason."""
    statuses = list(solution.statuses)
    for element in elements:
        if statuses[element] is Status.SOLVED:
            statuses[element] = Status.INACCURATE
    return solution if tuple(statuses) == solution.statuses else replace(solution, statuses=tuple(statuses))
