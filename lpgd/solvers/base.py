"""The Solver interface: solve a batch of conic programs, warm-started, one status for each element.

A backend is one file: a frozen dataclass of options that declares what it can do (:class:`Capabilities`) and
prepares one element's matrices (``prepare``), and a :class:`Prepared` that solves for any vectors.  Batches,
threads, re-use of prepared workspaces, row order and reductions are done here, once.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from lpgd.elements import ElementView
from lpgd.execution import run_tasks, workspaces
from lpgd.problems.conic import ConicProblem
from lpgd.problems.structure import ConicStructure
from lpgd.reductions import Matrices, RowForm, RowPoint, Vectors
from lpgd.solution import Solution
from lpgd.status import MissingPackageError, Status

__all__ = ["Capabilities", "ElementwiseSolver", "Outcome", "Prepared", "Solver", "checked"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Capabilities:
    """What a solver can do, as data.

    Attributes:
        cones: names of the cones it takes (``Cones.kinds``).
        quadratic: takes a quadratic objective itself; otherwise it gets the cone form.
        warm_start: a previous state makes a solve cheaper.
    """

    cones: frozenset[str]
    quadratic: bool = False
    warm_start: bool = False


class Outcome(NamedTuple):
    """One element's result in row form; ``state`` is whatever the backend wants to be warm-started from."""

    status: Status
    point: RowPoint
    iterations: int
    state: Any = None


class Prepared(ABC):
    """A workspace for one element's matrices; never used by two threads at once."""

    @abstractmethod
    def solve(self, q: FloatArray, b: FloatArray, state: Any) -> Outcome:
        """Solve for these vectors of the row form, from ``state`` (None: cold).

        The result depends on the data and the state only, up to the solver's tolerance.
        """

    def update(self, form: RowForm) -> None:
        """Take new values of P and A on the same pattern; only where the solver's ``updates_matrices`` is true."""
        raise TypeError(f"{type(self).__name__} declares no update of its matrices.")


@dataclass(frozen=True)
class Solver(ABC):
    """What every solver offers; subclasses add their options as fields.

    Args:
        tolerance: accuracy asked of the solver (its own absolute and relative criteria).
        max_iterations: iteration limit of one element.
        time_limit: seconds for one element; None is no limit.
        verbose: let the solver print.
    """

    tolerance: float = 1e-8
    max_iterations: int = 1000
    time_limit: float | None = None
    verbose: bool = False

    capabilities: ClassVar[Capabilities]
    name: ClassVar[str]
    package: ClassVar[str]
    pip_name: ClassVar[str]
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of fields: those of the solver itself and of the field's standard layer."""
    finest_tolerance: ClassVar[float] = 1e-12
    """The smallest tolerance that the solver reaches in double precision on well-scaled problems."""

    def __post_init__(self) -> None:
        for option in fields(self):
            _check_type(self, option.name, str(option.type))
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be positive.")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations is {self.max_iterations}; it must be at least 1.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit is {self.time_limit}; it must be positive, or None for no limit.")

    @abstractmethod
    def solve(self, problem: ConicProblem, states: Sequence[Any] = (), executor: Executor | None = None) -> Solution:
        """Solve every element of a batch.

        Args:
            problem: B elements.
            states: warm-start states of B elements, or of a divisor of B that repeat (``Solution.states``); an empty
                sequence is a cold start.
            executor: where the work runs; None is the library's threads.
        """

    def solution_error(self, problem: ConicProblem) -> float:
        """How far, relatively, its solutions of such a problem typically are from exact: what steps are chosen by."""
        return self.tolerance

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec(cls.package) is not None

    @classmethod
    def module(cls) -> Any:
        """The solver's package.

        Raises:
            MissingPackageError: it is not installed.
        """
        try:
            return importlib.import_module(cls.package)
        except ImportError as error:
            raise MissingPackageError(f"the solver {cls.name} needs a package: pip install {cls.pip_name}") from error

    @classmethod
    def unsupported(cls, structure: ConicStructure) -> str | None:
        """Why this solver cannot take problems of this structure, or None."""
        missing = sorted(structure.cones.kinds - cls.capabilities.cones)
        return (
            f"{cls.name} has no {' and no '.join(kind.replace('_', '-') for kind in missing)} cone" if missing else None
        )

    @classmethod
    def knows(cls, options: Iterable[str]) -> bool:
        """Whether all of these are names of its options."""
        return set(options) <= {field.name for field in fields(cls)} | set(cls.aliases)

    def with_options(self, options: Mapping[str, Any]) -> Self:
        """The same solver with some options changed; names are fields or :attr:`aliases`.

        Raises:
            TypeError: an unknown option; the message lists the known ones.
        """
        known = {field.name for field in fields(self)}
        changes: dict[str, Any] = {}
        for key, value in options.items():
            target = key if key in known else self.aliases.get(key)
            if target is None:
                names = ", ".join(sorted(known | set(self.aliases)))
                raise TypeError(f"{key!r} is not an option of {self.name}; its options are: {names}.")
            changes[target] = value
        return replace(self, **changes) if changes else self


_KINDS = {
    "bool": (bool, "True or False"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "text"),
}


def _check_type(solver: Solver, name: str, annotation: str) -> None:
    """Refuse an option of another type than its field's; 1e3 passes for a whole number."""
    value, optional = getattr(solver, name), annotation.endswith(" | None")
    annotation = annotation.removesuffix(" | None")
    if annotation not in _KINDS or (value is None and optional):
        return
    kind, text = _KINDS[annotation]
    if annotation == "int" and isinstance(value, float) and value.is_integer():
        object.__setattr__(solver, name, int(value))
    elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} of {solver.name} is {value!r}; it must be {text}{' or None' if optional else ''}.")


class ElementwiseSolver(Solver):
    """A solver of one element at a time, prepared once for all elements that share its matrices."""

    @property
    def updates_matrices(self) -> bool:
        """Whether a workspace takes new matrices without leaving a trace of the old ones in its results."""
        return False

    @abstractmethod
    def prepare(self, form: RowForm) -> Prepared:
        """Set up, scale and factorise whatever depends on the matrices only."""

    def solve(self, problem: ConicProblem, states: Sequence[Any] = (), executor: Executor | None = None) -> Solution:
        self.module()
        reason = self.unsupported(problem.structure)
        if reason is not None:
            raise ValueError(f"{reason}; lpgd.available(structure) lists the solvers that can solve this problem.")
        view = ElementView(problem)
        digests = [_digest(view.row("P", pair), view.row("A", pair)) for pair in range(view.distinct)]
        tasks = [_task(self, view, digests, elements, states) for elements in view.groups(view.valid, executor)]
        results = run_tasks(_solve_elements, tasks, executor)
        return checked(_assemble(problem, tasks, results), self.tolerance)


class _Task(NamedTuple):
    """Elements to solve, as plain data that a process can be sent."""

    solver: ElementwiseSolver
    structure: ConicStructure
    elements: list[int]
    matrices: dict[int, tuple[FloatArray, FloatArray, bytes]]  # P, A and their digest, by pair
    pairs: list[int]  # for each element, its pair
    vectors: list[Vectors]
    states: list[Any]
    distinct: int  # distinct pairs in the whole batch


class _Raw(NamedTuple):
    """One element's result in the problem's own form."""

    status: Status
    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray
    iterations: int
    setup_seconds: float
    solve_seconds: float
    state: Any


RESIDUAL_CHECK = 1e-4
"""A relative residual above this, and above ten tolerances, turns a solver's "solved" into INACCURATE."""


def checked(solution: Solution, tolerance: float) -> Solution:
    """A solver's word is not proof: the residuals of every solved element are computed from the problem."""
    bad = (~(solution.residuals.worst <= max(RESIDUAL_CHECK, 10 * tolerance))).cpu().numpy()
    statuses = tuple(
        Status.INACCURATE if status is Status.SOLVED and bad[index] else status
        for index, status in enumerate(solution.statuses)
    )
    return replace(solution, statuses=statuses) if statuses != solution.statuses else solution


def _task(
    solver: ElementwiseSolver, view: ElementView, digests: list[bytes], elements: list[int], states: Sequence[Any]
) -> _Task:
    pairs = [element % view.distinct for element in elements]
    return _Task(
        solver,
        view.problem.structure,
        elements,
        {pair: (view.row("P", pair), view.row("A", pair), digests[pair]) for pair in set(pairs)},
        pairs,
        [Vectors(*(view.row(name, element) for name in Vectors._fields)) for element in elements],
        [states[element % len(states)] if states else None for element in elements],
        view.distinct,
    )


def _assemble(problem: ConicProblem, tasks: Sequence[_Task], results: Sequence[list[_Raw]]) -> Solution:
    structure, size = problem.structure, problem.batch_size
    x, z = (np.full((size, structure.n), np.nan) for _ in range(2))
    y, slack = (np.full((size, structure.m), np.nan) for _ in range(2))
    iterations, setup, seconds = np.zeros(size, dtype=np.int64), np.zeros(size), np.zeros(size)
    statuses, states = [Status.INVALID_DATA] * size, [None] * size
    for task, raws in zip(tasks, results, strict=True):
        for element, raw in zip(task.elements, raws, strict=True):
            statuses[element], states[element] = raw.status, raw.state
            iterations[element], setup[element], seconds[element] = raw.iterations, raw.setup_seconds, raw.solve_seconds
            if raw.status.has_iterate:
                x[element], y[element], z[element], slack[element] = raw.x, raw.y, raw.z, raw.slack
    points = {name: torch.from_numpy(part).to(problem.device) for name, part in zip("xyz", (x, y, z), strict=True)}
    return Solution(
        problem,
        **points,
        slack=torch.from_numpy(slack).to(problem.device),
        statuses=tuple(statuses),
        iterations=iterations,
        setup_seconds=setup,
        solve_seconds=seconds,
        states=tuple(states),
    )


def _digest(*arrays: NDArray[Any]) -> bytes:
    state = hashlib.blake2b(digest_size=16)
    for array in arrays:
        state.update(array.tobytes())
        state.update(b"|")
    return state.digest()


class _Held(NamedTuple):
    """A workspace in use, and what it goes back to the cache under."""

    key: tuple[Any, ...]
    family: tuple[Any, ...]
    form: RowForm
    prepared: Prepared


def _solve_elements(task: _Task) -> list[_Raw]:
    """Solve some elements, taking prepared workspaces from this process's cache and putting them back."""
    results: dict[int, _Raw] = {}
    held: _Held | None = None
    try:
        for place in sorted(range(len(task.elements)), key=lambda place: task.pairs[place]):
            vectors = task.vectors[place]
            P, A, digest = task.matrices[task.pairs[place]]
            finite = np.isfinite(vectors.lower), np.isfinite(vectors.upper)
            family = (task.solver, task.structure.digest, finite[0].tobytes(), finite[1].tobytes())
            started = time.perf_counter()
            if held is None or held.key != (*family, digest):
                held = _hand_back(held)
                key = (*family, digest)
                held = _Held(key, family, *_workspace(task, key, family, Matrices(task.structure, P, A, *finite)))
            prepared = time.perf_counter()
            outcome = held.prepared.solve(vectors.q, held.form.right_hand_side(vectors), task.states[place])
            solved = time.perf_counter()
            results[place] = _Raw(
                outcome.status,
                *held.form.invert(outcome.point),
                outcome.iterations,
                prepared - started,
                solved - prepared,
                outcome.state,
            )
    finally:
        _hand_back(held)
    return [results[place] for place in range(len(task.elements))]


def _workspace(
    task: _Task, key: tuple[Any, ...], family: tuple[Any, ...], matrices: Matrices
) -> tuple[RowForm, Prepared]:
    found = workspaces.take(key)
    if found is not None:
        return found
    form = RowForm(matrices)
    if task.solver.updates_matrices:
        # Room for this batch's own matrices and those of one augmentation; beyond that the oldest are stale.
        stale = workspaces.take_oldest(family, keep=2 * task.distinct + 4)
        if stale is not None:
            prepared = stale[1]
            prepared.update(form)
            return form, prepared
    return form, task.solver.prepare(form)


def _hand_back(held: _Held | None) -> None:
    if held is not None:
        # Sparse factors take several times the memory of the matrix; an estimate is enough to bound the cache.
        cost = 200 * (held.form.A.nnz + held.form.P.size) + 20_000
        workspaces.put(held.key, held.family, (held.form, held.prepared), cost)
