"""The derivatives of a batch of conic programs while they are found, by one way after another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lpgd.arrays import FloatArray
from lpgd.gradients.implicit.findings import Findings
from lpgd.gradients.implicit.located import Located
from lpgd.problems.conic.structure import ConicPoint

__all__ = ["Answers"]


@dataclass(eq=False)
class Answers:
    """The responses ``(dx, dy, dz)`` of E elements to their tilts, in units of order 1, as far as they are known.

    Attributes:
        located: the points and their tilts.
        change: (E, ·) each; zero where there is no answer yet.
        open: (E,) elements that have none.
        findings: what there is to say of each.
    """

    located: Located
    change: ConicPoint
    open: Tensor
    findings: Findings

    @classmethod
    def none_yet(cls, located: Located, *, with_rho: bool) -> Answers:
        """No element has an answer."""
        problem, point = located.problem, located.point
        findings = Findings(problem.batch_size, with_rho, problem.structure, point.x)
        nothing = ConicPoint(*(torch.zeros_like(tensor) for tensor in point))
        return cls(located, nothing, torch.ones_like(located.weak), findings)

    @property
    def left(self) -> Tensor:
        """(E,) elements without an answer that are not at a kink, as ways for whole batches need."""
        return self.open & ~self.located.weak

    def take(self, elements: Tensor, found: ConicPoint, exact: Tensor, doubt: FloatArray | None = None) -> None:
        """Those answers to k elements that are exact, and their doubt.

        Args:
            elements: (k,) which ones.
            found: (k, ·) each.
            exact: (k,) which of the answers count.
            doubt: (k,) the share of each that the point's error may change; None is no more than rounding.
        """
        solved = elements[exact]
        for whole, values in zip(self.change, found, strict=True):
            whole[solved] = values[exact]
        self.open[solved] = False
        if doubt is not None:
            self.findings.doubt[solved.numpy()] = doubt[exact.numpy()]
