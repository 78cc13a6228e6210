"""Squares, powers, exponentials and logarithms whose data are far from 1, against closed forms and their rescaling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd.cones.product import Cones
from lpgd.problems.conic.coordinates.balancing import balancing_of
from lpgd.solvers import ConicSolver
from lpgd.status import Status
from tests.solver_table import SOLVER_TABLE

pytestmark = [
    pytest.mark.filterwarnings("ignore::lpgd.LpgdWarning"),  # who solves it in the end is no matter here
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # CVXPY 1.9, where it bounds roots of variables
]
SOLVERS = [
    pytest.param(row.solver, id=str(row)) for row in SOLVER_TABLE if "second_order" in row.solver.capabilities.cones
]
RADII = [1e-12, 1e-8, 1e-5, 1e-3, 1.0, 1e4, 1e6, 1e8, 1e12, 1e15]
COST, SHIFT = [1.0, -2.0, 2.0], np.array([1.0, 0.3, -1.1])


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def squares(**options: Any) -> lpgd.CvxpyLayer:
    x, radius, c = cp.Variable(3), cp.Parameter(nonneg=True), cp.Parameter(3)
    return lpgd.CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [cp.sum_squares(x) <= radius]), [radius, c], [x], **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sum_of_squares_and_its_gradient(solver: ConicSolver) -> None:
    """cᵀx over |x|² ≤ R is least at -√R c / |c|."""
    layer, radius, c = squares(solver=solver), double(RADII).requires_grad_(), double(COST).requires_grad_()
    output = layer(radius, c)
    unit, root = c.detach() / 3.0, radius.detach().sqrt()[:, None]
    assert output.info.statuses == (Status.SOLVED,) * len(RADII)
    np.testing.assert_allclose(output[0].detach() / root, (-unit).expand(len(RADII), -1), atol=1e-9)
    along = double(SHIFT)
    for element, x in enumerate(output[0]):
        gradient, slope = torch.autograd.grad(x @ along, (radius, c), retain_graph=True)
        torch.testing.assert_close(gradient[element] * 2 * root[element, 0], -(along @ unit), atol=1e-8, rtol=0)
        torch.testing.assert_close(slope / root[element], (unit * (unit @ along) - along) / 3.0, atol=1e-8, rtol=0)


@pytest.mark.parametrize("rho", [0.0, 1e-3])
def test_perturbed_gradients_of_a_sum_of_squares(rho: float) -> None:
    """The same by LPGD; with an augmentation, which is of x itself, where x is of order 1 or less."""
    radii = double(RADII if not rho else [1e-12, 1e-8, 1e-4, 1.0]).requires_grad_()
    output = squares(gradient=lpgd.LPGD(tau=1e-3, rho=rho))(radii, double(COST))
    along, unit = double(SHIFT), double(COST) / 3.0
    (gradient,) = torch.autograd.grad((output[0] @ along).sum(), radii)
    np.testing.assert_allclose(gradient * 2 * radii.detach().sqrt(), [-(along @ unit)] * len(radii), rtol=1e-5)


def branch_flow(size: float, kind: str = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The generation of a radial network of loads of this size, over the size, and how w times it depends on loads
    and, over the size, on the price: all of these are the same for every size, as resistances are its inverse."""
    count, r = 12, np.random.default_rng(4)
    parent = [int(r.integers(0, node)) for node in range(1, count + 1)]
    loss, reactance = r.uniform(0.01, 0.04, (2, count)) / size
    p, q, flow, v = cp.Variable(count), cp.Variable(count), cp.Variable(count), cp.Variable(count + 1)
    own, load, price = cp.Variable(count, nonneg=True), cp.Parameter(count), cp.Parameter(nonneg=True)
    below = np.array([[float(one == node + 1) for one in parent] for node in range(count)])
    drop = cp.multiply(loss, p) + cp.multiply(reactance, q)
    constraints: list[Any] = [
        v[0] == 1,
        p - cp.multiply(loss, flow) == load - own + below @ p,
        q - cp.multiply(reactance, flow) == size * r.uniform(0.01, 0.03, count) + below @ q,
        v[1:] == v[parent] - 2 * drop + cp.multiply(loss**2 + reactance**2, flow),
        own <= 0.05 * size,
    ]
    if kind == "cone":  # the same by the rows flow + v and flow - v, of which the latter is the last one
        ends = v[parent]
        constraints.append(cp.SOC(flow + ends, cp.vstack([2 * p, 2 * q, flow - ends])))
    else:
        constraints += [cp.quad_over_lin(cp.hstack([p[i], q[i]]), v[parent[i]]) <= flow[i] for i in range(count)]
    if kind == "total":  # follows from the others, whatever the loads are
        constraints.append(p @ np.equal(parent, 0.0) - loss @ flow == cp.sum(load) - cp.sum(own))
    cost = price * (p @ np.equal(parent, 0.0)) + 8 / size * cp.sum_squares(own) + 0.3 * cp.sum(own)
    loads = (size * double(r.uniform(0.02, 0.08, count))).requires_grad_()
    one = double(1.0).requires_grad_()
    (found,) = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cost), constraints), [load, price], [own])(loads, one)
    (torch.linspace(-1, 1, count).double() @ found).backward()
    assert loads.grad is not None
    assert one.grad is not None
    return found.detach() / size, loads.grad, one.grad / size


@pytest.mark.filterwarnings("error::lpgd.LpgdWarning")
@pytest.mark.parametrize("kind", ["", "cone", "total"])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 10.0, 1e3, 1e6])
def test_a_network_in_other_units(size: float, kind: str) -> None:
    """Answers that are known to rounding stay, though currents are far from voltages."""
    for found, expected in zip(branch_flow(size, kind), branch_flow(1.0), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9 * float(expected.abs().max()), rtol=0)


def test_a_batch_of_radii_has_the_bits_of_its_elements() -> None:
    layer = squares()
    together = layer(double(RADII), double(COST))[0]
    for radius, x in zip(RADII, together, strict=True):
        assert torch.equal(layer(double(radius), double(COST))[0], x)


def test_a_look_at_a_batch_is_one_at_each_element() -> None:
    """Whatever zeros the others have."""
    structure = squares()(double([1.0, 1.0]), double([COST] * 2)).info.solution.problem.structure
    balancing, size = balancing_of(structure), 4
    assert balancing is not None
    numbers = torch.rand(5, size, 40, generator=torch.Generator().manual_seed(0)).double()
    fields = (structure.quadratic.nnz, structure.n, structure.constraint.nnz, structure.m, 0, 0)
    data = [numbers[index % 5, :, :count] * 1e6 ** (index % 3) for index, count in enumerate(fields)]
    data[1][0, 0], data[2][2, 1], data[3][2, 0] = 0.0, 0.0, 0.0
    together = balancing._rough_rows([balancing._logarithms(number, datum) for number, datum in enumerate(data)])
    for element in range(size):
        one = [datum[element : element + 1] for datum in data]
        alone = balancing._rough_rows([balancing._logarithms(number, datum) for number, datum in enumerate(one)])
        np.testing.assert_allclose(together[element], alone[0], atol=1e-12)


@pytest.mark.parametrize("transform", ["vmap", "vmap of jacrev", "jacfwd"])
def test_transforms(transform: str) -> None:
    layer, unit, radii = squares(), double(COST) / 3.0, double(RADII)

    def solved(radius: torch.Tensor) -> torch.Tensor:
        return layer(radius, double(COST))[0]

    if transform == "vmap":
        found, expected = torch.func.vmap(solved)(radii), -radii.sqrt()[:, None] * unit
    elif transform == "jacfwd":
        found, expected = torch.func.jacfwd(solved)(double(1e12)), -unit / 2e6
    else:
        found, expected = torch.func.vmap(torch.func.jacrev(solved))(radii), -unit / (2 * radii.sqrt()[:, None])
    torch.testing.assert_close(found / expected, torch.ones_like(found), atol=1e-9, rtol=0)


def test_multipliers_the_whole_answer_and_warm_starts() -> None:
    """The multiplier of |x|² ≤ R is |c| / (2√R)."""
    x, radius = cp.Variable(3), cp.Parameter(nonneg=True)
    constraint = cp.sum_squares(x) <= radius
    problem = cp.Problem(cp.Minimize(np.array(COST) @ x), [constraint])
    layer = lpgd.CvxpyLayer(problem, [radius], [x, constraint.dual_variables[0]])
    radii = double(RADII)
    output, solution = layer(radii), layer.solve(radii)
    torch.testing.assert_close(output[1] * 2 * radii.sqrt() / 3.0, torch.ones_like(radii), atol=1e-9, rtol=0)
    assert solution.statuses == (Status.SOLVED,) * len(RADII)
    own = solution.problem.data.A.shape[-1], solution.problem.structure.constraint.nnz
    assert own[0] == own[1]
    torch.testing.assert_close(solution.slack[:, 0], 1.0 + radii, atol=1e-9, rtol=1e-9)
    for start in (output, solution, True):
        again = layer(1.1 * radii, warm_start=start)[0]
        expected = -(1.1 * radii).sqrt()[:, None] * double(COST) / 3.0
        torch.testing.assert_close(again / expected, torch.ones_like(again), atol=1e-9, rtol=0)


@pytest.mark.parametrize("radius", RADII)
def test_conic_data(radius: float) -> None:
    """The same cone in a ConicLayer: (1 + t, 1 - t, 2x), t ≤ R, in rows of any unit."""
    cones, A = Cones(nonnegative=1, second_order=(5,)), torch.zeros(6, 4).double()
    A[0, 3], A[1, 3], A[2, 3] = 1.0, -1.0, 1.0
    A[3:, :3] = -2.0 * torch.eye(3)
    b = double([radius, 1.0, 1.0, 0.0, 0.0, 0.0])
    output = lpgd.solve_conic(None, double([*COST, 0.0]), A, b, cones)
    np.testing.assert_allclose(output.x[:3] / radius**0.5, -np.array(COST) / 3, atol=1e-9)
    np.testing.assert_allclose(output.y[0], 1.5 / radius**0.5, rtol=1e-9)


@pytest.mark.parametrize("far", [1e4, 1e8, 1e12, 1e15])
def test_squares_that_are_loose(far: float) -> None:
    """3x₁ + 4x₂ over the unit ball, or |x - c|² on a line; |x|² ≤ far is not active."""
    x = cp.Variable(2)
    total: Any = cp.sum(x)
    radius = cp.Parameter(nonneg=True)
    loose = cp.sum_squares(x) <= radius
    for ball in (cp.norm(x) <= 1, cp.sum_squares(x) <= 1):
        problem = cp.Problem(cp.Minimize(np.array([3.0, 4.0]) @ x), [loose, ball])
        output = lpgd.CvxpyLayer(problem, [radius], [x])(double(far))
        assert output.info.statuses == (Status.SOLVED,)
        np.testing.assert_allclose(output[0], [-0.6, -0.8], atol=1e-9)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - np.array([1.0, 2.0]))), [loose, total == 1])
    output = lpgd.CvxpyLayer(problem, [radius], [x])(double(far))
    np.testing.assert_allclose(output[0], [0.0, 1.0], atol=1e-9)


@pytest.mark.parametrize("far", [1e6, 1e9, 1e12])
def test_bounds_that_are_loose_beside_squares(far: float) -> None:
    """1ᵀx over |x|² ≤ R is least at -√(R / 3); x ≥ -far is said of each entry, and active or far away."""
    x, radius, bound = cp.Variable(3), cp.Parameter(nonneg=True), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [cp.sum_squares(x) <= radius, x >= bound])
    layer, radii = lpgd.CvxpyLayer(problem, [radius, bound], [x]), double([10.0, 1e7, 1e10])
    output = layer(radii, double(-far))
    for element, (size, status) in enumerate(zip(radii, output.info.statuses, strict=True)):
        root = float(size / 3) ** 0.5
        if status is Status.INACCURATE and far > 1e9 * root:  # it says so
            continue
        assert status is Status.SOLVED
        np.testing.assert_allclose(output[0][element] / root, [-1.0] * 3, atol=1e-9)


@pytest.mark.parametrize("radius", [1e-12, 1e-4, 1e2, 1e6, 1e10, 1e14])
def test_squares_beside_an_active_bound(radius: float) -> None:
    """(1, -2, 2)ᵀx over |x|² ≤ R, x₁ ≥ -l, with l a tenth of √R or 0.05."""
    root = radius**0.5
    for bound in (0.1 * root, 0.05):
        x, low = cp.Variable(3), min(bound, root / 3)
        size, limit = cp.Parameter(nonneg=True), cp.Parameter()
        problem = cp.Problem(cp.Minimize(np.array(COST) @ x), [cp.sum_squares(x) <= size, x[0] >= limit])
        output = lpgd.CvxpyLayer(problem, [size, limit], [x])(double(radius), double(-bound))
        left = (radius - low**2) ** 0.5 / 2**0.5
        assert output.info.statuses == (Status.SOLVED,)
        np.testing.assert_allclose(output[0] / root, np.array([-low, left, -left]) / root, atol=1e-8)


WEIGHTS, Q = np.array([1.0, 2.0, 3.0]), np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]])
ATOMS: dict[str, tuple[Callable[[Any, Any], cp.Problem], float]] = {
    "norm squared": (lambda x, p: cp.Problem(cp.Minimize(np.array(COST) @ x), [cp.norm(x) ** 2 <= p]), 2.0),
    "quad_form": (lambda x, p: cp.Problem(cp.Minimize(np.array(COST) @ x), [cp.quad_form(x, Q) <= p]), 2.0),
    "square": (lambda x, p: cp.Problem(cp.Minimize(np.array(COST) @ x), [cp.max(cp.square(x)) <= p]), 2.0),
    "fourth power": (lambda x, p: cp.Problem(cp.Minimize(np.array(COST) @ x), [cp.sum(cp.power(x, 4)) <= p]), 4.0),
    "power 1.5": (
        lambda x, p: cp.Problem(cp.Minimize(np.array(COST) @ x), [cp.sum(cp.power(cp.abs(x), 1.5)) <= p]),
        1.5,
    ),
    "matrix_frac": (lambda x, p: cp.Problem(cp.Minimize(np.array(COST) @ x), [cp.matrix_frac(x, Q) <= p]), 2.0),
    "sqrt": (lambda x, p: cp.Problem(cp.Minimize(WEIGHTS @ x), [cp.sum(cp.sqrt(x)) >= p]), 0.5),
    "fourth root": (lambda x, p: cp.Problem(cp.Minimize(WEIGHTS @ x), [cp.sum(cp.power(x, 0.25)) >= p]), 0.25),
    "inv_pos": (lambda x, p: cp.Problem(cp.Minimize(WEIGHTS @ x), [cp.sum(cp.inv_pos(x)) <= p]), -1.0),
    "entropy": (
        lambda x, p: cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + np.array(COST) @ x), [cp.sum(x) == p]),
        1.0,
    ),
    "logarithm": (lambda x, p: cp.Problem(cp.Maximize(cp.sum(cp.log(x))), [WEIGHTS @ x <= p]), 1.0),
    "cube": (lambda x, p: cp.Problem(cp.Minimize(WEIGHTS @ cp.power(x, 3)), [cp.sum(x) >= p]), 1.0),
    "inverse": (lambda x, p: cp.Problem(cp.Minimize(WEIGHTS @ cp.inv_pos(x)), [cp.sum(x) <= p]), 1.0),
    "root": (lambda x, p: cp.Problem(cp.Maximize(WEIGHTS @ cp.sqrt(x)), [cp.sum(x) <= p]), 1.0),
    "geo_mean": (lambda x, p: cp.Problem(cp.Maximize(cp.geo_mean(x, [1, 2, 1])), [WEIGHTS @ x <= p]), 1.0),
    "largest of squares": (
        lambda x, p: cp.Problem(
            cp.Minimize(cp.maximum(cp.sum_squares(x - p * np.array(COST)), cp.sum_squares(x + 2 * p * WEIGHTS)))
        ),
        1.0,
    ),
}


@pytest.mark.parametrize("atom", ATOMS)
def test_atoms_in_other_units(atom: str) -> None:
    """A program whose x is s times that of the program of order 1."""
    problem, degree = ATOMS[atom]
    x, size = cp.Variable(3), cp.Parameter(nonneg=True)
    layer = lpgd.CvxpyLayer(problem(x, size), [size], [x])
    scales = np.array([1e-6, 1e-4, 1.0, 1e4] if degree == 4.0 else [1e-8, 1e-5, 1e-2, 1.0, 1e2, 1e4, 1e6, 1e7])
    sizes = double(scales**degree).requires_grad_()
    output = layer(sizes)
    assert output.info.statuses == (Status.SOLVED,) * len(scales)
    at_one = output[0][int(np.flatnonzero(scales == 1.0)[0])].detach()
    relative = output[0].detach() / double(scales)[:, None]
    np.testing.assert_allclose(relative, at_one.expand(len(scales), -1), atol=1e-7)
    # x = x₁ p^(1/degree)
    (gradient,) = torch.autograd.grad((output[0] @ double(SHIFT)).sum(), sizes)
    np.testing.assert_allclose(
        gradient * double(scales ** (degree - 1)) * degree, [float(at_one @ double(SHIFT))] * len(scales), rtol=1e-6
    )


@pytest.mark.parametrize("total", [1e-6, 1.0, 1e4, 1e6, 1e9])
def test_entropy_and_its_gradient(total: float) -> None:
    """Σ -x log x + cᵀx over Σ x = S is greatest at S softmax(c)."""
    x = cp.Variable(3)
    whole: Any = cp.sum(x)
    total_of, c = cp.Parameter(nonneg=True), cp.Parameter(3)
    problem = cp.Problem(cp.Maximize(cp.sum(cp.entr(x)) + c @ x), [whole == total_of])
    cost = double(COST).requires_grad_()
    output = lpgd.CvxpyLayer(problem, [total_of, c], [x])(double(total), cost)[0]
    share = torch.softmax(cost.detach(), 0)
    (gradient,) = torch.autograd.grad(output @ double(SHIFT), cost)
    np.testing.assert_allclose(output.detach() / total, share, atol=1e-9)
    np.testing.assert_allclose(gradient / total, share * (double(SHIFT) - share @ double(SHIFT)), atol=1e-8)


@pytest.mark.parametrize("bound", [1e-6, 1e-3, 1.0, 1e6, 1e12])
def test_exponentials(bound: float) -> None:
    """wᵀx over Σ exp(x) ≤ R is greatest at log(R w / Σ w)."""
    x, radius = cp.Variable(3), cp.Parameter(nonneg=True)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Maximize(WEIGHTS @ x), [cp.sum(cp.exp(x)) <= radius]), [radius], [x])
    size = double(bound).requires_grad_()
    output = layer(size)[0]
    np.testing.assert_allclose(output.detach(), np.log(bound * WEIGHTS / 6.0), atol=1e-8)
    (gradient,) = torch.autograd.grad(output[0], size)
    np.testing.assert_allclose(gradient * bound, 1.0, rtol=1e-7)


@pytest.mark.parametrize("trace", [1e-6, 1e-4, 1e4, 1e5, 1e8])
def test_determinants(trace: float) -> None:
    """log det X over tr C X ≤ p is greatest at p C⁻¹ / 2."""
    X, size, C = cp.Variable((2, 2), symmetric=True), cp.Parameter(nonneg=True), np.array([[2.0, 0.5], [0.5, 1.0]])
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Maximize(cp.log_det(X)), [cp.trace(C @ X) <= size]), [size], [X])
    np.testing.assert_allclose(layer(double(trace))[0] / trace, np.linalg.inv(C) / 2, atol=1e-8)


@pytest.mark.parametrize("side", [21, 24])
def test_projection_onto_semidefinite_matrices_by_either_factorisation(side: int) -> None:
    """Dense blocks of large matrices want another factorisation than all else; both are exact."""
    r = np.random.default_rng(side)
    given = r.standard_normal((side, side))
    given += given.T
    values, vectors = np.linalg.eigh(given)
    X, Y = cp.Variable((side, side), PSD=True), cp.Parameter((side, side), symmetric=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(X - Y)))
    for solver in (lpgd.Clarabel(), lpgd.Clarabel(direct_solve_method="qdldl")):
        (found,) = lpgd.CvxpyLayer(problem, [Y], [X], solver=solver)(double(given))
        np.testing.assert_allclose(found, (vectors * values.clip(0)) @ vectors.T, atol=1e-9)
    assert lpgd.Clarabel().method_for(Cones(semidefinite=(2, side))) == ("faer" if side > 21 else "qdldl")
    assert lpgd.Clarabel().method_for(Cones(second_order=(1000,))) == "qdldl"
