"""Mehrotra's predictor-corrector method for a batch of programs at once, and the same on a homogeneous embedding.

For the programs of :mod:`lpgd.solvers.box_program` the embedding asks for x, z, s, τ, κ with ``s, z, τ, κ ≥ 0`` on the
inequalities, ``sᵀz = 0``, ``τκ = 0`` and

    r_x = P x + Mᵀz + q τ = 0,     r_z = M x + s - b τ = 0,     r_τ = κ + qᵀx + bᵀz + xᵀP x / τ = 0

A solution with τ > 0 gives ``x/τ, z/τ, s/τ``; one with κ > 0 proves that there is none: ``bᵀz < 0, Mᵀz = 0`` that no
point satisfies the constraints, ``qᵀx < 0, P x = 0, M x + s = 0`` that the objective has no limit.  With τ = 1 and
κ = 0 held fixed this is the infeasible primal-dual method, whose iterations are fewer and cheaper: every element starts
with that one, and those that it does not solve go through the embedding.  The iterates follow the central path, so that
they tend to the analytic centre of an optimal face.

Mehrotra, On the implementation of a primal-dual interior point method (1992); Goulart and Chen, Clarabel: An
interior-point solver for conic programs with quadratic objectives (2024), sections 2 and 3.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lpgd.solvers.box_program import BoxProgram
from lpgd.solvers.newton_system import Factor, newton_system
from lpgd.status import Status

__all__ = ["Answers", "Limits", "solve_programs"]

STEP = 0.995
"""The share of the way to the boundary that a step takes."""
CAUTIOUS_STEP = 0.9
"""The same for an element that made no progress in its last iteration."""
CAUTIOUS_CENTERING = 0.1
"""For such an element, the least factor by which complementarity is asked to shrink."""
INTERIOR = 0.03
"""The least slack and multiplier at the start, in the units of the scaled program."""
PLAIN_ITERATIONS = 50
"""The most iterations before the embedding takes over."""
PATIENCE = 8
"""Iterations without progress after which an element is given up."""
PROGRESS = 0.9
"""The factor by which residuals must fall to count as progress."""
DESCENT = 1e-6
"""The relative descent along a ray of the largest entry 1 that proves a problem unbounded."""
COMPACTED = 0.15
"""The share of finished elements at which they leave the batch."""


@dataclass(frozen=True)
class Limits:
    """When to stop.

    Attributes:
        tolerance: relative residuals and gap of a solution.
        certificate: the relative residual of a proof that there is none.
        acceptable: the tolerance at which a stalled element still counts as solved, inaccurately.
        iterations: how many.
        deadline: of ``time.perf_counter``; None is no limit.
        regularization: of the factorisations, relative to their diagonals.
    """

    tolerance: float
    certificate: float
    acceptable: float
    iterations: int
    deadline: float | None
    regularization: float


@dataclass(frozen=True)
class Answers:
    """Points ``x, z, s`` of all B elements, with z and s on every row of the program, and how they came about."""

    x: Tensor
    z: Tensor
    s: Tensor
    status: Tensor  # (B,) values of Status
    iterations: Tensor  # (B,)


@dataclass(frozen=True)
class _Iterate:
    """Iterates of the elements that are left; ``s`` on the inequalities, the others as in the module's docstring."""

    x: Tensor
    z: Tensor
    s: Tensor
    tau: Tensor  # (B, 1)
    kappa: Tensor  # (B, 1)

    def select(self, rows: Tensor) -> _Iterate:
        return _Iterate(*(part[rows] for part in self.parts))

    def replaced(self, where: Tensor, other: _Iterate) -> _Iterate:
        """The other iterate for the elements ``where`` (B, 1), this one elsewhere."""
        if bool(where.all()):
            return other
        return _Iterate(*(torch.where(where, new, old) for new, old in zip(other.parts, self.parts, strict=True)))

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return self.x, self.z, self.s, self.tau, self.kappa


@dataclass(frozen=True)
class _State:
    """What is known about an iterate: its products, residuals and how good it is."""

    Px: Tensor | None
    r_x: Tensor
    r_z: Tensor
    r_tau: Tensor
    quality: Tensor  # (B,) the largest relative residual
    infeasible: Tensor  # (B,) the relative residual of a proof that no point satisfies the constraints
    unbounded: Tensor  # (B,) the same for the objective having no limit


def solve_programs(program: BoxProgram, limits: Limits, verbose: bool = False) -> Answers:
    """Solve every program of a batch."""
    plain = replace(limits, iterations=min(limits.iterations, PLAIN_ITERATIONS))
    answers = _Run(program, plain, homogeneous=False, verbose=verbose).answers
    unsolved = (answers.status == Status.NUMERICAL_ERROR) | (answers.status == Status.INACCURATE)
    unsolved |= (answers.status == Status.ITERATION_LIMIT) & (plain.iterations < limits.iterations)
    spent = int(answers.iterations.max()) if program.size else 0
    if spent < limits.iterations and bool(unsolved.any()):
        rows = unsolved.nonzero()[:, 0]
        rest = replace(limits, iterations=limits.iterations - spent)
        second = _Run(program.select(rows), rest, homogeneous=True, verbose=verbose).answers
        kept = (answers.status[rows] == Status.INACCURATE) & (second.status > Status.UNBOUNDED)
        for field in fields(Answers):
            whole, part = getattr(answers, field.name), getattr(second, field.name)
            if field.name == "iterations":
                part = part + answers.iterations[rows]
            whole[rows[~kept]] = part[~kept]
    open_ends = (answers.status == Status.NUMERICAL_ERROR) | (answers.status == Status.ITERATION_LIMIT)
    if program.size and spent < limits.iterations and bool(open_ends.any()):
        rows = open_ends.nonzero()[:, 0]
        part = program.select(rows)
        rays = _Run(part.rays(), plain, homogeneous=False, verbose=verbose).answers
        falls = (rays.status == Status.SOLVED) & ((part.q * rays.x).sum(1) < -DESCENT * _norm(part.q)[:, 0])
        answers.status[rows[falls]] = int(Status.UNBOUNDED)
    return answers


class _Run:
    """One method's run over a batch; finished elements leave it."""

    def __init__(self, program: BoxProgram, limits: Limits, *, homogeneous: bool, verbose: bool) -> None:
        size, rows, q = program.size, program.row_count, program.q
        self.limits, self.homogeneous, self.verbose = limits, homogeneous, verbose
        self.answers = Answers(
            *(q.new_full((size, length), torch.nan) for length in (program.n, rows, rows)),
            status=torch.full((size,), int(Status.NUMERICAL_ERROR), device=q.device),
            iterations=torch.zeros(size, dtype=torch.int64, device=q.device),
        )
        self.program, self.system = program, newton_system(program)
        self.elements = torch.arange(size, device=q.device)
        self.left = torch.ones(size, dtype=torch.bool, device=q.device)
        self.regularization = q.new_full((1, 1), limits.regularization)
        self.norms: tuple[Tensor, ...] = (_norm(program.q), _norm(program.b))
        self.point = self.best = self._start()
        self.regularization = self.regularization.repeat(size, 1)
        self.best_quality = q.new_full((size,), torch.inf)
        self.progress = q.new_full((size,), torch.inf)
        self.idle = torch.zeros(size, dtype=torch.int64, device=q.device)
        for iteration in range(limits.iterations + 1):
            state = _assess(self.program, self.point, self.norms)
            status = self._judge(state, iteration)
            finished = self.left & (status >= 0)
            if bool(finished.any()):
                self._record(finished.nonzero()[:, 0], status, iteration)
                self.left &= ~finished
                remaining = int(self.left.sum())
                if not remaining:
                    break
                if remaining <= (1.0 - COMPACTED) * self.left.shape[0]:
                    self._compact()
                    state = _assess(self.program, self.point, self.norms)
            step = _homogeneous_step if homogeneous else _plain_step
            h = self.point.s / self.point.z[:, program.equalities :]
            factor = self.system.factor(h, self.regularization)
            moved, sound = step(self.program, factor, h, self.point, state, self.idle[:, None] > 0)
            sound = sound & ~factor.failed[:, None]
            self.point = self.point.replaced(sound, _Iterate(*moved))
            self.regularization = torch.where(factor.failed[:, None], 100.0, 1.0) * self.regularization

    def _start(self) -> _Iterate:
        """The solution with H = I, its slacks and multipliers moved into the cone (Clarabel, section 3.2)."""
        program, e = self.program, self.program.equalities
        shared = program.shares_matrices and program.bounded is None and program.free is None
        h = program.q.new_ones(1 if shared else program.size, program.row_count - e)
        factor = self.system.factor(h, self.regularization.sqrt())
        if program.P is None:
            r = torch.stack([torch.zeros_like(program.q), -program.q], 1)
            x, z = factor.solve(r, torch.stack([program.b, torch.zeros_like(program.b)], 1))
            x, s, z = x[:, 0], -z[:, 0, e:], z[:, 1]
        else:
            x, z = factor.solve(-program.q[:, None], program.b[:, None])
            x, s, z = x[:, 0], -z[:, 0, e:], z[:, 0]
        one = program.q.new_ones(program.size, 1)
        return _Iterate(x, torch.cat([z[:, :e], _inside(z[:, e:])], 1), _inside(s), one, one * self.homogeneous)

    def _judge(self, state: _State, iteration: int) -> Tensor:
        """(B,) the status of each element that is at an end, -1 for others."""
        limits = self.limits
        self.best = self.best.replaced((state.quality < self.best_quality)[:, None], self.point)
        self.best_quality = torch.fmin(state.quality, self.best_quality)
        reached = torch.fmin(state.quality, torch.fmin(state.infeasible, state.unbounded))
        advanced = reached < PROGRESS * self.progress
        self.idle = torch.where(advanced, 0, self.idle + 1)
        self.progress = torch.where(advanced, reached, self.progress)
        given_up = torch.where(
            self.best_quality <= limits.acceptable, int(Status.INACCURATE), int(Status.NUMERICAL_ERROR)
        )
        if self.verbose:
            worst = float(state.quality.nan_to_num(nan=torch.inf)[self.left].max())
            method = "embedding" if self.homogeneous else "plain"
            print(f"{method} {iteration:3d}   {int(self.left.sum()):5d} left   worst residual {worst:.1e}")
        status = torch.where(self.idle >= PATIENCE, given_up, -1)
        if iteration == limits.iterations:
            status = torch.where(status < 0, int(Status.ITERATION_LIMIT), status)
        elif limits.deadline is not None and time.perf_counter() > limits.deadline:
            status = torch.where(status < 0, int(Status.TIME_LIMIT), status)
        status = torch.where(state.unbounded <= limits.certificate, int(Status.UNBOUNDED), status)
        status = torch.where(state.infeasible <= limits.certificate, int(Status.INFEASIBLE), status)
        return torch.where(self.best_quality <= limits.tolerance, int(Status.SOLVED), status)

    def _record(self, rows: Tensor, status: Tensor, iteration: int) -> None:
        answers, elements, point = self.answers, self.elements[rows], self.best.select(rows)
        tau = torch.where(point.tau > 0, point.tau, 1.0)
        answers.x[elements] = point.x / tau
        answers.z[elements] = point.z / tau
        answers.s[elements] = torch.nn.functional.pad(point.s / tau, (self.program.equalities, 0))
        answers.status[elements] = status[rows]
        answers.iterations[elements] = iteration

    def _compact(self) -> None:
        kept = self.left.nonzero()[:, 0]
        self.program = self.program.select(kept)
        self.system = self.system.select(self.program)
        self.point, self.best = self.point.select(kept), self.best.select(kept)
        self.norms = tuple(norm[kept] for norm in self.norms)
        for name in ("elements", "left", "regularization", "best_quality", "progress", "idle"):
            setattr(self, name, getattr(self, name)[kept])


def _inside(values: Tensor) -> Tensor:
    if values.shape[1] == 0:
        return values
    least = values.amin(1, keepdim=True)
    target = (0.1 * values.clamp(min=0).mean(1, keepdim=True)).clamp(min=INTERIOR)
    return values + (target - least).clamp(min=0)


def _assess(program: BoxProgram, point: _Iterate, norms: tuple[Tensor, ...]) -> _State:
    x, z, s, tau, kappa = point.parts
    Px, Mz, Mx = program.quadratic(x), program.transposed(z), program.rows(x)
    qx, bz = _dot(program.q, x), _dot(program.b, z)
    r_x = torch.addcmul(Mz, program.q, tau)
    norm_Mz, norm_Mx = _norm(Mz), _norm(Mx)
    ray = Mx
    ray[:, program.equalities :] += s
    r_z = torch.addcmul(ray, program.b, tau, value=-1)
    dual_terms, ray_residual = torch.maximum(norms[0] * tau, norm_Mz), _norm(ray)
    energy: Tensor | float = 0.0
    if Px is not None:
        r_x = r_x + Px
        energy = _dot(x, Px) / tau
        norm_Px = _norm(Px)
        dual_terms, ray_residual = torch.maximum(dual_terms, norm_Px), torch.maximum(ray_residual, norm_Px)
    gap = qx + bz + energy
    primal, dual = _norm(r_z) / (tau + torch.maximum(norms[1] * tau, norm_Mx)), _norm(r_x) / (tau + dual_terms)
    gap_terms = torch.minimum((qx + 0.5 * energy).abs(), (bz + 0.5 * energy).abs())
    quality = torch.maximum(torch.maximum(primal, dual), gap.abs() / (tau + gap_terms))
    infeasible = torch.where(bz < 0, norm_Mz / -bz, torch.inf)
    unbounded = torch.where(qx < 0, ray_residual / -qx, torch.inf)
    return _State(Px, r_x, r_z, gap + kappa, quality[:, 0], infeasible[:, 0], unbounded[:, 0])


def _plain_step(
    program: BoxProgram, factor: Factor, h: Tensor, point: _Iterate, state: _State, cautious: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A predictor-corrector step with τ = 1, and (B, 1) where it is finite; primal and dual lengths differ for LPs.

    Mehrotra's method can cycle.  Where ``cautious`` (B, 1) the corrector is damped by the predictor's length, there is some
    centring in any case, and the step stays further from the boundary.
    """
    x, z, s, tau, kappa = point.parts
    e = program.equalities
    z_cone, r = z[:, e:], -state.r_x[:, None]
    total, lengths = _dot(s, z_cone), _LENGTHS[program.P is None]
    share = torch.where(cautious, CAUTIOUS_STEP, STEP)

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


def _homogeneous_step(
    program: BoxProgram, factor: Factor, h: Tensor, point: _Iterate, state: _State, cautious: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """A predictor-corrector step of the embedding, and (B, 1) where it is finite; see the plain one."""
    x, z, s, tau, kappa = point.parts
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
    changes = zip(point.parts, (dx, dz, ds, d_tau, d_kappa), strict=True)
    moved = [torch.addcmul(old, alpha, change) for old, change in changes]
    scale = 1.0 / torch.maximum(moved[3], moved[4])
    return tuple(scale * part for part in moved), torch.isfinite(alpha)


def _refined(program: BoxProgram, factor: Factor, h: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A solution of the unregularised system, refined once."""
    x, z = factor.solve(r, t)
    Px = program.quadratic(x)
    left = r - program.transposed(z)
    if Px is not None:
        left -= Px
    below = t - program.rows(x)
    below[..., program.equalities :] += h[:, None] * z[..., program.equalities :]
    dx, dz = factor.solve(left, below)
    return x + dx, z + dz


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


def _norm(vectors: Tensor) -> Tensor:
    return vectors.abs().amax(1, keepdim=True) if vectors.shape[1] else vectors.new_zeros(vectors.shape[0], 1)
