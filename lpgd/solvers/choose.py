"""Which solvers there are, which of them can take a problem, and which one is chosen where none is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lpgd.execution import core_count
from lpgd.problems.structure import ConicStructure
from lpgd.solvers.base import Solver, rescue_by
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

__all__ = ["SOLVERS", "Choice", "Situation", "available", "choose_solver", "preference"]

rescue_by((Clarabel, InteriorPoint, DAQP, PIQP, HiGHS, ProxQP, OSQP, ECOS, SCS))
"""Clarabel first, which has nearly every cone and hands over certificates."""

SOLVERS: tuple[type[Solver], ...] = (Clarabel, SCS, InteriorPoint, DAQP, HiGHS, PIQP, OSQP, ProxQP, ECOS)
"""Every backend; where nothing of the situation is known, the first that can take a problem is chosen.

ECOS, under the GPLv3 and without a release since 2024, comes last: every problem of its has another solver.
"""


@dataclass(frozen=True)
class Situation:
    """What a choice depends on besides the problem's structure.

    Args:
        device: type of the device that the data are on.
        augmented: whether the gradient method solves the problem with a quadratic term added (``rho > 0``); None where
            that is not known.
    """

    device: str = "cpu"
    augmented: bool | None = None


def preference(structure: ConicStructure, situation: Situation | None = None) -> tuple[type[Solver], ...]:
    """The one rule by which a solver is chosen where none is named: every solver, best first.

    Without a situation it is the order of :data:`SOLVERS`.  Integer variables leave HiGHS alone.  With a situation:

    - Cones beyond those of linear and quadratic programs: Clarabel, which takes nearly every cone and a quadratic
      objective, needs no tuning, and is accurate; then SCS, for the cones that Clarabel lacks, and last ECOS.
    - Linear and quadratic programs on another device than the CPU: the interior-point method in torch, which stays
      on it.
    - Small linear and quadratic programs (200 variables and rows together; 400 where P has its whole diagonal): DAQP,
      whose perturbed solves start from the active set of the solution.
    - Sparse linear programs that no gradient method augments: HiGHS, whose simplex starts from the basis.
    - Larger quadratic programs, and sparse ones: PIQP, for up to 5000 variables, where there are few cores, as it holds
      the interpreter's lock.
    - Dense or small ones, linear or quadratic, for up to 3000 variables and rows together: the interior-point method
      in torch, all elements at once.
    - Everything else: Clarabel.

    What is not installed is passed over.  Measured in milliseconds an element, forward and LPGD's backward pass
    (two cores, 2026-11, batches of 4 to 64, dense unless it says otherwise):

    ============================  ===========  ===========  ===========  ===========  ===========
    problem (variables)           CLARABEL     INTERIOR     DAQP         HIGHS        PIQP
    ============================  ===========  ===========  ===========  ===========  ===========
    QP 10                         0.16 + 0.66  0.72 + 0.70  0.14 + 0.21  0.75 + 1.24  0.14 + 0.20
    QP 50                         7.9 + 11.9   1.2 + 2.1    0.30 + 0.40  6.1 + 11.6   0.72 + 1.3
    QP 100, batched matrices      28 + 62      8.4 + 17     1.9 + 2.5    42 + 81      2.4 + 4.2
    QP 200                        145 + 274    26 + 59      17 + 8.3                  7.9 + 18
    QP 500, 1 % of A              6.4 + 13     21 + 45      50 + 52                   4.5 + 10
    QP 2000, 0.2 % of A           200 + 383                                           113 + 208
    LP 20                         0.24 + 0.41  0.36 + 0.50  0.12 + 0.19  0.30 + 0.57  0.17 + 0.34
    LP 100                        5.1 + 10     1.2 + 2.1    1.9 + 0.82   1.8 + 1.7    0.82 + 1.7
    LP 700, 1 % of A              16 + 32      45 + 102     424 + 190    14 + 9.8     18 + 31
    ============================  ===========  ===========  ===========  ===========  ===========
    """
    return tuple(solver for solver, _ in _ranked(structure, situation))


def _ranked(structure: ConicStructure, situation: Situation | None) -> list[tuple[type[Solver], str]]:
    """Every solver, best first, and why it stands where it does."""
    best: list[tuple[type[Solver], str]] = []
    if situation is not None and structure.cones.is_polyhedral:
        size, linear = structure.n + structure.m, not structure.quadratic.nnz
        dense = size <= _SMALL or structure.constraint.nnz >= _FILLED * structure.n * structure.m
        if situation.device != "cpu":
            best.append((InteriorPoint, f"it stays on the device {situation.device}"))
        if size <= (_SMALL if structure.with_diagonal is structure else _TINY):
            best.append((DAQP, "the fastest for small linear and quadratic programs"))
        if linear and not dense and situation.augmented is False:
            best.append((HiGHS, "the fastest for sparse linear programs without an added quadratic term"))
        if (not dense or (size > _SMALL and not linear)) and structure.n <= _MEDIUM and core_count() <= _FEW_CORES:
            best.append((PIQP, "the fastest for larger or sparse programs on few cores"))
        if dense and size <= _LARGE and situation.device == "cpu":
            best.append((InteriorPoint, "the fastest for dense programs in batches"))
    ranked = {solver for solver, _ in best}
    rest = [(solver, "the first that takes such problems") for solver in SOLVERS if solver not in ranked]
    return best + rest


_TINY, _SMALL, _LARGE, _MEDIUM, _FILLED, _FEW_CORES = 200, 400, 3000, 5000, 0.1, 4

_DEFAULT_NAMES = {"DIFFCP"}  # the standard layer's own default, which names no solver in particular


def available(structure: ConicStructure | None = None) -> tuple[str, ...]:
    """Names of the installed solvers; with a structure, of those that can solve such problems."""
    return tuple(
        solver.name
        for solver in SOLVERS
        if solver.is_installed() and (structure is None or solver.unsupported(structure) is None)
    )


def choose_solver(
    structure: ConicStructure,
    solver: Solver | str | None = None,
    options: Mapping[str, Any] | None = None,
    situation: Situation | None = None,
) -> Solver:
    """The solver to use for problems of a structure.

    Args:
        structure: the problem's patterns and cones.
        solver: a solver, one's name in any case, or None: the first of :func:`preference` that is installed and
            can take the problem.
        options: changes to its options, by their own names or the standard layer's.
        situation: what else is known, for :func:`preference`.

    Raises:
        ValueError: the name is unknown, or the solver cannot take this problem.
        MissingPackageError: its package is not installed; the message has the pip command.
        TypeError: an option is unknown.
    """
    chosen = _by_name(solver) if isinstance(solver, str) else solver
    if chosen is not None and not isinstance(chosen, Solver):
        raise TypeError(f"solver is {chosen!r}; it must be a solver such as lpgd.SCS(), the name of one, or None.")
    advice = _INTEGER_ADVICE if structure.has_integers else ""
    if chosen is None:
        fitting = [
            candidate for candidate in preference(structure, situation) if candidate.unsupported(structure) is None
        ]
        installed = [candidate for candidate in fitting if candidate.is_installed()]
        if not fitting:
            raise ValueError("; ".join(str(candidate.unsupported(structure)) for candidate in SOLVERS) + "." + advice)
        if not installed:
            commands = " or ".join(f"pip install {candidate.pip_name}" for candidate in fitting)
            raise MissingPackageError(f"no installed solver can solve this problem: {commands}")
        # Options of one solver only, such as those the standard layer documents for SCS, choose that solver.
        chosen = next((candidate for candidate in installed if candidate.knows(options or {})), installed[0])()
    chosen = chosen.with_options(options or {})
    reason = chosen.unsupported(structure)
    if reason is not None:
        fitting_names = ", ".join(available(structure)) or "none"
        raise ValueError(f"{reason}; installed solvers that can solve this problem: {fitting_names}.{advice}")
    chosen.module()
    return chosen


@dataclass(frozen=True)
class Choice:
    """Which solver a call uses, and why, as a sentence.

    Args:
        solver: the solver.
        structure: of the problem it was chosen for.
        situation: what else was known.
        named: whether it was asked for.
    """

    solver: Solver
    structure: ConicStructure
    situation: Situation
    named: bool

    def __str__(self) -> str:
        name = self.solver.name
        if self.named:
            return f"{name}, as asked for."
        missing: list[str] = []
        for candidate, reason in _ranked(self.structure, self.situation):
            if candidate.unsupported(self.structure) is not None:
                continue
            if isinstance(self.solver, candidate):
                better = f" of those installed (before it come {', '.join(missing)})" if missing else ""
                return f"{name}, chosen by the rule{better}: {reason}."
            if candidate.is_installed():
                break
            missing.append(candidate.name)
        return f"{name}, whose own options were given."


_INTEGER_ADVICE = (
    " Integer programs need a linear objective, linear constraints and HIGHS: write a product of binary variables as a "
    "variable of its own (x² = x), an absolute value or a maximum as inequalities."
)


def _by_name(name: str) -> Solver | None:
    if name.upper() in _DEFAULT_NAMES:
        return None
    for solver in SOLVERS:
        if solver.name == name.upper():
            return solver()
    known = ", ".join(solver.name for solver in SOLVERS)
    raise ValueError(f"{name!r} is not a solver of this library; the solvers are {known}.")
