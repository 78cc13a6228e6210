"""Elements without a solution: the exception, the rows that are filled, and the gradients of the others."""

from __future__ import annotations

import pickle
from typing import Any

import cvxpy as cp
import pytest
import torch

import lpgd
from lpgd.status import Status
from tests.layer_cases import METHODS, TIGHT, close, data, leaf, normal, program, weighted
from tests.test_cvxpy_layer_errors import failing


def test_the_exception_names_elements_and_carries_statuses() -> None:
    layer, tensors = failing()
    with pytest.raises(lpgd.SolverError, match=r"elements 1, 3 of 5: INFEASIBLE — .*relax.*on_error='nan'") as caught:
        layer(*tensors)
    solved, infeasible = Status.SOLVED, Status.INFEASIBLE
    assert caught.value.statuses == (solved, infeasible, solved, infeasible, solved)
    assert caught.value.indices == (1, 3)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.statuses, again.indices) == (str(caught.value), caught.value.statuses, (1, 3))


FAILURES = {
    "infeasible": ([-1.0, -1.0, -1.0], 0.2, {}, Status.INFEASIBLE, "check the parameters of these elements"),
    "unbounded": ([1.0, 1.0, 1.0], torch.inf, {}, Status.UNBOUNDED, "add bounds"),
    "NaN": ([1.0, torch.nan, 1.0], 1.0, {}, Status.INVALID_DATA, "NaN or infinity"),
    "infinite cost": ([1.0, torch.inf, 1.0], 1.0, {}, Status.INVALID_DATA, "NaN or infinity"),
    "NaN bound": ([1.0, 1.0, 1.0], torch.nan, {}, Status.INVALID_DATA, "NaN or infinity"),
    "iterations": ([1.0, 2.0, 3.0], 1.0, {"max_iters": 1, "rescue": False}, Status.ITERATION_LIMIT, "raise it"),
    "time": ([1.0, 2.0, 3.0], 1.0, {"time_limit": 1e-9}, Status.TIME_LIMIT, "raise it"),
}


@pytest.mark.parametrize("solver", ["CLARABEL", "SCS"])
@pytest.mark.parametrize(("cost", "limit", "options", "status", "advice"), FAILURES.values(), ids=FAILURES)
def test_every_failure_has_its_status(
    solver: str, cost: list[float], limit: float, options: dict[str, Any], status: Status, advice: str
) -> None:
    if (solver, status) == ("SCS", Status.TIME_LIMIT):
        options = {"time_limit": 1e-9, "eps": 1e-12}
    x, c, u = cp.Variable(3), cp.Parameter(3), cp.Parameter()
    problem = cp.Problem(cp.Maximize(c @ x - cp.norm(x)), [x <= u, cp.sum(x) >= 1])
    layer = lpgd.CvxpyLayer(problem, [c, u], [x], solver=solver)
    batch = torch.stack([torch.tensor([1.0, 2.0, 3.0]), torch.tensor(cost)]), torch.tensor([1.0, limit])
    message = rf"1 of 2: {status.name} — .*{advice}" if not options else rf"0, 1 of 2: {status.name} — .*{advice}"
    with pytest.raises(lpgd.SolverError, match=message) as caught:
        layer(*batch, solver_args=options)
    assert caught.value.statuses[1] is status
    assert caught.value.statuses[0] is (status if options else Status.SOLVED)
    solution = layer.solve(*batch, solver_args=options)
    assert solution.statuses == caught.value.statuses


@pytest.mark.parametrize("mode", ["nan", "warn"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_failed_elements_have_no_gradient_and_the_others_theirs(method: lpgd.LPGD, mode: Any) -> None:
    layer, tensors = failing(gradient=method, on_error=mode)
    shared, good = [leaf(tensor) for tensor in tensors], [0, 2, 4]
    if mode == "warn":
        with pytest.warns(lpgd.LpgdWarning, match=r"elements 1, 3 of 5: INFEASIBLE.*zero gradient"):
            outputs = layer(*shared)
    else:
        outputs = layer(*shared)
    assert outputs.info.statuses[1] is Status.INFEASIBLE
    assert all(out[[1, 3]].isnan().all() for out in outputs)
    # A square hands back NaN for the failed rows; they must reach neither shared nor other elements' parameters.
    sum(((normal(*out.shape) * out).square().sum() for out in outputs), torch.zeros(())).backward()
    assert [outputs.info.gradients[0].used[k] for k in (1, 3)] == ["no solution"] * 2

    alone = [leaf(tensor[good] if tensor.shape[0] == 5 else tensor) for tensor in tensors]
    rest = layer(*alone)
    sum(((normal(*out.shape)[good] * part).square().sum() for out, part in zip(outputs, rest, strict=True))).backward()  # pyright: ignore
    close([out[good] for out in outputs], rest, 1e-9)
    for own, expected in zip(shared, alone, strict=True):
        assert own.grad is not None
        assert expected.grad is not None
        batched = own.shape[0] == 5
        close([own.grad[good] if batched else own.grad], [expected.grad], 1e-4)
        if batched:
            assert not own.grad[[1, 3]].any()


def test_failed_elements_have_no_tangent_and_the_others_theirs() -> None:
    layer, tensors = failing(on_error="nan")
    tangents = tuple(normal(*tensor.shape, seed=3) for tensor in tensors)
    _, changes = torch.func.jvp(lambda *a: layer(*a)[0], tuple(tensors), tangents)
    good = [0, 2, 4]
    chosen = [tuple(t[good] if t.shape[0] == 5 else t for t in part) for part in (tensors, tangents)]
    _, expected = torch.func.jvp(lambda *a: layer(*a)[0], *chosen)
    close([changes[good]], [expected], 1e-9)
    assert not changes[[1, 3]].any()


@pytest.mark.parametrize("value", [torch.nan, -1.0, 0.0, torch.inf])
def test_invalid_parameters_do_not_poison_what_computed_the_others(value: float) -> None:
    x, a, b = cp.Variable(pos=True), cp.Parameter(pos=True), cp.Parameter(pos=True)
    layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(a * x + b / x)), [a, b], [x], gp=True, on_error="nan", solver_args=TIGHT
    )
    own, shared = leaf(torch.tensor([1.0, value, 4.0]).double()), leaf(torch.tensor(2.0).double())
    (output,) = layer(own, shared)
    assert output.isnan().tolist() == [False, True, False]
    output.square().sum().backward()  # x² = b / a
    close([own.grad, shared.grad], [torch.tensor([-2.0, 0.0, -0.125]).double(), torch.tensor(1.25).double()], 1e-5)  # pyright: ignore


def test_a_batch_without_any_solution_and_nan_that_is_shared() -> None:
    layer, tensors = failing(on_error="nan")
    for changed in (
        [*tensors[:4], torch.full((4,), -3.0).double()],
        [*tensors[:3], torch.tensor([torch.nan]), tensors[4]],
    ):
        own = [leaf(tensor) for tensor in changed]
        outputs = layer(*own)
        assert all(out.shape[0] == 5 and out.isnan().all() for out in outputs)
        weighted(outputs).backward()
        assert all(tensor.grad is not None and not tensor.grad.any() for tensor in own)


def test_warn_returns_the_last_iterate() -> None:
    layer = program(on_error="warn", solver="CLARABEL")
    own = [leaf(tensor) for tensor in data(2)]
    with pytest.warns(lpgd.LpgdWarning, match="elements 0, 1 of 2: ITERATION_LIMIT.*last iterate"):
        outputs = layer(*own, solver_args={"max_iters": 3, "rescue": False, "refine": False})
    assert all(out.isfinite().all() for out in outputs)
    weighted(outputs).backward()
    assert all(tensor.grad is not None and not tensor.grad.any() for tensor in own)


def test_a_parameter_of_a_geometric_program_that_is_not_positive_is_named() -> None:
    x, a = cp.Variable(pos=True), cp.Parameter(2, pos=True, name="a")
    layer = lpgd.CvxpyLayer(cp.Problem(cp.Minimize(x), [x >= a]), [a], [x], gp=True)
    with pytest.raises(lpgd.SolverError, match=r"elements? 1, 2 of 3") as error:
        layer(torch.tensor([[1.0, 2.0], [1.0, -3.0], [0.0, 1.0]], dtype=torch.float64))
    assert "parameter a of element 1 is -3 in row 1, and must be positive in a geometric program" in str(error.value)
    assert "parameter a of element 2 is 0 in row 0, and must be positive" in str(error.value)
