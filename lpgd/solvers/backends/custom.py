"""A solver of the user's own, as a plain function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from lpgd.arrays import FloatArray
from lpgd.problems.base import State
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.elementwise import ElementwiseSolver, Outcome, Prepared
from lpgd.solvers.backends.forms import Form, IntervalForm, IntervalPoint, RowForm, RowPoint
from lpgd.solvers.backends.scs import SCS
from lpgd.solvers.base import POLYHEDRAL, Capabilities
from lpgd.status import Status

__all__ = ["CustomSolver"]

FormName = Literal["interval", "conic"]
_FORMS: dict[str, type[Form]] = {"interval": IntervalForm, "conic": RowForm}


@dataclass(frozen=True, init=False)
class CustomSolver(ElementwiseSolver):
    """Any function that solves one problem, with every gradient method of this library and no derivative to write.

    ``form="interval"``, for linear and quadratic programs:
    ``function(P, q, A, row_lower, row_upper, lower, upper)`` solves

        minimise ½ xᵀP x + qᵀx   subject to   row_lower ≤ A x ≤ row_upper,  lower ≤ x ≤ upper

    in which equalities have ``row_lower == row_upper``, and ends may be infinite.  It returns ``(x, y, z)`` with
    ``P x + q + Aᵀy + z = 0``: multipliers y of the rows and z of the bounds, **positive at an upper end, negative at a
    lower one**, zero inside (of a minimisation with the opposite signs, return ``-y`` and ``-z``).

    ``form="conic"``: ``function(P, q, A, b, cones)`` solves

        minimise ½ xᵀP x + qᵀx   subject to   A x + s = b,  s ∈ K

    with K described by a :class:`~lpgd.Cones`, bounds being rows, and returns ``(x, y, s)``, y in K* with
    ``P x + q + Aᵀy = 0``.

    P (n, n) and A (m, n) are ``scipy.sparse.csc_array``, the others vectors.  Where there is no solution the function
    returns a :class:`~lpgd.Status`.  An exception goes through to the caller.  Residuals are checked: an answer with
    wrong signs is INACCURATE, and warns.

    In interval form the function may return x alone.  Gradients with respect to A, b and bounds need multipliers, which
    are then found by least squares over the constraints that are active within ``10 tolerance``: right where the
    multipliers are unique, a choice of many where they are not.

    Args:
        function: the solver; for an executor with processes, one that pickles.
        form: which of the two signatures it has.
        quadratic: whether it takes a P that is not zero; problems with a quadratic objective are refused otherwise, and
            so are gradient methods with rho > 0 when they reach it.
        cones: names of the cones it takes in conic form (fields of :class:`~lpgd.Cones`); None is all of them.
        tolerance: relative error of its solutions; steps of LPGD are chosen by it.
        threads: may be called from several threads at once.

    Raises:
        TypeError: the function is none, or returned something else.
        ValueError: an option is out of its range, or the function returned vectors of wrong lengths.
    """

    function: Callable[..., Any]
    form: FormName
    quadratic: bool
    cones: frozenset[str] | None
    threads: bool

    name: ClassVar[str] = "CUSTOM"
    package: ClassVar[str] = "scipy"
    pip_name: ClassVar[str] = "scipy"
    capabilities: ClassVar[Capabilities] = Capabilities(SCS.capabilities.cones, quadratic=True, time_limit=False)
    takes_equations: ClassVar[bool] = True

    def __init__(
        self,
        function: Callable[..., Any],
        form: FormName = "interval",
        *,
        quadratic: bool = True,
        cones: frozenset[str] | None = None,
        tolerance: float = 1e-8,
        threads: bool = False,
        max_iterations: int = 1,
        time_limit: None = None,
        batch_time_limit: float | None = None,
        verbose: bool = False,
        rescue: bool = True,
        refine: bool = True,
    ) -> None:
        if not callable(function):
            raise TypeError(f"function is {function!r}; it must be callable.")
        if form not in get_args(FormName):
            raise ValueError(f"form is {form!r}; it must be one of {', '.join(get_args(FormName))}.")
        values = {
            "function": function, "form": form, "quadratic": quadratic, "threads": threads,
            "cones": None if cones is None else frozenset(cones),
            "tolerance": tolerance, "max_iterations": max_iterations, "time_limit": time_limit, "verbose": verbose,
            "batch_time_limit": batch_time_limit, "rescue": rescue, "refine": refine,
        }  # fmt: skip
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def form_type(self) -> type[Form]:
        return _FORMS[self.form]

    @property
    def runs_in_threads(self) -> bool:
        return self.threads

    def unsupported(self, structure: ConicStructure) -> str | None:
        """Why it cannot take problems of this structure, or None: its function decides, not its class."""
        taken = self.capabilities.cones if self.cones is None else self.cones
        missing = sorted(structure.cones.kinds - (POLYHEDRAL if self.form == "interval" else taken))
        if missing:
            return f"this custom solver has no {' and no '.join(kind.replace('_', '-') for kind in missing)} cone"
        if structure.quadratic.nnz and not self.quadratic:
            return "this custom solver takes linear objectives only (quadratic=False)"
        if structure.has_integers:
            return "a custom solver has no integer variables"
        return None

    def prepare(self, form: Any) -> Prepared:
        return _PreparedInterval(self, form) if isinstance(form, IntervalForm) else _PreparedConic(self, form)


class _PreparedInterval(Prepared):
    def __init__(self, options: CustomSolver, form: IntervalForm) -> None:
        self.options, self.form, self.P = options, form, form.full_P()

    def memory(self, form: Form) -> int:
        return 5_000 + 60 * form.size

    def solve(self, vectors: Any, state: State) -> Outcome:
        form = self.form
        answer = self.options.function(
            self.P, vectors.q, form.A, vectors.row_lower, vectors.row_upper, vectors.lower, vectors.upper
        )
        if isinstance(answer, Status):
            return _failure(answer)
        if isinstance(answer, np.ndarray) and answer.shape == (form.n,):
            x = np.array(answer, dtype=np.float64)
            return Outcome(Status.SOLVED, IntervalPoint(x, *self._multipliers(x, vectors)), 0)
        return Outcome(Status.SOLVED, IntervalPoint(*_arrays(answer, "(x, y, z)", (form.n, form.m, form.n))), 0)

    def _multipliers(self, x: FloatArray, vectors: Any) -> tuple[FloatArray, FloatArray]:
        """``min |P x + q + Aᵀy + z|`` over multipliers of the right sign of active ends, zero elsewhere."""
        form, slackness = self.form, 10 * self.options.tolerance * (1 + np.abs(x).max(initial=0.0))
        values = np.concatenate([form.A @ x, x])
        lower = np.concatenate([vectors.row_lower, vectors.lower])
        upper = np.concatenate([vectors.row_upper, vectors.upper])
        at_lower, at_upper = values - lower <= slackness, upper - values <= slackness
        active = np.flatnonzero(at_lower | at_upper)
        multipliers = np.zeros(values.size)
        if active.size:
            normals = np.concatenate([form.dense_A(), np.eye(form.n)])[active]
            ends = np.where(at_lower[active], -np.inf, 0.0), np.where(at_upper[active], np.inf, 0.0)
            from scipy.optimize import lsq_linear  # it takes a while to import

            multipliers[active] = lsq_linear(normals.T, -(self.P @ x + vectors.q), ends, "bvls").x
        return multipliers[: form.m], multipliers[form.m :]


class _PreparedConic(Prepared):
    def __init__(self, options: CustomSolver, form: RowForm) -> None:
        self.options, self.form, self.P = options, form, form.full_P()

    def memory(self, form: Form) -> int:
        return 5_000 + 60 * form.size

    def solve(self, vectors: Any, state: State) -> Outcome:
        form = self.form
        answer = self.options.function(self.P, vectors.q, form.A, vectors.b, form.cones)
        if isinstance(answer, Status):
            return _failure(answer)
        m = form.A.shape[0]
        return Outcome(Status.SOLVED, RowPoint(*_arrays(answer, "(x, y, s)", (form.n, m, m))), 0)


def _failure(status: Status) -> Outcome:
    if status.usable:
        raise TypeError(f"the custom solver returned {status.name} without a solution.")
    return Outcome(status, None, 0)


def _arrays(answer: Any, names: str, sizes: tuple[int, ...]) -> list[FloatArray]:
    """Copies of what a function returned, once its shapes are right."""
    if not isinstance(answer, (tuple, list)) or len(answer) != len(sizes):
        raise TypeError(f"the custom solver returned {type(answer).__name__}; it must return {names} or a Status.")
    arrays = [np.array(values, dtype=np.float64) for values in answer]
    shapes, wanted = [array.shape for array in arrays], [(size,) for size in sizes]
    if shapes != wanted:
        raise ValueError(f"the custom solver returned {names} of shapes {shapes}; they must be {wanted}.")
    return arrays
