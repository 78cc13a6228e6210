"""Proofs that a conic program has no solution, checked against its data: a solver's word is none.

Of ``minimise ½xᵀP x + qᵀx  s.t.  A x + s = b, s ∈ K, lower ≤ x ≤ upper``

- multipliers ``y ∈ K*`` and z, positive at upper and negative at lower bounds, with ``Aᵀy + z = r`` and
  ``bᵀy + upperᵀz₊ - lowerᵀz₋ = -v < 0`` prove that no feasible x has ``|x|₁ < v / |r|∞`` (Farkas);
- a direction d with ``q·d = -v < 0``, ``-A d ∈ K`` and within the bounds' own directions lowers the objective at least
  until ``t = v / (dᵀP d)``, without limit where ``P d = 0``.

Problems are given in units of order 1 (:class:`~lpgd.problems.conic.units.Units`), in which points beyond ``REACH`` are
nowhere: a proof that holds up to there is accepted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.cones.projections import distance, project
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import per_element

__all__ = ["MARGIN", "proves_infeasible", "proves_unbounded"]

REACH = 1e6
"""How far from the origin, in the problem's units, a solution could still be."""
MARGIN = 1e-9
"""How much, relative to its terms, a value must be below zero, and a bound below another one, to count."""


def proves_infeasible(problem: ConicProblem, y: Tensor) -> Tensor:
    """(B,) whether multipliers y (B, m), with the best z that goes with them, prove that no point is feasible."""
    size, structure = problem.batch_size, problem.structure
    y = _each_finite(y, lambda points: from_numpy(np.asarray(project(structure.cones, points, dual=True))))
    y = y / maximum_norm(y)[:, None].clamp(min=1e-300)
    slope = structure.constraint.rmatvec(problem.data.A, y)
    lower, upper = problem.full_bounds()
    # z = -Aᵀy wherever there is a bound on the side that its sign asks for; what is left is the residual r.
    held = torch.where(slope < 0, torch.isfinite(upper), torch.isfinite(lower))
    z = torch.where(held, -slope, 0.0)
    residual = maximum_norm(slope + z)
    b = per_element(problem.data.b, size)
    above, below = z.clamp(min=0), (-z).clamp(min=0)
    terms = [
        b * y,
        torch.where(torch.isfinite(upper), upper, 0.0) * above,
        -torch.where(torch.isfinite(lower), lower, 0.0) * below,
    ]
    value, magnitude = sum(term.sum(-1) for term in terms), sum(term.abs().sum(-1) for term in terms)
    return (value < -MARGIN * magnitude) & (residual * REACH <= -value)


def proves_unbounded(problem: ConicProblem, direction: Tensor) -> Tensor:
    """(B,) whether the objective of a feasible point falls without limit along a direction (B, n)."""
    structure, size = problem.structure, problem.batch_size
    d = direction / maximum_norm(direction)[:, None].clamp(min=1e-300)
    lower, upper = problem.full_bounds()
    d = torch.where(torch.isfinite(lower), d.clamp(min=0), d)
    d = torch.where(torch.isfinite(upper), d.clamp(max=0), d)
    d = d / maximum_norm(d)[:, None].clamp(min=1e-300)
    terms = per_element(problem.data.q, size) * d
    value, curvature = terms.sum(-1), (d * problem.quadratic_product(d)).sum(-1)
    outward = structure.constraint.matvec(problem.data.A, d)
    left = _each_finite(-outward, lambda points: from_numpy(np.asarray(distance(structure.cones, points)))[:, None])
    # Along d the objective falls to t = v / dᵀP d, by then A x has left the cone by t times its distance.
    falls = value < -MARGIN * terms.abs().sum(-1)
    return falls & (curvature * REACH <= -value) & (left[:, 0] * REACH <= 1.0)


def _each_finite(vectors: Tensor, function: Callable[[np.ndarray], Tensor]) -> Tensor:
    """A function of finite vectors, on the CPU; NaN for the others."""
    finite = torch.isfinite(vectors).all(-1)
    found = function(vectors[finite].cpu().numpy()).to(vectors)
    whole = vectors.new_full((vectors.shape[0], *found.shape[1:]), torch.nan)
    whole[finite] = found
    return whole
