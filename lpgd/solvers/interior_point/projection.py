"""Newton's method on the dual of a projection: the first guess of the active sets of programs that are one.

Programs with a diagonal P and equalities with a shared A,

    minimise ½ c <x, p x> + <q, x>   s.t.   A x = b,   l ≤ x ≤ u,

ask for the point of the constraints that is nearest to ``w = -q / (c p)`` in the norm of p.  Multipliers ``c y`` of the
rows determine ``x = clip(w - Aᵀy / p, l, u)``, and the right ones maximise the concave function

    θ(y) = ½ <x - w, p (x - w)> + <y, A x - b>,        ∇θ(y) = A x - b.

Its second derivative is ``-A F p⁻¹ Aᵀ``, F one for variables inside their bounds and zero for others.  A step solves
with ``F + μ (1 - F)`` in its place: with μ = 1 it cannot go too far, with μ = 0 it is Newton's.  Where few variables
are at a bound, the matrices of all elements and steps are like ``A p⁻¹ Aᵀ``: a few conjugate gradients with the inverse
of that one, in single precision, solve them to the digits that a step is worth.  Elements whose matrices are not alike
leave at once; the others end where no variable changes its side, at active sets that
:func:`~lpgd.solvers.interior_point.active_set.settle` makes exact, or corrects.

Qi and Sun, A nonsmooth version of Newton's method (1993); Li, Sun and Toh, On the efficient computation of a projection
onto the Birkhoff polytope (2020), section 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.execution.interrupts import pause
from lpgd.solvers.interior_point.active_set import ActiveSet, is_suitable
from lpgd.solvers.interior_point.box_program import BoxProgram
from lpgd.solvers.interior_point.shared_factor import inverse_of, shared_inverse, single

__all__ = ["NearSets", "is_projection", "near_active_sets"]

ROWS = 100
"""From this number of rows; with fewer of them each element's own factor is cheap."""
STEPS = 25
"""The most Newton steps."""
GRADIENTS = 12
"""The most conjugate gradients in a step; elements that need more have matrices that are not alike."""
ACCURACY = 0.05
"""The residual of a step, relative, in the norm of the shared inverse."""
FIRST_SHARE, LEAST_SHARE, LESS, MORE = 0.3, 1e-4, 0.3, 2.0
"""μ at first and at least, and its factors after whole and after shortened steps."""
SHORTER, SHORTENED = 0.4, 8
"""The factor by which a step is shortened, and how often at most."""
ASCENT = 1e-3
"""The share of the ascent that the slope promises which a step must reach."""
ROUNDING = 1e-13
"""The relative error of θ."""


def is_projection(program: BoxProgram) -> bool:
    """Whether a batch is of this form, and large enough."""
    return (
        program.q.dtype == torch.float64
        and program.P is not None
        and program.P.ndim == 2
        and program.shares_matrices
        and program.free is None
        and ROWS <= program.m == program.equalities <= program.n
        and is_suitable(program)
    )


class NearSets(NamedTuple):
    """Active sets of k elements of a batch, and how many steps led there.

    Attributes:
        elements: (k,) the elements.
        sets: theirs.
        steps: (k,) how many steps.
    """

    elements: Tensor
    sets: ActiveSet
    steps: Tensor


def near_active_sets(program: BoxProgram) -> NearSets:
    """The active sets of those elements of a program (:func:`is_projection`) for which the steps end."""
    projection = _Projection.of(program)
    elements, steps = torch.arange(program.size, device=program.q.device), torch.zeros_like(program.q[:, 0]).long()
    found, sides = torch.zeros_like(steps, dtype=torch.bool), torch.zeros_like(program.q, dtype=torch.int8)
    dual = None if projection is None else projection.first()
    share = program.q.new_full((program.size, 1), FIRST_SHARE)
    for number in range(1, STEPS + 1):
        if projection is None or dual is None or not elements.shape[0]:
            break
        pause()
        direction, alike = projection.direction(dual, share)
        before, (dual, length) = dual.side, projection.search(dual, direction)
        settled = alike & (length[:, 0] >= 1) & (dual.side == before).all(1)
        ended = elements[settled]
        found[ended], sides[ended], steps[ended] = True, dual.side[settled], number
        share = torch.where(length >= 1, LESS * share, MORE * share).clamp(LEAST_SHARE, 1.0)
        left = rows_where(alike & ~settled)
        if left.shape[0] < elements.shape[0]:
            elements, share, dual = elements[left], share[left], dual.select(left)
            projection = projection.select(left)
    chosen = rows_where(found)
    side = sides[chosen]
    every_row = torch.ones(chosen.shape[0], program.m, dtype=torch.bool, device=program.q.device)
    return NearSets(chosen, ActiveSet(every_row, side > 0, side < 0), steps[chosen])


class _Dual(NamedTuple):
    """Multipliers (B, m) and what belongs to them.

    Attributes:
        y: the multipliers.
        gradient: (B, m) ``A x - b``.
        value: (B, 1) θ.
        side: (B, n) 1 where x is at its upper bound, -1 at its lower one, 0 inside.
    """

    y: Tensor
    gradient: Tensor
    value: Tensor
    side: Tensor

    def select(self, elements: Tensor) -> _Dual:
        """Those of these elements."""
        return _Dual(*(tensor[elements] for tensor in self))


class _Projection(NamedTuple):
    """The data of the module's docstring.

    Attributes:
        A: (m, n).
        single: the same in single precision.
        inverse: (m, m) of ``A p⁻¹ Aᵀ``, in single precision.
        p: (n,).
        target, lower, upper: (B, n) w, l and u.
        b: (B, m).
    """

    A: Tensor
    single: Tensor
    inverse: Tensor
    p: Tensor
    target: Tensor
    lower: Tensor
    upper: Tensor
    b: Tensor

    @classmethod
    def of(cls, program: BoxProgram) -> _Projection | None:
        """Of a program; None where the rows of A depend on each other."""
        assert program.P is not None
        A, P = program.A[0], program.P[0]
        largest = P.amax()
        p = P / largest

        known = shared_inverse(program.A) if bool((p == 1).all()) else inverse_of((A / p) @ A.mT)
        if known is None:
            return None
        target = -program.q / (program.cost * P)
        lower, upper = program.full_limits()
        return cls(A, single(program.A), known, p, target, lower, upper, program.b[:, : program.m])

    def select(self, elements: Tensor) -> _Projection:
        """Those of these elements."""
        target, lower, upper, b = (tensor[elements] for tensor in (self.target, self.lower, self.upper, self.b))
        return self._replace(target=target, lower=lower, upper=upper, b=b)

    def first(self) -> _Dual:
        """The multipliers that are right if no bound matters."""
        return self.at(self._in_single(self.target @ self.A.mT - self.b, lambda right: right @ self.inverse))

    def at(self, y: Tensor) -> _Dual:
        """What belongs to multipliers (B, m)."""
        inner = self.target - (y @ self.A) / self.p
        side = (inner > self.upper).to(torch.int8) - (inner < self.lower).to(torch.int8)
        x = torch.minimum(torch.maximum(inner, self.lower), self.upper)
        gradient = x @ self.A.mT - self.b
        energy = 0.5 * ((x - self.target).square() @ self.p)
        return _Dual(y, gradient, (energy + (y * gradient).sum(1))[:, None], side)

    def direction(self, dual: _Dual, share: Tensor) -> tuple[Tensor, Tensor]:
        """A step (B, m) with ``F + μ (1 - F)`` for the second derivative, and (B,) whose matrix is alike."""
        weights = (torch.where(dual.side == 0, 1.0, share) / self.p).float()
        alike = torch.ones_like(weights[:, 0], dtype=torch.bool)

        def conjugate_gradients(right: Tensor) -> Tensor:
            answer, residual = torch.zeros_like(right), right
            direction = correction = residual @ self.inverse
            size = start = _dot(residual, correction)
            for _ in range(GRADIENTS):
                product = ((direction @ self.single) * weights) @ self.single.mT
                curvature = _dot(direction, product)
                length = torch.where(curvature > 0, size / curvature, 0.0)
                answer = torch.addcmul(answer, length, direction)
                residual = torch.addcmul(residual, length, product, value=-1.0)
                correction = residual @ self.inverse
                before, size = size, _dot(residual, correction)
                alike.copy_((size <= ACCURACY**2 * start)[:, 0])
                if bool(alike.all()):
                    break
                direction = torch.addcmul(correction, torch.where(before > 0, size / before, 0.0), direction)
            return answer

        step = self._in_single(dual.gradient, conjugate_gradients)
        return step, alike & torch.isfinite(step).all(1)

    def search(self, dual: _Dual, direction: Tensor) -> tuple[_Dual, Tensor]:
        """Steps that are short enough for an ascent, and their lengths (B, 1)."""
        length = torch.ones_like(dual.value)
        slope = ASCENT * _dot(dual.gradient, direction)
        moved = self.at(dual.y + direction)
        for _ in range(SHORTENED):
            short = moved.value < dual.value + length * slope - ROUNDING * dual.value.abs()
            if not bool(short.any()):
                break
            length = torch.where(short, SHORTER * length, length)
            moved = self.at(dual.y + length * direction)
        return moved, length

    @staticmethod
    def _in_single(right: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``solve`` makes of right-hand sides (B, m) with largest entries of 1."""
        size = right.abs().amax(1, keepdim=True)
        size = torch.where(size > 0, size, 1.0)
        return solve((right / size).float()).to(right.dtype) * size


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(1, keepdim=True)
