"""Problems restated, with the same solutions, where CVXPY's rules and reductions do not take them as they stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
from cvxpy.atoms.affine.add_expr import AddExpression
from cvxpy.atoms.affine.unary_operators import NegExpression
from cvxpy.atoms.elementwise.elementwise import Elementwise
from cvxpy.atoms.elementwise.power import PowerApprox
from cvxpy.atoms.norm1 import norm1
from cvxpy.atoms.pnorm import PnormApprox
from cvxpy.atoms.quad_form import QuadForm

__all__ = ["is_set", "reducible", "restated", "with_plain_forms", "with_power_cones", "with_single_halves"]

_STRUCTURES = ("symmetric", "PSD", "NSD", "diag", "sparsity")
_SYMMETRIC = ("symmetric", "PSD", "NSD", "diag")


def restated(problem: cp.Problem, powers: bool) -> cp.Problem:
    """The problem restated in every way of this module, by power cones if there may be some."""
    problem = with_single_halves(with_plain_forms(problem))
    return with_power_cones(problem) if powers else problem


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
    return cp.Problem(_rebuilt(problem.objective, replaced), [*problem.constraints, *rows])


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
    return _replaced(problem, _of_symmetric, _by_half)


def with_power_cones(problem: cp.Problem) -> cp.Problem:
    """The problem with ``power(x, p)``, p > 1 and no even number, and ``pnorm(x, p)`` by a power cone for each entry.

    By default CVXPY states ``x^1.7`` by seven second-order cones.  Where x is zero, as most entries of an entmax are,
    several of them are at their apex: multipliers are not unique, and no gradient is there to be had.  Where x is a
    small share of a norm, the fifth power of that, say, is next to the apex, and vague.
    """
    return _replaced(problem, _rational_powers, _by_power_cones)


def _rational_powers(expression: Any) -> Iterator[Any]:
    if isinstance(expression, PowerApprox) and isinstance(expression.p, cp.Constant):
        exponent: Any = expression.p.value
        if exponent > 1 and exponent % 2:
            yield expression
    elif isinstance(expression, PnormApprox) and expression.original_p > 1 and expression.original_p != 2:
        yield expression
    for argument in expression.args:
        yield from _rational_powers(argument)


def _by_power_cones(expression: Any) -> Any:
    (x,) = expression.args
    if isinstance(expression, PnormApprox):
        return cp.pnorm(x, expression.original_p, expression.axis, expression.keepdims, approx=False)
    return cp.power(x, expression.p.value, approx=False)


def _replaced(problem: cp.Problem, found: Callable[[Any], Iterator[Any]], restate: Callable[[Any], Any]) -> cp.Problem:
    """The problem with other expressions for those that ``found`` yields of an objective or a constraint."""
    replaced = {
        id(expression): restate(expression)
        for part in (problem.objective, *problem.constraints)
        for expression in found(part)
    }
    if not replaced:
        return problem
    return cp.Problem(_rebuilt(problem.objective, replaced), [_rebuilt(row, replaced) for row in problem.constraints])


def _rebuilt(part: Any, replaced: dict[int, Any]) -> Any:
    """An expression, objective or constraint with others in it: CVXPY's ``tree_copy`` passes over powers (1.9.3).

    A constraint keeps its id, by which CVXPY hands multipliers back.
    """
    if id(part) in replaced:
        return replaced[id(part)]
    if isinstance(part, list):
        members: list[Any] = part
        rebuilt = [_rebuilt(member, replaced) for member in members]
        return rebuilt if any(one is not other for one, other in zip(rebuilt, members, strict=True)) else members
    arguments = _rebuilt(list(part.args), replaced)
    if all(one is other for one, other in zip(arguments, part.args, strict=True)):
        return part
    changed = part.copy(arguments)
    if isinstance(part, cp.Constraint):
        changed.constr_id = part.constr_id
    return changed


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


def reducible(problem: cp.Problem) -> Any:
    """A problem of its own for CVXPY, which caches on what it reduces.

    Before 1.9.3 CVXPY reduces a square of a symmetric, diagonal or sparse variable wrongly, but not one of an
    expression such as -1 * -X.
    """
    structured = [v for v in problem.variables() if any(is_set(v.attributes[name]) for name in _STRUCTURES)]
    expressions = {id(variable): -1.0 * (-variable) for variable in structured}
    return cp.Problem(_rebuilt(problem.objective, expressions), problem.constraints)


def is_set(attribute: Any) -> bool:
    """Whether a variable or parameter was declared to have this attribute."""
    return (
        attribute is not None and attribute is not False and not (isinstance(attribute, list | tuple) and not attribute)
    )
