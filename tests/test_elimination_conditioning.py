"""Squares that would lose digits are not formed: an ill-conditioned F is solved as the whole program."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import lpgd
from lpgd.arrays import FloatArray
from lpgd.layers.cvxpy.conditioning import Conditioning
from lpgd.problems.conic.sparsity import SparsityPattern
from tests.layer_cases import close, leaf, normal

# An active-set method gives ill-conditioned programs up, and the next solver takes over: with and without elimination.
pytestmark = pytest.mark.filterwarnings("ignore::lpgd.LpgdWarning")

ROWS, COLUMNS = 10, 6
WEIGHTS = np.linspace(-1.0, 1.0, COLUMNS)


def matrix(condition: float, seed: int = 0) -> FloatArray:
    """(10, 6) with singular values from 1 down to 1 / condition, in directions that are no unit vectors."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((ROWS, COLUMNS)))[0]
    right = np.linalg.qr(generator.standard_normal((COLUMNS, COLUMNS)))[0]
    return left * np.geomspace(1, 1 / condition, COLUMNS) @ right.T


def layer(eliminate: bool = True, constraints: bool = False, **options: Any) -> lpgd.CvxpyLayer:
    x, F, g = cp.Variable(COLUMNS), cp.Parameter((ROWS, COLUMNS)), cp.Parameter(ROWS)
    limits: list[Any] = [cp.sum(x) == 1, x <= 2] if constraints else []
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g)), limits)
    return lpgd.CvxpyLayer(problem, [F, g], [x], eliminate=eliminate, **options)


def fell_back(output: Any) -> bool:
    return output.info.solution.problem.structure.n == ROWS + COLUMNS


def exactly(F: FloatArray, g: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """x = argmin |F x - g|² and the gradients of WEIGHTS·x: in rational numbers, from the entries of F and g."""
    rows = [[Fraction(value) for value in row] for row in F.tolist()]
    right = [Fraction(value) for value in g.tolist()]
    square = [[sum((r[i] * r[j] for r in rows), Fraction(0)) for j in range(COLUMNS)] for i in range(COLUMNS)]
    slope = [sum((r[i] * v for r, v in zip(rows, right, strict=True)), Fraction(0)) for i in range(COLUMNS)]
    x, u = (_solved(square, b) for b in (slope, [Fraction(w) for w in WEIGHTS.tolist()]))
    left = [v - sum((a * b for a, b in zip(r, x, strict=True)), Fraction(0)) for r, v in zip(rows, right, strict=True)]
    moved = [sum((a * b for a, b in zip(r, u, strict=True)), Fraction(0)) for r in rows]
    by_F = [[float(p * a - q * b) for a, b in zip(u, x, strict=True)] for p, q in zip(left, moved, strict=True)]
    return np.array([float(v) for v in x]), np.array(by_F), np.array([float(v) for v in moved])


def _solved(square: list[list[Fraction]], right: list[Fraction]) -> list[Fraction]:
    table = [[*row, value] for row, value in zip(square, right, strict=True)]
    for pivot in range(len(table)):
        head = [value / table[pivot][pivot] for value in table[pivot]]
        table = [
            head if i == pivot else [a - row[pivot] * b for a, b in zip(row, head, strict=True)]
            for i, row in enumerate(table)
        ]
    return [row[-1] for row in table]


def errors(own: lpgd.CvxpyLayer, F: FloatArray, g: FloatArray) -> tuple[list[float], bool]:
    leaves = [leaf(torch.from_numpy(value)) for value in (F, g)]
    output = own(*leaves)
    found = [output[0], *torch.autograd.grad((torch.from_numpy(WEIGHTS) * output[0]).sum(), leaves)]
    pairs = [(value.detach().numpy(), exact) for value, exact in zip(found, exactly(F, g), strict=True)]
    return [float(np.abs(value - exact).max() / np.abs(exact).max()) for value, exact in pairs], fell_back(output)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8])
def test_solutions_and_gradients_are_as_good_as_those_of_the_whole_program(condition: float, seed: int) -> None:
    F, g = matrix(condition, seed), np.random.default_rng(9 + seed).standard_normal(ROWS)
    (own, is_whole), (whole, _) = (errors(layer(eliminate), F, g) for eliminate in (True, False))
    assert is_whole == (condition > 300)
    for error, reference in zip(own, whole, strict=True):
        assert error <= max(10 * reference, 1e-11)
    if condition <= 1e5:
        assert max(own) < 1e-8


@pytest.mark.parametrize("constraints", [False, True])
def test_units_of_variables_do_not_matter(constraints: bool) -> None:
    F = normal(ROWS, COLUMNS) * torch.logspace(-4, 4, COLUMNS, dtype=torch.float64)
    output = layer(constraints=constraints)(F, normal(ROWS, seed=1))
    assert not fell_back(output)
    if not constraints:
        scale = torch.logspace(-4, 4, COLUMNS, dtype=torch.float64)
        expected = np.linalg.lstsq(normal(ROWS, COLUMNS).numpy(), normal(ROWS, seed=1).numpy(), rcond=None)[0]
        close([output[0] * scale], [torch.from_numpy(expected)], 1e-11)


def test_a_column_of_zeros_is_exact() -> None:
    F = normal(ROWS, COLUMNS)
    F[:, 2] = 0
    output = layer(constraints=True)(F, normal(ROWS, seed=1))
    assert not fell_back(output)


def test_directions_that_equalities_forbid_need_no_curvature() -> None:
    F = normal(ROWS, COLUMNS)
    F = F - F.mean(-1, keepdim=True)  # F (1, ..., 1) = 0, and the sum of x is fixed
    assert not fell_back(layer(constraints=True)(F, normal(ROWS, seed=1)))
    x, H = cp.Variable(COLUMNS), cp.Parameter((ROWS, COLUMNS))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(H @ x - 1)), [x[0] - x[1] == 1, x <= 2, x >= -2])
    output = lpgd.CvxpyLayer(problem, [H], [x], solver="CLARABEL")(F)
    assert fell_back(output)


def test_one_ill_conditioned_element_of_a_batch() -> None:
    F = torch.stack([normal(ROWS, COLUMNS), torch.from_numpy(matrix(1e5)), normal(ROWS, COLUMNS, seed=3)])
    g, own = normal(3, ROWS, seed=1), layer()
    leaves = [leaf(F), leaf(g)]
    output = own(*leaves)
    assert fell_back(output)
    gradients = torch.autograd.grad((torch.from_numpy(WEIGHTS) * output[0]).sum(), leaves)
    for element in range(3):
        single = [leaf(F[element]), leaf(g[element])]
        alone = own(*single)
        assert fell_back(alone) == (element == 1)
        close([output[0][element]], alone, 1e-9)
        parts = torch.autograd.grad((torch.from_numpy(WEIGHTS) * alone[0]).sum(), single)
        close([gradient[element] for gradient in gradients], parts, 1e-9)


def test_solve_warm_starts_and_copies() -> None:
    own, g = layer(constraints=True, solver="SCS"), normal(ROWS, seed=1)
    good, bad = normal(ROWS, COLUMNS), torch.from_numpy(matrix(1e4))
    whole = layer(False, constraints=True, solver="SCS")
    reference = {name: whole(F, g)[0] for name, F in (("good", good), ("bad", bad))}
    assert own.solve(bad, g).problem.structure.digest == own.solve(good, g).problem.structure.digest
    for start in (own(good, g), own(bad, g), own.solve(good, g), own.solve(bad, g), True):
        for name, F in (("good", good), ("bad", bad)):
            output = own(F, g, warm_start=start)
            assert fell_back(output) == (name == "bad")
            close(output, [reference[name]], 1e-6)
    for again in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        close(again(bad, g), [reference["bad"]], 1e-6)


def test_the_whole_program_has_a_choice_of_its_own() -> None:
    x, F = cp.Variable(220), cp.Parameter((400, 220))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - 1)), [x >= 0])
    own, whole = (lpgd.CvxpyLayer(problem, [F], [x], eliminate=eliminate) for eliminate in (True, False))
    value = normal(400, 220)
    value[:, 1] = value[:, 0] + 1e-6 * value[:, 1]
    assert own(value).info.solver == whole(value).info.solver
    assert own.solver is not None
    assert whole.solver is not None
    assert own.solver.name != whole.solver.name


def test_constant_squares_are_judged_once() -> None:
    for condition, size in ((10.0, COLUMNS), (1e4, ROWS + COLUMNS)):
        x, g = cp.Variable(COLUMNS), cp.Parameter(ROWS)
        problem = cp.Problem(cp.Minimize(cp.sum_squares(matrix(condition) @ x - g)))
        assert lpgd.CvxpyLayer(problem, [g], [x]).structure.n == size


def test_second_derivatives_are_refused() -> None:
    leaves = [leaf(torch.from_numpy(matrix(1e4))), leaf(normal(ROWS, seed=1))]
    (output,) = layer()(*leaves)
    gradients = torch.autograd.grad(output.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(sum((part.sum() for part in gradients), torch.zeros(())), leaves)


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e4])
def test_transforms(condition: float) -> None:
    F, g = torch.from_numpy(matrix(condition)), normal(ROWS, seed=1)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        jacobian = transform(lambda g: layer()(F, g)[0])(g)
        close([jacobian], [torch.from_numpy(np.linalg.pinv(F.numpy()))], 1e-8)


def test_sparse_and_dense_tests_agree() -> None:
    """Chains of differences, whose pivots are all at least ½ while the least eigenvalue is of order 1 / n²."""
    for n, expected in ((200, False), (1500, True)):
        chain = SparsityPattern.from_matrix(sp.eye_array(n) + sp.eye_array(n, k=1) + sp.eye_array(n, k=-1))
        values = torch.from_numpy(np.where(chain.rows == chain.columns, 2.0, -1.0))
        nothing = SparsityPattern((0, n), np.zeros(0, np.int64), np.zeros(0, np.int64))
        test = Conditioning(chain, np.ones(n, dtype=bool), nothing, 0)
        assert test.is_dense == (n == 200)
        least = 1 - np.cos(np.pi / (n + 1))
        assert (least < 1e-5) == expected
        assert test(values, torch.zeros(0, dtype=torch.float64)) == expected
