"""Which solvers can take a problem, which one is chosen where none is named, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

from lpgd.execution.tasks import core_count
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.base import POLYHEDRAL, ConicSolver
from lpgd.solvers.ranking import SOLVERS, Situation, preference, ranked
from lpgd.status import MissingPackageError

__all__ = ["Choice", "available", "choose_solver", "named_solver"]


@lru_cache(maxsize=64)
def _fitting(structure: ConicStructure, situation: Situation | None, cores: int) -> tuple[type[ConicSolver], ...]:
    """Those of :func:`preference` that can take the problem, installed or not."""
    return tuple(
        candidate
        for candidate in preference(structure, situation)
        if _default(candidate).unsupported(structure) is None
    )


_DEFAULT_NAMES = {"DIFFCP"}  # the standard layer's own default, which names no solver in particular


@cache
def _default(solver: type[ConicSolver]) -> ConicSolver:
    """A solver with its default options."""
    return solver()


def available(structure: ConicStructure | None = None) -> tuple[str, ...]:
    """Names of the installed solvers; with a structure, of those that can solve such problems."""
    return tuple(
        solver.name
        for solver in SOLVERS
        if solver.is_installed() and (structure is None or _default(solver).unsupported(structure) is None)
    )


def choose_solver(
    structure: ConicStructure,
    solver: ConicSolver | str | None = None,
    options: Mapping[str, object] | None = None,
    situation: Situation | None = None,
) -> ConicSolver:
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
    chosen = named_solver(solver)
    advice = _INTEGER_ADVICE if structure.has_integers else ""
    if chosen is None:
        fitting = _fitting(structure, situation, core_count())
        installed = (candidate for candidate in fitting if candidate.is_installed())
        first = next(installed, None)
        if not fitting:
            raise ValueError(_of_none(structure))
        if first is None:
            commands = " or ".join(f"pip install {candidate.pip_name}" for candidate in fitting)
            raise MissingPackageError(f"no installed solver can solve this problem: {commands}")
        # Options of one solver only, such as those the standard layer documents for SCS, choose that solver.
        if options:
            first = next((candidate for candidate in (first, *installed) if candidate.knows(options)), first)
        chosen = _default(first)
    chosen = chosen.with_options(options or {})
    reason = chosen.unsupported(structure)
    if reason is not None:
        names = ", ".join(available(structure))
        others = (
            f"installed solvers that can solve this problem: {names}" if names else "nor can others solve this problem"
        )
        raise ValueError(f"{reason}; {others}.{advice}")
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

    solver: ConicSolver
    structure: ConicStructure
    situation: Situation
    named: bool

    def __str__(self) -> str:
        name = self.solver.name
        if self.named:
            return f"{name}, as asked for."
        missing: list[str] = []
        for candidate, reason in ranked(self.structure, self.situation):
            if _default(candidate).unsupported(self.structure) is not None:
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


def _of_none(structure: ConicStructure) -> str:
    """What to say of problems that no solver takes: what is wrong, what to do, and then what each solver lacks."""
    lacking = "; ".join(str(_default(candidate).unsupported(structure)) for candidate in SOLVERS)
    if not structure.has_integers:
        return f"no solver takes this problem with all of its cones ({structure.cones}): {lacking}."
    kinds = [f"{kind.replace('_', '-')} cones" for kind in sorted(structure.cones.kinds - POLYHEDRAL)]
    found = ["a quadratic objective"] * bool(structure.quadratic.nnz) + kinds
    return (
        f"this integer program has {' and '.join(found)}, which no solver takes together with integer variables."
        f"{_INTEGER_ADVICE} Each solver: {lacking}."
    )


def named_solver(solver: ConicSolver | str | None) -> ConicSolver | None:
    """A solver, or the one of a name with its default options; None where one is to be chosen.

    Raises:
        ValueError: the name is unknown.
        TypeError: it is something else.
    """
    chosen = _by_name(solver) if isinstance(solver, str) else solver
    if chosen is not None and not isinstance(chosen, ConicSolver):
        raise TypeError(f"solver is {chosen!r}; it must be a solver such as lpgd.SCS(), the name of one, or None.")
    return chosen


def _by_name(name: str) -> ConicSolver | None:
    if name.upper() in _DEFAULT_NAMES:
        return None
    for solver in SOLVERS:
        if solver.name == name.upper():
            return solver()
    known = ", ".join(solver.name for solver in SOLVERS)
    raise ValueError(f"{name!r} is not a solver of this library; the solvers are {known}.")
