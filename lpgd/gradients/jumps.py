"""Perturbed solutions of declarative nodes that are no response to the perturbation: other ones of equal value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lpgd.problems.base import maximum_norm
from lpgd.problems.smooth import SmoothProblem
from lpgd.status import warn

__all__ = ["warn_of_jumps"]

FAR = 1e-2
"""Relative to ``1 + |x|``: a move of less is no jump."""
FREE = 1e-3
"""Of what the tilt gains, which a jump pays for less than that; a linear response pays for the half."""


def warn_of_jumps(
    method: Any, problem: Any, base: Any, ends: Sequence[Any], tau: Tensor, cotangent: Any, elements: Sequence[int]
) -> None:
    """Warn about elements whose perturbed solution is far away, at no cost in what was minimised before the tilt.

    A response to the tilt ``τ <g, x>`` gains twice what it costs: ``½ dxᵀ ∇²L dx = -½ τ <g, dx>``.  Where solutions are
    not unique, as eigenvectors of equal eigenvalues are not, the tilt chooses among them: they move by as much however
    small τ is, and a difference divided by τ is no derivative.

    Args:
        method: for the message.
        problem: B elements, with an augmentation but without the tilt; nothing is done but for nodes.
        base: their solutions.
        ends: perturbed solutions, the base's where there is none.
        tau: (B,) steps.
        cotangent: g.
        elements: their places in the whole batch.
    """
    if not isinstance(problem, SmoothProblem) or problem.is_shifted:
        return
    jumped = torch.zeros(len(elements), dtype=torch.bool, device=problem.device)
    for end in ends:
        move = end.x - base.x
        far = maximum_norm(move) > FAR * (1 + maximum_norm(base.x))
        if not far.any():
            continue
        rows = far.nonzero()[:, 0]
        part = problem.select(rows.tolist())
        before, after = part.objective(base.x[rows]), part.objective(end.x[rows])
        gain = tau[rows].to(move.dtype) * (cotangent.x[rows] * move[rows]).sum(-1).abs()
        unique = part.node.is_unique(tuple(part.data), part.shaped(base.x[rows]))
        if unique is not None and not problem.rho:
            jumped[rows] |= ~unique
        known = FREE * gain > 100 * torch.finfo(move.dtype).eps * torch.maximum(before.abs(), after.abs())
        jumped[rows] |= known & (after - before <= FREE * gain)
    if jumped.any():
        named = [element for element, far in zip(elements, jumped.tolist(), strict=True) if far]
        warn(
            f"{method}: the perturbed solutions of elements {named[:10]} are far from the solutions, and the solutions of "
            f"{problem.node.name} are not unique there: others are as good (equal eigenvalues, flat directions).  The "
            "gradient is that of a jump between them, which says nothing of a small change.  rho > 0 keeps to the "
            "solution."
        )
