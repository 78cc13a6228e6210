"""Implicit differentiation of the optimality conditions of a conic program, as an exact method and as the fallback.

With ``v = y - s`` the conditions are ``P x + q + AᵀΠ(v) + z = 0`` and ``A x + Π(v) - v = b``, Π the projection onto
K* (Busseti, Moursi and Boyd 2019, for the homogeneous form).  Its derivative D at v is symmetric with eigenvalues
``0 ≤ d ≤ 1``; with ``T = √d Uᵀ`` from its eigenvectors, ``D = TᵀT``, the change ``(dx, dy)`` of the solution under the
tilt ``<g_x, x> + <g_y, y>`` solves one symmetric system,

    [ P + ρI   (T A)ᵀ  ] [dx]     [  g_x  ]
    [ T A     -(I - d) ] [u ] = - [ T g_y ],      dy = Tᵀu,

in which rows with d = 0 drop out.  A variable at a bound is fixed: ``dx_j = -g_z,j``, and its multiplier's change
follows from its row of the first block.  Reverse mode differentiates ``∇_w L`` along ``(dx, dy, dz)``; forward mode
takes the tilt ``∇_z <∇_w L, dw>``: both are this one solve.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch
from numpy.typing import NDArray

from lpgd.elements import ElementView
from lpgd.execution import run_tasks
from lpgd.gradients.base import GradientInfo, GradientMethod, relevant_elements
from lpgd.gradients.polyhedral import is_batchable, polyhedral_response
from lpgd.problems.conic import ConicProblem
from lpgd.problems.structure import ConicData, ConicPoint, ConicStructure
from lpgd.projections import projection_derivative
from lpgd.solution import Solution
from lpgd.solvers.base import Solver
from lpgd.status import warn

__all__ = ["ImplicitKKT"]

FloatArray = NDArray[np.float64]

DENSE_LIMIT = 400
"""Systems up to this size, or mostly filled ones, are factorised densely."""
SINGULAR = 1e13
"""An estimated condition number above which a system counts as singular."""
RESIDUAL = 1e-7
"""The relative residual that a solve must reach to count as exact."""
RANK_CUTOFF = 1e-10
"""Singular values below this fraction of the largest are zero in the minimum-norm answer."""


@dataclass(frozen=True)
class ImplicitKKT(GradientMethod):
    """The exact derivative of the solution map at regular points, by one linear solve for each element.

    Args:
        rho: ρ ≥ 0 differentiates the problem with ``(ρ/2) |x - x*|²`` added (x* held fixed): the limit of
            ``LPGD(tau, rho)`` as τ → 0, a regularised gradient.

    Where the system is singular (degenerate or non-unique solutions, redundant equalities) the answer is its
    minimum-norm least-squares solution; the record says ``"implicit, regularised"`` and a warning tells.  At a kink
    (an inactive constraint with a zero multiplier) one side is taken, as for ReLU.
    """

    rho: float = 0.0

    needs: ClassVar[frozenset[str]] = frozenset({"has_kkt"})

    def __post_init__(self) -> None:
        if not 0 <= self.rho < np.inf:
            raise ValueError(f"rho is {self.rho}; it must be nonnegative and finite.")

    def vjp(
        self,
        problem: ConicProblem,
        solution: Solution,
        cotangent: ConicPoint,
        solver: Solver,
        executor: Executor | None = None,
    ) -> tuple[ConicData, GradientInfo]:
        change, info = self.response(problem, solution, cotangent, executor)
        point = solution.point
        if self.rho == 0.0 and _is_still(problem, cotangent, change):
            info.notices["q"] = _ZERO_GRADIENT
        usable = solution.usable[:, None]
        x, y = (torch.where(usable, part, 0.0) for part in (point.x, point.y))
        d_upper = torch.where(point.z > 0, -change.z, 0.0)
        d_lower = torch.where(point.z < 0, -change.z, 0.0)
        return problem.bilinear_gradient(change.x, change.y, x, y, d_lower, d_upper), info

    def jvp(
        self,
        problem: ConicProblem,
        solution: Solution,
        tangent: ConicData,
        solver: Solver,
        executor: Executor | None = None,
    ) -> tuple[ConicPoint, GradientInfo]:
        return self.response(problem, solution, problem.mixed_product(solution.point, tangent), executor)

    def response(
        self, problem: ConicProblem, solution: Solution, tilt: ConicPoint, executor: Executor | None = None
    ) -> tuple[ConicPoint, GradientInfo]:
        """The derivative of the solution along a tilt ``<g, point>`` of the Lagrangian, (B, ·) each.

        Linear and quadratic programs are differentiated all at once, without the executor.
        """
        used = ["zero cotangent" if usable else "no solution" for usable in solution.usable.tolist()]
        info = GradientInfo(self, used)
        active = relevant_elements(solution, tilt)
        change = ConicPoint(*(torch.zeros_like(part) for part in solution.point))
        if active and is_batchable(problem, self.rho):
            active = self._respond_at_once(problem, solution, tilt, active, change, used)
        if not active:
            return change, info
        view = ElementView(problem)
        lower, upper = problem.full_bounds()
        arrays = {**solution.point._asdict(), "slack": solution.slack, "lower": lower, "upper": upper}
        arrays |= {f"g_{name}": part for name, part in tilt._asdict().items()}
        rows = {name: tensor.detach().cpu().numpy() for name, tensor in arrays.items()}
        tasks = []
        for elements in view.groups(active, executor):
            points = []
            for element in elements:
                points.append(_Point(**{name: values[element] for name, values in rows.items()}))
            matrices = {e % view.distinct: (view.row("P", e), view.row("A", e)) for e in elements}
            tasks.append(_Task(problem.structure, self.rho, elements, matrices, view.distinct, points))
        results = run_tasks(_respond, tasks, executor)
        regularised = []
        for task, responses in zip(tasks, results, strict=True):
            for element, (dx, dy, dz, exact) in zip(task.elements, responses, strict=True):
                for whole, part in zip(change, (dx, dy, dz), strict=True):
                    whole[element] = torch.from_numpy(part).to(whole.device)
                used[element] = "implicit" if exact else "implicit, regularised"
                if not exact:
                    regularised.append(element)
        info.fallbacks = sorted(regularised)
        if regularised:
            warn(
                f"{self}: the optimality conditions of elements {sorted(regularised)[:10]} are singular (degenerate or "
                "non-unique solutions, or redundant equalities); their gradients are minimum-norm answers. "
                "rho > 0, or LPGD with a finite tau, is well defined there."
            )
        return change, info

    def _respond_at_once(
        self,
        problem: ConicProblem,
        solution: Solution,
        tilt: ConicPoint,
        active: list[int],
        change: ConicPoint,
        used: list[str],
    ) -> list[int]:
        """Write the response of as many elements as possible; the others are returned."""
        rows = torch.as_tensor(active, dtype=torch.int64, device=problem.device)
        if len(active) < problem.batch_size:
            problem, solution, tilt = problem.select(active), solution.select(active), tilt.select(rows)
        response, exact = polyhedral_response(problem, solution, tilt, self.rho)
        for whole, part in zip(change, response, strict=True):
            whole[rows[exact]] = part[exact]
        left = []
        for element, fine in zip(active, exact.tolist(), strict=True):
            if fine:
                used[element] = "implicit"
            else:
                left.append(element)
        return left


class _Point(NamedTuple):
    """One element's solution, tilt and bounds."""

    x: FloatArray
    y: FloatArray
    z: FloatArray
    slack: FloatArray
    g_x: FloatArray
    g_y: FloatArray
    g_z: FloatArray
    lower: FloatArray
    upper: FloatArray


class _Task(NamedTuple):
    structure: ConicStructure
    rho: float
    elements: list[int]
    matrices: dict[int, tuple[FloatArray, FloatArray]]
    distinct: int
    points: list[_Point]


def _respond(task: _Task) -> list[tuple[FloatArray, FloatArray, FloatArray, bool]]:
    built: dict[int, _Matrices] = {}
    responses = []
    for element, point in zip(task.elements, task.points, strict=True):
        pair = element % task.distinct
        if pair not in built:
            built = {pair: _Matrices(task.structure, *task.matrices[pair], task.rho)}
        responses.append(_solve_element(built[pair], point))
    return responses


class _Matrices:
    """P + ρI and A of one element, dense where the KKT system will be."""

    def __init__(self, structure: ConicStructure, P: FloatArray, A: FloatArray, rho: float) -> None:
        self.cones = structure.cones
        filled = structure.constraint.nnz > 0.2 * max(structure.m * structure.n, 1)
        self.dense = structure.n + structure.m <= DENSE_LIMIT or filled
        quadratic = structure.quadratic.csc(P)
        constraint = structure.constraint.csc(A)
        if rho:
            quadratic = quadratic + rho * sp.eye_array(structure.n, format="csc")
        self.has_quadratic = quadratic.nnz > 0
        self.P: Any = quadratic.toarray() if self.dense else sp.csr_array(quadratic)
        self.A: Any = constraint.toarray() if self.dense else sp.csr_array(constraint)


def _solve_element(matrices: _Matrices, point: _Point) -> tuple[FloatArray, FloatArray, FloatArray, bool]:
    P, A, has_quadratic = matrices.P, matrices.A, matrices.has_quadratic
    T, rest = projection_derivative(matrices.cones, point.y - point.slack, dual=True).factor()
    # A bound is active where its multiplier exceeds its slack: the projection's derivative for one row.
    at_bound = (point.z > point.upper - point.x) | (-point.z > point.x - point.lower)
    free, fixed = np.flatnonzero(~at_bound), np.flatnonzero(at_bound)
    dx = np.zeros(point.x.size)
    dx[fixed] = -point.g_z[fixed]
    moved = bool(np.any(dx))

    g_x = point.g_x + P @ dx if moved and has_quadratic else point.g_x
    g_y = point.g_y + A @ dx if moved else point.g_y
    rows = T @ A
    # A free variable that nothing active involves, in an epigraph that is not tight, say, is not determined; nor need
    # it be where no loss depends on it: it is left where it is.
    involved = g_x[free] != 0
    involved |= _has_entries(rows[:, free])
    if has_quadratic:
        involved |= _has_entries(P[:, free])
    free = free[involved]
    right = -np.concatenate([g_x[free], T @ g_y])
    blocks = P[np.ix_(free, free)] if has_quadratic else None, rows[:, free], rest
    answer, exact = _solve_dense(*blocks, right) if matrices.dense else _solve_sparse(*blocks, right)

    dx[free] = answer[: free.size]
    dy = T.T @ answer[free.size :]
    dz = np.zeros(point.x.size)
    if fixed.size:
        change = A.T @ dy
        if has_quadratic:
            change = change + P @ dx
        dz[fixed] = -(point.g_x[fixed] + change[fixed])
    return dx, dy, dz, exact


def _has_entries(matrix: Any) -> NDArray[np.bool_]:
    """Which columns have a nonzero entry."""
    return np.asarray(abs(matrix).sum(0) > 0).ravel()


@cache
def _probe(size: int) -> FloatArray:
    """A fixed random direction: ``|K⁻¹ probe|`` bounds the norm of K⁻¹ from below, almost surely within √size."""
    direction = np.random.default_rng(size).standard_normal(size)
    return np.asarray(direction / np.linalg.norm(direction))


def _solve_dense(
    P: FloatArray | None, rows: FloatArray, rest: FloatArray, right: FloatArray
) -> tuple[FloatArray, bool]:
    n, size = rows.shape[1], right.size
    if size == 0:
        return right, True
    K = np.zeros((size, size))
    if P is not None:
        K[:n, :n] = P
    K[:n, n:], K[n:, :n] = rows.T, rows
    K[range(n, size), range(n, size)] = -rest
    scale = _equilibration(np.abs(K).max(1))
    scaled = scale[:, None] * K * scale
    try:
        answers = np.linalg.solve(scaled, np.stack([scale * right, _probe(size)], axis=1))
    except np.linalg.LinAlgError:
        return _minimum_norm(K, right), False
    condition = np.linalg.norm(answers[:, 1]) * np.abs(scaled).sum(1).max()
    answer = scale * answers[:, 0]
    error = np.abs(K @ answer - right).max()
    if not (condition < SINGULAR and error <= RESIDUAL * np.abs(right).max(initial=1e-300)):
        return _minimum_norm(K, right), False
    return answer, True


def _minimum_norm(K: FloatArray, right: FloatArray) -> FloatArray:
    """The pseudo-inverse of a symmetric matrix, by its eigenvalues."""
    eigenvalues, vectors = np.linalg.eigh(K)
    kept = np.abs(eigenvalues) > RANK_CUTOFF * np.abs(eigenvalues).max(initial=0.0)
    return vectors[:, kept] @ ((vectors[:, kept].T @ right) / eigenvalues[kept])


def _solve_sparse(P: Any, rows: Any, rest: FloatArray, right: FloatArray) -> tuple[FloatArray, bool]:
    n, size = rows.shape[1], right.size
    quadratic = P if P is not None else sp.csr_array((n, n))
    K = sp.csc_array(sp.block_array([[quadratic, rows.T], [rows, sp.diags_array(-rest)]]))
    largest = np.zeros(size)
    np.maximum.at(largest, K.indices, np.abs(K.data))
    scale = _equilibration(largest)
    scaling = sp.diags_array(scale)
    scaled = sp.csc_array(scaling @ K @ scaling)
    try:
        factor = spla.splu(scaled)
    except RuntimeError:  # SuperLU: "Factor is exactly singular"
        return _least_squares(K, right), False
    solution = factor.solve(np.stack([scale * right, _probe(size)], axis=1))
    answer = solution[:, 0] + factor.solve(scale * right - scaled @ solution[:, 0])
    condition = np.linalg.norm(solution[:, 1]) * abs(scaled).sum(1).max()
    answer = scale * answer
    error = np.abs(K @ answer - right).max()
    if not (condition < SINGULAR and error <= RESIDUAL * np.abs(right).max(initial=1e-300)):
        return _least_squares(K, right), False
    return answer, True


def _least_squares(K: Any, right: FloatArray) -> FloatArray:
    """The minimum-norm least-squares solution of a sparse singular system, iteratively."""
    options = {"atol": 1e-12, "btol": 1e-12, "conlim": 1.0 / RANK_CUTOFF, "maxiter": 20 * right.size}
    answer, stop, *_ = spla.lsmr(K, right, **options)
    if stop == 7:
        warn(
            f"the least-squares solve of a singular system of size {right.size} stopped at its iteration limit; "
            "the gradient of that element is approximate. rho > 0 makes the system better conditioned."
        )
    return answer


def _equilibration(largest: FloatArray) -> FloatArray:
    return 1.0 / np.sqrt(np.where(largest > 0, largest, 1.0))


_ZERO_GRADIENT = (
    "the exact gradient of this linear program with respect to its cost is zero: its solution is a vertex, which does "
    "not move with small changes of the cost. LPGD with a finite tau gives a gradient that teaches."
)


def _is_still(problem: ConicProblem, cotangent: ConicPoint, change: ConicPoint) -> bool:
    """Whether this is a linear program whose solution does not move with its cost, though the loss would like it to."""
    if problem.structure.quadratic.nnz or problem.structure.cones.kinds - {"zero", "nonnegative"}:
        return False
    if problem.batch_size == 0 or cotangent.y.any():
        return False
    size = cotangent.x.abs().amax()
    return bool(size > 0 and change.x.abs().amax() <= 1e-9 * size)
