"""What a solver returns for a batch of a node's problems."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from lpgd.arrays import FloatArray, IntArray, elements_where, rows_where
from lpgd.problems.base import Data, States, maximum_norm
from lpgd.problems.node.multipliers import estimate_multipliers
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.structure import NodeOutput, NodePoint
from lpgd.problems.solution import AnyProblem, Solution
from lpgd.status import Status

__all__ = ["NodeSolution"]


@dataclass(frozen=True, eq=False, repr=False)
class NodeSolution(Solution[NodeProblem, NodePoint]):
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
        barrier: μ where these are minimisers with a logarithmic barrier, whose multipliers have ``-λ g = μ``; else 0.
    """

    problem: NodeProblem
    x: Tensor
    statuses: tuple[Status, ...]
    iterations: IntArray
    setup_seconds: FloatArray
    solve_seconds: FloatArray
    states: States
    aux: Any = None
    nu: Tensor | None = None
    lam: Tensor | None = None
    barrier: float = 0.0

    _tensors: ClassVar[tuple[str, ...]] = ("x", "iterations", "setup_seconds", "solve_seconds")

    @property
    def domain(self) -> str:
        return self.problem.node.domain

    @property
    def notices(self) -> Mapping[str, str]:
        mask, reasons = self.problem.node.without_digits(tuple(self.problem.data), self.problem.shaped(self.x))
        places = [] if mask is None else elements_where(mask.expand(self.batch_size) & self.usable)
        return {name: f"elements {places[:10]}: {reason}" for name, reason in reasons.items()} if places else {}

    @property
    def outputs(self) -> NodeOutput:
        return NodeOutput(self.x)

    def cotangent(self, cotangents: Iterable[Tensor]) -> NodePoint:
        """A cotangent of the minimisers as one of the point, whose multipliers no loss sees: they have no columns."""
        (x,) = cotangents
        nothing = x.new_zeros(x.shape[0], 0)
        return NodePoint(x, nothing, nothing)

    @property
    def point(self) -> NodePoint:
        """Minimisers and multipliers; multipliers that the solver does not tell are estimated."""
        return self._point

    @cached_property
    def _point(self) -> NodePoint:
        if self.nu is not None and self.lam is not None:
            return NodePoint(self.x, self.nu, self.lam)
        if self.failed and self.batch_size:
            return self._of_usable()
        x, known = self.x, None
        if self.aux is not None and self.problem.is_plain:
            known = self.problem.node.multipliers(tuple(self.problem.data), self.problem.shaped(x), self.aux)
        return NodePoint(self.x, *(known or estimate_multipliers(self.problem, x)))

    def _of_usable(self) -> NodePoint:
        """The point, with multipliers of zero for elements without a solution, whose inputs may be no numbers."""
        elements = rows_where(self.usable)
        point = self.select(elements).point
        nu, lam = (
            multipliers.new_zeros(self.batch_size, multipliers.shape[-1]).index_copy(0, elements, multipliers)
            for multipliers in point[1:]
        )
        return NodePoint(self.x, nu, lam)

    def select(self, elements: Tensor, problem: AnyProblem | None = None) -> Self:
        """The solutions of these elements."""
        chosen = elements
        multipliers = {name: getattr(self, name) for name in ("nu", "lam")}
        changes: dict[str, Any] = {
            name: values if values is None else values[chosen] for name, values in multipliers.items()
        }
        if self.aux is not None:
            whole = self.batch_size
            tensors = (tensor if tensor.shape[0] == 1 < whole else tensor[chosen] for tensor in self.aux)
            changes["aux"] = type(self.aux)(*tensors) if hasattr(self.aux, "_fields") else tuple(tensors)
        return replace(super().select(elements, problem), **changes)

    def traced(self, data: Data, outputs: Data) -> Self:
        """This solution with data and minimisers that have a graph; multipliers follow from them, differentiably."""
        problem = replace(self.problem, data=data)
        return replace(self, problem=problem, x=outputs[0], aux=None, nu=None, lam=None)

    @cached_property
    def residual(self) -> Tensor:
        """(B,) the worst of ``|∇L|``, ``|h|``, ``max(g, 0)`` and ``|λ g|``, in the maximum norm."""
        h, g = self.problem.constraints(self.x)
        residuals = [self.problem.gradient(self.point), h, torch.relu(g), self.point.lam * g]
        return torch.stack([maximum_norm(residual) for residual in residuals]).amax(0)
