"""Units in which slacks and multipliers of each curved cone are of one size, for points where they are far apart.

For a cone of rows with slack s and multiplier y the map ``v = y - s`` may be ``y / λ - λ s`` as well: a factor of the
rows.  Where s is 1e-6 and y of order 1, as beside variables of 1e3 whose power is 1, the point is 1e-6 from the cone's
apex, which is next to a kink; with ``λ² = |y| / |s|`` both are 1e-3, and the boundary's curvature is as much smaller.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import Tensor

from lpgd.arrays import FloatArray, from_numpy
from lpgd.gradients.implicit.located import Located
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.units import Units

__all__ = ["units_of_cones"]

APART = 3.0
"""Exponents of two by which slacks and multipliers of a cone differ at least."""
KNOWN = 1e3
"""Slacks and multipliers are known where they are so many times what is left of the optimality conditions."""


def units_of_cones(problem: ConicProblem, units: Units, located: Located) -> tuple[Units, Tensor] | None:
    """Units with other factors of the rows of curved cones, and (B,) whose are other ones; None where none are.

    Args:
        problem: B elements.
        units: that their points are ``located`` in.
    """
    cones = problem.structure.cones
    if cones.is_polyhedral:
        return None
    start = cones.zero + cones.nonnegative
    blocks = cones.blocks[start:]
    first = np.flatnonzero(np.diff(blocks, prepend=-1))
    least = KNOWN * located.error.cpu().numpy()[:, None]
    sizes: list[FloatArray] = [
        np.maximum.reduceat(np.abs(tensor.detach().cpu().numpy()[:, start:]), first, axis=1)
        for tensor in (located.slack, located.point.y)
    ]
    slack, y = sizes
    known = (slack > least) & (y > least)  # false for NaN
    exponents = np.where(known, np.log2(np.where(known, y, 1.0) / np.where(known, slack, 1.0)), 0.0)
    exponents = np.where(np.abs(exponents) > APART, np.round(0.5 * exponents), 0.0)
    if not exponents.any():
        return None
    factors = np.ones(located.slack.shape)
    factors[:, start:] = np.exp2(exponents)[:, np.cumsum(np.isin(np.arange(blocks.size), first)) - 1]
    row = from_numpy(factors).to(problem.device)
    others = from_numpy(np.asarray(exponents.any(1))).to(problem.device)
    return replace(units, row=row if units.row is None else row * units.row_of(problem)), others
