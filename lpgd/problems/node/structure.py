"""What a batch of a declarative node's problems is made of: shapes, inputs, and points."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast

from torch import Tensor

from lpgd.nodes.base import BaseNode
from lpgd.problems.base import PointOperations, Traits

__all__ = [
    "NodeOutput",
    "NodePoint",
    "NodeStructure",
    "input_class",
]


class NodeOutput(NamedTuple("_NodeOutput", [("x", Tensor)]), PointOperations):
    """What losses see of the solutions: minimisers, (B, n) flattened; also their cotangent or tangent."""

    __slots__ = ()


class _NodePointFields(NamedTuple):
    x: Tensor  # (B, n)
    nu: Tensor  # (B, p)
    lam: Tensor  # (B, r)


class NodePoint(_NodePointFields, PointOperations):
    """Minimisers and multipliers of a batch; also a tangent of them."""

    __slots__ = ()


@dataclass(frozen=True)
class NodeStructure:
    """What is fixed while the inputs change.

    Args:
        node: what is minimised.
        shapes: of the inputs of one element.
    """

    node: BaseNode
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of one element's y."""
        return tuple(self.node.variable_shape(*self.shapes))

    @cached_property
    def n(self) -> int:
        """Number of variables."""
        return math.prod(self.shape)

    @property
    def traits(self) -> Traits:
        """What problems of this node can do: it says itself whether it has optimality conditions."""
        return self._traits

    @cached_property
    def _traits(self) -> Traits:
        conditions = "node" if self.node.has_kkt else ""
        return Traits(self.node.name, conditions=conditions, is_smooth=True, is_local=True)

    @property
    def digest(self) -> bytes:
        """A fingerprint of name and shapes: solutions of such problems can start each other."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        return repr((self.node.name, self.shapes, self.shape)).encode()

    @property
    def summary(self) -> str:
        """Its sizes in words."""
        return f"{self.node.name}: inputs {', '.join(map(str, self.shapes))} and a solution of shape {self.shape}"


@lru_cache(maxsize=256)
def input_class(names: tuple[str, ...]) -> type[Any]:
    """The named tuple of a node's inputs; also of their gradients and tangents."""
    fields = cast(Any, namedtuple("NodeData", names, rename=True))  # pyright: ignore[reportUntypedNamedTuple]  # inputs differ by node
    return type("NodeData", (fields,), {"__slots__": (), "__reduce__": _reduce, "__module__": __name__})


def _reduce(data: Any) -> tuple[Any, ...]:
    return _restore, (data._fields, tuple(data))


def _restore(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> Any:
    return input_class(names)(*tensors)
