"""Linear objectives over feasible sets that only an oracle knows, batched: data, Lagrangian, tilt and augmentation.

The problem of each element, and its Lagrangian ([LPGD] section 4.3), with a set X that does not depend on c:

    minimise  <c, x>  subject to  x ∈ X          L(x; c) = <c, x>,  ∇_c L = x

The set is finite (assignments, paths, integer points) or not; nothing but solutions is known of it.  With a feature map
Ψ the set is ``{Ψ(x, ξ)}``: ``argmax <w, Ψ(x, ξ)>`` is this problem with c = -w.

[LPGD] Paulus, Musil, Martius: Lagrangian Proximal Gradient Descent for Learning Convex Optimization
Models (arXiv 2407.05920).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, integers
from lpgd.problems.base import Centered, PointOperations, Traits, maximum_norm
from lpgd.problems.solution import Solution
from lpgd.status import Status

__all__ = ["LinearData", "LinearPoint", "LinearProblem", "LinearSolution", "LinearStructure"]


class LinearData(NamedTuple):
    """The data of a batch of linear problems, or a gradient or tangent of them."""

    c: Tensor  # (B, n)


class _LinearPointFields(NamedTuple):
    x: Tensor  # (B, n)


class LinearPoint(_LinearPointFields, PointOperations):
    """Solutions ``x`` of a batch of B linear problems; also a cotangent or a tangent of them."""

    __slots__ = ()


@dataclass(frozen=True)
class LinearStructure:
    """What is fixed while costs change.

    Args:
        shape: of the costs and of a solution of one element.
    """

    shape: tuple[int, ...]

    @property
    def n(self) -> int:
        """Number of costs."""
        return math.prod(self.shape)

    @property
    def digest(self) -> bytes:
        """A fingerprint of the content, equal across processes."""
        return repr(self.shape).encode()

    @property
    def summary(self) -> str:
        """Its sizes in words."""
        return f"costs of shape {self.shape}"

    @property
    def traits(self) -> Traits:
        """What such problems can do: nothing is known of their sets, so that solutions may jump."""
        return Traits("a linear problem over a set that only its solver knows", is_continuous=False)


@dataclass(frozen=True, eq=False, repr=False)
class LinearProblem(Centered):
    """A batch of linear problems over sets that an oracle knows (see the module's docstring for the mathematics).

    Args:
        structure: the shape of an element.
        data: float64 costs c, (B, n), flattened.
        batch_size: number of elements B.
        extra: further inputs of the oracle, without a gradient, each with one row for each element of the original
            batch: tensors, arrays or sequences.
        originals: for each element its place in the original batch, and in ``extra``; None for the batch itself.
        tilted: whether costs are perturbed ones, of a backward pass.
        rho, center: the term ``(ρ/2) |x - center|²``, for oracles that take one; center is (B, n), or None for ρ = 0.

    Raises:
        ValueError: costs of another type or shape.
    """

    structure: LinearStructure
    data: LinearData
    batch_size: int
    extra: tuple[Any, ...] = ()
    originals: tuple[int, ...] | None = None
    rho: float = 0.0
    center: Tensor | None = None
    tilted: bool = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.batch_size} elements of {self.structure})"

    def __post_init__(self) -> None:
        c, expected = self.data.c, (self.batch_size, self.structure.n)
        if c.dtype != torch.float64 or tuple(c.shape) != expected:
            raise ValueError(f"c is {c.dtype} of shape {tuple(c.shape)}; it must be float64 of shape {expected}.")
        if self.originals is None:
            object.__setattr__(self, "originals", tuple(range(self.batch_size)))

    @property
    def traits(self) -> Traits:
        return self.structure.traits

    @property
    def device(self) -> torch.device:
        return self.data.c.device

    def with_data(self, data: LinearData) -> LinearProblem:
        """The same problems with other costs."""
        return replace(self, data=data)

    @property
    def datum_ndims(self) -> tuple[int, ...]:
        """Costs are vectors."""
        return (1,)

    @property
    def attached(self) -> tuple[Tensor, ...]:
        """Further inputs of the oracle that are tensors."""
        return tuple(values for values in self.extra if isinstance(values, Tensor))

    def with_attached(self, tensors: Sequence[Tensor]) -> LinearProblem:
        """The same problems with other tensors among ``extra``."""
        remaining = iter(tensors)
        extra = tuple(next(remaining) if isinstance(values, Tensor) else values for values in self.extra)
        return replace(self, extra=extra)

    def lanes(self, count: int, data: LinearData, attached: Sequence[Tensor] = ()) -> LinearProblem:
        """``count`` copies of this batch, one after the other."""
        size = count * self.batch_size
        c = data.c if data.c.shape[0] == size else data.c.repeat(count, 1)
        center = None if self.center is None else self.center.repeat(count, 1)
        copies = replace(self, data=LinearData(c), batch_size=size, originals=count * self.places, center=center)
        if not attached:
            return copies
        # Rows of tensors are those of all copies: so must be those of all else.
        extra = tuple(values if isinstance(values, Tensor) else _taken(values, copies.places) for values in self.extra)
        return replace(copies, extra=extra, originals=tuple(range(size))).with_attached(attached)

    @property
    def places(self) -> tuple[int, ...]:
        """For each element its place in the original batch."""
        return self.originals or ()

    def objective(self, x: Tensor) -> Tensor:
        """``<c, x> + (ρ/2) |x - center|²``: (B, n) to (B,)."""
        value = (self.data.c * x).sum(-1)
        return value if self.center is None else value + 0.5 * self.rho * (x - self.center).square().sum(-1)

    def lagrangian(self, point: LinearPoint) -> Tensor:
        """``L(x; c)``, which is the objective: (B,)."""
        return self.objective(point.x)

    # -- the two changes an oracle must solve again after ------------------------------------------------------

    def tilt(self, step: Tensor, cotangent: LinearPoint) -> LinearProblem:
        """``L + step <g, x>``: costs ``c + step g``.

        Args:
            step: (k B,) signed step of each element; with k > 1 the new batch is k copies of this one, one after the
                other.
            cotangent: (B, n).
        """
        copies = step.shape[0] // self.batch_size if self.batch_size else 1
        c = self.data.c.repeat(copies, 1) + step[:, None] * cotangent.x.repeat(copies, 1)
        center = None if self.center is None else self.center.repeat(copies, 1)
        changes: dict[str, Any] = {"originals": copies * self.places, "center": center, "tilted": True}
        return replace(self, data=LinearData(c), batch_size=step.shape[0], **changes)

    def tilt_unit(self, point: LinearPoint, cotangent: LinearPoint) -> Tensor:
        """(B,) ``|c| / |g|`` in the maximum norm; costs of 0 count as 1, and a zero cotangent gives infinity."""
        size, direction = maximum_norm(self.data.c), maximum_norm(cotangent.x)
        return torch.where(size > 0, size, 1.0) / direction

    # -- derivatives of the Lagrangian ------------------------------------------------------------------------

    def gradient_difference(self, plus: LinearPoint, minus: LinearPoint, weight: Tensor) -> LinearData:
        """``weight (∇_c L(plus) - ∇_c L(minus)) = weight (x₊ - x₋)``; weight is (B,)."""
        return LinearData(weight[:, None] * (plus.x - minus.x))

    def mixed_product(self, point: LinearPoint, tangent: LinearData) -> LinearPoint:
        """``∇_x <∇_c L, dc> = dc``: the tilt of forward mode."""
        return LinearPoint(tangent.c)

    # -- batches ----------------------------------------------------------------------------------------------

    def select(self, elements: Tensor) -> LinearProblem:
        """The batch of these elements; ``extra`` is not copied."""
        return replace(
            self,
            data=LinearData(self.data.c[elements]),
            batch_size=len(elements),
            originals=tuple(self.places[element] for element in integers(elements)),
            center=None if self.center is None else self.center[elements],
        )

    def scatter(self, elements: Tensor, data: LinearData) -> LinearData:
        """A gradient of the data of ``select(elements)`` as one of this batch's: zero for the other elements."""
        return LinearData(torch.zeros_like(self.data.c).index_add(0, elements, data.c))

    def zero_gradient(self) -> LinearData:
        """A gradient of the data that is zero."""
        return LinearData(torch.zeros_like(self.data.c))

    def finite(self) -> Tensor:
        """(B,) whether an element's costs are finite."""
        return torch.isfinite(self.data.c).all(-1)


def _taken(values: Any, places: tuple[int, ...]) -> Any:
    return values[list(places)] if isinstance(values, np.ndarray) else [values[place] for place in places]


@dataclass(frozen=True, eq=False, repr=False)
class LinearSolution(Solution[LinearProblem, LinearPoint]):
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
    iterations: IntArray
    setup_seconds: FloatArray
    solve_seconds: FloatArray
    states: Sequence[Any]

    _tensors: ClassVar[tuple[str, ...]] = ("x", "iterations", "setup_seconds", "solve_seconds")
    _tuples: ClassVar[tuple[str, ...]] = ("statuses", "states", "answers")

    @property
    def point(self) -> LinearPoint:
        return LinearPoint(self.x)
