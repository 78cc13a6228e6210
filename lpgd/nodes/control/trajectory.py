"""A batch of optimal control problems with data, and the systems of their optimality conditions.

Trajectories are ``z``, (B, T, m + n), row t being ``(u_t, x_(t+1))``.  The problem of one element:

    minimise  Σ_t ℓ(x_t, u_t) + ℓ_T(x_T) + <linear, z> + (ρ/2)|z - center|²
    subject to  f(x_t, u_t) - x_(t+1) = 0 (multipliers ν),  lower ≤ z ≤ upper (multipliers below, above ≥ 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lpgd import linalg
from lpgd.nodes.control.functions import Functions
from lpgd.nodes.control.riccati import Factor, factorise, solve

__all__ = [
    "ControlProblem",
    "Curvature",
    "Expansion",
    "Held",
    "add_diagonal",
    "multipliers",
    "newton_step",
    "respond",
    "stacked",
]


class Expansion(NamedTuple):
    """First-order behaviour around a trajectory.

    Attributes:
        gradient: of the objective in z, (B, T, m + n).
        step: F, of the dynamics in w, (B, T, n, m + n).
        defect: ``f(x_t, u_t) - x_(t+1)``, (B, T, n).
    """

    gradient: Tensor
    step: Tensor
    defect: Tensor

    def pulled(self, nu: Tensor) -> Tensor:
        """``Jᵀν`` in z."""
        return _to_z(linalg.matvec(self.step.mT, nu), torch.zeros_like(nu[:, 0])) - pad(
            nu, (self.gradient.shape[-1] - nu.shape[-1], 0)
        )

    def moved(self, dz: Tensor) -> Tensor:
        """``J dz``, (B, T, n)."""
        n = self.defect.shape[-1]
        m = dz.shape[-1] - n
        before = pad(dz[:, :-1, m:], (0, 0, 1, 0))
        return linalg.matvec(self.step, torch.cat([dz[..., :m], before], -1)) - dz[..., m:]


class Curvature(NamedTuple):
    """Second derivatives: of stages in w (B, T, m + n, m + n), and of the end (B, n, n)."""

    stages: Tensor
    last: Tensor

    def times(self, dz: Tensor) -> Tensor:
        """Products with changes of trajectories, in z."""
        n = self.last.shape[-1]
        m = dz.shape[-1] - n
        before = pad(dz[:, :-1, m:], (0, 0, 1, 0))
        inner = linalg.matvec(self.stages, torch.cat([dz[..., :m], before], -1))
        return _to_z(inner, linalg.matvec(self.last, dz[:, -1, m:]))


class Held(NamedTuple):
    """Entries of trajectories that are held: at bounds, while these are active.

    Attributes:
        mask: (B, T, m + n).
        controls, states: whether there is any among them.
    """

    mask: Tensor
    controls: bool
    states: bool

    @classmethod
    def of(cls, mask: Tensor, m: int) -> Held:
        return cls(mask, bool(mask[..., :m].any()), bool(mask[..., m:].any()))


def _to_z(stages: Tensor, last: Tensor) -> Tensor:
    """A covector in w and of the end as one in z: the states of stage t belong to row t - 1."""
    m = stages.shape[-1] - last.shape[-1]
    return torch.cat([stages[..., :m], torch.cat([stages[:, 1:, m:], last[:, None]], 1)], -1)


def _to_w(z: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Its transpose: (B, T, m + n) in w, zero for the first states, and of the end (B, n)."""
    m = z.shape[-1] - n
    return torch.cat([z[..., :m], pad(z[:, :-1, m:], (0, 0, 1, 0))], -1), z[:, -1, m:]


def add_diagonal(curve: Curvature, diagonal: Tensor) -> Curvature:
    """With a diagonal (B, T, m + n) in z added."""
    stages, last = _to_w(diagonal, curve.last.shape[-1])
    return Curvature(curve.stages + stages.diag_embed(), curve.last + last.diag_embed())


@dataclass(frozen=True, eq=False)
class ControlProblem:
    """A batch of B problems.

    Args:
        functions: dynamics and costs.
        start: x_0, (B, n).
        parameters: (B, …) each.
        lower, upper: bounds of z (B, T, m + n), infinite where there are none.
        linear, center: (B, T, m + n), or None.
        rho: ρ ≥ 0.
        unit: (B,), what the objective is divided by.
    """

    functions: Functions
    start: Tensor
    parameters: tuple[Tensor, ...]
    lower: Tensor
    upper: Tensor
    linear: Tensor | None = None
    center: Tensor | None = None
    rho: float = 0.0
    unit: Tensor | None = None

    def stages(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``w`` (B, T, m + n) and x_T."""
        m = z.shape[-1] - self.start.shape[-1]
        before = torch.cat([self.start[:, None], z[:, :-1, m:]], 1)
        return torch.cat([z[..., :m], before], -1), z[:, -1, m:]

    def value(self, z: Tensor) -> Tensor:
        """(B,)."""
        value = self.functions.costs(*self.stages(z), self.parameters)
        if self.linear is not None:
            value = value + (self.linear * z).sum((-1, -2))
        if self.center is not None:
            value = value + 0.5 * self.rho * (z - self.center).square().sum((-1, -2))
        return value if self.unit is None else value / self.unit

    def defect(self, z: Tensor) -> Tensor:
        """(B, T, n)."""
        return (
            self.functions.following(self.stages(z)[0], self.parameters) - z[..., z.shape[-1] - self.start.shape[-1] :]
        )

    def expand(self, z: Tensor) -> Expansion:
        slopes = self.functions.slopes(*self.stages(z), self.parameters)
        gradient = _to_z(slopes.stage, slopes.last)
        if self.linear is not None:
            gradient = gradient + self.linear
        if self.center is not None:
            gradient = gradient + self.rho * (z - self.center)
        gradient = gradient if self.unit is None else gradient / self.unit[:, None, None]
        return Expansion(gradient, slopes.step, self.defect(z))

    def curvature(self, z: Tensor, nu: Tensor | None) -> Curvature:
        """Of the Lagrangian, or of the objective where ν is None."""
        unit = None if self.unit is None else self.unit[:, None, None]
        scaled_nu = nu if nu is None or unit is None else nu * unit
        stages, last = self.functions.hessians(*self.stages(z), scaled_nu, self.parameters)
        if unit is not None:
            stages, last = stages / unit[..., None], last / unit
        curve = Curvature(stages, last)
        if self.center is None or not self.rho:
            return curve
        rho = torch.full_like(z, self.rho)
        return add_diagonal(curve, rho if unit is None else rho / unit)

    def select(self, elements: Tensor) -> ControlProblem:
        """The problems of these elements."""
        names = ("start", "lower", "upper", "linear", "center", "unit")
        terms = {name: getattr(self, name) for name in names}
        changes = {name: term if term is None else term[elements] for name, term in terms.items()}
        return replace(self, parameters=tuple(parameter[elements] for parameter in self.parameters), **changes)


def newton_step(
    curve: Curvature, expansion: Expansion, gradient: Tensor, defect: Tensor
) -> tuple[Tensor, Tensor, Factor]:
    """Dz and the multipliers ν after it, of the quadratic model with this gradient and defect, and the factor."""
    factor = _factor(curve, expansion.step, None)
    return *_solve(factor, gradient, defect), factor


def _factor(curve: Curvature, step: Tensor, free: Tensor | None) -> Factor:
    free_stages = None if free is None else free.transpose(0, 1)
    return factorise(curve.stages.transpose(0, 1), curve.last, step.transpose(0, 1), free_stages)


def _solve(factor: Factor, gradient: Tensor, defect: Tensor) -> tuple[Tensor, Tensor]:
    right, last = _to_w(gradient, defect.shape[-1])
    control, state, nu = solve(factor, right.transpose(0, 1), last, defect.transpose(0, 1))
    return torch.cat([control, state], -1).transpose(0, 1), nu.transpose(0, 1)


SWEEPS = 12
"""Refinements of a system with states at bounds, at most."""


def respond(
    curve: Curvature,
    expansion: Expansion,
    gradient: Tensor,
    defect: Tensor,
    held: Held,
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The system of the optimality conditions with held entries.

        H dz + Jᵀ dν + φ = -gradient,   J dz = -defect,   dz = target and φ free where held, φ = 0 elsewhere.

    Controls are held exactly.  States are held by the penalty ``|dz - target|²/2δ``, whose multipliers φ are corrected,
    in the same factorisation, until nothing is left (the proximal method of multipliers): its P would be infinite.

    Returns:
        dz (B, T, m + n), dν (B, T, n), φ (B, T, m + n), and (B,) whether the system was regular, its Hessian positive
        definite along what may move, and its answer exact.
    """
    n, eps = defect.shape[-1], torch.finfo(gradient.dtype).eps
    m = gradient.shape[-1] - n
    on_state = held.mask.clone()
    on_state[..., :m] = False
    on_control = held.mask ^ on_state
    size = curve.stages.detach().abs().amax((-1, -2, -3))
    size = torch.maximum(size, curve.last.detach().abs().amax((-1, -2)))
    stiff = (torch.where(size > 0, size, 1) * eps**-0.5)[:, None, None]
    stiffened = add_diagonal(curve, stiff * on_state) if held.states else curve
    factor = _factor(stiffened, expansion.step, 1.0 - on_control[..., :m].to(gradient) if held.controls else None)
    dz, nu, force = torch.zeros_like(gradient), torch.zeros_like(defect), torch.zeros_like(gradient)
    scale = torch.stack([tensor.detach().abs().amax((-1, -2)) for tensor in (gradient, defect, target)]).amax(0)
    best = torch.full_like(scale, torch.inf)
    for sweep in range(SWEEPS if held.states else 3):
        left, gap, miss = gradient, defect, -target * held.mask
        if sweep:
            left = gradient + curve.times(dz) + expansion.pulled(nu) + force
            gap, miss = defect + expansion.moved(dz), (dz - target) * held.mask
            worst = torch.stack([tensor.detach().abs().amax((-1, -2)) for tensor in (left, gap, miss)]).amax(0)
            settled = ~(worst < 0.5 * best) & (
                worst <= 1e3 * eps * torch.maximum(scale, nu.detach().abs().amax((-1, -2)))
            )
            best = torch.minimum(best, torch.where(torch.isnan(worst), torch.inf, worst))
            if bool((settled | (worst == 0) | ~factor.definite).all()):
                break
        # Held controls go where they must at once; what they move is seen by the others.
        jump = -miss * on_control
        right, drift = left, gap
        if held.controls:
            right, drift = right + curve.times(jump), drift + expansion.moved(jump)
        if held.states:
            right = right + stiff * miss * on_state
        change, turn = _solve(factor, torch.where(on_control, 0, right), drift)
        change = change + jump
        dz, nu = dz + change, nu + turn
        if held.states:
            force = force + stiff * (change + miss) * on_state
        if held.controls:
            residual = left + curve.times(change) + expansion.pulled(turn)
            force = force - residual * on_control
    size = torch.maximum(scale, nu.detach().abs().amax((-1, -2)))
    return dz, nu, force, factor.definite & (best <= eps**0.6 * size)


def multipliers(
    problem: ControlProblem, expansion: Expansion, z: Tensor, held: Held, gauge: float = 1.0
) -> tuple[Tensor, Tensor]:
    """ν and φ that fit a stationary trajectory best: of the step that a Hessian ``gauge · I`` would make."""
    n = expansion.defect.shape[-1]
    curve = add_diagonal(
        Curvature(z.new_zeros(*z.shape, z.shape[-1]), z.new_zeros(z.shape[0], n, n)), torch.full_like(z, gauge)
    )
    zero = torch.zeros_like(z)
    _, nu, force, _ = respond(curve, expansion, expansion.gradient, torch.zeros_like(expansion.defect), held, zero)
    return nu, force


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(B,) the largest magnitude of an entry in any of these (B, ·, ·)."""
    return torch.stack([tensor.abs().amax((-1, -2)) for tensor in tensors]).amax(0)
