"""The judge in its quick form, and whether the judge itself is right.

``python -m tests.judge --family redundant --count 10000`` is the long form.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import cvxpy as cp
import numpy as np
import pytest

from lpgd import ImplicitKKT
from lpgd.cones.projections import distance
from lpgd.status import Status
from tests.judge import judge as judging
from tests.judge.cone_points import STATES, Block, draw_pair, rows_of
from tests.judge.families import CHUNK, FAMILIES, Trial, draw_trial
from tests.judge.front_ends import FRONT_ENDS, Stated, leaves_of
from tests.judge.programs import ORDER, Programs, cones_of, row_starts
from tests.judge.references import Gradients, Reference
from tests.judge.restatements import MODIFICATIONS

SOLVABLE = [family for family in FAMILIES if family != "certificates"]


def close_to_zero(values: Any, scale: float = 1.0) -> None:
    np.testing.assert_allclose(values, 0.0, atol=1e-12 * scale)


PAIRS = [(kind, state) for kind in ORDER for state in STATES if kind not in ("zero", "nonnegative") or state != "edge"]


@pytest.mark.parametrize(("kind", "state"), PAIRS)
def test_pairs_are_complementary_and_move_along_the_cone(kind: str, state: str) -> None:
    rng = np.random.default_rng(5)
    block = Block(kind, state, size=3, rank=2, exponent=0.3)
    cones, pair = cones_of([block]), draw_pair(rng, block, 20)
    close_to_zero(distance(cones, pair.s))
    close_to_zero(distance(cones, pair.y, dual=True))
    close_to_zero((pair.s * pair.y).sum(1))
    assert pair.normals.shape == (20, block.active if kind != "zero" else 1, rows_of(block))
    # A change of s that keeps to the normals' null space, with the change of y that belongs to it, is complementary
    # up to second order: halving the step must quarter the violation, which is that of a first-order change otherwise.
    change = rng.normal(size=pair.s.shape)
    change -= np.einsum(
        "brd,br->bd", np.linalg.pinv(pair.normals).swapaxes(1, 2), np.einsum("brd,bd->br", pair.normals, change)
    )
    turn = -np.einsum("bde,be->bd", pair.curvature, change)

    def violation(step: float) -> float:
        s, y = pair.s + step * change, pair.y + step * turn
        parts = [distance(cones, s), distance(cones, y, dual=True) if kind != "zero" else 0.0 * s[:, 0], (s * y).sum(1)]
        return float(np.abs(parts).max())

    assert violation(1e-4) <= 0.3 * violation(2e-4) + 1e-14


@pytest.mark.parametrize("family", SOLVABLE)
def test_planted_solutions_satisfy_the_optimality_conditions(family: str) -> None:
    for chunk in range(12):
        programs = draw_trial(family, 3, chunk).programs
        size = max(1.0, float(np.abs(programs.y).max(initial=0.0)), float(np.abs(programs.P).max()))
        x, y, z = programs.x, programs.y, programs.z
        slack = programs.b - np.einsum("bmn,bn->bm", programs.A, x)
        left = np.einsum("bij,bj->bi", programs.P, x) + programs.q + np.einsum("bmn,bm->bn", programs.A, y) + z
        close_to_zero(left, size)
        close_to_zero(distance(programs.cones, slack))
        close_to_zero(distance(programs.cones, y, dual=True), size)
        close_to_zero((slack * y).sum(1), size)
        assert (x >= programs.lower - 1e-12).all()
        assert (x <= programs.upper + 1e-12).all()
        gap = np.where(z > 0, programs.upper - x, np.where(z < 0, x - programs.lower, 0.0))
        close_to_zero(gap)
        close_to_zero(np.einsum("brm,brn->bmn", programs.factor, programs.factor) - programs.P, size)


def test_certificates_prove_what_they_say() -> None:
    seen = Counter()
    for chunk in range(40):
        trial = draw_trial("certificates", 3, chunk)
        programs = trial.programs
        seen[trial.verdict] += 1
        if trial.verdict is Status.INFEASIBLE:
            close_to_zero(distance(programs.cones, programs.y, dual=True), 10.0)
            close_to_zero(np.einsum("bmn,bm->bn", programs.A, programs.y) + programs.z, 10.0)
            bound = np.where(programs.z > 0, programs.upper, np.where(programs.z < 0, programs.lower, 0.0))
            assert np.isfinite(bound).all()
            value = (programs.b * programs.y).sum(1) + (bound * programs.z).sum(1)
            np.testing.assert_allclose(value, -1.0, rtol=1e-10)
            continue
        if trial.verdict is Status.NOT_CONVEX:
            assert (np.linalg.eigvalsh(programs.P)[:, 0] < -0.01 * np.abs(programs.P).max(axis=(1, 2))).all()
            continue
        ray = programs.x
        close_to_zero(np.einsum("bij,bj->bi", programs.P, ray), 10.0)
        close_to_zero(distance(programs.cones, -np.einsum("bmn,bn->bm", programs.A, ray)), 10.0)
        np.testing.assert_allclose((programs.q * ray).sum(1), -1.0, rtol=1e-10)
        assert (ray[np.isfinite(programs.lower)] >= 0).all()
        assert not np.isfinite(programs.upper).any()
    assert set(seen) == {Status.INFEASIBLE, Status.UNBOUNDED, Status.NOT_CONVEX}


@pytest.mark.parametrize("family", ["redundant", "scales"])
def test_statements_have_the_same_solutions(family: str) -> None:
    """The planted x is feasible in every statement, and the planted multipliers are a statement's: those of repeated
    rows at the first of them, others zero."""
    for chunk in range(25):
        trial = draw_trial(family, 4, chunk)
        programs, statement = trial.programs, trial.statement
        for with_bounds in (True, False):
            stated = Stated(trial, with_bounds)
            data = {name: part.numpy() for name, part in stated.data(leaves_of(trial)).items()}
            D, c, sigma = statement.variables, statement.units[:, None], statement.objective[:, None]
            x = c * programs.x / D
            rows = np.abs(data["A"] * x[:, None, :]).sum(2) + np.abs(data["b"]) + np.finfo(float).tiny
            slack = data["b"] - np.einsum("bmn,bn->bm", data["A"], x)
            # In units of their own, which a cone's rows share.
            start = 0
            for block in stated.statement.blocks:
                stop = start + rows_of(block)
                unit = rows[:, start:stop].max(axis=1, keepdims=True)
                close_to_zero(distance(cones_of([block]), slack[:, start:stop] / unit), 10.0)
                start = stop
            left = np.einsum("bij,bj->bi", data["P"], x) + data["q"]
            own = np.einsum("bij,bj->bi", programs.P, programs.x) + programs.q
            np.testing.assert_allclose(left / (sigma * c * D), own, atol=1e-11 * max(1.0, float(np.abs(own).max())))


def test_every_modification_and_every_cone_occurs() -> None:
    trials = [draw_trial("redundant", 0, chunk) for chunk in range(100)]
    assert {change.__name__ for change in MODIFICATIONS} == {note for trial in trials for note in trial.statement.notes}
    assert set(ORDER) == {block.kind for trial in trials for block in trial.statement.blocks}
    assert {"lp", "qp", "conic"} == {trial.programs.plan.kind for trial in trials}


def independent_solution(programs: Programs, element: int, change: Gradients, step: float) -> Any:
    """x of one program whose data moved, by CVXPY and Clarabel, without this library.

    Dual cones are written as what they are: (u, v, w) is in the dual exponential cone if (u - v, -u, w) is in the
    exponential one, and in the dual power cone if (u / a, v / (1 - a), w) is in the power cone.
    """
    P, q, A, b = (getattr(programs, name)[element] + step * getattr(change, name)[element] for name in "PqAb")
    moved = step * change.bounds[element] * programs.active
    lower, upper = programs.lower[element] + moved, programs.upper[element] + moved
    x = cp.Variable(programs.plan.n)
    slack, constraints = b - A @ x, []
    for block, start in zip(programs.plan.blocks, row_starts(programs.plan.blocks), strict=True):
        part = slack[start : start + rows_of(block)]
        a = block.exponent
        if block.kind == "zero":
            constraints.append(part == 0)
        elif block.kind == "nonnegative":
            constraints.append(part >= 0)
        elif block.kind == "second_order":
            constraints.append(cp.SOC(part[0], part[1:]))
        elif block.kind == "semidefinite":
            matrix, place = [[None] * block.size for _ in range(block.size)], 0
            for j in range(block.size):
                for i in range(j, block.size):
                    matrix[i][j] = matrix[j][i] = part[place] * (1.0 if i == j else np.sqrt(0.5))
                    place += 1
            constraints.append(cp.bmat(matrix) >> 0)
        elif block.kind == "exponential":
            constraints.append(cp.ExpCone(part[0], part[1], part[2]))
        elif block.kind == "dual_exponential":
            constraints.append(cp.ExpCone(part[0] - part[1], -part[0], part[2]))
        elif block.kind == "power":
            constraints.append(cp.PowCone3D(part[0], part[1], part[2], a))
        else:
            constraints.append(cp.PowCone3D(part[0] / a, part[1] / (1 - a), part[2], a))
    for bound, sign in ((lower, 1.0), (upper, -1.0)):
        index = np.flatnonzero(np.isfinite(bound))
        if index.size:
            constraints.append(sign * (x[index] - bound[index]) >= 0)
    objective = q @ x + (0.5 * cp.quad_form(x, cp.psd_wrap(P)) if P.any() else 0.0)
    tight = {name: 1e-11 for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas")}
    cp.Problem(cp.Minimize(objective), constraints).solve("CLARABEL", **tight)
    return x.value


def tangent_of(rng: np.random.Generator, programs: Programs) -> Gradients:
    n, m = programs.plan.n, programs.cones.rows
    root = rng.normal(size=(len(programs), n, n))
    P = (root + root.swapaxes(1, 2)) @ programs.P
    P = P + P.swapaxes(1, 2) if programs.P.any() else 0.0 * root
    return Gradients(P, *(rng.normal(size=(len(programs), *shape)) for shape in ((n,), (m, n), (m,), (n,))))


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")  # of 1e-11, which is asked for
@pytest.mark.parametrize("kind", ["polyhedral", *ORDER[2:]])
def test_references_equal_finite_differences_of_an_independent_solver(kind: str) -> None:
    """Central differences of two steps, extrapolated: noise is that of Clarabel's solutions (1e-6) over the step."""
    rng = np.random.default_rng(8)
    checked = 0
    for chunk in range(200):
        programs = draw_trial("redundant", 11, chunk).programs
        kinds = {block.kind for block in programs.plan.blocks if block.state == "edge"}
        # P may be singular: a tangent of it must keep it positive semidefinite, so it is left alone.
        if (kind not in kinds) if kind != "polyhedral" else not programs.cones.is_polyhedral:
            continue
        tangent = replace(tangent_of(rng, programs), P=0.0 * programs.P)
        if programs.plan.strict:
            tangent = tangent_of(rng, programs)
        expected = Reference(programs).change(tangent)
        element = int(rng.integers(CHUNK))
        size = max(1.0, float(np.abs(expected[element]).max()))
        step = 4e-3 / size
        try:
            ends = [independent_solution(programs, element, tangent, by * step) for by in (1.0, -1.0, 2.0, -2.0)]
        except cp.SolverError:
            continue
        if any(end is None for end in ends):
            continue
        found = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / (12 * step)
        np.testing.assert_allclose(found, expected[element], atol=2e-3 * size)
        checked += 1
        if checked == 3:
            break
    assert checked == 3


def test_gradients_are_the_adjoint_of_changes() -> None:
    rng = np.random.default_rng(9)
    for chunk in range(10):
        programs = draw_trial("redundant", 12, chunk).programs
        reference, tangent = Reference(programs), tangent_of(rng, programs)
        weights = rng.normal(size=programs.x.shape)
        gradients = reference.gradients(weights)
        found = sum(
            (part * getattr(tangent, name)).reshape(CHUNK, -1).sum(1) for name, part in gradients.parts().items()
        )
        expected = (weights * reference.change(tangent)).sum(1)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-8)


def test_a_chunk_is_the_same_whenever_it_is_drawn() -> None:
    first, second = (draw_trial("redundant", 0, 3) for _ in range(2))
    np.testing.assert_array_equal(first.programs.q, second.programs.q)
    assert str(first) == str(second)


@dataclass(frozen=True)
class Distorted(ImplicitKKT):
    """A gradient that is off by one part in a hundred, in every third element."""

    def vjp(self, solution: Any, cotangent: Any, solver: Any, executor: Any = None) -> Any:
        gradient, info = super().vjp(solution, cotangent, solver, executor)
        q = gradient.q.clone()
        q[::3] *= 1.01
        return gradient._replace(q=q), info


def test_the_judge_sees_wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(judging.METHODS, "implicit", judging.Method(Distorted()))
    tally = judging.Tally()
    list(judging.judge("strict", CHUNK, 0, 0, ("program",), ("default",), ("implicit",), tally))
    counts = tally.counts["strict", "program", "default", "implicit"]
    assert counts["wrong gradient"] == len(range(0, CHUNK, 3))
    assert all(finding.index % 3 == 0 for finding in tally.findings)


def test_the_judge_sees_wrong_verdicts_and_solutions() -> None:
    trial = draw_trial("strict", 0, 1)
    moved = replace(trial.programs, x=trial.programs.x + 0.01)
    for wrong, outcome in ((replace(trial, programs=moved), "wrong x"), (_infeasible(trial), "wrong status")):
        tally = judging.Tally()
        judging.judge_trial(wrong, tally, ("conic",), ("default",), ("implicit",))
        assert tally.total(outcome) == CHUNK


def _infeasible(trial: Trial) -> Trial:
    """The trial of infeasible programs, with the claim that they have solutions."""
    chunk = next(i for i in range(99) if draw_trial("certificates", 0, i).verdict is Status.INFEASIBLE)
    return replace(draw_trial("certificates", 0, chunk), verdict=Status.SOLVED, seed=trial.seed)


QUICK = {"redundant": 75, "compact": 50, "strict": 50, "scales": 75, "certificates": 75}
"""How many programs are judged here."""


def complaints(tally: judging.Tally, family: str) -> list[str]:
    unwanted = {*judging.SILENT, *({"failed"} if family in ("compact", "strict") else ())}
    return [
        f"{finding.what} {finding.where}: {finding.detail}  {finding.command}"
        for finding in tally.findings
        if finding.what in unwanted
    ]


@pytest.mark.parametrize("front_end", list(FRONT_ENDS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_nothing_is_silently_wrong_by_default(family: str, front_end: str) -> None:
    tally = judging.Tally(keep=1)
    list(judging.judge(family, QUICK[family], 20, 0, (front_end,), ("default",), tally=tally))
    assert tally.counts
    assert complaints(tally, family) == []


@pytest.mark.parametrize("family", list(FAMILIES))
def test_no_solver_is_silently_wrong(family: str) -> None:
    """One chunk of each solver's programs, through one front-end and by the exact gradient."""
    tally = judging.Tally(keep=1)
    list(judging.judge(family, 2 * CHUNK, 21, 0, ("conic",), methods=("implicit",), tally=tally))
    assert complaints(tally, family) == []
