"""A process of its own that measures what prepared solvers hold; prints lines of JSON.  Arguments: names of solvers."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from typing import Any

import numpy as np
import torch

from lpgd import Cones
from lpgd.problems.conic.sparsity import SparsityPattern
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers import DAQP, ECOS, OSQP, PIQP, SCS, Clarabel, HiGHS, ProxQP
from lpgd.solvers.backends.forms import Matrices, Vectors
from lpgd.solvers.backends.moreau_objects import ACTIVE_SET, IPM, Compiled, Inputs, Limits, memory
from lpgd.solvers.backends.moreau_rows import MoreauForm

SOLVERS: dict[str, Any] = {
    solver.name: solver for solver in (SCS(), OSQP(), ECOS(), Clarabel(), DAQP(), HiGHS(), PIQP(), ProxQP())
}
WAYS = (ACTIVE_SET, IPM)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held(name: str, n: int, dense: bool) -> dict[str, Any]:
    """One workspace of a quadratic program with n variables and n rows: what it states, and what it holds."""
    solver, random = SOLVERS[name], np.random.default_rng(0)
    entries = np.ones((n, n), bool) if dense else np.eye(n, dtype=bool) | (random.random((n, n)) < 3 / n)
    quadratic = np.ones((n, n), bool) if dense else np.eye(n, dtype=bool)
    P_pattern, A_pattern = (SparsityPattern((n, n), *np.nonzero(part.T)[::-1]) for part in (quadratic, entries))
    structure = ConicStructure(P_pattern, A_pattern, Cones(nonnegative=n))
    nothing = np.zeros(0, bool)
    frame = solver.form_type.frame_of(structure, nothing, nothing)

    def workspace() -> tuple[Any, Any]:
        root = random.standard_normal((n, n))
        P = root @ root.T / n + np.eye(n)
        A = random.standard_normal(structure.constraint.nnz)
        form = solver.form_type(
            Matrices(structure, P[structure.quadratic.rows, structure.quadratic.columns], A, *[nothing] * 2)
        )
        prepared = solver.prepare(form)
        empty = np.zeros((1, 0))
        vectors = frame.vectors(Vectors(random.standard_normal((1, n)), np.ones((1, n)), empty, empty))
        prepared.solve(type(vectors)(*(part[0] for part in vectors)), None)
        return form, prepared

    kept = [workspace() for _ in range(5)]
    before, count = resident(), 120 if n == 8 else 30
    kept += [workspace() for _ in range(count)]
    used = (resident() - before) / count
    form, prepared = kept[-1]
    return {"solver": name, "n": n, "dense": dense, "stated": prepared.memory(form), "held": used}


def held_in_batches(method: str, n: int, dense: bool) -> dict[str, Any]:
    """The same for one of Moreau's objects, which serves 16 elements."""
    random, batch, nothing = np.random.default_rng(0), 16, np.zeros(0, bool)
    entries = np.ones((n, n), bool) if dense else np.eye(n, dtype=bool) | (random.random((n, n)) < 3 / n)
    quadratic = SparsityPattern.dense(n, n) if dense else SparsityPattern.from_matrix(np.eye(n))
    structure = ConicStructure(quadratic, SparsityPattern.from_matrix(entries), Cones(nonnegative=n))
    layout = MoreauForm(structure, nothing, nothing).layout

    def made() -> Compiled:
        root = random.standard_normal((batch, n, n))
        P = quadratic.gather(torch.from_numpy(root @ root.swapaxes(1, 2) / n + np.eye(n)))
        A, q, b = torch.randn(batch, structure.constraint.nnz), torch.randn(batch, n), torch.ones(batch, n)
        compiled = Compiled(layout, method, batch, Limits(1e-9, 200, None, False), 1)
        compiled.solve(Inputs(P, A.double(), q.double(), b.double()))
        return compiled

    kept = [made() for _ in range(3)]
    before, count = resident(), 30
    kept += [made() for _ in range(count)]
    used = (resident() - before) / count
    return {"solver": method, "n": n, "dense": dense, "stated": memory(layout, method, batch), "held": used}


def main() -> None:
    for name in sys.argv[1:]:
        for n, dense in ((8, True), (40, True), (60, False)):
            for report in (
                [held(name, n, dense)] if name in SOLVERS else [held_in_batches(way, n, dense) for way in WAYS]
            ):
                print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
