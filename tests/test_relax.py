"""``on_error="relax"``: solutions of closest feasible problems, against the same in two stages by CVXPY."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd import LPGD, Cones, ConicLayer, CvxpyLayer, ImplicitKKT, LPLayer, QPLayer, SolverError, Status
from lpgd.cones.product import svec

ACCURATE: dict[str, Any] = {"solver": "CLARABEL", "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
Case = tuple[Cones, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def conic_case(kind: str, seed: int) -> Case:
    """A conic program without a feasible point whose other variables are free to be optimised."""
    rng, n = np.random.default_rng(seed), 4
    factor = rng.normal(size=(n, n))
    P, q = factor @ factor.T + 0.1 * np.eye(n), rng.normal(size=n)
    if kind == "zero":
        A, b = rng.normal(size=(3, n)), rng.normal(size=3)
        A[2] = A[0] + A[1]
        return Cones(zero=3), P, q, A, b
    if kind == "nonnegative":
        A = np.vstack([rng.normal(size=(2, n)), np.zeros((2, n)), np.eye(n)])
        A[2:4] = -A[:2]
        return Cones(nonnegative=8), P, q, A, np.array([-1, 0.5, -1, 1, 2, 2, 2, 2])
    if kind == "second_order":
        A = rng.normal(size=(6, n))
        A[0] = A[3] = 0.0
        A[4:] = A[1:3]  # two discs apart
        return Cones(second_order=(3, 3)), P, q, A, np.array([0.5, 0, 0, 0.7, 3, 1])
    if kind == "exponential":
        A = rng.normal(size=(4, n))
        A[0] = A[2] = 0.0  # the row of the nonnegative cone is 0 ≤ -0.5
        return Cones(nonnegative=1, exponential=1), P, q, A, np.array([-0.5, 0.3, 1, 0.5])
    A = np.stack([svec(matrix + matrix.T) for matrix in rng.normal(size=(n, 3, 3))], 1)
    A[0] = 0.0
    return Cones(semidefinite=(3,)), P, q, A, svec(np.diag([-1, 1.0, 2]))


def in_cone(cones: Cones, s: cp.Variable) -> list[cp.Constraint]:
    """``s ∈ K`` in CVXPY's words."""
    start, constraints = cones.zero + cones.nonnegative, []
    if cones.zero:
        constraints.append(s[: cones.zero] == 0)
    if cones.nonnegative:
        constraints.append(s[cones.zero : start] >= 0)
    for size in cones.second_order:
        constraints.append(cp.SOC(s[start], s[start + 1 : start + size]))
        start += size
    for side in cones.semidefinite:
        X = cp.Variable((side, side), PSD=True)
        for column in range(side):
            for row in range(column, side):
                constraints.append(s[start] == X[row, column] * (1 if row == column else np.sqrt(2)))
                start += 1
    for _ in range(cones.exponential):
        constraints.append(cp.ExpCone(s[start], s[start + 1], s[start + 2]))
        start += 3
    return constraints


def in_two_stages(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The least violation e, and then the best x with it."""
    cones, P, q, A, b = case
    x, s, e = cp.Variable(len(q)), cp.Variable(len(b)), cp.Variable(len(b))
    constraints = [A @ x + s == b + e, *in_cone(cones, s)]
    cp.Problem(cp.Minimize(cp.sum_squares(e)), constraints).solve(**ACCURATE)
    least = e.value.copy()
    constraints[0] = A @ x + s == b + least
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has no interior
        cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(P)) + q @ x), constraints).solve(**ACCURATE)
    return x.value, least


def along(function: Callable[..., Tensor], data: Sequence[Tensor], directions: Sequence[Tensor], h: float) -> float:
    """The derivative along a direction, by central differences."""
    with torch.no_grad():
        ends = [
            function(*(own + sign * h * way for own, way in zip(data, directions, strict=True))) for sign in (1, -1)
        ]
    return float(ends[0] - ends[1]) / (2 * h)


KINDS = ("zero", "nonnegative", "second_order", "semidefinite", "exponential")
EXACT = {"zero": 1e-6, "nonnegative": 1e-6, "second_order": 1e-4, "semidefinite": 1e-4, "exponential": 1e-6}
"""At curved cones the second stage of the reference, which has no interior, is what is known less well."""


@pytest.mark.parametrize("seed", [2, 5, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_best_point_of_least_violation(kind: str, seed: int) -> None:
    case = conic_case(kind, seed)
    cones, *data = case
    x, e = in_two_stages(case)
    P, q, A, b = (torch.tensor(part) for part in data)
    found = ConicLayer(cones, on_error="relax")(P, q, A, b)
    assert found.info.statuses == (Status.RELAXED,)
    violation = found.info.violation
    np.testing.assert_allclose(violation.rows, e, atol=1e-6)
    np.testing.assert_allclose(violation.size, np.linalg.norm(e), atol=1e-6)
    np.testing.assert_allclose(found.x, x, atol=EXACT[kind])
    # The slack is in the cone, and multipliers are those of the problem with b + e.
    np.testing.assert_allclose(A @ found.x + found.s, b + violation.rows, atol=1e-12)
    np.testing.assert_allclose(P @ found.x + q + A.T @ found.y, 0.0, atol=2e-3)


@pytest.mark.parametrize("method", [ImplicitKKT(), LPGD(), LPGD(tau=1e-5)], ids=["implicit", "lpgd", "tau"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, method: Any) -> None:
    cones, *data = conic_case(kind, 2)
    P, q, A, b = (torch.tensor(part, requires_grad=True) for part in data)
    rng = np.random.default_rng(0)
    on_x, on_e = (torch.tensor(rng.normal(size=size)) for size in (4, len(b)))
    layer = ConicLayer(cones, on_error="relax", gradient=method)

    def loss(*data: Tensor) -> Tensor:
        found = layer(*data)
        return on_x @ found.x + on_e @ found.info.violation.rows + found.info.violation.size

    gradient = torch.autograd.grad(loss(P, q, A, b), (P, q, A, b))
    ways = [torch.tensor(rng.normal(size=part.shape)) for part in (P, q, A, b)]
    ways[0] = ways[0] + ways[0].T
    ways[2] = 0.3 * A.detach() + A.detach() @ (0.1 * ways[0])  # rows that depend on each other stay so
    for place in range(4):
        chosen = [way if own == place else torch.zeros_like(way) for own, way in enumerate(ways)]
        expected = along(loss, (P, q, A, b), chosen, 1e-4)
        assert float((gradient[place] * ways[place]).sum()) == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_forward_mode_is_the_transpose() -> None:
    cones, *data = conic_case("nonnegative", 2)
    data = [torch.tensor(part) for part in data]
    layer = ConicLayer(cones, on_error="relax")
    ways = [0.1 * part + 0.05 for part in data]
    ways[2] = 0.3 * data[2]
    with torch.autograd.forward_ad.dual_level():
        found = layer(*(torch.autograd.forward_ad.make_dual(own, way) for own, way in zip(data, ways, strict=True)))
        tangent = torch.autograd.forward_ad.unpack_dual(found.x).tangent
    expected = [along(lambda *own, k=k: layer(*own).x[k], data, ways, 1e-4) for k in range(4)]
    np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-5)


def program(seed: int) -> dict[str, Tensor]:
    """Rows and bounds of a quadratic program that contradict each other, with crossed bounds and absent ends."""
    rng, n = np.random.default_rng(seed), 4
    factor = rng.normal(size=(n, n))
    G = rng.normal(size=(4, n))
    G[1] = G[0]
    data = {
        "P": factor @ factor.T + 0.1 * np.eye(n), "q": rng.normal(size=n),
        "A": np.array([[1.0, 1, 0, 0]]), "b": np.array([5.0]), "G": G,
        "h": np.array([-1, 9, np.inf, 1]), "l": np.array([-np.inf, 1, -1, -np.inf]),
        "lb": np.array([-1, -np.inf, 0.6, -9]), "ub": np.array([1, 2, 0.2, np.inf]),
    }  # fmt: skip
    return {name: torch.tensor(part) for name, part in data.items()}


def program_in_two_stages(d: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    x = cp.Variable(4)
    e = [cp.Variable(1), *(cp.Variable(4, nonneg=True) for _ in range(4))]
    fixed: list[Any] = list(e)

    def constraints() -> list[cp.Constraint]:
        found = [d["A"] @ x == d["b"] + fixed[0]]
        for value, upper, lower, over, under in (
            (d["G"] @ x, d["h"], d["l"], fixed[1], fixed[2]),
            (x, d["ub"], d["lb"], fixed[3], fixed[4]),
        ):
            found += [value[k] <= upper[k] + over[k] for k in range(4) if np.isfinite(upper[k])]
            found += [value[k] >= lower[k] - under[k] for k in range(4) if np.isfinite(lower[k])]
        return found

    size = sum(cp.sum_squares(part) for part in e)
    cp.Problem(cp.Minimize(size), constraints()).solve(**ACCURATE)
    least = float(size.value)
    fixed[:] = [part.value.copy() for part in e]
    cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, cp.psd_wrap(d["P"])) + d["q"] @ x), constraints()).solve(**ACCURATE)
    return x.value, least**0.5


@pytest.mark.parametrize("solver", [None, "CLARABEL", "INTERIOR", "DAQP", "SCS"])
def test_rows_with_two_ends_and_bounds_count_alike(solver: str | None) -> None:
    data = program(3)
    x, size = program_in_two_stages({name: part.numpy() for name, part in data.items()})
    found = QPLayer(solver=solver, on_error="relax")(**data)
    np.testing.assert_allclose(found.x, x, atol=1e-5)
    violation = found.info.violation
    np.testing.assert_allclose(violation.size, size, atol=1e-6)
    # Each part says by how much its row or bound is missed, and no more.
    G, h, l = data["G"] @ found.x, data["h"], data["l"]
    np.testing.assert_allclose(violation.rows[1:], (G - h).clamp(min=0) - (l - G).clamp(min=0), atol=1e-6)
    np.testing.assert_allclose(violation.rows[:1], data["A"] @ found.x - data["b"], atol=1e-6)
    np.testing.assert_allclose(violation.lower, (data["lb"] - found.x).clamp(min=0), atol=1e-6)
    np.testing.assert_allclose(violation.upper, (found.x - data["ub"]).clamp(min=0), atol=1e-6)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_gradients_with_respect_to_bounds(rho: float) -> None:
    data = program(3)
    names = ("q", "b", "h", "l", "lb", "ub")
    layer = QPLayer(on_error="relax", gradient=ImplicitKKT(rho=rho))
    weights = torch.tensor([1.0, -2, 0.5, 0.7]).double()
    leaves = {name: data[name].clone().requires_grad_() for name in names}

    def loss(*changed: Tensor) -> Tensor:
        return layer(**(data | dict(zip(names, changed, strict=True)))).x @ weights

    gradient = torch.autograd.grad(loss(*leaves.values()), list(leaves.values()))
    if rho:  # of the problem with (ρ/2) |x - x*|², which is another derivative: that of P + ρ I
        center = layer(**data).x.detach()
        regular = QPLayer(on_error="relax", gradient=ImplicitKKT())
        data["P"], own = data["P"] + rho * torch.eye(4), leaves["q"] - rho * center

        def loss(*changed: Tensor) -> Tensor:
            return regular(**(data | dict(zip(names, changed, strict=True)))).x @ weights

        expected = torch.autograd.grad(loss(own, *list(leaves.values())[1:]), list(leaves.values()))
        for one, other in zip(gradient, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        return
    for place, name in enumerate(names):
        finite = torch.isfinite(data[name])
        for entry in finite.nonzero()[:, 0]:
            ways = [torch.zeros_like(part) for part in leaves.values()]
            ways[place][entry] = 1.0
            expected = along(loss, list(leaves.values()), ways, 1e-4)
            assert float(gradient[place][entry]) == pytest.approx(expected, rel=1e-4, abs=1e-4), (name, entry)
        assert not gradient[place][~finite].any()


def random_batch(size: int, n: int, p: int, m: int) -> dict[str, Tensor]:
    """Programs with more rows than variables: other ones are violated than at weights that the solver begins with."""
    data: dict[str, list[np.ndarray]] = {name: [] for name in ("P", "q", "A", "b", "G", "h")}
    for seed in range(size):
        rng = np.random.default_rng(seed)
        factor = rng.normal(size=(n, n))
        shapes = {"q": n, "A": (p, n), "b": p, "G": (m, n), "h": m}
        drawn = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        drawn |= {"P": factor @ factor.T / n + 0.1 * np.eye(n), "h": drawn["h"] - rng.uniform(0, 2)}
        for name, values in drawn.items():
            data[name].append(values)
    return {name: torch.from_numpy(np.stack(values)) for name, values in data.items()}


def test_violations_are_least_where_active_constraints_change_on_the_way() -> None:
    """``½|A x - b|² + ½|(G x - h)₊|² + ½|(-1 - x)₊|²`` has slope zero, and gradients are those of differences."""
    data = random_batch(40, 21, 3, 34)
    layer = QPLayer(on_error="relax")
    leaves = {name: values.clone().requires_grad_() for name, values in data.items()}

    def solve(d: dict[str, Tensor]) -> Any:
        return layer(d["P"], d["q"], A=d["A"], b=d["b"], G=d["G"], h=d["h"], lb=-1.0)

    output = solve(leaves)
    x = output.x.detach()
    equalities, rows = (torch.einsum("bij,bj->bi", data[name], x) for name in ("A", "G"))
    slope = torch.einsum("bij,bi->bj", data["A"], equalities - data["b"]) - (-1.0 - x).clamp(min=0.0)
    slope += torch.einsum("bij,bi->bj", data["G"], (rows - data["h"]).clamp(min=0.0))
    relaxed = [status is Status.RELAXED for status in output.info.statuses]
    assert sum(relaxed) > 30
    assert slope[relaxed].abs().max() < 1e-7

    rng, h = np.random.default_rng(0), 1e-5
    weights = torch.from_numpy(rng.normal(size=x.shape))
    gradients = torch.autograd.grad((weights * output.x).sum(), [leaves[name] for name in ("q", "b", "h")])
    moves = {name: torch.from_numpy(rng.normal(size=leaves[name].shape)) for name in ("q", "b", "h")}
    found = sum((gradient * moves[name]).sum(-1) for gradient, name in zip(gradients, moves, strict=True))
    sides = [
        solve(data | {name: data[name] + sign * h * move for name, move in moves.items()}).x for sign in (1.0, -1.0)
    ]
    expected = (weights * (sides[0] - sides[1])).sum(-1) / (2 * h)
    error = (found - expected).abs() / expected.abs().clamp(min=0.1 * float(expected.abs().max()))
    assert error[relaxed].quantile(0.9) < 1e-3  # a step over a kink has another derivative
    assert error[relaxed].median() < 1e-5


def test_order_of_rows_does_not_matter() -> None:
    data = program(3)
    order = torch.tensor([2, 0, 3, 1])
    there = QPLayer(on_error="relax")(**data)
    moved = QPLayer(on_error="relax")(**(data | {name: data[name][order] for name in ("G", "h", "l")}))
    torch.testing.assert_close(moved.x, there.x, rtol=0, atol=1e-8)
    torch.testing.assert_close(moved.info.violation.rows[1:], there.info.violation.rows[1:][order], rtol=0, atol=1e-8)


def test_other_elements_keep_every_bit() -> None:
    """Of a batch with shared matrices; the relaxed ones are what they are alone."""
    rng = np.random.default_rng(0)
    factor, G = torch.tensor(rng.normal(size=(4, 4))), torch.tensor(rng.normal(size=(2, 4)))
    P, q, G = factor @ factor.T + torch.eye(4), torch.tensor(rng.normal(size=(6, 4))), torch.cat([G, -G])
    h = torch.ones(6, 4, dtype=torch.float64)
    h[2, 2] = h[4, 3] = -3.0  # G x ≤ 1 and G x ≥ 3
    results = {}
    for on_error in ("relax", "nan"):
        leaves = [part.clone().requires_grad_() for part in (P, q, G, h)]
        found = QPLayer(on_error=on_error)(*leaves[:2], G=leaves[2], h=leaves[3])
        good = [0, 1, 3, 5]
        gradient = torch.autograd.grad(found.x[good].square().sum(), leaves[1:2] + leaves[3:])
        results[on_error] = (*(part[good] for part in found), *gradient)
    for one, other in zip(*results.values(), strict=True):
        assert torch.equal(one, other)
    leaves = [part.clone().requires_grad_() for part in (P, q, G, h)]
    together = QPLayer(on_error="relax")(*leaves[:2], G=leaves[2], h=leaves[3])
    assert [element for element, status in enumerate(together.info.statuses) if status is Status.RELAXED] == [2, 4]
    assert together.info.violation.size[[0, 1, 3, 5]].eq(0).all()
    total = torch.autograd.grad(together.x.sum(), leaves)
    alone = [torch.zeros_like(part) for part in leaves]
    for element in range(6):
        own = [part.detach().clone().requires_grad_() for part in (P, q[element], G, h[element])]
        single = QPLayer(on_error="relax")(*own[:2], G=own[2], h=own[3])
        torch.testing.assert_close(together.x[element], single.x, rtol=1e-9, atol=1e-9)
        for place, part in enumerate(torch.autograd.grad(single.x.sum(), own)):
            (alone[place][element] if place in (1, 3) else alone[place]).add_(part)
    for one, other in zip(total, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_unbounded_elements_remain_failures() -> None:
    c, G = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    h = torch.tensor([1.0, -3.0])  # x₁ ≤ 1 and x₁ ≥ 3; x₂ is free
    with pytest.raises(SolverError, match=r"element 1 of 2: INFEASIBLE"):
        LPLayer(on_error="relax")(c, G=G, h=h)
    found = LPLayer(on_error="relax").solve(c, G=G, h=h)
    assert found.statuses == (Status.RELAXED, Status.INFEASIBLE)
    assert float(found.x[0, 0]) == pytest.approx(2.0, abs=1e-8)
    assert float(found.violation.size[0]) == pytest.approx(2**0.5, abs=1e-8)


def test_cvxpy_layer_with_vmap_and_float32() -> None:
    x, radius = cp.Variable(2), cp.Parameter()
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - np.array([3.0, 4]))), [x[0] == 2, x[0] <= radius])
    layer = CvxpyLayer(problem, [radius], [x], on_error="relax")
    values = torch.tensor([3.0, 1.0, 0.0], requires_grad=True)
    (found,) = layer(values)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach(), torch.tensor([[2.0, 4], [1.5, 4], [1.0, 4]]), rtol=0, atol=1e-5)
    gradient = torch.autograd.grad(found[:, 0].sum(), values)[0]
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.5, 0.5]), rtol=0, atol=1e-4)
    mapped = torch.func.vmap(lambda value: layer(value)[0])(values.detach())
    torch.testing.assert_close(mapped, found.detach(), rtol=0, atol=1e-6)
    slopes = torch.func.vmap(torch.func.grad(lambda value: layer(value)[0][0]))(values.detach())
    torch.testing.assert_close(slopes, gradient, rtol=0, atol=1e-4)
    solution = layer.solve(values.detach())
    torch.testing.assert_close(
        solution.violation.size, torch.tensor([0.0, 0.5**0.5, 2**0.5]).double(), rtol=0, atol=1e-6
    )


def test_small_solutions_are_found_beside_elements_that_are_relaxed() -> None:
    """minimise Σ x subject to Σ log(x) ≥ p, w Σ x ≤ 1: x = exp(p / 3), or, at w = 2 and p = 0, there is none."""
    x, p, w = cp.Variable(3), cp.Parameter(), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum(x)), [cp.sum(cp.log(x)) >= p, w * cp.sum(x) <= 1])
    layer = CvxpyLayer(problem, [p, w], [x], on_error="relax")
    values = torch.tensor([-40.0, 0.0, -50.0], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    output = layer(values, weights)
    (gradient,) = torch.autograd.grad(output[0].sum(), values)
    assert output.info.solution.relaxed == [1]
    solved = [0, 2]
    expected = torch.exp(values.detach() / 3)
    torch.testing.assert_close(output[0][solved], expected[solved, None].expand(2, 3), rtol=1e-7, atol=0)
    torch.testing.assert_close(gradient[solved], expected[solved], rtol=1e-6, atol=0)
    assert layer.solve(values, weights).relaxed == [1]
    with torch.no_grad():
        alone = layer(values[1:2], weights[1:2])
    assert torch.equal(alone[0][0], output[0][1])
    assert torch.equal(alone.info.violation.size[0], output.info.violation.size[1])


def test_multipliers_of_relaxed_elements_have_no_gradient() -> None:
    data = program(3)
    data["q"] = data["q"].requires_grad_()
    found = QPLayer(on_error="relax")(**data)
    with pytest.warns(lpgd.LpgdWarning, match=r"multipliers of relaxed elements \[0\]"):
        found.y.sum().backward()


def test_only_conic_programs_can_be_relaxed() -> None:
    with pytest.raises(TypeError, match="closest feasible problem"):
        LPLayer(gradient=LPGD(tau=0.1), on_error="relax", integer=[0])
    with pytest.raises(TypeError, match="closest feasible problem"):
        lpgd.NodeLayer(lpgd.nodes.LeastSquares(), on_error="relax")
