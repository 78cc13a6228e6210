"""Gradient methods: how a loss gradient at the solution becomes one with respect to the data."""

from lpgd.gradients.base import GradientInfo, GradientMethod, check_compatible
from lpgd.gradients.closed_form import ClosedForm
from lpgd.gradients.ignore_constraints import IgnoreConstraints
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.gradients.losses import Loss, QuadraticLoss
from lpgd.gradients.lpgd import LPGD
from lpgd.gradients.mirror_descent import LagrangianMirrorDescent
from lpgd.gradients.named import BlackboxBackprop, DirectLoss, Domke

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
    "LagrangianMirrorDescent",
    "Loss",
    "QuadraticLoss",
    "check_compatible",
]
