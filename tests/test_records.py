"""What is on record is readable: which solver and why, and representations that fit on a screen."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import cvxpy as cp
import pytest
import torch

import lpgd
from lpgd.solvers import SOLVERS

COSTS = torch.randn(150, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
EYE = torch.eye(10, dtype=torch.float64)
TILT = lpgd.LPGD(tau=1.0)
NEAREST = lpgd.Node(lambda y, w: (y - w).square().sum(), name="nearest")


def large_sparse() -> Any:
    P = torch.eye(900, dtype=torch.float64).to_sparse()
    return lpgd.QPLayer("CLARABEL")(P, torch.ones(900, dtype=torch.float64), lb=0.0)


def cvxpy_layer(**options: Any) -> Any:
    x, c = cp.Variable(10), cp.Parameter(10)
    return lpgd.CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - c)), [cp.norm(x) <= 1]), [c], [x], **options)


CALLS: dict[str, tuple[Any, str]] = {
    "rule": (lambda c: lpgd.LPLayer(gradient=TILT)(c, lb=0.0, ub=1.0).x, "DAQP, chosen by the rule: the fastest for s"),
    "named": (lambda c: lpgd.QPLayer("clarabel")(EYE, c, lb=0.0).x, "CLARABEL, as asked for."),
    "cones": (
        lambda c: cvxpy_layer()(c)[0],
        "CLARABEL, chosen by the rule: no solver is known to be faster on such problems, so it is the first",
    ),
    "options": (lambda c: cvxpy_layer(solver_args={"rho_x": 1e-6})(c)[0], "SCS, whose own options were given."),
    "call": (
        lambda c: lpgd.QPLayer()(EYE, c, lb=0.0, solver_args={"solve_method": "SCS"}).x,
        "SCS, as asked for.",
    ),
    "node": (lpgd.NodeLayer(lpgd.nodes.Projection()), "Projection's own, as it has one."),
    "generic": (
        lpgd.NodeLayer(NEAREST),
        "newton, as nearest has 10 variables and no solver of its own.",
    ),
    "SciPy": (lpgd.NodeLayer(NEAREST, solver=lpgd.NodeSolver(algorithm="scipy")), "scipy, as asked for."),
    "function": (lpgd.BlackboxLayer(lambda c: c < 0, TILT), "the function that was given."),
}


def output_info(call: Any, costs: torch.Tensor) -> Any:
    """The record that belongs to a tensor of an output, by the graph that leads to it."""
    seen: list[Any] = []
    original = lpgd.autograd.CallInfo

    def recording(*args: Any, **options: Any) -> Any:
        seen.append(original(*args, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lpgd.layers.base.CallInfo", recording)
        value = call(costs)
        value.sum().backward()
    return seen[0]


@pytest.mark.parametrize(("call", "expected"), CALLS.values(), ids=CALLS)
def test_the_solver_and_the_reason_are_on_record(call: Any, expected: str) -> None:
    info = output_info(call, COSTS[:5].clone().requires_grad_())
    assert info.solver.startswith(expected)
    assert f"solver: {expected}" in repr(info)
    assert "5 SOLVED" in repr(info)
    assert len(repr(info).splitlines()) <= 6


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for solver in SOLVERS:
        if solver.name != "OSQP":
            monkeypatch.setattr(solver, "is_installed", classmethod(lambda cls: False))
    info = lpgd.QPLayer()(EYE, COSTS[:3], lb=0.0).info
    others = "DAQP, MOREAU, (PIQP, PROXQP, )?CLARABEL, SCS, INTERIOR"  # the two in the middle on few cores
    rule = rf"OSQP, chosen by the rule of those installed \(before it come {others}\): "
    assert re.match(rule, info.solver)


def test_representations_fit_on_a_screen() -> None:
    costs = COSTS.clone().requires_grad_()
    output = lpgd.LPLayer(gradient=TILT)(costs, lb=0.0, ub=1.0)
    for _ in range(9):
        output.x.sum().backward(retain_graph=True)
    sparse = large_sparse()
    solution = output.info.solution
    node = lpgd.NodeLayer(lpgd.nodes.Projection())(costs)
    path = lpgd.BlackboxLayer(lambda c: c < 0, TILT)(costs)
    values = lpgd.envelopes(lpgd.LPLayer(), {"c": COSTS, "lb": 0.0, "ub": 1.0}, lambda out: out.x.square().sum(-1), 1.0)
    shown = [output.info, solution, solution.problem, solution.problem.structure, solution.residuals, values]
    shown += [sparse.info, sparse.info.solution.problem.structure, output.info.gradients[0], node.info, path.info]
    shown += [other.info.solution.problem for other in (node, path)]
    for one in shown:
        text = repr(one)
        assert len(text) < 1500, text
        assert len(text.splitlines()) <= 10, text
        assert type(one).__name__ in text
    assert "6 earlier ones" in repr(output.info)
    assert repr(solution).startswith("ConicSolution(150 SOLVED; x (150, 10)")
    assert "10 variables and 0 rows" in repr(solution.problem.structure)


def test_what_takes_long_to_import_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, lpgd\n"
        "late = {'cvxpy', 'scipy.optimize', 'matplotlib', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not late, late\n"
        "import torch\n"
        "lpgd.QPLayer()(torch.eye(2), torch.ones(2), lb=0.0)\n"
        "assert 'cvxpy' not in sys.modules and lpgd.CvxpyLayer.__name__ == 'CvxpyLayer'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
