"""The layers as functions from the data of the irredundant programs to their solutions, differentiable by autograd.

Restatements are made of torch operations, so that gradients and tangents are those of the data that all repeated rows
share, in the programs' own units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import torch
from torch import Tensor

import lpgd
from lpgd.cones.product import Cones
from lpgd.execution.tasks import SerialExecutor
from lpgd.gradients import GradientMethod
from lpgd.solvers import ConicSolver
from lpgd.solvers.ranking import SOLVERS
from lpgd.status import Status
from tests.judge.cone_points import rows_of
from tests.judge.families import Trial
from tests.judge.programs import AT_UPPER
from tests.judge.references import Gradients
from tests.judge.restatements import Statement, bounds_as_rows

__all__ = [
    "FRONT_ENDS",
    "LAYERS",
    "Answer",
    "Call",
    "FrontEnd",
    "Stated",
    "Ways",
    "conic",
    "cvxpy",
    "leaves_of",
    "names_of_solvers",
    "program",
]

TENSORS = ("P", "q", "A", "b", "bounds")


class Answer(NamedTuple):
    """What a layer returned: x and y in the programs' units, (B, n) and (B, m), and the record of the call.

    y is that of the irredundant programs, to which all rows of a statement add up; None where duals are not returned.
    """

    x: Tensor
    y: Tensor | None
    info: Any


def leaves_of(trial: Trial) -> dict[str, Tensor]:
    """The data of the programs: of bounds, those at which a variable is (0 elsewhere)."""
    programs = trial.programs
    at_upper = np.array(programs.plan.bounds) == AT_UPPER
    bounds = np.where(programs.active, np.where(at_upper, programs.upper, programs.lower), 0.0)
    arrays = (programs.P, programs.q, programs.A, programs.b, bounds)
    return {name: torch.from_numpy(np.array(array)) for name, array in zip(TENSORS, arrays, strict=True)}


class Stated:
    """A statement of a trial's programs, for data that may carry gradients or tangents.

    Args:
        trial: the programs and their statement.
        with_bounds: whether the layer has bounds; otherwise they are rows.
    """

    def __init__(self, trial: Trial, with_bounds: bool) -> None:
        programs = trial.programs
        self.programs = programs
        self.statement: Statement = trial.statement if with_bounds else bounds_as_rows(programs, trial.statement)
        self.cones: Cones = self.statement.cones
        states = np.array(programs.plan.bounds)
        at_upper = states == AT_UPPER
        self.from_leaf = {
            "lower": torch.from_numpy(programs.active & ~at_upper),
            "upper": torch.from_numpy(programs.active & (at_upper | programs.fixed)),
        }
        self.D, self.T, self.t = (
            torch.from_numpy(np.array(part))
            for part in (self.statement.variables, self.statement.rows, self.statement.shift)
        )
        self.objective, self.units = (
            torch.from_numpy(np.array(part)) for part in (self.statement.objective, self.statement.units)
        )

    def bound(self, name: str, data: dict[str, Tensor]) -> Tensor:
        """(B, n) lower or upper bounds in the programs' units."""
        constant = torch.from_numpy(np.array(getattr(self.programs, name)))
        return torch.where(self.from_leaf[name], data["bounds"], constant)

    def data(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        """P, q, A, b, lower and upper as they are stated."""
        lower, upper = (self.bound(name, data) for name in ("lower", "upper"))
        eye = torch.eye(lower.shape[1], dtype=lower.dtype).expand(lower.shape[0], -1, -1)
        extended = torch.cat([data["A"], eye, -eye], dim=1)
        finite = [torch.where(torch.isfinite(part), part, 0.0) for part in (upper, lower)]
        right = torch.cat([data["b"], finite[0], -finite[1]], dim=1)
        rows = self.T @ extended
        values = (self.T @ right[:, :, None])[:, :, 0] + self.t
        sigma, c, D = self.objective[:, None], self.units[:, None], self.D
        return {
            "P": sigma[:, :, None] * D[:, :, None] * data["P"] * D[:, None, :],
            "q": sigma * c * D * data["q"],
            "A": rows * D[:, None, :],
            "b": c * values,
            "lower": torch.where(torch.isinf(lower), -self.statement.absent, c * lower / D),
            "upper": torch.where(torch.isinf(upper), self.statement.absent, c * upper / D),
        }

    def present(self, name: str, tensor: Tensor) -> Tensor:
        """A datum as it is handed to the layer: (B, ...), or in another shape, layout or type."""
        return tensor

    def answer(self, x: Tensor, y: Tensor | None, info: Any) -> Answer:
        """What a layer returned, in the programs' units."""
        if y is not None:
            m = self.programs.cones.rows
            y = (self.T[:, :, :m].mT @ y[:, :, None])[:, :, 0] / (self.objective * self.units)[:, None]
        return Answer(x * self.D / self.units[:, None], y, info)


Call = Callable[[dict[str, Tensor], str | None, GradientMethod], Answer]


class FrontEnd(NamedTuple):
    """A layer: whether it can take a trial, and how it is called.

    Attributes:
        with_bounds: whether it has bounds.
        with_duals: whether it returns multipliers in the order of the rows.
        takes: whether it can take a statement of a trial.
        prepare: of a statement: the differentiable function of the data, a solver (None for the layer's choice) and a
            gradient method.
    """

    with_bounds: bool
    with_duals: bool
    takes: Callable[[Trial], bool]
    prepare: Callable[[Stated], Call]


OPTIONS: dict[str, Any] = {"on_error": "nan", "executor": SerialExecutor()}


class Ways(NamedTuple):
    """Programs are given to layers, or to functions: each from a call's options to what takes the data."""

    qp: Callable[..., Any]
    lp: Callable[..., Any]
    conic: Callable[..., Any]


LAYERS = Ways(lpgd.QPLayer, lpgd.LPLayer, lpgd.ConicLayer)


def conic(stated: Stated, ways: Ways = LAYERS) -> Call:
    """ConicLayer."""
    linear = not stated.programs.P.any()

    def call(leaves: dict[str, Tensor], solver: str | None, method: GradientMethod) -> Answer:
        data = stated.data(leaves)
        layer = ways.conic(cones=stated.cones, solver=solver, gradient=method, **OPTIONS)
        P, q, A, b = (stated.present(name, data[name]) for name in "PqAb")
        output = layer(None if linear else P, q, A, b)
        return stated.answer(output.x, output.y, output.info)

    return call


def program(stated: Stated, ways: Ways = LAYERS) -> Call:
    """QPLayer, or LPLayer without a quadratic objective."""
    linear, zero = not stated.programs.P.any(), stated.cones.zero
    rows = stated.cones.rows
    has = {name: bool(np.isfinite(getattr(stated.programs, name)).any()) for name in ("lower", "upper")}

    def call(leaves: dict[str, Tensor], solver: str | None, method: GradientMethod) -> Answer:
        data = stated.data(leaves)
        arguments: dict[str, Any] = {}
        arguments |= {"lb": data["lower"]} if has["lower"] else {}
        arguments |= {"ub": data["upper"]} if has["upper"] else {}
        if zero:
            arguments |= {"A": data["A"][:, :zero], "b": data["b"][:, :zero]}
        if rows > zero:
            arguments |= {"G": data["A"][:, zero:], "h": data["b"][:, zero:]}
        arguments = {name: stated.present(name, tensor) for name, tensor in arguments.items()}
        q, options = stated.present("q", data["q"]), {"solver": solver, "gradient": method, **OPTIONS}
        if linear:
            output = ways.lp(**options)(q, **arguments)
        else:
            output = ways.qp(**options)(stated.present("P", data["P"]), q, **arguments)
        return stated.answer(output.x, torch.cat([output.y, output.z], dim=-1), output.info)

    return call


def cvxpy(stated: Stated) -> Call:
    """CvxpyLayer."""
    programs, n, m = stated.programs, stated.programs.plan.n, stated.cones.rows
    x = cp.Variable(n)
    linear = not programs.P.any()
    parameters = {"q": cp.Parameter(n)} | ({} if linear else {"P": cp.Parameter((n, n), PSD=True)})
    objective = parameters["q"] @ x if linear else 0.5 * cp.quad_form(x, parameters["P"]) + parameters["q"] @ x
    constraints: list[cp.Constraint] = []
    if m:
        parameters |= {"A": cp.Parameter((m, n)), "b": cp.Parameter(m)}
        slack = parameters["b"] - parameters["A"] @ x
        start = 0
        for block in stated.statement.blocks:
            stop = start + rows_of(block)
            constraints.append(_constraint(block.kind, block.size, block.exponent, slack[start:stop]))
            start = stop
    fixed = programs.fixed
    indices = {
        "lower": np.flatnonzero(np.isfinite(programs.lower[0]) & ~fixed),
        "upper": np.flatnonzero(np.isfinite(programs.upper[0]) & ~fixed),
        "equal": np.flatnonzero(fixed),
    }
    for name, index in indices.items():
        if index.size:
            parameters[name] = cp.Parameter(index.size)
            part = x[index]
            sides = {"lower": part >= parameters[name], "upper": part <= parameters[name]}
            constraints.append(sides.get(name, part == parameters[name]))
    problem = cp.Problem(cp.Minimize(objective), constraints)
    layer = lpgd.CvxpyLayer(problem, list(parameters.values()), [x], **OPTIONS)

    def call(leaves: dict[str, Tensor], solver: str | None, method: GradientMethod) -> Answer:
        data = stated.data(leaves)
        own = data | {name: data["upper" if name == "upper" else "lower"][:, index] for name, index in indices.items()}
        layer.gradient, layer.solver = method, solver
        output = layer(*(stated.present(name, own[name]) for name in parameters))
        return stated.answer(output[0], None, output.info)

    return call


def _constraint(kind: str, size: int, exponent: float, slack: Any) -> cp.Constraint:
    """``slack ∈ K`` in CVXPY's words."""
    if kind == "zero":
        return slack == 0
    if kind == "nonnegative":
        return slack >= 0
    if kind == "second_order":
        return cp.SOC(slack[0], slack[1:]) if size > 1 else slack >= 0
    if kind == "semidefinite":
        spread = np.zeros((size * size, slack.shape[0]))
        places = [(i, j) for j in range(size) for i in range(j, size)]
        for position, (i, j) in enumerate(places):
            spread[[i * size + j, j * size + i], position] = 1.0 if i == j else np.sqrt(0.5)
        return cp.reshape(spread @ slack, (size, size), order="C") >> 0
    if kind == "exponential":
        return cp.ExpCone(slack[0], slack[1], slack[2])
    return cp.PowCone3D(slack[0], slack[1], slack[2], exponent)


def _is_polyhedral(trial: Trial) -> bool:
    return trial.statement.cones.is_polyhedral


def _is_known_to_cvxpy(trial: Trial) -> bool:
    """No dual cones; and its parameter P is checked for definiteness before a solver sees it."""
    dual = trial.statement.cones.kinds & {"dual_exponential", "dual_power"}
    return not dual and trial.verdict is not Status.NOT_CONVEX


FRONT_ENDS: dict[str, FrontEnd] = {
    "program": FrontEnd(True, True, _is_polyhedral, program),
    "conic": FrontEnd(False, True, lambda trial: True, conic),
    "cvxpy": FrontEnd(True, False, _is_known_to_cvxpy, cvxpy),
}


def names_of_solvers(cones: Cones) -> list[str]:
    """The installed solvers that have these cones."""

    def fits(solver: type[ConicSolver]) -> bool:
        return solver.is_installed() and cones.kinds <= solver.capabilities.cones

    return [solver.name for solver in SOLVERS if fits(solver)]


def as_gradients(parts: dict[str, Tensor]) -> Gradients:
    """Gradients or tangents by name, as arrays."""
    return Gradients(**{name: part.detach().numpy() for name, part in parts.items()})
