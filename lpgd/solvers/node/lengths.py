"""Units of length and of constraints in which problems with constraints are solved once more, where that may matter.

Generic solvers take numbers up to one for small and ``1 + |x|`` for a length: a minimiser of 1e-8 is then feasible
wherever it is, and constraints of 1e8 are never met.  Where a first try ended without a solution, or where constraints
are met less well than is usual in their own units, the problem is posed as one of ``x / length`` with each constraint
divided by the size of its derivative.  All units are powers of two, so that nothing is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.nodes.base import BaseNode
from lpgd.problems.base import maximum_norm
from lpgd.problems.node.multipliers import LARGE
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodePoint, NodeStructure, input_class
from lpgd.solvers.node.polish import ConstrainedResult
from lpgd.status import Status

__all__ = ["Solve", "solve_in_lengths"]

Solve = Callable[[NodeProblem, Tensor], ConstrainedResult]
"""From a problem and a start (B, n) to an answer."""

SMALL = 2.0**-7
"""Problems with a smaller length are always solved once more, in units of it."""
MET = 1e-6
"""A constraint is met where its value is below this share of its derivative times the length."""
ALIKE = 64.0
"""Units of constraints that differ from one by less make no difference."""
FAR = 2.0**16
"""Units that differ by more are taken from the beginning."""
AGAIN = (Status.NUMERICAL_ERROR, Status.ITERATION_LIMIT, Status.INACCURATE, Status.INFEASIBLE)


def solve_in_lengths(solve: Solve, refine: Solve, problem: NodeProblem, x: Tensor) -> ConstrainedResult:
    """The answer of a solver, of problems in other units where it needs them.

    Where constraints are far from one, units of theirs and of the start come first: a method of multipliers takes
    minutes to find out.
    Elements without an answer are solved again in their own length with other units of constraints, and then in the
    length of their data.

    Args:
        solve: the solver.
        refine: the same, from near a solution.
        problem: B elements.
        x: (B, n) where it starts.
    """
    answer = _first(solve, problem, x)
    lengths = _of_answers(problem, answer)
    again = rows_where(lengths > 0)
    if len(again):
        _replace(refine, problem, answer.point.x, again, lengths, answer)
    for other_lengths in (torch.ones_like(lengths), _of_data(problem)):
        failed = torch.stack([answer.status == int(status) for status in AGAIN]).any(0)
        again = rows_where(failed)
        if not len(again) or is_over():
            break
        _replace(solve, problem, x, again, other_lengths, answer)
    return answer


def _first(solve: Solve, problem: NodeProblem, x: Tensor) -> ConstrainedResult:
    lengths = _of_start(problem, x)
    far = (lengths != 1.0) | _Posed.of(problem, x, torch.ones_like(x[:, :1])).is_far
    if not bool(far.any()):
        return solve(problem, x)
    places, near = rows_where(far), rows_where(~far)
    length = lengths[places, None]
    posed = _Posed.of(problem.select(places), x[places], length)
    answers = [posed.restored(solve(posed.problem, x[places] / length))]
    if len(near):
        answers.append(solve(problem.select(near), x[near]))
    order = torch.argsort(torch.cat([places, near]))
    points, status, iterations = zip(*answers, strict=True)
    point = NodePoint(*(torch.cat(parts)[order] for parts in zip(*points, strict=True)))
    return ConstrainedResult(point, torch.cat(status)[order], torch.cat(iterations)[order])


def _of_start(problem: NodeProblem, x: Tensor) -> Tensor:
    """(B,) the lengths of starts that are far from one; of zeros the data's, where constraints are far from there."""
    size = maximum_norm(x)
    values = torch.cat(problem.constraints(x), -1).abs()
    if values.shape[-1] and values.numel() * x.shape[-1] <= LARGE and bool((size == 0).any()):
        slopes = problem.jacobian(_probe(x, torch.ones_like(x[:, :1]))).abs().sum(-1)
        size = torch.where((size == 0) & (values > FAR * slopes).any(-1), _of_data(problem), size)
    length = torch.where((size > 0) & torch.isfinite(size), _power_of_two(size), 1.0)
    return torch.where((length > FAR) | (length < 1.0 / FAR), length, 1.0)


def _replace(
    solve: Solve, problem: NodeProblem, x: Tensor, places: Tensor, lengths: Tensor, answer: ConstrainedResult
) -> None:
    """Write the solutions of these elements in other units over what was found; lengths are (B,)."""
    x, length = x[places], lengths[places, None]
    posed = _Posed.of(problem.select(places), x, length)
    differs = rows_where(posed.differs)
    if not len(differs):
        return
    places, posed = places[differs], posed.select(differs)
    found = posed.restored(solve(posed.problem, x[differs] / posed.length))
    answer.iterations[places] += found.iterations
    taken = rows_where(found.status == int(Status.SOLVED))
    for whole, values in zip((*answer.point, answer.status), (*found.point, found.status), strict=True):
        whole[places[taken]] = values[taken]


def _of_answers(problem: NodeProblem, answer: ConstrainedResult) -> Tensor:
    """(B,) the lengths of solutions that are to be solved again in units of them, zero for the others."""
    solved = answer.status == int(Status.SOLVED)
    length = torch.where(solved, maximum_norm(answer.point.x), 1.0)
    again = solved & (length > 0) & (length < SMALL)
    unsure = rows_where(solved & ~again)
    if len(unsure):
        again[unsure] = _violates(problem.select(unsure), answer.point.select(unsure), length[unsure])
    return torch.where(again, _power_of_two(torch.where(length > 0, length, 1.0)), 0.0)


def _of_data(problem: NodeProblem) -> Tensor:
    """(B,) the size of the largest input."""
    sizes = [datum.abs().reshape(problem.batch_size, -1).amax(-1) for datum in problem.data if datum.numel()]
    length = torch.stack(sizes).amax(0) if sizes else problem.data[0].new_ones(problem.batch_size)
    return torch.where(
        (length > 0) & torch.isfinite(length), _power_of_two(length.clamp(min=torch.finfo(length.dtype).tiny)), 1.0
    )


def _violates(problem: NodeProblem, point: NodePoint, length: Tensor) -> Tensor:
    """(B,) whether a constraint is met less well than is usual, measured by its derivative."""
    values = torch.cat(problem.constraints(point.x), -1)
    if not values.shape[-1] or len(values) * values.shape[-1] * point.x.shape[-1] > LARGE:
        return torch.zeros_like(length, dtype=torch.bool)
    violation = torch.cat([values[:, : point.nu.shape[-1]].abs(), torch.relu(values[:, point.nu.shape[-1] :])], -1)
    slopes = problem.jacobian(point.x).abs().sum(-1)
    share = max(MET, torch.finfo(values.dtype).eps ** 0.5)
    return ((violation > share * slopes * length[:, None]) & (slopes > 0)).any(-1)


def _probe(x: Tensor, length: Tensor) -> Tensor:
    """A place so far from x, in no special direction."""
    pattern = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return x + length * ((pattern.square() * math.sqrt(2)).frac() + 0.5)


def _power_of_two(tensor: Tensor) -> Tensor:
    return tensor.log2().round().exp2()


@dataclass(frozen=True)
class _InUnits(BaseNode):
    """A node as a function of ``y / length``, with constraints divided by units: three inputs more."""

    node: BaseNode

    @property
    def name(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  # that of the node, for messages
        return self.node.name

    @property
    def inputs(self) -> Mapping[str, int]:
        return {**self.node.inputs, "unit_of_length": 0, "units_of_equalities": 1, "units_of_inequalities": 1}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        return self.node.variable_shape(*shapes[:-3])

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return self.node.objective(_times(inputs[-3], y), *inputs[:-3])

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        values = self.node.equality(_times(inputs[-3], y), *inputs[:-3])
        return None if values is None else values.reshape(len(values), -1) / inputs[-2]

    def inequality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        values = self.node.inequality(_times(inputs[-3], y), *inputs[:-3])
        return None if values is None else values.reshape(len(values), -1) / inputs[-1]


def _times(length: Tensor, y: Tensor) -> Tensor:
    return length.reshape(-1, *(1,) * (y.ndim - 1)) * y


@dataclass(frozen=True)
class _Posed:
    """A problem in other units.

    Args:
        problem: the problem of ``x / length``.
        length: (B, 1).
        units: (B, p) and (B, r), what h and g are divided by.
    """

    problem: NodeProblem
    length: Tensor
    units: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, problem: NodeProblem, x: Tensor, length: Tensor) -> _Posed:
        """The problem in units of this length (B, 1), with constraints in units of their derivatives near x."""
        h, g = problem.constraints(x)
        ones = torch.ones_like(torch.cat([h, g], -1))
        units = ones
        if ones.shape[-1] and ones.numel() * x.shape[-1] <= LARGE:
            sizes = [length * problem.jacobian(place).abs().sum(-1) for place in (x, _probe(x, length))]
            size = torch.stack([torch.where(torch.isfinite(one), one, 0.0) for one in sizes]).amax(0)
            units = torch.where(size > 0, _power_of_two(torch.where(size > 0, size, 1.0)), 1.0)
        equality_units, inequality_units = units[:, : h.shape[-1]], units[:, h.shape[-1] :]
        node = _InUnits(problem.node)
        more = (length[:, 0], equality_units, inequality_units)
        data: Any = input_class(tuple(node.inputs))(*problem.data, *more)
        structure = NodeStructure(node, (*problem.structure.shapes, (), *(tuple(unit.shape[1:]) for unit in more[1:])))
        linear, square = problem.linear, problem.square
        if problem.center is not None:  # (ρ/2) |L x - c|² = (ρ/2) L² |x|² - ρ L <c, x> + constant
            linear = -problem.rho * problem.center + (0.0 if linear is None else linear)
            round_curvature = problem.rho * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            square = round_curvature.expand(len(x), -1, -1) + (0.0 if square is None else square)
        of_h, of_g = problem.equality_shift, problem.inequality_shift
        scaled = NodeProblem(
            structure,
            data,
            problem.batch_size,
            linear=None if linear is None else length * linear,
            equality_shift=None if of_h is None else of_h / equality_units,
            inequality_shift=None if of_g is None else of_g / inequality_units,
            square=None if square is None else length[..., None] ** 2 * square,
            unit=problem.unit,
        )
        return cls(scaled, length, (equality_units, inequality_units))

    @property
    def differs(self) -> Tensor:
        """(B,) whether it is another problem than it was."""
        units = torch.cat(self.units, -1)
        return (self.length[:, 0] != 1.0) | ((units > ALIKE) | (units < 1.0 / ALIKE)).any(-1)

    @property
    def is_far(self) -> Tensor:
        """(B,) whether units of constraints differ from one by far."""
        units = torch.cat(self.units, -1)
        return ((units > FAR) | (units < 1.0 / FAR)).any(-1)

    def select(self, elements: Tensor) -> _Posed:
        """The problems of these elements."""
        units = self.units[0][elements], self.units[1][elements]
        return _Posed(self.problem.select(elements), self.length[elements], units)

    def restored(self, answer: ConstrainedResult) -> ConstrainedResult:
        """An answer to the problem as it was."""
        x, nu, lam = answer.point
        return answer._replace(point=NodePoint(self.length * x, nu / self.units[0], lam / self.units[1]))
