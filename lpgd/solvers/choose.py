"""Which solvers there are, which of them can take a problem, and which one is chosen where none is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import reverse_cuthill_mckee

from lpgd.execution.tasks import core_count
from lpgd.problems.conic.structure import ConicStructure
from lpgd.solvers.backends.clarabel import Clarabel
from lpgd.solvers.backends.daqp import DAQP
from lpgd.solvers.backends.ecos import ECOS
from lpgd.solvers.backends.highs import HiGHS
from lpgd.solvers.backends.moreau import Moreau
from lpgd.solvers.backends.osqp import OSQP
from lpgd.solvers.backends.piqp import PIQP
from lpgd.solvers.backends.proxqp import ProxQP
from lpgd.solvers.backends.scs import SCS
from lpgd.solvers.base import POLYHEDRAL, ConicSolver, rescue_by
from lpgd.solvers.interior_point.solver import InteriorPoint
from lpgd.solvers.kkt.reduced import is_narrow
from lpgd.solvers.kkt.refinement import is_cheap
from lpgd.status import MissingPackageError

__all__ = ["SOLVERS", "Choice", "Situation", "available", "choose_solver", "named_solver", "preference"]

rescue_by((Clarabel, InteriorPoint, DAQP, PIQP, HiGHS, ProxQP, ECOS, SCS, OSQP))
"""Clarabel first, which has nearly every cone and hands over certificates."""

SOLVERS: tuple[type[ConicSolver], ...] = (Clarabel, SCS, InteriorPoint, DAQP, HiGHS, PIQP, OSQP, ProxQP, Moreau, ECOS)
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


def preference(structure: ConicStructure, situation: Situation | None = None) -> tuple[type[ConicSolver], ...]:
    """The one rule by which a solver is chosen where none is named: every solver, best first.

    Without a situation it is the order of :data:`SOLVERS`.  Integer variables leave HiGHS alone.  With a situation:

    - Cones beyond those of linear and quadratic programs: Clarabel, which takes nearly every cone and a quadratic
      objective, needs no tuning, and is accurate; then SCS, for the cones that Clarabel lacks, and last ECOS.
    - Linear and quadratic programs on another device than the CPU: the interior-point method in torch, which stays
      on it.
    - Quadratic programs of more than 150 variables, at least half of which have bounds, where P has its whole
      diagonal: many bounds are active, which DAQP takes one by one.  The interior-point method in torch where P has
      little else, rows are few and variables more than 250, as in projections and models of a few factors; PIQP where
      there are few cores; the interior-point method for more than 400 variables; then DAQP.  Where inequalities on
      full rows are a fourth of the variables or more, fewer bounds are active, and DAQP comes first: of 500 variables
      with 250 such rows it takes 0.4 of PIQP's time, of 120 to 250 with half of the bounds active 0.7 to 0.9.
    - Small linear and quadratic programs: DAQP, whose perturbed solves start from the active set of the solution.
      Small is up to 200 variables and rows together, 250 with a quadratic objective, 800 for many dense rows; where P
      has its whole diagonal 400, and 3000 for dense rows.  Up to 400 Moreau comes next: a batch in one call.
    - Larger dense quadratic programs, where P has not its whole diagonal: squares of full rows that are not
      substituted, which PIQP takes for sparse.  The interior-point method in torch.
    - Larger sparse quadratic programs where P has its whole diagonal and factors fill up, as along no chain, grid or
      horizon: OSQP, which factorises once where interior-point methods do in each iteration; then SCS.  SCS comes
      first where P has not its whole diagonal, rows are half as many as variables or more, and each variable and row
      has 20 entries, as of Huber's function of a kernel matrix.
    - Dense linear programs of 600 to 3000 variables and rows together, 100 of them rows, with no more zeros than other
      entries: the interior-point method in torch, which takes a batch of eight of 729 variables and 249 rows in a sixth
      to a fourteenth of HiGHS' time.  Scenarios, each with a variable of its own, are not dense: HiGHS takes a third of
      its time.  With a quadratic term that a gradient method adds, from 400 on and whatever the share of zeros.
    - Sparse linear programs that no gradient method augments: HiGHS, whose simplex starts from the basis.
    - Up to 5000 variables, where there are few cores, as they hold the interpreter's lock: PIQP, but for large dense
      linear programs, and for dense quadratic programs ProxQP; without these DAQP for up to 500 variables and rows.
    - Linear programs: HiGHS; tiny programs: Clarabel; small quadratic ones: SCS, whose answers are refined as all are.
    - Dense or small ones, for up to 3000 variables and rows together: the interior-point method in torch, all elements
      at once.
    - Everything else: Clarabel.  Elsewhere methods of first order come after it: on quadratic programs along chains and
      horizons OSQP and SCS take 1 to 1.8 of PIQP's time, on squares of few of the variables up to 2.8, on linear
      programs up to a hundred.

    What is not installed is passed over.  Measured in milliseconds an element with new data in each call, forward and
    LPGD's backward pass (two cores, 2026-11; ``make bench BENCH_FLAGS="--only choice"``):

    =============================  ====  ====  ======  ========  ========  =====  ====  ====  ======
    problem, batch                 DAQP  PIQP  PROXQP  INTERIOR  CLARABEL  HIGHS  OSQP  SCS   MOREAU
    =============================  ====  ====  ======  ========  ========  =====  ====  ====  ======
    QP 10, shared matrices, 64     0.18  0.36  0.41    0.82      0.45      1.3    0.47  0.45  0.22
    QP 10, 64                      0.30  0.49  0.59    0.83      0.70      1.4    1.5   0.80  0.32
    QP 50, shared matrices, 64     0.25  0.92  1.1     1.8       3.5       5.6    1.0   1.4   0.34
    QP 50, 64                      0.87  1.4   1.7     2.2       4.1       6.8    3.2   1.7   0.68
    QP 100, 32                     1.6   3.7   4.3     9.6       22        38     6.8   6.7   2.0
    QP 200, 8                      6.1   13    11      37        93        280    32    25    14
    QP 500, 4                      33    193   95      148
    QP in a box, 120, 16           2.8   2.4   4.2     3.1       7.8              5.8   6.0   5.0
    QP in a box, 250, 16           12    9.5   16      13        26               17    18    26
    QP on a simplex, 250, 16       23    18    49      57        62               39    58    40
    LP 10, 150                     0.20  0.23          0.36      0.33      0.41   5.8   0.84  0.27
    LP 100, 16                     2.4   3.7           4.9       6.5       2.9    910   11    5.9
    LP 600, 1 % of A, 4            120   31            87        38        9.4    2900  1400  64
    QP 500, 0.6 % of A, 4          32    39    54      77        33        160    21    28    76
    10 factors of 300, 16          15    4.2   25      2.4       5.2       6.3    7.0   4.9   18
    250 squares of 250, 8          60    200   125     70        120       53     100   70    610
    Huber, kernel of 200, 4        490   170   280     220       110              69    62
    CVXPY's form of NNLS, 32       0.66  0.68  0.80    0.80      0.93      1.5    2.5   1.7   0.52
    =============================  ====  ====  ======  ========  ========  =====  ====  ====  ======
    """
    return tuple(solver for solver, _ in _ranked(structure, situation))


def _ranked(structure: ConicStructure, situation: Situation | None) -> list[tuple[type[ConicSolver], str]]:
    """Every solver, best first, and why it stands where it does."""
    if structure.two_sided:
        structure = structure.with_ends  # what the matrices of a problem look like; few solvers add variables
    best: list[tuple[type[ConicSolver], str]] = []
    polyhedral = situation is not None and structure.cones.is_polyhedral
    linear = not structure.quadratic.nnz
    if situation is not None and polyhedral:
        size = structure.n + structure.m
        entries, places = structure.constraint.nnz, structure.n * structure.m
        if not linear:
            entries, places = entries + structure.quadratic.nnz, places + structure.n**2
        filled = entries >= _FILLED * places
        dense = filled or size <= _SMALL
        on_cpu, simplex = situation.device == "cpu", linear and situation.augmented is False
        few = structure.n <= _MEDIUM and core_count() <= _FEW_CORES
        curved = structure.with_diagonal is structure
        boxed = curved and structure.n > _OF_BOUNDS and 2 * structure.bounded_index.size >= structure.n
        boxed = boxed and not (filled and 4 * structure.cones.nonnegative >= structure.n)
        # Where every other entry is zero, and in smaller programs, the simplex method is as fast or faster.
        large = _SMALL < size <= _LARGE and filled
        if simplex:
            large = large and size > _WHOLE and 2 * entries >= places
        if linear:
            small = _TINY
        elif curved:
            small = _LARGE if filled else _SMALL
        else:
            small = _FULL if filled and 4 * structure.m >= structure.n else _EPIGRAPH
        fills = not linear and not filled and size > _SMALL and is_cheap(structure)
        fills = fills and (curved or structure.m >= structure.n // 2) and (curved or entries >= _CROWDED * size)
        fills = fills and _profile(structure) > _WIDE * size
        rules: list[tuple[bool, type[ConicSolver], str]] = [
            (not on_cpu, InteriorPoint, f"it stays on the device {situation.device}"),
            (
                on_cpu and boxed and is_narrow(structure),
                InteriorPoint,
                "the fastest for a nearly diagonal objective, bounds and few rows, in batches",
            ),
            (on_cpu and boxed and few, PIQP, "the fastest for quadratic programs with many bounds, on few cores"),
            (
                on_cpu and boxed and structure.n > _SMALL and size <= _LARGE,
                InteriorPoint,
                "fast for quadratic programs with many bounds, in batches",
            ),
            (
                size <= small,
                DAQP,
                "the fastest for small linear and quadratic programs",
            ),
            (
                on_cpu and filled and not linear and not curved and size <= _LARGE,
                InteriorPoint,
                "the fastest for squares of full rows of this size",
            ),
            (on_cpu and curved and size <= _SMALL, Moreau, "fast for small quadratic programs"),
            (on_cpu and fills and not curved, SCS, "the fastest for sparse quadratic programs with large full blocks"),
            (on_cpu and fills, OSQP, "the fastest for sparse quadratic programs whose factors fill up"),
            (on_cpu and fills, SCS, "fast for sparse quadratic programs whose factors fill up"),
            (
                on_cpu and linear and large and structure.m >= _MANY_ROWS,
                InteriorPoint,
                "the fastest for dense linear programs of this size",
            ),
            (simplex and not dense, HiGHS, "the fastest for sparse linear programs without an added quadratic term"),
            (few and not (dense and linear and size > _TINY), PIQP, "fast on few cores"),
            (few and dense and not linear, ProxQP, "fast for dense quadratic programs on few cores"),
            (filled and not linear and size <= _MIDDLE, DAQP, "fast for dense quadratic programs"),
            (simplex and size > _MINUTE, HiGHS, "fast for linear programs without an added quadratic term"),
            (size <= _MINUTE, Clarabel, "fast for tiny programs"),
            (curved and on_cpu and size <= _SMALL, SCS, "fast for small quadratic programs"),
            (dense and size <= _LARGE and on_cpu, InteriorPoint, "fast for dense programs in batches"),
        ]
        best = [(solver, reason) for applies, solver, reason in rules if applies]
    ranked: dict[type[ConicSolver], str] = {}
    for solver, reason in best:
        ranked.setdefault(solver, reason)
    tail = SOLVERS if not polyhedral else _LINEAR_TAIL if linear else _QUADRATIC_TAIL
    for solver in (*tail, *SOLVERS):
        ranked.setdefault(solver, _IN_ORDER)
    return list(ranked.items())


def _profile(structure: ConicStructure) -> float:
    """The largest distance of a row's entries from the diagonal of the optimality system, on average.

    The order is that of Cuthill and McKee.  Along chains and horizons it is 0.2 to 2 % of the size, of random patterns
    12 to 19 %.
    """
    n, size = structure.n, structure.n + structure.m
    P, A = structure.quadratic, structure.constraint
    rows, columns = np.concatenate([P.rows, n + A.rows, A.columns]), np.concatenate([P.columns, A.columns, n + A.rows])
    places = rows.astype(np.int32), columns.astype(np.int32)  # other indices are refused (SciPy 1.13)
    system = sp.csr_array((np.ones(rows.size), places), shape=(size, size))
    order = reverse_cuthill_mckee(system, symmetric_mode=True)
    place = np.empty(size, dtype=np.int64)
    place[order] = np.arange(size)
    first = np.arange(size)
    np.minimum.at(first, place[rows], place[columns])
    return float((np.arange(size) - first).mean())


@lru_cache(maxsize=64)
def _fitting(structure: ConicStructure, situation: Situation | None, cores: int) -> tuple[type[ConicSolver], ...]:
    """Those of :func:`preference` that can take the problem, installed or not."""
    return tuple(
        candidate
        for candidate in preference(structure, situation)
        if _default(candidate).unsupported(structure) is None
    )


_IN_ORDER = (
    "no solver is known to be faster on such problems, so it is the first in lpgd's order of those that can solve them"
)
_LINEAR_TAIL = (Clarabel, InteriorPoint, DAQP, HiGHS, PIQP, ProxQP, SCS)
_QUADRATIC_TAIL = (Clarabel, SCS, OSQP, InteriorPoint, DAQP, PIQP, ProxQP, HiGHS)
_MINUTE, _TINY, _SMALL, _MIDDLE, _LARGE, _MEDIUM, _FILLED, _FEW_CORES = 60, 200, 400, 500, 3000, 5000, 0.1, 4
_OF_BOUNDS, _FULL, _WIDE = 150, 800, 0.05
_EPIGRAPH, _MANY_ROWS, _WHOLE, _CROWDED = 250, 100, 600, 20

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
        for candidate, reason in _ranked(self.structure, self.situation):
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
