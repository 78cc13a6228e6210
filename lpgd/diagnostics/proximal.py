"""The lower envelope of a convex loss itself: a proximal step of the loss on a conic program, written in CVXPY."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import cvxpy as cp
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from lpgd.arrays import FloatArray
from lpgd.cones.product import Cones, svec_indices, svec_size
from lpgd.layers.base import BaseLayer
from lpgd.problems.conic.elements import ElementView
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure

__all__ = ["lower_envelope_of_loss"]


def lower_envelope_of_loss(
    layer: BaseLayer, solution: ConicSolution, tau: float, rho: float, convex_loss: Callable[..., Any]
) -> Tensor:
    """``min_x ℓ(x) + (f(x) - f(x*) + (ρ/2) |x - x*|²) / τ`` over the feasible set ([LPGD] eqs. 10, 28): (B,).

    Raises:
        TypeError: the problem is not a conic program.
        ValueError: the loss is not convex in the layer's outputs, or CVXPY finds no minimum.
    """
    structure = getattr(solution.problem, "structure", None)
    if not isinstance(structure, ConicStructure):
        raise TypeError("the feasible set of this layer has no CVXPY form: convex_loss is for conic programs.")
    view = ElementView(solution.problem)
    lower, upper = (bound.cpu().numpy() for bound in solution.problem.full_bounds())
    x, start = cp.Variable(structure.n), solution.x.cpu().numpy()
    values = [
        _element(
            layer, structure, view, x, start[element], lower[element], upper[element], tau, rho, convex_loss, element
        )
        for element in range(solution.batch_size)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _element(
    layer: BaseLayer,
    structure: ConicStructure,
    view: ElementView,
    x: cp.Variable,
    start: FloatArray,
    lower: FloatArray,
    upper: FloatArray,
    tau: float,
    rho: float,
    convex_loss: Callable[..., Any],
    element: int,
) -> float:
    P, A = (
        sp.csc_array((view.row(name, element), (pattern.rows, pattern.columns)), shape=pattern.shape)
        for name, pattern in (("P", structure.quadratic), ("A", structure.constraint))
    )
    q, b = view.row("q", element), view.row("b", element)
    step = x - start
    # f(x) - f(x*) along the step: no difference of large numbers.
    change: Any = (P @ start + q) @ step + 0.5 * rho * cp.sum_squares(step)
    if structure.quadratic.nnz:
        change = change + 0.5 * cp.quad_form(step, cp.psd_wrap(P))
    constraints = _membership(structure.cones, b - A @ x)
    constraints += [x[i] >= lower[i] for i in np.flatnonzero(np.isfinite(lower))]
    constraints += [x[i] <= upper[i] for i in np.flatnonzero(np.isfinite(upper))]
    loss = convex_loss(element, *_outputs(layer, x))
    if not isinstance(loss, cp.Expression) or not loss.is_scalar() or not loss.is_convex():
        raise ValueError(
            f"convex_loss returned {loss!r}; it must return a scalar CVXPY expression that is convex in the layer's "
            "outputs."
        )
    problem = cp.Problem(cp.Minimize(loss + change / tau), constraints)
    problem.solve(solver=cp.CLARABEL)
    if problem.status != cp.OPTIMAL:
        raise ValueError(
            f"the proximal step of element {element} has no accurate solution: CVXPY says {problem.status}."
        )
    return float(cast(Any, problem.value))


def _outputs(layer: BaseLayer, x: cp.Variable) -> list[Any]:
    """The layer's outputs as CVXPY expressions; None for dual variables."""
    layouts = getattr(layer, "variable_layouts", None)
    if layouts is None:
        return [x]
    outputs: list[Any] = []
    for layout in layouts:
        if layout.exp:
            raise ValueError("the outputs of a geometric program are not affine in the variables that it is solved in.")
        outputs.append(None if layout.primal is None else cp.reshape(layout.primal @ x, layout.shape, order="C"))
    return outputs


def _membership(cones: Cones, s: Any) -> list[Any]:
    """``s ∈ K`` in CVXPY's constraints."""
    constraints: list[Any] = []
    sections = cones.sections
    if cones.zero:
        constraints.append(s[sections["zero"]] == 0)
    if cones.nonnegative:
        constraints.append(s[sections["nonnegative"]] >= 0)
    at = sections["second_order"].start
    for size in cones.second_order:
        constraints.append(cp.SOC(s[at], s[at + 1 : at + size]) if size > 1 else s[at] >= 0)
        at += size
    for side in cones.semidefinite:
        size = svec_size(side)
        constraints.append(cp.reshape(_smat(side) @ s[at : at + size], (side, side), order="C") >> 0)
        at += size
    for _ in range(cones.exponential):
        constraints.append(cp.ExpCone(s[at], s[at + 1], s[at + 2]))
        at += 3
    for _ in range(cones.dual_exponential):
        # (u, v, w) is in the dual cone where (-v, -u, e w) is in the cone.
        constraints.append(cp.ExpCone(-s[at + 1], -s[at], np.e * s[at + 2]))
        at += 3
    for exponent in cones.power:
        a = abs(exponent)
        first, second = (s[at], s[at + 1]) if exponent > 0 else (s[at] / a, s[at + 1] / (1 - a))
        constraints.append(cp.PowCone3D(first, second, s[at + 2], a))
        at += 3
    return constraints


def _smat(side: int) -> FloatArray:
    """(side², side (side + 1) / 2): svec to the whole matrix, row by row."""
    rows, columns = svec_indices(side)
    matrix = np.zeros((side, side, rows.size))
    scale = np.where(rows == columns, 1.0, np.sqrt(0.5))
    matrix[rows, columns, np.arange(rows.size)] = scale
    matrix[columns, rows, np.arange(rows.size)] = scale
    return matrix.reshape(side * side, rows.size)
