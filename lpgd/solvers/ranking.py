"""Which solvers there are, and which is the best for a problem: one table of rules, with the measurements behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
from lpgd.solvers.base import ConicSolver, rescue_by
from lpgd.solvers.interior_point.solver import InteriorPoint
from lpgd.solvers.kkt.reduced import is_narrow
from lpgd.solvers.kkt.refinement import is_cheap

__all__ = ["SOLVERS", "Situation", "preference", "ranked"]

rescue_by((Clarabel, InteriorPoint, DAQP, PIQP, HiGHS, ProxQP, ECOS, SCS, OSQP))
"""Clarabel first, which has nearly every cone and hands over certificates."""

SOLVERS: tuple[type[ConicSolver], ...] = (Clarabel, SCS, InteriorPoint, DAQP, HiGHS, PIQP, OSQP, ProxQP, Moreau, ECOS)
"""Every backend; where nothing of the situation is known, the first that can take a problem is chosen.

ECOS, under the GPLv3 and without a release since 2024, comes last: every problem of its has another solver.
"""


_IN_ORDER = (
    "no solver is known to be faster on such problems, so it is the first in lpgd's order of those that can solve them"
)
"""Why a solver comes where no rule names it."""
_LINEAR_TAIL = (Clarabel, InteriorPoint, DAQP, HiGHS, PIQP, ProxQP, SCS)
_QUADRATIC_TAIL = (Clarabel, SCS, OSQP, InteriorPoint, DAQP, PIQP, ProxQP, HiGHS)
"""After the rules: in which order solvers come for programs that none of them fits."""
_MINUTE, _TINY, _EPIGRAPH, _SMALL, _MIDDLE, _WHOLE, _FULL, _LARGE = 60, 200, 250, 400, 500, 600, 800, 3000
"""Variables and rows together."""
_OF_BOUNDS, _MEDIUM, _MANY_ROWS, _FEW_CORES = 150, 5000, 100, 4
"""Variables where bounds count, and up to which few cores do; rows; cores."""
_FILLED, _CROWDED, _WIDE = 0.1, 20, 0.05
"""The share of entries in dense matrices, entries for each variable and row, and the share of the size that a profile
is of where factors fill up."""


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
    return tuple(solver for solver, _ in ranked(structure, situation))


def ranked(structure: ConicStructure, situation: Situation | None) -> list[tuple[type[ConicSolver], str]]:
    """Every solver, best first, and why it stands where it does."""
    if structure.two_sided:
        structure = structure.with_ends  # what the matrices of a problem look like; few solvers add variables
    reasons: dict[type[ConicSolver], str] = {}
    tail = SOLVERS
    if situation is not None and structure.cones.is_polyhedral:
        features = _Features.of(structure, situation)
        for rule in _RULES:
            if rule.solver not in reasons and rule.applies(features):
                reasons[rule.solver] = rule.reason.format(device=situation.device)
        tail = _LINEAR_TAIL if features.is_linear else _QUADRATIC_TAIL
    for solver in (*tail, *SOLVERS):
        reasons.setdefault(solver, _IN_ORDER)
    return list(reasons.items())


@dataclass(frozen=True)
class _Features:
    """What the rules look at in a linear or quadratic program.

    Attributes:
        structure: the program's.
        size: variables and rows together.
        entries, places: nonzeros, and how many there could be, of A, and of P where there is one.
        on_cpu: whether its data are on the CPU.
        simplex: whether the simplex method may solve it: a linear program that no gradient method augments.
        few_cores: whether a solver that holds the interpreter's lock loses little.
    """

    structure: ConicStructure
    size: int
    entries: int
    places: int
    on_cpu: bool
    simplex: bool
    few_cores: bool

    @classmethod
    def of(cls, structure: ConicStructure, situation: Situation) -> _Features:
        n, m = structure.n, structure.m
        linear = not structure.quadratic.nnz
        return cls(
            structure,
            size=n + m,
            entries=structure.constraint.nnz + structure.quadratic.nnz,
            places=n * m + (0 if linear else n**2),
            on_cpu=situation.device == "cpu",
            simplex=linear and situation.augmented is False,
            few_cores=n <= _MEDIUM and core_count() <= _FEW_CORES,
        )

    @property
    def is_linear(self) -> bool:
        return not self.structure.quadratic.nnz

    @property
    def is_curved(self) -> bool:
        """Whether P has its whole diagonal."""
        return self.structure.with_diagonal is self.structure

    @property
    def is_filled(self) -> bool:
        """Whether matrices are dense, whatever their size."""
        return self.entries >= _FILLED * self.places

    @property
    def is_dense(self) -> bool:
        """Whether they are solved as dense ones."""
        return self.is_filled or self.size <= _SMALL

    @property
    def is_boxed(self) -> bool:
        """Whether many bounds are active."""
        n, bounded = self.structure.n, self.structure.bounded_index.size
        if not (self.on_cpu and self.is_curved and n > _OF_BOUNDS and 2 * bounded >= n):
            return False
        # Many inequalities on full rows leave few of the bounds active.
        return not (self.is_filled and 4 * self.structure.cones.nonnegative >= n)

    @property
    def is_small(self) -> bool:
        """Whether an active-set method on dense matrices is the fastest."""
        if self.is_linear:
            return self.size <= _TINY
        if self.is_curved:
            return self.size <= (_LARGE if self.is_filled else _SMALL)
        return self.size <= (_FULL if self.is_filled and 4 * self.structure.m >= self.structure.n else _EPIGRAPH)

    @property
    def is_large_linear(self) -> bool:
        """Whether it is a dense linear program that is too large for the simplex method."""
        if not (self.is_linear and self.is_filled and _SMALL < self.size <= _LARGE):
            return False
        # Where every other entry is zero, and in smaller programs, the simplex method is as fast or faster.
        return not self.simplex or (self.size > _WHOLE and 2 * self.entries >= self.places)

    @cached_property
    def fills_up(self) -> bool:
        """Whether it is a sparse quadratic program whose factors are not."""
        if self.is_linear or self.is_filled or self.size <= _SMALL or not is_cheap(self.structure):
            return False
        n, m = self.structure.n, self.structure.m
        if not self.is_curved and (m < n // 2 or self.entries < _CROWDED * self.size):
            return False
        return self.on_cpu and _profile(self.structure) > _WIDE * self.size


class _Rule(NamedTuple):
    """A solver, the programs that it is best for among those that no rule before it has, and why."""

    solver: type[ConicSolver]
    reason: str
    applies: Callable[[_Features], bool]


_RULES = (
    _Rule(InteriorPoint, "it stays on the device {device}", lambda program: not program.on_cpu),
    _Rule(
        InteriorPoint,
        "the fastest for a nearly diagonal objective, bounds and few rows, in batches",
        lambda program: program.is_boxed and is_narrow(program.structure),
    ),
    _Rule(
        PIQP,
        "the fastest for quadratic programs with many bounds, on few cores",
        lambda program: program.is_boxed and program.few_cores,
    ),
    _Rule(
        InteriorPoint,
        "fast for quadratic programs with many bounds, in batches",
        lambda program: program.is_boxed and program.structure.n > _SMALL and program.size <= _LARGE,
    ),
    _Rule(DAQP, "the fastest for small linear and quadratic programs", lambda program: program.is_small),
    _Rule(
        InteriorPoint,
        "the fastest for squares of full rows of this size",
        lambda program: (
            program.on_cpu
            and program.is_filled
            and not (program.is_linear or program.is_curved)
            and program.size <= _LARGE
        ),
    ),
    _Rule(
        Moreau,
        "fast for small quadratic programs",
        lambda program: program.on_cpu and program.is_curved and program.size <= _SMALL,
    ),
    _Rule(
        SCS,
        "the fastest for sparse quadratic programs with large full blocks",
        lambda program: program.fills_up and not program.is_curved,
    ),
    _Rule(
        OSQP,
        "the fastest for sparse quadratic programs whose factors fill up",
        lambda program: program.fills_up,
    ),
    _Rule(SCS, "fast for sparse quadratic programs whose factors fill up", lambda program: program.fills_up),
    _Rule(
        InteriorPoint,
        "the fastest for dense linear programs of this size",
        lambda program: program.on_cpu and program.is_large_linear and program.structure.m >= _MANY_ROWS,
    ),
    _Rule(
        HiGHS,
        "the fastest for sparse linear programs without an added quadratic term",
        lambda program: program.simplex and not program.is_dense,
    ),
    _Rule(
        PIQP,
        "fast on few cores",
        lambda program: program.few_cores and not (program.is_dense and program.is_linear and program.size > _TINY),
    ),
    _Rule(
        ProxQP,
        "fast for dense quadratic programs on few cores",
        lambda program: program.few_cores and program.is_dense and not program.is_linear,
    ),
    _Rule(
        DAQP,
        "fast for dense quadratic programs",
        lambda program: program.is_filled and not program.is_linear and program.size <= _MIDDLE,
    ),
    _Rule(
        HiGHS,
        "fast for linear programs without an added quadratic term",
        lambda program: program.simplex and program.size > _MINUTE,
    ),
    _Rule(Clarabel, "fast for tiny programs", lambda program: program.size <= _MINUTE),
    _Rule(
        SCS,
        "fast for small quadratic programs",
        lambda program: program.is_curved and program.on_cpu and program.size <= _SMALL,
    ),
    _Rule(
        InteriorPoint,
        "fast for dense programs in batches",
        lambda program: program.is_dense and program.size <= _LARGE and program.on_cpu,
    ),
)


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
