"""The steps that LPGD chooses, and what it says where none gives a derivative: true warnings, remedies that work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.gradients import perturbed
from lpgd.problems import ConicPoint
from tests.node_cases import NODES
from tests.problem_table import CASES, REGULAR, Case
from tests.test_gradients import TIGHT, difference, planted_solution, random_cotangent

SIMPLEX: dict[str, Any] = {
    "A": torch.ones(1, 3, dtype=torch.float64),
    "b": torch.ones(1, dtype=torch.float64),
    "lb": 0.0,
}


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def said(function: Callable[[], Any]) -> tuple[Any, list[str]]:
    """A result, and what the library warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(item.message) for item in caught if issubclass(item.category, lpgd.LpgdWarning)]


# -- badly scaled variables ----------------------------------------------------------------------------------


def scaled_program(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """A quadratic program with variables of order 1, a loss gradient, and units of 1e-3 to 1e3 for the variables."""
    rng = np.random.default_rng(seed)
    factor, G, x = rng.normal(size=(6, 6)), rng.normal(size=(4, 6)), rng.normal(size=6)
    data = {
        "P": factor @ factor.T / 6 + 0.1 * np.eye(6),
        "q": 2 * rng.normal(size=6),
        "G": G,
        "h": G @ x + np.where(rng.random(4) < 0.5, 0.1, 1.0),
        "lb": x - rng.uniform(0.05, 1, 6),
        "ub": x + rng.uniform(0.05, 1, 6),
    }
    return data, rng.normal(size=6), 10 ** rng.uniform(-3, 3, 6)


def exact_gradient(data: dict[str, np.ndarray], g: np.ndarray) -> np.ndarray:
    """dℓ/dq = -Z (ZᵀPZ)⁻¹ Zᵀ g, Z a basis of the null space of the active constraints, which DAQP finds."""
    tensors = {name: torch.from_numpy(value) for name, value in data.items()}
    x = lpgd.solve_qp(**tensors, solver="DAQP").x.numpy()
    rows = [data["G"][np.abs(data["G"] @ x - data["h"]) < 1e-8]]
    rows.append(np.eye(6)[(np.abs(x - data["lb"]) < 1e-8) | (np.abs(x - data["ub"]) < 1e-8)])
    active = np.concatenate(rows)
    basis = np.linalg.svd(active)[2][np.linalg.matrix_rank(active) :].T if len(active) else np.eye(6)
    return -basis @ np.linalg.solve(basis.T @ data["P"] @ basis, basis.T @ g)


@pytest.mark.parametrize("solver", ["DAQP", "HIGHS"])
def test_gradients_do_not_depend_on_the_units_of_variables(solver: str) -> None:
    for seed in range(20):
        data, g, unit = scaled_program(seed)
        expected = exact_gradient(data, unit * g)
        own = {
            "P": data["P"] / unit[:, None] / unit, "q": data["q"] / unit, "G": data["G"] / unit, "h": data["h"],
            "lb": data["lb"] * unit, "ub": data["ub"] * unit,
        }  # fmt: skip
        tensors = {name: torch.from_numpy(value) for name, value in own.items()}
        tensors["q"].requires_grad_()

        def backward(
            tensors: dict[str, Tensor] = tensors, unit: np.ndarray = unit, g: np.ndarray = g
        ) -> tuple[np.ndarray, bool]:
            output = lpgd.solve_qp(**tensors, solver=solver, gradient=lpgd.LPGD(), on_error="nan")
            (output.x.nan_to_num() * torch.from_numpy(g)).sum().backward()
            assert tensors["q"].grad is not None
            return tensors["q"].grad.numpy() / unit, bool(output.info.solution.failed)

        (gradient, failed), messages = said(backward)
        size = max(np.abs(expected).max(), 1e-3 * np.abs(unit * g).max())
        assert failed or messages or np.abs(gradient - expected).max() < 1e-4 * size, seed


def crossing_program(gap: float) -> tuple[Tensor, dict[str, Any]]:
    """min ½ x² - q x s.t. x ≤ 1 at q = 1 - gap: the bound becomes active after a step of ``gap``."""
    q = vector(-(1.0 - gap)).requires_grad_()
    return q, {"P": torch.eye(1, dtype=torch.float64), "q": q, "ub": 1.0}


def test_a_step_is_shortened_to_the_reach_of_the_active_set() -> None:
    """The chosen step is 1e-5 of the objective; the bound is 1e-6 away."""
    q, data = crossing_program(1e-6)
    output, messages = said(lambda: lpgd.solve_qp(**data, solver="DAQP", gradient=lpgd.LPGD()))
    output.x.sum().backward()
    (info,) = output.info.gradients
    assert not messages
    assert not info.crossed.any()
    assert info.tau[0] <= 1e-6
    assert q.grad is not None
    assert q.grad.item() == pytest.approx(-1.0, rel=1e-4)


def test_a_given_step_is_taken_as_it_is_and_crossings_are_on_record() -> None:
    for gap, crossed in ((1e-6, True), (0.5, False)):
        _, data = crossing_program(gap)
        output = lpgd.solve_qp(**data, solver="DAQP", gradient=lpgd.LPGD(0.1))
        _, messages = said(output.x.sum().backward)
        (info,) = output.info.gradients
        assert not messages
        assert info.tau[0] == pytest.approx(0.1)
        assert bool(info.crossed[0]) == crossed


def test_a_kink_is_said_and_its_remedies_work() -> None:
    """At q = -1 the bound is active with a multiplier of zero: dx/dq is -1 on one side and 0 on the other one."""

    def gradient(method: Any) -> tuple[float, list[str], Any]:
        q, data = crossing_program(0.0)
        output = lpgd.solve_qp(**data, solver="DAQP", gradient=method)
        _, messages = said(output.x.sum().backward)
        assert q.grad is not None
        return q.grad.item(), messages, output.info.gradients[-1]

    found, messages, info = gradient(lpgd.LPGD())
    assert len(messages) == 1
    assert "elements [0] have no derivative" in messages[0]
    assert found == pytest.approx(-0.5, abs=1e-6)
    # The remedies: a tau of the order of the unit, and one side by ImplicitKKT.
    smoothed, messages, _ = gradient(lpgd.LPGD(float(info.unit[0])))
    assert not messages
    assert smoothed == pytest.approx(-0.5, abs=1e-6)
    one_sided, _, _ = gradient(lpgd.ImplicitKKT())
    assert min(abs(one_sided), abs(one_sided + 1.0)) < 1e-9
    # An envelope of one side has the derivative of that side, whether or not an active set changes along it.
    assert gradient(lpgd.LPGD(envelope="lower"))[0] == pytest.approx(-1.0, abs=1e-6)
    assert gradient(lpgd.LPGD(envelope="upper"))[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("case", REGULAR, ids=repr)
def test_regular_problems_of_every_cone_are_not_warned_about(case: Case) -> None:
    solution, cotangent = planted_solution(case), random_cotangent(case)
    (gradient, info), messages = said(lambda: lpgd.LPGD().vjp(solution, cotangent, TIGHT))
    assert not messages
    assert not info.crossed.any()
    assert not {"A", "b"} & set(info.notices)
    exact, _ = lpgd.ImplicitKKT().vjp(solution, cotangent, TIGHT)
    assert difference(gradient, exact) < 1e-4


def test_the_step_follows_what_is_known_of_the_solution() -> None:
    """τ = √ε: a solution that is known better allows a shorter step."""
    case, solver = next(case for case in CASES if case.name == "qp"), lpgd.DAQP()
    known = torch.tensor([1e-12, 1e-9, torch.nan], dtype=torch.float64)
    solution, cotangent = replace(planted_solution(case), known_to=known), random_cotangent(case)
    _, info = lpgd.LPGD().vjp(solution, cotangent, solver)
    assert info.tau is not None
    assert info.unit is not None
    expected = [1e-6, 1e-9**0.5, solver.solution_error(case.problem) ** 0.5]
    np.testing.assert_allclose((info.tau / info.unit).numpy(), expected, rtol=1e-6)


def test_a_tilt_unit_is_none_of_a_sum_that_cancels() -> None:
    """min |x - p|² in the form t = x - p, with t = 0 at the solution: P x, q and Aᵀy are rounding there."""
    case = next(case for case in CASES if case.name == "qp")
    problem = case.problem
    x = case.point.x
    zero = ConicPoint(x, torch.zeros_like(case.point.y), torch.zeros_like(case.point.z))
    cancelled = type(problem.data)(*problem.data)._replace(q=torch.zeros_like(problem.data.q))
    unit = type(problem)(problem.structure, cancelled, problem.batch_size).tilt_unit(
        zero, ConicPoint(torch.ones_like(x), *(torch.zeros_like(part) for part in zero[1:]))
    )
    assert (unit > 0.1).all()


# -- which solutions moved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["DAQP", "INTERIOR", "CLARABEL", "SCS", "ECOS", "HIGHS", "PIQP", "MOREAU"])
def test_moved_is_a_change_of_vertex(solver: str) -> None:
    """Against the vertices that an exact simplex method finds for the tilted costs."""
    rng = np.random.default_rng(1)
    A = torch.from_numpy(rng.random((5, 10)))
    data: dict[str, Any] = {"G": A, "h": 0.5 * A.sum(1), "lb": 0.0, "ub": 1.0}
    c, g = (torch.from_numpy(rng.normal(size=(32, 10))) for _ in range(2))
    for tau in (1e-8, 1e-6, 1e-4, 1e-2, 0.3):
        vertices = [lpgd.solve_lp(c + sign * tau * g, **data, solver="HIGHS").x for sign in (0, 1, -1)]
        truly = torch.stack([(vertex - vertices[0]).abs().amax(-1) > 1e-9 for vertex in vertices[1:]]).any(0)
        costs = c.clone().requires_grad_()
        output = lpgd.solve_lp(costs, **data, solver=solver, gradient=lpgd.LPGD(tau))
        (output.x * g).sum().backward()
        assert torch.equal(output.info.gradients[-1].moved, truly), tau


# -- solutions that jump -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "envelope"), [(None, "average"), (1e-4, "lower"), (1e-4, "average")])
def test_eigenvectors_of_equal_eigenvalues_are_not_unique(tau: float | None, envelope: perturbed.Envelope) -> None:
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).normal(size=(4, 4))))[0]
    for values, jumps in (((1.0, 1.0, 3.0, 5.0), True), ((1.0, 2.0, 3.0, 5.0), False)):
        matrix = (basis * vector(*values)) @ basis.mT
        inputs = torch.stack([torch.diag(vector(1.0, 2.0, 4.0, 7.0)), 0.5 * (matrix + matrix.mT)]).requires_grad_()
        layer = lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(), gradient=lpgd.LPGD(tau, envelope=envelope))
        weights = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 4, 4)))
        output, _ = said(lambda layer=layer, inputs=inputs: layer(inputs))
        _, messages = said((output * weights).sum().backward)
        assert any("elements [1] are not unique: eigenvalues are equal" in message for message in messages) == jumps
        assert jumps or not messages


def test_a_smaller_step_stays_with_one_of_nearly_equal_solutions() -> None:
    """Eigenvectors whose eigenvalues are 1e-3 apart: the closed form is matched well below that."""
    basis = torch.linalg.qr(torch.from_numpy(np.random.default_rng(0).normal(size=(4, 4))))[0]
    matrix = (basis * vector(1.0, 1.001, 3.0, 5.0)) @ basis.mT
    weights = torch.from_numpy(np.random.default_rng(1).normal(size=(4, 4)))

    def gradient(method: Any) -> tuple[Tensor, list[str]]:
        inputs = (0.5 * (matrix + matrix.mT))[None].requires_grad_()
        output = lpgd.NodeLayer(lpgd.nodes.EigenDecomposition(), gradient=method)(inputs)
        _, messages = said((output * weights).sum().backward)
        assert inputs.grad is not None
        return inputs.grad, messages

    _, messages = gradient(lpgd.LPGD(1e-2))
    assert any("elements [0] jumped" in message for message in messages)
    small, messages = gradient(lpgd.LPGD(1e-6))
    assert not messages
    exact, _ = gradient(None)
    torch.testing.assert_close(small, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("name", list(NODES))
def test_ordinary_nodes_do_not_jump(name: str) -> None:
    case = NODES[name]
    for method in (lpgd.LPGD(), lpgd.LPGD(1e-3)):
        output = lpgd.NodeLayer(case.node, gradient=method)(*case.inputs())
        generator = torch.Generator().manual_seed(3)
        _, messages = said((output * torch.randn(output.shape, generator=generator, dtype=output.dtype)).sum().backward)
        assert not messages, name


# -- what warnings say ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [lpgd.LPGD(), lpgd.LPGD(envelope="lower")], ids=str)
def test_the_value_of_a_linear_program_has_no_gradient_that_is_missing(method: lpgd.LPGD) -> None:
    """d <c, x*>/dc = x*, directly: the solver's part is zero, and rightly so."""
    costs = torch.tensor([[0.0, 1.0, 2.0], [3.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    output = lpgd.LPLayer(gradient=method, solver="HIGHS")(costs, **SIMPLEX)
    _, messages = said((output.x * costs).sum().backward)
    assert not messages
    torch.testing.assert_close(costs.grad, output.x.detach(), atol=1e-8, rtol=0)


def test_a_zero_gradient_is_said_truthfully_and_its_remedy_works() -> None:
    costs = vector(0.0, 1.0, 2.0).requires_grad_()
    output = lpgd.LPLayer(gradient=lpgd.LPGD(), solver="HIGHS")(costs, **SIMPLEX)
    weights = vector(3.0, 1.0, -2.0)
    _, messages = said((output.x @ weights + costs.sum()).backward)
    assert len(messages) == 1
    assert "through the solver is zero (a direct dependence of the loss on the cost is not affected)" in messages[0]
    torch.testing.assert_close(costs.grad, torch.ones_like(costs), rtol=0, atol=1e-9)
    unit = float(output.info.gradients[-1].unit)
    again = vector(0.0, 1.0, 2.0).requires_grad_()
    output = lpgd.LPLayer(gradient=lpgd.LPGD(unit), solver="HIGHS")(again, **SIMPLEX)
    _, messages = said((output.x @ weights).backward)
    assert not messages
    assert again.grad is not None
    assert again.grad.abs().max() > 0.1


def test_a_smaller_step_has_both_sides() -> None:
    """min x s.t. x ≥ 0 is unbounded from a tilt of -1 on."""
    for tau, used in ((2.0, "lower"), (0.1, "average")):
        c = vector(1.0).requires_grad_()
        output = lpgd.LPLayer(gradient=lpgd.LPGD(tau), solver="HIGHS")(c, lb=0.0)
        _, messages = said(output.x.sum().backward)
        assert output.info.gradients[-1].used == [used]
        assert [("A smaller tau may have both" in message) for message in messages] == [True] * (used == "lower")


def test_multipliers_that_are_not_unique_matter_to_constraints_only() -> None:
    """x ≤ 1 stated twice: which row has the multiplier is up to the solver; the gradient in q is zero all the same."""
    case = next(case for case in CASES if case.name == "qp")
    solution, cotangent = planted_solution(case), random_cotangent(case, duals=False)
    found = perturbed.perturb(perturbed.Perturbation(solution, cotangent, TIGHT, None, "average"))
    assert not found.unclear.any()
    q = vector(-2.0).requires_grad_()
    rows, h = torch.ones(2, 1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for solver in ("DAQP", "CLARABEL", "SCS"):
        output = lpgd.solve_qp(torch.eye(1, dtype=torch.float64), q, G=rows, h=h, solver=solver, gradient=lpgd.LPGD())
        _, messages = said(output.x.sum().backward)
        assert not messages
        assert q.grad is not None
        assert abs(q.grad.item()) < 1e-4
        q.grad = None


@pytest.mark.parametrize("weight", [1.0, 1e-3, 1e-6, 1e-9, 1e-12])
def test_a_loss_on_multipliers_that_stay_does_not_drown_that_on_x(weight: float) -> None:
    # minimise |x|²/2 + <q, x> with a slack row: x = -q, whatever the loss on the row's multiplier, which is 0.
    P, G = torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    q = torch.tensor([[0.3, 0.7]], dtype=torch.float64, requires_grad=True)
    output = lpgd.QPLayer(gradient=lpgd.LPGD())(P, q, G=G, h=torch.tensor([[5.0]], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(weight * output.x[0, 0] + output.z.sum(), q)
    torch.testing.assert_close(gradient, torch.tensor([[-weight, 0.0]], dtype=torch.float64), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("tau", [None, 1e-4])
@pytest.mark.parametrize("solver", ["INTERIOR", "CLARABEL", "DAQP"])
def test_more_active_constraints_than_variables_are_on_record_for_every_element(solver: str, tau: float | None) -> None:
    """min ½|x|² - <q, x> with x₁ + x₂ = 2 and x ≤ 1: three constraints hold x = (1, 1), and only q moves alone.

    Any two of them would do, so that the gradient with respect to one of them is the solver's choice.  Elements past
    the tenth, which messages do not name, are on record, and so is the last one, which is free.
    """
    q = torch.cat([torch.full((12, 2), 3.0), torch.tensor([[0.5, -0.5]])]).double()
    A, b = torch.ones(1, 2).double().requires_grad_(), torch.cat([torch.full((12, 1), 2.0), torch.zeros(1, 1)]).double()
    layer = lpgd.QPLayer(solver, lpgd.LPGD(tau=tau))
    output = layer(torch.eye(2).double(), -q, A=A, b=b, ub=1.0)
    torch.testing.assert_close(output.x, torch.cat([torch.ones(12, 2), torch.tensor([[0.5, -0.5]])]).double())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output.x[:, 0].sum().backward()
    record = output.info.gradients[-1]
    said = record.unclear | torch.tensor([used == "implicit, regularised" for used in record.used])
    assert said.tolist() == [True] * 12 + [False]
    assert any("not unique" in str(warning.message) for warning in caught)
