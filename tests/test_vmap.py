"""Layers within ``torch.func.vmap``: lanes are one batch, and gradients are those of each lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cvxpy as cp
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import lpgd
from lpgd.problems import lanes
from tests.gradient_cases import CASES, TARGET, TAU, WEIGHTS, N, direct, positive
from tests.layer_cases import normal

LANES, BATCH = 5, 3
EVERY = pytest.mark.parametrize(("layer", "expected"), CASES.values(), ids=CASES)
EYE = torch.eye(N).double()


def weighted(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def loss(c: Tensor) -> Tensor:
        y = layer(c)
        return (y * WEIGHTS[: max(y.shape[-1] if y.ndim else 1, 1)]).sum()

    return loss


@EVERY
def test_gradients_of_every_sample(layer: Any, expected: Any) -> None:
    c = normal(LANES, N)
    gradients = vmap(grad(weighted(layer)))(c)
    torch.testing.assert_close(gradients, torch.stack([expected(row) for row in c]), atol=1e-6, rtol=1e-6)


@EVERY
def test_lanes_may_be_nested_and_in_any_dimension(layer: Any, expected: Any) -> None:
    c = normal(N, 2, LANES)
    gradients = vmap(vmap(grad(weighted(layer)), in_dims=1), in_dims=1)(c)
    rows = [[expected(c[:, i, j]) for j in range(LANES)] for i in range(2)]
    torch.testing.assert_close(gradients, torch.stack([torch.stack(row) for row in rows]), atol=1e-6, rtol=1e-6)


@EVERY
def test_jacobians_by_vectors_at_once(layer: Any, expected: Any) -> None:
    c = normal(N, seed=3).requires_grad_()
    y = layer(c)
    vectors = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape) * WEIGHTS[: max(y.numel(), 1)].reshape(y.shape)
    (rows,) = torch.autograd.grad(y, c, vectors, is_grads_batched=True)
    torch.testing.assert_close(rows.sum(0), expected(c.detach()), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["QPLayer", "CvxpyLayer", "ConicLayer", "NodeLayer", "solve_qp"])
def test_jacobians_are_those_of_single_rows(name: str) -> None:
    layer, _ = CASES[name]
    c = normal(BATCH, N, seed=1)
    expected = torch.autograd.functional.jacobian(layer, c)
    for jacobian in (
        torch.autograd.functional.jacobian(layer, c, vectorize=True),
        torch.autograd.functional.jacobian(layer, c, vectorize=True, strategy="forward-mode"),
        jacrev(layer)(c),
        jacfwd(layer)(c),
        vmap(jacrev(layer))(c[None])[0],
        vmap(jacfwd(layer))(c[None])[0],
    ):
        torch.testing.assert_close(jacobian, expected, atol=1e-10, rtol=0)


def test_one_batch_is_solved_forward_and_one_backward() -> None:
    sizes = []

    def solve(c: Tensor) -> Tensor:
        sizes.append(len(c))
        return (c < 0).double()

    layer = lpgd.BlackboxLayer(solve, lpgd.LPGD(TAU, envelope="lower"), batched=True, as_torch=True)
    c = normal(LANES, BATCH, N)
    gradients = vmap(grad(weighted(layer)))(c)
    assert sizes == [LANES * BATCH, LANES * BATCH]
    expected = (positive(-c - TAU * WEIGHTS) - positive(-c)) / TAU
    torch.testing.assert_close(gradients, expected)
    sizes.clear()
    single = c[0].requires_grad_()
    torch.autograd.grad(layer(single), single, normal(LANES, BATCH, N, seed=1), is_grads_batched=True)
    assert sizes == [BATCH, LANES * BATCH]


@pytest.mark.parametrize("batch", [(), (BATCH,)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("method", [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-4)])
@pytest.mark.parametrize("solver", [None, "InteriorPoint"])
def test_data_that_lanes_share(batch: tuple[int, ...], shared: bool, method: Any, solver: str | None) -> None:
    """Without constraints x = -P⁻¹q, and the gradient of wᵀx is -½(u xᵀ + x uᵀ) for P, -u for q, with u = P⁻¹w."""
    chosen = None if solver is None else lpgd.InteriorPoint()
    layer = lpgd.QPLayer(gradient=method, solver=chosen)
    root = normal(N, N) if shared else normal(LANES, N, N)
    P, q, w = root @ root.mT + EYE, normal(LANES, *batch, N, seed=1), normal(*batch, N, seed=2)
    infos = []

    def loss(P: Tensor, q: Tensor) -> Tensor:
        output = layer(P, q, lb=-1e3)
        infos.append(output.info)
        return (output.x * w).sum()

    dP, dq = vmap(grad(loss, argnums=(0, 1)), in_dims=(None if shared else 0, 0))(P, q)
    u = torch.linalg.solve(P.reshape(-1, *(1,) * len(batch), N, N), w.expand(LANES, *batch, N)[..., None])[..., 0]
    x = -torch.linalg.solve(P.reshape(-1, *(1,) * len(batch), N, N), q[..., None])[..., 0]
    outer = -0.5 * (u[..., :, None] * x[..., None, :] + x[..., :, None] * u[..., None, :])
    torch.testing.assert_close(dq, -u, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dP, outer.sum(1) if batch else outer, atol=1e-6, rtol=1e-6)
    (info,) = infos
    assert info.solution.problem.data.P.ndim == (1 if shared else 2)
    assert info.solution.batch_size == LANES * (BATCH if batch else 1)
    assert len(info.gradients) == 1


def test_second_derivatives_of_every_sample() -> None:
    nearest = lpgd.NodeLayer(lpgd.Node(lambda y, w: (y - w).square().sum()))
    w = normal(LANES, N)
    torch.testing.assert_close(
        vmap(hessian(lambda w: (nearest(w) ** 3).sum()))(w), torch.diag_embed(6 * w), atol=1e-8, rtol=1e-8
    )


def test_inputs_without_gradient_have_lanes_too() -> None:
    c, targets = (
        normal(LANES, 2, N),
        torch.stack([TARGET, 1 - TARGET]).expand(LANES, 2, N) * positive(normal(LANES, 1, 1)),
    )
    for target, dim in ((targets, 0), (targets[0], None)):
        got = vmap(grad(lambda c, t: direct(c, target=t).sum()), in_dims=(0, dim))(c, target)
        t = target.expand(LANES, 2, N)
        expected = (positive(c) - positive(c - TAU * (1 - 2 * t))) / TAU
        torch.testing.assert_close(got, expected)


def test_parts_of_lanes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = CASES["QPLayer"]
    c = normal(BATCH, N)
    whole = jacrev(layer)(c)
    monkeypatch.setattr(lanes, "LARGEST", 1)
    torch.testing.assert_close(jacrev(layer)(c), whole, atol=0, rtol=0)
    expected = torch.zeros(BATCH, N, BATCH, N).double()
    for element in range(BATCH):
        expected[element, :, element] = positive(c[element]).diag()
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("on_error", ["nan", "warn"])
@pytest.mark.filterwarnings("ignore:no solution:lpgd.LpgdWarning")
def test_lanes_without_a_solution(on_error: Any) -> None:
    """-h₁ ≤ x ≤ h₀, nearest to 0.5, has no point where h₀ + h₁ < 0."""
    layer = lpgd.ConicLayer(lpgd.Cones(nonnegative=2), on_error=on_error)
    A, one = torch.tensor([[1.0], [-1.0]]).double(), torch.ones(1, 1).double()

    def loss(h: Tensor) -> Tensor:
        output = layer(one, -0.5 * one[0], A, h)
        return output.x.nansum() + 2 * output.s[0].nansum()

    h = torch.tensor([[0.25, 1.0], [-1.0, 0.5], [2.0, 1.0]]).double()
    # x = min(h₀, ½): the slack of the first row is h₀ - x.
    torch.testing.assert_close(vmap(grad(loss))(h), torch.tensor([[1.0, 0], [0, 0], [2, 0]]).double())


def test_several_outputs_of_a_cvxpy_layer() -> None:
    x, c = cp.Variable(N), cp.Parameter(N, nonneg=True)
    rows = x >= 1
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [rows])
    layer = lpgd.CvxpyLayer(problem, [c], [x, rows.dual_variables[0]])
    values, tangent = 2 * normal(LANES, N).abs(), normal(LANES, N, seed=1)
    above = positive(values - 1)
    out, change = jvp(layer, (values,), (tangent,))
    torch.testing.assert_close(out[0], values.clamp(min=1), atol=1e-6, rtol=0)
    torch.testing.assert_close(change[0], above * tangent, atol=1e-6, rtol=0)
    torch.testing.assert_close(change[1], -2 * (1 - above) * tangent, atol=1e-6, rtol=0)
    first, second = vmap(jacrev(layer))(values)
    torch.testing.assert_close(first, torch.diag_embed(above), atol=1e-6, rtol=0)
    torch.testing.assert_close(second, torch.diag_embed(-2 * (1 - above)), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="not nonneg"):
        vmap(layer)(-values)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_matrices_that_lanes_share() -> None:
    q = normal(LANES, N)

    def loss(P: Tensor, q: Tensor) -> Tensor:
        return (lpgd.solve_qp(P, q, lb=0.0).x * WEIGHTS).sum()

    gradients = vmap(grad(lambda q: loss((2 * EYE).to_sparse(), q)))(q)
    torch.testing.assert_close(gradients, -0.5 * positive(-q) * WEIGHTS, atol=1e-6, rtol=0)
    rows = (2 * EYE).to_sparse_csr()
    with pytest.raises(TypeError, match=r"P is torch.sparse_csr.*to_sparse_coo"):
        vmap(grad(lambda q: loss(rows, q)))(q)


def test_problems_of_other_classes_say_what_they_lack() -> None:
    with pytest.raises(RuntimeError, match="object has no lanes"):
        lanes.mapped(object())


@pytest.mark.parametrize("masked", [False, True])
def test_nodes_that_look_at_their_inputs(masked: bool) -> None:
    """The nearest point of the simplex is (x - θ)₊, with θ such that its sum is one; a score of -inf is no entry."""
    x = normal(LANES, BATCH, N)
    x[..., 0] = -torch.inf if masked else -9.0
    y = vmap(lpgd.NodeLayer(lpgd.nodes.Projection("simplex")))(x)
    support = y > 0
    assert not support[..., 0].any()
    theta = (torch.where(support, x, 0.0).sum(-1, keepdim=True) - 1) / support.sum(-1, keepdim=True)
    torch.testing.assert_close(y, (x - theta).clamp(min=0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("batched", [False, True])
def test_lanes_and_tangents_of_what_is_captured_are_refused_by_name(batched: bool) -> None:
    """Within the objective they would be further dimensions, or constants."""
    x, weights = normal(LANES, N), normal(LANES).abs() + 1

    def layer(weight: Tensor) -> Tensor:
        def energy(x: Tensor, y: Tensor) -> Tensor:
            return weight * (y - x).square().sum(-1) + (y + 1).square().sum(-1)

        return lpgd.NodeLayer(lpgd.Node(energy, batched=batched))(x)

    with pytest.raises(ValueError, match="energy uses weight, which requires a gradient, or has lanes"):
        vmap(layer)(weights)
    for derivative in (grad(lambda weight: layer(weight).sum()), jacfwd(layer), jacrev(layer)):
        with pytest.raises(ValueError, match="energy uses weight, which requires a gradient, or has lanes"):
            derivative(weights[0])
    with torch.no_grad(), pytest.raises(ValueError, match="energy uses weight"):
        vmap(layer)(weights)
    constant = vmap(lambda x: lpgd.NodeLayer(lpgd.Node(lambda x, y: (y - 2 * x).square().sum()))(x))(x)
    torch.testing.assert_close(constant, 2 * x)


def test_options_have_no_tangents() -> None:
    x, value = normal(BATCH, N), torch.tensor(0.5).double()
    makers: list[Callable[[Any], Tensor]] = [
        lambda alpha: lpgd.NodeLayer(lpgd.nodes.RobustPooling("huber", alpha=alpha))(x),
        lambda gamma: lpgd.NodeLayer(lpgd.nodes.OptimalTransport(gamma=gamma))(x),
        lambda extra: lpgd.BlackboxLayer(lambda c, e: 1.0 * (c < e), lpgd.LPGD(TAU))(x, extra.expand(BATCH, N)),
    ]
    for made in makers:
        for transform in (jacfwd, jacrev):
            with pytest.raises(ValueError, match="requires a gradient, which"):
                transform(made)(value)
