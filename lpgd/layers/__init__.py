"""Layers: the user's parameters become problem data, and solutions become the user's variables."""

from lpgd.layers.base import LayerOutput
from lpgd.layers.blackbox import BlackboxLayer
from lpgd.layers.conic import ConicLayer, ConicOutput, solve_conic
from lpgd.layers.cvxpy.layer import CvxpyLayer
from lpgd.layers.cvxpy.loss import CvxpyLoss
from lpgd.layers.direct_loss import DirectLossLayer
from lpgd.layers.node import NodeLayer
from lpgd.layers.program import ProgramOutput
from lpgd.layers.qp import LPLayer, QPLayer, solve_lp, solve_qp

__all__ = [
    "BlackboxLayer",
    "ConicLayer",
    "ConicOutput",
    "CvxpyLayer",
    "CvxpyLoss",
    "DirectLossLayer",
    "LPLayer",
    "LayerOutput",
    "NodeLayer",
    "ProgramOutput",
    "QPLayer",
    "solve_conic",
    "solve_lp",
    "solve_qp",
]
