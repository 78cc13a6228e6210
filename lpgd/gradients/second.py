"""Second derivatives: of the gradient of a method that can be differentiated, whichever it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lpgd.gradients.base import GradientMethod
from lpgd.problems.solution import AnyProblem, AnySolution

__all__ = ["check_twice", "second_derivative"]


def check_twice(method: GradientMethod, problem: AnyProblem, reverse: bool) -> None:
    """Refuse the derivative of a derivative where none exists.

    Raises:
        RuntimeError: by this method, or in forward mode.
    """
    if not (reverse and method.is_differentiable(problem)):
        what = str(method) if reverse else "forward mode"
        raise RuntimeError(
            f"the gradient of this optimization layer, by {what}, cannot be differentiated again: detach it, or take "
            "finite differences of it (second derivatives are there for declarative nodes, by their closed forms and "
            "by ImplicitKKT, of gradients in reverse mode)."
        )


def second_derivative(
    method: GradientMethod, solution: AnySolution, reverse: bool, direction: Sequence[Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative, along or against ``direction``, of the gradient as a function of cotangents, data and outputs."""
    outputs, usable, fields = solution.outputs, solution.usable[:, None], len(solution.problem.data)
    count = len(solution.outputs)

    def gradient(*parts: Tensor) -> tuple[Tensor, ...]:
        cotangents, data, points = parts[:count], parts[count : count + fields], parts[count + fields :]
        known, cotangent = ([torch.where(usable, part, 0.0) for part in own] for own in (points, cotangents))
        own = solution.problem.data._make(data), outputs._make(known), solution.cotangent(cotangent)
        return tuple(method.differentiable_vjp(solution, *own))

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    parts = gradient(*leaves)
    moving = [place for place, part in enumerate(parts) if part.requires_grad]
    known = [parts[place] for place in moving]
    if reverse:
        if not moving:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        return torch.autograd.grad(known, leaves, [direction[place] for place in moving], materialize_grads=True)
    # The product with the derivative, by differentiating the one with its transpose, which is linear in its argument.
    answer = [torch.zeros_like(part) for part in parts]
    if moving:
        weights = [torch.zeros_like(part, requires_grad=True) for part in known]
        rows = torch.autograd.grad(known, leaves, weights, create_graph=True, materialize_grads=True)
        rows, along = zip(*(pair for pair in zip(rows, direction, strict=True) if pair[0].requires_grad), strict=True)
        found = torch.autograd.grad(rows, weights, along, materialize_grads=True)
        for place, own in zip(moving, found, strict=True):
            answer[place] = own
    return tuple(answer)
