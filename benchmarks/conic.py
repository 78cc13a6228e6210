"""CVXPY problems as cases: our CvxpyLayer and cvxpylayers' in the same modes, and ours by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cvxpy as cp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .harness import Case, Side
from .ours import our_cvxpy_side, solver_names
from .peers import TOLERANCES, cvxpylayers_moreau_side, cvxpylayers_side
from .problems import Instance, Program

__all__ = ["conic_case", "conic_sides"]

EXACT = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}


def _assign(instance: Instance, values: Sequence[Tensor], element: int) -> None:
    for parameter, value in zip(instance.parameters, values, strict=True):
        parameter.value = (value[element] if value.ndim > len(parameter.shape) else value).detach().numpy()


def _judge(instance: Instance) -> Callable[..., tuple[NDArray[np.float64], float]]:
    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[NDArray[np.float64], float]:
        objectives, violation = [], 0.0
        for element, point in zip(elements, points, strict=True):
            _assign(instance, data, element)
            # A PSD variable takes no value with an eigenvalue of minus a tolerance unless it is told not to look.
            instance.variable.save_value(point.numpy())
            objectives.append(float(instance.problem.objective.value))
            for constraint in instance.problem.constraints:
                violation = max(violation, float(np.max(constraint.violation())))
        return np.array(objectives), violation

    return judge


def _exactly(instance: Instance) -> Callable[[Sequence[Tensor], Sequence[int]], Tensor]:
    def exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
        points = []
        for element in elements:
            _assign(instance, data, element)
            instance.problem.solve(**EXACT)
            points.append(np.array(instance.variable.value))
        return torch.from_numpy(np.stack(points))

    return exactly


def conic_case(comparison: str, program: Program, batch: int) -> tuple[Case, Instance]:
    """A case of the report; its exact solutions are Clarabel's at 1e-12, through CVXPY."""
    instance = program.build(batch)
    case = Case(
        comparison,
        f"{program.name}{'' if comparison != 'sudoku' else f'_{batch}'}",
        program.title,
        batch,
        instance.draw,
        instance.loss,
        _judge(instance),
        _exactly(instance),
        regular=program.regular,
        step=program.step,
        unknowns=instance.variable.size,
    )
    return case, instance


def conic_sides(
    program: Program,
    instance: Instance,
    named: Sequence[tuple[str, str]] = (),
    slow: Sequence[tuple[str, str]] = (),
    finer: Sequence[tuple[str, str, float]] = (),
) -> list[Side]:
    """Both libraries in every mode of the program; ours by default in both kinds, and with solvers of our own.

    Args:
        program: modes, τ and ρ.
        instance: the CVXPY problem.
        named: more (solver, kind) pairs of ours, at the solver's own tolerance; skipped where not installed.
        slow: modes that the peer runs once.
        finer: (solver, kind, tolerance) of the peer, where its usual tolerance leaves more error than ours.
    """
    what = instance.problem, instance.parameters, instance.variable
    steps = {"tau": program.tau, "rho": program.rho}
    sides = [our_cvxpy_side(*what, None, kind, **steps) for kind in ("exact", "lpgd")]
    for solver, kind in program.modes:
        sides.append(our_cvxpy_side(*what, solver, kind, TOLERANCES[solver], **steps))
        sides.append(cvxpylayers_side(*what, solver, kind, **steps, slow=(solver, kind) in slow))
    sides += [
        cvxpylayers_side(*what, solver, kind, **steps, slow=(solver, kind) in slow, tolerance=tolerance)
        for solver, kind, tolerance in finer
    ]
    sides.append(cvxpylayers_moreau_side(*what))
    for solver, kind in named:
        if solver_names([solver]):
            sides.append(our_cvxpy_side(*what, solver, kind, **steps))
    return sides
