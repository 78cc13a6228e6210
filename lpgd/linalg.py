"""The part of torch.linalg that is used here, with types (torch 2.13 has none for it), and :func:`matvec`."""

# ruff: noqa: D103 -- torch.linalg describes them

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "cholesky",
    "cholesky_ex",
    "det",
    "eig",
    "eigh",
    "eigvalsh",
    "inv",
    "lstsq",
    "lu_factor_ex",
    "lu_solve",
    "matrix_exp",
    "matrix_norm",
    "matrix_rank",
    "matvec",
    "pinv",
    "qr",
    "solve",
    "solve_ex",
    "solve_triangular",
    "svd",
    "svdvals",
    "vector_norm",
]

if TYPE_CHECKING:

    class Cholesky(NamedTuple):
        L: Tensor
        info: Tensor

    class Eigen(NamedTuple):
        eigenvalues: Tensor
        eigenvectors: Tensor

    class QR(NamedTuple):
        Q: Tensor
        R: Tensor

    class SVD(NamedTuple):
        U: Tensor
        S: Tensor
        Vh: Tensor

    class Solution(NamedTuple):
        result: Tensor
        info: Tensor

    class LU(NamedTuple):
        LU: Tensor
        pivots: Tensor
        info: Tensor

    class LeastSquares(NamedTuple):
        solution: Tensor
        residuals: Tensor
        rank: Tensor
        singular_values: Tensor

    Order = float | Literal["fro", "nuc"]

    def cholesky(A: Tensor, *, upper: bool = False) -> Tensor: ...
    def cholesky_ex(
        A: Tensor, *, upper: bool = False, check_errors: bool = False, out: tuple[Tensor, Tensor] | None = None
    ) -> Cholesky: ...
    def eig(A: Tensor) -> Eigen: ...
    def eigh(A: Tensor, UPLO: str = "L") -> Eigen: ...
    def eigvalsh(A: Tensor, UPLO: str = "L") -> Tensor: ...
    def qr(A: Tensor, mode: Literal["reduced", "complete", "r"] = "reduced") -> QR: ...
    def svd(A: Tensor, full_matrices: bool = True) -> SVD: ...
    def svdvals(A: Tensor) -> Tensor: ...
    def det(A: Tensor) -> Tensor: ...
    def inv(A: Tensor) -> Tensor: ...
    def matrix_exp(A: Tensor) -> Tensor: ...
    def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor: ...
    def solve_ex(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> Solution: ...
    def solve_triangular(
        A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False, out: Tensor | None = None
    ) -> Tensor: ...
    def lu_factor_ex(
        A: Tensor, *, pivot: bool = True, check_errors: bool = False, out: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> LU: ...
    def lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Tensor: ...
    def lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> LeastSquares: ...
    def pinv(A: Tensor, *, atol: float | None = None, rtol: float | None = None, hermitian: bool = False) -> Tensor: ...
    def matrix_rank(
        A: Tensor, *, atol: float | None = None, rtol: float | None = None, hermitian: bool = False
    ) -> Tensor: ...
    def matrix_norm(
        A: Tensor, ord: Order = "fro", dim: tuple[int, int] = (-2, -1), keepdim: bool = False
    ) -> Tensor: ...
    def vector_norm(
        x: Tensor,
        ord: float = 2,
        dim: int | tuple[int, ...] | None = None,
        keepdim: bool = False,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor: ...

else:
    from torch.linalg import (
        cholesky,
        cholesky_ex,
        det,
        eig,
        eigh,
        eigvalsh,
        inv,
        lstsq,
        lu_factor_ex,
        lu_solve,
        matrix_exp,
        matrix_norm,
        matrix_rank,
        pinv,
        qr,
        solve,
        solve_ex,
        solve_triangular,
        svd,
        svdvals,
        vector_norm,
    )


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Products (…, p) of matrices (…, p, q) and vectors (…, q).

    As products of rows: MKL's batched products take 3 to 7 times as long for columns (torch 2.13, 64 × 30 × 30 up to
    16 × 500 × 500, on a processor).
    """
    return (vector[..., None, :] @ matrix.mT)[..., 0, :]
