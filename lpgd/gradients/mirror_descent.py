"""Lagrangian mirror descent: a step in the geometry of the objective, over a set that is kept out of the Lagrangian.

With a smooth, strongly convex objective f, a set C, the solution ``x* = argmin f over C``, the cotangent g and the
slope ``p = ∇_x f(x*)``, [LPGD] appendix C.2 replaces the divergence of the whole Lagrangian by the Bregman divergence
of f,

    x_{±τ} = argmin over x in C of  f(x) - <p, x> ± τ <g, x>

and the gradient with respect to the data of f is

    lower    (∇_w f(x_{+τ}) - ∇_w f(x*))      / τ
    upper    (∇_w f(x*)     - ∇_w f(x_{-τ}))  / τ
    average  (∇_w f(x_{+τ}) - ∇_w f(x_{-τ}))  / 2τ

Without constraints p = 0, and this is LPGD.  With them it moves along the whole of C, where LPGD keeps a solution on
the constraints that are active until the tilt outweighs their multipliers.

The slope is held as a number.  Eq. 67 of the paper, read with x* fixed and p a function of w, takes
``∇_w <p, x_τ - x*>`` away as well: everything that is linear in w, so that a linear cost gets no gradient, and
f = ½|x - w|² without constraints gets none either, where LPGD's is exact.

[LPGD] Paulus, Musil, Martius: Lagrangian Proximal Gradient Descent for Learning Convex Optimization Models
(arXiv 2407.05920).
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, flags
from lpgd.gradients.base import GradientInfo, GradientMethod, is_number, relevant_elements
from lpgd.gradients.sides import SIDES, Envelope
from lpgd.problems.base import Data, Point
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver
from lpgd.solvers.conic.convexity import is_definite
from lpgd.status import SolverError

__all__ = ["LagrangianMirrorDescent"]

ACCURACY = 1e-4
"""Perturbed problems are solved to this accuracy, relative to the step."""


@dataclass(frozen=True, repr=False)
class LagrangianMirrorDescent(GradientMethod):
    """Lagrangian mirror descent ([LPGD] C.2), for objectives that are smooth and strongly convex.

    Data of the constraints are kept out of the Lagrangian and get a gradient of zero: of programs A, b and the bounds
    (a layer warns where one is asked for), of nodes what inputs do in h and g.

    Args:
        tau: the step τ > 0, which multiplies the cotangent as it arrives.
        envelope: ``"average"`` (two solves), ``"lower"`` or ``"upper"`` (one solve each).

    Raises:
        ValueError: an option is out of its range; in the backward pass, P of a conic program is not positive definite.
    """

    tau: float
    envelope: Envelope = "average"

    needs: ClassVar[frozenset[str]] = frozenset({"can_tilt", "has_kkt"})

    def __post_init__(self) -> None:
        if not (is_number(self.tau) and sys.float_info.min <= self.tau < math.inf):
            raise ValueError(f"tau is {self.tau!r}; it must be positive and finite.")
        if self.envelope not in get_args(Envelope):
            raise ValueError(f"envelope is {self.envelope!r}; it must be one of {', '.join(get_args(Envelope))}.")

    def vjp(
        self,
        solution: AnySolution,
        cotangent: Point,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Data, GradientInfo]:
        problem = solution.problem
        info, gradient = GradientInfo.blank(self, solution), problem.zero_gradient()
        if problem.traits.conditions == "conic":
            info.notices |= dict.fromkeys(("A", "b", "lower", "upper"), f"{self} {_KEPT_OUT}")
        if any(bool(tensor.any()) for tensor in tuple(cotangent)[1:]):
            raise ValueError(f"{self}: a loss on multipliers has no gradient here; use LPGD.")
        active = relevant_elements(solution, cotangent)
        if not active:
            return gradient, info
        index = as_index(active, problem.device)
        chosen, tilt = solution.select(index), cotangent.select(index)
        plus, minus = self._ends(chosen, tilt, solver, executor, active)
        for element in active:
            info.used[element] = self.envelope
        info.tau, info.unit = (torch.full((solution.batch_size,), torch.nan) for _ in range(2))
        unit = chosen.problem.tilt_unit(chosen.point, tilt)
        info.tau[active], info.unit[active] = self.tau, unit.cpu().to(info.unit.dtype)
        weight = torch.full((len(active),), 1.0 / (self.tau * len(SIDES[self.envelope])), dtype=problem.data[0].dtype)
        moved = chosen.problem.gradient_difference(plus, minus, weight.to(problem.device))
        return problem.scatter(index, moved), info

    def jvp(
        self,
        solution: AnySolution,
        tangent: Data,
        solver: AnySolver,
        executor: Executor | None = None,
    ) -> tuple[Point, GradientInfo]:
        raise TypeError(f"{self} has no forward mode: it is no derivative of the solution. Use reverse mode.")

    def _ends(
        self, solution: AnySolution, cotangent: Point, solver: AnySolver, executor: Executor | None, names: list[int]
    ) -> tuple[Point, Point]:
        """Both ends of the step of these elements, without multipliers.

        Raises:
            ValueError: an objective is not strongly convex.
            SolverError: a perturbed problem has no solution.
        """
        problem: Any = solution.problem
        base = solution.point
        is_program = solution.problem.traits.conditions == "conic"
        if is_program and not bool((strong := is_definite(problem)).all()):
            flat = [names[row] for row in elements_where(~strong)]
            raise ValueError(
                f"{self}: P of elements {flat[:10]} is not positive definite, and mirror descent needs a strongly "
                "convex objective; use LPGD."
            )
        with torch.enable_grad():
            x = base.x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(problem.objective(x).sum(), x)
        dual = _blank(cotangent)
        tilts = [cotangent._make((sign * self.tau * cotangent.x - slope, *dual)) for sign in SIDES[self.envelope]]
        ones = base.x.new_ones(len(names))
        relative = float((self.tau / problem.tilt_unit(base, cotangent)).min())
        solver = solver.with_tolerance(ACCURACY * min(1.0, relative))
        ends: list[Point] = []
        for tilt in tilts:
            found = solver.solve(problem.tilt(ones, tilt), solution.states, executor)
            if found.failed:
                failed = [names[row] for row, fine in enumerate(flags(found.usable)) if not fine]
                raise SolverError(f"{self}: no step of elements {failed} was solved.", indices=failed)
            ends.append(found.point)
        plus, minus = {"lower": (ends[0], base), "upper": (base, ends[0]), "average": (ends[0], ends[-1])}[
            self.envelope
        ]
        return _primal(plus), _primal(minus)


def _blank(point: Point) -> list[Tensor]:
    return [torch.zeros_like(tensor) for tensor in tuple(point)[1:]]


def _primal(point: Point) -> Any:
    """The point with multipliers of zero, at which ``∇_w L`` is ``∇_w f``."""
    return point._make((point.x, *_blank(point)))


_KEPT_OUT = "keeps the constraints out of the Lagrangian: their data get no gradient. LPGD has one for them."
