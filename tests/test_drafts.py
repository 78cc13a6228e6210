"""Drafts: less accurate answers, from which Newton's method goes on; the solver answers in earnest where that fails."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd

WITHOUT = lpgd.Clarabel(max_iterations=199)
"""Limits that are asked for are the solver's own: no draft comes before it."""


def ball(solver: lpgd.Clarabel, size: int) -> lpgd.CvxpyLayer:
    """The point of the unit ball that is farthest along -c."""
    x, c = cp.Variable(size), cp.Parameter(size)
    return lpgd.CvxpyLayer(cp.Problem(cp.Minimize(c @ x), [cp.norm(x) <= 1]), [c], [x], solver=solver)


@pytest.mark.parametrize("size", [4, 50])
def test_a_draft_ends_at_rounding_and_takes_fewer_iterations(size: int) -> None:
    c = torch.from_numpy(np.random.default_rng(0).standard_normal((6, size)))
    drafted, thorough = (ball(solver, size).solve(c) for solver in (lpgd.Clarabel(), WITHOUT))
    expected = -c / c.norm(dim=-1, keepdim=True)
    (x,) = ball(lpgd.Clarabel(), size)(c)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-13)
    assert drafted.isolated is not None
    assert bool(drafted.isolated.all())
    assert (drafted.iterations <= thorough.iterations).all()
    if size == 50:
        assert drafted.iterations.sum() < thorough.iterations.sum()
    else:  # drafts of small programs are corrected, as in earnest: they end nearer for it
        assert drafted.known_before is not None
        assert float(drafted.known_before.max()) < 1e-7


def test_where_solutions_are_many_the_solver_answers_itself() -> None:
    """Of the solutions x₁ = 0, |x₂| ≤ 1 it finds the middle, and the same bits as without a draft."""
    x, a = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.norm(cp.multiply(a, x))), [x[1] >= -1, x[1] <= 1])
    data = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    (found,), (expected,) = (
        lpgd.CvxpyLayer(problem, [a], [x], solver=solver)(data) for solver in (lpgd.Clarabel(), WITHOUT)
    )
    assert torch.equal(found[:2], expected[:2])
    torch.testing.assert_close(found[:2, 0], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1, 3])
def test_elements_have_the_same_bits_whatever_their_neighbours_need(size: int) -> None:
    x, a = cp.Variable(2), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(cp.norm(cp.multiply(a, x) - 1)), [x[1] >= -1, x[1] <= 1])
    layer = lpgd.CvxpyLayer(problem, [a], [x], solver=lpgd.Clarabel())
    data = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 2.0], [0.5, 0.7]], dtype=torch.float64)
    (together,) = layer(data)
    for start in range(0, 4 - size + 1):
        (alone,) = layer(data[start : start + size])
        assert torch.equal(alone, together[start : start + size])
