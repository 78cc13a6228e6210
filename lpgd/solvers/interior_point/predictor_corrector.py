"""Mehrotra's predictor-corrector method for a batch of programs at once, and the same on a homogeneous embedding.

For the programs of :mod:`lpgd.solvers.interior_point.box_program` the embedding asks for x, z, s, τ, κ with
``s, z, τ, κ ≥ 0`` on the inequalities, ``sᵀz = 0``, ``τκ = 0`` and

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
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpgd.arrays import rows_where
from lpgd.execution.interrupts import pause
from lpgd.solvers.interior_point.active_set import ActiveSet, is_suitable, settle
from lpgd.solvers.interior_point.box_program import BoxProgram
from lpgd.solvers.interior_point.equality_system import KeptSystem
from lpgd.solvers.interior_point.newton_system import Precision, newton_system
from lpgd.solvers.interior_point.projection import is_projection, near_active_sets
from lpgd.solvers.interior_point.steps import Iterate, State, assess, homogeneous_step, largest, plain_step
from lpgd.status import Status

__all__ = ["Answers", "Limits", "solve_programs"]

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
CROSSOVER = 1e-5
"""The residual at which Newton steps on the active set take over."""
SIGNS = 0.01
"""The part of the tolerance by which they may miss a sign or a bound."""
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
    kept: tuple[KeptSystem, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.x, self.z, self.s, self.status, self.iterations

    def select(self, elements: Tensor) -> Answers:
        """Those of some elements, without their systems."""
        x, z, s, status, iterations = (tensor[elements] for tensor in self.tensors)
        return Answers(x, z, s, status, iterations)

    def put(self, elements: Tensor, answers: Answers) -> None:
        """Replace those of some elements."""
        for whole, tensor in zip(self.tensors, answers.tensors, strict=True):
            whole[elements] = tensor


def solve_programs(program: BoxProgram, start: ActiveSet | None, limits: Limits, verbose: bool = False) -> Answers:
    """Solve every program of a batch, from active sets where they are near enough.

    Those are first the sets ``start``, and then, of programs that are projections, what Newton's method finds.
    """
    answers: Answers | None = None
    if start is not None:
        answers = _settled(program, start, limits)
    if is_projection(program):
        answers = _others(program, answers, lambda left: _projected(left, limits))
    return _others(program, answers, lambda left: _solve_cold(left, limits, verbose))


def _others(program: BoxProgram, answers: Answers | None, solve: Callable[[BoxProgram], Answers]) -> Answers:
    """The answers, with those of ``solve`` for elements that are not solved (status -1)."""
    if answers is None:
        return solve(program)
    left = rows_where(answers.status < 0)
    if not left.shape[0]:
        return answers
    others = solve(program if left.shape[0] == program.size else program.select(left))
    answers.put(left, others)
    return replace(answers, kept=answers.kept + tuple(kept.moved(left) for kept in others.kept))


def _projected(program: BoxProgram, limits: Limits) -> Answers:
    """What Newton steps on the active sets of a projection lead to; the status of elements not solved is -1."""
    near = near_active_sets(program)
    if near.elements.shape[0] == program.size:
        answers = _settled(program, near.sets, limits)
        answers.iterations.add_(near.steps)
        return answers
    q, size = program.q, program.size
    tensors = (q.new_full((size, length), torch.nan) for length in (program.n, program.row_count, program.row_count))
    status = torch.full((size,), -1, device=q.device)
    answers = Answers(*tensors, status=status, iterations=torch.zeros_like(status))
    if near.elements.shape[0]:
        found = _settled(program.select(near.elements), near.sets, limits)
        found.iterations.add_(near.steps)
        answers.put(near.elements, found)
        answers = replace(answers, kept=tuple(kept.moved(near.elements) for kept in found.kept))
    return answers


def _settled(program: BoxProgram, start: ActiveSet, limits: Limits) -> Answers:
    """What Newton steps on the active sets lead to; the status of elements that they do not solve is -1."""
    settled = settle(program, start, max(SIGNS * limits.tolerance, 1e-12), limits.regularization)
    e = program.equalities
    x, z, one = settled.x, settled.z, program.q.new_ones(program.size, 1)
    z = torch.cat([z[:, :e], z[:, e:].clamp(min=0)], 1)
    s = (program.b - program.product(x))[:, e:].clamp(min=0)
    state = assess(program, Iterate(x, z, s, one, 0 * one), (largest(program.q), largest(program.b)))
    status = torch.where(settled.found & (state.quality <= limits.tolerance), int(Status.SOLVED), -1)
    kept = settled.kept
    if kept is not None:
        kept = kept._replace(valid=kept.valid & (status[kept.elements] >= 0))
    systems = () if kept is None or not kept.is_small else (kept,)
    return Answers(x, z, torch.nn.functional.pad(s, (e, 0)), status, settled.systems, systems)


def _solve_plainly(program: BoxProgram, limits: Limits, verbose: bool) -> Answers:
    """The plain method, which ends where Newton steps on the active set take over, if there is curvature.

    Those end exactly, after one or two systems, and resolve which of the weakly active constraints are active.
    """
    if program.q.dtype != torch.float64 or limits.tolerance >= CROSSOVER or not is_suitable(program):
        return _Run(program, limits, homogeneous=False, verbose=verbose).answers
    answers = _Run(program, replace(limits, tolerance=CROSSOVER), homogeneous=False, verbose=verbose).answers
    near = rows_where(answers.status == Status.SOLVED)
    if not near.shape[0]:
        return answers
    near_program, reached = program.select(near), answers.select(near)
    exact = _settled(near_program, _active_set(near_program, reached), limits)
    exact.iterations.add_(reached.iterations)
    answers.put(near, exact)
    answers = replace(answers, kept=tuple(kept.moved(near) for kept in exact.kept))
    left = rows_where(exact.status < 0)
    if left.shape[0]:
        spent = int(reached.iterations.max())
        remaining = replace(limits, iterations=max(limits.iterations - spent, 1))
        again = _Run(
            near_program.select(left), remaining, homogeneous=False, verbose=verbose, start=reached.select(left)
        ).answers
        again.iterations.add_(reached.iterations[left])
        answers.put(near[left], again)
    return answers


def _active_set(program: BoxProgram, answers: Answers) -> ActiveSet:
    m, e, active = program.m, program.equalities, answers.z > answers.s
    active_rows = active[:, :m].clone()
    active_rows[:, :e] = True
    ends = active[:, m:] if program.bounded is None else active[:, m:] & (program.bounded > 0)
    both = []
    for index, mask in ((program.upper, ends[:, : program.uppers]), (program.lower, ends[:, program.uppers :])):
        full = torch.zeros((program.size, program.n), dtype=torch.bool, device=mask.device)
        full[:, slice(None) if index is None else index] = mask
        both.append(full)
    return ActiveSet(active_rows, both[0], both[1])


def _solve_cold(program: BoxProgram, limits: Limits, verbose: bool) -> Answers:
    plain = replace(limits, iterations=min(limits.iterations, PLAIN_ITERATIONS))
    answers = _solve_plainly(program, plain, verbose)
    unsolved = (answers.status == Status.NUMERICAL_ERROR) | (answers.status == Status.INACCURATE)
    unsolved |= (answers.status == Status.ITERATION_LIMIT) & (plain.iterations < limits.iterations)
    spent = int(answers.iterations.max()) if program.size else 0
    if spent < limits.iterations and bool(unsolved.any()):
        elements = rows_where(unsolved)
        remaining = replace(limits, iterations=limits.iterations - spent)
        second = _Run(program.select(elements), remaining, homogeneous=True, verbose=verbose).answers
        kept = (answers.status[elements] == Status.INACCURATE) & (second.status > Status.UNBOUNDED)
        second.iterations.add_(answers.iterations[elements])
        answers.put(elements[~kept], second.select(~kept))
    open_ends = (answers.status == Status.NUMERICAL_ERROR) | (answers.status == Status.ITERATION_LIMIT)
    if program.size and spent < limits.iterations and bool(open_ends.any()):
        elements = rows_where(open_ends)
        open_program = program.select(elements)
        rays = _Run(open_program.rays(), plain, homogeneous=False, verbose=verbose).answers
        falls = (rays.status == Status.SOLVED) & (
            (open_program.q * rays.x).sum(1) < -DESCENT * largest(open_program.q)[:, 0]
        )
        answers.status[elements[falls]] = int(Status.UNBOUNDED)
        answers.x[elements[falls]] = rays.x[falls]
    return answers


class _Run:
    """One method's run over a batch; finished elements leave it."""

    def __init__(
        self,
        program: BoxProgram,
        limits: Limits,
        *,
        homogeneous: bool,
        verbose: bool,
        start: Answers | None = None,
    ) -> None:
        size, row_count, q = program.size, program.row_count, program.q
        self.limits, self.homogeneous, self.verbose = limits, homogeneous, verbose
        self.answers = Answers(
            *(q.new_full((size, length), torch.nan) for length in (program.n, row_count, row_count)),
            status=torch.full((size,), int(Status.NUMERICAL_ERROR), device=q.device),
            iterations=torch.zeros(size, dtype=torch.int64, device=q.device),
        )
        self.program, self.system = program, newton_system(program)
        self.elements = torch.arange(size, device=q.device)
        self.left = torch.ones(size, dtype=torch.bool, device=q.device)
        self.regularization = q.new_full((1, 1), limits.regularization)
        self.norms: tuple[Tensor, ...] = (largest(program.q), largest(program.b))
        self.point = self.best = self._start() if start is None else self._resumed(start)
        self.regularization = self.regularization.repeat(size, 1)
        self.precision = Precision.DOUBLE if homogeneous else Precision.SHARED
        self.best_quality = q.new_full((size,), torch.inf)
        self.progress = q.new_full((size,), torch.inf)
        self.idle = torch.zeros(size, dtype=torch.int64, device=q.device)
        for iteration in range(limits.iterations + 1):
            pause()
            state = assess(self.program, self.point, self.norms)
            status = self._judge(state, iteration)
            finished = self.left & (status >= 0)
            if bool(finished.any()):
                self._record(rows_where(finished), status, iteration)
                self.left &= ~finished
                remaining = int(self.left.sum())
                if not remaining:
                    break
                if remaining <= (1.0 - COMPACTED) * self.left.shape[0]:
                    self._compact()
                    state = assess(self.program, self.point, self.norms)
            step = homogeneous_step if homogeneous else plain_step
            h = self.point.s / self.point.z[:, program.equalities :]
            if self.precision > Precision.DOUBLE and bool((self.left & (self.idle > 0)).any()):
                # A rough step is exact relative to slacks; where these are large, a residual may stay as it is.
                self.precision = Precision(self.precision - 1)
            factor = self.system.factor(h, self.regularization, self.precision)
            moved, sound = step(self.program, factor, h, self.point, state, self.idle[:, None] > 0)
            while factor.is_rough and (not factor.trusted or bool(factor.failed.any())):
                self.precision = factor.better
                factor = self.system.factor(h, self.regularization, self.precision)
                moved, sound = step(self.program, factor, h, self.point, state, self.idle[:, None] > 0)
            sound = sound & ~factor.failed[:, None]
            self.point = self.point.replaced(sound, Iterate(*moved))
            self.regularization = torch.where(factor.failed[:, None], 100.0, 1.0) * self.regularization

    def _resumed(self, start: Answers) -> Iterate:
        one = self.program.q.new_ones(self.program.size, 1)
        return Iterate(start.x, start.z, start.s[:, self.program.equalities :], one, 0 * one)

    def _start(self) -> Iterate:
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
        return Iterate(x, torch.cat([z[:, :e], _inside(z[:, e:])], 1), _inside(s), one, one * self.homogeneous)

    def _judge(self, state: State, iteration: int) -> Tensor:
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

    def _record(self, places: Tensor, status: Tensor, iteration: int) -> None:
        answers, elements, outcome = self.answers, self.elements[places], status[places]
        # A proof that there is no solution is the iterate itself, whatever its residuals are.
        proof = (outcome == Status.INFEASIBLE) | (outcome == Status.UNBOUNDED)
        point = self.best.select(places).replaced(proof[:, None], self.point.select(places))
        tau = torch.where((point.tau > 0) & ~proof[:, None], point.tau, 1.0)
        answers.x[elements] = point.x / tau
        answers.z[elements] = point.z / tau
        answers.s[elements] = torch.nn.functional.pad(point.s / tau, (self.program.equalities, 0))
        answers.status[elements] = outcome
        answers.iterations[elements] = iteration

    def _compact(self) -> None:
        kept = rows_where(self.left)
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
