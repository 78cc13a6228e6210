"""The batched interior-point solver: problem classes, failures one by one, tilts, sharing, precision, certificates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import torch

from lpgd import LPGD, Clarabel, Cones, ImplicitKKT, InteriorPoint, Status
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern
from tests.problem_table import CASES, planted

TIGHT = InteriorPoint(tolerance=1e-10)
CONES = Cones(zero=4, nonnegative=14)


def program(
    q: object,
    A: object = None,
    b: object = None,
    P: object = None,
    *,
    equalities: int = 0,
    lower: object = None,
    upper: object = None,
) -> ConicProblem:
    """``min ½xᵀPx + qᵀx`` s.t. ``A x = b`` on the first rows, ``A x <= b`` on the others, ``lower <= x <= upper``."""
    costs = torch.atleast_2d(torch.as_tensor(q, dtype=torch.float64))
    size, n = costs.shape

    def tensor(value: object, *shape: int) -> torch.Tensor:
        return torch.zeros(shape).double() if value is None else torch.as_tensor(value, dtype=torch.float64)

    matrix, rows = tensor(A, 0, n), tensor(b, 0)
    m = matrix.shape[-2]
    quadratic = SparsityPattern.empty(n, n) if P is None else SparsityPattern.dense(n, n)
    constraint = SparsityPattern.dense(m, n)
    none = np.zeros(0, dtype=np.int64)
    structure = ConicStructure(
        quadratic,
        constraint,
        Cones(zero=equalities, nonnegative=m - equalities),
        none if lower is None else np.arange(n),
        none if upper is None else np.arange(n),
    )
    data = ConicData(
        quadratic.gather(tensor(P, n, n)), costs, constraint.gather(matrix), rows, tensor(lower, 0), tensor(upper, 0)
    )
    return ConicProblem(structure, data, size)


def linprog(problem: ConicProblem, element: int) -> scipy.optimize.OptimizeResult:
    """The same linear program by HiGHS."""
    data, structure = problem.data, problem.structure
    A = structure.constraint.to_dense(data.A if data.A.ndim == 1 else data.A[element]).numpy()
    b = (data.b if data.b.ndim == 1 else data.b[element]).numpy()
    low, high = (bound[element].numpy() for bound in problem.full_bounds())
    e = structure.cones.zero
    limits = list(zip(low, high, strict=True))
    return scipy.optimize.linprog(data.q[element].numpy(), A[e:], b[e:], A[:e], b[:e], limits, method="highs")


def random_lp(seed: int, size: int, *, batched: bool) -> ConicProblem:
    """Feasible and bounded, with some bounds infinite."""
    rng = np.random.default_rng(seed)
    n, e, i = 12, 3, 8
    A = rng.normal(size=(size, e + i, n) if batched else (e + i, n))
    x = rng.normal(size=(size, n))
    low = np.where(rng.random((size, n)) < 0.6, x - rng.random((size, n)), -np.inf)
    high = np.where(rng.random((size, n)) < 0.6, x + rng.random((size, n)), np.inf)
    y = np.concatenate([rng.normal(size=(size, e)), rng.random((size, i))], 1)
    z = np.where(np.isfinite(high), rng.random((size, n)), 0.0) - np.where(np.isfinite(low), rng.random((size, n)), 0)
    slack = np.concatenate([np.zeros((size, e)), rng.random((size, i))], 1)
    product = np.einsum("bmn,bn->bm" if batched else "mn,bn->bm", A, x)
    q = -np.einsum("bmn,bm->bn" if batched else "mn,bm->bn", A, y) - z
    return program(q, A, product + slack, equalities=e, lower=low, upper=high)


@pytest.mark.parametrize("batched", [False, True], ids=["shared", "per element"])
def test_linear_programs_agree_with_highs(batched: bool) -> None:
    problem = random_lp(0, 20, batched=batched)
    solution = TIGHT.solve(problem)
    assert set(solution.statuses) == {Status.SOLVED}
    assert solution.residuals.worst.max() < 1e-8
    for element in range(20):
        expected = linprog(problem, element)
        assert float(solution.objective[element]) == pytest.approx(expected.fun, rel=1e-8, abs=1e-8)
        np.testing.assert_allclose(solution.x[element].numpy(), expected.x, atol=1e-6)
        np.testing.assert_allclose(
            solution.y[element].numpy(), -np.r_[expected.eqlin.marginals, expected.ineqlin.marginals], atol=1e-6
        )
        np.testing.assert_allclose(
            solution.z[element].numpy(), -(expected.lower.marginals + expected.upper.marginals), atol=1e-6
        )


def test_quadratic_programs_agree_with_clarabel() -> None:
    for seed, rank in enumerate((None, 5, 1)):
        case = planted(
            "qp", CONES, 12, seed=200 + seed, rank=rank, lower=6, upper=6, active_bounds=2,
            batched=("P", "A", "q", "b", "lower", "upper"), inactive_rows=6,
        )  # fmt: skip
        ours, theirs = TIGHT.solve(case.problem), Clarabel(tolerance=1e-10).solve(case.problem)
        assert set(ours.statuses) == {Status.SOLVED}
        torch.testing.assert_close(ours.objective, theirs.objective, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(ours.x, theirs.x, atol=1e-5, rtol=1e-5)


def test_closed_forms() -> None:
    # No rows, no bounds; no rows, a box; equalities alone; a column of zeros that only a bound holds.
    P, q = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -3.0], [0.0, 2.0]]).double()
    torch.testing.assert_close(TIGHT.solve(program(q, P=P)).x, -torch.linalg.solve(P, q.T).T, atol=1e-9, rtol=0)
    box = TIGHT.solve(program([[1.0, -2.0, 0.5]], lower=[0.0, 0.0, -1.0], upper=[1.0, 3.0, torch.inf]))
    torch.testing.assert_close(box.x, torch.tensor([[0.0, 3.0, -1.0]]).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(box.z, torch.tensor([[-1.0, 2.0, -0.5]]).double(), atol=1e-8, rtol=0)
    line = TIGHT.solve(program(q, [[1.0, 1.0]], [1.0], P=P, equalities=1))
    K = torch.tensor([[2.0, 0.5, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 0.0]]).double()
    expected = torch.linalg.solve(K, torch.cat([-q, torch.ones(2, 1).double()], 1).T).T
    torch.testing.assert_close(torch.cat([line.x, line.y], 1), expected, atol=1e-9, rtol=0)
    unused = TIGHT.solve(program([[1.0, 2.0]], [[1.0, 0.0]], [4.0], equalities=1, lower=[0.0, -5.0]))
    torch.testing.assert_close(unused.x, torch.tensor([[4.0, -5.0]]).double(), atol=1e-8, rtol=0)


def test_free_variables_without_curvature() -> None:
    # min t s.t. |a_i x - c_i| <= t: x and t are free; the optimum of a Chebyshev line fit, by HiGHS.
    rng = np.random.default_rng(3)
    a, c = rng.normal(size=(9, 2)), rng.normal(size=(4, 9))
    A = np.block([[a, -np.ones((9, 1))], [-a, -np.ones((9, 1))]])
    problem = program(np.tile([0.0, 0.0, 1.0], (4, 1)), A, np.concatenate([c, -c], 1))
    solution = TIGHT.solve(problem)
    for element in range(4):
        expected = linprog(problem, element)
        np.testing.assert_allclose(solution.x[element].numpy(), expected.x, atol=1e-7)


def test_fixed_variables_are_exact_and_their_multipliers_too() -> None:
    # x_0 is fixed in one element only; P couples it to x_1, whose minimum moves.
    P = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double()
    low, high = torch.tensor([[3.0, -9.0], [-9.0, -9.0]]).double(), torch.tensor([[3.0, 9.0], [9.0, 9.0]]).double()
    solution = TIGHT.solve(program([[0.0, 1.0]] * 2, [[0.0, 1.0]], [8.0], P=P, lower=low, upper=high))
    assert set(solution.statuses) == {Status.SOLVED}
    torch.testing.assert_close(solution.x[0], torch.tensor([3.0, -2.0]).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(solution.z[0], torch.tensor([-4.0, 0.0]).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(solution.x[1], torch.tensor([1 / 3, -2 / 3]).double(), atol=1e-7, rtol=0)


def test_redundant_equalities_and_degenerate_vertices() -> None:
    for name in ("redundant equalities", "degenerate lp"):
        case = next(case for case in CASES if case.name == name)
        solution = TIGHT.solve(case.problem)
        assert set(solution.statuses) == {Status.SOLVED}
        torch.testing.assert_close(solution.x, case.point.x, atol=1e-7, rtol=0)
    # An assignment problem: one equality in six is redundant, and its vertices are degenerate.
    rng = np.random.default_rng(5)
    A = np.concatenate([np.kron(np.eye(3), np.ones(3)), np.kron(np.ones(3), np.eye(3))])
    costs = rng.normal(size=(6, 3, 3))
    solution = TIGHT.solve(program(costs.reshape(6, 9), A, np.ones(6), equalities=6, lower=np.zeros(9)))
    for element in range(6):
        rows, columns = scipy.optimize.linear_sum_assignment(costs[element])
        expected = np.zeros((3, 3))
        expected[rows, columns] = 1.0
        np.testing.assert_allclose(solution.x[element].numpy(), expected.ravel(), atol=1e-7)


def test_every_element_gets_its_own_status_and_the_others_stay_exact() -> None:
    # min x1 + c x2 s.t. x1 + x2 = b, x >= 0, x1 <= u: infeasible, crossed bounds, unbounded, NaN, three solved.
    q = [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [-1.0, -1.0], [1.0, torch.nan], [1.0, 2.0], [3.0, 2.0]]
    A = torch.ones(7, 1, 2).double()
    A[3, 0, 1] = -1.0
    low = torch.zeros(7, 2).double()
    high = torch.tensor([[5.0, torch.inf]] * 7).double()
    low[2, 0], high[3, 0] = 6.0, torch.inf
    b = torch.tensor([[1.0], [-1.0], [7.0], [0.0], [1.0], [2.0], [2.0]]).double()
    problem = program(q, A, b, equalities=1, lower=low, upper=high)
    solution = InteriorPoint().solve(problem)
    S = Status
    assert solution.statuses == (
        S.SOLVED, S.INFEASIBLE, S.INFEASIBLE, S.UNBOUNDED, S.INVALID_DATA, S.SOLVED, S.SOLVED
    )  # fmt: skip
    assert solution.x[solution.failed].isnan().all()
    expected = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 2.0]]).double()
    torch.testing.assert_close(solution.x[[0, 5, 6]], expected, atol=1e-7, rtol=0)
    assert solution.residuals.worst[[0, 5, 6]].max() < 1e-8


@pytest.mark.parametrize("curved", [False, True], ids=["lp", "qp"])
def test_infeasible_and_unbounded_problems_are_told_apart(curved: bool) -> None:
    # Against HiGHS for linear programs, and by construction: a curved cost has no descending ray along its range.
    rng = np.random.default_rng(11)
    n, e, i, size = 6, 1, 4, 40
    A, b, q = rng.integers(-2, 3, (size, e + i, n)), rng.integers(-2, 3, (size, e + i)), rng.integers(-2, 3, (size, n))
    low = np.where(rng.random((size, n)) < 0.5, 0.0, -np.inf)
    linear = program(q, A, b, equalities=e, lower=low)
    P = np.diag([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) if curved else None
    solution = InteriorPoint().solve(program(q, A, b, P, equalities=e, lower=low))
    seen = set()
    for element, status in enumerate(solution.statuses):
        if curved:  # rays d with P d = 0: fix the first three variables of the recession cone
            limits = [(0.0, 0.0)] * 3 + [(0.0 if np.isfinite(v) else -1.0, 1.0) for v in low[element, 3:]]
            zero = np.zeros(e + i)
            ray = scipy.optimize.linprog(q[element], A[element, e:], zero[e:], A[element, :e], zero[:e], limits)
            feasible = linprog(replace(linear, data=linear.data._replace(q=0 * linear.data.q)), element).status == 0
            truth = {Status.SOLVED}
            if not feasible:
                truth = {Status.INFEASIBLE} | ({Status.UNBOUNDED} if ray.fun < -1e-9 else set())
            elif ray.fun < -1e-9:
                truth = {Status.UNBOUNDED}
        else:
            code = linprog(linear, element).status
            truth = {0: {Status.SOLVED}, 2: {Status.INFEASIBLE, Status.UNBOUNDED}, 3: {Status.UNBOUNDED}}.get(code)
        if truth is not None:
            assert status in truth, element
            seen.add(status)
    assert seen == {Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED}


def sudoku_like(n: int, m: int, size: int) -> ConicProblem:
    """``min -<e, x>`` s.t. ``A x = A z0, 0 <= x <= 1`` with A uniform: the benchmark's box LP, smaller."""
    generator = torch.Generator().manual_seed(0)
    A = torch.rand(m, n, generator=generator, dtype=torch.float64)
    z0 = torch.rand(n, generator=generator, dtype=torch.float64)
    given = (torch.rand(size, n, generator=generator) < 0.2).double()
    return program(-given, A, A @ z0, equalities=m, lower=torch.zeros(n), upper=torch.ones(n))


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_large_tilts(rho: float) -> None:
    problem = sudoku_like(24, 10, 20)
    solution = TIGHT.solve(problem)
    g = torch.randn(20, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cotangent = ConicPoint(g, torch.zeros_like(solution.y), torch.zeros_like(solution.z))
    steps = torch.cat([torch.full((20,), 1e4), torch.full((20,), -1e4)]).double()
    perturbed = problem.augment(rho, solution.x).tilt(steps, cotangent)
    ours, theirs = TIGHT.solve(perturbed), Clarabel(tolerance=1e-10).solve(perturbed)
    assert set(ours.statuses) == {Status.SOLVED}
    torch.testing.assert_close(ours.objective, theirs.objective, rtol=1e-8, atol=0)
    torch.testing.assert_close(ours.x, theirs.x, rtol=0, atol=1e-5)


def test_shared_and_repeated_matrices_give_the_same_as_one_for_each_element() -> None:
    # At 40 elements the shared matrix takes the product with its row products; two copies of 20 take neither.
    problem = sudoku_like(24, 10, 40)
    shared = TIGHT.solve(problem)
    copies = replace(problem, data=problem.data._replace(A=problem.data.A.repeat(20, 1)))
    torch.testing.assert_close(TIGHT.solve(copies).x, shared.x, atol=1e-7, rtol=0)
    alone = TIGHT.solve(problem.select(torch.tensor([17])))
    torch.testing.assert_close(alone.x[0], shared.x[17], atol=1e-7, rtol=0)


def test_an_optimal_face_gives_a_point_inside_it_and_its_centre_where_the_face_is_symmetric() -> None:
    # The face x5 = 2 of min -x5 over the rest's simplex; then bounds 1, 2, 3, 4 that break its symmetry.
    q, A, b = [[0.0, 0.0, 0.0, 0.0, -1.0]], [[1.0, 1.0, 1.0, 1.0, 1.0]], [3.0]
    symmetric = TIGHT.solve(program(q, A, b, equalities=1, lower=np.zeros(5), upper=[2.0] * 5))
    np.testing.assert_allclose(symmetric.x[0].numpy(), [0.25, 0.25, 0.25, 0.25, 2.0], atol=1e-8)
    skewed = TIGHT.solve(program(q, A, b, equalities=1, lower=np.zeros(5), upper=[1.0, 2.0, 3.0, 4.0, 2.0]))
    assert skewed.x[0, :4].min() > 0.01  # a vertex or an edge of the face has zeros
    assert float(skewed.x[0, 4]) == pytest.approx(2.0, abs=1e-8)


@pytest.mark.parametrize("scale", [1e-5, 1e6])
def test_units_of_the_data_do_not_matter(scale: float) -> None:
    problem = random_lp(1, 6, batched=True)
    reference = TIGHT.solve(problem)
    costs = TIGHT.solve(replace(problem, data=problem.data._replace(q=scale * problem.data.q)))
    torch.testing.assert_close(costs.x, reference.x, atol=1e-6, rtol=0)
    torch.testing.assert_close(costs.y / scale, reference.y, atol=1e-6, rtol=1e-6)
    rows = TIGHT.solve(replace(problem, data=problem.data._replace(A=scale * problem.data.A, b=scale * problem.data.b)))
    torch.testing.assert_close(rows.x, reference.x, atol=1e-6, rtol=0)
    torch.testing.assert_close(rows.y * scale, reference.y, atol=1e-6, rtol=1e-6)


def test_single_precision() -> None:
    solver = InteriorPoint(precision="float32")
    problem = random_lp(2, 10, batched=True)
    solution, reference = solver.solve(problem), TIGHT.solve(problem)
    assert set(solution.statuses) == {Status.SOLVED}
    assert solution.x.dtype == torch.float64
    assert solver.solution_error(problem) == 1e-4
    torch.testing.assert_close(solution.objective, reference.objective, atol=1e-2, rtol=1e-2)
    assert solution.residuals.worst.max() < 1e-3


def test_options() -> None:
    with pytest.raises(ValueError, match="precision is 'float16'; it must be one of float64, float32"):
        InteriorPoint(precision="float16")
    socp = next(case for case in CASES if case.name == "socp")
    with pytest.raises(ValueError, match="INTERIOR has no second-order cone"):
        InteriorPoint().solve(socp.problem)
    assert InteriorPoint().with_options({"max_iters": 7}).max_iterations == 7


def test_verbose_prints_each_iteration(capsys: pytest.CaptureFixture[str]) -> None:
    solution = InteriorPoint(verbose=True).solve(random_lp(3, 2, batched=False))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == solution.iterations.max() + 1
    assert "2 left" in lines[0]


def test_gradients_through_it_equal_each_other_at_regular_points() -> None:
    case = planted("qp", CONES, 20, seed=77, lower=10, upper=10, active_bounds=3, batched=("P", "A", "q", "b"))
    generator = torch.Generator().manual_seed(4)
    g = torch.randn(case.point.x.shape, generator=generator, dtype=torch.float64)
    cotangent = ConicPoint(g, torch.zeros_like(case.point.y), torch.zeros_like(case.point.z))
    solution = TIGHT.solve(case.problem)
    exact, info = ImplicitKKT().vjp(solution, cotangent, TIGHT)
    assert info.counts == {"implicit": 3}
    limit, _ = LPGD(1e-4).vjp(solution, cotangent, TIGHT)
    for ours, theirs in zip(limit, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [4, 20], ids=["few", "row products"])
@pytest.mark.parametrize("curvature", [0.0, 1e-3, 10.0])
def test_rough_steps_in_single_precision_leave_no_trace(size: int, curvature: float) -> None:
    """From a hundred rows on the first iterations are factorised in single precision; data of very different sizes."""
    rng = np.random.default_rng(12)
    n, m = 180, 110
    scale = 10.0 ** rng.uniform(-2, 2, n)
    A = rng.uniform(size=(m, n)) * scale
    x = rng.uniform(0.0, 1.0, size=(size, n)) / scale
    x[:, ::3] = 0.0
    costs = rng.normal(size=(size, n)) * scale
    upper = np.tile(1.0 / scale, (size, 1))
    P = None if curvature == 0.0 else curvature * np.diag(scale**2)
    problem = program(costs, A, x @ A.T, P, equalities=m, lower=np.zeros((size, n)), upper=upper)
    solver = InteriorPoint(rescue=False)
    solution = solver.solve(problem)
    assert set(solution.statuses) == {Status.SOLVED}
    reference = Clarabel(tolerance=1e-10).solve(problem)
    torch.testing.assert_close(solution.objective, reference.objective, rtol=1e-6, atol=1e-6)
    if P is not None:
        again = solver.solve(problem, solution.states)
        assert np.median(again.iterations) <= 2
        torch.testing.assert_close(again.objective, reference.objective, rtol=1e-6, atol=1e-6)


def test_single_precision_is_given_up_where_it_makes_no_progress() -> None:
    """Slacks of 1e2 hide what is left of the rows from a test that is relative to them: 20 more iterations went by."""
    generator = np.random.default_rng(1)
    A, costs = generator.random((120, 200)), -generator.random(200)
    problem = program(costs[None], A, np.full(120, 50.0), lower=np.zeros(200), upper=np.ones(200))
    solution = InteriorPoint().solve(problem)
    assert solution.statuses[0] is Status.SOLVED
    assert int(solution.iterations[0]) <= 25  # 38 before; 13 on average over such programs
    torch.testing.assert_close(costs @ solution.x[0].numpy(), linprog(problem, 0).fun, rtol=1e-9, atol=0.0)
