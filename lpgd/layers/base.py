"""What every layer is: options, a solver and a gradient method that can be replaced, warm starts, copies."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from lpgd.arrays import plain
from lpgd.autograd import CallInfo, solve, threads_of
from lpgd.execution.progress import progress
from lpgd.execution.tasks import SerialExecutor
from lpgd.gradients import GradientMethod, ImplicitKKT, check_compatible
from lpgd.gradients.losses import Reading, identity
from lpgd.layers.absent import without_absent_rows
from lpgd.layers.balanced import balanced, in_own_coordinates, is_of_other_coordinates
from lpgd.layers.eager import built_eagerly
from lpgd.layers.inputs import Batch
from lpgd.layers.standard_options import StandardOptions
from lpgd.problems.base import States, Structure, Traits
from lpgd.problems.conic.coordinates.balance import Balance
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.relaxed import RelaxedPoint
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicData, ConicPoint, ConicStructure, per_element
from lpgd.problems.solution import AnyProblem, AnySolution, Solution
from lpgd.solvers import Choice, ConicSolver, Situation, choose_solver
from lpgd.solvers.base import AnySolver
from lpgd.solvers.failures import ON_ERROR, Explain, OnError
from lpgd.solvers.relaxed import relax

__all__ = ["BaseLayer", "LayerOutput", "OptimizationLayer", "Recorded", "WarmStart"]


class Recorded:
    """What every layer's output carries beside its tensors.

    Attributes:
        info: statuses and the solution of this call, and what each of its backward passes did.
        batch_shape: the leading dimensions of the tensors.
    """

    info: CallInfo
    batch_shape: tuple[int, ...]


class LayerOutput(tuple[Tensor, ...], Recorded):
    """The tensors a layer returns, as a plain tuple, with the record of the call beside them.

    PyTorch's module hooks put a tuple together again as a named one is, by one argument for each of its tensors.
    """

    def __new__(cls, *tensors: Any) -> Self:
        """Of an iterable of tensors, as ``tuple`` is made, or of the tensors."""
        is_iterable = len(tensors) == 1 and not isinstance(tensors[0], Tensor)
        return super().__new__(cls, tensors[0] if is_iterable else tensors)


# For torch.func, which takes outputs apart and puts them together again, without the record.
register_pytree_node(LayerOutput, lambda output: (list(output), None), lambda tensors, _: LayerOutput(tensors))


WarmStart = bool | Recorded | AnySolution


class BaseLayer(torch.nn.Module, ABC):
    """What layers share, whatever the class of their problems.

    Args:
        gradient, on_error, executor, progress: see the layers.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "__init__" in vars(cls):
            cls.__init__ = built_eagerly(cls.__init__)

    def __init__(
        self, gradient: GradientMethod, on_error: OnError, executor: Executor | None, progress: bool = False
    ) -> None:
        super().__init__()
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error is {on_error!r}; it must be one of {', '.join(ON_ERROR)}.")
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise TypeError(f"executor is {executor!r}; it must be a concurrent.futures.Executor, or None for threads.")
        self.gradient = gradient
        self.on_error: OnError = on_error
        self.executor = executor
        self.progress = progress
        self._last = threading.local()
        traits = self._traits()
        if on_error == "relax" and traits.conditions != "conic":
            raise TypeError(
                f"on_error='relax' gives the solution of the closest feasible problem, which {traits.noun} does not "
                "have; use 'nan' or 'warn'."
            )

    @property
    def gradient(self) -> GradientMethod:
        """The gradient method of the calls to come."""
        return self._gradient

    @gradient.setter
    def gradient(self, method: GradientMethod) -> None:
        if not isinstance(method, GradientMethod):
            raise TypeError(f"gradient is {method!r}; it must be a gradient method such as lpgd.LPGD(tau=0.1).")
        self._check_gradient(method)
        self._gradient = method

    @abstractmethod
    def _traits(self) -> Traits:
        """What the problems of the calls to come can do."""

    def _check_gradient(self, method: GradientMethod) -> None:
        check_compatible(method, self._traits())

    def _differentiable(
        self,
        problem: AnyProblem,
        batch: Batch,
        call: CallOptions,
        warm_start: WarmStart,
        explain: Explain | None = None,
        known: AnySolution | None = None,
    ) -> tuple[Any, CallInfo]:
        """Solve a batch, differentiably, unless its solution is known: the outputs and the record."""
        info = CallInfo(choice=call.choice)
        outputs = solve(
            problem,
            solver=call.solver,
            gradient=call.gradient,
            on_error=self.on_error,
            executor=call.executor,
            states=self._states(warm_start, problem.structure, batch),
            info=info,
            explain=explain,
            progress=self.progress,
            known=known,
        )
        self._remember(info.solution, batch, call.solver)
        return outputs, info

    def _plain(
        self,
        problem: AnyProblem,
        batch: Batch,
        call: CallOptions,
        warm_start: WarmStart,
        *,
        relaxes: bool = True,
        alone: bool = False,
    ) -> Any:
        """Solve a batch: the solver's whole answer, relaxed where that is the layer's and ``relaxes``."""
        solver = cast(Any, call.solver)
        solve = solver.solve_alone if alone else solver.solve
        problem = problem.with_data(problem.data._make(plain(datum) for datum in problem.data))
        with progress(self.progress, "solve", problem.batch_size):
            solution = solve(problem, self._states(warm_start, problem.structure, batch), call.executor)
            if self.on_error == "relax" and relaxes:
                solution = relax(solution, call.solver, call.executor)
        self._remember(solution, batch, call.solver)
        return solution

    def _states(self, warm_start: WarmStart, structure: Structure, batch: Batch) -> States:
        if warm_start is False:
            return ()
        if warm_start is True:
            digest, shape, states = getattr(self._last, "states", (None, None, ()))
            return states if (digest, shape) == (structure.digest, batch.batch_shape) else ()
        info = getattr(warm_start, "info", None)  # of an output, be it a tuple or a tensor
        previous = info.solution if isinstance(info, CallInfo) else warm_start
        if not isinstance(previous, Solution):
            raise TypeError(f"warm_start is {type(warm_start).__name__}; it takes True, an output or a Solution.")
        other = previous.problem.structure
        if is_of_other_coordinates(previous, structure, batch.batch_size):
            return ()
        if previous.batch_size != batch.batch_size or other.digest != structure.digest:
            raise ValueError(
                f"warm_start is a result of {previous.batch_size} elements with {other.summary}; this call has "
                f"{batch.batch_size} elements with {structure.summary}. It must come from this layer, from a problem "
                "of the same structure and a batch of the same size."
            )
        return previous.states

    def _remember(self, solution: AnySolution, batch: Batch, solver: AnySolver) -> None:
        if solver.takes_states and solution.batch_size == batch.batch_size:  # else these are lanes of torch.func.vmap
            self._last.states = (solution.problem.structure.digest, batch.batch_shape, solution.states)

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


class CallOptions(NamedTuple):
    """How one call is solved and differentiated."""

    solver: AnySolver
    executor: Executor | None
    gradient: GradientMethod
    choice: object
    """Whose text says which solver it is, and why."""


def _is_augmented(method: Any) -> bool:
    """Whether a gradient method adds a square or a loss to the objective."""
    return getattr(method, "rho", 0.0) > 0 or getattr(method, "loss", None) is not None


def _exact(structure: ConicStructure) -> GradientMethod:
    """The gradient method of a layer for which none is named.

    Raises:
        ValueError: there is no exact gradient.
    """
    if not structure.traits.has_kkt:
        raise ValueError(
            f"gradient is None, but {structure.traits.noun} has no exact gradient that teaches (its solutions jump or "
            "stay): give gradient=lpgd.LPGD(tau=...) or lpgd.BlackboxBackprop(tau=...)."
        )
    return ImplicitKKT()


class OptimizationLayer(BaseLayer):
    """Solves conic programs and differentiates their solutions: the part that all layers share.

    Args:
        example: the structure of the problems, or of a small one of their class: solver and options are checked on it.
        solver, gradient, solver_args, on_error, executor, verbose, progress: see the layers.
        fixed: all problems have this very structure, so a solver that is not named is chosen at once; else it is
            chosen for the structure of each call.
    """

    def __init__(
        self,
        example: ConicStructure,
        solver: ConicSolver | str | None,
        gradient: GradientMethod | None,
        solver_args: Mapping[str, object] | None,
        on_error: OnError,
        executor: Executor | None,
        *,
        fixed: bool = False,
        verbose: bool = False,
        progress: bool = False,
    ) -> None:
        standard = StandardOptions.parse(solver_args)
        self._example, self._fixed = example, fixed
        method = gradient or standard.gradient or _exact(example)
        super().__init__(method, on_error, executor if executor is not None else standard.executor, progress)
        options = {"verbose": True, **standard.options} if verbose else standard.options
        self._set_solver(solver if solver is not None else standard.solver, options)

    def _traits(self) -> Traits:
        return self._example.traits

    @property
    def solver(self) -> ConicSolver | None:
        """The solver of the calls to come; None where one is chosen for each call."""
        return self._solver

    @solver.setter
    def solver(self, solver: ConicSolver | str | None) -> None:
        self._set_solver(solver, {})

    def _set_solver(self, solver: ConicSolver | str | None, options: Mapping[str, object]) -> None:
        chosen = choose_solver(self._example, solver, options, self._situation())
        left_open = solver is None and not self._fixed
        self._named = solver is not None
        self._solver: ConicSolver | None = None if left_open else chosen
        self._options = dict(options) if left_open else {}

    def extra_repr(self) -> str:
        solver = self._solver.name if self._solver is not None else "chosen by problem"
        return f"solver={solver}, gradient={self.gradient}"

    def _solve(
        self,
        data: ConicData,
        structure: ConicStructure,
        batch: Batch,
        solver_args: Mapping[str, object] | None,
        warm_start: WarmStart,
        explain: Explain | None = None,
    ) -> tuple[ConicPoint, CallInfo]:
        """Solve a batch, differentiably."""
        call, size = self._call_options(structure, solver_args, data.q.device), batch.batch_size
        call = call._replace(gradient=call.gradient.bound(lambda: self._readings(structure), batch.rows_of_loss))
        data, absent = without_absent_rows(structure, data, size)
        balance, known = self._balance(structure, data, batch, call, warm_start)
        problem = ConicProblem(structure, data, size) if balance is None else balance.problem(data)
        found, info = self._differentiable(problem, batch, call, warm_start, explain, known)
        if isinstance(found, RelaxedPoint):
            info.violation = found.violation(structure)
        point = ConicPoint(*found[:3])
        if balance is not None:
            point = balance.point_out(point)
        if absent is not None:
            absent = per_element(absent, size) & ~torch.isnan(point.y)
            point = point._replace(y=torch.where(absent, 0.0, point.y))
        return point, info

    def _solution(
        self,
        data: ConicData,
        structure: ConicStructure,
        batch: Batch,
        solver_args: Mapping[str, object] | None,
        warm_start: WarmStart,
    ) -> ConicSolution:
        """Solve a batch: the solver's whole answer."""
        call = self._call_options(structure, solver_args, data.q.device)
        data, _ = without_absent_rows(structure, data, batch.batch_size)
        problem = ConicProblem(structure, data, batch.batch_size)
        balance, known = self._balance(structure, data, batch, call, warm_start)
        if known is None:
            return self._plain(problem, batch, call, warm_start)
        if self.on_error == "relax":
            known = relax(known, call.solver, call.executor)
        return known if balance is None else in_own_coordinates(known, problem, balance)

    def _balance(
        self, structure: ConicStructure, data: ConicData, batch: Batch, call: CallOptions, warm_start: WarmStart
    ) -> tuple[Balance | None, ConicSolution | None]:
        """The coordinates in which a call is solved, and the solution there; None where there are no other ones.

        The solution is not relaxed yet, and what may be is in its own coordinates, in which violations are measured.
        """
        size = batch.batch_size

        def solve(problem: ConicProblem, *, cold: bool, alone: bool) -> ConicSolution:
            with threads_of(call.solver):
                start = warm_start if problem.batch_size == size and not cold else False
                return self._plain(problem, batch, call, start, relaxes=False, alone=alone)

        relaxes = self.on_error == "relax"
        return balanced(structure, data, size, solve, augmented=_is_augmented(call.gradient), relaxes=relaxes)

    def _readings(self, structure: ConicStructure) -> Sequence[Reading]:
        """How primal outputs are read off the variables of a program."""
        return [identity(structure.own, structure.n)]

    def _solver_for(self, structure: ConicStructure) -> ConicSolver | None:
        """The solver of the calls with this structure; None where one is chosen for each call."""
        return self._solver

    def _situation(self, device: torch.device | None = None) -> Situation:
        return Situation(device.type if device is not None else "cpu", _is_augmented(self.gradient))

    def _call_options(
        self, structure: ConicStructure, solver_args: Mapping[str, object] | None, device: torch.device
    ) -> CallOptions:
        layer_solver = self._solver_for(structure)
        if not solver_args and layer_solver is not None and self._fixed:
            choice = Choice(layer_solver, structure, self._situation(), self._named)
            return CallOptions(layer_solver, self.executor, self.gradient, choice)
        standard = StandardOptions.parse(solver_args) if solver_args else StandardOptions()
        situation = self._situation(device)
        if standard.solver is None:
            solver = choose_solver(structure, layer_solver, {**self._options, **standard.options}, situation)
        else:
            solver = choose_solver(structure, standard.solver, standard.options, situation)
        choice = Choice(solver, structure, situation, self._named or standard.solver is not None)
        if standard.gradient is not None:
            self._check_gradient(standard.gradient)
        return CallOptions(solver, standard.executor or self.executor, standard.gradient or self.gradient, choice)
