"""QPLayer, LPLayer and their functions: against closed forms, finite differences and CvxpyLayer."""

from __future__ import annotations

import copy
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lpgd
from lpgd.layers import LayerOutput
from lpgd.status import Status
from tests.layer_cases import METHODS, close, leaf, normal, weighted

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")

FINE = {"eps": 1e-11}
NAMES = ("P", "q", "A", "b", "G", "h", "lb", "ub")
DIMENSIONS = dict(zip(NAMES, (2, 1, 2, 1, 2, 1, 1, 1), strict=True))
NO_CUDA = "torch.cuda.is_available() is false: this needs a CUDA device"
SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda dense: dense.to_sparse(),
    "csr": lambda dense: dense.to_sparse_csr(),
    "csc": lambda dense: dense.to_sparse_csc(),
}


def program(*batch: int, n: int = 4, m: int = 1, k: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A strictly convex, strictly feasible program with some inequalities and bounds active."""
    root, inside = normal(*batch, n, n, seed=seed), 0.2 * normal(*batch, n, seed=seed + 1)
    A, G = normal(*batch, m, n, seed=seed + 2), normal(*batch, k, n, seed=seed + 3)
    return {
        "P": root @ root.mT + torch.eye(n),
        "q": 3 * normal(*batch, n, seed=seed + 4),
        "A": A,
        "b": (A @ inside[..., None])[..., 0],
        "G": G,
        "h": (G @ inside[..., None])[..., 0] + 0.1,
        "lb": inside - 0.15,
        "ub": inside + 0.1,
    }


def solved(data: dict[str, Any], **options: Any) -> Any:
    return lpgd.solve_qp(**data, solver_args=FINE, **options)


def gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor]:
    return [part.to_dense() for part in torch.autograd.grad(weighted(outputs), leaves)]


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
    output = lpgd.solve_qp(torch.eye(5).double(), -point, ones, one, lb=0.0, solver_args=FINE)
    expected = simplex_projection(point)
    close([output.x], [expected], 1e-8)
    close(gradients([output.x], [point]), gradients([expected], [point]), 1e-7)


def test_a_linear_program_over_the_simplex_picks_the_least_cost() -> None:
    cost = leaf(normal(8, 5))
    ones, one = leaf(torch.ones(1, 5).double()), leaf(torch.ones(1).double())
    layer = lpgd.LPLayer(solver_args=FINE)
    output = layer(cost, ones, one, lb=0.0)
    least = cost.min(-1, keepdim=True).values
    close(output, [cost.eq(least).double(), -least, cost.new_zeros(8, 0), least - cost], 1e-8)
    # y = -min c: its gradient is minus the vertex; the vertex scales with b.
    expected = [-cost.eq(least).double(), torch.tensor([8.0]).double()]
    close(torch.autograd.grad(output.y.sum() + output.x.sum(), [cost, one]), expected, 1e-7)
    with pytest.warns(lpgd.LpgdWarning, match="is zero: its solution is a vertex"):
        layer(cost, ones, one, lb=0.0).x.square().sum().backward()
    layer.gradient = lpgd.LPGD(tau=10.0)
    weight = normal(5)
    (gradient,) = torch.autograd.grad((layer(cost, ones, one, lb=0.0).x * weight).sum(), cost)
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


# Sparse matrices


@pytest.mark.parametrize("layout", SPARSE)
@pytest.mark.parametrize("chosen", ["P", "A", "G", "AG", "PAG"])
def test_sparse_matrices_are_the_dense_ones_on_their_pattern(layout: str, chosen: str) -> None:
    data = program(3, n=5, m=2, k=3)
    for name, seed in (("P", 1), ("A", 2), ("G", 3)):
        data[name] = data[name][0] * (normal(*data[name].shape[1:], seed=20 + seed) > -0.5)
    data["P"] = data["P"] @ data["P"].mT + torch.eye(5)
    data["b"] = (data["A"] @ (data["lb"] + 0.1)[..., None])[..., 0]
    data["h"] = (data["G"] @ (data["lb"] + 0.1)[..., None])[..., 0] + 0.1
    dense = {name: leaf(part) for name, part in data.items()}
    mixed = {name: SPARSE[layout](part) if name in chosen else part for name, part in data.items()}
    mixed = {name: part.detach().requires_grad_() for name, part in mixed.items()}
    outputs, expected = solved(mixed), solved(dense)
    close(outputs, expected, 1e-8)
    own = torch.autograd.grad(weighted(outputs), list(mixed.values()))
    for name, one, other in zip(data, own, gradients(expected, list(dense.values())), strict=True):
        assert one.layout == mixed[name].layout
        pattern = data[name] != 0 if name in chosen else torch.ones_like(other)
        close([one.to_dense()], [other * pattern], 1e-7)


def test_the_quadratic_may_have_a_pattern_without_its_transpose() -> None:
    upper = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]).double()
    q = normal(3)
    for convert in SPARSE.values():
        P = convert(upper).requires_grad_()
        output = lpgd.solve_qp(P, q, solver_args=FINE)
        close([output.x], [torch.linalg.solve(0.5 * (upper + upper.mT), -q)], 1e-8)
        (gradient,) = torch.autograd.grad(output.x.sum(), P)
        x, adjoint = output.x.detach(), torch.linalg.solve(0.5 * (upper + upper.mT), torch.ones(3).double())
        full = -0.5 * (torch.outer(adjoint, x) + torch.outer(x, adjoint))
        close([gradient.to_dense()], [full * (upper != 0)], 1e-7)


@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "coo, patterns of their own"])
@pytest.mark.parametrize("batch", [(4,), (2, 2), (1,)])
def test_batches_of_sparse_matrices(layout: str, batch: tuple[int, ...]) -> None:
    data = program(*batch, n=5)
    mask = normal(*batch, 2, 5, seed=8) > -1 if "own" in layout else normal(2, 5, seed=8) > -1
    data["G"], data["h"] = data["G"] * mask, data["h"] + 1.0
    dense = {name: leaf(part) for name, part in data.items()}
    sparse = {**dense, "G": SPARSE[layout[:3]](data["G"]).requires_grad_()}
    outputs, expected = solved(sparse), solved(dense)
    close(outputs, expected, 1e-8)
    own = torch.autograd.grad(weighted(outputs), list(sparse.values()))
    wanted = gradients(expected, list(dense.values()))
    wanted[4] = wanted[4] * mask
    close([part.to_dense() for part in own], wanted, 1e-7)


def test_entries_that_are_stored_twice_are_added() -> None:
    indices, values = torch.tensor([[0, 0, 0], [2, 0, 2]]), torch.tensor([1.0, 2.0, 3.0]).double()
    A = torch.sparse_coo_tensor(indices, values, (1, 3), check_invariants=True).requires_grad_()
    dense = leaf(torch.tensor([[2.0, 0.0, 4.0]]).double())
    q, b = normal(3), torch.ones(1).double()
    outputs = [lpgd.solve_qp(torch.eye(3).double(), q, matrix, b, solver_args=FINE) for matrix in (A, dense)]
    close(outputs[0], outputs[1], 1e-9)
    own, expected = (torch.autograd.grad(weighted(out), m)[0] for out, m in zip(outputs, (A, dense), strict=True))
    close([own.to_dense()], [expected * torch.tensor([[1.0, 0.0, 1.0]])], 1e-8)


def test_gradients_of_sparse_leaves_accumulate() -> None:
    data = program(3)
    for convert in (SPARSE["coo"], SPARSE["csr"]):
        A = convert(data["A"][0]).requires_grad_()
        b = torch.zeros(1).double()
        for _ in range(2):
            weighted(solved({**data, "A": A, "b": b})).backward()
        dense = leaf(data["A"][0])
        (expected,) = gradients(solved({**data, "A": dense, "b": b}), [dense])
        assert A.grad is not None
        assert A.grad.layout == A.layout
        close([A.grad.to_dense()], [2 * expected], 1e-7)


# Batches

SHAPES = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3), (1, 1), (1, 3)])


@settings(max_examples=20)
@given(st.fixed_dictionaries({name: SHAPES for name in NAMES}), st.integers(0, 99), st.booleans())
def test_batches_are_loops(shapes: dict[str, tuple[int, ...]], seed: int, linear: bool) -> None:
    data = {name: leaf(part) for name, part in program(seed=seed).items()}
    data["q"] = leaf(3 * normal(*shapes["q"], 4, seed=seed))  # the rest vary little: still feasible
    for name, part in data.items():
        if name != "q":
            factor = 1 + 0.01 * normal(*shapes[name], *(1,) * DIMENSIONS[name], seed=seed + 1).abs()
            data[name] = leaf(part.detach() * factor)
    if linear:
        data["P"] = leaf(torch.zeros(*shapes["P"], 4, 4).double() + 1e-2 * torch.eye(4))
    batch = torch.broadcast_shapes(*shapes.values())
    layer = lpgd.QPLayer(solver_args=FINE)
    output = layer(**data)
    whole = {name: part.expand(*batch, *part.shape[part.ndim - DIMENSIONS[name] :]) for name, part in data.items()}
    elements = [layer(**{name: part[index] for name, part in whole.items()}) for index in np.ndindex(*batch)]
    expected = [torch.stack(parts).reshape(*batch, -1) for parts in zip(*elements, strict=True)]
    assert output.batch_shape == tuple(batch)
    close(output, expected, 1e-6)
    leaves = list(data.values())
    close(gradients(output, leaves), gradients(expected, leaves), 1e-4)


@dataclass(frozen=True)
class Counting(lpgd.Clarabel):
    """Clarabel, with a note of each set-up."""

    seen: list[int] = field(default_factory=list, compare=False)

    def prepare(self, form: Any) -> Any:
        self.seen.append(form.n)
        return super().prepare(form)


def test_shared_matrices_are_set_up_once() -> None:
    data, seen = program(), Counting().seen
    layer = lpgd.QPLayer(solver=Counting(seen=seen), executor=lpgd.SerialExecutor())
    for q in (normal(8, 4), normal(8, 4, seed=1), normal(2, 5, 4)):
        layer(**{**data, "q": q})
    assert len(seen) == 1
    data["A"] = data["A"] * torch.tensor([2.0, 3.0, 4.0]).double()[:, None, None]
    data["b"] = 0 * data["b"]
    output = layer(**{**data, "q": normal(4, 3, 4)})  # three matrices, each for four costs
    assert output.x.shape == (4, 3, 4)
    assert len(seen) == 4


@pytest.mark.parametrize("batch", [(0,), (1,), (2, 0), (1, 1)])
def test_batches_of_none_and_of_one(batch: tuple[int, ...]) -> None:
    data = {name: leaf(part.expand(*batch, *part.shape)) for name, part in program().items()}
    output = solved(data)
    assert [tuple(part.shape) for part in output] == [(*batch, 4), (*batch, 1), (*batch, 2), (*batch, 4)]
    weighted(output).backward()
    if 0 in batch:
        shared = leaf(program()["A"])
        weighted(solved({**data, "A": shared})).backward()
        assert shared.grad is not None
        assert not shared.grad.any()
    else:
        alone = {name: leaf(part) for name, part in program().items()}
        expected = gradients(solved(alone), list(alone.values()))
        close([part.grad.reshape(e.shape) for part, e in zip(data.values(), expected, strict=True)], expected, 1e-7)


def test_types_come_out_as_they_went_in() -> None:
    single = {name: leaf(part.float()) for name, part in program(2).items()}
    output = lpgd.solve_qp(**single)
    assert {part.dtype for part in output} == {torch.float32}
    assert {part.dtype for part in torch.autograd.grad(weighted(output), list(single.values()))} == {torch.float32}
    close([part.double() for part in output], lpgd.solve_qp(**{k: v.double() for k, v in single.items()}), 1e-5)
    mixed = lpgd.solve_qp(**{**single, "q": leaf(single["q"].double())})
    assert mixed.x.dtype == torch.float64
    sparse = SPARSE["csr"](single["A"].detach()[0]).requires_grad_()
    (gradient,) = torch.autograd.grad(weighted(lpgd.solve_qp(**{**single, "A": sparse, "b": single["b"] * 0})), sparse)
    assert gradient.dtype == torch.float32
    with torch.no_grad():
        assert not any(part.requires_grad for part in lpgd.solve_qp(**single))


def test_nothing_that_was_passed_in_changes() -> None:
    data = program(3)
    before = copy.deepcopy(data)
    weighted(solved({name: part.requires_grad_() for name, part in data.items()})).backward()
    close(list(data.values()), list(before.values()), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_tensors_on_a_device_stay_there() -> None:
    data = {name: leaf(part.cuda()) for name, part in program(3).items()}
    data["A"], data["b"] = SPARSE["csr"](data["A"].detach()[0]).requires_grad_(), leaf(0 * data["b"])
    output = solved(data)
    parts = [*output, *torch.autograd.grad(weighted([part.cpu() for part in output]), list(data.values()))]
    assert {part.device.type for part in parts} == {"cuda"}
    cpu = {name: leaf(part.cpu()) for name, part in data.items()}
    expected = solved(cpu)
    close([part.cpu() for part in output], expected, 1e-7)


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


# Failures


def infeasible(element: int) -> dict[str, Tensor]:
    """Three elements that share their matrices; one has a lower bound above its upper one."""
    data = {name: part if name in ("q", "lb", "ub") else part[0] for name, part in program(3).items()}
    data["lb"], data["ub"] = torch.full((3, 4), -1.0).double(), torch.full((3, 4), 1.0).double()
    data["b"], data["h"] = 0 * data["b"], data["h"].abs()
    data["lb"][element, 2] = 2.0
    return data


def test_failed_elements_are_named() -> None:
    with pytest.raises(lpgd.SolverError, match=r"element 1 of 3: INFEASIBLE") as caught:
        lpgd.solve_qp(**infeasible(1))
    assert caught.value.indices == (1,)


@pytest.mark.parametrize("cause", ["infeasible", "NaN cost", "NaN matrix", "NaN bound"])
def test_failed_elements_have_no_gradient_and_leave_the_others_exact(cause: str) -> None:
    data = infeasible(1)
    if cause != "infeasible":
        data["lb"] = torch.full((3, 4), -1.0).double()
    if cause == "NaN matrix":
        data["P"] = data["P"].expand(3, 4, 4)
    spoiled = {"NaN cost": "q", "NaN matrix": "P", "NaN bound": "ub"}.get(cause)
    if spoiled:
        data[spoiled] = data[spoiled].clone()
        data[spoiled][1].view(-1)[0] = torch.nan
    data = {name: leaf(part) for name, part in data.items()}
    output = solved(data, on_error="nan")
    assert output.info.statuses[1] is (Status.INFEASIBLE if cause == "infeasible" else Status.INVALID_DATA)
    assert all(part[1].isnan().all() for part in output)
    batched = {name: part.ndim > DIMENSIONS[name] for name, part in data.items()}
    own = torch.autograd.grad(weighted([part.nan_to_num() for part in output]), list(data.values()))
    rest = {name: leaf(part[[0, 2]] if batched[name] else part) for name, part in data.items()}
    parts = ((normal(3, *o.shape[1:], seed=k)[[0, 2]] * o).sum() for k, o in enumerate(solved(rest)))
    loss = sum(parts, torch.zeros(()))
    expected = torch.autograd.grad(loss, list(rest.values()))
    for name, one, other in zip(data, own, expected, strict=True):
        close([one[[0, 2]] if batched[name] else one], [other], 1e-6)
        if batched[name]:
            assert not one[1].any()


def test_failures_can_be_warnings() -> None:
    layer = lpgd.QPLayer(on_error="warn")
    with pytest.warns(lpgd.LpgdWarning, match="element 2 of 3: INFEASIBLE"):
        layer(**infeasible(2))
    assert layer.solve(**infeasible(2)).statuses == (Status.SOLVED, Status.SOLVED, Status.INFEASIBLE)


QP, LP = lpgd.QPLayer(), lpgd.LPLayer()
I2, V2, ROW, ONE = torch.eye(2), torch.zeros(2), torch.ones(1, 2), torch.ones(1)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "solver name": (lambda: lpgd.QPLayer("GUROBI"), ValueError, "'GUROBI' is not a solver"),
    "solver kind": (lambda: lpgd.QPLayer(3), TypeError, "solver is 3"),  # pyright: ignore[reportArgumentType]
    "option": (lambda: lpgd.QPLayer(solver_args={"epsilon": 1}), TypeError, "'epsilon' is not an option"),
    "option of a call": (lambda: QP(I2, V2, solver_args={"epsilon": 1}), TypeError, "'epsilon' is not an option"),
    "on_error": (lambda: lpgd.LPLayer(on_error="skip"), ValueError, "'skip'.*raise, nan, warn"),  # pyright: ignore[reportArgumentType]
    "executor": (lambda: lpgd.LPLayer(executor=4), TypeError, "concurrent.futures.Executor"),  # pyright: ignore[reportArgumentType]
    "gradient": (lambda: lpgd.QPLayer(gradient=lpgd.LPGD), TypeError, "gradient method such as"),  # pyright: ignore[reportArgumentType]
    "no quadratic": (lambda: QP(None, V2), TypeError, "P is a NoneType; pass a torch tensor"),
    "not square": (lambda: QP(ROW, V2), ValueError, r"P has shape \(1, 2\); expected \(\*batch, 2, 2\)"),
    "flat": (lambda: QP(V2, V2), ValueError, r"P has shape \(2,\); expected \(\*batch, 2, 2\)"),
    "no cost": (lambda: QP(I2, ONE[0]), ValueError, r"q has shape \(\); expected \(\*batch, n\)"),
    "empty": (lambda: LP(torch.zeros(0)), ValueError, r"c has shape \(0,\): there is nothing"),
    "cost": (lambda: LP([1.0, 2.0]), TypeError, "c is a list; pass a torch tensor"),
    "columns": (
        lambda: QP(I2, V2, torch.ones(1, 3), ONE),
        ValueError,
        r"A has shape \(1, 3\); expected \(.*, 2\)",
    ),
    "flat rows": (lambda: QP(I2, V2, V2, ONE), ValueError, r"A has shape \(2,\); expected \(\*batch, m, 2\)"),
    "rows": (lambda: QP(I2, V2, G=ROW, h=V2), ValueError, r"h has shape \(2,\); expected \(\*batch, 1\)"),
    "A alone": (lambda: QP(I2, V2, ROW), ValueError, "A is given but b is not"),
    "b alone": (lambda: QP(I2, V2, b=ONE), ValueError, "b is given but A is not"),
    "G alone": (lambda: LP(V2, G=ROW), ValueError, "G is given but h is not"),
    "h alone": (lambda: LP(V2, h=ONE), ValueError, "h is given but G is not"),
    "bound": (lambda: LP(V2, lb=torch.zeros(3)), ValueError, r"lb has shape \(3,\); expected \(\*batch, 2\)"),
    "bound kind": (lambda: LP(V2, ub="1"), TypeError, "ub is a str"),
    "bound switch": (lambda: LP(V2, ub=True), TypeError, "ub is a bool"),
    "integers": (lambda: LP(torch.tensor([1, 2])), TypeError, "c is torch.int64; it must be float32 or float64"),
    "half": (lambda: QP(I2.half(), V2), TypeError, "P is torch.float16"),
    "numpy": (lambda: QP(np.eye(2), V2), TypeError, "P is a ndarray; pass a torch tensor"),
    "devices": (lambda: QP(I2.to("meta"), V2), ValueError, "q on cpu, P on meta.*move them to one"),
    "batches": (
        lambda: QP(torch.ones(3, 2, 2), torch.ones(4, 2)),
        ValueError,
        r"broadcast: q \(4,\), P \(3,\)",
    ),
    "sparse vector": (lambda: QP(I2, V2.to_sparse()), TypeError, "q is torch.sparse_coo; pass a dense tensor"),
    "layout": (lambda: QP(I2.to_sparse_bsr((1, 1)), V2), TypeError, "P is torch.sparse_bsr; pass a dense, COO, CSR"),
    "hybrid": (lambda: QP(torch.ones(3, 2, 2).to_sparse(2), V2), ValueError, "P is a hybrid tensor with 1 dense dim"),
    "warm start": (lambda: QP(I2, V2, warm_start="yes"), TypeError, "str; it takes True, an output or a Solution"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_errors_name_what_is_wrong(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        call()


# The layer as an object


def test_outputs_are_named_tuples_with_a_record() -> None:
    data = program(3)
    output = lpgd.QPLayer(solver_args=FINE)(**{**data, "q": leaf(data["q"])})
    assert output._fields == ("x", "y", "z", "z_box")
    assert isinstance(output, tuple)
    assert not isinstance(output, LayerOutput)
    assert output.info.statuses == (Status.SOLVED,) * 3
    assert float(output.info.solution.residuals.worst.max()) < 1e-8
    output.x.sum().backward()
    assert output.info.gradients[0].counts == {"implicit": 3}


def test_two_calls_before_a_backward() -> None:
    cases = [{name: leaf(part) for name, part in program(3, seed=10 * k).items()} for k in range(2)]
    layer = lpgd.QPLayer(solver_args=FINE)
    outputs = [layer(**case) for case in cases]
    for case, output in zip(cases, outputs, strict=True):
        expected = gradients(solved(case), list(case.values()))
        close(gradients(output, list(case.values())), expected, 1e-8)


def copies(layer: lpgd.QPLayer) -> Iterator[lpgd.QPLayer]:
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))


def test_copies_work_also_after_calls() -> None:
    data = program(3)
    layer = lpgd.QPLayer("SCS", lpgd.LPGD(tau=1e-3), {"eps": 1e-9}, "nan", lpgd.SerialExecutor())
    expected = layer(**data, warm_start=True)
    for duplicate in copies(layer):
        assert (duplicate.gradient, duplicate.solver, duplicate.on_error) == (layer.gradient, layer.solver, "nan")
        close(duplicate(**data, warm_start=True), expected, 1e-6)
        close(duplicate(**data, warm_start=expected), expected, 1e-6)
    (left_open, _) = copies(lpgd.QPLayer(solver_args={"eps": 1e-9}))
    assert left_open.solver is None
    solution = left_open(**data).info.solution
    assert solution is not None
    assert solution.residuals.worst.max() < 1e-7


def test_threads_share_a_layer() -> None:
    layer = lpgd.QPLayer("SCS", solver_args={"eps": 1e-10})
    cases = [{name: leaf(part) for name, part in program(k + 1, seed=10 * k).items()} for k in range(4)]
    expected = [layer(**case) for case in cases]
    results: dict[int, list[Any]] = {}
    barrier = threading.Barrier(len(cases))

    def work(k: int) -> None:
        barrier.wait()
        for _ in range(3):
            results[k] = [layer(**cases[k], warm_start=True)]
        results[k].append(gradients(results[k][0], list(cases[k].values())))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, wanted in enumerate(expected):
        close(results[k][0], wanted, 1e-6)
        close(results[k][1], gradients(wanted, list(cases[k].values())), 1e-4)


def test_the_solver_can_be_replaced() -> None:
    data = program(2)
    layer = lpgd.QPLayer()
    expected = layer(**data)
    assert layer.solver is None
    assert "chosen" in repr(layer)
    for solver in ("SCS", lpgd.ECOS()):
        layer.solver = solver
        close(layer(**data), expected, 1e-4)
        assert layer.solver is not None
        assert layer.solver.name in repr(layer)
    with pytest.raises(ValueError, match="'GLPK' is not a solver"):
        layer.solver = "GLPK"
    layer.solver = None
    close(layer(**data, solver_args={"solve_method": "ECOS", "eps": 1e-9}), expected, 1e-5)
    with pytest.raises(lpgd.SolverError, match="ITERATION_LIMIT"):
        layer(**data, solver_args={"max_iters": 2})
    close(layer(**data), expected, 0.0)


def test_options_without_a_solver_reach_the_one_that_is_chosen() -> None:
    layer = lpgd.QPLayer(solver_args={"max_iters": 2})
    with pytest.raises(lpgd.SolverError, match="ITERATION_LIMIT"):
        layer(**program())
    layer(**program(), solver_args={"max_iters": 100})


def test_warm_starts_save_iterations_and_change_nothing() -> None:
    data = program(4, seed=30)
    layer = lpgd.QPLayer("SCS", solver_args={"eps": 1e-10})
    cold = layer(**data)
    for previous in (True, cold, cold.info.solution, layer.solve(**data)):
        warm = layer(**data, warm_start=previous)
        close(warm, cold, 1e-6)
        assert warm.info.solution is not None
        assert cold.info.solution is not None
        assert warm.info.solution.iterations.max() < cold.info.solution.iterations.min()
    assert lpgd.solve_qp(**data, solver="SCS", warm_start=cold).info.solution.iterations.max() <= 25
    other = program(4, seed=30, k=3)
    close(layer(**other, warm_start=True), solved(other), 1e-6)  # of another structure: not used
    with pytest.raises(ValueError, match=r"4 variables and 4 rows.*same structure"):
        layer(**other, warm_start=cold)


def test_solve_hands_out_the_whole_answer() -> None:
    data = program(2, 3)
    data["q"].requires_grad_()
    solution, output = lpgd.QPLayer(solver_args=FINE).solve(**data), solved(data)
    close([solution.x.reshape(2, 3, 4), solution.z.reshape(2, 3, 4)], [output.x.detach(), output.z_box.detach()], 1e-9)
    close([solution.y.reshape(2, 3, 3)], [torch.cat([output.y, output.z], -1).detach()], 1e-9)
    assert not solution.x.requires_grad
    assert lpgd.LPLayer().solve(-torch.ones(2, 3), lb=0.0, ub=1.0).statuses == (Status.SOLVED,) * 2


def test_an_exact_gradient_of_a_moving_solution_does_not_warn() -> None:
    data = {name: leaf(part) for name, part in program(3).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighted(solved(data)).backward()
