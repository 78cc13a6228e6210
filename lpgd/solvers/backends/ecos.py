"""ECOS: a small interior-point solver for linear, second-order and exponential cone programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import FloatArray, IntArray
from lpgd.execution.interrupts import InterruptedSolveError, hearing
from lpgd.problems.base import State
from lpgd.problems.conic.problem import ConicProblem
from lpgd.solvers.backends.cone_form import ConeForm
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import RowForm, RowPoint, RowVectors
from lpgd.solvers.base import Capabilities
from lpgd.status import Status

__all__ = ["ECOS"]

# ECOS 2.0 (include/ecos.h).
_STATUSES = {
    0: Status.SOLVED,
    1: Status.INFEASIBLE,
    2: Status.UNBOUNDED,
    10: Status.INACCURATE,
    11: Status.INFEASIBLE,
    12: Status.UNBOUNDED,
    -1: Status.ITERATION_LIMIT,
    -2: Status.NUMERICAL_ERROR,
    -3: Status.NUMERICAL_ERROR,
    -7: Status.NUMERICAL_ERROR,
}
_INTERRUPTED = -4
_INACCURATE = (10, 11, 12)


@dataclass(frozen=True)
class ECOS(ElementwiseSolver):
    """ECOS (Domahidi, Chu and Boyd 2013).  It has no quadratic term and sets up anew for each solve.

    ECOS has no time limit of its own: a ``time_limit`` is refused.  A quadratic objective reaches it as a cone, whose
    solutions are good to about the root of the tolerance; the default is tighter than ECOS's own 1e-8 for that.
    """

    tolerance: float = 1e-9
    max_iterations: int = 100

    name: ClassVar[str] = "ECOS"
    package: ClassVar[str] = "ecos"
    pip_name: ClassVar[str] = "ecos"
    takes_interrupts: ClassVar[bool] = True
    finest_tolerance: ClassVar[float] = 1e-9  # below, some solves of quadratic objectives break down (ecos 2.0.14)
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonnegative", "second_order", "exponential"}), time_limit=False
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "abstol": "tolerance",
        "reltol": "tolerance",
        "feastol": "tolerance",
        "max_iters": "max_iterations",
    }

    @property
    def updates_matrices(self) -> bool:
        return True

    def solution_error(self, problem: ConicProblem) -> float:
        linear = problem.structure.cones.is_polyhedral and not problem.structure.quadratic.nnz
        return self.tolerance if linear else 100 * self.tolerance  # measured on problems with known solutions

    def prepare(self, form: RowForm) -> Prepared:
        return _PreparedECOS(self, form)


class _PreparedECOS(Prepared):
    def __init__(self, options: ECOS, form: RowForm) -> None:
        self.options = options
        self.update(form)

    def update(self, form: RowForm) -> None:
        self.form = ConeForm(form)
        cones = self.form.cones
        exponential = cones.sections["exponential"]
        # ECOS has the exponential cone as (u, w, v) where ours is (u, v, w).
        order = np.arange(exponential.start, exponential.stop).reshape(-1, 3)[:, [0, 2, 1]].ravel()
        self.conic = np.r_[cones.zero : exponential.start, order]
        self.dimensions = {"l": cones.nonnegative, "q": list(cones.second_order), "e": cones.exponential}
        place = np.empty(cones.rows, dtype=np.int64)
        place[: cones.zero] = np.arange(cones.zero)
        place[self.conic] = np.arange(self.conic.size)
        first = self.form.row < cones.zero
        self.equality, self.inequality = (
            _matrix(
                self.form.value[chosen],
                place[self.form.row[chosen]],
                self.form.column[chosen],
                (height, self.form.width),
            )
            for chosen, height in ((first, cones.zero), (~first, self.conic.size))
        )

    def memory(self, form: RowForm) -> int:
        return 3_000 + 48 * form.size  # it sets up for each solve, and keeps nothing

    def solve(self, vectors: RowVectors, state: State) -> Outcome:
        q, b = vectors
        cost, right = self.form.vectors(q, b)
        zero = self.form.cones.zero
        result = self._run(cost, right)
        info = result["info"]
        if info["exitFlag"] in _INACCURATE and hearing():
            # An iterate that is nearly optimal hides an interrupt (ecos 2.0.14).  The same solve ends the same way.
            again = self._run(cost, right)["info"]
            if any(again[name] != info[name] for name in ("exitFlag", "iter")):
                raise InterruptedSolveError
        if info["exitFlag"] == _INTERRUPTED:
            raise InterruptedSolveError
        y, s = np.zeros(right.size), np.zeros(right.size)
        if zero:
            y[:zero] = result["y"]
        if self.conic.size:
            y[self.conic], s[self.conic] = result["z"], result["s"]
        status = _STATUSES.get(info["exitFlag"], Status.NUMERICAL_ERROR)
        return Outcome(status, self.form.invert(RowPoint(np.asarray(result["x"]), y, s)), info["iter"])

    def _run(self, cost: FloatArray, right: FloatArray) -> dict[str, Any]:
        zero = self.form.cones.zero
        keywords: dict[str, Any] = {}
        if zero:
            keywords = {"A": self.equality.copy(), "b": right[:zero].copy()}
        options = self.options
        # ECOS scales the arrays it is given in place (ecos 2.0.14): it gets copies.
        return options.module().solve(
            cost.copy(),
            self.inequality.copy() if self.conic.size else None,
            right[self.conic] if self.conic.size else None,
            self.dimensions,
            verbose=options.verbose,
            max_iters=options.max_iterations,
            abstol=options.tolerance,
            reltol=options.tolerance,
            feastol=options.tolerance,
            **keywords,
        )


def _matrix(values: FloatArray, rows: IntArray, columns: IntArray, shape: tuple[int, int]) -> Any:
    """A matrix of SciPy's, as ECOS knows no sparse arrays; where there are no entries, with a zero, or it crashes.

    (ecos 2.0.14)
    """
    if not values.size and shape[0]:
        values, rows, columns = np.zeros(1), np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    return sp.csc_matrix((values, (rows, columns)), shape=shape)
