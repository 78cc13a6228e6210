"""The derivative of the principal eigenvector, from that vector alone or from a decomposition.

[PMaF] Xu, Wang, Liu, Gould: PMaF: Deep Declarative Layers for Principal Matrix Features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import flags
from lpgd.execution.threads import torch_threads
from lpgd.nodes.principal.iterations import generic_matrix
from lpgd.status import refuse_elements

__all__ = ["principal_vjp_decomposed", "principal_vjp_general", "principal_vjp_symmetric"]


def principal_vjp_symmetric(matrix: Tensor, vector: Tensor, value: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of ``<v, y>`` for a symmetric matrix: ``½((λI - A)† v yᵀ + y vᵀ (λI - A)†)``.

    ``(λI - A)† v`` is the solution of ``(λI - A + κ y yᵀ) s = (I - y yᵀ) v``, κ > 0 the mean gap to the other
    eigenvalues: one Cholesky factor, no tensor with m³ entries.  [PMaF] section 2.2.

    Raises:
        SolverError: the two largest eigenvalues of some elements are equal to rounding: there is no derivative.
    """
    size = matrix.shape[-1]
    symmetric = 0.5 * (matrix + matrix.mT)
    trace = symmetric.diagonal(dim1=-2, dim2=-1).sum(-1)
    gap = (size * value - trace) / max(size - 1, 1)
    gap = torch.where(gap > 0, gap, 1.0).to(matrix.dtype)
    outer = vector[:, :, None] * vector[:, None, :]
    system = torch.diag_embed(value[:, None].expand_as(vector)) - symmetric + gap[:, None, None] * outer
    factor, info = linalg.cholesky_ex(system)
    tangent, probe = _tangent(vector, cotangent), _probe(vector)
    both = torch.cholesky_solve(torch.stack([tangent, probe], -1), factor)
    answer = _tangent(vector, both[:, :, 0])
    _check(matrix, value, probe, _tangent(vector, both[:, :, 1]), info == 0)
    product = answer[:, :, None] * vector[:, None, :]
    return 0.5 * (product + product.mT)


def principal_vjp_decomposed(values: Tensor, vectors: Tensor, vector: Tensor, cotangent: Tensor) -> Tensor:
    """:func:`principal_vjp_symmetric` from the whole decomposition, in ascending order: two products with vectors."""
    tangent = (cotangent.to(vectors.dtype)[:, None] @ vectors)[:, 0]
    gap = values[:, -1:] - values
    tangent[:, -1], gap[:, -1] = 0.0, torch.inf
    answer = tangent / gap
    # The rounding errors that count are those of the data's dtype.
    near = 10 * values.shape[-1] ** 0.5 * torch.finfo(vector.dtype).eps * values.abs().amax(-1)
    _refuse(gap.amin(-1) > near if values.shape[-1] > 1 else torch.ones_like(near, dtype=torch.bool))
    product = (vectors @ answer[:, :, None]).to(vector.dtype) * vector[:, None, :]
    return (product + product.mT).mul_(0.5)


def principal_vjp_general(matrix: Tensor, vector: Tensor, value: Tensor, cotangent: Tensor) -> Tensor:
    """The gradient of ``<v, y>`` for a general matrix, by the implicit function theorem at ``y = A y / |A y|``.

    ``(1/λ)(I - y yᵀ) H⁻ᵀ v yᵀ`` with ``H = I - (I - y yᵀ) A / λ``.  [PMaF] eq. 40, with the
    inverse transposed.

    Raises:
        SolverError: two eigenvalues of largest magnitude of some elements are equal to rounding: there is no
            derivative.
    """
    tangent = _tangent(vector, cotangent)
    # Hᵀ = I - Aᵀ(I - y yᵀ)/λ, times λ; on tangents the factor I - y yᵀ in front of v changes nothing in the answer.
    transposed = matrix.mT
    along = transposed @ vector[:, :, None]
    system = torch.diag_embed(value[:, None].expand_as(vector)) - transposed + along * vector[:, None, :]
    with torch_threads(1):  # see there what LU needs
        probe = _probe(vector)
        both, info = linalg.solve_ex(system, torch.stack([tangent, probe], -1))
    answer = _tangent(vector, both[:, :, 0])
    _check(matrix, value, probe, _tangent(vector, both[:, :, 1]), info == 0)
    return answer[:, :, None] * vector[:, None, :]


def _tangent(vector: Tensor, value: Tensor) -> Tensor:
    return value - (vector * value).sum(-1, keepdim=True) * vector


def _probe(vector: Tensor) -> Tensor:
    """A fixed direction with a part along every other eigenvector, (B, m).

    It is none that iterations start from: of equal eigenvalues' vectors they find the part of their start, to which
    the others are orthogonal.
    """
    return _tangent(vector, generic_matrix(vector.shape[-1], 16, vector)[:, 15].to(vector.dtype).expand_as(vector))


def _check(matrix: Tensor, value: Tensor, probe: Tensor, answer: Tensor, factored: Tensor) -> None:
    """Refuse systems whose answer to the probe is that of a gap of rounding errors: then any cotangent's is one."""
    m = matrix.shape[-1]
    norm = torch.maximum(value.abs(), linalg.matrix_norm(matrix) / m**0.5)
    # A gap of 100 √m rounding errors, more than an iteration's tolerance leaves; of m directions the probe has about
    # 1/√m along the one that matters.
    smallest = 100 * m * torch.finfo(matrix.dtype).eps * norm
    small = linalg.vector_norm(answer, dim=-1) * smallest <= linalg.vector_norm(probe, dim=-1)
    _refuse(factored & (small | (probe == 0).all(-1)))


def _refuse(good: Tensor) -> None:
    refuse_elements(
        flags(good),
        "The principal vector has no derivative where its eigenvalue is double to rounding (or, of a symmetric matrix, "
        "not the largest).",
    )
