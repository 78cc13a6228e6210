"""The derivative of the solutions of declarative nodes, by the bordered system of their optimality conditions."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lpgd.arrays import as_index, elements_where, flags, integers, rows_where
from lpgd.gradients.base import GradientInfo
from lpgd.gradients.formula import by_formula
from lpgd.gradients.rounding import NOTHING, rounding, share_of_change, within
from lpgd.problems.base import Data, Point, maximum_norm
from lpgd.problems.node.multipliers import active_rows
from lpgd.problems.node.problem import NodeProblem
from lpgd.problems.node.solution import NodeSolution
from lpgd.problems.node.structure import NodePoint
from lpgd.solvers.node.bordered import bordered_response, is_large, response_and_noise
from lpgd.solvers.node.sparse import Sparsity, find_sparsity
from lpgd.status import SolverError, warn

if TYPE_CHECKING:
    from lpgd.gradients.implicit.method import ImplicitKKT

__all__ = ["differentiable_vjp", "in_data", "response", "vjp"]


def vjp(
    method: ImplicitKKT,
    solution: NodeSolution,
    cotangent: NodePoint,
    active: list[int],
    info: GradientInfo,
    executor: Executor | None = None,
) -> Data:
    """The gradient of ``<cotangent, minimisers>``, with a look at what rounding left of it.

    Elements that lost more digits than :data:`LOST` have the node's own formula instead, where it has one, on record.
    """
    change, noise = _response(method, solution, cotangent, active, info)
    gradient = in_data(solution, change)
    unsure = rows_where(_share(noise, change) > within(UNSURE, change.x.dtype))
    if not len(unsure):
        return gradient
    return _mended(method, solution, cotangent, (change, noise), gradient, info, unsure)


def response(
    method: ImplicitKKT,
    solution: NodeSolution,
    tilt: NodePoint,
    active: list[int],
    info: GradientInfo,
    executor: Executor | None = None,
) -> NodePoint:
    """The response of a batch of a node's problems, all at once; other elements' is zero.

    Arguments are those of :func:`vjp`; a tilt has (B, ·) each, and multipliers without columns are zero.
    """
    change, noise = _response(method, solution, tilt, active, info)
    share = _share(noise._replace(nu=noise.nu[:, :0], lam=noise.lam[:, :0]), change)  # forward mode sees minimisers
    lost = share > within(LOST, share.dtype)
    if bool(lost.any()):  # of those that move as far as such a tilt may move them
        floor = maximum_norm(solution.x) / solution.problem.tilt_unit(solution.point, tilt)
        lost = lost & ~(maximum_norm(noise.x) <= LOST * NOTHING * floor)
    unsure = elements_where(lost)
    if unsure:
        info.doubt = torch.where(lost, share.double(), torch.nan).cpu()
        warn(f"{method}: the optimality conditions of elements {unsure[:10]} {_ROUNDING}")
    return change


def _response(
    method: ImplicitKKT, solution: NodeSolution, tilt: NodePoint, active: list[int], info: GradientInfo
) -> tuple[NodePoint, NodePoint]:
    """The response, and what of it may be rounding.

    Args:
        method: an :class:`~lpgd.gradients.ImplicitKKT`.
        solution: B elements.
        tilt: (B, ·) each; multipliers without columns are zero.
        active: elements with a solution and a nonzero tilt.
        info: the record, which is written.
    """
    problem, whole = solution.problem, solution.point
    change, noise = (NodePoint(*(torch.zeros_like(tensor) for tensor in whole)) for _ in range(2))
    if not active:
        return change, noise
    elements = as_index(active, problem.device)
    completed = (tensor if tensor.shape[-1] else nothing for tensor, nothing in zip(tilt, change, strict=True))
    tilt = NodePoint(*completed).select(elements)  # a cotangent has no multipliers
    chosen, point = problem.select(elements), whole.select(elements)
    if not chosen.node.is_exact and method.active_tolerance is None:  # with it a user knows of a rough solver
        _check_stationary(chosen, point, active)
    sparsity = _sparsity(method, chosen, point)
    if solution.barrier:  # all rows count, as much as they bind: -λ g = μ
        g = chosen.constraints(point.x)[1]
        binding, one_sided = torch.ones_like(g, dtype=torch.bool), torch.zeros_like(g[:, 0], dtype=torch.bool)
        corner = torch.cat([torch.zeros_like(point.nu), -g / point.lam], -1)
        answer, exact, errors = response_and_noise(
            chosen, point, tilt, binding, method.rho, method.matrix_free, sparsity, corner
        )
    else:
        binding, one_sided = _active(method, chosen, point)
        answer, exact, errors = response_and_noise(
            chosen, point, tilt, binding, method.rho, method.matrix_free, sparsity
        )
        _drop_touching(method, chosen, point, tilt, (answer, exact, binding, one_sided))
    for element, regular, weak in zip(active, flags(exact), flags(one_sided), strict=True):
        kind = "implicit, one-sided" if weak else "implicit"
        info.used[element] = kind if regular else "implicit, regularised"
    info.fallbacks = [element for element, regular in zip(active, flags(exact), strict=True) if not regular]
    if info.fallbacks:
        _warn_of_singular(method, chosen, point, binding, active, exact)
    for wholes, parts in ((change, answer), (noise, errors)):
        for tensor, values in zip(wholes, parts, strict=True):
            tensor[elements] = values
    return change, noise


def _share(noise: NodePoint, change: NodePoint) -> Tensor:
    """(B,) the largest share of the noise in minimisers and in multipliers."""
    shares = (
        maximum_norm(one) / maximum_norm(other).clamp(min=torch.finfo(one.dtype).tiny)
        for one, other in zip(noise, change, strict=True)
        if one.shape[-1]
    )
    return torch.stack(list(shares)).amax(0) if noise.x.shape[-1] else noise.x.new_zeros(len(noise.x))


def _mended(
    method: ImplicitKKT,
    solution: NodeSolution,
    cotangent: NodePoint,
    responses: tuple[NodePoint, NodePoint],
    gradient: Data,
    info: GradientInfo,
    unsure: Tensor,
) -> Data:
    """The gradient, with the node's formula for those of the elements ``unsure`` whose digits rounding took."""
    change, noise = (one.select(unsure) for one in responses)
    chosen = solution.select(unsure)
    known = gradient._make(one[unsure] for one in gradient)
    noise = NodePoint(*(one + other for one, other in zip(noise, rounding(change), strict=True)))
    point = chosen.point
    moved = (
        NodePoint(*(one + error for one, error in zip(*both, strict=True)))
        for both in ((point, rounding(point)), (change, noise))
    )
    other = chosen.problem.directional_gradient(*moved)
    share = share_of_change(chosen.problem, known, other, cotangent.x[unsure], point.x)
    info.doubt = torch.full((len(info.used),), torch.nan, dtype=torch.float64)
    info.doubt[unsure.cpu()] = share.double().cpu()
    regular = torch.tensor([info.used[element] == "implicit" for element in integers(unsure)], device=share.device)
    places = rows_where((share > within(LOST, share.dtype)) & regular)
    if not len(places):
        return gradient
    lost, formula = unsure[places], None
    if method.rho == 0.0 and not solution.barrier and solution.problem.is_plain:
        try:
            formula = by_formula(solution.problem.node.vjp, solution, cotangent.x, integers(lost))
        except SolverError:  # it holds for none of them, and the warning says what was lost
            formula = None
    if formula is not None:
        finite = torch.stack([torch.isfinite(one[lost].reshape(len(lost), -1)).all(-1) for one in formula]).all(0)
        taken = lost[finite]
        for whole, values in zip(gradient, formula, strict=True):
            whole[taken] = values[taken]
        for element in integers(taken):
            info.used[element] = "closed form"
        info.fallbacks = sorted({*info.fallbacks, *integers(taken)})
        lost = lost[~finite]
    if len(lost):
        warn(f"{method}: the optimality conditions of elements {integers(lost)[:10]} {_ROUNDING}")
    return gradient


def _warn_of_singular(
    method: ImplicitKKT,
    problem: NodeProblem,
    point: NodePoint,
    binding: Tensor,
    elements: list[int],
    exact: Tensor,
) -> None:
    """Tell solutions that are not unique from multipliers that are not: the remedies are others."""
    places = elements_where(~exact)
    dependent: list[int] = []
    if point.x.shape[-1] <= MANY:
        singular_places = as_index(places, point.x.device)
        singular, at = problem.select(singular_places), point.select(singular_places)
        hessian, jacobian = singular.hessian(at).double(), singular.jacobian(at.x).double()
        keep = torch.cat([torch.ones_like(at.nu, dtype=torch.bool), binding[singular_places]], -1)
        dependent = [
            elements[place]
            for place, H, J, mask in zip(places, hessian, jacobian, keep, strict=True)
            if _only_multipliers_are_loose(H + method.rho * torch.eye(len(H)).to(H), J[mask])
        ]
    loose = [elements[place] for place in places if elements[place] not in dependent]
    if loose:
        warn(
            f"{method}: the optimality conditions of elements {loose[:10]} are singular (degenerate or non-unique "
            "solutions); their gradients are minimum-norm answers. rho > 0, or LPGD with a finite tau, is well defined "
            f"there.{problem.node.about_shape(tuple(problem.structure.shape))}"
        )
    if dependent:
        warn(
            f"{method}: the optimality conditions of elements {dependent[:10]} are singular, as their constraints "
            "depend on each other: gradients with respect to what the objective alone holds are exact, others are "
            "minimum-norm answers. Leave out constraints that others imply."
        )


def _only_multipliers_are_loose(hessian: Tensor, jacobian: Tensor) -> bool:
    """Whether the Hessian (n, n) is regular along the constraints, whose rows (m, n) depend on each other."""
    if not jacobian.shape[0] or not bool(torch.isfinite(hessian).all() and torch.isfinite(jacobian).all()):
        return False
    _, sizes, right = torch.linalg.svd(jacobian)
    rank = int((sizes > DEPENDENT * sizes.amax()).sum())
    along = right[rank:]
    if rank == jacobian.shape[0]:
        return False
    curvature = torch.linalg.eigvalsh(along @ hessian @ along.mT).abs()
    return not curvature.numel() or bool(curvature.amin() > DEPENDENT * hessian.abs().amax())


def _sparsity(method: ImplicitKKT, problem: NodeProblem, point: NodePoint) -> Sparsity | None:
    """The patterns of the matrices, where there are so many variables that it may matter."""
    if method.matrix_free is not None or point.x.shape[-1] <= MANY:
        return None
    return find_sparsity(problem, point)


def _drop_touching(
    method: ImplicitKKT,
    problem: NodeProblem,
    point: NodePoint,
    tilt: NodePoint,
    found: tuple[NodePoint, Tensor, Tensor, Tensor],
) -> None:
    """Leave out inequalities with a multiplier of zero where, with them, constraints depend on each other.

    They touch the others tangentially, and do not hold the solution there ([DDN] 4.7.3): without them the system may be
    regular, and its answer is the derivative on the side where they are inactive.  ``found`` is written.
    """
    answer, exact, binding, one_sided = found
    touching = (~exact & one_sided).nonzero()[:, 0]
    if not len(touching):
        return
    chosen_problem, chosen_point = problem.select(touching), point.select(touching)
    _, unit = chosen_problem.in_units(chosen_point.x)
    lam = chosen_point.lam / unit
    strong = binding[touching] & (lam > torch.finfo(lam.dtype).eps ** 0.5 * (1 + lam.amax(-1, keepdim=True)))
    again, fine = bordered_response(
        chosen_problem, chosen_point, tilt.select(touching), strong, method.rho, method.matrix_free
    )
    chosen = touching[fine]
    for whole, new in zip(answer, again, strict=True):
        whole[chosen] = new[fine]
    exact[chosen] = True


def in_data(solution: NodeSolution, change: NodePoint) -> Data:
    """What a change of the solutions is worth in the inputs of a node; elements without a solution get zero."""
    problem, usable = solution.problem, solution.usable
    if usable.all():
        return problem.directional_gradient(solution.point, change)
    elements = rows_where(usable)
    gradient = problem.select(elements).directional_gradient(solution.point.select(elements), change.select(elements))
    return problem.scatter(elements, gradient)


def differentiable_vjp(
    method: ImplicitKKT, solution: NodeSolution, data: Data, outputs: Data, cotangent: Point
) -> Data:
    """The bordered system and the vjp of the optimality conditions as functions of data, minimisers and cotangent.

    Raises:
        RuntimeError: systems that are singular, or too large to be formed.
    """
    if solution.barrier:
        raise RuntimeError(f"{method}: points of a barrier have no second derivatives here: detach the gradient.")
    whole = solution.traced(data, outputs)
    elements = rows_where(whole.usable)
    chosen = whole.select(elements)
    tilt = NodePoint(cotangent.x, *(0.0 * multipliers for multipliers in whole.point[1:]))
    if method.matrix_free or is_large(chosen.problem, chosen.point):
        raise RuntimeError(
            f"{method}: second derivatives need the matrix of the optimality conditions, which is too large here, or "
            "switched off by matrix_free=True: detach the gradient."
        )
    binding, _ = _active(method, chosen.problem, chosen.point)
    change, exact = bordered_response(chosen.problem, chosen.point, tilt.select(elements), binding, method.rho, False)
    if not exact.all():
        singular = [element for element, fine in zip(integers(elements), flags(exact), strict=True) if not fine]
        raise RuntimeError(
            f"{method}: the optimality conditions of elements {singular[:10]} are singular, and have no second "
            "derivative: give rho > 0, or detach the gradient."
        )
    return whole.problem.scatter(elements, chosen.problem.directional_gradient(chosen.point, change))


def _active(method: ImplicitKKT, problem: NodeProblem, point: NodePoint) -> tuple[Tensor, Tensor]:
    """Inequalities that are active, and (B,) whether one of an element's has a multiplier of zero."""
    if not point.lam.shape[-1]:
        return torch.zeros_like(point.lam, dtype=torch.bool), point.x.new_zeros(len(point.x), dtype=torch.bool)
    _, unit = problem.in_units(point.x)
    lam = point.lam / unit
    active = active_rows(problem, point.x, lam, method.active_tolerance)
    weak = active & (lam <= torch.finfo(lam.dtype).eps ** 0.5 * (1 + lam.amax(-1, keepdim=True)))
    return active if method.weakly_active else active & ~weak, weak.any(-1)


UNSURE, LOST = 1e-9, 1e-5
"""Answers of which rounding may have taken the first share are looked at, and those that lost the second are doubtful.
"""
_ROUNDING = (
    "add numbers of sizes so different that rounding took digits of their derivatives (output.info.gradients[-1].doubt "
    "has the share): the data are badly scaled. Scale the inputs, or use ClosedForm() where the node has a formula."
)
MANY = 300
"""With more variables, matrices of few entries are looked for."""
DEPENDENT = 1e-9
"""Singular values below this share of the largest are those of constraints that depend on each other."""
NOT_STATIONARY = 0.01
"""An approximate solver may leave so much; it is of the order of the error of y relative to ``1 + max|y|``."""


def _check_stationary(problem: NodeProblem, point: NodePoint, elements: list[int]) -> None:
    """Warn about points that are no solutions: the derivative of the optimality conditions says nothing of them."""
    _, unit = problem.in_units(point.x)
    left = (problem.gradient(point) / unit).abs()
    if not left.shape[-1]:
        return
    left = torch.where(left.isfinite(), left, 0)  # infinite derivatives are refused elsewhere
    bad = left.amax(-1) > NOT_STATIONARY * (1 + point.x.abs().amax(-1))
    if bad.any():
        named = [element for element, wrong in zip(elements, flags(bad), strict=True) if wrong]
        warn(
            f"the solutions of {problem.node.name} for elements {named[:10]} do not satisfy the optimality conditions, "
            "so implicit differentiation says nothing of them: its solver ended too early, or elsewhere, or the "
            "objective is not smooth there (LPGD needs no smoothness)."
        )
