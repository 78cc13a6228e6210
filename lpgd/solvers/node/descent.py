"""Minimisers of batches of smooth functions without constraints: Newton's method, and L-BFGS where n is large.

Each element converges, or fails, alone: those that have ended leave the batch.  Both descend by a line search, so that
they end in local minima, and then go on until the gradient is as small as the dtype allows.  A stationary point that is
none, where a start often is by symmetry (zero), is left along its negative curvature.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import rows_where
from lpgd.execution.deadline import is_over
from lpgd.solvers.node.augmented_lagrangian import AugmentedLagrangian
from lpgd.status import Status

__all__ = ["Descent", "Run", "lbfgs", "newton", "outcome"]

MEMORY = 20
"""Pairs of steps and gradient changes that L-BFGS keeps."""
PATIENCE = 10
"""Iterations without a smaller gradient after which L-BFGS ends, at the precision of values."""
UNBOUNDED = 1e15
"""Points, or falls of the objective, of this size count as unbounded."""


class Descent(NamedTuple):
    """The result of a descent.

    Attributes:
        x: (B, n) the last points.
        status: (B,) values of Status.
        iterations: (B,).
    """

    x: Tensor
    status: Tensor
    iterations: Tensor


class Run:
    """A run over a batch whose elements end one by one."""

    def __init__(self, function: AugmentedLagrangian, x: Tensor, tolerance: float) -> None:
        self.whole, self.function, self.tolerance = x.clone(), function, tolerance
        self.elements = torch.arange(x.shape[0], device=x.device)
        self.status = torch.full(x.shape[:1], int(Status.ITERATION_LIMIT), device=x.device)
        self.iterations = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        self.x = x.clone()
        self.value, self.slope = function.value(x), function.gradient(x)
        self.best = torch.full_like(self.value, torch.inf)
        self.first = self.value

    def end(self, ended: Tensor, status: Tensor) -> Tensor:
        """Write the elements that have ended, and drop them; what is left of the batch, as a mask."""
        ended_elements = self.elements[ended]
        self.whole[ended_elements], self.status[ended_elements] = self.x[ended], status[ended]
        left = ~ended
        if ended.any():
            for name in ("elements", "x", "value", "slope", "best", "first"):
                setattr(self, name, getattr(self, name)[left])
            self.function = self.function.select(rows_where(left))
        return left

    def is_far(self) -> Tensor:
        """(B,) points, or falls of the objective, that count as unbounded."""
        return (self.x.abs().amax(-1) > UNBOUNDED) | (self.value < -UNBOUNDED * (1 + self.first.abs()))

    def leave_saddles(self, direction: Tensor, curvature: Tensor) -> Tensor:
        """Step to lower values along negative curvature; which elements moved.

        Args:
            direction: (B, n), of length 1.
            curvature: (B,) that along it; elements with 0 stay.
        """
        pending, moved = curvature < 0, torch.zeros_like(curvature, dtype=torch.bool)
        if not pending.any():
            return moved
        fall = (direction * self.slope).sum(-1)
        largest = direction.gather(-1, direction.abs().argmax(-1, keepdim=True))[:, 0]
        side = torch.where(fall != 0, -fall, largest)  # where both are downhill: the largest entry grows
        direction = torch.where(side < 0, -1.0, 1.0).to(direction.dtype)[:, None] * direction
        step = 1 + self.x.abs().amax(-1)
        new = self.x
        for _ in range(40):
            if not pending.any():
                break
            trial = self.x + step[:, None] * direction
            value = self.function.value(trial)
            good = pending & (value <= self.value + 0.1 * curvature * step.square()) & (value < self.value)
            new = torch.where(good[:, None], trial, new)
            pending, moved = pending & ~good, moved | good
            step = torch.where(pending, 0.5 * step, step)
        if moved.any():
            self.x, self.value, self.slope = new, self.function.value(new), self.function.gradient(new)
        return moved

    def leave_symmetry(self) -> None:
        """Step off a start without any slope, where there is negative curvature along a direction like any other."""
        flat = (self.slope == 0).all(-1)
        if not flat.any():
            return
        pattern = torch.arange(1, self.x.shape[-1] + 1, dtype=torch.float64, device=self.x.device)
        direction = ((pattern.square() * math.sqrt(2)).frac() - 0.5).to(self.x.dtype)
        direction = (direction / direction.norm()).expand_as(self.x)
        curve = (torch.func.vjp(self.function.gradient, self.x)[1](direction)[0] * direction).sum(-1)
        self.leave_saddles(direction, torch.where(flat & (curve < 0), curve, 0))

    def stretch(self, direction: Tensor, hessian: Tensor) -> None:
        """Step on, further and further, where the last step was along a straight line down: its end is far, if any.

        Args:
            direction: (B, n) of the last step.
            hessian: (B, n, n) where it began.
        """
        fall = (direction * self.slope).sum(-1)
        bend = (direction * linalg.matvec(hessian, direction)).sum(-1)
        going = (fall < 0) & (bend.abs() <= torch.finfo(fall.dtype).eps ** 0.5 * fall.abs())
        if not going.any():
            return
        step, x, last = torch.ones_like(fall), self.x, self.value
        for _ in range(60):
            trial = self.x + step[:, None] * direction
            value = self.function.value(trial)
            going = going & (value <= last + 0.25 * step * fall) & (last > -UNBOUNDED * (1 + self.first.abs()))
            if not going.any():
                break
            x, last = torch.where(going[:, None], trial, x), torch.where(going, value, last)
            step = 2 * step
        self.x, self.value, self.slope = x, self.function.value(x), self.function.gradient(x)

    def search(self, direction: Tensor, quick: bool = True) -> tuple[Tensor, Tensor]:
        """Step along a direction of descent.

        Args:
            direction: (B, n).
            quick: the method converges so fast that a gradient which has not halved, at the end of precision, ends it.

        Returns:
            Which elements are at their end, and which are at the precision of their values.
        """
        eps = torch.finfo(self.x.dtype).eps
        fall = (direction * self.slope).sum(-1)
        noise = 10 * eps * self.value.abs()
        tiny = direction.abs().amax(-1) <= 10 * eps * self.x.abs().amax(-1)
        precise = (fall.abs() <= noise) | tiny  # values cannot tell any more
        step = torch.ones_like(self.value)
        pending = ~precise & (fall < 0)
        new, value = self.x + direction, self.value
        for _ in range(60):
            value = self.function.value(new)
            # Written so that NaN is refused; values at the edge of a domain are.
            pending = pending & ~(value <= self.value + 1e-4 * step * fall)
            if not pending.any():
                break
            step = torch.where(pending, 0.5 * step, step)
            new = self.x + step[:, None] * direction
        slope = self.function.gradient(new)
        size, old = slope.abs().amax(-1), self.slope.abs().amax(-1)
        better = torch.isfinite(value) & torch.where(precise, size < old, ~pending & (fall < 0))
        ended = torch.where(precise, ~(size <= 0.5 * old), ~better) if quick else ~better
        self.x = torch.where(better[:, None], new, self.x)
        self.value = torch.where(better, value, self.value)
        self.slope = torch.where(better[:, None], slope, self.slope)
        return ended, precise


def newton(function: AugmentedLagrangian, x: Tensor, tolerance: float = 0.0, max_iterations: int = 200) -> Descent:
    """Newton's method with a line search; negative curvature is turned around, flat directions are damped.

    Args:
        function: of B elements.
        x: (B, n) where it starts.
        tolerance: ends at gradients (in the maximum norm) of this size relative to ``|H x|`` and the first gradient; 0
            is as far as the dtype goes.
        max_iterations: of one element.
    """
    run = Run(function, x, tolerance)
    scale = run.slope.abs().amax(-1) if x.shape[-1] else run.value
    for _ in range(max_iterations):
        if not len(run.elements) or is_over():
            break
        size = run.slope.abs().amax(-1) if x.shape[-1] else torch.zeros_like(run.value)
        bad = ~(torch.isfinite(run.value) & torch.isfinite(size))
        hessian = run.function.hessian(run.x)
        bad = bad | ~torch.isfinite(hessian).all(-1).all(-1)
        if bad.any():
            hessian = torch.where(bad[:, None, None], 0, hessian)
        direction, curved, lowest, curvature = _newton_direction(hessian, run.slope, _size(run.x))
        scale = torch.maximum(scale, (hessian @ run.x[..., None]).abs().sum(-1).amax(-1))
        eps = torch.finfo(x.dtype).eps
        moved = run.leave_saddles(lowest, torch.where(~bad & (size <= eps**0.5 * scale), curvature, 0))
        run.iterations[run.elements] += moved
        left = run.end(bad | ((size <= tolerance * scale) & ~moved), outcome(bad, Status.NUMERICAL_ERROR))
        scale = scale[left]
        if moved.any():
            continue
        if not len(run.elements):
            break
        direction, curved, hessian = direction[left], curved[left], hessian[left]
        run.iterations[run.elements] += 1
        ended, precise = run.search(direction)
        if not curved.all():
            run.stretch(direction, torch.where((curved | ended)[:, None, None], torch.inf, hessian))
        far = run.is_far()
        # A run that ends where values could still tell, with a large step left, has lost its way.
        long = direction.abs().amax(-1) > eps**0.25 * (1 + run.x.abs().amax(-1))
        lost = ended & ~precise & (long | ~curved) & (run.slope.abs().amax(-1) > eps**0.5 * scale)
        status = torch.where(far, int(Status.UNBOUNDED), outcome(lost, Status.NUMERICAL_ERROR))
        left = run.end(ended | far, status)
        scale = scale[left]
    run.end(torch.zeros_like(run.value, dtype=torch.bool), run.status[run.elements])
    run.whole[run.elements] = run.x
    return Descent(run.whole, run.status, run.iterations)


def outcome(mask: Tensor, status: Status) -> Tensor:
    """(B,) values of Status: this one where the mask is, else SOLVED."""
    return torch.where(mask, int(status), int(Status.SOLVED))


def _size(x: Tensor) -> Tensor:
    """(B,) the largest entry, or 1 where there is none."""
    size = x.abs().amax(-1)
    return torch.where(size > 0, size, 1)


def _newton_direction(hessian: Tensor, slope: Tensor, reach: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A direction of descent, (B, n), and (B,) where the Hessian is positive definite.

    Where it is not even semidefinite: also the direction of its most negative curvature (B, n), and that (B,), else 0.

    Flat and negative directions are damped by ``|∇f| / reach``.  A function of the direction of x alone has, along x
    itself, a curvature of -γ²/s beside γ = |∇f| and s across it: turned around, it would ask for a step of the length
    of x towards zero, however near the minimum is.  So damped it asks for γ/s of that, and convergence stays quadratic.

    Args:
        hessian, slope: (B, n, n) and (B, n).
        reach: (B,) the size of x.
    """
    # Equilibrated: near the end of a domain, as of logarithms, curvatures differ by many orders of magnitude, and a
    # direction with little of it must not be damped by that of another.
    weight = hessian.abs().amax(-1)
    weight = torch.where(weight > 0, weight, 1).rsqrt()
    hessian = weight[..., :, None] * hessian * weight[..., None, :]
    slope = weight * slope
    factor, failed = linalg.cholesky_ex(hessian)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    eps = torch.finfo(slope.dtype).eps
    curved = (failed == 0) & (pivots.amin(-1) > 10 * eps**0.5 * pivots.amax(-1))
    unit = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    safe = torch.where(curved[:, None, None], factor, unit)
    direction = -torch.cholesky_solve(slope[..., None], safe)[..., 0]
    indefinite = rows_where(~curved)
    lowest, curvature = torch.zeros_like(slope), torch.zeros_like(slope[:, 0])
    if len(indefinite):
        values, vectors = linalg.eigh(0.5 * (hessian[indefinite] + hessian[indefinite].mT))
        sizes = values.abs()
        top = sizes.amax(-1, keepdim=True)
        small = weight[indefinite].amin(-1) * linalg.vector_norm(slope[indefinite], dim=-1) / reach[indefinite]
        sizes = torch.where(values < eps**0.25 * top, torch.maximum(sizes, small[:, None]), sizes)
        sizes = torch.where(top > 0, torch.maximum(sizes, 10 * eps**0.5 * top), 1)
        along = linalg.matvec(vectors.mT, slope[indefinite])
        direction[indefinite] = -linalg.matvec(vectors, along / sizes)
        negative = values[:, 0] < -(eps**0.4) * top[:, 0]
        down = weight[indefinite] * vectors[..., 0]
        length = linalg.vector_norm(down, dim=-1)
        lowest[indefinite] = down / length[:, None]
        curvature[indefinite] = torch.where(negative, values[:, 0] / length.square(), 0)
    return weight * direction, curved, lowest, curvature


def lbfgs(function: AugmentedLagrangian, x: Tensor, tolerance: float = 0.0, max_iterations: int = 2000) -> Descent:
    """L-BFGS with a line search, each element with its own history; arguments are those of :func:`newton`."""
    run = Run(function, x, tolerance)
    size, n = x.shape
    run.leave_symmetry()
    curved = torch.func.vjp(function.gradient, x)[1](x)[0]
    scale = torch.maximum(run.slope.abs().amax(-1), curved.abs().amax(-1))
    steps, changes = x.new_zeros(MEMORY, size, n), x.new_zeros(MEMORY, size, n)
    inverse, stale = x.new_zeros(MEMORY, size), torch.zeros_like(run.elements)
    for _ in range(max_iterations):
        if is_over():
            break
        large = run.slope.abs().amax(-1)
        bad = ~(torch.isfinite(run.value) & torch.isfinite(large))
        far = run.is_far()
        status = torch.where(far, int(Status.UNBOUNDED), outcome(bad, Status.NUMERICAL_ERROR))
        left = run.end((large <= tolerance * scale) | bad | far, status)
        scale, steps, changes, inverse = scale[left], steps[:, left], changes[:, left], inverse[:, left]
        stale = stale[left]
        if not len(run.elements):
            break
        direction = _two_loops(run.slope, steps, changes, inverse)
        downhill = (direction * run.slope).sum(-1) < 0
        direction = torch.where(downhill[:, None], direction, -run.slope)
        fresh = inverse[0] == 0
        first = direction.abs().amax(-1).clamp(min=1)
        direction = torch.where(fresh[:, None], direction / first[:, None], direction)
        run.iterations[run.elements] += 1
        before, slope = run.x, run.slope
        ended, precise = run.search(direction, quick=False)
        # At the precision of values, gradients that hardly fall any more are at their end, too.
        large = run.slope.abs().amax(-1)
        stale = torch.where(precise & (large > 0.9 * run.best), stale + 1, 0)
        run.best = torch.minimum(run.best, large)
        step, change = run.x - before, run.slope - slope
        product = (step * change).sum(-1)
        good = product > torch.finfo(x.dtype).eps * change.square().sum(-1)
        steps, changes, inverse = (
            torch.where(good.reshape(-1, *(1,) * (history.ndim - 2)), torch.cat([new[None], history[:-1]]), history)
            for history, new in ((steps, step), (changes, change), (inverse, 1 / product))
        )
        # A history that leads nowhere is forgotten once; without one, this is as far as it goes.
        inverse = torch.where(ended & ~fresh, 0, inverse)
        steps = torch.where((inverse[0] == 0)[:, None], 0, steps)
        ended = (ended & fresh) | (stale >= PATIENCE)
        small = run.slope.abs().amax(-1) <= torch.finfo(x.dtype).eps ** 0.4 * scale
        left = run.end(ended, outcome(~small, Status.NUMERICAL_ERROR))
        scale, steps, changes, inverse = scale[left], steps[:, left], changes[:, left], inverse[:, left]
        stale = stale[left]
    run.whole[run.elements] = run.x
    return Descent(run.whole, run.status, run.iterations)


def _two_loops(slope: Tensor, steps: Tensor, changes: Tensor, inverse: Tensor) -> Tensor:
    """``-H⁻¹ ∇f`` by the pairs of each element; pairs with an inverse of 0 are absent."""
    vector, weights = slope, []
    for step, change, factor in zip(steps, changes, inverse, strict=True):
        weight = factor * (step * vector).sum(-1)
        weights.append(weight)
        vector = vector - weight[:, None] * change
    square = changes[0].square().sum(-1)
    gamma = torch.where((inverse[0] != 0) & (square > 0), 1 / (inverse[0] * square), 1)
    vector = gamma[:, None] * vector
    for step, change, factor, weight in reversed(list(zip(steps, changes, inverse, weights, strict=True))):
        vector = vector + (weight - factor * (change * vector).sum(-1))[:, None] * step
    return -vector
