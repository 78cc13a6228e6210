"""How a comparison runs: sides take turns on the same data, and each is judged against exact solutions."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lpgd.execution.workspaces import WorkspaceCache, workspaces

from .results import Accuracy, Entry, Result, Timing

__all__ = ["Case", "Settings", "Side", "closeness", "compare", "installed", "peak_memory", "time_limit"]

AGREEMENT = 1e-3
"""An objective within ε leaves about √ε in a solution: more than this, relative to its size, is disagreement."""
GRADIENT_AGREEMENT = 0.1
"""An exact gradient further off, relatively, is a wrong one: weakly active constraints leave a few percent."""
EXACT_ELEMENTS = 4
"""Elements that are solved exactly for the accuracy of each side, and whose data the referee moves."""
DIRECTIONS = 3
LIMIT, SLOW_LIMIT = 60.0, 900.0
"""Seconds after which a run of a side is given up."""


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        quick: small batches, one repeat, and no side that is slow.
        repeats: timed runs of each side, after one that warms up.
        out: the folder of the results.
        maros_meszaros: the file that ``extract_maros_meszaros.py`` writes.
    """

    quick: bool = False
    repeats: int = 3
    out: Path = Path("runs/bench")
    maros_meszaros: Path = Path("runs/maros_meszaros.npz")


class Side(NamedTuple):
    """One library in one mode.

    Attributes:
        library: ``"lpgd"`` or the peer's name.
        mode: solver and gradient, for people.
        kind: ``"exact"``, ``"lpgd"`` or ``"approximate"``: gradients are compared within a kind, the exact ones also
            with finite differences.
        call: the data to the (B, ...) solution, and anything for ``describe``; None if ``missing`` says why.
        describe: after the backward pass, what ``call`` returned to where the time went.
        slow: runs once, without a warm-up, in the last repeat.
        missing: why there is nothing to call.
    """

    library: str
    mode: str
    kind: str
    call: Callable[[Sequence[Tensor]], tuple[Tensor, Any]] | None
    describe: Callable[[Any], dict[str, Any]] | None = None
    slow: bool = False
    missing: str | None = None


@dataclass(frozen=True, eq=False)
class Case:
    """A problem with data.

    Attributes:
        comparison, name, title, batch: for the report.
        draw: a seed to float64 data, one tensor each.  Each repeat takes another seed, as each training step has
            other values.
        loss: of the (B, ...) solution; a sum over the batch.
        judge: data, solutions and element indices to an objective for each and the largest violation of a constraint.
        exactly: data and element indices to exact solutions, by a method that neither side uses; None if the judge's
            word is enough.
        regular: the solution is unique and differentiable: solutions are compared entry by entry, and exact gradients
            with finite differences.  Otherwise objectives and violations are compared.
        unknowns: the number of variables, for the plots.
        step: of the central differences, as small as the exact solutions allow.
        extra: ``symmetric``: for each datum, whether it is a symmetric matrix and moves as one.
    """

    comparison: str
    name: str
    title: str
    batch: int
    draw: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[[Tensor], Tensor]
    judge: Callable[[Sequence[Tensor], Tensor, Sequence[int]], tuple[NDArray[np.float64], float]]
    exactly: Callable[[Sequence[Tensor], Sequence[int]], Tensor] | None = None
    regular: bool = True
    unknowns: int = 0
    step: float = 1e-4
    extra: dict[str, Any] = field(default_factory=dict)


class Run(NamedTuple):
    """One forward and one backward pass."""

    forward: float
    backward: float
    value: Tensor
    gradients: list[Tensor]
    details: dict[str, Any]


def installed(module: str) -> bool:
    """Whether a peer can be imported."""
    return importlib.util.find_spec(module) is not None


class _Workspaces:
    """What one side of ours has prepared: no side finds what another side prepared for the same data."""

    def __init__(self) -> None:
        self.kept = vars(WorkspaceCache(workspaces.capacity)).copy()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        others = vars(workspaces).copy()
        vars(workspaces).update(self.kept)
        try:
            yield
        finally:
            self.kept = vars(workspaces).copy()
            vars(workspaces).update(others)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, where the system has the signal: qpth does not end on every problem."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Yields a list that receives the growth in MiB of resident memory at its peak; it stays empty where not Linux."""
    growth: list[float] = []
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
        before = _status("VmRSS")
    except OSError:
        before = None
    yield growth
    if before is not None:
        growth.append((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    match = re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(match[1])


def run_once(side: Side, case: Case, data: Sequence[Tensor]) -> Run:
    """Time one forward and one backward pass."""
    if side.call is None:
        raise RuntimeError(side.missing)
    inputs = [value.detach().requires_grad_() for value in data]
    gc.collect()
    started = time.perf_counter()
    value, record = side.call(inputs)
    solved = time.perf_counter()
    loss = case.loss(value)
    before_backward = time.perf_counter()
    loss.backward()
    finished = time.perf_counter()
    gradients = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in inputs]
    details = side.describe(record) if side.describe else {}
    return Run(solved - started, finished - before_backward, value.detach(), gradients, details)


@contextmanager
def _small_heap() -> Iterator[None]:
    """The collection before each run looks at new objects only: all of them, modules included, take 0.15 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_small_heap()
def compare(case: Case, sides: Sequence[Side], settings: Settings, first_seed: int = 0) -> Result:
    """Run every side in turn, ``settings.repeats`` times after a warm-up, and judge the last run of each."""
    entries = [Entry(side.library, side.mode, side.kind, error=side.missing) for side in sides]
    runs: dict[int, Run] = {}
    prepared = [_Workspaces() for _ in sides]
    order = list(range(len(sides)))
    for repeat in range(settings.repeats + 1):  # the first one warms up
        data, last = case.draw(first_seed + repeat), repeat == settings.repeats
        for index in order if repeat % 2 else reversed(order):
            side, entry = sides[index], entries[index]
            if entry.error is not None or (side.slow and (settings.quick or not last)):
                if side.slow and settings.quick and entry.error is None:
                    entry.error = "slow: not run with --quick"
                continue
            try:
                with (
                    warnings.catch_warnings(),
                    time_limit(SLOW_LIMIT if side.slow else LIMIT),
                    contextlib.redirect_stdout(io.StringIO()),  # peers that print
                    prepared[index].in_use(),
                    peak_memory() as growth,
                ):
                    warnings.simplefilter("ignore")  # degenerate cases warn; the entry's details say what was used
                    runs[index] = run_once(side, case, data)
            except Exception as error:  # whatever a side raises, the comparison goes on and says so
                runs.pop(index, None)
                entry.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            entry.memory = max([entry.memory or 0.0, *growth]) if growth else entry.memory
            if repeat or settings.repeats == 0:
                entry.timing.add(runs[index].forward, runs[index].backward)
    for index, entry in enumerate(entries):
        if index not in runs and entry.timing.count:
            entry.timing = Timing()
    result = Result(case.comparison, case.name, case.title, case.batch, entries, unknowns=case.unknowns)
    _judge(case, case.draw(first_seed + settings.repeats), result, runs)
    return result


def closeness(value: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest entry (and to 1)."""
    return float((value - reference).abs().max() / (1.0 + reference.abs().max()))


def _judge(case: Case, data: Sequence[Tensor], result: Result, runs: dict[int, Run]) -> None:
    """Accuracy of each side against exact solutions, and agreement of the sides with one another."""
    if not runs:
        return
    elements = range(min(EXACT_ELEMENTS, case.batch))
    exact = case.exactly(data, elements) if case.exactly is not None else None
    best = case.judge(data, exact, elements)[0] if exact is not None else None
    referee = _referee(case, data, elements) if case.regular and case.exactly is not None else None
    for index, run in runs.items():
        entry, part = result.entries[index], run.value[list(elements)]
        objectives, violation = case.judge(data, part, elements)
        accuracy = Accuracy(violation=violation)
        if best is not None:
            accuracy.objective = float((np.abs(objectives - best) / (1.0 + np.abs(best))).max())
        if exact is not None and case.regular:
            accuracy.solution = closeness(part, exact)
        if referee is not None:
            directions, reference, uncertainty = referee
            products = [
                sum(float((g * d).sum()) for g, d in zip(run.gradients, direction, strict=True))
                for direction in directions
            ]
            accuracy.gradient = float(np.abs(np.array(products) - reference).max() / np.abs(reference).max())
            accuracy.gradient_floor = uncertainty
        entry.accuracy, entry.details = accuracy, run.details
        scale = 1.0 + float(part.abs().max())
        for name, value in (
            ("violates a constraint by", violation / scale),
            ("is not optimal: objective off by", accuracy.objective),
            ("is off by", accuracy.solution),
        ):
            if value is not None and not value <= AGREEMENT:
                entry.disagrees = f"its solution {name} {value:.1e}, relative"
        bound = GRADIENT_AGREEMENT + 3 * (accuracy.gradient_floor or 0.0)
        if entry.kind == "exact" and accuracy.gradient is not None and not accuracy.gradient <= bound:
            entry.disagrees = f"its gradient is off by {accuracy.gradient:.1e}, relative, from finite differences"
    _cosines(result, runs)


def _cosines(result: Result, runs: dict[int, Run]) -> None:
    """The cosine of each gradient with that of the first other library's side of its kind; approximate with exact."""
    flat = {index: torch.cat([gradient.ravel().double() for gradient in run.gradients]) for index, run in runs.items()}
    for index in runs:
        mine = result.entries[index]
        for other in runs:
            theirs = result.entries[other]
            same = theirs.kind == ("exact" if mine.kind == "approximate" else mine.kind)
            if same and (theirs.library == "lpgd") != (mine.library == "lpgd"):
                norms = float(flat[index].norm() * flat[other].norm())
                mine.accuracy.cosine = float(flat[index] @ flat[other]) / norms if norms else None
                mine.accuracy.cosine_with = theirs.label
                break


def _referee(
    case: Case, data: Sequence[Tensor], elements: Sequence[int]
) -> tuple[list[list[Tensor]], NDArray[np.float64], float]:
    """Random directions of the first elements' data, central differences of the loss of exact solutions, and how far
    those with the whole step are from those with half of it, relatively: a kink within the step, or noise.
    """
    generator = torch.Generator().manual_seed(0)
    moves, differences = [], []
    for _ in range(DIRECTIONS):
        direction = []
        for value, symmetric in zip(data, case.extra.get("symmetric", [False] * len(data)), strict=True):
            move = torch.zeros_like(value)
            drawn = torch.randn((len(elements), *value.shape[1:]), generator=generator, dtype=torch.float64)
            move[: len(elements)] = 0.5 * (drawn + drawn.mT) if symmetric else drawn
            direction.append(move)
        moves.append(direction)
        differences.append([_difference(case, data, direction, elements, step) for step in (case.step, case.step / 2)])
    whole, half = np.array(differences).T
    return moves, half, float(np.abs(whole - half).max() / np.abs(half).max())


def _difference(
    case: Case, data: Sequence[Tensor], direction: Sequence[Tensor], elements: Sequence[int], step: float
) -> float:
    assert case.exactly is not None
    losses = []
    for sign in (1.0, -1.0):
        moved = [value + sign * step * move for value, move in zip(data, direction, strict=True)]
        exact = case.exactly(moved, elements)
        points = exact.new_zeros((case.batch, *exact.shape[1:]))
        points[: len(elements)] = exact
        losses.append(float(case.loss(points)))
    return (losses[0] - losses[1]) / (2 * step)
