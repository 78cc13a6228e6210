"""ConicLayer: against closed forms, finite differences, CvxpyLayer and QPLayer."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lpgd
from lpgd.status import Status
from tests.layer_cases import close, leaf, normal, weighted

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")

FINE = {"eps": 1e-10}
# SCS ends on the boundary of a curved cone, where solutions have its tolerance; Clarabel inside, with its root.
ON_THE_BOUNDARY: dict[str, Any] = {"solver": "SCS", "solver_args": {"eps": 1e-10}}


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor]:
    return [part.to_dense() for part in torch.autograd.grad(weighted(outputs), leaves, retain_graph=True)]


# Closed forms


def test_projection_onto_the_second_order_cone() -> None:
    point = leaf(normal(9, 4))
    output = lpgd.solve_conic(
        eye(4), -point, -eye(4), torch.zeros(4).double(), lpgd.Cones(second_order=(4,)), **ON_THE_BOUNDARY
    )
    t, u = point[:, :1], point[:, 1:]
    norm = u.norm(dim=-1, keepdim=True)
    edge = 0.5 * (t + norm) * torch.cat([torch.ones_like(t), u / norm], -1)
    projected = torch.where(norm <= t, point, torch.where(norm <= -t, 0.0, edge))
    expected = [projected, projected - point, projected]
    assert {bool(inside) for inside in (norm <= t)} == {True, False}
    close(output, expected, 1e-7)
    close(gradients(output, [point]), gradients(expected, [point]), 1e-6)


def test_projection_onto_the_semidefinite_cone() -> None:
    rows, columns = np.tril_indices(3)
    order = np.lexsort((rows, columns))  # svec: the lower triangle, column by column
    rows, columns = rows[order], columns[order]
    scale = torch.from_numpy(np.where(rows == columns, 1.0, np.sqrt(2.0)))
    matrix = leaf(normal(5, 3, 3))
    symmetric = 0.5 * (matrix + matrix.mT)
    output = lpgd.solve_conic(
        eye(6),
        -symmetric[:, rows, columns] * scale,
        -eye(6),
        torch.zeros(6).double(),
        lpgd.Cones(semidefinite=(3,)),
        **ON_THE_BOUNDARY,
    )
    values, vectors = torch.linalg.eigh(symmetric)
    positive = (vectors * values.clamp(min=0)[:, None, :]) @ vectors.mT
    expected = [part[:, rows, columns] * scale for part in (positive, positive - symmetric, positive)]
    close(output, expected, 1e-6)
    close(gradients(output, [matrix]), gradients(expected, [matrix]), 1e-6)


def test_entropy_over_the_simplex_is_softmax() -> None:
    # minimise <c, x> + Σ t  s.t.  Σ x = 1,  (-t, x, 1) ∈ K_exp:  x exp(-t / x) ≤ 1, that is t ≥ x log x
    n = 3
    cost = leaf(normal(4, n))
    cones = lpgd.Cones(zero=1, exponential=n)
    A, b = torch.zeros(cones.rows, 2 * n).double(), torch.zeros(cones.rows).double()
    A[0, :n], b[0] = 1.0, 1.0
    for i in range(n):
        A[1 + 3 * i, n + i], A[2 + 3 * i, i], b[3 + 3 * i] = 1.0, -1.0, 1.0
    q = torch.cat([cost, torch.ones_like(cost)], -1)
    expected = torch.softmax(-cost, -1)
    for convert in (Tensor.to_dense, Tensor.to_sparse_csr):
        output = lpgd.solve_conic(None, q, convert(A), b, cones, solver="ECOS", solver_args=FINE)
        close([output.x[:, :n]], [expected], 1e-6)
        close([output.y[:, 0]], [torch.logsumexp(-cost, -1) - 1.0], 1e-6)
        close(gradients([output.x[:, :n]], [cost]), gradients([expected], [cost]), 1e-6)


# Finite differences and CVXPY

CONES = {
    "second-order": lpgd.Cones(zero=1, nonnegative=1, second_order=(3,)),
    "semidefinite": lpgd.Cones(nonnegative=1, semidefinite=(2,)),
    "exponential": lpgd.Cones(exponential=1),
    "power": lpgd.Cones(zero=1, power=(0.3,)),
}
INSIDE = {
    "zero": [0.0],
    "nonnegative": [0.2],
    "second-order": [1.0, 0.5, 0.3],
    "semidefinite": [1.0, 0.2, 0.8],
    "exponential": [0.1, 1.0, 2.0],
    "power": [1.0, 1.0, 0.3],
}


def conic(name: str, *batch: int, n: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """A strictly convex program, strictly feasible, whose curved cone is active."""
    cones, root = CONES[name], normal(*batch, n, n, seed=seed)
    A, x = normal(*batch, cones.rows, n, seed=seed + 1), 0.3 * normal(*batch, n, seed=seed + 2)
    inside = INSIDE["zero"] * cones.zero + INSIDE["nonnegative"] * cones.nonnegative + INSIDE[name]
    return {
        "P": root @ root.mT + 0.5 * torch.eye(n),
        "q": 4 * normal(*batch, n, seed=seed + 3),
        "A": A,
        "b": (A @ x[..., None])[..., 0] + torch.tensor(inside).double(),
    }


@pytest.mark.parametrize("datum", ["P", "q", "A", "b"])
@pytest.mark.parametrize("name", CONES)
def test_exact_gradients_are_finite_differences(name: str, datum: str) -> None:
    data = conic(name, 2)
    layer = lpgd.ConicLayer(CONES[name], **ON_THE_BOUNDARY)
    assert layer(**data).y[:, -3:].abs().amax(-1).max() > 1e-2  # the curved cone is active

    def function(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(**{**data, datum: value}))

    assert torch.autograd.gradcheck(function, leaf(data[datum]), eps=1e-4, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-2)], ids=repr)
def test_agrees_with_the_same_problem_in_cvxpy(method: lpgd.LPGD) -> None:
    data = {name: leaf(part) for name, part in conic("second-order", 3).items()}
    x = cp.Variable(4)
    p = {name: cp.Parameter(part.shape[1:], PSD=name == "P") for name, part in data.items()}
    slack = p["b"] - p["A"] @ x
    constraints = [slack[0] == 0, slack[1] >= 0, cp.SOC(slack[2], slack[3:])]
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, p["P"]) + p["q"] @ x), constraints)
    theirs = lpgd.CvxpyLayer(problem, list(p.values()), [x], gradient=method, solver_args=FINE)(*data.values())
    output = lpgd.ConicLayer(CONES["second-order"], gradient=method, solver_args=FINE)(**data)
    close([output.x], theirs, 1e-6)
    leaves = list(data.values())
    close(gradients([output.x], leaves), gradients(theirs, leaves), 1e-4)


def test_the_conic_form_of_a_quadratic_program() -> None:
    data = {name: leaf(part) for name, part in conic("second-order", 3).items()}
    cones, leaves = lpgd.Cones(zero=1, nonnegative=4), list(data.values())
    output = lpgd.solve_conic(**data, cones=cones, solver_args=FINE)
    A, b = data["A"], data["b"]
    expected = lpgd.solve_qp(data["P"], data["q"], A=A[:, :1], b=b[:, :1], G=A[:, 1:], h=b[:, 1:], solver_args=FINE)
    wanted = [expected.x, torch.cat([expected.y, expected.z], -1)]
    close(output[:2], wanted, 1e-8)
    close(gradients(output[:2], leaves), gradients(wanted, leaves), 1e-7)
    slack = b - (A @ expected.x[..., None])[..., 0]
    close([output.s], [slack], 1e-8)
    close(gradients([output.s], leaves), gradients([slack], leaves), 1e-7)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_sparse_csc"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_sparse_matrices_are_the_dense_ones(layout: str, batch: tuple[int, ...]) -> None:
    data = conic("second-order", *batch)
    q = normal(2, 4)
    dense = {name: leaf(part) for name, part in data.items()}
    sparse = {name: getattr(data[name], layout)().requires_grad_() for name in "PA"}
    outputs = [
        lpgd.solve_conic(**{**dense, **other, "q": q}, cones=CONES["second-order"], solver_args=FINE)
        for other in (sparse, {})
    ]
    close(*outputs, 1e-9)
    own = torch.autograd.grad(weighted(outputs[0]), list(sparse.values()))
    assert {part.layout for part in own} == {part.layout for part in sparse.values()}
    expected = gradients(outputs[1], [dense["P"], dense["A"]])
    close([part.to_dense() for part in own], expected, 1e-7)


@pytest.mark.parametrize("solver", [None, "CLARABEL", "SCS", "ECOS", "MOREAU"])
@pytest.mark.parametrize("cones", [lpgd.Cones(zero=1, nonnegative=1), lpgd.Cones(zero=1, second_order=(2,))], ids=repr)
def test_equations_without_entries(solver: str | None, cones: lpgd.Cones) -> None:
    """``0ᵀx = 0`` on a sparse pattern says nothing: x is the projection of 1 onto x ≤ ½, which q does not move."""
    pytest.importorskip("ecos" if solver == "ECOS" else "moreau" if solver == "MOREAU" else "clarabel")
    eye = torch.eye(1, dtype=torch.float64)
    A, b = torch.zeros(cones.rows, 1, dtype=torch.float64), torch.zeros(cones.rows, dtype=torch.float64)
    A[1], b[1] = 1.0, 0.5
    q = leaf(-eye[0])
    output = lpgd.solve_conic(eye, q, A.to_sparse(), b, cones, solver=solver)
    close([output.x, *torch.autograd.grad(output.x.sum(), q)], [0.5 * eye[0], 0 * q], 1e-6)


@pytest.mark.parametrize("solver", [None, "CLARABEL", "SCS", "ECOS", "MOREAU"])
def test_cones_without_entries(solver: str | None) -> None:
    """A sparse A without entries leaves constants in K, whatever x is; where -q is no force of A, x has no bound."""
    pytest.importorskip("ecos" if solver == "ECOS" else "moreau" if solver == "MOREAU" else "clarabel")
    cones, eye = lpgd.Cones(second_order=(2,)), torch.eye(2, dtype=torch.float64)
    A, b = torch.zeros(2, 2, dtype=torch.float64).to_sparse(), torch.tensor([1.0, 0.5], dtype=torch.float64)
    output = lpgd.solve_conic(eye, eye[0], A, b, cones, solver=solver)
    close([output.x, output.s], [-eye[0], b], 1e-6)
    layer = lpgd.ConicLayer(cones, solver=solver, on_error="nan")
    assert layer(None, eye, A, b).info.statuses == (lpgd.Status.UNBOUNDED,) * 2


SHAPES = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3)])


@settings(max_examples=10)
@given(st.fixed_dictionaries({name: SHAPES for name in "PqAb"}), st.integers(0, 20))
def test_batches_are_loops(shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    dimensions = {"P": 2, "q": 1, "A": 2, "b": 1}
    data = {}
    for name, part in conic("second-order", seed=seed).items():
        factor = 1 + 0.01 * normal(*shapes[name], *(1,) * dimensions[name], seed=seed)
        data[name] = leaf(part * factor)
    batch = torch.broadcast_shapes(*shapes.values())
    layer = lpgd.ConicLayer(CONES["second-order"], solver_args=FINE)
    output = layer(**data)
    whole = {name: part.expand(*batch, *part.shape[part.ndim - dimensions[name] :]) for name, part in data.items()}
    elements = [layer(**{name: part[index] for name, part in whole.items()}) for index in np.ndindex(*batch)]
    expected = [torch.stack(parts).reshape(*batch, -1) for parts in zip(*elements, strict=True)]
    close(output, expected, 1e-6)
    close(gradients(output, list(data.values())), gradients(expected, list(data.values())), 1e-3)


# Failures


@pytest.mark.parametrize("on_error", ["nan", "warn"])
def test_failed_elements_have_no_gradient_also_through_the_slack(on_error: Any) -> None:
    # minimise x  s.t.  x ≥ l,  x ≤ 1:  the second of three is infeasible; A and b's second row are shared
    A = leaf(torch.tensor([[-1.0], [1.0]]).double())
    b = leaf(torch.tensor([[-0.5, 1.0], [-2.0, 1.0], [0.25, 1.0]]).double())
    q = torch.ones(1).double()
    layer = lpgd.ConicLayer(lpgd.Cones(nonnegative=2), on_error=on_error, solver_args=FINE)
    if on_error == "warn":
        with pytest.warns(lpgd.LpgdWarning, match="element 1 of 3: INFEASIBLE"):
            output = layer(None, q, A, b)
    else:
        output = layer(None, q, A, b)
        assert all(part[1].isnan().all() for part in output)
    assert output.info.statuses[1] is Status.INFEASIBLE
    assert (output.s[1].isnan() == output.x[1].isnan()).all()
    A_gradient, b_gradient = torch.autograd.grad(output.s.nansum() + (1e3 * output.s[1]).sum(), [A, b])
    # Where solved, x = b_0 / A_0 and s = (0, b_1 - A_1 x).
    close([output.s[[0, 2]]], [torch.tensor([[0.0, 0.5], [0.0, 1.25]]).double()], 1e-8)
    close([b_gradient], [torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).double()], 1e-7)
    close([A_gradient], [torch.tensor([[-0.25], [-0.25]]).double()], 1e-7)


def test_a_program_without_a_solution_is_named() -> None:
    with pytest.raises(lpgd.SolverError, match="UNBOUNDED"):
        lpgd.solve_conic(None, torch.ones(1), torch.ones(1, 1), torch.ones(1), lpgd.Cones(nonnegative=1))


LAYER, CALL = lpgd.ConicLayer(lpgd.Cones(second_order=(3,))), (None, torch.ones(2), torch.ones(3, 2), torch.ones(3))
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "cones": (lambda: lpgd.ConicLayer({"zero": 1}), TypeError, r"give the sizes as lpgd\.Cones"),  # pyright: ignore[reportArgumentType]
    "solver": (
        lambda: lpgd.ConicLayer(lpgd.Cones(semidefinite=(2,)), "ECOS"),
        ValueError,
        "ECOS has no semidefinite cone; installed solvers.*CLARABEL",
    ),
    "rows": (
        lambda: LAYER(None, torch.ones(2), torch.ones(4, 2), torch.ones(4)),
        ValueError,
        r"A has shape \(4, 2\); exp",
    ),
    "vector": (lambda: LAYER(*CALL[:3], torch.ones(4)), ValueError, r"b has shape \(4,\); expected \(\*batch, 3\)"),
    "columns": (lambda: LAYER(None, torch.ones(3), *CALL[2:]), ValueError, r"A has shape \(3, 2\); expected .* 3, 3\)"),
    "quadratic": (lambda: LAYER(torch.ones(2), *CALL[1:]), ValueError, r"P has shape \(2,\); expected \(\*batch, 2, 2"),
    "nothing": (lambda: LAYER(*CALL[:2], None, CALL[3]), TypeError, "A is None; pass a torch tensor of shape"),
    "empty": (lambda: LAYER(None, torch.ones(0), *CALL[2:]), ValueError, "nothing to solve for"),
    "option": (lambda: LAYER(*CALL, solver_args={"epsilon": 1}), TypeError, "'epsilon' is not an option"),
    "warm start": (lambda: LAYER(*CALL, warm_start=1), TypeError, "int; it takes True"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_errors_name_what_is_wrong(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        call()


def test_the_layer_as_an_object() -> None:
    data = conic("second-order", 2)
    layer = lpgd.ConicLayer(CONES["second-order"], "SCS", lpgd.LPGD(tau=0.1), {"eps": 1e-9})
    output = layer(**{name: part.float() for name, part in data.items()})
    assert output._fields == ("x", "y", "s")
    assert {part.dtype for part in output} == {torch.float32}
    assert "second_order=(3,)" in repr(layer)
    expected = layer(**data)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(duplicate(**data, warm_start=expected), expected, 1e-6)
    solution = layer.solve(**data, warm_start=True)
    assert solution.iterations.max() <= 25
    close([solution.x, solution.y, solution.s], expected, 1e-6)
    none = layer(**{name: part[:0] for name, part in data.items()})
    assert [tuple(part.shape) for part in none] == [(0, 4), (0, 5), (0, 5)]
