"""Answers, verdicts and gradients do not depend on the scale of the data.

A problem with a planted solution is put into other units: lengths, objectives, rows and variables times powers of ten
from 1e-8 to 1e8, one at a time and several at once.  Its solution and its gradients are those of the original, in the
new units, exactly; nothing else is compared with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

from lpgd import ECOS, LPGD, ConicSolution, CvxpyLayer, ImplicitKKT, SerialExecutor, Status
from lpgd.cones.product import Cones
from lpgd.problems import ConicData, ConicPoint, ConicProblem
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicStructure
from lpgd.problems.conic.units import Units
from lpgd.solvers import ConicSolver, choose_solver
from lpgd.solvers.ranking import Situation
from tests.judge.judge import judge
from tests.problem_table import BATCH, REGULAR, Case
from tests.solver_table import SOLVER_TABLE
from tests.test_solvers import supported

KINDS = ["length", "cost", "rows", "variables", "everything"]
FOR_ALL = [case for case in REGULAR if case.name in ("lp", "qp", "qp, batched matrices", "socp", "exponential", "sdp")]


def in_other_units(case: Case, kind: str, seed: int) -> tuple[ConicProblem, Units]:
    """The problem as it is in units that are powers of ten, and those units."""
    structure, rng = case.problem.structure, np.random.default_rng(seed)

    def powers(shape: tuple[int, ...], largest: int) -> torch.Tensor:
        return torch.from_numpy(10.0 ** rng.integers(-largest, largest + 1, size=shape))

    every, blocks = kind == "everything", structure.cones.blocks
    length = powers((BATCH, 1), 3 if every else 8) if every or kind == "length" else None
    cost = powers((BATCH, 1), 3 if every else 8) if every or kind == "cost" else None
    if cost is None and length is not None and structure.quadratic.nnz:
        cost = length**-2  # q and b are scaled, and P is not
    row = variable = None
    if structure.m and (every or kind == "rows"):
        row = powers((1, structure.m), 2 if every else 8)[:, blocks]
    if every or kind == "variables":
        variable = powers((1, structure.n), 2 if every else 8)
    units = Units(variable, row, length, cost)
    return units.apply(case.problem), units


def defaults(case: Case) -> ConicSolver:
    return choose_solver(case.problem.structure, situation=Situation())


TABLE = [pytest.param(None, case, id=f"default-{case}") for case in FOR_ALL] + [
    pytest.param(row.solver, case, id=f"{row}-{case}")
    for row in SOLVER_TABLE
    for case in supported(row.solver)
    if case in FOR_ALL
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("solver", "case"), TABLE)
def test_solutions_are_the_same_in_any_units(solver: ConicSolver | None, case: Case, kind: str) -> None:
    chosen = solver or defaults(case)
    problem, units = in_other_units(case, kind, seed=KINDS.index(kind))
    solution = chosen.solve(problem)
    assert solution.statuses == (Status.SOLVED,) * BATCH
    x = units.point_out(case.problem, solution.point).x
    torch.testing.assert_close(x, case.point.x, atol=1e-6 * float(case.point.x.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [ImplicitKKT(), LPGD()], ids=["ImplicitKKT", "LPGD"])
@pytest.mark.parametrize("case", FOR_ALL, ids=repr)
def test_gradients_are_the_same_in_any_units(case: Case, method: Any, kind: str) -> None:
    solver = defaults(case)
    problem, units = in_other_units(case, kind, seed=7)
    g = torch.from_numpy(np.random.default_rng(8).normal(size=case.point.x.shape))
    cotangent = ConicPoint(g, torch.zeros_like(case.point.y), torch.zeros_like(case.point.z))
    exact = ConicSolution(
        case.problem, *case.point, case.problem.slack(case.point.x), (Status.SOLVED,) * BATCH,
        np.zeros(BATCH, int), np.zeros(BATCH), np.zeros(BATCH), (None,) * BATCH,
    )  # fmt: skip
    expected, _ = ImplicitKKT().vjp(exact, cotangent, solver, SerialExecutor())
    solution = solver.solve(problem)
    # The loss is one of x in the old units; so a change of a new datum is worth what the old one's would be.
    scaled = units.tilt_in(case.problem, cotangent)
    loss = scaled._replace(x=scaled.x / _cost(units))
    gradient, info = method.vjp(solution, loss, solver, SerialExecutor())
    assert not info.fallbacks
    there = _data_in_old_units(case.problem, units, gradient)
    for name, own, wanted in zip(ConicData._fields, there, expected, strict=True):
        if wanted.numel():
            size = float(wanted.abs().max()) or 1.0
            torch.testing.assert_close(
                own, wanted, atol=1e-4 * size, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


def _cost(units: Units) -> torch.Tensor:
    return torch.ones(1, 1, dtype=torch.float64) if units.cost is None else units.cost


def _data_in_old_units(problem: ConicProblem, units: Units, gradient: ConicData) -> ConicData:
    """dℓ/d(old data) from dℓ/d(new data), where new = factors × old."""
    ones = ConicData(*(torch.ones_like(datum) for datum in problem.data))
    factors = units.apply(replace(problem, data=ones)).data
    parts = []
    for own, factor, datum in zip(gradient, factors, problem.data, strict=True):
        part = own * factor
        parts.append(part.sum(0) if datum.ndim == 1 and part.ndim == 2 else part)
    return ConicData(*parts)


@pytest.mark.parametrize(
    "solver", ["CLARABEL", "INTERIOR", "PIQP", "SCS", "MOREAU", *(["ECOS"] if ECOS.is_installed() else [])]
)
def test_an_answer_far_from_the_active_set_is_not_left_there(solver: str) -> None:
    # Curvatures of other sizes than the multipliers: solvers end with both a multiplier and its slack at 1e-5.
    for done, tally in judge("scales", 25, 21, 2175, ("program",), (solver,), ("implicit",)):
        assert done == 25
        assert tally.total("right", "cautious") == 25, tally.findings


@pytest.mark.filterwarnings("ignore::lpgd.LpgdWarning")  # most solvers give up on these, and say so
@pytest.mark.parametrize("solver", [None, "CLARABEL", "SCS", "INTERIOR"])
@pytest.mark.parametrize("digits", [5, 6, 7])
def test_an_inaccurate_answer_that_is_large_is_no_solution_in_larger_units(digits: int, solver: str | None) -> None:
    # Least squares whose solution has the size 10^digits: against numpy's, by a singular value decomposition.  In units
    # of an inaccurate answer's size the right-hand side is no more than a tolerance, and almost any point solves that.
    random = np.random.default_rng(digits)
    left, right = (np.linalg.qr(random.standard_normal((size, 6)))[0] for size in (10, 6))
    F, g = left @ np.diag(np.logspace(0, -digits, 6)) @ right.T, random.standard_normal(10)
    x, F_parameter, g_parameter = cp.Variable(6), cp.Parameter((10, 6)), cp.Parameter(10)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F_parameter @ x - g_parameter)))
    layer = CvxpyLayer(problem, [F_parameter, g_parameter], [x], solver=solver, eliminate=False)
    output = layer(torch.from_numpy(F), torch.from_numpy(g))
    best = np.linalg.lstsq(F, g, rcond=None)[0]
    found, least = (float(np.square(F @ point - g).sum()) for point in (output[0].numpy(), best))
    assert output.info.statuses == (Status.SOLVED,)
    assert found == pytest.approx(least, rel=1e-8)


@pytest.mark.parametrize("elements", [1, 3])
def test_a_moderate_objective_stays_as_it_is(elements: int) -> None:
    """A coarse grid, on which elements that share P share a factor of it, must not make it smaller: it did, by 16."""
    dense = SparsityPattern.dense(2, 2)
    structure = ConicStructure(dense, dense, Cones(nonnegative=2))
    P = torch.tensor([3.7e-3, 1e-3, 1e-3, 3e-3], dtype=torch.float64).repeat(elements, 1)
    q = torch.tensor([9e-3, -2e-2], dtype=torch.float64).repeat(elements, 1)
    A, b = torch.ones(elements, 4, dtype=torch.float64), torch.ones(elements, 2, dtype=torch.float64)
    nothing = torch.zeros(0, dtype=torch.float64)
    problem = ConicProblem(structure, ConicData(P, q, A, b, nothing, nothing), elements)
    assert problem.units.is_trivial


SCALES = [1.0, 1e2, 1e3, 1e5, 1e8]


@pytest.mark.filterwarnings("error::lpgd.LpgdWarning")
@pytest.mark.parametrize("scale", SCALES)
def test_large_curvature_of_variables_that_stay_small(scale: float) -> None:
    """min |x|² + 2 s² Σ huber(|x_i - y_i| / s): two thirds of y_i, or where that is far away 0.4 s along y_i.

    What the function does not clip is at most 0.2, with a curvature of s², beside x of the size s.
    """
    given = scale * np.random.default_rng(14).standard_normal((2, 20)) * np.r_[np.full(12, 0.1), np.full(8, 3.0)]
    x, y = cp.Variable((2, 20)), cp.Parameter((2, 20))
    clipped = [cp.huber(cp.norm(x[:, i] - y[:, i]) / scale, 0.2) for i in range(20)]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x) + 2 * scale**2 * cp.sum(clipped)))
    values = torch.from_numpy(given).requires_grad_()
    (found,) = CvxpyLayer(problem, [y], [x])(values)
    length = np.linalg.norm(given, axis=0)
    near, unit = length / 3 <= 0.2 * scale, given / length
    np.testing.assert_allclose(found.detach() / scale, np.where(near, 2 * given / 3 / scale, 0.4 * unit), atol=1e-9)
    found.sum().backward()
    across = 0.4 * scale / length * (1 - unit * unit.sum(0))
    np.testing.assert_allclose(values.grad, np.where(near, 2 / 3, across), atol=1e-7)


@pytest.mark.filterwarnings("error::lpgd.LpgdWarning")
@pytest.mark.parametrize("scale", SCALES)
def test_a_chain_of_points_in_any_unit(scale: float) -> None:
    """min Σ |x_i - y_i|² + 1.5 s² Σ huber(|x_i - x_{i+1}| / s), against Newton's method where s is 1."""
    given = np.c_[np.repeat([0.0, 2.0], [7, 8]), np.repeat([0.0, 1.0], [4, 11])]
    given += 0.1 * np.random.default_rng(3).standard_normal((15, 2))
    D, W = np.diff(np.eye(15), axis=0), np.arange(1.0, 31.0).reshape(15, 2)
    exact, slope, hessian = given.copy(), np.ones((15, 2)), np.eye(30)

    def value(point: np.ndarray) -> float:
        length = np.linalg.norm(D @ point, axis=1)
        clipped = np.where(length <= 0.2, length**2, 0.4 * length - 0.04)
        return float(np.square(point - given).sum() + 1.5 * clipped.sum())

    while np.abs(slope).max() > 1e-12:
        step = D @ exact
        length = np.linalg.norm(step, axis=1)
        weight = np.where(length <= 0.2, 3.0, 0.6 / length)
        slope = 2 * (exact - given) + D.T @ (weight[:, None] * step)
        hessian = np.kron(2 * np.eye(15) + D.T @ (weight[:, None] * D), np.eye(2))
        for edge in np.flatnonzero(length > 0.2):
            along = np.outer(D[edge], step[edge] / length[edge]).ravel()
            hessian -= weight[edge] * np.outer(along, along)
        newton = np.linalg.solve(hessian, slope.ravel()).reshape(15, 2)
        exact = min((exact - 0.5**power * newton for power in range(12)), key=value)
    x, y = cp.Variable((15, 2)), cp.Parameter((15, 2))
    clipped = cp.sum(cp.huber(cp.norm(cp.diff(x), axis=1) / scale, 0.2))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - y) + 1.5 * scale**2 * clipped))
    values = torch.from_numpy(scale * given).requires_grad_()
    (found,) = CvxpyLayer(problem, [y], [x])(values)
    np.testing.assert_allclose(found.detach() / scale, exact, atol=1e-11)
    (found * torch.from_numpy(W)).sum().backward()
    np.testing.assert_allclose(values.grad, 2 * np.linalg.solve(hessian, W.ravel()).reshape(15, 2), rtol=1e-9)
