"""From a parametrised CVXPY problem to affine maps onto the data of a conic program.

With :mod:`lpgd.layers.cvxpy.restated`, the one file that touches CVXPY's insides.  CVXPY's own chain of reductions is
run once, towards a target that never solves anything (:class:`_Target`), without parameter values; what comes out are
sparse tensors from the parameters to the problem's data.  Here they are split, put into the row order of
:class:`lpgd.cones.product.Cones`, and rows that only bound a variable become bounds.

The way back is taken from CVXPY as well: its reductions map solutions of the reduced problem to solutions of
the user's, each entry a multiple of one entry of the reduced solution.  :func:`lpgd.layers.cvxpy.affine.selection`
reads such a map off two probes and checks it on a random third.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import cvxpy as cp
import cvxpy.settings as cvxpy_settings
import numpy as np
import scipy.sparse as sp
from cvxpy.constraints.exponential import ExpCone
from cvxpy.constraints.power import PowCone3D
from cvxpy.constraints.psd import SvecPSD
from cvxpy.constraints.second_order import SOC
from cvxpy.reductions.dgp2dcp.dgp2dcp import Dgp2Dcp
from cvxpy.reductions.solution import Solution
from cvxpy.reductions.solvers.conic_solvers.conic_solver import ConicSolver
from cvxpy.reductions.solvers.utilities import extract_dual_value, get_dual_values
from cvxpy.utilities import scopes
from cvxpy.utilities.psd_utils import TriangleKind

from lpgd.arrays import FloatArray, IntArray, SparseArray
from lpgd.cones.product import Cones
from lpgd.layers.cvxpy.affine import AffineMatrix, Bounds, consecutive_rows, reordered, selection, switched
from lpgd.layers.cvxpy.implied import dependent_rows, implied_rows, never_negative, signs_of_squares
from lpgd.layers.cvxpy.layout import AffineMap, CanonicalProgram, ParameterLayout, VariableLayout
from lpgd.layers.cvxpy.limits import at_limits, needed_variables
from lpgd.layers.cvxpy.restated import is_set, reducible, restated
from lpgd.layers.cvxpy.rules import check_rules

__all__ = ["canonicalise"]


class _Target(ConicSolver):
    """What CVXPY is to reduce problems to: quadratic objectives and the cones of `lpgd.cones`.

    Bounds of variables are rows, as those of CVXPY's own variables are not to be trusted: of ``abs(c * (A @ x))``, A
    with a zero and x without bounds, it concludes that it is between 0 and 0 (1.9.3).  :class:`Bounds` finds the rows.
    """

    SUPPORTED_CONSTRAINTS: ClassVar = [*ConicSolver.SUPPORTED_CONSTRAINTS, SOC, SvecPSD, ExpCone, PowCone3D]
    EXP_CONE_ORDER: ClassVar = [0, 1, 2]
    PSD_TRIANGLE_KIND = TriangleKind.LOWER
    PSD_SQRT2_SCALING = True
    MIP_CAPABLE = True
    MI_SUPPORTED_CONSTRAINTS: ClassVar = SUPPORTED_CONSTRAINTS

    def name(self) -> str:
        return "LPGD"

    def import_solver(self) -> None:
        """Nothing to import."""

    def supports_quad_obj(self) -> bool:
        return True

    def apply(self, problem: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Order the rows, and stop before parameter values are put in."""
        _, data, inverse = self._prepare_data_and_inv_data(problem)
        return data, inverse

    def solve_via_data(self, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError("This is a target for canonicalisation, not a solver: use lpgd.CvxpyLayer to solve.")

    def cite(self, data: Any) -> str:
        return ""


def canonicalise(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variables: Sequence[cp.Variable],
    *,
    gp: bool = False,
    powers: bool = True,
) -> CanonicalProgram:
    """Reduce a parametrised CVXPY problem to conic form, once for all parameter values.

    Neither the problem nor the values of its parameters and variables are read or changed.

    Args:
        problem: convex and DPP; ``cp.quad_form(x, P)`` with a parameter P is allowed in the objective.
        parameters: all of ``problem.parameters()``, in any order: that of the tensors to come.
        variables: what to recover from a solution: variables of the problem and, in any mix, dual variables
            ``constraint.dual_variables[i]`` of its constraints, in CVXPY's shape and sign.
        gp: whether the problem is a geometric program.
        powers: whether the solver takes power cones; second-order ones approximate all powers otherwise.

    Returns:
        The affine maps and layouts; see :class:`lpgd.layers.cvxpy.layout.CanonicalProgram`.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: the parameters are not exactly the problem's, a variable does not belong to it, or the problem
            is not DPP, has complex variables or no variables at all, or is geometric and has integer ones.
    """
    _check_problem(problem, gp)
    _check_parameters(problem, parameters)
    owners = _check_variables(problem, variables)
    reduced = _reduce(problem if gp else restated(problem, powers), gp)
    layouts, order = _parameter_layouts(parameters, reduced)

    program = reduced.program
    dims = program.cone_dims
    width, n = order.size, int(program.x.size)
    m = program.A.shape[0] // (n + 1)
    constraint_tensor = reordered(program.A, order)
    A = AffineMatrix.from_tensor(constraint_tensor, (m, n), width, scale=-1.0)
    b = consecutive_rows(constraint_tensor, m * n, m * (n + 1), width)
    objective = reordered(program.q, order)
    squares = sp.coo_array((n * n, width)) if program.P is None else reordered(program.P, order)
    P = AffineMatrix.from_tensor(squares, (n, n), width)
    boolean, whole = (np.array(i, np.int64).ravel() for i in (program.x.boolean_idx, program.x.integer_idx))
    cones = Cones(dims.zero, dims.nonneg, tuple(dims.soc), tuple(dims.psd), dims.exp, power=tuple(dims.p3d))
    q = consecutive_rows(objective, 0, n, width)
    primal: dict[int, SparseArray] = {v.id: _primal(v, reduced) for v in variables if v.id not in owners}
    needed = needed_variables(P, q, list(primal.values())) | bool(boolean.size + whole.size)
    limits = at_limits(A, b, cones, needed)
    A, b, left = limits.A, limits.b, np.setdiff1d(np.arange(n), limits.columns)
    A, P, q, n = A.select_columns(left), P.select_rows(left).select_columns(left), q[left], left.size
    inequalities, heads = cones.sections["nonnegative"], never_negative(cones)
    candidates = np.setdiff1d(np.arange(inequalities.start, inequalities.stop), limits.rows)
    implied = np.concatenate([implied_rows(A, b, heads, candidates), signs_of_squares(A, b, P, q, cones), limits.rows])
    if not any(variable.id in owners for variable in variables):
        implied = np.concatenate([dependent_rows(A, b, np.arange(dims.zero)), implied])
    bounds = Bounds.find(
        A.without_rows(implied),
        b,
        inequalities,
        switched(boolean, 0.0, (n, width)),
        switched(boolean, 1.0, (n, width)),
    )
    kept = np.setdiff1d(np.arange(m), np.concatenate([bounds.rows, implied]))
    constraint, A_values = A.select_rows(kept).compress()
    quadratic, P_values = P.symmetrised().compress()
    return CanonicalProgram(
        n=n,
        cones=replace(
            cones,
            zero=int((kept < dims.zero).sum()),
            nonnegative=int(np.isin(kept, np.arange(m)[inequalities]).sum()),
        ),
        quadratic=quadratic,
        constraint=constraint,
        lower_index=bounds.lower_index,
        upper_index=bounds.upper_index,
        integer_index=np.union1d(boolean, whole),
        P=AffineMap(P_values, layouts),
        q=AffineMap(q, layouts),
        A=AffineMap(A_values, layouts),
        b=AffineMap(b[kept], layouts),
        lower=AffineMap(bounds.lower, layouts),
        upper=AffineMap(bounds.upper, layouts),
        offset=AffineMap(consecutive_rows(objective, program.x.size, program.x.size + 1, width), layouts),
        sign=-1.0 if isinstance(problem.objective, cp.Maximize) else 1.0,
        parameters=layouts,
        variables=tuple(
            VariableLayout(variable.name(), variable.shape, primal[variable.id][:, left], exp=reduced.gp is not None)
            if variable.id in primal
            else _dual_layout(variable, owners[variable.id], reduced, bounds, limits.back, kept)
            for variable in variables
        ),
    )


# What the user hands in


def _check_problem(problem: cp.Problem, gp: bool) -> None:
    """Refuse what cannot be canonicalised: no variables, complex ones, not convex, not DPP."""
    if not isinstance(problem, cp.Problem):
        raise TypeError(f"problem is a {type(problem).__name__}; a cvxpy.Problem is needed.")
    if not problem.variables():
        raise ValueError("The problem has no variables: there is nothing to solve for.")
    leaves = [*problem.variables(), *problem.parameters()]
    constants = problem.constants()
    complex_ones = [leaf.name() for leaf in leaves if leaf.is_complex()]
    if complex_ones or any(constant.is_complex() for constant in constants):
        fault = f"{', '.join(complex_ones)} are complex" if complex_ones else "it has complex constants"
        raise ValueError(
            f"The problem is not real ({fault}); model real and imaginary parts as separate real variables."
        )
    check_rules(problem, gp)


def _check_parameters(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> None:
    """Refuse a list that is not exactly the problem's parameters, each once."""
    if not isinstance(parameters, list | tuple):
        raise TypeError(f"parameters is a {type(parameters).__name__}; give a list or tuple of cvxpy.Parameter.")
    for parameter in parameters:
        if not isinstance(parameter, cp.Parameter):
            raise TypeError(f"parameters holds a {type(parameter).__name__}; give cvxpy.Parameter objects.")
    given = [parameter.id for parameter in parameters]
    wanted = {parameter.id for parameter in problem.parameters()}
    missing = [parameter.name() for parameter in problem.parameters() if parameter.id not in given]
    extra = [parameter.name() for parameter in parameters if parameter.id not in wanted]
    twice = sorted({parameter.name() for parameter in parameters if given.count(parameter.id) > 1})
    faults = [("missing", missing), ("not in the problem", extra), ("given twice", twice)]
    found = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults if names)
    if found:
        raise ValueError(f"parameters must be exactly those of the problem, in any order ({found}).")


def _check_variables(problem: cp.Problem, variables: Sequence[cp.Variable]) -> dict[int, tuple[Any, int]]:
    """Refuse what is neither a variable nor a dual variable of the problem.

    Returns:
        The constraint and position of each dual variable of the problem, by the variable's id.
    """
    if not isinstance(variables, list | tuple):
        raise TypeError(f"variables is a {type(variables).__name__}; give a list or tuple of cvxpy.Variable.")
    owners = {
        dual.id: (constraint, position)
        for constraint in problem.constraints
        for position, dual in enumerate(constraint.dual_variables)
    }
    known = {variable.id for variable in problem.variables()} | owners.keys()
    for variable in variables:
        if not isinstance(variable, cp.Variable):
            hint = "; for its dual, give constraint.dual_variables[i]" if isinstance(variable, cp.Constraint) else ""
            raise TypeError(f"variables holds a {type(variable).__name__}; give cvxpy.Variable objects{hint}.")
        if variable.id not in known:
            raise ValueError(
                f"unknown variable {variable.name()}: it is neither a variable of the problem nor a dual variable of "
                "one of problem.constraints."
            )
    return owners


# CVXPY's reductions, forth and back


@dataclass(frozen=True)
class _Reduced:
    """The reduced program (CVXPY's ParamConeProg, rows in order) and the reductions that led there."""

    program: Any
    reductions: list[Any]
    inverses: list[Any]

    @property
    def gp(self) -> Dgp2Dcp | None:
        return next((reduction for reduction in self.reductions if isinstance(reduction, Dgp2Dcp)), None)

    def parameter(self, parameter: cp.Parameter, value: FloatArray) -> dict[int, FloatArray]:
        """What the reductions turn a parameter's value into, logarithms left out: reduced id to value."""
        values: dict[int, Any] = {parameter.id: value}
        for reduction in self.reductions:
            if isinstance(reduction, Dgp2Dcp):
                values |= {new: values[old] for old, (new,) in reduction.param_id_map.items() if old in values}
            else:
                values = reduction.param_forward(values)
        return {key: _flat(value, "F") for key, value in values.items() if key in self.program.param_id_to_col}

    def primal(self, variable: cp.Variable, x: FloatArray) -> FloatArray:
        """The variable's value, row by row, that belongs to x, exponentials left out."""
        values: dict[int, Any] = {
            reduced.id: x[start : start + reduced.size].reshape(reduced.shape, order="F")
            for reduced in self.program.variables
            for start in (self.program.var_id_to_col[reduced.id],)
        }
        for reduction in reversed(self.reductions):
            if isinstance(reduction, Dgp2Dcp):
                values |= {old: values[new] for old, (new,) in reduction.var_id_map.items() if new in values}
            else:
                values = reduction.var_forward(values)
        if variable.id not in values:
            raise ValueError(
                f"unknown variable {variable.name()}: once the problem is reduced, no objective or constraint depends "
                "on it; leave it out of variables."
            )
        return _flat(values[variable.id], "C")

    def dual(self, constraint: SparseArray, position: int, y: FloatArray) -> FloatArray:
        """The value, row by row, of a constraint's dual variable that belongs to y."""
        duals = get_dual_values(y, extract_dual_value, self.program.constraints)
        # Of an infeasible problem CVXPY maps the multipliers and asks for no primal values.
        solution = Solution(cvxpy_settings.INFEASIBLE, 0.0, {}, duals, {})
        for reduction, inverse in zip(reversed(self.reductions), reversed(self.inverses), strict=True):
            solution = reduction.invert(solution, inverse)
        copy = constraint.copy()
        if constraint.id in solution.dual_vars:
            copy.save_dual_value(solution.dual_vars[constraint.id])
        value = copy.dual_variables[position].value
        if value is None:
            raise ValueError(f"CVXPY recovers no dual variable of the constraint {constraint}; do not ask for it.")
        return _flat(value, "C")


def _reduce(problem: cp.Problem, gp: bool) -> _Reduced:
    own, target = reducible(problem), _Target()
    with warnings.catch_warnings(), contextlib.nullcontext() if gp else scopes.quad_form_dpp_scope():
        # CVXPY's reductions read values of sparse variables in the way it warns its users about.
        warnings.filterwarnings("ignore", message=".*sparse CVXPY expression", category=RuntimeWarning)
        # Its reduction of FiniteSet flattens without saying in which order.
        warnings.filterwarnings(
            "ignore", message=r"\s*You didn't specify the order of the flatten", category=FutureWarning
        )
        data, chain, inverses = own.get_problem_data(solver=target, gp=gp, enforce_dpp=True, canon_backend="COO")
    return _Reduced(data[cvxpy_settings.PARAM_PROB], chain.reductions[:-1], inverses[:-1])


def _flat(value: Any, order: Any) -> FloatArray:
    dense = value.toarray() if sp.issparse(value) else value
    return np.asarray(dense, dtype=np.float64).flatten(order=order)


# Parameters and variables


def _parameter_layouts(
    parameters: Sequence[cp.Parameter], reduced: _Reduced
) -> tuple[tuple[ParameterLayout, ...], IntArray]:
    """The layouts, and which column of CVXPY's tensors each column of ours is, the constant last."""
    logarithms = set() if reduced.gp is None else {new for (new,) in reduced.gp.param_id_map.values()}
    layouts: list[ParameterLayout] = []
    order: list[IntArray] = []
    start = 0
    for parameter in parameters:
        entries = np.arange(parameter.size, dtype=np.float64).reshape(parameter.shape)
        taken = reduced.parameter(parameter, entries)
        if len(taken) > 1:
            raise ValueError(
                f"parameter {parameter.name()} is both a factor and an exponent of the geometric program; use two "
                "parameters and give both the same tensor."
            )
        take = np.rint(np.concatenate([np.zeros(0), *taken.values()])).astype(np.int64)
        attributes = frozenset(name for name, value in parameter.attributes.items() if is_set(value))
        columns = slice(start, start + take.size)
        log = not logarithms.isdisjoint(taken)
        layouts.append(ParameterLayout(parameter.name(), parameter.shape, columns, take, log, attributes))
        order.extend(reduced.program.param_id_to_col[key] + np.arange(take.size) for key in taken)
        start = columns.stop
    constant = np.array([reduced.program.q.shape[1] - 1])
    return tuple(layouts), np.concatenate([*order, constant]).astype(np.int64)


def _primal(variable: cp.Variable, reduced: _Reduced) -> sp.csr_array:
    """How a variable is read off x: (size, n)."""
    n = int(reduced.program.x.size)
    return selection(lambda x: reduced.primal(variable, x), n) if variable.size else sp.csr_array((0, n))


def _dual_layout(
    variable: cp.Variable, owner: tuple[Any, int], reduced: _Reduced, bounds: Bounds, back: SparseArray, kept: IntArray
) -> VariableLayout:
    constraint, position = owner
    dual: SparseArray = selection(lambda y: reduced.dual(constraint, position, y), back.shape[0]) @ back
    of_lower, of_upper = (sp.csr_array(dual @ multipliers) for multipliers in (bounds.from_lower, bounds.from_upper))
    return VariableLayout(
        variable.name(),
        variable.shape,
        dual=sp.csr_array(dual[:, kept]),
        lower=of_lower if of_lower.nnz else None,
        upper=of_upper if of_upper.nnz else None,
    )
