"""Problems restated, with the same solutions, where CVXPY's rules and reductions do not take them as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.elementwise.elementwise import Elementwise
from cvxpy.atoms.norm1 import norm1
from cvxpy.atoms.quad_form import QuadForm

__all__ = ["is_set", "reducible", "with_plain_forms", "with_single_halves"]

_STRUCTURES = ("symmetric", "PSD", "NSD", "diag", "sparsity")
_SYMMETRIC = ("symmetric", "PSD", "NSD", "diag")


def with_plain_forms(problem: cp.Problem) -> cp.Problem:
    """The problem with ``quad_form(y, P)``, y = x, for ``quad_form(x, P)`` in the objective where x has parameters.

    CVXPY calls ``quad_form(x - c, P)`` with a parameter c DPP, but not where it allows ``quad_form(x, P)`` with a
    parameter P as well.  With y = x - c both may be parameters.
    """
    replaced: dict[int, Any] = {}
    rows: list[Any] = []
    for form in _forms(problem.objective.args[0]):
        x, P = form.args
        if x.parameters() and id(form) not in replaced:
            y = cp.Variable(x.shape)
            replaced[id(form)] = form.copy([y, P])
            rows.append(y == x)
    if not rows:
        return problem
    objective: Any = problem.objective
    return cp.Problem(objective.tree_copy(id_objects=replaced), [*problem.constraints, *rows])


def _forms(expression: Any) -> Iterator[Any]:
    if isinstance(expression, QuadForm):
        yield expression
    for argument in expression.args:
        yield from _forms(argument)


def with_single_halves(problem: cp.Problem) -> cp.Problem:
    """The problem with functions of the entries of a symmetric matrix taken on and above its diagonal alone.

    CVXPY states ``abs(X)`` of a symmetric X twice for each pair of entries.  Where X has a zero both statements hold
    with equality, and their multipliers are not unique: every optimality system is singular.
    """
    replaced: dict[int, Any] = {}
    for part in (problem.objective, *problem.constraints):
        for function in _of_symmetric(part):
            if id(function) not in replaced:
                replaced[id(function)] = _by_half(function)
    if not replaced:
        return problem
    objective: Any = problem.objective
    return cp.Problem(
        objective.tree_copy(id_objects=replaced), [_with_replaced(row, replaced) for row in problem.constraints]
    )


def _of_symmetric(expression: Any) -> Iterator[Any]:
    """The outermost functions of entries, or sums of magnitudes, whose arguments are symmetric or scalars."""
    if isinstance(expression, Elementwise) or (isinstance(expression, norm1) and expression.axis is None):
        arguments: list[Any] = [argument for argument in expression.args if not argument.is_scalar()]
        if arguments and all(_is_symmetric(argument) for argument in arguments):
            yield expression
            return
    for argument in expression.args:
        yield from _of_symmetric(argument)


def _is_symmetric(expression: Any) -> bool:
    """Whether a matrix without parameters is symmetric whatever its variables are, as far as sums and signs show.

    A parameter's gradient would lie above the diagonal only.  CVXPY's own answer calls all products of symmetric
    matrices symmetric (1.9.3).
    """
    if expression.ndim != 2 or expression.shape[0] != expression.shape[1]:
        return expression.is_scalar()
    if isinstance(expression, cp.Variable):
        return any(is_set(expression.attributes[name]) for name in _SYMMETRIC)
    if isinstance(expression, cp.Constant):
        value = expression.value
        return not isinstance(value, sp.spmatrix | sp.sparray) and bool(np.array_equal(value, np.transpose(value)))
    if isinstance(expression, AddExpression | NegExpression | cp.multiply):
        return not expression.parameters() and all(_is_symmetric(argument) for argument in expression.args)
    return False


def _by_half(function: Any) -> Any:
    """The function of the entries on and above the diagonal, and its values put where both halves have them."""
    n = max(argument.shape[0] for argument in function.args if not argument.is_scalar())
    row, column = np.triu_indices(n)
    place = np.empty((n, n), dtype=np.int64)
    place[row, column] = place[column, row] = np.arange(row.size)
    taken = sp.csr_array((np.ones(row.size), (np.arange(row.size), row + n * column)), shape=(row.size, n * n))
    halves = [arg if arg.is_scalar() else taken @ cp.reshape(arg, (n * n,), order="F") for arg in function.args]
    if isinstance(function, norm1):
        return np.where(row == column, 1.0, 2.0) @ cp.abs(halves[0])
    spread = sp.csr_array((np.ones(n * n), (np.arange(n * n), place.ravel(order="F"))), shape=(n * n, row.size))
    return cp.reshape(spread @ function.copy(halves), (n, n), order="F")


def _with_replaced(constraint: Any, replaced: dict[int, Any]) -> Any:
    """The constraint with other expressions in it, under its own id, by which CVXPY hands multipliers back."""
    if not any(id(function) in replaced for function in _of_symmetric(constraint)):
        return constraint
    changed = constraint.tree_copy(id_objects=replaced)
    changed.constr_id = constraint.constr_id
    return changed


def reducible(problem: cp.Problem) -> Any:
    """A problem of its own for CVXPY, which caches on what it reduces.

    Before 1.9.3 CVXPY reduces a square of a symmetric, diagonal or sparse variable wrongly, but not one of an
    expression such as -1 * -X.
    """
    structured = [v for v in problem.variables() if any(is_set(v.attributes[name]) for name in _STRUCTURES)]
    expressions = {id(variable): -1.0 * (-variable) for variable in structured}
    objective = problem.objective.tree_copy(id_objects=expressions) if structured else problem.objective
    return cp.Problem(objective, problem.constraints)


def is_set(attribute: Any) -> bool:
    """Whether a variable or parameter was declared to have this attribute."""
    return (
        attribute is not None and attribute is not False and not (isinstance(attribute, list | tuple) and not attribute)
    )
