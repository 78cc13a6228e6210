"""Rows of inequalities that are absent, as their right-hand side is +inf, of each element on its own.

For a solver such a row is ``0ᵀx ≤ 1``, or another positive number of the size of the rest: it is met, whatever x is,
with a multiplier of zero.  So the row has no gradient either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpgd.arrays import from_numpy
from lpgd.layers.concrete_values import are_surely_below, inspect_values
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.magnitudes import INFINITE
from lpgd.problems.conic.structure import ConicData, ConicStructure, per_element

__all__ = ["without_absent_rows"]


def without_absent_rows(structure: ConicStructure, data: ConicData, batch_size: int) -> tuple[ConicData, Tensor | None]:
    """The data with absent rows of the nonnegative cone made harmless, and which these are: (m,) or (R, m), or None."""
    section = structure.cones.sections["nonnegative"]
    if section.stop == section.start or are_surely_below(data.b, section, INFINITE):
        return data, None
    right_sides = data.b[..., section]
    found = [False, False]

    def look(shown: Sequence[Tensor]) -> None:
        infinite = shown[0] >= INFINITE
        found[:] = [bool(infinite.any()), infinite.ndim == 2 and bool((infinite == infinite[:1]).all())]

    if not right_sides.numel():
        return data, None
    inspect_values(look, [right_sides], [1])
    is_there, is_shared = found
    if not is_there:
        return data, None
    absent = torch.zeros_like(data.b, dtype=torch.bool)
    absent[..., section] = right_sides.detach() >= INFINITE
    size = _size(data, batch_size)
    b = data.b if data.b.ndim == size.ndim else per_element(data.b, batch_size)
    absent_rows = absent if absent.ndim == b.ndim else per_element(absent, batch_size)
    b = torch.where(absent_rows, size, b)
    if is_shared and absent.ndim == 2:
        absent = absent[0]
    entries = absent[..., from_numpy(structure.constraint.rows).to(absent.device)]
    A = data.A
    if entries.ndim == 2 and A.ndim == 2 and len(entries) != len(A):
        entries, A = per_element(entries, batch_size), per_element(A, batch_size)
    return data._replace(A=torch.where(entries, 0.0, A), b=b), absent


def _size(data: ConicData, batch_size: int) -> Tensor:
    """(1,) or (B, 1) how large the right-hand sides and bounds are that there are; 1 where there are none."""
    vectors = [vector.detach() for vector in (data.b, data.lower, data.upper) if vector.shape[-1]]
    sizes = [maximum_norm(torch.where(vector.abs() < INFINITE, vector, 0.0))[..., None] for vector in vectors]
    if any(size.ndim == 2 for size in sizes):
        sizes = [per_element(size, batch_size) for size in sizes]
    largest = torch.stack(sizes).amax(0)
    return torch.where(largest > 0, largest, 1.0)
