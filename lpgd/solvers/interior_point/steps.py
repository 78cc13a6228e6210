"""Iterates of the batched interior-point method: how good one is, and one step of either form of the method.

The notation is that of :mod:`lpgd.solvers.interior_point.predictor_corrector`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpgd.solvers.interior_point.box_program import BoxProgram
from lpgd.solvers.interior_point.newton_system import Factor

__all__ = ["Iterate", "State", "assess", "homogeneous_step", "largest", "plain_step"]

STEP = 0.995
"""The share of the way to the boundary that a step takes at least."""
LEAST_SHORT = 1e-4
"""The least share of the way that is left by a step of the plain method, which leaves the mean complementarity."""
TRUSTED, MOST_REFINEMENTS = 1e-6, 5
"""The relative residual to which steps by a rough factor are refined, and how often at most."""
CAUTIOUS_STEP = 0.9
"""The same for an element that made no progress in its last iteration."""
CAUTIOUS_CENTERING = 0.1
"""For such an element, the least factor by which complementarity is asked to shrink."""


@dataclass(frozen=True)
class Iterate:
    """Iterates of the elements that are left; ``s`` on the inequalities, the others as in the module's docstring."""

    x: Tensor
    z: Tensor
    s: Tensor
    tau: Tensor  # (B, 1)
    kappa: Tensor  # (B, 1)

    def select(self, elements: Tensor) -> Iterate:
        """The iterates of these elements."""
        return Iterate(*(tensor[elements] for tensor in self.tensors))

    def replaced(self, where: Tensor, other: Iterate) -> Iterate:
        """The other iterate for the elements ``where`` (B, 1), this one elsewhere."""
        if bool(where.all()):
            return other
        return Iterate(*(torch.where(where, new, old) for new, old in zip(other.tensors, self.tensors, strict=True)))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.z, self.s, self.tau, self.kappa


@dataclass(frozen=True)
class State:
    """What is known about an iterate: its products, residuals and how good it is."""

    Px: Tensor | None
    r_x: Tensor
    r_z: Tensor
    r_tau: Tensor
    quality: Tensor  # (B,) the largest relative residual
    infeasible: Tensor  # (B,) the relative residual of a proof that no point satisfies the constraints
    unbounded: Tensor  # (B,) the same for the objective having no limit


def assess(program: BoxProgram, point: Iterate, norms: tuple[Tensor, ...]) -> State:
    """The residuals of an iterate; ``norms`` are the largest entries of q and of b, (B, 1) each."""
    x, z, s, tau, kappa = point.tensors
    Px, Mz, Mx = program.quadratic(x), program.transposed(z), program.product(x)
    qx, bz = _dot(program.q, x), _dot(program.b, z)
    r_x = torch.addcmul(Mz, program.q, tau)
    norm_Mz, norm_Mx = largest(Mz), largest(Mx)
    ray = Mx
    ray[:, program.equalities :] += s
    r_z = torch.addcmul(ray, program.b, tau, value=-1)
    dual_terms, ray_residual = torch.maximum(norms[0] * tau, norm_Mz), largest(ray)
    energy: Tensor | float = 0.0
    if Px is not None:
        r_x = r_x + Px
        energy = _dot(x, Px) / tau
        norm_Px = largest(Px)
        dual_terms, ray_residual = torch.maximum(dual_terms, norm_Px), torch.maximum(ray_residual, norm_Px)
    gap = qx + bz + energy
    primal, dual = largest(r_z) / (tau + torch.maximum(norms[1] * tau, norm_Mx)), largest(r_x) / (tau + dual_terms)
    gap_terms = torch.minimum((qx + 0.5 * energy).abs(), (bz + 0.5 * energy).abs())
    quality = torch.maximum(torch.maximum(primal, dual), gap.abs() / (tau + gap_terms))
    infeasible = torch.where(bz < 0, norm_Mz / -bz, torch.inf)
    unbounded = torch.where(qx < 0, ray_residual / -qx, torch.inf)
    return State(Px, r_x, r_z, gap + kappa, quality[:, 0], infeasible[:, 0], unbounded[:, 0])


def plain_step(
    program: BoxProgram, factor: Factor, h: Tensor, point: Iterate, state: State, cautious: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A predictor-corrector step with τ = 1, and (B, 1) where it is finite; primal and dual lengths differ for LPs.

    Mehrotra's method can cycle.  Where ``cautious`` (B, 1) the corrector is damped by the predictor's length, there is
    some centring in any case, and the step stays further from the boundary.
    """
    x, z, s, tau, kappa = point.tensors
    e = program.equalities
    z_cone, r = z[:, e:], -state.r_x[:, None]
    total, lengths = _dot(s, z_cone), _LENGTHS[program.P is None]
    # The nearer to a solution, the nearer to the boundary, or every step would end at the same share of the last one.
    short_of = (total / max(s.shape[1], 1)).clamp(LEAST_SHORT, 1.0 - STEP)
    share = torch.where(cautious, CAUTIOUS_STEP, 1.0 - short_of)

    t = -state.r_z
    t[:, e:] += s
    _, dz = factor.solve(r, t[:, None])
    dz_cone = dz[:, 0, e:]
    ds = -s - h * dz_cone
    primal, dual = lengths(_to_boundary(s, ds).clamp(max=1.0), _to_boundary(z_cone, dz_cone).clamp(max=1.0))
    predicted = _dot(torch.addcmul(s, primal, ds), torch.addcmul(z_cone, dual, dz_cone))
    sigma = (predicted / total) ** 3
    sigma = torch.where(cautious, sigma.clamp(min=CAUTIOUS_CENTERING), sigma)
    target = sigma * total / max(s.shape[1], 1)

    corrector = torch.where(cautious, primal * dual, 1.0) * ds * dz_cone
    product = s + (corrector - target) / z_cone
    t = -state.r_z
    t[:, e:] += product
    dx, dz = _refined(program, factor, h, r, t[:, None])
    dx, dz = dx[:, 0], dz[:, 0]
    dz_cone = dz[:, e:]
    ds = -product - h * dz_cone
    primal, dual = lengths(
        (share * _to_boundary(s, ds)).clamp(max=1.0), (share * _to_boundary(z_cone, dz_cone)).clamp(max=1.0)
    )
    moved = torch.addcmul(x, primal, dx), torch.addcmul(z, dual, dz), torch.addcmul(s, primal, ds), tau, kappa
    return moved, torch.isfinite(primal + dual)


def homogeneous_step(
    program: BoxProgram, factor: Factor, h: Tensor, point: Iterate, state: State, cautious: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A predictor-corrector step of the embedding, and (B, 1) where it is finite; see the plain one."""
    x, z, s, tau, kappa = point.tensors
    e = program.equalities
    z_cone = z[:, e:]
    slope = program.q if state.Px is None else program.q + 2.0 * state.Px / tau
    mu = (_dot(s, z_cone) + tau * kappa) / (s.shape[1] + 1)
    # The answer (x2, z2) to the right-hand side (-q, b) of τ is (x, z)/τ plus a correction, which alone is solved for.
    r, t = torch.stack([-state.r_x, torch.zeros_like(x)], 1), torch.stack([-state.r_z, torch.zeros_like(z)], 1)
    t[..., e:] += s[:, None]
    affine_x, affine_z = _refined(program, factor, h, r, t)
    shift = affine_x.sum(1) / tau
    x2, z2 = x / tau + shift, (z + affine_z.sum(1)) / tau
    denominator = kappa / tau + _dot(z2[:, e:], h * z2[:, e:])
    shifted = program.quadratic(shift)
    if shifted is not None:
        denominator = denominator + _dot(shift, shifted)

    def direction(x1: Tensor, z1: Tensor, residual: Tensor, product: Tensor) -> tuple[Tensor, ...]:
        d_tau = (residual - product / tau + _dot(slope, x1) + _dot(program.b, z1)) / denominator
        d_kappa = -(product + kappa * d_tau) / tau
        return torch.addcmul(x1, x2, d_tau), torch.addcmul(z1, z2, d_tau), d_tau, d_kappa

    def longest(ds: Tensor, dz: Tensor, d_tau: Tensor, d_kappa: Tensor) -> Tensor:
        scalars = torch.minimum(_to_boundary(tau, d_tau), _to_boundary(kappa, d_kappa))
        return torch.minimum(scalars, torch.minimum(_to_boundary(s, ds), _to_boundary(z_cone, dz[:, e:])))

    dx, dz, d_tau, d_kappa = direction(affine_x[:, 0], affine_z[:, 0], state.r_tau, tau * kappa)
    ds = -s - h * dz[:, e:]
    alpha = longest(ds, dz, d_tau, d_kappa).clamp(max=1.0)
    sigma = (1.0 - alpha) ** 3
    sigma = torch.where(cautious, sigma.clamp(min=CAUTIOUS_CENTERING), sigma)
    share, weight = torch.where(cautious, CAUTIOUS_STEP, STEP), torch.where(cautious, alpha**2, 1.0)

    keep, target = 1.0 - sigma, sigma * mu
    product = s + (weight * ds * dz[:, e:] - target) / z_cone
    t = -keep * state.r_z
    t[:, e:] += product
    x1, z1 = _refined(program, factor, h, (-keep * state.r_x)[:, None], t[:, None])
    product_tau = tau * kappa + weight * d_tau * d_kappa - target
    dx, dz, d_tau, d_kappa = direction(x1[:, 0], z1[:, 0], keep * state.r_tau, product_tau)
    ds = -product - h * dz[:, e:]
    alpha = (share * longest(ds, dz, d_tau, d_kappa)).clamp(max=1.0)
    changes = zip(point.tensors, (dx, dz, ds, d_tau, d_kappa), strict=True)
    moved = [torch.addcmul(old, alpha, change) for old, change in changes]
    scale = 1.0 / torch.maximum(moved[3], moved[4])
    return tuple(scale * tensor for tensor in moved), torch.isfinite(alpha)


def _refined(program: BoxProgram, factor: Factor, h: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A solution of the unregularised system, refined; a rough factor that does not give one is marked."""
    x, z = factor.solve(r, t)
    size = TRUSTED * torch.maximum(r.abs().amax(), t.abs().amax()) if factor.is_rough else 0.0
    for refinement in range(MOST_REFINEMENTS if factor.is_rough else 1):
        Px = program.quadratic(x)
        left = r - program.transposed(z)
        if Px is not None:
            left -= Px
        below = t - program.product(x)
        below[..., program.equalities :] += h[:, None] * z[..., program.equalities :]
        if refinement and bool(torch.maximum(left.abs().amax(), below.abs().amax()) <= size):
            return x, z
        dx, dz = factor.solve(left, below)
        x, z = x + dx, z + dz
    factor.trusted = not factor.is_rough
    return x, z


def _to_boundary(values: Tensor, changes: Tensor) -> Tensor:
    """(B, 1) the longest step that keeps values nonnegative."""
    if values.shape[1] == 0:
        return values.new_full((values.shape[0], 1), torch.inf)
    return 1.0 / (-changes / values).amax(1, keepdim=True).clamp(min=1e-10)


def _joint(primal: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    shorter = torch.minimum(primal, dual)
    return shorter, shorter


def _separate(primal: Tensor, dual: Tensor) -> tuple[Tensor, Tensor]:
    return primal, dual


_LENGTHS = {False: _joint, True: _separate}


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(1, keepdim=True)


def largest(vectors: Tensor) -> Tensor:
    """(B, 1) the maximum norm of each row; 0 for empty rows."""
    return vectors.abs().amax(1, keepdim=True) if vectors.shape[1] else vectors.new_zeros(vectors.shape[0], 1)
