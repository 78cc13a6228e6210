"""How good is the gradient of a layer at this point?  One report, with advice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lpgd.diagnostics.advice import advise
from lpgd.diagnostics.measurement import (
    NEGLIGIBLE,
    Comparison,
    Measurement,
    compare,
    measure,
    solver_error,
    tighter,
)
from lpgd.diagnostics.passes import Loss, Parameters, Pass
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
from lpgd.gradients.base import GradientMethod
from lpgd.gradients.implicit import ImplicitKKT
from lpgd.status import SolverError, Status

__all__ = ["ParameterReport", "Report", "diagnose"]


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
    """What :func:`diagnose` found; printed it is a table.

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


def diagnose(
    layer: Any,
    parameters: Parameters,
    loss: Loss,
    gradient: GradientMethod | None = None,
    *,
    directions: int = 8,
    seed: int = 0,
) -> Report:
    """Measure how good the gradient of a loss of a layer's solution is, at these parameters.

    Args:
        layer: any layer of this library; it is not changed.
        parameters: the arguments of its call: a list, or a dictionary by name.  Those tensors that require a gradient
            are looked at, or all of them where none does; floating-point tensors are taken in float64.
        loss: from the layer's output to one number, or to one for each element of the batch; called with float64.
        gradient: the gradient method; None is the layer's own.
        directions: how many directions of each parameter finite differences are taken along: its entries where there
            are no more of them than that, else random orthonormal directions.  Each costs two forward passes; 0 takes
            none.  Cosine and ratio are then those of the parts of both gradients in these directions.
        seed: of the directions.

    Returns:
        A :class:`Report`; ``print`` shows it as a table with one sentence of advice.

    Raises:
        TypeError, ValueError: the layer is not one of this library, or the loss does not depend on its output.
        SolverError: an element has no solution (``on_error="raise"``).
    """
    run = Pass(layer, parameters, loss)
    method = layer.gradient if gradient is None else gradient
    found = measure(run, tighter(layer, parameters, loss, run), method)
    exact = None
    if type(run.problem).has_kkt and method != ImplicitKKT():
        exact = run.backward(ImplicitKKT())
    numeric = _Differences(layer, parameters, loss, run, directions, seed) if directions else None
    reports = []
    for position, leaf in enumerate(run.leaves):
        part = found.gradients[position]
        natural = run.natural_size(leaf)
        against = None if exact is None else compare([part], [exact.gradients[position]], 1e-8 * natural)
        norm = float(part.norm())
        reports.append(
            ParameterReport(
                leaf.name,
                tuple(leaf.values.shape),
                norm,
                against,
                None if numeric is None else numeric.compare(position, part, natural),
                found.decreases[position],
                norm <= NEGLIGIBLE * natural,
            )
        )
    texts = dict.fromkeys((*run.warnings, *found.warnings, *(exact.warnings if exact and exact.info.fallbacks else ())))
    report = Report(
        type(layer).__name__,
        run.solver.name,
        tuple(run.solution.statuses),
        float(run.losses.sum()),
        tuple(reports),
        found,
        run.unit,
        run.forward_seconds,
        None if exact is None else exact.seconds,
        tuple(texts),
    )
    return replace(report, advice=advise(report))


class _Differences:
    """Central differences of the loss along orthonormal directions of one parameter at a time.

    The forward solves are as fine as the solver goes; the step is √ε of the parameter's size, ε their error.
    """

    def __init__(self, layer: Any, parameters: Parameters, loss: Loss, run: Pass, count: int, seed: int) -> None:
        finest = replace(run.solver, tolerance=min(run.solver.tolerance, run.solver.finest_tolerance))
        self.run = Pass(layer, parameters, loss, solver=finest) if finest != run.solver else run
        self.relative = min(max(solver_error(self.run) ** 0.5, 1e-7), 1e-3)
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def compare(self, position: int, gradient: Tensor, natural: float) -> Comparison | None:
        values = [leaf.values.detach() for leaf in self.run.leaves]
        own = values[position]
        basis = self._basis(own.numel()).to(own)
        step = self.relative * (float(own.abs().max()) or 1.0)
        slopes = []
        try:
            for direction in basis:
                # The largest entry moves by `step`.
                length = step / float(direction.abs().max())
                ends = []
                for sign in (1.0, -1.0):
                    values[position] = own + sign * length * direction.reshape(own.shape)
                    ends.append(float(self.run.losses_at(values).sum()))
                slopes.append((ends[0] - ends[1]) / (2 * length))
        except SolverError:  # next to this point the problem has no solution: there is no derivative to take
            return None
        numeric = own.new_tensor(slopes)
        return compare([basis @ gradient.flatten()], [numeric], 10 * self.relative * natural)

    def _basis(self, size: int) -> Tensor:
        """(k, size) orthonormal rows."""
        if size <= self.count:
            return torch.eye(size, dtype=torch.float64)
        random = torch.randn(size, self.count, dtype=torch.float64, generator=self.generator)
        return torch.linalg.qr(random).Q.T


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
