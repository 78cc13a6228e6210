"""Divided differences of scalar functions, of first and second order, as accurate at equal points as elsewhere.

    f[a, b] = (f(a) - f(b)) / (a - b) = ∫₀¹ f'(a + t (b - a)) dt
    f[a, b, c] = (f[a, b] - f[b, c]) / (a - c) = ∫₀¹ ∫₀¹ t f''(b + t (a + s (c - a) - b)) ds dt

The quotients lose the digits that f(a) and f(b) have in common; the integrals (Hermite and Genocchi) lose none and,
where the points are near to each other, Gauss' rule has them to rounding.  Both come with an estimate of their error,
and each pair takes the better one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

__all__ = ["ScalarFunction", "derivative", "first_differences", "second_differences"]

ScalarFunction = Callable[[Tensor], Tensor]

COARSE, FINE = 4, 8
"""Points of Gauss' rules; the difference between both is the estimate of the error."""
NEAR = 0.05
"""Three points further apart than this share of the spectrum's size take the quotient, whose rounding is harmless."""
EXPLAINED = 1e3
"""By how many times its estimated error the quotient may be off: f itself, and differences of it, are rounded too."""
ENTRIES = 2**22
"""So many entries of f[a, b, c] are worked on at once."""


def derivative(function: ScalarFunction) -> ScalarFunction:
    """The derivative of an f that works on each entry of a tensor."""
    return torch.func.grad(lambda points: function(points).sum())


def _gauss(count: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return like.new_tensor(0.5 + 0.5 * points), like.new_tensor(0.5 * weights)


def _better(quotient: Tensor, doubt: Tensor, coarse: Tensor, fine: Tensor) -> Tensor:
    """The integral where its estimated error is the smaller one (NaN never is), else the quotient.

    Two rules agree, and are wrong, where f' is a peak between their points: then they are further from the quotient
    than its rounding explains.
    """
    return torch.where(
        ((fine - coarse).abs() <= doubt) & ((fine - quotient).abs() <= EXPLAINED * doubt), fine, quotient
    )


def first_differences(function: ScalarFunction, values: Tensor) -> Tensor:
    """``f[λ_i, λ_j]`` for values (B, m) in float64: (B, m, m), symmetric, f' on the diagonal.

    Entries are infinite or NaN where f has no finite value, or no finite slope, at the points.
    """
    result = function(values)
    first, second = torch.triu_indices(*[values.shape[-1]] * 2, device=values.device)
    a, b = values[:, first], values[:, second]
    gap, size = a - b, torch.maximum(result[:, first].abs(), result[:, second].abs())
    quotient = (result[:, first] - result[:, second]) / gap
    doubt = 2 * torch.finfo(values.dtype).eps * size / gap.abs()
    slope = derivative(function)

    def integral(count: int) -> Tensor:
        points, weights = _gauss(count, values)
        return slope(a[..., None] - gap[..., None] * points) @ weights

    exact = slope(a)
    found = torch.where(gap == 0, exact, _better(quotient, doubt, integral(COARSE), integral(FINE)))
    answer = torch.empty(*values.shape, values.shape[-1], dtype=values.dtype, device=values.device)
    answer[:, first, second] = found
    answer[:, second, first] = found
    return answer


def second_differences(function: ScalarFunction, values: Tensor, differences: Tensor, last: Tensor) -> Tensor:
    """``f[λ_i, λ_j, λ_k]`` for k in ``last`` (K,): (B, m, m, K).

    Args:
        function: f.
        values: λ, (B, m), float64.
        differences: ``f[λ_i, λ_j]`` of :func:`first_differences`.
        last: indices.
    """
    batch, size = values.shape
    shape = (batch, size, size, len(last))
    a, b, c = values[:, :, None, None], values[:, None, :, None], values[:, None, None, last]
    ab, bc, ac = differences[..., None], differences[:, None, :, last], differences[:, :, None, last]
    # The two of the three points that are furthest apart divide.
    gaps = torch.stack([terms.expand(shape) for terms in (a - c, a - b, b - c)])
    widest = gaps.abs().argmax(0, keepdim=True)
    gap = gaps.gather(0, widest)[0]
    changes = torch.stack([terms.expand(shape) for terms in (ab - bc, ac - bc, ab - ac)])
    quotient = changes.gather(0, widest)[0] / gap
    near = gap.abs() <= NEAR * values.abs().amax(-1)[:, None, None, None]
    places = near.nonzero(as_tuple=True)
    if not len(places[0]):
        return quotient
    x, y, z = (terms.expand(shape)[places] for terms in (a, b, c))
    largest = torch.stack([terms.expand(shape)[places].abs() for terms in (ab, bc, ac)]).amax(0)
    doubt = 4 * torch.finfo(values.dtype).eps * largest / gap[places].abs()
    curvature = derivative(derivative(function))

    def integral(count: int) -> Tensor:
        points, weights = _gauss(count, values)
        t, s = points[:, None], points[None, :]
        between = (x - y)[:, None, None] + s * (z - x)[:, None, None]
        return (curvature(y[:, None, None] + t * between) * t @ weights) @ weights

    quotient[places] = torch.where(
        gap[places] == 0, 0.5 * curvature(x), _better(quotient[places], doubt, integral(COARSE), integral(FINE))
    )
    return quotient
