"""Rows with two ends, ``l ≤ G x ≤ h``: against closed forms, two rows with one end each, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.gradients import GradientMethod
from lpgd.problems.conic.problem import ConicProblem
from lpgd.solvers.backends.forms import IntervalForm, Matrices
from lpgd.solvers.ranking import SOLVERS
from tests.layer_cases import normal

N, K, B, INF = 5, 4, 6, torch.inf
INSTALLED = [solver for solver in SOLVERS if solver.is_installed()]


def data() -> dict[str, Tensor]:
    """Six elements: of some rows one end or both are absent, or ends are equal; P and G are shared."""
    root = normal(N, N)
    middle, width = 0.3 * normal(B, K, seed=1), 0.2 * normal(B, K, seed=2).abs()
    l, h = middle - width, middle + width
    l[0, 0] = l[2, 2] = l[4, :] = -INF
    h[1, 1] = h[2, 2] = h[5, :] = INF
    l[3, 0] = h[3, 0] = 0.1
    return {"P": root @ root.mT + torch.eye(N), "q": normal(B, N, seed=3), "G": normal(K, N, seed=4), "l": l, "h": h}


def solve(P: Tensor, q: Tensor, G: Tensor, l: Tensor, h: Tensor, **options: Any) -> lpgd.layers.ProgramOutput:
    return lpgd.solve_qp(P, q, G=G, l=l, h=h, **options)


def loss(output: Any) -> Tensor:
    return (normal(B, N, seed=5) * output.x).sum() + (normal(B, K, seed=6) * output.z).sum()


@pytest.mark.parametrize("solver", INSTALLED, ids=lambda solver: solver.name)
@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-4)], ids=["exact", "LPGD"])
def test_two_rows_with_one_end_each_are_the_same(solver: Any, method: GradientMethod) -> None:
    """The reference moves the equal ends apart by nothing: an equality of its own, for that element."""
    given = {name: part.clone().requires_grad_() for name, part in data().items()}
    output = solve(**given, solver=solver(), gradient=method)
    gradients = dict(zip(given, torch.autograd.grad(loss(output), list(given.values())), strict=True))
    reference = {name: part.clone().requires_grad_() for name, part in data().items()}
    total = torch.zeros(())
    for element in range(B):
        P, q, G = reference["P"], reference["q"][element], reference["G"]
        l, h = reference["l"][element], reference["h"][element]
        equal = l == h
        upper, lower = torch.isfinite(h) & ~equal, torch.isfinite(l) & ~equal
        rows = torch.cat([G[upper], -G[lower]])
        ends = torch.cat([h[upper], -l[lower]])
        other = lpgd.solve_qp(P, q, A=G[equal], b=h[equal], G=rows, h=ends, solver=lpgd.Clarabel())
        z = torch.zeros(K).double()
        z = z.index_put((upper.nonzero()[:, 0],), other.z[: int(upper.sum())], accumulate=True)
        z = z.index_put((lower.nonzero()[:, 0],), -other.z[int(upper.sum()) :], accumulate=True)
        z = z.index_put((equal.nonzero()[:, 0],), other.y, accumulate=True)
        torch.testing.assert_close(output.x[element], other.x, atol=1e-7, rtol=0)
        torch.testing.assert_close(output.z[element], z, atol=1e-6, rtol=0)
        total = total + (normal(B, N, seed=5)[element] * other.x).sum() + (normal(B, K, seed=6)[element] * z).sum()
    total.backward()
    for name in ("P", "q", "G"):
        torch.testing.assert_close(gradients[name], reference[name].grad, atol=1e-5, rtol=1e-5)
    assert reference["l"].grad is not None
    assert reference["h"].grad is not None
    # Where ends are equal, they move together.
    torch.testing.assert_close(
        gradients["l"] + gradients["h"], reference["l"].grad + reference["h"].grad, atol=1e-5, rtol=1e-5
    )
    apart = data()["l"] < data()["h"]
    for name in ("l", "h"):
        torch.testing.assert_close(gradients[name][apart], reference[name].grad[apart], atol=1e-5, rtol=1e-5)
    assert not gradients["l"][data()["l"] == -INF].any()
    assert not gradients["h"][data()["h"] == INF].any()


def test_finite_differences_of_both_ends() -> None:
    given = data()
    ends = {name: given[name].clone().requires_grad_() for name in ("l", "h")}
    gradients = torch.autograd.grad(loss(solve(given["P"], given["q"], given["G"], **ends)), list(ends.values()))
    step = 1e-6
    for name, gradient in zip(ends, gradients, strict=True):
        for at in torch.isfinite(given[name]).nonzero().tolist():
            if at == [3, 0]:
                continue  # equal ends cannot move alone
            change = torch.zeros(B, K).double()
            change[tuple(at)] = step
            there, back = (loss(solve(**{**given, name: given[name] + sign * change})) for sign in (1.0, -1.0))
            assert abs(float((there - back) / (2 * step) - gradient[tuple(at)])) < 1e-6


@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD(tau=0.01), lpgd.LPGD(tau=0.01, rho=1.0)])
def test_the_sign_of_the_multiplier_tells_the_end(method: GradientMethod) -> None:
    """x = clip(-q, l, h), z = -q - x; with rho the problem that is differentiated has P = (1 + ρ) I."""
    q = torch.tensor([[-2.0, 2.0, 0.25, 3.0]]).double().requires_grad_()
    l = torch.tensor([-1.0, -1.0, -1.0, 0.5]).double().requires_grad_()
    h = torch.tensor([1.0, 1.0, 1.0, 0.5]).double().requires_grad_()
    eye, w = torch.eye(4).double(), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    output = lpgd.QPLayer(gradient=method)(eye, q, G=eye, l=l, h=h)
    torch.testing.assert_close(output.x.detach(), q.detach().neg().clamp(l.detach(), h.detach()), atol=1e-9, rtol=0)
    torch.testing.assert_close(output.z[0].detach(), torch.tensor([1.0, -1.0, 0, -3.5]).double(), atol=1e-8, rtol=0)
    dq, dl, dh = torch.autograd.grad((w * output.x).sum(), (q, l, h))
    rho = getattr(method, "rho", 0.0)
    torch.testing.assert_close(dq[0], torch.tensor([0, 0, -3.0 / (1 + rho), 0]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(dl, torch.tensor([0.0, 2, 0, 4]).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(dh, torch.tensor([1.0, 0, 0, 0]).double(), atol=1e-6, rtol=0)


def test_forward_mode() -> None:
    given, tangents = data(), {name: 0.1 * normal(*part.shape, seed=7) for name, part in data().items()}
    tangents["l"][3, 0] = tangents["h"][3, 0]  # ends that are equal move together
    tangents["P"] = tangents["P"] + tangents["P"].mT
    names = list(given)

    def function(method: GradientMethod, *parts: Tensor) -> tuple[Tensor, Tensor]:
        output = solve(**dict(zip(names, parts, strict=True)), gradient=method)
        return output.x, output.z

    step, finite = 1e-6, {name: torch.nan_to_num(part, posinf=0, neginf=0) for name, part in tangents.items()}
    there, back = (solve(**{name: given[name] + sign * step * finite[name] for name in names}) for sign in (1.0, -1.0))
    for method in (lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-5)):
        _, (dx, dz) = torch.func.jvp(partial(function, method), tuple(given.values()), tuple(tangents.values()))
        torch.testing.assert_close(dx, (there.x - back.x) / (2 * step), atol=1e-5, rtol=0)
        torch.testing.assert_close(dz, (there.z - back.z) / (2 * step), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e-5, 1e5])
def test_rows_far_from_order_one(scale: float) -> None:
    given = data()
    output = solve(given["P"], given["q"], scale * given["G"], scale * given["l"], scale * given["h"])
    plain = solve(**given, solver=lpgd.Clarabel())
    torch.testing.assert_close(output.x, plain.x, atol=1e-7, rtol=0)
    torch.testing.assert_close(scale * output.z, plain.z, atol=1e-6, rtol=0)


def test_linear_programs_sparse_matrices_equalities_and_bounds() -> None:
    """min cᵀx over 0 ≤ x ≤ 1 with Σx = 2 and 1 ≤ x₀ + x₁ ≤ 1.5, in which x₀ is cheapest, then x₂."""
    c = torch.tensor([[-3.0, -1.0, -2.0, 0.0]]).double()
    A, G = torch.ones(1, 4).double(), torch.tensor([[1.0, 1.0, 0, 0]]).double()
    ends = {"l": torch.tensor([1.0]).double(), "h": torch.tensor([1.5]).double()}
    two = torch.tensor([2.0]).double()
    for matrix in (G, G.to_sparse()):
        output = lpgd.LPLayer(gradient=lpgd.LPGD(tau=0.1))(c, A=A, b=two, G=matrix, lb=0.0, ub=1.0, **ends)
        torch.testing.assert_close(output.x, torch.tensor([[1.0, 0, 1, 0]]).double(), atol=1e-8, rtol=0)
        assert output.z.shape == (1, 1)
        assert output.y.shape == (1, 1)
    # With a lower end of 1.25 the quarter comes from x₂.
    ends["l"] = torch.tensor([1.25]).double()
    output = lpgd.LPLayer(gradient=lpgd.LPGD(tau=0.1))(c, A=A, b=two, G=G, lb=0.0, ub=1.0, **ends)
    torch.testing.assert_close(output.x, torch.tensor([[1.0, 0.25, 0.75, 0]]).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(output.z, torch.tensor([[-1.0]]).double(), atol=1e-8, rtol=0)
    residual = c + output.y @ A + output.z @ G + output.z_box
    torch.testing.assert_close(residual, torch.zeros_like(c), atol=1e-8, rtol=0)


def test_solvers_that_know_such_rows_see_them_as_they_are() -> None:
    """A row of the form is G itself, with the ends; the answer of solve() has x, then G x."""
    given = data()
    layer = lpgd.QPLayer(solver=lpgd.DAQP())
    solution = layer.solve(given["P"], given["q"], G=given["G"], l=given["l"], h=given["h"])
    problem = solution.problem
    assert isinstance(problem, ConicProblem)
    structure, P, A = problem.structure, problem.symmetric_P.numpy(), problem.data.A.numpy()
    form = IntervalForm(Matrices(structure, P, A, structure.lower_index >= 0, structure.upper_index >= 0))
    assert (form.n, form.m, form.zero) == (N, K, 0)
    torch.testing.assert_close(torch.from_numpy(form.dense_A()), given["G"])
    torch.testing.assert_close(solution.x[:, N:], solution.x[:, :N] @ given["G"].mT, atol=1e-9, rtol=0)
    assert float(solution.residuals.worst.max()) < 1e-9


def test_warm_starts_and_lower_ends_alone() -> None:
    given = data()
    layer: Callable[..., Any] = lpgd.QPLayer(solver=lpgd.OSQP()) if lpgd.OSQP.is_installed() else lpgd.QPLayer()
    first = layer(given["P"], given["q"], G=given["G"], l=given["l"], h=given["h"])
    again = layer(given["P"], given["q"] + 1e-3, G=given["G"], l=given["l"], h=given["h"], warm_start=first)
    torch.testing.assert_close(again.x, first.x, atol=1e-2, rtol=0)
    alone = layer(given["P"], given["q"], G=given["G"], l=given["l"])
    other = layer(given["P"], given["q"], G=-given["G"], h=-given["l"])
    torch.testing.assert_close(alone.x, other.x, atol=1e-7, rtol=0)
    torch.testing.assert_close(alone.z, -other.z, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="l is given but G is not"):
        layer(given["P"], given["q"], l=given["l"])
