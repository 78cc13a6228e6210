"""Quadratic programs in variables in which the objective's curvature is the identity.

With ``P = L Lᵀ`` and ``x = L⁻ᵀ w`` the program becomes one with I for P, ``L⁻¹ q`` for q and ``A L⁻ᵀ`` for A; rows,
multipliers and certificates stay what they are.  A dual active-set method does the same first, for one element after
the other; here it is done for a batch, with the factors that have shown that P is convex, and that steps and
derivatives use as well (:mod:`lpgd.solvers.kkt.schur`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import integers, rows_where
from lpgd.cones.product import Cones
from lpgd.problems.base import States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicStructure, per_element
from lpgd.solvers.convexity import is_definite
from lpgd.solvers.kkt.schur import SchurFactor

__all__ = ["solved_in_white"]

Solve = Callable[[ConicProblem, States], ConicSolution]


def solved_in_white(problem: ConicProblem, states: States, solve: Solve) -> ConicSolution:
    """The answers of a solver to a batch, of which it sees those elements whitened that can be.

    These are the ones with a surely definite P, where there are rows and no bounds, which the solver knows better.
    """
    structure = problem.structure
    factor = None if structure.has_bounds or not structure.m else SchurFactor.of(problem)
    if factor is None:
        return solve(problem, states)
    fine = factor.fine.repeat(problem.batch_size // factor.fine.shape[0]) & is_definite(problem)
    if bool(fine.all()):
        return _whitened(problem, factor, states, solve)
    if not bool(fine.any()):
        return solve(problem, states)
    white, others = rows_where(fine), rows_where(~fine)
    answers = [
        _whitened(problem.select(white), factor.select(white), _picked(states, white), solve),
        solve(problem.select(others), _picked(states, others)),
    ]
    order = torch.argsort(torch.cat([white, others]))
    changes: dict[str, Any] = {
        name: torch.cat([getattr(answer, name) for answer in answers])[order] for name in ("x", "y", "z", "slack")
    }
    for name in ("iterations", "setup_seconds", "solve_seconds"):
        changes[name] = np.concatenate([getattr(answer, name) for answer in answers])[order.numpy()]
    for name in ("statuses", "states"):
        values = [value for answer in answers for value in getattr(answer, name)]
        changes[name] = tuple(values[place] for place in integers(order))
    return replace(answers[0], problem=problem, **changes)


def _whitened(problem: ConicProblem, factor: SchurFactor, states: States, solve: Solve) -> ConicSolution:
    structure, curvature = _white_structure(problem.structure.n, problem.structure.cones)
    q = factor.forward(per_element(problem.data.q, problem.batch_size))
    data = problem.data._replace(P=curvature, q=q, A=factor.white_values)
    answer = solve(ConicProblem(structure, data, problem.batch_size), states)
    return replace(answer, problem=problem, x=factor.backward(answer.x))


@lru_cache(maxsize=64)
def _white_structure(n: int, cones: Cones) -> tuple[ConicStructure, Tensor]:
    """The structure of such programs, and their P."""
    every = np.arange(n)
    structure = ConicStructure(SparsityPattern((n, n), every, every), SparsityPattern.dense(cones.rows, n), cones)
    return structure, torch.ones(n, dtype=torch.float64)


def _picked(states: States, elements: Tensor) -> States:
    return tuple(states[element % len(states)] for element in integers(elements)) if len(states) else ()
