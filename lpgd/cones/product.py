"""The product cone K, its one fixed row order, and the vectorisation of symmetric matrices.

A conic program constrains ``s = b - A x`` to a product of cones.  Everywhere in this library the rows
of ``A`` are ordered as the fields of :class:`Cones` are:

==================  ===========================  ==========================================================
field               rows                         the cone
==================  ===========================  ==========================================================
zero                ``zero``                     ``{0}``
nonnegative         ``nonnegative``              ``s >= 0``
second_order        each ``d``                   ``(t, u)`` with ``|u|_2 <= t``, ``t`` first
semidefinite        each ``k (k + 1) / 2``       ``svec(S)`` with ``S`` positive semidefinite of side ``k``
exponential         3 each                       closure of ``{(u, v, w): v exp(u / v) <= w, v > 0}``
dual_exponential    3 each                       the dual of that cone
power               3 each                       ``u^a v^(1 - a) >= |w|, u, v >= 0``; ``-a``: its dual cone
==================  ===========================  ==========================================================

``svec`` stacks the lower triangle column by column, off-diagonal entries times ``sqrt(2)``, so that
``<svec(X), svec(Y)> = tr(X Y)``.  It is the order of SCS; a backend that wants another one permutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from lpgd.arrays import FloatArray, IntArray

__all__ = ["Cones", "smat", "svec", "svec_indices", "svec_size", "upper_triangle_rows"]


@dataclass(frozen=True)
class Cones:
    """Sizes of the cones whose product is K, in row order (see the module's table).

    Args:
        zero: number of equality rows.
        nonnegative: number of inequality rows.
        second_order: dimension of each second-order cone (at least 1).
        semidefinite: side of each positive semidefinite matrix (at least 1).
        exponential: number of exponential cones.
        dual_exponential: number of dual exponential cones.
        power: exponent of each power cone, ``0 < a < 1``; ``-a`` names the dual of that cone.

    Raises:
        ValueError: a size is negative or an exponent is outside (-1, 0) and (0, 1).
        TypeError: a number of rows or a size is no whole number, or sizes or exponents are no sequence.
    """

    zero: int = 0
    nonnegative: int = 0
    second_order: tuple[int, ...] = ()
    semidefinite: tuple[int, ...] = ()
    exponential: int = 0
    dual_exponential: int = 0
    power: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("zero", "nonnegative", "exponential", "dual_exponential"):
            number = _whole(name, getattr(self, name))
            if number < 0:
                raise ValueError(f"Cones.{name} is {number}; a number of rows or cones cannot be negative.")
            object.__setattr__(self, name, number)
        for name in ("second_order", "semidefinite"):
            sizes = tuple(_whole(name, size) for size in _several(name, getattr(self, name)))
            if any(size < 1 for size in sizes):
                raise ValueError(f"Cones.{name} is {sizes}; every size must be at least 1.")
            object.__setattr__(self, name, sizes)
        exponents = tuple(float(exponent) for exponent in _several("power", self.power))
        if any(not 0.0 < abs(exponent) < 1.0 for exponent in exponents):
            raise ValueError(
                f"Cones.power is {exponents}; every exponent must lie in (0, 1), or in (-1, 0) for a dual cone."
            )
        object.__setattr__(self, "power", exponents)

    @cached_property
    def rows(self) -> int:
        """The number of rows m of A."""
        return self.sections["power"].stop

    @cached_property
    def sections(self) -> dict[str, slice]:
        """The rows of each field, in order."""
        sizes = {
            "zero": self.zero,
            "nonnegative": self.nonnegative,
            "second_order": sum(self.second_order),
            "semidefinite": sum(svec_size(side) for side in self.semidefinite),
            "exponential": 3 * self.exponential,
            "dual_exponential": 3 * self.dual_exponential,
            "power": 3 * len(self.power),
        }
        sections: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            sections[name] = slice(start, start + size)
            start += size
        return sections

    @cached_property
    def blocks(self) -> IntArray:
        """(m,) the cone that each row belongs to, counted from 0; each zero or nonnegative row is one of its own."""
        linear = self.zero + self.nonnegative
        triples = self.exponential + self.dual_exponential + len(self.power)
        sizes = [1] * linear + [*self.second_order, *map(svec_size, self.semidefinite)] + [3] * triples
        return np.repeat(np.arange(len(sizes)), sizes)

    @property
    def is_polyhedral(self) -> bool:
        """Whether there are no curved cones."""
        return self.kinds <= {"zero", "nonnegative"}

    @cached_property
    def kinds(self) -> frozenset[str]:
        """The names of the fields that are not empty: what a solver must support."""
        names = {name for name, rows in self.sections.items() if rows.stop > rows.start}
        if any(exponent < 0 for exponent in self.power):
            names.add("dual_power")
        if names >= {"power", "dual_power"} and all(exponent < 0 for exponent in self.power):
            names.discard("power")
        return frozenset(names)


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, str) and hasattr(value, "__float__") and float(value).is_integer():
        return int(value)
    raise TypeError(f"Cones.{name} is or holds {value!r}; it takes whole numbers.")


def _several(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not hasattr(values, "__iter__") or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"Cones.{name} is {values!r}; it takes one entry for each cone, such as ({values!r},).")
    return tuple(values)


def svec_size(side: int) -> int:
    """The length ``k (k + 1) / 2`` of ``svec`` of a ``k`` by ``k`` symmetric matrix."""
    return side * (side + 1) // 2


@lru_cache(maxsize=64)
def svec_indices(side: int) -> tuple[IntArray, IntArray]:
    """Rows and columns of the lower triangle, column by column: the order of ``svec``.  They are shared, to be read."""
    columns, rows = np.triu_indices(side)
    indices = rows.astype(np.int64), columns.astype(np.int64)
    for index in indices:
        index.flags.writeable = False
    return indices


@lru_cache(maxsize=64)
def _weights(side: int, off_diagonal: float) -> FloatArray:
    """1 on the diagonal, in the order of ``svec``; to be read."""
    rows, columns = svec_indices(side)
    weights = np.where(rows == columns, 1.0, off_diagonal)
    weights.flags.writeable = False
    return weights


def svec(matrices: FloatArray) -> FloatArray:
    """``svec`` of symmetric matrices: (..., k, k) to (..., k (k + 1) / 2)."""
    rows, columns = svec_indices(matrices.shape[-1])
    return matrices[..., rows, columns] * _weights(matrices.shape[-1], np.sqrt(2.0))


def smat(vectors: FloatArray, side: int) -> FloatArray:
    """The inverse of :func:`svec`: (..., k (k + 1) / 2) to symmetric (..., k, k)."""
    rows, columns = svec_indices(side)
    entries = vectors * _weights(side, np.sqrt(0.5))
    matrices = np.empty((*vectors.shape[:-1], side, side), dtype=vectors.dtype)
    matrices[..., rows, columns] = entries
    matrices[..., columns, rows] = entries
    return matrices


def upper_triangle_rows(cones: Cones) -> IntArray:
    """For each row of a solver that stacks the upper triangle of a matrix by columns, ours, which are of the lower one.

    All other cones have their rows in our order.
    """
    rows = np.arange(cones.rows, dtype=np.int64)
    start = cones.sections["semidefinite"].start
    for side in cones.semidefinite:
        size = svec_size(side)
        lower_rows, lower_columns = svec_indices(side)
        rows[start : start + size] = start + np.lexsort((lower_columns, lower_rows))
        start += size
    return rows
