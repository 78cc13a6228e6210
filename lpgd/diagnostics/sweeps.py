"""Which τ and ρ?  The same measurements for a grid of them, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lpgd.diagnostics.measurement import Comparison, Measurement, compare, measure, tighter
from lpgd.diagnostics.passes import Loss, Parameters, Pass
from lpgd.diagnostics.tables import (
    format_change,
    format_comparison,
    format_number,
    format_paragraph,
    format_share,
    format_table,
)
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.gradients.lpgd import LPGD
from lpgd.gradients.sides import Envelope
from lpgd.layers.base import BaseLayer

__all__ = ["Sweep", "SweepRow", "sweep"]


@dataclass(frozen=True, eq=False)
class SweepRow:
    """One τ and ρ.

    Attributes:
        tau, rho: τ and ρ.
        relative: τ over its unit (median of the elements).
        exact: all parameters together against the exact gradient; None where there is none.
        measurement: everything else.
    """

    tau: float
    rho: float
    relative: float
    exact: Comparison | None
    measurement: Measurement


@dataclass(frozen=True, eq=False)
class Sweep:
    """What :func:`sweep` found; printed it is a table.

    Attributes:
        envelope: ``"average"``, ``"lower"`` or ``"upper"``.
        unit: the median of the elements' units of τ.
        loss: the loss, summed, before any step.
        names: of the parameters.
        rows: one for each τ and ρ, τ increasing, for one ρ after the other.
    """

    envelope: Envelope
    unit: float
    loss: float
    names: tuple[str, ...]
    rows: tuple[SweepRow, ...]

    @property
    def best(self) -> SweepRow:
        """The row whose gradient step lowers the loss most; of those that are equal to rounding the first."""
        return max(self.rows, key=lambda row: float(f"{row.measurement.decrease:.6g}"))

    def __str__(self) -> str:
        header = ["tau", "tau / unit", "rho", "norm", "cosine exact", "ratio", "noise", "not moved", "active changes"]
        body = []
        for row in self.rows:
            found, exact = row.measurement, row.exact
            cells = [format_number(value) for value in (row.tau, row.relative, row.rho, found.norm)]
            cells += ["–", "–"] if exact is None else format_comparison(exact.norm, exact.cosine, exact.ratio)
            cells += [format_number(found.noise, 1), format_share(found.still), format_number(found.active_changes)]
            body.append(
                [*cells, str(len(found.fallbacks)), *(format_change(-decrease) for decrease in found.decreases)]
            )
        steps = [f"step of {name}" for name in self.names]
        lines = [
            f"LPGD, envelope {self.envelope}: loss {format_number(self.loss, 5)}, unit of tau "
            f"{format_number(self.unit)} (the last columns: what a gradient step of each parameter does to the loss)",
            *format_table([*header, "fallbacks", *steps], body),
        ]
        return "\n".join([*lines, *format_paragraph(f"Advice: {self.advice}")])

    __repr__ = __str__

    @property
    def advice(self) -> str:
        """One sentence."""
        best = self.best
        if best.measurement.decrease <= 0:
            return "no step along any of these gradients lowers the loss: try larger tau, or rho > 0."
        return (
            f"tau = {format_number(best.tau)} with rho = {format_number(best.rho)} takes most of the loss away in one "
            f"step of a parameter ({format_share(best.measurement.decrease)} in the mean); it is good for this scale "
            "of the loss and these data only: a mean over a larger batch needs a larger tau."
        )


def sweep(
    layer: BaseLayer,
    parameters: Parameters,
    loss: Loss,
    taus: Sequence[float] | None = None,
    rhos: Sequence[float] = (0.0,),
    envelope: Envelope | None = None,
) -> Sweep:
    """Measure LPGD's gradient for a grid of τ and ρ at these parameters.

    Args:
        layer, parameters, loss: as for :func:`lpgd.diagnose`.
        taus: steps; None is their unit (the step at which the loss gradient is as large as the terms of the problem
            that it is added to) times 10⁻³ to 10, two for each power of ten.
        rhos: values of ρ.
        envelope: None is that of the layer's own method, or ``"average"``.

    Returns:
        A :class:`Sweep`; ``print`` shows it as a table, ``lpgd.plotting.plot_sweep`` draws it.

    Raises:
        ValueError: a τ or ρ is out of its range, the loss gradient is zero everywhere, or an oracle takes no quadratic
            term (ρ > 0).
    """
    chosen: Envelope = envelope or getattr(layer.gradient, "envelope", "average")
    run = Pass(layer, parameters, loss)
    units = run.unit[torch.isfinite(run.unit)]
    if not units.numel():
        raise ValueError(
            "the gradient of the loss at the solution is zero for every element: there is no step to choose."
        )
    unit = float(units.median())
    if taus is None:
        taus = [float(f"{unit * 10 ** (power / 2):.2g}") for power in range(-6, 3)]
    tight = tighter(layer, parameters, loss, run)
    exact = run.backward(ImplicitKKT()).gradients if run.problem.traits.has_kkt else None
    negligible = 1e-8 * sum(run.natural_size(leaf) for leaf in run.leaves)
    rows = []
    for rho in rhos:
        for tau in sorted(taus):
            found = measure(run, tight, LPGD(tau, rho, chosen))
            against = None if exact is None else compare(found.gradients, exact, negligible)
            rows.append(SweepRow(tau, rho, tau / unit, against, found))
    return Sweep(chosen, unit, float(run.losses.sum()), tuple(leaf.name for leaf in run.leaves), tuple(rows))
