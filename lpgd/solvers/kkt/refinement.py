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

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, IntArray, from_numpy
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
    state = _State(start)
    error, every = state.error, np.arange(elements.shape[0])
    before, taken = error.copy(), np.zeros(every.size, dtype=np.int64)
    # Rounding is that of the terms of F, which are as large as the point is.
    enough: FloatArray = ENOUGH * np.clip(state.sizes(every), 1.0, LARGE if rounded else 1.0)
    left: BoolArray = error > enough  # false for NaN
    if regular_only and has_vertices(problem.structure) and left.any():
        left &= ~points.plainly_singular(state.xi, state.v).cpu().numpy()
    stuck, isolated = np.zeros((2, every.size), dtype=np.bool_)
    lengths_before = np.full(every.size, np.nan)
    limit = np.full(every.size, steps) if isinstance(steps, int) else steps.cpu().numpy()
    for number in range(int(limit.max(initial=0))):
        left &= limit > number
        todo = np.flatnonzero(left)
        if not todo.size:
            break
        index = from_numpy(todo).to(problem.device)
        chosen, first = points.select(index), error[todo]
        xi, v, slope, row_error = state.at(todo)
        known = from_numpy(first).to(problem.device)
        d_xi, d_v, factored = chosen.regular_step(xi, v, known, slope, row_error, damped=not regular_only)
        if factored is not None:
            isolated[todo] = (factored.inverse * first < FAR) & factored.regular
        if keep and factored is not None:
            stepped = elements[index]
            stale = [factor._replace(valid=factor.valid & ~torch.isin(factor.elements, stepped)) for factor in kept]
            kept = [factor for factor in stale if bool(factor.valid.any())]
            kept.append(KeptFactor(stepped, from_numpy(factored.regular), factored))
        finite = (torch.isfinite(d_xi).all(-1) & torch.isfinite(d_v).all(-1)).cpu().numpy()
        waiting, size = np.flatnonzero(finite), torch.maximum(maximum_norm(d_xi), maximum_norm(d_v)).cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            share: FloatArray = size / lengths_before[todo]
        lengths_before[:], lengths_before[todo] = np.nan, size
        trials: list[tuple[IntArray, Tensor | float, float]] = [(waiting, length, 1.0) for length in LENGTHS]
        multiple = np.flatnonzero(finite & (share > SLOW[0]) & (share < SLOW[1]))  # false for NaN
        if multiple.size:
            longer = from_numpy(1.0 / (1.0 - share[multiple, None])).to(problem.device)
            trials.insert(0, (multiple, longer, FALL))
        for among, length, fall in trials:
            tried = waiting if fall == 1.0 else among
            if not tried.size:
                break
            at, trial = todo[tried], chosen
            places: slice | Tensor = slice(None)
            if tried.size < todo.size:
                places = from_numpy(tried).to(problem.device)
                trial = points.select(from_numpy(at).to(problem.device))
            new_xi, new_v = xi[places] + length * d_xi[places], v[places] + length * d_v[places]
            better = state.move(at, new_xi, new_v, trial.residual(new_xi, new_v), fall=fall)
            taken[at[better]] += 1
            waiting = waiting[~np.isin(waiting, tried[better])]
        for failed in (todo[waiting], todo[~finite]):
            left[failed], stuck[failed] = False, True
        left &= error > enough
        going = left[todo] & (error[todo] < CLOSE * first)
        for _ in range(CHORDS):
            going &= taken[todo] < limit[todo]
            if factored is None or not going.any():
                break
            xi, v, slope, row_error = state.at(todo)
            last = error[todo]
            d_xi, d_v = chosen.chord(factored, slope, row_error)
            new_xi, new_v = xi + d_xi, v + d_v
            better = state.move(todo, new_xi, new_v, found := chosen.residual(new_xi, new_v), going)
            fallen = found[0].cpu().numpy() <= FALL * last
            ends = going & ~fallen
            if ends.any():
                left[todo] &= ~ends | (last > rounded * np.maximum(state.sizes(todo), 1.0))
            going = better & fallen
            taken[todo[better]] += 1
            left[todo] &= error[todo] > enough[todo]
            going &= left[todo]
    stuck &= error > STUCK
    if regular_only:
        stuck[:] = False
    if is_small(problem.structure) and stuck.any():
        stuck &= error > STUCK * points.point(state.xi, state.v)[0].largest().cpu().numpy()
    todo = np.flatnonzero(stuck)
    if is_small(problem.structure) and todo.size:
        index = from_numpy(todo).to(problem.device)
        xi, v, slope, row_error = state.at(todo)
        known = from_numpy(error[todo]).to(problem.device)
        count, ends, found_error = points.select(index).ahead(xi, v, known, slope, row_error)
        found_errors = found_error.cpu().numpy()
        better = found_errors < GAIN * error[todo]
        chosen_ends, moved = from_numpy(np.flatnonzero(better)).to(problem.device), todo[better]
        places = index[chosen_ends]
        state.xi[places], state.v[places] = ends[0][chosen_ends], ends[1][chosen_ends]
        error[moved] = found_errors[better]
        taken[moved] += count.cpu().numpy()[better]
        isolated[moved] = False
    refined, refined_slack = points.point(state.xi, state.v)
    finite = np.isfinite(before)
    if not finite.all():
        usable = from_numpy(finite).to(problem.device)
        refined = refined.where(usable, point)
        refined_slack = torch.where(usable[:, None], refined_slack, slack)
    told = [from_numpy(array).to(problem.device) for array in (before, error, taken, isolated)]
    return Refined(refined, refined_slack, told[0], told[1], told[2], told[3], tuple(kept))


class _State:
    """Where E elements are: (ξ, v), and F there.  |F| is an array, as what it decides is decided on the CPU."""

    def __init__(self, start: Start) -> None:
        self.xi, self.v, error, self.slope, self.row_error = start
        self.error: FloatArray = error.cpu().numpy().copy()

    def at(self, elements: IntArray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ξ, v and the parts of F of some elements, in order."""
        tensors = self.xi, self.v, self.slope, self.row_error
        if elements.size == self.error.size:
            return tensors
        xi, v, slope, row_error = (tensor[from_numpy(elements)] for tensor in tensors)
        return xi, v, slope, row_error

    def sizes(self, elements: IntArray) -> FloatArray:
        """The largest magnitudes of their points."""
        xi, v, *_ = self.at(elements)
        return torch.maximum(maximum_norm(xi), maximum_norm(v)).cpu().numpy()

    def move(
        self,
        elements: IntArray,
        xi: Tensor,
        v: Tensor,
        found: tuple[Tensor, Tensor, Tensor],
        among: BoolArray | None = None,
        fall: float = 1.0,
    ) -> BoolArray:
        """Move those of the elements there for whom |F| falls to less than a share, and which these are."""
        error = found[0].cpu().numpy()
        better: BoolArray = error < fall * self.error[elements]
        if among is not None:
            better &= among
        fresh = xi, v, *found[1:]
        if better.all() and elements.size == self.error.size:
            self.xi, self.v, self.slope, self.row_error = fresh
        elif better.any():
            moved, kept = from_numpy(elements[better]), from_numpy(better)
            for whole, values in zip((self.xi, self.v, self.slope, self.row_error), fresh, strict=True):
                whole[moved.to(whole.device)] = values[kept.to(whole.device)]
        self.error[elements[better]] = error[better]
        return better


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
