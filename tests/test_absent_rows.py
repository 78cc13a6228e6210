"""Infinite ends of inequalities and bounds: absent where they can mean that, named in the message where they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.gradients import GradientMethod
from lpgd.solvers.ranking import SOLVERS
from tests.layer_cases import normal

N, INF = 3, torch.inf
EYE = torch.eye(N).double()
INSTALLED = [solver for solver in SOLVERS if solver.is_installed()]
METHODS = [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-4), lpgd.LPGD(tau=1.0, rho=0.5)]


def ends() -> Tensor:
    """Right-hand sides of four elements: rows of them, all rows, and none are absent."""
    h = torch.tensor([[0.5, INF, -0.5], [INF, INF, INF], [1e30, 0.25, 0.5], [0.5, 0.25, -0.25]])
    return h.double().requires_grad_()


def by_rows(q: Tensor, h: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    output = lpgd.solve_qp(EYE, q, G=EYE, h=h, **options)
    return output.x, output.z


def by_cone(q: Tensor, h: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    output = lpgd.solve_conic(EYE, q, EYE, h, lpgd.Cones(nonnegative=N), **options)
    return output.x, output.y


def by_cvxpy(q: Tensor, h: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    # Rows with two variables each stay rows; a variable of its own is zero.
    x, o, c, u = cp.Variable(N), cp.Variable(), cp.Parameter(N), cp.Parameter(N)
    rows = x + o <= u
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x) + c @ x), [rows, o == 0])
    layer = lpgd.CvxpyLayer(problem, [c, u], [x, rows.dual_variables[0]], **options)
    return layer(q, h)[0], layer(q, h)[1]


def by_two_ends(q: Tensor, h: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    output = lpgd.solve_qp(EYE, q, G=EYE, h=h, l=torch.full((N,), -INF).double(), **options)
    return output.x, output.z


FORMS = {"rows": by_rows, "cone": by_cone, "CVXPY": by_cvxpy, "two ends": by_two_ends}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("method", METHODS[:2], ids=["exact", "LPGD"])
def test_an_absent_row_constrains_nothing_and_has_no_gradient(form: Callable[..., Any], method: GradientMethod) -> None:
    """x = min(-q, h) and z = max(-q - h, 0), entry by entry."""
    q, h = normal(4, N).requires_grad_(), ends()
    x, z = form(q, h, gradient=method)
    present = h.detach() < 1e20
    active = present & (-q > h)
    torch.testing.assert_close(x, torch.minimum(-q, h), atol=1e-7, rtol=0)
    torch.testing.assert_close(z, torch.where(present, -q - h, 0.0).clamp(min=0), atol=1e-7, rtol=0)
    assert not z[~present].any()
    w, v = normal(4, N, seed=1), normal(4, N, seed=2)
    dq, dh = torch.autograd.grad((w * x).sum() + (v * z).sum(), (q, h))
    torch.testing.assert_close(dq, torch.where(active, -v, -w), atol=1e-6, rtol=0)
    torch.testing.assert_close(dh, torch.where(active, w - v, 0.0), atol=1e-6, rtol=0)
    assert not dh[~present].any()


@pytest.mark.parametrize("solver", INSTALLED, ids=lambda solver: solver.name)
@pytest.mark.parametrize("form", [by_rows, by_two_ends])
def test_with_every_solver(solver: Any, form: Callable[..., Any]) -> None:
    q, h = normal(4, N), ends()
    x, _ = form(q, h, solver=solver())
    torch.testing.assert_close(x, torch.minimum(-q, h), atol=1e-6, rtol=0)
    (dh,) = torch.autograd.grad(x.sum(), h)
    torch.testing.assert_close(dh, (-q > h).double(), atol=1e-6, rtol=0)


def test_where_all_elements_lack_the_same_rows_matrices_stay_shared() -> None:
    h = torch.tensor([0.5, INF, 0.25]).double()
    output = lpgd.solve_qp(EYE, normal(4, N), G=EYE, h=h.expand(4, N))
    assert output.info.solution.problem.data.A.ndim == 1
    vectors = normal(4, 2, N)
    again = torch.func.vmap(lambda q: lpgd.solve_qp(EYE, q, G=EYE, h=h).x)(vectors)
    torch.testing.assert_close(again, torch.minimum(-vectors, h), atol=1e-7, rtol=0)


def test_units_of_large_problems_are_not_those_of_absent_rows() -> None:
    q = 1e6 * normal(4, N)
    h = torch.tensor([0.5e6, INF, INF]).double()
    x, z = by_rows(q, h)
    torch.testing.assert_close(x, torch.minimum(-q, h), atol=0.1, rtol=1e-8)
    torch.testing.assert_close(z[:, 0], (-q[:, 0] - h[0]).clamp(min=0), atol=0.1, rtol=1e-8)


def test_linear_and_integer_programs() -> None:
    h = torch.tensor([[2.0, INF], [INF, 3.0]]).double()
    G = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()
    c = torch.tensor([-2.0, -1.0]).double()
    x = lpgd.solve_lp(c, G=G, h=h, lb=0.0, ub=5.0, gradient=lpgd.LPGD(tau=0.1)).x
    torch.testing.assert_close(x, torch.tensor([[2.0, 5.0], [3.0, 0.0]]).double(), atol=1e-8, rtol=0)
    whole = lpgd.solve_lp(c, G=G, h=h - 0.5, lb=0.0, ub=5.0, integer=[0, 1], gradient=lpgd.LPGD(tau=0.1)).x
    torch.testing.assert_close(whole, torch.tensor([[1.0, 5.0], [2.0, 0.0]]).double())


def test_an_element_that_fails_is_nan_in_absent_rows_too() -> None:
    layer = lpgd.QPLayer(on_error="nan")
    h = torch.tensor([[INF, -1.0, 1.0], [INF, 1.0, 1.0]]).double()
    output = layer(EYE, torch.zeros(2, N).double(), G=EYE, h=h, lb=0.0)
    assert output.z[0].isnan().all()
    torch.testing.assert_close(output.z[1], torch.zeros(N).double())


ROWS = torch.tensor([[0.0], [INF]]).double()
MESSAGES: dict[str, tuple[Callable[[], object], str]] = {
    "equality": (lambda: lpgd.solve_qp(EYE, normal(2, N), A=EYE[:1], b=ROWS), "b of element 1 is inf in row 0"),
    "wrong side": (lambda: lpgd.solve_qp(EYE, normal(2, N), G=EYE[:1], h=-ROWS), "h of element 1 is -inf in row 0"),
    "lower end": (lambda: lpgd.solve_qp(EYE, normal(2, N), G=EYE[:1], l=ROWS), "l of element 1 is inf in row 0"),
    "cost": (lambda: lpgd.solve_lp(torch.tensor([1.0, INF]), lb=0.0), "c of element 0 is inf in row 1"),
    "matrix": (
        lambda: lpgd.solve_qp(EYE, normal(2, N), G=EYE * torch.tensor([[1.0], [1.0], [torch.nan]]), h=ends()[:2]),
        "G of element 0 is nan in row 2, column 0",
    ),
    "bound": (lambda: lpgd.solve_qp(EYE, normal(2, N), lb=INF), "lb of element 1 is inf"),
    "conic": (
        lambda: lpgd.solve_conic(EYE, normal(2, N), EYE, ends()[:2], lpgd.Cones(zero=2, nonnegative=1)),
        "b of element 0 is inf in row 1",
    ),
    "curved cone": (
        lambda: lpgd.solve_conic(EYE, normal(2, N), EYE, ends()[:2], lpgd.Cones(second_order=(N,))),
        "b of element 1 is inf in row 0; b of element 1 is inf in row 1; b of element 1 is inf in row 2",
    ),
    "crossed rows": (
        lambda: lpgd.solve_qp(EYE, normal(2, N), G=EYE[:1], l=ROWS.nan_to_num(posinf=2), h=torch.ones(1).double()),
        "l of element 1 is 2 in row 0, above h, which is 1",
    ),
    "crossed bounds": (
        lambda: lpgd.solve_qp(EYE, normal(2, N), lb=ends()[2:].nan_to_num(posinf=9).detach(), ub=2.0),
        "lb of element 0 is 1e.30 in row 0, above ub, which is 2",
    ),
}


@pytest.mark.parametrize(("call", "message"), MESSAGES.values(), ids=MESSAGES)
def test_messages_name_tensor_element_and_row(call: Callable[[], object], message: str) -> None:
    with pytest.raises(lpgd.SolverError, match=message):
        call()


def test_messages_of_cvxpy_layers_name_the_parameter() -> None:
    x, b = cp.Variable(2), cp.Parameter(2, name="demand")
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x)), [x == b]), [b], [x])
    with pytest.raises(lpgd.SolverError, match="parameter demand of element 1 is inf in row 0"):
        layer(torch.tensor([[0.0, 1.0], [INF, 1.0]]))
