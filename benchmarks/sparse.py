"""A sparse quadratic program with 10⁴ variables, and sparse linear programs; only vectors have gradients."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cvxpy as cp
import numpy as np
import scipy.optimize
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

import lpgd

from .exact import solve_qp_exactly
from .harness import Case, Settings, Side, compare, installed
from .ours import layer_side, solver_names
from .peers import QP_TOLERANCE, cvxpylayers_side, missing_side
from .results import Curve, Result, Target, ratio_target

__all__ = ["run"]

QP_SIZE, QUICK_QP_SIZE = 10_000, 400
LP_SIZE, LP_BATCH = (1_000, 400), (16, 4)
TAU = 1e-2


@dataclass(frozen=True, eq=False)
class Matrices:
    """Fixed P, A and G, and a point that satisfies the constraints."""

    P: sp.csc_matrix
    A: sp.csc_matrix
    G: sp.csc_matrix
    inside: NDArray[np.float64]


def draw_matrices(n: int) -> Matrices:
    """A chain with neighbours: tridiagonal P, n/4 equalities of three variables, n/2 inequalities of four."""
    generator = np.random.default_rng(0)
    off = generator.uniform(-0.4, 0.4, n - 1)
    P = sp.diags([off, generator.uniform(1.0, 2.0, n), off], [-1, 0, 1], format="csc")

    def rows(count: int, width: int) -> sp.csc_matrix:
        # Neighbouring variables: the factors stay sparse, as in control or in smoothing.
        first = np.linspace(0, n - 2 * width - 1, count).astype(int)
        columns = np.concatenate([f + generator.choice(2 * width, width, replace=False) for f in first])
        values = generator.standard_normal(count * width)
        return sp.csc_matrix((values, (np.repeat(np.arange(count), width), columns)), shape=(count, n))

    return Matrices(P, rows(n // 4, 3), rows(n // 2, 4), generator.standard_normal(n))


def to_torch(matrix: sp.csc_matrix) -> Tensor:
    parts = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    return torch.sparse_csc_tensor(*parts, torch.from_numpy(matrix.data), size=matrix.shape)


def qp_case(matrices: Matrices) -> Case:
    P, A, G, inside = matrices.P, matrices.A, matrices.G, matrices.inside
    n = P.shape[0]
    weights = torch.from_numpy(np.random.default_rng(1).standard_normal((1, n)))

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        q = generator.standard_normal((1, n))
        h = G @ inside + generator.uniform(0.05, 1.0, (1, G.shape[0]))
        return torch.from_numpy(q), torch.from_numpy((A @ inside)[None]), torch.from_numpy(h)

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[NDArray[np.float64], float]:
        (x,) = points.numpy()
        q, b, h = (value.detach().numpy()[0] for value in data)
        violation = max(float(np.abs(A @ x - b).max()), float((G @ x - h).max()), 0.0)
        return np.array([0.5 * x @ (P @ x) + q @ x]), violation

    def exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
        q, b, h = (value.detach().numpy()[0] for value in data)
        return torch.from_numpy(solve_qp_exactly(P, q, A, b, G, h)[None])

    def loss(x: Tensor) -> Tensor:
        return (weights * x).sum()

    return Case("sparse", f"sparse_qp{n}", f"sparse QP, n {n}", 1, draw, loss, judge, exactly, unknowns=n, step=1e-6)


def qp_sides(matrices: Matrices) -> list[Side]:
    P, A, G = (to_torch(matrix) for matrix in (matrices.P, matrices.A, matrices.G))

    def arguments(data: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        q, b, h = data
        return (P, q), {"A": A, "b": b, "G": G, "h": h}

    sides = [layer_side(lpgd.QPLayer(), "exact", arguments, chosen=False)]
    for name in solver_names(("CLARABEL", "PIQP", "OSQP", "SCS")):
        sides.append(layer_side(lpgd.QPLayer(name), "exact", arguments, chosen=True))
        sides.append(layer_side(lpgd.QPLayer(name, gradient=lpgd.Domke()), "LPGD", arguments, chosen=True))
    return [*sides, _dqp(P, A, G, "clarabel"), _dqp(P, A, G, "piqp"), *_cvxpylayers_qp(matrices)]


def _dqp(P: Tensor, A: Tensor, G: Tensor, solver: str) -> Side:
    if not (installed("dqp") and installed("qpsolvers") and installed("pandas")):
        return missing_side("dQP", f"{solver}, sparse", "exact", "--no-deps libdqp")
    with contextlib.redirect_stdout(io.StringIO()):
        from dqp import dQP

    settings = dQP.build_settings(
        solve_type="sparse", qp_solver=solver, lin_solver="scipy SPLU", eps_abs=QP_TOLERANCE, empty_batch=False
    )
    layer = dQP.dQP_layer(settings=settings)

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        q, b, h = (value[0] for value in data)
        return layer(P, q, G, h, A, b)[0][None], None

    return Side("dQP", f"{solver}, sparse", "exact", call)


def _cvxpylayers_qp(matrices: Matrices) -> list[Side]:
    """The peer's backward pass solves least squares with the whole cone program: minutes at 10⁴ variables."""
    n = matrices.P.shape[0]
    x = cp.Variable(n)
    q, b, h = cp.Parameter(n), cp.Parameter(matrices.A.shape[0]), cp.Parameter(matrices.G.shape[0])
    objective = cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(matrices.P)) + q @ x)
    problem = cp.Problem(objective, [matrices.A @ x == b, matrices.G @ x <= h])
    modes = (("Clarabel", "exact"), ("SCS", "lpgd"))
    return [cvxpylayers_side(problem, [q, b, h], x, solver, kind, tau=1e-3, slow=n > 1000) for solver, kind in modes]


def lp_program(n: int) -> tuple[cp.Problem, list[cp.Parameter], cp.Variable, sp.csc_matrix]:
    """minimise cᵀx subject to A x = b, 0 ≤ x ≤ 1, for n/3 sparse rows."""
    A = sp.random(
        n // 3,
        n,
        density=8 / n,
        random_state=0,
        format="csc",
        data_rvs=lambda size: np.random.default_rng(0).normal(size=size),
    )
    A = (A + sp.csc_matrix((np.ones(n // 3), (np.arange(n // 3), np.arange(n // 3))), shape=A.shape)).tocsc()
    x, c, b = cp.Variable(n), cp.Parameter(n), cp.Parameter(n // 3)
    return cp.Problem(cp.Minimize(c @ x), [A @ x == b, x >= 0, x <= 1]), [c, b], x, A


def lp_case(n: int, batch: int, A: sp.csc_matrix) -> Case:
    target = torch.from_numpy(np.random.default_rng(1).uniform(size=(batch, n)))

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        b = (A @ generator.uniform(0.1, 0.9, (n, batch))).T
        return torch.from_numpy(generator.standard_normal((batch, n))), torch.from_numpy(np.ascontiguousarray(b))

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[NDArray[np.float64], float]:
        c, b = (value.detach().numpy()[list(elements)] for value in data)
        x = points.numpy()
        violation = max(float(np.abs(x @ A.T - b).max()), float((-x).max()), float((x - 1).max()))
        return (c * x).sum(1), violation

    def exactly(data: Sequence[Tensor], elements: Sequence[int]) -> Tensor:
        points = []
        for element in elements:
            c, b = (value.detach().numpy()[element] for value in data)
            points.append(scipy.optimize.linprog(c, A_eq=A, b_eq=b, bounds=(0, 1), method="highs-ds").x)
        return torch.from_numpy(np.stack(points))

    def loss(x: Tensor) -> Tensor:
        return (x - target).square().sum()

    # A vertex does not move with the cost: what teaches is LPGD's gradient, which has no exact one to be held against.
    return Case("sparse", f"lp{n}", f"sparse LP, n {n}", batch, draw, loss, judge, exactly, regular=False, unknowns=n)


def lp_sides(n: int) -> tuple[list[Side], sp.csc_matrix]:
    problem, parameters, x, A = lp_program(n)
    matrix, one = to_torch(A), torch.ones(n, dtype=torch.float64)

    def arguments(data: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        c, b = data
        return (c,), {"A": matrix, "b": b, "lb": torch.zeros_like(one), "ub": one}

    gradient = lpgd.LPGD(tau=TAU)
    sides = [layer_side(lpgd.LPLayer(gradient=gradient), "LPGD", arguments, chosen=False)]
    for name in solver_names(("HIGHS", "CLARABEL", "PIQP", "SCS", "INTERIOR", "MOREAU")):
        sides.append(layer_side(lpgd.LPLayer(name, gradient=gradient), "LPGD", arguments, chosen=True))
    for solver in ("Clarabel", "SCS"):
        sides.append(cvxpylayers_side(problem, parameters, x, solver, "lpgd", tau=TAU))
    return sides, A


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    matrices = draw_matrices(QUICK_QP_SIZE if settings.quick else QP_SIZE)
    result = compare(qp_case(matrices), qp_sides(matrices), settings)
    yield result
    yield ratio_target(
        result, f"{result.title}: × the faster of dQP and cvxpylayers", 1.0, None, ("dQP", "cvxpylayers")
    )
    n, batch = LP_SIZE[settings.quick], LP_BATCH[settings.quick]
    sides, A = lp_sides(n)
    result = compare(lp_case(n, batch, A), sides, settings)
    yield result
    yield ratio_target(result, f"{result.title}, batch {batch}: × cvxpylayers LPGD", 1.0, None, "cvxpylayers")
