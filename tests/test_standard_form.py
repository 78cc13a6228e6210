"""Systems of programs whose variables are rows of cones: what they solve, and which are singular."""

from __future__ import annotations

from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch

import lpgd
from lpgd import Cones, ConicStructure
from lpgd.arrays import FloatArray, IntArray
from lpgd.cones.projections import projection_derivative
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.solvers.kkt.standard import Standard, is_standard

COUNT = 6
CONES = Cones(zero=3, nonnegative=2, second_order=(4,), semidefinite=(3, 2))
N, FIRST = 4 + 6 + 3, 5
ORDER: IntArray = np.random.default_rng(0).permutation(N)


def _structure(quadratic: int = 0, extra: bool = False) -> ConicStructure:
    """Each variable in one row of a cone, in another order; all of them in all linear rows."""
    entries = np.zeros((CONES.rows, N))
    entries[:FIRST] = 1.0
    entries[FIRST + np.arange(N), ORDER] = 1.0
    if extra:
        entries[FIRST, ORDER[1]] = 1.0
    everything = np.arange(quadratic)
    return ConicStructure(
        quadratic=SparsityPattern((N, N), everything, everything),
        constraint=SparsityPattern.from_matrix(entries),
        cones=CONES,
        lower_index=np.zeros(0, dtype=np.int64),
        upper_index=np.zeros(0, dtype=np.int64),
    )


def _data() -> tuple[FloatArray, FloatArray]:
    """A, and v with linear rows active or not, cones inside, outside and in between."""
    structure, generator = _structure(), np.random.default_rng(3)
    A = generator.standard_normal((COUNT, structure.constraint.nnz))
    A += np.sign(A) * (structure.constraint.rows >= FIRST)
    v = generator.standard_normal((COUNT, CONES.rows))
    v[:, 3], v[:, 4] = 1.0, -1.0
    v[0, FIRST], v[1, FIRST] = 0.5, -1.5
    v[2, FIRST : FIRST + 4] = 0.3, 1.0, 1.0, 1.0
    return A, v


def test_which_programs_are_in_standard_form() -> None:
    assert is_standard(_structure())
    assert not is_standard(_structure(quadratic=2))
    assert not is_standard(_structure(extra=True))


def _condition(rows: FloatArray, v: FloatArray) -> float:
    T, complement = projection_derivative(CONES, v, dual=True).factor()
    return float(np.linalg.cond(np.block([[np.zeros((N, N)), (T @ rows).T], [T @ rows, -np.diag(complement)]])))


def test_the_change_satisfies_the_linearised_conditions() -> None:
    structure, (A, v) = _structure(), _data()
    system = Standard(structure, A, v)
    generator = np.random.default_rng(4)
    g_x, g_y = generator.standard_normal((COUNT, N)), generator.standard_normal((COUNT, CONES.rows))
    with np.errstate(invalid="ignore"):  # of singular ones
        dx, dy, dz = system.solve(g_x, g_y, np.zeros_like(g_x))
    assert not dz.any()
    rows = structure.constraint.dense_matrices(A)
    regular = 0
    for element in range(COUNT):
        D = projection_derivative(CONES, v[element], dual=True)
        if _condition(rows[element], v[element]) > 1e6:
            assert not system.condition[element] < 1e6
            continue
        regular += 1
        assert system.condition[element] < 1e6
        np.testing.assert_allclose(rows[element].T @ dy[element], -g_x[element], atol=1e-9)
        moved = rows[element] @ dx[element] + g_y[element]
        np.testing.assert_allclose(moved[: CONES.zero], 0.0, atol=1e-9)
        curved = slice(CONES.zero, None)
        np.testing.assert_allclose(D.apply(dy[element] + moved)[curved], dy[element][curved], atol=1e-9)
    assert regular >= 3


def test_an_element_has_its_bits_whoever_is_beside_it() -> None:
    structure, (A, v) = _structure(), _data()
    tilt = np.random.default_rng(5).standard_normal((COUNT, N)), v, np.zeros((COUNT, N))
    together = Standard(structure, A, v)
    with np.errstate(invalid="ignore"):
        changes = together.solve(*tilt)
    for element in np.flatnonzero(together.condition < 1e10):
        one = slice(element, element + 1)
        alone = Standard(structure, A[one], v[one])
        assert alone.inverse[0] == together.inverse[element]
        for whole, single in zip(changes, alone.solve(*(values[one] for values in tilt)), strict=True):
            np.testing.assert_array_equal(whole[element], single[0])


@pytest.mark.parametrize("element", [2, 3])
def test_two_equal_equalities_are_singular(element: int) -> None:
    structure, (A, v) = _structure(), _data()
    rows = structure.constraint.rows
    A[element, rows == 1] = A[element, rows == 0]
    assert not Standard(structure, A, v).condition[element] < 1e10


def test_a_variable_that_is_in_no_cone_is_singular() -> None:
    structure, (A, v) = _structure(), _data()
    A[3, np.flatnonzero(structure.constraint.rows == FIRST + 2)] = 0.0
    condition = Standard(structure, A, v).condition
    assert not condition[3] < 1e10
    assert condition[1] < 1e10


# Within the dual cone: then -b is the one solution of minimise qᵀx, x + b ∈ K.
COSTS = {
    "second-order": (Cones(second_order=(3,)), [2.0, 1.0, 0.0]),
    "semidefinite": (Cones(semidefinite=(2,)), [1.0, 0.0, 1.0]),
    "exponential": (Cones(exponential=1), [-1.0, 0.5, 1.0]),
    "power": (Cones(power=(0.5,)), [1.0, 1.0, 0.5]),
    "two": (Cones(second_order=(2,), power=(0.5,)), [1.0, 0.5, 1.0, 1.0, 0.5]),
}


@pytest.mark.parametrize("method", [None, lpgd.LPGD(), lpgd.LPGD(tau=1e-3)], ids=repr)
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("cones", "cost"), COSTS.values(), ids=COSTS)
def test_cones_alone_without_linear_constraints(cones: Cones, cost: list[float], batch: Any, method: Any) -> None:
    q = torch.tensor(cost, dtype=torch.float64)
    b = torch.linspace(0.1, 0.5, len(cost), dtype=torch.float64).requires_grad_()
    A = -torch.eye(len(cost), dtype=torch.float64).to_sparse()
    x = lpgd.solve_conic(None, q.expand(*batch, len(cost)), A, b, cones, gradient=method).x
    torch.testing.assert_close(x, -b.expand_as(x), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(x.sum(), b)
    torch.testing.assert_close(gradient, torch.full_like(b, -batch[0] if batch else -1), atol=1e-4, rtol=0)


def test_the_least_matrix_above_another_one_is_that() -> None:
    X, C = cp.Variable((2, 2), symmetric=True), cp.Parameter((2, 2), symmetric=True)
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.trace(X)), [X >> C]), [C], [X])
    value = torch.tensor([[1.0, 0.3], [0.3, -0.5]], dtype=torch.float64, requires_grad=True)
    (least,) = layer(value)
    torch.testing.assert_close(least, value, atol=1e-7, rtol=0)
    (gradient,) = torch.autograd.grad((least * torch.tensor([[1.0, 2.0], [2.0, 5.0]])).sum(), value)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 2.0], [2.0, 5.0]]).double(), atol=1e-6, rtol=0)
