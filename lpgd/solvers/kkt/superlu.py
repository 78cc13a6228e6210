"""SuperLU, asked for what it can factorise only."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg as spla
from scipy.sparse.csgraph import structural_rank

__all__ = ["superlu"]


def superlu(matrix: Any, **options: Any) -> Any:
    """``scipy.sparse.linalg.splu``.

    Of a matrix without a transversal, which is singular whatever its values are, SuperLU works on supernodes with fewer
    rows than columns: BLAS then prints "On entry to DTRSV parameter number 6 had an illegal value", and memory is
    overwritten (scipy 1.17).  Such matrices, and those with zeros for all that is stored in a row, never reach it.

    Raises:
        RuntimeError: the matrix is singular.
    """
    matrix = sp.csc_array(matrix)
    stored = matrix
    if matrix.nnz and not np.all(matrix.data):
        stored = matrix.copy()
        stored.eliminate_zeros()
    indices, offsets = (index.astype(np.int32, copy=False) for index in (stored.indices, stored.indptr))
    pattern = sp.csc_array((stored.data, indices, offsets), stored.shape)  # SciPy 1.13 takes such indices only
    if structural_rank(pattern) < matrix.shape[0]:
        raise RuntimeError("The matrix is singular, whatever its values are.")
    return spla.splu(matrix, **options)
