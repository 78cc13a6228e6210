"""Where a gradient method cannot do what was asked: fallbacks, singular systems, zero gradients, the record."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import lpgd
from lpgd import (
    LPGD,
    Clarabel,
    ImplicitKKT,
    LpgdWarning,
)
from lpgd.cones.product import Cones
from lpgd.problems import ConicData, ConicPoint, ConicProblem, ConicStructure, SparsityPattern
from lpgd.status import Status
from tests.problem_table import CASES, planted
from tests.test_gradients import TIGHT, difference, planted_solution, random_cotangent


def test_redundant_equalities_give_the_minimum_norm_answer_and_say_so() -> None:
    case = next(case for case in CASES if case.name == "redundant equalities")
    cotangent = random_cotangent(case, 7, duals=False)
    # The primal gradient is unique; a layer warns who asks for that of A or b.
    gradient, info = ImplicitKKT().vjp(planted_solution(case), cotangent, TIGHT)
    assert set(info.notices) == {"A", "b"}
    assert "multipliers of elements [0, 1, 2] are not unique" in info.notices["b"]
    assert info.used == ["implicit, regularised"] * 3
    assert info.fallbacks == [0, 1, 2]
    # The pseudo-inverse of the KKT matrix of the active rows, in plain NumPy.
    structure = case.problem.structure
    P = structure.quadratic.to_dense(case.problem.symmetric_P).numpy()
    A = structure.constraint.to_dense(case.problem.data.A).numpy()
    for element in range(3):
        active = np.r_[0:3, 3 + np.flatnonzero(case.point.y[element, 3:].numpy() > 0)]
        K = np.block([[P, A[active].T], [A[active], np.zeros((active.size, active.size))]])
        answer = -np.linalg.pinv(K, rcond=1e-10) @ np.r_[cotangent.x[element].numpy(), np.zeros(active.size)]
        np.testing.assert_allclose(gradient.q[element].numpy(), answer[:6], atol=1e-8)
        np.testing.assert_allclose(gradient.b[element].numpy()[active], -answer[6:], atol=1e-8)


def test_dual_loss_on_redundant_equalities_falls_back_on_record() -> None:
    # A tilt of b leaves redundant equalities without a solution at every tau, on both sides.
    case = next(case for case in CASES if case.name == "redundant equalities")
    cotangent = random_cotangent(case, 8)
    with pytest.warns(LpgdWarning) as caught:
        gradient, info = LPGD(1e-2).vjp(planted_solution(case), cotangent, Clarabel())
    assert any("no perturbed problem of elements" in str(item.message) for item in caught)
    assert info.used == ["implicit, regularised"] * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LpgdWarning)
        expected, _ = ImplicitKKT().vjp(planted_solution(case), cotangent, TIGHT)
    assert difference(gradient, expected) < 1e-12


def test_a_side_without_solution_leaves_the_other_side() -> None:
    # min x s.t. x >= 0: the tilt -τ g with τ g > 1 is unbounded, +τ g is not; g differs between the elements.
    structure = ConicStructure(SparsityPattern.empty(1, 1), SparsityPattern.empty(0, 1), Cones(), np.arange(1))
    empty = torch.zeros(0).double()
    data = ConicData(empty, torch.ones(1).double(), empty, empty, torch.zeros(1).double(), empty)
    problem = ConicProblem(structure, data, 2)
    solution = Clarabel().solve(problem)
    cotangent = ConicPoint(
        torch.tensor([[2.0], [0.5]]).double(), torch.zeros(2, 0).double(), torch.zeros(2, 1).double()
    )
    with pytest.warns(LpgdWarning, match=r"elements \[0\] has no solution on a side"):
        _, info = LPGD(1.0).vjp(solution, cotangent, Clarabel())
    assert info.used == ["lower", "average"]
    assert info.fallbacks == [0]
    with pytest.warns(LpgdWarning):
        _, info = LPGD(1.0, envelope="upper").vjp(solution, cotangent, Clarabel())
    assert info.used == ["lower", "upper"]


def test_elements_without_cotangent_or_solution_cost_nothing_and_get_zero() -> None:
    case = next(case for case in CASES if case.name == "qp")
    cotangent = random_cotangent(case)
    cotangent.x[1], cotangent.y[1], cotangent.z[1] = 0.0, 0.0, 0.0
    solution = replace(planted_solution(case), statuses=(Status.INFEASIBLE, Status.SOLVED, Status.SOLVED))
    for method, used in ((LPGD(0.1), "average"), (ImplicitKKT(), "implicit")):
        gradient, info = method.vjp(solution, cotangent, TIGHT)
        assert info.used == ["no solution", "zero cotangent", used]
        assert not gradient.q[:2].any()
        alone, _ = method.vjp(solution.select(torch.tensor([2])), cotangent.select(torch.tensor([2])), TIGHT)
        torch.testing.assert_close(gradient.A, alone.A, atol=1e-8, rtol=1e-8)


def test_tiny_cotangents_do_not_become_zero() -> None:
    # A mean over a large batch hands back gradients of 1e-9: the default step scales with them.
    case = next(case for case in CASES if case.name == "qp")
    cotangent = random_cotangent(case)
    tiny = ConicPoint(*(1e-9 * part for part in cotangent))
    for method in (LPGD(), ImplicitKKT()):
        large, _ = method.vjp(planted_solution(case), cotangent, TIGHT)
        small, _ = method.vjp(planted_solution(case), tiny, TIGHT)
        assert difference(tuple(1e9 * part for part in small), large) < 1e-4


def test_an_exact_gradient_of_zero_is_announced() -> None:
    case = next(case for case in CASES if case.name == "lp")
    cotangent = random_cotangent(case, duals=False)
    gradient, info = ImplicitKKT().vjp(planted_solution(case), cotangent, TIGHT)
    assert "its solution is a vertex" in info.notices["q"]
    assert (
        "no solution of this linear program moved"
        in LPGD().vjp(planted_solution(case), cotangent, TIGHT)[1].notices["q"]
    )
    assert not LPGD(tau=10.0).vjp(planted_solution(case), cotangent, TIGHT)[1].notices
    quadratic = next(case for case in CASES if case.name == "qp")
    cotangent_of_qp = random_cotangent(quadratic, duals=False)
    for method in (ImplicitKKT(), LPGD()):
        assert not method.vjp(planted_solution(quadratic), cotangent_of_qp, TIGHT)[1].notices
    assert gradient.q.abs().max() < 1e-12
    assert gradient.b.abs().max() > 0.1


def test_singular_elements_do_not_spoil_the_others() -> None:
    # Two copies of a regular problem around one whose equalities are repeated: only that one is regularised.
    case = planted("qp", Cones(zero=2, nonnegative=4), 8, seed=34, batched=("P", "A", "q", "b"))
    A = case.problem.structure.constraint.to_dense(case.problem.data.A)
    A[1, 1] = A[1, 0]
    b = case.problem.data.b.clone()
    b[1, 1] = b[1, 0]
    data = case.problem.data._replace(A=case.problem.structure.constraint.gather(A), b=b)
    problem = replace(case.problem, data=data)
    solution, cotangent = Clarabel(tolerance=1e-10).solve(problem), random_cotangent(case, 13)
    with pytest.warns(LpgdWarning, match=r"elements \[1\] are singular"):
        gradient, info = ImplicitKKT().vjp(solution, cotangent, TIGHT)
    assert info.used == ["implicit", "implicit, regularised", "implicit"]
    regular, _ = ImplicitKKT().vjp(solution.select(torch.tensor([0, 2])), cotangent.select(torch.tensor([0, 2])), TIGHT)
    torch.testing.assert_close(gradient.A[[0, 2]], regular.A, atol=1e-9, rtol=1e-9)


def test_a_loss_gradient_along_the_cost_is_no_zero_gradient_to_warn_of() -> None:
    # <x, c> at a vertex: a tilt along the cost changes no solution, and the loss depends on c directly.
    c = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64, requires_grad=True)
    layer = lpgd.LPLayer(gradient=ImplicitKKT())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = layer(c, A=torch.ones(1, 3, dtype=torch.float64), b=torch.ones(1, dtype=torch.float64), lb=0.0).x
        (gradient,) = torch.autograd.grad((x * c).sum(), c)
    torch.testing.assert_close(gradient, x.detach())
