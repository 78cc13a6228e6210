"""Linear systems of quadratic programs whose active set is held fixed, factorised for a batch.

With the active rows C of the constraints and the variables that are not at a bound,

    [ P   Cᵀ ] [x]   [r]
    [ C   0  ] [u] = [t]

is solved by the interior-point method's elimination, in which an active row has a small diagonal instead of 0 and an
inactive one a huge one, and refined against the system itself.  It is the system of a step on active sets, and at a
solution that of implicit differentiation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd.solvers.interior_point.box_program import BoxProgram
from lpgd.solvers.interior_point.newton_system import Factor, NewtonSystem, Precision

__all__ = ["SOUND", "EqualityAnswer", "EqualitySystem", "KeptSystem", "equality_program", "equality_system"]

ACTIVE, INACTIVE = 1e-9, 1e30
"""The diagonal of an active and of an inactive row, in place of 0 and of infinity."""
REGULARIZATION = 1e-13
"""Relative regularisation of the factors."""
REFINEMENTS = 5
ENOUGH = 1e-13
"""The relative residual at which refinement ends."""
SOUND = 1e-9
"""The residual, in scaled units, up to which a system counts as solved."""
KEPT_BYTES = 2**27
"""Factors larger than this are not kept."""


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


class EqualityAnswer(NamedTuple):
    """Solutions x (B, k, n) and u (B, k, m), and the residual and size of each right-hand side, (B, k) each."""

    x: Tensor
    u: Tensor
    error: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class EqualitySystem:
    """A factorised system.

    Attributes:
        program: an :func:`equality_program`.
        active: (B, m) which rows are active, equalities among them.
        factor: of the elimination.
    """

    program: BoxProgram
    active: Tensor
    factor: Factor

    def solve(self, right_x: Tensor, right_y: Tensor) -> EqualityAnswer:
        """Solve for right-hand sides (B, k, n) and (B, k, m); what is not free or active is left out of them."""
        program, factor = self.program, self.factor
        mask = self.active.to(right_y.dtype)[:, None]
        right_x, right_y = program.masked(right_x), right_y * mask
        x, u, left_x, left_y = torch.zeros_like(right_x), torch.zeros_like(right_y), right_x, right_y
        scale = error = torch.cat([right_x, right_y], -1).abs().amax(-1)
        going = torch.ones_like(scale, dtype=torch.bool)[..., None]
        for _ in range(2 * REFINEMENTS if factor.is_rough else REFINEMENTS):
            dx, du = factor.solve(left_x, left_y)
            # What is done stays as it is, whatever the others need.
            x, u = torch.where(going, x + dx, x), torch.where(going, u + du * mask, u)
            Px = program.quadratic(x)
            left_x = right_x - program.transposed(u)
            left_x = left_x if Px is None else left_x - Px
            left_y = (right_y - program.product(x)) * mask
            error = torch.cat([left_x, left_y], -1).abs().amax(-1)
            going = going & ~(error <= ENOUGH * scale)[..., None]
            if not bool(going.any()):
                break
        return EqualityAnswer(x, u, error, scale)


def equality_system(
    program: BoxProgram,
    active: Tensor,
    system: NewtonSystem,
    regularization: float = REGULARIZATION,
    precision: Precision = Precision.DOUBLE,
) -> EqualitySystem:
    """Factorise the system of an :func:`equality_program` and its active rows.

    Args:
        system: of this program.
        regularization: of the factors, relative.
        precision: that does, for systems that are not too ill-conditioned.
    """
    h = torch.where(active[:, program.equalities :], ACTIVE, INACTIVE).to(program.b.dtype)
    return EqualitySystem(program, active, system.factor(h, h.new_full((h.shape[0], 1), regularization), precision))


class KeptSystem(NamedTuple):
    """The system at the solutions of some elements of a batch, kept for implicit differentiation.

    Attributes:
        elements: (k,) the elements of the system.
        valid: (k,) those whose solution it belongs to.
        system: of these elements; not all of them need be valid.
        row_scale: (1 or k, m) the factors of the rows of A in its program.
    """

    elements: Tensor
    valid: Tensor
    system: EqualitySystem
    row_scale: Tensor

    def among(self, chosen: Tensor) -> KeptSystem:
        """The same, valid for elements that are ``chosen`` (B,) alone."""
        return self._replace(valid=self.valid & chosen[self.elements])

    @property
    def is_small(self) -> bool:
        """Whether it is worth its memory."""
        program = self.system.program
        return len(self.elements) * min(program.n, max(program.m, 1)) ** 2 * 8 <= KEPT_BYTES

    def moved(self, places: Tensor) -> KeptSystem:
        """The same for a batch of which element ``i`` here is element ``places[i]``."""
        return self._replace(elements=places[self.elements])

    def scaled(self, row_scale: Tensor) -> KeptSystem:
        """The same for rows of A that have these factors in the program of the whole batch, (1 or B, m)."""
        return self._replace(row_scale=row_scale if row_scale.shape[0] == 1 else row_scale[self.elements])
