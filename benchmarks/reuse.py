"""What re-use is worth: warm perturbed solves, the layer against bare loops over a binding, and set-ups counted."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import lpgd
from lpgd.cones.product import Cones
from lpgd.execution.tasks import core_count, split
from lpgd.execution.threads import bounded_blas

from .dense_qp import draw_qps
from .harness import Case, Settings, compare
from .new_matrices import against_bare_loops
from .ours import layer_side, solver_names
from .results import Curve, Result, Target

__all__ = ["run"]

STEPS = 100
SLOW_SOLVE = 1e-3


def shared_qp(n: int, batch: int) -> tuple[tuple[Tensor, ...], Callable[[int], tuple[Tensor, ...]]]:
    """One P, A, b, G, h for the batch, and linear costs by seed."""
    P, _, A, b, G, h = (value[0] for value in draw_qps(n, 1, 0))

    def draw(seed: int) -> tuple[Tensor, ...]:
        return (torch.from_numpy(np.random.default_rng(10_000 + seed).standard_normal((batch, n))),)

    return (P, A, b, G, h), draw


def shared_lp(n: int, batch: int) -> tuple[tuple[Tensor, ...], Callable[[int], tuple[Tensor, ...]]]:
    """One dense A and b for the batch, x in [0, 1]ⁿ, and costs by seed."""
    generator = np.random.default_rng(0)
    A = torch.from_numpy(generator.standard_normal((n // 4, n)))
    b = A @ torch.from_numpy(generator.uniform(0.2, 0.8, n))

    def draw(seed: int) -> tuple[Tensor, ...]:
        return (torch.from_numpy(np.random.default_rng(10_000 + seed).standard_normal((batch, n))),)

    return (A, b, torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)), draw


def _case(name: str, title: str, batch: int, n: int, draw: Callable[[int], tuple[Tensor, ...]]) -> Case:
    target = torch.from_numpy(np.random.default_rng(1).uniform(size=(batch, n)))

    def judge(data: Sequence[Tensor], points: Tensor, elements: Sequence[int]) -> tuple[Any, float]:
        # The layer has checked the residuals; accuracy is compared elsewhere.
        return np.zeros(len(elements)), 0.0

    return Case("reuse", name, title, batch, draw, lambda x: (x - target).square().sum(), judge, None, False, n)


def backward_ratios(settings: Settings) -> Iterator[Result | Target]:
    """LPGD's backward pass re-solves twice, from its forward's states: it should cost less than the forward pass."""
    batch = 8 if settings.quick else 64
    n = 20 if settings.quick else 50
    (P, A, b, G, h), draw = shared_qp(n, batch)
    sides = [
        layer_side(
            lpgd.QPLayer(name, gradient=lpgd.LPGD(tau=tau)),
            "LPGD",
            lambda d: ((P, *d), {"A": A, "b": b, "G": G, "h": h}),
            True,
        )
        for name in solver_names(("DAQP", "INTERIOR", "MOREAU", "SCS", "PROXQP", "OSQP"))
        for tau in (1e-4,)
    ]
    yield from _backward(
        _case("backward_qp", f"LPGD, dense QP n {n}, shared matrices", batch, n, draw), sides, settings
    )
    n = 60 if settings.quick else 240
    (A_lp, b_lp, lower, upper), draw = shared_lp(n, batch)
    sides = [
        layer_side(
            lpgd.LPLayer(name, gradient=lpgd.LPGD(tau=1e-2)),
            "LPGD",
            lambda d: (tuple(d), {"A": A_lp, "b": b_lp, "lb": lower, "ub": upper}),
            True,
        )
        for name in solver_names(("HIGHS", "SCS"))
    ]
    case = _case("backward_lp", f"LPGD, LP n {n}, shared matrix", batch, n, draw)
    yield from _backward(case, sides, settings)


def _backward(case: Case, sides: list[Any], settings: Settings) -> Iterator[Result | Target]:
    if not sides:
        return
    result = compare(case, sides, settings)
    yield result
    found = {
        entry.mode: statistics.median(entry.timing.backward) / statistics.median(entry.timing.forward)
        for entry in result.entries
        if entry.usable
    }
    if found:
        best = min(found, key=lambda mode: found[mode])
        note = "; ".join(f"{mode} {value:.2f}" for mode, value in found.items())
        title = f"{case.title}, batch {case.batch}: backward / forward, warm"
        yield Target(title, 0.3, 0.1, found[best], smaller=True, note=note)


@dataclass(frozen=True)
class Bare:
    """A loop over a binding: ``make`` sets a solver up, ``solve`` solves for one cost, cold."""

    name: str
    make: Callable[[], Any]
    solve: Callable[[Any, Any], Any]


def run_bare(bare: Bare, costs: Any, executor: ThreadPoolExecutor, kept: threading.local) -> np.ndarray:
    """Solutions for all costs: chunks over the executor, one solver for each thread, kept from call to call."""

    def chunk(indices: range) -> list[Any]:
        with bounded_blas():
            if not hasattr(kept, "solver"):
                kept.solver = bare.make()
            return [bare.solve(kept.solver, costs[index]) for index in indices]

    futures = [executor.submit(chunk, indices) for indices in split(len(costs), executor)]
    return np.array([x for future in futures for x in future.result()])


def bare_clarabel(P: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Bare:
    import clarabel

    rows, right = torch.cat([A, G]).numpy(), torch.cat([b, h]).numpy()
    cones = [clarabel.ZeroConeT(len(b)), clarabel.NonnegativeConeT(len(h))]
    options = lpgd.Clarabel()

    def make() -> Any:
        settings = clarabel.DefaultSettings()
        settings.verbose, settings.max_threads, settings.presolve_enable = False, options.max_threads, False
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = options.tolerance
        settings.equilibrate_enable = options.equilibrate
        settings.static_regularization_constant = options.regularization
        settings.direct_solve_method = options.method_for(Cones())
        return clarabel.DefaultSolver(
            sp.triu(sp.csc_matrix(P.numpy()), format="csc"),
            np.zeros(len(P)),
            sp.csc_matrix(rows),
            right,
            cones,
            settings,
        )

    def solve(solver: Any, q: Any) -> Any:
        solver.update(q=q)
        return solver.solve().x

    return Bare("CLARABEL", make, solve)


def bare_daqp(P: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Bare:
    import daqp

    rows = torch.cat([A, G]).numpy()
    upper = torch.cat([b, h]).numpy()
    lower = np.concatenate([b.numpy(), np.full(len(h), -1e30)])
    sense = np.array([5] * len(b) + [0] * len(h), dtype=np.int32)

    def make() -> Any:
        model = daqp.Model()
        model.setup(P.numpy(), np.zeros(len(P)), rows, upper, lower, sense.copy())
        return model

    def solve(model: Any, q: Any) -> Any:
        model.update(f=q, sense=sense.copy())
        return model.solve()[0]

    return Bare("DAQP", make, solve)


def bare_highs(A: Tensor, b: Tensor, lower: Tensor, upper: Tensor) -> Bare:
    import highspy

    rows, n = sp.csc_matrix(A.numpy()), A.shape[1]
    columns = np.arange(n, dtype=np.int32)

    def make() -> Any:
        solver = highspy.Highs()
        for name, value in (("output_flag", False), ("solver", "simplex"), ("presolve", "off"), ("parallel", "off")):
            solver.setOptionValue(name, value)
        for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
            solver.setOptionValue(name, lpgd.HiGHS().tolerance)
        solver.passModel(
            n, len(b), rows.nnz, 1, 1, 0.0, np.zeros(n), lower.numpy(), upper.numpy(), b.numpy(), b.numpy(),
            rows.indptr, rows.indices, rows.data, np.zeros(n, np.int32),
        )  # fmt: skip
        return solver

    def solve(solver: Any, c: Any) -> Any:
        solver.changeColsCost(n, columns, c)
        solver.clearSolver()
        solver.run()
        return np.array(solver.getSolution().col_value)

    return Bare("HIGHS", make, solve)


def against_bare(settings: Settings) -> Iterator[Target]:
    """The layer's forward pass, gradients asked for, in turn with the bare loop; both keep what they have set up."""
    batch, repeats = (8, 3) if settings.quick else (64, 15)
    for name, make, n in (("CLARABEL", bare_clarabel, 100), ("DAQP", bare_daqp, 50)):
        if solver_names([name]):
            (P, A, b, G, h), draw = shared_qp(n, batch)
            with ThreadPoolExecutor(core_count()) as executor:
                qp_layer = lpgd.QPLayer(name, executor=executor)
                call = partial(qp_layer, P, A=A, b=b, G=G, h=h)
                yield _against_bare(name, n, draw, make(P, A, b, G, h), call, executor, repeats)
    if solver_names(["HIGHS"]):
        (A, b, lower, upper), draw = shared_lp(240, batch)
        with ThreadPoolExecutor(core_count()) as executor:
            lp_layer = lpgd.LPLayer("HIGHS", gradient=lpgd.LPGD(tau=0.1), executor=executor)
            call = partial(lp_layer, A=A, b=b, lb=lower, ub=upper)
            yield _against_bare("HIGHS", 240, draw, bare_highs(A, b, lower, upper), call, executor, repeats)


def _against_bare(
    name: str,
    n: int,
    draw: Callable[[int], tuple[Tensor, ...]],
    bare: Bare,
    layer: Callable[[Tensor], Any],
    executor: ThreadPoolExecutor,
    repeats: int,
) -> Target:
    seconds: dict[str, list[float]] = {"layer": [], "bare": []}
    difference, kept, solve = 0.0, threading.local(), 0.0
    for repeat in range(repeats + 1):  # the first one sets up
        (costs,) = draw(repeat)
        started = time.perf_counter()
        points = run_bare(bare, costs.numpy(), executor, kept)
        middle = time.perf_counter()
        output = layer(costs.requires_grad_())
        finished = time.perf_counter()
        difference = max(difference, float(np.abs(output[0].detach().numpy() - points).max()))
        solve = float(output.info.solution.solve_seconds.mean())
        if repeat:
            seconds["bare"].append(middle - started)
            seconds["layer"].append(finished - middle)
    ours, theirs = (statistics.median(seconds[side]) for side in ("layer", "bare"))
    extra = 1e6 * (ours - theirs) / len(costs)
    note = f"layer {ours:.4f} s, loop {theirs:.4f} s, a solve {1e3 * solve:.2f} ms, solutions within {difference:.0e}"
    title = f"layer against a bare loop, {name}, n {n}, batch {len(costs)}"
    if solve >= SLOW_SOLVE:
        return Target(f"{title}: ratio", 1.15, 1.05, ours / theirs, smaller=True, note=note)
    return Target(f"{title}: µs an element more", 50.0, 20.0, extra, smaller=True, note=note)


def setups(settings: Settings) -> Iterator[Target]:
    """Set-ups of one LP layer whose parameters are in the cost only, over a training run."""
    n, batch = 60, 16
    (A, b, lower, upper), draw = shared_lp(n, batch)
    for base in (lpgd.Clarabel, lpgd.SCS, *(getattr(lpgd, name) for name in ("HiGHS",) if hasattr(lpgd, name))):
        lock, counted = threading.Lock(), []

        @dataclass(frozen=True)
        class Counting(base):
            name: ClassVar[str] = base.name

            def prepare(self, form: Any, lock: Any = lock, counted: list[int] = counted) -> Any:
                with lock:
                    counted.append(1)
                return super().prepare(form)

        layer = lpgd.LPLayer(Counting(), gradient=lpgd.LPGD(tau=0.1))
        (c,) = draw(0)
        cost = torch.nn.Parameter(c.clone())
        optimiser, target = torch.optim.SGD([cost], lr=0.05), torch.full_like(c, 0.5)
        for _ in range(STEPS):
            optimiser.zero_grad()
            (layer(cost, A=A, b=b, lb=lower, ub=upper).x - target).square().sum().backward()
            optimiser.step()
        title = f"set-ups over {STEPS} training steps of an LP, {base.name}, parameters only in the cost"
        yield Target(title, core_count(), None, len(counted), smaller=True, note=f"{core_count()} threads")


def run(settings: Settings) -> Iterator[Result | Target | Curve]:
    yield from backward_ratios(settings)
    yield from against_bare(settings)
    yield from against_bare_loops(settings)
    yield from setups(settings)
