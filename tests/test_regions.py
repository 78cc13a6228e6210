"""Pieces of the projections: the projection is smooth within one, and the depth is the distance to the next."""

from __future__ import annotations

import numpy as np
import pytest

from lpgd.cones.product import Cones
from lpgd.cones.projections import project, projection_derivative
from lpgd.cones.regions import regions

CONES = Cones(2, 3, (1, 3, 4), (3, 2), 2, 2, (0.3, 0.6, -0.4, 0.5))
LINEAR = Cones(2, 3, (1, 3, 4), (3, 2))


def points(cones: Cones, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, cones.rows)) * 10 ** rng.uniform(-2, 2, (count, 1))


def unit_steps(cones: Cones, count: int, seed: int) -> np.ndarray:
    """Directions of length one in the rows of each cone."""
    step = np.random.default_rng(seed).normal(size=(count, cones.rows))
    squares = np.zeros((count, int(cones.blocks[-1]) + 1))
    np.add.at(squares.T, cones.blocks, (step**2).T)
    return step / np.sqrt(squares[:, cones.blocks])


def test_by_hand() -> None:
    cones = Cones(zero=1, nonnegative=2, second_order=(3,), semidefinite=(2,))
    v = np.array([-7.0, 2.0, -3.0, 1.0, 3.0, 4.0, 5.0, 0.0, -1.0])
    pieces, depths = regions(cones, v)
    assert pieces[1] != pieces[2]
    np.testing.assert_allclose(depths, [np.inf, 2.0, 3.0, *[4 / 2**0.5] * 3, *[1.0] * 3], rtol=1e-12)
    assert (pieces[6:] == 1).all()  # one positive eigenvalue
    inside, outside = (regions(cones, v + np.eye(9)[3] * shift)[0][3:6] for shift in (4.1, -6.1))
    assert len({*inside, *outside, *pieces[3:6]}) == 3
    with pytest.raises(ValueError, match="the last dimension is 9"):
        regions(cones, v[:8])


@pytest.mark.parametrize("seed", range(3))
def test_no_other_piece_within_the_depth(seed: int) -> None:
    v, steps = points(LINEAR, 2000, seed), unit_steps(LINEAR, 2000, seed + 10)
    pieces, depths = regions(LINEAR, v)
    reach = np.where(np.isfinite(depths), depths, 1.0)
    np.testing.assert_array_equal(regions(LINEAR, v + 0.999 * reach * steps)[0], pieces)


def test_within_the_depth_to_first_order_for_every_cone() -> None:
    v, steps = points(CONES, 4000, 4), unit_steps(CONES, 4000, 5)
    size = np.zeros((4000, int(CONES.blocks[-1]) + 1))
    np.maximum.at(size.T, CONES.blocks, np.abs(v).T)
    pieces, depths = regions(CONES, v)
    reach = np.where(depths < 0.01 * size[:, CONES.blocks], depths, 0.0)
    changed = regions(CONES, v + 0.8 * reach * steps)[0] != pieces
    assert (reach > 0).any(0)[6:].all()
    assert changed.mean() < 1e-3  # the curvature next to an apex


def test_the_next_piece_is_at_the_depth() -> None:
    """Bisected along the way to a random point of another piece, no boundary is nearer than the depth says."""
    v, target = points(CONES, 1000, 6), points(CONES, 1000, 7)
    pieces, depths = regions(CONES, v)
    low, high = np.zeros(v.shape), np.ones(v.shape)
    other = regions(CONES, target)[0] != pieces
    for _ in range(40):
        middle = 0.5 * (low + high)
        same = regions(CONES, v + middle * (target - v))[0] == pieces
        low, high = np.where(same, middle, low), np.where(same, high, middle)
    way = (high * (target - v)) ** 2
    lengths = np.zeros((1000, int(CONES.blocks[-1]) + 1))
    np.add.at(lengths.T, CONES.blocks, way.T)
    distance = np.sqrt(lengths[:, CONES.blocks])
    assert (distance >= 0.5 * depths)[other].mean() > 0.995


def test_the_projection_is_smooth_within_a_piece() -> None:
    """With no piece between two points the derivative at their middle predicts the change of the projection."""
    v, steps = points(CONES, 300, 8), unit_steps(CONES, 300, 9)
    _, depths = regions(CONES, v)
    size = np.abs(v).max(-1, keepdims=True)
    step = 1e-5 * np.minimum(np.where(np.isfinite(depths), depths, size), size) * steps
    change = project(CONES, v + step, dual=True) - project(CONES, v - step, dual=True)
    for row in range(300):
        predicted = 2 * projection_derivative(CONES, v[row], dual=True).apply(step[row])
        np.testing.assert_allclose(change[row], predicted, atol=1e-3 * np.abs(step[row]).max() + 1e-13 * size[row, 0])
