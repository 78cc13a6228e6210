"""Units of length for another try: where an answer's residuals, which are relative to the largest number, say little.

A point is known relative to the unit of length, which the largest right-hand side sets.  Two things are then hidden by
small residuals: a solution that is far smaller, and the constraints of small right-hand sides beside one that is loose
and large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, as_index, elements_where, flags, from_numpy, integers, rows_where
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.residuals import Products, residual_bound
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint, per_element
from lpgd.solvers.conic.posed import ACCEPTED, EXACT, Posed, pose
from lpgd.solvers.conic.rescue import merged
from lpgd.status import Status

__all__ = [
    "constraint_errors",
    "in_better_units",
    "with_constraints_kept",
]

WIDE, DEEPEST = 2.0**-12, 2.0**-60
"""Right-hand sides below the first share of a larger one have another unit; those below the second are rounding."""
FLAT = 2.0**-10
"""Gradients of the Lagrangian whose terms are all below this say little by a residual."""
MOST = 3
"""How many units of an element are tried."""
FAINT = 1e-6
"""Multipliers below this share of the cost's gradient are none."""
SURE = 1e-9
"""Where no more than this share of the smallest length is left of the optimality conditions, constraints are kept."""
NEARER, BROKEN = 0.1, 1e-3
"""An answer in other units counts where the error of its constraints is below this share of the first one's; a
solution with a larger error than the second is none."""


def in_better_units(
    posed: Posed,
    answer: ConicSolution,
    shares: Tensor | None,
    tolerance: float,
    solve: Callable[[Posed], ConicSolution],
) -> ConicSolution:
    """The answer, with those elements solved once more whose residuals say little in the units of the data.

    Args:
        posed: the batch, and its units.
        answer: a solver's, judged.
        shares: (B,) the units of length that it is known in, in those of the batch; None where they are the same.
        tolerance: of the solver.
        solve: the same of elements in other units.
    """
    lengths = None if shares is None and _are_known(posed, answer) else better_lengths(posed, answer, tolerance)
    if lengths is not None:
        answer = _again(posed, answer, solve, lengths.isfinite(), lengths, None)
    costs = better_costs(posed, answer)
    if costs is None:
        return answer
    # What is known of a solution that was found with constraints nearer is not in the units of the batch.
    chosen = costs.isfinite() if shares is None else costs.isfinite() & (shares == 1.0)
    return _again(posed, answer, solve, chosen, None, costs) if bool(chosen.any()) else answer


def _again(
    posed: Posed,
    answer: ConicSolution,
    solve: Callable[[Posed], ConicSolution],
    chosen: Tensor,
    lengths: Tensor | None,
    costs: Tensor | None,
) -> ConicSolution:
    elements = rows_where(chosen)
    exponents = (None if units is None else units[elements] for units in (lengths, costs))
    again = solve(pose(posed.problem.select(elements), (), *exponents))
    taken = [status is Status.SOLVED for status in again.statuses]
    return merged(answer, integers(elements), again, taken, keep_states=True)


def _are_known(posed: Posed, answer: ConicSolution) -> bool:
    """Whether all points are known to rounding, relative to their own size."""
    if answer.known_to is None:
        return False
    point = posed.units.point_in(posed.problem, answer.point)
    bound = residual_bound(point, answer.known_to)
    return bool(((answer.known_to <= EXACT) & (bound <= ACCEPTED * maximum_norm(point.x))).all())  # false for NaN


def better_lengths(posed: Posed, answer: ConicSolution, tolerance: float) -> Tensor | None:
    """(B,) exponents of units for another try: where a point is so small that its residuals say little about it.

    NaN for other elements; None where there is none.
    """
    size = maximum_norm(posed.units.point_in(posed.problem, answer.point).x)
    residual = answer.residuals.worst
    # A point at zero, which an absolute gap may pass for a solution, is as far from one as its slope says.
    zero = (size == 0) & (residual > EXACT)
    size = torch.where(zero, residual, size)
    # Larger points are none of this: in units of theirs the right-hand sides would be too small to count.
    vague = answer.usable & (size > 0) & (size < 1) & (residual > max(ACCEPTED, 10 * tolerance) * size)
    if posed.problem.structure.has_integers or not bool(vague.any()):
        return None
    length = torch.ones_like(size) if posed.units.length is None else posed.units.length[:, 0]
    reached = torch.where(zero, length * residual, maximum_norm(answer.x / posed.units.variable_of(posed.problem)))
    exponents = torch.frexp(reached).exponent.double()
    return torch.where(vague, exponents, torch.nan)


def better_costs(posed: Posed, answer: ConicSolution) -> Tensor | None:
    """(B,) exponents by which costs should be larger in another try: where residuals say little about small slopes.

    NaN for other elements; None where there is none.  The unit of the cost is made for a point of order 1 everywhere.
    Where a large curvature belongs to a variable that stays small, such as what Huber's function does not clip, all
    terms of the Lagrangian's gradient are far below 1.
    """
    inside = posed.inside
    if posed.units.cost is None or answer.known_to is None or not inside.structure.quadratic.nnz:
        return None
    cost = per_element(inside.data.q.detach(), inside.batch_size)
    if bool((answer.known_to.to(cost.device) <= EXACT * maximum_norm(cost)).all()):  # false for NaN
        return None
    point = posed.units.point_in(posed.problem, answer.point)
    products = Products.of(inside, point)
    terms = [maximum_norm(term.detach()) for term in (products.Px, products.Aty, cost, point.z)]
    slope = torch.stack(terms).nan_to_num().amax(0)
    flat = answer.usable & (slope > 0) & (slope < FLAT) & (answer.known_to.to(slope.device) > EXACT * slope)
    return torch.where(flat, -torch.frexp(slope).exponent.double(), torch.nan) if bool(flat.any()) else None


def with_constraints_kept(
    posed: Posed, answer: ConicSolution, solve: Callable[[Posed], ConicSolution]
) -> ConicSolution:
    """The answer, in which constraints of small right-hand sides beside large ones are kept, or INACCURATE.

    Args:
        posed: the batch, and its units.
        answer: a solver's, judged.
        solve: the same of elements in other units.
    """
    spread = _spread_of(posed)
    if spread is None:
        return answer
    # What is left of the optimality conditions bounds the error of every constraint.
    exact = spread.least.isnan() if answer.known_to is None else answer.known_to <= SURE * spread.least
    vague = elements_where(spread.least.isfinite() & ~exact & answer.usable)
    if not vague:
        return answer
    errors, index = np.zeros(answer.batch_size), as_index(vague, posed.problem.device)
    errors[vague] = _errors(posed.select(vague), answer.select(index), spread.least[index])
    for exponents in spread.exponents.unbind(1):
        wanted = (errors > ACCEPTED) & exponents.isfinite().cpu().numpy()
        elements = [int(element) for element in np.flatnonzero(wanted)]
        if not elements:
            continue
        chosen, index = posed.select(elements), as_index(elements, posed.problem.device)
        again = solve(pose(chosen.problem, (), exponents[index]))
        fresh = _errors(chosen, again, spread.least[index])
        taken = [bool(better) for better in np.array(flags(again.usable)) & (fresh < NEARER * errors[elements])]
        answer = merged(answer, elements, again, taken, keep_states=True)
        errors[elements] = np.where(taken, fresh, errors[elements])
    statuses = tuple(
        Status.INACCURATE if status is Status.SOLVED and error > BROKEN else status
        for status, error in zip(answer.statuses, errors, strict=True)
    )
    return answer if statuses == answer.statuses else replace(answer, statuses=statuses)


def _errors(posed: Posed, answer: ConicSolution, least: Tensor) -> FloatArray:
    """(B,) errors of the constraints in the posed units; 0 of elements without a solution."""
    errors = constraint_errors(posed.inside, posed.units.point_in(posed.problem, answer.point), least)
    return np.where(flags(answer.usable), errors, 0.0)


class _Spread(NamedTuple):
    """The sizes of right-hand sides, in groups that are far from each other.

    Attributes:
        exponents: (B, MOST) of two, of the unit of length that the largest of each smaller group makes; NaN where there
            are no more.
        least: (B,) the smallest of these units, in those of the posed problem.
    """

    exponents: Tensor
    least: Tensor


def _spread_of(posed: Posed) -> _Spread | None:
    """The groups of right-hand sides and bounds of a posed batch; None where each element has one.

    In NumPy, as this is done in every call.
    """
    inside, size = posed.inside, posed.inside.batch_size
    if inside.structure.has_integers:
        return None
    data = inside.data
    sides = [
        np.abs(np.atleast_2d(side.detach().cpu().numpy()))
        for side in (data.b, data.lower, data.upper)
        if side.shape[-1]
    ]
    if not sides or not size:
        return None
    tops, least = np.zeros(1), np.full(1, np.inf)
    for side in sides:
        present = np.isfinite(side)
        top, small = side.max(1, initial=0.0, where=present), side.min(1, initial=np.inf, where=present & (side > 0.0))
        count = max(len(top), len(tops))
        tops = np.maximum(np.resize(tops, count), np.resize(top, count))
        least = np.minimum(np.resize(least, count), np.resize(small, count))
    if not (least < WIDE * tops).any():
        return None
    sizes = np.concatenate([np.tile(side, (size // len(side), 1)) for side in sides], 1)
    sizes = np.where(np.isfinite(sizes), sizes, 0.0)
    top, found, smallest = sizes.max(1), list[FloatArray](), np.full(size, np.nan)
    limit = DEEPEST * top
    for _ in range(MOST):
        smaller = np.where((sizes < WIDE * top[:, None]) & (sizes > limit[:, None]), sizes, 0.0)
        top = smaller.max(1)
        found.append(np.where(top > 0, np.frexp(top)[1], np.nan))
        smallest = np.where(top > 0, top, smallest)
    exponents, lengths = from_numpy(np.stack(found, 1)), from_numpy(smallest)
    unit = torch.zeros_like(lengths) if posed.units.length is None else torch.log2(posed.units.length[:, 0]).cpu()
    return _Spread((exponents + unit[:, None]).to(posed.problem.device), lengths.to(posed.problem.device))


def constraint_errors(problem: ConicProblem, point: ConicPoint, least: Tensor) -> FloatArray:
    """(B,) the largest error of one constraint, relative to its own terms.

    That is how far it is violated, or how far its slack and its multiplier are from being complementary.

    Args:
        problem: B elements in units of order 1.
        point: their points.
        least: (B,) lengths below which nothing counts.
    """
    structure, size, cones = problem.structure, problem.batch_size, problem.structure.cones
    A, constraint = problem.data.A.detach(), structure.constraint
    x, y, z = (tensor.detach() for tensor in point)
    b = per_element(problem.data.b.detach(), size)
    slack = b - constraint.matvec(A, x)
    terms = constraint.matvec(A.abs(), x.abs()) + b.abs() + least[:, None]
    gradient = torch.maximum(maximum_norm(per_element(problem.data.q.detach(), size)), maximum_norm(y))
    faint = FAINT * gradient[:, None]
    linear = cones.zero + cones.nonnegative
    violation = torch.where(torch.arange(structure.m, device=x.device) < cones.zero, slack.abs(), (-slack).clamp(min=0))
    errors = [violation[:, :linear] / terms[:, :linear]]
    products, sizes = slack * y, terms * y.abs()
    inequalities = slice(cones.zero, linear)
    errors.append((products.abs() / (sizes + faint * terms))[:, inequalities])
    blocks = torch.from_numpy(np.asarray(cones.blocks)).to(x.device)
    if structure.m > linear:
        count = int(blocks[-1]) + 1
        index = blocks.expand(size, -1)
        zeros = x.new_zeros(size, count)
        total = zeros.scatter_add(1, index, products).abs()
        whole = zeros.scatter_add(1, index, sizes + faint * terms)
        errors.append((total / whole.clamp(min=torch.finfo(x.dtype).tiny))[:, int(blocks[linear]) :])
    if structure.has_bounds:
        lower, upper = problem.full_bounds()
        for ends, force in ((upper, z), (lower, -z)):
            there = ends.isfinite()
            distance = torch.where(there, (ends - x).abs(), 0.0)
            near = x.abs() + torch.where(there, ends.abs(), 0.0) + least[:, None]
            pushed = force.clamp(min=0)
            errors.append(distance * pushed / (near * (pushed + faint)))
    return torch.cat(errors, 1).nan_to_num(nan=0.0).amax(1).cpu().numpy()
