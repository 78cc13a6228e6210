"""Convex programs around a chosen solution, whose derivative is known from their own optimality conditions.

A cost is a sum of functions of ``A x + b``, a square and a linear term; other functions, and linear rows, are limited.
The linear term and the limits are what makes a chosen x and chosen multipliers a solution.  Functions are known twice,
in CVXPY's atoms for the layer and in torch for the optimality conditions, whose derivative NumPy solves.

``python -m tests.constructed --first 0 --count 100`` puts drawn programs to CvxpyLayer, and prints what is wrong.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import lpgd
from lpgd.gradients import GradientMethod
from lpgd.status import Status

__all__ = ["FUNCTIONS", "Constructed", "Errors", "draw", "errors"]

FloatArray = NDArray[np.float64]
ARGUMENTS = 6
"""Each function has so many arguments, ``A x + b``, of order 1."""
WORST = 1e6
"""Programs whose optimality conditions have a larger condition, in units of the solution, are passed over."""


class Function(NamedTuple):
    """A convex function of six numbers of order 1, in CVXPY and in torch."""

    atom: Callable[[Any], Any]
    value: Callable[[Tensor], Tensor]


def _symmetric(z: Any, shifts: tuple[float, float, float], stack: Callable[[list[list[Any]]], Any]) -> Any:
    a, b, c = shifts
    return stack([[z[0] + a, z[1], z[2]], [z[1], z[3] + b, z[4]], [z[2], z[4], z[5] + c]])


def _stacked(rows: list[list[Any]]) -> Tensor:
    return torch.stack([torch.stack(list(row)) for row in rows])


def _positive(z: Any) -> Any:
    return _symmetric(z, (4.0, 4.0, 4.0), cp.bmat if isinstance(z, cp.Expression) else _stacked)


def _apart(z: Any) -> Any:
    """A matrix whose eigenvalues are apart from each other."""
    return _symmetric(z, (4.0, 0.0, -4.0), cp.bmat if isinstance(z, cp.Expression) else _stacked)


def _wide(z: Any) -> Any:
    return cp.reshape(z, (2, 3), order="C") if isinstance(z, cp.Expression) else z.reshape(2, 3)


def _pair(z: Any) -> Any:
    rows = [[z[2] + 4.0, z[3]], [z[3], z[4] + 4.0]]
    return cp.bmat(rows) if isinstance(z, cp.Expression) else _stacked(rows)


def _log_normal(z: Tensor) -> Tensor:
    """CVXPY's approximation of log Φ, of each."""
    shares = [0.02301291, 0.08070214, 0.16411522, 0.09003495, 0.08200854, 0.01371543, 0.04641081]
    ends = torch.tensor([3.0, 2.0, 1.0, 0.0, -1.0, -2.5, -3.5], dtype=z.dtype)
    return -(torch.tensor(shares, dtype=z.dtype) * (ends - z[:, None]).clamp(min=0) ** 2).sum(1)


def _times_its_exp(z: Tensor) -> Tensor:
    return (z.clamp(min=0) * z.exp()).sum()


def _largest(z: Tensor, weights: list[float]) -> Tensor:
    return z.sort().values[-len(weights) :] @ torch.tensor(weights, dtype=z.dtype)


def _pnorm(p: float) -> Function:
    return Function(lambda z: cp.pnorm(z, p), lambda z: z.abs().pow(p).sum() ** (1 / p))


def _power(p: float) -> Function:
    """Of positive numbers."""
    sign = -1.0 if 0 < p < 1 else 1.0
    return Function(lambda z: sign * cp.sum(cp.power(z[:3] + 3.0, p)), lambda z: sign * (z[:3] + 3.0).pow(p).sum())


def _geometric(weights: list[float]) -> Function:
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return Function(lambda z: -cp.geo_mean(z[:3] + 4.0, weights), lambda z: -((z[:3] + 4.0).log() @ shares).exp())


FUNCTIONS: dict[str, Function] = {
    "log_sum_exp": Function(cp.log_sum_exp, lambda z: torch.logsumexp(z, 0)),
    "norm": Function(cp.norm, lambda z: z.norm()),
    "exp": Function(lambda z: cp.sum(cp.exp(z)), lambda z: z.exp().sum()),
    "logistic": Function(lambda z: cp.sum(cp.logistic(z)), lambda z: (1 + z.exp()).log().sum()),
    "huber": Function(lambda z: cp.sum(cp.huber(z)), lambda z: torch.where(z.abs() < 1, z * z, 2 * z.abs() - 1).sum()),
    "pnorm 1.3": _pnorm(1.3),
    "pnorm 3": _pnorm(3),
    "pnorm 5": _pnorm(5),
    "norm1": Function(cp.norm1, lambda z: z.abs().sum()),
    "norm_inf": Function(cp.norm_inf, lambda z: z.abs().max()),
    "quad_over_lin": Function(
        lambda z: cp.quad_over_lin(z[:4], z[4] + 4.0), lambda z: z[:4].square().sum() / (z[4] + 4.0)
    ),
    "geo_mean": _geometric([1, 1, 1]),
    "weighted geo_mean": _geometric([1, 2, 4]),
    "sum_squares": Function(cp.sum_squares, lambda z: z.square().sum()),
    "sum_largest": Function(lambda z: cp.sum_largest(z, 2), lambda z: _largest(z, [1.0, 1.0])),
    "cvar": Function(lambda z: cp.cvar(z, 0.55), lambda z: _largest(z, [0.7, 1.0, 1.0]) / 2.7),
    "max": Function(cp.max, lambda z: z.max()),
    "dotsort": Function(lambda z: cp.dotsort(z, [0, 1, 2]), lambda z: _largest(z, [1.0, 2.0])),
    "tv": Function(cp.tv, lambda z: (z[1:] - z[:-1]).abs().sum()),
    "kl_div": Function(
        lambda z: cp.sum(cp.kl_div(z[:3] + 3.0, z[3:] + 3.0)),
        lambda z: ((z[:3] + 3) * ((z[:3] + 3).log() - (z[3:] + 3).log()) - z[:3] + z[3:]).sum(),
    ),
    "rel_entr": Function(
        lambda z: cp.sum(cp.rel_entr(z[:3] + 3.0, z[3:] + 3.0)),
        lambda z: ((z[:3] + 3) * ((z[:3] + 3).log() - (z[3:] + 3).log())).sum(),
    ),
    "entr": Function(lambda z: -cp.sum(cp.entr(z[:4] + 3.0)), lambda z: ((z[:4] + 3) * (z[:4] + 3).log()).sum()),
    "inv_prod": Function(lambda z: cp.inv_prod(z[:3] + 3.0), lambda z: 1 / (z[:3] + 3).prod()),
    "inv_pos": Function(lambda z: cp.sum(cp.inv_pos(z[:3] + 3.0)), lambda z: (1 / (z[:3] + 3)).sum()),
    "harmonic_mean": Function(lambda z: -cp.harmonic_mean(z[:3] + 3.0), lambda z: -3 / (1 / (z[:3] + 3)).sum()),
    "log1p": Function(lambda z: -cp.sum(cp.log1p(z[:3] + 3.0)), lambda z: -(z[:3] + 4).log().sum()),
    "log": Function(lambda z: -cp.sum(cp.log(z[:3] + 3.0)), lambda z: -(z[:3] + 3).log().sum()),
    "xexp": Function(lambda z: cp.sum(cp.xexp(cp.pos(z[:2] + 2.0))), lambda z: _times_its_exp(z[:2] + 2)),
    "power 0.3": _power(0.3),
    "power 0.7": _power(0.7),
    "power -0.5": _power(-0.5),
    "power -2": _power(-2),
    "power 1.3": _power(1.3),
    "cube": Function(lambda z: cp.sum(cp.power(cp.abs(z), 3)), lambda z: z.abs().pow(3).sum()),
    "power 4": Function(lambda z: cp.sum(cp.power(z, 4)), lambda z: z.pow(4).sum()),
    "log_normcdf": Function(lambda z: -cp.sum(cp.log_normcdf(z[:2])), lambda z: -_log_normal(z[:2]).sum()),
    "log_det": Function(lambda z: -cp.log_det(_positive(z)), lambda z: -torch.logdet(_positive(z))),
    "lambda_max": Function(lambda z: cp.lambda_max(_apart(z)), lambda z: torch.linalg.eigvalsh(_apart(z))[-1]),
    "lambda_min": Function(lambda z: -cp.lambda_min(_apart(z)), lambda z: -torch.linalg.eigvalsh(_apart(z))[0]),
    "lambda_sum_largest": Function(
        lambda z: cp.lambda_sum_largest(_apart(z), 2), lambda z: torch.linalg.eigvalsh(_apart(z))[-2:].sum()
    ),
    "sigma_max": Function(lambda z: cp.sigma_max(_wide(z)), lambda z: torch.linalg.svdvals(_wide(z))[0]),
    "normNuc": Function(lambda z: cp.normNuc(_wide(z)), lambda z: torch.linalg.svdvals(_wide(z)).sum()),
    "norm fro": Function(lambda z: cp.norm(_wide(z), "fro"), lambda z: z.norm()),
    "mixed_norm": Function(lambda z: cp.mixed_norm(_wide(z), 2, 1), lambda z: _wide(z).norm(dim=1).sum()),
    "matrix_frac": Function(
        lambda z: cp.matrix_frac(z[:2], _pair(z)), lambda z: z[:2] @ torch.linalg.inv(_pair(z)) @ z[:2]
    ),
    "tr_inv": Function(lambda z: cp.tr_inv(_positive(z)), lambda z: torch.trace(torch.linalg.inv(_positive(z)))),
}
"""The order is part of what numbers of drawn programs mean: new ones are for the end, and for ``among``."""

_ALL = tuple(FUNCTIONS)
_NOT_OF_PARAMETERS = ("quad_over_lin", "sum_squares")
"""Functions that CVXPY does not take of parametric arguments: a variable stands for these."""

LOOSE: dict[str, Callable[[cp.Variable, float], list[Any]]] = {
    "none": lambda _, __: [],
    "norm": lambda x, size: [cp.norm(x) <= 1e4 * size],
    "box": lambda x, size: [x <= 1e4 * size, x >= -1e4 * size],
    "norm1": lambda x, size: [cp.norm1(x) <= 1e4 * size],
    "far": lambda x, _: [cp.norm(x) <= 1e4],
    "sum": lambda x, size: [cp.sum(x) <= 1e4 * size],
}
"""Constraints that are not active, whatever the solution."""


@dataclass(frozen=True)
class Constructed:
    """A program, its parameters' values, its solution, a loss, and the loss' gradient.

    Attributes:
        problem, parameters, values: as CvxpyLayer takes them.
        variables: x, and the duals of constraints with a right-hand side.
        x, multipliers: of the solution, the multipliers of all constraints in a row.
        size, force: their units.
        weights, dual_weights: the loss is linear in x and in the multipliers.
        gradients, units: with respect to each parameter, and what makes of them numbers of one size.
        condition: of the optimality conditions in these units.
        described: what it is made of.
    """

    problem: cp.Problem
    parameters: list[cp.Parameter]
    values: list[FloatArray]
    variables: list[cp.Variable]
    x: FloatArray
    multipliers: FloatArray
    size: FloatArray
    force: FloatArray
    weights: FloatArray
    dual_weights: FloatArray
    gradients: list[FloatArray]
    units: list[FloatArray]
    condition: float
    described: str


def draw(
    number: int,
    *,
    spread: bool | None = None,
    loose: str | None = None,
    loss: str | None = None,
    among: tuple[str, ...] = _ALL,
) -> Constructed | None:
    """The program of a number; None where its optimality conditions are ill-conditioned, or a function is undefined.

    Args:
        number: the seed.
        spread: whether the entries of x have units of their own, 1e-3 to 1e3 times the program's; None draws that.
        loose: which constraint is added that is not active; None draws that.
        loss: of ``"x"``, of ``"dual"`` or of ``"both"``; None draws that.
        among: which functions are drawn from.
    """
    rng = np.random.default_rng(number)
    n, m = int(rng.integers(2, 7)), int(rng.integers(0, 5))
    p = int(rng.integers(0, 2)) if n > 2 else 0
    length, cost = float(10.0 ** rng.integers(-4, 5)), float(10.0 ** rng.integers(-4, 5))
    counts = int(rng.integers(0, 3)), int(rng.integers(0, 3))
    if not any(counts):
        counts = 1, 0
    costs, limited = ([str(rng.choice(list(among))) for _ in range(count)] for count in counts)
    ridge = float(rng.choice([0.0, 0.01, 0.5, 5.0]))
    drawn_loose, drawn_spread = str(rng.choice(list(LOOSE))), bool(rng.random() < 0.25)
    drawn_loss = str(rng.choice(["x", "x", "dual", "both"]))
    loose = loose or drawn_loose
    spread = drawn_spread if spread is None else spread
    loss = loss or drawn_loss
    size = np.full(n, length) * (10.0 ** rng.uniform(-3, 3, n) if spread else 1.0)
    x = rng.standard_normal(n) * 0.5 * size
    if loose == "far" and float(np.abs(x).sum()) > 3e3:
        loose = "norm"
    data: dict[str, FloatArray] = {}
    for index in range(sum(counts)):
        data[f"A{index}"] = rng.standard_normal((ARGUMENTS, n)) * 0.5 / size
        data[f"b{index}"] = rng.standard_normal(ARGUMENTS) * 0.3
    G, active = rng.standard_normal((m, n)) / size, rng.random(m) < 0.4
    pushing = np.where(active, rng.uniform(0.3, 2.0, m), 0.0) * cost
    E, pulling = rng.standard_normal((p, n)) / size, rng.standard_normal(p) * cost
    data |= ({"G": G} if m else {}) | ({"E": E} if p else {})
    tight = rng.random(counts[1]) < 0.8
    limiting = np.where(tight, rng.uniform(0.3, 2.0, counts[1]), 0.0) * cost
    factors = np.array([10.0 ** rng.integers(-3, 4) if rng.random() < 0.3 else 1.0 for _ in limited])

    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in data.items()}
    curvature = torch.tensor(ridge * cost / size**2)

    def argument(at: Tensor, index: int) -> Tensor:
        return tensors[f"A{index}"] @ at + tensors[f"b{index}"]

    def cost_at(at: Tensor) -> Tensor:
        terms = [cost * FUNCTIONS[name].value(argument(at, index)) for index, name in enumerate(costs)]
        return sum(terms, 0.5 * (curvature * at * at).sum())

    def limits_at(at: Tensor) -> Tensor:
        values = [tensors[name] @ at for name in ("G", "E") if name in tensors]
        for index, (name, factor) in enumerate(zip(limited, factors, strict=True)):
            values.append((factor * FUNCTIONS[name].value(argument(at, counts[0] + index))).reshape(1))
        return torch.cat([*values, at.new_zeros(0)])

    multipliers = np.concatenate([pushing, pulling, limiting / factors])
    is_active = np.concatenate([active, np.ones(p, dtype=bool), tight])
    force = np.concatenate([np.full(m + p, cost), cost / factors])
    at, y = torch.tensor(x, requires_grad=True), torch.tensor(multipliers)
    sides = limits_at(at)
    if not bool(torch.isfinite(sides).all()) or not bool(torch.isfinite(cost_at(at))):
        return None
    room = [np.where(active, 0.0, rng.uniform(0.3, 2.0, m)), np.zeros(p)]
    room.append(np.where(tight, 0.0, rng.uniform(0.3, 1.0, counts[1]) * factors))
    limits = sides.detach().numpy() + np.concatenate(room)

    # The derivative of the optimality conditions, in units of x and of the multipliers.
    slope = torch.autograd.grad(cost_at(at) + y @ sides, at, create_graph=True)[0]
    hessian, jacobian = (
        torch.stack([torch.autograd.grad(one, at, retain_graph=True)[0] for one in rows]).numpy()
        if len(rows)
        else np.zeros((0, n))
        for rows in (slope, sides)
    )
    jacobian = jacobian[is_active]
    units = np.concatenate([size / np.sqrt(cost), force[is_active] / np.sqrt(cost)])
    system = np.block([[hessian, jacobian.T], [jacobian, np.zeros((len(jacobian), len(jacobian)))]])
    system = system * units[:, None] * units
    if not np.isfinite(system).all() or np.linalg.cond(system) > WORST:
        return None
    weights = rng.standard_normal(n) / size * (loss != "dual")
    dual_weights = rng.standard_normal(len(multipliers)) / force * (loss != "x")
    response = units * np.linalg.solve(system, units * np.concatenate([weights, dual_weights[is_active]]))
    of_limits = np.zeros(len(multipliers))
    of_limits[is_active] = response[n:]
    total = -(torch.tensor(response[:n]) @ slope) - torch.tensor(of_limits) @ sides
    total = total + sum(0.0 * tensor.sum() for tensor in tensors.values())
    found = torch.autograd.grad(total, list(tensors.values()))

    variable, names = cp.Variable(n), {name: cp.Parameter(value.shape) for name, value in data.items()}
    c, extra = cp.Parameter(n), list[Any]()
    ways = np.random.default_rng(number + 1)

    def expression(name: str, index: int) -> Any:
        inner = names[f"A{index}"] @ variable + names[f"b{index}"]
        if name in _NOT_OF_PARAMETERS or ways.random() < 0.2:
            stands_for = cp.Variable(ARGUMENTS)
            extra.append(stands_for == inner)
            return FUNCTIONS[name].atom(stands_for)
        return FUNCTIONS[name].atom(inner)

    objective: Any = c @ variable
    if ridge:
        objective += 0.5 * cp.sum_squares(cp.multiply(np.sqrt(curvature.numpy()), variable))
    for index, name in enumerate(costs):
        objective += cost * expression(name, index)
    constraints, right, sizes = list[Any](), list[cp.Parameter](), list[slice]()
    for name, count, start in (("G", m, 0), ("E", p, m)):
        if count:
            right.append(cp.Parameter(count))
            sizes.append(slice(start, start + count))
            row = names[name] @ variable
            constraints.append(row <= right[-1] if name == "G" else row == right[-1])
    for index, (name, factor) in enumerate(zip(limited, factors, strict=True)):
        right.append(cp.Parameter())
        sizes.append(slice(m + p + index, m + p + index + 1))
        constraints.append(factor * expression(name, counts[0] + index) <= right[-1])
    duals = [constraint.dual_variables[0] for constraint in constraints]
    problem = cp.Problem(cp.Minimize(objective), constraints + LOOSE[loose](variable, float(size.max())) + extra)

    def split(values: FloatArray) -> list[FloatArray]:
        return [values[one].reshape(side.shape) for one, side in zip(sizes, right, strict=True)]

    in_units = {"A": 1 / size, "b": np.ones(1), "G": 1 / size, "E": 1 / size}
    return Constructed(
        problem,
        [*names.values(), c, *right],
        [*data.values(), -slope.detach().numpy(), *split(limits)],
        [variable, *duals],
        x,
        multipliers,
        size,
        force,
        weights,
        dual_weights,
        [*(one.numpy() for one in found), -response[:n], *split(of_limits)],
        [*(in_units[name[0]] for name in data), cost / size, *split(cost / force)],
        float(np.linalg.cond(system)),
        f"{number}: cost {costs}, limits {limited}, x of {length:g}, cost of {cost:g}, ridge {ridge:g}, {loose}"
        + (", spread" if spread else ""),
    )


class Errors(NamedTuple):
    """What came of a program.

    Attributes:
        x, duals: the largest errors, in units; of the duals where the loss is of them.
        gradient: the largest error of a parameter's gradient, relative to it.
        status: of the solution.
        said: warnings.
    """

    x: float
    duals: float
    gradient: float
    status: Status
    said: list[str]

    @property
    def is_silent(self) -> bool:
        return self.status is Status.SOLVED and not self.said


def errors(program: Constructed, gradient: GradientMethod | None = None) -> Errors:
    """The errors of CvxpyLayer on a program."""
    with_duals = bool(program.dual_weights.any())
    variables = program.variables if with_duals else program.variables[:1]
    layer = lpgd.CvxpyLayer(program.problem, program.parameters, variables, gradient=gradient)
    values = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in program.values]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = layer(*values)
        loss = output[0] @ torch.tensor(program.weights)
        duals = torch.cat([one.reshape(-1) for one in (*output[1:], output[0][:0])])
        if with_duals:
            loss = loss + duals @ torch.tensor(program.dual_weights)
        loss.backward()
    wanted = [np.abs(one * unit).max() for one, unit in zip(program.gradients, program.units, strict=True)]
    found = [np.zeros(1) if one.grad is None else one.grad.numpy() for one in values]
    off = [
        np.abs((one - right) * unit).max() / max(size, 1e-3 * max(wanted), 1e-300)
        for one, right, unit, size in zip(found, program.gradients, program.units, wanted, strict=True)
    ]
    dual_errors = np.abs((duals.detach().numpy() - program.multipliers) / program.force) if with_duals else np.zeros(1)
    return Errors(
        float(np.abs((output[0].detach().numpy() - program.x) / program.size).max()),
        float(dual_errors.max(initial=0.0)),
        float(max(off)),
        output.info.statuses[0],
        [str(warning.message) for warning in caught if issubclass(warning.category, lpgd.LpgdWarning)],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--gradient", default="None", help="such as lpgd.LPGD()")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--spread", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--loose", choices=list(LOOSE))
    given = parser.parse_args()
    method, wrong, silent, count = eval(given.gradient, {"lpgd": lpgd, "None": None}), 0, 0, 0
    for number in range(given.first, given.first + given.count):
        program = draw(number, spread=given.spread, loose=given.loose)
        if program is None:
            continue
        found, count = errors(program, method), count + 1
        bad = max(found.x, 0.1 * found.duals) > 1e-6 or found.gradient > given.tolerance
        hidden = bad and (found.is_silent or (found.x > 1e-5 and found.status is Status.SOLVED))
        wrong, silent = wrong + bad, silent + hidden
        if bad or found.said:
            kind = "SILENT" if hidden else "warned" if bad else "right, but warned"
            print(
                f"{kind}: x {found.x:.0e}, duals {found.duals:.0e}, gradient {found.gradient:.0e}, "
                f"{found.status.name}, condition {program.condition:.0e}; {program.described}; "
                f"{[one[:100] for one in found.said]}",
                flush=True,
            )
    print(f"{count} programs, {wrong} wrong, {silent} of them silently")


if __name__ == "__main__":
    main()
