"""Layers that the tests of CvxpyLayer share, and how they compare tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cvxpy as cp
import torch
from torch import Tensor

import lpgd

TIGHT = {"eps": 1e-10}
METHODS = [lpgd.ImplicitKKT(), lpgd.LPGD(tau=1e-3), lpgd.LPGD(tau=0.1, rho=0.1, envelope="lower")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A linear loss of all outputs, with a fixed random weight for each entry."""
    return sum(((normal(*out.shape, seed=k) * out).sum() for k, out in enumerate(outputs)), torch.zeros(()))


def close(own: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    for one, other in zip(own, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def at_once(work: Callable[[int], Any], count: int) -> list[Any]:
    """What ``work(0)``, …, ``work(count - 1)`` return in threads of their own, which begin together."""
    barrier = threading.Barrier(count)

    def begun(k: int) -> Any:
        barrier.wait()
        return work(k)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(begun, range(count)))


def program(n: int = 4, m: int = 1, **options: Any) -> lpgd.CvxpyLayer:
    """minimise ½ xᵀP x + qᵀx subject to A x = b and bounds that one vector scales; P, q, A, b, u to x and duals."""
    x, P, q = cp.Variable(n), cp.Parameter((n, n), PSD=True), cp.Parameter(n)
    A, b, u = cp.Parameter((m, n)), cp.Parameter(m), cp.Parameter(n)
    constraints = [A @ x == b, x <= u, x >= -2]
    problem = cp.Problem(cp.Minimize(0.5 * cp.quad_form(x, P) + q @ x), constraints)
    duals = [constraint.dual_variables[0] for constraint in constraints[:2]]
    return lpgd.CvxpyLayer(problem, [P, q, A, b, u], [x, *duals], solver_args={"eps": 1e-9}, **options)


def data(*batch: int, n: int = 4, m: int = 1, seed: int = 0) -> list[Tensor]:
    root = normal(*batch, n, n, seed=seed)
    P = root @ root.mT + torch.eye(n)
    return [
        P,
        normal(*batch, n, seed=seed + 1),
        normal(*batch, m, n, seed=seed + 2),
        0.3 * normal(*batch, m),
        P[..., 0].abs(),
    ]
