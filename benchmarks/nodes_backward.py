"""Each node's own backward pass against autograd through iterations and against the generic implicit gradient."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lpgd.gradients import ImplicitKKT
from lpgd.layers.node import NodeLayer

from .harness import Settings, closeness
from .memory import growth, measuring_process
from .node_table import TABLE, Row
from .results import Curve, Target

__all__ = ["Measured", "measure", "run"]

STRUCTURED, GENERIC, UNROLLED = "lpgd, structured", "lpgd, generic implicit", "torch, autograd through the solver"
FIGURES = "nodes_backward", "nodes_memory"
SECONDS, MOST = 0.3, 15
"""Short passes are repeated for so many seconds, and so often at most."""


@dataclass
class Measured:
    """One side at one size.

    Attributes:
        backward: seconds of backward passes.
        y, gradients: of the last pass, while it is being compared.
        memory: MiB at the peak of a forward and a backward pass.
        solution_error: largest difference from the structured side, relative to the largest entry and to 1.
        gradient_error: norm of the difference from the structured side, relative.
        error: what it raised.
    """

    backward: list[float] = field(default_factory=list)
    y: Tensor | None = None
    gradients: Sequence[Tensor] = ()
    memory: float | None = None
    solution_error: float = 0.0
    gradient_error: float = 0.0
    error: str | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.backward)


def sides(row: Row, size: int) -> dict[str, Callable[[Sequence[Tensor]], Tensor]]:
    structured, generic = NodeLayer(row.node), NodeLayer(row.node, ImplicitKKT())
    found = {STRUCTURED: lambda data: structured(*data), UNROLLED: row.unrolled}
    return {**found, GENERIC: lambda data: generic(*data)} if size <= row.generic else found


def loss(row: Row, y: Tensor) -> Tensor:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=y.dtype)
    return (weight * (y.square() if row.signs else y)).sum()


def both_passes(row: Row, side: Callable[[Sequence[Tensor]], Tensor], data: Sequence[Tensor], into: Measured) -> None:
    inputs = [value.detach().requires_grad_() for value in data]
    y = side(inputs)
    value = loss(row, y)
    started = time.perf_counter()
    gradients = torch.autograd.grad(value, inputs)
    into.backward.append(time.perf_counter() - started)
    into.y, into.gradients = y.detach(), gradients


def measure(row: Row, size: int, repeats: int) -> dict[str, Measured]:
    """All sides in turn, on other data with each repeat; a first round warms up."""
    chosen = sides(row, size)
    found = {name: Measured() for name in chosen}
    rounds, started = 0, time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the generic gradient warns at points that are not regular
        while rounds <= repeats or (repeats > 1 and rounds <= MOST and time.perf_counter() - started < SECONDS):
            data = row.draw(size, rounds)
            for name, one in found.items():
                if one.error is None:
                    try:
                        both_passes(row, chosen[name], data, one)
                    except Exception as error:  # whatever a side raises, the others go on and the table says so
                        one.error = f"{type(error).__name__}: {error}"
                if not rounds:
                    one.backward.clear()
            rounds += 1
    exact = found[STRUCTURED]
    for one in found.values():
        if one.error is None and exact.error is None:
            assert exact.y is not None
            assert one.y is not None
            reference, value = (part.square() if row.signs else part for part in (exact.y, one.y))
            one.solution_error = closeness(value, reference)
            mine, right = (torch.cat([part.ravel() for part in row.comparable(it.gradients)]) for it in (one, exact))
            one.gradient_error = float((mine - right).norm() / right.norm())
    for one in found.values():
        one.y, one.gradients = None, ()
    return found


def memory(place: int, size: int, name: str) -> float | None:
    """MiB of both passes of one side; called in a process of its own, which finds the row by its place."""
    row = TABLE[place]
    side, data = sides(row, size)[name], row.draw(size, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return growth(lambda: both_passes(row, side, data, Measured()))


def note(row: Row, size: int, structured: Measured, other: Measured, what: str) -> str:
    if structured.error is not None or other.error is not None:
        return f"{row.size} {size}: {structured.error or other.error}"
    text = (
        f"{row.size} {size}, batch {row.batch}: {1e3 * structured.seconds:.2f} ms against {what} "
        f"{1e3 * other.seconds:.2f} ms; its gradient differs by {other.gradient_error:.0e}"
    )
    if other.solution_error:
        text += f", its solution by {other.solution_error:.0e}"
    if structured.memory is not None and other.memory is not None:
        text += f"; both passes take {structured.memory:.1f} MiB against {other.memory:.1f} MiB"
    return text


def one_row(place: int, settings: Settings, ask: Callable[..., float | None]) -> Iterator[Target | Curve]:
    """All that is measured of one node, whose memory the other process looks at."""
    row = TABLE[place]
    times = Curve(f"backward {row.name}", f"{row.name} (batch {row.batch})", row.size, "seconds", figure=FIGURES[0])
    peaks = Curve(f"memory {row.name}", f"{row.name} (batch {row.batch})", row.size, "MiB", figure=FIGURES[1])
    table: dict[int, dict[str, Measured]] = {}
    for size in row.sizes[:1] if settings.quick else row.sizes:
        table[size] = measure(row, size, settings.repeats)
        for name, measured in table[size].items():
            if measured.error is None:
                measured.memory = ask(memory, place, size, name)
                times.add(name, size, measured.seconds)
                peaks.add(name, size, measured.memory)
    autograd = "unrolled" if row.iterated else "autograd of the formula"
    for name, against, what in ((UNROLLED, autograd, row.how), (GENERIC, "generic implicit", "generic implicit")):
        size = max(size for size, found in table.items() if name in found)
        ours, other = table[size][STRUCTURED], table[size][name]
        title = f"{row.name}, backward pass: {against} / structured"
        wanted = 1.0 if row.iterated or name == GENERIC else None
        reached = None if ours.error or other.error else other.seconds / ours.seconds
        yield Target(title, wanted, None, reached, note=note(row, size, ours, other, what))
    yield from (times, peaks)


def run(settings: Settings) -> Iterator[Target | Curve]:
    with measuring_process() as ask:
        for place in range(len(TABLE)):
            yield from one_row(place, settings, ask)
