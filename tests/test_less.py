"""The published descents of LESS: against the paper's formulas written out, and against the paper's tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from benchmarks.less import VARIANTS, objective, problems, rows
from lpgd.nodes import LessDescent, SphereLeastSquares
from lpgd.nodes.sphere.descent import least_squares
from lpgd.nodes.sphere.secular import normalised
from lpgd.status import Status


def written_out(A: np.ndarray, b: np.ndarray, method: LessDescent) -> tuple[np.ndarray, int]:
    """One element by the equations of the paper, with values of f: the end, and the iterations."""

    def f(u: np.ndarray) -> float:
        return 0.5 * float(np.sum((A @ u - b) ** 2))

    def tangential(u: np.ndarray) -> np.ndarray:
        slope = A.T @ (A @ u - b)
        return slope - (slope @ u) * u

    free = np.linalg.pinv(A) @ b
    u = free / np.linalg.norm(free)
    for iteration in range(1, method.max_iterations + 1):
        slope = A.T @ (A @ u - b)
        d = -tangential(u) if method.tangent else -slope
        eta = 1.0 if method.step == 1.0 else (d @ d) / np.sum((A @ d) ** 2)
        w = 1.0
        if method.weighted:
            toward = -slope if np.linalg.norm(free) >= 1 else slope
            w = 1.0 - toward @ free / np.linalg.norm(toward) / np.linalg.norm(free)
        if method.search == "backtracking":
            # The rounding decides where eq. 7 holds with equality, which a step of eq. 6 makes it do.
            while f(u + eta * w * d) > f(u) + 0.5 * eta * w * (slope @ d) + 1e-12 * f(u):
                eta *= 0.8
        if method.search == "tangent":
            moved = u + eta * w * d
            while tangential(moved / np.linalg.norm(moved)) @ tangential(u) < -1e-13 * np.linalg.norm(slope) ** 2:
                eta *= 0.9
                moved = u + eta * w * d
        moved = u + eta * w * d
        before, u = f(u), moved / np.linalg.norm(moved)
        if abs(f(u) - before) < method.tolerance:
            return u, iteration
    return u, method.max_iterations


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("m", "n"), [(2, 2), (12, 5)])
def test_each_method_is_the_paper_s_formulas(name: str, m: int, n: int):
    """For six iterations: steps that are too long go round the sphere, and rounding errors grow on the way."""
    method = replace(VARIANTS[name], max_iterations=6)
    A, b = problems(m, n, 40)
    answer = SphereLeastSquares(method).solve((A, b), None)
    for place in range(40):
        u, iterations = written_out(A[place].numpy(), b[place].numpy(), method)
        np.testing.assert_allclose(answer.y[place].numpy(), u, rtol=0, atol=1e-5)
        assert int(answer.iterations[place]) == iterations


@pytest.mark.parametrize("name", ["PGD+RM+BLSOne", "PGD+RM+TWD"])
def test_the_methods_with_a_search_end_where_the_formulas_do(name: str):
    A, b = problems(12, 5, 40)
    answer = SphereLeastSquares(VARIANTS[name]).solve((A, b), None)
    for place in range(40):
        u, iterations = written_out(A[place].numpy(), b[place].numpy(), VARIANTS[name])
        np.testing.assert_allclose(answer.y[place].numpy(), u, rtol=0, atol=1e-7)
        assert abs(int(answer.iterations[place]) - iterations) <= 1


def within(count: int, paper: float, trials: int = 1000) -> bool:
    """Three standard errors of the paper's share, to one count of rounding in what it prints."""
    return abs(count - trials * paper) <= 3 * math.sqrt(trials * paper * (1 - paper)) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_paper_s_table_of_2x2_problems(dtype: torch.dtype):
    """Table 1: 93.8 % of BLSOne's ends are not worse than SciPy's, and 99 % of TWD's."""
    table = {row.name: row for row in rows(2, 2, dtype=dtype)}
    assert within(table["PGD+RM+BLSOne"].better, 0.938)
    assert within(table["PGD+RM+TWD"].better, 0.99)
    assert table["PGD+RM+TWD"].global_minima >= 990
    assert table["PGD+RM+TWD"].failed_inside + table["PGD+RM+TWD"].failed_outside <= 10
    assert table["secular equation"].global_minima == 1000


def test_the_paper_s_table_of_64x32_problems():
    """Table 4: 99.4 % of BLSOne's ends are not worse than SciPy's; of these problems SciPy finds all global minima.

    ``python -m benchmarks.less --sizes 64x32`` has SciPy's minutes.
    """
    A, b = problems(64, 32)
    best = objective(A, b, SphereLeastSquares().solve((A, b), None).y)
    value = objective(A, b, SphereLeastSquares(VARIANTS["PGD+RM+BLSOne"]).solve((A, b), None).y)
    assert within(int((value <= best + 1e-6 * (1 + best)).sum()), 0.994)


def test_twd_shrinks_steps_until_the_tangent_direction_no_longer_reverses():
    A, b = problems(6, 3, 50)
    start = normalised(least_squares(A, b))
    one = SphereLeastSquares(LessDescent(max_iterations=1)).solve((A, b), None).y

    def tangential(u: Tensor) -> Tensor:
        slope = (A.mT @ (A @ u[..., None] - b[..., None]))[..., 0]
        return slope - (slope * u).sum(-1, keepdim=True) * u

    before, after = tangential(start), tangential(one)
    assert ((before * after).sum(-1) >= -1e-12 * before.norm(dim=-1) * (1 + after.norm(dim=-1))).all()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_the_options_of_backtracking(alpha: float, beta: float):
    """The step after one iteration is β^k with the first k for which eq. 7 holds."""
    A, b = problems(9, 4, 40)
    start = normalised(least_squares(A, b))
    method = LessDescent(search="backtracking", step=1.0, alpha=alpha, beta=beta, max_iterations=1)
    y = SphereLeastSquares(method).solve((A, b), None).y
    slope = (A.mT @ (A @ start[..., None] - b[..., None]))[..., 0]
    d = -(slope - (slope * start).sum(-1, keepdim=True) * start)
    value, fall = objective(A, b, start), (slope * d).sum(-1)
    lengths = beta ** torch.arange(60, dtype=torch.float64)
    enough = torch.stack([objective(A, b, start + s * d) <= value + alpha * s * fall for s in lengths])
    first = lengths[enough.double().argmax(0)]
    torch.testing.assert_close(y, normalised(start + first[:, None] * d), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("PGD+RM")])
def test_first_and_second_derivatives_at_refined_ends(name: str):
    method = VARIANTS[name]
    own = LessDescent(search=method.search, step=method.step, weighted=method.weighted, refine=True, max_iterations=500)
    A, b = problems(5, 3, 2)
    A = A / A.norm(dim=(-2, -1), keepdim=True)  # so that a step of 1 converges, too
    layer = lpgd.NodeLayer(SphereLeastSquares(own))
    inputs = (A.requires_grad_(), b.requires_grad_())
    assert {status.name for status in layer.solve(*inputs).statuses} == {"SOLVED"}
    assert torch.autograd.gradcheck(layer, inputs, atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, inputs, atol=1e-6, fast_mode=True)


def test_ends_of_the_paper_s_rule_are_not_taken_for_solutions():
    A, b = problems(2, 2, 20)
    rough = LessDescent(tangent=False, search="none", tolerance=1e9)
    layer = lpgd.NodeLayer(SphereLeastSquares(rough), lpgd.ImplicitKKT())
    with pytest.warns(lpgd.LpgdWarning, match="do not satisfy the optimality conditions"):
        layer(A.requires_grad_(), b).sum().backward()
    refined = lpgd.NodeLayer(SphereLeastSquares(replace(VARIANTS["PGD+RM+BLSOne"], refine=True)))
    assert float(refined.solve(*problems(64, 32, 3)).residual.max()) <= 1e-11


def test_elements_and_dtypes_on_their_own():
    A, b = problems(7, 4, 6)
    node = SphereLeastSquares(LessDescent(tolerance=1e-10))
    whole = node.solve((A, b), None)
    for place in range(6):
        alone = node.solve((A[place : place + 1], b[place : place + 1]), None)
        torch.testing.assert_close(alone.y[0], whole.y[place], rtol=0, atol=1e-10)
        assert alone.iterations[0] == whole.iterations[place]
    single = SphereLeastSquares(LessDescent()).solve((A.float(), b.float()), None)
    assert single.y.dtype == torch.float32
    torch.testing.assert_close(single.y.double(), whole.y, rtol=0, atol=1e-2)
    few = SphereLeastSquares(LessDescent(max_iterations=1, search="none", step=1.0)).solve((A, b), None)
    assert set(few.statuses) == {Status.ITERATION_LIMIT}
    shared = node.solve((A[:1].expand(6, 7, 4), b), None)
    torch.testing.assert_close(shared.y, node.solve((A[:1].repeat(6, 1, 1), b), None).y, rtol=0, atol=1e-10)


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="search is 'armijo'; it must be one of none, backtracking, tangent"):
        LessDescent(search="armijo")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="takes tangent=True"):
        LessDescent(tangent=False)
    with pytest.raises(ValueError, match="step is 0"):
        LessDescent(step=0.0)
    with pytest.raises(ValueError, match=r"alpha is 1\.5"):
        LessDescent(alpha=1.5)
    with pytest.raises(ValueError, match="beta is 1"):
        LessDescent(beta=1.0)
