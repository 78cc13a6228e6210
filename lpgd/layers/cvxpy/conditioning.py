"""Whether the squares that an elimination forms are well enough conditioned: asked of values, in each call.

``FᵀF`` has the squared condition of F.  An error dP of P', as large as rounding makes it, moves a solution by
``-Z (Zᵀ P' Z)⁻¹ Zᵀ dP x``, where Z spans the directions that active constraints leave.  What counts is therefore the
least curvature along the equalities; more active constraints only leave fewer directions.  It is asked for in units
in which P' has a unit diagonal, so that the units of variables do not matter: with

    H = D^-½ P' D^-½ + EᵀE,    D = diag P',    E the rows of the equalities times D^-½, at length 1,

``λ_min(H) <= λ_min(Zᵀ D^-½ P' D^-½ Z)``: on directions along the equalities E vanishes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lpgd import linalg
from lpgd.arrays import BoolArray, FloatArray, IntArray, SparseArray, from_numpy, random_direction
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.lanes import QuickFunction
from lpgd.solvers.kkt.superlu import superlu

__all__ = ["LEAST_CURVATURE", "Conditioning"]

LEAST_CURVATURE = 1e-5
"""The least eigenvalue of H with which squares are formed: a condition of F of about 300."""
DENSE_LIMIT = 300
"""Matrices up to this size, and mostly filled ones, are factorised densely."""
STEPS = 3
"""Of inverse iteration, from a fixed random vector: the estimate is then within a few per cent, almost surely."""


class Conditioning:
    """The test for one structure.

    Args:
        quadratic: the pattern of P'.
        reached: (n,) the variables whose products with others are formed.
        constraint: the pattern of A'.
        equalities: how many of its rows, the first ones, are equalities.

    Attributes:
        constraint_entries: the entries of A' that the test reads; it does not depend on A' where there are none.
    """

    def __init__(
        self, quadratic: SparsityPattern, reached: BoolArray, constraint: SparsityPattern, equalities: int
    ) -> None:
        used = np.flatnonzero(_joined(quadratic, reached))
        place = np.full(quadratic.shape[0], -1, dtype=np.int64)
        place[used] = np.arange(used.size)
        entries = np.flatnonzero((place[quadratic.rows] >= 0) & (place[quadratic.columns] >= 0))
        self.size, self.entries = used.size, entries
        self.at = (place[quadratic.rows[entries]], place[quadratic.columns[entries]])
        # Equalities that hold other variables as well need not bind these.
        binding = np.zeros(constraint.shape[0], dtype=bool)
        binding[:equalities] = True
        binding[constraint.rows[place[constraint.columns] < 0]] = False
        self.constraint_entries: IntArray = np.flatnonzero(binding[constraint.rows])
        numbers, row = np.unique(constraint.rows[self.constraint_entries], return_inverse=True)
        self.count = numbers.size
        self.constraint_at = (row.astype(np.int64), place[constraint.columns[self.constraint_entries]])
        self.is_dense = used.size <= DENSE_LIMIT or entries.size > 0.2 * used.size**2

    def __call__(self, P: Tensor, A: Tensor) -> bool:
        """Whether an element has too little curvature.

        Args:
            P, A: values of P' and A', of one element or of all.
        """
        return bool(_Asked.apply(self, P.detach(), A.detach()))

    def asked(self, P: Tensor, A: Tensor) -> bool:
        """The answer for plain tensors."""
        P, A = torch.atleast_2d(P), torch.atleast_2d(A)
        if self.entries.size < P.shape[1]:
            P = P[:, from_numpy(self.entries).to(P.device)]
        A = A[:, from_numpy(self.constraint_entries).to(A.device)] if self.count else A[:1, :0]
        finite = torch.isfinite(P.sum(-1)) & torch.isfinite(A.sum(-1))  # others fail by themselves
        P, A = (values if len(values) == 1 else values[finite] for values in (P, A))
        if not bool(finite.any()):
            return False
        return (self._dense if self.is_dense else self._sparse)(P, A)

    def _dense(self, P: Tensor, A: Tensor) -> bool:
        H = self._placed(P, self.at, self.size)
        diagonal = H.diagonal(dim1=-2, dim2=-1)
        # A column of zeros is exact: nothing of it was rounded.
        scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
        H = scale[:, :, None] * H * scale[:, None, :]
        H.diagonal(dim1=-2, dim2=-1).add_((diagonal == 0).to(H.dtype))
        if self.count:
            E = self._placed(A, self.constraint_at, self.count) * scale[:, None, :]
            length = linalg.vector_norm(E, dim=-1, keepdim=True)
            E = E / torch.where(length > 0, length, 1.0)
            H = H + E.mT @ E
        factor = linalg.cholesky_ex(H)
        if bool(factor.info.any()):
            return True
        vector = from_numpy(random_direction(self.size).copy()).to(H.device)[None, :, None].expand(len(H), -1, 1)
        least = float(factor.L.diagonal(dim1=-2, dim2=-1).amin()) ** 2
        for _ in range(STEPS):
            vector = torch.cholesky_solve(vector, factor.L)
            length = linalg.vector_norm(vector, dim=(-2, -1), keepdim=True)
            least = min(least, 1.0 / float(length.amax()))
            vector = vector / length
        return least < LEAST_CURVATURE

    def _placed(self, values: Tensor, at: tuple[IntArray, IntArray], rows: int) -> Tensor:
        """(R, rows, size) dense matrices of values (R, nnz)."""
        matrices = values.new_zeros(len(values), rows * self.size)
        matrices[:, from_numpy(at[0] * self.size + at[1]).to(values.device)] = values
        return matrices.reshape(-1, rows, self.size)

    def _sparse(self, P: Tensor, A: Tensor) -> bool:
        values, others = P.cpu().numpy(), A.cpu().numpy()
        count = max(len(values), len(others))
        return any(
            self._least(values[i % len(values)], others[i % len(others)]) < LEAST_CURVATURE for i in range(count)
        )

    def _least(self, P: FloatArray, A: FloatArray) -> float:
        """An upper bound of the least eigenvalue of H, nearly tight; 0 where it has none above 0."""
        matrix: SparseArray = sp.csc_array((P, self.at), shape=(self.size, self.size))
        diagonal = matrix.diagonal()
        scale: SparseArray = sp.diags_array(np.where(diagonal > 0, diagonal, 1.0) ** -0.5)
        matrix = scale @ matrix @ scale + sp.diags_array((diagonal == 0).astype(np.float64))
        if self.count:
            scaled_rows: SparseArray = sp.csr_array((A, self.constraint_at), shape=(self.count, self.size)) @ scale
            length = np.sqrt(np.asarray(scaled_rows.multiply(scaled_rows).sum(1)).ravel())
            scaled_rows = sp.diags_array(1.0 / np.where(length > 0, length, 1.0)) @ scaled_rows
            matrix = matrix + scaled_rows.T @ scaled_rows
        options = {"SymmetricMode": True}
        try:
            factor = superlu(sp.csc_array(matrix), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
        except RuntimeError:  # SuperLU: "Factor is exactly singular"
            return 0.0
        pivots = factor.U.diagonal()
        if not (np.array_equal(factor.perm_r, factor.perm_c) and (pivots > 0).all()):
            return 0.0
        curvature, vector = float(pivots.min()), random_direction(self.size)
        for _ in range(STEPS):
            vector = factor.solve(vector)
            length = float(np.linalg.norm(vector))
            curvature, vector = min(curvature, 1.0 / length), vector / length
        return curvature


class _Asked(QuickFunction):
    """The test as a function of its own: it is given plain tensors under torch.func as well."""

    @staticmethod
    def forward(test: Conditioning, P: Tensor, A: Tensor) -> Tensor:
        return torch.tensor(test.asked(P, A))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """There is no derivative of an answer."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """For jacfwd, whose lanes have the same data; where they have not, the layer refuses vmap itself."""
        first = (tensor if dim is None else tensor.select(dim, 0) for tensor, dim in zip(inputs, in_dims, strict=True))
        return _Asked.apply(*first), None


def _joined(quadratic: SparsityPattern, reached: BoolArray) -> BoolArray:
    """(n,) the variables that P' joins with those that are reached, and these."""
    n = quadratic.shape[0]
    joins = sp.csr_array((np.ones(quadratic.nnz), (quadratic.rows, quadratic.columns)), shape=(n, n))
    label = connected_components(joins, directed=False)[1]
    return np.isin(label, label[reached])
