"""Total variation denoising: the exact solution, its derivative, and what happens where segments fuse."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

import lpgd
from lpgd.nodes.total_variation import denoise, differentiate_denoised


def signals(batch: int, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(batch, count // 8 + 1, generator=generator, dtype=torch.float64).repeat_interleave(8, 1)
    return steps[:, :count] + 0.4 * torch.randn(batch, count, generator=generator, dtype=torch.float64)


def by_the_dual(signal: np.ndarray, weight: float) -> np.ndarray:
    """y = x + Dᵀz for the z in the box of radius λ that minimises its norm: SciPy's bounded least squares."""
    difference = np.diff(np.eye(len(signal)), axis=0)
    found = lsq_linear(difference.T, -signal, (-weight, weight), method="bvls", tol=1e-14)
    return signal + difference.T @ found.x


def differentiable(signal: Tensor, weight: Tensor) -> Tensor:
    class Denoise(torch.autograd.Function):
        @staticmethod
        def forward(ctx, signal, weight):
            y, ctx.signs = denoise(signal, weight)
            return y

        @staticmethod
        def backward(ctx, cotangent):
            return differentiate_denoised(ctx.signs, cotangent)

    return Denoise.apply(signal, weight)


@pytest.mark.parametrize("weight", [0.05, 0.5, 2.0, 100.0])
def test_the_solution_is_that_of_the_dual_problem(weight):
    signal = signals(3, 40)
    y, _ = denoise(signal, torch.full((3,), weight, dtype=torch.float64))
    for row, found in zip(signal.numpy(), y.numpy(), strict=True):
        np.testing.assert_allclose(found, by_the_dual(row, weight), atol=1e-9)


@pytest.mark.parametrize("kind", ["steps", "ramp", "zigzag", "walk"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 30.0])
def test_the_dual_certificate_of_long_signals(kind, weight):
    """y is the solution iff z = cumsum(y - x) stays within ±λ, is at λ sign of the jump at jumps, and ends at zero."""
    count = 3000
    index = torch.arange(count, dtype=torch.float64)
    signal = {
        "steps": signals(1, count, 1)[0],
        "ramp": index / 100,
        "zigzag": (-1.0) ** index,
        "walk": signals(1, count, 2)[0].cumsum(0),
    }[kind]
    y, signs = denoise(signal[None], torch.tensor([weight], dtype=torch.float64))
    dual = (y[0] - signal).cumsum(0)
    scale = 1e-12 * signal.abs().sum().item()
    assert abs(dual[-1]) < scale
    assert dual.abs().max() <= weight + scale
    jumps = y[0].diff() != 0
    assert torch.all((dual[:-1][jumps] - weight * y[0].diff().sign()[jumps]).abs() < scale)
    assert torch.all(signs[0][~jumps] == 0)


def test_batched_is_one_by_one_with_weights_of_their_own():
    signal, weight = signals(4, 30), torch.tensor([0.1, 0.4, 0.0, 7.0], dtype=torch.float64)
    y, signs = denoise(signal, weight)
    cotangent = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    together = differentiate_denoised(signs, cotangent)
    for index in range(4):
        own, own_signs = denoise(signal[index : index + 1], weight[index : index + 1])
        assert torch.equal(own[0], y[index])
        for all_, one in zip(together, differentiate_denoised(own_signs, cotangent[index : index + 1]), strict=True):
            torch.testing.assert_close(all_[index], one[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("weight", [0.2, 1.0, 50.0])
def test_gradcheck(weight):
    """At regular points, with segments of several points; at 50 all of them are one."""
    signal = signals(2, 24).requires_grad_()
    weights = torch.tensor([weight, 0.7 * weight], dtype=torch.float64, requires_grad=True)
    _, signs = denoise(signal, weights)
    assert (signs == 0).any()
    assert torch.autograd.gradcheck(differentiable, (signal, weights), eps=1e-6, atol=1e-6)


def test_the_derivative_is_that_of_a_dense_kkt_system():
    """Neighbours of one segment are equality constraints: [[I, Eᵀ], [E, 0]] [dy; ·] = [dx - dλ Dᵀ sign; 0]."""
    signal = signals(3, 20)
    weight = torch.tensor([0.3, 0.8, 2.0], dtype=torch.float64)
    cotangent = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    y, signs = denoise(signal, weight)
    for_signal, for_weight = differentiate_denoised(signs, cotangent)
    difference = torch.eye(20, dtype=torch.float64).diff(dim=0)
    for index in range(3):
        tied = difference[y[index].diff() == 0]
        size = 20 + len(tied)
        system = torch.zeros(size, size, dtype=torch.float64)
        system[:20, :20] = torch.eye(20)
        system[:20, 20:], system[20:, :20] = tied.T, tied
        right = torch.cat([cotangent[index], torch.zeros(len(tied), dtype=torch.float64)])
        answer = torch.linalg.solve(system, right)[:20]
        slope = difference.T @ y[index].diff().sign()
        torch.testing.assert_close(for_signal[index], answer, rtol=0, atol=1e-12)
        torch.testing.assert_close(for_weight[index], -answer @ slope, rtol=0, atol=1e-12)


def test_closed_forms_of_fusing_segments():
    """Two points at distance 2: each moves by λ until they meet at λ = 1, then both stay at the mean."""
    signal = torch.tensor([[0.0, 2.0]], dtype=torch.float64).repeat(4, 1)
    weight = torch.tensor([0.25, 1 - 1e-9, 1 + 1e-9, 5.0], dtype=torch.float64)
    y, signs = denoise(signal, weight)
    expected = torch.tensor([[0.25, 1.75], [1 - 1e-9, 1 + 1e-9], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-15)
    for_signal, for_weight = differentiate_denoised(signs, torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1))
    assert for_signal.tolist() == [[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.5, 0.5]]
    assert for_weight.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_constant_signal_stays_and_one_point_is_itself():
    weight = torch.tensor([0.5], dtype=torch.float64)
    constant = torch.full((1, 9), 0.1, dtype=torch.float64)
    torch.testing.assert_close(denoise(constant, weight)[0], constant, rtol=0, atol=1e-16)
    single = torch.tensor([[3.25]], dtype=torch.float64)
    y, signs = denoise(single, weight)
    assert torch.equal(y, single)
    for_signal, for_weight = differentiate_denoised(signs, torch.ones(1, 1, dtype=torch.float64))
    assert for_signal.tolist() == [[1.0]]
    assert for_weight.tolist() == [0.0]


def test_single_precision_has_the_same_segments():
    signal, weight = signals(2, 200).float(), torch.tensor([0.5, 2.0])
    y, signs = denoise(signal, weight)
    exact, exact_signs = denoise(signal.double(), weight.double())
    assert y.dtype == signs.dtype == torch.float32
    assert torch.equal(signs, exact_signs.float())
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)


def test_the_pass_through_leaves_out_the_averages_and_never_ascends():
    signal, weight = signals(2, 30), torch.tensor([0.4, 1.0], dtype=torch.float64)
    y, signs = denoise(signal, weight)
    cotangent = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for_signal, for_weight = differentiate_denoised(signs, cotangent, pass_through=True)
    assert torch.equal(for_signal, cotangent)
    jumps = torch.nn.functional.pad(y.diff(dim=1).sign(), (1, 1))
    torch.testing.assert_close(for_weight, (cotangent * jumps.diff(dim=1)).sum(1), rtol=1e-13, atol=0)
    exact = differentiate_denoised(signs, cotangent)[0]
    assert torch.all((exact * for_signal).sum(1) > 0)


def test_nothing_moves_when_the_input_does_not():
    signal, weight = signals(2, 50), torch.tensor([0.3, 0.6], dtype=torch.float64)
    kept = signal.clone(), weight.clone()
    first, second = denoise(signal, weight), denoise(signal, weight)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert torch.equal(signal, kept[0])
    assert torch.equal(weight, kept[1])


def test_failed_elements_are_nan_alone():
    signal = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64).repeat(2, 1).requires_grad_()
    weight = torch.tensor([0.5, -0.5], dtype=torch.float64)
    y = lpgd.NodeLayer(lpgd.nodes.TotalVariationDenoising(), on_error="nan")(signal, weight)
    assert y[0].tolist() == [0.5, 1.0, 2.5]
    assert torch.isnan(y[1]).all()
    with pytest.raises(lpgd.SolverError, match=r"element 1 of 2: INVALID_DATA.*negative"):
        lpgd.NodeLayer(lpgd.nodes.TotalVariationDenoising())(signal, weight)


def test_the_pass_through_of_the_layer_hands_the_cotangent_on():
    signal = torch.tensor([0.0, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor(0.5, dtype=torch.float64)
    cotangent = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for pass_through, expected in ((False, [0.5, 0.5, 0.0]), (True, [1.0, 0.0, 0.0])):
        y = lpgd.NodeLayer(lpgd.nodes.TotalVariationDenoising(pass_through=pass_through))(signal, weight)
        assert torch.autograd.grad(y, signal, cotangent)[0].tolist() == expected


def test_a_signal_without_points_is_refused():
    with pytest.raises(ValueError, match="signal has no points"):
        lpgd.NodeLayer(lpgd.nodes.TotalVariationDenoising())(torch.zeros(2, 0), torch.ones(2))


def pair_weights(batch: int, count: int, seed: int = 9) -> Tensor:
    """Positive weights of all sizes, one zero, and one that no jump pays for."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(batch, count - 1, generator=generator, dtype=torch.float64).square() * 2
    weights[:, 3], weights[:, 7] = 0.0, 1e3
    return weights


def test_the_solution_with_a_weight_for_each_pair_is_that_of_a_quadratic_program():
    signal, weights = signals(3, 30), pair_weights(3, 30)
    y, _ = denoise(signal, weights)
    for row, own, found in zip(signal.numpy(), weights.numpy(), y.numpy(), strict=True):
        variable = cp.Variable(30)
        objective = 0.5 * cp.sum_squares(variable - row) + own @ cp.abs(cp.diff(variable))
        accuracy = {"tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
        cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL, **accuracy)
        np.testing.assert_allclose(found, variable.value, atol=1e-6)


@pytest.mark.parametrize(("batch", "count"), [(200, 40), (1, 3000)])
def test_the_dual_certificate_of_signals_with_weights_of_pairs(batch, count):
    signal, weights = signals(batch, count, 4), pair_weights(batch, count)
    y, signs = denoise(signal, weights)
    dual, jumps = (y - signal).cumsum(1), signs != 0
    assert torch.all(dual[:, -1].abs() < 1e-9)
    assert torch.all(dual[:, :-1].abs() <= weights + 1e-9)
    assert torch.all((dual[:, :-1] - weights * signs)[jumps].abs() < 1e-9)
    assert torch.equal(y.diff(dim=1).sign(), signs)


def test_equal_weights_of_pairs_are_one_weight():
    signal, weight = signals(3, 50), torch.tensor([0.1, 0.7, 5.0], dtype=torch.float64)
    cotangent = torch.randn(3, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    one, signs = denoise(signal, weight)
    each, own = denoise(signal, weight[:, None].expand(3, 49))
    torch.testing.assert_close(each, one, rtol=0, atol=1e-14)
    assert torch.equal(signs, own)
    total = differentiate_denoised(signs, cotangent)[1]
    parts = differentiate_denoised(signs, cotangent, per_pair=True)[1]
    torch.testing.assert_close(parts.sum(1), total, rtol=0, atol=1e-13)


def test_weights_of_pairs_have_their_gradients():
    layer = lpgd.NodeLayer(lpgd.nodes.TotalVariationDenoising(per_pair=True))
    signal, weights = signals(2, 16).requires_grad_(), (pair_weights(2, 16) + 0.05).requires_grad_()
    assert torch.autograd.gradcheck(layer, (signal, weights), atol=1e-6)


def test_weights_of_pairs_are_looked_at():
    layer = lpgd.NodeLayer(lpgd.nodes.TotalVariationDenoising(per_pair=True), on_error="nan")
    with pytest.raises(ValueError, match="weight has 3 entries; 5 points have 4 pairs"):
        layer(torch.zeros(5), torch.ones(3))
    y = layer(torch.arange(6.0).view(2, 3), torch.tensor([[0.5, 0.5], [0.5, -0.1]]))
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    single = layer(torch.tensor([2.5]), torch.zeros(0))
    assert single.tolist() == [2.5]
