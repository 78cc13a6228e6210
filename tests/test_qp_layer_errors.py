"""What QPLayer and LPLayer refuse and report, and the layer as an object: copies, threads, options, warm starts."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

import lpgd
from lpgd.layers import LayerOutput
from lpgd.status import Status
from tests.layer_cases import at_once, close, leaf, normal, weighted
from tests.program_cases import DIMENSIONS, FINE, gradients, program, solved

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta")

# Failures


def infeasible(element: int) -> dict[str, Tensor]:
    """Three elements that share their matrices; one has a lower bound above its upper one."""
    data = {name: part if name in ("q", "lb", "ub") else part[0] for name, part in program(3).items()}
    data["lb"], data["ub"] = torch.full((3, 4), -1.0).double(), torch.full((3, 4), 1.0).double()
    data["b"], data["h"] = 0 * data["b"], data["h"].abs()
    data["lb"][element, 2] = 2.0
    return data


def test_failed_elements_are_named() -> None:
    with pytest.raises(lpgd.SolverError, match=r"element 1 of 3: INFEASIBLE") as caught:
        lpgd.solve_qp(**infeasible(1))
    assert caught.value.indices == (1,)


@pytest.mark.parametrize("cause", ["infeasible", "NaN cost", "NaN matrix", "NaN bound"])
def test_failed_elements_have_no_gradient_and_leave_the_others_exact(cause: str) -> None:
    data = infeasible(1)
    if cause != "infeasible":
        data["lb"] = torch.full((3, 4), -1.0).double()
    if cause == "NaN matrix":
        data["P"] = data["P"].expand(3, 4, 4)
    spoiled = {"NaN cost": "q", "NaN matrix": "P", "NaN bound": "ub"}.get(cause)
    if spoiled:
        data[spoiled] = data[spoiled].clone()
        data[spoiled][1].view(-1)[0] = torch.nan
    data = {name: leaf(part) for name, part in data.items()}
    output = solved(data, on_error="nan")
    assert output.info.statuses[1] is (Status.INFEASIBLE if cause == "infeasible" else Status.INVALID_DATA)
    assert all(part[1].isnan().all() for part in output)
    batched = {name: part.ndim > DIMENSIONS[name] for name, part in data.items()}
    own = torch.autograd.grad(weighted([part.nan_to_num() for part in output]), list(data.values()))
    rest = {name: leaf(part[[0, 2]] if batched[name] else part) for name, part in data.items()}
    parts = ((normal(3, *o.shape[1:], seed=k)[[0, 2]] * o).sum() for k, o in enumerate(solved(rest)))
    loss = sum(parts, torch.zeros(()))
    expected = torch.autograd.grad(loss, list(rest.values()))
    for name, one, other in zip(data, own, expected, strict=True):
        close([one[[0, 2]] if batched[name] else one], [other], 1e-6)
        if batched[name]:
            assert not one[1].any()


def test_failures_can_be_warnings() -> None:
    layer = lpgd.QPLayer(on_error="warn")
    with pytest.warns(lpgd.LpgdWarning, match="element 2 of 3: INFEASIBLE"):
        layer(**infeasible(2))
    assert layer.solve(**infeasible(2)).statuses == (Status.SOLVED, Status.SOLVED, Status.INFEASIBLE)


QP, LP = lpgd.QPLayer(), lpgd.LPLayer()
I2, V2, ROW, ONE = torch.eye(2), torch.zeros(2), torch.ones(1, 2), torch.ones(1)
BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "solver name": (lambda: lpgd.QPLayer("GUROBI"), ValueError, "'GUROBI' is not a solver"),
    "solver kind": (lambda: lpgd.QPLayer(3), TypeError, "solver is 3"),  # pyright: ignore[reportArgumentType]
    "option": (lambda: lpgd.QPLayer(solver_args={"epsilon": 1}), TypeError, "'epsilon' is not an option"),
    "option of a call": (lambda: QP(I2, V2, solver_args={"epsilon": 1}), TypeError, "'epsilon' is not an option"),
    "on_error": (lambda: lpgd.LPLayer(on_error="skip"), ValueError, "'skip'.*raise, nan, warn"),  # pyright: ignore[reportArgumentType]
    "executor": (lambda: lpgd.LPLayer(executor=4), TypeError, "concurrent.futures.Executor"),  # pyright: ignore[reportArgumentType]
    "gradient": (lambda: lpgd.QPLayer(gradient=lpgd.LPGD), TypeError, "gradient method such as"),  # pyright: ignore[reportArgumentType]
    "no quadratic": (lambda: QP(None, V2), TypeError, r"P is None; pass a torch tensor of shape \(\*batch, 2, 2\)"),
    "not square": (lambda: QP(ROW, V2), ValueError, r"P has shape \(1, 2\); expected \(\*batch, 2, 2\)"),
    "flat": (lambda: QP(V2, V2), ValueError, r"P has shape \(2,\); expected \(\*batch, 2, 2\)"),
    "no cost": (lambda: QP(I2, ONE[0]), ValueError, r"q has shape \(\); expected \(\*batch, n\)"),
    "column": (lambda: QP(I2, V2[:, None]), ValueError, r"q has shape \(2, 1\); expected \(\*batch, 2\)"),
    "empty": (lambda: LP(torch.zeros(0)), ValueError, r"c has shape \(0,\): there is nothing"),
    "cost": (lambda: LP([1.0, 2.0]), TypeError, r"c is a list; pass a torch tensor: torch\.as_tensor\(c\)"),
    "columns": (
        lambda: QP(I2, V2, A=torch.ones(1, 3), b=ONE),
        ValueError,
        r"A has shape \(1, 3\); expected \(.*, 2\)",
    ),
    "flat rows": (lambda: QP(I2, V2, A=V2, b=ONE), ValueError, r"A has shape \(2,\); expected \(\*batch, m, 2\)"),
    "rows": (lambda: QP(I2, V2, G=ROW, h=V2), ValueError, r"h has shape \(2,\); expected \(\*batch, 1\)"),
    "order of another library": (
        lambda: QP(I2, V2, ROW, ONE, ROW, ONE),  # pyright: ignore[reportArgumentType]
        TypeError,
        r"QPLayer takes constraints and bounds by name only.*layer\(P, q, A=A, b=b, G=G, h=h, lb=lb, ub=ub\)",
    ),
    "order in a solve": (lambda: LP.solve(V2, ROW), TypeError, r"LPLayer takes .*layer\.solve\(c, A=A"),  # pyright: ignore[reportArgumentType]
    "order in a function": (lambda: lpgd.solve_qp(I2, V2, ROW), TypeError, r"solve_qp\(P, q, A=A"),  # pyright: ignore[reportArgumentType]
    "order in another": (lambda: lpgd.solve_lp(V2, ROW), TypeError, r"solve_lp\(c, A=A"),  # pyright: ignore[reportArgumentType]
    "keyword": (lambda: QP(I2, V2, M=ROW), TypeError, r"QPLayer.forward\(\) got an unexpected keyword argument 'M'"),  # pyright: ignore[reportCallIssue]
    "keyword of the layer": (lambda: lpgd.QPLayer(integer=[0]), TypeError, r"QPLayer.__init__\(\).*'integer'"),  # pyright: ignore[reportCallIssue]
    "A alone": (lambda: QP(I2, V2, A=ROW), ValueError, "A is given but b is not"),
    "b alone": (lambda: QP(I2, V2, b=ONE), ValueError, "b is given but A is not"),
    "G alone": (lambda: LP(V2, G=ROW), ValueError, "G is given but h is not"),
    "h alone": (lambda: LP(V2, h=ONE), ValueError, "h is given but G is not"),
    "bound": (lambda: LP(V2, lb=torch.zeros(3)), ValueError, r"lb has shape \(3,\); expected \(\*batch, 2\)"),
    "bound kind": (lambda: LP(V2, ub="1"), TypeError, "ub is a str"),
    "end kind": (lambda: LP(V2, G=ROW, h="1"), TypeError, "h is a str; pass a torch tensor of shape"),
    "end array": (lambda: LP(V2, G=ROW, h=np.ones(1)), TypeError, "h is a NumPy array; pass a torch tensor: torch"),
    "SciPy": (
        lambda: QP(scipy.sparse.eye(2), V2),
        TypeError,
        r"P is a .* of SciPy; .* torch\.sparse_csr_tensor\(P\.ind",
    ),
    "bound switch": (lambda: LP(V2, ub=True), TypeError, "ub is a bool"),
    "integers": (lambda: LP(torch.tensor([1, 2])), TypeError, "c is torch.int64; it must be float64, float32"),
    "complex": (lambda: QP(I2 + 0j, V2), TypeError, "P is torch.complex64"),
    "numpy": (lambda: QP(np.eye(2), V2), TypeError, r"P is a NumPy array; pass a torch tensor: torch\.as_tensor\(P\)"),
    "devices": (lambda: QP(I2.to("meta"), V2), ValueError, "q on cpu, P on meta.*move them to one"),
    "batches": (
        lambda: QP(torch.ones(3, 2, 2), torch.ones(4, 2)),
        ValueError,
        r"broadcast: q \(4,\), P \(3,\)",
    ),
    "sparse vector": (lambda: QP(I2, V2.to_sparse()), TypeError, "q is torch.sparse_coo; pass a dense tensor"),
    "layout": (lambda: QP(I2.to_sparse_bsr((1, 1)), V2), TypeError, "P is torch.sparse_bsr; pass a dense, COO, CSR"),
    "hybrid": (lambda: QP(torch.ones(3, 2, 2).to_sparse(2), V2), ValueError, "P is a hybrid tensor with 1 dense dim"),
    "warm start": (lambda: QP(I2, V2, warm_start="yes"), TypeError, "str; it takes True, an output or a Solution"),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_errors_name_what_is_wrong(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.compile(message, re.DOTALL)):
        call()


# The layer as an object


def test_outputs_are_named_tuples_with_a_record() -> None:
    data = program(3)
    output = lpgd.QPLayer(solver_args=FINE)(**{**data, "q": leaf(data["q"])})
    assert output._fields == ("x", "y", "z", "z_box")
    assert isinstance(output, tuple)
    assert not isinstance(output, LayerOutput)
    assert output.info.statuses == (Status.SOLVED,) * 3
    assert float(output.info.solution.residuals.worst.max()) < 1e-8
    output.x.sum().backward()
    assert output.info.gradients[0].counts == {"implicit": 3}


def test_two_calls_before_a_backward() -> None:
    cases = [{name: leaf(part) for name, part in program(3, seed=10 * k).items()} for k in range(2)]
    layer = lpgd.QPLayer(solver_args=FINE)
    outputs = [layer(**case) for case in cases]
    for case, output in zip(cases, outputs, strict=True):
        expected = gradients(solved(case), list(case.values()))
        close(gradients(output, list(case.values())), expected, 1e-8)


def copies(layer: lpgd.QPLayer) -> Iterator[lpgd.QPLayer]:
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))


def test_copies_work_also_after_calls() -> None:
    data = program(3)
    layer = lpgd.QPLayer("SCS", lpgd.LPGD(tau=1e-3), {"eps": 1e-9}, "nan", lpgd.SerialExecutor())
    expected = layer(**data, warm_start=True)
    for duplicate in copies(layer):
        assert (duplicate.gradient, duplicate.solver, duplicate.on_error) == (layer.gradient, layer.solver, "nan")
        close(duplicate(**data, warm_start=True), expected, 1e-6)
        close(duplicate(**data, warm_start=expected), expected, 1e-6)
    (left_open, _) = copies(lpgd.QPLayer(solver_args={"eps": 1e-9}))
    assert left_open.solver is None
    solution = left_open(**data).info.solution
    assert solution is not None
    assert solution.residuals.worst.max() < 1e-7


def test_threads_share_a_layer() -> None:
    layer = lpgd.QPLayer("SCS", solver_args={"eps": 1e-10})
    cases = [{name: leaf(part) for name, part in program(k + 1, seed=10 * k).items()} for k in range(4)]
    expected = [layer(**case) for case in cases]

    def work(k: int) -> tuple[Any, list[Tensor]]:
        output = [layer(**cases[k], warm_start=True) for _ in range(3)][-1]
        return output, gradients(output, list(cases[k].values()))

    for case, wanted, (output, slopes) in zip(cases, expected, at_once(work, len(cases)), strict=True):
        close(output, wanted, 1e-6)
        close(slopes, gradients(wanted, list(case.values())), 1e-4)


def test_the_solver_can_be_replaced() -> None:
    data = program(2)
    layer = lpgd.QPLayer()
    expected = layer(**data)
    assert layer.solver is None
    assert "chosen" in repr(layer)
    for solver in ("SCS", lpgd.ECOS()):
        layer.solver = solver
        close(layer(**data), expected, 1e-4)
        assert layer.solver is not None
        assert layer.solver.name in repr(layer)
    with pytest.raises(ValueError, match="'GLPK' is not a solver"):
        layer.solver = "GLPK"
    layer.solver = None
    close(layer(**data, solver_args={"solve_method": "ECOS", "eps": 1e-9}), expected, 1e-5)
    with pytest.raises(lpgd.SolverError, match="ITERATION_LIMIT"):
        layer(**data, solver_args={"max_iters": 2, "rescue": False})
    close(layer(**data), expected, 0.0)


def test_options_without_a_solver_reach_the_one_that_is_chosen() -> None:
    layer = lpgd.QPLayer(solver_args={"max_iters": 2, "rescue": False})
    with pytest.raises(lpgd.SolverError, match="ITERATION_LIMIT"):
        layer(**program())
    layer(**program(), solver_args={"max_iters": 100})


def test_warm_starts_save_iterations_and_change_nothing() -> None:
    data = program(4, seed=30)
    layer = lpgd.QPLayer("SCS", solver_args={"eps": 1e-10})
    cold = layer(**data)
    for previous in (True, cold, cold.info.solution, layer.solve(**data)):
        warm = layer(**data, warm_start=previous)
        close(warm, cold, 1e-6)
        assert warm.info.solution is not None
        assert cold.info.solution is not None
        assert warm.info.solution.iterations.max() < cold.info.solution.iterations.min()
    assert lpgd.solve_qp(**data, solver="SCS", warm_start=cold).info.solution.iterations.max() <= 25
    other = program(4, seed=30, k=3)
    close(layer(**other, warm_start=True), solved(other), 1e-6)  # of another structure: not used
    with pytest.raises(ValueError, match=r"4 variables and 4 rows.*same structure"):
        layer(**other, warm_start=cold)


def test_solve_hands_out_the_whole_answer() -> None:
    data = program(2, 3)
    data["q"].requires_grad_()
    solution, output = lpgd.QPLayer(solver_args=FINE).solve(**data), solved(data)
    close([solution.x.reshape(2, 3, 4), solution.z.reshape(2, 3, 4)], [output.x.detach(), output.z_box.detach()], 1e-9)
    close([solution.y.reshape(2, 3, 3)], [torch.cat([output.y, output.z], -1).detach()], 1e-9)
    assert not solution.x.requires_grad
    assert lpgd.LPLayer().solve(-torch.ones(2, 3), lb=0.0, ub=1.0).statuses == (Status.SOLVED,) * 2


def test_an_exact_gradient_of_a_moving_solution_does_not_warn() -> None:
    data = {name: leaf(part) for name, part in program(3).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weighted(solved(data)).backward()
