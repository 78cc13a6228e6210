"""What layers over a plain callable share: costs and extra inputs of any shape become a LinearProblem."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, cast

import numpy as np
from torch import Tensor

from lpgd.arrays import is_differentiated
from lpgd.autograd import CallInfo
from lpgd.gradients import GradientMethod
from lpgd.layers.base import BaseLayer, CallOptions, Recorded, WarmStart
from lpgd.layers.inputs import Batch, Expected, check_inputs
from lpgd.problems.base import Traits
from lpgd.problems.linear import LinearData, LinearProblem, LinearSolution, LinearStructure
from lpgd.solvers.failures import OnError
from lpgd.solvers.oracle import Oracle

__all__ = ["Arguments", "OracleLayer", "TensorOutput", "record"]

if TYPE_CHECKING:

    class TensorOutput(Tensor, Recorded):
        """A tensor with the record of its call."""
else:
    TensorOutput = Tensor  # with attributes of its own


class Arguments(NamedTuple):
    """The arguments of a call as a batch of linear problems."""

    c: Tensor  # (B, n) in float64
    structure: LinearStructure
    batch: Batch
    extra: tuple[Any, ...]
    oracle: Oracle


class OracleLayer(BaseLayer):
    """A layer whose solver is an oracle.

    Args:
        oracle: the solver.
        ndim: how many dimensions the costs of one element have; None: a vector is one element, and of anything else the
            first dimension is the batch.
        gradient, on_error, executor, progress: see the layers.
    """

    _oracle: Oracle
    _choice: ClassVar[str] = "the function that was given."
    ndim: int | None

    def __init__(
        self,
        oracle: Oracle,
        ndim: int | None,
        gradient: GradientMethod | None,
        on_error: OnError,
        executor: Executor | None,
        progress: bool = False,
    ) -> None:
        if gradient is None:
            raise TypeError(
                "a solver that is a plain function has no exact gradient to fall back on: give a method, such as "
                "gradient=lpgd.BlackboxBackprop(tau=20.0) or gradient=lpgd.LPGD(tau=1.0)."
            )
        if ndim is not None and ndim < 0:
            raise ValueError(f"ndim is {ndim}; it is the number of dimensions of one element's costs, or None.")
        self._oracle, self.ndim = oracle, ndim  # before the gradient method is checked against the oracle
        super().__init__(gradient, on_error, executor, progress)

    @property
    def solver(self) -> Oracle:
        """The callable, and how it is called."""
        return self._oracle

    def _traits(self) -> Traits:
        return LinearStructure(()).traits

    def _check_gradient(self, method: GradientMethod) -> None:
        super()._check_gradient(method)
        if "can_augment" in method.required and not self.solver.quadratic:
            raise TypeError(
                f"{method} adds a quadratic term (rho > 0), which this solver does not take: use rho=0, or a solver "
                "that minimises <c, x> + (rho/2) |x - center|² and is declared with quadratic=True."
            )

    def extra_repr(self) -> str:
        function = self.solver.function
        return f"solver={getattr(function, '__name__', function)}, gradient={self.gradient}"

    def _batch(self, name: str, costs: Tensor) -> tuple[LinearStructure, Batch]:
        """Which dimensions of the costs are the batch, and what the others are."""
        if isinstance(costs, Tensor):
            leading = min(1, costs.ndim - 1) if self.ndim is None else costs.ndim - self.ndim
            if leading < 0:
                raise ValueError(
                    f"{name} has shape {tuple(costs.shape)}; expected (*batch, {self.ndim or 1} dimensions of costs)."
                )
        else:
            leading = 0  # refused below
        shape = tuple(costs.shape[leading:]) if isinstance(costs, Tensor) else ()
        return LinearStructure(shape), check_inputs([Expected(name, shape)], [costs])

    def _call(self, arguments: Arguments, warm_start: WarmStart) -> tuple[Tensor, CallInfo]:
        """Solve, differentiably: x (B, n) and the record."""
        point, info = self._differentiable(*self._problem(arguments), warm_start)
        return point.x, info

    def _answer(self, arguments: Arguments, warm_start: WarmStart) -> LinearSolution:
        """The solver's whole answer, not differentiable."""
        return self._plain(*self._problem(arguments), warm_start)

    def _problem(self, arguments: Arguments) -> tuple[LinearProblem, Batch, CallOptions]:
        c, structure, batch, extra, oracle = arguments
        problem = LinearProblem(structure, LinearData(c), batch.batch_size, extra)
        return problem, batch, CallOptions(oracle, self.executor, self.gradient, self._choice)

    @staticmethod
    def _by_element(name: str, values: Any, batch: Batch) -> Any:
        """An extra input with one row for each element of the flattened batch.

        Raises:
            TypeError: it has no rows.
            ValueError: it has not as many as there are elements, or requires a gradient.
        """
        shape, size = batch.batch_shape, batch.batch_size
        if isinstance(values, Tensor | np.ndarray):
            if isinstance(values, Tensor) and is_differentiated(values):
                raise ValueError(f"{name} requires a gradient, which it would not get: pass {name}.detach().")
            if tuple(values.shape[: len(shape)]) != shape:
                raise ValueError(f"{name} has shape {tuple(values.shape)}; expected {_wanted(shape)}.")
            values = values.detach() if isinstance(values, Tensor) else values
            return values.reshape(size, *values.shape[len(shape) :])
        if not shape:
            return [values]
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise TypeError(
                f"{name} is a {type(values).__name__}; expected a tensor or array {_wanted(shape)} or a sequence of "
                f"{size}. What all elements share belongs into the solver (functools.partial)."
            )
        if len(values) != size:
            raise ValueError(f"{name} has {len(values)} entries; the batch has {size} elements.")
        return values


def _wanted(shape: tuple[int, ...]) -> str:
    return "(" + ", ".join(map(str, shape)) + ", ...), a row for each element"


def record(output: Tensor, info: CallInfo, batch: Batch) -> TensorOutput:
    """The output with the record of its call as attributes ``info`` and ``batch_shape``, as other outputs have.

    What is saved of it is the tensor alone, so that it loads under ``weights_only=True``: torch asks the tensor itself
    for its state (torch 2.13), and there is none.
    """
    vars(output).update(info=info, batch_shape=batch.batch_shape, __getstate__=dict)
    return cast(TensorOutput, output)
