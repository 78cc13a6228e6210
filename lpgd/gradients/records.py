"""The record of perturbed solves, and what is warned of: what LPGD says of each element."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import elements_where, flags
from lpgd.gradients.base import GradientInfo, GradientMethod
from lpgd.gradients.perturbed import Perturbed
from lpgd.problems.solution import AnySolution
from lpgd.status import warn

__all__ = ["blank", "record", "tied_elements", "warn_of_jumps"]


def blank(method: GradientMethod, solution: AnySolution) -> GradientInfo:
    """The record before anything is solved."""
    size = solution.batch_size
    no, unknown = torch.zeros(size, dtype=torch.bool), torch.full((size,), torch.nan)
    return GradientInfo.blank(
        method, solution, tau=unknown, unit=unknown.clone(), moved=no, crossed=no.clone(), jumped=no.clone(),
        kinked=no.clone(), unclear=no.clone(), newton=no.long(),
    )  # fmt: skip


def tied_elements(solution: AnySolution, active: list[int]) -> list[int]:
    """The elements whose node has several solutions that are equally good, whatever the step."""
    node = getattr(solution.problem, "node", None)
    if node is None or not active:
        return []
    tied = node.tied(tuple(solution.problem.data))
    marked = [] if tied is None else flags(tied)
    return [element for element in active if marked and marked[element % len(marked)]]


def record(info: GradientInfo, active: list[int], found: Perturbed, tied: list[int]) -> None:
    """Put perturbed solves on record, and warn of those that are not what they should be."""
    places = slice(None) if len(active) == len(info.used) else torch.tensor(active)
    for name in ("tau", "unit", "moved", "crossed", "jumped", "kinked", "newton"):
        whole, values = getattr(info, name), getattr(found, name)
        whole[places] = values.cpu().to(whole.dtype)
    assert info.unclear is not None
    info.unclear[places] = (found.unclear | found.shared_rows).cpu()
    info.tolerance, info.iterations = found.tolerance, np.zeros(len(info.used), dtype=np.int64)
    info.iterations[active] = found.iterations
    method: Any = info.method
    names = {(True, True): "average", (True, False): "lower", (False, True): "upper"}
    if method.envelope == "average" and bool((found.above & found.below).all()):  # as of most
        for element in active:
            info.used[element] = "average"
    else:
        for element, above, below in zip(active, flags(found.above), flags(found.below), strict=True):
            info.used[element] = names.get((above, below), "none")
            if info.used[element] != method.envelope:
                info.fallbacks.append(element)
    one_sided = [element for element in info.fallbacks if info.used[element] != "none"]
    if one_sided:
        warn(
            f"{method}: the perturbed problem of elements {one_sided[:10]} has no solution on a side that was asked "
            "for; their gradients come from the other side. A smaller tau may have both."
        )

    def named(mask: Tensor) -> list[int]:
        if not bool(mask.any()):
            return []
        return [element for element, marked in zip(active, flags(mask), strict=True) if marked]

    if kinked := named(found.kinked & (found.above | found.below)):
        warn(f"{method}: elements {kinked[:10]} {_KINK}")
    for names_of, shared in ((("A", "b"), found.shared_rows), (("lower", "upper"), found.shared_bounds)):
        if unsure := named(found.unclear | shared):
            info.notices |= dict.fromkeys(names_of, f"{method}: elements {unsure[:10]} {_UNCLEAR}")
    if tied:
        warn(f"{method}: the solutions of elements {tied[:10]} {_TIED}")


def warn_of_jumps(info: GradientInfo, active: list[int], found: Perturbed, tied: list[int]) -> None:
    """Name the elements that jumped, but those of which more is known: why solutions are not unique."""
    known = {*tied, *([] if info.doubt is None else elements_where(info.doubt.isposinf()))}
    if jumped := [active[position] for position in elements_where(found.jumped) if active[position] not in known]:
        warn(f"{info.method}: the solutions of elements {jumped[:10]} {_JUMP}")


_KINK = (
    "have no derivative that a step could find: however short it is, an active constraint changes along it (the "
    "solution is at a kink, or too badly scaled for its solver), and their gradients are means of what lies on the "
    "sides of the step. A tau of the order of output.info.gradients[-1].unit gives a smoothed gradient; ImplicitKKT "
    "takes one side."
)
_UNCLEAR = (
    "have multipliers that are not unique, or change abruptly (as where constraints are redundant): the gradient "
    "with respect to single constraints is not well defined there. That of what moves the redundant constraints "
    "together is, and so are those with respect to the objective."
)
_JUMP = (
    "jumped: a small tilt moved them far, and not in proportion to it, to another one of several nearly equal "
    "solutions. Their gradients say nothing of small changes. A smaller tau stays with one solution, unless they are "
    "equal."
)
_TIED = (
    "are not unique: eigenvalues are equal to rounding, and a tilt, however small, chooses among their eigenvectors. "
    "Gradients are right only for losses that depend on their span; ClosedForm leaves out what lies between them."
)
