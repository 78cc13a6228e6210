"""The descent methods of LESS as published: PGD, RM, BLS, TWD and DW.

[PMaF] Xu, Wang, Liu, Gould: PMaF, Deep Declarative Layers for Principal Matrix Features (2023), section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lpgd.execution.deadline import is_over
from lpgd.nodes.sphere.secular import SphereSolution, half_quadratic, normalised, product

__all__ = ["LessDescent", "Search", "descend_as_published"]

Search = Literal["none", "backtracking", "tangent"]

SHRINKAGES = 400
"""Of one step of TWD at most: the factor is then below any rounding error of float64."""


@dataclass(frozen=True)
class LessDescent:
    """The options of one of the descent methods of LESS ([PMaF] 2.1), as published.

    An iteration goes from u with ``|u| = 1`` along d, and back to the sphere:

        u ← (u + η w d) / |u + η w d|

    ==========  ==============================  ====================================================================
    PGD         ``tangent=False``               ``d = -∇f(u)``
    RM          ``tangent=True``                ``d = -(I - uuᵀ)∇f(u)``, eqs. 4 and 5
    step        ``step=1.0`` or ``None``        η = 1, or of eq. 6, ``|d|²/|Ad|²``: the minimiser of f along d
    BLS         ``search="backtracking"``       eq. 7: η ← βη until ``f(u + ηwd) <= f(u) + α η w ∇fᵀd``
    TWD         ``search="tangent"``            eqs. 8, 9: η ← βη while the tangent direction where the step ends on the
                                                sphere has a negative cosine with d
    DW          ``weighted=True``               eqs. 2, 3: ``w = 1 - cos(∓∇f, u₀)`` with the least-squares solution
                                                ``u₀ = A⁺b``: of -∇f if ``|u₀| >= 1``, else of ∇f; otherwise w = 1
    ==========  ==============================  ====================================================================

    It starts from u₀ scaled to length 1 and ends when f changes by less than ``tolerance``, which says little of how
    near the end is to a minimum; an element that has not ended after ``max_iterations`` is ITERATION_LIMIT.

    Args:
        tangent: RM instead of PGD.
        step: η where a search begins; None is eq. 6.
        search: ``"none"``, ``"backtracking"`` (BLS) or ``"tangent"`` (TWD, which takes RM).
        weighted: DW.
        alpha: α of BLS.
        beta: the factor of a search; None is the paper's, 0.8 of BLS and 0.9 of TWD.
        max_iterations: limit.
        tolerance: of the change of f.
        refine: go on from the end by Newton's method to a stationary point, which no longer is the paper's answer, but
            one whose gradient is exact.
    """

    tangent: bool = True
    step: float | None = None
    search: Search = "tangent"
    weighted: bool = False
    alpha: float = 0.5
    beta: float | None = None
    max_iterations: int = 100
    tolerance: float = 1e-7
    refine: bool = False

    def __post_init__(self) -> None:
        if self.search not in get_args(Search):
            raise ValueError(f"search is {self.search!r}; it must be one of {', '.join(get_args(Search))}.")
        if self.search == "tangent" and not self.tangent:
            raise ValueError("search is 'tangent', which compares tangent directions: it takes tangent=True.")
        for option in ("max_iterations", "tolerance") + ("step",) * (self.step is not None):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option} is {getattr(self, option)}; it must be positive.")
        for option, value in (("alpha", self.alpha), ("beta", self.factor)):
            if not 0 < value < 1:
                raise ValueError(f"{option} is {value}; it must be between 0 and 1.")

    @property
    def factor(self) -> float:
        """β."""
        if self.beta is not None:
            return self.beta
        return 0.9 if self.search == "tangent" else 0.8


def descend_as_published(
    gram: Tensor, vector: Tensor, start: Tensor, free: Tensor, options: LessDescent
) -> SphereSolution:
    """Descend on ``f(u) = ½uᵀGu - cᵀu`` subject to |u| = 1, each element until it has ended.

    Args:
        gram: G = AᵀA, (B, n, n), or (1, n, n) where all elements share it.
        vector: c = Aᵀb, (B, n).
        start: (B, n), of length 1.
        free: u₀ = A⁺b, (B, n).
        options: which method.
    """
    u, pushed = start, product(gram, start)
    value = half_quadratic(u, pushed, vector)
    iterations = torch.zeros(len(vector), dtype=torch.int64, device=gram.device)
    active = torch.ones_like(iterations, dtype=torch.bool)
    side = torch.where(free.norm(dim=-1, keepdim=True) >= 1.0, normalised(free), -normalised(free))
    for _ in range(options.max_iterations):
        d = vector - pushed
        weight = torch.ones_like(value)
        if options.weighted:
            weight = 1.0 - (normalised(d) * side).sum(-1)
        if options.tangent:
            d = _tangential(d, u)
        along = product(gram, d)
        # f(u + sd) = f(u) - s|d|² + ½s²|Ad|², by which eq. 6 and eq. 7 need no values of f.
        square, curvature = d.square().sum(-1), (d * along).sum(-1)
        curved = torch.where(curvature > 0.0, curvature, 1.0)
        length = square / curved if options.step is None else torch.full_like(value, options.step)
        length = weight * length
        if options.search == "backtracking":
            length = length * _halvings(length * curvature, 2.0 * (1.0 - options.alpha) * square, options.factor)
        elif options.search == "tangent":
            length = _shrunk(u, pushed, vector, d, along, length, active, options.factor)
        moved = normalised(u + length[:, None] * d)
        u = torch.where(active[:, None], moved, u)
        pushed = product(gram, u)
        before, value = value, half_quadratic(u, pushed, vector)
        iterations += active
        active = active & ((value - before).abs() >= options.tolerance)
        if not active.any() or is_over():
            break
    return SphereSolution(u, iterations, ~active & u.isfinite().all(-1))


def _tangential(direction: Tensor, u: Tensor) -> Tensor:
    return direction - (direction * u).sum(-1, keepdim=True) * u


def _halvings(first: Tensor, second: Tensor, beta: float) -> Tensor:
    """(B,) the power of β for BLS: ``½s|Ad|² <= (1 - α)|d|²`` is first true of ``s = β^k η`` at this k."""
    ratio = torch.where((first > 0.0) & (second > 0.0), first / torch.where(second > 0.0, second, 1.0), 1.0)
    count = (ratio.log() / -math.log(beta) - 1e-9).ceil().clamp(min=0.0)  # a step of eq. 6 is just accepted with α = ½
    return beta**count


def _shrunk(
    u: Tensor, pushed: Tensor, vector: Tensor, d: Tensor, along: Tensor, length: Tensor, active: Tensor, beta: float
) -> Tensor:
    """(B,) the step lengths of TWD.  With Gd at hand a trial costs no product with G."""
    searching = active.nonzero()[:, 0]
    length = length.clone()
    rounding = 32 * torch.finfo(u.dtype).eps
    state = (u, pushed, vector, d, along, length)
    for _ in range(SHRINKAGES):
        point, image, c, back, curved, step = (tensor[searching] for tensor in state)
        moved = point + step[:, None] * back
        size = moved.norm(dim=-1, keepdim=True)
        moved, image = moved / size, (image + step[:, None] * curved) / size
        cosine = (_tangential(c - image, moved) * back).sum(-1)
        reverses = cosine < -rounding * (c.norm(dim=-1) + image.norm(dim=-1)) * back.norm(dim=-1)
        searching = searching[reverses]
        if not len(searching):
            break
        length[searching] *= beta
    return length
