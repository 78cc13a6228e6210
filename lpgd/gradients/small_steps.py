"""Small steps of LPGD, which are meant to approach the exact gradient, compared with the optimality conditions.

A difference of solutions over a small step can be wrong in ways that the solutions do not tell: where the conditions
are singular, where points of a curved cone stand for those of a plane, and where rounding is all that moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lpgd.arrays import flags, integers, rows_where
from lpgd.gradients.base import GradientInfo
from lpgd.gradients.implicit.findings import CURVED
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.gradients.perturbed import Perturbed
from lpgd.problems.base import Point, maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint
from lpgd.problems.solution import AnyProblem, AnySolution
from lpgd.solvers.conic.convexity import is_definite
from lpgd.status import silent, warn

if TYPE_CHECKING:
    from lpgd.gradients.lpgd import LPGD

__all__ = ["check_small_steps", "is_doubtful"]

SMALL_TILT, AGREEMENT, ONE_SIDED = 1e-3, 1e-4, 1e-2
"""A step up to the first size is meant to approach the exact gradient, and should do so up to the second, or the third
if it is given and one-sided."""
SHORT = 1e-9
"""Of shorter steps, as shares of their unit, rounding is more than a millionth of the response."""
FAINT = 1e-10
"""Moves up to this size, relative to ``1 + |x|``, have less than about four digits."""
ROUNDED = 1e-14
"""Solutions that are this near to each other, relative to ``1 + |x|``, may be one."""
FLOOR, NOTHING = 1e-8, 1e-10
"""Numbers below this share of the largest of their kind, or of all, are no more than rounding."""
ROUGH = 0.1
"""Forces of constraints that differ by more are those of other constraints; by less, it is rounding."""


def is_doubtful(method: LPGD, problem: AnyProblem, cotangent: Point, found: Perturbed) -> Tensor:
    """(E,) elements whose small steps are to be checked."""
    doubtful = _may_be_singular(method, problem) | _is_faint(method, problem, cotangent, found)
    if method.tau is not None and problem.traits.conditions == "conic" and not problem.traits.is_linear_program:
        return doubtful | (found.tau < SHORT * found.unit)
    return doubtful


def _may_be_singular(method: LPGD, problem: AnyProblem) -> Tensor:
    """(E,) elements whose small steps are to be checked: a definite curvature, and data of order 1, need no look.

    Of a linear program a step that was given is meant to find other vertices.
    """
    none = torch.zeros(problem.batch_size, dtype=torch.bool, device=problem.device)
    traits = problem.traits
    if traits.is_curved or traits.conditions != "conic" or method.rho:
        return none | traits.is_curved
    if traits.is_linear_program:
        return none | (method.tau is None)
    program = cast(ConicProblem, problem)
    doubtful = ~is_definite(program)
    return doubtful if method.tau is not None else doubtful | ~program.units.plain(program.batch_size).to(none.device)


def _is_faint(method: LPGD, problem: AnyProblem, cotangent: Point, found: Perturbed) -> Tensor:
    """(E,) elements with a part that a chosen step moves by so little that rounding may show in the difference.

    A loss on multipliers that stay as they are makes the step short, and says nothing of how far x moves.
    """
    faint = torch.zeros_like(found.above)
    if method.tau is not None or problem.traits.conditions != "conic":
        return faint
    faint |= torch.stack([(tensor != 0).any(-1) for tensor in cotangent]).sum(0) > 1
    ends = (problem.in_own_units(point) for point in (found.plus, found.minus))
    for plus, minus in zip(*ends, strict=True):
        move = maximum_norm(plus - minus)
        faint |= (move > 0) & (move < FAINT * (1.0 + maximum_norm(plus)))
    return faint


def check_small_steps(
    method: LPGD,
    solution: AnySolution,
    cotangent: Point,
    found: Perturbed,
    active: list[int],
    executor: Executor | None,
    record: GradientInfo,
    doubtful: Tensor,
) -> Tensor:
    """(E,) elements whose chosen step is lost in rounding, where the optimality conditions have a derivative.

    Small steps are compared with that derivative.  Points of a curved cone and of a plane that touches it there differ
    by τ² in what they leave of the optimality conditions, and by τ in x: no accuracy of perturbed solutions tells one
    from the other.  And a tilt that moves one part far and another hardly at all has no step that is long enough for
    the second and short enough for the first.
    """
    tilt, lost = found.tau / found.unit, torch.zeros_like(found.above)
    index = rows_where(doubtful & (tilt <= SMALL_TILT) & (found.above | found.below))
    if not index.shape[0]:
        return lost
    elements = integers(index)
    chosen, tilts = solution.select(index), cotangent.select(index)
    problem = cast(ConicProblem, chosen.problem)
    count = (found.above.double() + found.below.double()).clamp(min=1)[index]
    weight = 1.0 / (found.tau[index] * count)
    moves = cast(ConicPoint, found.plus.select(index).minus(found.minus.select(index)).scaled(weight))
    with silent():
        # A step that was given is compared as a whole, for which ten digits of the derivative are enough.
        near = moves if method.tau is not None and problem.traits.conditions == "conic" else None
        answer, info = ImplicitKKT(rho=method.rho).response(chosen, tilts, executor, near=near)
    change = cast(ConicPoint, answer)
    unique = torch.tensor([[used == "implicit"] for used in info.used], device=weight.device)
    # Multipliers are compared where they are unique.
    whole = [problem.in_own_units(point) for point in (moves, change)]
    observed_x = [problem.observed(point, chosen.point).x for point in (moves, change)]
    step, exact = (
        torch.cat([x, torch.where(unique, point.y, 0.0)], 1) for x, point in zip(observed_x, whole, strict=True)
    )
    size = torch.maximum(maximum_norm(step), maximum_norm(exact))
    length = 1.0 + maximum_norm(problem.in_own_units(chosen.point).x)
    floor = 1e-6 * length / found.unit[index]
    # A difference of one side alone is off in proportion to its step; one that was given is meant.
    agreement = AGREEMENT if method.tau is None or method.envelope == "average" else ONE_SIDED
    apart = maximum_norm(step - exact)
    far = apart > (agreement + 3 * tilt[index]) * torch.maximum(size, floor)
    # What does not move at all moves by the rounding of two solutions.
    still = maximum_norm(exact) * found.unit[index] <= NOTHING * length
    far &= ~(still & (apart * found.tau[index] <= ROUNDED * length))
    assert info.doubt is not None
    loose = ~(info.doubt <= AGREEMENT) & torch.tensor([used == "implicit, regularised" for used in info.used])
    far &= ~loose.to(far.device) & torch.tensor(["one-sided" not in used for used in info.used], device=far.device)
    if method.tau is None:
        smooth = (info.doubt <= AGREEMENT).to(far.device) & ~(found.kinked | found.unclear | found.jumped)[index]
        rough = _is_rough(problem, whole[0], whole[1], observed_x[0], observed_x[1])
        lost[index] = smooth & torch.where(unique[:, 0], _differ(whole[0], whole[1]), rough)
        far &= ~lost[index]
    doubt = (apart / torch.maximum(size, floor)).double().cpu()
    record.doubt = torch.full((len(record.used),), torch.nan, dtype=torch.float64)
    record.doubt[[active[element] for element in elements]] = torch.where(loose, torch.inf, doubt)
    if names := [active[element] for element, singular in zip(elements, flags(loose), strict=True) if singular]:
        if problem.traits.is_curved:
            warn(f"{method}: the multipliers of elements {names[:10]} {CURVED}")
        else:
            warn(f"{method}: the optimality conditions of elements {names[:10]} {_SINGULAR}")
    if bool(far.any()):
        worst = float((apart / size)[far].max())
        names = [active[element] for element, wrong in zip(elements, flags(far), strict=True) if wrong]
        warn(f"{method}: elements {names[:10]} {_DISAGREE.format(share=worst)}")
    return lost


def _differ(step: Sequence[Tensor], exact: Sequence[Tensor]) -> Tensor:
    """(E,) whether any number of a step is far from the exact one, relative to that itself.

    Data in other units magnify the small ones.  Numbers without any digit are compared with the largest of their kind.
    """
    differs = []
    least = NOTHING * torch.stack([maximum_norm(right) for right in exact]).amax(0)
    for value, right in zip(step, exact, strict=True):
        floor = torch.maximum(FLOOR * maximum_norm(right), least)[:, None]
        differs.append(((value - right).abs() > AGREEMENT * torch.maximum(right.abs(), floor)).any(-1))
    return torch.stack(differs).any(0)


def _is_rough(problem: ConicProblem, step: ConicPoint, exact: ConicPoint, step_x: Tensor, exact_x: Tensor) -> Tensor:
    """(E,) whether a step is near the exact one, and not quite there, where multipliers are not unique.

    ``step_x``, ``exact_x`` are what is asked of x.

    Those of rows that depend on each other are the solver's choice; the force Aᵀy of all rows together is not.
    """
    scaled = problem.units.apply(problem)
    moves, right = (
        (x, scaled.structure.constraint.rmatvec(scaled.data.A, point.y), point.z)
        for x, point in ((step_x, step), (exact_x, exact))
    )
    near = torch.ones(problem.batch_size, dtype=torch.bool, device=problem.device)
    for mine, theirs in zip(moves[1:], right[1:], strict=True):
        near &= maximum_norm(mine - theirs) <= ROUGH * maximum_norm(theirs)
    return _differ(moves, right) & near


_SINGULAR = (
    "are singular: their solutions are not unique, or move at will, and their gradients say which way the solver went. "
    "rho > 0, or a tau of the order of output.info.gradients[-1].unit, is well defined there."
)
_DISAGREE = (
    "have perturbed solutions that move by other amounts than the optimality conditions say, by a share of up to "
    "{share:.0e}: the step is too short for the solver's accuracy, or crosses a kink. ImplicitKKT is exact there; a "
    "tau of the order of output.info.gradients[-1].unit gives a smoothed gradient."
)
