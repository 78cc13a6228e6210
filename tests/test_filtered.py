"""Large singular sparse systems, against dense linear algebra, without all of their eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from lpgd.arrays import BoolArray, FloatArray
from lpgd.solvers.kkt import factor
from lpgd.solvers.kkt.filtered import by_filter
from lpgd.solvers.kkt.rank import Known

ROWS, COPIES = 150, 3


def planted(variables: int, dependent: int) -> tuple[Any, FloatArray, BoolArray]:
    """``[P Aᵀ; A 0]`` with a chain's P, sparse rows of which the last are sums of others, and a right-hand side."""
    rng = np.random.default_rng(dependent)
    off = np.full(variables - 1, -1.0)
    chain = sp.diags_array(np.full(variables, 2.5)) + sp.diags_array(off, offsets=1) + sp.diags_array(off, offsets=-1)
    blocks = np.arange(variables) * ROWS // variables
    A = sp.csr_array((rng.uniform(0.5, 2.0, variables), (blocks, np.arange(variables))), shape=(ROWS, variables))
    sums = [A[[3 * copy]] - 2.0 * A[[3 * copy + 1]] for copy in range(dependent)]
    A = sp.vstack([A, *sums])
    K: Any = sp.csc_array(sp.block_array([[chain, A.T], [A, None]]))
    return K, K @ rng.standard_normal(K.shape[0]), np.arange(K.shape[0]) < variables


def test_many_null_vectors_are_counted_before_any_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    K, right, primal = planted(900, 0)
    repeated = sp.csc_array(sp.block_diag([K, sp.csc_array((300, 300))]))
    monkeypatch.setattr(np.linalg, "qr", lambda *_: pytest.fail("null vectors were looked for"))
    zeros = np.zeros(300)
    known = Known(np.float64(1e-13), np.float64(0.0))
    both = np.concatenate([right, zeros]), np.concatenate([primal, zeros > 0])
    assert by_filter(repeated, np.ones(repeated.shape[0]), *both, known, np.zeros((0, 1350))) is None


def no_eigenvalues(*_: Any) -> Any:
    pytest.fail("all eigenvalues were asked for")


@pytest.mark.parametrize("limit", [0, 1500])
@pytest.mark.parametrize("dependent", [COPIES, 40])
def test_the_answer_of_a_singular_system_is_the_shortest(
    limit: int, dependent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = 300
    K, right, primal = planted(variables, dependent)
    monkeypatch.setattr(factor, "EIGEN_LIMIT", limit)
    monkeypatch.setattr(factor, "by_eigenvalues", no_eigenvalues)
    monkeypatch.setattr(factor, "_by_proximal_steps", no_eigenvalues)
    entries = K.tocoo()
    known = Known(np.full(1, 1e-13), np.zeros(1))
    owner = np.zeros(right.size, dtype=np.int64)
    unsolvable = right.copy()
    unsolvable[-1] += 1.0
    both = np.stack([2.0 * right, unsolvable])
    system = factor.System(entries.row, entries.col, entries.data, right, owner, primal, 1, known, both)
    found = factor.solve_sparse(system)
    assert found.follows.tolist() == [[True, False]]
    expected, *_ = np.linalg.lstsq(K.toarray(), right, rcond=1e-11)
    np.testing.assert_allclose(found.answer, expected, atol=1e-9 * np.abs(expected).max())
    assert not found.exact[0]
    assert found.unique[0]
    assert found.consistent[0]
    # Every copy and what it repeats, and no other row.
    involved = np.zeros(right.size, dtype=bool)
    involved[variables + ROWS :] = True
    for copy in range(dependent):
        involved[variables + 3 * copy : variables + 3 * copy + 2] = True
    assert ((found.null > 1e-6) == involved).all()
    system = factor.System(entries.row, entries.col, entries.data, unsolvable, owner, primal, 1, known, both)
    assert not factor.solve_sparse(system).consistent[0]


def test_damped_steps_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    K, right, primal = planted(450, COPIES)
    monkeypatch.setattr(factor, "by_eigenvalues", no_eigenvalues)
    entries, error = K.tocoo(), 1e-3
    owner, known = np.zeros(right.size, dtype=np.int64), Known(np.full(1, error), np.zeros(1), damped=True)
    nothing = np.zeros((0, right.size))
    system = factor.System(entries.row, entries.col, entries.data, right, owner, primal, 1, known, nothing)
    found = factor.solve_sparse(system)
    scale = 1.0 / np.sqrt(abs(K).max(axis=1).toarray().ravel())
    scaled = scale[:, None] * K.toarray() * scale
    step = np.linalg.solve(scaled @ scaled + error**2 * np.eye(right.size), scaled @ (scale * right))
    np.testing.assert_allclose(found.answer, scale * step, atol=1e-9 * np.abs(step).max())


def test_many_dependent_rows_need_no_eigenvalues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more rows depend on others than are looked for one by one, as in flat parts of images."""
    variables, dependent = 300, ROWS // 3
    K, right, primal = planted(variables, dependent)
    again = np.arange(variables + ROWS, K.shape[0])
    order = np.concatenate([np.arange(K.shape[0]), again])  # all of these rows once more: 100 null vectors
    K, right, primal = sp.csc_array(K[order][:, order]), right[order], primal[order]
    monkeypatch.setattr(factor, "by_eigenvalues", no_eigenvalues)
    entries = K.tocoo()
    unsolvable = right.copy()
    unsolvable[-1] += 1.0
    others, known = np.stack([-right, unsolvable]), Known(np.full(1, 1e-13), np.zeros(1))
    owner = np.zeros(right.size, dtype=np.int64)
    system = factor.System(entries.row, entries.col, entries.data, right, owner, primal, 1, known, others)
    found = factor.solve_sparse(system)
    expected, *_ = np.linalg.lstsq(K.toarray(), right, rcond=1e-11)
    size = np.abs(expected).max()
    np.testing.assert_allclose(found.answer[:variables], expected[:variables], rtol=0, atol=1e-9 * size)
    np.testing.assert_allclose(found.answer, expected, rtol=0, atol=1e-6 * size)
    assert (found.exact[0], found.unique[0], found.consistent[0]) == (False, True, True)
    assert found.follows.tolist() == [[True, False]]
