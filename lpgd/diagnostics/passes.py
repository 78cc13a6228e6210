"""One forward pass of a layer and a loss, and backward passes through it by any number of gradient methods.

What every diagnosis is made of: the layer is called once, as its user calls it; what its backward pass is given (the
problem, its solution, the cotangent) is kept, and the methods to compare take turns.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from lpgd.arrays import as_index
from lpgd.gradients.base import GradientInfo, GradientMethod, check_compatible
from lpgd.gradients.relaxed import vjp
from lpgd.gradients.sides import solve_tilted
from lpgd.layers.base import BaseLayer, OptimizationLayer
from lpgd.problems.base import Data, Point
from lpgd.problems.solution import AnySolution
from lpgd.solvers.base import AnySolver, ConicSolver
from lpgd.status import LpgdWarning

__all__ = ["Backward", "Leaf", "Loss", "Parameters", "Pass", "as_leaves", "collected_warnings", "inner"]

Parameters = Sequence[Any] | Mapping[str, Any]
"""The arguments of a layer's call, by position or by name."""

Loss = Callable[[Any], Tensor]
"""From a layer's output to one number, or to one for each element of the batch."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """One argument of a call that gradients are taken of.

    Attributes:
        key: its position or name.
        name: for tables.
        values: a float64 leaf of autograd; of a sparse tensor its values.
        build: from values to the argument.
    """

    key: int | str
    name: str
    values: Tensor
    build: Callable[[Tensor], Tensor]


def as_leaves(
    parameters: Parameters, names: Mapping[int | str, str] | None = None
) -> tuple[list[Leaf], list[Any], dict[str, Any]]:
    """The arguments to differentiate, and all arguments by position and by name.

    Tensors that require a gradient are differentiated; where none does, all floating-point tensors are.  Floating-point
    tensors become float64.

    Raises:
        TypeError: ``parameters`` is neither a sequence nor a mapping.
        ValueError: there is no floating-point tensor.
    """
    if isinstance(parameters, Tensor) or not isinstance(parameters, (Sequence, Mapping)):
        raise TypeError(
            f"parameters is a {type(parameters).__name__}; give the arguments of the layer's call as a list, "
            "or as a dictionary by name."
        )
    items: list[tuple[int | str, Any]]
    items = list(parameters.items()) if isinstance(parameters, Mapping) else list(enumerate(parameters))
    floating = {key: value for key, value in items if isinstance(value, Tensor) and value.is_floating_point()}
    wanted = {key for key, value in floating.items() if value.requires_grad} or set(floating)
    if not wanted:
        raise ValueError("no argument of the layer is a floating-point tensor: there is nothing to differentiate.")
    leaves, fixed = [], {}
    for key, value in items:
        if key in wanted:
            values, build = _opened(value.detach().double())
            name = (names or {}).get(key, key if isinstance(key, str) else f"argument {key}")
            leaves.append(Leaf(key, name, values.clone().requires_grad_(), build))
        fixed[key] = value.detach().double() if key in floating else value
    if isinstance(parameters, Mapping):
        return leaves, [], cast(dict[str, Any], fixed)
    return leaves, list(fixed.values()), {}


def _opened(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A tensor's values, and the way back: a sparse one keeps its pattern."""
    if tensor.layout is torch.sparse_coo:
        whole = tensor.coalesce()
        return whole.values(), lambda values: torch.sparse_coo_tensor(
            whole.indices(), values, whole.shape, is_coalesced=True, check_invariants=False
        )
    if tensor.layout is torch.sparse_csr:
        return tensor.values(), lambda values: torch.sparse_csr_tensor(
            tensor.crow_indices(), tensor.col_indices(), values, tensor.shape, check_invariants=False
        )
    if tensor.layout is torch.sparse_csc:
        return tensor.values(), lambda values: torch.sparse_csc_tensor(
            tensor.ccol_indices(), tensor.row_indices(), values, tensor.shape, check_invariants=False
        )
    return tensor, lambda values: values


@contextmanager
def collected_warnings() -> Generator[list[str]]:
    """The library's own warnings inside, each text once, in a list; others are passed on."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LpgdWarning)
        yield texts
    for item in caught:
        if not issubclass(item.category, LpgdWarning):
            warnings.warn_explicit(item.message, item.category, item.filename, item.lineno)
        elif str(item.message) not in texts:
            texts.append(str(item.message))


@dataclass
class _Seen:
    """What a backward pass was given, and what its method said."""

    method: GradientMethod | None = None
    arguments: tuple[Any, ...] = ()
    info: GradientInfo | None = None


@dataclass(frozen=True, eq=False)
class _Switch(GradientMethod):
    """Hands a backward pass on to the method that is on, or to none, and keeps what it was given.

    Args:
        rho: that of the layer's own method: which solver is chosen depends on it.
    """

    rho: float = 0.0
    seen: _Seen = field(default_factory=_Seen)

    needs: ClassVar[frozenset[str]] = frozenset()

    def vjp(
        self, solution: AnySolution, cotangent: Point, solver: AnySolver, executor: Executor | None = None
    ) -> tuple[Data, GradientInfo]:
        problem = solution.problem
        self.seen.arguments = (solution, cotangent, solver, executor)
        if self.seen.method is None:
            gradient, self.seen.info = problem.zero_gradient(), GradientInfo(self, ["probed"] * problem.batch_size)
        else:
            check_compatible(self.seen.method, problem.traits)
            gradient, self.seen.info = vjp(self.seen.method, solution, cotangent, solver, executor)
        return gradient, self.seen.info

    def jvp(self, *arguments: Any, **options: Any) -> tuple[Point, GradientInfo]:
        raise TypeError("a diagnosis has no forward mode.")


@dataclass(frozen=True, eq=False)
class Backward:
    """One backward pass.

    Attributes:
        gradients: one for each leaf, of its shape.
        info: the method's record.
        seconds: wall-clock time.
        warnings: what the library warned of.
    """

    gradients: tuple[Tensor, ...]
    info: GradientInfo
    seconds: float
    warnings: tuple[str, ...]

    @property
    def norm(self) -> float:
        return float(inner(self.gradients, self.gradients)) ** 0.5


class Pass:
    """A forward pass, and what its backward passes are given.

    Args:
        layer: any layer of this library; it is not changed.
        parameters: the arguments of its call; see :func:`as_leaves`.
        loss: from the layer's output to one number or one for each element, which are then added up.
        solver: in place of the layer's own, where that is no oracle.

    Attributes:
        leaves: what gradients are taken of.
        output: the layer's.
        losses: the loss's value: one number, or (*batch,).
        problem, solution, cotangent, solver, executor: what a gradient method is given.
        forward_seconds: wall-clock time of the layer's call.
        warnings: what the library warned of during the call.

    Raises:
        TypeError: the layer is not one of this library.
        ValueError: the loss does not depend on the layer's output, or is not a number for each element.
    """

    def __init__(self, layer: BaseLayer, parameters: Parameters, loss: Loss, solver: AnySolver | None = None) -> None:
        if not isinstance(layer, BaseLayer):
            raise TypeError(
                f"layer is a {type(layer).__name__}; it must be a layer of this library, such as lpgd.QPLayer(). "
                "lpgd.gradcheck takes any differentiable function."
            )
        layouts = getattr(layer, "parameter_layouts", ())
        names: dict[int | str, str] = {position: layout.name for position, layout in enumerate(layouts)}
        self.layer, self.loss = layer, loss
        self.leaves, self._positional, self._named = as_leaves(parameters, names)
        self._switch = _Switch(getattr(layer.gradient, "rho", 0.0))
        self._copy = copy.copy(layer)
        self._copy.executor = layer.executor
        self._copy.gradient = self._switch
        if isinstance(self._copy, OptimizationLayer) and isinstance(solver, ConicSolver):
            self._copy.solver = solver
        with collected_warnings() as texts:
            started = time.perf_counter()
            self.output = self._call([leaf.values for leaf in self.leaves])
            self.forward_seconds = time.perf_counter() - started
        self.warnings = tuple(texts)
        self._losses = self._checked_loss(loss(self.output))
        self.losses = self._losses.detach()
        self.backward(None)
        solution, self.cotangent, self.solver, self.executor = self._switch.seen.arguments
        self.problem = solution.problem
        self.solution = replace(
            solution, **{name: getattr(solution, name).detach() for name in solution.outputs._fields}
        )

    def backward(self, method: GradientMethod | None) -> Backward:
        """The gradients of the sum of the losses by a method; zero without one."""
        self._switch.seen.method = method
        with collected_warnings() as texts:
            started = time.perf_counter()
            gradients = torch.autograd.grad(
                self._losses.sum(), [leaf.values for leaf in self.leaves], retain_graph=True, materialize_grads=True
            )
            seconds = time.perf_counter() - started
        info = self._switch.seen.info
        if info is None:
            raise ValueError("the loss does not depend on the layer's output.")
        return Backward(tuple(gradient.detach() for gradient in gradients), info, seconds, tuple(texts))

    def losses_at(self, values: Sequence[Tensor]) -> Tensor:
        """The loss's value with other values of the leaves."""
        with torch.no_grad(), collected_warnings():
            return self._checked_loss(self.loss(self._call(values)), differentiable=False)

    def _call(self, values: Sequence[Tensor]) -> Any:
        positional, named = list(self._positional), dict(self._named)
        for leaf, value in zip(self.leaves, values, strict=True):
            if isinstance(leaf.key, str):
                named[leaf.key] = leaf.build(value)
            else:
                positional[leaf.key] = leaf.build(value)
        return self._copy(*positional, **named)

    def _checked_loss(self, value: Any, differentiable: bool = True) -> Tensor:
        if not isinstance(value, Tensor):
            raise TypeError(f"the loss returned a {type(value).__name__}; it must return a tensor.")
        batch_shape = tuple(getattr(self.output, "batch_shape", value.shape))
        if value.ndim and tuple(value.shape) != batch_shape:
            raise ValueError(
                f"the loss has shape {tuple(value.shape)}; it must be one number, or one for each element of the "
                f"batch: {batch_shape}."
            )
        if differentiable and not value.requires_grad:
            raise ValueError(
                "the loss does not depend on the layer's output (is something detached, or computed in NumPy?)."
            )
        return value

    def perturbed(self, tau: Tensor, rho: float, sign: float, tolerance: float | None = None) -> Any:
        """The solutions of ``L + sign τ <g, z> + (ρ/2) |x - x*|²``.

        Args:
            tau: (B,) steps.
            rho: ρ ≥ 0.
            sign: 1 for the lower envelope, -1 for the upper one.
            tolerance: at most this one of the solver; None is its own.
        """
        solver = self.solver if tolerance is None else self.solver.with_tolerance(tolerance)
        augmented = self.problem.augment(rho, self.solution.x)
        return solve_tilted(augmented, self.cotangent, sign * tau, self.solution.states, solver, self.executor)

    def perturbed_path(self, element: int, steps: Tensor, rho: float) -> Any:
        """The solutions of one element for many signed steps, solved as one batch."""
        row = as_index([element], self.solution.x.device)
        problem, solution, cotangent = self.problem.select(row), self.solution.select(row), self.cotangent.select(row)
        augmented = problem.augment(rho, solution.x)
        return solve_tilted(augmented, cotangent, steps.to(solution.x), solution.states, self.solver, self.executor)

    def natural_size(self, leaf: Leaf) -> float:
        """The norm that a gradient has where a relative change of a parameter makes an equal one of the solution."""
        seen = zip(self.cotangent, self.solution.outputs, strict=False)  # of a node's point, losses see x alone
        sizes = [float((g * output.nan_to_num()).norm()) for g, output in seen]
        floor = 1e-3 * sum(float(tensor.norm()) for tensor in self.cotangent)
        return (sum(sizes) + floor) / (float(leaf.values.detach().norm()) or 1.0)

    @property
    def concerned(self) -> Tensor:
        """(B,) elements whose loss gradient is more than an interior-point solver's rounding of the largest one."""
        sizes = torch.stack([tensor.abs().amax(-1) for tensor in self.cotangent if tensor.shape[-1]]).amax(0)
        return sizes > 1e-6 * sizes.max() if sizes.numel() else sizes > 0

    @property
    def unit(self) -> Tensor:
        """(B,) the step at which the loss gradient is as large as what it is added to; infinite where it is zero."""
        return torch.where(self.concerned, self.problem.tilt_unit(self.solution.point, self.cotangent), torch.inf)


def inner(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The inner product of two gradients."""
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
