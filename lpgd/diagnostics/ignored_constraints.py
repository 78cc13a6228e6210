"""Does the gradient that ignores constraints descend?  The conditions of [APX], at a point of a declarative node.

With H the Hessian of the Lagrangian and Ĥ that of the objective alone, A = D_y h of the active constraints, B̂ = ∇²_wy f
and a loss gradient v, exact and approximate gradient are ``g = -Bᵀ Z v`` and ``ĝ = -B̂ᵀ Ĥ⁻¹ v``, where
``Z = H⁻¹ - H⁻¹Aᵀ(A H⁻¹ Aᵀ)⁻¹A H⁻¹``, so that ``g · ĝ = vᵀ N v`` with ``N = Z B B̂ᵀ Ĥ⁻¹``.

Linear constraints that do not depend on the inputs have H = Ĥ and B = B̂.  With ``u = H^(-1/2) v``, split into a along
the constraints and b across them, and ``M = H^(-1/2) B Bᵀ H^(-1/2)`` with eigenvalues from m to M̄,

    g · ĝ = aᵀ M (a + b)  ≥  m |a|² - ½ (M̄ - m) |a| |b|,

which is never negative where M is a multiple of the identity (as for projections), and positive where
``|a| / |b| > ½ (M̄/m - 1)``.  Over directions u that are equally likely, its mean is ``tr(P M)/n ≥ 0``, P the projection
along the constraints.  Of a normalisation ``|y|² = 1`` H is ``Ĥ + 2ν I`` ([APX] writes ``Ĥ - 2λ I``), and N may have
negative eigenvalues: its smallest one tells whether there is a loss for which the approximation ascends.

[APX] Gould, Xu, Xu, Liu: Towards Understanding Gradient Approximation in Equality Constrained Deep Declarative
Networks (arXiv 2306.14054), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.diagnostics.passes import Loss, Parameters, Pass
from lpgd.layers.node import NodeLayer
from lpgd.problems.node.multipliers import active_rows
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.node.structure import NodePoint

__all__ = ["IgnoredConstraints", "ignored_constraints"]

MANY = 300
"""Variables up to which matrices are formed here."""


@dataclass(frozen=True, eq=False)
class IgnoredConstraints:
    """What is known of the approximate gradient at the solutions of B elements, (B,) each; NaN where it is not.

    Attributes:
        product: ``g · ĝ``: a step against ĝ lowers the loss where it is positive.
        cosine: of the angle between them.
        linear: the constraints are linear in y, and do not depend on the inputs (to rounding).
        convex: Ĥ is positive definite; otherwise only product, cosine and worst say something.
        bound: of linear constraints the lower bound above; a positive one proves descent.
        ratio, needed: ``|a|/|b|`` and ``½ (M̄/m - 1)``: the bound is positive where the first exceeds the second.
        mean: of linear constraints ``tr(P M)/n``, the mean of ``g · ĝ`` over unit vectors u.
        worst: the smallest eigenvalue of N's symmetric part: no loss ascends where it is not negative.
    """

    product: Tensor
    cosine: Tensor
    linear: Tensor
    convex: Tensor
    bound: Tensor
    ratio: Tensor
    needed: Tensor
    mean: Tensor
    worst: Tensor

    @property
    def descends(self) -> Tensor:
        """Whether a step against ĝ lowers this loss."""
        return self.product > 0

    @property
    def is_proven(self) -> Tensor:
        """Whether the bound holds with room to spare, which proves that it does; False where there is no bound."""
        return self.bound > 0

    @property
    def always_descends(self) -> Tensor:
        """Whether it lowers every loss, to rounding."""
        return self.worst >= -1e-10 * (1 + self.worst.abs())


def ignored_constraints(layer: NodeLayer, parameters: Parameters, loss: Loss) -> IgnoredConstraints:
    """Look at :class:`~lpgd.IgnoreConstraints` for a loss of a node's solution, by dense matrices.

    Args:
        layer: of a node; its own gradient method does not matter.
        parameters: the arguments of its call, a list.  All inputs of the node count.
        loss: from the layer's output to one number, or to one for each element of the batch.

    Raises:
        TypeError: the layer is none of a node with optimality conditions.
        ValueError: it has more than 300 variables.
        SolverError: an element has no solution.
    """
    if not isinstance(layer, NodeLayer) or not layer.node.has_kkt:
        raise TypeError(f"{layer} is no NodeLayer whose node has optimality conditions: there is nothing to ignore.")
    run = Pass(layer, parameters, loss)
    solution = cast(NodeSolution, run.solution)
    problem, point, v = solution.problem, solution.point, run.cotangent.x
    size, n = point.x.shape
    if n > MANY:
        raise ValueError(f"the node has {n} variables; matrices are formed here up to {MANY}.")
    alone = NodePoint(point.x, point.nu.new_zeros(size, 0), point.lam.new_zeros(size, 0))
    free = _Unconstrained(problem.structure, problem.data, size)
    H, H_free = problem.hessian(point), free.hessian(alone)
    A = problem.jacobian(point.x)
    keep = torch.cat([torch.ones_like(point.nu, dtype=torch.bool), active_rows(problem, point.x, point.lam)], -1)
    A = A * keep[..., None]
    Z, push = _response(H, A)
    B = _mixed(problem, point, Z, push)  # (B, n, p): rows are what a unit change of the response is worth
    B_free = _mixed(free, alone, torch.eye(n, dtype=v.dtype, device=v.device).expand(size, n, n), None)
    inverse = linalg.pinv(H_free, hermitian=True)
    # B already has Z in it: g = -Bᵀ v.
    N = B @ B_free.mT @ inverse
    g, g_free = linalg.matvec(B.mT, v), linalg.matvec(B_free.mT @ inverse, v)
    product = (g * g_free).sum(-1)
    lengths = g.square().sum(-1).sqrt() * g_free.square().sum(-1).sqrt()
    scale = H_free.abs().amax((-1, -2)).clamp(min=torch.finfo(v.dtype).tiny)
    values, vectors = linalg.eigh(H_free)
    convex = values[:, 0] > 1e-12 * scale
    bent = (H - H_free).abs().amax((-1, -2)) <= 1e-10 * scale
    moved = (B - Z @ B_free).abs().amax((-1, -2)) <= 1e-10 * (
        1e-300 + B_free.abs().amax((-1, -2)) * Z.abs().amax((-1, -2))
    )
    worst = linalg.eigvalsh(0.5 * (N + N.mT))[:, 0]
    linear, nan = bent & moved, torch.full_like(product, torch.nan)
    found = IgnoredConstraints(
        product, product / lengths, linear, convex, nan, nan.clone(), nan.clone(), nan.clone(), worst
    )
    rows = rows_where(linear & convex)
    if len(rows):
        root = vectors[rows] @ torch.diag_embed(values[rows].rsqrt()) @ vectors[rows].mT
        _of_linear(found, rows, root, A[rows], B_free[rows], v[rows])
    return found


def _of_linear(found: IgnoredConstraints, rows: Tensor, root: Tensor, A: Tensor, B: Tensor, v: Tensor) -> None:
    """Write bound, ratio and mean of elements with linear constraints; ``root`` is H^(-1/2)."""
    unit = torch.eye(root.shape[-1], dtype=v.dtype, device=v.device)
    scaled = A @ root
    along = unit - linalg.pinv(scaled) @ scaled  # P
    u = root @ v[..., None]
    a, b = ((projector @ u)[..., 0].square().sum(-1).sqrt() for projector in (along, unit - along))
    M = root @ B @ B.mT @ root
    values = linalg.eigvalsh(M)
    low, high = values[:, 0], values[:, -1]
    found.bound[rows] = low * a.square() - 0.5 * (high - low) * a * b
    found.ratio[rows] = a / b
    found.needed[rows] = 0.5 * (high / low - 1)
    found.mean[rows] = (along * M).sum((-1, -2)) / root.shape[-1]


class _Unconstrained(NodeProblem):
    """A node's problem without its constraints."""

    def constraints(self, x: Tensor, data: Any = None) -> tuple[Tensor, Tensor]:
        return x.new_zeros(x.shape[0], 0), x.new_zeros(x.shape[0], 0)


def _response(H: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The upper blocks Z (B, n, n) and (B, m, n) of the inverse of ``[[H, Aᵀ], [A, 0]]``; absent rows answer zero."""
    size, m, n = A.shape
    corner = A.new_zeros(size, m, m)
    whole = torch.cat([torch.cat([H, A.mT], -1), torch.cat([A, corner], -1)], -2)
    inverse = linalg.pinv(whole, hermitian=True)
    return inverse[:, :n, :n], inverse[:, n:, :n]


def _mixed(problem: NodeProblem, point: NodePoint, Z: Tensor, push: Tensor | None) -> Tensor:
    """(B, n, p) row i: ``∇_w <∇_z L, change>`` of the change that a loss gradient of the unit vector i makes."""
    rows: list[Tensor] = []
    p = point.nu.shape[-1]
    for place in range(Z.shape[-1]):
        change = NodePoint(Z[:, :, place], *(torch.zeros_like(multipliers) for multipliers in point[1:]))
        if push is not None:
            change = NodePoint(change.x, push[:, :p, place], push[:, p:, place])
        gradient = problem.directional_gradient(point, change)
        rows.append(torch.cat([datum.flatten(1) for datum in gradient], -1))
    return torch.stack(rows, 1)
