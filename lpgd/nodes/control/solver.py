"""Trajectories by sequential quadratic programming: an interior-point method for the bounds, ended on the active set.

Every iteration is one Riccati recursion (:mod:`lpgd.nodes.control.riccati`).  States are variables, joined to the
dynamics by multipliers: all stages are evaluated at once, starts need not follow the dynamics, and unstable ones do no
harm.  The Hessian is that of the Lagrangian where it is positive definite along the dynamics; elsewhere it is damped,
or that of the costs alone, the Gauss-Newton one, its stages without their negative curvature.  An exact penalty
decides on steps.

The end is that of :mod:`lpgd.nodes.control.ending`, where a warm start begins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.nodes.control.ending import Trajectories, polish, residual
from lpgd.nodes.control.horizon import SHORTEST, grow
from lpgd.nodes.control.trajectory import (
    ControlProblem,
    Curvature,
    Expansion,
    add_diagonal,
    newton_step,
    stacked,
)
from lpgd.status import Status

__all__ = ["minimise"]

SHRINK = 0.2
"""The barrier's weight falls to this part of itself, or to its 1.5th power, once its problem is solved roughly."""

DAMPINGS = 5
"""So many dampings of an indefinite Hessian are tried before that of the costs alone."""
PATIENCE, NEARLY = 15, 1e-4
"""What has a larger residual after so many iterations takes long."""
TRIES = 8
"""So often the end is tried, ever closer to a stationary point; one that is no strict minimum is INACCURATE."""


class _State(NamedTuple):
    """What an interior-point run knows of each element that still runs."""

    z: Tensor
    nu: Tensor
    below: Tensor
    above: Tensor
    weight: Tensor  # μ of the barrier
    penalty: Tensor  # of the defects
    damping: Tensor  # of the Hessian


def minimise(problem: ControlProblem, z: Tensor, max_iterations: int = 300, grows: bool = False) -> Trajectories:
    """Solve from any trajectory; each element converges alone.

    Args:
        problem: B elements, in units in which the objective is of order one.
        z: (B, T, m + n).
        max_iterations: of an element.
        grows: what takes long begins anew from solutions of shorter horizons (:mod:`lpgd.nodes.control.horizon`).
    """
    eps, guess = torch.finfo(z.dtype).eps, z
    count = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    state = _begin(problem, z)
    z, nu, below, above = (tensor.clone() for tensor in state[:4])
    whole = Trajectories(z, nu, below, above, count + int(Status.ITERATION_LIMIT), count)
    running = torch.arange(len(z), device=z.device)
    tries, young = torch.zeros_like(count), torch.ones_like(count, dtype=torch.bool)
    grows = grows and z.shape[1] >= 2 * SHORTEST
    least = eps**0.7
    for iteration in range(max_iterations):
        if is_over():
            break
        expansion = problem.expand(state.z)
        if grows and iteration >= PATIENCE:
            slow = rows_where(young[running] & ~(residual(problem, state.z, expansion, *state[1:4]) <= NEARLY))
            if len(slow):
                far, young[running[slow]] = problem.select(slow), False
                grown = grow(minimise, far, guess[running[slow]])
                count[running[slow]] += grown.systems
                for tensor, values in zip(state, _begin(far, grown.z), strict=True):
                    tensor[slow[grown.trusted]] = values[grown.trusted]
                expansion = problem.expand(state.z)
        state, error = _with_lower_weight(problem, state, expansion, least)
        size = residual(problem, state.z, expansion, *state[1:4])
        enough = (10.0 ** (-4.0 - 2.0 * tries[running].clamp(max=2))).clamp(min=eps**0.6)
        # Ready, too, is what the barrier has nothing more to say about.
        ready = (size <= enough) & (state.weight <= 1e-4) | (state.weight <= least) & (error <= 10 * least)
        lost = ~torch.isfinite(size) | (state.z.abs().amax((-1, -2)) > 1e15) | (tries[running] >= TRIES)
        if ready.any():
            near = ready.nonzero()[:, 0]
            tries[running[near]] += 1
            found, fine = _ended(problem.select(near), state, near)
            count[running[near]] += found.iterations
            ready = ready.clone()
            ready[near] = fine
            for tensor, values in zip(whole[:5], found[:5], strict=True):
                tensor[running[near[fine]]] = values[fine]
        ended = (ready | lost) if bool(ready.any()) or bool(lost.any()) else None
        if ended is not None:
            rough = torch.where(size <= eps**0.3, int(Status.INACCURATE), int(Status.NUMERICAL_ERROR))
            whole.status[running[lost & ~ready]] = rough[lost & ~ready].to(whole.status)
            for tensor, values in zip(whole[:4], state[:4], strict=True):
                tensor[running[lost & ~ready]] = values[lost & ~ready]
            left = (~ended).nonzero()[:, 0]
            running, problem = running[left], problem.select(left)
            state, expansion = (
                _State(*(tensor[left] for tensor in state)),
                Expansion(*(tensor[left] for tensor in expansion)),
            )
            if not len(running):
                break
        count[running] += 1
        state = _iterate(problem, state, expansion)
    for tensor, values in zip(whole[:4], state[:4], strict=True):
        tensor[running] = values
    if len(running):
        size = residual(problem, state.z, problem.expand(state.z), *state[1:4])
        # Stationary to a lower accuracy, or no strict minimum.
        whole.status[running] = torch.where(size <= eps**0.3, int(Status.INACCURATE), whole.status[running])
    return whole._replace(iterations=count)


def _begin(problem: ControlProblem, z: Tensor) -> _State:
    """Where a run starts from a trajectory."""
    low, high = torch.isfinite(problem.lower), torch.isfinite(problem.upper)
    bounded = bool((low | high).any())
    z, ones = _inside(problem, z), z.new_ones(len(z))
    weight = 0.1 * ones if bounded else 0 * ones
    below = torch.where(low, weight[:, None, None] / (z - problem.lower), 0)
    above = torch.where(high, weight[:, None, None] / (problem.upper - z), 0)
    nu = z.new_zeros(*z.shape[:2], problem.start.shape[-1])
    return _State(z, nu, below, above, weight, 1e-6 * ones, 0 * ones)


def _with_lower_weight(
    problem: ControlProblem, state: _State, expansion: Expansion, least: float
) -> tuple[_State, Tensor]:
    """The barrier's weight falls where its own problem is solved well enough for it; (B,) the error of that problem."""
    error = _barrier_error(problem, state, expansion)
    for _ in range(20):
        weight = torch.where(
            (error <= 10 * state.weight) & (state.weight > least),
            torch.minimum(SHRINK * state.weight, state.weight**1.5).clamp(min=least),
            state.weight,
        )
        if bool((weight == state.weight).all()):
            break
        state = state._replace(weight=weight)
        error = _barrier_error(problem, state, expansion)
    return state, error


def _ended(problem: ControlProblem, state: _State, near: Tensor) -> tuple[Trajectories, Tensor]:
    """Where the end leads k elements, and (k,) whether that is the solution next to them.

    Args:
        problem: k elements.
        state: of the elements that run.
        near: (k,) which of these they are.
    """
    zero = torch.zeros_like(near)
    z, nu, below, above = (tensor[near] for tensor in state[:4])
    start = Trajectories(z, nu, below, above, zero, zero.clone())
    found = polish(problem, start)
    close = stacked([found.z - start.z]) <= 0.1 * (1 + stacked([start.z]))
    return found, (found.status == int(Status.SOLVED)) & close


def _inside(problem: ControlProblem, z: Tensor) -> Tensor:
    """Moved inside of the bounds by a part of their distance, at most 1e-2 (1 + |bound|)."""
    lower, upper = problem.lower, problem.upper
    room = torch.where(torch.isfinite(upper - lower), 0.1 * (upper - lower), torch.inf)
    low = lower + torch.minimum(room, 1e-2 * (1 + lower.abs()))
    high = upper - torch.minimum(room, 1e-2 * (1 + upper.abs()))
    z = torch.where(torch.isfinite(lower), torch.maximum(z, low), z)
    return torch.where(torch.isfinite(upper), torch.minimum(z, high), z)


def _slacks(problem: ControlProblem, z: Tensor) -> tuple[Tensor, Tensor]:
    return z - problem.lower, problem.upper - z


def _barrier_error(problem: ControlProblem, state: _State, expansion: Expansion) -> Tensor:
    low, high = _slacks(problem, state.z)
    weight = state.weight[:, None, None]
    slope = expansion.gradient + expansion.pulled(state.nu) - state.below + state.above
    finite = (torch.isfinite(low), torch.isfinite(high))
    gaps = [
        torch.where(bounded, multiplier * slack - weight, 0)
        for bounded, multiplier, slack in zip(finite, (state.below, state.above), (low, high), strict=True)
    ]
    terms = 1 + stacked([expansion.pulled(state.nu)])
    return torch.stack([stacked([slope]) / terms, stacked([expansion.defect]), stacked(gaps)]).amax(0)


def _iterate(problem: ControlProblem, state: _State, expansion: Expansion) -> _State:
    """One step of the interior-point method."""
    z, nu, below, above, weight, penalty, damping = state
    mu = weight[:, None, None]
    low, high = _slacks(problem, z)
    barrier = torch.where(torch.isfinite(high), mu / high, 0) - torch.where(torch.isfinite(low), mu / low, 0)
    stiff = below / low + above / high
    gradient = expansion.gradient + barrier
    exact = add_diagonal(problem.curvature(z, nu), stiff)
    dz, new, curve, damping = _damped_step(problem, exact, expansion, gradient, stiff, damping, z)
    # To the boundary and no further.
    tau = torch.maximum(1 - weight, torch.full_like(weight, 0.99))
    reach = _longest(torch.cat([-dz / low, dz / high], 1), tau)
    dbelow = torch.where(torch.isfinite(low), mu / low - below - below / low * dz, 0)
    dabove = torch.where(torch.isfinite(high), mu / high - above + above / high * dz, 0)
    tiny = torch.finfo(z.dtype).tiny
    dual = _longest(torch.cat([-dbelow / below.clamp(min=tiny), -dabove / above.clamp(min=tiny)], 1), tau)
    # The penalty makes the step one of descent of φ + penalty |defect|₁.
    violation = expansion.defect.abs().sum((-1, -2))
    along = (gradient * dz).sum((-1, -2))
    bend = (curve.times(dz) * dz).sum((-1, -2)).clamp(min=0)
    needed = (along + 0.5 * bend) / (0.9 * violation).clamp(min=torch.finfo(z.dtype).tiny)
    rounding = 10 * torch.finfo(z.dtype).eps * expansion.defect[0].numel() * (1 + stacked([z]))
    penalty = torch.where((violation > rounding) & (needed > penalty), 1.5 * needed, penalty)
    fall = along - penalty * violation
    step, moved, fine = _search(problem, state._replace(penalty=penalty), expansion, curve, gradient, dz, reach, fall)
    # A Hessian that is hardly definite makes long steps, of which little is right: damping shortens the next one.
    short = ~(fine & (step >= 0.25 * reach))
    damping = torch.where(short, torch.maximum(8 * damping, LEAST * damping.new_ones(())), damping / 3)
    damping = torch.where(damping < LEAST, 0, damping)
    dual = torch.where(fine, dual, step)
    z = z + moved
    nu = nu + step[:, None, None] * (new - nu)
    below, above = below + dual[:, None, None] * dbelow, above + dual[:, None, None] * dabove
    low, high = _slacks(problem, z)
    wide = 1e10
    below = torch.where(torch.isfinite(low), torch.minimum(torch.maximum(below, mu / (wide * low)), wide * mu / low), 0)
    above = torch.where(
        torch.isfinite(high), torch.minimum(torch.maximum(above, mu / (wide * high)), wide * mu / high), 0
    )
    return _State(z, nu, below, above, weight, penalty, damping)


LEAST = 1e-6
"""The least damping of a Hessian, in units in which the objective is of order one; then it is none."""


def _damped_step(
    problem: ControlProblem,
    exact: Curvature,
    expansion: Expansion,
    gradient: Tensor,
    stiff: Tensor,
    damping: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor, Curvature, Tensor]:
    """The step dz, ν after it, the Hessian that made it, and the damping of it."""
    curve = add_diagonal(exact, damping[:, None, None].expand_as(z))
    dz, new, factor = newton_step(curve, expansion, gradient, expansion.defect)
    indefinite = (~factor.definite).nonzero()[:, 0]
    for _ in range(DAMPINGS):
        if not len(indefinite):
            break
        damping[indefinite] = torch.maximum(8 * damping[indefinite], 100 * LEAST * damping.new_ones(()))
        chosen = Expansion(*(tensor[indefinite] for tensor in expansion))
        trial = Curvature(*(tensor[indefinite] for tensor in exact))
        trial = add_diagonal(trial, damping[indefinite, None, None].expand_as(z[indefinite]))
        dz[indefinite], new[indefinite], factor = newton_step(trial, chosen, gradient[indefinite], chosen.defect)
        for whole, values in zip(curve, trial, strict=True):
            whole[indefinite] = values
        indefinite = indefinite[~factor.definite]
    if len(indefinite):
        chosen = Expansion(*(tensor[indefinite] for tensor in expansion))
        costs = _convex(problem.select(indefinite).curvature(z[indefinite], None))
        costs = add_diagonal(costs, stiff[indefinite])
        dz[indefinite], new[indefinite], _ = newton_step(costs, chosen, gradient[indefinite], chosen.defect)
        for whole, values in zip(curve, costs, strict=True):
            whole[indefinite] = values
    return dz, new, curve, damping


def _longest(ratios: Tensor, tau: Tensor) -> Tensor:
    """(B,) the longest step, at most 1, along which no slack falls by more than the part τ of it."""
    most = torch.where(torch.isfinite(ratios), ratios, 0).amax((-1, -2))
    return torch.minimum(torch.ones_like(tau), tau / most.clamp(min=torch.finfo(tau.dtype).tiny))


def _convex(curve: Curvature) -> Curvature:
    """Without negative curvature in any stage, and a little more than none."""
    curved = []
    for hessian in curve:
        values, vectors = linalg.eigh(torch.where(torch.isfinite(hessian), 0.5 * (hessian + hessian.mT), 0))
        top = values.abs().amax(-1, keepdim=True)
        values = torch.maximum(values.abs(), torch.finfo(values.dtype).eps ** 0.5 * torch.where(top > 0, top, 1))
        curved.append((vectors * values[..., None, :]) @ vectors.mT)
    return Curvature(*curved)


def _search(
    problem: ControlProblem,
    state: _State,
    expansion: Expansion,
    curve: Curvature,
    gradient: Tensor,
    dz: Tensor,
    reach: Tensor,
    fall: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step (B,), the change of z that it is, and whether the merit function fell.

    Where the first trial fails, its defects are corrected once (second order), as curved dynamics ask for.
    """
    first = _merit(problem, state, state.z)
    noise = 10 * torch.finfo(fall.dtype).eps * (1 + first.abs())
    step, moved = reach, reach[:, None, None] * dz
    pending = torch.ones_like(step, dtype=torch.bool)
    for trial in range(30):
        value = _merit(problem, state, state.z + moved)
        pending = pending & ~(value <= first + 1e-4 * step * fall + noise)
        if not pending.any():
            break
        if trial == 0:
            failed = pending.nonzero()[:, 0]
            retried, chosen = problem.select(failed), Expansion(*(tensor[failed] for tensor in expansion))
            defect = retried.defect(state.z[failed] + moved[failed]) + step[failed, None, None] * chosen.defect
            good = torch.isfinite(defect).all(-1).all(-1)
            defect = torch.where(good[:, None, None], defect, 0)
            lifted, _, _ = newton_step(
                Curvature(*(tensor[failed] for tensor in curve)), chosen, gradient[failed], defect
            )
            low, high = _slacks(retried, state.z[failed])
            length = _longest(torch.cat([-lifted / low, lifted / high], 1), torch.full_like(reach[failed], 0.99))
            lifted = length[:, None, None] * lifted
            chosen_state = _State(*(tensor[failed] for tensor in state))
            fell = (
                _merit(retried, chosen_state, state.z[failed] + lifted) <= first[failed] + 1e-4 * length * fall[failed]
            )
            fell = fell & good
            corrected = failed[fell]
            moved = moved.clone()
            moved[corrected] = lifted[fell]
            pending[corrected] = False
            if not pending.any():
                break
        step = torch.where(pending, 0.5 * step, step)
        moved = torch.where(pending[:, None, None], step[:, None, None] * dz, moved)
    return step, torch.where(pending[:, None, None], 0, moved), ~pending


def _merit(problem: ControlProblem, state: _State, z: Tensor) -> Tensor:
    """(B,) objective, barrier and exact penalty; infinite outside."""
    low, high = _slacks(problem, z)
    logs = torch.where(torch.isfinite(low), low.log(), 0) + torch.where(torch.isfinite(high), high.log(), 0)
    value = problem.value(z) - state.weight * logs.sum((-1, -2))
    value = value + state.penalty * problem.defect(z).abs().sum((-1, -2))
    return torch.where(torch.isnan(value), torch.inf, value)
