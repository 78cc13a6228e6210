"""Which constraints of a conic program are active at a point, and how clearly, in the problem's own units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import IntArray, from_numpy, random_direction
from lpgd.cones.regions import regions
from lpgd.execution.memo import TensorMemo
from lpgd.problems.base import maximum_norm
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicPoint, per_element

__all__ = ["ActiveSet", "active_set", "leaves_multipliers_open", "shares_multipliers"]

SAME, ALIKE = 1e-12, 1e-9
"""Images of constraints that differ by a smaller share are one, and what parameters make of them is."""

WORK = 1e8
"""Of how many operations multipliers are looked at closely."""


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The active sets of B elements: for each row of A, lower and upper bound the piece that ``v = y - s`` lies in.

    Attributes:
        place: (B, k) v, in units of the problem; for bounds the multiplier less the slack.  Equalities, and bounds that
            are not there, are infinitely far from any change.
        of_linear_program: the solution is one of a linear program.
        pieces, depths: (B, m) of the rows of curved cones: see :func:`lpgd.cones.regions.regions`.  None where all rows
            are linear; the piece is then the sign of v, and the depth its size.
        block: (k,) the cone that an entry belongs to, or None likewise.
    """

    place: Tensor
    of_linear_program: bool
    pieces: Tensor | None = None
    depths: Tensor | None = None
    block: Tensor | None = None

    def is_vertex(self, variables: int) -> Tensor:
        """(B,) whether so many constraints are active as there are variables, so that they determine the solution."""
        return (self.place > 0).sum(-1) >= variables

    def is_overdetermined(self, variables: int, noise: Tensor) -> Tensor:
        """(B,) whether more constraints are active than there are variables: multipliers are not unique then.

        Those count whose multiplier is zero within the noise (B,): a solver may choose multipliers at a vertex of their
        set.  Fewer constraints may depend on each other, too, which their number does not tell; nor does that of curved
        cones' rows.
        """
        if self.depths is not None:
            return torch.zeros(self.place.shape[:1], dtype=torch.bool, device=self.place.device)
        return (self.place > -noise[:, None]).sum(-1) > variables

    def select(self, elements: Tensor) -> ActiveSet:
        """The active sets of these elements."""
        return self._each(lambda tensor: tensor[elements])

    def where(self, chosen: Tensor, other: ActiveSet) -> ActiveSet:
        """These for the elements ``chosen`` (B,), the other ones elsewhere."""
        return self._each(lambda first, second: torch.where(chosen[:, None], first, second), other)

    def unequal(self, other: ActiveSet) -> Tensor:
        """(B, k) where the pieces are others."""
        unequal = (self.place > 0) != (other.place > 0)
        if self.pieces is not None and other.pieces is not None:
            unequal[:, : self.pieces.shape[1]] = self.pieces != other.pieces
        return unequal

    def crossing(self, other: ActiveSet, noise: Tensor) -> Tensor:
        """(B,) the share of the way to ``other`` after which an active set changes; infinite where none does.

        Changes of v within the noise (B,) count for none, and where it hides which piece v is in here, the share is 0.
        """
        unequal = self.unequal(other)
        if not unequal.any():  # as of most
            return torch.full_like(noise, torch.inf)
        distance, depth = self._distance(other), self.place.abs()
        if self.depths is not None:
            depth[:, : self.depths.shape[1]] = self.depths
        share = torch.where(depth > noise[:, None], depth, 0.0) / distance
        return torch.where(unequal & (distance > noise[:, None]), share.clamp(max=1.0), torch.inf).amin(-1)

    def size(self) -> Tensor:
        """(B,) the largest entry of v."""
        return maximum_norm(torch.where(torch.isfinite(self.place), self.place, 0.0))

    def _distance(self, other: ActiveSet) -> Tensor:
        change = (self.place - other.place).abs().nan_to_num(nan=0.0)
        if self.block is None:
            return change
        index = self.block.expand(change.shape)
        total = change.new_zeros(change.shape[0], int(self.block[-1]) + 1).scatter_add(1, index, change.square())
        return total.sqrt().gather(1, index)

    def _each(self, function: Callable[..., Tensor], *others: ActiveSet) -> ActiveSet:
        changes: dict[str, Tensor] = {}
        for name in ("place", "pieces", "depths"):
            tensors = [getattr(one, name) for one in (self, *others)]
            if tensors[0] is not None:
                changes[name] = function(*tensors)
        return replace(self, **changes)


def active_set(problem: ConicProblem, point: ConicPoint, slack: Tensor) -> ActiveSet:
    """The active sets of a batch at a point (B, ·) with the slack (B, m), in the units of the problem."""
    structure, units = problem.structure, problem.units
    scaled = units.point_in(problem, point)
    row_places = scaled.y - units.slack_in(problem, slack)
    row_places[:, : structure.cones.zero] = torch.inf
    places = [row_places]
    if structure.has_bounds:
        lower, upper = (units.point_in(problem, point._replace(x=bound)).x for bound in problem.full_bounds())
        for name, values in (
            ("lower_index", lower - scaled.x - scaled.z),
            ("upper_index", scaled.x - upper + scaled.z),
        ):
            index = getattr(structure, name)
            places.append(values if index.size == structure.n else values[:, structure.index(name, values.device)])
    place = torch.cat(places, 1) if len(places) > 1 else row_places
    if structure.cones.is_polyhedral:
        return ActiveSet(place, problem.traits.is_linear_program)
    pieces, depths = regions(structure.cones, np.nan_to_num(row_places.cpu().numpy()))
    blocks = from_numpy(structure.cones.blocks)
    bounds = int(blocks[-1]) + 1 + torch.arange(place.shape[1] - len(blocks))
    return ActiveSet(
        place,
        False,
        from_numpy(pieces).to(place.device),
        from_numpy(depths).to(place.device),
        torch.cat([blocks, bounds]).to(place.device),
    )


def shares_multipliers(problem: ConicProblem, active: ActiveSet, noise: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) whether two linear constraints are active that are one and the same: their multipliers are not unique.

    Of two rows, and of a row and a bound.

    Rows that are multiples of each other, or of a bound, have one image of a random vector but for their length.  Where
    parameters move both alike, as far as what is asked of multipliers tells, their gradients are unique.

    Args:
        problem: B elements.
        active: their active sets.
        noise: (B,) multipliers and slacks of this size are zero.
        x: (B, n) their solutions in units of order 1.
    """
    structure, data, size = problem.structure, problem.data, problem.batch_size
    linear = structure.cones.zero + structure.cones.nonnegative
    ends = np.concatenate([structure.lower_index, structure.upper_index])
    nothing = torch.zeros(size, dtype=torch.bool, device=problem.device)
    if linear + ends.size < 2:
        return nothing, nothing
    key = (structure.constraint.digest, linear, ends.tobytes())
    image, length, alike = _memo(data.A, key, partial(_images, problem, linear, ends))
    if not alike:  # as of most
        return nothing, nothing
    direction = from_numpy(random_direction(structure.n).copy()).to(data.q)
    image, length = (per_element(values, size) for values in (image, length))
    of_bounds = direction[from_numpy(ends).to(problem.device)].expand(size, -1)
    images = torch.cat([image / length, of_bounds], 1)
    place = torch.cat([active.place[:, :linear], active.place[:, structure.m :]], 1)
    lower, upper = problem.full_bounds()
    fixed = (lower == upper)[:, structure.index("upper_index", problem.device)]  # one constraint with two ends
    there = (place > -noise[:, None]) & images.isfinite()
    there[:, linear + structure.lower_index.size :] &= ~fixed
    # What is not active is far from everything else.
    apart = 2.0 + torch.arange(images.shape[1], device=problem.device)
    values, order = torch.where(there, images.abs(), apart).sort(1)
    same = values[:, 1:] - values[:, :-1] <= SAME * values[:, 1:]
    bound = order >= linear
    with_bound = bound[:, 1:] | bound[:, :-1]
    if structure.observed is None or not bool(same.any()):
        return (same & ~with_bound).any(1), (same & with_bound).any(1)
    probe = structure.observed.probe_of_y(x, torch.ones_like(active.place[:, : structure.m]))[:, :linear]
    bounded = from_numpy(structure.observed.bounded[ends]).to(of_bounds)
    told = torch.cat([probe / length, (direction.sum() + 1.0) * bounded.expand(size, -1)], 1) * images.sign()
    told = told.gather(1, order)
    unlike = ~((told[:, 1:] - told[:, :-1]).abs() <= ALIKE * told[:, 1:].abs())
    return (same & unlike & ~with_bound).any(1), (same & unlike & with_bound).any(1)


def leaves_multipliers_open(problem: ConicProblem, active: ActiveSet, noise: Tensor, x: Tensor) -> Tensor:
    """(B,) whether more constraints are active than there are variables, and what is asked of multipliers is open.

    A function ``r·y`` of multipliers with ``Aᵀy = c`` is unique exactly where ``A d = r`` has a solution, A the active
    rows and bounds.
    """
    structure, observed = problem.structure, problem.structure.observed
    found = active.is_overdetermined(structure.n, noise)
    if observed is None or not bool(found.any()):
        return found
    ends = np.concatenate([structure.lower_index, structure.upper_index])
    probes = observed.probe_of_y(x, torch.ones_like(active.place[:, : structure.m])).cpu().numpy()
    of_bounds = observed.bounded[ends] * random_direction(ends.size)
    there = (active.place > -noise[:, None]).cpu().numpy()
    values = problem.data.A.detach()
    for element in np.flatnonzero(found.cpu().numpy()).tolist():
        own = values if values.ndim == 1 else values[element % len(values)]
        if there[element].sum() * structure.n**2 > WORK:
            continue
        A = structure.constraint.dense_matrices(own.cpu().numpy()[None])[0]
        wanted = np.concatenate([probes[element], of_bounds])
        rows = np.concatenate([A, np.eye(structure.n)[ends]])[there[element]]
        length = np.linalg.norm(rows, axis=1)
        kept = length > 0
        rows, right = rows[kept] / length[kept, None], wanted[there[element]][kept] / length[kept]
        rows /= np.maximum(np.linalg.norm(rows, axis=0), 1e-300)
        left = rows @ np.linalg.lstsq(rows, right, rcond=1e-12)[0] - right
        found[element] = bool(np.abs(left).max() > ALIKE * np.abs(right).max())
    return found


_memo = TensorMemo()


def _images(problem: ConicProblem, linear: int, ends: IntArray) -> tuple[Tensor, Tensor, bool]:
    """(1 or R, linear) images of rows and their lengths, and whether any constraints are alike, active or not."""
    constraint, A = problem.structure.constraint, problem.data.A.detach()
    direction = from_numpy(random_direction(problem.structure.n).copy()).to(A)
    vectors = direction.expand(A.shape[0] if A.ndim == 2 else 1, -1)
    image = constraint.matvec(A, vectors)[:, :linear]
    length = constraint.matvec(A.square(), torch.ones_like(vectors))[:, :linear].sqrt()
    bounds = direction[from_numpy(np.unique(ends)).to(A.device)].expand(vectors.shape[0], -1)
    values = torch.cat([image / length, bounds], 1).abs().sort(1).values
    return image, length, bool((values[:, 1:] - values[:, :-1] <= SAME * values[:, 1:]).any())
