"""Newton's method on the optimality conditions, from any solver's answer: where the last digits come from.

For ``v = y - s`` and ``ξ = x + z``, with ``y = Π(v)`` the projection onto K*, ``s = y - v``, ``x = clip(ξ)`` between
the bounds and ``z = ξ - x``, every point is complementary, and a solution is a root of

    F(ξ, v) = (P x + q + Aᵀy + z,  A x + s - b).

A step is one solve of the system of :mod:`lpgd.solvers.kkt.system` with F for its tilt: ``(dx, dy, dz)``, and
``dv = dy + A dx + F₂``.  Where the system is singular, or as good as singular at a point known no better than |F|, the
step is Levenberg and Marquardt's with ``μ = |F|²``, which converges onto manifolds of solutions as Newton's method does
to a regular one (Fan and Yuan 2005).  A step that does not reduce |F| is halved.  Where that does not help, a few whole
steps are looked ahead: near a solution of a linear or quadratic program |F| may rise until the active set is right, and
vanish then.  If none of them is better by far, the point stays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy, rows_where
from lpgd.cones.projections import project
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.elements import ElementView
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint, ConicStructure, per_element
from lpgd.solvers.kkt.system import KKTPoints, Known, respond

__all__ = ["Refined", "complementary", "is_cheap", "is_small", "optimality_residual", "refine"]

ENOUGH = 1e-14
"""Points whose F is no larger than this are left alone."""
DENSE, SPARSE, FILLED = 300, 50_000, 20
"""Steps are cheap up to so many variables and rows, or so many entries with so many in a row on average."""
LENGTHS = (1.0, 0.5, 0.25)
"""The lengths at which a step is tried."""
STUCK, AHEAD, GAIN = 1e-12, 5, 0.1
"""Of small problems, points with a larger |F|, relative to their size, that no step reduces are looked ahead from, so
many steps; |F| has to fall to a share."""


class Refined(NamedTuple):
    """Refined points of E elements, in the order that they were asked for.

    Attributes:
        point: (E, ·) each, complementary: y in K*, x between its bounds.
        slack: (E, m) in K.
        before, after: (E,) the maximum norm of F; NaN for points that are not finite, which are left as they are.
        taken: (E,) the number of steps.
    """

    point: ConicPoint
    slack: Tensor
    before: Tensor
    after: Tensor
    taken: Tensor


def refine(problem: ConicProblem, point: ConicPoint, slack: Tensor, elements: Tensor, *, steps: int = 3) -> Refined:
    """Newton's method from a point, for some elements of a batch.

    Args:
        problem: in units in which its terms are of order 1: F is measured as it is.  Integers are not looked at.
        point, slack: a solver's answer for all B elements; for conic programs without integer variables.
        elements: which to refine.
        steps: at most.
    """
    if not torch.equal(elements, torch.arange(problem.batch_size, device=problem.device)):
        problem, point, slack = problem.select(elements), point.select(elements), slack[elements]
    own = _Points(problem)
    xi, v = own.start(point, slack)
    error, slope, rows = own.residual(xi, v)
    before, taken = error.clone(), torch.zeros(elements.shape[0], dtype=torch.int64, device=problem.device)
    left = error > ENOUGH  # false for NaN
    stuck = torch.zeros_like(left)
    for _ in range(steps):
        todo = rows_where(left)
        if not todo.shape[0]:
            break
        part = own.select(todo)
        d_xi, d_v = part.step(xi[todo], v[todo], error[todo], slope[todo], rows[todo])
        waiting = torch.arange(todo.shape[0], device=problem.device)
        for length in LENGTHS:
            trial = own.select(todo[waiting]) if waiting.shape[0] < todo.shape[0] else part
            at = todo[waiting]
            new_xi, new_v = xi[at] + length * d_xi[waiting], v[at] + length * d_v[waiting]
            found = trial.residual(new_xi, new_v)
            better = found[0] < error[at]
            moved = at[better]
            for whole, fresh in zip((xi, v, error, slope, rows), (new_xi, new_v, *found), strict=True):
                whole[moved] = fresh[better]
            taken[moved] += 1
            waiting = waiting[~better]
            if not waiting.shape[0]:
                break
        left[todo[waiting]], stuck[todo[waiting]] = False, True
        left &= error > ENOUGH
    stuck &= error > STUCK
    if is_small(problem.structure) and bool(stuck.any()):
        stuck &= error > STUCK * own.point(xi, v)[0].largest()
    todo = rows_where(stuck)
    if is_small(problem.structure) and todo.shape[0]:
        count, ends, known = own.select(todo).ahead(xi[todo], v[todo], error[todo], slope[todo], rows[todo])
        better = known < GAIN * error[todo]
        moved = todo[better]
        xi[moved], v[moved], error[moved] = ends[0][better], ends[1][better], known[better]
        taken[moved] += count[better]
    finite = torch.isfinite(before)
    refined, own_slack = own.point(xi, v)
    if not bool(finite.all()):
        refined = refined.where(finite, point)
        own_slack = torch.where(finite[:, None], own_slack, slack)
    return Refined(refined, own_slack, before, error, taken)


def is_small(structure: ConicStructure) -> bool:
    """Whether steps, and another solver, cost next to nothing."""
    return structure.n + structure.m <= DENSE


def is_cheap(structure: ConicStructure) -> bool:
    """Whether a step takes no longer than an iteration of an interior-point method on a small problem."""
    size = structure.n + structure.m
    if is_small(structure):
        return True
    filled = structure.constraint.nnz + structure.quadratic.nnz
    return filled <= SPARSE and filled <= FILLED * size


def complementary(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> tuple[ConicPoint, Tensor, Tensor]:
    """The point with y and s, x and z made complementary, its slack, and (B,) |F|; NaN where it was not finite."""
    own = _Points(problem)
    start = own.start(point, slack)
    return *own.point(*start), own.residual(*start)[0]


def optimality_residual(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> Tensor:
    """(B,) the maximum norm of F at the complementary point next to a solver's answer; NaN where that is not finite."""
    own = _Points(problem)
    return own.residual(*own.start(point, slack))[0]


class _Points:
    """The map from (ξ, v) to points of a problem, F, and steps."""

    def __init__(self, problem: ConicProblem) -> None:
        self.problem = problem
        self.lower, self.upper = problem.full_bounds() if problem.structure.has_bounds else (None, None)

    def select(self, rows: Tensor) -> _Points:
        if rows.shape[0] == self.problem.batch_size:
            return self
        return _Points(self.problem.select(rows))

    def start(self, point: ConicPoint, slack: Tensor) -> tuple[Tensor, Tensor]:
        """(ξ, v): (B, n) and (B, m); multipliers of absent bounds are left out."""
        v = point.y - slack
        v[:, : self.problem.structure.cones.zero] = point.y[:, : self.problem.structure.cones.zero]
        if self.lower is None or self.upper is None:
            return point.x.clone(), v
        z = torch.where(torch.isfinite(self.upper), point.z, point.z.clamp(max=0.0))
        z = torch.where(torch.isfinite(self.lower), z, z.clamp(min=0.0))
        return point.x + z, v

    def point(self, xi: Tensor, v: Tensor) -> tuple[ConicPoint, Tensor]:
        """The complementary point and its slack."""
        y, slack = self._split(v)
        if self.lower is None or self.upper is None:
            return ConicPoint(xi.clone(), y, torch.zeros_like(xi)), slack
        x = torch.minimum(torch.maximum(xi, self.lower), self.upper)
        return ConicPoint(x, y, xi - x), slack

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``Π(v)`` and ``Π(v) - v``, each computed so that neither cancels for the orthants."""
        cones = self.problem.structure.cones
        if cones.is_polyhedral:
            y = v.clamp(min=0.0)
            y[:, : cones.zero] = v[:, : cones.zero]
            slack = (-v).clamp(min=0.0)
            slack[:, : cones.zero] = 0.0
            return y, slack
        rows = v.detach().cpu().numpy()
        y = from_numpy(project(cones, rows, dual=True)).to(v.device)
        slack = from_numpy(project(cones, -rows)).to(v.device)
        return y, slack

    def residual(self, xi: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|F| (B,), and its parts (B, n) and (B, m)."""
        problem, structure = self.problem, self.problem.structure
        point, slack = self.point(xi, v)
        q, b = (per_element(datum, problem.batch_size) for datum in (problem.data.q, problem.data.b))
        slope = problem.quadratic_product(point.x) + q + structure.constraint.rmatvec(problem.data.A, point.y) + point.z
        rows = structure.constraint.matvec(problem.data.A, point.x) + slack - b
        return torch.maximum(maximum_norm(slope), maximum_norm(rows)), slope, rows

    def ahead(
        self, xi: Tensor, v: Tensor, error: Tensor, slope: Tensor, rows: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The best of a few whole steps: the number of steps there (B,), the point (ξ, v), and its |F| (B,)."""
        best_xi, best_v, best = xi, v, error
        count = torch.zeros(error.shape[0], dtype=torch.int64, device=error.device)
        for number in range(1, AHEAD + 1):
            d_xi, d_v = self.step(xi, v, error, slope, rows)
            xi, v = xi + d_xi, v + d_v
            error, slope, rows = self.residual(xi, v)
            better = error < best  # false for NaN
            best_xi, best_v = (torch.where(better[:, None], new, old) for new, old in ((xi, best_xi), (v, best_v)))
            best, count = torch.where(better, error, best), torch.where(better, number, count)
            if not bool((best > ENOUGH).any()) or not bool(torch.isfinite(error).all()):
                break
        return count, (best_xi, best_v), best

    def step(self, xi: Tensor, v: Tensor, error: Tensor, slope: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``(dξ, dv)`` of Newton's method."""
        problem = self.problem
        point, slack = self.point(xi, v)
        lower, upper = problem.full_bounds()
        parts = (*point, slack, slope, rows, torch.zeros_like(slope), lower, upper)
        points = KKTPoints(*(part.detach().cpu().numpy() for part in parts))
        view, count = ElementView(problem), problem.batch_size
        matrices = (view.rows(name, range(count)) for name in ("P", "A"))
        P, A = (np.broadcast_to(own, (count, own.shape[1])) for own in matrices)
        known = Known(error.cpu().numpy(), np.zeros(count), damped=True)
        change = respond(problem.structure, 0.0, P, A, points, known)
        dx, dy, dz = (from_numpy(part).to(xi.device) for part in change[:3])
        moved = problem.structure.constraint.matvec(problem.data.A, dx) + rows
        # What the equalities' slack would be is a part of F, not of v.
        moved[:, : problem.structure.cones.zero] = 0.0
        return dx + dz, dy + moved
