"""DirectLossLayer: the loss of a structured prediction, with exact loss-augmented inference in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lpgd.gradients import GradientMethod
from lpgd.layers.base import WarmStart
from lpgd.layers.eager import eager, signature_of
from lpgd.layers.oracle import Arguments, OracleLayer, TensorOutput, record
from lpgd.problems.linear import LinearSolution, LinearStructure
from lpgd.solvers.failures import OnError
from lpgd.solvers.oracle import Oracle

__all__ = ["DirectLossLayer"]


class DirectLossLayer(OracleLayer):
    """The loss ``ℓ(x*, t)`` of ``x* = argmax <w, Ψ(x, ξ)>`` over a finite set, with a gradient for the weights w.

    The loss is a step function of w.  Its direct loss gradient ([LPGD] eqs. 17-19; McAllester et al. 2010) compares
    x* with the best x after the loss itself, not a linear model of it, was added to the objective:

        x_{+τ} = argmax <w, Ψ(x, ξ)> - τ ℓ(x, t)      "towards better", envelope="lower"
        x_{-τ} = argmax <w, Ψ(x, ξ)> + τ ℓ(x, t)      "away from worse", envelope="upper"

    and is ``(Ψ(x*) - Ψ(x_{+τ})) / τ``, ``(Ψ(x_{-τ}) - Ψ(x*)) / τ``, or their mean (``"average"``).  It is LPGD of the
    linear problem over the points ``(Ψ(x), ℓ(x))`` with costs ``(-w, 0)``: the tilt moves the cost of the loss.  Where
    there is no solver with the loss in it, ``BlackboxLayer(solver, features=Ψ, sense="max")`` and a loss of Ψ in torch
    linearise it.

    Args:
        solver: ``solver(w, *inputs)``, the x of any kind that is best for the float64 weights w of one element.
        features: the feature map ``Ψ(x, *inputs)``, of the shape of w.
        loss: ``loss(x, target)``, a number.
        augmented: ``augmented(w, *inputs, step=s, target=t)``, the x that is best for ``<w, Ψ(x)> - s ℓ(x, t)``; s is
            τ, or -τ for the upper envelope, never 0.
        gradient: a gradient method with a τ: ``DirectLoss(tau, envelope)`` takes τ as it stands above; that of ``LPGD``
            is also multiplied by the weight that the element's loss has in the whole, such as 1/B.
        batched: the four functions take and return all elements at once: k rows of everything, and k steps.
        executor, on_error, as_torch, ndim, progress, batch_time_limit: as for :class:`~lpgd.BlackboxLayer`; all
            functions get arrays, or all tensors.
        warm_start: solver and augmented take a keyword ``start`` too: the last x of this element, or None.

    Attributes:
        gradient: the gradient method; it may be replaced between calls.

    Raises:
        TypeError, ValueError: as for :class:`~lpgd.BlackboxLayer`.
    """

    _choice = "the functions that were given."

    def __init__(
        self,
        solver: Callable[..., Any],
        features: Callable[..., Any],
        loss: Callable[..., Any],
        augmented: Callable[..., Any],
        gradient: GradientMethod | None = None,
        batched: bool = False,
        executor: Executor | None = None,
        on_error: OnError = "raise",
        *,
        as_torch: bool = False,
        warm_start: bool = False,
        ndim: int | None = None,
        progress: bool = False,
        batch_time_limit: float | None = None,
    ) -> None:
        for name, function in (("solver", solver), ("features", features), ("loss", loss), ("augmented", augmented)):
            if not callable(function):
                raise TypeError(f"{name} is {function!r}; it must be callable.")
        self._functions = _Functions(solver, features, loss, augmented, batched, as_torch)
        oracle = Oracle(
            function=self._functions.answer,
            batched=batched,
            as_torch=as_torch,
            warm_start=warm_start,
            features=self._functions.point,
            batch_time_limit=batch_time_limit,
        )
        super().__init__(oracle, ndim, gradient, on_error, executor, progress)

    @eager
    def forward(self, weights: Tensor, *inputs: Any, target: Any, warm_start: WarmStart = False) -> TensorOutput:
        """The losses for these weights.

        Args:
            weights: (*batch, *shape).  Weights that a batch shares are expanded to it: ``w.expand(len(inputs), -1)``.
            *inputs: ξ, without a gradient: tensors or arrays (*batch, ...), or sequences of one object for each
                element; without a batch anything.
            target: t, in the same way.
            warm_start: as for :class:`~lpgd.BlackboxLayer`.

        Returns:
            Losses (*batch,) in the weights' type and on their device.  The tensor's ``info`` is the record of this
            call; the x* are in ``info.solution.answers``.

        Raises:
            SolverError: an element has no solution (``on_error="raise"``), or a function raised for one.
            ValueError, TypeError: an input has the wrong shape or type.
        """
        arguments = self._read(weights, inputs, target)
        point, info = self._call(arguments, warm_start)
        return record(arguments.batch.restore(point[:, -1], ()), info, arguments.batch)

    if TYPE_CHECKING:

        @signature_of(forward)
        def __call__(self, *args: Any, **keywords: Any) -> Any: ...

    def solve(self, weights: Tensor, *inputs: Any, target: Any, warm_start: WarmStart = False) -> LinearSolution:
        """The solver's whole answer, not differentiable: ``answers`` are the x*, ``x`` (B, n + 1) is (Ψ(x*), ℓ(x*))."""
        with torch.no_grad():
            return self._answer(self._read(weights, inputs, target), warm_start)

    def _read(self, weights: Tensor, inputs: tuple[Any, ...], target: Any) -> Arguments:
        structure, batch = self._batch("weights", weights)
        w = weights.reshape(batch.batch_size, structure.n).to(torch.float64)
        arguments = [self._by_element(f"input {place}", values, batch) for place, values in enumerate(inputs)]
        arguments.append(self._by_element("target", target, batch))
        functions = replace(self._functions, shape=structure.shape)
        oracle = replace(self.solver, function=functions.answer, features=functions.point)
        c = torch.cat([-w, w.new_zeros(len(w), 1)], -1)
        return Arguments(c, LinearStructure((structure.n + 1,)), batch, tuple(arguments), oracle)


@dataclass(frozen=True)
class _Functions:
    """The user's four functions as an oracle of the points (Ψ(x), ℓ(x)) with costs (-w, s), and their feature map.

    Args:
        solver, features, loss, augmented, batched, as_torch: see the layer.
        shape: of the weights.
    """

    solver: Callable[..., Any]
    features: Callable[..., Any]
    loss: Callable[..., Any]
    augmented: Callable[..., Any]
    batched: bool
    as_torch: bool
    shape: tuple[int, ...] = ()

    def answer(self, costs: Any, *arguments: Any, **keywords: Any) -> Any:
        """The best x."""
        *inputs, target = arguments
        weights, step = -costs[..., :-1], costs[..., -1]
        weights = weights.reshape(*costs.shape[:-1], *self.shape)
        if bool((step == 0).all()):
            return self.solver(weights, *inputs, **keywords)
        step = step if self.batched else float(step)
        return self.augmented(weights, *inputs, step=step, target=target, **keywords)

    def point(self, x: Any, *arguments: Any) -> Any:
        """(Ψ(x), ℓ(x))."""
        *inputs, target = arguments
        features, loss = self.features(x, *inputs), self.loss(x, target)
        leading = (len(target),) if self.batched else ()
        shape = (*leading, *self.shape)
        read: Any = torch.as_tensor if self.as_torch else np.asarray
        features, loss = read(features), read(loss)
        for name, values, wanted in (("feature map", features, shape), ("loss", loss, leading)):
            if tuple(values.shape) != wanted:
                raise ValueError(f"the {name} answered shape {tuple(values.shape)}; it must be {wanted}.")
        blocks = [features.reshape(*leading, -1), loss.reshape(*leading, 1)]
        if self.as_torch:
            return torch.cat([block.to(features.device, torch.float64) for block in blocks], -1)
        return np.concatenate(blocks, -1)
