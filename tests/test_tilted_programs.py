"""Quadratic programs with a definite P, tilted: solutions over changes of active sets, from the solution alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

import lpgd
from lpgd.problems.conic.solution import ConicSolution
from lpgd.problems.conic.structure import ConicPoint
from lpgd.solvers.perturbed_points import PerturbedPoints

BATCH, N, ROWS = 12, 15, 9

Program = dict[str, torch.Tensor]


def program(*, shared: bool, bounded: bool, condition: float = 10.0) -> Program:
    """Random programs; about a third of the inequalities are active."""
    generator = torch.Generator().manual_seed(3)
    count = () if shared else (BATCH,)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(draw(*count, N, N)).Q
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), N, dtype=torch.float64)
    A, G, inside = draw(*count, 2, N), draw(*count, ROWS, N), draw(BATCH, N)
    data = {
        "P": (basis * values) @ basis.mT,
        "q": draw(BATCH, N),
        "A": A,
        "b": (A @ inside[..., None])[..., 0],
        "G": G,
        "h": (G @ inside[..., None])[..., 0] + 0.3,
    }
    if bounded:
        data |= {"lb": inside - 0.8, "ub": inside + 1.0}
        data["lb"][:, 0] = data["ub"][:, 0] = inside[:, 0]
        data["ub"][:, 1:3] = torch.inf
    return data


def tilted(data: Program, tau: float, elements: list[int]) -> tuple[PerturbedPoints, ConicSolution, ConicSolution]:
    """Where Newton's method starts, the solutions of both sides, and those of another solver."""
    chosen = {name: value if value.shape[0] != BATCH else value[torch.tensor(elements)] for name, value in data.items()}
    output = lpgd.QPLayer("CLARABEL")(chosen.pop("P"), chosen.pop("q"), **cast(Any, chosen))
    solution = output.info.solution
    generator = torch.Generator().manual_seed(7)
    tilt = ConicPoint(*(
        torch.randn(BATCH, values.shape[1], generator=generator, dtype=torch.float64)[torch.tensor(elements)]
        for values in solution.point
    ))  # fmt: skip
    if "lb" not in data:
        tilt = tilt._replace(z=torch.zeros_like(tilt.z))
    solver, count = lpgd.Clarabel(), len(elements)
    near = PerturbedPoints.of(solution, solution.problem, tilt, torch.ones(count, dtype=torch.float64), solver)
    assert near is not None
    steps = torch.tensor([tau] * count + [-tau] * count, dtype=torch.float64)
    problem = solution.problem.tilt(steps, tilt)
    return near, near.solve(problem, steps, (), None), lpgd.PIQP().solve(problem)


@pytest.mark.parametrize("bounded", [False, True], ids=["rows", "rows and bounds"])
@pytest.mark.parametrize("shared", [False, True], ids=["own matrices", "shared matrices"])
@pytest.mark.parametrize("tau", [1e-6, 1e-3, 3e-2])
def test_both_sides_are_what_a_solver_finds(tau: float, shared: bool, bounded: bool) -> None:
    near, found, expected = tilted(program(shared=shared, bounded=bounded), tau, list(range(BATCH)))
    assert near.__dict__["straight"] is not None
    assert int(found.by_newton.sum()) >= 2 * BATCH - 4
    assert float(found.residuals.worst.max()) <= 1e-12
    for values, others in zip(found.point, expected.point, strict=True):
        torch.testing.assert_close(values, others, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_differences_have_the_digits_of_the_solution(condition: float) -> None:
    """Of two steps that cross nothing, the shorter one's difference is the same: what is left of F cancels."""
    data = program(shared=False, bounded=True, condition=condition)
    differences = []
    for tau in (1e-9, 1e-7):
        _, found, _ = tilted(data, tau, list(range(BATCH)))
        assert found.by_newton.all()
        plus, minus = found.x.split(BATCH)
        differences.append((plus - minus) / (2.0 * tau))
    size = differences[1].abs().amax()
    torch.testing.assert_close(differences[0], differences[1], atol=1e-6 * float(size), rtol=0)


@pytest.mark.parametrize("shared", [False, True], ids=["own matrices", "shared matrices"])
def test_an_element_has_the_same_bits_alone(shared: bool) -> None:
    data = program(shared=shared, bounded=True)
    _, together, _ = tilted(data, 3e-2, list(range(BATCH)))
    assert together.refined is not None
    assert bool((together.refined > 1).any()), "no active set changes"
    for element in (0, 3, 7, BATCH - 1):
        _, alone, _ = tilted(data, 3e-2, [element])
        for ours, theirs in zip(alone.point, together.point, strict=True):
            assert torch.equal(ours, theirs[[element, BATCH + element]])


def test_an_element_that_is_not_definite_leaves_the_others_alone() -> None:
    data = program(shared=False, bounded=True)
    _, expected, _ = tilted(data, 1e-3, list(range(BATCH)))
    flat = data | {"P": data["P"].clone()}
    flat["P"][2, 0] = flat["P"][2, :, 0] = 0.0  # x₀ has equal bounds
    near, found, _ = tilted(flat, 1e-3, list(range(BATCH)))
    assert near.__dict__["straight"].factor.fine.tolist() == [element != 2 for element in range(BATCH)]
    others = [element for element in range(2 * BATCH) if element % BATCH != 2]
    assert found.by_newton.all()
    assert torch.equal(found.x[others], expected.x[others])
