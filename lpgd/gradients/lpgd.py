"""Lagrangian Proximal Gradient Descent: the gradient is a difference of Lagrangian gradients at perturbed solutions.

With ``g = dℓ/dz`` at the solution ``z*``, and ``z_{±τ}`` the solution after the tilt ``± τ <g, z>`` (and, with
ρ > 0, the augmentation ``(ρ/2) |x - x*|²``), [LPGD] eqs. 16, 21, 22 give

    lower    (∇_w L(z_{+τ}) - ∇_w L(z*))     / τ
    upper    (∇_w L(z*)     - ∇_w L(z_{-τ})) / τ
    average  (∇_w L(z_{+τ}) - ∇_w L(z_{-τ})) / 2τ

As τ → 0 they agree with implicit differentiation, of the augmented problem where ρ > 0 ([LPGD] eq. 46).

[LPGD] Paulus, Musil, Martius: Lagrangian Proximal Gradient Descent for Learning Convex Optimization Models
(arXiv 2407.05920).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lpgd.gradients.base import GradientInfo, GradientMethod, relevant_elements
from lpgd.gradients.implicit import ImplicitKKT, is_linear_program
from lpgd.gradients.jumps import warn_of_jumps
from lpgd.solution import BatchSolution
from lpgd.solvers.base import BaseSolver
from lpgd.status import SolverError, warn

__all__ = ["LPGD", "BlackboxBackprop", "Domke"]

Envelope = Literal["average", "lower", "upper"]

_SIDES: dict[str, tuple[float, ...]] = {"average": (1.0, -1.0), "lower": (1.0,), "upper": (-1.0,)}

ACCURACY = 1e-4
"""Perturbed solves are asked for this accuracy relative to the size of the perturbation."""


@dataclass(frozen=True)
class LPGD(GradientMethod):
    """The gradient of a Lagrange-Moreau envelope of the loss, by solving the perturbed problem again.

    Args:
        tau: the step τ > 0, which multiplies the cotangent as it arrives: a mean over a larger batch makes smaller
            perturbations.  None chooses, for each element, ``√ε`` relative to the terms that the tilt changes, ε the
            error of the solver's solutions: noise of the order of ε/τ and curvature of the order of τ (τ² for
            ``"average"``) are then both small, few active sets change, and the result is close to the exact gradient
            where there is one.  Such a step hardly ever moves the vertex that solves a linear program: where it moves
            none of a batch, the zero gradient of the cost is warned about.  ``GradientInfo.tau`` has what was chosen.
            where there is one.  Integer programs need a τ: solutions stay where they are for small ones.
        rho: ρ ≥ 0 of the augmented Lagrangian; not scaled by τ.
        envelope: ``"average"`` (two solves), ``"lower"`` or ``"upper"`` (one solve each).

    A perturbed problem without a solution on one side leaves the other side; without one on both, the element's
    gradient falls back to ``ImplicitKKT(rho)``.  Both are on record in :class:`GradientInfo` and warn.

    Raises:
        ValueError: an option is out of its range.
    """

    tau: float | None = None
    rho: float = 0.0
    envelope: Envelope = "average"

    needs: ClassVar[frozenset[str]] = frozenset({"can_tilt"})

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise ValueError(f"tau is {self.tau}; it must be positive and finite, or None to be chosen.")
        if not 0 <= self.rho < math.inf:
            raise ValueError(f"rho is {self.rho}; it must be nonnegative and finite.")
        if self.envelope not in get_args(Envelope):
            raise ValueError(f"envelope is {self.envelope!r}; it must be one of {', '.join(get_args(Envelope))}.")

    @property
    def required(self) -> frozenset[str]:
        augmented = {"can_augment"} if self.rho else set()
        return self.needs | augmented | ({"is_continuous"} if self.tau is None else set())

    def steps(self, tau: float, cotangent: Any) -> Tensor:
        """(B,) the steps that a given τ stands for, by which the cotangent is multiplied."""
        return cotangent.x.new_full(cotangent.x.shape[:1], tau)

    def vjp(
        self,
        problem: Any,
        solution: Any,
        cotangent: Any,
        solver: BaseSolver,
        executor: Executor | None = None,
    ) -> tuple[Any, GradientInfo]:
        pair = _Perturbed(self, problem, solution, cotangent, solver, executor)
        gradient = problem.zero_gradient()
        if pair.elements:
            part = pair.problem.gradient_difference(pair.plus, pair.minus, pair.weight)
            gradient = part if pair.is_whole else problem.scatter(pair.elements, part)
        if pair.unsolved:
            part, info = pair.fallback().vjp(problem, solution, pair.of_unsolved(cotangent), solver, executor)
            pair.record_fallback(info)
            gradient = type(gradient)(*(a + b for a, b in zip(gradient, part, strict=True)))
        if self.tau is None and pair.is_still and is_linear_program(problem):
            pair.info.notices["q"] = _ZERO_GRADIENT
        return gradient, pair.info

    def jvp(
        self,
        problem: Any,
        solution: Any,
        tangent: Any,
        solver: BaseSolver,
        executor: Executor | None = None,
    ) -> tuple[Any, GradientInfo]:
        point = solution.point
        direction = problem.mixed_product(point, tangent)
        pair = _Perturbed(self, problem, solution, direction, solver, executor)
        change = type(point)(*(torch.zeros_like(part) for part in point))
        index = torch.as_tensor(pair.elements, device=problem.device, dtype=torch.int64)
        for whole, part in zip(change, pair.plus.minus(pair.minus).scaled(pair.weight), strict=True):
            whole[index] = part.to(whole.dtype)  # steps are float64
        if pair.unsolved:
            part, info = pair.fallback().response(problem, solution, pair.of_unsolved(direction), executor)
            pair.record_fallback(info)
            for whole, rows in zip(change, part, strict=True):
                whole[pair.unsolved] = rows[pair.unsolved]
        return change, pair.info


@dataclass(frozen=True)
class BlackboxBackprop(LPGD):
    """Blackbox backpropagation (Vlastelica et al. 2020): the lower envelope with ρ = 0 and a given τ (their λ).

    On a linear objective ``<c, x>`` its gradient is ``(x(c + τ g) - x(c)) / τ`` ([LPGD] section 4.3).
    """

    tau: float | None = 20.0
    rho: float = 0.0
    envelope: Envelope = "lower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho != 0.0 or self.envelope != "lower" or self.tau is None:
            raise ValueError("BlackboxBackprop is LPGD(tau, rho=0, envelope='lower'); use LPGD for anything else.")


@dataclass(frozen=True)
class Domke(LPGD):
    """Implicit differentiation by perturbation (Domke 2010): the average envelope with τ small, chosen by default."""

    tau: float | None = None
    rho: float = 0.0
    envelope: Envelope = "average"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.envelope != "average":
            raise ValueError("Domke is LPGD with envelope='average'; use LPGD for anything else.")


class _Perturbed:
    """The perturbed solves of one call, reduced to ``weight (plus - minus)`` for the elements that have one.

    Attributes:
        elements: elements with a perturbed solution on at least one side.
        problem: the original problem, of these elements.
        plus, minus: their points, (E, ·) each.
        weight: (E,) 1/τ or 1/2τ.
        unsolved: elements without any, to be handed to the fallback.
        info: the record.
    """

    def __init__(
        self,
        method: LPGD,
        problem: Any,
        solution: Any,
        cotangent: Any,
        solver: BaseSolver,
        executor: Executor | None,
    ) -> None:
        self.method, self.whole, size = method, problem, problem.batch_size
        self.info = GradientInfo.blank(
            method,
            solution,
            tau=torch.full((size,), torch.nan),
            unit=torch.full((size,), torch.nan),
            moved=torch.zeros(size, dtype=torch.bool),
        )
        active = relevant_elements(solution, cotangent)
        if len(active) < size:
            index = torch.as_tensor(active, dtype=torch.int64, device=problem.device)
            problem, solution, cotangent = problem.select(active), solution.select(active), cotangent.select(index)
        base = solution.point
        self.elements, self.unsolved, self.problem = active, [], problem
        self.plus, self.minus, self.weight = base, base, base.x.new_zeros(len(active))
        if not active:
            return

        units = problem.tilt_unit(base, cotangent)
        if method.tau is None:
            perturbed_solver = _refined(solver, problem)
            tau = perturbed_solver.solution_error(problem) ** 0.5 * units
        else:
            tau = method.steps(method.tau, cotangent)
            perturbed_solver = _tightened(solver, float((tau / units).min()))
        augmented = problem.augment(method.rho, base.x) if method.rho else problem
        sides = _SIDES[method.envelope]
        if len(sides) == 1 and perturbed_solver != solver:
            # Both ends of a difference are solved to one tolerance; the old end alone would be the noisier one.
            base = _usable_or(perturbed_solver.solve(augmented, solution.states, executor), solution)
        tilted = augmented.tilt(torch.cat([sign * tau for sign in sides]), cotangent)
        results = perturbed_solver.solve(tilted, solution.states, executor).parts(len(sides))
        solved = {sign: result.usable for sign, result in zip(sides, results, strict=True)}
        points = {sign: result.point for sign, result in zip(sides, results, strict=True)}
        if len(sides) == 1 and not solved[sides[0]].all():
            # The asked-for side has no solution for some elements: try the other one.
            other = -sides[0]
            result = perturbed_solver.solve(augmented.tilt(other * tau, cotangent), solution.states, executor)
            solved[other], points[other] = result.usable & ~solved[sides[0]], result.point
        nothing = torch.zeros(len(active), dtype=torch.bool, device=problem.device)
        above, below = solved.get(1.0, nothing), solved.get(-1.0, nothing)
        plus = points[1.0].where(above, base) if 1.0 in points else base
        minus = points[-1.0].where(below, base) if -1.0 in points else base
        self._record(active, tau, units, above, below)
        warn_of_jumps(method, augmented, base, (plus, minus), tau, cotangent, active)
        error = 30 * perturbed_solver.solution_error(problem) * (1 + base.x.abs().amax(-1))
        distance = torch.maximum((plus.x - base.x).abs().amax(-1), (minus.x - base.x).abs().amax(-1))
        assert self.info.moved is not None
        self.info.moved[active] = (distance > error).cpu()
        self.info.tolerance = perturbed_solver.tolerance
        self.info.iterations = sum(result.iterations for result in results)

        keep = above | below
        self.weight = torch.where(keep, 1.0 / (tau * (above.double() + below.double()).clamp(min=1.0)), 0.0)
        self.plus, self.minus = plus, minus
        if not keep.all():
            self.unsolved = [element for element, fine in zip(active, keep.tolist(), strict=True) if not fine]
            rows = keep.nonzero()[:, 0]
            self.elements = [active[row] for row in rows.tolist()]
            self.problem = problem.select(rows.tolist())
            self.plus, self.minus, self.weight = plus.select(rows), minus.select(rows), self.weight[rows]

    @property
    def is_whole(self) -> bool:
        return len(self.elements) == self.whole.batch_size

    @property
    def is_still(self) -> bool:
        """Whether there were perturbed solutions and none of them moved."""
        assert self.info.moved is not None
        return bool(self.elements) and not self.unsolved and not bool(self.info.moved.any())

    def _record(self, active: Sequence[int], tau: Tensor, unit: Tensor, above: Tensor, below: Tensor) -> None:
        asked = self.method.envelope
        assert self.info.tau is not None
        assert self.info.unit is not None
        self.info.tau[list(active)] = tau.cpu().to(self.info.tau.dtype)
        self.info.unit[list(active)] = unit.cpu().to(self.info.unit.dtype)
        names = {(True, True): "average", (True, False): "lower", (False, True): "upper"}
        for element, *sides in zip(active, above.tolist(), below.tolist(), strict=True):
            used = names.get((sides[0], sides[1]), "none")
            self.info.used[element] = used
            if used != asked:
                self.info.fallbacks.append(element)
        one_sided = [element for element in self.info.fallbacks if self.info.used[element] != "none"]
        if one_sided:
            warn(
                f"{self.method}: the perturbed problem of elements {one_sided[:10]} has no solution on a side that was "
                "asked for; their gradients come from the other side. A smaller tau may have both."
            )

    def fallback(self) -> ImplicitKKT:
        """The method for elements without any perturbed solution.

        Raises:
            SolverError: the problem has no optimality conditions to fall back on.
        """
        if not self.whole.has_kkt:
            raise SolverError(
                f"{self.method}: no perturbed problem of elements {self.unsolved} has a solution, on either side; "
                "use a smaller tau.",
                indices=self.unsolved,
            )
        return ImplicitKKT(rho=self.method.rho)

    def of_unsolved(self, cotangent: Any) -> Any:
        """A cotangent, or a tilt, that is zero for all but the elements for the fallback.

        The fallback is given the whole batch, so that what it says of elements names their places in it.
        """
        mask = torch.zeros(self.whole.batch_size, 1, dtype=torch.bool, device=self.whole.device)
        mask[self.unsolved] = True
        return type(cotangent)(*(torch.where(mask, part, 0.0) for part in cotangent))

    def record_fallback(self, info: GradientInfo) -> None:
        """Put on record, and warn, that the fallback was used."""
        for element in self.unsolved:
            self.info.used[element] = info.used[element]
        warn(
            f"{self.method}: no perturbed problem of elements {self.unsolved[:10]} has a solution (with a loss on dual "
            f"variables, redundant equalities do that); their gradients come from {info.method}."
        )


_ZERO_GRADIENT = (
    "LPGD(tau=None) takes a step that is small enough for the exact gradient, and no solution of this linear program "
    "moved with it: the gradient with respect to its cost is zero. Give a tau of the order of "
    "output.info.gradients[-1].unit, at which the loss gradient is as large as the cost; the tau that was taken is "
    "beside it. lpgd.diagnose and lpgd.sweep compare several."
)


def _refined(solver: BaseSolver, problem: Any) -> BaseSolver:
    """The solver, two digits tighter where its solutions are much less accurate than its tolerance."""
    if solver.solution_error(problem) <= 10 * solver.tolerance:
        return solver
    return replace(solver, tolerance=min(solver.tolerance, max(0.01 * solver.tolerance, solver.finest_tolerance)))


def _tightened(solver: BaseSolver, relative_step: float) -> BaseSolver:
    """The solver, as tight as a difference of its solutions needs; by powers of ten, so that workspaces are shared."""
    wanted = ACCURACY * relative_step
    if wanted >= 0.1 * solver.tolerance:  # not worth the set-up of new workspaces
        return solver
    wanted = 10.0 ** math.floor(math.log10(wanted)) if wanted > 0 else 0.0
    return replace(solver, tolerance=min(solver.tolerance, max(wanted, solver.finest_tolerance)))


def _usable_or(result: BatchSolution, solution: BatchSolution) -> Any:
    return result.point.where(result.usable, solution.point)
