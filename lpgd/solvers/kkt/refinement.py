"""Newton's method on the optimality conditions, from any solver's answer: where the last digits come from.

For ``v = y - s`` and ``ξ = x + z``, with ``y = Π(v)`` the projection onto K*, ``s = y - v``, ``x = clip(ξ)`` between
the bounds and ``z = ξ - x``, every point is complementary, and a solution is a root of

    F(ξ, v) = (P x + q + Aᵀy + z,  A x + s - b).

A step is one solve of the system of :mod:`lpgd.solvers.kkt.system` with F for its tilt: ``(dx, dy, dz)``, and
``dv = dy + A dx + F₂``.  Where the system is singular, or as good as singular at a point known no better than |F|, the
step is Levenberg and Marquardt's with ``μ = |F|²``, which converges onto manifolds of solutions as Newton's method does
to a regular one (Fan and Yuan 2005).  Near a solution the next steps are chords, by the same factors: where a step
leaves the share ``c |F|`` of F, a chord leaves about twice that share of what is left.  A step that does not reduce |F|
is halved; one to a multiple root is longer.  Where halving does not help, a few whole steps are looked ahead: near a
solution of a linear or quadratic program |F| may rise until the active set is right, and vanish then.  If none of them
is better by far, the point stays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.residuals import Products
from lpgd.problems.conic.structure import ConicPoint, ConicStructure
from lpgd.solvers.kkt.newton import ROUNDED, KeptFactor, Newton, Start
from lpgd.solvers.kkt.points import Points
from lpgd.solvers.kkt.reduced import is_dense

__all__ = [
    "Refined",
    "complementary",
    "has_vertices",
    "is_cheap",
    "is_small",
    "optimality_residual",
    "refine",
]

DENSE, SPARSE, FILLED = 300, 1_000_000, 100
"""Steps are cheap up to so many variables and rows, or so many entries, of which larger programs have so many in a row
on average."""
VERTICES = 50_000
"""Of linear programs, up to so many entries: of their degenerate vertices systems are singular."""
FACTORISED = 3000
"""Of systems that are filled, those with so many variables and rows: one step, which serves derivatives and perturbed
points too, takes a tenth of a solver's time or less (dense quadratic programs n 300 to 700, all solvers)."""


class Refined(NamedTuple):
    """Refined points of E elements, in the order that they were asked for.

    Attributes:
        point: (E, ·) each, complementary: y in K*, x between its bounds.
        slack: (E, m) in K.
        before, after: (E,) the maximum norm of F; NaN for points that are not finite, which are left as they are.
        taken: (E,) the number of steps.
        isolated: (E,) whether the system of the last step is regular by far, as it is not where solutions are many.
        kept: the systems of the last steps.
    """

    point: ConicPoint
    slack: Tensor
    before: Tensor
    after: Tensor
    taken: Tensor
    isolated: Tensor
    kept: tuple[KeptFactor, ...] = ()


def refine(
    problem: ConicProblem,
    point: ConicPoint,
    slack: Tensor,
    elements: Tensor,
    *,
    start: Start | None = None,
    steps: int | Tensor = 3,
    keep: bool = False,
    regular_only: bool = False,
    rounded: float = ROUNDED,
) -> Refined:
    """Newton's method from a point, for some elements of a batch.

    Args:
        problem: in units in which its terms are of order 1: F is measured as it is.  Integers are not looked at.
        point, slack: a solver's answer for all B elements; for conic programs without integer variables.
        elements: which to refine.
        start: where that answer is, if it is known.
        steps: at most, of all or (E,) of each; no chords follow where as many were taken, chords included.
        keep: the systems of the last steps, for the derivative of the solutions.
        rounded: where |F|, relative to the point, is taken for rounding that no chord reduces; 0 tries every step.
        regular_only: elements whose system is singular, or nearly so, are left at once.
    """
    start = None if start is None else start.select(elements)
    if not torch.equal(elements, torch.arange(problem.batch_size, device=problem.device)):
        problem, point, slack = problem.select(elements), point.select(elements), slack[elements]
    points = Points(problem)
    if start is None:
        xi, v = points.start(point, slack)
        start = Start(xi, v, *points.residual(xi, v))
    limits = np.full(elements.shape[0], steps) if isinstance(steps, int) else steps.cpu().numpy()
    newton = Newton(points, start, limits, elements if keep else None, regular_only, rounded)
    before, state = newton.error.copy(), newton.state
    if regular_only and has_vertices(problem.structure) and newton.left.any():
        newton.left &= ~points.plainly_singular(state.xi, state.v).cpu().numpy()
    newton.run()
    if is_small(problem.structure) and not regular_only:
        newton.look_ahead()
    refined, refined_slack = points.point(state.xi, state.v)
    finite = np.isfinite(before)
    if not finite.all():
        usable = from_numpy(finite).to(problem.device)
        refined = refined.where(usable, point)
        refined_slack = torch.where(usable[:, None], refined_slack, slack)
    arrays = before, newton.error, newton.taken, newton.isolated
    told = [from_numpy(array).to(problem.device) for array in arrays]
    return Refined(refined, refined_slack, told[0], told[1], told[2], told[3], tuple(newton.kept))


def is_small(structure: ConicStructure) -> bool:
    """Whether steps, and another solver, cost next to nothing."""
    return structure.n + structure.m <= DENSE


def is_cheap(structure: ConicStructure) -> bool:
    """Whether a step takes no longer than an iteration of an interior-point method."""
    size = structure.n + structure.m
    if is_small(structure) or _is_factorised(structure):
        return True
    filled = structure.constraint.nnz + structure.quadratic.nnz
    return filled <= (VERTICES if _is_linear(structure) else SPARSE) and (size <= FACTORISED or filled <= FILLED * size)


def _is_factorised(structure: ConicStructure) -> bool:
    """Whether a dense system is larger than a small one and still cheaper than a solver by far."""
    return DENSE < structure.n + structure.m <= FACTORISED and is_dense(structure)


def has_vertices(structure: ConicStructure) -> bool:
    """Whether these are larger dense linear programs, of whose degenerate vertices the systems are singular."""
    return _is_factorised(structure) and _is_linear(structure)


def _is_linear(structure: ConicStructure) -> bool:
    return structure.cones.is_polyhedral and not structure.quadratic.nnz


def complementary(
    problem: ConicProblem, point: ConicPoint, slack: Tensor
) -> tuple[ConicPoint, Tensor, Start, Products]:
    """The point with y and s, x and z made complementary, its slack, where it is, and its products with the matrices.

    |F| is NaN where the point was not finite.
    """
    points = Points(problem)
    xi, v = points.start(point, slack)
    found, found_slack = points.point(xi, v)
    products = Products.of(problem, found)
    return found, found_slack, Start(xi, v, *points.residual_of(found, found_slack, products)), products


def optimality_residual(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> Tensor:
    """(B,) the maximum norm of F at the complementary point next to a solver's answer; NaN where that is not finite."""
    points = Points(problem)
    return points.residual(*points.start(point, slack))[0]
