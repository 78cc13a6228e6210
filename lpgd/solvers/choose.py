"""Which solvers there are, which of them can take a problem, and which one is chosen where none is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lpgd.problems.structure import ConicStructure
from lpgd.solvers.base import Solver
from lpgd.solvers.clarabel import Clarabel
from lpgd.solvers.daqp import DAQP
from lpgd.solvers.ecos import ECOS
from lpgd.solvers.highs import HiGHS
from lpgd.solvers.interior_point import InteriorPoint
from lpgd.solvers.osqp import OSQP
from lpgd.solvers.piqp import PIQP
from lpgd.solvers.proxqp import ProxQP
from lpgd.solvers.scs import SCS
from lpgd.status import MissingPackageError

__all__ = ["SOLVERS", "available", "choose_solver"]

SOLVERS: tuple[type[Solver], ...] = (Clarabel, SCS, ECOS, InteriorPoint, DAQP, HiGHS, PIQP, OSQP, ProxQP)
"""Every backend, in the order of preference where none is named.

Clarabel comes first: it takes nearly every cone and a quadratic objective, needs no tuning, and its accuracy
is that of an interior-point method, on which gradients depend.  SCS follows for the cones Clarabel lacks.
"""

_DEFAULT_NAMES = {"DIFFCP"}  # the standard layer's own default, which names no solver in particular


def available(structure: ConicStructure | None = None) -> tuple[str, ...]:
    """Names of the installed solvers; with a structure, of those that can solve such problems."""
    return tuple(
        solver.name
        for solver in SOLVERS
        if solver.is_installed() and (structure is None or solver.unsupported(structure) is None)
    )


def choose_solver(
    structure: ConicStructure, solver: Solver | str | None = None, options: Mapping[str, Any] | None = None
) -> Solver:
    """The solver to use for problems of a structure.

    Args:
        structure: the problem's patterns and cones.
        solver: a solver, one's name in any case, or None: the first of :data:`SOLVERS` that is installed and
            has every cone of the problem.
        options: changes to its options, by their own names or the standard layer's.

    Raises:
        ValueError: the name is unknown, or the solver cannot take this problem.
        MissingPackageError: its package is not installed; the message has the pip command.
        TypeError: an option is unknown.
    """
    chosen = _by_name(solver) if isinstance(solver, str) else solver
    if chosen is not None and not isinstance(chosen, Solver):
        raise TypeError(f"solver is {chosen!r}; it must be a solver such as lpgd.SCS(), the name of one, or None.")
    if chosen is None:
        fitting = [candidate for candidate in SOLVERS if candidate.unsupported(structure) is None]
        installed = [candidate for candidate in fitting if candidate.is_installed()]
        if not fitting:
            raise ValueError("; ".join(str(candidate.unsupported(structure)) for candidate in SOLVERS) + ".")
        if not installed:
            commands = " or ".join(f"pip install {candidate.pip_name}" for candidate in fitting)
            raise MissingPackageError(f"no installed solver can solve this problem: {commands}")
        # Options of one solver only, such as those the standard layer documents for SCS, choose that solver.
        chosen = next((candidate for candidate in installed if candidate.knows(options or {})), installed[0])()
    chosen = chosen.with_options(options or {})
    reason = chosen.unsupported(structure)
    if reason is not None:
        fitting_names = ", ".join(available(structure)) or "none"
        raise ValueError(f"{reason}; installed solvers that can solve this problem: {fitting_names}.")
    chosen.module()
    return chosen


def _by_name(name: str) -> Solver | None:
    if name.upper() in _DEFAULT_NAMES:
        return None
    for solver in SOLVERS:
        if solver.name == name.upper():
            return solver()
    known = ", ".join(solver.name for solver in SOLVERS)
    raise ValueError(f"{name!r} is not a solver of this library; the solvers are {known}.")
