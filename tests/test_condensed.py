"""Systems without the rows whose multipliers follow from the others: what they solve, and which are singular."""

from __future__ import annotations

import numpy as np
import pytest

from lpgd import Cones, ConicStructure
from lpgd.arrays import FloatArray
from lpgd.cones.projections import projection_derivative
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.solvers.kkt.condensed import Condensed, is_condensed

COUNT, N = 7, 16
CONES = Cones(zero=2, nonnegative=3, second_order=(6, 4, 3))


def _structure(quadratic: bool) -> ConicStructure:
    everything = np.arange(N)
    return ConicStructure(
        quadratic=SparsityPattern.dense(N, N) if quadratic else SparsityPattern.empty(N, N),
        constraint=SparsityPattern.dense(CONES.rows, N),
        cones=CONES,
        lower_index=everything,
        upper_index=everything,
    )


def _data(quadratic: bool) -> tuple[FloatArray, FloatArray, FloatArray, np.ndarray]:
    """P and A, column by column, v with cones inside, outside and in between, and variables at bounds."""
    generator = np.random.default_rng(3)
    root = generator.standard_normal((COUNT, N, N))
    P = (root @ root.swapaxes(1, 2)).reshape(COUNT, -1) if quadratic else np.zeros((COUNT, 0))
    A = generator.standard_normal((COUNT, CONES.rows * N))
    v = generator.standard_normal((COUNT, CONES.rows))
    v[0, 5], v[1, 5] = 10.0, -10.0  # y inside of the first cone, and 0
    v[2, 5] = 0.95 * np.linalg.norm(v[2, 6:11])  # curvature hardly counts
    at_bound = np.zeros((COUNT, N), dtype=bool)
    at_bound[1:, 4] = True
    at_bound[3, [0, 7]] = True
    return P, A, v, at_bound


@pytest.mark.parametrize(("quadratic", "rho"), [(False, 0.5), (True, 0.0), (True, 0.5)])
def test_the_change_satisfies_the_linearised_conditions(quadratic: bool, rho: float) -> None:
    structure = _structure(quadratic)
    assert is_condensed(structure)
    P, A, v, at_bound = _data(quadratic)
    system = Condensed(structure, rho, P, A, v, at_bound)
    generator = np.random.default_rng(4)
    g_x, g_z = generator.standard_normal((2, COUNT, N))
    g_y = generator.standard_normal((COUNT, CONES.rows))
    dx, dy, dz = system.solve(g_x, g_y, g_z)
    squares = P.reshape(COUNT, N, N) if quadratic else np.zeros((COUNT, N, N))
    rows = A.reshape(COUNT, N, CONES.rows).swapaxes(1, 2)
    assert (system.condition < 1e8).all()
    for element in range(COUNT):
        slope = squares[element] @ dx[element] + rho * dx[element] + rows[element].T @ dy[element] + dz[element]
        np.testing.assert_allclose(slope, -g_x[element], atol=1e-9)
        moved = rows[element] @ dx[element] + g_y[element]
        np.testing.assert_allclose(moved[: CONES.zero], 0.0, atol=1e-9)
        D = projection_derivative(CONES, v[element], dual=True)
        cones = slice(CONES.zero, None)
        np.testing.assert_allclose(D.apply(dy[element] + moved)[cones], dy[element][cones], atol=1e-9)
        np.testing.assert_array_equal(dx[element][at_bound[element]], -g_z[element][at_bound[element]])
        assert not dz[element][~at_bound[element]].any()


def test_an_element_has_its_bits_whoever_is_beside_it() -> None:
    structure = _structure(quadratic=True)
    P, A, v, at_bound = _data(quadratic=True)
    tilt = np.random.default_rng(5).standard_normal((COUNT, N)), v, np.zeros((COUNT, N))
    together = Condensed(structure, 0.0, P, A, v, at_bound)
    changes = together.solve(*tilt)
    for element in range(COUNT):
        one = slice(element, element + 1)
        alone = Condensed(structure, 0.0, P[one], A[one], v[one], at_bound[one])
        assert alone.inverse[0] == together.inverse[element]
        for whole, single in zip(changes, alone.solve(*(values[one] for values in tilt)), strict=True):
            np.testing.assert_array_equal(whole[element], single[0])


def test_two_equal_equalities_are_singular() -> None:
    structure = _structure(quadratic=True)
    P, A, v, at_bound = _data(quadratic=True)
    rows = A.reshape(COUNT, N, CONES.rows)
    rows[2, :, 1] = rows[2, :, 0]
    system = Condensed(structure, 0.0, P, A, v, at_bound)
    assert not system.condition[2] < 1e10
    assert (np.delete(system.condition, 2) < 1e8).all()


def test_the_condition_is_that_of_the_whole_system() -> None:
    structure = _structure(quadratic=True)
    P, A, v, at_bound = _data(quadratic=True)
    system = Condensed(structure, 0.0, P, A, v, at_bound)
    rows = A.reshape(COUNT, N, CONES.rows).swapaxes(1, 2)
    for element in range(COUNT):
        T, complement = projection_derivative(CONES, v[element], dual=True).factor()
        free = ~at_bound[element]
        turned = (T @ rows[element])[:, free]
        K = np.block([[P[element].reshape(N, N)[np.ix_(free, free)], turned.T], [turned, -np.diag(complement)]])
        scale = 1.0 / np.sqrt(np.abs(K).max(1))
        inverse = np.linalg.norm(np.linalg.inv(scale[:, None] * K * scale), 2)
        assert 0.01 * inverse < system.inverse[element] <= inverse * (1 + 1e-12)


def test_a_variable_that_is_in_no_row_and_has_no_curvature_is_loose() -> None:
    structure = _structure(quadratic=False)
    P, A, v, at_bound = _data(quadratic=False)
    A.reshape(COUNT, N, CONES.rows)[[1, 2], [4, 7]] = 0.0  # the first is at a bound
    loose = Condensed(structure, 0.0, P, A, v, at_bound).loose
    assert np.argwhere(loose).tolist() == [[2, 7]]
