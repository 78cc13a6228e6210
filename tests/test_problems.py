"""Conic programs: the Lagrangian's derivatives against autograd, tilt and augmentation against their definitions,
reductions against their inverses, sparse operations against dense ones."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lpgd.cones.product import Cones, smat, svec, svec_indices
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern
from lpgd.solvers.backends.cone_form import ConeForm
from lpgd.solvers.backends.forms import (
    IntervalForm,
    IntervalPoint,
    IntervalVectors,
    Matrices,
    RowForm,
    RowPoint,
    Vectors,
)
from tests.problem_table import CASES, Case, planted


def random_point(case: Case, seed: int) -> ConicPoint:
    generator = torch.Generator().manual_seed(seed)
    x, y, z = (torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in case.point)
    bounded = torch.zeros_like(z)
    bounded[:, case.problem.structure.lower_index] = 1.0
    bounded[:, case.problem.structure.upper_index] = 1.0
    return ConicPoint(x, y, z * bounded)


def leaves_of(problem: ConicProblem) -> tuple[ConicProblem, ConicData]:
    leaves = ConicData(*(datum.clone().requires_grad_() for datum in problem.data))
    return replace(problem, data=leaves), leaves


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_gradient_difference_equals_autograd_of_the_lagrangian(case: Case) -> None:
    problem, leaves = leaves_of(case.problem)
    plus, minus = random_point(case, 0), random_point(case, 1)
    weight = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    value = (weight * (problem.lagrangian(plus) - problem.lagrangian(minus))).sum()
    expected = torch.autograd.grad(value, leaves, allow_unused=True)
    gradient = case.problem.gradient_difference(plus, minus, weight)
    for name, ours, theirs in zip(ConicData._fields, gradient, expected, strict=True):
        reference = torch.zeros_like(ours) if theirs is None else theirs
        if name == "P":  # autograd sees every stored entry; ½(x xᵀ) is its symmetric part
            reference = 0.5 * (reference + reference[..., torch.from_numpy(case.problem.structure.transpose_position)])
        torch.testing.assert_close(ours, reference, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_mixed_product_equals_autograd_of_the_gradient(case: Case) -> None:
    problem, leaves = leaves_of(case.problem)
    point = ConicPoint(*(part.requires_grad_() for part in random_point(case, 2)))
    first = torch.autograd.grad(problem.lagrangian(point).sum(), leaves, create_graph=True, allow_unused=True)
    generator = torch.Generator().manual_seed(3)
    tangent = ConicData(*(torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in leaves))
    along = sum((g * t).sum() for g, t in zip(first, tangent, strict=True) if g is not None and g.requires_grad)
    expected = torch.autograd.grad(along, point, allow_unused=True)
    product = case.problem.mixed_product(ConicPoint(*(part.detach() for part in point)), tangent)
    structure = case.problem.structure
    torch.testing.assert_close(product.x, expected[0])
    torch.testing.assert_close(product.y, expected[1] if expected[1] is not None else torch.zeros_like(product.y))
    # The other side's bound does not matter where a multiplier is not zero: compare where the bound exists.
    if structure.has_bounds:
        assert expected[2] is not None
        for index, sign in ((structure.lower_index, -1.0), (structure.upper_index, 1.0)):
            side = torch.zeros_like(product.z, dtype=torch.bool)
            side[:, index] = True
            side &= sign * point.z.detach() > 0
            torch.testing.assert_close(product.z[side], expected[2][side])


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_tilt_adds_its_linear_terms_to_the_lagrangian(case: Case) -> None:
    point, cotangent = random_point(case, 4), random_point(case, 5)
    step = torch.tensor([0.3, 0.5, -0.2, 0.3, 0.5, -0.2], dtype=torch.float64)  # two copies of the batch
    tilted = case.problem.tilt(step, cotangent)
    terms = sum((a * b).sum(-1) for a, b in zip(cotangent, point, strict=True))
    # Shifting a bound by -τ g_z changes L by τ g_z z only where that bound exists.
    structure = case.problem.structure
    missing = torch.zeros_like(point.z)
    for index, sign in ((structure.lower_index, -1.0), (structure.upper_index, 1.0)):
        absent = torch.ones(structure.n, dtype=torch.bool)
        absent[index] = False
        missing += torch.where(absent & (sign * point.z > 0), cotangent.z * point.z, 0.0)
    terms = terms - missing.sum(-1)
    twice = ConicPoint(*(part.repeat(2, 1) for part in point))
    expected = case.problem.lagrangian(point).repeat(2) + step * terms.repeat(2)
    torch.testing.assert_close(tilted.lagrangian(twice), expected)
    # Only linear terms move, and the matrices are the same tensors.
    assert tilted.data.P is case.problem.data.P
    assert tilted.data.A is case.problem.data.A


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_augment_adds_the_proximal_term(case: Case) -> None:
    point, center, rho = random_point(case, 6), random_point(case, 7).x, 0.8
    augmented = case.problem.augment(rho, center)
    proximal = 0.5 * rho * ((point.x - center) ** 2 - center**2).sum(-1)  # up to the constant ½ρ|center|²
    torch.testing.assert_close(augmented.lagrangian(point), case.problem.lagrangian(point) + proximal)
    assert case.problem.augment(0.0, center) is case.problem
    undone = augmented.augment(-rho, center)
    torch.testing.assert_close(undone.lagrangian(point), case.problem.lagrangian(point))


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_select_and_scatter_are_transposes(case: Case) -> None:
    chosen = [2, 0]
    part = case.problem.select(torch.tensor(chosen))
    point = random_point(case, 8)
    rows = point.select(torch.tensor(chosen))
    torch.testing.assert_close(part.lagrangian(rows), case.problem.lagrangian(point)[chosen])
    zero = ConicPoint(*(torch.zeros_like(p) for p in rows))
    gradient = part.gradient_difference(rows, zero, torch.ones(2).double())
    weight = torch.tensor([1.0, 0.0, 1.0]).double()
    everything = case.problem.gradient_difference(point, ConicPoint(*(torch.zeros_like(p) for p in point)), weight)
    for ours, theirs in zip(case.problem.scatter(torch.tensor(chosen), gradient), everything, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_problems_and_structures_survive_copies(case: Case) -> None:
    for other in (copy.deepcopy(case.problem), pickle.loads(pickle.dumps(case.problem))):
        assert other.structure.digest == case.problem.structure.digest
        torch.testing.assert_close(other.lagrangian(case.point), case.problem.lagrangian(case.point))


# -- reductions: optimality conditions hold at the image of a solution, and invert brings it back


def element(case: Case, index: int) -> tuple[Matrices, Vectors, tuple[np.ndarray, ...]]:
    problem = case.problem.select(torch.tensor([index]))
    row = {name: datum.reshape(-1).numpy() for name, datum in problem.data._asdict().items()}
    P = problem.symmetric_P.reshape(-1).numpy()
    finite = np.isfinite(row["lower"]), np.isfinite(row["upper"])
    vectors = Vectors(*(row[name][None] for name in Vectors._fields))
    return Matrices(case.problem.structure, P, row["A"], *finite), vectors, tuple(p[index].numpy() for p in case.point)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_row_form_has_the_same_solution(case: Case) -> None:
    matrices, vectors, (x, y, z) = element(case, 0)
    form, structure = RowForm(matrices), case.problem.structure
    split, bounds = structure.cones.sections["nonnegative"].stop, [z[structure.upper_index], -z[structure.lower_index]]
    rows = np.concatenate([y[:split], *(np.maximum(part, 0.0) for part in bounds), y[split:]])
    own = form.frame.vectors(vectors)
    slack = own.b[0] - form.A @ x
    np.testing.assert_allclose(form.full_P() @ x + own.q[0] + form.A.T @ rows, 0.0, atol=1e-12)
    assert abs(rows @ slack) < 1e-12
    assert (slack[form.bound_rows] >= -1e-12).all()
    back = form.frame.invert(RowPoint(x[None], rows[None], slack[None]), own, matrices.A)
    for ours, theirs in zip(back, (x, y, z, case.problem.slack(case.point.x)[0].numpy()), strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.problem.structure.cones.is_polyhedral], ids=repr)
def test_interval_form_has_the_same_solution(case: Case) -> None:
    matrices, vectors, (x, y, z) = element(case, 0)
    form, structure = IntervalForm(matrices), case.problem.structure
    own = IntervalVectors(*(datum[0] for datum in form.frame.vectors(vectors)))
    np.testing.assert_allclose(form.full_P() @ x + own.q + form.A.T @ y + z, 0.0, atol=1e-12)
    np.testing.assert_array_equal(form.dense_P(), form.full_P().toarray())
    np.testing.assert_array_equal(form.dense_A(), form.A.toarray())
    for multiplier, value, low, high in (
        (y, form.A @ x, own.row_lower, own.row_upper),
        (z, x, own.lower, own.upper),
    ):
        assert (value >= low - 1e-12).all()
        assert (value <= high + 1e-12).all()
        np.testing.assert_allclose(value[multiplier > 1e-9], high[multiplier > 1e-9], atol=1e-12)
        np.testing.assert_allclose(value[multiplier < -1e-9], low[multiplier < -1e-9], atol=1e-12)
    assert np.isfinite(own.lower).sum() == structure.lower_index.size
    assert np.isfinite(own.upper).sum() == structure.upper_index.size
    back = form.frame.invert(IntervalPoint(x[None], y[None], z[None]), form.frame.vectors(vectors), matrices.A)
    for ours, theirs in zip(back, (x, y, z, case.problem.slack(case.point.x)[0].numpy()), strict=True):
        np.testing.assert_allclose(ours[0], theirs, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.problem.structure.quadratic.nnz], ids=repr)
def test_cone_form_has_the_same_solution(case: Case) -> None:
    matrices, vectors, (x, y, z) = element(case, 1)
    rows = RowForm(matrices)
    form = ConeForm(rows)
    q, b = form.vectors(*(datum[0] for datum in rows.frame.vectors(vectors)))
    t = 0.5 * x @ (rows.full_P() @ x)
    slack = b - form.A @ np.append(x, t)
    cone = slack[form.at : form.at + form.cone_size]
    # The epigraph is tight: the point is on the boundary of its cone, whose multiplier is the reflected point.
    assert abs(cone[0] - np.linalg.norm(cone[1:])) < 1e-10 * (1 + cone[0])
    multiplier = 0.5 * np.append(cone[0], -cone[1:])  # its first and last entry add up to 1, the cost of t
    split = case.problem.structure.cones.sections["nonnegative"].stop
    structure = case.problem.structure
    bounds = [np.maximum(z[structure.upper_index], 0.0), np.maximum(-z[structure.lower_index], 0.0)]
    own = np.concatenate([y[:split], *bounds, y[split:]])
    dual = np.concatenate([own[: form.at], multiplier, own[form.at :]])
    np.testing.assert_allclose(q + form.A.T @ dual, 0.0, atol=1e-10)
    back = form.invert(RowPoint(np.append(x, t), dual, slack))
    np.testing.assert_array_equal(back.x, x)
    np.testing.assert_array_equal(back.y, own)


def test_the_cone_form_takes_eigenvalues_below_zero_for_rounding() -> None:
    # Whether an objective is convex is asked before any form is made of it (tests/test_verdicts.py).
    structure = ConicStructure(SparsityPattern.dense(2, 2), SparsityPattern.empty(0, 2), Cones())
    values = np.array([1.0, 0.0, 0.0, -1e-12])
    matrices = Matrices(structure, values, np.zeros(0), np.zeros(0, bool), np.zeros(0, bool))
    assert ConeForm(RowForm(matrices)).cone_size == 3  # one row of the root, and the two of the epigraph


# -- sparse operations


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 5), batch=st.sampled_from([0, 1, 4]), shared=st.booleans(),
    filled=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_sparse_operations_equal_dense_ones(
    rows: int, columns: int, batch: int, shared: bool, filled: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pattern = SparsityPattern.from_matrix(rng.random((rows, columns)) < filled)
    values = torch.from_numpy(rng.normal(size=pattern.nnz if shared else (batch, pattern.nnz)))
    x, y = torch.from_numpy(rng.normal(size=(batch, columns))), torch.from_numpy(rng.normal(size=(batch, rows)))
    dense = pattern.to_dense(values)
    torch.testing.assert_close(pattern.gather(dense), values)
    if batch or shared:
        torch.testing.assert_close(pattern.matvec(values, x), (dense @ x[..., None])[..., 0])
        torch.testing.assert_close(pattern.rmatvec(values, y), (dense.mT @ y[..., None])[..., 0])
    outer = y[:, :, None] * x[:, None, :]
    torch.testing.assert_close(pattern.outer(y, x, None), pattern.gather(outer.sum(0)))
    if batch:
        torch.testing.assert_close(pattern.outer(y, x, batch), pattern.gather(outer))
    if shared:
        np.testing.assert_allclose(pattern.csc(values.numpy()).toarray(), dense.numpy())


def test_repeated_matrices_serve_copies_of_the_batch() -> None:
    pattern = SparsityPattern.from_matrix(np.array([[1, 0, 1], [0, 1, 1]]))
    values, x = torch.randn(2, 4).double(), torch.randn(6, 3).double()
    torch.testing.assert_close(pattern.matvec(values, x), pattern.matvec(values.repeat(3, 1), x))
    y = torch.randn(6, 2).double()
    torch.testing.assert_close(pattern.outer(y, x, 2), pattern.outer(y, x, 6).reshape(3, 2, -1).sum(0))


@given(side=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_svec_is_an_isometry(side: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (m + m.T for m in rng.normal(size=(2, side, side)))
    assert svec(first) @ svec(second) == pytest.approx(np.trace(first @ second))
    np.testing.assert_allclose(smat(svec(first), side), first)
    rows, columns = svec_indices(side)
    assert (rows >= columns).all()


# -- errors


def test_what_does_not_fit_is_refused() -> None:
    case = planted("small", Cones(zero=1), 3, seed=0)
    problem, structure = case.problem, case.problem.structure
    with pytest.raises(ValueError, match=r"q has shape \(3, 2\); expected \(3,\) or \(rows, 3\)"):
        replace(problem, data=problem.data._replace(q=torch.zeros(3, 2).double()))
    with pytest.raises(ValueError, match=r"b is torch\.float32"):
        replace(problem, data=problem.data._replace(b=torch.zeros(1)))
    with pytest.raises(ValueError, match="q has 2 rows, which do not divide the batch of 3"):
        replace(problem, data=problem.data._replace(q=torch.zeros(2, 3).double()))
    with pytest.raises(ValueError, match="the cones have 2 rows, but A has 1"):
        replace(structure, cones=Cones(zero=2))
    with pytest.raises(ValueError, match="both triangles"):
        replace(structure, quadratic=SparsityPattern.from_matrix(np.triu(np.ones((3, 3)))))
    with pytest.raises(ValueError, match=r"lower_index must be increasing and lie in \[0, 3\)"):
        replace(structure, lower_index=np.array([3]))
    with pytest.raises(ValueError, match="unique and sorted column by column"):
        SparsityPattern((2, 2), np.array([0, 0]), np.array([1, 0]))
    with pytest.raises(ValueError, match=r"Cones.zero is -1"):
        Cones(zero=-1)
    with pytest.raises(ValueError, match=r"Cones.power is \(1.0,\)"):
        Cones(power=(1.0,))
    with pytest.raises(TypeError, match=r"Cones.second_order is 3; it takes one entry for each cone, such as \(3,\)"):
        Cones(second_order=3)  # pyright: ignore[reportArgumentType]
    for sizes in ({"zero": 1.5}, {"semidefinite": [2.5]}, {"nonnegative": None}, {"exponential": "a"}):
        with pytest.raises(TypeError, match=rf"Cones.{next(iter(sizes))} is or holds .*; it takes whole numbers"):
            Cones(**sizes)  # pyright: ignore[reportArgumentType]
    assert Cones(nonnegative=np.int64(2), second_order=np.array([3.0])) == Cones(0, 2, (3,))  # pyright: ignore
