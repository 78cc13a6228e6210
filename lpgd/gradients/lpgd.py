"""Lagrangian Proximal Gradient Descent: the gradient is a difference of Lagrangian gradients at perturbed solutions.

With ``g = dℓ/dz`` at the solution ``z*``, and ``z_{±τ}`` the solution after the tilt ``± τ <g, z>`` (and, with
ρ > 0, the augmentation ``(ρ/2) |x - x*|²``), [LPGD] eqs. 16, 21, 22 give

    lower    (∇_w L(z_{+τ}) - ∇_w L(z*))     / τ
    upper    (∇_w L(z*)     - ∇_w L(z_{-τ})) / τ
    average  (∇_w L(z_{+τ}) - ∇_w L(z_{-τ})) / 2τ

As τ → 0 they agree with implicit differentiation, of the augmented problem where ρ > 0 ([LPGD] eq. 46).  The solves
themselves, and the choice of τ, are in :mod:`lpgd.gradients.perturbed`.

A loss that is given as a function takes the place of ``<g, z>``: ``z_{±τ}`` is then the solution of ``L ± τ ℓ``, and
the difference the gradient of the envelope of the loss itself (eqs. 10, 11, 16).

[LPGD] Paulus, Musil, Martius: Lagrangian Proximal Gradient Descent for Learning Convex Optimization Models
(arXiv 2407.05920).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, flags, integers, rows_where
from lpgd.gradients.base import GradientInfo, GradientMethod, is_number, relevant_elements
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.gradients.losses import BatchRows, Loss, PosedLoss, Reading, plain_readings, weighed
from lpgd.gradients.node_steps import difference, with_exact
from lpgd.gradients.perturbed import Perturbation, perturb
from lpgd.gradients.quadratic_steps import quadratic_steps
from lpgd.gradients.records import blank, record, tied_elements, warn_of_jumps
from lpgd.gradients.sides import Envelope
from lpgd.gradients.small_steps import check_small_steps, is_doubtful
from lpgd.problems.base import Data, Point
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.status import SolverError, warn

__all__ = ["LPGD"]


@dataclass(frozen=True, repr=False)
class LPGD(GradientMethod):
    """The gradient of a Lagrange-Moreau envelope of the loss, by solving the perturbed problem again.

    Args:
        tau: the step τ > 0, which multiplies the cotangent as it arrives: a mean over a larger batch makes smaller
            perturbations.  None chooses a step for each element that is near to the exact gradient: ``√ε`` relative to
            the terms that the tilt changes, ε the error of the solution, so that noise of the order of ε/τ and
            curvature of the order of τ (τ² for ``"average"``) are both small.  Where an active set changes along it, it
            is shortened; where that does not help, the solution has no derivative, and a warning names the element.
            Where no step is right, as it moves some numbers far and is lost in the rounding of others, ``ImplicitKKT``
            (of a node ``ClosedForm``) takes the element, on record.
            Steps so short hardly ever move the vertex that solves a linear program: where they move none of a batch, a
            layer warns of it.  ``GradientInfo.tau`` has what was taken.  Integer programs need a τ: their solutions
            stay where they are for small ones.
        rho: ρ ≥ 0 of the augmented Lagrangian; not scaled by τ.
        envelope: ``"average"`` (two solves), ``"lower"`` or ``"upper"`` (one solve each).
        loss: the convex loss itself, a :class:`~lpgd.QuadraticLoss`, or for conic programs a :class:`~lpgd.CvxpyLoss`.
            The gradient is that of its envelope at τ (of this loss, whatever its weight), times the weight with which
            the element's loss enters the whole, such as 1/B; a negative one exchanges lower and upper.  What is
            differentiated must be this loss of the layer's output, ``loss(output)``.  The upper envelope needs a
            problem that stays convex less ``τ ℓ``; elements for which it does not have the lower one alone.
        separate: losses of primal and of dual variables have an envelope each, of four solves for the average ([LPGD]
            eqs. 73-78), in place of one of both together (eqs. 79-82).  Forward mode is that of both together.

    A perturbed problem without a solution on one side leaves the other side; without one on both, the element's
    gradient falls back to ``ImplicitKKT(rho)``.  Both are on record in :class:`GradientInfo` and warn.

    Raises:
        ValueError: an option is out of its range.
    """

    tau: float | None = None
    rho: float = 0.0
    envelope: Envelope = "average"
    loss: Loss | PosedLoss | None = field(default=None, kw_only=True)
    separate: bool = field(default=False, kw_only=True)

    needs: ClassVar[frozenset[str]] = frozenset({"can_tilt"})

    def __post_init__(self) -> None:
        if self.tau is not None and not (is_number(self.tau) and sys.float_info.min <= self.tau < math.inf):
            raise ValueError(f"tau is {self.tau!r}; it must be positive and finite, one number, or None to be chosen.")
        if not (is_number(self.rho) and 0 <= self.rho < math.inf):
            raise ValueError(f"rho is {self.rho!r}; it must be nonnegative and finite, one number.")
        if self.envelope not in get_args(Envelope):
            raise ValueError(f"envelope is {self.envelope!r}; it must be one of {', '.join(get_args(Envelope))}.")
        if self.loss is None:
            return
        if not isinstance(self.loss, Loss | PosedLoss):
            raise TypeError(
                f"loss is {self.loss!r}; it must be a lpgd.QuadraticLoss or a lpgd.CvxpyLoss with its values."
            )
        if type(self) is not LPGD or self.tau is None:
            raise ValueError(
                f"a loss has an envelope of its own at a given tau: LPGD(tau, loss=...), not {type(self).__name__}."
            )

    @property
    def required(self) -> frozenset[str]:
        more = {"can_augment": self.rho > 0, "is_continuous": self.tau is None, "takes_losses": self.loss is not None}
        return self.needs | {name for name, needed in more.items() if needed}

    def bound(self, readings: Callable[[], Sequence[Reading]], as_rows: BatchRows) -> LPGD:
        """The same with the loss as a function of the variables of one call's programs."""
        return replace(self, loss=self.loss.posed(readings(), as_rows)) if isinstance(self.loss, Loss) else self

    def steps(self, tau: float, cotangent: Point) -> Tensor:
        """(B,) the steps that a given τ stands for, by which the cotangent is multiplied."""
        return cotangent.x.new_full(cotangent.x.shape[:1], tau)

    def vjp(
        self,
        solution: AnySolution,
        cotangent: Point,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Data, GradientInfo]:
        if self.separate and any(bool(tensor.any()) for tensor in tuple(cotangent)[1:]):
            return self._of_both(solution, cotangent, solver, executor)
        direct = quadratic_steps(self, solution, cotangent, solver)
        if direct is None:
            return self._by_ends(solution, cotangent, solver, executor)
        gradient, info = direct.gradient, blank(self, solution)
        if not direct.is_whole:
            found, info = self._by_ends(solution, direct.without(cotangent), solver, executor)
            gradient = found._make(a + b for a, b in zip(found, gradient, strict=True))
        direct.add_to(info)
        return gradient, info

    def _by_ends(
        self, solution: AnySolution, cotangent: Point, solver: AnySolver, executor: Executor | None
    ) -> tuple[Data, GradientInfo]:
        """The gradient by the perturbed problems' solutions, whatever the problem."""
        problem = solution.problem
        pair = _Perturbed(self, solution, cotangent, solver, executor)
        if pair.elements:
            ends, steps = (pair.plus, pair.minus), (pair.weight, pair.smooth)
            found, lost = difference(pair.problem, solution, cotangent, self.rho, pair.elements, ends, *steps)
            gradient = found if pair.is_whole else problem.scatter(as_index(pair.elements, problem.device), found)
            if elements := [pair.elements[place] for place in elements_where(lost)]:
                gradient = with_exact(self.rho, gradient, elements, pair.info, solution, cotangent, solver)
        else:
            gradient = problem.zero_gradient()
        if pair.unsolved:
            fallback_gradient, info = pair.fallback().vjp(solution, pair.of_unsolved(cotangent), solver, executor)
            pair.record_fallback(info)
            gradient = gradient._make(a + b for a, b in zip(gradient, fallback_gradient, strict=True))
        if self.tau is None and pair.is_still(cotangent):
            pair.info.notices["q"] = _ZERO_GRADIENT
        return gradient, pair.info

    def _of_both(
        self, solution: AnySolution, cotangent: Point, solver: AnySolver, executor: Executor | None
    ) -> tuple[Data, GradientInfo]:
        """The sum of the gradients of a primal and of a dual loss, each by its own envelope ([LPGD] eqs. 73-78).

        A dual loss is lower where ``L - τ <g_y, y>`` is, for L is maximised in y: its lower envelope is a step of -τ.
        """
        mirrored: dict[Envelope, Envelope] = {"average": "average", "lower": "upper", "upper": "lower"}
        primal = replace(self, separate=False)
        dual = replace(primal, envelope=mirrored[self.envelope], loss=None)
        zeros = [torch.zeros_like(tensor) for tensor in cotangent]
        of_x, of_y = cotangent._make((cotangent.x, *zeros[1:])), cotangent._make((zeros[0], *tuple(cotangent)[1:]))
        gradient, info = primal.vjp(solution, of_x, solver, executor)
        more, other = dual.vjp(solution, of_y, solver, executor)
        both = gradient._make(a + b for a, b in zip(gradient, more, strict=True))
        for element, used in enumerate(info.used):
            if used == "zero cotangent" and other.used[element] != used:
                info.used[element] = self.envelope if other.used[element] == dual.envelope else other.used[element]
        info.method, info.fallbacks = self, sorted({*info.fallbacks, *other.fallbacks})
        info.notices |= other.notices
        return both, info

    def jvp(
        self,
        solution: AnySolution,
        tangent: Data,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Point, GradientInfo]:
        if self.loss is not None:
            raise TypeError(f"{self} is an envelope of a loss, and has no forward mode: use reverse mode.")
        problem, point = solution.problem, solution.point
        direction = problem.mixed_product(point, tangent)
        pair = _Perturbed(self, solution, direction, solver, executor)
        change = point._make(torch.zeros_like(tensor) for tensor in point)
        index = as_index(pair.elements, problem.device)
        for whole, values in zip(change, pair.plus.minus(pair.minus).scaled(pair.weight), strict=True):
            whole[index] = values.to(whole.dtype)  # steps are float64
        if pair.unsolved:
            fallback_change, info = pair.fallback().response(solution, pair.of_unsolved(direction), executor)
            pair.record_fallback(info)
            for whole, values in zip(change, fallback_change, strict=True):
                whole[pair.unsolved] = values[pair.unsolved]
        return change, pair.info


class _Perturbed:
    """The perturbed solves of one call, reduced to ``weight (plus - minus)`` for the elements that have one.

    Attributes:
        elements: elements with a perturbed solution on at least one side.
        problem: the original problem, of these elements.
        plus, minus: their points, (E, ·) each.
        weight: (E,) 1/τ or 1/2τ.
        smooth: (E,) elements whose small step goes along smooth functions.
        unsolved: elements without any, to be handed to the fallback.
        lost: those of them that have one, whose small step is lost in rounding.
        info: the record.
    """

    def __init__(
        self,
        method: LPGD,
        solution: AnySolution,
        cotangent: Point,
        solver: AnySolver,
        executor: Executor | None,
    ) -> None:
        self.method, self.whole = method, solution.problem
        self.info = blank(method, solution)
        loss = scale = None
        if method.loss is not None:
            loss, scale, cotangent = weighed(_posed(method.loss, solution), solution, cotangent, method)
        active = relevant_elements(solution, cotangent)
        if len(active) < solution.batch_size:
            index = as_index(active, self.whole.device)
            solution, cotangent = solution.select(index), cotangent.select(index)
            loss = None if loss is None else loss.select(index)
            scale = None if scale is None else scale[index]
        problem = solution.problem
        self.elements, self.unsolved, self.lost, self.problem = active, [], set(), problem
        self.plus, self.minus, self.weight = solution.point, solution.point, solution.x.new_zeros(len(active))
        self.smooth = self.weight > 0
        if not active:
            return
        steps = None if method.tau is None else method.steps(method.tau, cotangent)
        found = perturb(Perturbation(solution, cotangent, solver, executor, method.envelope, method.rho, steps, loss))
        self.still = ~found.moved
        tied = tied_elements(solution, active)
        record(self.info, active, found, tied)
        keep = found.above | found.below
        doubtful = is_doubtful(method, problem, cotangent, found)
        if bool(doubtful.any()):
            lost = check_small_steps(method, solution, cotangent, found, active, executor, self.info, doubtful)
            keep = keep & ~lost
            self.lost = {active[position] for position in elements_where(lost)}
        warn_of_jumps(self.info, active, found, tied)
        self.weight = torch.where(keep, 1.0 / (found.tau * (found.above.double() + found.below.double()).clamp(1)), 0.0)
        self.weight = self.weight if scale is None else scale * self.weight
        self.plus, self.minus = found.plus, found.minus
        rough = found.kinked | found.unclear | found.jumped | found.crossed
        self.smooth = ~rough & (method.tau is None)
        if not keep.all():
            self.unsolved = [element for element, fine in zip(active, flags(keep), strict=True) if not fine]
            kept = rows_where(keep)
            self.elements = [active[position] for position in integers(kept)]
            self.problem = problem.select(kept)
            self.plus, self.minus, self.weight = self.plus.select(kept), self.minus.select(kept), self.weight[kept]
            self.smooth = self.smooth[kept]

    @property
    def is_whole(self) -> bool:
        return len(self.elements) == self.whole.batch_size

    def is_still(self, cotangent: Point) -> bool:
        """Whether there were perturbed solutions of a linear program, and none moved that could have."""
        if not self.elements or self.unsolved or not self.whole.traits.is_linear_program or not bool(self.still.all()):
            return False
        return bool(self.whole.would_move(cotangent)[self.elements].any())

    def fallback(self) -> ImplicitKKT:
        """The method for elements without any perturbed solution.

        Raises:
            SolverError: the problem has no optimality conditions to fall back on.
        """
        if not self.whole.traits.has_kkt:
            raise SolverError(
                f"{self.method}: no perturbed problem of elements {self.unsolved} has a solution, on either side; "
                "use a smaller tau.",
                indices=self.unsolved,
            )
        return ImplicitKKT(rho=self.method.rho)

    def of_unsolved(self, cotangent: Point) -> Any:
        """A cotangent, or a tilt, that is zero for all but the elements for the fallback.

        The fallback is given the whole batch, so that what it says of elements names their places in it.
        """
        mask = torch.zeros(self.whole.batch_size, 1, dtype=torch.bool, device=self.whole.device)
        mask[self.unsolved] = True
        return cotangent._make(torch.where(mask, tensor, 0.0) for tensor in cotangent)

    def record_fallback(self, info: GradientInfo) -> None:
        """Put on record that the fallback was used, and warn where nothing could be solved."""
        for element in self.unsolved:
            self.info.used[element] = info.used[element]
        if without := [element for element in self.unsolved if element not in self.lost]:
            warn(
                f"{self.method}: no perturbed problem of elements {without[:10]} has a solution (with a loss on dual "
                f"variables, redundant equalities do that); their gradients come from {info.method}."
            )


def _posed(loss: Loss | PosedLoss, solution: AnySolution) -> PosedLoss:
    """The loss of the batch, one row for each element."""
    if isinstance(loss, Loss):
        loss = loss.posed(plain_readings(solution.point), lambda tensor, ndim: tensor.to(torch.float64))
    return loss.select(torch.arange(solution.batch_size, device=solution.x.device))


_ZERO_GRADIENT = (
    "LPGD(tau=None) takes a step that is small enough for the exact gradient, and no solution of this linear program "
    "moved with it: what reaches its cost through the solver is zero (a direct dependence of the loss on the cost is "
    "not affected). Give a tau of the order of output.info.gradients[-1].unit, at which the loss gradient is as large "
    "as the cost; the tau that was taken is beside it. lpgd.diagnose and lpgd.sweep compare several."
)
