"""The parts of a conic program: what is fixed (structure), what varies (data), and what solves it (points)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import IntArray, from_numpy
from lpgd.cones.blocks import cone_blocks
from lpgd.cones.product import Cones
from lpgd.problems.base import PointOperations, Traits
from lpgd.problems.conic.observed import Observed
from lpgd.problems.conic.sparsity import SparsityPattern

__all__ = ["ConicData", "ConicPoint", "ConicSizes", "ConicStructure"]


class _ConicPointFields(NamedTuple):
    x: Tensor  # (B, n)
    y: Tensor  # (B, m)
    z: Tensor  # (B, n), zero where a variable has no bound


class ConicPoint(_ConicPointFields, PointOperations):
    """Primal and dual variables ``(x, y, z)`` of a batch of B conic programs; also a cotangent or a tangent of them."""

    __slots__ = ()


class ConicData(NamedTuple):
    """The data of a batch of conic programs, or a gradient, cotangent or tangent of them.

    Each tensor is a vector shared by the whole batch, or has one row for each element.
    """

    P: Tensor  # (nnz P,) values on the pattern, both triangles
    q: Tensor  # (n,)
    A: Tensor  # (nnz A,) values on the pattern
    b: Tensor  # (m,)
    lower: Tensor  # (number of lower bounds,); -inf is no bound
    upper: Tensor  # (number of upper bounds,); +inf is no bound


@dataclass(frozen=True, eq=False, repr=False)
class ConicStructure:
    """What is fixed while the data change: patterns, cones, and which variables have bounds.

    Args:
        quadratic: pattern of P, (n, n), closed under transposition.
        constraint: pattern of A, (m, n).
        cones: the cones of the rows of A, in order.
        lower_index: variables that have a lower bound, increasing; the data ``lower`` belong to these.
        upper_index: the same for upper bounds.
        integer_index: variables that take whole numbers only, increasing; a binary one has the bounds 0 and 1.
        two_sided: how many rows have two ends: the last of the zero cone are ``g x - w = b``, with the last variables
            w, which enter nothing else and have the ends as bounds.  Solvers that know such rows see them without w
            (:attr:`with_ends`).
        observed: what of x and y anybody sees; None for all of it.

    Raises:
        ValueError: the sizes do not fit, or the pattern of P is not symmetric.
    """

    quadratic: SparsityPattern
    constraint: SparsityPattern
    cones: Cones
    lower_index: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    upper_index: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    integer_index: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    two_sided: int = 0
    observed: Observed | None = None

    def __post_init__(self) -> None:
        m, n = self.constraint.shape
        if self.quadratic.shape != (n, n):
            raise ValueError(f"P has shape {self.quadratic.shape}, but A has {n} columns.")
        if self.cones.rows != m:
            raise ValueError(f"the cones have {self.cones.rows} rows, but A has {m}.")
        if not 0 <= self.two_sided <= min(n, self.cones.zero):
            raise ValueError(f"two_sided is {self.two_sided}, of {self.cones.zero} rows of the zero cone.")
        if np.any(self.quadratic.positions(self.quadratic.columns, self.quadratic.rows) < 0):
            raise ValueError("the pattern of P must hold both triangles: (j, i) with every (i, j).")
        for name in ("lower_index", "upper_index", "integer_index"):
            index = np.ascontiguousarray(getattr(self, name), dtype=np.int64)
            if index.size and (index.min() < 0 or index.max() >= n or np.any(np.diff(index) <= 0)):
                raise ValueError(f"{name} must be increasing and lie in [0, {n}).")
            object.__setattr__(self, name, index)

    def __repr__(self) -> str:
        cones = ", ".join(
            f"{size if isinstance(size, int) else len(size)} {name.replace('_', ' ')}"
            for name, size in vars(self.cones).items()
            if isinstance(size, int | tuple) and size
        )
        entries = f"{self.quadratic.nnz} entries of P and {self.constraint.nnz} of A"
        bounds = f"{self.lower_index.size} lower and {self.upper_index.size} upper bounds"
        integers = f"; {self.integer_index.size} integers" if self.has_integers else ""
        return f"ConicStructure({self.summary}; cones: {cones or 'none'}; {entries}; {bounds}{integers})"

    def __getstate__(self) -> dict[str, Any]:
        """The fields alone: what was worked out from them is worked out again where it is needed."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def n(self) -> int:
        """Number of variables."""
        return self.constraint.shape[1]

    @property
    def m(self) -> int:
        """Number of rows of A."""
        return self.constraint.shape[0]

    @property
    def has_bounds(self) -> bool:
        return self.lower_index.size + self.upper_index.size > 0

    @cached_property
    def bounded_index(self) -> IntArray:
        """Variables that have a bound."""
        return np.union1d(self.lower_index, self.upper_index)

    @cached_property
    def bounded_on_both_sides(self) -> tuple[IntArray, IntArray]:
        """Where the two bounds of variables that have both stand in ``lower`` and in ``upper``."""
        both = np.intersect1d(self.lower_index, self.upper_index)
        return np.searchsorted(self.lower_index, both), np.searchsorted(self.upper_index, both)

    @property
    def has_integers(self) -> bool:
        return self.integer_index.size > 0

    @property
    def traits(self) -> Traits:
        """What problems of this structure are and can do.

        Integer programs have no optimality conditions that could be differentiated, and their solutions jump.  A
        linear program is polyhedral without a quadratic objective.
        """
        return self._traits

    @cached_property
    def _traits(self) -> Traits:
        whole = self.has_integers
        return Traits(
            "an integer program" if whole else "a conic program",
            conditions="" if whole else "conic",
            can_augment=not whole,
            is_continuous=not whole,
            is_curved=not self.cones.is_polyhedral and not whole,
            is_linear_program=self.cones.is_polyhedral and not self.quadratic.nnz,
        )

    @property
    def sizes(self) -> ConicSizes:
        """The length of each datum."""
        return ConicSizes(
            self.quadratic.nnz, self.n, self.constraint.nnz, self.m, self.lower_index.size, self.upper_index.size
        )

    @property
    def summary(self) -> str:
        """Its sizes in words."""
        return f"{self.n} variables and {self.m} rows"

    @property
    def digest(self) -> bytes:
        """A fingerprint of the content, equal across processes."""
        return self._digest

    @cached_property
    def _digest(self) -> bytes:
        state = hashlib.blake2b(repr(self.cones).encode(), digest_size=16)
        for content in (self.quadratic.digest, self.constraint.digest, self.lower_index.tobytes(), b"|"):
            state.update(content)
        state.update(self.upper_index.tobytes())
        if self.has_integers:
            state.update(b"|" + self.integer_index.tobytes())
        if self.two_sided:
            state.update(f"|{self.two_sided}".encode())
        return state.digest()

    @cached_property
    def row_patterns(self) -> dict[Any, Any]:
        """What reductions work out of this structure once; see :class:`lpgd.solvers.backends.forms.RowForm`."""
        return {}

    @cached_property
    def transpose_position(self) -> IntArray:
        """For each entry (i, j) of P's pattern, where (j, i) stands."""
        return self.quadratic.positions(self.quadratic.columns, self.quadratic.rows)

    @cached_property
    def mixed_entries(self) -> int:
        """How many entries A has once the rows of each cone that is no orthant are mixed, as derivatives do."""
        cone, size = np.full(self.m, -1, dtype=np.int64), np.ones(self.m, dtype=np.int64)
        for block in cone_blocks(self.cones):
            cone[block.rows], size[block.rows] = block.rows[:, :1], block.rows.shape[1]
        curved = cone[self.constraint.rows] >= 0
        met = np.unique(cone[self.constraint.rows[curved]] * self.n + self.constraint.columns[curved])
        return int((~curved).sum() + size[met // max(self.n, 1)].sum())

    def transposed(self, values: Tensor) -> Tensor:
        """Values of Pᵀ from those of P, (..., nnz P) each."""
        if self.quadratic.is_dense:
            return values.reshape(*values.shape[:-1], self.n, self.n).mT.reshape(values.shape)
        return values[..., self.index("transpose_position", values.device)]

    def plus_transposed(self, values: Tensor) -> Tensor:
        """Values of ``P + Pᵀ`` from those of P, (..., nnz P) each."""
        if self.quadratic.is_dense:
            square = values.reshape(*values.shape[:-1], self.n, self.n)
            return (square + square.mT).reshape(values.shape)
        return values + self.transposed(values)

    def symmetric_outer(self, y: Tensor, x: Tensor, rows: int | None) -> Tensor:
        """Values of ``Σ (y xᵀ + x yᵀ)`` on P's pattern: see :meth:`SparsityPattern.outer`."""
        if not (self.quadratic.is_dense and rows == y.shape[0]):
            return self.plus_transposed(self.quadratic.outer(y, x, rows))
        # Both products are written as they lie: to read one across takes four times as long.
        return self.quadratic.outer(y, x, rows).add_(self.quadratic.outer(x, y, rows))

    def index(self, name: str, device: torch.device) -> Tensor:
        """``lower_index``, ``upper_index``, ``integer_index`` or ``transpose_position`` as a tensor."""
        return from_numpy(getattr(self, name)).to(device)

    @property
    def own(self) -> int:
        """Number of variables that are not the values of rows with two ends."""
        return self.n - self.two_sided

    @cached_property
    def with_ends(self) -> ConicStructure:
        """The structure without the values of rows with two ends, which are the first of its nonnegative ones."""
        variables, count, constraint = self.own, self.two_sided, self.constraint
        entries = constraint.nnz - count
        return ConicStructure(
            SparsityPattern((variables, variables), self.quadratic.rows, self.quadratic.columns),
            SparsityPattern((self.m, variables), constraint.rows[:entries], constraint.columns[:entries]),
            replace(self.cones, zero=self.cones.zero - count, nonnegative=self.cones.nonnegative + count),
            self.lower_index[self.lower_index < variables],
            self.upper_index[self.upper_index < variables],
            self.integer_index,
        )

    @cached_property
    def with_diagonal(self) -> ConicStructure:
        """The same structure with the diagonal entries of P of its own variables: room for an augmentation."""
        diagonal = np.arange(self.own)
        if np.all(self.quadratic.positions(diagonal, diagonal) >= 0):
            return self
        keys = np.union1d(self.quadratic.columns * self.n + self.quadratic.rows, diagonal * (self.n + 1))
        columns, rows = np.divmod(keys, self.n)
        return replace(self, quadratic=SparsityPattern((self.n, self.n), rows, columns))


class ConicSizes(NamedTuple):
    """The length of each field of :class:`ConicData`."""

    P: int
    q: int
    A: int
    b: int
    lower: int
    upper: int


def per_element(datum: Tensor, batch_size: int) -> Tensor:
    """One row for each element: (size,) or (R, size) to (B, size), without copying where R is 1 or B."""
    if datum.ndim == 1:
        return datum.expand(batch_size, -1)
    return datum if datum.shape[0] == batch_size else datum.repeat(batch_size // max(datum.shape[0], 1), 1)
