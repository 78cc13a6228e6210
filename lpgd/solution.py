"""What a solver returns for a batch, and how it checks itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpgd.problems.activity import ActiveSet, active_set
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic import ConicProblem
from lpgd.problems.linear import LinearPoint, LinearProblem
from lpgd.problems.multipliers import estimate_multipliers
from lpgd.problems.residuals import Residuals, residuals_of
from lpgd.problems.smooth import SmoothProblem
from lpgd.problems.smooth_structure import SmoothOutput, SmoothPoint
from lpgd.problems.structure import ConicPoint
from lpgd.status import Status, describe_counts

__all__ = ["BatchSolution", "LinearSolution", "Rows", "SmoothSolution", "Solution"]


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


class BatchSolution:
    """What the solutions of a batch have in common, whatever the class of problems; subclasses are dataclasses.

    Attributes:
        problem: the batch that was solved.
        point: its solutions, a named tuple of tensors (B, ·) whose first is the primal ``x``; NaN where there is none.
        statuses: B statuses.
        iterations: (B,) iterations of the solver.
        setup_seconds, solve_seconds: (B,) time in set-up (0 where it was re-used) and in the solver.
        states: B opaque warm-start states; None where the solver has none.
    """

    problem: Any
    x: Tensor
    statuses: tuple[Status, ...]
    iterations: NDArray[np.int64]
    setup_seconds: NDArray[np.float64]
    solve_seconds: NDArray[np.float64]
    states: Sequence[Any]

    _tensors: ClassVar[tuple[str, ...]]
    """Names of fields with one row for each element."""
    _tuples: ClassVar[tuple[str, ...]] = ("statuses", "states")
    """Names of fields that are tuples, or sequences, with one entry for each element."""

    @property
    def point(self) -> Any:
        raise TypeError(f"{type(self).__name__} does not say what its point is.")

    @property
    def outputs(self) -> Any:
        """The first parts of the point: what losses see."""
        return self.point

    def active_set(self, units_of: Any) -> ActiveSet | None:
        """Which constraints are active, in the units of a problem; None where there are none to compare."""
        return None

    @property
    def domain(self) -> str:
        """What data must be for there to be a solution, in words, where the class of problems can tell."""
        return ""

    asked: str = ""
    """The name of the solver that was asked, where another one may have answered."""

    @property
    def rescued(self) -> dict[str, int]:
        """How many elements were solved by another solver than the one that was asked, by its name."""
        return {}

    @property
    def batch_size(self) -> int:
        return len(self.statuses)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in self.outputs._asdict().items())
        parts = [describe_counts(self.statuses), shapes]
        if self.batch_size and self.iterations.any():
            parts.append(f"{self.iterations.min()} to {self.iterations.max()} iterations")
        parts += [f"{self.setup_seconds.sum():.3g} s of set-up, {self.solve_seconds.sum():.3g} s of solving"]
        return f"{type(self).__name__}({'; '.join(parts)})"

    @cached_property
    def _all_solved(self) -> bool:
        return self.statuses.count(Status.SOLVED) == len(self.statuses)

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
            return self.x.new_ones(self.batch_size, dtype=torch.bool)
        return torch.tensor([status.usable for status in self.statuses], dtype=torch.bool, device=self.x.device)

    @cached_property
    def objective(self) -> Tensor:
        """(B,) value of the objective, without any constant of a modelling language."""
        return self.problem.objective(self.x)

    def parts(self, count: int) -> list[Self]:
        """The ``count`` equal parts that a batch consists of, one after the other (as ``tilt`` makes them)."""
        size = self.batch_size // count
        return [self.select(range(part * size, (part + 1) * size)) for part in range(count)]

    def select(self, elements: Sequence[int]) -> Self:
        """The solutions of these elements."""
        chosen = list(elements)
        changes: dict[str, Any] = {name: getattr(self, name)[chosen] for name in self._tensors}
        changes |= {name: tuple(getattr(self, name)[i] for i in chosen) for name in self._tuples}
        return replace(cast(Any, self), problem=self.problem.select(chosen), **changes)


@dataclass(frozen=True, eq=False, repr=False)
class Solution(BatchSolution):
    """Primal and dual solutions of a batch of B conic programs, with one status for each element.

    Attributes:
        problem: the batch that was solved.
        x: (B, n) primal variables; NaN where there is no solution.
        y: (B, m) multipliers of the rows of A, in K*.
        z: (B, n) signed multipliers of the bounds: positive at an upper, negative at a lower bound.
        slack: (B, m) the solver's own slack, in K; the slack as a function of x is :attr:`s`.
        statuses: B statuses.
        iterations: (B,) iterations of the solver.
        setup_seconds, solve_seconds: (B,) time in set-up (0 where it was re-used) and in the solver.
        states: B opaque warm-start states; None where the solver has none.
        systems: what the solver factorised at the solutions, for implicit differentiation; it belongs to this call.
        asked: the name of the solver that was asked.
        solvers: B names of the solvers that answered: another one where that one gave up.
        proofs: for each element without a solution what shows it: ``"certificate"``, ``"two solvers"`` that agree,
            ``"data"`` (crossed bounds, an objective that is not convex), ``"search"`` (of integers), or nothing.
        known_to: (B,) what is left of the optimality conditions, in units of order 1; NaN for integer programs.
        refined: (B,) how many of Newton's steps were taken from the solver's answer.
    """

    problem: ConicProblem
    x: Tensor
    y: Tensor
    z: Tensor
    slack: Tensor
    statuses: tuple[Status, ...]
    iterations: NDArray[np.int64]
    setup_seconds: NDArray[np.float64]
    solve_seconds: NDArray[np.float64]
    states: Sequence[Any]
    systems: tuple[Any, ...] = ()
    asked: str = ""
    solvers: tuple[str, ...] = ()
    proofs: tuple[str, ...] = ()
    known_to: Tensor | None = None
    refined: Tensor | None = None

    _tensors: ClassVar[tuple[str, ...]] = ("x", "y", "z", "slack", "iterations", "setup_seconds", "solve_seconds")

    @property
    def point(self) -> ConicPoint:
        return ConicPoint(self.x, self.y, self.z)

    def select(self, elements: Sequence[int]) -> Self:
        """The solutions of these elements, without their systems."""
        records = {name: getattr(self, name) for name in ("solvers", "proofs")}
        kept: dict[str, Any] = {name: tuple(own[i] for i in elements) if own else own for name, own in records.items()}
        for name in ("known_to", "refined"):
            own = getattr(self, name)
            kept[name] = own if own is None else own[list(elements)]
        return replace(super().select(elements), systems=(), **kept)

    @property
    def rescued(self) -> dict[str, int]:
        """How many elements were solved by another solver than the one that was asked, by its name."""
        solved = (name for name, status in zip(self.solvers, self.statuses, strict=False) if status.usable)
        return {name: count for name, count in Counter(solved).items() if name != self.asked}

    def active_set(self, units_of: ConicProblem) -> ActiveSet | None:
        """Which rows and bounds are active, in the units of a problem with the same matrices and B elements.

        None for integer programs, whose multipliers are not their own.
        """
        return None if self.problem.structure.has_integers else active_set(units_of, self.point, self.slack)

    @cached_property
    def s(self) -> Tensor:
        """(B, m) slack ``b - A x``."""
        return self.problem.slack(self.x)

    @property
    def error(self) -> Tensor:
        """(B,) the worst residual: of an integer program the primal one, as its multipliers prove nothing."""
        return self.residuals.primal if self.problem.structure.has_integers else self.residuals.worst

    @cached_property
    def residuals(self) -> Residuals:
        """How far the solution is from optimal, whatever the solver said; NaN where there is none."""
        units = self.problem.units
        return residuals_of(units.apply(self.problem), units.point_in(self.problem, self.point))


@dataclass(frozen=True, eq=False, repr=False)
class LinearSolution(BatchSolution):
    """Solutions of a batch of B linear problems, with one status for each element.

    Attributes:
        problem: the batch that was solved.
        x: (B, n) minimisers, flattened; NaN where there is no solution.
        answers: what the solver itself answered for each element, before any feature map; None where there is none.
        statuses: B statuses.
        iterations: (B,) zero: a solver that is a plain function has none to tell.
        setup_seconds, solve_seconds: (B,) zero, and the time in the solver.
        states: B warm-start states: answers, for a solver that takes them.
    """

    problem: LinearProblem
    x: Tensor
    answers: tuple[Any, ...]
    statuses: tuple[Status, ...]
    iterations: NDArray[np.int64]
    setup_seconds: NDArray[np.float64]
    solve_seconds: NDArray[np.float64]
    states: Sequence[Any]

    _tensors: ClassVar[tuple[str, ...]] = ("x", "iterations", "setup_seconds", "solve_seconds")
    _tuples: ClassVar[tuple[str, ...]] = ("statuses", "states", "answers")

    @property
    def point(self) -> LinearPoint:
        return LinearPoint(self.x)


@dataclass(frozen=True, eq=False, repr=False)
class SmoothSolution(BatchSolution):
    """Solutions of a batch of B problems of a declarative node, with one status for each element.

    Attributes:
        problem: the batch that was solved.
        x: (B, n) minimisers, flattened; NaN where there is no solution.
        statuses: B statuses.
        iterations: (B,) iterations of the solver.
        setup_seconds, solve_seconds: (B,) zero, and the time of the whole batch.
        states: B warm-start states: each element's minimiser.
        aux: what the node's solver left for its closed-form gradient.
        nu, lam: (B, p) and (B, r) the solver's multipliers; None where it has none.
    """

    problem: SmoothProblem
    x: Tensor
    statuses: tuple[Status, ...]
    iterations: NDArray[np.int64]
    setup_seconds: NDArray[np.float64]
    solve_seconds: NDArray[np.float64]
    states: Sequence[Any]
    aux: Any = None
    nu: Tensor | None = None
    lam: Tensor | None = None

    _tensors: ClassVar[tuple[str, ...]] = ("x", "iterations", "setup_seconds", "solve_seconds")

    @property
    def domain(self) -> str:
        return self.problem.node.domain

    @property
    def outputs(self) -> SmoothOutput:
        return SmoothOutput(self.x)

    @property
    def point(self) -> SmoothPoint:
        """Minimisers and multipliers; multipliers that the solver does not tell are estimated."""
        return self._point

    @cached_property
    def _point(self) -> SmoothPoint:
        if self.nu is not None and self.lam is not None:
            return SmoothPoint(self.x, self.nu, self.lam)
        x = torch.where(self.usable[:, None], self.x, 0)
        known = None
        if self.aux is not None and self.problem.is_plain:
            known = self.problem.node.multipliers(tuple(self.problem.data), self.problem.shaped(x), self.aux)
        return SmoothPoint(self.x, *(known or estimate_multipliers(self.problem, x)))

    def select(self, elements: Sequence[int]) -> Self:
        """The solutions of these elements."""
        chosen = list(elements)
        own = {name: getattr(self, name) for name in ("nu", "lam")}
        changes: dict[str, Any] = {name: part if part is None else part[chosen] for name, part in own.items()}
        if self.aux is not None:
            whole = self.batch_size
            parts = (part if part.shape[0] == 1 < whole else part[chosen] for part in self.aux)
            changes["aux"] = type(self.aux)(*parts) if hasattr(self.aux, "_fields") else tuple(parts)
        return replace(super().select(elements), **changes)

    def traced(self, data: Any, outputs: SmoothOutput) -> Self:
        """This solution with data and minimisers that have a graph; multipliers follow from them, differentiably."""
        problem = replace(self.problem, data=data)
        return replace(self, problem=problem, x=outputs.x, aux=None, nu=None, lam=None)

    @cached_property
    def residual(self) -> Tensor:
        """(B,) the worst of ``|∇L|``, ``|h|``, ``max(g, 0)`` and ``|λ g|``, in the maximum norm."""
        h, g = self.problem.constraints(self.x)
        parts = [self.problem.gradient(self.point), h, torch.relu(g), self.point.lam * g]
        return torch.stack([maximum_norm(part) for part in parts]).amax(0)
