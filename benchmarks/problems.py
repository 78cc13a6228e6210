"""The benchmark cases: a CVXPY problem, seeded parameter values, and the loss whose gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cvxpy as cp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.sudoku.data import generate_boards, one_hot
from examples.sudoku.model import CONSTRAINTS

__all__ = ["PROGRAMS", "Instance", "Program"]


@dataclass(frozen=True, eq=False)
class Instance:
    """A problem with values of its parameters, and a loss of its variable.

    Attributes:
        problem: a DPP problem.
        parameters: its parameters.
        variable: what the layers return.
        draw: a seed to a float64 tensor for each parameter, with a leading batch dimension or shared by the batch.
            Each repeat takes another seed, as each step of a training run has other values.
        loss: of the (B, ...) value of the variable; a sum over the batch.
    """

    problem: cp.Problem
    parameters: Sequence[cp.Parameter]
    variable: cp.Variable
    draw: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Program:
    """One problem and the modes in which it is compared.

    Attributes:
        name: for the command line.
        title: for the report.
        build: batch size to instance.
        batch: number of elements, and with ``--quick``.
        modes: (solver, ``"lpgd"`` or ``"exact"``) pairs, with the solver's name as the peer spells it.
        tau, rho: of the LPGD modes. Without augmentation (ρ = 0) both libraries perturb the same problem, whatever
            auxiliary variables they introduce.
        regular: the solution is unique and differentiable: solutions are compared entry by entry, and exact gradients
            with finite differences. Otherwise objectives and violations are compared.
        step: of those differences: the error of the exact solutions over it is the noise.
    """

    name: str
    title: str
    build: Callable[[int], Instance]
    batch: tuple[int, int]
    modes: Sequence[tuple[str, str]]
    tau: float = 0.1
    rho: float = 0.0
    regular: bool = True
    step: float = 1e-4


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))


def _linear_loss(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A fixed random linear functional with entries of order 1."""
    weights = _tensor(np.random.default_rng(0).standard_normal(shape))
    return lambda value: (weights * value).sum()


def _sudoku(order: int, batch: int) -> Instance:
    """The first training step: A uniform on [0, 1), b = A z₀ with z₀ = 1/2, shared by the boards; squared error."""
    rows, entries = CONSTRAINTS[order], order**6
    boards = generate_boards(order, batch, seed=0)
    puzzles, solutions = one_hot(boards.puzzles), one_hot(boards.solutions)
    x = cp.Variable(entries)
    A, b, c = cp.Parameter((rows, entries)), cp.Parameter(rows), cp.Parameter(entries)
    problem = cp.Problem(cp.Minimize(c @ x), [A @ x == b, x >= 0, x <= 1])

    def draw(seed: int) -> tuple[Tensor, ...]:
        A_value = _tensor(np.random.default_rng(seed).random((rows, entries)))
        return A_value, A_value @ torch.full((entries,), 0.5, dtype=torch.float64), -puzzles

    return Instance(problem, (A, b, c), x, draw, lambda value: (value - solutions).square().sum())


def _dense(batch: int) -> Instance:
    """½|R x|² + ⟨q, x⟩ with A x = b and G x ≤ h, every datum a parameter with values for each element."""
    n, equalities, inequalities = 50, 10, 50
    x, R, q = cp.Variable(n), cp.Parameter((n, n)), cp.Parameter(n)
    A, b = cp.Parameter((equalities, n)), cp.Parameter(equalities)
    G, h = cp.Parameter((inequalities, n)), cp.Parameter(inequalities)
    problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(R @ x) + q @ x), [A @ x == b, G @ x <= h])

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        normal = generator.standard_normal
        A_value, G_value = normal((batch, equalities, n)), normal((batch, inequalities, n))
        inside = normal((batch, n, 1))
        slack = generator.uniform(0.0, 1.0, (batch, inequalities))
        return (
            _tensor(np.eye(n) + normal((batch, n, n)) / np.sqrt(n)),
            _tensor(normal((batch, n))),
            _tensor(A_value),
            _tensor((A_value @ inside)[..., 0]),
            _tensor(G_value),
            _tensor((G_value @ inside)[..., 0] + slack),
        )

    return Instance(problem, (R, q, A, b, G, h), x, draw, _linear_loss((batch, n)))


def _portfolio(batch: int) -> Instance:
    """Expected return less risk, a second-order cone of factor and specific parts: fully invested, in [0, 0.2]ⁿ."""
    assets, factors = 50, 10
    weights = cp.Variable(assets)
    mean, loadings, specific = cp.Parameter(assets), cp.Parameter((factors, assets)), cp.Parameter(assets)
    risk = cp.norm2(cp.hstack([loadings @ weights, cp.multiply(specific, weights)]))
    problem = cp.Problem(cp.Minimize(risk - mean @ weights), [cp.sum(weights) == 1, weights >= 0, weights <= 0.2])

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        return (
            _tensor(0.2 * generator.standard_normal((batch, assets))),
            _tensor(generator.standard_normal((batch, factors, assets)) / np.sqrt(factors)),
            _tensor(generator.uniform(0.5, 1.5, (batch, assets))),
        )

    return Instance(problem, (mean, loadings, specific), weights, draw, _linear_loss((batch, assets)))


def _logistic(batch: int) -> Instance:
    """Ridge-regularised logistic regression in a ball; the parameters are samples times labels, and the radius."""
    samples, features = 60, 10
    weights = cp.Variable(features)
    data, radius = cp.Parameter((samples, features)), cp.Parameter(nonneg=True)
    objective = cp.sum(cp.logistic(-data @ weights)) / samples + 0.05 * cp.sum_squares(weights)
    problem = cp.Problem(cp.Minimize(objective), [cp.norm2(weights) <= radius])

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        points = generator.standard_normal((batch, samples, features))
        scores = points @ generator.standard_normal((batch, features, 1))
        labels = np.sign(scores + generator.standard_normal((batch, samples, 1)))
        # Every other ball is small enough to hold the weights back.
        return _tensor(labels * points), _tensor(np.where(np.arange(batch) % 2, 0.5, 5.0))

    return Instance(problem, (data, radius), weights, draw, _linear_loss((batch, features)))


def _semidefinite(batch: int) -> Instance:
    """minimise tr(C X) subject to seven equalities, X in S₊⁸.

    C and the equalities, but for the first, a trace, are random: the solution is strictly complementary and primal
    and dual nondegenerate almost surely (Alizadeh, Haeberly and Overton 1997), hence differentiable.
    """
    side, equalities = 8, 7
    X = cp.Variable((side, side), PSD=True)
    cost, operator, right = cp.Parameter((side, side)), cp.Parameter((equalities, side**2)), cp.Parameter(equalities)
    vector = cp.reshape(X, (side**2,), order="C")
    problem = cp.Problem(cp.Minimize(cp.sum(cp.multiply(cost, X))), [operator @ vector == right])

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)

        def symmetric(*count: int) -> NDArray[np.float64]:
            matrices = generator.standard_normal((*count, side, side))
            return 0.5 * (matrices + matrices.swapaxes(-1, -2))

        matrices = symmetric(batch, equalities)
        matrices[:, 0] = np.eye(side)
        root = generator.standard_normal((batch, side, side))
        inside = np.eye(side) + root @ root.swapaxes(-1, -2) / side
        return (
            _tensor(symmetric(batch)),
            _tensor(matrices.reshape(batch, equalities, side**2)),
            _tensor(np.einsum("bkij,bij->bk", matrices, inside)),
        )

    return Instance(problem, (cost, operator, right), X, draw, _linear_loss((batch, side, side)))


def _nonnegative_least_squares(batch: int) -> Instance:
    """minimise |F x - g|² subject to x ≥ 0; about half of the entries of x are zero."""
    rows, columns = 60, 20
    x = cp.Variable(columns)
    F, g = cp.Parameter((rows, columns)), cp.Parameter(rows)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g)), [x >= 0])

    def draw(seed: int) -> tuple[Tensor, ...]:
        generator = np.random.default_rng(seed)
        return _tensor(generator.standard_normal((batch, rows, columns))), _tensor(
            generator.standard_normal((batch, rows))
        )

    return Instance(problem, (F, g), x, draw, _linear_loss((batch, columns)))


SCS_LPGD, SCS_EXACT = ("SCS", "lpgd"), ("SCS", "exact")
CLARABEL_LPGD, CLARABEL_EXACT, ECOS_EXACT = ("Clarabel", "lpgd"), ("Clarabel", "exact"), ("ECOS", "exact")

_ALL = (
    Program(
        "sudoku4",
        "Sudoku 4×4",
        partial(_sudoku, 2),
        (150, 16),
        (SCS_LPGD, CLARABEL_LPGD, SCS_EXACT),
        rho=0.1,
        regular=False,
    ),
    Program(
        "sudoku9",
        "Sudoku 9×9",
        partial(_sudoku, 3),
        (8, 2),
        (SCS_LPGD, CLARABEL_LPGD, SCS_EXACT),
        rho=0.1,
        regular=False,
    ),
    Program(
        "dense",
        "dense QP n 50 as sum_squares(R @ x)",
        _dense,
        (64, 8),
        (SCS_LPGD, SCS_EXACT, CLARABEL_EXACT),
        tau=1e-3,
    ),
    Program(
        "portfolio",
        "portfolio, second-order cone, n 50",
        _portfolio,
        (32, 8),
        (SCS_EXACT, CLARABEL_EXACT, ECOS_EXACT, SCS_LPGD),
    ),
    Program(
        "logistic",
        "logistic regression, 10 weights, 60 samples",
        _logistic,
        (32, 8),
        (SCS_LPGD, SCS_EXACT, CLARABEL_EXACT, ECOS_EXACT),
        step=1e-3,
    ),
    Program("sdp", "semidefinite program 8×8", _semidefinite, (32, 8), (SCS_EXACT, SCS_LPGD, CLARABEL_EXACT)),
    Program(
        "nnls",
        "nonnegative least squares 60×20",
        _nonnegative_least_squares,
        (32, 8),
        (SCS_LPGD, SCS_EXACT, CLARABEL_EXACT, ECOS_EXACT),
    ),
)
PROGRAMS = {program.name: program for program in _ALL}
