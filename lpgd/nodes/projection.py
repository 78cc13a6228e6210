"""Projections onto spheres and balls of the L1, L2 and L∞ norms, and onto the simplex ([DDN] Table 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import flags, is_wrapped
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt, fixed_number
from lpgd.status import Status

__all__ = ["Projection", "ProjectionSet"]

ProjectionSet = Literal["l1_sphere", "l1_ball", "l2_sphere", "l2_ball", "linf_sphere", "linf_ball", "simplex"]


@dataclass(frozen=True)
class Projection(BaseNode):
    """The nearest point ``argmin ½|y - x|²`` of a set, for vectors x: (*batch, n) to (*batch, n).

    Args:
        onto: ``"l1_sphere"`` is ``|y|₁ = r`` and ``"l1_ball"`` is ``|y|₁ ≤ r``, and so on; ``"simplex"`` is
            ``y ≥ 0, Σy = r``.
        radius: r > 0; None makes it a second input, one number for each element, with a gradient of its own.
        masked: False differentiates the norm alone, of the L1 and L∞ sets outside of the ball: ``v - a <a, v> / k`` and
            ``<a, v> / k`` ([DDN] Table 1 without its mask, ``I - aaᵀ/aᵀa`` with ``a = D|y|``).  An approximation, that
            gives entries a gradient which the exact one holds fixed: zeros of L1, entries at the bound of L∞.

    With S the coordinates that are not zero (L1, simplex) or at the bound (L∞), a = sign(y) and k = |S|:

        =================  ==========================================  ====================
        set                v·Dy/Dx                                     v·Dy/Dr
        =================  ==========================================  ====================
        L2 sphere          (r/|x|) (v - y <y, v> / r²)                 <y, v> / r
        L1 sphere          v_S - a_S <a_S, v_S> / k                    <a_S, v_S> / k
        simplex            v_S - <1, v_S> / k                          <1, v_S> / k
        L∞ sphere          v outside of S                              <a_S, v_S>
        any ball, inside   v                                           0
        =================  ==========================================  ====================

    Sorting takes O(n log n) for L1 and the simplex (Duchi et al. 2008), all else O(n).  Where the nearest point is not
    unique: of 0 on the L2 sphere it is ``r/√n (1, …, 1)``, with a gradient of zero; on the L∞ sphere the first of the
    largest coordinates moves; on the L1 sphere zeros move up.

    [DDN] Gould, Hartley, Campbell: Deep Declarative Networks (arXiv 1909.04866).
    """

    onto: ProjectionSet = "l2_sphere"
    radius: float | None = 1.0
    masked: bool = True

    name = "Projection"
    domain = "Here radius must be positive."

    def __post_init__(self) -> None:
        if self.onto not in get_args(ProjectionSet):
            raise ValueError(f"onto is {self.onto!r}; it must be one of {', '.join(get_args(ProjectionSet))}.")
        if not self.masked and self.onto[:2] not in ("l1", "li"):
            raise ValueError(f"masked=False is for the L1 and L∞ norms; onto is {self.onto!r}.")
        if self.radius is not None:
            how = "radius=None makes it an input of the call, which gets a gradient"
            object.__setattr__(self, "radius", fixed_number("radius", self.radius, how))
        if self.radius is not None and not 0 < self.radius < math.inf:
            raise ValueError(f"radius is {self.radius}; it must be positive and finite, or None for an input.")

    @property
    def inputs(self) -> Mapping[str, int]:
        return {"x": 1} if self.radius is not None else {"x": 1, "radius": 0}

    def arrange(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Scores of minus infinity, as of an attention mask, are exact zeros of the simplex: any low score is one."""
        x = inputs[0]
        if self.onto != "simplex" or not x.numel():
            return inputs
        if not is_wrapped(x) and bool(x.detach().sum().isfinite()):
            return inputs
        masked = x == -torch.inf
        largest = x.detach().amax(-1, keepdim=True)
        radius = self.radius if self.radius is not None else inputs[1].detach()[..., None].abs()
        return torch.where(masked & largest.isfinite(), largest - 2 * radius - 1, x), *inputs[1:]

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        if shapes[0] == (0,):
            raise ValueError("x has no coordinates; it must have at least one.")
        return shapes[0]

    # -- the problem, whose solution is that of the projection, in smooth functions --------------------------------

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return 0.5 * (y - inputs[0]).square().sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        x, r = inputs[0], self._radius(inputs)
        if self.onto == "l2_sphere":
            return y.square().sum(-1, keepdim=True) - r.square()
        if self.onto == "l1_sphere":
            return (_signs(x) * y).sum(-1, keepdim=True) - r
        if self.onto == "simplex":
            return y.sum(-1, keepdim=True) - r
        if self.onto == "linf_sphere":
            largest = _largest(x)
            return (_signs(x) * y * largest).sum(-1, keepdim=True) - r
        return None

    def inequality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        x, r = inputs[0], self._radius(inputs)
        if self.onto == "l2_ball":
            return y.square().sum(-1, keepdim=True) - r.square()
        if self.onto == "simplex":
            return -y
        if self.onto == "l2_sphere":
            return None
        if self.onto in ("l1_sphere", "l1_ball"):  # the nearest point has the signs of x
            signed = _signs(x) * y
            if self.onto == "l1_sphere":
                return -signed
            outside = x.abs().sum(-1, keepdim=True) > r  # inside the ball coordinates may change their signs
            return torch.cat([signed.sum(-1, keepdim=True) - r, torch.where(outside, -signed, -1.0)], -1)
        # On the sphere the largest coordinate of x is at its bound; that row is absent here.
        free = torch.ones_like(x) if self.onto == "linf_ball" else 1 - _largest(x)
        return torch.cat([free * y - r, -free * y - r], -1)

    # -- its solution ------------------------------------------------------------------------------------------------

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        return self._answer(inputs[0], inputs)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        """The projection of ``(x - linear + ρ center) / (1 + ρ)``."""
        moved = (inputs[0] - tilt.linear + tilt.rho * tilt.center) / (1 + tilt.rho)
        return self._answer(moved, inputs)._replace(aux=None)  # which would be that of another x

    def _answer(self, x: Tensor, inputs: tuple[Tensor, ...]) -> NodeAnswer:
        r, count = self._radius(inputs), x.shape[0]
        statuses = [Status.SOLVED] * count
        if self.radius is None:
            statuses = [Status.SOLVED if fine else Status.INVALID_DATA for fine in flags(r[:, 0] > 0)]
        known = self._known(x)
        return NodeAnswer(self._project(x, r, known), statuses, [0] * count, None if known is None else (known,))

    def _known(self, x: Tensor) -> Tensor | None:
        """What both the projection and its derivative need: |x|₂, or the place of the largest coordinate, (B, 1)."""
        if self.onto in ("l2_sphere", "l2_ball"):
            return _norm(x)
        return _first_largest(x) if self.onto == "linf_sphere" else None

    def _project(self, x: Tensor, r: Tensor, known: Any) -> Tensor:
        if self.onto in ("l2_sphere", "l2_ball"):
            sphere = torch.where(known > 0, r * (x / known), r / math.sqrt(x.shape[-1]))
            return sphere if self.onto == "l2_sphere" else torch.where(known <= r, x, sphere)
        if self.onto == "simplex":
            return _shrunk(x, r)
        if self.onto in ("l1_sphere", "l1_ball"):
            sphere = _signs(x) * _shrunk(x.abs(), r)
            inside = x.abs().sum(-1, keepdim=True) <= r
            return torch.where(inside, x, sphere) if self.onto == "l1_ball" else sphere
        clipped = torch.minimum(torch.maximum(x, -r), r)
        if self.onto == "linf_ball":
            return clipped
        top = x.gather(-1, known)  # moves to the bound if that is not where it is
        return clipped.scatter(-1, known, torch.where(top < 0, -r, r))

    # -- its derivative ------------------------------------------------------------------------------------------------

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        x, r, v = inputs[0], self._radius(inputs), cotangent
        known: Any = self._known(x) if aux is None else aux[0]
        if not self.masked:
            return self._vjp_of_norm(x, r, y, v)
        if self.onto in ("linf_sphere", "linf_ball"):
            bound = x.abs() >= r
            if self.onto == "linf_sphere":
                bound = bound.scatter(-1, known, True)
            dx = torch.where(bound, 0, v)
            return (dx,) if self.radius is not None else (dx, (y.sign() * (v - dx)).sum(-1))
        if self.onto in ("l2_sphere", "l2_ball"):
            unit = y / r  # squares of r might overflow
            dr = (unit * v).sum(-1, keepdim=True)
            scale = torch.where(known > 0, r / torch.where(known > 0, known, 1), 0)
            dx = scale * torch.addcmul(v, unit, dr, value=-1)
            inside = known <= r if self.onto == "l2_ball" else None
        else:
            a = y.sign()
            along = a * v
            dr = along.sum(-1, keepdim=True) / a.abs().sum(-1, keepdim=True).clamp(min=1)
            dx = a * (along - dr)
            inside = x.abs().sum(-1, keepdim=True) <= r if self.onto == "l1_ball" else None
        if inside is not None and inside.any():
            dx, dr = torch.where(inside, v, dx), torch.where(inside, 0, dr)
        return (dx,) if self.radius is not None else (dx, dr[:, 0])

    def _vjp_of_norm(self, x: Tensor, r: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor | None, ...]:
        """The derivative under ``|y| = r`` alone, the identity inside of a ball."""
        one = self.onto.startswith("l1")
        a = y.sign() if one else torch.where(y.abs() >= r, y.sign(), 0)
        dr = (a * v).sum(-1, keepdim=True) / a.abs().sum(-1, keepdim=True).clamp(min=1)
        dx = v - a * dr
        if self.onto.endswith("ball"):
            size = x.abs().sum(-1, keepdim=True) if one else x.abs().amax(-1, keepdim=True)
            dx, dr = torch.where(size <= r, v, dx), torch.where(size <= r, 0, dr)
        return (dx,) if self.radius is not None else (dx, dr[:, 0])

    def _radius(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """(B, 1), or (1, 1) where it is an option."""
        return inputs[1][:, None] if self.radius is None else inputs[0].new_full((1, 1), self.radius)


def _shrunk(x: Tensor, r: Tensor) -> Tensor:
    """``max(x - θ, 0)`` with the θ at which its sum is r, by sorting."""
    ordered = x.sort(-1, descending=True).values
    # Relative to the largest: sums of what is near zero keep their digits, and only such coordinates can be positive.
    top = ordered[:, :1]
    sums = (ordered - top).cumsum(-1) - r
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    support = (counts * (ordered - top) > sums).sum(-1, keepdim=True).clamp(min=1)
    return torch.relu((x - top) - sums.gather(-1, support - 1) / support)


def _signs(x: Tensor) -> Tensor:
    """Signs, +1 for zero."""
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def _first_largest(x: Tensor) -> Tensor:
    """(B, 1) the place of the first coordinate of largest magnitude."""
    return x.abs().argmax(-1, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    """(B, n) one for the first coordinate of largest magnitude, else zero."""
    return torch.zeros_like(x).scatter(-1, _first_largest(x), 1.0)


def _norm(x: Tensor) -> Tensor:
    """(B, 1), without overflow or underflow of squares."""
    # The product does not depend on the unit, which needs no derivative.
    unit = x.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return unit * linalg.vector_norm(x / unit, dim=-1, keepdim=True)
