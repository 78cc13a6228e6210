"""The one way into autograd: a Function that solves, and one that hands cotangents and tangents to a gradient method.

Everything here works on data with one leading batch dimension, in the dtype that their class of problems computes in
(float64 but for declarative nodes); types, devices and batch shapes of the user are dealt with around it, by
differentiable operations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from lpgd.arrays import plain
from lpgd.execution.progress import progress
from lpgd.execution.threads import one_torch_thread, torch_threads, without_autocast
from lpgd.execution.torch_isolation import isolated_torch
from lpgd.gradients import relaxed as derivatives
from lpgd.gradients.base import GradientInfo, GradientMethod, check_cotangent
from lpgd.gradients.second import check_twice, second_derivative
from lpgd.problems.base import Data, Point, States
from lpgd.problems.conic.solution import Violation
from lpgd.problems.lanes import Lanes, QuickFunction, Source, joined, mapped, over_vectors, separated
from lpgd.problems.needed_gradients import needing_gradients_of
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.solvers.failures import ON_ERROR, Explain, OnError, check_solution
from lpgd.solvers.relaxed import relax
from lpgd.status import SolverError, Status, warn

__all__ = ["CallInfo", "solve", "threads_of"]

_log = logging.getLogger("lpgd")


@dataclass(eq=False, repr=False)
class CallInfo:
    """The record of one call of a layer.

    Attributes:
        solution: the forward solution: statuses, times, and what its class has beside that; None before there is one.
        gradients: one record for each backward (or forward-mode) pass through this call, in order.
        backward_seconds: wall-clock time of those passes together.
        choice: what :attr:`solver` is the text of.
        usable: (B, 1) which elements have a solution; within ``torch.func.vmap`` those of a lane, where all else is of
            the batch of all lanes.
        violation: with ``on_error="relax"`` by how much each element violates its constraints, differentiable.
    """

    solution: Any = None
    gradients: list[GradientInfo] = field(default_factory=list)
    backward_seconds: float = 0.0
    choice: object = ""
    usable: Tensor | None = None
    violation: Violation | None = None

    @property
    def solver(self) -> str:
        """Which solver solved the problems, and why that one."""
        return str(self.choice)

    def __repr__(self) -> str:
        lines = [f"solver: {self.solver}"] if self.solver else []
        lines.append(f"solution: {self.solution}")
        earlier = len(self.gradients) - _SHOWN
        lines += [f"gradients: {earlier} earlier ones"] if earlier > 0 else []
        lines += [f"gradient: {gradient}" for gradient in self.gradients[-_SHOWN:]]
        lines += [f"backward_seconds: {self.backward_seconds:.3g}"] if self.gradients else []
        return "\n  ".join(["CallInfo", *lines])

    @property
    def statuses(self) -> tuple[Status, ...]:
        return self.solution.statuses if self.solution is not None else ()


_SHOWN = 3
"""How many gradients a record prints."""


@dataclass(frozen=True, eq=False)
class Call:
    """How one call is solved and differentiated."""

    solver: AnySolver
    gradient: GradientMethod
    on_error: OnError
    executor: Executor | None
    states: States
    info: CallInfo
    explain: Explain | None = None
    progress: bool = False
    known: AnySolution | None = None


def solve(
    problem: AnyProblem,
    *,
    solver: AnySolver,
    gradient: GradientMethod,
    on_error: OnError = "raise",
    executor: Executor | None = None,
    states: States = (),
    info: CallInfo | None = None,
    explain: Explain | None = None,
    progress: bool = False,
    known: AnySolution | None = None,
) -> Any:
    """Solve a batch of problems of any class, differentiably in all their data.

    Args:
        problem: of a class that solver and method take.
        solver: solves it, and what the gradient method perturbs.
        gradient: the gradient method of this call.
        on_error: ``"raise"`` names every element without a solution; ``"nan"`` fills its rows and gives it a zero
            gradient; ``"warn"`` warns and returns the solver's last iterate, or NaN, with a zero gradient; ``"relax"``
            gives conic programs without a feasible point the solution of the closest feasible one, with its gradient,
            and the other failures raise.
        executor: where the work runs; None is the solver's own choice.
        states: warm-start states of a solution of such a batch (``Solution.states``).
        info: filled with the record of this call.
        explain: what messages say of an element without a solution beside its status.
        progress: whether to show a progress bar where it takes long.
        known: the solution, if there is one already.

    Returns:
        The solutions: those parts of a point of the problem's class that losses see (``Solution.outputs``).

    Raises:
        SolverError: with ``on_error="raise"``; it carries the statuses and the indices of the failed elements.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}; it must be one of {', '.join(ON_ERROR)}.")
    info = info or CallInfo()
    call = Call(solver, gradient, on_error, executor, states, info, explain, progress, known)
    *outputs, usable = _SolveFunction.apply(call, problem, *problem.data, *getattr(problem, "attached", ()))
    info.usable = usable
    return info.solution.outputs._make(outputs)


def threads_of(solver: AnySolver) -> AbstractContextManager[None]:
    """What a solve is to run within."""
    return isolated_torch() if solver.is_torch else one_torch_thread()


class _SolveFunction(QuickFunction):
    @staticmethod
    def forward(call: Call, problem: AnyProblem, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(problem.data)
        problem = problem.with_data(problem.data._make(plain(datum) for datum in tensors[:count]))
        if tensors[count:]:
            problem = cast(Any, problem).with_attached([plain(tensor) for tensor in tensors[count:]])
        with threads_of(call.solver), progress(call.progress, "solve", problem.batch_size):
            solution = call.known
            if solution is None or solution.batch_size != problem.batch_size:  # lanes of what was not in the data
                solution = call.solver.solve(problem, call.states, call.executor)
            if call.on_error == "relax":
                solution = relax(solution, call.solver, call.executor)
        check_solution(solution, call.on_error, call.explain)
        call.info.solution = solution
        usable = solution.usable.unsqueeze(1)
        if call.on_error == "nan" and solution.failed:
            filled = torch.where(usable, 0.0, torch.nan)
            return *(output + filled for output in solution.outputs), usable
        # Tensors of their own: the outputs know this node, which knows the solution, which must not know the outputs.
        return *(output.detach() for output in solution.outputs), usable

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, problem, *tensors = inputs
        ctx.call, ctx.source = call, Source(call.info.solution)
        data, (*outputs, usable) = tensors[: len(problem.data)], output
        ctx.attached = len(tensors) - len(data)
        ctx.mark_non_differentiable(usable)
        # Saved so that autograd notices data or outputs that were changed in place before the backward pass.
        ctx.save_for_backward(*data, *outputs)
        ctx.save_for_forward(*data, *outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        data = ctx.source.solution.problem.data
        count = len(data)
        needs = ctx.needs_input_grad[2 : 2 + count]
        needed = frozenset(place for place, one in enumerate(needs) if one)
        tensors = (*cotangents[:-1], *ctx.saved_tensors)
        gradient = over_vectors(_DerivativeFunction, (ctx.call, ctx.source, needed), tensors)
        notices = ctx.call.info.gradients[-1].notices
        names = [name for name, is_asked in zip(data._fields, needs, strict=True) if is_asked and name in notices]
        for text in dict.fromkeys(notices[name] for name in names):
            warn(text)
        gradient = (datum_gradient if needed else None for datum_gradient, needed in zip(gradient, needs, strict=True))
        return None, None, *gradient, *(None,) * ctx.attached

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        count = len(ctx.source.solution.problem.data)
        data_tangents = tangents[2 : 2 + count]  # the first two belong to the call and to the problem
        data = ctx.saved_tensors[:count]
        known = (
            torch.zeros_like(datum) if tangent is None else tangent
            for datum, tangent in zip(data, data_tangents, strict=True)
        )
        tensors = (*known, *ctx.saved_tensors)
        return *over_vectors(_DerivativeFunction, (ctx.call, ctx.source, None), tensors), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[object, object]:
        """All lanes are solved as one batch; what they share stays shared."""
        call, problem, *tensors = inputs
        problem, lanes, dims, count = mapped(problem), info.batch_size, in_dims[2:], len(problem.data)
        size, kinds = problem.batch_size, problem.datum_ndims
        # The problem as the caller made it holds the lanes hidden: here its data are those of the first one.
        first = [tensor if dim is None else tensor.select(dim, 0) for tensor, dim in zip(tensors, dims, strict=True)]
        problem = problem.with_data(problem.data._make(first[:count]))
        data = [
            joined(datum, dim, lanes, size, ndim, whole=False)
            for datum, dim, ndim in zip(tensors[:count], dims[:count], kinds, strict=True)
        ]
        attached = [
            joined(tensor, dim, lanes, size, tensor.ndim - (1 if dim is None else 2))
            for tensor, dim in zip(tensors[count:], dims[count:], strict=True)
        ]
        more = (attached,) if attached else ()
        problem = problem.lanes(lanes, problem.data._make(data), *more)
        outputs = _SolveFunction.apply(call, problem, *problem.data, *attached)
        return tuple(separated(output, lanes) for output in outputs), (0,) * len(outputs)


class _DerivativeFunction(QuickFunction):
    """One reverse or forward pass.

    As a function of its own it is given plain tensors under torch.func as well, and can be differentiated once more
    where the gradient method is able to; where no derivative exists, it is refused instead of being zero.
    """

    @staticmethod
    def forward(call: Call, source: Source, needed: frozenset[int] | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Reverse where ``needed`` says which data need a gradient, forward where it is None."""
        started, solution = time.perf_counter(), source.resolved()
        bar, names = progress(call.progress, "differentiate"), solution.problem.data._fields
        wanted = needing_gradients_of(None if needed is None else frozenset(names[place] for place in needed))
        with threads_of(call.solver), without_autocast(solution.x.device.type), bar, wanted:
            answer, info = _derivative(call, solution, needed is not None, [tensor.resolve_neg() for tensor in tensors])
        call.info.gradients.append(info)
        call.info.backward_seconds += time.perf_counter() - started
        if info.fallbacks:
            _log.info("%s: elements %s fell back: %s.", info.method, info.fallbacks[:10], info.counts)
        return tuple(answer)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.source, needed, *tensors = inputs
        ctx.reverse = needed is not None
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        check_twice(ctx.call.gradient, ctx.source.solution.problem, ctx.reverse)
        head, tensors = (ctx.call, ctx.source, True), (*cotangents, *ctx.saved_tensors)
        return None, None, None, *over_vectors(_SecondFunction, head, tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        check_twice(ctx.call.gradient, ctx.source.solution.problem, ctx.reverse)
        saved = ctx.saved_tensors
        known = (
            torch.zeros_like(tensor) if tangent is None else tangent
            for tensor, tangent in zip(saved, tangents[3:], strict=True)
        )
        return over_vectors(_SecondFunction, (ctx.call, ctx.source, False), (*known, *saved))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[object, object]:
        """One derivative of the batch of all lanes."""
        call, source, needed, *tensors = inputs
        solution = source.solution
        kinds, outputs = mapped(solution.problem).datum_ndims, (1,) * len(solution.outputs)
        direction = outputs if needed is not None else kinds
        # Data that need a gradient have rows of their own, for the gradient has their shape.
        every = needed is None or call.gradient.is_differentiable(solution.problem)
        whole = [every or place in cast(frozenset[int], needed) for place in range(len(kinds))]
        lanes = Lanes(
            info.batch_size,
            source,
            tensors,
            in_dims[3:],
            (*direction, *kinds, *outputs),
            (*(True,) * len(direction), *whole, *(True,) * len(outputs)),
        )

        def derivative(lanes: Lanes) -> tuple[Tensor, ...]:
            source, tensors = lanes.batch()
            if needed is None:
                answer = _DerivativeFunction.apply(call, source, None, *tensors)
                return tuple(separated(change, lanes.count) for change in answer)
            answer = _DerivativeFunction.apply(call, source.with_rows(needed), needed, *tensors)
            return lanes.gradient(answer, needed)

        return _together(derivative, lanes)


def _together(derivative: Callable[[Lanes], tuple[Tensor, ...]], lanes: Lanes) -> tuple[object, object]:
    chunks = [derivative(chunk) for chunk in lanes.chunks()]
    answer = chunks[0] if len(chunks) == 1 else tuple(torch.cat(pieces) for pieces in zip(*chunks, strict=True))
    return answer, (0,) * len(answer)


class _SecondFunction(QuickFunction):
    """The derivative of a reverse pass, which is a function of cotangents, data and outputs."""

    @staticmethod
    def forward(call: Call, source: Source, reverse: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        started, solution = time.perf_counter(), source.resolved()
        count = len(solution.outputs) + len(solution.problem.data) + len(solution.outputs)
        visible = [tensor.resolve_neg() for tensor in tensors]
        direction, saved = visible[:-count], visible[-count:]
        no_autocast = torch.autocast(solution.x.device.type, enabled=False)
        with isolated_torch(), torch_threads(1), torch.enable_grad(), no_autocast:
            answer = second_derivative(call.gradient, solution, reverse, direction, saved)
        call.info.backward_seconds += time.perf_counter() - started
        return answer

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep: see backward."""

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        raise RuntimeError(_TWICE_DIFFERENTIABLE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        raise RuntimeError(_TWICE_DIFFERENTIABLE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[object, object]:
        """One derivative of the batch of all lanes, whose data have a row for each element."""
        call, source, reverse, *tensors = inputs
        solution = source.solution
        kinds, outputs = mapped(solution.problem).datum_ndims, (1,) * len(solution.outputs)
        saved_kinds = (*outputs, *kinds, *outputs)
        every = (*(kinds if reverse else saved_kinds), *saved_kinds)
        lanes = Lanes(info.batch_size, source, tensors, in_dims[3:], every, (True,) * len(every))
        needed = frozenset(range(len(kinds)))

        def derivative(lanes: Lanes) -> tuple[Tensor, ...]:
            source, tensors = lanes.batch()
            answer = _SecondFunction.apply(call, source.with_rows(needed), reverse, *tensors)
            return tuple(separated(change, lanes.count) for change in answer)

        return _together(derivative, lanes)


def _derivative(
    call: Call, solution: AnySolution, reverse: bool, tensors: Sequence[Tensor]
) -> tuple[Iterable[Tensor], GradientInfo]:
    count = len(solution.outputs)
    if not reverse:
        tangent = solution.problem.data._make(tensors[: len(solution.problem.data)])
        change, info = derivatives.jvp(call.gradient, solution, tangent, call.solver, call.executor)
        return tuple(change)[:count], info
    # A loss of a NaN row hands back NaN: zeroed before any sum over shared data.
    cotangents = tensors[:count]
    if solution.failed:
        usable = solution.usable[:, None]
        cotangents = [torch.where(usable, values, 0.0) for values in cotangents]
    cotangent = solution.cotangent(cotangents)
    check_cotangent(cotangent)
    try:
        return derivatives.vjp(call.gradient, solution, cotangent, call.solver, call.executor)
    except SolverError as error:
        if call.on_error in ("raise", "relax") or not error.indices:
            raise
        return _without(call, solution, cotangent, error)


def _without(call: Call, solution: AnySolution, cotangent: Point, error: SolverError) -> tuple[Data, GradientInfo]:
    """The gradient of the other elements, where a backward pass failed for some: theirs is zero."""
    failed = list(error.indices)
    keep = torch.ones(solution.batch_size, 1, dtype=torch.bool, device=solution.x.device)
    keep[failed] = False
    kept = cotangent._make(torch.where(keep, values, 0.0) for values in cotangent)
    gradient, info = derivatives.vjp(call.gradient, solution, kept, call.solver, call.executor)
    for element in failed:
        info.used[element] = "no perturbed solution"
    if call.on_error == "warn":
        warn(f"the backward pass has no gradient for elements {failed[:10]}, which get zero: {error}")
    return gradient, info


_TWICE_DIFFERENTIABLE = (
    "third derivatives of solutions are not computed: detach the second ones, or take finite differences of them."
)
