"""Entropic optimal transport: Sinkhorn in the log domain, with Newton steps, from smaller γ where γ is large."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over

__all__ = ["Plan", "annealed_sinkhorn", "positive_or_one", "sinkhorn", "solve_smaller_side"]

_State = tuple[Tensor, Tensor, Tensor]  # plan, f, g

SHARP = 100.0
"""Up to this γ (max M - min M) a solve starts at γ itself."""
STAGE_TOLERANCE, STAGE_ITERATIONS = 1e-4, 200
"""Of the solves at smaller γ before."""
STEPS = 10
"""Sinkhorn iterations between two looks at the residual."""
MIN_BLOCK = 64
"""Columns of a product that is computed in blocks."""
NEWTON_FROM = 3
"""So many times ``STEPS`` are without a Newton step."""
BLOCK_BYTES = 1 << 22
"""On a processor, elements whose costs take more than this are solved in blocks that take so much, or less."""
REACH = 4.0
"""A Newton step changes exponents of a plan by this much at most; after one that goes too far, by a quarter of it."""


class Plan(NamedTuple):
    """A transport plan ``P_ij = r_i c_j exp(f_i + g_j - γ M_ij)`` with its dual potentials.

    Attributes:
        plan: (B, m, n) P.
        f, g: (B, m) and (B, n), the potentials.
        residual: (B,) ``Σ_i |(P1 - r)_i| / Σ r``; the column sums are exact.
        iterations: (B,) Sinkhorn iterations, a multiple of ten.
    """

    plan: Tensor
    f: Tensor
    g: Tensor
    residual: Tensor
    iterations: Tensor


def sinkhorn(
    cost: Tensor,  # (B, m, n)
    rows: Tensor,  # (B, m)
    columns: Tensor,  # (B, n)
    gamma: float,
    *,
    potential: Tensor | None = None,  # (B, n)
    tolerance: float,
    iterations: int,
) -> Plan:
    """Minimise ``<P, M> + KL(P | r cᵀ)/γ`` subject to ``P 1 = r``, ``Pᵀ 1 = c``, each element until it has converged.

    Iterations start from potentials, so that nothing underflows however large γ M is; then the kernel that they make is
    scaled, which costs two products with it, for ten iterations or more.  Where a scaling leaves the range in which the
    kernel is accurate, ten iterations are done on the potentials themselves.

    Sinkhorn's convergence is slow at large γ.  From the fourth ten on, where it is not about to end, each ten starts
    from a damped Newton step of the dual problem where that is better; its system is that of
    :func:`~lpgd.nodes.transport.node.transport_vjp`.

    Args:
        cost: M.
        rows: r, at least zero, of a positive sum.  Where it is zero the plan is.
        columns: c, likewise, of the same sum as r.
        gamma: γ > 0, the inverse of the entropic regularisation.
        potential: ``g`` of an earlier :class:`Plan` to start from; None starts from zero.
        tolerance: of :attr:`Plan.residual`.
        iterations: at most so many, rounded up to a multiple of ten.
    """
    total = rows.sum(-1, keepdim=True)
    columns = columns * (total / columns.sum(-1, keepdim=True))  # equal up to rounding, here exactly
    log_rows, log_columns = rows.log(), columns.log()
    f, g = torch.zeros_like(rows), torch.zeros_like(columns) if potential is None else potential.clone()
    plan, residual = torch.empty_like(cost), torch.full_like(total[:, 0], torch.inf)
    spent = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    active = torch.arange(len(cost), device=cost.device)
    reach = torch.full_like(residual, REACH)
    has_empty = bool((rows == 0).any() or (columns == 0).any())
    most, turn = -(-iterations // STEPS) if len(cost) else 0, 0
    while turn < most:
        whole = len(active) == len(cost)  # then nothing is copied
        kept = (cost, rows, columns, log_rows, log_columns, g)
        *chosen, start = kept if whole else [tensor[active] for tensor in kept]
        newton = turn >= NEWTON_FROM
        step = _newton_step(plan if whole else plan[active], chosen[1], reach[active]) if newton else None
        if whole:
            plan = cost  # lets go of the old plan before there are new ones
        found, tens = _iterations(*chosen, start, gamma, has_empty, most - turn if step is None else 1, tolerance)
        if step is not None:
            known = (_residual(found[0], chosen[1]), *found[1:])
            del found  # of two plans one is enough: that of the other potentials follows from them
            found, _ = _iterations(*chosen, start + step, gamma, has_empty)
            worse = ~_is_better((_residual(found[0], chosen[1]), *found[1:]), known, chosen[1], chosen[2])
            reach[active] = torch.where(worse, 0.25 * reach[active], 2.0 * reach[active]).clamp(max=REACH)
            if worse.any():
                _put_back(rows_where(worse), chosen, gamma, known, found)
        residual[active] = _residual(found[0], chosen[1])
        spent[active] += STEPS * tens
        turn += tens
        if whole:
            plan, f, g = found
        else:
            plan[active], f[active], g[active] = found
        del found, chosen, start  # plans are large
        active = active[~(residual[active] <= tolerance)]
        if not len(active):
            break
    if has_empty:  # whose potentials no scaling has touched
        of_empty_rows = -_log_sum((log_columns + g)[:, None, :].sub(cost, alpha=gamma), -1)
        f = torch.where(rows > 0, f, of_empty_rows)
        of_empty_columns = -_log_sum((log_rows + f)[:, :, None].sub(cost, alpha=gamma), -2)
        g = torch.where(columns > 0, g, of_empty_columns)
    return Plan(plan, f, g, residual, spent)


def annealed_sinkhorn(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    gamma: float,
    *,
    potential: Tensor | None = None,
    tolerance: float,
    iterations: int,
) -> Plan:
    """:func:`sinkhorn` from the potentials at γ/2, which come from those at γ/4, and so on, where γ is large.

    Potentials grow with γ, and those of the plan at γ/2, doubled, are near those of the plan at γ: a hundred iterations
    where a start from zero takes thousands.  Arguments and answer are those of :func:`sinkhorn`; with a potential that
    is tried first, and elements that do not converge from it begin again.

    On a processor a large batch is solved in blocks that stay in its cache; an interrupt waits for one operation on a
    block, not on the batch.
    """
    inputs = (cost, rows, columns) if potential is None else (cost, rows, columns, potential)
    batch, (m, n) = len(cost), cost.shape[1:]
    width = max(1, BLOCK_BYTES // (m * n * cost.element_size())) if cost.device.type == "cpu" else max(batch, 1)
    if batch <= width:
        return _annealed(*inputs, gamma=gamma, tolerance=tolerance, iterations=iterations)
    whole = Plan(
        torch.empty_like(cost),
        torch.empty_like(rows),
        torch.empty_like(columns),
        cost.new_empty(batch),
        torch.empty(batch, dtype=torch.int64),
    )
    for first in range(0, batch, width):
        elements = slice(first, first + width)
        chosen = [tensor[elements] for tensor in inputs]
        found = _annealed(*chosen, gamma=gamma, tolerance=tolerance, iterations=iterations)
        for values, answer in zip(whole, found, strict=True):
            values[elements] = answer
    return whole


def _annealed(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    potential: Tensor | None = None,
    *,
    gamma: float,
    tolerance: float,
    iterations: int,
) -> Plan:
    """:func:`annealed_sinkhorn` of all elements together."""
    if not len(cost):
        return sinkhorn(cost, rows, columns, gamma, tolerance=tolerance, iterations=iterations)
    reach = gamma * float((cost.amax((1, 2)) - cost.amin((1, 2))).max())
    stages = max(0, math.ceil(math.log2(max(reach, 1.0) / SHARP)))
    if potential is not None and stages:
        few = min(STAGE_ITERATIONS, iterations)
        near = sinkhorn(cost, rows, columns, gamma, potential=potential, tolerance=tolerance, iterations=few)
        left = rows_where(~(near.residual <= tolerance))
        if len(left) and iterations > few:
            left_data = (cost[left], rows[left], columns[left])
            again = _annealed(*left_data, gamma=gamma, tolerance=tolerance, iterations=iterations - few)
            for whole, values in zip(near, again, strict=True):
                whole[left] = whole[left] + values if whole is near.iterations else values
        return near
    spent = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    few = min(STAGE_ITERATIONS, iterations // (2 * max(stages, 1)) // STEPS * STEPS)
    for stage in range(stages if few else 0, 0, -1):
        at = gamma / 2.0**stage
        found = sinkhorn(cost, rows, columns, at, potential=potential, tolerance=STAGE_TOLERANCE, iterations=few)
        potential, spent = 2.0 * found.g, spent + found.iterations
    left = iterations - int(spent.max())
    last = sinkhorn(cost, rows, columns, gamma, potential=potential, tolerance=tolerance, iterations=left)
    return last._replace(iterations=last.iterations + spent)


def _log_iteration(
    cost: Tensor, gamma: float, log_rows: Tensor, log_columns: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:  # potentials (B, m), (B, n)
    f = -_log_sum((log_columns + g)[:, None, :].sub(cost, alpha=gamma), -1)
    return f, -_log_sum((log_rows + f)[:, :, None].sub(cost, alpha=gamma), -2)


def _log_sum(exponents: Tensor, dim: int) -> Tensor:
    """``log Σ exp`` of finite numbers, which are overwritten: plans are large."""
    top = exponents.amax(dim, keepdim=True)
    return exponents.sub_(top).exp_().sum(dim).log_() + top.squeeze(dim)


def _kernel(cost: Tensor, gamma: float, log_rows: Tensor, log_columns: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return ((log_rows + f)[:, :, None] + (log_columns + g)[:, None, :]).sub_(cost, alpha=gamma).exp_()


def _iterations(
    cost: Tensor,
    rows: Tensor,
    columns: Tensor,
    log_rows: Tensor,
    log_columns: Tensor,
    start: Tensor,
    gamma: float,
    has_empty: bool,
    blocks: int = 1,
    tolerance: float = 0.0,
) -> tuple[_State, int]:
    """The plan and the potentials after up to ``blocks`` times ten iterations, and how many tens there were.

    The kernel has the right row sums for the potential that it starts from; then its columns and rows are scaled.  More
    than ten iterations follow each other while the worst residual falls so fast that those which are left to be done
    take less time than a Newton step.
    """

    def quotient(mass: Tensor, product: Tensor) -> Tensor:
        # An empty bin's row of the kernel is zero, whatever its scaling is.
        return torch.where(mass > 0, mass / product, 1.0) if has_empty else mass / product

    # What underflows in the kernel must not count in the plan: scalings stay within a sixth of the exponent's range.
    limit = math.log(torch.finfo(cost.dtype).max) / 6
    first_f, first_g = -_log_sum((log_columns + start)[:, None, :].sub(cost, alpha=gamma), -1), start
    kernel = _kernel(cost, gamma, log_rows, log_columns, first_f, first_g)
    transposed, u = kernel.mT, torch.ones_like(rows)
    v = quotient(columns, linalg.matvec(transposed, u))
    total, tens, worst = rows.sum(-1), 0, math.inf
    patience = 1.5 + min(cost.shape[1:]) / 80  # a Newton step is O(m n min(m, n))
    while True:
        for _ in range(STEPS - 1 if not tens else STEPS):
            u = quotient(rows, linalg.matvec(kernel, v))
            v = quotient(columns, linalg.matvec(transposed, u))
        tens += 1
        if tens == blocks or is_over():
            break
        left = (u * linalg.matvec(kernel, v) - rows).abs().sum(-1)
        last, worst = worst, float((left / total).max())
        if not worst > tolerance or (tens > 1 and _tens_left(last, worst, tolerance) > patience):
            break
        if not _drift(u, v).max() <= limit / 2:  # not on into the range that has to be done again
            break
    f, g = first_f + u.log(), first_g + v.log()
    plan = kernel.mul_(u[:, :, None]).mul_(v[:, None, :])
    far = rows_where(~(_drift(u, v) <= limit))
    if len(far):
        far_data = (cost[far], gamma, log_rows[far], log_columns[far])
        far_f, far_g = f[far], start[far]
        for _ in range(STEPS):
            far_f, far_g = _log_iteration(*far_data, far_g)
        plan[far], f[far], g[far] = _kernel(*far_data, far_f, far_g), far_f, far_g
    return (plan, f, g), tens


def positive_or_one(mass: Tensor) -> Tensor:
    """A divisor of what is zero where the mass is."""
    return torch.where(mass > 0, mass, 1.0)


def _drift(u: Tensor, v: Tensor) -> Tensor:
    """(B,) the largest exponent of a scaling."""
    return torch.maximum(u.log().abs().amax(1), v.log().abs().amax(1))


def _tens_left(before: float, now: float, tolerance: float) -> float:
    """How many tens of iterations are left, if residuals go on falling as they did."""
    if not (0.0 < now < before and tolerance > 0.0):
        return math.inf
    return math.log(now / tolerance) / math.log(before / now)


def _residual(plan: Tensor, rows: Tensor) -> Tensor:
    return (plan.sum(-1) - rows).abs().sum(-1) / rows.sum(-1)


def _is_better(new: _State, old: _State, rows: Tensor, columns: Tensor) -> Tensor:
    """(B,) by the dual objective ``<r, f> + <c, g>`` (both plans have the right mass), near its end by the residual.

    The states are residuals and potentials.
    """
    first, second = ((rows * f).sum(-1) + (columns * g).sum(-1) for _, f, g in (new, old))
    noise = 1e3 * torch.finfo(rows.dtype).eps * (rows.sum(-1) + second.abs())
    near = (first - second).abs() <= noise
    return torch.where(near, new[0] < old[0], first > second)


def _put_back(elements: Tensor, chosen: Sequence[Tensor], gamma: float, known: _State, found: _State) -> None:
    """Write the plans of these elements' known potentials, and those, over what was found."""
    cost, _, _, log_rows, log_columns = (tensor[elements] for tensor in chosen)
    f, g = known[1][elements], known[2][elements]
    for whole, values in zip(found, (_kernel(cost, gamma, log_rows, log_columns, f, g), f, g), strict=True):
        whole[elements] = values


def _newton_step(plan: Tensor, rows: Tensor, reach: Tensor) -> Tensor:
    """The change of g (B, n), damped so that no entry of the plan changes by more than exp(reach), with reach (B,).

    It is zero where there is none.
    """
    missing, mass = rows - plan.sum(-1), plan.sum(-2)  # the columns of the plan are right
    if plan.shape[-2] <= plan.shape[-1]:
        alpha, good = solve_smaller_side(plan, missing)
        beta = -linalg.matvec(plan.mT, alpha) / positive_or_one(mass)
    else:
        weight = positive_or_one(plan.sum(-1))
        beta, good = solve_smaller_side(plan.mT, -linalg.matvec(plan.mT, missing / weight))
        alpha = (missing - linalg.matvec(plan, beta)) / weight
    size = torch.maximum((alpha.amax(-1) + beta.amax(-1)).abs(), (alpha.amin(-1) + beta.amin(-1)).abs())
    good = good & size.isfinite()
    return torch.where(good[:, None], beta * (reach / torch.maximum(size, reach))[:, None], 0.0)


def _factor_in_place(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factors of symmetric matrices, which are overwritten, in the order that LAPACK works in."""
    factor, info = matrix.mT, torch.empty(len(matrix), dtype=torch.int32, device=matrix.device)
    linalg.cholesky_ex(factor, out=(factor, info))
    return factor, info


def solve_smaller_side(
    plan: Tensor, right: Tensor, factorise: Callable[[Tensor], tuple[Tensor, Tensor]] = _factor_in_place
) -> tuple[Tensor, Tensor]:
    """α (B, m) with ``(diag(P1) - P diag(Pᵀ1)⁻¹ Pᵀ) α = right``, m ≤ n, and (B,) whether there is a Cholesky factor.

    The matrix is the Laplacian of a graph: each row's diagonal is the sum of the others, and is computed so, with no
    cancellation however sharp the plan.  The row of largest mass, a redundant one, is dropped: its α is zero, and so is
    that of rows without mass.
    ``factorise`` takes a matrix to a Cholesky factor and its LAPACK codes.
    """
    weight = positive_or_one(plan.sum(-2)).rsqrt()[:, None, :]
    width = max(MIN_BLOCK, -(-plan.shape[-1] // 4))  # in blocks of columns: no further array as large as the plan
    laplacian = plan.new_zeros(*plan.shape[:-1], plan.shape[-2])
    for block, block_weight in zip(plan.split(width, -1), weight.split(width, -1), strict=True):
        root = block * block_weight
        laplacian.baddbmm_(root, root.mT)
    diagonal = laplacian.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    degree = laplacian.sum(-1)
    mass = plan.sum(-1)
    free = (mass > 0).to(plan.dtype).scatter_(-1, mass.argmax(-1, keepdim=True), 0.0)
    laplacian.neg_().mul_(free[:, :, None]).mul_(free[:, None, :])
    diagonal.copy_(degree * free + (1.0 - free))
    factor, info = factorise(laplacian)
    alpha = torch.cholesky_solve((free * right)[:, :, None], factor)[:, :, 0]
    return alpha, (info == 0) & alpha.isfinite().all(-1)
