"""Least squares on the unit sphere: global solutions, descent, the hard case, the derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes.base import Tilt
from lpgd.nodes.sphere.descent import descend, starting_points
from lpgd.nodes.sphere.node import SphereLeastSquares, differentiate_sphere, multiplier, normal_equations
from lpgd.nodes.sphere.secular import solve_secular
from lpgd.status import Status
from tests.node_reference import ROUNDING
from tests.test_least_squares import differentiable

SHAPES = [(2, 2), (64, 32), (7, 3), (3, 5), (1, 4), (5, 1)]


def problem(m: int, n: int, batch: int = 20, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(batch, m, n, generator=generator, dtype=torch.float64)
    return A, scale * torch.randn(batch, m, generator=generator, dtype=torch.float64)


def objective(A: Tensor, b: Tensor, u: Tensor) -> Tensor:
    return SphereLeastSquares().objective(u, A, b)


def kkt_residual(A: Tensor, b: Tensor, u: Tensor) -> Tensor:
    gram, vector = normal_equations(A, b)
    slope = torch.einsum("bij,bj->bi", gram, u) - vector
    mu = (slope * u).sum(-1, keepdim=True)
    return (slope - mu * u).norm(dim=-1) / (vector.norm(dim=-1) + gram.norm(dim=(-2, -1)))


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_secular_solution_has_the_certificate_of_a_global_minimum(m, n, scale):
    """(AᵀA - μI)u = Aᵀb with μ <= λ_min, |u| = 1: necessary and sufficient."""
    A, b = problem(m, n, 50, scale=scale)
    gram, vector = normal_equations(A, b)
    found = solve_secular(gram, vector)
    assert found.converged.all()
    assert (found.u.norm(dim=-1) - 1).abs().max() < 1e-14
    assert kkt_residual(A, b, found.u).max() < 1e-13
    values = torch.linalg.eigvalsh(gram)
    assert torch.all(multiplier(gram, vector, found.u) <= values[:, 0] + 1e-12 * (values[:, -1] + vector.norm(dim=-1)))


def test_two_dimensions_by_enumeration():
    """The circle on a fine grid has no better point, in 300 random problems with one or two local minima."""
    A, b = problem(2, 2, 300, seed=1)
    u = SphereLeastSquares().solve((A, b), None).y
    angles = torch.linspace(0, 2 * math.pi, 5001, dtype=torch.float64)
    circle = torch.stack([angles.cos(), angles.sin()])
    values = 0.5 * (A @ circle - b[..., None]).square().sum(1)
    gap = values.min(1).values - objective(A, b, u)
    assert gap.min() > -1e-12
    assert gap.max() < 1e-4


@pytest.mark.parametrize(("m", "n"), [(2, 2), (64, 32)])
def test_descent_finds_the_global_minimum_of_nearly_all_random_problems(m, n):
    A, b = problem(m, n, 1000, seed=2)
    best = objective(A, b, SphereLeastSquares().solve((A, b), None).y)
    answer = SphereLeastSquares(solver="descent").solve((A, b), None)
    gap = objective(A, b, answer.y) - best
    assert gap.min() > -1e-10
    assert (gap <= 1e-6 * (1 + best)).double().mean() >= 0.995
    assert answer.iterations.max() <= 100


@pytest.mark.parametrize("step", [1.0, None])
@pytest.mark.parametrize("backtracking", [False, True])
def test_every_descent_ends_in_stationary_points(step, backtracking):
    """What is said to be converged has a tangential gradient of 1e-7; with backtracking most is, and f decreases."""
    A, b = problem(20, 4, 100, seed=3)
    A = A / 4  # so that a step of 1 is about the inverse of the curvature
    node = SphereLeastSquares(solver="descent", step=step, backtracking=backtracking)
    answer = node.solve((A, b), None)
    solved = torch.tensor([status is Status.SOLVED for status in answer.statuses])
    assert kkt_residual(A, b, answer.y)[solved].max() < 2e-7
    assert (answer.y.norm(dim=-1) - 1).abs().max() < 1e-14
    if backtracking:
        assert solved.double().mean() > 0.9
        assert torch.all(objective(A, b, answer.y) <= objective(A, b, starting_points(A, b)) + 1e-12)


def test_the_hard_case_has_two_solutions_and_takes_the_side_of_the_start():
    """A = diag(1, 2), b = (0, 1): u = (±√(1 - 4/9), 2/3) by hand, as μ = λ_min = 1 and 3 u_2 = 2."""
    A = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)).expand(3, 2, 2).clone()
    b = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(3, 2).clone()
    start = torch.tensor([[1.0, 0.2], [-1.0, 0.2], [0.0, 1.0]], dtype=torch.float64)
    u = SphereLeastSquares().solve((A, b), start).y
    first = math.sqrt(5) / 3
    expected = torch.tensor([[first, 2 / 3], [-first, 2 / 3], [first, 2 / 3]], dtype=torch.float64)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-14)
    assert torch.equal(SphereLeastSquares().solve((A, b), None).y[0], u[0])


def test_the_derivative_in_the_hard_case_is_that_of_the_branch():
    """One-dimensional eigenspace: the bordered system is regular, and b_1 = ±h follows the two branches."""
    A = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))[None]
    b = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    node = SphereLeastSquares()
    answer = node.solve((A, b), None)
    cotangent = torch.tensor([[0.3, -1.1]], dtype=torch.float64)
    found = node.vjp((A, b), answer.y, cotangent, answer.aux)[1][0]
    for index in range(2):
        change = torch.zeros_like(b)
        change[0, index] = 1e-6
        # The branch near the solution is the global minimum for changes that favour its side.
        if index == 0:
            difference = (node.solve((A, b + change), answer.y).y - answer.y) / 1e-6
            assert abs((cotangent * difference).sum() - found[index]) < 1e-5
        else:
            difference = (node.solve((A, b + change), answer.y).y - node.solve((A, b - change), answer.y).y) / 2e-6
            assert abs((cotangent * difference).sum() - found[index]) < 1e-8


@pytest.mark.parametrize("tiny", [1e-9, 1e-15, 1e-30, 1e-200])
def test_nearly_hard_cases(tiny):
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))[None]
    b = torch.tensor([[-tiny, 1.0, 0.5]], dtype=torch.float64)
    u = SphereLeastSquares().solve((A, b), None).y
    rest = 4 / 9 + (1.5 / 8) ** 2
    expected = torch.tensor([[math.sqrt(1 - rest), 2 / 3, 1.5 / 8]], dtype=torch.float64)
    torch.testing.assert_close(u.abs(), expected, rtol=0, atol=5e-9)
    if tiny > 1e-14:
        assert u[0, 0] < 0


def test_a_continuum_of_solutions_gets_a_finite_gradient_of_minimum_norm():
    """A = I, b = 0: all points are solutions, nothing singles one out; a start is kept."""
    A, b = torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64)
    start = torch.tensor([[0.6, 0.0, 0.8]], dtype=torch.float64)
    node = SphereLeastSquares()
    answer = node.solve((A, b), start)
    torch.testing.assert_close(answer.y, start, rtol=0, atol=1e-14)
    assert answer.aux[2].tolist() == [True]
    with pytest.warns(lpgd.LpgdWarning, match="1 of 1 elements are each one of a continuum"):
        gradients = node.vjp((A, b), answer.y, torch.ones(1, 3, dtype=torch.float64), answer.aux)
    assert all(part.abs().max() < 1e-12 for part in gradients)


@pytest.mark.parametrize("unit", [1.0, 2.0**-30, 2.0**25])
@pytest.mark.parametrize(("m", "n"), [(4, 6), (2, 5), (1, 3)])
def test_short_solutions_of_wide_systems_leave_their_free_directions_out_in_any_unit(m, n, unit):
    """Where |A⁺b| < 1, all points A⁺b + z of the sphere with A z = 0 are solutions.

    With T a basis of what is orthogonal to y and to its free directions, the response is T (TᵀAᵀA T)⁻¹ Tᵀv.
    """
    A, b = problem(m, n, 12, seed=3, scale=0.1)
    v = problem(n, 1, 12, seed=9)[0][..., 0]
    shortest = (torch.linalg.pinv(A) @ b[..., None])[..., 0]
    A, b, v = (tensor[shortest.norm(dim=-1) < 0.9] for tensor in (A, b, v))
    assert len(A) > 5
    leaves = [(unit * tensor).requires_grad_() for tensor in (A, b)]
    y = lpgd.NodeLayer(SphereLeastSquares())(*leaves)
    assert (A @ y.detach()[..., None] - b[..., None]).abs().max() < 1e-6
    with pytest.warns(lpgd.LpgdWarning, match=f"{len(A)} of {len(A)} elements are each one of a continuum"):
        gradients = torch.autograd.grad((y * v).sum(), leaves)
    for matrix, right, point, cotangent, for_A, for_b in zip(A, b, y.detach(), v, *gradients, strict=True):
        null = torch.linalg.svd(matrix).Vh[m:]
        free = torch.linalg.svd(torch.cat([null @ point[:, None]], 0).mT).Vh[1:] @ null
        basis = torch.linalg.svd(torch.cat([free, point[None]])).Vh[len(free) + 1 :].mT
        reduced = matrix @ basis
        s = basis @ torch.linalg.solve(reduced.mT @ reduced, basis.mT @ cotangent)
        expected = torch.outer(right - matrix @ point, s) - torch.outer(matrix @ s, point), matrix @ s
        for own, reference in zip((for_A, for_b), expected, strict=True):
            torch.testing.assert_close(unit * own, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "n"), [(6, 3), (2, 2), (5, 1)])
def test_gradcheck(m, n):
    A, b = problem(m, n, 3, seed=4)
    inputs = (A.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(lambda *parts: differentiable(SphereLeastSquares(), *parts), inputs, atol=1e-6)


@pytest.mark.parametrize("solver", ["secular", "descent"])
@pytest.mark.parametrize(("m", "n", "scale"), [(8, 5, 1.0), (30, 12, 1.0), (3, 8, 9.0)])
def test_the_structured_gradient_is_that_of_the_whole_jacobian(solver, m, n, scale):
    """Implicit differentiation with every matrix written out: Dy = -[I 0] [[H, yᵀ], [y, 0]]⁻¹ [B; 0] for A and b."""
    A, b = problem(m, n, 6, seed=5, scale=scale)
    node = SphereLeastSquares(solver=solver, max_iterations=2000)
    answer = node.solve((A, b), None)
    cotangent = torch.randn(6, n, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    for_A, for_b = node.vjp((A, b), answer.y, cotangent, answer.aux)
    for index in range(6):
        own, y, right = A[index], answer.y[index], b[index]
        mu = y @ (own.T @ (own @ y - right))
        system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        system[:n, :n] = own.T @ own - mu * torch.eye(n, dtype=torch.float64)
        system[:n, n] = system[n, :n] = y
        slopes = torch.func.jacrev(lambda A, b, y=y: A.T @ (A @ y - b), (0, 1))(own, right)
        for mixed, found in zip(slopes, (for_A[index], for_b[index]), strict=True):
            padded = torch.cat([mixed.reshape(n, -1), torch.zeros(1, found.numel(), dtype=torch.float64)])
            jacobian = -torch.linalg.solve(system, padded)[:n]
            torch.testing.assert_close(found.flatten(), cotangent[index] @ jacobian, rtol=1e-10, atol=1e-10)


def test_the_gradient_at_a_local_minimum_that_is_not_global():
    """On the circle, where H is indefinite and the curvature along the circle positive: as finite differences."""
    A = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))[None]
    b = torch.tensor([[0.02, 0.3]], dtype=torch.float64)
    node = SphereLeastSquares(solver="descent", tolerance=1e-14, max_iterations=2000)
    start = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
    answer = node.solve((A, b), start)
    gram, vector = normal_equations(A, b)
    assert objective(A, b, answer.y) > objective(A, b, solve_secular(gram, vector).u) + 1e-3
    cotangent = torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    found = node.vjp((A, b), answer.y, cotangent, answer.aux)[1][0]
    for index in range(2):
        change = torch.zeros_like(b)
        change[0, index] = 1e-5
        ends = [node.solve((A, b + sign * change), answer.y).y for sign in (1, -1)]
        assert abs((cotangent * (ends[0] - ends[1])).sum() / 2e-5 - found[index]) < 1e-8


def test_shared_matrices_are_the_same_as_copies():
    A, b = problem(6, 4, 5, seed=7)
    shared, copies = A[:1].expand(5, 6, 4), A[:1].repeat(5, 1, 1)
    node = SphereLeastSquares()
    one, other = node.solve((shared, b), None), node.solve((copies, b), None)
    assert one.aux[0].shape[0] == 1
    torch.testing.assert_close(one.y, other.y, rtol=0, atol=1e-13)
    cotangent = torch.ones_like(one.y)
    for mine, theirs in zip(
        node.vjp((shared, b), one.y, cotangent, one.aux), node.vjp((copies, b), one.y, cotangent, None), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", ["secular", "descent"])
def test_batched_is_one_by_one(solver):
    A, b = problem(9, 4, 6, seed=8)
    node = SphereLeastSquares(solver=solver)
    y = node.solve((A, b), None).y
    for index in range(6):
        alone = node.solve((A[index : index + 1], b[index : index + 1]), None).y[0]
        torch.testing.assert_close(alone, y[index], rtol=0, atol=1e-9 if solver == "descent" else 1e-13)


@pytest.mark.parametrize(("solver", "tolerance"), [("secular", 1e-5), ("descent", 1e-2)])
def test_single_precision(solver, tolerance):
    A, b = problem(12, 4, 20, seed=9)
    node = SphereLeastSquares(solver=solver)
    y = node.solve((A.float(), b.float()), None).y
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), node.solve((A, b), None).y, rtol=0, atol=tolerance)
    gram, vector = normal_equations(A.float(), b.float())
    gradients = differentiate_sphere(A.float(), b.float(), y, torch.ones_like(y), gram, multiplier(gram, vector, y))
    exact = node.vjp((A, b), y.double(), torch.ones_like(b[:, :4]), None)
    for one, other in zip(gradients, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_tilted_and_augmented_problems_are_solved_globally():
    A, b = problem(6, 3, 10, seed=10)
    node = SphereLeastSquares()
    y = node.solve((A, b), None).y
    tilt = Tilt(0.3 * torch.ones_like(y), 0.5, y)
    moved = node.solve_tilted((A, b), tilt, y).y
    points = torch.randn(2000, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(11))
    points = points / points.norm(dim=-1, keepdim=True)

    def value(u):
        return objective(A, b, u) + (tilt.linear * u).sum(-1) + 0.25 * (u - y).square().sum(-1)

    others = torch.stack([value(point.expand_as(y)) for point in points])
    assert torch.all(value(moved) <= others.min(0).values + 1e-12)
    assert SphereLeastSquares(solver="descent").solve_tilted((A, b), tilt, y) is None


def test_descent_keeps_a_start_that_is_a_solution():
    A, b = problem(9, 4, 6, seed=12)
    y = SphereLeastSquares().solve((A, b), None).y
    answer = SphereLeastSquares(solver="descent").solve((A, b), y)
    assert answer.iterations.max() == 0
    torch.testing.assert_close(answer.y, y, rtol=0, atol=1e-15)


def test_an_element_without_convergence_says_so_alone():
    A, b = problem(64, 32, 4, seed=13)
    gram, vector = normal_equations(A, b)
    start = starting_points(A, b)
    start[0] = solve_secular(gram, vector).u[0]
    found = descend(gram, vector, start, max_iterations=3)
    assert found.converged.tolist() == [True, False, False, False]
    answer = SphereLeastSquares(solver="descent", max_iterations=3).solve((A, b), start)
    assert list(answer.statuses) == [Status.SOLVED] + 3 * [Status.ITERATION_LIMIT]


def test_nothing_moves_when_the_input_does_not():
    A, b = problem(5, 4, 6, seed=14)
    kept = A.clone(), b.clone()
    # Descent to the end of precision: on the way roundings, which depend on where memory lies, grow.
    for node in (SphereLeastSquares(), SphereLeastSquares(solver="descent", tolerance=1e-14, max_iterations=1000)):
        y = node.solve((A, b), None).y
        torch.testing.assert_close(node.solve((A, b), None).y, y, rtol=0, atol=ROUNDING)
        again = node.solve((A, b), y).y
        torch.testing.assert_close(again, y, rtol=0, atol=ROUNDING)
    assert torch.equal(A, kept[0])
    assert torch.equal(b, kept[1])


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="solver is 'newton'; it must be one of secular, descent"):
        SphereLeastSquares(solver="newton")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="step is 0"):
        SphereLeastSquares(step=0.0)
    with pytest.raises(ValueError, match="b has 3 entries; A has 4 rows"):
        SphereLeastSquares().variable_shape((4, 2), (3,))


@pytest.mark.parametrize("offset", [0.0, 1e-7])
@pytest.mark.parametrize("method", [lpgd.LPGD(), lpgd.LPGD(tau=1e-3), lpgd.LPGD(tau=1e-3, rho=0.2)])
def test_perturbed_solves_stay_on_the_branch_of_a_tied_solution(offset: float, method: lpgd.LPGD):
    # AᵀA = diag(4, 9, 1), Aᵀb = (2b₁, 3b₂, offset): μ = 1, y = (2b₁/3, 3b₂/8, ±√…), which a tilt makes jump.
    A = torch.diag(torch.tensor([2.0, 3.0, 1.0], dtype=torch.float64)).expand(4, 3, 3).contiguous().requires_grad_()
    b = torch.tensor([[0.3, 0.5, offset], [-0.2, 0.4, offset], [0.5, 0.1, offset], [0.1, -0.3, offset]])
    b = b.double().requires_grad_()
    v = problem(3, 3, batch=4, seed=3)[1]
    node = SphereLeastSquares()
    y = lpgd.NodeLayer(node)(A, b)
    first, second = 2 * b[:, 0] / 3, 3 * b[:, 1] / 8
    last = (1 - first**2 - second**2).sqrt()
    torch.testing.assert_close(y, torch.stack([first, second, last], -1), atol=1e-6, rtol=0)
    gradients = [
        torch.autograd.grad((lpgd.NodeLayer(node, own)(A, b) * v).sum(), (A, b))
        for own in (method, lpgd.ImplicitKKT(rho=method.rho))
    ]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_a_large_step_may_leave_the_branch_downhill():
    A, b = problem(4, 3, batch=6)
    y = lpgd.NodeLayer(SphereLeastSquares())(A, b)
    tilt = Tilt(1e4 * problem(4, 3, batch=6, seed=1)[0][:, 0], 0.0, torch.zeros_like(y))
    answer = SphereLeastSquares().solve_tilted((A, b), tilt, y)
    torch.testing.assert_close(answer.y, -tilt.linear / tilt.linear.norm(dim=-1, keepdim=True), atol=1e-3, rtol=0)


def test_descent_that_ends_on_a_saddle_goes_on() -> None:
    # The hard case: b has no part along the first axis, so that descent never sees it.
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).repeat(2, 1, 1)
    b = torch.tensor([[0.0, 0.1, 0.1], [0.0, 1.0, 2.0]], dtype=torch.float64)
    found = SphereLeastSquares("descent", tolerance=1e-12).solve((A, b), None)
    assert list(found.statuses) == [Status.SOLVED] * 2
    angles = torch.linspace(0, math.pi, 721, dtype=torch.float64)
    polar, around = torch.meshgrid(angles, 2 * angles, indexing="ij")
    points = torch.stack([polar.cos(), polar.sin() * around.cos(), polar.sin() * around.sin()], -1).reshape(-1, 3)
    for matrix, right, y in zip(A, b, found.y, strict=True):
        best = 0.5 * (points @ matrix.T - right).square().sum(-1).min()
        assert float(objective(matrix[None], right[None], y[None])) <= float(best) + 1e-12


@pytest.mark.parametrize("solver", ["secular", "descent"])
def test_an_element_that_overflows_fails_alone(solver: str) -> None:
    A, b = problem(5, 3, batch=3)
    node = SphereLeastSquares(solver, tolerance=1e-14, max_iterations=1000)
    alone = lpgd.NodeLayer(node)(A[1], b[1])
    A[0] *= 1e200
    y = lpgd.NodeLayer(node, on_error="nan")(A, b)
    assert [status.name for status in y.info.statuses] == ["NUMERICAL_ERROR", "SOLVED", "SOLVED"]
    torch.testing.assert_close(y[1], alone, rtol=0, atol=1e-10)
