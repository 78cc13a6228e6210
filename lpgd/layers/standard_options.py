"""The options of the field's standard layer (cvxpylayers with diffcp), in this library's terms."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from lpgd.execution.tasks import SerialExecutor
from lpgd.gradients import LPGD, GradientMethod, ImplicitKKT
from lpgd.gradients.sides import Envelope

__all__ = ["StandardOptions"]

_EXACT_MODES = ("dense", "lsqr", "lsmr")
_ENVELOPES: dict[str, Envelope] = {"lpgd": "average", "lpgd_right": "lower", "lpgd_left": "upper"}


@dataclass(frozen=True)
class StandardOptions:
    """``solver_args`` taken apart.

    Attributes:
        solver: name in ``solve_method``, or None.
        gradient: from ``mode`` and ``derivative_kwargs``, or None where the mode is not named.
        executor: a serial one where ``n_jobs_forward`` or ``n_jobs_backward`` is 1, else None.
        options: everything else, for the solver.
    """

    solver: str | None = None
    gradient: GradientMethod | None = None
    executor: Executor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, solver_args: Mapping[str, Any] | None) -> StandardOptions:
        """Take the standard layer's own names out of ``solver_args``.

        Raises:
            ValueError: an unknown ``mode``.
            TypeError: ``derivative_kwargs`` without a mode, for one that takes none, or of an unknown name.
        """
        options = dict(solver_args or {})
        solver = options.pop("solve_method", None)
        mode = options.pop("mode", None)
        derivative = dict(options.pop("derivative_kwargs", None) or {})
        jobs = [options.pop(name, None) for name in ("n_jobs_forward", "n_jobs_backward")]
        gradient = _gradient(mode, derivative) if mode is not None or derivative else None
        return cls(solver, gradient, SerialExecutor() if 1 in jobs else None, options)


def _gradient(mode: str | None, derivative: dict[str, Any]) -> GradientMethod:
    if mode is not None and mode in _ENVELOPES:
        unknown = sorted(set(derivative) - {"tau", "rho"})
        if unknown:
            raise TypeError(f"derivative_kwargs has {', '.join(unknown)}; mode {mode!r} takes tau and rho.")
        return LPGD(derivative.get("tau"), derivative.get("rho", 0.0), _ENVELOPES[mode])
    if mode is None or mode in _EXACT_MODES:
        if derivative:
            raise TypeError(f"derivative_kwargs is for the modes {', '.join(_ENVELOPES)}, not for {mode!r}.")
        return ImplicitKKT()
    raise ValueError(f"mode is {mode!r}; the modes are {', '.join((*_EXACT_MODES, *_ENVELOPES))}.")
