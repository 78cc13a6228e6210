"""The largest eigenvalue by Lanczos' method and inverse iteration, beside NumPy's decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.nodes.principal.lanczos import SMALL, leading_eigenvector

ORDER = 130
assert ORDER > SMALL  # smaller matrices are decomposed


def basis(order: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((order, order)))[0]


def spectrum(values: np.ndarray, seed: int = 0) -> Tensor:
    vectors = basis(len(values), seed)
    matrix = vectors @ np.diag(values) @ vectors.T
    return torch.from_numpy(0.5 * (matrix + matrix.T))


def covariance(order: int) -> Tensor:
    root = np.random.default_rng(1).standard_normal((order, 2 * order))
    return torch.from_numpy(root @ root.T / (2 * order))


LINE = np.linspace(-1.0, 1.0, ORDER)
MATRICES = {
    "covariance": covariance(ORDER),
    "a large one": covariance(300),
    "negative definite": spectrum(LINE - 2.0),
    "the smallest is larger in magnitude": spectrum(LINE - 0.9),
    "outlier": spectrum(np.append(LINE[:-1], 50.0)),
    "gap of 1e-6": spectrum(np.append(LINE[:-1], LINE[-2] + 1e-6)),
    "gap of 1e-9": spectrum(np.append(LINE[:-1], LINE[-2] + 1e-9)),
    "rank one": spectrum(np.append(np.zeros(ORDER - 1), 1.0)),
    "tiny": 1e-150 * covariance(ORDER),
    "huge": 1e150 * covariance(ORDER),
    "diagonal": torch.diag(torch.from_numpy(LINE)),
    "of 2 values": spectrum(np.append(np.full(ORDER - 1, -1.0), 3.0)),
}


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
def test_the_vector_is_that_of_the_largest_eigenvalue(matrix: Tensor) -> None:
    values, vectors = np.linalg.eigh(matrix.numpy())
    norm, gap = np.abs(values).max(), values[-1] - values[-2]
    y = lpgd.NodeLayer(lpgd.nodes.PrincipalVector())(matrix)
    assert y.info.statuses == (lpgd.Status.SOLVED,)
    image = matrix @ y
    assert abs(float(y @ image) - values[-1]) <= 1e-13 * norm
    assert float((image - (y @ image) * y).norm()) <= 1e-13 * norm
    sine = float((y - (y @ torch.from_numpy(vectors[:, -1])) * torch.from_numpy(vectors[:, -1])).norm())
    assert sine <= 1e-13 * norm / gap
    assert float(y.sum()) > 0


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES.keys())
@pytest.mark.parametrize("start", ["ones", "unit", "another eigenvector"])
def test_what_is_proven_is_the_largest(matrix: Tensor, start: str) -> None:
    values, vectors = np.linalg.eigh(matrix.numpy())
    begin = torch.zeros(matrix.shape[-1], dtype=torch.float64)
    if start == "unit":
        begin[0] = 1.0
    else:
        begin = torch.ones_like(begin) if start == "ones" else torch.from_numpy(vectors[:, 3].copy())
    found = leading_eigenvector(matrix[None], begin[None], 1e-13)
    if found.proven.item() and found.residual.item() <= 1e-13:
        assert abs(found.value.item() - values[-1]) <= 1e-12 * np.abs(values).max()


@pytest.mark.parametrize("matrix", [torch.zeros(ORDER, ORDER), -3.0 * torch.eye(ORDER)], ids=["zero", "multiple of I"])
def test_every_vector_of_a_multiple_of_the_identity_will_do(matrix: Tensor) -> None:
    y = lpgd.NodeLayer(lpgd.nodes.PrincipalVector())(matrix.double())
    torch.testing.assert_close(y.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_elements_of_a_batch_are_solved_each_for_itself() -> None:
    batch = torch.stack([MATRICES["covariance"], MATRICES["negative definite"], MATRICES["gap of 1e-9"]])
    layer = lpgd.NodeLayer(lpgd.nodes.PrincipalVector())
    alone = torch.stack([layer(matrix) for matrix in batch[:2]])
    torch.testing.assert_close(layer(batch)[:2], alone, atol=1e-12, rtol=0)


def test_lanczos_is_for_symmetric_matrices() -> None:
    with pytest.raises(ValueError, match=r"'lanczos'.*symmetric"):
        lpgd.nodes.PrincipalVector(symmetric=False, method="lanczos")
