"""Clarabel: an interior-point solver for every cone of this library but the dual exponential and dual power ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import IntArray
from lpgd.cones.product import Cones, svec_size, upper_triangle_rows
from lpgd.problems.base import State
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import RowForm, RowPoint, RowVectors
from lpgd.solvers.base import Capabilities
from lpgd.status import Status

__all__ = ["Clarabel"]

_STATUSES = {
    "Solved": Status.SOLVED,
    "AlmostSolved": Status.INACCURATE,
    "PrimalInfeasible": Status.INFEASIBLE,
    "AlmostPrimalInfeasible": Status.INFEASIBLE,
    "DualInfeasible": Status.UNBOUNDED,
    "AlmostDualInfeasible": Status.UNBOUNDED,
    "MaxIterations": Status.ITERATION_LIMIT,
    "MaxTime": Status.TIME_LIMIT,
    "NumericalError": Status.NUMERICAL_ERROR,
    "InsufficientProgress": Status.NUMERICAL_ERROR,
    "CallbackTerminated": Status.NUMERICAL_ERROR,
    "Unsolved": Status.NUMERICAL_ERROR,
}

DRAFT, ROUGH_DRAFT = 3e-8, 1e-6
"""The tolerance of drafts, on symmetric and on other cones: with larger ones Newton's method needs more time than the
solver saves."""
FEW = 64
"""Of programs with at most so many variables and rows a solve takes less time than a step of Newton's method."""
SUPERNODAL = 22
"""The side of semidefinite matrices from which a supernodal factorisation of their dense blocks is the faster one."""


@dataclass(frozen=True)
class Clarabel(ElementwiseSolver):
    """Clarabel (Goulart and Chen 2024), set up once for matrices and updated in place for all vectors that meet them.

    An interior-point method has no warm start; on an optimal face it returns the face's analytic centre.  Without
    ``equilibrate``, new matrices of the same pattern are updated in place as well.  With it they are not: an update
    keeps the scaling of the old matrices, and on an optimal face the solution depends on it (clarabel 0.11.1).

    Args:
        max_threads: threads of the linear solver of one element; the batch already runs over threads.
        equilibrate: scale the data before solving.
        regularization: static regularisation of the KKT factorisation.
        corrected: linear systems are solved once more for what regularisation leaves of them (iterative refinement).
        direct_solve_method: the linear solver's name, as Clarabel has it.  None is ``"qdldl"``, and ``"faer"`` where a
            semidefinite cone makes a large dense block: Clarabel's own choice for large systems takes 1.4 to 1.7 times
            as long as the former on the 9×9 Sudoku, and the former up to thirteen times as long as the latter on
            matrices of side 55 (clarabel 0.11.1).
    """

    max_iterations: int = 200
    max_threads: int = 1
    equilibrate: bool = True
    regularization: float = 1e-8
    direct_solve_method: str | None = None
    corrected: bool = True

    name: ClassVar[str] = "CLARABEL"
    package: ClassVar[str] = "clarabel"
    pip_name: ClassVar[str] = "clarabel"
    handover: ClassVar[float] = 1.5e-4
    finest_tolerance: ClassVar[float] = 1e-11
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset({"zero", "nonnegative", "second_order", "semidefinite", "exponential", "power"}),
        quadratic=True,
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "tol": "tolerance",
        "tol_gap_abs": "tolerance",
        "tol_gap_rel": "tolerance",
        "tol_feas": "tolerance",
        "max_iter": "max_iterations",
        "max_iters": "max_iterations",
        "time_limit_secs": "time_limit",
        "equilibrate_enable": "equilibrate",
        "static_regularization_constant": "regularization",
        "iterative_refinement_enable": "corrected",
    }

    @property
    def updates_matrices(self) -> bool:
        return not self.equilibrate

    def solution_error(self, problem: ConicProblem) -> float:
        # The gap is what converges: on curved cones its root bounds the distance to the solution.
        return self.tolerance if problem.structure.cones.is_polyhedral else self.tolerance**0.5

    def draft(self, structure: ConicStructure) -> Clarabel | None:
        cones = structure.cones
        limited = self.time_limit is not None or self.max_iterations < type(self).max_iterations
        if cones.is_polyhedral or limited or self.verbose:
            return None
        symmetric = not (cones.exponential or cones.dual_exponential or cones.power)
        tolerance = max(self.tolerance, DRAFT if symmetric else ROUGH_DRAFT)
        # Corrections take 40 % of the time; on cones that are not symmetric it needs twice the iterations without.
        corrected = not symmetric or structure.n + structure.m <= FEW
        return replace(self, tolerance=tolerance, equilibrate=False, corrected=self.corrected and corrected)

    def method_for(self, cones: Cones) -> str:
        """The linear solver for a program over these cones."""
        if self.direct_solve_method is not None:
            return self.direct_solve_method
        return "faer" if max(cones.semidefinite, default=0) >= SUPERNODAL else "qdldl"

    def prepare(self, form: RowForm) -> Prepared:
        return _PreparedClarabel(self, form)


class _PreparedClarabel(Prepared):
    def __init__(self, options: Clarabel, form: RowForm) -> None:
        self.layout = _layout(form.cones)
        self.source, self.place = self.layout.source, self.layout.place
        n, m = form.n, form.pattern.shape[0]
        A, self.order = form.A, slice(None)
        if self.place is not None:
            rows = self.place[form.pattern.rows]
            self.order = np.lexsort((rows, form.pattern.columns))
            A = sp.csc_array((form.values[self.order], rows[self.order], A.indptr), shape=A.shape)
        options = replace(options, direct_solve_method=options.method_for(form.cones))
        self.solver = options.module().DefaultSolver(
            form.upper_P(), np.zeros(n), A, np.zeros(m), self.layout.cones, _settings(options)
        )

    def update(self, form: RowForm) -> None:
        self.solver.update(P=form.upper_values(), A=form.values[self.order])

    def memory(self, form: RowForm) -> int:
        blocks = sum(svec_size(side) ** 2 for side in form.cones.semidefinite)  # dense, in its KKT matrix
        return 10_000 + 600 * (form.n + self.source.size) + 72 * form.size + 48 * blocks

    def solve(self, vectors: RowVectors, state: State) -> Outcome:
        q, b = vectors
        self.solver.update(q=q, b=b if self.place is None else b[self.source])
        result = self.solver.solve()
        y, s = np.asarray(result.z), np.asarray(result.s)
        if self.place is not None:
            y, s = y[self.place], s[self.place]
        status = _STATUSES.get(str(result.status), Status.NUMERICAL_ERROR)
        return Outcome(status, RowPoint(np.asarray(result.x), y, s), result.iterations)


@lru_cache(maxsize=64)
def _settings(options: Clarabel) -> Any:
    settings = options.module().DefaultSettings()
    settings.verbose = options.verbose
    settings.max_iter = options.max_iterations
    if options.time_limit is not None:
        settings.time_limit = options.time_limit
    for criterion in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
        setattr(settings, criterion, options.tolerance)
    settings.max_threads = options.max_threads
    settings.equilibrate_enable = options.equilibrate
    settings.static_regularization_constant = options.regularization
    settings.direct_solve_method = options.direct_solve_method
    settings.iterative_refinement_enable = options.corrected
    # Presolve and chordal decomposition rewrite the data, after which it cannot be updated (clarabel 0.11.1).
    settings.presolve_enable = False
    settings.chordal_decomposition_enable = False
    return settings


class _Layout(NamedTuple):
    """Clarabel's cones, and how its rows are ordered."""

    cones: list[Any]
    source: IntArray  # for each of its rows, ours
    place: IntArray | None  # for each of ours, its; None where the order is the same


@lru_cache(maxsize=64)
def _layout(cones: Cones) -> _Layout:
    source = upper_triangle_rows(cones)
    same = np.array_equal(source, np.arange(source.size))
    return _Layout(_cones(Clarabel.module(), cones), source, None if same else np.argsort(source))


def _cones(clarabel: ModuleType, cones: Cones) -> list[Any]:
    blocks = []
    if cones.zero:
        blocks.append(clarabel.ZeroConeT(cones.zero))
    if cones.nonnegative:
        blocks.append(clarabel.NonnegativeConeT(cones.nonnegative))
    blocks += [clarabel.SecondOrderConeT(size) for size in cones.second_order]
    blocks += [clarabel.PSDTriangleConeT(side) for side in cones.semidefinite]
    blocks += [clarabel.ExponentialConeT()] * cones.exponential
    blocks += [clarabel.PowerConeT(exponent) for exponent in cones.power]
    return blocks
