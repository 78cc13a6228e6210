"""CVXPY's rules: which part of a problem breaks them, and what to write in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
from cvxpy.atoms.affine.binary_operators import DivExpression, MulExpression, multiply
from cvxpy.atoms.affine.promote import Promote
from cvxpy.atoms.quad_form import QuadForm
from cvxpy.constraints.zero import Equality, Zero
from cvxpy.utilities import scopes

from lpgd.layers.cvxpy.restated import with_plain_forms

__all__ = ["check_rules"]

_SHOWN, _LENGTH = 3, 120  # parts that a message shows, and characters of each
_INSIDE = r"\(((?:[^()]|\([^()]*\))*)"  # of parentheses that may have one pair more inside
_AS_WRITTEN = [  # constants, and CVXPY's names of what users write otherwise
    (re.compile(r"\[[-+\d.eE,\s\[\]]{20,}\]"), "[...]"),
    (re.compile(r"\s+"), " "),
    (re.compile(rf"Promote{_INSIDE}, \([^()]*\)\)"), r"\1"),
    (re.compile(rf"quad_over_lin{_INSIDE}, 1\.0, None, False\)"), r"sum_squares(\1)"),
    (re.compile(r", None(?:, False)?\)"), ")"),
    (re.compile(r"\bSum\("), "sum("),
    (re.compile(r"PowerApprox\("), "power("),
    (re.compile(r"PnormApprox\("), "pnorm("),
    (re.compile(r"QuadForm\("), "quad_form("),
]


def check_rules(problem: cp.Problem, gp: bool) -> None:
    """Refuse a problem that is not convex (with ``gp`` not geometric), or not DPP, and show where it is not.

    Raises:
        ValueError: it is neither; the message has the smallest expressions that are not.
    """
    if gp:
        _check_geometric(problem)
        return
    if not problem.is_dcp():
        hint = " It is a geometric program: pass gp=True." if problem.is_dgp() else ""
        raise ValueError(
            "The problem is not convex by CVXPY's rules (problem.is_dcp() is false); rewrite it with CVXPY's atoms."
            f"{hint}{_Rules('is_dcp').broken(problem)}"
        )
    restated = with_plain_forms(problem)
    rules: Any = restated  # a decorator of CVXPY's hides the arguments of is_dpp
    if not rules.is_dpp(quad_form_dpp="qp"):
        raise ValueError(
            "The problem is not DPP (problem.is_dpp() is false): every expression must be affine in the parameters, "
            "and no two parameters may be multiplied. Introduce a parameter for a product; write sum_squares(F @ x) "
            "with F a root of P, or quad_form(x, P) with Parameter(PSD=True) in the objective (not in a constraint)."
            + _Rules("is_dcp", dpp=True).broken(restated)
        )


def _check_geometric(problem: cp.Problem) -> None:
    if problem.is_mixed_integer():
        raise ValueError("A geometric program cannot have integer or boolean variables; relax them.")
    if not problem.is_dgp():
        raise ValueError(
            "gp=True, but the problem is not a geometric program by CVXPY's rules (problem.is_dgp() is false): "
            "mark variables and parameters pos=True, or leave gp out if the problem is convex as it stands."
            + _Rules("is_dgp").broken(problem)
        )
    rules: Any = problem
    if not rules.is_dpp("dgp"):
        raise ValueError(
            "The geometric program is not DPP (problem.is_dpp('dgp') is false): a parameter may be a coefficient "
            "or an exponent, but not an exponent of another parameter. Introduce a parameter for such a product."
            + _Rules("is_dgp", dpp=True).broken(problem)
        )


@dataclass(frozen=True)
class _Rules:
    """The rules that CVXPY's method ``name`` checks, with parameters as variables where ``dpp`` is set."""

    name: str
    dpp: bool = False

    def broken(self, problem: cp.Problem) -> str:
        """The expressions that break the rules, each with what to do about it: a text to append to a message."""
        faults = [self._of_objective(problem.objective)]
        faults += [self._of_constraint(constraint) for constraint in problem.constraints]
        found = list(dict.fromkeys(fault for part in faults for fault in part))
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return f" Here: {'; '.join(found[:_SHOWN])}{more}." if found else ""

    def _holds(self, part: Any) -> bool:
        return bool(getattr(part, self.name)(**({"dpp": True} if self.dpp else {})))

    def _of_objective(self, objective: Any) -> list[str]:
        with scopes.quad_form_dpp_scope():
            if self._holds(objective):
                return []
            faults = [self._fault(node) for node in self._smallest(objective.args[0])]
        verb, shape = ("maximises", "convex") if isinstance(objective, cp.Maximize) else ("minimises", "concave")
        return faults or [f"the objective {verb} {_shown(objective.args[0])}, which is {shape}"]

    def _of_constraint(self, constraint: Any) -> list[str]:
        if self._holds(constraint):
            return []
        faults = [self._fault(node) for argument in constraint.args for node in self._smallest(argument)]
        return faults or [f"the constraint {_shown(constraint)}, {self._sides(constraint)}"]

    def _sides(self, constraint: Any) -> str:
        if self.name == "is_dgp":
            return "whose sides are posynomial <= monomial, or monomial == monomial, in a geometric program"
        if isinstance(constraint, Equality | Zero):
            return "whose sides must be affine"
        return "of which the smaller side must be convex and the larger one concave"

    def _smallest(self, expression: Any) -> Iterator[Any]:
        """The expressions that break the rules though their arguments do not."""
        if self._holds(expression):
            return
        inner = [node for argument in expression.args for node in self._smallest(argument)]
        yield from inner or [expression]

    def _fault(self, node: Any) -> str:
        remedy = self._remedy(node)
        return f"{_shown(node)}{f', {remedy}' if remedy else ''}"

    def _remedy(self, node: Any) -> str:
        if isinstance(exponent := getattr(node, "p", None), cp.Expression) and exponent.parameters():
            return f"whose exponent is {_shown(exponent)}{'' if self.name == 'is_dgp' else ' and must be a number'}"
        if self.name == "is_dgp":
            return "which must be declared pos=True" if not node.args else ""
        if self.dpp and not node.variables():
            return "which a parameter of its own can stand for, computed before the call"
        if isinstance(node, QuadForm):
            return "a form whose matrix is a parameter"
        if not isinstance(node, multiply | MulExpression | DivExpression):
            return ""
        factors = [factor.args[0] if isinstance(factor, Promote) else factor for factor in node.args]
        constant = next((factor for factor in factors if not factor.variables()), None)
        if constant is None:
            return "a product of variables"
        if not self.dpp:
            known = constant.is_nonneg() or constant.is_nonpos()
            return "" if known else f"where the sign of {_shown(constant)} must be known: a parameter with nonneg=True"
        other = next(factor for factor in factors if factor is not constant)
        if isinstance(node, DivExpression) or not _affine_in_parameters(constant):
            inverse = "1 / " if isinstance(node, DivExpression) and constant is factors[1] else ""
            return f"where a parameter of its own can stand for {inverse}{_shown(constant)}, computed before the call"
        return (
            f"where {_shown(other)} must be without parameters: a variable z can stand for what has them, "
            "with one more constraint z == ..."
        )


def _affine_in_parameters(expression: Any) -> bool:
    with scopes.dpp_scope():
        return bool(expression.is_affine())


def _shown(part: Any) -> str:
    text, before = str(part), ""
    while text != before:
        before = text
        for pattern, written in _AS_WRITTEN:
            text = pattern.sub(written, text)
    return f"`{text if len(text) <= _LENGTH else f'{text[: _LENGTH - 4]} ...'}`"
