"""Complementary points of a batch of programs, what is left of the optimality conditions there, and Newton's steps.

The map from (ξ, v) to points, and F, are those of :mod:`lpgd.solvers.kkt.refinement`.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, from_numpy, rows_where
from lpgd.cones.projections import project, projection_derivative
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.elements import ElementView
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.residuals import Products
from lpgd.problems.conic.structure import ConicPoint, per_element
from lpgd.solvers.kkt.factored import Factored
from lpgd.solvers.kkt.mixed import MixedSystem, Part
from lpgd.solvers.kkt.rank import NEAR
from lpgd.solvers.kkt.schur import SchurFactor, System
from lpgd.solvers.kkt.system import KKTPoints, Known, respond

__all__ = ["ENOUGH", "Points", "share_along"]

ENOUGH = 1e-14
"""Points whose F is no larger than this are left alone."""
WORST = 1e13
"""Steps by systems with a larger condition are damped."""
CORRECTIONS, LEFT = 8, 1e-13
"""How often a response by the system of a point nearby is corrected, and what may then be left of its equations."""
CLOSE, COMPARED = 1e-3, 1e-10
"""A guess of a response is taken if it leaves less than the first share of its equations; the second share is enough to
be compared with."""
AHEAD = 5
"""So many steps are looked ahead."""


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

    def plainly_singular(self, xi: Tensor, v: Tensor) -> Tensor:
        """(B,) where the system of a linear or quadratic program cannot be regular, by the number of its unknowns.

        That is so where more rows are active than variables are free, and, inside a face, where fewer rows are active
        than free variables without curvature are in them.
        """
        problem, structure = self.problem, self.problem.structure
        active = v >= 0
        active[:, : structure.cones.zero] = True
        free = torch.ones_like(xi, dtype=torch.bool)
        if self.lower is not None and self.upper is not None:
            free = (xi <= self.upper) & (xi >= self.lower) & (self.lower < self.upper)
        count = active.sum(1)
        singular = count > free.sum(1)
        flat = free & (per_element(self._curvature(), len(xi)) == 0)
        if bool(((flat.sum(1) > count) & ~singular).any()):
            entries = (structure.constraint.to_dense(problem.data.A) != 0).float()
            if entries.ndim == 3 and len(entries) < len(xi):  # matrices repeat
                entries = entries.repeat(len(xi) // len(entries), 1, 1)
            involved = (active.float()[:, None] @ entries)[:, 0] > 0
            singular |= (flat & involved).sum(1) > count
        return singular

    def _curvature(self) -> Tensor:
        """(n,) or (B, n) the diagonal of P."""
        structure, values = self.problem.structure, self.problem.symmetric_P
        rows, columns = structure.quadratic.rows, structure.quadratic.columns
        diagonal = values.new_zeros(*values.shape[:-1], structure.n)
        on = np.flatnonzero(rows == columns)
        diagonal[..., from_numpy(rows[on])] = values[..., from_numpy(on)]
        return diagonal

    def residual(self, xi: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """|F| (B,), and its parts (B, n) and (B, m)."""
        point, slack = self.point(xi, v)
        return self.residual_of(point, slack, Products.of(self.problem, point))

    def residual_of(self, point: ConicPoint, slack: Tensor, products: Products) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a complementary point."""
        q, b = self._vectors
        if q.device.type != "cpu":
            slope = products.Px + q + products.Aty + point.z
            row_error = products.Ax + slack - b
            return torch.maximum(maximum_norm(slope), maximum_norm(row_error)), slope, row_error
        # NumPy's operations on few numbers take a third of the time of torch's.
        Px, Aty, Ax, z, s = (tensor.detach().numpy() for tensor in (*products, point.z, slack))
        slopes = Px + q.numpy() + Aty + z
        row_errors = Ax + s - b.numpy()
        error = np.maximum(_norms(slopes), _norms(row_errors))
        return from_numpy(error), from_numpy(slopes), from_numpy(row_errors)

    @cached_property
    def _vectors(self) -> tuple[Tensor, Tensor]:
        """The vectors q and b of each element, (B, n) and (B, m)."""
        data, size = self.problem.data, self.problem.batch_size
        return per_element(data.q.detach(), size), per_element(data.b.detach(), size)

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
        self, xi: Tensor, v: Tensor, error: Tensor, slope: Tensor, row_error: Tensor, *, damped: bool = True
    ) -> tuple[Tensor, Tensor, System | None]:
        """:meth:`step`, and the systems, which can be kept where they are on the CPU.

        Steps that would have to be damped are NaN if they should not be.
        """
        if self.problem.device.type != "cpu":
            return *self.step(xi, v, error, slope, row_error), None
        factored = self.factored(xi, v)
        d_xi, d_v = self.chord(factored, slope, row_error)
        near = from_numpy((factored.condition < WORST) & (factored.inverse * error.numpy() < NEAR))
        near &= torch.isfinite(d_xi).all(-1) & torch.isfinite(d_v).all(-1)
        left = (~near).nonzero()[:, 0]
        if left.shape[0] and not damped:
            d_xi[left], d_v[left] = torch.nan, torch.nan
        elif left.shape[0]:
            d_xi[left], d_v[left] = self.select(left).step(xi[left], v[left], error[left], slope[left], row_error[left])
        return d_xi, d_v, factored

    def response(
        self, factored: System, xi: Tensor, v: Tensor, tilt: ConicPoint, near: ConicPoint | None = None
    ) -> tuple[ConicPoint, Tensor]:
        """The derivative of a solution (ξ, v) along a tilt, and (B,) whether it is exact to rounding.

        By the system of a point nearby: what that leaves of the derivative of F here is solved for again.  Where it is
        singular nothing is exact.  ``near`` is a difference that the derivative is to be compared with: it is where the
        steps start, if it leaves little, and ten digits are enough.
        """
        cones, count = self.problem.structure.cones, self.problem.batch_size
        v_array, (g_x, g_y, g_z) = v.numpy(), (direction.numpy() for direction in tilt)
        held = None
        if self.lower is not None and self.upper is not None:
            held = ((xi > self.upper) | (xi < self.lower) | (self.lower >= self.upper)).numpy()
        active = v_array >= 0
        active[:, : cones.zero] = True
        curved = None if cones.is_polyhedral else projection_derivative(cones, v_array, dual=True)
        size = np.max([_norms(direction) for direction in (g_x, g_y, g_z)], axis=0)
        regular = factored.regular
        exact, finite = ~regular, np.ones((count, 1), dtype=np.bool_)
        d_xi, d_v, enough = np.zeros_like(g_x), np.zeros_like(v_array), LEFT
        if near is not None:
            Ax = self.problem.structure.constraint.matvec(self.problem.data.A, near.x)
            d_xi, d_v, enough = (near.x + near.z).numpy(), (near.y + tilt.y + Ax).numpy(), COMPARED
            d_v[:, : cones.zero] = near.y.numpy()[:, : cones.zero]
        change, right = tilt, (g_x, g_y, g_z)
        for number in range(CORRECTIONS):
            judged = near is not None and number == 0
            more_xi, more_v = (d_xi, d_v) if judged else self._chord(factored, *right)
            with np.errstate(over="ignore", invalid="ignore"):  # of systems that are singular
                going = ~exact[:, None]  # the others stay as they are, whatever becomes of these
                finite &= np.isfinite(more_xi).all(-1, keepdims=True) | ~going | judged
                if number:
                    more_xi, more_v = d_xi + more_xi, d_v + more_v
                d_xi = np.where(going, np.where(finite, more_xi, 0.0), d_xi)
                d_v = np.where(going, np.where(finite, more_v, 0.0), d_v)
                dx = d_xi if held is None else np.where(held, -g_z, d_xi)
                dz = np.zeros_like(dx) if held is None else np.where(held, d_xi - dx, 0.0)
                dy = np.where(active, d_v, 0.0) if curved is None else curved.apply(d_v.ravel()).reshape(d_v.shape)
                change = ConicPoint(from_numpy(dx), from_numpy(dy), from_numpy(dz))
                Px, Aty, Ax = (product.numpy() for product in Products.of(self.problem, change))
                slope, row_error = g_x + Px + Aty + dz, g_y + Ax
                row_error[:, cones.zero :] += (dy - d_v)[:, cones.zero :]
                error = np.maximum(_norms(slope), _norms(row_error))
                largest = np.maximum(size, np.maximum(_norms(d_xi), _norms(d_v)))
                exact |= finite[:, 0] & (error <= enough * largest)
            if exact.all():
                break
            right = slope, row_error, np.zeros_like(slope)
            if judged:
                fine = (error <= CLOSE * largest)[:, None]  # false for NaN
                d_xi, d_v = np.where(fine, d_xi, 0.0), np.where(fine, d_v, 0.0)
                right = np.where(fine, slope, g_x), np.where(fine, row_error, g_y), np.where(fine, 0.0, g_z)
        return change, from_numpy(exact & regular)

    def step(self, xi: Tensor, v: Tensor, error: Tensor, slope: Tensor, row_error: Tensor) -> tuple[Tensor, Tensor]:
        """``(dξ, dv)`` of Newton's method."""
        problem = self.problem
        point, slack = self.point(xi, v)
        lower, upper = problem.full_bounds()
        tensors = (*point, slack, slope, row_error, torch.zeros_like(slope), lower, upper)
        points = KKTPoints(*(tensor.detach().cpu().numpy() for tensor in tensors))
        known = Known(error.cpu().numpy(), np.zeros(problem.batch_size), damped=True)
        change = respond(problem.structure, 0.0, *self._matrices(), points, known)
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
        arrays = (tensor.numpy() for tensor in (x, v, z, *problem.full_bounds()))
        return Factored(problem.structure, 0.0, *self._matrices(), *arrays)

    def _matrices(self) -> tuple[FloatArray, FloatArray]:
        """(B, ·) the values of P and A of each element."""
        problem = self.problem
        view, count = ElementView(problem), problem.batch_size
        P, A = (view.rows(name, range(count)) for name in ("P", "A"))
        return np.broadcast_to(P, (count, P.shape[1])), np.broadcast_to(A, (count, A.shape[1]))

    def chord(
        self, factored: System, slope: Tensor, row_error: Tensor, bounds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(dξ, dv)`` for what is left of F, ``slope`` (B, n) and ``row_error`` (B, m), by a system of another point.

        ``bounds`` (B, n) is by how much bounds move down.
        """
        shift = torch.zeros_like(slope) if bounds is None else bounds
        d_xi, d_v = self._chord(factored, slope.numpy(), row_error.numpy(), shift.numpy())
        return from_numpy(d_xi), from_numpy(d_v)

    def _chord(
        self, factored: System, slope: FloatArray, row_error: FloatArray, shift: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """The same of arrays; NaN for an element whose system is singular."""
        dx, dy, dz = factored.solve(slope, row_error, shift)
        finite: BoolArray = np.logical_and(np.isfinite(dx).all(-1), np.isfinite(dy).all(-1))
        if not finite.all():
            dx, dy, dz = (np.where(finite[:, None], change, 0.0) for change in (dx, dy, dz))
        moved = self.problem.structure.constraint.matvec(self.problem.data.A, from_numpy(dx)).numpy() + row_error
        moved[:, : self.problem.structure.cones.zero] = 0.0
        d_xi, d_v = dx + dz, dy + moved
        if not finite.all():
            d_xi[~finite], d_v[~finite] = np.nan, np.nan
        return d_xi, d_v


def _norms(vectors: FloatArray) -> FloatArray:
    """(B,) the largest magnitude in each row."""
    return np.abs(vectors).max(-1, initial=0.0)


def share_along(first: Tensor, second: Tensor) -> Tensor:
    """(k, 1) the part of a vector along another one, in units of that."""
    return (first * second).sum(-1, keepdim=True) / first.square().sum(-1, keepdim=True).clamp(min=1e-300)
