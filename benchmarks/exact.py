"""Exact solutions of quadratic programs with a regular solution, by no method that is compared: the referee's."""

from __future__ import annotations

from collections.abc import Sequence

import clarabel
import numpy as np
import scipy.linalg
import scipy.sparse as sp
import scipy.sparse.linalg
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["solve_qp_exactly", "solve_qps_exactly"]

FloatArray = NDArray[np.float64]
TRIES = 30


def solve_qp_exactly(
    P: FloatArray | sp.spmatrix,
    q: FloatArray,
    A: FloatArray | sp.spmatrix,
    b: FloatArray,
    G: FloatArray | sp.spmatrix,
    h: FloatArray,
) -> FloatArray:
    """argmin ½xᵀPx + qᵀx subject to A x = b, G x ≤ h, to about 1e-13.

    An interior-point solution tells which inequalities are active; the linear system of the active set then gives
    the solution, and the set is corrected until signs and inequalities hold.

    Raises:
        ArithmeticError: no active set is consistent; the solution is degenerate.
    """
    P, A, G = (sp.csc_matrix(matrix) for matrix in (P, A, G))
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    cones = [clarabel.ZeroConeT(A.shape[0]), clarabel.NonnegativeConeT(G.shape[0])]
    rows, right = sp.vstack([A, G], format="csc"), np.concatenate([b, h])
    solution = clarabel.DefaultSolver(sp.triu(P, format="csc"), q, rows, right, cones, settings).solve()
    dual, slack = np.array(solution.z)[len(b) :], np.array(solution.s)[len(b) :]
    active = dual > slack
    for _ in range(TRIES):
        chosen = sp.vstack([A, G[active]], format="csc")
        system = sp.bmat([[P, chosen.T], [chosen, None]], format="csc")
        point = _solve(system, np.concatenate([-q, b, h[active]]))
        x, multipliers = point[: len(q)], np.zeros(len(h))
        multipliers[active] = point[len(q) + len(b) :]
        violated = ~active & (G @ x - h > 1e-11 * (1.0 + np.abs(h)))
        dropped = active & (multipliers < 0)
        if not violated.any() and not dropped.any():
            return x
        active = (active | violated) & ~dropped
    raise ArithmeticError("no consistent active set: the quadratic program is degenerate")


def _solve(system: sp.csc_matrix, right: FloatArray) -> FloatArray:
    """The solution, with the least multipliers where more rows are active than can be independent."""
    try:
        return scipy.sparse.linalg.splu(system).solve(right)
    except RuntimeError:  # SuperLU: "Factor is exactly singular"
        point = scipy.linalg.lstsq(system.toarray(), right)[0]
    if np.abs(system @ point - right).max() > 1e-10 * (1.0 + np.abs(right).max()):
        raise ArithmeticError("the active constraints contradict each other: the quadratic program is degenerate")
    return point


def solve_qps_exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
    """(k, n) exact solutions of some elements of a batch (P, q, A, b, G, h)."""
    arrays = [value.detach().numpy() for value in data]
    return torch.from_numpy(np.stack([solve_qp_exactly(*(array[i] for array in arrays)) for i in elements]))
