"""Other vertices of tilted linear programs: what SciPy finds from nothing, and where no vertex is looked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

import lpgd
from lpgd.problems import ConicPoint
from lpgd.solvers.kkt import vertices
from lpgd.solvers.perturbed_points import PerturbedPoints

SIZE, N, EQUALITIES, INEQUALITIES = 6, 14, 3, 5


def draw(shared: bool) -> dict[str, Tensor]:
    """Programs in a box with a fixed variable, a point within all rows, and a direction of the costs."""
    generator = np.random.default_rng(3)
    leading = () if shared else (SIZE,)
    A, G = (generator.standard_normal((*leading, rows, N)) for rows in (EQUALITIES, INEQUALITIES))
    inside = generator.uniform(0.3, 0.7, (SIZE, N))
    lower, upper = np.zeros((SIZE, N)), np.ones((SIZE, N))
    lower[:, 4] = upper[:, 4] = inside[:, 4] = 0.5
    upper[:, 7] = np.inf
    c = generator.standard_normal((SIZE, N))
    c[:, 7] = np.abs(c[:, 7]) + 1.0
    data = {
        "c": c,
        "A": A,
        "b": (A @ inside[:, :, None])[..., 0],
        "G": G,
        "h": (G @ inside[:, :, None])[..., 0] + generator.uniform(0.1, 0.5, (SIZE, INEQUALITIES)),
        "lb": lower,
        "ub": upper,
        "g": 0.5 * generator.standard_normal((SIZE, N)),
    }
    return {name: torch.from_numpy(values) for name, values in data.items()}


def prepared(data: dict[str, Tensor], tau: float, solver: Any) -> tuple[PerturbedPoints, Any, Tensor]:
    """Where to start from, what finds the ends of steps, and the steps to both sides."""
    names = ("A", "b", "G", "h", "lb", "ub") if data["h"].shape[-1] else ("A", "b", "lb", "ub")
    given = {name: data[name] for name in names}
    solution = lpgd.LPLayer("HIGHS")(data["c"], **given).info.solution
    problem, (size, n) = solution.problem, data["c"].shape
    zeros = torch.zeros(size, problem.structure.m, dtype=torch.float64)
    tilt = ConicPoint(data["g"], zeros, torch.zeros(size, n, dtype=torch.float64))
    near = PerturbedPoints.of(solution, problem, tilt, problem.tilt_unit(solution.point, tilt), solver)
    assert near is not None
    steps = torch.cat([torch.full((size,), sign * tau, dtype=torch.float64) for sign in (1.0, -1.0)])

    def solve(near: PerturbedPoints, steps: Tensor) -> Any:
        return near.solve(near.problem.tilt(steps, near.cotangent), steps, (), None)

    return near, solve, steps


def perturbed(data: dict[str, Tensor], tau: float, solver: Any) -> tuple[Tensor, Any, Tensor]:
    """The variables, the solutions after steps to both sides, and the steps."""
    near, solve, steps = prepared(data, tau, solver)
    return near.point.x, solve(near, steps), steps


def by_scipy(data: dict[str, Tensor], place: int, step: float) -> tuple[Any, Any]:
    element = place % SIZE

    def row(name: str, ndim: int) -> Any:
        values = data[name].numpy()
        return values[element] if values.ndim > ndim else values

    bounds = np.stack([data["lb"][element].numpy(), data["ub"][element].numpy()], 1)
    cost = data["c"][element].numpy() + step * data["g"][element].numpy()
    found = linprog(cost, row("G", 2), row("h", 1), row("A", 2), row("b", 1), bounds=bounds, method="highs")
    assert found.status == 0
    return found.x, -np.concatenate([found.eqlin.marginals, found.ineqlin.marginals])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("tau", [1e-3, 0.03, 0.06])
def test_other_vertices_are_those_that_scipy_finds(shared: bool, tau: float) -> None:
    data = draw(shared)
    start, found, steps = perturbed(data, tau, lpgd.HiGHS())
    assert found.by_newton.all()
    assert float(found.residuals.worst.max()) <= 1e-13
    for place, step in enumerate(steps.tolist()):
        x, y = by_scipy(data, place, step)
        np.testing.assert_allclose(found.x[place].numpy(), x, atol=1e-12)
        np.testing.assert_allclose(found.y[place].numpy(), y, atol=1e-12)
    moved = (found.x - start.repeat(2, 1)).abs().amax(1) > 1e-6
    assert bool(moved.any()) == (tau > 1e-2)


def test_a_variable_goes_to_its_other_bound_without_any_row() -> None:
    """minimise <c, x> over a box with one row that does not bind for the first two."""
    data = {
        "c": torch.tensor([[0.02, -1.0, 0.5]]),
        "A": torch.tensor([[0.0, 0.0, 1.0]]),
        "b": torch.tensor([[0.5]]),
        "G": torch.zeros(1, 0, 3),
        "h": torch.zeros(1, 0),
        "lb": torch.zeros(1, 3),
        "ub": torch.ones(1, 3),
        "g": torch.tensor([[1.0, 0.0, 0.0]]),
    }
    data = {name: values.double() for name, values in data.items()}
    start, found, _ = perturbed(data, 0.05, lpgd.HiGHS())
    assert found.by_newton.all()
    assert start.tolist() == [[0.0, 1.0, 0.5]]
    assert found.x.tolist() == [[0.0, 1.0, 0.5], [1.0, 1.0, 0.5]]
    torch.testing.assert_close(found.z[:, 0], torch.tensor([-0.07, 0.03], dtype=torch.float64))
    torch.testing.assert_close(found.y[:, 0], torch.tensor([-0.5, -0.5], dtype=torch.float64))


def test_a_tilt_without_a_solution_is_left_to_the_solver() -> None:
    """minimise 0.5 x₁ + x₂ - 0.48 x₄ subject to x₂ + x₃ = 1, x₁ - x₄ = 0.5, x ≥ 0; less 0.05 x₁ it is unbounded."""
    data = {
        "c": torch.tensor([[0.5, 1.0, 0.0, -0.48]]),
        "A": torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, -1.0]]),
        "b": torch.tensor([[1.0, 0.5]]),
        "G": torch.zeros(1, 0, 4),
        "h": torch.zeros(1, 0),
        "lb": torch.zeros(1, 4),
        "ub": torch.full((1, 4), torch.inf),
        "g": torch.tensor([[1.0, 0.0, 0.0, 0.0]]),
    }
    data = {name: values.double() for name, values in data.items()}
    _, found, _ = perturbed(data, 0.05, lpgd.HiGHS())
    assert found.statuses == (lpgd.Status.SOLVED, lpgd.Status.UNBOUNDED)
    assert found.by_newton.tolist() == [True, False]


@pytest.mark.parametrize("shared", [True, False])
def test_an_element_has_the_same_vertex_alone(shared: bool) -> None:
    near, solve, steps = prepared(draw(shared), 0.06, lpgd.HiGHS())
    together = solve(near, steps)
    for element in range(SIZE):
        places = torch.tensor([element, SIZE + element])
        alone = solve(near.select(places[:1]), steps[places])
        for ours, theirs in zip(alone.point, together.point, strict=True):
            assert torch.equal(ours, theirs[places])


def test_who_has_far_to_go_is_left_to_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(shared=True)
    _, found, _ = perturbed(data, 0.06, lpgd.HiGHS())
    changes = (found.refined > 1).tolist()
    monkeypatch.setattr(vertices, "STEPS", 0)
    _, left, _ = perturbed(data, 0.06, lpgd.HiGHS())
    assert [not change for change in changes] == left.by_newton.tolist()
    torch.testing.assert_close(left.x, found.x, atol=1e-11, rtol=0.0)


@pytest.mark.parametrize("envelope", ["average", "lower", "upper"])
def test_gradients_are_those_of_the_solver(envelope: Any) -> None:
    data = draw(shared=False)
    gradients = []
    for solver in (lpgd.HiGHS(), lpgd.HiGHS(refine=False)):
        layer = lpgd.LPLayer(solver, gradient=lpgd.LPGD(0.06, envelope=envelope))
        leaves = [data[name].clone().requires_grad_() for name in ("c", "A", "b", "G", "h", "lb", "ub")]
        c, A, b, G, h, lb, ub = leaves
        output = layer(c, A=A, b=b, G=G, h=h, lb=lb, ub=ub)
        gradients.append(torch.autograd.grad((data["g"] * output.x).sum(), leaves))
        info = output.info.gradients[-1]
        assert info.newton.eq({"average": 2}.get(envelope, 1) if solver.refine else 0).all()
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
