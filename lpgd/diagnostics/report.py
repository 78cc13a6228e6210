"""What is found of the gradient of a layer at one point, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lpgd.diagnostics.measurement import (
    Comparison,
    Measurement,
)
from lpgd.diagnostics.tables import (
    format_change,
    format_comparison,
    format_count,
    format_number,
    format_paragraph,
    format_seconds,
    format_share,
    format_table,
)
from lpgd.status import Status

__all__ = ["ParameterReport", "Report"]


@dataclass(frozen=True)
class ParameterReport:
    """The gradient of one parameter.

    Attributes:
        name: the parameter's name, its name in the call, or its position.
        shape: of its values (of a sparse one, those on its pattern).
        norm: Euclidean norm of the gradient.
        exact: against the exact gradient; None where there is none or it is what was asked for.
        differences: against finite differences of the loss along some directions: norms are those of the gradients'
            parts along these; None where the problem has no solution next to this point.
        decrease: largest part of the loss that a step of this parameter takes away (``Measurement.decreases``).
        is_zero: whether the gradient is zero, or so small that it can only be noise.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    exact: Comparison | None
    differences: Comparison | None
    decrease: float
    is_zero: bool


@dataclass(frozen=True, eq=False)
class Report:
    """What :func:`~lpgd.diagnostics.diagnose.diagnose` found; printed it is a table.

    Attributes:
        layer: the layer in words.
        solver: the solver's name.
        statuses: the status of each element.
        loss: the loss, summed.
        parameters: one report for each parameter.
        measurement: norm, noise, movement, active sets, fallbacks, step, time: see
            :class:`~lpgd.diagnostics.measurement.Measurement`.
        unit: (B,) the step at which the loss gradient is as large as the terms that it is added to; infinite where
            that gradient is zero.
        forward_seconds, exact_seconds: wall-clock time of the forward pass and of the exact gradient (None without).
        warnings: what the library warned of on the way.
        advice: one sentence.
    """

    layer: str
    solver: str
    statuses: tuple[Status, ...]
    loss: float
    parameters: tuple[ParameterReport, ...]
    measurement: Measurement
    unit: Tensor
    forward_seconds: float
    exact_seconds: float | None
    warnings: tuple[str, ...]
    advice: str = ""

    def __str__(self) -> str:
        found = self.measurement
        header = (
            "parameter",
            "shape",
            "norm",
            "cosine exact",
            "ratio",
            "cosine differences",
            "ratio",
            "loss after a step",
        )
        rows = [
            (
                one.name,
                "×".join(map(str, one.shape)) or "1",
                format_number(one.norm),
                *_cells(one.exact),
                *_cells(one.differences),
                format_change(-one.decrease),
            )
            for one in self.parameters
        ]
        lines = [f"{found.method} on {self.layer}", *format_table(header, rows)]
        facts = [("elements", _describe_statuses(self.statuses)), ("loss", format_number(self.loss, 5))]
        if found.tau is not None:
            facts.append(("tau", _describe_tau(found.tau, found.relative)))
        source = "measured" if found.noise_is_measured else "error of the solver over the step"
        facts.append(("noise of the solver", f"{format_number(found.noise, 2)} of the gradient ({source})"))
        if found.still is not None:
            facts.append(("elements that did not move", format_share(found.still)))
            facts.append(("active-set changes", f"{format_number(found.active_changes)} an element"))
        used = ", ".join(f"{name} {count}" for name, count in found.used.items())
        facts.append(("gradients from", f"{used} ({format_count(len(found.fallbacks), 'fallback')})"))
        exact = "" if self.exact_seconds is None else f", exact gradient {format_seconds(self.exact_seconds)}"
        times = f"forward {format_seconds(self.forward_seconds)}, backward {format_seconds(found.seconds)}{exact}"
        facts.append(("time", f"{times} ({self.solver})"))
        width = max(len(name) for name, _ in facts)
        lines += [f"  {name.ljust(width)}  {text}" for name, text in facts]
        lines += [line for text in self.warnings for line in format_paragraph(f"Warning: {text}", "  ")]
        return "\n".join([*lines, *format_paragraph(f"Advice: {self.advice}")])

    __repr__ = __str__


def _cells(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return "–", "–"
    return format_comparison(comparison.norm, comparison.cosine, comparison.ratio)


def _describe_statuses(statuses: Sequence[Status]) -> str:
    counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
    return ", ".join(f"{count} {status.name.lower().replace('_', ' ')}" for status, count in counts.items())


def _describe_tau(tau: Tensor, relative: float) -> str:
    taken = tau[~torch.isnan(tau)]
    if not taken.numel():
        return "none taken"
    low, high = float(taken.min()), float(taken.max())
    text = format_number(low) if low == high else f"{format_number(low)} to {format_number(high)}"
    return f"{text}, {format_number(relative, 2)} of the unit"
