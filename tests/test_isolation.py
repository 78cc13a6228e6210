"""What is wrong with some elements of a batch changes nothing for the others: status, solution and gradient.

Not one bit of them: an element alone has the numbers that it has beside others.  Where a solver's own workspace or a
batched product forbids that, ``ROUNDED`` and the bounds below say how far they may be.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import lpgd
from lpgd.execution.workspaces import workspaces
from tests.node_cases import NODES
from tests.oracles import nearest_in_box

N, INFINITE = 5, float("inf")
BAD = ("infeasible", "nan", "unbounded", "degenerate", "large", "small", "slow")
KINDS = [kind for bad in BAD for kind in ("good", bad)]
GOOD = [place for place, kind in enumerate(KINDS) if kind == "good"]
METHODS = {"LPGD": lpgd.LPGD(), "LPGD of a step": lpgd.LPGD(tau=0.1), "ImplicitKKT": lpgd.ImplicitKKT()}
ROUNDED = {"SCS", "PIQP", "PROXQP", "HIGHS", "INTERIOR"}
"""Solvers whose answers depend, in the last digits, on what they solved before, or solve beside."""
BOUND, NODE_BOUND = 1e-8, 1e-14


def programs(quadratic: bool) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    size = len(KINDS)
    root, G, inside = draw(size, N, N), draw(size, 4, N), 0.3 * draw(size, N)
    data = {
        "P": root @ root.mT + 0.5 * torch.eye(N, dtype=torch.float64),
        "q": draw(size, N),
        "G": G,
        "h": (G @ inside[..., None])[..., 0] + 0.3,
        "lb": torch.full((size, N), -2.0, dtype=torch.float64),
        "ub": torch.full((size, N), 2.0, dtype=torch.float64),
    }
    for place, kind in enumerate(KINDS):
        if kind == "infeasible":
            data["G"][place, 1], data["h"][place, :2] = -data["G"][place, 0], -9.0
        elif kind == "nan":
            data["q"][place, 1] = torch.nan
        elif kind == "unbounded":
            data["P"][place], data["G"][place], data["h"][place] = 0.0, 0.0, 1.0
            data["lb"][place], data["ub"][place] = -INFINITE, INFINITE
        elif kind == "degenerate":
            data["G"][place, 1], data["h"][place, 1] = data["G"][place, 0], data["h"][place, 0]
        elif kind in ("large", "small"):
            data["q"][place] *= 1e7 if kind == "large" else 1e-7
        elif kind == "slow":
            data["P"][place] = torch.diag(torch.logspace(-6, 6, N, dtype=torch.float64))
            data["G"][place] *= torch.logspace(-4, 4, 4, dtype=torch.float64)[:, None]
            data["h"][place] *= torch.logspace(-4, 4, 4, dtype=torch.float64)
    if not quadratic:
        del data["P"]
    return data


def loss_of(output: Tensor) -> Tensor:
    """A loss of finite numbers, with another weight for each entry of an element."""
    weights = torch.arange(1, output[0].numel() + 1, dtype=output.dtype).reshape(output[0].shape)
    return (torch.where(torch.isfinite(output), output, 0.0) * weights).sum()


def answers(call: Callable[..., Any], data: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[lpgd.Status, ...]]:
    """Solutions and gradients, and statuses; ``call`` has the outputs as tuples or as one tensor."""
    workspaces.clear()
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = call(**leaves)
        x = output if isinstance(output, Tensor) else output[0]
        loss_of(x).backward()
    info = output.info
    found = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"x": x.detach(), **found}, info.statuses


def isolated(
    call: Callable[..., Any],
    data: dict[str, Tensor],
    good: Sequence[int],
    bound: float = 0.0,
    shared: Sequence[str] = (),
) -> tuple[dict[str, Tensor], tuple[lpgd.Status, ...]]:
    """What all elements have together, where each good one has what it has alone: the same bits, or within a bound."""
    together, statuses = answers(call, data)
    for place in good:
        one = {name: value if name in shared else value[place : place + 1] for name, value in data.items()}
        alone, status = answers(call, one)
        assert status == (lpgd.Status.SOLVED,)
        assert statuses[place] is status[0]
        for name, value in alone.items():
            if name.removeprefix("gradient of ") in shared:
                continue
            error = float((value[0] - together[name][place]).abs().max() / (1.0 + value.abs().max()))
            assert torch.equal(value[0], together[name][place]) if not bound else error <= bound, (place, name, error)
    return together, statuses


def on_rows(layer: Any) -> Callable[..., Any]:
    """A QPLayer or LPLayer by names."""

    def call(**leaves: Tensor) -> Any:
        first = [leaves.pop(name) for name in ("P", "q") if name in leaves]
        return layer(*first, **leaves)

    return call


def layer_of(solver: str, quadratic: bool, method: str, on_error: Any) -> Any:
    kind = lpgd.QPLayer if quadratic else lpgd.LPLayer
    return kind(solver, METHODS[method], on_error=on_error)


# ProxQP refuses linear programs.
PAIRS = [
    pytest.param(name, quadratic, id=f"{name}-{'QPLayer' if quadratic else 'LPLayer'}")
    for name in lpgd.available()
    for quadratic in (True, False)
    if quadratic or name != "PROXQP"
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("solver", "quadratic"), PAIRS)
def test_bad_elements_change_nothing_for_the_others(solver: str, quadratic: bool, method: str) -> None:
    call = on_rows(layer_of(solver, quadratic, method, "nan"))
    bound = BOUND if solver in ROUNDED else 0.0
    together, statuses = isolated(call, programs(quadratic), GOOD, bound)
    for place, kind in enumerate(KINDS):
        if kind in ("infeasible", "nan"):
            assert not statuses[place].usable
            assert not together["gradient of q"][place].any()


@pytest.mark.parametrize("solver", lpgd.available())
def test_nor_where_matrices_are_shared(solver: str) -> None:
    data = programs(quadratic=True)
    data["P"], data["G"] = data["P"][0], data["G"][0]
    data["h"][:] = 0.5
    data["h"][3] = -1e3
    call = on_rows(layer_of(solver, True, "LPGD of a step", "nan"))
    isolated(call, data, GOOD, BOUND if solver in ROUNDED else 0.0, shared=("P", "G"))


@pytest.mark.parametrize("on_error", ["raise", "warn", "nan", "relax"])
@pytest.mark.parametrize("method", METHODS)
def test_whatever_is_done_about_errors(on_error: str, method: str) -> None:
    data, good = programs(quadratic=True), GOOD
    harmless = {
        "raise": ("good", "degenerate", "small", "slow"),
        "relax": ("good", "infeasible", "degenerate", "small"),
    }
    if on_error in harmless:
        chosen = [place for place, kind in enumerate(KINDS) if kind in harmless[on_error]]
        data = {name: value[chosen] for name, value in data.items()}
        good = [place for place, old in enumerate(chosen) if KINDS[old] == "good"]
    isolated(on_rows(layer_of("CLARABEL", True, method, on_error)), data, good)


@pytest.mark.parametrize("solver", lpgd.available())
def test_errors_and_warnings_name_the_bad_elements_alone(solver: str) -> None:
    data = programs(True)
    bad = [place for place, kind in enumerate(KINDS) if kind in ("infeasible", "nan", "unbounded")]
    layer = layer_of(solver, True, "ImplicitKKT", "raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(lpgd.SolverError) as raised:
            answers(on_rows(layer), data)
    assert set(bad) <= set(raised.value.indices)
    assert not set(GOOD) & set(raised.value.indices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warned, _ = answers(on_rows(layer_of(solver, True, "ImplicitKKT", "warn")), data)
        silent, _ = answers(on_rows(layer_of(solver, True, "ImplicitKKT", "nan")), data)
    assert torch.allclose(warned["x"][GOOD], silent["x"][GOOD], rtol=0.0, atol=1e-10)


# -- other front-ends ---------------------------------------------------------------------------------------------

ODD, EVEN = range(1, 9, 2), range(0, 9, 2)


def draws(seed: int) -> Callable[..., Tensor]:
    random = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)


CONIC = [name for name in ("CLARABEL", "ECOS", "MOREAU", "SCS") if name in lpgd.available()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", CONIC)
def test_conic_layers(solver: str, method: str) -> None:
    draw, size, n = draws(0), 9, 7
    cones = lpgd.Cones(nonnegative=2 * n, second_order=(3, 4))
    root, curved = draw(size, n, n), 0.3 * draw(size, 7, n)
    box = torch.cat([torch.eye(n), -torch.eye(n)]).double().expand(size, -1, -1)
    data = {"P": root @ root.mT, "q": draw(size, n), "A": torch.cat([box, curved], 1)}
    data["b"] = torch.cat([torch.full((size, 2 * n), 2.0), draw(size, 7).float()], 1).double()
    data["b"][:, 2 * n], data["b"][:, 2 * n + 3] = 4.0, 4.0
    data["q"][1, 0], data["b"][3, : 2 * n] = torch.nan, -9.0
    data["q"][5] *= 1e7
    data["A"][7, 0], data["b"][7, 0] = 1e5 * data["A"][7, 0], 1e5 * data["b"][7, 0]
    layer = lpgd.ConicLayer(cones, solver, METHODS[method], on_error="nan")
    isolated(lambda P, q, A, b: layer(P, q, A, b), data, EVEN)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["squares", "cone", "linear"])
def test_cvxpy_layers(kind: str, method: str) -> None:
    draw, size = draws(1), 9
    x, F, g = cp.Variable(N), cp.Parameter((7, N)), cp.Parameter(7)
    c, most = cp.Parameter(N), cp.Parameter(nonneg=True)
    objective, constraint = {
        "squares": (cp.sum_squares(F @ x - g) + c @ x, cp.norm1(x) <= most),
        "cone": (cp.norm(F @ x - g) + c @ x + 0.1 * cp.sum_squares(x), cp.norm(x) <= most),
        "linear": (c @ x + cp.norm_inf(F @ x - g), cp.abs(x) <= most),
    }[kind]
    layer = lpgd.CvxpyLayer(
        cp.Problem(cp.Minimize(objective), [constraint]),
        parameters=[F, g, c, most], variables=[x], gradient=METHODS[method], on_error="nan",
    )  # fmt: skip
    data = {"F": draw(size, 7, N), "g": draw(size, 7), "c": draw(size, N), "most": draw(size).abs() + 0.5}
    data["c"][1, 0] = torch.nan
    data["g"][5] *= 1e6
    data["F"][7] *= 1e5
    isolated(lambda F, g, c, most: layer(F, g, c, most), data, EVEN)


@pytest.mark.parametrize("name", NODES)
def test_nodes(name: str) -> None:
    case, size = NODES[name], 6
    draws_of = [case.inputs(seed, requires_grad=False) for seed in range(size)]
    inputs = [torch.cat(rows)[:size].clone() for rows in zip(*draws_of, strict=True)]
    inputs[0][1] = torch.nan
    layer = lpgd.NodeLayer(case.node, on_error="nan")
    data = {f"input {place}": tensor for place, tensor in enumerate(inputs)}
    isolated(lambda **leaves: layer(*leaves.values()), data, range(0, size, 2), NODE_BOUND)


def refusing(costs: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """A box's vertex, for costs that are not huge."""
    return None if np.abs(costs).max() > 100.0 else nearest_in_box(costs)


def test_black_boxes() -> None:
    data = {"costs": draws(2)(9, N)}
    data["costs"][1, 0], data["costs"][3] = torch.nan, 1e6
    layer = lpgd.BlackboxLayer(refusing, lpgd.BlackboxBackprop(2.0), on_error="nan")
    isolated(lambda costs: layer(costs), data, EVEN)


def test_direct_losses() -> None:
    def best(w: NDArray[np.float64]) -> NDArray[np.float64] | lpgd.Status:
        return lpgd.Status.INFEASIBLE if np.abs(w).max() > 100.0 else (w > 0).astype(float)

    def augmented(w: NDArray[np.float64], step: float, target: NDArray[np.float64]) -> Any:
        return best(w - step * (1.0 - 2.0 * target))

    target = (draws(3)(9, N) > 0).double()
    layer = lpgd.DirectLossLayer(
        best, lambda x: x, lambda x, target: np.abs(x - target).sum(), augmented, lpgd.DirectLoss(0.5), on_error="nan"
    )
    data = {"weights": draws(4)(9, N)}
    data["weights"][1, 0], data["weights"][3] = torch.nan, 1e6
    places = {row.numpy().tobytes(): place for place, row in enumerate(data["weights"])}

    def call(weights: Tensor) -> Any:
        chosen = [places[row.detach().numpy().tobytes()] for row in weights]
        return layer(weights, target=target[chosen])

    isolated(call, data, EVEN)
