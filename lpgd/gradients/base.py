"""The GradientMethod interface, and the record of what a call of one did."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from lpgd.arrays import IntArray, elements_where
from lpgd.gradients.losses import BatchRows, Reading
from lpgd.problems.base import FEW, Data, Point, Traits, is_surely_finite
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.base import AnySolver

__all__ = ["GradientInfo", "GradientMethod", "check_compatible", "check_cotangent", "is_number"]


@dataclass(eq=False, repr=False)
class GradientInfo:
    """What one gradient computation did, element by element.

    Attributes:
        method: the method that was asked for.
        used: for each element what its gradient comes from: ``"average"``, ``"lower"``, ``"upper"``,
            ``"implicit"``, ``"implicit, regularised"`` (a singular system's minimum-norm answer: where only
            multipliers are not unique, what concerns the solution alone is exact, and there is no warning),
            ``"implicit, one-sided"`` (an active inequality without a multiplier), ``"closed form"``,
            ``"constraints ignored"``, ``"constraints ignored, regularised"`` (by a pseudo-inverse),
            ``"zero cotangent"``, ``"no solution"``, or ``"no perturbed solution"`` (gradient zero).
        fallbacks: elements whose gradient does not come from what the method asks for.
        tau: (B,) step τ used, NaN where none was.
        unit: (B,) the step at which the tilt is as large as the terms that it changes: ``tau / unit`` is the step
            without units.  NaN where there was no cotangent, None for methods without a step.
        moved: (B,) whether a perturbed primal solution differs from the solution by more than the solver's error;
            None for methods without one.
        crossed: (B,) whether an active set of a perturbed solution differs from that of the solution; None for methods
            without one.
        jumped: (B,) whether a perturbed solution of a node is another one than its tilt explains; None likewise.
        kinked: (B,) whether an active constraint changes along every step that was tried, so that the gradient is a
            mean of several; None likewise.
        unclear: (B,) the same of the multipliers alone, which concerns gradients with respect to single constraints.
        tolerance: the solver tolerance of the perturbed solves, None where there were none.
        iterations: (B,) solver iterations spent on perturbed solves, None where there were none.
        newton: (B,) how many of the perturbed solutions were found by Newton's method from the solution; a solver was
            asked for the others.  None for methods without a step.
        descent: (B,) the product of an approximate gradient with the exact one, where the method was asked for it: a
            positive one means that a small step along the approximate gradient descends.
        doubt: (B,) the share of an exact answer that the error of the solution may change, which rounding and the
            condition of the optimality conditions decide; at a kink the difference of its two sides.  Of small steps
            of LPGD at curved cones, the share by which they differ from what the optimality conditions say, infinite
            where those do not determine it.  Of nodes, the share of a gradient that rounding errors may change.
            NaN where nothing was checked, None for other methods.
        notices: for a datum's name, what a user who asks for its gradient should know; a layer warns of these.
    """

    method: GradientMethod
    used: list[str]
    fallbacks: list[int] = field(default_factory=list)
    tau: Tensor | None = None
    unit: Tensor | None = None
    moved: Tensor | None = None
    crossed: Tensor | None = None
    jumped: Tensor | None = None
    kinked: Tensor | None = None
    unclear: Tensor | None = None
    tolerance: float | None = None
    iterations: IntArray | None = None
    newton: Tensor | None = None
    descent: Tensor | None = None
    doubt: Tensor | None = None
    notices: dict[str, str] = field(default_factory=dict)

    @classmethod
    def blank(cls, method: GradientMethod, solution: AnySolution, **more: Any) -> Self:
        """The record while no element has a gradient yet: of those without a solution it stays what it is."""
        used = ["zero cotangent"] * solution.batch_size
        for element in solution.failed:
            used[element] = "no solution"
        return cls(method, used, notices=dict(solution.notices), **more)

    def __repr__(self) -> str:
        descriptions = [f"{number} {name}" for name, number in self.counts.items()]
        descriptions += [f"{len(self.fallbacks)} fallbacks"] if self.fallbacks else []
        descriptions += [f"{int(self.moved.sum())} moved"] if self.moved is not None else []
        return f"GradientInfo({self.method}; {', '.join(descriptions) or 'no elements'})"

    @property
    def counts(self) -> dict[str, int]:
        """How many elements used what."""
        return dict(Counter(self.used))


@dataclass(frozen=True, repr=False)
class GradientMethod(ABC):
    """How to get the action of a solution map's derivative.  Methods hold options only and are shared freely."""

    needs: ClassVar[frozenset[str]]
    """Which :class:`~lpgd.problems.base.Traits` problems must have: ``can_tilt``, ``can_augment``, ``has_kkt``,
    ``is_continuous``, ``is_smooth``, ``takes_losses``."""

    def __repr__(self) -> str:
        """With the options that are not the defaults: messages begin with it."""
        values = ((option, getattr(self, option.name)) for option in fields(self))
        named = [f"{option.name}={value!r}" for option, value in values if value is not option.default != value]
        return f"{type(self).__name__}({', '.join(named)})"

    @property
    def required(self) -> frozenset[str]:
        """What these options need of the problem."""
        return self.needs

    def bound(self, readings: Callable[[], Sequence[Reading]], as_rows: BatchRows) -> GradientMethod:
        """The same method for one call, of whose loss it knows more than the cotangent; most know no loss.

        Args:
            readings: how the layer's outputs are read off the variables of its programs.
            as_rows: the call's tensors with leading batch dimensions as rows.
        """
        return self

    @abstractmethod
    def vjp(
        self,
        solution: AnySolution,
        cotangent: Point,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Data, GradientInfo]:
        """The gradient of ``<cotangent, solution>`` with respect to the problem's data.

        Args:
            solution: of B elements of a :class:`~lpgd.problems.base.Problem` that has what the method needs; elements
                without a usable one get a zero gradient.
            cotangent: dℓ/d(point), a named tuple of (B, ·) tensors.
            solver: solves perturbed problems, where the method needs that.
            executor: where the work runs.

        Returns:
            The gradient, of the type and shapes of the problem's data, and the record of how it came about.
        """

    @abstractmethod
    def jvp(
        self,
        solution: AnySolution,
        tangent: Data,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Point, GradientInfo]:
        """The change of the solution along a tangent of the data: forward mode.

        Args:
            tangent: a named tuple of the type and shapes of the problem's data.

        Returns:
            The tangent of the point, (B, ·) each, and the record.
        """

    def is_differentiable(self, problem: AnyProblem) -> bool:
        """Whether there is a :meth:`differentiable_vjp` for this problem."""
        return False

    def differentiable_vjp(self, solution: AnySolution, data: Data, outputs: Data, cotangent: Point) -> Data:
        """The gradient of :meth:`vjp` by differentiable operations, for second derivatives.

        Args:
            solution: the solver's answer.
            data: of the problem, with a graph of their own.
            outputs: ``solution.outputs`` with theirs, zero for elements without a solution.  On the solution map a
                gradient is a function of the data, through the outputs and directly; here both are told apart.
            cotangent: as for :meth:`vjp`.

        Returns:
            The gradient, of the type and shapes of the data.

        Raises:
            RuntimeError: an element has no second derivative.
        """
        raise RuntimeError(f"gradients by {self} cannot be differentiated again.")


_CAPABILITIES = {
    "can_tilt": "a linear tilt of its objective",
    "takes_losses": "an objective that a loss can be added to, as conic programs and smooth nodes do",
    "can_augment": "a quadratic term in its objective (rho > 0)",
    "has_kkt": "optimality conditions that can be differentiated",
    "is_smooth": "the smooth functions of a declarative node",
    "is_continuous": "a solution that moves with small changes (tau=None chooses a small step: give tau)",
}


def is_number(value: object) -> bool:
    """Whether an option is one real number: a tensor would be one for each element, or ask for a gradient."""
    return isinstance(value, Real)


def check_compatible(method: GradientMethod, traits: Traits) -> None:
    """Refuse a method that needs what problems have not, when a layer is built.

    Args:
        method: the gradient method.
        traits: of the problems to come.

    Raises:
        TypeError: with what is missing.
    """
    wanted = {name: text for name, text in _CAPABILITIES.items() if name in method.required}
    missing = [text for name, text in wanted.items() if not getattr(traits, name)]
    if missing:
        advice = "" if traits.has_kkt else "; use lpgd.LPGD(tau=...) or lpgd.BlackboxBackprop(tau=...)"
        raise TypeError(f"{method} needs {' and '.join(missing)}, which {traits.noun} does not have{advice}.")


def relevant_elements(solution: AnySolution, vectors: Iterable[Tensor]) -> list[int]:
    """Elements that have a solution and a nonzero row in one of ``vectors``."""
    nonempty = [vector for vector in vectors if vector.shape[-1]]
    # Most cotangents are dense, which their first column tells without a look at the others.
    if not solution.failed and any(_is_dense(vector) for vector in nonempty):
        return list(range(solution.batch_size))
    keep = solution.usable
    nonzero = keep.new_zeros(keep.shape)
    for vector in nonempty:
        nonzero = nonzero | vector.any(-1)
    return elements_where(keep & nonzero)


def _is_dense(vector: Tensor) -> bool:
    """Whether no row begins with zero."""
    if vector.numel() <= FEW:
        return all(row[0] for row in cast(Any, vector).tolist())
    return bool(vector[:, 0].all())


def check_cotangent(cotangent: Data) -> None:
    """Refuse loss gradients that are not finite.

    Raises:
        ValueError: with the elements.
    """
    for name, values in zip(cotangent._fields, cotangent, strict=True):
        if not values.shape[-1] or is_surely_finite(values):
            continue
        bad = elements_where(~torch.isfinite(values).all(-1))
        if bad:
            raise ValueError(
                f"the loss gradient with respect to {name} is NaN or infinite for elements {bad[:10]}: "
                "look at the loss (a logarithm or a square root at zero, or an overflow?)."
            )
