"""The derivative of a declarative node's solution by its dense bordered system, one element at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian


def bordered_gradient(node: Any, inputs: Sequence[Tensor], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    """The gradients of ``<cotangent, y>``, from functions of the node and torch's Jacobians alone.

    With multipliers from least squares, ``[[H, Jᵀ], [J, 0]] (s, t) = (v, 0)`` gives ``-∇_w <∇_(y, ν) L, (s, t)>``.
    """
    rows = [
        _one(node, [part[index : index + 1] for part in inputs], y[index], cotangent[index]) for index in range(len(y))
    ]
    return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def stationarity(node: Any, inputs: Sequence[Tensor], y: Tensor, nu: Tensor) -> float:
    """The largest entry of ``∇_y L`` and of h, for the multipliers (B, p) that a solver answered."""
    point = y.detach().clone().requires_grad_()
    h = node.equality(point, *inputs)
    (slope,) = torch.autograd.grad((node.objective(point, *inputs) + (nu * h).sum(-1)).sum(), point)
    return max(float(slope.abs().max()), float(h.detach().abs().max()))


def _one(node: Any, inputs: list[Tensor], y: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
    point, size = y.detach().reshape(-1), y.numel()
    data = tuple(part.detach().clone().requires_grad_() for part in inputs)

    def objective(x: Tensor) -> Tensor:
        return node.objective(x.reshape(1, *y.shape), *data)[0]

    def equality(x: Tensor) -> Tensor:
        return node.equality(x.reshape(1, *y.shape), *data)[0]

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(objective(x), x, create_graph=True)[0]

    J: Any = jacobian(equality, point)
    nu = torch.linalg.lstsq(J.mT, -gradient(point.clone().requires_grad_()).detach()[:, None]).solution[:, 0]
    H: Any = hessian(lambda x: objective(x) + nu @ equality(x), point)
    border = torch.zeros(len(nu), len(nu), dtype=H.dtype)
    system = torch.cat([torch.cat([H, J.mT], 1), torch.cat([J, border], 1)])
    answer = torch.linalg.solve(system, torch.cat([cotangent.reshape(-1), border[0]])[:, None])[:, 0]
    s, t = answer[:size], answer[size:]
    free = point.clone().requires_grad_()
    lagrangian = objective(free) + nu @ equality(free)
    slope = torch.autograd.grad(lagrangian, free, create_graph=True)[0]
    along = slope @ s + equality(free) @ t
    found = torch.autograd.grad(along, data, allow_unused=True)
    return tuple(torch.zeros_like(part) if grad is None else -grad for part, grad in zip(data, found, strict=True))


ROUNDING = 1e-12
"""Two solves of the same problem: sums of MKL depend on how memory is aligned, so that bits can differ."""
