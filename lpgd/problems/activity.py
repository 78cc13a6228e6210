"""Which constraints of a conic program are active at a point, and how clearly, in the problem's own units."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lpgd.problems.conic import ConicProblem
from lpgd.problems.structure import ConicPoint
from lpgd.regions import regions

__all__ = ["ActiveSet", "active_set"]


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The active sets of B elements: for each row of A, upper and lower bound the piece that ``v = y - s`` lies in.

    Attributes:
        place: (B, k) v, in units of the problem; for bounds the multiplier less the slack.
        piece: (B, k) see :func:`lpgd.regions.regions`; bounds have the sign of v.
        depth: (B, k) how far v is from another piece.
        block: (k,) the cone that an entry belongs to; None where each is its own.
        is_vertex: the solution is that of a linear program: with the same active set it is the same one.
    """

    place: Tensor
    piece: Tensor
    depth: Tensor
    block: Tensor | None
    is_vertex: bool

    def select(self, rows: Tensor) -> ActiveSet:
        """The active sets of these elements."""
        return replace(self, place=self.place[rows], piece=self.piece[rows], depth=self.depth[rows])

    def where(self, chosen: Tensor, other: ActiveSet) -> ActiveSet:
        """These for the elements ``chosen`` (B,), the other ones elsewhere."""
        names = ("place", "piece", "depth")
        parts = {name: torch.where(chosen[:, None], getattr(self, name), getattr(other, name)) for name in names}
        return replace(self, **parts)

    def differs(self, other: ActiveSet, noise: Tensor) -> Tensor:
        """(B, k) where the pieces are others, by a change of v of more than ``noise`` (B,)."""
        # Most active sets are equal, which needs no distances.
        unequal = self.piece != other.piece
        return unequal & (self._distance(other) > noise[:, None]) if unequal.any() else unequal

    def crossing(self, other: ActiveSet, noise: Tensor) -> Tensor:
        """(B,) the share of the way to ``other`` after which an active set changes; infinite where none does.

        0 where the active set is not clear here, within the noise.
        """
        differs = self.differs(other, noise)
        if not differs.any():
            return torch.full_like(noise, torch.inf)
        share = torch.where(self.depth > noise[:, None], self.depth, 0.0) / self._distance(other)
        return torch.where(differs, share, torch.inf).amin(-1).clamp(max=1.0)

    def _distance(self, other: ActiveSet) -> Tensor:
        change = (self.place - other.place).abs()
        if self.block is None:
            return change
        index = self.block.expand(change.shape)
        total = change.new_zeros(change.shape[0], int(self.block[-1]) + 1).scatter_add(1, index, change.square())
        return total.sqrt().gather(1, index)


def active_set(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> ActiveSet:
    """The active sets of a batch at a point (B, ·) with the slack (B, m), in the units of the problem."""
    structure, units = problem.structure, problem.units
    scaled = units.point_in(problem, point)
    place = scaled.y - units.slack_in(problem, slack)
    block = None
    if structure.cones.is_polyhedral:
        place[:, : structure.cones.zero] = torch.inf
        piece, depth = (place > 0).to(torch.int64), place.abs()
    else:
        found = regions(structure.cones, np.nan_to_num(place.cpu().numpy()))
        piece, depth = (torch.from_numpy(part).to(place.device) for part in found)
        block = torch.from_numpy(structure.cones.blocks).to(place.device)
    if structure.has_bounds:
        parts = []
        for name, bound, sign in zip(("lower_index", "upper_index"), problem.full_bounds(), (-1.0, 1.0), strict=True):
            index = structure.index(name, problem.device)
            gap = units.point_in(problem, point._replace(x=sign * (bound - point.x))).x
            parts.append((sign * scaled.z - gap)[:, index])
        bounds = torch.cat(parts, 1)
        place, depth = torch.cat([place, bounds], 1), torch.cat([depth, bounds.abs()], 1)
        piece = torch.cat([piece, (bounds > 0).to(torch.int64)], 1)
        if block is not None:
            start = int(block[-1]) + 1 if block.numel() else 0
            block = torch.cat([block, start + torch.arange(bounds.shape[1], device=block.device)])
    # Equalities, and bounds that are not there, are always as far as can be.
    return ActiveSet(place.nan_to_num(posinf=0.0, neginf=0.0), piece, depth, block, problem.is_linear)
