"""Which solver is chosen, what is said of one that is missing, and options."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from lpgd import (
    DAQP,
    ECOS,
    OSQP,
    PIQP,
    SCS,
    Clarabel,
    HiGHS,
    InteriorPoint,
    MissingPackageError,
    Moreau,
    available,
)
from lpgd.cones.product import Cones
from lpgd.execution.tasks import core_count
from lpgd.problems import ConicStructure, SparsityPattern
from lpgd.solvers import SOLVERS, Situation, choose_solver, preference
from tests.problem_table import CASES
from tests.solver_table import SOLVER_TABLE
from tests.test_solvers import LARGE


def test_a_missing_package_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name == "ecos":
            raise ModuleNotFoundError(name)
        return original(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    case = next(case for case in CASES if case.name == "socp")
    with pytest.raises(MissingPackageError, match="pip install ecos"):
        choose_solver(case.problem.structure, "ECOS")
    with pytest.raises(MissingPackageError, match="pip install ecos"):
        ECOS().solve(case.problem)
    for solver in SOLVERS:
        monkeypatch.setattr(solver, "is_installed", classmethod(lambda cls: False))
    with pytest.raises(
        MissingPackageError, match="pip install clarabel or pip install scs or pip install moreau or pip install ecos"
    ):
        choose_solver(case.problem.structure)


def test_solvers_are_chosen_by_what_they_can_do() -> None:
    structures = {case.name: case.problem.structure for case in CASES}
    assert available() == tuple(solver.name for solver in SOLVERS if solver.is_installed())
    assert {row.solver.name for row in SOLVER_TABLE} == {solver.name for solver in SOLVERS}
    assert available(structures["sdp"]) == ("CLARABEL", "SCS", "MOREAU")
    assert available(structures["dual exponential"]) == ("SCS",)
    assert choose_solver(structures["qp"]).name == "CLARABEL"
    assert choose_solver(structures["dual power"]).name == "SCS"
    assert choose_solver(structures["qp"], "scs", {"eps": 1e-3, "max_iters": 7}) == SCS(
        tolerance=1e-3, max_iterations=7
    )
    with pytest.raises(ValueError, match=r"ECOS has no semidefinite cone; installed solvers .*: CLARABEL, SCS"):
        choose_solver(structures["sdp"], "ECOS")
    with pytest.raises(
        ValueError,
        match="'GUROBI' is not a solver of this library; the solvers are CLARABEL, SCS, INTERIOR, DAQP",
    ):
        choose_solver(structures["qp"], "GUROBI")
    with pytest.raises(
        TypeError, match=r"'epsilon' is not an option of SCS; its options are: acceleration_interval, .*eps"
    ):
        choose_solver(structures["qp"], "SCS", {"epsilon": 1e-3})


def dense(n: int, rows: int) -> ConicStructure:
    return ConicStructure(SparsityPattern.dense(n, n), SparsityPattern.dense(rows, n), Cones(nonnegative=rows))


def test_a_known_situation_chooses_by_class_size_and_device() -> None:
    structures = {case.name: case.problem.structure for case in CASES}
    large, cpu = LARGE.problem.structure, Situation()
    assert preference(structures["qp"], cpu)[:2] == (DAQP, Moreau)
    assert choose_solver(structures["qp"], situation=cpu) == DAQP()
    assert choose_solver(structures["qp"], situation=Situation("cuda")).name == "INTERIOR"
    assert choose_solver(structures["socp"], situation=Situation("cuda")).name == "CLARABEL"
    assert choose_solver(large, situation=cpu).name == "INTERIOR"  # a dense linear program
    n, rows = 1000, np.arange(1000)
    sparse = ConicStructure(SparsityPattern.empty(n, n), SparsityPattern((n, n), rows, rows), Cones(nonnegative=n))
    assert choose_solver(sparse, situation=Situation(augmented=False)).name == "HIGHS"
    assert choose_solver(sparse, situation=Situation(augmented=True)).name in ("PIQP", "CLARABEL")
    # Rows of neighbours along a chain, or of any three variables, whose factors fill up.
    chain, ends = SparsityPattern((n, n), rows, rows), np.repeat(rows[:600], 3)
    near, far = ends + np.tile([0, 1, 2], 600), np.random.default_rng(0).integers(0, n, 1800)
    for columns, first in ((near, (PIQP, Clarabel)), (far, (OSQP,))):
        joined = scipy.sparse.csc_array((np.ones(1800), (ends, columns)), shape=(600, n))
        structure = ConicStructure(chain, SparsityPattern.from_matrix(joined), Cones(nonnegative=600))
        assert preference(structure, cpu)[0] in first
    program = dense(100, 120)
    assert preference(program, cpu)[0] is DAQP
    assert preference(dense(200, 240), cpu)[0] is DAQP
    # CVXPY's form of the first: the squares are variables, and P their half of the diagonal.
    epigraph = ConicStructure(
        SparsityPattern((100, 100), rows[50:100], rows[50:100]), program.constraint, program.cones
    )
    assert preference(epigraph, cpu)[0] is DAQP
    assert preference(dense(1000, 1200), cpu)[0] is DAQP
    # The same of more variables: a hundred rows of 200 go to DAQP, of 600 to the interior-point method.
    for wide, first in ((300, DAQP), (700, InteriorPoint)):
        squares = SparsityPattern((wide, wide), rows[:100], rows[:100])
        full = SparsityPattern.from_matrix(scipy.sparse.csc_array(np.ones((100, wide))))
        assert preference(ConicStructure(squares, full, Cones(zero=100)), cpu)[0] is first
    # A diagonal objective, bounds and few rows: a projection onto a simplex.
    simplex = SparsityPattern.from_matrix(scipy.sparse.csc_array(np.ones((1, n))))
    projection = ConicStructure(chain, simplex, Cones(zero=1), lower_index=np.arange(n))
    assert preference(projection, cpu)[0] is InteriorPoint
    boxed = dataclasses.replace(dense(250, 1), lower_index=np.arange(250))
    assert choose_solver(boxed, situation=cpu) == (PIQP() if PIQP.is_installed() and core_count() <= 4 else DAQP())
    # Few of the bounds are active beside many inequalities.
    assert choose_solver(dataclasses.replace(dense(250, 125), lower_index=np.arange(250)), situation=cpu) == DAQP()
    assert preference(dataclasses.replace(dense(600, 1), lower_index=np.arange(600)), cpu)[:2] in (
        (PIQP, InteriorPoint),
        (InteriorPoint, DAQP),
    )
    # Scenarios with a variable of their own each, a seventh of A filled: no dense linear program.
    joined = scipy.sparse.hstack([np.ones((201, 31)), scipy.sparse.eye_array(201)])
    scenarios = ConicStructure(
        SparsityPattern.empty(232, 232), SparsityPattern.from_matrix(joined.tocsc()), Cones(nonnegative=201)
    )
    assert preference(scenarios, Situation(augmented=False))[0] is HiGHS
    # Huber's function of a full matrix, each residual with variables and rows of its own; and a few factors of many.
    eye, full, nothing = scipy.sparse.eye_array(100), np.ones((100, 100)), scipy.sparse.csc_array((100, 100))
    blocks = [[full, eye, eye, nothing], [nothing, nothing, eye, -eye], [nothing, nothing, -eye, -eye]]
    residuals = SparsityPattern.from_matrix(scipy.sparse.block_array(blocks, format="csc"))
    squares = SparsityPattern((400, 400), rows[100:200], rows[100:200])
    kernel = SparsityPattern.from_matrix(scipy.sparse.block_diag([full, eye, nothing, nothing]).tocsc())
    for quadratic, first in ((squares, (PIQP, Clarabel)), (kernel, (SCS,))):
        structure = ConicStructure(quadratic, residuals, Cones(zero=100, nonnegative=200))
        assert preference(structure, cpu)[0] in first
    for structure in structures.values():
        assert set(preference(structure, cpu)) == set(SOLVERS)
        assert preference(structure, cpu)[-1] is ECOS


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"max_iterations": 0}, {"time_limit": -1.0}])
def test_options_are_validated(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Clarabel(**options)


def test_options_are_checked_without_postponed_annotations_too() -> None:
    fields = [("depth", int, 3), ("width", float | None, None)]
    kind: Any = dataclasses.make_dataclass("Deep", fields, bases=(Clarabel,), frozen=True)
    assert kind(depth=4).depth == 4
    with pytest.raises(TypeError, match="depth of CLARABEL is 'a'; it must be a whole number"):
        kind(depth="a")
    with pytest.raises(TypeError, match="width of CLARABEL is 'b'; it must be a number or None"):
        kind(width="b")
