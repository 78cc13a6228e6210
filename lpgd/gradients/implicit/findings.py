"""What implicit differentiation found out about each element of a conic program, and what it says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lpgd.arrays import BoolArray, from_numpy
from lpgd.gradients.base import GradientInfo, GradientMethod
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.kkt.rank import DOUBT
from lpgd.solvers.kkt.system import KKTResponse
from lpgd.status import warn

__all__ = ["CURVED", "Findings"]

SAME = 1e-5
"""Answers of the two sides of a kink that differ by a smaller share are one."""


@dataclass(eq=False)
class Findings:
    """What is known of the answers of E elements, x (E, n) in units of order 1."""

    count: int
    with_rho: bool
    structure: ConicStructure
    x: Tensor

    def __post_init__(self) -> None:
        # What was settled for a whole batch is regular: only rounding is left.
        self.used, self.doubt = ["implicit"] * self.count, np.zeros(self.count)
        self.loose: list[int] = []  # primal solutions that are not unique
        self.contradicted: list[int] = []  # tilts that a singular system cannot follow
        self.doubtful: list[int] = []
        self.dependent: list[int] = []  # multipliers that are not unique, and that the answer needs not
        self.dependent_bounds: list[int] = []  # the same of bounds
        self.curved: list[int] = []  # the same at curved cones, whose curvature is weighted by them
        self.one_sided: list[int] = []
        self.steady: set[int] = set()  # elements whose x moves alike with other multipliers
        self.freed: set[int] = set()  # not unique once constraints without a multiplier are dropped
        self.sided: set[int] = set()  # multipliers that move differently on both sides
        self.torn: set[int] = set()  # tilts that the system of a side cannot follow

    def kink(self, element: int, primal: float, sided: bool, *, rows: bool, bounds: bool) -> None:
        """An element at a kink.

        Args:
            element: which one.
            primal: by how much the changes of x on its two sides differ.
            sided: whether those of y do, or are not unique on a side: of a row that holds nothing but fixed variables
                the minimum-norm answer is zero, as it is on the other side.
            rows, bounds: whether anybody may ask for the gradient with respect to such rows, or bounds.
        """
        if primal > SAME:
            self.one_sided.append(element)
            self.doubt[element] = primal
        elif sided or bounds:
            self.sided.add(element)
            self.dependent += [element] * rows
            self.dependent_bounds += [element] * bounds

    def add(self, elements: Sequence[int], found: KKTResponse, rows: BoolArray, bounds: BoolArray) -> None:
        """What the systems of some elements say, and whether gradients of rows and of bounds are unique."""
        kinds = (found.exact, found.unique, found.consistent, found.doubt, found.shared, rows, bounds)
        sided = self.sided | set(self.one_sided)
        for element, fine, single, follows, size, shared, of_rows, of_bounds in zip(elements, *kinds, strict=True):
            self.doubt[element] = max(self.doubt[element], size)
            if element in self.freed and element not in self.one_sided:
                self.used[element] = "implicit, regularised"
                self.loose.append(element)
                self.doubt[element] = np.inf
                continue
            if element in self.torn and element not in self.one_sided:
                self.used[element] = "implicit, regularised"
                self.contradicted.append(element)
                self.doubt[element] = np.inf
                continue
            curved = not fine and single and follows and self.is_curved(shared) and element not in self.steady
            if element in sided and not curved:  # curvature matters more than a side
                self.used[element] = "implicit, one-sided"
                continue
            if fine:
                continue
            self.used[element] = "implicit, regularised"
            if not size < DOUBT:
                self.doubtful.append(element)
            elif not single:
                self.loose.append(element)
                self.doubt[element] = np.inf
            elif not follows:
                self.contradicted.append(element)
                self.doubt[element] = np.inf
            elif curved:
                self.curved.append(element)
                self.doubt[element] = np.inf
            else:
                self.dependent += [element] * (not of_rows)
                self.dependent_bounds += [element] * (not of_bounds)

    def is_curved(self, rows: BoolArray) -> bool:
        """Whether one of these rows (m,) is of a curved cone."""
        return bool(rows[self.structure.cones.sections["nonnegative"].stop :].any())

    def concerns(self, element: int, rows: BoolArray) -> bool:
        """Whether anybody may ask for the gradient of an element with respect to one of these rows (m,)."""
        observed = self.structure.observed
        if observed is not None and rows.any():
            rows = rows & observed.rows_at(self.x[element : element + 1])[0].cpu().numpy()
        return bool(rows.any())

    def record(self, method: GradientMethod, active: Sequence[int], info: GradientInfo) -> None:
        """Fill the record, and warn of what the answer depends on."""
        assert info.doubt is not None
        for place, element in enumerate(active):
            info.used[element] = self.used[place]
        info.doubt[list(active)] = from_numpy(self.doubt)
        info.fallbacks = [element for element in active if info.used[element] == "implicit, regularised"]

        def named(places: list[int]) -> str:
            return str([active[place] for place in sorted(places)[:10]])

        for places, text in (
            (self.loose, _LOOSE_WITH_RHO if self.with_rho else _LOOSE),
            (self.contradicted, _CONTRADICTED),
        ):
            if places:
                warn(f"{method}: the optimality conditions of elements {named(places)} are singular: {text}")
        if self.doubtful:
            size = max(self.doubt[place] for place in self.doubtful)
            share = f"a share of {size:.0e}" if np.isfinite(size) and size < 1 else "any amount"
            warn(
                f"{method}: the optimality conditions of elements {named(self.doubtful)} are nearly singular, and the "
                f"error of their solutions could change their gradients by {share}. With rho > 0 they are not singular."
            )
        if self.one_sided:
            warn(
                f"{method}: the solutions of elements {named(self.one_sided)} are at a kink, where a constraint "
                "is active with a multiplier of zero: their gradients are those of one side. LPGD with a finite tau "
                "averages both."
            )
        if self.curved:
            warn(f"{method}: the multipliers of elements {named(self.curved)} {CURVED}")
        singular = {*self.loose, *self.contradicted}  # which says more
        for dependent, names in ((self.dependent, ("A", "b")), (self.dependent_bounds, ("lower", "upper"))):
            if places := [place for place in dependent if place not in singular]:
                info.notices |= dict.fromkeys(names, _MULTIPLIERS.format(method=method, elements=named(places)))


CURVED = (
    "are not unique, at constraints that curve: how far a solution moves along a curved constraint depends on the "
    "share that it has of the multipliers. The gradient is right where one set is stated several times, and not where "
    "a plane or another set touches a curved one. Leave out constraints that others imply."
)
_LOOSE = (
    "their solutions are not unique, and their gradients are minimum-norm answers. rho > 0, or LPGD with a finite tau, "
    "is well defined there."
)
_LOOSE_WITH_RHO = "their gradients are minimum-norm answers. LPGD with a finite tau is well defined there."
_CONTRADICTED = (
    "constraints depend on each other, so that multipliers are not unique and small changes may make them contradict "
    "each other; the answer depends on it, and is the minimum-norm one. Leave out constraints that others imply."
)
_MULTIPLIERS = (
    "{method}: the multipliers of elements {elements} are not unique, as constraints depend on each other. Gradients "
    "with respect to the objective are exact; those with respect to the constraints are minimum-norm answers, shared "
    "out among the constraints that imply each other. Leave out those that others imply to have them unique."
)
