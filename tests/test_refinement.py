"""Newton's method from solvers' answers, against planted solutions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lpgd import DAQP, ECOS, OSQP, PIQP, SCS, Clarabel, HiGHS, InteriorPoint, Moreau, ProxQP
from lpgd.arrays import elements_where
from lpgd.cones.product import Cones
from lpgd.cones.projections import distance
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern
from lpgd.solvers import ConicSolver
from lpgd.solvers.kkt.points import Points
from lpgd.solvers.kkt.refinement import optimality_residual, refine
from tests.problem_table import CASES, REGULAR, Case

SOLVERS = [
    SCS(tolerance=1e-4), Clarabel(), ECOS(), DAQP(), HiGHS(), PIQP(), OSQP(tolerance=1e-4), ProxQP(), InteriorPoint(),
    Moreau(),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: solver.name)
@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_every_solvers_answer_ends_at_rounding(case: Case, solver: ConicSolver) -> None:
    if solver.unsupported(case.problem.structure):
        return
    problem, solution = case.problem, solver.solve(case.problem)
    refined = refine(problem, solution.point, solution.slack, torch.arange(problem.batch_size))
    assert refined.after.max() <= 1e-12
    assert torch.all(refined.after <= refined.before)
    torch.testing.assert_close(refined.point.x, case.point.x, atol=1e-11, rtol=0)
    torch.testing.assert_close(refined.point.y, case.point.y, atol=1e-10, rtol=0)
    torch.testing.assert_close(refined.point.z, case.point.z, atol=1e-10, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_refined_points_are_complementary(case: Case) -> None:
    problem, cones = case.problem, case.problem.structure.cones
    solution = SCS(tolerance=1e-4).solve(problem)
    point, slack, _, after, *_ = refine(problem, solution.point, solution.slack, torch.arange(problem.batch_size))
    lower, upper = problem.full_bounds()
    assert after.max() <= 1e-12
    assert distance(cones, slack.numpy()).max() <= 1e-14
    assert distance(cones, point.y.numpy(), dual=True).max() <= 1e-14
    assert (point.y * slack).sum(-1).abs().max() <= 1e-13
    assert torch.all((point.x >= lower) & (point.x <= upper))
    assert torch.all((point.z <= 0) | (point.x == upper))
    assert torch.all((point.z >= 0) | (point.x == lower))
    # Against the conditions themselves: F knows nothing that they do not.
    torch.testing.assert_close(problem.slack(point.x), slack, atol=2e-12, rtol=0)


def test_only_the_asked_for_elements_are_refined_in_their_order() -> None:
    case = next(case for case in CASES if case.name == "every cone")
    solution = SCS(tolerance=1e-4).solve(case.problem)
    solution.x[1] = torch.nan
    refined = refine(case.problem, solution.point, solution.slack, torch.tensor([2, 1, 0]))
    assert refined.point.x.shape[0] == 3
    torch.testing.assert_close(refined.point.x[[0, 2]], case.point.x[[2, 0]], atol=1e-11, rtol=0)
    assert refined.point.x[1].isnan().all()
    assert refined.taken[1] == 0
    assert refine(case.problem, solution.point, solution.slack, torch.arange(0)).taken.shape == (0,)
    assert optimality_residual(case.problem, solution.point, solution.slack).isnan().tolist() == [False, True, False]


def ellipsoid(copies: int, scale: float = 3.0) -> ConicProblem:
    """minimise ½|x - p|² over |M x| ≤ 1, stated ``copies`` times, multiplied by powers of ``scale``."""
    M, p = np.array([[1.0, 0.3], [0.0, 2.0]]), np.array([2.0, 1.5])
    block = np.vstack([np.zeros((1, 2)), -M])
    A = np.vstack([scale**k * block for k in range(copies)])
    b = np.concatenate([scale**k * np.array([1.0, 0.0, 0.0]) for k in range(copies)])
    quadratic, constraint = SparsityPattern.dense(2, 2), SparsityPattern.dense(3 * copies, 2)
    structure = ConicStructure(quadratic, constraint, Cones(second_order=(3,) * copies))
    tensors = [torch.from_numpy(part) for part in (np.eye(2), -p, A, b)]
    nothing = torch.zeros(0, dtype=torch.float64)
    data = ConicData(
        quadratic.gather(tensors[0]), tensors[1], constraint.gather(tensors[2]), tensors[3], nothing, nothing
    )
    return ConicProblem(structure, data, 1)


@pytest.mark.parametrize("tolerance", [1e-4, 1e-8])
@pytest.mark.parametrize("copies", [2, 3])
def test_doubled_cones_converge_onto_the_manifold_of_their_multipliers(copies: int, tolerance: float) -> None:
    problem = ellipsoid(copies)
    solution = SCS(tolerance=tolerance).solve(problem)
    single = SCS(tolerance=1e-11).solve(ellipsoid(1))
    refined = refine(problem, solution.point, solution.slack, torch.arange(1), steps=4)
    assert refined.after.max() <= 1e-12
    torch.testing.assert_close(refined.point.x, single.x, atol=1e-8, rtol=0)


def test_a_point_at_the_solution_is_left_alone() -> None:
    case = next(case for case in CASES if case.name == "lp")
    point = ConicPoint(*(part.clone() for part in case.point))
    refined = refine(case.problem, point, case.problem.slack(point.x).clamp(min=0), torch.arange(3))
    assert refined.before.max() < 1e-13
    torch.testing.assert_close(tuple(refined.point), tuple(case.point), atol=1e-13, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.problem.structure.cones.is_polyhedral], ids=repr)
def test_what_is_said_to_be_singular_is_singular(case: Case) -> None:
    """Random active sets of every program: a system that the count of its unknowns calls singular has no full rank."""
    problem, generator = case.problem, np.random.default_rng(0)
    structure, size = problem.structure, problem.batch_size
    points = Points(problem)
    lower, upper = problem.full_bounds()
    quadratic = problem.structure.quadratic.to_dense(problem.symmetric_P).expand(size, structure.n, structure.n)
    constraint = structure.constraint.to_dense(problem.data.A).expand(size, structure.m, structure.n)
    for _ in range(5):
        xi = torch.from_numpy(10.0 ** generator.uniform(-1, 2) * generator.standard_normal((size, structure.n)))
        v = torch.from_numpy(generator.standard_normal((size, structure.m)) - generator.uniform(-1, 1))
        for element in elements_where(points.plainly_singular(xi, v)):
            free = (xi <= upper)[element] & (xi >= lower)[element] & (lower < upper)[element]
            active = v[element] >= 0
            active[: structure.cones.zero] = True
            B = constraint[element][active][:, free]
            P = quadratic[element][free][:, free]
            used = (P != 0).any(0) | (B != 0).any(0)  # others have no column
            K = np.block(
                [[P[used][:, used].numpy(), B[:, used].mT.numpy()], [B[:, used].numpy(), np.zeros((len(B),) * 2)]]
            )
            assert np.linalg.matrix_rank(K) < len(K)


def test_a_point_inside_a_face_is_said_to_be_singular() -> None:
    """Two free variables in one row cannot both be determined; a third one in no row is left out."""
    structure = ConicStructure(
        SparsityPattern.empty(3, 3), SparsityPattern.dense(1, 3), Cones(zero=1), np.arange(3), np.arange(3)
    )
    data = ConicData(
        torch.zeros(0).double(),
        *(torch.tensor(values).double() for values in ([[0, 0, 0]], [1, 1, 0], [1], [0, 0, 0], [1, 1, 1])),
    )
    points = Points(ConicProblem(structure, data, 1))
    for xi, singular in (([0.5, 0.5, 0.5], True), ([1.5, 0.5, 0.5], False)):
        assert bool(points.plainly_singular(torch.tensor([xi]).double(), torch.zeros(1, 1).double())) is singular
