"""Gradient methods: how a loss gradient at the solution becomes one with respect to the data."""

from lpgd.gradients.approximate import IgnoreConstraints
from lpgd.gradients.base import GradientInfo, GradientMethod, check_compatible
from lpgd.gradients.closed_form import ClosedForm
from lpgd.gradients.direct_loss import DirectLoss
from lpgd.gradients.implicit import ImplicitKKT
from lpgd.gradients.lpgd import LPGD, BlackboxBackprop, Domke

__all__ = [
    "LPGD",
    "BlackboxBackprop",
    "ClosedForm",
    "DirectLoss",
    "Domke",
    "GradientInfo",
    "GradientMethod",
    "IgnoreConstraints",
    "ImplicitKKT",
    "check_compatible",
]
