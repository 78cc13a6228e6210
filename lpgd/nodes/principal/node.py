"""The principal eigenvector of a square matrix as a node.

[PMaF] Xu, Wang, Liu, Gould: PMaF: Deep Declarative Layers for Principal Matrix Features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import flags
from lpgd.nodes.base import BaseNode, NodeAnswer
from lpgd.nodes.eigen import has_ties, square_size, symmetric_part
from lpgd.nodes.principal.derivative import principal_vjp_decomposed, principal_vjp_general, principal_vjp_symmetric
from lpgd.nodes.principal.iterations import WIDTH, lanczos_or_decomposition, power_iteration, simultaneous_iteration
from lpgd.status import Status

__all__ = ["IterationMethod", "PrincipalVector"]

IterationMethod = Literal["lanczos", "simultaneous", "power"]


@dataclass(frozen=True)
class PrincipalVector(BaseNode):
    """The unit eigenvector y (m) of the principal eigenvalue of a square matrix A (m, m).

    symmetric:   minimise ``-½ yᵀAy`` subject to ``½(|y|² - 1) = 0``; the eigenvalue is the largest, the multiplier λ
    general:     minimise ``½|Ay - (yᵀAy) y|²`` subject to the same; the eigenvalue is the one of largest magnitude

    The latter must be real.  Forward ``O(m²)`` for each iteration, backward one factorisation, ``O(m³)``, [PMaF]
    section 2.2, and eq. 40 with the inverse transposed; small symmetric matrices are decomposed.  The eigenvalue of
    a symmetric A is :func:`~lpgd.nodes.eigen.rayleigh_quotients` of A and y.

    Args:
        symmetric: A counts as ``½(A + Aᵀ)``, and the gradient is symmetric.
        method: ``"simultaneous"`` iterates a block of vectors, ``"power"`` one, ``"lanczos"`` (symmetric only) takes a
            Krylov space, a Cholesky factor that proves that no eigenvalue is larger, and inverse iteration; None is
            ``"lanczos"`` for symmetric matrices, else ``"simultaneous"``.
        width: of the block.
        reference: y points to its side, [PMaF] eq. 17: m numbers, or ``"input"``: a second input (m,), one for each
            element, whose gradient is zero.  None is the side of the earlier y under a warm start, eq. 16, so that y
            does not jump along a path of matrices, else that of the vector of ones.
        tolerance: of ``|Ay - λy|`` relative to the eigenvalue (after the shift that makes it the dominant one).
        iterations: products with the matrix at most.

    Of an eigenvalue that is double y is one of its vectors, and a backward pass raises SolverError where it is so to
    rounding.  Elements whose eigenvalue is complex, or so near to others that iterations do not end, are
    ITERATION_LIMIT.
    """

    name = "principal vector"
    domain = "Here the eigenvalue that leads must be apart from all others, and real."

    symmetric: bool = True
    method: IterationMethod | None = None
    width: int = WIDTH
    reference: tuple[float, ...] | Literal["input"] | None = None
    tolerance: float = 1e-13
    iterations: int = 10_000

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in get_args(IterationMethod):
            raise ValueError(f"method is {self.method!r}; it must be one of {', '.join(get_args(IterationMethod))}.")
        if self.method == "lanczos" and not self.symmetric:
            raise ValueError("method is 'lanczos', which is for symmetric matrices: leave it out, or symmetric=True.")
        if self.width < 1 or self.iterations < 1 or not self.tolerance > 0:
            raise ValueError(
                f"width, iterations and tolerance are {self.width}, {self.iterations} and {self.tolerance}; "
                "they must be positive."
            )

        if isinstance(self.reference, str) and self.reference != "input":
            raise ValueError(f"reference is {self.reference!r}; it must be numbers, 'input' or None.")

    @property
    def inputs(self) -> Mapping[str, int]:
        return {"matrix": 2, "reference": 1} if self.reference == "input" else {"matrix": 2}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        size = square_size(shapes[0])
        entries = shapes[1][0] if self.reference == "input" else size if self.reference is None else len(self.reference)
        if entries != size:
            raise ValueError(f"reference has {entries} entries; for this matrix it must have {size}.")
        return (size,)

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        image = linalg.matvec(inputs[0], y)
        along = (y * image).sum(-1)
        return -0.5 * along if self.symmetric else 0.5 * (image - along[:, None] * y).square().sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return 0.5 * (y.square().sum(-1, keepdim=True) - 1.0)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        matrix = inputs[0]
        reference = inputs[1] if self.reference == "input" else None
        if reference is None and self.reference is not None:
            reference = matrix.new_tensor(self.reference)
        aux = None
        options: dict[str, Any] = {"reference": reference, "start": start}
        options |= {"tolerance": self.tolerance, "iterations": self.iterations}
        if self.method == "power":
            answer = power_iteration(matrix, symmetric=self.symmetric, **options)
        elif self.method == "simultaneous" or not self.symmetric:
            answer = simultaneous_iteration(matrix, symmetric=self.symmetric, width=self.width, **options)
        else:
            answer, aux = lanczos_or_decomposition(matrix, **options)
        converged = flags(answer.residual <= self.tolerance)
        statuses = [Status.SOLVED if good else Status.ITERATION_LIMIT for good in converged]
        nu = answer.value if self.symmetric else torch.zeros_like(answer.value)
        return NodeAnswer(answer.vector, statuses, answer.iterations, aux, nu[:, None], nu.new_zeros(len(nu), 0))

    def tied(self, inputs: tuple[Tensor, ...]) -> Tensor | None:
        if not self.symmetric or inputs[0].shape[-1] < 2:
            return None
        values = torch.linalg.eigvalsh(symmetric_part(inputs[0]).double())
        return has_ties(values[:, -2:], values, 10 * values.shape[-1] ** 0.5 * torch.finfo(inputs[0].dtype).eps)

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        matrix = inputs[0]
        constant = (None,) * (len(inputs) - 1)  # the reference
        if aux is not None:
            return (principal_vjp_decomposed(aux[0], aux[1], y, cotangent), *constant)
        value = (y * linalg.matvec(matrix, y)).sum(-1) / y.square().sum(-1)
        rule = principal_vjp_symmetric if self.symmetric else principal_vjp_general
        return (rule(matrix, y, value, cotangent), *constant)
