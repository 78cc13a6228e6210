"""The solver of declarative nodes: a node's own where it has one, else generic ones."""

from __future__ import annotations

import functools
import math
import time
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import elements_where, flags, integers, rows_where
from lpgd.execution.deadline import deadline, is_over
from lpgd.execution.progress import advance, current
from lpgd.execution.threads import without_autocast
from lpgd.execution.torch_isolation import isolated_torch
from lpgd.nodes.base import NodeAnswer
from lpgd.problems.base import States, is_surely_finite
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.node.structure import NodePoint
from lpgd.problems.solution import Rows
from lpgd.solvers.base import Solver
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.solvers.node.barrier import minimise_with_barrier
from lpgd.solvers.node.constrained import Minimise, method_of_multipliers, warm_point
from lpgd.solvers.node.descent import Descent, lbfgs, newton
from lpgd.solvers.node.lengths import solve_in_lengths
from lpgd.solvers.node.polish import ConstrainedResult, is_minimiser, polish
from lpgd.solvers.node.scipy_minimise import scipy_minimise
from lpgd.solvers.node.sparse import Sparsity, find_sparsity
from lpgd.solvers.node.sparse_newton import sparse_newton
from lpgd.status import Status, warn

__all__ = ["Algorithm", "NodeSolver"]

Algorithm = Literal["own", "newton", "lbfgs", "scipy", "barrier"]

NEWTON_LIMIT = 300
"""Up to this many variables, matrices of second derivatives are formed by default."""


@dataclass(frozen=True)
class NodeSolver(Solver[NodeProblem, NodeSolution]):
    """Minimises the problems of a declarative node, each element converging alone.

    Args:
        tolerance: relative size of the gradient that is enough for a generic solver; 0 goes as far as the dtype does.
        algorithm: ``"own"``: the node's own solver where it has one, else ``"newton"`` up to 300 variables and
            ``"lbfgs"`` beyond.  The generic ones take warm starts; with constraints they are the inner solver of the
            method of multipliers, ended by Newton's method on the optimality conditions.  ``"scipy"`` is
            ``scipy.optimize.minimize`` (SLSQP or L-BFGS-B), one element after the other.  ``"barrier"`` answers the
            minimisers of ``f - μ Σ log(-g)`` (:mod:`lpgd.solvers.node.barrier`), which have a derivative at kinks too.
        barrier: μ > 0 of that, in units of the objective.
        time_limit, batch_time_limit: seconds; as elements are solved side by side, the shorter one ends them all.  What
            has not converged by then has ``Status.TIME_LIMIT``.  Forward and each perturbed solve count for themselves.
            Generic solvers end there, and nodes' own that iterate: optimal control, transport, pooling, poses, on the
            sphere, powers, Lanczos and other iterations for eigenvectors.  Closed formulas and decompositions (least
            squares, projections, rotations, spectral functions, total variation, the whole of a spectrum, a truncated
            quadratic) are not interrupted.
        max_iterations: of one element (of each round, where there are constraints); None is 200 for Newton's method,
            2000 for the others.

    Several solutions: a generic solver descends from where it starts, which is ``BaseNode.initial`` or the warm start,
    and finds the local minimiser there.  The perturbed solves of LPGD start from the solution, so that both ends of a
    difference belong to one branch.
    """

    algorithm: Algorithm = "own"
    max_iterations: int | None = None
    barrier: float = 1e-3
    time_limit: float | None = field(default=None, kw_only=True)
    batch_time_limit: float | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "NODE"
    is_torch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ValueError(f"algorithm is {self.algorithm!r}; it must be one of {', '.join(get_args(Algorithm))}.")
        if not 0 < self.barrier < math.inf:
            raise ValueError(f"barrier is {self.barrier}; it must be positive and finite.")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance is {self.tolerance}; it must be at least 0 and below 1.")
        for name in ("time_limit", "batch_time_limit"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} is {limit}; it must be positive, or None for no limit.")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations is {self.max_iterations}; it must be at least 1, or None.")

    @property
    def takes_states(self) -> bool:
        return True

    def solution_error(self, problem: NodeProblem) -> float:
        """The precision of the dtype with three digits lost, or the tolerance."""
        return max(self.tolerance, 1e3 * torch.finfo(problem.dtype).eps)

    def solve(self, problem: NodeProblem, states: States = (), executor: Executor | None = None) -> NodeSolution:
        """Solve every element of a batch, in this thread and on the device of the inputs."""
        started = time.perf_counter()
        start = _starts(states, problem.batch_size) if len(states) else None
        finite = None if problem.is_surely_finite() else rows_where(problem.finite())
        finite = None if finite is not None and len(finite) == problem.batch_size else finite
        finite_problem = problem if finite is None else problem.select(finite)
        if start is not None:
            start = torch.where(torch.isfinite(start), start, 0).to(problem.dtype)
            start = start if finite is None else start[finite]
        # Autocast would compute products of float32 in half precision.
        no_grad = torch.no_grad() if torch.is_grad_enabled() else nullcontext()
        limits = [limit for limit in (self.time_limit, self.batch_time_limit) if limit is not None]
        limit = deadline(min(limits, default=None))
        with no_grad, without_autocast(problem.device.type), isolated_torch(), limit:
            answer = self._answer(finite_problem, start)
            if is_over():
                unfinished = (Status.ITERATION_LIMIT, Status.NUMERICAL_ERROR, Status.INACCURATE)
                statuses = tuple(Status.TIME_LIMIT if one in unfinished else one for one in answer.statuses)
                answer = answer._replace(statuses=statuses)
        advance(current(), problem.batch_size)
        seconds = time.perf_counter() - started
        solution = self._solution(finite_problem, answer, seconds)
        return solution if finite is None else _spread(problem, solution, finite)

    def _answer(self, problem: NodeProblem, start: Tensor | None) -> NodeAnswer:
        node = problem.node
        if problem.batch_size == 0 or problem.structure.n == 0:  # nothing to solve, or nothing to choose
            size = problem.batch_size
            nothing = problem.data[0].new_zeros(size, *problem.structure.shape)
            return NodeAnswer(nothing, (Status.SOLVED,) * size, np.zeros(size, dtype=np.int64))
        if self.algorithm == "own" and not problem.is_foreign:
            y = None if start is None else problem.shaped(start)
            inputs = tuple(problem.data)
            from_node = node.solve(inputs, y) if problem.is_plain else node.solve_tilted(inputs, problem.added, y)
            if from_node is not None:
                return _checked(from_node, problem)
        if not problem.traits.has_kkt:
            raise TypeError(
                f"{node.name} is not smooth: the generic solvers cannot solve it with such terms added (give "
                "its own solve_tilted)."
            )
        if start is not None:
            return self._generic(problem, start, True)
        start = node.initial(problem.structure.shape, *problem.data).reshape(problem.batch_size, -1).to(problem.dtype)
        answer = self._generic(problem, start, False)
        if answer.statuses.count(Status.SOLVED) < problem.batch_size:
            _warn_of_start(problem, start)
        return answer

    def _generic(self, problem: NodeProblem, x: Tensor, known: bool) -> NodeAnswer:
        """Minimise from x; ``known`` tells that it is an earlier solution."""
        if self.algorithm == "scipy":
            return self._by_scipy(problem, x)
        h, g = problem.constraints(x)
        if self.algorithm == "barrier" and g.shape[-1]:
            found = minimise_with_barrier(problem, x, self.barrier, self._minimise)
            return _from_codes(problem, found.point.x, found.status, found.iterations, found.point.nu, found.point.lam)
        if not h.shape[-1] and not g.shape[-1]:
            found = self._minimise(AugmentedLagrangian(problem), x)
            if self._is_newton(x) or self.tolerance:
                return _from_codes(problem, *found, h, g)
            # Where values cannot tell any more L-BFGS stops, and Newton's method goes on.
            fine = found.status == int(Status.SOLVED)
            point, _, more = polish(problem, NodePoint(torch.where(fine[:, None], found.x, 0), h, g), 5)
            x = torch.where(fine[:, None], point.x, found.x)
            return _from_codes(problem, x, found.status, found.iterations + more, h, g)
        return self._constrained(problem, x, known)

    def _by_scipy(self, problem: NodeProblem, x: Tensor) -> NodeAnswer:
        scaled, _ = problem.in_units(x)  # SciPy's tolerances are absolute
        x, status, iterations = scipy_minimise(scaled, x, self.tolerance or 1e-10, self.max_iterations or 2000)
        # Derivatives are as wrong as the solution is; and a line search at the end of precision ends as a failure.
        known = torch.where(torch.isfinite(x), x, 0)
        point, fine, more = polish(problem, warm_point(problem, known), 10)
        reach = 1 + known.abs().amax(-1)
        near = (fine == int(Status.SOLVED)) & ((point.x - x).abs().amax(-1) <= 1e-3 * reach)
        solved = near & is_minimiser(problem, point)  # no saddle where it started, by symmetry
        status = torch.where(solved, int(Status.SOLVED), torch.where(near, int(Status.NUMERICAL_ERROR), status))
        return _from_codes(problem, torch.where(near[:, None], point.x, x), status, iterations + more)

    def _constrained(self, problem: NodeProblem, x: Tensor, known: bool) -> NodeAnswer:
        sparsity = self._sparsity(problem, x)
        minimise: Minimise = (
            self._minimise if sparsity is None else functools.partial(self._minimise_sparse, sparsity=sparsity)
        )

        def cold(problem: NodeProblem, x: Tensor) -> ConstrainedResult:
            return method_of_multipliers(problem, x, minimise, sparsity=sparsity)

        def warm(problem: NodeProblem, x: Tensor) -> ConstrainedResult:
            answer = polish(problem, warm_point(problem, x), sparsity=sparsity)
            fine = (answer.status == int(Status.SOLVED)) & is_minimiser(problem, answer.point, sparsity)
            failed = rows_where(~fine)
            if len(failed):
                again = cold(problem.select(failed), x[failed])
                for tensor, new in zip((*answer.point, answer.status), (*again.point, again.status), strict=True):
                    tensor[failed] = new
                answer.iterations[failed] += again.iterations
            return answer

        (x, nu, lam), status, iterations = solve_in_lengths(warm if known else cold, warm, problem, x)
        return _from_codes(problem, x, status, iterations, nu, lam)

    def _minimise(self, function: AugmentedLagrangian, x: Tensor) -> Descent:
        if self._is_newton(x):
            return newton(function, x, self.tolerance, self.max_iterations or 200)
        return lbfgs(function, x, self.tolerance, self.max_iterations or 2000)

    def _minimise_sparse(self, function: AugmentedLagrangian, x: Tensor, *, sparsity: Sparsity) -> Descent:
        if function.nu is None:
            return self._minimise(function, x)
        return sparse_newton(function, x, sparsity, self.tolerance, self.max_iterations or 200)

    def _is_newton(self, x: Tensor) -> bool:
        few = x.shape[-1] <= NEWTON_LIMIT
        return self.algorithm == "newton" or (self.algorithm in ("own", "barrier") and few)

    def _sparsity(self, problem: NodeProblem, x: Tensor) -> Sparsity | None:
        """The patterns of the matrices of many variables, where they have few entries."""
        if x.shape[-1] <= NEWTON_LIMIT or self.algorithm == "lbfgs" or not problem.batch_size:
            return None
        h, g = problem.constraints(x)
        return find_sparsity(problem, NodePoint(x, torch.zeros_like(h), torch.zeros_like(g)))

    def _solution(self, problem: NodeProblem, answer: NodeAnswer, seconds: float) -> NodeSolution:
        size = problem.batch_size
        x = answer.y.detach()
        x = x if x.dtype == problem.dtype else x.to(problem.dtype)
        x = x if x.ndim == 2 and size else x.reshape(size, problem.structure.n)
        statuses = tuple(answer.statuses)
        if statuses.count(Status.SOLVED) < size:
            statuses = tuple(map(Status, statuses))
        if not is_surely_finite(x):
            missing = ~torch.isfinite(x).all(-1)
            statuses = tuple(
                Status.NUMERICAL_ERROR if lost and status.usable else status
                for status, lost in zip(statuses, flags(missing), strict=True)
            )
        known = answer.iterations.cpu() if isinstance(answer.iterations, Tensor) else answer.iterations
        iterations = np.asarray(known, dtype=np.int64)
        if iterations.shape != (size,):
            iterations = np.broadcast_to(iterations, (size,))
        return NodeSolution(
            problem,
            x,
            statuses,
            iterations,
            np.zeros(size),
            np.full(size, seconds / max(size, 1)),
            Rows(x),
            answer.aux,
            answer.nu,
            answer.lam,
            self.barrier if self.algorithm == "barrier" and answer.lam is not None and answer.lam.shape[-1] else 0.0,
        )


def _warn_of_start(problem: NodeProblem, x: Tensor) -> None:
    """Warn about functions that are not finite, or have no derivative, where a generic solver starts."""
    by_role = {
        "objective": (problem.objective(x)[:, None], torch.func.grad(lambda x: problem.objective(x).sum())(x)),
        "constraints": (*problem.constraints(x), problem.jacobian_product(x)(torch.ones_like(_joined(problem, x)))),
    }
    for role, values in by_role.items():
        bad = elements_where(~torch.isfinite(torch.cat(values, -1)).all(-1))
        if bad:
            warn(
                f"the {role} of {problem.node.name}, or the derivatives, are not finite where the solver starts, for "
                f"{len(bad)} of {len(x)} elements: start inside of the domain (Node(initial=...); it is y = 0 if not "
                "given), or make the functions smooth there."
            )


def _joined(problem: NodeProblem, x: Tensor) -> Tensor:
    return torch.cat(problem.constraints(x), -1)


def _from_codes(
    problem: NodeProblem,
    x: Tensor,
    status: Tensor,
    iterations: Tensor,
    nu: Tensor | None = None,
    lam: Tensor | None = None,
) -> NodeAnswer:
    """The answer of a generic solver, whose points are flattened, and whose statuses are codes."""
    return NodeAnswer(problem.shaped(x), tuple(map(Status, integers(status))), iterations, None, nu, lam)


def _checked(answer: NodeAnswer, problem: NodeProblem) -> NodeAnswer:
    """A node's own answer.

    Raises:
        ValueError: it has another shape, or another number of statuses.
    """
    size, shape, name = problem.batch_size, problem.structure.shape, problem.node.name
    if tuple(answer.y.shape) != (size, *shape):
        raise ValueError(
            f"the solver of {name} answered y of shape {tuple(answer.y.shape)}; expected {(size, *shape)}."
        )
    if len(answer.statuses) != size:
        raise ValueError(f"the solver of {name} answered {len(answer.statuses)} statuses for {size} elements.")
    return answer


def _starts(states: States, size: int) -> Tensor:
    """(B, n) minimisers to start from, which repeat where the batch is made of copies."""
    if isinstance(states, Rows):
        return states.tensor if len(states) == size else states.tensor.repeat(-(-size // len(states)), 1)[:size]
    return torch.stack([states[element % len(states)] for element in range(size)])


def _spread(problem: NodeProblem, solution: NodeSolution, elements: Tensor) -> NodeSolution:
    """The solution of some elements as one of the whole batch, whose other elements have invalid data."""
    size, places = problem.batch_size, integers(elements)

    def spread(tensor: Tensor, value: float) -> Tensor:
        return tensor.new_full((size, *tensor.shape[1:]), value).index_copy(0, elements, tensor)

    x = spread(solution.x, torch.nan)
    statuses, iterations, seconds = [Status.INVALID_DATA] * size, np.zeros(size, dtype=np.int64), np.zeros(size)
    iterations[places], seconds[places] = solution.iterations, solution.solve_seconds
    for place, status in zip(places, solution.statuses, strict=True):
        statuses[place] = status
    aux = solution.aux
    if aux is not None:
        count = solution.batch_size
        tensors = [tensor if tensor.shape[0] == 1 < count else spread(tensor, 0) for tensor in aux]
        aux = type(aux)(*tensors) if hasattr(aux, "_fields") else tuple(tensors)
    multipliers = (solution.nu, solution.lam)
    nu, lam = (tensor if tensor is None else spread(tensor, 0) for tensor in multipliers)
    return NodeSolution(
        problem, x, tuple(statuses), iterations, np.zeros(size), seconds, Rows(x), aux, nu, lam, solution.barrier
    )
