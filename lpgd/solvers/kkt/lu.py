"""LU factors of stacks of equilibrated symmetric matrices."""

from __future__ import annotations

import numpy as np
import torch

from lpgd import linalg
from lpgd.arrays import BoolArray, FloatArray, from_numpy

__all__ = ["ScaledLU"]


class ScaledLU:
    """``S K S = L U`` of k symmetric matrices K of order p, made in their place: new memory costs as much.

    Args:
        matrices: (k, p, p), which are overwritten if they lie together.
        scale: (k, p) the diagonal of S.

    Attributes:
        regular: (k,) where no pivot is zero.
    """

    def __init__(self, matrices: FloatArray, scale: FloatArray) -> None:
        count, side = scale.shape
        self.scale = scale
        matrices *= scale[:, :, None]
        matrices *= scale[:, None, :]
        # Columns of the transposed matrices lie together, as LAPACK has them; the matrices are symmetric.
        transposed = from_numpy(np.ascontiguousarray(matrices)).mT
        self._pivots, info = torch.empty(count, side, dtype=torch.int32), torch.empty(count, dtype=torch.int32)
        self._factors = linalg.lu_factor_ex(transposed, out=(transposed, self._pivots, info)).LU
        self.regular: BoolArray = info.numpy() == 0

    @property
    def entries(self) -> int:
        """How many numbers the factors have."""
        return self._factors.numel()

    def solve(self, right: FloatArray) -> FloatArray:
        """``K⁻¹`` times right-hand sides (k, p)."""
        answer = self.solve_scaled(self.scale * right)
        answer *= self.scale
        return answer

    def solve_scaled(self, right: FloatArray) -> FloatArray:
        """``(S K S)⁻¹`` times right-hand sides (k, p)."""
        return linalg.lu_solve(self._factors, self._pivots, from_numpy(right)[:, :, None])[:, :, 0].numpy()
