"""Programs in which the objective's curvature is the identity, and the one factor that makes them and derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd import ImplicitKKT, QPLayer
from lpgd.gradients import GradientMethod
from lpgd.problems.conic.problem import ConicProblem
from lpgd.solvers.conic.convexity import is_definite
from lpgd.solvers.kkt.schur import SchurFactor
from tests.test_same_bits import programs

N, BATCH = 6, 24


def solve(data: dict[str, Tensor], solver: str = "DAQP") -> Any:
    rows: Any = {name: data[name] for name in "AbGh"}
    return QPLayer(solver).solve(data["P"], data["q"], **rows)


def with_flat(data: dict[str, Tensor], flat: list[int]) -> dict[str, Tensor]:
    """The same with a variable without curvature or cost in some elements, fixed by an equality."""
    P, q, A, b = (data[name].clone() for name in ("P", "q", "A", "b"))
    for element in flat:
        P[element, -1], P[element, :, -1], q[element, -1] = 0.0, 0.0, 0.0
        A[element, 0], b[element, 0] = torch.eye(N, dtype=torch.float64)[-1], 0.25
    return {**data, "P": P, "q": q, "A": A, "b": b}


def test_equalities_alone_have_the_solution_of_their_linear_system() -> None:
    data = programs(0, shared=False)
    data["h"] = torch.full_like(data["h"], 1e3)  # nothing of it is active
    found = solve(data)
    P, A = data["P"], data["A"]
    K = torch.cat([torch.cat([P, A.mT], 2), torch.cat([A, torch.zeros(BATCH, 2, 2, dtype=P.dtype)], 2)], 1)
    expected = torch.linalg.solve(K, torch.cat([-data["q"], data["b"]], 1))
    torch.testing.assert_close(found.x, expected[:, :N], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.y[:, :2], expected[:, N:], rtol=1e-10, atol=1e-10)
    assert float(found.known_to.max()) <= 1e-12


@pytest.mark.parametrize("flat", [[0], [3, 4, 11], list(range(BATCH))])
def test_elements_without_a_factor_are_solved_and_differentiated_beside_those_with_one(flat: list[int]) -> None:
    data = with_flat(programs(1, shared=False), flat)
    rows: Any = {name: data[name] for name in "AbGh"}
    found, other = solve(data), solve(data, "CLARABEL")
    torch.testing.assert_close(found.x, other.x, rtol=1e-9, atol=1e-9)
    assert found.x[flat, -1].sub(0.25).abs().max() < 1e-12
    gradients = []
    for solver in ("DAQP", "CLARABEL"):
        q = data["q"].clone().requires_grad_()
        QPLayer(solver)(data["P"], q, **rows).x.square().sum().backward()
        assert q.grad is not None
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gradient", [ImplicitKKT(), lpgd.LPGD(tau=None)], ids=["exact", "LPGD"])
@pytest.mark.parametrize("shared", [False, True], ids=["own matrices", "shared matrices"])
def test_gradients_are_those_of_finite_differences(shared: bool, gradient: GradientMethod) -> None:
    data = programs(2, shared)
    weights = torch.randn(BATCH, N, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def value(scale: dict[str, Tensor]) -> Tensor:
        rows: Any = {name: scale[name] for name in "AbGh"}
        return (weights * QPLayer("DAQP", gradient=gradient).forward(scale["P"], scale["q"], **rows).x).sum()

    leaves = {name: values.clone().requires_grad_() for name, values in data.items()}
    value(leaves).backward()
    random = torch.Generator().manual_seed(3)
    for name, leaf in leaves.items():
        direction = torch.randn(leaf.shape, generator=random, dtype=torch.float64)
        direction = direction + direction.mT if name == "P" else direction
        ends = [float(value({**data, name: data[name] + step * direction})) for step in (1e-6, -1e-6)]
        assert leaf.grad is not None
        assert float((leaf.grad * direction).sum()) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_infeasible_elements_are_proven_and_change_no_bit_of_the_others() -> None:
    data = programs(4, shared=False)
    fine = solve(data)
    bad = {name: values.clone() for name, values in data.items()}
    bad["A"][5, 1], bad["b"][5] = bad["A"][5, 0], torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = solve(bad)
    assert found.statuses[5] is lpgd.Status.INFEASIBLE
    assert found.proofs[5]
    others = [element for element in range(BATCH) if element != 5]
    assert torch.equal(found.x[others], fine.x[others])


@pytest.mark.parametrize("size", [1.0, 1e3, 1e-4])
@pytest.mark.parametrize("gradient", [ImplicitKKT(), lpgd.LPGD(tau=0.1)], ids=["exact", "LPGD"])
def test_an_element_has_the_bits_that_it_has_alone_in_its_units_too(size: float, gradient: GradientMethod) -> None:
    data = programs(8, shared=False)
    data["q"] = data["q"] * size * torch.linspace(0.5, 50.0, BATCH, dtype=torch.float64)[:, None]

    def answers(chosen: slice) -> list[Tensor]:
        leaves = {name: values[chosen].clone().requires_grad_() for name, values in data.items()}
        rows: Any = {name: leaves[name] for name in "AbGh"}
        output = QPLayer("DAQP", gradient=gradient).forward(leaves["P"], leaves["q"], **rows)
        output.x.square().sum().backward()
        gradients = [leaf.grad for leaf in leaves.values()]
        assert all(values is not None for values in gradients)
        return [output.x.detach(), output.z.detach(), *(values for values in gradients if values is not None)]

    whole = answers(slice(None))
    for element in (0, 7, BATCH - 1):
        for values, alone in zip(whole, answers(slice(element, element + 1)), strict=True):
            assert torch.equal(values[element], alone[0])


def _problem(data: dict[str, Tensor]) -> ConicProblem:
    return solve(data).problem


def test_a_factor_is_made_once_and_again_when_a_matrix_has_changed() -> None:
    problem = _problem(programs(5, shared=False))
    factor = SchurFactor.of(problem)
    assert factor is not None
    assert SchurFactor.of(problem) is factor
    tilted = problem.tilt(torch.full((BATCH,), 0.1, dtype=torch.float64), solve(programs(5, shared=False)).point)
    assert SchurFactor.of(tilted) is factor
    other = ConicProblem(problem.structure, problem.data._replace(A=2.0 * problem.data.A), BATCH)
    doubled = SchurFactor.of(other)
    assert doubled is not None
    torch.testing.assert_close(doubled.white, 2.0 * factor.white, rtol=1e-12, atol=1e-12)
    problem.data.A.mul_(3.0)
    tripled = SchurFactor.of(problem)
    assert tripled is not None
    torch.testing.assert_close(tripled.white, 3.0 * factor.white, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("least", "definite"), [(1.0, True), (1e-6, True), (1e-8, True), (1e-11, False), (0.0, False)])
def test_definiteness_is_that_of_the_eigenvalues(least: float, definite: bool) -> None:
    random = np.random.default_rng(6)
    turns = np.linalg.qr(random.standard_normal((5, 8, 8)))[0]
    values = np.linspace(0.3, 1.0, 8)
    values[0] = least
    P = torch.from_numpy((turns * values) @ turns.swapaxes(1, 2))
    P = 0.5 * (P + P.mT)
    G, h = torch.eye(8, dtype=torch.float64).expand(5, -1, -1), torch.ones(5, 8, dtype=torch.float64)
    q = torch.from_numpy(random.standard_normal((5, 8)))
    found = QPLayer("CLARABEL").solve(P, q, G=torch.cat([G, -G], 1), h=torch.cat([h, h], 1))
    assert bool((is_definite(found.problem) == definite).all())
