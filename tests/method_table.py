"""The table of gradient methods: a new one is one row.

Its tests are those of tests/test_gradients.py that take a row: for every regular program of tests/problem_table.py the
gradient of every datum against the exact one, and forward mode against reverse mode.
"""

from __future__ import annotations

from dataclasses import dataclass

from lpgd import LPGD, BlackboxBackprop, Domke, ImplicitKKT
from lpgd.gradients.base import GradientMethod


@dataclass(frozen=True)
class MethodCase:
    """One row.

    Args:
        method: the gradient method, with a step at which it is as good as exact where it has one.
        source: what its record says of elements that it answered.
        error: how far its gradients may be from the exact ones of the same ``rho``, relatively.
        transposed: how far ``<jvp(t), g>`` may be from ``<t, vjp(g)>``, relatively.
    """

    method: GradientMethod
    source: str
    error: float
    transposed: float

    def __repr__(self) -> str:
        return repr(self.method)


# At regular points the average envelope differs from its limit by O(tau²), one-sided ones by O(tau).
METHODS = [
    MethodCase(ImplicitKKT(), "implicit", 1e-12, 1e-8),
    MethodCase(ImplicitKKT(0.5), "implicit", 1e-12, 1e-8),
    MethodCase(LPGD(1e-4), "average", 1e-5, 1e-4),
    MethodCase(LPGD(1e-4, 0.5), "average", 1e-5, 1e-4),
    MethodCase(LPGD(1e-4, envelope="lower"), "lower", 1e-2, 1e-2),
    MethodCase(LPGD(1e-4, 0.5, envelope="upper"), "upper", 1e-2, 1e-2),
    MethodCase(LPGD(1e-4, separate=True), "average", 1e-5, 1e-4),
    MethodCase(Domke(1e-4), "average", 1e-5, 1e-4),
    MethodCase(BlackboxBackprop(1e-4), "lower", 1e-2, 1e-2),
]
