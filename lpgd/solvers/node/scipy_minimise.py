"""SciPy's minimisers for the problems of a declarative node, one element after the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lpgd.arrays import as_index, from_numpy
from lpgd.execution.deadline import is_over
from lpgd.problems.node.problem import NodeProblem
from lpgd.status import Status

__all__ = ["scipy_minimise"]


def scipy_minimise(
    problem: NodeProblem, x: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``scipy.optimize.minimize`` with our derivatives: SLSQP with constraints, else L-BFGS-B.

    Args:
        problem: B elements.
        x: (B, n) where it starts.
        tolerance: SciPy's ``tol``.
        max_iterations: of an element.

    Returns:
        (B, n) minimisers, (B,) values of Status, and (B,) iterations.
    """
    size = x.shape[0]
    points = [
        _minimise_one(problem.select(as_index([element], problem.device)), x[element], tolerance, max_iterations)
        for element in range(size)
    ]
    found = [from_numpy(point).to(x) for point, _, _ in points]
    status = torch.tensor([status for _, status, _ in points], device=x.device)
    iterations = torch.tensor([count for _, _, count in points], device=x.device)
    return torch.stack(found) if found else x, status, iterations


class _OverError(Exception):
    """The time is over."""


def _minimise_one(
    problem: NodeProblem, x: Tensor, tolerance: float, max_iterations: int
) -> tuple[np.ndarray, int, int]:
    def tensor(point: np.ndarray) -> Tensor:
        return from_numpy(np.array(point)).to(x)[None]

    def number(value: Tensor) -> np.ndarray:
        return value[0].detach().cpu().double().numpy()

    def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
        if is_over():
            raise _OverError
        slope, value = torch.func.grad_and_value(lambda x: problem.objective(x).sum())(tensor(point))
        return float(value), number(slope)

    p, r = (values.shape[-1] for values in problem.constraints(x[None]))
    constraints = []
    if p:
        constraints.append(
            {
                "type": "eq",
                "fun": lambda point: number(problem.constraints(tensor(point))[0]),
                "jac": lambda point: number(problem.jacobian(tensor(point)))[:p],
            }
        )
    if r:
        constraints.append(
            {
                "type": "ineq",  # SciPy's are at least 0
                "fun": lambda point: -number(problem.constraints(tensor(point))[1]),
                "jac": lambda point: -number(problem.jacobian(tensor(point)))[p:],
            }
        )
    from scipy.optimize import minimize  # it takes a while to import

    try:
        answer = minimize(
            objective,
            number(x[None]),
            jac=True,
            method="SLSQP" if constraints else "L-BFGS-B",
            constraints=constraints,
            tol=tolerance,
            options={"maxiter": max_iterations},
        )
    except _OverError:
        return number(x[None]), int(Status.TIME_LIMIT), 0
    codes = {9: Status.ITERATION_LIMIT, 4: Status.INFEASIBLE} if constraints else {1: Status.ITERATION_LIMIT}
    status = Status.SOLVED if answer.success else codes.get(answer.status, Status.NUMERICAL_ERROR)
    return np.asarray(answer.x), int(status), int(answer.nit)
