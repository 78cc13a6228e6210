"""The Solver interface: solve a batch of conic programs, warm-started, one status for each element."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeAlias, TypeVar

from lpgd.arrays import as_index
from lpgd.problems.base import States
from lpgd.problems.conic.problem import ConicProblem
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicStructure
from lpgd.problems.solution import AnySolution
from lpgd.solvers.conic.consistent import with_consistent_equalities
from lpgd.solvers.conic.equations import are_equations, solved_equations
from lpgd.solvers.conic.far import with_far_constraints_guessed, with_far_constraints_near
from lpgd.solvers.conic.lengths import in_better_units, with_constraints_kept
from lpgd.solvers.conic.posed import Posed, judged, left_by_draft, pose
from lpgd.solvers.conic.rescue import is_settled, merged, settled
from lpgd.solvers.kkt.reduced import is_dense
from lpgd.solvers.kkt.refinement import is_cheap
from lpgd.solvers.options import check_type
from lpgd.status import MissingPackageError

__all__ = ["AnySolver", "Begun", "Capabilities", "ConicSolver", "Solver", "rescue_by"]

POLYHEDRAL = frozenset({"zero", "nonnegative"})
"""The cones of linear and quadratic programs."""
VAST = 3000
"""Sparse programs with more variables and rows are not handed to another solver that works on dense matrices."""


@dataclass(frozen=True)
class Capabilities:
    """What a solver can do, as data.

    Attributes:
        cones: names of the cones it takes (``Cones.kinds``).
        quadratic: takes a quadratic objective itself; otherwise it gets the cone form.
        warm_start: a previous state makes a solve cheaper.
        time_limit: can stop at one; otherwise one is refused.
        integer: takes integer variables.
        releases_gil: lets other threads run while it solves; without, only processes make it faster.
        dense: works on dense matrices, whatever the pattern: memory and time grow as the square and cube of the size.
        active_set: its answers say which constraints are active: slack or multiplier of a row is zero, as after a
            projection or in a vertex, and not both of them small.
    """

    cones: frozenset[str]
    quadratic: bool = False
    warm_start: bool = False
    releases_gil: bool = True
    time_limit: bool = True
    integer: bool = False
    dense: bool = False
    active_set: bool = False


class Begun(NamedTuple):
    """An answer to a batch as it was given, in units that are 1, and :func:`~lpgd.solvers.conic.posed.judged` of it.

    ``judged`` is None where that is not known yet.
    """

    answer: ConicSolution
    judged: ConicSolution | None


ProblemT_contra = TypeVar("ProblemT_contra", contravariant=True)
SolutionT_co = TypeVar("SolutionT_co", covariant=True)


@dataclass(frozen=True)
class Solver(ABC, Generic[ProblemT_contra, SolutionT_co]):
    """What a gradient method may ask of a solver, whatever class of problems it solves.

    Args:
        tolerance: accuracy asked of the solver; 0 is exact.
    """

    tolerance: float = 0.0

    name: ClassVar[str]
    finest_tolerance: ClassVar[float] = 0.0
    """The smallest tolerance that the solver reaches in double precision on well-scaled problems."""
    is_torch: ClassVar[bool] = False
    """Its work, and that of derivatives, are torch operations on whole batches: with as many threads as torch has."""

    @property
    @abstractmethod
    def takes_states(self) -> bool:
        """Whether a previous state makes a solve cheaper."""

    @abstractmethod
    def solve(self, problem: ProblemT_contra, states: States = (), executor: Executor | None = None) -> SolutionT_co:
        """Solve every element of a batch.

        Args:
            problem: B elements.
            states: warm-start states of B elements, or of a divisor of B that repeat (``Solution.states``); an
                empty sequence is a cold start.
            executor: where the work runs; None is the solver's own choice.

        Returns:
            A :class:`~lpgd.problems.solution.Solution`.
        """

    def solution_error(self, problem: ProblemT_contra) -> float:
        """How far, relatively, its solutions of such a problem typically are from exact: what steps are chosen by."""
        return self.tolerance

    def with_tolerance(self, tolerance: float) -> Self:
        """The same solver, asked for at least this accuracy, as far as it can reach it."""
        tolerance = min(self.tolerance, max(tolerance, self.finest_tolerance))
        return self if tolerance == self.tolerance else replace(self, tolerance=tolerance)


AnySolver: TypeAlias = Solver[Any, AnySolution]
"""A solver of problems of any class; the layer brings it together with problems of its own."""


@dataclass(frozen=True)
class ConicSolver(Solver[ConicProblem, ConicSolution]):
    """What every solver of conic programs offers; subclasses add their options as fields.

    Args:
        tolerance: accuracy asked of the solver (its own absolute and relative criteria).
        max_iterations: iteration limit of one element.
        time_limit: seconds for one element; None is no limit.
        batch_time_limit: seconds for all elements of a solve together; those that have not begun by then end with
            ``Status.TIME_LIMIT``, and no element takes longer than that where the solver can stop.  Forward and each
            perturbed solve count for themselves.
        verbose: let the solver print.
        rescue: elements that end without proof (at the iteration limit, by a numerical error, inaccurately, or with a
            verdict that its own certificate does not show) are handed to the next installed solver that can take them;
            ``ConicSolution.solvers`` says who answered.
        refine: answers are finished by Newton's steps on the optimality conditions, where those are cheap or the solver
            gave up; ``ConicSolution.refined`` counts them.  False gives the solver's own answers, to compare solvers.
    """

    tolerance: float = 1e-8
    max_iterations: int = 1000
    time_limit: float | None = None
    batch_time_limit: float | None = field(default=None, kw_only=True, compare=False)
    verbose: bool = False
    rescue: bool = True
    refine: bool = True

    capabilities: ClassVar[Capabilities]
    package: ClassVar[str]
    pip_name: ClassVar[str]
    is_quick_again: ClassVar[bool] = False
    """A warm solve after a small change takes less than a factorisation of the optimality conditions."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of fields: those of the solver itself and of the field's standard layer."""
    finest_tolerance: ClassVar[float] = 1e-12
    """The smallest tolerance that the solver reaches in double precision on well-scaled problems."""
    takes_equations: ClassVar[bool] = False
    """Whether it is asked about programs without inequalities, too, which one linear system solves."""

    def __post_init__(self) -> None:
        for option in fields(self):
            # Without postponed annotations the type of a field is a class, or a union that prints as it is written.
            check_type(self, option.name, getattr(option.type, "__name__", str(option.type)))
        if not self.tolerance > 0:
            raise ValueError(f"tolerance is {self.tolerance}; it must be positive.")
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations is {self.max_iterations}; it must be at least 1.")
        for name in ("time_limit", "batch_time_limit"):
            limit = getattr(self, name)
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} is {limit}; it must be positive, or None for no limit.")
        if self.time_limit is not None and not self.capabilities.time_limit:
            raise ValueError(f"{self.name} cannot stop at a time limit; lower max_iterations, or use another solver.")

    @property
    def shortest(self) -> float | None:
        """The shorter one of the limits of time, for solvers that take elements side by side."""
        limits = [limit for limit in (self.time_limit, self.batch_time_limit) if limit is not None]
        return min(limits, default=None)

    def deadline(self) -> float | None:
        """When a batch that begins now is to end, by ``time.time``, the clock that processes share."""
        return None if self.batch_time_limit is None else time.time() + self.batch_time_limit

    @property
    def takes_states(self) -> bool:
        return self.capabilities.warm_start

    def solve(self, problem: ConicProblem, states: States = (), executor: Executor | None = None) -> ConicSolution:
        """Solve every element of a batch; an executor of None is the library's threads.

        Every solver is asked, and its answer judged, in the same way (:mod:`lpgd.solvers.conic.posed`): in units of
        order 1, with statuses that are shown by residuals and certificates.
        """
        return self._with_others(problem, states, executor, alone=False)

    def solve_alone(
        self, problem: ConicProblem, states: States = (), executor: Executor | None = None
    ) -> ConicSolution:
        """The same without other solvers, for what is solved again elsewhere; verdicts without a proof are errors."""
        return self._with_others(problem, states, executor, alone=True)

    def _with_others(
        self, problem: ConicProblem, states: States, executor: Executor | None, *, alone: bool
    ) -> ConicSolution:
        reason = self.unsupported(problem.structure)
        if reason is not None:
            raise ValueError(f"{reason}; lpgd.available(structure) lists the solvers that can solve this problem.")
        deadline = self.deadline()
        attempt = self.attempt(problem, states, executor)
        if attempt.failed and problem.structure.cones.zero:
            attempt = self._with_rounding_mended(attempt, executor)
        if is_settled(attempt, self.refine):
            return attempt
        others = self.others(problem.structure) if self.rescue and not alone else ()
        if deadline is not None:
            left = deadline - time.time()
            others = tuple(replace(other, batch_time_limit=left) for other in others) if left > 0 else ()
        finest = None if problem.structure.cones.is_polyhedral else _finest((self, *others) if self.rescue else ())
        sharpest = _sharpest_first(self, others, problem.structure)
        return settled(attempt, others, sharpest, executor, self.refine, finest)

    def _with_rounding_mended(self, attempt: ConicSolution, executor: Executor | None) -> ConicSolution:
        """The answer with those elements solved that have a feasible point but for rounding of their equalities."""
        problem, elements = with_consistent_equalities(attempt.problem, attempt.failed)
        if not elements:
            return attempt
        again = self.attempt(problem.select(as_index(elements, problem.device)), (), executor)
        taken = [status.usable for status in again.statuses]
        solved = [element for element, is_taken in zip(elements, taken, strict=True) if is_taken]
        if not solved:
            return attempt
        problem, _ = with_consistent_equalities(attempt.problem, solved)  # those of others stay as they are
        return replace(merged(attempt, elements, again, taken, keep_states=True), problem=problem)

    def attempt(self, problem: ConicProblem, states: States = (), executor: Executor | None = None) -> ConicSolution:
        """This solver's own answer, judged; verdicts without a proof are its claims (``ConicSolution.proofs``)."""
        begun = None if len(states) or not self.refine else self.at_once(problem, executor)
        if begun is not None and begun.judged is not None:
            return begun.judged
        posed, shares = pose(problem, states), None

        def solve(other: Posed) -> ConicSolution:
            return self._judged(other, executor)

        def solve_nearby(other: Posed) -> ConicSolution:
            return in_better_units(other, solve(other), None, self.tolerance, solve)

        if begun is None:
            answer, shares = with_far_constraints_guessed(posed, states, solve)
        else:
            answer = judged(posed, begun.answer, self.tolerance, self.name)
        answer = in_better_units(posed, answer, shares, self.tolerance, solve)
        answer = with_constraints_kept(posed, answer, solve)
        return with_far_constraints_near(posed, answer, shares, solve_nearby)

    def at_once(self, problem: ConicProblem, executor: Executor | None) -> Begun | None:
        """Its answer to a batch that needs no posing, and what is left to be done about it; None for other batches."""
        return None

    def _judged(self, posed: Posed, executor: Executor | None) -> ConicSolution:
        structure = posed.problem.structure
        if self.refine and not self.verbose and not self.takes_equations and are_equations(posed.inside):
            found = judged(posed, solved_equations(posed.inside), self.tolerance, self.name)
            return self._completed(posed, found, sorted({*found.failed} - {*posed.settled}), executor)
        draft = self.draft(structure) if self.refine and is_cheap(structure) else None
        if draft is None:
            answer = self.solve_posed(posed.inside, posed.states, executor)
            return judged(posed, answer, self.tolerance, self.name, refined=self.refine)
        answer = draft.solve_posed(posed.inside, posed.states, executor)
        found = judged(posed, answer, self.tolerance, self.name, draft=True)
        return self._completed(posed, found, left_by_draft(posed, found), executor)

    def _completed(
        self, posed: Posed, found: ConicSolution, elements: list[int], executor: Executor | None
    ) -> ConicSolution:
        """What was found, with these elements solved by the solver in earnest."""
        if not elements:
            return found
        chosen = posed.select(elements)
        again = judged(chosen, self.solve_posed(chosen.inside, chosen.states, executor), self.tolerance, self.name)
        return merged(found, elements, again, [True] * len(elements), keep_states=True)

    def draft(self, structure: ConicStructure) -> ConicSolver | None:
        """A quicker and less accurate version of this solver, from whose answers Newton's method starts.

        Elements of which that does not find the only solution, to rounding, are solved once more by the solver itself.
        None where there is no such version.
        """
        return None

    @abstractmethod
    def solve_posed(self, problem: ConicProblem, states: States, executor: Executor | None) -> ConicSolution:
        """Solve every element of a batch whose data are of order 1, and convex.

        For elements that are infeasible or unbounded the point is what the solver takes for a proof: multipliers y, or
        a direction x.
        """

    def others(self, structure: ConicStructure) -> tuple[ConicSolver, ...]:
        """Installed solvers to turn to for elements that this one leaves without proof, in order."""
        limit, vast = self.time_limit, structure.n + structure.m > VAST and not is_dense(structure)
        others = (
            kind(time_limit=limit if kind.capabilities.time_limit else None)
            for kind in _RESCUERS
            if kind is not type(self) and kind.is_installed() and not (vast and kind.capabilities.dense)
        )
        return tuple(other for other in others if other.unsupported(structure) is None)

    @classmethod
    def is_installed(cls) -> bool:
        # To look for one that is in use takes a tenth of a millisecond.
        return sys.modules.get(cls.package) is not None or importlib.util.find_spec(cls.package) is not None

    @classmethod
    def module(cls) -> ModuleType:
        """The solver's package.

        Raises:
            MissingPackageError: it is not installed.
        """
        try:
            return importlib.import_module(cls.package)
        except ImportError as error:
            raise MissingPackageError(f"the solver {cls.name} needs a package: pip install {cls.pip_name}") from error

    def unsupported(self, structure: ConicStructure) -> str | None:
        """Why this solver cannot take problems of this structure, or None."""
        missing = [f"{kind.replace('_', '-')} cone" for kind in sorted(structure.cones.kinds - self.capabilities.cones)]
        if structure.has_integers and not self.capabilities.integer:
            missing.append("integer variables")
        return f"{self.name} has no {' and no '.join(missing)}" if missing else None

    @classmethod
    def knows(cls, options: Iterable[str]) -> bool:
        """Whether all of these are names of its options."""
        return set(options) <= {field.name for field in fields(cls)} | set(cls.aliases)

    def with_options(self, options: Mapping[str, object]) -> Self:
        """The same solver with some options changed; names are fields or :attr:`aliases`.

        Raises:
            TypeError: an unknown option; the message lists the known ones.
        """
        known = {field.name for field in fields(self)}
        changes: dict[str, Any] = {}
        for key, value in options.items():
            target = key if key in known else self.aliases.get(key)
            if target is None:
                names = ", ".join(sorted(known | set(self.aliases)))
                raise TypeError(f"{key!r} is not an option of {self.name}; its options are: {names}.")
            changes[target] = value
        return replace(self, **changes) if changes else self


FINEST = 1e-11
"""The tolerance at which a second answer is asked for."""
_RESCUERS: list[type[ConicSolver]] = []


def rescue_by(kinds: Sequence[type[ConicSolver]]) -> None:
    """Say which solvers :meth:`ConicSolver.others` turns to; called once, where all of them are known."""
    _RESCUERS[:] = kinds


def _sharpest_first(
    asked: ConicSolver, others: Sequence[ConicSolver], structure: ConicStructure
) -> tuple[ConicSolver, ...]:
    """Others in the order in which they are asked about quadratic programs whose active set is in doubt.

    Near a degenerate point an interior-point method leaves slack and multiplier both small, and so does the next one.
    Of 40 such answers (sparse and dense, n 320 to 1000, conditions of 1 to 1e7) DAQP, SCS, OSQP and ProxQP sharpened
    all, Clarabel none, PIQP and INTERIOR two thirds; on sparse matrices those for sparse ones are faster.  What the
    former leave is another matter: an ill-conditioned P, for which an interior-point method is asked first.
    """
    inequalities = structure.cones.nonnegative + structure.lower_index.size + structure.upper_index.size
    if not inequalities or not structure.quadratic.nnz or not structure.cones.is_polyhedral:
        return tuple(others)
    sharp = [other for other in others if other.capabilities.active_set]
    if not is_dense(structure):
        sharp.sort(key=lambda other: other.capabilities.dense)
    rest = [other for other in others if not other.capabilities.active_set]
    first = 1 if asked.capabilities.active_set else 0
    return (*rest[:first], *sharp, *rest[first:])


def _finest(solvers: Sequence[ConicSolver]) -> ConicSolver | None:
    """The first that is as accurate as an interior-point method can be, and asked for that."""
    fine = [solver for solver in solvers if solver.finest_tolerance <= FINEST]
    return fine[0].with_tolerance(FINEST) if fine else None
