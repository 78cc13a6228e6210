"""Newton's method on the active set: the warm start of the batched interior-point method.

With the active rows C of the constraints ``A x + s = b`` and the variables that are at a bound held fixed, a quadratic
program is the linear system of :mod:`lpgd.solvers.interior_point.equality_system`,
whose answer is the solution if no other row or bound is violated and every multiplier has its sign.  Otherwise what
is violated becomes active, what has the wrong sign becomes inactive, and the system is solved again: the primal-dual
active-set method of Hintermüller, Ito and Kunisch (2002), which is a semismooth Newton method.  From the active set of
a problem near by it ends exactly, after a few systems; it can cycle, so an element whose changes do not die out quickly
is left to the interior-point method.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.execution.interrupts import pause
from lpgd.solvers.interior_point.box_program import BoxProgram, product_of
from lpgd.solvers.interior_point.equality_system import (
    SOUND,
    EqualitySystem,
    KeptSystem,
    equality_program,
    equality_system,
)
from lpgd.solvers.interior_point.newton_system import NewtonSystem, Precision, newton_system

__all__ = ["ActiveSet", "Settled", "is_suitable", "settle"]

SYSTEMS = 8
"""The most systems solved for one element."""
NEAR = 0.15
"""The share of variables and rows that may change at first."""
DECAY = 0.6
"""The factor by which the number of changes must fall from one system to the next."""


@dataclass(frozen=True)
class ActiveSet:
    """What is active at a point: (B, m) rows of A, equalities among them, and (B, n) variables at either bound."""

    rows: Tensor
    upper: Tensor
    lower: Tensor

    @property
    def masks(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.upper, self.lower

    def select(self, elements: Tensor) -> ActiveSet:
        """Those of these elements."""
        return ActiveSet(*(mask[elements] for mask in self.masks))


@dataclass(frozen=True)
class Settled:
    """Answers in the terms of the program.

    Attributes:
        found: (B,) elements whose active set has settled.
        x: (B, n).
        z: (B, rows) multipliers, nonnegative on inequalities.
        systems: (B,) how many systems were solved.
        kept: the first system, which is that of the elements that it settled.
    """

    found: Tensor
    x: Tensor
    z: Tensor
    systems: Tensor
    kept: KeptSystem | None = None


def is_suitable(program: BoxProgram) -> bool:
    """Whether every variable has curvature of its own: without, an active set need not determine the solution."""
    if program.P is None:
        return False
    diagonal = program.P if program.P.ndim == 2 else program.P.diagonal(dim1=-2, dim2=-1)
    return bool((diagonal > 0).all())


def settle(program: BoxProgram, start: ActiveSet, tolerance: float, regularization: float) -> Settled:
    """Newton steps from the active sets of S elements, for a program of k S elements, k copies one after the other.

    Args:
        program: with curvature in every variable (:func:`is_suitable`).
        start: of S elements.
        tolerance: by which a bound, a row or a sign may be missed, relatively.
        regularization: of the factors, relative.
    """
    size, device = program.size, program.q.device
    settled = Settled(
        torch.zeros(size, dtype=torch.bool, device=device),
        program.q.new_full((size, program.n), torch.nan),
        program.q.new_full((size, program.row_count), torch.nan),
        torch.zeros(size, dtype=torch.int64, device=device),
    )
    copies = size // start.rows.shape[0]
    sets = ActiveSet(*(mask.repeat(copies, 1) for mask in start.masks))
    elements = torch.arange(size, device=device)
    changes = torch.full((size,), NEAR * (program.n + program.m) / DECAY, device=device)
    lower, upper = program.full_limits()
    limits: tuple[Tensor, Tensor] = upper, lower
    system: NewtonSystem | None = None
    for number in range(1, SYSTEMS + 1):
        pause()
        x, z, sound, system, factorised = _point(
            program, sets, limits, copies if number == 1 else 1, system, regularization
        )
        corrected, changed = _corrected(program, sets, limits, x, z, tolerance)
        finished = sound & (changed == 0)
        finished_elements = elements[finished]
        settled.systems[elements] = number
        settled.found[finished_elements] = True
        settled.x[finished_elements], settled.z[finished_elements] = x[finished], z[finished]
        if number == 1 and copies == 1:
            settled = replace(
                settled, kept=KeptSystem(elements, finished, factorised, torch.ones_like(program.b[:1, : program.m]))
            )
        left = rows_where(sound & ~finished & (changed <= DECAY * changes))
        if not left.shape[0]:
            break
        program, sets, changes, elements = program.select(left), corrected.select(left), changed[left], elements[left]
        limits = limits[0][left], limits[1][left]
    return settled


def _point(
    program: BoxProgram,
    sets: ActiveSet,
    limits: tuple[Tensor, Tensor],
    copies: int,
    system: NewtonSystem | None,
    regularization: float,
) -> tuple[Tensor, Tensor, Tensor, NewtonSystem, EqualitySystem]:
    """Primal (B, n) and dual (B, rows) points of the active sets, (B,) where they could be solved for, the systems.

    Copies share their sets, and so their factors.
    """
    count, unmasked = program.size // copies, replace(program, free=None)
    held = torch.where(sets.upper, limits[0], torch.where(sets.lower, limits[1], 0.0))
    slope = unmasked.quadratic(held)
    assert slope is not None
    free = (~(sets.upper | sets.lower)).to(held.dtype)
    free = free if program.free is None else free * program.free
    whole = equality_program(program, free)
    first_copy = whole if copies == 1 else whole.select(torch.arange(count, device=held.device))
    system = newton_system(first_copy) if system is None else system.select(first_copy)
    factor = whole.cost / program.cost
    right_x, right_y = -factor * (slope + program.q), program.b[:, : program.m] - whole.product(held)
    right_x, right_y = (side.view(copies, count, -1).transpose(0, 1) for side in (right_x, right_y))
    active = sets.rows[:count]
    factorised = equality_system(first_copy, active, system, regularization, Precision.SHARED)
    answer = factorised.solve(right_x, right_y)
    while factorised.factor.is_rough and not bool((answer.error <= SOUND * answer.scale).all()):
        factorised = equality_system(first_copy, active, system, regularization, factorised.factor.better)
        answer = factorised.solve(right_x, right_y)
    x, u, error, scale = answer
    x, u = (tensor.transpose(0, 1).reshape(program.size, -1) for tensor in (x, u))
    sound = (error <= SOUND * (1.0 + scale)).T.reshape(-1)
    x, u = x + held, u / factor
    slope = unmasked.quadratic(x)
    assert slope is not None
    slope = slope + program.q + product_of(program.A.mT, u)
    above, below = torch.where(sets.upper, -slope, 0.0), torch.where(sets.lower, slope, 0.0)
    z = [u, above if program.upper is None else above[:, program.upper]]
    return x, torch.cat([*z, below if program.lower is None else below[:, program.lower]], 1), sound, system, factorised


def _corrected(
    program: BoxProgram, sets: ActiveSet, limits: tuple[Tensor, Tensor], x: Tensor, z: Tensor, tolerance: float
) -> tuple[ActiveSet, Tensor]:
    """The sets after what is violated has joined and what has the wrong sign has left; (B,) how many did."""
    upper, lower = limits
    m, e = program.m, program.equalities
    multipliers = program.bounds_transposed(torch.zeros_like(x), z[:, m:])
    allowed = tolerance * (1.0 + x.abs())
    free = ~(sets.upper | sets.lower)
    at_upper = torch.where(sets.upper, multipliers >= -tolerance, free & (x > upper + allowed))
    at_lower = torch.where(sets.lower, multipliers <= tolerance, free & (x < lower - allowed))
    if program.free is not None:
        at_upper, at_lower = at_upper & (program.free > 0), at_lower & (program.free > 0)
    b = program.b[:, :m]
    inside = product_of(program.A, x) <= b + tolerance * (1.0 + b.abs())
    active_rows = torch.where(sets.rows, z[:, :m] >= -tolerance, ~inside)
    active_rows[:, :e] = True
    changed = (at_upper != sets.upper).sum(1) + (at_lower != sets.lower).sum(1) + (active_rows != sets.rows).sum(1)
    return ActiveSet(active_rows, at_upper, at_lower), changed
