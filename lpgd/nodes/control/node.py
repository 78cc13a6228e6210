"""Optimal control as a declarative node: trajectories that minimise costs under dynamics and bounds.

[LEC] Gould, Lecture Notes on Differentiable Optimisation in Deep Learning, section 4.6.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpgd.arrays import first_lane, may_be_followed
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt
from lpgd.nodes.captured import refuse_captured
from lpgd.nodes.control.ending import Trajectories, in_units, polish, warm
from lpgd.nodes.control.functions import Function, Functions
from lpgd.nodes.control.solver import minimise
from lpgd.nodes.control.trajectory import ControlProblem, Expansion, Held, multipliers, respond
from lpgd.status import Status

__all__ = ["Bounds", "OptimalControl"]

Bounds = tuple[Any, Any] | Callable[..., tuple[Any, Any]]


class _Multipliers(NamedTuple):
    """What a solve leaves for the derivative: ν (B, T, n), and those of the bounds (B, T, m + n)."""

    nu: Tensor
    below: Tensor
    above: Tensor


@dataclass(frozen=True, eq=False)
class OptimalControl(BaseNode):
    """A trajectory of T stages that minimises a cost under dynamics.

        minimise  Σ_(t<T) stage(x_t, u_t) + final(x_T)
        subject to  x_(t+1) = dynamics(x_t, u_t),  t = 0 … T - 1,  x_0 the input ``state``
                    bounds on u_0 … u_(T-1) and on x_1 … x_T

    The inputs are ``state`` x_0 (n,) and the parameters of the functions, by the names that ``dynamics`` gives them.
    The answer y is (T, m + n), row t being (u_t, x_(t+1)); :meth:`split` takes it apart.  Controls alone are unknowns
    of a problem without structure; with states as variables its systems have blocks along the horizon, and one Riccati
    recursion solves them in time linear in T, forward and backward.

    Forward: sequential quadratic programming with an interior-point method for the bounds
    (:mod:`lpgd.nodes.control.solver`).  It finds a local minimum; the factor of its last system proves that it is a
    strict one.  Backward: the same recursion once, with the active bounds held, exact for nonlinear dynamics as
    well.  LPGD's problems are trajectories with ``τ <g, y> + (ρ/2)|y - y*|²`` as further stage costs.
    Multipliers (``info.solution.point``): ν are the costates, T n of them, stage by stage.

    Args:
        dynamics: ``dynamics(x, u, *parameters)``, the next state (n,); torch operations of one stage, which are batched
            over elements and stages by ``torch.func.vmap``, so that they must not branch on values.
        stage: ``stage(x, u, *parameters)``, a number.
        final: ``final(x, *parameters)``, a number, or None.
        horizon: T ≥ 1.
        controls: m ≥ 1, the number of controls.
        control_bounds, state_bounds: a pair (lower, upper) of numbers or vectors, infinite where there are none; or a
            function of the parameters that returns such a pair, with a gradient; or None.
        ndims: how many dimensions the parameters have for one element, one number for each or one for all.
        varying: names of parameters with T + 1 rows in front: one for each stage, and one for the final cost.  Their
            ``ndims`` count that dimension.
        guess: ``guess(state, *parameters)``, (T, m + n), where the solver starts, without following the dynamics if
            need
            be; None: controls of zero, and the state held.
        iterations: of an element, at most.

    Raises:
        TypeError: a function is none, or has arguments that cannot be counted.
        ValueError: an option is out of its range, or a function captures a tensor that requires a gradient.
    """

    dynamics: Function
    stage: Function
    final: Function | None
    horizon: int
    controls: int
    control_bounds: Bounds | None = None
    state_bounds: Bounds | None = None
    ndims: int | Sequence[int] = 1
    varying: Sequence[str] = ()
    guess: Function | None = None
    iterations: int = 500

    name = "optimal control"
    domain = "Here bounds and dynamics must leave a trajectory, and functions be finite at the guess."

    def __post_init__(self) -> None:
        for role in ("dynamics", "stage", "final", "guess"):
            function = getattr(self, role)
            if not (callable(function) or (function is None and role in ("final", "guess"))):
                raise TypeError(f"{role} is {function!r}; it must be a function.")
        for role in ("horizon", "controls", "iterations"):
            if not (isinstance(getattr(self, role), int) and getattr(self, role) >= 1):
                raise ValueError(f"{role} is {getattr(self, role)!r}; it must be a whole number of at least 1.")
        names, dimensions = self._parameters, self.ndims
        if not isinstance(dimensions, int) and len(dimensions) != len(names):
            raise ValueError(
                f"ndims is {dimensions}; type one number for each of the parameters {', '.join(names) or '(none)'}, "
                f"such as ndims={(1,) * len(names)}: 0 for a number, 1 for a vector, 2 for a matrix."
            )
        if unknown := set(self.varying) - set(names):
            raise ValueError(f"varying names {', '.join(sorted(unknown))}; the parameters are {', '.join(names)}.")
        if "state" in names:
            raise ValueError("a parameter is called state, as the first input is: give it another name.")
        for role, size in (("control_bounds", self.controls), ("state_bounds", None)):
            bounds = getattr(self, role)
            if bounds is not None and not callable(bounds):
                self._check_bounds(role, bounds, size)

    @staticmethod
    def _check_bounds(role: str, bounds: Any, size: int | None) -> None:
        if not (isinstance(bounds, tuple | list) and len(bounds) == 2):
            raise TypeError(f"{role} is {bounds!r}; it must be a pair (lower, upper), or a function of the parameters.")
        lower, upper = (torch.as_tensor(end, dtype=torch.float64) for end in bounds)
        for end in (lower, upper):
            if end.ndim > 1 or (end.ndim and size is not None and len(end) != size):
                raise ValueError(f"{role} has the shape {tuple(end.shape)}; numbers or vectors, one entry for each.")
        if not bool((lower < upper).all()):
            raise ValueError(f"{role} is {bounds!r}; lower bounds must be below upper ones.")

    @cached_property
    def _parameters(self) -> tuple[str, ...]:
        try:
            known = list(inspect.signature(self.dynamics).parameters.values())
        except (TypeError, ValueError) as error:
            raise TypeError("the arguments of dynamics cannot be read; write dynamics(x, u, *parameters).") from error
        if any(argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD) for argument in known):
            raise TypeError("dynamics takes *arguments; name them: x, u, and the parameters.")
        names = [
            argument.name
            for argument in known
            if argument.default is argument.empty and argument.kind is not argument.KEYWORD_ONLY
        ]
        if len(names) < 2:
            raise TypeError(f"dynamics takes {len(names)} arguments; it must take x and u first.")
        return tuple(names[2:])

    @property
    def inputs(self) -> Mapping[str, int]:
        count = len(self._parameters)
        ndims = (self.ndims,) * count if isinstance(self.ndims, int) else tuple(self.ndims)
        return {"state": 1, **dict(zip(self._parameters, ndims, strict=True))}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        for name, shape in zip(self._parameters, shapes[1:], strict=True):
            if name in self.varying and (not shape or shape[0] != self.horizon + 1):
                raise ValueError(f"{name} has shape {shape}; it varies, and has {self.horizon + 1} rows (T + 1).")
        if not shapes[0][0]:
            raise ValueError("state has no entries.")
        return self.horizon, self.controls + shapes[0][0]

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Controls u_0 … u_(T-1) (…, T, m) and states x_1 … x_T (…, T, n) of trajectories (…, T, m + n)."""
        return y[..., : self.controls], y[..., self.controls :]

    def arrange(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Refuse functions that use tensors whose gradient would be lost: called once, with detached arguments."""
        shapes = zip(inputs, self.inputs.values(), strict=True)
        if not may_be_followed() or not all(tensor.ndim >= ndim and tensor.numel() for tensor, ndim in shapes):
            return inputs
        pairs = zip(inputs, self.inputs.values(), strict=True)
        state, *parameters = (first_lane(tensor)[(0,) * (tensor.ndim - ndim)] for tensor, ndim in pairs)
        varies = [name in self.varying for name in self._parameters]
        row = [parameter[0] if moves else parameter for parameter, moves in zip(parameters, varies, strict=True)]
        control = state.new_zeros(self.controls)
        arguments = {"dynamics": (state, control, *row), "stage": (state, control, *row), "final": (state, *row)}
        arguments |= dict.fromkeys(("control_bounds", "state_bounds"), tuple(parameters))
        for role, given in arguments.items():
            function = getattr(self, role)
            if not callable(function):
                continue
            refuse_captured(f"{role} of {self.name}", function, _as_tuple(function(*given)), "a parameter")
        return inputs

    # -- what is minimised -------------------------------------------------------------------------------------

    # A batch without elements has no row that the user's functions could be called with.

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return self._problem(inputs).value(y) if len(y) else y.sum((-2, -1))

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        if not len(y):
            return y[..., self.controls :].flatten(1)
        return self._problem(inputs).defect(y).flatten(1)

    def inequality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        if self.control_bounds is None and self.state_bounds is None:
            return None
        if not len(y):
            return y.new_zeros(0, 0)
        problem = self._problem(inputs)
        below, above = self._bounded(inputs)
        values = [problem.lower[..., below] - y[..., below], y[..., above] - problem.upper[..., above]]
        # A bound at infinity is a row that is absent: it holds, and has no derivative.
        return torch.cat([torch.where(torch.isfinite(value), value, -1.0).flatten(1) for value in values], -1)

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        state = inputs[0]
        held = torch.cat([state.new_zeros(len(state), self.controls), state], -1)[:, None].expand(-1, *shape)
        if self.guess is None:
            return held.contiguous()
        guesses = [torch.as_tensor(self.guess(*element)).to(state) for element in zip(*inputs, strict=True)]
        if any(tuple(guess.shape) != shape for guess in guesses):
            raise ValueError(f"guess returned the shape {tuple(guesses[0].shape)}; a trajectory is {shape} (T, m + n).")
        return torch.stack(guesses) if guesses else held

    # -- solving -----------------------------------------------------------------------------------------------

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        return self._solve(self._problem(inputs), inputs, start)

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        return self._solve(self._problem(inputs, tilt), inputs, start)

    def _solve(self, problem: ControlProblem, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        z = self.initial(self.variable_shape(*(tuple(tensor.shape[1:]) for tensor in inputs)), *inputs)
        crossed = (problem.lower >= problem.upper).any(-1).any(-1)
        valid = (~crossed).nonzero()[:, 0]
        problem, z = (problem, z) if len(valid) == len(crossed) else (problem.select(valid), z[valid])
        z = z if start is None else start[valid]
        problem = in_units(problem, z)
        if start is None:
            found = minimise(problem, z, self.iterations, grows=self.guess is None)
        else:
            found = polish(problem, warm(problem, z))
            unsettled = ((found.status != int(Status.SOLVED)) | _far(found.z, z)).nonzero()[:, 0]
            if len(unsettled):
                again = minimise(problem.select(unsettled), z[unsettled], self.iterations)
                found.iterations[unsettled] += again.iterations
                for tensor, values in zip(found[:5], again[:5], strict=True):
                    tensor[unsettled] = values
        assert problem.unit is not None
        unit = problem.unit[:, None, None]
        found = found._replace(nu=unit * found.nu, below=unit * found.below, above=unit * found.above)
        if len(valid) < len(crossed):
            found = _spread(found, valid, len(crossed))
        statuses = [Status(code) for code in found.status.tolist()]
        aux = _Multipliers(found.nu, found.below, found.above)
        return NodeAnswer(found.z, statuses, found.iterations, aux, found.nu.flatten(1), self._lam(inputs, found))

    def _lam(self, inputs: tuple[Tensor, ...], found: Trajectories) -> Tensor:
        if self.control_bounds is None and self.state_bounds is None:
            return found.nu.new_zeros(len(found.nu), 0)
        below, above = self._bounded(inputs)
        return torch.cat([found.below[..., below].flatten(1), found.above[..., above].flatten(1)], -1)

    # -- the derivative ----------------------------------------------------------------------------------------

    def vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: _Multipliers | None
    ) -> tuple[Tensor, ...] | None:
        """The system of the optimality conditions by the recursion, and one vjp of these conditions.

        None where a system is singular, or its Hessian not positive definite: optimality conditions say what is left.
        """
        if not len(y):
            return tuple(torch.zeros_like(tensor) for tensor in inputs)
        return self._vjp(inputs, y, cotangent, aux)

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...] | None:
        return self._vjp(inputs, y, cotangent, None)

    def _vjp(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: _Multipliers | None
    ) -> tuple[Tensor, ...] | None:
        problem = self._problem(inputs)
        expansion = problem.expand(y)
        held, nu, force = self._active(problem, expansion, y, aux)
        zero = torch.zeros_like(y)
        dz, turn, push, regular = respond(
            problem.curvature(y, nu), expansion, cotangent, torch.zeros_like(nu), held, zero
        )
        if not bool(regular.all()):
            return None

        def along(inputs: tuple[Tensor, ...]) -> Tensor:
            # <∇L(z, ν, φ), (dz, dν, dφ)> as a function of the inputs
            moved = self._problem(inputs)
            slopes = moved.expand(y)
            value = ((slopes.gradient + slopes.pulled(nu)) * dz).sum() + (slopes.defect * turn).sum()
            bound = torch.where(force < 0, moved.lower, moved.upper)
            gap = torch.where(held.mask, y - torch.where(held.mask, bound, 0), 0)
            return value + (gap * push).sum()

        return torch.func.grad(along)(inputs)

    def _active(
        self, problem: ControlProblem, expansion: Expansion, y: Tensor, aux: _Multipliers | None
    ) -> tuple[Held, Tensor, Tensor]:
        """Entries at active bounds, the multipliers ν, and the forces of the bounds."""
        reach = torch.finfo(y.dtype).eps ** 0.5 * (1 + y.detach().abs().amax((-1, -2), keepdim=True))
        low, high = (y - problem.lower).detach(), (problem.upper - y).detach()
        near_low, near_high = low <= reach, high <= reach
        if aux is not None:
            near_low, near_high = near_low | (aux.below > low), near_high | (aux.above > high)
        held = Held.of(near_low | near_high, self.controls)
        if aux is not None:
            force = aux.above - aux.below
            nu = aux.nu
        else:
            nu, force = multipliers(problem, expansion, y, held)
        weak = torch.where(near_low, -1.0, 1.0).to(y)  # a bound without a force is on the side where it is
        return held, nu, torch.where(held.mask & (force == 0), weak, force.detach())

    # -- data ----------------------------------------------------------------------------------------------------

    def _problem(self, inputs: tuple[Tensor, ...], tilt: Tilt | None = None) -> ControlProblem:
        state, *parameters = inputs
        varying = tuple(name in self.varying for name in self._parameters)
        functions = Functions(self.dynamics, self.stage, self.final, varying, state.shape[-1])
        lower, upper = self._bounds(state, tuple(parameters))
        problem = ControlProblem(functions, state, tuple(parameters), lower, upper)
        if tilt is None:
            return problem
        return ControlProblem(
            functions, state, tuple(parameters), lower, upper, tilt.linear, tilt.center if tilt.rho else None, tilt.rho
        )

    def _bounds(self, state: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """(B, T, m + n) each."""
        size, n = state.shape
        sides: list[list[Tensor]] = [[], []]
        for role, width in (("control_bounds", self.controls), ("state_bounds", n)):
            bounds = getattr(self, role)
            pair = (-torch.inf, torch.inf) if bounds is None else bounds
            if callable(pair):

                def ends(*element: Tensor, pair: Any = pair, width: int = width) -> tuple[Tensor, ...]:
                    return tuple(
                        torch.as_tensor(end, dtype=state.dtype).expand(self.horizon, width) for end in pair(*element)
                    )

                found = torch.func.vmap(ends)(*parameters) if parameters else ends()
            else:
                found = tuple(torch.as_tensor(end).to(state) for end in pair)
            for side, end in zip(sides, found, strict=True):
                side.append(end.expand(size, self.horizon, width))
        return torch.cat(sides[0], -1), torch.cat(sides[1], -1)

    def _bounded(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The columns of z that have rows for lower and for upper bounds."""
        n = inputs[0].shape[-1]
        answers: list[list[Tensor]] = [[], []]
        for bounds, width in ((self.control_bounds, self.controls), (self.state_bounds, n)):
            for place, side in enumerate(answers):
                if bounds is None:
                    side.append(torch.zeros(width, dtype=torch.bool))
                elif callable(bounds):
                    side.append(torch.ones(width, dtype=torch.bool))
                else:
                    side.append(torch.isfinite(torch.as_tensor(bounds[place], dtype=torch.float64)).expand(width))
        device = inputs[0].device
        below, above = (torch.cat(side).to(device).nonzero()[:, 0] for side in answers)
        return below, above


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, tuple | list) else (values,)


def _far(z: Tensor, start: Tensor) -> Tensor:
    """(B,) another branch than that of the start, as Newton's method may find it."""
    return (z - start).abs().amax((-1, -2)) > 1.0 + start.abs().amax((-1, -2))


def _spread(found: Trajectories, valid: Tensor, size: int) -> Trajectories:
    tensors = [tensor.new_zeros(size, *tensor.shape[1:]).index_copy(0, valid, tensor) for tensor in found]
    whole = Trajectories(*tensors)
    invalid = torch.ones(size, dtype=torch.bool, device=valid.device).index_fill(0, valid, False)
    whole.status[invalid] = int(Status.INFEASIBLE)
    whole.z[invalid] = torch.nan
    return whole
