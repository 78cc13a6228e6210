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
        way = str(method) if reverse else "forward mode"
        raise RuntimeError(
            f"the gradient of this optimization layer, by {way}, cannot be differentiated again: detach it, or take "
            "finite differences of it (second derivatives are there for declarative nodes, by their closed forms and "
            "by ImplicitKKT, of gradients in reverse mode)."
        )


def second_derivative(
    method: GradientMethod, solution: AnySolution, reverse: bool, direction: Sequence[Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The derivative, along or against ``direction``, of the gradient as a function of cotangents, data and outputs."""
    outputs, usable, fields = solution.outputs, solution.usable[:, None], len(solution.problem.data)
    count = len(solution.outputs)

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        cotangents, data, points = inputs[:count], inputs[count : count + fields], inputs[count + fields :]
        known, cotangent = ([torch.where(usable, values, 0.0) for values in group] for group in (points, cotangents))
        arguments = solution.problem.data._make(data), outputs._make(known), solution.cotangent(cotangent)
        return tuple(method.differentiable_vjp(solution, *arguments))

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    gradients = gradient(*leaves)
    moving = [place for place, tensor in enumerate(gradients) if tensor.requires_grad]
    known = [gradients[place] for place in moving]
    if reverse:
        if not moving:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        return torch.autograd.grad(known, leaves, [direction[place] for place in moving], materialize_grads=True)
    # The product with the derivative, by differentiating the one with its transpose, which is linear in its argument.
    answer = [torch.zeros_like(tensor) for tensor in gradients]
    if moving:
        weights = [torch.zeros_like(tensor, requires_grad=True) for tensor in known]
        products = torch.autograd.grad(known, leaves, weights, create_graph=True, materialize_grads=True)
        products, along = zip(
            *(pair for pair in zip(products, direction, strict=True) if pair[0].requires_grad), strict=True
        )
        found = torch.autograd.grad(products, weights, along, materialize_grads=True)
        for place, values in zip(moving, found, strict=True):
            answer[place] = values
    return tuple(answer)
