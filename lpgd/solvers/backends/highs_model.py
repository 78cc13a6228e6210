"""HiGHS with a model: the matrices of a form at once, its vectors for each solve."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

import numpy as np

from lpgd.arrays import IntArray
from lpgd.execution.quiet import quiet_descriptor
from lpgd.solvers.backends.forms import IntervalForm, IntervalVectors
from lpgd.status import Status

__all__ = ["Model", "check"]

_STATUSES = {
    "kOptimal": Status.SOLVED,
    "kModelEmpty": Status.SOLVED,
    "kInfeasible": Status.INFEASIBLE,
    "kUnbounded": Status.UNBOUNDED,
    "kTimeLimit": Status.TIME_LIMIT,
    "kIterationLimit": Status.ITERATION_LIMIT,
    "kSolutionLimit": Status.ITERATION_LIMIT,
}


def check(highspy: ModuleType, status: Any, request: str) -> None:
    """HiGHS reports what it refuses by a return value."""
    if status == highspy.HighsStatus.kError:
        raise ValueError(f"HiGHS refuses {request}.")


_first_lock = threading.Lock()
_announced = False


def _new_solver(highspy: ModuleType) -> Any:
    """An instance.  The first of a process prints a banner before it can be told not to (highspy 1.16.0)."""
    global _announced
    with _first_lock:
        if not _announced:
            with quiet_descriptor():
                _announced, solver = True, highspy.Highs()
            return solver
    return highspy.Highs()


class Model:
    """HiGHS with the model of a form: its matrices at once, its vectors for each solve."""

    def __init__(
        self, highspy: ModuleType, form: IntervalForm, settings: dict[str, Any], integer_index: IntArray
    ) -> None:
        self.highspy, self.solver = highspy, _new_solver(highspy)
        solver = self.solver
        # By default entries of A below 1e-9 are dropped.
        self.choose({"parallel": "off", "small_matrix_value": 1e-12} | settings)
        n, m, A = form.n, form.m, form.A
        free, ends, integrality = np.full(n, np.inf), np.zeros(m), np.zeros(n, np.int32)
        integrality[integer_index] = 1
        colwise, minimise = 1, 1
        check(
            highspy,
            solver.passModel(
                n, m, A.nnz, colwise, minimise, 0.0, np.zeros(n), -free, free, ends, ends,
                A.indptr, A.indices, A.data, integrality,
            ),
            "passModel",
        )  # fmt: skip
        self.columns, self.rows = np.arange(n, dtype=np.int32), np.arange(m, dtype=np.int32)

    def choose(self, settings: dict[str, Any]) -> None:
        for name, value in settings.items():
            check(self.highspy, self.solver.setOptionValue(name, value), name)

    def set(self, vectors: IntervalVectors) -> None:
        solver, columns, rows = self.solver, self.columns, self.rows
        solver.changeColsCost(columns.size, columns, vectors.q)
        solver.changeColsBounds(columns.size, columns, vectors.lower, vectors.upper)
        solver.changeRowsBounds(rows.size, rows, vectors.row_lower, vectors.row_upper)

    def run(self, time_limit: float | None) -> Status:
        if time_limit is not None:
            # The clock runs on from solve to solve (highspy 1.15.1).
            self.solver.setOptionValue("time_limit", self.solver.getRunTime() + time_limit)
        self.solver.run()
        return _STATUSES.get(self.solver.getModelStatus().name, Status.NUMERICAL_ERROR)
