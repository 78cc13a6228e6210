"""Functions of a batch of points that generic solvers minimise: a node's objective, or its augmented Lagrangian.

With penalties c > 0 the augmented Lagrangian of ``f  s.t.  h = 0, g ≤ 0`` is

    f + νᵀh + (c/2)|h|² + (1/2c) Σ (max(0, λ + c g)² - λ²)

which is the objective itself where there are no constraints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lpgd.problems.node.problem import NodeProblem

__all__ = ["AugmentedLagrangian"]


@dataclass(frozen=True, eq=False)
class AugmentedLagrangian:
    """The augmented Lagrangian of a batch.

    Args:
        problem: B elements.
        nu, lam: (B, p) and (B, r) multipliers; None where there are no constraints.
        penalty: (B,) c.
    """

    problem: NodeProblem
    nu: Tensor | None = None
    lam: Tensor | None = None
    penalty: Tensor | None = None

    def value(self, x: Tensor) -> Tensor:
        """(B,)."""
        value = self.problem.objective(x)
        if self.nu is None or self.lam is None or self.penalty is None:
            return value
        h, g = self.problem.constraints(x)
        c = self.penalty[:, None]
        value = value + (self.nu * h + 0.5 * c * h.square()).sum(-1)
        return value + ((torch.relu(self.lam + c * g).square() - self.lam.square()) / (2 * c)).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """(B, n)."""
        return torch.func.grad(lambda x: self.value(x).sum())(x)

    def hessian(self, x: Tensor) -> Tensor:
        """(B, n, n)."""
        pull = torch.func.vjp(self.gradient, x)[1]
        units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.func.vmap(lambda unit: pull(unit.expand(x.shape))[0])(units).transpose(0, 1)

    def select(self, elements: Tensor) -> AugmentedLagrangian:
        """The functions of these elements."""
        multipliers = (self.nu, self.lam, self.penalty)
        nu, lam, penalty = (tensor if tensor is None else tensor[elements] for tensor in multipliers)
        return replace(self, problem=self.problem.select(elements), nu=nu, lam=lam, penalty=penalty)
