"""Functions of a user's own that solve programs: another package's interface, called directly."""

from __future__ import annotations

from typing import Any

import daqp
import numpy as np

import lpgd
from lpgd.cones.product import Cones
from lpgd.status import Status

__all__ = ["CONIC", "QUADRATIC"]

ENDINGS = {1: None, 2: None, -1: Status.INFEASIBLE, -3: Status.UNBOUNDED, -4: Status.ITERATION_LIMIT}


def by_active_set(P: Any, q: Any, A: Any, row_lower: Any, row_upper: Any, lower: Any, upper: Any) -> Any:
    """DAQP by its own interface."""
    equal = row_lower == row_upper
    sense = np.concatenate([np.where(lower == upper, 5, 0), np.where(equal, 5, 0)]).astype(np.int32)
    ends = np.concatenate([upper, row_upper]), np.concatenate([lower, row_lower])
    x, _, code, info = daqp.solve(P.toarray(), q, A.toarray(), *ends, sense, primal_tol=1e-10, dual_tol=1e-10)
    if code <= 0:
        return ENDINGS.get(code) or Status.NUMERICAL_ERROR
    multipliers = np.array(info["lam"])
    return np.array(x), multipliers[q.size :], multipliers[: q.size]


def by_interior_points(P: Any, q: Any, A: Any, b: Any, cones: Cones) -> Any:
    """Clarabel by its own interface, for programs of linear constraints."""
    import clarabel
    import scipy.sparse as sp

    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    blocks = [clarabel.ZeroConeT(cones.zero), clarabel.NonnegativeConeT(cones.nonnegative)]
    result = clarabel.DefaultSolver(sp.triu(P, format="csc"), q, A, b, blocks, settings).solve()
    ending = str(result.status)
    failures = {"PrimalInfeasible": Status.INFEASIBLE, "DualInfeasible": Status.UNBOUNDED}
    if ending != "Solved":
        return failures.get(ending, Status.NUMERICAL_ERROR)
    return np.array(result.x), np.array(result.z), np.array(result.s)


QUADRATIC = lpgd.CustomSolver(by_active_set, tolerance=1e-9)
CONIC = lpgd.CustomSolver(by_interior_points, "conic", cones=frozenset({"zero", "nonnegative"}))
