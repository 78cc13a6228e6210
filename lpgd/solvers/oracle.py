"""A callable that minimises a linear objective over a set that it alone knows, as the solver of a LinearProblem."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lpgd.execution import SerialExecutor, run_tasks, split
from lpgd.problems.linear import LinearProblem
from lpgd.solution import LinearSolution
from lpgd.solvers.base import BaseSolver
from lpgd.status import SolverError, Status

__all__ = ["Oracle", "Sense"]

Sense = Literal["min", "max"]

Array = Any
"""A NumPy array, or a tensor for a callable that takes tensors."""


@dataclass(frozen=True)
class Oracle(BaseSolver):
    """A function from costs to a solution, ``function(costs, *extra)``, for each element of a batch.

    It gets copies of arrays, and may do with them what it likes.  What it returns is checked: an answer of another
    shape or kind is an error that names the element; ``None``, an answer with NaN or infinity, or a :class:`~lpgd.Status` is
    an element without a solution; an exception is raised as a SolverError that names the element, with the exception as
    its cause.

    Args:
        function: the solver; for an executor with processes, one that pickles.
        sense: whether it minimises or maximises.
        batched: it takes all elements at once: costs (k, *shape), each extra input with k rows, and so on.
        as_torch: it takes and returns tensors, on the device of the costs; else NumPy arrays.
        quadratic: it also gets ``rho=`` and ``center=``, and solves with ``(ρ/2) |x - center|²`` added (of ``"max"``:
            subtracted); ρ is 0.0 and the centre None where there is no such term.
        warm_start: it also gets ``start=``, its last answer for this element (batched: a list of them), or None.
        features: a feature map Ψ: the solution is ``features(answer, *extra)``, of the shape of the costs.
    """

    function: Callable[..., Any] = None  # pyright: ignore[reportAssignmentType]  # fields of the base have defaults
    sense: Sense = "min"
    batched: bool = False
    as_torch: bool = False
    quadratic: bool = False
    warm_start: bool = False
    features: Callable[..., Any] | None = None

    name: ClassVar[str] = "ORACLE"

    def __post_init__(self) -> None:
        for name in ("function", "features"):
            value = getattr(self, name)
            if not (callable(value) or (name == "features" and value is None)):
                raise TypeError(f"{name} is {value!r}; it must be callable.")
        if self.sense not in get_args(Sense):
            raise ValueError(f"sense is {self.sense!r}; it must be one of {', '.join(get_args(Sense))}.")

    @property
    def takes_states(self) -> bool:
        return self.warm_start

    def solve(
        self, problem: LinearProblem, states: Sequence[Any] = (), executor: Executor | None = None
    ) -> LinearSolution:
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
        valid = problem.finite().nonzero()[:, 0].tolist()
        chunks = split(len(valid), executor, per_worker=1 if self.batched else 4)
        tasks = [self._task(problem, [valid[place] for place in chunk], states) for chunk in chunks]
        results = run_tasks(_solve_batched if self.batched else _solve_each, tasks, executor)
        return _assemble(self, problem, tasks, results)

    def _task(self, problem: LinearProblem, elements: list[int], states: Sequence[Any]) -> _Task:
        places = [problem.places[element] for element in elements]
        sign = -1.0 if self.sense == "max" else 1.0
        shape, center = problem.structure.shape, problem.center
        return _Task(
            self,
            elements,
            places,
            shape,
            self._array(sign * problem.data.c[elements]).reshape(-1, *shape),
            [self._rows(values, places) for values in problem.extra],
            [states[element % len(states)] for element in elements] if states else [None] * len(elements),
            problem.rho,
            None if center is None else self._array(center[elements]).reshape(-1, *shape),
        )

    def _array(self, tensor: Tensor) -> Array:
        return tensor if self.as_torch else tensor.cpu().numpy()

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
    starts: list[Any]
    rho: float
    centers: Array | None  # (k, *shape)

    def call(self, costs: Array, extra: list[Any], start: Any, center: Array | None) -> tuple[Any, Any]:
        """What the function answers, and the solution that this is."""
        oracle, keywords = self.oracle, {}
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


class _Answer(NamedTuple):
    """What came of one element."""

    status: Status
    x: Array | None = None  # (n,) in float64
    answer: Any = None
    seconds: float = 0.0


class _Raised(NamedTuple):
    """An exception of the user's function."""

    places: list[int]
    error: Exception


def _solve_each(task: _Task) -> list[_Answer] | _Raised:
    answers = []
    with torch.no_grad():
        for index, place in enumerate(task.places):
            extra, center = [rows[index] for rows in task.extra], None if task.centers is None else task.centers[index]
            started = time.perf_counter()
            try:
                answer, solution = task.call(task.costs[index], extra, task.starts[index], center)
            except Exception as error:  # raised again, with the element's name, where the results come together
                return _Raised([place], error)
            seconds = time.perf_counter() - started
            answers.append(_read(task, answer, solution, place)._replace(seconds=seconds))
    return answers


def _solve_batched(task: _Task) -> list[_Answer] | _Raised:
    size, starts = len(task.places), task.starts if any(start is not None for start in task.starts) else None
    started = time.perf_counter()
    try:
        with torch.no_grad():
            answer, solution = task.call(task.costs, task.extra, starts, task.centers)
    except Exception as error:  # raised again, with the elements' names, where the results come together
        return _Raised(task.places, error)
    seconds = (time.perf_counter() - started) / size
    if solution is None or isinstance(solution, Status):
        answer, solution = [answer] * size, [solution] * size
    for values in (answer, solution):
        if not hasattr(values, "__len__") or len(values) != size:
            found = f"{len(values)} rows" if hasattr(values, "__len__") else f"a {type(values).__name__}"
            raise ValueError(f"the batched solver answered {found} for the {size} elements {_names(task.places)}.")
    rows = zip(answer, solution, task.places, strict=True)
    return [_read(task, *row)._replace(seconds=seconds) for row in rows]


def _read(task: _Task, answer: Any, solution: Any, place: int) -> _Answer:
    """Check the solution of one element.

    Raises:
        ValueError, TypeError: it is no array of numbers of the costs' shape.
    """
    if solution is None:
        return _Answer(Status.NO_SOLUTION)
    if isinstance(solution, Status):
        if solution.has_iterate:
            raise ValueError(
                f"the solver answered {solution.name} without a solution for element {place}; return the solution."
            )
        return _Answer(solution)
    source = "solver" if task.oracle.features is None else "feature map"
    expected = f"it must be an array of numbers of the costs' shape {task.shape}, None or a Status"
    try:
        values = torch.as_tensor(solution) if task.oracle.as_torch else np.asarray(_plain(solution))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"the {source} answered a {type(solution).__name__} for element {place}; {expected}."
        ) from error
    if isinstance(values, Tensor):
        numeric, finite = not values.is_complex(), bool(torch.isfinite(values).all())
    else:
        numeric = values.dtype.kind in "biuf"
        finite = numeric and bool(np.isfinite(values).all())
    if not numeric:
        raise TypeError(f"the {source} answered {values.dtype} for element {place}; {expected}.")
    if tuple(values.shape) != task.shape:
        raise ValueError(f"the {source} answered shape {tuple(values.shape)} for element {place}; {expected}.")
    if not finite:
        return _Answer(Status.NO_SOLUTION)
    if isinstance(values, Tensor):
        x = values.detach().to(device=task.costs.device, dtype=torch.float64).flatten()
    else:
        x = values.astype(np.float64).ravel()
    return _Answer(Status.SOLVED, x, _copied(answer))


def _plain(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    """Arrays copied, whoever else keeps them; other objects as they are."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def _names(places: list[int]) -> str:
    return ", ".join(map(str, places[:10])) + (", …" if len(places) > 10 else "")


def _assemble(
    oracle: Oracle, problem: LinearProblem, tasks: list[_Task], results: list[list[_Answer] | _Raised]
) -> LinearSolution:
    answers = [_Answer(Status.INVALID_DATA)] * problem.batch_size
    for task, result in zip(tasks, results, strict=True):
        if isinstance(result, _Raised):
            noun = "element" if len(result.places) == 1 else "elements"
            raise SolverError(
                f"the solver raised {type(result.error).__name__} for {noun} {_names(result.places)}: {result.error}",
                indices=result.places,
            ) from result.error
        for element, answer in zip(task.elements, result, strict=True):
            answers[element] = answer
    x = torch.full_like(problem.data.c, torch.nan)
    solved = [element for element, answer in enumerate(answers) if answer.x is not None]
    if solved:
        rows: list[Any] = [answers[element].x for element in solved]
        x[solved] = torch.stack(rows) if oracle.as_torch else torch.from_numpy(np.stack(rows)).to(x.device)
    kept = tuple(answer.answer for answer in answers)
    return LinearSolution(
        problem,
        x,
        answers=kept,
        statuses=tuple(answer.status for answer in answers),
        iterations=np.zeros(len(answers), dtype=np.int64),
        setup_seconds=np.zeros(len(answers)),
        solve_seconds=np.array([answer.seconds for answer in answers]),
        states=kept if oracle.warm_start else (None,) * len(answers),
    )
