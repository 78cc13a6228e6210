"""HiGHS: simplex, hot-started, for linear programs; branch and cut for integer ones; small convex quadratic ones."""

from __future__ import annotations

import time
import zlib
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import scipy.sparse as sp

from lpgd.arrays import FloatArray
from lpgd.problems.base import State, States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import Form, IntervalForm, IntervalPoint, IntervalVectors
from lpgd.solvers.backends.highs_basis import Basis
from lpgd.solvers.backends.highs_model import Model, check
from lpgd.solvers.backends.smaller_costs import WithSmallerCosts
from lpgd.solvers.base import POLYHEDRAL, Capabilities
from lpgd.status import Status, warn

__all__ = ["HiGHS"]

Multipliers = Literal["relaxation", "fixed"]

LARGE_QUADRATIC = 300
"""Quadratic programs with more variables are warned about: 729 take minutes each (highspy 1.15.1)."""
PRIMAL = {"simplex_strategy": 4, "primal_simplex_bound_perturbation_multiplier": 0.0}
DUAL = {"simplex_strategy": 1, "primal_simplex_bound_perturbation_multiplier": 1.0}  # the defaults
SOON = 1000
"""So many primal steps are taken from a vertex that another cost has left behind: 128 perturbed programs of 240
variables and 60 rows take 0.12 s so, and 0.20 s by the dual method (highspy 1.15.1)."""
COARSER = 100.0
"""By so much: numbers of 1e5 are asked for 1e-14 of their size else, and one program in two hundred fails."""

OWN, ROUNDING = 1e-6, 1e-14
"""The share of a constraint's own terms from which it is broken, and that of the largest number that is rounding."""


@dataclass(frozen=True)
class HiGHS(ElementwiseSolver):
    """HiGHS (Huangfu and Hall 2018) for linear programs, and convex quadratic ones of up to about a hundred variables.

    A linear program is solved by the simplex method from the element's own basis, or from the slack basis: its
    solutions are vertices, exact up to rounding.  Quadratic programs are started cold each time and take about the cube
    of the number of variables, and about one in thirty with 50 variables ends as a NUMERICAL_ERROR; for those
    :class:`~lpgd.solvers.DAQP` is faster (highspy 1.15.1).

    An integer program with a linear objective is solved to optimality by branch and cut; first its linear relaxation,
    from the element's own basis, which is all there is to do where that has an integer solution.  Only a search with a
    limit starts from the element's own solution, to have one when it is cut short.  Integer
    programs have no multipliers that say what constraints are worth; ``multipliers`` chooses what stands in for them in
    the solution, and so in gradients with respect to constraints:

    - ``"relaxation"``: those of the linear relaxation, which are best for the Lagrangian dual.  They see which
      constraints are scarce to first order: each row that limits the relaxation has a price, whether or not it has
      slack left at the integer solution.  They cannot see the gap between both: a row that limits integer solutions
      only has none, and a price does not say that a small change lets another integer solution in.
    - ``"fixed"``: those of the linear program in the continuous variables, with integer variables fixed at the
      solution.  They are exact for the continuous part, and of a program without one all zero: its constraints then get
      a zero gradient.

    Args:
        tolerance: primal and dual feasibility tolerance, and how far from whole a number may be, at least 1e-10.
        max_iterations: of simplex, or nodes of branch and cut.
        presolve: reduce a linear program before a cold start.  Integer programs always are.
        gap: relative distance to the best objective at which the search for an integer solution may stop: 0 is the
            optimum; an element with a gap left has the status WITHIN_GAP.  One that ends at a time or iteration limit
            keeps the best solution found, if there is one.
        multipliers: see above.

    Raises:
        ValueError: an option is out of its range.
    """

    tolerance: float = 1e-9
    max_iterations: int = 1_000_000
    presolve: bool = False
    gap: float = 0.0
    multipliers: Multipliers = "relaxation"

    name: ClassVar[str] = "HIGHS"
    package: ClassVar[str] = "highspy"
    pip_name: ClassVar[str] = "highspy"
    finest_tolerance: ClassVar[float] = 1e-9
    problem_form: ClassVar[type[Form]] = IntervalForm
    forgets: ClassVar[bool] = False  # linear programs end at the same vertex, by other factors
    capabilities: ClassVar[Capabilities] = Capabilities(POLYHEDRAL, quadratic=True, warm_start=True, integer=True)
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "max_iters": "max_iterations",
        "simplex_iteration_limit": "max_iterations",
        "mip_rel_gap": "gap",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.gap < np.inf:
            raise ValueError(f"gap is {self.gap}; it must be nonnegative and finite.")
        if self.multipliers not in get_args(Multipliers):
            choices = ", ".join(get_args(Multipliers))
            raise ValueError(f"multipliers is {self.multipliers!r}; it must be one of {choices}.")

    def unsupported(self, structure: ConicStructure) -> str | None:
        reason = super().unsupported(structure)
        if reason is None and structure.has_integers and structure.quadratic.nnz:
            return f"{self.name} has no quadratic objective with integer variables"
        return reason

    def solve(self, problem: ConicProblem, states: States = (), executor: Executor | None = None) -> ConicSolution:
        structure = problem.structure
        if structure.quadratic.nnz and structure.n > LARGE_QUADRATIC:
            warn(
                f"HiGHS solves quadratic programs cold, in time that grows with the cube of their {structure.n} "
                "variables (rho > 0 makes a linear program quadratic); INTERIOR, DAQP and PIQP are much faster."
            )
        return super().solve(problem, states, executor)

    def solution_error(self, problem: ConicProblem) -> float:
        # The basis is exact; what is left is the rounding of its factors (measured on planted problems).
        return 1e-10 if problem.structure.quadratic.nnz else 1e-12

    def prepare(self, form: IntervalForm) -> Prepared:
        return _PreparedInteger(self, form) if form.structure.has_integers else _PreparedHiGHS(self, form)


def _tolerances(tolerance: float, *more: str) -> dict[str, Any]:
    names = ("primal_feasibility_tolerance", "dual_feasibility_tolerance", *more)
    return dict.fromkeys(names, max(tolerance, 1e-10))


class _PreparedHiGHS(WithSmallerCosts):
    """A linear or quadratic program."""

    def __init__(self, options: HiGHS, form: IntervalForm) -> None:
        self.options, self.form, self.quadratic = options, form, form.has_quadratic
        settings = {
            **_tolerances(options.tolerance),
            "output_flag": options.verbose,
            "solver": "choose" if self.quadratic else "simplex",
            "presolve": "on" if options.presolve else "off",
            "simplex_iteration_limit": options.max_iterations,
            # Its active-set method for quadratic programs cycles on some, to any limit (highspy 1.15.1).
            "qp_iteration_limit": min(options.max_iterations, 1000 + 50 * (form.n + form.m)),
            # By default 1e-7 is added to P, which moves solutions by as much.
            "qp_regularization_value": 0.0,
        }
        self.model = Model(options.module(), form, settings, np.zeros(0, np.int64))
        self.solver = self.model.solver
        if self.quadratic:
            n, lower, triangular = form.n, sp.csc_array(form.upper_P().T), 1
            check(
                options.module(),
                self.solver.passHessian(n, lower.nnz, triangular, lower.indptr, lower.indices, lower.data),
                "passHessian",
            )

    def memory(self, form: IntervalForm) -> int:
        if self.quadratic:
            return 75_000 + 20 * form.size
        return 150_000 + 150 * (form.n + form.m) + 100 * form.size  # the factors of the last basis, mostly

    def attempt(self, vectors: IntervalVectors, state: State) -> Outcome:
        solver, quadratic = self.solver, self.quadratic
        self.model.set(vectors)
        ends, is_vertex = zlib.crc32(np.concatenate(vectors[1:5]).tobytes()), False
        if state is not None and not quadratic and len(state.basis.row_status) == self.form.m:
            is_vertex = state.ends == ends
            solver.setBasis(state.basis)
        else:
            solver.clearSolver()
        status = self._from_vertex() if is_vertex else self.model.run(self.options.time_limit)
        if status is Status.NUMERICAL_ERROR:  # from some vertices it ends as kUnknown, from no basis it does not
            solver.clearSolver()
            status = self.model.run(self.options.time_limit)
        info = solver.getInfo()
        iterations = max(info.qp_iteration_count if quadratic else info.simplex_iteration_count, 0)
        if status in (Status.INFEASIBLE, Status.UNBOUNDED):
            return Outcome(status, self._proof(status), iterations)
        if not status.has_iterate:
            return Outcome(status, None, iterations)
        found = solver.getSolution()
        x, y, z = (np.array(values) for values in (found.col_value, found.row_dual, found.col_dual))
        if not (np.isfinite(x).all() and np.isfinite(y).all() and np.isfinite(z).all()):
            return Outcome(Status.NUMERICAL_ERROR, None, iterations)  # HiGHS 1.16 ends some quadratic programs at ±inf
        next_state = Basis(solver.getBasis(), ends) if status is Status.SOLVED and not quadratic else None
        return Outcome(status, IntervalPoint(x, -y, -z), iterations, next_state)

    def _from_vertex(self) -> Status:
        """From a vertex that is feasible still: primal steps, without perturbed bounds, which are to be undone."""
        limit, seconds = self.options.max_iterations, self.options.time_limit
        self.model.choose(PRIMAL | {"simplex_iteration_limit": min(SOON, limit)})
        status = self.model.run(seconds)
        self.model.choose(DUAL | {"simplex_iteration_limit": limit})
        return status if status is Status.SOLVED else self.model.run(seconds)

    def _proof(self, status: Status) -> IntervalPoint | None:
        """The ray of the simplex method that shows the verdict on a linear program."""
        if self.quadratic:
            return None
        x, y, z = np.full(self.form.n, np.nan), np.full(self.form.m, np.nan), np.zeros(self.form.n)
        if status is Status.INFEASIBLE:
            _, known, ray = self.solver.getDualRay()
            y = -np.array(ray)
        else:
            _, known, ray = self.solver.getPrimalRay()
            x = np.array(ray)
        return IntervalPoint(x, y, z) if known else None


class _IntegerState(NamedTuple):
    """Where the solution of an integer program starts from."""

    relaxation: Basis | None
    x: FloatArray


class _PreparedInteger(WithSmallerCosts):
    """An integer program: its linear relaxation, and branch and cut."""

    def __init__(self, options: HiGHS, form: IntervalForm) -> None:
        self.options, self.form, self.integer = options, form, form.structure.integer_index
        self.relaxation = _PreparedHiGHS(options, form)
        settings = {
            **_tolerances(options.tolerance, "mip_feasibility_tolerance"),
            "output_flag": options.verbose,
            "mip_rel_gap": options.gap,
            "mip_abs_gap": 0.0,
            "mip_max_nodes": min(options.max_iterations, 2**31 - 1),
            # It takes 7 of 10 ms of a program of ten variables, and finds nothing that others do not (highspy 1.15.1).
            "mip_heuristic_run_feasibility_jump": False,
        }
        self.model = Model(options.module(), form, settings, self.integer)
        self.limited = options.time_limit is not None or options.max_iterations < HiGHS.max_iterations

    def memory(self, form: IntervalForm) -> int:
        return 2 * self.relaxation.memory(form)

    def attempt(self, vectors: IntervalVectors, state: State) -> Outcome:
        started = time.perf_counter()
        # Tolerances of costs are absolute: small costs would hide better solutions.  Powers of two scale exactly.
        largest = np.abs(vectors.q).max()
        scale = 2.0 ** min(np.frexp(largest)[1], 0) if largest else 1.0
        vectors = vectors._replace(q=vectors.q / scale)
        relaxed = self.relaxation.solve(vectors, state.relaxation if state is not None else None)
        if relaxed.status is not Status.SOLVED:
            # An integer program with an unbounded relaxation has no minimiser either, with rational data.
            return Outcome(relaxed.status, None, 0)
        status, nodes, found = Status.SOLVED, 0, relaxed.point.x
        x = self._rounded(found)
        if np.abs(x - found).max() > self.options.tolerance or self._is_broken(vectors, x):
            status, nodes, found = self._branch(vectors, state, started)
            if found is None:
                return Outcome(status, None, nodes)
            x = self._rounded(found)
            if self._is_broken(vectors, x):
                again = self._with_integers_fixed(vectors, x)
                x = again.point.x if again.status is Status.SOLVED else x
                if self._is_broken(vectors, x):
                    status = Status.INACCURATE
        if self.options.multipliers == "fixed":
            y, z = self._fixed_multipliers(vectors, x)
        else:
            _, y, z = relaxed.point
        return Outcome(status, IntervalPoint(x, scale * y, scale * z), nodes, _IntegerState(relaxed.state, x))

    def _rounded(self, x: FloatArray) -> FloatArray:
        x = x.copy()
        x[self.integer] = np.rint(x[self.integer]) + 0.0  # no negative zeros
        return x

    def _is_broken(self, vectors: IntervalVectors, x: FloatArray) -> bool:
        """Whether a row or bound is violated by a share of its own terms.

        Of ``y <= 1e7 b`` and y = 1e-2 a b of zero is within tolerances, which are absolute, and wrong.
        """
        A, floor = self.form.A, ROUNDING * max(1.0, np.abs(x).max())
        for values, terms, lower, upper in (
            (A @ x, abs(A) @ np.abs(x), vectors.row_lower, vectors.row_upper),
            (x, 0.0, vectors.lower, vectors.upper),
        ):
            for outside, end in ((lower - values, lower), (values - upper, upper)):
                share = OWN * (terms + np.abs(end))
                if ((outside > floor) & (outside > share) & (share > 0)).any():
                    return True
        return False

    def _branch(self, vectors: IntervalVectors, state: State, started: float) -> tuple[Status, int, FloatArray | None]:
        """Branch and cut: the status, the number of nodes, and the solution if there is one.

        From a start, HiGHS ends too early on one program in twenty: it calls the start optimal though there are better
        points (highspy 1.16.0, presolved, 7 binary variables), and a start saves a quarter of the time at most.  So
        only a search that may be cut short gets one, and an end that is no better than the start is not believed.
        """
        start = state.x if state is not None and self.limited else None
        status, nodes, x = self._search(vectors, start, started)
        if start is None or not (status is Status.INFEASIBLE or status.usable):
            return status, nodes, x
        if x is not None and vectors.q @ x < vectors.q @ start - _CLOSED * np.abs(vectors.q) @ np.abs(start):
            return status, nodes, x
        status, more, again = self._search(vectors, None, started)
        if again is None or (x is not None and vectors.q @ x < vectors.q @ again):
            again = x
        return status, nodes + more, again

    def _search(
        self, vectors: IntervalVectors, start: FloatArray | None, started: float
    ) -> tuple[Status, int, FloatArray | None]:
        """One search, and a coarser one where it ends with an error: tolerances are absolute, whatever the numbers."""
        vectors = self._whole_bounds(vectors)
        if (vectors.lower > vectors.upper).any():
            return Status.INFEASIBLE, 0, None
        found = self._search_once(vectors, start, started)
        if found[0] is Status.NUMERICAL_ERROR:
            name, fine = "mip_feasibility_tolerance", self.options.tolerance
            self.model.choose(_tolerances(COARSER * fine, name))
            found = self._search_once(vectors, start, started)
            self.model.choose(_tolerances(fine, name))
        return found

    def _search_once(
        self, vectors: IntervalVectors, start: FloatArray | None, started: float
    ) -> tuple[Status, int, FloatArray | None]:
        solver, limit = self.model.solver, self.options.time_limit
        self.model.set(vectors)
        solver.clearSolver()
        if start is not None:
            solution = self.options.module().HighsSolution()
            solution.col_value, solution.value_valid = start.tolist(), True
            solver.setSolution(solution)
        status = self.model.run(None if limit is None else max(limit - (time.perf_counter() - started), 0.0))
        info = solver.getInfo()
        nodes = max(int(info.mip_node_count), 0)
        found = solver.getSolution()
        if not status.has_iterate or not found.value_valid:
            return status, nodes, None
        if status is Status.SOLVED and info.mip_gap > _CLOSED:
            status = Status.WITHIN_GAP
        return status, nodes, np.array(found.col_value)

    def _whole_bounds(self, vectors: IntervalVectors) -> IntervalVectors:
        """Bounds of integer variables moved inwards to whole numbers, within the tolerance.

        With others HiGHS calls one program in thirty with a few integer variables optimal at a point that is not, or
        infeasible (highspy 1.15.1, with presolve and without).
        """
        lower, upper, slack = vectors.lower.copy(), vectors.upper.copy(), self.options.tolerance
        lower[self.integer] = np.ceil(lower[self.integer] - slack)
        upper[self.integer] = np.floor(upper[self.integer] + slack)
        return vectors._replace(lower=lower, upper=upper)

    def _with_integers_fixed(self, vectors: IntervalVectors, x: FloatArray) -> Outcome:
        """The linear program in the continuous variables, with the integer ones at ``x``."""
        lower, upper = vectors.lower.copy(), vectors.upper.copy()
        lower[self.integer] = upper[self.integer] = x[self.integer]
        return self.relaxation.solve(vectors._replace(lower=lower, upper=upper), None)

    def _fixed_multipliers(self, vectors: IntervalVectors, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Multipliers of rows and of the continuous variables' bounds, with the integer variables at ``x``.

        From no basis: from the relaxation's, rows that the integer variables alone make tight would keep its prices.
        """
        outcome = self._with_integers_fixed(vectors, x)
        if outcome.status is not Status.SOLVED:
            return np.full(self.form.m, np.nan), np.full(self.form.n, np.nan)
        _, y, z = outcome.point
        z[self.integer] = 0.0
        return y, z


_CLOSED = 1e-9
"""A relative gap below this is rounding."""
