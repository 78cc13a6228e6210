"""How good is a layer's gradient, which τ and ρ, and is a derivative right: measured, with advice."""

from lpgd.diagnostics.checks import GradientCheck, GradientCheckError, gradcheck
from lpgd.diagnostics.diagnose import diagnose
from lpgd.diagnostics.ignored_constraints import IgnoredConstraints, ignored_constraints
from lpgd.diagnostics.measurement import Comparison, Measurement
from lpgd.diagnostics.moreau import Envelopes, envelopes
from lpgd.diagnostics.report import ParameterReport, Report
from lpgd.diagnostics.sweeps import Sweep, SweepRow, sweep

__all__ = [
    "Comparison",
    "Envelopes",
    "GradientCheck",
    "GradientCheckError",
    "IgnoredConstraints",
    "Measurement",
    "ParameterReport",
    "Report",
    "Sweep",
    "SweepRow",
    "diagnose",
    "envelopes",
    "gradcheck",
    "ignored_constraints",
    "sweep",
]
