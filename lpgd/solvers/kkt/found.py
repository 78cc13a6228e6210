"""Points of tilted problems, whoever found them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lpgd.problems.conic.structure import ConicPoint

__all__ = ["Found"]


class Found(NamedTuple):
    """Points of K tilted problems, in units of order 1; they mean nothing where they are not ``solved``.

    Attributes:
        point, slack: (K, ·) each.
        error: (K,) the maximum norm of F of :mod:`lpgd.solvers.kkt.refinement`.
        solved: (K,) whether it is the solution, and no other point.
        taken: (K,) systems, or bases, that it took.
    """

    point: ConicPoint
    slack: Tensor
    error: Tensor
    solved: Tensor
    taken: Tensor

    def replaced(self, places: Tensor, others: Found) -> Found:
        """With other ones in these places."""

        def put(whole: Tensor, values: Tensor) -> Tensor:
            whole = whole.clone()
            whole[places] = values
            return whole

        point = ConicPoint(*(put(*pair) for pair in zip(self.point, others.point, strict=True)))
        return Found(point, *(put(*pair) for pair in zip(self[1:], others[1:], strict=True)))
