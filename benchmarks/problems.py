"""The benchmark cases: a CVXPY problem, seeded parameter values, and the loss whose gradient is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

from examples.sudoku.data import generate_boards, one_hot
from examples.sudoku.model import CONSTRAINTS

__all__ = ["CASES", "Case", "Instance"]


@dataclass(frozen=True, eq=False)
class Instance:
    """A problem with values of its parameters, and a loss of the first variable.

    Attributes:
        problem: a DPP problem.
        parameters: its parameters.
        variables: what the layers return; the first one reaches the loss.
        values: a float64 tensor for each parameter; with a leading batch dimension, or shared by the batch.
        loss: of the (B, ...) value of the first variable, a scalar: a sum over the batch.
    """

    problem: cp.Problem
    parameters: Sequence[cp.Parameter]
    variables: Sequence[cp.Variable]
    values: Sequence[Tensor]
    loss: Callable[[Tensor], Tensor]

    def inputs(self) -> list[Tensor]:
        """Leaves that require gradients."""
        return [value.clone().requires_grad_() for value in self.values]


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    Attributes:
        name: for the command line.
        title: for the report.
        build: batch size to instance.
        batch: number of elements.
        tau, rho: of the LPGD modes. Without augmentation (ρ = 0) both libraries perturb the same problem whatever
            auxiliary variables they introduce.
        modes: (solver, ``"lpgd"`` or ``"exact"``) pairs to compare, with the solver's name as the peer spells it.
        regular: the solution is differentiable, so exact gradients have finite differences as a referee.
        slow: modes that the peer runs once only.
    """

    name: str
    title: str
    build: Callable[[int], Instance]
    batch: int
    modes: Sequence[tuple[str, str]]
    tau: float = 0.1
    rho: float = 0.0
    regular: bool = True
    slow: Sequence[tuple[str, str]] = ()


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))


def _linear_loss(generator: np.random.Generator, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A fixed random linear functional with entries of order 1."""
    weights = _tensor(generator.standard_normal(shape))
    return lambda value: (weights * value).sum()


def _sudoku(order: int) -> Callable[[int], Instance]:
    def build(batch: int) -> Instance:
        """The first training step: A uniform on [0, 1), b = A z₀ with z₀ = 1/2, shared by the boards."""
        generator = np.random.default_rng(0)
        boards = generate_boards(order, batch, seed=0)
        rows, entries = CONSTRAINTS[order], order**6
        x = cp.Variable(entries)
        A, b, c = cp.Parameter((rows, entries)), cp.Parameter(rows), cp.Parameter(entries)
        problem = cp.Problem(cp.Minimize(c @ x), [A @ x == b, x >= 0, x <= 1])
        A_value = _tensor(generator.random((rows, entries)))
        values = (A_value, A_value @ torch.full((entries,), 0.5, dtype=torch.float64), -one_hot(boards.puzzles))
        solutions = one_hot(boards.solutions)
        return Instance(problem, (A, b, c), (x,), values, lambda value: (value - solutions).square().sum())

    return build


def _portfolio(batch: int) -> Instance:
    """Expected return less risk, a second-order cone of the factor and the specific parts: fully invested, in [0, 0.2]ⁿ."""
    assets, factors = 50, 10
    generator = np.random.default_rng(1)
    weights = cp.Variable(assets)
    mean, loadings, specific = cp.Parameter(assets), cp.Parameter((factors, assets)), cp.Parameter(assets)
    risk = cp.norm2(cp.hstack([loadings @ weights, cp.multiply(specific, weights)]))
    problem = cp.Problem(cp.Minimize(risk - mean @ weights), [cp.sum(weights) == 1, weights >= 0, weights <= 0.2])
    values = (
        _tensor(0.2 * generator.standard_normal((batch, assets))),
        _tensor(generator.standard_normal((batch, factors, assets)) / np.sqrt(factors)),
        _tensor(generator.uniform(0.5, 1.5, (batch, assets))),
    )
    loss = _linear_loss(generator, (batch, assets))
    return Instance(problem, (mean, loadings, specific), (weights,), values, loss)


def _logistic(batch: int) -> Instance:
    """Ridge-regularised logistic regression in a ball; the parameters are the samples times their labels, and the radius."""
    samples, features = 60, 10
    generator = np.random.default_rng(2)
    weights = cp.Variable(features)
    data, radius = cp.Parameter((samples, features)), cp.Parameter(nonneg=True)
    objective = cp.sum(cp.logistic(-data @ weights)) / samples + 0.05 * cp.sum_squares(weights)
    problem = cp.Problem(cp.Minimize(objective), [cp.norm2(weights) <= radius])
    true_weights = generator.standard_normal((batch, features, 1))
    points = generator.standard_normal((batch, samples, features))
    labels = np.sign(points @ true_weights + generator.standard_normal((batch, samples, 1)))
    # Half of the balls are small enough to hold the weights back.
    values = (_tensor(labels * points), _tensor(np.where(np.arange(batch) % 2, 0.5, 5.0)))
    return Instance(problem, (data, radius), (weights,), values, _linear_loss(generator, (batch, features)))


def _semidefinite(batch: int) -> Instance:
    """minimise tr(C X) subject to seven equalities, X in S₊⁸.

    C and the equalities but the first, a trace, are random. That makes the solution strictly complementary and
    primal and dual nondegenerate almost surely (Alizadeh, Haeberly and Overton 1997), hence differentiable.
    """
    side, equalities = 8, 7
    generator = np.random.default_rng(3)
    X = cp.Variable((side, side), PSD=True)
    cost, operator, right = cp.Parameter((side, side)), cp.Parameter((equalities, side**2)), cp.Parameter(equalities)
    problem = cp.Problem(
        cp.Minimize(cp.sum(cp.multiply(cost, X))), [operator @ cp.reshape(X, (side**2,), order="C") == right]
    )

    def symmetric(count: tuple[int, ...]) -> np.ndarray:
        matrices = generator.standard_normal((*count, side, side))
        return 0.5 * (matrices + matrices.swapaxes(-1, -2))

    matrices = symmetric((batch, equalities))
    matrices[:, 0] = np.eye(side)
    root = generator.standard_normal((batch, side, side))
    inside = np.eye(side) + root @ root.swapaxes(-1, -2) / side
    values = (
        _tensor(symmetric((batch,))),
        _tensor(matrices.reshape(batch, equalities, side**2)),
        _tensor(np.einsum("bkij,bij->bk", matrices, inside)),
    )
    return Instance(problem, (cost, operator, right), (X,), values, _linear_loss(generator, (batch, side, side)))


def _nonnegative_least_squares(batch: int) -> Instance:
    """minimise |F x - g|² subject to x ≥ 0, about half of whose entries are zero."""
    rows, columns = 60, 20
    generator = np.random.default_rng(4)
    x = cp.Variable(columns)
    F, g = cp.Parameter((rows, columns)), cp.Parameter(rows)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(F @ x - g)), [x >= 0])
    values = (_tensor(generator.standard_normal((batch, rows, columns))), _tensor(generator.standard_normal((batch, rows))))
    return Instance(problem, (F, g), (x,), values, _linear_loss(generator, (batch, columns)))


CASES = {
    case.name: case
    for case in (
        Case(
            "sudoku4",
            "Sudoku 4×4, batch 150",
            _sudoku(2),
            150,
            (("SCS", "lpgd"), ("Clarabel", "lpgd"), ("SCS", "exact")),
            rho=0.1,
            regular=False,
        ),
        Case(
            "sudoku9",
            "Sudoku 9×9, batch 8",
            _sudoku(3),
            8,
            (("SCS", "lpgd"), ("Clarabel", "lpgd"), ("SCS", "exact")),
            rho=0.1,
            regular=False,
            slow=(("Clarabel", "lpgd"), ("SCS", "exact")),
        ),
        Case(
            "portfolio",
            "portfolio SOCP, n 50, batch 32",
            _portfolio,
            32,
            (("SCS", "exact"), ("Clarabel", "exact"), ("ECOS", "exact"), ("SCS", "lpgd")),
        ),
        Case(
            "logistic",
            "logistic regression, batch 32",
            _logistic,
            32,
            (("SCS", "lpgd"), ("SCS", "exact"), ("Clarabel", "exact"), ("ECOS", "exact")),
        ),
        Case(
            "sdp",
            "SDP 8×8, batch 32",
            _semidefinite,
            32,
            (("SCS", "exact"), ("SCS", "lpgd"), ("Clarabel", "exact")),
        ),
        Case(
            "nnls",
            "NNLS 60×20, batch 32",
            _nonnegative_least_squares,
            32,
            (("SCS", "lpgd"), ("SCS", "exact"), ("Clarabel", "exact"), ("ECOS", "exact")),
        ),
    )
}
