"""New matrices in each step, as training has them: the layer against a bare loop over the binding, serial and cold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

import lpgd

from .dense_qp import draw_qps
from .harness import Settings
from .ours import solver_names
from .results import Target

__all__ = ["against_bare_loops"]

SIZES, QUICK_SIZES = (10, 50, 100), (10,)
TARGETS = {("DAQP", 50): (1.2, 1.05)}
"""Of forward passes, relative to the loop; the others are there to be seen."""

FloatArray = NDArray[np.float64]
Loop = Callable[..., FloatArray]
"""P, q, A, b, G, h as arrays to solutions (B, n)."""


def daqp_loop(P: FloatArray, q: FloatArray, A: FloatArray, b: FloatArray, G: FloatArray, h: FloatArray) -> FloatArray:
    import daqp

    rows, upper = np.concatenate([A, G], 1), np.concatenate([b, h], 1)
    lower = np.concatenate([b, np.full_like(h, -1e30)], 1)
    sense = np.array([5] * b.shape[1] + [0] * h.shape[1], dtype=np.int32)
    elements = zip(P, q, rows, upper, lower, strict=True)
    return np.array([daqp.solve(*element, sense.copy())[0] for element in elements])


def piqp_loop(P: FloatArray, q: FloatArray, A: FloatArray, b: FloatArray, G: FloatArray, h: FloatArray) -> FloatArray:
    import piqp

    found = []
    for P_i, q_i, A_i, b_i, G_i, h_i in zip(P, q, A, b, G, h, strict=True):
        solver: Any = piqp.DenseSolver()
        settings = solver.settings
        settings.eps_abs = settings.eps_rel = settings.eps_duality_gap_abs = lpgd.PIQP().tolerance
        settings.eps_duality_gap_rel = lpgd.PIQP().tolerance
        solver.setup(P_i, q_i, A_i, b_i, G_i, None, h_i)
        solver.solve()
        found.append(np.array(solver.result.x))
    return np.array(found)


def clarabel_loop(
    P: FloatArray, q: FloatArray, A: FloatArray, b: FloatArray, G: FloatArray, h: FloatArray
) -> FloatArray:
    options = lpgd.Clarabel()
    clarabel = options.module()
    settings = clarabel.DefaultSettings()
    settings.verbose, settings.max_threads, settings.presolve_enable = False, options.max_threads, False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = options.tolerance
    cones = [clarabel.ZeroConeT(b.shape[1]), clarabel.NonnegativeConeT(h.shape[1])]
    found = []
    for element in zip(P, q, np.concatenate([A, G], 1), np.concatenate([b, h], 1), strict=True):
        P_i, q_i, rows, right = element
        upper = sp.triu(sp.csc_matrix(P_i), format="csc")
        found.append(clarabel.DefaultSolver(upper, q_i, sp.csc_matrix(rows), right, cones, settings).solve().x)
    return np.array(found)


LOOPS: dict[str, Loop] = {"DAQP": daqp_loop, "PIQP": piqp_loop, "CLARABEL": clarabel_loop}


def against_bare_loops(settings: Settings) -> Iterator[Target]:
    """Medians of ratios of passes that take turns on the same data; the layer is asked for all gradients."""
    batch, repeats = (8, 3) if settings.quick else (64, 21)
    for name in solver_names(list(LOOPS)):
        for n in QUICK_SIZES if settings.quick else SIZES:
            yield _against(name, n, batch, repeats if n < 100 or name == "DAQP" else 3)


def _against(name: str, n: int, batch: int, repeats: int) -> Target:
    layer, loop = lpgd.QPLayer(name), LOOPS[name]
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal((batch, n)))
    seconds: list[tuple[float, float, float]] = []
    difference = 0.0
    for repeat in range(repeats + 4):  # the first calls are there to learn that no matrix comes back
        data = draw_qps(n, batch, repeat)
        arrays, leaves = [value.numpy() for value in data], [value.clone().requires_grad_() for value in data]
        started = time.perf_counter()
        points = loop(*arrays)
        looped = time.perf_counter()
        P, q, A, b, G, h = leaves
        output = layer(P, q, A=A, b=b, G=G, h=h)
        forward = time.perf_counter()
        loss = (weights * output.x).sum()
        before = time.perf_counter()
        loss.backward()
        seconds.append((looped - started, forward - looped, time.perf_counter() - before))
        difference = max(difference, float(np.abs(output.x.detach().numpy() - points).max()))
    timed = seconds[4:]
    forward_ratio = statistics.median(ours / theirs for theirs, ours, _ in timed)
    backward_ratio = statistics.median(ours / theirs for theirs, _, ours in timed)
    loop_seconds = statistics.median(theirs for theirs, _, _ in timed)
    note = f"loop {1e3 * loop_seconds:.2f} ms, backward {backward_ratio:.2f} of it, solutions within {difference:.0e}"
    title = f"new matrices each step: layer / bare loop, {name}, n {n}, batch {batch}, forward"
    bound, stretch = TARGETS.get((name, n), (None, None))
    return Target(title, bound, stretch, forward_ratio, smaller=True, note=note)
