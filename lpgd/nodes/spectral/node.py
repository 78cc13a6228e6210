"""A scalar function of symmetric matrices as a node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import flags
from lpgd.nodes.base import BaseNode, NodeAnswer, Tilt, is_shared
from lpgd.nodes.eigen import square_size, symmetric_part
from lpgd.nodes.spectral.divided_differences import (
    ENTRIES,
    ScalarFunction,
    derivative,
    first_differences,
    second_differences,
)
from lpgd.status import Status, refuse_elements

__all__ = ["FunctionName", "SpectralFunction"]

FunctionName = Literal["log", "sqrt", "rsqrt", "exp"]

_NAMED: dict[str, ScalarFunction] = {"log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "exp": torch.exp}


class _Decomposed(NamedTuple):
    """``½(X + Xᵀ) = U diag(λ) Uᵀ`` in float64: values (B, m) and vectors (B, m, m); one row where X is shared."""

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class SpectralFunction(BaseNode):
    """``F(X) = Σ_i f(λ_i) u_i u_iᵀ`` of a symmetric matrix X (m, m), ``½(X + Xᵀ) = Σ_i λ_i u_i u_iᵀ``.

        minimise ½|Y - F(X)|²

    For a general f that is a projection of its own value, and declarative in name only.  Where f is increasing, with
    a primitive φ, Y is also the one minimiser of ``tr φ*(Y) - <X, Y>``, φ* the convex conjugate, without f:

        log    minimise tr exp(Y) - <X, Y>
        sqrt   minimise ⅓ tr Y³ - <X, Y>         over Y ⪰ 0
        rsqrt  minimise tr Y⁻¹ + <X, Y>          over Y ≻ 0   (decreasing: -φ* and -X)
        exp    minimise tr(Y log Y - Y) - <X, Y> over Y ≻ 0   (the entropy)

    Exact gradients of both forms are the same.  LPGD takes the first, whose answers are exact for every τ.

    ``dF = U (Γ ∘ (Uᵀ dX U)) Uᵀ`` with divided differences ``Γ_ij = f[λ_i, λ_j]`` (Daleckii and Krein): right at equal
    and nearly equal eigenvalues, where products of eigenvectors and of functions of eigenvalues that are differentiated
    apart are not.  Second derivatives take ``f[λ_i, λ_j, λ_k]``, ``O(m⁴)`` operations.  One ``torch.linalg.eigh`` in
    float64, ``O(m³)``, for both passes.

    An eigenvalue that is zero to rounding counts as zero where f or f' has no finite value at zero.  Elements whose f
    is not finite at an eigenvalue are INVALID_DATA; where its divided differences are not finite (the root of a
    matrix with two zero eigenvalues) there is no derivative, and a backward pass raises SolverError.

    Args:
        function: f by its name, or differentiable torch operations on each entry of a tensor of eigenvalues (float64).
    """

    name = "spectral function"
    domain = "Here the function must be finite at all eigenvalues."

    function: FunctionName | Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        if not callable(self.function) and self.function not in get_args(FunctionName):
            raise ValueError(
                f"function is {self.function!r}; it must be one of {', '.join(get_args(FunctionName))}, or a function "
                "of a tensor of eigenvalues."
            )

    @property
    def inputs(self) -> Mapping[str, int]:
        return {"matrix": 2}

    def variable_shape(self, *shapes: tuple[int, ...]) -> tuple[int, ...]:
        size = square_size(shapes[0])
        return (size, size)

    def objective(self, y: Tensor, *inputs: Tensor) -> Tensor:
        return 0.5 * (y - self._expansion(inputs[0])).square().sum((-2, -1))

    def solve(self, inputs: tuple[Tensor, ...], start: Tensor | None) -> NodeAnswer:
        (matrix,) = inputs
        spectrum = self._decompose(matrix)
        result = self._of(spectrum.values)
        y = (spectrum.vectors * result[:, None, :]) @ spectrum.vectors.mT
        fine = flags(torch.isfinite(result).all(-1).expand(len(matrix)))
        statuses = [Status.SOLVED if good else Status.INVALID_DATA for good in fine]
        return NodeAnswer(y.to(matrix.dtype).expand_as(matrix), statuses, [1] * len(matrix), tuple(spectrum))

    def solve_tilted(self, inputs: tuple[Tensor, ...], tilt: Tilt, start: Tensor | None) -> NodeAnswer:
        plain = self.solve(inputs, None)
        moved = (plain.y - tilt.linear + tilt.rho * tilt.center) / (1.0 + tilt.rho)
        return plain._replace(y=moved)

    def vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor, aux: Any) -> tuple[Tensor | None, ...]:
        spectrum = self._decompose(inputs[0]) if aux is None else _Decomposed(*aux)
        inside = spectrum.vectors.mT @ symmetric_part(cotangent).to(spectrum.vectors.dtype) @ spectrum.vectors
        gradient = spectrum.vectors @ (self._slopes(spectrum, inside) * inside) @ spectrum.vectors.mT
        return (gradient.to(cotangent.dtype),)

    def differentiable_vjp(self, inputs: tuple[Tensor, ...], y: Tensor, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """``DF(X₀) V + D²F(X₀)[V, X - X₀]`` at X₀ = X, which only its derivative tells from the first term."""
        spectrum = self._decompose(inputs[0])
        inside, change = (
            spectrum.vectors.mT @ tensor @ spectrum.vectors for tensor in self._moving(inputs[0], cotangent)
        )
        slopes = self._slopes(spectrum, inside.detach())
        product = self._second(spectrum, slopes, inside, change)
        gradient = spectrum.vectors @ (slopes * inside + product + product.mT) @ spectrum.vectors.mT
        return (gradient.to(cotangent.dtype),)

    def _expansion(self, matrix: Tensor) -> Tensor:
        """``F(X₀) + DF(X₀)E + ½D²F(X₀)[E, E]``, E = X - X₀ = 0: F, with its first two derivatives, at any spectrum."""
        spectrum = self._decompose(matrix)
        (change,) = (spectrum.vectors.mT @ tensor @ spectrum.vectors for tensor in self._moving(matrix)[1:])
        slopes = self._slopes(spectrum, None)
        second = self._second(spectrum, slopes, change, change)
        value = torch.diag_embed(self._of(spectrum.values)) + slopes * change + second
        return (spectrum.vectors @ value @ spectrum.vectors.mT).to(matrix.dtype)

    @staticmethod
    def _moving(matrix: Tensor, cotangent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The symmetric parts of the cotangent, and of X less its own value, in float64."""
        change = symmetric_part(matrix - matrix.detach()).double()
        return (change if cotangent is None else symmetric_part(cotangent).double()), change

    def _second(self, spectrum: _Decomposed, slopes: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``Σ_k f[λ_i, λ_k, λ_j] left_ik right_kj``, a block of k at a time."""
        batch, size = spectrum.values.shape
        total = torch.zeros_like(left * right)
        for block in torch.arange(size, device=slopes.device).split(max(1, ENTRIES // max(batch * size**2, 1))):
            known = second_differences(self._of, spectrum.values, slopes.detach(), block)  # (B, i, j, k)
            total = total + torch.einsum("bijk,bik,bkj->bij", known, left[:, :, block], right[:, block, :])
        return total

    def _slopes(self, spectrum: _Decomposed, inside: Tensor | None) -> Tensor:
        """``f[λ_i, λ_j]``; zero where it is not finite and the cotangent, in the basis of U, is zero to rounding.

        Raises:
            SolverError: it is not finite where the cotangent is not zero.
        """
        slopes = first_differences(self._of, spectrum.values)
        infinite = ~torch.isfinite(slopes)
        if not infinite.any():
            return slopes
        if inside is not None:
            noise = 10 * inside.shape[-1] * torch.finfo(inside.dtype).eps * inside.abs().amax((-2, -1), keepdim=True)
            good = ~(infinite & (inside.abs() > noise)).any(-1).any(-1)
            refuse_elements(
                flags(good),
                "The function of the matrix has no derivative: its divided differences at some eigenvalues are not "
                "finite, as those of a root are at two that are zero.",
            )
        return torch.where(infinite, 0.0, slopes)

    def _decompose(self, matrix: Tensor) -> _Decomposed:
        matrices = matrix.detach()
        matrices = matrices[:1] if is_shared(matrices) else matrices
        values, vectors = linalg.eigh(symmetric_part(matrices.double()))
        # What is zero to rounding, of the decomposition above zero and of the data below it.
        scale = 10 * values.shape[-1] ** 0.5 * values.abs().amax(-1, keepdim=True)
        null = (values <= torch.finfo(values.dtype).eps * scale) & (values >= -torch.finfo(matrix.dtype).eps * scale)
        zero = values.new_zeros(1)
        if not torch.isfinite(self._of(zero) + derivative(self._of)(zero)):
            values = torch.where(null, 0.0, values)
        return _Decomposed(values, vectors)

    def _of(self, values: Tensor) -> Tensor:
        """The scalar function.

        Raises:
            ValueError: it changes the shape, or uses a tensor that requires a gradient, which would get none.
        """
        if isinstance(self.function, str):
            return _NAMED[self.function](values)
        with torch.enable_grad():
            result = self.function(values)
        if not isinstance(result, Tensor) or result.shape != values.shape:
            found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"the function made {found} of eigenvalues {tuple(values.shape)}; it must keep the shape.")
        if result.requires_grad and not values.requires_grad:
            raise ValueError("the function uses a tensor that requires a gradient, and would get none: detach it.")
        return result
