"""How Moreau sees problems: matrices row by row, rows in the order of its cones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import BoolArray, IntArray, from_numpy
from lpgd.cones.product import Cones, upper_triangle_rows
from lpgd.problems.conic.structure import ConicPoint, ConicStructure, per_element
from lpgd.solvers.backends.forms import RowForm, RowFrame

__all__ = ["Layout", "MoreauForm", "in_problem_form", "row_form"]


class MoreauForm(NamedTuple):
    """What fixes the form that elements with the same finite bounds are solved in."""

    structure: ConicStructure
    finite_lower: BoolArray
    finite_upper: BoolArray

    @property
    def layout(self) -> Layout:
        frame: RowFrame = RowForm.frame_of(*self)
        return _layout(frame, self.structure)

    @property
    def key(self) -> tuple[bytes, ...]:
        return self.structure.digest, self.finite_lower.tobytes(), self.finite_upper.tobytes()


class Layout(NamedTuple):
    """A problem as Moreau sees it: rows, cones and patterns.

    Its rows are the zero cone, the nonnegative one (bounds and second-order cones of one row included), second-order
    cones, semidefinite ones as upper triangles by columns, exponential and power cones.
    """

    frame: RowFrame
    cones: Cones
    zero: int
    nonnegative: int
    source: IntArray  # for each of its rows, that of the frame
    order: IntArray  # for each of its entries of A, row by row, the one of A's values followed by the bounds' signs
    P_offsets: IntArray
    P_columns: IntArray
    A_offsets: IntArray
    A_columns: IntArray

    @property
    def n(self) -> int:
        return self.frame.n

    @property
    def m(self) -> int:
        """Its rows; one without entries where there are none, as the active-set method crashes (moreau 0.4.1)."""
        return max(self.source.size, 1)

    @property
    def size(self) -> int:
        """Entries of its matrices."""
        return self.P_columns.size + self.A_columns.size


@lru_cache(maxsize=64)
def _layout(frame: RowFrame, structure: ConicStructure) -> Layout:
    cones, pattern = frame.cones, frame.pattern
    source = _moreau_rows(cones)
    place = np.empty_like(source)
    place[source] = np.arange(source.size)
    entry_rows = place[pattern.rows]
    by_rows = np.lexsort((pattern.columns, entry_rows))
    entries = np.arange(pattern.nnz) if frame.source is None else frame.source
    quadratic = structure.quadratic
    flat = sum(size == 1 for size in cones.second_order)
    return Layout(
        frame,
        cones,
        cones.zero,
        cones.nonnegative + flat if source.size else 1,
        source,
        entries[by_rows],
        quadratic.indptr.astype(np.int64),  # P is symmetric: by columns is by rows
        quadratic.rows,
        np.concatenate([[0], np.cumsum(np.bincount(entry_rows, minlength=max(source.size, 1)))]).astype(np.int64),
        pattern.columns[by_rows],
    )


def _moreau_rows(cones: Cones) -> IntArray:
    """For each of Moreau's rows, that of the frame."""
    source = upper_triangle_rows(cones)
    if 1 in cones.second_order:  # it takes no second-order cones of one row, which are nonnegative ones
        section = cones.sections["second_order"]
        flat = np.repeat([size == 1 for size in cones.second_order], cones.second_order)
        section_rows = source[section]
        source[section] = np.concatenate([section_rows[flat], section_rows[~flat]])
    return source


def row_form(form: MoreauForm, data: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A, q and b in Moreau's form, each shared or with one row for each element."""
    layout = form.layout
    frame, (q, A, b, lower, upper) = layout.frame, data[1:]
    order, source = (from_numpy(index).to(q.device) for index in (layout.order, layout.source))
    if frame.signs.size:
        signs = from_numpy(frame.signs).to(q)
        A = torch.cat([A, signs.expand(*A.shape[:-1], -1)], -1)
        size = max(datum.shape[0] if datum.ndim == 2 else 1 for datum in (b, lower, upper))
        b, lower, upper = (per_element(datum, size) for datum in (b, lower, upper))
        above, below = (
            from_numpy(np.flatnonzero(finite)).to(q.device) for finite in (frame.finite_upper, frame.finite_lower)
        )
        b = torch.cat([b[:, : frame.split], upper[:, above], -lower[:, below], b[:, frame.split :]], 1)
    b = b[..., source] if layout.source.size else b.new_ones(1)
    return A[..., order], q if q.ndim == 2 else q[None], b if b.ndim == 2 else b[None]


def in_problem_form(form: MoreauForm, x: Tensor, z: Tensor, s: Tensor) -> tuple[ConicPoint, Tensor]:
    """The point and the slack in the problem's own form."""
    layout = form.layout
    frame, count = layout.frame, layout.source.size
    place = from_numpy(np.argsort(layout.source)).to(x.device)
    y, slack, z = z[:, :count][:, place], s[:, :count][:, place], torch.zeros_like(x)
    if frame.signs.size:
        multipliers, uppers = y[:, frame.bound_rows], frame.upper_index.size
        z[:, from_numpy(frame.upper_index).to(x.device)] += multipliers[:, :uppers]
        z[:, from_numpy(frame.lower_index).to(x.device)] -= multipliers[:, uppers:]
        problem_rows = from_numpy(frame.own_rows).to(x.device)
        y, slack = y[:, problem_rows], slack[:, problem_rows]
    return ConicPoint(x, y, z), slack
