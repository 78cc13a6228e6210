"""A node of the user's own: an objective and constraints as functions of one element, and perhaps a solver."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from lpgd.arrays import first_lane, flags, may_be_followed
from lpgd.nodes.base import BaseNode, NodeAnswer
from lpgd.nodes.captured import refuse_captured
from lpgd.status import Status

__all__ = ["Node"]

Function = Callable[..., Any]

_UNBATCHABLE = ("vmap", "have storage", ".item()", "data-dependent")
"""What messages of PyTorch say of functions that it cannot batch (2.13)."""


class Node(BaseNode):
    """A declarative node: ``argmin over y of f(*inputs, y)  subject to  h(*inputs, y) = 0, g(*inputs, y) ≤ 0``.

    The functions are those of one element, in torch operations on their arguments alone; the library batches them
    (``torch.func.vmap``), so they must not branch on values (use ``torch.where``).

    Args:
        objective: ``objective(*inputs, y)``, a scalar.
        equality: ``equality(*inputs, y)``, any number of values that shall be zero, or None.
        inequality: ``inequality(*inputs, y)``, any number of values that shall be at most zero, or None.
        solve: ``solve(*inputs)``, or ``solve(*inputs, start=...)`` with an earlier solution or None: your own solver,
            from detached tensors to y (a tensor, an array, or numbers), or None or a :class:`~lpgd.Status` where there
            is no solution.  Not given, the generic ones of :class:`~lpgd.NodeSolver` minimise.
        shape: of y: a tuple, a function of the inputs' shapes, or None for that of the first input.
        ndims: how many dimensions each input has for one element, one number for each or one for all; the dimensions
            before them are the batch.
        initial: ``initial(*inputs)``, the y where generic solvers start; not given, it is zero.
        batched: all of these functions, ``solve`` too, take whole batches: inputs (B, ...) and y (B, ...), objectives
            (B,).
        name: for messages.

    A feasibility problem has a constant objective (``(0 * y).sum()``).  A tensor that requires a gradient and is used
    by a function without being one of its arguments would silently lose it: that is refused when the layer is called.

    Raises:
        TypeError: a function is not callable, or has no arguments that can be counted.
        ValueError: ``ndims`` does not fit the inputs.
    """

    def __init__(
        self,
        objective: Function,
        equality: Function | None = None,
        inequality: Function | None = None,
        solve: Function | None = None,
        *,
        shape: Sequence[int] | Callable[..., Sequence[int]] | None = None,
        ndims: int | Sequence[int] = 1,
        initial: Function | None = None,
        batched: bool = False,
        name: str | None = None,
    ) -> None:
        functions = {"objective": objective, "equality": equality, "inequality": inequality}
        for role, function in {**functions, "solve": solve, "initial": initial}.items():
            if not (callable(function) or (function is None and role != "objective")):
                raise TypeError(f"{role} is {function!r}; it must be a function.")
        self._functions, self._solve, self._initial = functions, solve, initial
        self._shape, self._batched = shape, batched
        names = _input_names(objective)
        dimensions = (ndims,) * len(names) if isinstance(ndims, int) else tuple(ndims)
        if len(dimensions) != len(names) or any(ndim < 0 for ndim in dimensions):
            raise ValueError(
                f"ndims is {ndims}; type one number for each of the inputs {', '.join(names)}, such as "
                f"ndims={(1,) * len(names)}: 0 for a number, 1 for a vector, 2 for a matrix."
            )
        self._inputs = dict(zip(names, dimensions, strict=True))
        self.name = name or str(getattr(objective, "__name__", type(objective).__name__))
        self.is_exact = solve is None
        self._takes_start = solve is not None and "start" in inspect.signature(solve).parameters

    @property
    def inputs(self) -> Mapping[str, int]:
        return self._inputs

    @property
    def has_solver(self) -> bool:
        """Whether it was given a solver of its own."""
        return self._solve is not None

    def __repr__(self) -> str:
        given = [role for role, function in self._functions.items() if function is not None]
        return f"Node({self.name}: {', '.join(given)}{', solve' if self._solve is not None else ''})"

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        if self._shape is None:
            return shapes[0]
        shape = self._shape
        if callable(shape):
            with self._explained("shape", shapes):
                shape = shape(*shapes)
        if not isinstance(shape, Sequence) or not all(isinstance(size, int) and size >= 0 for size in shape):
            raise TypeError(f"the shape of y of {self.name} is {shape!r}; it must be a tuple, as (3,).")
        return tuple(shape)

    def about_shape(self, shape: tuple[int, ...]) -> str:
        if self._shape is not None:
            return ""
        return (
            f" Since shape= was not given, y has the shape of the first input, {shape}: if it should have another one, "
            "with fewer entries, type it: Node(..., shape=(k,)) for k entries."
        )

    def about_ndims(self, name: str) -> str:
        fewer = {**self._inputs, name: max(self._inputs[name] - 1, 0)}
        return (
            f" If it should have fewer, type so: Node(..., ndims={tuple(fewer.values())}), in the order "
            f"{', '.join(fewer)}."
        )

    def arrange(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Refuse functions that use tensors whose gradient would be lost."""
        if may_be_followed() and all(tensor.numel() for tensor in inputs):
            self._check_captured(inputs)
        return inputs

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        value = cast(Tensor, self._call("objective", y, inputs))
        if value.shape[1:].numel() != 1:
            found = tuple(value.shape[1:])
            raise ValueError(f"the objective of {self.name} has shape {found} for one element; it must be a scalar.")
        return value.reshape(y.shape[0])

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        return self._call("equality", y, inputs)

    def inequality(self, y: Tensor, *inputs: Tensor) -> Tensor | None:
        return self._call("inequality", y, inputs)

    def _call(self, role: str, y: Tensor, inputs: tuple[Tensor, ...]) -> Tensor | None:
        function = self._functions[role]
        if function is None:
            return None
        if self._batched:
            with self._explained(role, [tensor.shape for tensor in (*inputs, y)]):
                value = function(*inputs, y)
            value = self._checked(role, value)
            if value.shape[:1] != y.shape[:1]:
                raise ValueError(
                    f"the {role} of {self.name} has shape {tuple(value.shape)} for a batch of {y.shape[0]}; with "
                    "batched=True each value has a row for each element: sum over the last dimensions only."
                )
            return value
        if not y.shape[0]:
            return y.new_zeros(0, 1)

        def one(*arguments: Tensor) -> Tensor:
            with self._explained(role, [tensor.shape for tensor in arguments]):
                value = function(*arguments)
            return self._checked(role, value)

        try:
            return torch.func.vmap(one)(*inputs, y)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _UNBATCHABLE):
                raise
            raise RuntimeError(
                f"the {role} of {self.name} cannot be batched by torch.func.vmap ({str(error).splitlines()[0]}): use "
                "torch.where in the place of branches on values, torch functions in the place of NumPy's, and no "
                ".item(); or write it for whole batches, with Node(..., batched=True)."
            ) from error

    @contextmanager
    def _explained(self, role: str, shapes: Sequence[tuple[int, ...]]) -> Generator[None]:
        """What a function of the user's raises gets a note with the shapes that it was called with."""
        try:
            yield
        except Exception as error:
            names = (*self.inputs, "y")
            given = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(names, shapes, strict=False))
            whole = self._batched and role != "shape"
            error.add_note(
                f"In the {role} of {self.name}, called for {'a batch' if whole else 'one element'} with {given}. "
                f"If an input should have other dimensions, type Node(..., ndims=(...)) with one number for each of "
                f"{', '.join(self._inputs)}: 0 for a number, 1 for a vector, 2 for a matrix; here they are "
                f"{tuple(self._inputs.values())}. If y should have another shape, type Node(..., shape=(...))"
                f"{', for without it y has that of the first input' if self._shape is None else ''}."
            )
            raise

    def _checked(self, role: str, value: Any) -> Tensor:
        """What a function returned.

        Raises:
            TypeError: it is no tensor of floating-point numbers.
        """
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the {role} of {self.name} returned a {type(value).__name__}; it must return a tensor "
                "(torch.stack makes one of several)."
            )
        if not value.is_floating_point():
            raise TypeError(
                f"the {role} of {self.name} returned {value.dtype} values; it must return floating-point numbers "
                "(no comparison: y - 1 for y <= 1)."
            )
        return value

    def initial(self, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        if self._initial is None:
            return super().initial(shape, *inputs)
        if self._batched:
            start = torch.as_tensor(self._initial(*inputs)).to(inputs[0])
        else:
            starts = [torch.as_tensor(self._initial(*element)) for element in zip(*inputs, strict=True)]
            start = torch.stack(starts).to(inputs[0]) if starts else super().initial(shape, *inputs)
        if tuple(start.shape[1:]) != shape:
            raise ValueError(f"initial of {self.name} has shape {tuple(start.shape[1:])}; y has shape {shape}.")
        return start

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer | None:
        if self._solve is None:
            return None
        inputs = tuple(tensor.clone() for tensor in inputs)  # a user's function may do with its arguments what it likes
        shape = self.variable_shape(*(tuple(tensor.shape[1:]) for tensor in inputs))
        size = inputs[0].shape[0]
        if self._batched:
            y = self._tensor(self._solve(*inputs, **({"start": start} if self._takes_start else {})), inputs[0])
            if tuple(y.shape) != (size, *shape):
                raise ValueError(
                    f"the solver of {self.name} answered shape {tuple(y.shape)}; with batched=True y has shape "
                    f"{(size, *shape)} here."
                )
            known = flags(torch.isfinite(y).reshape(size, math.prod(shape)).all(-1))
            statuses = [Status.SOLVED if fine else Status.NO_SOLUTION for fine in known]
            return NodeAnswer(y, statuses, torch.zeros(size))
        solutions, statuses = [], []
        for element, row in enumerate(zip(*inputs, strict=True)):
            options = {"start": None if start is None else start[element].clone()} if self._takes_start else {}
            y, status = self._read(self._solve(*row, **options), shape, element, inputs[0])
            solutions.append(y)
            statuses.append(status)
        y = torch.stack(solutions) if solutions else inputs[0].new_zeros(0, *shape)
        return NodeAnswer(y, statuses, torch.zeros(size))

    def _read(self, answer: Any, shape: tuple[int, ...], element: int, like: Tensor) -> tuple[Tensor, Status]:
        if answer is None or isinstance(answer, Status):
            status = Status.NO_SOLUTION if answer is None else answer
            if status.usable:
                raise ValueError(
                    f"the solver of {self.name} answered {status.name} for element {element}, without a y."
                )
            return like.new_full(shape, torch.nan), status
        y = self._tensor(answer, like)
        if tuple(y.shape) != shape:
            raise ValueError(
                f"the solver of {self.name} answered shape {tuple(y.shape)} for element {element}; y has shape {shape}."
            )
        return y.clone(), Status.SOLVED if torch.isfinite(y).all() else Status.NO_SOLUTION

    def _tensor(self, answer: Any, like: Tensor) -> Tensor:
        try:
            return torch.as_tensor(answer).detach().to(like)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"the solver of {self.name} answered {type(answer).__name__}; it must answer y: a tensor, an array, or "
                "numbers."
            ) from error

    def _check_captured(self, inputs: tuple[Tensor, ...]) -> None:
        """Evaluate once with detached arguments: a result that still requires a gradient has it from elsewhere.

        Raises:
            ValueError: with the names that lead to such tensors, where they can be found.
        """
        row = tuple(
            first_lane(tensor)[(0,) * (tensor.ndim - ndim)]
            for tensor, ndim in zip(inputs, self.inputs.values(), strict=True)
            if tensor.ndim >= ndim
        )
        if len(row) < len(inputs):
            return  # too few dimensions, which the layer refuses
        y = row[0].new_zeros(self.variable_shape(*(tuple(tensor.shape) for tensor in row)))
        if self._batched:
            row, y = tuple(tensor[None] for tensor in row), y[None]
        for role, function in self._functions.items():
            if function is None:
                continue
            with self._explained(role, [tensor.shape for tensor in (*row, y)]):
                value = function(*row, y)
            refuse_captured(f"the {role} of {self.name}", function, [value], "an input of the node")


def _input_names(objective: Function) -> tuple[str, ...]:
    """The names of all arguments but the last, which is y."""
    function = objective.forward if isinstance(objective, torch.nn.Module) else objective
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise TypeError(f"the arguments of {objective!r} cannot be read; write objective(*inputs, y).") from error
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"the objective takes *{parameter.name}; name its arguments, the inputs first and y last.")
        if parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
            names.append(parameter.name)
    if len(names) < 2:
        raise TypeError(f"the objective takes {len(names)} arguments; it must take at least one input, and y last.")
    return tuple(names[:-1])
