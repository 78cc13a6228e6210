"""SCS: a first-order solver for every cone of this library, warm-started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp

from lpgd.cones.product import Cones
from lpgd.execution.interrupts import InterruptedSolveError
from lpgd.execution.quiet import quiet
from lpgd.problems.base import State
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import RowForm, RowPoint, RowVectors
from lpgd.solvers.base import Capabilities
from lpgd.status import SetUpError, Status

__all__ = ["SCS"]

# SCS 3 (include/glbopts.h).
_STATUSES = {
    1: Status.SOLVED,
    2: Status.INACCURATE,
    -1: Status.UNBOUNDED,
    -2: Status.INFEASIBLE,
    -3: Status.NUMERICAL_ERROR,
    -4: Status.NUMERICAL_ERROR,
    -6: Status.UNBOUNDED,
    -7: Status.INFEASIBLE,
}
_INTERRUPTED = -5


@dataclass(frozen=True)
class SCS(ElementwiseSolver):
    """SCS (O'Donoghue 2021), one workspace for everything that shares its matrices, warm-started.

    Args:
        tolerance: both of SCS's criteria unless one is given below.  A first-order method: each further digit costs
            about as much as the one before, on linear programs much more.
        eps_abs, eps_rel: absolute and relative feasibility tolerance; None is ``tolerance``.
        scale: of the dual residual at the start.
        linear_solver: SCS's name of its linear solver.  Its own choice, MKL where there is one, takes 1.3 to 2 times as
            long on our benchmarks as the single-threaded ``"qdldl"`` (scs 3.3.1).
        eps_infeas, alpha, rho_x, adaptive_scale, normalize, acceleration_lookback, acceleration_interval: as SCS
            documents them; None is SCS's own default.
    """

    tolerance: float = 1e-6
    max_iterations: int = 100_000
    eps_abs: float | None = None
    eps_rel: float | None = None
    scale: float = 0.1
    linear_solver: str = "qdldl"
    eps_infeas: float | None = None
    alpha: float | None = None
    rho_x: float | None = None
    adaptive_scale: bool | None = None
    normalize: bool | None = None
    acceleration_lookback: int | None = None
    acceleration_interval: int | None = None

    name: ClassVar[str] = "SCS"
    package: ClassVar[str] = "scs"
    pip_name: ClassVar[str] = "scs"
    finest_tolerance: ClassVar[float] = 1e-9
    takes_interrupts: ClassVar[bool] = True
    forgets: ClassVar[bool] = False  # it keeps the scale of its steps
    capabilities: ClassVar[Capabilities] = Capabilities(
        cones=frozenset(
            {
                "zero",
                "nonnegative",
                "second_order",
                "semidefinite",
                "exponential",
                "dual_exponential",
                "power",
                "dual_power",
            }
        ),
        quadratic=True,
        warm_start=True,
        active_set=True,
    )
    aliases: ClassVar[dict[str, str]] = {
        "eps": "tolerance",
        "max_iters": "max_iterations",
        "time_limit_secs": "time_limit",
    }

    def prepare(self, form: RowForm) -> Prepared:
        return _PreparedSCS(self, form)


class _PreparedSCS(Prepared):
    def __init__(self, options: SCS, form: RowForm) -> None:
        self.options = options
        self.rows = form.A.shape[0]
        # SCS refuses a problem without rows; a row 0ᵀx + s = 0 in the nonnegative cone changes nothing.
        self.cones, A = (form.cones, form.A) if self.rows else (Cones(nonnegative=1), sp.csc_array((1, form.n)))
        self.data: dict[str, Any] = {"A": A, "b": np.zeros(max(self.rows, 1)), "c": np.zeros(form.n)}
        if form.has_quadratic:
            self.data["P"] = form.upper_P()
        self.b_padding = np.zeros(0 if self.rows else 1)
        self.solver, self.scale = self._set_up(), options.scale

    def _set_up(self) -> Any:
        options = self.options
        given = {name: getattr(options, name) for name in _OWN_DEFAULTS if getattr(options, name) is not None}
        try:
            # It prints that it cannot factorise a matrix, whatever verbose is (scs 3.3.1).
            with quiet(not options.verbose):
                return options.module().SCS(
                    self.data,
                    _cones(self.cones),
                    max_iters=options.max_iterations,
                    eps_abs=options.eps_abs if options.eps_abs is not None else options.tolerance,
                    eps_rel=options.eps_rel if options.eps_rel is not None else options.tolerance,
                    time_limit_secs=options.time_limit if options.time_limit not in (None, np.inf) else 0.0,
                    verbose=options.verbose,
                    scale=options.scale,
                    linear_solver=options.linear_solver,
                    **given,
                )
        except ValueError as error:
            if "ScsWork" in str(error):  # "ScsWork allocation error!": its factorisation broke down (scs 3.3.1)
                raise SetUpError(f"SCS cannot set up these matrices: {error}") from error
            raise

    def memory(self, form: RowForm) -> int:
        # Anderson acceleration keeps ten directions of n + m numbers, several times.
        return 40_000 + 1300 * (form.n + self.rows) + 45 * form.size

    def solve(self, vectors: RowVectors, state: State) -> Outcome:
        q, b = vectors
        if state is not None and state[1].size != b.size + self.b_padding.size:
            state = None  # a bound has come or gone since, and a row with it
        if state is None and self.scale != self.options.scale:
            # SCS keeps the scale it adapted to the last problem, also when it is told to start cold (scs 3.3.1): on
            # the Sudoku example that takes three times the iterations of a new object, and some never converge.
            self.solver = self._set_up()
        self.solver.update(b=np.concatenate([b, self.b_padding]), c=np.ascontiguousarray(q))
        if state is None:
            result = self.solver.solve(warm_start=False)
        else:
            x, y, s = state
            result = self.solver.solve(warm_start=True, x=x.copy(), y=y.copy(), s=s.copy())
        info = result["info"]
        if info["status_val"] == _INTERRUPTED:
            self.solver, self.scale = self._set_up(), self.options.scale
            raise InterruptedSolveError
        self.scale = info["scale"]
        status = _STATUSES.get(info["status_val"], Status.NUMERICAL_ERROR)
        if status is Status.INACCURATE:  # SCS calls every solve that reaches a limit inaccurate
            status = Status.TIME_LIMIT if "time_limit" in info["status"] else Status.ITERATION_LIMIT
        x, y, s = result["x"], result["y"], result["s"]
        next_state = (x, y, s) if status is Status.SOLVED else None
        return Outcome(status, RowPoint(x, y[: self.rows], s[: self.rows]), info["iter"], next_state)


_OWN_DEFAULTS = (
    "eps_infeas",
    "alpha",
    "rho_x",
    "adaptive_scale",
    "normalize",
    "acceleration_lookback",
    "acceleration_interval",
)


def _cones(cones: Cones) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "z": cones.zero,
        "l": cones.nonnegative,
        "q": list(cones.second_order),
        "s": list(cones.semidefinite),
        "ep": cones.exponential,
        "ed": cones.dual_exponential,
        "p": list(cones.power),
    }
    return {name: size for name, size in sizes.items() if size}
