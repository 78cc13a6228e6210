"""Solutions of tilted quadratic programs with a definite P, from those of the programs themselves.

As long as no active set changes, a solution is affine in the step: one right-hand side serves both sides of a
difference.  Where one changes, the new solution is a solve with the rows of the new set, in the words of
:mod:`lpgd.solvers.kkt.schur`: with Δ the change of the point after the step τ, and ``w = τ h + MᵀΔu``,

    C Δx + τ g = τ g - M w,    Δx = -L⁻ᵀ w,

is what takes active rows to their bounds, and ``Δu = -u`` in rows that are left.  It has been found where the rows that
are active after it are those that it was made for.  All changes are worked out from the solution, so that what is left
there of the optimality conditions cancels in differences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, IntArray, from_numpy
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint
from lpgd.solvers.kkt.schur import ActiveSystem, SchurFactor

__all__ = ["Reached", "TiltedSolutions"]

STEPS = 12
"""Active sets that are tried beside the first one: random programs of 10 to 100 variables take 3 to 7, on average,
after steps of 0.1 to 3 units."""
LEFT, CORRECTIONS = 1e-13, 3
"""What may be left of the equations of a change, relative to it, and how often they are solved again."""

Pieces = NDArray[np.int8]


class Reached(NamedTuple):
    """Points at the ends of K steps, the S different ones of all elements one after the other; see ``solved``.

    Attributes:
        point, slack: (K, ·) each.
        error: (K,) the maximum norm of F.
        solved: (K,) whether the active set of the point is the one that it was worked out for.
        taken: (K,) active sets that were tried.
        pieces: (K, k) the active sets, as :attr:`TiltedSolutions.pieces` has them.
    """

    point: ConicPoint
    slack: Tensor
    error: Tensor
    solved: Tensor
    taken: Tensor
    pieces: Pieces


class _Change(NamedTuple):
    """Changes of K points: of multipliers u, of x, of ``C x + τ g``, and what is left of their equations (K,)."""

    u: FloatArray
    x: FloatArray
    place: FloatArray
    error: FloatArray


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of C at the points of E elements: those of A, then variables with bounds.

    Attributes:
        u: (E, k) multipliers.
        slack: (E, m) of rows of A.
        x: (E, b) variables with bounds, and ``lower``, ``upper``.
        zero: how many rows are equalities.
    """

    u: FloatArray
    slack: FloatArray
    x: FloatArray
    lower: FloatArray
    upper: FloatArray
    zero: int

    def pieces(self, places: FloatArray, elements: IntArray | slice) -> Pieces:
        """(…, k) which rows are active (1), and at which bounds variables are (-1, 1)."""
        m, found = self.slack.shape[1], np.empty(places.shape, dtype=np.int8)
        found[..., :m] = places[..., :m] > 0
        found[..., : self.zero] = 1
        if self.x.shape[1]:
            lower, upper = self.lower[elements], self.upper[elements]
            found[..., m:] = (places[..., m:] > upper).astype(np.int8) - (places[..., m:] < lower)
            found[..., m:][np.broadcast_to(lower >= upper, found[..., m:].shape)] = 1
        return found

    def start(self) -> FloatArray:
        """(E, k) ``y - s``, and ``x + z``."""
        m = self.slack.shape[1]
        return np.concatenate([self.u[:, :m] - self.slack, self.x + self.u[:, m:]], axis=1)

    def way(self, pieces: Pieces, elements: IntArray | slice) -> FloatArray:
        """(K, k) how far active rows are from their bounds; 0 in the others."""
        m, found = self.slack.shape[1], np.zeros(pieces.shape)
        found[:, :m] = self.slack[elements]
        if self.x.shape[1]:
            x, bounds = self.x[elements], pieces[:, m:]
            found[:, m:] = np.where(bounds > 0, self.upper[elements] - x, 0.0)
            found[:, m:] = np.where(bounds < 0, self.lower[elements] - x, found[:, m:])
        found[pieces == 0] = 0.0
        return found


class TiltedSolutions:
    """The solutions of E elements along a tilt.

    Args:
        problem: in units of order 1.
        factor: its elements' factor; what is found where that is not ``fine`` means nothing.
        xi, v: the solutions: (E, n) and (E, m) of :mod:`lpgd.solvers.kkt.refinement`.
        tilt: (E, ·) each.
        error: (E,) what is left of F at the solutions.
    """

    def __init__(
        self, problem: ConicProblem, factor: SchurFactor, xi: Tensor, v: Tensor, tilt: ConicPoint, error: Tensor
    ) -> None:
        self.problem, self.factor, self.error = problem, factor, error.numpy()
        self.bounded, self.count, zero = factor.bounded.numpy(), problem.batch_size, problem.structure.cones.zero
        self.x, self.g_x, self.g = xi.numpy(), tilt.x.numpy(), tilt.y.numpy()
        self.start, lower, upper, x = v.numpy(), *np.empty((3, self.count, 0))
        u, slack = np.maximum(self.start, 0.0), np.maximum(-self.start, 0.0)
        u[:, :zero], slack[:, :zero] = self.start[:, :zero], 0.0
        if self.bounded.size:
            lower, upper = (bound.numpy()[:, self.bounded] for bound in problem.full_bounds())
            places = self.x[:, self.bounded]
            x, self.x = np.minimum(np.maximum(places, lower), upper), self.x.copy()
            self.x[:, self.bounded] = x
            self.start = np.concatenate([self.start, places], 1)
            u, self.g = (
                np.concatenate(pair, 1) for pair in ((u, places - x), (self.g, tilt.z.numpy()[:, self.bounded]))
            )
        self.rows = _Rows(u, slack, x, lower, upper, zero)
        self.is_primal = not self.g.any()
        self.h = self._forward(self.g_x)
        self.rate = -factor.whitened(self.h)
        if not self.is_primal:
            self.rate += self.g
        self.pieces = self.rows.pieces(self.start, slice(None))
        self.size = np.maximum(np.maximum(_largest(self.x), _largest(self.start)), 1.0)
        active = self.pieces != 0
        self.system = ActiveSystem(factor, active, several=True)
        with np.errstate(over="ignore", invalid="ignore"):  # of singular systems, whose points are then not taken
            u = self.system.multipliers(self.rate)
            w = self.h + factor.whitened_back(u)
        whole = np.arange(self.count)
        self.direction = self._settled(whole, self.g_x, self.g, active, np.zeros((1, 1)), u, w, self.system)

    @cached_property
    def regular(self) -> Tensor:
        """(E,) whose system at the solution is regular, so that there is a direction."""
        change = self.direction
        finite = np.isfinite(change.u).all(1) & np.isfinite(change.x).all(1)
        return from_numpy(self.system.regular & finite)

    @cached_property
    def rates(self) -> FloatArray:
        """(E, k) how fast :attr:`start` moves along the tilt."""
        return np.where(self.pieces != 0, self.direction.u, self.direction.place)

    def change(self) -> ConicPoint:
        """How the solutions move along the tilt."""
        m, (u, x) = self.problem.structure.m, self.direction[:2]
        z = np.zeros_like(x)
        if self.bounded.size:
            x, held = x.copy(), self.pieces[:, m:] != 0
            x[:, self.bounded] = np.where(held, -self.g[:, m:], x[:, self.bounded])
            z[:, self.bounded] = u[:, m:]
        return ConicPoint(from_numpy(x), from_numpy(np.ascontiguousarray(u[:, :m])), from_numpy(z))

    def is_straight(self, tau: FloatArray) -> BoolArray:
        """(E,) whether no active set changes along steps up to τ (E,), to either side."""
        m, rows = self.problem.structure.m, self.rows
        way = tau[:, None] * np.abs(self.rates)
        inside: BoolArray = way[:, rows.zero : m] < np.abs(self.start[:, rows.zero : m])  # false for NaN
        if self.bounded.size:
            places = self.start[:, m:]
            room = np.minimum(np.abs(places - rows.lower), np.abs(places - rows.upper))
            inside = np.concatenate([inside, (way[:, m:] < room) | (rows.lower >= rows.upper)], 1)
        return np.logical_and.reduce(inside, axis=1)

    def places(self, point: ConicPoint, slack: Tensor) -> FloatArray:
        """(K, k) which rows of points are active, and how clearly, in the words of :attr:`start`."""
        places = point.y.numpy() - slack.numpy()
        if not self.bounded.size:
            return places
        return np.concatenate([places, (point.x.numpy() + point.z.numpy())[:, self.bounded]], 1)

    @cached_property
    def distances(self) -> list[FloatArray]:
        """How far inequalities are from their bounds, (E, ·) each; positive for active ones."""
        m, rows = self.problem.structure.m, self.rows
        found = [self.start[:, rows.zero : m]]
        return [*found, rows.lower - self.start[:, m:], self.start[:, m:] - rows.upper] if self.bounded.size else found

    @cached_property
    def largest_distance(self) -> FloatArray:
        """(E,) the largest of these, of bounds that there are."""
        if not self.bounded.size:
            return _largest(self.distances[0])
        found = [np.where(np.isfinite(values), np.abs(values), 0.0).max(1, initial=0.0) for values in self.distances]
        return np.max(found, axis=0)

    def is_overdetermined(self, noise: FloatArray) -> BoolArray:
        """(E,) whether more constraints are active, or might be within a noise (E,), than there are variables."""
        counts = [(values > -noise[:, None]).sum(1) for values in self.distances]
        active: IntArray = np.sum(counts, axis=0) + self.rows.zero
        return np.greater(active, self.x.shape[1])

    def after(self, steps: Tensor, wanted: Tensor, accepted: Tensor) -> Reached:
        """The points after steps (K,), K a multiple of E, where they are ``wanted`` (K,); so much may be left of F."""
        count, total = self.count, steps.shape[0]
        step, direction = steps.numpy().reshape(-1, count, 1), self.direction
        places = self.start + step * self.rates
        pieces = self.rows.pieces(places, slice(None))
        changed = (pieces != self.pieces).any(2).ravel()
        u, x, place = (
            (step * values).reshape(total, values.shape[1]) for values in (direction.u, direction.x, direction.place)
        )
        pieces = pieces.reshape(total, pieces.shape[2])
        error = (np.abs(step[:, :, 0]) * direction.error + self.error).ravel()
        solved = wanted.numpy() & ~changed
        taken = wanted.numpy().astype(np.int64)
        left = np.flatnonzero(wanted.numpy() & changed)
        scale = step.reshape(-1, 1)
        way = np.empty_like(u)
        for _ in range(STEPS):
            if not left.size:
                break
            elements, tried = left % count, pieces[left]
            active, way[left] = tried != 0, self.rows.way(tried, elements)
            fixed = np.where(active, 0.0, -self.rows.u[elements])
            system = ActiveSystem(self.factor, active, elements % len(self.factor.white), several=True)
            rate = scale[left] * self.rate.take(elements, axis=0)
            with np.errstate(over="ignore", invalid="ignore"):  # of singular systems, whose points are then not taken
                right = rate - way[left] - self._on(self.factor.across, fixed, left)
                u[left] = fixed + system.multipliers(right)
                reached = rate - self._on(self.factor.across, u[left], left)
            pieces[left] = self._ends(elements, active, way[left], u[left], reached)
            taken[left] += 1
            same = system.regular & (pieces[left] == tried).all(1)
            solved[left] = same
            left = left[~same & system.regular]
        left = np.flatnonzero(solved & changed)
        if left.size:
            elements, tried = left % count, pieces[left]
            g_x, g, h = (scale[left] * values.take(elements, axis=0) for values in (self.g_x, self.g, self.h))
            w = h + self._on(self.factor.whitened_back, u[left], left)
            found = self._settled(left, g_x, g, tried != 0, way[left], u[left], w)
            u[left], x[left], place[left] = found.u, found.x, found.place
            error[left] = self.error[elements] + found.error
            pieces[left] = self._ends(elements, tried != 0, way[left], found.u, found.place)
            solved[left] = (pieces[left] == tried).all(1)
        solved &= error <= accepted.numpy()
        return self._reached(scale, pieces, _Change(u, x, place, error), solved, taken)

    def _reached(
        self, scale: FloatArray, pieces: Pieces, change: _Change, solved: BoolArray, taken: IntArray
    ) -> Reached:
        """The points after changes (K, ·)."""
        total, m, rows = len(pieces), self.problem.structure.m, self.rows
        active = pieces != 0
        copies = total // max(self.count, 1)

        def moved(values: FloatArray, change: FloatArray) -> FloatArray:
            return (values + change.reshape(copies, *values.shape)).reshape(change.shape)

        multipliers = moved(rows.u, change.u)
        multipliers[~active] = 0.0
        slack = moved(rows.slack, -change.place[:, :m])
        slack[active[:, :m]] = 0.0
        x, z = moved(self.x, change.x), np.zeros_like(change.x)
        if self.bounded.size:
            z[:, self.bounded] = multipliers[:, m:]
            whole = np.arange(total) % self.count
            tilted = scale * self.g[whole, m:]
            for sign, bounds in ((1, rows.upper), (-1, rows.lower)):
                there = pieces[:, m:] == sign
                held = np.where(there, bounds[whole] - tilted, x[:, self.bounded])
                x[:, self.bounded] = held
        point = ConicPoint(from_numpy(x), from_numpy(np.ascontiguousarray(multipliers[:, :m])), from_numpy(z))
        tensors = slack, change.error, solved, taken
        return Reached(point, *(from_numpy(values) for values in tensors), pieces=pieces)

    # -- one active set -------------------------------------------------------------------------------------------

    def _ends(self, elements: IntArray, active: BoolArray, way: FloatArray, u: FloatArray, place: FloatArray) -> Pieces:
        """(K, k) the pieces after changes of K points: of multipliers, and of ``C x + τ g`` in the other rows.

        Args:
            elements: (K,) of the batch.
            active: (K, k) the rows that were made active.
            way: (K, k) how far they were from their bounds; 0 in the others.
            u, place: (K, k) the changes.
        """
        m, rows = self.problem.structure.m, self.rows
        ends = np.where(active, rows.u[elements] + u, 0.0)
        ends[:, :m] -= np.where(active[:, :m], 0.0, rows.slack[elements] - place[:, :m])
        if self.bounded.size:
            ends[:, m:] += rows.x[elements] + np.where(active[:, m:], way[:, m:], place[:, m:])
        return rows.pieces(ends, elements)

    def _settled(
        self, left: IntArray, g_x: FloatArray, g: FloatArray, active: BoolArray, way: FloatArray, u: FloatArray,
        w: FloatArray, system: ActiveSystem | None = None,
    ) -> _Change:  # fmt: skip
        """The same changes under tilts g, of x as well, to rounding."""
        elements = left % self.count
        with np.errstate(over="ignore", invalid="ignore"):  # of singular systems, whose points are then not taken
            x = -self._back(w, left)
            size = np.maximum(_largest(g_x), _largest(g))
            slope, place, miss, error = self._left(u, x, g_x, g, active, way, left)
            for _ in range(CORRECTIONS):
                rough = error > LEFT * np.maximum(size, np.maximum(_largest(u), _largest(x)))
                if system is not None:
                    rough &= system.regular
                if not rough.any():
                    break
                system = system or ActiveSystem(self.factor, active, elements % len(self.factor.white), several=True)
                h = self._on(self._forward, slope, left)
                more_u = system.multipliers(miss - self._on(self.factor.whitened, h, left))
                more_x = self._back(h + self._on(self.factor.whitened_back, more_u, left), left)
                u, x = u + np.where(rough[:, None], more_u, 0.0), x - np.where(rough[:, None], more_x, 0.0)
                slope, place, miss, error = self._left(u, x, g_x, g, active, way, left)
        return _Change(u, x, place, error)

    def _left(
        self, u: FloatArray, x: FloatArray, g_x: FloatArray, g: FloatArray, active: BoolArray, way: FloatArray,
        left: IntArray,
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:  # fmt: skip
        """``P x + Cᵀu + g_x``, ``C x + g``, what active rows miss, and the maximum norm of the first and the last."""
        structure, m = self.problem.structure, self.problem.structure.m
        quadratic, constraint = structure.quadratic, structure.constraint
        P, A = self.problem.symmetric_P.numpy(), self.problem.data.A.numpy()
        slope = self._on(lambda values: quadratic.numpy_product(P, values), x, left)
        slope += g_x
        place = np.zeros((len(x), m))
        if constraint.nnz:
            slope += self._on(lambda values: constraint.numpy_product(A, values, transpose=True), u[:, :m], left)
            place = self._on(lambda values: constraint.numpy_product(A, values), x, left)
        if self.bounded.size:
            slope[:, self.bounded] += u[:, m:]
            place = np.concatenate([place, x[:, self.bounded]], 1)
        if not self.is_primal:
            place = place + g
        miss = np.where(active, place - way, 0.0)
        return slope, place, miss, np.maximum(_largest(slope), _largest(miss))

    def _forward(self, vectors: FloatArray) -> FloatArray:
        return self.factor.forward(from_numpy(vectors)).numpy()

    def _back(self, vectors: FloatArray, left: IntArray) -> FloatArray:
        """``L⁻ᵀ w``."""
        return self._on(lambda values: self.factor.backward(from_numpy(values)).numpy(), vectors, left)

    def _on(self, function: Callable[[FloatArray], FloatArray], vectors: FloatArray, left: IntArray) -> FloatArray:
        """A function of the batch, some copies of it one after the other, for vectors (K, ·) in ``left`` of its places.

        Matrices that the elements do not share are not copied for a few of them.
        """
        total = -(-(int(left[-1]) + 1) // self.count) * self.count
        if self._is_shared or left.size == total:
            return function(vectors)
        whole = np.zeros((total, vectors.shape[1]))
        whole[left] = vectors
        return function(whole)[left]

    @property
    def _is_shared(self) -> bool:
        data = self.problem.data
        return len(self.factor.white) == 1 and all(datum.ndim == 1 or len(datum) == 1 for datum in (data.P, data.A))


def _largest(rows: FloatArray) -> FloatArray:
    """(K,) the maximum norm of each row."""
    return np.abs(rows).max(1, initial=0.0)
