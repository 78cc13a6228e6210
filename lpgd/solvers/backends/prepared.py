"""What a backend prepares for one element's matrices, and what it makes of one element."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from lpgd.arrays import FloatArray
from lpgd.execution.workspaces import Fingerprint
from lpgd.problems.base import State
from lpgd.solvers.backends.forms import Form, Matrices
from lpgd.status import Status

__all__ = ["Outcome", "Pair", "Pairs", "Prepared", "Workspace", "fits"]


class Outcome(NamedTuple):
    """One element's result.

    Attributes:
        status: the result.
        point: a named tuple of the solver's form, such as ``RowPoint``; it is kept, so nothing may write to it later.
            Of an infeasible problem multipliers that prove it, of an unbounded one a direction, where the solver tells;
            None where there is nothing.
        iterations: of the solver.
        state: whatever the backend wants to be warm-started from.
    """

    status: Status
    point: Any
    iterations: int
    state: State = None


class Prepared(ABC):
    """A workspace for one element's matrices; never used by two threads at once."""

    @abstractmethod
    def solve(self, vectors: Any, state: State) -> Outcome:
        """Solve for these vectors of the solver's form, from ``state`` (None: cold).

        The result depends on the data and the state only, up to the solver's tolerance.

        Raises:
            InterruptedSolveError: the solver has a handler of SIGINT of its own, and stopped because of it.
        """

    @abstractmethod
    def memory(self, form: Any) -> int:
        """About how many bytes it and its form hold: what the cache of idle workspaces is bounded by.

        Measured as the growth of the process, for each solver; within a factor of two for programs of 8 to 800
        variables.
        """

    def update(self, form: Any) -> None:
        """Take new values of P and A on the same pattern; only where the solver's ``updates_matrices`` is true."""
        raise TypeError(f"{type(self).__name__} declares no update of its matrices.")


class Pair(NamedTuple):
    """The matrices of some elements.

    Attributes:
        P, A: their values.
        rows: A itself, row by row, where the solver reads it so.
        fingerprint: of the values.
        definite: whether P is definite, where the solver asks.
    """

    P: FloatArray
    A: FloatArray
    rows: FloatArray | None
    fingerprint: Fingerprint
    definite: bool | None


@dataclass(frozen=True, eq=False)
class Pairs:
    """The R distinct pairs of matrices of a batch.

    Attributes:
        P, A: (R, ·) values, or (·,) where there is one for all.
        rows: (R, m, n) or (m, n), or None.
        fingerprints, definite: R of them.
    """

    P: FloatArray
    A: FloatArray
    rows: FloatArray | None
    fingerprints: list[Fingerprint]
    definite: list[bool] | list[None]

    def __len__(self) -> int:
        return len(self.fingerprints)

    def pair(self, index: int) -> Pair:
        """One of them, as views."""
        rows = self.rows
        return Pair(
            self.P if self.P.ndim == 1 else self.P[index],
            self.A if self.A.ndim == 1 else self.A[index],
            rows if rows is None or rows.ndim == 2 else rows[index],
            self.fingerprints[index],
            self.definite[index],
        )

    def select(self, index: Sequence[int]) -> Pairs:
        """Some of them, in this order."""
        if list(index) == list(range(len(self))):
            return self
        rows = self.rows
        definite: Any = [self.definite[place] for place in index]
        return Pairs(
            self.P if self.P.ndim == 1 else self.P[index],
            self.A if self.A.ndim == 1 else self.A[index],
            rows if rows is None or rows.ndim == 2 else rows[index],
            [self.fingerprints[place] for place in index],
            definite,
        )


class Workspace(NamedTuple):
    """A prepared solver, and what it was prepared for."""

    matrices: Matrices | None  # None for one that waits for new ones
    form: Form | None
    prepared: Prepared


def fits(workspace: Workspace, pair: Pair) -> bool:
    """Whether it is for these very values."""
    matrices = workspace.matrices
    return matrices is not None and np.array_equal(matrices.P, pair.P) and np.array_equal(matrices.A, pair.A)
