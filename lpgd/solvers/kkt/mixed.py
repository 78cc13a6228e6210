"""Systems of optimality conditions of a batch that were factorised apart from each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lpgd.arrays import FloatArray
from lpgd.solvers.kkt.schur import Change, System

__all__ = ["MixedSystem", "Part"]


class Part(NamedTuple):
    """The system of some ``elements`` of a batch: ``places`` of one that was made for more of them, None for all."""

    elements: Tensor
    system: System
    places: Tensor | None = None


class MixedSystem:
    """Systems of a batch, some elements in one and some in another; see :class:`System`."""

    def __init__(self, parts: Sequence[Part], count: int) -> None:
        self.parts, self.regular = parts, np.zeros(count, dtype=bool)
        self.inverse, self.condition = np.zeros((2, count))
        for elements, system, places in parts:
            for name in ("regular", "inverse", "condition"):
                values = getattr(system, name)
                getattr(self, name)[elements.numpy()] = values if places is None else values[places.numpy()]

    @property
    def entries(self) -> int:
        return sum(part.system.entries for part in self.parts)

    def solve(self, g_x: FloatArray, g_y: FloatArray, g_z: FloatArray) -> Change:
        """The change (dx, dy, dz) of the points under a tilt, (B, ·) each."""
        changes = np.empty_like(g_x), np.empty_like(g_y), np.empty_like(g_z)
        for elements, system, places in self.parts:
            chosen = elements.numpy()
            if places is None:
                found = system.solve(g_x[chosen], g_y[chosen], g_z[chosen])
            else:  # the others get a tilt of zero
                tilts = [np.zeros((len(system.regular), tilt.shape[1])) for tilt in (g_x, g_y, g_z)]
                for tilt, whole in zip(tilts, (g_x, g_y, g_z), strict=True):
                    tilt[places.numpy()] = whole[chosen]
                found = tuple(change[places.numpy()] for change in system.solve(*tilts))
            for whole, values in zip(changes, found, strict=True):
                whole[chosen] = values
        return changes
