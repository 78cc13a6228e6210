"""Gradient methods against finite differences, closed forms and each other, for every class of problems."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

from lpgd import (
    LPGD,
    SCS,
    BlackboxBackprop,
    Clarabel,
    Domke,
    ImplicitKKT,
    LpgdWarning,
    SerialExecutor,
)
from lpgd.cones.product import Cones
from lpgd.gradients.implicit import conic as implicit_conic
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern
from lpgd.problems.conic.solution import ConicSolution
from lpgd.status import Status
from tests.method_table import METHODS, MethodCase
from tests.problem_table import CASES, REGULAR, Case, planted
from tests.solver_table import SOLVER_TABLE, SolverCase

TIGHT = SCS(tolerance=1e-11)  # takes every cone; its word is checked against planted solutions in test_solvers.py
SERIAL = SerialExecutor()
NOISE = 1e-6
"""Solutions good to 1e-10, differenced over 1e-4: where the expected value is zero, this is what is left."""


def planted_solution(case: Case) -> ConicSolution:
    size = case.problem.batch_size
    slack = case.problem.slack(case.point.x)
    nothing = np.zeros(size)
    return ConicSolution(
        case.problem, *case.point, slack, (Status.SOLVED,) * size, nothing.astype(int), nothing, nothing, (None,) * size
    )


def random_cotangent(case: Case, seed: int = 0, *, duals: bool = True) -> ConicPoint:
    generator = torch.Generator().manual_seed(seed)
    x, y, z = (torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in case.point)
    if not duals:
        y, z = torch.zeros_like(y), torch.zeros_like(z)
    bounded = torch.zeros_like(z)
    bounded[:, case.problem.structure.lower_index] = 1.0
    bounded[:, case.problem.structure.upper_index] = 1.0
    return ConicPoint(x, y, z * bounded)


def random_tangent(problem: ConicProblem, name: str, seed: int) -> ConicData:
    """A random direction of one datum, symmetric for P, along which it stays positive semidefinite to first order."""
    generator = torch.Generator().manual_seed(seed)
    tangent = problem.zero_gradient()
    direction = torch.randn(getattr(tangent, name).shape, generator=generator, dtype=torch.float64)
    if name == "P":
        pattern = problem.structure.quadratic
        matrices = pattern.to_dense(direction) @ pattern.to_dense(problem.data.P)
        direction = pattern.gather(0.5 * (matrices + matrices.mT))
    return tangent._replace(**{name: direction})


def moved(problem: ConicProblem, tangent: ConicData, step: float) -> ConicProblem:
    data = ConicData(*(datum + step * part for datum, part in zip(problem.data, tangent, strict=True)))
    return replace(problem, data=data)


def inner(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))


def norm(point: tuple[torch.Tensor, ...]) -> float:
    return inner(point, point) ** 0.5


def data_names(case: Case) -> list[str]:
    sizes = case.problem.structure.sizes._asdict()
    return [name for name, size in sizes.items() if size]


def difference(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> float:
    """Relative difference in the Euclidean norm over all data."""
    return norm(tuple(a - b for a, b in zip(first, second, strict=True))) / max(norm(second), 1e-300)


@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_implicit_gradient_of_every_datum_equals_finite_differences(case: Case, rho: float) -> None:
    # Solutions are good to about 1e-10 and the third derivatives are of order 1 to 100: central differences with a
    # step of 1e-4 have an error of about 1e-6 from each.
    solution, cotangent, step = planted_solution(case), random_cotangent(case), 1e-4
    gradient, info = ImplicitKKT(rho).vjp(solution, cotangent, TIGHT, SERIAL)
    assert info.counts == {"implicit": case.problem.batch_size}
    for seed, name in enumerate(data_names(case)):
        tangent = random_tangent(case.problem, name, seed)
        ends = []
        for sign in (1.0, -1.0):
            problem = moved(case.problem, tangent, sign * step).augment(rho, case.point.x)
            ends.append(TIGHT.solve(problem, executor=SERIAL).point)
        expected = inner(cotangent, ends[0].minus(ends[1])) / (2 * step)
        scale = max(abs(expected), norm((getattr(gradient, name),)))
        assert inner(gradient, tangent) == pytest.approx(expected, abs=2e-5 * scale + NOISE), name


@pytest.mark.parametrize("row", METHODS, ids=repr)
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_each_method_gives_the_exact_gradient(case: Case, row: MethodCase) -> None:
    solution, cotangent = planted_solution(case), random_cotangent(case, 2)
    expected, _ = ImplicitKKT(getattr(row.method, "rho", 0.0)).vjp(solution, cotangent, TIGHT, SERIAL)
    gradient, info = row.method.vjp(solution, cotangent, TIGHT, SERIAL)
    assert info.counts == {row.source: case.problem.batch_size}
    assert difference(gradient, expected) < row.error


@pytest.mark.parametrize("row", METHODS, ids=repr)
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_forward_mode_is_the_transpose_of_reverse_mode(case: Case, row: MethodCase) -> None:
    solution, cotangent = planted_solution(case), random_cotangent(case, 1)
    gradient, _ = row.method.vjp(solution, cotangent, TIGHT, SERIAL)
    for seed, name in enumerate(data_names(case)):
        tangent = random_tangent(case.problem, name, seed + 10)
        change, _ = row.method.jvp(solution, tangent, TIGHT, SERIAL)
        scale = norm((getattr(gradient, name),)) + norm(change)
        assert inner(change, cotangent) == pytest.approx(
            inner(gradient, tangent), abs=row.transposed * scale + NOISE
        ), name


@pytest.mark.parametrize("row", SOLVER_TABLE, ids=repr)
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_defaults_are_close_to_the_exact_gradient(case: Case, row: SolverCase) -> None:
    solver, error = row.solver, row.gradient_error
    if solver.unsupported(case.problem.structure):
        with pytest.raises(ValueError, match=r"cone|not reliable on linear programs"):
            solver.solve(case.problem)
        return
    exact, _ = ImplicitKKT().vjp(planted_solution(case), random_cotangent(case), TIGHT, SERIAL)
    solution = solver.solve(case.problem)
    # The step is √ε: a one-sided difference is off by that times the curvature; a central one by that squared and by
    # the noise ε/√ε, which is the larger one for exact solvers.
    step = solver.solution_error(case.problem) ** 0.5
    bounds = {ImplicitKKT(): error, LPGD(): 5 * error, Domke(): 5 * error}
    bounds |= {LPGD(envelope="lower"): 20 * step, LPGD(envelope="upper"): 20 * step}
    for method, bound in bounds.items():
        gradient, _ = method.vjp(solution, random_cotangent(case), solver)
        assert difference(gradient, exact) < bound, method


@pytest.mark.parametrize("rho", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_average_is_the_mean_of_lower_and_upper(case: Case, rho: float) -> None:
    solution, cotangent = planted_solution(case), random_cotangent(case, duals=False)
    lower, average, upper = (
        LPGD(0.3, rho, envelope).vjp(solution, cotangent, TIGHT, SERIAL)[0]
        for envelope in ("lower", "average", "upper")
    )
    mean = ConicData(*(0.5 * (low + high) for low, high in zip(lower, upper, strict=True)))
    if case.regular:
        assert difference(average, mean) < 1e-6
    else:  # multipliers are not unique: every solve may return others; the primal part is
        torch.testing.assert_close(average.q, mean.q, atol=1e-6, rtol=1e-6)


def envelope_value(
    problem: ConicProblem, cotangent: ConicPoint, tau: float, rho: float, center: torch.Tensor
) -> torch.Tensor:
    """``(L*(w + τ tilt) - L*(w)) / τ`` with the augmentation's constant: the lower envelope up to ``ℓ - <g, z*>``."""
    augmented = problem.augment(rho, center)
    values = []
    for step in (tau, 0.0):
        tilted = augmented.tilt(torch.full((problem.batch_size,), step, dtype=torch.float64), cotangent)
        values.append(tilted.lagrangian(TIGHT.solve(tilted, executor=SERIAL).point))
    return (values[0] - values[1]) / tau


@pytest.mark.parametrize("rho", [0.0, 0.4])
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_lower_gradient_is_the_gradient_of_the_lower_envelope(case: Case, rho: float) -> None:
    # At a finite tau: the envelope theorem ([LPGD] eq. 15), by central differences of the envelope's value.
    cotangent, tau, step = random_cotangent(case, 3, duals=False), 0.5, 1e-4
    solution = planted_solution(case)
    gradient, _ = LPGD(tau, rho, "lower").vjp(solution, cotangent, TIGHT, SERIAL)
    for seed, name in enumerate(data_names(case)):
        tangent = random_tangent(case.problem, name, seed + 20)
        values = [
            envelope_value(moved(case.problem, tangent, sign * step), cotangent, tau, rho, case.point.x).sum()
            for sign in (1.0, -1.0)
        ]
        expected = float(values[0] - values[1]) / (2 * step)
        scale = norm((getattr(gradient, name),)) * norm(tangent)
        assert inner(gradient, tangent) == pytest.approx(expected, abs=1e-4 * scale + NOISE), name


@pytest.mark.parametrize("rho", [0.0, 0.4])
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_envelopes_bound_a_linear_loss_and_meet_it(case: Case, rho: float) -> None:
    # lower <= ℓ(x*) <= upper for ℓ(x) = <g, x>, the average between them, and all meet as tau -> 0.
    cotangent = random_cotangent(case, 4, duals=False)
    loss = (cotangent.x * case.point.x).sum(-1)
    gaps = []
    for tau in (1.0, 0.1, 1e-3):
        lower = envelope_value(case.problem, cotangent, tau, rho, case.point.x)
        upper = envelope_value(case.problem, cotangent, -tau, rho, case.point.x)
        noise = 1e-8 * (1 + loss.abs()) / tau
        assert torch.all(lower <= loss + noise)
        assert torch.all(loss <= upper + noise)
        gaps.append((upper - lower).max())
    assert gaps[2] < 1e-2 * max(gaps[0], torch.tensor(1e-6))


def test_equality_constrained_quadratic_program_in_closed_form() -> None:
    # (x, y) = K⁻¹ (-q, b) with K = [[P, Aᵀ], [A, 0]]: differentiated by autograd through the dense solve.
    case = planted("equality only", Cones(zero=3), 6, seed=30, batched=("P", "A", "q", "b"))
    structure, cotangent = case.problem.structure, random_cotangent(case, 5)
    leaves = ConicData(*(datum.clone().requires_grad_() for datum in case.problem.data))
    P = structure.quadratic.to_dense(leaves.P)
    A = structure.constraint.to_dense(leaves.A)
    K = torch.cat([torch.cat([0.5 * (P + P.mT), A.mT], -1), torch.cat([A, A.new_zeros(3, 3, 3)], -1)], -2)
    solution = torch.linalg.solve(K, torch.cat([-leaves.q, leaves.b], -1))
    expected = torch.autograd.grad((solution * torch.cat([cotangent.x, cotangent.y], -1)).sum(), leaves[:4])
    for method, tolerance in ((ImplicitKKT(), 1e-10), (LPGD(1e-3), 1e-5)):
        gradient, _ = method.vjp(planted_solution(case), cotangent, Clarabel(), SERIAL)
        assert difference(gradient[:4], expected) < tolerance


def test_projection_onto_the_simplex_in_closed_form() -> None:
    # argmin ½|x - p|² over the simplex moves by I - 11ᵀ/k on its support.
    n = 6
    eye, ones = SparsityPattern.from_matrix(np.eye(n)), SparsityPattern.dense(1, n)
    structure = ConicStructure(eye, ones, Cones(zero=1), np.arange(n))
    p = torch.tensor([[0.9, 0.5, 0.15, -0.3, -1.0, 0.1]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    data = ConicData(
        torch.ones(n).double(), -p, torch.ones(n).double(), one, torch.zeros(n).double(), torch.zeros(0).double()
    )
    problem = ConicProblem(structure, data, 1)
    solver = Clarabel(tolerance=1e-10)
    solution = solver.solve(problem)
    support = (p[0] - 0.2 > 0).double()  # by hand: theta = (0.9 + 0.5 - 1) / 2 = 0.2
    torch.testing.assert_close(solution.x, (p - 0.2).clamp(min=0), atol=1e-8, rtol=0)
    jacobian = torch.diag(support) - torch.outer(support, support) / support.sum()
    g = torch.linspace(-1, 2, n, dtype=torch.float64)[None]
    for method in (ImplicitKKT(), LPGD(1e-3)):
        gradient, _ = method.vjp(solution, ConicPoint(g, torch.zeros(1, 1), torch.zeros(1, n)), solver)
        torch.testing.assert_close(-gradient.q, g @ jacobian, atol=1e-6, rtol=0)


def test_blackbox_backpropagation_equals_its_formula_on_a_linear_program() -> None:
    # (x(c + τ g) - x(c)) / τ with both solutions from SciPy's simplex (HiGHS), an independent solver.
    case = planted("lp", Cones(zero=2, nonnegative=3), 6, seed=31, rank=0, lower=6, active_bounds=2, inactive_rows=1)
    cotangent, tau = random_cotangent(case, 6, duals=False), 3.0
    problem, solution = case.problem, Clarabel(tolerance=1e-10).solve(case.problem)
    gradient, _ = BlackboxBackprop(tau).vjp(solution, cotangent, Clarabel(tolerance=1e-10))
    A = problem.structure.constraint.to_dense(problem.data.A).numpy()
    for element in range(problem.batch_size):
        b = problem.data.b[element].numpy()
        bounds = [(float(low), None) for low in problem.data.lower[element]]
        vertices = [
            scipy.optimize.linprog(
                (problem.data.q + step * cotangent.x)[element].numpy(), A[2:], b[2:], A[:2], b[:2], bounds
            )
            for step in (0.0, tau)
        ]
        assert all(vertex.status in (0, 3) for vertex in vertices)
        if all(vertex.status == 0 for vertex in vertices):
            expected = (vertices[1].x - vertices[0].x) / tau
            np.testing.assert_allclose(gradient.q[element].numpy(), expected, atol=1e-7)


def test_domke_on_a_regularised_linear_program() -> None:
    # argmin <c, x> + ½ δ|x|² over the box is clip(-c/δ): its derivative is -1/δ strictly inside, 0 outside.
    n, delta = 7, 0.5
    eye = SparsityPattern.from_matrix(np.eye(n))
    structure = ConicStructure(eye, SparsityPattern.empty(0, n), Cones(), np.arange(n), np.arange(n))
    c = torch.tensor([[-0.1, -0.3, 0.4, -0.9, -0.2, 0.7, -0.45]], dtype=torch.float64)
    data = ConicData(
        torch.full((n,), delta).double(), c, torch.zeros(0).double(), torch.zeros(0).double(), torch.zeros(n).double(),
        torch.ones(n).double(),
    )  # fmt: skip
    problem, solver = ConicProblem(structure, data, 1), Clarabel()
    solution = solver.solve(problem)
    inside = ((-c / delta > 0) & (-c / delta < 1)).double()
    g = torch.linspace(1, 2, n, dtype=torch.float64)[None]
    cotangent = ConicPoint(g, torch.zeros(1, 0).double(), torch.zeros(1, n).double())
    gradient, info = Domke().vjp(solution, cotangent, solver)
    torch.testing.assert_close(gradient.q, -g * inside / delta, atol=1e-5, rtol=0)
    assert info.counts == {"average": 1}


def test_shared_data_get_the_sum_of_the_elements_gradients() -> None:
    shared = planted("shared", Cones(zero=1, nonnegative=4), 5, seed=32, batched=("q", "b"))
    batched = replace(
        shared.problem,
        data=shared.problem.data._replace(**{k: getattr(shared.problem.data, k).expand(3, -1).clone() for k in "PA"}),
    )
    for method in (ImplicitKKT(), LPGD(0.5), LPGD(0.5, 0.2)):
        cotangent = random_cotangent(shared)
        once, _ = method.vjp(planted_solution(shared), cotangent, TIGHT)
        solution = replace(planted_solution(shared), problem=batched)
        each, _ = method.vjp(solution, cotangent, TIGHT)
        torch.testing.assert_close(once.P, each.P.sum(0), atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(once.A, each.A.sum(0), atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(once.q, each.q, atol=1e-7, rtol=1e-7)


def test_perturbed_solves_are_as_tight_as_their_difference_needs() -> None:
    case = next(case for case in CASES if case.name == "qp")
    cotangent = random_cotangent(case, duals=False)
    solver = SCS(tolerance=1e-5)
    solution = solver.solve(case.problem)
    expected, _ = ImplicitKKT().vjp(planted_solution(case), cotangent, TIGHT)
    for envelope in ("average", "lower", "upper"):
        gradient, info = LPGD(1e-4, envelope=envelope).vjp(solution, cotangent, solver)
        assert info.tolerance is not None
        assert info.tolerance <= 1e-8
        assert difference(gradient, expected) < 1e-3


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_all_elements_at_once_agree_with_one_at_a_time(monkeypatch: pytest.MonkeyPatch, rho: float) -> None:
    # For linear and quadratic programs; the one-by-one path is what every other cone uses.
    for case in CASES:
        if case.problem.structure.cones.kinds - {"zero", "nonnegative"}:
            continue
        solution, cotangent = planted_solution(case), random_cotangent(case, 12)
        found: list[Any] = []
        for batchable in (True, False):  # without a quadratic term that rho adds they are so on accelerators
            with warnings.catch_warnings(), monkeypatch.context() as patch:
                warnings.simplefilter("ignore", LpgdWarning)
                patch.setattr(implicit_conic, "is_batchable", lambda problem, rho, answer=batchable: answer)
                patch.setattr(implicit_conic, "regular_response", lambda *_: None)
                found.append(ImplicitKKT(rho).vjp(solution, cotangent, TIGHT))
        (at_once, info), (singly, expected) = found
        assert info.used == expected.used, case
        assert difference(at_once, singly) < 1e-9, case


def test_sparse_and_dense_systems_agree() -> None:
    # 300 variables, 200 rows, one in a hundred entries: past the dense limit, solved by a sparse factorisation.
    case = planted("sparse", Cones(zero=100, nonnegative=100), 300, seed=33, density=0.01, batched=("q", "b"))
    diagonal = SparsityPattern.from_matrix(np.eye(300))
    structure = replace(case.problem.structure, quadratic=diagonal)
    values = 0.5 + torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = structure.constraint
    q = -values * case.point.x - A.rmatvec(case.problem.data.A, case.point.y)
    problem = ConicProblem(structure, case.problem.data._replace(P=values, q=q), 3)
    sparse = replace(case, problem=problem)
    cotangent = random_cotangent(sparse)
    gradient, info = ImplicitKKT().vjp(planted_solution(sparse), cotangent, TIGHT)
    assert info.counts == {"implicit": 3}
    for element in range(3):
        active = np.r_[0:100, 100 + np.flatnonzero(case.point.y[element, 100:].numpy() > 0)]
        rows = A.to_dense(problem.data.A).numpy()[active]
        K = np.block([[np.diag(values.numpy()), rows.T], [rows, np.zeros((active.size, active.size))]])
        right = np.r_[cotangent.x[element].numpy(), cotangent.y[element].numpy()[active]]
        np.testing.assert_allclose(gradient.q[element].numpy(), -np.linalg.solve(K, right)[:300], atol=1e-8)
