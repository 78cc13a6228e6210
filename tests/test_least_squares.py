"""Least squares: optimality, the derivative, and what the options add."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from lpgd import LPGD, ImplicitKKT, LpgdWarning, Node
from lpgd.layers.node import NodeLayer
from lpgd.nodes.base import Tilt
from lpgd.nodes.least_squares.node import LeastSquares
from lpgd.status import Status
from tests.node_reference import ROUNDING

OPTIONS = [
    dict(zip(("weighted", "ridge", "bias", "columns"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=4)
]
B, M, N, K = 3, 9, 4, 2


def problem(node: LeastSquares, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(B, M, N, generator=generator, dtype=torch.float64)
    b = torch.randn(B, M, *(K,) * node.columns, generator=generator, dtype=torch.float64)
    weights = torch.rand(B, M, generator=generator, dtype=torch.float64) + 0.2
    ridge = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    inputs = [A, b] + [weights] * node.weighted + [ridge] * node.ridge
    return tuple(part.to(dtype) for part in inputs)


def differentiable(node, *inputs: Tensor) -> Tensor:
    """The node's solver and closed form as one differentiable function."""

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            answer = node.solve(inputs, None)
            ctx.save_for_backward(*inputs, answer.y)
            ctx.aux = answer.aux
            return answer.y

        @staticmethod
        def backward(ctx, cotangent):
            *inputs, y = ctx.saved_tensors
            return node.vjp(tuple(inputs), y, cotangent, ctx.aux)

    return Solve.apply(*inputs)


def by_normal_equations(node: LeastSquares, inputs: tuple[Tensor, ...]) -> Tensor:
    """A dense solve by torch's own operations, differentiated by autograd."""
    named = dict(zip(node.inputs, inputs, strict=True))
    A = named["A"]
    design = torch.cat([A, torch.ones_like(A[..., :1])], -1) if node.bias else A
    W = named.get("weights", torch.ones_like(A[..., 0]))[..., None] * design
    gram = W.mT @ design
    if node.ridge:
        mask = torch.ones(design.shape[-1], dtype=A.dtype)
        mask[N:] = 0.0
        gram = gram + named["ridge"][:, None, None] * torch.diag(mask)
    b = named["b"] if node.columns else named["b"][..., None]
    y = torch.linalg.solve(gram, W.mT @ b)
    return y if node.columns else y[..., 0]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_solution_and_gradients_are_those_of_the_normal_equations(options):
    node = LeastSquares(**options)
    ours = [part.clone().requires_grad_() for part in problem(node)]
    theirs = [part.clone().requires_grad_() for part in problem(node)]
    y, expected = differentiable(node, *ours), by_normal_equations(node, tuple(theirs))
    assert y.shape == (B, *node.variable_shape(*(part.shape[1:] for part in ours)))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(y, ours, cotangent), torch.autograd.grad(expected, theirs, cotangent), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_objective_is_stationary_at_the_solution(options):
    node = LeastSquares(**options)
    inputs = problem(node)
    y = node.solve(inputs, None).y.requires_grad_()
    (slope,) = torch.autograd.grad(node.objective(y, *inputs).sum(), y)
    assert slope.abs().max() < 1e-12


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_gradcheck(options):
    node = LeastSquares(**options)
    inputs = tuple(part.requires_grad_() for part in problem(node))
    assert torch.autograd.gradcheck(lambda *parts: differentiable(node, *parts), inputs, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_shared_inputs_are_the_same_as_copies(options):
    node = LeastSquares(**options)
    inputs = problem(node)
    shared = tuple(
        part if name == "b" else part[:1].expand_as(part) for name, part in zip(node.inputs, inputs, strict=True)
    )
    copies = tuple(part.clone(memory_format=torch.contiguous_format) for part in shared)
    one, other = node.solve(shared, None), node.solve(copies, None)
    assert one.aux[0].shape[0] == 1
    torch.testing.assert_close(one.y, other.y, rtol=0, atol=1e-13)
    cotangent = torch.randn_like(one.y)
    for mine, theirs in zip(
        node.vjp(shared, one.y, cotangent, one.aux), node.vjp(copies, other.y, cotangent, None), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_batched_is_one_by_one():
    node = LeastSquares(weighted=True, ridge=True, bias=True)
    inputs = problem(node)
    y = node.solve(inputs, None).y
    for index in range(B):
        alone = node.solve(tuple(part[index : index + 1] for part in inputs), None).y
        torch.testing.assert_close(alone[0], y[index], rtol=0, atol=1e-14)


def test_single_precision():
    node = LeastSquares(weighted=True, ridge=True, bias=True)
    inputs = tuple(part.requires_grad_() for part in problem(node, torch.float32))
    y = differentiable(node, *inputs)
    gradients = torch.autograd.grad(y.sum(), inputs)
    doubles = tuple(part.detach().double().requires_grad_() for part in inputs)
    exact = differentiable(node, *doubles)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=2e-6)
    for one, other in zip(gradients, torch.autograd.grad(exact.sum(), doubles), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-5)


def test_ill_conditioned_columns_lose_no_more_than_the_condition_number():
    """With a residual of zero the error of QR grows with the condition number 1e6, not with its square."""
    generator = torch.Generator().manual_seed(2)
    left = torch.linalg.qr(torch.randn(20, 3, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    A = left * torch.tensor([1.0, 1e-3, 1e-6], dtype=torch.float64) @ right
    x = torch.ones(3, dtype=torch.float64)
    y = LeastSquares().solve((A[None], (A @ x)[None]), None).y[0]
    assert (y - x).norm() < 1e-8


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.7])
def test_tilted_and_augmented_problems(columns, rho):
    node = LeastSquares(weighted=True, bias=True, columns=columns)
    inputs = problem(node)
    generator = torch.Generator().manual_seed(3)
    y = node.solve(inputs, None).y
    tilt = Tilt(torch.randn(y.shape, generator=generator, dtype=y.dtype), rho, y * bool(rho))
    moved = node.solve_tilted(inputs, tilt, y).y.requires_grad_()
    value = node.objective(moved, *inputs).sum() + (tilt.linear * moved).sum()
    value = value + 0.5 * rho * (moved - tilt.center).square().sum()
    assert torch.autograd.grad(value, moved)[0].abs().max() < 1e-12


def test_elements_without_a_unique_solution_fail_alone():
    node = LeastSquares(weighted=True)
    A, b, weights = (part.clone() for part in problem(node))
    A[1, :, 2] = 2 * A[1, :, 0]
    weights[2, 0] = -1.0
    answer = node.solve((A, b, weights), None)
    assert list(answer.statuses) == [Status.SOLVED, Status.NUMERICAL_ERROR, Status.INVALID_DATA]
    root = weights[0].sqrt()
    exact = np.linalg.lstsq((root[:, None] * A[0]).numpy(), (root * b[0]).numpy(), rcond=None)[0]
    np.testing.assert_allclose(answer.y[0], exact, atol=1e-12)


def test_a_ridge_makes_wide_problems_unique():
    node = LeastSquares(ridge=True)
    A = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    b, ridge = torch.ones(2, 3, dtype=torch.float64), torch.tensor([0.5, 0.0], dtype=torch.float64)
    answer = node.solve((A, b, ridge), None)
    assert list(answer.statuses) == [Status.SOLVED, Status.NUMERICAL_ERROR]
    dual = A[0].T @ torch.linalg.solve(A[0] @ A[0].T + 0.5 * torch.eye(3, dtype=torch.float64), b[0])
    torch.testing.assert_close(answer.y[0], dual, rtol=0, atol=1e-13)


def test_zero_weights_leave_rows_out():
    node = LeastSquares(weighted=True)
    A, b, weights = (part.clone() for part in problem(node))
    weights[:, 6:] = 0.0
    answer = node.solve((A, b, weights), None)
    exact = torch.linalg.lstsq(weights[:, :6, None].sqrt() * A[:, :6], weights[:, :6, None].sqrt() * b[:, :6, None])
    torch.testing.assert_close(answer.y, exact.solution[..., 0], rtol=0, atol=1e-12)
    assert torch.isfinite(node.vjp((A, b, weights), answer.y, torch.ones_like(answer.y), answer.aux)[2]).all()


def test_inputs_stay_as_they_are_and_nothing_moves():
    node = LeastSquares(weighted=True, ridge=True)
    inputs = problem(node)
    kept = [part.clone() for part in inputs]
    torch.testing.assert_close(node.solve(inputs, None).y, node.solve(inputs, None).y, rtol=0, atol=ROUNDING)
    assert all(torch.equal(part, own) for part, own in zip(inputs, kept, strict=True))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="b has 5 rows; A has 4"):
        LeastSquares().variable_shape((4, 2), (5,))
    with pytest.raises(ValueError, match="weights has 3 rows"):
        LeastSquares(weighted=True).variable_shape((4, 2), (4,), (3,))
    with pytest.raises(ValueError, match=r"3 rows for 4 unknowns.*ridge=True.*minimum_norm=True"):
        LeastSquares(bias=True).variable_shape((3, 3), (3,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        LeastSquares().ridge = True  # pyright: ignore[reportAttributeAccessIssue]


def of_rank(rank: int, m: int, n: int, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(10 * m + n + rank)
    left, right = (
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in ((m, rank), (rank, n))
    )
    return left @ right


SHAPES = [(2, 9, 4), (4, 9, 4), (3, 3, 6), (2, 3, 6), (1, 5, 5), (0, 4, 3)]


@pytest.mark.parametrize(("rank", "m", "n"), SHAPES)
def test_the_solution_of_minimum_norm_is_the_pseudo_inverse(rank, m, n):
    A, b = of_rank(rank, m, n), torch.randn(3, m, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = torch.rand(3, m, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.2
    root = weights.sqrt()[..., None]
    y = NodeLayer(LeastSquares(columns=True, minimum_norm=True))(A, b)
    torch.testing.assert_close(y, torch.linalg.pinv(A, rtol=1e-12) @ b, rtol=0, atol=1e-11)
    y = NodeLayer(LeastSquares(weighted=True, columns=True, minimum_norm=True))(A, b, weights)
    torch.testing.assert_close(y, torch.linalg.pinv(root * A, rtol=1e-12) @ (root * b), rtol=0, atol=1e-11)


def test_where_the_solution_is_unique_it_is_the_same_with_the_same_gradients():
    for options in OPTIONS:
        inputs = [part.requires_grad_() for part in problem(LeastSquares(**options))]
        one, other = (NodeLayer(LeastSquares(**options, minimum_norm=asked))(*inputs) for asked in (False, True))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        cotangent = torch.randn(one.shape, dtype=one.dtype, generator=torch.Generator().manual_seed(1))
        for mine, theirs in zip(
            torch.autograd.grad(one, inputs, cotangent), torch.autograd.grad(other, inputs, cotangent), strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("rank", "m", "n"), [(2, 6, 4), (3, 3, 5), (2, 3, 5)])
def test_gradients_at_constant_rank_are_those_of_finite_differences(rank, m, n):
    generator = torch.Generator().manual_seed(4)
    left, right, b = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((m, rank), (rank, n), (m,))
    )
    weights = (torch.rand(2, m, generator=generator, dtype=torch.float64) + 0.2).requires_grad_()
    layer = NodeLayer(LeastSquares(weighted=True, minimum_norm=True))

    def solution(left, right, b, weights):
        return layer(left @ right, b, weights)

    assert torch.autograd.gradcheck(solution, (left, right, b, weights), atol=1e-6)
    assert torch.autograd.gradgradcheck(solution, (left, right, b, weights), atol=1e-5, rtol=1e-5)


def test_shared_matrices_of_minimum_norm_are_decomposed_once():
    node = LeastSquares(minimum_norm=True)
    A = of_rank(2, 3, 5, batch=1)
    b = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, other = node.solve((A.expand(4, 3, 5), b), None), node.solve((A.repeat(4, 1, 1), b), None)
    assert one.aux[0].shape == (1, 3)
    torch.testing.assert_close(one.y, other.y, rtol=0, atol=1e-13)
    cotangent = torch.ones_like(one.y)
    for mine, theirs in zip(
        node.vjp((A.expand(4, 3, 5), b), one.y, cotangent, one.aux),
        node.vjp((A.repeat(4, 1, 1), b), other.y, cotangent, None),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_the_rank_tolerance_decides_what_counts_as_zero():
    A = torch.diag(torch.tensor([1.0, 1e-4], dtype=torch.float64))
    b = torch.ones(2, dtype=torch.float64)
    exact = NodeLayer(LeastSquares(minimum_norm=True))(A, b)
    rough = NodeLayer(LeastSquares(minimum_norm=True, rank_tolerance=1e-3))(A, b)
    torch.testing.assert_close(exact, torch.tensor([1.0, 1e4], dtype=torch.float64))
    assert rough.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("options", "message"), [
    ({"ridge": 0.5}, r"ridge is 0.5; it must be True or False; with True the layer takes a further input, ridge"),
    ({"weighted": torch.ones(3)}, r"weighted is tensor.*takes a further input, weights"),
    ({"bias": 1}, r"bias is 1; it must be True or False\."),
])  # fmt: skip
def test_flags_that_are_given_numbers_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        LeastSquares(**options)


def _by_normal_equations(inputs: list[Tensor], cotangent: Tensor, bias: bool) -> tuple[list[Any], ...]:
    """y and the gradients of ``<cotangent, y>`` of one problem, by 50 digits."""
    A, b, weights, ridge = (tensor.tolist() for tensor in inputs)
    with mpmath.workdps(50):
        D = mpmath.matrix([row + [1.0] * bias for row in A])
        W, penalty = mpmath.diag(weights), mpmath.diag([ridge] * len(A[0]) + [0.0] * bias)
        H = D.T * W * D + penalty
        y, s = (mpmath.lu_solve(H, right) for right in (D.T * W * mpmath.matrix(b), mpmath.matrix(cotangent.tolist())))
        residual, moved = mpmath.matrix(b) - D * y, D * s
        on_A = [
            [float(w * (residual[i] * s[j] - moved[i] * y[j])) for j in range(len(A[0]))] for i, w in enumerate(weights)
        ]
        on_b = [float(w * moved[i]) for i, w in enumerate(weights)]
        on_weights = [float(residual[i] * moved[i]) for i in range(len(b))]
        on_ridge = float(-sum(y[j] * s[j] for j in range(len(A[0]))))
        return [float(entry) for entry in y], on_A, on_b, on_weights, [on_ridge]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("bias", [False, True])
def test_wide_problems_have_all_digits_however_small_their_residuals(scale: float, bias: bool) -> None:
    """A ridge of 1 beside entries of 1e6: residuals are 1e-12, and so is what A sees of the response of size 1."""
    random = torch.Generator().manual_seed(int(bias))
    A = scale * torch.randn(3, 6, generator=random, dtype=torch.float64)
    b, cotangent = (torch.randn(size, generator=random, dtype=torch.float64) for size in (3, 6 + bias))
    weights = 0.1 + torch.rand(3, generator=random, dtype=torch.float64)
    inputs = [A, b, weights, torch.tensor(0.8, dtype=torch.float64)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = NodeLayer(LeastSquares(weighted=True, ridge=True, bias=bias))(*leaves)
    found = [y, *torch.autograd.grad(y @ cotangent, leaves)]
    for value, expected in zip(found, _by_normal_equations(inputs, cotangent, bias), strict=True):
        right = torch.tensor(expected, dtype=torch.float64).reshape(value.shape)
        assert torch.allclose(value.detach(), right, rtol=0, atol=1e-12 * float(right.abs().max()))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [1e-3, 0.8])
def test_a_ridge_of_minimum_norm_has_all_digits_beside_large_numbers(ridge: float, bias: bool) -> None:
    """A ridge makes one solution of many: its gradient is that of ridge regression, element by element."""
    random = torch.Generator().manual_seed(int(bias))
    A = 1e6 * torch.randn(2, 3, 6, generator=random, dtype=torch.float64)
    b, cotangent = (torch.randn(2, size, generator=random, dtype=torch.float64) for size in (3, 6 + bias))
    weights = 0.1 + torch.rand(2, 3, generator=random, dtype=torch.float64)
    ridges = torch.tensor([ridge, 0.0], dtype=torch.float64)
    node = LeastSquares(weighted=True, ridge=True, bias=bias, minimum_norm=True)
    inputs = [A, b, weights, ridges]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = NodeLayer(node)(*leaves)
    found = [y, *torch.autograd.grad(y, leaves, cotangent)]
    expected = _by_normal_equations([tensor[0] for tensor in inputs], cotangent[0], bias)
    for value, right in zip(found, expected, strict=True):
        exact = torch.tensor(right, dtype=torch.float64).reshape(value[0].shape)
        assert torch.allclose(value[0].detach(), exact, rtol=0, atol=1e-11 * float(exact.abs().max()))
    alone = [tensor[1:].clone().requires_grad_() for tensor in inputs[:3]]
    other = NodeLayer(LeastSquares(weighted=True, bias=bias, minimum_norm=True))(*alone)
    assert torch.allclose(y[1:], other, rtol=1e-12, atol=0)
    for one, two in zip(found[1:3], torch.autograd.grad(other, alone[:2], cotangent[1:]), strict=True):
        assert torch.allclose(one[1:], two, rtol=0, atol=1e-12 * float(two.abs().max()))


@pytest.mark.parametrize("method", [ImplicitKKT(), LPGD()])
def test_methods_that_rounding_leaves_no_digits_hand_over_to_the_formula(method: Any) -> None:
    """Optimality conditions add ``AᵀA`` of 1e12 and a ridge, and small steps move y by 1e5 where A sees 1e-6."""
    random = torch.Generator().manual_seed(3)
    A = 1e6 * torch.randn(3, 6, generator=random, dtype=torch.float64)
    b, cotangent = (torch.randn(size, generator=random, dtype=torch.float64) for size in (3, 6))
    weights = 0.1 + torch.rand(3, generator=random, dtype=torch.float64)
    inputs = [A, b, weights, torch.tensor(0.8, dtype=torch.float64)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = NodeLayer(LeastSquares(weighted=True, ridge=True, minimum_norm=True), method)(*leaves)
    found = torch.autograd.grad(y @ cotangent, leaves)
    for value, expected in zip(found, _by_normal_equations(inputs, cotangent, False)[1:], strict=True):
        right = torch.tensor(expected, dtype=torch.float64).reshape(value.shape)
        assert torch.allclose(value, right, rtol=0, atol=1e-11 * float(right.abs().max()))
    record = y.info.gradients[-1]
    assert record.used == ["closed form"]
    assert record.fallbacks == [0]


def test_small_steps_of_wide_regression_have_the_exact_gradient() -> None:
    random = torch.Generator().manual_seed(4)
    A = 1e6 * torch.randn(2, 3, 6, generator=random, dtype=torch.float64)
    A[1] *= 1e-6  # beside one whose small steps are good
    b, cotangent = (torch.randn(2, size, generator=random, dtype=torch.float64) for size in (3, 6))
    weights = 0.1 + torch.rand(2, 3, generator=random, dtype=torch.float64)
    inputs = [A, b, weights, torch.full((2,), 0.8, dtype=torch.float64)]
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    y = NodeLayer(LeastSquares(weighted=True, ridge=True), LPGD())(*leaves)
    found = torch.autograd.grad(y, leaves, cotangent)
    assert y.info.gradients[-1].used == ["closed form", "average"]
    for element in range(2):
        exact = _by_normal_equations([tensor[element] for tensor in inputs], cotangent[element], False)[1:]
        for value, expected in zip(found, exact, strict=True):
            right = torch.tensor(expected, dtype=torch.float64).reshape(value[element].shape)
            assert torch.allclose(value[element], right, rtol=0, atol=1e-7 * float(right.abs().max()))


def test_rounding_is_said_where_there_is_no_formula() -> None:
    random = torch.Generator().manual_seed(5)
    A = (1e6 * torch.randn(1, 3, 4, generator=random, dtype=torch.float64)).requires_grad_()
    b = torch.randn(1, 3, generator=random, dtype=torch.float64)
    node = Node(
        lambda A, b, y: 0.5 * (A @ y - b).square().sum() + 0.5 * y.square().sum(),
        ndims=(2, 1),
        solve=lambda A, b: A.mT @ torch.linalg.solve(torch.eye(3).to(A) + A @ A.mT, b),
        shape=(4,),
    )
    y = NodeLayer(node, ImplicitKKT())(A, b)
    with pytest.warns(LpgdWarning, match=r"elements \[0\] (are singular|add numbers of sizes so different)"):
        y.sum().backward()
