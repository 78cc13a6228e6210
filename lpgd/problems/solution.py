"""What a solver returns for a batch, and how it checks itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, integers
from lpgd.problems.base import Data, Point, Problem, States
from lpgd.status import Status, describe_counts

if TYPE_CHECKING:
    from lpgd.problems.conic.activity import ActiveSet

__all__ = ["AnyProblem", "AnySolution", "Rows", "Solution"]

AnyProblem: TypeAlias = Problem[Any, Any]
"""A problem of any class: its data and its points are of one type, whichever that is."""

ProblemT_co = TypeVar("ProblemT_co", bound=AnyProblem, covariant=True)
PointT_co = TypeVar("PointT_co", bound=Point, covariant=True)


class Rows(Sequence[Tensor]):
    """The rows of a tensor as a sequence, which makes them as they are asked for.

    Args:
        tensor: (B, ...).
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, index: Any) -> Any:
        return self.tensor[index]


class Solution(Generic[ProblemT_co, PointT_co]):
    """What the solutions of a batch have in common, whatever the class of problems; subclasses are dataclasses.

    Attributes:
        problem: the batch that was solved.
        point: its solutions, a named tuple of tensors (B, ·) whose first is the primal ``x``; NaN where there is none.
        statuses: B statuses.
        iterations: (B,) iterations of the solver.
        setup_seconds, solve_seconds: (B,) time in set-up (0 where it was re-used) and in the solver.
        states: B opaque warm-start states; None where the solver has none.
    """

    problem: ProblemT_co
    x: Tensor
    statuses: tuple[Status, ...]
    iterations: IntArray
    setup_seconds: FloatArray
    solve_seconds: FloatArray
    states: States

    _tensors: ClassVar[tuple[str, ...]]
    """Names of fields with one row for each element."""
    _tuples: ClassVar[tuple[str, ...]] = ("statuses", "states")
    """Names of fields that are tuples, or sequences, with one entry for each element."""

    @property
    def point(self) -> PointT_co:
        raise TypeError(f"{type(self).__name__} does not say what its point is.")

    @property
    def outputs(self) -> Data:
        """The first parts of the point: what losses see."""
        return self.point

    def cotangent(self, cotangents: Iterable[Tensor]) -> PointT_co:
        """Cotangents of the :attr:`outputs` as one of the point, whose other parts no loss sees."""
        return self.point._make(cotangents)

    def active_set(self, units_of: AnyProblem) -> ActiveSet | None:
        """Which constraints are active, in the units of a problem; None where there are none to compare."""
        return None

    @property
    def domain(self) -> str:
        """What data must be for there to be a solution, in words, where the class of problems can tell."""
        return ""

    known_to: Tensor | None = None
    """(B,) how far, relatively, the point is from exact; NaN, or None, where that is not known."""
    asked: str = ""
    """The name of the solver that was asked, where another one may have answered."""

    @property
    def notices(self) -> Mapping[str, str]:
        """For a datum's name, what a user who asks for its gradient should know, whatever the method."""
        return {}

    @property
    def rescued(self) -> dict[str, int]:
        """How many elements were solved by another solver than the one that was asked and left them, by its name."""
        return {}

    @property
    def by_newton(self) -> Tensor:
        """(B,) whether Newton's method on the optimality conditions found the point, without a solver."""
        return torch.zeros(self.batch_size, dtype=torch.bool, device=self.x.device)

    @property
    def batch_size(self) -> int:
        return len(self.statuses)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.outputs._asdict().items())
        descriptions = [describe_counts(self.statuses), shapes]
        if self.batch_size and self.iterations.any():
            descriptions.append(f"{self.iterations.min()} to {self.iterations.max()} iterations")
        descriptions += [f"{self.setup_seconds.sum():.3g} s of set-up, {self.solve_seconds.sum():.3g} s of solving"]
        return f"{type(self).__name__}({'; '.join(descriptions)})"

    @cached_property
    def _all_solved(self) -> bool:
        return self.statuses.count(Status.SOLVED) == len(self.statuses)

    @property
    def is_flawless(self) -> bool:
        """Whether the solver that was asked solved all elements."""
        return self._all_solved and not self.rescued

    @property
    def failed(self) -> list[int]:
        """Elements without a usable solution."""
        if self._all_solved:
            return []
        return [index for index, status in enumerate(self.statuses) if not status.usable]

    @property
    def usable(self) -> Tensor:
        """(B,) elements that have one."""
        if self._all_solved:
            return torch.ones(self.batch_size, dtype=torch.bool, device=self.x.device)
        return torch.tensor([status.usable for status in self.statuses], dtype=torch.bool, device=self.x.device)

    @cached_property
    def objective(self) -> Tensor:
        """(B,) value of the objective, without any constant of a modelling language."""
        return self.problem.objective(self.x)

    def parts(self, count: int) -> Sequence[Self]:
        """The ``count`` equal parts that a batch consists of, one after the other (as ``tilt`` makes them)."""
        size = self.batch_size // count
        return [
            self.select(torch.arange(number * size, (number + 1) * size, device=self.x.device))
            for number in range(count)
        ]

    def select(self, elements: Tensor, problem: AnyProblem | None = None) -> Self:
        """The solutions of these elements, int64 indices; ``problem`` is theirs, where it is known."""
        chosen = integers(elements)
        changes: dict[str, Any] = {name: getattr(self, name)[chosen] for name in self._tensors}
        changes |= {name: tuple(getattr(self, name)[i] for i in chosen) for name in self._tuples}
        return replace(cast(Any, self), problem=problem or self.problem.select(elements), **changes)


AnySolution: TypeAlias = Solution[AnyProblem, Any]
"""A solution of a problem of any class."""
