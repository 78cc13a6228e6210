"""What every layer is: options, a solver and a gradient method that can be replaced, warm starts, copies."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, get_args

import torch
from torch import Tensor

from lpgd.autograd import CallInfo, OnError, solve
from lpgd.execution import SerialExecutor
from lpgd.gradients import GradientMethod, ImplicitKKT, check_compatible
from lpgd.layers.inputs import Batch
from lpgd.layers.options import StandardOptions
from lpgd.problems.conic import ConicProblem
from lpgd.problems.structure import ConicData, ConicPoint, ConicStructure
from lpgd.solution import Solution
from lpgd.solvers import Situation, Solver, choose_solver

__all__ = ["LayerOutput", "OptimizationLayer", "Recorded", "WarmStart"]


class Recorded:
    """What every layer's output carries beside its tensors.

    Attributes:
        info: statuses and the solution of this call, and what each of its backward passes did.
        batch_shape: the leading dimensions of the tensors.
    """

    info: CallInfo
    batch_shape: tuple[int, ...]


class LayerOutput(tuple[Tensor, ...], Recorded):
    """The tensors a layer returns, as a plain tuple, with the record of the call beside them."""


WarmStart = bool | Recorded | Solution


def _exact(structure: ConicStructure) -> GradientMethod:
    """The gradient method of a layer for which none is named.

    Raises:
        ValueError: there is no exact gradient.
    """
    if not structure.has_kkt:
        raise ValueError(
            f"gradient is None, but {structure.noun} has no exact gradient that teaches (its solutions jump or stay): "
            "give gradient=lpgd.LPGD(tau=...) or lpgd.BlackboxBackprop(tau=...)."
        )
    return ImplicitKKT()


class OptimizationLayer(torch.nn.Module):
    """Solves conic programs and differentiates their solutions: the part that all layers share.

    Args:
        example: the structure of the problems, or of a small one of their class: solver and options are checked on it.
        fixed: all problems have this very structure, so a solver that is not named is chosen at once; else it is
            chosen for the structure of each call.
        solver, gradient, solver_args, on_error, executor, verbose: see the layers.
    """

    def __init__(
        self,
        example: ConicStructure,
        fixed: bool,
        solver: Solver | str | None,
        gradient: GradientMethod | None,
        solver_args: Mapping[str, Any] | None,
        on_error: OnError,
        executor: Executor | None,
        verbose: bool,
    ) -> None:
        super().__init__()
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error is {on_error!r}; it must be one of {', '.join(get_args(OnError))}.")
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise TypeError(f"executor is {executor!r}; it must be a concurrent.futures.Executor, or None for threads.")
        standard = StandardOptions.parse(solver_args)
        options = {"verbose": True, **standard.options} if verbose else standard.options
        self._example, self._fixed = example, fixed
        self.gradient = gradient or standard.gradient or _exact(example)
        self._set_solver(solver if solver is not None else standard.solver, options)
        self.on_error: OnError = on_error
        self.executor = executor if executor is not None else standard.executor
        self._last = threading.local()

    @property
    def gradient(self) -> GradientMethod:
        """The gradient method of the calls to come."""
        return self._gradient

    @gradient.setter
    def gradient(self, method: GradientMethod) -> None:
        if not isinstance(method, GradientMethod):
            raise TypeError(f"gradient is {method!r}; it must be a gradient method such as lpgd.LPGD(tau=0.1).")
        check_compatible(method, self._example)
        self._gradient = method

    @property
    def solver(self) -> Solver | None:
        """The solver of the calls to come; None where one is chosen for each call."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver | str | None) -> None:
        self._set_solver(solver, {})

    def _set_solver(self, solver: Solver | str | None, options: Mapping[str, Any]) -> None:
        chosen = choose_solver(self._example, solver, options, self._situation())
        left_open = solver is None and not self._fixed
        self._solver: Solver | None = None if left_open else chosen
        self._options = dict(options) if left_open else {}

    def extra_repr(self) -> str:
        solver = self._solver.name if self._solver is not None else "chosen by problem"
        return f"solver={solver}, gradient={self.gradient}"

    def _solve(
        self,
        data: ConicData,
        structure: ConicStructure,
        batch: Batch,
        solver_args: Mapping[str, Any] | None,
        warm_start: WarmStart,
    ) -> tuple[ConicPoint, CallInfo]:
        """Solve a batch, differentiably."""
        solver, executor, gradient = self._call_options(structure, solver_args, data.q.device)
        info = CallInfo()
        point = solve(
            data,
            structure,
            batch.batch_size,
            solver=solver,
            gradient=gradient,
            on_error=self.on_error,
            executor=executor,
            states=self._states(warm_start, structure, batch),
            info=info,
        )
        self._remember(structure, batch, info.solution, solver)
        return point, info

    def _solution(
        self,
        data: ConicData,
        structure: ConicStructure,
        batch: Batch,
        solver_args: Mapping[str, Any] | None,
        warm_start: WarmStart,
    ) -> Solution:
        """Solve a batch: the solver's whole answer."""
        solver, executor, _ = self._call_options(structure, solver_args, data.q.device)
        problem = ConicProblem(structure, ConicData(*(datum.detach() for datum in data)), batch.batch_size)
        solution = solver.solve(problem, self._states(warm_start, structure, batch), executor)
        self._remember(structure, batch, solution, solver)
        return solution

    def _situation(self, device: torch.device | None = None) -> Situation:
        return Situation(device.type if device is not None else "cpu", getattr(self.gradient, "rho", 0.0) > 0)

    def _call_options(
        self, structure: ConicStructure, solver_args: Mapping[str, Any] | None, device: torch.device
    ) -> tuple[Solver, Executor | None, GradientMethod]:
        if not solver_args and self._solver is not None and self._fixed:
            return self._solver, self.executor, self.gradient
        standard = StandardOptions.parse(solver_args)
        if standard.solver is None:
            options = {**self._options, **standard.options}
            solver = choose_solver(structure, self._solver, options, self._situation(device))
        else:
            solver = choose_solver(structure, standard.solver, standard.options, self._situation(device))
        if standard.gradient is not None:
            check_compatible(standard.gradient, structure)
        return solver, standard.executor or self.executor, standard.gradient or self.gradient

    def _states(self, warm_start: WarmStart, structure: ConicStructure, batch: Batch) -> Sequence[Any]:
        if warm_start is False:
            return ()
        if warm_start is True:
            digest, shape, states = getattr(self._last, "states", (None, None, ()))
            return states if (digest, shape) == (structure.digest, batch.batch_shape) else ()
        previous = warm_start.info.solution if isinstance(warm_start, Recorded) else warm_start
        if not isinstance(previous, Solution):
            raise TypeError(f"warm_start is {type(warm_start).__name__}; it takes True, an output or a Solution.")
        if previous.batch_size != batch.batch_size or previous.problem.structure.digest != structure.digest:
            raise ValueError(
                f"warm_start is a result of {previous.batch_size} elements with {previous.problem.structure.n} "
                f"variables and {previous.problem.structure.m} rows; this call has {batch.batch_size} elements with "
                f"{structure.n} variables and {structure.m} rows. It must come from this layer, from a problem of the "
                "same structure and a batch of the same size."
            )
        return previous.states

    def _remember(self, structure: ConicStructure, batch: Batch, solution: Solution | None, solver: Solver) -> None:
        if solution is not None and solver.capabilities.warm_start:
            self._last.states = (structure.digest, batch.batch_shape, solution.states)

    def __getstate__(self) -> dict[str, Any]:
        """Threads and their last results stay behind; a copy runs on the default executor unless it was serial."""
        state = self.__dict__.copy()
        del state["_last"]
        if not isinstance(self.executor, SerialExecutor):
            state["executor"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._last = threading.local()
