"""Dynamics and costs of one stage as functions of whole batches of trajectories, with their derivatives.

A stage's variables are ``w_t = (u_t, x_t)``; trajectories are (B, T, ·), parameters (B, …), those that vary along the
horizon (B, T + 1, …).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Function", "Functions", "Slopes"]

Function = Callable[..., Any]


class Slopes(NamedTuple):
    """First derivatives along trajectories.

    Attributes:
        stage: of the stage costs in w, (B, T, m + n).
        last: of the final cost, (B, n).
        step: F, of the dynamics in w, (B, T, n, m + n).
    """

    stage: Tensor
    last: Tensor
    step: Tensor


@dataclass(frozen=True)
class Functions:
    """A control problem's functions of one stage.

    Args:
        dynamics: ``dynamics(x, u, *parameters)``: the next state.
        stage: ``stage(x, u, *parameters)``: a number.
        final: ``final(x, *parameters)``: a number, or None for 0.
        varying: whether each parameter has a row for each stage, and one more for the end.
        states: n, the number of states.
    """

    dynamics: Function
    stage: Function
    final: Function | None
    varying: tuple[bool, ...]
    states: int

    def costs(self, w: Tensor, last: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """The sum of all costs, (B,)."""
        return self._along(self._cost, w, parameters).sum(-1) + self._end(self._final, last, parameters)

    def following(self, w: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """The states that follow, (B, T, n)."""
        return self._along(self._next, w, parameters)

    def slopes(self, w: Tensor, last: Tensor, parameters: tuple[Tensor, ...]) -> Slopes:
        """First derivatives."""
        grad, jacobian = torch.func.grad, torch.func.jacrev
        return Slopes(
            self._along(grad(self._cost), w, parameters),
            self._end(grad(self._final), last, parameters),
            self._along(jacobian(self._next), w, parameters),
        )

    def hessians(
        self, w: Tensor, last: Tensor, nu: Tensor | None, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Second derivatives of the costs with ``νᵀ`` the dynamics: (B, T, m + n, m + n), and of the end (B, n, n)."""

        def lagrangian(w: Tensor, nu: Tensor, *parameters: Tensor) -> Tensor:
            return self._cost(w, *parameters) + nu @ self._next(w, *parameters)

        curve = torch.func.jacrev(torch.func.grad(self._cost if nu is None else lagrangian))
        return (
            self._along(curve, w, parameters, *(() if nu is None else (nu,))),
            self._end(torch.func.jacrev(torch.func.grad(self._final)), last, parameters),
        )

    # -- of one stage, (m + n,) --------------------------------------------------------------------------------

    def _split(self, w: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        m = w.shape[-1] - self.states
        return w[m:], w[:m], *parameters

    def _next(self, w: Tensor, *parameters: Tensor) -> Tensor:
        value = self.dynamics(*self._split(w, *parameters))
        if not isinstance(value, Tensor) or value.shape != (self.states,):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"dynamics returned {found}; it must return the next state, a tensor ({self.states},).")
        return value

    def _cost(self, w: Tensor, *parameters: Tensor) -> Tensor:
        return _number("stage", self.stage(*self._split(w, *parameters)))

    def _final(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return (0.0 * x).sum() if self.final is None else _number("final", self.final(x, *parameters))

    # -- of all of them ----------------------------------------------------------------------------------------

    def _along(self, function: Function, w: Tensor, parameters: tuple[Tensor, ...], *more: Tensor) -> Any:
        arguments = [
            parameter[:, :-1] if varies else parameter
            for parameter, varies in zip(parameters, self.varying, strict=True)
        ]
        along = tuple(0 if varies else None for varies in self.varying)
        inner = torch.func.vmap(function, in_dims=(0,) * (1 + len(more)) + along)
        return torch.func.vmap(inner)(w, *more, *arguments)

    def _end(self, function: Function, last: Tensor, parameters: tuple[Tensor, ...]) -> Any:
        arguments = [
            parameter[:, -1] if varies else parameter
            for parameter, varies in zip(parameters, self.varying, strict=True)
        ]
        return torch.func.vmap(function)(last, *arguments)


def _number(role: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"the {role} cost is of {found}; it must be a number, a tensor ().")
    return value.reshape(())
