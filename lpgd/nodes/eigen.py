"""Eigenvectors of symmetric matrices, all or the first k, with the derivative that guards equal eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import elements_where
from lpgd.execution.deadline import is_over
from lpgd.nodes.base import BaseNode, NodeAnswer
from lpgd.nodes.leading import Leading, is_worth_iterating, leading_eigenvectors, leading_response
from lpgd.status import Status, warn

__all__ = [
    "EigenDecomposition",
    "Spectrum",
    "eigen_decomposition",
    "eigen_vjp",
    "eigen_vjp_approximate",
    "has_ties",
    "rayleigh_quotients",
    "square_size",
]


EigenMethod = Literal["decomposition", "iteration"]


class Spectrum(NamedTuple):
    """``X = U diag(λ) Uᵀ``, in the order that was asked for.

    Attributes:
        values: (B, m) all eigenvalues.
        vectors: (B, m, m) all eigenvectors, columns.
    """

    values: Tensor
    vectors: Tensor


def symmetric_part(matrix: Tensor) -> Tensor:
    """``½(X + Xᵀ)``."""
    return 0.5 * (matrix + matrix.mT)


def eigen_decomposition(matrix: Tensor, largest: bool, reference: Tensor | None = None) -> Spectrum:
    """All eigenvalues and eigenvectors of ``½(X + Xᵀ)``, (B, m, m), from the largest or from the smallest.

    Signs: each eigenvector points to the side of its column in ``reference`` (B, m, k), where there is one; the others
    have a positive entry of largest magnitude, the first of those that are equal to rounding.
    """
    # Of -X the smallest come first: no eigenvectors have to be reversed.
    values, vectors = linalg.eigh((matrix + matrix.mT).mul_(-0.5 if largest else 0.5))
    return Spectrum(-values if largest else values, oriented(vectors, reference))


def oriented(vectors: Tensor, reference: Tensor | None) -> Tensor:
    """Eigenvectors (B, m, k) with the signs of :func:`eigen_decomposition`."""
    rows = vectors.mT  # they lie one after the other
    magnitude = rows.abs()
    near = magnitude >= (1.0 - 1e-3) * magnitude.amax(-1, keepdim=True)
    side = rows.gather(-1, near.view(torch.uint8).argmax(-1, keepdim=True))[:, :, 0]  # (B, m)
    if reference is not None:
        count = reference.shape[-1]
        along = (vectors[:, :, :count] * reference).sum(-2)
        side = torch.cat([torch.where(along == 0, side[:, :count], along), side[:, count:]], -1)
    return vectors * torch.where(side < 0, -1.0, torch.ones_like(side))[:, None, :]


def rayleigh_quotients(matrix: Tensor, vectors: Tensor) -> Tensor:
    """The eigenvalues (..., k) that belong to unit eigenvectors (..., m, k) of ``½(X + Xᵀ)``, (..., m, m).

    ``u_iᵀ X u_i`` with u_i held fixed: its gradient ``u_i u_iᵀ`` is the exact one of λ_i, as the quotient is
    stationary in u_i, and as an eigenvalue it is accurate to the square of the vectors' error.

    Where two eigenvalues are equal the gradients of vectors and values, each for itself, do not add up to that of a
    loss that combines them, such as ``Σ f(λ_i) u_i u_iᵀ``: that of :class:`~lpgd.nodes.SpectralFunction` is right
    there.  A backward pass through both warns where that matters.
    """
    fixed = vectors.detach()
    values = (fixed * (symmetric_part(matrix) @ fixed)).sum(-2)
    if vectors.requires_grad and values.requires_grad:
        tied = _ties(values.detach())
        if tied.any():
            _watch(vectors, values, tied)
    return values


def _ties(values: Tensor) -> Tensor:
    """(..., k, k) pairs of eigenvalues that are equal to rounding."""
    size = values.shape[-1]
    near = 10 * size**0.5 * torch.finfo(values.dtype).eps * values.abs().amax(-1)
    tied = (values[..., :, None] - values[..., None, :]).abs() <= near[..., None, None]
    tied.diagonal(dim1=-2, dim2=-1).fill_(False)
    return tied


def has_ties(chosen: Tensor, values: Tensor, tolerance: float) -> Tensor:
    """(B,) whether neighbours among the chosen eigenvalues are equal within a share of the largest of all."""
    near = tolerance * values.abs().amax(-1, keepdim=True)
    return (chosen.diff(dim=-1).abs() <= near).any(-1)


def _watch(vectors: Tensor, values: Tensor, tied: Tensor) -> None:
    """Warn in a backward pass that comes through values and vectors and would need what lies between tied ones."""
    basis, seen = vectors.detach(), {"values": False, "vectors": False}

    def look() -> None:
        if all(seen.values()):
            seen.update(values=False, vectors=False)
            warn(
                "Some eigenvalues of a matrix are equal to rounding, and the loss depends on their eigenvectors and, "
                "by rayleigh_quotients, on the eigenvalues: the gradient is right only if what it does with these "
                "vectors does not depend on these eigenvalues.  For a function of the matrix, as its inverse root, use "
                "lpgd.nodes.SpectralFunction."
            )

    def of_vectors(cotangent: Tensor) -> None:
        product = basis.mT @ cotangent
        mixed = (product + product.mT).abs()  # the part that a common factor of both vectors would change
        noise = 10 * basis.shape[-2] * torch.finfo(basis.dtype).eps * product.abs().amax((-2, -1), keepdim=True)
        if (tied & (mixed > noise)).any():
            seen["vectors"] = True
            look()

    def of_values(cotangent: Tensor) -> None:
        seen["values"] = True
        look()

    vectors.register_hook(of_vectors)
    values.register_hook(of_values)


def eigen_vjp(spectrum: Spectrum, cotangent: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The gradient of ``<V, U>`` with respect to X, where V (B, m, k) goes with the first k eigenvectors.

    ``½(S + Sᵀ)`` with ``S = U_m (Λ̃ ∘ (U_mᵀ V)) U_kᵀ``, ``Λ̃_ij = 1 / (λ_j - λ_i)``, zero on the diagonal and where
    ``|λ_j - λ_i| <= tolerance max|λ|``.  Zero is the exact answer for losses that depend on the span of equal
    eigenvalues' vectors only, with weights that do not vary with the eigenvalues; another loss has no gradient there,
    or one that vectors alone do not tell.  Lecture notes of Gould, section 4.3.

    Returns:
        The gradient (B, m, m), and (B,) whether equal eigenvalues had a part in it that was left out.
    """
    values, vectors = spectrum
    count = cotangent.shape[-1]
    product = vectors.mT @ cotangent  # (B, m, k)
    gap = values[:, None, :count] - values[:, :, None]
    near = tolerance * values.abs().amax(-1)
    ambiguous = torch.zeros_like(near, dtype=torch.bool)
    gap.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    if (values.diff(dim=-1).abs() <= near[:, None]).any():
        equal = gap.abs() <= near[:, None, None]
        rotation = product.clone()  # of one eigenvector into another of the same eigenvalue
        rotation[:, :count] -= product[:, :count].mT
        size = torch.finfo(values.dtype).eps * values.shape[-1] * 10 * product.abs().amax((1, 2))
        ambiguous = (equal & (rotation.abs() > size[:, None, None])).any(-1).any(-1)
        gap = torch.where(equal, torch.inf, gap)
    gradient = vectors @ product.div_(gap) @ vectors[:, :, :count].mT
    return (gradient + gradient.mT).mul_(0.5), ambiguous


def eigen_vjp_leading(matrix: Tensor, known: Leading, cotangent: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """:func:`eigen_vjp` from the k largest eigenvalues of A alone: what the others have to do with it is a system."""
    gradient, ambiguous = eigen_vjp(Spectrum(known.values, known.vectors), cotangent, tolerance)
    others = leading_response(symmetric_part(matrix), known, cotangent)
    return gradient + symmetric_part(others @ known.vectors.mT), ambiguous


def eigen_vjp_differentiable(matrix: Tensor, vectors: Tensor, cotangent: Tensor, tolerance: float) -> Tensor:
    """The gradient of :func:`eigen_vjp` from X (B, m, m) and its k eigenvectors alone, for second derivatives.

    What the vectors owe to the others, ``(λ_j I - X)⁻¹`` on the complement of U, is one system for each of them, which
    is regular however the other eigenvalues lie: ``λ_j I - X + U (Λ + (σ - λ_j) I) Uᵀ``, σ of the size of X.

    Raises:
        RuntimeError: an eigenvalue of U is equal to another one, to rounding.
    """
    matrix = symmetric_part(matrix)
    count, size = vectors.shape[-1], matrix.shape[-1]
    values = (vectors * (matrix @ vectors)).sum(-2)  # (B, k)
    product = vectors.mT @ cotangent
    gap = values[:, None, :] - values[:, :, None] + torch.eye(count, dtype=values.dtype, device=values.device)
    bound = tolerance * linalg.matrix_norm(matrix, 2)
    tied = (gap.abs() <= bound[:, None, None]).any(-1).any(-1)
    off = 1.0 - torch.eye(count, dtype=values.dtype, device=values.device)
    change = vectors @ (off * product / gap)  # (B, m, k)
    if count < size:
        sigma = (1.0 + linalg.matrix_norm(matrix)).detach()
        shift = values[:, :, None] - values[:, None, :] - sigma[:, None, None]  # (B, k, k): λ_j - λ_i - σ
        inside = (vectors[:, None] * shift[:, :, None]) @ vectors.mT[:, None]
        unit = torch.eye(size, dtype=values.dtype, device=values.device)
        systems = values[:, :, None, None] * unit - matrix[:, None] - inside  # (B, k, m, m)
        outside = cotangent - vectors @ product
        answer, information = linalg.solve_ex(systems, outside.mT[..., None])
        complement = answer[..., 0].mT
        large = complement.norm(dim=-2) * bound[:, None] > outside.norm(dim=-2)
        tied = tied | (information != 0).any(-1) | (large | ~complement.isfinite().all(-2)).any(-1)
        change = change + complement
    if tied.any():
        raise RuntimeError(
            f"eigenvalues of elements {elements_where(tied)[:10]} are equal to others, to rounding: their "
            "eigenvectors have no second derivative."
        )
    return symmetric_part(change @ vectors.mT)


def eigen_vjp_approximate(spectrum: Spectrum, cotangent: Tensor, tolerance: float) -> Tensor:
    """The gradient that ignores the constraints: ``-½(X† V Uᵀ + U Vᵀ X†)``, X† for ``(X - λ_j I)†``.

    Eigenvalues within ``tolerance max|λ|`` of zero count as zero in X†.  Gould, Xu, Xu, Liu, *Towards Understanding
    Gradient Approximation in Equality Constrained DDNs*, eq. 13.
    """
    values, vectors = spectrum
    null = values.abs() <= tolerance * values.abs().amax(-1, keepdim=True)
    inverse = torch.where(null, 0.0, 1.0 / torch.where(null, 1.0, values)).to(values.dtype)
    product = inverse[:, :, None] * (vectors.mT @ cotangent)
    return -symmetric_part(vectors @ product @ vectors[:, :, : cotangent.shape[-1]].mT)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def square_size(shape: tuple[int, ...]) -> int:
    """The order m of a matrix of this shape.

    Raises:
        ValueError: it is not square, or empty.
    """
    if len(shape) != 2 or shape[0] != shape[1] or not shape[0]:
        raise ValueError(f"matrix has shape {shape}; it must be square, (m, m).")
    return shape[0]


@dataclass(frozen=True)
class EigenDecomposition(BaseNode):
    """Orthonormal eigenvectors U (m, k) of a symmetric matrix X (m, m), of the k largest or smallest eigenvalues.

    largest:    minimise ``-½ tr(N UᵀXU)`` subject to ``UᵀU = I``, in descending order of eigenvalues
    otherwise:  minimise ``½ tr(N UᵀXU)`` subject to the same, in ascending order

    with ``N = diag(k, k-1, …, 1)/k``, which makes the minimiser unique up to signs also for k = m, where tr(UᵀXU) is
    constant.  ``½(X + Xᵀ)`` counts, and the gradient is symmetric.  The eigenvalues with their exact gradient are
    :func:`rayleigh_quotients` of X and U.

    Forward ``torch.linalg.eigh``, ``O(m³)``; backward :func:`eigen_vjp`, ``O(m² k)``: Gould, *Lecture Notes on
    Differentiable Optimisation in Deep Learning*, section 4.3.  The first few of a large matrix by block Krylov spaces
    of a shifted inverse (:func:`~lpgd.nodes.leading.leading_eigenvectors`), to the accuracy of ``eigh``, where that is
    faster.

    Nearly equal eigenvalues: the derivative of a pair of eigenvectors grows with the inverse of the gap.  From a gap of
    ``tie_tolerance max|λ|`` on the pair is left out: exact for losses that depend on its span only, with weights that
    do not vary with the eigenvalues; for another loss there is no gradient, and an LpgdWarning says so.  Functions of
    the matrix, ``Σ f(λ_i) u_i u_iᵀ``, have one: that of :class:`~lpgd.nodes.SpectralFunction`.

    Args:
        k: how many; None is all m.
        largest: which end, and the order.
        tie_tolerance: relative gap below which eigenvalues count as equal; None is ``10 √m`` rounding errors of
            the dtype.
        method: ``"decomposition"`` of the whole matrix, or ``"iteration"``, which leaves a batch with an element that
            it cannot prove (eigenvalues k and k + 1 nearly equal, or k + 3 > m/2) to the former; None is iteration in
            float64 from order 512 and for k up to m/256 (measured on a processor), else decomposition.
    """

    name = "eigen decomposition"

    k: int | None = None
    largest: bool = True
    tie_tolerance: float | None = None
    method: EigenMethod | None = None

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in get_args(EigenMethod):
            raise ValueError(
                f"method is {self.method!r}; it must be one of {', '.join(get_args(EigenMethod))}, or None."
            )
        if self.k is not None and self.k < 1:
            raise ValueError(f"k is {self.k}; it must be at least 1, or None for all eigenvectors.")

    @property
    def inputs(self) -> Mapping[str, int]:
        return {"matrix": 2}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        size = square_size(shapes[0])
        if self.k is not None and self.k > size:
            raise ValueError(f"k is {self.k}, but the matrix has only {size} eigenvectors.")
        return (size, size if self.k is None else self.k)

    def _tolerance(self, matrix: Tensor) -> float:
        if self.tie_tolerance is not None:
            return self.tie_tolerance
        return 10 * matrix.shape[-1] ** 0.5 * torch.finfo(matrix.dtype).eps

    def _weights(self, y: Tensor) -> Tensor:
        k = y.shape[-1]
        weights = torch.arange(k, 0, -1, dtype=y.dtype, device=y.device) / k
        return -weights if self.largest else weights

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return 0.5 * (self._weights(y) * (y * (inputs[0] @ y)).sum(-2)).sum(-1)

    def equality(self, y: Tensor, *inputs: Tensor) -> Tensor:
        k = y.shape[-1]
        first, second = torch.triu_indices(k, k, device=y.device)
        excess = y.mT @ y - torch.eye(k, dtype=y.dtype, device=y.device)
        return excess[:, first, second] * torch.where(first == second, 0.5, 1.0).to(y.dtype)

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        size, count = inputs[0].shape[-1], len(inputs[0])
        k = size if self.k is None else self.k
        aux = self._iterated(inputs[0], k, start)
        if aux is None and is_over() and self._iterates(inputs[0], k):
            nothing = inputs[0].new_full((count, size, k), torch.nan)
            return NodeAnswer(nothing, [Status.ITERATION_LIMIT] * count, [0] * count)
        aux = tuple(eigen_decomposition(inputs[0], self.largest, start)) if aux is None else aux
        return NodeAnswer(aux[1][:, :, :k].to(inputs[0].dtype), [Status.SOLVED] * count, [1] * count, aux=aux)

    def _iterated(self, matrix: Tensor, k: int, start: Tensor | None) -> tuple[Tensor, ...] | None:
        """The eigenvalues and vectors by iteration in float64, and what their derivative takes; None to decompose."""
        if not self._iterates(matrix, k):
            return None
        known = leading_eigenvectors(self._side() * symmetric_part(matrix.double()), k, _double(start))
        if known is None:
            return None
        return (self._side() * known.values, oriented(known.vectors, _double(start)), known.factor)

    def _iterates(self, matrix: Tensor, k: int) -> bool:
        if self.method is not None:
            return self.method != "decomposition"
        return matrix.dtype == torch.float64 and is_worth_iterating(matrix.shape[-1], k)

    def _side(self) -> float:
        """The smallest eigenvalues are the largest ones of -X."""
        return 1.0 if self.largest else -1.0

    def multipliers(self, inputs: tuple[Tensor, ...], y: Tensor, aux: Any) -> tuple[Tensor, Tensor]:
        k = y.shape[-1]
        first, second = torch.triu_indices(k, k, device=y.device)
        nu = torch.where(first == second, (-self._weights(y) * aux[0][:, :k])[:, first], 0.0).to(y.dtype)
        return nu, nu[:, :0]

    def tied(self, inputs: tuple[Tensor, ...]) -> Tensor:
        values = torch.linalg.eigvalsh(symmetric_part(inputs[0]).double())
        values = values.flip(-1) if self.largest else values
        count = values.shape[-1] if self.k is None else min(self.k + 1, values.shape[-1])
        return has_ties(values[:, :count], values, self._tolerance(inputs[0]))

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        tolerance = self._tolerance(inputs[0])
        if aux is not None and len(aux) == 3:
            side, values = self._side(), aux[0]
            # U(-X) = U(X) in the other order: the derivative changes its sign.
            known = Leading(side * values, aux[1], aux[2])
            gradient, ambiguous = eigen_vjp_leading(side * inputs[0].double(), known, cotangent.double(), tolerance)
            gradient = (side * gradient).to(cotangent.dtype)
        else:
            spectrum = self._spectrum(inputs[0], y) if aux is None else Spectrum(*aux)
            gradient, ambiguous = eigen_vjp(spectrum, cotangent, tolerance)
        if ambiguous.any():
            count = int(ambiguous.sum())
            warn(
                f"The eigenvectors of {count} of {len(y)} matrices have no derivative that this loss can use: some of "
                "their eigenvalues are equal to rounding, and the loss depends on more than their span.  The gradient "
                "leaves these pairs out."
            )
        return (gradient,)

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return (eigen_vjp_differentiable(inputs[0], y, cotangent, self._tolerance(inputs[0])),)

    def vjp_ignoring_constraints(
        self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any
    ) -> tuple[Tensor | None, ...]:
        spectrum = self._spectrum(inputs[0], y) if aux is None or len(aux) == 3 else Spectrum(*aux)
        return (eigen_vjp_approximate(spectrum, cotangent, self._tolerance(inputs[0])),)

    def _spectrum(self, matrix: Tensor, y: Tensor) -> Spectrum:
        """The whole decomposition that a solution belongs to."""
        spectrum = eigen_decomposition(matrix, self.largest, y)
        return spectrum._replace(vectors=torch.cat([y, spectrum.vectors[:, :, y.shape[-1] :]], -1))
