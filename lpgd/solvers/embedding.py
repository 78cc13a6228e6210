"""Mehrotra's predictor-corrector method on a homogeneous embedding of quadratic programs, for a batch at once.

For the programs of :mod:`lpgd.solvers.box_program` the embedding asks for x, z, s, τ, κ with ``s, z, τ, κ ≥ 0`` on the
inequalities, ``sᵀz = 0``, ``τκ = 0`` and

    r_x = P x + Mᵀz + q τ = 0,     r_z = M x + s - b τ = 0,     r_τ = κ + qᵀx + bᵀz + xᵀP x / τ = 0

A solution with τ > 0 gives ``x/τ, z/τ, s/τ``; one with κ > 0 proves that there is none: ``bᵀz < 0, Mᵀz = 0`` that no
point satisfies the constraints, ``qᵀx < 0, P x = 0, M x + s = 0`` that the objective has no limit.  The interior iterates
follow the central path, so that they tend to the analytic centre of an optimal face.

Goulart and Chen, Clarabel: An interior-point solver for conic programs with quadratic objectives (2024), sections 2
and 3; Mehrotra, On the implementation of a primal-dual interior point method (1992).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lpgd.solvers.box_program import BoxProgram
from lpgd.solvers.newton_system import Factor, newton_system
from lpgd.status import Status

__all__ = ["Answers", "Limits", "solve_embedding"]

STEP = 0.99
"""The share of the way to the boundary that a step takes."""
PATIENCE = 8
"""Iterations without progress after which an element is given up."""
PROGRESS = 0.9
"""The factor by which residuals must fall to count as progress."""
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
        seconds: for the whole batch; None is no limit.
        regularization: of the factorisations, relative to their diagonals.
    """

    tolerance: float
    certificate: float
    acceptable: float
    iterations: int
    seconds: float | None
    regularization: float


@dataclass
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
        return _Iterate(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class _State:
    """What is known about an iterate: its products, residuals and how good it is."""

    Px: Tensor | None
    r_x: Tensor
    r_z: Tensor
    r_tau: Tensor
    mu: Tensor
    quality: Tensor  # (B,) the largest relative residual
    infeasible: Tensor  # (B,) the relative residual of a proof that no point satisfies the constraints
    unbounded: Tensor  # (B,) the same for the objective having no limit


def solve_embedding(program: BoxProgram, limits: Limits, verbose: bool = False) -> Answers:
    """Solve every program of a batch."""
    size, rows = program.size, program.row_count
    answers = Answers(
        *(program.q.new_full((size, length), torch.nan) for length in (program.n, rows, rows)),
        status=torch.full((size,), int(Status.NUMERICAL_ERROR), device=program.q.device),
        iterations=torch.zeros(size, dtype=torch.int64, device=program.q.device),
    )
    started = time.perf_counter()
    system = newton_system(program)
    elements = torch.arange(size, device=program.q.device)
    regularization = program.q.new_full((1, 1), limits.regularization)
    norms = _norm(program.q), _norm(program.b)
    point = _start(program, system.factor(_ones(program), regularization))
    best, best_quality = point, program.q.new_full((size,), torch.inf)
    left = torch.ones(size, dtype=torch.bool, device=program.q.device)
    idle = torch.zeros(size, dtype=torch.int64, device=program.q.device)
    progress = torch.full_like(best_quality, torch.inf)
    regularization = regularization.repeat(size, 1)

    for iteration in range(limits.iterations + 1):
        state = _assess(program, point, norms)
        better = (state.quality < best_quality)[:, None]
        best_quality = torch.minimum(state.quality.nan_to_num(nan=torch.inf), best_quality)
        best = _Iterate(*(torch.where(better, getattr(point, f.name), getattr(best, f.name)) for f in fields(point)))
        if verbose:
            _report(iteration, elements, left, state, point)
        reached = torch.minimum(state.quality, torch.minimum(state.infeasible, state.unbounded))
        advanced = reached < PROGRESS * progress
        idle = torch.where(advanced, 0, idle + 1)
        progress = torch.where(advanced, reached, progress)
        solved = best_quality <= limits.tolerance
        stalled = idle >= PATIENCE
        status = torch.where(solved, int(Status.SOLVED), -1)
        status = torch.where((state.infeasible <= limits.certificate) & ~solved, int(Status.INFEASIBLE), status)
        status = torch.where((state.unbounded <= limits.certificate) & ~solved, int(Status.UNBOUNDED), status)
        given_up = torch.where(best_quality <= limits.acceptable, int(Status.INACCURATE), int(Status.NUMERICAL_ERROR))
        status = torch.where((status < 0) & stalled, given_up, status)
        if iteration == limits.iterations:
            status = torch.where(status < 0, int(Status.ITERATION_LIMIT), status)
        elif limits.seconds is not None and time.perf_counter() - started > limits.seconds:
            status = torch.where(status < 0, int(Status.TIME_LIMIT), status)
        finished = left & (status >= 0)
        count = int(finished.sum())
        if count:
            chosen = finished.nonzero()[:, 0]
            _record(answers, elements[chosen], best.select(chosen), status[chosen], iteration, program)
            left = left & ~finished
            remaining = int(left.sum())
            if not remaining:
                break
            if remaining <= (1.0 - COMPACTED) * left.shape[0]:
                kept = left.nonzero()[:, 0]
                program = program.select(kept)
                system = system.select(program)
                point, best = point.select(kept), best.select(kept)
                state = _assess(program, point, norms := tuple(norm[kept] for norm in norms))
                elements, left, idle, progress = elements[kept], left[kept], idle[kept], progress[kept]
                best_quality, regularization = best_quality[kept], regularization[kept]
        point, failed = _step(program, system, point, state, regularization)
        regularization = torch.where(failed[:, None], 100 * regularization, regularization)
    return answers


def _record(
    answers: Answers, elements: Tensor, point: _Iterate, status: Tensor, iteration: int, program: BoxProgram
) -> None:
    tau = torch.where(point.tau > 0, point.tau, 1.0)
    answers.x[elements] = point.x / tau
    answers.z[elements] = point.z / tau
    answers.s[elements, : program.equalities] = 0.0
    answers.s[elements, program.equalities :] = point.s / tau
    answers.status[elements] = status
    answers.iterations[elements] = iteration


def _ones(program: BoxProgram) -> Tensor:
    rows = program.b.shape[1] - program.equalities
    shared = program.shares_matrices and program.bounded is None and program.free is None
    return program.q.new_ones(1 if shared else program.size, rows)


def _start(program: BoxProgram, factor: Factor) -> _Iterate:
    """The solution with H = I, its slacks and multipliers moved into the cone (Clarabel, section 3.2)."""
    e, one = program.equalities, program.q.new_ones(program.size, 1)
    nothing_x, nothing_z = torch.zeros_like(program.q), torch.zeros_like(program.b)
    if program.P is None:
        r, t = torch.stack([nothing_x, -program.q], 1), torch.stack([program.b, nothing_z], 1)
        x, z = factor.solve(r, t)
        x, s, z = x[:, 0], -z[:, 0, e:], z[:, 1]
    else:
        x, z = factor.solve(-program.q[:, None], program.b[:, None])
        x, s, z = x[:, 0], -z[:, 0, e:], z[:, 0]
    return _Iterate(x, torch.cat([z[:, :e], _inside(z[:, e:])], 1), _inside(s), one, one)


def _inside(values: Tensor) -> Tensor:
    if values.shape[1] == 0:
        return values
    least = values.amin(1, keepdim=True)
    target = (0.1 * values.clamp(min=0).mean(1, keepdim=True)).clamp(min=1.0)
    return values + torch.where(least < target, target - least, 0.0)


def _assess(program: BoxProgram, point: _Iterate, norms: tuple[Tensor, ...]) -> _State:
    x, z, s, tau, kappa = point.x, point.z, point.s, point.tau, point.kappa
    e = program.equalities
    Px, Mz, Mx = program.quadratic(x), program.transposed(z), program.rows(x)
    qx, bz = (program.q * x).sum(1, keepdim=True), (program.b * z).sum(1, keepdim=True)
    r_x = torch.addcmul(Mz, program.q, tau)
    primal_ray = Mx.clone()
    primal_ray[:, e:] += s
    r_z = torch.addcmul(primal_ray, program.b, tau, value=-1)
    dual_terms = torch.maximum(norms[0] * tau, _norm(Mz))
    unbounded_residual = _norm(primal_ray)
    energy: Tensor | float = 0.0
    if Px is not None:
        r_x = r_x + Px
        energy = (x * Px).sum(1, keepdim=True) / tau
        norm = _norm(Px)
        dual_terms, unbounded_residual = torch.maximum(dual_terms, norm), torch.maximum(unbounded_residual, norm)
    gap = qx + bz + energy
    primal, dual = _norm(r_z) / (tau + torch.maximum(norms[1] * tau, _norm(Mx))), _norm(r_x) / (tau + dual_terms)
    gap_terms = torch.minimum((qx + 0.5 * energy).abs(), (bz + 0.5 * energy).abs())
    quality = torch.maximum(torch.maximum(primal, dual), gap.abs() / (tau + gap_terms))
    infeasible = torch.where(bz < 0, _norm(Mz) / -bz, torch.inf)
    unbounded = torch.where(qx < 0, unbounded_residual / -qx, torch.inf)
    mu = ((s * z[:, e:]).sum(1, keepdim=True) + tau * kappa) / (s.shape[1] + 1)
    return _State(Px, r_x, r_z, gap + kappa, mu, quality[:, 0], infeasible[:, 0], unbounded[:, 0])


def _step(
    program: BoxProgram, system: object, point: _Iterate, state: _State, regularization: Tensor
) -> tuple[_Iterate, Tensor]:
    """One predictor-corrector step, and the elements whose factorisation broke down."""
    x, z, s, tau, kappa = point.x, point.z, point.s, point.tau, point.kappa
    e = program.equalities
    z_cone = z[:, e:]
    h = s / z_cone
    factor = system.factor(h, regularization)
    slope = program.q if state.Px is None else program.q + 2.0 * state.Px / tau

    def direction(
        first_x: Tensor, first_z: Tensor, residual_tau: Tensor, product_tau: Tensor, second: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x2, z2, denominator = second
        numerator = residual_tau - product_tau / tau + _dot(slope, first_x) + _dot(program.b, first_z)
        d_tau = numerator / denominator
        d_kappa = -(product_tau + kappa * d_tau) / tau
        return torch.addcmul(first_x, x2, d_tau), torch.addcmul(first_z, z2, d_tau), d_tau, d_kappa

    # The answer (x2, z2) to the right-hand side (-q, b) of τ is (x, z)/τ plus a correction, which alone is solved for.
    r, t = torch.stack([-state.r_x, torch.zeros_like(x)], 1), torch.stack([-state.r_z, torch.zeros_like(z)], 1)
    t[..., e:] += s[:, None]
    solution_x, solution_z = _refined(program, factor, h, r, t)
    shift = solution_x.sum(1) / tau
    x2, z2 = x / tau + shift, (z + solution_z.sum(1)) / tau
    z2_cone = z2[:, e:]
    curvature = _dot(z2_cone, h * z2_cone)
    if state.Px is not None:
        shifted = program.quadratic(shift)
        assert shifted is not None
        curvature = curvature + _dot(shift, shifted)
    second = (x2, z2, kappa / tau + curvature)
    dx, dz, d_tau, d_kappa = direction(solution_x[:, 0], solution_z[:, 0], state.r_tau, tau * kappa, second)
    ds = -s - h * dz[:, e:]
    alpha = _longest(point, ds, dz[:, e:], d_tau, d_kappa).clamp(max=1.0)

    sigma = (1.0 - alpha) ** 3
    target = sigma * state.mu
    product = (ds * dz[:, e:] - target) / z_cone + s
    product_tau = tau * kappa + d_tau * d_kappa - target
    keep = 1.0 - sigma
    combined_z = -keep * state.r_z
    combined_z[:, e:] += product
    first_x, first_z = _refined(program, factor, h, (-keep * state.r_x)[:, None], combined_z[:, None])
    dx, dz, d_tau, d_kappa = direction(first_x[:, 0], first_z[:, 0], keep * state.r_tau, product_tau, second)
    ds = -product - h * dz[:, e:]
    alpha = (STEP * _longest(point, ds, dz[:, e:], d_tau, d_kappa)).clamp(max=1.0)
    sound = torch.isfinite(alpha) & ~factor.failed[:, None]
    alpha = torch.where(sound, alpha, 0.0)
    scale = 1.0 / torch.maximum(tau + alpha * d_tau, kappa + alpha * d_kappa)
    moved = _Iterate(
        *(
            torch.where(sound, scale * torch.addcmul(old, alpha, change), old)
            for old, change in ((x, dx), (z, dz), (s, ds), (tau, d_tau), (kappa, d_kappa))
        )
    )
    return moved, factor.failed


def _refined(program: BoxProgram, factor: Factor, h: Tensor, r: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A solution of the unregularised system, refined once."""
    x, z = factor.solve(r, t)
    e = program.equalities
    Px = program.quadratic(x)
    left = r - program.transposed(z)
    if Px is not None:
        left = left - Px
    below = t - program.rows(x)
    below[..., e:] += h[:, None] * z[..., e:]
    dx, dz = factor.solve(left, below)
    return x + dx, z + dz


def _longest(point: _Iterate, ds: Tensor, dz: Tensor, d_tau: Tensor, d_kappa: Tensor) -> Tensor:
    """(B, 1) the step to the boundary of the cone."""
    ratio = torch.maximum(-d_tau / point.tau, -d_kappa / point.kappa)
    if ds.shape[1]:
        ratio = torch.maximum(ratio, (-ds / point.s).amax(1, keepdim=True))
        cone = point.z[:, point.z.shape[1] - dz.shape[1] :]
        ratio = torch.maximum(ratio, (-dz / cone).amax(1, keepdim=True))
    return 1.0 / ratio.clamp(min=1e-10)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(1, keepdim=True)


def _norm(vectors: Tensor) -> Tensor:
    return vectors.abs().amax(1, keepdim=True) if vectors.shape[1] else vectors.new_zeros(vectors.shape[0], 1)


def _report(iteration: int, elements: Tensor, left: Tensor, state: _State, point: _Iterate) -> None:
    worst = state.quality.nan_to_num(nan=torch.inf)
    print(
        f"{iteration:3d}  {int(left.sum()):5d} left   worst residual {float(worst[left].max()):.1e}   "
        f"μ {float(state.mu[left].max()):.1e}   least τ {float(point.tau[left].min()):.1e}"
    )
