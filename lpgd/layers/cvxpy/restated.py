"""Problems restated, with the same solutions, where CVXPY's rules and reductions do not take them as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cvxpy as cp
from cvxpy.atoms.quad_form import QuadForm

__all__ = ["is_set", "reducible", "with_plain_forms"]

_STRUCTURES = ("symmetric", "PSD", "NSD", "diag", "sparsity")


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
