"""How far points of conic programs are from optimal, computed from the problem alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.cones.product import Cones
from lpgd.cones.projections import distance
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint, per_element

__all__ = ["Products", "Residuals", "residuals_of"]


class Residuals(NamedTuple):
    """Relative violations of the optimality conditions, (B,) each, computed from the problem alone.

    They are taken in the problem's own units (:class:`~lpgd.problems.conic.units.Units`), so that they do not depend on
    the scale of the data, in the maximum norm, and relative to the largest of the terms that should cancel, if above 1.

    ``primal``: distance of ``b - A x`` to K, of x to its bounds and of its integer entries to whole numbers, over the
    largest of b, A x and x.  ``dual``: ``|P x + q + Aᵀy + z|``, distance of y to K*, and multipliers of absent bounds,
    over the largest of q, P x, Aᵀy and z.  ``gap``: ``|xᵀP x + qᵀx + bᵀy + upperᵀz₊ - lowerᵀz₋|`` over the largest of
    its terms.  Of an integer program, ``gap`` is that to the dual value of the multipliers it was given, which is none
    of its accuracy.
    """

    primal: Tensor
    dual: Tensor
    gap: Tensor

    def __repr__(self) -> str:
        known = ((name, values[values.isfinite()]) for name, values in self._asdict().items())
        worst = ", ".join(
            f"{name} {float(values.max()) if values.numel() else float('nan'):.1e}" for name, values in known
        )
        return f"Residuals({self.primal.numel()} elements; worst {worst})"

    @property
    def worst(self) -> Tensor:
        return torch.stack(tuple(self)).amax(0)


class Products(NamedTuple):
    """What the optimality conditions take of a point (x, y, ·) and of the matrices: P x, Aᵀy (B, n) and A x (B, m)."""

    Px: Tensor
    Aty: Tensor
    Ax: Tensor

    @classmethod
    def of(cls, problem: ConicProblem, point: ConicPoint) -> Products:
        """Those of B points."""
        constraint, A = problem.structure.constraint, problem.data.A
        return cls(problem.quadratic_product(point.x), constraint.rmatvec(A, point.y), constraint.matvec(A, point.x))


def residuals_of(problem: ConicProblem, point: ConicPoint, products: Products | None = None) -> Residuals:
    """The residuals of points of a problem that is in units of order 1; ``products`` are theirs, where known."""
    structure, size, (x, y, z) = problem.structure, problem.batch_size, point
    q, b = (per_element(datum, size) for datum in (problem.data.q, problem.data.b))
    Px, Aty, Ax = Products.of(problem, point) if products is None else products
    primal = _distance(structure.cones, b - Ax, dual=False)
    dual = torch.maximum(maximum_norm(Px + q + Aty + z), _distance(structure.cones, y, dual=True))
    bound_terms = torch.zeros_like(x)
    if structure.has_bounds:
        lower, upper = problem.full_bounds()
        primal = torch.maximum(primal, maximum_norm(torch.relu(torch.maximum(x - upper, lower - x))))
        above, below = z.clamp(min=0), (-z).clamp(min=0)
        has_upper, has_lower = torch.isfinite(upper), torch.isfinite(lower)
        absent = torch.where(has_upper, 0.0, above) + torch.where(has_lower, 0.0, below)
        dual = torch.maximum(dual, maximum_norm(absent))
        bound_terms = torch.where(has_upper, upper, 0.0) * above - torch.where(has_lower, lower, 0.0) * below
    if structure.has_integers:
        whole = x[:, structure.index("integer_index", x.device)]
        primal = torch.maximum(primal, maximum_norm(whole - whole.round()))
    terms = [(x * Px).sum(-1), (q * x).sum(-1), (b * y).sum(-1), bound_terms.sum(-1)]

    def relative(residual: Tensor, *sizes: Tensor) -> Tensor:
        return residual / torch.stack(sizes).amax(0).clamp(min=1.0)

    return Residuals(
        relative(primal, *map(maximum_norm, (b, Ax, x))),
        relative(dual, *map(maximum_norm, (q, Px, Aty, z))),
        relative(sum(terms, torch.zeros_like(primal)).abs(), *(term.abs() for term in terms)),
    )


def _distance(cones: Cones, points: Tensor, *, dual: bool) -> Tensor:
    """Distance of each row to the cone; NaN for a row that is not finite, which no projection has to see."""
    finite = torch.isfinite(points).all(-1)
    distances = points.new_full(points.shape[:1], torch.nan)
    vectors = points[finite].cpu().numpy()
    distances[finite] = from_numpy(np.asarray(distance(cones, vectors, dual=dual))).to(points.device)
    return distances
