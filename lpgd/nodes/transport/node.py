"""Entropic optimal transport: the node, and its derivative by one Cholesky factor of the smaller side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import flags, rows_where
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt, fixed_number
from lpgd.nodes.transport.averages import by_differentiable_factor, by_factor
from lpgd.nodes.transport.sinkhorn import Plan, annealed_sinkhorn, positive_or_one, sinkhorn
from lpgd.status import Status, refuse_elements

__all__ = [
    "OptimalTransport",
    "Plan",
    "annealed_sinkhorn",
    "potentials_of",
    "sinkhorn",
    "transport_vjp",
    "transport_vjp_approximate",
]


def potentials_of(plan: Tensor, cost: Tensor, rows: Tensor, columns: Tensor, gamma: float) -> Tensor:
    """The potential g (B, n) of a plan: exact for the problem's own solution, a warm start for one of near data.

    Entries of the plan that underflowed are left out of the mean over rows.
    """
    smallest = torch.finfo(plan.dtype).tiny
    logarithms = positive_or_one(rows).log()[:, :, None] + positive_or_one(columns).log()[:, None, :]
    exponent = plan.clamp(min=smallest).log() + gamma * cost - logarithms
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

    Where parts of the plan share next to no mass a factor has no digits, and averages do it (:mod:`.averages`).

    Raises:
        SolverError: the plan of some elements has fallen apart, to rounding, into parts that share no mass.
    """
    return _vjp(plan, gamma, cotangent, by_factor)


def _vjp(
    plan: Tensor,
    gamma: float,
    cotangent: Tensor,
    solve: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`transport_vjp`, by a solver of the smaller side's system."""
    if plan.shape[-2] > plan.shape[-1]:
        on_cost, on_columns, on_rows = _vjp(plan.mT, gamma, cotangent.mT, solve)
        return on_cost.mT, on_rows + on_columns[:, -1:], on_columns - on_columns[:, -1:]
    mass = plan.sum(-2)  # zero of an empty bin, whose α or β is zero: see _of_empty_bins
    weighted = plan * cotangent
    divisor = positive_or_one(mass)
    mean = weighted.sum(-2) / divisor  # (B, n)
    right = weighted.addcmul_(plan, mean[:, None, :], value=-1.0).sum(-1)
    del weighted  # as large as the plan
    alpha, good = solve(plan, right, cotangent, mean)
    beta = mean - linalg.matvec(plan.mT, alpha) / divisor
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
    return -gamma * weighted, weighted.sum(-1) / positive_or_one(rows), weighted.sum(-2) / positive_or_one(columns)


class _Conditionals(NamedTuple):
    """The potentials f (B, m) and g (B, n), and the distributions of each row's and of each column's mass, (B, m, n).

    All are there for empty bins, too, as ``q_ij ∝ c_j exp(g_j - γ M_ij)`` of rows.
    """

    f: Tensor
    g: Tensor
    rows: Tensor
    columns: Tensor


def _conditionals(inputs: tuple[Tensor, ...], gamma: float, g: Tensor) -> _Conditionals:
    """What follows from g, which is right where columns are positive."""
    cost, rows, columns = inputs
    log_rows, log_columns = (torch.where(mass > 0, positive_or_one(mass).log(), -torch.inf) for mass in (rows, columns))
    exponent = (log_columns + g)[:, None, :] - gamma * cost
    f = -torch.logsumexp(exponent, -1)
    other = (log_rows + f)[:, :, None] - gamma * cost
    g = torch.where(columns > 0, g, -torch.logsumexp(other, -2))
    return _Conditionals(f, g, exponent.softmax(-1), other.softmax(-2))


def _last_filled(columns: Tensor) -> Tensor:
    """(B, 1) the last column that is not empty, whose constraint is the one that is implied by the others."""
    places = torch.arange(columns.shape[-1], device=columns.device)
    return torch.where(columns > 0, places, -1).amax(-1, keepdim=True)


def _of_empty_bins(
    inputs: tuple[Tensor, ...], gamma: float, cotangent: Tensor, gradients: tuple[Tensor, ...], g: Tensor
) -> tuple[Tensor, ...]:
    """The gradients for marginals with zero entries: what these would be worth if they grew.

    A new row is ``r_i q_i``, and so its α is ``Σ_j q_ij (V_ij - β_j)``; likewise for columns.

    Args:
        inputs: M, r, c.
        gamma: γ.
        cotangent: V.
        gradients: for M, and α and β, which are right where r and c are positive.
        g: (B, n) the potential of the columns.
    """
    _, rows, columns = inputs
    on_cost, alpha, beta = gradients
    shift = beta.gather(-1, _last_filled(columns))
    alpha, beta = alpha + shift, beta - shift
    _, _, along_rows, along_columns = _conditionals(inputs, gamma, g)
    new_alpha = (along_rows * (cotangent - beta[:, None, :])).sum(-1)
    new_beta = (along_columns * (cotangent - alpha[:, :, None])).sum(-2)
    return on_cost, torch.where(rows > 0, alpha, new_alpha), torch.where(columns > 0, beta, new_beta)


def _check_factor(good: Tensor) -> None:
    refuse_elements(
        flags(good),
        "The derivative of a transport plan has no Cholesky factor: the plan has fallen apart, to rounding, into parts "
        "that share no mass; lower gamma, or use float64.",
    )


@dataclass(frozen=True)
class OptimalTransport(BaseNode):
    """The entropic transport plan P (m, n) of a cost M (m, n) and marginals r (m) and c (n).

        minimise  <P, M> + (1/γ) Σ_ij (P_ij log(P_ij / (r_i c_j)) - P_ij + r_i c_j)
        subject to  P 1 = r,  Pᵀ 1 = c (its last row is implied, and left out)

    r and c are at least zero and of the same positive sum (a softmax makes them so); elements where they are not are
    INFEASIBLE.  A marginal that is left out of a call, or None, is uniform: 1/m, 1/n, or of the other one's sum.  Where
    an entry is zero, the plan's row or column is zero, exactly.  The gradients for r and c are those of changes that
    keep the sums equal, with that of c's last positive entry at zero; for zero entries, those of entries that grow.

    Forward :func:`annealed_sinkhorn`, ``O(m n)`` for each iteration, with Newton steps where it is slow; backward
    :func:`transport_vjp`, ``O(m n min(m, n))``, whatever the number of iterations.  LPGD without augmentation re-solves
    with the cost ``M + τ g``, which is the tilted problem.  ImplicitKKT divides by P: it needs one without entries that
    underflow.
    Gould, *Lecture Notes on Differentiable Optimisation in Deep Learning*, section 4.2.

    Args:
        gamma: γ, the inverse of the regularisation: the larger, the closer to unregularised transport, and the more
            iterations.
        tolerance: of ``Σ|P1 - r| / Σr``; None is ``16 √max(m, n) + γ max|M| / 32`` rounding errors of the dtype.
        iterations: Sinkhorn iterations at most.
    """

    name = "optimal transport"
    domain = "Here rows and columns must be at least zero, with the same positive sum."
    optional = 2

    gamma: float = 10.0
    tolerance: float | None = None
    iterations: int = 10_000

    def __post_init__(self) -> None:
        how = "a plan is one of gamma times the cost, so scale that, with gamma=1"
        object.__setattr__(self, "gamma", fixed_number("gamma", self.gamma, how))
        if not (self.gamma > 0 and math.isfinite(self.gamma)):
            raise ValueError(f"gamma is {self.gamma}; it must be a positive number.")
        if self.iterations < 1 or (self.tolerance is not None and not self.tolerance > 0):
            raise ValueError(
                f"iterations and tolerance are {self.iterations} and {self.tolerance}; they must be positive."
            )

    @property
    def inputs(self) -> Mapping[str, int]:
        return {"cost": 2, "rows": 1, "columns": 1}

    def arrange(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """Put uniform marginals where there are none.

        Raises:
            ValueError: the cost is no matrix.
        """
        cost, rows, columns = inputs
        if cost is None or cost.ndim < 2:
            raise ValueError(f"cost has shape {None if cost is None else tuple(cost.shape)}; expected (*batch, m, n).")
        m, n = cost.shape[-2:]
        if rows is None:
            rows = cost.new_full((m,), 1 / max(m, 1)) if columns is None else _uniform(columns, m)
        return cost, rows, _uniform(rows, n) if columns is None else columns

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
        logarithms = positive_or_one(rows).log()[:, :, None] + positive_or_one(columns).log()[:, None, :]
        # Of what has underflowed, y log y is continued by its parabola: its derivatives are large there, not infinite.
        floor = torch.finfo(y.dtype).tiny / torch.finfo(y.dtype).eps
        held = y.clamp(min=floor)
        entropy = held * held.log() + torch.where(
            y < floor, (math.log(floor) + 1.0) * (y - floor) + (y - floor).square() / (2.0 * floor), 0.0
        )
        divergence = entropy - y * logarithms - y + product
        terms = y * cost + divergence / self.gamma
        return (terms if _are_positive(inputs) else self._with_empty_bins(terms, y, inputs)).sum((-2, -1))

    def _with_empty_bins(self, terms: Tensor, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """The terms of the objective with others for entries of empty bins, where y log y has no second derivative.

        A stiff parabola around ``r_i q_ij``, by which an entry grows with its bin, and a slope that makes zero optimal.
        """
        _, rows, columns = inputs
        constant = tuple(tensor.detach() for tensor in inputs)
        known = _conditionals(constant, self.gamma, self._potential(constant, y.detach()))
        goal = rows[:, :, None] * known.rows + columns[:, None, :] * known.columns
        slope = (known.f[:, :, None] + known.g[:, None, :]) / self.gamma
        parabola = slope * y + (y - goal).square() / (2.0 * self._softness(*constant[1:])[:, :, None])
        empty = (rows == 0)[:, :, None] | (columns == 0)[:, None, :]
        return torch.where(empty, parabola, terms)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        _, rows, columns = inputs
        if _are_positive(inputs):
            return torch.cat([y.sum(-1) - rows, y.sum(-2)[:, :-1] - columns[:, :-1]], -1)
        units = self._units(rows.detach(), columns.detach())
        last = _constraint_places(columns)
        return torch.cat([(y.sum(-1) - rows) / units[0], ((y.sum(-2) - columns) / units[1]).gather(-1, last)], -1)

    def _softness(self, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, 1) the inverse curvature of an entry of an empty bin: less than other entries' by 3e-6 (in float64).

        That is the relative error of ImplicitKKT beside empty bins; a system with less of it counts as singular.
        """
        mean = rows.sum(-1, keepdim=True) / (rows.shape[-1] * columns.shape[-1])
        return torch.finfo(rows.dtype).eps ** 0.35 * self.gamma * mean

    def _units(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        """What constraints are divided by: those of empty bins are as stiff as their entries."""
        soft = self._softness(rows, columns)
        return tuple(torch.where(mass > 0, 1.0, soft) for mass in (rows, columns))

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        return inputs[1][:, :, None] * inputs[2][:, None, :] / inputs[2].sum(-1)[:, None, None]

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        cost, rows, columns = inputs
        total, other = rows.sum(-1), columns.sum(-1)
        precision = torch.finfo(cost.dtype).eps
        equal = (total - other).abs() <= precision**0.5 * torch.maximum(total, other)
        feasible = equal & (rows >= 0).all(-1) & (columns >= 0).all(-1) & (total > 0)
        tolerance = self._tolerance(cost) if self.tolerance is None else self.tolerance
        kept = rows_where(feasible)
        kept_inputs = (cost[kept], rows[kept], columns[kept])
        potential = None if start is None else potentials_of(start[kept], *kept_inputs, self.gamma)
        answer = annealed_sinkhorn(
            *kept_inputs, self.gamma, potential=potential, tolerance=tolerance, iterations=self.iterations
        )
        solved = answer.residual <= tolerance
        return NodeAnswer(
            torch.full_like(cost, torch.nan).index_copy_(0, kept, answer.plan),
            _statuses(feasible, solved),
            answer.iterations.new_zeros(len(cost)).index_copy_(0, kept, answer.iterations),
            aux=(columns.new_zeros(columns.shape).index_copy_(0, kept, answer.g),),
            nu=cost.new_zeros(len(cost), sum(cost.shape[1:]) - 1).index_copy_(
                0, kept, self._multipliers(answer, kept_inputs)
            ),
            lam=cost.new_zeros(len(cost), 0),
        )

    def _tolerance(self, cost: Tensor) -> float:
        # γM is an exponent: its rounding is a relative error of the plan.
        largest = self.gamma * float(cost.abs().amax()) if cost.numel() else 0.0
        return (16 * max(cost.shape[1:]) ** 0.5 + largest / 32) * torch.finfo(cost.dtype).eps

    def _multipliers(self, answer: Plan, inputs: tuple[Tensor, ...]) -> Tensor:
        _, rows, columns = inputs
        if _are_positive(inputs):
            last = answer.g[:, -1:]
            return torch.cat([answer.f + last, (answer.g - last)[:, :-1]], -1) / -self.gamma
        units, last = self._units(rows, columns), answer.g.gather(-1, _last_filled(columns))
        others = ((answer.g - last) * units[1]).gather(-1, _constraint_places(columns))
        return torch.cat([(answer.f + last) * units[0], others], -1) / -self.gamma

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer | None:
        """``<P, M> + <g, P>`` is a change of the cost; the quadratic term of an augmentation is not."""
        if tilt.rho:
            return None
        return self.solve((inputs[0] + tilt.linear, *inputs[1:]), start)

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        found = transport_vjp(y, self.gamma, cotangent)
        if _are_positive(inputs):
            return found
        g = self._potential(inputs, y) if aux is None else aux[0]
        return _of_empty_bins(inputs, self.gamma, cotangent, found, g)

    def without_digits(self, inputs: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor | None, Mapping[str, str]]:
        sharp = _hardly_shares(y) | _hardly_shares(y.mT)
        return sharp, {"rows": _SHARP, "columns": _SHARP} if bool(sharp.any()) else {}

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        found = _vjp(y, self.gamma, cotangent, by_differentiable_factor)
        if _are_positive(inputs):
            return found
        return _of_empty_bins(inputs, self.gamma, cotangent, found, self._potential(inputs, y))

    def _potential(self, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        cost, rows, columns = inputs
        return potentials_of(y, cost, rows, columns, self.gamma)

    def vjp_ignoring_constraints(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any
    ) -> tuple[Tensor | None, ...]:
        return transport_vjp_approximate(y, inputs[1], inputs[2], self.gamma, cotangent)


SHARED = 0.68
"""Multipliers of rows that share less than this power of the precision of their mass have five digits or less."""
_SHARP = (
    "the plan is so sharp that rows or columns share hardly any mass with others, and rounding took the digits of "
    "gradients for the marginals (those for the cost are right): lower gamma, or detach rows and columns."
)


def _hardly_shares(plan: Tensor) -> Tensor:
    """(B,) whether the mass of some row stands in columns that others have next to nothing of."""
    mass, of_columns = plan.sum(-1), plan.sum(-2)
    others = (of_columns[:, None, :] - plan).clamp(min=0.0) / positive_or_one(of_columns)[:, None, :]
    shared = (plan * others).sum(-1)
    several = (mass > 0).sum(-1) > 1
    return several & ((mass > 0) & (shared < torch.finfo(plan.dtype).eps ** SHARED * mass)).any(-1)


def _constraint_places(columns: Tensor) -> Tensor:
    """(B, n - 1) the columns whose constraints are kept: all but the last one that is not empty."""
    places = torch.arange(columns.shape[-1] - 1, device=columns.device)
    return torch.where(places == _last_filled(columns), columns.shape[-1] - 1, places)


def _uniform(other: Tensor, size: int) -> Tensor:
    """A uniform marginal of this size with the sum of the other one."""
    return (other.sum(-1, keepdim=True) / max(size, 1)).expand(*other.shape[:-1], size)


def _are_positive(inputs: tuple[Tensor, ...]) -> bool:
    """Whether there is no empty bin."""
    return bool((inputs[1] > 0).all() and (inputs[2] > 0).all())


def _statuses(feasible: Tensor, solved: Tensor) -> Sequence[Status]:
    """A status for each element, where ``solved`` has the feasible ones only."""
    converged = iter(flags(solved))
    return [
        (Status.SOLVED if next(converged) else Status.ITERATION_LIMIT) if good else Status.INFEASIBLE
        for good in flags(feasible)
    ]
