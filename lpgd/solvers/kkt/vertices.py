"""Vertices of linear programs along a tilt of the cost, by the simplex method from the vertices that are known.

With the slacks of inequality rows as variables, B the columns that are basic and ``d = c + Aᵀy`` the reduced costs, a
vertex is optimal as long as no reduced cost changes its sign.  Along ``c + t g`` they are affine in t:

    d(t) = d + t δ,    δ = g + Aᵀη,    Bᵀη = -g_B.

The first one that is zero says which column enters, and the first basic variable that reaches a bound which one leaves
(the parametric simplex method: Chvátal, Linear programming, 1983, chapter 10).  No time is spent on vertices that are
optimal for no t.  One factorisation of B serves both sides of a difference and all later bases: these differ by a
column each (product form of the inverse).

What is found is worked out from the solution, so that what is left there of the optimality conditions cancels in
differences, and not at all by sums over steps.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import BoolArray, FloatArray, IntArray, from_numpy, random_direction
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint
from lpgd.solvers.kkt.found import Found
from lpgd.solvers.kkt.packed import packed_size
from lpgd.solvers.kkt.points import Points
from lpgd.solvers.kkt.reduced import is_dense

__all__ = ["TiltedVertices"]

STEPS = 16
"""So many columns enter at most, where no more reduced costs would change their signs with the first basis: random
programs of 240 variables and 60 rows take 3 on average after a step of 0.01 units, and 60 after one of 0.1."""
TALL = 2
"""Bases of programs with more rows, as a multiple of the variables, are mostly slacks, and no small matrices."""
PIVOT, ILL_CONDITIONED = 1e-7, 1e10
"""Relative pivots below this, and bases whose condition is larger, as far as a random direction shows it, are singular.
"""
ENOUGH = 1e-15
"""With no more left of F than this, relative to the point, nothing is gained by a correction."""


class TiltedVertices:
    """The solutions of E linear programs along a tilt of their costs.

    Args:
        problem: in units of order 1; see :meth:`fits`.
        xi, v: the solutions: (E, n) and (E, m) of :mod:`lpgd.solvers.kkt.refinement`.
        tilt: (E, ·) each, of the costs alone.
    """

    def __init__(self, problem: ConicProblem, xi: Tensor, v: Tensor, tilt: ConicPoint) -> None:
        self.problem, self.tilt = problem, tilt
        structure = problem.structure
        n, m, zero = structure.n, structure.m, structure.cones.zero
        self.count, self.n, self.m, self.zero = len(xi), n, m, zero
        self.columns = structure.constraint.dense_columns(np.atleast_2d(problem.data.A.numpy()))
        ends, places, rows = (end.numpy() for end in problem.full_bounds()), xi.numpy(), v.numpy()
        lower, upper = ends
        x, slack = np.minimum(np.maximum(places, lower), upper), np.maximum(-rows[:, zero:], 0.0)
        y = rows.copy()
        y[:, zero:] = np.maximum(rows[:, zero:], 0.0)
        nothing = np.zeros_like(slack)
        self.y, self.x = y, np.concatenate([x, slack], 1)
        self.lower, self.upper = np.concatenate([lower, nothing], 1), np.concatenate([upper, nothing + np.inf], 1)
        self.g, self.d = np.concatenate([tilt.x.numpy(), nothing], 1), np.concatenate([x - places, y[:, zero:]], 1)
        fixed = self.lower >= self.upper
        free = np.concatenate([(places <= upper) & (places >= lower), rows[:, zero:] <= 0.0], 1) & ~fixed
        at_upper = np.concatenate([places > upper, nothing > 0.0], 1)
        self.sides: FloatArray = np.where(free | fixed, 0.0, np.where(at_upper, -1.0, 1.0))
        self.is_vertex: BoolArray = free.sum(1) == m
        self.basis: IntArray = np.argsort(~free, axis=1, kind="stable")[:, :m]
        self._factorise()

    @staticmethod
    def fits(problem: ConicProblem, tilt: ConicPoint) -> bool:
        """Whether these are small dense linear programs, and a tilt of their costs alone."""
        structure = problem.structure
        if not structure.traits.is_linear_program or not 0 < structure.m <= TALL * structure.n:
            return False
        return is_dense(structure) and not bool(tilt.y.any()) and not bool(tilt.z.any())

    def _factorise(self) -> None:
        count, m, side = self.count, self.m, packed_size(self.m)
        bases = np.zeros((count, side, side))  # column by column, as LAPACK has them
        bases[:, :m, :m] = self.entering(np.arange(count)[:, None], self.basis)
        bases[~self.is_vertex] = 0.0
        bases.reshape(count, side * side)[:, m * (side + 1) :: side + 1] = 1.0
        size = np.abs(bases).sum(1).max(1)
        lu, self._pivots = from_numpy(bases).mT, torch.empty(count, side, dtype=torch.int32)
        info = torch.empty(count, dtype=torch.int32)
        self._lu = linalg.lu_factor_ex(lu, out=(lu, self._pivots, info)).LU
        every = np.arange(count)
        with np.errstate(over="ignore", invalid="ignore"):
            random = self.by_first(np.tile(random_direction(m), (count, 1)), every, 1, adjoint=False)
            self.is_vertex &= (info.numpy() == 0) & (np.linalg.norm(random, axis=1) * size < ILL_CONDITIONED)
            eta = self.by_first(-np.take_along_axis(self.g, self.basis, 1), every, 1, adjoint=True)
            self.rates = self.g + self.priced(eta, every)

    def entering(self, elements: IntArray, columns: IntArray) -> FloatArray:
        """(…, m) columns of A and of slacks."""
        found = self.columns[elements % len(self.columns), np.minimum(columns, self.n - 1)]
        slacks = columns >= self.n
        if slacks.any():
            found[slacks] = 0.0
            found[(*np.nonzero(slacks), self.zero + columns[slacks] - self.n)] = 1.0
        return found

    def by_first(self, vectors: FloatArray, left: IntArray, copies: int, *, adjoint: bool) -> FloatArray:
        """``B⁻¹`` or ``B⁻ᵀ`` of the solutions times vectors (K, m) in ``left`` of the places of so many copies."""
        side = self._lu.shape[1]
        whole = np.zeros((copies * self.count, side))
        whole[left, : self.m] = vectors
        right = from_numpy(whole.reshape(copies, self.count, side).transpose(1, 2, 0))
        found = linalg.lu_solve(self._lu, self._pivots, right, adjoint=adjoint).numpy()
        return found.transpose(2, 0, 1).reshape(whole.shape)[left, : self.m]

    def priced(self, eta: FloatArray, left: IntArray) -> FloatArray:
        """(K, N) ``Aᵀη`` for all columns."""
        return np.concatenate([self.on_rows(eta, left), eta[:, self.zero :]], 1)

    def on_rows(self, vectors: FloatArray, left: IntArray) -> FloatArray:
        """``Aᵀη`` for vectors (K, m)."""
        return self._products(vectors, left, self.columns.swapaxes(1, 2))

    def on_variables(self, vectors: FloatArray, left: IntArray) -> FloatArray:
        """``A x`` for vectors (K, n)."""
        return self._products(vectors, left, self.columns)

    def _products(self, vectors: FloatArray, left: IntArray, matrices: FloatArray) -> FloatArray:
        """``vᵀ M``; matrices that the elements do not share are not copied for a few of them."""
        if len(matrices) == 1:
            return (vectors[:, None, :] @ matrices)[:, 0]
        whole = np.zeros(((int(left[-1]) // self.count + 1) * self.count, vectors.shape[1]))
        whole[left] = vectors
        grouped = whole.reshape(-1, len(matrices), 1, vectors.shape[1])
        return (grouped @ matrices).reshape(len(whole), -1)[left]

    def after(self, steps: Tensor, wanted: Tensor, accepted: Callable[[Tensor, Tensor], Tensor]) -> Found:
        """The ends of steps (K,), K a multiple of E, where they are ``wanted`` (K,).

        So much may be left of F as is ``accepted`` of steps and sizes of points (K,).
        """
        walk = _Walk(self, steps.numpy(), wanted.numpy())
        points = Points(self.problem.tilt(steps, self.tilt))
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            walk.set_out()
            for _ in range(STEPS + 1):
                if not walk.left.size:
                    break
                walk.step()
            xi, v, solved = (from_numpy(values) for values in walk.ends())
            error, slope, row_error = points.residual(xi, v)
            size = torch.maximum(maximum_norm(xi), maximum_norm(v)).clamp(min=1.0)
            rough = solved & (error > ENOUGH * size)
            if bool(rough.any()):
                chosen = np.flatnonzero(rough.numpy())
                moves = walk.corrections(chosen, slope.numpy()[chosen], row_error.numpy()[chosen])
                new_xi, new_v = xi.clone(), v.clone()
                new_xi[rough] += from_numpy(moves[0])
                new_v[rough] += from_numpy(moves[1])
                new_error = points.residual(new_xi, new_v)[0]
                better = new_error < error
                xi, v = torch.where(better[:, None], new_xi, xi), torch.where(better[:, None], new_v, v)
                error = torch.where(better, new_error, error)
        solved &= error <= accepted(steps, size)
        return Found(*points.point(xi, v), error, solved, from_numpy(walk.taken))


class _Walk:
    """K tasks on their way: bases, and where the other variables are.

    Args:
        vertices: of E elements.
        steps, wanted: (K,), K a multiple of E.

    Attributes:
        left: tasks that have not ended.
        done: (K,) those that have, at a vertex that is optimal.
        taken: (K,) columns that entered, and one.
        basis: (K, m) columns.
        sides: (K, N) 1 at a lower bound, -1 at an upper one, 0 for columns that are basic or fixed.
        x, d, rates: (K, N) variables, reduced costs, and how fast these move.
        changes: of the bases, in order.
    """

    def __init__(self, vertices: TiltedVertices, steps: FloatArray, wanted: BoolArray) -> None:
        elements = np.arange(len(steps)) % vertices.count
        self.vertices, self.elements, self.steps = vertices, elements, steps
        self.copies, self.remaining = len(steps) // vertices.count, np.abs(steps)
        self.left, self.done = np.flatnonzero(wanted & vertices.is_vertex[elements]), np.zeros(len(steps), np.bool_)
        self.taken = wanted.astype(np.int64)
        self.basis, self.sides = vertices.basis[elements], vertices.sides[elements]
        self.x, self.d = vertices.x[elements], vertices.d[elements]
        self.lower, self.upper = vertices.lower[elements], vertices.upper[elements]
        self.rates = np.sign(steps)[:, None] * vertices.rates[elements]
        self.changes: list[tuple[FloatArray, IntArray]] = []

    def solved(self, vectors: FloatArray, left: IntArray) -> FloatArray:
        """``B⁻¹ v`` for vectors (K, m) of some tasks."""
        found, task = self.vertices.by_first(vectors, left, self.copies, adjoint=False), np.arange(left.size)
        for columns, places in self.changes:
            column, place = columns[left], places[left]
            value = found[task, place] / column[task, place]
            found -= value[:, None] * column
            found[task, place] = value
        return found

    def solved_back(self, vectors: FloatArray, left: IntArray) -> FloatArray:
        """``B⁻ᵀ v`` for vectors (K, m) of some tasks."""
        vectors, task = vectors.copy(), np.arange(left.size)
        for columns, places in reversed(self.changes):
            column, place = columns[left], places[left]
            value, pivot = vectors[task, place], column[task, place]
            vectors[task, place] = (value - ((vectors * column).sum(1) - value * pivot)) / pivot
        return self.vertices.by_first(vectors, left, self.copies, adjoint=True)

    def set_out(self) -> None:
        """Leave those who would have far to go to the solver."""
        crossed = self._until(self.left) < self.remaining[self.left, None]
        self.left = self.left[crossed.sum(1) <= STEPS]

    def _until(self, left: IntArray) -> FloatArray:
        """(K, N) how far it is to where reduced costs change their signs, with the bases as they are."""
        sides = self.sides[left]
        closing, room = sides * self.rates[left], np.maximum(sides * self.d[left], 0.0)
        return np.where(closing < 0.0, room / -closing, np.inf)

    def step(self) -> None:
        """One column enters, or goes to its other bound, of all tasks that are left."""
        until = self._until(self.left)
        entering = until.argmin(1)
        first = until[np.arange(entering.size), entering]
        ends = ~(first < self.remaining[self.left])
        self.done[self.left[ends]] = True
        left, entering, first = self.left[~ends], entering[~ends], first[~ends]
        self.left = left
        if not left.size:
            return
        elements = self.elements[left]
        self.remaining[left] -= first
        self.d[left] += first[:, None] * self.rates[left]
        up = self.sides[left, entering]
        w = self.solved(self.vertices.entering(elements, entering), left)
        speed = -up[:, None] * w
        rows, basis = left[:, None], self.basis[left]
        ahead = np.where(speed > 0.0, self.upper[rows, basis], self.lower[rows, basis])
        distance = np.where(speed != 0.0, np.maximum((ahead - self.x[rows, basis]) / speed, 0.0), np.inf)
        place = distance.argmin(1)
        task = np.arange(left.size)
        length, own = distance[task, place], self.upper[left, entering] - self.lower[left, entering]
        flips, length, pivot = own <= length, np.minimum(own, length), w[task, place]
        fine = np.isfinite(length) & (flips | (np.abs(pivot) > PIVOT * np.abs(w).max(1)))
        self.taken[left] += 1
        self.x[rows, basis] += length[:, None] * speed
        self.x[left, entering] += length * up
        self.sides[left[flips], entering[flips]] *= -1.0
        if (chosen := np.flatnonzero(fine & ~flips)).size:
            self._exchange(left[chosen], entering[chosen], place[chosen], w[chosen], speed[chosen])
        self.left = left[fine]

    def _exchange(self, left: IntArray, entering: IntArray, place: IntArray, w: FloatArray, speed: FloatArray) -> None:
        """Those that enter take the places of others in their bases."""
        task, leaving = np.arange(left.size), self.basis[left, place]
        unit = np.zeros(w.shape)
        unit[task, place] = 1.0
        share = self.rates[left, entering] / w[task, place]
        self.rates[left] -= share[:, None] * self.vertices.priced(self.solved_back(unit, left), left)
        self.rates[left, leaving], self.d[left, leaving] = -share, 0.0
        # No variable leaves for good whose bounds are one: it has been fixed before.
        self.sides[left, leaving], self.sides[left, entering] = -np.sign(speed[task, place]), 0.0
        self.basis[left, place] = entering
        columns, places = np.zeros((len(self.steps), w.shape[1])), np.zeros(len(self.steps), dtype=np.int64)
        columns[:, 0] = 1.0  # of tasks without a change
        columns[left], places[left] = w, place
        self.changes.append((columns, places))

    def ends(self) -> tuple[FloatArray, FloatArray, BoolArray]:
        """(ξ, v) of the last vertices, worked out from the solutions, and (K,) whether they are the only ones."""
        vertices = self.vertices
        n, zero, total = vertices.n, vertices.zero, len(self.steps)
        xi, v, solved = np.zeros((total, n)), np.zeros((total, vertices.m)), self.done.copy()
        if not (left := np.flatnonzero(self.done)).size:
            return xi, v, solved
        elements, basis, sides, basic = self.elements[left], self.basis[left], self.sides[left], self.is_basic(left)
        start, d = vertices.x[elements], vertices.d[elements] + self.steps[left, None] * vertices.g[elements]
        dy = self.solved_back(-np.take_along_axis(d, basis, 1), left)
        d += np.concatenate([vertices.on_rows(dy, left), dy[:, zero:]], 1)
        y = vertices.y[elements] + dy
        x = np.where(sides > 0.0, self.lower[left], np.where(sides < 0.0, self.upper[left], start))
        moved = np.where(basic, 0.0, x - start)
        if moved.any():
            right = vertices.on_variables(moved[:, :n], left)
            right[:, zero:] += moved[:, n:]
            dx = self.solved(right, left)
            np.put_along_axis(x, basis, np.take_along_axis(start, basis, 1) - dx, 1)
        inside = (x > self.lower[left]) & (x < self.upper[left])
        solved[left] = np.where(basic, inside, (sides * d > 0.0) | (sides == 0.0)).all(1)
        xi[left] = x[:, :n] - np.where(basic[:, :n], 0.0, d[:, :n])
        y[:, zero:] = np.where(basic[:, n:], -x[:, n:], y[:, zero:])
        v[left] = y
        return xi, v, solved

    def corrections(self, left: IntArray, slope: FloatArray, row_error: FloatArray) -> tuple[FloatArray, FloatArray]:
        """``(dξ, dv)`` of Newton's method at the ends of some tasks, for what is left of F there."""
        vertices = self.vertices
        n, zero, basis, basic = vertices.n, vertices.zero, self.basis[left], self.is_basic(left)
        right = np.concatenate([slope, np.zeros((left.size, vertices.m - zero))], 1)
        dy = -self.solved_back(np.take_along_axis(right, basis, 1), left)
        dx = np.zeros(right.shape)
        np.put_along_axis(dx, basis, -self.solved(row_error, left), 1)
        dz = np.where(basic[:, :n], 0.0, -slope - vertices.on_rows(dy, left))
        dy[:, zero:] = np.where(basic[:, n:], -dx[:, n:], dy[:, zero:])
        return dx[:, :n] + dz, dy

    def is_basic(self, left: IntArray) -> BoolArray:
        """(K, N) which columns are basic."""
        found = np.zeros((left.size, self.x.shape[1]), dtype=np.bool_)
        np.put_along_axis(found, self.basis[left], True, 1)
        return found
