"""Moreau: batches of conic programs in compiled code, by an active-set method or an interior-point method."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, flags, from_numpy
from lpgd.execution.interrupts import pause
from lpgd.execution.tasks import SerialExecutor, run_tasks, split, worker_count
from lpgd.execution.workspaces import workspaces
from lpgd.problems.base import State, States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint, per_element
from lpgd.solvers.backends.batched import BatchAnswers, BatchedSolver
from lpgd.solvers.backends.flawless import answered, judged_flawless
from lpgd.solvers.backends.forms import groups_by_bounds
from lpgd.solvers.backends.moreau_objects import (
    ACTIVE_SET,
    IPM,
    Answer,
    Compiled,
    Inputs,
    Limits,
    OnDevice,
    joined,
    memory,
    on_device,
)
from lpgd.solvers.backends.moreau_rows import Layout, MoreauForm, in_problem_form, row_form
from lpgd.solvers.base import Begun, Capabilities
from lpgd.status import Status

__all__ = ["Moreau"]

# Moreau's SolverStatus by number (moreau 0.4.1).
_STATUSES = (
    Status.NUMERICAL_ERROR,  # unsolved
    Status.SOLVED,
    Status.INFEASIBLE,
    Status.UNBOUNDED,
    Status.INACCURATE,  # almost solved
    Status.INFEASIBLE,  # almost
    Status.UNBOUNDED,  # almost
    Status.ITERATION_LIMIT,
    Status.TIME_LIMIT,
    Status.NUMERICAL_ERROR,
    Status.NUMERICAL_ERROR,  # insufficient progress, or a P that is not convex
    Status.NUMERICAL_ERROR,  # terminated by a callback
)
_SOLVED, _LIMITS = 1, (7, 8)

DENSE = 500
"""The active-set method, a dense one, is tried on up to so many variables, and on as many rows or twice as many rows
as variables."""
EXACT, BIASED = 1e-10, 1e-3
"""Relative violations of stationarity.  Where P is singular, the active-set method adds ε = 1e-6 to its diagonal and
calls the answer solved (moreau 0.4.1).  Up to the second number that can be corrected; where there is no solution x is
about 1e6 and the violation of order 1."""
CORRECTIONS = 2
"""Each is a proximal-point step, which leaves about a millionth of the violation."""
WORK = 1.5e8
"""Operations for each thread in one compiled call, some tenths of a second: it cannot be interrupted."""
KEPT = 4
"""For how many sizes of batches objects stay idle."""


@dataclass(frozen=True)
class Moreau(BatchedSolver):
    """Moreau (Nobel, Diamond and Barratt 2026): a whole batch in one compiled call, in as many threads as there are.

    Quadratic programs of up to 500 variables are tried by a dual active-set method, whose answers are exact and which
    starts from an element's own active set.  Elements that it does not solve, and all other problems, are for an
    interior-point method, which takes every cone but the dual ones and starts near an element's last solution.

    Data on an accelerator are solved there if Moreau's package for it is installed, else on the CPU.

    Args:
        max_iterations: of one element; the interior-point method does at most 200.
        method: ``"active_set"`` or ``"ipm"`` alone; None is the choice above.

    Raises:
        ValueError: the method is unknown or, in a solve, the active-set method is asked for curved cones.
    """

    tolerance: float = 1e-9
    max_iterations: int = 10_000
    method: str | None = None

    name: ClassVar[str] = "MOREAU"
    package: ClassVar[str] = "moreau_cpu"  # the compiled part
    pip_name: ClassVar[str] = "moreau"
    finest_tolerance: ClassVar[float] = 1e-11
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonnegative", "second_order", "semidefinite", "exponential", "power"}),
        quadratic=True,
        warm_start=True,
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "tol": "tolerance",
        "tol_gap_abs": "tolerance",
        "tol_gap_rel": "tolerance",
        "tol_feas": "tolerance",
        "primal_tol": "tolerance",
        "max_iter": "max_iterations",
        "max_iters": "max_iterations",
        "iter_limit": "max_iterations",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in (None, ACTIVE_SET, IPM):
            raise ValueError(f"method is {self.method!r}; it must be {ACTIVE_SET!r}, {IPM!r}, or None.")

    def solution_error(self, problem: ConicProblem) -> float:
        # The gap is what converges: on curved cones its root bounds the distance to the solution.
        return self.tolerance if problem.structure.cones.is_polyhedral else self.tolerance**0.5

    def at_once(self, problem: ConicProblem, executor: Executor | None) -> Begun | None:
        answer = answered(problem, executor, lambda factor: self.solve_posed(problem, (), executor))
        return None if answer is None else Begun(answer, judged_flawless(answer, self.name))

    def solve_batch(self, problem: ConicProblem, states: States, executor: Executor | None) -> BatchAnswers:
        self.module()
        structure, size, q = problem.structure, problem.batch_size, problem.data.q
        if self.method == ACTIVE_SET and not structure.cones.is_polyhedral:
            raise ValueError("the active-set method of MOREAU has no curved cones; use method='ipm' or None.")
        data = [datum.detach() for datum in problem.data]
        lower, upper = (per_element(bound, size).isfinite().cpu().numpy() for bound in data[4:])
        point = ConicPoint(*(q.new_empty(size, length) for length in (structure.n, structure.m, structure.n)))
        slack, iterations = torch.empty_like(point.y), torch.empty(size, dtype=torch.int64)
        statuses: list[Status] = [Status.NUMERICAL_ERROR] * size
        kept: list[Any] = [None] * size
        for places, finite_lower, finite_upper in groups_by_bounds(lower, upper):
            form = MoreauForm(structure, finite_lower, finite_upper)
            starts = [states[place % len(states)] if states else None for place in places]
            P = problem.symmetric_P.detach()
            task = _Task(self, form, P, *row_form(form, data), starts, 1).select(places, size)
            answer = self._solved(task, executor)
            own_point, own_slack = in_problem_form(form, answer.x, answer.z, answer.s)
            index = as_index(places, q.device)
            for target, values in zip((*point, slack), (*own_point, own_slack), strict=True):
                target[index] = values
            iterations[places] = answer.iterations
            ends = map(_State, answer.methods, answer.x.unbind(), answer.z.unbind(), answer.s.unbind())
            for place, status, state in zip(places, answer.statuses, ends, strict=True):
                statuses[place] = _STATUSES[status]
                if status == _SOLVED:
                    kept[place] = state
        return BatchAnswers(point, slack, statuses, iterations, kept)

    def _solved(self, task: _Task, executor: Executor | None) -> Answer:
        """The answer to a batch, in one call, or as many as its work and the executor ask for."""
        size, threads = task.size, worker_count(None) if executor is None else 1
        calls = -(-size // task.room(threads))
        if executor is None:
            executor = SerialExecutor()
        else:
            calls = max(calls, len(split(size, executor, per_worker=1)))
        task = task._replace(threads=threads)
        if calls == 1:
            return _solve_task(task)
        edges = [round(call * size / calls) for call in range(calls + 1)]
        chunks = [list(range(start, stop)) for start, stop in pairwise(edges)]
        return joined(run_tasks(_solve_task, [task.select(chunk, size) for chunk in chunks], executor))


class _State(NamedTuple):
    """Where an element's solve ended, in Moreau's form; what the next one starts from."""

    method: str
    x: Tensor
    z: Tensor
    s: Tensor

    def fits(self, layout: Layout) -> bool:
        return self.x.numel() == layout.n and self.z.numel() == layout.m


class _Task(NamedTuple):
    """Elements to solve, as plain data that a process can be sent."""

    solver: Moreau
    form: MoreauForm
    P: Tensor  # (nnz,) if all elements share it, or (k, nnz)
    A: Tensor
    q: Tensor  # (k, n)
    b: Tensor  # (k, m)
    starts: list[State]
    threads: int

    @property
    def size(self) -> int:
        return self.q.shape[0]

    def select(self, places: list[int], size: int) -> _Task:
        """Some of ``size`` elements, each with its own row of what not all of them share."""
        whole = len(places) == size
        chosen: list[Tensor] = []
        for name in ("P", "A", "q", "b"):
            datum: Tensor = getattr(self, name)
            if datum.ndim == 2 and not (whole and datum.shape[0] == size):
                datum = datum[as_index(places, datum.device) % datum.shape[0]]
            chosen.append(datum)
        P, A, q, b = chosen
        starts = self.starts if len(self.starts) == len(places) else [self.starts[place] for place in places]
        return self._replace(P=P, A=A, q=q, b=b, starts=starts)

    def room(self, threads: int) -> int:
        """How many elements one call takes."""
        layout = self.form.layout
        order = layout.n + layout.m
        width = min(order, 4 * layout.size // order + 1)
        work = layout.n**2 * order if self.is_quick else 4 * order * width**2
        return max(2 * threads, int(WORK * threads / max(work, 1)))

    @property
    def is_quick(self) -> bool:
        """Whether the active-set method is to be tried."""
        if self.solver.method is not None:
            return self.solver.method == ACTIVE_SET
        layout = self.form.layout
        sized = layout.n <= DENSE and layout.m <= max(DENSE, 2 * layout.n)
        return sized and layout.cones.is_polyhedral and bool(self.P.any())


def _solve_task(task: _Task) -> Answer:
    every, quick = list(range(task.size)), task.is_quick
    if not quick:
        return _by_interior_points(task, every)
    answer = _call(task, ACTIVE_SET, every, _active_sets(task))
    if task.solver.method == ACTIVE_SET:
        return answer
    answer, fine = _corrected(task, answer)
    # Of duplicated equalities it makes a numerical error, of what is infeasible no certificate (moreau 0.4.1).
    open_ = [
        place
        for place, status in enumerate(answer.statuses)
        if status not in _LIMITS and not (status == _SOLVED and fine[place])
    ]
    return answer.replaced(open_, _by_interior_points(task, open_)) if open_ else answer


def _by_interior_points(task: _Task, places: list[int]) -> Answer:
    """Elements with a state start from it, in a call of their own; those that it leads nowhere start again without."""
    layout, states = task.form.layout, task.starts
    warm = [place for place in places if isinstance(states[place], _State) and states[place].fits(layout)]
    if not warm:
        return _call(task, IPM, places, None)
    x, z, s = (torch.stack([getattr(states[place], name) for place in warm]) for name in ("x", "z", "s"))
    answer = _call(task, IPM, warm, (x, z, s))
    again = [index for index, status in enumerate(answer.statuses) if status != _SOLVED and status not in _LIMITS]
    if again:
        answer = answer.replaced(again, _call(task, IPM, [warm[index] for index in again], None))
    cold = sorted(set(places) - set(warm))
    if not cold:
        return answer
    found = [*warm, *cold]
    whole = joined([answer, _call(task, IPM, cold, None)])
    return whole.reordered(sorted(range(len(found)), key=found.__getitem__))


def _active_sets(task: _Task) -> tuple[Tensor, Tensor, Tensor] | None:
    """Starts of the active-set method: multipliers, whose signs are the active set; zeros are a cold start."""
    layout = task.form.layout
    fitting = [isinstance(state, _State) and state.method == ACTIVE_SET and state.fits(layout) for state in task.starts]
    if not any(fitting):
        return None
    nothing = task.q.new_zeros(layout.m)
    z = torch.stack([state.z if fits else nothing for state, fits in zip(task.starts, fitting, strict=True)])
    return torch.zeros_like(task.q), z, torch.zeros_like(z)


def _corrected(task: _Task, answer: Answer) -> tuple[Answer, list[bool]]:
    """The answer without the bias of a singular P, and which elements are stationary but for rounding.

    A minimiser x of ``½ xᵀPx + qᵀx + ½ ε |x|²`` leaves the gradient ``r = P x + q + Aᵀz = -ε x``.  With q + r for q the
    same method takes a proximal-point step ``½ xᵀPx + qᵀx + ½ ε |x - x₋|²``, whatever ε is.
    """
    gradient, scale = _stationarity(task, answer)
    size = gradient.abs().amax(1)
    for _ in range(CORRECTIONS):
        biased = (size > EXACT * scale) & (size <= BIASED * scale)
        if not bool(biased.any()):
            break
        moved = task._replace(q=torch.where(biased[:, None], task.q + gradient, task.q))
        start = torch.zeros_like(answer.x), answer.z, torch.zeros_like(answer.z)
        again = _call(moved, ACTIVE_SET, list(range(task.size)), start)
        places = elements_where(biased)
        answer = answer.replaced(places, again.reordered(places))
        gradient, scale = _stationarity(task, answer)
        size = gradient.abs().amax(1)
    return answer, flags(size <= EXACT**0.75 * scale)


def _stationarity(task: _Task, answer: Answer) -> tuple[Tensor, Tensor]:
    """``P x + q + Aᵀz``, (k, n), and the size of its terms, (k,), at least 1; NaN where x is not finite."""
    layout, size, x, z = task.form.layout, task.size, answer.x, answer.z
    quadratic = task.form.structure.quadratic.matvec(task.P, x)
    if layout.A_columns.size == layout.m * layout.n:  # row by row
        linear = (z[:, None] @ task.A.reshape(-1, layout.m, layout.n))[:, 0]
    else:
        row_of_entry = from_numpy(np.repeat(np.arange(layout.m), np.diff(layout.A_offsets))).to(x.device)
        column_of_entry = from_numpy(layout.A_columns).to(x.device)
        linear = torch.zeros_like(x).index_add(1, column_of_entry, per_element(task.A, size) * z[:, row_of_entry])
    scale = 1.0 + torch.maximum(quadratic.abs().amax(1), linear.abs().amax(1))
    return quadratic + task.q + linear, scale


def _call(task: _Task, method: str, places: list[int], start: tuple[Tensor, Tensor, Tensor] | None) -> Answer:
    """One compiled call, by an object out of the cache of idle ones."""
    pause()
    size, layout, solver = len(places), task.form.layout, task.solver
    task = task.select(places, task.size)
    device = task.q.device
    # The threads of an object do not outlive a fork, and a solve in the child would wait for them (moreau 0.4.1).
    family = (solver, solver.shortest, *task.form.key, method, os.getpid(), str(device))
    key = (*family, size, task.threads)
    made: Compiled | OnDevice | None = workspaces.take(key)
    if made is None:
        limits = Limits(solver.tolerance, solver.max_iterations, solver.shortest, solver.verbose)
        if method == IPM and on_device(device):
            made = OnDevice(layout, size, limits, device.type)
        else:
            made = Compiled(layout, method, size, limits, task.threads)
    answer = made.solve(Inputs(task.P, task.A, task.q, task.b, start))
    workspaces.put(key, family, made, memory(layout, method, size), KEPT)
    return answer
