"""The principal eigenvector by power or simultaneous iteration, and its derivative from that vector alone.

[PMaF] Xu, Wang, Liu, Gould: PMaF: Deep Declarative Layers for Principal Matrix Features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lpgd.problems.node import BaseNode, NodeAnswer
from lpgd.solvers.nodes.eigen import square_size
from lpgd.solvers.nodes.lanczos import SMALL, decomposed, leading_eigenvector
from lpgd.status import SolverError, Status, describe_failures
from lpgd.torch_threads import torch_threads

__all__ = [
    "IterationMethod",
    "Principal",
    "PrincipalVector",
    "lanczos",
    "power_iteration",
    "principal_vjp_general",
    "principal_vjp_symmetric",
    "simultaneous_iteration",
]

IterationMethod = Literal["lanczos", "simultaneous", "power"]

WIDTH = 8
"""Vectors of a block."""
STEPS = 8
"""Products with the matrix between two looks at the residual."""


class Principal(NamedTuple):
    """An eigenvector and its eigenvalue.

    Attributes:
        vector: (B, m) y, of length one.
        value: (B,) λ.
        residual: (B,) ``|A y - λ y| / (|λ| + |σ|)``, σ the shift (absolute where both are zero).
        iterations: (B,) products of the matrix with y, or with the block.
    """

    vector: Tensor
    value: Tensor
    residual: Tensor
    iterations: Tensor


def power_iteration(
    matrix: Tensor,  # (B, m, m)
    *,
    symmetric: bool,
    reference: Tensor | None = None,  # (m,) or (B, m)
    start: Tensor | None = None,  # (B, m)
    tolerance: float,
    iterations: int,
) -> Principal:
    """The principal eigenvector by ``y ← A y / |A y|``, each element until its own convergence.

    Of a symmetric matrix it is the one of the largest eigenvalue: the iteration is with ``A + σI``, where σ from
    estimates of both ends of the spectrum makes that eigenvalue the dominant one.  Of a general matrix it is the
    one of the eigenvalue of largest magnitude, which must be real.

    It works in float64.  y points to the side of ``reference`` (of the vector of ones where that is None; the largest
    entry is positive where y is orthogonal to it).  [PMaF] eqs. 16, 17.

    Args:
        matrix: A; of a symmetric one ``½(A + Aᵀ)`` counts.
        symmetric: which of the two.
        reference: the direction for the sign.
        start: an earlier y.  A hundredth of a fixed direction is added: another eigenvector would be a fixed point.
        tolerance: of :attr:`Principal.residual`.
        iterations: at most so many products.
    """
    return _iterate(matrix, 1, symmetric, reference, start, tolerance, iterations)


def simultaneous_iteration(
    matrix: Tensor,
    *,
    symmetric: bool,
    width: int = WIDTH,
    reference: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float,
    iterations: int,
) -> Principal:
    """:func:`power_iteration` on ``width`` orthonormal vectors at once; y is their best combination (Rayleigh-Ritz).

    The error falls with the ratio of the principal eigenvalue and the one after the block's instead of the second one.
    """
    return _iterate(matrix, min(width, matrix.shape[-1]), symmetric, reference, start, tolerance, iterations)


def _generic(size: int, width: int, matrix: Tensor) -> Tensor:
    """A fixed (m, width) matrix with no structure that data would share."""
    entries = torch.arange(1, size * width + 1, dtype=torch.float64, device=matrix.device)
    return (entries.square() * math.sqrt(2)).frac().reshape(width, size).mT - 0.5


def _iterate(
    matrix: Tensor,
    width: int,
    symmetric: bool,
    reference: Tensor | None,
    start: Tensor | None,
    tolerance: float,
    iterations: int,
) -> Principal:
    double = matrix.detach().double()
    double = 0.5 * (double + double.mT) if symmetric else double
    count, size, _ = double.shape
    block = _generic(size, width, double).repeat(count, 1, 1)
    if start is not None:
        block[:, :, 0] = start.double() + 0.01 * block[:, :, 0]
    shift = _shift(double, block[:, :, :1]) if symmetric else double.new_zeros(count)
    vector, value = double.new_zeros(count, size), double.new_zeros(count)
    residual = torch.full_like(value, torch.inf)
    spent = torch.zeros(count, dtype=torch.int64, device=matrix.device)
    active = torch.arange(count, device=matrix.device)
    for _ in range(-(-iterations // STEPS)):
        own, basis, sigma = double[active], block[active], shift[active, None, None]
        for _ in range(STEPS):
            basis = own @ basis + sigma * basis
            basis = basis / torch.linalg.vector_norm(basis, dim=-2, keepdim=True).clamp(min=1e-300)
        basis = torch.linalg.qr(basis).Q
        product = own @ basis
        rotation, ritz = _ritz(basis.mT @ product, symmetric)
        leading, image = (basis @ rotation)[:, :, 0], (product @ rotation)[:, :, 0]
        length = torch.linalg.vector_norm(image - ritz[:, None] * leading, dim=-1)
        block[active], vector[active], value[active] = basis @ rotation, leading, ritz
        scale = ritz.abs() + shift[active].abs()
        residual[active] = length / torch.where(scale == 0, 1.0, scale)
        spent[active] += STEPS
        active = active[~(residual[active] <= tolerance)]
        if not len(active):
            break
    dtype = matrix.dtype
    return Principal(_oriented(vector, reference).to(dtype), value.to(dtype), residual.to(dtype), spent)


def _oriented(vector: Tensor, reference: Tensor | None) -> Tensor:
    """±y on the side of the reference."""
    along = vector.sum(-1) if reference is None else (vector * reference.to(vector)).sum(-1)
    if not along.all():
        largest = vector.gather(-1, vector.abs().argmax(-1, keepdim=True))[:, 0]
        along = torch.where(along == 0, largest, along)
    return torch.where(along[:, None] < 0, -vector, vector)


def lanczos(
    matrix: Tensor,
    *,
    reference: Tensor | None = None,
    start: Tensor | None = None,
    tolerance: float,
    iterations: int,
) -> Principal:
    """The vector of the largest eigenvalue of ``½(A + Aᵀ)`` by :func:`~lpgd.solvers.nodes.lanczos.leading_eigenvector`.

    Small matrices are decomposed.  What cannot be proven to be the one goes to :func:`simultaneous_iteration`.
    """
    return _lanczos(matrix, reference, start, tolerance, iterations)[0]


def _lanczos(
    matrix: Tensor, reference: Tensor | None, start: Tensor | None, tolerance: float, iterations: int
) -> tuple[Principal, tuple[Tensor, Tensor] | None]:
    """The answer of :func:`lanczos`, and in float64 the whole decomposition where there is one."""
    double = matrix.detach().double()
    double = (double + double.mT).mul_(0.5)
    count, size, _ = double.shape
    spectrum = None
    if size <= SMALL:
        found, *spectrum = decomposed(double)
    else:
        begin = _generic(size, 1, double)[:, 0].repeat(count, 1)
        begin = begin if start is None else start.double() + 0.01 * begin
        found = leading_eigenvector(double, begin, tolerance)
    dtype, spent = matrix.dtype, torch.full((count,), found.iterations, dtype=torch.int64, device=matrix.device)
    answer = Principal(
        _oriented(found.vector, reference).to(dtype), found.value.to(dtype), found.residual.to(dtype), spent
    )
    rest = (~(found.proven & (found.residual <= tolerance))).nonzero()[:, 0]
    if len(rest):
        own = None if start is None else start[rest]
        again = _iterate(matrix[rest], min(WIDTH, size), True, reference, own, tolerance, iterations)
        for whole, part in zip(answer, again, strict=True):
            whole[rest] = part
        spent[rest] += found.iterations
    return answer, None if spectrum is None else (spectrum[0], spectrum[1])


def _ritz(projected: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """A real rotation (B, w, w) of the block whose first column gives y, and its Rayleigh quotient (B,)."""
    if projected.shape[-1] == 1:
        return torch.ones_like(projected), projected[:, 0, 0]
    if symmetric:
        values, vectors = torch.linalg.eigh(projected)
        return vectors.flip(-1), values[:, -1]
    values, vectors = torch.linalg.eig(projected)
    first = values.abs().argmax(-1, keepdim=True)
    leading = vectors.gather(-1, first[:, None, :].expand(-1, projected.shape[-1], -1)).real
    leading = leading / torch.linalg.vector_norm(leading, dim=-2, keepdim=True).clamp(min=1e-300)
    # The rest of the block is the complement of y: a QR decomposition that starts with y.
    identity = torch.eye(projected.shape[-1], dtype=projected.dtype, device=projected.device)
    rotation = torch.linalg.qr(torch.cat([leading, identity.expand_as(projected)], -1)).Q
    first_column = rotation[:, :, :1]
    return rotation, (first_column.mT @ projected @ first_column)[:, 0, 0]


def _shift(matrix: Tensor, vector: Tensor) -> Tensor:
    """(B,) σ with which the largest eigenvalue of ``A + σI`` dominates, from a few products for each end."""

    def far_end(sigma: Tensor) -> Tensor:
        ahead = vector
        for _ in range(2 * STEPS):
            ahead = ahead / torch.linalg.vector_norm(ahead, dim=-2, keepdim=True).clamp(min=1e-300)
            ahead = matrix @ ahead - sigma[:, None, None] * ahead
        return torch.linalg.vector_norm(ahead, dim=(-2, -1))

    radius = far_end(matrix.new_zeros(len(matrix)))
    smallest = radius - far_end(radius)
    largest = smallest + far_end(smallest)
    # The magnitude of the smallest becomes four fifths of the largest's, a margin for the errors of both estimates.
    return -(smallest + 0.8 * largest) / 1.8


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
    factor, info = torch.linalg.cholesky_ex(system)
    tangent, probe = _tangent(vector, cotangent), _probe(vector)
    both = torch.cholesky_solve(torch.stack([tangent, probe], -1), factor)
    answer = _tangent(vector, both[:, :, 0])
    _check(matrix, value, probe, _tangent(vector, both[:, :, 1]), info == 0)
    product = answer[:, :, None] * vector[:, None, :]
    return 0.5 * (product + product.mT)


def _vjp_decomposed(values: Tensor, vectors: Tensor, vector: Tensor, cotangent: Tensor) -> Tensor:
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
        both, info = torch.linalg.solve_ex(system, torch.stack([tangent, probe], -1))
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
    return _tangent(vector, _generic(vector.shape[-1], 16, vector)[:, 15].to(vector.dtype).expand_as(vector))


def _check(matrix: Tensor, value: Tensor, probe: Tensor, answer: Tensor, factored: Tensor) -> None:
    """Refuse systems whose answer to the probe is that of a gap of rounding errors: then any cotangent's is one."""
    m = matrix.shape[-1]
    norm = torch.maximum(value.abs(), torch.linalg.matrix_norm(matrix) / m**0.5)
    # A gap of 100 √m rounding errors, more than an iteration's tolerance leaves; of m directions the probe has about
    # 1/√m along the one that matters.
    smallest = 100 * m * torch.finfo(matrix.dtype).eps * norm
    small = torch.linalg.vector_norm(answer, dim=-1) * smallest <= torch.linalg.vector_norm(probe, dim=-1)
    _refuse(factored & (small | (probe == 0).all(-1)))


def _refuse(good: Tensor) -> None:
    if not good.all():
        failed = (~good).nonzero()[:, 0].tolist()
        statuses = [Status.SOLVED if ok else Status.NUMERICAL_ERROR for ok in good.tolist()]
        raise SolverError(
            "The principal vector has no derivative where its eigenvalue is double to rounding (or, of a symmetric "
            f"matrix, not the largest).  {describe_failures(statuses, failed)}.",
            statuses,
            failed,
        )


@dataclass(frozen=True)
class PrincipalVector(BaseNode):
    """The unit eigenvector y (m) of the principal eigenvalue of a square matrix A (m, m).

    symmetric:   minimise ``-½ yᵀAy`` subject to ``½(|y|² - 1) = 0``; the eigenvalue is the largest, the multiplier λ
    general:     minimise ``½|Ay - (yᵀAy) y|²`` subject to the same; the eigenvalue is the one of largest magnitude

    The latter must be real.  Forward ``O(m²)`` for each iteration, backward one factorisation, ``O(m³)``, [PMaF]
    section 2.2, and eq. 40 with the inverse transposed; small symmetric matrices are decomposed.  The eigenvalue of
    a symmetric A is :func:`~lpgd.solvers.nodes.eigen.rayleigh_quotients` of A and y.

    Args:
        symmetric: A counts as ``½(A + Aᵀ)``, and the gradient is symmetric.
        method: ``"simultaneous"`` iterates a block of vectors, ``"power"`` one, ``"lanczos"`` (symmetric only) takes a
            Krylov space, a Cholesky factor that proves that no eigenvalue is larger, and inverse iteration; None is
            ``"lanczos"`` for symmetric matrices, else ``"simultaneous"``.
        width: of the block.
        reference: y points to its side; None is the vector of ones.
        tolerance: of ``|Ay - λy|`` relative to the eigenvalue (after the shift that makes it the dominant one).
        iterations: products with the matrix at most.

    Of an eigenvalue that is double y is one of its vectors, and a backward pass raises SolverError where it is so to
    rounding.  Elements whose eigenvalue is complex, or so near to others that iterations do not end, are
    ITERATION_LIMIT.
    """

    name = "principal vector"
    input_names = ("matrix",)
    input_ndims = (2,)
    domain = "Here the eigenvalue that leads must be apart from all others, and real."

    symmetric: bool = True
    method: IterationMethod | None = None
    width: int = WIDTH
    reference: tuple[float, ...] | None = None
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

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        size = square_size(shapes[0])
        if self.reference is not None and len(self.reference) != size:
            raise ValueError(f"reference has {len(self.reference)} entries; for this matrix it must have {size}.")
        return (size,)

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        image = (inputs[0] @ y[:, :, None])[:, :, 0]
        along = (y * image).sum(-1)
        return -0.5 * along if self.symmetric else 0.5 * (image - along[:, None] * y).square().sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return 0.5 * (y.square().sum(-1, keepdim=True) - 1.0)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        matrix = inputs[0]
        reference = None if self.reference is None else matrix.new_tensor(self.reference)
        aux = None
        options: dict[str, Any] = {"reference": reference, "start": start}
        options |= {"tolerance": self.tolerance, "iterations": self.iterations}
        if self.method == "power":
            answer = power_iteration(matrix, symmetric=self.symmetric, **options)
        elif self.method == "simultaneous" or not self.symmetric:
            answer = simultaneous_iteration(matrix, symmetric=self.symmetric, width=self.width, **options)
        else:
            answer, aux = _lanczos(matrix, **options)
        done = (answer.residual <= self.tolerance).tolist()
        statuses = [Status.SOLVED if good else Status.ITERATION_LIMIT for good in done]
        nu = answer.value if self.symmetric else torch.zeros_like(answer.value)
        return NodeAnswer(answer.vector, statuses, answer.iterations, aux, nu[:, None], nu.new_zeros(len(nu), 0))

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        matrix = inputs[0]
        if aux is not None:
            return (_vjp_decomposed(aux[0], aux[1], y, cotangent),)
        value = (y * (matrix @ y[:, :, None])[:, :, 0]).sum(-1) / y.square().sum(-1)
        rule = principal_vjp_symmetric if self.symmetric else principal_vjp_general
        return (rule(matrix, y, value, cotangent),)
