"""Projections onto K and K*: variational characterisation, independent solver, closed forms, finite differences."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lpgd.cones.product import Cones, smat, svec
from lpgd.cones.projections import distance, project, projection_derivative

EPSILON = 1e-14
"""Distances to a cone that count as rounding, relative to the point's largest entry and the cone's own geometry."""

SINGLE = {
    "zero": Cones(zero=3),
    "nonnegative": Cones(nonnegative=4),
    "second_order_1": Cones(second_order=(1,)),
    "second_order_2": Cones(second_order=(2,)),
    "second_order_5": Cones(second_order=(5,)),
    "semidefinite_1": Cones(semidefinite=(1,)),
    "semidefinite_4": Cones(semidefinite=(4,)),
    "exponential": Cones(exponential=1),
    "dual_exponential": Cones(dual_exponential=1),
    "power": Cones(power=(0.5,)),
    "power_low": Cones(power=(0.1,)),
    "power_high": Cones(power=(0.8,)),
    "dual_power": Cones(power=(-0.35,)),
}
PRODUCT = Cones(
    zero=2,
    nonnegative=3,
    second_order=(3, 1, 4, 3),
    semidefinite=(2, 3, 2),
    exponential=3,
    dual_exponential=2,
    power=(0.3, -0.6, 0.5, -0.2),
)
every_cone = pytest.mark.parametrize("cones", SINGLE.values(), ids=SINGLE.keys())
both = pytest.mark.parametrize("dual", [False, True], ids=["primal", "dual"])


def is_member(cones: Cones, point: np.ndarray, slack: float) -> bool:
    """Whether a single cone holds ``point`` moved by ``slack`` along a fixed direction into its interior."""
    if cones.zero:
        return bool(np.max(np.abs(point)) <= slack)
    if cones.nonnegative:
        return bool(np.min(point) >= -slack)
    if cones.second_order:
        return bool(np.linalg.norm(point[1:]) <= point[0] + slack)
    if cones.semidefinite:
        return bool(np.linalg.eigvalsh(smat(point, cones.semidefinite[0]))[0] >= -slack)
    if cones.exponential:
        u, v, w = point + slack * np.array([-1.0, 1.0, 1.0])
        return bool(np.all(point == 0) or (v > 0 and w > 0 and np.log(v) + u / v <= np.log(w)))
    if cones.dual_exponential:
        u, v, w = point + slack * np.array([-1.0, 1.0, 1.0])
        return bool(np.all(point == 0) or (u < 0 and w > 0 and np.log(-u) + v / u <= 1.0 + np.log(w)))
    (exponent,) = cones.power
    a = abs(exponent)
    u, v, w = point + slack * np.array([1.0, 1.0, 0.0])
    if exponent < 0:
        u, v = u / a, v / (1.0 - a)
    return bool(u >= 0 and v >= 0 and u**a * v ** (1.0 - a) >= abs(w) * (1.0 - EPSILON))


def dual_of(cones: Cones) -> Cones | None:
    """The cone whose membership is the dual's; None: the whole space."""
    if cones.zero:
        return None
    if cones.exponential or cones.dual_exponential:
        return Cones(exponential=cones.dual_exponential, dual_exponential=cones.exponential)
    return Cones(power=tuple(-exponent for exponent in cones.power)) if cones.power else cones


def wild_point(cones: Cones, seed: int, span: float) -> np.ndarray:
    """Entries of both signs spread over 2 * span decades, some of them exactly 0."""
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1.0, 1.0, 1.0, -1.0, 0.0] if seed % 3 == 0 else [-1.0, 1.0], cones.rows)
    return signs * 10.0 ** generator.uniform(-span, span, cones.rows)


def assert_nearest(cones: Cones, point: np.ndarray) -> None:
    """p = P(v) if and only if p is in K, p - v is in K*, and <p, p - v> = 0."""
    nearest = project(cones, point)
    size = np.max(np.abs(point), initial=0.0)
    slack = 4 * cones.rows * EPSILON * size
    assert is_member(cones, nearest, slack), (point, nearest)
    dual = dual_of(cones)
    assert dual is None or is_member(dual, nearest - point, slack), (point, nearest)
    assert abs(nearest @ (nearest - point)) <= slack * size


@every_cone
@given(seed=st.integers(0, 2**32 - 1), span=st.sampled_from([0.0, 0.3, 1.0, 3.0, 8.0]))
@example(seed=0, span=8.0)
def test_projection_satisfies_its_variational_characterisation(cones: Cones, seed: int, span: float) -> None:
    point = wild_point(cones, seed, span)
    assert_nearest(cones, point)


@pytest.mark.parametrize("kind", ["exponential", "power"])
def test_iterations_reach_rounding_on_many_points_at_once(kind: str) -> None:
    """20000 cones in one call, entries over sixteen decades; each is checked on its own formula."""
    generator = np.random.default_rng(3)
    count = 5000
    exponents = generator.uniform(0.02, 0.98, count)
    cones = Cones(exponential=count) if kind == "exponential" else Cones(power=tuple(exponents))
    spans = np.array([0.5, 2.0, 4.0, 8.0])[:, None, None]
    signs, powers = generator.choice([-1.0, 1.0], (4, count, 3)), generator.uniform(-1.0, 1.0, (4, count, 3))
    points = signs * 10.0 ** (spans * powers)
    nearest = project(cones, points.reshape(4, -1)).reshape(points.shape)
    size = np.max(np.abs(points), axis=-1, keepdims=True)
    residual = (nearest - points) / size
    nearest = nearest / size
    assert np.max(np.abs(np.sum(nearest * residual, axis=-1))) < EPSILON
    with np.errstate(over="ignore"):
        if kind == "exponential":
            u, v, w = np.moveaxis(nearest + EPSILON * np.array([-1.0, 1.0, 1.0]), -1, 0)
            assert np.all((v > 0) & (v * np.exp(u / v) <= w))
            u, v, w = np.moveaxis(residual + EPSILON * np.array([-1.0, 1.0, 1.0]), -1, 0)
            assert np.all((u < 0) & (-u * np.exp(v / u) <= np.e * w))
        else:
            u, v, w = np.moveaxis(nearest + EPSILON * np.array([1.0, 1.0, 0.0]), -1, 0)
            assert np.all(u**exponents * v ** (1 - exponents) >= np.abs(w))
            u, v, w = np.moveaxis(residual + EPSILON * np.array([1.0, 1.0, 0.0]), -1, 0)
            assert np.all((u / exponents) ** exponents * (v / (1 - exponents)) ** (1 - exponents) >= np.abs(w))


@pytest.mark.parametrize("ratio", [-30.0, -8.0, -1.0, 0.0, 0.4, 1.0, 3.0, 12.0, 30.0])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_exponential_projection_of_a_ray_plus_its_normal(ratio: float, scale: float) -> None:
    ray = np.array([ratio, 1.0, np.exp(ratio)])
    normal = np.array([1.0, 1.0 - ratio, -np.exp(-ratio)])
    ray, normal = scale * ray / np.linalg.norm(ray), scale * normal / np.linalg.norm(normal)
    cones = Cones(exponential=1)
    for amount in (0.0, 1e-6, 1.0, 1e3):
        point = ray + amount * normal
        np.testing.assert_allclose(project(cones, point), ray, rtol=0, atol=EPSILON * np.max(np.abs(point)))
    np.testing.assert_allclose(project(cones, normal), 0.0, rtol=0, atol=EPSILON * scale)
    np.testing.assert_allclose(project(cones, -normal, dual=True), -normal, rtol=0, atol=EPSILON * scale)


@pytest.mark.parametrize("exponent", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("ray", [(1.0, 1.0), (1e-6, 2.0), (3.0, 1e-4), (1e7, 1e-7)])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_power_projection_of_a_ray_plus_its_normal(exponent: float, ray: tuple[float, float], sign: float) -> None:
    u, v = ray
    mean = u**exponent * v ** (1 - exponent)
    nearest = np.array([u, v, sign * mean])
    normal = np.array([-exponent * mean / u, -(1 - exponent) * mean / v, sign])
    normal *= np.linalg.norm(nearest) / np.linalg.norm(normal)
    for amount in (0.0, 1e-6, 1.0, 1e3):
        point = nearest + amount * normal
        tolerance = EPSILON * np.max(np.abs(point))
        np.testing.assert_allclose(project(Cones(power=(exponent,)), point), nearest, rtol=0, atol=tolerance)


FACES = {
    "exponential flat face": (Cones(exponential=1), [-1.0, -2.0, 3.0], [-1.0, 0.0, 3.0], np.diag([1.0, 0.0, 1.0])),
    "exponential edge": (Cones(exponential=1), [-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0], np.diag([1.0, 0.0, 0.0])),
    "exponential polar": (Cones(exponential=1), [1.0, -9.0, -1.0], [0.0, 0.0, 0.0], np.zeros((3, 3))),
    "exponential interior": (Cones(exponential=1), [1.0, 1.0, 3.0], [1.0, 1.0, 3.0], np.eye(3)),
    "dual exponential edge": (Cones(dual_exponential=1), [1.0, 2.0, 3.0], [0.0, 2.0, 3.0], np.diag([0.0, 1.0, 1.0])),
    "power polar": (Cones(power=(0.4,)), [-1.0, -1.0, 0.5], [0.0, 0.0, 0.0], np.zeros((3, 3))),
    "power interior": (Cones(power=(0.4,)), [1.0, 2.0, -0.5], [1.0, 2.0, -0.5], np.eye(3)),
    "power axis, half": (Cones(power=(0.5,)), [1.0, -2.0, 0.0], [1.0, 0.0, 0.0], np.diag([1.0, 0.0, 0.2])),
    "power axis, low": (Cones(power=(0.3,)), [1.0, -2.0, 0.0], [1.0, 0.0, 0.0], np.diag([1.0, 0.0, 0.0])),
    "power axis, high": (Cones(power=(0.7,)), [1.0, -2.0, 0.0], [1.0, 0.0, 0.0], np.diag([1.0, 0.0, 1.0])),
    "power other axis": (Cones(power=(0.3,)), [-2.0, 1.0, 0.0], [0.0, 1.0, 0.0], np.diag([0.0, 1.0, 1.0])),
    "second-order polar": (Cones(second_order=(3,)), [-2.0, 1.0, 1.0], [0.0, 0.0, 0.0], np.zeros((3, 3))),
    "second-order outside": (Cones(second_order=(2,)), [0.0, 2.0], [1.0, 1.0], np.full((2, 2), 0.5)),
    "nonnegative": (Cones(nonnegative=2), [2.0, -3.0], [2.0, 0.0], np.diag([1.0, 0.0])),
}


@pytest.mark.parametrize(("cones", "point", "nearest", "derivative"), FACES.values(), ids=FACES.keys())
def test_faces_have_their_exact_projection_and_derivative(
    cones: Cones, point: list[float], nearest: list[float], derivative: np.ndarray
) -> None:
    np.testing.assert_allclose(project(cones, np.array(point)), nearest, rtol=0, atol=1e-15)
    found = projection_derivative(cones, np.array(point)).apply(np.eye(cones.rows))
    np.testing.assert_allclose(found, derivative, rtol=0, atol=1e-15)
    differences = finite_differences(cones, np.array(point), False)
    np.testing.assert_allclose(found, differences, rtol=0, atol=1e-7)


@every_cone
@both
def test_the_origin_and_boundary_points_follow_relu(cones: Cones, dual: bool) -> None:
    origin = np.zeros(cones.rows)
    np.testing.assert_array_equal(project(cones, origin, dual=dual), origin)
    derivative = projection_derivative(cones, origin, dual=dual)
    expected = np.eye(cones.rows) if dual else np.zeros((cones.rows, cones.rows))
    if cones.dual_exponential or (cones.power and cones.power[0] < 0):
        expected = np.eye(cones.rows) - expected  # these are duals themselves
    np.testing.assert_array_equal(derivative.apply(np.eye(cones.rows)), expected)


def test_derivatives_on_the_boundary_of_a_cone() -> None:
    cones = Cones(second_order=(3,), semidefinite=(2,), exponential=1, power=(0.5,))
    point = np.array([5.0, 3.0, 4.0, *svec(np.diag([2.0, 0.0])), 0.0, 1.0, 1.0, 4.0, 1.0, 2.0])
    np.testing.assert_allclose(project(cones, point), point, rtol=0, atol=1e-14)
    derivative = projection_derivative(cones, point).apply(np.eye(cones.rows))
    for rows, normal in [
        (slice(0, 3), [-5.0, 3.0, 4.0]),
        (slice(3, 6), svec(np.diag([0.0, 1.0]))),
        (slice(6, 9), [1.0, 1.0, -1.0]),
        (slice(9, 12), [-0.25, -1.0, 1.0]),
    ]:
        unit = np.array(normal) / np.linalg.norm(normal)
        np.testing.assert_allclose(derivative[rows, rows], np.eye(3) - np.outer(unit, unit), rtol=0, atol=1e-7)


@every_cone
@both
@given(seed=st.integers(0, 2**32 - 1), span=st.sampled_from([0.0, 1.0, 6.0]))
def test_moreau_idempotence_and_distance(cones: Cones, dual: bool, seed: int, span: float) -> None:
    point = wild_point(cones, seed, span)
    size = np.max(np.abs(point))
    nearest = project(cones, point, dual=dual)
    tolerance = 10 * EPSILON * size
    np.testing.assert_allclose(nearest - project(cones, -point, dual=not dual), point, rtol=0, atol=tolerance)
    np.testing.assert_allclose(project(cones, nearest, dual=dual), nearest, rtol=0, atol=tolerance)
    assert distance(cones, nearest, dual=dual) <= tolerance
    assert distance(cones, point, dual=dual) == np.max(np.abs(point - nearest))


def conic_constraint(cones: Cones, x: cp.Variable) -> list[cp.Constraint]:
    if cones.zero:
        return [x == 0]
    if cones.nonnegative:
        return [x >= 0]
    if cones.second_order:
        return [cp.SOC(x[0], x[1:])] if cones.rows > 1 else [x >= 0]
    if cones.semidefinite:
        side = cones.semidefinite[0]
        matrix = cp.Variable((side, side), PSD=True)
        entries = [matrix[i, j] * (1.0 if i == j else np.sqrt(2.0)) for j in range(side) for i in range(j, side)]
        return [x == cp.hstack(entries)]
    if cones.exponential:
        return [cp.ExpCone(x[0], x[1], x[2])]
    if cones.dual_exponential:
        return [cp.ExpCone(-x[1], -x[0], np.e * x[2])]
    (exponent,) = cones.power
    a = abs(exponent)
    if exponent < 0:
        return [cp.PowCone3D(x[0] / a, x[1] / (1.0 - a), x[2], a)]
    return [cp.PowCone3D(x[0], x[1], x[2], a)]


@every_cone
def test_projection_agrees_with_clarabel(cones: Cones) -> None:
    """By strong convexity |x - x*|^2 is at most the gap, here the smallest that Clarabel reaches for every cone."""
    gap = 1e-8
    generator = np.random.default_rng(7)
    x, target = cp.Variable(cones.rows), cp.Parameter(cones.rows)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), conic_constraint(cones, x))
    for _ in range(3):
        target.value = generator.normal(size=cones.rows)
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=gap, tol_gap_rel=gap, tol_feas=gap)
        assert problem.status == cp.OPTIMAL
        np.testing.assert_allclose(project(cones, target.value), np.asarray(x.value), rtol=0, atol=np.sqrt(gap))


def finite_differences(cones: Cones, point: np.ndarray, dual: bool) -> np.ndarray:
    """Central, step 1e-6: truncation near 1e-12, rounding near 1e-10 at points of order 1."""
    steps = 1e-6 * np.eye(cones.rows)
    return (project(cones, point + steps, dual=dual) - project(cones, point - steps, dual=dual)).T / 2e-6


def assert_derivative(cones: Cones, point: np.ndarray, dual: bool) -> None:
    derivative = projection_derivative(cones, point, dual=dual)
    matrix = derivative.apply(np.eye(cones.rows))
    np.testing.assert_allclose(matrix, finite_differences(cones, point, dual), rtol=0, atol=1e-7)
    np.testing.assert_allclose(matrix, matrix.T, rtol=0, atol=EPSILON)
    assert np.all((derivative.eigenvalues >= 0.0) & (derivative.eigenvalues <= 1.0))
    for group in derivative.groups:
        gram = np.swapaxes(group.basis, 1, 2) @ group.basis
        np.testing.assert_allclose(gram, np.broadcast_to(np.eye(gram.shape[-1]), gram.shape), rtol=0, atol=EPSILON)
    factor, rest = derivative.factor()
    count = int(np.sum(derivative.eigenvalues > 1e-14))
    assert (factor.shape, rest.shape) == ((count, cones.rows), (count,))
    np.testing.assert_allclose((factor.T @ factor).toarray(), matrix, rtol=0, atol=EPSILON)
    np.testing.assert_allclose((factor @ factor.T).toarray(), np.diag(1.0 - rest), rtol=0, atol=EPSILON)


@pytest.mark.parametrize("cones", [*SINGLE.values(), PRODUCT], ids=[*SINGLE.keys(), "product"])
@both
def test_derivative_equals_finite_differences(cones: Cones, dual: bool) -> None:
    generator = np.random.default_rng(11)
    for _ in range(8):
        assert_derivative(cones, generator.normal(size=cones.rows), dual)


@given(seed=st.integers(0, 2**32 - 1), span=st.sampled_from([0.0, 2.0, 8.0]))
@both
def test_derivative_fixes_the_projection_and_annihilates_the_residual(seed: int, span: float, dual: bool) -> None:
    """D P(v) = P(v) and D (v - P(v)) = 0, where P is differentiable and beyond: P is homogeneous, D in [0, I]."""
    point = wild_point(PRODUCT, 3 * seed + 1, span)
    nearest = project(PRODUCT, point, dual=dual)
    derivative = projection_derivative(PRODUCT, point, dual=dual)
    tolerance = 20 * EPSILON * np.max(np.abs(point))
    np.testing.assert_allclose(derivative.apply(nearest), nearest, rtol=0, atol=tolerance)
    np.testing.assert_allclose(derivative.apply(point), nearest, rtol=0, atol=tolerance)
    assert np.all((derivative.eigenvalues >= 0) & (derivative.eigenvalues <= 1))


def test_blocks_of_a_product_do_not_see_one_another() -> None:
    point = np.random.default_rng(5).normal(size=PRODUCT.rows)
    parts = [Cones(zero=2), Cones(nonnegative=3)]
    parts += [Cones(second_order=(size,)) for size in PRODUCT.second_order]
    parts += [Cones(semidefinite=(side,)) for side in PRODUCT.semidefinite]
    parts += [Cones(exponential=1)] * 3 + [Cones(dual_exponential=1)] * 2
    parts += [Cones(power=(exponent,)) for exponent in PRODUCT.power]
    start, expected = 0, []
    for part in parts:
        expected.append(project(part, point[start : start + part.rows]))
        start += part.rows
    np.testing.assert_allclose(project(PRODUCT, point), np.concatenate(expected), rtol=0, atol=EPSILON)


@settings(max_examples=20)
@given(shape=st.lists(st.integers(0, 3), max_size=3))
@both
def test_any_leading_dimensions(shape: list[int], dual: bool) -> None:
    points = np.random.default_rng(2).normal(size=(*shape, PRODUCT.rows))
    original = points.copy()
    nearest = project(PRODUCT, points, dual=dual)
    assert nearest.shape == points.shape
    assert distance(PRODUCT, points, dual=dual).shape == tuple(shape)
    for index in np.ndindex(*shape):
        np.testing.assert_allclose(nearest[index], project(PRODUCT, points[index], dual=dual), rtol=0, atol=EPSILON)
    derivative = projection_derivative(PRODUCT, np.ones(PRODUCT.rows))
    applied = derivative.apply(points)
    assert applied.shape == points.shape
    matrix = derivative.apply(np.eye(PRODUCT.rows))
    np.testing.assert_allclose(applied, points @ matrix, rtol=0, atol=10 * EPSILON)
    np.testing.assert_array_equal(points, original)


@both
def test_no_cones(dual: bool) -> None:
    assert project(Cones(), np.zeros((4, 0)), dual=dual).shape == (4, 0)
    np.testing.assert_array_equal(distance(Cones(), np.zeros((4, 0)), dual=dual), np.zeros(4))
    factor, rest = projection_derivative(Cones(), np.zeros(0), dual=dual).factor()
    assert (factor.shape, rest.shape) == ((0, 0), (0,))


@both
def test_nan_stays_in_its_block(dual: bool) -> None:
    cones = Cones(zero=1, nonnegative=1, second_order=(2, 2), semidefinite=(2,), exponential=2, power=(0.5, -0.5))
    point = np.random.default_rng(1).normal(size=cones.rows)
    blocks = [1, 1, 2, 2, 3, 3, 3, 3, 3]
    for first, size in zip(np.cumsum([0, *blocks[:-1]]), blocks, strict=True):
        spoilt = np.stack([point, point])
        spoilt[0, first] = np.nan
        nearest = project(cones, spoilt, dual=dual)
        expected = np.zeros(nearest.shape, dtype=bool)
        expected[0, first : first + size] = True
        np.testing.assert_array_equal(np.isnan(nearest), expected)
        with pytest.raises(ValueError, match=f"not finite in rows \\[{first}\\]"):
            projection_derivative(cones, spoilt[0], dual=dual)


def test_wrong_shapes_are_refused() -> None:
    cones = Cones(nonnegative=3)
    for call in (project, distance, projection_derivative):
        with pytest.raises(ValueError, match="last dimension must be the 3 rows"):
            call(cones, np.zeros(4))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 3\)"):
        projection_derivative(cones, np.zeros((2, 2, 3)))


@both
def test_the_derivative_at_several_points_has_one_block_for_each(dual: bool) -> None:
    points = np.random.default_rng(5).normal(size=(4, PRODUCT.rows)) * [[1.0], [-1.0], [10.0], [0.0]]
    stacked = projection_derivative(PRODUCT, points, dual=dual)
    alone = [projection_derivative(PRODUCT, point, dual=dual).apply(np.eye(PRODUCT.rows)) for point in points]
    expected = scipy.linalg.block_diag(*alone)
    np.testing.assert_allclose(stacked.apply(np.eye(points.size)), expected, rtol=0, atol=1e-14)
    factor, rest = stacked.factor()
    np.testing.assert_allclose((factor.T @ factor).toarray(), expected, rtol=0, atol=1e-13)
    assert rest.size == factor.shape[0]


def test_derivatives_have_their_bits_whoever_is_beside_them() -> None:
    cones = Cones(zero=1, nonnegative=1, second_order=(5, 4), semidefinite=(3, 8), exponential=2, dual_exponential=1)
    v, moves = np.random.default_rng(0).standard_normal((2, 5, cones.rows))
    together = projection_derivative(cones, v, dual=True)
    assert all(group.basis.flags.c_contiguous for group in together.groups)  # products round by the order in memory
    changes = together.apply(moves.ravel()).reshape(moves.shape)
    for element in range(len(v)):
        alone = projection_derivative(cones, v[element : element + 1], dual=True)
        np.testing.assert_array_equal(alone.apply(moves[element]), changes[element])
