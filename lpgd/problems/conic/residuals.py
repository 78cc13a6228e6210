"""How far points of conic programs are from optimal, computed from the problem alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, from_numpy
from lpgd.cones.product import Cones
from lpgd.cones.projections import distance
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint, per_element

__all__ = ["Products", "Residuals", "residual_bound", "residuals_of"]


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
    """The residuals of points of a problem that is in units of order 1; ``products`` are theirs, where known.

    In NumPy but for the products, as small operations of torch take three times as long.
    """
    structure, size, device = problem.structure, problem.batch_size, point.x.device
    tensors = (*point, *(Products.of(problem, point) if products is None else products))
    x, y, z, Px, Aty, Ax = (_array(tensor) for tensor in tensors)
    q, b = (_array(per_element(datum, size)) for datum in (problem.data.q, problem.data.b))
    with np.errstate(over="ignore", invalid="ignore"):  # of points that are none
        primal = _distance(structure.cones, b - Ax, dual=False)
        dual = np.maximum(_norms(Px + q + Aty + z), _distance(structure.cones, y, dual=True))
        terms = [(x * Px).sum(-1), (q * x).sum(-1), (b * y).sum(-1)]
        if structure.has_bounds:
            lower, upper = (_array(bound) for bound in problem.full_bounds())
            primal = np.maximum(primal, _norms(np.maximum(np.maximum(x - upper, lower - x), 0.0)))
            above, below = np.maximum(z, 0.0), np.maximum(-z, 0.0)
            has_upper, has_lower = np.isfinite(upper), np.isfinite(lower)
            absent = np.where(has_upper, 0.0, above) + np.where(has_lower, 0.0, below)
            dual = np.maximum(dual, _norms(absent))
            terms.append((np.where(has_upper, upper, 0.0) * above - np.where(has_lower, lower, 0.0) * below).sum(-1))
        if structure.has_integers:
            whole = x[:, structure.integer_index]
            primal = np.maximum(primal, _norms(whole - np.round(whole)))
        found = (
            primal / _largest(_norms(values) for values in (b, Ax, x)),
            dual / _largest(_norms(values) for values in (q, Px, Aty, z)),
            np.abs(sum(terms, np.zeros(size))) / _largest(np.abs(term) for term in terms),
        )
    return Residuals(*(from_numpy(values).to(device) for values in found))


def residual_bound(point: ConicPoint, error: Tensor) -> Tensor:
    """(B,) a bound of the residuals of complementary points at which |F| is an error (B,), up to rounding.

    With ``F = (P x + q + Aᵀy + z, A x + s - b)`` the gap is ``xᵀF₁ - yᵀF₂``, as y and s, and z and the bounds' slacks,
    are orthogonal.
    """
    x, y = (tensor.detach().abs().sum(-1) for tensor in (point.x, point.y))
    return error * (1.0 + x + y)


def _array(tensor: Tensor) -> FloatArray:
    return tensor.detach().cpu().numpy()


def _norms(vectors: FloatArray) -> FloatArray:
    """(B,) the largest magnitude in each row."""
    return np.abs(vectors).max(-1, initial=0.0)


def _largest(sizes: Iterable[FloatArray]) -> FloatArray:
    """(B,) the largest of several sizes and 1."""
    return np.maximum(reduce(np.maximum, sizes), 1.0)


def _distance(cones: Cones, points: FloatArray, *, dual: bool) -> FloatArray:
    """Distance of each row to the cone; NaN for a row that is not finite, which no projection has to see."""
    if cones.is_polyhedral:
        distances = np.maximum(-points[:, cones.zero :].min(-1, initial=0.0), 0.0)
        if not dual and cones.zero:
            distances = np.maximum(distances, _norms(points[:, : cones.zero]))
        return np.where(np.isfinite(points).all(-1), distances, np.nan)
    finite = np.isfinite(points).all(-1)
    distances = np.full(len(points), np.nan)
    distances[finite] = distance(cones, points[finite], dual=dual)
    return distances
