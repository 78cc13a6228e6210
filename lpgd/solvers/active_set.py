"""Newton's method on the active set: the warm start of the batched interior-point method.

With the active rows C of the constraints ``A x + s = b`` and the variables that are at a bound held fixed, a quadratic
program is the linear system

    [ P   Cᵀ ] [x]   [r]
    [ C   0  ] [u] = [t]

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

from lpgd.solvers.box_program import BoxProgram, product_of
from lpgd.solvers.newton_system import NewtonSystem, newton_system

__all__ = ["ActiveSet", "Settled", "equality_program", "is_suitable", "settle", "solve_equalities"]

ACTIVE, INACTIVE = 1e-9, 1e30
"""The diagonal of an active and of an inactive row, in place of 0 and of infinity."""
REGULARIZATION = 1e-13
"""Relative regularisation of the factors."""
REFINEMENTS = 5
ENOUGH = 1e-13
"""The relative residual at which refinement ends."""
SYSTEMS = 8
"""The most systems solved for one element."""
NEAR = 0.15
"""The share of variables and rows that may change at first."""
DECAY = 0.6
"""The factor by which the number of changes must fall from one system to the next."""
SOUND = 1e-9
"""The residual, in scaled units, up to which a system counts as solved."""


def equality_program(program: BoxProgram, free: Tensor) -> BoxProgram:
    """The rows and the quadratic of a program without its bounds, and the quadratic's largest entry scaled to 1.

    Args:
        program: its factor of the quadratic does not matter.
        free: (B, n) one for variables that are free, zero for those that are held.
    """
    none = torch.zeros(0, dtype=torch.int64, device=free.device)
    largest = free.new_ones(1) if program.P is None else program.P.abs().flatten(1).amax(-1)
    cost = torch.where(largest > 0, 1.0 / largest, 1.0)[:, None].expand(free.shape[0], 1)
    b = free.new_zeros(free.shape[0], program.m)
    return replace(program, cost=cost, q=torch.zeros_like(free), b=b, upper=none, lower=none, bounded=None, free=free)


def solve_equalities(
    program: BoxProgram,
    active: Tensor,
    right_x: Tensor,
    right_y: Tensor,
    system: NewtonSystem,
    regularization: float = REGULARIZATION,
    rough: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve the system of the module's docstring, refined against itself.

    Args:
        program: an :func:`equality_program`.
        active: (B, m) which rows are active, equalities among them.
        right_x, right_y: (B, k, n) and (B, k, m) right-hand sides; what is not free or active is left out of them.
        system: of this program.
        regularization: of the factors, relative.
        rough: factors may be of single precision, for systems that are not too ill-conditioned.

    Returns:
        (B, k, n) x, (B, k, m) u, and of each right-hand side the residual and the size, (B, k) each.
    """
    mask = active.to(right_y.dtype)[:, None]
    right_x, right_y = program.masked(right_x), right_y * mask
    h = torch.where(active[:, program.equalities :], ACTIVE, INACTIVE).to(right_y.dtype)
    factor = system.factor(h, h.new_full((h.shape[0], 1), regularization), rough)
    x, u, left_x, left_y = torch.zeros_like(right_x), torch.zeros_like(right_y), right_x, right_y
    scale = error = torch.cat([right_x, right_y], -1).abs().amax(-1)
    for _ in range(2 * REFINEMENTS if factor.is_rough else REFINEMENTS):
        dx, du = factor.solve(left_x, left_y)
        x, u = x + dx, u + du * mask
        Px = program.quadratic(x)
        left_x = right_x - program.transposed(u)
        left_x = left_x if Px is None else left_x - Px
        left_y = (right_y - program.rows(x)) * mask
        error = torch.cat([left_x, left_y], -1).abs().amax(-1)
        if bool((error <= ENOUGH * scale).all()):
            break
    if factor.is_rough and not bool((error <= SOUND * scale).all()):
        return solve_equalities(program, active, right_x, right_y, system, regularization, rough=False)
    return x, u, error, scale


@dataclass(frozen=True)
class ActiveSet:
    """What is active at a point: (B, m) rows of A, equalities among them, and (B, n) variables at either bound."""

    rows: Tensor
    upper: Tensor
    lower: Tensor

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.upper, self.lower

    def select(self, elements: Tensor) -> ActiveSet:
        """Those of these elements."""
        return ActiveSet(*(part[elements] for part in self.parts))


@dataclass(frozen=True)
class Settled:
    """Answers in the terms of the program.

    Attributes:
        found: (B,) elements whose active set has settled.
        x: (B, n).
        z: (B, rows) multipliers, nonnegative on inequalities.
        systems: (B,) how many systems were solved.
    """

    found: Tensor
    x: Tensor
    z: Tensor
    systems: Tensor


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
    sets = ActiveSet(*(part.repeat(copies, 1) for part in start.parts))
    elements = torch.arange(size, device=device)
    changes = torch.full((size,), NEAR * (program.n + program.m) / DECAY, device=device)
    limits, system = _limits(program), None
    for number in range(1, SYSTEMS + 1):
        x, z, system, sound = _point(program, sets, limits, copies if number == 1 else 1, system, regularization)
        corrected, changed = _corrected(program, sets, limits, x, z, tolerance)
        done = sound & (changed == 0)
        rows = elements[done]
        settled.systems[elements] = number
        settled.found[rows], settled.x[rows], settled.z[rows] = True, x[done], z[done]
        left = (sound & ~done & (changed <= DECAY * changes)).nonzero()[:, 0]
        if not left.shape[0]:
            break
        program, sets, changes, elements = program.select(left), corrected.select(left), changed[left], elements[left]
        limits = limits[0][left], limits[1][left]
    return settled


def _limits(program: BoxProgram) -> tuple[Tensor, Tensor]:
    """(B, n) upper and lower bounds, infinite where there is none."""
    both, ends = [], program.b[:, program.m :]
    if program.bounded is not None:
        ends = torch.where(program.bounded > 0, ends, torch.inf)
    for index, part, sign in (
        (program.upper, ends[:, : program.uppers], 1.0),
        (program.lower, ends[:, program.uppers :], -1.0),
    ):
        full = ends.new_full((program.size, program.n), torch.inf)
        full[:, slice(None) if index is None else index] = part
        both.append(sign * full)
    return both[0], both[1]


def _point(
    program: BoxProgram,
    sets: ActiveSet,
    limits: tuple[Tensor, Tensor],
    copies: int,
    system: NewtonSystem | None,
    regularization: float,
) -> tuple[Tensor, Tensor, NewtonSystem, Tensor]:
    """Primal (B, n) and dual (B, rows) points of the active sets, the system, and (B,) where it could be solved.

    Copies share their sets, and so their factors.
    """
    count, unmasked = program.size // copies, replace(program, free=None)
    held = torch.where(sets.upper, limits[0], torch.where(sets.lower, limits[1], 0.0))
    slope = unmasked.quadratic(held)
    assert slope is not None
    free = (~(sets.upper | sets.lower)).to(held.dtype)
    free = free if program.free is None else free * program.free
    whole = equality_program(program, free)
    part = whole if copies == 1 else whole.select(torch.arange(count, device=held.device))
    system = newton_system(part) if system is None else system.select(part)
    factor = whole.cost / program.cost
    right_x, right_y = -factor * (slope + program.q), program.b[:, : program.m] - whole.rows(held)
    right_x, right_y = (side.view(copies, count, -1).transpose(0, 1) for side in (right_x, right_y))
    x, u, error, scale = solve_equalities(part, sets.rows[:count], right_x, right_y, system, regularization)
    x, u = (part.transpose(0, 1).reshape(program.size, -1) for part in (x, u))
    sound = (error <= SOUND * (1.0 + scale)).T.reshape(-1)
    x, u = x + held, u / factor
    slope = unmasked.quadratic(x)
    assert slope is not None
    slope = slope + program.q + product_of(program.A.mT, u)
    above, below = torch.where(sets.upper, -slope, 0.0), torch.where(sets.lower, slope, 0.0)
    z = [u, above if program.upper is None else above[:, program.upper]]
    return x, torch.cat([*z, below if program.lower is None else below[:, program.lower]], 1), system, sound


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
    rows = torch.where(sets.rows, z[:, :m] >= -tolerance, ~inside)
    rows[:, :e] = True
    changed = (at_upper != sets.upper).sum(1) + (at_lower != sets.lower).sum(1) + (rows != sets.rows).sum(1)
    return ActiveSet(rows, at_upper, at_lower), changed
