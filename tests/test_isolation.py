"""What is wrong with some elements of a batch changes nothing for the others: status, solution and gradient.

Last bits do differ from those of an element alone: BLAS sums in another order for another number of right-hand sides,
and stacks of systems have the size of the largest one.  The bounds here are a few digits above that.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import lpgd
from lpgd.execution.workspaces import workspaces

N, INFINITE = 5, float("inf")
BAD = ("infeasible", "nan", "unbounded", "degenerate", "large", "small", "slow")
KINDS = [kind for bad in BAD for kind in ("good", bad)]
GOOD = [place for place, kind in enumerate(KINDS) if kind == "good"]
METHODS = {"LPGD": lpgd.LPGD(tau=0.1), "ImplicitKKT": lpgd.ImplicitKKT()}


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
    if not quadratic:
        del data["P"]
    return data


def answers(layer: Any, data: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[lpgd.Status, ...]]:
    """Solutions and gradients, and statuses."""
    workspaces.clear()
    leaves = {name: value.clone().requires_grad_() for name, value in data.items()}
    first = [leaves[name] for name in ("P", "q") if name in leaves]
    output = layer(*first, **{name: leaf for name, leaf in leaves.items() if name not in ("P", "q")})
    usable = torch.isfinite(output.x).all(-1, keepdim=True)
    (torch.where(usable, output.x, 0.0) * torch.arange(1, N + 1)).sum().backward()
    found = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"x": output.x.detach(), **found}, output.info.statuses


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
    data = programs(quadratic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = layer_of(solver, quadratic, method, "nan")
        together, statuses = answers(layer, data)
        worst: dict[str, float] = {}
        for place in GOOD:
            alone, status = answers(layer, {name: value[place : place + 1] for name, value in data.items()})
            assert status == (lpgd.Status.SOLVED,)
            assert statuses[place] is status[0]
            for name, value in alone.items():
                error = float((value[0] - together[name][place]).abs().max() / (1.0 + value.abs().max()))
                worst[name] = max(worst.get(name, 0.0), error)
    assert worst["x"] < 1e-10, worst
    assert max(worst.values()) < 1e-8, worst
    for place, kind in enumerate(KINDS):
        if kind in ("infeasible", "nan"):
            assert not statuses[place].usable
            assert not together["gradient of q"][place].any()


@pytest.mark.parametrize("solver", lpgd.available())
def test_errors_and_warnings_name_the_bad_elements_alone(solver: str) -> None:
    data = programs(True)
    bad = [place for place, kind in enumerate(KINDS) if kind in ("infeasible", "nan", "unbounded")]
    layer = layer_of(solver, True, "ImplicitKKT", "raise")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(lpgd.SolverError) as raised:
            answers(layer, data)
    assert set(bad) <= set(raised.value.indices)
    assert not set(GOOD) & set(raised.value.indices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warned, _ = answers(layer_of(solver, True, "ImplicitKKT", "warn"), data)
        silent, _ = answers(layer_of(solver, True, "ImplicitKKT", "nan"), data)
    assert torch.allclose(warned["x"][GOOD], silent["x"][GOOD], rtol=0.0, atol=1e-10)
