"""Canonical forms against CVXPY itself: same solutions, same multipliers, same optimal values."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable
from dataclasses import fields

import clarabel
import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from lpgd.cones.product import Cones, svec_indices
from lpgd.layers.cvxpy.canonical import canonicalise
from lpgd.layers.cvxpy.layout import CanonicalProgram
from tests.canonical_cases import (
    CASES,
    Case,
    FloatArray,
    geometric,
    lp_box,
    semidefinite,
    structured,
    two_sided,
)


def clarabel_settings() -> clarabel.DefaultSettings:
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.presolve_enable = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-11
    return settings


def theta_of(program: CanonicalProgram, values: list[FloatArray]) -> FloatArray:
    theta = np.full(program.p, np.nan)
    for layout, value in zip(program.parameters, values, strict=True):
        entries = np.asarray(value, dtype=float).reshape(-1)[layout.take]
        theta[layout.columns] = np.log(entries) if layout.log else entries
    return theta


def upper_triangle_order(cones: Cones) -> NDArray[np.int64]:
    """Row i of Clarabel's is this row of ours: it stacks the upper triangle column by column."""
    order = np.arange(cones.rows)
    start = cones.sections["semidefinite"].start
    for side in cones.semidefinite:
        row, column = svec_indices(side)
        order[start : start + row.size] = start + np.lexsort((column, row))
        start += row.size
    return order


def solve_with_clarabel(
    program: CanonicalProgram, theta: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, float]:
    """x, y, signed bound multipliers z and the user's objective, bounds entered as rows."""
    P = program.quadratic.csc(program.P(theta))
    A, b, q = program.constraint.csc(program.A(theta)), program.b(theta), program.q(theta)
    lower, upper = program.lower(theta), program.upper(theta)
    above, below = np.isfinite(lower), np.isfinite(upper)
    order = upper_triangle_order(program.cones)
    identity = sp.eye_array(program.n, format="csr")
    low, high = program.lower_index[above], program.upper_index[below]
    rows = sp.csc_array(sp.vstack([A.tocsr()[order], -identity[low], identity[high]]))
    right = np.concatenate([b[order], -lower[above], upper[below]])
    kinds = [clarabel.ZeroConeT(program.cones.zero), clarabel.NonnegativeConeT(program.cones.nonnegative)]
    kinds += [clarabel.SecondOrderConeT(size) for size in program.cones.second_order]
    kinds += [clarabel.PSDTriangleConeT(side) for side in program.cones.semidefinite]
    kinds += [clarabel.ExponentialConeT() for _ in range(program.cones.exponential)]
    kinds += [clarabel.PowerConeT(exponent) for exponent in program.cones.power]
    kinds.append(clarabel.NonnegativeConeT(low.size + high.size))
    solver = clarabel.DefaultSolver(
        sp.csc_matrix(sp.triu(P)), q, sp.csc_matrix(rows), right, kinds, clarabel_settings()
    )
    result = solver.solve()
    assert str(result.status) in ("Solved", "AlmostSolved")
    x, multipliers = np.array(result.x), np.array(result.z)
    y = np.empty(program.cones.rows)
    y[order] = multipliers[: order.size]
    z = np.zeros(program.n)
    np.subtract.at(z, low, multipliers[order.size : order.size + low.size])
    np.add.at(z, high, multipliers[order.size + low.size :])
    objective = program.sign * (0.5 * x @ P @ x + q @ x + program.offset(theta)[0])
    return x, y, z, objective


def value_of(variable: cp.Variable) -> FloatArray:
    value = variable.value_sparse if variable.attributes["sparsity"] else variable.value
    return value.toarray() if sp.issparse(value) else np.asarray(value, dtype=float)


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_agrees_with_cvxpy(build: Callable[[], Case]) -> None:
    case = build()
    primal = case.problem.variables()
    known = {variable.id for variable in primal}
    dual = [dual for constraint in case.problem.constraints for dual in constraint.dual_variables]
    parameters = list(case.values)[::-1]
    variables = [*dual, *primal]
    program = canonicalise(case.problem, parameters, variables, gp=case.gp)
    theta = theta_of(program, [case.values[parameter] for parameter in parameters])
    x, y, z, objective = solve_with_clarabel(program, theta)
    found = [layout.read(x, y, z) for layout in program.variables]

    settings = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*sparse CVXPY expression")  # CVXPY's own code reads them so
        warnings.filterwarnings("ignore", message="Solution may be inaccurate")  # than 1e-11, that is
        for parameter, value in case.values.items():
            parameter.value = value
        if case.without_quadratics:
            settings["use_quad_obj"] = False
        case.problem.solve(solver=cp.CLARABEL, gp=case.gp, ignore_dpp=True, canon_backend="SCIPY", **settings)
    assert case.problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE)
    assert (np.exp(objective) if case.gp else objective) == pytest.approx(case.problem.value, rel=1e-6, abs=1e-7)
    for variable, value in zip(variables, found, strict=True):
        assert value.shape == variable.shape
        if variable.id in known or case.duals:
            np.testing.assert_allclose(value, value_of(variable), rtol=1e-5, atol=1e-5, err_msg=variable.name())


@pytest.mark.parametrize("build", CASES, ids=lambda build: build.__name__)
def test_maps_have_the_shapes_they_declare(build: Callable[[], Case]) -> None:
    case = build()
    program = canonicalise(case.problem, list(case.values), case.problem.variables(), gp=case.gp)
    m, n, width = program.cones.rows, program.n, program.p + 1
    sizes = {"P": program.quadratic.nnz, "q": n, "A": program.constraint.nnz, "b": m, "offset": 1}
    sizes |= {"lower": program.lower_index.size, "upper": program.upper_index.size}
    assert {name: getattr(program, name).matrix.shape for name in sizes} == {
        name: (size, width) for name, size in sizes.items()
    }
    assert program.quadratic.shape == (n, n)
    assert program.constraint.shape == (m, n)
    for index in (program.lower_index, program.upper_index):
        assert index.dtype == np.int64
        assert np.all(np.diff(index) > 0)
    assert [layout.columns.start for layout in program.parameters] == [
        0, *(layout.columns.stop for layout in program.parameters)
    ][: len(program.parameters)]  # fmt: skip
    P = program.quadratic.csc(program.P(np.random.default_rng(0).standard_normal(program.p)))
    np.testing.assert_array_equal(P.toarray(), P.toarray().T)
    for variable in case.problem.variables():
        assert (variable.value_sparse if variable.attributes["sparsity"] else variable.value) is None
    assert case.problem.status is None
    assert case.problem._cache.key is None


def test_box_leaves_only_the_equalities() -> None:
    case = lp_box()
    A, b, c = case.values
    constraints = case.problem.constraints
    program = canonicalise(case.problem, [c, A, b], [constraints[1].dual_variables[0]])
    assert program.cones == Cones(zero=2)
    np.testing.assert_array_equal(program.lower_index, np.arange(6))
    np.testing.assert_array_equal(program.upper_index, np.arange(6))
    theta = theta_of(program, [case.values[parameter] for parameter in (c, A, b)])
    np.testing.assert_array_equal(program.constraint.csc(program.A(theta)).toarray(), case.values[A])
    np.testing.assert_array_equal(program.b(theta), case.values[b])
    np.testing.assert_array_equal(program.q(theta), case.values[c])
    np.testing.assert_array_equal(program.lower(theta), np.zeros(6))
    np.testing.assert_array_equal(program.upper(theta), np.ones(6))
    assert program.offset(theta) == 3.0
    assert program.quadratic.nnz == 0
    reaching = {name: getattr(program, name).reaching for name in ("P", "q", "A", "b", "lower", "upper", "offset")}
    nothing = frozenset()
    assert reaching == {
        "P": nothing, "q": {0}, "A": {1}, "b": {2}, "lower": nothing, "upper": nothing, "offset": nothing
    }  # fmt: skip


def test_bounds_are_scaled_by_the_coefficient_and_carry_parameters() -> None:
    case = two_sided()
    low, high, c = case.values
    dual = [constraint.dual_variables[0] for constraint in case.problem.constraints]
    program = canonicalise(case.problem, [low, high, c], dual[:2])
    assert program.cones == Cones(zero=1, nonnegative=1)
    theta = theta_of(program, list(case.values.values()))
    np.testing.assert_allclose(program.lower(theta), case.values[low] / 2, rtol=1e-15)
    np.testing.assert_allclose(program.upper(theta), (case.values[high] + 1) / 3, rtol=1e-15)
    assert (program.lower.reaching, program.upper.reaching) == ({0}, {1})
    z = np.array([-2.0, 6.0, 0.0, -1.0, 3.0])
    below, above = (layout.read(np.zeros(program.n), np.zeros(2), z) for layout in program.variables)
    np.testing.assert_allclose(below, [1.0, 0.0, 0.0, 0.5, 0.0])
    np.testing.assert_allclose(above, [0.0, 2.0, 0.0, 0.0, 1.0])


def test_a_second_bound_on_one_side_stays_a_row() -> None:
    x, a, b = cp.Variable(nonneg=True), cp.Parameter(), cp.Parameter()
    program = canonicalise(
        cp.Problem(cp.Minimize(x), [x >= a, x <= b, x <= a + b, 2 * x == b, a * x <= 1]), [a, b], [x]
    )
    assert program.cones == Cones(zero=1, nonnegative=3)
    assert program.lower(np.array([5.0, 7.0])) == 0.0
    assert program.upper(np.array([5.0, 7.0])) == 7.0
    A = program.constraint.csc(program.A(np.array([5.0, 7.0]))).toarray().ravel()
    b_value = program.b(np.array([5.0, 7.0]))
    rows = sorted(zip(A[1:].tolist(), b_value[1:].tolist(), strict=True))
    assert rows == [(-1.0, -5.0), (1.0, 12.0), (5.0, 1.0)]


def test_infinite_bounds_are_data() -> None:
    x = cp.Variable(2)
    constraint = x <= np.array([np.inf, 1.0])
    program = canonicalise(cp.Problem(cp.Maximize(x[1]), [constraint, x >= -1]), [], [constraint.dual_variables[0]])
    assert program.cones == Cones()
    np.testing.assert_array_equal(program.upper(np.zeros(0)), [np.inf, 1.0])
    np.testing.assert_array_equal(program.variables[0].read(np.ones(2), np.zeros(0), np.array([0.0, 3.0])), [0.0, 3.0])


def test_repeated_bounds_share_one_multiplier() -> None:
    rng = np.random.default_rng(0)
    X, C = cp.Variable((3, 3), symmetric=True), cp.Parameter((3, 3))
    constraint = 2 * X >= 0.5
    program = canonicalise(
        cp.Problem(cp.Minimize(cp.sum_squares(X - C)), [constraint]), [C], [constraint.dual_variables[0]]
    )
    assert program.cones.nonnegative == 0
    assert program.lower_index.size == 6
    value = rng.standard_normal((3, 3))
    x, y, z, _ = solve_with_clarabel(program, theta_of(program, [value]))
    # Stationarity in the symmetric matrix: X = max(mean, 1/4) entry by entry, 2 (X - mean) = 2 multiplier.
    mean = (value + value.T) / 2
    np.testing.assert_allclose(program.variables[0].read(x, y, z), np.maximum(0.25 - mean, 0.0), atol=1e-6)


def test_signed_structured_variables_leave_no_rows() -> None:
    X, Y = cp.Variable((3, 3), symmetric=True, nonneg=True), cp.Variable((4, 4), diag=True, nonpos=True)
    program = canonicalise(cp.Problem(cp.Minimize(cp.sum(X) - cp.trace(Y))), [], [X, Y])
    assert (program.n, program.cones) == (10, Cones())
    assert (program.lower_index.size, program.upper_index.size) == (6, 4)


def test_a_parametric_quadratic_form_is_twice_its_matrix() -> None:
    rng = np.random.default_rng(0)
    x, P = cp.Variable(3), cp.Parameter((3, 3), PSD=True)
    program = canonicalise(cp.Problem(cp.Minimize(cp.quad_form(x, P)), [x[0] == 1]), [P], [x])
    root = rng.standard_normal((3, 3))
    value = root @ root.T
    found = program.quadratic.csc(program.P(theta_of(program, [value]))).toarray()
    np.testing.assert_allclose(found, 2 * value, rtol=1e-14)
    assert program.parameters[0].symmetric
    assert program.P.reaching == {0}
    assert program.A.reaching == frozenset()


def test_maximisation_flips_the_objective() -> None:
    x, c = cp.Variable(2), cp.Parameter(2)
    program = canonicalise(cp.Problem(cp.Maximize(c @ x + 4), [x <= 1]), [c], [x])
    assert program.sign == -1.0
    np.testing.assert_array_equal(program.q(np.array([2.0, -3.0])), [-2.0, 3.0])
    assert program.offset(np.array([2.0, -3.0])) == -4.0


def test_parameters_are_read_from_the_entries_that_matter() -> None:
    pattern = [(0, 1, 2), (1, 0, 2)]
    S, D, Q = (
        cp.Parameter((3, 3), symmetric=True),
        cp.Parameter((3, 3), diag=True),
        cp.Parameter((3, 3), sparsity=pattern),
    )
    F, s = cp.Parameter((2, 3)), cp.Parameter(pos=True)
    x = cp.Variable(3)
    problem = cp.Problem(cp.Minimize(cp.sum((S + D + Q) @ x) + s * cp.sum(x)), [F @ x <= 1])
    program = canonicalise(problem, (s, F, Q, D, S), [x])
    taken = {layout.name: set(layout.take.tolist()) for layout in program.parameters}
    assert taken == {
        S.name(): {0, 1, 2, 4, 5, 8}, D.name(): {0, 4, 8}, Q.name(): {1, 3, 8}, F.name(): set(range(6)), s.name(): {0}
    }  # fmt: skip
    np.testing.assert_array_equal(program.parameters[1].take, [0, 3, 1, 4, 2, 5])
    assert program.parameters[0].attributes == {"pos"}
    assert program.parameters[2].attributes == {"sparsity"}


def test_a_parameter_that_reaches_nothing_has_no_columns() -> None:
    x, a, b = cp.Variable(2), cp.Parameter((0,)), cp.Parameter(2)
    program = canonicalise(cp.Problem(cp.Minimize(cp.sum(x)), [x >= b, x[:0] >= a]), [a, b], [x])
    assert program.p == 2
    assert program.parameters[0].take.size == 0
    assert program.lower.reaching == {1}


def test_sudoku_is_quick() -> None:
    x, A, b, c = cp.Variable(729), cp.Parameter((249, 729)), cp.Parameter(249), cp.Parameter(729)
    constraints = [A @ x == b, x >= 0, x <= 1]
    start = time.process_time()
    program = canonicalise(
        cp.Problem(cp.Minimize(c @ x), constraints), [A, b, c], [x, constraints[0].dual_variables[0]]
    )
    assert time.process_time() - start < 5.0
    assert program.cones == Cones(zero=249)
    assert program.constraint.is_dense


@pytest.mark.parametrize("build", [lp_box, semidefinite, geometric, structured], ids=lambda build: build.__name__)
def test_pickle_and_deepcopy(build: Callable[[], Case]) -> None:
    case = build()
    variables = [*case.problem.variables(), *(c.dual_variables[0] for c in case.problem.constraints)]
    program = canonicalise(case.problem, list(case.values), variables, gp=case.gp)
    theta = np.random.default_rng(0).random(program.p)
    stored = pickle.dumps(program)
    assert b"cvxpy" not in stored.replace(b"lpgd.layers.cvxpy.", b"")  # but for the folder of our own
    for twin in (pickle.loads(stored), copy.deepcopy(program)):
        assert (twin.cones, twin.sign, twin.n) == (program.cones, program.sign, program.n)
        for field in fields(program):
            value = getattr(program, field.name)
            if callable(value):
                np.testing.assert_array_equal(getattr(twin, field.name)(theta), value(theta))
                assert getattr(twin, field.name).reaching == value.reaching
        x, y, z = np.ones(program.n), np.ones(program.cones.rows), np.ones(program.n)
        for layout, other in zip(program.variables, twin.variables, strict=True):
            np.testing.assert_array_equal(layout.read(x, y, z), other.read(x, y, z))


def test_the_problem_and_its_values_are_left_alone() -> None:
    case = semidefinite()
    for parameter, value in case.values.items():
        parameter.value = value
    case.problem.solve(solver=cp.CLARABEL)
    variables = [*case.problem.variables(), *(dual for c in case.problem.constraints for dual in c.dual_variables)]
    before = [np.array(variable.value) for variable in variables]
    key, objective = case.problem._cache.key, case.problem.value
    canonicalise(case.problem, list(case.values), variables)
    assert case.problem._cache.key == key
    assert case.problem.value == objective
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.value, value)
    for parameter, value in case.values.items():
        np.testing.assert_array_equal(parameter.value, value)


def rejected(
    objective: cp.Minimize | cp.Maximize, constraints: list[cp.Constraint], **options: bool
) -> Callable[[], object]:
    problem = cp.Problem(objective, constraints)
    return lambda: canonicalise(problem, problem.parameters(), [], **options)


def faults() -> list[tuple[str, Callable[[], object], type[Exception], str]]:
    x, a, b = cp.Variable(2, name="x"), cp.Parameter(2, name="a"), cp.Parameter(2, name="b")
    stranger = cp.Variable(2, name="stranger")
    count = cp.Variable(integer=True, name="count")
    wave, P = cp.Variable(2, complex=True, name="wave"), cp.Parameter((2, 2), PSD=True)
    u, power = cp.Variable(pos=True), cp.Parameter(pos=True, name="power")
    problem = cp.Problem(cp.Minimize(a @ x), [x >= b])
    elsewhere = (x <= 1).dual_variables[0]
    least = cp.Minimize(cp.sum(x))
    idle = cp.Problem(least, [x >= 1, np.zeros((0, 2)) @ stranger == np.zeros(0)])
    return [
        ("problem", lambda: canonicalise(least, [], []), TypeError, "a cvxpy.Problem is needed"),  # pyright: ignore
        ("parameters", lambda: canonicalise(problem, {a, b}, [x]), TypeError, "list or tuple"),  # pyright: ignore
        ("parameter", lambda: canonicalise(problem, [a, b, 3.0], [x]), TypeError, "holds a float"),  # pyright: ignore
        ("missing", lambda: canonicalise(problem, [a], [x]), ValueError, "missing: b"),
        ("extra", lambda: canonicalise(problem, [a, b, P], [x]), ValueError, f"not in the problem: {P.name()}"),
        ("twice", lambda: canonicalise(problem, [a, b, a], [x]), ValueError, "given twice: a"),
        ("variables", lambda: canonicalise(problem, [a, b], x), TypeError, "list or tuple"),  # pyright: ignore
        ("variable", lambda: canonicalise(problem, [a, b], [x >= b]), TypeError, "dual_variables"),  # pyright: ignore
        ("unknown", lambda: canonicalise(problem, [a, b], [stranger]), ValueError, "unknown variable stranger"),
        ("dual", lambda: canonicalise(problem, [a, b], [elsewhere]), ValueError, "nor a dual variable"),
        ("idle", lambda: canonicalise(idle, [], [stranger]), ValueError, "stranger: .* no objective or constraint"),
        ("no variables", rejected(cp.Minimize(0.0), []), ValueError, "no variables"),
        ("integer gp", rejected(cp.Minimize(u), [u >= power, count >= 1], gp=True), ValueError, "cannot have integer"),
        ("complex", rejected(cp.Minimize(cp.norm(wave)), []), ValueError, "wave"),
        ("complex data", rejected(least, [cp.abs((1 + 2j) * x) <= 1]), ValueError, "complex constants"),
        ("not DPP", rejected(cp.Minimize(cp.multiply(a, b) @ x), [x >= 0]), ValueError, "not DPP"),
        ("quad_form", rejected(least, [cp.quad_form(x, P) <= 1]), ValueError, "not in a constraint"),
        ("not convex", rejected(cp.Minimize(cp.sqrt(x[0])), [x >= 0]), ValueError, "not convex"),
        ("not gp", rejected(cp.Minimize(cp.sum(x)), [x >= 1], gp=True), ValueError, "not a geometric program"),
        ("gp", rejected(cp.Minimize(u**0.5 * u), [u >= power]), ValueError, "pass gp=True"),
        ("both", rejected(cp.Minimize(u), [power * u**power >= 2], gp=True), ValueError, "power is both"),
    ]


@pytest.mark.parametrize(("call", "kind", "message"), [pytest.param(*fault[1:], id=fault[0]) for fault in faults()])
def test_errors_say_what_is_wrong(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
