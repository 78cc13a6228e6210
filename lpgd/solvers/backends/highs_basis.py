"""Where a linear program's next solve by HiGHS starts from."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Basis"]


class Basis:
    """A basis of HiGHS that pickles, and a fingerprint of the ends of rows and variables with which it was found."""

    def __init__(self, basis: Any, ends: int) -> None:
        self.basis, self.ends = basis, ends

    def __reduce__(self) -> Any:
        basis = self.basis
        return _basis_of, (tuple(map(int, basis.col_status)), tuple(map(int, basis.row_status)), self.ends)


def _basis_of(column_statuses: tuple[int, ...], row_statuses: tuple[int, ...], ends: int) -> Basis:
    highspy = importlib.import_module("highspy")
    basis = highspy.HighsBasis()
    basis.col_status = [highspy.HighsBasisStatus(status) for status in column_statuses]
    basis.row_status = [highspy.HighsBasisStatus(status) for status in row_statuses]
    basis.valid = True
    return Basis(basis, ends)
