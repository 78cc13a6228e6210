"""A callable that minimises a linear objective over a set that it alone knows, as the solver of a LinearProblem."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import elements_where
from lpgd.execution.interrupts import pause
from lpgd.execution.progress import Key, advance, current
from lpgd.execution.tasks import SerialExecutor, run_tasks, split
from lpgd.execution.threads import all_torch_threads
from lpgd.problems.base import State, States
from lpgd.problems.linear import LinearProblem, LinearSolution
from lpgd.solvers.base import Solver
from lpgd.status import SolverError, Status, warn

__all__ = ["Oracle", "Sense"]

Sense = Literal["min", "max"]

Array = Any
"""A NumPy array, or a tensor for a callable that takes tensors."""


@dataclass(frozen=True)
class Oracle(Solver[LinearProblem, LinearSolution]):
    """A function from costs to a solution, ``function(costs, *extra)``, for each element of a batch.

    It gets copies of arrays, and may do with them what it likes.  What it returns is checked: an answer of another
    shape or kind is an error that names the element; ``None``, an answer with NaN or infinity, or a
    :class:`~lpgd.Status` is an element without a solution; an exception is raised as a SolverError that names the
    element, with the exception as its cause.  Of perturbed costs, in a backward pass, an exception ends the element
    alone, with a warning: they may be none that the function takes (see ``valid_costs``).

    Args:
        function: the solver; for an executor with processes, one that pickles.
        sense: whether it minimises or maximises.
        batched: it takes all elements at once: costs (k, *shape), each extra input with k rows, and so on.
        as_torch: it takes and returns tensors, on the device of the costs; else NumPy arrays.
        quadratic: it also gets ``rho=`` and ``center=``, and solves with ``(ρ/2) |x - center|²`` added (of ``"max"``:
            subtracted); ρ is 0.0 and the centre None where there is no such term.
        warm_start: it also gets ``start=``, its last answer for this element (batched: a list of them), or None.
        features: a feature map Ψ: the solution is ``features(answer, *extra)``, of the shape of the costs.
        valid_costs: a function from costs to those that the function takes, such as clipping at zero; perturbed costs
            go through it, those of the user do not.
        batch_time_limit: seconds for all elements of a solve together; those that have not begun by then end with
            ``Status.TIME_LIMIT``.  A call of the function that has begun is not interrupted.
    """

    function: Callable[..., Any] = None  # pyright: ignore[reportAssignmentType]  # fields of the base have defaults
    sense: Sense = "min"
    batched: bool = False
    as_torch: bool = False
    quadratic: bool = False
    warm_start: bool = False
    features: Callable[..., Any] | None = None
    valid_costs: Callable[[Any], Any] | None = None
    batch_time_limit: float | None = None

    name: ClassVar[str] = "ORACLE"

    def __post_init__(self) -> None:
        for name in ("function", "features", "valid_costs"):
            value = getattr(self, name)
            if not (callable(value) or (name != "function" and value is None)):
                raise TypeError(f"{name} is {value!r}; it must be callable.")
        if self.batch_time_limit is not None and not self.batch_time_limit > 0:
            raise ValueError(f"batch_time_limit is {self.batch_time_limit}; it must be positive, or None for no limit.")
        if self.sense not in get_args(Sense):
            raise ValueError(f"sense is {self.sense!r}; it must be one of {', '.join(get_args(Sense))}.")

    @property
    def takes_states(self) -> bool:
        return self.warm_start

    def solve(self, problem: LinearProblem, states: States = (), executor: Executor | None = None) -> LinearSolution:
        """Solve every element of a batch, one after the other in this thread where there is no executor.

        Raises:
            SolverError: the function raised; the message names the element.
            ValueError, TypeError: the function returned something else than a solution of the costs' shape, or the
                problem has a quadratic term that it does not take.
        """
        if problem.rho and not self.quadratic:
            raise ValueError("this solver takes no quadratic term (rho > 0): it was declared without quadratic=True.")
        # A solver of the user's own may not be called from several threads unless they say so.
        executor = executor or SerialExecutor()
        valid = elements_where(problem.finite())
        chunks = split(len(valid), executor, per_worker=1 if self.batched else 4)
        tasks = [self._task(problem, [valid[place] for place in chunk], states) for chunk in chunks]
        if self.batch_time_limit is not None:
            end = time.time() + self.batch_time_limit
            tasks = [task._replace(deadline=end) for task in tasks]
        with all_torch_threads():
            results = run_tasks(_solve_batched if self.batched else _solve_each, tasks, executor, away=_count)
        return _assemble(self, problem, tasks, results)

    def _task(self, problem: LinearProblem, elements: list[int], states: States) -> _Task:
        places = [problem.places[element] for element in elements]
        sign = -1.0 if self.sense == "max" else 1.0
        shape, center = problem.structure.shape, problem.center
        return _Task(
            self,
            elements,
            places,
            shape,
            self._array(sign * problem.data.c)[elements].reshape(-1, *shape),
            [self._rows(values, places) for values in problem.extra],
            [states[element % len(states)] for element in elements] if states else [None] * len(elements),
            problem.rho,
            problem.tilted,
            None if center is None else self._array(center)[elements].reshape(-1, *shape),
            current(),
        )

    def _array(self, tensor: Tensor) -> Array:
        return tensor if self.as_torch else _plain(tensor)

    def _rows(self, values: Any, places: list[int]) -> Any:
        """The rows of an extra input, copied where they are numbers."""
        if isinstance(values, Tensor):
            return self._array(values[places])
        return values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]


class _Task(NamedTuple):
    """Elements to solve, as plain data that a process can be sent; all arrays are the task's own."""

    oracle: Oracle
    elements: list[int]
    places: list[int]  # in the batch that the user knows
    shape: tuple[int, ...]
    costs: Array  # (k, *shape)
    extra: list[Any]  # k rows each
    starts: list[State]
    rho: float
    tilted: bool  # costs are perturbed ones
    centers: Array | None  # (k, *shape)
    progress: Key | None  # whom to tell of each element
    deadline: float | None = None  # of the batch, on the clock that processes share

    @property
    def is_over(self) -> bool:
        """Whether no more elements may begin."""
        return self.deadline is not None and time.time() >= self.deadline

    def call(self, costs: Array, extra: list[Any], start: Any, center: Array | None) -> tuple[Any, Any]:
        """What the function answers, and the solution that this is."""
        oracle, keywords = self.oracle, {}
        if self.tilted and oracle.valid_costs is not None:
            costs = oracle.valid_costs(costs)
        if oracle.quadratic:
            keywords |= {"rho": self.rho, "center": center}
        if oracle.warm_start:
            keywords |= {"start": copy.deepcopy(start)}
        if oracle.features is None:
            answer = oracle.function(costs, *extra, **keywords)
            return answer, answer
        again = [_copied(values) for values in extra]
        answer = oracle.function(costs, *extra, **keywords)
        if answer is None or isinstance(answer, Status):
            return answer, answer
        return answer, oracle.features(answer, *again)


def _count(task: _Task) -> None:
    advance(task.progress, len(task.elements))


class _Results:
    """The results of a task's elements, in their order.

    Attributes:
        statuses: one for each.
        x: (k, *shape) in float64, NaN where there is no solution.
        answers: of the user's function; None where there is no solution.
        seconds: time in the function.
        errors: exceptions of the function, by their elements' places in the batch, of perturbed costs.
    """

    def __init__(self, task: _Task) -> None:
        count = len(task.places)
        self.statuses: list[Status] = []
        self.x: Array = torch.empty_like(task.costs) if task.oracle.as_torch else np.empty(task.costs.shape)
        self.answers: list[Any] = [None] * count
        self.seconds = np.zeros(count)
        self.errors: dict[int, Exception] = {}

    def read(self, task: _Task, answer: Any, solution: Any) -> None:
        """Take the next element's solution.

        Raises:
            ValueError, TypeError: it is no array of numbers of the costs' shape.
        """
        index = len(self.statuses)
        place = task.places[index]
        if solution is None or isinstance(solution, Status):
            if isinstance(solution, Status) and solution.usable:
                raise ValueError(
                    f"the solver answered {solution.name} without a solution for element {place}; return the solution."
                )
            self.x[index] = float("nan")
            self.statuses.append(Status.NO_SOLUTION if solution is None else solution)
            return
        oracle = task.oracle
        source = "solver" if oracle.features is None else "feature map"
        expected = f"it must be an array of numbers of the costs' shape {task.shape}, None or a Status"
        try:
            values = torch.as_tensor(solution) if oracle.as_torch else np.asarray(_plain(solution))
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(solution).__name__
            raise TypeError(f"the {source} answered a {kind} for element {place}; {expected}.") from error
        if values.is_complex() if isinstance(values, Tensor) else values.dtype.kind not in "biuf":
            raise TypeError(f"the {source} answered {values.dtype} for element {place}; {expected}.")
        if tuple(values.shape) != task.shape:
            raise ValueError(f"the {source} answered shape {tuple(values.shape)} for element {place}; {expected}.")
        self.x[index] = values  # a copy: the solver may use its array again
        is_solution = oracle.features is None and not oracle.warm_start
        self.answers[index] = self.x[index] if is_solution else _copied(answer)
        self.statuses.append(Status.SOLVED)

    def finish(self) -> _Results:
        """Solutions with NaN or infinity are none."""
        if self.statuses:
            finite = (torch if isinstance(self.x, Tensor) else np).isfinite(self.x)
            for index in np.flatnonzero(~_plain(finite.reshape(len(self.statuses), -1).all(-1))):
                self.x[index], self.answers[index] = float("nan"), None
                if self.statuses[index].usable:
                    self.statuses[index] = Status.NO_SOLUTION
        return self


class _Raised(NamedTuple):
    """An exception of the user's function."""

    places: list[int]
    error: Exception


def _solve_each(task: _Task) -> _Results | _Raised:
    results, clock = _Results(task), time.perf_counter
    with torch.no_grad():
        for index, place in enumerate(task.places):
            pause()
            extra = [values[index] for values in task.extra]
            center = None if task.centers is None else task.centers[index]
            started = clock()
            try:
                if task.is_over:
                    answer = solution = Status.TIME_LIMIT
                else:
                    answer, solution = task.call(task.costs[index], extra, task.starts[index], center)
            except Exception as error:  # raised again, with the element's name, where the results come together
                if not task.tilted:
                    return _Raised([place], error)
                results.errors[place] = error
                answer = solution = Status.NUMERICAL_ERROR
            results.seconds[index] = clock() - started
            advance(task.progress)
            results.read(task, answer, solution)
    return results.finish()


def _solve_batched(task: _Task) -> _Results | _Raised:
    size, starts = len(task.places), task.starts if any(start is not None for start in task.starts) else None
    results = _Results(task)
    started = time.perf_counter()
    answer: Any
    solution: Any
    try:
        with torch.no_grad():
            if task.is_over:
                answer = solution = Status.TIME_LIMIT
            else:
                answer, solution = task.call(task.costs, task.extra, starts, task.centers)
    except Exception as error:  # raised again, with the elements' names, where the results come together
        if not task.tilted:
            return _Raised(task.places, error)
        results.errors |= dict.fromkeys(task.places, error)
        answer = solution = Status.NUMERICAL_ERROR
    results.seconds[:] = (time.perf_counter() - started) / size
    advance(task.progress, size)
    if solution is None or isinstance(solution, Status):
        answer, solution = [answer] * size, [solution] * size
    for values in (answer, solution):
        if not hasattr(values, "__len__") or len(values) != size:
            found = f"{len(values)} rows" if hasattr(values, "__len__") else f"a {type(values).__name__}"
            raise ValueError(f"the batched solver answered {found} for the {size} elements {_names(task.places)}.")
    for row in zip(answer, solution, strict=True):
        results.read(task, *row)
    return results.finish()


def _plain(value: Any) -> Any:
    """Tensors as arrays; NumPy has no bfloat16."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype is torch.bfloat16 else value).numpy()


def _copied(value: Any) -> Any:
    """Arrays copied, whoever else keeps them; other objects as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _names(places: list[int]) -> str:
    return ", ".join(map(str, places[:10])) + (", …" if len(places) > 10 else "")


def _assemble(
    oracle: Oracle, problem: LinearProblem, tasks: list[_Task], results: list[_Results | _Raised]
) -> LinearSolution:
    size = problem.batch_size
    statuses, answers, seconds = [Status.INVALID_DATA] * size, [None] * size, np.zeros(size)
    errors: dict[int, Exception] = {}
    x: Array = np.full(problem.data.c.shape, np.nan)
    if oracle.as_torch:
        x = torch.full_like(problem.data.c, torch.nan)
    for task, result in zip(tasks, results, strict=True):
        if isinstance(result, _Raised):
            noun = "element" if len(result.places) == 1 else "elements"
            raise SolverError(
                f"the solver raised {type(result.error).__name__} for {noun} {_names(result.places)}: {result.error}",
                indices=result.places,
            ) from result.error
        for element, status, answer in zip(task.elements, result.statuses, result.answers, strict=True):
            statuses[element], answers[element] = status, answer
        errors |= result.errors
        seconds[task.elements] = result.seconds
        x[task.elements] = result.x.reshape(len(task.elements), -1)
    if errors:
        place, error = next(iter(errors.items()))
        noun = "element" if len(errors) == 1 else "elements"
        warn(
            f"the solver raised {type(error).__name__} in the backward pass, for the perturbed costs of {noun} "
            f"{_names(sorted(errors))} (of element {place}: {error}). valid_costs=, such as clipping, makes perturbed "
            "costs such as it takes; a smaller tau leaves them nearer to the costs themselves."
        )
    return LinearSolution(
        problem,
        torch.as_tensor(x).to(problem.device),
        answers=tuple(answers),
        statuses=tuple(statuses),
        iterations=np.zeros(size, dtype=np.int64),
        setup_seconds=np.zeros(size),
        solve_seconds=seconds,
        states=tuple(answers) if oracle.warm_start else (None,) * size,
    )
