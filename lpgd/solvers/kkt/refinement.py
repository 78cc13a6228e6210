"""Newton's method on the optimality conditions, from any solver's answer: where the last digits come from.

For ``v = y - s`` and ``ξ = x + z``, with ``y = Π(v)`` the projection onto K*, ``s = y - v``, ``x = clip(ξ)`` between
the bounds and ``z = ξ - x``, every point is complementary, and a solution is a root of

    F(ξ, v) = (P x + q + Aᵀy + z,  A x + s - b).

A step is one solve of the system of :mod:`lpgd.solvers.kkt.system` with F for its tilt: ``(dx, dy, dz)``, and
``dv = dy + A dx + F₂``.  Where the system is singular, or as good as singular at a point known no better than |F|, the
step is Levenberg and Marquardt's with ``μ = |F|²``, which converges onto manifolds of solutions as Newton's method does
to a regular one (Fan and Yuan 2005).  Near a solution the next steps are chords, by the same factors: where a step
leaves the share ``c |F|`` of F, a chord leaves about twice that share of what is left.  A step that does not reduce |F|
is halved; one to a multiple root is longer.  Where halving does not help, a few whole steps are looked ahead: near a
solution of a linear or quadratic program |F| may rise until the active set is right, and vanish then.  If none of them
is better by far, the point stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd.arrays import from_numpy, rows_where
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.residuals import Products
from lpgd.problems.conic.structure import ConicPoint, ConicStructure
from lpgd.solvers.kkt.points import ENOUGH, Points
from lpgd.solvers.kkt.reduced import is_dense
from lpgd.solvers.kkt.schur import System

__all__ = [
    "KeptFactor",
    "Refined",
    "Start",
    "complementary",
    "has_vertices",
    "is_cheap",
    "is_small",
    "optimality_residual",
    "refine",
]

DENSE, SPARSE, FILLED = 300, 1_000_000, 100
"""Steps are cheap up to so many variables and rows, or so many entries, of which larger programs have so many in a row
on average."""
VERTICES = 50_000
"""Of linear programs, up to so many entries: of their degenerate vertices systems are singular."""
FACTORISED = 3000
"""Of systems that are filled, those with so many variables and rows: one step, which serves derivatives and perturbed
points too, takes a tenth of a solver's time or less (dense quadratic programs n 300 to 700, all solvers)."""
LENGTHS = (1.0, 0.5, 0.25)
"""The lengths at which a step is tried."""
SLOW = 0.2, 0.95
"""A step that is such a share of the last one leads to a root like that of ``tᵏ = 0``, to which Newton's method goes by
``1 / k`` of the way: where ``x^1.5`` has its zero, k is 2.  Step k times as long first, where that reduces |F| to
``FALL``."""
CHORDS, CLOSE, FALL = 6, 1e-2, 0.1
"""Where a step has reduced |F| to a smaller share than ``CLOSE``, up to so many steps by the same system follow, as
long as each reduces |F| to ``FALL`` of it."""
FAR = 5e-2
"""A root of F is isolated where ``|K⁻¹| |F|`` is below this at a point from which a step leads to it: along other roots
K would be as small as the distance to them."""
ROUNDED, LARGE = 1e-13, 10.0
"""A smaller |F|, relative to the point, that a chord does not reduce to ``FALL`` of it is rounding."""
STUCK, GAIN = 1e-12, 0.1
"""Of small problems, points with a larger |F|, relative to their size, that no step reduces are looked ahead from; |F|
has to fall to a share."""


class Refined(NamedTuple):
    """Refined points of E elements, in the order that they were asked for.

    Attributes:
        point: (E, ·) each, complementary: y in K*, x between its bounds.
        slack: (E, m) in K.
        before, after: (E,) the maximum norm of F; NaN for points that are not finite, which are left as they are.
        taken: (E,) the number of steps.
        isolated: (E,) whether the system of the last step is regular by far, as it is not where solutions are many.
        kept: the systems of the last steps.
    """

    point: ConicPoint
    slack: Tensor
    before: Tensor
    after: Tensor
    taken: Tensor
    isolated: Tensor
    kept: tuple[KeptFactor, ...] = ()


class KeptFactor(NamedTuple):
    """Systems that were factorised at the solutions of some elements of a batch, or one step before.

    Attributes:
        elements: (k,) the elements.
        valid: (k,) those of which it is the last system, and regular.
        factored: of these elements, in units of order 1.
    """

    elements: Tensor
    valid: Tensor
    factored: System

    def among(self, chosen: Tensor) -> KeptFactor:
        """The same, valid for elements that are ``chosen`` (B,) alone."""
        return self._replace(valid=self.valid & chosen[self.elements])

    def select(self, elements: Tensor) -> KeptFactor:
        """The same as systems of a batch of these elements alone, valid for those among them."""
        size = max(int(indices.max()) + 1 if indices.shape[0] else 0 for indices in (elements, self.elements))
        place = torch.full((size,), -1, dtype=torch.int64)
        place[elements] = torch.arange(elements.shape[0])
        position = place[self.elements]
        return self._replace(elements=position.clamp(min=0), valid=self.valid & (position >= 0))


class Start(NamedTuple):
    """(ξ, v) of an answer of B elements, (B, n) and (B, m), and F there: |F| (B,), and its parts (B, n) and (B, m)."""

    xi: Tensor
    v: Tensor
    error: Tensor
    slope: Tensor
    row_error: Tensor

    def select(self, elements: Tensor) -> Start:
        """The same of these elements, in tensors of their own."""
        return Start(*(tensor[elements] for tensor in self))


def refine(
    problem: ConicProblem,
    point: ConicPoint,
    slack: Tensor,
    elements: Tensor,
    *,
    start: Start | None = None,
    steps: int | Tensor = 3,
    keep: bool = False,
    regular_only: bool = False,
    rounded: float = ROUNDED,
) -> Refined:
    """Newton's method from a point, for some elements of a batch.

    Args:
        problem: in units in which its terms are of order 1: F is measured as it is.  Integers are not looked at.
        point, slack: a solver's answer for all B elements; for conic programs without integer variables.
        elements: which to refine.
        start: where that answer is, if it is known.
        steps: at most, of all or (E,) of each; no chords follow where as many were taken, chords included.
        keep: the systems of the last steps, for the derivative of the solutions.
        rounded: where |F|, relative to the point, is taken for rounding that no chord reduces; 0 tries every step.
        regular_only: elements whose system is singular, or nearly so, are left at once.
    """
    kept: list[KeptFactor] = []
    start = None if start is None else start.select(elements)
    if not torch.equal(elements, torch.arange(problem.batch_size, device=problem.device)):
        problem, point, slack = problem.select(elements), point.select(elements), slack[elements]
    points = Points(problem)
    if start is None:
        xi, v = points.start(point, slack)
        start = Start(xi, v, *points.residual(xi, v))
    xi, v, error, slope, row_error = start
    before, taken = error.clone(), torch.zeros(elements.shape[0], dtype=torch.int64, device=problem.device)
    # Rounding is that of the terms of F, which are as large as the point is.
    enough = ENOUGH * torch.maximum(maximum_norm(xi), maximum_norm(v)).clamp(min=1.0, max=LARGE if rounded else 1.0)
    left = error > enough  # false for NaN
    if regular_only and has_vertices(problem.structure) and bool(left.any()):
        left &= ~points.plainly_singular(xi, v)
    stuck, isolated = torch.zeros_like(left), torch.zeros_like(left)
    last: tuple[Tensor, Tensor, Tensor] | None = None
    limit = torch.full_like(taken, steps) if isinstance(steps, int) else steps
    for number in range(int(limit.max()) if limit.numel() else 0):
        left &= limit > number
        todo = rows_where(left)
        if not todo.shape[0]:
            break
        chosen, first = points.select(todo), error[todo]
        d_xi, d_v, factored = chosen.regular_step(
            xi[todo], v[todo], error[todo], slope[todo], row_error[todo], damped=not regular_only
        )
        if factored is not None:
            far = (factored.inverse * error[todo].numpy() < FAR) & factored.regular
            isolated[todo] = from_numpy(far)
        if keep and factored is not None:
            stepped = elements[todo]
            stale = [factor._replace(valid=factor.valid & ~torch.isin(factor.elements, stepped)) for factor in kept]
            kept = [factor for factor in stale if bool(factor.valid.any())]
            kept.append(KeptFactor(stepped, from_numpy(factored.regular), factored))
        finite = torch.isfinite(d_xi).all(-1) & torch.isfinite(d_v).all(-1)
        waiting, lost = rows_where(finite), todo[~finite]
        trials: list[tuple[Tensor, Tensor | float, float]] = [(waiting, length, 1.0) for length in LENGTHS]
        if last is not None:
            sizes = torch.full_like(error, torch.nan)
            sizes[last[0]] = torch.maximum(*map(maximum_norm, last[1:]))
            share = torch.maximum(maximum_norm(d_xi), maximum_norm(d_v)) / sizes[todo]
            multiple = rows_where(finite & (share > SLOW[0]) & (share < SLOW[1]))
            if multiple.shape[0]:
                trials.insert(0, (multiple, 1.0 / (1.0 - share[multiple, None]), FALL))
        last = todo, d_xi, d_v
        for among, length, fall in trials:
            tried = waiting if fall == 1.0 else among
            if not tried.shape[0]:
                break
            trial = points.select(todo[tried]) if tried.shape[0] < todo.shape[0] else chosen
            at = todo[tried]
            new_xi, new_v = xi[at] + length * d_xi[tried], v[at] + length * d_v[tried]
            found = trial.residual(new_xi, new_v)
            better = found[0] < fall * error[at]
            taken[at[better]] += 1
            xi, v, error, slope, row_error = _moved(
                (xi, v, error, slope, row_error), (new_xi, new_v, *found), at, better
            )
            waiting = waiting[~better] if fall == 1.0 else waiting[~torch.isin(waiting, tried[better])]
        for failed in (todo[waiting], lost):
            left[failed], stuck[failed] = False, True
        left &= error > enough
        going = left[todo] & (error[todo] < CLOSE * first)
        for _ in range(CHORDS):
            going &= taken[todo] < limit[todo]
            if factored is None or not bool(going.any()):
                break
            d_xi, d_v = chosen.chord(factored, slope[todo], row_error[todo])
            new_xi, new_v = xi[todo] + d_xi, v[todo] + d_v
            found = chosen.residual(new_xi, new_v)
            better = going & (found[0] < error[todo])
            fallen = found[0] <= FALL * error[todo]
            ends = going & ~fallen
            if bool(ends.any()):
                size = torch.maximum(maximum_norm(xi[todo]), maximum_norm(v[todo])).clamp(min=1.0)
                left[todo] &= ~ends | (error[todo] > rounded * size)
            going = better & fallen
            taken[todo[better]] += 1
            xi, v, error, slope, row_error = _moved(
                (xi, v, error, slope, row_error), (new_xi, new_v, *found), todo, better
            )
            left[todo] &= error[todo] > enough[todo]
            going &= left[todo]
    stuck &= error > STUCK
    if regular_only:
        stuck[:] = False
    if is_small(problem.structure) and bool(stuck.any()):
        stuck &= error > STUCK * points.point(xi, v)[0].largest()
    todo = rows_where(stuck)
    if is_small(problem.structure) and todo.shape[0]:
        count, ends, known = points.select(todo).ahead(xi[todo], v[todo], error[todo], slope[todo], row_error[todo])
        better = known < GAIN * error[todo]
        moved = todo[better]
        xi[moved], v[moved], error[moved] = ends[0][better], ends[1][better], known[better]
        taken[moved] += count[better]
        isolated[moved] = False
    finite = torch.isfinite(before)
    refined, refined_slack = points.point(xi, v)
    if not bool(finite.all()):
        refined = refined.where(finite, point)
        refined_slack = torch.where(finite[:, None], refined_slack, slack)
    return Refined(refined, refined_slack, before, error, taken, isolated, tuple(kept))


def _moved(
    whole: tuple[Tensor, ...], fresh: tuple[Tensor, ...], elements: Tensor, better: Tensor
) -> tuple[Tensor, ...]:
    """Values of all elements with the fresh ones of some ``elements``, of those that are ``better``."""
    if elements.shape[0] == len(whole[0]) and bool(better.all()):
        return fresh
    moved = elements[better]
    for old, new in zip(whole, fresh, strict=True):
        old[moved] = new[better]
    return whole


def is_small(structure: ConicStructure) -> bool:
    """Whether steps, and another solver, cost next to nothing."""
    return structure.n + structure.m <= DENSE


def is_cheap(structure: ConicStructure) -> bool:
    """Whether a step takes no longer than an iteration of an interior-point method."""
    size = structure.n + structure.m
    if is_small(structure) or _is_factorised(structure):
        return True
    filled = structure.constraint.nnz + structure.quadratic.nnz
    return filled <= (VERTICES if _is_linear(structure) else SPARSE) and (size <= FACTORISED or filled <= FILLED * size)


def _is_factorised(structure: ConicStructure) -> bool:
    """Whether a dense system is larger than a small one and still cheaper than a solver by far."""
    return DENSE < structure.n + structure.m <= FACTORISED and is_dense(structure)


def has_vertices(structure: ConicStructure) -> bool:
    """Whether these are larger dense linear programs, of whose degenerate vertices the systems are singular."""
    return _is_factorised(structure) and _is_linear(structure)


def _is_linear(structure: ConicStructure) -> bool:
    return structure.cones.is_polyhedral and not structure.quadratic.nnz


def complementary(
    problem: ConicProblem, point: ConicPoint, slack: Tensor
) -> tuple[ConicPoint, Tensor, Start, Products]:
    """The point with y and s, x and z made complementary, its slack, where it is, and its products with the matrices.

    |F| is NaN where the point was not finite.
    """
    points = Points(problem)
    xi, v = points.start(point, slack)
    found, found_slack = points.point(xi, v)
    products = Products.of(problem, found)
    return found, found_slack, Start(xi, v, *points.residual_of(found, found_slack, products)), products


def optimality_residual(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> Tensor:
    """(B,) the maximum norm of F at the complementary point next to a solver's answer; NaN where that is not finite."""
    points = Points(problem)
    return points.residual(*points.start(point, slack))[0]
