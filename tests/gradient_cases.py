"""Every layer as a function of one vector, with its gradient in closed form: for the transforms of PyTorch."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

import lpgd

N, TAU = 4, 1.0
EYE, ZEROS, TARGET = torch.eye(N).double(), torch.zeros(N).double(), torch.tensor([1.0, 0.0, 1.0, 0.0]).double()
COSTS = torch.tensor([0.7, -0.4, 0.3, -1.2]).double()
WEIGHTS = torch.tensor([1.5, -2.0, -3.0, 0.5]).double()


def positive(x: Tensor) -> Tensor:
    return (x > 0).double()


class Nearest(torch.nn.Module):
    """The nearest nonnegative point, by CVXPY."""

    def __init__(self) -> None:
        super().__init__()
        x, c = cp.Variable(N), cp.Parameter(N)
        self.layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [x >= 0]), [c], [x])

    def forward(self, c: Tensor) -> Tensor:
        return self.layer(c)[0]


def projection_gradient(c: Tensor) -> Tensor:
    return positive(c) * WEIGHTS


def step_gradient(c: Tensor) -> Tensor:
    # The lower envelope of argmin cᵀx over the unit cube.
    return (positive(-c - TAU * WEIGHTS) - positive(-c)) / TAU


def direct_loss_gradient(c: Tensor) -> Tensor:
    # argmax <c, x> over binary x, less τ times the Hamming distance to the target; one weight, WEIGHTS[0].
    return WEIGHTS[0] * (positive(c) - positive(c - TAU * (1 - 2 * TARGET))) / TAU


def binary(c: Any, **_: Any) -> Any:
    return (c > 0) * 1.0


BY_TILT = lpgd.LPGD(tau=TAU, envelope="lower")
qp, lp, conic = lpgd.QPLayer(), lpgd.LPLayer(gradient=BY_TILT), lpgd.ConicLayer(lpgd.Cones(nonnegative=N))
node, blackbox = (
    lpgd.NodeLayer(lpgd.Node(lambda y, w: (y - w).square().sum())),
    lpgd.BlackboxLayer(lambda c: (c < 0) * 1.0, BY_TILT),
)
direct = lpgd.DirectLossLayer(
    binary,
    lambda x, *_: x,
    lambda x, t: abs(x - t).sum(),
    lambda c, step, target: binary(c - step * (1 - 2 * target)),
    lpgd.DirectLoss(TAU, envelope="lower"),
)
CASES: dict[str, tuple[Any, Any]] = {
    "CvxpyLayer": (Nearest(), projection_gradient),
    "QPLayer": (lambda c: qp(EYE, -c, lb=0.0).x, projection_gradient),
    "LPLayer": (lambda c: lp(c, lb=0.0, ub=1.0).x, step_gradient),
    "ConicLayer": (lambda c: conic(EYE, -c, -EYE, ZEROS).x, projection_gradient),
    "NodeLayer": (node, lambda c: WEIGHTS),
    "BlackboxLayer": (blackbox, step_gradient),
    "DirectLossLayer": (lambda c: direct(c, target=TARGET), direct_loss_gradient),
    "solve_qp": (lambda c: lpgd.solve_qp(EYE, -c, lb=0.0).x, projection_gradient),
}
