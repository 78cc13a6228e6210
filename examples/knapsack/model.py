"""The model: a knapsack whose item weights and capacities, its constraints, are learned."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import lpgd

__all__ = ["METHODS", "KnapsackModel", "integer_layer", "layer_of", "packing_loss", "reproduced"]

# How gradients are taken, by the name on the command line.
METHODS = ("lower", "average", "upper", "fixed", "relaxed")


def _problem(x: cp.Variable) -> tuple[cp.Problem, list[cp.Parameter]]:
    values, weights, capacity = cp.Parameter(x.size), cp.Parameter(x.size), cp.Parameter()
    return cp.Problem(cp.Maximize(values @ x), [weights @ x <= capacity]), [values, weights, capacity]


def integer_layer(items: int, gradient: Any, multipliers: Any = "relaxation") -> lpgd.CvxpyLayer:
    """The layer (v, w, b) -> argmax of ⟨v, x⟩ over x in {0, 1}ⁿ with ⟨w, x⟩ ≤ b."""
    x = cp.Variable(items, boolean=True)
    problem, parameters = _problem(x)
    solver = lpgd.HiGHS(multipliers=multipliers)
    return lpgd.CvxpyLayer(problem, parameters, [x], solver=solver, gradient=gradient, executor=lpgd.SerialExecutor())


def layer_of(method: str, items: int, tau: float) -> lpgd.CvxpyLayer:
    """The layer that a method of ``METHODS`` trains through.

    ``lower``, ``average`` and ``upper`` are envelopes of LPGD with the multipliers of the linear relaxation; ``fixed``
    is the lower one with those of the program whose integers are fixed; ``relaxed`` is the linear relaxation itself,
    x in [0, 1]ⁿ, with its exact gradients.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    if method == "relaxed":
        x = cp.Variable(items, bounds=[0, 1])
        problem, parameters = _problem(x)
        return lpgd.CvxpyLayer(problem, parameters, [x], solver="HIGHS", executor=lpgd.SerialExecutor())
    if method == "fixed":
        return integer_layer(items, lpgd.LPGD(tau=tau, envelope="lower"), "fixed")
    return integer_layer(items, lpgd.LPGD(tau=tau, envelope=method))


class KnapsackModel(nn.Module):
    """Weights w > 0 of n items and capacities b > 0 of k vans; both are softplus of the parameters.

    Args:
        items: n.
        vans: k.
        seed: of the weights at the start, uniform in [0.2, 1); every van can take half of them.
    """

    def __init__(self, items: int, vans: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = 0.2 + 0.8 * torch.rand(items, generator=generator, dtype=torch.float64)
        self.raw_weights = nn.Parameter(_inverse_softplus(weights))
        self.raw_capacities = nn.Parameter(_inverse_softplus(0.5 * weights.sum().expand(vans)))

    @property
    def weights(self) -> Tensor:
        return softplus(self.raw_weights)

    @property
    def capacities(self) -> Tensor:
        return softplus(self.raw_capacities)

    def forward(self, layer: nn.Module, values: Tensor, vans: Tensor) -> Tensor:
        """(B, n) values and the van of each of B orders to its packing (B, n)."""
        (packing,) = layer(values, self.weights, self.capacities[vans])
        return packing


def _inverse_softplus(positive: Tensor) -> Tensor:
    return torch.log(torch.expm1(positive))


def reproduced(packings: Tensor, observed: Tensor) -> Tensor:
    """(B,) whether a packing is the observed one."""
    return (packings.detach() - observed).abs().sum(-1) < 0.5


def packing_loss(packings: Tensor, observed: Tensor) -> Tensor:
    """Hamming distance, summed over the batch.

    For binary x* it is linear in x, ``⟨1 - 2 x*, x⟩ + Σ x*``: there is a gradient for the items that are right as well,
    so that a perturbed program prefers the observed packing as a whole.  Packings that are right are left alone.
    """
    distance = (packings * (1 - 2 * observed) + observed).sum(-1)
    return distance[~reproduced(packings, observed)].sum()
