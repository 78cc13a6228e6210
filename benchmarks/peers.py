"""The peers' layers, each behind the same call; one that is not installed says so."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

from .harness import Side, installed

__all__ = [
    "QP_TOLERANCE",
    "TOLERANCES",
    "cvxpylayers_moreau_side",
    "cvxpylayers_side",
    "dense_qp_peers",
    "dqp_side",
    "missing_side",
    "moreau_side",
    "proxsuite_side",
    "qpth_side",
]

# The same numbers for both, by the solver's own names.
TOLERANCES: dict[str, dict[str, float]] = {
    "SCS": {"eps": 1e-6},
    "Clarabel": {"tol_gap_abs": 1e-8, "tol_gap_rel": 1e-8, "tol_feas": 1e-8},
    "ECOS": {"abstol": 1e-8, "reltol": 1e-8, "feastol": 1e-8},
}
QP_TOLERANCE = 1e-8


def peer_layer(problem: cp.Problem, parameters: Sequence[cp.Parameter], variables: Sequence[cp.Variable]) -> Any:
    """cvxpylayers' layer."""
    from cvxpylayers.torch import CvxpyLayer

    return CvxpyLayer(problem, parameters, variables)


def missing_side(library: str, mode: str, kind: str, package: str) -> Side:
    return Side(library, mode, kind, None, missing=f"not installed (pip install {package})")


def cvxpylayers_side(
    problem: cp.Problem,
    parameters: Sequence[cp.Parameter],
    variable: cp.Variable,
    solver: str,
    kind: str,
    tau: float = 0.1,
    rho: float = 0.0,
    slow: bool = False,
    tolerance: float | None = None,
) -> Side:
    """cvxpylayers with one of its solvers and its exact (LSQR) or LPGD derivative; ``tolerance`` replaces ours."""
    tolerances = TOLERANCES[solver] if tolerance is None else dict.fromkeys(TOLERANCES[solver], tolerance)
    mode = f"{solver} {'' if tolerance is None else f'{tolerance:.0e} '}{'LPGD' if kind == 'lpgd' else 'exact'}"
    if not (installed("cvxpylayers") and installed("diffcp")):
        return missing_side("cvxpylayers", mode, kind, "cvxpylayers[torch] diffcp")
    layer = peer_layer(problem, parameters, [variable])
    options: dict[str, Any] = {"solve_method": solver, **tolerances}
    if kind == "lpgd":
        options |= {"mode": "lpgd", "derivative_kwargs": {"tau": tau, "rho": rho}}

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        return layer(*data, solver_args=dict(options))[0], None

    return Side("cvxpylayers", mode, kind, call, slow=slow)


def cvxpylayers_moreau_side(problem: cp.Problem, parameters: Sequence[cp.Parameter], variable: cp.Variable) -> Side:
    """cvxpylayers with Moreau, in batches; with these versions it ignores some constraints, which the judge sees."""
    if not (installed("cvxpylayers") and installed("moreau")):
        return missing_side("cvxpylayers", "Moreau exact", "exact", "cvxpylayers[torch] moreau")
    from cvxpylayers.torch import CvxpyLayer

    layer = CvxpyLayer(problem, parameters, [variable], solver="MOREAU")
    return Side("cvxpylayers", "Moreau exact", "exact", lambda data: (layer(*data)[0], None))


def moreau_side(n: int, equalities: int, inequalities: int, batch: int) -> Side:
    """moreau.torch, its active-set method, on the matrices themselves."""
    if not installed("moreau"):
        return missing_side("moreau.torch", "active set", "exact", "moreau")
    import moreau
    import moreau.torch

    m = equalities + inequalities
    settings = moreau.Settings(solver="active_set", batch_size=batch, enable_grad=True)
    cones = moreau.Cones(num_zero_cones=equalities, num_nonneg_cones=inequalities)
    patterns = [
        pattern for rows in (n, m) for pattern in (torch.arange(rows + 1) * n, torch.arange(n).repeat(rows))
    ]  # row offsets and columns of P and of the rows, dense
    solver = moreau.torch.Solver(n, m, *patterns, cones=cones, settings=settings)

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        P, q, A, b, G, h = data
        rows, right = torch.cat([A, G], 1), torch.cat([b, h], 1)
        return solver.solve(P.reshape(batch, -1), rows.reshape(batch, -1), q, right).x, None

    return Side("moreau.torch", "active set", "exact", call)


def qpth_side() -> Side:
    if not installed("qpth"):
        return missing_side("qpth", "PDIPM", "exact", "--no-deps qpth==0.0.18")
    from qpth.qp import QPFunction

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        P, q, A, b, G, h = data
        return QPFunction(eps=QP_TOLERANCE, verbose=-1)(P, q, G, h, A, b), None

    return Side("qpth", "PDIPM", "exact", call)


def proxsuite_side(parallel: bool) -> Side:
    mode = "QPLayer, threads" if parallel else "QPLayer"
    if not installed("proxsuite"):
        return missing_side("ProxSuite", mode, "exact", "proxsuite")
    from proxsuite.torch.qplayer import QPFunction

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        P, q, A, b, G, h = data
        lower = torch.full_like(h, -1e20)
        layer = QPFunction(eps=QP_TOLERANCE, eps_backward=QP_TOLERANCE, omp_parallel=parallel)
        return layer(P, q, A, b, G, lower, h)[0], None

    return Side("ProxSuite", mode, "exact", call)


def dqp_side(solver: str) -> Side:
    mode = f"{solver}, dense"
    if not (installed("dqp") and installed("qpsolvers") and installed("pandas")):
        return missing_side("dQP", mode, "exact", "--no-deps libdqp")
    with contextlib.redirect_stdout(io.StringIO()):
        from dqp import dQP

    layer = dQP.dQP_layer(dQP.build_settings(qp_solver=solver, eps_abs=QP_TOLERANCE, solve_type="dense"))

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        P, q, A, b, G, h = data
        return layer(P, q, G, h, A, b)[0], None

    return Side("dQP", mode, "exact", call)


def _ffolayer() -> Side:
    if not (installed("ffolayer") and installed("qpth")):
        return missing_side("FFOLayer", "PDIPM", "approximate", "ffolayer")
    from ffolayer import FFOQPLayer

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        P, q, A, b, G, h = data
        return FFOQPLayer(eps=QP_TOLERANCE, solver="PDIPM", verbose=-1)(P, q, G, h, A, b), None

    return Side("FFOLayer", "first order, qpth's solver", "approximate", call)


def _cvxpylayers_qp(n: int, equalities: int, inequalities: int, solver: str, kind: str, slow: bool) -> Side:
    """The quadratic term is |R x|²/2 with P = RᵀR: a quadratic form has no gradient with respect to P there."""
    x, R, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    A, b = cp.Parameter((equalities, n)), cp.Parameter(equalities)
    G, h = cp.Parameter((inequalities, n)), cp.Parameter(inequalities)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(R @ x) + q @ x), [A @ x == b, G @ x <= h])
    side = cvxpylayers_side(problem, [R, q, A, b, G, h], x, solver, kind, tau=1e-3, slow=slow)
    if side.call is None:
        return side
    inner = side.call

    def call(data: Sequence[Tensor]) -> tuple[Tensor, Any]:
        P, *others = data
        return inner([torch.linalg.cholesky(P).mT, *others])

    return side._replace(call=call)


def dense_qp_peers(n: int, equalities: int, inequalities: int, batch: int) -> list[Side]:
    """Everything that takes a batch of dense quadratic programs (P, q, A, b, G, h)."""
    sides = [qpth_side(), proxsuite_side(False), proxsuite_side(True), moreau_side(n, equalities, inequalities, batch)]
    if n <= 100:
        sides += [dqp_side("daqp"), _ffolayer()]
    if n in (10, 50):
        modes = (("Clarabel", "exact"), ("SCS", "exact"), ("SCS", "lpgd"))
        sides += [_cvxpylayers_qp(n, equalities, inequalities, *mode, slow=n == 50) for mode in modes]
    return sides
