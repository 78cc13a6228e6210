"""How good is the gradient of a layer at this point?  One report, with advice."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.diagnostics.advice import advise
from lpgd.diagnostics.measurement import (
    NEGLIGIBLE,
    Comparison,
    compare,
    measure,
    solver_error,
    tighter,
)
from lpgd.diagnostics.passes import Loss, Parameters, Pass
from lpgd.diagnostics.report import ParameterReport, Report
from lpgd.gradients.base import GradientMethod
from lpgd.gradients.implicit.method import ImplicitKKT
from lpgd.layers.base import BaseLayer
from lpgd.status import SolverError

__all__ = ["diagnose"]


def diagnose(
    layer: BaseLayer,
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
    if run.problem.traits.has_kkt and method != ImplicitKKT():
        exact = run.backward(ImplicitKKT())
    numeric = _Differences(layer, parameters, loss, run, directions, seed) if directions else None
    reports = []
    for position, leaf in enumerate(run.leaves):
        leaf_gradient = found.gradients[position]
        natural = run.natural_size(leaf)
        against = None if exact is None else compare([leaf_gradient], [exact.gradients[position]], 1e-8 * natural)
        norm = float(leaf_gradient.norm())
        reports.append(
            ParameterReport(
                leaf.name,
                tuple(leaf.values.shape),
                norm,
                against,
                None if numeric is None else numeric.compare(position, leaf_gradient, natural),
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

    def __init__(self, layer: BaseLayer, parameters: Parameters, loss: Loss, run: Pass, count: int, seed: int) -> None:
        finest = run.solver.with_tolerance(0.0)
        self.run = Pass(layer, parameters, loss, solver=finest) if finest != run.solver else run
        self.relative = min(max(solver_error(self.run) ** 0.5, 1e-7), 1e-3)
        self.count, self.generator = count, torch.Generator().manual_seed(seed)

    def compare(self, position: int, gradient: Tensor, natural: float) -> Comparison | None:
        values = [leaf.values.detach() for leaf in self.run.leaves]
        original = values[position]
        basis = self._basis(original.numel()).to(original)
        step = self.relative * (float(original.abs().max()) or 1.0)
        slopes = []
        try:
            for direction in basis:
                # The largest entry moves by `step`.
                length = step / float(direction.abs().max())
                ends = []
                for sign in (1.0, -1.0):
                    values[position] = original + sign * length * direction.reshape(original.shape)
                    ends.append(float(self.run.losses_at(values).sum()))
                slopes.append((ends[0] - ends[1]) / (2 * length))
        except SolverError:  # next to this point the problem has no solution: there is no derivative to take
            return None
        numeric = original.new_tensor(slopes)
        return compare([basis @ gradient.flatten()], [numeric], 10 * self.relative * natural)

    def _basis(self, size: int) -> Tensor:
        """(k, size) orthonormal rows."""
        if size <= self.count:
            return torch.eye(size, dtype=torch.float64)
        random = torch.randn(size, self.count, dtype=torch.float64, generator=self.generator)
        return linalg.qr(random).Q.T
