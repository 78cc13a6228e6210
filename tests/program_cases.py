"""Quadratic programs that the tests of QPLayer share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lpgd
from tests.layer_cases import normal, weighted

FINE = {"eps": 1e-11}
NAMES = ("P", "q", "A", "b", "G", "h", "lb", "ub")
DIMENSIONS = dict(zip(NAMES, (2, 1, 2, 1, 2, 1, 1, 1), strict=True))
NO_CUDA = "torch.cuda.is_available() is false: this needs a CUDA device"
SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda dense: dense.to_sparse(),
    "csr": lambda dense: dense.to_sparse_csr(),
    "csc": lambda dense: dense.to_sparse_csc(),
}


def program(*batch: int, n: int = 4, m: int = 1, k: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A strictly convex, strictly feasible program with some inequalities and bounds active."""
    root, inside = normal(*batch, n, n, seed=seed), 0.2 * normal(*batch, n, seed=seed + 1)
    A, G = normal(*batch, m, n, seed=seed + 2), normal(*batch, k, n, seed=seed + 3)
    return {
        "P": root @ root.mT + torch.eye(n),
        "q": 3 * normal(*batch, n, seed=seed + 4),
        "A": A,
        "b": (A @ inside[..., None])[..., 0],
        "G": G,
        "h": (G @ inside[..., None])[..., 0] + 0.1,
        "lb": inside - 0.15,
        "ub": inside + 0.1,
    }


def solved(data: dict[str, Any], **options: Any) -> Any:
    return lpgd.solve_qp(**data, solver_args=FINE, **options)


def gradients(outputs: Any, leaves: list[Tensor]) -> list[Tensor]:
    return [part.to_dense() for part in torch.autograd.grad(weighted(outputs), leaves)]
