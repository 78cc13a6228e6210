"""What used to be nonsense without a warning, or noise: tied eigenvectors, singular sparse systems, absolute gaps."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import scipy.optimize
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import structural_rank

import lpgd
from lpgd import LPGD, Clarabel, HiGHS, NodeLayer, QPLayer
from lpgd.solvers.kkt.superlu import has_transversal, superlu


def matrices() -> torch.Tensor:
    return torch.stack([torch.diag(torch.tensor(own)) for own in ([4.0, 2, 1], [3.0, 3, 1], [5.0, 1, 1])]).double()


def test_ties_are_seen_where_they_matter() -> None:
    X = (matrices(),)
    assert lpgd.nodes.EigenDecomposition().tied(X).tolist() == [False, True, True]
    assert lpgd.nodes.EigenDecomposition(1).tied(X).tolist() == [False, True, False]
    assert lpgd.nodes.EigenDecomposition(1, largest=False).tied(X).tolist() == [False, False, True]
    assert lpgd.nodes.PrincipalVector().tied(X).tolist() == [False, True, False]


@pytest.mark.filterwarnings("ignore:.*jumped:lpgd.LpgdWarning", "ignore:.*on a side:lpgd.LpgdWarning")
def test_a_finite_step_names_tied_eigenvectors() -> None:
    X = matrices()[1:2].requires_grad_()
    y = NodeLayer(lpgd.nodes.PrincipalVector(), LPGD(tau=1.0), on_error="nan")(X)
    with pytest.warns(lpgd.LpgdWarning, match=r"solutions of elements \[0\] are not unique: eigenvalues are equal"):
        (y * torch.tensor([1.0, -2.0, 0.5])).nansum().backward()


def singular_systems() -> list[sp.csc_array]:
    """Symmetric systems of constraints that are stated twice, of which some have no transversal."""
    found = []
    for seed in range(0, 240, 3):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(5, 60))
        A = sp.random(int(rng.integers(1, n)), n, 0.2, random_state=seed).tocsr()
        A = sp.vstack([A, A[: max(1, A.shape[0] // 2)]])
        H = sp.diags(rng.random(n) * (rng.random(n) > 0.5))
        found.append(sp.csc_array(sp.bmat([[H, A.T], [A, None]])))
    return found


def test_singular_sparse_systems_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    refused = 0
    options = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.01, "options": {"SymmetricMode": True}}
    for matrix in singular_systems():
        try:
            superlu(matrix, **options)
        except RuntimeError:
            refused += structural_rank(matrix) < matrix.shape[0]
    assert refused == 62
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


def test_a_transversal_is_found_where_there_is_one() -> None:
    rng, counts = np.random.default_rng(0), [0, 0]
    for _ in range(500):
        size = int(rng.integers(1, 9))
        matrix = sp.csc_matrix((rng.random((size, size)) < rng.uniform(0.05, 0.6)).astype(float))
        found = has_transversal(matrix)
        assert found == (structural_rank(matrix) == size)
        counts[found] += 1
    assert min(counts) > 100


def test_the_system_of_a_long_horizon_is_factorised_at_once() -> None:
    """SciPy's matchings do not end on this one."""
    stages, states, controls, bound = 60, 6, 3, 0.5
    rng = np.random.default_rng(0)
    A, B = np.eye(states) + 0.1 * rng.standard_normal((states, states)), 0.3 * rng.standard_normal((states, controls))
    X, U, start = cp.Variable((states, stages + 1)), cp.Variable((controls, stages)), cp.Parameter(states)
    cost = cp.Minimize(cp.sum_squares(X) + 0.1 * cp.sum_squares(U))
    steps = [X[:, 0] == start, X[:, 1:] == A @ X[:, :-1] + B @ U, cp.abs(U) <= bound]
    layer = lpgd.CvxpyLayer(cp.Problem(cost, steps), [start], [U])
    begun = np.random.default_rng(1).standard_normal((4, states))
    (found,) = layer(torch.from_numpy(begun))
    # The states as functions of the controls: least squares with bounds.
    of_start, of_controls = np.eye(states), np.zeros((states, controls * stages))
    rows, ends = [], []
    for stage in range(stages):
        of_controls = A @ of_controls
        of_controls[:, stage * controls : (stage + 1) * controls] += B
        of_start = A @ of_start
        rows.append(of_controls)
        ends.append(of_start)
    F = np.concatenate([*rows, 0.1**0.5 * np.eye(controls * stages)])
    for element, x in enumerate(begun):
        g = np.concatenate([-np.concatenate(ends) @ x, np.zeros(controls * stages)])
        expected = scipy.optimize.lsq_linear(F, g, (-bound, bound), method="bvls", tol=1e-14, max_iter=5000).x
        np.testing.assert_allclose(found[element].numpy(), expected.reshape(stages, controls).T, atol=1e-9)


def test_a_regular_system_is_factorised_as_ever() -> None:
    matrix = sp.csc_array(sp.random(30, 30, 0.2, random_state=0) + 3 * sp.eye_array(30))
    right = np.arange(30.0)
    np.testing.assert_allclose(matrix @ superlu(matrix).solve(right), right, atol=1e-10)


@pytest.mark.parametrize("seed", [10, 12, 19, 25, 32, 35])
def test_an_absolute_gap_is_no_solution_of_a_small_objective(seed: int) -> None:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(5, 5))
    P, q = torch.tensor(factor @ factor.T + 0.1 * np.eye(5)), 1e-6 * torch.tensor(rng.normal(size=5))
    G, h = torch.tensor(rng.normal(size=(3, 5))), torch.ones(3).double()
    exact = -torch.linalg.solve(P, q)
    for refine in (True, False):
        found = QPLayer(HiGHS(rescue=False, refine=refine)).solve(P, q, G=G, h=h)
        reference = QPLayer(Clarabel()).solve(P, q, G=G, h=h)
        torch.testing.assert_close(reference.x[0], exact, rtol=1e-8, atol=0)
        assert found.statuses == (lpgd.Status.SOLVED,)
        torch.testing.assert_close(found.x[0], exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))
