"""PIQP: a proximal interior-point solver for dense and sparse quadratic programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp

from lpgd.problems.base import State
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import BoxForm, Form, IntervalForm, IntervalPoint, IntervalVectors
from lpgd.solvers.base import POLYHEDRAL, Capabilities
from lpgd.status import Status

__all__ = ["PIQP"]

_STATUSES = {
    "PIQP_SOLVED": Status.SOLVED,
    "PIQP_MAX_ITER_REACHED": Status.ITERATION_LIMIT,
    "PIQP_PRIMAL_INFEASIBLE": Status.INFEASIBLE,
    "PIQP_DUAL_INFEASIBLE": Status.UNBOUNDED,
    "PIQP_NUMERICS": Status.NUMERICAL_ERROR,
}


@dataclass(frozen=True)
class PIQP(ElementwiseSolver):
    """PIQP (Schwan et al. 2023) for linear and quadratic programs; no warm start, and no time limit.

    It holds the interpreter's lock while it solves: only an executor with processes solves elements in parallel.

    Args:
        tolerance: absolute and relative, of residuals and duality gap.
        sparse: which of its two solvers; None takes the sparse one from 50 variables on if at most one entry in five
            of P and A is in their patterns.
    """

    tolerance: float = 1e-10
    max_iterations: int = 250
    sparse: bool | None = None

    name: ClassVar[str] = "PIQP"
    package: ClassVar[str] = "piqp"
    pip_name: ClassVar[str] = "piqp"
    finest_tolerance: ClassVar[float] = 1e-11
    # For good, PIQP makes a row zero that has no end once, and prints three lines of it (piqp 0.7.0).
    problem_form: ClassVar[type[Form]] = BoxForm
    forgets: ClassVar[bool] = False  # an update scales the matrices anew, from what they were scaled to
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=POLYHEDRAL, quadratic=True, time_limit=False, releases_gil=False
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "eps_abs": "tolerance",
        "eps_rel": "tolerance",
        "max_iter": "max_iterations",
        "max_iters": "max_iterations",
    }

    @property
    def updates_matrices(self) -> bool:
        return True

    def prepare(self, form: IntervalForm) -> Prepared:
        return _PreparedPIQP(self, form)


class _PreparedPIQP(Prepared):
    def __init__(self, options: PIQP, form: IntervalForm) -> None:
        piqp = options.module()
        self.zero = zero = form.zero
        sparse = options.sparse
        if sparse is None:
            sparse = form.n >= 50 and form.size <= 0.2 * form.n * (form.n + form.m)
        self.solver: Any = piqp.SparseSolver() if sparse else piqp.DenseSolver()
        settings = self.solver.settings
        settings.verbose = options.verbose
        settings.max_iter = options.max_iterations
        for criterion in ("eps_abs", "eps_rel", "eps_duality_gap_abs", "eps_duality_gap_rel"):
            setattr(settings, criterion, options.tolerance)
        self.sparse = sparse
        P, A, G = self._matrices(form)
        free = np.full(form.n, np.inf) if form.has_bounds else None
        self.bounded = form.has_bounds
        self.solver.setup(
            P,
            np.zeros(form.n),
            A,
            np.zeros(zero),
            G,
            None,
            np.zeros(form.m - zero),
            None if free is None else -free,
            free,
        )

    def _matrices(self, form: IntervalForm) -> tuple[Any, Any, Any]:
        zero = self.zero
        if self.sparse:
            # PIQP knows SciPy's matrices, not its arrays (piqp 0.7.0).
            A = sp.csr_array(form.A)
            return sp.csc_matrix(form.full_P()), sp.csc_matrix(A[:zero]), sp.csc_matrix(A[zero:])
        P, dense = np.asfortranarray(form.dense_P()), form.dense_A()
        return P, np.asfortranarray(dense[:zero]), np.asfortranarray(dense[zero:])

    def memory(self, form: IntervalForm) -> int:
        if self.sparse:
            return 20_000 + 600 * (form.n + form.m) + 60 * form.size
        return 10_000 + 24 * form.n * (form.n + form.m) + 8 * form.size

    def update(self, form: IntervalForm) -> None:
        P, A, G = self._matrices(form)
        self.solver.update(P=P, A=A, G=G)

    def solve(self, vectors: IntervalVectors, state: State) -> Outcome:
        zero, bounds = self.zero, {}
        if self.bounded:
            bounds = {"x_l": vectors.lower, "x_u": vectors.upper}
        self.solver.update(c=vectors.q, b=vectors.row_upper[:zero], h_u=vectors.row_upper[zero:], **bounds)
        status = _STATUSES.get(self.solver.solve().name, Status.NUMERICAL_ERROR)
        result = self.solver.result
        iterations = int(result.info.iter)
        if not status.has_iterate and status not in (Status.INFEASIBLE, Status.UNBOUNDED):
            return Outcome(status, None, iterations)
        # Iterates of a problem without a solution diverge along what proves it, more or less.
        # The result's vectors are those of the workspace: x is copied, the others are new.
        point = IntervalPoint(
            np.array(result.x), np.concatenate([result.y, result.z_u - result.z_l]), result.z_bu - result.z_bl
        )
        return Outcome(status, point, iterations)
