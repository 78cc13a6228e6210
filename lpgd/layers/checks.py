"""What a CVXPY problem, its parameters and variables must be to become a layer; an error for each way they are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cvxpy as cp
from cvxpy.constraints.finite_set import FiniteSet

__all__ = ["check_parameters", "check_problem", "check_variables"]


def check_problem(problem: cp.Problem, gp: bool) -> None:
    """Refuse what cannot be canonicalised: no variables, complex or discrete ones, not convex, not DPP."""
    if not isinstance(problem, cp.Problem):
        raise TypeError(f"problem is a {type(problem).__name__}; a cvxpy.Problem is needed.")
    if not problem.variables():
        raise ValueError("The problem has no variables: there is nothing to solve for.")
    leaves = [*problem.variables(), *problem.parameters()]
    constants = problem.constants()
    complex_ones = [leaf.name() for leaf in leaves if leaf.is_complex()]
    if complex_ones or any(constant.is_complex() for constant in constants):
        what = f"{', '.join(complex_ones)} are complex" if complex_ones else "it has complex constants"
        raise ValueError(
            f"The problem is not real ({what}); model real and imaginary parts as separate real variables."
        )
    discrete = [v.name() for v in problem.variables() if v.attributes["boolean"] or v.attributes["integer"]]
    if discrete or any(isinstance(constraint, FiniteSet) for constraint in problem.constraints):
        what = ", ".join(discrete) or "the variables of a FiniteSet constraint"
        raise ValueError(
            f"Integer and boolean variables are not supported by CvxpyLayer yet ({what}); relax them, for example to "
            "bounds=[0, 1]."
        )
    rules: Any = problem  # a decorator of CVXPY's hides the arguments of is_dpp
    if gp:
        if not problem.is_dgp():
            raise ValueError(
                "gp=True, but the problem is not a geometric program by CVXPY's rules (problem.is_dgp() is false): "
                "mark variables and parameters pos=True, or leave gp out if the problem is convex as it stands."
            )
        if not rules.is_dpp("dgp"):
            raise ValueError(
                "The geometric program is not DPP (problem.is_dpp('dgp') is false): a parameter may be a coefficient "
                "or an exponent, but not an exponent of another parameter. Introduce a parameter for such a product."
            )
        return
    if not problem.is_dcp():
        hint = " It is a geometric program: pass gp=True." if problem.is_dgp() else ""
        raise ValueError(
            "The problem is not convex by CVXPY's rules (problem.is_dcp() is false); rewrite it with CVXPY's atoms."
            + hint
        )
    if not rules.is_dpp(quad_form_dpp="qp"):
        raise ValueError(
            "The problem is not DPP (problem.is_dpp() is false): every expression must be affine in the parameters, "
            "and no two parameters may be multiplied. Introduce a parameter for a product; write sum_squares(F @ x) "
            "with F a root of P, or quad_form(x, P) with Parameter(PSD=True) in the objective (not in a constraint)."
        )


def check_parameters(problem: cp.Problem, parameters: Sequence[cp.Parameter]) -> None:
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
    found = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults if names)
    if found:
        raise ValueError(f"parameters must be exactly those of the problem, in any order ({found}).")


def check_variables(problem: cp.Problem, variables: Sequence[cp.Variable]) -> dict[int, tuple[Any, int]]:
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
