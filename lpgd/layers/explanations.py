"""What is wrong with the data of an element that has no solution: which tensor, which element, which row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.layers.inputs import Batch
from lpgd.problems.conic.magnitudes import INFINITE
from lpgd.problems.solution import AnySolution
from lpgd.status import Status

__all__ = ["Argument", "explanation"]

SHOWN = 3
"""How many entries a message names."""


class Argument(NamedTuple):
    """One tensor of a call.

    Args:
        name: for messages.
        tensor: (*batch, *element); one without batch dimensions is shared.
        ndim: how many dimensions it has for one element.
        absent: the infinity that means that there is no such end, 0.0 where there is none.
        only: the entries of which that is so, from where to where; None for all.
        positive: whether it must be positive, as a parameter of a geometric program.
    """

    name: str
    tensor: Tensor
    ndim: int
    absent: float = 0.0
    only: slice | None = None
    positive: bool = False


def explanation(
    listed: Callable[[], Sequence[Argument]], batch: Batch, ends: Sequence[tuple[str, str]] = ()
) -> Callable[[AnySolution, int], str]:
    """A function of a solution and an element that says what is wrong with its data, in words, or nothing.

    Args:
        listed: makes the list of the call's tensors, where it is needed.
        batch: of the call.
        ends: pairs of names of lower and upper ends.
    """

    def explain(solution: AnySolution, element: int) -> str:
        status = solution.statuses[element]
        # Within torch.func.vmap the elements are those of all lanes, whose tensors are hidden.
        if solution.batch_size != batch.batch_size or status not in (Status.INVALID_DATA, Status.INFEASIBLE):
            return ""
        arguments = listed()
        known = {argument.name: _entries(argument, batch, element) for argument in arguments}
        crossed = [(lower, upper) for lower, upper in ends if lower in known and upper in known]
        if status is Status.INFEASIBLE:
            found = [text for lower, upper in crossed for text in _crossed(lower, upper, known, element)]
        else:
            found = [text for argument in arguments for text in _invalid(argument, known[argument.name], element)]
        more = len(found) - SHOWN
        return "; ".join(found[:SHOWN]) + (f"; and {more} more" if more > 0 else "")

    return explain


def _entries(argument: Argument, batch: Batch, element: int) -> Tensor:
    """The entries of one element."""
    tensor = argument.tensor.detach()
    tensor = (tensor.to_dense() if tensor.layout is not torch.strided else tensor).double()
    place = np.unravel_index(element, batch.batch_shape) if batch.batch_shape else ()
    leading = tensor.ndim - argument.ndim
    indices = place[len(place) - leading :] if leading else ()
    return tensor[tuple(0 if size == 1 else int(index) for index, size in zip(indices, tensor.shape, strict=False))]


def _invalid(argument: Argument, entries: Tensor, element: int) -> list[str]:
    allowed = torch.zeros_like(entries, dtype=torch.bool)
    if argument.absent:
        chosen = slice(None) if argument.only is None else argument.only
        selected = entries if entries.ndim == 0 else entries[chosen]
        within = selected >= INFINITE if argument.absent > 0 else selected <= -INFINITE
        allowed = within if entries.ndim == 0 else allowed.index_put((torch.arange(len(entries))[chosen],), within)
    named = f"{argument.name} of element {element} is"
    wrong = (~torch.isfinite(entries) & ~allowed).nonzero().tolist()
    found = [f"{named} {float(entries[tuple(at)])}{_where(at)}" for at in wrong]
    signs = (entries <= 0).nonzero().tolist() if argument.positive else []
    return found + [
        f"{named} {float(entries[tuple(at)]):g}{_where(at)}, and must be positive in a geometric program"
        for at in signs
    ]


def _crossed(lower: str, upper: str, known: dict[str, Tensor], element: int) -> list[str]:
    low, high = torch.broadcast_tensors(known[lower], known[upper])
    return [
        f"{lower} of element {element} is {float(low[tuple(at)]):g}{_where(at)}, above {upper}, "
        f"which is {float(high[tuple(at)]):g}"
        for at in (low > high).nonzero().tolist()
    ]


def _where(at: list[int]) -> str:
    return f" in row {at[0]}" + "".join(f", column {column}" for column in at[1:]) if at else ""
