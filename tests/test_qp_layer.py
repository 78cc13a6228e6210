"""QPLayer, LPLayer and their functions: against closed forms, finite differences and CvxpyLayer."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from tests.layer_cases import METHODS, close, leaf, normal, weighted
from tests.program_cases import FINE, NAMES, gradients, program, solved

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")

# Closed forms


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_an_equality_program_is_a_linear_system(batch: tuple[int, ...]) -> None:
    data = {name: leaf(part) for name, part in program(*batch, n=5, m=2).items() if name in ("P", "q", "A", "b")}
    P, q, A, b = data.values()
    zero = torch.zeros(*batch, 2, 2, dtype=torch.float64)
    system = torch.cat([torch.cat([0.5 * (P + P.mT), A.mT], -1), torch.cat([A, zero], -1)], -2)
    expected = torch.linalg.solve(system, torch.cat([-q, b], -1)[..., None])[..., 0].split((5, 2), -1)
    output = solved(data)
    close(output[:2], expected, 1e-8)
    assert output.z.shape == (*batch, 0)
    assert output.z_box.shape == (*batch, 5)
    assert not output.z_box.any()
    leaves = list(data.values())
    close(gradients(output[:2], leaves), gradients(expected, leaves), 1e-7)


def test_projection_onto_a_box_clamps() -> None:
    point, lb, ub = leaf(2 * normal(6, 4)), leaf(-normal(6, 4, seed=1).abs()), leaf(normal(4, seed=2).abs())
    expected = torch.minimum(torch.maximum(point, lb), ub)
    output = lpgd.solve_qp(torch.eye(4).double(), -point, lb=lb, ub=ub, solver_args=FINE)
    box = point - expected  # P x + q + z_box = 0
    close([output.x, output.z_box], [expected, box], 1e-8)
    leaves = [point, lb, ub]
    close(gradients([output.x, output.z_box], leaves), gradients([expected, box], leaves), 1e-7)


def simplex_projection(point: Tensor) -> Tensor:
    ordered = point.sort(-1, descending=True).values
    level = (ordered.cumsum(-1) - 1) / torch.arange(1, point.shape[-1] + 1)
    active = (ordered > level).sum(-1, keepdim=True)
    return torch.relu(point - level.gather(-1, active - 1))


def test_projection_onto_the_simplex() -> None:
    point = leaf(normal(7, 5))
    ones, one = torch.ones(1, 5).double(), torch.ones(1).double()
    output = lpgd.solve_qp(torch.eye(5).double(), -point, A=ones, b=one, lb=0.0, solver_args=FINE)
    expected = simplex_projection(point)
    close([output.x], [expected], 1e-8)
    close(gradients([output.x], [point]), gradients([expected], [point]), 1e-7)


def test_a_linear_program_over_the_simplex_picks_the_least_cost() -> None:
    cost = leaf(normal(8, 5))
    ones, one = leaf(torch.ones(1, 5).double()), leaf(torch.ones(1).double())
    layer = lpgd.LPLayer(solver_args=FINE)
    output = layer(cost, A=ones, b=one, lb=0.0)
    least = cost.min(-1, keepdim=True).values
    close(output, [cost.eq(least).double(), -least, cost.new_zeros(8, 0), least - cost], 1e-8)
    # y = -min c: its gradient is minus the vertex; the vertex scales with b.
    expected = [-cost.eq(least).double(), torch.tensor([8.0]).double()]
    close(torch.autograd.grad(output.y.sum() + output.x.sum(), [cost, one]), expected, 1e-7)
    with pytest.warns(lpgd.LpgdWarning, match="is zero: its solution is a vertex"):
        layer(cost, A=ones, b=one, lb=0.0).x.square().sum().backward()
    layer.gradient = lpgd.LPGD(tau=10.0)
    weight = normal(5)
    (gradient,) = torch.autograd.grad((layer(cost, A=ones, b=one, lb=0.0).x * weight).sum(), cost)
    plus, minus = (torch.nn.functional.one_hot((cost + s * weight).argmin(-1), 5) for s in (10.0, -10.0))
    close([gradient], [(plus - minus).double() / 20.0], 1e-8)


@pytest.mark.parametrize("linear", [False, True])
def test_optimality_conditions_with_the_documented_signs(linear: bool) -> None:
    data = program(5)
    if linear:
        P, data["c"] = 0.0 * data.pop("P"), data.pop("q")
        output = lpgd.solve_lp(**data, solver_args=FINE)
        q = data["c"]
    else:
        output, P, q = solved(data), data["P"], data["q"]
    x, y, z, box = (part[..., None] for part in output)
    stationary = (P @ x + data["A"].mT @ y + data["G"].mT @ z + box)[..., 0] + q
    close([stationary, (data["A"] @ x)[..., 0]], [torch.zeros_like(q), data["b"]], 1e-7)
    room = data["h"] - (data["G"] @ x)[..., 0]
    assert min(room.min(), output.z.min()) > -1e-8
    close([output.z * room], [torch.zeros_like(room)], 1e-7)
    close([box[..., 0].clamp(min=0) * (data["ub"] - output.x)], [torch.zeros_like(q)], 1e-7)
    close([(-box[..., 0]).clamp(min=0) * (output.x - data["lb"])], [torch.zeros_like(q)], 1e-7)
    assert box.max() > 0.1
    assert box.min() < -0.1


# Gradients


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output", range(4), ids=["x", "y", "z", "z_box"])
def test_exact_gradients_are_finite_differences(name: str, output: int) -> None:
    data = program(2)
    layer = lpgd.QPLayer(solver_args=FINE)

    def function(value: Tensor) -> Tensor:
        return layer(**{**data, name: value})[output]

    assert torch.autograd.gradcheck(function, leaf(data[name]), eps=1e-5, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [lpgd.LPGD(), lpgd.Domke()], ids=repr)
def test_small_steps_approach_finite_differences(method: lpgd.LPGD) -> None:
    data = {name: leaf(part) for name, part in program(3).items()}
    layer = lpgd.QPLayer(gradient=method, solver_args=FINE)
    exact = gradients(lpgd.QPLayer(solver_args=FINE)(**data), list(data.values()))
    close(gradients(layer(**data), list(data.values())), exact, 1e-4)


def test_only_the_symmetric_part_of_the_quadratic_counts() -> None:
    data = program(3)
    skew = normal(4, 4, seed=9)
    turned = leaf(data["P"] + skew - skew.mT)
    straight = leaf(data["P"])
    outputs = [solved({**data, "P": P}) for P in (turned, straight)]
    close(outputs[0], outputs[1], 1e-9)
    (one,), (other,) = (gradients(out, [P]) for out, P in zip(outputs, (turned, straight), strict=True))
    close([one, one], [other, one.mT], 1e-8)


@pytest.mark.parametrize("solver", [None, "CLARABEL", "SCS", "ECOS"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_agrees_with_the_same_problem_in_cvxpy(method: lpgd.LPGD, solver: str | None) -> None:
    data = {name: leaf(part) for name, part in program(3).items()}
    shapes = {name: part.shape[1:] for name, part in data.items()}
    p = {name: cp.Parameter(shape, PSD=name == "P") for name, shape in shapes.items()}
    x = cp.Variable(4)
    constraints = [p["A"] @ x == p["b"], p["G"] @ x <= p["h"], x >= p["lb"], x <= p["ub"]]
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, p["P"]) + p["q"] @ x), constraints)
    variables = [x, *(constraint.dual_variables[0] for constraint in constraints)]
    options: dict[str, Any] = {"gradient": method, "solver": solver, "solver_args": {"eps": 1e-9}}
    theirs = lpgd.CvxpyLayer(problem, list(p.values()), variables, **options)(*data.values())
    expected = [*theirs[:3], theirs[4] - theirs[3]]
    output = lpgd.QPLayer(**options)(**data)
    close(output, expected, 1e-5)
    leaves = list(data.values())
    close(gradients(output, leaves), gradients(expected, leaves), 2e-4 if solver == "SCS" else 2e-5)


def test_forward_mode_and_function_transforms() -> None:
    data = program(3)

    def loss(q: Tensor, A: Tensor) -> Tensor:
        return weighted(solved({**data, "q": q, "A": A}))

    point, tangent = (data["q"], data["A"]), (normal(3, 4, seed=5), normal(3, 1, 4, seed=6))
    _, forward = torch.func.jvp(loss, point, tangent)
    reverse = torch.func.grad(loss, (0, 1))(*point)
    expected = sum(((g * t).sum() for g, t in zip(reverse, tangent, strict=True)), torch.zeros(()))
    close([forward], [expected], 1e-8)
    step = 1e-5
    up, down = (loss(*(p + s * t for p, t in zip(point, tangent, strict=True))) for s in (step, -step))
    close([forward], [(up - down) / (2 * step)], 1e-5)


# Bounds


def test_bounds_are_numbers_tensors_or_absent() -> None:
    data = program(3)
    free = {name: part for name, part in data.items() if name not in ("lb", "ub")}
    expected = solved({**free, "lb": torch.full((4,), -0.5).double(), "ub": torch.full((3, 4), torch.inf).double()})
    scalar = leaf(torch.tensor(-0.5).double())
    ways: list[dict[str, Any]] = [
        {"lb": -0.5},
        {"lb": -0.5, "ub": float("inf")},
        {"lb": scalar},
        {"lb": scalar, "ub": None},
    ]
    for bounds in ways:
        output = solved({**free, **bounds})
        close(output, expected, 1e-7)
    alone = {"P": data["P"], "q": data["q"]}
    close(solved({**alone, "lb": 0}), solved({**alone, "lb": torch.zeros(4).double()}), 1e-9)
    (gradient,) = torch.autograd.grad(solved({**free, "lb": scalar}).x.sum(), scalar)
    step = 1e-5
    up, down = (solved({**free, "lb": -0.5 + s}).x.sum() for s in (step, -step))
    assert abs(gradient) > 0.01
    close([gradient], [(up - down) / (2 * step)], 1e-5)


def test_infinite_bounds_are_data() -> None:
    data = program(4)
    mask = normal(4, 4, seed=11) > 0
    data["ub"] = torch.where(mask, torch.inf, data["ub"])
    data["lb"] = torch.where(normal(4, 4, seed=12) > 0, -torch.inf, data["lb"])
    upper = leaf(data["ub"])
    output = solved({**data, "ub": upper})
    assert (output.z_box[mask] <= 1e-9).all()
    (gradient,) = torch.autograd.grad(weighted(output), upper)
    assert not gradient[mask].any()
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_number_stands_for_a_vector_of_it(dtype: torch.dtype) -> None:
    """Of ``½|x|² - <q, x>`` with ``-1 ≤ <1, x> ≤ 1`` the solution is q less its mean excess."""
    q = torch.tensor([[2.0, 1.0], [-2.0, -3.0]], dtype=dtype)
    end = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    eye, ones = torch.eye(2, dtype=dtype), torch.ones(1, 2, dtype=dtype)
    expected = q - 0.5 * (q.sum(-1, keepdim=True) - torch.tensor([[1.0], [-1.0]], dtype=dtype))
    layer = lpgd.QPLayer()
    for h, l in ((1, -1), (end, -end), (np.float32(1.0), torch.full((1,), -1.0, dtype=dtype))):
        output = layer(eye, -q, G=ones, h=h, l=l)
        assert output.x.dtype == dtype
        torch.testing.assert_close(output.x, expected)
    layer(eye, -q, G=ones, h=end).x.sum().backward()  # the first element alone is held, with <1, x> = h
    torch.testing.assert_close(end.grad, torch.ones((), dtype=dtype))
    equal = layer(eye, -q, A=ones, b=1.0).x.sum(-1)
    torch.testing.assert_close(equal, torch.ones(2, dtype=dtype))
