"""What one gradient method does at one point: size, noise, elements that do not move, and whether its step helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lpgd.diagnostics.passes import Backward, Loss, Parameters, Pass, inner
from lpgd.gradients.base import GradientMethod
from lpgd.layers.base import BaseLayer
from lpgd.problems.conic.structure import ConicStructure
from lpgd.status import SolverError

__all__ = [
    "STEP_LENGTHS",
    "Comparison",
    "Measurement",
    "compare",
    "measure",
    "solver_error",
    "tighter",
]

STEP_LENGTHS = (1e-3, 1e-2, 1e-1, 0.3, 1.0)
"""Gradient steps that are tried, relative to the norm of each parameter."""

NEGLIGIBLE = 1e-3
"""A gradient below this part of its natural size is zero or noise: no step along it."""


@dataclass(frozen=True)
class Comparison:
    """A gradient against a reference.

    Attributes:
        norm: Euclidean norm of the reference.
        cosine: of the angle between the two; NaN where either is zero.
        ratio: the gradient's norm over the reference's; NaN where the reference is zero.
    """

    norm: float
    cosine: float
    ratio: float

    @property
    def is_zero(self) -> bool:
        """Whether the reference is zero."""
        return self.norm == 0.0


def compare(gradient: Sequence[Tensor], reference: Sequence[Tensor], negligible: float = 0.0) -> Comparison:
    """A gradient against a reference, whose norm counts as zero up to ``negligible``."""
    norms = [float(inner(tensors, tensors)) ** 0.5 for tensors in (gradient, reference)]
    if norms[1] <= negligible:
        return Comparison(0.0, math.nan, math.nan)
    if norms[0] <= negligible:
        return Comparison(norms[1], math.nan, 0.0)
    return Comparison(norms[1], float(inner(gradient, reference)) / (norms[0] * norms[1]), norms[0] / norms[1])


@dataclass(frozen=True, eq=False)
class Measurement:
    """One gradient method at one point.

    Attributes:
        method: the method.
        gradients: one for each parameter.
        norm: their Euclidean norm together.
        tau: (B,) steps, NaN where none was taken; None for methods without.
        relative: the median of τ over its unit (see :class:`lpgd.gradients.GradientInfo`); NaN without.
        noise: what the solver's tolerance changes in the gradient, relative to its norm: measured against a solve with
            a hundredth of the tolerance, or ``ε unit / τ``, with ε the solver's error, where it goes no finer.
        noise_is_measured: which of the two.
        still: share of the elements whose perturbed solutions did not move by more than the solver's error, among
            those with a loss gradient (of more than 10⁻⁶ of the largest); None for methods that solve nothing.
        active_changes: constraints (and bounds) that become active or inactive between the solution and a perturbed
            one, mean over elements and sides; for problems given by an oracle, entries of the solution that change;
            None for methods that solve nothing.
        used: how many elements' gradients come from what (``GradientInfo.counts``).
        fallbacks: elements whose gradient does not come from what the method asks for.
        decreases: for each parameter, the largest part of the loss that a step of it along its negative gradient takes
            away, 0.1 % to 100 % of its norm long; negative where every step makes the loss larger, 0 for no gradient.
        seconds: wall-clock time of the backward pass.
        warnings: what the library warned of in it.
    """

    method: GradientMethod
    gradients: tuple[Tensor, ...]
    norm: float
    tau: Tensor | None
    relative: float
    noise: float
    noise_is_measured: bool
    still: float | None
    active_changes: float | None
    used: dict[str, int]
    fallbacks: tuple[int, ...]
    decreases: tuple[float, ...]
    seconds: float
    warnings: tuple[str, ...]

    @property
    def decrease(self) -> float:
        """The mean of :attr:`decreases`."""
        return sum(self.decreases) / len(self.decreases)


def measure(run: Pass, tight: Pass | None, method: GradientMethod) -> Measurement:
    """Take a gradient of a pass by a method, and what is to be known about it.

    Args:
        run: the pass.
        tight: the same with a finer solver (:func:`tighter`), or None.
        method: the method.
    """
    backward = run.backward(method)
    info, norm = backward.info, backward.norm
    stepped = None if info.tau is None else ~torch.isnan(info.tau) & run.concerned.cpu()
    still = changes = None
    relative = math.nan
    if info.tau is not None and info.unit is not None and info.moved is not None and stepped is not None:
        any_stepped = bool(stepped.any())
        relative = float((info.tau / info.unit)[stepped].median()) if any_stepped else math.nan
        still = float((~info.moved[stepped]).double().mean()) if any_stepped else 0.0
        changes = _active_changes(run, backward, info.tau, stepped) if any_stepped else 0.0
    if tight is not None:
        finer = tight.backward(method).gradients
        difference = [a - b for a, b in zip(backward.gradients, finer, strict=True)]
        scale = max(norm, float(inner(finer, finer)) ** 0.5)
        noise = float(inner(difference, difference)) ** 0.5 / scale if scale else 0.0
    else:
        noise = solver_error(run) / (1.0 if math.isnan(relative) else relative)
    return Measurement(
        method,
        backward.gradients,
        norm,
        info.tau,
        relative,
        noise,
        tight is not None,
        still,
        changes,
        info.counts,
        tuple(info.fallbacks),
        tuple(_decrease(run, position, gradient) for position, gradient in enumerate(backward.gradients)),
        backward.seconds,
        backward.warnings,
    )


def solver_error(run: Pass) -> float:
    """The typical relative error of the solutions of a pass."""
    return float(run.solver.solution_error(run.problem))


def tighter(layer: BaseLayer, parameters: Parameters, loss: Loss, run: Pass) -> Pass | None:
    """The pass again with a hundredth of the solver's tolerance; None where the solver goes no finer."""
    solver = run.solver.with_tolerance(0.01 * run.solver.tolerance)
    if not solver.tolerance < 0.5 * run.solver.tolerance:
        return None
    return Pass(layer, parameters, loss, solver=solver)


def _decrease(run: Pass, position: int, gradient: Tensor) -> float:
    values = [leaf.values.detach() for leaf in run.leaves]
    original, norm = values[position], float(gradient.norm())
    if not NEGLIGIBLE * run.natural_size(run.leaves[position]) < norm < math.inf:
        return 0.0
    step = gradient * ((float(original.norm()) or 1.0) / norm)
    before, best = float(run.losses.sum()), -math.inf
    for length in STEP_LENGTHS:
        values[position] = original - length * step
        try:
            best = max(best, before - float(run.losses_at(values).sum()))
        except SolverError:  # a step too far: there is no solution there
            continue
    return best / abs(before) if before else 0.0


def _active_changes(run: Pass, backward: Backward, tau: Tensor, stepped: Tensor) -> float:
    method, before = backward.info.method, _active(run.solution)
    steps = torch.where(stepped, tau, 1.0).to(run.solution.x)
    signs = {"lower": (1.0,), "upper": (-1.0,)}.get(getattr(method, "envelope", "average"), (1.0, -1.0))
    counts = []
    for sign in signs:
        found = run.perturbed(steps, getattr(method, "rho", 0.0), sign, backward.info.tolerance)
        chosen = found.usable & stepped.to(found.usable.device)
        counts.append(_differs(before, _active(found)).sum(-1)[chosen].double())
    together = torch.cat(counts)
    return float(together.mean()) if together.numel() else 0.0


def _active(solution: Any) -> Tensor:
    """(B, k) which inequality rows and bounds are active; the solution itself where there are no constraints to see.

    A row is active where its multiplier is larger than its slack, which at a solution is where the projection of their
    difference says so.
    """
    problem = solution.problem
    structure = getattr(problem, "structure", None)
    if not isinstance(structure, ConicStructure):
        return solution.x
    nonnegative = structure.cones.sections["nonnegative"]
    lower, upper = problem.full_bounds()
    return torch.cat(
        [
            solution.y[:, nonnegative] > solution.s[:, nonnegative],
            solution.z > upper - solution.x,
            -solution.z > solution.x - lower,
        ],
        dim=1,
    )


def _differs(before: Tensor, after: Tensor) -> Tensor:
    return before ^ after if before.dtype is torch.bool else (before - after).abs() > 1e-9 * (1 + before.abs())
