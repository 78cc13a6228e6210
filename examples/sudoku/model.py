"""The model: a linear program over the one-hot board whose equality constraints, the rules, are learned."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import lpgd
from lpgd.layers.cvxpy.layer import LayerOutput

from .data import decode, obeys_rules

__all__ = ["CONSTRAINTS", "METHODS", "SudokuModel", "board_error", "board_loss", "gradient_method", "sudoku_layer"]

# m by order N: the rank of the true rules.
CONSTRAINTS = {2: 40, 3: 249}
# How gradients are taken, by the name on the command line.
METHODS = ("lpgd", "lower", "upper", "exact")


def gradient_method(method: str, tau: float, rho: float) -> Any:
    """The gradient method of a name in ``METHODS``: ``lpgd`` is the average envelope; ``exact`` has no use for tau."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if method == "exact":
        return lpgd.ImplicitKKT(rho=rho)
    return lpgd.LPGD(tau=tau, rho=rho, envelope="average" if method == "lpgd" else method)


def sudoku_layer(order: int, constraints: int, gradient: Any, solver: str | None = None) -> lpgd.CvxpyLayer:
    """The layer (A, b, c) -> argmin of ⟨c, x⟩ over x in [0, 1]ⁿ with A x = b; n = N⁶ and A has ``constraints`` rows."""
    entries = order**6
    x = cp.Variable(entries)
    A, b, c = cp.Parameter((constraints, entries)), cp.Parameter(constraints), cp.Parameter(entries)
    problem = cp.Problem(cp.Minimize(c @ x), [A @ x == b, x >= 0, x <= 1])
    return lpgd.CvxpyLayer(problem, parameters=[A, b, c], variables=[x], solver=solver, gradient=gradient)


class SudokuModel(nn.Module):
    """x*(e) = argmin over x in [0, 1]ⁿ of ⟨-e, x⟩ subject to A x = A z₀, for a puzzle's one-hot encoding e.

    A is (m, n), drawn uniformly from [0, 1). z₀ in (0, 1)ⁿ, a point that the learned rules always allow, is the sigmoid
    of ``logits``, all zero at the start.

    Args:
        entries: n.
        constraints: m.
        layer: the linear program, as :func:`sudoku_layer` builds it.
        seed: of A.
    """

    def __init__(self, entries: int, constraints: int, layer: nn.Module, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.rand(constraints, entries, generator=generator, dtype=torch.float64))
        self.logits = nn.Parameter(torch.zeros(entries, dtype=torch.float64))
        self.layer = layer

    def forward(self, puzzles: Tensor) -> LayerOutput:
        """(B, n) one-hot puzzles to the layer's output, one (B, n) tensor: a cell's largest entry is its digit."""
        return self.layer(self.A, self.A @ torch.sigmoid(self.logits), -puzzles)


def board_loss(answers: Tensor, solutions: Tensor) -> Tensor:
    """Squared error, mean over entries and batch."""
    return (answers - solutions).square().mean()


def board_error(answers: Tensor) -> NDArray[np.bool_]:
    """(B, n) answers to (B,): whether the board of largest entries breaks a rule; the mean is the error."""
    return ~obeys_rules(decode(answers))
