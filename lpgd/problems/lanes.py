"""What ``torch.func.vmap`` maps over, as one more batch dimension: N lanes of B elements are one batch, lane by lane.

A tensor of a call (a datum, a cotangent, an output) has a number of dimensions for one element; before those it has one
row for each element, or R rows, R dividing B, or none where all elements of a lane share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from lpgd.arrays import IntArray, from_numpy
from lpgd.problems.base import MappedProblem
from lpgd.problems.solution import AnySolution

__all__ = ["Lanes", "QuickFunction", "Source", "joined", "mapped", "over_vectors", "separated", "summed"]

LARGEST = 1 << 24
"""How many entries of data a batch of lanes may have, where each lane has a derivative of one solution of its own."""


def joined(tensor: Tensor, dim: int | None, lanes: int, size: int, ndim: int, *, whole: bool = True) -> Tensor:
    """A tensor of all lanes as one of the batch of lanes x size elements.

    Args:
        tensor: with the lanes as its dimension ``dim``; the same in every lane for None.
        lanes, size: N and B.
        ndim: number of dimensions of one element's entries.
        whole: one row for each element; else only where lanes differ.
    """
    if dim is None and not whole:
        return tensor
    moved = tensor.expand(lanes, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    if moved.ndim == 1 + ndim:
        if size == 1:
            return moved
        moved = moved.unsqueeze(1)
    period, element = moved.shape[1], moved.shape[2:]
    copies = size // max(period, 1)
    if copies == 1:
        return moved.reshape(lanes * size, *element)
    return moved.unsqueeze(1).expand(lanes, copies, period, *element).reshape(lanes * size, *element)


def separated(tensor: Tensor, lanes: int) -> Tensor:
    """(N B, ·) to (N, B, ·)."""
    return tensor.reshape(lanes, tensor.shape[0] // lanes, *tensor.shape[1:])


def summed(gradient: Tensor, shape: tuple[int, ...], lanes: int, size: int, ndim: int) -> Tensor:
    """The gradient of a datum, (N B, ·), as that of the datum of each lane, which has the shape ``shape`` there."""
    element = gradient.shape[gradient.ndim - ndim :]
    if len(shape) == ndim:
        return gradient.reshape(lanes, size, *element).sum(1)
    return gradient.reshape(lanes, size // max(shape[0], 1), shape[0], *element).sum(1)


def mapped(problem: object) -> MappedProblem[Any, Any]:
    """The problem, of a class that can be mapped over.

    Raises:
        RuntimeError: it is of another class.
    """
    if not hasattr(problem, "lanes"):
        raise RuntimeError(
            f"{type(problem).__name__} has no lanes(count, data), which torch.func.vmap needs: call the layer with "
            "tensors that have batch dimensions instead."
        )
    return cast(MappedProblem[Any, Any], problem)


@dataclass(frozen=True, eq=False)
class Source:
    """The solution that a derivative is taken of, or copies of its elements: which ones, and nothing done yet.

    Transforms of ``torch.func`` around the lanes would lay hands on every tensor that is touched before
    :meth:`resolved` is called, where none of them is active any more.

    Attributes:
        solution: of B elements.
        index: the elements; None for all of them.
        unshared: which data have a row for each element, and with them their gradient.
    """

    solution: AnySolution
    index: IntArray | None = None
    unshared: frozenset[int] = frozenset()

    @property
    def size(self) -> int:
        """How many elements there are."""
        return self.solution.batch_size if self.index is None else self.index.size

    def repeated(self, count: int, size: int) -> Source:
        """``count`` copies of each ``size`` elements, one copy after the other; more of them belong to lanes around."""
        index = np.arange(self.size) if self.index is None else self.index
        outer = index.size // size if size else 1
        copies = np.broadcast_to(index.reshape(outer, 1, size), (outer, count, size))
        return replace(self, index=copies.reshape(-1).copy())

    def with_rows(self, data: frozenset[int]) -> Source:
        """The same with a row for each element of these data."""
        return replace(self, unshared=data)

    def resolved(self) -> AnySolution:
        """The solution of a batch of problems."""
        solution, index = self.solution, self.index
        if index is not None:
            elements, chosen = np.arange(solution.batch_size), from_numpy(index).to(solution.x.device)
            count = index.size // max(elements.size, 1)
            if np.array_equal(index, np.tile(elements, count)):
                problem = mapped(solution.problem).lanes(count, solution.problem.data)
                solution = solution.select(chosen, problem)
            else:
                solution = solution.select(chosen)
        if self.unshared:
            problem = mapped(solution.problem)
            data = [
                joined(datum, None, 1, problem.batch_size, ndim) if place in self.unshared else datum
                for place, (datum, ndim) in enumerate(zip(problem.data, problem.datum_ndims, strict=True))
            ]
            solution = replace(cast(Any, solution), problem=problem.with_data(problem.data._make(data)))
        return solution


@dataclass(frozen=True)
class Lanes:
    """The lanes of one derivative.

    Args:
        count: N.
        source: what a derivative is taken of.
        tensors: cotangents or tangents, and what else the derivative is a function of; at last the outputs.
        dims: where each tensor has its lanes, or None.
        kinds: the number of dimensions of one element of each tensor.
        whole: whether each tensor must have one row for each element.
    """

    count: int
    source: Source
    tensors: Sequence[Tensor]
    dims: Sequence[int | None]
    kinds: Sequence[int]
    whole: Sequence[bool]

    @property
    def is_solved(self) -> bool:
        """Whether the solution has these lanes; else every lane has a derivative of the one solution."""
        return self.dims[-1] is not None

    @property
    def size(self) -> int:
        """How many elements a lane has, as far as is seen from here: in lanes around these there may be more."""
        return self.tensors[-1].shape[0 if self.dims[-1] != 0 else 1]

    def chunks(self) -> list[Lanes]:
        """The lanes in chunks that fit into memory."""
        entries = sum(datum.numel() for datum in self.source.solution.problem.data)
        most = max(1, LARGEST // max(entries, 1))
        if self.is_solved or self.count <= most:
            return [self]
        return [self._chunk(start, min(most, self.count - start)) for start in range(0, self.count, most)]

    def _chunk(self, start: int, count: int) -> Lanes:
        tensors = [
            tensor if dim is None else tensor.narrow(dim, start, count)
            for tensor, dim in zip(self.tensors, self.dims, strict=True)
        ]
        return replace(self, count=count, tensors=tensors)

    def batch(self) -> tuple[Source, list[Tensor]]:
        """The source and the tensors as those of one batch."""
        arguments = zip(self.tensors, self.dims, self.kinds, self.whole, strict=True)
        tensors = [
            joined(tensor, dim, self.count, self.size, ndim, whole=whole) for tensor, dim, ndim, whole in arguments
        ]
        return self.source if self.is_solved else self.source.repeated(self.count, self.size), tensors

    def gradient(self, gradients: Sequence[Tensor], needed: frozenset[int]) -> tuple[Tensor, ...]:
        """The gradient of the data of all lanes, with a row for each element, as (N, own shape) of each lane's data."""
        count, answer = len(gradients), []
        first = len(self.tensors) - len(self.source.solution.outputs) - count
        for place, gradient in enumerate(gradients):
            datum, dim, ndim = self.tensors[first + place], self.dims[first + place], self.kinds[first + place]
            shape = tuple(datum.shape) if dim is None else tuple(datum.movedim(dim, 0).shape[1:])
            if place in needed:
                answer.append(summed(gradient, shape, self.count, self.size, ndim))
            else:
                answer.append(gradient.new_zeros(()).expand(self.count, *shape))
        return tuple(answer)


_torch: Any = torch
_transforms_are_active: Callable[[], bool] = cast(Any, torch._C)._are_functorch_transforms_active
_is_legacy: Callable[[Tensor], bool] = cast(Any, torch._C)._functorch.is_legacy_batchedtensor


class QuickFunction(torch.autograd.Function):
    """An autograd Function with ``setup_context`` that is applied to positional arguments only, all of them given.

    ``torch.autograd.Function.apply`` binds its arguments to the signature first, which takes as long as a small
    layer's arithmetic (torch 2.13).
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """As torch's; where nothing can be differentiated, nor mapped over, ``forward`` alone."""
        if _transforms_are_active():
            return super().apply(*arguments)
        known = unwrap_dead_wrappers(arguments)
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return cls.forward(*known)
        single: Any = super(torch.autograd.Function, cls)
        return single.apply(*known)  # the one of one level, which torch's ends with


def over_vectors(function: Any, head: tuple[Any, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``function.apply(*head, *tensors)``, for all vectors at once that ``is_grads_batched`` maps over.

    That is another mechanism than ``torch.func.vmap``: it hands tensors with a hidden dimension to backward passes,
    asks for no rule, and knows few operations (torch 2.13).  The rule for lanes does what it should.
    """
    hidden = [_is_legacy(tensor) for tensor in tensors]
    if True not in hidden:
        return function.apply(*head, *tensors)
    level = _torch._C._vmapmode_increment_nesting() - 1
    _torch._C._vmapmode_decrement_nesting()
    # The third argument is for tensors without such a dimension.
    shown = [
        _torch._remove_batch_dim(tensor, level, 0, 0) if is_hidden else tensor
        for tensor, is_hidden in zip(tensors, hidden, strict=True)
    ]
    lanes = next(tensor.shape[0] for tensor, is_hidden in zip(shown, hidden, strict=True) if is_hidden)
    dims = (*(None for _ in head), *(0 if is_hidden else None for is_hidden in hidden))
    _torch._C._vmapmode_decrement_nesting()
    try:
        answer, _ = function.vmap(_Lanes(lanes), dims, *head, *shown)
    finally:
        _torch._C._vmapmode_increment_nesting()
    return tuple(_torch._add_batch_dim(tensor, 0, level) for tensor in answer)


class _Lanes(NamedTuple):
    """What a rule is told of its lanes."""

    batch_size: int
