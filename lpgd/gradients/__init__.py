"""Gradient methods: how a loss gradient at the solution becomes one with respect to the data."""

from lpgd.gradients.base import GradientInfo, GradientMethod, check_compatible
from lpgd.gradients.direct_loss import DirectLoss
from lpgd.gradients.implicit import ImplicitKKT
from lpgd.gradients.lpgd import LPGD, BlackboxBackprop, Domke

__all__ = [
    "LPGD",
    "BlackboxBackprop",
    "DirectLoss",
    "Domke",
    "GradientInfo",
    "GradientMethod",
    "ImplicitKKT",
    "check_compatible",
]
