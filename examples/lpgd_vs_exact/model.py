"""The task: a decision maker's solutions are seen, and its costs and limits are to be found out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import lpgd

__all__ = ["CURVATURE", "DecisionModel", "Task", "decision_loss", "make_task", "two_stage_loss"]

CURVATURE = {"qp": 1.0, "lp": 0.0}
"""γ of each kind of program."""


class DecisionModel(nn.Module):
    """x*(f) = argmin over x in [0, 1]ⁿ of <W f, x> + (γ/2) |x|² subject to G x ≤ h, for features f.

    W (n × d) and h = softplus(raw) are learned; G (k × n), nonnegative, is known.

    Args:
        kind: ``"qp"`` (γ = 1) or ``"lp"`` (γ = 0).
        G: (k, n).
        weights: (n, d) W at the start.
        limits: (k,) h at the start, positive.
        gradient: the gradient method.
    """

    def __init__(self, kind: str, G: Tensor, weights: Tensor, limits: Tensor, gradient: Any = None) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())
        self.raw = nn.Parameter(limits.expm1().log())
        self.register_buffer("G", G)
        self.register_buffer("P", CURVATURE[kind] * torch.eye(G.shape[1], dtype=G.dtype))
        self.layer = lpgd.LPLayer(gradient=gradient) if kind == "lp" else lpgd.QPLayer(gradient=gradient)
        self.kind = kind

    @property
    def limits(self) -> Tensor:
        return nn.functional.softplus(self.raw)

    def arguments(self, features: Tensor) -> dict[str, Any]:
        """The layer's arguments for (B, d) features."""
        costs = features @ self.weights.T
        objective = {"c": costs} if self.kind == "lp" else {"P": self.P, "q": costs}
        return {**objective, "G": self.G, "h": self.limits, "lb": 0.0, "ub": 1.0}

    def forward(self, features: Tensor) -> Any:
        """(B, d) features to the layer's output, whose x is (B, n)."""
        return self.layer(**self.arguments(features))


def decision_loss(x: Tensor, target: Tensor) -> Tensor:
    """Squared distance to the observed solutions, mean over the batch."""
    return (x - target).square().sum(-1).mean()


@dataclass(frozen=True, eq=False)
class Task:
    """Observed solutions of a decision maker with weights and limits of its own.

    Attributes:
        kind: ``"qp"`` or ``"lp"``.
        G: (k, n).
        features, solutions: (size, d) and (size, n) to learn from.
        test_features, test_solutions: held out.
        weights, limits: where learners start.
    """

    kind: str
    G: Tensor
    features: Tensor
    solutions: Tensor
    test_features: Tensor
    test_solutions: Tensor
    weights: Tensor
    limits: Tensor

    def model(self, gradient: Any = None) -> DecisionModel:
        """A learner at its start."""
        return DecisionModel(self.kind, self.G, self.weights, self.limits, gradient)


def make_task(kind: str, seed: int, n: int = 20, k: int = 4, d: int = 8, train: int = 512, test: int = 512) -> Task:
    """A seeded task: n variables, k limits, d features."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    G = torch.rand(k, n, dtype=torch.float64, generator=generator)
    limits = 0.25 * G.sum(-1)  # a quarter of everything fits
    teacher = DecisionModel(kind, G, normal(n, d) / d**0.5, limits)
    features = normal(train + test, d)
    with torch.no_grad():
        solutions = teacher(features).x
    start = normal(n, d) / d**0.5
    parts = features[:train], solutions[:train], features[train:], solutions[train:]
    return Task(kind, G, *parts, start, 2.0 * limits)


def two_stage_loss(task: Task) -> float:
    """The held-out loss without a layer in training: costs regressed on labels, then one solve.

    First ridge regression from features to 1 - 2x, a cost that would make x optimal in a box; then the program is
    solved with these costs and the limits of the start, as nothing in the first stage tells of limits.
    """
    d = task.features.shape[1]
    ridge = task.features.T @ task.features + torch.eye(d, dtype=torch.float64)
    weights = torch.linalg.solve(ridge, task.features.T @ (1 - 2 * task.solutions)).T
    model = DecisionModel(task.kind, task.G, weights, task.limits)
    with torch.no_grad():
        return decision_loss(model(task.test_features).x, task.test_solutions).item()
