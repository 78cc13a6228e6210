"""The one sentence at the end of a report: the first thing that a user should change, or that nothing need be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lpgd.diagnostics.tables import format_count, format_number, format_share
from lpgd.gradients.implicit.method import ImplicitKKT

if TYPE_CHECKING:
    from lpgd.diagnostics.report import Report

__all__ = ["advise"]

NOISE, STILL, ALIKE = 0.05, 0.5, 0.95


def advise(report: Report) -> str:
    """One sentence: failures first, then zero gradients, fallbacks, elements that do not move, noise, direction."""
    found = report.measurement
    finite = report.unit[torch.isfinite(report.unit)]
    unit = format_number(float(finite.median()), 2) if finite.numel() else "1"
    failed = [status for status in report.statuses if not status.usable]
    if failed:
        return (
            f"{format_count(len(failed), 'element')} of {len(report.statuses)} have no solution and teach nothing: "
            f"{failed[0].advice}."
        )
    if not finite.numel():
        return "the gradient of the loss at the solution is zero for every element: nothing is left to learn here."
    if found.fallbacks and found.still is not None:
        return (
            f"{format_count(len(found.fallbacks), 'element')} of {len(report.statuses)} had no perturbed solution on a "
            "side that was asked for: a smaller tau may have both."
        )
    zero = ", ".join(one.name for one in report.parameters if one.is_zero)
    if zero and isinstance(found.method, ImplicitKKT):
        return (
            f"the exact gradient of {zero} is zero, since the solution does not move with small changes: "
            f"lpgd.LPGD(tau) with tau of the order of {unit} sees further."
        )
    if zero and found.still == 1.0:
        return f"no perturbed solution moved, so the gradient of {zero} is zero: raise tau towards {unit}."
    if found.noise > NOISE:
        remedy = "raise tau" if found.tau is not None else "use lpgd.LPGD with a finite tau"
        return (
            f"the solver's tolerance puts {format_share(found.noise)} of noise into the gradient: lower the tolerance "
            f"of {report.solver}, or {remedy}."
        )
    if found.still is not None and found.still > STILL:
        return (
            f"the perturbed solutions of {format_share(found.still)} of the elements did not move, which teach nothing "
            f"about their costs: raise tau towards {unit}."
        )
    unlike = [one for one in report.parameters if one.exact is not None and one.exact.cosine < ALIKE]
    kinked = [
        one
        for one in report.parameters
        if isinstance(found.method, ImplicitKKT)
        and found.method.rho == 0
        and one.differences is not None
        and (one.differences.cosine < ALIKE or (one.differences.is_zero and not one.is_zero))
    ]
    if kinked or (found.fallbacks and found.still is None):
        name = kinked[0].name if kinked else report.parameters[0].name
        return (
            f"the exact gradient of {name} is not what finite differences give, or not unique: the solution is "
            "degenerate, not unique or at a kink, and lpgd.LPGD with a finite tau is well defined there."
        )
    if found.decrease <= 0:
        return "no step along the negative gradient lowers the loss: lpgd.sweep compares other values of tau and rho."
    references = [(one, one.exact or one.differences) for one in report.parameters]
    further = [one for one, known in references if known is not None and known.is_zero and not one.is_zero]
    if further:
        return (
            f"the exact gradient of {', '.join(one.name for one in further)} is zero, and this one sees further: a "
            f"step of {further[0].name} takes {format_share(further[0].decrease)} of the loss away; lpgd.sweep "
            "compares other values of tau and rho."
        )
    worst = unlike[0] if unlike else None
    if worst is not None and worst.exact is not None and not math.isnan(found.relative):
        return (
            f"the gradient of {worst.name} is at cosine {worst.exact.cosine:.2f} to the exact one: the step is "
            "far from infinitesimal, as it may be on purpose; a smaller tau comes closer."
        )
    return (
        f"the gradient is sound: a step of a parameter takes {format_share(found.decrease)} of the loss away, in the "
        "mean over parameters."
    )
