"""How time and memory grow with the batch and with threads, on dense quadratic programs with n 50."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

import lpgd
from lpgd.execution.tasks import core_count
from lpgd.execution.threads import torch_threads

from .dense_qp import dense_qp_case, our_qp_sides
from .harness import Settings, Side, compare
from .ours import layer_side, solver_names
from .peers import proxsuite_side, qpth_side
from .results import Curve, Result

__all__ = ["run"]

SIZE, QUICK_SIZE = 50, 10
BATCHES, QUICK_BATCHES = (1, 4, 16, 64, 256), (1, 4)
SOLVERS = ("INTERIOR", "DAQP", "MOREAU")


def batches(settings: Settings) -> Iterator[Result | Curve]:
    n = QUICK_SIZE if settings.quick else SIZE
    seconds = Curve(
        "scaling_batch", f"dense QP, n {n}: forward + backward for each element", "batch", "seconds an element"
    )
    memory = Curve("scaling_memory", f"dense QP, n {n}: growth of memory", "batch", "MiB")
    for batch in QUICK_BATCHES if settings.quick else BATCHES:
        sides = [*our_qp_sides(SOLVERS, ()), qpth_side(), proxsuite_side(False), proxsuite_side(True)]
        result = compare(dense_qp_case(n, batch, "scaling"), sides, settings)
        yield result
        for entry in result.entries:
            if entry.usable:
                seconds.add(entry.label, batch, entry.timing.total / batch)
                memory.add(entry.label, batch, entry.memory)
    yield seconds
    yield memory


def threads(settings: Settings) -> Iterator[Result | Curve]:
    """Torch's threads and our executor's workers together; ProxSuite takes half of the cores, whatever is set."""
    n, batch = (QUICK_SIZE, 4) if settings.quick else (SIZE, 64)
    curve = Curve("scaling_threads", f"dense QP, n {n}, batch {batch}: forward + backward", "threads", "seconds")

    def arguments(data: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        return tuple(data[:2]), dict(zip(("A", "b", "G", "h"), data[2:], strict=True))

    counts = sorted({1, *(2**k for k in range(1, 7) if 2**k < core_count()), core_count()})
    for count in counts:
        with torch_threads(count), ThreadPoolExecutor(count) as executor:
            sides: list[Side] = [
                layer_side(lpgd.QPLayer(name, executor=executor), "exact", arguments, chosen=True)
                for name in (*solver_names(SOLVERS), "CLARABEL")
            ]
            result = compare(dense_qp_case(n, batch, "scaling"), [*sides, qpth_side()], settings)
        result.case, result.title = f"threads{count}", f"dense QP, n {n}, threads {count}"
        yield result
        for entry in result.entries:
            if entry.usable:
                curve.add(entry.label, count, entry.timing.total)
    yield curve


def run(settings: Settings) -> Iterator[Result | Curve]:
    yield from batches(settings)
    yield from threads(settings)
