"""One run of Newton's method on F for many elements, as :mod:`lpgd.solvers.kkt.refinement` describes it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, FloatArray, IntArray, from_numpy
from lpgd.problems.base import maximum_norm
from lpgd.solvers.kkt.points import ENOUGH, Points
from lpgd.solvers.kkt.schur import System

__all__ = ["KeptFactor", "Newton", "Start"]

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


class Newton:
    """Newton's method for E elements, from a start.

    Args:
        points: the problems of these elements.
        start: where they are.
        limits: (E,) steps at most, of each; no chords follow where as many were taken, chords included.
        keep: the numbers under which the systems of the last steps are kept, (E,); None keeps none.
        regular_only: elements whose system is singular, or nearly so, are left at once.
        rounded: where |F|, relative to the point, is taken for rounding that no chord reduces.

    Attributes:
        error: (E,) |F|.
        left: (E,) which are to be stepped still.
        taken: (E,) the number of steps.
        isolated: (E,) whether the system of the last step is regular by far.
        kept: the systems of the last steps.
    """

    def __init__(
        self, points: Points, start: Start, limits: IntArray, keep: Tensor | None, regular_only: bool, rounded: float
    ) -> None:
        self.points, self.state, self.device = points, _State(start), points.problem.device
        self.limits, self.regular_only, self.rounded = limits, regular_only, rounded
        self.elements, self.kept = keep, list[KeptFactor]()
        self.error, count = self.state.error, len(limits)
        self.taken: IntArray = np.zeros(count, dtype=np.int64)
        self.isolated, self._stuck = np.zeros((2, count), dtype=np.bool_)
        self._lengths = np.full(count, np.nan)  # of the last steps
        # Rounding is that of the terms of F, which are as large as the point is.
        largest = LARGE if rounded else 1.0
        self.enough: FloatArray = ENOUGH * np.clip(self.state.sizes(np.arange(count)), 1.0, largest)
        self.left: BoolArray = self.error > self.enough  # false for NaN

    def run(self) -> None:
        """Step until nothing is left of F, nothing helps, or the limits are reached."""
        for number in range(int(self.limits.max(initial=0))):
            self.left &= self.limits > number
            todo = np.flatnonzero(self.left)
            if not todo.size:
                break
            self._iterate(todo)

    def _iterate(self, todo: IntArray) -> None:
        """One step of some elements by a new system, and chords by the same one."""
        index = self._on_device(todo)
        chosen, first = self.points.select(index), self.error[todo]
        xi, v, slope, row_error = self.state.at(todo)
        known = from_numpy(first).to(self.device)
        d_xi, d_v, factored = chosen.regular_step(xi, v, known, slope, row_error, damped=not self.regular_only)
        if factored is not None:
            self.isolated[todo] = (factored.inverse * first < FAR) & factored.regular
            self._keep(index, factored)
        self._move(todo, chosen, (xi, v), (d_xi, d_v))
        self.left &= self.error > self.enough
        if factored is not None:
            self._follow_by_chords(todo, chosen, factored, self.left[todo] & (self.error[todo] < CLOSE * first))

    def _keep(self, index: Tensor, factored: System) -> None:
        """Keep a system in place of older ones of the same elements."""
        if self.elements is None:
            return
        stepped = self.elements[index]
        stale = [factor._replace(valid=factor.valid & ~torch.isin(factor.elements, stepped)) for factor in self.kept]
        self.kept = [factor for factor in stale if bool(factor.valid.any())]
        self.kept.append(KeptFactor(stepped, from_numpy(factored.regular), factored))

    def _move(self, todo: IntArray, chosen: Points, at: tuple[Tensor, Tensor], step: tuple[Tensor, Tensor]) -> None:
        """Take the first of some lengths of a step that reduces |F|; elements for which none does are stuck."""
        (xi, v), (d_xi, d_v) = at, step
        finite = (torch.isfinite(d_xi).all(-1) & torch.isfinite(d_v).all(-1)).cpu().numpy()
        size = torch.maximum(maximum_norm(d_xi), maximum_norm(d_v)).cpu().numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            share: FloatArray = size / self._lengths[todo]
        self._lengths[:], self._lengths[todo] = np.nan, size
        waiting = np.flatnonzero(finite)
        trials: list[tuple[IntArray | None, Tensor | float, float]] = [(None, length, 1.0) for length in LENGTHS]
        multiple = np.flatnonzero(finite & (share > SLOW[0]) & (share < SLOW[1]))  # false for NaN
        if multiple.size:
            longer = 1.0 / (1.0 - share[multiple, None])
            trials.insert(0, (multiple, self._on_device(longer), FALL))
        for among, length, fall in trials:
            tried = waiting if among is None else among
            if not tried.size:
                break
            places, trial = slice(None), chosen
            if tried.size < todo.size:
                places, trial = self._on_device(tried), self.points.select(self._on_device(todo[tried]))
            new_xi, new_v = xi[places] + length * d_xi[places], v[places] + length * d_v[places]
            better = self.state.move(todo[tried], new_xi, new_v, trial.residual(new_xi, new_v), fall=fall)
            self.taken[todo[tried[better]]] += 1
            waiting = waiting[~np.isin(waiting, tried[better])]
        for failed in (todo[waiting], todo[~finite]):
            self.left[failed], self._stuck[failed] = False, True

    def _follow_by_chords(self, todo: IntArray, chosen: Points, factored: System, going: BoolArray) -> None:
        """Steps by the system of the last one, of those that are ``going``, as long as each reduces |F| by far."""
        for _ in range(CHORDS):
            going &= self.taken[todo] < self.limits[todo]
            if not going.any():
                break
            xi, v, slope, row_error = self.state.at(todo)
            last = self.error[todo]
            d_xi, d_v = chosen.chord(factored, slope, row_error)
            new_xi, new_v = xi + d_xi, v + d_v
            better = self.state.move(todo, new_xi, new_v, found := chosen.residual(new_xi, new_v), going)
            fallen = found[0].cpu().numpy() <= FALL * last
            ends = going & ~fallen
            if ends.any():
                self.left[todo] &= ~ends | (last > self.rounded * np.maximum(self.state.sizes(todo), 1.0))
            going = better & fallen
            self.taken[todo[better]] += 1
            self.left[todo] &= self.error[todo] > self.enough[todo]
            going &= self.left[todo]

    def look_ahead(self) -> None:
        """Take a few whole steps at once, of elements that are stuck, where they reduce |F| by far."""
        stuck = self._stuck & (self.error > STUCK)
        if stuck.any():
            stuck &= self.error > STUCK * self.points.point(self.state.xi, self.state.v)[0].largest().cpu().numpy()
        todo = np.flatnonzero(stuck)
        if not todo.size:
            return
        xi, v, slope, row_error = self.state.at(todo)
        index, known = self._on_device(todo), from_numpy(self.error[todo]).to(self.device)
        count, ends, found_error = self.points.select(index).ahead(xi, v, known, slope, row_error)
        found_errors = found_error.cpu().numpy()
        better = found_errors < GAIN * self.error[todo]
        chosen_ends, moved = self._on_device(np.flatnonzero(better)), todo[better]
        places = index[chosen_ends]
        self.state.xi[places], self.state.v[places] = ends[0][chosen_ends], ends[1][chosen_ends]
        self.error[moved] = found_errors[better]
        self.taken[moved] += count.cpu().numpy()[better]
        self.isolated[moved] = False

    def _on_device(self, array: FloatArray | IntArray) -> Tensor:
        return from_numpy(array).to(self.device)


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
