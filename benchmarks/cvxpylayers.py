"""Against cvxpylayers with diffcp.

``python -m benchmarks.cvxpylayers --out DIR [--cases NAMES] [--repeats N] [--quick]``

Both layers get the same problems, data, loss, solver and tolerances; they take turns within each repeat, after one
warm-up each, and every repeat has new parameter values. The exit status is 1 if ours fails or its solutions disagree.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import torch
from cvxpylayers.torch import CvxpyLayer as PeerLayer
from torch import Tensor

import lpgd

from .problems import CASES, Case, Instance
from .report import Row, Timing, environment, write_report

__all__ = ["main"]

# The same numbers for both, by the solver's own names.
TOLERANCES: dict[str, dict[str, float]] = {
    "SCS": {"eps": 1e-6},
    "Clarabel": {"tol_gap_abs": 1e-8, "tol_gap_rel": 1e-8, "tol_feas": 1e-8},
    "ECOS": {"abstol": 1e-8, "reltol": 1e-8, "feastol": 1e-8},
}
AGREEMENT = 1e-3
"""An objective within ε leaves about √ε in a solution: more than this, relative to its size, is disagreement."""
REFEREE = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-12, "tol_gap_rel": 1e-12, "tol_feas": 1e-12}
REFEREE_STEP = 1e-4
REFEREE_DIRECTIONS = 3
REFEREE_ELEMENTS = 4

Layer = Callable[..., Sequence[Tensor]]


class Run(NamedTuple):
    """One forward and one backward pass."""

    forward: float
    backward: float
    value: Tensor
    gradients: list[Tensor]
    output: Any


def run(layer: Layer, instance: Instance, seed: int, **options: Any) -> Run:
    """Time one forward and one backward pass."""
    inputs = [value.requires_grad_() for value in instance.draw(seed)]
    gc.collect()
    started = time.perf_counter()
    output = layer(*inputs, **options)
    solved = time.perf_counter()
    loss = instance.loss(output[0])
    before_backward = time.perf_counter()
    loss.backward()
    finished = time.perf_counter()
    gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in inputs]
    return Run(solved - started, finished - before_backward, output[0].detach(), gradients, output)


def compare(
    case: Case, instance: Instance, mode: tuple[str, str], repeats: int, first_seed: int, skip_slow: bool
) -> Row:
    """One row: both layers in one mode, with the seeds from ``first_seed`` on."""
    solver, kind = mode
    options: dict[str, Any] = {"solve_method": solver, **TOLERANCES[solver]}
    if kind == "lpgd":
        options |= {"mode": "lpgd", "derivative_kwargs": {"tau": case.tau, "rho": case.rho}}
    problem = instance.problem, instance.parameters, [instance.variable]
    # With no mode named, both differentiate exactly: theirs by LSQR, ours by ImplicitKKT.
    ours, peer = lpgd.CvxpyLayer(*problem, solver_args=options), PeerLayer(*problem)
    row = Row(case.name, case.title, solver, kind, Timing(), Timing())
    slow = mode in case.slow
    runs: dict[str, Run] = {}
    for repeat in range(repeats + 1):  # the first one warms up
        last = repeat == repeats
        try:
            runs["ours"] = run(ours, instance, first_seed + repeat)
        except lpgd.SolverError as error:
            row.ours = Timing()
            row.values["disagree"] = f"ours failed, seed {first_seed + repeat}: {error}"
            return row
        if repeat:
            row.ours.add(runs["ours"].forward, runs["ours"].backward)
        if row.peer_error or (slow and not (last and not skip_slow)):
            continue
        try:
            runs["peer"] = run(peer, instance, first_seed + repeat, solver_args=dict(options))
        except Exception as error:  # whatever it raises, the comparison goes on and says so
            runs.pop("peer", None)
            row.peer_error = f"{type(error).__name__}: {error}"
            continue
        if repeat:
            row.peer.add(runs["peer"].forward, runs["peer"].backward)
    _describe_ours(row, runs["ours"])
    row.values |= _agreement(case, instance, first_seed + repeats, runs)
    if kind == "exact" and case.regular:
        row.values |= _referee(instance, first_seed + repeats, runs)
    return row


def default_row(case: Case, instance: Instance, repeats: int, first_seed: int, rows: Sequence[Row]) -> Row:
    """Ours with nothing chosen, in turn with the fastest exact mode of the peer among ``rows``."""
    problem = instance.problem, instance.parameters, [instance.variable]
    ours = lpgd.CvxpyLayer(*problem)
    row = Row(case.name, case.title, f"default ({ours.solver.name})", "exact", Timing(), Timing())
    measured = [other for other in rows if other.kind == "exact" and other.peer.count]
    best = min(measured, key=lambda other: other.peer.total, default=None)
    peer = None
    if best is not None:
        row.peer_mode = best.mode
        if (best.solver, best.kind) in case.slow:
            row.peer = best.peer
        else:
            peer = PeerLayer(*problem)
    for seed in range(first_seed, first_seed + repeats + 1):
        try:
            result = run(ours, instance, seed)
        except lpgd.SolverError as error:
            row.ours = Timing()
            row.values["disagree"] = f"ours failed, seed {seed}: {error}"
            return row
        other = None
        if peer is not None and best is not None:
            other = run(peer, instance, seed, solver_args={"solve_method": best.solver, **TOLERANCES[best.solver]})
        if seed == first_seed:
            continue
        row.ours.add(result.forward, result.backward)
        if other is not None:
            row.peer.add(other.forward, other.backward)
    _describe_ours(row, result)
    row.values |= _agreement(case, instance, first_seed + repeats, {"ours": result})
    if case.regular:
        row.values |= _referee(instance, first_seed + repeats, {"ours": result})
    return row


def _describe_ours(row: Row, result: Run) -> None:
    """Where our time goes: the seconds inside the solver are sums over elements, whatever the number of threads."""
    solution, info = result.output.info.solution, result.output.info.gradients[-1]
    row.values |= {
        "ours_solver_seconds": float(solution.solve_seconds.sum()),
        "ours_setup_seconds": float(solution.setup_seconds.sum()),
        "ours_iterations": float(solution.iterations.mean()),
        "ours_backward_iterations": None if info.iterations is None else float(np.mean(info.iterations)),
        "ours_backward_tolerance": info.tolerance,
        "ours_used": info.counts,
    }


def _agreement(case: Case, instance: Instance, seed: int, runs: Mapping[str, Run]) -> dict[str, Any]:
    """How far apart the two layers are; ``disagree`` is a sentence if the solutions are too far."""
    ours, peer = runs["ours"], runs.get("peer")
    result: dict[str, Any] = {}
    objectives, violation = _objectives(instance, seed, ours.value)
    result["violation"] = violation
    scale = 1.0 + float(ours.value.abs().max())
    if not violation <= AGREEMENT * scale:
        result["disagree"] = f"our solution violates a constraint by {violation:.1e}"
    if peer is None:
        return result
    difference = float((ours.value - peer.value).abs().max())
    reference, _ = _objectives(instance, seed, peer.value)
    gap = float((np.abs(objectives - reference) / (1.0 + np.abs(reference))).max())
    result |= {"solution_difference": difference, "objective_difference": gap}
    if case.regular and not difference <= AGREEMENT * scale:
        result["disagree"] = f"solutions differ by {difference:.1e}"
    if not gap <= AGREEMENT:
        result["disagree"] = f"objectives differ by {gap:.1e}, relative"
    mine, theirs = (torch.cat([gradient.ravel() for gradient in side.gradients]) for side in (ours, peer))
    norms = mine.norm() * theirs.norm()
    result["gradient_cosine"] = float(mine @ theirs / norms) if norms else None
    result["gradient_difference"] = float((mine - theirs).norm() / theirs.norm()) if theirs.norm() else None
    return result


def _assign(instance: Instance, values: Sequence[Tensor], element: int) -> None:
    for parameter, value in zip(instance.parameters, values, strict=True):
        parameter.value = (value[element] if value.ndim > len(parameter.shape) else value).detach().numpy()


def _objectives(instance: Instance, seed: int, points: Tensor) -> tuple[np.ndarray, float]:
    """The objective at each point, and the largest violation of a constraint."""
    values, objectives, violation = instance.draw(seed), [], 0.0
    for element, point in enumerate(points):
        _assign(instance, values, element)
        # A PSD variable takes no value with an eigenvalue of minus a tolerance unless it is told not to look.
        instance.variable.save_value(point.numpy())
        objectives.append(float(instance.problem.objective.value))
        for constraint in instance.problem.constraints:
            violation = max(violation, float(np.max(constraint.violation())))
    return np.array(objectives), violation


def _referee(instance: Instance, seed: int, runs: Mapping[str, Run]) -> dict[str, float]:
    """Relative errors of directional derivatives, against central differences of a third solver's solutions.

    The directions move the first elements only; the largest error is taken relative to the largest derivative.
    """
    values = instance.draw(seed)
    batch = runs["ours"].value.shape[0]
    elements = range(min(REFEREE_ELEMENTS, batch))
    generator = torch.Generator().manual_seed(seed)
    differences, products = [], {name: [] for name in runs}
    for _ in range(REFEREE_DIRECTIONS):
        directions = []
        for value in values:
            direction = torch.zeros_like(value)
            direction[: len(elements)] = torch.randn(
                (len(elements), *value.shape[1:]), generator=generator, dtype=torch.float64
            )
            directions.append(direction)
        losses = []
        for sign in (1.0, -1.0):
            moved = [
                value + sign * REFEREE_STEP * direction for value, direction in zip(values, directions, strict=True)
            ]
            points = runs["ours"].value.clone()
            for element in elements:
                _assign(instance, moved, element)
                instance.problem.solve(**REFEREE)
                points[element] = torch.from_numpy(np.array(instance.variable.value))
            losses.append(float(instance.loss(points)))
        differences.append((losses[0] - losses[1]) / (2 * REFEREE_STEP))
        for name, side in runs.items():
            terms = ((g * d).sum() for g, d in zip(side.gradients, directions, strict=True))
            products[name].append(float(sum(terms)))
    reference = np.array(differences)
    return {
        f"referee_{name}": float(np.abs(np.array(product) - reference).max() / np.abs(reference).max())
        for name, product in products.items()
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cvxpylayers", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of report.md, report.json and ratios.png")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each, after one warm-up (default: 3)")
    parser.add_argument("--quick", action="store_true", help="small batches, one repeat, and no slow run of the peer")
    parser.add_argument("--threads", type=int, help="threads of torch, for both (default: torch's own choice)")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; it must be at least 1.")
    if options.quick:
        options.repeats = 1
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 if ours fails or disagrees somewhere."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    setup = environment()
    print(", ".join(f"{name} {value}" for name, value in setup.items()), flush=True)
    rows: list[Row] = []
    for name in options.cases:
        case = CASES[name]
        instance = case.build(case.batch[options.quick])
        of_case: list[Row] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # degenerate cases warn; the record in the report says what was used
            for place, mode in enumerate(case.modes):
                # No row meets data that an earlier one has prepared a solver for.
                seed = 1000 * place
                of_case.append(compare(case, instance, mode, options.repeats, seed, options.quick))
                print(of_case[-1], flush=True)
            of_case.append(default_row(case, instance, options.repeats, 1000 * len(case.modes), of_case))
            print(of_case[-1], flush=True)
        for row in of_case:
            row.batch = case.batch[options.quick]
        rows += of_case
        write_report(options.out, rows, setup | {"repeats": options.repeats})
    print(f"Report: {options.out / 'report.md'}")
    return int(any("disagree" in row.values for row in rows))


if __name__ == "__main__":
    sys.exit(main())
