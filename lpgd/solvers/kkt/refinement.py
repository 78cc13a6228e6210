"""Newton's method on the optimality conditions, from any solver's answer: where the last digits come from.

For ``v = y - s`` and ``ξ = x + z``, with ``y = Π(v)`` the projection onto K*, ``s = y - v``, ``x = clip(ξ)`` between
the bounds and ``z = ξ - x``, every point is complementary, and a solution is a root of

    F(ξ, v) = (P x + q + Aᵀy + z,  A x + s - b).

A step is one solve of the system of :mod:`lpgd.solvers.kkt.system` with F for its tilt: ``(dx, dy, dz)``, and
``dv = dy + A dx + F₂``.  Where the system is singular, or as good as singular at a point known no better than |F|, the
step is Levenberg and Marquardt's with ``μ = |F|²``, which converges onto manifolds of solutions as Newton's method does
to a regular one (Fan and Yuan 2005).  Near a solution the next steps are chords, by the same factors: where a step
leaves the share ``c |F|`` of F, a chord leaves about twice that share of what is left.  A step that does not reduce |F|
is halved.  Where that does not help, a few whole steps are looked ahead: near a solution of a linear or quadratic
program |F| may rise until the active set is right, and vanish then.  If none of them is better by far, the point stays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy, rows_where
from lpgd.cones.projections import SpectralDerivative, project, projection_derivative
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.elements import ElementView
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.residuals import Products
from lpgd.problems.conic.structure import ConicPoint, ConicStructure, per_element
from lpgd.solvers.kkt.factored import Factored
from lpgd.solvers.kkt.rank import NEAR
from lpgd.solvers.kkt.schur import MixedSystem, Part, SchurFactor, System
from lpgd.solvers.kkt.system import KKTPoints, Known, respond

__all__ = ["KeptFactor", "Points", "Refined", "complementary", "is_cheap", "is_small", "optimality_residual", "refine"]

ENOUGH = 1e-14
"""Points whose F is no larger than this are left alone."""
DENSE, SPARSE, FILLED = 300, 50_000, 20
"""Steps are cheap up to so many variables and rows, or so many entries with so many in a row on average."""
WORST = 1e13
"""Steps by systems with a larger condition are damped."""
CORRECTIONS, LEFT = 6, 1e-13
"""How often a response by the system of a point nearby is corrected, and what may then be left of its equations."""
LENGTHS = (1.0, 0.5, 0.25)
"""The lengths at which a step is tried."""
CHORDS, CLOSE, FALL, FLOOR = 3, 1e-3, 0.1, 1e-13
"""Where a step has reduced |F| to a smaller share than ``CLOSE``, up to so many steps by the same system follow, as
long as each reduces |F| to ``FALL`` of it; what is left below ``FLOOR`` where it does not is rounding."""
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
        kept: the systems of the last steps.
    """

    point: ConicPoint
    slack: Tensor
    before: Tensor
    after: Tensor
    taken: Tensor
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


def refine(
    problem: ConicProblem,
    point: ConicPoint,
    slack: Tensor,
    elements: Tensor,
    *,
    steps: int = 3,
    keep: bool = False,
) -> Refined:
    """Newton's method from a point, for some elements of a batch.

    Args:
        problem: in units in which its terms are of order 1: F is measured as it is.  Integers are not looked at.
        point, slack: a solver's answer for all B elements; for conic programs without integer variables.
        elements: which to refine.
        steps: at most.
        keep: the systems of the last steps, for the derivative of the solutions.
    """
    kept: list[KeptFactor] = []
    if not torch.equal(elements, torch.arange(problem.batch_size, device=problem.device)):
        problem, point, slack = problem.select(elements), point.select(elements), slack[elements]
    points = Points(problem)
    xi, v = points.start(point, slack)
    error, slope, row_error = points.residual(xi, v)
    before, taken = error.clone(), torch.zeros(elements.shape[0], dtype=torch.int64, device=problem.device)
    left = error > ENOUGH  # false for NaN
    stuck = torch.zeros_like(left)
    for _ in range(steps):
        todo = rows_where(left)
        if not todo.shape[0]:
            break
        chosen, start = points.select(todo), error[todo]
        d_xi, d_v, factored = chosen.regular_step(xi[todo], v[todo], error[todo], slope[todo], row_error[todo])
        if keep and factored is not None:
            stepped = elements[todo]
            stale = [factor._replace(valid=factor.valid & ~torch.isin(factor.elements, stepped)) for factor in kept]
            kept = [factor for factor in stale if bool(factor.valid.any())]
            kept.append(KeptFactor(stepped, from_numpy(factored.regular), factored))
        waiting = torch.arange(todo.shape[0], device=problem.device)
        for length in LENGTHS:
            trial = points.select(todo[waiting]) if waiting.shape[0] < todo.shape[0] else chosen
            at = todo[waiting]
            new_xi, new_v = xi[at] + length * d_xi[waiting], v[at] + length * d_v[waiting]
            found = trial.residual(new_xi, new_v)
            better = found[0] < error[at]
            moved = at[better]
            for whole, fresh in zip((xi, v, error, slope, row_error), (new_xi, new_v, *found), strict=True):
                whole[moved] = fresh[better]
            taken[moved] += 1
            waiting = waiting[~better]
            if not waiting.shape[0]:
                break
        left[todo[waiting]], stuck[todo[waiting]] = False, True
        left &= error > ENOUGH
        going = left[todo] & (error[todo] < CLOSE * start)
        for _ in range(CHORDS):
            if factored is None or not bool(going.any()):
                break
            d_xi, d_v = chosen.chord(factored, slope[todo], row_error[todo])
            new_xi, new_v = xi[todo] + d_xi, v[todo] + d_v
            found = chosen.residual(new_xi, new_v)
            better = going & (found[0] < error[todo])
            going = better & (found[0] <= FALL * error[todo])
            moved = todo[better]
            for whole, fresh in zip((xi, v, error, slope, row_error), (new_xi, new_v, *found), strict=True):
                whole[moved] = fresh[better]
            taken[moved] += 1
            left[todo] &= error[todo] > torch.where(going, ENOUGH, FLOOR)
            going &= left[todo]
    stuck &= error > STUCK
    if is_small(problem.structure) and bool(stuck.any()):
        stuck &= error > STUCK * points.point(xi, v)[0].largest()
    todo = rows_where(stuck)
    if is_small(problem.structure) and todo.shape[0]:
        count, ends, known = points.select(todo).ahead(xi[todo], v[todo], error[todo], slope[todo], row_error[todo])
        better = known < GAIN * error[todo]
        moved = todo[better]
        xi[moved], v[moved], error[moved] = ends[0][better], ends[1][better], known[better]
        taken[moved] += count[better]
    finite = torch.isfinite(before)
    refined, refined_slack = points.point(xi, v)
    if not bool(finite.all()):
        refined = refined.where(finite, point)
        refined_slack = torch.where(finite[:, None], refined_slack, slack)
    return Refined(refined, refined_slack, before, error, taken, tuple(kept))


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


def complementary(
    problem: ConicProblem, point: ConicPoint, slack: Tensor
) -> tuple[ConicPoint, Tensor, Tensor, Products]:
    """The point with y and s, x and z made complementary, its slack, (B,) |F|, and its products with the matrices.

    |F| is NaN where the point was not finite.
    """
    points = Points(problem)
    found, found_slack = points.point(*points.start(point, slack))
    products = Products.of(problem, found)
    return found, found_slack, points.residual_of(found, found_slack, products)[0], products


def optimality_residual(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> Tensor:
    """(B,) the maximum norm of F at the complementary point next to a solver's answer; NaN where that is not finite."""
    points = Points(problem)
    return points.residual(*points.start(point, slack))[0]


class Points:
    """The map from (ξ, v) to points of a problem, F, and steps."""

    def __init__(self, problem: ConicProblem) -> None:
        self.problem = problem
        self.lower, self.upper = problem.full_bounds() if problem.structure.has_bounds else (None, None)

    def select(self, elements: Tensor) -> Points:
        if elements.shape[0] == self.problem.batch_size:
            return self
        return Points(self.problem.select(elements))

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
        (x, z), (y, slack) = self._clipped(xi), self._split(v)
        return ConicPoint(x, y, z), slack

    def _clipped(self, xi: Tensor) -> tuple[Tensor, Tensor]:
        """The variables and their bounds' multipliers."""
        if self.lower is None or self.upper is None:
            return xi.clone(), torch.zeros_like(xi)
        x = torch.minimum(torch.maximum(xi, self.lower), self.upper)
        return x, xi - x

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """``Π(v)`` and ``Π(v) - v``, computed so that neither cancels where all cones are orthants."""
        cones = self.problem.structure.cones
        if cones.is_polyhedral:
            y = v.clamp(min=0.0)
            y[:, : cones.zero] = v[:, : cones.zero]
            slack = (-v).clamp(min=0.0)
            slack[:, : cones.zero] = 0.0
            return y, slack
        # By Moreau's decomposition Π(v) = v + P_K(-v): one projection for both.
        slack = from_numpy(project(cones, -v.detach().cpu().numpy())).to(v.device)
        return v + slack, slack

    def pieces(self, xi: Tensor, v: Tensor) -> Tensor:
        """(B, nonnegative rows + n) which inequalities are active (1), and at which bounds variables are (-1, 1)."""
        row_pieces = (v[:, self.problem.structure.cones.sections["nonnegative"]] > 0).to(torch.int8)
        if self.lower is None or self.upper is None:
            return row_pieces
        return torch.cat([row_pieces, (xi > self.upper).to(torch.int8) - (xi < self.lower).to(torch.int8)], 1)

    def residual(self, xi: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|F| (B,), and its parts (B, n) and (B, m)."""
        point, slack = self.point(xi, v)
        return self.residual_of(point, slack, Products.of(self.problem, point))

    def residual_of(self, point: ConicPoint, slack: Tensor, products: Products) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a complementary point."""
        problem = self.problem
        q, b = (per_element(datum, problem.batch_size) for datum in (problem.data.q, problem.data.b))
        slope = products.Px + q + products.Aty + point.z
        row_error = products.Ax + slack - b
        return torch.maximum(maximum_norm(slope), maximum_norm(row_error)), slope, row_error

    def ahead(
        self, xi: Tensor, v: Tensor, error: Tensor, slope: Tensor, row_error: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """The best of a few whole steps: the number of steps there (B,), the point (ξ, v), and its |F| (B,)."""
        best_xi, best_v, best = xi.clone(), v.clone(), error.clone()
        count = torch.zeros(error.shape[0], dtype=torch.int64, device=error.device)
        left, chosen = torch.arange(error.shape[0], device=error.device), self
        for number in range(1, AHEAD + 1):
            d_xi, d_v = chosen.step(xi, v, error, slope, row_error)
            xi, v = xi + d_xi, v + d_v
            error, slope, row_error = chosen.residual(xi, v)
            better = error < best[left]  # false for NaN
            improved = left[better]
            best_xi[improved], best_v[improved], best[improved] = xi[better], v[better], error[better]
            count[improved] = number
            going = (best[left] > ENOUGH) & torch.isfinite(error)
            if not bool(going.any()):
                break
            if not bool(going.all()):
                left = left[going]
                xi, v, error, slope, row_error = (tensor[going] for tensor in (xi, v, error, slope, row_error))
                chosen = self.select(left)
        return count, (best_xi, best_v), best

    def regular_step(
        self, xi: Tensor, v: Tensor, error: Tensor, slope: Tensor, row_error: Tensor
    ) -> tuple[Tensor, Tensor, System | None]:
        """:meth:`step`, and the systems, which can be kept where they are on the CPU."""
        if self.problem.device.type != "cpu":
            return *self.step(xi, v, error, slope, row_error), None
        factored = self.factored(xi, v)
        d_xi, d_v = self.chord(factored, slope, row_error)
        near = from_numpy((factored.condition < WORST) & (factored.inverse * error.numpy() < NEAR))
        near &= torch.isfinite(d_xi).all(-1) & torch.isfinite(d_v).all(-1)
        left = (~near).nonzero()[:, 0]
        if left.shape[0]:
            d_xi[left], d_v[left] = self.select(left).step(xi[left], v[left], error[left], slope[left], row_error[left])
        return d_xi, d_v, factored

    def response(self, factored: System, xi: Tensor, v: Tensor, tilt: ConicPoint) -> tuple[ConicPoint, Tensor]:
        """The derivative of a solution (ξ, v) along a tilt, and (B,) whether it is exact to rounding.

        By the system of a point nearby: what that leaves of the derivative of F here is solved for again.
        """
        problem, structure = self.problem, self.problem.structure
        cones, count = structure.cones, problem.batch_size
        held = torch.zeros_like(xi, dtype=torch.bool)
        if self.lower is not None and self.upper is not None:
            held = (xi > self.upper) | (xi < self.lower) | (self.lower >= self.upper)
        active = v >= 0
        active[:, : cones.zero] = True
        curved = None if cones.is_polyhedral else projection_derivative(cones, v.numpy(), dual=True)
        size = torch.stack([maximum_norm(direction) for direction in tilt]).amax(0)
        change = ConicPoint(*(torch.zeros_like(direction) for direction in tilt))
        right, exact = (tilt.x, tilt.y, tilt.z), torch.zeros(count, dtype=torch.bool)
        d_xi, d_v, finite = torch.zeros_like(xi), torch.zeros_like(v), torch.ones(count, 1, dtype=torch.bool)
        for _ in range(CORRECTIONS):
            more_xi, more_v = self.chord(factored, *right)
            going = ~exact[:, None]  # the others stay as they are, whatever becomes of these
            finite &= torch.isfinite(more_xi).all(-1)[:, None] | ~going
            d_xi = torch.where(going, torch.where(finite, d_xi + more_xi, 0.0), d_xi)
            d_v = torch.where(going, torch.where(finite, d_v + more_v, 0.0), d_v)
            dx = torch.where(held, -tilt.z, d_xi)
            dz = torch.where(held, d_xi - dx, 0.0)
            dy = torch.where(active, d_v, 0.0) if curved is None else _applied(curved, d_v)
            change = ConicPoint(dx, dy, dz)
            slope = tilt.x + problem.quadratic_product(dx) + structure.constraint.rmatvec(problem.data.A, dy) + dz
            row_error = tilt.y + structure.constraint.matvec(problem.data.A, dx) + dy - d_v
            row_error[:, : cones.zero] = (tilt.y + structure.constraint.matvec(problem.data.A, dx))[:, : cones.zero]
            error = torch.maximum(maximum_norm(slope), maximum_norm(row_error))
            largest = torch.maximum(size, torch.maximum(maximum_norm(d_xi), maximum_norm(d_v)))
            exact |= finite[:, 0] & (error <= LEFT * largest)
            if bool(exact.all()):
                break
            right = slope, row_error, torch.zeros_like(slope)
        return change, exact

    def step(self, xi: Tensor, v: Tensor, error: Tensor, slope: Tensor, row_error: Tensor) -> tuple[Tensor, Tensor]:
        """``(dξ, dv)`` of Newton's method."""
        problem = self.problem
        point, slack = self.point(xi, v)
        lower, upper = problem.full_bounds()
        tensors = (*point, slack, slope, row_error, torch.zeros_like(slope), lower, upper)
        points = KKTPoints(*(tensor.detach().cpu().numpy() for tensor in tensors))
        view, count = ElementView(problem), problem.batch_size
        matrices = (view.rows(name, range(count)) for name in ("P", "A"))
        P, A = (np.broadcast_to(matrix, (count, matrix.shape[1])) for matrix in matrices)
        known = Known(error.cpu().numpy(), np.zeros(count), damped=True)
        change = respond(problem.structure, 0.0, P, A, points, known)
        dx, dy, dz = (from_numpy(array).to(xi.device) for array in change[:3])
        moved = problem.structure.constraint.matvec(problem.data.A, dx) + row_error
        # What the equalities' slack would be is a part of F, not of v.
        moved[:, : problem.structure.cones.zero] = 0.0
        return dx + dz, dy + moved

    def factored(self, xi: Tensor, v: Tensor, factor: SchurFactor | None = None) -> System:
        """The system of Newton's method at a point, to be solved for several right-hand sides.

        Args:
            xi, v: the point.
            factor: of these elements, where it is known; each element's system is made from it if its P is definite.
        """
        factor = SchurFactor.of(self.problem) if factor is None else factor
        if factor is None:
            return self._own_system(xi, v)
        if bool(factor.fine.all()):
            return factor.at(self.pieces(xi, v))
        fine = factor.fine.repeat(xi.shape[0] // factor.fine.shape[0])
        parts: list[Part] = []
        if bool(fine.any()):
            by_factor = rows_where(fine)
            pieces = self.select(by_factor).pieces(xi[by_factor], v[by_factor])
            parts.append(Part(by_factor, factor.select(by_factor).at(pieces)))
        others = rows_where(~fine)
        parts.append(Part(others, self.select(others)._own_system(xi[others], v[others])))
        return MixedSystem(parts, xi.shape[0])

    def _own_system(self, xi: Tensor, v: Tensor) -> Factored:
        problem, (x, z) = self.problem, self._clipped(xi)
        view, count = ElementView(problem), problem.batch_size
        matrices = (view.rows(name, range(count)) for name in ("P", "A"))
        P, A = (np.broadcast_to(matrix, (count, matrix.shape[1])) for matrix in matrices)
        arrays = (tensor.numpy() for tensor in (x, v, z, *problem.full_bounds()))
        return Factored(problem.structure, 0.0, P, A, *arrays)

    def chord(
        self, factored: System, slope: Tensor, row_error: Tensor, bounds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(dξ, dv)`` for what is left of F, ``slope`` (B, n) and ``row_error`` (B, m), by a system of another point.

        ``bounds`` (B, n) is by how much bounds move down.
        """
        shift = torch.zeros_like(slope) if bounds is None else bounds
        change = factored.solve(*(tensor.numpy() for tensor in (slope, row_error, shift)))
        dx, dy, dz = (from_numpy(array) for array in change)
        finite = torch.isfinite(dx).all(-1) & torch.isfinite(dy).all(-1)  # else singular
        if not bool(finite.all()):
            dx, dy, dz = (torch.where(finite[:, None], tensor, 0.0) for tensor in (dx, dy, dz))
        moved = self.problem.structure.constraint.matvec(self.problem.data.A, dx) + row_error
        moved[:, : self.problem.structure.cones.zero] = 0.0
        return torch.where(finite[:, None], dx + dz, torch.nan), torch.where(finite[:, None], dy + moved, torch.nan)


def _applied(derivative: SpectralDerivative, vectors: Tensor) -> Tensor:
    """The derivative of the projections of k points, times (k, m)."""
    return from_numpy(derivative.apply(vectors.numpy().ravel())).reshape(vectors.shape)
