"""Entropic optimal transport: log domain Sinkhorn, and its derivative by one Cholesky factor of the smaller side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpgd.problems.node import BaseNode, NodeAnswer, Tilt
from lpgd.status import SolverError, Status, describe_failures

__all__ = [
    "OptimalTransport",
    "Plan",
    "potentials_of",
    "sinkhorn",
    "transport_vjp",
    "transport_vjp_approximate",
]

_State = tuple[Tensor, Tensor, Tensor]  # plan, f, g

STEPS = 10
"""Sinkhorn iterations between two looks at the residual."""
NEWTON_FROM = 3
"""So many times ``STEPS`` are without a Newton step."""


class Plan(NamedTuple):
    """A transport plan ``P_ij = r_i c_j exp(f_i + g_j - γ M_ij)`` with its dual potentials.

    Attributes:
        plan: (B, m, n) P.
        rows, columns: (B, m) and (B, n), the potentials f and g.
        residual: (B,) ``Σ_i |(P1 - r)_i| / Σ r``; the column sums are exact.
        iterations: (B,) Sinkhorn iterations, a multiple of ten.
    """

    plan: Tensor
    rows: Tensor
    columns: Tensor
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

    Every ten iterations start from potentials, so that nothing underflows however large γ M is; in between the kernel
    that they make is scaled, which costs two products with it.  Where a scaling leaves the range in which the kernel
    is accurate, the ten iterations are done on the potentials themselves.

    Sinkhorn's convergence is slow at large γ.  From the fourth ten on, each ten starts from a damped Newton step of the
    dual problem where that is better; its system is that of :func:`transport_vjp`.

    Args:
        cost: M.
        rows: r, positive.
        columns: c, positive, of the same sum as r.
        gamma: γ > 0, the inverse of the entropic regularisation.
        potential: g of an earlier :class:`Plan` to start from; None starts from zero.
        tolerance: of :attr:`Plan.residual`.
        iterations: at most so many, rounded up to a multiple of ten.
    """
    total = rows.sum(-1, keepdim=True)
    columns = columns * (total / columns.sum(-1, keepdim=True))  # equal up to rounding, here exactly
    log_rows, log_columns, scaled = rows.log(), columns.log(), gamma * cost
    f, g = torch.zeros_like(rows), torch.zeros_like(columns) if potential is None else potential.clone()
    plan, residual = torch.empty_like(cost), torch.full_like(total[:, 0], torch.inf)
    spent = torch.zeros(len(cost), dtype=torch.int64, device=cost.device)
    active = torch.arange(len(cost), device=cost.device)
    for turn in range(-(-iterations // STEPS)):
        whole = len(active) == len(cost)  # then nothing is copied
        kept = (scaled, rows, columns, log_rows, log_columns, g)
        *part, start = kept if whole else [tensor[active] for tensor in kept]
        step = _newton_step(plan if whole else plan[active], part[1]) if turn >= NEWTON_FROM else None
        if whole:
            plan = scaled  # lets go of the old plan before there are new ones
        found = _ten_iterations(*part, start)
        if step is not None:
            other = _ten_iterations(*part, start + step)
            better = _is_better(other, found, part[1], part[2])
            found = other if better.all() else _chosen(better, other, found)
            del other
        residual[active] = _residual(found[0], part[1])
        spent[active] += STEPS
        if whole:
            plan, f, g = found
        else:
            plan[active], f[active], g[active] = found
        active = active[~(residual[active] <= tolerance)]
        if not len(active):
            break
    return Plan(plan, f, g, residual, spent)


def _log_iteration(
    scaled: Tensor, log_rows: Tensor, log_columns: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:  # potentials (B, m), (B, n)
    f = -torch.logsumexp((log_columns + g)[:, None, :] - scaled, -1)
    return f, -torch.logsumexp((log_rows + f)[:, :, None] - scaled, -2)


def _kernel(scaled: Tensor, log_rows: Tensor, log_columns: Tensor, f: Tensor, g: Tensor) -> Tensor:
    return ((log_rows + f)[:, :, None] + (log_columns + g)[:, None, :]).sub_(scaled).exp_()


def _ten_iterations(
    scaled: Tensor, rows: Tensor, columns: Tensor, log_rows: Tensor, log_columns: Tensor, start: Tensor
) -> _State:
    """The plan and the potentials, after one iteration on the potentials and nine scalings of the kernel."""
    first_f, first_g = _log_iteration(scaled, log_rows, log_columns, start)
    kernel = _kernel(scaled, log_rows, log_columns, first_f, first_g)
    transposed, v = kernel.mT, torch.ones_like(columns)[:, :, None]
    u = torch.ones_like(rows)[:, :, None]
    for _ in range(STEPS - 1):
        u = rows[:, :, None] / (kernel @ v)
        v = columns[:, :, None] / (transposed @ u)
    f, g = first_f + u[:, :, 0].log(), first_g + v[:, :, 0].log()
    plan = kernel.mul_(u).mul_(v.mT)
    # What underflows in the kernel must not count in the plan: scalings stay within a sixth of the exponent's range.
    limit = math.log(torch.finfo(scaled.dtype).max) / 6
    drift = torch.maximum(u.log().abs().amax((1, 2)), v.log().abs().amax((1, 2)))
    far = (~(drift <= limit)).nonzero()[:, 0]
    if len(far):
        own = (scaled[far], log_rows[far], log_columns[far])
        own_f, own_g = first_f[far], first_g[far]
        for _ in range(STEPS - 1):
            own_f, own_g = _log_iteration(*own, own_g)
        plan[far], f[far], g[far] = _kernel(*own, own_f, own_g), own_f, own_g
    return plan, f, g


def _residual(plan: Tensor, rows: Tensor) -> Tensor:
    return (plan.sum(-1) - rows).abs().sum(-1) / rows.sum(-1)


def _is_better(new: _State, old: _State, rows: Tensor, columns: Tensor) -> Tensor:
    """(B,) by the dual objective ``<r, f> + <c, g>`` (both plans have the right mass), near its end by the residual."""
    first, second = ((rows * f).sum(-1) + (columns * g).sum(-1) for _, f, g in (new, old))
    noise = 1e3 * torch.finfo(rows.dtype).eps * (rows.sum(-1) + second.abs())
    near = (first - second).abs() <= noise
    return torch.where(near, _residual(new[0], rows) < _residual(old[0], rows), first > second)


def _chosen(better: Tensor, new: _State, old: _State) -> _State:
    """Of each element the new state where it is better, written into the old one."""
    for own, other in zip(old, new, strict=True):
        own[better] = other[better]
    return old


def _newton_step(plan: Tensor, rows: Tensor) -> Tensor:
    """The change of g (B, n), damped so that no entry of the plan changes by more than e⁴; zero where there is none."""
    missing, mass = rows - plan.sum(-1), plan.sum(-2)  # the columns of the plan are right
    if plan.shape[-2] <= plan.shape[-1]:
        alpha, good = _smaller_side(plan, missing)
        beta = -(plan.mT @ alpha[:, :, None])[:, :, 0] / mass
    else:
        weight = plan.sum(-1)
        beta, good = _smaller_side(plan.mT, -(plan.mT @ (missing / weight)[:, :, None])[:, :, 0])
        alpha = (missing - (plan @ beta[:, :, None])[:, :, 0]) / weight
    size = torch.maximum((alpha.amax(-1) + beta.amax(-1)).abs(), (alpha.amin(-1) + beta.amin(-1)).abs())
    good = good & size.isfinite()
    return torch.where(good[:, None], beta * (4.0 / size.clamp(min=4.0))[:, None], 0.0)


def _smaller_side(plan: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """α (B, m) with ``(diag(P1) - P diag(Pᵀ1)⁻¹ Pᵀ) α = right``, m ≤ n, and (B,) whether there is a Cholesky factor.

    The matrix is the Laplacian of a graph: each row's diagonal is the sum of the others, and is computed so, with no
    cancellation however sharp the plan.  The row of largest mass, a redundant one, is dropped: its α is zero.
    """
    root = plan / plan.sum(-2).sqrt()[:, None, :]
    laplacian = root @ root.mT
    del root  # as large as the plan
    diagonal = laplacian.diagonal(dim1=-2, dim2=-1)
    diagonal.zero_()
    degree = laplacian.sum(-1)
    free = torch.ones_like(right).scatter_(-1, plan.sum(-1).argmax(-1, keepdim=True), 0.0)
    laplacian.neg_().mul_(free[:, :, None]).mul_(free[:, None, :])
    diagonal.copy_(degree * free + (1.0 - free))
    factor, info = torch.linalg.cholesky_ex(laplacian)
    alpha = torch.cholesky_solve((free * right)[:, :, None], factor)[:, :, 0]
    return alpha, (info == 0) & alpha.isfinite().all(-1)


def potentials_of(plan: Tensor, cost: Tensor, rows: Tensor, columns: Tensor, gamma: float) -> Tensor:
    """The potential g (B, n) of a plan: exact for the problem's own solution, a warm start for one of near data.

    Entries of the plan that underflowed are left out of the mean over rows.
    """
    smallest = torch.finfo(plan.dtype).tiny
    exponent = plan.clamp(min=smallest).log() + gamma * cost - rows.log()[:, :, None] - columns.log()[:, None, :]
    held = (plan > smallest).to(plan.dtype)
    count = held.sum((1, 2)).clamp(min=1.0)
    g = torch.zeros_like(columns)
    for _ in range(2):  # least squares fit of f_i + g_j by turns; exact at once where no entry is left out
        f = (held * (exponent - g[:, None, :])).sum(-1) / held.sum(-1).clamp(min=1.0)
        g = (held * (exponent - f[:, :, None])).sum(-2) / held.sum(-2).clamp(min=1.0)
    return g - ((held * g[:, None, :]).sum((1, 2)) / count)[:, None]


def transport_vjp(plan: Tensor, gamma: float, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``<V, P>`` with respect to M, r and c, from the plan (B, m, n) alone.

    With ``α`` (B, m) and ``β`` (B, n) that solve ``[[diag r, P], [Pᵀ, diag c]] (α, β) = ((P∘V)1, (P∘V)ᵀ1)`` they are
    ``-γ P∘(V - α1ᵀ - 1βᵀ)``, α and β.  The larger side is eliminated; what is left on the smaller one, of k rows, is
    the Laplacian of a graph, of which one row is redundant and dropped: a Cholesky factor of order k - 1, at a cost of
    ``O(m n k + k³)``.  Lecture notes of Gould, eqs. 139-146.

    α and β are determined up to adding t to one and -t to the other, as only changes of r and c of the same sum have a
    plan; here the last entry of β is zero.

    Raises:
        SolverError: the plan of some elements has fallen apart, to rounding, into parts that share no mass.
    """
    if plan.shape[-2] > plan.shape[-1]:
        on_cost, on_columns, on_rows = transport_vjp(plan.mT, gamma, cotangent.mT)
        return on_cost.mT, on_rows + on_columns[:, -1:], on_columns - on_columns[:, -1:]
    mass = plan.sum(-2)
    weighted = plan * cotangent
    mean = weighted.sum(-2) / mass  # (B, n)
    right = weighted.addcmul_(plan, mean[:, None, :], value=-1.0).sum(-1)
    del weighted  # as large as the plan
    alpha, good = _smaller_side(plan, right)
    beta = mean - (plan.mT @ alpha[:, :, None])[:, :, 0] / mass
    _check_factor(good & beta.isfinite().all(-1))
    on_cost = (alpha[:, :, None] + beta[:, None, :]).sub_(cotangent).mul_(plan).mul_(gamma)
    return on_cost, alpha + beta[:, -1:], beta - beta[:, -1:]


def transport_vjp_approximate(
    plan: Tensor, rows: Tensor, columns: Tensor, gamma: float, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that ignore the constraints: ``-γ P∘V``, ``(P∘V)1 / r`` and ``(P∘V)ᵀ1 / c``.

    What is left is how the objective depends on M, r and c; its minimiser is ``r_i c_j exp(-γ M_ij)`` up to scaling.
    Gould, Xu, Xu, Liu, *Towards Understanding Gradient Approximation in Equality Constrained DDNs*, section 3.2.
    """
    weighted = plan * cotangent
    return -gamma * weighted, weighted.sum(-1) / rows, weighted.sum(-2) / columns


def _check_factor(good: Tensor) -> None:
    failed = (~good).nonzero()[:, 0].tolist()
    if failed:
        statuses = [Status.SOLVED if ok else Status.NUMERICAL_ERROR for ok in good.tolist()]
        raise SolverError(
            "The derivative of a transport plan has no Cholesky factor: the plan has fallen apart, to rounding, into "
            f"parts that share no mass; lower gamma, or use float64.  {describe_failures(statuses, failed)}.",
            statuses,
            failed,
        )


@dataclass(frozen=True)
class OptimalTransport(BaseNode):
    """The entropic transport plan P (m, n) of a cost M (m, n) and marginals r (m) and c (n).

        minimise  <P, M> + (1/γ) Σ_ij (P_ij log(P_ij / (r_i c_j)) - P_ij + r_i c_j)
        subject to  P 1 = r,  Pᵀ 1 = c (its last row is implied, and left out)

    r and c are positive and of the same sum (a softmax makes them so); elements where they are not are INFEASIBLE.  The
    gradients for r and c are those of changes that keep the sums equal, with the last entry of c's gradient at zero.

    Forward :func:`sinkhorn`, ``O(m n)`` for each iteration, with Newton steps where it is slow; backward
    :func:`transport_vjp`, ``O(m n min(m, n))``, whatever the number of iterations.  LPGD without augmentation re-solves
    with the cost ``M + τ g``, which is the tilted problem.  ImplicitKKT divides by P: it needs one without entries that
    underflow.
    Gould, *Lecture Notes on Differentiable Optimisation in Deep Learning*, section 4.2.

    Args:
        gamma: γ, the inverse of the regularisation: the larger, the closer to unregularised transport, and the more
            iterations.
        tolerance: of ``Σ|P1 - r| / Σr``; None is ``16 √max(m, n)`` rounding errors of the dtype.
        iterations: Sinkhorn iterations at most.
    """

    name = "optimal transport"
    input_names = ("cost", "rows", "columns")
    input_ndims = (2, 1, 1)

    gamma: float = 10.0
    tolerance: float | None = None
    iterations: int = 10_000

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma is {self.gamma}; it must be a positive number.")
        if self.iterations < 1 or (self.tolerance is not None and not self.tolerance > 0):
            raise ValueError(
                f"iterations and tolerance are {self.iterations} and {self.tolerance}; they must be positive."
            )

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        cost, rows, columns = shapes
        if len(cost) != 2 or rows != cost[:1] or columns != cost[1:] or 0 in cost:
            raise ValueError(
                f"cost, rows and columns have shapes {cost}, {rows} and {columns}; they must be (m, n), (m,) and (n,)."
            )
        return cost

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        cost, rows, columns = inputs
        product = rows[:, :, None] * columns[:, None, :]
        # Not of y / product: its derivative in the marginals exists where y underflows to zero.
        logarithms = rows.log()[:, :, None] + columns.log()[:, None, :]
        divergence = torch.xlogy(y, y) - y * logarithms - y + product
        return (y * cost + divergence / self.gamma).sum((-2, -1))

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return torch.cat([y.sum(-1) - inputs[1], y.sum(-2)[:, :-1] - inputs[2][:, :-1]], -1)

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        return inputs[1][:, :, None] * inputs[2][:, None, :] / inputs[2].sum(-1)[:, None, None]

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        cost, rows, columns = inputs
        total, other = rows.sum(-1), columns.sum(-1)
        precision = torch.finfo(cost.dtype).eps
        equal = (total - other).abs() <= precision**0.5 * torch.maximum(total, other)
        feasible = equal & (rows > 0).all(-1) & (columns > 0).all(-1)
        tolerance = 16 * precision * max(cost.shape[1:]) ** 0.5 if self.tolerance is None else self.tolerance
        kept = feasible.nonzero()[:, 0]
        own = (cost[kept], rows[kept], columns[kept])
        potential = None if start is None else potentials_of(start[kept], *own, self.gamma)
        answer = sinkhorn(*own, self.gamma, potential=potential, tolerance=tolerance, iterations=self.iterations)
        solved = answer.residual <= tolerance
        return NodeAnswer(
            torch.full_like(cost, torch.nan).index_copy_(0, kept, answer.plan),
            _statuses(feasible, solved),
            answer.iterations.new_zeros(len(cost)).index_copy_(0, kept, answer.iterations),
            nu=cost.new_zeros(len(cost), sum(cost.shape[1:]) - 1).index_copy_(0, kept, self._multipliers(answer)),
            lam=cost.new_zeros(len(cost), 0),
        )

    def _multipliers(self, answer: Plan) -> Tensor:
        last = answer.columns[:, -1:]
        return torch.cat([answer.rows + last, (answer.columns - last)[:, :-1]], -1) / -self.gamma

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer | None:
        """``<P, M> + <g, P>`` is a change of the cost; the quadratic term of an augmentation is not."""
        if tilt.rho:
            return None
        return self.solve((inputs[0] + tilt.linear, *inputs[1:]), start)

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        return transport_vjp(y, self.gamma, cotangent)

    def vjp_ignoring_constraints(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any
    ) -> tuple[Tensor | None, ...]:
        return transport_vjp_approximate(y, inputs[1], inputs[2], self.gamma, cotangent)


def _statuses(feasible: Tensor, solved: Tensor) -> Sequence[Status]:
    """A status for each element, where ``solved`` has the feasible ones only."""
    own = iter(solved.tolist())
    return [
        (Status.SOLVED if next(own) else Status.ITERATION_LIMIT) if good else Status.INFEASIBLE
        for good in feasible.tolist()
    ]
