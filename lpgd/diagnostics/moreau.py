"""Values of the Lagrange-Moreau envelopes of a loss: what LPGD's gradients are gradients of.

With x* the solution for parameters w, ``f`` the objective, C the feasible set and ``ℓ̃`` the loss linearised at x*,

    lower    min_{x ∈ C} ℓ̃(x) + (f(x) - f(x*) + (ρ/2) |x - x*|²) / τ
    upper    max_{x ∈ C} ℓ̃(x) - (f(x) - f(x*) + (ρ/2) |x - x*|²) / τ

so ``lower ≤ ℓ(x*) ≤ upper`` everywhere, all three meet as τ → 0, and the average is the mean of the two ([LPGD]
section 4; the penalty is the Lagrangian's at its best multipliers).  x*, the loss gradient and the centre of the
augmentation belong to w: the curves over w are not those of a fixed linear loss.

[LPGD] Paulus, Musil, Martius: Lagrangian Proximal Gradient Descent for Learning Convex Optimization Models
(arXiv 2407.05920).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpgd.diagnostics.passes import Loss, Parameters, Pass, collected_warnings
from lpgd.layers.base import BaseLayer

__all__ = ["Envelopes", "envelope_values", "envelopes"]

ACCURACY = 1e-6
"""Perturbed problems are solved to this accuracy relative to their step, as far as the solver goes."""


@dataclass(frozen=True, eq=False, repr=False)
class Envelopes:
    """Envelope values, each of the loss's shape: one number, or (*batch,).

    Attributes:
        tau, rho: τ and ρ.
        loss: the loss at the solution.
        lower, upper: the envelopes of the linearised loss; NaN where the perturbed problem has no solution.
        proximal: the lower envelope of the loss itself ([LPGD] eq. 10), where ``convex_loss`` was given: at least
            ``lower`` (a convex loss lies above its linearisation) and at most ``loss``.
    """

    tau: float
    rho: float
    loss: Tensor
    lower: Tensor
    upper: Tensor
    proximal: Tensor | None = None

    def __repr__(self) -> str:
        means = ((name, getattr(self, name)) for name in ("lower", "loss", "upper", "proximal"))
        values = ", ".join(f"{name} {float(value.mean()):.4g}" for name, value in means if value is not None)
        return f"Envelopes(tau={self.tau}, rho={self.rho}, shape {tuple(self.loss.shape)}; means: {values})"

    @property
    def average(self) -> Tensor:
        return 0.5 * (self.lower + self.upper)


def envelopes(
    layer: BaseLayer,
    parameters: Parameters,
    loss: Loss,
    tau: float,
    rho: float = 0.0,
    *,
    convex_loss: Callable[..., Any] | None = None,
) -> Envelopes:
    """The values of the envelopes of a loss of a layer's solution at these parameters.

    Args:
        layer: any layer of this library; it is not changed.
        parameters: the arguments of its call: a list, or a dictionary by name.
        loss: from the layer's output to one number, or to one for each element of the batch (*batch,), in which case
            the envelopes have a value for each element too.  It may depend on primal variables only.
        tau: τ > 0; it multiplies the gradient of the loss as it is.
        rho: ρ ≥ 0; x is the vector of the program that is solved, of a ``CvxpyLayer`` with CVXPY's auxiliary variables.
        convex_loss: the loss of one element as CVXPY writes it, convex: called as ``convex_loss(element, *outputs)``
            with the element's position in the flattened batch and CVXPY expressions in place of the layer's outputs
            (None for dual variables); for layers other than ``CvxpyLayer`` that is x alone.  It is solved by CVXPY.

    Raises:
        ValueError: τ or ρ is out of its range, the loss depends on dual variables (the envelopes are no bounds then),
            or ``convex_loss`` is not convex.
        TypeError: the layer is not one of this library, or its problem has no CVXPY form (``convex_loss``).
        SolverError: the layer has no solution for an element.
    """
    run = Pass(layer, parameters, loss)
    found = envelope_values(run, tau, rho)
    if convex_loss is None:
        return found
    from lpgd.diagnostics.proximal import lower_envelope_of_loss  # it imports CVXPY

    values = lower_envelope_of_loss(layer, run.solution, tau, rho, convex_loss)
    proximal = values.to(found.loss).reshape(found.loss.shape) if found.loss.ndim else values.sum().to(found.loss)
    return Envelopes(tau, rho, found.loss, found.lower, found.upper, proximal)


def envelope_values(run: Pass, tau: float, rho: float) -> Envelopes:
    """The envelopes of a pass; see :func:`envelopes`.

    ``lower - loss = (f(x₊) - f(x*) + (ρ/2) |x₊ - x*|²) / τ + <g, x₊ - x*>`` with x₊ the solution tilted by +τ, and
    ``upper - loss`` is the negative of the same with -τ, in place of differences of optimal values, which cancel.
    """
    if not 0 < tau < float("inf") or not 0 <= rho < float("inf"):
        raise ValueError(f"tau is {tau} and rho is {rho}; tau must be positive, rho nonnegative, both finite.")
    if any(bool(tensor.any()) for tensor in run.cotangent[1:]):
        raise ValueError(
            "the loss depends on dual variables (or on the slack of a problem through them); envelopes are bounds for "
            "losses on primal variables only."
        )
    x, g = run.solution.x, run.cotangent.x
    steps = torch.full((run.problem.batch_size,), tau, dtype=x.dtype, device=x.device)
    relative = float((steps / run.unit).min()) if run.problem.batch_size else 1.0
    changes = []
    with collected_warnings():  # an inaccurate perturbed solve shows as a value that breaks the order of the curves
        for sign in (1.0, -1.0):
            found = run.perturbed(steps, rho, sign, ACCURACY * min(relative, 1.0))
            step = torch.where(found.usable[:, None], found.x, torch.nan) - x
            value = run.problem.objective(x + step) - run.problem.objective(x) + 0.5 * rho * step.square().sum(-1)
            changes.append(sign * value / tau + (g * step).sum(-1))
    loss = run.losses.detach()
    lower, upper = (
        loss + (change.to(loss).reshape(loss.shape) if loss.ndim else change.sum().to(loss)) for change in changes
    )
    return Envelopes(tau, rho, loss, lower, upper)
