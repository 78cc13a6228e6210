"""What can come of a solve, with advice for each outcome, and the errors and warnings that report it."""

from __future__ import annotations

import enum
import logging
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from contextlib import contextmanager

__all__ = [
    "LpgdWarning",
    "MissingPackageError",
    "SetUpError",
    "SolverError",
    "Status",
    "describe_counts",
    "describe_failures",
    "refuse_elements",
    "silent",
    "warn",
]

_log = logging.getLogger("lpgd")
_log.addHandler(logging.NullHandler())  # silent unless a handler is given


class Status(enum.IntEnum):
    """The outcome of the solve of one batch element; :attr:`advice` says what to do about it."""

    SOLVED = 0
    INACCURATE = 1
    INFEASIBLE = 2
    UNBOUNDED = 3
    ITERATION_LIMIT = 4
    TIME_LIMIT = 5
    NUMERICAL_ERROR = 6
    INVALID_DATA = 7
    NOT_CONVEX = 8
    WITHIN_GAP = 9
    NO_SOLUTION = 10
    RELAXED = 11

    @property
    def usable(self) -> bool:
        """Whether there is a solution to hand out, inaccurate ones and those of closest feasible problems too."""
        return self in (Status.SOLVED, Status.INACCURATE, Status.WITHIN_GAP, Status.RELAXED)

    @property
    def has_iterate(self) -> bool:
        """Whether the solver's last iterate means something, however far it is from a solution."""
        return self.usable or self in (Status.ITERATION_LIMIT, Status.TIME_LIMIT, Status.NUMERICAL_ERROR)

    @property
    def advice(self) -> str:
        return _ADVICE[self]


_ADVICE = {
    Status.SOLVED: "solved to the requested tolerance",
    Status.INACCURATE: (
        "solved, but less accurately than requested: rescale the problem, raise the iteration limit, or use another "
        "solver"
    ),
    Status.INFEASIBLE: (
        "no point satisfies the constraints: check the parameters of these elements, relax a constraint with a "
        "penalised slack, or take the closest feasible problem's solution (on_error='relax', of conic programs)"
    ),
    Status.UNBOUNDED: (
        "the objective decreases without limit: check the signs of the cost, or add bounds or a small quadratic term"
    ),
    Status.ITERATION_LIMIT: (
        "not converged within the iteration limit: raise it, loosen the tolerance, rescale the problem, or use another "
        "solver"
    ),
    Status.TIME_LIMIT: (
        "not converged within the time limit (of conic programs: the solver's options time_limit, for one element, and "
        "batch_time_limit, for all of them): raise it, or loosen the tolerance"
    ),
    Status.NUMERICAL_ERROR: (
        "the solver broke down numerically: rescale the problem, remove redundant constraints, or use another solver"
    ),
    Status.INVALID_DATA: (
        "the data hold NaN or infinity (only an end of an inequality or a bound may be infinite, where that means "
        "that there is none), or for a node a value outside of its domain, such as a negative weight: look at what "
        "computes these parameters"
    ),
    Status.NOT_CONVEX: (
        "P has a negative eigenvalue, so the problem is not convex: build P as a product with its own transpose, or "
        "add a multiple of the identity"
    ),
    Status.WITHIN_GAP: (
        "feasible, with whole numbers where asked for, and an objective proven to be within the gap that was asked for "
        "of the best one: lower the solver's gap for the best one"
    ),
    Status.NO_SOLUTION: (
        "the solver answered that there is none (None, or NaN): check the costs and the extra inputs of these elements"
    ),
    Status.RELAXED: (
        "no point satisfies the constraints; this is the solution of the closest feasible problem, and info.violation "
        "says how far away that is"
    ),
}


class LpgdWarning(UserWarning):
    """Something was handled, but the caller should know: an inaccurate solution, a fallback, a zero gradient."""


class _Silent(threading.local):
    """Whether warnings of this thread are dropped."""

    on: bool = False


_silent = _Silent()


@contextmanager
def silent() -> Generator[None]:
    """Drop this library's warnings in this thread: what is asked of a second means only to check the first one."""
    before = _silent.on
    _silent.on = True
    try:
        yield
    finally:
        _silent.on = before


def warn(message: str) -> None:
    """Give an :class:`LpgdWarning` that points at the user's line: the nearest outside of this library and torch."""
    if _silent.on:
        return
    _log.info("%s", message)
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("lpgd", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, LpgdWarning, stacklevel=level)


class MissingPackageError(ImportError):
    """A solver's package is not installed; the message has the pip command."""


class SetUpError(RuntimeError):
    """A solver cannot set up the matrices of one element, which is reported as :attr:`Status.NUMERICAL_ERROR`."""


class SolverError(RuntimeError):
    """Elements of a batch have no solution.

    Attributes:
        statuses: the status of every element of the batch, in order.
        indices: the positions of the elements that failed, in the flattened batch.
    """

    def __init__(self, message: str, statuses: Sequence[Status] = (), indices: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.statuses = tuple(statuses)
        self.indices = tuple(indices)

    def __reduce__(self) -> tuple[type[SolverError], tuple[str, tuple[Status, ...], tuple[int, ...]]]:
        return type(self), (str(self), self.statuses, self.indices)


def describe_counts(statuses: Sequence[Status]) -> str:
    """How many elements have which status: ``"150 SOLVED, 2 INFEASIBLE"``."""
    counts = Counter(statuses)
    return ", ".join(f"{counts[status]} {status.name}" for status in sorted(counts)) or "no elements"


def describe_failures(statuses: Sequence[Status], failed: Sequence[int]) -> str:
    """One sentence for each status that occurs: which elements, and what to try."""
    groups: dict[Status, list[int]] = defaultdict(list)
    for index in failed:
        groups[statuses[index]].append(index)
    sentences = []
    for status, indices in sorted(groups.items()):
        shown = ", ".join(str(index) for index in indices[:10]) + (", …" if len(indices) > 10 else "")
        noun = "element" if len(indices) == 1 else "elements"
        sentences.append(f"{noun} {shown} of {len(statuses)}: {status.name} — {status.advice}")
    return "; ".join(sentences)


def refuse_elements(good: Sequence[bool], message: str) -> None:
    """Refuse a computation that broke down for some elements.

    Args:
        good: for each element of the batch, whether it is fine.
        message: what broke down and what to do about it; the elements are added.

    Raises:
        SolverError: an element is not fine.
    """
    failed = [index for index, fine in enumerate(good) if not fine]
    if failed:
        statuses = [Status.SOLVED if fine else Status.NUMERICAL_ERROR for fine in good]
        raise SolverError(f"{message}  {describe_failures(statuses, failed)}.", statuses, failed)
